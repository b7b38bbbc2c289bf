"""The control socket: how `martlet status`, `history`, `ping`, `bench`, `reload` and `down` reach a
running tunnel.

A Unix stream socket at /run/martlet/<inode of the network namespace>/NAME.sock, so that two
namespaces may both have an `mt0`. One JSON object a line, both ways. A request names its `command`:

    {"command": "status"}                 -> {"ok": true, "result": {...}}
    {"command": "history"}                -> {"ok": true, "result": [...]}
    {"command": "ping", "peer": "office", "count": 4, "interval": 1.0}
                                          -> {"ok": true, "sent": 1}, {"ok": true, "sequence": 1,
                                             "rtt_ms": 20.3} as they happen, at last {"ok": true,
                                             "end": true}; count 0: until the client goes
    {"command": "bench", "peer": "office", "seconds": 30}
                                          -> {"ok": true, "result": {...}}: the load that the peer
                                             serves now, at "address" and "port" through the
                                             "interface", opened by "secret" (hexadecimal)
    {"command": "reload"}                 -> {"ok": true, "result": {...}}: what was new in the
                                             configuration file, lists of names: "added" peers,
                                             "removed" ones, "addresses" of this host
    {"command": "down"}                   -> {"ok": true}, then end of file once all is undone

What is wrong with a request is answered as {"ok": false, "error": "..."}; with "unreachable": true
if it is the peer that does not answer, with "configuration": true if it is the file that is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tun.errors import TunError
from tunnel.control import BENCH_SECONDS
from tunnel.errors import ConfigError, LocalError, MartletError, PrivilegeError
from tunnel.events import BenchAnswer
from tunnel.shell.log import Log

RUN_DIRECTORY = Path("/run/martlet")

REQUEST_BYTES = 4096
"""Longest request line; the longest legitimate one is a ping of some 100 bytes."""

MAX_CLIENTS = 32
"""Connections at a time; more are turned away, so that a stuck script cannot use up descriptors."""

PING_WAIT = 2.0
"""Seconds to wait for the last answers after the last ping was sent: as long as any usable path."""

BENCH_WAIT = 2.0
"""Seconds to wait for what the peer says to a bench: as long as any usable path."""

MIN_PING_INTERVAL = 0.002
"""Seconds: what ping(8) grants to root."""

_BACKLOG = 16


class Control(Protocol):
    """What the control socket needs of a running tunnel; all of it is called in its loop."""

    def status(self) -> dict[str, Any]:
        """The object of `status --json`."""

    def history(self) -> list[dict[str, Any]]:
        """The list of `history --json`."""

    def peers(self) -> list[str]:
        """Names of the configured peers."""

    def ping(self, peer: str, answered: Callable[[float], None]) -> Callable[[], None]:
        """Ping a peer; `answered` gets the round-trip time in seconds. Returns what forgets it."""

    def bench(
        self, peer: str, seconds: int, answered: Callable[[BenchAnswer], None]
    ) -> Callable[[], None]:
        """Have a peer serve a load; `answered` gets where, or why not. Returns what forgets it."""

    def reload(self) -> dict[str, list[str]]:
        """Read the configuration again; returns what was new. Raises MartletError, TunError."""

    def down(self) -> None:
        """Begin to close the tunnel."""


def control_directory(run_directory: Path = RUN_DIRECTORY) -> Path:
    """Where the control sockets of this network namespace are."""
    return run_directory / str(Path("/proc/thread-self/ns/net").stat().st_ino)


class ControlSocket:
    """A listening control socket, readable and writable by its owner only, and its name."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self.listener = listener
        self.path = path
        self._file = _identity(path)

    @classmethod
    def claim(cls, name: str, directory: Path | None = None) -> ControlSocket:
        """The one of the tunnel `name`.

        One that a dead process left behind is replaced. Raises LocalError when a live one has it,
        PrivilegeError when the directory is not ours to write.
        """
        directory = directory or control_directory()
        path = directory / f"{name}.sock"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            with _locked(directory):
                if is_alive(path):
                    raise LocalError(
                        f"tunnel {name} is already up",
                        remedy=f"stop it first: martlet down {name}",
                    )
                path.unlink(missing_ok=True)
                return cls(_listen(path), path)
        except PermissionError as error:
            raise PrivilegeError(
                f"cannot create the control socket {path}", remedy="run as root (sudo)"
            ) from error
        except OSError as error:
            raise LocalError(
                f"cannot create the control socket {path}: {error.strerror}"
            ) from error

    def release(self) -> None:
        """Close it and remove its name, unless somebody else has that by now."""
        self.listener.close()
        with contextlib.suppress(OSError):
            with _locked(self.path.parent):
                if _identity(self.path) == self._file:
                    self.path.unlink()
            self.path.parent.rmdir()  # the last tunnel of a namespace leaves nothing behind


def is_alive(path: Path) -> bool:
    """Whether a process listens on the socket `path`. Raises PermissionError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.EAGAIN:  # its backlog is full: busy, but there
                return True
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR):
                return False
            raise
    return True


class ControlServer:
    """Answers requests on a claimed socket."""

    def __init__(self, claimed: ControlSocket, control: Control) -> None:
        self._claimed = claimed
        self._control = control
        self._server: asyncio.AbstractServer | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to answer."""
        # A duplicate, so that either may end first: the server, or the claim.
        self._server = await asyncio.start_unix_server(
            self._accept, sock=self._claimed.listener.dup(), limit=REQUEST_BYTES
        )

    async def stop(self) -> None:
        """End all connections."""
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CLIENTS:
                await _answer(writer, _error("too many clients"))
            else:
                await self._converse(reader, writer)
        except ConnectionError:
            pass  # the client went away
        except asyncio.CancelledError:
            pass  # stop(): nobody awaits this task but stop() itself
        finally:
            self._clients.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                await _answer(writer, _error(f"request longer than {REQUEST_BYTES} bytes"))
                return
            try:
                await self._serve(line, reader, writer)
            except _BadRequest as error:
                await _answer(writer, _error(str(error)))
            except (ConnectionError, asyncio.CancelledError):
                raise
            except Exception as error:
                _log.error("control request failed", exc_info=error)
                await _answer(writer, _error(f"internal error: {error!r}"))

    async def _serve(
        self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request = _parse(line)
        match request.get("command"):
            case "status":
                await _answer(writer, {"ok": True, "result": self._control.status()})
            case "history":
                await _answer(writer, {"ok": True, "result": self._control.history()})
            case "ping":
                await self._ping(request, reader, writer)
            case "bench":
                await self._bench(request, writer)
            case "reload":
                await self._reload(writer)
            case "down":
                await _answer(writer, {"ok": True})
                self._control.down()
                # Held until stop(), so that the client sees when all is undone.
                while await reader.read(REQUEST_BYTES):
                    pass
            case other:
                raise _BadRequest(f"unknown command {other!r}")

    async def _ping(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = self._peer(request)
        count = _number(request, "count", 0, minimum=0)
        interval = _number(request, "interval", 1.0, minimum=MIN_PING_INTERVAL)
        gone = asyncio.ensure_future(reader.read(1))
        pings = _Pings(writer)
        try:
            while not gone.done():
                pings.send(self._control, peer)
                if pings.sent == int(count):
                    break
                await asyncio.wait([gone], timeout=interval)
            if not gone.done():
                await pings.wait(PING_WAIT)
            if gone.done():
                raise ConnectionAbortedError  # or it did not wait for the end: no way to go on
            await _answer(writer, {"ok": True, "end": True})
        finally:
            pings.forget()
            gone.cancel()
            # Awaited, for a stream has one reader at a time.
            await asyncio.gather(gone, return_exceptions=True)

    async def _bench(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        peer = self._peer(request)
        seconds = _number(request, "seconds", BENCH_SECONDS, minimum=1)
        offer: asyncio.Future[BenchAnswer] = asyncio.get_running_loop().create_future()

        def answered(answer: BenchAnswer) -> None:
            if not offer.done():
                offer.set_result(answer)

        forget = self._control.bench(peer, min(int(seconds), BENCH_SECONDS), answered)
        try:
            answer = await asyncio.wait_for(offer, BENCH_WAIT)
        except TimeoutError:
            silent = f"peer {peer} did not answer within {BENCH_WAIT:g} s"
            await _answer(writer, {**_error(silent), "unreachable": True})
            return
        finally:
            forget()
        if answer.problem:
            raise _BadRequest(answer.problem)
        found = {
            "interface": self._control.status()["interface"],
            "address": answer.address,
            "port": answer.port,
            "secret": answer.secret.hex(),
        }
        await _answer(writer, {"ok": True, "result": found})

    async def _reload(self, writer: asyncio.StreamWriter) -> None:
        try:
            news = self._control.reload()
        except ConfigError as error:
            await _answer(writer, {**_error(str(error)), "configuration": True})
        except (MartletError, TunError) as error:
            raise _BadRequest(str(error)) from None
        else:
            await _answer(writer, {"ok": True, "result": news})

    def _peer(self, request: dict[str, Any]) -> str:
        peer = request.get("peer")
        if peer not in self._control.peers():
            known = ", ".join(self._control.peers()) or "none"
            raise _BadRequest(f"no peer {peer!r} here; peers are: {known}")
        return str(peer)


class _Pings:
    """The pings of one client: what was sent, and what is not answered yet."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.sent = 0
        self._writer = writer
        self._open: dict[int, Callable[[], None]] = {}
        self._all_answered = asyncio.Event()

    def send(self, control: Control, peer: str) -> None:
        self.sent += 1
        sequence = self.sent
        self._all_answered.clear()
        self._write({"sent": sequence})
        self._open[sequence] = _nothing
        forget = control.ping(peer, lambda rtt: self._answered(sequence, rtt))
        if sequence in self._open:
            self._open[sequence] = forget

    async def wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_answered.wait(), seconds)

    def forget(self) -> None:
        for forget in self._open.values():
            forget()
        self._open.clear()

    def _answered(self, sequence: int, rtt: float) -> None:
        if self._open.pop(sequence, None) is not None:
            self._write({"sequence": sequence, "rtt_ms": rtt * 1000})
        if not self._open:
            self._all_answered.set()

    def _write(self, fields: dict[str, Any]) -> None:
        # Not drained: a client that reads nothing loses lines rather than growing our memory.
        transport = self._writer.transport
        if not transport.is_closing() and transport.get_write_buffer_size() < _UNREAD_BYTES:
            self._writer.write(_line({"ok": True, **fields}))


class _BadRequest(Exception):
    """The message is for the client."""


_log = Log("control")

_UNREAD_BYTES = 1 << 16


def _identity(path: Path) -> tuple[int, int]:
    """What tells a file from its successor: inodes are used again, so also when it was made."""
    file = path.stat()
    return file.st_ino, file.st_mtime_ns


def _nothing() -> None:
    """Nothing to forget yet."""


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadRequest("a request is one JSON object on one line") from None
    if not isinstance(request, dict):
        raise _BadRequest("a request is a JSON object")
    return request


def _number(request: dict[str, Any], key: str, default: float, *, minimum: float) -> float:
    value = request.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < 1e9:
        raise _BadRequest(f"{key} has to be a number of at least {minimum:g}")
    return value


def _error(message: str) -> dict[str, Any]:
    return {"ok": False, "error": message}


async def _answer(writer: asyncio.StreamWriter, response: dict[str, Any]) -> None:
    writer.write(_line(response))
    await writer.drain()


def _line(response: dict[str, Any]) -> bytes:
    return json.dumps(response, separators=(",", ":")).encode() + b"\n"


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)  # 0600 from the first moment
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process at a time decides whose a name in `directory` is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
