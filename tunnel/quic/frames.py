"""The little of RFC 9000 section 19 that is read beside aioquic: does a packet mean to move?"""

from aioquic.buffer import Buffer, BufferReadError
from aioquic.quic.packet import QuicFrameType

from tunnel.datapath.kinds import KIND_COPY, encode_varint

_PATH_FRAMES = (QuicFrameType.PATH_CHALLENGE, QuicFrameType.PATH_RESPONSE)


def copy_header(root: int) -> bytes:
    """What stands before the payload of a copy: the kind, and the number that names it."""
    return bytes((KIND_COPY,)) + encode_varint(root)


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
