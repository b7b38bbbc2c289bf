"""Candidates: the addresses a peer may be reached at, and which of them are worth a check.

The priority of RFC 8445 section 5.1.2.1 carries what this agent knows of an address across the
wire, in the PRIORITY of a check: its 16 bits of local preference hold the rank of the interface at
its owner (255 less the rank, so that higher is better) and whether it is metered (255: no, 254:
yes). So a peer-reflexive candidate, which no message announced, is ranked like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from aioice.candidate import candidate_priority

from tunnel.config import IPNetwork
from tunnel.control import CandidateEntry
from tunnel.path.network import Address, is_usable_remote

MAX_RANK = 255

_PRIVATE = tuple(
    map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
_COMPONENT = 1  # RFC 8445 section 4: there is one data stream
_PREFERENCE = 0xFF


class Kind(StrEnum):
    """How an address was learnt (RFC 8445 section 4)."""

    HOST = "host"  # of an interface of its owner
    SRFLX = "srflx"  # server-reflexive: what others see behind a NAT, or a port forward
    PRFLX = "prflx"  # peer-reflexive: a check came from there
    RELAY = "relay"  # of a TURN server


class Candidate(NamedTuple):
    """An address at which a peer may be reached."""

    address: Address
    kind: Kind
    rank: int
    """The order of its interface at its owner by the kernel's routes: 0 best, at most 255."""
    metered: bool


def entry_of(candidate: Candidate) -> CandidateEntry:
    """As the peer is told."""
    address, kind, rank, metered = candidate
    return CandidateEntry(address=str(address), kind=kind.value, rank=rank, metered=metered)


def candidate_of(entry: CandidateEntry) -> Candidate:
    """As the peer told it."""
    return Candidate(Address.parse(entry.address), Kind(entry.kind), entry.rank, entry.metered)


@dataclass(frozen=True, slots=True)
class Base:
    """A local socket (RFC 8445 section 4: what a candidate's checks are sent from)."""

    address: Address
    """That it is bound to."""
    interface: str
    metered: bool
    rank: int
    relay: bool = False
    """The address is one that a TURN server relays to us: no route of this host leads from it."""
    via: str = ""
    """Of a relay: the IP address of this host that its server is reached from."""

    @property
    def source(self) -> str:
        """The IP address that packets leave this host from."""
        return self.via or self.address.host


@dataclass(frozen=True, slots=True)
class Relay:
    """A relayed address that this host has at a TURN server."""

    address: Address
    interface: str
    ip: str
    """Of this host, on that interface, that the server is reached from."""
    server: str
    """As it is called in the configuration."""
    transport: str
    """To the server: "udp", "tcp" or "tls"."""


def usable_candidate(address: Address, forbidden: Sequence[IPNetwork]) -> bool:
    """Whether a peer may be sought there at all.

    `forbidden` are the tunnel's own networks and those routed into it: a path through them would
    run inside itself.
    """
    if not is_usable_remote(address.host) or not 1 <= address.port <= 65535:
        return False
    ip = ip_address(address.host)
    return not any(ip in network for network in forbidden)


def relay_reaches(relay: Address, remote: Address) -> bool:
    """Whether it makes sense that a TURN server with this relayed address sends to that one.

    Private addresses (RFC 1918, RFC 4193, RFC 6598) mean something else at a server on the
    Internet: most forbid them, and coturn ends the whole allocation where it has no route.
    """
    if relay.is_ipv6 != remote.is_ipv6 or relay == remote:
        return False
    return is_private(relay.host) or not is_private(remote.host)


def is_private(host: str) -> bool:
    """RFC 1918, RFC 4193, RFC 6598."""
    ip = ip_address(host)
    return any(ip in network for network in _PRIVATE)


def priority(kind: Kind, rank: int, metered: bool) -> int:
    """RFC 8445 section 5.1.2.1, with the local preference that the module describes."""
    preference = (MAX_RANK - min(rank, MAX_RANK)) << 8 | (_PREFERENCE - metered)
    return candidate_priority(_COMPONENT, kind.value, preference)


def rank_in(priority: int) -> tuple[int, bool]:
    """The rank and whether it is metered, of the candidate with this priority."""
    return MAX_RANK - (priority >> 16 & 0xFF), priority >> 8 & 0xFF < _PREFERENCE


def kind_in(priority: int) -> Kind:
    """What an address is that a check with this priority came from: relayed, or peer-reflexive.

    RFC 8445 section 7.1.1 has every check carry the priority of a peer-reflexive candidate. Ours
    from a relay carry that of a relayed one, so that the other end knows what it sees.
    """
    return Kind.RELAY if priority >> 24 == 0 else Kind.PRFLX


def preference(kind: Kind) -> int:
    """Orders kinds, higher is better: host, peer-reflexive, server-reflexive, relayed."""
    return candidate_priority(_COMPONENT, kind.value, 0)
