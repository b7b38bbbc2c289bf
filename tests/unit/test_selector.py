"""Which paths to try, and in what order."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.path.selector import (
    FLAP_MEMORY,
    SETTLE,
    Damper,
    Facts,
    best_from,
    candidates,
    clearly_better,
    order,
    second,
    unique,
    why_before,
)

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


# the order of checked paths


def facts(local: LocalAddress = ETH, **more: Any) -> Facts:
    return Facts(path(local, A), **{"warm": True, "rtt": 0.02, **more})


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        ({"warm": False}, "does not"),
        ({"failed": True}, "dead"),
        ({"relayed": True}, "relayed"),
        ({"metered": True}, "metered"),
        ({"rank": 1}, "routes"),
        ({"rtt": 0.03}, "round trip"),
    ],
)
def test_what_counts_and_in_what_order(worse: dict[str, Any], words: str) -> None:
    good, bad = facts(ETH), facts(WLAN, **worse)
    assert order([bad, good]) == [good, bad]
    assert words in why_before(good, bad)
    assert "THAT" in why_before(good, bad, one="THAT", other="THAT")


def test_each_criterion_counts_more_than_all_behind_it() -> None:
    names: list[tuple[str, Any]] = [
        ("warm", False), ("failed", True), ("relayed", True), ("metered", True), ("rank", 1),
    ]  # fmt: skip
    for place, (name, value) in enumerate(names):
        good = facts(ETH, **dict(names[place + 1 :]), rtt=0.9)
        bad = facts(WLAN, **{name: value}, rtt=0.001)
        assert order([bad, good])[0] is good, name


@pytest.mark.parametrize(
    ("challenger", "active", "moves"),
    [
        ({}, {}, False),
        ({"rtt": 0.019}, {}, False),  # within what varies by itself
        ({"rtt": 0.012}, {}, True),
        ({"rtt": 0.003}, {"rtt": 0.004}, False),  # a quarter, but a millisecond
        ({"rtt": 0.012}, {"rtt_variance": 0.01}, False),  # less than it varies
        ({"relayed": True, "rtt": 0.001}, {}, False),
        ({}, {"relayed": True, "rtt": 0.001}, True),
        ({"metered": True, "rtt": 0.001}, {}, False),
        ({}, {"metered": True, "rtt": 0.001}, True),
        ({"rtt": 0.04}, {"rank": 1}, True),  # preferred, and not much slower
        ({"rtt": 0.2}, {"rank": 1}, False),
        ({"rank": 1, "rtt": 0.01}, {"rtt": 0.06}, False),
        ({"rank": 1, "rtt": 0.01}, {"rtt": 0.2}, True),  # preferred, but far too slow
        ({"loss": 0.3}, {"rtt": 0.1}, False),
        ({}, {"loss": 0.25}, False),  # two checks of eight
        ({}, {"loss": 0.35}, True),
        ({"loss": 0.2}, {"rank": 1}, False),
        ({"warm": False}, {"rtt": 0.1}, False),
        ({"failed": True}, {"rtt": 0.1}, False),
        ({"rtt": None}, {"rank": 1}, True),
    ],
)
def test_a_living_path_is_left_for_a_clearly_better_one_only(
    challenger: dict[str, Any], active: dict[str, Any], moves: bool
) -> None:
    assert (clearly_better(facts(WLAN, **challenger), facts(ETH, **active)) is not None) == moves


PATHS = st.builds(
    Facts,
    key=st.sampled_from([path(ETH, A), path(WLAN, A), path(ETH, B), path(WLAN, B)]),
    warm=st.booleans(),
    relayed=st.booleans(),
    metered=st.booleans(),
    rank=st.integers(0, 3),
    rtt=st.none() | st.floats(0.0001, 2),
    loss=st.floats(0, 1),
    failed=st.booleans(),
)


@given(PATHS, PATHS)
def test_no_two_paths_are_clearly_better_than_each_other(one: Facts, two: Facts) -> None:
    one, two = replace(one, warm=True, failed=False), replace(two, warm=True, failed=False)
    assert clearly_better(one, two) is None or clearly_better(two, one) is None


@given(st.lists(PATHS, unique_by=lambda f: f.key))
def test_the_second_path_shares_as_little_as_can_be(known: list[Facts]) -> None:
    active = path(ETH, A)
    found = second(active, known, metered=False)
    usable = {f.key for f in known if f.warm and not f.failed and not f.metered} - {active}
    if not usable:
        assert found is None
    elif path(WLAN, B) in usable:
        assert found == path(WLAN, B)
    else:
        assert found in usable
        assert found.local != active.local or all(k.local == active.local for k in usable)


def test_a_relay_behind_the_active_uplink_shares_that_uplink() -> None:
    """It has an address of its own, and would die with the active path all the same."""
    relay = PathKey(Address("192.0.2.200", 50000), A)
    known = [facts(ETH), facts(WLAN), Facts(relay, warm=True, relayed=True, source=ETH.ip)]
    assert second(path(ETH, A), known, metered=False) == path(WLAN, A)
    other = [facts(ETH), Facts(relay, warm=True, relayed=True, source=WLAN.ip)]
    assert second(path(ETH, A), other, metered=False) == relay


def test_a_metered_path_is_the_second_one_only_where_asked_for() -> None:
    known = [facts(ETH), facts(WLAN, metered=True)]
    assert second(path(ETH, A), known, metered=False) is None
    assert second(path(ETH, A), known, metered=True) == path(WLAN, A)


def test_each_needless_move_makes_the_next_one_wait_longer() -> None:
    damper, now = Damper(), 0.0
    waits = []
    for _ in range(8):
        waits.append(damper.wait(now))
        damper.moved(now)
        now += 1.0
    assert waits == [SETTLE, 2 * SETTLE, 4, 8, 16, 32, 60, 60]
    assert damper.wait(now + FLAP_MEMORY) == SETTLE


def test_a_single_lost_check_is_no_reason_to_leave() -> None:
    """It counts for an eighth, and for more than a tenth a second later: that moved people."""
    active = Facts(path(ETH, A), warm=True, rtt=0.02, loss=1 / 8)
    assert clearly_better(Facts(path(WLAN, A), warm=True, rank=1, rtt=0.02), active) is None
    lossy = replace(active, loss=0.35)
    assert clearly_better(Facts(path(WLAN, A), warm=True, rank=1, rtt=0.02), lossy) == (
        "it loses less"
    )
