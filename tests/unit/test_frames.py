"""Does a packet mean to move? Read from its frames."""

from __future__ import annotations

import pytest
from aioquic.buffer import Buffer, BufferReadError
from aioquic.quic.packet import QuicFrameType
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.quic_pair import copy_header
from tunnel.quic.frames import moves_nobody, one_rtt_packet

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


# the short-header packet of a datagram

SHORT = b"\x40" + bytes(30)


def long_packet(payload: bytes, kind: int = 2) -> bytes:
    """A Handshake packet as far as its header goes (RFC 9000 section 17.2)."""
    buf = Buffer(capacity=2000)
    buf.push_uint8(0xC0 | kind << 4)
    buf.push_uint32(1)
    buf.push_uint8(8)
    buf.push_bytes(bytes(8))
    buf.push_uint8(8)
    buf.push_bytes(bytes(8))
    buf.push_uint_var(len(payload))
    buf.push_bytes(payload)
    return buf.data


@pytest.mark.parametrize("before", [b"", long_packet(bytes(40)), 3 * long_packet(bytes(40))])
def test_the_short_packet_is_the_last_of_a_datagram(before: bytes) -> None:
    assert one_rtt_packet(before + SHORT, 8) == SHORT


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        long_packet(bytes(40)),
        long_packet(bytes(40))[:-1],
        b"\xc0",
    ],
)
def test_a_datagram_without_a_short_packet(datagram: bytes) -> None:
    assert one_rtt_packet(datagram, 8) is None


@given(st.binary(max_size=100), st.integers(0, 60))
def test_no_bytes_before_it_break_anything(data: bytes, cut: int) -> None:
    for datagram in (data, long_packet(bytes(40))[:cut] + data):
        found = one_rtt_packet(datagram, 8)
        assert found is None or (datagram.endswith(found) and not found[0] & 0x80)
