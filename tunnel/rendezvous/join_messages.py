"""What an inviter and a joiner tell each other, inside the seal: MessagePack maps.

::

    joiner  -> inviter   join      key, nonce, MAC of the secret, name, wishes
                         thanks    key
    inviter -> joiner    welcome   echo of the nonce, all that a configuration needs
                         refused   echo of the nonce, reason

What comes from the other end gets into a configuration file and onto a terminal, so every value is
parsed as strictly as if a user had written it there, and bounded. A message that is not exactly
like this is None to the reader. Unknown fields are ignored, so that either end may be newer.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from tunnel.config import Endpoint, IPInterface, IPNetwork
from tunnel.config_values import (
    check_peer_name,
    check_turn_url,
    parse_interface_address,
    parse_network,
)
from tunnel.rendezvous.code import MAX_URLS, check_url
from tunnel.rendezvous.messages import NONCE_LENGTH

MAX_ADDRESSES = 8
MAX_NETWORKS = 32
MAX_STUN = 8
MAX_TURN = 4
MAX_DETAIL = 200  # characters of a reason in words

_KEY = 32
_MAC = 32
_CONTEXT = b"martlet/1 join\0"

_Key = Annotated[bytes, Meta(min_length=_KEY, max_length=_KEY)]
_Mac = Annotated[bytes, Meta(min_length=_MAC, max_length=_MAC)]
_Nonce = Annotated[bytes, Meta(min_length=NONCE_LENGTH, max_length=NONCE_LENGTH)]
_Text = Annotated[str, Meta(max_length=255)]


class Reason(StrEnum):
    """Why an invitation is worth nothing any more."""

    USED = "used"  # somebody joined by it
    EXPIRED = "expired"
    FAILED = "failed"  # too many tried who did not know its secret
    REFUSED = "refused"  # the inviter did not want this joiner, or could not have it


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a joiner has and wants. Constructing one with too much raises ValueError."""

    addresses: tuple[IPInterface, ...]
    """Its own inside the tunnel; single ones (/128, /32)."""
    wants_ipv4: bool = False
    clashes: tuple[IPNetwork, ...] = ()
    """Networks in use where it is, out of which it cannot have an address."""

    def __post_init__(self) -> None:
        _bounded(self.addresses, MAX_ADDRESSES)
        _bounded(self.clashes, MAX_NETWORKS)
        for address in self.addresses:
            _single(str(address))


@dataclass(frozen=True, slots=True)
class TurnServer:
    """A TURN server and what it asks for."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_turn_url(_visible(self.url))
        if (self.username is None) != (self.password is None):
            raise ValueError("a user name and a password go together")
        for text in (self.username, self.password):
            if text is not None and not (len(text) <= 255 and text.isprintable()):
                raise ValueError("a user name or a password is not short printable text")


@dataclass(frozen=True, slots=True)
class Welcome:
    """All that a joiner needs for its configuration, beside the inviter's key, which it knows.

    Constructing one that breaks a limit raises ValueError.
    """

    name: str
    """What the inviter calls itself."""
    addresses: tuple[IPInterface, ...]
    """The inviter's own inside the tunnel; single ones (/128, /32)."""
    assigned: tuple[IPInterface, ...] = ()
    """The joiner's, beside those that it has; single ones."""
    rendezvous: tuple[str, ...] = ()
    """URLs of the brokers."""
    stun: tuple[Endpoint, ...] = ()
    turn: tuple[TurnServer, ...] = ()
    routes: tuple[IPNetwork, ...] = ()
    """Networks behind the inviter, for who asks for them (`--accept-routes`) and nobody else."""

    def __post_init__(self) -> None:
        check_peer_name(self.name)
        _bounded(self.addresses, MAX_ADDRESSES)
        _bounded(self.assigned, MAX_ADDRESSES)
        _bounded(self.rendezvous, MAX_URLS)
        _bounded(self.stun, MAX_STUN)
        _bounded(self.turn, MAX_TURN)
        _bounded(self.routes, MAX_NETWORKS)
        if not self.addresses:
            raise ValueError("an inviter without an address inside the tunnel")
        for address in (*self.addresses, *self.assigned):
            _single(str(address))
        for url in self.rendezvous:
            check_url(url)


@dataclass(frozen=True, slots=True)
class Join:
    """Please let me in."""

    key: bytes
    """The joiner's raw public key."""
    nonce: bytes
    mac: bytes = field(repr=False)
    name: str
    wishes: Wishes


@dataclass(frozen=True, slots=True)
class Thanks:
    """The Welcome has arrived."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The inviter's."""

    echo: bytes
    content: Welcome | Refused


@dataclass(frozen=True, slots=True)
class Refused:
    """The invitation does not let us in, and why; `detail` are words of the inviter's."""

    reason: Reason
    detail: str = ""

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL or not self.detail.isprintable():
            raise ValueError("the words of a refusal are not short printable text")


def mac_of(secret: bytes, inviter: bytes, joiner: bytes, nonce: bytes) -> bytes:
    """Shows that a joiner knows the secret, without telling it."""
    return hmac.digest(secret, _CONTEXT + inviter + joiner + nonce, hashlib.sha256)


# on the wire


class _JoinWire(Struct, frozen=True, tag="join", tag_field="type"):
    key: _Key
    nonce: _Nonce
    mac: _Mac
    name: _Text
    addresses: Annotated[tuple[_Text, ...], Meta(max_length=MAX_ADDRESSES)]
    wants_ipv4: bool
    clashes: Annotated[tuple[_Text, ...], Meta(max_length=MAX_NETWORKS)]


class _ThanksWire(Struct, frozen=True, tag="thanks", tag_field="type"):
    key: _Key


class _TurnWire(Struct, frozen=True):
    url: _Text
    username: _Text | None
    password: _Text | None


class _WelcomeWire(Struct, frozen=True, tag="welcome", tag_field="type"):
    echo: _Nonce
    name: _Text
    addresses: Annotated[tuple[_Text, ...], Meta(max_length=MAX_ADDRESSES)]
    assigned: Annotated[tuple[_Text, ...], Meta(max_length=MAX_ADDRESSES)]
    rendezvous: Annotated[tuple[_Text, ...], Meta(max_length=MAX_URLS)]
    stun: Annotated[tuple[_Text, ...], Meta(max_length=MAX_STUN)]
    turn: Annotated[tuple[_TurnWire, ...], Meta(max_length=MAX_TURN)]
    routes: Annotated[tuple[_Text, ...], Meta(max_length=MAX_NETWORKS)] = ()


class _RefusedWire(Struct, frozen=True, tag="refused", tag_field="type"):
    echo: _Nonce
    reason: _Text
    detail: _Text = ""


_ENCODER = msgspec.msgpack.Encoder()
_FROM_JOINER: msgspec.msgpack.Decoder[_JoinWire | _ThanksWire] = msgspec.msgpack.Decoder(
    _JoinWire | _ThanksWire
)
_FROM_INVITER: msgspec.msgpack.Decoder[_WelcomeWire | _RefusedWire] = msgspec.msgpack.Decoder(
    _WelcomeWire | _RefusedWire
)

FromJoiner: TypeAlias = Join | Thanks
_T = TypeVar("_T")


def encode_join(join: Join) -> bytes:
    """As it is signed."""
    wishes = join.wishes
    return _ENCODER.encode(
        _JoinWire(
            key=join.key,
            nonce=join.nonce,
            mac=join.mac,
            name=join.name,
            addresses=_texts(wishes.addresses),
            wants_ipv4=wishes.wants_ipv4,
            clashes=_texts(wishes.clashes),
        )
    )


def encode_thanks(thanks: Thanks) -> bytes:
    """As it is signed."""
    return _ENCODER.encode(_ThanksWire(thanks.key))


def encode_answer(answer: Answer) -> bytes:
    """As it is signed."""
    content = answer.content
    if isinstance(content, Refused):
        return _ENCODER.encode(
            _RefusedWire(answer.echo, reason=content.reason.value, detail=content.detail)
        )
    return _ENCODER.encode(
        _WelcomeWire(
            echo=answer.echo,
            name=content.name,
            addresses=_texts(content.addresses),
            assigned=_texts(content.assigned),
            rendezvous=content.rendezvous,
            stun=_texts(content.stun),
            turn=tuple(_TurnWire(each.url, each.username, each.password) for each in content.turn),
            routes=_texts(content.routes),
        )
    )


def decode_joiner(body: bytes) -> FromJoiner | None:
    """A message to the inviter; None when it is malformed."""

    def read() -> FromJoiner:
        wire = _FROM_JOINER.decode(body)
        if isinstance(wire, _ThanksWire):
            return Thanks(wire.key)
        wishes = Wishes(
            addresses=tuple(map(_single, wire.addresses)),
            wants_ipv4=wire.wants_ipv4,
            clashes=tuple(map(parse_network, wire.clashes)),
        )
        return Join(wire.key, wire.nonce, wire.mac, check_peer_name(wire.name), wishes)

    return _reading(read)


def decode_inviter(body: bytes) -> Answer | None:
    """A message to the joiner; None when it is malformed."""

    def read() -> Answer:
        wire = _FROM_INVITER.decode(body)
        if isinstance(wire, _RefusedWire):
            known = wire.reason in set(Reason)
            reason = Reason(wire.reason) if known else Reason.REFUSED
            return Answer(wire.echo, Refused(reason, wire.detail))
        welcome = Welcome(
            name=wire.name,
            addresses=tuple(map(_single, wire.addresses)),
            assigned=tuple(map(_single, wire.assigned)),
            rendezvous=wire.rendezvous,
            stun=tuple(map(Endpoint.parse, wire.stun)),
            turn=tuple(TurnServer(each.url, each.username, each.password) for each in wire.turn),
            routes=tuple(map(parse_network, wire.routes)),
        )
        return Answer(wire.echo, welcome)

    return _reading(read)


def _reading(read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except (ValueError, RecursionError):  # DecodeError and UnicodeDecodeError are ValueErrors
        return None


def _texts(values: Sequence[object]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _bounded(values: Sequence[object], limit: int) -> None:
    if len(values) > limit:
        raise ValueError(f"{len(values)} values where {limit} are the most")


def _single(text: str) -> IPInterface:
    """One address, with its full prefix length: anything wider would be a route."""
    address = parse_interface_address(text)
    if address.network.prefixlen != address.max_prefixlen or "/" not in text:
        raise ValueError("this is more than one address")
    return address


def _visible(text: str) -> str:
    if not (text.isascii() and text.isprintable() and len(text) <= 255) or " " in text:
        raise ValueError("this is not a URL of visible ASCII characters")
    return text
