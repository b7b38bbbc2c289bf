"""The queue between the TUN and the path: bounded, drops its oldest, and knows flows.

While there is a path it is short, because the shell stops reading the TUN when it fills and the
kernel then holds back the senders. While there is none it goes on taking packets and drops the
oldest, and when a path is back the newest packets of every flow go first: an inner TCP deep in
its back-off revives with them at once, and nothing that is seconds old is in their way.
"""

from collections import deque

MAX_BYTES = 1 << 20
"""About 700 full packets: 40 ms at 200 Mbit/s."""
MAX_PACKETS = 2048
LOW_WATER_BYTES = 192 * 1024
"""Above this the TUN is not read while there is a path. Enough for one batch and a burst."""
NEWEST_PER_FLOW = 2
"""Packets of each flow kept whatever their age while there is no path."""
STALE = 1.0
"""Seconds in the queue after which a packet is dropped while there is a path: whoever sent it has
sent it again."""
FRESH = 0.2
"""Seconds; packets younger than this survive an outage even beyond the newest of their flow."""


def flow_of(packet: bytes) -> bytes:
    """What tells one flow from another: protocol, addresses and, where there are any, ports."""
    if packet[0] >> 4 == 4:
        header = (packet[0] & 0x0F) * 4
        fragment = (packet[6] << 8 | packet[7]) & 0x3FFF  # RFC 791: more fragments, or an offset
        ports = b"" if fragment else packet[header : header + 4]
        return packet[9:10] + packet[12:20] + ports
    return packet[6:7] + packet[8:40] + packet[40:44]


class PacketQueue:
    """IP packets waiting to be sent, oldest first. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.holding = False
        """There is no path: overflow spares the newest packets of each flow."""
        self._packets: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._packets)

    def push(self, packet: bytes, now: float) -> None:
        self._packets.append((now, packet))
        self.bytes += len(packet)
        while self._overflows and self.holding and self._shed():
            pass
        while self._overflows:
            self._drop_oldest()

    def pop(self, now: float) -> bytes | None:
        """The oldest packet that is still worth sending."""
        while self._packets and self._packets[0][0] < now - STALE:
            self._drop_oldest()
        if not self._packets:
            return None
        _, packet = self._packets.popleft()
        self.bytes -= len(packet)
        return packet

    def recover(self, now: float) -> None:
        """A path is back: newest packets of each flow first, then what is fresh; drop the rest."""
        newest, others = self._split()
        fresh = [entry for entry in others if now - entry[0] <= FRESH]
        # They are as good as new: their age is the path's fault.
        self._replace([(now, packet) for _, packet in newest] + fresh)

    @property
    def _overflows(self) -> bool:
        return self.bytes > MAX_BYTES or len(self._packets) > MAX_PACKETS

    def _shed(self) -> bool:
        """Halve what is not among the newest of its flow, oldest first; False when none is left."""
        newest, others = self._split()
        if not others:
            return False
        spared = sorted(newest + others[(len(others) + 1) // 2 :], key=lambda entry: entry[0])
        self._replace(spared)
        return True

    def _split(self) -> tuple[list[tuple[float, bytes]], list[tuple[float, bytes]]]:
        """The newest packets of each flow, and the others, each oldest first."""
        seen: dict[bytes, int] = {}
        newest: list[tuple[float, bytes]] = []
        others: list[tuple[float, bytes]] = []
        for entry in reversed(self._packets):
            flow = flow_of(entry[1])
            seen[flow] = seen.get(flow, 0) + 1
            (newest if seen[flow] <= NEWEST_PER_FLOW else others).append(entry)
        return newest[::-1], others[::-1]

    def _replace(self, entries: list[tuple[float, bytes]]) -> None:
        self.dropped += len(self._packets) - len(entries)
        self._packets = deque(entries)
        self.bytes = sum(len(packet) for _, packet in entries)

    def _drop_oldest(self) -> None:
        _, packet = self._packets.popleft()
        self.bytes -= len(packet)
        self.dropped += 1
