"""Congestion control of one path: a model of the path, not a reaction to loss.

Two numbers describe a path: the rate of its bottleneck (the largest delivery rate of late) and
its round trip without a queue (the smallest one of late). Their product, the bandwidth-delay
product (BDP), is what the path itself can hold; whatever is in flight beyond it waits in a queue.
The controller paces at the measured rate, and now and then looks whether the model still holds
(draft-ietf-ccwg-bbr, from which most names come):

- `STARTUP` doubles the rate every round trip, until the rate stops growing, the round trip grows,
  or packets are lost. `DRAIN` then lets the queue run empty that this made.
- `CRUISE` sends at the measured rate.
- `UP` sends a little faster for a round trip. If the path has more to give, the measured rate
  grows, and `UP` follows again at once. `DOWN` takes the queue away that `UP` made.
- `PROBE_RTT` halves what is in flight for a round trip, when the smallest round trip has not been
  seen for seconds.

Loss alone says little: radio links lose packets that no queue dropped. A round trip that loses
more than 2% bounds what may be in flight, until the next look.

Differences from the draft, because this path carries a tunnel with its own fair queue in front:
queues are kept short (the window leaves little beyond the BDP, a shrunken rate is noticed within
a few round trips, the start ends at the first queue), and a host that acts in batches gets an
allowance for it, measured in bytes and not in round trips.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol

INITIAL_WINDOW_PACKETS = 32
"""Above RFC 9002's 10: a path that takes over a running flow must not start with a stall."""
MINIMUM_WINDOW_PACKETS = 4
"""The draft's MinPipeCwnd: fewer, and delayed acknowledgements stop the flow."""

STARTUP_GAIN = 2.77
"""4 ln 2, the draft's: the least pacing gain that doubles the delivered rate in a round trip."""
STARTUP_WINDOW_GAIN = 2.0
"""The draft's: room for the acknowledgements of two round trips."""
STARTUP_GROWTH = 1.25
"""A round trip of the start that brings less than this factor found no more rate..."""
STARTUP_ROUNDS = 3
"""...and after so many of them the path is full (the draft's; one may be a hiccup)."""
STARTUP_SAMPLES = 8
"""Round trips measured before their smallest one is believed (HyStart++, RFC 9406)."""
STARTUP_LOSS = 0.2
"""Lost per acknowledged byte of a round trip that ends the start even while the rate grows: the
doubled rate overflows a shallow buffer with a half."""
DRAIN_GAIN = 0.5
"""Empties in two round trips the BDP that the start's last one put into the queue."""

UP_GAINS = (1.25, 1.5, 2.0)
"""The draft's first; each look that found more rate is followed by a bolder one."""
UP_SUCCESS = 1.08
"""Growth of the rate that counts as found: a third of what was tried, and more than jitter and
lumps of acknowledgements make of a steady rate (2-5% in simulation)."""
DOWN_GAIN = 0.75
"""Takes the quarter of a BDP back that `UP` put in, in one round trip."""
DOWN_TARGET = 0.97
"""`DOWN` ends below one BDP: the measured rate is the largest of many, so 1-2% too large, and
the queue has to run empty to show the smallest round trip."""
CRUISE_GAIN = 1.0
"""Not less: what the rate is too large by, `DOWN` takes away in every cycle."""
CRUISE_ROUNDS = 6.0
"""Round trips between looks, as BBRv1: a look every 8 round trips costs a quarter of a BDP of
queue for one of them."""
CRUISE_MINIMUM = 0.02
"""Seconds. On links of microseconds the rounds are those of the scheduler, not of the path."""
ROUND_MINIMUM = 0.002
"""Seconds. Rates over less time than this measure the batches of two hosts, not a link; a host
that is scheduled in slices of a millisecond has to be averaged over more than one."""

WINDOW_GAIN = 1.15
"""The window while pacing governs. It bounds the queue when the rate is overestimated; less, and
the jitter of round trips would make the window the limit."""
UP_BOUND_GAIN = 1.1
"""How far a look may go beyond what was too much before. If nothing is lost, the bound grows."""
UP_WINDOW_MARGIN = 0.25
"""BDPs of window above the gain of a look, so that the pacing decides there as well."""
CROWDED_WINDOW_GAIN = 1.35
"""When the queue stays although we drained ours, someone else fills it. With the draft's 2.0 two
such controllers wait behind a whole BDP; with 1.25 a loss-based flow in a deep buffer leaves a
third of the link, with 1.35 two fifths (both in simulation)."""
PROBE_RTT_GAIN = 0.5
"""The draft's: half a BDP empties any queue of ours and still uses half of the link."""

ALLOWANCE_SECONDS = 0.001
"""Times the rate: a pacer's burst and a delayed acknowledgement, each of a millisecond at most."""
ALLOWANCE_BYTES = 3 * 65536
"""Super-packets under way in the sender, in the receiver and in the acknowledgement..."""
ALLOWANCE_BYTES_SECONDS = 0.001
"""...but no more than this times the rate: on a slow link these bytes would be a queue."""
AGGREGATION_SECONDS = 0.025
"""Times the rate, at most, for acknowledgements that come in lumps: Wi-Fi and cable hold them
back for 5-20 ms."""

PACER_BURST = 0.004
"""Seconds of the pacing rate that the engine's bucket holds: what a wake-up later than this
finds in it is less than was due. Where the round trip is short, the samples come when the host
wakes up, and the rate is raised by what would be missing; otherwise the rate measured would be
that of the bucket, and with it the next bucket smaller: a spiral to nothing."""
WAKE_WEIGHT = 1 / 16
"""Of the newest sample in the smoothed time between two."""
WAKE_LIMIT = 8.0
"""Beyond this there is no pacing to speak of; the window bounds the queue anyhow."""

LOSS_LIMIT = 0.02
"""Of the packets of a round trip (the draft's): less is not congestion."""
LOSS_MARGIN = 3
"""Packets on top: at 1% random loss, 71 packets a round trip lose more than 2% in every sixth."""
LOSS_BETA = 0.7
"""The draft's: what a lossy round trip leaves of the bound, at the least."""

DELAY_MARGIN = 0.004
DELAY_FRACTION = 0.125
"""A round trip longer than the smallest by these seconds or this fraction, whichever is more, has
met a queue (HyStart++, RFC 9406, without its upper limit)."""
SHRINK_RATIO = 0.85
SHRINK_ROUNDS = 2
"""So many round trips with a queue and below this part of the rate: the path has become slower.
The largest rate of late would only say so many round trips later."""

RTT_WINDOW = 5.0
"""Seconds after which the smallest round trip has to be seen again (the draft's)."""
RTT_TOLERANCE = 1 / 32
RTT_TOLERANCE_SECONDS = 0.0003
"""As a fraction and in seconds: seen again. More, and a standing queue would become the model."""
PROBE_RTT_LIMIT = 0.3
"""Seconds that `PROBE_RTT` may take, if what is in flight does not shrink."""

OUTAGE_ROUNDS = 3
OUTAGE_SECONDS = 0.25
"""A silence longer than both of these was an outage or idleness; what it lost was no queue's."""


@dataclass(slots=True)  # not frozen: that is five times as expensive to build
class Sample:
    """What a batch of acknowledgements said about a path."""

    now: float  # seconds
    acked: int  # bytes newly acknowledged since the last sample
    lost: int  # bytes newly declared lost since the last sample
    in_flight: int  # bytes outstanding on this path after both
    rtt: float  # seconds: the smallest measured since the last sample; 0.0: none
    delivery_rate: float  # bytes/s: the largest rate sample since the last one; 0.0: none
    app_limited: bool  # that rate was sampled while there was nothing to send
    delivered: int  # bytes acknowledged on this path so far
    prior_delivered: int  # `delivered` when the newest acknowledged packet was sent


class Controller(Protocol):
    """How much may be outstanding on a path, and how fast it may be sent."""

    window: int  # bytes that may be outstanding
    pacing_rate: float  # bytes/s; 0.0: not paced yet

    def on_sample(self, sample: Sample) -> None:
        """After each batch of acknowledgements or losses."""

    def on_spurious_loss(self) -> None:
        """The last losses were only reordering: take back what they did."""

    def inherit(self, other: Controller) -> None:
        """Go on where `other` stands: the same path, only the peer's port has changed
        (RFC 9000 section 9.4)."""


class Phase(enum.Enum):
    STARTUP = "startup"
    DRAIN = "drain"
    CRUISE = "cruise"
    UP = "up"
    DOWN = "down"
    PROBE_RTT = "probe_rtt"


STARTUP, DRAIN, CRUISE, UP, DOWN, PROBE_RTT = Phase


class ModelController:
    """See the module. `max_datagram_size` in bytes."""

    def __init__(self, *, max_datagram_size: int) -> None:
        self._packet = max_datagram_size
        self.window = INITIAL_WINDOW_PACKETS * max_datagram_size
        self.pacing_rate = 0.0
        self.phase = STARTUP
        self.rate = 0.0  # bytes/s of the bottleneck; 0.0: not measured
        self.min_rtt = math.inf  # seconds
        # The two halves of each sliding window: the finished one and the running one.
        self._rate_before = self._rate_since = 0.0
        self._rtt_before = self._rtt_since = math.inf
        self._rtt_window = 0.0  # when the running one began
        self._extra_before = self._extra = 0.0
        self._last = 0.0
        self._round_end = 0
        self._round_began = 0.0
        self._round_acked = self._round_lost = self._round_flight = self._round_samples = 0
        self._round_rtt, self._round_rate, self._round_limited = math.inf, 0.0, False
        self._full_rate = 0.0
        self._full_rounds = 0
        self._phase_began = 0.0
        self._up_before = 0.0  # rate when this look began
        self._up_step = 0
        self._up_flight = 0  # the most in flight since this look began
        self._cycle_rtt = math.inf
        self._cycle_limited = True  # only rates without enough to send were seen in this cycle
        self._cycle_lossy = False
        self._crowded = False
        self._probe_ends = 0.0
        self._high = math.inf  # bytes in flight that were too many in a look
        self._low = math.inf  # bytes in flight that were too many since the last look
        self._high_before = math.inf  # the bound before the last losses
        self._shrink_armed = False
        self._shrink_rate = 0.0
        self._shrink_rounds = 0
        self._span_began = 0.0
        self._span_delivered = 0
        self._ack_since = 0.0
        self._ack_bytes = 0
        self._wake = 0.0  # seconds between samples, smoothed

    # What the engine calls

    def on_sample(self, sample: Sample) -> None:
        now, rtt, acked = sample.now, sample.rtt, sample.acked
        lost = sample.lost
        silence = now - self._last
        if silence > OUTAGE_SECONDS and silence > OUTAGE_ROUNDS * self.min_rtt:
            self._resume(now, silence)
            lost = 0
        else:
            self._wake += (silence - self._wake) * WAKE_WEIGHT
        self._last = now

        if rtt > 0.0:
            self._round_samples += 1
            if rtt < self._round_rtt:
                self._round_rtt = rtt
                if rtt < self._rtt_since:
                    self._rtt_since = rtt
                    if rtt < self.min_rtt:
                        self.min_rtt = rtt
        self._round_acked += acked
        self._round_lost += lost
        if sample.in_flight > self._round_flight:
            self._round_flight = sample.in_flight
            if sample.in_flight > self._up_flight:
                self._up_flight = sample.in_flight

        rate = sample.delivery_rate
        if rate > 0.0:
            if self.min_rtt < ROUND_MINIMUM and self.phase is not STARTUP:
                rate = self._smooth(now, sample.delivered)
            if sample.app_limited:
                self._round_limited = True
            elif rate > self._round_rate:
                self._round_rate = rate
            if rate > self._rate_since and (not sample.app_limited or rate > self.rate):
                self._rate_since = rate
                if rate > self.rate:
                    self.rate = rate

        if sample.prior_delivered >= self._round_end and now - self._round_began >= ROUND_MINIMUM:
            self._end_round(sample)

        # Acknowledgements beyond what the rate explains came in a lump.
        self._ack_bytes += acked
        extra = self._ack_bytes - self.rate * (now - self._ack_since)
        if extra <= 0.0:
            self._ack_since, self._ack_bytes = now, 0
        elif extra > self._extra:
            self._extra = extra

        phase = self.phase
        if phase is STARTUP:
            # Not only at the end of the round trip: that doubles the queue once more.
            if (
                self._round_samples >= STARTUP_SAMPLES
                and self._round_rate > 0.0
                and self._queued(self._round_rtt)
            ):
                self._drain(now)
        elif phase is CRUISE:
            took = now - self._phase_began
            if took > CRUISE_MINIMUM and took > CRUISE_ROUNDS * self.min_rtt:
                self._up_step = 0
                self._look(now)
            elif self.rate > UP_SUCCESS * self._up_before:
                self._found(now)
        else:
            self._step(sample)
        self._steer(acked)

    def on_spurious_loss(self) -> None:
        self._low, self._high = math.inf, self._high_before
        self._cycle_lossy = False
        self._steer(0)

    def inherit(self, other: Controller) -> None:
        if isinstance(other, ModelController):
            for name, value in vars(other).items():
                if name != "_packet":
                    setattr(self, name, value)
            # The counts of bytes may begin anew.
            self._round_end = 0
            self._span_began = 0.0
        else:
            self.window, self.pacing_rate = other.window, other.pacing_rate

    # Round trips

    def _reset_round(self) -> None:
        self._round_acked = self._round_lost = self._round_flight = self._round_samples = 0
        self._round_rtt, self._round_rate, self._round_limited = math.inf, 0.0, False

    def _queued(self, rtt: float) -> bool:
        margin = self.min_rtt * DELAY_FRACTION
        return rtt > self.min_rtt + (margin if margin > DELAY_MARGIN else DELAY_MARGIN)

    def _end_round(self, sample: Sample) -> None:
        now = sample.now
        self._round_end, self._round_began = sample.delivered, now
        rtt, rate = self._round_rtt, self._round_rate
        queued = rtt < math.inf and self._queued(rtt)
        if rtt < self._cycle_rtt:
            self._cycle_rtt = rtt
        lost = self._round_lost
        lossy = lost > 0 and lost > (
            LOSS_LIMIT * (self._round_acked + lost) + LOSS_MARGIN * self._packet
        )
        if lossy:
            self._on_lossy_round()
        if rate > 0.0:
            if self.phase is STARTUP:
                self._judge_start(now, rate, lossy, lost > STARTUP_LOSS * self._round_acked)
            else:
                self._judge_shrink(rate, queued)
            if not self._round_limited:
                self._cycle_limited = False
        if now - self._rtt_window > RTT_WINDOW and self.phase is not PROBE_RTT:
            self._judge_rtt(now)
        self._ack_since, self._ack_bytes = now, 0
        self._reset_round()

    def _judge_start(self, now: float, rate: float, lossy: bool, flooded: bool) -> None:
        if rate >= self._full_rate * STARTUP_GROWTH:
            self._full_rate, self._full_rounds = rate, 0
            full = flooded  # some loss does not matter while the rate still grows
        else:
            self._full_rounds += 1
            full = lossy or self._full_rounds >= STARTUP_ROUNDS
        if full:
            self._drain(now)
        else:
            self._high = math.inf

    def _judge_shrink(self, rate: float, queued: bool) -> None:
        if not queued:
            self._shrink_armed, self._shrink_rounds, self._shrink_rate = True, 0, 0.0
        elif rate < SHRINK_RATIO * self.rate:
            self._shrink_rounds += 1
            self._shrink_rate = max(self._shrink_rate, rate)
            # Armed: the queue ran empty since the last time. Otherwise it is not ours, and to
            # give way to it again and again would be to starve.
            if self._shrink_armed and self._shrink_rounds >= SHRINK_ROUNDS:
                self.rate = self._rate_before = self._rate_since = self._shrink_rate
                self._extra_before = self._extra = 0.0
                self._shrink_armed, self._shrink_rounds, self._shrink_rate = False, 0, 0.0
        else:
            self._shrink_rounds, self._shrink_rate = 0, 0.0

    def _judge_rtt(self, now: float) -> None:
        """The running window of the smallest round trip is over."""
        since = self._rtt_since
        if since == math.inf:
            self._rtt_window = now
            return
        seen = since <= self.min_rtt + max(self.min_rtt * RTT_TOLERANCE, RTT_TOLERANCE_SECONDS)
        if seen or self._cycle_limited or self.phase is STARTUP:
            # With little in flight the queue, if there is one, is not ours to empty.
            self.min_rtt = min(since, self._rtt_before) if seen else since
            self._rtt_before = since
        else:
            self._enter(PROBE_RTT, now)
            self._probe_ends = 0.0
        self._rtt_since, self._rtt_window = math.inf, now

    def _on_lossy_round(self) -> None:
        if not self._cycle_lossy:
            self._high_before = self._high
        self._cycle_lossy = True
        flight = max(self._round_flight, MINIMUM_WINDOW_PACKETS * self._packet)
        if self.phase in (STARTUP, UP, DOWN):  # the losses of a look are seen a round trip later
            flight = max(self._up_flight, flight)
            # What it delivers in a round trip the path can hold, at any loss.
            held = self.rate * self.min_rtt if self.min_rtt < math.inf else 0.0
            self._high = max(LOSS_BETA * flight, min(self._round_acked, flight), held)
        else:
            bound = min(self._low, flight)
            self._low = max(LOSS_BETA * bound, min(self._round_acked, bound))

    # The cycle

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase, self._phase_began = phase, now

    def _drain(self, now: float) -> None:
        """The start is over."""
        self._extra = 0.0  # measured against a rate that was still growing
        self._enter(DRAIN, now)

    def _look(self, now: float) -> None:
        """Begin to look for more rate."""
        if not self._cycle_limited:
            # A sliding window of one to two cycles in which there was enough to send.
            self._rate_before, self._rate_since = self._rate_since, 0.0
            self.rate = self._rate_before
            self._extra_before, self._extra = self._extra, 0.0
            self._crowded = self._cycle_rtt < math.inf and self._queued(self._cycle_rtt)
            if not self._cycle_lossy:
                self._high *= UP_GAINS[0]
                self._high_before = self._high
        self._cycle_limited, self._cycle_lossy, self._cycle_rtt = True, False, math.inf
        self._low = math.inf
        self._up_before, self._up_flight = self.rate, 0
        self._enter(UP, now)

    def _found(self, now: float) -> None:
        """The last look found more rate: look at once for still more."""
        self._up_step = min(self._up_step + 1, len(UP_GAINS) - 1)
        self._look(now)

    def _step(self, sample: Sample) -> None:
        """The phases that end by what is in flight."""
        now, phase = sample.now, self.phase
        took = now - self._phase_began
        round_trip = self.min_rtt if self.min_rtt > ROUND_MINIMUM else ROUND_MINIMUM
        full = self.rate * max(self.min_rtt, ALLOWANCE_SECONDS)
        if phase is UP:
            if took > round_trip:
                self._enter(DOWN, now)
        elif phase is DOWN:
            if self.rate > UP_SUCCESS * self._up_before:
                self._found(now)
            elif sample.in_flight <= DOWN_TARGET * full or took > 3 * round_trip:
                self._enter(CRUISE, now)
        elif phase is DRAIN:
            if sample.in_flight <= full or took > 6 * round_trip:
                # The start may have ended early: look again soon.
                self._up_before = self.rate
                self._enter(CRUISE, now - (CRUISE_ROUNDS - 1) * self.min_rtt)
        elif self._probe_ends:
            if now >= self._probe_ends:
                if self._rtt_since < math.inf:
                    self.min_rtt = self._rtt_before = self._rtt_since
                self._rtt_since, self._rtt_window = math.inf, now
                self._enter(CRUISE, now)
        elif sample.in_flight <= self.window or took > PROBE_RTT_LIMIT:
            self._probe_ends = now + round_trip

    def _resume(self, now: float, silence: float) -> None:
        """After an outage or idleness: go on at the known rate."""
        self._reset_round()
        self._ack_since, self._ack_bytes = now, 0
        self._span_began = 0.0
        self._low = math.inf
        if silence > RTT_WINDOW / 2:
            self._rtt_window += silence  # nothing was to be seen meanwhile
        if self.phase is not STARTUP:
            self._up_step, self._up_before = 0, self.rate
            self._enter(CRUISE, now)

    def _smooth(self, now: float, delivered: int) -> float:
        """The rate over at least ROUND_MINIMUM; 0.0: not long enough yet."""
        took = now - self._span_began
        if took < ROUND_MINIMUM:
            return 0.0
        rate = (delivered - self._span_delivered) / took if self._span_began else 0.0
        self._span_began, self._span_delivered = now, delivered
        return rate

    # What follows from it

    def _steer(self, acked: int) -> None:
        rate, min_rtt, packet = self.rate, self.min_rtt, self._packet
        phase = self.phase
        if min_rtt == math.inf:
            return
        if phase is STARTUP:
            initial = INITIAL_WINDOW_PACKETS * packet / min_rtt
            self.pacing_rate = STARTUP_GAIN * (rate if rate > initial else initial)
        elif phase is CRUISE:
            self.pacing_rate = CRUISE_GAIN * rate
        elif phase is UP:
            self.pacing_rate = UP_GAINS[self._up_step] * rate
        elif phase is DOWN:
            self.pacing_rate = DOWN_GAIN * rate
        elif phase is DRAIN:
            self.pacing_rate = DRAIN_GAIN * rate
        else:
            self.pacing_rate = rate

        if self._wake > PACER_BURST and min_rtt < ROUND_MINIMUM:
            late = self._wake / PACER_BURST
            self.pacing_rate *= late if late < WAKE_LIMIT else WAKE_LIMIT
        bdp = rate * min_rtt
        floor = rate * ALLOWANCE_BYTES_SECONDS
        if floor > ALLOWANCE_BYTES:
            floor = ALLOWANCE_BYTES
        floor += rate * ALLOWANCE_SECONDS + 2 * packet
        if phase is STARTUP:
            window = self.window + acked
            limit = STARTUP_WINDOW_GAIN * bdp + floor
            if window > limit:
                window = int(limit)
            least = INITIAL_WINDOW_PACKETS * packet
            self.window = window if window > least else least
            return

        allowance = self._extra if self._extra > self._extra_before else self._extra_before
        if allowance > AGGREGATION_SECONDS * rate:
            allowance = AGGREGATION_SECONDS * rate
        if allowance < floor:
            allowance = floor
        bound = self._high
        if phase is UP:
            gain = UP_GAINS[self._up_step] + UP_WINDOW_MARGIN
            bound *= UP_BOUND_GAIN
        elif phase is PROBE_RTT:
            gain = PROBE_RTT_GAIN
        else:
            gain = WINDOW_GAIN
        if self._crowded and phase is not PROBE_RTT and gain < CROWDED_WINDOW_GAIN:
            gain = CROWDED_WINDOW_GAIN
        if bound > self._low:
            bound = self._low
        most = gain * bdp + allowance
        if most > bound:
            most = bound
        least = MINIMUM_WINDOW_PACKETS * packet
        self.window = int(most) if most > least else least
