"""A pair: one of our sockets and one address of the peer. Its states, and what is known of it.

A pair is born WAITING, for its turn to be asked. Its first check makes it CHECKING. Only an answer
to a check of ours, on this very pair, makes it WARM: that proves both directions. A warm pair is
asked again and again, and 3 misses make it FAILED, as does silence to all the checks a CHECKING one
has, or a socket that refuses to send. A failed pair waits again when its time has come or the
network changed. A late answer proves a pair whatever was thought of it meanwhile. A new session
begins with all pairs WAITING, because old answers say nothing of it. A pair whose address, on
either side, is gone has no state: it is gone, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from tunnel.ice.candidate import Base, Kind, preference
from tunnel.ice.pacing import Bucket
from tunnel.ice.remote import Remote
from tunnel.path.liveness import NAT_KEEPALIVE
from tunnel.path.network import Address, PathKey

FIRST_RTO = 0.1
"""Seconds until a check is repeated while nothing is known: most round trips are shorter."""
RTO_FLOOR = 0.05
"""Seconds. Below it the scheduling noise of two hosts and their radios looks like loss."""
RTO_CEILING = 2.0
"""Seconds between checks of a pair that never answers: a NAT or firewall may open meanwhile."""
BUSY_INTERVAL = 1.0
"""Seconds between checks of a warm pair while traffic flows: its death is known in about two."""
IDLE_INTERVAL = NAT_KEEPALIVE
DOWN_AFTER = 3  # misses in a row
CHECKS_PER_ADDRESS = 20
"""Unanswered ones. The peer names addresses at will, and may name those of others."""
RETRY_CHECKS = 3  # for a pair that worked before and is tried again
GLIMPSE_CHECKS = 1
"""For one that never worked, while others do: many addresses of a peer can never be reached."""
RETRY_FIRST = 1.0
"""Seconds until a pair that worked before is tried again, doubled each time up to RETRY_LAST..."""
RETRY_HOLDING = 2.0
"""...but not beyond this while no pair is warm: then there is nothing else to do."""
RETRY_LAST = 60.0
MAX_WARM = 8
"""Pairs asked at the full rate: more ways out than most hosts have, few enough to be cheap."""

PATH_CHECKS_PER_SECOND = 5.0
PATH_CHECKS_BURST = 6.0
"""Of one pair: with about 100 bytes a check and as many answers, below 1 kB/s."""


class PairState(Enum):
    WAITING = "waiting"
    CHECKING = "checking"
    WARM = "warm"
    FAILED = "failed"


TRANSITIONS: dict[PairState, frozenset[PairState]] = {
    PairState.WAITING: frozenset(
        {PairState.WAITING, PairState.CHECKING, PairState.WARM, PairState.FAILED}
    ),
    PairState.CHECKING: frozenset({PairState.WAITING, PairState.WARM, PairState.FAILED}),
    PairState.WARM: frozenset({PairState.WAITING, PairState.WARM, PairState.FAILED}),
    PairState.FAILED: frozenset({PairState.WAITING, PairState.WARM}),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A snapshot for the selector and for status. Times are monotonic seconds."""

    key: PathKey
    kind: Kind
    """Of the remote candidate; RELAY where either end is a relay."""
    state: PairState
    rtt: float | None
    """Smoothed, seconds; None: never measured. Survives a failure and a session."""
    rtt_variance: float
    answered_at: float | None
    asked_at: float | None
    misses: int
    """Checks in a row without an answer in time."""
    valid_since: float | None
    """Since when it is warm without a break."""
    loss: float
    """Share of the last checks (about 8) that were not answered in time."""
    source: str
    """The IP address that its packets leave this host from."""
    local_rank: int
    remote_rank: int
    metered: bool
    """At either end."""
    trusted: bool
    """The remote address was named by the peer or by configuration, not merely seen."""


class LivePair:
    """What the agent keeps of a pair."""

    def __init__(self, base: Base, remote: Remote) -> None:
        self.base = base
        self.remote = remote
        self.key = PathKey(base.address, remote.address)
        self.state = PairState.WAITING
        self.rtt: float | None = None
        self.rtt_variance = 0.0
        self.answered_at: float | None = None
        self.asked_at: float | None = None
        self.misses = 0
        self.valid_since: float | None = None
        self.loss = 0.0
        self.mapped: Address | None = None
        """Where the peer sees this pair's checks come from."""
        self.heard = False
        """Whether the peer ever asked on it: one direction works."""
        self.patience = CHECKS_PER_ADDRESS
        self.failures = 0
        self.deadline: float | None = None
        """When the check that is out counts as missed."""
        self.ask_at: float | None = None
        """When to ask in any case."""
        self.retry_in = 0.0
        self.failed_at = 0.0
        self.asks = Bucket(PATH_CHECKS_PER_SECOND, PATH_CHECKS_BURST)
        self.answers = Bucket(PATH_CHECKS_PER_SECOND, PATH_CHECKS_BURST)

    # transitions

    def wait(self, patience: int) -> None:
        """To be asked, `patience` times at most, when its turn comes."""
        self._advance(PairState.WAITING)
        self.patience = patience
        self.misses = 0
        self.valid_since = None
        self.deadline = self.ask_at = None

    def renew(self) -> None:
        """Of another session: old answers count no more, what was measured is a good guess."""
        self.wait(CHECKS_PER_ADDRESS)
        self.answered_at = None
        self.failures = 0

    def asked(self, rto: float, now: float) -> None:
        if self.state is PairState.WAITING:
            self._advance(PairState.CHECKING)
        self.asked_at = now
        self.ask_at = None
        if self.deadline is None:  # else: of an earlier one; asking more must not hide a death
            self.deadline = now + rto

    def missed(self) -> None:
        self.deadline = None
        self.misses += 1
        self.loss += (1 - self.loss) / 8

    def answered(self, rtt: float, mapped: Address, now: float) -> None:
        """RFC 6298 section 2 for the round trip; every sample is of one transmission."""
        self._advance(PairState.WARM)
        if self.valid_since is None:
            self.valid_since = now
        if self.rtt is None:
            self.rtt, self.rtt_variance = rtt, rtt / 2
        else:
            self.rtt_variance += (abs(self.rtt - rtt) - self.rtt_variance) / 4
            self.rtt += (rtt - self.rtt) / 8
        self.loss -= self.loss / 8
        self.answered_at = now
        self.mapped = mapped
        self.misses = self.failures = 0
        self.deadline = self.ask_at = None

    def fail(self, retry_in: float, now: float) -> None:
        if self.state is not PairState.FAILED:
            self._advance(PairState.FAILED)
        self.failures += 1
        self.retry_in, self.failed_at = retry_in, now
        self.valid_since = None
        self.deadline = self.ask_at = None

    def _advance(self, to: PairState) -> None:
        if to not in TRANSITIONS[self.state]:
            raise ValueError(f"a pair cannot go from {self.state.value} to {to.value}")
        self.state = to

    # looking

    @property
    def warm(self) -> bool:
        return self.state is PairState.WARM

    @property
    def metered(self) -> bool:
        return self.base.metered or self.remote.metered

    @property
    def kind(self) -> Kind:
        return Kind.RELAY if self.base.relay else self.remote.kind

    @property
    def order(self) -> tuple[bool, int, int, PathKey]:
        """Best first: what is direct, the ranks of both ends, the kind; the key, so that it is
        total."""
        rank = self.base.rank + self.remote.rank
        return (self.kind is Kind.RELAY, rank, -preference(self.kind), self.key)

    def snapshot(self) -> Pair:
        return Pair(
            key=self.key,
            kind=self.kind,
            state=self.state,
            rtt=self.rtt,
            rtt_variance=self.rtt_variance,
            answered_at=self.answered_at,
            asked_at=self.asked_at,
            misses=self.misses,
            valid_since=self.valid_since,
            loss=self.loss,
            source=self.base.source,
            local_rank=self.base.rank,
            remote_rank=self.remote.rank,
            metered=self.metered,
            trusted=self.remote.trusted,
        )


# policy: pure functions over pairs


def warm_set(pairs: Iterable[LivePair], kept: Collection[PathKey]) -> frozenset[PathKey]:
    """The warm pairs to be asked at the full rate, at most MAX_WARM.

    Those that must stay warm, the best relayed one, which is left when nothing direct is, the best
    of every local base, then the best of all.
    """
    warm = sorted((pair for pair in pairs if pair.warm), key=lambda pair: pair.order)
    seen: set[Address] = set()
    relayed = False
    ranked: list[tuple[int, int, PathKey]] = []
    for place, pair in enumerate(warm):
        first = pair.key.local not in seen
        seen.add(pair.key.local)
        fallback = pair.kind is Kind.RELAY and not relayed
        relayed = relayed or fallback
        worth = 0 if pair.key in kept else 1 if fallback else 2 if first else 3
        ranked.append((worth, place, pair.key))
    return frozenset(key for _, _, key in sorted(ranked)[:MAX_WARM])


def check_interval(pair: LivePair, *, full_rate: bool, kept: bool, busy: bool) -> float:
    """Seconds between checks of a warm pair. A metered one is spared, unless it is in use."""
    return BUSY_INTERVAL if busy and full_rate and (kept or not pair.metered) else IDLE_INTERVAL


def timeout(pair: LivePair, slowest: LivePair | None) -> float:
    """Seconds until a check on `pair` counts as missed.

    `slowest` of the pairs that were measured stands in for one that was not: a satellite must not
    be asked three times in vain on its first round trip.
    """
    known = pair if pair.rtt is not None else slowest
    first = FIRST_RTO
    if known is not None and known.rtt is not None:
        first = max(1.25 * known.rtt + 4 * known.rtt_variance, RTO_FLOOR)
    return min(first * 2.0**pair.misses, max(first, RTO_CEILING))


def retry_delay(pair: LivePair, *, refused: bool, jitter: float) -> float:
    """Seconds until a pair that fails now is tried again; `jitter` from -1 to 1.

    One that worked is tried soon, as is one that the socket `refused`, which costs nothing. For the
    others both ends must ask within the life of each other's NAT mappings: without jitter, two ends
    that ask in turns would do so for ever.
    """
    if refused or pair.rtt is not None:
        return min(RETRY_FIRST * 2.0 ** min(pair.failures, 10), RETRY_LAST)
    return RETRY_LAST * (1 + jitter / 4)


def retry_checks(pair: LivePair, *, holding: bool) -> int:
    """How many checks it gets then; `holding` while no pair is warm."""
    if pair.rtt is not None:
        return RETRY_CHECKS
    return CHECKS_PER_ADDRESS if holding else GLIMPSE_CHECKS
