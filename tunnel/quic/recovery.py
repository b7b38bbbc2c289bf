"""What aioquic's connection calls its loss recovery, once the native engine does the work.

During the handshake aioquic's own recovery serves. From then on packets of the 1-RTT space are
counted, acknowledged and declared lost by the engine (RFC 9002, with everything of a path kept with
the path); here only stays what it cannot know: which frames a packet of ours carried, and so what
has to be sent again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace

from tunnel.datapath.engine import Connection, Path

MAX_PTO_INTERVAL = 0.9
"""Seconds. The tunnel holds for hours without a path, and an SSH session must type on within one
second of the path's return, so the back-off of RFC 9002 section 6.2.1 ends here."""
UNBOUNDED = 1 << 40  # bytes; the builder of each flush is given the true limit


class HandshakeRecovery(QuicPacketRecovery):
    """aioquic's own, whose back-off ends at the same ceiling: under loss a handshake takes long
    enough."""

    def get_loss_detection_time(self, *, amplification_limited: bool) -> float | None:
        at = super().get_loss_detection_time(amplification_limited=amplification_limited)
        if at is None or self._get_loss_space() is not None:
            return at
        ceiling = max(MAX_PTO_INTERVAL, self.get_probe_timeout())
        return min(at, self._time_of_last_sent_ack_eliciting_packet + ceiling)


@dataclass(slots=True)
class _Sent:
    packet: QuicSentPacket
    path: Path


class _NoPacer:
    """Few packets are Python's, and the engine's pacer pays for them."""

    def next_send_time(self, now: float) -> float | None:
        return None

    def update_after_send(self, now: float) -> None:
        pass


class EngineRecovery:
    """The interface that aioquic's connection expects of its recovery object."""

    def __init__(
        self, engine: Connection, *, max_ack_delay: float, send_probe: Callable[[], None]
    ) -> None:
        self.handshake_confirmed = True
        self.peer_completed_address_validation = True
        self.max_ack_delay = max_ack_delay
        self.spaces: list[QuicPacketSpace] = []  # none of aioquic's has a timer any more
        self.sending = engine.active
        """The path that packets being built right now will leave on."""
        self.probing = False
        """Whether they are probes of the path MTU: their loss says nothing about congestion
        (RFC 8899 section 3)."""
        self.congestion_window = UNBOUNDED
        self.bytes_in_flight = 0
        self._pacer = _NoPacer()
        self._engine = engine
        self._send_probe = send_probe
        self._sent: dict[int, _Sent] = {}

    # the interface of aioquic's recovery

    def get_probe_timeout(self, *, include_max_ack_delay: bool = True) -> float:
        return self._engine.active.probe_timeout(self.max_ack_delay)

    def get_loss_detection_time(self, *, amplification_limited: bool) -> float | None:
        return None

    def on_loss_detection_timeout(self, *, now: float) -> None:
        """A timer that was set during the handshake; the engine has its own."""

    def discard_space(self, space: QuicPacketSpace) -> None:
        pass

    def on_packet_sent(self, *, packet: QuicSentPacket, space: QuicPacketSpace) -> None:
        packet.in_flight = packet.in_flight and not self.probing
        self._engine.sent(
            self.sending,
            packet.packet_number,
            packet.sent_bytes,
            packet.is_ack_eliciting,
            packet.in_flight,
            packet.sent_time or 0.0,
        )
        self._sent[packet.packet_number] = _Sent(packet, self.sending)

    # what the engine reports

    def settled(self, numbers: Iterable[int], state: QuicDeliveryState) -> None:
        """These packets were acknowledged, or lost."""
        for number in numbers:
            entry = self._sent.pop(number, None)
            if entry is not None:
                for handler, arguments in entry.packet.delivery_handlers:
                    handler(state, *arguments)

    def timed_out(self) -> None:
        """Send frames of an unanswered packet once more (RFC 9002 section 6.2.4)."""
        self.requeue_frames(self._engine.active, limit=1)
        self._send_probe()

    # what migration needs

    def requeue_frames(self, path: Path, *, limit: int | None = None) -> None:
        """Schedule the frames that wait for an answer on `path` once more, oldest packet first.

        The packets themselves stay tracked: a late acknowledgement still counts.
        """
        for entry in list(self._sent.values()):
            handlers = entry.packet.delivery_handlers
            if entry.path is not path or not handlers or not entry.packet.is_ack_eliciting:
                continue
            entry.packet.delivery_handlers = []
            for handler, arguments in handlers:
                handler(QuicDeliveryState.LOST, *arguments)
            if limit is not None:
                limit -= 1
                if limit <= 0:
                    return
