"""The network monitor on a real kernel, in namespaces of the test.

host (the test's thread) [uplink1] ----veth---- [peer] other
                         [docker0] ----veth---- [peer2]
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import uvloop

from cli.demo.netns import Namespace, Namespaces
from tests.fake_node import FakeNode
from tun.memory import MemoryTun
from tunnel.path.network import LocalAddress, LocalNetwork
from tunnel.shell.driver import Driver
from tunnel.shell.netmon import Netlink

SIOCSIFADDR = 0x8916  # include/uapi/linux/sockios.h


@dataclass
class Lab:
    """The host, the other end of its cables, and a monitor that lives in the host."""

    host: Namespace
    other: Namespace
    monitor: Netlink

    def change(self, *lines: str, space: Namespace | None = None) -> LocalNetwork:
        """`ip` commands, then what the monitor sees once it was rung."""
        self.monitor.acknowledge()
        (space or self.host).batch(*lines)
        assert select.select([self.monitor.fileno()], [], [], 2)[0], "the doorbell did not ring"
        return self.monitor.snapshot()

    def until(self, condition: Callable[[LocalNetwork], bool]) -> LocalNetwork:
        """The first snapshot for which `condition` holds, looking only when it rings."""
        while not condition(network := self.monitor.snapshot()):
            assert select.select([self.monitor.fileno()], [], [], 5)[0], network
            self.monitor.acknowledge()
        return network


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Namespaces() as spaces:
        host, other = spaces.create("host"), spaces.create("other")
        spaces.veth(host, "uplink1", other, "peer")
        monitor = host.call(lambda: Netlink("mt0"))
        try:
            yield Lab(host, other, monitor)
        finally:
            monitor.close()


def ips(network: LocalNetwork) -> list[str]:
    return [address.ip for address in network.addresses]


def routes(network: LocalNetwork) -> set[str]:
    return {f"{route.network} {route.interface} {route.metric}" for route in network.routes}


def test_addresses_and_routes_come_and_go(lab: Lab) -> None:
    assert lab.monitor.snapshot() == LocalNetwork()
    network = lab.change("addr add 192.0.2.1/24 dev uplink1")
    assert network.addresses == (LocalAddress("192.0.2.1", "uplink1"),)
    network = lab.until(lambda network: bool(network.routes))
    assert routes(network) == {"192.0.2.0/24 uplink1 0"}
    network = lab.change("route add default via 192.0.2.254 metric 50")
    assert routes(network) == {"192.0.2.0/24 uplink1 0", "0.0.0.0/0 uplink1 50"}
    assert [a.ip for a in network.sources("198.51.100.1")] == ["192.0.2.1"]
    assert lab.change("addr del 192.0.2.1/24 dev uplink1") == LocalNetwork()


def test_ipv6(lab: Lab) -> None:
    lab.change("addr add 2001:db8::1/64 dev uplink1 nodad")
    network = lab.change("route add default via 2001:db8::ff dev uplink1 metric 10")
    assert ips(network) == ["2001:db8::1"]
    assert routes(network) == {"2001:db8::/64 uplink1 256", "::/0 uplink1 10"}
    network = lab.change("addr change 2001:db8::1/64 dev uplink1 preferred_lft 0 valid_lft 60")
    assert ips(network) == []  # deprecated


def test_an_address_under_duplicate_detection_waits(lab: Lab) -> None:
    lab.host.sysctl(
        "net.ipv6.conf.all.accept_dad=1", "net.ipv6.conf.uplink1.accept_dad=1",
        "net.ipv6.conf.uplink1.dad_transmits=1",
    )  # fmt: skip
    assert ips(lab.change("addr add 2001:db8::1/64 dev uplink1")) == []
    lab.until(lambda network: ips(network) == ["2001:db8::1"])


def test_link_down_and_lost_carrier(lab: Lab) -> None:
    lab.change("addr add 192.0.2.1/24 dev uplink1")
    assert lab.change("link set uplink1 down") == LocalNetwork()
    lab.change("link set uplink1 up")
    lab.until(lambda network: ips(network) == ["192.0.2.1"])
    lab.change("link set peer down", space=lab.other)  # as if the cable had been pulled
    lab.until(lambda network: network == LocalNetwork())
    lab.change("link set peer up", space=lab.other)
    lab.until(lambda network: ips(network) == ["192.0.2.1"])


def test_what_is_not_for_us(lab: Lab) -> None:
    """Other tables, routes that lead nowhere, loopback, link-local, containers, tunnels of ours."""
    lab.host.batch(
        "addr add 192.0.2.1/24 dev uplink1",
        "route add 198.51.100.0/24 via 192.0.2.254 table 1000",
        "route add unreachable 203.0.113.0/24",
        "addr add 10.9.9.9/32 dev lo",
        "addr add 169.254.7.7/16 dev uplink1",
        "tuntap add mt7 mode tun",
        "link set mt7 up alias martlet",
        "addr add 10.88.0.1/24 dev mt7",
        f"link add docker0 type veth peer name peer2 netns {lab.other.name}",
        "link set docker0 up",
        "addr add 172.17.0.1/16 dev docker0",
    )
    lab.other.batch("link set peer2 up")
    network = lab.until(lambda network: ips(network) == ["192.0.2.1"])
    assert routes(network) == {"192.0.2.0/24 uplink1 0"}


def test_a_route_of_two_hops(lab: Lab) -> None:
    lab.change("addr add 192.0.2.1/24 dev uplink1")
    network = lab.change("route add default nexthop via 192.0.2.8 nexthop via 192.0.2.9")
    assert routes(network) == {"192.0.2.0/24 uplink1 0", "0.0.0.0/0 uplink1 0"}
    assert {route.gateway for route in network.routes} == {"", "192.0.2.8", "192.0.2.9"}


def test_gateways(lab: Lab) -> None:
    """What a host asks for a port, and what it reaches without asking anybody."""
    lab.host.batch("addr add 192.0.2.1/24 dev uplink1", "addr add 2001:db8::1/64 dev uplink1 nodad")
    network = lab.change(
        "route add default via 192.0.2.254 metric 50",
        "route add default via 192.0.2.253 metric 20",
        "route add default via fe80::1 dev uplink1",
    )
    by_ip = {address.ip: network.gateway(address) for address in network.addresses}
    assert by_ip == {"192.0.2.1": "192.0.2.253", "2001:db8::1": "fe80::1"}
    assert network.on_link("192.0.2.77") and network.on_link("2001:db8::2", "uplink1")
    assert not network.on_link("198.51.100.1") and not network.on_link("192.0.2.77", "uplink2")
    network = lab.change(
        "route del default metric 50",
        "route del default metric 20",
        "route add 0.0.0.0/0 via inet6 fe80::1 dev uplink1",
    )
    network = lab.until(
        lambda network: any(r.network.prefixlen == 0 and r.gateway for r in network.routes)
    )
    assert network.gateway(LocalAddress("192.0.2.1", "uplink1")) == ""  # of the other family


def test_an_overrun_loses_nothing(lab: Lab) -> None:
    """More events than the doorbell's buffer holds (ENOBUFS): the state is right all the same."""
    lab.host.batch("addr add 192.0.2.1/24 dev uplink1")
    lab.monitor._doorbell.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    lab.host.batch(*(f"addr add 10.0.{i}.1/32 dev uplink1" for i in range(200)))
    lab.monitor.acknowledge()
    assert len(ips(lab.monitor.snapshot())) == 201


def test_a_move_starts_with_the_kernels_event(
    lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    """A new address (SIOCSIFADDR, which returns when the kernel has it) until the node knows.

    About 1 ms on an idle machine; polling, or a dump by pyroute2, would take 50 and more.
    """
    told: dict[str, float] = {}

    class Node(FakeNode):
        def network_changed(self, network: LocalNetwork, port: int, now: float) -> None:
            for address in network.addresses:
                told.setdefault(address.ip, time.monotonic())

    async def main() -> list[float]:
        device, host = MemoryTun.pair()
        driver = Driver(Node(), device, lab.monitor, listen_port=0, peers=[], strict=True)
        driver.start()
        delays = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for number in range(1, 51):
                ip = f"192.0.2.{number}"
                address = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(ip))
                request = struct.pack("16s16s", b"uplink1", address)
                fcntl.ioctl(control, SIOCSIFADDR, request)
                changed = time.monotonic()
                while ip not in told:
                    await asyncio.sleep(0)
                delays.append(told[ip] - changed)
                await asyncio.sleep(0.005)
        driver.close()
        device.close()
        host.close()
        return delays

    def inside() -> list[float]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())

    delays = sorted(1000 * delay for delay in lab.host.call(inside))
    figures = {"median": statistics.median(delays), "p95": delays[47], "max": delays[-1]}
    print("event to node, ms:", figures)
    record_property("event_to_node_ms", figures)
    assert figures["median"] < 20
