"""States of a pair, and the rules of when it is asked."""

from __future__ import annotations

import itertools

import pytest

from tunnel.ice.candidate import Base, Kind
from tunnel.ice.pacing import Bucket
from tunnel.ice.pair import (
    BUSY_INTERVAL,
    CHECKS_PER_ADDRESS,
    FIRST_RTO,
    IDLE_INTERVAL,
    MAX_WARM,
    RETRY_LAST,
    RTO_CEILING,
    RTO_FLOOR,
    TRANSITIONS,
    LivePair,
    PairState,
    check_interval,
    retry_checks,
    retry_delay,
    timeout,
    warm_set,
)
from tunnel.ice.remote import Remote
from tunnel.path.network import Address

MAPPED = Address("203.0.113.1", 1)


def make(
    base: int = 1,
    remote: int = 1,
    *,
    kind: Kind = Kind.HOST,
    ranks: tuple[int, int] = (0, 0),
    metered: bool = False,
    rtt: float | None = None,
) -> LivePair:
    pair = LivePair(
        Base(Address(f"192.168.1.{base}", 1), "eth0", metered, ranks[0]),
        Remote(Address(f"198.51.100.{remote}", 1), kind, ranks[1], False),
    )
    if rtt is not None:
        pair.answered(rtt, MAPPED, 1.0)
    return pair


def test_every_state_has_a_row_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(PairState)
    for state, ways in TRANSITIONS.items():
        assert ways - {state}
        assert PairState.WARM in ways  # a late answer proves it


@pytest.mark.parametrize(
    ("state", "to"),
    [(a, b) for a, b in itertools.product(PairState, PairState) if b not in TRANSITIONS[a]],
)
def test_no_other_way(state: PairState, to: PairState) -> None:
    pair = make()
    pair.state = state
    with pytest.raises(ValueError, match=f"from {state.value} to {to.value}"):
        pair._advance(to)


def test_a_life() -> None:
    pair = make()
    assert pair.state is PairState.WAITING
    pair.asked(0.1, 1.0)
    assert (pair.state, pair.deadline) == (PairState.CHECKING, 1.1)
    pair.missed()
    assert (pair.misses, pair.deadline) == (1, None)
    pair.asked(0.2, 1.1)
    pair.answered(0.05, MAPPED, 1.15)
    assert (pair.state, pair.valid_since, pair.misses) == (PairState.WARM, 1.15, 0)
    pair.answered(0.05, MAPPED, 2.0)
    assert (pair.valid_since, pair.answered_at, pair.rtt) == (1.15, 2.0, 0.05)
    pair.fail(1.0, 3.0)
    snapshot = pair.snapshot()
    assert (snapshot.state, snapshot.valid_since) == (PairState.FAILED, None)
    assert snapshot.rtt == 0.05
    pair.renew()
    assert (pair.state, pair.answered_at, pair.rtt) == (PairState.WAITING, None, 0.05)


def test_asking_more_hides_no_death() -> None:
    pair = make(rtt=0.1)
    pair.asked(0.2, 2.0)
    pair.asked(0.2, 2.1)
    assert pair.deadline == 2.2


def test_loss_is_a_share() -> None:
    pair = make(rtt=0.1)
    for _ in range(200):
        pair.missed()
        pair.answered(0.1, MAPPED, 2.0)
    assert 0.4 < pair.loss < 0.6


def test_timeouts() -> None:
    slow, fast, new = make(rtt=0.4), make(rtt=0.001), make()
    assert timeout(new, None) == FIRST_RTO
    assert timeout(new, slow) == pytest.approx(1.25 * 0.4 + 4 * 0.2)
    assert timeout(fast, slow) == RTO_FLOOR
    new.misses = 2
    assert timeout(new, None) == 4 * FIRST_RTO
    new.misses = 15
    assert timeout(new, None) == RTO_CEILING
    assert timeout(new, make(rtt=3.0)) > 3.0  # a path slower than the ceiling


def test_retries() -> None:
    worked, never = make(rtt=0.1), make()
    delays = []
    for _ in range(8):
        delays.append(retry_delay(worked, refused=False, jitter=1))
        worked.fail(delays[-1], 1.0)
    assert delays == [1, 2, 4, 8, 16, 32, RETRY_LAST, RETRY_LAST]
    assert retry_delay(never, refused=False, jitter=-1) == RETRY_LAST * 0.75
    assert retry_delay(never, refused=True, jitter=-1) == 1.0
    assert (retry_checks(worked, holding=True), retry_checks(worked, holding=False)) == (3, 3)
    assert retry_checks(never, holding=True) == CHECKS_PER_ADDRESS
    assert retry_checks(never, holding=False) == 1


def test_intervals() -> None:
    for metered, full, kept, busy in itertools.product((False, True), repeat=4):
        found = check_interval(make(metered=metered), full_rate=full, kept=kept, busy=busy)
        often = busy and full and (kept or not metered)
        assert found == (BUSY_INTERVAL if often else IDLE_INTERVAL)


def test_order() -> None:
    pairs = [
        make(ranks=(0, 1)),
        make(ranks=(0, 0), kind=Kind.SRFLX),
        make(ranks=(1, 1)),
        make(ranks=(0, 0), kind=Kind.RELAY),
        make(ranks=(0, 0)),
    ]
    ordered = sorted(pairs, key=lambda pair: pair.order)
    assert [pairs.index(pair) for pair in ordered] == [4, 1, 0, 2, 3]  # the relayed one is last


def test_warm_set() -> None:
    first = [make(1, remote, rtt=0.1, ranks=(0, remote)) for remote in range(1, 12)]
    second = make(2, 1, rtt=0.1, ranks=(9, 99))
    cold = make(3, 1)
    kept = first[10].key
    found = warm_set([*first, second, cold], {kept, cold.key})
    assert len(found) == MAX_WARM
    assert {kept, second.key} <= found
    assert found - {kept, second.key} == {pair.key for pair in first[:6]}
    assert warm_set([cold], ()) == frozenset()


def test_a_pair_is_relayed_where_either_end_is() -> None:
    relay = Base(Address("192.0.2.1", 50000), "eth0", False, 0, relay=True, via="192.168.1.1")
    far = Remote(Address("198.51.100.1", 1), Kind.HOST, 0, False)
    assert LivePair(relay, far).snapshot().kind is Kind.RELAY
    assert LivePair(relay, far).snapshot().source == "192.168.1.1"
    assert make(kind=Kind.RELAY).snapshot().kind is Kind.RELAY
    assert make(kind=Kind.SRFLX).snapshot().kind is Kind.SRFLX
    assert make(kind=Kind.SRFLX).snapshot().source == "192.168.1.1"


def test_the_best_relayed_pair_is_warm_whatever_else_is() -> None:
    many = [make(base, 1, rtt=0.1) for base in range(1, 12)]
    relayed = [make(1, 200 + n, kind=Kind.RELAY, ranks=(n, 0), rtt=0.1) for n in (1, 2)]
    found = warm_set([*relayed, *many], {many[10].key})
    assert len(found) == MAX_WARM
    assert {many[10].key, relayed[0].key} <= found
    assert relayed[1].key not in found


def test_a_bucket() -> None:
    bucket = Bucket(rate=5.0, burst=2.0)
    assert [bucket.take(10.0) for _ in range(3)] == [True, True, False]
    assert bucket.ready_at() == pytest.approx(10.2)
    assert bucket.take(bucket.ready_at())
    assert [bucket.take(99.0) for _ in range(3)] == [True, True, False]
    taken, now = 0, 99.0
    while now < 109.0:
        now = bucket.ready_at()
        taken += bucket.take(now)
    assert taken == 50
