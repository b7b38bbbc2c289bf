"""Candidates: what is usable, what a priority carries, and the list that the peer is told."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.ice.candidate import (
    Base,
    Candidate,
    Kind,
    kind_in,
    preference,
    priority,
    rank_in,
    relay_reaches,
    usable_candidate,
)
from tunnel.ice.own import MAX_MAPPED, OwnCandidates
from tunnel.ice.pair import LivePair
from tunnel.ice.remote import MAX_REMOTES, Remote
from tunnel.path.network import Address

FORBIDDEN = (ip_network("10.88.0.0/24"), ip_network("fd88::/64"))
HOST, WAN = Address("192.168.1.2", 4117), Address("203.0.113.1", 40000)
ETH = Base(HOST, "eth0", False, 0)
LTE = Base(Address("192.168.2.2", 4117), "wwan0", True, 1)


@pytest.mark.parametrize(
    ("host", "usable"),
    [
        ("192.0.2.1", True),
        ("10.87.0.1", True),
        ("2001:db8::1", True),
        ("10.88.0.2", False),  # the tunnel itself
        ("fd88::2", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("169.254.1.1", False),
        ("fe80::1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("::ffff:192.0.2.1", False),
        ("host.example", False),
    ],
)
def test_usable(host: str, usable: bool) -> None:
    assert usable_candidate(Address(host, 4117), FORBIDDEN) is usable
    assert not usable_candidate(Address(host, 0), FORBIDDEN)


@given(st.sampled_from(Kind), st.integers(0, 255), st.booleans())
def test_a_priority_carries_rank_and_metered(kind: Kind, rank: int, metered: bool) -> None:
    value = priority(kind, rank, metered)
    assert 0 < value < 2**31  # RFC 8445 section 5.1.2
    assert rank_in(value) == (rank, metered)


@given(st.integers(0, 2**32 - 1))
def test_any_priority_can_be_read(value: int) -> None:
    rank, _ = rank_in(value)
    assert 0 <= rank <= 255


def test_order_of_kinds_and_ranks() -> None:
    assert sorted(Kind, key=preference, reverse=True) == [
        Kind.HOST,
        Kind.PRFLX,
        Kind.SRFLX,
        Kind.RELAY,
    ]
    assert priority(Kind.HOST, 0, False) > priority(Kind.HOST, 0, True)
    assert priority(Kind.HOST, 0, True) > priority(Kind.HOST, 1, False)


def pair(base: Base, mapped: Address, remote: str = "198.51.100.1") -> LivePair:
    made = LivePair(base, Remote(Address(remote, 1), Kind.HOST, 0, False))
    made.answered(0.1, mapped, 1.0)
    return made


def test_our_own_list() -> None:
    forward = Address("203.0.113.9", 4117)
    own = OwnCandidates([forward], FORBIDDEN)
    assert list(own.told) == [Candidate(forward, Kind.SRFLX, 0, False)]
    first = own.generation
    own.reflexive_changed({HOST: WAN})
    own.observed(LTE.address, Address("192.0.2.7", 7))
    own.refresh([LTE, ETH], [pair(ETH, HOST), pair(LTE, WAN)])
    assert list(own.told) == [
        Candidate(forward, Kind.SRFLX, 0, False),
        Candidate(HOST, Kind.HOST, 0, False),
        Candidate(WAN, Kind.SRFLX, 0, False),
        Candidate(LTE.address, Kind.HOST, 1, True),
        Candidate(Address("192.0.2.7", 7), Kind.SRFLX, 1, True),
    ]
    assert own.generation == first + 1
    own.refresh([ETH, LTE], [pair(ETH, HOST), pair(LTE, WAN)])
    assert own.generation == first + 1
    own.keep_bases([HOST])
    own.refresh([ETH], [])
    assert own.generation == first + 2
    assert {c.address for c in own.told} == {forward, HOST, WAN}


def test_a_relay_is_told_as_one_and_has_no_address_outside() -> None:
    own = OwnCandidates([], FORBIDDEN)
    relay = Base(Address("192.0.2.1", 50000), "lte0", True, 1, relay=True, via="10.64.0.1")
    own.reflexive_changed({relay.address: WAN})
    own.refresh([relay, ETH], [pair(relay, WAN)])
    assert list(own.told) == [
        Candidate(HOST, Kind.HOST, 0, False),
        Candidate(relay.address, Kind.RELAY, 1, True),
    ]


@pytest.mark.parametrize(
    ("relay", "remote", "reaches"),
    [
        ("192.0.2.1", "198.51.100.1", True),
        ("192.0.2.1", "10.0.0.1", False),
        ("192.0.2.1", "100.64.0.1", False),
        ("10.0.0.1", "10.0.0.2", True),  # a server of this company's own
        ("10.0.0.1", "198.51.100.1", True),
        ("192.0.2.1", "2001:db8::1", False),
        ("2001:db8::1", "192.0.2.1", False),
        ("2001:db8::1", "fd00::1", False),
        ("2001:db8::1", "2001:db8::2", True),
        ("192.0.2.1", "192.0.2.1", False),
    ],
)
def test_where_a_relay_may_send(relay: str, remote: str, reaches: bool) -> None:
    assert relay_reaches(Address(relay, 1), Address(remote, 1)) == reaches


def test_a_check_tells_whether_it_comes_from_a_relay() -> None:
    for kind in (Kind.PRFLX, Kind.RELAY):
        told = priority(kind, 3, True)
        assert (kind_in(told), rank_in(told)) == (kind, (3, True))


def test_a_nat_that_maps_every_destination_anew_floods_no_list() -> None:
    own = OwnCandidates([], ())
    pairs = [pair(ETH, Address("203.0.113.1", 1000 + i), f"198.51.100.{i}") for i in range(20)]
    pairs.append(pair(ETH, Address("203.0.113.1", 1019), "198.51.100.99"))
    own.refresh([ETH], pairs)
    assert len(own.told) == 1 + MAX_MAPPED
    assert own.told[1].address.port == 1019  # seen twice


def test_what_pairs_that_failed_were_seen_as_is_old() -> None:
    own = OwnCandidates([], ())
    failed, warm = pair(ETH, Address("203.0.113.1", 1)), pair(ETH, Address("203.0.113.1", 2))
    failed.fail(60.0, 2.0)
    own.refresh([ETH], [failed, warm])
    assert [c.address.port for c in own.told] == [4117, 2]
    own.refresh([ETH], [failed])
    assert [c.address.port for c in own.told] == [4117, 1]


def test_nothing_from_inside_the_tunnel_is_told_and_no_more_than_32() -> None:
    own = OwnCandidates([], FORBIDDEN)
    inner = Base(Address("10.88.0.1", 4117), "mt0", False, 0)
    own.refresh([inner], [])
    assert own.told == ()
    own.refresh([Base(Address(f"192.168.1.{i}", 1), "eth0", False, 0) for i in range(1, 99)], [])
    assert len(own.told) == MAX_REMOTES
