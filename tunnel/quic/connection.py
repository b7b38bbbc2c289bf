"""`PeerConnection`: one QUIC connection in which either end may move, knowing it or not.

Addresses are opaque to aioquic: it is always told one constant address, so that neither its
server (which follows any newer packet at once) nor its client (which drops packets from unknown
addresses) decides anything about paths. Everything of RFC 9000 sections 8.2 and 9 is done here,
alike for both roles:

- *We move* (`move`): the next packet leaves on the new path with a connection ID used on no other
  path and a PATH_CHALLENGE in it. No round trip is waited for.
- *The peer moves*: the newest packet that means to move came from another path. A known address
  is followed at once. An unknown one is an *apparent* move: data goes there within three times
  what came from it, copies of the same data go on to the old address, both are challenged, and
  the move settles after validation and one more round trip in which the old address stayed
  silent. A packet of that time or later that still comes from the old address, even a duplicate,
  proves that somebody merely forwards our peer's packets, and takes the move back (section 9.3.3).
- *Somebody asks* (PATH_CHALLENGE): answered on the path the question came in on.

A packet whose only non-probing frames are copies moves nobody (docs/protocol.md).
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from aioquic import tls
from aioquic.buffer import Buffer, size_uint_var
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    END_STATES,
    NetworkAddress,
    QuicConnection,
    QuicConnectionId,
    QuicReceiveContext,
)
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from aioquic.quic.packet_builder import (
    PACKET_NUMBER_SEND_SIZE,
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicPacketBuilderStop,
)

from tunnel.path.network import Address, PathKey
from tunnel.path.path import PathState
from tunnel.quic.datagrams import Datapath, PullQueue
from tunnel.quic.events import MoveContested, PathFailed, PathValidated, PeerMoved
from tunnel.quic.frames import copy_header, moves_nobody
from tunnel.quic.keys import OneRttKeys
from tunnel.quic.mutual_tls import KeyPredicate, PinnedContext
from tunnel.quic.paths import START_MTU, NetworkPath
from tunnel.quic.recovery import GRANULARITY, PathMetrics, Recovery

DUPLICATE_WINDOW = 8192
"""Packet numbers. aioquic's 128 are 32 ms at 4,000 packets a second: every late packet of the old
path would be taken for a duplicate after a switch."""
MAX_ACK_DELAY_MS = 5  # announced, and held: aioquic acknowledges after 1 ms
MAX_PATHS = 32
MAX_VALIDATION_TRIES = 5
VALIDATION_PTOS = 3  # RFC 9000 section 8.2.4
RESERVED_CIDS = 2
PROBED_CID_LIFE = 5.0
"""Seconds until the connection ID of a path that was only probed is given back."""
CROSSING = 0.05
"""Seconds, beyond two round trips, in which a move of the peer to a path we know is taken for one
that crossed ours: following it would make both ends swap paths for ever."""
RETIRE_PTOS = 3
"""A connection ID lives this many PTO after its path was left, for packets still in flight."""
APPARENT_MEMORY = 30.0
"""Seconds after a settled apparent move in which signs of life of the old address undo it."""
CONTEST_BACKOFF = 0.25
"""Seconds in which an address whose move was taken back is not followed, doubled each time. Short
at first: a host that hurries from one network to another and back looks the same."""
CONTEST_BACKOFF_LIMIT = 60.0
MAX_COPIES_PER_FLUSH = 64
SMALLEST_PROBE = 60  # bytes of a packet with a challenge and a response
MTU_PROBE_TRIES = 2
BLACK_HOLE_LOSSES = 6
"""Large packets lost in a row, none acknowledged, that make the path's MTU suspect."""
LINK_MTU = {4: 1500 - 28, 6: 1500 - 48}  # UDP payload of an Ethernet frame

AEAD_TAG_SIZE = 16  # RFC 9001 section 5.3, all cipher suites
COPY_OVERHEAD = 9  # its kind, and a root of up to eight bytes
DATAGRAM_OVERHEAD = 3  # frame type, and a length of two bytes

_STAND_IN = "peer"  # the one address aioquic ever sees


@dataclass
class _ApparentMove:
    old: NetworkPath
    new: NetworkPath
    first_number: int
    deadline: float  # of validation (RFC 9000 section 8.2.4)
    rival: NetworkPath | None = None
    """A third address from which the packets of the move came too."""
    validated_at: float | None = None
    settled: bool = False


@dataclass
class _Received:
    """What is learnt of the 1-RTT packet in a datagram while aioquic works on it."""

    path: NetworkPath
    number: int | None = None  # set when the packet is authentic
    host_cid: bytes | None = None
    processed: bool = False  # not a duplicate
    moving: bool = False


class PeerConnection(QuicConnection):
    """A QUIC connection between two pinned keys, over whatever path is best now.

    `path` is where the first packets go or came from. `accepts` judges the peer's public key.
    `reset_token` maps a connection ID to its stateless reset token (RFC 9000 section 10.3.2).
    `initial_token` maps the first destination connection ID to the token of our first Initial.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        path: PathKey,
        accepts: KeyPredicate,
        reset_token: Callable[[bytes], bytes],
        initial_token: Callable[[bytes], bytes] | None = None,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
        max_packets_per_key: int | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._accepts = accepts
        self._reset_token = reset_token
        self._now = 0.0
        self.heard_at: float | None = None
        """When the last authentic packet came in, on any path."""
        self.dial_paths: list[PathKey] = [path] if configuration.is_client else []
        self._first_flight: list[bytes] = []
        self._late_flight: list[tuple[bytes, NetworkAddress]] = []
        self._established = False
        self._datapath: Datapath | None = None
        self._keys = OneRttKeys(on_opened=self._on_opened)
        if max_packets_per_key is not None:
            self._keys.max_packets = max_packets_per_key
        self._forget_keys_at: float | None = None

        self._paths: dict[PathKey, NetworkPath] = {}
        self.active = self._paths[path] = NetworkPath(path, self._new_metrics())
        self._retiring: list[tuple[float, QuicConnectionId]] = []  # replaced on a path in use
        self._apparent: _ApparentMove | None = None
        self._largest_moving = -1
        self._peer_path = self.active
        """Where the peer's newest packet that means to move came from."""
        self._settled_in_at = 0.0
        self._sent_copies: list[tuple[int, bytes]] = []
        self._datagram_in_packet = -1
        self.counters = {
            "duplicates": 0,
            "cid_shortages": 0,
            "moves_contested": 0,
            "copies_sent": 0,
            "key_updates": 0,
        }

        self._rx = _Received(self.active)

        self._recovery = Recovery(
            first=self.active.metrics,
            peer_completed_address_validation=not self._is_client,
            send_probe=self._send_probe,
            on_acknowledged=self._keys.on_acknowledged,
            logger=self._logger,
            quic_logger=self._quic_logger,
        )
        self._loss = cast(Any, self._recovery)
        first = self._host_cids[0]
        if not self._is_client:
            first.stateless_reset_token = reset_token(first.cid)
        if initial_token is not None:
            self._peer_token = initial_token(self._peer_cid.cid)
        # The control stream is all there is: the acceptor takes one stream, the dialler none.
        streams = 0 if self._is_client else 1
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = streams
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = 0

    # what the owner calls

    def dial(self, now: float) -> None:
        """Begin the handshake (client only)."""
        self._now = now
        self.connect(_STAND_IN, now)

    def add_dial_path(self, key: PathKey) -> None:
        """Also try this path while nothing was heard yet; the first flight leaves on it too."""
        if self.heard_at is None and key not in self.dial_paths:
            self.dial_paths.append(key)
            self._late_flight += [(data, key) for data in self._first_flight]

    def attach(self, datapath: Datapath) -> None:
        """Connect the data path: from here on it is pulled from and fed."""
        self._datapath = datapath
        self._datagrams_pending = cast(Any, PullQueue(datapath))

    def detach(self) -> None:
        """Take the data path away again (another connection carries on)."""
        self._datapath = None
        self._datagrams_pending = deque()

    def move(self, key: PathKey, now: float) -> None:
        """Send on this path from the next packet on; the move is ours and we know it."""
        self._now = now
        path = self._path(key)
        if path is self.active:
            return
        self._forget_apparent()
        if path.state is PathState.GONE:
            path.advance(PathState.CANDIDATE)
        self._settle_in(now)
        self._switch(path, now, challenge=True)

    def probe(self, key: PathKey, now: float) -> None:
        """Challenge a path without moving; `PathValidated` or `PathFailed` will tell."""
        self._now = now
        path = self._path(key)
        path.address_validated = path.address_validated or self._knows_address(path)
        path.invited = True
        self._challenge(path)

    def leave(self, key: PathKey) -> None:
        """The local address of this path is gone."""
        path = self._paths.get(key)
        if path is not None and path.state is not PathState.GONE:
            path.advance(PathState.GONE)
            path.challenge_due = False

    def path_event(self, now: float) -> None:
        """The network changed: forget the back-off and find out at once where we stand."""
        self._now = now
        if self._recovery.pto_count > 1:
            self.active.metrics.forgive()
        self._recovery.pto_count = 0
        if self.is_open:
            if not self.active.is_validated:
                self._challenge(self.active)
            self._probe_pending = True

    def shrink(self, key: PathKey) -> None:
        """A datagram was too large for the link of this path (EMSGSIZE)."""
        path = self._paths.get(key)
        if path is not None:
            path.mtu = START_MTU
            path.mtu_probes = 0
            path.metrics.large_lost = 0

    def nudge(self) -> None:
        """Send something that must be acknowledged, with the next packets."""
        if self.is_open:
            self._probe_pending = True

    def paths(self) -> list[NetworkPath]:
        """All known paths, the active one first."""
        return [self.active] + [p for p in self._paths.values() if p is not self.active]

    @property
    def is_client(self) -> bool:
        return self._is_client

    @property
    def is_open(self) -> bool:
        """Handshake confirmed and not closing."""
        return self._established and self._state not in END_STATES and not self._close_pending

    @property
    def is_closed(self) -> bool:
        return self._state in END_STATES

    @property
    def max_ack_delay(self) -> float:
        return self._recovery.max_ack_delay

    @property
    def proven_remote(self) -> Address:
        """The peer's address that we trust most: not that of a move that is still checked."""
        if self._apparent is not None and not self._apparent.settled:
            return self._apparent.old.addr.remote
        return self.active.addr.remote

    @property
    def settling(self) -> bool:
        """Whether an apparent move of the peer is still being checked."""
        return self._apparent is not None and not self._apparent.settled

    @property
    def peer_key(self) -> bytes | None:
        """The raw public key the peer has proved to hold; None before that."""
        context = getattr(self, "tls", None)
        return context.peer_key if isinstance(context, PinnedContext) else None

    def peer_reset_tokens(self) -> set[bytes]:
        """Tokens that, at the end of an otherwise unreadable datagram, mean: the peer is reset."""
        held = [self._peer_cid, *(p.peer_cid for p in self._paths.values())]
        return {cid.stateless_reset_token for cid in held if cid and cid.stateless_reset_token}

    def host_cids(self) -> list[bytes]:
        return [cid.cid for cid in self._host_cids]

    # the five verbs

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        key = cast(PathKey, addr)
        path = self._paths.get(key)
        if path is None:
            path = NetworkPath(key, self._new_metrics())
            path.address_validated = self._knows_address(path)
        path.bytes_received += len(data)
        self._now = now
        self._rx = _Received(path)
        self._recovery.arriving = path.metrics
        super().receive_datagram(data, _STAND_IN, now)
        if self._state in END_STATES:
            return
        if not self._established:
            if self._rx.processed:
                self._adopt_handshake_path(path, now)
        elif self._rx.number is not None:
            self._packet_opened(path, self._rx.number, now)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        self._now = now
        if self._state in END_STATES or not self._network_paths:
            return []
        if not self._established or self._close_pending:
            return self._handshake_datagrams(now)
        if self._keys.wants_update:
            self._keys.update_key()
        self._watch_key_updates(now)
        self._sent_copies = []
        space = self._spaces[tls.Epoch.ONE_RTT]
        if space.ack_at is not None and space.ack_at <= now:
            space.ack_at = now - GRANULARITY  # due now is not late enough for aioquic's pacing
        if self.active.mtu > START_MTU and self.active.metrics.large_lost >= BLACK_HOLE_LOSSES:
            # RFC 8899 section 4.3. The probe that follows at once gives the size back if not.
            self.shrink(self.active.addr)
        out = self._active_datagrams(now)
        if self._apparent is not None and not self._apparent.settled:
            out += self._copy_datagrams(self._apparent.old, now)
        for path in list(self._paths.values()):
            if path is not self.active and (path.remote_challenges or self._challenge_ready(path)):
                out += self._probe_datagrams(path, now)
        if self._mtu_probe_ready(self.active):
            out += self._mtu_probe(self.active, now)
        return out

    def get_timer(self) -> float | None:
        if not self._established or self._state in END_STATES or not self._network_paths:
            return super().get_timer()
        # What the 3x limit forbids to send must not be waited for: aioquic looks at its own path.
        stand_in, path = self._network_paths[0], self.active
        stand_in.is_validated = path.sendable() is None
        stand_in.bytes_received, stand_in.bytes_sent = path.bytes_received, path.bytes_sent
        timer = super().get_timer()
        stand_in.is_validated = True
        times = [t for t in (timer, self._forget_keys_at, self._settle_at()) if t is not None]
        times += [at for at, _ in self._retiring]
        for path in self._paths.values():
            if path.retire_at is not None:
                times.append(path.retire_at)
            if path.challenge_due and path.local_challenge_sent:
                times.append(self._challenge_retry_at(path))
        return min(times) if times else None

    def handle_timer(self, now: float) -> None:
        self._now = now
        pto_count = self._recovery.pto_count
        super().handle_timer(now)
        if self._state in END_STATES:
            return
        if not self._established:
            if self._recovery.pto_count > pto_count and self._keys.send.is_valid():
                # The acceptor may have dropped the handshake's keys already, and wait at an
                # address that our NAT has changed since: a 1-RTT probe tells it where we are.
                self.send_ping(0)
            return
        if self._recovery.pto_count > pto_count and not self.active.is_validated:
            self._challenge(self.active)  # every probe of an unproven path asks again
        if self._forget_keys_at is not None and now >= self._forget_keys_at:
            self._keys.forget_previous()
            self._forget_keys_at = None
        self._judge_apparent(now)
        due = [cid for at, cid in self._retiring if at <= now]
        if due:
            self._retiring = [entry for entry in self._retiring if entry[0] > now]
            for cid in due:
                self._retire_peer_cid(cid)
        for path in list(self._paths.values()):
            if (
                path.challenge_due
                and path.local_challenge_sent
                and now >= self._challenge_retry_at(path)
            ):
                self._challenge_unanswered(path, now)
            if path.retire_at is not None and now >= path.retire_at:
                self._retire_path(path)

    # receiving

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        PinnedContext.adopt(self.tls, is_client=self._is_client, accepts=self._accepts)
        self._cryptos[tls.Epoch.ONE_RTT] = self._keys
        self._spaces[tls.Epoch.ONE_RTT].received_packets._size = DUPLICATE_WINDOW

    def _on_opened(self, packet_number: int) -> None:
        self._rx.number = packet_number

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self._rx.processed = True
        self.heard_at = self._now
        ack_eliciting, probing = super()._payload_received(
            context, plain, crypto_frame_required=crypto_frame_required
        )
        if context.epoch is not tls.Epoch.ONE_RTT:
            return ack_eliciting, probing
        self._rx.host_cid = context.host_cid
        self._rx.moving = not probing and not moves_nobody(plain)
        # aioquic is told that every packet only probes, so that it leaves paths alone.
        return ack_eliciting, True

    def _adopt_handshake_path(self, path: NetworkPath, now: float) -> None:
        """Until the handshake is confirmed, the newest authentic packet says where to answer."""
        if path is not self.active:
            path.metrics = self.active.metrics
            self.active = path
            self._paths = {path.addr: path}
        if self._handshake_confirmed:
            self._established = True
            path.state = PathState.VALIDATED
            path.address_validated = True
            path.peer_cid = self._peer_cid
            path.used_at = now

    def _packet_opened(self, path: NetworkPath, number: int, now: float) -> None:
        self.heard_at = now
        if not self._rx.processed:
            self.counters["duplicates"] += 1
            self._duplicate(path, number, now)
            return
        if path.addr not in self._paths:
            self._register(path)
        if path.host_cid is None and not self._rx.moving:
            path.host_cid = self._rx.host_cid
        if not self._rx.moving or number <= self._largest_moving:
            return
        self._largest_moving = number
        host_cid = self._rx.host_cid
        before, self._peer_path = self._peer_path, path
        # Only a change is a move: after a move of ours the peer's packets still come in on the
        # path we left, and both ends may well send on different paths for good.
        if path is not before and path is not self.active:
            self._follow(path, number, now)
        elif path.peer_cid is not None and path.host_cid is not None and host_cid != path.host_cid:
            # The peer changed its connection ID on a path we share: answer in kind, unless this
            # is the peer's answer to a change of ours.
            if path.awaiting_peer_cid:
                path.awaiting_peer_cid = False
            else:
                self._renew_cid(path)
        path.host_cid = host_cid

    def _follow(self, path: NetworkPath, number: int, now: float) -> None:
        apparent = self._apparent
        if apparent is not None and path is apparent.old and not apparent.settled:
            self._contest(apparent, now)
            return
        if now < path.contested_until:
            self._peer_path = self.active  # looked at again with the next packet from there
            return
        trusted = path.address_validated and not path.contests
        if trusted and now < self._settled_in_at:
            return  # two moves crossed: each end stays where it went, and suspicion judges
        old = self.active
        # A connection ID that already served another path: the peer does not know it moved.
        rebinding = any(
            p.host_cid == self._rx.host_cid for p in self._paths.values() if p is not path
        )
        self._events.append(PeerMoved(old.addr, path.addr, rebinding, now))
        if trusted:
            self._forget_apparent()
            if path.addr.remote == old.addr.remote:
                self._settle_in(now)  # of two ends that follow each other, one has to stay
            self._switch(path, now, challenge=path.state is not PathState.VALIDATED)
        else:
            same_host = path.addr.remote.host == old.addr.remote.host
            if same_host and path.addr.local == old.addr.local:
                path.metrics.inherit(old.metrics)  # RFC 9000 section 9.4
                path.mtu, path.mtu_probes = old.mtu, old.mtu_probes
            proven = apparent.old if apparent is not None and not apparent.settled else old
            self._switch(path, now, challenge=True)
            proven.retire_at = None
            patience = max(
                proven.metrics.probe_timeout(self.max_ack_delay),
                2 * self._configuration.initial_rtt,
            )
            self._apparent = _ApparentMove(proven, path, number, now + VALIDATION_PTOS * patience)
            if proven.state is not PathState.GONE:
                self._challenge(proven)
        path.awaiting_peer_cid = rebinding
        # Tell the peer at once that its move was seen: it waits for this acknowledgement.
        self._spaces[tls.Epoch.ONE_RTT].ack_at = now

    def _forget_apparent(self) -> None:
        apparent, self._apparent = self._apparent, None
        if apparent is not None and not apparent.settled:
            self._leave_path(apparent.old)

    def _duplicate(self, path: NetworkPath, number: int, now: float) -> None:
        apparent = self._apparent
        if (
            apparent is not None
            and path is apparent.old
            and number >= apparent.first_number
            and now < (apparent.validated_at or now) + APPARENT_MEMORY
        ):
            self._contest(apparent, now)
        elif (
            apparent is not None
            and not apparent.settled
            and path is not apparent.new
            and path.state is PathState.CANDIDATE
            and number >= apparent.first_number
        ):
            # The very packets that moved us also come from a third address: one of the two only
            # forwards. Whoever answers from there, when the other does not, is the peer.
            if path.addr not in self._paths:
                self._register(path)
            apparent.rival = path
            self._challenge(path)

    def _contest(self, apparent: _ApparentMove, now: float) -> None:
        """The old address still speaks: whoever is at the new one only forwards."""
        refused = apparent.new
        contests = refused.contests + 1
        for path in self._paths.values():
            if path.addr.remote == refused.addr.remote:
                # Whatever it proves from now on, this address is never followed unchecked.
                path.contests = contests
                path.contested_until = now + min(
                    CONTEST_BACKOFF * (1 << min(contests - 1, 8)), CONTEST_BACKOFF_LIMIT
                )
        refused.challenge_due = False
        self._peer_path = apparent.old
        self.counters["moves_contested"] += 1
        self._apparent = None
        self._switch(apparent.old, now, challenge=apparent.old.state is not PathState.VALIDATED)
        self._events.append(MoveContested(refused.addr, apparent.old.addr))

    def _handle_datagram_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        length = (
            buf.pull_uint_var()
            if frame_type == QuicFrameType.DATAGRAM_WITH_LENGTH
            else buf.capacity - start
        )
        payload = buf.pull_bytes(length)
        if self._quic_logger is not None and context.quic_logger_frames is not None:
            context.quic_logger_frames.append(
                self._quic_logger.encode_datagram_frame(length=length)
            )
        if self._datapath is not None and self._rx.number is not None:
            self._datapath.received(self._rx.number, payload, context.time)

    def _handle_path_challenge_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        path = self._rx.path
        context.network_path = cast(Any, path)
        super()._handle_path_challenge_frame(context, frame_type, buf)
        if path is self.active:
            # A non-probing answer: it tells our true address to a peer that somebody tries to
            # lure away (RFC 9000 section 9.3.3).
            self._probe_pending = True
        elif not path.address_validated and path.state is PathState.CANDIDATE:
            self._challenge(path)

    def _handle_path_response_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        data = buf.pull_bytes(8)
        if self._quic_logger is not None and context.quic_logger_frames is not None:
            context.quic_logger_frames.append(
                self._quic_logger.encode_path_response_frame(data=data)
            )
        path = next((p for p in self._paths.values() if data in p.local_challenges), None)
        if path is None or path.state is PathState.GONE:
            return
        now = context.time
        rtt = now - path.challenge_times[path.local_challenges.index(data)]
        path.local_challenges.clear()
        path.challenge_times.clear()
        path.challenge_count = 0
        if not path.metrics.has_rtt:
            path.metrics.add_rtt(rtt, 0.0, now)
        path.advance(PathState.VALIDATED)
        path.validation_deadline = None
        for other in self._paths.values():
            if other.addr.remote == path.addr.remote:
                other.address_validated = True
        # A challenge that 3x kept short proved the address, not that 1,200 bytes pass
        # (RFC 9000 section 8.2.1): ask again, padded.
        path.challenge_due = not path.challenge_padded
        path.local_challenge_sent = False
        apparent = self._apparent
        if apparent is not None and not apparent.settled:
            if apparent.new is path:
                apparent.validated_at = apparent.validated_at or now
            elif apparent.rival is path and apparent.validated_at is None:
                self._forget_apparent()
                self._switch(path, now, challenge=False)
        self._events.append(PathValidated(path.addr, rtt))

    def _handle_new_connection_id_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        super()._handle_new_connection_id_frame(context, frame_type, buf)
        if not self._established:
            return
        if self.active.peer_cid is not None:
            self.active.peer_cid = self._peer_cid
        # What the peer wants back (aioquic knows nothing of these) is due at once.
        self._retiring = [
            (context.time if cid.sequence_number < self._peer_retire_prior_to else at, cid)
            for at, cid in self._retiring
        ]
        for path in self._paths.values():
            cid = path.peer_cid
            if (
                path is not self.active
                and cid is not None
                and cid.sequence_number < self._peer_retire_prior_to
            ):
                self._retire_peer_cid(cid)
                path.peer_cid = None

    # connection IDs

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        for cid in self._host_cids:
            if not cid.was_sent:
                cid.stateless_reset_token = self._reset_token(cid.cid)

    def _take_cid(self, path: NetworkPath) -> bool:
        """Give the path a connection ID of its own, if it has none and one is left.

        Questions about other paths leave some for moves.
        """
        reserve = 0 if path is self.active or path.remote_challenges else RESERVED_CIDS
        if path.peer_cid is None and len(self._peer_cid_available) <= reserve:
            self.counters["cid_shortages"] += path is self.active
            return False
        cid = path.peer_cid or self._peer_cid_available.pop(0)
        path.peer_cid = cid
        if path is self.active:
            self._peer_cid = cid
            self._spin_bit = False  # RFC 9000 section 17.4
        return True

    def _renew_cid(self, path: NetworkPath) -> None:
        old, path.peer_cid = path.peer_cid, None
        if not self._take_cid(path):
            path.peer_cid = old
            return
        if old is not None:
            self._retiring.append((self._retire_time(path), old))
        self._probe_pending = True  # say so at once: the peer waits for the new one

    def _leave_path(self, path: NetworkPath) -> None:
        path.retire_at = self._retire_time(path)

    def _retire_time(self, path: NetworkPath) -> float:
        """Until when packets sent on this path may still be on their way."""
        pto = max(
            path.metrics.probe_timeout(self.max_ack_delay),
            self.active.metrics.probe_timeout(self.max_ack_delay),
        )
        return self._now + RETIRE_PTOS * pto

    def _retire_path(self, path: NetworkPath) -> None:
        path.retire_at = None
        if path is self.active:
            return
        path.challenge_due = False
        if path.state is PathState.PROBING:
            path.advance(PathState.FAILED)
        if path.peer_cid is self._peer_cid:
            self.active.peer_cid = path.peer_cid  # borrowed when there was no other left
        elif path.peer_cid is not None:
            self._retire_peer_cid(path.peer_cid)
        path.peer_cid = None
        self._recovery.requeue_frames(path.metrics)
        path.metrics.sent.clear()
        path.metrics.outstanding = path.metrics.outstanding_handshake = 0
        path.metrics.cc.bytes_in_flight = 0
        path.metrics.waiting_since = path.metrics.loss_time = None

    # paths

    def _settle_in(self, now: float) -> None:
        rtt = self.active.metrics.rtt_smoothed or self._configuration.initial_rtt
        self._settled_in_at = now + 2 * rtt + CROSSING

    def _new_metrics(self) -> PathMetrics:
        metrics = PathMetrics(
            max_datagram_size=START_MTU, initial_rtt=self._configuration.initial_rtt
        )
        if self._paths and self.active.metrics.has_rtt:
            # A challenge on a path never measured is repeated in the rhythm of the last one.
            metrics.initial_rtt = max(self.active.metrics.rtt_smoothed, 0.01)
        return metrics

    def _path(self, key: PathKey) -> NetworkPath:
        path = self._paths.get(key)
        if path is None:
            path = NetworkPath(key, self._new_metrics())
            path.address_validated = self._knows_address(path)
            for other in self._paths.values():
                if other.addr.remote == key.remote and not path.address_validated:
                    # The 3x credit belongs to the remote address.
                    path.bytes_received = max(path.bytes_received, other.bytes_received)
                    path.bytes_sent = max(path.bytes_sent, other.bytes_sent)
            self._register(path)
        return path

    def _register(self, path: NetworkPath) -> None:
        if len(self._paths) >= MAX_PATHS:
            kept = {self.active.addr}
            if self._apparent is not None:
                kept |= {self._apparent.old.addr, self._apparent.new.addr}
            spare = [p for p in self._paths.values() if p.addr not in kept]
            victim = min(spare, key=lambda p: (p.state is PathState.VALIDATED, p.used_at))
            self._retire_path(victim)
            self._recovery.forget(victim.metrics)
            del self._paths[victim.addr]
        path.used_at = self._now
        self._paths[path.addr] = path
        if path.metrics not in self._recovery.paths:
            self._recovery.paths.append(path.metrics)

    def _knows_address(self, path: NetworkPath) -> bool:
        return any(
            p.address_validated and p.addr.remote == path.addr.remote for p in self._paths.values()
        )

    def _switch(self, path: NetworkPath, now: float, *, challenge: bool) -> None:
        old = self.active
        if path is old:
            return
        path.retire_at = None
        path.used_at = now
        self.active = path
        self._take_cid(path)
        self._recovery.active = self._recovery.sending = path.metrics
        self._recovery.pto_count = 0
        self._recovery.requeue_frames(old.metrics)
        self._leave_path(old)
        if challenge:
            self._challenge(path)
        self._probe_pending = True  # something ack-eliciting leaves at once

    def _challenge(self, path: NetworkPath) -> None:
        path.advance(PathState.PROBING)
        path.challenge_due = True
        path.local_challenge_sent = False
        path.challenge_count = 0

    def _challenge_ready(self, path: NetworkPath) -> bool:
        return path.challenge_due and not path.local_challenge_sent

    def _challenge_retry_at(self, path: NetworkPath) -> float:
        interval = path.metrics.probe_timeout(self.max_ack_delay) * (
            1 << max(0, path.challenge_count - 1)
        )
        return path.challenged_at + min(interval, 1.0)

    def _challenge_unanswered(self, path: NetworkPath, now: float) -> None:
        if path.challenge_count < MAX_VALIDATION_TRIES:
            path.local_challenge_sent = False  # ask again with the next packet
            if path is self.active:
                self._probe_pending = True
            return
        path.challenge_due = False
        if path.state is not PathState.PROBING:
            return  # only the padded repetition failed, or the path is gone
        path.advance(PathState.FAILED)
        if path is not self.active:
            path.retire_at = now
        self._events.append(PathFailed(path.addr))

    def _settle_at(self) -> float | None:
        """When the apparent move is to be judged; None when there is nothing to judge."""
        apparent = self._apparent
        if apparent is None or apparent.settled:
            return None
        if apparent.validated_at is None:
            return apparent.deadline
        rtt = apparent.old.metrics.rtt_smoothed or apparent.new.metrics.rtt_smoothed
        return apparent.validated_at + max(rtt, 0.01)

    def _judge_apparent(self, now: float) -> None:
        apparent, due = self._apparent, self._settle_at()
        if apparent is None or due is None or now < due:
            return
        if apparent.validated_at is not None:
            apparent.settled = True
            self._leave_path(apparent.old)
            apparent.old.challenge_due = False
            if apparent.old.state is PathState.PROBING:
                apparent.old.advance(PathState.FAILED)
        else:  # nobody answered there: back to the last proven address (RFC 9000 section 9.3.2)
            self._apparent = None
            self._switch(apparent.old, now, challenge=True)

    def _on_path_challenge_delivery(self, delivery: QuicDeliveryState, network_path: Any) -> None:
        if (
            delivery is not QuicDeliveryState.ACKED
            and network_path is self.active  # elsewhere the retry timer asks again
            and network_path.challenge_due
            and network_path.challenge_count < MAX_VALIDATION_TRIES
        ):
            network_path.local_challenge_sent = False

    def _write_path_challenge_frame(self, builder: QuicPacketBuilder, network_path: Any) -> None:
        super()._write_path_challenge_frame(builder, network_path)
        network_path.challenged_at = self._now
        network_path.challenge_times.append(self._now)
        network_path.challenge_count += 1

    # sending

    def _serialize_transport_parameters(self) -> bytes:
        parameters = pull_quic_transport_parameters(
            Buffer(data=super()._serialize_transport_parameters())
        )
        parameters.max_ack_delay = MAX_ACK_DELAY_MS
        buf = Buffer(capacity=1024)
        push_quic_transport_parameters(buf, parameters)
        return buf.data

    def _handshake_datagrams(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if self._established:
            self._network_paths[0].is_validated = True
        datagrams = [data for data, _ in super().datagrams_to_send(now)]
        if self._is_client and self.heard_at is None:
            self._first_flight = (self._first_flight + datagrams)[-4:]
            out, self._late_flight = self._late_flight, []
            return out + [(data, key) for key in self.dial_paths for data in datagrams]
        self.active.bytes_sent += sum(map(len, datagrams))
        return [(data, self.active.addr) for data in datagrams]

    def _builder(self, path: NetworkPath, size: int) -> QuicPacketBuilder:
        cid = path.peer_cid or self._peer_cid
        return QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=cid.cid,
            quic_logger=self._quic_logger,
            spin_bit=self._spin_bit,
            version=cast(int, self._version),
        )

    def _flush(
        self, builder: QuicPacketBuilder, path: NetworkPath, now: float
    ) -> list[tuple[bytes, NetworkAddress]]:
        cid = path.peer_cid or self._peer_cid
        self._recovery.sending = path.metrics
        try:
            return self._flush_builder(
                builder=builder, network_path=cast(Any, path), peer_cid=cid.cid, now=now
            )
        finally:
            self._recovery.sending = self.active.metrics

    def _active_datagrams(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        path = self.active
        if path.peer_cid is None:
            self._take_cid(path)
        self._pacing_at = None
        asks = not path.is_validated and not path.local_challenge_sent
        answers = bool(path.remote_challenges)
        builder = self._builder(path, path.mtu)
        flight = path.metrics.cc.congestion_window - path.metrics.cc.bytes_in_flight
        if (self._probe_pending or asks or answers) and flight < path.mtu:
            flight = path.mtu  # probes may exceed the window (RFC 9002 section 7)
        builder.max_flight_bytes = flight
        builder.max_total_bytes = path.sendable()
        self._datagram_in_packet = -1
        with suppress(QuicPacketBuilderStop):
            self._write_application(builder, cast(Any, path), now)
        out = self._flush(builder, path, now)
        if asks and path.local_challenge_sent and out:
            path.challenge_padded = len(out[0][0]) >= START_MTU
        return out

    def _probe_datagrams(self, path: NetworkPath, now: float) -> list[tuple[bytes, NetworkAddress]]:
        room = path.sendable()
        if room is not None and room < SMALLEST_PROBE:
            return []
        if path.state is PathState.GONE or not self._take_cid(path):
            path.remote_challenges.clear()
            return []
        builder = self._builder(path, START_MTU)
        builder.max_total_bytes = room
        asks = self._challenge_ready(path)
        try:
            builder.start_packet(QuicPacketType.ONE_RTT, self._keys)
            if asks:
                self._write_path_challenge_frame(builder, path)
            while path.remote_challenges:
                self._write_path_response_frame(builder, path.remote_challenges[0])
                path.remote_challenges.popleft()
        except QuicPacketBuilderStop:
            pass
        out = self._flush(builder, path, now)
        if asks:
            path.challenge_padded = bool(out) and len(out[0][0]) >= START_MTU
        if path.retire_at is None:
            # An ID taken for a probe goes back when nothing comes of it.
            path.retire_at = now + PROBED_CID_LIFE
        return out

    def _copy_datagrams(self, path: NetworkPath, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """Second ways of what was just sent; copy packets move nobody."""
        out: list[tuple[bytes, NetworkAddress]] = []
        if path.peer_cid is None:
            return out
        for root, payload in self._sent_copies[:MAX_COPIES_PER_FLUSH]:
            builder = self._builder(path, path.mtu)
            cc = path.metrics.cc
            builder.max_flight_bytes = cc.congestion_window - cc.bytes_in_flight
            builder.max_total_bytes = path.sendable()
            head = copy_header(root)
            length = len(head) + len(payload)
            try:
                builder.start_packet(QuicPacketType.ONE_RTT, self._keys)
                buf = builder.start_frame(
                    QuicFrameType.DATAGRAM_WITH_LENGTH,
                    capacity=1 + size_uint_var(length) + length,
                )
            except QuicPacketBuilderStop:
                break
            buf.push_uint_var(length)
            buf.push_bytes(head)
            buf.push_bytes(payload)
            self.counters["copies_sent"] += 1
            out += self._flush(builder, path, now)
        return out

    def _write_datagram_frame(
        self, builder: QuicPacketBuilder, data: bytes, frame_type: QuicFrameType
    ) -> bool:
        if self._datapath is None or self._datagram_in_packet == builder.packet_number:
            raise QuicPacketBuilderStop  # one datagram a packet: a packet number names it
        # Cut for a packet of its own on this path: a window that is nearly full, or frames already
        # in the packet, must not split a datagram needlessly.
        header = 1 + len(self._peer_cid.cid) + PACKET_NUMBER_SEND_SIZE
        whole = self.active.mtu - header - AEAD_TAG_SIZE - DATAGRAM_OVERHEAD
        if self.settling:
            whole -= COPY_OVERHEAD  # so that a copy of it fits the old path as well
        payload = self._datapath.next_datagram(whole, self._now)
        room = min(builder.remaining_buffer_space, builder.remaining_flight_space)
        if payload is None or len(payload) + DATAGRAM_OVERHEAD > room:
            raise QuicPacketBuilderStop
        length = len(payload)
        buf = builder.start_frame(frame_type, capacity=1 + size_uint_var(length) + length)
        buf.push_uint_var(length)
        buf.push_bytes(payload)
        if self._quic_logger is not None and builder.quic_logger_frames is not None:
            builder.quic_logger_frames.append(
                self._quic_logger.encode_datagram_frame(length=length)
            )
        self._datagram_in_packet = builder.packet_number
        self._datapath.sent(builder.packet_number, self._now)
        if self._apparent is not None and not self._apparent.settled:
            self._sent_copies.append((builder.packet_number, payload))
        return True

    # path MTU

    def _mtu_probe_ready(self, path: NetworkPath) -> bool:
        return (
            path.state is PathState.VALIDATED
            and path.mtu == START_MTU
            and path.mtu_probes < MTU_PROBE_TRIES
            and not path.mtu_probe_in_flight
        )

    def _mtu_probe(self, path: NetworkPath, now: float) -> list[tuple[bytes, NetworkAddress]]:
        size = LINK_MTU[6 if ":" in path.addr.remote.host else 4]
        builder = self._builder(path, size)
        path.mtu_probes += 1
        try:
            builder.start_packet(QuicPacketType.ONE_RTT, self._keys)
            buf = builder.start_frame(
                QuicFrameType.PING, handler=self._on_mtu_probe_delivery, handler_args=(path, size)
            )
        except QuicPacketBuilderStop:
            return []
        buf.push_bytes(bytes(builder.remaining_buffer_space))  # PADDING frames
        path.mtu_probe_in_flight = True
        number = builder.packet_number
        out = self._flush(builder, path, now)
        entry = path.metrics.sent.get(number)
        if entry is not None:
            # The loss of a probe says nothing about congestion (RFC 8899 section 3).
            path.metrics.cc.on_packets_expired(packets=[entry.packet])
            entry.packet.in_flight = False
        return out

    def _on_mtu_probe_delivery(
        self, delivery: QuicDeliveryState, path: NetworkPath, size: int
    ) -> None:
        path.mtu_probe_in_flight = False
        if delivery is QuicDeliveryState.ACKED:
            path.mtu = size

    # keys

    def _watch_key_updates(self, now: float) -> None:
        """Old read keys go 3 PTO after the peer was heard with the new ones, not before."""
        if self._keys.updates != self.counters["key_updates"]:
            self.counters["key_updates"] = self._keys.updates
            self._forget_keys_at = None
        if self._forget_keys_at is None and self._keys.update_is_mutual:
            self._forget_keys_at = now + RETIRE_PTOS * self._recovery.get_probe_timeout()
