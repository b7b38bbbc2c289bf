"""The answering end of a bench: who is let in, what each kind does, and that it always ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tunnel.shell import load
from tunnel.shell.load import Server

SECRET = bytes(range(16))
HERE = "127.0.0.1"


class Running:
    """A server in a thread, and what makes it end."""

    def __init__(self, sources: tuple[str, ...] = (HERE,), seconds: float = 10.0) -> None:
        self.listener = socket.create_server((HERE, 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.owner, self._held = os.pipe()
        self.server = Server(self.listener, SECRET, sources, seconds)
        self.thread = threading.Thread(target=self.server.run, args=(self.owner,))
        self.thread.start()

    def connect(self, kind: bytes, *, secret: bytes = SECRET) -> socket.socket:
        return load.connect(self.address, secret, kind, device="lo", timeout=5)

    def ends(self, seconds: float = 5.0) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def disown(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def close(self) -> None:
        self.disown()
        assert self.ends()
        os.close(self.owner)
        self.listener.close()
        self.server.close()


@pytest.fixture
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def test_echo(server: Running) -> None:
    with server.connect(load.ECHO) as connection:
        for number in range(3):
            data = bytes([number]) * load.ECHO_BYTES
            connection.sendall(data)
            assert load.read_exactly(connection, load.ECHO_BYTES) == data


def test_a_sink_counts_and_reports_also_when_nothing_comes(server: Running) -> None:
    with server.connect(load.SINK) as connection:
        begin = time.monotonic()
        connection.sendall(bytes(300_000))
        reports = [
            load.REPORT.unpack(load.read_exactly(connection, load.REPORT.size)) for _ in range(3)
        ]
        passed = (time.monotonic() - begin) * 1e6
    times = [microseconds for microseconds, _ in reports]
    assert times == sorted(times)
    assert load.REPORT_INTERVAL * 3e6 <= times[-1] <= passed
    assert reports[-1][1] == 300_000


def test_a_source_sends_until_nobody_listens(server: Running) -> None:
    with server.connect(load.SOURCE) as connection:
        assert len(load.read_exactly(connection, 3 * load.BUFFER_BYTES)) == 3 * load.BUFFER_BYTES
    with server.connect(load.ECHO):
        pass  # still there


@pytest.mark.parametrize(
    ("secret", "kind"), [(bytes(16), load.ECHO), (SECRET[:15] + b"\0", load.SINK), (SECRET, b"x")]
)
def test_without_the_secret_or_a_kind_there_is_nothing(
    server: Running, secret: bytes, kind: bytes
) -> None:
    with pytest.raises(ConnectionError):
        server.connect(kind, secret=secret)
    with server.connect(load.ECHO):
        pass  # and others go on


def test_a_stranger_is_turned_away() -> None:
    running = Running(sources=("127.0.0.2",))
    with pytest.raises(ConnectionError):
        running.connect(load.ECHO)
    running.close()


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_CONNECTIONS", 2)
    running = Running()
    with running.connect(load.ECHO), running.connect(load.ECHO) as second:
        with pytest.raises(ConnectionError):
            running.connect(load.ECHO)
        second.close()
        deadline = time.monotonic() + 5
        while True:
            try:
                running.connect(load.ECHO).close()
                break
            except ConnectionError:
                assert time.monotonic() < deadline
    running.close()


def test_it_ends_with_its_lifeline(server: Running) -> None:
    with server.connect(load.LIFELINE), server.connect(load.SOURCE):
        assert not server.ends(0.1)
    assert server.ends()


def test_it_ends_with_its_owner(server: Running) -> None:
    with server.connect(load.LIFELINE):
        server.disown()
        assert server.ends()


def test_it_ends_in_time_whatever_happens() -> None:
    running = Running(seconds=0.2)
    with running.connect(load.LIFELINE), running.connect(load.SOURCE):
        assert running.ends()
    running.close()


def test_it_ends_when_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LIFELINE_WAIT", 1.0)
    running = Running()
    with running.connect(load.ECHO):
        assert running.ends()  # an echo is no lifeline
    running.close()


def test_a_connection_by_another_device_is_none() -> None:
    running = Running()
    with pytest.raises(OSError, match=r"."):
        load.connect(running.address, SECRET, load.ECHO, device="nodevice0", timeout=1)
    running.close()
