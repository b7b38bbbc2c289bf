"""Does a packet mean to move? Read from its frames."""

from __future__ import annotations

import pytest
from aioquic.buffer import Buffer, BufferReadError
from aioquic.quic.packet import QuicFrameType
from hypothesis import given
from hypothesis import strategies as st

from tunnel.datapath.kinds import decode_varint
from tunnel.quic.frames import copy_header, moves_nobody

CHALLENGE = bytes((QuicFrameType.PATH_CHALLENGE,)) + bytes(8)
RESPONSE = bytes((QuicFrameType.PATH_RESPONSE,)) + bytes(8)
PADDING = bytes(5)
PING = bytes((QuicFrameType.PING,))
ACK = bytes((QuicFrameType.ACK, 5, 0, 0, 0))


def datagram(payload: bytes, *, with_length: bool = True) -> bytes:
    buf = Buffer(capacity=2000)
    if with_length:
        buf.push_uint_var(QuicFrameType.DATAGRAM_WITH_LENGTH)
        buf.push_uint_var(len(payload))
    else:
        buf.push_uint_var(QuicFrameType.DATAGRAM)
    buf.push_bytes(payload)
    return buf.data


COPY = datagram(copy_header(70000) + b"\0E")
LAST_COPY = datagram(copy_header(70000) + b"\0E", with_length=False)


@given(st.integers(0, 2**62 - 1))
def test_the_head_of_a_copy(root: int) -> None:
    head = copy_header(root)
    assert head[0] == 1
    assert decode_varint(head, 1) == (root, len(head))


@pytest.mark.parametrize(
    "plain",
    [
        COPY,
        LAST_COPY,
        COPY + COPY,
        CHALLENGE + COPY,
        COPY + RESPONSE + PADDING,
        PADDING + COPY + LAST_COPY,
        CHALLENGE + RESPONSE + PADDING,
    ],
)
def test_copies_and_probing_frames_move_nobody(plain: bytes) -> None:
    assert moves_nobody(plain)


@pytest.mark.parametrize(
    "plain",
    [
        PING,
        COPY + PING,
        PING + COPY,
        ACK + COPY,
        COPY + datagram(b"\0E"),
        datagram(b"\0E") + COPY,
        datagram(b"\x02E"),
        datagram(b""),
        datagram(b"", with_length=False),
        COPY + datagram(b"\0E", with_length=False),
        CHALLENGE + PING,
        bytes((QuicFrameType.STREAM_BASE, 0)) + b"x",
    ],
)
def test_everything_else_moves(plain: bytes) -> None:
    assert not moves_nobody(plain)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("plain", [COPY, CHALLENGE + COPY, CHALLENGE])
def test_a_cut_packet_is_never_taken_for_a_copy(plain: bytes, cut: int) -> None:
    assert not moves_nobody(plain[:-cut])


@given(st.binary(max_size=60))
def test_any_bytes_have_an_answer(plain: bytes) -> None:
    assert moves_nobody(plain) in (True, False)


@given(st.binary(max_size=40))
def test_hidden_frames_are_found(tail: bytes) -> None:
    """Nothing behind a PING makes the packet a copy."""
    assert not moves_nobody(COPY + PING + tail)


def test_buffer_errors_are_what_is_caught() -> None:
    with pytest.raises(BufferReadError):
        Buffer(data=b"\x40").pull_uint_var()
    assert not moves_nobody(b"\x40")
