"""A simulated MQTT broker on a fake clock, and the network to it.

::

    client --- link (delay, jitter, reordering, loss, duplication) --- broker --- link --- client

A client is anything with the verbs of `tunnel.rendezvous` (see `Client`). It is connected when
`attach` returns, and sees a clock of its own, `skew` seconds off. As with MQTT 3.1.1, nothing is
retained, a subscription counts from when it reaches the broker, publications on one connection keep
their order (unless `reordering`), and a connection that breaks without a word makes the broker
publish its will. `loss` is what real brokers do when they restart, or when a queue is full.

A hostile broker is one with `meddle`: it is given every publication and returns those that are
distributed in its place. `publish` lets it, or a client that got hold of a topic, say anything.

Nothing sleeps: `run` jumps from one event to the next, and everything random comes from `rng`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

START = 10_000.0
MAX_SPINS = 20
"""Timers in a row that were due the moment they were armed; a real event loop would burn a core."""


class Client(Protocol):
    """Whom a broker serves."""

    def connected(self, now: float) -> None: ...
    def disconnected(self, now: float) -> None: ...
    def receive(self, topic: str, payload: bytes, now: float) -> None: ...
    def topics(self) -> frozenset[str]: ...
    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]: ...
    def handle_timer(self, now: float) -> None: ...
    def get_timer(self) -> float | None: ...


@dataclass(frozen=True)
class Publication:
    """What the broker sees of a message: when, where, and what; never by whom, here."""

    at: float
    topic: str
    payload: bytes


@dataclass(eq=False)
class Link:
    """A client's connection."""

    broker: Broker
    client: Client
    will: tuple[str, bytes] | None = None
    skew: float = 0.0
    """Of the client's clock."""
    look: Callable[[], None] = lambda: None
    """Called after each input to the client, as the place to take its events."""
    connected: bool = False
    connections: int = 0
    sent: list[Publication] = field(default_factory=list)
    """All that the client published."""
    received: int = 0
    subscribed: frozenset[str] = frozenset()
    """At the broker."""
    _told: frozenset[str] = frozenset()
    _armed: float | None = None
    _spins: int = 0
    _reached: dict[str, float] = field(default_factory=dict)
    """When the last thing that was sent arrives, by direction: no other overtakes it."""

    @property
    def now(self) -> float:
        return self.broker.now + self.skew

    def connect(self) -> None:
        if self.connected:
            return
        self.connected = True
        self.connections += 1
        self._told = self.subscribed = frozenset()
        self._reached.clear()
        self.client.connected(self.now)
        self.pump()

    def drop(self, *, graceful: bool = False) -> None:
        """The connection ends; unless `graceful`, the broker publishes the will."""
        if not self.connected:
            return
        self.connected = False
        self.subscribed = frozenset()
        if self.will is not None and not graceful:
            self.broker.publish(*self.will, delay=self.broker.delay)
        self.client.disconnected(self.now)
        self.pump()

    def pump(self) -> None:
        """To be called after anything was done to the client directly."""
        self.look()
        messages = self.client.messages_to_send(self.now)
        if self.connected:
            topics = self.client.topics()
            if topics != self._told:
                self._told = topics
                self._send("up", lambda: setattr(self, "subscribed", topics))
            for topic, payload in messages:
                self.sent.append(Publication(self.broker.now, topic, payload))
                self.broker.carry(self, "up", lambda t=topic, p=payload: self.broker.publish(t, p))  # type: ignore[misc]
        self._arm()

    def deliver(self, topic: str, payload: bytes) -> None:
        def arrive() -> None:
            self.received += 1
            self.client.receive(topic, payload, self.now)
            self.pump()

        self.broker.carry(self, "down", arrive)

    def _send(self, direction: str, arrive: Callable[[], None], *, overtakes: bool = False) -> None:
        epoch = self.connections
        when = self.broker.now + self.broker.delay + self.broker.rng.random() * self.broker.jitter
        if not overtakes:
            when = max(when, self._reached.get(direction, 0.0))
            self._reached[direction] = when

        def if_connected() -> None:
            if self.connected and self.connections == epoch:
                arrive()

        self.broker.at(when, if_connected)

    def _arm(self) -> None:
        timer = self.client.get_timer()
        if timer is None:
            self._armed = None
            return
        if self._armed == timer:
            return
        self._armed = timer
        when = max(timer - self.skew, self.broker.now)
        self._spins = self._spins + 1 if when == self.broker.now else 0
        assert self._spins <= MAX_SPINS, "a timer that is always due"

        def fire() -> None:
            if self._armed == timer:
                self._armed = None
                # Never before the timer, by the client's own clock: adding skews rounds.
                now = max(self.now, timer)
                self.client.handle_timer(now)
                self.pump()

        self.broker.at(when, fire)


class Broker:
    """See the module."""

    def __init__(
        self,
        rng: random.Random,
        *,
        delay: float = 0.02,
        jitter: float = 0.0,
        loss: float = 0.0,
        duplication: float = 0.0,
        reordering: float = 0.0,
    ) -> None:
        """`delay` and `jitter` are seconds one way; the others, shares of what is published."""
        self.rng = rng
        self.delay = delay
        self.jitter = jitter
        self.loss = loss
        self.duplication = duplication
        self.reordering = reordering
        self.now = START
        self.links: list[Link] = []
        self.seen: list[Publication] = []
        """All that reached the broker, by anybody."""
        self.meddle: Callable[[Publication], Iterable[Publication]] | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def attach(
        self,
        client: Client,
        *,
        will: tuple[str, bytes] | None = None,
        skew: float = 0.0,
        look: Callable[[], None] = lambda: None,
    ) -> Link:
        """Connect a client; `will` is its last one, and `look` is called after each input."""
        link = Link(self, client, will, skew, look)
        self.links.append(link)
        link.connect()
        return link

    def detach(self, link: Link, *, graceful: bool = False) -> None:
        """The client's process is gone, for good."""
        link.drop(graceful=graceful)
        link._armed = None
        self.links.remove(link)

    def publish(self, topic: str, payload: bytes, *, delay: float = 0.0) -> None:
        """A message is at the broker, now or in `delay` seconds."""
        if delay:
            self.at(self.now + delay, lambda: self.publish(topic, payload))
            return
        publication = Publication(self.now, topic, payload)
        self.seen.append(publication)
        out = [publication] if self.meddle is None else self.meddle(publication)
        for each in list(out):
            self.distribute(each.topic, each.payload)

    def distribute(self, topic: str, payload: bytes) -> None:
        """To all who subscribed, past `meddle`."""
        for link in self.links:
            if link.connected and topic in link.subscribed:
                link.deliver(topic, payload)

    def carry(self, link: Link, direction: str, arrive: Callable[[], None]) -> None:
        """A publication on its way, with all that may happen to it."""
        if self.rng.random() < self.loss:
            return
        copies = 2 if self.rng.random() < self.duplication else 1
        for _ in range(copies):
            late = self.rng.random() < self.reordering
            link._send(direction, arrive, overtakes=late)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self._step()
        self.now = end

    def run_until(self, condition: Callable[[], bool], timeout: float) -> float:
        """Seconds until it holds. Raises AssertionError after `timeout`."""
        begun = self.now
        while not condition():
            assert self._queue and self._queue[0][0] <= begun + timeout, "it never happened"
            self._step()
        return self.now - begun

    def _step(self) -> None:
        when, _, action = heapq.heappop(self._queue)
        self.now = max(self.now, when)
        action()
