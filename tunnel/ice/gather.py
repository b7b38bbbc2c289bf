"""Server-reflexive addresses: what public STUN servers see of each base (RFC 8489 section 7).

Every base asks every server it has a route to: at once when either is new, then every 5 minutes,
and every 20 s while `busy`: while a peer is to be met through a NAT, the mapping that it was told
must stay alive, and before there are pairs nothing else keeps it so; and an answer that was lost
is asked for again sooner. Whoever knows that sets `busy`; there is no other rule. Where servers
disagree, the first in the list that answered is believed: a NAT that maps each destination to
another port (a *hard* one) has no address to tell anyway.

That they disagree is how a hard NAT is known, from answers of one moment: a mapping may be another
one later. Where one server alone answers, its other address (RFC 5780 section 7.4), if it tells
one, is asked as well, once for each base.

Cost: 28 bytes a question (UDP payload), about as many an answer.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunnel.ice import check
from tunnel.ice.candidate import Base
from tunnel.path.network import Address, LocalNetwork, PathKey, is_usable_remote

FIRST_RTO = 0.5
TRIES = 7
LAST_WAIT = 8.0  # RFC 8489 section 6.2.1: RTO, Rc and Rm, which is 16 RTO
BUSY_RTO = 0.1
"""While `busy`: what leaves first from a new address meets neighbour tables and NATs that are not
ready, and two ends that have no path wait for it. A seventh question still leaves 6.3 s after the
first, so that a slow path is asked no less long."""
INTERVAL = 300.0
"""Seconds. A mapping that changed unseen, with sessions on it, is learnt from those much sooner."""
BUSY_INTERVAL = 20.0
"""Seconds: few NATs forget a UDP mapping sooner (RFC 4787 section 4.3 asks for 2 minutes)."""
PACE = 0.005  # seconds between the first questions, as between first checks
MAX_SERVERS = 4
ONE_MOMENT = 10.0
"""Seconds in which a mapping stays what it is: shorter than NATs keep those that are not used."""
SILENT_TRIES = 5
"""Of a question, after which its silence means something: 1.5 s while `busy`, else 7.5 s."""


@dataclass(frozen=True, slots=True)
class MappedChanged:
    """`Gatherer.mapped()` or `Gatherer.nat()` is another now."""


@dataclass(frozen=True, slots=True)
class Nat:
    """What is in front of a base: `hard`, if each destination sees another mapping."""

    base: Address
    hard: bool


@dataclass(slots=True)
class _Question:
    """To one server from one base, again and again."""

    key: PathKey
    transaction: bytes = b""
    """Of the round that is out, all its tries alike; empty between rounds."""
    tries: int = 0
    due: float = 0.0
    """Of the next try."""
    tried_at: float = 0.0
    asked_at: float = 0.0
    """When the last round began."""
    answer: Address | None = None
    answered_at: float = 0.0
    once: bool = False
    """For the sake of comparison: the answer tells no address."""
    vain: bool = False
    """Whether it has been asked for long enough without an answer."""


class Gatherer:
    """One for each host. All times are the monotonic seconds the shell passes in."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._network = LocalNetwork()
        self._bases: dict[Address, Base] = {}
        self._servers: list[Address] = []
        self._questions: dict[PathKey, _Question] = {}
        self._busy = False
        self._mapped: dict[Address, Address] = {}
        self._hard: dict[Address, bool] = {}
        self._compared: set[Address] = set()  # bases that an other address was asked from
        self._nat: Nat | None = None
        self._out: list[tuple[PathKey, bytes]] = []
        self._events: deque[MappedChanged] = deque()

    # inputs

    def servers_resolved(self, servers: Iterable[Address], now: float) -> None:
        """A full list, in the order of belief; more than 4 are not asked."""
        usable = [server for server in servers if is_usable_remote(server.host)]
        self._servers = list(dict.fromkeys(usable))[:MAX_SERVERS]
        self._rebuild(now)

    def bases_changed(self, network: LocalNetwork, bases: Sequence[Base], now: float) -> None:
        """A full snapshot, as the agent's."""
        for base in bases:  # a relay has no socket that a server could be asked from
            known = self._bases.get(base.address)
            if known is not None and known.interface != base.interface:
                self._forget(base.address)
        self._network = network
        self._bases = {base.address: base for base in bases if not base.relay}
        self._rebuild(now)

    def busy(self, busy: bool) -> None:
        """Whether mappings are to be kept alive (see above), and answers to be had soon."""
        if busy and not self._busy:
            for question in self._questions.values():
                if question.transaction and 0 < question.tries < TRIES:
                    soon = question.tried_at + BUSY_RTO * 2 ** (question.tries - 1)
                    question.due = min(question.due, soon)
        self._busy = busy

    def again(self, now: float) -> None:
        """Ask all now: the network changed in some way that no address shows."""
        self._compared.clear()
        self._begin(self._questions.values(), now)

    def receive(self, data: bytes, path: PathKey, now: float) -> bool:
        """Take a STUN datagram; False if it is not an answer to a question of ours."""
        if not check.looks_like_stun(data):
            return False
        question = self._questions.get(path)
        if question is None or not question.transaction:
            return False
        if check.transaction_id_of(data) != question.transaction:
            return False
        mapped = check.read_server_response(data)
        if mapped is not None:  # an error response is as good as none
            self._end(question, mapped, now)
            self._compare(question, check.read_other_address(data), now)
            self._refresh()
        return True

    def handle_timer(self, now: float) -> None:
        idle = [q for q in self._questions.values() if not q.transaction]
        self._begin([question for question in idle if self._due(question) <= now], now)
        for question in list(self._questions.values()):
            if not question.transaction or question.due > now:
                continue
            if question.tries == TRIES:
                self._end(question, None, now)
                self._refresh()
                continue
            wait = (BUSY_RTO if self._busy else FIRST_RTO) * 2**question.tries
            question.tries += 1
            question.vain = question.vain or question.tries >= SILENT_TRIES
            question.tried_at = now
            question.due = now + (LAST_WAIT if question.tries == TRIES else wait)
            self._out.append((question.key, check.server_request(question.transaction)))

    # drains

    def mapped(self) -> dict[Address, Address]:
        """By base, the address it has outside."""
        return dict(self._mapped)

    def nat(self) -> Nat | None:
        """In front of the best base whose NAT is known; of IPv4, as IPv6 has none."""
        return self._nat

    @property
    def silent(self) -> bool:
        """Whether no server answers, from anywhere: they are down, or UDP is blocked."""
        return bool(self._questions) and all(
            each.vain for each in self._questions.values() if not each.once
        )

    def get_timer(self) -> float | None:
        return min(map(self._due, self._questions.values()), default=None)

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def next_event(self) -> MappedChanged | None:
        return self._events.popleft() if self._events else None

    # rounds

    def _rebuild(self, now: float) -> None:
        new: list[_Question] = []
        questions: dict[PathKey, _Question] = {}
        for server in self._servers:
            sources = {source.ip for source in self._network.sources(server.host)}
            for base in self._bases:
                if base.host in sources:
                    key = PathKey(base, server)
                    if key not in self._questions:
                        new.append(_Question(key))
                    questions[key] = self._questions.get(key) or new[-1]
        questions |= {k: q for k, q in self._questions.items() if q.once and k.local in self._bases}
        self._questions = questions
        self._hard = {base: hard for base, hard in self._hard.items() if base in self._bases}
        self._compared &= self._bases.keys()
        self._begin(new, now)
        self._refresh()

    def _forget(self, base: Address) -> None:
        self._questions = {k: q for k, q in self._questions.items() if k.local != base}
        self._hard.pop(base, None)
        self._compared.discard(base)

    def _begin(self, questions: Iterable[_Question], now: float) -> None:
        for number, question in enumerate(questions):
            question.transaction = self._rng.randbytes(check.TRANSACTION_LENGTH)
            question.tries = 0
            question.asked_at = now
            question.due = now + number * PACE

    def _due(self, question: _Question) -> float:
        interval = BUSY_INTERVAL if self._busy else INTERVAL
        return question.due if question.transaction else question.asked_at + interval

    def _end(self, question: _Question, answer: Address | None, now: float) -> None:
        question.transaction = b""
        question.answer = answer
        question.answered_at = now
        question.vain = answer is None
        if question.once:
            del self._questions[question.key]

    def _compare(self, question: _Question, other: Address | None, now: float) -> None:
        """An answer came. Is it that of the others?"""
        base = question.key.local
        answers = {
            each.answer
            for each in self._questions.values()
            if each is not question
            and each.key.local == base
            and each.answer is not None
            and now - each.answered_at < ONE_MOMENT
        }
        if answers:
            self._hard[base] = answers != {question.answer}
        elif other is not None and base not in self._compared and is_usable_remote(other.host):
            key = PathKey(base, other)
            self._compared.add(base)
            if other.is_ipv6 == base.is_ipv6 and key not in self._questions:
                self._questions[key] = _Question(key, once=True)
                self._begin([self._questions[key]], now)

    def _refresh(self) -> None:
        mapped: dict[Address, Address] = {}
        for key, question in self._questions.items():  # in the order of the servers
            if question.answer is not None and not question.once:
                mapped.setdefault(key.local, question.answer)
        known = [
            (base.rank, base.address)
            for base in self._bases.values()
            if base.address in self._hard and not base.address.is_ipv6
        ]
        nat = Nat(min(known)[1], self._hard[min(known)[1]]) if known else None
        if (mapped, nat) != (self._mapped, self._nat):
            self._mapped, self._nat = mapped, nat
            self._events.append(MappedChanged())
