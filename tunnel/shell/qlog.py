"""Traces, only when asked for: qlog (QLOGDIR) and TLS secrets (SSLKEYLOGFILE)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tunnel.errors import LocalError

if TYPE_CHECKING:
    from tunnel.quic.logging import StreamLogger


def open_qlog(environment: Mapping[str, str] = os.environ) -> StreamLogger | None:
    """A logger that writes one qlog file a connection into the directory $QLOGDIR, or None.

    Raises LocalError when the directory is not there or not writable.
    """
    directory = environment.get("QLOGDIR")
    if not directory:
        return None
    if not os.access(directory, os.W_OK | os.X_OK) or not Path(directory).is_dir():
        raise LocalError(f"QLOGDIR={directory} is not a writable directory: create it first")
    from tunnel.quic.logging import StreamLogger

    return StreamLogger(Path(directory))


def open_keylog(environment: Mapping[str, str] = os.environ) -> TextIO | None:
    """$SSLKEYLOGFILE opened for appending, line by line, readable by its owner only, or None.

    The format is that of draft-ietf-tls-keylogfile. Raises LocalError when it cannot be opened.
    """
    name = environment.get("SSLKEYLOGFILE")
    if not name:
        return None
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalError(f"SSLKEYLOGFILE={name} cannot be opened: {error.strerror}") from error
    return open(descriptor, "a", buffering=1, encoding="ascii")
