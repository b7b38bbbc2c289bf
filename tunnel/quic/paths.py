"""One network path as the connection sees it: identifiers, validation, the 3x limit, metrics."""

from collections import deque
from dataclasses import dataclass

from aioquic.quic.connection import QuicConnectionId

from tunnel.path.network import PathKey
from tunnel.path.path import PathState, advance
from tunnel.quic.recovery import PathMetrics

START_MTU = 1200
"""UDP payload every QUIC path carries (RFC 9000 section 14)."""
AMPLIFICATION_FACTOR = 3  # RFC 9000 section 8
MAX_CHALLENGES = 5  # outstanding PATH_CHALLENGE data remembered per path
MAX_RESPONSES = 8  # PATH_RESPONSE frames owed per path, against floods


class NetworkPath:
    """A path and everything that belongs to it alone.

    Has the attributes that aioquic's frame writers expect of its own path class, so that they
    can be handed this one: `addr`, `is_validated`, `local_challenge_sent`, `local_challenges`,
    `remote_challenges`, `validation_deadline`, `bytes_sent`.
    """

    def __init__(self, key: PathKey, metrics: PathMetrics) -> None:
        self.addr = key
        self.metrics = metrics
        self.state = PathState.CANDIDATE
        self.mtu = START_MTU
        self.mtu_probes = 0
        self.mtu_probe_in_flight = False
        self.peer_cid: QuicConnectionId | None = None
        """The connection ID we send with on this path, and on no other."""
        self.host_cid: bytes | None = None
        """Our connection ID that the peer last used on this path."""
        self.cid_changed_at = -1e9
        """When our connection ID here changed last: the peer's change soon after is its answer."""
        self.retire_at: float | None = None
        self.used_at = 0.0
        self.address_validated = False
        """The remote address has answered a challenge, on this or on another path."""
        self.invited = False
        """We were told of this address by our configuration, not by a packet that came from it."""
        self.bytes_received = 0
        self.bytes_sent = 0
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

    def sendable(self) -> int | None:
        """Bytes that may still go to an address that has not answered yet; None: no limit."""
        if self.address_validated or self.invited:
            return None
        return max(0, AMPLIFICATION_FACTOR * self.bytes_received - self.bytes_sent)


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
    """What is learnt of the 1-RTT packet in a datagram while aioquic works on it."""

    path: NetworkPath
    number: int | None = None  # set when the packet is authentic
    host_cid: bytes | None = None
    processed: bool = False  # not a duplicate
    moving: bool = False
