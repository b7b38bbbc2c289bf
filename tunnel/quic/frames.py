"""The little of RFC 9000 section 19 that is read beside aioquic: does a packet mean to move?"""

from aioquic.buffer import Buffer, BufferReadError
from aioquic.quic.packet import QuicFrameType, pull_quic_header

_PATH_FRAMES = (QuicFrameType.PATH_CHALLENGE, QuicFrameType.PATH_RESPONSE)


KIND_COPY = 1
"""Of a datagram's payload: a copy of one that left before (docs/protocol.md)."""


def moves_nobody(plain: bytes) -> bool:
    """Whether the only non-probing frames of this packet are copies of earlier datagrams."""
    buf = Buffer(data=plain)
    try:
        while not buf.eof():
            frame_type = buf.pull_uint_var()
            if frame_type == QuicFrameType.PADDING:
                continue
            if frame_type in _PATH_FRAMES:
                buf.pull_bytes(8)
            elif frame_type in (QuicFrameType.DATAGRAM, QuicFrameType.DATAGRAM_WITH_LENGTH):
                length = (
                    buf.pull_uint_var()
                    if frame_type == QuicFrameType.DATAGRAM_WITH_LENGTH
                    else buf.capacity - buf.tell()
                )
                if buf.pull_bytes(length)[:1] != bytes((KIND_COPY,)):
                    return False
            else:
                return False
    except BufferReadError:
        return False
    return True


def one_rtt_packet(datagram: bytes, cid_length: int) -> bytes | None:
    """The short-header packet of a datagram, which is its last one (RFC 9000 section 12.2)."""
    buf = Buffer(data=datagram)
    while not buf.eof():
        start = buf.tell()
        if not datagram[start] & 0x80:
            return datagram[start:]
        try:
            header = pull_quic_header(buf, host_cid_length=cid_length)
        except ValueError:
            return None
        if start + header.packet_length > len(datagram) or header.packet_length <= 0:
            return None
        buf.seek(start + header.packet_length)
    return None
