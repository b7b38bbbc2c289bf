"""`martlet invite` and `martlet join` as their users meet them; the other end is a thread."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import os
import queue
import random
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import segno

import cli.enrol
import cli.up
from cli import output
from cli.failures import OK
from tests.unit.memory_broker import REFUSED, MemoryBroker
from tests.unit.test_cli_main import Martlet, martlet, running
from tunnel.config import Config, RendezvousConfig, load
from tunnel.errors import ConfigError, LocalError, PrivilegeError
from tunnel.identity import Identity
from tunnel.rendezvous import invite as exchange
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import (
    InviteCode,
    JoinAsked,
    Joining,
    TurnServer,
    Welcome,
    Welcomed,
    Wishes,
)
from tunnel.shell import joining

__all__ = ["martlet"]  # the fixture

URL = "mqtt://broker.example"
MEETING = RendezvousConfig(url=(URL,))
OTHER = Identity.generate()
OTHER_ULA = inner_address(OTHER.public_key.raw)
OLD = f"""\
# Mine; hands off.
[interface]
name = "mt0"
address = ["10.88.0.1/24"]  # the office's numbers
private_key = "id_ed25519"
[rendezvous]
url = "{URL}"
[[peer]]
name = "office"
public_key = "{Identity.generate().public_key.openssh}"
allowed_ips = ["10.88.0.2/32"]
"""


class Quiet:
    """A `Watcher` of the other end."""

    def __init__(self, opened: Callable[[str], None] = lambda code: None) -> None:
        self.opened = opened

    def trouble(self, error: str, left: float) -> None:
        """Nobody looks."""

    recovered = unanswered = lambda self: None
    waiting = lambda self, left: None  # noqa: E731


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    broker = MemoryBroker()
    monkeypatch.setattr(joining, "Signaller", broker.signaller)
    monkeypatch.setattr(joining, "LOOK", 0.01)
    monkeypatch.setattr(cli.enrol, "networks_in_use", lambda own: ())
    monkeypatch.setattr(cli.enrol, "PEER_PATIENCE", 0.2)
    return broker


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    """What `invite` shows."""
    shown: queue.Queue[str] = queue.Queue()
    show = output.data

    def data(line: str) -> None:
        show(line)
        shown.put(line)

    monkeypatch.setattr(output, "data", data)
    return shown


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[list[object]]:
    """The other end, in a thread; what it returned, or raised, afterwards."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield results
    thread.join(20)
    assert not thread.is_alive()


def joiner(codes: queue.Queue[str], name: str = "laptop", **more: Any) -> Callable[[], Welcomed]:
    """The other end of `martlet invite`."""

    def work() -> Welcomed:
        asking = Joining(
            OTHER,
            InviteCode.parse(codes.get(timeout=20)),
            name=name,
            wishes=Wishes(addresses=(OTHER_ULA,), **more),
            rng=random.Random(1),
        )
        return asyncio.run(joining.join(asking, MEETING, watcher=Quiet()))

    return work


@contextmanager
def inviter(
    welcome: Welcome | Exception | None = None, identity: Identity = OTHER
) -> Iterator[tuple[str, list[JoinAsked]]]:
    """The other end of `martlet join`: its code, and who asked."""
    codes: queue.Queue[str] = queue.Queue()
    asked: list[JoinAsked] = []

    def decide(event: JoinAsked) -> Welcome:
        asked.append(event)
        if isinstance(welcome, Exception):
            raise welcome
        return welcome or Welcome(name="home", addresses=(OTHER_ULA,), rendezvous=(URL,))

    def work() -> object:
        return asyncio.run(
            joining.invite(identity, MEETING, decide=decide, watcher=Quiet(codes.put))
        )

    with beside(work):
        yield codes.get(timeout=20), asked


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration is to be; its directory has nothing else."""
    (tmp_path / "etc").mkdir()
    return tmp_path / "etc" / "mt0.toml"


@pytest.fixture
def old(file: Path) -> Path:
    """One that is there already."""
    Identity.generate().save(file.parent / "id_ed25519")
    file.write_text(OLD)
    file.chmod(0o640)
    return file


# invite


def test_a_host_that_has_nothing(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], file: Path
) -> None:
    with beside(joiner(codes)) as joined:
        done = martlet("invite", str(file), "--rendezvous", URL, "--name", "home")
    assert done.code == 0, done.err
    (welcomed,) = joined
    assert isinstance(welcomed, Welcomed)
    assert welcomed.welcome.name == "home"
    assert str(InviteCode.parse(done.out)) + "\n" == done.out  # the code, alone
    config = load(file)
    assert config.interface.name == "mt0"
    assert config.interface.private_key == file.parent / "id_ed25519"
    assert stat.S_IMODE(config.interface.private_key.stat().st_mode) == 0o600
    own = Identity.load(config.interface.private_key).public_key
    assert config.interface.address == (inner_address(own.raw),)
    (peer,) = config.peers
    assert (peer.name, peer.public_key) == ("laptop", OTHER.public_key)
    for words in (
        "the code above lets one host in, for ten minutes",
        "martlet join CODE --up",
        f"laptop joins, with the key {OTHER.public_key.fingerprint}",
        f"laptop is written to {file}",
        f"laptop is {OTHER_ULA.ip}, this host is {inner_address(own.raw).ip}",
        f"martlet up {file} --detach",
        f"ssh USER@{OTHER_ULA.ip}",
    ):
        assert words in done.err
    assert sorted(path.name for path in file.parent.iterdir()) == ["id_ed25519", "mt0.toml"]


def test_a_tunnel_that_runs_takes_the_peer(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path, tmp_path: Path
) -> None:
    with running(tmp_path, "mt0") as tunnel, beside(joiner(codes, wants_ipv4=True)):
        tunnel.news = {"added": ["laptop"], "addresses": ["fd6d::1"]}
        done = martlet("invite", str(old))
    assert done.code == 0
    assert "tunnel mt0: peer laptop is added" in done.err
    assert "martlet up" not in done.err
    assert "martlet ping laptop" in done.err
    text = old.read_text()
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert text.startswith('# Mine; hands off.\n[interface]\nname = "mt0"\n')
    assert "# the office's numbers" in text
    assert [peer.name for peer in load(old).peers] == ["office", "laptop"]
    assert str(load(old).peers[1].allowed_ips[1]) == "10.88.0.3/32"


@pytest.mark.parametrize("up", [False, True])
def test_a_tunnel_that_cannot_take_the_peer(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path, tmp_path: Path,
    up: bool,
) -> None:  # fmt: skip
    with running(tmp_path, "mt0") as tunnel, beside(joiner(codes)):
        tunnel.news = ConfigError("a running tunnel cannot take this: rendezvous")
        done = martlet("invite", str(old), *(["--up"] if up else []))
        assert done.code == (1 if up else 0)
        assert "tunnel mt0: a running tunnel cannot take this" in done.err
    assert len(load(old).peers) == 2  # it was let in all the same


def test_a_tunnel_that_runs_from_another_file(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path, tmp_path: Path
) -> None:
    with running(tmp_path, "mt0") as tunnel:
        with beside(joiner(codes)):
            tunnel.news = {"added": []}
            done = martlet("invite", str(old))
        assert "tunnel mt0 runs from another file, and does not know laptop yet" in done.err
        old.unlink()
        done = martlet("invite", str(old), "--rendezvous", URL)
        assert done.code == 3
        assert "a tunnel mt0 is up, but not from this file; give its config file" in done.err


def test_up(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    started: list[Config] = []
    tunnels: list[Any] = []

    def in_background(config: Config) -> int:
        started.append(config)
        tunnels.append(running(tmp_path, config.interface.name))
        tunnels[0].__enter__()
        return OK

    monkeypatch.setattr(cli.up, "in_background", in_background)
    try:
        with beside(joiner(codes)):
            done = martlet(
                "invite", str(file), "--rendezvous", URL, "--up", "--peer-name", "office"
            )
        assert done.code == 0
        assert "office is up, via a>b" in done.err  # so says the tunnel of the test
        assert started == [load(file)]
        with beside(joiner(codes)):
            done = martlet("invite", str(file), "--up")
        assert "it is here already, as office: nothing is changed" in done.err
        assert done.code == 0
        assert len(started) == 1
        with inviter(identity=Identity.generate()) as (code, _):
            tunnels[0].__class__  # noqa: B018
            done = martlet("join", code, "--config", str(file), "--up")
        assert done.code == 1  # this tunnel says that nothing is new
    finally:
        tunnels[0].__exit__(None, None, None)


def test_a_peer_that_does_not_come_up(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path, tmp_path: Path
) -> None:
    with running(tmp_path, "mt0") as tunnel, beside(joiner(codes)):
        tunnel.news = {"added": ["laptop"]}
        done = martlet("invite", str(old), "--up")
    assert done.code == 5
    assert "laptop is not up yet; the tunnel goes on trying" in done.err


def test_ipv4_and_routes(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], file: Path
) -> None:
    with beside(joiner(codes)) as joined:
        done = martlet(
            "invite", str(file), "--rendezvous", URL, "--ipv4-network", "172.20.0.0/24",
            "--route", "192.168.7.0/24",
        )  # fmt: skip
    assert done.code == 0
    assert str(load(file).interface.address[1]) == "172.20.0.1/24"
    (welcomed,) = joined
    assert isinstance(welcomed, Welcomed)
    assert [str(each) for each in welcomed.welcome.assigned] == ["172.20.0.2/32"]
    assert [str(each) for each in welcomed.welcome.routes] == ["192.168.7.0/24"]


@pytest.mark.parametrize("share", [True, False])
def test_a_relay_is_shared_or_kept(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], file: Path, share: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(file.parent.parent)
    Path("relay").write_text("se cret\n")
    Path("relay").chmod(0o600)
    with beside(joiner(codes)) as joined:
        done = martlet(
            "invite", str(file), "--rendezvous", URL, "--turn", "turn:turn.example",
            "--turn-user", "alice", "--turn-password-file", "relay",
            *([] if share else ["--no-share-relay"]),
        )  # fmt: skip
    assert done.code == 0
    (welcomed,) = joined
    assert isinstance(welcomed, Welcomed)
    shared = (TurnServer("turn:turn.example", "alice", "se cret"),)
    assert welcomed.welcome.turn == (shared if share else ())
    assert ("gets your relay, too, with its password: turn:turn.example" in done.err) == share
    assert load(file).ice.turn[0].password_file == file.parent.parent / "relay"
    # From the file, the next time.
    with beside(joiner(codes)) as joined:
        done = martlet("invite", str(file), *([] if share else ["--no-share-relay"]))
    (welcomed,) = joined
    assert isinstance(welcomed, Welcomed)
    assert welcomed.welcome.turn == (shared if share else ())
    assert "se cret" not in done.out + done.err + file.read_text()


def test_without_a_broker_nothing_can_be(
    martlet: Martlet, broker: MemoryBroker, old: Path, file: Path
) -> None:
    text = OLD.replace(f'[rendezvous]\nurl = "{URL}"\n', "")
    old.write_text(text)
    done = martlet("invite", str(old))
    assert done.code == 3
    assert "names no [rendezvous]: two hosts need a broker to meet at" in done.err
    assert "run `martlet rendezvous` on a host that both can reach" in done.err
    assert "--rendezvous mqtt://" in done.err
    assert old.read_text() == text
    assert martlet("invite", str(file.parent / "new.toml")).code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--rendezvous", "http://x"), 2, "--rendezvous http://x: this is not an mqtt://"),
        (("--name", "my host"), 2, "--name 'my host': this is not a peer name"),
        (("--peer-name", "-x"), 2, "--peer-name '-x': this is not a peer name"),
        (("--stun", "x"), 2, "--stun x: the port is missing: write host:port; write for"),
        (("--turn", "x"), 2, "--turn x: this is not a turn: or turns: URL"),
        (("--turn-user", "x"), 2, "--turn-user and --turn-password-file go together"),
        (("--turn-user", "x", "--turn-password-file", "y"), 2, "--turn-user is for a relay"),
        (("--rendezvous-user", "x"), 2, "--rendezvous-user and --rendezvous-password-file"),
        (("--route", "0.0.0.0/0"), 2, "there are no exit nodes yet"),
        (("--ipv4-network", "fd00::/64"), 2, "this is not an IPv4 network with room for two"),
        (("--ipv4-network", "10.88.0.0/31"), 2, "this is not an IPv4 network with room for two"),
        (("--ipv4-network", "8.8.8.0/24"), 2, "this is not a private network"),
        (("--turn", "turn:x"), 2, "--stun and --turn are for a new config"),
        (("--rendezvous", "mqtt://elsewhere"), 3, f"meets its peers at {URL}; leave out"),
        (("--ipv4",) * 2 + ("x", "y"), 2, "unexpected extra argument"),
    ],
)
def test_what_makes_no_sense(
    martlet: Martlet, broker: MemoryBroker, old: Path, arguments: tuple[str, ...], code: int,
    words: str,
) -> None:  # fmt: skip
    done = martlet("invite", str(old), *arguments)
    assert (done.code, done.out) == (code, "")
    assert words in " ".join(done.err.split()).replace("│ ", "")
    assert old.read_text() == OLD


def test_too_many_brokers_for_a_code(martlet: Martlet, broker: MemoryBroker, file: Path) -> None:
    urls = [word for n in range(5) for word in ("--rendezvous", f"mqtt://{n}.example")]
    done = martlet("invite", str(file), *urls)
    assert (done.code, done.out) == (3, "")
    assert "5 values where 4 are the most" in done.err


def test_nobody_joins(
    martlet: Martlet, broker: MemoryBroker, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LIFETIME", 0.1)
    done = martlet("invite", str(old))
    assert done.code == 1
    assert "nobody joined within ten minutes; make another code: `martlet invite`" in done.err
    assert old.read_text() == OLD


def test_five_guesses(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path
) -> None:
    def guess() -> None:
        code = InviteCode.parse(codes.get(timeout=20))
        (topic,) = broker.clients[0].topics
        for _ in range(exchange.MAX_FAILURES):
            wrong = InviteCode(code.inviter, bytes(16), code.urls)
            guesser = Joining(
                OTHER, wrong, name="x", wishes=Wishes(addresses=()), rng=random.Random(1)
            )
            guesser._join_topic = topic
            guesser.connected(0.0)
            for each in guesser.messages_to_send(0.0):
                broker.publish(*each)

    with beside(guess):
        done = martlet("invite", str(old))
    assert done.code == 1
    assert "five tried to join with a wrong secret, so the code is void" in done.err
    assert old.read_text() == OLD


def test_a_key_that_is_there_already(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path
) -> None:
    text = f"{OLD}[[peer]]\nname = 'anna'\npublic_key = '{OTHER.public_key.openssh}'\n"
    text += "allowed_ips = ['10.88.0.9/32']\n"
    old.write_text(text)
    with beside(joiner(codes)) as joined:
        done = martlet("invite", str(old))
    assert done.code == 1
    assert "nobody was let in" in done.err
    assert "its key is that of peer anna here, which has other addresses" in done.err
    assert "in: its key is that of peer anna here" in str(joined[0])
    assert old.read_text() == text


def test_a_disk_that_fills_up_meanwhile(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with beside(joiner(codes)) as joined:
        done = martlet("invite", str(old))
    assert done.code == 1
    assert f"cannot write {old}: No space left on device" in done.err
    assert "it cannot write its configuration" in str(joined[0])
    assert old.read_text() == OLD
    assert sorted(path.name for path in old.parent.iterdir()) == ["id_ed25519", "mt0.toml"]


def test_a_file_that_is_spoilt_meanwhile(
    martlet: Martlet, broker: MemoryBroker, codes: queue.Queue[str], old: Path
) -> None:
    def work() -> object:
        code = codes.get(timeout=20)
        old.write_text(OLD + "nonsense")
        codes.put(code)
        return joiner(codes)()

    with beside(work) as joined:
        done = martlet("invite", str(old))
    assert done.code == 3
    assert f"{old}:12: " in done.err
    assert "it cannot write its configuration" in str(joined[0])
    assert old.read_text() == OLD + "nonsense"


@pytest.mark.parametrize("command", ["invite", "join"])
def test_who_is_not_root_is_told_before_anything_else(
    martlet: Martlet, broker: MemoryBroker, file: Path, monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:  # fmt: skip
    def refuse(path: Path) -> None:
        raise PrivilegeError(f"cannot write {path}: Permission denied", remedy="run as root (sudo)")

    monkeypatch.setattr(cli.enrol, "check_writable", refuse)
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    done = (
        martlet("invite", str(file), "--rendezvous", URL)
        if command == "invite"
        else martlet("join", code, "--config", str(file))
    )
    assert (done.code, done.out) == (4, "")
    assert f"cannot write {file}: Permission denied; run as root (sudo)" in done.err
    assert list(file.parent.iterdir()) == []
    assert broker.clients == []


@pytest.mark.parametrize("command", ["invite", "join"])
def test_a_spoilt_config(martlet: Martlet, broker: MemoryBroker, old: Path, command: str) -> None:
    old.write_text(OLD.replace("allowed_ips", "alowed_ips"))
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    arguments = (str(old),) if command == "invite" else (code, "--config", str(old))
    done = martlet(command, *arguments)
    assert done.code == 3
    assert f"{old}:11" in done.err and "did you mean allowed_ips?" in done.err


def test_an_interrupt(
    martlet: Martlet, broker: MemoryBroker, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(main: Any) -> None:
        main.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(joining, "run", interrupted)
    done = martlet("invite", str(old))
    assert done.code == 130
    assert "given up: the code is worth nothing any more" in done.err
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    done = martlet("join", code, "--config", str(old))
    assert done.code == 130
    assert "given up; no config was changed" in done.err
    assert old.read_text() == OLD


# join


def test_join_from_nothing(
    martlet: Martlet, broker: MemoryBroker, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome = Welcome(
        name="home",
        addresses=(OTHER_ULA,),
        rendezvous=(URL,),
        turn=(TurnServer("turn:turn.example", "alice", "se cret"),),
    )
    with inviter(welcome) as (code, asked):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n  {code[:50]}\n{code[50:].upper()} \n"))
        done = martlet("join", "-", "--config", str(file), "--name", "laptop", "--ipv4")
    assert (done.code, done.out) == (0, ""), done.err
    (event,) = asked
    assert (event.name, event.wishes.wants_ipv4) == ("laptop", True)
    config = load(file)
    (peer,) = config.peers
    assert (peer.name, peer.public_key) == ("home", OTHER.public_key)
    assert config.rendezvous == RendezvousConfig(url=(URL,))
    (secret,) = [path for path in file.parent.iterdir() if path.name.startswith("relay-")]
    assert config.ice.turn[0].password_file == secret
    assert (secret.read_text(), stat.S_IMODE(secret.stat().st_mode)) == ("se cret\n", 0o600)
    for words in (
        f"asking the host that made the code, by way of {URL}",
        f"home lets this host in; its key is {OTHER.public_key.fingerprint}",
        f"home is written to {file}",
        "no IPv4: home gave none",
        f"martlet up {file} --detach",
        "martlet ping home",
        f"ssh USER@{OTHER_ULA.ip}",
    ):
        assert words in done.err


def test_join_a_tunnel_that_runs(
    martlet: Martlet, broker: MemoryBroker, old: Path, tmp_path: Path
) -> None:
    with running(tmp_path, "mt0") as tunnel, inviter() as (code, asked):
        tunnel.news = {"added": ["anna"]}
        done = martlet("join", code, "--config", str(old), "--peer-name", "anna")
    assert done.code == 0
    assert "tunnel mt0: peer anna is added" in done.err
    assert [peer.name for peer in load(old).peers] == ["office", "anna"]
    assert {str(network) for network in asked[0].wishes.clashes} >= {"10.88.0.0/24"}


def test_routes_are_accepted_on_request(martlet: Martlet, broker: MemoryBroker, file: Path) -> None:
    from ipaddress import ip_network

    welcome = Welcome(name="home", addresses=(OTHER_ULA,), routes=(ip_network("192.168.7.0/24"),))
    with inviter(welcome) as (code, _):
        done = martlet("join", code, "--config", str(file))
    assert "home offers a way to 192.168.7.0/24, which is not taken" in done.err
    assert len(load(file).peers[0].allowed_ips) == 1
    file.unlink()
    with inviter(welcome) as (code, _):
        martlet("join", code, "--config", str(file), "--accept-routes")
    assert str(load(file).peers[0].allowed_ips[1]) == "192.168.7.0/24"


def test_codes_that_are_none(
    martlet: Martlet, broker: MemoryBroker, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    wrong = code[:40] + ("a" if code[40] != "a" else "b") + code[41:]
    newer = bytes([9]) + OTHER.public_key.raw
    newer += hashlib.sha256(b"martlet/1 code" + newer).digest()[:4]
    for text, words in (
        (wrong, "the code has a typing error, or a part of it is missing; copy it again"),
        (code[:-3], "the code has a typing error, or a part of it is missing"),
        ("hello", "this is not the code of an invitation; give all that `martlet invite`"),
        ("martlet-" + base64.b32encode(newer).decode(), "the code was made by a newer martlet"),
    ):
        done = martlet("join", text, "--config", str(file))
        assert (done.code, done.out) == (2, "")
        assert words in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert martlet("join", "-", "--config", str(file)).code == 2
    assert list(file.parent.iterdir()) == []  # not even a key


def test_a_code_of_this_very_host(martlet: Martlet, broker: MemoryBroker, old: Path) -> None:
    own = Identity.load(old.parent / "id_ed25519").public_key.raw
    done = martlet("join", str(InviteCode(own, bytes(16), (URL,))), "--config", str(old))
    assert done.code == 2
    assert "this host made the code itself" in done.err


def test_a_host_that_is_a_peer_already(martlet: Martlet, broker: MemoryBroker, file: Path) -> None:
    with inviter() as (code, _):
        assert martlet("join", code, "--config", str(file)).code == 0
    text = file.read_text()
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    done = martlet("join", code, "--config", str(file))
    assert done.code == 3
    assert "the host that made this code is a peer here already: home" in done.err
    assert file.read_text() == text


def test_another_broker(martlet: Martlet, broker: MemoryBroker, old: Path) -> None:
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), ("mqtt://elsewhere",)))
    done = martlet("join", code, "--config", str(old))
    assert done.code == 3
    assert "join by a tunnel of its own: `martlet join CODE --config NAME`" in done.err


def test_our_password_is_for_our_broker_alone(
    martlet: Martlet, broker: MemoryBroker, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code that names our broker may name others beside it."""
    password = old.parent / "password"
    password.write_text("secret")
    old.write_text(
        OLD.replace(
            f'url = "{URL}"', f'url = "{URL}"\nusername = "u"\npassword_file = "{password}"'
        )
    )
    used: list[RendezvousConfig] = []

    def signaller(rendezvous: RendezvousConfig, **callbacks: Any) -> Any:
        used.append(rendezvous)
        raise LocalError("enough")

    monkeypatch.setattr(joining, "Signaller", signaller)
    code = InviteCode(OTHER.public_key.raw, bytes(16), (URL, "mqtt://evil.example"))
    assert martlet("join", str(code), "--config", str(old)).code == 1
    assert [(each.url, each.username) for each in used] == [((URL,), "u")]


def test_nobody_answers(
    martlet: Martlet, broker: MemoryBroker, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "HINT_AFTER", 0.03)
    monkeypatch.setattr(joining, "ANSWER_PATIENCE", 0.1)
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    done = martlet("join", code, "--config", str(file))
    assert done.code == 5
    assert "nobody answers this invite yet: is `martlet invite` still running there?" in done.err
    assert "nobody answers this invite; is `martlet invite` still running there?" in done.err
    assert not file.exists()


@pytest.mark.parametrize("command", ["invite", "join"])
def test_the_broker_is_down(
    martlet: Martlet, broker: MemoryBroker, file: Path, monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:  # fmt: skip
    broker.up = False
    monkeypatch.setattr(joining, "BROKER_PATIENCE", 0.1)
    code = str(InviteCode(OTHER.public_key.raw, bytes(16), (URL,)))
    done = (
        martlet("invite", str(file), "--rendezvous", URL)
        if command == "invite"
        else martlet("join", code, "--config", str(file))
    )
    assert (done.code, done.out) == (5, "")
    assert f"{REFUSED}; trying on, for up to 1 minute\n" in done.err
    assert f"no broker could be reached: {REFUSED}; is `martlet rendezvous` running" in done.err
    assert not file.exists()


def test_who_is_not_let_in(martlet: Martlet, broker: MemoryBroker, file: Path) -> None:
    from tunnel.membership import Refusal

    with inviter(Refusal("not today")) as (code, _):
        done = martlet("join", code, "--config", str(file))
    assert done.code == 5
    assert "the other end does not let this host in: not today" in done.err
    assert not file.exists()


# what a terminal shows


def test_the_qr_code_is_a_small_one() -> None:
    code = str(InviteCode(bytes(32), bytes(16), ("mqtts://broker.example:8883",)))
    made = segno.make(code.upper(), error="l")
    assert made.mode == "alphanumeric"
    assert InviteCode.parse(code.upper()) == InviteCode.parse(code)
    assert made.symbol_size(border=2)[0] <= 80  # columns; half as many lines


def test_names_of_devices() -> None:
    assert cli.enrol._interface(Path("/etc/martlet/home.toml")) == "home"
    assert cli.enrol._interface(Path("/etc/martlet/a name.toml")) == "mt0"
    assert cli.enrol._interface(Path("/etc/martlet/lo.toml")) == "mt0"
