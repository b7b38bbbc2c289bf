"""The door: who gets an answer to a first packet at all, and at what price.

A first Initial whose token does not begin with the right MAC gets silence: no answer, no state.
The MAC is keyed by our public key, which only people we gave it to know, over the destination
connection ID, so that it cannot be moved to another packet. When many handshakes are half open,
the address must first be proved by a Retry (RFC 9000 section 8.1.2).
"""

import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass

from aioquic.buffer import Buffer
from aioquic.quic.packet import (
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    pull_quic_header,
)
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tunnel.path.network import Address

CONNECTION_ID_LENGTH = 8
MAC_LENGTH = 16
MIN_INITIAL = 1200  # bytes of a datagram with an Initial (RFC 9000 section 14.1)
RETRY_LIFETIME = 10.0  # seconds
RETRY_ABOVE = 32
"""Half-open handshakes above which an address must prove itself first."""
MAX_HALF_OPEN = 256
RESET_LENGTH = 41
"""Bytes of a stateless reset: looks like a short packet (RFC 9000 section 10.3)."""
MIN_RESET_LENGTH = 21  # RFC 9000 section 10.3; a PING of ours is 29 bytes long

_NONCE = 12


@dataclass(frozen=True, slots=True)
class Header:
    """The invariant part of a datagram's first packet."""

    destination_cid: bytes
    is_long: bool
    is_initial: bool = False
    source_cid: bytes = b""
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A handshake may begin; what the transport parameters must name."""

    original_destination_cid: bytes
    retry_source_cid: bytes | None


def read_header(data: bytes) -> Header | None:
    """The header of a QUIC v1 datagram; None for anything else (RFC 9443 section 2)."""
    if not data or not data[0] & 0x40:
        return None
    if not data[0] & 0x80:
        if len(data) < MIN_RESET_LENGTH:
            return None
        return Header(data[1 : 1 + CONNECTION_ID_LENGTH], is_long=False)
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_LENGTH)
    except ValueError:
        return None
    if header.version != QuicProtocolVersion.VERSION_1:
        return None  # no version negotiation with strangers
    return Header(
        header.destination_cid,
        is_long=True,
        is_initial=header.packet_type is QuicPacketType.INITIAL,
        source_cid=header.source_cid,
        token=header.token,
    )


def token_maker(acceptor_key: bytes) -> Callable[[bytes], bytes]:
    """For dialling the holder of this raw public key: connection ID -> token."""

    def make(destination_cid: bytes) -> bytes:
        mac = hmac.digest(acceptor_key, b"martlet initial" + destination_cid, "sha256")
        return mac[:MAC_LENGTH]

    return make


class Door:
    """Judges first Initials. `secret` (16 bytes) seals Retry tokens, `own_key` is our raw key."""

    def __init__(self, own_key: bytes, secret: bytes) -> None:
        self._make_token = token_maker(own_key)
        self._seal = AESGCM(secret)

    def judge(
        self,
        header: Header,
        size: int,
        remote: Address,
        *,
        now: float,
        half_open: int,
        fresh: Callable[[int], bytes],
    ) -> Admitted | bytes | None:
        """`Admitted`, the Retry datagram to answer with, or None for silence.

        `size` is the datagram's, in bytes; `fresh(n)` gives n random bytes.
        """
        if not header.is_initial or size < MIN_INITIAL:
            return None
        if not 8 <= len(header.destination_cid) <= 20:
            return None
        if hmac.compare_digest(header.token[:MAC_LENGTH], self._make_token(header.destination_cid)):
            if half_open < RETRY_ABOVE:
                return Admitted(header.destination_cid, None)
            return self._retry(header, remote, now, fresh)
        if half_open >= MAX_HALF_OPEN:
            return None
        return self._open_retry_token(header, remote, now)

    def _retry(
        self, header: Header, remote: Address, now: float, fresh: Callable[[int], bytes]
    ) -> bytes:
        source_cid = fresh(CONNECTION_ID_LENGTH)
        nonce = fresh(_NONCE)
        sealed = self._seal.encrypt(
            nonce, struct.pack("!d", now) + header.destination_cid, _bound_to(remote, source_cid)
        )
        return encode_quic_retry(
            version=QuicProtocolVersion.VERSION_1,
            source_cid=source_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=nonce + sealed,
        )

    def _open_retry_token(self, header: Header, remote: Address, now: float) -> Admitted | None:
        if len(header.token) < _NONCE + 16 + 8 + 8:
            return None
        try:
            plain = self._seal.decrypt(
                header.token[:_NONCE],
                header.token[_NONCE:],
                _bound_to(remote, header.destination_cid),
            )
        except InvalidTag:
            return None
        (issued,) = struct.unpack("!d", plain[:8])
        if not 0 <= now - issued <= RETRY_LIFETIME:
            return None
        return Admitted(plain[8:], header.destination_cid)


def stateless_reset(token: bytes, trigger: int, fresh: Callable[[int], bytes]) -> bytes | None:
    """A datagram that says: this connection is unknown here (RFC 9000 section 10.3).

    Always shorter than the one of `trigger` bytes that it answers, so that no loop arises; None
    where that leaves too little.
    """
    length = min(RESET_LENGTH, trigger - 1)
    if length < MIN_RESET_LENGTH:
        return None
    noise = fresh(length - len(token))
    return bytes((0x40 | noise[0] & 0x3F,)) + noise[1:] + token


def _bound_to(remote: Address, cid: bytes) -> bytes:
    return str(remote).encode() + b"|" + cid
