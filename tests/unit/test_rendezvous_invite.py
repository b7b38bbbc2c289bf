"""Both ends of a join, message by message; `tests/sim/test_invite.py` has a network."""

from __future__ import annotations

import itertools
import random
from ipaddress import IPv4Interface, IPv4Network

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import Endpoint
from tunnel.identity import Identity
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.invite import (
    DELIVERY_PATIENCE,
    LIFETIME,
    MAX_FAILURES,
    Burnt,
    CodeError,
    Invitation,
    InviteCode,
    JoinAsked,
    Joining,
    Reason,
    Refused,
    State,
    TurnServer,
    Welcome,
    Welcomed,
    Wishes,
)
from tunnel.rendezvous.join_messages import (
    Answer,
    Join,
    Thanks,
    encode_answer,
    encode_join,
    encode_thanks,
    mac_of,
)
from tunnel.rendezvous.sealing import Speaker

NOW = 7000.0
ALICE, BOB, CAROL = (
    Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2, 3)
)
URLS = ("mqtts://broker.example:8883",)
WISHES = Wishes((inner_address(BOB.public_key.raw),), True, (IPv4Network("192.168.0.0/24"),))
WELCOME = Welcome(
    "alice",
    (inner_address(ALICE.public_key.raw), IPv4Interface("10.88.0.1/32")),
    (IPv4Interface("10.88.0.2/32"),),
    URLS,
    (Endpoint("stun.example", 3478),),
    (TurnServer("turns:turn.example", "user", "correct horse"),),
    (IPv4Network("10.0.0.0/8"),),
)


def inviting(now: float = NOW, seed: int = 1) -> Invitation:
    invitation = Invitation(ALICE, URLS, now=now, rng=random.Random(seed))
    invitation.connected(now)
    return invitation


def joining(
    code: str, identity: Identity = BOB, *, name: str = "bob", seed: int = 2, now: float = NOW
) -> Joining:
    parsed = InviteCode.parse(code)
    made = Joining(identity, parsed, name=name, wishes=WISHES, rng=random.Random(seed))
    made.connected(now)
    return made


def failing(invitation: Invitation, identity: Identity = CAROL, seed: int = 3) -> tuple[str, bytes]:
    """A join, sealed and signed as it should be, of somebody who does not know the secret."""
    (topic,) = invitation.topics()
    speaker = Speaker(identity)
    key, inviter = identity.public_key.raw, ALICE.public_key.raw
    nonce = random.Random(seed).randbytes(16)
    join = Join(key, nonce, mac_of(bytes(16), inviter, key, nonce), "carol", WISHES)
    return topic, speaker.seal(inviter, b"martlet/1 join " + topic.encode(), encode_join(join))


def carry(one: Invitation | Joining, other: Invitation | Joining, now: float = NOW) -> int:
    messages = one.messages_to_send(now)
    for message in messages:
        if message[0] in other.topics():
            other.receive(*message, now)
    return len(messages)


def events(one: Invitation | Joining) -> list[object]:
    found: list[object] = []
    while (event := one.next_event()) is not None:
        found.append(event)
    return found


def asked() -> tuple[Invitation, Joining]:
    invitation = inviting()
    joiner = joining(invitation.code)
    carry(joiner, invitation)
    assert events(invitation) == [JoinAsked(BOB.public_key.raw, "bob", WISHES)]
    return invitation, joiner


def welcomed() -> tuple[Invitation, Joining]:
    invitation, joiner = asked()
    invitation.answer(WELCOME, NOW)
    carry(invitation, joiner)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]
    return invitation, joiner


# as it should be


def test_a_host_joins() -> None:
    invitation, joiner = welcomed()
    assert events(invitation) == []
    carry(joiner, invitation)
    assert events(invitation) == [Burnt(Reason.USED, delivered=True)]
    assert invitation.get_timer() is None
    assert joiner.get_timer() is None


def test_a_code_names_inviter_and_brokers() -> None:
    code = InviteCode.parse(inviting().code)
    assert (code.inviter, code.urls) == (ALICE.public_key.raw, URLS)
    assert inviting(seed=1).code != inviting(seed=2).code


def test_the_topics_of_two_invitations_differ() -> None:
    assert inviting(seed=1).topics() != inviting(seed=2).topics()


def test_nothing_is_said_without_a_broker() -> None:
    invitation = inviting()
    joiner = joining(invitation.code)
    joiner.disconnected(NOW)
    assert joiner.messages_to_send(NOW + 10.0) == []
    assert joiner.get_timer() is None
    joiner.connected(NOW + 10.0)
    assert carry(joiner, invitation, NOW + 10.0) == 1
    invitation.disconnected(NOW + 10.0)
    invitation.answer(WELCOME, NOW + 10.0)
    assert invitation.messages_to_send(NOW + 10.0) == []
    invitation.connected(NOW + 11.0)
    assert carry(joiner, invitation, NOW + 11.0) == 1  # it asks again, and is answered
    carry(invitation, joiner, NOW + 11.0)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]


def test_a_joiner_pauses_ever_longer() -> None:
    joiner = joining(inviting().code)
    times: list[float] = []
    while len(times) < 10:
        timer = joiner.get_timer()
        assert timer is not None
        joiner.handle_timer(timer)
        times += [timer] * len(joiner.messages_to_send(timer))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 8, 8, 8, 8], rel=0.11)


def test_the_wait_for_thanks_ends() -> None:
    invitation, _ = welcomed()
    assert invitation.get_timer() == NOW + DELIVERY_PATIENCE
    invitation.handle_timer(NOW + DELIVERY_PATIENCE)
    assert events(invitation) == [Burnt(Reason.USED, delivered=False)]


def test_a_lost_welcome_is_said_again_even_after_that() -> None:
    invitation, joiner = asked()
    invitation.answer(WELCOME, NOW)
    invitation.messages_to_send(NOW)  # lost
    now = NOW + DELIVERY_PATIENCE + 1000.0
    carry(joiner, invitation, now)
    carry(invitation, joiner, now)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]
    assert events(invitation) == [Burnt(Reason.USED)]


def test_a_joiner_that_starts_again_with_its_key_is_welcome_again() -> None:
    invitation, _ = welcomed()
    again = joining(invitation.code, seed=99)
    carry(again, invitation)
    carry(invitation, again)
    assert events(again) == [Welcomed(ALICE.public_key.raw, WELCOME)]


def test_a_question_while_the_first_is_decided_is_none() -> None:
    invitation, _ = asked()
    again = joining(invitation.code, seed=99)
    carry(again, invitation)
    assert events(invitation) == []
    invitation.answer(WELCOME, NOW)
    carry(invitation, again)  # its nonce is the latest
    assert events(again) == [Welcomed(ALICE.public_key.raw, WELCOME)]


def test_an_invitation_that_was_asked_in_time_does_not_expire() -> None:
    invitation, joiner = asked()
    now = NOW + LIFETIME + 1.0
    invitation.handle_timer(now)
    invitation.answer(WELCOME, now)
    carry(invitation, joiner, now)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]


# who does not get in


def test_expired() -> None:
    invitation = inviting()
    now = NOW + LIFETIME
    assert invitation.get_timer() == now
    joiner = joining(invitation.code, now=now)
    carry(joiner, invitation, now)
    carry(invitation, joiner, now)
    assert events(invitation) == [Burnt(Reason.EXPIRED)]
    assert events(joiner) == [Refused(Reason.EXPIRED)]
    assert joiner.get_timer() is None


def test_until_the_last_moment() -> None:
    invitation = inviting()
    joiner = joining(invitation.code, now=NOW + LIFETIME - 0.001)
    carry(joiner, invitation, NOW + LIFETIME - 0.001)
    assert isinstance(invitation.next_event(), JoinAsked)


def test_used() -> None:
    invitation, joiner = welcomed()
    carry(joiner, invitation)
    late = joining(invitation.code, CAROL, name="carol")
    carry(late, invitation)
    carry(invitation, late)
    assert events(late) == [Refused(Reason.USED)]
    assert events(invitation) == [Burnt(Reason.USED, True)]


@pytest.mark.parametrize("decided", [False, True])
def test_of_two_the_first_wins(decided: bool) -> None:
    invitation, first = asked()
    if decided:
        invitation.answer(WELCOME, NOW)
    second = joining(invitation.code, CAROL, name="carol")
    carry(second, invitation)
    if not decided:
        invitation.answer(WELCOME, NOW)
    for topic, payload in invitation.messages_to_send(NOW):
        first.receive(topic, payload, NOW)
        second.receive(topic, payload, NOW)
    assert events(first) == [Welcomed(ALICE.public_key.raw, WELCOME)]
    assert events(second) == [Refused(Reason.USED)]


def test_refused() -> None:
    invitation, joiner = asked()
    invitation.refuse("there is no address left", NOW)
    carry(invitation, joiner)
    assert events(joiner) == [Refused(Reason.REFUSED, "there is no address left")]
    assert events(invitation) == [Burnt(Reason.REFUSED)]
    with pytest.raises(ValueError, match="nobody asks"):
        invitation.answer(WELCOME, NOW)
    other = joining(invitation.code, CAROL)
    carry(other, invitation)
    carry(invitation, other)
    assert events(other) == [Refused(Reason.REFUSED)]


def test_five_failures() -> None:
    invitation = inviting()
    assert MAX_FAILURES == 5
    for n in range(MAX_FAILURES):
        assert invitation.state is State.OPEN
        invitation.receive(*failing(invitation, seed=n), NOW + n)
    assert events(invitation) == [Burnt(Reason.FAILED)]
    assert (
        invitation.messages_to_send(NOW + 5.0) == []
    )  # who does not know the secret hears nothing
    right = joining(invitation.code)
    carry(right, invitation, NOW + 6.0)
    carry(invitation, right, NOW + 6.0)
    assert events(right) == [Refused(Reason.FAILED)]


def test_four_failures_are_no_five() -> None:
    invitation = inviting()
    for n in range(MAX_FAILURES - 1):
        invitation.receive(*failing(invitation, seed=n), NOW + n)
    carry(joining(invitation.code), invitation)
    assert isinstance(invitation.next_event(), JoinAsked)


def test_failures_do_not_burn_what_somebody_has() -> None:
    invitation, joiner = asked()
    for n in range(20):
        invitation.receive(*failing(invitation, seed=n), NOW + n)
    invitation.answer(WELCOME, NOW + 20.0)
    carry(invitation, joiner, NOW + 20.0)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]


def test_an_old_code_leads_nowhere() -> None:
    """It has another topic, so it does not even count as a failure."""
    old, new = inviting(seed=1), inviting(seed=2)
    joiner = joining(old.code)
    for topic, payload in joiner.messages_to_send(NOW):
        assert topic not in new.topics()
        new.receive(topic, payload, NOW)
        (there,) = new.topics()
        new.receive(there, payload, NOW)
    assert new.failures == 0
    assert events(new) == []


def test_a_host_does_not_join_itself() -> None:
    with pytest.raises(CodeError, match="itself"):
        joining(inviting().code, ALICE)


def test_a_code_with_a_key_that_is_none() -> None:
    code = str(InviteCode(b"\x02" + bytes(31), bytes(16), URLS))
    with pytest.raises(CodeError, match="no valid key"):
        joining(code)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä"])
def test_a_bad_name(name: str) -> None:
    with pytest.raises(ValueError):
        joining(inviting().code, name=name)


def test_answers_need_a_question() -> None:
    invitation = inviting()
    with pytest.raises(ValueError, match="nobody asks"):
        invitation.answer(WELCOME, NOW)
    with pytest.raises(ValueError, match="nobody asks"):
        invitation.refuse("", NOW)
    invitation, _ = asked()
    with pytest.raises(ValueError, match="printable"):
        invitation.refuse("\x1b[2J", NOW)
    invitation.answer(WELCOME, NOW)
    with pytest.raises(ValueError, match="nobody asks"):
        invitation.answer(WELCOME, NOW)


def test_a_welcome_that_is_too_long_can_be_mended() -> None:
    invitation, joiner = asked()
    turn = tuple(TurnServer(f"turn:t{n}.example", "u" * 255, "p" * 255) for n in range(4))
    urls = tuple("mqtt://" + "b" * 240 + str(n) for n in range(4))
    routes = tuple(IPv4Network(f"198.51.{n}.0/24") for n in range(32))
    stun = tuple(Endpoint(f"{'s' * 60}.{'s' * 60}.{n}.example", 3478) for n in range(8))
    with pytest.raises(ValueError, match="too long"):
        invitation.answer(
            Welcome(
                "alice",
                WELCOME.addresses,
                rendezvous=urls,
                stun=stun,
                turn=turn,
                routes=routes,
            ),
            NOW,
        )
    invitation.answer(WELCOME, NOW)
    carry(invitation, joiner)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]


# what a broker can do


def test_a_broker_reads_nothing() -> None:
    invitation, joiner = inviting(), joining(inviting().code)
    code = InviteCode.parse(invitation.code)
    seen = joiner.messages_to_send(NOW)
    invitation.receive(*seen[0], NOW)
    invitation.answer(WELCOME, NOW)
    seen += invitation.messages_to_send(NOW)
    joiner.receive(*seen[1], NOW)
    seen += joiner.messages_to_send(NOW)
    assert len(seen) == 3
    secrets = (
        ALICE.public_key.raw,
        BOB.public_key.raw,
        code.secret,
        b"alice",
        b"bob",
        b"10.88.0",
        b"correct horse",
        b"example",
    )
    for topic, payload in seen:
        assert len(payload) % 256 == 0
        for secret in secrets:
            assert secret not in payload
            assert secret.hex() not in topic


@given(st.data())
def test_any_bytes_on_any_topic(data: st.DataObject) -> None:
    invitation, joiner = asked()
    for one in (invitation, joiner):
        for _ in range(4):
            topic = data.draw(st.sampled_from([*invitation.topics(), *joiner.topics(), "#", ""]))
            one.receive(topic, data.draw(st.binary(max_size=600)), NOW)
    assert events(invitation) == events(joiner) == []
    assert invitation.failures == 0


@given(st.integers(0, 511), st.integers(1, 255), st.integers(0, 511))
def test_damaged_messages(position: int, value: int, size: int) -> None:
    invitation = inviting()
    joiner = joining(invitation.code)
    ((topic, payload),) = joiner.messages_to_send(NOW)
    damaged = bytearray(payload)
    damaged[position % len(payload)] ^= value
    invitation.receive(topic, bytes(damaged), NOW)
    invitation.receive(topic, payload[: size % len(payload)], NOW)
    assert events(invitation) == []
    assert invitation.failures == 0
    invitation.receive(topic, payload, NOW)
    invitation.next_event()
    invitation.answer(WELCOME, NOW)
    ((topic, payload),) = invitation.messages_to_send(NOW)
    damaged = bytearray(payload)
    damaged[position % len(payload)] ^= value
    joiner.receive(topic, bytes(damaged), NOW)
    assert events(joiner) == []


def test_a_join_said_again_and_again_is_one() -> None:
    invitation = inviting()
    ((topic, payload),) = joining(invitation.code).messages_to_send(NOW)
    for n in range(1000):
        invitation.receive(topic, payload, NOW + n * 0.01)
    assert len(events(invitation)) == 1
    invitation.answer(WELCOME, NOW + 10.0)
    for n in range(1000):
        invitation.receive(topic, payload, NOW + 10.0 + n * 0.01)
    assert len(invitation.messages_to_send(NOW + 20.0)) <= 1 + 5 + 5 + 1


def test_recorded_refusals_leave_room_for_the_joiner() -> None:
    invitation, joiner = asked()
    invitation.answer(WELCOME, NOW)
    invitation.messages_to_send(NOW)  # lost
    late = joining(invitation.code, CAROL).messages_to_send(NOW)
    now = NOW
    refused = 0
    while refused < 20:  # the last of them has just taken all the budget there was
        now += 0.25
        invitation.receive(*late[0], now)
        refused += len(invitation.messages_to_send(now))
    carry(joiner, invitation, now)
    carry(invitation, joiner, now)
    assert events(joiner) == [Welcomed(ALICE.public_key.raw, WELCOME)]
    assert now - NOW >= (20 - 5) / 0.5, "5 at once, then one in 2 s"


def test_a_flood_is_not_read() -> None:
    for one in (inviting(), joining(inviting().code)):
        (topic,) = one.topics()
        opened: list[int] = []
        one._speaker.unseal = lambda data, o=opened: o.append(1)  # type: ignore
        for n in range(10_000):
            one.receive(topic, bytes(4096), NOW + n * 0.001)
        assert 0 < len(opened) <= 20 + 5 * 10 + 1


def test_an_answer_to_another_question_is_none() -> None:
    """Of an earlier process with the same key, whose invitation had expired."""
    invitation = inviting()
    now = NOW + LIFETIME
    first = joining(invitation.code, seed=5, now=now)
    carry(first, invitation, now)
    ((topic, payload),) = invitation.messages_to_send(now)
    second = joining(inviting(seed=9).code, seed=6, now=now)
    assert topic in second.topics()
    second.receive(topic, payload, now)
    assert events(second) == []
    first.receive(topic, payload, now)
    assert events(first) == [Refused(Reason.EXPIRED)]


def test_nobody_but_the_inviter_answers() -> None:
    """Carol knows the code, and even the joiner's nonce; she has not got the inviter's key."""
    invitation, joiner = asked()
    invitation.answer(WELCOME, NOW)
    ((topic, _),) = invitation.messages_to_send(NOW)
    context = b"martlet/1 answer " + topic.encode()
    body = encode_answer(Answer(joiner._nonce, WELCOME))
    joiner.receive(topic, Speaker(CAROL).seal(BOB.public_key.raw, context, body), NOW)
    assert events(joiner) == []
    joiner.receive(topic, Speaker(ALICE).seal(BOB.public_key.raw, context, body), NOW)
    assert len(events(joiner)) == 1


def test_a_mac_for_one_key_is_worth_nothing_to_another() -> None:
    """Carol got hold of what Bob said, MAC and all, and says it with her own key."""
    invitation = inviting()
    (topic,) = invitation.topics()
    code = InviteCode.parse(invitation.code)
    nonce = bytes(16)
    mac = mac_of(code.secret, code.inviter, BOB.public_key.raw, nonce)
    context = b"martlet/1 join " + topic.encode()
    hers = encode_join(Join(CAROL.public_key.raw, nonce, mac, "carol", WISHES))
    invitation.receive(topic, Speaker(CAROL).seal(code.inviter, context, hers), NOW)
    assert events(invitation) == []
    assert invitation.failures == 1
    his = encode_join(Join(BOB.public_key.raw, nonce, mac, "bob", WISHES))
    invitation.receive(topic, Speaker(CAROL).seal(code.inviter, context, his), NOW)
    assert events(invitation) == []  # not signed by Bob
    invitation.receive(topic, Speaker(BOB).seal(code.inviter, context, his), NOW)
    assert len(events(invitation)) == 1


def test_a_key_that_cannot_be_sealed_to_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of mixed order: some signatures by them verify, but they are no X25519 keys."""
    invitation = inviting()
    joiner = joining(invitation.code)

    with monkeypatch.context() as patch:
        patch.setattr(Speaker, "can_reach", lambda *_: False)
        carry(joiner, invitation)
    assert events(invitation) == []
    assert invitation.state is State.OPEN


def test_thanks_of_another_are_none() -> None:
    invitation, _ = welcomed()
    other = joining(invitation.code, CAROL)
    other.messages_to_send(NOW)
    (topic,) = invitation.topics()
    context = b"martlet/1 join " + topic.encode()
    body = encode_thanks(Thanks(CAROL.public_key.raw))
    speaker = Speaker(CAROL)
    invitation.receive(topic, speaker.seal(ALICE.public_key.raw, context, body), NOW)
    assert events(invitation) == []


def test_a_reflection_is_nothing() -> None:
    invitation, joiner = asked()
    for topic, payload in joiner.messages_to_send(NOW + 10.0):
        joiner.receive(topic, payload, NOW + 10.0)
        for back in joiner.topics():
            joiner.receive(back, payload, NOW + 10.0)
    invitation.answer(WELCOME, NOW)
    for topic, payload in invitation.messages_to_send(NOW):
        invitation.receive(topic, payload, NOW)
        for back in invitation.topics():
            invitation.receive(back, payload, NOW)
    assert events(invitation) == events(joiner) == []
    assert invitation.failures == 0
