"""Which path a session sends on: what moves it, what races, which path is the second.

The agent (`tunnel.ice`) finds paths and keeps them warm, acknowledgements judge the one in use, the
selector orders them; here is decided. What moves a session, in the order of how soon it is known:

1. the kernel says that the active path's address or link is gone: move at once to the best warm
   path, or to an unchecked one where none is warm; what was in flight is sent again (`_flee`);
2. nothing was acknowledged past the deadline, the socket refuses, or the checks of the active path
   fail: it is *suspect*. Everything in flight and everything new goes to the second path too, as
   copies, which move nobody; both paths are asked. The active one is left only when its deadline
   has passed once more without any sign of life while another answered (`Suspicion`). A wrong
   suspicion costs copies, nothing else;
3. another path is clearly better, and has been for a while: prove with QUIC itself that it carries,
   then move; nothing is lost and nothing sent again (`Wish`);
4. the peer moved: `quic.connection` follows by itself, and this module keeps the books.

Whenever one path is in use and another is warm, the second one is at hand for copies of sparse
flows (interactive redundancy), so that the death of one path is not noticed there at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tunnel.books import Books
from tunnel.config import Redundancy
from tunnel.control import Candidates, Observed
from tunnel.events import NodeEvent, PortWanted
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import Kind, entry_of
from tunnel.ice.events import CandidatesChanged, PairAnswered, PairDown, PairUp
from tunnel.ice.pair import PairState
from tunnel.ledger import Ledger, Trigger
from tunnel.path.liveness import suspect_deadline
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.path.selector import (
    Damper,
    Facts,
    best_from,
    clearly_better,
    order,
    second,
    unique,
)
from tunnel.path.suspicion import Suspicion
from tunnel.quic.control_stream import Session
from tunnel.quic.events import MoveContested, PathFailed, PathRefused, PathValidated, PeerMoved
from tunnel.surroundings import Surroundings

REASK_INTERVAL = 0.3
REASK_LIMIT = 2.0
"""Seconds between questions to all paths while nothing answers, at first and after many."""
REMEMBERED_REMOTES = 3
"""Addresses of the peer that worked before, and are tried when nothing is warm."""
FAILED_MEMORY = 5.0
"""Seconds in which a path that was left as dead is not the second one, whatever its checks say."""
PAUSE = 1.0
"""Seconds without any usable address that are still part of changing from one to the next."""
TOLD_MEMORY = 5.0
"""Seconds after a change of the kernel's routes in which what they prefer now counts as news."""
QUIET = 3.0
"""Seconds without traffic after which a peer is idle, and its paths are asked less often."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A path that would be clearly better than the active one."""

    key: PathKey
    reason: str
    since: float
    relayed: bool
    """A relay would be left for it."""
    asked: bool = False
    """QUIC has been asked to prove it."""


class Roaming:
    """The paths of one peer's session. All times are the monotonic seconds the shell passes in.

    `hold` and `revive` are told when there is no way at all, and when there may be one again;
    `answered`, of paths on which a check was answered while there is no session.
    """

    def __init__(
        self,
        peer: str,
        *,
        agent: Agent,
        ledger: Ledger,
        redundancy: Redundancy,
        rng: random.Random,
        wall_offset: float,
        emit: Callable[[NodeEvent], None],
        hold: Callable[[float], None],
        revive: Callable[[float], None],
        answered: Callable[[PathKey, float], None],
    ) -> None:
        self.agent = agent
        self.surroundings = Surroundings(LocalNetwork(), 0)
        self.counters = {"suspicions": 0, "false_suspicions": 0}
        self.moved_because = "it is where the handshake succeeded"
        """Why the active path is the active one, in words."""
        self._books = Books(peer, ledger, wall_offset, emit)
        self._redundancy = redundancy
        self._rng = rng
        self._emit = emit
        self._hold = hold
        self._revive = revive
        self._path_answered = answered
        self._session: Session | None = None
        self._configured: list[Address] = []
        self._suspicion: Suspicion | None = None
        self._reask_at: float | None = None
        self._reask_interval = REASK_INTERVAL
        self._wish: Wish | None = None
        self._damper = Damper()
        self._told_at = -TOLD_MEMORY
        self._interface_of: dict[str, str] = {}
        self._pathless_since: float | None = None
        self.second: PathKey | None = None
        """The path at hand beside the active one."""
        self._failed: dict[PathKey, float] = {}
        self._traffic_at = -QUIET

    # the session

    def adopt(self, session: Session, now: float) -> None:
        """Another session carries the traffic from now on."""
        self._session = session
        self._forget()
        session.say(_candidates(self.agent))
        self._see_remote(session.active.remote, now)
        self._arrange(now)

    def drop(self) -> None:
        """There is no session any more."""
        self._session = None
        self._forget()

    def _forget(self) -> None:
        self._suspicion = self._reask_at = self._wish = None
        self.second = None
        self._books.forget()

    @property
    def suspect(self) -> bool:
        """Whether the active path may be dead."""
        return self._suspicion is not None

    @property
    def stranded(self) -> bool:
        """Whether no path is known to work: the active one may be dead, and no other answered."""
        suspicion = self._suspicion
        return self._pathless_since is not None or (
            suspicion is not None and not suspicion.answered
        )

    @property
    def _open(self) -> Session | None:
        session = self._session
        return session if session is not None and session.connection.is_open else None

    # inputs

    def endpoints(self, addresses: list[Address], now: float) -> None:
        """Where the configuration says that the peer is."""
        self._configured = addresses
        for address in addresses:
            self.agent.remote_address(address, now)

    def network_changed(self, surroundings: Surroundings, now: float) -> None:
        """A full snapshot of what this host can send from."""
        before, self.surroundings = self.surroundings, surroundings
        self._remember_interfaces(before.network)
        self.agent.bases_changed(surroundings.network, surroundings.bases, now)
        session = self._open
        if session is None:
            return
        connection, active = session.connection, session.active
        self._leave_lost(session)
        self._take_events(now)
        if surroundings.carries(active):
            self._pathless_since = None
            connection.path_event(now)
            self._revive(now)
            if self._preferred(before, active) != self._preferred(surroundings, active):
                self._told_at = now
            self._consider(now)
        else:
            self._flee(session, now)
        self.agent.check_now(now)
        self._arrange(now)

    def _remember_interfaces(self, network: LocalNetwork) -> None:
        """Of the addresses there were, and of the one in use: several steps may lie between its end
        and the first from which there is a way again."""
        if network.addresses:
            session = self._session
            used = session.active.local.host if session is not None else None
            kept = {ip: name for ip, name in self._interface_of.items() if ip == used}
            self._interface_of = kept | {a.ip: a.interface for a in network.addresses}

    def sockets_changed(self, surroundings: Surroundings, now: float) -> None:
        """There are more or fewer sockets, or relays, on the same addresses."""
        self.surroundings = surroundings
        self.agent.bases_changed(surroundings.network, surroundings.bases, now)
        session = self._open
        if session is None:
            return
        self._leave_lost(session)
        self._take_events(now)
        if self._pathless_since is None and not surroundings.carries(session.active):
            self._flee(session, now)
            self._arrange(now)

    def _leave_lost(self, session: Session) -> None:
        """Paths from where we cannot send any more."""
        connection = session.connection
        for path in connection.paths():
            if path is not connection.active and not self.surroundings.has(path.addr.local):
                connection.leave(path.addr)

    def resumed(self, now: float) -> None:
        """The host or the process slept: whatever was known about paths is old."""
        session = self._open
        if session is None:
            return
        session.connection.path_event(now)
        self._doubt(session, Trigger.RESUME, silent_since=now, now=now)

    def send_failed(self, key: PathKey, now: float) -> None:
        """The socket of this path refused to send: a fact about one path, known at once."""
        self.agent.send_failed(key, now)
        session = self._open
        if session is not None and session.active == key and self._suspicion is None:
            self._suspect(session, Trigger.SEND_FAILED, now)

    def traffic(self, now: float) -> None:
        """Packets flow."""
        if now - self._traffic_at > QUIET / 4:
            self._traffic_at = now
            self.agent.busy(True)

    def on_path_event(self, event: object, now: float) -> None:
        """An event of the session's connection that is about paths."""
        session = self._session
        if session is None:
            return
        if isinstance(event, PeerMoved):
            self._peer_moved(session, event, now)
        elif isinstance(event, MoveContested):
            self._note_move(
                session,
                Trigger.PEER_MOVED,
                event.refused,
                event.kept,
                at=now,
                detected=now,
                now=now,
            )
            self.moved_because = "a move of the peer was taken back: it still spoke from here"
            self._arrange(now)
        elif isinstance(event, PathValidated):
            wish = self._wish
            asked = wish is not None and wish.asked and event.path == wish.key
            if wish is not None and asked and event.path != session.active:
                self._move(
                    session, wish.key, Trigger.BETTER_ROUTE, wish.reason,
                    at=wish.since, detected=now, now=now, replay=False,
                )  # fmt: skip
            elif self._suspicion is not None and event.path != session.active:
                self._suspicion.answered.setdefault(event.path, now)
        elif isinstance(event, PathFailed):
            self._failed[event.path] = now + FAILED_MEMORY
            if self._wish is not None and event.path == self._wish.key:
                self._wish = None
        elif isinstance(event, PathRefused):
            self.send_failed(event.path, now)

    # moving

    def _move(
        self,
        session: Session,
        key: PathKey,
        trigger: Trigger,
        reason: str,
        *,
        at: float,
        detected: float,
        now: float,
        replay: bool = True,
    ) -> None:
        old = session.active
        if key == old:
            return
        session.connection.move(key, now, replay=replay)
        session.say(Observed(address=str(key.remote)))
        self._note_move(session, trigger, old, key, at=at, detected=detected, now=now)
        self.moved_because = reason
        self._suspicion = self._reask_at = self._wish = None
        self._revive(now)
        self._arrange(now)

    def _note_move(
        self,
        session: Session,
        trigger: Trigger,
        old: PathKey,
        new: PathKey,
        *,
        at: float,
        detected: float,
        now: float,
    ) -> None:
        if trigger is not Trigger.REBINDING:
            self._damper.moved(now)
        counters = session.connection.counters
        self._books.moved(trigger, old, new, counters, at=at, detected=detected, now=now)

    def record_restart(self, old: Session, new: Session, now: float) -> None:
        """Another process of the peer took over: a move of its own kind."""
        last = old.connection.active.metrics.last_progress_at or now
        self._note_move(
            new, Trigger.RESTART, old.active, new.active, at=last, detected=now, now=now
        )
        self.moved_because = "the peer restarted, and the new handshake succeeded here"

    def _flee(self, session: Session, now: float) -> None:
        """The address that the active path sends from is gone, or has no route any more."""
        connection, active = session.connection, session.active
        network, port = self.surroundings.network, self.surroundings.port
        ordered = [p for p in order(self.facts(now)) if self.surroundings.has(p.key.local)]
        warm = [path.key for path in ordered if path.warm and path.key != active]
        target = warm[0] if warm else best_from(network, port, self._remotes(session))
        if target is None:
            self._pathless_since = self._pathless_since or now
            connection.path_event(now)
            self._hold(now)
            return
        left = self._interface_of.get(active.local.host)
        if self._pathless_since is not None and now > self._pathless_since + PAUSE:
            trigger, reason = Trigger.NO_PATH, "it is the first path after a time without any"
        elif left is None:
            trigger, reason = Trigger.ADDRESS_GONE, f"the relay {active.local} is gone"
        elif any(a.interface == left for a in network.addresses):
            trigger, reason = Trigger.ADDRESS_GONE, f"{active.local.host} is gone from {left}"
        else:
            trigger, reason = Trigger.LINK_DOWN, f"{left} is down"
        at = now if self._pathless_since is None else self._pathless_since
        self._pathless_since = None
        self._move(session, target, trigger, reason, at=at, detected=now, now=now)
        connection.leave(active)
        if len(warm) != 1:
            # The other end may have lost the same path at the same moment, or all it had: do not
            # wait for silence.
            self._doubt(session, trigger, silent_since=now, now=now)

    def _peer_moved(self, session: Session, event: PeerMoved, now: float) -> None:
        trigger = Trigger.REBINDING if event.rebinding else Trigger.PEER_MOVED
        self._note_move(
            session, trigger, event.old, event.new, at=event.at, detected=event.at, now=event.at
        )
        self.moved_because = "the peer moved there"
        session.say(Observed(address=str(event.new.remote)))
        self._suspicion = self._reask_at = self._wish = None
        self._see_remote(event.new.remote, now)
        self._revive(now)
        self._arrange(now)

    def _remotes(self, session: Session) -> list[Address]:
        """Addresses of the peer to try unchecked, best first."""
        connection = session.connection
        proven = [path for path in connection.paths() if path.address_validated]
        proven.sort(key=lambda path: path.used_at, reverse=True)
        recent = [path.addr.remote for path in proven[:REMEMBERED_REMOTES]]
        active, trusted = connection.active, connection.proven_remote
        first = [active.addr.remote] if active.address_validated else [trusted]
        return unique([*first, *self._configured, *recent, active.addr.remote])

    def _see_remote(self, remote: Address, now: float) -> None:
        self.agent.remote_address(remote, now, configured=False)

    @staticmethod
    def _preferred(surroundings: Surroundings, active: PathKey) -> str | None:
        """The local address that the kernel would send from to the peer's present address."""
        sources = surroundings.network.sources(active.remote.host)
        return sources[0].ip if sources else None

    # what is known of the paths

    def facts(self, now: float) -> list[Facts]:
        """What the selector is told of each path."""
        session = self._session
        active = session.active if session is not None else None
        found: dict[PathKey, Facts] = {}
        for pair in self.agent.pairs():
            rank = self._rank(pair.key) + pair.remote_rank
            found[pair.key] = Facts(
                pair.key,
                warm=pair.state is PairState.WARM,
                relayed=pair.kind is Kind.RELAY,
                source=pair.source,
                metered=pair.metered,
                rank=rank,
                rtt=pair.rtt,
                rtt_variance=pair.rtt_variance,
                loss=pair.loss,
                failed=pair.key in self._failed,
            )
        if session is not None and active is not None:
            # Acknowledgements say more of the path in use than checks do.
            metrics = session.connection.active.metrics
            known = found.get(active) or Facts(active, warm=True, rank=self._rank(active))
            measured = metrics.rtt_smoothed if metrics.has_rtt else None
            found[active] = replace(
                known,
                warm=self._suspicion is None,
                rtt=measured if known.rtt is None else known.rtt,
                failed=False,
            )
        return list(found.values())

    def _rank(self, key: PathKey) -> int:
        """Equal routes, equal ranks, as the peer is told: ends that do not rank alike would each
        move the other away from the path it prefers."""
        relay = self.surroundings.relay(key.local)
        if relay is not None:
            return relay.rank
        places = self.surroundings.network.places(key.remote.host)
        return places.get(key.local.host, len(places))

    def _arrange(self, now: float) -> None:
        """Keep the right paths warm, and the second one at hand."""
        session = self._open
        if session is None:
            return
        facts = self.facts(now)
        if self._suspicion is not None:
            # In a race a path that has answered is the one to bet on.
            alive = [f for f in facts if f.key in self._suspicion.answered]
            facts = alive if any(not f.failed for f in alive) else facts
        metered = self._redundancy == "all" or self._suspicion is not None
        chosen = second(session.active, facts, metered=metered, current=self.second)
        racing = self._suspicion is not None
        wanted = chosen if racing or self._redundancy != "off" else None
        session.connection.second(wanted, now, everything=racing or self._redundancy == "all")
        self.second = chosen
        self.agent.keep([key for key in (session.active, chosen) if key is not None])

    def _patience(self, wish: Wish, now: float) -> float:
        """Seconds that a better path must have been better."""
        told = now < self._told_at + TOLD_MEMORY
        return self._damper.wait(now, told=told, relayed=wish.relayed)

    def _consider(self, now: float) -> None:
        """Whether another path is clearly better than the one in use."""
        session = self._open
        if session is None or self._suspicion is not None or session.connection.settling:
            self._wish = None
            return
        facts = self.facts(now)
        active = next(f for f in facts if f.key == session.active)
        for path in order(facts):
            reason = clearly_better(path, active)
            if reason is not None:
                break
        else:
            self._wish = None
            return
        wish = self._wish
        if wish is None or wish.key != path.key:
            relayed = active.relayed and not path.relayed
            self._wish = wish = Wish(path.key, reason, now, relayed)
        if not wish.asked and now >= wish.since + self._patience(wish, now):
            self._wish = replace(wish, asked=True)
            session.connection.probe(wish.key, now)

    # suspicion

    def _deadline(self, session: Session) -> float:
        """Seconds of silence that make the active path suspect."""
        active = session.connection.active
        metrics = active.metrics
        smoothed, variance = metrics.rtt_smoothed, metrics.rtt_variance
        measured = metrics.has_rtt
        if metrics.last_progress_at < active.used_at:
            # Nothing was acknowledged since we are on it. What was before may have come late, by
            # another way, when this path died the last time; checks are answered on their own path.
            pair = self.agent.pair(session.active)
            if pair is not None and pair.rtt is not None:
                smoothed, variance, measured = pair.rtt, pair.rtt_variance, True
        return suspect_deadline(
            has_rtt=measured,
            expected_rtt=metrics.initial_rtt,
            rtt_smoothed=smoothed,
            rtt_variance=variance,
            max_ack_delay=session.connection.max_ack_delay,
        )

    @staticmethod
    def waiting_since(session: Session) -> float | None:
        """Since when the peer owes us a sign of life; None when it owes nothing."""
        active = session.connection.active
        if active.metrics.waiting_since is None and active.sendable() == 0:
            return active.used_at  # we may not even ask: the 3x limit of an unproven address
        return active.metrics.waiting_since

    def _suspect_at(self, session: Session) -> float | None:
        waiting = self.waiting_since(session)
        if waiting is None or self._suspicion is not None:
            return None
        return waiting + self._deadline(session)

    def _suspect(self, session: Session, trigger: Trigger, now: float) -> None:
        self.counters["suspicions"] += 1
        self._doubt(session, trigger, silent_since=self.waiting_since(session) or now, now=now)
        active = session.connection.active
        if self._suspicion is not None and (
            trigger is Trigger.SEND_FAILED or active.metrics.last_progress_at < active.used_at
        ):
            # It refuses, or never worked since we are on it: whoever answers first is better.
            self._suspicion.believe()
        session.connection.nudge()
        session.connection.race(now)

    def _doubt(
        self, session: Session, trigger: Trigger, *, silent_since: float, now: float
    ) -> None:
        """Ask all paths; the active one is given its deadline to answer."""
        self._suspicion = Suspicion.begin(
            trigger,
            silent_since=silent_since,
            patience=self._deadline(session),
            outstanding=session.connection.active.metrics.outstanding,
            now=now,
        )
        self._wish = None
        self._reask_interval = REASK_INTERVAL
        self._ask_all(now)
        self._arrange(now)

    def _ask_all(self, now: float) -> None:
        self.agent.check_now(now)
        jitter = 0.9 + 0.2 * self._rng.random()
        self._reask_at = now + self._reask_interval * jitter
        self._reask_interval = min(2 * self._reask_interval, REASK_LIMIT)

    def _calm(self, now: float) -> None:
        """The active path lives."""
        self._suspicion = self._reask_at = None
        self._arrange(now)

    def _verdict_at(self, session: Session) -> float | None:
        return None if self._suspicion is None else self._suspicion.due(session.active)

    def _take_events(self, now: float) -> None:
        """What the agent has found out."""
        session = self._open
        changed = False
        while (event := self.agent.next_event()) is not None:
            if session is None:
                if isinstance(event, PairUp) and self._session is None:
                    self._path_answered(event.key, now)
                continue
            if isinstance(event, PairUp | PairAnswered):
                pair = self.agent.pair(event.key)
                if pair is not None:
                    session.connection.vouch(event.key, event.rtt, now, trusted=pair.trusted)
                asked_at = event.asked_at if isinstance(event, PairAnswered) else now
                self._answered(session, event.key, asked_at, now)
                changed = changed or isinstance(event, PairUp)
            elif isinstance(event, CandidatesChanged):
                session.say(_candidates(self.agent))
            elif isinstance(event, PairDown):
                changed = True
                if event.key == session.active and self._suspicion is None:
                    self._suspect(session, Trigger.SUSPECT, now)
        if changed:
            self._arrange(now)
            self._consider(now)

    def _answered(self, session: Session, key: PathKey, asked_at: float, now: float) -> None:
        suspicion = self._suspicion
        if suspicion is None or asked_at < suspicion.since:
            return
        if key != session.active:
            first = not suspicion.answered
            suspicion.answered.setdefault(key, now)
            if first:
                self._arrange(now)
        else:
            suspicion.active_answered(self._deadline(session), now)

    # after any input

    @property
    def expectant(self) -> bool:
        """Whether the next acknowledgement means more than that the path lives."""
        return self._books.open or self._suspicion is not None

    def poll(self, now: float) -> None:
        """Look at the state: progress, confirmations, answers, verdicts."""
        self._take_events(now)
        session = self._open
        if session is None:
            return
        progress = session.connection.active.metrics.last_progress_at
        self._books.acknowledged(progress)
        suspicion = self._suspicion
        if suspicion is not None and progress > suspicion.since:
            self.counters["false_suspicions"] += suspicion.silent_since < suspicion.since
            self._calm(now)
        verdict_at = self._verdict_at(session)
        if suspicion is not None and verdict_at is not None and now >= verdict_at:
            dead = session.active
            known = [p.key for p in order(self.facts(now)) if p.key in suspicion.answered]
            if not known:
                suspicion.answered.clear()  # they are gone, with their address or the peer's
                return
            self._failed[dead] = now + FAILED_MEMORY
            self._move(
                session, known[0], suspicion.trigger, f"{dead} fell silent",
                at=suspicion.silent_since, detected=suspicion.since, now=now,
            )  # fmt: skip

    # time

    def get_timer(self) -> float | None:
        times = [self.agent.get_timer()]
        session = self._open
        if session is not None:
            times += [self._suspect_at(session), self._reask_at, self._verdict_at(session)]
            if self._suspicion is not None:
                times.append(self._suspicion.look_again_at)
            if self._wish is not None and not self._wish.asked:
                times.append(self._wish.since + self._patience(self._wish, self._wish.since))
            times.append(self._books.due())
            times += self._failed.values()
        return min((at for at in times if at is not None), default=None)

    def handle_timer(self, now: float) -> None:
        if now - self._traffic_at > QUIET:
            self.agent.busy(False)
        self.agent.handle_timer(now)
        self._take_events(now)
        session = self._open
        if session is None:
            return
        suspect_at = self._suspect_at(session)
        if suspect_at is not None and now >= suspect_at:
            self._suspect(session, Trigger.SUSPECT, now)
        suspicion = self._suspicion
        if suspicion is not None and (suspicion.look_again_at or now + 1) <= now:
            suspicion.look_again_at = None
            session.connection.nudge()
            self.agent.check_now(now, [session.active, *filter(None, [self.second])])
        if self._reask_at is not None and now >= self._reask_at:
            if suspicion is not None and not suspicion.answered and not suspicion.port_wanted:
                # Nothing answers from here: perhaps a NAT or firewall holds a dead mapping.
                suspicion.port_wanted = True
                self._emit(PortWanted(session.active.local.host))
            self._ask_all(now)
        if any(until <= now for until in self._failed.values()):
            self._failed = {key: until for key, until in self._failed.items() if until > now}
            self._arrange(now)
        if self._books.due() is not None:
            self._books.count(session.connection.counters, now)
        self._consider(now)
        self.poll(now)


def _candidates(agent: Agent) -> Candidates:
    generation, candidates = agent.candidates()
    entries = tuple(map(entry_of, candidates))
    return Candidates(generation=generation, candidates=entries, hard=agent.hard)
