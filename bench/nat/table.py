"""All meetings as a table of kinds by kinds, as a list, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.figures import markdown, quantile
from bench.nat.kinds import KINDS, Meeting, direct_by_luck, direct_by_rights
from bench.nat.runs import Run


@dataclass
class Outcome:
    """All runs of a meeting; `kept` are the directories of those that failed."""

    meeting: Meeting
    turn: bool  # whether there was a relay to be had
    runs: list[Run] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problem: str = ""

    def failed(self, run: Run) -> bool:
        """It must be direct in the end where it can by rights, and in any case be there if there
        is a relay.
        """
        if direct_by_rights(self.meeting):
            return run.direct_ms is None
        return self.turn and run.met is None

    @property
    def good(self) -> bool:
        """Whether there are runs, and none failed."""
        return bool(self.runs) and not any(self.failed(run) for run in self.runs)

    @property
    def met(self) -> list[float]:
        """Milliseconds until packets had passed both ways."""
        return [run.met for run in self.runs if run.met is not None]

    @property
    def direct(self) -> list[float]:
        """Milliseconds until both ends sent directly."""
        return [run.direct_ms for run in self.runs if run.direct_ms is not None]

    def brief(self) -> str:
        """How they met, and after how long: medians."""
        if not self.runs:
            return "?"
        count = len(self.runs)
        missing = f" ({len(self.met)} of {count})" if len(self.met) < count else ""
        if not self.met:
            return "-"
        first = f"{median(self.met):.0f}{missing}"
        if all(run.relayed is False for run in self.runs if run.met is not None):
            return f"direct {first}"
        if not self.direct:
            return f"relay {first}"
        late = f" ({len(self.direct)} of {count})" if len(self.direct) < count else ""
        return f"relay {first}, direct {median(self.direct):.0f}{late}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, raw, and what the table says."""
        return {
            "a": self.meeting.a.name,
            "b": self.meeting.b.name,
            "shared": self.meeting.shared,
            "direct_by_rights": direct_by_rights(self.meeting),
            "direct_by_luck": direct_by_luck(self.meeting),
            "good": self.good,
            "brief": self.brief(),
            "kept": self.kept,
            "problem": self.problem,
            "runs": [run.as_dict() for run in self.runs],
        }


def table(outcomes: Sequence[Outcome]) -> str:
    """For each family a table of its kinds, then every meeting with its figures."""
    shown = []
    for family in (4, 6):
        cells = {
            (one.meeting.a.name, one.meeting.b.name): one
            for one in outcomes
            if one.meeting.a.family == family and not one.meeting.shared
        }
        names = [name for name in KINDS if any(name in pair for pair in cells)]
        if len(names) > 1:
            shown.append(markdown(_square(names, cells), left=len(names) + 1))
    shown.append(markdown(_listed(outcomes), left=2))
    return "\n\n".join(shown)


def _square(names: Sequence[str], cells: dict[tuple[str, str], Outcome]) -> list[list[str]]:
    lines = [["ms", *names]]
    for a in names:
        found = [cells.get((a, b)) or cells.get((b, a)) for b in names]
        lines.append([a, *("" if one is None else _marked(one) for one in found)])
    return lines


def _marked(outcome: Outcome) -> str:
    return outcome.brief() if outcome.good else f"**{outcome.brief()}**"


def _listed(outcomes: Sequence[Outcome]) -> list[list[str]]:
    lines = [
        ["meeting", "paths in the end", "runs", "met", "p95", "relayed first", "direct", "p95",
         "must be", "good"]
    ]  # fmt: skip
    for one in outcomes:
        kinds = {"/".join(run.kinds.values()) for run in one.runs if run.kinds}
        must = "direct" if direct_by_rights(one.meeting) else "there" if one.turn else "-"
        if direct_by_luck(one.meeting):
            must += ", may be direct"
        lines.append(
            [
                str(one.meeting),
                ", ".join(sorted(kinds)) or "-",
                str(len(one.runs)),
                *_spread(one.met),
                str(sum(run.relayed is True for run in one.runs)),
                *_spread(one.direct),
                must,
                "yes" if one.good else "**no**",
            ]
        )
    return lines


def _spread(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "-", "-"
    return f"{median(values):.0f}", f"{quantile(values, 0.95):.0f}"
