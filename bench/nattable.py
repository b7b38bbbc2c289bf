"""What a NAT remembers and whom it lets in, by the terms of RFC 4787: plain state on injected time.

A *mapping* joins an inside endpoint to an outside one. How many an inside endpoint has is the
mapping behaviour (section 4.1): one for all destinations ("endpoint"-independent), one for each
destination "address", one for each destination address and "port". Who may send in through a
mapping is the filtering behaviour (section 5): everybody, whoever has an address that was written
to through it, or only an address and port that was.

Outside ports are drawn at random and never those of the inside: whoever counts on port
preservation is shown wrong. Only packets from inside refresh a mapping (section 4.3, REQ-6: those
from outside may, so nobody can count on it), and what it lets in is forgotten after the same time.
With `hairpin`, hosts inside reach each other at outside endpoints and see each other there, too
(section 6, REQ-9). A port forward is a mapping that was always there, lets everybody in, and stays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Behaviour = Literal["endpoint", "address", "port"]
Endpoint = tuple[str, int]

EXPIRY = 120.0  # seconds without a packet from inside; RFC 4787 section 4.3, REQ-5: at least
MAX_MAPPINGS = 4096
_PORTS = (1024, 65535)  # RFC 4787 section 4.2.2: well-known ports are not for everybody


@dataclass
class Binding:
    """One mapping; `allowed` has what its filter asks for, with the time it was last written to."""

    inside: Endpoint
    outside: Endpoint
    used: float
    allowed: dict[object, float] = field(default_factory=dict)
    static: bool = False


class NatTable:
    """The mappings of one NAT. `publics` are its outside addresses by family, the first in use;
    `forwards` outside ports by inside endpoint. Times are seconds of any steady clock.
    """

    def __init__(
        self,
        publics: Mapping[int, Sequence[str]],
        rng: random.Random,
        *,
        mapping: Behaviour = "endpoint",
        filtering: Behaviour = "port",
        hairpin: bool = False,
        expiry: float = EXPIRY,
        forwards: Mapping[Endpoint, int] | None = None,
    ) -> None:
        self.public = {family: addresses[0] for family, addresses in publics.items()}
        self.hairpin = hairpin
        self._publics = publics
        self._rng = rng
        self._mapping, self._filtering = mapping, filtering
        self._expiry = expiry
        self.forwards = dict(forwards or {})
        self._bindings: dict[tuple[Endpoint, object], Binding] = {}
        self._by_outside: dict[Endpoint, Binding] = {}
        self._past: set[int] = set()  # ports that a rebinding took away
        self._keep: dict[tuple[Endpoint, object], int] = {}  # and those that one left
        self._add_forwards()

    # ---- packets ----

    def outgoing(self, inside: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        """The outside endpoint that a packet from inside leaves from; makes a mapping where there
        is none. None: there are too many.
        """
        binding = self._bindings.get((inside, None))
        if binding is None or not binding.static:
            key = (inside, _part(self._mapping, remote))
            binding = self._bindings.get(key)
            if binding is not None and self._expired(binding, now):
                self._remove(key)
                binding = None
            if binding is None:
                binding = self._bind(key, now)
        if binding is None:
            return None
        binding.used = now
        binding.allowed[_part(self._filtering, remote)] = now
        return binding.outside

    def incoming(self, outside: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        """The inside endpoint for a packet from outside; None when it is filtered."""
        binding = self._by_outside.get(outside)
        if binding is None:
            return None
        if binding.static:
            return binding.inside
        written = binding.allowed.get(_part(self._filtering, remote))
        if self._expired(binding, now) or written is None or now - written >= self._expiry:
            return None
        return binding.inside

    def is_public(self, address: str) -> bool:
        """Whether it is an outside address in use: what is sent there from inside is a hairpin."""
        return address in self.public.values()

    # ---- events ----

    def rebind(self, *, port: bool = True, address: bool = False) -> None:
        """Forget all mappings; new ones have other ports, the next public address, or both. A
        forward moves along.
        """
        old = {key: binding.outside[1] for key, binding in self._bindings.items()}
        self._past, self._keep = (set(old.values()), {}) if port else (set(), old)
        if address:
            for family, choices in self._publics.items():
                place = choices.index(self.public[family]) + 1
                self.public[family] = choices[place % len(choices)]
        if port:
            self.forwards = {inside: self._free_port(inside) for inside in self.forwards}
        self._bindings.clear()
        self._by_outside.clear()
        self._add_forwards()

    def move(self, forwards: Mapping[Endpoint, int]) -> None:
        """Hosts inside have other addresses: these are the forwards now. Other mappings are left
        to expire.
        """
        for key in [key for key, binding in self._bindings.items() if binding.static]:
            self._remove(key)
        self.forwards = dict(forwards)
        self._add_forwards()

    def bindings(self) -> list[Binding]:
        """All mappings, the oldest first."""
        return list(self._bindings.values())

    # ---- bookkeeping ----

    def _bind(self, key: tuple[Endpoint, object], now: float) -> Binding | None:
        if len(self._bindings) >= MAX_MAPPINGS:
            for old in [k for k, b in self._bindings.items() if self._expired(b, now)]:
                self._remove(old)
            if len(self._bindings) >= MAX_MAPPINGS:
                return None
        outside = self._outside(key[0], self._keep.pop(key, 0) or self._free_port(key[0]))
        return self._insert(key, Binding(key[0], outside, now))

    def _outside(self, inside: Endpoint, port: int) -> Endpoint:
        return (self.public[family_of(inside[0])], port)

    def _free_port(self, inside: Endpoint) -> int:
        refused = {*self._past, *self._keep.values(), *self.forwards.values()}
        while True:  # far more ports than mappings
            port = self._rng.randint(*_PORTS)
            if port not in refused and self._outside(inside, port) not in self._by_outside:
                return port

    def _add_forwards(self) -> None:
        for inside, port in self.forwards.items():
            binding = Binding(inside, self._outside(inside, port), 0.0, static=True)
            self._insert((inside, None), binding)

    def _insert(self, key: tuple[Endpoint, object], binding: Binding) -> Binding:
        self._bindings[key] = binding
        self._by_outside[binding.outside] = binding
        return binding

    def _remove(self, key: tuple[Endpoint, object]) -> None:
        del self._by_outside[self._bindings.pop(key).outside]

    def _expired(self, binding: Binding, now: float) -> bool:
        return not binding.static and now - binding.used >= self._expiry


def _part(behaviour: Behaviour, remote: Endpoint) -> object:
    """What of a destination a behaviour depends on."""
    if behaviour == "endpoint":
        return None
    return remote[0] if behaviour == "address" else remote


def family_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4
