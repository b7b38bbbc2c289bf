"""Which path to send on: pure functions from plain facts to an order, with reasons.

What counts, in this order: that the path answers; that it is direct; that it is not metered; the
order of the interfaces at both ends, which is the kernel's routing table and so the user's own
policy; the round trip. Both ends know all of these of each other (the ranks and what is metered are
told with the candidates), so both come to the same order without agreeing on anything.

To order paths is one thing, to move another: a path in use is left for one that is *clearly* better
only, and that has been so for a while (`clearly_better`, `Damper`). A path that is dead is left at
once, which is no business of this module but `choose` says where to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tunnel.path.network import Address, LocalNetwork, PathKey, is_usable_remote

RTT_GAIN, RTT_GAIN_MINIMUM = 0.8, 0.005
"""A round trip is clearly shorter when it is at most this share of the other, this many seconds
less, and less by more than both vary: a fifth of 20 ms is what a busy Wi-Fi varies by itself."""
RANK_TOLERANCE, RANK_TOLERANCE_MINIMUM = 2.0, 0.050
"""A preferred interface is used although its round trip is longer, up to twice the other's and
50 ms more: beyond that people notice, and the order of metrics was hardly meant so."""
LOSS_GAIN = 0.3
"""Share of checks lost that makes a path clearly worse. Of about eight checks it takes three: one
alone counts for an eighth, and is lost every minute on a path that loses 1% each way."""
LOSS_DOUBT = 0.1
"""The same, that keeps a path from being moved to for any other reason: less, or one that was left
for its losses would be come back to as soon as it had a little luck."""
SETTLE = 1.0
"""Seconds that a path must have been clearly better before it is moved to, at first."""
SETTLE_LIMIT = 60.0
FLAP_MEMORY = 120.0
"""Seconds after which a move is forgotten; until then each doubles the wait for the next one that
nobody needs."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the order depends on. Times in seconds."""

    key: PathKey
    warm: bool
    """It answers checks."""
    relayed: bool = False
    source: str = ""
    """The IP address that it leaves this host from; empty: that of the local socket."""
    metered: bool = False
    """At either end."""
    rank: int = 0
    """Of the interfaces by the routes of both ends, added; lower is preferred."""
    rtt: float | None = None
    rtt_variance: float = 0.0
    """How much it varies (RFC 6298 section 2)."""
    loss: float = 0.0
    """Share of the latest checks that were not answered."""
    failed: bool = False
    """QUIC found it dead lately, whatever the checks say."""

    @property
    def uplink(self) -> str:
        return self.source or self.key.local.host


def order(facts: Iterable[Facts]) -> list[Facts]:
    """All of them, best first; the same at both ends but for the measured round trips."""
    return sorted(facts, key=_key)


def _key(path: Facts) -> tuple[bool, bool, bool, bool, int, float, PathKey]:
    rtt = path.rtt if path.rtt is not None else float("inf")
    return (
        not path.warm, path.failed, path.relayed, path.metered, path.rank, rtt, path.key
    )  # fmt: skip


def why_before(better: Facts, worse: Facts, *, one: str = "it", other: str = "the other") -> str:
    """In words, the first thing that puts one path before another; what to call the two of them."""
    if better.warm != worse.warm:
        return f"{one} answers, {other} does not"
    if better.failed != worse.failed:
        return f"{other} was found dead lately"
    if better.relayed != worse.relayed:
        return f"{one} is direct, {other} relayed"
    if better.metered != worse.metered:
        return f"{other} is metered"
    if better.rank != worse.rank:
        return f"the routes of the two hosts prefer {one}"
    if better.rtt is not None and worse.rtt is not None and better.rtt < worse.rtt:
        times = f"{better.rtt * 1e3:.1f} ms, not {worse.rtt * 1e3:.1f}"
        return f"{one} has the shorter round trip ({times})"
    return "nothing tells them apart, and one has to be first"


def clearly_better(path: Facts, active: Facts) -> str | None:
    """The reason to leave a living path for another; None where the difference is not worth it."""
    if not path.warm or path.failed or path.key == active.key:
        return None
    for worse, better, reason in (
        (active.relayed, path.relayed, "it is direct, not relayed"),
        (active.metered, path.metered, "it is not metered"),
    ):
        if worse != better:
            return reason if worse else None
    if path.loss > active.loss + LOSS_DOUBT:
        return None
    if active.loss > path.loss + LOSS_GAIN:
        return "it loses less"
    if path.rtt is None or active.rtt is None:
        return "the routes prefer it" if path.rank < active.rank else None
    if path.rank < active.rank:
        tolerated = active.rtt * RANK_TOLERANCE + RANK_TOLERANCE_MINIMUM
        return "the routes prefer it" if path.rtt <= tolerated else None
    if path.rank > active.rank:
        tolerated = path.rtt * RANK_TOLERANCE + RANK_TOLERANCE_MINIMUM
        return "its round trip is much shorter" if active.rtt > 1.25 * tolerated else None
    varies = max(RTT_GAIN_MINIMUM, active.rtt_variance + path.rtt_variance)
    gain = min(active.rtt * RTT_GAIN, active.rtt - varies)
    return "its round trip is shorter" if path.rtt < gain else None


def second(
    active: PathKey, facts: Iterable[Facts], *, metered: bool, current: PathKey | None = None
) -> PathKey | None:
    """The path that shares least with the active one, best first: what kills one spares the other.

    `metered`: whether a metered path may serve. `current` stays while nothing is better in kind.
    """
    facts = list(facts)
    leaves = next((path.uplink for path in facts if path.key == active), active.local.host)
    usable = [
        path
        for path in facts
        if path.warm and not path.failed and path.key != active and (metered or not path.metered)
    ]
    if not usable:
        return None

    def key(path: Facts) -> tuple[int, bool, bool, int, bool, float]:
        shared = (path.uplink == leaves) * 2 + (path.key.remote.host == active.remote.host)
        rtt = path.rtt if path.rtt is not None else float("inf")
        return (shared, path.relayed, path.metered, path.rank, path.key != current, rtt)

    return min(usable, key=key).key


@dataclass(slots=True)
class Damper:
    """How long a better path must have been better: longer with each move of late."""

    moves: list[float] = field(default_factory=list)
    """When either end moved, for whatever reason: a link that comes and goes is no better one."""

    def moved(self, now: float) -> None:
        self.moves = [at for at in self.moves if now - at < FLAP_MEMORY] + [now]

    def wait(self, now: float, *, told: bool = False) -> float:
        """Seconds that a path must have been clearly better to be moved to.

        `told`: the kernel's routes have just come to prefer it, which once is reason enough.
        """
        recent = sum(1 for at in self.moves if now - at < FLAP_MEMORY)
        if told and not recent:
            return 0.0
        return min(SETTLE * (1 << min(recent, 10)), SETTLE_LIMIT)


# Paths that nobody has checked yet: where to dial, and where to flee when nothing is warm.


def candidates(
    network: LocalNetwork, port: int, remotes: Sequence[Address], *, limit: int = 16
) -> list[PathKey]:
    """All paths from here to these addresses, best first.

    `remotes` best first. Every local address is paired with the first remote it can reach before
    any is paired with a second one, so that the first few cover all uplinks.
    """
    ranked: list[tuple[int, int, int, PathKey]] = []
    uses: dict[str, int] = {}
    for place, remote in enumerate(remotes):
        if not is_usable_remote(remote.host):
            continue
        for rank, source in enumerate(network.sources(remote.host)):
            turn = uses.get(source.ip, 0)
            uses[source.ip] = turn + 1
            ranked.append((turn, place, rank, PathKey(Address(source.ip, port), remote)))
    ranked.sort(key=lambda entry: entry[:3])
    return [entry[3] for entry in ranked[:limit]]


def unique(items: Iterable[_T]) -> list[_T]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(items))


def best_from(network: LocalNetwork, port: int, remotes: Sequence[Address]) -> PathKey | None:
    """Where to go when nothing is warm and the active path's local address is gone.

    The first remote address that any local address reaches; None when there is no way at all.
    """
    for remote in remotes:
        found = candidates(network, port, [remote], limit=1)
        if found:
            return found[0]
    return None
