"""Ports that a real home router (miniupnpd) maps, told to the peer, dialled by it, and given back.

     [A] u0 --[natA0 + miniupnpd]-- a0 +------+ b0 --[natB0, 4117 forwarded]-- u0 [B]
                                       | core |
                                       +------+ b1 --[natB1, symmetric]------- u1 [B]

natA0 is port-restricted and forwards nothing by itself; 9.9.9.9 is its public address.
"""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from cli.demo.netns import Namespace
from cli.demo.pair import tail
from cli.demo.world import PORT
from tests.lab.hosts import until
from tests.lab.router import PUBLIC, HomeRouter
from tests.lab.scenario import Scenario
from tests.lab.test_ice import local, paths, until_warm
from tests.lab.test_tunnel import MakeScenario

OUTSIDE = f"{PUBLIC}:{PORT}"


def mappings(scenario: Scenario) -> list[dict[str, Any]]:
    """What A's status says of its port mappings."""
    return list(scenario.pair.status("A").get("port_mappings", []))


def until_mapped(scenario: Scenario, by: str) -> None:
    def mapped() -> bool:
        return [(m["protocol"], m["external"]) for m in mappings(scenario)] == [(by, OUTSIDE)]

    until(mapped, lambda: (mappings(scenario), tail(scenario.pair.log("A"), 30)), 15)


def b_dials(scenario: Scenario) -> None:
    """B knows where A would be, if its router let anybody in; A knows nothing of B."""
    for name, endpoint in (("A", ""), ("B", f'endpoint = "{OUTSIDE}"\n')):
        config = scenario.pair.config("A" if name == "A" else "B")
        text = re.sub("^endpoint = .*\n", "", config.read_text(), flags=re.M)
        config.write_text(re.sub("^allowed_ips", f"{endpoint}allowed_ips", text, flags=re.M))


@pytest.mark.parametrize(
    ("pcp", "upnp", "by"), [(True, False, "pcp"), (False, True, "upnp")], ids=["pcp", "upnp"]
)
def test_a_host_behind_a_nat_is_dialled(
    make_scenario: MakeScenario, pcp: bool, upnp: bool, by: str
) -> None:
    """And is not any more when its tunnel is down: the router forgot the port."""
    scenario = make_scenario(uplinks=(1, 1), forwards={"B0": False})
    router = HomeRouter(scenario.world, scenario.directory, pcp=pcp, upnp=upnp)
    b_dials(scenario)
    scenario.pair.start("A")
    until_mapped(scenario, by)
    assert len(router.mapped()) == 1
    scenario.pair.up(names=["B"])
    assert paths(scenario, "B")[0]["remote"] == OUTSIDE
    down = [*scenario.pair.martlet, "down", "mt0"]
    scenario.pair.space("A").run(down, env={"PYTHONPATH": "."})
    assert router.mapped() == []


def test_without_a_mapping_nobody_gets_in(make_scenario: MakeScenario) -> None:
    """The counter-test: the router would map, if it were asked."""
    scenario = make_scenario(uplinks=(1, 1), forwards={"B0": False})
    HomeRouter(scenario.world, scenario.directory)
    b_dials(scenario)
    scenario.configure("[ice]\nport_mapping = false", ["A"])
    with pytest.raises(Exception, match="no packet passed"):
        scenario.pair.up(6.0)
    assert mappings(scenario) == []


def test_the_mapped_port_is_told_and_opens_a_path_from_a_symmetric_nat(
    make_scenario: MakeScenario,
) -> None:
    """From B's u1, whose NAT gives every destination another port: natA0 lets none of them in but
    by the mapped port, and nobody out there tells A where to knock."""
    scenario = make_scenario(
        uplinks=(1, 2), forwards={"B1": False}, kinds={"A0": "port-restricted", "B1": "symmetric"}
    )
    scenario.dial_one_path()
    HomeRouter(scenario.world, scenario.directory)
    scenario.up()
    until_mapped(scenario, "pcp")
    path = until_warm(scenario, "B", local=local(scenario, "B", 1), remote=OUTSIDE)
    assert path["kind"] == "srflx"
    from_b1 = scenario.world.uplink("B", 1).publics[4][0]
    until_warm(scenario, "A", remote=lambda remote: remote.startswith(from_b1))


def test_a_router_that_restarts_is_asked_again_at_once(make_scenario: MakeScenario) -> None:
    """It announces itself to everybody on the link; half of two hours would be a long wait."""
    scenario = make_scenario(uplinks=(1, 1))
    router = HomeRouter(scenario.world, scenario.directory, upnp=False)
    scenario.up()
    until_mapped(scenario, "pcp")
    until(lambda: len(router.mapped()) == 1, router.mapped)
    time.sleep(5)  # epochs may differ by two seconds or so and mean nothing (RFC 6887 section 8.5)
    router.stop()
    router.start()
    assert router.mapped() == []
    until(lambda: len(router.mapped()) == 1, lambda: tail(router.log, 30), 20)


def test_a_router_that_maps_nothing_costs_next_to_nothing(make_scenario: MakeScenario) -> None:
    """It answers with ICMP that nobody listens; then a search for UPnP, and silence."""
    scenario = make_scenario(uplinks=(1, 1))
    count = "add table inet p; add chain inet p f { type filter hook prerouting priority -300; }"
    space: Namespace = scenario.world.uplink("A").router
    for port in (5351, 1900):
        count += f"; add rule inet p f iifname lan udp dport {port} counter"
    space.run(["nft", count])

    def counted() -> list[int]:
        listed = space.run(["nft", "list", "chain", "inet", "p", "f"]).stdout
        return [int(number) for number in re.findall(r"packets (\d+)", listed)]

    scenario.up()
    until(lambda: [m["state"] for m in mappings(scenario)] == ["resting"], counted, 15)
    asked, searched = counted()
    assert 1 <= asked <= 2 and 1 <= searched <= 12
    assert scenario.pair.status("A")["counters"]["internal_errors"] == 0
