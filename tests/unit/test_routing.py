"""Longest prefix out, source check in."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import PeerConfig
from tunnel.identity import PublicKey
from tunnel.routing import AllowedIPs


def ipv4(source: str, destination: str, payload: bytes = b"payload", options: int = 0) -> bytes:
    """An IPv4 packet with `options` 32-bit words of options."""
    header = bytearray(20 + 4 * options)
    header[0] = 0x45 + options
    header[2:4] = (len(header) + len(payload)).to_bytes(2)
    header[12:16] = ip_address(source).packed
    header[16:20] = ip_address(destination).packed
    return bytes(header) + payload


def ipv6(source: str, destination: str, payload: bytes = b"payload") -> bytes:
    header = bytearray(40)
    header[0] = 0x60
    header[4:6] = len(payload).to_bytes(2)
    header[8:24] = ip_address(source).packed
    header[24:40] = ip_address(destination).packed
    return bytes(header) + payload


TABLE = AllowedIPs(
    {
        "office": [ip_network("10.88.0.0/24"), ip_network("fd88::/64")],
        "phone": [ip_network("10.88.0.7/32"), ip_network("fd88::7/128")],
    }
)


@pytest.mark.parametrize(
    ("packet", "peer"),
    [
        (ipv4("192.0.2.1", "10.88.0.1"), "office"),
        (ipv4("192.0.2.1", "10.88.0.7"), "phone"),
        (ipv4("10.88.0.7", "10.88.1.7"), None),
        (ipv4("10.88.0.7", "224.0.0.1"), None),
        (ipv6("2001:db8::1", "fd88::1"), "office"),
        (ipv6("2001:db8::1", "fd88::7"), "phone"),
        (ipv6("fd88::7", "fd88:0:0:1::7"), None),
        (b"", None),
        (ipv4("192.0.2.1", "10.88.0.1")[:19], None),
        (ipv6("2001:db8::1", "fd88::1")[:39], None),
        (b"\x55" + ipv4("192.0.2.1", "10.88.0.1")[1:], None),
    ],
)
def test_lookup(packet: bytes, peer: str | None) -> None:
    assert TABLE.lookup(packet) == peer
    assert TABLE.lookup(packet) == peer  # and again, from the cache


@pytest.mark.parametrize(
    ("peer", "packet", "permitted"),
    [
        ("office", ipv4("10.88.0.1", "192.0.2.1"), True),
        ("office", ipv4("10.88.0.7", "192.0.2.1"), False),  # the phone's, though inside the /24
        ("phone", ipv4("10.88.0.7", "192.0.2.1"), True),
        ("phone", ipv4("10.88.0.1", "192.0.2.1"), False),
        ("phone", ipv4("192.0.2.1", "10.88.0.7"), False),
        ("stranger", ipv4("10.88.0.7", "192.0.2.1"), False),
        ("office", ipv6("fd88::1", "2001:db8::1"), True),
        ("office", ipv6("fd88::7", "2001:db8::1"), False),
        ("phone", ipv6("fd88::7", "2001:db8::1"), True),
        ("office", ipv4("10.88.0.1", "192.0.2.1", b""), True),
        ("office", ipv6("fd88::1", "2001:db8::1", b""), True),
        ("office", ipv4("10.88.0.1", "192.0.2.1", options=10), True),
    ],
)
def test_permits(peer: str, packet: bytes, permitted: bool) -> None:
    assert TABLE.permits(peer, packet) is permitted


GOOD4 = ipv4("10.88.0.1", "192.0.2.1")
GOOD6 = ipv6("fd88::1", "2001:db8::1")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        GOOD4[:19],
        GOOD4[:-1],
        GOOD4 + b"\x00",
        b"\x44" + GOOD4[1:],  # a header of 16 bytes
        b"\x4f" + GOOD4[1:],  # a header longer than the packet
        b"\x05" + GOOD4[1:],
        b"\x75" + GOOD4[1:],
        GOOD6[:39],
        GOOD6[:-1],
        GOOD6 + b"\x00",
        b"\x45" + GOOD6[1:],
    ],
)
def test_malformed_is_never_permitted(packet: bytes) -> None:
    assert not TABLE.permits("office", packet)


def test_from_peers() -> None:
    peers = [
        PeerConfig(
            name=name, public_key=PublicKey(name.encode() * 32), allowed_ips=(ip_network(network),)
        )
        for name, network in [("a", "10.0.0.0/8"), ("b", "10.1.0.0/16")]
    ]
    table = AllowedIPs.from_peers(peers)
    assert table.lookup(ipv4("192.0.2.1", "10.1.2.3")) == "b"
    assert table.lookup(ipv4("192.0.2.1", "10.2.2.3")) == "a"


def test_one_network_of_two_peers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both a and b claim 10\.0\.0\.0/8"):
        AllowedIPs({"a": [ip_network("10.0.0.0/8")], "b": [ip_network("10.0.0.0/8")]})


def test_default_route_works_here() -> None:
    table = AllowedIPs({"exit": [ip_network("0.0.0.0/0")], "a": [ip_network("10.0.0.0/8")]})
    assert table.owner(ip_address("8.8.8.8").packed) == "exit"
    assert table.owner(ip_address("10.0.0.1").packed) == "a"
    assert table.owner(ip_address("::1").packed) is None


def test_cache_is_bounded() -> None:
    for number in range(20_000):
        TABLE.owner(number.to_bytes(4))
    assert len(TABLE._cache) <= 8192


networks4 = st.builds(
    lambda value, length: IPv4Network((value, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
networks6 = st.builds(
    lambda value, length: IPv6Network((value, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)


@given(st.lists(networks4 | networks6, max_size=20, unique=True), st.data())
def test_same_as_trying_every_network(
    networks: list[IPv4Network | IPv6Network], data: st.DataObject
) -> None:
    table = AllowedIPs({str(network): [network] for network in networks})
    candidates = [st.ip_addresses()]
    candidates += [st.just(network.network_address) for network in networks]
    candidates += [st.just(network.broadcast_address) for network in networks]
    address = data.draw(st.one_of(candidates))
    covering = [n for n in networks if n.version == address.version and address in n]
    best = max(covering, key=lambda network: network.prefixlen, default=None)
    assert table.owner(address.packed) == (None if best is None else str(best))


@given(st.binary(max_size=80))
def test_arbitrary_bytes_never_raise(packet: bytes) -> None:
    TABLE.lookup(packet)
    TABLE.permits("office", packet)
