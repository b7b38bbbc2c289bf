"""tunnel.shell.reload: the file is read again, the interface changed, the rest told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from tests.unit.test_config_change import HOME, INTERFACE, KEYS, OFFICE
from tun.apply import Applied
from tun.errors import TunError
from tun.plan import AddRoute, Step
from tunnel.config import load
from tunnel.errors import ConfigError, LocalError
from tunnel.identity import PublicKey
from tunnel.shell.reload import Reloader, plan_of

OWN = PublicKey.parse(KEYS[2])


class Kernel:
    """`Applied`, remembered."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, ...]] = []
        self.failure: Exception | None = None

    def change(self, steps: Iterable[Step]) -> None:
        if self.failure is not None:
            raise self.failure
        self.steps.append(tuple(steps))


def reloader(file: Path, kernel: Kernel) -> Reloader:
    return Reloader(load(file), OWN, cast(Applied, kernel))


def test_only_what_is_new_is_told(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text(INTERFACE + OFFICE)
    kernel = Kernel()
    live = reloader(file, kernel)
    assert not live.take()
    assert kernel.steps == []
    file.write_text(INTERFACE + OFFICE + HOME.replace("10.88.0.3/32", "10.99.0.0/16"))
    assert [peer.name for peer in live.take().added] == ["home"]
    assert kernel.steps == [plan_of(load(file))]
    assert [str(s.network) for s in kernel.steps[0] if isinstance(s, AddRoute)] == ["10.99.0.0/16"]
    assert not live.take()


def test_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background the working directory is another; relative paths mean what they did."""
    monkeypatch.chdir(tmp_path)
    Path("mt0.toml").write_text(INTERFACE + OFFICE)
    live = reloader(Path("mt0.toml"), Kernel())
    monkeypatch.chdir("/")
    (tmp_path / "mt0.toml").write_text(INTERFACE + OFFICE + HOME)
    assert [peer.name for peer in live.take().added] == ["home"]
    (tmp_path / "mt0.toml").write_text(INTERFACE + OFFICE + "nonsense")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/mt0\.toml:1\d: "):
        live.take()


def test_what_cannot_be_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text(INTERFACE + OFFICE)
    kernel = Kernel()
    live = reloader(file, kernel)
    file.write_text(INTERFACE + OFFICE + HOME.replace(KEYS[1], KEYS[2]))
    with pytest.raises(ConfigError, match="the key of peer home is this host's own"):
        live.take()
    file.write_text(INTERFACE + "mtu = 1400\n" + OFFICE + HOME)
    with pytest.raises(ConfigError, match=rf"{file}: .*interface\.mtu"):
        live.take()
    file.write_text(INTERFACE + OFFICE + HOME)
    kernel.failure = TunError("conflict", "there is a route already")
    with pytest.raises(TunError):
        live.take()
    assert kernel.steps == []
    kernel.failure = None
    assert live.take().added  # it was not forgotten
    file.unlink()
    with pytest.raises(ConfigError, match="no such"):
        live.take()


def test_without_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text(INTERFACE + OFFICE)
    config = msgspec.structs.replace(load(file), file=None)
    with pytest.raises(LocalError, match="not started from a file"):
        Reloader(config, OWN, cast(Applied, Kernel())).take()
