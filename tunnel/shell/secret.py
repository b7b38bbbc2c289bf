"""Files that hold a password."""

from __future__ import annotations

from pathlib import Path

from tunnel.errors import ConfigError
from tunnel.private_file import read_private

LIMIT = 4096
"""Bytes; no password is longer."""


def read_password(path: Path) -> bytes:
    """The first line of a password file, without its end. Raises ConfigError."""
    data = read_private(
        path,
        "password",
        limit=LIMIT,
        missing=f"write the password into it, and run `chmod 600 {path}`",
        others="read this password",
    )
    password = data.partition(b"\n")[0].rstrip(b"\r")
    if not password or len(data) > LIMIT:
        raise ConfigError(
            "there is no password in this file",
            file=path,
            remedy="write the password alone on its first line",
        )
    return password
