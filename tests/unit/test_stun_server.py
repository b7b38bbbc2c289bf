"""The STUN server: what it answers, from where, and to what it says nothing."""

import struct

import pytest
from aioice import stun
from hypothesis import given
from hypothesis import strategies as st

from tunnel.ice.stun_server import CHANGE_IP, CHANGE_PORT, StunServer
from tunnel.path.network import Address

A, B = "192.0.2.1", "192.0.2.2"
PORTS = (3478, 3479)
CLIENT = Address("198.51.100.7", 40000)
CLIENT6 = Address("2001:db8::7", 40000)
TRANSACTION = bytes(range(12))


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def request(*attributes: bytes, kind: int = 1, fingerprint: bool = False) -> bytes:
    body = b"".join(attributes)
    data = struct.pack("!HHI", kind, len(body), stun.COOKIE) + TRANSACTION + body
    if fingerprint:
        data += attribute(0x8028, stun.message_fingerprint(data).to_bytes(4))
        data = data[:2] + (len(data) - 20).to_bytes(2) + data[4:]
    return data


def change(flags: int) -> bytes:
    return attribute(3, flags.to_bytes(4))


@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
def test_the_mapped_address(client: Address) -> None:
    local = Address("2001:db8::1" if client.is_ipv6 else A, 3478)
    reply = StunServer().receive(request(), client, local)
    assert reply is not None and reply.local == local
    message = stun.parse_message(reply.data)
    assert message.message_class == stun.Class.RESPONSE
    assert message.transaction_id == TRANSACTION
    assert message.attributes == {"XOR-MAPPED-ADDRESS": tuple(client)}
    assert len(reply.data) < 100


@pytest.mark.parametrize(
    "flags, expected",
    [
        (0, (A, 3478)),
        (CHANGE_PORT, (A, 3479)),
        (CHANGE_IP, (B, 3478)),
        (CHANGE_IP | CHANGE_PORT, (B, 3479)),
    ],
)
def test_another_address_or_port_on_request(flags: int, expected: tuple[str, int]) -> None:
    server = StunServer({A: B}, PORTS)
    reply = server.receive(request(change(flags)), CLIENT, Address(A, 3478))
    assert reply is not None and reply.local == expected
    attributes = stun.parse_message(reply.data).attributes
    assert attributes["RESPONSE-ORIGIN"] == expected
    assert attributes["OTHER-ADDRESS"] == (B, 3479)
    assert len(reply.data) < 100


@pytest.mark.parametrize("host, port, other", [(B, 3478, (A, 3479)), (B, 3479, (A, 3478))])
def test_the_other_address_is_seen_from_each(host: str, port: int, other: tuple[str, int]) -> None:
    reply = StunServer({A: B}, PORTS).receive(request(), CLIENT, Address(host, port))
    assert reply is not None
    assert stun.parse_message(reply.data).attributes["OTHER-ADDRESS"] == other


def test_what_cannot_be_done_is_refused_with_its_kind() -> None:
    server = StunServer()
    for part, kinds in ((change(CHANGE_IP), [3]), (attribute(0x0027, b"\x10\0\0\0"), [0x27])):
        reply = server.receive(request(part, fingerprint=True), CLIENT, Address(A, 3478))
        assert reply is not None and reply.data[:2] == b"\x01\x11"
        message = stun.parse_message(reply.data)  # and its fingerprint is right
        assert message.error_code == 420 and "FINGERPRINT" in message.attributes
        listed = b"".join(kind.to_bytes(2) for kind in kinds)
        assert attribute(0x000A, listed) in reply.data
    assert server.refused == 2


def test_no_change_needs_no_second_address_and_ice_attributes_are_ignored() -> None:
    parts = change(0), attribute(6, b"a:b"), attribute(0x24, bytes(4)), attribute(0x8022, b"x")
    reply = StunServer().receive(request(*parts), CLIENT, Address(A, 3478))
    assert reply is not None and reply.data[:2] == b"\x01\x01"


def test_a_fingerprint_is_checked_and_answered_with_one() -> None:
    server = StunServer()
    good = request(fingerprint=True)
    reply = server.receive(good, CLIENT, Address(A, 3478))
    assert reply is not None
    assert "FINGERPRINT" in stun.parse_message(reply.data).attributes
    bad = good[:-1] + bytes([good[-1] ^ 1])
    assert server.receive(bad, CLIENT, Address(A, 3478)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        request()[:19],
        request(kind=0x11),  # an indication
        request(kind=0x101),  # a response: no two servers may talk to each other for ever
        request(kind=3),  # Allocate
        request()[:4] + bytes(4) + TRANSACTION,  # RFC 3489 has no cookie
        request(struct.pack("!HH", 6, 100)),
        request(b"\0\x06\0"),
        request(attribute(0x8022, bytes(600))),
        b"\xc0" + bytes(1199),
    ],
)
def test_silence_to_anything_else(data: bytes) -> None:
    server = StunServer({A: B}, PORTS)
    assert server.receive(data, CLIENT, Address(A, 3478)) is None
    assert server.dropped == 1 and server.answered == 0


@given(st.binary(max_size=200), st.booleans())
def test_whatever_comes_is_answered_well_or_not_at_all(data: bytes, framed: bool) -> None:
    if framed:
        data = request(data[: len(data) & ~3])
    reply = StunServer({A: B}, PORTS).receive(data, CLIENT, Address(A, 3478))
    if reply is not None:
        stun.parse_message(reply.data)
        assert len(reply.data) <= 132
