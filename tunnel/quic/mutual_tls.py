"""Mutual TLS 1.3 pinned to Ed25519 keys; certificates are only envelopes for the keys.

aioquic's server asks for a client certificate only behind a private flag, and then accepts a
missing or an unknown one. This context asks, insists, and compares the key right after the
signature over the handshake was verified (RFC 8446 section 4.4.3), on both roles.
"""

from collections.abc import Callable

from aioquic import tls
from aioquic.buffer import Buffer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

KeyPredicate = Callable[[bytes], bool]
"""Takes the peer's raw 32-byte Ed25519 public key, says whether it may be the other end."""


class PinnedContext(tls.Context):
    """A TLS context that accepts one kind of peer: the holder of an expected Ed25519 key."""

    accepts: KeyPredicate
    peer_key: bytes | None
    refused_key: bytes | None

    @classmethod
    def adopt(cls, context: tls.Context, *, is_client: bool, accepts: KeyPredicate) -> None:
        """Turn aioquic's fresh context into a pinned one (it offers no way to pass one in)."""
        context.__class__ = cls
        assert isinstance(context, cls)
        context.accepts = accepts
        context.peer_key = context.refused_key = None
        context._request_client_certificate = not is_client

    def _check_certificate_verify_signature(self, verify: tls.CertificateVerify) -> None:
        super()._check_certificate_verify_signature(verify)
        assert self._peer_certificate is not None
        key = self._peer_certificate.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise tls.AlertUnsupportedCertificate("an Ed25519 key is required")
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        if not self.accepts(raw):
            self.refused_key = raw
            raise tls.AlertBadCertificate("the public key is not an expected one")
        self.peer_key = raw

    def _server_handle_certificate(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate(input_buf)
        if self._peer_certificate is None:
            raise tls.AlertHandshakeFailure("a client certificate is required")
