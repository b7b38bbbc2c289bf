"""Looking for one peer: from where, to which of its addresses, when, and for how long.

Initials of one handshake leave on the best path at once and on the others staggered; the first to
be answered is the path of the session. A handshake that nobody answers is begun anew, with names
resolved again, for as long as somebody wants the peer.

Where the peer may be is known from configuration, or was found since: announced on the link we
share. What was found is a hint from whoever could send one, so it is few, comes after what is
configured, is forgotten when the network changes, and nothing is believed but the handshake.

A path on which the peer has answered a check (`tunnel.ice`, after the rendezvous) comes before all
that are merely written down, and is forgotten when some handshakes there are not answered: checks
are how a peer is looked for that may be away for weeks, and cost a hundredth.
"""

from collections.abc import Callable

from tunnel.config import PeerConfig
from tunnel.control import ApplicationError
from tunnel.events import NodeEvent, ResolveWanted
from tunnel.ice.candidate import relay_reaches
from tunnel.path.network import Address, LocalNetwork, PathKey, is_usable_remote
from tunnel.path.selector import candidates, unique
from tunnel.quic.control_stream import Session
from tunnel.surroundings import Surroundings

DIAL_STAGGER = 0.05
"""Seconds between the first Initials on different paths: the best one usually answers first."""
DIAL_PATHS = 16
"""At once: four uplinks to four addresses. What is beyond has its turn when nobody answered."""
DIAL_RELAYED = 8
"""The same, from relays."""
MAX_PATHS = 100
MAX_FOUND = 8
"""Addresses that were found: two interfaces, each with IPv4 and some of IPv6."""
MAX_ANSWERED = 8
"""Paths on which a check was answered that are remembered: as many as the agent keeps warm."""
ANSWERED_DIALS = 3
"""Handshakes without an answer, and without another check answered, after which they are not."""
DIAL_TIMEOUT = 5.0
"""Seconds until a handshake that nobody answered is begun anew, names resolved again."""
HANDSHAKE_PATIENCE = 3.0
"""Seconds from the first answer to the peer's Hello, before a dial is given up."""
NOWHERE_RETRY = 1.0
"""Seconds until a dial without any path is tried again; sooner when something changes."""


class Dialler:
    """The handshake under way with a peer, or the wish for one. Times are monotonic seconds.

    `make` begins a session on a path; `emit` asks the shell to resolve names.
    """

    def __init__(
        self,
        config: PeerConfig,
        make: Callable[[PathKey, float], Session],
        emit: Callable[[NodeEvent], None],
    ) -> None:
        self.session: Session | None = None
        """The handshake under way."""
        self.resolved = [Address(str(e.ip), e.port) for e in config.endpoint if e.ip is not None]
        """Where the peer may be, as far as names are resolved."""
        self.found: list[Address] = []
        """Where else it may be, by what was announced on the link."""
        self._config = config
        self._make = make
        self._emit = emit
        self._surroundings = Surroundings(LocalNetwork(), 0)
        self._answered: list[PathKey] = []
        self._at: float | None = None
        self._queue: list[tuple[float, PathKey]] = []
        self._resolving = False
        self._unanswered = 0
        """Handshakes that nobody answered."""
        self._in_vain = 0
        """The same, since the peer last answered a check."""

    @property
    def dialable(self) -> bool:
        """Whether there is anywhere to dial."""
        return bool(self._config.endpoint or self.found or self._answered)

    # what the peer wants

    def want(self, at: float) -> None:
        """Dial at that time at the latest, if there is anywhere to, unless it is being done."""
        if self.dialable and self.session is None:
            self._at = at if self._at is None else min(at, self._at)

    def hurry(self, now: float) -> None:
        """Dial now what is to be dialled at all: something has changed."""
        if self._at is not None:
            self._at = min(self._at, now)

    def cancel(self) -> None:
        """Nobody needs a new session any more; one that is under way may go on."""
        self._at = None
        self._queue = []

    def give_up(self, reason: str) -> None:
        """End the handshake under way, unless the peer may count on it already."""
        if self.session is not None and not self.session.said_hello:
            self.session.close(ApplicationError.NO_ERROR, reason)
            self.session = None

    def forget(self, session: Session) -> bool:
        """Whether this was the handshake under way; it is not any more."""
        if session is not self.session:
            return False
        self.session = None
        return True

    # inputs

    def network_changed(self, surroundings: Surroundings, now: float) -> None:
        if surroundings.network != self._surroundings.network:
            self.found = []
        self._surroundings = surroundings
        usable = {base.address for base in surroundings.bases}
        self._answered = [key for key in self._answered if key.local in usable]
        self._queue_paths(now)

    def endpoints_resolved(self, addresses: list[Address], now: float) -> None:
        self._resolving = False
        if addresses:
            self.resolved = unique(addresses)
        if self.session is not None:
            self._queue_paths(now)
        elif addresses:
            self.hurry(now)

    def endpoints_found(self, addresses: list[Address], now: float) -> None:
        """In place of what was found before. Whoever tells this says by `want` whether to dial."""
        self.found = unique(addresses)[:MAX_FOUND]
        self._queue_paths(now)

    def path_answered(self, key: PathKey) -> None:
        """The peer has answered a check there: the newest is the best guess."""
        self._answered = unique([key, *self._answered])[:MAX_ANSWERED]
        self._in_vain = 0
        if self.session is not None and key not in self.session.connection.dial_paths:
            self.session.connection.add_dial_path(key)

    def get_timer(self) -> float | None:
        times = [at for at, _ in self._queue]
        if self._at is not None:
            times.append(self._at)
        if self.session is not None:
            times.append(self._expires(self.session))
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        if self._at is not None and now >= self._at:
            self._begin(now)
        session = self.session
        if session is None:
            self._queue = []
            return
        while self._queue and self._queue[0][0] <= now:
            session.connection.add_dial_path(self._queue.pop(0)[1])
        if now >= self._expires(session):
            if session.connection.heard_at is None:
                self._unanswered += 1
                self._in_vain += 1
            if self._in_vain >= ANSWERED_DIALS:
                self._answered = []
            session.close(ApplicationError.NO_ERROR, "no answer")
            self.session = None
            self.want(now)

    # below

    def _begin(self, now: float) -> None:
        self._at = None
        if self.session is not None or not self.dialable:
            return
        names = tuple(e for e in self._config.endpoint if e.ip is None)
        if names and not self._resolving:
            self._resolving = True
            self._emit(ResolveWanted(self._config.name, self._config.endpoint))
        found = self._paths()
        if not found:
            self._at = now + NOWHERE_RETRY
            return
        self.session = self._make(found[0], now)
        self.session.connection.dial(now)
        self._queue = []
        self._queue_paths(now)

    def _paths(self) -> list[PathKey]:
        around = self._surroundings
        remotes = unique([*self.resolved, *self.found])
        written = candidates(around.network, around.port, remotes, limit=MAX_PATHS)
        found = unique([*self._answered, *written])
        if len(found) > DIAL_PATHS:
            first = self._unanswered * DIAL_PATHS % len(found)
            found = [*found[first:], *found[:first]][:DIAL_PATHS]
        return unique([*found, *self._relayed()[:DIAL_RELAYED]])

    def _relayed(self) -> list[PathKey]:
        """From our relays, for a host whose network lets UDP pass to nobody."""
        relays = [base for base in self._surroundings.bases if base.relay]
        return [
            PathKey(base.address, remote)
            for remote in self.resolved
            for base in sorted(relays, key=lambda base: base.rank)
            if is_usable_remote(remote.host) and relay_reaches(base.address, remote)
        ]

    def _queue_paths(self, now: float) -> None:
        if self.session is None:
            return
        known = {*self.session.connection.dial_paths, *(key for _, key in self._queue)}
        at = max([now, *(at for at, _ in self._queue)])
        for key in self._paths():
            if key not in known:
                at += DIAL_STAGGER
                self._queue.append((at, key))

    @staticmethod
    def _expires(session: Session) -> float:
        heard = session.connection.heard_at
        if heard is None:
            return session.started_at + DIAL_TIMEOUT
        return max(heard, session.started_at) + HANDSHAKE_PATIENCE
