"""Random lives of two hosts: `MARTLET_SIM_RUNS` of them, from seed `MARTLET_SIM_SEED` on."""

import os
import time

import pytest

from tests.sim.roam import Roam

RUNS = int(os.environ.get("MARTLET_SIM_RUNS", "16"))
FIRST = int(os.environ.get("MARTLET_SIM_SEED", "1"))
BATCH = 8


@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, BATCH))
def test_random_roams(first: int) -> None:
    failures: list[str] = []
    moves, began = 0, time.perf_counter()
    for seed in range(first, min(first + BATCH, FIRST + RUNS)):
        roam = Roam(seed)
        try:
            roam.run()
        except Exception as problem:  # any exception of the product is a failure of this seed
            failures.append(f"{type(problem).__name__}: {problem} (seed {seed})")
        moves += roam.moves
    took = time.perf_counter() - began
    print(f"{moves} events in {took:.1f} s: {moves / took:.1f} a second")
    assert not failures, "\n".join(failures)


def test_a_seed_tells_the_same_story_twice() -> None:
    stories: list[list[str]] = []
    for _ in range(2):
        story: list[str] = []
        roam = Roam(FIRST, log=story.append)
        roam.run()
        story += [f"{when} {e}" for h in roam.world.hosts.values() for when, e in h.events]
        stories.append(story)
    assert stories[0] == stories[1]
