"""When an end behind a hard NAT and one behind an easy one probe many ports at once, and how often.

`tunnel.ice.birthday` plans an attempt, `Agent.probe` sends its checks, the shell opens its sockets;
here is decided that there is one. A peer is worth it when

- one of the two NATs is hard and the other is easy, as STUN servers showed each end of its own
  (`tunnel.ice.gather`), and the peer told in its offers and lists of candidates;
- the peer is certainly there: it was heard a moment ago, by a check, or a fresh offer;
- no pair that is not relayed is warm, and has not been for two seconds of ordinary checks.

Both ends come to this at about the same moment, with each other's candidates, and each begins on
its own. Nothing is agreed upon, so the turns after that are at fixed times since then. A node makes
one attempt at a time: one that finds it at another waits, but not until the other end would have
given up; then its turn is over. Other addresses at either end, or another process at the other one,
are another beginning. But no peer gets more than two attempts in a row, and one in five minutes,
whatever it says.

The socket that wins is kept by the node as long as it is of use; the others are closed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tunnel.events import NodeEvent, PortUnwanted, PortWanted
from tunnel.ice.agent import Agent
from tunnel.ice.birthday import LASTS, PAUSE_FIRST, Behaviour, Birthday, Role, State, pause, role
from tunnel.ice.gather import Nat
from tunnel.ice.pacing import Bucket
from tunnel.path.network import Address

PATIENCE = 2.0
"""Seconds that ordinary checks get."""
LATE = LASTS / 2
"""Seconds after which an attempt that could not begin is not worth it any more: the other end's
began in time."""
SILENT = 150.0
"""Seconds after which a peer is not there any more: while two ends look for each other, they say so
every minute."""
IN_A_ROW = 2.0  # attempts for one peer


@dataclass(frozen=True, slots=True)
class _Circumstances:
    """As long as these are the same, it is the same try."""

    role: Role
    base: Address
    hosts: frozenset[str]
    """Where the peer is, but for the ports."""
    boot: str


@dataclass(slots=True)
class _Case:
    """A peer that is worth an attempt."""

    agent: Agent
    circumstances: _Circumstances
    due: float
    turns: int = 0
    begun: int = 0
    """Turns in which there was an attempt."""


class Probing:
    """Of all peers of a node. All times are the monotonic seconds the shell passes in.

    `keep` is told of the socket that won, before its first check.
    """

    def __init__(
        self,
        *,
        rng: random.Random,
        emit: Callable[[NodeEvent], None],
        keep: Callable[[Address, float], None],
    ) -> None:
        self.counters = {"attempts": 0, "attempts_won": 0, "sockets": 0, "checks": 0}
        self._rng = rng
        self._emit = emit
        self._keep = keep
        self._cases: dict[str, _Case] = {}
        self._budgets: dict[str, Bucket] = {}
        self._attempt: Birthday | None = None
        """The last one: what it has opened may come after it is over."""
        self._peer = ""
        """Whom it is for."""
        self._base: Address | None = None

    @property
    def hopeful(self) -> bool:
        """Whether there is a peer that may come to be met directly."""
        return bool(self._cases)

    # inputs

    def port_opened(self, local: Address, now: float) -> None:
        """The answer to a `PortWanted` of ours."""
        attempt, base = self._attempt, self._base
        if attempt is None or base is None or local.host != base.host:
            self._emit(PortUnwanted(local))
            return
        attempt.socket_opened(local, now)

    def poll(self, agents: Mapping[str, Agent], nat: Nat | None, now: float) -> None:
        """Look at the state after any input, and whenever the timer is due. `nat`: ours."""
        self._review(agents, nat, now)
        self._go_on(now)
        for name, case in sorted(self._cases.items(), key=lambda item: item[1].begun):
            while case.due <= now:
                late = now > case.due + LATE
                if not late and self._running:
                    break  # its turn comes when that is over
                case.turns += 1
                case.due += pause(case.turns, 0.0)
                if not late and self._budgets[name].take(now):
                    self._begin(name, case, now)
        self._go_on(now)

    def get_timer(self) -> float | None:
        if self._running and self._attempt is not None:
            return self._attempt.get_timer()
        return min((case.due for case in self._cases.values()), default=None)

    # below

    @property
    def _running(self) -> bool:
        return self._attempt is not None and self._attempt.state is State.RUNNING

    def _review(self, agents: Mapping[str, Agent], nat: Nat | None, now: float) -> None:
        """Who is worth an attempt, and since when."""
        cases: dict[str, _Case] = {}
        for name, agent in agents.items():
            found = _circumstances(agent, nat, now)
            if found is None:
                continue
            known = self._cases.get(name)
            if known is not None and (known.agent, known.circumstances) == (agent, found):
                cases[name] = known
            else:
                cases[name] = _Case(agent, found, now + PATIENCE)
        for name in self._budgets.keys() - agents.keys():
            del self._budgets[name]
        for name in cases.keys() - self._budgets.keys():
            self._budgets[name] = Bucket(1 / PAUSE_FIRST, IN_A_ROW)
        before, self._cases = self._cases.get(self._peer), cases
        if self._running and self._attempt is not None and cases.get(self._peer) is not before:
            self.counters["attempts_won"] += before is not None and bool(before.agent.direct)
            self._attempt.abandon()

    def _begin(self, name: str, case: _Case, now: float) -> None:
        self.counters["attempts"] += 1
        case.begun += 1
        self._peer, self._base = name, case.circumstances.base
        self._attempt = Birthday(
            case.circumstances.role,
            self._base,
            case.agent.peer_outside,
            rng=self._rng,
            now=now,
        )

    def _go_on(self, now: float) -> None:
        attempt, case = self._attempt, self._cases.get(self._peer)
        if attempt is None:
            return
        if case is not None and attempt.state is State.RUNNING:
            stray = case.agent.stray()
            if stray is not None and attempt.owns(stray.local):
                attempt.heard(stray, now)
            if attempt.winner is not None:
                self.counters["attempts_won"] += 1
                self._keep(attempt.winner.local, now)
                case.agent.socket_kept(attempt.winner, now)
            for _ in range(attempt.sockets_wanted(now)):
                self.counters["sockets"] += 1
                self._emit(PortWanted(case.circumstances.base.host, spread=True))
            keys = attempt.checks(now)
            self.counters["checks"] += len(keys)
            case.agent.probe(keys, now)
        for local in attempt.sockets_unwanted():
            self._emit(PortUnwanted(local))


def _circumstances(agent: Agent, nat: Nat | None, now: float) -> _Circumstances | None:
    """None: no attempt is of use."""
    heard_at = agent.heard_at if agent.running else None
    if nat is None or agent.peer_hard is None or heard_at is None or now > heard_at + SILENT:
        return None
    what = role(Behaviour(nat.hard), Behaviour(agent.peer_hard))
    if what is None or agent.direct:
        return None
    hosts = {a.host for a in agent.peer_outside if a.is_ipv6 == nat.base.is_ipv6}
    return _Circumstances(what, nat.base, frozenset(hosts), agent.peer_boot) if hosts else None
