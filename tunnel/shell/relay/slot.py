"""A place on this host, and what is done there to have a relay: which way, when, and again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tunnel.ice.turn_message import Problem
from tunnel.obstacle import Reason
from tunnel.shell import clock
from tunnel.shell.relay.attempt import Attempt
from tunnel.shell.relay.ways import Place, Way

if TYPE_CHECKING:
    from tunnel.shell.relay.relays import Relays

HEAD_START = 0.3
"""Seconds that a way to a server has before the next one is tried beside it: who is behind a
firewall that swallows UDP waits for it each time (RFC 8305 section 5 recommends 250 ms)."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0  # seconds
HOPELESS_RETRY = 60.0
"""Seconds until a server that said no, not now but for good, is asked again."""
UNSUPPORTED_RETRY = 600.0
"""The same where it cannot: it would have to be configured otherwise."""
STEADY = 10.0
"""Seconds that a relay must have lived for its end to be no failure."""
_FOR_GOOD = frozenset({Problem.CREDENTIALS, Problem.REFUSED, Problem.UNSUPPORTED})


class Slot:
    """A place, and what is done there to have a relay."""

    def __init__(self, relays: Relays, place: Place, found: list[Way], device: str) -> None:
        self.relays = relays
        self.place = place
        self.device = device
        self._ways = found
        self._left: list[Way] = []
        self._attempts: list[Attempt] = []
        self.failures: dict[Way, tuple[Reason, str]] = {}
        """What became of the last attempt at each way; told until one succeeds."""
        self._used: Attempt | None = None
        self._used_since = 0.0
        self._failures = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Try all ways, from the first."""
        self._stop()
        self._left = list(self._ways)
        self._next()

    def follow(self, found: list[Way], device: str) -> None:
        """There are these ways now."""
        self.device = device
        if found != self._ways:
            self._ways = found
            self.failures = {way: why for way, why in self.failures.items() if way in found}
            if self._used is None or self._used.way not in found:
                self.begin()

    def network_changed(self) -> None:
        if self._used is not None:
            self._used.check()
        elif self._failures:
            self._failures = 0
            self.begin()

    def close(self) -> None:
        self._stop()
        self._ways = []

    @property
    def dropped(self) -> int:
        return sum(attempt.dropped for attempt in self._attempts)

    def status(self) -> list[dict[str, Any]]:
        """A way that waits for its turn is nothing to tell of, unless it has failed before."""
        told = [attempt for attempt in self._attempts if attempt.worth_telling]
        tried = {attempt.way for attempt in self._attempts}
        told += [
            Attempt(self, way)
            for way, (reason, _) in self.failures.items()
            if way not in tried and reason != "unsupported"
        ]
        return [attempt.status() for attempt in told]

    def _stop(self) -> None:
        self._cancel()
        for attempt in self._attempts:
            attempt.close()
        self._attempts, self._used, self._left = [], None, []

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        """Try one way more."""
        self._cancel()
        while self._left and self._used is None:
            attempt = Attempt(self, self._left.pop(0))
            self._attempts.append(attempt)
            if attempt.start():
                break
        if self._used is not None:
            return
        if self._left:
            self._timer = self.relays.loop.call_later(HEAD_START, self._next)
        elif not any(attempt.under_way for attempt in self._attempts):
            self._failed()

    def _failed(self) -> None:
        problems = {attempt.problem for attempt in self._attempts}
        wait = min(FIRST_RETRY * 2.0**self._failures, LAST_RETRY)
        if problems == {Problem.UNSUPPORTED}:
            wait = UNSUPPORTED_RETRY
        elif problems <= _FOR_GOOD:
            wait = HOPELESS_RETRY
        self._failures += 1
        self._timer = self.relays.loop.call_later(wait, self._again)

    def _again(self) -> None:
        self.relays.resolve()  # a server may have moved
        self.begin()

    def succeeded(self, attempt: Attempt) -> None:
        """The first way: the others are not needed."""
        self._cancel()
        self._used, self._used_since = attempt, clock.now()
        for other in self._attempts:
            if other is not attempt:
                other.close()
        self._left = []

    def ended(self, attempt: Attempt) -> None:
        """A way leads nowhere, or not any more."""
        if self._used is not attempt:
            if attempt.problem in _FOR_GOOD:  # over TCP it would say the same
                self._left = [way for way in self._left if way.server != attempt.way.server]
            if self._used is None:
                self._next()
            return
        self._used = None
        if clock.now() >= self._used_since + STEADY:
            self._failures = 0
            self.relays.loop.call_soon(self._begin_anew)
        else:
            self._failed()

    def _begin_anew(self) -> None:
        if self._used is None and self._ways:
            self.begin()
