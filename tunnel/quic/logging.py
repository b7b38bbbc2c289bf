"""qlog files that are written as things happen.

aioquic's own file logger keeps every event of a connection in memory until it ends, which for a
tunnel may be in a week, or never after a crash. This one appends each event to the file in the
streaming form of qlog: JSON text sequences (RFC 7464; draft-ietf-quic-qlog-main-schema-02 section
6.2), which qvis reads as `.sqlog`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aioquic.quic.logger import QLOG_VERSION, QuicLogger, QuicLoggerTrace

RECORD_SEPARATOR = "\x1e"  # RFC 7464 section 2.2


class StreamLogger(QuicLogger):
    """Writes a file `<original destination connection ID>-<client|server>.sqlog` a connection."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def start_trace(self, is_client: bool, odcid: bytes) -> QuicLoggerTrace:
        """A trace whose events go straight into its file."""
        role = "client" if is_client else "server"
        trace = _StreamTrace(
            self._directory / f"{odcid.hex()}-{role}.sqlog", is_client=is_client, odcid=odcid
        )
        self._traces.append(trace)
        return trace

    def end_trace(self, trace: QuicLoggerTrace) -> None:
        """Close its file."""
        super().end_trace(trace)
        self._traces.remove(trace)
        if isinstance(trace, _StreamTrace):
            trace.close()


class _StreamTrace(QuicLoggerTrace):
    def __init__(self, path: Path, *, is_client: bool, odcid: bytes) -> None:
        super().__init__(is_client=is_client, odcid=odcid)
        self._file = path.open("w", encoding="utf-8")
        head = self.to_dict()
        self._write(
            {
                "qlog_version": QLOG_VERSION,
                "qlog_format": "JSON-SEQ",
                "trace": {
                    "common_fields": head["common_fields"],
                    "vantage_point": head["vantage_point"],
                },
            }
        )

    def log_event(self, *, category: str, event: str, data: dict[str, Any]) -> None:
        super().log_event(category=category, event=event, data=data)
        self._write(self._events.popleft())

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if not self._file.closed:  # aioquic may log a last packet after the end of a trace
            self._file.write(f"{RECORD_SEPARATOR}{json.dumps(record, separators=(',', ':'))}\n")
            self._file.flush()
