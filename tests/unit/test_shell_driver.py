"""The driver in a real loop, between a scripted node, an in-memory TUN and loopback sockets.

The engine is the real one, and so are the packets that it carries between two such drivers.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.fake_node import FakeNode
from tests.turn_server import PASSWORD, RELAYED, USER
from tests.unit.turn_loop import NETWORK, Client, LoopServer
from tun.errors import TunError
from tun.memory import MemoryTun
from tunnel.config import Endpoint, PeerConfig, TurnConfig
from tunnel.config_change import Change
from tunnel.datapath.engine import Connection
from tunnel.errors import ConfigError, LocalError
from tunnel.events import (
    Obstructed,
    PeerConnecting,
    PeerHolding,
    PeerMigrated,
    PeerRefused,
    PeerUp,
    PingReply,
    PortUnwanted,
    PortWanted,
    ResolveWanted,
)
from tunnel.ice import turn
from tunnel.identity import Identity
from tunnel.ledger import Migration, Trigger
from tunnel.obstacle import Obstacle
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey
from tunnel.shell import clock, driver
from tunnel.shell.driver import Driver

ONE = LocalNetwork((LocalAddress("127.0.0.1", "lo"),))
TWO = LocalNetwork((LocalAddress("127.0.0.1", "lo"), LocalAddress("127.0.0.2", "lo")))


class FakeMonitor:
    """A network of the test; `ring()` is the kernel's event."""

    def __init__(self) -> None:
        self.network = ONE
        self.looks = 0
        self.failure: OSError | None = None
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def fileno(self) -> int:
        return self._bell

    def acknowledge(self) -> None:
        os.eventfd_read(self._bell)

    def snapshot(self) -> LocalNetwork:
        self.looks += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self.network

    def close(self) -> None:
        os.close(self._bell)


class World:
    """A driver and all around it."""

    connection: Connection

    def __init__(self, *, strict: bool, port: int = 0) -> None:
        self.others: list[World] = []
        self.node = FakeNode()
        self.tun, self.host = MemoryTun.pair()
        self.monitor = FakeMonitor()
        self.driver = Driver(
            self.node, self.tun, self.monitor, listen_port=port, peers=["office"], strict=strict
        )

    def turn(self, *servers: TurnConfig) -> None:
        """Another driver in its place, which has these servers."""
        self.driver.close()
        self.node = FakeNode()
        self.driver = Driver(
            self.node, self.tun, self.monitor, listen_port=0, peers=["office"], turn=servers,
            strict=True,
        )  # fmt: skip

    def start(self) -> None:
        self.driver.start()

    @property
    def port(self) -> int:
        return self.driver._sockets.port

    @property
    def local(self) -> Address:
        return Address("127.0.0.1", self.port)

    def join(self, local: str = "127.0.0.1") -> tuple[World, Connection]:
        """Another one with a connection to our address `local`, and our end of it."""
        other = World(strict=True)
        self.others.append(other)
        other.start()
        ours = PathKey(Address(local, self.port), other.local)
        now = clock.now()
        other.connection = other.node.connect(PathKey(ours.remote, ours.local), first=True, now=now)
        self.connection = self.node.connect(ours, first=False, now=now)
        return other, self.connection

    def aim_at(self, remote: socket.socket) -> PathKey:
        """A connection with somebody who only listens."""
        path = PathKey(self.local, Address(*remote.getsockname()))
        self.connection = self.node.connect(path, first=True, now=clock.now())
        return path

    async def carried(self, other: World, number: int) -> bytes:
        """The packet that came out at `other` after this one went in here."""
        self.host.write([packet(number)])
        (got,) = await other.written(1)
        return got

    async def written(self, count: int) -> list[bytes]:
        """The next packets that come out here."""
        got: list[bytes] = []

        def enough() -> bool:
            got.extend(self.host.read(count))
            return len(got) >= count

        await self.until(enough)
        return got

    async def until(self, condition: Callable[[], Any]) -> None:
        """Let the loop turn until `condition` holds."""
        while not condition():
            await asyncio.sleep(0)

    def close(self) -> None:
        for other in self.others:
            other.close()
        self.driver.close()
        self.monitor.close()
        self.tun.close()
        self.host.close()


def run(test: Callable[[World], Awaitable[None]], *, strict: bool = True, port: int = 0) -> None:
    async def main() -> None:
        world = World(strict=strict, port=port)
        try:
            await asyncio.wait_for(test(world), 10)
        finally:
            world.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def packet(number: int, size: int = 40) -> bytes:
    """An IPv4 packet of an experimental protocol."""
    ends = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return struct.pack("!BBHHHBBH", 0x45, 0, size, number, 0, 64, 253, 0) + ends + bytes(size - 20)


def acknowledge(sender: World, receiver: World) -> None:
    """What waits at the sender's TUN is carried, and the acknowledgement is on its way back. The
    loop does not run meanwhile.
    """
    sender.driver._io.step()
    receiver.driver._io.step()
    time.sleep(0.005)
    receiver.driver._io.step()


def test_the_first_look_comes_before_anything_else() -> None:
    async def test(world: World) -> None:
        world.start()
        assert world.port
        assert world.node.calls[0][:3] == ("network_changed", ONE, world.port)

    run(test)


def test_datagrams_in_and_out() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.echo = True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.setblocking(False)
            for data in (b"a", b"b"):
                other.sendto(data, world.local)
            await world.until(lambda: len(world.node.named("receive_datagram")) == 2)
            path = PathKey(world.local, Address("127.0.0.1", other.getsockname()[1]))
            assert world.node.named("receive_datagram") == [(b"a", path), (b"b", path)]
            loop = asyncio.get_running_loop()
            assert [await loop.sock_recv(other, 9) for _ in range(2)] == [b"a", b"b"]

    run(test)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_each_datagram_has_the_path_of_its_socket(ip: str) -> None:
    async def test(world: World) -> None:
        world.monitor.network = LocalNetwork(
            tuple(LocalAddress(each, "lo") for each in ("127.0.0.2", "::1", "127.0.0.1"))
        )
        world.start()
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as other:
            other.bind((ip, 0))
            path = PathKey(Address(ip, world.port), Address(*other.getsockname()[:2]))
            # A handshake, and a 1-RTT packet of nobody's; the engine knows neither.
            sent = [b"\xc0" + bytes(1199), b"\x40" + bytes(40)]
            for data in sent:
                other.sendto(data, path.local)
            await world.until(lambda: len(world.node.named("receive_datagram")) == 2)
        assert world.node.named("receive_datagram") == [(data, path) for data in sent]

    run(test)


def test_a_socket_of_another_address_gets_the_number_of_one_that_went() -> None:
    async def test(world: World) -> None:
        world.start()
        for ip in ("127.0.0.2", "127.0.0.1", "127.0.0.3"):
            world.monitor.network = LocalNetwork((LocalAddress(ip, "lo"),))
            world.driver._turn(world.driver._look_at_network)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(("127.0.0.1", 0))
                other.settimeout(5)
                path = PathKey(Address(ip, world.port), Address(*other.getsockname()))
                other.sendto(ip.encode(), path.local)
                await world.until(lambda: len(world.node.named("receive_datagram")) > 0)
            assert world.node.named("receive_datagram") == [(ip.encode(), path)]
            world.node.calls.clear()
            assert list(world.driver._locals) == [0]
        world.monitor.network = LocalNetwork()
        world.driver._turn(world.driver._look_at_network)
        assert not world.driver._locals and not world.driver._numbers

    run(test)


def test_packets_pass_from_tun_to_tun_without_the_node() -> None:
    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        assert await world.carried(other, 1) == packet(1)
        assert await other.carried(world, 2) == packet(2)
        for node in (world.node, other.node):
            assert not node.named("receive_datagram")

    run(test)


def test_a_relay_with_the_address_of_a_socket_of_ours_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "is_usable_remote", lambda host: True)

    async def test(world: World) -> None:
        server = await LoopServer().start()

        def lie(client: Client) -> None:
            client.server.ipv6 = False
            client.server.relayed = world.local

        server.prepare = lie
        file = tmp_path / "password"
        file.write_text(PASSWORD)
        file.chmod(0o600)
        url = f"turn:127.0.0.1:{server.port}?transport=udp"
        world.turn(TurnConfig(url=url, username=USER, password_file=file))
        world.monitor.network = NETWORK
        try:
            world.start()
            await world.until(lambda: world.node.named("relays_changed"))
            assert world.node.named("relays_changed")[0][0][0].address == world.local
            world.node.echo = True
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(("127.0.0.1", 0))
                other.setblocking(False)
                other.sendto(b"a", world.local)
                async with asyncio.timeout(5):
                    assert await asyncio.get_running_loop().sock_recv(other, 9) == b"a"
                assert world.node.named("send_failed") == []
                peer, _ = world.join()
                assert await world.carried(peer, 1) == packet(1)
            assert not any(c.server.sent or c.server.dropped for c in server.clients)
        finally:
            server.stop()

    run(test)


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_relay_is_a_path_like_any_other(transport: str, tmp_path: Path) -> None:
    """Packets, and the datagrams of the node, from behind a TURN server to a peer and back."""

    async def test(world: World) -> None:
        server = await LoopServer().start()
        server.prepare = lambda client: setattr(client.server, "ipv6", False)
        file = tmp_path / "password"
        file.write_text(PASSWORD)
        file.chmod(0o600)
        url = f"turn:127.0.0.1:{server.port}?transport={transport}"
        world.turn(TurnConfig(url=url, username=USER, password_file=file))
        world.monitor.network = NETWORK
        try:
            world.start()
            await world.until(lambda: world.node.named("relays_changed"))
            (((relay,),),) = world.node.named("relays_changed")
            assert (relay.address, relay.ip, relay.transport) == (RELAYED, "127.0.0.1", transport)
            other = World(strict=True)
            world.others.append(other)
            other.start()
            ours = PathKey(RELAYED, Address("198.51.100.1", 4117))
            server.peers[ours.remote] = other.local

            client = next(c for c in server.clients if c.server.allocated)
            theirs = PathKey(other.local, client.address(ours.remote))
            other.connection = other.node.connect(theirs, first=True, now=clock.now())
            world.connection = world.node.connect(ours, first=False, now=clock.now())
            assert await world.carried(other, 1) == packet(1)
            assert await other.carried(world, 2) == packet(2)
            large = [packet(number, 1100) for number in range(3, 43)]
            world.host.write(large)
            assert await other.written(len(large)) == large

            other.node.echo = True
            world.node.outgoing.append((ours, b"\0\1a check"))
            world.driver._turn(lambda now: None)
            await world.until(lambda: world.node.named("receive_datagram"))
            assert world.node.named("receive_datagram") == [(b"\0\1a check", ours)]
            (row,) = world.driver.status()["relays"]
            assert (row["state"], row["address"]) == ("allocated", str(RELAYED))

            world.monitor.network = LocalNetwork()
            world.driver._turn(world.driver._look_at_network)
            await world.until(lambda: world.node.named("relays_changed")[-1] == ((),))
            world.node.outgoing.append((ours, b"\0\1a check"))
            world.driver._turn(lambda now: None)
            assert world.node.named("send_failed") == [(ours, errno.EADDRNOTAVAIL)]
        finally:
            server.stop()

    run(test)


def test_the_engines_news_reach_the_node() -> None:
    """Here that a packet was acknowledged."""

    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        await world.carried(other, 1)
        await world.until(lambda: any(report.samples for report in world.node.reports))
        ((path, acked, *_),) = world.node.reports[0].samples or []
        assert path is world.connection.active
        assert acked > 40

    run(test)


@pytest.mark.parametrize("busy", [False, True])
def test_what_a_node_does_about_news_leaves_at_once(busy: bool) -> None:
    """Most news only change the rate: then data may go on, and there is no turn."""

    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        await world.carried(other, 1)
        await world.until(lambda: world.node.reports)
        world.node.calls.clear()
        # The lane is held: with the next acknowledgement the node lets it go on.
        real = world.node.engine_events

        def opening(connections: list[Connection], now: float) -> bool:
            if connections:
                world.node.lane.recover(now)
            return real(connections, now)

        world.host.write([packet(2)])
        acknowledge(world, other)
        world.node.lane.hold()
        world.node.engine_events = opening  # type: ignore[method-assign]
        world.node.busy = busy
        # Whether there was a turn shows in the alarm, if no heartbeat has one of its own.
        world.driver._heartbeat = later = clock.now() + 60
        world.driver._alarm.arm(later)
        world.node.timer = later - 30
        world.host.write([packet(3)])
        world.driver._on_engine()
        other.driver._io.step()
        assert other.host.read(9) == [packet(2), packet(3)]
        assert world.driver._alarm.deadline == (later - 30 if busy else later)

    run(test)


def test_sockets_that_come_and_go_are_aimed_at_anew() -> None:
    """The numbers of sockets are used again: a path must not leave by another one's."""

    async def test(world: World) -> None:
        world.start()
        other, connection = world.join()
        assert await world.carried(other, 1) == packet(1)

        def have(*ips: str) -> None:
            world.monitor.network = LocalNetwork(tuple(LocalAddress(ip, "lo") for ip in ips))
            world.driver._turn(world.driver._look_at_network)

        have("127.0.0.2")
        world.host.write([packet(2)])
        await world.until(lambda: any(report.refused for report in world.node.reports))
        assert not other.node.named("receive_datagram")
        have("127.0.0.2", "127.0.0.1")
        connection.active.forgive()
        assert await world.carried(other, 3) == packet(3)
        assert not other.node.named("receive_datagram")

    run(test)


def test_control_leaves_before_data() -> None:
    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.settimeout(5)
            path = world.aim_at(other)
            world.node.lane.hold()
            world.host.write([packet(1)])
            await world.until(lambda: world.node.lane.queue_packets)
            world.node.outgoing = [(path, b"control"), (path, b"more")]
            world.driver._turn(world.node.lane.recover)  # any turn sends what may leave
            assert [other.recv(99) for _ in range(2)] == [b"control", b"more"]
            assert len(other.recv(99)) > len(packet(1))

    run(test)


def test_a_path_that_the_engine_cannot_send_on_is_told_in_the_same_turn() -> None:
    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.settimeout(5)
            path = world.aim_at(other)
            world.node.lane.hold()
            world.host.write([packet(1)])
            await world.until(lambda: world.node.lane.queue_packets)
            world.node.datapath.aim(
                world.node.paths[path], PathKey(Address("127.0.0.9", 1), path.remote)
            )
            world.driver._turn(world.node.lane.recover)
            (report,) = [each for each in world.node.reports if each.refused]
            assert errno.EADDRNOTAVAIL in flat(report.refused)

    run(test)


def flat(values: object) -> list[object]:
    """Everything in nested lists and tuples."""
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in flat(value)]
    return [values]


def test_news_that_come_again_and_again_are_all_told_and_do_not_hang_the_loop() -> None:
    """Each time it hears of the refusal the node tries again: it is heard, but not for ever."""

    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.settimeout(5)
            path = world.aim_at(other)
        gone = PathKey(Address("127.0.0.9", 1), path.remote)
        world.node.datapath.aim(world.node.paths[path], gone)
        real = world.node.engine_events

        def again(connections: list[Connection], now: float) -> bool:
            if connections:
                world.connection.active.forgive()
                world.node.lane.push(packet(1), now)
            return real(connections, now)

        world.node.engine_events = again  # type: ignore[method-assign]
        began = clock.now()
        world.driver._turn(lambda now: world.node.lane.push(packet(1), now))
        told = len(world.node.named("engine_events"))
        assert 0 < told <= driver.SEND_ROUNDS
        # Nothing else happens, and it goes on: nobody forgets what was left.
        assert world.driver._alarm.deadline <= clock.now() + driver.BREATHER
        await world.until(lambda: len(world.node.named("engine_events")) > 3 * told)
        assert clock.now() - began >= driver.BREATHER

    run(test)


def test_a_failed_send_is_told_and_what_comes_of_it_leaves_in_the_same_turn() -> None:
    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.settimeout(5)
            good = PathKey(world.local, Address("127.0.0.1", other.getsockname()[1]))
            bad = PathKey(Address("127.0.0.9", 1), good.remote)
            world.node.outgoing = [(bad, b"lost"), (bad, b"lost")]
            world.node.on_send_failed = (good, b"by another path")
            world.driver._turn(lambda now: None)
            assert world.node.named("send_failed") == [(bad, errno.EADDRNOTAVAIL)]
            assert other.recv(99) == b"by another path"
            assert world.driver.status()["counters"]["control_refused"] == 2

    run(test)


def test_a_node_that_never_finds_a_way_does_not_hang_the_loop() -> None:
    async def test(world: World) -> None:
        world.start()
        bad = PathKey(Address("127.0.0.9", 1), Address("127.0.0.1", 9))
        world.node.outgoing = [(bad, b"x")]
        world.node.on_send_failed = (bad, b"x")
        world.driver._turn(lambda now: None)
        assert len(world.node.named("send_failed")) == driver.SEND_ROUNDS

    run(test)


def test_the_timer_fires_in_time_and_only_when_due() -> None:
    async def test(world: World) -> None:
        world.start()
        due = clock.now() + 0.02
        world.node.timer = due
        world.monitor.ring()
        await world.until(lambda: world.node.named("handle_timer"))
        ((fired,),) = world.node.named("handle_timer")
        assert fired >= due
        assert world.driver._alarm.deadline <= clock.now() + clock.HEARTBEAT

    run(test)


def test_a_deadline_that_moved_away_is_no_early_timer() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.timer = clock.now() + 0.005
        world.driver._turn(lambda now: None)
        world.node.timer = later = clock.now() + 0.03
        world.driver._turn(lambda now: None)
        await world.until(lambda: world.node.named("handle_timer"))
        assert [fired >= later for (fired,) in world.node.named("handle_timer")] == [True]

    run(test)


def test_the_network_is_looked_at_on_the_first_event_of_a_burst() -> None:
    async def test(world: World) -> None:
        world.start()
        await asyncio.sleep(2 * driver.NETWORK_PAUSE)
        looks = world.monitor.looks
        world.monitor.network = TWO
        world.monitor.ring()
        await world.until(lambda: len(world.node.named("network_changed")) == 2)
        network, port, _ = world.node.named("network_changed")[1]
        assert (network, port) == (TWO, world.port)
        assert len(list(world.driver._sockets)) == 2
        assert world.monitor.looks == looks + 1
        # The rest of the burst: one more look, and no news.
        for _ in range(5):
            world.monitor.ring()
            await asyncio.sleep(0)
        await world.until(lambda: world.monitor.looks > looks + 1)
        assert len(world.node.named("network_changed")) == 2

    run(test)


def test_sockets_follow_and_the_port_stays() -> None:
    async def test(world: World) -> None:
        world.start()
        port = world.port
        for network in (LocalNetwork(), TWO):
            world.monitor.network = network
            world.monitor.ring()
            await world.until(lambda: world.driver._told == world.monitor.network)
            assert {s.local.host for s in world.driver._sockets} == {
                address.ip for address in network.addresses
            }
        assert world.port == port

    run(test)


def test_a_kernel_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "NETWORK_RETRY", 0.001)

    async def test(world: World) -> None:
        world.start()
        await asyncio.sleep(2 * driver.NETWORK_PAUSE)
        world.monitor.network = TWO
        world.monitor.failure = OSError(errno.ENOBUFS, "busy")
        world.monitor.ring()
        await world.until(lambda: len(world.node.named("network_changed")) == 2)

    run(test)


def test_an_address_somebody_else_listens_on_is_taken_when_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "NETWORK_RETRY", 0.005)

    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.2", world.port))
            world.monitor.network = TWO
            world.monitor.ring()
            await world.until(lambda: world.driver._sockets.incomplete)
            assert len(world.node.named("network_changed")) == 1  # nothing new to use
        await world.until(lambda: len(world.node.named("network_changed")) == 2)
        assert world.node.named("network_changed")[1][0] == TWO

    run(test)


def test_a_port_in_use_stops_the_start() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner:
        owner.bind(("127.0.0.1", 0))

        async def test(world: World) -> None:
            with pytest.raises(LocalError, match="already in use"):
                world.start()

        run(test, port=owner.getsockname()[1])


def test_after_a_jump_the_network_is_read_and_then_the_node_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(world: World) -> None:
        world.start()
        world.monitor.network = TWO
        asleep = 60.0
        real = clock.now
        monkeypatch.setattr(clock, "now", lambda: real() + asleep)
        world.driver._turn(lambda now: world.node.calls.append(("fed",)))
        names = [call[0] for call in world.node.calls]
        assert names == ["network_changed", "network_changed", "resumed", "fed"]
        world.driver._turn(lambda now: None)
        assert len(world.node.named("resumed")) == 1

    run(test)


def test_what_has_long_been_due_is_no_jump() -> None:
    async def test(world: World) -> None:
        world.start()
        world.driver._turn(lambda now: setattr(world.node, "timer", now - 60.0))
        world.driver._turn(lambda now: None)
        assert not world.node.named("resumed")
        await world.until(lambda: bool(world.node.named("handle_timer")))

    run(test)


def test_the_engines_news_wait_for_word_of_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        world.host.write([packet(1)])
        acknowledge(world, other)
        real, asleep = clock.now, 60.0
        monkeypatch.setattr(clock, "now", lambda: real() + asleep)
        world.node.calls.clear()
        world.driver._on_engine()
        names = [call[0] for call in world.node.calls]
        assert names == ["resumed", "engine_events"]

    run(test)


def test_names_are_resolved_and_pings_answered() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.events.append(ResolveWanted("office", (Endpoint("192.0.2.7", 4117),)))
        world.driver._turn(lambda now: None)
        await world.until(lambda: world.node.named("endpoints_resolved"))
        assert world.node.named("endpoints_resolved") == [("office", [Address("192.0.2.7", 4117)])]
        got: list[float] = []
        forget = world.driver.ping("office", got.append)
        ((peer, token),) = world.node.named("ping")
        assert peer == "office"
        world.node.events += [PingReply("office", token, 0.5), PingReply("office", token, 0.6)]
        world.driver._turn(lambda now: None)
        assert got == [0.5]
        forget()
        world.driver.ping("office", got.append)()  # forgotten at once
        world.node.events.append(PingReply("office", token + 1, 0.7))
        world.driver._turn(lambda now: None)
        assert got == [0.5]

    run(test)


@pytest.mark.parametrize("spread", [True, False])
def test_further_sockets_come_and_go(spread: bool) -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.events.append(PortWanted("127.0.0.1", spread=spread))
        world.driver._turn(lambda now: None)
        await world.until(lambda: world.node.named("port_opened"))
        [(local, told)] = world.node.named("port_opened")
        assert told == spread and local.host == "127.0.0.1"
        with socket.socket(type=socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            other.sendto(b"x", local)
            await world.until(lambda: world.node.named("receive_datagram"))
            [(_, path)] = world.node.named("receive_datagram")
            assert path == PathKey(local, Address(*other.getsockname()))
        world.node.events.append(PortUnwanted(local))
        world.driver._turn(lambda now: None)
        with socket.socket(type=socket.SOCK_DGRAM) as other:
            other.bind(local)  # it is free again

    run(test)


class Records(logging.Handler):
    """Keeps what one logger says, whatever other tests did to its parents."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


def test_events_become_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Migration(
        peer="office", sequence=1, trigger=Trigger.REBINDING, from_path="a", to_path="b",
        wall_time=0.0, at=1.0, detected=1.0, switched=1.001,
    )  # fmt: skip
    records = Records()
    logger = logging.getLogger("martlet.loop")
    monkeypatch.setattr(logger, "handlers", [records])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})

    async def test(world: World) -> None:
        world.start()
        world.node.events += [
            PeerConnecting("office"),
            PeerUp("office"),
            PeerHolding("office"),
            PeerMigrated(record),
            PeerRefused(None, "wrong key", "ssh-ed25519 AAAA"),
            Obstructed("office", Obstacle("broker", "there is none", "start one")),
            Obstructed(None, Obstacle("udp", "it is blocked")),
        ]
        world.driver._turn(lambda now: None)

    run(test)
    events = [each.getMessage() for each in records.kept]
    assert events == [
        "connecting", "peer up", "no path, holding", "migrated", "refused", "cannot reach peer",
        "obstacle",
    ]  # fmt: skip
    assert records.kept[-3].fields == {
        "peer": "unknown", "reason": "wrong key", "key": "ssh-ed25519 AAAA",
    }  # fmt: skip
    assert records.kept[-2].fields == {
        "peer": "office", "problem": "there is none", "remedy": "start one",
    }  # fmt: skip
    assert records.kept[-1].fields["problem"] == "it is blocked"


def test_a_bug_costs_one_datagram_and_is_counted() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.failure = RuntimeError("bug")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            for data in (b"a", b"b"):
                other.sendto(data, world.local)
            await world.until(lambda: len(world.node.named("receive_datagram")) == 2)
            world.node.failure = None
            other.sendto(b"c", world.local)
            await world.until(lambda: len(world.node.named("receive_datagram")) == 3)
        assert world.driver.status()["counters"]["internal_errors"] == 2

    run(test, strict=False)


def test_a_timer_that_always_fails_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BREATHER", 0.01)

    async def test(world: World) -> None:
        world.node.timer = clock.now()
        world.node.failure = RuntimeError("bug")
        world.start()
        began = time.monotonic()
        await world.until(lambda: len(world.node.named("handle_timer")) == 4)
        assert time.monotonic() - began >= 0.029

    run(test, strict=False)


def test_strictly_the_first_bug_ends_it_all() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.failure = RuntimeError("bug")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(b"a", world.local)
            with pytest.raises(RuntimeError, match="bug"):
                await world.driver.wait()

    run(test, strict=True)


def test_a_bug_in_what_the_node_does_about_news_does_not_end_the_tunnel() -> None:
    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        world.node.failure = RuntimeError("bug")
        await world.carried(other, 1)
        await world.until(lambda: world.node.named("engine_events"))
        assert world.driver.status()["counters"]["internal_errors"] >= 1
        await world.carried(other, 2)
        # Control datagrams and the timer go on, too.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind(("127.0.0.1", 0))
            stranger.settimeout(5)
            path = PathKey(world.local, Address(*stranger.getsockname()))

            def failing(connections: list[Connection], now: float) -> bool:
                raise RuntimeError("bug")

            world.node.engine_events = failing  # type: ignore[method-assign]
            world.node.failure = None
            world.node.outgoing = [(path, b"control")]
            world.node.timer = clock.now() + 0.03
            world.driver._turn(lambda now: None)
            assert stranger.recv(99) == b"control"
        await world.until(lambda: world.node.named("handle_timer"))

    run(test, strict=False)


def test_a_bug_while_draining_forgets_no_timer() -> None:
    async def test(world: World) -> None:
        world.start()
        real = world.node.datagrams_to_send
        bugs = [RuntimeError("bug")]

        def failing(now: float) -> list[tuple[PathKey, bytes]]:
            if bugs:
                raise bugs.pop()
            return real(now)

        world.node.datagrams_to_send = failing  # type: ignore[method-assign]
        world.node.timer = due = clock.now() + 0.05
        world.driver._turn(lambda now: None)
        await world.until(lambda: world.node.named("handle_timer"))
        assert clock.now() < due + 0.5  # a heartbeat is a second

    run(test, strict=False)


def test_a_device_that_is_gone_ends_the_tunnel() -> None:
    """As the twin is gone: its read gives nothing any more."""

    async def test(world: World) -> None:
        world.start()
        world.host.close()
        with pytest.raises(TunError, match="mt0 was removed") as caught:
            await world.driver.wait()
        assert caught.value.kind == "gone"

    run(test, strict=False)


def test_nothing_is_left_open_or_running(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        before = set(os.listdir("/proc/self/fd"))
        other = World(strict=True)
        other.monitor.network = TWO
        other.start()
        other.driver.ping("office", lambda rtt: None)
        other.monitor.failure = OSError(errno.ENOBUFS, "busy")
        other.driver._turn(other.driver._look_at_network)  # there is another look to come
        other.driver.down()
        other.close()
        status = other.driver.status()  # a late client
        assert status["counters"]["internal_errors"] == 0
        await other.driver.wait()
        assert set(os.listdir("/proc/self/fd")) == before

    run(test)


def test_closing_waits_for_the_node() -> None:
    async def test(world: World) -> None:
        world.start()
        world.driver.down()
        assert world.node.named("close") == [()]
        waiting = asyncio.ensure_future(world.driver.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        world.node.closed = True
        world.monitor.ring()
        await waiting
        world.driver.down()  # too late to matter

    run(test)


def test_closing_waits_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CLOSE_TIMEOUT", 0.005)

    async def test(world: World) -> None:
        world.start()
        world.driver.down()
        await world.driver.wait()

    run(test)


def test_a_second_request_does_not_wait_at_all() -> None:
    async def test(world: World) -> None:
        world.start()
        world.driver.down()
        world.driver.down()
        await world.driver.wait()

    run(test)


def test_status_has_the_counters_of_all() -> None:
    async def test(world: World) -> None:
        world.start()
        other, _ = world.join()
        await world.carried(other, 1)
        status = world.driver.status()
        assert (status["interface"], status["peers"]) == ("mt0", [])
        counters = status["counters"]
        own = {"not_routed": 3, "control_dropped": 0, "control_refused": 0, "internal_errors": 0}
        assert own.items() <= counters.items()
        assert counters["tun_reads"] == 1
        assert counters["udp_write_messages"] >= 1
        assert counters["udp_dropped"] == counters["udp_refused"] == counters["tun_dropped"] == 0
        assert world.driver.history() == [{"peer": "office"}]
        assert world.driver.peers() == ["office"]

    run(test)


class FakeFollower:
    def __init__(self, *, broken: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.broken = broken

    def network_changed(self, network: LocalNetwork, port: int) -> None:
        self.calls.append(("network_changed", network, port))
        if self.broken:
            raise RuntimeError("a bug")

    def resumed(self) -> None:
        self.calls.append(("resumed",))

    def stop(self) -> None:
        self.calls.append(("stop",))

    def close(self) -> None:
        self.calls.append(("close",))

    def status(self) -> list[dict[str, Any]]:
        return [{"calls": len(self.calls)}]


def test_others_follow_the_network_too(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, good = FakeFollower(broken=True), FakeFollower()

    async def test(world: World) -> None:
        world.driver.follow("broken", broken)
        world.driver.follow("good", good)
        world.start()
        assert good.calls == []  # the node comes first
        await world.until(lambda: good.calls)
        assert good.calls == broken.calls == [("network_changed", ONE, world.port)]
        status = world.driver.status()
        assert status["good"] == [{"calls": 1}] and status["counters"]["internal_errors"] == 1
        monkeypatch.setattr(world.driver._jumps, "observe", lambda *_: 60.0)
        world.monitor.network = TWO
        world.monitor.ring()
        await world.until(lambda: ("network_changed", TWO, world.port) in good.calls)
        assert ("resumed",) in good.calls
        monkeypatch.undo()
        world.driver.down()
        assert good.calls[-1] == ("stop",)

    run(test, strict=False)
    assert good.calls[-1] == ("close",)


def test_what_followers_learn_reaches_the_node() -> None:
    async def test(world: World) -> None:
        world.start()
        mapped = {world.local: Address("198.51.100.1", 7)}
        world.driver.ports_mapped(mapped)
        world.driver.endpoints_found("office", [world.local])
        assert world.node.named("mapped_ports_changed") == [(mapped,)]
        assert world.node.named("endpoints_found") == [("office", [world.local])]

    run(test)


def test_what_is_new_in_the_configuration_is_told_and_shown() -> None:
    fresh = PeerConfig(
        name="home",
        public_key=Identity.generate().public_key,
        allowed_ips=(ip_network("fd00::/8"),),
    )
    addresses = (ip_interface("fd88::1/128"),)
    changes = [
        Change(addresses=addresses, added=(fresh,)),
        Change(),
        Change(removed=("office", "home"), added=(fresh,)),
    ]

    async def test(world: World) -> None:
        with pytest.raises(LocalError, match="no configuration file"):
            world.driver.reload()
        world.driver._reload = lambda: changes.pop(0)
        world.start()
        news = {"addresses": ["fd88::1/128"], "added": ["home"], "removed": []}
        assert world.driver.reload() == news
        assert world.node.named("add_addresses") == [(addresses,)]
        assert world.node.named("add_peer") == [("home",)]
        assert world.driver.peers() == ["office", "home"]
        assert world.driver.reload() == {"addresses": [], "added": [], "removed": []}
        assert len(world.node.named("add_peer")) == 1
        assert world.driver.reload()["removed"] == ["office", "home"]
        assert world.driver.peers() == ["home"]
        assert [call[:2] for call in world.node.calls[-3:]] == [
            ("remove_peer", "office"),
            ("remove_peer", "home"),
            ("add_peer", "home"),
        ]
        world.driver._reload = refuse
        with pytest.raises(ConfigError):
            world.driver.reload()

    def refuse() -> Change:
        raise ConfigError("nonsense")

    run(test)
