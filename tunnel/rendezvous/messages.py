"""What two hosts tell each other by way of a broker, inside the seal: a MessagePack map.

Strings and lists are bounded, addresses are literals, and unknown fields are ignored, as on the
control stream (`tunnel.control`), of which the candidates are borrowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tunnel.control import BOOT_ID_LENGTH, CandidateEntry
from tunnel.ice.candidate import Candidate, candidate_of, entry_of

NONCE_LENGTH = 16  # bytes
MAX_CANDIDATES = 32

_TOPIC = re.compile(r"martlet/1/[a-z2-7]{26}")
_ICE_CHARS = re.compile(r"[A-Za-z0-9+/]{4,64}")  # RFC 8839 section 5.4; longer ones are never ours

_BootId = Annotated[bytes, Meta(min_length=BOOT_ID_LENGTH, max_length=BOOT_ID_LENGTH)]
_Nonce = Annotated[bytes, Meta(min_length=NONCE_LENGTH, max_length=NONCE_LENGTH)]


@dataclass(frozen=True, slots=True)
class Offer:
    """Where its sender may be found, and the credentials of checks there."""

    ufrag: str
    password: str
    generation: int
    """Of the candidates: grows with each list of a process."""
    candidates: tuple[Candidate, ...]
    hard: bool | None = None
    """Whether it is behind a NAT that maps each destination to another port; None: not known."""


@dataclass(frozen=True, slots=True)
class Word:
    """One message of a peer."""

    boot_id: bytes
    sequence: int
    """Grows with each message of a boot."""
    nonce: bytes
    """The sender's, for the receiver to echo."""
    echo: bytes
    """The receiver's, or empty."""
    ask: bool
    """Whether the sender wants an answer, because it knows nothing fresh of the receiver."""
    presence: str
    """The topic of the sender's last will."""
    offer: Offer


class _Wire(Struct, frozen=True, omit_defaults=True):
    boot: _BootId
    seq: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    nonce: _Nonce
    echo: Annotated[bytes, Meta(max_length=NONCE_LENGTH)]
    ask: bool
    presence: Annotated[str, Meta(max_length=64)]
    ufrag: Annotated[str, Meta(max_length=64)]
    password: Annotated[str, Meta(max_length=64)]
    generation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    candidates: Annotated[tuple[CandidateEntry, ...], Meta(max_length=MAX_CANDIDATES)]
    hard: bool | None = None

    def __post_init__(self) -> None:
        if not _TOPIC.fullmatch(self.presence):
            raise ValueError("a last will has no such topic")
        if not (_ICE_CHARS.fullmatch(self.ufrag) and _ICE_CHARS.fullmatch(self.password)):
            raise ValueError("credentials are of ice-chars")


_DECODER = msgspec.msgpack.Decoder(_Wire)
_ENCODER = msgspec.msgpack.Encoder()


def encode(word: Word) -> bytes:
    """As it is signed."""
    offer = word.offer
    return _ENCODER.encode(
        _Wire(
            boot=word.boot_id,
            seq=word.sequence,
            nonce=word.nonce,
            echo=word.echo,
            ask=word.ask,
            presence=word.presence,
            ufrag=offer.ufrag,
            password=offer.password,
            generation=offer.generation,
            candidates=tuple(map(entry_of, offer.candidates)),
            hard=offer.hard,
        )
    )


def decode(body: bytes) -> Word | None:
    """None when it is malformed."""
    try:
        wire = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    candidates = tuple(map(candidate_of, wire.candidates))
    offer = Offer(wire.ufrag, wire.password, wire.generation, candidates, wire.hard)
    return Word(wire.boot, wire.seq, wire.nonce, wire.echo, wire.ask, wire.presence, offer)
