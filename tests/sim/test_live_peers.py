"""A node takes a further peer while it runs: nobody else notices."""

from __future__ import annotations

import random
from ipaddress import ip_interface

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.sim.test_moves import OWD, Pair, running
from tests.sim.world import PORT, STUN, Host, Uplink, World
from tunnel.config import Config, loads
from tunnel.identity import Identity
from tunnel.node import Node
from tunnel.path.network import Address

INNER = "10.88.7.3"


def newcomer(world: World, *, forwarded: bool = False) -> Host:
    """A host c, which knows a and is known to nobody yet."""
    host = world.hosts["c"] = Host(
        "c", [Uplink("eth0", "192.168.3.10", "192.0.2.3", forwarded=forwarded)]
    )
    host.identity = Identity(Ed25519PrivateKey.from_private_bytes(world.rng.randbytes(32)))
    host.config = config(host, world.a, "10.88.0.1/32", inner=f"{INNER}/32")
    return host


def config(
    host: Host,
    other: Host,
    allowed: str,
    *,
    inner: str = "10.88.0.1/24",
    endpoint: str = "",
    more: str = "",
) -> Config:
    line = f'endpoint = "{endpoint}"' if endpoint else ""
    return loads(
        f"""
[interface]
name = "mt{host.name}"
address = ["{inner}"]
private_key = "/dev/null"
listen_port = {PORT}
[[peer]]
name = "{other.name}"
public_key = "{other.identity.public_key.openssh}"
allowed_ips = ["{allowed}"]
{line}
{more}""",
        "simulated.toml",
    )


def boot(world: World, host: Host) -> None:
    host.stopped = False
    host.node = Node(
        host.config, host.identity, rng=random.Random(world.seed), boot_id=world.rng.randbytes(16)
    )
    host.node.network_changed(host.network(), PORT, world.now)
    world.pump(host)


def add(world: World, host: Host, other: Host, allowed: str, **more: str) -> None:
    (peer,) = config(host, other, allowed, **more).peers
    host.node.add_peer(peer, world.now)
    world.pump(host)


def state(host: Host, peer: str) -> str:
    return host.node.peers[peer].state


def from_c(number: int) -> bytes:
    """A packet of c to a."""
    inner = bytes(map(int, INNER.split(".")))
    head = bytes([0x45, 0, 0, 36]) + bytes(4) + bytes([64, 17, 0, 0]) + inner
    body = bytes([10, 88, 0, 1]) + (7001).to_bytes(2) + (6000).to_bytes(2) + (16).to_bytes(2)
    return head + body + bytes(2) + number.to_bytes(8)


def undisturbed(pair: Pair, since: float) -> None:
    """Neither lost nor late is anything of the flows that were there before."""
    for flow in (pair.from_a, pair.from_b):
        assert flow.lost(since=since - 0.5, until=pair.world.now - 0.3) == []
        assert flow.silence(since) < 0.002
    pair.finish()
    assert pair.world.hosts["a"].node.status(pair.world.now)["peers"][0]["migrations"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_peer_that_dials_us_is_let_in_as_soon_as_it_is_known(seed: int) -> None:
    pair = running(seed)
    world = pair.world
    world.a.uplinks[0].restricted = False  # c knows where a is seen
    outside = world.a.uplinks[0].outside(Address("192.0.2.9", 9), world.now)
    host = newcomer(world)
    host.config = config(host, world.a, "10.88.0.1/32", inner=f"{INNER}/32", endpoint=str(outside))
    boot(world, host)
    world.run(4)
    assert state(host, "a") == "connecting"
    begin = world.now
    add(world, world.a, host, f"{INNER}/32")
    world.run_until(lambda: state(host, "a") == state(world.a, "c") == "up", 10.0)
    world.send("c", from_c(1))
    world.run(0.5)
    assert from_c(1) in [packet for _, packet in world.a.received]
    undisturbed(pair, begin)


def test_a_peer_with_an_endpoint_is_dialled_at_once() -> None:
    pair = running()
    world = pair.world
    host = newcomer(world, forwarded=True)
    boot(world, host)
    world.run(1)
    begin = world.now
    add(world, world.a, host, f"{INNER}/32", endpoint=f"192.0.2.3:{PORT}")
    took = world.run_until(lambda: state(host, "a") == state(world.a, "c") == "up", 3.0)
    assert took < 1 + 10 * OWD
    world.run(1)
    undisturbed(pair, begin)


def test_paths_inside_the_newcomers_networks_are_left() -> None:
    """What is routed into the tunnel now is no place to seek any peer."""
    pair = running(b=[
        Uplink("eth0", "192.168.2.10", "198.51.100.1", forwarded=True),
        Uplink("wlan0", "192.168.7.10", "198.51.100.2", forwarded=True, metric=600),
    ])  # fmt: skip
    world = pair.world
    agent = world.peer("a").roaming.agent
    assert "198.51.100.2" in {found.key.remote.host for found in agent.pairs()}
    add(world, world.a, newcomer(world), "198.51.100.2/32")
    assert {found.key.remote.host for found in agent.pairs()} == {"198.51.100.1", "192.168.2.10",
                                                                   "192.168.7.10"}  # fmt: skip
    world.run(1)
    assert "198.51.100.2" not in {found.key.remote.host for found in agent.pairs()}
    pair.finish()


def test_before_the_network_is_known() -> None:
    world = World()
    host = newcomer(world)
    world.a.node = Node(world.a.config, world.a.identity, rng=random.Random(1), boot_id=bytes(16))
    world.a.node.add_addresses([ip_interface("fd88::1/128")])
    (peer,) = config(world.a, host, "fd88::3/128").peers
    world.a.node.add_peer(peer, world.now)
    world.a.node.network_changed(world.a.network(), PORT, world.now)
    assert [peer["name"] for peer in world.a.node.status(world.now)["peers"]] == ["b", "c"]
    assert world.a.node.peers["c"]._hello.addresses == ("10.88.0.1", "fd88::1")


def test_a_peer_that_is_removed_is_told_and_stays_outside() -> None:
    pair = running()
    world = pair.world
    host = newcomer(world, forwarded=True)
    boot(world, host)
    add(world, world.a, host, f"{INNER}/32", endpoint=f"192.0.2.3:{PORT}")
    world.run_until(lambda: state(host, "a") == state(world.a, "c") == "up", 3.0)
    begin = world.now
    events = len(world.a.events)
    world.a.node.remove_peer("c", world.now)
    world.pump(world.a)
    world.run_until(lambda: state(host, "a") == "connecting", 1.0)  # 3 PTO (RFC 9000 10.2.2)
    received = len(world.a.received)
    world.send("c", from_c(1))
    world.run(30)
    assert [peer["name"] for peer in world.a.node.status(world.now)["peers"]] == ["b"]
    assert state(host, "a") == "connecting"
    assert all(packet[12:16] != from_c(1)[12:16] for _, packet in world.a.received[received:])
    named = {getattr(event, "peer", None) for _, event in world.a.events[events:]}
    assert "c" not in named
    assert [owner for owner in world.a.node._owners.values() if owner is not world.peer("a")] == []
    undisturbed(pair, begin)


@pytest.mark.parametrize("back", [0.0, 5.0])
def test_a_peer_that_was_removed_may_come_back(back: float) -> None:
    pair = running()
    world = pair.world
    host = newcomer(world, forwarded=True)
    boot(world, host)
    add(world, world.a, host, f"{INNER}/32", endpoint=f"192.0.2.3:{PORT}")
    world.run_until(lambda: state(host, "a") == state(world.a, "c") == "up", 3.0)
    world.a.node.remove_peer("c", world.now)
    world.pump(world.a)
    world.run(back)
    world.a.node.endpoints_resolved("c", [Address("192.0.2.3", PORT)], world.now)  # too late
    add(world, world.a, host, "10.88.7.0/24", endpoint=f"192.0.2.3:{PORT}")
    world.run_until(lambda: state(world.a, "c") == "up", 10.0)
    world.send("c", from_c(2))
    world.run(0.5)
    assert from_c(2) in [packet for _, packet in world.a.received]
    pair.finish()


def test_a_peer_that_must_be_found_by_the_broker() -> None:
    """Nobody has an endpoint, all are behind NATs; when it is removed, it is not even answered."""
    pair = running(rendezvous=True, b=[Uplink("eth0", "192.168.2.10", "198.51.100.1")])
    world = pair.world
    host = newcomer(world)
    more = f'[rendezvous]\nurl = "mqtt://192.0.2.80"\n[ice]\nstun = ["{STUN}"]\n'
    host.config = config(host, world.a, "10.88.0.1/32", inner=f"{INNER}/32", more=more)
    boot(world, host)
    world.reach_broker("c")
    world.run(2)
    begin = world.now
    add(world, world.a, host, f"{INNER}/32")
    world.run_until(lambda: state(host, "a") == state(world.a, "c") == "up", 3.0)
    undisturbed(pair, begin)
    world.a.node.remove_peer("c", world.now)
    world.pump(world.a)
    world.run(3)
    said = world.a.signals_sent
    asked = host.signals_sent
    world.run(60)
    assert state(host, "a") == "connecting"
    assert host.signals_sent > asked
    assert world.a.signals_sent == said
