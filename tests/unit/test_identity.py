"""Keys in OpenSSH's formats, checked against OpenSSH's own tools where they are installed."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tunnel.errors import ConfigError, LocalError
from tunnel.identity import Identity, PublicKey

FIXED = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), "a comment")

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"
)


def ssh_keygen(*arguments: str | Path) -> str:
    return subprocess.run(
        ["ssh-keygen", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def write_private(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


# Public keys


def test_public_key_round_trip() -> None:
    line = FIXED.public_key.openssh
    parsed = PublicKey.parse(f"  {line}\n")
    assert parsed == FIXED.public_key
    assert parsed.comment == "a comment"
    assert parsed.openssh == str(parsed) == line
    assert PublicKey.from_key(parsed.key) == parsed


def test_public_key_is_its_bytes() -> None:
    small, large = PublicKey(b"\x00" * 32, "z"), PublicKey(b"\xff" * 32, "a")
    assert small < large
    assert small == PublicKey(b"\x00" * 32, "other comment")
    assert len({small, PublicKey(b"\x00" * 32)}) == 1
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        PublicKey(b"\x00" * 31)


BLOB = FIXED.public_key.openssh.split()[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "empty"),
        ("ssh-ed25519", "cut off"),
        (f"ssh-ed25519 {BLOB[:-1]}", "cut off"),
        (f"ssh-ed25519 {BLOB[:-4]}", "cut off"),
        (f"ssh-ed25519 {base64.b64encode(base64.b64decode(BLOB) + b'x').decode()}", "complete"),
        ("ssh-ed25519 AAAA!", "base64"),
        ("ssh-ed25519 ÄÄÄÄ", "base64"),
        (f"ssh-rsa {BLOB}", "ssh-rsa is not supported"),
        (f'from="*" ssh-ed25519 {BLOB}', "is not supported"),
        (f"ssh-ed25519 {BLOB} a\nssh-ed25519 {BLOB} b", "one line"),
        (f"ssh-ed25519 {BLOB} \x1b[31m", "one line"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
    ],
)
def test_public_key_refused(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PublicKey.parse(line)


@needs_ssh_keygen
def test_fingerprint_is_openssh_s(tmp_path: Path) -> None:
    file = tmp_path / "key.pub"
    file.write_text(FIXED.public_key.openssh + "\n")
    assert ssh_keygen("-l", "-f", file).split()[1] == FIXED.public_key.fingerprint


# Private key files


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "id"
    identity = Identity.generate()
    identity.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = Identity.load(path)
    assert loaded.public_key == identity.public_key
    assert loaded.derive(b"x", 16) == identity.derive(b"x", 16)
    assert repr(loaded) == f"Identity({identity.public_key.fingerprint})"


def test_save_keeps_to_0600_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        FIXED.save(tmp_path / "id")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "id").stat().st_mode) == 0o600


def test_save_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "id"
    path.write_text("precious")
    with pytest.raises(LocalError, match="exists already, and a key is never overwritten"):
        FIXED.save(path)
    assert path.read_text() == "precious"
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "absent")
    with pytest.raises(LocalError, match="exists already"):
        FIXED.save(dangling)
    with pytest.raises(LocalError, match="No such file"):
        FIXED.save(tmp_path / "absent" / "id")


def test_save_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LocalError, match="No space left"):
        FIXED.save(tmp_path / "id")
    assert not (tmp_path / "id").exists()


@needs_ssh_keygen
def test_openssh_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "id"
    FIXED.save(path)
    assert PublicKey.parse(ssh_keygen("-y", "-f", path)) == FIXED.public_key


@needs_ssh_keygen
def test_we_read_openssh_s(tmp_path: Path) -> None:
    path = tmp_path / "id"
    ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", "me@here", "-f", path)
    public = PublicKey.parse(path.with_suffix(".pub").read_text())
    assert Identity.load(path).public_key == public
    assert public.comment == "me@here"


@needs_ssh_keygen
def test_encrypted_key_refused(tmp_path: Path) -> None:
    path = tmp_path / "id"
    ssh_keygen("-q", "-t", "ed25519", "-N", "secret", "-f", path)
    with pytest.raises(ConfigError, match=r"is encrypted.*ssh-keygen -p -N '' -f") as caught:
        Identity.load(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_open_file_refused(tmp_path: Path, mode: int) -> None:
    path = write_private(tmp_path / "id", FIXED.private_bytes())
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        Identity.load(path)


def test_other_keys_refused(tmp_path: Path) -> None:
    def openssh(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )

    path = write_private(tmp_path / "rsa", openssh(rsa.generate_private_key(65537, 2048)))
    with pytest.raises(ConfigError, match=r"an RSA key; only Ed25519.*martlet keygen"):
        Identity.load(path)
    path = write_private(tmp_path / "ec", openssh(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match="only Ed25519"):
        Identity.load(path)


def test_no_key_at_all(tmp_path: Path) -> None:
    path = tmp_path / "id"
    with pytest.raises(ConfigError, match=f"no such private key file.*martlet keygen {path}"):
        Identity.load(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        Identity.load(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        Identity.load(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="cannot read the private key"):
        Identity.load(tmp_path / "loop")
    for content in (b"", b"garbage", FIXED.public_key.openssh.encode(), FIXED.private_bytes()[:99]):
        with pytest.raises(ConfigError, match="not a private key in OpenSSH format"):
            Identity.load(write_private(path, content))
    with pytest.raises(ConfigError, match="too large"):
        Identity.load(write_private(path, b"x" * 20_000))


def test_pkcs8_is_not_openssh(tmp_path: Path) -> None:
    data = FIXED.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(ConfigError, match="not a private key in OpenSSH format"):
        Identity.load(write_private(tmp_path / "id", data))


# What follows from the key


def test_certificate() -> None:
    certificate = FIXED.certificate
    key = certificate.public_key()
    assert PublicKey.from_key(FIXED.private_key.public_key()).raw == FIXED.public_key.raw
    assert key == FIXED.private_key.public_key()
    certificate.verify_directly_issued_by(certificate)
    assert certificate.subject.rfc4514_string() == "CN=martlet"
    assert certificate.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)
    assert certificate.not_valid_after_utc == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert certificate.version is x509.Version.v3


def test_certificate_is_the_same_every_time() -> None:
    again = Identity(FIXED.private_key)
    der = serialization.Encoding.DER
    assert again.certificate.public_bytes(der) == FIXED.certificate.public_bytes(der)
    assert Identity.generate().certificate.serial_number != again.certificate.serial_number


def test_derive() -> None:
    assert len(FIXED.derive(b"reset", 48)) == 48
    assert FIXED.derive(b"reset", 32) == FIXED.derive(b"reset", 32)
    assert FIXED.derive(b"reset", 32) != FIXED.derive(b"retry", 32)
    assert FIXED.derive(b"reset", 32) != Identity.generate().derive(b"reset", 32)
    # Pinned: a change would void every stateless reset token that is out there.
    assert FIXED.derive(b"reset", 8).hex() == "46d88f4021860675"
