"""The roaming matrix: how long traffic through the tunnel is silent when an end moves.

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

20 ms of round trip. Probes of 64 bytes every 5 ms each way at once, and an ssh session with an
echoed keystroke every 20 ms, run through the tunnel while, in each cell, one end makes the same
move again and again, on the uplink that its active path uses. A gap is the longest silence beyond
the probes' spacing around a move. An interface is brought back between two runs; that is not
counted, but must not kill the session. The way is "toward" the mover or "from" it.

    rebind      the NAT forgets the flow and maps it to another port (A), or moves the port
                forward to another public address (B)
    address     another private address on the same link; a gap has the time without any address in
                it, so it is stricter than the goal, which counts from when the new one is usable
    interface   it goes down, the other one with its own NAT is left; the kernel itself takes
                some of the gap, since routes and netlink follow only when the device has stopped

Needs root and dumps every raw value as JSON: `python -m bench roam [--runs 20] [--out roam.json]`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench.figures import quantile
from cli.demo.nat import Kind
from cli.demo.netns import CommandError, Namespace, terminate
from cli.demo.pair import INNER, MARTLET, Pair, PairError, Session
from cli.demo.probe import Probe
from cli.demo.world import Happened, HostName, World

RTT = 0.020  # seconds
# Seconds; the aims of the project's foundation, for both directions.
GOALS = {"rebind": RTT + 0.025, "address": 3 * RTT + 0.050, "interface": 3 * RTT + 0.050}
DEAD = 5.0  # seconds of silence after which an ssh session counts as dead
_BEFORE = 0.3  # seconds of calm before a move that belong to its window
_LONGEST = 1200  # seconds that the load of a cell may last
_STEADY = 0.6  # seconds of flow, both ways, that end a move's window
_PATIENCE = 8.0  # seconds after which a run is given up
DIRECTIONS = ("from", "toward")


Act = Callable[[World, HostName, int], Happened]


@dataclass(frozen=True)
class Cell:
    """A row of the matrix: a move of one end on its active uplink, and how it is taken back."""

    move: str
    mover: HostName
    act: Act
    back: Act | None = None


CELLS = (
    Cell("rebind", "A", lambda w, end, uplink: w.rebind_nat(end, uplink)),
    Cell("rebind", "B", lambda w, end, uplink: w.rebind_nat(end, uplink, port=False, address=True)),
    Cell("address", "A", World.change_address),
    Cell("address", "B", World.change_address),
    Cell("interface", "A", World.switch_interface, World.restore_interface),
    Cell("interface", "B", World.switch_interface, World.restore_interface),
)


@dataclass
class Outcome:
    """All runs of a cell: by direction gaps in ms and lost probes, and the gaps of the ssh
    session in ms.
    """

    cell: Cell
    gaps: dict[str, list[float]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})
    lost: dict[str, list[int]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})
    session: list[float] = field(default_factory=list)
    dead_sessions: int = 0
    unmoved: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)


class Bed:
    """A world with the tunnel, probes and an ssh session on it, for all runs of one cell."""

    def __init__(
        self,
        stack: ExitStack,
        *,
        family: int,
        inner: int,
        kind: Kind,
        load: float,
        martlet: Sequence[str],
    ) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="martlet-roam-")))
        self.world = stack.enter_context(
            World(
                families=(family,),
                delay=RTT / 4,
                nat66=True,
                kinds={"A0": kind, "A1": kind},
                directory=directory,
            )
        )
        self.pair = Pair(self.world, directory, martlet=martlet)
        self.pair.prepare()
        self.pair.up()
        spaces = self.world.a.space, self.world.b.space
        if load:
            stack.enter_context(_loaded(*spaces, INNER["B"][inner], load))
        self.probe = Probe(spaces[0], INNER["A"][inner], spaces[1], INNER["B"][inner], directory)
        stack.callback(self.probe.stop)
        self.session = Session(self.pair, family=inner)
        self.session.start()
        stack.callback(self.session.stop)
        self.settle(time.monotonic())

    def settle(self, since: float) -> bool:
        """Wait until both directions have flowed for a while after `since`; False when patience
        ended.
        """
        steady = since
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            if not (self.probe.flowing(max(since, now - 0.2)) and self._typing(now)):
                steady = now
            if now - steady > _STEADY:
                return True
            if now - since > _PATIENCE:
                return False

    def _typing(self, now: float) -> bool:
        return self.session.last_echo() > now - 0.3

    def paths(self) -> tuple[str, str]:
        """The active paths of A and B."""
        return self.pair.active_path("A"), self.pair.active_path("B")


@contextmanager
def _loaded(near: Namespace, far: Namespace, target: str, mbit: float) -> Iterator[None]:
    """One TCP stream from A to B through the tunnel, at this rate if it gets it."""
    server = far.popen(["iperf3", "-s", "-1"])
    time.sleep(0.3)
    client = near.popen(["iperf3", "-c", target, "-b", f"{mbit:g}M", "-t", str(_LONGEST)])
    try:
        yield
    finally:
        terminate([client, server])


def measure(cell: Cell, bed: Bed, runs: int, outcome: Outcome) -> None:
    """Make the cell's move `runs` times on a bed, or fewer when its ssh session dies."""
    for _ in range(runs):
        before = bed.paths()
        uplink = bed.pair.active_uplink(cell.mover)
        if not bed.settle(time.monotonic()):  # asking for the path has cost CPU time
            outcome.dead_sessions += bed.session.closed()
            return
        happened = cell.act(bed.world, cell.mover, uplink)
        recovered = bed.settle(happened.end)
        end = time.monotonic()
        after = bed.paths()
        reports = bed.probe.report(happened.begin - _BEFORE, end)
        ways = {
            "from": reports["a_to_b" if cell.mover == "A" else "b_to_a"],
            "toward": reports["b_to_a" if cell.mover == "A" else "a_to_b"],
        }
        felt = bed.session.report(happened.begin - _BEFORE, end)
        record: dict[str, Any] = {
            "recovered": recovered,
            "event_ms": round((happened.end - happened.begin) * 1000, 3),
            "session_gap_ms": round(felt.gap * 1000, 3),
            "paths_before": before,
            "paths_after": after,
        }
        for way, seen in ways.items():
            outcome.gaps[way].append(round(seen.gap * 1000, 3))
            outcome.lost[way].append(seen.lost)
            record[way] = seen.as_dict()
        outcome.session.append(round(felt.gap * 1000, 3))
        outcome.runs.append(record)
        # A run that did not change the path measured nothing, however small its gap.
        outcome.unmoved += before == after
        if bed.session.closed() or felt.gap > DEAD:
            outcome.dead_sessions += 1
            return
        if cell.back is not None:
            back = cell.back(bed.world, cell.mover, uplink)
            if not bed.settle(back.end) or bed.session.closed():
                outcome.dead_sessions += 1
                return


def table(outcomes: Sequence[Outcome]) -> str:
    """The matrix as text, one line for each cell and direction."""
    head = f"{'move':<10} {'end':<4} {'way':<7} {'runs':>4} {'median':>8} {'p95':>8} {'max':>8}"
    tail = f"{'goal':>6} {'lost':>6} {'ssh max':>8} {'dead':>5} {'unmoved':>7}   (ms)"
    lines = [f"{head} {tail}"]
    for outcome in outcomes:
        goal = GOALS[outcome.cell.move] * 1000
        for way in DIRECTIONS:
            gaps = outcome.gaps[way]
            if not gaps:
                continue
            p95 = quantile(gaps, 0.95)
            met = "met" if max(gaps) <= goal else "MISSED"
            lines.append(
                f"{outcome.cell.move:<10} {outcome.cell.mover:<4} {way:<7} {len(gaps):>4}"
                f" {statistics.median(gaps):>8.1f} {p95:>8.1f} {max(gaps):>8.1f} {goal:>6.0f}"
                f" {sum(outcome.lost[way]):>6} {max(outcome.session):>8.1f}"
                f" {outcome.dead_sessions:>5} {outcome.unmoved:>7}   {met}"
            )
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, raw."""
    cells = []
    for outcome in outcomes:
        cell: dict[str, Any] = {
            "move": outcome.cell.move,
            "mover": outcome.cell.mover,
            "goal_ms": GOALS[outcome.cell.move] * 1000,
            "dead_sessions": outcome.dead_sessions,
            "unmoved": outcome.unmoved,
            "session_gaps_ms": outcome.session,
            "runs": outcome.runs,
        }
        for way in DIRECTIONS:
            gaps = outcome.gaps[way]
            cell[way] = {"gaps_ms": gaps, "lost": outcome.lost[way]}
            if gaps:
                cell[way] |= {
                    "median_ms": statistics.median(gaps),
                    "p95_ms": quantile(gaps, 0.95),
                    "max_ms": max(gaps),
                }
        cells.append(cell)
    return {
        "rtt_ms": RTT * 1000,
        "spacing_ms": 5,
        "outside": f"IPv{options.family}",
        "inside": f"IPv{options.inner}",
        "nat": options.nat,
        "load_mbit": options.load,
        "cells": cells,
    }


def main(arguments: list[str], martlet: Sequence[str] = MARTLET) -> int:
    """Run the matrix; 0 when every goal was met and no ssh session died."""
    parser = argparse.ArgumentParser(prog="python -m bench roam")
    parser.add_argument("--runs", type=int, default=20, help="moves in each cell")
    parser.add_argument("--family", type=int, choices=(4, 6), default=4, help="outside the tunnel")
    parser.add_argument("--inner", type=int, choices=(4, 6), default=4, help="inside the tunnel")
    parser.add_argument("--nat", choices=get_args(Kind), default="full-cone", help="A's NATs")
    parser.add_argument("--only", choices=sorted(GOALS), action="append", help="these moves")
    parser.add_argument("--mover", choices=("A", "B"), help="this end only")
    parser.add_argument(
        "--load", type=float, default=0.0, metavar="MBIT", help="of TCP from A to B, all the time"
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts/roam.json"))
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("the lab makes network namespaces, which needs root", file=sys.stderr)
        return 4
    outcomes: list[Outcome] = []
    problem = ""
    for cell in CELLS:
        if (options.only and cell.move not in options.only) or options.mover not in (
            None,
            cell.mover,
        ):
            continue
        outcome = Outcome(cell)
        outcomes.append(outcome)
        print(f"{cell.move} of {cell.mover}: {options.runs} runs ...", file=sys.stderr)
        while len(outcome.runs) < options.runs and not problem:
            before = len(outcome.runs)
            try:
                with ExitStack() as stack:
                    bed = Bed(
                        stack,
                        family=options.family,
                        inner=options.inner,
                        kind=options.nat,
                        load=options.load,
                        martlet=martlet,
                    )
                    measure(cell, bed, options.runs - before, outcome)
            except (PairError, CommandError) as error:
                problem = str(error)
        if problem:
            print(problem, file=sys.stderr)
            break
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(as_json(outcomes, options), indent=1) + "\n")
    print(table(outcomes))
    print(f"raw values: {options.out}", file=sys.stderr)
    met = all(
        max(gaps, default=math.inf) <= GOALS[outcome.cell.move] * 1000
        for outcome in outcomes
        for gaps in outcome.gaps.values()
    )
    dead = sum(outcome.dead_sessions for outcome in outcomes)
    unmoved = sum(outcome.unmoved for outcome in outcomes)
    return 0 if met and not (dead or unmoved or problem) else 1
