"""Discovery on the link in a real loop, without a network: zeroconf is one of the test."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from zeroconf import ServiceStateChange

from tunnel import announcement
from tunnel.dialling import MAX_FOUND
from tunnel.path.network import Address, LocalAddress, LocalNetwork, Route
from tunnel.shell import mdns
from tunnel.shell.mdns import MAX_SERVICES, SERVICE, LinkDiscovery

RNG = random.Random(1)
A, B, C, D = (RNG.randbytes(32) for _ in range(4))
ETH, WIFI = LocalAddress("192.0.2.1", "eth0"), LocalAddress("198.51.100.1", "wlan0")


def network(*locals: LocalAddress) -> LocalNetwork:
    """Each on a /24 of its own, with a way to everywhere else."""
    routes = [Route(ip_network("0.0.0.0/0"), a.interface, 0, "192.0.2.254") for a in locals]
    routes += [Route(ip_network(f"{a.ip}/24", strict=False), a.interface, 0) for a in locals]
    return LocalNetwork(locals, tuple(routes))


class FakeZeroconf:
    """`AsyncZeroconf`, its browser and its service, in one."""

    made: list[FakeZeroconf]
    failure: Exception | None = None
    hangs = False
    services: dict[str, tuple[dict[bytes, bytes | None], list[str], int]]

    def __init__(self, interfaces: list[str]) -> None:
        if self.failure is not None:
            raise self.failure
        self.interfaces = interfaces
        self.info: Any = None
        self.handlers: list[Callable[..., None]] = []
        self.said_goodbye = self.closed = False
        self.made.append(self)
        self.engine = SimpleNamespace(readers=[])

    @property
    def zeroconf(self) -> FakeZeroconf:
        return self

    async def async_wait_for_start(self) -> None:
        await asyncio.sleep(0)

    async def async_register_service(self, info: Any, *, cooperating_responders: bool) -> None:
        self.info = info

    async def async_close(self) -> None:
        if self.hangs:
            await asyncio.sleep(60)
        self.said_goodbye = True

    def close(self) -> None:
        self.closed = True

    def changed(self, name: str, change: ServiceStateChange) -> None:
        for handler in self.handlers:
            handler(zeroconf=self, service_type=SERVICE, name=name, state_change=change)


class FakeBrowser:
    def __init__(
        self, zeroconf: FakeZeroconf, kind: str, handlers: Any, question_type: Any
    ) -> None:
        assert kind == SERVICE
        zeroconf.handlers = handlers

    async def async_cancel(self) -> None:
        pass


class FakeInfo:
    """An `AsyncServiceInfo` that is made from what is announced, or looked up by its name."""

    def __init__(self, kind: str, name: str, **more: Any) -> None:
        self.name = name
        self.more = more

    async def async_request(self, zeroconf: FakeZeroconf, timeout: int, question: Any) -> bool:
        await asyncio.sleep(0)
        found = zeroconf.services.get(self.name)
        if found is None:
            return False
        self.properties, self._ips, self.port = found
        return True

    def addresses_by_version(self, version: Any) -> list[bytes]:
        return [
            socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)
            for ip in self._ips
        ]


class World:
    def __init__(self) -> None:
        self.told: list[tuple[str, list[Address]]] = []
        self.discovery = LinkDiscovery(
            asyncio.get_running_loop(),
            lambda peer, addresses: self.told.append((peer, addresses)),
            own=A,
            peers={B: "b", C: "c"},
            rng=random.Random(1),
        )

    async def turn(self, seconds: float = 0.0) -> None:
        for _ in range(20):
            await asyncio.sleep(seconds / 20)

    async def go(self, *locals: LocalAddress, port: int = 4117) -> None:
        self.discovery.network_changed(network(*locals), port)
        await self.turn()

    async def announce(
        self,
        zeroconf: FakeZeroconf,
        name: str,
        *ips: str,
        by: bytes = B,
        to: bytes = A,
        port: int = 9,
    ) -> None:
        said: dict[bytes, bytes | None] = {
            key.encode(): value for key, value in announcement.make(by, [to], RNG).items()
        }
        zeroconf.services[name] = (said, list(ips), port)
        zeroconf.changed(name, ServiceStateChange.Added)
        await self.turn()


@pytest.fixture(autouse=True)
def zeroconf(monkeypatch: pytest.MonkeyPatch) -> type[FakeZeroconf]:
    fresh = type("FreshZeroconf", (FakeZeroconf,), {"made": [], "services": {}})
    monkeypatch.setattr(mdns, "AsyncZeroconf", fresh)
    monkeypatch.setattr(mdns, "AsyncServiceBrowser", FakeBrowser)
    monkeypatch.setattr(mdns, "AsyncServiceInfo", FakeInfo)
    return fresh


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await asyncio.wait_for(test(world), 10)
        finally:
            world.discovery.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_each_interface_announces_its_own_addresses(zeroconf: type[FakeZeroconf]) -> None:
    """By a name that says nothing, and only where there is a network on the link."""
    six = LocalAddress("2001:db8::1", "eth0")

    async def test(world: World) -> None:
        both = network(ETH, WIFI)
        more = Route(ip_network("2001:db8::/64"), "eth0", 0)
        modem = LocalAddress("10.0.0.1", "ppp0")
        whole = LocalNetwork((*both.addresses, six, modem), (*both.routes, more))
        world.discovery.network_changed(whole, 4117)
        await world.turn()
        eth, wifi = zeroconf.made
        assert (set(eth.interfaces), wifi.interfaces) == ({ETH.ip, six.ip}, [WIFI.ip])
        assert eth.info.more["parsed_addresses"] == [ETH.ip, six.ip]
        assert wifi.info.more["parsed_addresses"] == [WIFI.ip]
        names = {eth.info.name, wifi.info.name, eth.info.more["server"], wifi.info.more["server"]}
        assert len(names) == 4 and eth.info.more["port"] == 4117
        assert eth.info.more["properties"] != wifi.info.more["properties"]
        assert [entry["announced"] for entry in world.discovery.status()] == [True, True]

    run(test)
    assert all(made.closed for made in zeroconf.made)


def test_found_told_once_and_gone(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        await world.announce(eth, "one", "192.0.2.7")
        await world.announce(eth, "one", "192.0.2.7")
        assert world.told == [("b", [Address("192.0.2.7", 9)])]
        assert world.discovery.status()[0]["peers"] == ["b"]
        eth.changed("one", ServiceStateChange.Removed)
        await world.turn()
        assert world.told[1:] == [("b", [])]

    run(test)


def test_others_do_not_matter(zeroconf: type[FakeZeroconf]) -> None:
    """Of strangers, for strangers, of ourselves, of nobody; unreadable, without an address."""

    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        await world.announce(eth, "stranger", "192.0.2.7", by=bytes(32))
        await world.announce(eth, "for another", "192.0.2.7", to=C)
        await world.announce(eth, "reflected", "192.0.2.7", by=A, to=B)
        await world.announce(eth, eth.info.name, "192.0.2.7")
        await world.announce(eth, "nowhere")
        await world.announce(eth, "no port", "192.0.2.7", port=0)
        eth.services["broken"] = ({}, ["192.0.2.7"], 1)
        for name in ("broken", "silent"):
            eth.changed(name, ServiceStateChange.Added)
        await world.turn()
        assert world.told == []

    run(test)


def test_only_addresses_of_the_link_count(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH, WIFI)
        eth = zeroconf.made[0]
        lies = ("8.8.8.8", "198.51.100.7", "127.0.0.1", "224.0.0.1", "fe80::1", ETH.ip)
        await world.announce(eth, "lies", *lies, "192.0.2.7")
        assert world.told == [("b", [Address("192.0.2.7", 9)])]

    run(test)


def test_one_that_announces_many_crowds_out_none(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        await world.announce(eth, "many", *(f"192.0.2.{n}" for n in range(100, 200)))
        await world.announce(eth, "true", "192.0.2.7")
        told = world.told[-1][1]
        assert len(told) == MAX_FOUND and Address("192.0.2.7", 9) in told

    run(test)


def test_no_more_services_than_that_are_looked_at(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        for number in range(MAX_SERVICES):
            eth.changed(f"noise{number}", ServiceStateChange.Added)
        await world.announce(eth, "true", "192.0.2.7")
        assert world.told == []
        eth.changed("noise0", ServiceStateChange.Removed)
        await world.announce(eth, "true", "192.0.2.7")
        assert world.told == [("b", [Address("192.0.2.7", 9)])]

    run(test)


def test_names_of_nobody_make_room(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        await world.announce(eth, "first", "192.0.2.6")
        for number in range(2 * MAX_SERVICES):
            eth.changed(f"noise{number}", ServiceStateChange.Added)
            await asyncio.sleep(0)
        await world.turn()
        await world.announce(eth, "second", "192.0.2.7", by=C)
        assert [peer for peer, _ in world.told] == ["b", "c"]
        (station,) = world.discovery._stations.values()
        assert len(station._seen) == MAX_SERVICES and {"first", "second"} <= {*station._seen}

    run(test)


def test_a_changed_network_is_told_again_what_stays(zeroconf: type[FakeZeroconf]) -> None:
    """The node forgets with every change; an interface that stays keeps its station."""

    async def test(world: World) -> None:
        await world.go(ETH)
        (eth,) = zeroconf.made
        await world.announce(eth, "one", "192.0.2.7")
        await world.go(ETH, WIFI)
        assert [made.closed for made in zeroconf.made] == [False, False]
        assert world.told == [("b", [Address("192.0.2.7", 9)])] * 2
        await world.go(LocalAddress("192.0.2.2", "eth0"), WIFI)
        assert [made.closed for made in zeroconf.made] == [True, False, False]
        assert eth.said_goodbye
        assert len(world.told) == 2  # what the old station knew is old
        eth.changed("one", ServiceStateChange.Added)
        await world.turn()
        assert len(world.told) == 2

    run(test)


def test_a_resumed_host_asks_anew(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        world.discovery.resumed()
        await world.turn()
        assert [made.closed for made in zeroconf.made] == [True, False]

    run(test)


def test_peers_may_come_and_go(zeroconf: type[FakeZeroconf]) -> None:
    async def test(world: World) -> None:
        await world.go(ETH)
        world.discovery.peers_changed({B: "b", C: "c"})
        await world.turn()
        assert len(zeroconf.made) == 1
        world.discovery.peers_changed({D: "d", C: "c"})
        await world.turn()
        assert [made.closed for made in zeroconf.made] == [True, False]
        station = zeroconf.made[1]
        await world.announce(station, "gone", "192.0.2.7", by=B)
        await world.announce(station, "new", "192.0.2.8", by=D)
        assert world.told == [("d", [Address("192.0.2.8", 9)])]
        world.discovery.peers_changed({})
        await world.turn()
        assert [made.closed for made in zeroconf.made] == [True, True]
        assert world.discovery.status() == []
        world.discovery.peers_changed({D: "d"})
        await world.turn()
        assert len(zeroconf.made) == 3

    run(test)


def test_an_interface_that_refuses_is_tried_again(
    zeroconf: type[FakeZeroconf], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "RETRY", 0.01)
    zeroconf.failure = OSError(98, "in use")

    async def test(world: World) -> None:
        await world.go(ETH)
        before = world.discovery.status()
        zeroconf.failure = None
        await world.turn(0.2)
        after = world.discovery.status()
        assert [entry["announced"] for entry in (*before, *after)] == [False, True]
        assert len(zeroconf.made) == 1

    run(test)


def test_the_end_waits_for_nobody(zeroconf: type[FakeZeroconf]) -> None:
    zeroconf.hangs = True

    async def test(world: World) -> None:
        await world.go(ETH)
        world.discovery.stop()
        await world.go(WIFI)  # too late
        assert len(zeroconf.made) == 1

    began = time.monotonic()
    run(test)
    assert time.monotonic() - began < 5
    assert zeroconf.made[0].closed
