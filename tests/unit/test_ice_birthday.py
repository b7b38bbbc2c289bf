"""Birthday probing on a fake clock, through simulated NATs: how often it works, and its cost.

[search] ---- [easy NAT: one port, filters] ---- 20 ms ---- [hard NAT: random ports] ---- [spread]
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from math import sqrt

import pytest

from tunnel.ice.birthday import (
    LASTS,
    PAUSE_FIRST,
    PAUSE_LAST,
    PORTS,
    RATE,
    REFRESH,
    SOCKETS,
    TRIES,
    Behaviour,
    Birthday,
    Role,
    State,
    chance,
    pause,
    role,
)
from tunnel.path.network import Address, PathKey

EASY, EASY_OUTSIDE = Address("10.1.0.2", 4117), Address("203.0.113.1", 40000)
HARD, HARD_OUTSIDE = Address("10.2.0.2", 4117), "198.51.100.1"
SAMPLES = [Address(HARD_OUTSIDE, 50123), Address(HARD_OUTSIDE, 51234)]
"""Where servers saw the hard end."""
UNANSWERED = 30.0  # seconds that Linux keeps an entry without an answer
START = 1000.0


class Table:
    """What a NAT remembers: an outer port for each (local, remote), and who may send in there."""

    def __init__(self, next_port: Callable[[], int], *, by_address: bool = False) -> None:
        self.entries: dict[tuple[Address, Address], tuple[int, float]] = {}
        self._allowed: dict[tuple[int, object], tuple[Address, float]] = {}
        self._next_port = next_port
        self._by_address = by_address

    def out(self, key: PathKey, now: float) -> int:
        port, used = self.entries.get(key, (0, -1e9))
        if now - used > UNANSWERED:
            port = self._next_port()
        self.entries[key] = (port, now)
        self._allowed[port, self._whom(key.remote)] = (key.local, now)
        return port

    def into(self, port: int, source: Address, now: float) -> Address | None:
        local, used = self._allowed.get((port, self._whom(source)), (None, -1e9))
        return local if now - used <= UNANSWERED else None

    def _whom(self, remote: Address) -> object:
        return remote.host if self._by_address else remote


class World:
    """Two attempts, begun `late` seconds apart, and what is between them."""

    def __init__(
        self,
        seed: int,
        *,
        by_address: bool = False,
        sequential: bool = False,
        loss: float = 0.0,
        late: float = 0.1,
        refuse: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = START
        self.loss = loss
        self.refuse = refuse
        count = itertools.count(SAMPLES[-1].port + self.rng.randint(1, 8))
        free = self.rng.sample(PORTS, 4 * SOCKETS)
        self.easy = Table(lambda: EASY_OUTSIDE.port, by_address=by_address)
        self.hard = Table(lambda: next(count) if sequential else free.pop())
        self._late = late
        rng = random.Random(seed + 1)
        self.search = Birthday(Role.SEARCH, EASY, SAMPLES, rng=rng, now=START)
        self.spread = Birthday(Role.SPREAD, HARD, [EASY_OUTSIDE], rng=rng, now=START + late)
        self.ends = {Role.SEARCH: self.search, Role.SPREAD: self.spread}
        self.wins: dict[Role, float] = {}
        self.open: set[Address] = set()
        self.peak_open = 0
        self.sent: list[tuple[float, Role, PathKey]] = []
        self._ports = itertools.count(30000)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), what))

    def run(self, seconds: float = LASTS + 5.0) -> None:
        for which, end in self.ends.items():
            self.after(self._late if which is Role.SPREAD else 0.0, lambda end=end: self.pump(end))  # type: ignore[misc]
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = until

    def pump(self, end: Birthday) -> None:
        for _ in range(end.sockets_wanted(self.now)):
            local = HARD._replace(port=next(self._ports))
            if not self.refuse:
                self.open.add(local)
                self.after(0.001, lambda local=local: self._opened(local))  # type: ignore[misc]
        self.peak_open = max(self.peak_open, len(self.open))
        for key in end.checks(self.now):
            self.sent.append((self.now, end.role, key))
            self.send(end.role, key)
        self.open -= set(end.sockets_unwanted())
        timer = end.get_timer()
        if timer is not None:
            self.after(max(timer - self.now, 0.0005), lambda: self.pump(end))

    def _opened(self, local: Address) -> None:
        self.spread.socket_opened(local, self.now)
        self.pump(self.spread)

    def send(self, sender: Role, key: PathKey, *, answer: bool = False) -> None:
        if sender is Role.SEARCH:
            port, table, host = self.easy.out(key, self.now), self.hard, EASY_OUTSIDE.host
        else:
            port, table, host = self.hard.out(key, self.now), self.easy, HARD_OUTSIDE
        source = Address(host, port)

        def arrive() -> None:
            local = table.into(key.remote.port, source, self.now)
            if local is None or key.remote.host not in (HARD_OUTSIDE, EASY_OUTSIDE.host):
                return
            receiver = Role.SPREAD if sender is Role.SEARCH else Role.SEARCH
            heard = PathKey(local, source)
            self.ends[receiver].heard(heard, self.now)
            self.wins.setdefault(receiver, self.now)
            self.open -= set(self.ends[receiver].sockets_unwanted())
            if not answer:  # a check is answered; of an answer nothing comes
                self.send(receiver, heard, answer=True)

        if self.rng.random() >= self.loss:
            self.after(0.02, arrive)

    @property
    def won(self) -> bool:
        states = {end.state for end in self.ends.values()}
        if State.WON in states:
            assert self.search.winner is not None or self.spread.winner is not None
        return states == {State.WON}


def rate_of_success(runs: int, **options: object) -> tuple[float, list[World]]:
    worlds = []
    for seed in range(runs):
        worlds.append(World(seed, **options))  # type: ignore[arg-type]
        worlds[-1].run()
    return sum(world.won for world in worlds) / runs, worlds


def test_the_formula() -> None:
    assert chance() == pytest.approx(0.871, abs=0.001)
    assert chance(256, 1024) == pytest.approx(0.98, abs=0.005)  # as Tailscale has it
    assert chance(256, 2048) == pytest.approx(0.999, abs=0.001)
    assert chance(1, 1, 10) == pytest.approx(0.1)
    assert chance(5, 5, 10) == pytest.approx(1 - 1 / 252)  # 5 of 10: one way of 252 to miss all
    assert chance(6, 5, 10) == 1.0


def test_success_is_as_likely_as_the_formula_says() -> None:
    runs = 150
    share, worlds = rate_of_success(runs)
    assert abs(share - chance()) < 4 * sqrt(chance() * (1 - chance()) / runs)
    for world in worlds:
        assert world.peak_open <= SOCKETS
        assert len(world.easy.entries) <= TRIES and len(world.hard.entries) <= SOCKETS
        assert len(world.open) == world.won  # the one that won stays, for who takes it over
    winner = next(world for world in worlds if world.won)
    assert winner.search.winner is not None and winner.spread.winner is not None
    assert winner.search.winner.local == EASY
    assert winner.open == {winner.spread.winner.local}
    assert winner.spread.winner.remote == EASY_OUTSIDE


def test_more_tries_and_sockets_succeed_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for sockets, tries in ((16, 256), (64, 512), (128, 1024)):
        monkeypatch.setattr("tunnel.ice.birthday.SOCKETS", sockets)
        monkeypatch.setattr("tunnel.ice.birthday.TRIES", tries)
        share, _ = rate_of_success(60)
        expected = chance(sockets, tries)
        assert abs(share - expected) < 4 * sqrt(expected * (1 - expected) / 60) + 0.02
        shares.append(share)
    assert shares == sorted(shares) and shares[0] < shares[-1] / 2


def test_losses_cost_little() -> None:
    """A try that is lost is lost; a socket's check is sent again."""
    share, _ = rate_of_success(100, loss=0.1)
    expected = chance(SOCKETS, round(TRIES * 0.9))
    assert share > expected - 4 * sqrt(expected * (1 - expected) / 100)


def test_a_filter_by_address_opens_with_the_first_try() -> None:
    for seed in range(20):
        world = World(seed, by_address=True)
        world.run()
        assert world.won
        assert max(world.wins.values()) < START + 1.0
        assert len(world.easy.entries) <= RATE


def test_a_nat_that_counts_is_found_soon() -> None:
    share, worlds = rate_of_success(40, sequential=True)
    assert share == 1.0
    assert all(max(world.wins.values()) < START + 4.0 for world in worlds)


@pytest.mark.parametrize("late", [2.0, 8.0])
def test_the_two_need_not_begin_at_once(late: float) -> None:
    """A try that comes too early opens the easy end's filter for the port that opens later."""
    share, _ = rate_of_success(60, late=late)
    assert share > chance() - 4 * sqrt(chance() * (1 - chance()) / 60)


def test_the_pace_and_the_budget_are_kept() -> None:
    world = World(3, refuse=True)  # no sockets: nobody wins
    world.run(LASTS + 60.0)
    assert not world.won
    times = [at for at, who, _ in world.sent if who is Role.SEARCH]
    assert len(times) == TRIES == len({key for _, _, key in world.sent})
    for number, at in enumerate(times):
        assert number <= (at - START) * RATE + 2
    assert times[-1] - START < 1.1 * TRIES / RATE
    assert world.search.state is State.SPENT and world.search.get_timer() is None
    ports = {key.remote.port for _, _, key in world.sent}
    assert ports <= set(PORTS) and {key.remote.host for _, _, key in world.sent} == {HARD_OUTSIDE}
    assert {SAMPLES[0].port + 1, SAMPLES[1].port + 1} <= ports


def test_the_hard_end_keeps_its_ports_open_and_gives_up() -> None:
    spread = Birthday(Role.SPREAD, HARD, [EASY_OUTSIDE], rng=random.Random(1), now=START)
    now, opened, sent = START, 0, []
    while (timer := spread.get_timer()) is not None:
        now = max(now, timer)
        for _ in range(spread.sockets_wanted(now)):
            opened += 1
            spread.socket_opened(HARD._replace(port=opened), now)
        sent += [(now, key) for key in spread.checks(now)]
        assert opened <= (now - START) * RATE + 2
    assert opened == SOCKETS and spread.owns(HARD._replace(port=1)) is False
    assert spread.state is State.SPENT and now == pytest.approx(START + LASTS)
    for port in (1, SOCKETS):
        times = [at for at, key in sent if key.local.port == port]
        gaps = [later - at for at, later in itertools.pairwise(times)]
        assert len(times) >= 2 and all(gap == pytest.approx(REFRESH, abs=0.1) for gap in gaps)
    assert len(spread.sockets_unwanted()) == SOCKETS and spread.sockets_unwanted() == []
    late = HARD._replace(port=999)
    spread.socket_opened(late, now)  # it had been asked for
    assert spread.sockets_unwanted() == [late] and spread.checks(now) == []


def test_what_is_heard_elsewhere_ends_nothing() -> None:
    search = Birthday(Role.SEARCH, EASY, SAMPLES, rng=random.Random(1), now=START)
    search.heard(PathKey(EASY._replace(port=1), SAMPLES[0]), START)
    assert search.state is State.RUNNING
    spread = Birthday(Role.SPREAD, HARD, [EASY_OUTSIDE], rng=random.Random(1), now=START)
    spread.heard(PathKey(HARD, EASY_OUTSIDE), START)
    assert spread.state is State.RUNNING
    for attempt in (search, spread):
        attempt.abandon()
        assert attempt.state is State.SPENT and attempt.get_timer() is None
        attempt.abandon()
    search.heard(PathKey(EASY, SAMPLES[0]), START)
    assert search.winner is None


def test_nowhere_to_go() -> None:
    six = Address("2001:db8::1", 1)
    for which, base in ((Role.SEARCH, EASY), (Role.SPREAD, HARD)):
        attempt = Birthday(which, base, [six], rng=random.Random(1), now=START)
        assert attempt.state is State.SPENT
        assert attempt.checks(START) == [] and attempt.sockets_wanted(START) == 0


def test_the_budget_is_shared_by_the_addresses_of_a_peer() -> None:
    targets = [Address(f"198.51.100.{number}", 50000) for number in range(1, 5)]
    search = Birthday(Role.SEARCH, EASY, targets, rng=random.Random(1), now=START)
    found = []
    while (timer := search.get_timer()) is not None:
        found += search.checks(timer)
    assert len(found) == TRIES
    hosts = {key.remote.host for key in found[len(targets) * 32 :]}
    assert hosts == {targets[0].host, targets[1].host}


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (Behaviour(hard=False), Behaviour(hard=True), Role.SEARCH),
        (Behaviour(hard=True), Behaviour(hard=False), Role.SPREAD),
        (Behaviour(hard=True), Behaviour(hard=True), None),
        (Behaviour(hard=False), Behaviour(hard=False), None),
        (Behaviour(hard=True), Behaviour(hard=False, open=True), None),
        (Behaviour(hard=False, open=True), Behaviour(hard=True), None),
    ],
)
def test_roles(mine: Behaviour, theirs: Behaviour, expected: Role | None) -> None:
    assert role(mine, theirs) is expected
    back = {Role.SEARCH: Role.SPREAD, Role.SPREAD: Role.SEARCH, None: None}
    assert role(theirs, mine) is back[expected]


def test_pauses_let_routers_forget() -> None:
    assert [pause(n, 0.0) for n in (1, 2, 3)] == [PAUSE_FIRST, 2 * PAUSE_FIRST, 4 * PAUSE_FIRST]
    assert pause(99, 1.0) == pytest.approx(1.1 * PAUSE_LAST)
    assert pause(1, -1.0) > 2 * 120  # RFC 4787 section 4.3
