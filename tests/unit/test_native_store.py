"""The store of sent payloads: what is there is what was put there, and only the oldest goes."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from ctypes import POINTER, byref, c_bool, c_uint32, c_uint64, c_void_p

import pytest

from tests.unit.native import library

START, MOST = 256 << 10, 8 << 20  # bytes


class Log(ctypes.Structure):
    _fields_ = (
        ("bytes", c_void_p),
        ("size", c_uint32),
        ("begin", c_uint64),
        ("end", c_uint64),
    )
    bytes: int | None
    size: int
    begin: int
    end: int


def load() -> ctypes.CDLL:
    lib = library("store.c")
    for name, result, arguments in (
        ("clear", None, ()),
        ("keeps", c_uint64, (c_uint32,)),
        ("grow", c_bool, ()),
        ("reserve", c_void_p, (c_uint32,)),
        ("commit", c_uint64, (c_uint32,)),
        ("get", c_void_p, (c_uint64,)),
    ):
        function = getattr(lib, f"mt_store_{name}")
        function.restype, function.argtypes = result, (POINTER(Log), *arguments)
    return lib


LIB = load()


class Store:
    def __init__(self) -> None:
        self.log = Log()

    def put(self, data: bytes, reserved: int | None = None) -> int:
        room = LIB.mt_store_reserve(byref(self.log), reserved or len(data))
        ctypes.memmove(room, data, len(data))
        return int(LIB.mt_store_commit(byref(self.log), len(data)))

    def get(self, position: int, length: int) -> bytes | None:
        at = LIB.mt_store_get(byref(self.log), position)
        return None if at is None else ctypes.string_at(at, length)

    def keeps(self, length: int) -> int:
        return int(LIB.mt_store_keeps(byref(self.log), length))

    def grow(self) -> bool:
        return bool(LIB.mt_store_grow(byref(self.log)))

    def clear(self) -> None:
        LIB.mt_store_clear(byref(self.log))


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.clear()


def test_nothing_is_allocated_before_the_first(store: Store) -> None:
    assert (store.log.bytes, store.log.size, store.keeps(1000)) == (None, 0, 0)
    assert store.get(0, 1) is None
    assert store.put(b"one") == 0
    assert store.log.size == START and store.get(0, 3) == b"one"


def test_it_doubles_up_to_a_limit(store: Store) -> None:
    position = store.put(b"first")
    sizes = []
    while store.grow():
        sizes.append(store.log.size)
        assert store.get(position, 5) == b"first"
    assert sizes[0] == 2 * START and sizes[-1] == MOST and len(sizes) == 5


def test_only_what_was_taken_of_what_was_reserved_counts(store: Store) -> None:
    first, second = store.put(b"abc", reserved=1500), store.put(b"def")
    assert second == first + 3
    assert (store.get(first, 3), store.get(second, 3)) == (b"abc", b"def")


def test_cleared_it_knows_no_old_position_even_when_it_is_large_again(store: Store) -> None:
    positions = [store.put(bytes(1000)) for _ in range(300)]
    store.clear()
    assert store.log.bytes is None
    again = store.put(b"new")
    while store.grow():
        pass
    assert all(store.get(position, 1000) is None for position in positions)
    assert store.get(again, 3) == b"new"


@pytest.mark.parametrize("seed", range(20))
def test_against_a_model(seed: int, store: Store) -> None:
    """The model: everything ever put, and `keeps` says what goes next."""
    rng = random.Random(seed)
    there: dict[int, bytes] = {}
    for turn in range(3000):
        data = rng.randbytes(rng.choice([1, 30, rng.randrange(1, 1500), 1421]))
        floor = store.keeps(len(data))
        if rng.random() < 0.001:
            before = {position: store.get(position, len(old)) for position, old in there.items()}
            store.grow()
            assert all(store.get(p, len(old)) == before[p] for p, old in there.items())
            floor = store.keeps(len(data))
        position = store.put(data)
        assert position not in there
        gone = [each for each in there if each < floor]
        assert all(store.get(each, 1) is None for each in gone)
        for each in gone:
            del there[each]
        there[position] = data
        if turn % 100 == 0 or turn > 2990:
            assert all(store.get(each, len(old)) == old for each, old in there.items())
        assert sum(map(len, there.values())) <= store.log.size
    held = sum(map(len, there.values()))
    assert held > store.log.end - store.log.begin - 2 * 1500, "little is left between two of them"
