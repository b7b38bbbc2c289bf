"""Meeting peers through a broker that is trusted with nothing.

::

    A subscribes, B subscribes       each to the topic on which the other speaks
    A -- offer, nonce a, ask ------------->  B    may be a recording, for all that B knows
    A <- offer, nonce b, echo a, ask ------  B    is of this moment: nobody knew a before
    A -- offer, nonce a, echo b ---------->  B    and now B knows it, too

An *offer* tells where its sender may be found, and with which credentials it may be asked there
(`tunnel.ice`). It is *fresh* when it echoes a nonce that was made here within the last two minutes:
freshness is never a matter of clocks, which may be hours apart. An offer that is not fresh, or that
asks, is answered at once, whether we want the peer ourselves or not: the other end may be the only
one that noticed that something is wrong. Who asks has nothing fresh of the other end. Nothing is
retained at the broker, so nothing old is to be found there; whoever subscribes later speaks, and
the earlier one is there to answer.

While a peer is wanted it gets an offer at once, one whenever there is something new to tell, and
else again and again with growing pauses. For a minute after a peer was heard it is told what is
new, too, though it is not wanted here: it may be looking for us at an address that we left.

**What a broker can do** is withhold, delay, repeat, reorder, and swap. The numbers of a process
grow, so a repeated word is dropped without an answer. A word of another process than the one that
last was fresh is the next one's, or an old recording: it is answered, and what comes back tells;
until then it is no event, so that recordings cannot take the place of what is true. Only when none
was ever fresh is it given as it is, and only a few: each costs up to 20 checks. A nonce belongs to
the process that first echoed it, for a word of the process before may just have been late. Reading,
answering and asking have budgets for each peer, those for recordings apart from those for the
peer that is there.

The last will of our connection to the broker is published on a topic of its own, new with each
start, which offers tell. To a peer it is a hint that we are gone: it asks at its slowest then. The
topic is a digest of the payload, so that a peer who knows the one cannot make up the other.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tunnel.ice.pacing import Bucket
from tunnel.identity import Identity
from tunnel.rendezvous.messages import NONCE_LENGTH, Offer, Word, decode, encode
from tunnel.rendezvous.sealing import Speaker, topic_of

__all__ = ["Meeting", "MeetingEvent", "Offer", "Offered", "PresenceChanged"]

FIRST_PAUSE, LAST_PAUSE = 0.5, 60.0
"""Seconds between two offers that nobody answered: doubled from one to the other, +-10%."""
ANSWERED_PAUSE = 7.5
"""The first pause after an answer, while the peer is wanted still. It knows all; what is missing is
a path, and that takes checks."""
ENGAGED = 60.0
"""Seconds after a word of a peer for which it is told what is new."""

NONCE_AGE = 30.0
"""Seconds after which a nonce is used no more for what leaves..."""
NONCE_LIFE = 120.0
"""...and after which its echo proves nothing: a broker can hold a word back for as long, and
addresses that were true two minutes ago are worth a check."""
KEPT_NONCES = 24
"""Of ours: more than leave before an answer can be there, when there is something new to tell again
and again."""
KEPT_BOOTS = 8
"""Processes of a peer whose latest numbers are remembered."""

ASKS_BURST, ASKS_PER_SECOND = 20.0, 1.0
"""Offers of our own accord: a network that flaps must not flood a broker. A move takes three of
them: where we are, what STUN servers see, which kind of NAT it is; and moves come in rows."""
ANSWERS_BURST, ANSWERS_PER_SECOND = 12.0, 1.0
"""To one peer. Its own words come in twos and threes."""
STRANGE_BURST, STRANGE_PER_SECOND = 3.0, 0.5
"""The same for words of a process that was never fresh: restarts, and recordings."""
UNPROVEN_BURST, UNPROVEN_PER_SECOND = 3.0, 0.1
"""Such words that are given as events while nothing better is known. Each may cost 20 checks."""
WORDS_BURST, WORDS_PER_SECOND = 20.0, 5.0
"""From one topic, that are worth the 0.2 ms it takes to open one."""

_CONTEXT = b"martlet/1 offer"
_TOPIC = b"offer"
_WILL_TOPIC = b"will"
_WILL_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Offered:
    """A peer's word, signed by it. `boot_id` tells one process of the peer from the next."""

    peer: bytes
    offer: Offer
    boot_id: bytes
    fresh: bool
    """Certainly of the last two minutes; else it may be a recording."""


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """A hint of the broker's: the peer's connection to it broke; or, the hint is taken back."""

    peer: bytes
    present: bool


MeetingEvent: TypeAlias = Offered | PresenceChanged


@dataclass(slots=True)
class _Nonce:
    value: bytes
    made_at: float
    boot_id: bytes = b""
    """Of the process that echoed it first."""
    said: bool = False
    """Whether it ever left."""


@dataclass(slots=True)
class _Peer:
    key: bytes
    outgoing: str = ""
    """The topic on which we speak to it; empty when its key is none that can be spoken to."""
    incoming: str = ""
    wanted: bool = False
    offer: Offer | None = None
    nonces: deque[_Nonce] = field(default_factory=lambda: deque(maxlen=KEPT_NONCES))
    """Ours; the newest last."""
    say_at: float | None = None
    """When we speak next of our own accord."""
    pause: float = FIRST_PAUSE
    engaged_until: float = 0.0
    boot_id: bytes = b""
    """Of its process that last was fresh; empty when none ever was."""
    fresh: bool = False
    """Whether its latest word was."""
    heard: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    """The latest number of each of its processes."""
    nonce: bytes = b""
    """Its latest."""
    answer: bytes = b""
    """A nonce that is to be echoed as soon as the budget allows."""
    strange_answer: bytes = b""
    """The same, of a process that was never fresh."""
    presence: str = ""
    """The topic of its last will."""
    present: bool = True
    heard_at: float | None = None
    words: Bucket = field(default_factory=lambda: Bucket(WORDS_PER_SECOND, WORDS_BURST))
    asks: Bucket = field(default_factory=lambda: Bucket(ASKS_PER_SECOND, ASKS_BURST))
    answers: Bucket = field(default_factory=lambda: Bucket(ANSWERS_PER_SECOND, ANSWERS_BURST))
    strange: Bucket = field(default_factory=lambda: Bucket(STRANGE_PER_SECOND, STRANGE_BURST))
    unproven: Bucket = field(default_factory=lambda: Bucket(UNPROVEN_PER_SECOND, UNPROVEN_BURST))

    @property
    def due(self) -> float | None:
        """When there is something to say to it."""
        if self.offer is None:
            return None
        times = [] if self.say_at is None else [self.say_at]
        if self.answer:
            times.append(self.answers.ready_at())
        if self.strange_answer:
            times.append(self.strange.ready_at())
        return min(times, default=None)


class Meeting:
    """All peers of one node. Peers are meant by their raw public keys; times are monotonic."""

    def __init__(
        self, identity: Identity, peers: Iterable[bytes], *, boot_id: bytes, rng: random.Random
    ) -> None:
        """`boot_id` (16 bytes) is new for each start of the process; `rng` is a SystemRandom but in
        tests, as nobody may guess a nonce."""
        self._speaker = Speaker(identity)
        self._boot_id = boot_id
        self._rng = rng
        self._sequence = 0
        self._connected = False
        payload = rng.randbytes(_WILL_LENGTH)
        self.will = (topic_of(payload, _WILL_TOPIC), payload)
        """Topic and payload, for whoever connects to the broker."""
        self._peers: dict[bytes, _Peer] = {}
        self._by_topic: dict[str, _Peer] = {}
        self._topics: frozenset[str] = frozenset()
        self._timer: float | None = None
        self._out: list[tuple[str, bytes]] = []
        self._events: deque[MeetingEvent] = deque()
        self.counters = {
            "offers_sent": 0,
            "offers_received": 0,
            "words_refused": 0,
            "words_repeated": 0,
        }
        for peer in peers:
            self.add_peer(peer)

    def add_peer(self, peer: bytes) -> None:
        """One more. A key that is no point of the curve is kept, and never met."""
        if peer in self._peers:
            return
        entry = self._peers[peer] = _Peer(peer)
        try:
            entry.outgoing = self._speaker.topic(peer, self._speaker.public, _TOPIC)
            entry.incoming = self._speaker.topic(peer, peer, _TOPIC)
        except ValueError:
            return
        self._by_topic[entry.incoming] = entry
        self._refresh_topics()

    def remove_peer(self, peer: bytes) -> None:
        """It hears nothing more of us, whatever it says."""
        entry = self._peers.pop(peer)
        self._by_topic.pop(entry.incoming, None)
        self._events = deque(event for event in self._events if event.peer != peer)
        self._refresh_topics()
        self._refresh_timer()

    # inputs

    def connected(self, now: float) -> None:
        """A broker serves us. Who is wanted hears of us at once."""
        self._connected = True
        for peer in self._peers.values():
            self._set_present(peer, True)  # it may have come back while nobody told us
            if peer.wanted:
                self._begin(peer, now)
        self._refresh_timer()

    def disconnected(self, now: float) -> None:
        """It does not any more; who is wanted is asked anew when one does again."""
        self._connected = False
        self._out.clear()
        for peer in self._peers.values():
            peer.answer = peer.strange_answer = b""
        self._refresh_timer()

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
            entry.engaged_until = now
        self._refresh_timer()

    def tell(self, peer: bytes, offer: Offer, now: float) -> None:
        """What there is to say to it now. Cheap when it is not news."""
        entry = self._peers[peer]
        if offer == entry.offer:
            return
        entry.offer = offer
        if entry.wanted or now < entry.engaged_until:
            self._begin(entry, now)
        self._refresh_timer()

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        """A message of the broker: anything, from anybody."""
        peer = self._by_topic.get(topic)
        if peer is None:
            self._will_of(topic, payload)
            return
        if not peer.words.take(now):
            self.counters["words_refused"] += 1
            return
        body = self._speaker.open(peer.key, _context(topic), payload)
        word = None if body is None else decode(body)
        if word is None:
            self.counters["words_refused"] += 1
            return
        if word.sequence <= peer.heard.get(word.boot_id, -1):
            self.counters["words_repeated"] += 1
            return
        self._heard(peer, word, now)
        self._refresh_timer()

    def handle_timer(self, now: float) -> None:
        if self._timer is None or now < self._timer:
            return
        for peer in self._peers.values():
            due = peer.due
            if due is not None and now >= due:
                self._speak(peer, now)
        self._refresh_timer()

    # drains

    def topics(self) -> frozenset[str]:
        """Those to be subscribed to."""
        return self._topics

    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]:
        """To be published, and not retained."""
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def next_event(self) -> MeetingEvent | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        return self._timer

    def status(self, peer: bytes, now: float) -> dict[str, Any]:
        """Of one peer, for `status --json`."""
        entry = self._peers[peer]
        heard = entry.heard_at
        return {
            "connected": self._connected,
            "wanted": entry.wanted,
            "present": entry.present,
            "heard_s": None if heard is None else round(now - heard, 3),
            "error": None if entry.outgoing else "its public key is no point of the curve",
        }

    # what is said

    def _begin(self, peer: _Peer, now: float) -> None:
        """A round: what was answered before says nothing of now."""
        self._renew(peer, now)
        peer.pause = FIRST_PAUSE
        peer.say_at = now if peer.outgoing else None

    def _renew(self, peer: _Peer, now: float) -> None:
        if peer.nonces and not peer.nonces[-1].said:
            peer.nonces.pop()  # nobody knows it, and it would crowd out one that is on its way
        peer.nonces.append(_Nonce(self._rng.randbytes(NONCE_LENGTH), now))

    def _speak(self, peer: _Peer, now: float) -> None:
        if peer.answer and peer.answers.take(now):
            self._say(peer, peer.answer, ask=not peer.fresh, now=now)
            peer.answer = b""
        if peer.strange_answer and peer.strange.take(now):
            self._say(peer, peer.strange_answer, ask=True, now=now)
            peer.strange_answer = b""
        if peer.say_at is None or now < peer.say_at:
            return
        if not (peer.wanted or now < peer.engaged_until):
            peer.say_at = None
        elif peer.asks.take(now):
            self._say(peer, peer.nonce, ask=True, now=now)
        else:
            peer.say_at = peer.asks.ready_at()

    def _say(self, peer: _Peer, echo: bytes, *, ask: bool, now: float) -> None:
        if peer.offer is None:
            return
        if not peer.nonces or now - peer.nonces[-1].made_at > NONCE_AGE:
            self._renew(peer, now)
        if ask and peer.say_at is not None and now >= peer.say_at:
            pause = LAST_PAUSE if not peer.present else peer.pause
            peer.pause = min(2 * peer.pause, LAST_PAUSE)
            peer.say_at = now + pause * (0.9 + 0.2 * self._rng.random())
        peer.nonces[-1].said = True
        self._sequence += 1
        word = Word(
            boot_id=self._boot_id,
            sequence=self._sequence,
            nonce=peer.nonces[-1].value,
            echo=echo,
            ask=ask,
            presence=self.will[0],
            offer=peer.offer,
        )
        sealed = self._speaker.seal(peer.key, _context(peer.outgoing), encode(word))
        self._out.append((peer.outgoing, sealed))
        self.counters["offers_sent"] += 1

    # what is heard

    def _heard(self, peer: _Peer, word: Word, now: float) -> None:
        """An authentic word, not heard before."""
        nonce = self._echoed(peer, word, now)
        fresh = nonce is not None and nonce.boot_id in (b"", word.boot_id)
        if nonce is not None and not fresh:
            self._renew(peer, now)  # two processes answered: one of them is late, so ask anew
        if nonce is not None and fresh:
            nonce.boot_id = peer.boot_id = word.boot_id
            self._set_presence(peer, word.presence)
            self._set_present(peer, True)
            if nonce is peer.nonces[-1]:
                self._round_answered(peer, now)
        self._remember(peer, word)
        strange = word.boot_id != peer.boot_id
        if strange and (peer.boot_id or not peer.unproven.take(now)):
            self._answer_strange(peer, word)
            return
        peer.fresh = fresh
        peer.nonce = word.nonce
        peer.heard_at = now
        if not strange:
            peer.engaged_until = now + ENGAGED
        self.counters["offers_received"] += 1
        self._events.append(Offered(peer.key, word.offer, word.boot_id, fresh))
        if strange:
            self._answer_strange(peer, word)
        elif word.ask or not fresh:
            peer.answer = word.nonce if self._connected else b""

    def _echoed(self, peer: _Peer, word: Word, now: float) -> _Nonce | None:
        for nonce in peer.nonces:
            if nonce.value == word.echo and now - nonce.made_at <= NONCE_LIFE:
                return nonce
        return None

    def _remember(self, peer: _Peer, word: Word) -> None:
        peer.heard[word.boot_id] = word.sequence
        peer.heard.move_to_end(word.boot_id)
        if peer.boot_id in peer.heard:
            peer.heard.move_to_end(peer.boot_id)
        if len(peer.heard) > KEPT_BOOTS:
            peer.heard.popitem(last=False)

    def _round_answered(self, peer: _Peer, now: float) -> None:
        if peer.say_at is None:
            return
        if not peer.wanted:
            peer.say_at = None
            return
        peer.pause = max(peer.pause, ANSWERED_PAUSE)
        peer.say_at = max(peer.say_at, now + peer.pause)

    def _answer_strange(self, peer: _Peer, word: Word) -> None:
        if self._connected:
            peer.strange_answer = word.nonce

    # presence

    def _will_of(self, topic: str, payload: bytes) -> None:
        if topic not in self._topics or len(payload) != _WILL_LENGTH:
            return
        if topic_of(payload, _WILL_TOPIC) != topic:
            return
        for peer in self._peers.values():
            if peer.presence == topic:
                self._set_present(peer, False)

    def _set_presence(self, peer: _Peer, topic: str) -> None:
        if topic != peer.presence:
            peer.presence = topic
            self._refresh_topics()

    def _set_present(self, peer: _Peer, present: bool) -> None:
        if peer.present != present:
            peer.present = present
            self._events.append(PresenceChanged(peer.key, present))

    # below

    def _refresh_topics(self) -> None:
        wills = (peer.presence for peer in self._peers.values() if peer.presence)
        self._topics = frozenset((*self._by_topic, *wills))

    def _refresh_timer(self) -> None:
        times = [at for peer in self._peers.values() if (at := peer.due) is not None]
        self._timer = min(times, default=None) if self._connected else None


def _context(topic: str) -> bytes:
    return _CONTEXT + b" " + topic.encode()
