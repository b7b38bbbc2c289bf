"""The arithmetic of the measurements: nothing here starts a process or looks at a clock."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Round = Mapping[str, float | None]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(rounds: Sequence[Round], key: str) -> float | None:
    """Median of one figure over the rounds that have it; None when none has."""
    values = [value for one in rounds if (value := one.get(key)) is not None]
    return statistics.median(values) if values else None


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other, None when that has no meaning."""
    return one / other if one is not None and other else None


# ---- the output of other programs ----

_PING_TIME = re.compile(r"time=([\d.]+) ms")


def ping_times(output: str) -> list[float]:
    """Milliseconds of every answer in the output of ping."""
    return [float(value) for value in _PING_TIME.findall(output)]


@dataclass(frozen=True)
class Stream:
    """What an iperf3 run received."""

    mbit: float  # per second
    octets: int
    retransmits: int


def iperf_result(report: Mapping[str, Any]) -> Stream:
    """The sum of all streams in a report of `iperf3 -J`; RuntimeError with iperf3's own error."""
    if "error" in report:
        raise RuntimeError(f"iperf3: {report['error']}")
    received, sent = report["end"]["sum_received"], report["end"]["sum_sent"]
    return Stream(received["bits_per_second"] / 1e6, received["bytes"], sent.get("retransmits", 0))


def received_between(report: Mapping[str, Any], begin: float, end: float) -> tuple[int, float]:
    """Octets that the server of `iperf3 -J --get-server-output` received in its intervals within
    [begin, end] seconds of the test, and how many seconds those are.
    """
    octets, seconds = 0, 0.0
    for interval in report["server_output_json"]["intervals"]:
        part = interval["sum"]
        if part["start"] >= begin - 0.01 and part["end"] <= end + 0.01:
            octets += part["bytes"]
            seconds += part["seconds"]
    return octets, seconds


# ---- the highest rate that passes ----


def highest_passing(
    passes: Callable[[float], bool],
    start: float,
    *,
    floor: float,
    ceiling: float,
    precision: float = 1.08,
    growth: float = 2.0,
    trials: int = 14,
) -> float | None:
    """The highest rate for which `passes` holds, to a factor of `precision`; None when none does.

    Doubles or halves from `start` until the answer is between two rates, then bisects on the
    logarithm. At most `trials` calls, never outside [floor, ceiling].
    """
    low: float | None = None
    high: float | None = None
    rate = min(max(start, floor), ceiling)
    for _ in range(trials):
        if passes(rate):
            low = rate
        else:
            high = rate
        if low is None:
            if rate <= floor:
                return None
            rate = max(rate / growth, floor)
        elif high is None:
            if rate >= ceiling:
                break
            rate = min(rate * growth, ceiling)
        elif high / low <= precision:
            break
        else:
            rate = math.sqrt(low * high)
    return low


# ---- tables ----

_DIGITS = 3  # significant digits of a figure


def text(value: float | None) -> str:
    """A figure as people read it: three significant digits, never an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(0, digits)}f}"


@dataclass(frozen=True)
class Row:
    """A line of a table: the figure's key in the rounds, its name and unit, which way is good (if
    neither is, a ratio says nothing).
    """

    key: str
    name: str
    unit: str
    better: Literal["more", "less", ""] = ""


def table(
    rows: Sequence[Row], measured: Mapping[str, Sequence[Round]], ours: str, peers: Sequence[str]
) -> str:
    """Medians, one column a tunnel, then ours divided by each peer: an aligned Markdown table.

    `measured` has the rounds of each tunnel. Rows that nobody measured are left out.
    """
    names = list(measured)
    against = [peer for peer in peers if peer in measured and ours in measured and peer != ours]
    lines = [["", "unit", "better", *names, *(f"{ours} / {peer}" for peer in against)]]
    for row in rows:
        medians = {name: median(measured[name], row.key) for name in names}
        if all(value is None for value in medians.values()):
            continue
        cells = [text(medians[name]) for name in names]
        ratios = [
            text(ratio(medians[ours], medians[peer])) if row.better else "" for peer in against
        ]
        lines.append([row.name, row.unit, row.better, *cells, *ratios])
    return markdown(lines, left=3)


def markdown(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as an aligned Markdown table; the first line is the head, `left` columns are words."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = []
    for number, line in enumerate(lines):
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        out.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rules = ("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
            out.append(f"| {' | '.join(rules)} |")
    return "\n".join(out)
