"""Two agents on a simulated network: NATs, delay, loss, and a clock that jumps.

::

    end a: uplinks, each behind a NAT ---- the network ---- NATs, uplinks of end b
              |                                                          |
              +----- signalling: lists of candidates, late, out of order, doubled -----+

The NATs are those of `tests.sim.world`. What a STUN server would see is asked of them every 20 s.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from ipaddress import ip_network

from tests.sim.world import PORT, Mapping, Uplink
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import Base
from tunnel.ice.check import Credentials
from tunnel.ice.events import AgentEvent, CandidatesChanged, PairUp
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route

START = 1000.0
STUN = Address("192.0.2.53", 3478)
REFRESH = 20.0  # of what the STUN server sees
EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))
MAX_SPINS = 50


def uplink(name: str, number: int = 1, **more: object) -> Uplink:
    """The uplink of this number of end "a" or "b"."""
    net = {"a": 1, "b": 2}[name] * 10 + number
    outer = {"a": "203.0.113", "b": "198.51.100"}[name]
    return Uplink(f"eth{number}", f"192.168.{net}.2", f"{outer}.{number}", **more)  # type: ignore[arg-type]


def public(name: str, number: int = 1) -> Uplink:
    """One without a NAT."""
    ip = {"a": "203.0.113", "b": "198.51.100"}[name] + f".{number}"
    return Uplink(f"eth{number}", ip, ip, forwarded=True)


def local_network(uplinks: Iterable[Uplink]) -> LocalNetwork:
    live = [u for u in uplinks if u.up]
    return LocalNetwork(
        tuple(LocalAddress(u.ip, u.interface) for u in live),
        tuple(Route(net, u.interface, u.metric) for u in live for net in EVERYWHERE),
    )


def bases_of(uplinks: Iterable[Uplink]) -> list[Base]:
    live = sorted((u for u in uplinks if u.up), key=lambda u: u.metric)
    return [Base(Address(u.ip, PORT), u.interface, False, rank) for rank, u in enumerate(live)]


class End:
    """An agent and its uplinks."""

    def __init__(self, name: str, uplinks: list[Uplink], seed: int) -> None:
        self.name = name
        self.uplinks = uplinks
        self.agent = Agent(rng=random.Random(seed))
        self.events: list[tuple[float, AgentEvent]] = []
        self.armed: float | None = None
        self.fired_at, self.spins = 0.0, 0
        self.bytes_sent = 0

    def ups(self) -> list[tuple[float, PathKey]]:
        return [(at, event.key) for at, event in self.events if isinstance(event, PairUp)]

    def warm(self) -> list[PathKey]:
        return [pair.key for pair in self.agent.pairs() if pair.valid_since is not None]


class Net:
    """Everything between the two ends, and the time."""

    def __init__(
        self, a: list[Uplink], b: list[Uplink], *, seed: int = 1, delay: float = 0.01
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = START
        self.delay = delay
        self.loss = 0.0
        self.signal_delay: Callable[[], float] | None = lambda: self.delay
        """Seconds that a list of candidates takes; None: there is no signalling."""
        self.drop: Callable[[End, PathKey, bytes], bool] | None = None
        self.a, self.b = End("a", a, seed * 2), End("b", b, seed * 2 + 1)
        self.ends = (self.a, self.b)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def start(self) -> None:
        for end, mine, theirs in ((self.a, "a", "b"), (self.b, "b", "a")):
            end.agent.start(
                Credentials(
                    f"ufrag-{mine}" * 2,
                    f"password-{mine}",
                    f"ufrag-{theirs}" * 2,
                    f"password-{theirs}",
                ),
                self.now,
            )
            self.network_event(end)
        self._refresh()

    def other(self, end: End) -> End:
        return self.b if end is self.a else self.a

    # the clock

    def after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), action))

    def run(self, seconds: float) -> None:
        self._until(lambda: False, self.now + seconds)

    def run_until(self, condition: Callable[[], bool], limit: float) -> float:
        """The seconds it took; an AssertionError at `limit`."""
        began = self.now
        assert self._until(condition, began + limit), f"seed {self.seed}: not within {limit} s"
        return self.now - began

    def _until(self, condition: Callable[[], bool], until: float) -> bool:
        while not condition():
            if not self._queue or self._queue[0][0] > until:
                self.now = until
                return condition()
            when, _, action = heapq.heappop(self._queue)
            self.now = max(self.now, when)
            action()
        return True

    # what happens in the network

    def network_event(self, end: End) -> None:
        end.agent.bases_changed(local_network(end.uplinks), bases_of(end.uplinks), self.now)
        self._look(end)
        self.pump(end)

    def rebind(self, link: Uplink) -> None:
        """The NAT forgets everything; its next ports are others."""
        link.forget()
        link.next_port += 7
        if not link.symmetric and not link.forwarded:
            link.mappings[(PORT, None)] = Mapping(link.next_port, self.now)

    def _refresh(self) -> None:
        for end in self.ends:
            self._look(end)
            self.pump(end)
        self.after(REFRESH, self._refresh)

    def _look(self, end: End) -> None:
        """What the STUN server sees, known a moment later."""
        seen = {
            Address(u.ip, PORT): u.outside(STUN, self.now)
            for u in end.uplinks
            if u.up and not u.black_hole
        }

        def known() -> None:
            end.agent.reflexive_changed(seen, self.now)
            self.pump(end)

        self.after(self.delay, known)

    # plumbing

    def pump(self, end: End) -> None:
        for key, data in end.agent.datagrams_to_send(self.now):
            self._depart(end, key, data)
        while (event := end.agent.next_event()) is not None:
            end.events.append((self.now, event))
            if isinstance(event, CandidatesChanged) and self.signal_delay is not None:
                generation, candidates = end.agent.candidates()
                other = self.other(end)

                def tell(g: int = generation, c: object = candidates, other: End = other) -> None:
                    other.agent.remote_candidates(g, c, self.now)  # type: ignore[arg-type]
                    self.pump(other)

                self.after(self.signal_delay(), tell)
        self._arm(end)

    def _arm(self, end: End) -> None:
        timer = end.agent.get_timer()
        if timer is None or timer == end.armed:
            return
        end.armed = timer
        late = timer <= self.now and end.fired_at == self.now

        def fire() -> None:
            if end.armed != timer:
                return
            end.armed = None
            end.fired_at = self.now
            end.spins = end.spins + 1 if late else 0
            assert end.spins < MAX_SPINS, f"seed {self.seed}: the timer of {end.name} spins"
            end.agent.handle_timer(self.now)
            self.pump(end)

        self.after(max(timer - self.now, 0.0), fire)

    def _depart(self, end: End, key: PathKey, data: bytes) -> None:
        link = next((u for u in end.uplinks if u.ip == key.local.host and u.up), None)
        if link is None:
            end.agent.send_failed(key, self.now)
            return
        end.bytes_sent += len(data)
        source = link.outside(key.remote, self.now)
        if link.black_hole or self.rng.random() < self.loss:
            return
        if self.drop is not None and self.drop(end, key, data):
            return
        self.after(self.delay + link.delay, lambda: self._arrive(source, key.remote, data))

    def _arrive(self, source: Address, target: Address, data: bytes) -> None:
        for end in self.ends:
            for link in end.uplinks:
                if link.public_ip != target.host or not link.up or link.black_hole:
                    continue
                if link.lets_in(source, target.port, self.now):
                    self.after(
                        link.delay,
                        lambda end=end, link=link: self._hand_over(  # type: ignore[misc]
                            end, link, source, data
                        ),
                    )

    def _hand_over(self, end: End, link: Uplink, source: Address, data: bytes) -> None:
        if link.up:
            path = PathKey(Address(link.ip, PORT), source)
            end.agent.receive(data, path, self.now)
            self.pump(end)
