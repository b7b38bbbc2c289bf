"""Addresses, and which local address may reach a remote one."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.path.network import (
    Address,
    LocalAddress,
    LocalNetwork,
    PathKey,
    Route,
    canonical_ip,
    is_usable_remote,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1:4117", Address("192.0.2.1", 4117)),
        ("[2001:DB8:0::1]:1", Address("2001:db8::1", 1)),
        ("[::1]:65535", Address("::1", 65535)),
    ],
)
def test_parse(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "192.0.2.1",
        "192.0.2.1:",
        "192.0.2.1:0",
        "192.0.2.1:65536",
        "192.0.2.1:+1",
        "192.0.2.1:\uff11",
        "192.0.2.1:000001",
        "[192.0.2.1]:1",
        "192.0.2:1",
        "2001:db8::1:1",
        "[2001:db8::1]",
        "[fe80::1%eth0]:1",
        "host:1",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Address.parse(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_round_trip(ip: object, port: int) -> None:
    address = Address(str(ip), port)
    assert Address.parse(str(address)) == address
    assert address.is_ipv6 == (":" in str(ip))


def test_from_sockaddr() -> None:
    assert Address.from_sockaddr(("192.0.2.1", 1)) == Address("192.0.2.1", 1)
    assert Address.from_sockaddr(("2001:db8:0::1", 1, 0, 0)) == Address("2001:db8::1", 1)
    assert Address.from_sockaddr(("fe80::1%eth0", 1, 0, 2)) == Address("fe80::1", 1)


def test_path_key_names_itself_as_the_ledger_does() -> None:
    key = PathKey(Address("192.0.2.1", 1), Address("2001:db8::1", 2))
    assert str(key) == "192.0.2.1:1>[2001:db8::1]:2"
    assert f"{key}" == str(key)


def test_canonical_ip() -> None:
    assert canonical_ip("2001:0DB8:0:0::1") == "2001:db8::1"
    with pytest.raises(ValueError, match="scope"):
        canonical_ip("fe80::1%eth0")


@pytest.mark.parametrize(
    "ip",
    ["192.0.2.1", "10.0.0.1", "100.64.0.1", "2001:db8::1", "fd00::1", "64:ff9b::c000:201"],
)
def test_usable_remote(ip: str) -> None:
    assert is_usable_remote(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "0.1.2.3",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "169.254.1.1",
        "::",
        "::1",
        "ff02::1",
        "fe80::1",
        "fe80::1%eth0",
        "2001:db8::1%eth0",
        "::ffff:127.0.0.1",
        "::ffff:192.0.2.1",
        "host",
        "",
    ],
)
def test_unusable_remote(ip: str) -> None:
    assert not is_usable_remote(ip)


ETH4 = LocalAddress("192.0.2.10", "eth0")
ETH6 = LocalAddress("2001:db8::10", "eth0")
WLAN4 = LocalAddress("198.51.100.10", "wlan0")
WLAN4B = LocalAddress("198.51.100.11", "wlan0")
WWAN4 = LocalAddress("100.64.0.10", "wwan0")
NETWORK = LocalNetwork(
    addresses=(WWAN4, WLAN4, WLAN4B, ETH4, ETH6),
    routes=(
        Route(ip_network("0.0.0.0/0"), "wlan0", 600),
        Route(ip_network("0.0.0.0/0"), "eth0", 100),
        Route(ip_network("192.0.2.0/24"), "eth0", 100),
        Route(ip_network("198.51.100.0/24"), "wlan0", 600),
        Route(ip_network("100.64.0.0/10"), "wwan0", 700),
        Route(ip_network("::/0"), "eth0", 1024),
        Route(ip_network("::/0"), "wlan0", 1),
    ),
)


@pytest.mark.parametrize(
    ("remote", "sources"),
    [
        ("203.0.113.1", [ETH4, WLAN4, WLAN4B]),  # two default routes: the lower metric first
        ("198.51.100.1", [WLAN4, WLAN4B, ETH4]),  # the longer prefix beats the metric
        ("100.64.0.1", [WWAN4, ETH4, WLAN4, WLAN4B]),
        ("2001:db8:1::1", [ETH6]),  # wlan0 has a route, but no address of this family
    ],
)
def test_sources(remote: str, sources: list[LocalAddress]) -> None:
    assert NETWORK.sources(remote) == sources


def test_no_route_no_source() -> None:
    assert LocalNetwork().sources("192.0.2.1") == []
    assert LocalNetwork(addresses=(ETH4,)).sources("192.0.2.1") == []


def test_best_of_several_routes_counts() -> None:
    routes = tuple(
        Route(ip_network("0.0.0.0/0"), interface, metric)
        for interface, metric in [("eth0", 900), ("eth0", 100), ("eth0", 800), ("wlan0", 500)]
    )
    assert LocalNetwork((WLAN4, ETH4), routes).sources("203.0.113.1") == [ETH4, WLAN4]


def test_equal_routes_have_equal_places() -> None:
    assert NETWORK.places("203.0.113.1") == {ETH4.ip: 0, WLAN4.ip: 1, WLAN4B.ip: 1}
    equal = tuple(Route(ip_network("0.0.0.0/0"), interface, 100) for interface in ("eth0", "wlan0"))
    places = LocalNetwork((WLAN4, ETH4), equal).places("203.0.113.1")
    assert places == {WLAN4.ip: 0, ETH4.ip: 0}
