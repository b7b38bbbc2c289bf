"""The messages of PCP (RFC 6887, the MAP opcode) and of its predecessor NAT-PMP (RFC 6886).

::

    PCP      2 | opcode | 0        | lifetime | client's address     | nonce | protocol | internal
                                                                      port | external port, address
    answer   2 | opcode + 128 | 0 | result | lifetime | epoch | 0     | the same, as assigned

    NAT-PMP  0 | 0                                   what is the external address?
             0 | 1 | 0 | internal port | external port | lifetime
    answer   0 | 128 | result | epoch | address
             0 | 129 | result | epoch | internal port | external port | lifetime

Both go to UDP port 5351 of the gateway, and a gateway that knows one only says so in an answer of
its own version. Lifetimes are seconds; a lifetime of 0 deletes. The epoch counts the seconds since
the gateway lost its mappings. Nothing here raises on what was received: what is not exactly one of
these answers is None.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from tunnel.path.network import Address

PORT = 5351  # RFC 6887 section 19.1
ANNOUNCE_PORT = 5350  # where clients hear of a restarted gateway, on this group:
ANNOUNCE_GROUP = "224.0.0.1"  # RFC 6887 section 14.1.1, RFC 6886 section 3.2.1
NONCE_LENGTH = 12  # RFC 6887 section 11.1
LARGEST = 1100  # bytes of a PCP message (RFC 6887 section 7)

_PCP, _NATPMP = 2, 0  # versions
_ANNOUNCE, _MAP = 0, 1  # opcodes of PCP
_ASK_ADDRESS, _MAP_UDP = 0, 1  # opcodes of NAT-PMP
_ANSWER = 0x80
_UDP = 17

_PCP_REQUEST = struct.Struct("!BBxxI16s")
_PCP_ANSWER = struct.Struct("!BBxBII12x")
_PCP_MAP = struct.Struct("!12sBxxxHH16s")
_NATPMP_MAP = struct.Struct("!BBxxHHI")
_NATPMP_ADDRESS_ANSWER = struct.Struct("!BBHI4s")
_NATPMP_MAP_ANSWER = struct.Struct("!BBHIHHI")


@dataclass(frozen=True, slots=True)
class Mapped:
    """The answer to a request for a mapping. A `result` that is not 0 refuses it."""

    result: int
    epoch: int
    internal: int
    lifetime: int
    port: int
    """The external one."""
    host: str = ""
    """The external address; NAT-PMP tells it in another answer."""
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class External:
    """NAT-PMP's answer to the question for the external address; also announced when it changes."""

    result: int
    epoch: int
    host: str


@dataclass(frozen=True, slots=True)
class Announced:
    """A PCP gateway says that it is there, after a restart in particular."""

    epoch: int


@dataclass(frozen=True, slots=True)
class OtherVersion:
    """The gateway does not speak the version it was asked in."""


Answer = Mapped | External | Announced | OtherVersion


# what is sent


def pcp_map(base: Address, nonce: bytes, *, lifetime: int, host: str = "", port: int = 0) -> bytes:
    """Ask for a mapping of the UDP port `base`, if possible to this external address and port."""
    anywhere = "::" if base.is_ipv6 else "0.0.0.0"
    return _PCP_REQUEST.pack(_PCP, _MAP, lifetime, _wide(base.host)) + _PCP_MAP.pack(
        nonce, _UDP, base.port, port, _wide(host or anywhere)
    )


def pcp_announce(host: str) -> bytes:
    """Ask whether there is a PCP gateway, for nothing else; `host` is our address."""
    return _PCP_REQUEST.pack(_PCP, _ANNOUNCE, 0, _wide(host))


def natpmp_address() -> bytes:
    """Ask for the external address."""
    return bytes([_NATPMP, _ASK_ADDRESS])


def natpmp_map(internal: int, *, lifetime: int, external: int) -> bytes:
    """Ask for a mapping of a UDP port of ours, if possible to the `external` one."""
    return _NATPMP_MAP.pack(_NATPMP, _MAP_UDP, internal, external, lifetime)


# what is received


def read(data: bytes) -> Answer | None:
    """An answer of a gateway, in either version."""
    if len(data) < 2 or len(data) > LARGEST or not data[1] & _ANSWER:
        return None
    opcode = data[1] & ~_ANSWER
    if data[0] == _PCP:
        return _read_pcp(data, opcode)
    if data[0] == _NATPMP:
        return _read_natpmp(data, opcode)
    return OtherVersion()


def _read_pcp(data: bytes, opcode: int) -> Answer | None:
    if len(data) < _PCP_ANSWER.size:
        return None
    _, _, result, lifetime, epoch = _PCP_ANSWER.unpack_from(data)
    if opcode == _ANNOUNCE:
        return Announced(epoch)
    if opcode != _MAP or len(data) < _PCP_ANSWER.size + _PCP_MAP.size:
        return None
    nonce, protocol, internal, port, host = _PCP_MAP.unpack_from(data, _PCP_ANSWER.size)
    if protocol != _UDP:
        return None
    return Mapped(result, epoch, internal, lifetime, port, _narrow(host), nonce)


def _read_natpmp(data: bytes, opcode: int) -> Answer | None:
    if opcode == _ASK_ADDRESS and len(data) >= _NATPMP_ADDRESS_ANSWER.size:
        _, _, result, epoch, host = _NATPMP_ADDRESS_ANSWER.unpack_from(data)
        return External(result, epoch, str(IPv4Address(host)))
    if opcode == _MAP_UDP and len(data) >= _NATPMP_MAP_ANSWER.size:
        _, _, result, epoch, internal, port, lifetime = _NATPMP_MAP_ANSWER.unpack_from(data)
        return Mapped(result, epoch, internal, lifetime, port)
    # To a request of PCP, whose first bytes it cannot read otherwise (RFC 6887 section 9).
    return OtherVersion() if len(data) >= 4 else None


def _wide(host: str) -> bytes:
    """RFC 6887 section 5: 16 bytes, IPv4 as IPv4-mapped IPv6."""
    ip = ip_address(host)
    return ip.packed if isinstance(ip, IPv6Address) else b"\0" * 10 + b"\xff\xff" + ip.packed


def _narrow(packed: bytes) -> str:
    ip = IPv6Address(packed)
    return str(ip.ipv4_mapped or ip)
