"""What a DATAGRAM payload is: a kind, and what follows (docs/protocol.md, Datagram payload).

The kinds are our own registry, in the manner of the context IDs of RFC 9298 section 4; kind 0 is
RFC 9484's context 0. All integers are QUIC variable-length ones (RFC 9000 section 16).
"""

from dataclasses import dataclass

KIND_PACKET = 0  # one IP packet
KIND_COPY = 1  # varint root, then the payload that first left in packet number root
KIND_PART = 2  # varint id, varint offset, last flag (1 byte), bytes of an IP packet

MAX_PART_PAYLOAD = 1160
"""Bytes of a whole kind 2 payload: with a copy's tag it still fits into any valid QUIC path."""
MAX_PACKET = 65535  # an IP packet is never larger

PACKET_HEADER = bytes((KIND_PACKET,))


class MalformedDatagram(ValueError):
    """A payload that breaks the rules above; it is counted and dropped."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an IP packet: `offset` in bytes, `last` when nothing follows."""

    identifier: int
    offset: int
    last: bool
    data: bytes


def encode_varint(value: int) -> bytes:
    if value < 1 << 6:
        return value.to_bytes(1)
    if value < 1 << 14:
        return (value | 0x4000).to_bytes(2)
    if value < 1 << 30:
        return (value | 0x80000000).to_bytes(4)
    return (value | 0xC000000000000000).to_bytes(8)


def decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """The value at `at`, and where the next field begins."""
    if at >= len(data):
        raise MalformedDatagram("a field is missing")
    size = 1 << (data[at] >> 6)
    if at + size > len(data):
        raise MalformedDatagram("a field is cut short")
    mask = (1 << (8 * size - 2)) - 1
    return int.from_bytes(data[at : at + size]) & mask, at + size


def split(identifier: int, packet: bytes) -> list[bytes]:
    """Cut an IP packet that no datagram of the path carries into kind 2 payloads."""
    head = bytes((KIND_PART,)) + encode_varint(identifier)
    step = MAX_PART_PAYLOAD - len(head) - 4 - 1
    return [
        head
        + encode_varint(offset)
        + bytes((offset + step >= len(packet),))
        + packet[offset : offset + step]
        for offset in range(0, len(packet), step)
    ]


def decode_part(payload: bytes) -> Part:
    """Read a kind 2 payload (its kind included). Raises MalformedDatagram."""
    identifier, at = decode_varint(payload, 1)
    offset, at = decode_varint(payload, at)
    if at >= len(payload):
        raise MalformedDatagram("a part without a last flag")
    flag, data = payload[at], payload[at + 1 :]
    if flag > 1 or not data or offset + len(data) > MAX_PACKET:
        raise MalformedDatagram("a part that cannot belong to a packet")
    return Part(identifier, offset, bool(flag), data)
