"""What a broker gets to see, and what it can make of it."""

from __future__ import annotations

import base64
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from nacl.public import SealedBox

from tunnel.identity import Identity
from tunnel.rendezvous.sealing import BLOCK, MAX_MESSAGE, Speaker, topic_of, verify

ALICE, BOB, CAROL = (
    Speaker(Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32))) for n in (1, 2, 3)
)
CONTEXT = b"a context"
BODY = b"where we are"
LONGEST = MAX_MESSAGE - 48 - 64 - 2

NO_KEYS = {
    "zero": bytes(32),
    "identity": b"\x01" + bytes(31),
    "order 8": bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    "not canonical": b"\xff" * 32,
    "off the curve": b"\x02" + bytes(31),
}


def sealed(body: bytes = BODY, sender: Speaker = ALICE, receiver: Speaker = BOB) -> bytes:
    return sender.seal(receiver.public, CONTEXT, body)


def opened(data: bytes, context: bytes = CONTEXT, sender: Speaker = ALICE) -> bytes | None:
    return BOB.open(sender.public, context, data)


# topics


def test_both_ends_know_the_same_topics() -> None:
    for sender in (ALICE, BOB):
        of_alice = ALICE.topic(BOB.public, sender.public, b"offer")
        assert of_alice == BOB.topic(ALICE.public, sender.public, b"offer")
        assert re.fullmatch(r"martlet/1/[a-z2-7]{26}", of_alice)


def test_topics_stay_what_they_are() -> None:
    """Two versions that derive them differently would never meet."""
    topic = ALICE.topic(BOB.public, ALICE.public, b"offer")
    assert topic == "martlet/1/bprxkqur67oxd2yrkklokkqqpe"


def test_topics_differ_by_pair_and_sender_and_purpose() -> None:
    topics = {
        one.topic(other.public, sender.public, purpose)
        for one in (ALICE, BOB, CAROL)
        for other in (ALICE, BOB, CAROL)
        if one is not other
        for sender in (one, other)
        for purpose in (b"offer", b"answer")
    }
    assert len(topics) == 3 * 2 * 2


@pytest.mark.parametrize("key", NO_KEYS.values(), ids=NO_KEYS)
def test_what_is_no_key_has_no_topic_and_gets_nothing(key: bytes) -> None:
    assert not ALICE.can_reach(key)
    with pytest.raises(ValueError):
        ALICE.topic(key, key, b"offer")
    with pytest.raises(ValueError):
        ALICE.seal(key, CONTEXT, BODY)
    assert ALICE.open(key, CONTEXT, sealed(sender=BOB, receiver=ALICE)) is None


@given(st.binary(min_size=32, max_size=32))
def test_any_bytes_are_a_key_or_are_refused(key: bytes) -> None:
    if ALICE.can_reach(key):
        assert ALICE.topic(key, key, b"offer").startswith("martlet/1/")
        assert ALICE.seal(key, CONTEXT, BODY)


# messages


@given(st.binary(max_size=LONGEST))
def test_what_is_sealed_is_opened_by_its_receiver_alone(body: bytes) -> None:
    data = sealed(body)
    assert opened(data) == body
    assert CAROL.unseal(data) is None
    assert ALICE.unseal(data) is None  # nor by its sender: a reflection is nothing


@given(st.binary(max_size=LONGEST))
def test_sizes_tell_little(body: bytes) -> None:
    data = sealed(body)
    assert len(data) % BLOCK == 0
    assert len(data) <= MAX_MESSAGE
    assert len(data) - len(body) < BLOCK + 48 + 64 + 2


def test_what_is_too_long_is_not_sealed() -> None:
    assert len(sealed(bytes(LONGEST))) == MAX_MESSAGE
    with pytest.raises(ValueError, match="too long"):
        sealed(bytes(LONGEST + 1))


def test_the_same_message_looks_different_each_time() -> None:
    one, other = sealed(), sealed()
    assert all(one[n : n + 8] != other[n : n + 8] for n in range(len(one) - 8))


def test_nothing_of_the_content_can_be_read() -> None:
    secrets = [BODY, ALICE.public, BOB.public, CONTEXT]
    for secret in secrets:
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert form not in sealed(BODY * 20)


def test_an_opened_message_says_nothing_in_another_context() -> None:
    data = sealed()
    assert opened(data, b"another context") is None
    assert opened(data, CONTEXT + b"\0") is None
    assert opened(data, sender=CAROL) is None


def test_a_receiver_cannot_pass_a_message_on_as_meant_for_another() -> None:
    """Carol, a peer of both, seals to Bob what Alice signed for her."""
    signed = CAROL.unseal(ALICE.seal(CAROL.public, CONTEXT, BODY))
    assert signed is not None
    signature, body = signed
    assert verify(ALICE.public, CAROL.public, CONTEXT, signature, body) == body
    assert verify(ALICE.public, BOB.public, CONTEXT, signature, body) is None


def test_a_peer_cannot_speak_for_another() -> None:
    assert opened(sealed(sender=CAROL)) is None


@pytest.mark.parametrize("size", range(0, 512, 17))
def test_a_part_is_nothing(size: int) -> None:
    data = sealed(bytes(300))
    assert len(data) == 512
    assert opened(data[:size]) is None
    assert opened(data[512 - size :] if size else b"") is None


@given(st.integers(0, 8 * BLOCK - 1))
def test_one_bit_is_enough(bit: int) -> None:
    data = bytearray(sealed())
    data[bit // 8] ^= 1 << bit % 8
    assert opened(bytes(data)) is None


@given(st.binary(max_size=2 * MAX_MESSAGE))
def test_any_bytes(data: bytes) -> None:
    assert opened(data) is None


@pytest.mark.parametrize("blocks", [1, 2, 16, 17, 4096])
def test_any_whole_blocks(blocks: int) -> None:
    assert opened(bytes(blocks * BLOCK)) is None


@given(st.integers(0, 65535), st.binary(min_size=64, max_size=64), st.integers(0, LONGEST))
def test_lengths_that_lie(length: int, signature: bytes, size: int) -> None:
    """Whoever can seal to us, which is anybody, may have put anything inside."""
    data = _seal_plain(length.to_bytes(2) + signature + bytes(size))
    found = BOB.unseal(data)
    padded = len(data) - 48 - 64 - 2
    assert (found is None) == (length > padded)
    assert opened(data) is None


def _seal_plain(plain: bytes) -> bytes:
    plain += bytes(-(len(plain) + 48) % BLOCK)
    return bytes(SealedBox(BOB._boxing.public_key).encrypt(plain))


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_topics_of_secrets(one: bytes, other: bytes) -> None:
    assert (topic_of(one, b"x") == topic_of(other, b"x")) == (one == other)
    assert topic_of(one, b"x") != topic_of(one, b"y")
