"""Reassembly: any order, no overlap, bounded in number, bytes and age."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.datapath.kinds import Part, decode_part, split
from tunnel.datapath.reassembly import MAX_AGE, MAX_BYTES, MAX_PACKETS, Reassembler


def parts_of(packet: bytes, identifier: int = 1) -> list[Part]:
    return [decode_part(payload) for payload in split(identifier, packet)]


@given(st.binary(min_size=1, max_size=6000), st.randoms(use_true_random=False))
def test_any_order(packet: bytes, rng: random.Random) -> None:
    parts = parts_of(packet)
    rng.shuffle(parts)
    reassembler = Reassembler()
    whole = [reassembler.add(part, 0.0) for part in parts]
    assert whole == [None] * (len(parts) - 1) + [packet]
    assert reassembler.discarded == 0
    assert not reassembler._packets and reassembler._bytes == 0


@given(st.lists(st.binary(min_size=1200, max_size=3000), min_size=2, max_size=5), st.randoms())
def test_packets_do_not_mix(packets: list[bytes], rng: random.Random) -> None:
    parts = [part for i, packet in enumerate(packets) for part in parts_of(packet, i)]
    rng.shuffle(parts)
    reassembler = Reassembler()
    whole = [found for part in parts if (found := reassembler.add(part, 0.0)) is not None]
    assert sorted(whole) == sorted(packets)


@pytest.mark.parametrize(
    "second",
    [
        Part(1, 0, False, b"abcd"),  # the same again
        Part(1, 3, False, b"xx"),  # its last byte
        Part(1, 1, True, b"x"),  # inside
        Part(1, 0, True, b"abcdef"),  # around
    ],
)
def test_an_overlap_discards_the_packet(second: Part) -> None:
    reassembler = Reassembler()
    assert reassembler.add(Part(1, 0, False, b"abcd"), 0.0) is None
    assert reassembler.add(second, 0.0) is None
    assert reassembler.discarded == 1
    assert reassembler.add(Part(1, 4, True, b"ef"), 0.0) is None


def test_neighbours_do_not_overlap() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 4, True, b"ef"), 0.0)
    assert reassembler.add(Part(1, 0, False, b"abcd"), 0.0) == b"abcdef"


@pytest.mark.parametrize(
    "parts",
    [
        [Part(1, 1, True, b"ab"), Part(1, 5, True, b"c")],  # two ends (beyond)
        [Part(1, 8, True, b"ab"), Part(1, 2, True, b"c")],  # two ends (before)
        [Part(1, 2, True, b"ab"), Part(1, 6, False, b"c")],  # more after the end
        [Part(1, 6, False, b"c"), Part(1, 2, True, b"ab")],  # the end before what is there
    ],
)
def test_a_contradiction_discards_the_packet(parts: list[Part]) -> None:
    reassembler = Reassembler()
    assert [reassembler.add(part, 0.0) for part in parts] == [None, None]
    assert reassembler.discarded == 1
    assert not reassembler._packets and reassembler._bytes == 0


def test_bounded_in_number() -> None:
    reassembler = Reassembler()
    for identifier in range(MAX_PACKETS + 1):
        reassembler.add(Part(identifier, 0, False, b"a"), 0.0)
    assert reassembler.discarded == 1
    assert reassembler.add(Part(0, 1, True, b"b"), 0.0) is None, "the oldest was discarded"
    assert reassembler.add(Part(2, 1, True, b"b"), 0.0) == b"ab"


def test_bounded_in_bytes() -> None:
    reassembler = Reassembler()
    for identifier in range(8):
        for offset in range(0, 60000, 1000):
            reassembler.add(Part(identifier, offset, False, bytes(1000)), 0.0)
            held = sum(packet.size for packet in reassembler._packets.values())
            assert held == reassembler._bytes <= MAX_BYTES
    assert reassembler.discarded == 4


def test_bounded_in_age() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"old"), 10.0)
    reassembler.add(Part(2, 0, False, b"new"), 10.0 + MAX_AGE)
    assert reassembler.add(Part(2, 3, True, b"!"), 10.1 + MAX_AGE) == b"new!"
    assert reassembler.add(Part(1, 3, True, b"!"), 10.1 + MAX_AGE) is None
    assert reassembler.discarded == 1


def test_not_too_old_is_kept() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"in"), 10.0)
    assert reassembler.add(Part(1, 2, True, b" time"), 10.0 + MAX_AGE) == b"in time"


def test_clear() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"ab"), 0.0)
    reassembler.clear()
    assert reassembler.add(Part(1, 2, True, b"c"), 0.0) is None
    assert reassembler._bytes == 1


@given(
    st.lists(
        st.builds(
            Part,
            st.integers(0, 2),
            st.integers(0, 12),
            st.booleans(),
            st.binary(min_size=1, max_size=5),
        ),
        max_size=60,
    )
)
def test_hostile_parts_never_make_a_packet_with_holes(parts: list[Part]) -> None:
    reassembler = Reassembler()
    history: dict[int, list[Part]] = {}
    for part in parts:
        history.setdefault(part.identifier, []).append(part)
        whole = reassembler.add(part, 0.0)
        assert reassembler._bytes == sum(p.size for p in reassembler._packets.values())
        if whole is not None:
            pieces = history[part.identifier]
            for at in range(len(whole)):
                assert any(
                    p.offset <= at < p.offset + len(p.data) and p.data[at - p.offset] == whole[at]
                    for p in pieces
                )
            assert any(p.last and p.offset + len(p.data) == len(whole) for p in pieces)
