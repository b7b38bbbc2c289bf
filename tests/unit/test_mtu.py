"""The search for the size of a path, against paths that lose, shrink and grow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.quic.mtu import (
    BLACK_HOLE_LOSSES,
    COMMON_SIZES,
    FRUITLESS_DELAY,
    GRANULARITY,
    MAX_PROBES,
    PROBE_TIMEOUT,
    RAISE_DELAY,
    RETRY_DELAY,
    MtuState,
    PathMtu,
)

BASE = 1200
V4 = 1472
RTT = 0.04
LOSS_DELAY = 3 * RTT  # until a probe that died is declared lost


class Network:
    """A path of `true` bytes under a PathMtu; its clock jumps from event to event."""

    def __init__(
        self, mtu: PathMtu, true: int, *, loss: float = 0.0, seed: int = 0, now: float = 100.0
    ) -> None:
        self.mtu = mtu
        self.true = true
        self.loss = loss
        self.random = random.Random(seed)
        self.now = now
        self.probes: list[tuple[float, int]] = []

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Probe whenever one is due, and report what became of it."""
        end = self.now + seconds
        while not until():
            at = self.mtu.next_at()
            if at is None or at > end:
                self.now = end
                return
            self.now = max(self.now, at)
            size = self.mtu.probe_due(self.now)
            assert size is not None, "woken for nothing"
            self.probe(size)

    def probe(self, size: int) -> None:
        assert BASE <= size <= self.mtu.ceiling
        self.probes.append((self.now, size))
        self.mtu.probe_sent(size, self.now)
        assert self.mtu.probe_due(self.now) is None, "two at once"
        if size <= self.true and self.random.random() >= self.loss:
            self.now += RTT
            self.mtu.acknowledged(size, self.now)
        else:
            self.now += LOSS_DELAY
            self.mtu.lost(size, self.now)
        self.check()

    def check(self) -> None:
        assert self.mtu.base <= self.mtu.size <= self.mtu.ceiling

    def data(self, packets: int) -> None:
        """Packets of full size, which are lost where they do not fit."""
        if self.mtu.size > self.true:
            self.now += RTT
            self.mtu.large_lost(packets, self.now)
            self.check()

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.probes]

    @property
    def exact_enough(self) -> bool:
        return self.true - GRANULARITY < self.mtu.size <= self.true


def settled(true: int = V4, ceiling: int = V4) -> Network:
    network = Network(PathMtu(ceiling=ceiling), true)
    network.run(30, lambda: network.mtu.state is MtuState.SEARCH_COMPLETE)
    assert network.exact_enough
    network.probes.clear()
    return network


# ---- the search ----


def test_the_common_path_takes_one_probe() -> None:
    mtu = PathMtu(ceiling=V4)
    assert mtu.size == BASE
    network = Network(mtu, V4)
    network.run(10_000)
    assert network.sizes == [V4]
    assert (mtu.size, mtu.state, mtu.next_at()) == (V4, MtuState.SEARCH_COMPLETE, None)


@pytest.mark.parametrize("ceiling", [1100, 1200])
def test_a_link_that_takes_no_more_than_the_base_is_not_probed(ceiling: int) -> None:
    mtu = PathMtu(ceiling=ceiling)
    assert (mtu.size, mtu.next_at(), mtu.probe_due(1.0)) == (BASE, None, None)


@pytest.mark.parametrize("ceiling", [1452, 1472])
def test_every_size_is_found_soon_and_with_few_probes(ceiling: int) -> None:
    counts = []
    for true in range(BASE, ceiling + 1):
        network = Network(PathMtu(ceiling=ceiling), true)
        network.run(1, lambda n=network: n.exact_enough)  # type: ignore[misc]
        assert network.exact_enough, true
        # In use within a second; now the last doubts about the sizes above.
        network.run(10, lambda n=network: n.mtu.state is MtuState.SEARCH_COMPLETE)  # type: ignore[misc]
        assert network.exact_enough, true
        counts.append(len(network.probes))
    assert max(counts) <= 10
    assert sum(counts) / len(counts) <= 8


@pytest.mark.parametrize("true", COMMON_SIZES)
def test_common_sizes_are_found_exactly(true: int) -> None:
    assert settled(true).mtu.size == true


def test_a_jumbo_link_is_searched_as_well() -> None:
    assert settled(true=4000, ceiling=8972).mtu.size > 4000 - GRANULARITY


def test_a_lost_size_is_asked_again_with_backoff_before_it_counts_as_too_large() -> None:
    network = Network(PathMtu(ceiling=V4), V4 - 1)
    network.run(10)
    tries = [at for at, size in network.probes if size == V4]
    assert len(tries) == MAX_PROBES
    assert tries[1] - tries[0] == pytest.approx(LOSS_DELAY + RETRY_DELAY)
    assert tries[2] - tries[1] == pytest.approx(LOSS_DELAY + 2 * RETRY_DELAY)
    assert network.mtu.size == 1464


def test_a_probe_that_nobody_reports_about_counts_as_lost() -> None:
    mtu = PathMtu(ceiling=V4)
    mtu.probe_sent(V4, 100.0)
    assert mtu.next_at() == 100.0 + PROBE_TIMEOUT
    assert mtu.probe_due(100.0 + PROBE_TIMEOUT - 0.1) is None
    assert mtu.probe_due(100.0 + PROBE_TIMEOUT) in COMMON_SIZES


def test_a_late_acknowledgement_counts() -> None:
    mtu = PathMtu(ceiling=V4)
    mtu.probe_sent(V4, 100.0)
    mtu.lost(V4, 100.1)
    smaller = mtu.probe_due(100.1)
    assert smaller is not None
    mtu.probe_sent(smaller, 100.1)
    mtu.acknowledged(V4, 100.2)
    assert mtu.size == V4
    mtu.acknowledged(smaller, 100.3)
    assert (mtu.size, mtu.state) == (V4, MtuState.SEARCH_COMPLETE)


@pytest.mark.parametrize("size", [1300, 1472, 1500])
def test_reports_about_nothing_that_was_asked_change_nothing(size: int) -> None:
    mtu = PathMtu(ceiling=V4)
    mtu.acknowledged(size, 100.0)
    mtu.lost(size, 100.0)
    assert (mtu.size, mtu.probe_due(100.0)) == (BASE, V4)


# ---- larger sizes, later ----


def test_a_path_that_grew_is_noticed_by_the_raise_timer() -> None:
    network = settled(true=1400)
    start, network.true = network.now, V4
    network.run(RAISE_DELAY - 30)
    assert network.sizes == []
    network.run(60)
    assert network.mtu.size == V4
    assert network.probes[0][0] == pytest.approx(start + RAISE_DELAY, abs=1)


def test_an_outage_during_the_search_costs_seconds_not_minutes() -> None:
    network = Network(PathMtu(ceiling=V4), true=0)
    network.run(10)
    assert network.mtu.size == BASE
    network.true = V4
    network.run(FRUITLESS_DELAY)
    assert network.mtu.size == V4


def test_a_smallest_path_is_asked_ever_more_rarely() -> None:
    network = Network(PathMtu(ceiling=V4), true=BASE)
    network.run(4 * 3600)
    late = [at for at, _ in network.probes if at > 100 + 3 * 3600]
    assert len(late) <= 7 * 9  # six searches an hour


# ---- smaller sizes, suddenly ----


def test_a_black_hole_is_left_at_once_and_the_size_found_below() -> None:
    network = settled()
    network.true = 1400
    network.data(BLACK_HOLE_LOSSES - 1)
    assert network.mtu.size == V4
    network.data(BLACK_HOLE_LOSSES)
    assert (network.mtu.size, network.mtu.state) == (BASE, MtuState.BASE)
    network.run(10)
    assert network.exact_enough
    assert network.sizes[:2] == [BASE, V4]


def test_a_wrongly_suspected_size_is_back_after_two_round_trips() -> None:
    network = settled(true=1420)
    size, start = network.mtu.size, network.now
    network.mtu.large_lost(BLACK_HOLE_LOSSES, network.now)
    network.run(30, lambda: network.mtu.size == size)
    assert network.now - start == pytest.approx(2 * RTT)


def test_losses_at_the_base_size_are_no_black_hole() -> None:
    mtu = PathMtu(ceiling=V4)
    mtu.large_lost(100, 100.0)
    assert (mtu.state, mtu.probe_due(100.0)) == (MtuState.SEARCHING, V4)


def test_a_dead_path_is_asked_slowly_and_believed_when_it_answers() -> None:
    network = settled()
    network.true = 0
    network.data(BLACK_HOLE_LOSSES)
    network.run(3600)
    assert network.mtu.state is MtuState.ERROR
    assert set(network.sizes) == {BASE}
    assert len(network.probes) <= 3600 / PROBE_TIMEOUT + 5
    network.true = V4
    network.run(PROBE_TIMEOUT + 1)
    assert network.mtu.size == V4


def test_what_was_sent_before_a_black_hole_proves_nothing_after_it() -> None:
    network = settled(true=1400)
    network.run(RAISE_DELAY * 2, lambda: network.mtu.probe_due(network.now + 600) is not None)
    network.mtu.probe_sent(V4, network.now)
    network.mtu.large_lost(BLACK_HOLE_LOSSES, network.now)
    network.mtu.acknowledged(V4, network.now)
    assert network.mtu.size == BASE


# ---- the link itself refuses ----


@pytest.mark.parametrize("told", [True, False])
def test_refused_data_means_base_and_a_search_below(told: bool) -> None:
    network = settled()
    network.true = 1400
    network.mtu.refused(network.now, V4 if told else None)
    assert network.mtu.size == BASE
    network.run(10)
    assert network.exact_enough
    assert V4 not in network.sizes


def test_a_refused_probe_does_not_touch_the_size_in_use() -> None:
    network = settled(true=1400)
    size = network.mtu.size
    network.run(RAISE_DELAY * 2, lambda: network.mtu.probe_due(network.now + 600) is not None)
    network.now += 600
    network.mtu.probe_sent(V4, network.now)
    network.mtu.refused(network.now)
    assert network.mtu.size == size
    network.run(10)
    assert network.mtu.size == size
    assert V4 not in network.sizes


def test_the_echoes_of_a_refused_batch_cost_one_probe() -> None:
    network = settled()
    network.true = 1400
    for _ in range(20):
        network.mtu.refused(network.now)
    assert (network.mtu.size, network.mtu.state) == (BASE, MtuState.BASE)
    network.run(10)
    assert network.exact_enough
    assert network.sizes[0] == BASE


def test_a_link_below_the_base_size_does_not_make_a_busy_loop() -> None:
    mtu = PathMtu(ceiling=V4)
    now, sent = 100.0, 0
    while now < 400.0:
        size = mtu.probe_due(now)
        if size is not None:
            mtu.probe_sent(size, now)
            mtu.refused(now, size)
            sent += 1
        else:
            at = mtu.next_at()
            assert at is not None
            assert at > now
            now = at
        assert mtu.size == BASE
    assert sent < 40
    mtu.refused(now, BASE)
    assert mtu.size == BASE


# ---- another network under the path ----


def test_revalidation_keeps_the_size_and_confirms_it_with_one_probe() -> None:
    network = settled()
    network.mtu.revalidate(network.now)
    assert network.mtu.size == V4
    network.run(3600)
    assert network.sizes == [V4]
    assert network.mtu.size == V4


def test_revalidation_finds_a_larger_network() -> None:
    network = settled(true=1300)
    network.true = V4
    network.mtu.revalidate(network.now)
    assert network.mtu.size > BASE
    network.run(1)
    assert network.mtu.size == V4
    assert len(network.sizes) == 2


def test_revalidation_finds_a_smaller_network_without_any_data() -> None:
    network = settled()
    network.true = 1300
    network.mtu.revalidate(network.now)
    network.run(20)
    assert network.exact_enough
    assert network.sizes[:MAX_PROBES] == [V4] * MAX_PROBES


def test_revalidation_at_the_base_size_searches() -> None:
    network = settled(true=BASE)
    network.true = V4
    network.mtu.revalidate(network.now)
    network.run(1)
    assert network.sizes == [V4]
    assert network.mtu.size == V4


def test_revalidation_ends_the_wait_of_a_dead_path() -> None:
    network = settled()
    network.true = 0
    network.data(BLACK_HOLE_LOSSES)
    network.run(100)
    network.true = V4
    network.mtu.revalidate(network.now)
    network.run(1)
    assert network.mtu.size == V4


# ---- a twin of a path ----


def test_a_heir_uses_the_size_at_once_and_confirms_it() -> None:
    old = settled(true=1420)
    heir = PathMtu(ceiling=V4)
    heir.inherit(old.mtu)
    assert heir.size == old.mtu.size
    network = Network(heir, 1420, now=old.now)
    network.run(60)
    assert network.sizes == [heir.size]


def test_a_heir_stays_below_its_own_ceiling() -> None:
    heir = PathMtu(ceiling=1452)
    heir.inherit(settled().mtu)
    assert heir.size == 1452
    network = Network(heir, 1300)
    network.run(20)
    assert network.exact_enough


def test_the_heir_of_a_dead_path_searches_for_itself() -> None:
    old = settled()
    old.true = 0
    old.data(BLACK_HOLE_LOSSES)
    old.run(60)
    heir = PathMtu(ceiling=V4)
    heir.inherit(old.mtu)
    network = Network(heir, V4, now=old.now)
    network.run(1)
    assert heir.size == V4


# ---- in general ----

TRUTH = st.integers(BASE, 1500)


@given(true=TRUTH, ceiling=st.integers(BASE, 9000), loss=st.floats(0, 0.5), seed=st.integers())
def test_it_converges_on_any_path(true: int, ceiling: int, loss: float, seed: int) -> None:
    true = min(true, ceiling)
    network = Network(PathMtu(ceiling=ceiling), true, loss=loss, seed=seed)
    network.run(60)
    assert network.mtu.size <= true
    # A streak of losses may hide the size for once; the raise timer asks again.
    network.loss = 0
    network.run(RAISE_DELAY + 60)
    assert network.exact_enough


@given(
    seed=st.integers(),
    events=st.lists(
        st.tuples(
            st.sampled_from(["change", "data", "revalidate", "refused", "told", "outage", "wait"]),
            TRUTH,
            st.floats(0, 700),
        ),
        max_size=20,
    ),
)
def test_no_history_keeps_it_from_converging(
    seed: int, events: list[tuple[str, int, float]]
) -> None:
    network = Network(PathMtu(ceiling=V4), V4, loss=0.1, seed=seed)
    for event, true, wait in events:
        match event:
            case "change":
                network.true = min(true, V4)
            case "outage":
                network.true = 0
            case "data":
                network.data(BLACK_HOLE_LOSSES)
                assert network.mtu.size <= max(network.true, BASE)
            case "revalidate":
                network.mtu.revalidate(network.now)
            case "refused":
                network.mtu.refused(network.now)
            case "told":
                network.mtu.refused(network.now, true)
        network.check()
        network.run(wait)
    network.loss = 0
    network.true = max(network.true, BASE)
    for _ in range(3):
        network.data(BLACK_HOLE_LOSSES)
        assert network.mtu.size <= network.true
        network.run(RAISE_DELAY + 60)
    assert network.exact_enough


@given(st.data())
def test_no_report_in_any_order_breaks_it(data: st.DataObject) -> None:
    mtu = PathMtu(ceiling=V4)
    now = 100.0
    sizes = st.sampled_from([BASE, 1252, 1300, 1432, 1464, V4, 5000])
    for _ in range(data.draw(st.integers(0, 60))):
        now += data.draw(st.sampled_from([0.0, 0.1, 2.0, 20.0, 700.0]))
        match data.draw(st.integers(0, 7)):
            case 0 | 1:
                size = mtu.probe_due(now)
                if size is not None:
                    mtu.probe_sent(size, now)
            case 2:
                mtu.acknowledged(data.draw(sizes), now)
            case 3:
                mtu.lost(data.draw(sizes), now)
            case 4:
                mtu.refused(now, data.draw(st.none() | sizes))
            case 5:
                mtu.large_lost(data.draw(st.integers(0, 10)), now)
            case 6:
                mtu.revalidate(now)
            case 7:
                heir = PathMtu(ceiling=V4)
                heir.inherit(mtu)
                mtu = heir
        assert BASE <= mtu.size <= V4
        at = mtu.next_at()
        assert mtu.size == V4 or at is not None
        due = mtu.probe_due(now)
        assert due is None or (at is not None and at <= now and BASE <= due <= V4)
