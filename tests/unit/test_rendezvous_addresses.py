"""Addresses for hosts that nobody has given any."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.rendezvous.addresses import INNER_NETWORK, inner_address, next_free

NETWORK = IPv4Network("10.88.0.0/24")


def test_an_address_stays_what_it_is() -> None:
    """Hosts keep it for good, so it must not change with a version."""
    address = inner_address(bytes(range(32)))
    assert address == IPv6Interface("fd6d:6172:746c:e145:a33a:30ff:251:9bad/128")


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_each_key_has_its_own(one: bytes, other: bytes) -> None:
    address = inner_address(one)
    assert address.ip in INNER_NETWORK
    assert address.network.prefixlen == 128
    assert address.is_private
    assert (address == inner_address(other)) == (one == other)


@pytest.mark.parametrize(
    ("network", "taken", "free"),
    [
        ("10.88.0.0/24", [], "10.88.0.1"),
        ("10.88.0.0/24", ["10.88.0.1"], "10.88.0.2"),
        ("10.88.0.0/24", ["10.88.0.1", "10.88.0.3"], "10.88.0.2"),
        ("10.88.0.0/24", ["192.0.2.1", "10.88.0.0", "10.88.0.255"], "10.88.0.1"),
        ("10.88.0.0/30", ["10.88.0.1"], "10.88.0.2"),
        ("10.88.0.0/30", ["10.88.0.1", "10.88.0.2"], None),
        ("10.88.0.0/31", [], "10.88.0.0"),
        ("10.88.0.0/31", ["10.88.0.0"], "10.88.0.1"),
        ("10.88.0.7/32", [], "10.88.0.7"),
        ("10.88.0.7/32", ["10.88.0.7"], None),
        ("0.0.0.0/0", ["0.0.0.1"], "0.0.0.2"),
    ],
)
def test_the_next_free_one(network: str, taken: list[str], free: str | None) -> None:
    found = next_free(IPv4Network(network), [IPv4Address(each) for each in taken])
    assert found == (None if free is None else IPv4Address(free))


@given(st.sets(st.integers(0, 255)))
def test_the_next_free_one_is_free(used: set[int]) -> None:
    taken = [NETWORK.network_address + number for number in used]
    found = next_free(NETWORK, taken)
    hosts = [host for host in NETWORK.hosts() if host not in taken]
    assert found == (hosts[0] if hosts else None)
