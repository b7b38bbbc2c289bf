"""Either end moves, knowing it or not; judged by what is on the wire (RFC 9000 section 9)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder

from tests.unit.quic_pair import (
    ACK,
    CHALLENGE,
    CLIENT,
    DATAGRAM,
    DELAY,
    NEW_CONNECTION_ID,
    PING,
    RESPONSE,
    RETIRE_CONNECTION_ID,
    SERVER,
    START,
    Flight,
    Host,
    Opened,
    Pair,
    copy_header,
    numbered,
    numbers,
)
from tunnel.datapath.congestion import Sample
from tunnel.datapath.engine import Lane
from tunnel.path.network import Address, PathKey
from tunnel.path.path import PathState
from tunnel.quic.base import RETIRE_PTOS
from tunnel.quic.connection import APPARENT_MEMORY
from tunnel.quic.events import MoveContested, PathFailed, PathValidated, PeerMoved
from tunnel.quic.paths import LINK_MTU, START_MTU

RTT = 2 * DELAY
FRESH = {"client": Address("192.0.2.9", 1000), "server": Address("198.51.100.9", 2000)}
HOME = {"client": CLIENT, "server": SERVER}
ATTACKER = Address("203.0.113.66", 666)
ENDS = pytest.mark.parametrize("name", ["client", "server"])
OFFSET = 7 * DELAY / 10  # so that nothing happens just when a packet arrives


def host(pair: Pair, name: str) -> Host:
    return pair.client if name == "client" else pair.server


def quiet() -> Pair:
    pair = Pair.established()
    pair.exchange()
    pair.forget()
    for each in pair.hosts:
        each.received.clear()
    return pair


def busy(seconds: float = 3.0, *, interval: float = 0.005) -> Pair:
    """With numbered packets running both ways for a while."""
    pair = quiet()
    for each in pair.hosts:
        pair.stream(each, int(seconds / interval), interval=interval)
    pair.run(0.1 + OFFSET)
    return pair


def opened(flights: list[Flight]) -> list[Opened]:
    return [flight.packet for flight in flights if flight.packet is not None]


def dcids(flights: list[Flight]) -> set[bytes]:
    return {packet.dcid for packet in opened(flights)}


def cid_paths(pair: Pair, sender: Host) -> dict[bytes, set[tuple[Address, Address]]]:
    """On which paths each connection ID was used, as a bystander sees them."""
    seen: dict[bytes, set[tuple[Address, Address]]] = {}
    for flight in pair.sent(sender):
        if flight.packet is not None:
            paths = seen.setdefault(flight.packet.dcid, set())
            paths.add((flight.local, flight.target))
    return seen


def all_arrived(receiver: Host, count: int) -> None:
    assert sorted(numbers(receiver.received)) == list(range(count))


# the peer knows that it moves


@ENDS
def test_a_mover_uses_a_fresh_connection_id_and_asks_in_its_first_packet(name: str) -> None:
    pair = busy()
    mover = host(pair, name)
    before = {f.packet.dcid for f in pair.sent(mover) if f.packet}
    largest = max(packet.number for packet in opened(pair.sent(mover)))
    moved_at = pair.now
    pair.move(mover, FRESH[name])
    first, *_ = pair.sent(mover, source=FRESH[name])
    assert first.at == moved_at, "no round trip is waited for"
    assert first.packet is not None
    assert first.packet.dcid not in before
    assert first.packet.has(CHALLENGE)
    assert any(kind not in (CHALLENGE, RESPONSE, 0) for kind, _ in first.packet.frames), (
        "it means to move"
    )
    assert len(first.data) >= START_MTU
    assert first.packet.number == largest + 1
    pair.run(1.0)
    assert all(len(paths) == 1 for paths in cid_paths(pair, mover).values())


@ENDS
def test_the_other_end_follows_with_a_fresh_connection_id(name: str) -> None:
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    before = dcids(pair.sent(other))
    moved_at = pair.now
    pair.move(mover, FRESH[name])
    pair.run(DELAY + 0.0001)
    first, *_ = pair.sent(other, target=FRESH[name])
    assert first.at == pytest.approx(moved_at + DELAY)
    assert first.packet is not None and first.packet.dcid not in before
    pair.run(1.0)
    assert all(len(paths) == 1 for paths in cid_paths(pair, other).values())
    assert other.connection.active.addr.remote == FRESH[name]


@ENDS
def test_a_move_settles_while_the_old_path_is_alive(name: str) -> None:
    """Packets still on their way to the old address do not pull the mover back."""
    pair = busy(2.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    pair.move(mover, FRESH[name])
    moved_at = pair.now
    pair.run(3.0)
    late = [f for f in pair.sent(mover, source=HOME[name], since=moved_at) if f.packet]
    assert not any(f.packet.has(DATAGRAM) or f.packet.has(PING) for f in late if f.packet)
    assert mover.connection.active.addr.local == FRESH[name]
    assert other.connection.active.addr.remote == FRESH[name]
    assert len(other.of(PeerMoved)) == 1 and not other.of(MoveContested)
    assert not mover.of(PeerMoved)
    for each in pair.hosts:
        all_arrived(each, 400)


@ENDS
def test_a_move_off_a_dead_path_loses_only_what_was_under_way(name: str) -> None:
    pair = busy(2.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    pair.dead.add(HOME[name])
    pair.move(mover, FRESH[name])
    pair.run(3.0)
    # From the mover nothing; to the mover what left in one round trip (5 ms apart).
    assert len(other.received) >= 400 - 4
    assert len(mover.received) >= 400 - 9
    assert pair.client.connection.is_open and pair.server.connection.is_open


def test_both_ends_move_at_once() -> None:
    pair = busy(2.0)
    for name in ("client", "server"):
        mover = host(pair, name)
        mover.nat[FRESH[name]] = FRESH[name]
    pair.move(pair.client, FRESH["client"])
    pair.move(pair.server, FRESH["server"])
    pair.run(3.0)
    for each in pair.hosts:
        assert len(each.received) >= 395
    # They agree in the end, or each sends on a path of its own; either way it is stable.
    actives = [each.connection.active for each in pair.hosts]
    pair.exchange()
    assert [each.connection.active for each in pair.hosts] == actives


@ENDS
def test_there_and_back_and_there(name: str) -> None:
    """A host that hurries between networks is followed within a round trip each time."""
    pair = busy(4.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    for local in (FRESH[name], HOME[name], FRESH[name]):
        pair.move(mover, local)
        for address in (FRESH[name], HOME[name]):
            (pair.dead.discard if address == local else pair.dead.add)(address)
        took = pair.run_until(lambda: other.connection.active.addr.remote == local)  # noqa: B023
        assert took <= DELAY + 0.006
        pair.run(0.5)
        assert other.connection.active.addr.remote == local
    pair.run(3.0)
    assert len(other.received) >= 790


# challenges and answers


@ENDS
def test_an_answer_leaves_on_the_path_its_question_came_in_on(name: str) -> None:
    pair = quiet()
    asker, other = host(pair, name), pair.other(host(pair, name))
    asker.nat[FRESH[name]] = FRESH[name]
    key = PathKey(FRESH[name], asker.connection.active.addr.remote)
    asker.connection.probe(key, pair.now)
    pair.pump(asker)
    pair.run(1.0)
    questions = [f for f in pair.sent(asker) if f.packet and f.packet.has(CHALLENGE)]
    assert {f.source for f in questions if f.source == FRESH[name]} == {FRESH[name]}
    asked = {data for f in questions if f.packet for data in f.packet.content(CHALLENGE)}
    answers = [f for f in pair.sent(other) if f.packet and f.packet.has(RESPONSE)]
    assert answers
    for answer in answers:
        assert answer.target == FRESH[name]
        assert answer.packet is not None and set(answer.packet.content(RESPONSE)) <= asked
    assert [event.path for event in asker.of(PathValidated)] == [key]
    assert asker.connection.active.addr.local == HOME[name], "a question moves nobody"
    assert other.connection.active.addr.remote == HOME[name]
    assert not other.of(PeerMoved)


@ENDS
def test_questions_and_answers_fill_a_minimal_datagram(name: str) -> None:
    """RFC 9000 sections 8.2.1 and 8.2.2; to an unproven address as far as 3x allows."""
    pair = busy()
    mover = host(pair, name)
    pair.move(mover, FRESH[name])
    pair.run(1.0)
    checks = [
        f for f in pair.log if f.packet and (f.packet.has(CHALLENGE) or f.packet.has(RESPONSE))
    ]
    assert len(checks) >= 3
    for flight in checks:
        assert len(flight.data) >= START_MTU


@ENDS
def test_a_question_answered_short_is_repeated_in_full(name: str) -> None:
    """While 3x forbids a full datagram only the address is proven, not the size."""
    pair = quiet()
    mover, other = host(pair, name), pair.other(host(pair, name))
    fresh = FRESH[name]._replace(host="203.0.113.7")
    pair.rebind(mover, HOME[name], fresh)
    pair.send(mover, numbered(0, 60))
    pair.run(1.0)
    questions = [f for f in pair.sent(other, target=fresh) if f.packet and f.packet.has(CHALLENGE)]
    assert len(questions[0].data) < START_MTU
    assert max(len(f.data) for f in questions) >= START_MTU
    assert other.connection.active.state is PathState.VALIDATED
    assert not other.connection.active.challenge_due


def test_an_unanswered_question_fails_the_path_and_nothing_else() -> None:
    pair = busy()
    pair.client.nat[FRESH["client"]] = FRESH["client"]
    pair.dead.add(FRESH["client"])
    key = PathKey(FRESH["client"], SERVER)
    pair.client.connection.probe(key, pair.now)
    pair.pump(pair.client)
    pair.run(3.5)
    assert [event.path for event in pair.client.of(PathFailed)] == [key]
    assert pair.client.connection.active.addr.local == CLIENT
    for each in pair.hosts:
        all_arrived(each, 600)


def test_rtt_of_a_repeated_challenge() -> None:
    """The answer to the first of several questions does not measure from the last of them."""
    pair = quiet()
    slow = 0.08
    pair.client.nat[FRESH["client"]] = FRESH["client"]
    pair.fate = lambda flight: (
        [slow] if FRESH["client"] in (flight.source, flight.target) else [pair.delay]
    )
    pair.client.connection.probe(PathKey(FRESH["client"], SERVER), pair.now)
    pair.pump(pair.client)
    pair.run(2.0)
    questions = [
        f
        for f in pair.sent(pair.client, source=FRESH["client"])
        if f.packet and f.packet.has(CHALLENGE)
    ]
    assert len(questions) > 1, "repeated in the rhythm of the fast path"
    assert pair.client.of(PathValidated)[0].rtt == pytest.approx(2 * slow, rel=0.1)


def test_a_flood_of_questions_is_answered_within_bounds() -> None:
    pair = quiet()
    client = pair.client.connection
    builder = QuicPacketBuilder(
        host_cid=b"",
        peer_cid=client._peer_cid.cid,
        version=1,
        is_client=True,
        max_datagram_size=START_MTU,
        packet_number=client._packet_number,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, client._keys)
    for index in range(100):
        builder.start_frame(CHALLENGE, capacity=9).push_bytes(index.to_bytes(8))
    (data,), _ = builder.flush()
    pair.hand(pair.server, data, PathKey(SERVER, CLIENT))
    answers = [p.content(RESPONSE) for p in opened(pair.sent(pair.server))]
    assert 1 <= sum(map(len, answers)) <= 16


# the peer does not know that it moved


def rebound(pair: Pair, name: str, *, port_only: bool = False) -> Address:
    """The NAT of this end changes its mapping; the outer address after that."""
    outer = HOME[name]._replace(port=7777)
    if not port_only:
        outer = outer._replace(host="203.0.113.7")
    pair.rebind(host(pair, name), HOME[name], outer)
    return outer


@ENDS
def test_rebinding_both_ends_change_their_connection_id_once(name: str) -> None:
    pair = busy(5.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    old_mover, old_other = dcids(pair.sent(mover)), dcids(pair.sent(other))
    at = pair.now
    outer = rebound(pair, name)
    pair.run(DELAY + 0.006)
    first, *_ = pair.sent(mover, source=outer)
    assert first.packet is not None and first.packet.dcid in old_mover, "it does not know"
    answer, *_ = pair.sent(other, target=outer)
    assert answer.packet is not None and answer.packet.dcid not in old_other
    pair.run(4.0)
    assert dcids(pair.sent(other, target=outer)) == {answer.packet.dcid}, "no ping-pong"
    new = [p.dcid for p in opened(pair.sent(mover, since=at)) if p.dcid not in old_mover]
    assert len(set(new)) == 1, "the mover changes its own, once"
    after = [p.dcid for p in opened(pair.sent(mover, since=at + RTT + 0.01))]
    assert set(after) == set(new)
    (moved,) = other.of(PeerMoved)
    assert moved.rebinding and moved.new.remote == outer
    assert not mover.of(PeerMoved) and not other.of(MoveContested)
    pair.run(2.0)
    for each in pair.hosts:
        assert len(each.received) >= 1000 - 8


@ENDS
def test_rebinding_is_challenged_and_copied_until_validated(name: str) -> None:
    pair = busy()
    other = pair.other(host(pair, name))
    at = pair.now
    outer = rebound(pair, name)
    pair.run(1.0)
    answer, *_ = pair.sent(other, target=outer)
    assert answer.packet is not None and answer.packet.has(CHALLENGE)
    old = [
        packet
        for packet in opened(pair.sent(other, target=HOME[name], since=answer.at))
        if packet.number > answer.packet.number
    ]
    assert any(packet.has(CHALLENGE) for packet in old), "the old address is asked as well"
    copies = [p for p in old if p.copies_only]
    assert copies, "and gets copies"
    assert all(p.copies_only or not p.has(DATAGRAM) for p in old)
    originals = {p.number: p.content(DATAGRAM) for p in opened(pair.sent(other, target=outer))}
    for packet in copies:
        (payload,) = packet.content(DATAGRAM)
        root = next(n for n in originals if payload.startswith(copy_header(n)))
        assert originals[root] == [payload[len(copy_header(root)) :]]
    settled = at + DELAY + 3 * RTT + 0.02  # the question, once more in full, and one round trip
    assert opened(pair.sent(other, target=HOME[name], since=settled)) == []
    assert not other.connection.settling


def test_both_nats_rebind_at_once() -> None:
    pair = busy(4.0)
    for name in ("client", "server"):
        # Neither NAT filters; the old mapping still leads inside for what is under way.
        rebound(pair, name)
    # Nothing reaches the old addresses: each end must hear the other from its new one.
    pair.run(0.05)
    changed = any(each.of(PeerMoved) for each in pair.hosts)
    assert not changed, "both send to addresses that are gone"
    assert all(each.connection.is_open for each in pair.hosts)


@ENDS
def test_many_rebindings_in_a_row_never_run_out(name: str) -> None:
    pair = busy(12.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    for port in range(40):
        outer = HOME[name]._replace(port=20000 + port)
        pair.rebind(mover, HOME[name], outer)
        pair.run(0.25)
        assert other.connection.active.addr.remote == outer
    pair.run(3.0)
    assert len(other.received) >= 2400 - 40
    assert len(mover.received) >= 2400 - 40 * 8
    assert all(len(p) == 1 for p in cid_paths(pair, other).values())


# three times


def budget(pair: Pair, sender: Host, target: Address) -> None:
    """At no moment was more than 3x sent to this address before it was proven; see `proven`."""
    receiver = pair.other(sender)
    proven = [
        when
        for f in pair.sent(receiver)
        if f.packet and f.packet.has(RESPONSE)
        for when in f.arrived
    ]
    until = min(proven, default=float("inf"))
    arrivals = [(w, len(f.data)) for f in pair.sent(receiver, source=target) for w in f.arrived]
    sent = 0
    for flight in pair.sent(sender, target=target):
        if flight.at >= until:
            break
        sent += len(flight.data)
        came = sum(size for when, size in arrivals if when <= flight.at)
        assert sent <= 3 * came, (sent, came)


@pytest.mark.parametrize("size", [40, 60, 300, 1000])
@ENDS
def test_three_times_what_came_and_not_a_byte_more(name: str, size: int) -> None:
    pair = quiet()
    mover, other = host(pair, name), pair.other(host(pair, name))
    outer = rebound(pair, name)
    pair.send(other, *[numbered(i, 1100) for i in range(60)])  # much data waits
    pair.dead.add(outer)  # and nothing comes back from there
    pair.send(mover, numbered(0, size))
    first, *_ = pair.sent(mover, source=outer)
    pair.hand(other, first.data, PathKey(HOME[other.name], outer))
    first.arrived.append(pair.now)
    for i in range(100):
        pair.after(i * 0.01, lambda i=i: pair.send(other, numbered(100 + i, 1100)))  # type: ignore[misc]
    pair.run(3.0)
    to_it = sum(len(f.data) for f in pair.sent(other, target=outer))
    came = len(first.data)
    assert to_it <= 3 * came
    assert to_it >= 3 * came - 128 or size < 60, "but what is allowed is used"
    budget(pair, other, outer)


@ENDS
def test_three_times_with_traffic_both_ways(name: str) -> None:
    pair = quiet()
    other = pair.other(host(pair, name))
    pair.stream(other, 2000, interval=0.0005, size=1100)
    pair.stream(host(pair, name), 200, size=40)
    pair.run(0.1 + OFFSET)
    outer = rebound(pair, name)
    pair.run(3.0)
    budget(pair, other, outer)
    assert other.connection.active.addr.remote == outer


@ENDS
def test_a_second_address_gets_a_budget_of_its_own(name: str) -> None:
    pair = quiet()
    mover, other = host(pair, name), pair.other(host(pair, name))
    for turn in range(3):
        outer = Address("203.0.113.7", 7000 + turn)
        pair.rebind(mover, HOME[name], outer)
        pair.send(mover, numbered(turn, 100))
        pair.send(other, *[numbered(i, 1100) for i in range(30)])
        pair.run(DELAY + 0.001)
        budget(pair, other, outer)


@ENDS
def test_silence_after_one_packet_from_a_new_address(name: str) -> None:
    """Falls back to the proven address in time, and no timer spins meanwhile (see `run`)."""
    pair = quiet()
    mover, other = host(pair, name), pair.other(host(pair, name))
    outer = rebound(pair, name)
    pair.send(mover, numbered(1, 40))
    pair.run(DELAY + 0.001)
    assert other.connection.active.addr.remote == outer
    pair.rebind(mover, HOME[name], HOME[name])
    pair.dead.add(outer)
    pair.stream(other, 200)
    pair.run(3.0)
    assert other.connection.active.addr.remote == HOME[name]
    assert other.wakeups < 3000
    pair.run(20.0)
    mover.received.clear()
    pair.stream(other, 20)
    pair.run(1.0)
    all_arrived(mover, 20)


# what never moves anybody


@ENDS
def test_replays_from_elsewhere_move_nobody(name: str) -> None:
    pair = busy()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    pair.run(0.2)
    captured = list(pair.sent(sender))
    for flight in captured[-40:]:
        if flight.arrived:
            pair.hand(victim, flight.data, PathKey(flight.target, ATTACKER))
    assert victim.connection.active.addr.remote == HOME[name]
    assert not victim.of(PeerMoved)
    assert not pair.sent(victim, target=ATTACKER)
    assert victim.connection.counters["duplicates"] >= 20


@ENDS
def test_old_packets_that_arrive_late_from_elsewhere_move_nobody(name: str) -> None:
    """Never seen, authentic, but overtaken: stale."""
    pair = quiet()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    kept: list[Flight] = []

    def fate(flight: Flight) -> list[float]:
        if flight.sender is sender and len(kept) < 5:
            kept.append(flight)
            return []
        return [pair.delay]

    pair.fate = fate
    pair.stream(sender, 20)
    pair.run(0.1)
    victim.received.clear()
    for flight in kept:
        pair.hand(victim, flight.data, PathKey(flight.target, ATTACKER))
    assert victim.connection.active.addr.remote == HOME[name]
    assert not victim.of(PeerMoved)
    assert len(victim.received) == sum(f.packet.has(DATAGRAM) for f in kept if f.packet)


@ENDS
def test_spoofed_packets_move_nobody(name: str) -> None:
    pair = busy()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    rng = random.Random(1)
    flight = pair.sent(sender)[-1]
    for _ in range(50):
        data = bytearray(flight.data)
        data[rng.randrange(1, len(data))] ^= rng.randrange(1, 256)
        pair.hand(victim, bytes(data), PathKey(flight.target, ATTACKER))
    assert victim.connection.active.addr.remote == HOME[name]
    assert not pair.sent(victim, target=ATTACKER)
    assert len(victim.connection.paths()) == 1, "nothing is remembered of it"


def copy_packet(pair: Pair, sender: Host, root: int, payload: bytes) -> bytes:
    """A copy packet of `sender`, on whatever path the caller likes."""
    return data_packet(pair, sender, copy_header(root) + payload)


def data_packet(pair: Pair, sender: Host, content: bytes) -> bytes:
    """A packet of `sender` with one DATAGRAM, which is not on its way yet."""
    connection = sender.connection
    builder = QuicPacketBuilder(
        host_cid=b"",
        peer_cid=connection._peer_cid.cid,
        version=1,
        is_client=connection.is_client,
        max_datagram_size=START_MTU,
        packet_number=connection._packet_number,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, connection._keys)
    buf = builder.start_frame(DATAGRAM, capacity=3 + len(content))
    buf.push_uint_var(len(content))
    buf.push_bytes(content)
    (data,), _ = builder.flush()
    connection._packet_number += 1
    return data


@pytest.mark.parametrize("attached", [True, False], ids=["data path", "no data path yet"])
@ENDS
def test_copies_move_nobody(name: str, attached: bool) -> None:
    pair = quiet()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    if not attached:
        victim.connection.detach()
    data = copy_packet(pair, sender, 0, b"\0" + numbered(5))  # no datagram had this number
    pair.hand(victim, data, PathKey(HOME[victim.name], FRESH[name]))
    pair.run(0.1)
    assert numbers(victim.received) == ([5] if attached else [])
    assert victim.connection.active.addr.remote == HOME[name]
    assert not victim.of(PeerMoved)
    sender.connection.nudge()
    pair.pump(sender)
    pair.run(0.1)
    assert victim.connection.active.addr.remote == HOME[name]


@ENDS
def test_a_copy_is_delivered_once_with_its_original(name: str) -> None:
    pair = quiet()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    pair.send(sender, numbered(1))
    root = opened(pair.sent(sender))[-1].number
    data = copy_packet(pair, sender, root, b"\0" + numbered(1))
    pair.hand(victim, data, PathKey(HOME[victim.name], FRESH[name]))
    pair.run(0.1)
    assert numbers(victim.received) == [1]


@ENDS
def test_probing_packets_move_nobody_but_are_answered(name: str) -> None:
    pair = busy()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    sender.nat[FRESH[name]] = FRESH[name]
    for _ in range(5):
        sender.connection.probe(PathKey(FRESH[name], HOME[victim.name]), pair.now)
        pair.pump(sender)
        pair.run(0.1)
    assert victim.connection.active.addr.remote == HOME[name]
    assert not victim.of(PeerMoved)
    assert len(sender.of(PathValidated)) == 5
    assert all(len(paths) == 1 for paths in cid_paths(pair, sender).values())
    assert all(len(paths) == 1 for paths in cid_paths(pair, victim).values())


# late packets


@ENDS
def test_late_packets_of_the_old_path_are_delivered(name: str) -> None:
    pair = quiet()
    mover, other = host(pair, name), pair.other(host(pair, name))
    late = 3 * RTT

    def fate(flight: Flight) -> list[float]:
        return [late if HOME[name] in (flight.source, flight.target) else pair.delay]

    pair.fate = fate
    for each in pair.hosts:
        pair.stream(each, 40, interval=0.001)
    pair.run(0.02)
    pair.move(mover, FRESH[name])
    pair.run(2.0)
    for each in pair.hosts:
        all_arrived(each, 40)
    assert other.connection.active.addr.remote == FRESH[name]
    assert not other.of(MoveContested)


def test_the_duplicate_window_is_as_wide_as_a_fast_switch_needs() -> None:
    """A packet that 100,000 later ones overtook is delivered, once."""
    pair = quiet()
    sender, receiver = pair.hosts
    late = data_packet(pair, sender, b"\0" + numbered(7))
    sender.connection.engine.number += 100_000
    pair.send(sender, numbered(8))
    pair.run(0.1)
    for _ in range(2):
        pair.hand(receiver, late, PathKey(SERVER, CLIENT))
    pair.run(0.1)
    assert numbers(receiver.received) == [8, 7]


# connection IDs


def retirements(pair: Pair, sender: Host) -> list[float]:
    return [f.at for f in pair.sent(sender) if f.packet and f.packet.has(RETIRE_CONNECTION_ID)]


@ENDS
def test_the_old_connection_id_is_retired_after_three_pto_and_not_before(name: str) -> None:
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    old = mover.connection.active
    pto = old.metrics.probe_timeout(mover.connection.max_ack_delay)
    known = set(other.connection.host_cids())
    old_cid = opened(pair.sent(mover))[-1].dcid
    at = pair.now
    pair.move(mover, FRESH[name])
    pair.run(RETIRE_PTOS * pto - 0.002)
    assert old_cid in other.connection.host_cids()
    assert not retirements(pair, mover)
    pair.run(1.0)
    (retired,) = retirements(pair, mover)
    assert RETIRE_PTOS == 3
    assert retired - at >= RETIRE_PTOS * pto - 1e-6  # the engine's clock ticks in microseconds
    assert retired - at <= 3 * RETIRE_PTOS * pto
    assert old_cid not in other.connection.host_cids()
    assert len(known - set(other.connection.host_cids())) == 1
    assert len(other.connection.host_cids()) == 8, "and a new one is issued for it"
    assert [f for f in opened(pair.sent(other)) if f.has(NEW_CONNECTION_ID)]


@ENDS
def test_the_follower_retires_its_own_when_the_move_has_settled(name: str) -> None:
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    old_cid = opened(pair.sent(other))[-1].dcid
    at = pair.now
    pair.move(mover, FRESH[name])
    pair.run(DELAY + RTT)
    assert old_cid in mover.connection.host_cids()
    pair.run(1.0)
    assert old_cid not in mover.connection.host_cids()
    assert len(retirements(pair, other)) == 1
    assert retirements(pair, other)[0] > at + DELAY + RETIRE_PTOS * RTT


@ENDS
def test_a_renewed_connection_id_lives_on_for_late_packets(name: str) -> None:
    """After a rebinding the mover changes its own; what it sent before may still come."""
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    old_cid = opened(pair.sent(mover))[-1].dcid
    pto = mover.connection.active.metrics.probe_timeout(mover.connection.max_ack_delay)
    rebound(pair, name)
    pair.run_until(lambda: opened(pair.sent(mover))[-1].dcid != old_cid)
    changed = pair.now
    pair.run_until(lambda: old_cid not in other.connection.host_cids())
    assert pair.now - changed >= RETIRE_PTOS * pto


@ENDS
def test_a_shortage_of_connection_ids_does_not_kill(name: str) -> None:
    pair = busy(6.0)
    mover, other = host(pair, name), pair.other(host(pair, name))
    for index in range(14):
        local = Address(HOME[name].host.rsplit(".", 1)[0] + f".{100 + index}", 4000)
        pair.move(mover, local)
        pair.run(0.004)
    assert mover.connection.counters["cid_shortages"] > 0
    before = len(other.received)
    pair.run(0.05)
    assert len(other.received) > before, "better linked than silent"
    pair.run(3.0)
    assert all(each.connection.is_open for each in pair.hosts)
    assert mover.connection.active.addr.local == local
    assert other.connection.active.addr.remote == local
    pair.run(5.0)
    pair.forget()
    pair.exchange()
    for each in pair.hosts:
        # It is over: one of its own again, and none was lost on the way.
        active = each.connection.active.peer_cid
        assert active is not None
        others = [p.peer_cid for p in each.connection.paths()[1:]]
        assert active not in others
        assert dcids(pair.sent(each)) == {active.cid}
    pair.run(60.0)
    for each in pair.hosts:
        spare = len(each.connection._peer_cid_available)
        assert spare == 7, "all but the one in use are free again"
        assert len(each.connection.host_cids()) == 8


@pytest.mark.parametrize("seed", range(30))
def test_no_connection_id_on_two_paths_and_none_lost(seed: int) -> None:
    """Random moves, rebindings and questions of either end, then quiet."""
    rng = random.Random(seed)
    pair = busy(8.0, interval=0.02)
    # Two NATs that rebind before either end spoke leave both without an address to speak to.
    behind_nat = host(pair, rng.choice(["client", "server"]))
    for _ in range(rng.randint(1, 12)):
        mover = host(pair, rng.choice(["client", "server"]))
        what, index = rng.choice(["move", "rebind", "probe"]), rng.randint(1, 6)
        local = mover.connection.active.addr.local
        fresh = local._replace(port=3000 + index)
        if what == "move":
            pair.move(mover, fresh)
        elif what == "rebind":
            mover, local = behind_nat, behind_nat.connection.active.addr.local
            pair.rebind(mover, local, local._replace(port=8000 + index))
        else:
            mover.nat.setdefault(fresh, fresh)
            mover.connection.probe(PathKey(fresh, mover.connection.active.addr.remote), pair.now)
            pair.pump(mover)
        pair.run(rng.random() * 0.3)
    shortage = any(each.connection.counters["cid_shortages"] for each in pair.hosts)
    pair.run(90.0)
    for each in pair.hosts:
        assert each.connection.is_open
        if not shortage:
            used = cid_paths(pair, each)
            assert [paths for paths in used.values() if len(paths) > 1] == []
        holders = [path for path in each.connection.paths() if path.peer_cid is not None]
        assert holders == [each.connection.active]
        assert len(each.connection._peer_cid_available) == 7


# windows and round trips


class FixedRate:
    """A controller that has made up its mind."""

    def __init__(self, window: int, pacing_rate: float) -> None:
        self.window = window
        self.pacing_rate = pacing_rate

    def on_sample(self, sample: Sample) -> None:
        pass

    def on_spurious_loss(self) -> None:
        pass


def fix_rate(end: Host, window: int, pacing_rate: float = 0.0) -> None:
    """Bytes and bytes per second (0.0: not paced) of the active path, from now on."""
    path = end.connection.active
    path.controller = FixedRate(window, pacing_rate)  # type: ignore[assignment]
    path.metrics.set_rate(window, pacing_rate)


@ENDS
def test_a_new_address_starts_with_a_fresh_window(name: str) -> None:
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    for each in pair.hosts:
        fix_rate(each, 500_000)
    pair.move(mover, FRESH[name])
    assert not mover.connection.active.metrics.has_rtt
    assert mover.connection.active.metrics.window < 100_000
    pair.run(DELAY + 0.0001)
    assert other.connection.active.addr.remote == FRESH[name]
    assert not other.connection.active.metrics.has_rtt
    assert other.connection.active.metrics.window < 100_000


@ENDS
def test_a_known_path_gets_its_window_and_round_trip_back(name: str) -> None:
    pair = busy()
    mover, other = host(pair, name), pair.other(host(pair, name))
    for each in pair.hosts:
        fix_rate(each, 500_000)
    pair.fate = lambda flight: [
        0.03 if FRESH[name] in (flight.source, flight.target) else pair.delay
    ]
    pair.move(mover, FRESH[name])
    pair.run(1.0)
    for each in pair.hosts:
        assert each.connection.active.metrics.rtt_smoothed == pytest.approx(0.06, rel=0.2)
        assert each.connection.active.metrics.window < 100_000
    pair.move(mover, HOME[name])
    pair.run(DELAY + 0.0001)
    assert other.connection.active.addr.remote == HOME[name]
    for each in pair.hosts:
        metrics = each.connection.active.metrics
        assert metrics.window == 500_000
        assert metrics.rtt_smoothed == pytest.approx(RTT, rel=0.2)


@ENDS
def test_a_new_port_keeps_window_and_round_trip(name: str) -> None:
    """RFC 9000 section 9.4."""
    pair = busy()
    other = pair.other(host(pair, name))
    old = other.connection.active.metrics
    fix_rate(other, 500_000)
    rtt, mtu = old.rtt_smoothed, other.connection.active.mtu
    assert mtu == LINK_MTU[4]
    outer = rebound(pair, name, port_only=True)
    pair.run_until(lambda: other.connection.active.addr.remote == outer, 0.1)
    new = other.connection.active.metrics
    assert new is not old
    assert new.window == 500_000
    assert new.has_rtt and new.rtt_smoothed == pytest.approx(rtt, rel=1e-3)
    assert other.connection.active.mtu == mtu
    assert new.in_flight <= 3000, "what is under way belongs to the old path"


def test_packets_of_the_dead_path_do_not_fill_the_new_window() -> None:
    pair = busy()
    pair.dead.add(CLIENT)
    old = pair.client.connection.active.metrics
    fix_rate(pair.client, 32 * START_MTU)
    pair.send(pair.client, *[numbered(i, 1000) for i in range(100)])
    pair.run(0.02)
    assert old.window - old.in_flight < 1200, "it is full"
    pair.move(pair.client, FRESH["client"])
    pair.run(0.01)
    at_once = pair.sent(pair.client, source=FRESH["client"])
    assert sum(len(flight.data) for flight in at_once) > 20_000
    pair.run(1.0)
    assert pair.server.connection.active.addr.remote == FRESH["client"]


def test_a_full_queue_leaves_in_bursts_not_all_at_once() -> None:
    """RFC 9002 section 7.7: the pacer holds within a batch, too."""
    pair = quiet()
    fix_rate(pair.client, 300_000, 200_000 / RTT)
    pair.send(pair.client, *[numbered(i, 1400) for i in range(150)])
    assert 5 <= len(pair.log) <= 9, "a millisecond of it"
    pair.run(RTT - 0.001)
    assert len(pair.log) >= 100, "but within the round trip the window is used"


# MTU


def test_the_link_mtu_is_probed_once_proven_and_used() -> None:
    pair = Pair()
    pair.dial()
    pair.run(1.0)
    for each in pair.hosts:
        assert each.connection.active.mtu == LINK_MTU[4] == 1472
        sizes = [len(f.data) for f in pair.sent(each) if f.packet]
        assert sizes.count(1472) == 1


def test_a_path_that_carries_less_stays_at_1200_and_splits() -> None:
    pair = Pair()
    pair.fate = lambda flight: [pair.delay] if len(flight.data) <= START_MTU else []
    pair.dial()
    pair.run(5.0)
    for each in pair.hosts:
        each.connection.attach(each.lane)
        assert each.connection.active.mtu == START_MTU
        window = each.connection.active.metrics.window
        assert window >= 32 * START_MTU, "a lost probe is no congestion"
    pair.forget()
    pair.stream(pair.client, 50, size=1420)
    pair.run(1.0)
    all_arrived(pair.server, 50)
    assert max(len(f.data) for f in pair.log) <= START_MTU
    assert pair.client.lane.counters["split_packets"] == 50


def test_a_datagram_too_large_for_the_link_makes_the_path_small() -> None:
    pair = quiet()
    key = pair.client.connection.active.addr
    pair.fate = lambda flight: [pair.delay] if len(flight.data) <= 1300 else []
    pair.client.connection.shrink(key, pair.now)
    pair.stream(pair.client, 50, size=1420)
    pair.run(2.0)
    all_arrived(pair.server, 50)


def test_no_datagram_is_ever_larger_than_its_path() -> None:
    """Whatever waits: the path is chosen when the packet is written, not before."""
    pair = busy(2.0)
    pair.stream(pair.client, 200, size=1420, interval=0.004)
    sizes: dict[Address, int] = {}

    def fate(flight: Flight) -> list[float]:
        limit = 1250 if flight.source == FRESH["client"] else 1472
        sizes[flight.source] = max(sizes.get(flight.source, 0), len(flight.data))
        return [pair.delay] if len(flight.data) <= limit else []

    pair.fate = fate
    pair.run(0.3)
    pair.move(pair.client, FRESH["client"])
    pair.run(3.0)
    big = [f for f in pair.sent(pair.client, source=FRESH["client"]) if len(f.data) > 1200]
    assert all(f.packet and not f.packet.has(DATAGRAM) for f in big)
    assert len([p for p in pair.server.received if len(p) == 1420]) == 200


# outages


@pytest.mark.parametrize("delay", [0.01, 0.4])
@ENDS
def test_a_long_outage_after_a_move_is_survived(name: str, delay: float) -> None:
    pair = Pair(delay=delay)
    pair.dial()
    pair.run(5.0)
    for each in pair.hosts:
        each.connection.attach(each.lane)
    pair.exchange()
    mover = host(pair, name)
    pair.dead |= {FRESH[name], HOME[name]}
    pair.move(mover, FRESH[name])
    pair.stream(mover, 10, interval=10.0)
    pair.stream(pair.other(mover), 10, interval=10.0)
    pair.run(120.0)
    assert pair.client.wakeups + pair.server.wakeups < 3000
    pair.dead.clear()
    mover.connection.path_event(pair.now)
    pair.pump(mover)
    pair.run(2 + 6 * delay)
    for each in pair.hosts:
        assert each.connection.is_open
        each.received.clear()
    pair.exchange()
    for each in pair.hosts:
        assert len(each.received) == 20
    assert mover.connection.active.addr.local == FRESH[name]


@ENDS
def test_after_a_long_outage_the_flow_is_back_within_a_second(name: str) -> None:
    """Nobody tells: the back-off is capped below a second."""
    pair = quiet()
    sender = host(pair, name)
    pair.dead |= {CLIENT, SERVER}
    pair.send(sender, numbered(1))
    pair.run(600.0)
    pair.dead.clear()
    began = pair.now
    pair.run_until(lambda: sender.connection.active.metrics.last_progress_at > began, 1.0)


def test_an_idle_connection_is_quiet() -> None:
    pair = quiet()
    pair.run(1.0)
    pair.forget()
    wakeups = pair.client.wakeups + pair.server.wakeups
    pair.run(3600.0)
    assert not pair.log
    assert pair.client.wakeups + pair.server.wakeups - wakeups <= 2


@ENDS
def test_a_path_event_asks_at_once(name: str) -> None:
    pair = quiet()
    end = host(pair, name)
    pair.dead |= {CLIENT, SERVER}
    pair.send(end, numbered(1))
    pair.run(30.0)
    pair.dead.clear()
    before = end.connection.active.metrics.in_flight
    end.connection.path_event(pair.now)
    assert end.connection.active.metrics.in_flight <= before
    pair.pump(end)
    assert pair.log[-1].at == pair.now and pair.log[-1].packet is not None
    began = pair.now
    pair.run_until(lambda: end.connection.active.metrics.last_progress_at > began, RTT + 0.01)


# the forwarding attacker of RFC 9000 section 9.3.3


class Forwarder:
    """Sees both ways of the genuine path and forwards every packet faster from its own address.

    What the two ends send to its address it forwards as well, and so it answers challenges.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        ways: str = "both",
        fast: float = 0.002,
        genuine: Callable[[Flight], bool] = lambda flight: True,
        onward: bool = True,
    ) -> None:
        self.pair, self.ways, self.fast, self.genuine, self.onward = (
            pair,
            ways,
            fast,
            genuine,
            onward,
        )
        self.active = True
        self.settled_at: list[float] = []
        pair.fate = self._seen
        pair.outsiders[ATTACKER] = self._lured

    def _forward(self, flight: Flight) -> None:
        other = self.pair.other(flight.sender)
        if self.ways in ("both", flight.sender.name):
            self.pair.after(
                self.fast,
                lambda: self.pair.hand(other, flight.data, PathKey(HOME[other.name], ATTACKER)),
            )

    def _seen(self, flight: Flight) -> list[float]:
        if flight.target == ATTACKER:
            return [self.fast]
        if self.active:
            self._forward(flight)
        return [self.pair.delay] if self.genuine(flight) else []

    def _lured(self, flight: Flight) -> None:
        if self.active and self.onward:
            self._forward(flight)

    def watch(self, seconds: float, step: float = 0.01) -> float:
        """Run; the share of the time in which an end sends to the attacker."""
        lured = 0
        for _ in range(int(seconds / step)):
            self.pair.run(step)
            for each in self.pair.hosts:
                to_him = each.connection.active.addr.remote == ATTACKER
                lured += to_him
                assert not (to_him and not each.connection.settling), "settled on the attacker"
        return lured / (2 * seconds / step)


@pytest.mark.parametrize("ways", ["both", "client", "server"])
def test_a_forwarder_never_keeps_the_flow(ways: str) -> None:
    pair = busy(10.0)
    attacker = Forwarder(pair, ways=ways)
    share = attacker.watch(10.0)
    assert share < 0.2
    pair.run(1.0)
    for each in pair.hosts:
        all_arrived(each, 2000)
        assert each.connection.is_open
    assert pair.client.of(MoveContested) or pair.server.of(MoveContested)


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_forwarder_of_keystrokes_and_echoes(first: str) -> None:
    """A sparse flow gives him the most time between two packets."""
    pair = quiet()
    attacker = Forwarder(pair)
    begins = host(pair, first)
    echoes = pair.other(begins)
    for number in range(60):
        pair.send(begins, numbered(number))
        attacker.watch(DELAY + 0.005, 0.001)
        pair.send(echoes, numbered(number))
        attacker.watch(0.15)
    attacker.watch(1.0)
    for each in pair.hosts:
        all_arrived(each, 60)
    attacker.active = False
    pair.exchange()
    for each in pair.hosts:
        assert each.connection.active.addr.remote == HOME[pair.other(each).name]


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_forwarder_and_one_lost_packet(first: str) -> None:
    """The genuine copy of the luring packet is lost, so that no duplicate gives him away."""
    pair = quiet()
    begins = host(pair, first)
    lost: list[Flight] = []

    def genuine(flight: Flight) -> bool:
        if flight.sender is begins and not lost and flight.packet and flight.packet.has(DATAGRAM):
            lost.append(flight)
            return False
        return True

    attacker = Forwarder(pair, genuine=genuine)
    pair.send(begins, numbered(0))
    pair.run_until(lambda: bool(pair.other(begins).received))
    pair.send(pair.other(begins), numbered(0))
    attacker.watch(2.0)
    assert lost
    for number in range(1, 30):
        for each in (begins, pair.other(begins)):
            pair.send(each, numbered(number))
            attacker.watch(0.05)
    attacker.watch(1.0)
    for each in pair.hosts:
        all_arrived(each, 30)


@pytest.mark.parametrize("seed", range(4))
def test_a_forwarder_on_a_lossy_path(seed: int) -> None:
    pair = busy(10.0, interval=0.02)
    rng = random.Random(seed)
    attacker = Forwarder(pair, genuine=lambda flight: rng.random() > 0.05)
    attacker.watch(10.0)
    pair.run(1.0)
    for each in pair.hosts:
        assert len(each.received) >= 480 and len(set(numbers(each.received))) == len(each.received)


@ENDS
def test_a_forwarder_that_swallows_what_it_lures(name: str) -> None:
    """Copies on the old path carry the data while the move is doubtful."""
    pair = busy(6.0)
    attacker = Forwarder(pair, ways=name, onward=False)
    attacker.watch(5.0)
    pair.run(2.0)
    victim = pair.other(host(pair, name))
    assert pair.sent(victim, target=ATTACKER), "it was lured"
    for each in pair.hosts:
        all_arrived(each, 1200)


@ENDS
def test_copies_carry_packets_of_every_size_while_in_doubt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that fill the datagram, to which a copy's tag no longer fits."""
    monkeypatch.setitem(LINK_MTU, 4, START_MTU)
    pair = quiet()
    victim = pair.other(host(pair, name))
    assert all(each.connection.active.mtu == START_MTU for each in pair.hosts)
    attacker = Forwarder(pair, ways=name, onward=False)
    sizes = range(1150, 1180)
    for number, size in enumerate(sizes):
        pair.after(number * 0.1, lambda: pair.send(host(pair, name), numbered(0, 40)))
        pair.after(
            number * 0.1 + 0.0025,
            lambda number=number, size=size: pair.send(victim, numbered(number, size)),  # type: ignore[misc]
        )
    attacker.watch(4.0)
    assert pair.sent(victim, target=ATTACKER)
    all_arrived(host(pair, name), len(sizes))


@ENDS
def test_the_attacker_gets_no_more_than_three_times(name: str) -> None:
    pair = quiet()
    victim = pair.other(host(pair, name))
    attacker = Forwarder(pair, ways=name, onward=False)
    arrived = 0
    hand = pair.hand

    def counted(host: Host, data: bytes, key: PathKey) -> None:
        nonlocal arrived
        if key.remote == ATTACKER:
            arrived += len(data)
        hand(host, data, key)
        sent = sum(len(f.data) for f in pair.sent(victim, target=ATTACKER))
        assert sent <= 3 * arrived

    pair.hand = counted  # type: ignore[method-assign]
    pair.stream(host(pair, name), 100, size=40)
    pair.stream(victim, 400, size=1100, interval=0.00125)
    attacker.watch(2.0)
    assert arrived


@ENDS
def test_a_settled_forwarder_is_undone_by_a_duplicate(name: str) -> None:
    """He answers challenges with the victim's address forged, so that only one end is lured, and
    the genuine path is silent for a while. Then it speaks again."""
    pair = quiet()
    sender, victim = host(pair, name), pair.other(host(pair, name))
    alive = False
    attacker = Forwarder(pair, ways=name, genuine=lambda flight: alive)
    pair.outsiders[ATTACKER] = lambda flight: pair.hand(
        sender, flight.data, PathKey(HOME[name], HOME[victim.name])
    )
    pair.stream(sender, 600)
    pair.run(1.0)
    assert victim.connection.active.addr.remote == ATTACKER
    assert not victim.connection.settling
    alive = True
    pair.run(0.02)
    assert victim.connection.active.addr.remote == HOME[name]
    assert APPARENT_MEMORY > 1.2
    assert attacker.watch(2.0) < 0.2


# handshake


def test_all_dial_paths_get_the_first_flight() -> None:
    pair = Pair()
    second = PathKey(FRESH["client"], SERVER)
    pair.client.nat[FRESH["client"]] = FRESH["client"]
    pair.dead.add(CLIENT)
    pair.dial()
    pair.run(0.01)
    pair.client.connection.add_dial_path(second)
    pair.pump(pair.client)
    pair.run(0.5)
    assert all(each.connection.is_open for each in pair.hosts)
    assert pair.client.connection.active.addr == second
    assert pair.server.connection.active.addr.remote == FRESH["client"]
    assert pair.now - START < 1.0


@pytest.mark.parametrize("after", [0.5, 1.5, 2.5, 3.5])
def test_rebinding_during_the_handshake(after: float) -> None:
    pair = Pair()
    pair.dial()
    pair.run(after * DELAY)
    pair.rebind(pair.client, CLIENT, FRESH["client"])
    pair.run(3.0)
    assert all(each.connection.is_open for each in pair.hosts)
    for each in pair.hosts:
        each.connection.attach(each.lane)
    pair.exchange()
    pair.run(1.0)
    assert pair.server.connection.active.addr.remote == FRESH["client"]
    for each in pair.hosts:
        assert len(each.received) >= 15


@pytest.mark.parametrize("seed", range(5))
def test_a_handshake_through_heavy_loss(seed: int) -> None:
    pair = Pair()
    rng = random.Random(seed)
    pair.fate = lambda flight: [pair.delay] if rng.random() > 0.3 else []
    pair.dial()
    pair.run_until(lambda: all(each.connection.is_open for each in pair.hosts), 30.0)


def test_the_handshake_amplifies_no_more_than_three_times() -> None:
    pair = Pair()
    pair.fate = lambda flight: [pair.delay] if flight.sender is pair.client else []
    pair.dial()
    pair.run(DELAY + 0.001)
    came = sum(len(f.data) for f in pair.sent(pair.client))
    pair.fate = lambda flight: []
    pair.run(4.0)
    assert 0 < sum(len(f.data) for f in pair.sent(pair.server)) <= 3 * came


# data path


def test_one_datagram_a_packet_so_that_a_number_names_it() -> None:
    pair = quiet()
    pair.send(pair.client, *[numbered(i, 40) for i in range(20)])
    pair.run(0.5)
    counts = [len(packet.content(DATAGRAM)) for packet in opened(pair.sent(pair.client))]
    assert max(counts) == 1 and sum(counts) == 20


def test_detached_nothing_is_pulled_and_attached_elsewhere_it_goes_on() -> None:
    pair = quiet()
    connection = pair.client.connection
    connection.detach()
    pair.send(pair.client, numbered(1))
    pair.run(0.1)
    assert not pair.server.received
    connection.attach(pair.client.lane)
    pair.pump(pair.client)
    pair.run(0.1)
    assert numbers(pair.server.received) == [1]


def test_acknowledgements_are_never_later_than_announced() -> None:
    pair = quiet()
    for each in pair.hosts:
        assert each.connection.max_ack_delay == pytest.approx(0.005)
    pair.send(pair.client, numbered(1))
    sent = pair.now
    pair.run(1.0)
    answers = [f for f in pair.sent(pair.server) if f.packet and f.packet.has(ACK)]
    assert answers[0].at - (sent + DELAY) <= 0.005


def test_everything_arrives_once_over_a_bad_network() -> None:
    """Reordering and duplication; each datagram once, no spurious moves."""
    pair = quiet()
    rng = random.Random(3)

    def fate(flight: Flight) -> list[float]:
        times = [pair.delay + rng.random() * 0.02]
        return times + [pair.delay + rng.random() * 0.05] * (rng.random() < 0.2)

    pair.fate = fate
    for each in pair.hosts:
        pair.stream(each, 500, interval=0.002)
    pair.run(3.0)
    for each in pair.hosts:
        all_arrived(each, 500)
        assert not each.of(PeerMoved) and not each.of(MoveContested)


def test_a_close_reaches_the_other_end() -> None:
    pair = quiet()
    pair.client.connection.close(error_code=4, reason_phrase="bye")
    pair.pump(pair.client)
    pair.run(1.0)
    closed = pair.closed(pair.server)
    assert closed is not None and (closed.error_code, closed.reason_phrase) == (4, "bye")
    assert all(each.connection.is_closed for each in pair.hosts)
    assert isinstance(pair.client.lane, Lane)


def test_two_ends_that_follow_each_other_come_to_rest() -> None:
    """The client sends on one path, the server on another, and both change to the other's at once:
    were both to follow, and to follow again, they would swap the two paths for ever."""
    pair = Pair.established()
    pair.exchange()
    far = {
        "client": PathKey(FRESH["client"], FRESH["server"]),
        "server": PathKey(FRESH["server"], FRESH["client"]),
    }
    for host in pair.hosts:
        host.nat.setdefault(FRESH[host.name], FRESH[host.name])
        host.connection.vouch(far[host.name], 2 * DELAY, pair.now, trusted=True)
        pair.stream(host, 300)
    client, server = pair.client.connection, pair.server.connection
    client._settled_in_at = pair.now + 60.0
    server.move(far["server"], pair.now)
    pair.run(0.5)
    assert (client.active.addr.local, server.active.addr.local) == (CLIENT, FRESH["server"])
    client.move(far["client"], pair.now)
    server.move(PathKey(SERVER, CLIENT), pair.now)
    client._settled_in_at = server._settled_in_at = 0.0  # as when their own moves are long ago
    for host in pair.hosts:
        pair.pump(host)
    before = sum(len(host.of(PeerMoved)) for host in pair.hosts)
    pair.run(0.9)
    assert sum(len(host.of(PeerMoved)) for host in pair.hosts) - before <= 3
