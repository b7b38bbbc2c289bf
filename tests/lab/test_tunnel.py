"""Unmodified programs through the tunnel: ping, iperf3, ssh, over IPv4 and IPv6, inside and out.

    [A] u0 --[natA0]-- core --[natB0, 4117 forwarded]-- u0 [B]        (cli/demo/world.py)

What runs inside the tunnel knows nothing of it; what runs outside is IPv4 or IPv6.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.demo.netns import Namespace
from cli.demo.pair import INNER
from tests.lab.scenario import Scenario
from tunnel.quic.mtu import GRANULARITY

MakeScenario = Callable[..., Scenario]


def ping(space: Namespace, target: str, *options: str) -> str:
    return space.run(["ping", "-n", "-c", "5", "-i", "0.05", "-W", "2", *options, target]).stdout


def iperf(scenario: Scenario, *options: str, seconds: float = 2.0) -> float:
    """Mbit/s that one iperf3 run through the tunnel brought; the server ends by itself."""
    b = INNER["B"][4]
    server = scenario.pair.space("B").popen(
        ["iperf3", "-s", "-1", "-B", b], log=scenario.directory / "iperf3-server.log"
    )
    deadline = time.monotonic() + 5
    while b not in scenario.pair.space("B").run(["ss", "-Hltn", "sport = :5201"]).stdout:
        assert time.monotonic() < deadline and server.poll() is None
        time.sleep(0.02)
    done = scenario.pair.space("A").run(
        ["iperf3", "-J", "-c", b, "-t", str(seconds), *options], timeout=seconds + 20
    )
    (scenario.directory / "iperf3.json").write_text(done.stdout)
    server.wait(10)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


@pytest.mark.parametrize("outer", [4, 6])
def test_both_families_pass_over_either_family(make_scenario: MakeScenario, outer: int) -> None:
    scenario = make_scenario(families=(outer,), uplinks=(1, 1))
    scenario.up()
    for inner in (4, 6):
        assert " 0% packet loss" in ping(scenario.pair.space("A"), INNER["B"][inner])
        assert " 0% packet loss" in ping(scenario.pair.space("B"), INNER["A"][inner])
    status = scenario.pair.status("A")["peers"][0]
    assert status["state"] == "up"
    assert ("[" in status["active_path"]) == (outer == 6)


def test_full_packets_pass_whole_and_larger_ones_are_refused_by_the_device(
    make_scenario: MakeScenario,
) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    time.sleep(0.5)  # the path's MTU is found by one probe, an RTT after it is validated
    for size in (1172, 1392):  # ICMP payload: packets of 1,200 and of 1,420 bytes
        out = ping(scenario.pair.space("A"), INNER["B"][4], "-M", "do", "-s", str(size))
        assert " 0% packet loss" in out
    path = scenario.pair.status("A")["peers"][0]["paths"][0]
    assert path["mtu"] == 1472
    counters = scenario.pair.status("A")["peers"][0]["counters"]
    assert counters["split_packets"] <= 2  # at most those before the probe came back
    too_large = scenario.pair.space("A").run(
        ["ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", "1393", INNER["B"][4]], check=False
    )
    assert too_large.returncode


def test_packets_are_split_where_the_path_carries_less(make_scenario: MakeScenario) -> None:
    """A router whose link takes 1,300 bytes and that drops every ICMP about it: 1,272 of them are
    UDP payload, which the search for the path's MTU finds but for its granularity.
    """
    scenario = make_scenario(uplinks=(1, 1))
    router = scenario.world.uplink("A").router
    router.run(["ip", "link", "set", "dev", "wan", "mtu", "1300"])
    silence = "add table inet dark; add chain inet dark out { type filter hook output priority 0; }"
    router.run(["nft", silence + "; add rule inet dark out icmp type destination-unreachable drop"])
    scenario.up()
    out = ping(scenario.pair.space("A"), INNER["B"][4], "-M", "do", "-s", "1392")
    assert " 0% packet loss" in out
    assert scenario.pair.status("A")["peers"][0]["counters"]["split_packets"] >= 5
    deadline = time.monotonic() + 10
    sizes = [1200]
    while sizes[-1] <= 1272 - GRANULARITY:
        assert time.monotonic() < deadline, sizes
        sizes.append(scenario.pair.status("A")["peers"][0]["paths"][0]["mtu"])
        time.sleep(0.1)
    assert sizes == sorted(sizes) and sizes[-1] <= 1272
    assert iperf(scenario) > 1


def test_bulk_flows_both_ways(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 1), delay=0.001)
    scenario.up()
    up, down = iperf(scenario), iperf(scenario, "-R")
    # What the userspace link and two tunnels on one core bring is no result; that both bring
    # something of the same order is.
    assert up > 5 and down > 5
    for name in ("A", "B"):
        counters = scenario.pair.status("A" if name == "A" else "B")["counters"]
        assert counters["internal_errors"] == 0


@pytest.mark.parametrize("family", [4, 6])
def test_ssh(make_scenario: MakeScenario, family: int) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    with scenario.ssh(family=family) as session:
        begin = time.monotonic()
        time.sleep(2)
        report = session.report(begin, begin + 1.5)
        assert not session.closed()
        assert report.lost == 0 and report.gap < 1.0


def test_a_killed_acceptor_comes_back_under_a_living_ssh_session(
    make_scenario: MakeScenario,
) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    with scenario.ssh() as session:
        process = scenario.pair.processes.pop("B")
        process.send_signal(signal.SIGKILL)
        process.wait(5)
        time.sleep(1)
        scenario.pair.start("B")
        restarted = time.monotonic()
        while scenario.pair.status("A").get("peers", [{}])[0].get("state") != "up":
            assert time.monotonic() < restarted + 10
            time.sleep(0.05)
        time.sleep(3)
        assert not session.closed()
        assert session.trace().arrivals[-1].time > time.monotonic() - 1.0
    triggers = {record["trigger"] for record in scenario.pair.history("A")}
    handshakes = scenario.pair.status("A")["peers"][0]["counters"]["handshakes"]
    assert handshakes == 2, triggers


def test_nothing_is_left_behind(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    space = scenario.pair.space("A")

    def state() -> tuple[str, str, str]:
        return (
            space.run(["ip", "-o", "link"]).stdout,
            space.run(["ip", "-o", "addr"]).stdout,
            space.run(["ip", "route", "show", "table", "all"]).stdout,
        )

    before = state()
    scenario.up()
    assert "mt0" in state()[0]
    assert scenario.pair.stop("A") == 0
    assert state() == before


def test_the_other_end_hears_the_goodbye(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    assert scenario.pair.stop("A") == 0
    deadline = time.monotonic() + 5
    while scenario.pair.status("B")["peers"][0]["state"] != "connecting":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_wrong_key_is_named_in_the_log(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 1))
    pair = scenario.pair
    stranger = scenario.directory / "id_stranger"
    pair.space("A").run([*pair.martlet, "keygen", str(stranger)], env={"PYTHONPATH": _root()})
    text = pair.config("A").read_text().replace(str(pair.key("A")), str(stranger))
    pair.config("A").write_text(text)
    for name in ("B", "A"):
        pair.start("B" if name == "B" else "A")
    deadline = time.monotonic() + 10
    while "refused" not in pair.log("A").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert pair.status("B")["peers"][0]["state"] == "connecting"
    assert "refused" in pair.log("B").read_text()


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])
