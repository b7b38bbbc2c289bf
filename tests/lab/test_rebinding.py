"""A NAT made of scapy rebinds exactly when it is told to, and shelters attackers.

    [A] u0 --[scapy NAT, natA0]-- core --[natB0, 4117 forwarded]-- u0 [B]

What it can do: change the mapping (port, address, both) after the next packet, in a row, in the
middle of a transfer or a handshake; replay packets from elsewhere; forward everything faster from
an address of its own (RFC 9000 section 9.3.3).
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from cli.demo.world import Happened, Uplink, World
from tests.lab.nat_scapy import ScapyNat
from tests.lab.scenario import Scenario
from tests.lab.test_roaming import RTT, SLACK, felt
from tests.lab.test_tunnel import MakeScenario, iperf


def with_scapy_nat(make_scenario: MakeScenario, **options: Any) -> tuple[Scenario, ScapyNat]:
    made: list[ScapyNat] = []

    def build(world: World, uplink: Uplink) -> ScapyNat:
        made.append(ScapyNat(world, uplink))
        return made[-1]

    scenario = make_scenario(uplinks=(1, 1), nats={"A0": build}, **options)
    return scenario, made[0]


def rebinding_seen(scenario: Scenario, nat: ScapyNat, family: int = 4) -> None:
    """The other end really sends to the mapping that the NAT has now."""
    host, port = nat.public(family)
    shown = f"{host}:{port}" if family == 4 else f"[{host}]:{port}"
    deadline = time.monotonic() + 3
    while not scenario.pair.active_path("B").endswith(shown):
        assert time.monotonic() < deadline, (shown, scenario.pair.active_path("B"))
        time.sleep(0.05)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("port", "address"), [(True, False), (False, True), (True, True)], ids=["port", "ip", "both"]
)
def test_rebinding(make_scenario: MakeScenario, family: int, port: bool, address: bool) -> None:
    scenario, nat = with_scapy_nat(make_scenario, families=(family,), nat66=family == 6)
    scenario.up()
    with scenario.probing() as probe:
        begin = time.monotonic()
        nat.call("rebind", port=port, address=address)
        gaps = felt(probe, Happened(begin, time.monotonic()), window=1)
        assert max(gaps.values()) < RTT + SLACK, gaps
        rebinding_seen(scenario, nat, family)
    triggers = [record["trigger"] for record in scenario.pair.history("B")]
    assert triggers == ["rebinding"], triggers
    assert scenario.pair.history("A") == [], "the mover does not know that it moved"


def test_many_in_a_row(make_scenario: MakeScenario) -> None:
    scenario, nat = with_scapy_nat(make_scenario)
    scenario.up()
    with scenario.probing() as probe, scenario.ssh() as session:
        begin = time.monotonic()
        nat.call("rebind", port=True, address=True, count=10, every=0.15)
        time.sleep(1.6)
        gaps = felt(probe, Happened(begin, time.monotonic()), window=1)
        assert max(gaps.values()) < 1.0, gaps
        assert not session.closed()
        rebinding_seen(scenario, nat)
    assert scenario.pair.status("A")["peers"][0]["counters"]["handshakes"] == 1


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_during_the_handshake(make_scenario: MakeScenario, after: int) -> None:
    """The mapping changes with the very packet of the handshake that is named."""
    scenario, nat = with_scapy_nat(make_scenario)
    nat.call("rebind", port=True, address=True, after=after)
    begin = time.monotonic()
    scenario.up(timeout=15)
    assert time.monotonic() - begin < 10
    rebinding_seen(scenario, nat)


def test_during_a_transfer(make_scenario: MakeScenario) -> None:
    scenario, nat = with_scapy_nat(make_scenario)
    scenario.up()
    before = iperf(scenario, "-b", "4M")
    nat.call("rebind", port=True, address=True, after=200)
    during = iperf(scenario, "-b", "4M")
    assert during > before / 2
    rebinding_seen(scenario, nat)
    nat.call("rebind", port=True, address=True, after=200)
    assert iperf(scenario, "-b", "4M", "-R") > before / 2


def test_loss_duplication_and_reordering_do_not_move_anybody(make_scenario: MakeScenario) -> None:
    scenario, nat = with_scapy_nat(make_scenario)
    scenario.up()
    with scenario.probing() as probe:
        begin = time.monotonic()
        for way in ("out", "in"):
            nat.call("drop", n=3, way=way)
            nat.call("duplicate", n=20, way=way)
            nat.call("reorder", n=5, way=way)
        felt(probe, Happened(begin, time.monotonic()), window=1)
        reports = probe.report(begin, begin + 1)
        assert all(report.duplicated == 0 for report in reports.values())
        assert sum(report.lost for report in reports.values()) <= 6
    assert scenario.pair.history("A") == scenario.pair.history("B") == []
    assert scenario.pair.status("B")["peers"][0]["counters"]["duplicates"] >= 10


def test_replayed_and_forged_packets_move_nobody(make_scenario: MakeScenario) -> None:
    scenario, nat = with_scapy_nat(make_scenario)
    scenario.up()
    active = scenario.pair.active_path("B")
    elsewhere = ["198.51.100.11", 31000]  # the NAT's other public address
    with scenario.probing() as probe:
        begin = time.monotonic()
        for age in (1, 5, 50, 150):
            nat.call("replay", way="out", age=age, source=elsewhere)
        target = [scenario.world.uplink("B").publics[4][0], 4117]
        for payload in ("40" + "00" * 60, "ff" * 1200, "c0" + "00000001" + "08" + "11" * 1200, ""):
            nat.call("forge", payload=payload, source=elsewhere, target=target)
        gaps = felt(probe, Happened(begin, time.monotonic()), window=1)
        assert max(gaps.values()) < SLACK, gaps
    assert scenario.pair.active_path("B") == active
    assert scenario.pair.history("B") == []
    assert scenario.pair.status("B")["counters"]["internal_errors"] == 0


def test_the_forwarding_attacker_never_keeps_the_flow(make_scenario: MakeScenario) -> None:
    """RFC 9000 section 9.3.3: every packet of A arrives first from the attacker's address."""
    scenario, nat = with_scapy_nat(make_scenario)
    scenario.up()
    attacker = "198.51.100.11"
    with scenario.probing() as probe, scenario.ssh() as session:
        begin = time.monotonic()
        nat.call("forwarder", address=attacker, lag=0.005)
        kept = 0
        for _ in range(20):
            time.sleep(0.2)
            kept += attacker in scenario.pair.active_path("B")
        end = time.monotonic()
        reports = probe.report(begin, end - 0.5)
        nat.call("forwarder", address=None)
        time.sleep(0.5)
        assert kept <= 4, f"the attacker had the flow in {kept} of 20 looks"
        assert all(report.gap < SLACK for report in reports.values()), reports
        assert all(report.duplicated == 0 for report in reports.values())
        assert not session.closed()
    assert attacker not in scenario.pair.active_path("B")
    # He did lure B, and B did come back: by the genuine copies, or, where the NAT held those up
    # for long, because nothing was acknowledged to him.
    assert any(attacker in record["to_path"] for record in scenario.pair.history("B"))
