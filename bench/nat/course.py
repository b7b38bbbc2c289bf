"""Running the table of meetings: options, places, results."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.nat.kinds import KINDS, Meeting, meetings
from bench.nat.place import Place
from bench.nat.runs import Settings, meet
from bench.nat.table import Outcome, table
from bench.options import PROGRAMS, Failures
from bench.record import record
from bench.run import note, ready


def measure(outcome: Outcome, settings: Settings, runs: int) -> None:
    """All runs of a meeting, each in a place of its own: NATs remember."""
    for _ in range(runs):
        place = Place(
            outcome.meeting, delay=settings.delay, turn=settings.turn, dialled=settings.dialled
        )
        try:
            with place:
                run = meet(place, settings)
                outcome.runs.append(run)
                place.failed = outcome.failed(run)
        except Failures as error:
            outcome.problem = f"{type(error).__name__}: {error}"
            note(f"  {outcome.problem}")
        if place.failed:
            outcome.kept.append(str(place.directory))
            note(f"  failed; what happened is in {place.directory}")


def course(
    todo: Sequence[Meeting],
    settings: Settings,
    runs: int,
    outcomes: list[Outcome],
    done: Callable[[], None],
) -> None:
    """All meetings; `done` is called after each."""
    began = time.monotonic()
    for number, meeting in enumerate(todo, 1):
        outcome = Outcome(meeting, settings.turn)
        outcomes.append(outcome)
        try:
            measure(outcome, settings, runs)
        finally:
            done()
        took = time.monotonic() - began
        left = took / number * (len(todo) - number)
        filled = "#" * (20 * number // len(todo))
        note(
            f"[{filled:20}] {number}/{len(todo)}, about {left / 60:.0f} min left."
            f" {meeting}: {outcome.brief()}"
        )


def chosen(only: Sequence[str], families: Sequence[int]) -> list[Meeting]:
    """The meetings of these families that are named, A:B in either order; all when none is."""
    found = meetings(families)
    if not only:
        return found
    wanted = [frozenset(name.split(":")) for name in only]
    return [one for one in found if frozenset((one.a.name, one.b.name)) in wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev bench nat",
        description="How any two kinds of network meet, and how long that takes.",
        epilog=f"kinds: {', '.join(KINDS)}; and pairs that share a home or a carrier: "
        + ", ".join(f"{m.a.name}:{m.b.name}" for m in meetings((4,)) if m.shared),
    )
    parser.add_argument("--runs", type=int, default=1, help="of each meeting, default 1")
    parser.add_argument("--only", metavar="A:B", action="append", default=[], help="two kinds")
    parser.add_argument("--family", type=int, choices=(4, 6), help="default both")
    parser.add_argument(
        "--turn", choices=("all", "none"), default="all", help="none: without a relay"
    )
    parser.add_argument(
        "--dial",
        action="store_true",
        help="without a broker: A has B's endpoint, where B is public",
    )
    parser.add_argument("--rtt", type=float, default=20.0, metavar="MS", help="default 20")
    parser.add_argument("--wait", type=float, default=20.0, metavar="S", help="for a first packet")
    parser.add_argument(
        "--patience", type=float, default=20.0, metavar="S", help="then, for a direct path"
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts/nat.json"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table goes there too")
    return parser


def main(arguments: list[str]) -> int:
    """Run the table; 0 when every meeting went as it has to."""
    options = _parser().parse_args(arguments)
    if not ready(*PROGRAMS, "mosquitto", "turnserver"):
        return 4 if os.geteuid() else 1
    todo = chosen(options.only, [options.family] if options.family else [4, 6])
    if options.dial:
        todo = [
            Meeting(b, a) if a.name.startswith("public") else Meeting(a, b)
            for a, b, shared in todo
            if any(kind.name.startswith("public") for kind in (a, b))
        ]
    if not todo:
        print("no such meeting; --help has the kinds", file=sys.stderr)
        return 2
    settings = Settings(
        delay=options.rtt / 4000,
        turn=options.turn == "all" and not options.dial,
        dialled=options.dial,
        wait=options.wait,
        patience=options.patience,
    )
    outcomes: list[Outcome] = []
    complete = record(
        options,
        "meetings",
        outcomes,
        lambda write: course(todo, settings, options.runs, outcomes, write),
        lambda: table(outcomes),
        lambda outcome: outcome.meeting,
    )
    if not complete:
        return 130
    return 0 if all(outcome.good for outcome in outcomes) else 1
