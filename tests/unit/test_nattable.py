"""The tables of a NAT, behaviour by behaviour, on a clock of the test's own."""

from __future__ import annotations

import random
from itertools import product
from typing import get_args

import pytest

from bench.nattable import EXPIRY, MAX_MAPPINGS, Behaviour, NatTable

PUBLICS = {4: ("198.51.100.10", "198.51.100.11"), 6: ("2001:db8::10", "2001:db8::11")}
HOST = ("10.0.0.2", 4117)
ONE, OTHER_PORT, OTHER_HOST = ("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.2", 1)
BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
# What depends on less is the same for more of: itself, its other port, another host.
SAME = {
    "endpoint": [True, True, True],
    "address": [True, True, False],
    "port": [True, False, False],
}


def table(**options: object) -> NatTable:
    return NatTable(PUBLICS, random.Random(1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mapping", "filtering"), list(product(BEHAVIOURS, BEHAVIOURS)))
def test_all_nine(mapping: Behaviour, filtering: Behaviour) -> None:
    nat = table(mapping=mapping, filtering=filtering)
    first = nat.outgoing(HOST, ONE, 0.0)
    assert first is not None and first[0] == PUBLICS[4][0]
    heard = [nat.incoming(first, remote, 1.0) == HOST for remote in (ONE, OTHER_PORT, OTHER_HOST)]
    assert heard == SAME[filtering]
    again = [nat.outgoing(HOST, remote, 1.0) == first for remote in (ONE, OTHER_PORT, OTHER_HOST)]
    assert again == SAME[mapping]


def test_hosts_inside_do_not_share_mappings() -> None:
    nat = table(filtering="endpoint")
    outside = {nat.outgoing(("10.0.0.2", port), ONE, 0.0): port for port in range(1, 200)}
    assert len(outside) == 199 and None not in outside
    for at, port in outside.items():
        assert at is not None
        assert nat.incoming(at, OTHER_HOST, 0.0) == ("10.0.0.2", port)
    assert sum(at[1] == port for at, port in outside.items() if at) < 3, "ports are not preserved"


def test_only_packets_from_inside_keep_a_mapping() -> None:
    nat = table(filtering="endpoint")
    first = nat.outgoing(HOST, ONE, 0.0)
    assert first == nat.outgoing(HOST, OTHER_HOST, EXPIRY - 1)
    assert first is not None
    for now in range(int(EXPIRY), int(2 * EXPIRY) - 1, 10):
        assert nat.incoming(first, ONE, float(now)) == HOST
    assert nat.incoming(first, ONE, 2 * EXPIRY) is None
    second = nat.outgoing(HOST, ONE, 2 * EXPIRY)
    assert second is not None and second != first
    assert nat.incoming(first, ONE, 2 * EXPIRY) is None


@pytest.mark.parametrize("filtering", ["address", "port"])
def test_a_permission_expires_though_its_mapping_lives(filtering: Behaviour) -> None:
    nat = table(filtering=filtering, expiry=10.0)
    outside = nat.outgoing(HOST, ONE, 0.0)
    assert outside == nat.outgoing(HOST, OTHER_HOST, 5.0)
    assert outside is not None
    assert nat.incoming(outside, ONE, 9.0) == HOST
    assert nat.incoming(outside, ONE, 11.0) is None
    assert nat.incoming(outside, OTHER_HOST, 11.0) == HOST


def test_a_forward_is_for_everybody_and_stays() -> None:
    nat = table(mapping="port", forwards={HOST: 4117})
    at = (PUBLICS[4][0], 4117)
    assert nat.incoming(at, ONE, 0.0) == HOST
    assert nat.outgoing(HOST, ONE, 0.0) == nat.outgoing(HOST, OTHER_HOST, 0.0) == at
    assert nat.incoming(at, ONE, 100 * EXPIRY) == HOST
    nat.rebind(port=False, address=True)
    moved = (PUBLICS[4][1], 4117)
    assert nat.incoming(at, ONE, 0.0) is None
    assert nat.incoming(moved, ONE, 0.0) == HOST
    nat.move({("10.0.0.3", 4117): 4117})
    assert nat.incoming(moved, ONE, 0.0) == ("10.0.0.3", 4117)
    nat.rebind()
    assert nat.incoming(moved, ONE, 0.0) is None


@pytest.mark.parametrize("port", [True, False])
def test_rebinding(port: bool) -> None:
    nat = table(filtering="endpoint")
    for address in (True, False, True) if port else (True, True):
        before = nat.outgoing(HOST, ONE, 0.0)
        nat.rebind(port=port, address=address)
        assert before is not None and nat.incoming(before, ONE, 0.0) is None
        after = nat.outgoing(HOST, ONE, 0.0)
        assert after is not None and after != before
        assert (after[0] != before[0]) == address
        assert (after[1] != before[1]) == port


def test_families_have_addresses_of_their_own() -> None:
    nat = table()
    inside = ("fd00::2", 4117)
    outside = nat.outgoing(inside, ("2001:db8:1::1", 1), 0.0)
    assert outside is not None and outside[0] == PUBLICS[6][0]
    assert nat.is_public(PUBLICS[6][0]) and nat.is_public(PUBLICS[4][0])
    assert not nat.is_public(PUBLICS[4][1])


def test_a_flood_of_mappings_is_bounded_and_passes() -> None:
    nat = table()
    made = [nat.outgoing(("10.0.0.2", port), ONE, 0.0) for port in range(1, MAX_MAPPINGS + 100)]
    assert made.index(None) == MAX_MAPPINGS
    assert nat.outgoing(HOST, ONE, EXPIRY) is not None
    assert len(nat.bindings()) == 1
