"""What of the kernel's state a tunnel may use; and that this kernel's own is read at all."""

import errno
import struct
from ipaddress import ip_network
from typing import Any

import pytest

from tun.linux import ALIAS
from tunnel.path.network import LocalAddress, LocalNetwork, Route
from tunnel.shell import netmon
from tunnel.shell.netmon import Hop, InterfaceAddress, Link, Netlink, select

UP = 0x1 | 0x40 | 0x10000  # IFF_UP, IFF_RUNNING, IFF_LOWER_UP
V4_DEFAULT = ip_network("0.0.0.0/0")


def nobody(name: str) -> bool:
    return False


def test_select_joins_addresses_and_routes_with_their_links() -> None:
    assert select(
        [Link(2, "eth0", True), Link(3, "eth1", False), Link(4, "docker0", True)],
        [
            InterfaceAddress("192.0.2.1", 2, True),
            InterfaceAddress("2001:db8::1", 2, False),
            InterfaceAddress("192.0.2.2", 3, True),
            InterfaceAddress("172.17.0.1", 4, True),
            InterfaceAddress("192.0.2.9", 9, True),  # its link came after the links were read
        ],
        [
            Hop(V4_DEFAULT, 2, 100, True, "192.0.2.254"),
            Hop(V4_DEFAULT, 2, 200, False),
            Hop(V4_DEFAULT, 3, 50, True),
            Hop(ip_network("172.17.0.0/16"), 4, 0, True),
        ],
        lambda name: name == "docker0",
    ) == LocalNetwork(
        (LocalAddress("192.0.2.1", "eth0"),), (Route(V4_DEFAULT, "eth0", 100, "192.0.2.254"),)
    )


class Message(dict[str, Any]):
    """A decoded message of pyroute2, as far as it is read."""

    def __init__(self, fields: dict[str, Any], **attributes: Any) -> None:
        super().__init__(fields)
        self._attributes = attributes

    def get_attr(self, name: str) -> Any:
        return self._attributes.get(name)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next decoded message the given one; remembers nothing."""
    current: list[Message] = []
    monkeypatch.setattr(netmon, "_decoded", lambda kind, raw: current[0])

    def decode(parse: Any, message: Message) -> Any:
        current[:] = [message]
        return parse.__wrapped__(b"")

    return decode


@pytest.mark.parametrize(
    ("flags", "alias", "usable"),
    [
        (UP, None, True),
        (UP | 0x8, None, False),  # loopback
        (UP & ~0x10000, None, False),  # no carrier
        (UP & ~0x40, None, False),  # dormant: Wi-Fi that is not associated yet
        (0x10000, None, False),  # not up
        (UP, ALIAS, False),  # a tunnel of ours
        (UP, "office", True),
    ],
)
def test_links(decoding: Any, flags: int, alias: str | None, usable: bool) -> None:
    message = Message({"index": 2, "flags": flags}, IFLA_IFNAME="eth0", IFLA_IFALIAS=alias)
    assert decoding(netmon._link, message) == Link(2, "eth0", usable)


@pytest.mark.parametrize(
    ("ip", "flags", "usable"),
    [
        ("192.0.2.1", 0x80, True),
        ("2001:db8::1", 0x80, True),
        ("fd00::1", 0x01, True),  # temporary (RFC 8981)
        ("2001:db8::1", 0x40, False),  # tentative
        ("2001:db8::1", 0x44, True),  # tentative, but optimistic (RFC 4429)
        ("2001:db8::1", 0x08, False),  # duplicate address detected
        ("2001:db8::1", 0x20, False),  # deprecated
        ("fe80::1", 0x80, False),
        ("169.254.3.4", 0x80, False),
        ("127.0.0.1", 0x80, False),
        ("::1", 0x80, False),
    ],
)
def test_addresses(decoding: Any, ip: str, flags: int, usable: bool) -> None:
    message = Message({"index": 2, "flags": 0}, IFA_ADDRESS=ip, IFA_FLAGS=flags)
    assert decoding(netmon._address, message) == InterfaceAddress(ip, 2, usable)


def test_on_a_point_to_point_link_the_local_address_counts(decoding: Any) -> None:
    message = Message({"index": 2, "flags": 0x80}, IFA_ADDRESS="192.0.2.2", IFA_LOCAL="192.0.2.1")
    assert decoding(netmon._address, message).ip == "192.0.2.1"


def route(**fields: Any) -> dict[str, Any]:
    return {"family": 2, "dst_len": 0, "table": 254, "type": 1, "flags": 0, **fields}


def test_routes(decoding: Any) -> None:
    def hops(message: Message) -> Any:
        return decoding(netmon._route, message)

    assert hops(Message(route(), RTA_OIF=2, RTA_PRIORITY=100)) == (Hop(V4_DEFAULT, 2, 100, True),)
    assert hops(Message(route(flags=0x10), RTA_OIF=2)) == (Hop(V4_DEFAULT, 2, 0, False),)
    assert hops(Message(route(table=255), RTA_OIF=2)) == ()
    assert hops(Message(route(table=252), RTA_TABLE=1000, RTA_OIF=2)) == ()
    assert hops(Message(route(type=7), RTA_OIF=1)) == ()  # unreachable
    assert hops(Message(route(flags=0x200), RTA_OIF=2)) == ()  # a cache entry
    assert hops(Message(route(family=128), RTA_OIF=2)) == ()
    assert hops(Message(route(family=10, dst_len=64), RTA_DST="fe80::", RTA_OIF=2)) == ()
    connected = Message(route(family=10, dst_len=64), RTA_DST="fd00::", RTA_OIF=2, RTA_PRIORITY=256)
    assert hops(connected) == (Hop(ip_network("fd00::/64"), 2, 256, True),)


def test_a_route_of_several_hops(decoding: Any) -> None:
    ways = [
        Message({"oif": 2, "flags": 0}, RTA_GATEWAY="192.0.2.254"),
        Message({"oif": 3, "flags": 0x1}),
    ]
    assert decoding(netmon._route, Message(route(), RTA_MULTIPATH=ways)) == (
        Hop(V4_DEFAULT, 2, 0, True, "192.0.2.254"),
        Hop(V4_DEFAULT, 3, 0, False),
    )


def test_gateways(decoding: Any) -> None:
    def gateway(**attributes: Any) -> str:
        (hop,) = decoding(netmon._route, Message(route(), RTA_OIF=2, **attributes))
        return str(hop.gateway)

    assert gateway() == ""
    assert gateway(RTA_GATEWAY="192.0.2.254") == "192.0.2.254"
    assert gateway(RTA_VIA={"family": 10, "addr": "fe80::1"}) == "fe80::1"


def test_messages_are_split_and_made_comparable() -> None:
    def message(kind: int, sequence: int, body: bytes) -> bytes:
        padding = bytes(-len(body) % 4)
        return struct.pack("=IHHII", 16 + len(body), kind, 2, sequence, 4117) + body + padding

    data = message(16, 7, b"abcde") + message(1, 7, b"") + message(3, 7, bytes(4))
    assert list(netmon._messages(data)) == [
        (16, 2, 7, struct.pack("=IHHII", 21, 16, 2, 0, 0) + b"abcde"),
        (3, 2, 7, struct.pack("=IHHII", 20, 3, 2, 0, 0) + bytes(4)),
    ]
    assert list(netmon._messages(bytes(32))) == []  # a length that leads nowhere ends it


def test_this_kernel_answers() -> None:
    monitor = Netlink("mt0")
    try:
        first = monitor.snapshot()
        assert monitor.snapshot() == first
        assert all(address.interface != "lo" for address in first.addresses)
        monitor.acknowledge()  # nothing to read is fine
    finally:
        monitor.close()


def test_exclusion_by_pattern_and_of_our_own() -> None:
    monitor = Netlink("mt0", ["wwan*"])
    try:
        names = ("mt0", "mt1", "wwan0", "docker0", "br-1234", "virbr0", "veth12", "br0", "eth0")
        excluded = [name for name in names if monitor._excluded(name)]
        assert excluded == ["mt0", "wwan0", "docker0", "br-1234", "virbr0"]
    finally:
        monitor.close()


def test_an_overrun_doorbell_is_just_a_ring() -> None:
    class Overrun:
        def __init__(self) -> None:
            self.answers = [OSError(errno.ENOBUFS, "overrun"), OSError(errno.EIO, "broken")]

        def recv(self, size: int) -> bytes:
            raise self.answers.pop(0)

        def close(self) -> None: ...

    monitor = Netlink("mt0")
    monitor._doorbell.close()
    monitor._doorbell = Overrun()  # type: ignore[assignment]
    monitor.acknowledge()
    with pytest.raises(OSError, match="broken"):
        monitor.acknowledge()
    monitor.close()


def test_an_error_of_the_kernel_is_raised() -> None:
    monitor = Netlink("mt0")
    try:
        with pytest.raises(OSError):
            monitor._dump(18, b"\xff" * 3)  # too short for a strictly checked request
        assert monitor.snapshot() is not None  # and the next one works
    finally:
        monitor.close()
