"""How a host that knows only a code becomes a peer of the one that made it: both ends of it.

::

    inviter   subscribes to a topic that follows from the secret in the code
    joiner -- join, sealed to the inviter's key, signed, with a MAC of the secret --> inviter
    joiner <-- welcome, sealed to the joiner's key, signed by the inviter ----------- inviter
    joiner -- thanks ---------------------------------------------------------------> inviter

The secret proves the joiner to the inviter, the key in the code the inviter to the joiner. The MAC
is over both keys, so that it is worth nothing to a third one. Who has not got the code can compute
neither topic; the broker sees the topics, and can withhold and repeat. A joiner asks again with
growing pauses, and is answered again with what it was answered before: no message is the one that
must not be lost.

::

    OPEN      -- first join with the right MAC ------------------> ASKED
    OPEN      -- 600 s, or 5 joins with a wrong MAC -------------> BURNT (expired, failed)
    ASKED     -- answer -----------------------------------------> WELCOMED
    ASKED     -- refuse -----------------------------------------> BURNT (refused)
    WELCOMED  -- thanks, or 30 s --------------------------------> BURNT (used)

From ASKED on the invitation belongs to one key. Another joiner is told that it is used, if its MAC
is right; who does not know the secret is told nothing. A burnt invitation still answers, so that
a joiner whose welcome was lost gets it, and one that comes too late knows; for that, keep feeding
it for as long as you like. Times are the inviter's own, so that clocks do not matter.
"""

from __future__ import annotations

import hmac
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from tunnel.config_values import check_peer_name
from tunnel.ice.pacing import Bucket
from tunnel.identity import Identity
from tunnel.rendezvous.code import SECRET_LENGTH, CodeError, InviteCode
from tunnel.rendezvous.join_messages import (
    Answer,
    Join,
    Reason,
    Refused,
    Thanks,
    TurnServer,
    Welcome,
    Wishes,
    decode_inviter,
    decode_joiner,
    encode_answer,
    encode_join,
    encode_thanks,
    mac_of,
)
from tunnel.rendezvous.messages import NONCE_LENGTH
from tunnel.rendezvous.sealing import Speaker, topic_of, verify

__all__ = [
    "Burnt",
    "CodeError",
    "Invitation",
    "InviteCode",
    "JoinAsked",
    "Joining",
    "Reason",
    "Refused",
    "TurnServer",
    "Welcome",
    "Welcomed",
    "Wishes",
]

LIFETIME = 600.0  # seconds that an invitation waits for its joiner
MAX_FAILURES = 5
DELIVERY_PATIENCE = 30.0
"""Seconds to wait for the thanks of a joiner that was let in: it asks three times and more in them,
so that one lost message, or two, are made good."""

FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0
"""Seconds between two questions of a joiner: doubled from one to the other, +-10%. Somebody waits
at the terminal, and not for hours."""

READ_BURST, READ_PER_SECOND = 20.0, 5.0
"""Messages that are worth the 0.2 ms it takes to open one."""
ANSWER_BURST, ANSWERS_PER_SECOND = 5.0, 0.5
"""To the joiner that was let in, and again to all others: more than either needs, and little to
gain for a broker that repeats their questions."""

_JOIN_TOPIC = b"join"
_ANSWER_TOPIC = b"answer"
_JOIN_CONTEXT = b"martlet/1 join "
_ANSWER_CONTEXT = b"martlet/1 answer "


@dataclass(frozen=True, slots=True)
class JoinAsked:
    """Somebody who knows the code wants to join: `answer` or `refuse`."""

    peer: bytes
    """Its raw public key, of which it has the private one."""
    name: str
    """What it calls itself; fit for a peer's name."""
    wishes: Wishes


@dataclass(frozen=True, slots=True)
class Burnt:
    """The invitation lets nobody in any more."""

    reason: Reason
    delivered: bool = False
    """Of one that was used: whether the joiner said so itself."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """We are in."""

    inviter: bytes
    """Its raw public key."""
    welcome: Welcome


InvitationEvent: TypeAlias = JoinAsked | Burnt
JoiningEvent: TypeAlias = Welcomed | Refused


class State(Enum):
    OPEN = "open"
    ASKED = "asked"
    WELCOMED = "welcomed"
    BURNT = "burnt"


class Invitation:
    """The inviter's end. Times are monotonic seconds; `rng` has to be a SystemRandom but in tests.

    What `messages_to_send` has must have left before the process ends, even after `Burnt`.
    """

    def __init__(
        self, identity: Identity, urls: Iterable[str], *, now: float, rng: random.Random
    ) -> None:
        """`urls` of the brokers, for the joiner. Raises ValueError for those no code can hold."""
        self._speaker = Speaker(identity)
        secret = rng.randbytes(SECRET_LENGTH)
        self._code = InviteCode(self._speaker.public, secret, tuple(urls))
        self.code = str(self._code)
        self.state = State.OPEN
        self.expires_at = now + LIFETIME
        self.failures = 0
        self._topic = _join_topic(self._code)
        self._connected = False
        self._joiner: Join | None = None
        """The latest question of whom the invitation belongs to."""
        self._content: Welcome | Refused | None = None
        """What it was answered."""
        self._reason = Reason.USED
        self._answered_at = 0.0
        self._out: list[tuple[str, bytes]] = []
        self._events: deque[InvitationEvent] = deque()
        self._reads = Bucket(READ_PER_SECOND, READ_BURST)
        self._answers = Bucket(ANSWERS_PER_SECOND, ANSWER_BURST)
        self._refusals = Bucket(ANSWERS_PER_SECOND, ANSWER_BURST)

    # inputs

    def connected(self, now: float) -> None:
        self._connected = True

    def disconnected(self, now: float) -> None:
        """A joiner asks again, so nothing is kept."""
        self._connected = False
        self._out.clear()

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        """A message of the broker: anything, from anybody."""
        self.handle_timer(now)
        if topic != self._topic or not self._reads.take(now):
            return
        opened = self._speaker.unseal(payload)
        message = None if opened is None else decode_joiner(opened[1])
        if opened is None or message is None or message.key == self._speaker.public:
            return
        context = _JOIN_CONTEXT + topic.encode()
        if verify(message.key, self._speaker.public, context, *opened) is None:
            return
        if isinstance(message, Thanks):
            if self.state is State.WELCOMED and self._belongs_to(message.key):
                self._burn(Reason.USED, delivered=True)
        else:
            self._asked(message, now)

    def answer(self, welcome: Welcome, now: float) -> None:
        """Let the joiner of `JoinAsked` in. Raises ValueError when it is too much for a message,
        or nobody asked."""
        self._decide(welcome, now)
        self.state = State.WELCOMED

    def refuse(self, detail: str, now: float) -> None:
        """Do not; `detail` says why in up to 200 printable characters. Raises ValueError."""
        self._decide(Refused(Reason.REFUSED, detail), now)
        self._burn(Reason.REFUSED)

    def handle_timer(self, now: float) -> None:
        timer = self.get_timer()
        if timer is not None and now >= timer:
            self._burn(Reason.EXPIRED if self.state is State.OPEN else Reason.USED)

    # drains

    def topics(self) -> frozenset[str]:
        """Those to be subscribed to."""
        return frozenset((self._topic,))

    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]:
        """To be published, and not retained."""
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def next_event(self) -> InvitationEvent | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        if self.state is State.OPEN:
            return self.expires_at
        return self._answered_at + DELIVERY_PATIENCE if self.state is State.WELCOMED else None

    # below

    def _asked(self, join: Join, now: float) -> None:
        mac = mac_of(self._code.secret, self._code.inviter, join.key, join.nonce)
        if not hmac.compare_digest(mac, join.mac):
            if self.state is State.OPEN:
                self.failures += 1
                if self.failures >= MAX_FAILURES:
                    self._burn(Reason.FAILED)
            return
        if not self._speaker.can_reach(join.key):
            return
        if self.state is State.OPEN:
            self.state = State.ASKED
            self._joiner = join
            self._events.append(JoinAsked(join.key, join.name, join.wishes))
        elif self._belongs_to(join.key):
            self._joiner = join
            if self._content is not None and self._answers.take(now):
                self._say(join, self._content)
        elif self._refusals.take(now):
            self._say(join, Refused(self._reason))

    def _belongs_to(self, key: bytes) -> bool:
        return self._joiner is not None and key == self._joiner.key

    def _decide(self, content: Welcome | Refused, now: float) -> None:
        if self.state is not State.ASKED or self._joiner is None:
            raise ValueError("nobody asks")
        self._say(self._joiner, content)
        self._content, self._answered_at = content, now

    def _say(self, join: Join, content: Welcome | Refused) -> None:
        topic = self._speaker.topic(join.key, self._speaker.public, _ANSWER_TOPIC)
        body = encode_answer(Answer(join.nonce, content))
        sealed = self._speaker.seal(join.key, _ANSWER_CONTEXT + topic.encode(), body)
        if self._connected:
            self._out.append((topic, sealed))

    def _burn(self, reason: Reason, *, delivered: bool = False) -> None:
        self.state = State.BURNT
        self._reason = reason
        self._events.append(Burnt(reason, delivered))


class Joining:
    """The joiner's end. Times are monotonic seconds; `rng` has to be a SystemRandom but in tests.

    What `messages_to_send` has must have left before the process ends, even after `Welcomed`.
    """

    def __init__(
        self,
        identity: Identity,
        code: InviteCode,
        *,
        name: str,
        wishes: Wishes,
        rng: random.Random,
    ) -> None:
        """Raises CodeError when the code can be of no use here, ValueError for a bad name."""
        self._speaker = Speaker(identity)
        self._inviter = code.inviter
        if code.inviter == self._speaker.public:
            raise CodeError(
                "this host made the code itself", remedy="give it to `martlet join` on another"
            )
        try:
            self._answer_topic = self._speaker.topic(code.inviter, code.inviter, _ANSWER_TOPIC)
        except ValueError:
            raise CodeError(
                "the code names no valid key", remedy="make another one with `martlet invite`"
            ) from None
        self._join_topic = _join_topic(code)
        self._rng = rng
        self._nonce = rng.randbytes(NONCE_LENGTH)
        mac = mac_of(code.secret, code.inviter, self._speaker.public, self._nonce)
        join = Join(self._speaker.public, self._nonce, mac, check_peer_name(name), wishes)
        self._join = encode_join(join)
        self._connected = False
        self._done = False
        self._pause = FIRST_PAUSE
        self._ask_at: float | None = None
        self._out: list[tuple[str, bytes]] = []
        self._events: deque[JoiningEvent] = deque()
        self._reads = Bucket(READ_PER_SECOND, READ_BURST)

    # inputs

    def connected(self, now: float) -> None:
        """A broker serves us: ask at once."""
        self._connected = True
        if not self._done:
            self._pause = FIRST_PAUSE
            self._ask_at = now

    def disconnected(self, now: float) -> None:
        self._connected = False
        self._out.clear()

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        """A message of the broker: anything, from anybody."""
        if topic != self._answer_topic or not self._reads.take(now):
            return
        context = _ANSWER_CONTEXT + topic.encode()
        body = self._speaker.open(self._inviter, context, payload)
        answer = None if body is None else decode_inviter(body)
        if answer is None or not hmac.compare_digest(answer.echo, self._nonce):
            return
        if isinstance(answer.content, Welcome):
            self._say(encode_thanks(Thanks(self._speaker.public)))  # also for each that is repeated
        if self._done:
            return
        self._done = True
        self._ask_at = None
        if isinstance(answer.content, Welcome):
            self._events.append(Welcomed(self._inviter, answer.content))
        else:
            self._events.append(answer.content)

    def handle_timer(self, now: float) -> None:
        if self._connected and self._ask_at is not None and now >= self._ask_at:
            self._ask_at = now + self._pause * (0.9 + 0.2 * self._rng.random())
            self._pause = min(2 * self._pause, LAST_PAUSE)
            self._say(self._join)

    # drains

    def topics(self) -> frozenset[str]:
        """Those to be subscribed to."""
        return frozenset((self._answer_topic,))

    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]:
        """To be published, and not retained."""
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def next_event(self) -> JoiningEvent | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        return self._ask_at if self._connected else None

    # below

    def _say(self, body: bytes) -> None:
        context = _JOIN_CONTEXT + self._join_topic.encode()
        sealed = self._speaker.seal(self._inviter, context, body)
        if self._connected:
            self._out.append((self._join_topic, sealed))


def _join_topic(code: InviteCode) -> str:
    """Only who has the code can compute it."""
    return topic_of(code.secret, _JOIN_TOPIC + code.inviter)
