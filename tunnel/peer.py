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
from typing import Any

from tunnel.benches import Benches
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
from tunnel.dialling import Dialler
from tunnel.events import (
    NodeEvent,
    PeerConnecting,
    PeerHolding,
    PeerMigrated,
    PeerRefused,
    PeerUp,
    PingReply,
)
from tunnel.ledger import Ledger, Trigger
from tunnel.path.liveness import HOLD_AFTER, NAT_KEEPALIVE, suspect_deadline
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.path.selector import best_from, candidates, unique
from tunnel.quic.control_stream import Ended, Greeted, Said, Session
from tunnel.quic.events import MoveContested, PathFailed, PathRefused, PathValidated, PeerMoved

REFUSED_BACKOFF = 5.0
"""Seconds until a peer that turned us away is tried again: somebody must edit a file first."""
COURTESY_WAIT = 0.25
"""Seconds the end with the larger key waits when both ends can dial."""
TWIN_WINDOW = 3.0
"""Seconds within which two sessions count as both ends dialling at once; later ones replace."""
REPROBE_INTERVAL = 0.3
REPROBE_LIMIT = 2.0
PROBED_PATHS = 4
REMEMBERED_REMOTES = 3
"""Addresses of the peer that worked before and are asked at again: a NAT's old mappings die."""

HELLO_VERSION = 1
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
        self.dialler = Dialler(config, lambda path, now: dial(self, path, now), emit)
        self.observed: str | None = None
        self.surroundings = Surroundings(LocalNetwork(), 0)
        self.counters = {"handshakes": 0, "suspicions": 0}
        self._ledger = ledger
        self._hello = hello
        self._rng = rng
        self._wall_offset = wall_offset
        self._emit = emit
        self._smaller = own_key < config.public_key.raw
        # Nobody can dial a port that nobody knows.
        self._waits = dialable and not self._smaller
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
        self._benches = Benches(config, hello, emit)
        self.lane.hold()

    # inputs

    def start(self, now: float) -> None:
        """Begin to look for the peer."""
        self._emit(PeerConnecting(self.name))
        self.dialler.want(now + (COURTESY_WAIT if self._waits else 0.0))

    def network_changed(self, surroundings: Surroundings, now: float) -> None:
        """A full snapshot of what this host can send from."""
        before = self.surroundings
        self.surroundings = surroundings
        self.dialler.network_changed(surroundings.network, surroundings.port, now)
        if self.session is None:
            self.dialler.hurry(now)
        if self.session is not None and self.session.connection.is_open:
            self._reconsider(self.session, before, now)

    def endpoints_resolved(self, addresses: list[Address], now: float) -> None:
        self.dialler.endpoints_resolved(addresses, now)

    def resumed(self, now: float) -> None:
        """The host or the process slept: whatever was known about paths is old."""
        if self.session is not None:
            self.session.connection.path_event(now)
            self._suspect_since = None
        else:
            self.dialler.hurry(now)

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
        self._benches.ask(self.session, self.state, token, seconds)

    def bench_served(self, token: int, port: int, secret: bytes, reason: str) -> None:
        """The answer to BenchWanted: port and secret of the load, or port 0 and the reason."""
        if self.session is not None:
            self.session.say(BenchReply(token=token, port=port, secret=secret, reason=reason))

    def goodbye(self, reason: str) -> None:
        for session in (self.session, self.dialler.session):
            if session is not None and session.said_hello:
                session.say(Goodbye(reason=reason))

    def reset(self, session: Session, now: float) -> None:
        """The peer says, unforgeably, that it does not know this connection."""
        if session is self.session:
            self._lose_session(now)
            self.dialler.want(now)

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
                self.dialler.forget(session)
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
        if not self.dialler.forget(session):
            self.dialler.give_up("not needed any more")
        self.dialler.cancel()
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
            self._benches.on_asked(session, message)
        elif isinstance(message, BenchReply):
            self._benches.on_reply(message)
        elif isinstance(message, Observed):
            self.observed = message.address
        elif isinstance(message, Goodbye) and session is self.session:
            self._lose_session(now)
            self.dialler.want(now + 1.0)

    def _on_ended(self, session: Session, event: Ended, now: float) -> None:
        if self.dialler.forget(session):
            if self.session is None:
                if event.application is None and event.code != APPLICATION_ERROR:
                    reason = event.reason or f"connection error {event.code:#x}"
                    self._emit(PeerRefused(self.name, reason))
                    self.dialler.want(now + REFUSED_BACKOFF)
                else:
                    self.dialler.want(now + 1.0)
        elif session is self.session:
            self._lose_session(now)
            goodbye = event.application is ApplicationError.GOODBYE
            self.dialler.want(now + (1.0 if goodbye else 0.1))

    def _lose_session(self, now: float) -> None:
        if self.session is not None:
            self.session.connection.detach()
            self.session = None
        self._suspect_since = self._reprobe_at = None
        self.lane.hold()
        if self.state != "connecting":
            self.state = "connecting"
            self._emit(PeerConnecting(self.name))

    # the active path

    def _remotes(self, session: Session) -> list[Address]:
        proven = [path for path in session.connection.paths() if path.address_validated]
        proven.sort(key=lambda path: path.used_at, reverse=True)
        recent = [path.addr.remote for path in proven[:REMEMBERED_REMOTES]]
        active, trusted = session.connection.active, session.connection.proven_remote
        first = [active.addr.remote] if active.address_validated else [trusted]
        return unique([*first, *self.dialler.resolved, *recent, active.addr.remote])

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
            self.dialler.want(now)

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
            self.dialler.give_up("the old connection is back")
            self.dialler.cancel()
        give_up_at = self._give_up_at(session)
        if give_up_at is not None and now >= give_up_at and self._suspect_since is not None:
            at = session.connection.active.metrics.waiting_since or self._suspect_since
            self._move(session, self._answered[0], Trigger.SUSPECT, at=at, now=now)

    # time

    def get_timer(self) -> float | None:
        times = [self.dialler.get_timer()]
        session = self.session
        if session is not None and session.connection.is_open:
            times += [self._suspect_at(session), self._reprobe_at, self._keepalive_at]
            times.append(self._give_up_at(session))
            times.append(self._hold_at(session))
        known = [at for at in times if at is not None]
        return min(known) if known else None

    def handle_timer(self, now: float) -> None:
        self.dialler.handle_timer(now)
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
                        "kind": "host" if path.addr.remote in self.dialler.resolved else "prflx",
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
