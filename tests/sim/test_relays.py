"""Relayed paths under a session: the last resort, always at hand, and left as soon as may be.

::

    a --- [NAT] 203.0.113.1 ---+                  +--- 198.51.100.1 [forwarded] --- b
      \\                        |   the network    |
       +--- 192.0.2.200 -------+  (TURN server)   +------- 192.0.2.201 (where b has a relay)
"""

from __future__ import annotations

import pytest

from tests.sim.test_moves import a_eth, a_wlan, b_eth, running
from tests.sim.test_roaming import moves, warm
from tests.sim.world import PORT, World
from tunnel.events import PeerHolding
from tunnel.ice.candidate import Kind, Relay
from tunnel.ledger import Trigger
from tunnel.path.network import Address, PathKey

OURS, THEIRS = Address("192.0.2.200", 50000), Address("192.0.2.201", 50000)


def relayed(world: World, name: str) -> bool:
    return OURS in world.active(name) or THEIRS in world.active(name)


def kinds(world: World, name: str) -> dict[PathKey, Kind]:
    return {pair.key: pair.kind for pair in world.peer(name).roaming.agent.pairs()}


def held(world: World, name: str) -> bool:
    return any(isinstance(event, PeerHolding) for _, event in world.hosts[name].events)


def test_it_is_found_and_kept_warm_and_not_used() -> None:
    pair = running(a=[a_eth()], b=[b_eth()], warm=0.0)
    world = pair.world
    world.relay("a", world.a.uplinks[0], OURS)
    world.run(5.0)
    for name in "ab":
        assert not relayed(world, name)
        found = [key for key in warm(world, name) if OURS in key]
        assert len(found) == 1
        assert all(kinds(world, name)[key] is Kind.RELAY for key in found)
        assert world.peer(name).roaming.second == found[0]  # there is no other
    assert moves(world, "a") == moves(world, "b") == []


@pytest.mark.parametrize("owner", ["a", "b"])
def test_when_direct_dies_it_serves_and_when_direct_lives_it_does_not(owner: str) -> None:
    pair = running(a=[a_eth()], b=[b_eth()], warm=0.0)
    world = pair.world
    address = OURS if owner == "a" else THEIRS
    world.relay(owner, world.hosts[owner].uplinks[0], address)
    world.run(5.0)
    world.direct = False
    took = world.run_until(lambda: relayed(world, "a") and relayed(world, "b"), 3.0)
    assert took < 1.0
    world.run(5.0)
    assert relayed(world, "a") and relayed(world, "b")
    world.direct = True
    world.run_until(lambda: not relayed(world, "a") and not relayed(world, "b"), 20.0)
    assert any("direct, not relayed" in world.peer(n).roaming.moved_because for n in "ab")
    assert not held(world, "a") and not held(world, "b")
    assert world.both_up
    assert world.peer("a").counters["handshakes"] == world.peer("b").counters["handshakes"] == 1


def test_a_peer_is_dialled_from_a_relay_where_nothing_else_gets_there() -> None:
    world = World(a=[a_eth()], b=[b_eth()])
    world.direct = False
    world.boot()
    world.run(1.0)
    assert not world.both_up
    world.relay("a", world.a.uplinks[0], OURS)
    took = world.run_until(lambda: world.both_up, 3.0)
    assert took < 1.0
    assert relayed(world, "a") and relayed(world, "b")


def test_a_relay_that_is_lost_is_left_at_once_for_another() -> None:
    world = World(a=[a_eth()], b=[b_eth()])
    world.direct = False
    world.boot()
    world.relay("a", world.a.uplinks[0], OURS)
    world.run_until(lambda: world.both_up, 3.0)
    other = Address("192.0.2.202", 50001)
    world.relay("a", world.a.uplinks[0], other)
    world.run(3.0)
    assert world.active("a").local == OURS
    world.unrelay("a", OURS)
    assert world.active("a").local == other
    last = moves(world, "a")[-1]
    assert last.trigger is Trigger.ADDRESS_GONE
    assert world.peer("a").roaming.moved_because == f"the relay {OURS} is gone"
    world.run(1.0)
    assert world.both_up and world.active("b").remote == other


def test_without_any_other_way_the_loss_of_a_relay_is_survived() -> None:
    """The server was restarted; the next allocation comes a second later."""
    world = World(a=[a_eth()], b=[b_eth()])
    world.direct = False
    world.boot()
    world.relay("a", world.a.uplinks[0], OURS)
    world.run_until(lambda: world.both_up, 3.0)
    world.run(3.0)
    world.unrelay("a", OURS)
    world.run(1.5)
    again = Address("192.0.2.200", 50007)
    world.relay("a", world.a.uplinks[0], again)
    world.run_until(lambda: world.both_up and world.active("b").remote == again, 5.0)
    assert world.peer("a").counters["handshakes"] == 1


def test_a_relay_goes_with_its_uplink_and_another_uplink_keeps_its_own() -> None:
    pair = running(a=[a_eth(), a_wlan()], b=[b_eth()], warm=0.0)
    world = pair.world
    eth, wlan = world.a.uplinks
    world.relay("a", eth, OURS)
    world.relay("a", wlan, THEIRS)
    world.run(5.0)
    world.direct = False
    world.run_until(lambda: relayed(world, "a") and relayed(world, "b"), 3.0)
    world.run(3.0)
    used = eth if world.active("a").local == OURS else wlan
    world.link("a", used, up=False)
    assert world.active("a").local == (THEIRS if used is eth else OURS)
    world.run(2.0)
    assert world.both_up and relayed(world, "b")
    assert not held(world, "a")


def test_the_second_path_beside_a_direct_one_leaves_by_another_uplink() -> None:
    """A relay behind the active path's uplink has another address, and would die with it."""
    pair = running(a=[a_eth(), a_wlan()], b=[b_eth()], warm=2.0)
    world = pair.world
    world.relay("a", world.a.uplinks[0], OURS)
    world.run(5.0)
    active, second = world.active("a"), world.peer("a").roaming.second
    assert active.local.host == world.a.uplinks[0].ip
    assert second is not None and second.local.host == world.a.uplinks[1].ip


def test_a_server_that_says_our_own_address_is_a_relay_is_not_believed() -> None:
    pair = running(a=[a_eth()], b=[b_eth()], warm=0.0)
    world = pair.world
    ours = Address(world.a.uplinks[0].ip, PORT)
    before = kinds(world, "a")
    assert ours in world.active("a")
    relay = Relay(ours, world.a.uplinks[0].interface, ours.host, "turn:turn.example", "udp")
    world.a.node.relays_changed((relay,), world.now)
    assert kinds(world, "a") == before
    world.run(5.0)
    assert world.both_up and ours in world.active("a")
    assert Kind.RELAY not in kinds(world, "a").values()
