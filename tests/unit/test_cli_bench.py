"""`martlet bench` against a load that is served on the loopback device, and its arithmetic."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cli.bench
import cli.client
import cli.main
from cli import output
from cli.bench import MAX_SECONDS, PathBooks, Sample, rate, summary
from tests.unit.test_cli_main import FakeTunnel, Martlet, martlet, running
from tests.unit.test_shell_load import Running
from tunnel.events import BenchAnswer

__all__ = ["martlet"]  # the fixture

HERE = "127.0.0.1"
SECRET = bytes(range(16))
PATH: dict[str, Any] = {
    "local": "192.0.2.1:1",
    "remote": "192.0.2.2:2",
    "kind": "host",
    "state": "validated",
    "active": True,
    "rtt_ms": 1.0,
    "mtu": 1452,
    "tx_bytes": 0,
    "rx_bytes": 0,
    "lost_packets": 0,
}


class Tunnel:
    """What `running` runs: a tunnel `lo` whose peer's load is on the loopback device."""

    def __init__(self, fake: FakeTunnel, port: int) -> None:
        self.fake = fake
        self.port = port
        self.looks = 0
        self.state = "up"
        self.secret = SECRET
        self.asked: list[int] = []
        self.on_look: Callable[[], None] = lambda: None
        fake.status = self._status  # type: ignore[method-assign]
        fake.bench = self._bench  # type: ignore[method-assign]

    def _status(self) -> dict[str, Any]:
        self.looks += 1
        self.on_look()
        path = PATH | {"tx_bytes": 1000 * self.looks}
        peer = {"name": "office", "state": self.state, "migrations": 2, "paths": [path]}
        return {"interface": "lo", "peers": [peer]}

    def _bench(
        self, peer: str, seconds: int, answered: Callable[[BenchAnswer], None]
    ) -> Callable[[], None]:
        self.asked.append(seconds)
        answered(BenchAnswer(peer, 1, HERE, self.port, self.secret))
        return lambda: None


@contextmanager
def tunnel(directory: Path, port: int) -> Iterator[Tunnel]:
    with running(directory, "lo") as fake:
        yield Tunnel(fake, port)


@pytest.fixture
def served() -> Iterator[Running]:
    server = Running()
    yield server
    server.close()


def test_everything_is_measured(
    martlet: Martlet, tmp_path: Path, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.bench, "SETTLE", 0.0)
    monkeypatch.setattr(cli.bench, "LOOK_INTERVAL", 0.3)
    with tunnel(tmp_path, served.address[1]) as there:
        done = martlet("bench", "office", "--seconds", "1", "--json")
        assert (done.code, done.err) == (0, "")
        (line,) = done.out.splitlines()
        result = json.loads(line)
        assert list(result) == [
            "tunnel", "peer", "address", "seconds", "idle", "upload", "download", "paths", "moves",
        ]  # fmt: skip
        for phase in ("idle", "upload", "download"):
            rtt = result[phase]["rtt_ms"]
            assert 0 < rtt["min"] <= rtt["median"] <= rtt["p95"] <= rtt["max"]
            assert 5 <= rtt["count"] <= 1.2 / cli.bench.ECHO_SPACING
            assert result[phase]["unanswered"] == 0
        for phase in ("upload", "download"):
            assert result[phase]["mbit_s"] > 10
            # All of it and the counted part of it are of one size.
            assert 0.3 < result[phase]["bytes"] * 8e-6 / result[phase]["mbit_s"] < 3
        (path,) = result["paths"]
        assert (path["local"], path["mtu"], path["state"]) == ("192.0.2.1:1", 1452, "validated")
        assert all(path[phase]["tx_bytes"] >= 2000 for phase in ("idle", "upload", "download"))
        assert result["moves"] == 0
        assert there.asked == [15]
        assert served.ends()  # its lifeline was cut


def test_a_peer_that_is_away_is_not_asked(martlet: Martlet, tmp_path: Path) -> None:
    with tunnel(tmp_path, 1) as there:
        there.state = "holding"
        done = martlet("bench", "office")
        assert (done.code, done.out, there.asked) == (5, "", [])
        assert "peer office is not up, but holding; 'martlet status lo' shows more" in done.err


def test_a_port_where_nobody_listens(martlet: Martlet, tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as listener:
        port = listener.getsockname()[1]
    with tunnel(tmp_path, port):
        done = martlet("bench", "office")
        assert (done.code, done.out) == (1, "")
        assert f"no TCP connection to {HERE} port {port}: Connection refused" in done.err


def test_a_secret_that_does_not_fit(martlet: Martlet, tmp_path: Path, served: Running) -> None:
    with tunnel(tmp_path, served.address[1]) as there:
        there.secret = bytes(16)
        done = martlet("bench", "office")
        assert (done.code, done.out) == (1, "")
        assert "no TCP connection" in done.err


def test_a_connection_that_never_comes(
    martlet: Martlet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.bench, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server((HERE, 0)) as listener, tunnel(tmp_path, listener.getsockname()[1]):
        done = martlet("bench", "office")
        assert (done.code, done.out) == (5, "")
        assert f"no TCP connection to {HERE} within 0.1 s; see whether a firewall" in done.err


def test_a_load_that_stops_half_way(martlet: Martlet, tmp_path: Path) -> None:
    """Its process ends, and with it all connections."""
    with socket.create_server((HERE, 0)) as listener:

        def serve() -> None:
            connections = []
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(99)
                connection.sendall(b"+")
                connections.append(connection)
            time.sleep(0.2)
            for connection in connections:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with tunnel(tmp_path, listener.getsockname()[1]):
            done = martlet("bench", "office", "-s", "1")
        thread.join(5)
    assert (done.code, done.out) == (1, "")
    assert "the bench broke off: " in done.err
    assert "did the peer's martlet stop?" in done.err


def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.client, "control_directory", lambda: tmp_path)
    monkeypatch.setattr(cli.bench, "PHASES", ("idle", "upload"))
    monkeypatch.setattr(output, "bench", lambda result: "the table")
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO, once the other end is closed
            while True:
                pieces.append(os.read(leader, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with tunnel(tmp_path, served.address[1]), pytest.raises(SystemExit) as exit:
            cli.main.main(["bench", "office", "-s", "1"])
        monkeypatch.undo()
    reader.join(5)
    os.close(leader)
    assert exit.value.code == 0
    shown = b"".join(pieces).decode()
    assert "idle      0.0 of 1 s" in shown
    assert "upload" in shown
    assert "Mbit/s" in shown


def test_the_longest_bench_fits_into_the_life_of_the_load() -> None:
    assert 3 * MAX_SECONDS + cli.bench.OVERHEAD <= 60
    assert MAX_SECONDS == 16  # as `--seconds` has it


def test_rates_are_of_what_arrived_since_the_warm_up() -> None:
    assert rate([Sample(0, 0)], 0) == 0
    slow_start = [Sample(0, 0), Sample(1, 10**6), Sample(2, 11 * 10**6), Sample(3, 21 * 10**6)]
    assert rate(slow_start, 1) == 80
    assert rate(slow_start, 1.9) == 80
    assert rate(slow_start, 0) == 56
    assert rate(slow_start, -1) == 56
    assert rate([*slow_start, Sample(5, 21 * 10**6)], 1) == 40  # silence counts
    assert rate(slow_start, 3) == 0


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 101])
def test_summaries_are_in_order(count: int) -> None:
    found = summary([float(n) for n in range(count, 0, -1)])
    assert found == {
        "min": 1,
        "median": math.ceil(count / 2),
        "p95": math.ceil(count * 0.95),
        "max": count,
        "count": count,
    }
    assert summary([]) is None


def test_books_follow_paths_that_come_go_and_start_anew() -> None:
    books = PathBooks()
    other = PATH | {"local": "192.0.2.9:1", "active": False, "rtt_ms": None}
    books.enter(None, [PATH | {"tx_bytes": 100}])
    books.enter("idle", [PATH | {"tx_bytes": 150}])
    books.enter("idle", [PATH | {"tx_bytes": 160, "lost_packets": 1}])
    books.enter(None, [PATH | {"tx_bytes": 500, "lost_packets": 1}])  # between two phases
    books.enter("upload", [PATH | {"tx_bytes": 600, "lost_packets": 1}, other | {"rx_bytes": 5}])
    books.enter("upload", [PATH | {"tx_bytes": 7}])  # left, and taken again
    first, second = books.paths()
    assert first["idle"] == {
        "active": True, "rtt_ms": 1.0, "tx_bytes": 60, "rx_bytes": 0, "lost_packets": 1,
    }  # fmt: skip
    assert first["upload"]["tx_bytes"] == 107
    assert first["download"] is None
    assert (second["local"], second["idle"]) == ("192.0.2.9:1", None)
    assert second["upload"] == {
        "active": False, "rtt_ms": None, "tx_bytes": 0, "rx_bytes": 5, "lost_packets": 0,
    }  # fmt: skip


def test_the_table() -> None:
    books = PathBooks()
    books.enter("upload", [PATH | {"tx_bytes": 150_000}])
    rtt = {"min": 0.5, "median": 1.0, "p95": 2.0, "max": 3.25, "count": 9}
    result = {
        "tunnel": "mt0",
        "peer": "office",
        "address": HERE,
        "seconds": 4.0,
        "idle": {"rtt_ms": rtt, "unanswered": 0},
        "upload": {"rtt_ms": None, "unanswered": 1, "mbit_s": 812.34, "bytes": 1},
        "download": {"rtt_ms": rtt, "unanswered": 0, "mbit_s": 1.0, "bytes": 1},
        "paths": books.paths(),
        "moves": 1,
    }
    stream = io.StringIO()
    Console(file=stream, width=10_000, highlight=False).print(output.bench(result))
    lines = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[0][:4] == ["office", HERE, "by", "mt0,"]
    assert lines[2] == "idle - 0.5 ms 1.0 ms 2.0 ms 3.2 ms".split()  # noqa: SIM905
    assert lines[3] == "upload 812.3 Mbit/s - - - -".split()  # noqa: SIM905
    expected = "192.0.2.1:1 > 192.0.2.2:2 upload yes 1.0 ms 1452 150.0 kB 0 B 0"
    assert lines[6] == expected.split()
    assert lines[7][:3] == ["1", "round", "trips"]
