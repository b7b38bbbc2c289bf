"""Who a host is: an Ed25519 key in OpenSSH's formats, and the certificate that TLS wants around it.

Peers are pinned by public key, as in SSH. The certificate is a mere envelope: self-signed, always
the same for a key, and without meaning in its names and dates.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from tunnel.errors import ConfigError, LocalError
from tunnel.private_file import read_private

KEY_TYPE = "ssh-ed25519"
_BLOB_PREFIX = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"  # RFC 8709 section 4
_KEY_FILE_LIMIT = 16384
"""Bytes; an Ed25519 key file is about 400, the largest RSA one about 12,000."""

# Certificate dates never matter: the key is what is pinned. The range spans every clock, also one
# that starts in 1970, and ends at RFC 5280's "no expiration" (section 4.1.2.5).
_NOT_BEFORE = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

_DERIVE_SALT = b"martlet/1 identity"
"""Keeps derived secrets apart from those of any other program that uses the same key file."""


@dataclass(frozen=True, order=True, slots=True)
class PublicKey:
    """An Ed25519 public key. Equality, order and hash are those of the 32 raw bytes."""

    raw: bytes
    comment: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(self.raw)}")

    @classmethod
    def parse(cls, line: str) -> PublicKey:
        """Parse an OpenSSH public key line, "ssh-ed25519 AAAA... comment". Raises ValueError."""
        text = line.strip()
        if not text:
            raise ValueError("the public key is empty")
        if "PRIVATE KEY" in text:
            raise ValueError("this is a private key; keep it secret, and give the public one")
        if not text.isprintable():
            raise ValueError("a public key is one line of text")
        kind, _, rest = text.partition(" ")
        blob, _, comment = rest.strip().partition(" ")
        if kind != KEY_TYPE:
            raise ValueError(f"{_shorten(kind)} is not supported; only {KEY_TYPE} keys are")
        try:
            data = base64.b64decode(blob, validate=True)
        except ValueError:  # binascii.Error is one, and text beyond ASCII raises a plain one
            raise ValueError("the key is not valid base64; was it cut off?") from None
        if not data.startswith(_BLOB_PREFIX) or len(data) != len(_BLOB_PREFIX) + 32:
            raise ValueError(f"the key is not a complete {KEY_TYPE} key; was it cut off?")
        return cls(data[len(_BLOB_PREFIX) :], comment.strip())

    @classmethod
    def from_key(cls, key: Ed25519PublicKey, comment: str = "") -> PublicKey:
        """From a key of `cryptography`, as a certificate holds it."""
        return cls(key.public_bytes_raw(), comment)

    @property
    def key(self) -> Ed25519PublicKey:
        """As a key of `cryptography`."""
        return Ed25519PublicKey.from_public_bytes(self.raw)

    @property
    def openssh(self) -> str:
        """The line of an OpenSSH .pub file, without a line end."""
        blob = base64.b64encode(_BLOB_PREFIX + self.raw).decode()
        return f"{KEY_TYPE} {blob} {self.comment}".rstrip()

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: "SHA256:" and unpadded base64."""
        digest = hashlib.sha256(_BLOB_PREFIX + self.raw).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return self.openssh


class Identity:
    """This host's key pair and all that follows from it."""

    def __init__(self, private_key: Ed25519PrivateKey, comment: str = "") -> None:
        self.private_key = private_key
        self.public_key = PublicKey.from_key(private_key.public_key(), comment)

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read an OpenSSH private key file.

        Raises ConfigError, with the command that mends it, when the file is missing, unreadable,
        open to others, encrypted, or not an Ed25519 key in OpenSSH format.
        """
        data = _read_key_file(path)
        make_one = "make one with `martlet keygen PATH`"
        try:
            key = serialization.load_ssh_private_key(data, password=None)
        except TypeError:
            # What cryptography raises when a passphrase is needed and none was given.
            raise ConfigError(
                "the private key is encrypted, and a tunnel has nobody to ask for a passphrase",
                file=path,
                remedy=f"remove it with `ssh-keygen -p -N '' -f {path}`",
            ) from None
        except UnsupportedAlgorithm:
            raise ConfigError(
                "the private key is of a kind that is not supported; only Ed25519 keys are",
                file=path,
                remedy=make_one,
            ) from None
        except ValueError:
            raise ConfigError(
                "this is not a private key in OpenSSH format", file=path, remedy=make_one
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            kind = type(key).__name__.lstrip("_").removesuffix("PrivateKey")
            raise ConfigError(
                f"the private key is an {kind} key; only Ed25519 keys are supported",
                file=path,
                remedy=make_one,
            )
        return cls(key)

    def save(self, path: str | Path) -> None:
        """Write the private key (OpenSSH format, mode 0600) to a new file.

        Raises LocalError when the file exists already, or cannot be written.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise LocalError(
                f"{path} exists already, and a key is never overwritten",
                remedy="choose another path, or move the old key away",
            ) from None
        except OSError as error:
            raise LocalError(f"cannot write {path}: {error.strerror}") from None
        try:
            with open(fd, "wb") as file:
                file.write(self.private_bytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.unlink(path)  # half a key is worse than none: it would also block the next try
            raise LocalError(f"cannot write {path}: {error.strerror}") from None

    def private_bytes(self) -> bytes:
        """The private key in OpenSSH's PEM format, unencrypted."""
        return self.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )

    @cached_property
    def certificate(self) -> x509.Certificate:
        """Self-signed; the same bytes for the same key, on any host and at any time."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "martlet")])
        # RFC 5280 section 4.1.2.2: positive and at most 20 octets.
        serial = int.from_bytes(hashlib.sha256(self.public_key.raw).digest()[:16]) | 1
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.private_key.public_key())
            .serial_number(serial)
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .sign(self.private_key, algorithm=None)
        )

    def derive(self, label: bytes, length: int) -> bytes:
        """`length` secret bytes for a purpose named by `label`: HKDF-SHA256 (RFC 5869).

        Stable across restarts; knowing one tells nothing about another label's, or the key.
        """
        hkdf = HKDF(hashes.SHA256(), length, salt=_DERIVE_SALT, info=label)
        return hkdf.derive(self.private_key.private_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity({self.public_key.fingerprint})"


def _read_key_file(path: str | Path) -> bytes:
    """The content of a file that nobody but its owner can read. Raises ConfigError."""
    data = read_private(
        path,
        "private key",
        limit=_KEY_FILE_LIMIT,
        missing=f"make one with `martlet keygen {path}`",
        others="use this private key",
    )
    if len(data) > _KEY_FILE_LIMIT:
        raise ConfigError("this file is too large for a key", file=path, remedy="name a key file")
    return data


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
