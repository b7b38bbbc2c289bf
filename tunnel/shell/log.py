"""Structured logs: one event and its fields a line, `key=value`, on standard error.

An event is a short constant text; whatever varies is a field, so that lines can be searched and
counted. What happens per packet is logged at debug, never above.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
"""The accepted names of levels, most talkative first."""

FILE_BYTES = 1 << 20
"""Size at which the log file of a detached tunnel is turned over; one older file is kept."""


class Log:
    """A logger whose calls take fields: `log.info("peer up", peer="office")`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"martlet.{name}")

    def debug(self, event: str, **fields: object) -> None:
        """Something that matters to whoever debugs martlet itself."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Something a user may want to know."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something that a user may have to act upon."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: object) -> None:
        """Something that is broken; `exc_info` adds the traceback."""
        self._log(logging.ERROR, event, fields, exc_info)

    def _log(
        self,
        level: int,
        event: str,
        fields: dict[str, object],
        exc_info: BaseException | None = None,
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)


class KeyValueFormatter(logging.Formatter):
    """`TIME LEVEL EVENT key=value ...`; without the time where the reader (journald) adds one."""

    def __init__(self, *, timestamps: bool = True) -> None:
        super().__init__()
        self._timestamps = timestamps

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it if there is one."""
        parts = [f"{record.levelname.lower():7} {record.getMessage()}"]
        if self._timestamps:
            parts.insert(0, f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03}")
        fields: dict[str, object] = getattr(record, "fields", {})
        parts += [f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup(level: str = "info", stream: TextIO | None = None, file: Path | None = None) -> None:
    """Send the logs of martlet to `stream` (default: standard error), or to `file` if one is given.

    Raises ValueError for a level that is not in LEVELS.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown log level {level!r}: one of {', '.join(LEVELS)}")
    handler: logging.Handler
    if file is not None:
        handler = logging.handlers.RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=1)
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
    # systemd sets JOURNAL_STREAM where standard error goes to the journal (systemd.exec(5)).
    in_journal = file is None and stream is None and "JOURNAL_STREAM" in os.environ
    handler.setFormatter(KeyValueFormatter(timestamps=not in_journal))
    root = logging.getLogger("martlet")
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    root.propagate = False


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text and all(c.isprintable() and c not in ' "=' for c in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
