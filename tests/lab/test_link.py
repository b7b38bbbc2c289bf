"""Two hosts on one Ethernet that know each other's key and nothing else: no endpoint, no broker, no
default route. They find each other by multicast DNS.

     [a] eth0 192.0.2.1 ---+
                           +--- br0 [switch]
     [b] eth0 192.0.2.2 ---+
"""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cli.demo.netns import Namespace, Namespaces, terminate
from tests.lab.hosts import CONFIG, Host, until
from tunnel.dialling import MAX_FOUND
from tunnel.identity import Identity, PublicKey

PATIENCE = 15.0


class Lan:
    """The two hosts, and the switch between them."""

    def __init__(self, directory: Path, stack: ExitStack, families: tuple[int, ...] = (4,)) -> None:
        self.spaces = stack.enter_context(Namespaces())
        self.switch: Namespace = self.spaces.create("switch")
        self.switch.batch("link add br0 type bridge", "link set br0 up")
        keys = {1: Identity.generate(), 2: Identity.generate()}
        self.keys: list[PublicKey] = [identity.public_key for identity in keys.values()]
        self.hosts: list[Host] = []
        for own, other, port in ((1, 2, 0), (2, 1, 4117)):
            keys[own].save(directory / str(own))
            config = directory / f"{own}.toml"
            config.write_text(
                CONFIG.format(
                    own=own, other=other, port=port, endpoint="", key=keys[other].public_key.openssh
                )
            )
            host = Host(self.spaces.create("ab"[own - 1]), config)
            self.spaces.veth(host.space, "eth0", self.switch, f"p{own}")
            self.switch.batch(f"link set p{own} master br0")
            self.address(host, own, families)
            self.hosts.append(host)
        self.a, self.b = self.hosts

    @staticmethod
    def address(host: Host, number: int, families: tuple[int, ...] = (4,)) -> None:
        lines = {
            4: f"addr add 192.0.2.{number}/24 dev eth0",
            6: f"addr add fd00:1::{number}/64 dev eth0 nodad",
        }
        host.space.batch(*(lines[family] for family in families))

    def capture(self, path: Path) -> subprocess.Popen[bytes]:
        """What any port of the switch could see."""
        argv = ["dumpcap", "-q", "-i", "br0", "-f", "udp port 5353", "-w", str(path)]
        process = self.switch.popen(argv)
        until(path.exists, lambda: "dumpcap did not start")
        time.sleep(0.3)
        return process


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def state(host: Host) -> str:
    out = host.martlet("status", "mt0", "--json").stdout
    return str(json.loads(out)["peers"][0]["state"]) if out else ""


def until_up(*hosts: Host) -> None:
    until(
        lambda: all(state(host) == "up" for host in hosts),
        lambda: "\n".join(host.log.read_text() for host in hosts),
        PATIENCE,
    )


def test_hosts_on_one_link_find_each_other(tmp_path: Path, stack: ExitStack) -> None:
    """And say nothing by which others could tell who they are."""
    lan = Lan(tmp_path, stack)
    seen = tmp_path / "mdns.pcapng"
    capture = lan.capture(seen)
    for host in lan.hosts:
        host.up()
    until_up(*lan.hosts)
    ping = ["ping", "-n", "-c", "3", "-i", "0.1", "-W", "2", "10.88.0.2"]
    assert " 0% packet loss" in lan.a.space.run(ping).stdout
    for host in lan.hosts:
        assert host.martlet("down", "mt0").returncode == 0
        assert "error" not in host.log.read_text().lower()
    time.sleep(0.5)
    terminate([capture])
    said = seen.read_bytes()
    assert said.count(b"_martlet") >= 4
    for key in lan.keys:
        text = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + key.raw).decode()
        forms = [key.raw.hex(), base64.b32encode(key.raw).decode(), text[-40:], key.fingerprint[7:]]
        for part in (key.raw[:6], key.raw[-6:], *(form[:12].encode() for form in forms)):
            assert part not in said and part.lower() not in said.lower()
    # The names are random as well: neither those of the hosts nor of the peers.
    fields = ["-T", "fields", "-e", "dns.resp.name", "-e", "dns.srv.target"]
    shown = subprocess.run(
        ["tshark", "-n", "-r", str(seen), *fields], capture_output=True, text=True, check=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    ).stdout  # fmt: skip
    names = {name for name in re.split(r"[\s,]+", shown) if name}
    assert len(names) >= 5
    assert all(
        re.fullmatch(r"([0-9a-f]{16}\.)?(_martlet\._udp\.)?local|<Root>", name)
        for name in names
        if not name.endswith(".arpa")
    ), names


def test_over_ipv6(tmp_path: Path, stack: ExitStack) -> None:
    lan = Lan(tmp_path, stack, (6,))
    for host in lan.hosts:
        host.up()
    until_up(*lan.hosts)


def test_a_peer_that_comes_later_restarts_and_moves(tmp_path: Path, stack: ExitStack) -> None:
    lan = Lan(tmp_path, stack)
    lan.a.up()
    time.sleep(2)
    process = lan.b.up()
    until_up(*lan.hosts)
    process.kill()
    process.wait(5)
    lan.b.log.unlink()
    lan.b.up()
    until(lambda: "peer up" in lan.b.log.read_text(), lan.b.log.read_text, PATIENCE)
    # Both get other addresses: neither knows the other's but by asking again.
    down = [host.space for host in lan.hosts]
    for space in down:
        space.batch("addr flush dev eth0")
    for host, number in zip(lan.hosts, (11, 12), strict=True):
        lan.address(host, number)
    for host in lan.hosts:
        assert host.martlet("down", "mt0").returncode == 0
    for host in lan.hosts:
        host.log.unlink()
        host.up()
    until_up(*lan.hosts)


def test_both_move_to_a_network_where_nothing_of_before_is_true(
    tmp_path: Path, stack: ExitStack
) -> None:
    """The session died with the old addresses; a found address of there would not help."""
    lan = Lan(tmp_path, stack)
    for host in lan.hosts:
        host.up()
    until_up(*lan.hosts)
    for host, number in zip(lan.hosts, (1, 2), strict=True):
        host.space.batch("addr flush dev eth0", f"addr add 198.51.100.{number}/24 dev eth0")
    ping = ["ping", "-n", "-c", "1", "-W", "1", "10.88.0.2"]
    until(
        lambda: lan.a.space.run(ping, check=False).returncode == 0,
        lambda: lan.a.log.read_text() + lan.b.log.read_text(),
        30,
    )


QUESTION = bytes(5) + b"\1" + bytes(6) + b"\x08_martlet\x04_udp\x05local\0" + b"\0\x0c\0\1"


def test_who_does_not_ask_by_multicast_gets_silence(tmp_path: Path, stack: ExitStack) -> None:
    """From beyond the link nobody can: there the port must look as if nobody were here."""
    lan = Lan(tmp_path, stack)
    lan.switch.batch("addr add 192.0.2.9/24 dev br0")
    lan.a.up()

    def ask(target: str) -> bool:
        def question() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.bind(("192.0.2.9", 0))
                out = socket.inet_aton("192.0.2.9")
                asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, out)
                asking.settimeout(0.5)
                asking.sendto(QUESTION, (target, 5353))
                try:
                    return b"_martlet" in asking.recv(2000)
                except OSError:
                    return False

        return lan.switch.call(question)

    until(lambda: ask("224.0.0.251"), lan.a.log.read_text)
    assert not any(ask("192.0.2.1") for _ in range(4))


EVIL = """
import random, socket, sys, time
from tunnel import announcement
from tunnel.dialling import MAX_FOUND
from tunnel.identity import PublicKey
from zeroconf import ServiceInfo, Zeroconf
a, b = (PublicKey.parse(line).raw for line in sys.argv[1:])
zc = Zeroconf(interfaces=["192.0.2.9"])
service = "_martlet._udp.local."
for number in range(14):
    said = announcement.make(b, [a], random.Random(number))
    if number >= 10:
        said = {"v": "1", "s": said["s"], "t0": b"x" * number}
    zc.register_service(ServiceInfo(
        service, f"evil{number}.{service}", port=1 + number, properties=said,
        server=f"e{number}.local.",
        parsed_addresses=["198.51.100.1", "8.8.8.8", "127.0.0.1", "224.0.0.1", "192.0.2.77"],
    ), cooperating_responders=True)
print("ready", flush=True)
time.sleep(60)
"""


def test_lies_lead_to_the_link_at_the_most(tmp_path: Path, stack: ExitStack) -> None:
    """Somebody who knows both keys announces everything but the truth. Nothing is sent to where the
    link does not lead, and the peer is found all the same."""
    lan = Lan(tmp_path, stack)
    lan.switch.batch("addr add 192.0.2.9/24 dev br0", "addr add 192.0.2.77/24 dev br0")
    lan.a.space.batch("route add default via 192.0.2.9")
    seen = tmp_path / "all.pcapng"
    argv = ["dumpcap", "-q", "-i", "br0", "-f", "udp and not port 5353", "-w", str(seen)]
    capture = lan.switch.popen(argv)
    until(seen.exists, lambda: "dumpcap did not start")
    evil = lan.switch.popen(
        [sys.executable, "-c", EVIL, *(key.openssh for key in lan.keys)],
        env={"PYTHONPATH": str(Path(__file__).parents[2])}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert evil.stdout is not None and evil.stdout.readline() == b"ready\n"
    lan.a.up()
    until(lambda: "found on the link" in lan.a.log.read_text(), lan.a.log.read_text, PATIENCE)
    time.sleep(3)
    assert state(lan.a) == "connecting"
    lan.b.up()
    until_up(*lan.hosts)
    terminate([capture, evil])
    fields = ["-T", "fields", "-e", "ip.src", "-e", "ip.dst", "-e", "udp.dstport"]
    shown = subprocess.run(
        ["tshark", "-n", "-r", str(seen), *fields, "-Y", "ip && udp"],
        capture_output=True, text=True, check=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    ).stdout  # fmt: skip
    targets = {
        (line.split()[1], line.split()[2])
        for line in shown.splitlines()
        if line.startswith("192.0.2.1\t") and line.split()[2] not in ("5351", "1900")
    }
    assert {host for host, _ in targets} <= {"192.0.2.2", "192.0.2.77"}
    assert 1 <= len([port for host, port in targets if host == "192.0.2.77"]) <= MAX_FOUND


def test_an_endpoint_or_a_broker_makes_it_silent(tmp_path: Path, stack: ExitStack) -> None:
    lan = Lan(tmp_path, stack)
    seen = tmp_path / "mdns.pcapng"
    capture = lan.capture(seen)
    text = lan.a.config.read_text()
    for more in ('endpoint = "192.0.2.2:9"\n', '[rendezvous]\nurl = "mqtt://192.0.2.99"\n'):
        lan.a.config.write_text(text + more)
        process = lan.a.up()
        time.sleep(1.5)
        terminate([process])
        lan.a.log.unlink()
    terminate([capture])
    assert b"_martlet" not in seen.read_bytes()


def test_a_peer_that_is_added_live_is_found_as_well(tmp_path: Path, stack: ExitStack) -> None:
    """Nothing was sought on the link before."""
    lan = Lan(tmp_path, stack)
    whole = lan.a.config.read_text()
    nobody = Identity.generate().public_key.openssh
    head, _, _ = whole.partition("[[peer]]")
    other = f"""
[[peer]]
name = "nobody"
public_key = "{nobody}"
endpoint = "192.0.2.99:4117"
allowed_ips = ["10.88.0.9/32"]
"""
    lan.a.config.write_text(head + other)
    for host in lan.hosts:
        host.up()
    time.sleep(1)
    assert "link" not in json.loads(lan.a.martlet("status", "--json").stdout)
    lan.a.config.write_text(whole + other)
    assert "peer other is added" in lan.a.martlet("reload", "mt0").stderr
    until(
        lambda: lan.a.martlet("ping", "other", "-c", "1").returncode == 0,
        lambda: lan.a.log.read_text() + lan.b.log.read_text(),
        30,
    )
    status = json.loads(lan.a.martlet("status", "--json").stdout)
    assert status["link"][0]["peers"] == ["other"]
    assert status["counters"]["internal_errors"] == 0
