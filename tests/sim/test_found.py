"""Peers without an endpoint that are found meanwhile: hints that say where to dial, and no more."""

from __future__ import annotations

import msgspec
import pytest

from tests.sim.test_moves import OWD, a_eth, b_eth
from tests.sim.world import PORT, World
from tunnel.dialling import DIAL_TIMEOUT, MAX_FOUND
from tunnel.path.network import Address
from tunnel.peer import COURTESY_WAIT

NOBODY = Address("192.0.2.99", PORT)


def strangers(seed: int = 1) -> World:
    """Two hosts, reachable but without any endpoint, that have been up for a while."""
    world = World(seed, delay=OWD, a=[a_eth(forwarded=True)], b=[b_eth()])
    (peer,) = world.a.config.peers
    alone = msgspec.structs.replace(peer, endpoint=())
    world.a.config = msgspec.structs.replace(world.a.config, peers=(alone,))
    world.boot()
    world.run(5.0)
    assert not world.both_up
    return world


def where(world: World, name: str) -> Address:
    return Address(world.hosts[name].uplinks[0].public_ip, PORT)


def find(world: World, name: str, addresses: list[Address]) -> None:
    """Tell a host where the other one is."""
    host, other = world.hosts[name], "b" if name == "a" else "a"
    host.node.endpoints_found(other, addresses, world.now)
    world.pump(host)


def open_sessions(world: World, name: str) -> int:
    return sum(session.connection.is_open for session in world.hosts[name].node._owners)


def test_nothing_is_sent_while_there_is_nowhere_to_dial() -> None:
    world = strangers()
    assert world.a.datagrams_sent == world.b.datagrams_sent == 0
    assert world.a.node.get_timer() == world.peer("a").teller.get_timer(), "there is nothing to do"


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_end_finds_the_other(name: str) -> None:
    world = strangers()
    find(world, name, [NOBODY, where(world, "b" if name == "a" else "a")])
    world.run_until(lambda: world.both_up, COURTESY_WAIT + 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_both_ends_find_each_other_and_keep_one_session(seed: int) -> None:
    world = strangers(seed)
    find(world, "a", [where(world, "b")])
    find(world, "b", [where(world, "a")])
    world.run_until(lambda: world.both_up, COURTESY_WAIT + 1.0)
    world.run(5.0)
    assert [open_sessions(world, name) for name in "ab"] == [1, 1]
    assert [world.peer(name).counters["handshakes"] for name in "ab"] == [1, 1]


def test_a_session_that_was_lost_is_dialled_again() -> None:
    world = strangers()
    find(world, "a", [where(world, "b")])
    world.run_until(lambda: world.both_up, COURTESY_WAIT + 1.0)
    world.stop("b")
    world.boot("b")
    world.run_until(lambda: world.both_up and world.peer("a").counters["handshakes"] == 2, 20.0)


def test_no_more_than_a_few_are_dialled() -> None:
    world = strangers()
    dialled: set[str] = set()
    world.tap = lambda host, key, data: dialled.add(key.remote.host)
    find(world, "a", [Address(f"192.0.2.{n}", PORT) for n in range(1, 100)])
    world.run(3 * DIAL_TIMEOUT)
    assert dialled == {f"192.0.2.{n}" for n in range(1, MAX_FOUND + 1)}


@pytest.mark.parametrize("how", ["gone", "elsewhere"])
def test_what_was_found_is_forgotten(how: str) -> None:
    """When it is not announced any more, and when this host is on another network."""
    world = strangers()
    find(world, "a", [NOBODY])
    world.run(1.0)
    if how == "gone":
        find(world, "a", [])
    else:
        world.readdress("a", world.a.uplinks[0], "192.168.9.99")
    world.run(2 * DIAL_TIMEOUT)
    sent = world.a.datagrams_sent
    assert sent
    world.run(60.0)
    assert world.a.datagrams_sent == sent


def test_the_same_network_told_again_changes_nothing() -> None:
    world = strangers()
    find(world, "a", [where(world, "b")])
    world.network_event("a")
    world.run_until(lambda: world.both_up, COURTESY_WAIT + 1.0)
