"""Two ends that know nothing but a key of each other, and a broker: behind simulated NATs."""

from __future__ import annotations

import pytest

from tests.sim.flows import Flow
from tests.sim.world import STUN, Uplink, World
from tunnel.events import Obstructed
from tunnel.rendezvous.meeting import Offer, Offered

MS = 1e-3
EASY = {"restricted": True}
CONE = {"restricted": False}
HARD = {"restricted": True, "symmetric": True}


def behind(a: dict[str, bool], b: dict[str, bool], seed: int = 1, **more: float) -> World:
    return World(
        seed,
        a=[Uplink("eth0", "192.168.1.10", "203.0.113.1", **a)],  # type: ignore[arg-type]
        b=[Uplink("eth0", "192.168.2.10", "198.51.100.1", **b)],  # type: ignore[arg-type]
        rendezvous=True,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("a", "b"), [(EASY, EASY), (EASY, CONE), (CONE, CONE), (HARD, CONE), (CONE, HARD)]
)
@pytest.mark.parametrize("first", ["a", "b"])
def test_two_nats(a: dict[str, bool], b: dict[str, bool], first: str) -> None:
    """The time is that of the second to come: 8 round trips, and 100 ms for the rest."""
    world = behind(a, b)
    second = "b" if first == "a" else "a"
    world.boot(first)
    world.boot(second)
    world.stop(second)
    world.run(3.0)
    world.boot(second)
    took = world.run_until(lambda: world.both_up, 5.0)
    assert took <= 8 * 20 * MS + 100 * MS


def test_at_the_same_moment() -> None:
    world = behind(EASY, EASY)
    world.boot()
    assert world.run_until(lambda: world.both_up, 5.0) <= 8 * 20 * MS + 100 * MS


@pytest.mark.parametrize("seed", range(40))
def test_lossy_and_late(seed: int) -> None:
    world = behind(EASY, EASY, seed, loss=0.1, jitter=0.03)
    world.boot()
    world.run_until(lambda: world.both_up, 10.0)


def test_both_ends_move_and_nothing_is_left() -> None:
    """Both have other addresses, inside and outside, at the same moment: the broker alone knows."""
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    flows = [Flow(world, name, spacing=5 * MS) for name in "ab"]
    world.run(2.0)
    at = world.now
    for host, ip, public in (
        (world.a, "192.168.7.10", "203.0.113.77"),
        (world.b, "192.168.8.10", "198.51.100.88"),
    ):
        host.uplinks[0].public_ip = public
        world.readdress(host.name, host.uplinks[0], ip)
    world.run(3.0)
    for flow in flows:
        assert flow.silence(at) <= 250 * MS
    assert world.peer("a").counters["handshakes"] == 1


@pytest.mark.parametrize("name", ["a", "b"])
def test_restart(name: str) -> None:
    """A new process, behind a new mapping, with a session at the other end that is dead."""
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(2.0)
    world.stop(name)
    world.hosts[name].uplinks[0].forget()
    world.run(1.0)
    world.boot(name)
    world.run_until(lambda: world.both_up, 3.0)
    Flow(world, "a", spacing=5 * MS)
    world.run(0.5)
    assert world.hosts["b"].received


def test_the_broker_goes_and_the_session_stays() -> None:
    """A rebinding needs it only where the other NAT lets in nobody it does not know yet."""
    world = behind(EASY, CONE)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.broker_up = False
    for name in world.hosts:
        world.reach_broker(name)
    world.run(60.0)
    assert world.both_up
    world.rebind(world.a.uplinks[0])
    flow = Flow(world, "a", spacing=5 * MS)
    world.run(2.0)
    assert flow.alive(world.now - 0.1)


def test_the_broker_comes_late() -> None:
    world = behind(EASY, EASY)
    world.broker_up = False
    world.boot()
    world.run(30.0)
    assert not world.both_up
    world.broker_up = True
    world.run_until(lambda: world.both_up, 2.0)


def test_quiet_once_it_is_up() -> None:
    """Who has a session says nothing more to the broker."""
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(1.0)
    sent = [host.signals_sent for host in world.hosts.values()]
    assert all(count <= 6 for count in sent)
    world.run(600.0)
    assert [host.signals_sent for host in world.hosts.values()] == sent


def test_a_hard_pair_waits_cheaply() -> None:
    """Neither NAT lets the other in, and there is no relay: they go on trying, seldom."""
    world = behind(HARD, EASY)
    world.boot()
    world.run(60.0)
    before = [host.bytes_sent for host in world.hosts.values()]
    world.run(600.0)
    assert not world.both_up
    for host, earlier in zip(world.hosts.values(), before, strict=True):
        assert host.bytes_sent - earlier <= 600 * 100  # bytes a second


def two_uplinks(number: int, public: str) -> list[Uplink]:
    return [
        Uplink("eth0", f"192.168.{number}.10", f"{public}.1", restricted=True),
        Uplink("wlan0", f"192.168.{number + 10}.10", f"{public}.2", restricted=True),
    ]


@pytest.mark.parametrize("goodbye", [True, False])
def test_a_peer_that_is_away_is_waited_for_cheaply(goodbye: bool) -> None:
    """For weeks, maybe; and when it is back, somewhere else, it is found as soon as ever."""
    world = World(1, a=two_uplinks(1, "203.0.113"), b=two_uplinks(2, "198.51.100"), rendezvous=True)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(5.0)
    if goodbye:
        world.b.node.close(world.now)
        world.pump(world.b)
        world.run(1.0)
    world.stop("b")
    world.run(60.0)
    before = world.a.bytes_sent
    world.run(600.0)
    assert world.a.bytes_sent - before <= 600 * 600  # bytes a second
    for number, uplink in enumerate(world.b.uplinks):
        uplink.public_ip = f"198.51.100.{number + 7}"
        uplink.forget()
    world.boot("b")
    world.run_until(lambda: world.both_up, 3.0)


def why(world: World, name: str) -> str:
    (peer,) = world.hosts[name].node.status(world.now)["peers"]
    return " ".join(peer["why"])


def obstructed(world: World, name: str) -> list[tuple[str | None, str]]:
    events = [event for _, event in world.hosts[name].events if isinstance(event, Obstructed)]
    return [(event.peer, event.obstacle.about) for event in events]


def test_the_log_is_told_once_why_a_peer_is_not_there() -> None:
    world = behind(EASY, EASY)
    world.broker_up = False
    world.boot("a")
    world.run(120.0)
    assert obstructed(world, "a") == [("b", "broker")]
    world.broker_up = True
    world.run(120.0)
    assert obstructed(world, "a") == [("b", "broker"), ("b", "unheard")]
    world.boot("b")
    world.run_until(lambda: world.both_up, 90.0)
    world.run(300.0)
    assert len(obstructed(world, "a")) == 2 and obstructed(world, "b") == []


def test_silent_stun_servers_are_told_of() -> None:
    world = behind(EASY, EASY)
    del world.outsiders[STUN.host]
    world.boot()
    world.run(60.0)
    assert not world.both_up
    for name, peer in ("a", "b"), ("b", "a"):
        assert obstructed(world, name)[0] == (None, "udp")
        assert obstructed(world, name).count((None, "udp")) == 1
        assert (peer, "udp-there") in obstructed(world, name)
        assert "UDP is blocked here" in why(world, name)


def test_what_a_peer_is_waited_for_is_told() -> None:
    """In the words of `martlet status` and `why`: the broker, the peer, the way."""
    world = behind(HARD, EASY)
    world.broker_up = False
    world.boot("a")
    world.run(3.0)
    assert "no broker" in why(world, "a")
    world.broker_up = True
    world.run(1.0)
    assert "not heard of" in why(world, "a")
    world.boot("b")
    world.run(10.0)
    assert "heard of at the rendezvous" in why(world, "a")
    assert "add a relay" in why(world, "a")


def test_what_a_peer_that_is_dialled_is_waited_for() -> None:
    world = World()
    world.boot("a")
    world.run(3.0)
    assert "dialled at 198.51.100.1:4117" in why(world, "a")
    world.boot("b")
    world.stop("a")
    world.boot("b")
    assert "has to dial us" in why(world, "b")


def another_process(world: World, *, fresh: bool) -> None:
    """What a hears of a process of b that is not the one of its session."""
    key = world.b.node._own_key
    offered = Offered(key, Offer("else" * 2, "p" * 22, 9, ()), bytes(16), fresh)
    world.peer("a").offered(offered, world.now)


def test_a_healthy_session_outlives_the_word_of_another_process() -> None:
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(1.0)
    session = world.peer("a").session
    for fresh in (True, False):
        another_process(world, fresh=fresh)
        world.run(1.0)
        assert world.peer("a").session is session and world.both_up


def test_only_a_fresh_word_of_another_process_ends_a_session_without_a_path() -> None:
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.b.uplinks[0].black_hole = True
    world.run(5.0)
    peer = world.peer("a")
    session = peer.session
    assert session is not None and peer.seeking
    another_process(world, fresh=False)
    assert peer.session is session
    another_process(world, fresh=True)
    assert peer.session is None


def test_a_host_that_slept_asks_how_it_is_seen() -> None:
    world = behind(EASY, EASY)
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(10.0)
    node = world.a.node
    assert not any(key.remote == STUN for key, _ in node.datagrams_to_send(world.now))
    node.resumed(world.now)
    assert any(key.remote == STUN for key, _ in node.datagrams_to_send(world.now))
