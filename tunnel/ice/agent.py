"""The continuous agent: finds pairs for as long as a session lives, and keeps the good ones warm.

ICE without its end. There are no roles, no nomination and no restart: either end pairs each of its
sockets with each address of the peer, asks on the pairs (`tunnel.ice.check`), and answers what the
peer asks. Which pair carries the traffic is decided elsewhere, and QUIC judges it.

- New pairs are asked at once, the first 8 in a burst, the rest 5 ms apart: those that must stay
  warm first, the relayed last, between them by the ranks of both ends, then by kind.
- An authentic question from the peer makes its address a candidate, and is asked back at once
  unless the pair is warm: both ends know a pair after 1.5 round trips of the first question. It
  validates nothing: only an answer does, on the very pair the question went out on.
- At most 8 warm pairs are asked every second while traffic flows; all others every 15 s, which
  keeps the NAT's mapping. A lost check is repeated after its own timeout; 3 make the pair fail.
- Whatever fails is tried again (`pair.retry_delay`), at once when the network changes.
- Checks can be sent on what is no pair (`probe`), many at once: an authentic answer makes it one.
  `tunnel.probing` knows when that is of use.

Its credentials come from the session (the TLS exporter), or, before there is one, from what both
ends told each other by way of the rendezvous (`meet`). Both sets are answered side by side; those
of the session are asked with as long as it lives.

Cost: a check is 100 bytes with a ufrag of 16 characters, its answer 64 (IPv4) or 76 (IPv6). Both
ends ask, so a warm pair costs each of them, sent and received alike, in UDP payload:

- idle: 240 x (100 + 64) = 39,360 bytes an hour (IPv6: 42,240),
- busy: 164 bytes a second (IPv6: 176),
- at worst, whatever happens: 5 x (100 + 76) = 880 bytes a second on any one path, after a burst
  of 6.

A pair that never answers costs 20 checks for its address, then one a minute: 6,000 bytes an hour.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from tunnel.config import IPNetwork
from tunnel.ice import check
from tunnel.ice.candidate import (
    MAX_RANK,
    Base,
    Candidate,
    Kind,
    is_private,
    kind_in,
    priority,
    rank_in,
    usable_candidate,
)
from tunnel.ice.check import Credentials, Freshness, Heard
from tunnel.ice.checklist import CheckList
from tunnel.ice.events import AgentEvent, CandidatesChanged, CheckReceived
from tunnel.ice.own import OwnCandidates
from tunnel.ice.pacing import Bucket
from tunnel.ice.pair import LivePair, Pair, PairState
from tunnel.ice.remote import Remotes
from tunnel.path.network import Address, LocalNetwork, PathKey

ANSWERS_PER_SECOND = 50.0
"""Also the burst. More than two ends with many pairs ask when all is in doubt."""
COPIES_PER_SECOND = 5.0
"""Also the burst, of questions that came before from elsewhere: to answer the first alone would let
a forwarder that is faster take the pair away, to answer all would lend it our voice."""
UNPROVEN_CHECKS = 20
"""In all, on word of the peer that may be somebody's recording: what an old offer costs."""


class Agent:
    """One for each peer. All times are the monotonic seconds the shell passes in."""

    def __init__(
        self,
        *,
        rng: random.Random,
        advertise: Sequence[Address] = (),
        forbidden: Sequence[IPNetwork] = (),
    ) -> None:
        """`forbidden`: the tunnel's own networks, and those routed into it."""
        self._forbidden = tuple(forbidden)
        self._session: Credentials | None = None
        self._meeting: Credentials | None = None
        self._allowance: int | None = None
        """Checks left on unproven word of the peer; None: no limit."""
        self.peer_hard: bool | None = None
        """Whether the peer says that its NAT maps each destination to another port."""
        self.heard_at: float | None = None
        """When the peer certainly said something, here or by the rendezvous."""
        self._stray: PathKey | None = None
        self._withheld: set[PathKey] = set()
        """Pairs whose turn came when there were none left."""
        self._network = LocalNetwork()
        self._bases: dict[Address, Base] = {}
        self._out: list[tuple[PathKey, bytes]] = []
        self._events: deque[AgentEvent] = deque()
        self._own = OwnCandidates(advertise, self._forbidden)
        self._remotes = Remotes(self._forbidden)
        self._list = CheckList(
            self._remotes, rng=rng, send=self._send_check, emit=self._events.append
        )
        self._heard = Heard()
        self._answers = Bucket(ANSWERS_PER_SECOND, ANSWERS_PER_SECOND)
        self._copies = Bucket(COPIES_PER_SECOND, COPIES_PER_SECOND)
        self.counters = {
            "checks_sent": 0,
            "checks_answered": 0,
            "checks_received": 0,
            "refused": 0,  # for us by the looks of it, but not authentic, or on another pair
            "bytes_sent": 0,
            "bytes_received": 0,
        }

    @property
    def running(self) -> bool:
        return self._asking is not None

    def answers_to(self, ufrag: str) -> bool:
        """Whether a check for this ufrag is for this agent."""
        return any(credentials.local_ufrag == ufrag for credentials in self._valid)

    @property
    def _asking(self) -> Credentials | None:
        return self._session or self._meeting

    @property
    def _valid(self) -> list[Credentials]:
        return [each for each in (self._session, self._meeting) if each is not None]

    # inputs: the session

    def start(self, credentials: Credentials, now: float) -> None:
        """A session begins, the first with this peer or another: no pair of it is proven yet.

        Known pairs are asked at once. That they are not warm any more is not said by events; that
        the peer is to be told our candidates is.
        """
        if credentials != self._session:
            self._heard = Heard()
        self._session = credentials
        self.heard_at = now
        self._begin(now)
        self._events.append(CandidatesChanged())

    def meet(
        self,
        credentials: Credentials,
        generation: int,
        candidates: Sequence[Candidate],
        now: float,
        *,
        fresh: bool,
        hard: bool | None = None,
    ) -> None:
        """The peer's word by way of the rendezvous: its credentials and its full list.

        Unless `fresh`, it may be an old recording: then at most 20 checks are spent on it, until
        the peer has shown itself by a check or an answer.
        """
        if credentials != self._meeting:
            self._meeting = credentials
            self._allowance = None if fresh else UNPROVEN_CHECKS
            if self._session is None:
                self._heard = Heard()
                self.heard_at = None
                self._begin(now)
        elif fresh:
            self._proven()
        if fresh:
            self.heard_at = now
        self.remote_candidates(generation, candidates, now, hard=hard)

    def _proven(self) -> None:
        """The peer is there, certainly: its word is worth all checks."""
        self._allowance = None
        withheld, self._withheld = self._withheld, set()
        self._list.ask_withheld(withheld)

    def _begin(self, now: float) -> None:
        self._out.clear()
        self._withheld.clear()
        self._remotes.new_session()
        self._remotes.network_changed(now)
        self._list.new_session()

    def stop(self) -> None:
        """Ask and answer nothing more. What is known of addresses stays for the next session."""
        self._session = self._meeting = None
        self._out.clear()
        self._list.new_session()

    # inputs: addresses

    def forbidden_changed(self, forbidden: Sequence[IPNetwork]) -> None:
        """Other networks are routed into the tunnel now. Whatever lies in them is forgotten, by
        either end; what does no longer comes back with the next snapshot, list or check."""
        self._forbidden = tuple(forbidden)
        self._own.forbidden_changed(self._forbidden)
        self._remotes.forbidden_changed(self._forbidden)
        usable = {a: b for a, b in self._bases.items() if usable_candidate(a, self._forbidden)}
        if usable != self._bases:
            self._bases = usable
            self._own.keep_bases(usable)
            self._list.bases_changed(self._network, usable)
        else:
            self._list.rebuild()
        self._refresh_own()

    def bases_changed(self, network: LocalNetwork, bases: Sequence[Base], now: float) -> None:
        """A full snapshot. A base is paired with what its interface has a route to."""
        usable = {b.address: b for b in bases if usable_candidate(b.address, self._forbidden)}
        if (network, usable) == (self._network, self._bases):
            return
        self._network, self._bases = network, usable
        self._own.keep_bases(usable)
        self._remotes.network_changed(now)
        self._list.bases_changed(network, usable)
        self._refresh_own()

    def reflexive_changed(self, mapped: Mapping[Address, Address], now: float) -> None:
        """By base, the addresses that STUN servers see."""
        self._own.reflexive_changed({b: a for b, a in mapped.items() if b in self._bases})
        self._refresh_own()

    def mapped_ports_changed(self, mapped: Mapping[Address, Address], now: float) -> None:
        """By base, the addresses that routers say lead to it."""
        self._own.mapped_changed({b: a for b, a in mapped.items() if b in self._bases})
        self._refresh_own()

    def hard_changed(self, hard: bool | None, now: float) -> None:
        """Whether our NAT maps each destination to another port; the peer is told."""
        if hard != self._own.hard:
            self._own.hard_changed(hard)
            self._events.append(CandidatesChanged())

    def observed(self, local: Address, address: Address, now: float) -> None:
        """The peer says that packets from this base come from there."""
        if local in self._bases:
            self._own.observed(local, address)
            self._refresh_own()

    def remote_candidates(
        self,
        generation: int,
        candidates: Sequence[Candidate],
        now: float,
        *,
        hard: bool | None = None,
    ) -> None:
        """The peer's full list. An older one than was seen, or the same again, is ignored.

        An address that is not named any more is forgotten with its pairs, unless one is warm: then
        it stays, as peer-reflexive, until they fail.
        """
        if generation <= self._remotes.generation:
            return
        self.peer_hard = hard
        before = {remote.address for remote in self._remotes}
        self._remotes.name(generation, candidates, self._list.standing(), now)
        self._list.rebuild()
        named = {candidate.address for candidate in candidates}
        self._list.retry(named)
        if named - before:
            self._list.retry_configured(now)

    def remote_address(self, address: Address, now: float, *, configured: bool = True) -> None:
        """An address that no generation removes: from configuration, and trusted; or, not
        `configured`, where the session's packets come from, which anybody may have forwarded."""
        self._remotes.pin(address, configured=configured, standing=self._list.standing(), now=now)
        self._list.rebuild()

    def _refresh_own(self) -> None:
        before = self._own.generation
        self._own.refresh(self._bases.values(), self._list.pairs.values())
        if self._own.generation != before:
            self._events.append(CandidatesChanged())

    # inputs: datagrams

    def receive(self, data: bytes, path: PathKey, now: float) -> bool:
        """Take a STUN datagram; False if it is not for this agent."""
        if not self.running or not check.looks_like_stun(data):
            return False
        username = check.username_of(data)
        if username is not None:
            ufrag = username.partition(":")[0]
            for credentials in self._valid:
                if credentials.local_ufrag == ufrag:
                    self.counters["bytes_received"] += len(data)
                    self._receive_request(data, credentials, path, now)
                    return True
            return False
        if check.transaction_id_of(data) not in self._list.transactions:
            return False
        self.counters["bytes_received"] += len(data)
        self._receive_response(data, path, now)
        return True

    def _receive_request(
        self, data: bytes, credentials: Credentials, path: PathKey, now: float
    ) -> None:
        asked = check.read_request(data, credentials)
        if asked is None or not usable_candidate(path.remote, self._forbidden):
            self.counters["refused"] += 1
            return
        transaction = check.transaction_id_of(data)
        fresh = self._heard.judge(transaction, path)
        bucket = self._answers if fresh is Freshness.NEW else self._copies
        if fresh is Freshness.OLD or not bucket.take(now):
            return
        self.counters["checks_received"] += 1
        self._proven()
        self.heard_at = now
        if path not in self._list.pairs and path.local in self._bases:
            rank, metered = rank_in(asked)
            self._remotes.see(
                path.remote, rank, metered, self._list.standing(), now, kind=kind_in(asked)
            )
            self._list.rebuild(heard=path)
        pair = self._list.pairs.get(path)
        if pair is None or pair.answers.take(now):
            self._send(path, check.response(credentials, transaction, path.remote))
        if pair is None:
            self._stray = path
            return
        pair.heard = True
        pair.remote.heard_at = now
        self._events.append(CheckReceived(path))
        if not pair.warm:
            self._list.ask_now(pair, now)

    def _receive_response(self, data: bytes, path: PathKey, now: float) -> None:
        transaction = check.transaction_id_of(data)
        asked_at = self._list.transactions.asked_at(transaction, path)
        read = (check.read_response(data, credentials) for credentials in self._valid)
        mapped = next(filter(None, read), None)
        if mapped is None or asked_at is None:
            self.counters["refused"] += 1
            return
        self._list.transactions.close(transaction)
        self.counters["checks_answered"] += 1
        self._proven()
        self.heard_at = now
        pair = self._list.pairs.get(path) or self._found(path, now)
        if pair is None:
            self._stray = path
            return
        known = pair.warm and pair.mapped == mapped
        self._list.answered(pair, mapped, asked_at, now)
        if not known:
            self._refresh_own()

    def _found(self, path: PathKey, now: float) -> LivePair | None:
        """The peer is there, as a message on this path proved, which is no pair so far."""
        if path.local in self._bases:
            alike = [r for r in self._remotes if r.address.host == path.remote.host]
            rank = min((r.rank for r in alike), default=MAX_RANK)
            metered = any(r.metered for r in alike)
            self._remotes.see(path.remote, rank, metered, self._list.standing(), now)
            self._list.rebuild(heard=path)
        return self._list.pairs.get(path)

    def send_failed(self, path: PathKey, now: float) -> None:
        """The socket refused: true now, and maybe not for long."""
        pair = self._list.pairs.get(path)
        if self.running and pair is not None and pair.state is not PairState.FAILED:
            self._list.fail(pair, "the socket refused to send", now, refused=True)

    # inputs: what others want

    def check_now(self, now: float, keys: Iterable[PathKey] | None = None) -> None:
        """Something happened, or is suspected: ask every warm pair, or all of these, at once.

        Without `keys`, those that failed have a turn, too, if they ever worked, and all others
        where nothing works.
        """
        if self.running:
            self._list.check_now(now, keys)

    def probe(self, keys: Iterable[PathKey], now: float) -> None:
        """Send a check on each of these, which need be no pairs."""
        for key in keys:
            base = self._bases.get(key.local)
            rank, metered = (base.rank, base.metered) if base is not None else (0, False)
            self._ask(key, self._list.transactions.open(key, now), Kind.PRFLX, rank, metered)

    def socket_kept(self, key: PathKey, now: float) -> None:
        """The socket that this `stray` came in on is a base by now."""
        if self._found(key, now) is not None:
            self.check_now(now, [key])

    def busy(self, busy: bool) -> None:
        """Whether traffic flows: then warm pairs are asked every second."""
        self._list.busy = busy

    def keep(self, keys: Collection[PathKey]) -> None:
        """Pairs that stay warm whatever their place: the active one and its backup."""
        self._list.keep(keys)

    # drains

    def stray(self) -> PathKey | None:
        """Where an authentic message came in since this was asked last, on a socket that is none of
        the bases."""
        stray, self._stray = self._stray, None
        return stray

    @property
    def hard(self) -> bool | None:
        """For the peer, beside `candidates`."""
        return self._own.hard

    @property
    def direct(self) -> set[PathKey]:
        """Pairs that are warm without a relay."""
        warm = (pair for pair in self._list.pairs.values() if pair.warm)
        return {pair.key for pair in warm if pair.kind is not Kind.RELAY}

    @property
    def peer_outside(self) -> list[Address]:
        """Where the peer says that others see it, the best first."""
        seen = (remote for remote in self._remotes if remote.kind is Kind.SRFLX)
        public = [remote for remote in seen if not is_private(remote.address.host)]
        return [remote.address for remote in sorted(public, key=lambda remote: remote.rank)]

    @property
    def peer_boot(self) -> str:
        """Another one for each process of the peer that is met by the rendezvous."""
        return "" if self._meeting is None else self._meeting.remote_ufrag

    def pairs(self) -> list[Pair]:
        """All, in the order they are asked in."""
        return [pair.snapshot() for pair in sorted(self._list.pairs.values(), key=self._list.order)]

    def pair(self, key: PathKey) -> Pair | None:
        pair = self._list.pairs.get(key)
        return None if pair is None else pair.snapshot()

    def named(self) -> list[Candidate]:
        """The peer's own, as it told them."""
        return [
            Candidate(remote.address, remote.kind, remote.rank, remote.metered)
            for remote in self._remotes
            if remote.named
        ]

    def candidates(self) -> tuple[int, tuple[Candidate, ...]]:
        """Our own for the peer, best first, and their generation, which grows at each change."""
        return self._own.generation, self._own.told

    def next_event(self) -> AgentEvent | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        return self._list.get_timer() if self.running else None

    def handle_timer(self, now: float) -> None:
        if self.running:
            self._list.handle_timer(now)

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        if self.running:
            self._list.ask_waiting(now)
        out, self._out = self._out, []
        return out

    def _send_check(self, pair: LivePair, transaction: bytes) -> bool:
        kind = Kind.RELAY if pair.base.relay else Kind.PRFLX
        sent = self._ask(pair.key, transaction, kind, pair.base.rank, pair.base.metered)
        if not sent and self.running:
            self._withheld.add(pair.key)
        return sent

    def _ask(self, key: PathKey, transaction: bytes, kind: Kind, rank: int, metered: bool) -> bool:
        """False where it is not to be asked now."""
        credentials = self._asking
        if credentials is None:
            return False
        if self._session is None and self._allowance is not None:
            if not self._allowance:
                return False
            self._allowance -= 1
        self.counters["checks_sent"] += 1
        self._send(key, check.request(credentials, transaction, priority(kind, rank, metered)))
        return True

    def _send(self, path: PathKey, data: bytes) -> None:
        self.counters["bytes_sent"] += len(data)
        self._out.append((path, data))
