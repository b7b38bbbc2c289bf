"""One bottleneck, a few senders, every packet: what a congestion controller does to a link.

    sender --pacer--> [ drop-tail buffer | rate ] --delay--> receiver
       ^                                                        |
       +------- wake-ups <--- aggregation <--- delay <--- ACK --+

The queue is first in, first out, and what the link will do is known beforehand. So the fate of a
packet is known the moment it is sent, and only ACKs and pacing timers are events. Rate samples
are made as the engine makes them (draft-cheng-iccrg-delivery-rate-estimation).
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tunnel.datapath.congestion import Controller, Sample

PACKET = 1400  # bytes
ACK_PACKETS = 32
ACK_DELAY = 0.001  # seconds
REORDERING = 3  # packets (RFC 9002 6.1.1)
# As the engine's pacer (core/connection.c): seconds of the rate that the bucket holds while data
# waits, at most and at least; the rate, in bytes/s, from which on it is the larger.
BURST = 0.004
BURST_SLOW = 0.002
FAST_RATE = 25e6
STEP = 0.0005  # seconds of the rate that are gathered before the next burst: as the engine
TIMER_BYTES = 65536  # the pacing timer waits for that much credit at most
PTO_MAX = 1.0  # seconds


@dataclass
class Link:
    """`rates`: (from second, bytes/s), the first from 0.0. Delays in seconds, one way.

    `outages`: (from, to) seconds in which everything that enters is lost.
    `ack_quantum`: ACKs reach the sender at multiples of it only (Wi-Fi, cable modems).
    """

    rates: Sequence[tuple[float, float]]
    delay: float
    buffer: float  # bytes
    loss: float = 0.0
    ack_quantum: float = 0.0
    jitter: float = 0.0  # at most that long until the receiver looks; never reorders
    outages: Sequence[tuple[float, float]] = ()
    longer: Sequence[tuple[float, float]] = ()  # (from second, seconds more on the way there)


@dataclass(slots=True)
class Packet:
    number: int
    at: float
    delivered: int
    delivered_at: float
    first_sent: float
    app_limited: bool
    acked: bool = False


class Queue:
    """The bottleneck: when does what enters now come out at the other end of the buffer?"""

    def __init__(self, link: Link, random: Random) -> None:
        self.link, self._random = link, random
        self._busy = 0.0
        self._rate = link.rates[0][1]
        self._changes = [when for when, _ in link.rates]
        self._until = self._changes[1] if len(self._changes) > 1 else math.inf
        self.passed = 0  # bytes
        self.dropped = 0  # packets, for want of room
        self.delays = array("d")
        self.times = array("d")
        self._noted = -1.0

    def enter(self, now: float, size: int) -> float:
        """Seconds of the departure; 0.0: lost."""
        link = self.link
        if now - self._noted > 0.0005:
            self._noted = now
            self.times.append(now)
            self.delays.append(max(self._busy - now, 0.0))
        for begin, end in link.outages:
            if begin <= now < end:
                return 0.0
        start = self._busy if self._busy > now else now
        if start >= self._until or self._busy >= self._until:
            self._step(start)
        rate = self._rate
        if (start - now) * rate + size > link.buffer:  # near a change of rate: approximately
            self.dropped += 1
            return 0.0
        done = start + size / rate
        if done > self._until:  # the rest at the next rate
            rest = size - (self._until - start) * rate
            self._step(self._until)
            done = self._changes[bisect_right(self._changes, start)] + rest / self._rate
        self._busy = done
        self.passed += size
        if link.loss and self._random.random() < link.loss:
            return 0.0
        return done

    def _step(self, at: float) -> None:
        index = bisect_right(self._changes, at)
        self._rate = self.link.rates[index - 1][1]
        self._until = self._changes[index] if index < len(self._changes) else math.inf

    def delay(self, fraction: float, begin: float = 0.0, end: float = math.inf) -> float:
        """A quantile of the queue's delay in seconds, over the time from `begin` to `end`."""
        steps = range(1, len(self.times))
        # Weighted by time: a sender that holds its breath leaves fewer marks.
        weighted = [
            (self.delays[i], min(self.times[i] - self.times[i - 1], 0.05))
            for i in steps
            if begin <= self.times[i] < end
        ]
        weighted.sort()
        rest = fraction * sum(weight for _, weight in weighted)
        for value, weight in weighted:
            rest -= weight
            if rest <= 0:
                return value
        return 0.0


@dataclass
class Offer:
    """What a sender has to send: bulk from `start` to `stop`, and/or `burst` packets every
    `every` seconds."""

    start: float = 0.0
    stop: float = math.inf
    every: float = 0.0
    burst: int = 1
    bulk: Callable[[float], bool] | None = None  # None: bulk all the time, unless `every`


@dataclass
class Totals:
    sent: int = 0  # packets
    lost: int = 0  # packets
    timeouts: int = 0
    samples: int = 0
    acked: list[tuple[float, int]] = field(default_factory=list)  # (second, bytes so far)


class Sender:
    """One flow. `wake`: a wake-up comes late by a random time between these (seconds);
    `burst`: how many seconds of the pacing rate the bucket holds."""

    def __init__(
        self,
        world: World,
        controller: Controller,
        offer: Offer,
        wake: tuple[float, float] = (0.0, 0.0),
        observe: Callable[[Sample], None] | None = None,
        burst: float = BURST,
    ) -> None:
        self.controller, self.offer, self.totals = controller, offer, Totals()
        self._world, self._wake, self._observe, self._burst = world, wake, observe, burst
        self._sent: deque[Packet] = deque()  # not settled yet, in order
        self._number = 0
        self.in_flight = 0
        self.delivered = 0
        self._delivered_at = 0.0
        self._first_sent = 0.0
        self._limited_until = 0  # bytes delivered; 0: not limited by what there is to send
        self._srtt = 0.0
        self._tokens = 0.0
        self._refilled = offer.start
        self._queued = 0  # packets of a bursty source
        self._asleep_until = math.inf
        self._inbox: deque[tuple[float, list[Packet]]] = deque()
        self._group: list[Packet] = []
        self._group_end = 0.0
        self._pto_at = math.inf
        self._pto_count = 0
        self._newest = -1
        self._arrived = 0.0
        world.at(offer.start, self._begin)

    # What happens at the sender

    def _begin(self) -> None:
        if self.offer.every:
            self._queued += self.offer.burst
            if self._world.now + self.offer.every < self.offer.stop:
                self._world.at(self._world.now + self.offer.every, self._begin)
        self._act()

    def _has_data(self) -> bool:
        offer = self.offer
        if self._queued:
            return True
        if offer.bulk is not None:
            return offer.bulk(self._world.now)
        return not offer.every and self._world.now < offer.stop

    def wake_at(self, when: float) -> None:
        low, high = self._wake
        if high:
            when += self._world.random.uniform(low, high)
        if when < self._asleep_until:
            self._asleep_until = when
            self._world.at(when, self._woken)

    def _woken(self) -> None:
        if self._world.now >= self._asleep_until:
            self._asleep_until = math.inf
            self._act()

    def _act(self) -> None:
        now = self._world.now
        if self._inbox and self._inbox[0][0] <= now:
            self._read(now)
        if now >= self._pto_at and self._sent:
            self._pto_count += 1
            self.totals.timeouts += 1
            self._send(now)
            self._arm(now)
        self._fill(now)
        if self._inbox:
            self.wake_at(max(self._inbox[0][0], now))

    def _fill(self, now: float) -> None:
        controller, size = self.controller, PACKET
        rate, window = controller.pacing_rate, controller.window
        seconds = self._burst if rate > FAST_RATE else min(self._burst, BURST_SLOW)
        burst = max(3 * size, rate * seconds)
        self._tokens = min(self._tokens + (now - self._refilled) * rate, burst)
        self._refilled = now
        began = self.in_flight
        while self.in_flight + size <= window:
            if rate and self._tokens <= 0:
                credit = min(max(size, rate * STEP), TIMER_BYTES)
                self.wake_at(now + (credit - self._tokens) / rate)
                break
            if not self._has_data():
                self._limited_until = self.delivered + self.in_flight or 1
                if self.offer.bulk is not None and now < self.offer.stop:
                    self.wake_at(now + 0.001)
                break
            if self._queued:
                self._queued -= 1
            self._send(now)
            self._tokens -= size
        if self.in_flight > began:
            self._arm(now)

    def _send(self, now: float) -> None:
        if not self.in_flight:
            self._first_sent = self._delivered_at = now
        packet = Packet(
            self._number,
            now,
            self.delivered,
            self._delivered_at,
            self._first_sent,
            self._limited_until > 0,
        )
        self._number += 1
        self._sent.append(packet)
        self.in_flight += PACKET
        self.totals.sent += 1
        out = self._world.queue.enter(now, PACKET)
        if out:
            self._arrive(packet, out)

    def _arm(self, now: float) -> None:
        if not self.in_flight:
            self._pto_at = math.inf
            return
        wait = (2 * self._srtt + 0.005 if self._srtt else 0.2) * 2**self._pto_count
        self._pto_at = now + min(wait, PTO_MAX)
        self._world.pto(self._pto_at, self)

    def on_pto(self) -> None:
        if self._pto_at == math.inf:
            return
        if self._world.now < self._pto_at:
            self._world.pto(self._pto_at, self)
        else:
            self._act()

    def _read(self, now: float) -> None:
        acked = lost = prior = 0
        rtt, best, limited = 0.0, 0.0, False
        sent = self._sent
        while self._inbox and self._inbox[0][0] <= now:
            group = self._inbox.popleft()[1]
            for packet in group:
                packet.acked = True
            self.delivered += PACKET * len(group)
            self._delivered_at = now
            acked += PACKET * len(group)
            newest = group[-1]
            self._newest = newest.number
            measured = now - newest.at
            if not rtt or measured < rtt:
                rtt = measured
            took = max(newest.at - newest.first_sent, now - newest.delivered_at)
            self._first_sent = newest.at
            prior = newest.delivered
            if took > 0:
                rate = (self.delivered - newest.delivered) / took
                if rate > best:
                    best, limited = rate, newest.app_limited
        if self.delivered > self._limited_until:
            self._limited_until = 0
        while sent and (sent[0].acked or sent[0].number <= self._newest - REORDERING):
            if not sent.popleft().acked:
                lost += 1
        self.in_flight -= acked + lost * PACKET
        self._srtt = self._srtt * 0.875 + rtt * 0.125 if self._srtt else rtt
        self._pto_count = 0
        self._arm(now)
        self.totals.lost += lost
        self.totals.samples += 1
        self.totals.acked.append((now, self.delivered))
        sample = Sample(
            now,
            acked,
            lost * PACKET,
            self.in_flight,
            rtt,
            best,
            limited,
            self.delivered,
            prior,
        )
        self.controller.on_sample(sample)
        if self._observe is not None:
            self._observe(sample)

    # What happens at the receiver, known when the packet leaves

    def _arrive(self, packet: Packet, out: float) -> None:
        link = self._world.queue.link
        at = out + link.delay
        for when, more in link.longer:
            if out >= when:
                at = out + link.delay + more
        if link.jitter:
            at += self._world.random.uniform(0.0, link.jitter)
        if at < self._arrived:
            at = self._arrived
        self._arrived = at
        if self._group and at > self._group_end:
            self._acknowledge(self._group_end)
        if not self._group:
            self._group_end = end = at + ACK_DELAY
            group = self._group
            self._world.at(end, lambda: self._flush(group))
        self._group.append(packet)
        if len(self._group) >= ACK_PACKETS:
            self._acknowledge(at)

    def _flush(self, group: list[Packet]) -> None:
        if group is self._group and group:
            self._acknowledge(self._world.now)

    def _acknowledge(self, at: float) -> None:
        link = self._world.queue.link
        at += link.delay
        if link.ack_quantum:
            at = math.ceil(at / link.ack_quantum) * link.ack_quantum
        self._inbox.append((at, self._group))
        self._group = []
        if len(self._inbox) == 1:
            self.wake_at(at)

    def rate(self, begin: float, end: float) -> float:
        """Bytes/s acknowledged from `begin` to `end`."""
        times = [when for when, _ in self.totals.acked]
        first, last = bisect_right(times, begin), bisect_right(times, end)
        total = [0, *(so_far for _, so_far in self.totals.acked)]
        return (total[last] - total[first]) / (end - begin)


class World:
    """The clock, the bottleneck, and who sends through it."""

    def __init__(self, link: Link, *, seed: int = 1) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.queue = Queue(link, self.random)
        self.senders: list[Sender] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._pto_armed: set[int] = set()

    def add(
        self,
        controller: Controller,
        offer: Offer | None = None,
        *,
        wake: tuple[float, float] = (0.0, 0.0),
        observe: Callable[[Sample], None] | None = None,
        burst: float = BURST,
    ) -> Sender:
        sender = Sender(self, controller, offer or Offer(), wake, observe, burst)
        self.senders.append(sender)
        return sender

    def constant(self, rate: float, begin: float, end: float) -> None:
        """Cross traffic that heeds nothing: bytes/s, from `begin` to `end`."""
        step = PACKET / rate

        def send() -> None:
            self.queue.enter(self.now, PACKET)
            if self.now + step < end:
                self.at(self.now + step, send)

        self.at(begin, send)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def pto(self, when: float, sender: Sender) -> None:
        """One event per sender at a time; it looks again when it fires early."""
        key = id(sender)
        if key in self._pto_armed:
            return
        self._pto_armed.add(key)

        def fire() -> None:
            self._pto_armed.discard(key)
            sender.on_pto()

        self.at(when, fire)

    def run(self, until: float) -> None:
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, what = heapq.heappop(events)
            what()
        self.now = until
