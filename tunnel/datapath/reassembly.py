"""Putting the parts of an IP packet together again, within bounds a hostile peer cannot move."""

from dataclasses import dataclass, field

from tunnel.datapath.kinds import Part

MAX_PACKETS = 64  # unfinished packets at a time
MAX_BYTES = 256 * 1024
MAX_AGE = 2.0
"""Seconds; longer than any reordering across a switch, shorter than an identifier's reuse."""


@dataclass(slots=True)
class _Unfinished:
    since: float
    parts: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    total: int | None = None


class Reassembler:
    """Takes parts in any order. An overlap or a contradiction discards the whole packet."""

    def __init__(self) -> None:
        self._packets: dict[int, _Unfinished] = {}
        self._bytes = 0
        self.discarded = 0

    def add(self, part: Part, now: float) -> bytes | None:
        """Take a part in; the whole packet when it is the last that was missing."""
        self._expire(now)
        packet = self._packets.get(part.identifier)
        if packet is None:
            packet = self._packets[part.identifier] = _Unfinished(now)
        end = part.offset + len(part.data)
        if self._overlaps(packet, part.offset, end) or (part.last and packet.total is not None):
            self._discard(part.identifier)
            return None
        if part.last:
            packet.total = end
        packet.parts[part.offset] = part.data
        packet.size += len(part.data)
        self._bytes += len(part.data)
        if packet.total is not None and max(o + len(d) for o, d in packet.parts.items()) > (
            packet.total
        ):
            self._discard(part.identifier)
            return None
        if packet.size == packet.total:
            del self._packets[part.identifier]
            self._bytes -= packet.size
            return b"".join(packet.parts[offset] for offset in sorted(packet.parts))
        while len(self._packets) > MAX_PACKETS or self._bytes > MAX_BYTES:
            self._discard(next(iter(self._packets)))
        return None

    def clear(self) -> None:
        self._packets.clear()
        self._bytes = 0

    @staticmethod
    def _overlaps(packet: _Unfinished, start: int, end: int) -> bool:
        return any(start < o + len(d) and o < end for o, d in packet.parts.items())

    def _expire(self, now: float) -> None:
        while self._packets:
            identifier = next(iter(self._packets))
            if now - self._packets[identifier].since <= MAX_AGE:
                return
            self._discard(identifier)

    def _discard(self, identifier: int) -> None:
        self._bytes -= self._packets.pop(identifier).size
        self.discarded += 1
