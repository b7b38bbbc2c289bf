"""Sockets on loopback addresses: 127.0.0.0/8 is all ours, on every machine."""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network

import pytest

from tunnel.errors import LocalError
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.shell import udp
from tunnel.shell.udp import UdpSocket, UdpSockets, device_for, pack, unpack


def network(*ips: str) -> LocalNetwork:
    """These addresses on lo, without routes, so that no socket is bound to a device."""
    return LocalNetwork(tuple(LocalAddress(ip, "lo") for ip in ips))


class Watched:
    """Sockets and what was reported of them."""

    def __init__(self, port: int = 0) -> None:
        self.open: dict[str, UdpSocket] = {}
        self.sockets = UdpSockets(port, self._opened, self._closing)

    def _opened(self, socket: UdpSocket) -> None:
        self.open[socket.local.host] = socket

    def _closing(self, socket: UdpSocket) -> None:
        assert socket.fileno() >= 0  # still open: a loop can stop watching it
        del self.open[socket.local.host]


@pytest.fixture
def make() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def factory(port: int = 0) -> Watched:
        made.append(Watched(port))
        return made[-1]

    yield factory
    for watched in made:
        watched.sockets.close()


Make = Callable[..., Watched]


def receive(udp: UdpSocket) -> tuple[bytes, PathKey]:
    """The next datagram, as the engine would read it."""
    with socket.socket(fileno=os.dup(udp.fileno())) as raw:
        raw.settimeout(1)
        data, remote = raw.recvfrom(65_535)
        return data, PathKey(udp.local, Address(*remote[:2]))


@pytest.mark.parametrize("ip", ["127.0.0.1", "203.0.113.7", "::1", "2001:db8::8:800:200c:417a"])
def test_addresses_as_the_kernel_has_them(ip: str) -> None:
    address = Address(ip, 4117)
    packed = pack(address)
    assert len(packed) == (28 if ":" in ip else 16)
    assert int.from_bytes(packed[:2], sys.byteorder) == (
        socket.AF_INET6 if ":" in ip else socket.AF_INET
    )
    assert packed[2:4] == (4117).to_bytes(2, "big")
    assert ip_address(ip).packed in packed
    assert unpack(packed) == address
    assert unpack(packed.ljust(128, b"\0")) == address  # a sockaddr_storage


def test_one_port_for_all_addresses_which_stays(make: Make) -> None:
    watched = make()
    assert watched.sockets.port == 0
    watched.sockets.sync(network())
    assert watched.sockets.port == 0
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2", "::1"))
    port = watched.sockets.port
    assert port
    assert {s.local for s in watched.sockets} == {
        Address("127.0.0.1", port),
        Address("127.0.0.2", port),
        Address("::1", port),
    }
    watched.sockets.sync(network())
    assert watched.open == {}
    watched.sockets.sync(network("127.0.0.3"))
    assert watched.sockets.port == port
    assert watched.open["127.0.0.3"].local == Address("127.0.0.3", port)


def test_sync_keeps_what_stays_and_closes_what_is_gone(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    kept = watched.open["127.0.0.1"]
    gone = watched.open["127.0.0.2"]
    watched.sockets.sync(network("127.0.0.1", "127.0.0.3"))
    assert watched.open["127.0.0.1"] is kept
    assert set(watched.open) == {"127.0.0.1", "127.0.0.3"}
    assert gone.fileno() == -1


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_datagrams_leave_in_order_by_the_socket_of_their_path(make: Make, ip: str) -> None:
    watched = make()
    watched.sockets.sync(network(ip, "127.0.0.2"))
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as other:
        other.bind((ip, 0))
        other.settimeout(1)
        local = watched.open[ip].local
        path = PathKey(local, Address(ip, other.getsockname()[1]))
        batch = [b"a", bytes(1200), bytes(1200), b"", b"b"]
        assert watched.sockets.send([(path, data) for data in batch]) == []
        got = [other.recvfrom(2000) for _ in batch]
        assert [data for data, _ in got] == batch
        assert {Address(*source[:2]) for _, source in got} == {local}
        other.sendto(b"back", local)
        assert receive(watched.open[ip]) == (b"back", path)


def test_a_failed_send_is_a_fact_about_its_path(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    local, good = watched.open["127.0.0.1"].local, watched.open["127.0.0.2"].local
    # Off loopback nothing can be sent from 127.0.0.1 (ip_route_output_key: EINVAL).
    bad = PathKey(local, Address("192.0.2.1", 9))
    gone = PathKey(Address("127.0.0.9", local.port), good)
    stale = PathKey(Address("127.0.0.1", local.port - 1), good)
    failures = watched.sockets.send(
        [(bad, b"x"), (bad, b"x"), (gone, b"x"), (PathKey(local, good), b"y"), (stale, b"x")]
    )
    assert [path for path, _ in failures] == [bad, gone, stale]
    assert dict(failures)[gone] == errno.EADDRNOTAVAIL
    assert dict(failures)[stale] == errno.EADDRNOTAVAIL
    assert watched.sockets.refused == 4
    assert receive(watched.open["127.0.0.2"]) == (b"y", PathKey(good, local))


def test_too_large_is_told_and_the_rest_goes(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    path = PathKey(watched.open["127.0.0.1"].local, watched.open["127.0.0.2"].local)
    assert watched.sockets.send([(path, bytes(70_000)), (path, b"y")]) == [(path, errno.EMSGSIZE)]
    assert receive(watched.open["127.0.0.2"])[0] == b"y"


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_queue_drops_and_counts(
    make: Make, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1"))
    path = PathKey(watched.open["127.0.0.1"].local, Address("127.0.0.1", 9))
    monkeypatch.setattr(UdpSocket, "send", lambda self, remote, data: code)
    assert watched.sockets.send([(path, b"x")] * 3) == []
    assert watched.sockets.dropped == 3
    assert watched.sockets.refused == 0


def test_options(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "::1"))
    for ip, level, option in (
        ("127.0.0.1", socket.IPPROTO_IP, 10),  # IP_MTU_DISCOVER
        ("::1", socket.IPPROTO_IPV6, 23),  # IPV6_MTU_DISCOVER
    ):
        raw = watched.open[ip]._socket
        assert raw.getsockopt(level, option) == 3  # IP_PMTUDISC_PROBE
        assert not raw.getblocking()
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 212_992  # the default
        assert raw.getsockopt(socket.SOL_UDP, 104) == 1  # UDP_GRO
    v6 = watched.open["::1"]._socket
    assert v6.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_configured_port_in_use_is_an_error_that_names_it(make: Make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner:
        owner.bind(("0.0.0.0", 0))
        port = owner.getsockname()[1]
        with pytest.raises(LocalError, match=rf"port {port} .* 127\.0\.0\.1; .*ss -lunp"):
            make(port).sockets.sync(network("127.0.0.1"))


def test_later_a_port_in_use_costs_that_address_only(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner:
        owner.bind(("127.0.0.2", watched.sockets.port))
        wanted = network("127.0.0.1", "127.0.0.2")
        watched.sockets.sync(wanted)
        assert watched.sockets.incomplete
        assert watched.sockets.usable(wanted) == network("127.0.0.1")
    watched.sockets.sync(wanted)
    assert watched.sockets.usable(wanted) is wanted
    assert set(watched.open) == {"127.0.0.1", "127.0.0.2"}


def test_an_address_that_is_not_there_any_more_is_left_out(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("192.0.2.77", "127.0.0.1"))
    assert set(watched.open) == {"127.0.0.1"}
    assert watched.sockets.incomplete
    watched.sockets.sync(network("127.0.0.1"))
    assert not watched.sockets.incomplete


def test_an_ephemeral_port_is_one_that_is_free_everywhere(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first port found on 127.0.0.1 is taken on 127.0.0.2: another one is tried."""
    real = UdpSocket
    tried: list[int] = []

    def pick(ip: str, port: int, interface: str) -> UdpSocket:
        if ip == "127.0.0.2":
            tried.append(port)
            if len(tried) == 1:
                raise OSError(errno.EADDRINUSE, "in use")
        return real(ip, port, interface)

    monkeypatch.setattr(udp, "UdpSocket", pick)
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    assert len(tried) == 2
    assert watched.sockets.port == tried[1]
    assert len(watched.open) == 2


@pytest.mark.parametrize("port", [0, 1])
def test_a_socket_that_cannot_be_watched_is_not_kept(port: int) -> None:
    """The engine has no descriptor left for it: it is closed, left out, and tried again."""
    if port:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    made: list[UdpSocket] = []
    gone: list[UdpSocket] = []

    def opened(udp: UdpSocket) -> None:
        made.append(udp)
        if len(made) == 2:
            raise OSError("no descriptors left")

    sockets = UdpSockets(port, opened, gone.append)
    wanted = network("127.0.0.1", "127.0.0.2", "127.0.0.3")
    sockets.sync(wanted)
    assert sockets.incomplete
    assert sockets.usable(wanted) == network("127.0.0.1", "127.0.0.3")
    assert made[1].fileno() == -1
    sockets.sync(wanted)
    assert sockets.usable(wanted) == wanted
    assert len({udp.local.port for udp in sockets}) == 1
    sockets.close()
    assert made[1] not in gone


V4, V6 = ip_network("0.0.0.0/0"), ip_network("fd00::/64")


@pytest.mark.parametrize(
    ("addresses", "routes", "device"),
    [
        ([("192.0.2.1", "eth0")], [(V4, "eth0")], "eth0"),
        ([("192.0.2.1", "eth0")], [], ""),  # no route: the kernel would take all for on-link
        ([("192.0.2.1", "eth0")], [(V4, "eth1")], ""),
        ([("192.0.2.1", "eth0")], [(V6, "eth0")], ""),  # a route of the other family
        ([("192.0.2.1", "eth0"), ("192.0.2.1", "eth1")], [(V4, "eth0")], ""),  # two owners
    ],
)
def test_device_for(
    addresses: list[tuple[str, str]], routes: list[tuple[object, str]], device: str
) -> None:
    known = LocalNetwork(
        tuple(LocalAddress(*each) for each in addresses),
        tuple(Route(net, name, 0) for net, name in routes),  # type: ignore[arg-type]
    )
    assert device_for("192.0.2.1", known) == device


@pytest.mark.parametrize("many", [True, False])
def test_further_sockets_and_what_is_said_of_them(
    monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    said: list[tuple[str, str]] = []

    class Recorder:
        def __getattr__(self, level: str) -> Callable[..., None]:
            return lambda event, **fields: said.append((level, event))

    sockets = UdpSockets(0, lambda opened: None, lambda closed: None)
    sockets.sync(network("127.0.0.1"))
    monkeypatch.setattr(udp, "_log", Recorder())
    local = sockets.open_extra("127.0.0.1", many=many)
    assert local is not None and local in {each.local for each in sockets}
    sockets.close_extra(local)
    sockets.close_extra(local)  # again: nothing
    assert local not in {each.local for each in sockets}
    level = "debug" if many else "info"
    assert said == [(level, "socket opened"), (level, "socket closed")]
    assert sockets.open_extra("127.0.0.9", many=many) is None
    sockets.close()
