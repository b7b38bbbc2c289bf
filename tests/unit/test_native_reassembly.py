"""The engine's reassembly: any order, no overlap, bounded in number, bytes and age."""

from __future__ import annotations

import ctypes
import random
from ctypes import POINTER, c_bool, c_char_p, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.native import library

MAX_PACKETS = 64
MAX_BYTES = 256 * 1024
MAX_AGE = 2_000_000  # microseconds
MAX_PACKET = 65535


class Part(NamedTuple):
    identifier: int
    offset: int
    last: bool
    data: bytes


def load() -> ctypes.CDLL:
    lib = library("reassembly.c")
    add = (c_void_p, c_uint64, c_uint64, c_bool, c_char_p, c_uint32, c_int64, POINTER(c_uint32))
    for name, result, arguments in (
        ("new", c_void_p, ()),
        ("free", None, (c_void_p,)),
        ("clear", None, (c_void_p,)),
        ("add", c_void_p, add),
        ("discarded", c_uint64, (c_void_p,)),
    ):
        function = getattr(lib, f"mt_reassembler_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


LIB = load()


class Reassembler:
    """`struct mt_reassembler`."""

    def __init__(self) -> None:
        self.r = LIB.mt_reassembler_new()
        assert self.r
        self.release = LIB.mt_reassembler_free  # LIB itself may go first at exit

    def __del__(self) -> None:
        self.release(self.r)

    def add(self, part: Part, now: int = 0) -> bytes | None:
        total = c_uint32(99)
        found = LIB.mt_reassembler_add(
            self.r, *part[:3], part.data, len(part.data), now, ctypes.byref(total)
        )
        if found is None:
            assert total.value == 0
            return None
        return ctypes.string_at(found, total.value)

    def clear(self) -> None:
        LIB.mt_reassembler_clear(self.r)

    @property
    def discarded(self) -> int:
        return int(LIB.mt_reassembler_discarded(self.r))


@dataclass
class Unfinished:
    since: int
    parts: dict[int, bytes] = field(default_factory=dict)
    total: int | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.parts.values()))


class Model:
    """The same rules, slowly: parts in a dictionary, every one compared with every other."""

    def __init__(self) -> None:
        self.packets: dict[int, Unfinished] = {}
        self.discarded = 0

    def add(self, part: Part, now: int = 0) -> bytes | None:
        end = part.offset + len(part.data)
        if not part.data or end > MAX_PACKET:
            return None
        while self.packets and now - self.oldest.since > MAX_AGE:
            self.discard(next(iter(self.packets)))
        packet = self.packets.setdefault(part.identifier, Unfinished(now))
        overlap = any(part.offset < o + len(d) and o < end for o, d in packet.parts.items())
        two_ends = part.last and packet.total is not None
        packet.total = end if part.last else packet.total
        furthest = max([end, *(o + len(d) for o, d in packet.parts.items())])
        if overlap or two_ends or (packet.total is not None and furthest > packet.total):
            self.discard(part.identifier)
            return None
        packet.parts[part.offset] = part.data
        if packet.size == packet.total:
            del self.packets[part.identifier]
            return b"".join(packet.parts[offset] for offset in sorted(packet.parts))
        while len(self.packets) > MAX_PACKETS or self.bytes > MAX_BYTES:
            self.discard(next(iter(self.packets)))
        return None

    @property
    def oldest(self) -> Unfinished:
        return next(iter(self.packets.values()))

    @property
    def bytes(self) -> int:
        return sum(packet.size for packet in self.packets.values())

    def discard(self, identifier: int) -> None:
        del self.packets[identifier]
        self.discarded += 1


def cut(packet: bytes, identifier: int = 1, step: int = 1150) -> list[Part]:
    return [
        Part(identifier, at, at + step >= len(packet), packet[at : at + step])
        for at in range(0, len(packet), step)
    ]


@given(
    st.binary(min_size=1, max_size=6000),
    st.integers(1, 3000),
    st.randoms(use_true_random=False),
)
def test_any_order(packet: bytes, step: int, rng: random.Random) -> None:
    parts = cut(packet, step=max(step, len(packet) // 200 + 1))
    rng.shuffle(parts)
    reassembler = Reassembler()
    whole = [reassembler.add(part) for part in parts]
    assert whole == [None] * (len(parts) - 1) + [packet]
    assert reassembler.discarded == 0


@pytest.mark.parametrize("step", [1, 63, 64, 65, 1150, 65534, 65535])
def test_the_largest_packet(step: int) -> None:
    rng = random.Random(step)
    packet = rng.randbytes(MAX_PACKET)
    parts = cut(packet, 2**62 - 1, step)
    rng.shuffle(parts)
    reassembler = Reassembler()
    assert all(reassembler.add(part) is None for part in parts[:-1])
    assert reassembler.add(parts[-1]) == packet
    assert reassembler.discarded == 0


@given(st.lists(st.binary(min_size=1200, max_size=3000), min_size=2, max_size=5), st.randoms())
def test_packets_do_not_mix(packets: list[bytes], rng: random.Random) -> None:
    parts = [part for i, packet in enumerate(packets) for part in cut(packet, i)]
    rng.shuffle(parts)
    reassembler = Reassembler()
    whole = [found for part in parts if (found := reassembler.add(part)) is not None]
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
    assert reassembler.add(Part(1, 0, False, b"abcd")) is None
    assert reassembler.add(second) is None
    assert reassembler.discarded == 1
    assert reassembler.add(Part(1, 4, True, b"ef")) is None


def test_neighbours_do_not_overlap() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 4, True, b"ef"))
    assert reassembler.add(Part(1, 0, False, b"abcd")) == b"abcdef"


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
    assert [reassembler.add(part) for part in parts] == [None, None]
    assert reassembler.discarded == 1
    # Nothing of it is left: the same identifier may begin anew.
    assert reassembler.add(Part(1, 0, True, b"abcdefghijkl")) == b"abcdefghijkl"


@pytest.mark.parametrize(
    "part",
    [
        Part(1, 0, True, b""),
        Part(1, 2, True, b""),
        Part(1, MAX_PACKET, True, b"x"),
        Part(1, 1, True, bytes(MAX_PACKET)),
        Part(1, 0, True, bytes(MAX_PACKET + 1)),
        Part(1, 2**32, True, b"x"),
        Part(1, 2**64 - 1, True, b"x"),
    ],
)
def test_what_cannot_belong_to_a_packet_is_ignored(part: Part) -> None:
    reassembler = Reassembler()
    assert reassembler.add(Part(1, 0, False, b"ab")) is None
    assert reassembler.add(part) is None
    assert reassembler.discarded == 0
    assert reassembler.add(Part(1, 2, True, b"c")) == b"abc"


def test_bounded_in_number() -> None:
    reassembler = Reassembler()
    for identifier in range(MAX_PACKETS + 1):
        reassembler.add(Part(identifier, 0, False, b"a"))
    assert reassembler.discarded == 1
    assert reassembler.add(Part(0, 1, True, b"b")) is None, "the oldest was discarded"
    assert reassembler.add(Part(2, 1, True, b"b")) == b"ab"


def test_bounded_in_bytes() -> None:
    reassembler = Reassembler()
    for identifier in range(8):
        for offset in range(0, 60000, 1000):
            reassembler.add(Part(identifier, offset, False, bytes(1000)))
    assert reassembler.discarded == 4


def test_all_the_bytes_may_be_used() -> None:
    reassembler = Reassembler()
    for identifier in range(4):
        reassembler.add(Part(identifier, 0, False, bytes(MAX_PACKET - 1)))
    reassembler.add(Part(4, 0, False, bytes(MAX_BYTES - 4 * (MAX_PACKET - 1))))
    assert reassembler.discarded == 0
    reassembler.add(Part(5, 0, False, b"x"))
    assert reassembler.discarded == 1
    assert reassembler.add(Part(0, MAX_PACKET - 1, True, b"x")) is None, "the oldest"
    assert reassembler.add(Part(1, MAX_PACKET - 1, True, b"x")) == bytes(MAX_PACKET - 1) + b"x"


def test_bounded_in_age() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"old"), 10)
    reassembler.add(Part(2, 0, False, b"new"), 10 + MAX_AGE)
    assert reassembler.discarded == 0
    assert reassembler.add(Part(2, 3, True, b"!"), 11 + MAX_AGE) == b"new!"
    assert reassembler.add(Part(1, 3, True, b"!"), 11 + MAX_AGE) is None
    assert reassembler.discarded == 1


def test_not_too_old_is_kept() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"in"), 10)
    assert reassembler.add(Part(1, 2, True, b" time"), 10 + MAX_AGE) == b"in time"


def test_clear() -> None:
    reassembler = Reassembler()
    reassembler.add(Part(1, 0, False, b"ab"))
    reassembler.clear()
    assert reassembler.add(Part(1, 2, True, b"c")) is None
    assert reassembler.discarded == 0
    assert reassembler.add(Part(1, 0, False, b"ab")) == b"abc"
    reassembler.clear()
    LIB.mt_reassembler_free(None)


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
def test_hostile_parts_are_judged_as_by_the_model(parts: list[Part]) -> None:
    reassembler, model = Reassembler(), Model()
    for part in parts:
        assert reassembler.add(part) == model.add(part)
        assert reassembler.discarded == model.discarded


@pytest.mark.parametrize("seed", range(12))
def test_like_the_model_at_every_bound(seed: int) -> None:
    """Many packets at once, lost, late, repeated and bent parts, time that passes."""
    rng = random.Random(seed)
    reassembler, model = Reassembler(), Model()
    largest = rng.choice([3000, 20000, MAX_PACKET])
    pause = rng.choice([1, 1000, 50_000])
    flying: list[Part] = []
    identifier = now = finished = 0
    for _ in range(1500):
        if len(flying) < rng.choice([10, 300]):
            size = rng.randint(1, rng.choice([10, largest]))
            step = rng.choice([64, 1150, 1150, 1150, 9000])
            flying += cut(rng.randbytes(size), identifier % 200, max(step, size // 70 + 1))
            identifier += 1
        part = flying.pop(rng.randrange(min(len(flying), rng.choice([1, 5, 200]))))
        fate = rng.random()
        if fate < 0.03:
            continue
        if fate < 0.05:
            flying.append(part)
        elif fate < 0.1:
            part = rng.choice(
                [
                    part._replace(offset=rng.choice([0, part.offset ^ 1, rng.getrandbits(16)])),
                    part._replace(offset=rng.getrandbits(64)),
                    part._replace(last=not part.last),
                    part._replace(data=part.data[: rng.randrange(len(part.data) + 1)]),
                    part._replace(data=part.data + b"x"),
                    part._replace(identifier=rng.choice([rng.randrange(200), rng.getrandbits(64)])),
                ]
            )
        now += rng.randrange(2 * pause)
        if rng.random() < 0.002:
            now += MAX_AGE
        found = reassembler.add(part, now)
        assert found == model.add(part, now), seed
        assert reassembler.discarded == model.discarded, seed
        finished += found is not None
    assert finished > 5, seed
    assert model.discarded > 5, seed


@pytest.mark.parametrize("seed", range(4))
def test_single_bytes_everywhere(seed: int) -> None:
    """The most parts, and the most memory, that a hostile peer can get out of its bytes."""
    rng = random.Random(seed)
    reassembler, model = Reassembler(), Model()
    for _ in range(2000):
        part = Part(rng.randrange(70), rng.randrange(MAX_PACKET), rng.random() < 0.01, b"x")
        assert reassembler.add(part) == model.add(part)
        assert reassembler.discarded == model.discarded
