"""A random life of two hosts from one seed: everything that may happen, in any order.

Then it is quiet: some uplinks work, the others do not, and nothing changes any more. The tunnel has
to heal, to come to rest, and to find itself a second path where the network has one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.sim.flows import Flow
from tests.sim.world import PORT, Host, Uplink, World
from tunnel.events import PeerRefused
from tunnel.quic.base import MAX_PATHS

EVENTS_EACH = 24  # mean
MAX_QUEUED_BYTES, MAX_QUEUED_PACKETS = 4 << 20, 10240  # of one peer: core/queue.c
MAX_UPLINKS = 4
PATIENCE = 5.0
"""Seconds after the last event in which both ends must be up, and traffic flow both ways."""
UNREST, REST = 5.0, 10.0
"""Seconds after the last event in which the ends may move as they like, and after those, in which
each may move `RESTLESS` times at most."""
RESTLESS = 2
SECOND_WITHIN = 75.0
"""Seconds in which a second path must be found: what failed is tried again after one minute."""
EXCUSES = {"no Hello in time", "no answer", "closed"}
"""Why a session may fail: its path died before it was up."""
MAX_SESSIONS = 5
"""Of one node: one in use, one being dialled, and some that are still closing."""
COPY_RATE, COPY_BURST = 32000, 32000
"""Bytes of IP packets a second, and at once, that go two ways by default: MT_REDUNDANCY."""
COPY_OVERHEAD = 40
"""Bytes of a copy beside its IP packet, at most."""


class Roam:
    """One random run. `run` raises AssertionError, with the seed, when an invariant breaks."""

    def __init__(self, seed: int, log: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.log = log or (lambda line: None)
        self.metered = rng.choice([(), (), ("a1",), ("b0",), ("a0", "b1")])
        self.redundancy = rng.choice(["off", "interactive", "interactive", "all"])
        self.world = world = World(
            seed,
            delay=rng.choice([0.001, 0.01, 0.01, 0.05]),
            loss=rng.choice([0.0, 0.0, 0.01, 0.05, 0.2]),
            jitter=rng.choice([0.0, 0.0, 0.002, 0.01]),
            a=[self._uplink("a", n, forwarded=False) for n in range(rng.choice([1, 2, 2, 3]))],
            b=[self._uplink("b", n, forwarded=True) for n in range(rng.choice([1, 2, 2, 3]))],
            both_dial=rng.random() < 0.3,
            max_packets_per_key=rng.choice([None, 40, 200]),
            redundancy=self.redundancy,
            metered=self.metered,
        )
        world.mtu = rng.choice([1200, 1280, 1472, 1472])
        self.home = {u.interface: u.public_ip for h in world.hosts.values() for u in h.uplinks}
        self.known = {u.public_ip for u in world.b.uplinks}
        """What a's configuration names."""
        self.moves = 0
        self.fresh = 0

    def _uplink(self, name: str, number: int, *, forwarded: bool) -> Uplink:
        rng, net = self.rng, 1 if name == "a" else 2
        return Uplink(
            f"{name}{number}",
            f"192.168.{net}{number}.10",
            f"203.0.{net}.{number + 1}",
            forwarded=forwarded or rng.random() < 0.15,
            restricted=rng.random() < 0.6,
            symmetric=rng.random() < 0.3,
            metric=100 * (number + 1),
            delay=rng.choice([0.0, 0.0, 0.005, 0.03]),
        )

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
        bulk.spacing = 0.01
        world.run(max(0.0, settled + UNREST - 2.0 - world.now))
        self._within_budget(2.0)
        bulk.stop()
        for flow in flows:
            flow.spacing = 0.1
        rested = world.now
        world.run(REST)
        for flow in flows:
            assert flow.alive(world.now - 1.0), self._why(f"silence from {flow.sender} again")
        for name in world.hosts:
            moves = [m for m in world.peer(name)._ledger.records() if m.switched >= rested]
            assert len(moves) <= RESTLESS, self._why(f"{name} moved {len(moves)} times in quiet")
        self._find_seconds()
        for flow in [*flows, bulk]:
            assert not flow.duplicated, self._why(
                f"{flow.duplicated} duplicates from {flow.sender}"
            )
        self._check()
        self._check_books()

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
            ("black hole outward", lambda: setattr(uplink, "mute", not uplink.mute)),
            ("black hole inward", lambda: setattr(uplink, "deaf", not uplink.deaf)),
            ("dead port", lambda: self._dead_port(host, uplink)),
            ("delay", lambda: setattr(uplink, "delay", rng.choice([0.0, 0.002, 0.03, 0.15]))),
            ("loss", lambda: self._loss_burst(uplink)),
            ("metric", lambda: self._metric(host, uplink)),
            ("metric", lambda: self._metric(host, uplink)),
            ("new uplink", lambda: self._new_uplink(host)),
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

    def _new_uplink(self, host: Host) -> None:
        if len(host.uplinks) < MAX_UPLINKS:
            uplink = self._uplink(host.name, len(host.uplinks), forwarded=False)
            self.home[uplink.interface] = uplink.public_ip
            host.uplinks.append(uplink)
            self.world.network_event(host.name)

    def _dead_port(self, host: Host, uplink: Uplink) -> None:
        """The mapping that is in use is stuck, or all that were are free again."""
        if uplink.dead_ports and self.rng.random() < 0.5:
            uplink.dead_ports.clear()
            return
        session = self.world.peer(host.name).session
        local = session.active.local if session is not None else None
        uplink.dead_ports.add(local.port if local and local.host == uplink.ip else PORT)

    def _loss_burst(self, uplink: Uplink) -> None:
        uplink.loss = self.rng.choice([0.1, 0.3, 0.7])
        self.world.after(self.rng.choice([0.05, 0.5, 3.0]), lambda: setattr(uplink, "loss", 0.0))

    def _suspend(self, host: Host) -> None:
        if not host.stopped:
            self.world.suspend(host.name)
            node = host.node
            self.world.after(
                self.rng.choice([0.1, 2.0, 30.0]),
                lambda: (
                    self.world.resume(host.name) if host.stopped and host.node is node else None
                ),
            )

    def _restart(self, host: Host) -> None:
        self._check_books()
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
        self.good: dict[str, list[Uplink]] = {}
        for name, host in world.hosts.items():
            # An uplink of b that came late may be one that a cannot know of.
            chosen = rng.choice([u for u in host.uplinks if name == "a" or self._named(u)])
            for uplink in host.uplinks:
                good = uplink is chosen or rng.random() < 0.5
                uplink.up = good or rng.random() < 0.5
                uplink.black_hole = uplink.mute = uplink.deaf = False
                uplink.loss = 0.0
                uplink.dead_ports.clear()
                if good:
                    uplink.public_ip = self.home[uplink.interface]
                    if uplink.forwarded:
                        uplink.forget()
                else:
                    setattr(uplink, rng.choice(["black_hole", "black_hole", "mute", "deaf"]), True)
                    self.log(f"{world.now:.3f} {uplink.interface} stays dead")
            self.good[name] = [u for u in host.uplinks if not (u.black_hole or u.mute or u.deaf)]
            if host.stopped:
                world.resume(host.name)
            world.network_event(host.name)
        self.log(f"{world.now:.3f} quiet")

    def _named(self, uplink: Uplink) -> bool:
        return uplink.forwarded and self.home[uplink.interface] in self.known

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
                status = peer.status(self.world.now)
                active = [row for row in status["paths"] if row["active"]]
                assert len(active) == 1, self._why(f"{len(active)} active paths at {name}")
                told = [line for line in status["why"] if ">" in line]
                assert len(told) >= len(peer.roaming.facts(self.world.now)), self._why("why")
            assert peer.lane.queue_bytes <= MAX_QUEUED_BYTES, self._why("queue bytes")
            assert peer.lane.queue_packets <= MAX_QUEUED_PACKETS, self._why("queue packets")
            for _, event in host.events:
                # Neither end says anything that the other does not understand.
                if isinstance(event, PeerRefused):
                    assert event.reason in EXCUSES, self._why(f"{name}: {event}")

    def _check_books(self) -> None:
        """What the ledgers say is possible."""
        for name in self.world.hosts:
            for move in self.world.peer(name)._ledger.records():
                what = self._why(f"{name} wrote {move}")
                assert move.at <= move.detected <= move.switched <= self.world.now, what
                assert move.confirmed is None or move.switched <= move.confirmed, what
                assert min(move.lost, move.replayed, move.duplicates) >= 0, what
                assert move.from_path != move.to_path or move.trigger == "restart", what

    def _within_budget(self, seconds: float) -> None:
        """Run on; copies of sparse flows stay within their rate, unless there was a race."""
        world = self.world
        before = {name: self._copies(name) for name in world.hosts}
        world.run(seconds)
        for name in world.hosts:
            (doubts, packets, size), (doubts_now, packets_now, size_now) = (
                before[name],
                self._copies(name),
            )
            if self.redundancy == "all" or doubts_now is None or doubts != doubts_now:
                continue
            copied = size_now - size - COPY_OVERHEAD * (packets_now - packets)
            allowed = 0.0 if self.redundancy == "off" else COPY_RATE * seconds + COPY_BURST
            assert copied <= allowed, self._why(f"{name} sent {copied} bytes of copies")

    def _copies(self, name: str) -> tuple[object, int, int]:
        """What tells one time without a race from another; copies sent, and their bytes."""
        peer = self.world.peer(name)
        if peer.session is None or peer.roaming.suspect or peer.session.connection.settling:
            return None, 0, 0
        counters = peer.session.connection.counters
        calm = (peer.session, peer.roaming.counters["suspicions"], len(peer._ledger))
        return calm, counters["redundant_packets"], counters["redundant_bytes"]

    def _find_seconds(self) -> None:
        """Both ends have a second path at hand, where the network has one that may serve."""
        world = self.world
        for _ in range(int(SECOND_WITHIN)):
            missing = [
                name
                for name in world.hosts
                if world.peer(name).roaming.second is None and self._has_second(name)
            ]
            if not missing:
                return
            world.run(1.0)
        raise AssertionError(self._why(f"no second path at {missing}"))

    def _has_second(self, name: str) -> bool:
        world = self.world
        session = world.peer(name).session
        if session is None:
            return True
        active = session.active
        mine, other = (self.good["a"], self.good["b"])
        usable = [
            (a, b)
            for a in mine
            for b in other
            if self._named(b)
            and (self.redundancy == "all" or not {a.interface, b.interface} & set(self.metered))
        ]
        ends = {active.local.host, active.remote.host}
        return any(
            not ({a.ip, a.public_ip} & ends and {b.ip, b.public_ip} & ends) for a, b in usable
        )

    def _why(self, what: str) -> str:
        world = self.world
        state = {name: world.state(name) for name in "ab"}
        return (
            f"seed {self.seed}: {what} ({state}, port {PORT}); "
            f"python -m tests.sim.replay {self.seed}"
        )
