"""Paths that are found, and those that must not be: STUN, port forwards, interfaces, IPv6.

   u0 --[natA0]-- a0 +------+ b0 --[natB0]-- u0       20 ms round trip, every uplink behind a
[A]                  | core |                  [B]    port-restricted NAT; 4117 is forwarded by
   u1 --[natA1]-- a1 +------+ b1 --[natB1]-- u1       natB0, and by natB1 unless a test says no
                        |
                 198.51.100.1:3478 (coturn, where a test wants it)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from bench.servers import STUN_PORT, Stun
from bench.watch import Kernel, Packets
from cli.demo.netns import Namespace
from cli.demo.world import PORT, HostName
from tests.lab.hosts import until
from tests.lab.scenario import Scenario
from tests.lab.test_tunnel import MakeScenario
from tunnel.path.network import Address

RTT = 0.020
PATIENCE = 15.0  # seconds for a pair to become warm on a busy machine; one round trip is enough
STUN_REQUEST = b"\x00\x01"

Path = dict[str, Any]


def paths(scenario: Scenario, name: HostName) -> list[Path]:
    """What `martlet status --json` says of a host's paths to its only peer."""
    peers = scenario.pair.status(name).get("peers", [])
    return list(peers[0]["paths"]) if peers else []


def ip(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def until_warm(scenario: Scenario, name: HostName, **wanted: Any) -> Path:
    """Wait for a warm path with these fields; a callable is asked about the field."""

    def matching() -> list[Path]:
        return [
            path
            for path in paths(scenario, name)
            if path["warm"]
            and all(
                want(path[key]) if callable(want) else path[key] == want
                for key, want in wanted.items()
            )
        ]

    until(lambda: bool(matching()), lambda: (wanted, paths(scenario, name)), PATIENCE)
    return matching()[0]


def local(scenario: Scenario, name: HostName, index: int, family: int = 4) -> str:
    """The tunnel's socket on a host's uplink."""
    return str(Address(scenario.world.uplink(name, index).address(family), PORT))


def mapping(scenario: Scenario, name: HostName, index: int, family: int = 4) -> str:
    """What the other end sees of it."""
    return str(Address(*scenario.world.uplink(name, index).nat.public(family)))


# server-reflexive candidates


def stun_server(scenario: Scenario) -> Stun:
    """At the core's first address of each family."""
    cores = scenario.world.uplink("A").cores
    addresses = {family: (core,) for family, core in cores.items()}
    return Stun(scenario.world.core, addresses, scenario.directory)


@pytest.mark.parametrize("family", [4, 6])
def test_stun_opens_the_way_through_a_nat_that_forwards_nothing(
    make_scenario: MakeScenario, family: int
) -> None:
    scenario = make_scenario(forwards={"B1": False}, families=(family,), nat66=family == 6)
    stun = stun_server(scenario)
    scenario.configure(f'[ice]\nstun = ["{stun.endpoints[0]}"]')
    scenario.up()
    # From both of A's, whose NATs forward nothing either.
    for index in (0, 1):
        ours, theirs = local(scenario, "A", index, family), mapping(scenario, "A", index, family)
        until_warm(scenario, "A", local=ours, remote=mapping(scenario, "B", 1, family))
        until_warm(scenario, "B", local=local(scenario, "B", 1, family), remote=theirs)


def test_without_stun_nobody_knows_the_mapping(make_scenario: MakeScenario) -> None:
    """The counter-test: only STUN made the way above."""
    scenario = make_scenario(forwards={"B1": False})
    ours = Address.parse(local(scenario, "B", 1))
    with closing(Packets(scenario.pair.space("B"))) as packets:
        scenario.up()
        until_warm(scenario, "A", local=local(scenario, "A", 1))
        asked = 0

        def asked_often() -> bool:
            nonlocal asked
            seen = packets.drain()
            asked += sum(one.source == ours and one.first[:2] == STUN_REQUEST for one in seen)
            return asked >= 20

        until(asked_often, lambda: asked, PATIENCE)
    mine = [path for path in paths(scenario, "B") if path["local"] == str(ours)]
    assert mine and not any(path["warm"] for path in mine)


class Names:
    """Names that a host's tunnel knows: files of the test over those in /etc, seen by it alone."""

    def __init__(self, scenario: Scenario) -> None:
        self._hosts = scenario.directory / "hosts"
        files = {"hosts": "", "resolv.conf": "nameserver 127.0.0.1\n"}  # where nobody answers
        files["nsswitch.conf"] = "hosts: files dns\n"
        mounts = []
        for name, text in files.items():
            (scenario.directory / name).write_text(text)
            mounts.append(f"mount --bind {scenario.directory / name} /etc/{name}")
        # `ip netns exec` gives every process mounts of its own.
        script = " && ".join([*mounts, 'exec "$@"'])
        scenario.pair.martlet = ["sh", "-c", script, "sh", sys.executable, "-m", "cli.main"]

    def add(self, name: str, address: str) -> None:
        with self._hosts.open("a") as file:
            file.write(f"{address} {name}\n")


def test_a_stun_server_by_name_is_found_once_there_is_dns(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(forwards={"B1": False})
    stun = stun_server(scenario)
    names = Names(scenario)
    scenario.configure(f'[ice]\nstun = ["stun.martlet.test:{STUN_PORT}"]')
    scenario.up()
    log = scenario.pair.log("B")
    until(lambda: "cannot resolve" in log.read_text(), log.read_text)
    failed = next(line for line in log.read_text().splitlines() if "cannot resolve" in line)
    assert f"of=stun endpoint=stun.martlet.test:{STUN_PORT}" in failed and "error=" in failed
    assert 'peer=""' not in log.read_text()
    assert not [
        path for path in paths(scenario, "A") if path["remote"] == mapping(scenario, "B", 1)
    ]
    names.add("stun.martlet.test", stun.addresses[4])
    until_warm(scenario, "A", remote=mapping(scenario, "B", 1))
    assert f"resolved of=stun endpoint=stun.martlet.test:{STUN_PORT}" in log.read_text()


# candidates that the configuration names, and those it excludes


def test_an_advertised_port_forward_is_tried(make_scenario: MakeScenario) -> None:
    """natB1 forwards 5000 to B's 4117, which only B's configuration knows."""
    scenario = make_scenario(forwards={"B1": False})
    router, inside = scenario.world.uplink("B", 1).router, scenario.world.uplink("B", 1).address(4)
    public = scenario.world.uplink("B", 1).publics[4][0]
    rule = f'iifname "wan" ip daddr {public} udp dport 5000 dnat ip to {inside}:{PORT}'
    router.run(["nft", "-f", "-"], input=f"""
        table inet advertised {{
          chain into {{ type nat hook prerouting priority dstnat - 1; {rule}; }}
        }}""")  # fmt: skip
    scenario.configure(f'[ice]\nadvertise = ["{public}:5000"]', ["B"])
    scenario.up()
    path = until_warm(scenario, "A", remote=f"{public}:5000")
    assert path["kind"] == "srflx"


JUNK = {"docker0": "172.17.0.1/16", "virbr0": "192.168.122.1/24", "lab0": "192.168.77.1/24"}
NEVER = [
    ip_network(network)
    for network in (
        "172.17.0.0/16", "192.168.122.0/24", "192.168.77.0/24",  # other machines on this very host
        "169.254.0.0/16", "fe80::/10",  # link-local
        "10.88.0.0/24", "fd88::/64",  # the tunnel itself
    )
]  # fmt: skip


def add_junk(space: Namespace) -> None:
    """Bridges with something on them, so that they have carrier, and a link-local address."""
    for number, (name, address) in enumerate(JUNK.items()):
        space.batch(
            f"link add {name} type bridge",
            f"link add guest{number} type veth peer name port{number}",
            f"link set port{number} master {name} up",
            f"link set guest{number} up",
            f"link set {name} up",
            f"addr add {address} dev {name}",
        )
    space.batch("addr add 169.254.7.7/16 dev u0")


def test_addresses_that_lead_to_no_peer_are_neither_told_nor_used(
    make_scenario: MakeScenario,
) -> None:
    scenario = make_scenario(families=(4, 6), uplinks=(1, 2))
    scenario.dial_one_path()
    spaces = {name: scenario.pair.space(name) for name in scenario.world.hosts}
    for space in spaces.values():
        add_junk(space)
    public = mapping(scenario, "B", 1)
    scenario.configure('[ice]\nexclude_interfaces = ["lab*"]', ["A"])
    scenario.configure(f'[ice]\nexclude_interfaces = ["lab*"]\nadvertise = ["{public}"]', ["B"])
    with closing(Packets(spaces["A"])) as at_a, closing(Packets(spaces["B"])) as at_b:
        scenario.up()
        scenario.world.add_interface("A")
        for name in spaces:
            for family in (4, 6):
                for uplink in scenario.world.hosts[name].uplinks:
                    until_warm(scenario, name, local=local(scenario, name, uplink.index, family))
        seen = [one for one in at_a.drain() + at_b.drain() if one.interface != "mt0"]
    assert len(seen) > 100
    ends = {end[0] for one in seen for end in (one.source, one.target)}
    assert not [end for end in ends if any(ip_address(end) in network for network in NEVER)], ends
    for name in spaces:
        for path in paths(scenario, name):
            for end in (ip(path["local"]), ip(path["remote"])):
                assert not any(ip_address(end) in network for network in NEVER), path
    told = "".join(row["quic.stream_data"] for row in scenario.decoded(["quic.stream_data"]))
    assert scenario.world.uplink("A").address(4).encode().hex() in told
    for address in (*JUNK.values(), "169.254.7.7/", "fe80::/"):
        assert address.partition("/")[0].encode().hex() not in told, address


# IPv6


def test_ipv4_dies_in_silence_and_ipv6_goes_on(make_scenario: MakeScenario) -> None:
    """The configuration knows one IPv4 endpoint; the rest is found."""
    scenario = make_scenario(families=(4, 6))
    scenario.dial_one_path()
    scenario.up()
    for name in scenario.world.hosts:
        until_warm(scenario, name, local=lambda at: at.startswith("["))
        assert not scenario.pair.active_path(name).startswith("[")
    with scenario.probing() as probe:
        begin = time.monotonic()
        scenario.world.core.run(["nft", "-f", "-"], input="""
            table inet dark {
              chain everything { type filter hook forward priority 0; meta nfproto ipv4 drop; }
            }""")  # fmt: skip
        until(
            lambda: all(
                scenario.pair.active_path(name).startswith("[") for name in scenario.world.hosts
            ),
            lambda: [scenario.pair.history(name) for name in scenario.world.hosts],
        )
        end = time.monotonic()
        until(lambda: probe.flowing(end + 0.5), lambda: "no probe arrives")
    for way, report in probe.report(begin, end).items():
        print(f"{way}: {1000 * report.gap:.0f} ms of silence")
        assert report.lost == 0, (way, report)
        assert report.gap < 1.0, (way, report)


# interfaces that come, and those that cost money


def test_a_new_interface_is_a_warm_path_in_two_round_trips(
    make_scenario: MakeScenario, record_property: Callable[[str, object], None]
) -> None:
    """From the kernel's word that the address is there to the first answer over it."""
    scenario = make_scenario(uplinks=(1, 2))
    scenario.up()
    uplink = scenario.world.uplink("A", 1)
    with (
        scenario.probing(),
        closing(Packets(scenario.pair.space("A"))) as packets,
        closing(Kernel(scenario.pair.space("A"))) as kernel,
    ):
        happened = scenario.world.add_interface("A")
        until_warm(scenario, "A", local=local(scenario, "A", 1))
        begin = kernel.last("default route", happened.begin) or happened.end
        seen = [one for one in packets.drain() if one.interface == uplink.interface]
    asked = min(one.time for one in seen if one.leaves)
    answered = min(one.time for one in seen if not one.leaves and one.is_answer)
    figures = {"asked": 1000 * (asked - begin), "answered": 1000 * (answered - begin)}
    print("from the default route, ms:", figures)
    record_property("expansion_ms", figures)
    assert answered - begin < 5 * 2 * RTT, figures
    until_warm(scenario, "B", remote=mapping(scenario, "A", 1))


def test_no_copies_travel_over_a_metered_interface(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 2))
    scenario.dial_one_path()
    scenario.configure(f'[ice]\nadvertise = ["{mapping(scenario, "B", 1)}"]', ["B"])
    scenario.configure('[paths]\nmetered = ["u1"]\nredundancy = "interactive"', ["A"])
    scenario.up()
    scenario.world.add_interface("A")
    spared = local(scenario, "A", 1)
    with scenario.probing():
        path = until_warm(scenario, "A", local=spared)
        assert path["metered"] and not path["active"] and not path["backup"]
        path = until_warm(scenario, "B", remote=mapping(scenario, "A", 1))
        assert path["metered"] and not path["backup"], "the peer does not know what it costs"
        counters = scenario.pair.status("A")["peers"][0]["counters"]
        assert counters["redundant_packets"] > 0, "no copies at all"
    assert not scenario.pair.history("A")
    fields = ["udp.length", "quic.dg", "frame.interface_name"]
    rows = scenario.decoded(fields, "udp.port == 4117")
    wires = {
        wire: [row for row in rows if row["frame.interface_name"] == wire] for wire in ("a0", "a1")
    }
    assert sum(bool(row["quic.dg"]) for row in wires["a0"]) > 100
    assert wires["a1"], "not even checks"
    assert not [row for row in wires["a1"] if row["quic.dg"]]
