"""The binding of the native engine: what is delivered, what is refused, who outlives whom."""

from __future__ import annotations

import gc
import random
import weakref
from ipaddress import ip_network

import pytest

from tests.unit.engine_pair import DATA_OVERHEAD, MTU, START, End, ends, varint
from tests.unit.quic_pair import EVERYTHING, numbered, numbers
from tunnel.datapath.engine import Datapath
from tunnel.datapath.native.engine import Connection, Engine, Lane, Path

PACKET, COPY, PART = b"\0", b"\1", b"\2"


def datagram(payload: bytes, *, last: bool = False) -> bytes:
    """A DATAGRAM frame (RFC 9221), without a length when it is the last one."""
    return b"\x30" + payload if last else b"\x31" + varint(len(payload)) + payload


def part(identifier: int, offset: int, last: bool, data: bytes) -> bytes:
    return PART + varint(identifier) + varint(offset) + bytes([last]) + data


def from_host(source: str, number: int = 1) -> bytes:
    packet = bytearray(numbered(number))
    packet[12:16] = bytes(map(int, source.split(".")))
    return bytes(packet)


def hand(near: End, far: End, number: int, *payloads: bytes, now: float = START) -> list[bytes]:
    frames = b"".join(datagram(payload) for payload in payloads)
    return far.receive(near.craft(number, frames), now=now)


# what is delivered


def test_packets_arrive_as_they_were_sent() -> None:
    near, far = ends()
    packets = [numbered(i, size) for i, size in enumerate([24, 40, 100, 1000, 1168])]
    sent = near.send(*packets, now=START)
    assert [len(data) for data in sent] == [len(p) + DATA_OVERHEAD for p in packets]
    assert far.receive(*sent, now=START) == packets
    assert near.lane.counters["tx_packets"] == far.lane.counters["rx_packets"] == 5


@pytest.mark.parametrize("last", [True, False])
def test_both_forms_of_the_frame(last: bool) -> None:
    near, far = ends()
    data = near.craft(5, datagram(PACKET + numbered(3), last=last))
    assert far.receive(data, now=START) == [numbered(3)]


def test_a_packet_comes_out_once_however_often_its_datagram_arrives() -> None:
    near, far = ends()
    sent = near.send(numbered(1), now=START)
    assert far.receive(*3 * sent, now=START) == [numbered(1)]
    assert far.connection.counters["duplicates"] == 2


@pytest.mark.parametrize("copy_first", [True, False])
def test_of_a_datagram_and_its_copy_the_first_counts(copy_first: bool) -> None:
    near, far = ends()
    original, copy = PACKET + numbered(7), COPY + varint(10) + PACKET + numbered(7)
    turns = [(11, copy), (10, original)] if copy_first else [(10, original), (11, copy)]
    came = [hand(near, far, number, payload) for number, payload in turns]
    assert came == [[numbered(7)], []]
    assert hand(near, far, 12, copy) == []
    counters = far.lane.counters
    assert (counters["copies_received"], counters["copies_dropped"]) == (2, 2)
    assert counters["malformed_datagrams"] == 0


def test_a_number_names_one_datagram() -> None:
    """A second one in the same packet is taken for a copy of the first (docs/protocol.md)."""
    near, far = ends()
    assert hand(near, far, 5, PACKET + numbered(1), PACKET + numbered(2)) == [numbered(1)]
    assert far.lane.counters["copies_dropped"] == 1


@pytest.mark.parametrize("root", [20, 21, 2**62 - 1])
def test_a_copy_of_what_left_later_is_refused(root: int) -> None:
    near, far = ends()
    assert hand(near, far, 20, COPY + varint(root) + PACKET + numbered(7)) == []
    assert far.lane.counters["malformed_datagrams"] == 1
    assert hand(near, far, 21, PACKET + numbered(8)) == [numbered(8)], "it took nobody's place"


def test_a_copy_of_a_copy_is_refused() -> None:
    near, far = ends()
    payload = COPY + varint(1) + COPY + varint(0) + PACKET + numbered(1)
    assert hand(near, far, 5, payload) == []
    assert far.lane.counters["malformed_datagrams"] == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        COPY,
        COPY + b"\x40",
        COPY + varint(1),
        PART,
        PART + varint(1),
        part(1, 0, True, b""),
        part(1, 65536, True, b"x"),
        part(1, 65535, True, b"xy"),
        PART + varint(1) + varint(0) + b"\x02" + numbered(1),
        b"\x03" + numbered(1),
        b"\xff",
    ],
)
def test_malformed_payloads_are_counted_and_nothing_else(payload: bytes) -> None:
    near, far = ends()
    assert hand(near, far, 5, payload) == []
    assert far.lane.counters["malformed_datagrams"] == 1
    assert far.error(START) is None, "a kind nobody knows is no reason to close"
    assert hand(near, far, 6, PACKET + numbered(2)) == [numbered(2)]


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        numbered(1)[:-1],
        numbered(1) + b"x",
        bytes([0x44]) + numbered(1)[1:],
        bytes([0x4F]) + numbered(1, 40)[1:],
        bytes([0x55]) + numbered(1)[1:],
        bytes([0x60]) + bytes(39 + 5),
    ],
)
def test_what_is_no_ip_packet_is_refused(packet: bytes) -> None:
    near, far = ends()
    assert hand(near, far, 5, PACKET + packet) == []
    assert far.lane.counters["refused_packets"] == 1


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (b"\x31", 7),
        (b"\x31\x40", 7),
        (b"\x31" + varint(10) + b"123456789", 7),
        (b"\x31" + varint(2**62 - 1) + b"123456789", 7),
        (b"", 10),
    ],
)
def test_malformed_frames_close_the_connection(frames: bytes, code: int) -> None:
    near, far = ends()
    data = near.craft(5, frames)
    if frames:
        assert far.receive(data, now=START) == []
        assert far.error(START) == code
    else:  # RFC 9000 section 12.4: no frames at all; too short to be protected, even
        far.receive(data, now=START)
        assert far.error(START) in (code, None)


@pytest.mark.parametrize("seed", range(5))
def test_any_authentic_bytes_have_an_end(seed: int) -> None:
    rng = random.Random(seed)
    near, far = ends()
    for number in range(400):
        kind = rng.choice([b"\x30", b"\x31", b"\x02", b"\x03", b"", b"\x06"])
        tail = bytes(
            rng.choice([0, 1, 2, 3, 0x30, 0x31, 0x40, 0x80, 0xC0, 0xFF]) for _ in range(30)
        )
        payload = kind + (tail if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 900)))
        far.receive(near.craft(number, payload), now=START + number / 1000)
        far.reports(START)
        far.engine.take_sealed()
    assert far.path.in_flight >= 0


# in parts


@pytest.mark.parametrize("size", [MTU - DATA_OVERHEAD + 1, 1280, 1500, 9000, 65535])
def test_a_packet_too_large_for_the_path_leaves_in_parts(size: int) -> None:
    near, far = ends()
    sent = near.send(numbered(4, size), now=START)
    assert len(sent) == -(-size // 1150) and max(map(len, sent)) <= MTU
    random.Random(size).shuffle(sent)
    assert far.receive(*sent, now=START) == [numbered(4, size)]
    assert near.lane.counters["split_packets"] == 1
    assert (near.lane.counters["tx_packets"], far.lane.counters["rx_packets"]) == (1, 1)


def test_a_packet_with_a_part_missing_never_comes_out() -> None:
    near, far = ends()
    first, *rest = near.send(numbered(4, 3000), now=START)
    assert far.receive(*rest, now=START) == []
    assert far.receive(first, now=START) == [numbered(4, 3000)]


def test_parts_of_two_packets_do_not_mix() -> None:
    near, far = ends()
    one, two = numbered(1, 200), numbered(2, 200)
    assert hand(near, far, 1, part(1, 0, False, one[:100])) == []
    assert hand(near, far, 2, part(2, 100, True, two[100:])) == []
    assert hand(near, far, 3, part(1, 100, True, one[100:])) == [one]
    assert hand(near, far, 4, part(2, 0, False, two[:100])) == [two]


def test_a_packet_in_parts_is_judged_whole() -> None:
    near, far = ends(far=Datapath([[ip_network("10.0.0.0/8")]]))
    packet = from_host("192.0.2.1")
    assert hand(near, far, 1, part(1, 0, False, packet[:50])) == []
    assert hand(near, far, 2, part(1, 50, True, packet[50:])) == []
    assert far.lane.counters["refused_packets"] == 1


# whose packets


def test_only_sources_of_the_peers_own_networks_come_out() -> None:
    networks = [[ip_network("10.1.0.0/16"), ip_network("fd00::/16")], [ip_network("10.2.0.0/16")]]
    near, far = ends(far=Datapath(networks))
    good, others = from_host("10.1.2.3"), from_host("10.2.2.3")
    six = bytearray(40)
    six[0] = 0x60
    six[8:10] = b"\xfd\x00"
    for number, packet in enumerate([good, others, from_host("8.8.8.8"), bytes(six)]):
        came = hand(near, far, number, PACKET + packet)
        assert came == ([packet] if packet in (good, bytes(six)) else [])
    assert far.lane.counters["refused_packets"] == 2


def test_packets_go_to_the_lane_of_their_destination() -> None:
    datapath = Datapath([[ip_network("10.1.0.0/16")], [ip_network("10.1.5.0/24")]])
    lanes = [datapath.lane(0), datapath.lane(1)]
    packet = bytearray(numbered(1))
    for target, owner in (("10.1.1.1", 0), ("10.1.5.1", 1), ("10.2.0.1", None)):
        packet[16:20] = bytes(map(int, target.split(".")))
        before = [lane.queue_packets for lane in lanes]
        assert datapath.push(bytes(packet), START) is (owner is not None)
        grown = [lane.queue_packets - was for lane, was in zip(lanes, before, strict=True)]
        assert grown == [int(owner == 0), int(owner == 1)]
    assert datapath.unroutable == 1
    assert not datapath.push(b"", START) and not datapath.push(b"\x45", START)


# connections come and go


def test_nothing_leaves_while_held_and_everything_afterwards() -> None:
    near, far = ends()
    near.lane.hold()
    assert near.send(numbered(1), now=START) == []
    assert (near.lane.held, near.lane.pending, near.lane.queue_packets) == (True, False, 1)
    near.lane.recover(START + 1)
    assert near.lane.pending
    assert numbers(far.receive(*near.flush(START + 1), now=START + 1)) == [1]


def test_detached_nothing_leaves_and_nothing_comes_out() -> None:
    near, far = ends()
    near.connection.detach()
    far.connection.detach()
    assert near.send(numbered(1), now=START) == []
    assert hand(near, far, 5, PACKET + numbered(2)) == []
    near.connection.attach(near.lane)
    far.connection.attach(far.lane)
    assert numbers(far.receive(*near.flush(START), now=START)) == [1]


def test_a_lane_serves_the_connection_that_came_last() -> None:
    near, _ = ends()
    other, peer = ends(near.datapath)
    other.connection.attach(near.lane)
    near.lane.push(numbered(1), START)
    assert near.flush(START) == []
    sent = other.flush(START)
    assert numbers(peer.receive(*sent, now=START)) == [1]
    near.connection.detach()  # of what it no longer has: changes nothing
    near.lane.push(numbered(2), START)
    assert len(other.flush(START)) == 1


def test_a_connection_leaves_one_lane_for_another() -> None:
    near, far = ends(Datapath([[], []]))
    second = near.datapath.lane(1)
    near.connection.attach(second)
    near.lane.push(numbered(1), START)
    second.push(numbered(2), START)
    sent = near.flush(START)
    del near.connection, near.path
    gc.collect()
    near.lane.push(numbered(3), START)  # whose connection is gone
    assert numbers(far.receive(*sent, now=START)) == [2]


def test_parts_do_not_go_on_over_another_connection() -> None:
    near, far = ends()
    assert hand(near, far, 1, part(1, 0, False, numbered(1)[:50])) == []
    far.connection.detach()
    far.connection.attach(far.lane)
    assert hand(near, far, 2, part(1, 50, True, numbered(1)[50:])) == []


def test_stopped_nothing_is_opened_but_the_owner_may_still_seal() -> None:
    near, far = ends()
    sent = near.send(numbered(1), now=START)
    far.connection.stop()
    assert far.receive(*sent, now=START) == [] and not far.connection.running
    near.connection.stop()
    assert near.send(numbered(2), now=START) == []
    assert near.connection.get_timer() is None
    assert len(near.craft(9, b"\x1c\0\0\0")) == 1 + 8 + 4 + 4 + 16


# paths


def test_a_removed_path_has_a_name_for_it() -> None:
    near, _ = ends()
    second = near.add_path()
    second.remove()
    assert second.removed
    with pytest.raises(RuntimeError, match="removed"):
        second.mtu  # noqa: B018
    second.remove()
    near.path.remove()
    assert not near.path.removed, "the active one stays"


def test_slots_end_and_are_used_again() -> None:
    near, _ = ends()
    added: list[Path] = []
    with pytest.raises(RuntimeError, match="slot"):
        while True:
            added.append(near.add_path())
    assert len(added) >= 32
    added[5].remove()
    again = near.add_path()
    assert again.index not in {path.index for path in added if not path.removed}
    assert (again.in_flight, again.has_rtt, again.lost) == (0, False, 0)


@pytest.mark.parametrize("size", [0, 1199, 1501, 65535])
def test_no_path_has_a_size_that_cannot_be(size: int) -> None:
    near, _ = ends()
    with pytest.raises(ValueError, match=str(size)):
        near.path.mtu = size


def test_what_waits_for_a_removed_path_does_not_leave_elsewhere() -> None:
    near, _ = ends()
    second = near.add_path()
    near.connection.activate(second)
    near.lane.push(numbered(1), START)
    assert near.connection.seal(START) == 1
    near.connection.activate(near.path)
    second.remove()
    near.add_path()
    near.lane.push(numbered(2), START)
    near.connection.seal(START)
    sent = near.engine.take_sealed()
    assert [path for path, _ in sent] == 2 * [near.path]
    new, again = [near.seals.open(data) for _, data in sent]
    assert (new[0], new[2]) == (1, datagram(PACKET + numbered(2), last=True))
    assert (again[0], again[2]) == (2, datagram(COPY + b"\0" + PACKET + numbered(1), last=True))


def test_an_unproven_address_gets_three_times_what_came() -> None:
    near, _ = ends()
    near.path.limited = True
    near.path.bytes_received = 400
    sent = near.send(*[numbered(i) for i in range(50)], now=START)
    total = sum(map(len, sent))
    assert 1200 - 131 < total <= 1200
    assert near.path.sendable == 1200 - total
    near.path.limited = False
    assert len(near.flush(START)) == 50 - len(sent)


# lifetime


def build(rng: random.Random) -> list[object]:
    """Everything there is, in use, with packets in the outbox and in the queue."""
    near, far = ends()
    sent = near.send(*[numbered(i) for i in range(20)], now=START)
    far.receive(*sent[:10], sent[11], now=START)  # an ACK waits in the outbox
    near.lane.push(numbered(99), START)
    near.connection.seal(START)
    hand(near, far, 500, part(1, 0, False, b"E" * 50))
    near.connection.owner = near  # a circle, as the owner makes one
    near.path.owner = near.connection
    things: list[object] = []
    for end in (near, far):
        things += [end, end.engine, end.lane, end.connection, end.path, end.add_path()]
        things += [end.datapath]
    rng.shuffle(things)
    return things


@pytest.mark.parametrize("seed", range(40))
def test_objects_may_go_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    things = build(rng)
    engines = [thing for thing in things if isinstance(thing, Engine)]
    if rng.random() < 0.5:
        things = [t for t in things if not isinstance(t, (End, Datapath))]
    while things:
        del things[rng.randrange(len(things))]
        if rng.random() < 0.5:
            gc.collect()
        for engine in engines:
            engine.take_sealed()
            engine.take_delivered()
    engines.clear()
    gc.collect()


def test_a_connection_that_went_leaves_nothing_in_the_outbox() -> None:
    datapath = Datapath([EVERYTHING])
    near, _ = ends(datapath)
    near.lane.push(numbered(1), START)
    assert near.connection.seal(START) == 1
    del near
    gc.collect()
    assert datapath.engine.take_sealed() == []


def test_circles_are_collected() -> None:
    near, far = ends()
    near.connection.owner, near.path.owner = near, near
    lane = weakref.ref(near.lane)
    end = weakref.ref(near)
    del near, far
    gc.collect()
    assert lane() is None and end() is None


def test_parts_alone_keep_what_they_need() -> None:
    path = ends()[0].path
    gc.collect()
    assert isinstance(path.connection, Connection) and path.in_flight == 0
    lane = ends()[0].lane
    gc.collect()
    lane.push(numbered(1), START)
    assert lane.queue_packets == 1 and isinstance(lane, Lane)


def test_peers_may_come_and_go() -> None:
    datapath = Datapath([[ip_network("10.88.0.0/16")]])
    first = datapath.lane(0)
    to_newcomer = bytearray(numbered(1))
    to_newcomer[16:20] = bytes([10, 88, 7, 2])
    assert datapath.push(bytes(to_newcomer), START)
    assert first.queue_packets == 1
    owner = datapath.allow([ip_network("10.88.7.0/24")])
    assert not datapath.push(bytes(to_newcomer), START)  # it has no lane yet
    lane = datapath.lane(owner)
    assert datapath.push(bytes(to_newcomer), START)
    assert (first.queue_packets, lane.queue_packets, datapath.unroutable) == (1, 1, 1)
    datapath.disallow(owner)
    assert datapath.push(bytes(to_newcomer), START)
    assert (first.queue_packets, lane.queue_packets) == (2, 1)
    assert datapath.allow([ip_network("10.99.0.0/16")]) == owner + 1  # a place is not used twice
