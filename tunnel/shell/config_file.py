"""The files of a configuration on disk: replaced as a whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tunnel.config import CONFIG_DIRECTORY
from tunnel.errors import LocalError, PrivilegeError
from tunnel.identity import Identity

KEY_NAME = "id_ed25519"
"""Of a private key, beside the configuration that names it."""


def check_writable(file: Path) -> None:
    """Raises LocalError or PrivilegeError when `file` cannot be replaced; makes /etc/martlet."""
    target = _target(file)
    try:
        if target.parent == CONFIG_DIRECTORY:
            target.parent.mkdir(mode=0o700, exist_ok=True)
        # Another name, as the file itself is not to be touched.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        os.unlink(temporary)
    except OSError as error:
        raise _cannot_write(file, error) from None


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Alone with `file` from reading it to replacing it, as far as others ask, too: of two who add
    to it at once, neither is to lose what the other added. Raises LocalError, PrivilegeError.
    """
    try:
        # Of the directory, since the file itself is replaced.
        descriptor = os.open(_target(file).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_write(file, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace(file: Path, text: str, mode: int = 0o644, *, secret: bool = False) -> None:
    """Put `text` in place of what is there; a new file gets `mode`, an old one keeps its own,
    unless it is a `secret`.

    Whatever happens, there is the old file, or the whole new one. Raises LocalError,
    PrivilegeError.
    """
    target = _target(file)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(descriptor, "wb") as written:
                with contextlib.suppress(FileNotFoundError):
                    old = target.stat()
                    mode = mode if secret else stat.S_IMODE(old.st_mode)
                    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, mode)
                written.write(text.encode())
                written.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        except BaseException:  # also an interrupt
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(target.parent)
    except OSError as error:
        raise _cannot_write(file, error) from None


def write_secret(file: Path, secret: str) -> None:
    """A file that only its owner reads. Raises LocalError, PrivilegeError."""
    replace(file, secret + "\n", 0o600, secret=True)


def identity_beside(file: Path) -> tuple[Path, Identity]:
    """The key beside a new configuration, made if there is none.

    Raises ConfigError when there is something else, LocalError, PrivilegeError.
    """
    path = file.parent / KEY_NAME
    with locked(path):  # somebody else may be about to make it
        if not path.exists():
            try:
                Identity.generate().save(path)
            except LocalError:
                check_writable(path)  # which says it better, where that is the reason
                raise
        return path, Identity.load(path)


def _target(file: Path) -> Path:
    """Where a symbolic link leads: it is to stay one."""
    return Path(os.path.realpath(file))


def _sync(directory: Path) -> None:
    """So that the name is on disk as well."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(file: Path, error: OSError) -> LocalError:
    problem = f"cannot write {file}: {error.strerror or error}"
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return PrivilegeError(problem, remedy="run as root (sudo)")
    if error.errno == errno.ENOENT:
        return LocalError(problem, remedy=f"make the directory: mkdir -p {file.parent}")
    return LocalError(problem)
