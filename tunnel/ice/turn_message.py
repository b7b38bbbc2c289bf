"""TURN messages (RFC 8656): how they are told apart, built, read, and cut out of a stream.

From a server come two kinds of messages. *ChannelData* has a header of 4 bytes, channel number and
length, and carries a datagram; its first byte is 0x40 to 0x4F. All others are STUN, with a first
byte of 0 or 1. In a stream (TCP, TLS) each begins at a multiple of 4 bytes, so that ChannelData is
padded there; as a datagram it need not be (section 12.4).

aioice's codec knows the attributes that its own client uses. Those that it lacks are added to its
tables here, and nowhere else.
"""

from __future__ import annotations

import struct
from enum import Enum
from hashlib import md5
from typing import Any

from aioice import stun

from tunnel.obstacle import Reason
from tunnel.path.network import Address

FIRST_CHANNEL, LAST_CHANNEL = 0x4000, 0x4FFF  # RFC 8656 section 12
CHANNEL_HEADER = struct.Struct("!HH")
STUN_HEADER = 20  # RFC 8489 section 5
UDP_PROTOCOL = 17 << 24  # REQUESTED-TRANSPORT: a protocol number and 3 reserved bytes
FAMILY_IPV4, FAMILY_IPV6 = 1, 2  # RFC 8656 section 18.6

_COOKIE = struct.pack("!I", stun.COOKIE)


def _pack_family(value: int) -> bytes:
    return bytes((value, 0, 0, 0))


def _unpack_family(data: bytes) -> int:
    if len(data) != 4:
        raise ValueError("an address family has 4 bytes")
    return data[0]


for _entry in (
    (0x0017, "REQUESTED-ADDRESS-FAMILY", _pack_family, _unpack_family),  # RFC 8656 section 18.6
    (0x8023, "ALTERNATE-SERVER", stun.pack_address, stun.unpack_address),  # RFC 8489 section 14.15
):
    stun.ATTRIBUTES_BY_TYPE.setdefault(_entry[0], _entry)
    stun.ATTRIBUTES_BY_NAME.setdefault(_entry[1], _entry)


class Problem(Enum):
    """Why there is no allocation, as far as it matters to what is done next."""

    NO_ANSWER = "no answer"
    CREDENTIALS = "credentials"
    REFUSED = "refused"  # for good, as far as anybody can tell
    FULL = "full"  # for now
    UNSUPPORTED = "unsupported"
    MISMATCH = "mismatch"  # another port may do at once
    MOVED = "moved"  # to another server


REASONS: dict[Problem, Reason] = {
    Problem.NO_ANSWER: "timeout",
    Problem.CREDENTIALS: "login",
    Problem.FULL: "quota",
    Problem.UNSUPPORTED: "unsupported",
}
"""What can be done about it; of the others, nothing in general."""

ERRORS: dict[int, tuple[Problem, str]] = {
    300: (Problem.MOVED, "the server names another one in its place"),
    400: (Problem.REFUSED, "the server calls the request malformed"),
    401: (Problem.CREDENTIALS, "the server refuses the user name or the password"),
    403: (Problem.REFUSED, "the server forbids this"),
    420: (Problem.UNSUPPORTED, "the server does not know an attribute that is needed"),
    437: (Problem.MISMATCH, "the server does not know the allocation, or knows this port already"),
    438: (Problem.REFUSED, "the server calls every nonce stale"),
    440: (Problem.UNSUPPORTED, "the server has no relays of this address family"),
    441: (Problem.MISMATCH, "the server says that the allocation was made by another user"),
    442: (Problem.UNSUPPORTED, "the server does not relay UDP"),
    443: (Problem.UNSUPPORTED, "the relay is of another address family than the peer"),
    486: (Problem.FULL, "the user has reached the number of relays that the server grants"),
    508: (Problem.FULL, "the server has no room for another relay"),
}
"""By code (RFC 8656 section 19, RFC 8489 section 14.8): what it means, in the user's words."""

NEEDS_CREDENTIALS = "the server wants a user name and a password, and none are configured"
NO_ANSWER = "no answer from the server"


def explain(code: int, *, configured: bool = True) -> tuple[Problem, str]:
    """An error code in words; `configured`: whether there is a user name."""
    if code == 401 and not configured:
        return Problem.CREDENTIALS, NEEDS_CREDENTIALS
    known = ERRORS.get(code)
    if known is None:
        problem = Problem.FULL if code >= 500 else Problem.REFUSED
        return problem, f"the server answers with error {code}"
    return known[0], f"{known[1]} (error {code})"


def long_term_key(username: str, realm: str, password: str) -> bytes:
    """RFC 8489 section 9.2.2; MD5 is the algorithm of every server that offers no other."""
    return md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


def request(
    method: stun.Method, transaction: bytes, attributes: dict[str, Any], key: bytes | None
) -> bytes:
    """A request; signed when there is a key."""
    message = stun.Message(method, stun.Class.REQUEST, transaction, attributes)
    if key is None:
        message.add_fingerprint()
    else:
        message.add_message_integrity(key)
    return bytes(message)


def send_indication(transaction: bytes, remote: Address, data: bytes) -> bytes:
    """A datagram for `remote` that needs no channel (RFC 8656 section 11.1)."""
    message = stun.Message(
        stun.Method.SEND,
        stun.Class.INDICATION,
        transaction,
        {"XOR-PEER-ADDRESS": tuple(remote), "DATA": data},
    )
    return bytes(message)


def parse(data: bytes) -> stun.Message | None:
    """A STUN message, or None for what is none, or has an attribute that is not well-formed."""
    if len(data) < STUN_HEADER or data[4:8] != _COOKIE:
        return None
    try:
        return stun.parse_message(data)
    except (ValueError, struct.error):  # an attribute that is too short is the latter
        return None


class FramingError(ValueError):
    """What comes out of the stream is not TURN."""


def cut(stream: memoryview) -> tuple[list[memoryview], int]:
    """The messages that are complete, without their padding, and how many bytes they took.

    Raises FramingError where no message can begin as the stream goes on.
    """
    found: list[memoryview] = []
    position, end = 0, len(stream)
    while end - position >= CHANNEL_HEADER.size:
        first, length = CHANNEL_HEADER.unpack_from(stream, position)
        if first < FIRST_CHANNEL:
            cookie = stream[position + 4 : position + 8]
            if length % 4 or not _COOKIE.startswith(cookie):
                raise FramingError("this is no STUN message")
            size = padded = STUN_HEADER + length
        elif first <= LAST_CHANNEL:
            size = CHANNEL_HEADER.size + length
            padded = (size + 3) & ~3
        else:
            raise FramingError(f"no message begins with {first:#06x}")
        if end - position < padded:
            break
        found.append(stream[position : position + size])
        position += padded
    return found, position


def channel_data(channel: int, data: bytes, *, padded: bool) -> bytes:
    """One datagram in a channel (RFC 8656 section 12.4)."""
    padding = b"\0" * (-len(data) % 4) if padded else b""
    return b"".join((CHANNEL_HEADER.pack(channel, len(data)), data, padding))


def addresses_of(relayed: Any, *, ipv6: bool) -> Address | None:
    """A relayed address as an `Address`, if it is one of the family that was asked for."""
    if relayed is None or (":" in relayed[0]) != ipv6 or not relayed[1]:
        return None
    return Address(*relayed)
