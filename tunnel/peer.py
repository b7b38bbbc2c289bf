"""One peer: its connection, where it may be reached, and what to do when that changes.

A peer is *connecting* until a session is up, then *up*; when there is no path, or nothing was
acknowledged for a second, it is *holding*: packets wait (the newest of each flow), the connection
and its keys stay, and the first sign of a path brings everything back without a handshake.

Which path the session sends on is decided in `tunnel.roaming`; here is the rest of a peer's life.

Beside a silent session, an end that knows where to dial also tries a fresh handshake: the other
process may have restarted. The first to answer wins.
"""

import random
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunnel import missing, report
from tunnel.benches import Benches
from tunnel.config import PeerConfig, Redundancy
from tunnel.control import (
    ApplicationError,
    Bench,
    BenchReply,
    Candidates,
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
    PeerRefused,
    PeerUp,
    PingReply,
)
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import candidate_of
from tunnel.ice.check import Credentials
from tunnel.ledger import Ledger
from tunnel.obstacle import Obstacle
from tunnel.path.liveness import HOLD_AFTER, NAT_KEEPALIVE
from tunnel.path.network import Address, PathKey
from tunnel.quic.control_stream import Ended, Greeted, Said, Session
from tunnel.rendezvous.meeting import Offered
from tunnel.rendezvous.messages import Offer
from tunnel.roaming import Roaming
from tunnel.surroundings import Surroundings
from tunnel.telling import Teller

REFUSED_BACKOFF = 5.0
"""Seconds until a peer that turned us away is tried again: somebody must edit a file first."""
COURTESY_WAIT = 0.25
"""Seconds the end with the larger key waits when both ends can dial."""
TWIN_WINDOW = 3.0
"""Seconds within which two sessions count as both ends dialling at once; later ones replace."""
ASK_AGAIN = 0.3
"""Seconds between two questions to a peer that is heard again while we hold."""

ICE_LABEL = b"EXPORTER-martlet-ice"
UFRAG_LENGTH, PASSWORD_LENGTH = 8, 16  # random bytes; RFC 8445 section 5.3 wants 24 and 128 bits
HELLO_VERSION = 1
APPLICATION_ERROR = 0x0C
"""What an application's close looks like before the handshake is done (RFC 9000 section 10.2.3)."""


class Peer:
    """The life of one peer. All times are the monotonic seconds the shell passes in."""

    def __init__(
        self,
        config: PeerConfig,
        *,
        agent: Agent,
        redundancy: Redundancy,
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
        self.teller = Teller()
        self._refusal: missing.Refusal | None = None
        """Of the last handshake, if the peer has answered it so."""
        self.counters = {"handshakes": 0}
        self.roaming = Roaming(
            config.name,
            agent=agent,
            ledger=ledger,
            redundancy=redundancy,
            rng=rng,
            wall_offset=wall_offset,
            emit=emit,
            hold=self._hold,
            revive=self._revive,
            answered=self._path_answered,
        )
        self._ledger = ledger
        self._hello = hello
        self._emit = emit
        self._smaller = own_key < config.public_key.raw
        # Nobody can dial a port that nobody knows.
        self._waits = dialable and not self._smaller
        self._words = Credentials(
            _ice_chars(rng.randbytes(UFRAG_LENGTH)),
            _ice_chars(rng.randbytes(PASSWORD_LENGTH)),
            "",
            "",
        )
        """Ours for the rendezvous, as long as this process lives."""
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
        self.teller.missed(now)
        self.roaming.endpoints(self.dialler.resolved, now)
        self.dialler.want(now + (COURTESY_WAIT if self._waits else 0.0))

    def network_changed(self, surroundings: Surroundings, now: float) -> None:
        """A full snapshot of what this host can send from."""
        self.dialler.network_changed(surroundings, now)
        if self.session is None:
            self.dialler.hurry(now)
        self.roaming.network_changed(surroundings, now)

    def sockets_changed(self, surroundings: Surroundings, now: float) -> None:
        """There are more or fewer sockets, or relays, on the same addresses."""
        self.dialler.network_changed(surroundings, now)
        self.roaming.sockets_changed(surroundings, now)

    def endpoints_resolved(self, addresses: list[Address], now: float) -> None:
        self.dialler.endpoints_resolved(addresses, now)
        self.roaming.endpoints(self.dialler.resolved, now)

    def endpoints_found(self, addresses: list[Address], now: float) -> None:
        """Where the peer seems to be by what it announces on a link; replaces what was found before
        this way, and may be nothing."""
        self.dialler.endpoints_found(addresses, now)
        if self.session is None or self.state == "holding":
            # It finds us as we find it.
            self.dialler.want(now + (0.0 if self._smaller else COURTESY_WAIT))

    def resumed(self, now: float) -> None:
        """The host or the process slept: whatever was known about paths is old."""
        if self.session is None:
            self.dialler.hurry(now)
        self._revived_at = now  # the silence was ours
        self.roaming.resumed(now)

    def send_failed(self, key: PathKey, now: float) -> None:
        """The socket of this path refused to send."""
        self.roaming.send_failed(key, now)

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

    def leave(self) -> None:
        """This peer is not wanted any more. Its sessions are closed by whoever says so, and what
        becomes of them is of no interest to anybody."""
        self._emit = _nobody
        self.teller.found()
        self.dialler.cancel()
        self.roaming.agent.stop()
        self.lane.hold()

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
        self._adopt(session, now)
        self.roaming.record_restart(old, session, now)
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
            self.roaming.on_path_event(event, now)

    # the rendezvous

    @property
    def seeking(self) -> bool:
        """Whether the rendezvous could help: there is no session, or none of its paths works."""
        return self.session is None or self.state == "holding" or self.roaming.stranded

    def offer(self) -> Offer:
        """What the peer is to be told of us."""
        generation, candidates = self.roaming.agent.candidates()
        ufrag, password = self._words.local_ufrag, self._words.local_password
        return Offer(ufrag, password, generation, candidates, self.roaming.agent.hard)

    def offered(self, offered: Offered, now: float) -> None:
        """The peer's own such word, signed by it."""
        session = self.session
        hello = session.hello if session is not None else None
        if session is not None and hello is not None and hello.boot_id != offered.boot_id:
            # Another process of the peer than the one of the session, before or after it.
            session.connection.nudge()
            if not offered.fresh or not self.seeking:
                return
            self._lose_session(now)
        theirs = offered.offer
        self.roaming.agent.meet(
            replace(self._words, remote_ufrag=theirs.ufrag, remote_password=theirs.password),
            theirs.generation,
            theirs.candidates,
            now,
            hard=theirs.hard,
            fresh=offered.fresh,
        )
        self.poll(now)

    def _path_answered(self, key: PathKey, now: float) -> None:
        self.dialler.path_answered(key)
        self.dialler.want(now + (0.0 if self._smaller else COURTESY_WAIT))

    def _say_hello(self, session: Session) -> None:
        session.said_hello = True
        session.say(self._hello)

    def _adopt(self, session: Session, now: float) -> None:
        if self.session is not None:
            self.session.connection.detach()
        self.session = session
        self._refusal = None
        self.counters["handshakes"] += 1
        if not self.dialler.forget(session):
            self.dialler.give_up("not needed any more")
        self.dialler.cancel()
        session.connection.attach(self.lane)
        session.say(Observed(address=str(session.active.remote)))
        self.roaming.agent.start(_credentials(session), now)
        self.roaming.adopt(session, now)
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
            if session is self.session:
                observed = Address.parse(message.address)
                self.roaming.agent.observed(session.active.local, observed, now)
        elif isinstance(message, Candidates):
            if session is self.session:
                candidates = list(map(candidate_of, message.candidates))
                self.roaming.agent.remote_candidates(
                    message.generation, candidates, now, hard=message.hard
                )
        elif isinstance(message, Goodbye) and session is self.session:
            self._lose_session(now)
            self.dialler.want(now + 1.0)

    def _on_ended(self, session: Session, event: Ended, now: float) -> None:
        if self.dialler.forget(session):
            if self.session is None:
                if event.application is None and event.code != APPLICATION_ERROR:
                    self._refusal = missing.Refusal(event.code, event.reason)
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
        self.roaming.drop()
        self.roaming.agent.stop()
        self.lane.hold()
        self.teller.missed(now)
        if self.state != "connecting":
            self.state = "connecting"
            self._emit(PeerConnecting(self.name))

    # holding

    def _hold(self, now: float) -> None:
        if self.state == "up":
            self.state = "holding"
            self._held_at = now
            self.teller.missed(now)
            self._emit(PeerHolding(self.name))
        self.lane.hold()
        if self.session is not None:
            self.dialler.want(now)

    def _hold_at(self, session: Session) -> float | None:
        waiting = self.roaming.waiting_since(session)
        if waiting is None or self.lane.held:
            return None
        return max(waiting, self._revived_at) + HOLD_AFTER

    def _revive(self, now: float) -> None:
        """There may be a path again: let packets go, the newest first."""
        self._revived_at = now
        self.lane.recover(now)

    def _set_up(self, now: float) -> None:
        self.teller.found()
        if self.state != "up":
            self.state = "up"
            self._emit(PeerUp(self.name))
        self._revive(now)

    @property
    def expectant(self) -> bool:
        """Whether the next acknowledgement means more than that the path lives."""
        return self.roaming.expectant or self.state == "holding"

    def poll(self, now: float) -> None:
        """Look at the state after any input."""
        self.roaming.poll(now)
        session = self.session
        if session is None or not session.connection.is_open:
            return
        if self.state != "holding":
            return
        heard = session.connection.heard_at or 0.0
        if heard > max(self._held_at, self._ask_after):
            # The peer is back: ask at once, and do not wait for the next probe timeout.
            self._ask_after = now + ASK_AGAIN
            session.connection.nudge()
        if session.connection.active.metrics.last_progress_at > self._held_at:
            self._set_up(now)
            self.dialler.give_up("the old connection is back")
            self.dialler.cancel()

    # time

    def get_timer(self) -> float | None:
        times = [self.dialler.get_timer(), self.roaming.get_timer(), self.teller.get_timer()]
        session = self.session
        if session is not None and session.connection.is_open:
            times += [self._keepalive_at, self._hold_at(session)]
        known = [at for at in times if at is not None]
        return min(known) if known else None

    def handle_timer(self, now: float) -> None:
        self.dialler.handle_timer(now)
        self.roaming.handle_timer(now)
        session = self.session
        if session is None or not session.connection.is_open:
            return
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

    def obstacles(self, here: missing.Here, meeting: dict[str, Any] | None) -> list[Obstacle]:
        """What is in the way, while the peer is not up. `meeting` is what the rendezvous knows of
        it."""
        if self.state == "up":
            return []
        return missing.obstacles(
            here=here,
            endpoints=self.config.endpoint,
            resolved=self.dialler.resolved,
            refusal=self._refusal,
            meeting=meeting,
            agent=self.roaming.agent,
        )

    def status(
        self,
        now: float,
        meeting: dict[str, Any] | None = None,
        here: missing.Here | None = None,
    ) -> dict[str, Any]:
        """This peer's part of `status --json`; times in milliseconds, sizes in bytes."""
        session = self.session
        obstacles = self.obstacles(here or missing.Here(), meeting)
        why = report.why(session, self.roaming, now) if session is not None else []
        if session is None and meeting is not None and meeting["heard_s"] is not None:
            why.append(f"it was heard of at the rendezvous {meeting['heard_s']:.0f} s ago")
        return {
            "name": self.name,
            "public_key": self.config.public_key.openssh,
            "state": self.state,
            "active_path": str(session.active) if session is not None else None,
            "observed_address": self.observed,
            "paths": report.paths(session, self.roaming) if session is not None else [],
            "why": [*why, *map(str, obstacles)],
            "obstacles": [obstacle.as_json() for obstacle in obstacles],
            "rendezvous": meeting,
            "migrations": self._ledger.count(self.name),
            "counters": {
                **self.lane.counters,
                **self.counters,
                **self.roaming.counters,
                **(session.connection.counters if session is not None else {}),
                **self.roaming.agent.counters,
            },
        }


def _nobody(event: NodeEvent) -> None:
    """Is told."""


def _credentials(session: Session) -> Credentials:
    """Of the checks beside this connection: both ends derive the same, nobody else can."""

    def of(role: bytes) -> tuple[str, str]:
        material = session.connection.export(ICE_LABEL, role, UFRAG_LENGTH + PASSWORD_LENGTH)
        return _ice_chars(material[:UFRAG_LENGTH]), _ice_chars(material[UFRAG_LENGTH:])

    mine, theirs = (
        (b"client", b"server") if session.connection.is_client else (b"server", b"client")
    )
    return Credentials(*of(mine), *of(theirs))


def _ice_chars(data: bytes) -> str:
    """The ice-char alphabet of RFC 8839 section 5.4 is that of base64."""
    return b64encode(data).decode().rstrip("=")
