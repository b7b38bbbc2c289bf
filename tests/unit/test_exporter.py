"""Both ends, and nobody else, derive the same keying material."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes

from tests.unit.quic_pair import Pair
from tunnel.quic.exporter import Exporter

LABEL = b"EXPORTER-test"


def test_both_ends_export_the_same() -> None:
    pair = Pair.established()
    client, server = pair.client.connection, pair.server.connection
    assert client.export(LABEL, b"client", 32) == server.export(LABEL, b"client", 32)


def test_label_context_length_and_connection_all_count() -> None:
    one = Pair.established().client.connection
    two = Pair.established().client.connection
    found = {
        one.export(LABEL, b"client", 32),
        one.export(LABEL, b"server", 32),
        one.export(b"EXPORTER-other", b"client", 32),
        one.export(LABEL, b"client", 16),
        two.export(LABEL, b"client", 32),
    }
    assert len(found) == 5


def test_nothing_before_the_handshake() -> None:
    pair = Pair()
    with pytest.raises(RuntimeError, match="handshake"):
        pair.client.connection.export(LABEL, b"", 16)


def test_the_construction_of_rfc_8446() -> None:
    """Against the definition, written out with plain HMAC (RFC 8446 sections 7.1 and 7.5)."""
    import hashlib
    import hmac

    def expand_label(secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
        info = length.to_bytes(2) + bytes([6 + len(label)]) + b"tls13 " + label
        info += bytes([len(context)]) + context
        out, block, count = b"", b"", 1
        while len(out) < length:
            block = hmac.digest(secret, block + info + bytes([count]), "sha256")
            out, count = out + block, count + 1
        return out[:length]

    secret = bytes(range(32))
    derived = expand_label(secret, LABEL, hashlib.sha256(b"").digest(), 32)
    wanted = expand_label(derived, b"exporter", hashlib.sha256(b"context").digest(), 40)
    assert Exporter(hashes.SHA256(), secret).export(LABEL, b"context", 40) == wanted
