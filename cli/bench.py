"""`martlet bench`: how fast a running tunnel to a peer is, and how late it gets under load.

The peer's martlet serves the load (`tunnel.shell.load`), the tunnel carries ordinary TCP: what is
measured is what any program inside would get. Three phases, each of the same length: idle, upload,
download. All the while 64 bytes go there and back on a connection of their own, which gives the
round trips; what each path carried is the growth of its counters in the tunnel's status.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ClassVar, NamedTuple

from cli import output
from cli.client import Client, connect
from cli.failures import OK
from cli.ping import find
from tunnel.control import BENCH_SECONDS
from tunnel.errors import LocalError, NetworkError, UnreachableError
from tunnel.shell import load

PHASES = ("idle", "upload", "download")

OVERHEAD = 12
"""Seconds of the load's life beyond the phases: connecting, and waiting for what is late."""

MAX_SECONDS = (BENCH_SECONDS - OVERHEAD) // len(PHASES)
"""Longest phase: the load at the other end lives for a minute in all."""

WARM_UP = 0.25
"""Share of a phase that does not count for the throughput: TCP looks for its pace there."""

ECHO_SPACING = 0.01
"""Seconds: a hundred round trips a second are no load, and enough to tell the worst of them."""

SAMPLE_INTERVAL = 0.1
LOOK_INTERVAL = 0.5
"""Seconds between two looks at the paths: one that is given up takes its counters with it."""

SETTLE = 0.5
"""Seconds between two phases: queues empty."""

CONNECT_TIMEOUT = 5.0
LATE = 1.0
"""Seconds after a phase for what is still under way."""


def run(target: str, seconds: float, json: bool) -> int:
    """Measure the tunnel to `target` (PEER or TUNNEL/PEER) and print; returns the exit code."""
    tunnel, peer = find(target)
    with connect(tunnel) as client, _progress() as show:
        _check_up(client, peer)
        life = round(len(PHASES) * seconds) + OVERHEAD
        offer = _Offer.of(client.bench(peer, min(life, BENCH_SECONDS)))
        measured = _Bench(client, peer, offer, seconds, show).measure()
    result = {
        "tunnel": tunnel,
        "peer": peer,
        "address": offer.address,
        "seconds": seconds,
        **measured,
    }
    if json:
        output.as_json(result)
    else:
        output.stdout().print(output.bench(result))
    return OK


class _Offer(NamedTuple):
    """What the peer serves, and the way there."""

    interface: str
    address: str
    port: int
    secret: bytes

    @classmethod
    def of(cls, found: dict[str, Any]) -> _Offer:
        return cls(
            found["interface"], found["address"], found["port"], bytes.fromhex(found["secret"])
        )

    def connect(self, kind: bytes) -> socket.socket:
        """A connection of one kind. Raises UnreachableError, NetworkError."""
        try:
            return load.connect(
                (self.address, self.port),
                self.secret,
                kind,
                device=self.interface,
                timeout=CONNECT_TIMEOUT,
            )
        except TimeoutError:
            raise UnreachableError(
                f"no TCP connection to {self.address} within {CONNECT_TIMEOUT:g} s",
                remedy=f"see whether a firewall there lets TCP in from its {self.interface},"
                " and whether allowed_ips there has this host's address",
            ) from None
        except OSError as error:
            raise NetworkError(
                f"no TCP connection to {self.address} port {self.port}: {error.strerror or error}"
            ) from error


def _check_up(client: Client, peer: str) -> None:
    found = _peer(client, peer)
    if found is not None and found.get("state") != "up":
        raise UnreachableError(
            f"peer {peer} is not up, but {found.get('state')}",
            remedy=f"'martlet status {client.name}' shows more",
        )


def _peer(client: Client, peer: str) -> dict[str, Any] | None:
    return next((entry for entry in client.status()["peers"] if entry["name"] == peer), None)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What shows a line that replaces the last one, on standard error if that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: None
        return
    with console.status("asking the peer") as line:
        yield line.update


# ---- phases ----


class _Bench:
    """One measurement of one peer; `seconds` for each phase, `show` is told how it goes."""

    def __init__(
        self,
        client: Client,
        peer: str,
        offer: _Offer,
        seconds: float,
        show: Callable[[str], None],
    ) -> None:
        self._client = client
        self._peer = peer
        self._offer = offer
        self._seconds = seconds
        self._show = show
        self._books = PathBooks()

    def measure(self) -> dict[str, Any]:
        """Phases by name, `paths`, `moves`. Raises UnreachableError, NetworkError, LocalError."""
        result: dict[str, Any] = {}
        lifeline = self._offer.connect(load.LIFELINE)
        try:
            before = self._look(None)
            for number, phase in enumerate(PHASES):
                if number:
                    time.sleep(SETTLE)
                    self._look(None)
                result[phase] = self._phase(phase)
            moves = self._look(PHASES[-1])["migrations"] - before["migrations"]
        finally:
            load.abort(lifeline)
        return {**result, "paths": self._books.paths(), "moves": moves}

    def _look(self, phase: str | None) -> dict[str, Any]:
        found = _peer(self._client, self._peer)
        if found is None:
            raise LocalError(f"tunnel {self._client.name} does not know {self._peer} any more")
        self._books.enter(phase, found["paths"])
        return found

    def _phase(self, name: str) -> dict[str, Any]:
        with ExitStack() as stack:
            echo = _Echo(self._offer)
            stack.callback(echo.close)
            flow: _Transfer | None = None
            if name != "idle":
                flow = _Upload(self._offer) if name == "upload" else _Download(self._offer)
                stack.callback(flow.close)
                flow.start()
            echo.start()
            late = time.monotonic() + self._seconds + LATE
            self._watch(name, echo, flow)
            measured: dict[str, Any] = {}
            if flow is not None:
                flow.finish(late)
                measured["mbit_s"] = round(flow.rate(WARM_UP * self._seconds), 3)
                measured["bytes"] = flow.samples[-1].bytes
            self._look(name)
            echo.finish(late)
            return {**measured, "rtt_ms": summary(echo.times), "unanswered": echo.unanswered}

    def _watch(self, name: str, echo: _Echo, flow: _Transfer | None) -> None:
        begin = looked = time.monotonic()
        while (passed := time.monotonic() - begin) < self._seconds:
            echo.check()
            parts = [f"{name:8} {passed:4.1f} of {self._seconds:g} s"]
            if flow is not None:
                flow.check()
                parts.append(f"{flow.rate(flow.samples[-1].at - 1):7.1f} Mbit/s")
            if echo.times:
                parts.append(f"{echo.times[-1]:.1f} ms")
            self._show("   ".join(parts))
            if time.monotonic() - looked >= LOOK_INTERVAL:
                looked = time.monotonic()
                self._look(name)
            time.sleep(min(SAMPLE_INTERVAL, self._seconds - passed))


def summary(times: list[float]) -> dict[str, Any] | None:
    """Of round trips in milliseconds; None if there is none."""
    if not times:
        return None
    ordered = sorted(times)
    return {
        "min": round(ordered[0], 3),
        "median": round(ordered[(len(ordered) - 1) // 2], 3),
        # The nearest rank: the smallest that 95% do not exceed.
        "p95": round(ordered[-(-len(ordered) * 95 // 100) - 1], 3),
        "max": round(ordered[-1], 3),
        "count": len(ordered),
    }


class PathBooks:
    """What each path carried in each phase, from the counters of `status`."""

    _COUNTERS = ("tx_bytes", "rx_bytes", "lost_packets")

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], dict[str, int]] = {}
        self._paths: dict[tuple[str, str], dict[str, Any]] = {}

    def enter(self, phase: str | None, paths: list[dict[str, Any]]) -> None:
        """The counters as they are now; without a phase, what they grew by is not counted."""
        for path in paths:
            key = (path["local"], path["remote"])
            now = {name: int(path.get(name) or 0) for name in self._COUNTERS}
            last = self._last.get(key)
            if last is None or any(now[name] < last[name] for name in now):
                last = dict.fromkeys(now, 0)  # a new path, or one that was left and is back
            self._last[key] = now
            if phase is None:
                continue
            entry = self._paths.setdefault(
                key,
                {"local": key[0], "remote": key[1], "kind": None, "state": None, "mtu": None}
                | dict.fromkeys(PHASES),
            )
            entry |= {name: path.get(name) for name in ("kind", "state", "mtu")}
            counts = entry[phase] or dict.fromkeys(now, 0)
            entry[phase] = {
                "active": bool(path.get("active")),
                "rtt_ms": path.get("rtt_ms"),
                **{name: counts[name] + now[name] - last[name] for name in now},
            }

    def paths(self) -> list[dict[str, Any]]:
        """Every path that was there in some phase; None for a phase in which it was not."""
        return list(self._paths.values())


# ---- what the threads do ----


class _Worker:
    """A connection of one kind, and a thread at work on it until `close`."""

    kind: ClassVar[bytes]

    def __init__(self, offer: _Offer) -> None:
        self._connection = offer.connect(self.kind)
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raises NetworkError if the connection broke."""
        if self._failure is not None:
            raise NetworkError(
                f"the bench broke off: {self._failure}", remedy="did the peer's martlet stop?"
            ) from self._failure

    def finish(self, until: float) -> None:
        """Stop; what is under way has time until then. Raises NetworkError if it had broken."""
        self.check()
        self._stopping.set()
        self._thread.join(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        self._stopping.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread.is_alive():
            self._thread.join(LATE)
        load.abort(self._connection)

    def _run(self) -> None:
        try:
            self._work()
        except EOFError:
            self._failure = ConnectionResetError("the connection ended")
        except Exception as error:
            self._failure = error

    def _work(self) -> None:
        raise NotImplementedError


class _Echo(_Worker):
    """Round trips, one after the other; `times` in milliseconds."""

    kind = load.ECHO

    def __init__(self, offer: _Offer) -> None:
        super().__init__(offer)
        self.times: list[float] = []
        self.unanswered = 0

    def finish(self, until: float) -> None:
        super().finish(until)
        self.unanswered = int(self._thread.is_alive())

    def _work(self) -> None:
        self._connection.settimeout(None)
        request = bytes(load.ECHO_BYTES)
        while not self._stopping.is_set():
            sent = time.perf_counter()
            self._connection.sendall(request)
            load.read_exactly(self._connection, len(request))
            self.times.append((time.perf_counter() - sent) * 1000)
            self._stopping.wait(ECHO_SPACING)


class Sample(NamedTuple):
    """So many bytes had arrived, `at` seconds after the first ones."""

    at: float
    bytes: int


class _Transfer(_Worker):
    """One way at full speed; the samples are taken where the bytes arrive."""

    def __init__(self, offer: _Offer) -> None:
        super().__init__(offer)
        self.samples = [Sample(0.0, 0)]

    def rate(self, since: float) -> float:
        """Mbit/s from a time to the last sample."""
        return rate(list(self.samples), since)


def rate(samples: list[Sample], since: float) -> float:
    """Mbit/s from the last sample that is not after `since` to the last one of all."""
    first = next((s for s in reversed(samples) if s.at <= since), samples[0])
    last = samples[-1]
    seconds = last.at - first.at
    return (last.bytes - first.bytes) * 8e-6 / seconds if seconds > 0 else 0.0


class _Upload(_Transfer):
    kind = load.SINK

    def start(self) -> None:
        self._begin = time.monotonic()
        super().start()

    def finish(self, until: float) -> None:
        # The newest report is as old as its way was long: go on until that of now is here.
        end = time.monotonic() - self._begin
        while self.samples[-1].at < end and time.monotonic() < until:
            self.check()
            time.sleep(0.01)
        super().finish(until)
        last = self.samples[-1]
        if last.at < end:  # what was not heard of has not arrived
            self.samples.append(Sample(end, last.bytes))

    def _work(self) -> None:
        connection = self._connection
        connection.setblocking(False)
        data = os.urandom(load.BUFFER_BYTES)
        reports = bytearray()
        while not self._stopping.is_set():
            readable, writable, _ = select.select([connection], [connection], [], SAMPLE_INTERVAL)
            if writable:
                with suppress(BlockingIOError):
                    connection.send(data)
            if readable:
                piece = connection.recv(4096)
                if not piece:
                    raise EOFError
                reports += piece
            while len(reports) >= load.REPORT.size:
                microseconds, count = load.REPORT.unpack_from(reports)
                del reports[: load.REPORT.size]
                self.samples.append(Sample(microseconds / 1e6, count))


class _Download(_Transfer):
    kind = load.SOURCE

    def _work(self) -> None:
        connection = self._connection
        buffer = bytearray(load.BUFFER_BYTES)
        connection.settimeout(None)
        count = connection.recv_into(buffer)
        begin = sampled = time.monotonic()
        connection.settimeout(SAMPLE_INTERVAL)  # nothing came: that is a sample, too
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                more = connection.recv_into(buffer)
                if not more:
                    raise EOFError
                count += more
            now = time.monotonic()
            if now - sampled >= SAMPLE_INTERVAL:
                sampled = now
                self.samples.append(Sample(now - begin, count))
