"""What a broker gets to see: topics that only two hosts can compute, and sealed messages.

A topic names a pair of hosts and the one that speaks: HKDF of the X25519 secret of their two
identities. Whoever knows both public keys but neither private one cannot compute it, and whoever
sees it learns nothing. A message is sealed to the receiver (an X25519 box with an ephemeral key),
and inside signed by the sender with its Ed25519 identity, over everything that says where it
belongs: a broker can neither read it, nor make one, nor move one to another topic. That it is not
an old one is `meeting`'s business.

Ed25519 keys become X25519 keys by the birational map of RFC 7748 section 4.1, as libsodium has it.
"""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.bindings import crypto_scalarmult
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox
from nacl.public import PublicKey as BoxKey
from nacl.signing import SigningKey, VerifyKey

from tunnel.identity import Identity

TOPIC_PREFIX = "martlet/1/"
TOPIC_LENGTH = 16
"""Bytes, 26 characters of base32: nobody meets another pair's by chance, or by trying."""
MAX_MESSAGE = 4096
"""Bytes of a sealed message: what a broker has to allow."""
BLOCK = 256
"""Messages are padded to a multiple: how many addresses a host has is nobody's business."""

_SALT = b"martlet/1 rendezvous"
_SIGNATURE = 64
_SEAL = 48  # an ephemeral key and an authenticator


MAX_BODY = MAX_MESSAGE - _SEAL - _SIGNATURE - 2
"""Bytes that can be sealed."""


class Speaker:
    """This host's private key, as the rendezvous uses it."""

    def __init__(self, identity: Identity) -> None:
        self.public = identity.public_key.raw
        self._signing = SigningKey(identity.private_key.private_bytes_raw())
        self._boxing: PrivateKey = self._signing.to_curve25519_private_key()

    def topic(self, peer: bytes, sender: bytes, purpose: bytes) -> str:
        """Where `sender`, one of the two, speaks to the other. Raises ValueError for a bad key."""
        secret = crypto_scalarmult(bytes(self._boxing), bytes(_box_key(peer)))
        return topic_of(secret, purpose + sender)

    def can_reach(self, peer: bytes) -> bool:
        """Whether this is a key that can be spoken to: a point of the right group. One that is not
        may still make signatures that verify."""
        try:
            _box_key(peer)
        except ValueError:
            return False
        return True

    def seal(self, peer: bytes, context: bytes, body: bytes) -> bytes:
        """Sign, pad and seal `body` for `peer`. Raises ValueError when it is too long."""
        signature = self._signing.sign(_signed(context, self.public, peer, body)).signature
        plain = len(body).to_bytes(2) + signature + body
        plain += bytes(-(len(plain) + _SEAL) % BLOCK)
        if len(plain) + _SEAL > MAX_MESSAGE:
            raise ValueError(f"{len(body)} bytes are too long for a message")
        return bytes(SealedBox(_box_key(peer)).encrypt(plain))

    def open(self, peer: bytes, context: bytes, data: bytes) -> bytes | None:
        """The body, if it is sealed to us and signed by `peer` in this context; else None."""
        body = self.unseal(data)
        return None if body is None else verify(peer, self.public, context, *body)

    def unseal(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Signature and body of what is sealed to us, by whomever; None if it is not."""
        if not data or len(data) > MAX_MESSAGE or len(data) % BLOCK:
            return None
        try:
            plain = SealedBox(self._boxing).decrypt(data)
        except CryptoError:
            return None
        length = int.from_bytes(plain[:2])
        body = plain[2 + _SIGNATURE : 2 + _SIGNATURE + length]
        return (plain[2 : 2 + _SIGNATURE], body) if len(body) == length else None


def verify(
    sender: bytes, receiver: bytes, context: bytes, signature: bytes, body: bytes
) -> bytes | None:
    """The body, if `sender` signed it for `receiver` in this context; else None."""
    try:
        VerifyKey(sender).verify(_signed(context, sender, receiver, body), signature)
    except (CryptoError, ValueError):
        return None
    return body


def topic_of(secret: bytes, info: bytes) -> str:
    """A topic from a secret (RFC 5869)."""
    raw = HKDF(hashes.SHA256(), TOPIC_LENGTH, salt=_SALT, info=info).derive(secret)
    return topic_name(raw)


def topic_name(raw: bytes) -> str:
    """As MQTT wants it."""
    return TOPIC_PREFIX + base64.b32encode(raw).decode().rstrip("=").lower()


def _box_key(peer: bytes) -> BoxKey:
    try:
        return VerifyKey(peer).to_curve25519_public_key()
    except (CryptoError, RuntimeError) as error:
        raise ValueError("this is no Ed25519 public key") from error


def _signed(context: bytes, sender: bytes, receiver: bytes, body: bytes) -> bytes:
    """All keys have 32 bytes, and a context ends with a zero, so that it has one reading only."""
    return context + b"\0" + sender + receiver + body
