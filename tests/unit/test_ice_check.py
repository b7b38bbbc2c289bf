"""STUN messages of checks: what is sent, and that nothing else is taken for one."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import pytest
from aioice import stun
from hypothesis import given
from hypothesis import strategies as st

from tunnel.ice import check
from tunnel.ice.check import Credentials, Freshness, Heard, Transactions
from tunnel.path.network import Address, PathKey

# 64 and 128 bits in hexadecimal.
OURS = Credentials("a" * 16, "p" * 32, "b" * 16, "q" * 32)
THEIRS = Credentials("b" * 16, "q" * 32, "a" * 16, "p" * 32)
STRANGER = Credentials("b" * 16, "x" * 32, "a" * 16, "x" * 32)
ID = bytes(range(12))
MAPPED = Address("203.0.113.1", 40000)
PATH = PathKey(Address("192.168.1.2", 4117), MAPPED)

REQUEST = check.request(THEIRS, ID, 0x6E001EFF)
RESPONSE = check.response(THEIRS, ID, MAPPED)


def test_request() -> None:
    assert check.looks_like_stun(REQUEST)
    assert check.username_of(REQUEST) == f"{OURS.local_ufrag}:{OURS.remote_ufrag}"
    assert check.transaction_id_of(REQUEST) == ID
    assert check.read_request(REQUEST, OURS) == 0x6E001EFF
    names = list(stun.parse_message(REQUEST).attributes)
    assert names == ["USERNAME", "PRIORITY", "MESSAGE-INTEGRITY", "FINGERPRINT"]


@pytest.mark.parametrize("mapped", [MAPPED, Address("2001:db8::1", 65535)])
def test_response(mapped: Address) -> None:
    data = check.response(THEIRS, ID, mapped)
    assert check.looks_like_stun(data)
    assert check.username_of(data) is None
    assert check.read_response(data, OURS) == mapped
    names = list(stun.parse_message(data).attributes)
    assert names == ["XOR-MAPPED-ADDRESS", "MESSAGE-INTEGRITY", "FINGERPRINT"]


def test_sizes_that_the_cost_in_the_documentation_is_made_of() -> None:
    assert len(REQUEST) == 100
    assert len(RESPONSE) == 64
    assert len(check.response(THEIRS, ID, Address("2001:db8::1", 1))) == 76
    assert len(check.server_request(ID)) == 28


def test_wrong_credentials() -> None:
    assert check.read_request(check.request(STRANGER, ID, 1), OURS) is None
    assert check.read_response(check.response(STRANGER, ID, MAPPED), OURS) is None
    # Ours come back to us: signed, but by the wrong end, or for another one.
    assert check.read_request(check.request(OURS, ID, 1), OURS) is None
    assert check.read_response(check.response(OURS, ID, MAPPED), OURS) is None
    other = Credentials("c" * 16, "q" * 32, "a" * 16, "p" * 32)
    assert check.read_request(check.request(other, ID, 1), OURS) is None


def signed(
    method: stun.Method, kind: stun.Class, attributes: Mapping[str, object], password: str
) -> bytes:
    message = stun.Message(method, kind, ID, dict(attributes))
    message.add_message_integrity(password.encode())
    return bytes(message)


def test_authentic_but_of_another_kind() -> None:
    username = f"{OURS.local_ufrag}:{OURS.remote_ufrag}"
    full = {"USERNAME": username, "PRIORITY": 1}
    binding, request = stun.Method.BINDING, stun.Class.REQUEST
    assert check.read_request(signed(binding, request, dict(full), "p" * 32), OURS) == 1
    assert check.read_request(signed(stun.Method.ALLOCATE, request, full, "p" * 32), OURS) is None
    assert check.read_request(signed(binding, stun.Class.INDICATION, full, "p" * 32), OURS) is None
    bare = signed(binding, request, {"USERNAME": username}, "p" * 32)
    assert check.read_request(bare, OURS) is None
    assert check.read_response(signed(binding, stun.Class.RESPONSE, {}, "q" * 32), OURS) is None
    error = signed(binding, stun.Class.ERROR, {"ERROR-CODE": (401, "no")}, "q" * 32)
    assert check.read_response(error, OURS) is None
    port_zero = {"XOR-MAPPED-ADDRESS": ("192.0.2.1", 0)}
    assert (
        check.read_response(signed(binding, stun.Class.RESPONSE, port_zero, "q" * 32), OURS) is None
    )


def test_a_fingerprint_is_wanted() -> None:
    length = len(REQUEST) - stun.HEADER_LENGTH - stun.FINGERPRINT_LENGTH
    bare = stun.set_body_length(REQUEST, length)[: -stun.FINGERPRINT_LENGTH]
    message = stun.parse_message(bare)
    assert message.check_message_integrity(b"p" * 32)
    assert check.read_request(bare, OURS) is None


def test_what_follows_the_integrity_is_not_believed() -> None:
    message = stun.Message(
        stun.Method.BINDING, stun.Class.RESPONSE, ID, {"XOR-MAPPED-ADDRESS": tuple(MAPPED)}
    )
    message.add_message_integrity(b"q" * 32)
    message.attributes.pop("FINGERPRINT")
    extra = struct.pack("!HH", 0x0020, 8) + stun.pack_xor_address(("192.0.2.66", 6), ID)
    data = bytes(message) + extra
    data = stun.set_body_length(data, len(data) - 20 + 8)
    data += struct.pack("!HHI", 0x8028, 4, stun.message_fingerprint(data))
    assert check.read_response(data, OURS) == MAPPED


@pytest.mark.parametrize("data", [REQUEST, RESPONSE], ids=["request", "response"])
def test_truncated_or_longer(data: bytes) -> None:
    for cut in range(len(data)):
        assert not check.looks_like_stun(data[:cut])
        refused(data[:cut])
        short = data[:2] + max(cut - 20, 0).to_bytes(2) + data[4:cut]  # its length says so, too
        refused(short)
    refused(data + bytes(4))


def refused(data: bytes) -> None:
    check.username_of(data)
    assert check.read_request(data, OURS) is None
    assert check.read_response(data, OURS) is None


@pytest.mark.parametrize("data", [REQUEST, RESPONSE], ids=["request", "response"])
def test_every_flipped_bit_is_seen(data: bytes) -> None:
    # All but the length of the fingerprint, which is the last: nothing hangs on it.
    for bit in [*range((len(data) - 6) * 8), *range((len(data) - 4) * 8, len(data) * 8)]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped))


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    refused(data)
    check.read_server_response(data)


attributes = st.lists(
    st.tuples(
        st.sampled_from([*stun.ATTRIBUTES_BY_TYPE, 0x7777]),
        st.binary(max_size=40),
        st.none() | st.integers(0, 65535),
    ),
    max_size=6,
)


@given(st.integers(0, 0x3FFF), attributes, st.booleans())
def test_arbitrary_attributes(
    kind: int, attributes: list[tuple[int, bytes, int | None]], fingerprint: bool
) -> None:
    body = b""
    for attribute, value, length in attributes:
        body += struct.pack("!HH", attribute, len(value) if length is None else length)
        body += value + bytes(-len(value) % 4)
    data = struct.pack("!HHI12s", kind, len(body), stun.COOKIE, ID) + body
    if fingerprint:
        data = stun.set_body_length(data, len(body) + 8)
        data += struct.pack("!HHI", 0x8028, 4, stun.message_fingerprint(data))
    refused(data)
    check.read_server_response(data)


@given(st.binary(min_size=20, max_size=1400))
def test_quic_is_not_stun(data: bytes) -> None:
    assert not check.looks_like_stun(bytes([data[0] | 0x40]) + data[1:])


def test_username_that_is_no_text() -> None:
    body = struct.pack("!HH", 6, 4) + b"\xff\xfe\xfd\xfc"
    data = struct.pack("!HHI12s", 1, len(body), stun.COOKIE, ID) + body
    assert check.looks_like_stun(data)
    assert check.username_of(data) is None


def test_server_messages() -> None:
    assert check.username_of(check.server_request(ID)) is None
    answer = stun.Message(
        stun.Method.BINDING, stun.Class.RESPONSE, ID, {"XOR-MAPPED-ADDRESS": tuple(MAPPED)}
    )
    assert check.read_server_response(bytes(answer)) == MAPPED
    answer = stun.Message(stun.Method.BINDING, stun.Class.ERROR, ID, {"ERROR-CODE": (500, "busy")})
    assert check.read_server_response(bytes(answer)) is None


def test_transactions() -> None:
    transactions = Transactions(random.Random(1).randbytes)
    first, second = transactions.open(PATH, 1.0), transactions.open(PATH, 2.0)
    assert first != second and len(first) == check.TRANSACTION_LENGTH
    assert transactions.asked_at(first, PATH) == 1.0
    assert transactions.asked_at(first, PATH._replace(remote=Address("192.0.2.1", 1))) is None
    transactions.close(first)
    assert first not in transactions
    transactions.expire(2.0 + check.ANSWER_LIFE)
    assert second not in transactions
    third = transactions.open(PATH, 9.0)
    transactions.forget(PATH)
    assert third not in transactions


def test_copies_are_known() -> None:
    heard = Heard()
    elsewhere = PATH._replace(remote=Address("192.0.2.66", 66))

    def judge(number: int, path: PathKey = PATH) -> Freshness:
        return heard.judge(number.to_bytes(4) + bytes(8), path)

    assert judge(5) is judge(4) is judge(3000) is Freshness.NEW  # in any order
    assert judge(5) is judge(4) is Freshness.OLD
    assert judge(5, elsewhere) is judge(5, elsewhere) is Freshness.COPY
    assert judge(3000 - check.REPLAY_WINDOW) is Freshness.OLD
    assert judge(3001 - check.REPLAY_WINDOW) is Freshness.NEW
    for number in range(3001, 9000):
        assert judge(number) is Freshness.NEW
        assert judge(number) is Freshness.OLD
    assert judge(5, elsewhere) is judge(3000) is Freshness.OLD


def test_our_requests_count() -> None:
    transactions = Transactions(random.Random(1).randbytes)
    opened = [transactions.open(PATH, 1.0) for _ in range(3)]
    transactions.clear()
    opened.append(transactions.open(PATH, 2.0))
    assert [int.from_bytes(transaction[:4]) for transaction in opened] == [0, 1, 2, 3]
    assert len({transaction[4:] for transaction in opened}) == 4


def test_questions_to_a_server_that_knows_rfc_5780() -> None:
    def change(**what: bool) -> int | None:
        parsed = stun.parse_message(check.server_request(ID, **what))
        value: int | None = parsed.attributes.get("CHANGE-REQUEST")
        return value

    assert change() is None
    assert change(change_ip=True, change_port=True) == 6  # RFC 5780 section 7.2: bits A and B
    assert change(change_port=True) == 2


@pytest.mark.parametrize("size", [24, 28, 576, 1472])
def test_a_padded_question_is_as_long_as_asked_for_and_valid(size: int) -> None:
    request = check.server_request(ID, size=size)
    assert len(request) == size and check.looks_like_stun(request) and check.is_request(request)
    assert stun.parse_message(request).transaction_id == ID


def test_the_other_address_of_a_server() -> None:
    other = Address("192.0.2.54", 3479)

    def answer(**attributes: object) -> bytes:
        full = {"XOR-MAPPED-ADDRESS": tuple(MAPPED), **attributes}
        return bytes(stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, ID, full))

    assert check.read_other_address(answer(**{"OTHER-ADDRESS": tuple(other)})) == other
    assert check.read_other_address(answer(**{"OTHER-ADDRESS": (other.host, 0)})) is None
    assert check.read_other_address(answer()) is None
    assert not check.is_request(answer())
