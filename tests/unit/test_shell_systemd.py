"""sd_notify."""

import socket
from pathlib import Path

import pytest

from tunnel.shell import systemd


def test_nothing_without_a_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify(systemd.READY)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_state_arrives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name if kind == "path" else "\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", name if kind == "path" else "@" + name)
        systemd.notify(systemd.READY)
        assert manager.recv(99) == b"READY=1"


def test_a_manager_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (str(tmp_path / "nobody"), "relative", "@"):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        systemd.notify(systemd.STOPPING)
