"""Inviting and joining: one end of `tunnel.rendezvous.invite`, a broker, and a user who waits.

Each runs until it has come to an end that a user should hear of. A broker that cannot be reached is
tried for as long as an invitation lives, and its trouble told; a joiner that nobody answers gives
up sooner, as its inviter waits at the other end or not at all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import uvloop

from tunnel.config import RendezvousConfig
from tunnel.errors import UnreachableError
from tunnel.identity import Identity
from tunnel.membership import Refusal
from tunnel.rendezvous.invite import (
    LIFETIME,
    Burnt,
    Invitation,
    JoinAsked,
    Joining,
    Reason,
    Refused,
    State,
    Welcome,
    Welcomed,
)
from tunnel.rendezvous.join_messages import MAX_DETAIL
from tunnel.shell import clock
from tunnel.shell.mqtt import Signaller

LOOK = 0.1  # seconds between two looks at how the broker is
HINT_AFTER = 5.0
"""Seconds after which a joiner is told that nobody answers: an answer takes two round trips."""
ANSWER_PATIENCE = 60.0
"""Seconds of a broker at hand after which it gives up: far more than an inviter needs to be back at
the broker after a change of its network."""
BROKER_PATIENCE = LIFETIME

_T = TypeVar("_T")


class Watcher(Protocol):
    """Shows a user how it goes."""

    def trouble(self, error: str, left: float) -> None:
        """No broker can be reached, and why; it is tried for `left` more seconds."""

    def recovered(self) -> None:
        """One can, after that."""

    def opened(self, code: str) -> None:
        """An invitation waits for its joiner."""

    def waiting(self, left: float) -> None:
        """It still does, for `left` seconds; again and again."""

    def unanswered(self) -> None:
        """A joiner has a broker, but nobody answers."""


class Machine(Protocol):
    """What `Invitation` and `Joining` have in common."""

    def connected(self, now: float) -> None: ...
    def disconnected(self, now: float) -> None: ...
    def receive(self, topic: str, payload: bytes, now: float) -> None: ...
    def handle_timer(self, now: float) -> None: ...
    def get_timer(self) -> float | None: ...
    def topics(self) -> frozenset[str]: ...
    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]: ...
    def next_event(self) -> JoinAsked | Burnt | Welcomed | Refused | None: ...


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def invite(
    identity: Identity,
    rendezvous: RendezvousConfig,
    *,
    decide: Callable[[JoinAsked], Welcome],
    watcher: Watcher,
    rng: random.Random | None = None,
) -> Burnt:
    """Invite, wait, and let one in; returns how it ended.

    `decide` does all that is to be done before a joiner hears that it is in. It raises Refusal to
    let it know why it is not; any other exception refuses, too, and is raised again here. Raises
    ConfigError, UnreachableError, ValueError for URLs that no code can hold.
    """
    made: list[Invitation] = []
    failures: list[Exception] = []
    ended: asyncio.Future[Burnt] = asyncio.get_running_loop().create_future()

    def make(now: float) -> Invitation:
        # Now, so that it lives its time from when it can be used.
        random_source = rng or random.SystemRandom()
        made.append(Invitation(identity, rendezvous.url, now=now, rng=random_source))
        watcher.opened(made[0].code)
        return made[0]

    def on_event(event: object) -> None:
        if isinstance(event, Burnt):
            if not ended.done():
                ended.set_result(event)
        elif isinstance(event, JoinAsked):
            try:
                made[0].answer(decide(event), clock.now())
            except Refusal as error:
                made[0].refuse(_words(str(error)), clock.now())
            except Exception as error:
                failures.append(error)
                made[0].refuse("it cannot write its configuration", clock.now())

    def look(now: float) -> None:
        if made and made[0].state is State.OPEN:
            watcher.waiting(max(0.0, made[0].expires_at - now))

    talk = _Talk(rendezvous, make, on_event, watcher)
    burnt = await talk.until(ended, look)
    if failures:
        raise failures[0]
    return burnt


async def join(joining: Joining, rendezvous: RendezvousConfig, *, watcher: Watcher) -> Welcomed:
    """Ask until somebody answers.

    Raises UnreachableError when nobody does, or refuses; ConfigError.
    """
    ended: asyncio.Future[Welcomed | Refused] = asyncio.get_running_loop().create_future()

    def on_event(event: object) -> None:
        if isinstance(event, Welcomed | Refused) and not ended.done():
            ended.set_result(event)

    hinted = False
    give_up_at = clock.now() + BROKER_PATIENCE + ANSWER_PATIENCE

    def look(now: float) -> None:
        nonlocal hinted
        if now >= give_up_at:  # a broker that came and went, and maybe came again
            raise talk.unreachable() if talk.reached is None else unanswered()
        if talk.reached is None:
            return
        if now - talk.reached >= ANSWER_PATIENCE:
            raise unanswered()
        if not hinted and now - talk.reached >= HINT_AFTER:
            hinted = True
            watcher.unanswered()

    talk = _Talk(rendezvous, lambda now: joining, on_event, watcher)
    answer = await talk.until(ended, look)
    if isinstance(answer, Refused):
        raise refused(answer)
    return answer


def unanswered() -> UnreachableError:
    """Nobody is there."""
    return UnreachableError(
        "nobody answers this invite", remedy="is `martlet invite` still running there?"
    )


def refused(answer: Refused) -> UnreachableError:
    """In the user's words."""
    again = "ask for another: `martlet invite`"
    match answer.reason:
        case Reason.EXPIRED:
            return UnreachableError("this invite has expired", remedy=again)
        case Reason.USED:
            return UnreachableError(
                "this invite was used by another host already: each lets one in", remedy=again
            )
        case Reason.FAILED:
            return UnreachableError(
                "this invite is void: too many tried it with a wrong secret", remedy=again
            )
        case Reason.REFUSED:
            why = f": {answer.detail}" if answer.detail else ""
            return UnreachableError(f"the other end does not let this host in{why}")


def _words(text: str) -> str:
    """Fit for a refusal."""
    return "".join(char if char.isprintable() else " " for char in text)[:MAX_DETAIL]


class _Talk:
    """A machine and its broker. The machine is made once a broker has let us in: what it shows a
    user is of no use before."""

    def __init__(
        self,
        rendezvous: RendezvousConfig,
        make: Callable[[float], Machine],
        on_event: Callable[[object], None],
        watcher: Watcher,
    ) -> None:
        self.reached: float | None = None
        """Since when a broker has been within reach."""
        self._make = make
        self._on_event = on_event
        self._watcher = watcher
        self._machine: Machine | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._signaller = Signaller(
            rendezvous,
            will=None,
            connected=self._connected,
            disconnected=self._disconnected,
            received=self._received,
        )

    async def until(self, ended: asyncio.Future[_T], look: Callable[[float], None]) -> _T:
        """Talk until then; `look` is called several times a second, and may raise."""
        self._signaller.start()
        try:
            give_up_at = clock.now() + BROKER_PATIENCE
            told = ""
            while not ended.done():
                await asyncio.wait([ended], timeout=LOOK)
                now = clock.now()
                status = self._signaller.status()
                error = status["error"] or ""
                self._follow(status["state"] == "connected", now)
                if self.reached is not None:
                    if told:
                        told = ""
                        self._watcher.recovered()
                    self._begin(now)
                elif error and error != told:
                    told = error
                    self._watcher.trouble(error, max(0.0, give_up_at - now))
                if self._machine is None and now >= give_up_at:
                    raise self.unreachable()
                self._wake(now)
                if not ended.done():
                    look(now)
            return ended.result()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._signaller.close()

    def _begin(self, now: float) -> None:
        if self._machine is None:
            self._machine = self._make(now)
            self._machine.connected(now)
            self._pump(now)

    def unreachable(self) -> UnreachableError:
        """No broker, and no patience left."""
        error = self._signaller.status()["error"]
        return UnreachableError(
            f"no broker could be reached: {error or 'no answer'}",
            remedy="is `martlet rendezvous` running there?",
        )

    def _wake(self, now: float) -> None:
        """The timers of the loop stand still while the host sleeps; ours do not."""
        timer = None if self._machine is None else self._machine.get_timer()
        if timer is not None and now >= timer:
            self._on_timer()

    def _follow(self, reached: bool, now: float) -> None:
        if not reached:
            self.reached = None
        elif self.reached is None:
            self.reached = now

    def _connected(self) -> None:
        if self._machine is not None:
            now = clock.now()
            self._machine.connected(now)
            self._pump(now)

    def _disconnected(self) -> None:
        if self._machine is not None:
            self._machine.disconnected(clock.now())

    def _received(self, topic: str, payload: bytes) -> None:
        if self._machine is not None:
            now = clock.now()
            self._machine.receive(topic, payload, now)
            self._pump(now)

    def _on_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        assert self._machine is not None
        now = clock.now()
        self._machine.handle_timer(now)
        self._pump(now)

    def _pump(self, now: float) -> None:
        machine = self._machine
        assert machine is not None
        self._signaller.subscribe(machine.topics())
        while True:
            # What an event sets off may be said at once.
            event = machine.next_event()
            for topic, payload in machine.messages_to_send(now):
                self._signaller.publish(topic, payload)
            if event is None:
                break
            self._on_event(event)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timer = machine.get_timer()
        if timer is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, timer - clock.now()), self._on_timer)
