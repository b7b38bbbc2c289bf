"""A random life of two hosts from one seed: everything that may happen, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.sim.flows import Flow
from tests.sim.world import PORT, Host, Uplink, World
from tunnel.quic.base import MAX_PATHS

EVENTS_EACH = 12  # mean
MAX_QUEUED_BYTES, MAX_QUEUED_PACKETS = 4 << 20, 10240  # of one peer: core/queue.c
PATIENCE = 5.0
"""Seconds after the last event in which both ends must be up, and traffic flow both ways."""
MAX_SESSIONS = 5
"""Of one node: one in use, one being dialled, and some that are still closing."""


class Roam:
    """One random run. `run` raises AssertionError, with the seed, when an invariant breaks."""

    def __init__(self, seed: int, log: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.log = log or (lambda line: None)
        self.world = world = World(
            seed,
            delay=rng.choice([0.001, 0.01, 0.01, 0.05]),
            loss=rng.choice([0.0, 0.0, 0.01, 0.05, 0.2]),
            jitter=rng.choice([0.0, 0.0, 0.002, 0.01]),
            a=self._uplinks(1, forwarded=rng.random() < 0.3),
            b=self._uplinks(2, forwarded=True),
            both_dial=rng.random() < 0.3,
            max_packets_per_key=rng.choice([None, 40, 200]),
        )
        world.mtu = rng.choice([1200, 1280, 1472, 1472])
        self.home = {
            u.interface + h.name: u.public_ip for h in world.hosts.values() for u in h.uplinks
        }
        self.moves = 0
        self.fresh = 0

    def _uplinks(self, net: int, *, forwarded: bool) -> list[Uplink]:
        rng = self.rng
        return [
            Uplink(
                f"eth{number}",
                f"192.168.{net}{number}.10",
                f"203.0.{net}.{number + 1}",
                forwarded=forwarded,
                restricted=rng.random() < 0.6,
                symmetric=rng.random() < 0.3,
                metric=100 * (number + 1),
                delay=rng.choice([0.0, 0.0, 0.005, 0.03]),
            )
            for number in range(rng.choice([1, 2, 2, 3]))
        ]

    def run(self) -> None:
        world, rng = self.world, self.rng
        world.boot()
        flows = [Flow(world, name, spacing=rng.choice([0.01, 0.02, 0.05])) for name in "ab"]
        bulk = Flow(world, rng.choice("ab"), spacing=0.02, size=1420, flow=2)
        for _ in range(rng.randint(EVENTS_EACH // 2, EVENTS_EACH * 3 // 2)):
            world.run(rng.choice([0.0, 0.004, 0.03, 0.2, 0.6, 1.5]))
            self._event()
            self._check()
        self._quiet()
        settled = world.now
        for _ in range(int(PATIENCE / 0.05)):
            world.run(0.05)
            if world.both_up and all(flow.alive(settled) for flow in flows):
                break
        self.log(f"{world.now:.3f} healed after {world.now - settled:.3f} s")
        assert world.both_up, self._why("not up")
        for flow in flows:
            assert flow.alive(settled), self._why(f"nothing flows from {flow.sender}")
        bulk.stop()
        world.run(3.0)
        since = world.now
        world.run(1.0)
        for flow in flows:
            assert flow.alive(since), self._why(f"what flowed from {flow.sender} stopped again")
            assert not flow.duplicated, self._why(
                f"{flow.duplicated} duplicates from {flow.sender}"
            )
        assert not bulk.duplicated, self._why("duplicates in bulk")
        self._check()

    # events

    def _event(self) -> None:
        rng, world = self.rng, self.world
        host = world.hosts[rng.choice("ab")]
        uplink = rng.choice(host.uplinks)
        kinds: list[tuple[str, Callable[[], object]]] = [
            ("rebind port", lambda: world.rebind(uplink)),
            ("rebind port", lambda: world.rebind(uplink)),
            ("rebind address", lambda: world.rebind(uplink, public_ip=self._address(host))),
            ("rebind both ends", self._rebind_both),
            ("readdress", lambda: self._readdress(host, uplink)),
            ("readdress both", self._readdress_both),
            ("link", lambda: world.link(host.name, uplink, up=not uplink.up)),
            ("link unseen", lambda: setattr(uplink, "up", not uplink.up)),
            ("black hole", lambda: setattr(uplink, "black_hole", not uplink.black_hole)),
            ("metric", lambda: self._metric(host, uplink)),
            ("nat forgets", uplink.forget),
            ("mtu", lambda: setattr(world, "mtu", rng.choice([1200, 1280, 1472]))),
            ("suspend", lambda: self._suspend(host)),
            ("restart", lambda: self._restart(host)),
            ("weather", self._weather),
            ("burst of rebindings", lambda: self._burst(uplink)),
        ]
        kind, act = rng.choice(kinds)
        self.moves += 1
        self.log(f"{world.now:.3f} {host.name} {uplink.interface}: {kind}")
        act()

    def _address(self, host: Host) -> str:
        self.fresh += 1
        return f"203.9.{1 if host.name == 'a' else 2}.{self.fresh}"

    def _rebind_both(self) -> None:
        for host in self.world.hosts.values():
            self.world.rebind(self.rng.choice(host.uplinks))

    def _readdress(self, host: Host, uplink: Uplink) -> None:
        self.fresh += 1
        self.world.readdress(host.name, uplink, f"10.{uplink.interface[-1]}.0.{self.fresh}")

    def _readdress_both(self) -> None:
        for host in self.world.hosts.values():
            self._readdress(host, self.rng.choice(host.uplinks))

    def _metric(self, host: Host, uplink: Uplink) -> None:
        uplink.metric = self.rng.choice([10, 50, 150, 500])
        self.world.network_event(host.name)

    def _suspend(self, host: Host) -> None:
        if not host.stopped:
            self.world.suspend(host.name)
            node = host.node
            self.world.after(
                self.rng.choice([0.1, 2.0, 30.0]),
                lambda: self.world.resume(host.name) if host.node is node else None,
            )

    def _restart(self, host: Host) -> None:
        self.world.boot(host.name)

    def _weather(self) -> None:
        world, rng = self.world, self.rng
        world.loss = rng.choice([0.0, 0.02, 0.3, 0.8])
        world.jitter = rng.choice([0.0, 0.005, 0.02])

    def _burst(self, uplink: Uplink) -> None:
        for number in range(6):
            self.world.after(number * 0.015, lambda: self.world.rebind(uplink))

    def _quiet(self) -> None:
        """From here on at least one pair of paths works, and nothing changes any more."""
        world, rng = self.world, self.rng
        world.run(0.1)
        world.loss = min(world.loss, 0.05)
        for host in world.hosts.values():
            chosen = rng.choice(host.uplinks)
            for uplink in host.uplinks:
                good = uplink is chosen or rng.random() < 0.5
                uplink.up = good or rng.random() < 0.5
                uplink.black_hole = not good
                if good:
                    uplink.public_ip = self.home[uplink.interface + host.name]
                    if uplink.forwarded:
                        uplink.forget()
            if host.stopped:
                world.resume(host.name)
            world.network_event(host.name)
        self.log(f"{world.now:.3f} quiet")

    # invariants

    def _check(self) -> None:
        for name, host in self.world.hosts.items():
            node, peer = host.node, self.world.peer(name)
            assert len(node._owners) <= MAX_SESSIONS, self._why(f"{len(node._owners)} sessions")
            kept = sum(1 for session in node._owners if session.connection.is_open)
            assert kept <= 2, self._why(f"{kept} open sessions at {name}")
            if peer.session is not None:
                assert len(peer.session.connection.paths()) <= MAX_PATHS, self._why("paths")
                assert len(node._by_cid) <= 16 * MAX_SESSIONS, self._why("connection IDs")
            assert peer.lane.queue_bytes <= MAX_QUEUED_BYTES, self._why("queue bytes")
            assert peer.lane.queue_packets <= MAX_QUEUED_PACKETS, self._why("queue packets")

    def _why(self, what: str) -> str:
        world = self.world
        state = {name: world.state(name) for name in "ab"}
        return (
            f"seed {self.seed}: {what} ({state}, port {PORT}); "
            f"python -m tests.sim.replay {self.seed}"
        )
