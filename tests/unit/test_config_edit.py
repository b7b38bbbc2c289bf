"""tunnel.config_edit: what is added is there, and what was there stays, to the letter."""

from __future__ import annotations

import tomllib
from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import Endpoint, loads
from tunnel.config_edit import (
    Fresh,
    Peer,
    Rendezvous,
    Turn,
    fresh,
    host_name,
    unique_name,
    with_addresses,
    with_peer,
    with_rendezvous,
)
from tunnel.config_values import check_peer_name
from tunnel.errors import ConfigError
from tunnel.identity import Identity, PublicKey

KEY = Identity.generate().public_key.raw
ULA = ip_interface("fd6d:6172:746c::1/128")
PEER = Peer(
    name="laptop",
    public_key=PublicKey(KEY, "laptop"),
    allowed_ips=(ip_network("fd6d:6172:746c::2/128"), ip_network("10.88.0.2/32")),
    comment="Invited on 2026-11-24.",
)
RENDEZVOUS = Rendezvous(url=("mqtts://broker.example:8883",))
OLD = f"""\
# My tunnel.
[interface]
name    = "mt0"   # do not touch
address = [
    "10.88.0.1/24",   # home
    'fd88::1/64'      # and IPv6 ] " '
]
private_key = "/etc/martlet/id_ed25519"

[[peer]]
name = "office"
public_key = "{Identity.generate().public_key.openssh}"
allowed_ips = ["10.88.0.9/32"]
# the end"""


def test_a_new_file_is_what_a_person_would_write() -> None:
    text = fresh(
        Fresh(
            title="Written by `martlet join` on 2026-11-24.",
            interface="mt0",
            address=(ULA, ip_interface("10.88.0.1/24")),
            private_key=Path("/etc/martlet/id_ed25519"),
            rendezvous=Rendezvous(
                url=("mqtts://one.example", "wss://two.example/mqtt"),
                username='al"ice',
                password_file=Path("/etc/martlet/broker"),
                ca_file=Path("/etc/martlet/ca.pem"),
            ),
            stun=(Endpoint("stun.example", 3478),),
            turn=(
                Turn(url="turn:turn.example"),
                Turn(
                    url="turns:turn.example",
                    username="alice",
                    password_file=Path("/etc/martlet/relay"),
                ),
            ),
            peer=PEER,
        )
    )
    config = loads(text, "/etc/martlet/mt0.toml")
    assert config.interface.name == "mt0"
    assert config.interface.address == (ULA, ip_interface("10.88.0.1/24"))
    assert config.interface.private_key == Path("/etc/martlet/id_ed25519")
    assert config.rendezvous is not None
    assert config.rendezvous.url == ("mqtts://one.example", "wss://two.example/mqtt")
    assert config.rendezvous.username == 'al"ice'
    assert config.rendezvous.ca_file == Path("/etc/martlet/ca.pem")
    assert config.ice.stun == (Endpoint("stun.example", 3478),)
    assert [turn.url for turn in config.ice.turn] == ["turn:turn.example", "turns:turn.example"]
    assert config.ice.turn[1].password_file == Path("/etc/martlet/relay")
    (peer,) = config.peers
    assert (peer.name, peer.public_key.comment) == ("laptop", "laptop")
    assert peer.allowed_ips == PEER.allowed_ips
    lines = text.splitlines()
    assert lines[0] == "# Written by `martlet join` on 2026-11-24."
    assert max(len(line) for line in lines if "ssh-ed25519" not in line) <= 100
    for number, line in enumerate(lines):  # every section and what is not plain says what it is
        if line in ("[rendezvous]", "[[peer]]") or line.startswith(("address", "allowed", "stun")):
            assert lines[number - 1].startswith("# ")


def test_a_peer_is_added_and_nothing_else_changed() -> None:
    text = with_peer(OLD, PEER)
    assert text.startswith(OLD + "\n")
    config = loads(text, "mt0.toml")
    assert [peer.name for peer in config.peers] == ["office", "laptop"]
    assert config.peers[1].allowed_ips == PEER.allowed_ips
    again = with_peer(text, Peer(name="b", public_key=PublicKey(bytes(32)), allowed_ips=()))
    assert again.startswith(text)
    alone = "\n".join(OLD.split("\n")[:8])
    assert [peer.name for peer in loads(with_peer(alone, PEER), "mt0.toml").peers] == ["laptop"]


def test_an_address_is_added_behind_the_others() -> None:
    text = with_addresses(OLD, [ULA])
    assert text == OLD.replace("'fd88::1/64' ", f"'fd88::1/64', \"{ULA}\" ")
    assert loads(text, "mt0.toml").interface.address[-1] == ULA
    assert with_addresses(OLD, []) == OLD


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('["10.88.0.1/24"]', f'["10.88.0.1/24", "{ULA}"]'),
        ('["10.88.0.1/24", ]', f'["10.88.0.1/24", "{ULA}", ]'),
        ('[ "10.88.0.1/24" ,\n ]', f'[ "10.88.0.1/24", "{ULA}" ,\n ]'),
        ('[\n "10.88.0.1/24", # "no" ]\n]', f'[\n "10.88.0.1/24", "{ULA}", # "no" ]\n]'),
        (r'["10.88.0.\u0031/24"]', rf'["10.88.0.\u0031/24", "{ULA}"]'),
    ],
)
def test_however_the_list_is_written(before: str, after: str) -> None:
    text = '[interface]\nname = "mt0"\naddress = {}\nprivate_key = "k"\n'
    assert with_addresses(text.format(before), [ULA]) == text.format(after)


@pytest.mark.parametrize(
    "text",
    [
        'peer = [{name = "b"}]\ninterface.address = ["10.88.0.1/24"]\n',
        '[interface]\naddress = []\n[paths]\nmetered = ["wwan*"]\n',
        '[interface]\naddress = ["""10.88.0.1/24\\\n"""]\n',
    ],
)
def test_what_is_too_unusual_is_left_to_the_user(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"does not dare to edit; add to address of \[interface\]"
    ):
        with_addresses(text, [ULA])
    assert with_addresses('interface.address = ["""10.88.0.1/24"""]', [ULA]).endswith(f'"{ULA}"]')
    inline = 'peer = [{ name = "office" }]\n'
    with pytest.raises(ConfigError, match=r"a peer to it yourself:(.|\n)*\[\[peer\]\]\nname ="):
        with_peer(inline, PEER)


def test_a_rendezvous_is_added_once() -> None:
    text = with_rendezvous(OLD, RENDEZVOUS)
    assert text.startswith(OLD)
    config = loads(with_peer(text, PEER), "mt0.toml")
    assert config.rendezvous is not None
    assert config.rendezvous.url == RENDEZVOUS.url
    with pytest.raises(ConfigError):
        with_rendezvous(text, RENDEZVOUS)


@given(st.text(max_size=100))
def test_any_text_is_one_string_of_toml(text: str) -> None:
    block = with_rendezvous("", Rendezvous(url=("mqtt://h",), username=text))
    assert tomllib.loads(block)["rendezvous"]["username"] == text
    assert len(block.splitlines()) == len(with_rendezvous("", RENDEZVOUS).splitlines()) + 1


@given(st.text(max_size=200), st.lists(st.text(max_size=70), max_size=5))
def test_any_name_becomes_one_that_a_peer_can_have(wanted: str, others: list[str]) -> None:
    taken = {host_name(other) for other in others}
    for _ in range(3):
        name = unique_name(wanted, taken)
        assert check_peer_name(name) == name
        assert name not in taken
        taken.add(name)


@pytest.mark.parametrize(
    ("raw", "name"),
    [("laptop", "laptop"), ("Anna's Mac", "Anna-s-Mac"), ("-x", "x"), ("büro", "b-ro"),
     ("", "peer"), ("---", "peer"), ("..", "peer"), ("a" * 99, "a" * 64), ("a.b", "a.b")],
)  # fmt: skip
def test_names(raw: str, name: str) -> None:
    assert host_name(raw) == name
    assert unique_name(raw, {name}) == f"{name[:62]}-2"
    assert unique_name(raw, {name, f"{name[:62]}-2"}) == f"{name[:62]}-3"
