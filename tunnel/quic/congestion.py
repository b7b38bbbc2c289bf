"""Congestion control and pacing of one path, for as long as aioquic carries the data.

NewReno (RFC 9002 section 7) with the two repairs that a tunnel needs: the window grows only when
it is the limit (section 7.8), and the pacer hands out bursts no smaller than a timer tick.
"""

from collections.abc import Iterable

from aioquic.quic.congestion.base import QuicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

INITIAL_WINDOW_PACKETS = 32
"""Above RFC 9002's 10: a path that takes over a running flow must not start with a stall."""
MINIMUM_WINDOW_PACKETS = 4
MAX_WINDOW_BYTES = 2 << 20
"""Bounds the standing queue of a loss-based controller on fast links; measured: without a bound
the throughput between two namespaces swings by a factor of five."""
LOSS_REDUCTION = 0.7
"""As CUBIC (RFC 9438 section 4.6); Reno's half starves a tunnel under random loss."""

PACING_GAIN = 1.25
"""RFC 9002 section 7.7: a little faster than the window per round trip."""
PACING_BURST_SECONDS = 0.002
"""Event-loop timers are about a millisecond coarse; a bucket smaller than that loses rate."""
PACING_BURST_PACKETS = 16
ROUNDING = 0.01  # bytes by which sums of floats may fall short


class WindowController(QuicCongestionControl):
    """A byte window of one path. All arguments as aioquic's controllers take them."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.max_datagram_size = max_datagram_size
        self.congestion_window = INITIAL_WINDOW_PACKETS * max_datagram_size
        self._recovery_started = -1.0
        self._stash = 0
        self._before_loss: tuple[int, int | None] | None = None

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        self.bytes_in_flight += packet.sent_bytes

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        window_limited = 2 * self.bytes_in_flight >= self.congestion_window
        self.bytes_in_flight -= packet.sent_bytes
        if not window_limited or (packet.sent_time or 0.0) <= self._recovery_started:
            return
        if self.ssthresh is None or self.congestion_window < self.ssthresh:
            self.congestion_window += packet.sent_bytes
        else:
            self._stash += packet.sent_bytes
            if self._stash >= self.congestion_window:
                self._stash -= self.congestion_window
                self.congestion_window += self.max_datagram_size
        self.congestion_window = min(self.congestion_window, MAX_WINDOW_BYTES)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        newest = -1.0
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            newest = max(newest, packet.sent_time or 0.0)
        if newest > self._recovery_started:
            self._recovery_started = now
            self._before_loss = (self.congestion_window, self.ssthresh)
            self.congestion_window = max(
                int(self.congestion_window * LOSS_REDUCTION),
                MINIMUM_WINDOW_PACKETS * self.max_datagram_size,
            )
            self.ssthresh = self.congestion_window

    def undo_loss(self) -> None:
        """The last loss was only reordering: take the reduction back (RFC 4015)."""
        if self._before_loss is not None:
            window, self.ssthresh = self._before_loss
            self.congestion_window = max(self.congestion_window, window)
            self._before_loss = None

    def on_persistent_congestion(self) -> None:
        # An outage is a path's death, not congestion: liveness and migration deal with it, and a
        # window of two packets would only slow the flow after the path is back.
        pass

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        pass


class Pacer:
    """A token bucket in bytes, with the interface of aioquic's pacer."""

    def __init__(self, *, max_datagram_size: int) -> None:
        self._packet = max_datagram_size
        self._rate = 0.0  # bytes per second; 0: not known yet, no pacing
        self._tokens = 0.0
        self._burst = 0.0
        self._updated = 0.0
        self._unsized = 0  # packets taken for full ones until they are charged

    def next_send_time(self, now: float) -> float | None:
        """When the next packet may leave, or None for at once."""
        if not self._rate:
            return None
        self._refill(now)
        missing = self._packet - self._tokens
        if missing <= ROUNDING:
            return None
        at = now + missing / self._rate
        return at if at > now else None  # less than the grain of a large `now`

    def update_after_send(self, now: float) -> None:
        """A packet is being written: aioquic does not say how large it will be."""
        if self._rate:
            self._tokens -= self._packet
            self._unsized += 1

    def charge(self, sent_bytes: int) -> None:
        """A packet of this size has left."""
        if not self._rate:
            return
        if self._unsized:
            self._unsized -= 1
            self._tokens += self._packet
        self._tokens -= sent_bytes

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        first = not self._rate
        self._rate = PACING_GAIN * congestion_window / max(smoothed_rtt, 1e-4)
        self._burst = max(PACING_BURST_PACKETS * self._packet, self._rate * PACING_BURST_SECONDS)
        self._tokens = self._burst if first else min(self._tokens, self._burst)

    def _refill(self, now: float) -> None:
        if now > self._updated:
            self._tokens = min(self._tokens + (now - self._updated) * self._rate, self._burst)
            self._updated = now
