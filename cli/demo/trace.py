"""Traces of a stream of numbered probes, and what an application would say about them.

A sender and a receiver each append fixed-size records to a file, so that a reader can look at any
moment, and so that nothing is computed while something is measured. All times are
time.monotonic() seconds: both ends run on one machine.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_RECORD = struct.Struct("<Bxxxidd")
_TAIL = 400  # records: a second of probes both ways
_SENT, _ARRIVED, _ENDED = 1, 2, 3


class Sent(NamedTuple):
    """A probe that left; `error` is the errno of a send that failed, 0 otherwise."""

    number: int
    time: float
    error: int


class Arrival(NamedTuple):
    """A probe that arrived; `sent` is its sender's stamp."""

    number: int
    sent: float
    time: float


class TraceWriter:
    """Appends records to a file; `flush` makes them visible to readers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def sent(self, number: int, now: float, error: int = 0) -> None:
        """A probe left, or failed to."""
        self._file.write(_RECORD.pack(_SENT, number, now, float(error)))

    def arrived(self, number: int, sent: float, now: float) -> None:
        """A probe arrived."""
        self._file.write(_RECORD.pack(_ARRIVED, number, sent, now))

    def ended(self, code: int, now: float) -> None:
        """The stream's carrier ended with this exit code."""
        self._file.write(_RECORD.pack(_ENDED, code, now, 0.0))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()


@dataclass
class Trace:
    """What one end has recorded so far; `ended` is (exit code, time) once its carrier has ended."""

    sent: list[Sent]
    arrivals: list[Arrival]
    ended: tuple[int, float] | None = None

    @classmethod
    def read(cls, path: Path, since: float = 0.0) -> Trace:
        """Read a trace file, which may still be growing; empty when it is not there yet. With
        `since`, only what was recorded from about that time on.
        """
        trace = cls([], [])
        try:
            with path.open("rb") as file:
                file.seek(_first_since(file, since) * _RECORD.size)
                data = file.read()
        except FileNotFoundError:
            return trace
        whole = len(data) - len(data) % _RECORD.size
        for kind, number, first, second in _RECORD.iter_unpack(data[:whole]):
            if kind == _SENT:
                trace.sent.append(Sent(number, first, int(second)))
            elif kind == _ARRIVED:
                trace.arrivals.append(Arrival(number, first, second))
            else:
                trace.ended = (number, first)
        return trace


def _first_since(file: BinaryIO, since: float) -> int:
    """Number of the first record of `since` or later: records are in the order of their times."""
    low, high = 0, file.seek(0, SEEK_END) // _RECORD.size
    while since and low < high:
        middle = (low + high) // 2
        file.seek(middle * _RECORD.size)
        kind, _, first, second = _RECORD.unpack(file.read(_RECORD.size))
        if (second if kind == _ARRIVED else first) < since:
            low = middle + 1
        else:
            high = middle
    return low


def last_arrival(path: Path) -> float | None:
    """When the newest arrival of a growing trace was, cheaply; None when there is none near its
    end.
    """
    try:
        with path.open("rb") as file:
            whole = file.seek(0, SEEK_END) // _RECORD.size
            file.seek(max(0, whole - _TAIL) * _RECORD.size)
            data = file.read(min(whole, _TAIL) * _RECORD.size)
    except FileNotFoundError:
        return None
    newest = None
    for kind, _, _, time in _RECORD.iter_unpack(data):
        if kind == _ARRIVED:
            newest = time
    return newest


@dataclass(frozen=True)
class Report:
    """One direction of a stream within a window. Seconds; every gap is beyond the spacing.

    gap: the longest silence. gap_at: when it began. late: the largest one-way delay of a probe
    sent in the window. stall: the longest that the prober itself was late to send. gaps: (begin,
    length) of every silence of more than twice the spacing. closed: the longest silence was ended
    by an arrival. unsent counts probes that the sender's own system refused; they are part of lost.
    """

    gap: float
    gap_at: float
    closed: bool
    sent: int
    unsent: int
    lost: int
    duplicated: int
    reordered: int
    late: float
    stall: float
    gaps: tuple[tuple[float, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def report(
    sent: Sequence[Sent],
    arrivals: Sequence[Arrival],
    spacing: float,
    begin: float,
    end: float,
) -> Report:
    """What the receiver felt between begin and end.

    A silence counts if any part of it lies in the window, with its full length. Probes still on
    their way count as lost: let the stream run for a while after `end`.
    """
    times = [arrival.time for arrival in arrivals]
    first = max(0, bisect_right(times, begin) - 1)
    last = bisect_left(times, end)
    edges = times[first : last + 1] or [begin]
    closed_by_arrival = last < len(times)
    silences = [(before, after - before - spacing, True) for before, after in pairwise(edges)]
    if not closed_by_arrival:
        silences.append((edges[-1], max(0.0, end - edges[-1] - spacing), False))
    gap_at, gap, closed = max(silences, key=lambda silence: silence[1], default=(begin, 0.0, True))

    window = [probe for probe in sent if begin <= probe.time <= end]
    numbers = {probe.number for probe in window}
    counts = Counter(arrival.number for arrival in arrivals if arrival.number in numbers)
    newest = -1
    reordered = 0
    late = 0.0
    for arrival in arrivals:
        if arrival.number in numbers:
            late = max(late, arrival.time - arrival.sent)
            reordered += arrival.number < newest
        newest = max(newest, arrival.number)
    return Report(
        gap=max(gap, 0.0),
        gap_at=gap_at,
        closed=closed,
        sent=len(window),
        unsent=sum(probe.error != 0 for probe in window),
        lost=sum(number not in counts for number in numbers),
        duplicated=sum(count - 1 for count in counts.values()),
        reordered=reordered,
        late=late,
        stall=max(
            (after.time - before.time - spacing for before, after in pairwise(window)), default=0.0
        ),
        gaps=tuple(
            (begin_, length)
            for begin_, length, _ in silences
            # more than twice the spacing between two arrivals
            if length > spacing
        ),
    )
