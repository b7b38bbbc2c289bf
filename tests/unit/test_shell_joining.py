"""tunnel.shell.joining: both ends in one loop, a broker in memory, and what a user is told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.unit.memory_broker import REFUSED, MemoryBroker
from tunnel.config import RendezvousConfig
from tunnel.errors import LocalError, UnreachableError
from tunnel.identity import Identity
from tunnel.membership import Refusal
from tunnel.rendezvous import invite as exchange
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import (
    Burnt,
    InviteCode,
    JoinAsked,
    Joining,
    Reason,
    Refused,
    Welcome,
    Welcomed,
    Wishes,
)
from tunnel.shell import clock, joining
from tunnel.shell.joining import refused

HOME, LAPTOP = Identity.generate(), Identity.generate()
MEETING = RendezvousConfig(url=("mqtt://broker.example",))
WELCOME = Welcome(name="home", addresses=(inner_address(HOME.public_key.raw),))


class Watching:
    """A `Watcher` that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.left = 0.0
        self.code: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def trouble(self, error: str, left: float) -> None:
        self.said.append(f"trouble: {error}")
        self.left = left

    def recovered(self) -> None:
        self.said.append("recovered")

    def opened(self, code: str) -> None:
        self.code.set_result(code)

    def waiting(self, left: float) -> None:
        self.left = left

    def unanswered(self) -> None:
        self.said.append("unanswered")


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    broker = MemoryBroker()
    monkeypatch.setattr(joining, "Signaller", broker.signaller)
    monkeypatch.setattr(joining, "LOOK", 0.01)
    return broker


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))


def asking(code: str, identity: Identity = LAPTOP, seed: int = 1) -> Joining:
    return Joining(
        identity,
        InviteCode.parse(code),
        name="laptop",
        wishes=Wishes(addresses=(inner_address(identity.public_key.raw),)),
        rng=random.Random(seed),
    )


def inviting(
    watching: Watching, decide: Callable[[JoinAsked], Welcome] = lambda asked: WELCOME
) -> asyncio.Task[Burnt]:
    return asyncio.ensure_future(joining.invite(HOME, MEETING, decide=decide, watcher=watching))


async def join(code: str, watching: Watching | None = None, **more: Any) -> Welcomed:
    return await joining.join(asking(code, **more), MEETING, watcher=watching or Watching())


def test_one_joins(broker: MemoryBroker) -> None:
    async def main() -> None:
        watching, asked = Watching(), []

        def decide(event: JoinAsked) -> Welcome:
            asked.append(event)
            return WELCOME

        invited = inviting(watching, decide)
        code = await watching.code
        while not watching.left:
            await asyncio.sleep(0.005)
        welcomed = await join(code)
        assert welcomed == Welcomed(HOME.public_key.raw, WELCOME)
        assert await invited == Burnt(Reason.USED, delivered=True)
        (event,) = asked
        assert (event.peer, event.name) == (LAPTOP.public_key.raw, "laptop")
        assert watching.said == []
        assert 0 < watching.left <= exchange.LIFETIME
        assert broker.clients == []

    run(main())


@pytest.mark.parametrize("by", [-3600.0, 3600.0])
def test_clocks_may_be_hours_apart(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    """Monotonic ones count from each host's start; nobody looks at the time of day."""
    monkeypatch.setattr(time, "time", lambda: pytest.fail("somebody asked for the time of day"))

    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        machine = _Shifted(asking(await watching.code), by)
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        talk = joining._Talk(MEETING, lambda now: machine, answer.set_result, Watching())
        assert isinstance(await talk.until(answer, lambda now: None), Welcomed)
        assert (await invited).delivered

    run(main())


class _Shifted:
    """A machine whose clock goes wrong by so many seconds."""

    def __init__(self, machine: Joining, by: float) -> None:
        self._machine, self._by = machine, by

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._machine, name)
        if name in ("connected", "disconnected", "handle_timer", "messages_to_send"):
            return lambda now: value(now + self._by)
        if name == "receive":
            return lambda topic, payload, now: value(topic, payload, now + self._by)
        if name == "get_timer":
            return lambda: None if value() is None else value() - self._by
        return value


def test_lost_messages_are_made_good(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 0.02)
    lost: list[str] = []

    def lose(topic: str, payload: bytes) -> bool:
        """The first two of each direction."""
        lost.append(topic)
        return lost.count(topic) <= 2

    broker.lose = lose

    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        assert isinstance(await join(await watching.code), Welcomed)
        invited.cancel()

    run(main())
    assert len(set(lost)) == 2


def test_a_broker_that_is_down_is_told_and_waited_for(broker: MemoryBroker) -> None:
    broker.up = False

    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        while not watching.said:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert watching.said == [f"trouble: {REFUSED}"]  # once
        assert joining.BROKER_PATIENCE - 5 < watching.left <= joining.BROKER_PATIENCE
        assert not watching.code.done()  # it would be of no use yet
        broker.up = True
        code = await watching.code
        joins = asyncio.ensure_future(join(code))
        await asyncio.sleep(0)
        assert (await joins).inviter == HOME.public_key.raw
        assert (await invited).delivered
        assert watching.said == [f"trouble: {REFUSED}", "recovered"]

    run(main())


def test_a_broker_that_stays_down(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    broker.up = False
    monkeypatch.setattr(joining, "BROKER_PATIENCE", 0.1)

    async def main() -> None:
        with pytest.raises(UnreachableError, match=f"no broker could be reached: {REFUSED}"):
            await inviting(Watching())

    run(main())
    assert broker.clients == []


def test_nobody_answers(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "HINT_AFTER", 0.03)
    monkeypatch.setattr(joining, "ANSWER_PATIENCE", 0.15)

    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        code = await watching.code
        invited.cancel()
        await asyncio.wait([invited])
        mine = Watching()
        with pytest.raises(UnreachableError, match="nobody answers this invite; is `martlet inv"):
            await join(code, mine)
        assert mine.said == ["unanswered"]

    run(main())


@pytest.mark.parametrize("down", [True, False])
def test_a_broker_that_comes_and_goes_is_not_waited_for_without_end(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, down: bool
) -> None:
    monkeypatch.setattr(joining, "BROKER_PATIENCE", 0.3)
    monkeypatch.setattr(joining, "ANSWER_PATIENCE", 0.2)

    async def main() -> None:
        code = InviteCode(HOME.public_key.raw, bytes(16), MEETING.url)
        joined = asyncio.ensure_future(join(str(code)))
        while not broker.published:
            await asyncio.sleep(0.005)
        while not joined.done():
            broker.up = not down and not broker.up
            await asyncio.sleep(0.04)
        await joined

    expected = "no broker could be reached" if down else "no broker could be|nobody answers"
    with pytest.raises(UnreachableError, match=expected):
        run(main())


def test_an_invitation_expires_while_the_host_sleeps(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        await watching.code
        awake = clock.now
        monkeypatch.setattr(clock, "now", lambda: awake() + exchange.LIFETIME)
        assert await asyncio.wait_for(invited, 5) == Burnt(Reason.EXPIRED)

    run(main())


def test_nobody_joins(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LIFETIME", 0.1)

    async def main() -> None:
        assert await inviting(Watching()) == Burnt(Reason.EXPIRED)

    run(main())


def test_who_comes_second_is_told(broker: MemoryBroker) -> None:
    """As long as the first has not thanked, the inviter is there to say so."""
    broker.lose = lambda topic, payload: False

    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        code = await watching.code
        first = asking(code)
        quiet = joining._Talk(MEETING, lambda now: _Thankless(first), lambda event: None, watching)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        talking = asyncio.ensure_future(quiet.until(never, lambda now: None))
        while len(broker.published) < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(UnreachableError, match="was used by another host already"):
            await join(code, identity=Identity.generate())
        talking.cancel()
        invited.cancel()
        await asyncio.wait([talking, invited])

    run(main())


class _Thankless(_Shifted):
    """Says nothing once it was answered."""

    def __init__(self, machine: Joining) -> None:
        super().__init__(machine, 0.0)

    def __getattr__(self, name: str) -> Any:
        if name == "receive":
            return lambda topic, payload, now: None
        return super().__getattr__(name)


def test_five_wrong_tries_void_it(broker: MemoryBroker) -> None:
    async def main() -> None:
        watching = Watching()
        invited = inviting(watching)
        code = InviteCode.parse(await watching.code)
        guess = str(InviteCode(code.inviter, bytes(16), code.urls))
        topic = next(iter(broker.clients[0].topics))
        for _ in range(exchange.MAX_FAILURES):
            guesser = asking(guess, Identity.generate())
            guesser._join_topic = topic  # the broker itself would know it
            guesser.connected(0.0)
            for each in guesser.messages_to_send(0.0):
                broker.publish(*each)
        assert await invited == Burnt(Reason.FAILED)

    run(main())


def test_a_refusal_is_told_to_both(broker: MemoryBroker) -> None:
    async def main() -> None:
        watching = Watching()

        def decide(event: JoinAsked) -> Welcome:
            raise Refusal("its key is that of peer office here\n" + "x" * 300)

        invited = inviting(watching, decide)
        with pytest.raises(UnreachableError, match="does not let this host in: its key is that"):
            await join(await watching.code)
        assert await invited == Burnt(Reason.REFUSED)

    run(main())


def test_a_failure_is_told_there_and_raised_here(broker: MemoryBroker) -> None:
    async def main() -> None:
        watching = Watching()

        def decide(event: JoinAsked) -> Welcome:
            raise LocalError("cannot write /etc/martlet/mt0.toml: No space left on device")

        invited = inviting(watching, decide)
        with pytest.raises(UnreachableError, match="in: it cannot write its configuration"):
            await join(await watching.code)
        with pytest.raises(LocalError, match="No space left"):
            await invited

    run(main())


def test_urls_that_no_code_can_hold(broker: MemoryBroker) -> None:
    async def main() -> None:
        five = RendezvousConfig(url=tuple(f"mqtt://{n}.example" for n in range(5)))
        with pytest.raises(ValueError, match="5 broker URLs"):
            await joining.invite(HOME, five, decide=lambda asked: WELCOME, watcher=Watching())

    run(main())


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason.EXPIRED, "this invite has expired; ask for another: `martlet invite`"),
        (Reason.USED, "used by another host already: each lets one in; ask for another"),
        (Reason.FAILED, "too many tried it with a wrong secret; ask for another"),
        (Reason.REFUSED, "the other end does not let this host in"),
    ],
)
def test_words_of_a_refusal(reason: Reason, words: str) -> None:
    assert words in str(refused(Refused(reason)))
