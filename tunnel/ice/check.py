"""The STUN messages of a connectivity check: built, read, verified, and matched to each other.

::

    request    USERNAME "remote:local", PRIORITY, MESSAGE-INTEGRITY, FINGERPRINT
    response   XOR-MAPPED-ADDRESS, MESSAGE-INTEGRITY, FINGERPRINT

Both are signed with the password of the end that is asked (RFC 8445 sections 7.1.2 and 7.3, RFC
8489 section 9.1). There is neither ICE-CONTROLLING nor USE-CANDIDATE, as there are no roles. A
message that is not exactly this is no error to anybody: the readers return None, and what is not
authentic gets silence instead of the error responses of RFC 8489 section 9.1.3, which would tell
strangers that somebody is here.

Each transmission is a transaction of its own, not a repeated one: its round trip is then known
exactly, however many were asked before. The first 4 bytes of a transaction ID count the requests of
its sender, the other 8 are random. An authentic request that somebody recorded is then known as old
for as long as the session lives; else it could be replayed until nothing else is answered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from aioice import stun

from tunnel.path.network import Address, PathKey

ANSWER_LIFE = 5.0
"""Seconds an answer is waited for, long after its absence was acted on: late, it still proves the
pair. No path that is worth anything is slower."""
TRANSACTION_LENGTH = 12  # RFC 8489 section 5
COUNTER_LENGTH = 4
REPLAY_WINDOW = 1024
"""Requests: ten seconds at the most that a peer may ask, an hour of a quiet session."""

_HEADER = 20
_COOKIE = struct.pack("!I", stun.COOKIE)
_BINDING_REQUEST = b"\x00\x01"
_USERNAME = 0x0006
_PADDING = 0xFFFF
"""No attribute of anybody's: every server ignores it (RFC 8489 section 14). RFC 5780's own PADDING
has the answer padded to the server's MTU, which is then cut on the way and often lost."""
_CHANGE_IP, _CHANGE_PORT = 0x4, 0x2  # section 7.2


@dataclass(frozen=True, slots=True)
class Credentials:
    """The short-term credentials of both ends, as RFC 8445 section 5.3 exchanges them."""

    local_ufrag: str
    local_password: str
    remote_ufrag: str
    remote_password: str


def looks_like_stun(data: bytes) -> bool:
    """Whether a datagram is STUN and not QUIC (RFC 9443 section 3, RFC 8489 section 5)."""
    return (
        len(data) >= _HEADER
        and data[0] <= 3
        and data[4:8] == _COOKIE
        and int.from_bytes(data[2:4]) == len(data) - _HEADER
        and len(data) % 4 == 0
    )


def username_of(data: bytes) -> str | None:
    """The USERNAME of a Binding request, unverified; None for anything else.

    Cheap, because it chooses whose password to verify with, or none at all.
    """
    if not looks_like_stun(data) or data[:2] != _BINDING_REQUEST:
        return None
    position = _HEADER
    while position + 4 <= len(data):
        kind, length = struct.unpack_from("!HH", data, position)
        position += 4
        if kind == _USERNAME:
            try:
                return data[position : position + length].decode()
            except UnicodeDecodeError:
                return None
        position += (length + 3) & ~3
    return None


def transaction_id_of(data: bytes) -> bytes:
    """Of a datagram that looks like STUN."""
    return data[8:_HEADER]


# what is sent


def request(credentials: Credentials, transaction: bytes, priority: int) -> bytes:
    message = stun.Message(
        stun.Method.BINDING,
        stun.Class.REQUEST,
        transaction,
        {
            "USERNAME": f"{credentials.remote_ufrag}:{credentials.local_ufrag}",
            "PRIORITY": priority,
        },
    )
    message.add_message_integrity(credentials.remote_password.encode())
    return bytes(message)


def response(credentials: Credentials, transaction: bytes, mapped: Address) -> bytes:
    message = stun.Message(
        stun.Method.BINDING,
        stun.Class.RESPONSE,
        transaction,
        {"XOR-MAPPED-ADDRESS": tuple(mapped)},
    )
    message.add_message_integrity(credentials.local_password.encode())
    return bytes(message)


def server_request(
    transaction: bytes, *, change_ip: bool = False, change_port: bool = False, size: int = 0
) -> bytes:
    """A question to a public server (RFC 8489 section 7.1), which knows no credentials.

    `change_ip` and `change_port`: to be answered from another address of the server (RFC 5780
    section 7.2). `size`: padded to so many bytes, a multiple of 4.
    """
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST, transaction)
    if change_ip or change_port:
        message.attributes["CHANGE-REQUEST"] = change_ip * _CHANGE_IP | change_port * _CHANGE_PORT
    if size:
        return _padded(bytes(message), size)
    message.add_fingerprint()
    return bytes(message)


# what is received


def read_request(data: bytes, credentials: Credentials) -> int | None:
    """The PRIORITY of an authentic request to us, else None."""
    message = _parse(data, stun.Class.REQUEST)
    if message is None or not _authentic(message, credentials.local_password):
        return None
    if (
        message.attributes.get("USERNAME")
        != f"{credentials.local_ufrag}:{credentials.remote_ufrag}"
    ):
        return None
    priority: int | None = message.attributes.get("PRIORITY")
    return priority


def read_response(data: bytes, credentials: Credentials) -> Address | None:
    """Where the peer saw our request come from, of an authentic response; else None."""
    message = _parse(data, stun.Class.RESPONSE)
    if message is None or not _authentic(message, credentials.remote_password):
        return None
    return _mapped(message)


def read_server_response(data: bytes) -> Address | None:
    """Where a public server saw our request come from. An error response is None, too."""
    message = _parse(data, stun.Class.RESPONSE)
    return None if message is None else _mapped(message)


def read_other_address(data: bytes) -> Address | None:
    """The server's other address, of the response of one that can do RFC 5780 (section 7.4)."""
    message = _parse(data, stun.Class.RESPONSE)
    other = None if message is None else message.attributes.get("OTHER-ADDRESS")
    return Address(*other) if other is not None and other[1] > 0 else None


def is_request(data: bytes) -> bool:
    """Whether a datagram that looks like STUN is a question, and not an answer to one."""
    return data[:2] == _BINDING_REQUEST


class Transactions:
    """Questions without an answer so far: on which pair, and when."""

    def __init__(self, draw: Callable[[int], bytes]) -> None:
        """`draw` makes random bytes: an answer off the path has to guess them."""
        self._draw = draw
        self._count = 0
        self._asked: dict[bytes, tuple[PathKey, float]] = {}

    def __contains__(self, transaction: bytes) -> bool:
        return transaction in self._asked

    def open(self, path: PathKey, now: float) -> bytes:
        transaction = self._count.to_bytes(COUNTER_LENGTH)
        transaction += self._draw(TRANSACTION_LENGTH - COUNTER_LENGTH)
        self._count = (self._count + 1) % 2 ** (8 * COUNTER_LENGTH)
        self._asked[transaction] = (path, now)
        return transaction

    def asked_at(self, transaction: bytes, path: PathKey) -> float | None:
        """None when it was asked on another pair (RFC 8445 section 7.2.5.2.1), or never."""
        asked = self._asked.get(transaction)
        return asked[1] if asked is not None and asked[0] == path else None

    def close(self, transaction: bytes) -> None:
        del self._asked[transaction]

    def forget(self, path: PathKey) -> None:
        """A pair is gone: should it come back, answers from before say nothing of it."""
        self._asked = {t: asked for t, asked in self._asked.items() if asked[0] != path}

    def expire(self, now: float) -> None:
        for transaction, (_, at) in list(self._asked.items()):
            if now - at < ANSWER_LIFE:
                break  # in the order they were asked in
            del self._asked[transaction]

    def clear(self) -> None:
        """The count goes on: the peer may not know yet that a session began."""
        self._asked.clear()


class Freshness(Enum):
    NEW = "new"
    COPY = "copy"  # it came before on another pair: one of the two was forwarded by somebody
    OLD = "old"  # it came before on this pair, or is too old to tell


class Heard:
    """The peer's latest requests, to know copies of them."""

    def __init__(self) -> None:
        self._newest = -1
        self._paths: dict[int, PathKey] = {}

    def judge(self, transaction: bytes, path: PathKey) -> Freshness:
        """Of an authentic request; one that is new is remembered."""
        number = int.from_bytes(transaction[:COUNTER_LENGTH])
        first = self._paths.get(number)
        if first is not None:
            return Freshness.OLD if first == path else Freshness.COPY
        if number <= self._newest - REPLAY_WINDOW:
            return Freshness.OLD
        self._paths[number] = path
        self._newest = max(self._newest, number)
        if len(self._paths) >= 2 * REPLAY_WINDOW:
            oldest = self._newest - REPLAY_WINDOW
            self._paths = {n: p for n, p in self._paths.items() if n > oldest}
        return Freshness.NEW


def _padded(message: bytes, size: int) -> bytes:
    """With one more attribute, which fills it up."""
    value = size - len(message) - 4
    header = message[:2] + struct.pack("!H", size - _HEADER) + message[4:]
    return header + struct.pack("!HH", _PADDING, value) + bytes(value)


def _parse(data: bytes, message_class: stun.Class) -> stun.Message | None:
    """A Binding message of this class. A fingerprint, if there is one, is good."""
    if not looks_like_stun(data):
        return None
    try:
        message = stun.parse_message(data)
    except (ValueError, struct.error):  # an attribute that is too short is the latter
        return None
    if (
        message.message_method is not stun.Method.BINDING
        or message.message_class is not message_class
    ):
        return None
    return message


def _authentic(message: stun.Message, password: str) -> bool:
    # RFC 8445 section 7.1.3 wants a fingerprint on every check; parse_message does not.
    return "FINGERPRINT" in message.attributes and message.check_message_integrity(
        password.encode()
    )


def _mapped(message: stun.Message) -> Address | None:
    mapped = message.attributes.get("XOR-MAPPED-ADDRESS")
    return Address(*mapped) if mapped is not None and mapped[1] > 0 else None
