"""The model-based controller, sample by sample."""

from __future__ import annotations

import math
from dataclasses import fields
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunnel.datapath.congestion import (
    AGGREGATION_SECONDS,
    ALLOWANCE_BYTES,
    DOWN_GAIN,
    INITIAL_WINDOW_PACKETS,
    MINIMUM_WINDOW_PACKETS,
    PROBE_RTT_GAIN,
    STARTUP_GAIN,
    UP_GAINS,
    Controller,
    ModelController,
    Phase,
    Sample,
)

SIZE = 1400
RATE = 2.5e6  # bytes/s: 20 Mbit/s
RTT = 0.04
BDP = RATE * RTT


def controller() -> ModelController:
    return ModelController(max_datagram_size=SIZE)


class Path:
    """An ideal path: samples at a steady rate, every `step` seconds, nothing simulated."""

    def __init__(self, cc: Controller, *, now: float = 1000.0, rate: float = RATE) -> None:
        self.cc, self.now, self.rate = cc, now, rate
        self.delivered = 0
        self._history: list[tuple[float, int]] = []

    def feed(
        self,
        seconds: float,
        *,
        rtt: float = RTT,
        rate: float | None = None,
        in_flight: int | None = None,
        loss: float = 0.0,
        app_limited: bool = False,
        step: float = 0.002,
    ) -> None:
        rate = self.rate if rate is None else rate
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += step
            acked = int(rate * step)
            self.delivered += acked
            self._history.append((self.now, self.delivered))
            sent = self.now - rtt
            while len(self._history) > 1 and self._history[1][0] <= sent:
                self._history.pop(0)
            began, before = self._history[0]
            self.cc.on_sample(
                Sample(
                    now=self.now,
                    acked=acked,
                    lost=int(acked * loss / (1 - loss)),
                    in_flight=int(rate * rtt) if in_flight is None else in_flight,
                    rtt=rtt,
                    delivery_rate=rate,
                    app_limited=app_limited,
                    delivered=self.delivered,
                    prior_delivered=before if began <= sent else 0,
                )
            )


def cruising(rate: float = RATE, rtt: float = RTT) -> tuple[ModelController, Path]:
    cc = controller()
    path = Path(cc, rate=rate)
    path.feed(12 * max(rtt, 0.01), rtt=rtt)
    until(path, Phase.UP, rtt=rtt)
    until(path, Phase.CRUISE, rtt=rtt)
    return cc, path


def phase(cc: ModelController) -> Phase:
    """Hides from mypy that it knew better a moment ago."""
    return cc.phase


def until(path: Path, wanted: Phase, *, rtt: float = RTT, limit: float = 10.0) -> None:
    end = path.now + limit
    assert isinstance(path.cc, ModelController)
    while path.cc.phase is not wanted:
        path.feed(0.002, rtt=rtt)
        assert path.now < end, f"never {wanted}"


# The start


def test_it_starts_with_the_initial_window_and_unpaced() -> None:
    cc = controller()
    assert cc.window == INITIAL_WINDOW_PACKETS * SIZE
    assert cc.pacing_rate == 0.0
    assert cc.phase is Phase.STARTUP


def test_the_first_round_trip_gives_the_pace() -> None:
    cc = controller()
    cc.on_sample(Sample(5.0, SIZE, 0, 31 * SIZE, RTT, SIZE / RTT, False, SIZE, 0))
    assert cc.pacing_rate == pytest.approx(STARTUP_GAIN * INITIAL_WINDOW_PACKETS * SIZE / RTT)
    assert cc.window == INITIAL_WINDOW_PACKETS * SIZE


def test_a_sample_without_measurements_changes_nothing() -> None:
    cc = controller()
    cc.on_sample(Sample(5.0, 0, SIZE, 31 * SIZE, 0.0, 0.0, False, 0, 0))
    assert (cc.window, cc.pacing_rate) == (INITIAL_WINDOW_PACKETS * SIZE, 0.0)


def test_the_start_ends_when_the_rate_stops_growing() -> None:
    cc = controller()
    path = Path(cc)
    path.feed(8 * RTT)
    assert cc.phase is not Phase.STARTUP
    assert cc.rate == RATE
    assert cc.min_rtt == RTT


def test_the_start_goes_on_while_the_rate_grows() -> None:
    cc = controller()
    path = Path(cc)
    rate = 1e5
    for _ in range(10):
        path.feed(RTT * 1.2, rate=rate)
        assert cc.phase is Phase.STARTUP
        rate *= 2
    assert cc.window > BDP
    assert cc.pacing_rate > STARTUP_GAIN * rate / 2.1


def test_the_start_ends_at_the_first_queue() -> None:
    cc = controller()
    path = Path(cc)
    path.feed(1.2 * RTT, rate=RATE / 2)
    assert phase(cc) is Phase.STARTUP
    path.feed(2 * RTT, rtt=RTT + 0.02, in_flight=int(2 * BDP))
    assert phase(cc) is Phase.DRAIN
    assert cc.pacing_rate < cc.rate


def test_a_millisecond_more_is_no_queue() -> None:
    cc = controller()
    path = Path(cc)
    rate = RATE
    for _ in range(5):
        path.feed(1.2 * RTT, rtt=RTT + 0.001, rate=rate)
        rate *= 1.5
    assert cc.phase is Phase.STARTUP


def test_the_start_ends_by_loss_once_the_rate_stands_still() -> None:
    cc = controller()
    path = Path(cc)
    path.feed(1.2 * RTT)
    path.feed(2.5 * RTT, loss=0.1)
    assert cc.phase is not Phase.STARTUP


def test_loss_does_not_end_a_start_that_still_grows() -> None:
    cc = controller()
    path = Path(cc)
    rate = RATE
    for _ in range(5):
        path.feed(1.2 * RTT, rate=rate, loss=0.05)
        rate *= 1.6
    assert cc.phase is Phase.STARTUP


def test_app_limited_rates_do_not_end_the_start() -> None:
    cc = controller()
    path = Path(cc)
    path.feed(20, rate=10_000, app_limited=True, step=0.15)
    assert cc.phase is Phase.STARTUP
    assert cc.window == INITIAL_WINDOW_PACKETS * SIZE
    assert cc.pacing_rate >= STARTUP_GAIN * cc.window / RTT * 0.99


# The cycle


def test_the_cycle_goes_round() -> None:
    cc, path = cruising()
    assert cc.pacing_rate == pytest.approx(RATE)
    began = path.now
    until(path, Phase.UP)
    assert path.now - began < 8 * RTT
    assert cc.pacing_rate == pytest.approx(UP_GAINS[0] * RATE)
    began = path.now
    until(path, Phase.DOWN)
    assert path.now - began == pytest.approx(RTT, abs=0.005)
    assert cc.pacing_rate == pytest.approx(DOWN_GAIN * RATE)
    path.feed(0.004, in_flight=int(1.2 * BDP))
    assert phase(cc) is Phase.DOWN
    path.feed(0.002, in_flight=int(0.9 * BDP))
    assert phase(cc) is Phase.CRUISE


def test_down_does_not_last_for_ever() -> None:
    cc, path = cruising()
    until(path, Phase.DOWN)
    path.feed(3.2 * RTT, in_flight=int(2 * BDP))
    assert cc.phase is Phase.CRUISE


def test_pacing_governs_and_the_window_leaves_little_more() -> None:
    cc, _ = cruising()
    assert BDP < cc.window < 1.35 * BDP


def test_found_rate_is_followed_by_a_bolder_look() -> None:
    cc, path = cruising()
    until(path, Phase.UP)
    until(path, Phase.DOWN)
    path.feed(0.002, rate=1.2 * RATE)
    assert cc.phase is Phase.UP
    assert cc.pacing_rate == pytest.approx(UP_GAINS[1] * 1.2 * RATE, rel=0.01)
    path.feed(1.1 * RTT, rate=1.2 * RATE)
    path.feed(0.002, rate=1.5 * RATE)
    assert cc.pacing_rate == pytest.approx(UP_GAINS[2] * 1.5 * RATE, rel=0.01)


def test_the_rate_is_forgotten_after_two_cycles() -> None:
    """A path without a queue that delivers less, say because a shaper says so."""
    cc, path = cruising()
    path.feed(30 * RTT, rate=0.9 * RATE)
    assert cc.rate == pytest.approx(0.9 * RATE)


def test_a_slower_path_with_a_queue_is_noticed_at_once() -> None:
    cc, path = cruising()
    path.feed(4 * 2 * RTT, rate=RATE / 2, rtt=2 * RTT, in_flight=int(BDP))
    assert cc.rate == pytest.approx(RATE / 2)


def test_a_queue_of_others_does_not_starve_it() -> None:
    cc, path = cruising()
    rate = RATE
    for _ in range(8):
        rate /= 2
        path.feed(4 * 5 * RTT, rate=rate, rtt=5 * RTT)
        if rate < RATE / 64:
            break
    # Given way once at once, then only as fast as the sliding window.
    assert cc.window > 1.2 * cc.rate * cc.min_rtt


# What a path holds


@pytest.mark.parametrize("loss", [0.005, 0.01, 0.015])
def test_little_loss_changes_nothing(loss: float) -> None:
    cc, path = cruising()
    path.feed(5, loss=loss)
    assert cc.rate == RATE
    until(path, Phase.CRUISE)
    assert cc.window > BDP


def test_much_loss_bounds_the_window_until_the_next_look() -> None:
    cc, path = cruising()
    before = cc.window
    path.feed(2.5 * RTT, loss=0.3)
    assert cc.phase is Phase.CRUISE
    assert 0.5 * BDP < cc.window < before
    until(path, Phase.UP)
    assert cc.window >= BDP


def test_a_lossy_look_bounds_the_ones_that_follow() -> None:
    cc, path = cruising()
    until(path, Phase.UP)
    while cc.phase in (Phase.UP, Phase.DOWN):
        path.feed(0.002, loss=0.15, in_flight=int(1.2 * BDP))
    path.feed(RTT)
    bounded = cc.window
    assert bounded <= 1.06 * BDP
    path.feed(60 * RTT)
    until(path, Phase.CRUISE)
    assert cc.window > bounded  # clean looks lift it again


def test_spurious_loss_is_taken_back() -> None:
    cc, path = cruising()
    before = cc.window
    path.feed(2.5 * RTT, loss=0.3)
    assert cc.window < before
    cc.on_spurious_loss()
    assert cc.window == pytest.approx(before, rel=0.05)


def test_spurious_loss_before_anything_else() -> None:
    cc = controller()
    cc.on_spurious_loss()
    assert cc.window == INITIAL_WINDOW_PACKETS * SIZE


def test_lumps_of_acknowledgements_get_an_allowance() -> None:
    cc, path = cruising()
    smooth = cc.window
    path.feed(2, step=0.01)
    until(path, Phase.CRUISE)
    lump = cc.window - smooth
    assert 0.003 * RATE < lump <= AGGREGATION_SECONDS * RATE


def test_the_allowance_is_small_on_slow_links_and_bounded_on_fast_ones() -> None:
    slow, _ = cruising(rate=125e3)
    assert slow.window - 125e3 * RTT < 0.25 * 125e3 * RTT + 3 * SIZE
    fast, _ = cruising(rate=625e6, rtt=100e-6)
    assert ALLOWANCE_BYTES < fast.window < 0.012 * 625e6


def test_never_below_the_minimum() -> None:
    cc = controller()
    path = Path(cc, rate=2000.0)
    path.feed(20, rate=2000.0, loss=0.5, step=0.1)
    assert cc.window >= MINIMUM_WINDOW_PACKETS * SIZE


# The smallest round trip


def test_the_smallest_round_trip_is_looked_for_when_it_was_not_seen() -> None:
    cc, path = cruising()
    until(path, Phase.PROBE_RTT, rtt=RTT + 0.003)
    path.feed(0.002, rtt=RTT + 0.003)
    assert cc.window < (PROBE_RTT_GAIN + 0.1) * cc.rate * cc.min_rtt + 8 * SIZE
    began = path.now
    while cc.phase is Phase.PROBE_RTT:
        path.feed(0.002, rtt=RTT + 0.001, in_flight=int(BDP / 2))
    assert path.now - began < 3 * RTT
    assert cc.min_rtt == pytest.approx(RTT + 0.001)


def test_the_look_for_the_round_trip_ends_though_nothing_shrinks() -> None:
    cc, path = cruising()
    until(path, Phase.PROBE_RTT, rtt=RTT + 0.003)
    path.feed(0.5, rtt=RTT + 0.003, in_flight=int(2 * BDP))
    assert cc.phase is not Phase.PROBE_RTT


def test_no_look_for_a_round_trip_that_was_seen() -> None:
    cc, path = cruising()
    for _ in range(200):
        path.feed(0.1)
        assert cc.phase is not Phase.PROBE_RTT


def test_without_round_trips_the_model_stays() -> None:
    cc, path = cruising()
    for _ in range(4000):
        path.now += 0.002
        path.delivered += 5000
        cc.on_sample(
            Sample(
                path.now,
                5000,
                0,
                int(BDP),
                0.0,
                RATE,
                False,
                path.delivered,
                path.delivered - int(BDP),
            )
        )
    assert cc.min_rtt == RTT
    assert math.isfinite(cc.pacing_rate)


# Silence


def test_after_an_outage_the_rate_is_still_known() -> None:
    cc, path = cruising()
    path.now += 60
    path.delivered += SIZE
    lost = int(BDP)
    cc.on_sample(
        Sample(path.now, SIZE, lost, SIZE, RTT, SIZE / 60, False, path.delivered, path.delivered)
    )
    assert cc.rate == RATE
    assert cc.pacing_rate == pytest.approx(RATE)
    assert cc.window > BDP


def test_keystrokes_do_not_change_the_model() -> None:
    cc, path = cruising()
    for step in (0.1, 0.3, 2.0, 30.0):
        path.feed(100 * step, rate=300 / step, app_limited=True, step=step, in_flight=0)
        assert cc.rate == RATE
        assert cc.min_rtt == RTT
        assert cc.window > BDP


def test_an_app_limited_rate_counts_when_it_is_more() -> None:
    cc, path = cruising()
    path.feed(0.01, rate=1.05 * RATE, app_limited=True)
    assert cc.rate == pytest.approx(1.05 * RATE)


# A new port


def test_it_goes_on_where_the_other_stood() -> None:
    old, path = cruising()
    new = controller()
    new.inherit(old)
    assert (new.window, new.pacing_rate, new.phase) == (old.window, old.pacing_rate, old.phase)
    assert (new.rate, new.min_rtt) == (RATE, RTT)
    fresh = Path(new, now=path.now)  # its bytes are counted from zero again
    fresh.feed(5)
    assert new.rate == RATE
    assert old.rate == RATE


def test_what_a_stranger_knows_is_taken_too() -> None:
    class Other:
        window = 123_456
        pacing_rate = 1e6

        def on_sample(self, sample: Sample) -> None: ...

        def on_spurious_loss(self) -> None: ...

        def inherit(self, other: Controller) -> None: ...

    cc = controller()
    cc.inherit(Other())
    assert (cc.window, cc.pacing_rate) == (123_456, 1e6)


# Anything at all


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_samples_break_it(seed: int) -> None:
    """Whatever comes, the window and the rate stay sane numbers."""
    random = Random(seed)
    cc = controller()
    now, delivered = random.choice([0.0, 1e6]), 0
    for _ in range(400):
        now += random.choice([0.0, 1e-5, 1e-3, 0.1, 10.0]) * random.random()
        acked = random.choice([0, 1, SIZE, 10**6])
        delivered += acked
        cc.on_sample(
            Sample(
                now,
                acked,
                random.choice([0, 0, SIZE, 10**7]),
                random.choice([0, SIZE, 10**6, 10**8]),
                random.choice([0.0, 1e-6, 1e-3, 0.05, 3.0]) * random.random(),
                random.choice([0.0, 1.0, 1e6, 1e10]) * random.random(),
                random.random() < 0.3,
                delivered,
                random.choice([0, max(delivered - 10**5, 0), delivered]),
            )
        )
        if random.random() < 0.05:
            cc.on_spurious_loss()
        if random.random() < 0.02:
            other = controller()
            other.inherit(cc)
            cc = other
        assert isinstance(cc.window, int)
        assert cc.window >= MINIMUM_WINDOW_PACKETS * SIZE, f"seed {seed}"
        assert 0.0 <= cc.pacing_rate < math.inf, f"seed {seed}"


def test_the_sample_has_the_order_the_engine_fills_in() -> None:
    assert [field.name for field in fields(Sample)] == [
        "now",
        "acked",
        "lost",
        "in_flight",
        "rtt",
        "delivery_rate",
        "app_limited",
        "delivered",
        "prior_delivered",
    ]
