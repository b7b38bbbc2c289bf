"""Which paths to try, and in what order."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.path.selector import best_from, candidates, unique

PORT = 4117
ETH, WLAN = LocalAddress("192.168.1.2", "eth0"), LocalAddress("192.168.2.2", "wlan0")
SIX = LocalAddress("2001:db8::2", "eth0")
EVERYWHERE = ip_network("0.0.0.0/0")
A, B = Address("203.0.113.1", 1), Address("203.0.113.2", 2)
A6 = Address("2001:db8:1::1", 6)


def network(*addresses: LocalAddress, eth: int = 100, wlan: int = 600) -> LocalNetwork:
    routes = (
        Route(EVERYWHERE, "eth0", eth),
        Route(EVERYWHERE, "wlan0", wlan),
        Route(ip_network("::/0"), "eth0", 100),
    )
    return LocalNetwork(addresses, routes)


def path(local: LocalAddress, remote: Address) -> PathKey:
    return PathKey(Address(local.ip, PORT), remote)


def test_every_uplink_once_before_any_twice() -> None:
    assert candidates(network(WLAN, ETH), PORT, [A, B]) == [
        path(ETH, A),
        path(WLAN, A),
        path(ETH, B),
        path(WLAN, B),
    ]


def test_the_order_of_remotes_is_the_users() -> None:
    assert candidates(network(ETH), PORT, [B, A]) == [path(ETH, B), path(ETH, A)]


def test_metrics_decide_between_uplinks() -> None:
    assert candidates(network(ETH, WLAN, wlan=50), PORT, [A])[0] == path(WLAN, A)


def test_families_do_not_mix() -> None:
    assert candidates(network(ETH, SIX), PORT, [A, A6]) == [path(ETH, A), path(SIX, A6)]
    assert candidates(network(SIX), PORT, [A]) == []


def test_a_second_family_is_a_first_pairing() -> None:
    """The first remote of another family comes before a second remote of the first one."""
    found = candidates(network(ETH, SIX), PORT, [A, B, A6])
    assert found == [path(ETH, A), path(SIX, A6), path(ETH, B)]


def test_addresses_nobody_can_be_at_are_left_out() -> None:
    odd = [Address("127.0.0.1", 1), Address("224.0.0.1", 1), Address("169.254.1.1", 1)]
    assert candidates(network(ETH), PORT, [*odd, A]) == [path(ETH, A)]


def test_limited_to_the_best() -> None:
    remotes = [Address(f"203.0.113.{i}", 1) for i in range(1, 40)]
    found = candidates(network(ETH, WLAN), PORT, remotes)
    assert len(found) == 16
    assert found[:2] == [path(ETH, remotes[0]), path(WLAN, remotes[0])]
    assert candidates(network(ETH, WLAN), PORT, remotes, limit=3) == found[:3]


def test_no_uplink_no_path() -> None:
    assert candidates(network(), PORT, [A]) == []
    assert best_from(network(), PORT, [A, B]) is None


def test_the_first_remote_that_can_be_reached() -> None:
    assert best_from(network(WLAN), PORT, [B, A]) == path(WLAN, B)


def test_an_unreachable_remote_is_left_for_the_next() -> None:
    assert best_from(network(ETH), PORT, [A6, B, A]) == path(ETH, B)


def test_from_the_uplink_that_the_kernel_prefers() -> None:
    assert best_from(network(WLAN, ETH), PORT, [A]) == path(ETH, A)
    assert best_from(network(ETH, WLAN, eth=900), PORT, [A]) == path(WLAN, A)


def test_unique_keeps_the_order() -> None:
    assert unique([B, A, B, A]) == [B, A]


addresses = st.lists(
    st.sampled_from([ETH, WLAN, SIX, LocalAddress("10.1.1.1", "ppp0")]), unique=True
)
remotes = st.lists(st.sampled_from([A, B, A6, Address("127.0.0.1", 9)]), unique=True)


@given(addresses, remotes, st.integers(1, 6))
def test_candidates_are_possible_unique_and_limited(
    mine: list[LocalAddress], theirs: list[Address], limit: int
) -> None:
    here = network(*mine)
    found = candidates(here, PORT, theirs, limit=limit)
    assert len(found) == len(set(found)) <= limit
    for key in found:
        assert key.local.port == PORT and key.remote in theirs
        assert key.local.host in {a.ip for a in here.sources(key.remote.host)}
