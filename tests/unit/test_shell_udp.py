"""Sockets on loopback addresses: 127.0.0.0/8 is all ours, on every machine."""

import errno
import select
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_network

import pytest

from tunnel.errors import LocalError
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.shell import udp
from tunnel.shell.udp import UdpSocket, UdpSockets, device_for


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


def receive(socket: UdpSocket, limit: int = 64) -> list[tuple[bytes, PathKey]]:
    assert select.select([socket.fileno()], [], [], 1)[0]
    return socket.receive(limit)


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
def test_datagrams_arrive_with_their_path(make: Make, ip: str) -> None:
    watched = make()
    watched.sockets.sync(network(ip))
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as other:
        other.bind((ip, 0))
        local = watched.open[ip].local
        remote = Address(ip, other.getsockname()[1])
        for data in (b"a", b"b", b""):
            other.sendto(data, local)
        path = PathKey(local, remote)
        got = receive(watched.open[ip])
        assert got == [(b"a", path), (b"b", path), (b"", path)]
        assert got[0][1] is got[1][1]  # cached
        assert watched.open[ip].receive(64) == []
        assert watched.sockets.send([(path, b"c"), (path, b"d")]) == []
        assert [other.recv(9), other.recv(9)] == [b"c", b"d"]


def test_a_batch_is_received_in_order_whatever_its_sizes(make: Make) -> None:
    """Long runs of equal sizes, short ends, size changes and a change of path."""
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2", "127.0.0.3"))
    a, b, c = (watched.open[f"127.0.0.{i}"].local for i in (1, 2, 3))
    sizes = [1200] * 100 + [300] + [1200] * 3 + [1400, 1200, 1300] + [0, 1] + [65000] * 2
    batch = [(PathKey(a, b), bytes([i % 256]) * size) for i, size in enumerate(sizes)]
    batch[50:50] = [(PathKey(a, c), b"elsewhere")]
    assert watched.sockets.send(batch) == []
    got: list[bytes] = []
    while len(got) < len(sizes):
        got += [data for data, _ in receive(watched.open["127.0.0.2"])]
    assert got == [data for path, data in batch if path.remote == b]
    assert receive(watched.open["127.0.0.3"]) == [(b"elsewhere", PathKey(c, a))]


def test_receive_stops_near_its_limit(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    path = PathKey(watched.open["127.0.0.1"].local, watched.open["127.0.0.2"].local)
    for i in range(20):  # one by one: a segmented message would come as a whole
        watched.sockets.send([(path, bytes([i]))])
    assert len(receive(watched.open["127.0.0.2"], 8)) == 8


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
    assert receive(watched.open["127.0.0.2"]) == [(b"y", PathKey(good, local))]


def test_too_large_is_told_and_the_rest_of_the_run_goes(make: Make) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    path = PathKey(watched.open["127.0.0.1"].local, watched.open["127.0.0.2"].local)
    assert watched.sockets.send([(path, bytes(70_000)), (path, b"y")]) == [(path, errno.EMSGSIZE)]
    assert receive(watched.open["127.0.0.2"])[0][0] == b"y"


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_queue_drops_and_counts(
    make: Make, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1"))
    path = PathKey(watched.open["127.0.0.1"].local, Address("127.0.0.1", 9))
    monkeypatch.setattr(UdpSocket, "send_run", lambda self, remote, run: (1, code))
    assert watched.sockets.send([(path, b"x")] * 3) == []
    assert watched.sockets.dropped == 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_where_segmentation_is_refused_datagrams_go_one_by_one(make: Make, code: int) -> None:
    watched = make()
    watched.sockets.sync(network("127.0.0.1", "127.0.0.2"))
    sender = watched.open["127.0.0.1"]
    attempts = 0

    class NoSegments:
        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.sendto = real.sendto
            self.fileno = real.fileno
            self.close = real.close

        def sendmsg(self, *_: object) -> int:
            nonlocal attempts
            attempts += 1
            raise OSError(code, "no")

    sender._socket = NoSegments(sender._socket)  # type: ignore[assignment]
    path = PathKey(sender.local, watched.open["127.0.0.2"].local)
    for _ in range(2):
        assert watched.sockets.send([(path, b"aa"), (path, b"bb")]) == []
        assert len(receive(watched.open["127.0.0.2"])) == 2
    # EIO is the device's word for good; EINVAL was about this message.
    assert attempts == (1 if code == errno.EIO else 2)


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


def test_strangers_do_not_grow_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "_KNOWN_REMOTES", 3)
    watched = make()
    watched.sockets.sync(network("127.0.0.1"))
    mine = watched.open["127.0.0.1"]
    for _ in range(10):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(b"x", mine.local)
            assert len(receive(mine)) == 1
    assert len(mine._paths) <= 3


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
