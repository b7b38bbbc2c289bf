"""Relays of a real TURN server (coturn), where direct UDP is blocked, and comes and goes.

    u0 --[natA0]-- a0 +------+ b0 --[natB0]-- u0      20 ms round trip directly, and by the server,
[A]                   | core |                  [B]   which is in the middle; B's 4117 is forwarded
                      +------+
            198.51.100.1:3478 (UDP, TCP), :5349 (TLS)

"Blocked": the core forwards no UDP between A and B; the server is in the core itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.figures import ping_times
from bench.turn_server import PORT, TurnServer
from cli.demo.netns import Namespace
from cli.demo.pair import INNER
from cli.demo.world import HostName
from tests.lab.hosts import until
from tests.lab.scenario import Scenario
from tests.lab.test_tunnel import MakeScenario

PATIENCE = 30.0  # seconds, on a busy machine
SECONDS = 15.0
"""What "within seconds" may take: the settling of a better path, doubled by an earlier move, and
checks of a path that was dead, 2 s apart; on a busy machine."""
Path = dict[str, Any]


class Block:
    """What the core does not let through; `lift` lets it."""

    def __init__(self, core: Namespace, *rules: str, hook: str = "forward") -> None:
        self._core, self._name = core, f"block_{hook}"
        lines = [f"table inet {self._name} {{", "chain drops {"]
        lines += [f"type filter hook {hook} priority 0; policy accept;", *rules, "}", "}"]
        core.run(["nft", "-f", "-"], input="\n".join(lines) + "\n")

    def lift(self) -> None:
        self._core.run(["nft", "delete", "table", "inet", self._name])


def block_direct(scenario: Scenario) -> Block:
    return Block(scenario.world.core, "meta l4proto udp drop")


def serve(scenario: Scenario, *, quota: int = 0) -> TurnServer:
    """In the core, at its first address of each family."""
    addresses = scenario.world.uplink("A").cores
    return TurnServer(scenario.world.core, addresses, scenario.directory, quota=quota)


def make(make_scenario: MakeScenario, **options: Any) -> tuple[Scenario, TurnServer]:
    scenario = make_scenario(uplinks=(1, 1), **options)
    server = serve(scenario)
    scenario.pair.environment = {**scenario.pair.environment, **server.environment}
    return scenario, server


def paths(scenario: Scenario, name: HostName) -> list[Path]:
    peers = scenario.pair.status(name).get("peers", [])
    return list(peers[0]["paths"]) if peers else []


def active(scenario: Scenario, name: HostName = "A") -> Path:
    return next((path for path in paths(scenario, name) if path["active"]), {})


def relays(scenario: Scenario, name: HostName = "A", **wanted: Any) -> list[dict[str, Any]]:
    rows = scenario.pair.status(name).get("relays", [])
    return [row for row in rows if wanted.items() <= row.items()]


def until_active(scenario: Scenario, kind: Callable[[str], bool], within: float) -> None:
    """Wait until both ends send on such a path."""
    until(
        lambda: all(kind(active(scenario, name).get("kind", "")) for name in ("A", "B")),
        lambda: [(name, paths(scenario, name)) for name in ("A", "B")],
        within,
    )


def relayed(kind: str) -> bool:
    return kind == "relay"


def direct(kind: str) -> bool:
    return kind not in ("relay", "")


def healthy(scenario: Scenario, *, handshakes: int = 1) -> None:
    ends: tuple[HostName, ...] = ("A", "B")
    for name in ends:
        status = scenario.pair.status(name)
        counted = status["peers"][0]["counters"]["handshakes"]
        assert 1 <= counted <= handshakes, "a new connection was needed"
        assert status["counters"]["internal_errors"] == 0


@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
def test_a_relay_where_nothing_direct_works_and_back_to_it(
    make_scenario: MakeScenario, transport: str
) -> None:
    """A dials B from its relay; direct opens, and closes again: one session all the time."""
    scenario, server = make(make_scenario)
    url = server.url(secure=transport == "tls", transport="tcp" if transport == "tcp" else "")
    scenario.configure(server.toml(url), ["A"])
    block = block_direct(scenario)
    scenario.up()
    until_active(scenario, relayed, PATIENCE)
    (row,) = relays(scenario, state="allocated")
    assert row["transport"] == transport
    assert active(scenario)["local"] == row["address"]
    assert active(scenario, "B")["remote"] == row["address"]
    with scenario.ssh() as session, scenario.probing() as probe:
        block.lift()
        until_active(scenario, direct, SECONDS)
        block = block_direct(scenario)
        begin = time.monotonic()
        until_active(scenario, relayed, SECONDS)
        time.sleep(3)
        for way, report in probe.report(begin, begin + 3).items():
            assert report.gap < 1.5, (way, report)
        assert not session.closed()
        assert session.trace().arrivals[-1].time > time.monotonic() - 1
    healthy(scenario)


def test_the_relay_of_the_end_that_was_dialled(make_scenario: MakeScenario) -> None:
    """B alone has one. A learns of it from B, and it is what is left when direct dies."""
    scenario, server = make(make_scenario)
    scenario.configure(server.toml(server.url()), ["B"])
    scenario.up()
    until(
        lambda: any(p["kind"] == "relay" and p["warm"] for p in paths(scenario, "A")),
        lambda: paths(scenario, "A"),
        PATIENCE,
    )
    assert direct(active(scenario)["kind"])
    with scenario.ssh() as session:
        block_direct(scenario)
        until_active(scenario, relayed, SECONDS)
        (row,) = relays(scenario, "B", state="allocated")
        assert active(scenario, "A")["remote"] == row["address"]
        time.sleep(1)
        assert not session.closed()
        assert session.trace().arrivals[-1].time > time.monotonic() - 1
    healthy(scenario)


def test_tcp_where_udp_to_the_server_is_blocked_too(make_scenario: MakeScenario) -> None:
    scenario, server = make(make_scenario)
    scenario.configure(server.toml(server.url()), ["A"])
    block_direct(scenario)
    Block(scenario.world.core, f"udp dport {PORT} drop", hook="input")
    scenario.up()
    assert relays(scenario, state="allocated", transport="tcp")
    assert active(scenario)["kind"] == "relay"


def test_a_relay_over_tcp_does_not_queue_for_seconds(make_scenario: MakeScenario) -> None:
    """An upload fills a slow uplink with 1 s of buffer; whoever types waits little longer."""
    scenario, server = make(make_scenario)
    scenario.configure(server.toml(server.url(transport="tcp")), ["A"])
    block_direct(scenario)
    scenario.up()
    scenario.world.link.set("A0", rate=4e6, queue=1.0)
    a, b = scenario.pair.space("A"), scenario.pair.space("B")
    target, log = INNER["B"][4], scenario.directory
    b.popen(["iperf3", "-s", "-1", "-B", target], log=log / "server.log")
    listens = ["ss", "-Hltn", "sport = :5201"]
    until(lambda: target in b.run(listens).stdout, lambda: "iperf3", PATIENCE)
    upload = a.popen(["iperf3", "-c", target, "-t", "8"], log=log / "client.log")
    time.sleep(3)
    ping = ["ping", "-n", "-i", "0.05", "-c", "60", "-W", "3", target]
    times = ping_times(a.run(ping, check=False).stdout)
    assert upload.poll() is None
    assert len(times) > 50
    assert statistics.median(times) < 250, times
    assert active(scenario)["kind"] == "relay"


def test_an_ipv6_relay(make_scenario: MakeScenario) -> None:
    """B is dialled at its IPv6 address alone, and only the server gets there."""
    scenario, server = make(make_scenario, families=(4, 6))
    # By IPv4 the server is asked for addresses of both families.
    scenario.configure(server.toml(server.url()), ["A"])
    config = scenario.pair.config("A")
    (six,) = [e for e in scenario.world.endpoints("B") if e.startswith("[2001:db8:b0:")]
    lines = [
        f'endpoint = "{six}"' if line.startswith("endpoint") else line
        for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(lines) + "\n")
    block_direct(scenario)
    scenario.up()
    rows = relays(scenario, state="allocated")
    assert sorted(row["address"].startswith("[") for row in rows) == [False, True]
    assert active(scenario)["kind"] == "relay"
    assert active(scenario)["remote"].startswith("[")


def test_the_server_is_restarted(make_scenario: MakeScenario) -> None:
    """The allocation is gone, and with it the only path: another one is made, on its own."""
    scenario, server = make(make_scenario)
    scenario.configure(server.toml(server.url(transport="udp")), ["A"])
    block_direct(scenario)
    scenario.up()
    (before,) = relays(scenario, state="allocated")
    with scenario.ssh() as session:
        server.stop()
        server.start()
        until(
            lambda: any(
                row["address"] != before["address"] for row in relays(scenario, state="allocated")
            ),
            lambda: relays(scenario),
            PATIENCE,
        )
        until(
            lambda: session.last_echo() > time.monotonic() - 0.5,
            lambda: paths(scenario, "A"),
            PATIENCE,
        )
        assert not session.closed()
    # An end that knows where to dial tries that, too, and whoever answers first wins.
    healthy(scenario, handshakes=2)


def test_what_the_server_says_no_to_is_told(make_scenario: MakeScenario) -> None:
    scenario, server = make(make_scenario)
    wrong = scenario.directory / "wrong.password"
    wrong.write_text("sparrow")
    wrong.chmod(0o600)
    nobody = f"turn:{server.addresses[4]}:9?transport=tcp"
    scenario.configure(
        server.toml(server.url(), nobody, server.url(secure=True), password_file=wrong), ["A"]
    )
    # The certificate is nobody's that a system trusts.
    scenario.pair.environment = {**scenario.pair.environment, "SSL_CERT_FILE": "/dev/null"}
    scenario.up()

    def errors() -> dict[str, str]:
        return {row["server"]: row["error"] for row in relays(scenario) if row["error"]}

    until(lambda: len(errors()) == 3, lambda: relays(scenario), PATIENCE)
    told = errors()
    assert "refuses the user name or the password" in told[server.url()]
    assert told[nobody].startswith("the server refuses the connection")
    assert "certificate is not trusted" in told[server.url(secure=True)]


def test_a_quota(make_scenario: MakeScenario) -> None:
    """One for the two of them, so that one end has none."""
    scenario = make_scenario(uplinks=(1, 1))
    server = serve(scenario, quota=1)
    scenario.configure(server.toml(server.url(transport="udp")))
    scenario.up()

    def told() -> list[str]:
        both = relays(scenario, "A", state="failed") + relays(scenario, "B", state="failed")
        return [row["error"] for row in both]

    until(lambda: bool(told()), lambda: (relays(scenario, "A"), relays(scenario, "B")), PATIENCE)
    assert any("number of relays that the server grants" in error for error in told())
