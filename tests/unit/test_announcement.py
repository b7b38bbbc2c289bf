"""Announcements on a link: known to whom they mean, noise to everybody else."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tunnel.announcement import BLOCK, MAX_TAGS, TAG_LENGTH, Properties, make, read

RNG = random.Random(1)
A, B, C = (RNG.randbytes(32) for _ in range(3))


def heard(properties: Properties) -> dict[bytes, bytes | None]:
    return {key.encode(): value for key, value in properties.items()}


def test_known_to_the_peer_it_means() -> None:
    said = heard(make(A, [B], RNG))
    assert read(said, B, [C, A]) == A
    assert read(said, B, [C]) is None  # of nobody that is known
    assert read(said, C, [A, B]) is None  # not meant


def test_it_says_who_announces() -> None:
    """One's own announcement, or a copy of it, is not the other's."""
    assert read(heard(make(A, [B], RNG)), A, [B]) is None


def test_no_two_are_alike_and_none_has_a_key_in_it() -> None:
    first, second = (make(A, [B, C], RNG) for _ in range(2))
    assert first["s"] != second["s"] and first["t0"] != second["t0"]
    for key in (A, B, C):
        for part in (key[:4], key[-4:]):
            assert not any(part in value for value in first.values())


def test_the_number_of_peers_is_hidden_a_little() -> None:
    sizes = {len(make(A, [RNG.randbytes(32) for _ in range(n)], RNG)["t0"]) for n in range(1, 5)}
    assert sizes == {BLOCK * TAG_LENGTH}


def test_as_many_as_fit_a_packet() -> None:
    peers = [RNG.randbytes(32) for _ in range(MAX_TAGS + 1)]
    said = make(A, peers, RNG)
    assert sum(len(key) + 2 + len(value) for key, value in said.items()) < 1100
    assert all(len(key) + 1 + len(value) <= 255 for key, value in said.items())
    assert all(read(heard(said), peer, [A]) == A for peer in peers[:MAX_TAGS])
    assert read(heard(said), peers[-1], [A]) is None


@given(
    st.dictionaries(
        st.sampled_from([b"v", b"s", b"t0", b"t1", b"t4", b"x"]),
        st.none() | st.binary(max_size=300) | st.just(b"1") | st.just(bytes(16)),
    )
)
def test_anything_at_all(properties: dict[bytes, bytes | None]) -> None:
    assert read(properties, B, [A, C]) is None
