"""tunnel.shell.config_file: the old file or the whole new one, whatever happens."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from tunnel.errors import ConfigError, LocalError, PrivilegeError
from tunnel.shell import config_file
from tunnel.shell.config_file import check_writable, identity_beside, replace, write_secret


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_and_an_old_one(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    replace(file, "one\n")
    assert (file.read_text(), mode(file)) == ("one\n", 0o644)
    file.chmod(0o640)
    replace(file, "zwei äöü\n")
    assert (file.read_text(), mode(file)) == ("zwei äöü\n", 0o640)
    write_secret(tmp_path / "secret", "geheim")
    assert ((tmp_path / "secret").read_text(), mode(tmp_path / "secret")) == ("geheim\n", 0o600)
    (tmp_path / "secret").chmod(0o644)
    write_secret(tmp_path / "secret", "geheim")
    assert mode(tmp_path / "secret") == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mt0.toml", "secret"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_owner_stays_the_owner(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text("old")
    os.chown(file, 4711, 4712)
    replace(file, "new")
    assert (file.stat().st_uid, file.stat().st_gid) == (4711, 4712)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "config"
    real.write_text("old")
    link = tmp_path / "mt0.toml"
    link.symlink_to(real)
    check_writable(link)
    replace(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


@pytest.mark.parametrize("where", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, where, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else LocalError
    with pytest.raises(expected) as caught:
        replace(file, "new")
    if expected is LocalError:
        assert str(caught.value) == f"cannot write {file}: No space left on device"
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["mt0.toml"]


def test_what_cannot_be_written_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "mt0.toml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LocalError, match=f"mkdir -p {tmp_path}/nowhere"):
        check_writable(tmp_path / "nowhere" / "mt0.toml")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match=r"mt0\.toml: Permission denied; run as root"):
        check_writable(tmp_path / "mt0.toml")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(LocalError) as caught:  # an immutable file, a read-only mount
        check_writable(tmp_path / "mt0.toml")
    assert not isinstance(caught.value, PrivilegeError)


def test_the_default_directory_is_made_and_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "CONFIG_DIRECTORY", tmp_path / "martlet")
    check_writable(tmp_path / "martlet" / "mt0.toml")
    assert mode(tmp_path / "martlet") == 0o700


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path, identity = identity_beside(tmp_path / "mt0.toml")
    assert (path, mode(path)) == (tmp_path / "id_ed25519", 0o600)
    assert identity_beside(tmp_path / "mt5.toml")[1].public_key == identity.public_key
    path.write_text("nonsense")
    with pytest.raises(ConfigError):
        identity_beside(tmp_path / "mt0.toml")
