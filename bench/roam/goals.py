"""What every cell of the matrix must reach, milliseconds beyond the probe spacing.

Toward the mover, physics asks for one round trip: the news of a move travels one way, the first
redirected packet the other. Redundancy is not bound by that. Where a goal holds for one round-trip
time only (it has a time to notice in it, or round trips that nobody counted), there is none for
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from bench.bed import Mode
from bench.figures import quantile

RESOLUTION = 1.0  # ms; so late are the probes themselves when nothing happens
_USUAL_RTT = 20.0  # ms


class Goal(NamedTuple):
    """Of a median and of the 95th percentile; None: not set."""

    median: float
    p95: float | None

    def met(self, values: Sequence[float]) -> bool:
        """Whether measured values reach it."""
        if not values:
            return False
        slow = self.p95 is not None and quantile(values, 0.95) > self.p95 + RESOLUTION
        return not slow and median(values) <= self.median + RESOLUTION


_REDUNDANT = {
    "link-down": Goal(3, 8),
    "black-hole": Goal(3, 8),
    "rebind": Goal(3, 8),
    "make-before-break": Goal(0, 3),
    "both": Goal(5, 15),
}
_FROM = {"link-down": Goal(8, 15), "rebind": Goal(3, 8), "address": Goal(8, 20)}
_TOWARD = {"link-down": (8, 20), "rebind": (5, 15), "address": (8, 25)}  # beyond one round trip
_EITHER_WAY = {"make-before-break": Goal(0, 5)}
_AT_USUAL_RTT = {"black-hole": Goal(50, 80), "both": Goal(60, 100)}
_BY_RENDEZVOUS = Goal(250, 500)
_EXPANSION = {"0 NATs": Goal(80, None), "1 NAT": Goal(100, None), "2 NATs": Goal(120, None)}


def goal(row: str, way: str, mode: Mode, rtt: float, variant: str = "") -> Goal | None:
    """The goal of a figure; `way` as in `bench.roam.runs.Run`, `rtt` in ms."""
    if mode == "wireguard-go":
        return None
    if row == "expansion":
        return _EXPANSION.get(variant) if way == "answered" and rtt == _USUAL_RTT else None
    limits = {
        ("suspend", "A>B"): 2 * rtt + 20,
        ("suspend", "B>A"): 2 * rtt + 20,
        ("outage", "ssh"): 1000.0,
        ("connect", "A>B"): 8 * rtt + 100 if variant else 3 * rtt + 30,
        ("connect", "B>A"): 8 * rtt + 100 if variant else 3 * rtt + 30,
    }
    if (row, way) in limits:
        return Goal(limits[row, way], limits[row, way])
    if row == "both-anew":
        return _BY_RENDEZVOUS if rtt == _USUAL_RTT else None
    if mode == "interactive":
        return _REDUNDANT.get(row)
    if row in _EITHER_WAY:
        return _EITHER_WAY[row]
    if row in _AT_USUAL_RTT:
        return _AT_USUAL_RTT[row] if rtt == _USUAL_RTT else None
    if way == "toward" and row in _TOWARD:
        return Goal(*(rtt + beyond for beyond in _TOWARD[row]))
    return _FROM.get(row) if way == "from" else None
