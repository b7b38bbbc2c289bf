"""The port mapper in a real loop, with a gateway on a loopback address, and a UPnP of the test."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from typing import Any

import pytest
import uvloop

from tests.unit.gateway import Gateway
from tunnel.ice import pcp
from tunnel.path.network import Address, LocalAddress, LocalNetwork, Route
from tunnel.shell import clock, portmap
from tunnel.shell.portmap import PortMapper

ROUTER, OTHER_ROUTER = "127.0.0.61", "127.0.0.62"
HERE = LocalAddress("127.0.0.51", "lo")
BASE = Address(HERE.ip, 4117)
OUTSIDE = Address("198.51.100.10", 4117)


def network(*locals: LocalAddress, gateway: str = ROUTER) -> LocalNetwork:
    routes = {a.interface: Route(ip_network("0.0.0.0/0"), a.interface, 0, gateway) for a in locals}
    return LocalNetwork(locals, tuple(routes.values()))


class Router:
    """A gateway that answers on PCP's port of an address."""

    def __init__(self, gateway: Gateway, ip: str = ROUTER) -> None:
        self.gateway = gateway
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind((ip, pcp.PORT))
        asyncio.get_running_loop().add_reader(self.socket, self._on_readable)

    def _on_readable(self) -> None:
        data, client = self.socket.recvfrom(2048)
        answer = self.gateway.answer(data, client[0], clock.now())
        if answer is not None:
            self.socket.sendto(answer, client)

    def announce(self, version: int = 2) -> None:
        """To where its clients listen; loopback has no multicast."""
        data = self.gateway.announcement(version, clock.now())
        self.socket.sendto(data, (pcp.ANNOUNCE_GROUP, pcp.ANNOUNCE_PORT))

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()


class World:
    """A mapper, and what it told."""

    def __init__(self) -> None:
        self.told: list[dict[Address, Address]] = []
        self.routers: list[Router] = []
        self.mapper = PortMapper(
            asyncio.get_running_loop(),
            self.told.append,
            secret=b"s" * 32,
            rng=random.Random(1),
        )

    def router(self, gateway: Gateway | None = None, ip: str = ROUTER) -> Gateway:
        self.routers.append(Router(gateway or Gateway(restarted_at=clock.now() - 1000), ip))
        return self.routers[-1].gateway

    async def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, (self.told, self.mapper.status())
            await asyncio.sleep(0.005)

    def close(self) -> None:
        self.mapper.close()
        for router in self.routers:
            router.close()


class Igd:
    """Stands for `miniupnpc.UPnP`, in the thread that it is used in."""

    made: list[Igd]
    url = f"http://{ROUTER}:5000/ctl"
    mapped: dict[int, tuple[str, int, int]]
    conflicts: set[int]
    permanent = False
    blocked: threading.Event | None = None
    external = OUTSIDE.host

    def __init__(self, multicastif: str, discoverdelay: int) -> None:
        self.lanaddr = multicastif
        self.made.append(self)
        assert threading.current_thread() is not threading.main_thread()

    def discover(self) -> int:
        if self.blocked is not None:
            self.blocked.wait(10)
        return 1

    def selectigd(self) -> str:
        if not self.url:
            raise Exception("No UPnP device discovered")
        return self.url

    def externalipaddress(self) -> str:
        return self.external

    def addportmapping(
        self, port: int, protocol: str, host: str, inner: int, what: str, remote: str, lease: int
    ) -> bool:
        assert (protocol, remote) == ("UDP", "")
        if port in self.conflicts:
            raise Exception("ConflictInMappingEntry")
        if lease and self.permanent:
            raise Exception("OnlyPermanentLeasesSupported")
        self.mapped[port] = (host, inner, lease)
        return True

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        del self.mapped[port]
        return True


@pytest.fixture(autouse=True)
def igd(monkeypatch: pytest.MonkeyPatch) -> type[Igd]:
    fresh = type("FreshIgd", (Igd,), {"made": [], "mapped": {}, "conflicts": set()})
    monkeypatch.setattr("miniupnpc.UPnP", fresh)
    # Loopback addresses stand for private ones.
    monkeypatch.setattr(portmap, "is_translated", lambda host: host.startswith("127."))
    return fresh


def run(test: Callable[[World], Awaitable[None]]) -> World:
    async def main() -> World:
        world = World()
        try:
            await test(world)
        finally:
            world.close()
        return world

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def test_mapped_told_and_given_back() -> None:
    async def test(world: World) -> None:
        gateway = world.router()
        world.mapper.network_changed(network(HERE), BASE.port)
        assert world.told == []  # not from inside the call
        await world.until(lambda: world.told)
        assert world.told == [{BASE: OUTSIDE}]
        (status,) = world.mapper.status()
        assert (status["local"], status["external"], status["protocol"], status["state"]) == (
            str(BASE), str(OUTSIDE), "pcp", "mapped",
        )  # fmt: skip
        assert 7100 < status["expires_s"] <= 7200
        world.mapper.stop()
        await world.until(lambda: gateway.mapped == {})
        assert world.told == [{BASE: OUTSIDE}]

    run(test)


def test_what_cannot_be_mapped_is_not_asked() -> None:
    """A public address, an interface without a gateway, and before there is a port."""

    async def test(world: World) -> None:
        gateway = world.router()
        public = LocalAddress("198.51.100.1", "eth0")
        world.mapper.network_changed(network(public), BASE.port)
        world.mapper.network_changed(network(HERE, gateway=""), BASE.port)
        world.mapper.network_changed(network(HERE), 0)
        await asyncio.sleep(0.1)
        assert world.told == [] and world.mapper.status() == [] and gateway.heard == []

    run(test)


def test_an_address_goes_and_comes_back_elsewhere() -> None:
    async def test(world: World) -> None:
        world.router()
        other = world.router(Gateway(external="203.0.113.5"), OTHER_ROUTER)
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: len(world.told) == 1)
        world.mapper.network_changed(LocalNetwork(), BASE.port)
        await world.until(lambda: len(world.told) == 2)
        world.mapper.network_changed(network(HERE, gateway=OTHER_ROUTER), BASE.port)
        await world.until(lambda: len(world.told) == 3)
        assert world.told[1:] == [{}, {BASE: Address("203.0.113.5", 4117)}]
        assert len(other.heard) == 1

    run(test)


def test_the_same_network_again_costs_one_request() -> None:
    async def test(world: World) -> None:
        gateway = world.router()
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: world.told)
        for _ in range(10):
            world.mapper.network_changed(network(HERE), BASE.port)
            world.mapper.resumed()
        await asyncio.sleep(0.1)
        assert len(gateway.heard) == 1  # the next one is due some seconds after it

    run(test)


def test_nobody_listens_then_upnp(igd: type[Igd]) -> None:
    async def test(world: World) -> None:
        began = time.monotonic()
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: world.told)
        assert time.monotonic() - began < 1.5  # ICMP told; no time-out was waited for
        assert world.told == [{BASE: OUTSIDE}]
        assert igd.mapped == {4117: (HERE.ip, 4117, 7200)}
        assert world.mapper.status()[0]["protocol"] == "upnp"

    run(test)
    assert igd.mapped == {}


@pytest.mark.parametrize("fault", ["nobody", "stranger", "other address", "no address"])
def test_upnp_of_others_is_not_used(igd: type[Igd], fault: str) -> None:
    if fault == "nobody":
        igd.url = ""
    elif fault == "stranger":
        igd.url = "http://127.0.0.99:5000/ctl"
    elif fault == "no address":
        igd.external = "not an address"
    else:
        igd.__init__ = lambda self, **_: setattr(self, "lanaddr", "127.0.0.52")  # type: ignore

    async def test(world: World) -> None:
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: world.mapper.status()[0]["state"] == "resting")
        assert world.told == []

    run(test)
    assert igd.mapped == {}


def test_upnp_finds_a_way_around_what_others_have(igd: type[Igd]) -> None:
    igd.conflicts.add(4117)
    igd.permanent = True

    async def test(world: World) -> None:
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: world.told)
        ((port, mapped),) = igd.mapped.items()
        assert world.told == [{BASE: OUTSIDE._replace(port=port)}]
        assert port != 4117 and mapped == (HERE.ip, 4117, 0)

    run(test)
    assert igd.mapped == {}


def test_a_router_that_hangs_holds_up_nothing(igd: type[Igd]) -> None:
    igd.blocked = threading.Event()

    async def test(world: World) -> None:
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: igd.made)
        began = time.monotonic()
        world.mapper.close()
        assert time.monotonic() - began < 3 * portmap.FAREWELL
        igd.blocked.set()  # type: ignore[union-attr]

    run(test)
    deadline = time.monotonic() + 5
    while any(thread.name == "upnp" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert igd.mapped == {}  # what came late was given back, too


def test_announcements_are_heard() -> None:
    """From the gateway alone. Loopback takes part in multicast when it is named."""

    async def test(world: World) -> None:
        gateway = world.router()
        stranger = Router(Gateway(), OTHER_ROUTER)
        world.routers.append(stranger)
        world.mapper.network_changed(network(HERE), BASE.port)
        await world.until(lambda: world.told)
        for router in world.routers:
            router.socket.setsockopt(
                socket.IPPROTO_IP,
                socket.IP_MULTICAST_IF,
                socket.inet_aton(router.socket.getsockname()[0]),
            )
        heard: list[bytes] = []
        (asked,) = world.mapper._asked.values()
        announced = asked.mapping.announced
        asked.mapping.announced = lambda data, now: (heard.append(data), announced(data, now))  # type: ignore
        gateway.restart(clock.now())
        stranger.announce()
        world.routers[0].announce()
        await world.until(lambda: heard)
        await asyncio.sleep(0.05)
        assert len(heard) == 1

    run(test)


def test_ports_are_not_shared_with_strangers_of_the_same_name() -> None:
    """The nonce is another for each gateway and address, and the same after a restart."""

    async def test(world: World) -> None:
        first, second = world.router(), world.router(Gateway(), OTHER_ROUTER)
        for _ in range(2):
            for gateway in (ROUTER, OTHER_ROUTER):
                world.mapper.network_changed(network(HERE, gateway=gateway), BASE.port)
                await world.until(lambda: world.told)
                world.told.clear()
        nonces = [{data[24:36] for data in router.heard} for router in (first, second)]
        assert [len(found) for found in nonces] == [1, 1] and nonces[0] != nonces[1]

    run(test)


def test_status_without_a_mapping() -> None:
    async def test(world: World) -> None:
        world.router(Gateway(result=2))
        world.mapper.network_changed(network(HERE), BASE.port)
        (status,) = world.mapper.status()
        expected: dict[str, Any] = {"external": None, "protocol": None, "expires_s": None}
        assert expected.items() <= status.items()

    run(test)
