"""Running the matrix: options, beds, results."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from bench import rival
from bench.bed import Bed
from bench.options import PROGRAMS, Failures, add_network_options, network
from bench.record import record
from bench.roam.rows import RIVAL, ROWS, Row, cells
from bench.roam.runs import Cell, Settings
from bench.roam.table import Outcome, table
from bench.run import note, ready

_TRIES = 2  # beds in a row on which nothing could be measured


def measure(
    row: Row, cell: Cell, settings: Settings, runs: int, load: float, outcome: Outcome
) -> None:
    """All runs of a cell, on a fresh bed after each that failed."""
    tries = 0
    while len(outcome.runs) < runs:
        made = row.bed(cell.mover, cell.variant, settings.network.family)
        wires = replace(settings.network, family=made.pop("family"))
        before = len(outcome.runs)
        bed = Bed(f"roam-{cell.row}", wires, cell.mode, **made)
        try:
            with bed:
                if not row.built:
                    bed.up()
                with bed.loaded(load) if load else nullcontext():
                    while len(outcome.runs) < runs and not bed.failed:
                        run = row.measure(bed, cell, settings)
                        outcome.runs.append(run)
                        bed.failed = run.failed
                        if row.fresh:
                            break
        except Failures as error:
            outcome.problem = f"{type(error).__name__}: {error}"
            note(f"  {outcome.problem}")
        if bed.failed:
            outcome.kept.append(str(bed.directory))
            note(f"  failed; what happened is in {bed.directory}")
        tries = tries + 1 if len(outcome.runs) == before else 0
        if tries == _TRIES:
            return


def course(
    todo: Sequence[tuple[Row, Cell]],
    settings: Settings,
    options: argparse.Namespace,
    outcomes: list[Outcome],
    done: Callable[[], None],
) -> None:
    """All cells; `done` is called after each."""
    for row, cell in todo:
        runs = min(options.runs, options.long_runs) if row.long else options.runs
        outcome = Outcome(cell, settings.network.rtt * 1000, row.redundancy)
        outcomes.append(outcome)
        note(f"{cell}: {runs} runs ...")
        began = time.monotonic()
        try:
            measure(row, cell, settings, runs, options.load, outcome)
        finally:
            done()
        took = time.monotonic() - began
        note(f"  {took:.0f} s, {took / max(1, len(outcome.runs)):.1f} s a run")


def _parser() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {row.name:18} {row.what}" for row in ROWS)
    parser = argparse.ArgumentParser(
        prog="./dev bench roam",
        description="How long traffic is silent when something happens.",
        epilog=f"rows:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=20, help="of each cell, default 20")
    parser.add_argument(
        "--long-runs", type=int, default=3, help="at most, of suspend and outage; default 3"
    )
    parser.add_argument("--only", choices=[row.name for row in ROWS], action="append", default=[])
    parser.add_argument("--mover", choices=("A", "B", "both"), help="only cells in which it moves")
    parser.add_argument("--redundancy", choices=("off", "interactive", "both"), default="both")
    parser.add_argument("--suspend", type=float, default=60.0, metavar="S", help="default 60")
    parser.add_argument("--outage", type=float, default=600.0, metavar="S", help="default 600")
    parser.add_argument(
        "--load", type=float, default=0.0, metavar="MBIT", help="of TCP from A to B, all the time"
    )
    parser.add_argument(
        "--rival", action="store_true", help="wireguard-go too, in the rows that it can do"
    )
    add_network_options(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts/roam.json"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table goes there too")
    return parser


def main(arguments: list[str]) -> int:
    """Run the matrix; 0 when every goal was met and no ssh session died."""
    options = _parser().parse_args(arguments)
    if not ready(*PROGRAMS, *(["iperf3"] if options.load else [])):
        return 4 if os.geteuid() else 1
    against = options.rival
    if against and rival.missing():
        note(f"{rival.missing()} (apt-get install wireguard-go wireguard-tools): without it")
        against = False
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    todo = cells(rows, options.redundancy, against, options.mover)
    settings = Settings(network(options), options.suspend, options.outage)
    outcomes: list[Outcome] = []
    complete = record(
        options,
        "cells",
        outcomes,
        lambda write: course(todo, settings, options, outcomes, write),
        lambda: table(outcomes),
        lambda outcome: outcome.cell,
    )
    ours = [outcome for outcome in outcomes if outcome.cell.mode != RIVAL]
    good = all(
        outcome.runs
        and not (outcome.dead or outcome.unmoved)
        and all(outcome.met(way) is not False for way in outcome.ways())
        for outcome in ours
    )
    if not complete:
        return 130
    return 0 if good else 1
