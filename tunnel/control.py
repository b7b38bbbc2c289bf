"""The messages of the control stream (client-initiated bidirectional stream 0), and its framing.

::

    frame   = length (4 bytes, big-endian, 1 to 4096), then that many bytes of body
    body    = one MessagePack map; its key "type" names the message

A message of unknown type and an unknown field in a known message are ignored, so that either end
may be newer. Everything else that does not fit is malformed: `ControlError`, upon which the
connection is closed with `ApplicationError.MALFORMED_CONTROL`. Strings are bounded and printable,
because they end up in logs and on terminals.
"""

from __future__ import annotations

import re
from enum import IntEnum
from ipaddress import ip_address
from typing import Annotated, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, Struct

from tunnel.config import Endpoint
from tunnel.errors import PeerError

MAX_MESSAGE = 4096
"""Bytes of a body. The largest of today, a Hello and a Candidates with full lists, stay below."""
_PREFIX = 4

BOOT_ID_LENGTH = 16
PROTOCOL_VERSION = 1
BENCH_SECRET_LENGTH = 16
BENCH_SECONDS = 60
"""Longest life of what a Bench asks for."""

_FEATURE = re.compile(r"[a-z0-9._-]{1,32}")


class ApplicationError(IntEnum):
    """Codes of our CONNECTION_CLOSE frames of type 0x1d (RFC 9000 section 20.2)."""

    NO_ERROR = 0
    MALFORMED_CONTROL = 1  # the control stream broke the rules of this module
    DUPLICATE = 2  # both ends dialled, and the other connection survives
    REPLACED = 3  # a newer connection of the same peer took over (restart, fresh handshake)
    GOODBYE = 4  # one end shuts down, as its Goodbye said
    UNSUPPORTED_VERSION = 5  # the Hello names a version that is not spoken here


class ControlError(PeerError):
    """The peer's control stream is malformed; `problem` is the reason to close with."""

    code: Final = ApplicationError.MALFORMED_CONTROL


_Token: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class _Message(Struct, frozen=True, tag=str.lower, tag_field="type"):
    """Constructing a message with bad content raises ValueError; decoding one, ControlError."""


class Hello(_Message, frozen=True):
    """The first message, of either end."""

    version: Annotated[int, Meta(ge=1, le=65535)]
    features: Annotated[tuple[str, ...], Meta(max_length=32)]
    """Names of what this end understands beyond the version, such as "copies"."""
    addresses: Annotated[tuple[str, ...], Meta(max_length=32)]
    """This end's addresses inside the tunnel: IP literals without prefix length."""
    boot_id: Annotated[bytes, Meta(min_length=BOOT_ID_LENGTH, max_length=BOOT_ID_LENGTH)]
    """Random for each start of the process: a new one tells a restart from a second dial."""

    def __post_init__(self) -> None:
        for feature in self.features:
            if not _FEATURE.fullmatch(feature):
                raise ValueError("a feature is not a short lower-case name")
        for address in self.addresses:
            _check_inner(address)


class Observed(_Message, frozen=True):
    """The address that the other end is seen at, "192.0.2.1:4117" or "[2001:db8::1]:4117"."""

    address: Annotated[str, Meta(max_length=64)]

    def __post_init__(self) -> None:
        _check_outer(self.address)


class CandidateEntry(Struct, frozen=True):
    """One of the addresses in `Candidates`."""

    address: Annotated[str, Meta(max_length=64)]
    """As in `Observed`."""
    kind: Literal["host", "srflx", "prflx", "relay"]
    """How it was learnt (RFC 8445 section 4)."""
    rank: Annotated[int, Meta(ge=0, le=255)]
    """The order of its interface at its owner: 0 best."""
    metered: bool

    def __post_init__(self) -> None:
        _check_outer(self.address)


class Candidates(_Message, frozen=True, omit_defaults=True):
    """All addresses at which this end may be reached, the best first.

    Always the whole list, and the newest generation wins: whatever was lost with a connection or
    said twice, two ends can never get out of step, which with "added" and "removed" one forgotten
    message would do for good. A list is 2.8 kB at the most, and rare.
    """

    generation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    """Grows with each list of a connection."""
    candidates: Annotated[tuple[CandidateEntry, ...], Meta(max_length=32)]
    hard: bool | None = None
    """Whether this end is behind a NAT that maps each destination to another port."""


class Ping(_Message, frozen=True):
    """To be answered by a Pong with the same token."""

    token: _Token


class Pong(_Message, frozen=True):
    """The answer to a Ping."""

    token: _Token


class Goodbye(_Message, frozen=True):
    """This end shuts down. `hold` asks the other one to keep the tunnel up for a return."""

    reason: Annotated[str, Meta(max_length=256)]
    hold: bool = False

    def __post_init__(self) -> None:
        if not self.reason.isprintable():
            raise ValueError("the reason is not printable text")


class Bench(_Message, frozen=True):
    """`martlet bench`: please serve a load to me. To be answered by a BenchReply.

    Only to a peer whose Hello has the feature "bench".
    """

    token: _Token
    address: str
    """The address inside the tunnel to serve at, one of the receiver's own."""
    seconds: Annotated[int, Meta(ge=1, le=BENCH_SECONDS)]
    """After which it is over in any case."""

    def __post_init__(self) -> None:
        _check_inner(self.address)


class BenchReply(_Message, frozen=True, tag="bench_reply"):
    """The answer to a Bench: a TCP port and the secret that opens it, or the reason why not."""

    token: _Token
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0: refused."""
    secret: Annotated[bytes, Meta(max_length=BENCH_SECRET_LENGTH)] = b""
    reason: Annotated[str, Meta(max_length=256)] = ""

    def __post_init__(self) -> None:
        if self.port and len(self.secret) != BENCH_SECRET_LENGTH:
            raise ValueError("a bench without a secret")
        if not self.reason.isprintable():
            raise ValueError("the reason is not printable text")


Message: TypeAlias = Hello | Observed | Candidates | Ping | Pong | Goodbye | Bench | BenchReply


class _Envelope(Struct):
    """What every body has; the other keys are skipped."""

    type: str


_ENVELOPE = msgspec.msgpack.Decoder(_Envelope)
_MESSAGE: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_ENCODER = msgspec.msgpack.Encoder()
_KNOWN = frozenset(str(message.__struct_config__.tag) for message in get_args(Message))


def encode(message: Message) -> bytes:
    """One frame. Raises ValueError where the other end would call it malformed."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a control message of {len(body)} bytes; at most {MAX_MESSAGE} fit")
    try:
        _MESSAGE.decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(f"a malformed control message: {error}") from None
    return len(body).to_bytes(_PREFIX) + body


class ControlReader:
    """Cuts a stream into messages. Holds less than one frame between calls."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failure: str | None = None

    def feed(self, data: bytes) -> list[Message]:
        """Take in more of the stream; return the messages that are now complete.

        Raises ControlError at the first malformed one, and ever after: framing is lost then.
        """
        if self._failure is not None:
            raise ControlError(self._failure)
        self._buffer += data
        messages: list[Message] = []
        start = 0
        try:
            while len(self._buffer) - start >= _PREFIX:
                length = int.from_bytes(self._buffer[start : start + _PREFIX])
                if not 1 <= length <= MAX_MESSAGE:
                    raise ControlError(f"a control message of {length} bytes")
                end = start + _PREFIX + length
                if len(self._buffer) < end:
                    break
                message = _decode(bytes(self._buffer[start + _PREFIX : end]))
                if message is not None:
                    messages.append(message)
                start = end
        except ControlError as error:
            self._failure = error.problem
            self._buffer.clear()
            raise
        del self._buffer[:start]
        return messages


def _check_outer(address: str) -> None:
    try:
        known = Endpoint.parse(address).ip is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError("an address is not an IP address and a port")


def _check_inner(address: str) -> None:
    if len(address) > 45 or "%" in address:
        raise ValueError("an inner address is not an IP address")
    try:
        ip_address(address)
    except ValueError:
        raise ValueError("an inner address is not an IP address") from None


def _decode(body: bytes) -> Message | None:
    """The message in a body; None for an unknown type. Raises ControlError."""
    try:
        if _ENVELOPE.decode(body).type not in _KNOWN:
            return None
        return _MESSAGE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The last two are not msgspec's: a string that is no UTF-8, and arrays thousands deep.
        reason = str(error).partition("\n")[0]
        raise ControlError(f"malformed control message: {reason}") from None
