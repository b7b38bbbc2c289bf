"""Through a NAT that gives every destination another port: by trying many ports at once.

Two ends of which one is *hard* and one is *easy*:

- the hard one's NAT maps each destination to another port (RFC 4787 section 4.1: address-dependent
  or address- and port-dependent mapping), so nobody can tell it where the easy one will see it;
- the easy one's NAT has one mapped address for all (endpoint-independent mapping), but lets in only
  whom it was sent to (address-dependent filtering or stricter).

The hard end *spreads*: it opens many sockets, and each sends checks to the easy end's mapped
address, which opens a port of its NAT each, at random, for the easy end alone. The easy end
*searches*: from its one socket it sends checks to ports of the hard end's public address, drawn at
random and never twice. The first that meets an open port passes, is answered, and its answer passes
back. Of P ports, with N open and M tried, the chance of at least one hit is

    1 - (1 - N/P)(1 - N/(P-1)) ... (1 - N/(P-M+1)),   about 1 - exp(-N M / P)

the birthday paradox. Who of a pair comes first does not matter, as long as the NATs remember: an
early try opens the filter of the easy end, and the check of a late socket passes through it.

Tailscale tells of 256 sockets and 1,024 tries for 98%, 2,048 for 99.9%, at 100 a second. A router
pays for each of them with an entry in its table, for 30 s to 2 minutes, out of 4,096 on small ones.
Here it is half of the sockets, at two thirds of the rate:

    128 sockets   1,024 tries   chance 87% in 16 s, 1,024 and 128 entries at the most
                  twice                98%
                  three times          99.8%

with a pause between the attempts that lets the entries die, so the table never holds more. In bytes
it is 100 kB for the easy end, and 13 kB for the hard one every 10 s of it; twice that where the
easy one has two mapped addresses.

Not all NATs draw at random: many count upwards. So the first tries are the ports behind those that
the hard end was seen at, which costs an eighth of the budget at the most.

When the easy end's filter looks at addresses only, its first try opens it for all of the hard end's
checks, and the search ends at once. Two hard ends would need the square of these numbers, and are
not helped. Two easy ones, or an end whose filter lets everybody in, need no help.

Whom to search is what an authenticated peer says of itself, and cannot be verified before it
works: a peer may have us try ports of somebody else's address. Then that one gets what is above:
6.6 kB a second for 16 s, and peace for five minutes or more.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from math import prod

from tunnel.ice.pacing import Bucket
from tunnel.path.network import Address, PathKey

SOCKETS = 128
TRIES = 1024
RATE = 64.0
"""Checks a second, at either end, and as many sockets."""
PORTS = range(1024, 65536)
"""That NATs choose from (RFC 4787 section 4.2.2 keeps the well-known ports apart)."""
REFRESH = 10.0
"""Seconds between checks of one of the hard end's sockets: the shortest life of a mapping that was
never answered is 30 s (Linux), and a check may be lost."""
LASTS = 30.0
"""Seconds until an end gives up: the search takes 16, and the two do not begin at one moment."""
PAUSE_FIRST, PAUSE_LAST = 300.0, 3600.0
"""Seconds until the next attempt, doubled each time: beyond the 2 minutes that RFC 4787 section 4.3
asks of mappings, and who had no luck three times is likely not where we think."""
BEHIND = 32
"""Ports tried behind each that the hard end was seen at."""
SEEN = 4  # of these
HOSTS = 2  # public addresses of the peer at the most; the budget is for all


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Of the NAT in front of an end, as far as it matters here."""

    hard: bool
    """The mapping depends on the destination."""
    open: bool = False
    """The filter does not: everybody may send in to what is mapped."""


class Role(Enum):
    SEARCH = "search"  # of the easy end
    SPREAD = "spread"  # of the hard end


class State(Enum):
    RUNNING = "running"
    WON = "won"
    SPENT = "spent"


def role(mine: Behaviour, theirs: Behaviour) -> Role | None:
    """What to do; None where this is of no use, or of no need."""
    if mine.hard == theirs.hard or mine.open or theirs.open:
        return None
    return Role.SPREAD if mine.hard else Role.SEARCH


def chance(sockets: int = SOCKETS, tries: int = TRIES, ports: int = len(PORTS)) -> float:
    """Of at least one hit, where ports are drawn evenly and nothing is lost."""
    if sockets + tries > ports:
        return 1.0
    return 1 - prod(1 - sockets / (ports - tried) for tried in range(tries))


def pause(attempts: int, jitter: float) -> float:
    """Seconds until the next attempt after so many; `jitter` from -1 to 1."""
    return min(PAUSE_FIRST * 2.0 ** min(attempts - 1, 10), PAUSE_LAST) * (1 + jitter / 10)


class Birthday:
    """One attempt, at one end. It says which checks to send; others send them.

    All times are the monotonic seconds the shell passes in.
    """

    def __init__(
        self,
        role: Role,
        base: Address,
        targets: Sequence[Address],
        *,
        rng: random.Random,
        now: float,
    ) -> None:
        """`base`: our socket to search from, or the address to open more of. `targets`: where the
        peer is seen: the mapped address of an easy one, or samples of a hard one."""
        self.role = role
        self.state = State.RUNNING
        self.winner: PathKey | None = None
        self.counters = {"sockets": 0, "checks": 0}
        self._base = base
        self._targets = list(dict.fromkeys(t for t in targets if t.is_ipv6 == base.is_ipv6))
        self._pace = Bucket(RATE, 1.0)
        self._pace.take(now)  # nothing is saved up from before
        self._asked = 0
        self._opened: set[Address] = set()
        self._due: deque[tuple[float, Address]] = deque()  # of the sockets, in the order of time
        self._idle: list[Address] = []
        self._tries: Iterator[Address] = iter(())
        self._next: Address | None = None
        self._ends_at = now + LASTS
        if not self._targets:
            self.state = State.SPENT
        elif role is Role.SEARCH:
            self._tries = islice(self._draw(rng), TRIES)
            self._next = next(self._tries, None)

    # inputs

    def socket_opened(self, local: Address, now: float) -> None:
        """One more socket, of those that `sockets_wanted` asked for."""
        if self.state is not State.RUNNING:
            self._idle.append(local)
            return
        self.counters["sockets"] += 1
        self._opened.add(local)
        self._due.appendleft((now, local))

    def owns(self, local: Address) -> bool:
        """Whether this is a socket of the attempt."""
        return local in self._opened

    def heard(self, key: PathKey, now: float) -> None:
        """An authentic check, or an answer to one of ours, came in on this pair: it is over."""
        if self.state is State.RUNNING and (
            key.local == self._base if self.role is Role.SEARCH else key.local in self._opened
        ):
            self.winner = key
            self._end(State.WON)

    def abandon(self) -> None:
        """It is not needed any more, or the network is another."""
        if self.state is State.RUNNING:
            self._end(State.SPENT)

    # drains

    def sockets_wanted(self, now: float) -> int:
        """How many further sockets to open on the base's address now; each is asked for once. What
        cannot be opened only lowers the chance."""
        wanted = 0
        while self._spreading and self._asked < SOCKETS and self._pace.take(now):
            self._asked += 1
            wanted += 1
        return wanted

    def checks(self, now: float) -> list[PathKey]:
        """Those to be sent now."""
        self._expire(now)
        found: list[PathKey] = []
        if self.role is Role.SEARCH:
            while self._next is not None and self._pace.take(now):
                found.append(PathKey(self._base, self._next))
                self._next = next(self._tries, None)
        else:
            while self._due and self._due[0][0] <= now:
                _, local = self._due.popleft()
                found += [PathKey(local, target) for target in self._targets[:HOSTS]]
                self._due.append((now + REFRESH, local))
        self.counters["checks"] += len(found)
        return found

    def sockets_unwanted(self) -> list[Address]:
        """Those to be closed: all, in the end, but the winner's."""
        idle, self._idle = self._idle, []
        return idle

    def get_timer(self) -> float | None:
        if self.state is not State.RUNNING:
            return None
        times = [self._ends_at]
        if self._next is not None or (self._spreading and self._asked < SOCKETS):
            times.append(self._pace.ready_at())
        if self._due:
            times.append(self._due[0][0])
        return min(times)

    # below

    @property
    def _spreading(self) -> bool:
        return self.role is Role.SPREAD and self.state is State.RUNNING

    def _expire(self, now: float) -> None:
        if self.state is State.RUNNING and now >= self._ends_at:
            self._end(State.SPENT)

    def _end(self, state: State) -> None:
        self.state = state
        kept = self.winner.local if self.winner is not None else None
        self._idle += [local for local in self._opened if local != kept]
        self._opened &= {kept} if kept is not None else set()
        self._due.clear()
        self._next = None

    def _draw(self, rng: random.Random) -> Iterator[Address]:
        """All that may be tried, in order, without repetition."""
        seen = self._targets[:SEEN]
        first = [
            Address(target.host, target.port + step)
            for step in range(1, BEHIND + 1)
            for target in seen
            if target.port + step in PORTS
        ]
        hosts = list(dict.fromkeys(target.host for target in self._targets))[:HOSTS]
        tried: set[Address] = set()
        for address in first:
            if address not in tried:
                tried.add(address)
                yield address
        while len(tried) < len(hosts) * len(PORTS):
            for host in hosts:
                address = Address(host, PORTS[rng.randrange(len(PORTS))])
                if address not in tried:
                    tried.add(address)
                    yield address
