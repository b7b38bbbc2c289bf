"""The driver in a real loop, between a scripted node, an in-memory TUN and loopback sockets."""

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.fake_node import FakeNode
from tun.errors import TunError
from tun.memory import MemoryTun
from tunnel.config import Endpoint
from tunnel.errors import LocalError
from tunnel.events import (
    PeerConnecting,
    PeerHolding,
    PeerMigrated,
    PeerRefused,
    PeerUp,
    PingReply,
    ResolveWanted,
)
from tunnel.ledger import Migration, Trigger
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

    def __init__(self, *, strict: bool, port: int) -> None:
        self.node = FakeNode()
        self.tun, self.host = MemoryTun.pair()
        self.monitor = FakeMonitor()
        self.driver = Driver(
            self.node, self.tun, self.monitor, listen_port=port, peers=["office"], strict=strict
        )

    def start(self) -> None:
        self.driver.start()

    @property
    def port(self) -> int:
        return self.driver._sockets.port

    @property
    def local(self) -> Address:
        return Address("127.0.0.1", self.port)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Let the loop turn until `condition` holds."""
        while not condition():
            await asyncio.sleep(0)

    def close(self) -> None:
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


def packet(number: int) -> bytes:
    return b"\x45" + bytes(18) + bytes([number])


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


def test_packets_in_and_out_of_the_tun() -> None:
    async def test(world: World) -> None:
        world.start()
        world.node.packets = [packet(9)]
        world.host.write([packet(1), packet(2)])
        await world.until(lambda: world.node.named("receive_packets"))
        assert world.node.named("receive_packets") == [([packet(1), packet(2)],)]
        assert world.host.read(9) == [packet(9)]

    run(test)


def test_the_tun_waits_while_the_node_wants_no_packets() -> None:
    async def test(world: World) -> None:
        world.node.wants_packets = False
        world.start()
        world.host.write([packet(1)])
        for _ in range(5):
            await asyncio.sleep(0)
        assert not world.node.named("receive_packets")
        world.node.wants_packets = True
        world.monitor.ring()  # any turn will do
        await world.until(lambda: world.node.named("receive_packets"))

    run(test)


def test_a_failed_send_is_told_and_what_comes_of_it_leaves_in_the_same_turn() -> None:
    async def test(world: World) -> None:
        world.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            good = PathKey(world.local, Address("127.0.0.1", other.getsockname()[1]))
            bad = PathKey(Address("127.0.0.9", 1), good.remote)
            world.node.outgoing = [(bad, b"lost"), (bad, b"lost")]
            world.node.on_send_failed = (good, b"by another path")
            world.driver._turn(lambda now: None)
            assert world.node.named("send_failed") == [(bad, errno.EADDRNOTAVAIL)]
            assert other.recv(99) == b"by another path"
            assert world.driver.status()["counters"]["udp_refused"] == 2

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
            PeerRefused(None, "wrong key"),
        ]
        world.driver._turn(lambda now: None)

    run(test)
    events = [each.getMessage() for each in records.kept]
    assert events == ["connecting", "peer up", "no path, holding", "migrated", "refused"]
    assert records.kept[-1].fields == {"peer": "unknown", "reason": "wrong key"}


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
    monkeypatch.setattr(driver, "AFTER_BUG", 0.01)

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


def test_a_device_that_is_gone_ends_the_tunnel() -> None:
    async def test(world: World) -> None:
        world.start()

        def gone(limit: int) -> list[bytes]:
            raise TunError("gone", "interface mt0 was removed")

        world.tun.read = gone  # type: ignore[method-assign]
        world.host.write([packet(1)])
        with pytest.raises(TunError, match="removed"):
            await world.driver.wait()

    run(test, strict=False)


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


def test_status_has_the_counters_of_both() -> None:
    async def test(world: World) -> None:
        world.start()
        assert world.driver.status() == {
            "interface": "mt0",
            "peers": [],
            "counters": {
                "not_routed": 3,
                "udp_dropped": 0,
                "udp_refused": 0,
                "tun_dropped": 0,
                "internal_errors": 0,
            },
        }
        assert world.driver.history() == [{"peer": "office"}]
        assert world.driver.peers() == ["office"]

    run(test)
