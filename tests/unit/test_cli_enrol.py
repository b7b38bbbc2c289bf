"""Inviting and joining on the command line: what two of them do to one file at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cli import invite
from cli.enrol import open_host
from cli.invite import Options, _Inviting
from tunnel.config import load
from tunnel.config_edit import Rendezvous
from tunnel.identity import Identity
from tunnel.membership import Terms, admit
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import JoinAsked, Wishes

OPTIONS = Options(
    config="mt0",
    rendezvous=(),
    username=None,
    password_file=None,
    ca_file=None,
    name=None,
    peer_name=None,
    ipv4=False,
    ipv4_network=None,
    stun=(),
    turn=(),
    turn_user=None,
    turn_password_file=None,
    share_relay=True,
    routes=(),
    up=False,
)


@pytest.mark.parametrize("new", [True, False])
def test_two_who_join_at_once_by_two_invitations_are_both_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    def slowly(*arguments: Any) -> Any:
        admitted = admit(*arguments)
        time.sleep(0.05)
        return admitted

    def decide(name: str) -> None:
        key = Identity.generate().public_key.raw
        wishes = Wishes(addresses=(inner_address(key),))
        host, _ = open_host(str(file), "home")
        inviting = _Inviting(host, terms, OPTIONS)
        welcomes.append(inviting._decide(JoinAsked(key, name, wishes)))

    file = tmp_path / "mt0.toml"
    terms = Terms(rendezvous=Rendezvous(url=("mqtt://broker.example",)), ipv4=True)
    welcomes: list[Any] = []
    if not new:
        decide("first")
    monkeypatch.setattr(invite, "admit", slowly)
    with ThreadPoolExecutor() as threads:
        list(threads.map(decide, ["laptop", "phone"]))
    peers = {peer.name for peer in load(file).peers}
    assert peers == ({"laptop", "phone"} if new else {"first", "laptop", "phone"})
    given = [address for welcome in welcomes for address in welcome.assigned]
    assert len({*given}) == len(given) == len(peers)
