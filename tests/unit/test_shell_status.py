"""The control socket: claims, requests good and bad, pings."""

import asyncio
import json
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tun.errors import TunError
from tunnel.errors import ConfigError, LocalError, PrivilegeError
from tunnel.events import BenchAnswer
from tunnel.shell import status
from tunnel.shell.status import ControlServer, ControlSocket, control_directory, is_alive


def test_sockets_are_per_network_namespace(tmp_path: Path) -> None:
    assert control_directory(tmp_path) == tmp_path / str(os.stat("/proc/self/ns/net").st_ino)


def test_a_claim_is_private_and_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "1" / "2"
    claimed = ControlSocket.claim("mt0", directory)
    assert claimed.path == directory / "mt0.sock"
    assert stat.S_IMODE(claimed.path.stat().st_mode) == 0o600
    assert is_alive(claimed.path)
    claimed.release()
    assert not directory.exists()


def test_a_live_socket_is_refused_and_a_stale_one_replaced(tmp_path: Path) -> None:
    first = ControlSocket.claim("mt0", tmp_path)
    with pytest.raises(LocalError, match="mt0 is already up; stop it first: martlet down mt0"):
        ControlSocket.claim("mt0", tmp_path)
    other = ControlSocket.claim("mt1", tmp_path)
    first.listener.close()  # as if the process had been killed
    assert first.path.exists()
    assert not is_alive(first.path)
    second = ControlSocket.claim("mt0", tmp_path)
    first.release()  # must not take away what is another's by now
    assert is_alive(second.path)
    second.release()
    other.release()


def test_errors_of_the_directory_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot create the control socket"):
        ControlSocket.claim("mt0", tmp_path / "file")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PrivilegeError, match="run as root"):
        ControlSocket.claim("mt0", tmp_path)


class Tunnel:
    """A `Control` of the test."""

    def __init__(self) -> None:
        self.answers: list[float | None] = []
        self.forgotten = 0
        self.is_down = False
        self.waiting: list[Callable[[float], None]] = []
        self.offer: BenchAnswer | None = None
        self.benches: list[tuple[str, int]] = []
        self.news: dict[str, list[str]] | Exception = {}

    def status(self) -> dict[str, Any]:
        return {"interface": "mt0"}

    def history(self) -> list[dict[str, Any]]:
        raise RuntimeError("a bug")

    def peers(self) -> list[str]:
        return ["office", "branch"]

    def ping(self, peer: str, answered: Callable[[float], None]) -> Callable[[], None]:
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            answered(answer)
        else:
            self.waiting.append(answered)
        return self._forget

    def bench(
        self, peer: str, seconds: int, answered: Callable[[BenchAnswer], None]
    ) -> Callable[[], None]:
        self.benches.append((peer, seconds))
        if self.offer is not None:
            answered(self.offer)
        return self._forget

    def reload(self) -> dict[str, list[str]]:
        if isinstance(self.news, Exception):
            raise self.news
        return self.news

    def _forget(self) -> None:
        self.forgotten += 1

    def down(self) -> None:
        self.is_down = True


class Dialogue:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, request: Any) -> None:
        raw = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        self.writer.write(raw)

    async def receive(self) -> Any:
        line = await self.reader.readline()
        return json.loads(line) if line else None

    async def ask(self, request: Any) -> Any:
        self.send(request)
        return await self.receive()


Test = Callable[[Tunnel, Callable[[], Awaitable[Dialogue]], ControlServer], Awaitable[None]]


def converse(directory: Path, test: Test) -> None:
    """Run `test(tunnel, connect, server)` against a real server."""

    async def main() -> None:
        claimed = ControlSocket.claim("mt0", directory)
        tunnel = Tunnel()
        server = ControlServer(claimed, tunnel)
        await server.start()
        open_writers: list[asyncio.StreamWriter] = []

        async def connect() -> Dialogue:
            reader, writer = await asyncio.open_unix_connection(str(claimed.path))
            open_writers.append(writer)
            return Dialogue(reader, writer)

        await asyncio.wait_for(test(tunnel, connect, server), 10)
        await server.stop()
        for writer in open_writers:
            writer.close()
        claimed.release()

    asyncio.run(main())


def test_requests_and_bad_requests(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        good = {"ok": True, "result": {"interface": "mt0"}}
        assert await client.ask({"command": "status"}) == good
        for bad, why in (
            (b"\n", "one JSON object"),
            (b"{\n", "one JSON object"),
            (b"\xff\xfe\n", "one JSON object"),
            (b"[" * 2000 + b"\n", "one JSON object"),
            (b"[]\n", "is a JSON object"),
            ({}, "unknown command None"),
            ({"command": ["x"]}, "unknown command"),
            ({"command": "ping"}, "no peer None here; peers are: office, branch"),
            ({"command": "ping", "peer": ["x"]}, "no peer"),
            ({"command": "ping", "peer": "office", "interval": 0}, "interval has to be"),
            ({"command": "ping", "peer": "office", "count": "1"}, "count has to be"),
            ({"command": "ping", "peer": "office", "count": True}, "count has to be"),
            (b'{"command":"ping","peer":"office","interval":NaN}\n', "interval has to be"),
            ({"command": "bench"}, "no peer None here; peers are: office, branch"),
            ({"command": "bench", "peer": "office", "seconds": 0.5}, "seconds has to be"),
            ({"command": "history"}, "internal error"),  # a bug of ours is not the end
        ):
            answer = await client.ask(bad)
            assert answer["ok"] is False
            assert why in answer["error"]
        assert await client.ask({"command": "status"}) == good

    converse(tmp_path, test)


def test_an_endless_line_ends_that_client_only(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        answer = await client.ask(b"x" * 100_000)
        assert "longer than" in answer["error"]
        assert (await (await connect()).ask({"command": "status"}))["ok"]

    converse(tmp_path, test)


def test_clients_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "MAX_CLIENTS", 2)

    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        clients = [await connect() for _ in range(2)]
        for client in clients:
            assert (await client.ask({"command": "status"}))["ok"]
        third = await connect()
        assert await third.receive() == {"ok": False, "error": "too many clients"}
        assert await third.receive() is None

    converse(tmp_path, test)


def test_down_is_answered_at_once_and_held_until_the_end(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        assert await client.ask({"command": "down"}) == {"ok": True}
        ended = asyncio.ensure_future(client.receive())
        await asyncio.sleep(0)
        assert tunnel.is_down
        assert not ended.done()
        await server.stop()
        assert await ended is None

    converse(tmp_path, test)


def test_a_bench_is_offered_refused_or_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "BENCH_WAIT", 0.02)

    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        tunnel.offer = BenchAnswer("office", 1, "10.88.0.2", 4000, bytes(16))
        assert await client.ask({"command": "bench", "peer": "office", "seconds": 1e6}) == {
            "ok": True,
            "result": {
                "interface": "mt0",
                "address": "10.88.0.2",
                "port": 4000,
                "secret": "00" * 16,
            },
        }
        assert tunnel.benches == [("office", 60)]
        tunnel.offer = BenchAnswer("office", 2, problem="peer office refuses: no time")
        assert await client.ask({"command": "bench", "peer": "office", "seconds": 9}) == {
            "ok": False,
            "error": "peer office refuses: no time",
        }
        tunnel.offer = None
        assert await client.ask({"command": "bench", "peer": "office", "seconds": 9}) == {
            "ok": False,
            "error": "peer office did not answer within 0.02 s",
            "unreachable": True,
        }
        assert tunnel.forgotten == 3

    converse(tmp_path, test)


def test_pings_stream_and_end(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        tunnel.answers = [0.02, 0.03]
        client = await connect()
        client.send({"command": "ping", "peer": "office", "count": 2, "interval": 0.002})
        assert [await client.receive() for _ in range(5)] == [
            {"ok": True, "sent": 1},
            {"ok": True, "sequence": 1, "rtt_ms": 20},
            {"ok": True, "sent": 2},
            {"ok": True, "sequence": 2, "rtt_ms": 30},
            {"ok": True, "end": True},
        ]
        assert tunnel.forgotten == 0
        assert (await client.ask({"command": "status"}))["ok"]

    converse(tmp_path, test)


def test_late_answers_count_and_missing_ones_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "PING_WAIT", 0.05)

    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        client.send({"command": "ping", "peer": "office", "count": 2, "interval": 0.002})
        assert [(await client.receive())["sent"] for _ in range(2)] == [1, 2]
        tunnel.waiting[0](0.5)
        assert (await client.receive())["sequence"] == 1
        assert (await client.receive())["end"] is True
        assert tunnel.forgotten == 1
        tunnel.waiting[1](9.0)  # far too late: nobody is told

    converse(tmp_path, test)


def test_a_client_that_goes_ends_its_pings(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        client.send({"command": "ping", "peer": "office", "interval": 3600})
        assert (await client.receive())["sent"] == 1
        client.writer.close()
        while not tunnel.forgotten:
            await asyncio.sleep(0)
        assert len(tunnel.waiting) == 1

    converse(tmp_path, test)


def test_a_reload_tells_what_is_new_or_what_is_wrong(tmp_path: Path) -> None:
    async def test(tunnel: Tunnel, connect: Any, server: ControlServer) -> None:
        client = await connect()
        tunnel.news = {"added": ["home"]}
        answer = await client.ask({"command": "reload"})
        assert answer == {"ok": True, "result": {"added": ["home"]}}
        tunnel.news = ConfigError("nonsense", file="mt0.toml", line=3)
        answer = await client.ask({"command": "reload"})
        assert answer == {"ok": False, "error": "mt0.toml:3: nonsense", "configuration": True}
        for error in (TunError("conflict", "a route is there"), LocalError("no file")):
            tunnel.news = error
            answer = await client.ask({"command": "reload"})
            assert answer == {"ok": False, "error": str(error)}

    converse(tmp_path, test)
