"""Our own candidates, as the peer is told them: a full list with a generation.

Host candidates, one for each base, or relayed ones, where it is a relay; server-reflexive ones, of
which there are four sources for a base: the port that the router mapped to it, STUN servers, what
the peer observed of the session, and what it saw our checks come from. Behind a NAT that maps each
destination to another port the latter three never agree, so that only the few seen most often are
told. Advertised addresses come first: somebody configured them.

A mapped port is the best of those of a base: everybody may send there. Unless its address is not
public: then the router is behind another NAT, and the mapping leads to us for those between the two
only. It is told all the same, after what STUN servers see: peers of the same provider or building
have no other way, and one more candidate costs the others 20 checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from tunnel.config import IPNetwork
from tunnel.ice.candidate import MAX_RANK, Base, Candidate, Kind, usable_candidate
from tunnel.ice.pair import LivePair
from tunnel.ice.portmap import is_translated
from tunnel.ice.remote import MAX_REMOTES
from tunnel.path.network import Address

MAX_MAPPED = 3  # of what checks were seen to come from, for each base


class OwnCandidates:
    """Keeps the list; `generation` grows whenever it changes."""

    def __init__(self, advertise: Sequence[Address], forbidden: Sequence[IPNetwork]) -> None:
        self.generation = 0
        self.told: tuple[Candidate, ...] = ()
        self.hard: bool | None = None
        """Whether the NAT before them maps each destination to another port. Goes with the list."""
        self._advertise = tuple(advertise)
        self._forbidden = tuple(forbidden)
        self._mapped: dict[Address, Address] = {}
        self._reflexive: dict[Address, Address] = {}
        self._observed: dict[Address, Address] = {}
        self.refresh((), ())

    def mapped_changed(self, mapped: Mapping[Address, Address]) -> None:
        self._mapped = dict(mapped)

    def forbidden_changed(self, forbidden: Sequence[IPNetwork]) -> None:
        """True for what the next `refresh` makes."""
        self._forbidden = tuple(forbidden)

    def reflexive_changed(self, mapped: Mapping[Address, Address]) -> None:
        self._reflexive = dict(mapped)

    def hard_changed(self, hard: bool | None) -> None:
        self.generation += hard != self.hard
        self.hard = hard

    def observed(self, local: Address, address: Address) -> None:
        self._observed[local] = address

    def keep_bases(self, bases: Collection[Address]) -> None:
        """What was seen of a base that is gone is not true when it comes back."""
        self._mapped = {b: a for b, a in self._mapped.items() if b in bases}
        self._reflexive = {b: a for b, a in self._reflexive.items() if b in bases}
        self._observed = {b: a for b, a in self._observed.items() if b in bases}

    def refresh(self, bases: Iterable[Base], pairs: Iterable[LivePair]) -> None:
        """Make the list anew. With pairs that are warm, what others saw is old."""
        pairs = [pair for pair in pairs if pair.mapped is not None]
        found: list[Candidate] = [Candidate(a, Kind.SRFLX, 0, False) for a in self._advertise]
        for base in sorted(bases, key=lambda base: (base.relay, base.rank, base.address)):
            rank = min(base.rank, MAX_RANK)
            if base.relay:
                found.append(Candidate(base.address, Kind.RELAY, rank, base.metered))
                continue
            found.append(Candidate(base.address, Kind.HOST, rank, base.metered))
            mine = [pair for pair in pairs if pair.base is base]
            counted = Counter(
                pair.mapped for pair in [p for p in mine if p.warm] or mine if pair.mapped
            )
            often = sorted(counted, key=lambda address: (-counted[address], address))
            mapped = self._mapped.get(base.address)
            public = mapped is not None and not is_translated(mapped.host)
            for seen in (
                mapped if public else None,
                self._reflexive.get(base.address),
                mapped,
                self._observed.get(base.address),
                *often[:MAX_MAPPED],
            ):
                if seen is not None:
                    found.append(Candidate(seen, Kind.SRFLX, rank, base.metered))
        unique: dict[Address, Candidate] = {}
        for candidate in found:
            if usable_candidate(candidate.address, self._forbidden):
                unique.setdefault(candidate.address, candidate)
        told = tuple(unique.values())[:MAX_REMOTES]
        if told != self.told:
            self.told = told
            self.generation += 1
