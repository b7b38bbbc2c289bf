"""Keying material that only the two ends of a connection have (RFC 8446 section 7.5)."""

from dataclasses import dataclass

from aioquic import tls
from cryptography.hazmat.primitives import hashes


@dataclass(frozen=True, slots=True)
class Exporter:
    """The exporter of one connection. `secret` is the exporter_master_secret."""

    algorithm: hashes.HashAlgorithm
    secret: bytes

    @classmethod
    def at_server_finished(cls, schedule: tls.KeySchedule) -> "Exporter":
        """From a key schedule whose transcript ends with the server's Finished."""
        return cls(schedule.algorithm, schedule.derive_secret(b"exp master"))

    def export(self, label: bytes, context: bytes, length: int) -> bytes:
        """`length` bytes for this purpose and context."""
        secret = self._expand(self.secret, label, b"", self.algorithm.digest_size)
        return self._expand(secret, b"exporter", context, length)

    def _expand(self, secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
        digest = hashes.Hash(self.algorithm)
        digest.update(context)
        return tls.hkdf_expand_label(self.algorithm, secret, label, digest.finalize(), length)
