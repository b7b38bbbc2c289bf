"""The native engine as Python sees it. Times in seconds of the caller's monotonic clock, sizes in
bytes, rates in bytes per second. core/engine.h has the meaning of everything in full."""

from collections.abc import Iterable, Sequence
from typing import Any

CIPHERS: dict[str, int]
"""Cipher suites by the part of their TLS name before the hash."""
MAX_DATAGRAM: int
TAG: int

def libcrypto() -> str:
    """Name and version of the OpenSSL library that is loaded."""

class Engine:
    """One per node: outbox, delivery, routes, connection IDs."""

    def set_routes(self, routes: Iterable[tuple[int, bytes, int, int]]) -> None:
        """Which lane has which prefix: IP version, address, prefix length, owner."""
    def push(self, packet: bytes, now: float) -> bool:
        """Queue an IP packet with the lane it belongs to; False if with none."""
    @property
    def unroutable(self) -> int: ...
    def take_sealed(self) -> list[tuple[Path, bytes]]:
        """Empty the outbox: datagrams in the order in which they were sealed."""
    def take_delivered(self) -> list[bytes]:
        """IP packets received, in order, where no `Io` writes them to a TUN."""

class Lane:
    """The queue, the reassembly and the counters of one peer; connections come and go."""

    engine: Engine
    def __init__(self, engine: Engine, owner: int, seed: int) -> None:
        """`seed`: 64 random bits, so that nobody can aim at another flow's queue."""
    def push(self, packet: bytes, now: float) -> None: ...
    def hold(self) -> None:
        """There is no path: queue, send nothing."""
    def recover(self, now: float) -> None:
        """A path is back: the newest packets of each flow go first."""
    @property
    def held(self) -> bool: ...
    @property
    def pending(self) -> bool: ...
    @property
    def queue_bytes(self) -> int: ...
    @property
    def queue_packets(self) -> int: ...
    def set_quantum(self, size: int) -> None: ...
    def set_redundancy(self, rate: float) -> None:
        """Bytes of sparse flows' packets a second that may also leave on `Connection.copies`;
        0.0: none. 32,000 until set."""
    @property
    def counters(self) -> dict[str, int]: ...

class Path:
    """One path of a connection; unusable (RuntimeError) once `removed`."""

    connection: Connection
    owner: Any
    """Whatever the owner wants to find again."""
    mtu: int
    limited: bool
    """The remote address has not answered: three times what came from it, no more."""
    bytes_received: int
    bytes_sent: int
    initial_rtt: float
    large_lost: int
    """Packets above 1,200 bytes lost since one was acknowledged (RFC 8899 section 4.3)."""
    @property
    def removed(self) -> bool: ...
    @property
    def index(self) -> int: ...
    @property
    def sendable(self) -> int | None:
        """Bytes that may still go to an address that has not answered yet; None: no limit."""
    @property
    def has_rtt(self) -> bool: ...
    @property
    def rtt_latest(self) -> float: ...
    @property
    def rtt_min(self) -> float: ...
    @property
    def rtt_smoothed(self) -> float: ...
    @property
    def rtt_variance(self) -> float: ...
    def add_rtt(self, rtt: float, ack_delay: float) -> None: ...
    def inherit(self, other: Path) -> None:
        """Window and RTT: only the peer's port changed (RFC 9000 section 9.4)."""
    def probe_timeout(self, max_ack_delay: float) -> float:
        """The PTO without back-off (RFC 9002 section 6.2.1)."""
    @property
    def window(self) -> int: ...
    @property
    def pacing_rate(self) -> float: ...
    def set_rate(self, window: int, pacing_rate: float) -> None:
        """Bytes that may be outstanding, and bytes per second; 0.0: not paced."""
    @property
    def in_flight(self) -> int: ...
    @property
    def outstanding(self) -> int:
        """Ack-eliciting packets without an answer."""
    @property
    def last_eliciting_at(self) -> float: ...
    @property
    def last_progress_at(self) -> float: ...
    @property
    def waiting_since(self) -> float | None:
        """When the oldest ack-eliciting packet since the last progress left; None: all answered."""
    @property
    def lost(self) -> int: ...
    @property
    def reordering(self) -> int:
        """The packet threshold of loss detection."""
    @property
    def delivered(self) -> int: ...
    def set_cid(self, cid: bytes | None) -> None:
        """The peer's connection ID that we send with here."""
    def expect(self, cid: bytes | None) -> None:
        """Our connection ID that the peer uses here; another one is the owner's business."""
    def aim(self, socket: int, to: bytes) -> None:
        """The number of the local socket, and the packed sockaddr."""
    def forgive(self) -> None:
        """What is outstanding no longer fills the window: the path was dead, not congested."""
    def abandon(self) -> None:
        """Forget what was sent here; the owner's packets are reported lost."""
    def remove(self) -> None:
        """Give the slot back; the active path stays."""

class Opened:
    """A packet that is the owner's business: frames of its own, or perhaps a move."""

    number: int
    path: Path | None
    """None, or a removed one: it went while the packet waited."""
    cid: bytes
    duplicate: bool
    moving: bool
    """It carries, among the frames handled by the engine, one that means to move."""
    frames: bool
    plain: bytes
    """The first frame that is the owner's and everything behind it."""

class Report:
    """What has happened to a connection; lists are None where there is nothing."""

    opened: list[Opened] | None
    acked: list[int] | None
    lost: list[int] | None
    samples: list[tuple[Path, int, int, int, float, float, bool, int, int, bool]] | None
    """Path, acked, lost, in flight, RTT, delivery rate, app-limited, delivered, delivered before
    the newest acknowledged left, spurious losses: as `congestion.Sample`."""
    keys: bool
    pto: bool
    wake: bool
    error: tuple[int, int, str] | None
    """Code, frame type, reason: how the peer broke the protocol."""
    refused: list[tuple[Path, int]] | None
    """Paths that a socket refused to send on, and the errno."""
    @property
    def routine(self) -> bool: ...

class Connection:
    """The engine's side of one QUIC connection; idle until `start`."""

    engine: Engine
    owner: Any
    def __init__(self, engine: Engine) -> None: ...
    def start(
        self,
        cipher: int,
        seal_key: bytes,
        seal_iv: bytes,
        seal_hp: bytes,
        open_key: bytes,
        open_iv: bytes,
        open_hp: bytes,
        phase: int,
        now: float,
    ) -> None:
        """The handshake is confirmed: take over the 1-RTT packets."""
    def set_next(self, seal_key: bytes, seal_iv: bytes, open_key: bytes, open_iv: bytes) -> None:
        """The next generation of keys (RFC 9001 section 6)."""
    def stop(self) -> None:
        """Send and open nothing any more; sealing for the owner still works."""
    def attach(self, lane: Lane) -> None: ...
    def detach(self) -> None: ...
    @property
    def running(self) -> bool: ...
    @property
    def phase(self) -> int: ...
    @property
    def key_updates(self) -> int: ...
    def update_keys(self) -> None:
        """Start a key update as soon as RFC 9001 section 6.1 lets us."""
    def configure(
        self,
        *,
        max_sealed: int = 0,
        max_pto: float = 0,
        ack_delay: float = 0,
        peer_ack_exponent: int = -1,
        max_ack_delay: float = -1,
    ) -> None: ...
    def set_host_cids(self, cids: Sequence[bytes]) -> None: ...
    def add_path(self, mtu: int, initial_rtt: float) -> Path:
        """A new path, limited, unmeasured. Raises RuntimeError when all slots are taken."""
    @property
    def active(self) -> Path: ...
    def activate(self, path: Path) -> None: ...
    peer_path: Path
    copies: Path | None
    """Gets copies of datagrams that leave on the active path; they move nobody."""
    copies_all: bool
    """Of every datagram; otherwise of those of sparse flows, within the lane's budget."""
    def replay(self, path: Path, onto: Path | None = None, *, now: float) -> int:
        """What left on `path` within the last 2 s and is not known to have arrived is to leave once
        more, as copies, on `onto`, the active path if None; how many. Whatever still waits from
        earlier calls leaves there too."""
    @property
    def pending_replay(self) -> int:
        """Datagrams that are to be replayed and have not been yet."""
    largest_moving: int
    number: int
    """Of the next packet. It only grows."""
    pto_count: int
    patience: float
    """Seconds of silence on the active path that are reported; 0.0: never."""
    @property
    def heard_at(self) -> float: ...
    def note_received(self, number: int) -> None: ...
    def acknowledge_at(self, now: float) -> None: ...
    def receive(self, path: Path, data: bytes, now: float) -> bool:
        """One 1-RTT packet; whether it was authentic."""
    def ack_frame(self, path: Path, frame: bytes, ecn: bool, now: float) -> int:
        """An ACK frame behind its type: the bytes it took, -1 if malformed."""
    def datagram(self, number: int, payload: bytes, now: float) -> None: ...
    def seal(self, now: float) -> int:
        """Fill the outbox as far as everything allows; the packets sealed."""
    def seal_foreign(self, number: int, header: bytes, number_size: int, payload: bytes) -> bytes:
        """Seal a packet of the owner; two bytes longer than aioquic thinks."""
    def sent(
        self, path: Path, number: int, size: int, eliciting: bool, in_flight: bool, at: float
    ) -> None:
        """The owner's packet has left; what becomes of it will be reported."""
    def get_timer(self) -> float | None: ...
    def handle_timer(self, now: float) -> None: ...
    def take(self, now: float) -> Report | None: ...
    @property
    def counters(self) -> dict[str, int]:
        """Among them `copies_sent`, the copy packets: `redundant_packets` (`redundant_bytes` as
        sent) of what had just left, and those of replays. `replayed` counts datagrams,
        `replay_needless` the replays whose datagram arrived another way as well, and
        `replay_given_up` those that were too old, or had no room, to be replayed."""

class Io:
    """Batches between TUN, engine and UDP. Watch `fileno()`, then call `step`."""

    engine: Engine
    def __init__(self, engine: Engine, tun: int, tcp: bool, udp: bool) -> None: ...
    def close(self) -> None: ...
    def fileno(self) -> int: ...
    def add_socket(self, fd: int) -> int: ...
    def remove_socket(self, number: int) -> None: ...
    def step(self) -> bool:
        """Move what is ready; True when there is something for Python."""
    def transmit(self) -> None:
        """Send what may leave now: after anything was changed."""
    def eventful(self) -> list[Connection]: ...
    def take_raw(self) -> list[tuple[int, bytes, bytes]]:
        """Datagrams that are not the engine's: socket number, packed sockaddr, data."""
    @property
    def tun_error(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...
