"""A STUN server without I/O: says to whoever asks which address it is seen at.

Binding requests of RFC 8489, without authentication, and the discovery of NAT behaviour of RFC 5780
where there is a second address: a request may ask to be answered from the other address, the other
port, or both, and each answer names where it came from and where else to ask.

::

    primary:port   <-- OTHER-ADDRESS -->   alternate:alternate_port
    primary:alternate_port              alternate:port          all four are listened at

What is not a well-formed request gets no answer. An answer goes to where the request came from, and
nowhere else (there is no RESPONSE-PORT), and has less than 100 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from aioice import stun

from tunnel.ice.check import looks_like_stun
from tunnel.path.network import Address

STUN_PORT = 3478  # RFC 8489 section 18.6
CHANGE_IP, CHANGE_PORT = 0x04, 0x02  # RFC 5780 section 7.2

_LARGEST_REQUEST = 548
"""Bytes: what RFC 8489 section 6.1 lets a client send when it does not know the MTU."""
_BINDING_REQUEST = b"\x00\x01"
_CHANGE_REQUEST, _UNKNOWN_ATTRIBUTES, _FINGERPRINT = 0x0003, 0x000A, 0x8028
_IGNORED = frozenset((0x0006, 0x0008, 0x0014, 0x0015, 0x001C, 0x001D, 0x001E, 0x0024, 0x0025))
"""Attributes that a server should understand and may ignore: credentials, and those of ICE. All
from 0x8000 on may be ignored by anybody (RFC 8489 section 14)."""
_HEADER = 20


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the address of ours that it must come from."""

    data: bytes
    local: Address


class StunServer:
    """Answers requests; `alternate` maps an address of ours to the other one (RFC 5780)."""

    def __init__(
        self, alternate: dict[str, str] | None = None, ports: tuple[int, int] | None = None
    ) -> None:
        self._alternate = {**(alternate or {}), **{b: a for a, b in (alternate or {}).items()}}
        self._ports = ports
        self.answered = 0
        self.refused = 0
        """Requests that ask for what we do not know or cannot do."""
        self.dropped = 0

    def receive(self, data: bytes, source: Address, local: Address) -> Reply | None:
        """The answer to a datagram that came from `source` to `local`, if it deserves one."""
        parsed = _parse(data) if len(data) <= _LARGEST_REQUEST else None
        if parsed is None:
            self.dropped += 1
            return None
        attributes, fingerprint = parsed
        other = self._other(local)
        change = 0
        unknown = [k for k in attributes if k < 0x8000 and k not in (*_IGNORED, _CHANGE_REQUEST)]
        if _CHANGE_REQUEST in attributes:
            value = attributes[_CHANGE_REQUEST]
            change = int.from_bytes(value) if len(value) == 4 else 0
            if change & (CHANGE_IP | CHANGE_PORT) and other is None:
                unknown.append(_CHANGE_REQUEST)  # RFC 5780 section 6.1
        transaction = data[8:_HEADER]
        if unknown:
            self.refused += 1
            return Reply(_refusal(transaction, unknown, fingerprint), local)
        origin = local
        answer: dict[str, object] = {"XOR-MAPPED-ADDRESS": tuple(source)}
        if other is not None:
            origin = Address(
                other.host if change & CHANGE_IP else local.host,
                other.port if change & CHANGE_PORT else local.port,
            )
            answer["RESPONSE-ORIGIN"] = tuple(origin)
            answer["OTHER-ADDRESS"] = tuple(other)
        message = stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, transaction, answer)
        if fingerprint:
            message.add_fingerprint()
        self.answered += 1
        return Reply(bytes(message), origin)

    def _other(self, local: Address) -> Address | None:
        """The other address and the other port."""
        host = self._alternate.get(local.host)
        if host is None or self._ports is None or local.port not in self._ports:
            return None
        first, second = self._ports
        return Address(host, second if local.port == first else first)


def _parse(data: bytes) -> tuple[dict[int, bytes], bool] | None:
    """Attributes of a Binding request (each kind's first), and whether a FINGERPRINT vouches."""
    if not looks_like_stun(data) or data[:2] != _BINDING_REQUEST:
        return None
    attributes: dict[int, bytes] = {}
    position = _HEADER
    while position < len(data):
        kind, length = struct.unpack_from("!HH", data, position)
        value = data[position + 4 : position + 4 + length]
        if len(value) != length:
            return None
        if kind == _FINGERPRINT:  # the last one (RFC 8489 section 14.7)
            expected = stun.message_fingerprint(data[:position])
            if length != 4 or int.from_bytes(value) != expected or position + 8 != len(data):
                return None
            return attributes, True
        attributes.setdefault(kind, value)
        position += 4 + length + -length % 4
    return (attributes, False) if position == len(data) else None


def _refusal(transaction: bytes, unknown: list[int], fingerprint: bool) -> bytes:
    """420 (RFC 8489 section 6.3.1), with the list that aioice has no name for."""
    message = stun.Message(
        stun.Method.BINDING,
        stun.Class.ERROR,
        transaction,
        {"ERROR-CODE": (420, "Unknown Attribute")},
    )
    kinds = b"".join(kind.to_bytes(2) for kind in unknown[:16])
    listed = struct.pack("!HH", _UNKNOWN_ATTRIBUTES, len(kinds)) + kinds + bytes(-len(kinds) % 4)
    data = bytes(message) + listed
    data = data[:2] + (len(data) - _HEADER).to_bytes(2) + data[4:]
    if fingerprint:
        data += struct.pack("!HHI", _FINGERPRINT, 4, stun.message_fingerprint(data))
        data = data[:2] + (len(data) - _HEADER).to_bytes(2) + data[4:]
    return data
