"""Networks that lie: stuck mappings, wires that carry one way only, policy routing, silence.

    u0 --[natA0]-- core --[natB0]-- u0          20 ms round trip, two uplinks each,
 [A]                 |                 [B]      every uplink behind a port-restricted NAT,
    u1 --[natA1]-- core --[natB1]-- u1          B's forwarded by UDP port 4117

Nothing here is announced by the kernel, unless the test says so.
"""

from __future__ import annotations

import json
import re
import time

import pytest

from cli.demo.core import PYTHON_ENV
from cli.demo.probe import Probe
from cli.demo.world import PORT, Happened, HostName
from tests.lab.hosts import until
from tests.lab.scenario import Scenario
from tests.lab.test_ice import until_warm
from tests.lab.test_roaming import RTT, SLACK
from tests.lab.test_tunnel import MakeScenario

OTHER: dict[HostName, HostName] = {"A": "B", "B": "A"}


def ports(scenario: Scenario, name: HostName) -> set[int]:
    """The UDP ports that a host's tunnel has sockets on."""
    listed = scenario.pair.space(name).run(["ss", "-Hlunp"]).stdout
    mine = f"pid={scenario.pair.processes[name].pid},"
    return {int(line.split()[3].rpartition(":")[2]) for line in listed.splitlines() if mine in line}


def local_port(scenario: Scenario, name: HostName) -> int:
    local = scenario.pair.active_path(name).partition(">")[0]
    return int(local.rpartition(":")[2] or 0)


def why(scenario: Scenario, name: HostName, *options: str) -> str:
    argv = [*scenario.pair.martlet, "why", OTHER[name].lower(), *options]
    return scenario.pair.space(name).run(argv, env=PYTHON_ENV).stdout


def stick(scenario: Scenario, *local: int) -> None:
    """natA0 passes nothing from and to these ports of A any more, as if it held dead entries."""
    inside = scenario.world.uplink("A").address(4)
    rules = "\n".join(
        f"ip saddr {inside} udp sport {port} drop; ip daddr {inside} udp dport {port} drop;"
        for port in local
    )
    scenario.world.uplink("A").router.run(["nft", "-f", "-"], input=f"""
        table inet stuck {{
        }}
        flush table inet stuck
        table inet stuck {{
          chain forward {{ type filter hook forward priority -10; {rules} }}
        }}""")  # fmt: skip


@pytest.mark.slow
def test_a_stuck_mapping_is_left_by_a_further_port(make_scenario: MakeScenario) -> None:
    """A's only uplink: the tunnel is back by a socket of another port, which goes when it is no
    longer used: a better interface appears, and the move there loses nothing.
    """
    scenario = make_scenario(uplinks=(1, 1))
    scenario.configure('[paths]\nredundancy = "off"')
    scenario.up()
    with scenario.probing() as probe:
        begin = time.monotonic()
        stick(scenario, PORT)
        until(lambda: local_port(scenario, "A") not in (0, PORT), scenario.pair.log("A").read_text)
        until(lambda: probe.flowing(time.monotonic() - 0.1), lambda: "no probe arrives")
        gaps = {way: one.gap for way, one in probe.report(begin, time.monotonic() - 0.1).items()}
        print("silence, s:", gaps)
        assert max(gaps.values()) < 3.0
        further = local_port(scenario, "A")
        assert ports(scenario, "A") == {PORT, further}
        record = scenario.pair.history("A")[-1]
        assert record["trigger"] == "suspect"
        inside = scenario.world.uplink("A").address(4)
        assert record["from_path"].startswith(f"{inside}:{PORT}>")
        assert record["to_path"].startswith(f"{inside}:{further}>")
        assert scenario.pair.history("B")[-1]["to_path"].startswith(
            scenario.world.uplink("B").address(4)
        )
        first, *others = why(scenario, "A").splitlines()
        assert first.startswith(f"in use: {inside}:{further}>") and "fell silent" in first
        assert any(f"{inside}:{PORT}>" in line and "does not answer" in line for line in others)
        # B doubted as well, and opened one in vain.
        until(lambda: ports(scenario, "B") == {PORT}, lambda: ports(scenario, "B"), 20)
        scenario.world.uplink("A", 1).metric = 50
        begin = time.monotonic()
        scenario.world.add_interface("A")
        until(lambda: scenario.pair.active_uplink("A") == 1, lambda: scenario.pair.history("A"))
        until(lambda: ports(scenario, "A") == {PORT}, lambda: ports(scenario, "A"), 20)
        until(lambda: probe.flowing(time.monotonic() - 0.1), lambda: "no probe arrives")
        for way, report in probe.report(begin, time.monotonic() - 0.5).items():
            assert report.lost == 0 and report.gap < SLACK, (way, report)
    assert "resumed" not in scenario.pair.log("A").read_text(), "who thinks that it slept?"
    for name in scenario.world.hosts:
        assert scenario.pair.status(name)["peers"][0]["counters"]["handshakes"] == 1


# wires that carry one way only


@pytest.mark.parametrize("redundancy", ["interactive", "off"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_wire_that_carries_one_way_only_is_left(
    make_scenario: MakeScenario, way: str, redundancy: str
) -> None:
    """A's active wire drops what A sends (up), or what it is sent (down); nobody is told."""
    scenario = make_scenario()
    scenario.configure(f'[paths]\nredundancy = "{redundancy}"')
    scenario.up()
    with scenario.probing() as probe:
        until_backed_up(scenario)
        wire = scenario.pair.active_uplink("A")
        event = scenario.world.blackhole("A", wire, way=way)
        until(
            lambda: scenario.pair.active_uplink("A") != wire,
            lambda: [scenario.pair.history(name) for name in scenario.world.hosts],
        )
        gone = without_loss(probe, event)
        print({direction: f"{1000 * gap:.0f} ms" for direction, gap in gone.items()})
        dark = scenario.world.uplink("A", wire).nat.public(4)[0]
        assert dark not in scenario.pair.active_path("B"), "B still sends into the dark"


def settled(scenario: Scenario) -> None:
    """Both ends send on the path that the routes prefer."""
    until(
        lambda: all(scenario.pair.active_uplink(name) == 0 for name in scenario.world.hosts),
        lambda: [scenario.pair.history(name) for name in scenario.world.hosts],
    )


def until_backed_up(scenario: Scenario) -> None:
    """Both ends have a second path that does not share A's uplink with the active one."""
    for name in scenario.world.hosts:
        until_warm(scenario, name, backup=True)


def without_loss(probe: Probe, event: Happened) -> dict[str, float]:
    """The longest silence each way since the event; nothing was lost, and little time."""
    until(lambda: probe.flowing(event.end + 1.0), lambda: "no probe arrives")
    found = probe.report(event.begin - 0.1, event.end + 0.9)
    for way, report in found.items():
        assert report.lost == 0, (way, report)
        assert report.gap < event.end - event.begin + 3 * RTT + SLACK, (way, report)
    return {way: report.gap for way, report in found.items()}


# policy routing


@pytest.mark.parametrize("name", ["uplink down A", "uplink down B", "black hole A", "black hole B"])
def test_with_source_rules(make_scenario: MakeScenario, name: str) -> None:
    """Policy routing by source address, as on many multi-homed desktops, changes nothing."""
    scenario = make_scenario(source_rules=True)
    scenario.up()
    host: HostName = "A" if name.endswith("A") else "B"
    with scenario.probing() as probe:
        until_backed_up(scenario)
        used = scenario.pair.active_uplink(host)
        down = name.startswith("uplink down")
        act = scenario.world.uplink_down if down else scenario.world.blackhole
        event = act(host, used)
        until(
            lambda: scenario.pair.active_uplink(host) != used,
            lambda: scenario.pair.history(host),
        )
        without_loss(probe, event)


# what the user is told


def test_why_says_why(make_scenario: MakeScenario) -> None:
    """Sentences about paths, the one in use first; the same in JSON; news after a move."""
    scenario = make_scenario()
    scenario.up()
    until_backed_up(scenario)
    settled(scenario)
    until(lambda: len(why(scenario, "A").splitlines()) == 8, lambda: why(scenario, "A"))
    text = why(scenario, "A")
    first, *others = text.splitlines()
    assert re.fullmatch(rf"in use: {re.escape(scenario.pair.active_path('A'))}, because .+", first)
    assert sum(line.startswith("second: ") for line in others) == 1
    for line in others:
        assert re.fullmatch(r"(second|other): \S+>\S+: not in use: .+", line), line
    assert sum("the routes of the two hosts prefer the one in use" in line for line in others) == 3
    assert sum("it does not answer" in line for line in others) == 4  # private ones of B
    assert json.loads(why(scenario, "A", "--json")) == text.splitlines()
    scenario.world.switch_interface("A")
    until(lambda: "because u0 is down" in why(scenario, "A"), lambda: why(scenario, "A"))
