"""A control socket of one JSON object a line: how a link or a NAT process is changed while it runs.

Unix sockets with a path belong to the file system, not to the network namespace, so the owner
outside reaches a process inside. Every request is answered, so a caller knows that the change is
in force when `call` returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[[dict[str, Any]], dict[str, Any]]
_LINE_LIMIT = 65536


class ControlError(RuntimeError):
    """The process at the other end refused the request, or is gone."""


class ControlServer:
    """The serving end, for a select loop: `filenos()` to wait on, `ready(fd)` to serve."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._handler = handler
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener.bind(os.fspath(path))
        self._listener.listen(8)
        self._listener.setblocking(False)

    def filenos(self) -> list[int]:
        """File descriptors that become readable when there is something to do."""
        return [self._listener.fileno(), *self._clients]

    def ready(self, fd: int) -> bool:
        """Serve a readable descriptor; False when it is not one of ours."""
        if fd == self._listener.fileno():
            with contextlib.suppress(BlockingIOError):
                client, _ = self._listener.accept()
                self._clients[client.fileno()] = (client, bytearray())
            return True
        if fd not in self._clients:
            return False
        client, buffer = self._clients[fd]
        data = client.recv(4096)
        buffer += data
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            with contextlib.suppress(OSError):
                client.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        if not data or len(buffer) > _LINE_LIMIT:
            del self._clients[fd]
            client.close()
        return True

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._handler(json.loads(line))}
        except (KeyError, TypeError, ValueError, OSError) as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


class ControlClient:
    """The calling end; connects at once, waiting up to `timeout` seconds for the server to
    appear. Threads may share it.
    """

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.connect(os.fspath(path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise ControlError(f"nobody serves {path}") from error
                time.sleep(0.005)
        self._socket.settimeout(timeout)
        self._reader = self._socket.makefile("rb")
        self._one_at_a_time = threading.Lock()

    def call(self, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer; ControlError when it was refused."""
        try:
            with self._one_at_a_time:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                line = self._reader.readline()
        except OSError as error:
            raise ControlError(f"control socket: {error}") from error
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
        if not answer.pop("ok", False):
            raise ControlError(str(answer.get("error")))
        return answer

    def close(self) -> None:
        """Close the connection; the process at the other end keeps running."""
        self._reader.close()
        self._socket.close()
