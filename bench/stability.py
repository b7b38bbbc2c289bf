"""A path that loses and jitters, but never fails: does the tunnel stay where it is?

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

All four wires lose 1% at random and add up to 10 ms, each way; a path has two of them. Half of
the time the traffic is dense (200 probes a second each way, ssh, 5 Mbit/s of TCP), half of it
sparse (a probe and a keystroke a second). Every migration is one too many. Redundancy should hide
from the probes most of what the wires lose.

    ./dev bench stability [--minutes 10] [--redundancy off|interactive|both]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from bench.bed import HOSTS, Bed, Mode, Network
from bench.figures import markdown
from bench.options import PROGRAMS, Failures, add_network_options, network, plain
from bench.roam.runs import ms
from bench.run import machine, note, ready

DENSE, SPARSE = "dense", "sparse"
_SPACING = {DENSE: 0.005, SPARSE: 1.0}  # seconds between probes
_KEYSTROKE = {DENSE: 0.02, SPARSE: 1.0}
_STREAM = {DENSE: 5.0, SPARSE: 0.0}  # Mbit/s
_RING = 100_000_000  # bytes of capture
_LANDING = 1.5  # seconds that the last probes have to arrive and be recorded
_COLUMNS = (
    *("migrations", "suspicions", "sent", "lost", "lost %", "dup", "reordered"),
    *("longest gap", "ssh", "TCP"),
)


def watch(bed: Bed, seconds: float) -> dict[str, Any]:
    """What happens on a bed while nothing does."""
    before = {host: bed.counters(host).get("suspicions", 0) for host in HOSTS}
    moved = {host: len(bed.history(host)) for host in HOSTS}
    begin = time.monotonic()
    while time.monotonic() < begin + seconds and not bed.session.closed():
        time.sleep(0.2)
    end = time.monotonic()
    time.sleep(_LANDING)
    felt = bed.session.report(begin, end)
    reports = bed.probe.report(begin, end).values()
    stream = bed.stream.report(begin, end) if bed.stream else None
    ledger = {host: bed.history(host)[moved[host] :] for host in HOSTS}
    return {
        "seconds": round(end - begin, 1),
        "migrations": sum(len(records) for records in ledger.values()),
        "suspicions": sum(bed.counters(h).get("suspicions", 0) - before[h] for h in HOSTS),
        "sent": sum(report.sent for report in reports),
        "lost": sum(report.lost for report in reports),
        "duplicated": sum(report.duplicated for report in reports),
        "reordered": sum(report.reordered for report in reports),
        "gap_ms": max(ms(report.gap) for report in reports),
        "ssh_gap_ms": ms(felt.gap),
        "ssh_alive": not bed.session.closed(),
        "stream_gap_ms": None if stream is None else ms(stream.gap),
        "ledger": ledger,
    }


def measure(wires: Network, mode: Mode, traffic: str, seconds: float) -> dict[str, Any]:
    """One mode under one kind of traffic; a bed on which the tunnel moved is kept."""
    bed = Bed(
        f"stability-{traffic}",
        wires,
        mode,
        spacing=_SPACING[traffic],
        keystroke=_KEYSTROKE[traffic],
        ring=_RING,
    )
    with bed:
        bed.up(stream=_STREAM[traffic])
        found = watch(bed, seconds)
        bed.failed = bool(found["migrations"]) or not found["ssh_alive"]
    kept = str(bed.directory) if bed.failed else None
    return {"mode": mode, "traffic": traffic, "kept": kept, **found}


def table(found: list[dict[str, Any]]) -> str:
    """A line for each mode and traffic."""
    lines = [["traffic", "redundancy", *_COLUMNS]]
    for one in found:
        share = 100 * one["lost"] / one["sent"] if one["sent"] else 0.0
        gaps = (one["gap_ms"], one["ssh_gap_ms"], one["stream_gap_ms"])
        lines.append(
            [
                one["traffic"],
                one["mode"],
                *(str(one[key]) for key in ("migrations", "suspicions", "sent", "lost")),
                f"{share:.2f}",
                *(str(one[key]) for key in ("duplicated", "reordered")),
                *("-" if gap is None else f"{gap:.0f}" for gap in gaps),
            ]
        )
    return markdown(lines, left=2)


def main(arguments: list[str]) -> int:
    """Watch; 0 when the tunnel never moved."""
    parser = argparse.ArgumentParser(
        prog="./dev bench stability", description="Moves that nobody needs."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of each redundancy")
    parser.add_argument("--redundancy", choices=("off", "interactive", "both"), default="both")
    add_network_options(parser)
    parser.set_defaults(loss=1.0, jitter=10.0)
    parser.add_argument("--out", type=Path, default=Path("artifacts/stability.json"))
    options = parser.parse_args(arguments)
    if not ready(*PROGRAMS):
        return 4 if os.geteuid() else 1
    modes: tuple[Mode, ...] = ("off", "interactive")
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    started = machine()
    try:
        for mode in modes:
            for traffic in (DENSE, SPARSE):
                if options.redundancy not in (mode, "both"):
                    continue
                note(f"{traffic} traffic, redundancy {mode}: {options.minutes / 2:g} minutes ...")
                try:
                    found.append(measure(network(options), mode, traffic, options.minutes * 30))
                except Failures as error:
                    failed.append(f"{mode}, {traffic}: {error}")
                    note(f"  {error}")
    except KeyboardInterrupt:
        note("interrupted")
        failed.append("interrupted")
    finally:
        print(table(found))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": plain(options),
            "machine": started,
            "failed": failed,
            "found": found,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        for one in found:
            if one["kept"]:
                note(f"{one['mode']}, {one['traffic']}: what happened is in {one['kept']}")
        note(f"gaps in milliseconds; raw values: {options.out}")
    good = all(not one["migrations"] and one["ssh_alive"] for one in found)
    return 0 if good and found and not failed else 1
