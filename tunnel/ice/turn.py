"""One allocation at a TURN server: a relayed address, kept for as long as somebody wants it.

Sans-IO (RFC 8656, with the long-term credentials of RFC 8489 section 9.2). Messages of the server
and the time go in, messages to it and events come out; how they travel, as datagrams or in a
stream, is the shell's business, and so is the bulk of the data: that goes in ChannelData, whose
header `channel` and `remote_of` are enough to make and to read.

::

    NEW -> ASKING -> READY -> ENDED        ASKING -> ENDED

An allocation that has ended stays so: another one is made from another port, which is what a
server that disagrees about the old one asks for (437).

- A request is repeated after 0.2 s, then after twice that and so on, 6 times in all, and gives up
  after 9.4 s. RFC 8489 section 6.2.1 has 0.5 s for anybody's server; here it is one that the user
  named, a first packet that was lost costs the start of a session, and a server that is farther
  than 0.2 s away gets a copy or two of 100 bytes until the first answer has told how far it is.
- Nothing is waited for that need not be: the permission for a peer is asked for when there is
  something to send, and what there is follows at once in a Send indication. A server takes them in
  order; where one is lost, so is a datagram.
- An allocation is refreshed at half its lifetime; whenever the server was not heard for 20 s, which
  keeps the NAT's mapping to it; and 2 s after something was sent without anything coming back, so
  that the end of an allocation is noticed while it matters. Permissions are renewed after 4 of
  their 5 minutes, channels after 9 of their 10, while they are in use.
- An answer counts only if it is signed with our password, but for the two errors that come before
  that is possible (401, 438). An error that is not signed becomes the reason, should there be no
  other answer: some servers sign none.

Cost: a refresh is some 130 bytes, its answer 100, so 40 kB an hour of an idle allocation.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from aioice import stun

from tunnel.ice.turn_message import (
    CHANNEL_HEADER,
    FAMILY_IPV6,
    FIRST_CHANNEL,
    LAST_CHANNEL,
    NO_ANSWER,
    UDP_PROTOCOL,
    Problem,
    addresses_of,
    channel_data,
    explain,
    long_term_key,
    parse,
    request,
    send_indication,
)
from tunnel.path.network import Address, is_usable_remote

FIRST_RTO = 0.2  # seconds; the module says why
RTO_CEILING = 1.0
"""Of the first timeout: no server worth having is farther than a satellite, twice."""
TRIES = 6
PATIENCE = 10.0
"""Seconds until a request in a stream, which repeats by itself, counts as unanswered."""
MAX_NONCE = 763
"""Bytes of a nonce or a realm (RFC 8489 sections 14.9, 14.10): both come back in every request."""
STALE_LIMIT = 3
"""Nonces that a server may call stale in a row."""
MAX_CHALLENGE = 763
"""Bytes of a nonce or a realm (RFC 8489 sections 14.9 and 14.10): each comes back in all requests,
and a longer one might not fit."""
QUIET = 20.0
"""Seconds without a word of the server after which it is asked; also what keeps a NAT's mapping."""
DOUBT = 2.0
"""The same after something was sent. A peer that does not answer costs no more than a refresh
every 2 s, and checks of such a one are few."""
REFRESH_SHARE = 0.5
"""Of the lifetime: whatever is lost then, all tries of the next two refreshes fit."""
LEAST_LIFETIME, MOST_LIFETIME = 30.0, 3600.0
"""Seconds that a server is believed to mean (RFC 8656 section 7.2 has 600 and 3600)."""
PERMISSION_REFRESH = 240.0  # seconds; it lasts 300 (RFC 8656 section 9)
CHANNEL_LIFE, CHANNEL_REFRESH = 600.0, 540.0  # seconds: RFC 8656 section 12
CHANNEL_REST = 300.0
"""Seconds in which an expired number is not given to another peer (RFC 8656 section 12)."""
FORBIDDEN_MEMORY = 60.0
"""Seconds in which a peer that the server forbids is not asked for again."""
MAX_PERMISSIONS = 512
MAX_CHANNELS = 256
MAX_OUT = 64
"""Messages that wait to be sent; more only where nobody sends."""


class State(Enum):
    NEW = "new"
    ASKING = "asking"
    READY = "ready"
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.ASKING, State.ENDED}),
    State.ASKING: frozenset({State.READY, State.ENDED}),
    State.READY: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Allocated:
    """There is a relayed address."""

    relayed: Address


@dataclass(frozen=True, slots=True)
class Ended:
    """There is none any more, or there will be none; `text` in the user's words."""

    problem: Problem
    text: str
    elsewhere: Address | None = None
    """The server to ask instead (MOVED)."""


@dataclass(frozen=True, slots=True)
class Received:
    """A datagram of a peer without a channel."""

    remote: Address
    data: bytes


TurnEvent: TypeAlias = Allocated | Ended | Received


@dataclass(slots=True)
class _Request:
    """One that is out. `subject`: what it is about; there is one of each at a time."""

    subject: tuple[str, Any]
    method: stun.Method
    attributes: dict[str, Any]
    data: bytes
    signed: bool
    tries: int
    wait: float
    due: float
    sent_at: float
    stale: int = 0
    """Times that it was asked anew with another nonce."""
    hint: tuple[Problem, str] | None = None
    """What an answer that nobody signed says."""


@dataclass(slots=True)
class _Grant:
    """A permission of an IP address, or a channel."""

    used_at: float
    granted_at: float | None = None
    asked_at: float | None = None
    refused_at: float | None = None
    number: int = 0


class Allocation:
    """One relayed address. All times are the monotonic seconds the shell passes in."""

    def __init__(
        self,
        *,
        username: str | None,
        password: str,
        ipv6: bool,
        stream: bool,
        rng: random.Random,
    ) -> None:
        """`ipv6`: of the relayed address. `stream`: whether messages travel in one."""
        self.state = State.NEW
        self.relayed: Address | None = None
        self.refused = 0
        """Messages that were for us by the looks of it, and not authentic or not well-formed."""
        self._username, self._password = username, password
        self._ipv6 = ipv6
        self._stream = stream
        self._rng = rng
        self._realm: str | None = None
        self._nonce = b""
        self._key: bytes | None = None
        self._rto = FIRST_RTO
        self._requests: dict[bytes, _Request] = {}
        self._permissions: dict[str, _Grant] = {}
        self._channels: dict[Address, _Grant] = {}
        self._remotes: dict[int, Address] = {}
        self._resting: dict[int, float] = {}
        self._next_number = FIRST_CHANNEL
        self._refresh_at = 0.0
        self._expires_at = 0.0
        self._heard_at = 0.0
        self._spoke_at: float | None = None  # first, since the server was heard
        self._out: list[bytes] = []
        self._events: deque[TurnEvent] = deque()

    # what is wanted

    def start(self, now: float) -> None:
        self._advance(State.ASKING)
        self._heard_at = now
        attributes: dict[str, Any] = {"REQUESTED-TRANSPORT": UDP_PROTOCOL}
        if self._ipv6:  # the other is the default, and some servers know no other
            attributes["REQUESTED-ADDRESS-FAMILY"] = FAMILY_IPV6
        self._ask(("allocate", None), stun.Method.ALLOCATE, attributes, now)

    def close(self, now: float) -> None:
        """Give the address back: one message, whose answer nobody waits for."""
        if self.state is State.READY:
            self._requests.clear()
            self._out.clear()
            self._ask(("refresh", None), stun.Method.REFRESH, {"LIFETIME": 0}, now)
            self._requests.clear()
        if self.state is not State.ENDED:
            self._advance(State.ENDED)

    def check(self, now: float) -> None:
        """The network changed, or there was a sleep: is the allocation still there?"""
        if self.state is State.READY:
            self._refresh(now)

    def bind(self, remote: Address, now: float) -> None:
        """Have a channel for a peer that data is sent to."""
        grant = self._channels.get(remote)
        if grant is None:
            if len(self._channels) >= MAX_CHANNELS or (number := self._free_number(now)) is None:
                return  # indications serve, at 36 bytes each
            grant = self._channels[remote] = _Grant(now, number=number)
        grant.used_at = now
        if grant.granted_at is None and grant.asked_at is None and self._may_ask(grant, now):
            self._bind(remote, grant, now)

    def wrap(self, remote: Address, data: bytes, now: float) -> bytes | None:
        """The message that has the server send a datagram to `remote`.

        None where it may not: there is no relayed address, it is of the other family, or the server
        forbids that peer.
        """
        if self.state is not State.READY or remote.is_ipv6 != self._ipv6:
            return None
        if not self._permit(remote.host, now):
            return None
        if self._spoke_at is None:
            self._spoke_at = now
        grant = self._channels.get(remote)
        if grant is not None:
            grant.used_at = now
            if grant.granted_at is not None:
                return channel_data(grant.number, data, padded=self._stream)
        return send_indication(self._transaction(), remote, data)

    def channel(self, remote: Address, now: float) -> int | None:
        """The number of the channel to `remote`, for many datagrams at once; None: use `wrap`."""
        grant = self._channels.get(remote)
        if grant is None or grant.granted_at is None or self.state is not State.READY:
            return None
        grant.used_at = now
        if self._spoke_at is None:
            self._spoke_at = now
        self._permit(remote.host, now)
        return grant.number

    def remote_of(self, channel: int) -> Address | None:
        """Whose datagrams come in this channel."""
        return self._remotes.get(channel)

    # inputs

    def heard(self, now: float) -> None:
        """The server sent something, be it data."""
        self._heard_at, self._spoke_at = now, None

    def receive(self, data: bytes, now: float) -> None:
        """Take a message of the server."""
        if self.state is State.ENDED:
            return
        if len(data) >= CHANNEL_HEADER.size and data[0] & 0xC0 == 0x40:
            self._receive_channel(data, now)
            return
        message = parse(data)
        if message is None:
            self.refused += 1
        elif message.message_class is stun.Class.INDICATION:
            self._receive_indication(message, now)
        elif message.message_class is not stun.Class.REQUEST:
            self._receive_answer(message, now)

    def _receive_channel(self, data: bytes, now: float) -> None:
        number, length = CHANNEL_HEADER.unpack_from(data)
        remote = self._remotes.get(number)
        if remote is None or length > len(data) - CHANNEL_HEADER.size:
            self.refused += 1
            return
        self.heard(now)
        payload = data[CHANNEL_HEADER.size : CHANNEL_HEADER.size + length]
        self._events.append(Received(remote, payload))

    def _receive_indication(self, message: stun.Message, now: float) -> None:
        remote = message.attributes.get("XOR-PEER-ADDRESS")
        data = message.attributes.get("DATA")
        if (
            message.message_method is not stun.Method.DATA
            or remote is None
            or data is None
            or remote[0] not in self._permissions  # the server lets nobody else through
        ):
            self.refused += 1
            return
        self.heard(now)
        self._events.append(Received(Address(*remote), data))

    def _receive_answer(self, message: stun.Message, now: float) -> None:
        asked = self._requests.get(message.transaction_id)
        if asked is None or message.message_method is not asked.method:
            return  # late, or not ours
        failed = message.message_class is stun.Class.ERROR
        code = message.error_code if failed else None
        if failed and code is None:
            self.refused += 1
            return
        if code in (401, 438) and "NONCE" in message.attributes:
            realm, nonce = message.attributes.get("REALM", ""), message.attributes["NONCE"]
            if max(len(realm.encode()), len(nonce)) > MAX_CHALLENGE:
                self.refused += 1
                return
            self._challenged(message, asked, code, now)
            return
        signed = self._key is not None and message.check_message_integrity(self._key)
        if asked.signed and not signed:
            self.refused += 1
            if code is not None and not self._stream:
                asked.hint = explain(code)
                return
            if code is None:
                return
        del self._requests[message.transaction_id]
        self.heard(now)
        if asked.tries == 1 and not self._stream:
            self._rto = min(max(FIRST_RTO, 2 * (now - asked.sent_at)), RTO_CEILING)
        if code is None:
            self._granted(message, asked, now)
        else:
            self._denied(message, asked, code, now)

    def _challenged(self, message: stun.Message, asked: _Request, code: int, now: float) -> None:
        """The server wants credentials, or another nonce (RFC 8489 section 9.2.5)."""
        realm = message.attributes.get("REALM", self._realm)
        nonce = message.attributes["NONCE"]
        if len(nonce) > MAX_NONCE or len(realm or "") > MAX_NONCE:
            self.refused += 1
            return
        again = asked.signed and code == 401 and nonce == self._nonce
        if asked.signed and code == 401 and asked.subject[0] == "allocate":
            again = True  # the very first signed request: its nonce was fresh
        if self._username is None or realm is None or again:
            self._end(*explain(401, configured=self._username is not None))
            return
        if asked.stale >= STALE_LIMIT:
            self._end(*explain(code))
            return
        del self._requests[message.transaction_id]
        self.heard(now)
        if asked.tries == 1 and not self._stream:
            self._rto = min(max(FIRST_RTO, 2 * (now - asked.sent_at)), RTO_CEILING)
        self._nonce = nonce
        if realm != self._realm or self._key is None:
            self._realm = realm
            self._key = long_term_key(self._username, realm, self._password)
        self._ask(asked.subject, asked.method, asked.attributes, now, stale=asked.stale + 1)

    def _granted(self, message: stun.Message, asked: _Request, now: float) -> None:
        kind, subject = asked.subject
        if kind == "allocate":
            self._allocated(message, now)
        elif kind == "refresh":
            self._live_on(message, now)
        elif kind == "permission":
            grant = self._permissions.get(subject)
            if grant is not None:
                grant.granted_at, grant.asked_at, grant.refused_at = now, None, None
        else:
            grant = self._channels.get(subject)
            if grant is not None:
                grant.granted_at, grant.asked_at, grant.refused_at = now, None, None
                self._remotes[grant.number] = subject

    def _allocated(self, message: stun.Message, now: float) -> None:
        relayed = addresses_of(message.attributes.get("XOR-RELAYED-ADDRESS"), ipv6=self._ipv6)
        if relayed is None:
            self._end(Problem.UNSUPPORTED, "the server gives no address of the family asked for")
        elif not is_usable_remote(relayed.host):
            self._end(Problem.REFUSED, f"the server relays at {relayed}, where nobody can send to")
        else:
            self.relayed = relayed
            self._advance(State.READY)
            self._events.append(Allocated(relayed))
            self._live_on(message, now)

    def _live_on(self, message: stun.Message, now: float) -> None:
        lifetime = float(message.attributes.get("LIFETIME", 600))
        if not lifetime:
            self._end(Problem.MISMATCH, "the server has ended the allocation")
            return
        lifetime = min(max(lifetime, LEAST_LIFETIME), MOST_LIFETIME)
        self._refresh_at = now + REFRESH_SHARE * lifetime
        self._expires_at = now + lifetime

    def _denied(self, message: stun.Message, asked: _Request, code: int, now: float) -> None:
        kind, subject = asked.subject
        problem, text = explain(code, configured=self._username is not None)
        if kind in ("allocate", "refresh") or problem is Problem.MISMATCH:
            elsewhere = message.attributes.get("ALTERNATE-SERVER")
            if problem is Problem.MOVED and elsewhere is not None:
                self._end(problem, text, Address(*elsewhere))
            else:
                self._end(problem, text)
            return
        grants: dict[Any, _Grant] = self._permissions if kind == "permission" else self._channels
        grant = grants.get(subject)
        if grant is None:
            return
        grant.granted_at = grant.asked_at = None
        grant.refused_at = now
        if kind == "channel":
            # A number that the server knows otherwise is not taken again (RFC 8656 section 12.2).
            self._rest(grant.number, now)
            grant.number = self._free_number(now) or grant.number

    # time

    def get_timer(self) -> float | None:
        times = [asked.due for asked in self._requests.values()]
        if self.state is State.READY:
            times.append(min(self._refresh_due(), self._expires_at))
            times += [self._grant_due(g, PERMISSION_REFRESH) for g in self._permissions.values()]
            times += [self._grant_due(g, CHANNEL_REFRESH) for g in self._channels.values()]
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        for transaction, asked in list(self._requests.items()):
            if asked.due <= now and transaction in self._requests:
                self._repeat(transaction, asked, now)
        if self.state is not State.READY:
            return
        if now >= self._expires_at:
            self._end(Problem.MISMATCH, "the allocation has expired unrefreshed")
            return
        if now >= self._refresh_due():
            self._refresh(now)
        for host, grant in list(self._permissions.items()):
            if now >= self._grant_due(grant, PERMISSION_REFRESH):
                if self._in_use(grant, PERMISSION_REFRESH, now):
                    self._ask_permission(host, grant, now)
                else:
                    del self._permissions[host]
        for remote, grant in list(self._channels.items()):
            if now >= self._grant_due(grant, CHANNEL_REFRESH):
                if self._in_use(grant, CHANNEL_REFRESH, now):
                    self._bind(remote, grant, now)
                else:
                    self._forget_channel(remote, now)

    def messages_to_send(self, now: float) -> list[bytes]:
        out, self._out = self._out, []
        return out

    def next_event(self) -> TurnEvent | None:
        return self._events.popleft() if self._events else None

    # requests

    def _transaction(self) -> bytes:
        return self._rng.randbytes(12)

    def _ask(
        self,
        subject: tuple[str, Any],
        method: stun.Method,
        attributes: dict[str, Any],
        now: float,
        *,
        stale: int = 0,
    ) -> None:
        sent = dict(attributes)
        if self._key is not None:
            sent |= {"USERNAME": self._username, "REALM": self._realm, "NONCE": self._nonce}
        transaction = self._transaction()
        data = request(method, transaction, sent, self._key)
        wait = PATIENCE if self._stream else self._rto
        self._requests[transaction] = _Request(
            subject, method, attributes, data, self._key is not None,
            tries=1, wait=wait, due=now + wait, sent_at=now, stale=stale,
        )  # fmt: skip
        self._say(data)

    def _repeat(self, transaction: bytes, asked: _Request, now: float) -> None:
        if self._stream or asked.tries == TRIES:
            del self._requests[transaction]
            self._end(*(asked.hint or (Problem.NO_ANSWER, NO_ANSWER)))
            return
        asked.tries += 1
        asked.wait *= 2
        asked.due = now + asked.wait
        self._say(asked.data)

    def _say(self, data: bytes) -> None:
        if len(self._out) < MAX_OUT:
            self._out.append(data)

    def _asking(self, subject: tuple[str, Any]) -> bool:
        return any(asked.subject == subject for asked in self._requests.values())

    def _refresh_due(self) -> float:
        if self._asking(("refresh", None)):
            return self._expires_at
        doubt = float("inf") if self._spoke_at is None else self._spoke_at + DOUBT
        return min(self._refresh_at, self._heard_at + QUIET, doubt)

    def _refresh(self, now: float) -> None:
        if not self._asking(("refresh", None)):
            self._ask(("refresh", None), stun.Method.REFRESH, {}, now)

    # permissions and channels

    def _permit(self, host: str, now: float) -> bool:
        grant = self._permissions.get(host)
        if grant is None:
            if len(self._permissions) >= MAX_PERMISSIONS:
                return False
            grant = self._permissions[host] = _Grant(now)
        grant.used_at = now
        if grant.granted_at is None and grant.asked_at is None:
            if not self._may_ask(grant, now):
                return False
            self._ask_permission(host, grant, now)
        return True

    def _ask_permission(self, host: str, grant: _Grant, now: float) -> None:
        grant.asked_at = now
        attributes = {"XOR-PEER-ADDRESS": (host, 0)}  # RFC 8656 section 9.1: the port is ignored
        self._ask(("permission", host), stun.Method.CREATE_PERMISSION, attributes, now)

    def _bind(self, remote: Address, grant: _Grant, now: float) -> None:
        grant.asked_at = now
        attributes = {"CHANNEL-NUMBER": grant.number, "XOR-PEER-ADDRESS": tuple(remote)}
        self._ask(("channel", remote), stun.Method.CHANNEL_BIND, attributes, now)

    @staticmethod
    def _may_ask(grant: _Grant, now: float) -> bool:
        return grant.refused_at is None or now >= grant.refused_at + FORBIDDEN_MEMORY

    @staticmethod
    def _grant_due(grant: _Grant, refresh: float) -> float:
        """When something is to be done about a grant: renew it, or forget it."""
        if grant.asked_at is not None:
            return float("inf")  # the request has a timer of its own
        if grant.granted_at is not None:
            return grant.granted_at + refresh
        return (grant.refused_at or grant.used_at) + FORBIDDEN_MEMORY

    @staticmethod
    def _in_use(grant: _Grant, lately: float, now: float) -> bool:
        return grant.granted_at is not None and now < grant.used_at + lately

    def _free_number(self, now: float) -> int | None:
        self._resting = {number: at for number, at in self._resting.items() if at > now}
        taken = {grant.number for grant in self._channels.values()}
        for _ in range(LAST_CHANNEL - FIRST_CHANNEL + 1):
            number = self._next_number
            self._next_number = FIRST_CHANNEL if number == LAST_CHANNEL else number + 1
            if number not in taken and number not in self._resting:
                return number
        return None

    def _rest(self, number: int, now: float) -> None:
        self._remotes.pop(number, None)
        self._resting[number] = now + CHANNEL_LIFE + CHANNEL_REST

    def _forget_channel(self, remote: Address, now: float) -> None:
        self._rest(self._channels.pop(remote).number, now)

    # the end

    def _end(self, problem: Problem, text: str, elsewhere: Address | None = None) -> None:
        if self.state is not State.ENDED:
            self._advance(State.ENDED)
            self._requests.clear()
            self._out.clear()
            self._events.append(Ended(problem, text, elsewhere))

    def _advance(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise ValueError(f"an allocation cannot go from {self.state.value} to {to.value}")
        self.state = to
