"""Which peer gets an attempt, and when, if there are several: with agents that only say so."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import cast

from tunnel.events import NodeEvent, PortUnwanted, PortWanted
from tunnel.ice.agent import Agent
from tunnel.ice.birthday import LASTS, PAUSE_FIRST, SOCKETS
from tunnel.ice.gather import Nat
from tunnel.path.network import Address, PathKey
from tunnel.probing import LATE, PATIENCE, SILENT, Probing

BASE = Address("192.168.1.10", 4117)
EASY, HARD = Nat(BASE, False), Nat(BASE, True)
START = 1000.0


class Peer:
    """What is asked of an agent."""

    running = True
    peer_boot = "boot"

    def __init__(self, host: str, *, hard: bool) -> None:
        self.peer_hard = hard
        self.peer_outside = [Address(host, 40000)]
        self.heard_at = START + 1e6
        self.direct: set[PathKey] = set()
        self.probed: list[tuple[float, PathKey]] = []
        self.strays: list[PathKey] = []
        self.kept: list[PathKey] = []

    def probe(self, keys: list[PathKey], now: float) -> None:
        self.probed += [(now, key) for key in keys]

    def stray(self) -> PathKey | None:
        return self.strays.pop() if self.strays else None

    def socket_kept(self, key: PathKey, now: float) -> None:
        self.kept.append(key)

    def attempts(self) -> list[float]:
        """When each began."""
        times = [at for at, _ in self.probed]
        return [at for before, at in zip([0.0, *times], times, strict=False) if at - before > LASTS]


class Driver:
    """Polls when it is time, opens what is wanted."""

    def __init__(self, nat: Nat, **peers: Peer) -> None:
        self.events: list[NodeEvent] = []
        self.kept: list[Address] = []
        self.nat = nat
        self.peers = peers
        self.now = START
        self.ports = iter(range(50000, 60000))
        self.open: set[Address] = set()
        self.probing = Probing(
            rng=random.Random(1),
            emit=self.events.append,
            keep=lambda local, now: self.kept.append(local),
        )

    def poll(self) -> None:
        self.probing.poll(cast(dict[str, Agent], self.peers), self.nat, self.now)
        for event in self._taken():
            if isinstance(event, PortUnwanted):
                self.open.remove(event.local)
            elif isinstance(event, PortWanted):
                assert event.spread and event.ip == BASE.host
                local = Address(event.ip, next(self.ports))
                self.open.add(local)
                self.probing.port_opened(local, self.now)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            self.poll()
            timer = self.probing.get_timer()
            if timer is None or timer > until:
                break
            self.now = max(self.now + 1e-4, timer)
        self.now = until

    def _taken(self) -> Iterator[NodeEvent]:
        while self.events:
            yield self.events.pop(0)


def test_two_peers_one_after_the_other_and_none_is_left_out() -> None:
    one, two = Peer("198.51.100.1", hard=True), Peer("198.51.100.2", hard=True)
    driver = Driver(EASY, one=one, two=two)
    driver.run(PATIENCE + LASTS + 5)
    [began] = one.attempts()
    assert PATIENCE <= began - START <= PATIENCE + 1
    assert not two.attempts(), "the other end has given up by then"
    driver.run(PAUSE_FIRST)
    assert len(two.attempts()) == 1 and len(one.attempts()) == 1, "now it is its turn"


def test_one_that_is_over_soon_makes_room_for_the_next() -> None:
    one, two = Peer("198.51.100.1", hard=True), Peer("198.51.100.2", hard=True)
    driver = Driver(EASY, one=one, two=two)
    driver.run(PATIENCE + LATE / 2)
    one.direct = {PathKey(BASE, Address("198.51.100.1", 1))}
    driver.run(1.0)
    assert two.attempts() and driver.probing.counters["attempts_won"] == 1


def test_the_socket_that_wins_is_kept_and_the_others_closed() -> None:
    peer = Peer("198.51.100.1", hard=False)
    driver = Driver(HARD, peer=peer)
    driver.run(PATIENCE + 5)
    assert len(driver.open) == SOCKETS
    local = sorted(driver.open)[7]
    key = PathKey(local, Address("198.51.100.1", 40000))
    peer.strays = [PathKey(BASE, key.remote)]  # not one of the attempt's
    driver.poll()
    assert not driver.kept
    peer.strays = [key]
    driver.poll()
    assert driver.kept == [local] and peer.kept == [key]
    assert driver.open == {local}
    driver.probing.port_opened(Address(BASE.host, 1), driver.now)  # late
    driver.open.add(Address(BASE.host, 1))
    driver.poll()
    assert driver.open == {local}


def test_all_are_closed_when_the_peer_is_gone() -> None:
    peer = Peer("198.51.100.1", hard=False)
    driver = Driver(HARD, peer=peer)
    driver.run(PATIENCE + 5)
    del driver.peers["peer"]
    driver.poll()
    assert not driver.open and driver.probing.get_timer() is None


def test_who_is_silent_is_not_searched() -> None:
    peer = Peer("198.51.100.1", hard=True)
    peer.heard_at = START - SILENT
    driver = Driver(EASY, peer=peer)
    driver.run(60.0)
    assert not peer.probed and not driver.probing.hopeful


def test_a_clock_that_jumps_far_does_not_spin() -> None:
    peer = Peer("198.51.100.1", hard=True)
    driver = Driver(EASY, peer=peer)
    driver.poll()
    driver.now += 1e5
    driver.poll()
    timer = driver.probing.get_timer()
    assert timer is not None and timer > driver.now and not peer.probed
