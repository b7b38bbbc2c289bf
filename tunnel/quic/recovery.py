"""Loss detection and RTT by path (RFC 9002, with everything of a path kept with the path).

aioquic has one estimate for the whole connection. Across a migration that is wrong three times:
the old window is used on a path nobody has measured (RFC 9000 section 9.4 forbids it), reordering
*between* paths looks like loss, and packets lost with a dead path keep the new one's window full.
Here every sent packet belongs to the path it left on; packet threshold, time threshold, RTT,
bytes in flight and pacing apply within a path only. The interface is the one aioquic's
connection expects of its recovery object.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from aioquic.quic.logger import QuicLoggerTrace
from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketSpace

from tunnel.quic.congestion import Pacer, WindowController

PACKET_THRESHOLD = 3  # RFC 9002 section 6.1.1
MAX_PACKET_THRESHOLD = 128
"""Where a path reorders, the threshold is doubled up to this (RFC 9002 section 6.1.1)."""
REMEMBERED_LOSSES = 256  # numbers declared lost, to find out that they were only late
LARGE_PACKET = 1200  # bytes; every path carries this, larger ones may meet a black hole
TIME_THRESHOLD = 9 / 8  # RFC 9002 section 6.1.2
GRANULARITY = 0.001  # seconds, RFC 9002 section 6.1.2
MAX_PTO_INTERVAL = 0.9
"""Seconds. The tunnel holds for hours without a path, and an SSH session must type on within one
second of the path's return, so the back-off of RFC 9002 section 6.2.1 ends here."""


@dataclass(slots=True)
class _Sent:
    packet: QuicSentPacket
    space: QuicPacketSpace
    order: int  # counts packets of one path, so that other paths' numbers leave no gaps


class PathMetrics:
    """RTT, window and outstanding packets of one path."""

    def __init__(self, *, max_datagram_size: int, initial_rtt: float) -> None:
        self.cc = WindowController(max_datagram_size=max_datagram_size)
        self.pacer = Pacer(max_datagram_size=max_datagram_size)
        self.initial_rtt = initial_rtt
        self.rtt_latest = 0.0
        self.rtt_min = math.inf
        self.rtt_smoothed = 0.0
        self.rtt_variance = 0.0
        self.has_rtt = False
        self.sent: dict[int, _Sent] = {}
        self.outstanding = 0  # ack-eliciting packets of all spaces
        self.outstanding_handshake = 0
        self.last_eliciting_at = 0.0
        self.waiting_since: float | None = None
        """When the oldest ack-eliciting packet since the last progress left; None: all answered."""
        self.last_progress_at = 0.0
        self.loss_time: float | None = None
        self.lost = 0
        self.large_lost = 0
        """Packets above 1,200 bytes lost since one was acknowledged (RFC 8899 section 4.3)."""
        self.packet_threshold = PACKET_THRESHOLD
        self._declared_lost: dict[int, None] = {}
        self._order = 0
        self._largest_acked_order = -1

    def probe_timeout(self, max_ack_delay: float) -> float:
        """The PTO without back-off, in seconds (RFC 9002 section 6.2.1)."""
        if not self.has_rtt:
            return 2 * self.initial_rtt
        return self.rtt_smoothed + max(4 * self.rtt_variance, GRANULARITY) + max_ack_delay

    def inherit(self, other: "PathMetrics") -> None:
        """Take over window and RTT: only the peer's port changed (RFC 9000 section 9.4)."""
        self.cc.congestion_window = other.cc.congestion_window
        self.cc.ssthresh = other.cc.ssthresh
        self.has_rtt, self.rtt_latest, self.rtt_min = other.has_rtt, other.rtt_latest, other.rtt_min
        self.rtt_smoothed, self.rtt_variance = other.rtt_smoothed, other.rtt_variance
        if self.has_rtt:
            self.pacer.update_rate(self.cc.congestion_window, self.rtt_smoothed)

    def on_sent(self, packet: QuicSentPacket, space: QuicPacketSpace) -> None:
        self.sent[packet.packet_number] = _Sent(packet, space, self._order)
        self._order += 1
        if packet.in_flight:
            self.cc.on_packet_sent(packet=packet)
        # Only what is in flight is paced (RFC 9002 section 7.7): acknowledgements cost nothing.
        self.pacer.charge(packet.sent_bytes if packet.in_flight else 0)
        if packet.is_ack_eliciting:
            self._count(space, 1)
            if self.waiting_since is None:
                self.waiting_since = packet.sent_time

    def forgive(self) -> None:
        """What is outstanding no longer fills the window: the path was dead, not congested."""
        for entry in self.sent.values():
            if entry.packet.in_flight:
                entry.packet.in_flight = False
                self.cc.on_packets_expired(packets=[entry.packet])

    def take(self, number: int) -> _Sent | None:
        """Stop tracking one packet."""
        entry = self.sent.pop(number, None)
        if entry is not None and entry.packet.is_ack_eliciting:
            self._count(entry.space, -1)
        return entry

    def acked_in(self, ranges: RangeSet) -> list[_Sent]:
        """Remove and return the packets inside `ranges`, ascending."""
        if self._declared_lost:
            self._find_spurious(ranges)
        if not self.sent:
            return []
        first, last = next(iter(self.sent)), next(reversed(self.sent))
        taken: list[_Sent] = []
        for block in ranges:
            low, high = max(block.start, first), min(block.stop, last + 1)
            if high - low > 2 * len(self.sent):  # numbers of other paths in between
                numbers = [n for n in self.sent if low <= n < high]
            else:
                numbers = [n for n in range(low, high) if n in self.sent]
            for number in numbers:
                acked = self.sent[number]
                self.take(number)
                taken.append(acked)
                self._largest_acked_order = max(self._largest_acked_order, acked.order)
        return taken

    def _find_spurious(self, ranges: RangeSet) -> None:
        late = [n for n in self._declared_lost if any(r.start <= n < r.stop for r in ranges)]
        for number in late:
            del self._declared_lost[number]
        if late:
            self.packet_threshold = min(2 * self.packet_threshold, MAX_PACKET_THRESHOLD)
            self.cc.undo_loss()

    def on_progress(self, now: float) -> None:
        self.last_progress_at = now
        self.waiting_since = now if self.outstanding else None

    def add_rtt(self, rtt: float, ack_delay: float, now: float) -> None:
        """RFC 9002 section 5.3; all in seconds."""
        self.rtt_latest = max(rtt, 1e-5)
        self.rtt_min = min(self.rtt_min, self.rtt_latest)
        adjusted = self.rtt_latest
        if adjusted >= self.rtt_min + ack_delay:
            adjusted -= ack_delay
        if not self.has_rtt:
            self.has_rtt = True
            self.rtt_smoothed, self.rtt_variance = adjusted, adjusted / 2
        else:
            self.rtt_variance += (abs(self.rtt_smoothed - adjusted) - self.rtt_variance) / 4
            self.rtt_smoothed += (adjusted - self.rtt_smoothed) / 8
        self.cc.on_rtt_measurement(now=now, rtt=rtt)
        self.pacer.update_rate(self.cc.congestion_window, self.rtt_smoothed)

    def detect_loss(self, now: float) -> list[_Sent]:
        """Remove and return what RFC 9002 section 6.1 calls lost; sets `loss_time`."""
        reference = max(self.rtt_latest, self.rtt_smoothed) if self.has_rtt else self.initial_rtt
        delay = max(TIME_THRESHOLD * reference, GRANULARITY)
        self.loss_time = None
        lost: list[int] = []
        for number, entry in self.sent.items():
            if entry.order > self._largest_acked_order:
                break
            sent_at = entry.packet.sent_time or 0.0
            if (
                entry.order <= self._largest_acked_order - self.packet_threshold
                or now >= sent_at + delay
            ):
                lost.append(number)
            elif self.loss_time is None or sent_at + delay < self.loss_time:
                self.loss_time = sent_at + delay
        taken = [self.take(number) for number in lost]
        return [entry for entry in taken if entry is not None]

    def note_lost(self, packets: list[QuicSentPacket]) -> None:
        """Count packets that were declared lost, and remember them in case they were only late."""
        for packet in packets:
            self.lost += packet.is_ack_eliciting
            self.large_lost += packet.in_flight and packet.sent_bytes > LARGE_PACKET
            self._declared_lost[packet.packet_number] = None
        while len(self._declared_lost) > REMEMBERED_LOSSES:
            del self._declared_lost[next(iter(self._declared_lost))]

    def _count(self, space: QuicPacketSpace, by: int) -> None:
        self.outstanding += by
        if not space.is_application_data:
            self.outstanding_handshake += by


class Recovery:
    """What aioquic's connection calls its loss recovery, over several paths."""

    def __init__(
        self,
        *,
        first: PathMetrics,
        peer_completed_address_validation: bool,
        send_probe: Callable[[], None],
        on_acknowledged: Callable[[int], None],
        logger: logging.LoggerAdapter[logging.Logger],
        quic_logger: QuicLoggerTrace | None,
    ) -> None:
        self.handshake_confirmed = False
        self.max_ack_delay = 0.025  # RFC 9000 section 18.2, until the peer's parameters are known
        self.peer_completed_address_validation = peer_completed_address_validation
        self.spaces: list[QuicPacketSpace] = []
        self.active = first
        self.sending = first
        """The path that packets being built right now will leave on."""
        self.arriving = first
        """The path that the datagram being read came in on."""
        self.paths: list[PathMetrics] = [first]
        self.pto_count = 0
        self._send_probe = send_probe
        self._on_acknowledged = on_acknowledged
        self._logger = logger
        self._quic_logger = quic_logger

    # the interface of aioquic's recovery

    @property
    def bytes_in_flight(self) -> int:
        return self.sending.cc.bytes_in_flight

    @property
    def congestion_window(self) -> int:
        return self.sending.cc.congestion_window

    @property
    def _pacer(self) -> Pacer:
        return self.sending.pacer

    def discard_space(self, space: QuicPacketSpace) -> None:
        for path in self.paths:
            for number in [n for n, entry in path.sent.items() if entry.space is space]:
                entry = path.take(number)
                if entry is not None and entry.packet.in_flight:
                    path.cc.on_packets_expired(packets=[entry.packet])
            path.waiting_since = path.waiting_since if path.outstanding else None
        space.ack_at = None
        space.loss_time = None
        self.pto_count = 0

    def get_probe_timeout(self, *, include_max_ack_delay: bool = True) -> float:
        return self.active.probe_timeout(self.max_ack_delay if include_max_ack_delay else 0.0)

    def get_loss_detection_time(self, *, amplification_limited: bool) -> float | None:
        times = [path.loss_time for path in self.paths if path.loss_time is not None]
        if times:
            return min(times)
        if amplification_limited:
            return None
        active = self.active
        counted = active.outstanding if self.handshake_confirmed else active.outstanding_handshake
        if not counted and self.peer_completed_address_validation:
            return None
        interval = self.get_probe_timeout(include_max_ack_delay=self.handshake_confirmed) * (
            1 << min(self.pto_count, 16)
        )
        ceiling = max(MAX_PTO_INTERVAL, self.get_probe_timeout())
        return active.last_eliciting_at + min(interval, ceiling)

    def on_packet_sent(self, *, packet: QuicSentPacket, space: QuicPacketSpace) -> None:
        path = self.sending
        path.on_sent(packet, space)
        if packet.is_ack_eliciting and (self.handshake_confirmed or not space.is_application_data):
            path.last_eliciting_at = packet.sent_time or 0.0

    def on_ack_received(
        self, *, ack_rangeset: RangeSet, ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        largest = ack_rangeset.bounds().stop - 1
        space.largest_acked_packet = max(space.largest_acked_packet, largest)
        progress = False
        for path in self.paths:
            taken = path.acked_in(ack_rangeset)
            if not taken:
                continue
            progress = True
            eliciting = False
            for entry in taken:
                packet = entry.packet
                eliciting = eliciting or packet.is_ack_eliciting
                if packet.in_flight:
                    path.cc.on_packet_acked(packet=packet, now=now)
                if packet.sent_bytes > LARGE_PACKET:
                    path.large_lost = 0
                for handler, arguments in packet.delivery_handlers:
                    handler(QuicDeliveryState.ACKED, *arguments)
            newest = taken[-1].packet
            # An acknowledgement that took another path back measures neither of the two.
            measures = path is self.active or path is self.arriving
            if newest.packet_number == largest and eliciting and measures:
                path.add_rtt(
                    now - (newest.sent_time or now), min(ack_delay, self.max_ack_delay), now
                )
            path.on_progress(now)
            self._declare_lost(path, path.detect_loss(now), now)
        if not progress:
            return
        if space.is_application_data:
            self._on_acknowledged(largest)
        if self.peer_completed_address_validation:
            self.pto_count = 0

    def on_loss_detection_timeout(self, *, now: float) -> None:
        due = [p for p in self.paths if p.loss_time is not None and p.loss_time <= now]
        if due:
            for path in due:
                self._declare_lost(path, path.detect_loss(now), now)
            return
        self.pto_count += 1
        self.reschedule_data(now=now)

    def reschedule_data(self, *, now: float, speed_up_handshake: bool = False) -> None:
        """Send frames of unanswered packets once more (RFC 9002 section 6.2.4)."""
        crypto = False
        for path in self.paths:
            waiting = [n for n, entry in path.sent.items() if entry.packet.is_crypto_packet]
            for number in waiting:
                entry = path.take(number)
                if entry is not None:
                    crypto = True
                    self._expire(path, entry)
        if not crypto and not speed_up_handshake and self.handshake_confirmed:
            self.requeue_frames(self.active, limit=1)
        self._send_probe()

    # what migration needs

    def requeue_frames(self, path: PathMetrics, *, limit: int | None = None) -> None:
        """Schedule the frames that wait for an answer on `path` once more, oldest packet first.

        The packets themselves stay tracked: a late acknowledgement still counts.
        """
        for entry in list(path.sent.values()):
            handlers = entry.packet.delivery_handlers
            if not handlers or not entry.packet.is_ack_eliciting:
                continue
            entry.packet.delivery_handlers = []
            for handler, arguments in handlers:
                handler(QuicDeliveryState.LOST, *arguments)
            if limit is not None:
                limit -= 1
                if limit <= 0:
                    return

    def forget(self, path: PathMetrics) -> None:
        """Drop a path for good; what was in flight on it is lost without blame to any window."""
        self.requeue_frames(path)
        path.sent.clear()
        if path in self.paths:
            self.paths.remove(path)

    def _declare_lost(self, path: PathMetrics, lost: list[_Sent], now: float) -> None:
        if not lost:
            return
        path.note_lost([entry.packet for entry in lost])
        in_flight = [entry.packet for entry in lost if entry.packet.in_flight]
        for entry in lost:
            self._log_lost(entry.packet)
            for handler, arguments in entry.packet.delivery_handlers:
                handler(QuicDeliveryState.LOST, *arguments)
        if in_flight:
            path.cc.on_packets_lost(now=now, packets=in_flight)
            if path.has_rtt:
                path.pacer.update_rate(path.cc.congestion_window, path.rtt_smoothed)
        if not path.outstanding:
            path.waiting_since = None

    def _expire(self, path: PathMetrics, entry: _Sent) -> None:
        if entry.packet.in_flight:
            path.cc.on_packets_expired(packets=[entry.packet])
        for handler, arguments in entry.packet.delivery_handlers:
            handler(QuicDeliveryState.LOST, *arguments)

    def _log_lost(self, packet: QuicSentPacket) -> None:
        if self._quic_logger is not None:
            self._quic_logger.log_event(
                category="recovery",
                event="packet_lost",
                data={
                    "type": self._quic_logger.packet_type(packet.packet_type),
                    "packet_number": packet.packet_number,
                },
            )
