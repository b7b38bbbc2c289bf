"""Meetings by the thousand: `MARTLET_SIM_RUNS` times 10 of them, from `MARTLET_SIM_SEED` on."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.sim.broker import Broker, Publication
from tests.sim.meetings import IDENTITIES, End, Party, key_of
from tunnel.rendezvous.meeting import (
    ANSWERS_PER_SECOND,
    ASKS_PER_SECOND,
    LAST_PAUSE,
    STRANGE_PER_SECOND,
    UNPROVEN_BURST,
    UNPROVEN_PER_SECOND,
    Offered,
    PresenceChanged,
)

RUNS = int(os.environ.get("MARTLET_SIM_RUNS", "16")) * 10
FIRST = int(os.environ.get("MARTLET_SIM_SEED", "1"))
BATCH = 10
PATIENCE = 1.1 * LAST_PAUSE + 5.0
"""Seconds in which all is well again, whatever was before."""


def two(**options: float) -> tuple[Broker, End, End]:
    broker = Broker(random.Random(1), **options)
    keys = [key_of(identity) for identity in IDENTITIES[:2]]
    a = End(broker, IDENTITIES[0], [keys[1]])
    b = End(broker, IDENTITIES[1], [keys[0]], skew=-3600.0)
    return broker, a, b


def wanting(a: End, b: End) -> None:
    a.want(b.key, True)
    b.want(a.key, True)


@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, BATCH))
def test_random_parties(first: int) -> None:
    """After any life, who wants a peer knows where it is now, for certain; and at what cost."""
    for seed in range(first, first + BATCH):
        party = Party(seed)
        party.live(20.0)
        party.calm()
        party.broker.run(PATIENCE)
        party.check()
        for one, other in party.pairs():
            assert one.knows(other), f"seed {seed}"
        before = party.sent()
        party.broker.run(600.0)
        # Who is still wanted is asked at the slow end, and answers; nobody else says anything.
        rounds = 600.0 / (0.9 * LAST_PAUSE) + 1
        assert party.sent() - before <= 4 * rounds * len(party.pairs()), f"seed {seed}"


class Hostile:
    """A broker that keeps everything, and gives anything to anybody."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.rng = party.rng
        self.words: list[Publication] = []
        self.topics = {party.ends[0].meeting.will[0]}
        party.broker.meddle = self.meddle

    def meddle(self, publication: Publication) -> list[Publication]:
        self.words.append(publication)
        self.topics |= {topic for link in self.party.broker.links for topic in link.subscribed}
        chance = self.rng.random()
        if chance < 0.3:
            return []
        if chance < 0.4:
            return [Publication(0.0, self.any_topic(), publication.payload)]
        if chance < 0.5:
            return [Publication(0.0, publication.topic, self.mangled(publication.payload))]
        return [publication] * (1 if chance < 0.9 else 3)

    def any_topic(self) -> str:
        return self.rng.choice(sorted(self.topics))

    def mangled(self, payload: bytes) -> bytes:
        chance = self.rng.random()
        if chance < 0.3:
            return payload[: self.rng.randrange(len(payload) + 1)]
        if chance < 0.6:
            return payload + self.rng.randbytes(256)
        position = self.rng.randrange(max(1, len(payload)))
        return payload[:position] + self.rng.randbytes(1) + payload[position + 1 :]

    def harass(self, seconds: float) -> None:
        """Anything it has, to where it belongs or anywhere, ten times a second."""
        end = self.party.broker.now + seconds
        while self.party.broker.now < end:
            if self.words:
                word = self.rng.choice(self.words)
                topic = word.topic if self.rng.random() < 0.8 else self.any_topic()
                self.party.broker.distribute(topic, word.payload)
            self.party.broker.run(0.1)


@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS // 4, BATCH))
def test_hostile_broker(first: int) -> None:
    """It cannot make anybody believe anything, or work much; and when it stops, all is well."""
    for seed in range(first, first + BATCH):
        party = Party(seed, most=3)
        hostile = Hostile(party)
        party.live(10.0)
        began = party.broker.now
        before = {end: (len(end.link.sent), len(end.events)) for end in party.ends}
        hostile.harass(60.0)
        lasted = party.broker.now - began
        for end in party.ends:
            sent, events = before[end]
            budget = ASKS_PER_SECOND + ANSWERS_PER_SECOND + STRANGE_PER_SECOND
            most = len(end.peers) * (budget * lasted + 20)
            assert len(end.link.sent) - sent <= most, f"seed {seed}"
            unproven = [
                event
                for _, event in end.events[events:]
                if isinstance(event, Offered) and not event.fresh and not end.fresh[event.peer]
            ]
            allowed = len(end.peers) * (UNPROVEN_BURST + UNPROVEN_PER_SECOND * lasted)
            assert len(unproven) <= allowed, f"seed {seed}"
        party.check()
        party.broker.meddle = None
        party.calm()
        party.broker.run(PATIENCE)
        party.check()
        for one, other in party.pairs():
            assert one.knows(other), f"seed {seed}"


def test_who_comes_later_meets_who_was_there_in_three_messages() -> None:
    broker, a, b = two()
    b.link.drop(graceful=True)
    a.want(b.key, True)
    broker.run(100.0)
    asked = len(a.link.sent)
    b.want(a.key, True)
    b.link.connect()
    took = broker.run_until(lambda: a.knows(b) and b.knows(a), 5.0)
    assert took == pytest.approx(6 * broker.delay)
    broker.run(1.0)
    assert (len(a.link.sent) - asked, len(b.link.sent)) == (1, 2)


def test_both_at_once() -> None:
    broker, a, b = two()
    wanting(a, b)
    took = broker.run_until(lambda: a.knows(b) and b.knows(a), 5.0)
    assert took == pytest.approx(4 * broker.delay)
    broker.run(1.0)
    assert len(a.link.sent) <= 3
    assert len(b.link.sent) <= 3


def test_one_that_noticed_nothing_answers() -> None:
    broker, a, b = two()
    a.want(b.key, True)
    broker.run_until(lambda: a.knows(b) and b.knows(a), 1.0)
    assert not b.wanted


def test_who_asks_while_nobody_is_there_asks_ever_more_seldom() -> None:
    broker, a, b = two()
    broker.detach(b.link)
    a.want(b.key, True)
    broker.run(3600.0)
    times = [publication.at for publication in a.link.sent]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    expected = [min(0.5 * 2**n, LAST_PAUSE) for n in range(len(pauses))]
    assert pauses == pytest.approx(expected, rel=0.11)
    assert len(set(pauses)) > len(pauses) / 2  # not in step with others that began at the same time


def test_news_is_told_at_once_to_who_is_wanted() -> None:
    broker, a, b = two()
    a.want(b.key, True)
    broker.run(30.0)
    a.new_offer()
    assert broker.run_until(lambda: b.knows(a), 1.0) == pytest.approx(2 * broker.delay)


def test_news_is_told_to_who_asked_a_moment_ago() -> None:
    """It is not wanted here, as nothing is amiss here; there, something is."""
    broker, a, b = two()
    a.want(b.key, True)
    broker.run(30.0)
    b.new_offer()
    assert broker.run_until(lambda: a.knows(b), 1.0) == pytest.approx(2 * broker.delay)
    broker.run(0.5)
    a.want(b.key, False)
    broker.run(120.0)
    sent = len(b.link.sent)
    b.new_offer()
    broker.run(120.0)
    assert len(b.link.sent) == sent


def test_news_that_was_lost_is_told_again() -> None:
    broker, a, b = two()
    a.want(b.key, True)
    broker.run(30.0)
    broker.meddle = lambda publication: []
    a.new_offer()
    broker.run(0.2)
    broker.meddle = None
    broker.run(1.0)
    assert b.knows(a)


def test_withheld_answers_are_given_again() -> None:
    """Each word in turn is the one that gets lost: it costs time, and nothing else."""
    for lost in range(8):
        broker, a, b = two()
        count = 0

        def withhold(publication: Publication, lost: int = lost) -> list[Publication]:
            nonlocal count
            count += 1
            return [] if count - 1 == lost else [publication]

        broker.meddle = withhold
        wanting(a, b)
        broker.run_until(lambda a=a, b=b: a.knows(b) and b.knows(a), 3.0)  # type: ignore[misc]


@pytest.mark.parametrize("held", [1.0, 119.0, 121.0, 7200.0])
def test_a_word_held_back_is_fresh_for_two_minutes(held: float) -> None:
    broker, a, b = two()
    late: list[Publication] = []

    def hold(publication: Publication) -> list[Publication]:
        if publication.topic in a.meeting.topics():
            late.append(publication)
            return []
        return [publication]

    broker.meddle = hold
    a.want(b.key, True)
    broker.run(0.1)
    a.want(b.key, False)
    (answer,) = late
    broker.run(held - 0.1)
    broker.distribute(answer.topic, answer.payload)
    broker.run(0.1)
    assert a.known[b.key].fresh == (held < 120.0)


def test_a_restart_is_known_by_what_is_fresh() -> None:
    broker, a, b = two()
    wanting(a, b)
    broker.run(10.0)
    before = len(a.events)
    b.restart()
    broker.run_until(lambda: a.knows(b) and b.knows(a), 1.0)
    offered = [event for _, event in a.events[before:] if isinstance(event, Offered)]
    assert all(event.fresh for event in offered)  # nothing unproven in place of what was known


def test_old_processes_do_not_come_back() -> None:
    """Everything that was ever said, said again: no event, and an answer or two at the most."""
    broker, a, b = two()
    wanting(a, b)
    for _ in range(4):
        broker.run(10.0)
        b.restart()
    broker.run(10.0)
    broker.run_until(lambda: a.knows(b), 1.0)
    a.want(b.key, False)
    b.want(a.key, False)
    broker.run(200.0)
    heard, sent = len(a.events), len(a.link.sent)
    for publication in list(broker.seen):
        broker.distribute(publication.topic, publication.payload)
        broker.run(0.5)
    assert [e for _, e in a.events[heard:] if isinstance(e, Offered)] == []
    assert len(a.link.sent) == sent  # their numbers are remembered
    assert a.knows(b)


def test_old_processes_that_are_forgotten_get_few_answers() -> None:
    """More of them than are remembered, said again for ten minutes, 20 times a second."""
    broker, a, b = two()
    wanting(a, b)
    for _ in range(20):
        broker.run(3.0)
        b.restart()
    broker.run(10.0)
    a.want(b.key, False)
    b.want(a.key, False)
    recorded = [p for p in broker.seen if p.topic in a.meeting.topics()]
    broker.run(100.0)
    broker.detach(b.link)
    heard, sent = len(a.events), len(a.link.sent)
    for number in range(12000):
        word = recorded[number % len(recorded)]
        broker.distribute(word.topic, word.payload)
        broker.run(0.05)
    assert [e for _, e in a.events[heard:] if isinstance(e, Offered)] == []
    assert 0 < len(a.link.sent) - sent <= 600 * STRANGE_PER_SECOND + 10


def test_a_late_word_of_the_process_before_is_not_fresh() -> None:
    """One nonce, two processes that answer it: the second to arrive may be the older one."""
    broker, a, b = two()
    held: list[Publication] = []

    def hold(publication: Publication) -> list[Publication]:
        if publication.topic in a.meeting.topics() and not held:
            held.append(publication)
            return []
        return [publication]

    broker.meddle = hold
    a.want(b.key, True)
    broker.run(0.1)
    old = b.boot_id
    b.restart()
    b.want(a.key, True)
    broker.run_until(lambda: a.knows(b), 3.0)
    broker.distribute(held[0].topic, held[0].payload)
    broker.run(5.0)
    assert all(event.boot_id != old for event in a.fresh[b.key])
    assert a.knows(b)


def test_a_last_will_slows_the_questions_down() -> None:
    broker, a, b = two()
    wanting(a, b)
    broker.run(5.0)
    b.stop()
    broker.run(1.0)
    assert a.events[-1][1] == PresenceChanged(b.key, False)
    a.new_offer()
    broker.run(0.1)
    sent = len(a.link.sent)
    broker.run(0.85 * LAST_PAUSE)
    assert len(a.link.sent) == sent
    broker.run(0.4 * LAST_PAUSE)
    assert len(a.link.sent) == sent + 1
    b.start()
    broker.run_until(lambda: a.knows(b), 1.0)
    assert PresenceChanged(b.key, True) in [event for _, event in a.events]


def test_a_goodbye_is_no_will() -> None:
    broker, a, b = two()
    wanting(a, b)
    broker.run(5.0)
    b.link.drop(graceful=True)
    broker.run(5.0)
    assert not any(isinstance(event, PresenceChanged) for _, event in a.events)


def test_a_will_cannot_be_made_up() -> None:
    """Every peer learns the topic; the payload is known to its owner and the broker."""
    broker, a, b = two()
    wanting(a, b)
    broker.run(5.0)
    for payload in (b"", bytes(16), bytes(4096), b.meeting.will[0].encode()):
        broker.publish(b.meeting.will[0], payload)
    broker.run(1.0)
    assert not any(isinstance(event, PresenceChanged) for _, event in a.events)


def test_the_same_seed_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        party = Party(FIRST)
        party.live(10.0)
        stories.append([(p.at, p.topic, len(p.payload)) for p in party.broker.seen])
    assert stories[0] == stories[1]
