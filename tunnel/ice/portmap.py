"""A port of the home router that leads to one of our sockets: asked for, renewed, given back.

One `PortMapping` for each local address behind a NAT (or, with IPv6, a firewall). It asks the
default gateway in three ways, one after the other, until one succeeds: PCP, NAT-PMP, UPnP. The
first two are datagrams that this module makes; UPnP is left to a library outside, which is asked by
events. Then:

- a mapping is renewed when half of its lifetime is over, again at half of what is left;
- a gateway that lost its mappings tells so by its epoch, in an answer or an announcement
  (RFC 6887 section 8.5), and is asked again at once, or after some random seconds if announced to
  everybody;
- where nobody answers, nobody is asked for 10 minutes, doubled each time up to 6 hours: most
  routers have none of the three, or have them switched off;
- `close` deletes the mapping, with three tries at the most.

Cost of a gateway that is silent: three requests of PCP and three times two of NAT-PMP, 222 bytes in
all, and the search for UPnP. One that refuses port 5351 at once costs one request.

Only the gateway is listened to, but on the link anybody can be it. All that comes of a lie is a
candidate that leads nowhere, and a packet to the gateway.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from enum import Enum, StrEnum
from ipaddress import IPv4Network, ip_address

from tunnel.ice import pcp
from tunnel.path.network import Address, is_usable_remote

LIFETIME = 7200
"""Seconds asked for, as RFC 6886 section 3.3 recommends: for so long a host that died leaves a hole
in the router."""
TRY_AFTER = (0.0, 0.25, 0.5, 1.0)
"""Seconds until the first, second and third try, and until it is given up: those that RFC 6886
section 3.1 begins with. A gateway is one hop away."""
TRIES = 3
RENEW_FLOOR = 15.0
"""Seconds at least between renewals, whatever lifetime the gateway grants."""
REST_FIRST, REST_LAST = 600.0, 6 * 3600.0
"""Seconds until a gateway that granted nothing is asked again. A router that was being restarted,
or a user who switches mappings on, should not have to wait for a day."""
ROUND_PAUSE = 5.0
"""Seconds at least between two times of asking: networks may change many times a minute."""
HERD = 5.0
"""Seconds over which the clients of a restarted gateway spread (RFC 6887 section 14.1.3)."""
LONGEST = 86400.0
"""Seconds: a lifetime beyond counts as this much, so that nothing is believed for a year."""

_SHARED = [
    IPv4Network(network)
    for network in (
        "10.0.0.0/8",  # RFC 1918
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # RFC 6598: of a provider's NAT
        "192.0.0.0/29",  # RFC 7335: inside of DS-Lite
        "169.254.0.0/16",  # RFC 3927
    )
]


def is_translated(host: str) -> bool:
    """Whether packets from this address meet a NAT on their way out: it is not public.

    The external address of a mapping that is so is that of an inner one of two NATs. It leads to us
    for those between the two only: others in the same building, or of the same provider.
    """
    ip = ip_address(host)
    return any(ip in network for network in _SHARED)


class Protocol(StrEnum):
    PCP = "pcp"
    NATPMP = "nat-pmp"
    UPNP = "upnp"


class State(Enum):
    ASKING = "asking"
    MAPPED = "mapped"
    RESTING = "resting"
    CLOSED = "closed"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.ASKING: frozenset({State.ASKING, State.MAPPED, State.RESTING, State.CLOSED}),
    State.MAPPED: frozenset({State.MAPPED, State.ASKING, State.CLOSED}),
    State.RESTING: frozenset({State.ASKING, State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class ExternalChanged:
    """`PortMapping.external` is another now."""


@dataclass(frozen=True, slots=True)
class UpnpWanted:
    """Please ask by UPnP, and answer with `PortMapping.upnp_answered`."""

    port: int
    """The external port to try first."""


Event = ExternalChanged | UpnpWanted


class PortMapping:
    """Of one of our sockets, with its gateway. All times are the monotonic seconds of the shell."""

    def __init__(self, base: Address, *, nonce: bytes, rng: random.Random, now: float) -> None:
        """`nonce`: 12 bytes, secret, the same for this base after a restart, or the gateway would
        take us for somebody else who wants our mapping (RFC 6887 section 11.3)."""
        self.base = base
        self.state = State.ASKING
        self.protocol = Protocol.PCP
        """The one that is asked, or that mapped."""
        self.external: Address | None = None
        """Where the gateway says that the base is reached from outside."""
        self.expires_at = 0.0
        self._nonce = nonce
        self._rng = rng
        self._tries = 0
        self._due: float | None = now
        """Of the next try, renewal or round."""
        self._begun_at = now
        self._rests = 0
        self._port = base.port
        """The external one to ask for: the same as inside, then the one we had."""
        self._half: tuple[str, int, float] = ("", 0, 0.0)
        """What NAT-PMP has answered so far: external address; port and its lifetime."""
        self._epoch: tuple[int, float] | None = None
        self._out: list[bytes] = []
        self._events: deque[Event] = deque()

    # inputs

    def receive(self, data: bytes, now: float) -> None:
        """A datagram from the gateway's port."""
        answer = pcp.read(data)
        if self.state is State.CLOSED:
            if isinstance(answer, pcp.Mapped) and (answer.result or not answer.lifetime):
                self._due = None  # deleted, or it never will be
        elif isinstance(answer, pcp.OtherVersion):
            if self._waiting and self.protocol is Protocol.PCP:
                self._refuse(now)
        elif isinstance(answer, pcp.Mapped):
            self._on_mapped(answer, now)
        elif isinstance(answer, pcp.External):
            self._on_external(answer, now)

    def announced(self, data: bytes, now: float) -> None:
        """A datagram of the gateway to everybody: it is there, maybe anew."""
        answer = pcp.read(data)
        if not isinstance(answer, pcp.Announced | pcp.External):
            return
        if self.state is State.RESTING:
            self._rests = 0
            self._due = max(now, self._begun_at + ROUND_PAUSE)
        elif self.state is State.MAPPED and not self._tries:
            moved = isinstance(answer, pcp.External) and (
                self.external is not None and answer.host != self.external.host
            )
            if self._check_epoch(answer.epoch, now) or moved:
                self._soon(now + self._rng.uniform(0.0, HERD), now)

    def refused(self, now: float) -> None:
        """Nobody listens at the gateway's port, for either protocol of it."""
        if self.state is State.ASKING and self.protocol is not Protocol.UPNP:
            self.protocol = Protocol.NATPMP
            self._refuse(now)

    def upnp_answered(self, external: Address | None, now: float) -> None:
        """What came of `UpnpWanted`; None where there is no mapping."""
        if self.protocol is not Protocol.UPNP or not self._waiting:
            return
        if external is None:
            self._refuse(now)
        else:
            self._grant(external, LIFETIME, now)

    def again(self, now: float) -> None:
        """The network changed, or we slept: a gateway may be another, or have forgotten us."""
        if self.state is State.RESTING:
            self._rests = 0
            self._due = max(now, self._begun_at + ROUND_PAUSE)
        elif self.state is State.MAPPED and not self._tries:
            self._soon(now, now)

    def close(self, now: float) -> None:
        """Give it back, as far as the gateway hears it. What UPnP mapped, or is about to, is given
        back by whoever asked for it."""
        asked = self.state is State.MAPPED or (self.state is State.ASKING and self._tries > 0)
        self._enter(State.CLOSED)
        self._tries = 0
        self._due = None
        if asked and self.protocol is not Protocol.UPNP:
            self._due = now
            self.handle_timer(now)

    # drains

    def datagrams_to_send(self, now: float) -> list[bytes]:
        """To the gateway's port, from the base's address."""
        out, self._out = self._out, []
        return out

    def next_event(self) -> Event | None:
        return self._events.popleft() if self._events else None

    def get_timer(self) -> float | None:
        if self.state is State.MAPPED:
            return self.expires_at if self._due is None else min(self._due, self.expires_at)
        return self._due

    def handle_timer(self, now: float) -> None:
        if self.state is State.MAPPED and now >= self.expires_at:
            self._lose()
            self._ask(Protocol.PCP, now)
        if self._due is None or now < self._due:
            return
        if self.state is State.RESTING:
            self._ask(Protocol.PCP, now)
        elif self._tries < TRIES:
            self._try(now)
        elif self.state is State.CLOSED:
            self._due = None
        else:
            self._refuse(now, answered=False)

    # asking

    @property
    def done(self) -> bool:
        """Whether it is closed, and nothing is to be sent any more."""
        return self.state is State.CLOSED and self._due is None

    @property
    def _waiting(self) -> bool:
        """Whether an answer is due, to a first request or a renewal."""
        return self.state in (State.ASKING, State.MAPPED) and self._tries > 0

    def _ask(self, protocol: Protocol, now: float) -> None:
        if protocol is Protocol.PCP:
            self._begun_at = now
        self._enter(State.ASKING)
        self.protocol = protocol
        self._epoch = None
        self._tries = 0
        self._due = now
        self.handle_timer(now)

    def _soon(self, at: float, now: float) -> None:
        """Renew at that time, but not too often."""
        soon = max(at, self._begun_at + ROUND_PAUSE)
        self._due = soon if self._due is None else min(self._due, soon)
        if self._due <= now:
            self.handle_timer(now)

    def _try(self, now: float) -> None:
        if self._tries == 0:
            self._begun_at = now
            self._half = ("", 0, 0.0)
        self._tries += 1
        self._due = now + TRY_AFTER[self._tries]
        if self.protocol is Protocol.UPNP:
            # The library has time-outs of its own.
            self._tries, self._due = TRIES, None
            self._events.append(UpnpWanted(self._port))
            return
        # What is deleted is named by its inner port alone (RFC 6887 section 15, RFC 6886 3.4).
        closed = self.state is State.CLOSED
        lifetime, port = (0, 0) if closed else (LIFETIME, self._port)
        if self.protocol is Protocol.PCP:
            host = self.external.host if self.external is not None else ""
            self._out.append(
                pcp.pcp_map(self.base, self._nonce, lifetime=lifetime, host=host, port=port)
            )
        else:
            if not closed:
                self._out.append(pcp.natpmp_address())
            self._out.append(pcp.natpmp_map(self.base.port, lifetime=lifetime, external=port))

    def _refuse(self, now: float, *, answered: bool = True) -> None:
        """No mapping in this way: on to the next, or to rest. A renewal that nobody answers is
        repeated, as long as the mapping may live."""
        if self.state is State.MAPPED and not answered:
            self._tries = 0
            left = max(0.0, self.expires_at - now)
            self._due = now + max(left / 2, RENEW_FLOOR)
            return
        if self.state is State.MAPPED:
            self._lose()
            self._ask(Protocol.PCP, now)
            return
        following = {Protocol.PCP: Protocol.NATPMP, Protocol.NATPMP: Protocol.UPNP}
        protocol = following.get(self.protocol)
        if protocol is not None and not self.base.is_ipv6:  # the others know IPv4 only
            self._ask(protocol, now)
            return
        self._enter(State.RESTING)
        self._tries = 0
        rest = min(REST_FIRST * 2.0 ** min(self._rests, 10), REST_LAST)
        self._rests += 1
        self._due = now + rest * self._rng.uniform(0.9, 1.1)

    # what comes of it

    def _on_mapped(self, answer: pcp.Mapped, now: float) -> None:
        by_pcp = bool(answer.nonce)
        if not self._waiting or by_pcp != (self.protocol is Protocol.PCP):
            return
        if answer.internal != self.base.port or (by_pcp and answer.nonce != self._nonce):
            return
        self._check_epoch(answer.epoch, now)
        if answer.result or not answer.lifetime:
            self._refuse(now)
        elif by_pcp:
            self._grant(Address(answer.host, answer.port), answer.lifetime, now)
        else:
            self._half = (self._half[0], answer.port, float(answer.lifetime))
            self._complete(now)

    def _on_external(self, answer: pcp.External, now: float) -> None:
        if not self._waiting or self.protocol is not Protocol.NATPMP:
            return
        self._check_epoch(answer.epoch, now)
        if answer.result:
            self._refuse(now)
        else:
            self._half = (answer.host, *self._half[1:])
            self._complete(now)

    def _complete(self, now: float) -> None:
        host, port, lifetime = self._half
        if host and port:
            self._grant(Address(host, port), lifetime, now)

    def _grant(self, external: Address, lifetime: float, now: float) -> None:
        if (
            not is_usable_remote(external.host)
            or external.is_ipv6 != self.base.is_ipv6
            or not external.port
        ):
            self._refuse(now)  # a router that is itself not connected says 0.0.0.0
            return
        lifetime = min(max(float(lifetime), 2 * RENEW_FLOOR), LONGEST)
        self._enter(State.MAPPED)
        self._tries = self._rests = 0
        self._port = external.port
        self.expires_at = now + lifetime
        # Not all clients of a gateway at once (RFC 6887 section 11.2.1).
        self._due = now + lifetime * self._rng.uniform(0.5, 0.625)
        if external != self.external:
            self.external = external
            self._events.append(ExternalChanged())

    def _lose(self) -> None:
        if self.external is not None:
            self.external = None
            self._events.append(ExternalChanged())

    def _check_epoch(self, epoch: int, now: float) -> bool:
        """Whether the gateway lost its mappings since we heard it last (RFC 6887 section 8.5)."""
        last, self._epoch = self._epoch, (epoch, now)
        if last is None:
            return False
        theirs, ours = epoch - last[0], now - last[1]
        return theirs < -1 or ours + 2 < theirs - theirs / 16 or theirs + 2 < ours - ours / 16

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"a mapping cannot go from {self.state.value} to {state.value}")
        self.state = state
