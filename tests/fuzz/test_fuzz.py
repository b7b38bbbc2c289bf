"""Each fuzz target for a few seconds; `./dev fuzz` runs them for longer."""

import os

import pytest

from tests.fuzz.targets import TARGETS, compiler, run

SECONDS = int(os.environ.get("MARTLET_FUZZ_SECONDS", "3"))


@pytest.mark.skipif(
    compiler() is None, reason="no clang with libFuzzer: ./dev setup installs it where it can"
)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_hostile_breaks_the_engine(target: str) -> None:
    outcome = run(target, SECONDS)
    assert not outcome.failed, outcome.output[-8000:]
