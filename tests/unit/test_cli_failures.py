"""Every kind of trouble has its exit code, and no traceback."""

import pytest

from cli.failures import UsageError, explain, wants_traceback
from tun.errors import Kind, TunError
from tunnel.errors import ConfigError, LocalError, PrivilegeError, UnreachableError


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ConfigError("bad key", file="/x.toml", line=3), "/x.toml:3: bad key", 3),
        (LocalError("port in use", remedy="free it"), "port in use; free it", 1),
        (PrivilegeError("no"), "no", 4),
        (UnreachableError("no path"), "no path", 5),
        (UsageError("say more"), "say more", 2),
        (KeyboardInterrupt(), "", 130),
        (BrokenPipeError(), "", 1),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; run as root", 4),
        (OSError(28, "No space left on device"), "No space left on device", 1),
        (KeyError("x"), "internal error: KeyError: 'x'; MARTLET_DEBUG=1 shows where", 1),
    ],
)
def test_explain(error: BaseException, message: str, code: int) -> None:
    said, exit_code = explain(error)
    assert said.startswith(message)
    assert exit_code == code


@pytest.mark.parametrize(
    ("kind", "code"),
    [("privilege", 4), ("missing", 1), ("busy", 1), ("foreign", 1), ("name", 3), ("gone", 1)],
)
def test_trouble_with_the_device(kind: Kind, code: int) -> None:
    assert explain(TunError(kind, "what to do")) == ("what to do", code)


def test_developers_may_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARTLET_DEBUG", raising=False)
    assert not wants_traceback()
    monkeypatch.setenv("MARTLET_DEBUG", "1")
    assert wants_traceback()
