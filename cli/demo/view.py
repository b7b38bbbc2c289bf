"""How the demo shows itself: a table that grows on a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Step:
    """One event and what followed. `gap_ms` is what the ssh session felt; `moved`: a path
    changed.
    """

    at_s: float
    title: str
    gap_ms: float
    path_a: str
    path_b: str
    moved: bool
    alive: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class View(Protocol):
    """What the demo tells its user while it runs."""

    def say(self, text: str) -> None:
        """Something is being done."""

    def step(self, step: Step) -> None:
        """An event has been measured."""

    def close(self) -> None:
        """Nothing more comes."""


class PlainView:
    """One line for each thing, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print the text."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: Step) -> None:
        """Print the step on one line."""
        state = f"gap {step.gap_ms:6.0f} ms" if step.alive else "SESSION BROKEN"
        self.say(
            f"{step.at_s:6.1f} s  {step.title:<36} {state}   A: {step.path_a}   B: {step.path_b}"
        )

    def close(self) -> None:
        """Nothing to do."""


class LiveView:
    """A table on the terminal, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._steps: list[Step] = []
        self._text = ""
        self._live = Live(self._table(), console=console, auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        """Show the text below the table, until the next one."""
        self._text = text
        self._live.update(self._table(), refresh=True)

    def step(self, step: Step) -> None:
        """Add a row."""
        self._steps.append(step)
        self._text = ""
        self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        self._text = ""
        self._live.update(self._table(), refresh=True)
        self._live.stop()

    def _table(self) -> Table:
        table = Table(title="an ssh session through the tunnel", caption=self._text)
        table.add_column("s", justify="right")
        table.add_column("event")
        table.add_column("gap felt", justify="right", no_wrap=True)
        table.add_column("paths of A and B", no_wrap=True)
        for step in self._steps:
            gap = f"{step.gap_ms:.0f} ms" if step.alive else "broken"
            colour = "green" if step.alive else "red"
            table.add_row(
                f"{step.at_s:.1f}",
                step.title,
                f"[{colour}]{gap}[/]",
                Text(f"{step.path_a}\n{step.path_b}"),
            )
        return table


def make_view(console: Console) -> View:
    """The view that fits the console."""
    return LiveView(console) if console.is_terminal else PlainView(console)
