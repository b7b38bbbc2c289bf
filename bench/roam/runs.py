"""One run of a cell: what was done and what was felt."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.acts import Mover
from bench.bed import HOSTS, Bed, Mode, Network
from cli.demo.trace import Report
from cli.demo.world import HostName

BEFORE = 0.3  # seconds of calm before an event that belong to its window
DEAD = 5.0  # seconds without an echo, while there is a path, after which a session counts as dead
_LANDING = 0.1  # seconds that the last probes of a window have to arrive and be recorded


@dataclass(frozen=True)
class Settings:
    """How the matrix is measured. `suspend` and `outage` in seconds."""

    network: Network
    suspend: float = 60.0
    outage: float = 600.0


@dataclass(frozen=True)
class Cell:
    """A cell of the matrix: row, who moves, a variant of the row's event, redundancy or rival."""

    row: str
    mover: Mover
    variant: str
    mode: Mode

    def __str__(self) -> str:
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.row} of {self.mover}{variant}, {self.mode}"


@dataclass
class Run:
    """What one run gave. `figures` are what the goals are about, in ms: by way ("from" the mover,
    "toward" it; "A>B" and "B>A" where both move), or by what was waited for. None: it never came.

    `moved` is whether any path is another one than before, None where that says nothing.
    """

    figures: dict[str, float | None] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    duplicated: dict[str, int] = field(default_factory=dict)
    reordered: dict[str, int] = field(default_factory=dict)
    ssh_gap_ms: float | None = None
    ssh_alive: bool = True
    recovered: bool = True
    moved: bool | None = None
    event_ms: float = 0.0
    ledger: dict[HostName, list[dict[str, Any]]] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the bed is of no more use and worth keeping."""
        return not (self.ssh_alive and self.recovered)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Watched:
    """A window around an event on a bed: create it before, `end` it when all flows again."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._paths = [bed.active_path(host) for host in HOSTS]
        self._seconds = [bed.second_path(host) for host in HOSTS]
        self._known = {host: _newest(bed, host) for host in HOSTS}
        self._began = time.monotonic()
        time.sleep(BEFORE)  # asking has cost CPU time

    def end(self, run: Run, mover: Mover, begin: float, *, patience: float = DEAD) -> None:
        """Take everything that the application felt since `begin`."""
        bed = self._bed
        end = time.monotonic()
        time.sleep(_LANDING + bed.network.rtt)
        reports = bed.probe.report(begin - BEFORE, end)
        calm = bed.probe.report(self._began, begin - bed.network.rtt)
        felt = bed.session.report(begin - BEFORE, end)
        for direction, report in reports.items():
            way = named(direction, mover)
            run.figures[way] = ms(report.gap)
            run.lost[way] = report.lost
            run.duplicated[way] = report.duplicated
            run.reordered[way] = report.reordered
            run.detail[way] = _detail(report, begin) | {"calm_ms": ms(calm[direction].gap)}
        run.ssh_gap_ms = ms(felt.gap)
        run.ssh_alive = not bed.session.closed() and felt.gap < patience
        paths = [bed.active_path(host) for host in HOSTS]
        if bed.mode != "wireguard-go":
            run.moved = paths != self._paths
        run.detail["paths"] = [self._paths, paths]
        run.detail["seconds"] = self._seconds
        for host in HOSTS:
            run.ledger[host] = [
                record for record in bed.history(host) if record["sequence"] > self._known[host]
            ]


def named(direction: str, mover: Mover) -> str:
    """A direction of the probes as a way of the mover."""
    sender = "A" if direction == "a_to_b" else "B"
    if mover == "both":
        return "A>B" if sender == "A" else "B>A"
    return "from" if sender == mover else "toward"


def ms(seconds: float) -> float:
    """To the microsecond."""
    return round(seconds * 1000, 3)


def _newest(bed: Bed, host: HostName) -> int:
    return max((int(record["sequence"]) for record in bed.history(host)), default=0)


def _detail(report: Report, begin: float) -> dict[str, Any]:
    return {
        "gap_at_ms": ms(report.gap_at - begin),
        "sent": report.sent,
        "unsent": report.unsent,
        "late_ms": ms(report.late),
        "stall_ms": ms(report.stall),
        "gaps_ms": [[ms(at - begin), ms(length)] for at, length in report.gaps],
    }
