"""Relays at a scripted server on the loopback interface, and where they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aioice import stun

from tests.turn_server import RELAYED, USER
from tests.unit.turn_loop import HOST, NETWORK, Client, LoopServer, make_certificate
from tunnel.config import Endpoint, TurnConfig
from tunnel.config_values import parse_turn_url
from tunnel.ice.candidate import Relay
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.shell import carrier, clock
from tunnel.shell.relay import Relays, attempt, live, slot
from tunnel.shell.relay.ways import Place, Server, Way, places, ways
from tunnel.shell.udp import UDP_SEGMENT, UdpSocket

PEER = Address("198.51.100.1", 4117)
CHECK = b"\x00\x01" + bytes(98)  # by its first byte nothing of the engine's
DATA = b"\x40"  # the first byte of a 1-RTT packet
KEY = PathKey(RELAYED, PEER)

EVERYWHERE, EVERYWHERE6 = ip_network("0.0.0.0/0"), ip_network("::/0")
ETH, WLAN, LTE = (
    LocalAddress(f"192.168.{n}.2", name) for n, name in enumerate(("eth0", "wlan0", "wwan0"))
)
ETH6 = LocalAddress("2001:db8::2", "eth0")
ROUTES = (
    Route(EVERYWHERE, "eth0", 100),
    Route(EVERYWHERE, "wlan0", 600),
    Route(EVERYWHERE, "wwan0", 700),
    Route(EVERYWHERE6, "eth0", 100),
)
FOUR, SIX = Address("192.0.2.1", 3478), Address("2001:db8:9::1", 3478)


# ---- where ----


@pytest.mark.parametrize(
    ("addresses", "servers", "wanted"),
    [
        ((), [FOUR, SIX], []),
        ((ETH,), [], []),
        ((ETH,), [SIX], []),
        ((ETH,), [FOUR], [(ETH, False), (ETH, True)]),
        ((ETH6,), [FOUR, SIX], [(ETH6, True), (ETH6, False)]),
        ((ETH, ETH6), [FOUR, SIX], [(ETH, False), (ETH6, True)]),
        ((ETH, ETH6), [FOUR], [(ETH, False), (ETH, True)]),
        ((LTE, WLAN, ETH), [FOUR], [(ETH, False), (WLAN, False), (ETH, True)]),
    ],
)
def test_places(
    addresses: tuple[LocalAddress, ...],
    servers: list[Address],
    wanted: list[tuple[LocalAddress, bool]],
) -> None:
    found = places(LocalNetwork(addresses, ROUTES), servers)
    assert sorted(map(repr, found)) == sorted(
        repr(Place(address.ip, address.interface, ipv6)) for address, ipv6 in wanted
    )


def test_ways() -> None:
    network = LocalNetwork((ETH, ETH6), ROUTES)
    one = Server.of(TurnConfig(url="turn:one.example"))
    two = Server.of(TurnConfig(url="turns:two.example:443"))
    more = [FOUR, Address("192.0.2.2", 3478), Address("192.0.2.3", 3478), SIX]
    found = ways(network, Place(ETH.ip, "eth0", False), [one, two], {one: more, two: [FOUR]})
    assert found == [
        Way(one, "udp", more[0]),
        Way(one, "udp", more[1]),
        Way(one, "tcp", more[0]),
        Way(one, "tcp", more[1]),
        Way(two, "tls", FOUR),
    ]
    assert ways(network, Place(ETH6.ip, "eth0", False), [one], {one: more}) == [
        Way(one, "udp", SIX),
        Way(one, "tcp", SIX),
    ]
    assert ways(network, Place(WLAN.ip, "wlan0", False), [one], {one: more}) == []


@pytest.mark.parametrize(
    ("url", "endpoint", "transports"),
    [
        ("turn:a.example", Endpoint("a.example", 3478), ("udp", "tcp")),
        ("turn:a.example:80", Endpoint("a.example", 80), ("udp", "tcp")),
        ("turn:a.example?transport=udp", Endpoint("a.example", 3478), ("udp",)),
        ("turn:192.0.2.1?transport=tcp", Endpoint("192.0.2.1", 3478), ("tcp",)),
        ("turns:[2001:db8::1]", Endpoint("2001:db8::1", 5349), ("tls",)),
        ("turns:a.example:443?transport=tcp", Endpoint("a.example", 443), ("tls",)),
    ],
)
def test_urls(url: str, endpoint: Endpoint, transports: tuple[str, ...]) -> None:
    assert parse_turn_url(url) == (endpoint, transports)


# ---- in life ----


class World:
    """Relays, a server, and all that was told."""

    def __init__(self, server: LoopServer, password: Path) -> None:
        self.server = server
        self.password = password
        self.told: list[tuple[Relay, ...]] = []
        self.opened: list[UdpSocket] = []
        self.closed: list[UdpSocket] = []
        self.received: list[tuple[bytes, PathKey]] = []
        self.relays: Relays

    def begin(self, *urls: str, user: str = USER, wait: bool = False) -> None:
        configs = [
            TurnConfig(url=url, username=user, password_file=self.password)
            for url in urls or [self.url()]
        ]
        self.relays = Relays(
            configs,
            changed=self.told.append,
            opened=self.opened.append,
            closing=self.closed.append,
            received=self.received.extend,
        )
        self.relays.network_changed(NETWORK)

    def url(self, transport: str = "") -> str:
        url = f"turn:{HOST}:{self.server.port}"
        return f"{url}?transport={transport}" if transport else url

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.002)

    async def relayed(self) -> Client:
        """Wait for the IPv4 relay; its client at the server."""
        await self.until(lambda: self.relays.owns(RELAYED))
        return next(
            c for c in self.server.clients if c.server.allocated and c.server.relayed == RELAYED
        )

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        return [r for r in self.relays.status() if wanted.items() <= r.items()]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for seconds in life."""
    monkeypatch.setattr(slot, "HEAD_START", 0.1)
    monkeypatch.setattr(slot, "FIRST_RETRY", 0.05)


def run(
    tmp_path: Path,
    test: Callable[[World], Awaitable[None]],
    *,
    context: ssl.SSLContext | None = None,
) -> None:
    async def main() -> None:
        password = tmp_path / "password"
        password.write_text("swallow\n")
        password.chmod(0o600)
        server = LoopServer()
        server.prepare = only_ipv4
        await server.start(context)
        world = World(server, password)
        try:
            await test(world)
        finally:
            if hasattr(world, "relays"):
                world.relays.close()
                assert world.closed == world.opened
            server.stop()
            await asyncio.sleep(0.02)  # for transports to close

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def only_ipv4(client: Client) -> None:
    client.server.ipv6 = False


def test_a_relay_carries_what_is_not_the_engines(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.begin()
        client = await world.relayed()
        await world.until(lambda: world.told)
        assert world.told == [
            (Relay(RELAYED, "lo", HOST, world.url(), "udp"),),
        ]
        assert world.rows(state="allocated", transport="udp", address=str(RELAYED), error="")
        assert world.relays.send(KEY, CHECK) == 0
        await world.until(lambda: client.server.sent)
        assert client.server.sent == [(PEER, CHECK)]
        answer = client.server.from_peer(PEER, b"\xc0answer")
        assert answer is not None
        client.write(answer)
        await world.until(lambda: world.received)
        assert world.received == [(b"\xc0answer", KEY)]

    run(tmp_path, test)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_runs_of_the_engine_go_through_a_channel_and_back(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        world.begin(world.url(transport))
        client = await world.relayed()
        found = world.relays.socket_of(KEY)
        assert found is not None
        udp, shim = found
        assert (udp, world.relays.path_of(udp.local, shim)) == (world.opened[0], KEY)
        assert world.relays.socket_of(KEY) == found
        await world.until(lambda: client.server.channels)
        await asyncio.sleep(0.05)
        engine = socket.socket(fileno=udp.fileno())
        try:
            packets = [DATA + bytes([n]) * 1199 for n in range(20)] + [DATA + b"short"]
            control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1200))]
            engine.sendmsg([b"".join(packets)], control, 0, shim)
            await world.until(lambda: len(client.server.sent) == len(packets))
            assert client.server.sent == [(PEER, packet) for packet in packets]
            for packet in packets:
                answer = client.server.from_peer(PEER, packet)
                assert answer is not None
                client.write(answer)
            got = b""
            while len(got) < sum(map(len, packets)):
                await asyncio.sleep(0.001)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        data, source = engine.recvfrom(65536)
                        assert Address(*source) == shim
                        got += data
            assert got == b"".join(packets)
            assert world.received == []
        finally:
            engine.detach()

    run(tmp_path, test)


def test_before_there_is_a_channel_the_engines_packets_go_as_indications(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        def spoil(client: Client) -> None:
            only_ipv4(client)
            client.server.errors[stun.Method.CHANNEL_BIND] = 508

        world.server.prepare = spoil
        world.begin()
        client = await world.relayed()
        found = world.relays.socket_of(KEY)
        assert found is not None
        assert found[0].send(found[1], DATA + b"packet") == 0
        await world.until(lambda: client.server.sent)
        assert client.server.sent == [(PEER, DATA + b"packet")]

    run(tmp_path, test)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_an_empty_datagram_is_nothing(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        def spoil(client: Client) -> None:
            only_ipv4(client)
            client.server.errors[stun.Method.CHANNEL_BIND] = 508

        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, how: failures.append(how))
        world.server.prepare = spoil
        world.begin(world.url(transport))
        client = await world.relayed()
        assert world.relays.socket_of(KEY) is not None
        world.relays.send(KEY, CHECK)
        await world.until(lambda: client.server.sent)
        for data in (b"", b"\xc0answer"):
            message = client.server.from_peer(PEER, data)
            assert message is not None
            client.write(message)
        await world.until(lambda: world.received)
        await asyncio.sleep(0.05)
        assert world.received == [(b"\xc0answer", KEY)]
        assert failures == []

    run(tmp_path, test)


def test_what_fails_to_be_delivered_from_a_stream_is_not_delivered_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, how: failures.append(how))
        world.begin(world.url("tcp"))
        client = await world.relayed()
        world.relays.send(KEY, CHECK)
        await world.until(lambda: client.server.sent)
        world.relays.received = lambda raw: [][0]  # a bug
        message = client.server.from_peer(PEER, b"\xc0one")
        assert message is not None
        client.write(message)
        await world.until(lambda: failures)
        world.relays.received = world.received.extend
        message = client.server.from_peer(PEER, b"\xc0two")
        assert message is not None
        client.write(message)
        await world.until(lambda: world.received)
        assert world.received == [(b"\xc0two", KEY)]

    run(tmp_path, test)


def test_tcp_where_udp_is_blocked(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.server.deaf = True
        world.begin()
        client = await world.relayed()
        assert client.stream
        assert world.rows(state="allocated", transport="tcp")
        assert world.relays.send(KEY, CHECK) == 0
        await world.until(lambda: client.server.sent)

    run(tmp_path, test)


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def test(world: World) -> None:
        url = f"turns:{HOST}:{world.server.port}"
        world.begin(url)
        await world.until(lambda: world.rows(state="failed"))
        assert "certificate is not trusted" in world.rows(state="failed")[0]["error"]
        world.relays.close()
        monkeypatch.setattr(attempt, "_contexts", [])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        world.begin(url)
        client = await world.relayed()
        world.relays.send(KEY, CHECK)
        await world.until(lambda: client.server.sent)
        assert world.rows(state="allocated", transport="tls")

    monkeypatch.setattr(attempt, "_contexts", [])
    run(tmp_path, test, context=context)


def test_no_tls_where_there_is_none(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.begin(f"turns:{HOST}:{world.server.port}")
        await world.until(lambda: world.rows(state="failed"))
        assert "no TLS with the server" in world.rows(state="failed")[0]["error"]

    def quiet(loop: Any, context: dict[str, Any]) -> None:
        """What the server's end makes of a TLS handshake is not the point."""

    async def silenced(world: World) -> None:
        asyncio.get_running_loop().set_exception_handler(quiet)
        await test(world)

    run(tmp_path, silenced)


def test_a_wrong_password_is_told_and_not_tried_over_tcp(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.password.write_text("sparrow")
        world.begin()
        await world.until(lambda: len(world.rows(state="failed")) == 2)  # IPv4 and IPv6
        await asyncio.sleep(0.3)
        assert {row["error"] for row in world.rows(state="failed")} == {
            "the server refuses the user name or the password (error 401)"
        }
        assert not any(client.stream for client in world.server.clients)
        assert len(world.server.clients) == 2
        assert world.told == []

    run(tmp_path, test)


def test_a_password_file_that_is_not_there(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.password.unlink()
        world.begin()
        await world.until(lambda: world.rows(state="failed"))
        assert "there is no such password file" in world.rows()[0]["error"]
        assert world.server.clients == []

    run(tmp_path, test)


def test_a_password_file_that_others_may_read_or_that_is_none(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.password.chmod(0o644)
        world.begin()
        await world.until(lambda: world.rows(state="failed"))
        assert "others may read this password" in world.rows()[0]["error"]
        world.relays.close()
        world.password.unlink()
        os.mkfifo(world.password, 0o600)  # reading it would wait for ever
        world.begin()
        await world.until(lambda: world.rows(state="failed"))
        assert "not a regular file" in world.rows()[0]["error"]
        assert world.server.clients == []

    run(tmp_path, test)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_nobody_listens(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        world.server.stop()
        url = world.url(transport)
        world.begin(url)
        if transport == "tcp":
            await world.until(lambda: world.rows(state="failed"))
            assert world.rows(state="failed")[0]["remedy"].startswith("is the server running?")
        else:
            await asyncio.sleep(0.2)
            assert world.rows(state="asking")

    run(tmp_path, test)


def test_what_is_wrong_is_told_while_it_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By one obstacle for a server, with what to do, and once in the log; until it serves."""
    caplog.set_level(logging.WARNING, "martlet.relay")

    def full(client: Client) -> None:
        only_ipv4(client)
        client.server.errors[stun.Method.ALLOCATE] = 486

    async def test(world: World) -> None:
        world.server.prepare = full
        world.begin(world.url("tcp"))
        await world.until(lambda: len(world.server.clients) >= 4)
        await world.until(lambda: world.relays.obstacles())
        (obstacle,) = world.relays.obstacles()
        assert obstacle.about == "relay" and world.url("tcp") in obstacle.problem
        assert "number of relays" in obstacle.problem and "user-quota" in obstacle.remedy
        told = [record for record in caplog.records if record.getMessage() == "no relay"]
        assert {record.__dict__["fields"]["remedy"] for record in told} == {obstacle.remedy}
        assert len(told) == 2, "once for each family of addresses"
        world.server.prepare = only_ipv4
        await world.relayed()
        assert world.relays.obstacles() == []

    run(tmp_path, test)


def test_the_second_server_serves_when_the_first_cannot(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        other = await LoopServer().start()
        other.prepare = lambda client: client.server.errors.update({stun.Method.ALLOCATE: 486})
        full = f"turn:{HOST}:{other.port}?transport=udp"
        try:
            world.begin(full, world.url())
            await world.relayed()
            assert world.rows(state="allocated", server=world.url())
            assert "number of relays" in world.rows(state="failed", server=full)[0]["error"]
        finally:
            other.stop()

    run(tmp_path, test)


def test_another_server_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "is_usable_remote", lambda host: True)

    async def test(world: World) -> None:
        other = await LoopServer().start()

        def redirect(client: Client) -> None:
            client.server.errors[stun.Method.ALLOCATE] = 300
            client.server.elsewhere = Address(HOST, world.server.port)

        other.prepare = redirect
        try:
            world.begin(f"turn:{HOST}:{other.port}?transport=udp")
            await world.relayed()
        finally:
            other.stop()

    run(tmp_path, test)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_relay_that_ends_comes_again_from_another_port(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        world.begin(world.url(transport))
        client = await world.relayed()
        found = world.relays.socket_of(KEY)
        client.server.restart()
        if transport == "tcp":
            client.close()
        else:
            world.relays.resumed()  # a doubt: it is asked, and does not know us
        await world.until(lambda: len(world.opened) == 2)
        assert world.closed == world.opened[:1]
        await world.until(lambda: len(world.told) >= 2 and world.told[-1])
        assert world.relays.socket_of(KEY) != found
        assert (await world.relayed()) is not client

    run(tmp_path, test)


def test_a_relay_goes_with_its_address(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.begin()
        client = await world.relayed()
        world.relays.network_changed(LocalNetwork())
        assert not world.relays.owns(RELAYED)
        assert world.relays.send(KEY, CHECK) == errno.EADDRNOTAVAIL
        assert world.relays.socket_of(KEY) is None
        await world.until(lambda: not client.server.allocated)  # given back
        await world.until(lambda: world.told[-1] == ())
        world.relays.network_changed(NETWORK)
        await world.relayed()

    run(tmp_path, test)


def test_a_peer_that_is_forbidden(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.begin()
        client = await world.relayed()
        client.server.errors[stun.Method.CREATE_PERMISSION] = 403
        assert world.relays.send(KEY, CHECK) == 0
        await world.until(lambda: world.relays.send(KEY, CHECK) == errno.EACCES)
        assert world.relays.owns(RELAYED)

    run(tmp_path, test)


def test_a_stream_drops_what_does_not_fit_and_keeps_its_place(tmp_path: Path) -> None:
    """What is queued is bounded, whole messages only are dropped, and control goes on."""

    async def test(world: World) -> None:
        world.begin(world.url("tcp"))
        client = await world.relayed()
        (attempt,) = [a for s in world.relays._slots.values() for a in s._attempts if a._live]
        stream = attempt._carrier
        assert isinstance(stream, carrier.StreamCarrier)
        assert attempt._allocation is not None
        attempt._live.shim(PEER)  # type: ignore[union-attr]
        await world.until(lambda: client.server.channels)
        await asyncio.sleep(0.05)
        (channel,) = client.server.channels
        before = len(client.server.sent)
        data = memoryview(b"".join(DATA + bytes([n % 256]) * 1199 for n in range(40)))
        for _ in range(2000):  # 96 MB, without letting the server read
            stream.send_run(channel, data, 1200)
        dropped = stream.dropped
        assert dropped > 0
        assert stream._queued <= carrier.QUEUE_BYTES
        assert stream.send(bytes(stun.Message(stun.Method.BINDING, stun.Class.REQUEST))) == 0
        assert stream._queued <= carrier.QUEUE_BYTES + carrier.CONTROL_BYTES
        await world.until(lambda: not stream._queue)
        world.relays.send(KEY, CHECK)
        await world.until(lambda: (PEER, CHECK) in client.server.sent)
        assert all(len(sent) == 1200 for _, sent in client.server.sent[before:-1])
        assert world.relays.owns(RELAYED)

    run(tmp_path, test)


def test_what_is_no_turn_server(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-somebody\r\n")
            await reader.read(1 << 16)
            writer.close()

        other = await asyncio.start_server(greet, HOST, 0)
        try:
            port = other.sockets[0].getsockname()[1]
            world.begin(f"turn:{HOST}:{port}?transport=tcp")
            await world.until(lambda: world.rows(state="failed"))
            assert "this is no TURN server" in world.rows(state="failed")[0]["error"]
        finally:
            world.relays.close()
            await asyncio.sleep(0.05)
            other.close()

    run(tmp_path, test)


def test_what_waits_too_long_lets_nothing_more_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.begin(world.url("tcp"))
        await world.relayed()
        (attempt,) = [a for s in world.relays._slots.values() for a in s._attempts if a._live]
        stream = attempt._carrier
        assert isinstance(stream, carrier.StreamCarrier)
        stream._queue.append((clock.now() - 0.2, memoryview(bytes(4))))
        stream._queued += 4
        before = stream.dropped
        stream.send_run(0x4000, memoryview(bytes(3600)), 1200)
        assert stream.dropped == before + 3
        assert world.relays.dropped == stream.dropped

    run(tmp_path, test)


def test_idle_shims_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_SHIMS", 2)

    async def test(world: World) -> None:
        world.begin()
        await world.relayed()
        keys = [PathKey(RELAYED, Address(PEER.host, 1000 + n)) for n in range(3)]
        found = [world.relays.socket_of(key) for key in keys]
        assert [each is not None for each in found] == [True, True, False]
        monkeypatch.setattr(live, "SHIM_IDLE", -1.0)
        assert world.relays.socket_of(keys[2]) is not None
        assert found[0] is not None
        assert world.relays.path_of(found[0][0].local, found[0][1]) is None

    run(tmp_path, test)


def test_a_name_that_cannot_be_resolved(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.relays = Relays(
            [TurnConfig(url="turn:nowhere.example")],
            changed=world.told.append,
            opened=world.opened.append,
            closing=world.closed.append,
            received=world.received.extend,
            lookup=fail,
        )
        world.relays.network_changed(NETWORK)
        (row,) = world.rows(server="turn:nowhere.example")
        assert row["error"] == "cannot resolve nowhere.example"

    def fail(host: str, port: int) -> list[Address]:
        raise OSError(errno.ENOENT, "no such name")

    run(tmp_path, test)
