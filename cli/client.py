"""The other end of the control socket (`tunnel.shell.status`): blocking, for short commands."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tunnel.errors import (
    ConfigError,
    LocalError,
    MartletError,
    PrivilegeError,
    UnreachableError,
)
from tunnel.shell.status import control_directory, is_alive

TIMEOUT = 5.0
"""Seconds: a running tunnel answers within milliseconds, also under load."""

ANSWER_BYTES = 16 << 20
"""Longest answer read: a full history is below one megabyte."""


class Client:
    """One connection to a running tunnel. A context manager.

    Raises LocalError when the tunnel does not answer, or refuses what is asked.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        try:
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise _privilege(path) from None
        except OSError:
            self._socket.close()
            raise _not_up(self.name) from None
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()
        self._socket.close()

    def status(self) -> dict[str, Any]:
        """The object of `status --json`."""
        result: dict[str, Any] = self._ask({"command": "status"})["result"]
        return result

    def history(self) -> list[dict[str, Any]]:
        """The list of `history --json`."""
        result: list[dict[str, Any]] = self._ask({"command": "history"})["result"]
        return result

    def reload(self) -> dict[str, list[str]]:
        """Have the configuration read again; what was new: "added", "removed", "addresses".

        Raises ConfigError when the file is wrong, or wants what a running tunnel cannot do.
        """
        result: dict[str, list[str]] = self._ask({"command": "reload"})["result"]
        return result

    def down(self) -> None:
        """End the tunnel; returns when it has undone everything."""
        self._ask({"command": "down"})
        try:
            while self._reader.read(1):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            raise LocalError(
                f"tunnel {self.name} is closing, but has not ended after {TIMEOUT:g} s"
            ) from None

    def ping(self, peer: str, count: int, interval: float) -> Iterator[dict[str, Any]]:
        """{"sent": n} for each ping, {"sequence": n, "rtt_ms": x} for each answer, as they come.

        `count` 0: for ever. `interval` in seconds.
        """
        self._send({"command": "ping", "peer": peer, "count": count, "interval": interval})
        self._socket.settimeout(interval + TIMEOUT)
        while not (answer := self._receive()).get("end"):
            yield answer

    def bench(self, peer: str, seconds: int) -> dict[str, Any]:
        """Where the peer serves a load for `seconds` from now: interface, address, port, secret.

        Raises UnreachableError when it does not answer.
        """
        request = {"command": "bench", "peer": peer, "seconds": seconds}
        result: dict[str, Any] = self._ask(request)["result"]
        return result

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._silent() from error

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._reader.readline(ANSWER_BYTES)
            answer = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError) as error:
            raise self._silent() from error
        if not isinstance(answer, dict):
            raise self._silent()
        if not answer.get("ok"):
            kind: type[MartletError] = LocalError
            if answer.get("unreachable"):
                kind = UnreachableError
            elif answer.get("configuration"):
                kind = ConfigError
            raise kind(f"tunnel {self.name}: {answer.get('error', 'refused')}")
        return answer

    def _silent(self) -> LocalError:
        return LocalError(
            f"tunnel {self.name} does not answer",
            remedy=f"if it hangs, end the process (pgrep -af 'martlet up.*{self.name}')",
        )


def running(directory: Path | None = None) -> list[str]:
    """Names of the tunnels that are up in this network namespace, sorted."""
    directory = directory or control_directory()
    try:
        return sorted(path.stem for path in directory.glob("*.sock") if is_alive(path))
    except PermissionError:
        raise _privilege(directory) from None


def connect(name: str | None = None, directory: Path | None = None) -> Client:
    """To the tunnel `name`, or without one to the only tunnel that is up."""
    directory = directory or control_directory()
    if name is None:
        names = running(directory)
        if not names:
            raise none_up()
        if len(names) > 1:
            raise LocalError(f"several tunnels are up: {', '.join(names)}", remedy="name one")
        name = names[0]
    if "/" in name or name in ("", ".", ".."):
        raise _not_up(name)
    return Client(directory / f"{name}.sock")


def none_up() -> LocalError:
    """No tunnel at all."""
    return LocalError(
        "no tunnel is up in this network namespace", remedy="start one: martlet up CONFIG.toml"
    )


def _not_up(name: str) -> LocalError:
    return LocalError(
        f"tunnel {name} is not up in this network namespace",
        remedy=f"start it: martlet up {name}",
    )


def _privilege(path: Path) -> PrivilegeError:
    return PrivilegeError(f"{path} is for its owner only", remedy="run as root (sudo)")
