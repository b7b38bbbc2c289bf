"""What the doctor says of facts that are written down here: each finding, and its remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from tunnel.config import Config, Endpoint, loads
from tunnel.doctor.facts import (
    AddressFacts,
    Facts,
    FileFacts,
    FirewallFacts,
    HostFacts,
    LinkFacts,
    NameFacts,
    NetworkFacts,
    PortMappingFacts,
    RouteFacts,
    ServerFacts,
    StunFacts,
    TunFacts,
    TunnelFacts,
)
from tunnel.doctor.finding import GROUPS, Finding, Nat, Report, State
from tunnel.doctor.judge import judge, verdict
from tunnel.doctor.tunnels import why_not_up
from tunnel.errors import ConfigError
from tunnel.ice.behaviour import Behaviour, Filtering, Mapping, ServerSeen
from tunnel.identity import Identity
from tunnel.path.network import Address, LocalAddress, LocalNetwork, Route

KEY = Identity.generate().public_key.openssh
DEFAULT = ip_network("0.0.0.0/0")
SERVER = Address("192.0.2.53", 3478)
STUN = StunFacts(endpoint=Endpoint("192.0.2.53", 3478), addresses=(SERVER,))

HOST = HostFacts(
    net_admin=True,
    root=True,
    container=False,
    tun=TunFacts(tcp_offload=True, udp_offload=True),
    udp_segment=True,
    udp_gro=True,
    so_mark=True,
    libcrypto="OpenSSL 3.5.0",
    receive_buffer=4 << 20,
    wanted_buffer=4 << 20,
    run_directory="/run/martlet",
    wall_time=1.8e9,
)
NETWORK = NetworkFacts(
    links=(
        LinkFacts(name="lo", mtu=65536, up=True, carrier=True, loopback=True),
        LinkFacts(name="eth0", mtu=1500, up=True, carrier=True),
    ),
    addresses=(
        AddressFacts(ip="127.0.0.1", interface="lo", why_not="loopback"),
        AddressFacts(ip="192.168.1.5", interface="eth0"),
    ),
    routes=(
        RouteFacts(network=DEFAULT, interface="eth0", gateway="192.168.1.1"),
        RouteFacts(network=ip_network("192.168.1.0/24"), interface="eth0"),
    ),
    usable=LocalNetwork(
        (LocalAddress("192.168.1.5", "eth0"),), (Route(DEFAULT, "eth0", 100),)
    ),
    firewall=FirewallFacts(by="nft"),
)  # fmt: skip


def behaviour(**more: Any) -> Behaviour:
    fields: dict[str, Any] = {
        "local": Address("192.168.1.5", 40000),
        "mapped": Address("203.0.113.7", 40000),
        "mapping": Mapping.ENDPOINT_INDEPENDENT,
        "filtering": Filtering.ADDRESS_AND_PORT_DEPENDENT,
        "hairpin": False,
        "cgnat": False,
        "udp_blocked": False,
        "path_mtu": 1500,
        "servers": (ServerSeen(SERVER, 0.02, Address("203.0.113.7", 40000)),),
    }
    return Behaviour(**{**fields, **more})


BLOCKED = behaviour(
    mapped=None, mapping=Mapping.UNKNOWN, filtering=Filtering.UNKNOWN, hairpin=None,
    udp_blocked=True, path_mtu=None, servers=(ServerSeen(SERVER, None, None),),
)  # fmt: skip
HARD = behaviour(mapping=Mapping.ADDRESS_AND_PORT_DEPENDENT)


def config(extra: str = "", *, address: str = "10.88.0.1/24", endpoint: str = "") -> Config:
    return loads(
        f"""
[interface]
name = "mt0"
address = ["{address}"]
private_key = "/etc/martlet/id_ed25519"
listen_port = 4117
[[peer]]
name = "office"
public_key = "{KEY}"
allowed_ips = ["10.88.0.2/32", "10.99.0.0/16"]
{endpoint}
{extra}
""",
        Path("/etc/martlet/mt0.toml"),
    )


def facts(**more: Any) -> Facts:
    return replace(
        Facts(
            version="1.2.3", host=HOST, network=NETWORK, stun=(STUN,),
            nats=(Nat("eth0", behaviour()),),
        ),
        **more,
    )  # fmt: skip


def configured(**more: Any) -> Facts:
    fields = {"config": config(), "config_path": "/etc/martlet/mt0.toml", **more}
    return facts(**fields)


def on_host(**more: Any) -> Facts:
    return facts(host=replace(HOST, **more))


def on_network(**more: Any) -> Facts:
    return configured(network=replace(NETWORK, **more))


def nat(*found: Behaviour, **more: Any) -> Facts:
    return facts(nats=tuple(Nat("eth0", each) for each in found), **more)


def of(check: str, given: Facts) -> list[Finding]:
    return [finding for finding in judge(given).findings if finding.check == check]


def one(check: str, given: Facts) -> Finding:
    found = of(check, given)
    assert len(found) == 1, found
    return found[0]


def test_a_healthy_host_has_nothing_but_good_findings() -> None:
    report = judge(configured(tunnels=(TunnelFacts(name="mt0", status={"peers": []}),)))
    assert report.worst is State.OK, [f for f in report.findings if f.state]
    assert verdict(report) == "all is well; direct connections are likely"
    assert not any(finding.remedy for finding in report.findings)


def test_a_host_without_any_configuration_is_judged_too() -> None:
    report = judge(Facts(version="1", host=HOST, network=NETWORK))
    assert report.worst is State.NOTE
    assert {f.check for f in report.findings if f.state} == {"nat"}
    assert "--stun" in one("nat", Facts(version="1", host=HOST, network=NETWORK)).remedy


def test_every_finding_is_shown_in_a_group() -> None:
    report = judge(configured())
    shown = [finding for _, findings in report.groups() for finding in findings]
    assert sorted(map(id, shown)) == sorted(map(id, report.findings))
    checks = [check for group in GROUPS.values() for check in group]
    assert len(checks) == len(set(checks))


def test_the_report_as_json() -> None:
    told = json.loads(json.dumps(judge(configured()).as_json()))
    assert list(told) == ["version", "findings", "nat"]
    assert told["version"] == "1.2.3"
    for finding in told["findings"]:
        assert list(finding) == ["check", "state", "summary", "remedy", "details"]
        assert finding["state"] in ("ok", "note", "warning", "problem")
    [measured] = told["nat"]["ipv4"]
    assert told["nat"]["ipv6"] == []
    assert measured["mapping"] == "endpoint-independent"
    assert measured["interface"] == "eth0" and measured["servers"][0]["rtt_ms"] == 20.0


# this host


@pytest.mark.parametrize(
    ("more", "check", "state", "remedy"),
    [
        ({"net_admin": False, "root": False}, "privileges", State.WARNING, "sudo martlet doctor"),
        ({"net_admin": False}, "privileges", State.PROBLEM, "NET_ADMIN"),
        ({"net_admin": False, "container": True}, "privileges", State.PROBLEM, "--cap-add"),
        ({"tun": TunFacts(kind="missing")}, "tun", State.PROBLEM, "modprobe tun"),
        (
            {"tun": TunFacts(kind="missing"), "container": True},
            "tun", State.PROBLEM, "--device /dev/net/tun --cap-add NET_ADMIN",
        ),
        ({"tun": TunFacts(kind="privilege")}, "tun", State.PROBLEM, "NET_ADMIN"),
        ({"tun": TunFacts(kind="privilege"), "root": False}, "tun", State.NOTE, "sudo"),
        ({"tun": TunFacts(kind="system", message="it is odd")}, "tun", State.PROBLEM, ""),
        ({"tun": TunFacts()}, "tun", State.WARNING, "5.0"),
        ({"tun": TunFacts(tcp_offload=True)}, "tun", State.OK, ""),
        ({"udp_segment": False}, "kernel", State.WARNING, "5.0"),
        ({"udp_gro": False}, "kernel", State.WARNING, "5.0"),
        ({"so_mark": False}, "kernel", State.NOTE, ""),
        ({"libcrypto": None, "engine_error": "no such file"}, "engine", State.PROBLEM, "install"),
        ({"advice": "a newer one is faster"}, "engine", State.NOTE, ""),
        ({"receive_buffer": 1 << 17}, "buffers", State.WARNING, "net.core.rmem_max=4194304"),
        ({"receive_buffer": 1 << 17, "net_admin": False}, "buffers", State.NOTE, ""),
        ({"run_directory_error": "read-only"}, "run-directory", State.PROBLEM, "mkdir"),
        (
            {"run_directory_error": "read-only", "container": True},
            "run-directory", State.PROBLEM, "--tmpfs /run",
        ),
        ({"run_directory_error": "x", "root": False}, "run-directory", State.NOTE, "sudo"),
        ({"wall_time": 0.0}, "clock", State.WARNING, "timedatectl"),
    ],
)  # fmt: skip
def test_this_host(more: dict[str, Any], check: str, state: State, remedy: str) -> None:
    found = one(check, on_host(**more))
    assert found.state is state
    assert remedy in found.remedy and bool(remedy) == bool(found.remedy)


def test_a_clock_that_was_never_set_is_named() -> None:
    assert "1970-01-01" in one("clock", on_host(wall_time=0.0)).summary


def test_loopback_is_needed_by_relays() -> None:
    down = replace(NETWORK, links=(replace(NETWORK.links[0], up=False), NETWORK.links[1]))
    assert one("loopback", facts(network=down)).state is State.WARNING
    relayed = config('[ice]\nturn = [{ url = "turn:turn.example" }]')
    found = one("loopback", facts(network=down, config=relayed))
    assert (found.state, found.remedy) == (State.PROBLEM, "ip link set lo up")


# the configuration


def test_an_invalid_configuration_is_a_finding_with_its_line() -> None:
    error = ConfigError(
        "this is no port", file="/etc/x.toml", line=7, key="interface.listen_port", remedy="mend it"
    )
    found = one("config", facts(config_error=error, config_path="/etc/x.toml"))
    assert found.state is State.PROBLEM
    assert found.summary == "/etc/x.toml:7: interface.listen_port: this is no port"
    assert found.remedy == "mend it"
    assert found.details == {"file": "/etc/x.toml", "line": 7, "key": "interface.listen_port"}


@pytest.mark.parametrize(
    ("file", "state", "remedy"),
    [
        (FileFacts(path="k", what="private key", mode=0o600), State.OK, ""),
        (FileFacts(path="k", what="private key", mode=0o644), State.WARNING, "chmod 600 k"),
        (
            FileFacts(path="k", what="private key", error="not there", remedy="make it"),
            State.PROBLEM,
            "make it",
        ),
    ],
)
def test_files(file: FileFacts, state: State, remedy: str) -> None:
    found = one("files", configured(files=(file,)))
    assert (found.state, found.remedy) == (state, remedy)


def test_a_port_that_somebody_else_has() -> None:
    assert one("port", configured()).state is State.OK
    found = one("port", on_network(port_taken=("192.168.1.5",)))
    assert found.state is State.PROBLEM
    assert "4117" in found.summary and "ss -lunp 'sport = :4117'" in found.remedy


def test_the_port_of_a_running_tunnel_is_its_own() -> None:
    running = (TunnelFacts(name="mt0", status={"peers": []}),)
    found = one("port", configured(tunnels=running))
    assert found.state is State.OK and "running tunnel" in found.summary


def test_an_interface_of_that_name() -> None:
    def with_link(**more: Any) -> NetworkFacts:
        link = LinkFacts(name="mt0", mtu=1500, up=True, carrier=True, **more)
        return replace(NETWORK, links=(*NETWORK.links, link))

    assert not of("name", configured())
    found = one("name", configured(network=with_link(kind="bridge")))
    assert found.state is State.PROBLEM and "bridge" in found.summary
    left_over = configured(network=with_link(martlet=True))
    assert one("name", left_over).state is State.WARNING
    assert not of("name", replace(left_over, tunnels=(TunnelFacts(name="mt0", status={}),)))


@pytest.mark.parametrize(
    ("network", "interface", "state", "words"),
    [
        ("10.88.0.0/24", "eth1", State.PROBLEM, "routed to eth1 already"),
        ("10.99.0.0/16", "eth1", State.PROBLEM, "allowed_ips of office"),
        ("10.88.0.0/16", "eth1", State.WARNING, "lies inside 10.88.0.0/16 of eth1"),
        ("10.99.7.0/24", "eth1", State.WARNING, "do not enter the tunnel"),
        ("10.88.0.0/24", "mt0", State.OK, ""),
        ("0.0.0.0/0", "eth1", State.OK, ""),
        ("172.16.0.0/12", "eth1", State.OK, ""),
        ("2001:db8::/32", "eth1", State.OK, ""),
    ],
)
def test_clashes_with_routes(network: str, interface: str, state: State, words: str) -> None:
    route = RouteFacts(network=ip_network(network), interface=interface)
    [found, *more] = of("clash", on_network(routes=(*NETWORK.routes, route)))
    assert not more, "one clash is told once"
    assert found.state is state and words in found.summary
    assert bool(found.remedy) == (state is not State.OK)


def test_a_clash_with_another_tunnel_names_it() -> None:
    link = LinkFacts(name="mt7", mtu=1420, up=True, carrier=True, martlet=True)
    route = RouteFacts(network=ip_network("10.99.0.0/16"), interface="mt7")
    network = replace(NETWORK, links=(*NETWORK.links, link), routes=(route,))
    assert "tunnel mt7" in one("clash", configured(network=network)).summary


def test_an_inner_address_that_this_host_has_already() -> None:
    twice = AddressFacts(ip="10.88.0.1", interface="br0")
    found = one("clash", on_network(addresses=(*NETWORK.addresses, twice)))
    assert found.state is State.PROBLEM and "br0" in found.summary


def test_not_every_one_of_a_thousand_clashes_is_told() -> None:
    routes = tuple(
        RouteFacts(network=ip_network(f"10.99.{n}.0/24"), interface="eth1") for n in range(200)
    )
    assert len(of("clash", on_network(routes=routes))) < 20


# the network


def test_no_usable_address() -> None:
    link = replace(NETWORK.links[1], up=False)
    found = of("addresses", on_network(usable=LocalNetwork(), links=(link,)))
    assert [f.state for f in found] == [State.PROBLEM]
    assert found[0].remedy == "bring one up: ip link set eth0 up"


def test_addresses_that_are_not_used_are_named_with_the_reason() -> None:
    docker = AddressFacts(ip="172.17.0.1", interface="docker0", why_not="excluded by docker*")
    found = of("addresses", on_network(addresses=(*NETWORK.addresses, docker)))
    assert [f.state for f in found] == [State.OK, State.NOTE]
    assert found[1].summary == "not used: 172.17.0.1 (docker0: excluded by docker*)"
    assert "127.0.0.1" not in found[1].summary


def test_default_routes() -> None:
    assert one("routes", facts()).summary == "default routes: IPv4 by eth0; no IPv6"
    none = on_network(usable=LocalNetwork(NETWORK.usable.addresses, ()))
    assert one("routes", none).state is State.WARNING


def test_a_kernel_that_does_not_tell() -> None:
    found = one("addresses", facts(network=NetworkFacts(error="operation not permitted")))
    assert found.state is State.WARNING and "not permitted" in found.summary


def test_ipv6_that_is_off() -> None:
    off = replace(NETWORK, ipv6="off")
    assert one("ipv6", configured(network=off)).state is State.NOTE
    inner = config(address="fd88::1/64")
    found = one("ipv6", facts(network=off, config=inner))
    assert found.state is State.PROBLEM and "disable_ipv6=0" in found.remedy
    absent = one("ipv6", facts(network=replace(NETWORK, ipv6="absent"), config=inner))
    assert absent.state is State.PROBLEM and "sysctl" not in absent.remedy


def test_strict_reverse_path_filtering_matters_with_two_uplinks() -> None:
    strict = {"eth0": 1, "wlan0": 2}
    assert not of("rp-filter", on_network(rp_filter=strict))
    two = LocalNetwork((*NETWORK.usable.addresses, LocalAddress("10.0.0.7", "wlan0")), ())
    found = one("rp-filter", on_network(rp_filter=strict, usable=two))
    assert found.state is State.WARNING and "rp_filter=2" in found.remedy
    assert not of("rp-filter", on_network(rp_filter={"eth0": 2, "wlan0": 0}, usable=two))


def test_a_firewall_that_drops() -> None:
    drops = FirewallFacts(by="nft", chains=("inet filter input",))
    found = one("firewall", on_network(firewall=drops))
    assert found.state is State.WARNING
    assert found.remedy == "nft add rule inet filter input udp dport 4117 accept"
    assert "iptables -I INPUT" in one(
        "firewall", on_network(firewall=replace(drops, by="iptables", chains=("INPUT",)))
    ).remedy  # fmt: skip
    open_port = replace(drops, accepts_port=True)
    assert one("firewall", on_network(firewall=open_port)).state is State.OK
    any_port = facts(network=replace(NETWORK, firewall=drops))
    assert one("firewall", any_port).state is State.NOTE
    assert not of("firewall", on_network(firewall=None))


@pytest.mark.parametrize(
    ("link", "path", "state", "remedy"),
    [
        (1500, 1500, State.OK, ""),
        (1500, None, State.OK, ""),
        (9000, 1500, State.OK, ""),
        (1500, 1400, State.NOTE, ""),
        (1500, 1228, State.WARNING, ""),
        (1500, 576, State.WARNING, "turns:"),
        (1240, 1240, State.WARNING, "ip link set eth0 mtu 1500"),
        (1000, None, State.WARNING, "ip link set eth0 mtu 1500"),
    ],
)
def test_packet_sizes(link: int, path: int | None, state: State, remedy: str) -> None:
    network = replace(NETWORK, links=(NETWORK.links[0], replace(NETWORK.links[1], mtu=link)))
    found = one("mtu", nat(behaviour(path_mtu=path), network=network))
    assert found.state is state and remedy in found.remedy
    assert "eth0" in found.summary


def test_names() -> None:
    good = NameFacts(name="a.example", used_by=("broker",), addresses=("192.0.2.1",), seconds=0.01)
    slow = replace(good, name="b.example", seconds=2.5)
    bad = NameFacts(name="c.example", used_by=("peer office",), error="no such name")
    found = {f.state: f for f in of("dns", facts(names=(good, slow, bad)))}
    assert "c.example (peer office)" in found[State.PROBLEM].summary
    assert "getent ahosts c.example" in found[State.PROBLEM].remedy
    assert "2.5 s" in found[State.WARNING].summary
    assert found[State.OK].summary == "resolved within 10 ms: a.example"


# the way to peers


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (behaviour(), State.OK, "easy NAT"),
        (behaviour(filtering=Filtering.UNKNOWN), State.OK, "easy NAT: direct"),
        (HARD, State.WARNING, "hard NAT: maps each destination to another port"),
        (behaviour(mapping=Mapping.ADDRESS_DEPENDENT), State.WARNING, "maps each host"),
        (behaviour(mapping=Mapping.UNKNOWN), State.NOTE, "203.0.113.7"),
        (behaviour(mapping=Mapping.UNKNOWN, mapped=None), State.WARNING, "does not tell"),
        (behaviour(mapping=Mapping.NO_NAT), State.OK, "a firewall lets in only"),
        (
            behaviour(mapping=Mapping.NO_NAT, filtering=Filtering.ENDPOINT_INDEPENDENT),
            State.OK,
            "no NAT, no firewall",
        ),
        (behaviour(mapping=Mapping.NO_NAT, filtering=Filtering.UNKNOWN), State.OK, "no NAT: "),
    ],
)
def test_nats(found: Behaviour, state: State, words: str) -> None:
    said = one("nat", nat(found))
    assert said.state is state and words in said.summary
    assert said.summary.startswith("eth0 (IPv4): ")
    assert bool(said.remedy) == (state in (State.WARNING, State.NOTE))


def test_a_hard_nat_is_no_matter_with_a_relay() -> None:
    relay = ServerFacts(url="turn:turn.example", seconds=0.1, detail="198.51.100.9:50000")
    found = one("nat", nat(HARD, turn=(relay,)))
    assert found.state is State.NOTE and not found.remedy
    assert "advertise" in one("nat", nat(HARD)).remedy


def test_a_hard_nat_on_one_of_two_ways_is_only_worth_knowing() -> None:
    found = of("nat", facts(nats=(Nat("eth0", HARD), Nat("wlan0", behaviour()))))
    assert [f.state for f in found] == [State.NOTE, State.OK]


def test_udp_is_blocked() -> None:
    found = one("udp", nat(BLOCKED))
    assert found.state is State.PROBLEM and "it is down, or UDP is blocked" in found.summary
    assert not of("nat", nat(BLOCKED)) and not of("stun", nat(BLOCKED))


def test_two_silent_servers_or_one_that_answers_otherwise_prove_it() -> None:
    other = ServerSeen(Address("192.0.2.99", 3478), None, None)
    two = replace(BLOCKED, servers=(*BLOCKED.servers, other))
    assert "UDP is blocked here" in one("udp", nat(two)).summary
    broker = ServerFacts(url="mqtt://b.example", seconds=0.1)
    assert "but other servers do" in one("udp", nat(BLOCKED, brokers=(broker,))).summary


def test_a_relay_over_tcp_helps_where_udp_is_blocked() -> None:
    relay = ServerFacts(url="turns:turn.example:443", transport="tls", seconds=0.1)
    found = one("udp", nat(BLOCKED, turn=(relay,)))
    assert found.state is State.WARNING and "by the relay" in found.summary


def test_a_relay_over_udp_shows_that_it_is_not_blocked() -> None:
    relay = ServerFacts(url="turn:turn.example", transport="udp", seconds=0.1)
    found = one("udp", nat(BLOCKED, turn=(relay,)))
    assert found.state is State.WARNING and "UDP gets to the TURN server" in found.summary
    assert "stun" in found.remedy


def test_udp_is_blocked_on_one_of_two_ways() -> None:
    found = of("udp", facts(nats=(Nat("eth0", BLOCKED), Nat("wlan0", behaviour()))))
    assert [f.state for f in found] == [State.OK, State.NOTE]
    assert "wlan0" in found[0].summary and "eth0" in found[1].summary


def test_a_broker_need_not_have_a_stun_server_beside() -> None:
    assert one("udp", nat(BLOCKED, stun=(replace(STUN, implied=True),))).state is State.WARNING


def test_a_stun_server_among_others_that_is_silent() -> None:
    dead = Address("192.0.2.99", 3478)
    seen = behaviour(servers=(*behaviour().servers, ServerSeen(dead, None, None)))
    servers = (STUN, StunFacts(endpoint=Endpoint("192.0.2.99", 3478), addresses=(dead,)))
    good, bad = of("stun", nat(seen, stun=servers))
    assert (good.state, bad.state) == (State.OK, State.WARNING)
    assert good.summary == "192.0.2.53:3478 answers in 20 ms"


def test_a_stun_server_whose_name_is_unknown_is_told_of_once() -> None:
    nobody = StunFacts(endpoint=Endpoint("stun.example", 3478), addresses=())
    assert not of("stun", facts(stun=(nobody,), nats=()))


def test_carrier_grade_nat() -> None:
    assert not of("cgnat", facts())
    behind = behaviour(cgnat=True)
    assert one("cgnat", nat(behind)).state is State.NOTE
    advertising = config('[ice]\nadvertise = ["203.0.113.9:4117"]')
    assert one("cgnat", nat(behind, config=advertising)).state is State.WARNING


def test_a_router_that_knows_another_address_than_the_internet_does() -> None:
    router = PortMappingFacts(gateway="192.168.1.1", protocols=("PCP",), external="100.64.3.4")
    told = facts(port_mapping=(router,))
    assert one("cgnat", told).details["router"] == "100.64.3.4"
    assert one("port-mapping", told).state is State.OK
    mute = PortMappingFacts(gateway="192.168.1.1")
    assert one("port-mapping", facts(port_mapping=(mute,))).state is State.NOTE


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("name", "host name"),
        ("refused", "martlet rendezvous"),
        ("timeout", "wss://"),
        ("tls", "ca_file"),
        ("validity", "date -u"),
        ("login", "password_file"),
        ("protocol", "scheme and port"),
    ],
)
def test_brokers_that_do_not_let_us_in(reason: Any, remedy: str) -> None:
    bad = ServerFacts(url="mqtt://b.example", error="it says no", reason=reason)
    found = one("broker", facts(brokers=(bad,)))
    assert found.state is State.PROBLEM and remedy in found.remedy
    good = ServerFacts(url="mqtt://c.example", seconds=0.123)
    first, second = of("broker", facts(brokers=(bad, good)))
    assert first.state is State.WARNING and "another serves" in first.summary
    assert second.summary == "broker mqtt://c.example lets us in (123 ms)"


def test_relays() -> None:
    url, relayed = "turn:t.example", "198.51.100.9:50000"
    good = ServerFacts(url=url, transport="udp", seconds=0.05, detail=relayed)
    found = one("turn", facts(turn=(good,)))
    assert found.summary == f"TURN server {url} over UDP relays for us at {relayed} (50 ms)"
    assert found.details["relayed"] == relayed
    bad = ServerFacts(url=url, transport="tcp", error="no", reason="timeout")
    _, found = of("turn", facts(turn=(good, bad)))
    assert found.state is State.WARNING
    assert found.summary == f"TURN server {url} over TCP: no; another way to it serves"
    elsewhere = replace(bad, url="turn:u.example")
    _, found = of("turn", facts(turn=(good, elsewhere)))
    assert found.summary.endswith("no; another serves")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("name", "host name"),
        ("refused", "port of its url"),
        ("timeout", "turns:HOST:443"),
        ("tls", "update-ca-certificates"),
        ("validity", "date -u"),
        ("login", "password_file in [ice] turn"),
        ("quota", "user-quota"),
        ("protocol", "scheme and port"),
    ],
)
def test_relays_that_do_not_let_us_in(reason: Any, remedy: str) -> None:
    """Over both transports for the same reason: that is one finding."""
    bad = [
        ServerFacts(url="turn:t.example", transport=transport, error="no", reason=reason)
        for transport in ("udp", "tcp")
    ]
    found = one("turn", facts(turn=tuple(bad)))
    assert found.state is State.PROBLEM and remedy in found.remedy
    assert found.summary == "TURN server turn:t.example over UDP and TCP: no"


# tunnels


def running(state: str, name: str = "office") -> tuple[TunnelFacts, ...]:
    return (TunnelFacts(name="mt0", status={"peers": [{"name": name, "state": state}]}),)


def test_running_tunnels() -> None:
    assert one("tunnel", configured(tunnels=running("up"))).state is State.OK
    assert not of("peer", configured(tunnels=running("up")))
    missing = one("tunnel", configured())
    assert missing.state is State.NOTE and missing.remedy == "martlet up /etc/martlet/mt0.toml"
    mute = (TunnelFacts(name="mt0", error="it is busy"),)
    assert one("tunnel", configured(tunnels=mute)).state is State.WARNING


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"network": replace(NETWORK, usable=LocalNetwork())}, "no network"),
        ({"nats": (Nat("eth0", BLOCKED),)}, "UDP does not get out"),
        (
            {
                "config": config(endpoint='endpoint = "office.example:4117"'),
                "names": (NameFacts(name="office.example", used_by=("peer office",), error="no"),),
            },
            "office.example, its endpoint, cannot be resolved",
        ),
        ({}, "only it can dial us"),
        (
            {
                "config": config('[rendezvous]\nurl = "mqtt://b.example"'),
                "brokers": (ServerFacts(url="mqtt://b.example", error="x", reason="refused"),),
            },
            "no broker lets us in",
        ),
        (
            {
                "config": config('[rendezvous]\nurl = "mqtt://b.example"'),
                "nats": (Nat("eth0", HARD),),
            },
            "hard one",
        ),
        ({"config": config('[rendezvous]\nurl = "mqtt://b.example"')}, "other host may be off"),
    ],
)
def test_a_peer_that_is_not_up_gets_the_most_likely_reason(
    more: dict[str, Any], words: str
) -> None:
    found = one("peer", configured(tunnels=running("connecting"), **more))
    assert found.state is State.WARNING and found.remedy
    assert found.summary.startswith("mt0/office is not up (connecting): ")
    assert words in found.summary


@pytest.mark.parametrize(
    ("about", "words"), [("unheard", "it was not heard of"), ("no-way", "hard one")]
)
def test_what_the_tunnel_tells_itself_is_better_than_a_guess(about: str, words: str) -> None:
    obstacle = {"about": about, "problem": "it was not heard of", "remedy": "compare url"}
    peer = {"name": "office", "state": "connecting", "obstacles": [obstacle]}
    tunnels = (TunnelFacts(name="mt0", status={"peers": [peer]}),)
    nats = (Nat("eth0", HARD),)
    meeting = config('[rendezvous]\nurl = "mqtt://b.example"')
    found = one("peer", configured(tunnels=tunnels, nats=nats, config=meeting))
    assert words in found.summary


def test_a_peer_of_a_tunnel_whose_configuration_is_not_known() -> None:
    assert "other host may be off" in one("peer", facts(tunnels=running("holding"))).summary
    assert why_not_up(facts(), None, None)[1]


# the verdict


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([], "all is well"),
        ([State.NOTE], "all is well"),
        ([State.WARNING], "no problem, 1 warning"),
        ([State.WARNING, State.PROBLEM, State.PROBLEM], "2 problems and 1 warning: start with"),
    ],
)
def test_verdict(states: list[State], words: str) -> None:
    report = Report("1", tuple(Finding("dns", state, "") for state in states))
    assert verdict(report).startswith(words)


def test_the_verdict_of_a_hard_nat() -> None:
    report = Report("1", (), (Nat("eth0", HARD),))
    assert verdict(report).endswith("direct connections only to peers with easy NATs")
