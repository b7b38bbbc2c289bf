"""Invitations at a simulated broker: hosts that join, too late, too many, or through much loss."""

from __future__ import annotations

import os
import random

import pytest

from tests.sim.broker import Broker, Publication
from tests.sim.meetings import IDENTITIES, key_of
from tunnel.identity import Identity
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import (
    LIFETIME,
    MAX_FAILURES,
    Burnt,
    Invitation,
    InviteCode,
    JoinAsked,
    Joining,
    Reason,
    Refused,
    Welcome,
    Welcomed,
    Wishes,
)

RUNS = int(os.environ.get("MARTLET_SIM_RUNS", "16")) * 10
FIRST = int(os.environ.get("MARTLET_SIM_SEED", "1"))
BATCH = 20
URLS = ("mqtts://broker.example",)
INVITER, *JOINERS = IDENTITIES


class Inviter:
    """`martlet invite`: welcomes whoever asks."""

    def __init__(self, broker: Broker, *, skew: float = 0.0, decides_in: float = 0.0) -> None:
        self.broker, self.skew = broker, skew
        self.decides_in = decides_in
        self.invitation = Invitation(INVITER, URLS, now=broker.now + skew, rng=broker.rng)
        self.asked: list[JoinAsked] = []
        self.burnt: list[Burnt] = []
        self.link = broker.attach(self.invitation, skew=skew, look=self.look)

    def look(self) -> None:
        while (event := self.invitation.next_event()) is not None:
            if isinstance(event, Burnt):
                self.burnt.append(event)
                continue
            self.asked.append(event)
            self.broker.after(self.decides_in, self.welcome)

    def welcome(self) -> None:
        assigned = self.asked[-1].wishes.addresses
        welcome = Welcome("inviter", (inner_address(key_of(INVITER)),), assigned, URLS)
        self.invitation.answer(welcome, self.broker.now + self.skew)
        self.link.pump()


class Joiner:
    """`martlet join`."""

    def __init__(self, broker: Broker, identity: Identity, code: str, *, skew: float = 0.0) -> None:
        self.key = key_of(identity)
        self.joining = Joining(
            identity,
            InviteCode.parse(code),
            name="joiner",
            wishes=Wishes((inner_address(self.key),)),
            rng=broker.rng,
        )
        self.heard: list[Welcomed | Refused] = []
        self.link = broker.attach(self.joining, skew=skew, look=self.look)

    def look(self) -> None:
        while (event := self.joining.next_event()) is not None:
            self.heard.append(event)

    @property
    def is_in(self) -> bool:
        return any(isinstance(event, Welcomed) for event in self.heard)


def one(**options: float) -> tuple[Broker, Inviter, Joiner]:
    broker = Broker(random.Random(1), **options)
    inviter = Inviter(broker)
    return broker, inviter, Joiner(broker, JOINERS[0], inviter.invitation.code, skew=-3600.0)


def test_a_host_joins_in_three_messages() -> None:
    broker, inviter, joiner = one()
    began = broker.now
    broker.run_until(lambda: bool(inviter.burnt), 1.0)
    assert joiner.heard == [Welcomed(key_of(INVITER), joiner.heard[0].welcome)]  # type: ignore[union-attr]
    assert inviter.burnt == [Burnt(Reason.USED, delivered=True)]
    assert broker.now - began == pytest.approx(6 * broker.delay)
    assert len(broker.seen) == 3
    broker.run(3600.0)
    assert len(broker.seen) == 3


def test_whoever_is_there_first() -> None:
    """The inviter's connection may break, and come back long after the joiner's."""
    broker, inviter, joiner = one()
    inviter.link.drop()
    broker.run(60.0)
    asked = len(joiner.link.sent)
    assert 10 <= asked <= 14
    inviter.link.connect()
    broker.run_until(lambda: joiner.is_in, 9.0)


def test_who_decides_slowly_is_waited_for() -> None:
    broker = Broker(random.Random(1))
    inviter = Inviter(broker, decides_in=LIFETIME)
    joiner = Joiner(broker, JOINERS[0], inviter.invitation.code)
    broker.run_until(lambda: joiner.is_in, LIFETIME + 1.0)
    assert len(inviter.asked) == 1


@pytest.mark.parametrize("lost", range(3))
def test_one_lost_message(lost: int) -> None:
    broker, inviter, joiner = one()
    broker.meddle = lambda publication: [] if len(broker.seen) == lost + 1 else [publication]
    broker.run_until(lambda: joiner.is_in, 1.0)
    broker.run_until(lambda: bool(inviter.burnt), 31.0)
    (burnt,) = inviter.burnt
    assert burnt.reason is Reason.USED
    # Lost thanks are not missed by the joiner, who is in.
    assert burnt.delivered == (lost < 2)


def test_expired() -> None:
    broker, inviter, joiner = one()
    broker.detach(joiner.link)
    broker.run(LIFETIME)
    assert inviter.burnt == [Burnt(Reason.EXPIRED)]
    late = Joiner(broker, JOINERS[0], inviter.invitation.code, skew=7200.0)
    broker.run(1.0)
    assert late.heard == [Refused(Reason.EXPIRED)]


def test_used() -> None:
    broker, inviter, joiner = one()
    broker.run(1.0)
    second = Joiner(broker, JOINERS[1], inviter.invitation.code)
    broker.run(1.0)
    assert joiner.is_in
    assert second.heard == [Refused(Reason.USED)]


def test_the_code_of_another_invitation_gets_no_answer() -> None:
    broker = Broker(random.Random(1))
    old, new = Inviter(broker), Inviter(broker)
    broker.detach(old.link)
    joiner = Joiner(broker, JOINERS[0], old.invitation.code)
    broker.run(300.0)
    assert joiner.heard == []
    assert new.invitation.failures == 0
    assert new.asked == []


def test_five_failures_of_a_broker_that_guesses() -> None:
    """It alone sees the topic without the code; the secrets it tries are its own."""
    broker = Broker(random.Random(1))
    inviter = Inviter(broker)
    code = InviteCode.parse(inviter.invitation.code)
    (topic,) = inviter.invitation.topics()
    for n in range(MAX_FAILURES + 3):
        guess = Joining(
            JOINERS[1],
            InviteCode(code.inviter, bytes([n]) * 16, code.urls),
            name="guess",
            wishes=Wishes(()),
            rng=broker.rng,
        )
        guess._join_topic = topic
        guess.connected(broker.now)
        ((_, payload),) = guess.messages_to_send(broker.now)
        broker.publish(topic, payload)
        broker.run(1.0)
    assert inviter.burnt == [Burnt(Reason.FAILED)]
    assert inviter.link.sent == []
    honest = Joiner(broker, JOINERS[0], inviter.invitation.code)
    broker.run(1.0)
    assert honest.heard == [Refused(Reason.FAILED)]


@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, BATCH))
def test_random_joins(first: int) -> None:
    """However many know the code, whatever is lost, and whatever is repeated: one gets in."""
    for seed in range(first, first + BATCH):
        rng = random.Random(seed)
        broker = Broker(
            rng,
            delay=rng.choice([0.001, 0.02, 0.3]),
            jitter=rng.choice([0.0, 0.5]),
            loss=rng.choice([0.0, 0.3]),
            duplication=rng.choice([0.0, 0.3]),
            reordering=rng.choice([0.0, 0.3]),
        )
        inviter = Inviter(broker, skew=rng.choice([0.0, 3600.0]), decides_in=rng.choice([0.0, 5.0]))
        code = inviter.invitation.code
        joiners = [
            Joiner(broker, identity, code, skew=rng.choice([0.0, 3600.0, -3600.0]))
            for identity in JOINERS[: rng.randint(1, 4)]
        ]
        for _ in range(rng.randrange(6)):
            link = rng.choice([inviter.link, *(each.link for each in joiners)])
            link.drop()
            broker.run(rng.expovariate(1.0))
            link.connect()
            for publication in rng.sample(broker.seen, min(2, len(broker.seen))):
                broker.distribute(publication.topic, publication.payload)
        broker.run(300.0)
        broker.loss = 0.0
        broker.run(30.0)
        (asked,) = inviter.asked
        (winner,) = (each for each in joiners if each.is_in)
        assert winner.key == asked.peer, f"seed {seed}"
        for each in joiners:
            if each is not winner:
                assert each.heard == [Refused(Reason.USED)], f"seed {seed}"
        assert [burnt.reason for burnt in inviter.burnt] == [Reason.USED], f"seed {seed}"
        assert len(inviter.link.sent) <= 2 * (5 + 0.5 * 400), f"seed {seed}"


@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS // 4, BATCH))
def test_hostile_broker(first: int) -> None:
    """It swaps, mangles, and repeats what it has of many invitations; nobody gets in who should
    not, and nothing is burnt but by its time."""
    for seed in range(first, first + BATCH):
        rng = random.Random(seed)
        broker = Broker(rng)
        first_one, second_one = Inviter(broker), Inviter(broker)
        words: list[Publication] = []

        def meddle(
            publication: Publication,
            words: list[Publication] = words,
            rng: random.Random = rng,
        ) -> list[Publication]:
            words.append(publication)
            one, other = rng.choice(words), rng.choice(words)
            cut = rng.randrange(len(one.payload) + 1)
            return [
                Publication(0.0, other.topic, one.payload),
                Publication(0.0, one.topic, one.payload[:cut]),
                Publication(0.0, one.topic, one.payload[cut:] + one.payload[:cut]),
                *([publication] if rng.random() < 0.5 else []),
            ]

        broker.meddle = meddle
        joiners = [
            Joiner(broker, JOINERS[0], first_one.invitation.code),
            Joiner(broker, JOINERS[1], second_one.invitation.code),
        ]
        broker.run(60.0)
        broker.meddle = None
        broker.run(60.0)
        for inviter, joiner in zip((first_one, second_one), joiners, strict=True):
            assert [asked.peer for asked in inviter.asked] == [joiner.key], f"seed {seed}"
            assert joiner.is_in, f"seed {seed}"
            assert inviter.invitation.failures == 0, f"seed {seed}"
