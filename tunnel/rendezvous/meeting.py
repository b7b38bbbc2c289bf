"""Meeting peers through a broker that is trusted with nothing.

::

    A subscribes, B subscribes       each to the topic on which the other speaks
    A -- offer, nonce a ---------->  B    may be a recording, for all that B knows
    A <- offer, nonce b, echo a ---  B    is of this moment: nobody knew a before
    A -- offer, nonce a, echo b -->  B    and now B knows it, too

An *offer* tells where its sender may be found, and with which credentials it may be asked there
(`tunnel.ice`). It is *fresh* when it echoes the nonce that is current here: freshness is never a
matter of clocks, which may be hours apart. Whoever gets an offer whose nonce it has not echoed yet
answers at once, whether it wants the peer itself or not: the other end may be the only one that
noticed that something is wrong. Nothing is retained at the broker, so nothing old is to be found
there; whoever subscribes later speaks, and the earlier one is there to answer.

While a peer is wanted it gets an offer at once, one whenever there is something new to tell, and
else again and again with growing pauses. A broker may withhold, repeat, reorder and swap: that
costs time, and answers within a budget, and nothing else.

The last will of our connection to the broker is published on a topic of its own, new with each
start, which offers tell. To a peer it is a hint that we are gone: it asks at its slowest then.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tunnel.identity import Identity
from tunnel.rendezvous.messages import NONCE_LENGTH, Offer, Word, decode, encode
from tunnel.rendezvous.sealing import TOPIC_LENGTH, Speaker, topic_name

FIRST_PAUSE, LAST_PAUSE = 0.5, 60.0
"""Seconds between two offers that nobody answered: doubled from one to the other, +-10%."""
ANSWERS_BURST, ANSWERS_PER_SECOND = 8.0, 1.0
"""To one peer. Its own words come in twos and threes; a broker that repeats old ones gets no more
answers than a peer that is in trouble would."""
WORDS_BURST, WORDS_PER_SECOND = 20.0, 5.0
"""From one topic, that are worth the 0.2 ms it takes to open one."""
NEWS_BURST, NEWS_PER_SECOND = 6.0, 1.0
"""Offers because there is something new to tell: a network that flaps must not flood a broker."""

_CONTEXT = b"martlet/1 offer"
_TOPIC = b"offer"


@dataclass(frozen=True, slots=True)
class Offered:
    """A peer's word, signed by it. `boot_id` tells one process of the peer from the next."""

    peer: bytes
    offer: Offer
    boot_id: bytes
    fresh: bool
    """Certainly of this moment; else it may be a recording."""


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """A hint of the broker's: the peer's connection to it broke, or it is heard of again."""

    peer: bytes
    present: bool


MeetingEvent: TypeAlias = Offered | PresenceChanged


@dataclass(slots=True)
class _Budget:
    """So many at once, and so many a second."""

    burst: float
    rate: float
    left: float = -1.0
    at: float = 0.0

    def take(self, now: float) -> bool:
        if self.left < 0:
            self.left, self.at = self.burst, now
        self.left = min(self.burst, self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True

    def ready_at(self) -> float:
        return self.at if self.left >= 1 else self.at + (1 - self.left) / self.rate


@dataclass(slots=True)
class _Peer:
    key: bytes
    outgoing: str
    """The topic on which we speak to it."""
    incoming: str
    nonce: bytes
    """Ours, of this round."""
    wanted: bool = False
    offer: Offer | None = None
    told: Offer | None = None
    """The last that we said."""
    say_at: float | None = None
    pause: float = FIRST_PAUSE
    their_nonce: bytes = b""
    echoed: bytes = b""
    """The last nonce of its that we echoed."""
    boot_id: bytes = b""
    sequence: int = -1
    """Of its latest word, in that boot."""
    fresh: bool = False
    """Whether the peer has answered this round."""
    presence: str = ""
    """The topic of its last will."""
    present: bool = True
    heard_at: float | None = None
    words: _Budget = field(default_factory=lambda: _Budget(WORDS_BURST, WORDS_PER_SECOND))
    answers: _Budget = field(default_factory=lambda: _Budget(ANSWERS_BURST, ANSWERS_PER_SECOND))
    news: _Budget = field(default_factory=lambda: _Budget(NEWS_BURST, NEWS_PER_SECOND))


class Meeting:
    """All peers of one node. Peers are meant by their raw public keys; times are monotonic."""

    def __init__(
        self, identity: Identity, peers: Iterable[bytes], *, boot_id: bytes, rng: random.Random
    ) -> None:
        """`boot_id` (16 bytes) is new for each start of the process."""
        self._speaker = Speaker(identity)
        self._boot_id = boot_id
        self._rng = rng
        self._sequence = 0
        self._connected = False
        self.will = (topic_name(rng.randbytes(TOPIC_LENGTH)), b"")
        """Topic and payload, for whoever connects to the broker."""
        self._peers: dict[bytes, _Peer] = {}
        self._by_topic: dict[str, _Peer] = {}
        self._out: list[tuple[str, bytes]] = []
        self._events: deque[MeetingEvent] = deque()
        self.counters = {"offers_sent": 0, "offers_received": 0, "words_refused": 0}
        for peer in peers:
            self.add_peer(peer)

    def add_peer(self, peer: bytes) -> None:
        """One more. Raises ValueError when this is no key."""
        entry = _Peer(
            peer,
            outgoing=self._speaker.topic(peer, self._speaker.public, _TOPIC),
            incoming=self._speaker.topic(peer, peer, _TOPIC),
            nonce=self._rng.randbytes(NONCE_LENGTH),
        )
        self._peers[peer] = entry
        self._by_topic[entry.incoming] = entry

    def remove_peer(self, peer: bytes) -> None:
        """It hears nothing more of us, whatever it says."""
        entry = self._peers.pop(peer)
        del self._by_topic[entry.incoming]
        self._events = deque(event for event in self._events if event.peer != peer)

    # inputs

    def connected(self, now: float) -> None:
        """A broker serves us. Who is wanted hears of us at once."""
        self._connected = True
        for peer in self._peers.values():
            peer.present = True  # its will may have been published while nobody told us
            if peer.wanted:
                self._begin(peer, now)

    def disconnected(self, now: float) -> None:
        """It does not any more; what was to be said is said when one does again."""
        self._connected = False
        self._out.clear()

    def want(self, peer: bytes, wanted: bool, now: float) -> None:
        """Whether this peer is to be met. Cheap when it is not news."""
        entry = self._peers[peer]
        if entry.wanted == wanted:
            return
        entry.wanted = wanted
        if wanted:
            self._begin(entry, now)
        else:
            entry.say_at = None

    def tell(self, peer: bytes, offer: Offer, now: float) -> None:
        """What there is to say to it now. Cheap when it is not news."""
        entry = self._peers[peer]
        if offer == entry.offer:
            return
        entry.offer = offer
        if entry.wanted and entry.told is not None:
            soon = now if entry.news.take(now) else max(now, entry.news.ready_at())
            entry.say_at = soon if entry.say_at is None else min(entry.say_at, soon)

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        """A message of the broker: anything, from anybody."""
        peer = self._by_topic.get(topic)
        if peer is None:
            self._will_of(topic)
            return
        if not peer.words.take(now):
            self.counters["words_refused"] += 1
            return
        body = self._speaker.open(peer.key, _context(topic), payload)
        word = None if body is None else decode(body)
        if word is None:
            self.counters["words_refused"] += 1
            return
        self._heard(peer, word, now)

    def handle_timer(self, now: float) -> None:
        for peer in self._peers.values():
            if self._connected and peer.say_at is not None and now >= peer.say_at:
                pause = LAST_PAUSE if not peer.present else peer.pause
                peer.pause = min(2 * peer.pause, LAST_PAUSE)
                peer.say_at = now + pause * (0.9 + 0.2 * self._rng.random())
                self._say(peer)

    # drains

    def topics(self) -> frozenset[str]:
        """Those to be subscribed to."""
        wills = (peer.presence for peer in self._peers.values() if peer.presence)
        return frozenset((*self._by_topic, *wills))

    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]:
        """To be published, and not retained."""
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def next_event(self) -> MeetingEvent | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        if not self._connected:
            return None
        times = [peer.say_at for peer in self._peers.values() if peer.say_at is not None]
        return min(times, default=None)

    def status(self, peer: bytes, now: float) -> dict[str, Any]:
        """Of one peer, for `status --json`."""
        entry = self._peers[peer]
        heard = entry.heard_at
        return {
            "connected": self._connected,
            "wanted": entry.wanted,
            "present": entry.present,
            "heard_s": None if heard is None else round(now - heard, 3),
        }

    # below

    def _begin(self, peer: _Peer, now: float) -> None:
        """A round: what was answered before says nothing of now."""
        peer.nonce = self._rng.randbytes(NONCE_LENGTH)
        peer.fresh = False
        peer.pause = FIRST_PAUSE
        peer.say_at = now
        peer.told = None

    def _say(self, peer: _Peer) -> None:
        if peer.offer is None:
            return
        self._sequence += 1
        peer.told = peer.offer
        peer.echoed = peer.their_nonce
        word = Word(
            boot_id=self._boot_id,
            sequence=self._sequence,
            nonce=peer.nonce,
            echo=peer.their_nonce,
            presence=self.will[0],
            offer=peer.offer,
        )
        sealed = self._speaker.seal(peer.key, _context(peer.outgoing), encode(word))
        self._out.append((peer.outgoing, sealed))
        self.counters["offers_sent"] += 1

    def _heard(self, peer: _Peer, word: Word, now: float) -> None:
        fresh = word.echo == peer.nonce
        if word.boot_id == peer.boot_id:
            if word.sequence <= peer.sequence:
                return
        elif peer.fresh and not fresh:
            # Of another process than the one that is certainly there: the next one, or an old one.
            # It is answered; what it says then will tell.
            peer.their_nonce = word.nonce
            self._answer(peer, now)
            return
        peer.boot_id, peer.sequence = word.boot_id, word.sequence
        peer.their_nonce = word.nonce
        peer.presence = word.presence
        peer.heard_at = now
        self.counters["offers_received"] += 1
        if not peer.present:
            peer.present = True
            self._events.append(PresenceChanged(peer.key, True))
        if fresh and not peer.fresh:
            peer.fresh = True
            # It knows all. What is still wanted is a path, and that takes checks: ask seldom.
            peer.pause = max(peer.pause, LAST_PAUSE / 8)
            if peer.say_at is not None:
                peer.say_at = max(peer.say_at, now + peer.pause)
        if word.nonce != peer.echoed:
            self._answer(peer, now)
        self._events.append(Offered(peer.key, word.offer, word.boot_id, fresh))

    def _answer(self, peer: _Peer, now: float) -> None:
        if self._connected and peer.answers.take(now):
            self._say(peer)

    def _will_of(self, topic: str) -> None:
        for peer in self._peers.values():
            if peer.presence == topic and peer.present:
                peer.present = False
                self._events.append(PresenceChanged(peer.key, False))


def _context(topic: str) -> bytes:
    return _CONTEXT + b" " + topic.encode()
