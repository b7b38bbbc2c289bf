"""How facts are gathered: what firewalls say, what sockets meet on loopback, all of it in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aioice import stun

from tests.turn_server import PASSWORD, RELAYED, USER
from tests.unit.turn_loop import HOST, Client, LoopServer, make_certificate
from tunnel.config import Endpoint, RendezvousConfig, TurnConfig, loads
from tunnel.doctor.facts import Facts, FirewallFacts, ServerFacts, TunnelFacts
from tunnel.ice import check
from tunnel.ice.behaviour import Mapping
from tunnel.identity import Identity
from tunnel.path.network import Address, LocalAddress, LocalNetwork
from tunnel.shell.doctor import broker, gather, host, nat, network, relay
from tunnel.shell.doctor.gather import Request


def nft(*objects: dict[str, Any]) -> str:
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, *objects]})


def chain(policy: str = "accept", **more: Any) -> dict[str, Any]:
    fields = {"family": "inet", "table": "filter", "name": "input", "hook": "input"}
    return {"chain": {**fields, "type": "filter", "prio": 0, "policy": policy, **more}}


def rule(*expressions: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {"family": "inet", "table": "filter", "chain": "input"}
    return {"rule": {**fields, "expr": list(expressions), **more}}


def dport(right: Any, protocol: str = "udp") -> dict[str, Any]:
    left = {"payload": {"protocol": protocol, "field": "dport"}}
    return {"match": {"op": "==", "left": left, "right": right}}


ACCEPT: dict[str, Any] = {"accept": None}
NAME = ("inet filter input",)


@pytest.mark.parametrize(
    ("objects", "chains", "accepts"),
    [
        ([], (), False),
        ([chain()], (), False),
        ([chain("drop")], NAME, False),
        ([chain("drop", hook="forward")], (), False),
        ([chain("drop", type="nat")], (), False),
        ([chain("drop"), rule(dport(4117), ACCEPT)], NAME, True),
        ([chain("drop"), rule(dport(4117), {"jump": {"target": "x"}})], NAME, True),
        ([chain("drop"), rule(dport(4117), {"drop": None})], NAME, False),
        ([chain("drop"), rule(dport(4117, "tcp"), ACCEPT)], NAME, False),
        ([chain("drop"), rule(dport({"set": [53, 4117]}), ACCEPT)], NAME, True),
        ([chain("drop"), rule(dport({"set": [{"range": [4000, 5000]}]}), ACCEPT)], NAME, True),
        ([chain("drop"), rule(dport({"range": [1, 99]}), ACCEPT)], NAME, False),
        ([chain("drop"), rule(dport("@ports"), ACCEPT)], NAME, False),
        ([chain("drop"), rule(dport(4117), ACCEPT, table="other")], NAME, False),
        ([chain(), rule({"counter": {}}, {"drop": None})], NAME, False),
        ([chain(), rule({"reject": {"type": "icmpx"}})], NAME, False),
        ([chain(), rule(dport(22, "tcp"), {"drop": None})], (), False),
        ([chain(), rule({"drop": None}), rule(ACCEPT)], (), False),
    ],
)
def test_nft(objects: list[dict[str, Any]], chains: tuple[str, ...], accepts: bool) -> None:
    found = network.read_nft(nft(*objects), 4117)
    assert found == FirewallFacts(by="nft", chains=chains, accepts_port=accepts)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nftables": [{"chain": 1}]}', "nonsense"])
def test_an_nft_that_we_do_not_understand_says_nothing(text: str) -> None:
    assert network.read_nft(text, 4117) is None


@pytest.mark.parametrize(
    ("lines", "drops", "accepts"),
    [
        (["-P INPUT ACCEPT"], False, False),
        (["-P INPUT DROP"], True, False),
        (["-P INPUT ACCEPT", "-A INPUT -j REJECT --reject-with x"], True, False),
        (["-P INPUT ACCEPT", "-A INPUT -s 192.0.2.1/32 -j DROP"], False, False),
        (["-P INPUT DROP", "-A INPUT -p udp -m udp --dport 4117 -j ACCEPT"], True, True),
        (["-P INPUT DROP", "-A INPUT -p udp -m udp --dport 41170 -j ACCEPT"], True, False),
        (["-P INPUT DROP", "-A INPUT -p tcp -m tcp --dport 4117 -j ACCEPT"], True, False),
    ],
)  # fmt: skip
def test_iptables(lines: list[str], drops: bool, accepts: bool) -> None:
    found = network.read_iptables("\n".join(lines) + "\n", 4117)
    assert bool(found.chains) is drops and found.accepts_port is accepts


def test_the_output_of_commands() -> None:
    async def outputs() -> list[str | None]:
        commands = (("echo", "yes"), ("false",), ("no-such-command",))
        return [await network._output(*each) for each in commands]

    assert asyncio.run(outputs()) == ["yes\n", None, None]


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "FIREWALL_TIMEOUT", 0.05)
    assert asyncio.run(network._output("sleep", "60")) is None


def test_this_machine_can_be_looked_at() -> None:
    """Whatever it is: as root in the lab, or as a user elsewhere."""
    found = host.gather()
    assert found.libcrypto and found.wanted_buffer
    assert found.root is (os.geteuid() == 0)
    assert found.tun.kind in ("", "missing", "privilege", "system")
    seen = network.gather("", (), None)
    assert seen.error or any(link.loopback for link in seen.links)
    loopback = [a for a in seen.addresses if a.interface == "lo"]
    assert all(address.why_not == "loopback" for address in loopback)


def test_a_run_directory(tmp_path: Path) -> None:
    assert host._run_directory_error(tmp_path / "martlet" / "4026531840") == ""
    (tmp_path / "file").write_text("")
    assert "is no directory" in host._run_directory_error(tmp_path / "file" / "martlet")


def test_a_port_that_is_taken() -> None:
    usable = LocalNetwork((LocalAddress("127.0.0.1", "lo"),), ())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert network._taken(usable, port) == ("127.0.0.1",)
    assert network._taken(usable, port) == ()
    assert network._taken(usable, None) == ()


# STUN


@contextmanager
def stun_server(*, answers: bool = True) -> Iterator[Address]:
    """A plain one on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.02)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    data, client = server.recvfrom(2048)
                except TimeoutError:
                    continue
                if answers:
                    answer = stun.Message(
                        stun.Method.BINDING,
                        stun.Class.RESPONSE,
                        check.transaction_id_of(data),
                        {"XOR-MAPPED-ADDRESS": client},
                    )
                    server.sendto(bytes(answer), client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address.from_sockaddr(server.getsockname())
        finally:
            ended.set()
            thread.join()


def measure(*servers: Address, limit: float = 5.0) -> Any:
    return asyncio.run(nat.measure("127.0.0.1", "", servers, link_mtu=1500, limit=limit))


def test_a_measurement_with_real_sockets() -> None:
    with stun_server() as server:
        found = measure(server)
    assert found.mapping is Mapping.NO_NAT
    assert found.mapped == found.local
    assert found.path_mtu == 1500
    assert 0 < found.servers[0].rtt < 1


def test_a_measurement_ends_in_time_when_nobody_answers() -> None:
    with stun_server(answers=False) as server:
        found = measure(server, limit=0.3)
    assert found.udp_blocked


def test_an_address_that_cannot_be_bound_is_not_measured() -> None:
    found = asyncio.run(
        nat.measure("203.0.113.77", "", [Address("192.0.2.1", 1)], link_mtu=1500, limit=1.0)
    )
    assert found is None


# brokers


async def served(answer: bytes | None, url: str = "mqtt://127.0.0.1:{}") -> Any:
    """What is said of a broker that sends this to whoever connects; None: nothing at all."""

    visitors: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append(writer)
        await reader.read(100)
        if answer:
            writer.write(answer)
        if answer is None:
            await reader.read(100)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        target = url.format(port)
        return await broker.ask(RendezvousConfig(url=(target,)), target, 0.5)
    finally:
        server.close()
        for writer in visitors:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        (b"\x20\x02\x00\x00", "", ""),
        (b"\x20\x02\x00\x04", "login", "password"),
        (b"\x20\x02\x00\x05", "login", "user name or password missing"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol", "MQTT"),
        (b"", "protocol", "closed"),
        (None, "timeout", "does not answer"),
    ],
)
def test_brokers(answer: bytes | None, reason: str, words: str) -> None:
    found = asyncio.run(served(answer))
    assert (found.reason, found.url.partition(":")[0]) == (reason, "mqtt")
    assert words in found.error
    assert (found.seconds is not None) is (reason == "")


def test_a_broker_that_is_not_there_or_not_what_it_is_said_to_be() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{closed.getsockname()[1]}"
        found = asyncio.run(broker.ask(RendezvousConfig(url=(url,)), url, 1.0))
    assert found.reason == "refused"
    assert asyncio.run(served(b"\x20\x02\x00\x00", "mqtts://127.0.0.1:{}")).reason == "protocol"


def test_a_password_file_that_cannot_be_used_is_the_reason(tmp_path: Path) -> None:
    url = "mqtt://127.0.0.1:1"
    config = RendezvousConfig(url=(url,), username="a", password_file=tmp_path / "none")
    found = asyncio.run(broker.ask(config, url, 1.0))
    assert found.reason == "other" and "password file" in found.error


# relays


def ask_relay(
    password: Path,
    transport: str = "udp",
    *,
    prepare: Callable[[Client], None] = lambda client: None,
    user: str | None = USER,
    limit: float = 3.0,
    context: ssl.SSLContext | None = None,
    deaf: bool = False,
) -> tuple[ServerFacts, list[Client]]:
    """What is said of a scripted server, and whom the server has seen."""

    async def run() -> tuple[ServerFacts, list[Client]]:
        server = LoopServer()
        server.prepare, server.deaf = prepare, deaf
        await server.start(context)
        try:
            scheme, query = (
                ("turns", "") if transport == "tls" else ("turn", f"?transport={transport}")
            )
            turn = TurnConfig(
                url=f"{scheme}:{HOST}:{server.port}{query}",
                username=user,
                password_file=password if user else None,
            )
            found = await relay.ask(turn, transport, limit)
            await asyncio.sleep(0.05)  # for the last message to arrive
        finally:
            server.stop()
            await asyncio.sleep(0.02)  # for transports to close
        return found, server.clients

    return asyncio.run(run())


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    path.chmod(0o600)
    return path


def refusing(code: int, *, times: int | None = None) -> Callable[[Client], None]:
    """Servers that answer so to the first clients."""
    seen: list[Client] = []

    def prepare(client: Client) -> None:
        seen.append(client)
        if times is None or len(seen) <= times:
            client.server.errors[stun.Method.ALLOCATE] = code

    return prepare


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_relay_is_got_and_given_back(password: Path, transport: str) -> None:
    found, clients = ask_relay(password, transport)
    assert (found.error, found.reason, found.transport) == ("", "", transport)
    assert found.detail == str(RELAYED)
    assert found.seconds is not None and 0 < found.seconds < 3
    [client] = clients
    assert not client.server.allocated, "it was given back"


def test_a_relay_over_tls_whose_certificate_nobody_trusts(password: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make_certificate(tmp_path))
    found, _ = ask_relay(password, "tls", context=context)
    assert found.reason == "tls" and "not trusted" in found.error


def test_a_relay_over_tls(password: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    found, _ = ask_relay(password, "tls", context=context)
    assert (found.error, found.detail) == ("", str(RELAYED))


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (403, "other", "forbids"),
        (442, "unsupported", "does not relay UDP"),
        (486, "quota", "number of relays"),
        (508, "quota", "no room"),
        (437, "other", "knows this port already"),
    ],
)
def test_a_relay_that_is_denied(
    password: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str, words: str
) -> None:
    monkeypatch.setattr(relay, "FULL_PATIENCE", 0.2)
    monkeypatch.setattr(relay, "FULL_PAUSE", 0.1)
    found, _ = ask_relay(password, prepare=refusing(code))
    assert found.reason == reason and words in found.error


@pytest.mark.parametrize(("code", "times"), [(486, 1), (437, 1)])
def test_a_relay_at_the_second_try(password: Path, code: int, times: int) -> None:
    found, clients = ask_relay(password, prepare=refusing(code, times=times))
    assert found.error == "" and len(clients) == 2


def test_a_server_that_has_relays_of_the_other_family_only(password: Path) -> None:
    def only_ipv6(client: Client) -> None:
        def judge(message: stun.Message) -> None:
            errors = client.server.errors
            errors.clear()
            if "REQUESTED-ADDRESS-FAMILY" not in message.attributes:
                errors[stun.Method.ALLOCATE] = 440

        client.server.on_request = judge

    found, _ = ask_relay(password, prepare=only_ipv6)
    assert found.detail.startswith("[")


def test_a_wrong_password_and_none_at_all(password: Path) -> None:
    password.write_text("sparrow")
    found, _ = ask_relay(password)
    assert found.reason == "login" and "user name or the password" in found.error
    found, _ = ask_relay(password, user=None)
    assert found.reason == "login" and "none are configured" in found.error
    password.unlink()
    found, _ = ask_relay(password)
    assert found.reason == "other" and "password file" in found.error


def test_a_relay_that_says_nothing(password: Path) -> None:
    found, _ = ask_relay(password, deaf=True, limit=0.3)
    assert (found.reason, found.seconds) == ("timeout", None)
    assert "no answer" in found.error


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request, go away", b""])
def test_something_else_that_listens_there(password: Path, answer: bytes) -> None:
    async def run() -> list[ServerFacts]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        plain = TurnConfig(url=f"turn:{HOST}:{port}?transport=tcp")
        secure = TurnConfig(url=f"turns:{HOST}:{port}")
        try:
            return [await relay.ask(plain, "tcp", 1.0), await relay.ask(secure, "tls", 1.0)]
        finally:
            server.close()

    plain, secure = asyncio.run(run())
    assert (plain.reason, secure.reason) == ("protocol", "protocol")
    assert "TURN" in plain.error


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_relay_that_is_not_there(transport: str) -> None:
    kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
    with socket.socket(type=kind) as closed:
        closed.bind((HOST, 0))
        port = closed.getsockname()[1]
    turn = TurnConfig(url=f"turn:{HOST}:{port}?transport={transport}")
    found = asyncio.run(relay.ask(turn, transport, 2.0))
    assert found.reason == "refused" and "nothing listens" in found.error


def test_a_relay_whose_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(name: str, port: int) -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(relay, "lookup", lookup)
    found = asyncio.run(relay.ask(TurnConfig(url="turn:none.example"), "udp", 1.0))
    assert found.reason == "name" and "none.example" in found.error


# all of it


def look(request: Request) -> tuple[Facts, list[Sequence[str]]]:
    told: list[Sequence[str]] = []
    return asyncio.run(gather.gather(request, told.append)), told


def test_everything_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "lookup", lambda name, port: [Address("192.0.2.1", port)])
    monkeypatch.setattr(gather, "LIMIT", 1.2)
    key = Identity.generate()
    key.save(tmp_path / "key")
    (tmp_path / "password").write_text("secret")
    (tmp_path / "password").chmod(0o600)
    config = loads(
        f"""
[interface]
name = "mt0"
address = ["10.88.0.1/24"]
private_key = "{tmp_path}/key"
[[peer]]
name = "office"
public_key = "{key.public_key.openssh}"
allowed_ips = ["10.88.0.2/32"]
endpoint = ["office.example:4117", "office.example:4118", "192.0.2.5:1"]
[ice]
turn = [{{ url = "turn:127.0.0.1:9", username = "a", password_file = "{tmp_path}/password" }}]
""",
        tmp_path / "mt0.toml",
    )
    tunnels = (TunnelFacts(name="other", status={}),)
    facts, told = look(Request(config=config, config_path="mt0.toml", tunnels=tunnels))
    assert told[0] and all(len(later) < len(first) for first, later in pairwise(told))
    [name] = facts.names
    assert (name.name, name.used_by, name.addresses) == (
        "office.example", ("peer office",), ("192.0.2.1",),
    )  # fmt: skip
    assert facts.config_error is not None and "this host's own" in facts.config_error.problem
    assert [(file.what, file.mode) for file in facts.files] == [
        ("private key", 0o600),
        ("password file", (tmp_path / "password").stat().st_mode & 0o7777),
    ]
    assert facts.tunnels == tunnels and facts.nats == () and facts.brokers == ()
    assert [(server.transport, server.reason) for server in facts.turn] == [
        ("udp", "refused"), ("tcp", "refused"),
    ]  # fmt: skip


def test_the_servers_of_the_command_line() -> None:
    request = Request(
        rendezvous=RendezvousConfig(url=("mqtt://127.0.0.1:1",)),
        stun=(Endpoint("127.0.0.1", 3478),),
    )
    facts, _ = look(request)
    [asked] = facts.brokers
    assert asked.reason == "refused"
    assert [(s.endpoint, s.implied) for s in facts.stun] == [(Endpoint("127.0.0.1", 3478), False)]
    assert facts.nats == (), "no peer is on loopback, so no path leads there"


def test_a_rendezvous_implies_a_stun_server() -> None:
    rendezvous = RendezvousConfig(url=("mqtt://127.0.0.1:1", "mqtts://127.0.0.1:2"))
    facts, _ = look(Request(rendezvous=rendezvous))
    assert [(s.endpoint.port, s.implied) for s in facts.stun] == [(3478, True)]


def test_names_that_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def lookup(name: str, port: int) -> list[Address]:
        if name == "slow.example":
            ended.wait(10)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(gather, "lookup", lookup)
    monkeypatch.setattr(gather, "LIMIT", 1.2)
    monkeypatch.setattr(gather, "NAMES_LIMIT", 0.1)
    try:
        facts, told = look(
            Request(stun=(Endpoint("slow.example", 1), Endpoint("none.example", 1)))
        )  # fmt: skip
    finally:
        ended.set()
    errors = {name.name: name.error for name in facts.names}
    assert errors["none.example"] == "Name or service not known"
    assert errors["slow.example"].startswith("no answer within")
    assert told[-1] == ["DNS slow.example"]


def test_a_thousand_names_are_not_a_thousand_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def lookup(name: str, port: int) -> list[Address]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1
        return [Address("127.0.0.1", port)]

    monkeypatch.setattr(gather, "lookup", lookup)
    facts, _ = look(Request(stun=tuple(Endpoint(f"{n}.example", 3478) for n in range(200))))
    assert [name.error for name in facts.names] == [""] * 200
    assert 0 < most <= gather.LOOKUPS
