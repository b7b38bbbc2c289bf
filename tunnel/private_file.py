"""Files with secrets: nobody but their owner may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tunnel.errors import ConfigError


def read_private(path: str | Path, what: str, *, limit: int, missing: str, others: str) -> bytes:
    """The first `limit` bytes, and one more if there are more. Raises ConfigError.

    For its words: `what` is in the file ("password"), what to do when it is `missing`, and what
    `others` may do ("read this password").
    """
    try:
        # Not blocking, or a FIFO would stop us here. Mode and content are of the same open file.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(fd).st_mode
            data = os.read(fd, limit + 1) if stat.S_ISREG(mode) else b""
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise ConfigError(f"there is no such {what} file", file=path, remedy=missing) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the {what}: {error.strerror}",
            file=path,
            remedy=f"check with `ls -l {path}` who may read it",
        ) from None
    if not stat.S_ISREG(mode):
        kind = what.split()[-1]
        raise ConfigError("this is not a regular file", file=path, remedy=f"name a {kind} file")
    if mode & 0o077:
        raise ConfigError(
            f"others may {others} (mode {stat.S_IMODE(mode):04o})",
            file=path,
            remedy=f"run `chmod 600 {path}`",
        )
    return data
