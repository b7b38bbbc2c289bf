"""The data path: IP packets of one peer on one side, DATAGRAM payloads on the other.

It stays when connections come and go. The connection pulls payloads cut to the path's size and
hands over what arrives; the numbers of packets name datagrams, so that a copy of one that was
delivered is dropped. This is the seam that a native engine will take over.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tunnel.datapath.kinds import (
    KIND_COPY,
    KIND_PACKET,
    KIND_PART,
    PACKET_HEADER,
    MalformedDatagram,
    decode_part,
    decode_varint,
    split,
)
from tunnel.datapath.queue import LOW_WATER_BYTES, PacketQueue
from tunnel.datapath.reassembly import Reassembler

DELIVERED_WINDOW = 8192
"""Packet numbers remembered as delivered; as the connection's window of duplicates."""
_IDENTIFIERS = 1 << 14  # of split packets: two bytes as a varint


@dataclass(slots=True)
class EngineCounters:
    """Packets, but for the two that say bytes."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    split: int = 0
    copies_received: int = 0
    copies_dropped: int = 0
    refused: int = 0  # source or form not allowed
    malformed: int = 0
    unknown_kind: int = 0


class Engine:
    """One peer's data path. `permits` says whether a received IP packet may come from the peer."""

    def __init__(self, permits: Callable[[bytes], bool]) -> None:
        self._permits = permits
        self.queue = PacketQueue()
        self.counters = EngineCounters()
        self._reassembler = Reassembler()
        self._prepared: list[bytes] = []  # payloads of the packet at the head, next one first
        self._head: bytes | None = None  # that packet, while none of its parts has left
        self._identifier = 0
        self._delivered: set[int] = set()
        self._delivered_before: set[int] = set()
        self._floor = 0
        self._received: list[bytes] = []
        self._paused = False

    # from and to the TUN

    def push(self, packet: bytes, now: float) -> None:
        """Queue an IP packet for the peer."""
        self.queue.push(packet, now)

    @property
    def wants_packets(self) -> bool:
        """False while the queue is full enough to hold the senders back; True while paused."""
        return self._paused or self.queue.bytes < LOW_WATER_BYTES

    def take_received(self) -> list[bytes]:
        """IP packets for the TUN, in order of arrival."""
        received, self._received = self._received, []
        return received

    # lifecycle

    def pause(self) -> None:
        """There is no path: send nothing, go on queueing."""
        self._paused = self.queue.holding = True

    def resume(self, now: float) -> None:
        """A path is back: the newest packets of each flow go first."""
        if self._paused:
            self._paused = self.queue.holding = False
            self.queue.recover(now)

    @property
    def paused(self) -> bool:
        return self._paused

    def new_connection(self) -> None:
        """Packet numbers start anew: what they named is forgotten, what waits is kept."""
        if self._head is None:
            self._prepared = []  # parts of a packet whose first ones left on the old connection
        self._delivered = set()
        self._delivered_before = set()
        self._floor = 0
        self._reassembler.clear()

    # Datapath, as the connection calls it

    @property
    def has_pending(self) -> bool:
        return not self._paused and (bool(self._prepared) or bool(self.queue))

    def next_datagram(self, room: int, now: float) -> bytes | None:
        if not self._prepared:
            self._head = self.queue.pop(now)
            if self._head is None:
                return None
            self._prepared = [PACKET_HEADER + self._head]
        payload = self._prepared[0]
        if len(payload) <= room:
            return payload
        if self._head is None or payload[0] == KIND_PART:
            return None  # parts fit every valid path: there is no room at all just now
        self._identifier = (self._identifier + 1) % _IDENTIFIERS
        self._prepared = split(self._identifier, self._head)
        self.counters.split += 1
        return self._prepared[0] if len(self._prepared[0]) <= room else None

    def sent(self, packet_number: int, now: float) -> None:
        payload = self._prepared.pop(0)
        self._head = None
        if not self._prepared:
            self.counters.sent += 1
        self.counters.sent_bytes += len(payload)

    def received(self, packet_number: int, payload: bytes, now: float) -> None:
        try:
            root = packet_number
            if payload[:1] == bytes((KIND_COPY,)):
                self.counters.copies_received += 1
                root, start = decode_varint(payload, 1)
                payload = payload[start:]
            if not self._first_time(root):
                self.counters.copies_dropped += 1
            else:
                self._deliver(payload, now)
        except MalformedDatagram:
            self.counters.malformed += 1

    def _first_time(self, root: int) -> bool:
        if root < self._floor or root in self._delivered or root in self._delivered_before:
            return False
        self._delivered.add(root)
        if len(self._delivered) >= DELIVERED_WINDOW:
            # What is dropped now is forgotten: nothing that old is delivered any more.
            self._floor = max(self._floor, 1 + max(self._delivered_before, default=-1))
            self._delivered_before, self._delivered = self._delivered, set()
        return True

    def _deliver(self, payload: bytes, now: float) -> None:
        if not payload:
            raise MalformedDatagram("an empty datagram")
        packet: bytes | None
        if payload[0] == KIND_PACKET:
            packet = payload[1:]
        elif payload[0] == KIND_PART:
            packet = self._reassembler.add(decode_part(payload), now)
            if packet is None:
                return
        else:
            self.counters.unknown_kind += 1
            return
        if not self._permits(packet):
            self.counters.refused += 1
            return
        self.counters.received += 1
        self.counters.received_bytes += len(packet)
        self._received.append(packet)
