"""Control messages and their framing."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.control import (
    MAX_MESSAGE,
    ApplicationError,
    Bench,
    BenchReply,
    CandidateEntry,
    Candidates,
    ControlError,
    ControlReader,
    Goodbye,
    Hello,
    Message,
    Observed,
    Ping,
    Pong,
    encode,
)
from tunnel.errors import PeerError

ENTRY = CandidateEntry("192.0.2.1:1", "host", 0, False)
HELLO = Hello(1, ("copies", "parts"), ("10.88.0.1", "fd88::1"), bytes(range(16)))


def frame(body: object) -> bytes:
    data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return len(data).to_bytes(4) + data


def fields(message: Message) -> dict[str, object]:
    decoded: dict[str, object] = msgspec.msgpack.decode(encode(message)[4:])
    return decoded


def fields_of(entry: CandidateEntry) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(entry)
    return found


tokens = st.integers(0, 2**63 - 1)
ports = st.integers(1, 65535)
hellos = st.builds(
    Hello,
    version=st.integers(1, 65535),
    features=st.lists(st.from_regex(r"[a-z0-9._-]{1,32}", fullmatch=True), max_size=32).map(tuple),
    addresses=st.lists(st.ip_addresses().map(str), max_size=32).map(tuple),
    boot_id=st.binary(min_size=16, max_size=16),
)
addresses = st.one_of(
    st.builds("{}:{}".format, st.ip_addresses(v=4), ports),
    st.builds("[{}]:{}".format, st.ip_addresses(v=6), ports),
)
entries = st.builds(
    CandidateEntry,
    addresses,
    st.sampled_from(["host", "srflx", "prflx", "relay"]),
    st.integers(0, 255),
    st.booleans(),
)
texts = st.text(max_size=256).filter(str.isprintable)
messages = st.one_of(
    hellos,
    st.builds(Observed, addresses),
    st.builds(Candidates, tokens, st.lists(entries, max_size=32).map(tuple)),
    st.builds(Ping, tokens),
    st.builds(Pong, tokens),
    st.builds(Goodbye, texts, st.booleans()),
    st.builds(Bench, tokens, st.ip_addresses().map(str), st.integers(1, 60)),
    st.builds(BenchReply, tokens, ports, st.binary(min_size=16, max_size=16)),
    st.builds(BenchReply, tokens, reason=texts),
)


@given(st.lists(messages, max_size=6), st.randoms(use_true_random=False))
def test_round_trip_in_any_chunks(sent: list[Message], rng: random.Random) -> None:
    data = b"".join(map(encode, sent))
    reader = ControlReader()
    received: list[Message] = []
    while data:
        cut = rng.randint(1, 700)
        received += reader.feed(data[:cut])
        data = data[cut:]
    assert received == sent


def read_all(chunks: list[bytes]) -> list[Message]:
    reader = ControlReader()
    received: list[Message] = []
    for chunk in chunks:
        try:
            received += reader.feed(chunk)
        except ControlError:
            with pytest.raises(ControlError):
                reader.feed(b"")
            break
    return received


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_arbitrary_bytes_raise_only_control_error(chunks: list[bytes]) -> None:
    read_all(chunks)


@given(st.binary(min_size=1, max_size=200))
def test_arbitrary_bodies_raise_only_control_error(body: bytes) -> None:
    read_all([frame(body)])


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(messages, st.data())
def test_arbitrary_fields_raise_only_control_error(message: Message, data: st.DataObject) -> None:
    body = fields(message)
    body[data.draw(st.sampled_from(sorted(body)))] = data.draw(json_like)
    read_all([frame(body)])


@given(messages, st.data())
def test_flipped_bits_raise_only_control_error(message: Message, data: st.DataObject) -> None:
    encoded = bytearray(encode(message))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    read_all([bytes(encoded)])


def test_the_form_on_the_wire() -> None:
    assert encode(Ping(7)) == b"\x00\x00\x00\x12\x82\xa4type\xa4ping\xa5token\x07"
    assert fields(HELLO) == {
        "type": "hello",
        "version": 1,
        "features": ["copies", "parts"],
        "addresses": ["10.88.0.1", "fd88::1"],
        "boot_id": bytes(range(16)),
    }
    assert fields(Candidates(3, (ENTRY,))) == {
        "type": "candidates",
        "generation": 3,
        "candidates": [{"address": "192.0.2.1:1", "kind": "host", "rank": 0, "metered": False}],
    }
    assert fields(Bench(7, "10.88.0.1", 30)) == {
        "type": "bench",
        "token": 7,
        "address": "10.88.0.1",
        "seconds": 30,
    }
    assert fields(BenchReply(7, 99, bytes(16))) == {
        "type": "bench_reply",
        "token": 7,
        "port": 99,
        "secret": bytes(16),
        "reason": "",
    }


def test_unknown_types_and_fields_are_ignored() -> None:
    data = frame({"type": "of tomorrow", "x": [1]}) + frame({"type": "ping", "token": 1, "new": {}})
    assert ControlReader().feed(data + encode(Pong(2))) == [Ping(1), Pong(2)]


@pytest.mark.parametrize(
    "data",
    [
        frame(b""),
        frame(b"\xc1"),
        frame(b"\x91" * MAX_MESSAGE),  # arrays in arrays, thousands deep
        frame(b"\x81\xa4type\xa1\xff"),  # a string that is not UTF-8
        frame(b"\x82\xa4type\xa1x\xa1y" + b"\x91" * 4000),  # as deep, in an ignored field
        frame([]),
        frame({}),
        frame({"type": 1}),
        frame({"type": "ping"}),
        frame(msgspec.msgpack.encode({"type": "ping", "token": 1}) + b"\x00"),
        (MAX_MESSAGE + 1).to_bytes(4),
        b"\xff\xff\xff\xff",
    ],
)
def test_malformed_frames(data: bytes) -> None:
    reader = ControlReader()
    with pytest.raises(ControlError) as caught:
        reader.feed(data)
    assert isinstance(caught.value, PeerError)
    assert caught.value.code is ApplicationError.MALFORMED_CONTROL
    assert caught.value.problem
    with pytest.raises(ControlError):  # framing is lost for good
        reader.feed(encode(Ping(1)))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (HELLO, "version", 0),
        (HELLO, "version", 65536),
        (HELLO, "version", "1"),
        (HELLO, "features", ["a"] * 33),
        (HELLO, "features", ["Copies"]),
        (HELLO, "features", ["copies\n"]),
        (HELLO, "features", [""]),
        (HELLO, "features", ["a" * 33]),
        (HELLO, "addresses", ["10.88.0.1"] * 33),
        (HELLO, "addresses", ["10.88.0.1/24"]),
        (HELLO, "addresses", ["fe80::1%eth0"]),
        (HELLO, "addresses", ["host"]),
        (HELLO, "boot_id", b"x" * 15),
        (HELLO, "boot_id", b"x" * 17),
        (Observed("192.0.2.1:1"), "address", "192.0.2.1"),
        (Observed("192.0.2.1:1"), "address", "host.example:1"),
        (Observed("192.0.2.1:1"), "address", "192.0.2.1:0"),
        (Observed("192.0.2.1:1"), "address", "1" * 65),
        (Candidates(1, ()), "generation", -1),
        (Candidates(1, ()), "generation", 2**63),
        (Candidates(1, ()), "candidates", None),
        (Candidates(1, ()), "candidates", [fields_of(ENTRY)] * 33),
        *(
            (Candidates(1, ()), "candidates", [fields_of(ENTRY) | {field: value}])
            for field, value in (
                ("address", "192.0.2.1"),
                ("address", "host.example:1"),
                ("address", "192.0.2.1:0"),
                ("address", "[fe80::1%eth0]:1"),
                ("kind", "HOST"),
                ("kind", "wishful"),
                ("rank", -1),
                ("rank", 256),
                ("rank", True),
                ("metered", 1),
            )
        ),
        (Ping(1), "token", -1),
        (Pong(1), "token", 2**63),
        (Goodbye("x"), "reason", "\x1b[2J"),
        (Goodbye("x"), "reason", "x" * 257),
        (Goodbye("x"), "hold", 1),
        (Bench(1, "10.88.0.1", 1), "token", -1),
        (Bench(1, "10.88.0.1", 1), "address", "10.88.0.1/32"),
        (Bench(1, "10.88.0.1", 1), "address", "fe80::1%eth0"),
        (Bench(1, "10.88.0.1", 1), "seconds", 0),
        (Bench(1, "10.88.0.1", 1), "seconds", 61),
        (Bench(1, "10.88.0.1", 1), "seconds", 1.5),
        (BenchReply(1, 1, bytes(16)), "port", 65536),
        (BenchReply(1, 1, bytes(16)), "secret", bytes(15)),
        (BenchReply(1, 1, bytes(16)), "secret", b""),
        (BenchReply(1, 1, bytes(16)), "secret", bytes(17)),
        (BenchReply(1), "reason", "\x1b[2J"),
        (BenchReply(1), "reason", "x" * 257),
    ],
)
def test_fields_are_bounded(message: Message, field: str, value: object) -> None:
    with pytest.raises(ControlError):
        ControlReader().feed(frame(fields(message) | {field: value}))


def test_encode_refuses_what_the_other_end_would() -> None:
    with pytest.raises(ValueError, match="malformed"):
        encode(Ping(-1))
    with pytest.raises(ValueError, match="at most 4096"):
        encode(Goodbye("x" * 5000))
    with pytest.raises(ValueError, match="feature"):
        Hello(1, ("Not A Feature",), (), bytes(16))


def test_largest_hello_fits() -> None:
    address = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    encode(Hello(65535, ("a" * 32,) * 32, (address,) * 32, bytes(16)))


def test_largest_candidates_fit() -> None:
    address = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
    entry = CandidateEntry(address, "srflx", 255, False)
    assert len(encode(Candidates(2**63 - 1, (entry,) * 32))) <= 2800
