"""What is announced on a link, so that peers there find each other and nobody else learns who is.

An announcement (in mDNS, the TXT record of a service with a random name) is a salt, and a short tag
for each peer that may be looked for:

    tag = HKDF-SHA256(key of the announcer, key of the peer; salt), 8 bytes

Who knows both public keys can tell that it is meant, and by whom; for others it is noise, and other
noise after each start and on each network. A tag is worth nothing as a proof: whoever heard it can
announce it again. So all that it does is to say where to dial.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

VERSION = b"1"
SALT_LENGTH = 16
TAG_LENGTH = 8
"""Bytes: two tags of strangers are alike once in 2^64."""
MAX_TAGS = 128
"""Peers: as many as fit one packet (RFC 6763 section 6.2). More are not announced to."""
BLOCK = 4
"""Tags: filled up with random ones to a multiple of it, or they would tell the number of peers."""

_STRING_TAGS = 30  # a string of a TXT record has 255 bytes at the most (RFC 6763 section 6.1)
_INFO = b"martlet/1 announcement"

Properties = dict[str, bytes]
"""Of a TXT record."""


def make(own: bytes, peers: Iterable[bytes], rng: random.Random) -> Properties:
    """What to announce to these peers; the keys are raw public keys."""
    salt = rng.randbytes(SALT_LENGTH)
    tags = [_tag(own, peer, salt) for peer in peers][:MAX_TAGS]
    tags += [rng.randbytes(TAG_LENGTH) for _ in range(-len(tags) % BLOCK)]
    tags.sort()  # their order says nothing either
    properties = {"v": VERSION, "s": salt}
    for number, first in enumerate(range(0, len(tags), _STRING_TAGS)):
        properties[f"t{number}"] = b"".join(tags[first : first + _STRING_TAGS])
    return properties


def read(
    properties: Mapping[bytes, bytes | None], own: bytes, peers: Iterable[bytes]
) -> bytes | None:
    """The peer whose announcement this is, if it is one of these and means us."""
    salt = properties.get(b"s")
    if properties.get(b"v") != VERSION or salt is None or len(salt) != SALT_LENGTH:
        return None
    tags: set[bytes] = set()
    for number in range(-(-MAX_TAGS // _STRING_TAGS)):
        text = properties.get(b"t%d" % number) or b""
        tags.update(text[at : at + TAG_LENGTH] for at in range(0, len(text), TAG_LENGTH))
    return next((peer for peer in peers if _tag(peer, own, salt) in tags), None)


def _tag(announcer: bytes, peer: bytes, salt: bytes) -> bytes:
    """Another one in each direction: one's own announcement, sent back, is not the peer's."""
    return HKDF(hashes.SHA256(), TAG_LENGTH, salt=salt, info=_INFO).derive(announcer + peer)
