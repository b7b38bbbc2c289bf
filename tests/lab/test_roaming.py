"""Moves of either end under an SSH session and probes: the kernel's own NATs, addresses, links.

    u0 --[natA0]-- core --[natB0]-- u0          20 ms round trip, two uplinks each,
 [A]                 |                 [B]      every uplink behind a port-restricted NAT,
    u1 --[natA1]-- core --[natB1]-- u1          B's forwarded by UDP port 4117

A gap is what the receiving application felt beyond the probe spacing. The bounds are generous
multiples of the goals, because the machine is shared; `./dev bench roam` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import pytest

from cli.demo.pair import INNER
from cli.demo.probe import Probe
from cli.demo.world import Happened, World
from tests.lab.test_tunnel import MakeScenario

RTT = 0.020
SLACK = 0.400  # of a busy machine; a protocol timer of a second would still show

Event = Callable[[World], Happened]
HostName = Literal["A", "B"]

MOVES: dict[str, Event] = {
    "rebind port A": lambda world: world.rebind_nat("A"),
    "rebind address A": lambda world: world.rebind_nat("A", port=False, address=True),
    "rebind both A": lambda world: world.rebind_nat("A", address=True),
    "change address A": lambda world: world.change_address("A"),
    "change address B": lambda world: world.change_address("B"),
    "switch interface A": lambda world: world.switch_interface("A"),
    "switch interface B": lambda world: world.switch_interface("B"),
    "uplink down A": lambda world: world.uplink_down("A"),
    "uplink down B": lambda world: world.uplink_down("B"),
}


def felt(probe: Probe, event: Happened, window: float = 2.0) -> dict[str, float]:
    """The longest silence each way around an event, seconds."""
    end = event.end + window
    while time.monotonic() < end + 0.5:
        time.sleep(0.05)
    return {way: report.gap for way, report in probe.report(event.begin - 0.1, end).items()}


@pytest.mark.parametrize("family", [4, 6])
def test_every_move_in_a_row(make_scenario: MakeScenario, family: int) -> None:
    """One connection, one ssh session, every kind of move; nothing dies, nothing stays silent."""
    scenario = make_scenario(families=(family,), nat66=family == 6)
    scenario.up()
    with scenario.probing(family=family) as probe, scenario.ssh(family=family) as session:
        for name, move in MOVES.items():
            event = move(scenario.world)
            gaps = felt(probe, event)
            took = event.end - event.begin
            assert max(gaps.values()) < took + 3 * RTT + SLACK, (name, gaps, took)
            assert not session.closed(), name
            if name.startswith("switch"):
                scenario.world.restore_interface(_end(name))
                time.sleep(1)
            if name.startswith("uplink"):
                scenario.world.uplink_up(_end(name))
                time.sleep(1)
        assert session.trace().arrivals[-1].time > time.monotonic() - 1
    for end in ("A", "B"):
        status = scenario.pair.status(_end(end))
        assert status["peers"][0]["counters"]["handshakes"] == 1, "a new connection was needed"
        assert status["counters"]["internal_errors"] == 0
    assert scenario.pair.history("A") and scenario.pair.history("B")


def test_with_source_rules(make_scenario: MakeScenario) -> None:
    """Policy routing by source address, as on many multi-homed desktops, changes nothing."""
    scenario = make_scenario(source_rules=True)
    scenario.up()
    with scenario.probing() as probe:
        for name in ("switch interface A", "change address B"):
            event = MOVES[name](scenario.world)
            gaps = felt(probe, event)
            assert max(gaps.values()) < event.end - event.begin + 3 * RTT + SLACK, (name, gaps)


def test_both_ends_move_at_once(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    scenario.up()
    with scenario.probing() as probe, scenario.ssh() as session:
        first = scenario.world.switch_interface("A")
        last = scenario.world.switch_interface("B")
        gaps = felt(probe, Happened(first.begin, last.end), window=4)
        assert max(gaps.values()) < 3.0, gaps
        assert not session.closed()
    assert scenario.pair.status("A")["peers"][0]["state"] == "up"


def test_a_move_during_a_transfer_keeps_the_stream(make_scenario: MakeScenario) -> None:
    scenario = make_scenario()
    scenario.up()
    a, b = scenario.pair.space("A"), scenario.pair.space("B")
    payload = scenario.directory / "payload"
    payload.write_bytes(bytes(range(256)) * (8 << 12))  # 8 MiB
    received = scenario.directory / "received"
    listen = f"import socket; s = socket.create_server(('{INNER['B'][4]}', 7100));"
    listen += " c = s.accept()[0]; f = open(__import__('sys').argv[1], 'wb')\n"
    listen += "while d := c.recv(65536): f.write(d)"
    server = b.popen(["python3", "-c", listen, str(received)], log=scenario.directory / "srv.log")
    time.sleep(0.5)
    send = "import socket, sys, time\n"
    send += f"s = socket.create_connection(('{INNER['B'][4]}', 7100))\n"
    send += "d = open(sys.argv[1], 'rb').read()\n"
    send += "for i in range(0, len(d), 65536): s.sendall(d[i:i+65536]); time.sleep(0.04)\n"
    client = a.popen(["python3", "-c", send, str(payload)], log=scenario.directory / "cli.log")
    time.sleep(1)
    scenario.world.rebind_nat("A")
    time.sleep(1)
    scenario.world.change_address("B")
    time.sleep(1)
    scenario.world.switch_interface("A")
    assert client.wait(60) == 0 and server.wait(20) == 0
    assert received.read_bytes() == payload.read_bytes()


def test_no_path_holds_the_session(make_scenario: MakeScenario) -> None:
    """All uplinks of A away for 10 s; the session types on within a second of the first one."""
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    with scenario.ssh() as session:
        scenario.world.switch_interface("A")
        time.sleep(10)
        assert scenario.pair.status("A")["peers"][0]["state"] == "holding"
        assert "mt0" in scenario.pair.space("A").run(["ip", "-o", "link"]).stdout
        event = scenario.world.restore_interface("A")
        deadline = event.end + 5
        while session.trace().arrivals[-1].time < event.end:
            assert time.monotonic() < deadline, "the session did not come back"
            time.sleep(0.02)
        first = next(a.time for a in session.trace().arrivals if a.time >= event.end)
        assert first - event.end < 1.0 + SLACK
        assert not session.closed()
    assert scenario.pair.status("A")["peers"][0]["counters"]["handshakes"] == 1


def test_a_stopped_process_resumes(make_scenario: MakeScenario) -> None:
    """SIGSTOP for 5 s is what a suspend looks like; waking up is a network change."""
    import signal

    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    with scenario.ssh() as session:
        process = scenario.pair.processes["A"]
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        scenario.world.rebind_nat("A")
        process.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        time.sleep(2.5)
        first = next(a.time for a in session.trace().arrivals if a.time >= resumed)
        assert first - resumed < 1.0 + SLACK
        assert not session.closed()


def _end(name: str) -> HostName:
    return "A" if name.endswith("A") else "B"
