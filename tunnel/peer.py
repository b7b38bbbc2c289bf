"""One peer: its connection, where it may be reached, and what to do when that changes.

A peer is *connecting* until a session is up, then *up*; when there is no path, or nothing was
acknowledged for a second, it is *holding*: packets wait (the newest of each flow), the connection
and its keys stay, and the first sign of a path brings everything back without a handshake.

What moves a session, in the order of how soon it is known:

1. the kernel says that the active path's address or link is gone: move at once, challenge while
   data already flows (`network_changed`);
2. the kernel prefers another address now: prove that path first, then move; nothing is lost;
3. nothing was acknowledged past the deadline (`path.liveness`): ask on all other paths, and move
   to the first that answers while the active one does not;
4. the peer moved: `quic.connection` follows by itself, and this module keeps the books.

Beside a silent session, an end that knows where to dial also tries a fresh handshake: the other
process may have restarted. The first to answer wins.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from tunnel.config import PeerConfig
from tunnel.control import (
    ApplicationError,
    Bench,
    BenchReply,
    Goodbye,
    Hello,
    Observed,
    Ping,
    Pong,
)
from tunnel.datapath.engine import Lane
from tunnel.events import (
    BenchAnswer,
    BenchWanted,
    NodeEvent,
    PeerConnecting,
    PeerHolding,
    PeerMigrated,
    PeerRefused,
    PeerUp,
    PingReply,
    ResolveWanted,
)
from tunnel.ledger import Ledger, Trigger
from tunnel.path.liveness import HOLD_AFTER, NAT_KEEPALIVE, suspect_deadline
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.path.selector import best_from, candidates, unique
from tunnel.quic.control_stream import Ended, Greeted, Said, Session
from tunnel.quic.events import MoveContested, PathFailed, PathRefused, PathValidated, PeerMoved

DIAL_STAGGER = 0.05
"""Seconds between the first Initials on different paths: the best one usually answers first."""
DIAL_PATHS = 8
DIAL_TIMEOUT = 5.0
"""Seconds until a handshake that nobody answered is begun anew, names resolved again."""
REFUSED_BACKOFF = 5.0
"""Seconds until a peer that turned us away is tried again: somebody must edit a file first."""
COURTESY_WAIT = 0.25
"""Seconds the end with the larger key waits when both ends can dial."""
TWIN_WINDOW = 3.0
"""Seconds within which two sessions count as both ends dialling at once; later ones replace."""
HANDSHAKE_PATIENCE = 3.0
"""Seconds from the first answer to the peer's Hello, before a dial is given up."""
REPROBE_INTERVAL = 0.3
REPROBE_LIMIT = 2.0
PROBED_PATHS = 4
REMEMBERED_REMOTES = 3
"""Addresses of the peer that worked before and are asked at again: a NAT's old mappings die."""

HELLO_VERSION = 1
BENCH_FEATURE = "bench"
OPEN_BENCHES = 8
"""Questions that a peer may owe an answer to; older ones are forgotten."""
APPLICATION_ERROR = 0x0C
"""What an application's close looks like before the handshake is done (RFC 9000 section 10.2.3)."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a peer knows of its host; one object, shared by all peers of a node."""

    network: LocalNetwork
    port: int


class Peer:
    """The life of one peer. All times are the monotonic seconds the shell passes in."""

    def __init__(
        self,
        config: PeerConfig,
        *,
        lane: Lane,
        ledger: Ledger,
        own_key: bytes,
        dialable: bool,
        hello: Hello,
        rng: random.Random,
        wall_offset: float,
        dial: Callable[["Peer", PathKey, float], Session],
        emit: Callable[[NodeEvent], None],
    ) -> None:
        self.config = config
        self.name = config.name
        self.lane = lane
        self.state = "connecting"
        self.session: Session | None = None
        self.dialling: Session | None = None
        self.resolved = [Address(str(e.ip), e.port) for e in config.endpoint if e.ip is not None]
        self.observed: str | None = None
        self.surroundings = Surroundings(LocalNetwork(), 0)
        self.counters = {"handshakes": 0, "suspicions": 0}
        self._ledger = ledger
        self._hello = hello
        self._rng = rng
        self._wall_offset = wall_offset
        self._make_session = dial
        self._emit = emit
        self._smaller = own_key < config.public_key.raw
        # Nobody can dial a port that nobody knows.
        self._waits = dialable and not self._smaller
        self._dial_at: float | None = None
        self._dial_queue: list[tuple[float, PathKey]] = []
        self._resolving = False
        self._suspect_since: float | None = None
        self._reprobe_at: float | None = None
        self._reprobe_interval = REPROBE_INTERVAL
        self._answered: list[PathKey] = []
        self._wish: PathKey | None = None
        self._unconfirmed: int | None = None
        self._switched_at = 0.0
        self._revived_at = 0.0
        self._held_at = 0.0
        self._ask_after = 0.0
        self._keepalive_at: float | None = None
        self._pings: dict[int, float] = {}
        self._benches: dict[int, str] = {}
        self.lane.hold()

    # inputs

    def start(self, now: float) -> None:
        """Begin to look for the peer."""
        self._emit(PeerConnecting(self.name))
        self._want_dial(now + (COURTESY_WAIT if self._waits else 0.0))

    def network_changed(self, surroundings: Surroundings, now: float) -> None:
        """A full snapshot of what this host can send from."""
        before = self.surroundings
        self.surroundings = surroundings
        if self.dialling is not None:
            self._queue_dial_paths(now)
        elif self.session is None and self._dial_at is not None:
            self._dial_at = min(self._dial_at, now)
        if self.session is not None and self.session.connection.is_open:
            self._reconsider(self.session, before, now)

    def endpoints_resolved(self, addresses: list[Address], now: float) -> None:
        self._resolving = False
        if addresses:
            self.resolved = unique(addresses)
        if self.dialling is not None:
            self._queue_dial_paths(now)
        elif self._dial_at is not None and addresses:
            self._dial_at = min(self._dial_at, now)

    def resumed(self, now: float) -> None:
        """The host or the process slept: whatever was known about paths is old."""
        if self.session is not None:
            self.session.connection.path_event(now)
            self._suspect_since = None
        elif self._dial_at is not None:
            self._dial_at = now

    def send_failed(self, key: PathKey, now: float) -> None:
        """The socket of this path refused to send: a fact about one path, known at once."""
        session = self.session
        if session is None or session.active != key or not session.connection.is_open:
            return
        if self._suspect_since is None:
            self._suspect(session, now)

    def ping(self, token: int, now: float) -> bool:
        """Ask over the control stream; False when there is no session to ask on."""
        if self.session is None:
            return False
        self._pings[token] = now
        self.session.say(Ping(token=token))
        return True

    def bench(self, token: int, seconds: int) -> None:
        """Ask the peer to serve a load for `seconds`; there will be a BenchAnswer, or silence."""
        session = self.session
        problem = ""
        if session is None or session.hello is None or self.state != "up":
            problem = f"peer {self.name} is not up, but {self.state}"
        elif BENCH_FEATURE not in session.hello.features:
            problem = f"the martlet of peer {self.name} is too old: it knows no bench"
        else:
            theirs = self._inner(session.hello.addresses, self._hello.addresses)
            if theirs:
                self._benches[token] = theirs[0]
                if len(self._benches) > OPEN_BENCHES:
                    del self._benches[next(iter(self._benches))]  # the oldest
                session.say(Bench(token=token, address=theirs[0], seconds=seconds))
                return
            problem = (
                f"peer {self.name} has no address inside the tunnel that is in its allowed_ips"
                " here, and of a family that this host has one of, too"
            )
        self._emit(BenchAnswer(self.name, token, problem=problem))

    def bench_served(self, token: int, port: int, secret: bytes, reason: str) -> None:
        """The answer to BenchWanted: port and secret of the load, or port 0 and the reason."""
        if self.session is not None:
            self.session.say(BenchReply(token=token, port=port, secret=secret, reason=reason))

    def _on_bench(self, session: Session, message: Bench) -> None:
        sources = session.hello.addresses if session.hello is not None else ()
        sources = self._inner(sources, (message.address,))
        if not self.config.bench:
            reason = "benches are off there (bench = false)"
        elif message.address not in self._hello.addresses:
            reason = "that is no address of its own"
        elif not sources:
            reason = "this host has no address that is in allowed_ips there"
        else:
            self._emit(
                BenchWanted(self.name, message.token, message.address, sources, message.seconds)
            )
            return
        session.say(BenchReply(token=message.token, reason=reason))

    def _on_bench_reply(self, reply: BenchReply) -> None:
        address = self._benches.pop(reply.token, None)
        if address is None:
            return
        problem = ""
        if not reply.port:
            problem = f"peer {self.name} refuses: {reply.reason or 'no reason given'}"
        self._emit(BenchAnswer(self.name, reply.token, address, reply.port, reply.secret, problem))

    def _inner(self, theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[str, ...]:
        """The peer's addresses that are its own by our configuration, and of a family of ours."""
        families = {ip_address(address).version for address in ours}
        return tuple(
            str(address)
            for address in map(ip_address, theirs)
            if address.version in families
            and any(address in network for network in self.config.allowed_ips)
        )

    def goodbye(self, reason: str) -> None:
        for session in (self.session, self.dialling):
            if session is not None and session.said_hello:
                session.say(Goodbye(reason=reason))

    def reset(self, session: Session, now: float) -> None:
        """The peer says, unforgeably, that it does not know this connection."""
        if session is self.session:
            self._lose_session(now)
            self._want_dial(now)

    # sessions

    def admit(self, session: Session, hello: Hello, now: float) -> None:
        """A session with the right key said Hello. Keep it, or the one we have."""
        session.hello = hello
        if not session.said_hello:
            self._say_hello(session)
        old = self.session
        session.established_at = now
        if old is None or old.hello is None:
            self._adopt(session, now)
            return
        restarted = old.hello.boot_id != hello.boot_id
        twins = now - (old.established_at or now) < TWIN_WINDOW and not old.ended
        if not restarted and twins and old.dialled != session.dialled:
            if session.dialled != self._smaller:
                session.close(ApplicationError.DUPLICATE, "both ends dialled")
                if session is self.dialling:
                    self.dialling = None
                return
            code, reason = ApplicationError.DUPLICATE, "both ends dialled"
        else:
            code, reason = ApplicationError.REPLACED, "a newer connection took over"
        self._record(
            Trigger.RESTART, old.active, session.active, at=self._last_sign(old, now), now=now
        )
        self._adopt(session, now)
        old.close(code, reason)

    def on_event(self, session: Session, event: object, now: float) -> None:
        """An event of a session that belongs to this peer."""
        if isinstance(event, Greeted):
            if session.dialled:
                self._say_hello(session)
        elif isinstance(event, Said):
            self._on_message(session, event, now)
        elif isinstance(event, Ended):
            self._on_ended(session, event, now)
        elif session is self.session:
            self._on_path_event(session, event, now)

    def _say_hello(self, session: Session) -> None:
        session.said_hello = True
        session.say(self._hello)

    def _adopt(self, session: Session, now: float) -> None:
        if self.session is not None:
            self.session.connection.detach()
        self.session = session
        self.counters["handshakes"] += 1
        if self.dialling is session:
            self.dialling = None
        elif self.dialling is not None and not self.dialling.said_hello:
            self.dialling.close(ApplicationError.NO_ERROR, "not needed any more")
            self.dialling = None
        self._dial_at = None
        self._dial_queue = []
        self._suspect_since = self._reprobe_at = None
        session.connection.attach(self.lane)
        session.say(Observed(address=str(session.active.remote)))
        self._keepalive_at = now + NAT_KEEPALIVE
        self._set_up(now)

    def _on_message(self, session: Session, event: Said, now: float) -> None:
        message = event.message
        if isinstance(message, Hello):
            if session.hello is None:
                if message.version != HELLO_VERSION:
                    session.close(
                        ApplicationError.UNSUPPORTED_VERSION,
                        f"version {HELLO_VERSION} is spoken here",
                    )
                    self._emit(PeerRefused(self.name, f"speaks version {message.version}"))
                    return
                self.admit(session, message, now)
        elif isinstance(message, Ping):
            session.say(Pong(token=message.token))
        elif isinstance(message, Pong):
            asked = self._pings.pop(message.token, None)
            if asked is not None:
                self._emit(PingReply(self.name, message.token, now - asked))
        elif isinstance(message, Bench):
            self._on_bench(session, message)
        elif isinstance(message, BenchReply):
            self._on_bench_reply(message)
        elif isinstance(message, Observed):
            self.observed = message.address
        elif isinstance(message, Goodbye) and session is self.session:
            self._lose_session(now)
            self._want_dial(now + 1.0)

    def _on_ended(self, session: Session, event: Ended, now: float) -> None:
        if session is self.dialling:
            self.dialling = None
            if self.session is None:
                if event.application is None and event.code != APPLICATION_ERROR:
                    reason = event.reason or f"connection error {event.code:#x}"
                    self._emit(PeerRefused(self.name, reason))
                    self._want_dial(now + REFUSED_BACKOFF)
                else:
                    self._want_dial(now + 1.0)
        elif session is self.session:
            self._lose_session(now)
            goodbye = event.application is ApplicationError.GOODBYE
            self._want_dial(now + (1.0 if goodbye else 0.1))

    def _lose_session(self, now: float) -> None:
        if self.session is not None:
            self.session.connection.detach()
            self.session = None
        self._suspect_since = self._reprobe_at = None
        self.lane.hold()
        if self.state != "connecting":
            self.state = "connecting"
            self._emit(PeerConnecting(self.name))

    # dialling

    def _want_dial(self, at: float) -> None:
        if self.config.endpoint and self.dialling is None:
            self._dial_at = at if self._dial_at is None else min(at, self._dial_at)

    def _begin_dial(self, now: float) -> None:
        self._dial_at = None
        if self.dialling is not None:
            return
        names = tuple(e for e in self.config.endpoint if e.ip is None)
        if names and not self._resolving:
            self._resolving = True
            self._emit(ResolveWanted(self.name, self.config.endpoint))
        found = self._dial_paths()
        if not found:
            self._dial_at = now + 1.0  # sooner when the network changes or a name resolves
            return
        self.dialling = self._make_session(self, found[0], now)
        self.dialling.connection.dial(now)
        self._dial_queue = []
        self._queue_dial_paths(now)

    def _dial_paths(self) -> list[PathKey]:
        network, port = self.surroundings.network, self.surroundings.port
        return candidates(network, port, self.resolved, limit=DIAL_PATHS)

    def _queue_dial_paths(self, now: float) -> None:
        if self.dialling is None:
            return
        known = {*self.dialling.connection.dial_paths, *(key for _, key in self._dial_queue)}
        at = max([now, *(at for at, _ in self._dial_queue)])
        for key in self._dial_paths():
            if key not in known:
                at += DIAL_STAGGER
                self._dial_queue.append((at, key))

    # the active path

    def _remotes(self, session: Session) -> list[Address]:
        proven = [path for path in session.connection.paths() if path.address_validated]
        proven.sort(key=lambda path: path.used_at, reverse=True)
        recent = [path.addr.remote for path in proven[:REMEMBERED_REMOTES]]
        active, trusted = session.connection.active, session.connection.proven_remote
        first = [active.addr.remote] if active.address_validated else [trusted]
        return unique([*first, *self.resolved, *recent, active.addr.remote])

    def _reconsider(self, session: Session, before: Surroundings, now: float) -> None:
        """The network changed under a session."""
        connection = session.connection
        network, port = self.surroundings.network, self.surroundings.port
        usable = {address.ip for address in network.addresses}
        for path in connection.paths():
            if path.addr.local.host not in usable and path is not connection.active:
                connection.leave(path.addr)
        active = session.active
        best = best_from(network, port, self._remotes(session))
        here = any(a.ip == active.local.host for a in network.sources(active.remote.host))
        if best is None:
            connection.path_event(now)
            self._hold(now)
            return
        if not here:
            was_interface = {a.ip: a.interface for a in before.network.addresses}
            left = was_interface.get(active.local.host)
            still = any(a.interface == left for a in network.addresses)
            trigger = Trigger.ADDRESS_GONE if still else Trigger.LINK_DOWN
            self._move(session, best, trigger, at=now, now=now)
            connection.leave(active)
            return
        if best != active and _choice(before, active) != _choice(self.surroundings, active):
            self._wish = best
            connection.probe(best, now)
        connection.path_event(now)
        if self.state == "holding":
            self._revive(now)

    def _move(
        self, session: Session, key: PathKey, trigger: Trigger, *, at: float, now: float
    ) -> None:
        old = session.active
        if key == old:
            return
        session.connection.move(key, now)
        session.say(Observed(address=str(key.remote)))
        self._record(trigger, old, key, at=at, now=now)
        self._suspect_since = self._reprobe_at = None
        self._wish = None
        self._revive(now)

    def _record(
        self, trigger: Trigger, old: PathKey, new: PathKey, *, at: float, now: float
    ) -> None:
        record = self._ledger.record(
            peer=self.name,
            trigger=trigger,
            from_path=str(old),
            to_path=str(new),
            wall_time=now + self._wall_offset,
            at=at,
            detected=now,
            switched=now,
        )
        self._unconfirmed, self._switched_at = record.sequence, now
        self._emit(PeerMigrated(record))

    def _on_path_event(self, session: Session, event: object, now: float) -> None:
        if isinstance(event, PeerMoved):
            trigger = Trigger.REBINDING if event.rebinding else Trigger.PEER_MOVED
            self._record(trigger, event.old, event.new, at=event.at, now=event.at)
            session.say(Observed(address=str(event.new.remote)))
            self._suspect_since = self._reprobe_at = None
            self._revive(now)
        elif isinstance(event, MoveContested):
            self._record(Trigger.PEER_MOVED, event.refused, event.kept, at=now, now=now)
        elif isinstance(event, PathValidated):
            if event.path == self._wish and event.path != session.active:
                self._move(session, event.path, Trigger.BETTER_ROUTE, at=now, now=now)
            elif self._suspect_since is not None and event.path != session.active:
                self._answered.append(event.path)
        elif isinstance(event, PathFailed) and event.path == self._wish:
            self._wish = None
        elif isinstance(event, PathRefused):
            self.send_failed(event.path, now)

    # liveness

    def _suspect_at(self, session: Session) -> float | None:
        waiting = self._waiting_since(session)
        if waiting is None or self._suspect_since is not None:
            return None
        return waiting + self._deadline(session)

    def _waiting_since(self, session: Session) -> float | None:
        """Since when the peer owes us a sign of life; None when it owes nothing."""
        active = session.connection.active
        if active.metrics.waiting_since is None and active.sendable() == 0:
            return active.used_at  # we may not even ask: the 3x limit of an unproven address
        return active.metrics.waiting_since

    def _give_up_at(self, session: Session) -> float | None:
        """When to leave a suspect path for one that answered; at once if it never worked."""
        self._answered = [key for key in self._answered if key != session.active]
        if self._suspect_since is None or not self._answered:
            return None
        active = session.connection.active
        if active.metrics.last_progress_at < active.used_at:
            return self._suspect_since
        return self._suspect_since + self._deadline(session)

    def _deadline(self, session: Session) -> float:
        metrics = session.connection.active.metrics
        return suspect_deadline(
            has_rtt=metrics.has_rtt,
            expected_rtt=metrics.initial_rtt,
            rtt_smoothed=metrics.rtt_smoothed,
            rtt_variance=metrics.rtt_variance,
            max_ack_delay=session.connection.max_ack_delay,
        )

    def _suspect(self, session: Session, now: float) -> None:
        self.counters["suspicions"] += 1
        self._suspect_since = now
        self._answered = []
        self._reprobe_interval = REPROBE_INTERVAL
        session.connection.nudge()
        self._ask_elsewhere(session, now)

    def _ask_elsewhere(self, session: Session, now: float) -> None:
        network, port = self.surroundings.network, self.surroundings.port
        others = [
            key
            for key in candidates(network, port, self._remotes(session))
            if key != session.active
        ]
        for key in others[:PROBED_PATHS]:
            session.connection.probe(key, now)
        jitter = 0.9 + 0.2 * self._rng.random()
        self._reprobe_at = now + self._reprobe_interval * jitter
        self._reprobe_interval = min(2 * self._reprobe_interval, REPROBE_LIMIT)

    def _last_sign(self, session: Session, now: float) -> float:
        return session.connection.active.metrics.last_progress_at or now

    def _hold(self, now: float) -> None:
        if self.state == "up":
            self.state = "holding"
            self._held_at = now
            self._emit(PeerHolding(self.name))
        self.lane.hold()
        if self.session is not None:
            self._want_dial(now)

    def _hold_at(self, session: Session) -> float | None:
        waiting = self._waiting_since(session)
        if waiting is None or self.lane.held:
            return None
        return max(waiting, self._revived_at) + HOLD_AFTER

    def _revive(self, now: float) -> None:
        """There may be a path again: let packets go, the newest first."""
        self._revived_at = now
        self.lane.recover(now)

    def _set_up(self, now: float) -> None:
        if self.state != "up":
            self.state = "up"
            self._emit(PeerUp(self.name))
        self.lane.recover(now)

    @property
    def expectant(self) -> bool:
        """Whether the next acknowledgement means more than that the path lives."""
        return (
            self._unconfirmed is not None
            or self._suspect_since is not None
            or self.state == "holding"
        )

    def poll(self, now: float) -> None:
        """Look at the state after any input: progress, confirmations, answered questions."""
        session = self.session
        if session is None or not session.connection.is_open:
            return
        progress = session.connection.active.metrics.last_progress_at
        if self._unconfirmed is not None and progress > self._switched_at:
            self._ledger.confirm(self._unconfirmed, progress)
            self._unconfirmed = None
        if self._suspect_since is not None and progress > self._suspect_since:
            self._suspect_since = self._reprobe_at = None
            self._answered = []
        heard = session.connection.heard_at or 0.0
        if self.state == "holding" and heard > max(self._held_at, self._ask_after):
            # The peer is back: ask at once, and do not wait for the next probe timeout.
            self._ask_after = now + REPROBE_INTERVAL
            session.connection.nudge()
        if self.state == "holding" and progress > self._held_at:
            self._set_up(now)
            if self.dialling is not None and not self.dialling.said_hello:
                self.dialling.close(ApplicationError.NO_ERROR, "the old connection is back")
                self.dialling = None
            self._dial_at = None
        give_up_at = self._give_up_at(session)
        if give_up_at is not None and now >= give_up_at and self._suspect_since is not None:
            at = session.connection.active.metrics.waiting_since or self._suspect_since
            self._move(session, self._answered[0], Trigger.SUSPECT, at=at, now=now)

    # time

    def get_timer(self) -> float | None:
        times = [self._dial_at, *(at for at, _ in self._dial_queue)]
        if self.dialling is not None:
            times.append(self._dial_expires(self.dialling))
        session = self.session
        if session is not None and session.connection.is_open:
            times += [self._suspect_at(session), self._reprobe_at, self._keepalive_at]
            times.append(self._give_up_at(session))
            times.append(self._hold_at(session))
        known = [at for at in times if at is not None]
        return min(known) if known else None

    def handle_timer(self, now: float) -> None:
        if self._dial_at is not None and now >= self._dial_at:
            self._begin_dial(now)
        self._dial_more(now)
        session = self.session
        if session is None or not session.connection.is_open:
            return
        suspect_at = self._suspect_at(session)
        if suspect_at is not None and now >= suspect_at:
            self._suspect(session, now)
        if self._reprobe_at is not None and now >= self._reprobe_at:
            self._ask_elsewhere(session, now)
        hold_at = self._hold_at(session)
        if hold_at is not None and now >= hold_at:
            self._hold(now)
        if self._keepalive_at is not None and now >= self._keepalive_at:
            last = session.connection.active.metrics.last_eliciting_at
            if now >= last + NAT_KEEPALIVE:
                session.connection.nudge()
                last = now
            self._keepalive_at = last + NAT_KEEPALIVE
        self.poll(now)

    def _dial_more(self, now: float) -> None:
        dialling = self.dialling
        if dialling is None:
            self._dial_queue = []
            return
        while self._dial_queue and self._dial_queue[0][0] <= now:
            dialling.connection.add_dial_path(self._dial_queue.pop(0)[1])
        if now >= self._dial_expires(dialling):
            dialling.close(ApplicationError.NO_ERROR, "no answer")
            self.dialling = None
            self._want_dial(now)

    def _dial_expires(self, dialling: Session) -> float:
        heard = dialling.connection.heard_at
        if heard is None:
            return dialling.started_at + DIAL_TIMEOUT
        return max(heard, dialling.started_at) + HANDSHAKE_PATIENCE

    # status

    def status(self) -> dict[str, Any]:
        """This peer's part of `status --json`; times in milliseconds, sizes in bytes."""
        session = self.session
        paths: list[dict[str, Any]] = []
        connection: dict[str, int] = {}
        if session is not None:
            connection = session.connection.counters
            for path in session.connection.paths():
                metrics = path.metrics
                paths.append(
                    {
                        "local": str(path.addr.local),
                        "remote": str(path.addr.remote),
                        "kind": "host" if path.addr.remote in self.resolved else "prflx",
                        "state": path.state.value,
                        "active": path is session.connection.active,
                        "rtt_ms": round(metrics.rtt_smoothed * 1e3, 3) if metrics.has_rtt else None,
                        "mtu": path.mtu,
                        "tx_bytes": path.bytes_sent,
                        "rx_bytes": path.bytes_received,
                        "lost_packets": metrics.lost,
                    }
                )
        return {
            "name": self.name,
            "public_key": self.config.public_key.openssh,
            "state": self.state,
            "active_path": str(session.active) if session is not None else None,
            "observed_address": self.observed,
            "paths": paths,
            "migrations": self._ledger.count(self.name),
            "counters": {
                **self.lane.counters,
                **self.counters,
                **connection,
            },
        }


def _choice(surroundings: Surroundings, active: PathKey) -> str | None:
    """The local address that the kernel would send from to the peer's present address."""
    sources = surroundings.network.sources(active.remote.host)
    return sources[0].ip if sources else None
