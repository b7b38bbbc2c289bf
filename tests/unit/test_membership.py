"""tunnel.membership: what is given and what is taken, at both ends of an invitation."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import Endpoint, loads
from tunnel.config_edit import Rendezvous, Turn
from tunnel.errors import ConfigError
from tunnel.identity import Identity, PublicKey
from tunnel.membership import (
    DEFAULT_NETWORKS,
    Edit,
    Host,
    Refusal,
    Terms,
    accept,
    admit,
    check_joinable,
    check_terms,
    wishes,
)
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import JoinAsked, TurnServer, Welcome, Wishes

HOME, LAPTOP = Identity.generate().public_key, Identity.generate().public_key
HOME_ULA, LAPTOP_ULA = inner_address(HOME.raw), inner_address(LAPTOP.raw)
URL = "mqtt://broker.example"
TERMS = Terms(rendezvous=Rendezvous(url=(URL,)))
FILE = Path("/etc/martlet/mt0.toml")
OTHER = Identity.generate().public_key
OLD = f"""\
[interface]
name = "mt5"   # mine
address = ["10.88.0.1/24"]
private_key = "/etc/martlet/id_ed25519"

[[peer]]
name = "office"
public_key = "{OTHER.openssh}"
allowed_ips = ["10.88.0.2/32", "10.50.0.0/16"]
"""


def host(key: PublicKey = HOME, text: str | None = None, **more: Any) -> Host:
    return Host(
        name="home" if key == HOME else "laptop",
        public_key=key,
        private_key=Path("/etc/martlet/id_ed25519"),
        file=FILE,
        interface="mt0",
        text=text,
        config=None if text is None else loads(text, FILE, alone=True),
        today="2026-11-24",
        **more,
    )


def asked(name: str = "laptop", *, key: PublicKey = LAPTOP, **more: Any) -> JoinAsked:
    return JoinAsked(key.raw, name, Wishes(addresses=(inner_address(key.raw),), **more))


def welcome(**more: Any) -> Welcome:
    return Welcome(**{"name": "home", "addresses": (HOME_ULA,), "rendezvous": (URL,), **more})


def join(own: Host, given: Welcome, **more: Any) -> Edit:
    return accept(own, HOME.raw, given, rendezvous=Rendezvous(url=(URL,)), **more)


def networks(*texts: str) -> tuple[Any, ...]:
    return tuple(map(ip_network, texts))


def allowed(edit: Edit) -> list[str]:
    assert edit.text is not None
    return [str(network) for network in loads(edit.text, FILE).peers[-1].allowed_ips]


def own(edit: Edit) -> list[str]:
    assert edit.text is not None
    return [str(address) for address in loads(edit.text, FILE).interface.address]


# both ends


@pytest.mark.parametrize("ipv4", [False, True])
def test_both_ends_of_an_invitation_fit(ipv4: bool) -> None:
    joiner = host(LAPTOP)
    ask = JoinAsked(LAPTOP.raw, "laptop", wishes(joiner, ipv4=ipv4))
    edit, given = admit(host(), TERMS, ask)
    theirs = join(joiner, given)
    assert (edit.peer, theirs.peer) == ("laptop", "home")
    assert (edit.notes, theirs.notes) == ((), ())
    assert {a.ip for a in edit.addresses} == {a.ip for a in theirs.own}
    assert {a.ip for a in edit.own} == {a.ip for a in theirs.addresses}
    assert edit.addresses[0] == LAPTOP_ULA and theirs.addresses[0] == HOME_ULA
    assert len(edit.own) == 1 + ipv4
    if ipv4:
        assert own(edit)[1] == "10.88.0.1/24"
        assert own(theirs)[1] == "10.88.0.2/32"
        assert allowed(theirs) == [str(HOME_ULA), "10.88.0.1/32"]


def test_ipv4_when_the_inviter_alone_asks_for_it() -> None:
    _, given = admit(host(), Terms(rendezvous=TERMS.rendezvous, ipv4=True), asked())
    assert own(join(host(LAPTOP), given)) == [str(LAPTOP_ULA), "10.88.0.2/32"]


# the inviter


def test_a_joiner_gets_the_address_of_its_key_whatever_it_says() -> None:
    """Or it could draw traffic for others here."""
    greedy = JoinAsked(
        LAPTOP.raw,
        "laptop",
        Wishes(addresses=tuple(map(ip_interface, ("192.168.1.1/32", "fd6d:6172:746c::1/128")))),
    )
    edit, _ = admit(host(), TERMS, greedy)
    assert allowed(edit) == [str(LAPTOP_ULA)]


def test_an_old_file_is_added_to() -> None:
    edit, given = admit(host(text=OLD), TERMS, asked("office", wants_ipv4=True))
    assert edit.text is not None
    head, _, _ = OLD.partition("[[peer]]")
    assert edit.text.startswith(head.replace('/24"]', f'/24", "{HOME_ULA}"]'))
    config = loads(edit.text, FILE)
    assert config.rendezvous is not None
    assert config.rendezvous.url == (URL,)
    assert [peer.name for peer in config.peers] == ["office", "office-2"]
    assert edit.peer == "office-2"
    assert allowed(edit) == [str(LAPTOP_ULA), "10.88.0.3/32"]  # .2 is the office's
    assert [str(address) for address in given.addresses] == [str(HOME_ULA), "10.88.0.1/32"]
    again, _ = admit(host(text=edit.text), TERMS, asked(key=OTHER_LAPTOP, wants_ipv4=True))
    assert allowed(again)[1] == "10.88.0.4/32"
    assert again.text is not None
    assert again.text.startswith(edit.text)


OTHER_LAPTOP = Identity.generate().public_key


def test_the_name_that_the_user_chose_wins() -> None:
    edit, _ = admit(host(), Terms(rendezvous=TERMS.rendezvous, peer_name="anna"), asked())
    assert edit.peer == "anna"


@pytest.mark.parametrize(
    ("text", "here", "there", "wanted", "network"),
    [
        (None, (), (), None, "10.88.0.0/24"),
        (None, ("10.88.0.0/16",), ("10.89.0.128/25",), None, "10.90.0.0/24"),
        (None, ("0.0.0.0/0",), (), None, "10.88.0.0/24"),  # a default route is no clash
        (None, (), (), "172.20.0.0/16", "172.20.0.0/16"),
        (None, ("172.16.0.0/12",), (), "172.20.0.0/16", None),
        (None, ("10.0.0.0/8",), (), None, None),
        (OLD, (), (), None, "10.88.0.0/24"),
        (OLD, (), ("10.88.0.0/24",), None, None),  # ours is in use there
        (OLD, (), (), "10.50.7.0/24", None),  # the office's
        (OLD, (), (), "10.60.0.0/24", "10.60.0.0/24"),
    ],
)
def test_ipv4_comes_from_a_network_that_neither_uses(
    text: str | None, here: tuple[str, ...], there: tuple[str, ...], wanted: str | None,
    network: str | None,
) -> None:  # fmt: skip
    terms = Terms(
        rendezvous=TERMS.rendezvous,
        ipv4=True,
        ipv4_network=None if wanted is None else IPv4Network(wanted),
    )
    edit, given = admit(
        host(text=text, networks=networks(*here)), terms, asked(clashes=networks(*there))
    )
    if network is None:
        assert given.assigned == ()
        assert allowed(edit) == [str(LAPTOP_ULA)]
        assert edit.notes == ("no IPv4 for laptop: no network is free at both ends",)
    else:
        (assigned,) = given.assigned
        assert assigned.ip in ip_network(network)
        assert assigned.network.prefixlen == 32
        assert any(a.network == ip_network(network) for a in edit.own)


def test_a_full_network_is_full() -> None:
    text = OLD.replace("10.88.0.1/24", "10.88.0.1/30")
    edit, given = admit(host(text=text), TERMS, asked(wants_ipv4=True))
    assert given.assigned == ()
    assert edit.notes


@pytest.mark.parametrize("ipv4", [False, True])
def test_who_is_here_already_gets_its_answer_again(ipv4: bool) -> None:
    """A host that has lost its configuration, and not its key."""
    edit, first = admit(host(), TERMS, asked(wants_ipv4=ipv4))
    again, given = admit(host(text=edit.text), TERMS, asked("another"))
    assert again.text is None
    assert again.peer == "laptop"
    assert "here already, as laptop" in again.notes[0]
    assert again.addresses == edit.addresses
    assert given == first
    assert len(join(host(LAPTOP), given).addresses) == 1 + ipv4


def test_who_is_here_already_with_other_addresses_is_refused() -> None:
    with pytest.raises(Refusal, match="its key is that of peer office here"):
        admit(host(text=OLD), TERMS, asked(key=OTHER))


def test_relays_and_routes_are_told() -> None:
    shared = (TurnServer("turn:turn.example", "alice", "secret"),)
    terms = Terms(
        rendezvous=TERMS.rendezvous,
        stun=(Endpoint("stun.example", 3478),),
        turn=(
            Turn(url="turn:turn.example", username="alice", password_file=Path("/etc/martlet/p")),
        ),
        shared_turn=shared,
        routes=networks("192.168.7.0/24"),
    )
    check_terms(host(), terms)
    edit, given = admit(host(), terms, asked())
    assert (given.turn, given.stun, given.routes) == (shared, terms.stun, terms.routes)
    assert edit.text is not None
    assert "secret" not in edit.text
    assert loads(edit.text, FILE).ice.turn[0].password_file == Path("/etc/martlet/p")


def test_what_is_too_much_for_a_message_is_known_before() -> None:
    turn = tuple(TurnServer(f"turn:{n}.example", "u" * 255, "p" * 255) for n in range(4))
    check_terms(host(), Terms(rendezvous=TERMS.rendezvous, shared_turn=turn))
    long = Rendezvous(url=tuple(f"ws://{n}.example/{'x' * 235}" for n in range(4)))
    stun = tuple(Endpoint(f"{n}.{'y' * 60}.{'y' * 60}.{'y' * 60}.example", 1) for n in range(8))
    with pytest.raises(ConfigError, match="--no-share-relay"):
        check_terms(host(), Terms(rendezvous=long, stun=stun, shared_turn=turn))
    with pytest.raises(ConfigError, match="cannot be told"):
        check_terms(host(), Terms(rendezvous=TERMS.rendezvous, shared_turn=turn * 2))


@given(st.text(max_size=64), st.booleans())
def test_whatever_it_is_called_the_file_is_valid(name: str, old: bool) -> None:
    edit, _ = admit(
        host(text=OLD if old else None),
        TERMS,
        JoinAsked(LAPTOP.raw, name or "x", Wishes(addresses=())),
    )
    assert edit.text is not None
    assert loads(edit.text, FILE).peers[-1].public_key == LAPTOP


# the joiner


def test_a_joiner_routes_to_the_inviter_alone() -> None:
    """Not to whatever an inviter calls its own."""
    given = welcome(
        addresses=tuple(map(ip_interface, ("8.8.8.8/32", "fd00::53/128", "2001:db8::1/128"))),
        assigned=(ip_interface("10.88.0.2/32"),),
    )
    edit = join(host(LAPTOP), given)
    assert allowed(edit) == [str(HOME_ULA)]
    assert own(edit) == [str(LAPTOP_ULA)]


@pytest.mark.parametrize("used", ["10.88.0.0/24", "10.0.0.0/8", "10.88.0.1/32"])
def test_ipv4_that_is_in_use_here_is_not_taken(used: str) -> None:
    given = welcome(
        addresses=(HOME_ULA, ip_interface("10.88.0.1/32")),
        assigned=(ip_interface("10.88.0.2/32"),),
    )
    edit = join(host(LAPTOP, networks=networks(used)), given)
    assert allowed(edit) == [str(HOME_ULA)]
    assert edit.notes == ("no IPv4: what home gave is in use here",)
    assert len(allowed(join(host(LAPTOP, networks=networks("0.0.0.0/0")), given))) == 2


def test_routes_are_taken_by_who_wants_them() -> None:
    given = welcome(
        routes=networks("192.168.7.0/24", "0.0.0.0/0", "192.168.1.0/24", "10.50.1.0/24")
    )
    edit = join(host(LAPTOP), given)
    assert allowed(edit) == [str(HOME_ULA)]
    assert "--accept-routes" in edit.notes[0]
    edit = join(
        host(LAPTOP, text=OLD, networks=networks("192.168.0.0/22")), given, accept_routes=True
    )
    assert allowed(edit) == [str(HOME_ULA), "192.168.7.0/24"]
    assert edit.notes == (
        "0.0.0.0/0 of home is not taken: there are no exit nodes yet",
        "192.168.1.0/24 of home is not taken: it is in use here",
        "10.50.1.0/24 of home is not taken: it is in use here",
    )


def test_a_shared_relay_has_its_password_in_a_file_of_its_own() -> None:
    given = welcome(
        turn=(
            TurnServer("turn:turn.example"),
            TurnServer("turns:turn.example", "alice", "se cret"),
        )
    )
    edit = join(host(LAPTOP), given)
    ((path, secret),) = edit.secrets.items()
    assert secret == "se cret"
    assert path.parent == FILE.parent
    assert edit.text is not None
    assert secret not in edit.text
    assert [turn.password_file for turn in loads(edit.text, FILE).ice.turn] == [None, path]
    assert join(host(LAPTOP), given).secrets == edit.secrets  # the same again, the same file
    old = join(host(LAPTOP, text=OLD), given)
    assert old.secrets == {}
    assert "for new configs only" in old.notes[0]
    assert old.text is not None
    assert loads(old.text, FILE).ice.turn == ()


def test_a_second_host_is_joined_by_the_same_file() -> None:
    edit = join(host(LAPTOP, text=OLD), welcome(name="office"))
    assert edit.peer == "office-2"
    assert edit.text is not None
    assert [peer.name for peer in loads(edit.text, FILE).peers] == ["office", "office-2"]
    assert own(edit) == ["10.88.0.1/24", str(LAPTOP_ULA)]
    assert join(host(LAPTOP, text=OLD), welcome(), peer_name="anna").peer == "anna"


def test_wishes_name_what_is_in_use() -> None:
    found = wishes(
        host(LAPTOP, text=OLD, networks=networks("192.168.1.0/24", "0.0.0.0/0", "fd00::/64")),
        ipv4=True,
    )
    assert found.addresses == (LAPTOP_ULA,)
    assert found.wants_ipv4
    assert {str(n) for n in found.clashes} == {
        "192.168.1.0/24", "10.88.0.2/32", "10.50.0.0/16", "10.88.0.0/24",
    }  # fmt: skip
    many = tuple(IPv4Network((n << 16, 24)) for n in range(1, 100))
    assert len(wishes(host(LAPTOP, networks=many), ipv4=False).clashes) == 32


def test_what_cannot_be_joined() -> None:
    check_joinable(host(LAPTOP), HOME.raw, [URL])
    check_joinable(host(LAPTOP, text=OLD), HOME.raw, [URL])
    edit = join(host(LAPTOP), welcome())
    with pytest.raises(ConfigError, match="a peer here already: home"):
        check_joinable(host(LAPTOP, text=edit.text), HOME.raw, [URL])
    third = Identity.generate().public_key.raw
    check_joinable(host(LAPTOP, text=edit.text), third, ["ws://x.example", "wss://broker.example"])
    with pytest.raises(ConfigError, match=r"--config NAME"):
        check_joinable(host(LAPTOP, text=edit.text), third, ["mqtt://elsewhere.example"])


def test_a_file_that_cannot_take_it_is_named() -> None:
    text = OLD.replace('address = ["10.88.0.1/24"]', 'address = ["10.88.0.1/24"]\nmtu = 1000')
    with pytest.raises(ConfigError, match=r"mt0\.toml:4: interface\.mtu: 1000 is out of range"):
        admit(host(text=text), TERMS, asked())
    inline = "peer = []\n" + OLD.partition("[[peer]]")[0]
    with pytest.raises(ConfigError, match=r"^/etc/martlet/mt0\.toml: .*does not dare to edit"):
        join(host(LAPTOP, text=inline), welcome())


def test_defaults_are_private_and_apart() -> None:
    assert len(set(DEFAULT_NETWORKS)) == 40
    assert str(DEFAULT_NETWORKS[0]) == "10.88.0.0/24"
    assert str(DEFAULT_NETWORKS[-1]) == "10.127.0.0/24"
