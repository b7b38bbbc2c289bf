"""From the first dial to the goodbye: suspends, restarts, twins, long idle hours."""

from __future__ import annotations

import pytest

from tests.sim.flows import Flow
from tests.sim.test_moves import OWD, RTT, Pair, a_eth, b_eth, running
from tests.sim.world import World
from tunnel.events import PeerConnecting, PeerHolding, PeerUp
from tunnel.path.liveness import NAT_KEEPALIVE
from tunnel.peer import COURTESY_WAIT


def connected(seed: int = 1, **more: object) -> World:
    world = World(seed, **{"delay": OWD, **more})  # type: ignore[arg-type]
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    return world


def open_sessions(world: World, name: str) -> int:
    return sum(s.connection.is_open for s in world.hosts[name].node._owners)


# connecting


def test_first_packet_needs_three_round_trips() -> None:
    world = World(delay=OWD)
    world.boot()
    start = world.now
    flow = Flow(world, "a", spacing=0.001)
    world.run_until(lambda: flow.alive(0.0), 2.0)
    # The end with the larger key is polite for a moment when both could dial.
    polite = COURTESY_WAIT if world.peer("a")._waits else 0.0
    assert world.now - start <= 3 * RTT + 0.03 + polite


@pytest.mark.parametrize("late", [0.0, 0.5, 7.0, 60.0])
def test_acceptor_starts_later(late: float) -> None:
    world = World(delay=OWD)
    world.boot("a")
    world.run(late)
    world.boot("b")
    world.run_until(lambda: world.both_up, 2.5)


@pytest.mark.parametrize("loss", [0.1, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_connecting_under_loss(seed: int, loss: float) -> None:
    world = World(seed, delay=OWD, loss=loss)
    world.boot()
    world.run_until(lambda: world.both_up, 10.0)


@pytest.mark.parametrize("seed", range(6))
def test_both_ends_dial_at_once(seed: int) -> None:
    """Exactly one session survives, the same at both ends, and no packet is lost afterwards."""
    both = {"a": [a_eth(forwarded=True)], "b": [b_eth()]}
    world = World(seed, delay=OWD, both_dial=True, **both)  # type: ignore[arg-type]
    world.boot()
    for name in "ab":  # no politeness: really at the same time
        peer = world.peer(name)
        if peer.dialler.session is None:
            peer.dialler.want(world.now)
            peer.dialler.handle_timer(world.now)
            world.pump(world.hosts[name])
    world.run_until(lambda: world.both_up, 2.0)
    world.run(1.0)
    sessions = [world.peer(name).session for name in "ab"]
    assert sessions[0] is not None
    assert sessions[1] is not None
    assert sessions[0].dialled is not sessions[1].dialled
    assert [open_sessions(world, name) for name in "ab"] == [1, 1]
    pair = Pair(world, Flow(world, "a"), Flow(world, "b"))
    world.run(1.0)
    assert pair.from_a.lost(until=world.now - 0.1) == []
    assert pair.from_b.lost(until=world.now - 0.1) == []
    pair.finish(sessions=None)


# pauses


@pytest.mark.parametrize("seconds", [2.0, 60.0])
@pytest.mark.parametrize("name", ["a", "b"])
def test_suspend_and_resume(name: str, seconds: float) -> None:
    """Traffic both ways within two round trips and 20 ms of the resume (docs: the lab's matrix)."""
    pair = running()
    world = pair.world
    world.suspend(name)
    world.run(seconds)
    world.resume(name)
    at = world.now
    world.run_until(lambda: pair.flow(name).alive(at), 2 * RTT + 0.02)
    if seconds < 30:  # the mapping is still there
        world.run_until(lambda: pair.toward(name).alive(at), 2 * RTT + 0.02)
    else:
        world.run_until(lambda: pair.toward(name).alive(at), 1.0)
    world.run(1.0)
    pair.finish(sessions=None)


def test_both_suspended_and_waking_elsewhere() -> None:
    pair = running()
    world = pair.world
    for name in "ab":
        world.suspend(name)
    pair.from_a.stop()
    pair.from_b.stop()
    world.run(3600.0)
    pair = Pair(world, Flow(world, "a", flow=2), Flow(world, "b", flow=2))
    for name, ip in (("a", "192.168.9.99"), ("b", "192.168.8.88")):
        world.resume(name)
        world.readdress(name, world.hosts[name].uplinks[0], ip)
    at = world.now
    world.run_until(lambda: pair.from_a.alive(at) and pair.from_b.alive(at), 1.0)
    world.run(1.0)
    pair.finish(sessions=None)


def test_idle_for_an_hour_then_either_end_speaks_first() -> None:
    """NAT mappings die after 30 s here: the keepalive holds them, cheaply."""
    for speaker in "ab":
        world = connected()
        world.run(10.0)
        before = {name: host.bytes_sent for name, host in world.hosts.items()}
        world.run(3600.0)
        cost = sum(host.bytes_sent - before[name] for name, host in world.hosts.items())
        # Of both ends: a QUIC keepalive and a check each way every 15 s.
        assert cost <= 125_000, f"{cost} bytes an hour"
        assert world.both_up
        flow = Flow(world, speaker)
        world.run(0.5)
        assert flow.lost(until=world.now - 0.1) == []
        assert [world.peer(name).counters["handshakes"] for name in "ab"] == [1, 1]


def test_nat_forgets_an_idle_tunnel() -> None:
    """A NAT with a memory of five seconds: the inside reaches the outside at once, always."""
    world = connected(a=[a_eth(lifetime=5.0)])
    world.run(14.0)
    flow = Flow(world, "a")
    back = Flow(world, "b")
    world.run(1.0)
    assert flow.lost(until=world.now - 0.1) == []
    assert back.silence(world.now - 0.9) <= RTT + 0.02


# restarts


@pytest.mark.parametrize("traffic", ["a", "b", "ab"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_restart_replaces_the_session(name: str, traffic: str) -> None:
    pair = running()
    world = pair.world
    for sender in set("ab") - set(traffic):
        pair.flow(sender).stop()
    world.run(0.2)
    world.stop(name)
    world.run(0.1)
    world.boot(name)
    at = world.now
    other = "b" if name == "a" else "a"
    # The other end's next packet earns a stateless reset; the dialler comes back by itself.
    # An idle dialler with a dead acceptor notices with its next keepalive.
    limit = 0.5 + COURTESY_WAIT if name == "a" or "a" in traffic else NAT_KEEPALIVE + 1.5
    world.run_until(lambda: world.both_up and world.peer(other).counters["handshakes"] == 2, limit)
    flows = [pair.flow(sender) for sender in traffic]
    world.run_until(lambda: all(flow.alive(at) for flow in flows), limit)
    world.run(2.0)
    assert [open_sessions(world, n) for n in "ab"] == [1, 1]
    assert world.peer(name).counters["handshakes"] == 1
    assert world.peer(other).counters["handshakes"] == 2


def test_restart_of_an_idle_acceptor() -> None:
    """Nobody speaks: the keepalive finds out."""
    world = connected()
    world.run(5.0)
    world.boot("b")
    world.run_until(lambda: world.both_up and world.peer("a").counters["handshakes"] == 2, 20.0)


def test_both_restart_at_once() -> None:
    pair = running()
    world = pair.world
    world.boot("a", "b")
    at = world.now
    world.run_until(lambda: pair.from_a.alive(at) and pair.from_b.alive(at), 1.0)
    pair.finish()


def test_restart_again_and_again() -> None:
    pair = running()
    world = pair.world
    for number in range(12):
        world.boot("ab"[number % 2])
        world.run(0.31)
    at = world.now
    world.run_until(lambda: pair.from_a.alive(at) and pair.from_b.alive(at), 2.5)
    world.run(3.0)
    assert [open_sessions(world, name) for name in "ab"] == [1, 1]
    assert [len(world.hosts[name].node._owners) for name in "ab"] == [1, 1]


# the end


@pytest.mark.parametrize("name", ["a", "b"])
def test_graceful_close(name: str) -> None:
    world = connected()
    world.run(1.0)
    host, other = world.hosts[name], "b" if name == "a" else "a"
    host.node.close(world.now)
    world.pump(host)
    world.run_until(lambda: host.node.closed, 1.0)
    world.run(RTT)
    assert world.state(other) == "connecting"
    assert isinstance(world.hosts[other].events[-1][1], PeerConnecting)
    host.stopped = True
    world.run(10.0)
    world.boot(name)
    world.run_until(lambda: world.both_up, 6.0)


def test_close_without_a_peer_ends_at_once() -> None:
    world = World(delay=OWD)
    world.boot("a")
    world.run(0.3)
    world.a.node.close(world.now)
    world.pump(world.a)
    world.run(1.0)
    assert world.a.node.closed


def test_events_tell_the_story_in_order() -> None:
    pair = running()
    world = pair.world
    world.link("a", world.a.uplinks[0], up=False)
    world.run(3.0)
    world.link("a", world.a.uplinks[0], up=True)
    world.run(2.0)
    kinds = [
        type(event)
        for _, event in world.a.events
        if isinstance(event, PeerUp | PeerHolding | PeerConnecting)
    ]
    assert kinds == [PeerConnecting, PeerUp, PeerHolding, PeerUp]
    pair.finish(sessions=None)
