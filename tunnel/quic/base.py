"""What a connection over many paths is made of: handshake, keys, connection IDs, the paths.

The lowest of three layers, each a class of its own so that each can be read alone: here the parts
and what may be done with them, in `sender` what leaves on which path, in `connection` the rules of
migration. aioquic is always told one constant address, `STAND_IN`.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, cast

from aioquic import tls
from aioquic.buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    END_STATES,
    NetworkAddress,
    QuicConnection,
    QuicConnectionId,
    QuicReceiveContext,
)
from aioquic.quic.packet import (
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from aioquic.quic.packet_builder import (
    QuicDeliveryState,
    QuicPacketBuilder,
)

from tunnel.path.network import Address, PathKey
from tunnel.path.path import PathState
from tunnel.quic.datagrams import Datapath, PullQueue
from tunnel.quic.keys import OneRttKeys
from tunnel.quic.mutual_tls import KeyPredicate, PinnedContext
from tunnel.quic.paths import START_MTU, ApparentMove, NetworkPath, Received
from tunnel.quic.recovery import PathMetrics, Recovery

DUPLICATE_WINDOW = 8192
"""Packet numbers. aioquic's 128 are 32 ms at 4,000 packets a second: every late packet of the old
path would be taken for a duplicate after a switch."""
MAX_ACK_DELAY_MS = 5  # announced, and held: aioquic acknowledges after 1 ms
MAX_PATHS = 32
MAX_VALIDATION_TRIES = 5
RESERVED_CIDS = 2
"""Connection IDs that questions about other paths leave for moves."""
RETIRE_PTOS = 3
"""A connection ID lives this many PTO after its path was left, for packets still in flight."""

STAND_IN = "peer"  # the one address aioquic ever sees


class PathConnection(QuicConnection):
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
        self._apparent: ApparentMove | None = None
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

        self._rx = Received(self.active)

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
        self.connect(STAND_IN, now)

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

    # handshake

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        PinnedContext.adopt(self.tls, is_client=self._is_client, accepts=self._accepts)
        self._cryptos[tls.Epoch.ONE_RTT] = self._keys
        self._spaces[tls.Epoch.ONE_RTT].received_packets._size = DUPLICATE_WINDOW

    def _on_opened(self, packet_number: int) -> None:
        self._rx.number = packet_number

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

    def _serialize_transport_parameters(self) -> bytes:
        parameters = pull_quic_transport_parameters(
            Buffer(data=super()._serialize_transport_parameters())
        )
        parameters.max_ack_delay = MAX_ACK_DELAY_MS
        buf = Buffer(capacity=1024)
        push_quic_transport_parameters(buf, parameters)
        return buf.data

    # connection IDs

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
        if path.peer_cid is None:
            path.peer_cid = self._peer_cid_available.pop(0)
            path.cid_changed_at = self._now
        cid = path.peer_cid
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

    # asking

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

    # keys

    def _watch_key_updates(self, now: float) -> None:
        """Old read keys go 3 PTO after the peer was heard with the new ones, not before."""
        if self._keys.updates != self.counters["key_updates"]:
            self.counters["key_updates"] = self._keys.updates
            self._forget_keys_at = None
        if self._forget_keys_at is None and self._keys.update_is_mutual:
            self._forget_keys_at = now + RETIRE_PTOS * self._recovery.get_probe_timeout()
