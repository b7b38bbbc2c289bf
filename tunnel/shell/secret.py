"""Files that hold a password: nobody but their owner may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tunnel.errors import ConfigError

LIMIT = 4096
"""Bytes; no password is longer."""


def read_password(path: Path) -> bytes:
    """The first line of a password file, without its end. Raises ConfigError."""
    try:
        # Not blocking, or a FIFO would stop us here. Mode and content are of the same open file.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(fd).st_mode
            data = os.read(fd, LIMIT + 1) if stat.S_ISREG(mode) else b""
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise ConfigError(
            "there is no such password file",
            file=path,
            remedy=f"write the password into it, and run `chmod 600 {path}`",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the password: {error.strerror}",
            file=path,
            remedy=f"check with `ls -l {path}` who may read it",
        ) from None
    if not stat.S_ISREG(mode):
        raise ConfigError("this is not a regular file", file=path, remedy="name a password file")
    if mode & 0o077:
        raise ConfigError(
            f"others may read this password (mode {stat.S_IMODE(mode):04o})",
            file=path,
            remedy=f"run `chmod 600 {path}`",
        )
    password = data.partition(b"\n")[0].rstrip(b"\r")
    if not password or len(data) > LIMIT:
        raise ConfigError(
            "there is no password in this file",
            file=path,
            remedy="write the password alone on its first line",
        )
    return password
