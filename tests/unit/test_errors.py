"""What errors say, and how the process exits."""

from __future__ import annotations

import pytest

from tunnel.errors import (
    ConfigError,
    LocalError,
    MartletError,
    NetworkError,
    PeerError,
    PrivilegeError,
    UnreachableError,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (LocalError, 1),
        (PeerError, 1),
        (NetworkError, 1),
        (ConfigError, 3),
        (PrivilegeError, 4),
        (UnreachableError, 5),
    ],
)
def test_exit_codes(kind: type[MartletError], code: int) -> None:
    error = kind("it broke", remedy="mend it")
    assert error.exit_code == code
    assert str(error) == "it broke; mend it"
    assert str(kind("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("bad"), "bad"),
        (ConfigError("bad", file="a.toml"), "a.toml: bad"),
        (ConfigError("bad", file="a.toml", line=3), "a.toml:3: bad"),
        (
            ConfigError("bad", file="a.toml", line=3, key="peer[1].name"),
            "a.toml:3: peer[1].name: bad",
        ),
        (ConfigError("bad", key="mtu", remedy="fix"), "mtu: bad; fix"),
    ],
)
def test_config_error_names_the_place(error: ConfigError, text: str) -> None:
    assert str(error) == text
