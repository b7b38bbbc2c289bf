"""The rows of the matrix and the cells that each has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.acts import Mover
from bench.bed import Bed, Mode
from bench.roam import absence, arrival, gaps
from bench.roam.runs import Cell, Run, Settings

RIVAL: Mode = "wireguard-go"
RENDEZVOUS = "2 NATs by rendezvous"
_EITHER: tuple[tuple[Mover, str], ...] = (("A", ""), ("B", ""))


@dataclass(frozen=True)
class Row:
    """What happens, to whom and in which variants.

    redundancy: it has a goal with and one without; otherwise it is measured with the default
    only. rival: wireguard-go can do it too. long: a run takes a minute or more, so there are few.
    fresh: a bed of its own for each run, because a tunnel that has just moved waits before it moves
    again by choice. built: the bed is nothing but a world, the row starts the daemons itself.
    """

    name: str
    what: str
    measure: Callable[[Bed, Cell, Settings], Run]
    cells: tuple[tuple[Mover, str], ...] = _EITHER
    redundancy: bool = True
    rival: bool = False
    long: bool = False
    fresh: bool = False
    built: bool = False

    def modes(self, redundancy: str, rival: bool) -> Iterator[Mode]:
        """Which to measure: `redundancy` is "off", "interactive" or "both"."""
        if redundancy != "both":
            yield "off" if redundancy == "off" else "interactive"
        elif self.redundancy:
            yield from ("off", "interactive")
        else:
            yield "interactive"
        if rival and self.rival:
            yield RIVAL

    def bed(self, mover: Mover, variant: str, family: int) -> dict[str, Any]:
        """How the world of a cell differs from the usual one (arguments of `Bed`), and its family
        outside the tunnel.
        """
        if self.name == "both-anew" or variant == RENDEZVOUS:
            return {"uplinks": (1, 1), "family": family, "rendezvous": True}
        if self.name in ("address", "connect"):
            return {"uplinks": (1, 1), "family": family}
        if self.name == "make-before-break":
            return {"uplinks": (1, 2) if mover == "A" else (2, 1), "family": family}
        if self.name == "expansion":
            nats = {"0 NATs": (False, 6), "1 NAT": (mover, 6), "2 NATs": (True, family)}
            nat66, outside = nats[variant]
            return {"uplinks": (1, 1), "nat66": nat66, "family": outside}
        return {"family": family}


ROWS = (
    Row(
        "link-down",
        "the active path's interface goes down, the other uplink is warm",
        gaps.event,
        rival=True,
    ),
    Row("black-hole", "the active path's wire drops everything, nothing is signalled", gaps.event),
    Row(
        "rebind",
        "the NAT's port or public address for the flow changes",
        gaps.event,
        (("A", "port"), ("A", "address"), ("B", "address")),
        rival=True,
    ),
    Row(
        "address",
        "same and only link, new address; figures without the time that has no address",
        gaps.event,
        rival=True,
    ),
    Row(
        "make-before-break",
        "a better interface appears, some time later the old one goes",
        gaps.make_before_break,
        fresh=True,
    ),
    Row(
        "both",
        "both ends' active interfaces go down at once, the other pair is warm",
        gaps.event,
        (("both", ""),),
    ),
    Row(
        "both-anew",
        "both ends get new addresses on their only links at once: nothing that was known survives;"
        " figures without the time that has no address",
        gaps.event,
        (("both", "by rendezvous"),),
        redundancy=False,
    ),
    Row(
        "suspend",
        "both processes are stopped; first packet sent after their resume",
        absence.suspend,
        (("both", "NATs keep"), ("both", "NATs forget")),
        redundancy=False,
        long=True,
    ),
    Row(
        "outage",
        "no path for a long time; first echo of ssh after the first usable address",
        absence.outage,
        redundancy=False,
        long=True,
    ),
    Row(
        "expansion",
        "a new interface appears until its path is checked",
        arrival.expansion,
        tuple((end, nats) for end in ("A", "B") for nats in ("0 NATs", "1 NAT", "2 NATs")),
        redundancy=False,
    ),
    Row(
        "connect",
        "both daemons are running; first packet through, direct",
        arrival.connect,
        (("A", ""), ("A", RENDEZVOUS)),
        redundancy=False,
        built=True,
    ),
)


def cells(
    rows: Sequence[Row], redundancy: str, rival: bool, mover: Mover | None = None
) -> list[tuple[Row, Cell]]:
    """All cells of some rows."""
    return [
        (row, Cell(row.name, end, variant, mode))
        for row in rows
        for end, variant in row.cells
        if mover in (None, end)
        for mode in row.modes(redundancy, rival)
    ]
