"""The model-based controller on simulated bottlenecks: what it uses, what it leaves in the queue.

The bounds are goals with room, not what was measured; `-s` prints the latter.
"""

from __future__ import annotations

import math

import pytest

from tests.sim.bottleneck import BURST, Link, Offer, Sender, World
from tunnel.datapath.congestion import MINIMUM_WINDOW_PACKETS, ModelController, Phase, Sample

MBIT = 1e6 / 8  # bytes/s
SIZE = 1400
SETTLED = 2.0  # seconds; the start is judged on its own


def controller() -> ModelController:
    return ModelController(max_datagram_size=SIZE)


def link(
    mbit: float,
    rtt: float,
    *,
    buffer: float = 0.5,
    loss: float = 0.0,
    jitter: float = 0.0,
    ack_quantum: float = 0.0,
    then: tuple[float, float] | None = None,
) -> Link:
    """`rtt` and `buffer` in seconds; `then`: (from second, Mbit/s)."""
    rates = [(0.0, mbit * MBIT)]
    if then is not None:
        rates.append((then[0], then[1] * MBIT))
    return Link(
        rates, rtt / 2, buffer * mbit * MBIT, loss=loss, jitter=jitter, ack_quantum=ack_quantum
    )


def alone(
    path: Link,
    seconds: float,
    *,
    begin: float = SETTLED,
    offer: Offer | None = None,
    wake: tuple[float, float] = (0.0, 0.0),
    burst: float = BURST,
) -> tuple[World, Sender, float]:
    """One flow for so long; the world, the sender, the share of the link it used."""
    world = World(path)
    sender = world.add(controller(), offer, wake=wake, burst=burst)
    world.run(seconds)
    used = sender.rate(begin, seconds) / path.rates[-1][1]
    print(
        f"used {used:.3f}, queue p50 {1e3 * world.queue.delay(0.5, begin):.2f} ms,"
        f" p95 {1e3 * world.queue.delay(0.95, begin):.2f} ms,"
        f" max {1e3 * max(world.queue.delays):.1f} ms, lost {sender.totals.lost}"
    )
    return world, sender, used


# The bottleneck itself: a simulator that flatters proves nothing


class Fixed:
    """No controller: this window, this rate."""

    def __init__(self, window: int, pacing_rate: float) -> None:
        self.window, self.pacing_rate = window, pacing_rate

    def on_sample(self, sample: Sample) -> None:
        pass

    def on_spurious_loss(self) -> None:
        pass

    def inherit(self, other: object) -> None:
        pass


class Halving:
    """A loss-based neighbour: slow start, then one packet a round trip, 0.7 after a loss."""

    def __init__(self) -> None:
        self.window, self.pacing_rate = 32 * SIZE, 0.0
        self._threshold = math.inf
        self._recovered = 0

    def on_sample(self, sample: Sample) -> None:
        if sample.lost and sample.prior_delivered >= self._recovered:
            self.window = max(int(self.window * 0.7), MINIMUM_WINDOW_PACKETS * SIZE)
            self._threshold, self._recovered = self.window, sample.delivered
        elif self.window < self._threshold:
            self.window += sample.acked
        else:
            self.window += SIZE * sample.acked // self.window

    def on_spurious_loss(self) -> None:
        pass

    def inherit(self, other: object) -> None:
        pass


def test_the_bottleneck_queues_what_is_too_much() -> None:
    world = World(link(20, 0.04))
    window = int(2 * 20 * MBIT * 0.04)
    sender = world.add(Fixed(window, 0.0))
    world.run(5)
    assert sender.rate(1, 5) == pytest.approx(20 * MBIT, rel=0.01)
    # One BDP too much is one round trip of queue, less what waits to be acknowledged.
    assert 0.037 < world.queue.delay(0.5, 1) < 0.041


def test_the_bottleneck_passes_a_paced_flow_without_a_queue() -> None:
    samples: list[Sample] = []
    world = World(link(20, 0.04))
    sender = world.add(Fixed(10**6, 10 * MBIT), observe=samples.append)
    world.run(5)
    assert sender.rate(1, 5) == pytest.approx(10 * MBIT, rel=0.01)
    assert world.queue.delay(0.95, 1) < 0.002
    assert samples[-1].delivery_rate == pytest.approx(10 * MBIT, rel=0.03)
    assert samples[-1].in_flight == pytest.approx(10 * MBIT * 0.04, rel=0.1)


def test_the_bottleneck_drops_what_does_not_fit() -> None:
    world = World(link(20, 0.04, buffer=0.01))
    sender = world.add(Fixed(10**6, 30 * MBIT))
    world.run(5)
    assert sender.rate(1, 5) == pytest.approx(20 * MBIT, rel=0.02)
    assert sender.totals.lost / sender.totals.sent == pytest.approx(1 / 3, abs=0.03)
    assert max(world.queue.delays) < 0.0101


def test_the_bottleneck_changes_its_rate_when_told() -> None:
    world = World(link(20, 0.04, then=(3, 5)))
    sender = world.add(Fixed(int(20 * MBIT * 0.06), 0.0))
    world.run(6)
    assert sender.rate(1, 3) == pytest.approx(20 * MBIT, rel=0.01)
    assert sender.rate(3.2, 6) == pytest.approx(5 * MBIT, rel=0.01)


def test_the_bottleneck_tells_the_same_story_twice() -> None:
    stories = []
    for _ in range(2):
        _, sender, _ = alone(link(20, 0.04, loss=0.01, jitter=0.002), 4)
        stories.append(sender.totals)
    assert stories[0] == stories[1]


# As the only flow


@pytest.mark.parametrize(
    ("path", "least_used", "most_median"),
    [
        (link(20, 0.04), 0.95, 0.005),
        (link(20, 0.04, jitter=0.002), 0.95, 0.010),
        (link(20, 0.04, buffer=0.04), 0.95, 0.005),
        (link(20, 0.04, buffer=0.01), 0.95, 0.005),
        (link(20, 0.04, ack_quantum=0.01), 0.95, 0.005),
        (link(1, 0.04), 0.95, 0.015),
        (link(2, 0.1), 0.95, 0.010),
        (link(100, 0.005, buffer=0.1), 0.95, 0.002),
        (link(60, 0.008, jitter=0.008, ack_quantum=0.005, loss=0.002), 0.92, 0.006),
        (link(30, 0.05, jitter=0.01, loss=0.001), 0.92, 0.015),
    ],
    ids=[
        "plain",
        "jitter",
        "buffer of a BDP",
        "buffer of a quarter",
        "lumps of ACKs",
        "1 Mbit/s",
        "2 Mbit/s",
        "100 Mbit/s",
        "Wi-Fi",
        "LTE",
    ],
)
def test_it_uses_the_link_and_leaves_a_short_queue(
    path: Link, least_used: float, most_median: float
) -> None:
    world, _, used = alone(path, 12)
    assert used >= least_used
    assert world.queue.delay(0.5, SETTLED) <= most_median
    rtt = 2 * path.delay
    assert world.queue.delay(0.95, SETTLED) <= max(0.5 * rtt, 0.02)


def test_a_long_run_does_not_drift() -> None:
    world, sender, _ = alone(link(20, 0.04), 60)
    for begin in (20.0, 40.0):
        assert sender.rate(begin, begin + 20) >= 0.95 * 20 * MBIT
        assert world.queue.delay(0.5, begin, begin + 20) < 0.005


def test_the_start_takes_a_few_round_trips_and_no_flood() -> None:
    world, sender, _ = alone(link(50, 0.04), 2, begin=0.5)
    assert sender.rate(0.25, 0.5) >= 0.9 * 50 * MBIT
    assert max(world.queue.delays) < 0.06  # 1.5 BDP
    assert sender.totals.lost == 0


def test_a_start_into_a_shallow_buffer() -> None:
    _, sender, used = alone(link(50, 0.04, buffer=0.005), 5, begin=1)
    assert used >= 0.9
    assert sender.totals.lost / sender.totals.sent < 0.03


@pytest.mark.parametrize(
    ("loss", "least"), [(0.001, 0.95), (0.01, 0.85), (0.03, 0.75), (0.05, 0.6)]
)
def test_random_loss_is_not_congestion(loss: float, least: float) -> None:
    _, _, without = alone(link(50, 0.04), 6)
    _, _, used = alone(link(50, 0.04, loss=loss), 6)
    assert used >= least * without


def test_a_policer_does_not_get_more_and_more() -> None:
    """No buffer to speak of: only loss says that the rate is reached."""
    _, sender, used = alone(link(20, 0.04, buffer=0.003), 10)
    assert used >= 0.85
    assert sender.totals.lost / sender.totals.sent < 0.04


# Hosts that are the bottleneck


@pytest.mark.parametrize(
    ("mbit", "wake", "loss"),
    [
        (1000, (0.0, 0.0), 0.0),
        (5000, (0.0, 0.0), 0.0),
        (5000, (0.0, 0.0), 0.01),
        (5000, (20e-6, 0.5e-3), 0.001),
        (5000, (50e-6, 3e-3), 0.0),
    ],
)
def test_links_of_microseconds(mbit: float, wake: tuple[float, float], loss: float) -> None:
    path = link(mbit, 60e-6, buffer=0.01, loss=loss, jitter=wake[1] / 2)
    world, _, used = alone(path, 0.25, begin=0.05, wake=wake)
    assert used >= 0.9
    assert world.queue.delay(0.5, 0.05) < 0.002 + wake[1]


def test_late_wake_ups_and_a_small_bucket_are_no_spiral() -> None:
    """The bucket holds 4 milliseconds, the host wakes up every 8 on average."""
    path = link(5000, 60e-6, buffer=0.01)
    _, _, used = alone(path, 0.4, begin=0.1, wake=(50e-6, 16e-3))
    assert used >= 0.4


# When the path changes


@pytest.mark.parametrize(("before", "after"), [(50, 25), (50, 12), (50, 5)])
def test_a_slower_path_is_followed(before: float, after: float) -> None:
    world, sender, _ = alone(link(before, 0.04, then=(4, after)), 10)
    # What was in flight has to drain first: that is no fault of the controller.
    drained = 4 + 2 * 0.04 * before / after
    followed = drained + 15 * 0.04
    assert world.queue.delay(0.5, followed, 10) < 0.01
    assert world.queue.delay(0.95, followed + 0.5, 10) < 0.03
    assert sender.rate(drained, 10) >= 0.9 * after * MBIT


@pytest.mark.parametrize(("before", "after", "round_trips"), [(50, 100, 16), (25, 100, 18)])
def test_a_faster_path_is_followed(before: float, after: float, round_trips: int) -> None:
    _, sender, _ = alone(link(before, 0.04, then=(4, after)), 8)
    there = 4 + round_trips * 0.04
    assert sender.rate(there, there + 0.4) >= 0.9 * after * MBIT


def test_a_longer_path_is_followed() -> None:
    path = link(50, 0.04)
    path.longer = [(4.0, 0.02)]
    world, sender, _ = alone(path, 20)
    assert sender.rate(4, 15) >= 0.75 * 50 * MBIT
    assert sender.rate(15, 20) >= 0.9 * 50 * MBIT
    assert world.queue.delay(0.5, 15) < 0.01


def test_a_shorter_path_is_followed() -> None:
    path = link(50, 0.04)
    path.longer = [(0.0, 0.04), (4.0, 0.0)]
    world, sender, _ = alone(path, 8)
    assert sender.rate(4.5, 8) >= 0.9 * 50 * MBIT
    assert world.queue.delay(0.5, 5) < 0.01


def test_an_outage_costs_no_more_than_itself() -> None:
    path = link(50, 0.04)
    path.outages = [(4.0, 7.0)]
    _, sender, _ = alone(path, 10)
    back = next(when for when, _ in sender.totals.acked if when > 7)
    # From the first acknowledgement on: a round trip later all of the known rate is back.
    assert sender.rate(back + 0.05, back + 0.35) >= 0.9 * 50 * MBIT


# Little to send


def test_minutes_of_keystrokes_change_nothing() -> None:
    path = link(50, 0.04, jitter=0.001)
    offer = Offer(every=0.15, bulk=lambda now: now < 3 or now > 120)
    world = World(path)
    model = controller()
    sender = world.add(model, offer)
    world.run(3)
    rate, rtt = model.rate, model.min_rtt
    for _ in range(11):
        world.run(world.now + 10)
        assert model.rate == pytest.approx(rate, rel=0.05)
        assert model.min_rtt == pytest.approx(rtt, abs=0.0015)
    world.run(122)
    assert sender.rate(120.1, 120.4) >= 0.9 * 50 * MBIT  # no slow ramp
    assert world.queue.delay(0.95, 120) < 0.02


def test_keystrokes_alone_do_not_end_the_start() -> None:
    offer = Offer(every=0.15, bulk=lambda now: now > 60)
    world = World(link(50, 0.04, jitter=0.01))
    model = controller()
    sender = world.add(model, offer)
    world.run(60)
    assert model.phase is Phase.STARTUP
    assert model.window >= 32 * SIZE
    world.run(62)
    assert sender.rate(60.5, 62) >= 0.9 * 50 * MBIT


def test_a_stream_below_the_rate_has_no_queue() -> None:
    offer = Offer(every=0.01, burst=27, bulk=lambda now: now > 8)  # 30 Mbit/s in frames
    world, sender, _ = alone(link(50, 0.04), 10, offer=offer)
    assert world.queue.delay(0.95, 1, 8) < 0.003
    assert sender.rate(8.2, 10) >= 0.9 * 50 * MBIT


@pytest.mark.parametrize("idle", [0.05, 0.3])
def test_inner_flows_that_pause(idle: float) -> None:
    """A few inner flows are one aggregate that runs dry now and then."""
    world = World(link(20, 0.04))
    dry = [world.random.random() < idle for _ in range(1500)]
    sender = world.add(controller(), Offer(bulk=lambda now: not dry[int(now * 100)]))
    world.run(14)
    assert sender.rate(SETTLED, 14) >= 0.95 * (1 - idle) * 20 * MBIT
    assert world.queue.delay(0.5, SETTLED) < 0.01


# Neighbours


@pytest.mark.parametrize(
    ("path", "late"),
    [
        (link(50, 0.04), 0.0),
        (link(20, 0.04), 5.13),
        (link(20, 0.04, buffer=0.02), 5.13),
        (link(100, 0.005, buffer=0.1), 0.5),
    ],
    ids=["together", "one later", "shallow buffer", "short path"],
)
def test_two_of_a_kind_share(path: Link, late: float) -> None:
    world = World(path, seed=3)
    flows = [world.add(controller()), world.add(controller(), Offer(start=late))]
    seconds = 25.0 if path.rates[0][1] < 60 * MBIT else 12.0
    world.run(seconds + late)
    rates = [flow.rate(late + SETTLED, seconds + late) for flow in flows]
    print([round(rate / MBIT, 1) for rate in rates], 1e3 * world.queue.delay(0.5, late + 2))
    assert max(rates) <= 2.5 * min(rates)
    assert sum(rates) >= 0.95 * path.rates[0][1]
    assert world.queue.delay(0.5, late + SETTLED) < path.delay * 2  # below one BDP


@pytest.mark.parametrize("buffer", [0.04, 0.2])
def test_a_loss_based_neighbour_starves_nobody(buffer: float) -> None:
    world = World(link(20, 0.04, buffer=buffer))
    ours, other = world.add(controller()), world.add(Halving())
    world.run(25)
    rates = [flow.rate(5, 25) / (20 * MBIT) for flow in (ours, other)]
    print([round(rate, 2) for rate in rates])
    assert min(rates) >= 0.2
    assert sum(rates) >= 0.95


def test_cross_traffic_comes_and_goes() -> None:
    world = World(link(20, 0.04))
    sender = world.add(controller())
    world.constant(10 * MBIT, 4, 9)
    world.run(14)
    assert sender.rate(5, 9) >= 0.9 * 10 * MBIT
    assert sender.rate(10, 14) >= 0.92 * 20 * MBIT
    assert world.queue.delay(0.5, 5, 9) < 0.04
    assert world.queue.delay(0.5, 10) < 0.01
