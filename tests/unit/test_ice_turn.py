"""An allocation against a scripted server, on a fake clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from aioice import stun
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.turn_server import PASSWORD, RELAYED, RELAYED6, USER, ScriptedServer
from tunnel.ice.turn import (
    CHANNEL_LIFE,
    CHANNEL_REFRESH,
    CHANNEL_REST,
    DOUBT,
    FIRST_RTO,
    FORBIDDEN_MEMORY,
    MAX_CHANNELS,
    MAX_NONCE,
    MAX_PERMISSIONS,
    PATIENCE,
    PERMISSION_REFRESH,
    QUIET,
    REFRESH_SHARE,
    STALE_LIMIT,
    TRANSITIONS,
    TRIES,
    Allocated,
    Allocation,
    Ended,
    Received,
    State,
    TurnEvent,
)
from tunnel.ice.turn_message import (
    ERRORS,
    FIRST_CHANNEL,
    FramingError,
    Problem,
    channel_data,
    cut,
    explain,
)
from tunnel.path.network import Address

PEER, OTHER = Address("198.51.100.1", 4117), Address("198.51.100.2", 4117)
SIX = Address("2001:db8::1", 4117)
DELAY = 0.02  # seconds, each way


class Net:
    """A client and a server, DELAY apart. `lose` says which messages, either way, never arrive."""

    def __init__(
        self,
        *,
        ipv6: bool = False,
        stream: bool = False,
        user: str | None = USER,
        password: str = PASSWORD,
    ) -> None:
        self.server = ScriptedServer(stream=stream)
        self.client = Allocation(
            username=user, password=password, ipv6=ipv6, stream=stream, rng=random.Random(1)
        )
        self.now = 100.0
        self.lose: Callable[[bytes], bool] = lambda data: False
        self.events: list[TurnEvent] = []
        self.said = 0
        """Messages of the client."""
        self._wire: list[tuple[float, bool, bytes]] = []

    def start(self) -> Net:
        self.client.start(self.now)
        return self

    def ready(self) -> Net:
        """Started, and allocated."""
        self.start().run(1.0)
        assert self.client.state is State.READY
        self.events.clear()
        return self

    def send(self, remote: Address = PEER, data: bytes = b"data") -> bytes | None:
        message = self.client.wrap(remote, data, self.now)
        self._post()
        if message is not None:
            self._say(message)
        return message

    def peer_sends(self, remote: Address = PEER, data: bytes = b"back") -> None:
        message = self.server.from_peer(remote, data)
        if message is not None:
            self._wire.append((self.now + DELAY, False, message))

    def run(self, seconds: float) -> None:
        """Let that time pass."""
        until = self.now + seconds
        while True:
            self._post()
            timer = self.client.get_timer()
            due = [at for at, _, _ in self._wire]
            due += [max(timer, self.now)] if timer is not None else []
            if not due or min(due) > until:
                break
            self.now = min(due)
            for entry in [entry for entry in self._wire if entry[0] <= self.now]:
                self._wire.remove(entry)
                _, up, data = entry
                if up:
                    answers = self.server.receive(data)
                    self._wire += [(self.now + DELAY, False, a) for a in answers]
                elif not self.lose(data):
                    self.client.receive(data, self.now)
            if timer is not None and timer <= self.now:
                self.client.handle_timer(self.now)
        self.now = until

    def _post(self) -> None:
        for message in self.client.messages_to_send(self.now):
            self._say(message)
        while (event := self.client.next_event()) is not None:
            self.events.append(event)

    def _say(self, message: bytes) -> None:
        self.said += 1
        if not self.lose(message):
            self._wire.append((self.now + DELAY, True, message))


def ended(net: Net) -> Ended:
    (event,) = net.events
    assert isinstance(event, Ended)
    assert net.client.state is State.ENDED
    return event


# ---- asking ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("ipv6", "relayed"), [(False, RELAYED), (True, RELAYED6)])
def test_two_round_trips_make_a_relay(stream: bool, ipv6: bool, relayed: Address) -> None:
    net = Net(ipv6=ipv6, stream=stream).start()
    net.run(4 * DELAY + 0.001)
    assert net.events == [Allocated(relayed)]
    assert net.client.relayed == relayed
    assert net.said == 2


def test_a_server_without_credentials() -> None:
    net = Net(user=None)
    net.server.password = None
    net.start().run(2 * DELAY + 0.001)
    assert net.events == [Allocated(RELAYED)]


@pytest.mark.parametrize("lost", range(4))
def test_the_loss_of_any_message_costs_one_timeout(lost: int) -> None:
    net = Net()
    passed = 0

    def lose(data: bytes) -> bool:
        nonlocal passed
        passed += 1
        return passed == lost + 1

    net.lose = lose
    net.start().run(4 * DELAY + FIRST_RTO + 0.001)
    assert net.events == [Allocated(RELAYED)]
    assert net.server.count(stun.Method.ALLOCATE) <= 3


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_half_of_all_messages_may_be_lost(rng: random.Random) -> None:
    net = Net()
    net.lose = lambda data: rng.random() < 0.3
    net.start().run(60.0)
    assert net.client.state in (State.READY, State.ENDED)
    if net.client.state is State.ENDED:
        assert net.events[-1] == Ended(Problem.NO_ANSWER, "no answer from the server")


def test_a_silent_server_is_given_up() -> None:
    net = Net()
    net.lose = lambda data: True
    net.start().run(9.0)
    assert net.events == []
    assert net.said == TRIES
    net.run(6.0)
    assert ended(net) == Ended(Problem.NO_ANSWER, "no answer from the server")
    assert net.said == TRIES
    assert net.client.get_timer() is None


def test_in_a_stream_nothing_is_repeated() -> None:
    net = Net(stream=True)
    net.lose = lambda data: True
    net.start().run(PATIENCE + 0.1)
    assert net.said == 1
    assert ended(net).problem is Problem.NO_ANSWER


def test_a_far_server_is_not_asked_too_soon_once_it_is_known_to_be_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.unit.test_ice_turn.DELAY", 0.09)
    net = Net().ready()
    said = net.said
    monkeypatch.setattr("tests.unit.test_ice_turn.DELAY", 0.15)  # slower than at first
    net.client.check(net.now)
    net.run(1.0)
    assert net.said == said + 1


# ---- errors, in the user's words ----


def test_a_wrong_password() -> None:
    net = Net(password="sparrow").start()
    net.run(5.0)
    assert ended(net).problem is Problem.CREDENTIALS
    assert "refuses the user name or the password" in ended(net).text
    assert net.said == 2


def test_no_password_where_one_is_needed() -> None:
    net = Net(user=None).start()
    net.run(5.0)
    assert ended(net).problem is Problem.CREDENTIALS
    assert "none are configured" in ended(net).text


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("code", [400, 403, 437, 441, 442, 486, 500, 508])
def test_errors_of_an_allocation(code: int, signed: bool) -> None:
    net = Net()
    net.server.errors[stun.Method.ALLOCATE] = code
    net.server.unsigned = not signed
    net.start().run(20.0)
    assert (ended(net).problem, ended(net).text) == explain(code)
    # What is not signed may be anybody's: it is believed when nothing better comes.
    assert net.said == (2 if signed else 1 + TRIES)


def test_an_unsigned_error_does_not_keep_the_true_answer_out() -> None:
    net = Net()

    def forge(message: stun.Message) -> None:
        if "USERNAME" in message.attributes:
            net.server.unsigned = True
            net.client.receive(net.server.error(message, 486), net.now)

    net.server.on_request = forge
    net.start().run(1.0)
    assert net.events == [Allocated(RELAYED)]


def test_no_relay_of_this_family() -> None:
    net = Net(ipv6=True)
    net.server.ipv6 = False
    net.start().run(1.0)
    assert ended(net).problem is Problem.UNSUPPORTED
    assert "no relays of this address family" in ended(net).text


def test_another_server() -> None:
    net = Net()
    net.server.errors[stun.Method.ALLOCATE] = 300
    net.server.elsewhere = Address("192.0.2.9", 3478)
    net.start().run(1.0)
    assert ended(net).problem is Problem.MOVED
    assert ended(net).elsewhere == Address("192.0.2.9", 3478)


NOWHERE = (Address("0.0.0.0", 1), Address("127.0.0.1", 1))


@pytest.mark.parametrize("relayed", [None, RELAYED6, *NOWHERE])
def test_an_address_that_is_no_good(relayed: Address | None) -> None:
    net = Net()
    net.server.relayed = relayed
    net.start().run(1.0)
    assert ended(net).problem in (Problem.UNSUPPORTED, Problem.REFUSED)
    assert net.client.relayed is None


def test_every_error_has_words_and_unknown_ones_their_number() -> None:
    for code in range(300, 700):
        problem, text = explain(code)
        assert str(code) in text
        assert problem in Problem
    assert len({text for _, text in ERRORS.values()}) == len(ERRORS)


# ---- staying ----


def test_a_stale_nonce_is_replaced() -> None:
    net = Net().ready()
    net.server.nonce = b"nonce-2"
    net.client.check(net.now)
    net.run(1.0)
    assert net.client.state is State.READY
    assert net.server.count(stun.Method.REFRESH) == 2
    net.send()
    net.run(1.0)
    assert net.server.count(stun.Method.CREATE_PERMISSION) == 1  # with the new one at once


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [764, 65500])
def test_a_nonce_that_no_request_could_carry(size: int, stream: bool) -> None:
    net = Net(stream=stream)
    net.server.nonce = b"n" * size
    net.start().run(30)
    assert ended(net).problem is Problem.NO_ANSWER
    assert net.client.refused


def test_a_server_for_which_every_nonce_is_stale() -> None:
    net = Net().ready()

    def renew(message: stun.Message) -> None:
        net.server.nonce += b"+"

    net.server.on_request = renew
    net.client.check(net.now)
    net.run(5.0)
    assert "stale" in ended(net).text
    assert net.server.count(stun.Method.REFRESH) == STALE_LIMIT + 1


def test_a_nonce_without_end_is_none() -> None:
    net = Net()
    net.server.nonce = bytes(MAX_NONCE + 1)
    net.start().run(20.0)
    assert ended(net).problem is Problem.NO_ANSWER


def test_a_password_that_was_changed_at_the_server() -> None:
    net = Net().ready()
    net.server.password = "heron"
    net.client.check(net.now)
    net.run(5.0)
    assert ended(net).problem is Problem.CREDENTIALS


def test_it_is_refreshed_while_there_is_traffic_and_while_there_is_none() -> None:
    net = Net().ready()
    net.run(3600.0)
    assert net.client.state is State.READY
    idle = net.server.count(stun.Method.REFRESH)
    assert 3600 / QUIET * 0.9 <= idle <= 3600 / QUIET
    for _ in range(3600):
        net.send()
        net.peer_sends()
        net.run(1.0)
    busy = net.server.count(stun.Method.REFRESH) - idle
    assert busy <= 3600 / (REFRESH_SHARE * net.server.lifetime) + 1
    assert net.client.state is State.READY


def test_the_end_of_an_allocation_is_noticed_when_it_matters() -> None:
    net = Net().ready()
    net.send()
    net.peer_sends()
    net.run(1.0)
    net.server.restart()
    net.send()
    net.run(DOUBT + 4 * DELAY)
    assert ended(net).problem is Problem.MISMATCH


def test_a_peer_that_does_not_answer_is_no_end() -> None:
    net = Net().ready()
    before = net.server.count(stun.Method.REFRESH)
    for _ in range(60):
        net.send()
        net.run(1.0)
    assert net.client.state is State.READY
    assert net.server.count(stun.Method.REFRESH) - before <= 60 / DOUBT


def test_a_server_that_falls_silent() -> None:
    net = Net().ready()
    net.lose = lambda data: True
    net.run(QUIET + 15.0)
    assert ended(net).problem is Problem.NO_ANSWER


def test_a_short_lifetime_is_kept_and_a_long_sleep_is_not() -> None:
    net = Net()
    net.server.lifetime = 60
    net.ready()
    net.run(600.0)
    assert net.client.state is State.READY
    net.now += 3600.0  # the host slept
    net.run(1.0)
    assert ended(net).problem is Problem.MISMATCH


def test_a_lifetime_of_nothing_is_the_end() -> None:
    net = Net()
    net.server.lifetime = 0
    net.start().run(1.0)
    assert isinstance(net.events[-1], Ended)


def test_closing_gives_the_address_back() -> None:
    net = Net().ready()
    net.client.close(net.now)
    net.run(1.0)
    assert not net.server.allocated
    assert net.server.count(stun.Method.REFRESH) == 1
    assert net.client.get_timer() is None
    assert net.events == []
    net.client.close(net.now)  # again: nothing
    assert net.client.messages_to_send(net.now) == []


# ---- data ----


def test_the_first_datagram_goes_with_the_question_for_the_permission() -> None:
    net = Net().ready()
    net.send(data=b"first")
    net.run(DELAY + 0.001)
    assert net.server.sent == [(PEER, b"first")]
    net.peer_sends(data=b"answer")
    net.run(DELAY + 0.001)
    assert net.events == [Received(PEER, b"answer")]


def test_one_permission_serves_all_ports_of_an_address() -> None:
    net = Net().ready()
    for port in range(1, 9):
        net.send(Address(PEER.host, port))
    net.run(1.0)
    assert net.server.count(stun.Method.CREATE_PERMISSION) == 1
    assert len(net.server.sent) == 8
    net.peer_sends(Address(PEER.host, 999))  # behind a NAT that maps every destination anew
    net.run(1.0)
    assert net.events == [Received(Address(PEER.host, 999), b"back")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_channel(stream: bool) -> None:
    net = Net(stream=stream).ready()
    assert net.client.channel(PEER, net.now) is None
    net.client.bind(PEER, net.now)
    net.run(1.0)
    assert net.client.channel(PEER, net.now) == FIRST_CHANNEL
    assert net.client.remote_of(FIRST_CHANNEL) == PEER
    message = net.send(data=b"odd")
    assert message == b"\x40\x00\x00\x03odd" + b"\0" * stream
    net.run(1.0)
    assert net.server.sent == [(PEER, b"odd")]
    net.peer_sends(data=b"back!")
    net.run(1.0)
    assert net.events == [Received(PEER, b"back!")]


def test_permissions_and_channels_are_renewed_while_they_are_used() -> None:
    net = Net().ready()
    net.client.bind(PEER, net.now)
    for _ in range(3600 // 10):
        net.send()
        net.peer_sends()
        net.run(10.0)
    permissions = net.server.count(stun.Method.CREATE_PERMISSION)
    channels = net.server.count(stun.Method.CHANNEL_BIND)
    assert permissions == pytest.approx(3600 / PERMISSION_REFRESH, abs=1.5)
    assert channels == pytest.approx(3600 / CHANNEL_REFRESH, abs=1.5)
    net.run(2000.0)  # nobody uses them any more
    assert net.server.count(stun.Method.CREATE_PERMISSION) <= permissions + 1
    assert net.server.count(stun.Method.CHANNEL_BIND) <= channels + 1
    assert net.client.channel(PEER, net.now) is None


def test_a_number_rests_before_another_peer_has_it() -> None:
    net = Net().ready()
    net.client.bind(PEER, net.now)
    net.run(2 * CHANNEL_REFRESH + 1)
    assert net.client.remote_of(FIRST_CHANNEL) is None
    for number in range(1, 4):
        net.client.bind(Address(OTHER.host, number), net.now)
    net.run(1.0)
    assert net.client.remote_of(FIRST_CHANNEL) is None
    assert net.client.remote_of(FIRST_CHANNEL + 1) == Address(OTHER.host, 1)
    assert CHANNEL_LIFE + CHANNEL_REST > 600  # RFC 8656 section 12


def test_a_number_that_the_server_knows_otherwise_is_replaced() -> None:
    net = Net().ready()
    net.server.channels[FIRST_CHANNEL] = OTHER
    net.client.bind(PEER, net.now)
    net.run(1.0)
    assert net.client.channel(PEER, net.now) is None
    net.run(FORBIDDEN_MEMORY)
    net.client.bind(PEER, net.now)
    net.run(1.0)
    assert net.client.channel(PEER, net.now) not in (None, FIRST_CHANNEL)


def test_a_peer_that_the_server_forbids() -> None:
    net = Net().ready()
    net.server.errors[stun.Method.CREATE_PERMISSION] = 403
    assert net.send() is not None
    net.run(1.0)
    assert net.send() is None
    assert net.send(OTHER) is not None  # another one may be allowed
    net.run(FORBIDDEN_MEMORY + 1)
    del net.server.errors[stun.Method.CREATE_PERMISSION]
    assert net.send() is not None
    net.run(1.0)
    assert net.server.sent[-1] == (PEER, b"data")
    assert net.client.state is State.READY


def test_a_peer_of_the_other_family() -> None:
    assert Net().ready().send(SIX) is None
    assert Net(ipv6=True).ready().send(SIX) is not None
    assert Net(ipv6=True).ready().send(PEER) is None


def test_nothing_is_sent_before_there_is_a_relay_and_after() -> None:
    net = Net()
    assert net.send() is None
    net.start().run(1.0)
    net.server.restart()
    net.client.check(net.now)
    net.run(1.0)
    assert net.client.state is State.ENDED
    assert net.send() is None
    assert net.client.channel(PEER, net.now) is None


def test_there_is_a_limit_to_what_is_remembered() -> None:
    net = Net().ready()
    for n in range(2 * MAX_PERMISSIONS):
        remote = Address(f"198.51.{n // 250}.{n % 250 + 1}", 4117)
        assert (net.client.wrap(remote, b"", net.now) is not None) == (n < MAX_PERMISSIONS)
        net.client.bind(remote, net.now)
        net.run(0.1)
    assert len(net.server.channels) == MAX_CHANNELS


# ---- what is not for us ----


def test_answers_that_are_not_signed_or_signed_by_others_are_ignored() -> None:
    net = Net()
    liar = ScriptedServer()

    def forge(message: stun.Message) -> None:
        if "USERNAME" not in message.attributes:
            return
        for password in ("sparrow", None):
            liar.password = password
            liar.relayed = Address("192.0.2.66", 6666)
            net.client.receive(liar.success(message, {"LIFETIME": 600}), net.now)
            attributes = {"XOR-RELAYED-ADDRESS": ("192.0.2.66", 6666), "LIFETIME": 600}
            net.client.receive(liar.success(message, attributes), net.now)

    net.server.on_request = forge
    net.start().run(1.0)
    assert net.events == [Allocated(RELAYED)]
    assert net.client.refused == 4


def test_data_of_strangers_is_ignored() -> None:
    net = Net().ready()
    indication = stun.Message(
        stun.Method.DATA,
        stun.Class.INDICATION,
        b"x" * 12,
        {"XOR-PEER-ADDRESS": tuple(OTHER), "DATA": b"evil"},
    )
    for data in (bytes(indication), channel_data(FIRST_CHANNEL, b"evil", padded=False)):
        net.client.receive(data, net.now)
        assert net.client.next_event() is None
    assert net.client.refused == 2


@given(st.binary(max_size=200))
def test_garbage_changes_nothing(data: bytes) -> None:
    net = Net().ready()
    net.client.receive(data, net.now)
    net.run(1.0)
    assert net.client.state is State.READY
    assert net.events == []


@given(st.data())
def test_a_mutilated_answer_is_no_answer(data: st.DataObject) -> None:
    net = Net()
    answers: list[bytes] = []
    net.start().run(2 * DELAY + 0.001)
    net.lose = lambda message: not answers.append(message)  # type: ignore[func-returns-value]
    net.run(FIRST_RTO)
    message = bytearray(next(m for m in answers if m[:2] == b"\x00\x03"))
    good = bytearray(net.server.receive(bytes(message))[0])
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] ^= data.draw(st.integers(1, 255))
    net.client.receive(bytes(good), net.now)
    # The fingerprint and the signature cover all of it, but for what comes after the signature.
    assert net.client.state is State.ASKING or place >= len(good) - 8


# ---- framing ----


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 7))
def test_a_stream_is_cut_at_the_right_places(payloads: list[bytes], step: int) -> None:
    stream = b"".join(channel_data(0x4001, payload, padded=True) for payload in payloads)
    found: list[bytes] = []
    buffer = b""
    for at in range(0, len(stream), step):
        buffer += stream[at : at + step]
        messages, used = cut(memoryview(buffer))
        found += map(bytes, messages)
        buffer = buffer[used:]
    assert buffer == b""
    assert found == [channel_data(0x4001, payload, padded=False) for payload in payloads]


@pytest.mark.parametrize("data", [b"SSH-", b"\x00\x01\x00\x03", bytes(8)])
def test_what_is_no_turn_at_all(data: bytes) -> None:
    with pytest.raises(FramingError):
        cut(memoryview(data))


def test_a_state_is_never_left_backwards() -> None:
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.ENDED] == frozenset()
    net = Net().ready()
    with pytest.raises(ValueError, match="cannot go from ready to asking"):
        net.client.start(net.now)
