"""The list of aioquic's private names is complete, and an unknown version is refused."""

from __future__ import annotations

import re
from pathlib import Path

import aioquic.quic.connection
import pytest
from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoContext, CryptoPair
from aioquic.quic.recovery import QuicPacketSpace

import tunnel.quic
from tunnel.datapath.engine import Datapath
from tunnel.quic import internals
from tunnel.quic.recovery import EngineRecovery

SOURCES = [
    path for path in Path(tunnel.quic.__file__).parent.glob("*.py") if path.name != "internals.py"
]
LISTED = {
    name
    for names in (
        internals.CONNECTION_METHODS,
        internals.CONNECTION_ATTRIBUTES,
        internals.CONTEXT_METHODS,
        internals.CONTEXT_ATTRIBUTES,
        internals.CRYPTO_CONTEXT_ATTRIBUTES,
        internals.CRYPTO_PAIR_METHODS,
        internals.CRYPTO_PAIR_ATTRIBUTES,
        internals.RECOVERY_ATTRIBUTES,
        internals.SPACE_ATTRIBUTES,
    )
    for name in names
}


NEVER_ASKED = {"on_ack_received", "reschedule_data"}
"""Of our recovery: acknowledgements go to the engine, and these data were the handshake's."""

SUBCLASSES: dict[str, object] = {
    "base.py": QuicConnection(configuration=QuicConfiguration()),
    "connection.py": QuicConnection(configuration=QuicConfiguration()),
    "sender.py": QuicConnection(configuration=QuicConfiguration()),
    "mutual_tls.py": tls.Context(is_client=False),
}
"""Modules with a class that derives from one of aioquic's, and that one."""
HELD: list[object] = [
    QuicPacketSpace(),
    QuicConnection(configuration=QuicConfiguration())._loss,
    CryptoPair(),
    CryptoContext(),
]


@pytest.mark.parametrize("module", SUBCLASSES)
def test_every_private_name_in_use_is_listed(module: str) -> None:
    theirs = {
        name
        for owner in [SUBCLASSES[module], *HELD]
        for name in dir(owner)
        if re.match(r"_[a-z]", name)
    }
    text = (Path(tunnel.quic.__file__).parent / module).read_text(encoding="utf-8")
    used = set(re.findall(r"(?:\.|def )(_[a-z]\w*)", text))
    assert used & theirs, "nothing was looked at"
    assert (used & theirs) - LISTED == set()


def test_nothing_is_listed_that_is_not_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert [name for name in sorted(LISTED) if not re.search(rf"\b{name}\b", text)] == []


def test_what_aioquic_asks_of_its_recovery_is_there() -> None:
    """After the handshake the connection has ours in its place."""
    source = Path(aioquic.quic.connection.__file__).read_text(encoding="utf-8")
    asked = set(re.findall(r"self\._loss\.([a-z_]+)", source))
    engine = Datapath().connection()
    engine.add_path(1200, 0.1)
    ours = EngineRecovery(engine, max_ack_delay=0.0, send_probe=lambda: None)
    missing = {name for name in asked if not hasattr(ours, name)}
    assert asked & {"on_packet_sent", "get_probe_timeout"}
    assert missing == NEVER_ASKED


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioquic, "__version__", "1.7.3")
    with pytest.raises(ImportError, match=r"aioquic 1\.7\.2, found 1\.7\.3"):
        internals._check()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (QuicConnection, "_flush_builder"),
        (tls.Context, "_server_handle_certificate"),
        (CryptoPair, "encrypt_packet"),
    ],
)
def test_a_lost_name_is_named(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=f"lacks .*{name}"):
        internals._check()


def test_the_pinned_version_is_the_one_in_pyproject() -> None:
    text = (Path(tunnel.quic.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"aioquic=={internals.PINNED_VERSION}"' in text
    internals._check()
