"""Hosts that have never seen martlet, and have nothing in common but the URL of a broker.

[a] eth0 192.0.2.2 --- 192.0.2.1 [core: martlet rendezvous] 198.51.100.1 --- eth0 198.51.100.2 [b]
                                         203.0.113.1 --- eth0 203.0.113.2 [c]

The core forwards; nobody has a configuration, a key, or an address inside.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.demo.netns import Namespace, Namespaces
from tests.lab.hosts import MARTLET, until
from tests.lab.rendezvous import Rendezvous
from tunnel.config import load
from tunnel.identity import Identity
from tunnel.shell.networks import networks_in_use

NETWORKS = {"a": "192.0.2", "b": "198.51.100", "c": "203.0.113"}
CODE = re.compile(r"martlet-[a-z2-7]{100,}\n")


class Host:
    """One bare host: its namespace, and a directory that is its own /etc/martlet."""

    def __init__(self, space: Namespace, directory: Path) -> None:
        directory.mkdir()
        self.space = space
        self.config = directory / "mt0.toml"

    def martlet(self, *arguments: str, input: str | None = None) -> str:
        """Run the command; what it said on standard error."""
        done = self.space.run([*MARTLET, *arguments], check=False, timeout=60, input=input)
        assert "Traceback" not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return done.stderr

    def invite(self, url: str, *arguments: str) -> Invite:
        log = self.config.parent / "invite.log"
        process = self.space.popen(
            [*MARTLET, "invite", str(self.config), "--rendezvous", url, *arguments],
            stdout=subprocess.PIPE,
            log=log,
        )
        assert process.stdout is not None
        code = process.stdout.readline().decode()
        assert CODE.fullmatch(code), log.read_text()
        return Invite(process, code.strip(), log)

    def inner(self, family: int = 6) -> str:
        addresses = load(self.config).interface.address
        return str(next(address.ip for address in addresses if address.version == family))

    def ping(self, other: Host, family: int = 6) -> str:
        return self.space.run(
            ["ping", "-n", "-c", "3", "-i", "0.1", "-W", "5", other.inner(family)]
        ).stdout

    def down(self) -> None:
        self.space.run([*MARTLET, "down", "mt0"], check=False)


class Invite(NamedTuple):
    """A running `martlet invite`."""

    process: subprocess.Popen[bytes]
    code: str
    log: Path

    def end(self) -> str:
        """What it said, once it has ended well."""
        assert self.process.wait(60) == 0, self.log.read_text()
        assert self.process.stdout is not None
        assert self.process.stdout.read() == b""  # the code is alone there
        self.process.stdout.close()
        return self.log.read_text()


class Lab(NamedTuple):
    core: Namespace
    a: Host
    b: Host
    c: Host
    url: str


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        spaces = stack.enter_context(Namespaces())
        core = spaces.create("core")
        core.forward()
        hosts = []
        for label, network in NETWORKS.items():
            space = spaces.create(label)
            spaces.veth(core, f"to-{label}", space, "eth0")
            core.batch(f"addr add {network}.1/24 dev to-{label}")
            space.batch(f"addr add {network}.2/24 dev eth0", f"route add default via {network}.1")
            hosts.append(Host(space, tmp_path / label))
        stack.enter_context(Rendezvous(core, tmp_path / "rendezvous.log", "--name", "192.0.2.1"))
        try:
            a, b, c = hosts
            yield Lab(core, a, b, c, "mqtt://192.0.2.1")
        finally:
            for host in hosts:
                host.down()


def test_from_nothing_to_a_tunnel(lab: Lab) -> None:
    begin = time.monotonic()
    invite = lab.a.invite(lab.url, "--name", "home", "--up")
    said = lab.b.martlet(
        "join", "-", "--config", str(lab.b.config), "--name", "laptop", "--up", input=invite.code
    )
    heard = invite.end()
    assert time.monotonic() - begin < 60
    assert "home is up" in said
    assert "laptop is up" in heard
    assert " 0% packet loss" in lab.b.ping(lab.a)
    assert " 0% packet loss" in lab.a.ping(lab.b)
    (peer,) = load(lab.a.config).peers
    assert peer.name == "laptop"
    assert [str(network) for network in peer.allowed_ips] == [f"{lab.b.inner()}/128"]
    status = json.loads(lab.b.space.run([*MARTLET, "status", "--json"]).stdout)
    assert status["counters"]["internal_errors"] == 0
    # The code has had its one host.
    log = lab.c.config.parent / "join.log"
    late = lab.c.space.popen(
        [*MARTLET, "join", invite.code, "--config", str(lab.c.config)], log=log
    )
    until(lambda: "nobody answers this invite yet: is `martlet invite`" in log.read_text(),
          log.read_text, 20)  # fmt: skip
    late.send_signal(signal.SIGINT)
    assert late.wait(10) == 130
    assert not lab.c.config.exists()


def test_a_third_joins_a_tunnel_that_runs(lab: Lab, tmp_path: Path) -> None:
    """Neither restarted nor disturbed: the pings of the two that were there go on."""
    invite = lab.a.invite(lab.url, "--name", "home", "--ipv4", "--up")
    lab.b.martlet("join", invite.code, "--config", str(lab.b.config), "--name", "laptop", "--up")
    invite.end()
    assert " 0% packet loss" in lab.b.ping(lab.a, 4)
    flow = lab.b.space.popen(
        ["ping", "-n", "-D", "-i", "0.01", "-w", "60", lab.a.inner(4)], log=tmp_path / "flow.log"
    )
    before = lab.a.config.read_text()
    # Somebody has the same name already.
    invite = lab.a.invite(lab.url, "--name", "home", "--up")
    said = lab.c.martlet(
        "join", invite.code, "--config", str(lab.c.config), "--name", "laptop", "--ipv4", "--up"
    )
    heard = invite.end()
    assert "home is up" in said
    assert "tunnel mt0: peer laptop-2 is added" in heard
    assert lab.a.config.read_text().startswith(before)
    for family in (4, 6):
        assert " 0% packet loss" in lab.c.ping(lab.a, family)
        assert " 0% packet loss" in lab.a.ping(lab.c, family)
    assert len({lab.a.inner(4), lab.b.inner(4), lab.c.inner(4)}) == 3

    time.sleep(0.5)
    flow.send_signal(signal.SIGINT)
    flow.wait(5)
    log = (tmp_path / "flow.log").read_text()
    received = [int(number) for number in re.findall(r"icmp_seq=(\d+)", log)]
    assert len(received) > 100
    assert received == [*range(1, len(received) + 1)], log  # nothing was lost
    times = [float(at) for at in re.findall(r"^\[([\d.]+)\] 64 bytes", log, re.MULTILINE)]
    assert max(later - at for at, later in itertools.pairwise(times)) < 0.3


def test_the_broker_comes_late(lab: Lab, tmp_path: Path) -> None:
    """The inviter waits for it, says so, and shows no code that is of no use yet."""
    url = "mqtt://192.0.2.1:1999"
    log = lab.a.config.parent / "invite.log"
    inviting = lab.a.space.popen(
        [*MARTLET, "invite", str(lab.a.config), "--rendezvous", url, "--name", "home"],
        stdout=subprocess.PIPE,
        log=log,
    )
    until(lambda: "trying on, for up to 10 minutes" in log.read_text(), log.read_text)
    assert "192.0.2.1 refuses the connection" in log.read_text()
    assert inviting.stdout is not None
    with Rendezvous(lab.core, tmp_path / "late.log", "--port", "1999", "--no-stun"):
        code = inviting.stdout.readline().decode()
        assert CODE.fullmatch(code)
        until(lambda: "the broker is within reach" in log.read_text(), log.read_text)
        said = lab.b.martlet("join", code.strip(), "--config", str(lab.b.config))
        assert "next:" in said
        Invite(inviting, code.strip(), log).end()
    # Nobody asked for it to be brought up.
    assert [peer.name for peer in load(lab.b.config).peers] == ["home"]
    assert "mt0" not in lab.a.space.run(["ip", "link"]).stdout


def test_an_interrupt_leaves_nothing_half_done(lab: Lab) -> None:
    invite = lab.a.invite(lab.url)
    invite.process.send_signal(signal.SIGINT)
    assert invite.process.wait(10) == 130
    assert "given up" in invite.log.read_text()
    assert sorted(path.name for path in lab.a.config.parent.iterdir()) == [
        "id_ed25519",
        "invite.log",
    ]


def test_what_a_terminal_shows(lab: Lab) -> None:
    """A QR code, and how much time is left; the code itself is on standard output as ever."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
    process = lab.a.space.popen(
        [*MARTLET, "invite", str(lab.a.config), "--rendezvous", lab.url],
        env={"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        assert process.stdout is not None
        assert CODE.fullmatch(process.stdout.readline().decode())
        shown = ""
        deadline = time.monotonic() + 10
        while "waiting for who joins, 9:5" not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(ours, 4096).decode(errors="replace")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        os.close(ours)
    process.stdout.close()
    blocks = [line for line in shown.splitlines() if line.count("\N{FULL BLOCK}") > 5]
    assert len(blocks) >= 20
    assert shown.index("martlet join CODE --up") < shown.index(blocks[0])


def test_networks_that_are_in_use(lab: Lab) -> None:
    lab.a.space.batch(
        "link add other type veth peer name mt7",
        "addr add 10.88.0.1/24 dev other",
        "link set other up",
        "link set mt7 up",
        "route add blackhole 10.77.0.0/16",
        "route add 10.66.0.0/16 dev mt7",
        "route add 10.55.0.0/16 dev other table 99",
    )
    found = {str(network) for network in lab.a.space.call(lambda: networks_in_use("mt7"))}
    assert {n for n in found if "." in n} == {"192.0.2.0/24", "10.88.0.0/24"}
    found = {str(network) for network in lab.a.space.call(lambda: networks_in_use("none"))}
    assert "10.66.0.0/16" in found


def test_ipv4_is_chosen_around_what_both_ends_use(lab: Lab) -> None:
    for host, network in ((lab.a, "10.88.0.1/24"), (lab.b, "10.89.0.1/24")):
        host.space.batch(
            "link add lan type veth peer name end",
            f"addr add {network} dev lan",
            "link set lan up",
            "link set end up",
        )
    invite = lab.a.invite(lab.url, "--ipv4", "--up")
    lab.b.martlet("join", invite.code, "--config", str(lab.b.config), "--up")
    invite.end()
    assert (lab.a.inner(4), lab.b.inner(4)) == ("10.90.0.1", "10.90.0.2")
    assert " 0% packet loss" in lab.a.ping(lab.b, 4)


def test_a_relay_is_shared_in_a_private_file(lab: Lab) -> None:
    password = lab.a.config.parent / "relay"
    password.write_text("geheim\n")
    password.chmod(0o600)
    invite = lab.a.invite(
        lab.url, "--turn", "turn:192.0.2.1", "--turn-user", "alice",
        "--turn-password-file", str(password),
    )  # fmt: skip
    lab.b.martlet("join", invite.code, "--config", str(lab.b.config))
    said = invite.end()
    assert "who joins gets your relay, too, with its password: turn:192.0.2.1" in said
    (turn,) = load(lab.b.config).ice.turn
    assert turn.password_file is not None
    assert turn.password_file.read_text() == "geheim\n"
    assert turn.password_file.stat().st_mode & 0o077 == 0


def test_an_invitation_to_a_tunnel_that_was_written_by_hand(lab: Lab) -> None:
    """It runs, and has an address of its own; the one that follows from the key comes live."""
    Identity.generate().save(lab.a.config.parent / "key")
    text = f"""\
# Written by hand.
[interface]
name = "mt0"  # the first
address = [
    "10.50.0.1/24",  # ours
]
private_key = "key"

[rendezvous]
url = "{lab.url}"

[[peer]]
name = "nobody"
public_key = "{Identity.generate().public_key.openssh}"
allowed_ips = ["10.50.0.9/32"]
"""
    lab.a.config.write_text(text)
    lab.a.martlet("up", str(lab.a.config), "--detach")
    invite = lab.a.invite(lab.url, "--up")
    lab.b.martlet("join", invite.code, "--config", str(lab.b.config), "--up", "--ipv4")
    said = invite.end()
    assert "this host has the address fd6d:" in said
    assert " 0% packet loss" in lab.b.ping(lab.a)
    assert " 0% packet loss" in lab.a.ping(lab.b, 4)
    assert lab.b.inner(4) == "10.50.0.2"
    changed = lab.a.config.read_text()
    assert changed.replace(f', "{lab.a.inner()}/128"', "").startswith(text)
    status = json.loads(lab.a.space.run([*MARTLET, "status", "--json"]).stdout)
    assert status["counters"]["internal_errors"] == 0
    lab.a.down()
    assert "mt0" not in lab.a.space.run(["ip", "link"]).stdout
