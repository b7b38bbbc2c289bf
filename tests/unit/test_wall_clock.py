"""Clocks of two hosts may differ by hours: whatever decides something never reads the time of day.

The shell has three places that do, for people: since when a broker serves, when a move happened,
and what the doctor thinks of the clock itself. Below it `identity` writes the fixed dates of its
certificates. `tests/lab/test_obstacles.py` shows it with a clock that is an hour off.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tunnel

ROOT = Path(tunnel.__file__).parent
READS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "CLOCK_REALTIME"}
ALLOWED = {"shell/loop.py", "shell/mqtt.py", "shell/doctor/host.py"}


def reads(module: Path) -> Iterator[str]:
    """Where a module asks `time` or `datetime` for the time of day."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("time", "datetime", "date") and node.attr in READS:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"time.{name.name}" for name in node.names if name.name in READS)


def test_nothing_that_decides_reads_the_time_of_day() -> None:
    found = {
        str(module.relative_to(ROOT)): list(reads(module)) for module in ROOT.rglob("*.py")
    }  # fmt: skip
    assert {name for name, read in found.items() if read} == ALLOWED


def test_the_rendezvous_knows_no_dates_at_all() -> None:
    for module in (ROOT / "rendezvous").rglob("*.py"):
        names = {
            name.name.partition(".")[0]
            for node in ast.walk(ast.parse(module.read_text()))
            if isinstance(node, ast.Import)
            for name in node.names
        } | {
            (node.module or "").partition(".")[0]
            for node in ast.walk(ast.parse(module.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"time", "datetime", "calendar"}, module
