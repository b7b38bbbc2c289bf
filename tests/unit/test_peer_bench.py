"""Two nodes agree on a bench, or say why not: no sockets, no real time."""

from __future__ import annotations

import msgspec
import pytest

from tests.sim.world import INNER, World
from tunnel.control import Bench, BenchReply
from tunnel.events import BenchAnswer, BenchWanted
from tunnel.peer import Peer

SECRET = bytes(range(16))


def connected() -> World:
    world = World()
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(0.5)
    return world


def events(world: World, name: str, kind: type) -> list[object]:
    return [event for _, event in world.hosts[name].events if isinstance(event, kind)]


def ask(world: World, token: int = 7) -> None:
    world.a.node.bench("b", token, 30, world.now)
    world.pump(world.a)
    world.run(0.5)


def change(world: World, name: str, **fields: object) -> Peer:
    """Alter the peer's configuration at a host."""
    peer = world.peer(name)
    peer.config = msgspec.structs.replace(peer.config, **fields)
    peer._benches._config = peer.config
    return peer


def test_asked_served_and_answered_once() -> None:
    world = connected()
    ask(world)
    assert events(world, "b", BenchWanted) == [BenchWanted("a", 7, INNER["b"], (INNER["a"],), 30)]
    world.b.node.bench_served("a", 7, 4000, SECRET, "", world.now)
    world.b.node.bench_served("a", 7, 4001, SECRET, "", world.now)  # nobody asked twice
    world.b.node.bench_served("a", 8, 4002, SECRET, "", world.now)  # nor for that
    world.pump(world.b)
    world.run(0.5)
    assert events(world, "a", BenchAnswer) == [BenchAnswer("b", 7, INNER["b"], 4000, SECRET)]


def test_what_the_shell_says_is_passed_on() -> None:
    world = connected()
    ask(world)
    world.b.node.bench_served("a", 7, 0, b"", "no sockets left", world.now)
    world.pump(world.b)
    world.run(0.5)
    (answer,) = events(world, "a", BenchAnswer)
    assert isinstance(answer, BenchAnswer)
    assert (answer.port, answer.problem) == (0, "peer b refuses: no sockets left")


def problem(world: World) -> str:
    ask(world)
    assert not events(world, "b", BenchWanted)
    (answer,) = events(world, "a", BenchAnswer)
    assert isinstance(answer, BenchAnswer)
    return answer.problem


def test_switched_off() -> None:
    world = connected()
    change(world, "b", bench=False)
    assert problem(world) == "peer b refuses: benches are off there (bench = false)"


def test_a_peer_that_knows_no_bench_is_not_asked() -> None:
    world = connected()
    session = world.peer("a").session
    assert session is not None
    assert session.hello is not None
    session.hello = msgspec.structs.replace(session.hello, features=("copies",))
    assert problem(world) == "the martlet of peer b is too old: it knows no bench"


def test_not_up() -> None:
    world = World()
    world.boot("a")
    world.run(0.5)
    world.a.node.bench("b", 7, 30, world.now)
    world.pump(world.a)
    (answer,) = events(world, "a", BenchAnswer)
    assert isinstance(answer, BenchAnswer)
    assert answer.problem == "peer b is not up, but connecting"


@pytest.mark.parametrize("addresses", [(), ("10.99.0.2",), ("fd88::2",)])
def test_no_address_in_common(addresses: tuple[str, ...]) -> None:
    world = connected()
    session = world.peer("a").session
    assert session is not None
    assert session.hello is not None
    session.hello = msgspec.structs.replace(session.hello, addresses=addresses)
    assert "has no address inside the tunnel that is in its allowed_ips here" in problem(world)


def test_an_asker_whose_addresses_are_not_its_own_here() -> None:
    world = connected()
    session = world.peer("b").session
    assert session is not None
    assert session.hello is not None
    session.hello = msgspec.structs.replace(session.hello, addresses=("10.88.0.77",))
    assert problem(world).endswith("this host has no address that is in allowed_ips there")


def test_an_address_that_is_not_the_servers() -> None:
    world = connected()
    session = world.peer("a").session
    assert session is not None
    session.say(Bench(token=1, address="10.88.0.99", seconds=5))
    session.say(BenchReply(token=1, port=1, secret=SECRET))  # an answer that nobody waits for
    world.pump(world.a)
    world.run(0.5)
    assert not events(world, "b", BenchWanted)
    assert not events(world, "b", BenchAnswer)
    assert world.both_up
