"""One network path as the connection sees it: identifiers, validation, the 3x limit, its size."""

from collections import deque
from dataclasses import dataclass

from aioquic.quic.connection import QuicConnectionId

from tunnel.datapath.congestion import ModelController
from tunnel.datapath.engine import Path
from tunnel.path.network import PathKey
from tunnel.path.path import PathState, advance
from tunnel.quic.mtu import PathMtu

START_MTU = 1200
"""UDP payload every QUIC path carries (RFC 9000 section 14)."""
LINK_MTU = {4: 1500 - 28, 6: 1500 - 48}
"""UDP payload of an Ethernet frame, by IP version."""
MAX_CHALLENGES = 5  # outstanding PATH_CHALLENGE data remembered per path
MAX_RESPONSES = 8  # PATH_RESPONSE frames owed per path, against floods


class NetworkPath:
    """A path and everything that belongs to it alone.

    What the native engine has to know of it is kept there: `metrics` is its side of the path. Has
    the attributes that aioquic's frame writers expect of its own path class, so that they can be
    handed this one: `addr`, `is_validated`, `local_challenge_sent`, `local_challenges`,
    `remote_challenges`, `validation_deadline`, `bytes_sent`.
    """

    def __init__(self, key: PathKey, metrics: Path) -> None:
        self.addr = key
        self.metrics = metrics
        metrics.owner = self
        self.controller = ModelController(max_datagram_size=START_MTU)
        metrics.set_rate(self.controller.window, self.controller.pacing_rate)
        self.state = PathState.CANDIDATE
        self.pmtu = PathMtu(base=START_MTU, ceiling=LINK_MTU[6 if key.remote.is_ipv6 else 4])
        self._peer_cid: QuicConnectionId | None = None
        self._host_cid: bytes | None = None
        self.cid_changed_at = -1e9
        """When our connection ID here changed last: the peer's change soon after is its answer."""
        self.retire_at: float | None = None
        self.used_at = 0.0
        self._address_validated = False
        self._invited = False
        self.contested_until = 0.0
        self.contests = 0

        # challenges we send
        self.challenge_due = False
        self.challenge_padded = True
        self.challenged_at = 0.0
        self.challenge_count = 0
        self.local_challenge_sent = False
        self.local_challenges: deque[bytes] = deque(maxlen=MAX_CHALLENGES)
        self.challenge_times: deque[float] = deque(maxlen=MAX_CHALLENGES)  # of the same ones
        self.validation_deadline: float | None = None
        # challenges we answer
        self.remote_challenges: deque[bytes] = deque(maxlen=MAX_RESPONSES)

    @property
    def is_validated(self) -> bool:
        return self.state is PathState.VALIDATED and not self.challenge_due

    def advance(self, to: PathState) -> None:
        self.state = advance(self.state, to)

    # what the engine knows

    @property
    def mtu(self) -> int:
        """Bytes of UDP payload that the path is known to carry."""
        return self.metrics.mtu

    def resize(self) -> None:
        """The engine sends at the size that path MTU discovery has confirmed."""
        if self.metrics.mtu != self.pmtu.size:
            self.metrics.mtu = self.pmtu.size

    @property
    def peer_cid(self) -> QuicConnectionId | None:
        """The connection ID we send with on this path, and on no other."""
        return self._peer_cid

    @peer_cid.setter
    def peer_cid(self, cid: QuicConnectionId | None) -> None:
        self._peer_cid = cid
        self.metrics.set_cid(None if cid is None else cid.cid)

    @property
    def host_cid(self) -> bytes | None:
        """Our connection ID that the peer last used on this path."""
        return self._host_cid

    @host_cid.setter
    def host_cid(self, cid: bytes | None) -> None:
        self._host_cid = cid
        self.metrics.expect(cid)

    @property
    def address_validated(self) -> bool:
        """The remote address has answered a challenge, on this or on another path."""
        return self._address_validated

    @address_validated.setter
    def address_validated(self, value: bool) -> None:
        self._address_validated = value
        self.metrics.limited = not (value or self._invited)

    @property
    def invited(self) -> bool:
        """We were told of this address by our configuration, not by a packet from there."""
        return self._invited

    @invited.setter
    def invited(self, value: bool) -> None:
        self._invited = value
        self.metrics.limited = not (value or self._address_validated)

    @property
    def bytes_received(self) -> int:
        return self.metrics.bytes_received

    @bytes_received.setter
    def bytes_received(self, value: int) -> None:
        self.metrics.bytes_received = value

    @property
    def bytes_sent(self) -> int:
        return self.metrics.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self.metrics.bytes_sent = value

    def sendable(self) -> int | None:
        """Bytes that may still go to an address that has not answered yet; None: no limit."""
        return self.metrics.sendable

    def inherit(self, other: "NetworkPath") -> None:
        """Window, RTT and size of the path before: only the port changed (RFC 9000 9.4)."""
        self.metrics.inherit(other.metrics)
        self.controller.inherit(other.controller)
        self.pmtu.inherit(other.pmtu)
        self.resize()


@dataclass
class ApparentMove:
    """A move of the peer to an address nobody has proved yet (RFC 9000 section 9.3)."""

    old: NetworkPath
    new: NetworkPath
    first_number: int
    """Of the packet that came from the new address first."""
    deadline: float  # of validation (RFC 9000 section 8.2.4)
    rival: NetworkPath | None = None
    """A third address from which the packets of the move came too."""
    validated_at: float | None = None
    settled: bool = False


@dataclass
class Received:
    """What is learnt of a packet while aioquic works on it."""

    path: NetworkPath
    number: int | None = None  # of a 1-RTT packet
    host_cid: bytes | None = None
    processed: bool = False  # authentic, and no duplicate
    moving: bool = False
