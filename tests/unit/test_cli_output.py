"""What users see."""

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cli import output


def printed(renderable: RenderableType) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=10_000, highlight=False).print(renderable)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


PATH: dict[str, Any] = {
    "local": "192.0.2.1:4117",
    "remote": "[2001:db8::1]:4117",
    "kind": "host",
    "state": "validated",
    "rtt_ms": 20.04,
    "mtu": 1452,
    "tx_bytes": 1500,
    "rx_bytes": 2_500_000,
}
PEER = {
    "name": "office",
    "state": "up",
    "active_path": "192.0.2.1:4117>[2001:db8::1]:4117",
    "paths": [PATH, PATH | {"local": "192.0.2.2:4117", "rtt_ms": None, "state": "failed"}],
    "migrations": 3,
}


def test_status_shows_peers_and_paths() -> None:
    lines = printed(output.status({"interface": "mt0", "peers": [PEER]}))
    assert lines[0] == "mt0"
    peer = next(line for line in lines if line.startswith("office"))
    assert peer.split("  ") != []
    for part in ("up", "192.0.2.1:4117 > [2001:db8::1]:4117", "20.0 ms", "3.0 kB", "5.0 MB", "3"):
        assert part in peer
    assert sum(line.startswith("office") for line in lines) == 3
    assert any("failed" in line and " - " in line for line in lines)


def test_status_says_what_became_of_every_relay() -> None:
    server, ours = "turn:turn.example", {"transport": "udp", "local": "192.0.2.1"}
    relays = [
        {"server": server, **ours, "state": "allocated", "address": "198.51.100.1:5", "error": ""},
        {"server": server, **ours, "state": "failed", "address": None, "error": "no answer"},
        {"server": server, "transport": None, "state": "waiting", "error": "no route"},
        {"server": server, **ours, "state": "asking", "error": ""},
    ]
    assert printed(output.status({"interface": "mt0", "relays": relays}))[-4:] == [
        "relay turn:turn.example over udp from 192.0.2.1: 198.51.100.1:5",
        "relay turn:turn.example over udp from 192.0.2.1: no answer",
        "relay turn:turn.example: no route",
        "relay turn:turn.example over udp from 192.0.2.1: asking",
    ]


@pytest.mark.parametrize(
    "peer",
    [
        {"name": "office", "state": "connecting"},
        {"name": "office", "state": "holding", "active_path": None, "paths": []},
        {"name": "office", "state": "up", "active_path": "a>b", "paths": None},
        {"name": "office", "active_path": {"local": "a", "remote": "b"}, "paths": [PATH]},
    ],
)
def test_status_takes_whatever_is_not_known(peer: dict[str, Any]) -> None:
    assert any("office" in line for line in printed(output.status({"peers": [peer]})))


def test_an_interface_may_say_more_of_itself() -> None:
    interface = {"name": "mt0", "address": ["10.88.0.1/24", "fd88::1/64"], "port": 4117, "x": None}
    lines = printed(output.status({"interface": interface}))
    assert lines[0] == "mt0  address 10.88.0.1/24 fd88::1/64  port 4117"


def test_active_path() -> None:
    assert output.active_path(PEER) == "192.0.2.1:4117 > [2001:db8::1]:4117"
    assert output.active_path({"active_path": None}) == ""


def test_history() -> None:
    record = {
        "wall_time": 1_700_000_000.25, "peer": "office", "trigger": "rebinding", "from_path": "a>b",
        "to_path": "a>c", "detect_ms": 0.5, "switch_ms": 1.25, "confirm_ms": None, "lost": 0,
        "replayed": 12, "duplicates": 3,
    }  # fmt: skip
    head, line = printed(output.history([record]))
    assert head.split()[:3] == ["WHEN", "PEER", "WHY"]
    columns = ["office", "rebinding", "a>b", "a>c", "0.5", "ms", "1.2", "ms", "-"]
    assert line.split()[2:] == [*columns, "0", "12", "3"]
    assert ".250" in line
    assert printed(output.history([])) == ["no migration yet"]


def test_ping_summary_is_that_of_ping() -> None:
    assert output.ping_summary("office", 4, [10.0, 20.0], 3.004) == [
        "--- office ping statistics ---",
        "4 packets transmitted, 2 received, 50% packet loss, time 3004ms",
        "rtt min/avg/max/mdev = 10.000/15.000/20.000/5.000 ms",
    ]
    assert len(output.ping_summary("office", 1, [], 1)) == 2
    assert "0 packets transmitted" in output.ping_summary("office", 0, [], 0)[1]


@pytest.mark.parametrize(
    ("amount", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3e9, "3.0 GB"),
     (5e15, "5000.0 TB")],
)  # fmt: skip
def test_bytes(amount: float | None, text: str) -> None:
    assert output._bytes(amount) == text


def told(renderable: RenderableType) -> str:
    return "\n".join(printed(renderable))


def test_status_tells_of_the_broker_and_what_a_peer_waits_for() -> None:
    peer = {"name": "office", "state": "connecting", "active_path": None, "why": ["no word of it"]}
    broker: dict[str, Any] = {
        "url": "mqtt://b",
        "state": "connecting",
        "error": "b is silent",
        "rtt_ms": None,
    }
    shown = told(output.status({"interface": "mt0", "peers": [peer], "rendezvous": broker}))
    assert "office: no word of it" in shown
    assert "rendezvous mqtt://b: connecting: b is silent" in shown
    broker |= {"state": "connected", "rtt_ms": 20.0}
    shown = told(output.status({"interface": "mt0", "peers": [], "rendezvous": broker}))
    assert "rendezvous mqtt://b: connected, 20" in shown and "silent" not in shown


def test_status_tells_what_is_in_the_way_and_what_to_do_once() -> None:
    udp = {"about": "udp", "problem": "UDP is blocked here", "remedy": "let it out"}
    broker = {"about": "broker", "problem": "rendezvous mqtt://b: b is silent", "remedy": "look"}
    line = {
        "url": "mqtt://b",
        "state": "connecting",
        "error": "b is silent",
        "remedy": "look",
    }
    state: dict[str, Any] = {
        "interface": "mt0", "peers": [], "rendezvous": line, "obstacles": [broker, udp],
    }  # fmt: skip
    shown = told(output.status(state))
    assert shown.count("b is silent; look") == 1
    assert shown.count("UDP is blocked here; let it out") == 1
    held = {
        "name": "office",
        "state": "holding",
        "why": ["in use: a>b", "UDP is blocked here; let it out"],
    }
    shown = told(output.status({**state, "peers": [held]}))
    assert "office: in use: a>b" in shown and shown.count("UDP is blocked here") == 1
    assert output.obstacles(state) == [
        "rendezvous mqtt://b: b is silent; look", "UDP is blocked here; let it out",
    ]  # fmt: skip
