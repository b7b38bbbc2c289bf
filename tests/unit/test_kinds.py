"""DATAGRAM payloads: kinds, varints, parts."""

from __future__ import annotations

import pytest
from aioquic.buffer import Buffer
from hypothesis import given
from hypothesis import strategies as st

from tunnel.datapath.kinds import (
    KIND_PART,
    MAX_PACKET,
    MAX_PART_PAYLOAD,
    MalformedDatagram,
    decode_part,
    decode_varint,
    encode_varint,
    split,
)

varints = st.integers(0, 2**62 - 1) | st.sampled_from(
    [0, 63, 64, 16383, 16384, 2**30 - 1, 2**30, 2**62 - 1]
)


@given(varints)
def test_a_varint_is_what_quic_says(value: int) -> None:
    buf = Buffer(capacity=8)
    buf.push_uint_var(value)
    assert encode_varint(value) == buf.data


@given(varints, st.binary(max_size=4), st.binary(max_size=4))
def test_a_varint_comes_back_from_anywhere(value: int, before: bytes, after: bytes) -> None:
    encoded = encode_varint(value)
    assert decode_varint(before + encoded + after, len(before)) == (
        value,
        len(before) + len(encoded),
    )


@given(varints)
def test_a_varint_cut_short_is_malformed(value: int) -> None:
    encoded = encode_varint(value)
    for length in range(len(encoded)):
        with pytest.raises(MalformedDatagram):
            decode_varint(encoded[:length], 0)


@given(
    st.integers(0, 2**14 - 1),
    st.integers(1, MAX_PACKET) | st.sampled_from([1, 1150, 1151, 1152, 1153, 1154, 1420, 2304]),
)
def test_parts_cover_the_packet_and_fit_every_path(identifier: int, size: int) -> None:
    packet = bytes(i * 7 & 0xFF for i in range(size))
    payloads = split(identifier, packet)
    parts = [decode_part(payload) for payload in payloads]
    assert all(payload[0] == KIND_PART for payload in payloads)
    assert max(map(len, payloads)) <= MAX_PART_PAYLOAD
    assert {part.identifier for part in parts} == {identifier}
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert b"".join(part.data for part in parts) == packet
    offset = 0
    for part in parts:
        assert part.offset == offset and part.data
        offset += len(part.data)


def test_parts_are_no_more_than_needed() -> None:
    assert len(split(1, bytes(1420))) == 2
    assert len(split(1, bytes(1000))) == 1


def part(identifier: int, offset: int, flag: int, data: bytes) -> bytes:
    head = bytes((KIND_PART,)) + encode_varint(identifier) + encode_varint(offset)
    return head + bytes((flag,)) + data


def test_the_largest_part_of_the_largest_packet() -> None:
    assert decode_part(part(3, MAX_PACKET - 2, 1, b"xy")).offset == MAX_PACKET - 2


@pytest.mark.parametrize(
    "payload",
    [
        bytes((KIND_PART,)),
        bytes((KIND_PART, 1)),
        bytes((KIND_PART, 1, 0)),
        part(1, 0, 0, b""),
        part(1, 0, 1, b""),
        part(1, 0, 2, b"x"),
        part(1, 0, 255, b"x"),
        part(1, MAX_PACKET - 1, 1, b"xy"),
        part(1, 2**40, 0, b"x"),
        bytes((KIND_PART, 0xC0)) + bytes(3),
    ],
)
def test_malformed_parts(payload: bytes) -> None:
    with pytest.raises(MalformedDatagram):
        decode_part(payload)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_part_or_malformed(data: bytes) -> None:
    try:
        found = decode_part(bytes((KIND_PART,)) + data)
    except MalformedDatagram:
        return
    assert found.data and found.offset + len(found.data) <= MAX_PACKET
