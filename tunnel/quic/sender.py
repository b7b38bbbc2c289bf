"""What leaves on which path: data on the active one, questions and copies on the others.

Everything of a path, its window, its size, its connection ID and its 3x limit, is applied here, to
packets that aioquic's own frame writers fill.
"""

from contextlib import suppress
from typing import Any, cast

from aioquic import tls
from aioquic.buffer import size_uint_var
from aioquic.quic.connection import (
    END_STATES,
    NetworkAddress,
)
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
)
from aioquic.quic.packet_builder import (
    PACKET_NUMBER_SEND_SIZE,
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicPacketBuilderStop,
)

from tunnel.path.network import PathKey
from tunnel.path.path import PathState
from tunnel.quic.base import PathConnection
from tunnel.quic.frames import copy_header
from tunnel.quic.paths import START_MTU, NetworkPath
from tunnel.quic.recovery import GRANULARITY

PROBED_CID_LIFE = 5.0
"""Seconds until the connection ID of a path that was only probed is given back."""
MAX_COPIES_PER_FLUSH = 64
SMALLEST_PROBE = 60  # bytes of a packet with a challenge and a response
MTU_PROBE_TRIES = 2
BLACK_HOLE_LOSSES = 6
"""Large packets lost in a row, none acknowledged, that make the path's MTU suspect."""
LINK_MTU = {4: 1500 - 28, 6: 1500 - 48}  # UDP payload of an Ethernet frame

AEAD_TAG_SIZE = 16  # RFC 9001 section 5.3, all cipher suites
COPY_OVERHEAD = 9  # its kind, and a root of up to eight bytes
DATAGRAM_OVERHEAD = 3  # frame type, and a length of two bytes


class SendingConnection(PathConnection):
    """A connection that writes its packets path by path."""

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

    # a flush, part by part

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
