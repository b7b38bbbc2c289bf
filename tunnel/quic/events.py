"""What a `PeerConnection` tells its owner beside aioquic's own events."""

from dataclasses import dataclass

from aioquic.quic.events import QuicEvent

from tunnel.path.network import PathKey


@dataclass
class PathValidated(QuicEvent):
    """A challenge on `path` was answered; `rtt` in seconds, from that exchange."""

    path: PathKey
    rtt: float


@dataclass
class PathFailed(QuicEvent):
    """No challenge on `path` was answered in time."""

    path: PathKey


@dataclass
class PeerMoved(QuicEvent):
    """The peer's newest packets come from another path, and we send there now."""

    old: PathKey
    new: PathKey
    rebinding: bool
    """The peer does not know that it moved: the packet bore a connection ID used before."""
    at: float


@dataclass
class MoveContested(QuicEvent):
    """A move was taken back: the old address still speaks (RFC 9000 section 9.3.3)."""

    refused: PathKey
    kept: PathKey


@dataclass
class PathRefused(QuicEvent):
    """A socket refused to send on `path`, with this errno: known at once, and of one path."""

    path: PathKey
    error: int
