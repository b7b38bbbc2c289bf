"""The checklist: all pairs of a peer, and when each is asked (RFC 8445 section 6.1.2, without end).

It decides when; `agent` says what came in, `pair` holds the rules as pure functions. Deadlines are
not stored but follow from what is known of each pair, so that a change of rate, of the pairs to be
kept, or of whether anything is warm at all holds at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping

from tunnel.ice.candidate import Base, relay_reaches
from tunnel.ice.check import Transactions
from tunnel.ice.events import AgentEvent, PairAnswered, PairDown, PairUp
from tunnel.ice.pacing import Bucket
from tunnel.ice.pair import (
    BUSY_INTERVAL,
    CHECKS_PER_ADDRESS,
    DOWN_AFTER,
    RETRY_CHECKS,
    RETRY_HOLDING,
    LivePair,
    PairState,
    check_interval,
    retry_checks,
    retry_delay,
    timeout,
    warm_set,
)
from tunnel.ice.remote import RETRY_REFILL, Remotes, Standing
from tunnel.path.network import Address, LocalNetwork, PathKey

MAX_PAIRS = 100
PACE = 0.005
"""Seconds between first checks after the burst: less would be a burst in a slow radio's queue."""
PACE_BURST = 8.0
"""As many as a host with two interfaces and IPv6 has pairs worth anything."""
REVIVE_AFTER = 5.0
"""Seconds at least between tries that `check_now` gives to pairs that never worked."""


class CheckList:
    def __init__(
        self,
        remotes: Remotes,
        *,
        rng: random.Random,
        send: Callable[[LivePair, bytes], bool],
        emit: Callable[[AgentEvent], None],
    ) -> None:
        """`send` makes a check of this pair and transaction, and sends it; False: it did not."""
        self.pairs: dict[PathKey, LivePair] = {}
        self.transactions = Transactions(rng.randbytes)
        self.busy = False
        self.kept: frozenset[PathKey] = frozenset()
        self._remotes = remotes
        self._rng = rng
        self._send = send
        self._emit = emit
        self._pace = Bucket(1 / PACE, PACE_BURST)
        self._full_rate: frozenset[PathKey] = frozenset()
        self._network = LocalNetwork()
        self._bases: Mapping[Address, Base] = {}
        self._sources: dict[str, frozenset[str]] = {}

    # which pairs there are

    def new_session(self) -> None:
        self.transactions.clear()
        for pair in self.pairs.values():
            pair.renew()
        self._choose()

    def bases_changed(self, network: LocalNetwork, bases: Mapping[Address, Base]) -> None:
        self._network, self._bases = network, bases
        self._sources.clear()
        for key, pair in list(self.pairs.items()):
            base = bases.get(key.local)
            if base is None or base.interface != pair.base.interface:
                self._remove(pair, "address gone")
            elif not self._has_route(base, key.remote):
                self._remove(pair, "no route")
            else:
                pair.base = base
                if pair.state is PairState.FAILED:
                    pair.failures = 0
                    pair.wait(CHECKS_PER_ADDRESS)
        self.rebuild()

    def rebuild(self, heard: PathKey | None = None) -> None:
        """Pair what there is now, the best 100: `heard` is a pair that the peer asks on."""
        ranked: list[tuple[tuple[bool, ...], LivePair]] = []
        for remote in self._remotes:
            for base in self._bases.values():
                if not self._has_route(base, remote.address):
                    continue
                key = PathKey(base.address, remote.address)
                pair = self.pairs.get(key) or LivePair(base, remote)
                pair.remote = remote  # it may have been forgotten and learnt again
                worth = (
                    key not in self.kept,
                    not pair.warm,
                    not (pair.heard or key == heard),
                    pair.state is PairState.FAILED,
                )
                ranked.append((worth, pair))
        ranked.sort(key=lambda entry: (entry[0], entry[1].order))
        wanted = {pair.key: pair for _, pair in ranked[:MAX_PAIRS]}
        for key, pair in list(self.pairs.items()):
            if key not in wanted:
                self._remove(pair, "candidate gone")
        self.pairs.update(wanted)
        self._choose()

    def retry(self, addresses: Collection[Address]) -> None:
        """These are named anew: their failed pairs have another turn, if it is not too soon."""
        for pair in self.pairs.values():
            if (
                pair.state is PairState.FAILED
                and pair.key.remote in addresses
                and pair.remote.unanswered < CHECKS_PER_ADDRESS
            ):
                pair.wait(CHECKS_PER_ADDRESS)

    def ask_withheld(self, keys: Collection[PathKey]) -> None:
        """Checks of these pairs were not sent: now they are to be."""
        for pair in [self.pairs[key] for key in keys if key in self.pairs]:
            if not pair.warm:
                pair.wait(CHECKS_PER_ADDRESS)

    def retry_configured(self, now: float) -> None:
        """The peer has come to new addresses: a port forward that the user wrote down, and that led
        nowhere so far, may lead to one of them."""
        later = 0
        for pair in self.pairs.values():
            if not pair.remote.configured:
                continue
            pair.remote.refill(now)  # nobody but the user named it
            if pair.state is PairState.FAILED:
                pair.wait(RETRY_CHECKS)
            elif pair.state is not PairState.WAITING:
                later += 1
                pair.ask_at = now + later * PACE

    def keep(self, keys: Collection[PathKey]) -> None:
        self.kept = frozenset(keys)
        self._choose()

    def standing(self) -> Standing:
        alive = {k.remote for k, pair in self.pairs.items() if pair.state is not PairState.FAILED}
        return Standing(
            warm=frozenset(
                k.remote for k, pair in self.pairs.items() if pair.warm or k in self.kept
            ),
            failed=frozenset(r.address for r in self._remotes if r.address not in alive),
        )

    def order(self, pair: LivePair) -> tuple[bool, tuple[bool, int, int, PathKey]]:
        return (pair.key not in self.kept, pair.order)

    def _has_route(self, base: Base, remote: Address) -> bool:
        if base.relay:  # the routes are the server's
            return relay_reaches(base.address, remote)
        sources = self._sources.get(remote.host)
        if sources is None:
            if len(self._sources) >= MAX_PAIRS:
                self._sources.clear()  # addresses come and go
            sources = frozenset(a.ip for a in self._network.sources(remote.host))
            self._sources[remote.host] = sources
        return base.address.host in sources

    def _remove(self, pair: LivePair, reason: str) -> None:
        del self.pairs[pair.key]
        self.transactions.forget(pair.key)
        if pair.warm or pair.key in self.kept:
            self._emit(PairDown(pair.key, reason))

    def _choose(self) -> None:
        self._full_rate = warm_set(self.pairs.values(), self.kept)

    def _forget_seen(self) -> None:
        """Addresses that nobody vouches for, silent while another works: a NAT's old mappings."""
        if not self._full_rate:
            return
        failed = self.standing().failed
        gone = [r.address for r in self._remotes if r.strength == 0 and r.address in failed]
        for address in gone:
            self._remotes.forget(address)
        if gone:
            self.rebuild()

    # asking

    def check_now(self, now: float, keys: Iterable[PathKey] | None) -> None:
        if keys is not None:
            for pair in [self.pairs[key] for key in keys if key in self.pairs]:
                self.ask_now(pair, now)
            return
        later = 0
        for pair in sorted(self.pairs.values(), key=self.order):
            if pair.key in self._full_rate:
                self.ask_now(pair, now)
            elif pair.warm or (
                pair.state is PairState.CHECKING and now - (pair.asked_at or 0.0) >= BUSY_INTERVAL
            ):
                # Of those without an answer so far only the backed off, or suspicions in a row
                # would spend all their checks.
                later += 1
                pair.ask_at = now + later * PACE
            elif pair.state is PairState.FAILED and (
                pair.rtt is not None
                or (not self._full_rate and now - pair.failed_at >= REVIVE_AFTER)
            ):
                pair.wait(RETRY_CHECKS)

    def ask_now(self, pair: LivePair, now: float) -> None:
        """Out of its turn, whatever its state."""
        if pair.state is PairState.FAILED:
            pair.wait(RETRY_CHECKS)
        self._ask(pair, now)

    def ask_waiting(self, now: float) -> None:
        waiting = [p for p in self.pairs.values() if p.state is PairState.WAITING]
        for pair in sorted(waiting, key=self.order):
            if pair.asks.ready_at() > now:
                continue
            if not self._pace.take(now):
                break
            self._ask(pair, now)

    def _ask(self, pair: LivePair, now: float) -> None:
        if not pair.asks.take(now):
            if pair.state is not PairState.WAITING:
                pair.ask_at = pair.asks.ready_at()
            return
        transaction = self.transactions.open(pair.key, now)
        pair.asked(timeout(pair, self._slowest()), now)
        if self._send(pair, transaction) and not pair.warm:
            pair.remote.unanswered += 1

    def _slowest(self) -> LivePair | None:
        measured = [pair for pair in self.pairs.values() if pair.rtt is not None]
        return max(measured, key=lambda pair: pair.rtt or 0.0, default=None)

    # what comes of it

    def answered(self, pair: LivePair, mapped: Address, asked_at: float, now: float) -> None:
        was_warm = pair.warm
        pair.answered(now - asked_at, mapped, now)
        pair.remote.refill(now)
        if was_warm:
            self._emit(PairAnswered(pair.key, asked_at, now - asked_at))
            return
        self._choose()
        self._emit(PairUp(pair.key, now - asked_at))
        self._forget_seen()

    def fail(self, pair: LivePair, reason: str, now: float, *, refused: bool = False) -> None:
        was_warm = pair.warm
        pair.fail(retry_delay(pair, refused=refused, jitter=self._rng.uniform(-1, 1)), now)
        if was_warm:
            self._choose()
            self._emit(PairDown(pair.key, reason))
        self._forget_seen()

    def _missed(self, pair: LivePair, now: float) -> None:
        pair.missed()
        if pair.warm:
            dead = pair.misses >= DOWN_AFTER
        else:
            dead = pair.misses >= pair.patience or pair.remote.unanswered >= CHECKS_PER_ADDRESS
        if dead:
            self.fail(pair, f"{pair.misses} checks unanswered", now)
        else:
            self._ask(pair, now)

    # time

    def get_timer(self) -> float | None:
        times = [at for pair in self.pairs.values() if (at := self._due(pair)) is not None]
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        self.transactions.expire(now)
        for pair in list(self.pairs.values()):
            due = self._due(pair)
            if due is None or due > now or self.pairs.get(pair.key) is not pair:
                continue
            if pair.state is PairState.FAILED:
                pair.remote.refill(now, RETRY_REFILL)
                pair.wait(retry_checks(pair, holding=not self._full_rate))
            elif pair.deadline is not None and pair.deadline <= now:
                self._missed(pair, now)
            elif pair.state is not PairState.WAITING:
                self._ask(pair, now)
        self.ask_waiting(now)

    def _due(self, pair: LivePair) -> float | None:
        """When something is to be done about a pair."""
        if pair.state is PairState.WAITING:
            return max(self._pace.ready_at(), pair.asks.ready_at())
        if pair.state is PairState.FAILED:
            wait = pair.retry_in
            if pair.rtt is not None and not self._full_rate:
                wait = min(wait, RETRY_HOLDING)
            return pair.failed_at + wait
        times = [at for at in (pair.deadline, pair.ask_at) if at is not None]
        if not times and pair.warm and pair.asked_at is not None:
            interval = check_interval(
                pair,
                full_rate=pair.key in self._full_rate,
                kept=pair.key in self.kept,
                busy=self.busy,
            )
            times.append(pair.asked_at + interval)
        return min(times, default=None)
