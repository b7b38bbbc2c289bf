"""The door: silence to strangers, Retry when it is crowded, resets that nobody can forge."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from aioquic.buffer import Buffer
from aioquic.quic.packet import (
    QuicPacketType,
    QuicProtocolVersion,
    encode_long_header_first_byte,
    pull_quic_header,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.world import PORT, World, number_of, numbered
from tests.unit.quic_pair import identity
from tunnel.datapath.engine import Datapath
from tunnel.events import PeerConnecting, PeerRefused
from tunnel.node import RESETS_PER_SECOND, STRANGER_PATIENCE, Node
from tunnel.path.network import Address, PathKey
from tunnel.quic.admission import (
    MAC_LENGTH,
    MAX_HALF_OPEN,
    MIN_INITIAL,
    MIN_RESET_LENGTH,
    RESET_LENGTH,
    RETRY_ABOVE,
    RETRY_LIFETIME,
    Admitted,
    Door,
    Header,
    read_header,
    stateless_reset,
    token_maker,
)
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection

KEY, SECRET = b"k" * 32, b"s" * 16
REMOTE = Address("192.0.2.1", 5000)
DCID, SCID = b"d" * 8, b"s" * 8


def fresh(count: int) -> bytes:
    return random.Random(7).randbytes(count)


def door() -> Door:
    return Door(KEY, SECRET)


def header(token: bytes, dcid: bytes = DCID, *, is_initial: bool = True) -> Header:
    return Header(dcid, True, is_initial, SCID, token)


def judge(
    to: Door,
    head: Header,
    *,
    size: int = MIN_INITIAL,
    half_open: int = 0,
    now: float = 100.0,
    remote: Address = REMOTE,
) -> Admitted | bytes | None:
    return to.judge(head, size, remote, now=now, half_open=half_open, fresh=fresh)


def token(dcid: bytes = DCID) -> bytes:
    return token_maker(KEY)(dcid)


# reading headers


def long_packet(
    kind: QuicPacketType,
    *,
    version: int = QuicProtocolVersion.VERSION_1,
    dcid: bytes = DCID,
    size: int = 1200,
    token: bytes = b"",
) -> bytes:
    buf = Buffer(capacity=2000)
    buf.push_uint8(encode_long_header_first_byte(version, kind, 1))
    buf.push_uint32(version)
    for cid in (dcid, SCID):
        buf.push_uint8(len(cid))
        buf.push_bytes(cid)
    if kind is QuicPacketType.INITIAL:
        buf.push_uint_var(len(token))
        buf.push_bytes(token)
    buf.push_uint16(0x4000 | size - buf.tell() - 2)
    return buf.data + bytes(size - buf.tell())


def test_an_initial() -> None:
    found = read_header(long_packet(QuicPacketType.INITIAL, token=b"token"))
    assert found == Header(DCID, True, True, SCID, b"token")


def test_other_long_packets_are_no_initials() -> None:
    found = read_header(long_packet(QuicPacketType.HANDSHAKE))
    assert found is not None and found.is_long and not found.is_initial


def test_a_short_packet() -> None:
    data = b"\x40" + DCID + bytes(MIN_RESET_LENGTH - 9)
    assert read_header(data) == Header(DCID, is_long=False), "a reset may be this short"
    assert read_header(data[:-1]) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(40),  # STUN
        b"\x14" + bytes(40),  # DTLS
        b"\x80" + bytes(40),  # RTP
        b"\xbf" + bytes(1300),
        long_packet(QuicPacketType.INITIAL, version=QuicProtocolVersion.VERSION_2),
        b"\xc0\x1a\x2a\x3a\x4a" + bytes(1300),  # a version that asks for negotiation
        long_packet(QuicPacketType.INITIAL)[:20],
        b"\xc0\x00\x00\x00\x01\xff" + bytes(1300),  # a connection ID of 255 bytes
    ],
)
def test_anything_else_is_nothing(data: bytes) -> None:
    assert read_header(data) is None


@given(st.binary(max_size=80))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    found = read_header(data)
    assert found is None or data[0] & 0x40


# judging


def test_the_right_mac_is_admitted() -> None:
    assert len(token()) == MAC_LENGTH == 16
    assert judge(door(), header(token())) == Admitted(DCID, None)
    assert judge(door(), header(token() + b"more")) == Admitted(DCID, None)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        bytes(16),
        token()[:15],
        token()[:15] + bytes((token()[15] ^ 1,)),
        token(b"D" * 8),
        token_maker(b"K" * 32)(DCID),
    ],
    ids=["none", "zeros", "short", "one bit", "another connection ID", "another acceptor"],
)
def test_anything_but_the_right_mac_gets_silence(wrong: bytes) -> None:
    for half_open in (0, RETRY_ABOVE, MAX_HALF_OPEN):
        assert judge(door(), header(wrong), half_open=half_open) is None


def test_a_small_datagram_gets_silence() -> None:
    assert judge(door(), header(token()), size=MIN_INITIAL - 1) is None


def test_only_initials_begin_a_handshake() -> None:
    assert judge(door(), header(token(), is_initial=False)) is None


@pytest.mark.parametrize("length", [0, 7, 21])
def test_connection_ids_of_odd_length_get_silence(length: int) -> None:
    dcid = b"d" * length
    assert judge(door(), header(token(dcid), dcid)) is None


@pytest.mark.parametrize("length", [8, 20])
def test_connection_ids_of_allowed_length(length: int) -> None:
    dcid = b"d" * length
    assert judge(door(), header(token(dcid), dcid)) == Admitted(dcid, None)


def retried(to: Door, *, now: float = 100.0) -> Header:
    """The header of the Initial that answers a Retry."""
    answer = judge(to, header(token()), half_open=RETRY_ABOVE, now=now)
    assert isinstance(answer, bytes)
    found = pull_quic_header(Buffer(data=answer), host_cid_length=8)
    assert found.packet_type is QuicPacketType.RETRY
    assert found.destination_cid == SCID
    assert len(answer) < MIN_INITIAL
    return header(found.token, found.source_cid)


def test_a_crowded_door_asks_for_the_address_first() -> None:
    to = door()
    assert isinstance(judge(to, header(token()), half_open=RETRY_ABOVE - 1), Admitted)
    answer = retried(to)
    for half_open in (0, RETRY_ABOVE, MAX_HALF_OPEN - 1):
        found = judge(to, answer, half_open=half_open, now=101.0)
        assert found == Admitted(DCID, answer.destination_cid)


def test_a_full_door_admits_nobody() -> None:
    to = door()
    assert judge(to, retried(to), half_open=MAX_HALF_OPEN, now=101.0) is None


def test_a_retry_token_is_worth_nothing_elsewhere() -> None:
    to = door()
    answer = retried(to)
    for remote in (Address("192.0.2.2", 5000), Address("192.0.2.1", 5001)):
        assert judge(to, answer, remote=remote, now=101.0) is None
    other_cid = header(answer.token, b"x" * 8)
    assert judge(to, other_cid, now=101.0) is None
    assert judge(Door(KEY, b"t" * 16), answer, now=101.0) is None
    for at in range(len(answer.token)):
        broken = bytearray(answer.token)
        broken[at] ^= 1
        assert judge(to, header(bytes(broken), answer.destination_cid), now=101.0) is None


def test_a_retry_token_ages() -> None:
    to = door()
    answer = retried(to, now=100.0)
    assert judge(to, answer, now=100.0 + RETRY_LIFETIME) is not None
    assert judge(to, answer, now=100.1 + RETRY_LIFETIME) is None
    assert judge(to, answer, now=99.0) is None


@pytest.mark.parametrize("trigger", [29, 30, RESET_LENGTH, RESET_LENGTH + 1, 1472])
def test_a_stateless_reset_looks_like_a_short_packet(trigger: int) -> None:
    """And is shorter than what provoked it, so that no loop arises."""
    for seed in range(50):
        reset = stateless_reset(b"T" * 16, trigger, random.Random(seed).randbytes)
        assert reset is not None
        assert MIN_RESET_LENGTH <= len(reset) <= RESET_LENGTH
        assert len(reset) < trigger
        assert reset[-16:] == b"T" * 16
        assert reset[0] & 0xC0 == 0x40


@pytest.mark.parametrize("trigger", [1, 16, MIN_RESET_LENGTH])
def test_too_little_for_a_reset(trigger: int) -> None:
    assert MIN_RESET_LENGTH == 21  # RFC 9000 section 10.3
    assert stateless_reset(b"T" * 16, trigger, fresh) is None


# nodes

OUTSIDE = PathKey(Address("192.168.2.10", PORT), Address("203.0.113.50", 999))


def first_initial(world: World, *, with_mac: bool = True) -> bytes:
    """What somebody sends who dials b, knowing its public key or not."""
    target = world.b.identity.public_key.raw
    connection = PeerConnection(
        configuration=connection_configuration(
            identity(9), is_client=True, keylog=None, quic_logger=None
        ),
        path=OUTSIDE,
        datapath=Datapath(),
        accepts=lambda key: key == target,
        reset_token=lambda cid: bytes(16),
        initial_token=token_maker(target) if with_mac else None,
    )
    connection.dial(world.now)
    data, _ = connection.datagrams_to_send(world.now)[0]
    assert len(data) >= MIN_INITIAL
    return data


@pytest.fixture
def world() -> World:
    """Only b runs, and nobody talks to it yet."""
    made = World(3)
    made.boot("b")
    made.run(1.0)
    return made


def sessions(node: Node) -> int:
    return len(node._owners)


def test_a_first_initial_without_the_mac_gets_silence(world: World) -> None:
    node = world.b.node
    before = dict(node._by_cid)
    node.receive_datagram(first_initial(world, with_mac=False), OUTSIDE, world.now)
    assert node.datagrams_to_send(world.now) == []
    assert (sessions(node), node._by_cid) == (0, before)
    assert node.next_event() is None or world.b.events
    assert node.counters["strangers"] == 1
    timer = node.get_timer()
    assert timer is None or timer > world.now


def test_the_same_initial_with_the_mac_gets_an_answer(world: World) -> None:
    node = world.b.node
    data = first_initial(world)
    node.receive_datagram(data, OUTSIDE, world.now)
    answers = node.datagrams_to_send(world.now)
    assert answers and all(key == OUTSIDE for key, _ in answers)
    assert sum(len(answer) for _, answer in answers) <= 3 * len(data)
    assert sessions(node) == 1
    assert node.counters["strangers"] == 0


@pytest.mark.parametrize("change", ["flip", "truncate", "version"])
def test_a_damaged_initial_gets_silence(world: World, change: str) -> None:
    data = bytearray(first_initial(world))
    if change == "flip":
        data[7] ^= 1  # in the connection ID that the MAC covers
    elif change == "truncate":
        data = data[: MIN_INITIAL - 1]
    else:
        data[1:5] = b"\x1a\x2a\x3a\x4a"
    node = world.b.node
    node.receive_datagram(bytes(data), OUTSIDE, world.now)
    assert node.datagrams_to_send(world.now) == []
    assert sessions(node) == 0


def test_half_open_handshakes_are_bounded_in_number(world: World) -> None:
    node = world.b.node
    rng = random.Random(5)
    out = 0
    for index in range(RETRY_ABOVE + 20):
        path = OUTSIDE._replace(remote=Address(f"203.0.113.{rng.randrange(1, 255)}", 1000 + index))
        data = first_initial(world)
        node.receive_datagram(data, path, world.now)
        answers = node.datagrams_to_send(world.now)
        assert sum(len(answer) for _, answer in answers) <= 3 * len(data)
        out += bool(answers)
    assert sessions(node) == RETRY_ABOVE
    assert node.counters["retries"] == 20
    assert out == RETRY_ABOVE + 20


def test_half_open_handshakes_are_bounded_in_age(world: World) -> None:
    node = world.b.node
    node.receive_datagram(first_initial(world), OUTSIDE, world.now)
    world.pump(world.b)
    world.run(STRANGER_PATIENCE - 0.1)
    assert sessions(node) == 1
    wakeups = 0
    handle_timer = node.handle_timer

    def counted(now: float) -> None:
        nonlocal wakeups
        wakeups += 1
        assert wakeups < 1000, "a timer spins"
        handle_timer(now)

    node.handle_timer = counted  # type: ignore[method-assign]
    world.run(5.0)
    assert sessions(node) == 0
    assert not [cid for cid, session in node._by_cid.items()]


def test_crowded_the_handshake_takes_a_retry_and_succeeds() -> None:
    world = World(4)
    world.boot("b")
    for index in range(RETRY_ABOVE):
        path = OUTSIDE._replace(remote=Address("203.0.113.50", 1000 + index))
        world.b.node.receive_datagram(first_initial(world), path, world.now)
    world.boot("a")
    took = world.run_until(lambda: world.both_up, 2.0)
    assert world.b.node.counters["retries"] >= 1
    assert took >= 3 * 2 * world.delay, "the Retry costs a round trip"
    world.send("a", numbered("a", 1))
    world.run(0.1)
    assert [number_of(packet) for _, packet in world.b.received] == [1]


def test_not_crowded_there_is_no_retry() -> None:
    world = World(4)
    world.boot()
    world.run_until(lambda: world.both_up, 1.0)
    assert world.b.node.counters["retries"] == 0


def test_ones_own_key_dialling_in_is_refused() -> None:
    world = World(6)
    world.a.identity = world.b.identity
    world.boot()
    for _ in range(200):
        world.run(0.01)
        assert world.state("b") == "connecting"
        assert all(owner is None for owner in world.b.node._owners.values())
    assert [event for _, event in world.a.events if isinstance(event, PeerRefused)]


def test_a_stranger_is_refused_by_name_of_nobody() -> None:
    world = World(6)
    world.a.identity = identity(77)
    world.boot()
    world.run(3.0)
    refusals = [event for _, event in world.b.events if isinstance(event, PeerRefused)]
    assert refusals and all(event.peer is None for event in refusals)
    assert world.state("a") == world.state("b") == "connecting"


# stateless resets


@pytest.fixture
def up() -> Iterator[World]:
    made = World(8)
    made.boot()
    made.run_until(lambda: made.both_up, 2.0)
    made.run(1.0)
    for host in made.hosts.values():
        host.events.clear()
    yield made


def short_packet(cid: bytes, size: int = 100) -> bytes:
    return b"\x40" + cid + bytes(size - 1 - len(cid))


def reset_of(token: bytes, trigger: int = 100) -> bytes:
    reset = stateless_reset(token, trigger, random.Random(1).randbytes)
    assert reset is not None
    return reset


def held_token(world: World) -> bytes:
    """The token of the connection ID that a sends with to b."""
    session = world.peer("a").session
    assert session is not None
    tokens = session.connection.peer_reset_tokens()
    assert tokens
    return next(iter(tokens))


def lost(world: World) -> bool:
    world.pump(world.a)
    return any(isinstance(event, PeerConnecting) for _, event in world.a.events)


@pytest.mark.parametrize("trigger", [29, 100])
def test_a_reset_with_the_right_token_ends_the_session(up: World, trigger: int) -> None:
    """Also the short one that a bare PING provokes (29 bytes)."""
    reset = reset_of(held_token(up), trigger)
    path = PathKey(Address("192.168.1.10", PORT), Address("198.51.100.1", PORT))
    session = up.peer("a").session
    up.a.node.receive_datagram(reset, path, up.now)
    assert lost(up)
    assert up.peer("a").session is not session
    up.run_until(lambda: up.both_up, 2.0)


@pytest.mark.parametrize("which", ["one bit", "random", "not last"])
def test_a_reset_with_another_token_is_nothing(up: World, which: str) -> None:
    token = held_token(up)
    reset = bytearray(reset_of(token))
    if which == "one bit":
        reset[-1] ^= 1
    elif which == "random":
        reset[-16:] = random.Random(2).randbytes(16)
    else:
        reset += b"\0"
    path = PathKey(Address("192.168.1.10", PORT), Address("198.51.100.1", PORT))
    up.a.node.receive_datagram(bytes(reset), path, up.now)
    up.run(0.5)
    assert not lost(up) and up.both_up


def test_a_node_that_knows_nothing_resets_who_still_talks_to_it(up: World) -> None:
    """And the dialler is back long before it would have given up on silence."""
    up.stop("b")
    up.run(0.01)
    up.boot("b")
    old = up.peer("a").session
    up.send("a", numbered("a", 1))
    up.run(2.5 * up.delay)
    assert up.b.node.counters["resets_sent"] >= 1
    assert up.peer("a").session is not old
    up.run_until(lambda: up.both_up, 1.0)


def test_tokens_come_from_the_identity_and_differ_by_connection_id(up: World) -> None:
    session = up.peer("a").session
    assert session is not None
    cid = session.connection._peer_cid
    assert cid.stateless_reset_token == up.b.node._reset_token(cid.cid)
    assert up.b.node._reset_token(b"x" * 8) != up.b.node._reset_token(b"y" * 8)
    assert up.a.node._reset_token(cid.cid) != cid.stateless_reset_token
    up.boot("b")  # another process with the same identity
    assert cid.stateless_reset_token == up.b.node._reset_token(cid.cid)


def test_resets_are_rate_limited(world: World) -> None:
    node = world.b.node

    def provoke(count: int) -> int:
        for index in range(count):
            node.receive_datagram(short_packet(index.to_bytes(8)), OUTSIDE, world.now)
        return len(node.datagrams_to_send(world.now))

    assert provoke(3 * RESETS_PER_SECOND) == RESETS_PER_SECOND
    world.now += 0.5
    assert provoke(10) == 0
    world.now += 0.6
    assert provoke(3 * RESETS_PER_SECOND) == RESETS_PER_SECOND
    assert node.counters["resets_sent"] == 2 * RESETS_PER_SECOND


def test_two_that_know_nothing_do_not_reset_each_other_for_ever(world: World) -> None:
    node = world.b.node
    data = short_packet(DCID, 1200)
    for _ in range(40):
        node.receive_datagram(data, OUTSIDE, world.now)
        answers = node.datagrams_to_send(world.now)
        if not answers:
            break
        ((key, reset),) = answers
        assert key == OUTSIDE and len(reset) < len(data)
        assert reset[-16:] == node._reset_token(data[1:9])
        data = reset
    else:
        raise AssertionError("it goes on")


def test_no_long_packet_provokes_a_reset(world: World) -> None:
    node = world.b.node
    node.receive_datagram(long_packet(QuicPacketType.HANDSHAKE), OUTSIDE, world.now)
    assert node.datagrams_to_send(world.now) == []


def test_the_reset_of_a_retired_connection_id_ends_nothing(up: World) -> None:
    """Only tokens of connection IDs in use count (RFC 9000 section 10.3.1)."""
    session = up.peer("a").session
    assert session is not None
    unused = session.connection._peer_cid_available[0]
    retired = up.b.node._reset_token(b"long ago")
    for token in (retired, unused.stateless_reset_token):
        reset = reset_of(token)
        path = PathKey(Address("192.168.1.10", PORT), Address("198.51.100.1", PORT))
        up.a.node.receive_datagram(reset, path, up.now)
    up.run(0.5)
    assert not lost(up) and up.peer("a").session is session
