"""`martlet doctor` where things are as they should be, and where they are not.

   u0 --[natA0]-- a0 +------+ b0 --[natB0]-- u0       198.51.100.1 and .2: coturn (RFC 5780)
[A]                  | core |                  [B]    198.51.100.1: a broker (amqtt) for alice
   u1 --[natA1]-- a1 +------+ b1 --[natB1]-- u1

NATs of the kernel are those of the world; what the kernel cannot do, scapy does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

from bench.nattable import Behaviour
from bench.turn_server import PORT, TurnServer
from cli.demo.core import PYTHON_ENV
from cli.demo.netns import Namespace, terminate
from cli.demo.pair import MARTLET, Pair, tail
from cli.demo.world import HostName, Uplink, World
from tests.lab.hosts import Host
from tests.lab.nat_scapy import ScapyNat
from tests.lab.router import HomeRouter

KINDS: dict[str, str] = {
    "endpoint": "endpoint-independent",
    "address": "address-dependent",
    "port": "address-and-port-dependent",
}
STUN = "198.51.100.1:3478"
BROKER = "mqtt://198.51.100.1:1883"
LIMIT = 6.0  # seconds that the doctor gives itself
_START = 10.0  # seconds that a server may take to listen

MakeWorld = Callable[..., World]


@dataclass
class Report:
    """What one run of the doctor said."""

    code: int
    told: dict[str, Any]
    seconds: float

    def of(self, check: str) -> list[dict[str, Any]]:
        return [finding for finding in self.told["findings"] if finding["check"] == check]

    def one(self, check: str) -> dict[str, Any]:
        found = self.of(check)
        assert len(found) == 1, self.told
        return found[0]

    def problems(self) -> list[str]:
        return [f["check"] for f in self.told["findings"] if f["state"] == "problem"]

    def nat(self, interface: str, family: str = "ipv4") -> dict[str, Any]:
        [found] = [nat for nat in self.told["nat"][family] if nat["interface"] == interface]
        return dict(found)


def doctor(
    space: Namespace,
    *arguments: str,
    before: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Report:
    began = time.monotonic()
    argv = [*before, *MARTLET, "doctor", *arguments, "--json"]
    done = space.run(argv, env={**PYTHON_ENV, **(environment or {})}, check=False)
    assert done.returncode in (0, 1) and done.stdout, done
    assert "Traceback" not in done.stderr
    report = Report(done.returncode, json.loads(done.stdout), time.monotonic() - began)
    assert report.code == bool(report.problems())
    return report


class Servers:
    """coturn with two addresses of each family, and a broker."""

    def __init__(self, world: World, directory: Path) -> None:
        self._core, self._directory = world.core, directory
        cores = world.uplink("A").cores
        self._addresses = list(cores.values())
        for family, length in ((4, 26), (6, 64)):
            if family in cores:
                second = cores[family][:-1] + "2"
                nodad = " nodad" if family == 6 else ""
                world.core.batch(f"addr add {second}/{length} dev a0{nodad}")
                self._addresses.append(second)
        self.stun = [f"[{host}]:3478" if ":" in host else f"{host}:3478" for host in cores.values()]

    def start_stun(self) -> None:
        lines = [f"listening-ip={host}" for host in self._addresses]
        lines += ["listening-port=3478", "stun-only", "no-auth", "no-cli", "no-tcp", "no-tls"]
        lines += ["no-dtls", "simple-log", "no-stdout-log", f"userdb={self._directory}/coturn.db"]
        lines += [f"log-file={self._directory}/coturn.events", f"pidfile={self._directory}/c.pid"]
        config, log = self._directory / "coturn.conf", self._directory / "coturn.log"
        config.write_text("\n".join(lines) + "\n")
        process = self._core.popen(["turnserver", "-c", str(config)], log=log)
        self._wait(process, "-Hlun", 3479, len(self._addresses), log)

    def start_broker(self) -> subprocess.Popen[bytes]:
        users, config = self._directory / "users", self._directory / "amqtt.yaml"
        users.write_text(f"alice:{PasswordHash((Argon2Hasher(),)).hash('secret')}\n")
        config.write_text(
            "listeners: {default: {type: tcp, bind: '198.51.100.1:1883'}}\nplugins:\n"
            "  amqtt.plugins.authentication.FileAuthPlugin:\n"
            f"    password_file: {users}\n"
        )
        log = self._directory / "amqtt.log"
        amqtt = Path(sys.executable).with_name("amqtt")
        process = self._core.popen([str(amqtt), "-c", str(config)], log=log)
        self._wait(process, "-Hltn", 1883, 1, log)
        return process

    def _wait(
        self, process: subprocess.Popen[bytes], kind: str, port: int, count: int, log: Path
    ) -> None:
        deadline = time.monotonic() + _START
        while len(self._core.run(["ss", kind, f"sport = :{port}"]).stdout.split("\n")) <= count:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server listens: {tail(log)}")
            time.sleep(0.02)


def plain_nat(uplink: Uplink) -> None:
    """The kernel's, as most routers have it: a port stays the same while nobody else has it."""
    uplink.router.run(["nft", "-f", "-"], input="""
        flush ruleset
        table inet home {
          chain out {
            type nat hook postrouting priority srcnat;
            oifname wan meta nfproto ipv4 masquerade
          }
          chain forward {
            type filter hook forward priority filter; policy drop;
            iifname lan accept
            ct state established,related accept
          }
        }""")  # fmt: skip


def scapy(mapping: str, filtering: str) -> Callable[[World, Uplink], ScapyNat]:
    return partial(ScapyNat, mapping=mapping, filtering=filtering)  # type: ignore[arg-type]


def prepare(world: World, directory: Path, **settings: str) -> Path:
    """A's configuration, for both hosts of a pair that is not up."""
    pair = Pair(world, directory, settings="\n".join(settings.values()))
    pair.prepare()
    return pair.config("A")


def rendezvous(directory: Path, password: str = "secret") -> str:
    file = directory / f"{password}.txt"
    file.write_text(password)
    file.chmod(0o600)
    return f'[rendezvous]\nurl = "{BROKER}"\nusername = "alice"\npassword_file = "{file}"'


def stun_table(*servers: str) -> str:
    return f"[ice]\nport_mapping = false\nstun = {json.dumps(servers)}"


def test_all_is_well(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(families=(4, 6), uplinks=(2, 1))
    plain_nat(world.uplink("A"))
    servers = Servers(world, tmp_path)
    servers.start_stun()
    servers.start_broker()
    config = prepare(
        world, tmp_path, ice=stun_table(*servers.stun), rendezvous=rendezvous(tmp_path)
    )
    report = doctor(world.a.space, str(config))
    assert report.code == 0, report.problems()
    assert report.seconds < LIMIT + 3, "and the time that Python takes"
    for check in ("privileges", "tun", "kernel", "buffers", "config", "port", "clash"):
        assert report.one(check)["state"] == "ok", report.one(check)
    for check in ("routes", "udp", "broker"):
        assert report.one(check)["state"] == "ok", report.one(check)
    for check in ("files", "stun"):
        assert [finding["state"] for finding in report.of(check)] == ["ok", "ok"]
    first, second = report.nat("u0"), report.nat("u0", "ipv6")
    assert (first["mapping"], first["filtering"]) == (KINDS["endpoint"], KINDS["port"])
    assert first["local"] == world.uplink("A").address(4)
    assert first["mapped"].startswith(world.uplink("A").publics[4][0])
    assert first["path_mtu"] == 1500
    assert (second["mapping"], second["filtering"]) == ("no NAT", KINDS["port"])
    assert second["path_mtu"] == 1500
    assert report.nat("u1")["mapping"] == KINDS["port"], "nftables, of ports chosen at random"
    text = world.a.space.run([*MARTLET, "doctor", str(config)], env=PYTHON_ENV).stdout
    assert "u0 (IPv4): easy NAT" in text and "Verdict: all is well" in text
    print(text)


@pytest.mark.parametrize("mapping", get_args(Behaviour))
def test_nats_of_all_nine_kinds(make_world: MakeWorld, tmp_path: Path, mapping: str) -> None:
    """With scapy: the kernel knows only some of them."""
    places: dict[str, tuple[HostName, str]] = {
        "endpoint": ("A", "u0"), "address": ("A", "u1"), "port": ("B", "u0"),
    }  # fmt: skip
    nats = {
        f"{host}{interface[1]}": scapy(mapping, kind) for kind, (host, interface) in places.items()
    }
    world = make_world(nats=nats)
    Servers(world, tmp_path).start_stun()
    reports = {
        name: doctor(host.space, "--stun", STUN) for name, host in world.hosts.items()
    }  # fmt: skip
    for filtering, (name, interface) in places.items():
        found = reports[name].nat(interface)
        assert found["mapping"] == KINDS[mapping], found
        assert found["filtering"] == KINDS[filtering], found
        assert found["hairpin"] is False
    said = [finding["summary"] for finding in reports["A"].of("nat")]
    assert all(("easy NAT" if mapping == "endpoint" else "hard NAT") in each for each in said)


def test_the_kernels_own_symmetric_nat_is_a_hard_one(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(uplinks=(1, 1), kinds={"A0": "symmetric"})
    Servers(world, tmp_path).start_stun()
    report = doctor(world.a.space, "--stun", STUN)
    assert report.nat("u0")["mapping"] == KINDS["port"]
    assert report.nat("u0")["filtering"] == KINDS["port"]
    found = report.one("nat")
    assert found["state"] == "warning" and "hard NAT" in found["summary"]
    assert "turn = " in found["remedy"]
    assert report.code == 0, "it is no problem of the configuration"


def test_udp_is_blocked(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(uplinks=(1, 1))
    servers = Servers(world, tmp_path)
    servers.start_stun()
    servers.start_broker()
    world.core.run(["nft", "-f", "-"], input="""
        table inet dark {
          chain into { type filter hook input priority 0; meta l4proto udp drop; }
        }""")  # fmt: skip
    config = prepare(world, tmp_path, ice=stun_table(STUN), rendezvous=rendezvous(tmp_path))
    report = doctor(world.a.space, str(config))
    assert (report.code, report.problems()) == (1, ["udp"])
    assert "UDP is blocked here" in report.one("udp")["summary"], "since the broker answers"
    assert "turns:" in report.one("udp")["remedy"]
    assert report.one("broker")["state"] == "ok"
    assert report.nat("u0")["udp_blocked"] is True
    assert report.seconds < LIMIT + 3


def test_a_broker_that_is_down_or_refuses_us(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(uplinks=(1, 1))
    servers = Servers(world, tmp_path)
    broker = servers.start_broker()
    wrong = prepare(
        world, tmp_path, ice=stun_table(), rendezvous=rendezvous(tmp_path, "wrong")
    )  # fmt: skip
    report = doctor(world.a.space, str(wrong))
    assert report.problems() == ["broker"]
    found = report.one("broker")
    assert found["details"]["reason"] == "login" and "password_file" in found["remedy"]
    terminate([broker])
    report = doctor(world.a.space, str(wrong))
    assert report.problems() == ["broker"]
    assert report.one("broker")["details"]["reason"] == "refused"
    assert "martlet rendezvous" in report.one("broker")["remedy"]
    world.core.batch("link set a0 down")
    report = doctor(world.a.space, "--rendezvous", BROKER)
    assert report.one("broker")["details"]["reason"] in ("timeout", "other")
    assert report.seconds < LIMIT + 3


def turn_server(world: World, directory: Path, *, quota: int = 0) -> TurnServer:
    """In the core, at its first address of each family."""
    return TurnServer(world.core, world.uplink("A").cores, directory, quota=quota)


def relays(world: World, config: Path, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the doctor says of TURN servers, in time."""
    report = doctor(world.a.space, str(config), environment=environment)
    assert report.seconds < LIMIT + 3
    return report.of("turn")


def test_relays_by_every_transport_are_given_back(make_world: MakeWorld, tmp_path: Path) -> None:
    """The user may have one at a time, which is enough: three times, and once more."""
    world = make_world(uplinks=(1, 1))
    server = turn_server(world, tmp_path, quota=1)
    config = prepare(world, tmp_path, ice=server.toml(server.url(), server.url(secure=True)))
    for _ in range(2):
        found = relays(world, config, server.environment)
        assert [each["state"] for each in found] == ["ok"] * 3, found
        assert [each["details"]["transports"] for each in found] == [["udp"], ["tcp"], ["tls"]]
        for each in found:
            assert each["details"]["relayed"].startswith(f"{server.addresses[4]}:")
            assert 0 < each["details"]["ms"] < LIMIT * 1000


def test_relays_that_are_none(make_world: MakeWorld, tmp_path: Path) -> None:
    """Each for a reason of its own, with what mends it."""
    world = make_world(uplinks=(1, 1))
    server = turn_server(world, tmp_path)
    wrong = tmp_path / "wrong.password"
    wrong.write_text("sparrow")
    wrong.chmod(0o600)
    config = prepare(world, tmp_path)
    bare = config.read_text()
    config.write_text(bare + server.toml(server.url(), password_file=wrong))
    (found,) = relays(world, config, server.environment)
    assert (found["state"], found["details"]["reason"]) == ("problem", "login")
    assert found["details"]["transports"] == ["udp", "tcp"]
    assert "password_file in [ice] turn" in found["remedy"]

    nobody = f"turn:{server.addresses[4]}:9"
    config.write_text(bare + server.toml(server.url(secure=True), nobody))
    untrusted, closed = relays(world, config, {"SSL_CERT_FILE": "/dev/null"})
    assert untrusted["details"]["reason"] == "tls" and "trust" in untrusted["remedy"]
    assert closed["details"]["reason"] == "refused" and "port" in closed["remedy"]

    world.core.run(["nft", "-f", "-"], input=f"""
        table inet dark {{
          chain into {{ type filter hook input priority 0; udp dport {PORT} drop; }}
        }}""")  # fmt: skip
    config.write_text(bare + server.toml(server.url(), server.url(secure=True)))
    silent, tcp, tls = relays(world, config, server.environment)
    assert (silent["state"], silent["details"]["reason"]) == ("warning", "timeout")
    assert "another way to it serves" in silent["summary"] and "turns:" in silent["remedy"]
    assert tcp["state"] == tls["state"] == "ok"


def test_a_relay_that_somebody_else_has(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(uplinks=(1, 1))
    server = turn_server(world, tmp_path, quota=1)
    pair = Pair(world, tmp_path, settings=server.toml(server.url(transport="udp")))
    pair.prepare()
    pair.start("B")
    try:
        deadline = time.monotonic() + _START
        while not any(row["address"] for row in pair.status("B").get("relays", [])):
            assert time.monotonic() < deadline, pair.log("B").read_text()
            time.sleep(0.05)
        (found,) = relays(world, pair.config("A"), server.environment)
        assert (found["state"], found["details"]["reason"]) == ("problem", "quota")
        assert "quota" in found["remedy"]
    finally:
        pair.stop("B")
    (found,) = relays(world, pair.config("A"), server.environment)
    assert found["state"] == "ok", "it was given back"


def test_a_packet_size_that_does_not_get_through(make_world: MakeWorld, tmp_path: Path) -> None:
    """A router that drops what is too large, and tells nobody."""
    world = make_world(uplinks=(1, 1))
    Servers(world, tmp_path).start_stun()
    world.core.run(["nft", "-f", "-"], input="""
        table inet hole {
          chain into {
            type filter hook input priority 0;
            meta l4proto udp ip length > 1400 drop
          }
        }""")  # fmt: skip
    report = doctor(world.a.space, "--stun", STUN)
    assert report.nat("u0")["path_mtu"] == 1400
    assert report.one("mtu")["state"] == "note"


def test_a_router_that_opens_ports(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(uplinks=(1, 1))
    router = HomeRouter(world, tmp_path)
    report = doctor(world.a.space)
    found = report.one("port-mapping")
    assert found["state"] == "ok"
    assert found["details"]["protocols"] == ["PCP", "NAT-PMP", "UPnP"]
    assert found["details"]["external"] == "9.9.9.9"
    assert router.mapped() == [], "nothing was opened"


def test_clashes_with_what_this_host_has(hosts: tuple[Host, Host]) -> None:
    """A route to the very network, an interface of the name, and somebody on the port."""
    _, b = hosts
    assert doctor(b.space, str(b.config)).problems() == []
    b.space.batch(
        "link add mt0 type bridge",
        "route add 10.99.1.0/24 dev eth0",
        "addr add 10.88.0.2/32 dev lo",
    )
    code = "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM);"
    code += "s.bind(('192.0.2.2', 4117)); time.sleep(60)"
    b.space.popen([sys.executable, "-c", code])
    deadline = time.monotonic() + _START
    while ":4117" not in b.space.run(["ss", "-Hlun"]).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    report = doctor(b.space, str(b.config))
    assert sorted(report.problems()) == ["clash", "clash", "name", "port"]
    assert any("routed to eth0 already" in finding["summary"] for finding in report.of("clash"))
    assert "bridge" in report.one("name")["summary"]


def test_beside_a_running_tunnel_which_notices_nothing(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    b.up()
    a.up()
    deadline = time.monotonic() + _START
    while json.loads(a.martlet("status", "--json").stdout)["peers"][0]["state"] != "up":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with watched(a.space) as events:
        report = doctor(a.space, str(a.config))
    assert report.problems() == []
    assert "1 of 1 peers is" in report.one("tunnel")["summary"]
    assert not report.of("peer") and report.one("clash")["state"] == "ok"
    assert not [line for line in events() if "mtprobe" in line], "it made a device here"
    assert doctor(b.space, str(b.config)).one("port")["summary"].endswith("the running tunnel")
    assert json.loads(a.martlet("history", "--json").stdout) == []


@contextmanager
def watched(space: Namespace) -> Iterator[Callable[[], list[str]]]:
    """What the kernel tells of links while the context lasts."""
    process = space.popen(["ip", "-o", "monitor", "link"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    seen: list[str] = []
    try:
        yield lambda: seen
    finally:
        terminated = process.stdout
        process.terminate()
        seen += terminated.read().decode().splitlines()
        process.wait()


def test_a_peer_that_is_not_up_gets_a_reason(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.up()
    report = doctor(a.space, str(a.config))
    assert report.one("peer")["state"] == "warning"
    assert "it was dialled at 192.0.2.2:4117, and did not answer" in report.one("peer")["summary"]
    assert report.code == 0


def test_without_a_tun_device_and_without_privileges(hosts: tuple[Host, Host]) -> None:
    """As in a container that was started without them."""
    space = hosts[0].space
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    report = doctor(space, before=hide)
    assert report.problems() == ["tun"]
    assert "/dev/net/tun" in report.one("tun")["summary"] + report.one("tun")["remedy"]
    poor = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    report = doctor(space, before=poor)
    assert report.problems() == ["privileges", "tun"]
    user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    report = doctor(space, before=user)
    assert report.problems() == [] and report.one("privileges")["state"] == "warning"


def test_a_configuration_with_a_mistake_is_a_finding(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.config.write_text(a.config.read_text().replace("listen_port = 0", "listen_prot = 0"))
    report = doctor(a.space, str(a.config))
    assert report.problems() == ["config"]
    assert report.one("config")["details"]["line"] == 6
    assert report.of("tun"), "the host is looked at all the same"
