"""A hard NAT and an easy one: many ports are probed, and nothing is where that is of no use."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.sim.flows import Flow
from tests.sim.test_meeting import CONE, EASY, HARD
from tests.sim.world import PORT, Host, Uplink, World
from tunnel.ice import birthday
from tunnel.ice.agent import Agent
from tunnel.ice.birthday import LASTS, PAUSE_FIRST, RATE, SOCKETS, TRIES
from tunnel.ice.candidate import Kind
from tunnel.node import PORT_TRIAL
from tunnel.path.network import Address, PathKey
from tunnel.probing import IN_A_ROW, PATIENCE

ATTEMPT = 5.0 + PATIENCE + LASTS  # seconds until the first is over
RELAY = Address("192.0.2.99", 50000)
ORDINARY = 100  # ports and datagrams of meeting without it, with room


def world(a: dict[str, bool], b: dict[str, bool], seed: int = 1, *, knows: bool = True) -> World:
    def uplink(ip: str, public: str, kind: dict[str, bool]) -> list[Uplink]:
        return [Uplink("eth0", ip, public, ports=random.Random(seed), **kind)]  # type: ignore[arg-type]

    return World(
        seed,
        a=uplink("192.168.1.10", "203.0.113.1", a),
        b=uplink("192.168.2.10", "198.51.100.1", b),
        rendezvous=True,
        other_stun=knows,
    )


def probing(host: Host) -> Counter[str]:
    return Counter(host.node.status(0.0)["probing"])


def agent(world: World, name: str) -> Agent:
    return world.peer(name).roaming.agent


def direct(world: World) -> bool:
    return world.both_up and all(agent(world, name).direct for name in world.hosts)


def record(world: World) -> list[tuple[float, str, PathKey]]:
    """All that leaves, as it is seen outside."""
    sent: list[tuple[float, str, PathKey]] = []
    world.tap = lambda host, key, data: sent.append((world.now, host.name, key))
    return sent


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few of either that they never meet."""
    monkeypatch.setattr(birthday, "SOCKETS", 4)
    monkeypatch.setattr(birthday, "TRIES", 8)


def test_most_meet_at_the_first_attempt_and_all_within_the_budget() -> None:
    met = 0
    for seed in range(16):
        one = world(HARD, EASY, seed)
        sent = record(one)
        one.boot()
        one.run(ATTEMPT)
        met += direct(one)
        hard, easy = one.a, one.b
        assert probing(hard)["attempts"] == probing(easy)["attempts"] == 1
        assert hard.peak_ports <= SOCKETS and easy.peak_ports == 0
        tried = {key.remote.port for _, name, key in sent if name == "b"}
        assert len(tried) <= TRIES + ORDINARY
        assert probing(hard)["checks"] <= SOCKETS * LASTS / birthday.REFRESH
        for name in one.hosts:
            seconds = Counter(int(at) for at, who, _ in sent if who == name)
            assert max(seconds.values()) <= 2 * RATE + ORDINARY
        one.run(PORT_TRIAL + 1)
        kept = {key.local for key in agent(one, "a").direct} - {Address("192.168.1.10", PORT)}
        assert hard.ports == kept
    assert met >= 10  # 14 are likely


@pytest.mark.parametrize("seed", range(4))
def test_both_ends_try_again_together(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In step for an hour, so that what failed thrice does not fail for ever."""
    one = world(HARD, EASY, seed)
    with monkeypatch.context() as vain:
        vain.setattr(birthday, "SOCKETS", 4)
        vain.setattr(birthday, "TRIES", 8)
        one.boot()
        one.run(6 * PAUSE_FIRST)
    assert not one.both_up
    for name in one.hosts:
        one.run_until(lambda name=name: probing(one.hosts[name])["attempts"] == 4, 2 * PAUSE_FIRST)  # type: ignore[misc]
        began = one.now
        if name == "a":
            first = began
    assert began - first <= 1.0
    one.run_until(lambda: direct(one), 2 * 8 * PAUSE_FIRST)


def test_a_relayed_session_becomes_direct_and_stays_so() -> None:
    one = world(HARD, EASY, 3)
    one.boot()
    one.relay("a", one.a.uplinks[0], RELAY)
    one.run_until(lambda: one.both_up, 2.0)
    assert not direct(one)
    flows = [Flow(one, name, spacing=0.02) for name in "ab"]
    one.run_until(lambda: direct(one), ATTEMPT)
    one.run(5.0)
    for flow in flows:
        flow.stop()
    for name in one.hosts:
        assert one.active(name) in agent(one, name).direct
        pair = agent(one, name).pair(one.active(name))
        assert pair is not None and pair.kind is not Kind.RELAY
    assert all(flow.silence(one.now - 10) <= 0.1 for flow in flows)
    one.run(20 * PORT_TRIAL)
    assert one.a.ports == {one.active("a").local}
    assert one.peer("a").counters["handshakes"] == 1
    before = probing(one.a) + probing(one.b)
    one.run(2 * PAUSE_FIRST)
    assert probing(one.a) + probing(one.b) == before


def test_an_idle_winner_lives_though_the_relay_is_in_use() -> None:
    """As long as it is the only way without a relay."""
    one = world(HARD, EASY, 3)
    one.boot()
    one.relay("a", one.a.uplinks[0], RELAY)
    one.run_until(lambda: direct(one), ATTEMPT)
    node = one.a.node
    assert one.active("a").local == RELAY, "it is moved to later"
    winners = {key.local for key in agent(one, "a").direct}
    node.handle_timer(one.now + PORT_TRIAL + 1)
    assert one.a.ports >= winners and winners


@pytest.mark.parametrize(
    ("a", "b"), [(EASY, EASY), (HARD, HARD), (HARD, CONE), (CONE, CONE)], ids=str
)
def test_nothing_where_it_is_of_no_use(a: dict[str, bool], b: dict[str, bool]) -> None:
    one = world(a, b)
    one.boot()
    one.run(120.0)
    assert one.both_up == (a is not HARD or b is not HARD)
    for host in one.hosts.values():
        assert not +probing(host) and not host.peak_ports


def test_nothing_where_the_kind_of_nat_is_not_known() -> None:
    one = world(HARD, EASY, knows=False)
    one.boot()
    one.run(120.0)
    assert not +probing(one.a) and not +probing(one.b)


def test_an_hour_in_vain(hopeless: None) -> None:
    one = world(HARD, EASY)
    one.boot()
    one.run(3600.0)
    assert not one.both_up
    for host in one.hosts.values():
        assert probing(host)["attempts"] == 4  # at 0, 5, 15 and 35 minutes
        assert not host.ports


@pytest.mark.parametrize("mover", ["a", "b"])
def test_who_moves_has_another_turn_but_not_without_end(hopeless: None, mover: str) -> None:
    one = world(HARD, EASY)
    one.boot()
    minutes = 30
    for minute in range(minutes):
        host = one.hosts[mover]
        host.uplinks[0].public_ip = f"203.0.113.{100 + minute}"
        one.readdress(mover, host.uplinks[0], f"192.168.7.{100 + minute}")
        one.run(60.0)
    for host in one.hosts.values():
        assert probing(host)["attempts"] <= IN_A_ROW + minutes * 60 / PAUSE_FIRST
        assert probing(host)["attempts"] >= IN_A_ROW


def test_who_is_gone_is_not_searched(hopeless: None) -> None:
    one = world(HARD, EASY)
    one.boot()
    one.run(ATTEMPT)
    one.stop("a")
    one.run(3600.0)
    assert probing(one.b)["attempts"] == 1


def test_an_attempt_ends_with_its_address() -> None:
    one = world(HARD, EASY, 5)
    one.boot()
    one.run_until(lambda: len(one.a.ports) == SOCKETS, ATTEMPT)
    one.readdress("a", one.a.uplinks[0], "192.168.7.10")
    one.run(1.0)
    assert not one.a.ports
    one.run(ATTEMPT)
    assert probing(one.a)["attempts"] == 2
