"""The matrix as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.bed import Mode
from bench.figures import markdown, quantile
from bench.roam.goals import Goal, goal
from bench.roam.runs import Cell, Run

_HEAD = (
    *("event", "end", "way", "redundancy", "runs", "median", "p95", "max", "calm", "stall"),
    *("lost", "dup", "ssh max", "dead", "goal", "goal p95", "met"),
)


@dataclass
class Outcome:
    """All runs of a cell; `kept` are the directories of those that failed."""

    cell: Cell
    rtt: float  # ms
    has_redundancy: bool = True
    runs: list[Run] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problem: str = ""

    def ways(self) -> list[str]:
        """What was measured, in the order of the first run that has it."""
        return list(dict.fromkeys(way for run in self.runs for way in run.figures))

    def figures(self, way: str) -> list[float]:
        """Milliseconds of all runs in which it came."""
        return [figure for run in self.runs if (figure := run.figures.get(way)) is not None]

    def missing(self, way: str) -> int:
        """Runs in which it never came."""
        return len(self.runs) - len(self.figures(way))

    def goal(self, way: str) -> Goal | None:
        """Of one of its figures."""
        cell = self.cell
        mode: Mode = cell.mode if self.has_redundancy or cell.mode != "interactive" else "off"
        return goal(cell.row, way, mode, self.rtt, cell.variant)

    @property
    def dead(self) -> int:
        """Sessions that died, and runs after which traffic did not recover."""
        return sum(run.failed for run in self.runs)

    @property
    def unmoved(self) -> int:
        """Runs that changed no path although they should: they measured nothing."""
        return sum(run.moved is False for run in self.runs)

    def met(self, way: str) -> bool | None:
        """Whether a figure reaches its goal in all its runs, None when it has none."""
        aim = self.goal(way)
        if aim is None:
            return None
        return aim.met(self.figures(way)) and not self.missing(way)

    def as_dict(self) -> dict[str, Any]:
        """Everything, raw, and what the table says."""
        summary = {}
        for way in self.ways():
            values, aim = self.figures(way), self.goal(way)
            summary[way] = {
                "figures_ms": [run.figures.get(way) for run in self.runs],
                "median_ms": median(values) if values else None,
                "p95_ms": quantile(values, 0.95) if values else None,
                "max_ms": max(values, default=None),
                "lost": sum(run.lost.get(way, 0) for run in self.runs),
                "goal_ms": aim._asdict() if aim else None,
                "met": self.met(way),
            }
        return {
            **asdict(self.cell),
            "rtt_ms": self.rtt,
            "dead": self.dead,
            "unmoved": self.unmoved,
            "kept": self.kept,
            "problem": self.problem,
            "summary": summary,
            "runs": [run.as_dict() for run in self.runs],
        }


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each figure of each cell of ours, beside it the same of wireguard-go."""
    rivals = {_place(one.cell): one for one in outcomes if one.cell.mode == "wireguard-go"}
    head = [*_HEAD, *(["wireguard-go", "lost"] if rivals else [])]
    lines = [head]
    for outcome in outcomes:
        if outcome.cell.mode == "wireguard-go":
            continue
        rival = rivals.get(_place(outcome.cell))
        for way in outcome.ways():
            line = [*_words(outcome, way), *_numbers(outcome, way)]
            lines.append([*line, *(_beside(rival, way) if rivals else [])])
    lines += [
        [*_words(one, way), *_numbers(one, way), "", ""]
        for place, one in rivals.items()
        if place not in {_place(o.cell) for o in outcomes if o is not one}
        for way in one.ways()
    ]
    return markdown(lines, left=4)


def _place(cell: Cell) -> tuple[str, str, str]:
    return cell.row, cell.mover, cell.variant


def _words(outcome: Outcome, way: str) -> Iterator[str]:
    cell = outcome.cell
    yield f"{cell.row}, {cell.variant}" if cell.variant else cell.row
    yield cell.mover
    yield way
    yield cell.mode if outcome.has_redundancy or cell.mode == "off" else "default"


def _numbers(outcome: Outcome, way: str) -> Iterator[str]:
    values, aim, runs = outcome.figures(way), outcome.goal(way), outcome.runs
    yield f"{len(values)}/{len(runs)}" if outcome.missing(way) else str(len(runs))
    yield from _spread(values)
    calm = [run.detail[way]["calm_ms"] for run in runs if "calm_ms" in run.detail.get(way, {})]
    yield f"{median(calm):.1f}" if calm else "-"
    stall = [run.detail[way]["stall_ms"] for run in runs if "stall_ms" in run.detail.get(way, {})]
    yield f"{median(stall):.1f}" if stall else "-"
    counted = any(way in run.lost for run in runs)
    yield str(sum(run.lost.get(way, 0) for run in runs)) if counted else "-"
    yield str(sum(run.duplicated.get(way, 0) for run in runs)) if counted else "-"
    ssh = [run.ssh_gap_ms for run in runs if run.ssh_gap_ms is not None]
    yield f"{max(ssh):.0f}" if ssh else "-"
    yield str(outcome.dead)
    yield f"{aim.median:g}" if aim else "-"
    yield f"{aim.p95:g}" if aim and aim.p95 is not None else "-"
    met = outcome.met(way)
    word = "-" if met is None else "yes" if met else "**no**"
    yield f"{word}, {outcome.unmoved} unmoved" if outcome.unmoved else word


def _spread(values: Sequence[float]) -> Iterator[str]:
    if not values:
        yield from ("-", "-", "-")
        return
    for value in (median(values), quantile(values, 0.95), max(values)):
        yield f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _beside(rival: Outcome | None, way: str) -> Iterator[str]:
    values = rival.figures(way) if rival else []
    if rival is None or not values:
        yield from ("-", "-")
        return
    yield f"{median(values):.1f} / {quantile(values, 0.95):.1f}"
    yield str(sum(run.lost.get(way, 0) for run in rival.runs))
