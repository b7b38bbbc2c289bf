"""The signaller: a connection to a broker that is there again as soon as it can be.

One connection serves. It counts as connected as soon as CONNECT has left, because all that is
subscribed and published from then on travels in the same flight; if the broker then refuses, it is
disconnected again. Everything the broker acknowledges says that the path to it lives, and how long
its round trip is; so, each thing that is sent is a question. What is unanswered after a few round
trips makes the connection doubtful, and another is raced beside it: whichever speaks first serves.

::

    network_changed, local address gone     drop it, dial at once
    network_changed, address still there    ask (`Link.probe`); silent for 2 round trips: race
    a publication unanswered                silent for 4 round trips: race
    closed, keepalive missed                dial at once, with back-off when that fails

A round of dialling tries the brokers in order, the one that served last first; each gets a start
before the next is tried beside it, and the first that lets us in serves. Brokers in the list are
ways into one and the same cluster: who publishes on one is heard on all.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from tunnel.config import RendezvousConfig
from tunnel.errors import MartletError
from tunnel.obstacle import Obstacle, Reason, broker_remedy
from tunnel.shell.log import Log
from tunnel.shell.mqtt_dial import Dialler, Names, address_is_gone, explain, race, reason_of
from tunnel.shell.mqtt_link import Link, LinkError
from tunnel.shell.secret import read_password

FIRST_RETRY, LAST_RETRY = 0.1, 30.0
"""Seconds from one failed round to the next; doubles, and is then up to half as long, by chance."""

HEAD_START = 1.0
"""Seconds until the next broker is tried beside: a handshake with TLS takes 4 round trips."""

ANSWER_TIMEOUT = 10.0
"""Seconds from a TCP connection to the broker's word that we may use it."""

STABLE = 10.0
"""Seconds a connection must have served for the back-off to start anew."""

PROBE_ROUND_TRIPS, PROBE_MINIMUM, PROBE_MAXIMUM = 2.0, 0.05, 1.0
"""How long a probe may take after a change of the network: round trips, and bounds in seconds."""

ANSWER_ROUND_TRIPS, ANSWER_MINIMUM, ANSWER_MAXIMUM = 4.0, 0.25, 4.0
"""The same for a publication. TCP repeats a lost segment after 200 ms at the soonest."""

MOST_PATIENCE = 16.0
"""Each race that the old connection won doubles the second kind of deadline, up to this."""

CLOSE_TIMEOUT = 1.0  # seconds for what was said last to leave


class Signaller:
    """See the module. Callbacks come from the loop, one at a time; none comes after `close`."""

    def __init__(
        self,
        rendezvous: RendezvousConfig,
        *,
        will: tuple[str, bytes] | None,
        connected: Callable[[], None],
        disconnected: Callable[[], None],
        received: Callable[[str, bytes], None],
        rng: random.Random | None = None,
        names: Names | None = None,
    ) -> None:
        """Raises ConfigError when a file of the configuration cannot be used. Nothing else does."""
        self._config = rendezvous
        self._will = will
        self._on_connected = connected
        self._on_disconnected = disconnected
        self._on_received = received
        self._rng = rng or random.SystemRandom()
        self._dialler = Dialler(rendezvous.ca_file, names)
        self._password()
        self._order = list(rendezvous.url)
        self._careful: set[str] = set()
        """Brokers that hung up on a CONNECT with more behind it."""
        self._topics: frozenset[str] = frozenset()
        self._links: dict[Link, asyncio.Future[None]] = {}
        """Connections, open or about to be; done when they were let in, or not."""
        self._serving: Link | None = None
        self._round: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        """All rounds, also those that are being given up."""
        self._waiting = False
        """Whether the round only waits to try again."""
        self._failures = 0
        self._changed = False
        """Whether the network changed since the broker last answered everything."""
        self._doubted: float | None = None
        """The question (its loop time) that was not answered in time."""
        self._patience = 1.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._state = "connecting"
        self._since = time.time()
        self._served_since = 0.0
        self._error: str | None = None
        self._reason: Reason = ""
        self._failures_told: dict[str, str] = {}
        self._round_errors: dict[str, tuple[str, Reason]] = {}
        """By broker, what is wrong with it: as the log was told, and in the round under way."""
        self._dropped = 0
        self._connections = 0

    def start(self) -> None:
        """Connect, and stay so. Called inside the loop."""
        self._loop = asyncio.get_running_loop()
        self._dial()

    async def close(self) -> None:
        """Say goodbye to the broker, so that the last will is not published. Takes 1 s at most."""
        self._closed = True
        self._stop_timer()
        self._serving = None
        self._set_state()
        links, self._links = list(self._links), {}
        for link in links:
            link.close()
        for task in self._tasks:
            task.cancel()
        ends = [asyncio.ensure_future(link.closed.wait()) for link in links if link.open_ended]
        waiting: list[asyncio.Future[Any]] = [*ends, *self._tasks]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=CLOSE_TIMEOUT)
            for each in late:
                each.cancel()
        for link in links:
            link.abort()

    def subscribe(self, topics: frozenset[str]) -> None:
        """Receive what is published to these topics, and to no others."""
        if topics == self._topics:
            return
        old, self._topics = self._topics, topics
        for link in self._links:
            if not (link.open and (link.eager or link.accepted)):
                continue
            if topics - old:
                link.subscribe(topics - old)
            if old - topics:
                link.unsubscribe(old - topics)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish once; dropped when we are not connected."""
        if self._serving is None or not self._serving.publish(topic, payload):
            self._dropped += 1
            return
        self._watch()

    def network_changed(self) -> None:
        """The network changed, or this host was asleep: the connection may be dead."""
        if self._closed:
            return
        self._failures = 0
        link = self._serving
        if link is not None and address_is_gone(link.local):
            self._error, self._reason = "the network changed", ""
            self._let_go(link, dead=True)
            link = self._serving
        # An attempt that may still succeed is left alone; a wait is over.
        if self._round is not None and (self._waiting or self._dialler.stranded):
            self._dial(anew=True)
        elif link is None:
            self._dial()
        if link is not None and link.accepted:
            self._changed = True
            link.probe()
            self._watch()

    def status(self) -> dict[str, Any]:
        """For `martlet status`; `since` is Unix time, `rtt_ms` the round trip to the broker."""
        link = self._serving
        rtt = link.rtt if link is not None else None
        return {
            "url": link.url if link is not None else self._order[0],
            "state": self._state,
            "since": self._since,
            "error": self._error,
            "remedy": broker_remedy(self._reason) if self._error else "",
            "rtt_ms": None if rtt is None else rtt * 1000,
            "connections": self._connections,
            "dropped": self._dropped,
        }

    def obstacles(self) -> list[Obstacle]:
        """Why no broker serves us."""
        if self._state == "connected" or not self._error:
            return []
        url = self._order[0] if self._serving is None else self._serving.url
        return [Obstacle("broker", f"rendezvous {url}: {self._error}", broker_remedy(self._reason))]

    # What links report

    def opened(self, link: Link) -> None:
        if not link.eager:
            return
        link.subscribe(self._topics)
        # After a change of the network, silence for two round trips, and then a third for this
        # connection to open, say enough.
        if self._serving is None or (self._changed and self._doubted is not None):
            self._serve(link)

    def accepted(self, link: Link) -> None:
        self._connections += 1
        self._order.remove(link.url)
        self._order.insert(0, link.url)
        if not link.eager:
            link.subscribe(self._topics)
        serving = self._serving
        if serving is not link:
            if serving is not None and serving.accepted and self._doubted is None:
                self._let_go(link)  # the old one spoke first
                return
            self._serve(link)
        self._patience = 1.0
        self._served_since = self._loop.time()
        self._error, self._reason = None, ""
        self._failures_told.clear()
        self._set_state()
        self._watch()
        let_in = self._links[link]
        if not let_in.done():
            let_in.set_result(None)

    def received(self, link: Link, topic: str, payload: bytes) -> None:
        if link is self._serving:
            self._call(self._on_received, topic, payload)

    def answered(self, link: Link) -> None:
        if link is self._serving:
            self._watch()

    def ended(self, link: Link, reason: str) -> None:
        error = LinkError(reason)
        self._error, self._reason = explain(error, link.url), reason_of(error, link.url)
        if not link.accepted:
            # Was it what came behind CONNECT? The next attempt will show.
            (self._careful.add if link.eager else self._careful.discard)(link.url)
        let_in = self._links.get(link)
        if let_in is not None and not let_in.done():
            let_in.set_exception(error)
            let_in.exception()  # whoever waits for it may have been cancelled
        was_serving = link is self._serving
        self._let_go(link)
        if was_serving and link.accepted:
            if self._loop.time() - self._served_since >= STABLE:
                self._failures = 0
                self._dial()
            else:
                self._dial(patient=True)

    # Connections

    def _serve(self, link: Link) -> None:
        """From now on this connection serves, in place of any other."""
        old, self._serving = self._serving, link
        self._doubted, self._changed = None, False  # that was about the old one
        if old is not None:
            self._call(self._on_disconnected)
            self._let_go(old)
        self._set_state()
        self._call(self._on_connected)

    def _let_go(self, link: Link, dead: bool = False) -> None:
        """End a connection, in order if it is not known to be `dead`; another one may serve."""
        if link not in self._links:
            return
        let_in = self._links.pop(link)
        if not let_in.done():
            let_in.cancel()
        if dead:
            link.abort()
        else:
            link.close()
        if link is not self._serving:
            return
        self._serving = None
        self._doubted, self._changed = None, False
        self._stop_timer()
        self._set_state()
        if self._closed:
            return
        self._call(self._on_disconnected)
        for other in self._links:
            if self._serving is None and other.open and (other.accepted or other.eager):
                self._serve(other)

    def _set_state(self) -> None:
        link = self._serving
        good = link is not None and link.accepted and self._doubted is None
        state = "connected" if good else "connecting"
        if state == self._state:
            return
        self._state = state
        self._since = time.time()
        if link is not None and good:
            _log.info("broker connected", broker=link.url)
        elif not self._closed:
            _log.info("broker not connected", error=self._error)

    # Doubt

    def _watch(self) -> None:
        """Look again when the oldest question should have been answered."""
        self._stop_timer()
        link = self._serving
        if link is None or not link.accepted:
            return  # ANSWER_TIMEOUT watches over those
        asked = link.oldest_question
        if self._doubted is not None and (asked is None or asked > self._doubted):
            self._believe()
        if asked is None:
            self._changed = False
            return
        if self._doubted is not None:
            return
        rtt = link.rtt or 0.0
        if self._changed:
            limit = min(max(PROBE_ROUND_TRIPS * rtt, PROBE_MINIMUM), PROBE_MAXIMUM)
        else:
            limit = min(max(ANSWER_ROUND_TRIPS * rtt, ANSWER_MINIMUM), ANSWER_MAXIMUM)
            limit *= self._patience
        left = asked + limit - self._loop.time()
        if left > 0:
            # libuv's timers know whole milliseconds, and may be early by one.
            self._timer = self._loop.call_later(left + 0.001, self._watch)
            return
        self._doubted = asked
        self._error, self._reason = f"{urlsplit(link.url).hostname} is silent", "timeout"
        self._set_state()
        # A broker that lets in at once and acknowledges late, or nothing, would be dialled without
        # end; a change of the network is another matter.
        stable = self._loop.time() - self._served_since >= STABLE
        if stable:
            self._failures = 0
        self._dial(patient=not (stable or self._changed))

    def _believe(self) -> None:
        """It did answer after all."""
        self._doubted = None
        self._error, self._reason = None, ""
        if not self._changed:
            self._patience = min(MOST_PATIENCE, 2 * self._patience)
        if self._round is not None:
            self._round.cancel()
        self._set_state()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Dialling

    def _dial(self, *, anew: bool = False, patient: bool = False) -> None:
        """See to it that a round is under way; `patient`: it begins with a wait."""
        if self._closed:
            return
        if self._round is not None:
            if not anew:
                return
            self._round.cancel()
        self._waiting = False
        self._round = task = self._loop.create_task(
            self._keep_trying(self._back_off() if patient else 0.0)
        )
        self._tasks.add(task)
        task.add_done_callback(self._round_ended)

    def _round_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._round is task:
            self._round = None
            self._waiting = False
            if self._serving is None:  # let in, and lost before this was called
                self._dial(patient=True)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("internal error", exc_info=error)

    async def _keep_trying(self, delay: float) -> None:
        while True:
            if delay:
                self._waiting = True
                await asyncio.sleep(delay)
                self._waiting = False
            self._round_errors.clear()
            with contextlib.suppress(OSError, LinkError, MartletError):
                await race([partial(self._try, url) for url in self._order], HEAD_START)
                return
            self._tell_failures()
            delay = self._back_off()

    def _tell_failures(self) -> None:
        """A round was in vain: say why, once for each broker and reason."""
        for url, (error, reason) in self._round_errors.items():
            if self._failures_told.get(url) != error:
                self._failures_told[url] = error
                remedy = broker_remedy(reason) or None
                _log.warning("no broker", broker=url, error=error, remedy=remedy)

    def _back_off(self) -> float:
        delay = min(LAST_RETRY, FIRST_RETRY * 2.0**self._failures)
        self._failures = min(self._failures + 1, 16)
        return delay * self._rng.uniform(1.0, 1.5)

    async def _try(self, url: str) -> None:
        """One attempt at one broker; returns when it has let us in."""
        link: Link | None = None

        def make() -> Link:
            nonlocal link
            link = Link(
                url,
                self,
                will=self._will,
                username=self._config.username,
                password=password,
                eager=url not in self._careful,
            )
            self._links[link] = self._loop.create_future()
            return link

        try:
            password = self._password()
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._dialler.dial(url, make, ANSWER_TIMEOUT)
            assert link is not None
            let_in = self._links.get(link)
            if let_in is None:
                raise LinkError("closed the connection")
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await let_in
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self._error, self._reason = explain(error, url), reason_of(error, url)
                self._round_errors[url] = self._error, self._reason
                _log.debug("cannot use broker", broker=url, error=self._error)
            if link is not None:
                self._let_go(link)
            raise

    def _password(self) -> bytes | None:
        """Read anew for each connection, as it may have been changed meanwhile."""
        file = self._config.password_file
        return None if file is None else read_password(file)

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Whatever happens there must not end the signaller."""
        if self._closed:
            return
        try:
            callback(*arguments)
        except Exception as error:
            _log.error("internal error", exc_info=error)


_log = Log("mqtt")
