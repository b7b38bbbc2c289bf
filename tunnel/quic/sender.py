"""What leaves on which path: control packets here, data by the native engine.

Everything of a path, its window, its size, its connection ID and its 3x limit, is applied here, to
packets that aioquic's own frame writers fill; the engine does the same for the data.
"""

from contextlib import suppress
from typing import Any, cast

from aioquic.quic.connection import (
    END_STATES,
    NetworkAddress,
)
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
)
from aioquic.quic.packet_builder import (
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicPacketBuilderStop,
)

from tunnel.path.network import PathKey
from tunnel.path.path import PathState
from tunnel.quic.base import PathConnection
from tunnel.quic.paths import START_MTU, NetworkPath

PROBED_CID_LIFE = 5.0
"""Seconds until the connection ID of a path that was only probed is given back."""
SMALLEST_PROBE = 60  # bytes of a packet with a challenge and a response
CONTROL_RESERVE = 4
"""Packets of control that may be under way beyond the window that data fills: it is little, and
what it says (a new path, a new key) helps the data. One may always leave: probes do."""


class SendingConnection(PathConnection):
    """A connection that writes its packets path by path."""

    def shrink(self, key: PathKey, now: float) -> None:
        """A datagram was too large for the link of this path (EMSGSIZE)."""
        path = self._paths.get(key)
        if path is not None:
            path.pmtu.refused(now)
            path.metrics.large_lost = 0
            path.resize()

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
        self.collect(now)
        self._announce_cids()
        out = self._sealed()
        out += self._active_datagrams(now)
        for path in list(self._paths.values()):
            if path is not self.active and (path.remote_challenges or self._challenge_ready(path)):
                out += self._probe_datagrams(path, now)
        out += self._mtu_probe(self.active, now)
        self._announce_cids()
        self._sync_copies()
        if not self._datapath.driven:
            while self._engine.seal(now):
                out += self._sealed()
        return out

    def _sealed(self) -> list[tuple[bytes, NetworkAddress]]:
        """What the engine has sealed, where no `Io` takes it."""
        if self._datapath.driven:
            return []
        return [(data, path.owner.addr) for path, data in self._datapath.engine.take_sealed()]

    def _sync_copies(self) -> None:
        """Where copies go: while a move of the peer is checked, everything to the address before;
        else what the owner wants to the second path.
        """
        wanted, everything = self._second, self._second_gets_all
        apparent = self._apparent
        if apparent is not None and not apparent.settled and apparent.old.peer_cid is not None:
            wanted, everything = apparent.old, True
        if wanted is None or wanted is self.active or not self._take_cid(wanted):
            self._engine.copies = None
            return
        self._engine.copies = wanted.metrics
        self._engine.copies_all = everything

    # a flush, part by part

    def _handshake_datagrams(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if self._established:
            self._network_paths[0].is_validated = True
        datagrams = [data for data, _ in super().datagrams_to_send(now)]
        if self._state in END_STATES:
            self._engine.stop()
        if self._is_client and self.heard_at is None:
            self._first_flight = (self._first_flight + datagrams)[-4:]
            out, self._late_flight = self._late_flight, []
            return out + [(data, key) for key in self.dial_paths for data in datagrams]
        self.active.bytes_sent += sum(map(len, datagrams))
        out = [(data, self.active.addr) for data in datagrams]
        for key, allowed in self._twins.items():
            for data in datagrams:
                if len(data) <= allowed:
                    allowed -= len(data)
                    out.append((data, key))
            self._twins[key] = allowed
        return out

    def _builder(self, path: NetworkPath, size: int) -> QuicPacketBuilder:
        cid = path.peer_cid or self._peer_cid
        return QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=cid.cid,
            quic_logger=self._quic_logger,
            spin_bit=False,  # RFC 9000 section 17.4: allowed, and it tells nobody our round trip
            version=cast(int, self._version),
        )

    def _flush(
        self, builder: QuicPacketBuilder, path: NetworkPath, now: float
    ) -> list[tuple[bytes, NetworkAddress]]:
        cid = path.peer_cid or self._peer_cid
        assert self._recovery is not None
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
        builder = self._builder(path, path.mtu)
        flight = path.metrics.window - path.metrics.in_flight
        builder.max_flight_bytes = max(flight + CONTROL_RESERVE * path.mtu, path.mtu)
        builder.max_total_bytes = path.sendable()
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
        if path.retire_at is None and path is not self._second:
            # An ID taken for a probe goes back when nothing comes of it.
            path.retire_at = now + PROBED_CID_LIFE
        return out

    # path MTU

    def _may_probe_mtu(self, path: NetworkPath) -> bool:
        """The size is asked for when the path itself is proved."""
        return path.state is PathState.VALIDATED and path.peer_cid is not None

    def _mtu_probe(self, path: NetworkPath, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if not self._may_probe_mtu(path):
            return []
        size = path.pmtu.probe_due(now)
        if size is None:
            return []
        builder = self._builder(path, size)
        try:
            builder.start_packet(QuicPacketType.ONE_RTT, self._keys)
            buf = builder.start_frame(
                QuicFrameType.PING, handler=self._on_mtu_probe_delivery, handler_args=(path, size)
            )
        except QuicPacketBuilderStop:
            return []
        buf.push_bytes(bytes(builder.remaining_buffer_space))  # PADDING frames
        path.pmtu.probe_sent(size, now)
        assert self._recovery is not None
        self._recovery.probing = True
        try:
            return self._flush(builder, path, now)
        finally:
            self._recovery.probing = False

    def _on_mtu_probe_delivery(
        self, delivery: QuicDeliveryState, path: NetworkPath, size: int
    ) -> None:
        if path.metrics.removed:
            return
        if delivery is QuicDeliveryState.ACKED:
            path.pmtu.acknowledged(size, self._now)
        else:
            path.pmtu.lost(size, self._now)
        path.metrics.large_lost = 0
        path.resize()

    def _judge_size(self, path: NetworkPath, now: float) -> bool:
        """Large packets were lost in a row: whether the path has become smaller for it (RFC 8899
        section 4.3)."""
        path.pmtu.large_lost(path.metrics.large_lost, now)
        if path.mtu == path.pmtu.size:
            return False
        path.metrics.large_lost = 0
        path.resize()
        return True

    def collect(self, now: float) -> bool:
        """Look at what the engine reports; True when there may be control packets to send."""
        raise NotImplementedError
