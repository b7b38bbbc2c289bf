"""Sockets and devices on a real kernel.

    host [uplink1 192.0.2.1] ----veth---- [peer1 192.0.2.9] other
         [uplink2 198.51.100.1] --veth--- [peer2 198.51.100.9]

The default route is by uplink2. Both ends listen on 203.0.113.1 (on other's loopback), which is
reached by either cable.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cli.demo.netns import Namespace, Namespaces
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.shell.netmon import Netlink
from tunnel.shell.udp import SOCKET_BUFFER, SOCKET_MARK, UdpSocket, UdpSockets

SERVER = "203.0.113.1"


@dataclass
class Lab:
    """The host, its monitor and its sockets; `server` listens in other."""

    host: Namespace
    other: Namespace
    monitor: Netlink
    sockets: UdpSockets
    server: socket.socket

    def sync(self) -> LocalNetwork:
        network = self.monitor.snapshot()
        self.host.call(lambda: self.sockets.sync(network))
        return network

    def socket(self, ip: str) -> UdpSocket:
        return next(each for each in self.sockets if each.local.host == ip)

    def path(self, ip: str) -> PathKey:
        return PathKey(Address(ip, self.sockets.port), Address(*self.server.getsockname()))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Namespaces() as spaces:
        host, other = spaces.create("host"), spaces.create("other")
        for number, net in ((1, "192.0.2"), (2, "198.51.100")):
            spaces.veth(host, f"uplink{number}", other, f"peer{number}")
            host.batch(f"addr add {net}.1/24 dev uplink{number}")
            other.batch(f"addr add {net}.9/24 dev peer{number}")
        host.batch(
            "route add default via 192.0.2.9 metric 200",
            "route add default via 198.51.100.9 metric 100",
        )
        other.batch(f"addr add {SERVER}/32 dev lo")
        server = other.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server.bind((SERVER, 0))
        server.settimeout(2)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        monitor = host.call(lambda: Netlink("mt0"))
        made = UdpSockets(0, lambda udp: None, lambda udp: None)
        lab = Lab(host, other, monitor, made, server)
        lab.sync()
        try:
            yield lab
        finally:
            made.close()
            monitor.close()
            server.close()


def counted(space: Namespace, interface: str) -> int:
    """Packets that `interface` has sent."""
    path = f"/sys/class/net/{interface}/statistics/tx_packets"
    return int(space.run(["cat", path]).stdout)


def test_each_address_leaves_by_its_own_device(lab: Lab) -> None:
    """Also the one whose device has the worse default route."""
    for ip, device in (("192.0.2.1", "uplink1"), ("198.51.100.1", "uplink2")):
        assert lab.socket(ip).interface == device
        before = counted(lab.host, device)
        assert lab.sockets.send([(lab.path(ip), b"x%d" % n) for n in range(40)]) == []
        sources = {lab.server.recvfrom(99)[1] for _ in range(40)}
        assert sources == {(ip, lab.sockets.port)}
        assert counted(lab.host, device) >= before + 40
        lab.server.sendto(b"back", lab.path(ip).local)
        with socket.socket(fileno=os.dup(lab.socket(ip).fileno())) as raw:
            raw.settimeout(2)
            assert raw.recvfrom(9) == (b"back", lab.server.getsockname())


def test_privileged_options(lab: Lab) -> None:
    raw = lab.socket("192.0.2.1")._socket
    assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == SOCKET_MARK
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        assert raw.getsockopt(socket.SOL_SOCKET, option) == 2 * SOCKET_BUFFER  # socket(7): doubled


def test_without_a_route_there_is_no_binding_and_back_again(lab: Lab) -> None:
    kept = lab.socket("192.0.2.1")
    lab.host.batch("route del default metric 200", "route del 192.0.2.0/24 dev uplink1")
    lab.sync()
    assert lab.socket("192.0.2.1") is kept
    assert kept.interface == ""
    # Now by the other uplink, as the kernel's routes say.
    before = counted(lab.host, "uplink2")
    assert lab.sockets.send([(lab.path("192.0.2.1"), b"x")]) == []
    assert lab.server.recvfrom(99)[1] == ("192.0.2.1", lab.sockets.port)
    assert counted(lab.host, "uplink2") > before
    lab.host.batch("route add 192.0.2.0/24 dev uplink1")
    lab.sync()
    assert kept.interface == "uplink1"


def test_an_address_that_moves_to_another_device_keeps_its_socket(lab: Lab) -> None:
    kept = lab.socket("192.0.2.1")
    lab.host.batch("addr del 192.0.2.1/24 dev uplink1", "addr add 192.0.2.1/24 dev uplink2")
    lab.sync()
    assert lab.socket("192.0.2.1") is kept
    assert kept.interface == "uplink2"


def test_what_goes_wrong_is_told_of_the_path(lab: Lab) -> None:
    one, two = lab.path("192.0.2.1"), lab.path("198.51.100.1")
    large = bytes(1500 - 20 - 8 + 1)  # DF is set: IPv4 and UDP headers leave 1,472 of the MTU
    assert lab.sockets.send([(one, large), (one, large), (one, large[1:])]) == [
        (one, errno.EMSGSIZE)
    ]
    assert len(lab.server.recv(2000)) == 1472
    lab.host.batch("link set uplink1 down")  # the kernel's word has not reached the sockets yet
    assert [path for path, _ in lab.sockets.send([(one, b"x"), (two, b"y")])] == [one]
    assert lab.server.recv(99) == b"y"
    lab.sync()
    assert lab.sockets.send([(one, b"x")]) == [(one, errno.EADDRNOTAVAIL)]
