"""A course of measurements, written down as it goes: also what there is when it is interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bench.options import plain
from bench.run import machine, note


class Outcome(Protocol):
    """What came of one cell of the table."""

    kept: list[str]
    """Directories of runs that failed."""

    def as_dict(self) -> dict[str, Any]: ...


def record(
    options: argparse.Namespace,
    key: str,
    outcomes: Sequence[Outcome],
    measure: Callable[[Callable[[], None]], None],
    table: Callable[[], str],
    name: Callable[[Any], object],
) -> bool:
    """Run `measure`, which fills `outcomes`, calls what it is given after each, and may be
    interrupted: then False. The JSON has the outcomes under `key`; `name` tells what one is of.

    Of the options, `out` and `markdown` say where to write.
    """
    started = machine()

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": plain(options),
            "machine": started,
            key: [outcome.as_dict() for outcome in outcomes],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    complete = True
    try:
        measure(write)
    except KeyboardInterrupt:
        complete = False
    finally:
        shown = table()
        print(shown)
        if options.markdown:
            options.markdown.write_text(shown + "\n")
        note(f"milliseconds; raw values: {options.out}")
        for outcome in outcomes:
            for folder in outcome.kept:
                note(f"failed: {name(outcome)}: {folder}")
    if not complete:
        print("interrupted", file=sys.stderr)
    return complete
