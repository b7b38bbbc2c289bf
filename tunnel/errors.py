"""The exception tree. Every class says whose fault it is, and how the process exits.

::

    MartletError                   1   (never raised itself)
    ├── ConfigError                3   the configuration's: names file, line, key and remedy
    ├── LocalError                 1   ours, or this host's
    │   └── PrivilegeError         4   this process may not do what was asked of it
    ├── PeerError                  1   the peer's: it broke the protocol, or is not who it should be
    │   └── control.ControlError   1   a malformed message on the control stream
    ├── NetworkError               1   the network's
    │   └── UnreachableError       5   no path to the peer
    └── rendezvous.code.CodeError  2   the user's: what was given is no invitation's code

The numbers are the exit codes of the command line. `str(error)` is one line fit to be shown to the
user: what is wrong, then the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class MartletError(Exception):
    """Base of all errors a user may see. `remedy` is the command or edit that mends it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class ConfigError(MartletError):
    """The configuration is wrong, or a file that it names is.

    `file`, `line` (1-based) and `key` (such as `peer[1].allowed_ips[0]`, 0-based as in JSON paths)
    say where, as far as known.
    """

    exit_code = 3

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(problem, remedy=remedy)
        self.file = None if file is None else str(file)
        self.line = line
        self.key = key

    def __str__(self) -> str:
        place = self.file or ""
        if self.file is not None and self.line is not None:
            place += f":{self.line}"
        return ": ".join(part for part in (place, self.key, super().__str__()) if part)


class LocalError(MartletError):
    """This host or this program failed."""


class PrivilegeError(LocalError):
    """This process lacks a privilege; the remedy names it."""

    exit_code = 4


class PeerError(MartletError):
    """The peer broke the protocol, or is not who it should be."""


class NetworkError(MartletError):
    """The network failed."""


class UnreachableError(NetworkError):
    """There is no path to the peer."""

    exit_code = 5
