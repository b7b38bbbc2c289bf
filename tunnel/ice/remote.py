"""The addresses of the peer: who vouches for each, which are kept when there are too many.

An address is *configured* (the user wrote it), *named* (in the peer's latest list), *pinned* (the
session's packets come from there) or merely *seen* (an authentic check came from there), and may be
several of these. Only the first two are trusted: what is seen may be the address of somebody who
forwards packets (RFC 9000 section 9.3.3).

Full means full: 32. A newcomer takes the place of one that has failed and is not configured, or of
one with a weaker claim; one that is not trusted also that of its like that was heard of longest
ago. Never of one that has a warm pair. Of a list that is too long for the room, the first stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunnel.config import IPNetwork
from tunnel.ice.candidate import Candidate, Kind, usable_candidate
from tunnel.path.network import Address

MAX_REMOTES = 32
REMEMBERED = 256
"""Addresses that are gone whose count of unanswered checks is kept, or a peer that names and
unnames somebody else's would have us ask there without end."""
NAMED_REFILL = 10.0
"""Seconds at least between two full counts of checks that a new list brings an address."""
RETRY_REFILL = 40.0
"""The same for retries: less than their least delay."""


@dataclass(slots=True)
class Remote:
    """An address of the peer."""

    address: Address
    kind: Kind
    rank: int
    metered: bool
    configured: bool = False
    named: bool = False
    pinned: bool = False
    heard_at: float = 0.0
    unanswered: int = 0
    """Checks since the last answer from there, to pairs that are not warm."""
    refilled_at: float = 0.0

    @property
    def trusted(self) -> bool:
        return self.configured or self.named

    @property
    def strength(self) -> int:
        return 3 if self.configured else 2 if self.named else 1 if self.pinned else 0

    def refill(self, now: float, at_least: float = 0.0) -> None:
        """Grant it all its checks again, unless that was less than `at_least` seconds ago."""
        if not self.unanswered or now - self.refilled_at >= at_least:
            self.unanswered = 0
            self.refilled_at = now


@dataclass(frozen=True, slots=True)
class Standing:
    """How the addresses fare: those with a warm pair, and those whose pairs have all failed."""

    warm: frozenset[Address]
    failed: frozenset[Address]


class Remotes:
    """All addresses of a peer."""

    def __init__(self, forbidden: Sequence[IPNetwork]) -> None:
        self._forbidden = tuple(forbidden)
        self._known: dict[Address, Remote] = {}
        self._spent: OrderedDict[Address, tuple[int, float]] = OrderedDict()
        self.generation = -1
        """Of the latest list."""

    def __iter__(self) -> Iterator[Remote]:
        return iter(list(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, address: Address) -> Remote | None:
        return self._known.get(address)

    def forbidden_changed(self, forbidden: Sequence[IPNetwork]) -> None:
        """Forget what is inside the tunnel now."""
        self._forbidden = tuple(forbidden)
        for remote in self:
            if not usable_candidate(remote.address, self._forbidden):
                self.forget(remote.address)

    def new_session(self) -> None:
        """The peer may have been restarted, and counts its lists from the beginning."""
        self.generation = -1

    def network_changed(self, now: float) -> None:
        """What was silent may answer now."""
        self._spent.clear()
        for remote in self._known.values():
            remote.refill(now)

    def name(
        self, generation: int, candidates: Sequence[Candidate], standing: Standing, now: float
    ) -> None:
        """The peer's list, in full, newer than the one before."""
        self.generation = generation
        named: dict[Address, Candidate] = {}
        for candidate in candidates:
            if usable_candidate(candidate.address, self._forbidden):
                named.setdefault(candidate.address, candidate)
        for remote in self:
            if not remote.named or remote.address in named:
                continue
            remote.named = False
            if not remote.configured:
                remote.kind = Kind.PRFLX
            if remote.strength == 0 and remote.address not in standing.warm:
                self.forget(remote.address)
        for candidate in named.values():
            known = self._admit(candidate, 2, standing, now)
            if known is not None:
                known.kind, known.rank, known.metered = candidate[1:]
                known.named = True
                known.refill(now, NAMED_REFILL)

    def pin(self, address: Address, *, configured: bool, standing: Standing, now: float) -> None:
        """From configuration, or where the session's packets come from."""
        if not usable_candidate(address, self._forbidden):
            return
        kind = Kind.HOST if configured else Kind.PRFLX
        known = self._admit(
            Candidate(address, kind, 0, False), 3 if configured else 1, standing, now
        )
        if known is not None:
            known.pinned = True
            known.configured |= configured

    def see(
        self,
        address: Address,
        rank: int,
        metered: bool,
        standing: Standing,
        now: float,
        *,
        kind: Kind = Kind.PRFLX,
    ) -> None:
        """An authentic check of the peer came from there."""
        if usable_candidate(address, self._forbidden):
            self._admit(Candidate(address, kind, rank, metered), 0, standing, now)

    def forget(self, address: Address) -> None:
        remote = self._known.pop(address, None)
        if remote is not None and remote.unanswered:
            self._spent[address] = (remote.unanswered, remote.refilled_at)
            while len(self._spent) > REMEMBERED:
                self._spent.popitem(last=False)

    def _admit(
        self, candidate: Candidate, strength: int, standing: Standing, now: float
    ) -> Remote | None:
        """The entry of this address, a new one if there is room, else None."""
        known = self._known.get(candidate.address)
        if known is None:
            if len(self._known) >= MAX_REMOTES:
                victim = self._victim(strength, standing)
                if victim is None:
                    return None
                self.forget(victim.address)
            known = Remote(*candidate, refilled_at=now)
            known.unanswered, known.refilled_at = self._spent.pop(candidate.address, (0, now))
            self._known[candidate.address] = known
        known.heard_at = now
        return known

    def _victim(self, strength: int, standing: Standing) -> Remote | None:
        willing = [
            remote
            for remote in self._known.values()
            if remote.address not in standing.warm
            and (
                remote.strength < strength
                or (remote.strength == strength and not remote.trusted)
                or (remote.address in standing.failed and not remote.configured)
            )
        ]
        return min(willing, key=lambda remote: (remote.strength, remote.heard_at), default=None)
