"""What a node tells the shell, drained with `Node.next_event()`. Peers are meant by their name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tunnel.config import Endpoint
from tunnel.ledger import Migration
from tunnel.obstacle import Obstacle

if TYPE_CHECKING:
    from tunnel.path.network import Address


@dataclass(frozen=True, slots=True)
class PeerConnecting:
    """A peer is being sought: at the start, or after its connection ended."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer's identity is verified and packets flow, for the first time or again."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerHolding:
    """There is no path to a peer; the tunnel, its routes and its flows are kept."""

    peer: str


@dataclass(frozen=True, slots=True)
class Obstructed:
    """Something is in the way of a peer that is not up, or of all if `peer` is None."""

    peer: str | None
    obstacle: Obstacle


@dataclass(frozen=True, slots=True)
class PeerMigrated:
    """A peer moved to another path."""

    record: Migration


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """Somebody was turned away; `peer` is None where no configured peer is to blame."""

    peer: str | None
    reason: str
    key: str = ""
    """The public key that nobody here has, in OpenSSH format, if that is the reason."""


@dataclass(frozen=True, slots=True)
class ResolveWanted:
    """Please resolve these endpoints and answer with `Node.endpoints_resolved`."""

    peer: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class PortWanted:
    """Please open another socket on this address, and say so with `Node.port_opened`: a NAT or
    firewall may hold on to a dead mapping of the one there is."""

    ip: str
    spread: bool = False
    """It is one of many, for some seconds: `tunnel.probing`."""


@dataclass(frozen=True, slots=True)
class PortUnwanted:
    """Nobody uses this socket of a `PortWanted` any more."""

    local: Address


@dataclass(frozen=True, slots=True)
class PingReply:
    """A peer answered `Node.ping`; `rtt` in seconds, over the tunnel's own control stream."""

    peer: str
    token: int
    rtt: float


@dataclass(frozen=True, slots=True)
class BenchWanted:
    """A peer wants to measure; please answer with `Node.bench_served`.

    A load is to be served on `address`, one of ours inside the tunnel, to `sources`, the peer's
    own there, for at most `seconds`.
    """

    peer: str
    token: int
    address: str
    sources: tuple[str, ...]
    seconds: int


@dataclass(frozen=True, slots=True)
class BenchAnswer:
    """What came of `Node.bench`: where the peer serves a load, or in `problem` why it does not."""

    peer: str
    token: int
    address: str = ""
    port: int = 0
    secret: bytes = b""
    problem: str = ""


NodeEvent: TypeAlias = (
    PeerConnecting
    | PeerUp
    | PeerHolding
    | Obstructed
    | PeerMigrated
    | PeerRefused
    | ResolveWanted
    | PortWanted
    | PortUnwanted
    | PingReply
    | BenchWanted
    | BenchAnswer
)
