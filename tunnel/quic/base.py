"""What a connection over many paths is made of: handshake, keys, connection IDs, the paths.

The lowest of three layers, each a class of its own so that each can be read alone: here the parts
and what may be done with them, in `sender` what leaves on which path, in `connection` the rules of
migration. aioquic is always told one constant address, `STAND_IN`.
"""

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
from aioquic.quic.recovery import QuicPacketRecovery

from tunnel.datapath.engine import Connection, Datapath, Lane
from tunnel.path.liveness import suspect_deadline
from tunnel.path.network import Address, PathKey
from tunnel.path.path import PathState
from tunnel.quic.exporter import Exporter
from tunnel.quic.keys import MAX_PACKETS_PER_KEY, EngineKeys
from tunnel.quic.mutual_tls import KeyPredicate, PinnedContext
from tunnel.quic.paths import START_MTU, ApparentMove, NetworkPath, Received
from tunnel.quic.recovery import MAX_PTO_INTERVAL, EngineRecovery, HandshakeRecovery

MAX_ACK_DELAY_MS = 5  # announced, and held: the engine acknowledges after 1 ms
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
        datapath: Datapath,
        accepts: KeyPredicate,
        reset_token: Callable[[bytes], bytes],
        initial_token: Callable[[bytes], bytes] | None = None,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
        max_packets_per_key: int | None = None,
    ) -> None:
        self._engine = datapath.connection()
        """This connection's side of the native engine; idle until the handshake is confirmed."""
        self._number = 0
        self._handed_over = False
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._loss.__class__ = HandshakeRecovery  # aioquic offers no way to pass one in
        self._engine.owner = self
        self._datapath = datapath
        self._lane: Lane | None = None
        self._accepts = accepts
        self._reset_token = reset_token
        self._now = 0.0
        self._first_heard: float | None = None
        self.dial_paths: list[PathKey] = [path] if configuration.is_client else []
        self._first_flight: list[bytes] = []
        self._late_flight: list[tuple[bytes, NetworkAddress]] = []
        self._newest_flight = b""
        self._twins: dict[PathKey, int] = {}
        """Where else a copy of the dialler's newest datagram came from, and the bytes that may go
        there: the way it came on first may not lead back."""
        self._established = False
        self._keys = EngineKeys(self._engine)
        self._engine.configure(
            max_sealed=max_packets_per_key or MAX_PACKETS_PER_KEY, max_pto=MAX_PTO_INTERVAL
        )
        self._recovery: EngineRecovery | None = None
        self._exporter: Exporter | None = None

        self._paths: dict[PathKey, NetworkPath] = {}
        self._active = self._paths[path] = self._new_path(path)
        self._retiring: list[tuple[float, QuicConnectionId]] = []  # replaced on a path in use
        self._apparent: ApparentMove | None = None
        self._second: NetworkPath | None = None
        self._second_gets_all = False
        self._settled_in_at = 0.0
        self._announced: tuple[bytes, ...] = ()
        self._counters = {"cid_shortages": 0, "moves_contested": 0}
        self._rx = Received(self.active)

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

    def attach(self, lane: Lane) -> None:
        """Connect the data path of the peer: what waits there leaves, what arrives goes there."""
        self._lane = lane
        self._engine.attach(lane)

    def detach(self) -> None:
        """Take the data path away again (another connection carries on)."""
        if self._lane is not None:
            self._lane = None
            self._engine.detach()

    @property
    def engine(self) -> Connection:
        """The native engine's side, which reports events."""
        return self._engine

    @property
    def heard_at(self) -> float | None:
        """When the last authentic packet came in, on any path."""
        return self._engine.heard_at if self._handed_over else self._first_heard

    @property
    def counters(self) -> dict[str, int]:
        return {
            **self._counters,
            **self._engine.counters,
            "key_updates": self._engine.key_updates if self._handed_over else 0,
        }

    # what aioquic keeps in attributes, and the engine knows

    @property
    def _packet_number(self) -> int:
        return self._engine.number if self._handed_over else self._number

    @_packet_number.setter
    def _packet_number(self, value: int) -> None:
        if self._handed_over:
            self._engine.number = value
        else:
            self._number = value

    @property
    def active(self) -> NetworkPath:
        """The path we send on."""
        return self._active

    @active.setter
    def active(self, path: NetworkPath) -> None:
        self._active = path
        self._engine.activate(path.metrics)

    @property
    def _peer_path(self) -> NetworkPath:
        """Where the peer's newest packet that means to move came from."""
        return cast(NetworkPath, self._engine.peer_path.owner)

    @_peer_path.setter
    def _peer_path(self, path: NetworkPath) -> None:
        self._engine.peer_path = path.metrics

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
        return self._loss.max_ack_delay

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

    @property
    def refused_key(self) -> bytes | None:
        """The raw public key the peer has proved to hold, and that is not an accepted one."""
        context = getattr(self, "tls", None)
        return context.refused_key if isinstance(context, PinnedContext) else None

    def export(self, label: bytes, context: bytes, length: int) -> bytes:
        """Keying material that only the two ends of this connection have (RFC 8446 section 7.5).

        Raises RuntimeError before the handshake has come that far.
        """
        if self._exporter is None:
            raise RuntimeError("nothing can be exported before the handshake is done")
        return self._exporter.export(label, context, length)

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

    def _update_traffic_key(
        self,
        direction: tls.Direction,
        epoch: tls.Epoch,
        cipher_suite: tls.CipherSuite,
        secret: bytes,
    ) -> None:
        # The first 1-RTT key of either role is derived when the transcript ends with the server's
        # Finished, which is what the exporter's secret is made of.
        first = tls.Direction.DECRYPT if self._is_client else tls.Direction.ENCRYPT
        if epoch is tls.Epoch.ONE_RTT and direction is first:
            assert self.tls.key_schedule is not None
            self._exporter = Exporter.at_server_finished(self.tls.key_schedule)
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)

    def _adopt_handshake_path(self, path: NetworkPath, now: float) -> None:
        """Until the handshake is confirmed, the newest authentic packet says where to answer."""
        if path is not self.active:
            others = list(self._paths.values())
            self.active = path
            self._paths = {path.addr: path}
            for other in others:
                other.metrics.remove()
        if self._handshake_confirmed:
            self._hand_over(now)
            self._established = True
            path.state = PathState.VALIDATED
            path.address_validated = True
            path.peer_cid = self._peer_cid
            path.used_at = now
            self._peer_path = path

    def _hand_over(self, now: float) -> None:
        """The 1-RTT packet number space goes to the engine, with everything outstanding in it."""
        engine, space = self._engine, self._spaces[tls.Epoch.ONE_RTT]
        handshake: QuicPacketRecovery = self._loss
        path = self.active.metrics
        if handshake._rtt_initialized:
            # The smallest: the others have the certificates' arithmetic in them.
            path.add_rtt(handshake._rtt_min, 0.0)
        engine.configure(
            peer_ack_exponent=self._remote_ack_delay_exponent,
            max_ack_delay=handshake.max_ack_delay,
        )
        self._recovery = EngineRecovery(
            engine, max_ack_delay=handshake.max_ack_delay, send_probe=self._send_probe
        )
        self._keys.start(now)
        outstanding = sorted(space.sent_packets.items())
        for number, packet in outstanding:
            engine.number = number
            self._recovery.on_packet_sent(packet=packet, space=space)
        engine.number = self._number
        self._handed_over = True
        self._loss = cast(Any, self._recovery)
        for block in space.ack_queue:
            for number in range(block.start, block.stop):
                engine.note_received(number)
        if space.ack_at is not None:
            engine.acknowledge_at(now)
        space.ack_at = None
        space.sent_packets.clear()
        self._announce_cids()
        self._set_patience()

    def _set_patience(self) -> None:
        """After how much silence on the active path the engine wakes us."""
        metrics = self.active.metrics
        self._engine.patience = suspect_deadline(
            has_rtt=metrics.has_rtt,
            expected_rtt=metrics.initial_rtt,
            rtt_smoothed=metrics.rtt_smoothed,
            rtt_variance=metrics.rtt_variance,
            max_ack_delay=self.max_ack_delay,
        )

    def _announce_cids(self) -> None:
        """Tell the engine which connection IDs are ours."""
        cids = tuple(self.host_cids())
        if cids != self._announced:
            self._announced = cids
            self._engine.set_host_cids(cids)

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
        else:
            self.active.metrics.set_cid(self._peer_cid.cid)  # borrowed, see `_take_cid`
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
            if path is self.active:
                self._counters["cid_shortages"] += 1
                path.metrics.set_cid(self._peer_cid.cid)  # borrowed: better linked than silent
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
        if path in (self.active, self._second):
            return
        path.challenge_due = False
        if path.state is PathState.PROBING:
            path.advance(PathState.FAILED)
        if path.peer_cid is self._peer_cid:
            self.active.peer_cid = path.peer_cid  # borrowed when there was no other left
        elif path.peer_cid is not None:
            self._retire_peer_cid(path.peer_cid)
        path.peer_cid = None
        # No acknowledgement comes any more: frames are sent again, which the engine reports lost,
        # and it replays the datagrams by itself.
        path.metrics.abandon()

    # paths

    def _new_path(self, key: PathKey) -> NetworkPath:
        initial_rtt = self._configuration.initial_rtt
        if self._paths and self.active.metrics.has_rtt:
            # A challenge on a path never measured is repeated in the rhythm of the last one.
            initial_rtt = max(self.active.metrics.rtt_smoothed, 0.01)
        metrics = self._engine.add_path(START_MTU, initial_rtt)
        self._datapath.aim(metrics, key)
        return NetworkPath(key, metrics)

    def _path(self, key: PathKey) -> NetworkPath:
        path = self._paths.get(key)
        if path is None:
            path = self._new_path(key)
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
            if self._second is not None:
                kept.add(self._second.addr)
            if self._apparent is not None:
                kept |= {self._apparent.old.addr, self._apparent.new.addr}
            spare = [p for p in self._paths.values() if p.addr not in kept]
            victim = min(spare, key=lambda p: (p.state is PathState.VALIDATED, p.used_at))
            self._retire_path(victim)
            victim.metrics.remove()
            del self._paths[victim.addr]
        path.used_at = self._now
        self._paths[path.addr] = path

    def _knows_address(self, path: NetworkPath) -> bool:
        return any(
            p.address_validated and p.addr.remote == path.addr.remote for p in self._paths.values()
        )

    def _switch(
        self, path: NetworkPath, now: float, *, challenge: bool, replay: bool = True
    ) -> None:
        """`replay`: what is in flight on the path before may be lost, and is sent again."""
        old = self.active
        if path is old:
            return
        path.retire_at = None
        path.used_at = now
        self.active = path
        if path is self._second:
            self._second = None
        self._take_cid(path)
        if self._recovery is not None:
            self._recovery.sending = path.metrics
            self._recovery.requeue_frames(old.metrics)
            self._set_patience()
        path.pmtu.revalidate(now)
        self._leave_path(old)
        if self._quic_logger is not None:
            # draft-ietf-quic-qlog-quic-events section 4.6
            self._quic_logger.log_event(
                category="connectivity",
                event="path_assigned",
                data={
                    "path_id": str(path.addr),
                    "path_local": str(path.addr.local),
                    "path_remote": str(path.addr.remote),
                },
            )
        if replay:
            self._replay(old)
        if challenge:
            self._challenge(path)
        self._probe_pending = True  # something ack-eliciting leaves at once

    def _replay(self, path: NetworkPath) -> None:
        if self._engine.running and path is not self.active:
            self._engine.replay(path.metrics, now=self._now)

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
