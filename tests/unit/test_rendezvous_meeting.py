"""Two Meetings word by word, without a network; `tests/sim/test_rendezvous.py` has one."""

from __future__ import annotations

import random
from base64 import b64encode

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from nacl.public import SealedBox

from tunnel.ice.candidate import Candidate, Kind
from tunnel.identity import Identity
from tunnel.path.network import Address
from tunnel.rendezvous.meeting import (
    ANSWERS_BURST,
    ASKS_BURST,
    KEPT_NONCES,
    STRANGE_BURST,
    UNPROVEN_BURST,
    WORDS_BURST,
    Meeting,
    Offer,
    Offered,
    PresenceChanged,
)
from tunnel.rendezvous.messages import Word, decode, encode
from tunnel.rendezvous.sealing import MAX_MESSAGE, Speaker

NOW = 5000.0
ALICE, BOB, CAROL = (
    Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2, 3)
)
HOME = "198.51.100.23"
NO_KEY = b"\x02" + bytes(31)


def key_of(identity: Identity) -> bytes:
    return identity.public_key.raw


def offer(generation: int = 1, name: str = "ufragalice") -> Offer:
    address = Address(HOME, 4000 + generation % 1000)
    return Offer(name, name * 2, generation, (Candidate(address, Kind.HOST, 0, False),))


def meeting(identity: Identity, *peers: bytes, boot: int = 1, seed: int = 1) -> Meeting:
    made = Meeting(identity, peers, boot_id=bytes([boot]) * 16, rng=random.Random(seed))
    for peer in peers:
        made.tell(peer, offer(), NOW)
    made.connected(NOW)
    return made


def alice(boot: int = 1) -> Meeting:
    return meeting(ALICE, key_of(BOB), boot=boot, seed=11)


def bob(boot: int = 1) -> Meeting:
    return meeting(BOB, key_of(ALICE), boot=boot, seed=12)


def ask(one: Meeting, peer: bytes, now: float = NOW) -> tuple[str, bytes]:
    """The first word of a new round."""
    one.want(peer, False, now)
    one.want(peer, True, now)
    (message,) = one.messages_to_send(now)
    return message


def answers(one: Meeting, message: tuple[str, bytes], now: float = NOW) -> list[tuple[str, bytes]]:
    one.receive(*message, now)
    return one.messages_to_send(now)


def settle(one: Meeting, other: Meeting, now: float = NOW) -> int:
    """Carry messages until there are none; how many there were."""
    count = 0
    while True:
        messages = one.messages_to_send(now)
        count += len(messages)
        for message in messages:
            other.receive(*message, now)
        one, other = other, one
        if not messages and not one.messages_to_send(now):
            return count


def offered(one: Meeting) -> list[Offered]:
    events = []
    while (event := one.next_event()) is not None:
        if isinstance(event, Offered):
            events.append(event)
    return events


def word_of(receiver: Identity, sender: Identity, message: tuple[str, bytes]) -> Word:
    context = b"martlet/1 offer " + message[0].encode()
    body = Speaker(receiver).open(key_of(sender), context, message[1])
    assert body is not None
    word = decode(body)
    assert word is not None
    return word


def spoken(
    sender: Identity,
    receiver: Identity,
    *,
    boot: int = 9,
    sequence: int = 1,
    nonce: bytes = bytes(16),
    echo: bytes = b"",
    wanted: bool = True,
    generation: int = 1,
) -> tuple[str, bytes]:
    """Anything that a peer could say, however it came by it."""
    speaker = Speaker(sender)
    topic = speaker.topic(key_of(receiver), key_of(sender), b"offer")
    word = Word(
        bytes([boot]) * 16,
        sequence,
        nonce,
        echo,
        wanted,
        "martlet/1/" + "a" * 26,
        offer(generation),
    )
    context = b"martlet/1 offer " + topic.encode()
    return topic, speaker.seal(key_of(receiver), context, encode(word))


def met() -> tuple[Meeting, Meeting]:
    """Alice and Bob, each of whom has a fresh word of the other; nobody wants anybody any more."""
    a, b = alice(), bob()
    b.receive(*ask(a, key_of(BOB)), NOW)
    settle(b, a)
    a.want(key_of(BOB), False, NOW)
    assert offered(a)[-1].fresh
    assert offered(b)[-1].fresh
    return a, b


# the three words


def test_three_words() -> None:
    a, b = alice(), bob()
    first = ask(a, key_of(BOB))
    (second,) = answers(b, first)
    (third,) = answers(a, second)
    assert answers(b, third) == []
    one, two, three = (
        word_of(BOB, ALICE, first),
        word_of(ALICE, BOB, second),
        word_of(BOB, ALICE, third),
    )
    assert (one.echo, two.echo, three.echo) == (b"", one.nonce, two.nonce)
    assert (one.ask, two.ask, three.ask) == (True, True, False)
    assert [event.fresh for event in offered(a)] == [True]
    assert [event.fresh for event in offered(b)] == [False, True]


def test_an_offer_arrives_as_it_was_told() -> None:
    a, b = alice(boot=7), bob()
    said = offer(3)
    a.tell(key_of(BOB), said, NOW)
    b.receive(*ask(a, key_of(BOB)), NOW)
    assert offered(b) == [Offered(key_of(ALICE), said, bytes([7]) * 16, False)]


def test_without_an_offer_nothing_is_said() -> None:
    a = Meeting(ALICE, [key_of(BOB)], boot_id=bytes(16), rng=random.Random(1))
    b = bob()
    a.connected(NOW)
    a.want(key_of(BOB), True, NOW)
    a.receive(*ask(b, key_of(ALICE)), NOW)
    assert a.messages_to_send(NOW) == []
    assert a.get_timer() is None
    a.tell(key_of(BOB), offer(), NOW)
    assert a.messages_to_send(NOW)


def test_nothing_is_said_without_a_broker() -> None:
    a, b = alice(), bob()
    question = ask(b, key_of(ALICE))
    a.disconnected(NOW)
    a.want(key_of(BOB), True, NOW)
    a.receive(*question, NOW)
    assert a.messages_to_send(NOW + 100.0) == []
    assert a.get_timer() is None
    a.connected(NOW + 100.0)
    assert len(a.messages_to_send(NOW + 100.0)) == 1  # the question, and no answer to an old one


def test_a_nonce_is_renewed_with_each_round_and_with_time() -> None:
    a = alice()
    nonces = [word_of(BOB, ALICE, ask(a, key_of(BOB))).nonce for _ in range(3)]
    now = NOW
    for _ in range(12):
        timer = a.get_timer()
        assert timer is not None
        now = timer
        nonces += [word_of(BOB, ALICE, message).nonce for message in a.messages_to_send(now)]
    assert len(set(nonces[:3])) == 3
    assert len(set(nonces[-4:])) == 4  # a minute apart
    assert len(set(nonces)) < len(nonces)  # within a round and half a minute it stays


def test_telling_and_wanting_the_same_again_does_nothing() -> None:
    a = alice()
    ask(a, key_of(BOB))
    for _ in range(100):
        a.want(key_of(BOB), True, NOW)
        a.tell(key_of(BOB), offer(), NOW)
    assert a.messages_to_send(NOW) == []


def test_who_is_not_wanted_any_more_is_not_asked() -> None:
    a = alice()
    ask(a, key_of(BOB))
    a.want(key_of(BOB), False, NOW)
    assert a.get_timer() is None
    assert a.messages_to_send(NOW + 1000.0) == []


def test_a_word_that_is_late_is_answered_though_it_does_not_ask() -> None:
    """Its sender believes that all is said; we do not know it for certain."""
    _, b = met()
    late = spoken(ALICE, BOB, boot=1, sequence=100, wanted=False)
    assert len(answers(b, late)) == 1
    assert not offered(b)[-1].fresh


def test_the_answer_to_an_earlier_round_does_not_end_this_one() -> None:
    """It is fresh all the same; but it was given before the peer had our news."""
    a, b = alice(), bob()
    (early,) = answers(b, ask(a, key_of(BOB)))
    a.tell(key_of(BOB), offer(2), NOW)
    (news,) = a.messages_to_send(NOW)
    again = a.get_timer()
    a.receive(*early, NOW)
    assert offered(a)[-1].fresh
    a.messages_to_send(NOW)
    assert a.get_timer() == again
    for message in answers(b, news):
        answers(a, message)
    assert (a.get_timer() or 0.0) > (again or 0.0)


def test_an_answer_is_fresh_though_there_was_news_again_and_again() -> None:
    """Candidates come one by one at the start, and some within the round trip of an offer."""
    one, other = alice(), bob()
    (reply,) = answers(other, ask(one, key_of(BOB)))
    left = 0
    for generation in range(2, 30):
        now = NOW + 0.01 * generation
        one.tell(key_of(BOB), offer(generation), now)
        left += len(one.messages_to_send(now))
    assert left < ASKS_BURST
    one.receive(*reply, NOW + 0.3)
    assert [event.fresh for event in offered(one)] == [True]


def test_what_was_asked_before_the_broker_went_is_not_answered_after() -> None:
    a, b = alice(), bob()
    b.receive(*ask(a, key_of(BOB)), NOW)
    b.disconnected(NOW)
    b.connected(NOW)
    assert b.messages_to_send(NOW) == []


def test_news_is_not_for_who_is_not_wanted_any_more() -> None:
    a, _ = met()
    a.tell(key_of(BOB), offer(2), NOW)
    assert a.messages_to_send(NOW) == []


# who the peers are


def test_a_key_that_is_no_point_is_never_met() -> None:
    a = meeting(ALICE, NO_KEY, key_of(BOB))
    a.want(NO_KEY, True, NOW)
    assert a.messages_to_send(NOW) == []
    assert a.status(NO_KEY, NOW)["error"]
    assert a.status(key_of(BOB), NOW)["error"] is None
    assert len(a.topics()) == 1
    a.remove_peer(NO_KEY)
    assert len(a.topics()) == 1


def test_peers_come_and_go() -> None:
    a = alice()
    c = meeting(CAROL, key_of(ALICE), seed=13)
    question = ask(c, key_of(ALICE))
    a.receive(*question, NOW)
    assert a.next_event() is None
    a.add_peer(key_of(CAROL))
    a.add_peer(key_of(CAROL))
    a.tell(key_of(CAROL), offer(), NOW)
    assert len(a.topics()) == 2
    assert len(answers(a, question)) == 1
    a.remove_peer(key_of(CAROL))
    assert len(a.topics()) == 1
    assert a.next_event() is None
    assert answers(a, ask(c, key_of(ALICE), NOW + 1)) == []


def test_a_stranger_is_not_heard() -> None:
    """Carol knows both keys, but is no peer of Alice's."""
    a = alice()
    a.receive(*spoken(CAROL, ALICE), NOW)
    for topic in a.topics():
        a.receive(topic, spoken(CAROL, ALICE)[1], NOW)
    assert a.next_event() is None
    assert a.messages_to_send(NOW) == []


def test_a_peer_cannot_speak_for_another() -> None:
    a = meeting(ALICE, key_of(BOB), key_of(CAROL))
    topics = {Speaker(ALICE).topic(key_of(each), key_of(each), b"offer") for each in (BOB, CAROL)}
    for sender in (BOB, CAROL):
        topic, payload = spoken(sender, ALICE)
        (other,) = topics - {topic}
        a.receive(other, payload, NOW)
    assert a.next_event() is None
    assert a.messages_to_send(NOW) == []


def test_a_peer_cannot_pass_on_what_it_was_told() -> None:
    """Bob seals to Carol what Alice signed for him, and publishes it where Alice speaks to her."""
    c = meeting(CAROL, key_of(ALICE), key_of(BOB))
    opened = Speaker(BOB).unseal(spoken(ALICE, BOB)[1])
    assert opened is not None
    signature, body = opened

    plain = len(body).to_bytes(2) + signature + body
    plain += bytes(-(len(plain) + 48) % 256)
    there = Speaker(CAROL).topic(key_of(ALICE), key_of(ALICE), b"offer")
    c.receive(there, bytes(SealedBox(Speaker(CAROL)._boxing.public_key).encrypt(plain)), NOW)
    assert c.next_event() is None
    assert c.counters["words_refused"] == 1


def test_own_words_come_back() -> None:
    a, b = alice(), bob()
    topic, payload = ask(a, key_of(BOB))
    back = ask(b, key_of(ALICE))[0]
    for each in (topic, back):
        a.receive(each, payload, NOW)
    assert a.next_event() is None
    assert a.messages_to_send(NOW) == []


# what a broker can do


def test_a_word_is_taken_once() -> None:
    a, b = alice(), bob()
    question = ask(a, key_of(BOB))
    assert len(answers(b, question)) == 1
    for n in range(10):
        assert answers(b, question, NOW + n) == []
    assert len(offered(b)) == 1
    assert b.counters["words_repeated"] == 10


def test_older_words_of_a_process_are_nothing() -> None:
    a, b = alice(), bob()
    first, second = ask(a, key_of(BOB)), ask(a, key_of(BOB))
    b.receive(*second, NOW)
    b.receive(*first, NOW)
    assert len(offered(b)) == 1


@given(st.data())
def test_any_bytes_on_any_topic(data: st.DataObject) -> None:
    a = alice()
    topics = [*a.topics(), a.will[0], "", "#", "martlet/1/+", "\x00", "$SYS"]
    for _ in range(5):
        payload = data.draw(st.binary(max_size=600))
        a.receive(data.draw(st.sampled_from(topics)), payload, NOW)
    assert a.next_event() is None
    assert a.messages_to_send(NOW) == []


@given(st.integers(0, 600), st.integers(0, 255))
def test_a_damaged_word_is_nothing(position: int, value: int) -> None:
    b = bob()
    topic, payload = spoken(ALICE, BOB)
    damaged = bytearray(payload)
    damaged[position % len(payload)] ^= value
    b.receive(topic, bytes(damaged), NOW)
    assert bool(offered(b)) == (value == 0)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 4096, 4097, 8192, 1 << 20])
def test_any_size(size: int) -> None:
    b = bob()
    topic, payload = spoken(ALICE, BOB)
    b.receive(topic, (payload * (size // len(payload) + 1))[:size], NOW)
    assert b.next_event() is None


class Counting:
    """Counts what costs: seals that are opened."""

    def __init__(self, one: Meeting) -> None:
        self.opened = 0
        self._speaker = one._speaker
        one._speaker = self  # type: ignore[assignment]

    def open(self, peer: bytes, context: bytes, data: bytes) -> bytes | None:
        self.opened += 1
        return self._speaker.open(peer, context, data)

    def seal(self, peer: bytes, context: bytes, body: bytes) -> bytes:
        return self._speaker.seal(peer, context, body)


def test_a_flood_is_not_read() -> None:
    b = bob()
    counting = Counting(b)
    (topic,) = b.topics()
    for n in range(10_000):
        b.receive(topic, bytes(4096), NOW + n * 1e-3)
    assert counting.opened <= WORDS_BURST + 5.0 * 10 + 1
    assert b.messages_to_send(NOW + 10.0) == []


def test_a_flood_on_one_topic_is_none_on_another() -> None:
    b = meeting(BOB, key_of(ALICE), key_of(CAROL))
    (topic,) = (Speaker(BOB).topic(key_of(CAROL), key_of(CAROL), b"offer"),)
    for _ in range(1000):
        b.receive(topic, bytes(512), NOW)
    assert len(answers(b, ask(alice(), key_of(BOB)))) == 1


def test_a_peer_that_asks_without_end_gets_few_answers() -> None:
    """Authentic, of one process, every number higher than the last."""
    _, b = met()
    before = b.counters["offers_sent"]
    for n in range(1000):
        b.receive(*spoken(ALICE, BOB, boot=1, sequence=100 + n), NOW + n * 0.01)
        b.messages_to_send(NOW + n * 0.01)
    assert b.counters["offers_sent"] - before <= ANSWERS_BURST + 10 + 1


def test_recordings_of_other_processes_take_nothing_from_the_one_that_is_there() -> None:
    a, b = met()
    before = b.counters["offers_sent"]
    for n in range(10):
        b.receive(*spoken(ALICE, BOB, boot=100 + n), NOW)
    assert offered(b) == []
    assert len(b.messages_to_send(NOW)) == 1  # they are answered together
    for n in range(10):
        b.receive(*spoken(ALICE, BOB, boot=110 + n), NOW + 1 + n * 0.1)
        b.messages_to_send(NOW + 1 + n * 0.1)
    assert b.counters["offers_sent"] - before <= STRANGE_BURST + 2
    question = ask(a, key_of(BOB), NOW + 3.0)
    echoes = [word_of(ALICE, BOB, each).echo for each in answers(b, question, NOW + 3.0)]
    assert word_of(BOB, ALICE, question).nonce in echoes
    assert len(offered(b)) == 1


def test_recordings_do_not_put_our_questions_off() -> None:
    a, _ = met()
    ask(a, key_of(BOB))
    due = a.get_timer()
    for n in range(3):
        assert answers(a, spoken(BOB, ALICE, boot=100 + n))
    assert a.get_timer() == due


def test_recordings_are_worth_little_to_who_knows_nothing_yet() -> None:
    b = bob()
    for n in range(20):
        b.receive(*spoken(ALICE, BOB, boot=100 + n), NOW)
    assert len(offered(b)) == UNPROVEN_BURST
    for n in range(20):
        b.receive(*spoken(ALICE, BOB, boot=120 + n), NOW + 100.0)
    assert len(offered(b)) <= UNPROVEN_BURST


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5), st.booleans()), max_size=60))
def test_what_was_never_echoed_is_never_fresh(words: list[tuple[int, int, bool]]) -> None:
    """Whatever boots, numbers and echoes somebody combines who does not know the nonce."""
    b = bob()
    for n, (boot, sequence, wanted) in enumerate(words):
        echo = bytes([n]) * 16 if n % 2 else b""
        message = spoken(ALICE, BOB, boot=boot, sequence=sequence, echo=echo, wanted=wanted)
        b.receive(*message, NOW + n)
        b.messages_to_send(NOW + n)
    assert not any(event.fresh for event in offered(b))
    assert b.counters["offers_sent"] <= len({boot for boot, _, _ in words}) * 6


def test_memory_of_processes_is_bounded() -> None:
    _, b = met()
    for n in range(2, 250):
        b.receive(*spoken(ALICE, BOB, boot=n), NOW + n)
        b.messages_to_send(NOW + n)
    (peer,) = b._peers.values()
    assert len(peer.heard) <= 8
    assert peer.boot_id in peer.heard  # never the one that is there
    assert len(peer.nonces) <= KEPT_NONCES
    assert not b._events or len(b._events) < 10


def test_a_flapping_network_does_not_flood_the_broker() -> None:
    a = alice()
    for n in range(1000):
        now = NOW + n * 0.01
        a.tell(key_of(BOB), offer(n + 2), now)
        a.want(key_of(BOB), n % 2 == 0, now)
        if n % 10 == 0:
            a.disconnected(now)
            a.connected(now)
        a.messages_to_send(now)
    assert 0 < a.counters["offers_sent"] <= ASKS_BURST + 10 + 1


def test_a_number_at_the_end_of_all_numbers() -> None:
    b = bob()
    b.receive(*spoken(ALICE, BOB, sequence=2**63 - 1), NOW)
    assert len(offered(b)) == 1


# the last will


def test_wills_differ_with_each_start() -> None:
    one, other = alice(), meeting(ALICE, key_of(BOB), seed=99)
    assert one.will != other.will
    assert one.will[0] != other.will[0]


def test_a_will_is_heard_by_who_knows_the_process() -> None:
    a, b = met()
    assert b.will[0] in a.topics()
    a.receive(*b.will, NOW)
    a.receive(*b.will, NOW)
    assert a.next_event() == PresenceChanged(key_of(BOB), False)
    assert a.next_event() is None
    assert not a.status(key_of(BOB), NOW)["present"]
    settle(b, a)
    a.receive(*ask(b, key_of(ALICE)), NOW)
    settle(a, b)
    assert a.next_event() is not None
    assert a.status(key_of(BOB), NOW)["present"]


def test_a_will_of_an_unproven_process_is_not_subscribed_to() -> None:
    b = bob()
    b.receive(*spoken(ALICE, BOB), NOW)
    assert len(b.topics()) == 1


def test_another_connection_takes_the_hint_back() -> None:
    a, b = met()
    a.receive(*b.will, NOW)
    assert a.next_event() == PresenceChanged(key_of(BOB), False)
    a.disconnected(NOW)
    a.connected(NOW)
    assert a.next_event() == PresenceChanged(key_of(BOB), True)


# what can be read


def test_a_broker_reads_nothing() -> None:
    """All topics and payloads of two ends that meet: no key, no address, no name, no process."""
    a, b = alice(boot=0x41), bob(boot=0x42)
    secrets = [
        key_of(ALICE),
        key_of(BOB),
        b"A" * 16,
        b"B" * 16,
        HOME.encode(),
        b"ufragalice",
        b"candidates",
        a.will[0].encode(),
        b.will[0].encode(),
    ]
    forms = [form for s in secrets for form in (s, b64encode(s)[:-2], s.hex().encode())]
    a.want(key_of(BOB), True, NOW)
    b.want(key_of(ALICE), True, NOW)
    seen: list[tuple[str, bytes]] = []
    for _ in range(4):
        for one, other in ((a, b), (b, a)):
            for message in one.messages_to_send(NOW):
                seen.append(message)
                other.receive(*message, NOW)
    assert len(seen) >= 3
    assert a.counters["offers_received"] and b.counters["offers_received"]
    for topic, payload in seen:
        assert len(payload) % 256 == 0
        assert len(payload) <= MAX_MESSAGE
        for form in forms:
            assert form not in payload
            assert form.lower() not in topic.encode().lower()
    payloads = [payload for _, payload in seen]
    for one_payload in payloads:
        for other_payload in payloads:
            if one_payload is not other_payload:
                assert one_payload[:32] != other_payload[:32]
                assert one_payload[-32:] != other_payload[-32:]


def test_the_most_there_is_to_tell_fits() -> None:
    full = tuple(
        Candidate(Address(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:x}", 65535), Kind.RELAY, 255, True)
        for n in range(0xF000, 0xF020)
    )
    a, b = alice(), bob()
    said = Offer("u" * 64, "p" * 64, 2**63 - 1, full)
    a.tell(key_of(BOB), said, NOW)
    b.receive(*ask(a, key_of(BOB)), NOW)
    assert offered(b)[0].offer == said
