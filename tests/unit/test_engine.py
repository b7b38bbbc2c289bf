"""The data path of a peer: split to fit, delivered once, from nobody but the peer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.datapath.engine import DELIVERED_WINDOW, Engine
from tunnel.datapath.kinds import (
    KIND_COPY,
    KIND_PACKET,
    KIND_PART,
    decode_part,
    encode_varint,
    split,
)
from tunnel.datapath.queue import LOW_WATER_BYTES
from tunnel.quic.paths import START_MTU

SMALL_ROOM = 1170  # of a packet of 1,200 bytes
LARGE_ROOM = 1442  # of one of 1,472 bytes


def engine() -> Engine:
    made = Engine(lambda packet: True)
    made.resume(0.0)
    return made


def send_all(sender: Engine, room: int, *, number: int = 0) -> list[tuple[int, bytes]]:
    out = []
    while (payload := sender.next_datagram(room, 0.0)) is not None:
        assert len(payload) <= room
        sender.sent(number, 0.0)
        out.append((number, payload))
        number += 1
    return out


def packet_of(size: int, fill: int = 0) -> bytes:
    return (b"E" + fill.to_bytes(4)).ljust(size, b".")


def copy_of(root: int, payload: bytes) -> bytes:
    return bytes((KIND_COPY,)) + encode_varint(root) + payload


# sending


def test_a_packet_that_fits_goes_as_kind_0() -> None:
    sender = engine()
    sender.push(packet_of(SMALL_ROOM - 1), 0.0)
    assert send_all(sender, SMALL_ROOM) == [(0, b"\0" + packet_of(SMALL_ROOM - 1))]
    assert (sender.counters.sent, sender.counters.split) == (1, 0)
    assert sender.counters.sent_bytes == SMALL_ROOM


def test_a_packet_that_does_not_fit_goes_in_parts() -> None:
    sender, receiver = engine(), engine()
    sender.push(packet_of(SMALL_ROOM), 0.0)
    sent = send_all(sender, SMALL_ROOM)
    assert [payload[0] for _, payload in sent] == [KIND_PART, KIND_PART]
    assert (sender.counters.sent, sender.counters.split) == (1, 1)
    for number, payload in reversed(sent):
        receiver.received(number, payload, 0.0)
    assert receiver.take_received() == [packet_of(SMALL_ROOM)]


def test_the_same_payload_until_it_has_left() -> None:
    sender = engine()
    sender.push(packet_of(100, 1), 0.0)
    sender.push(packet_of(100, 2), 0.0)
    first = sender.next_datagram(LARGE_ROOM, 0.0)
    assert sender.next_datagram(LARGE_ROOM, 0.0) == first
    sender.sent(0, 0.0)
    second = sender.next_datagram(LARGE_ROOM, 0.0)
    assert second == b"\0" + packet_of(100, 2)
    sender.sent(1, 0.0)
    assert sender.next_datagram(LARGE_ROOM, 0.0) is None
    assert not sender.has_pending


def test_a_packet_cut_for_a_large_path_is_cut_again_for_a_small_one() -> None:
    sender, receiver = engine(), engine()
    packet = packet_of(1420)
    sender.push(packet, 0.0)
    assert sender.next_datagram(LARGE_ROOM, 0.0) == b"\0" + packet
    sent = send_all(sender, SMALL_ROOM)
    assert [payload[0] for _, payload in sent] == [KIND_PART, KIND_PART]
    for number, payload in sent:
        receiver.received(number, payload, 0.0)
    assert receiver.take_received() == [packet]


def test_no_room_at_all_offers_nothing_and_loses_nothing() -> None:
    sender, receiver = engine(), engine()
    packet = packet_of(1420)
    sender.push(packet, 0.0)
    assert sender.next_datagram(500, 0.0) is None
    assert sender.has_pending
    for number, payload in send_all(sender, SMALL_ROOM):
        receiver.received(number, payload, 0.0)
    assert receiver.take_received() == [packet]


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    st.lists(st.integers(1163, 1500), min_size=1, max_size=8),
)
def test_nothing_oversize_whatever_the_path_does(sizes: list[int], rooms: list[int]) -> None:
    sender, receiver = engine(), engine()
    packets = [packet_of(max(size, 5), i) for i, size in enumerate(sizes)]
    for packet in packets:
        sender.push(packet, 0.0)
    turn = itertools.cycle(rooms)
    number = 0
    while sender.has_pending:
        room = next(turn)
        payload = sender.next_datagram(room, 0.0)
        assert payload is not None and len(payload) <= room
        if number % 3:  # sometimes asked twice, with another room
            room = next(turn)
            payload = sender.next_datagram(room, 0.0)
            assert payload is not None and len(payload) <= room
        sender.sent(number, 0.0)
        receiver.received(number, payload, 0.0)
        number += 1
        assert number < 200
    assert receiver.take_received() == packets
    assert sender.counters.sent == receiver.counters.received == len(packets)


def test_parts_fit_the_smallest_path_even_as_copies() -> None:
    overhead = 1 + 8 + 2 + 16 + 3  # short header, AEAD tag, DATAGRAM frame
    tag = 1 + 8  # kind 1 and the largest root
    assert max(len(p) for p in split(9999, bytes(65535))) + tag + overhead <= START_MTU


def test_identifiers_differ() -> None:
    sender = engine()
    for fill in range(3):
        sender.push(packet_of(1420, fill), 0.0)
    found = [decode_part(payload).identifier for _, payload in send_all(sender, SMALL_ROOM)]
    assert len(set(found)) == 3 and found[0] == found[1]


# receiving


def test_duplicates_and_copies_in_every_order_are_delivered_once() -> None:
    payload = b"\0" + packet_of(50)
    arrivals = [
        (7, payload),
        (9, copy_of(7, payload)),
        (12, copy_of(7, payload)),
        (12, copy_of(7, payload)),
    ]
    for order in itertools.permutations(arrivals):
        receiver = engine()
        for number, data in order:
            receiver.received(number, data, 0.0)
        assert receiver.take_received() == [packet_of(50)]
        assert receiver.counters.copies_received == 3
        assert receiver.counters.copies_dropped == 3


def test_the_number_of_a_copy_names_nothing() -> None:
    """A copy in packet 9 must not hide the datagram that first left in packet 9."""
    receiver = engine()
    receiver.received(9, copy_of(7, b"\0" + packet_of(50, 1)), 0.0)
    receiver.received(9, b"\0" + packet_of(50, 2), 0.0)
    assert receiver.take_received() == [packet_of(50, 1), packet_of(50, 2)]


@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_parts_and_their_copies_in_any_order(rng: object, count: int) -> None:
    sender, receiver = engine(), engine()
    packets = [packet_of(1300 + i, i) for i in range(count)]
    for packet in packets:
        sender.push(packet, 0.0)
    sent = send_all(sender, SMALL_ROOM)
    arrivals = sent + [(1000 + n, copy_of(n, payload)) for n, payload in sent] + sent
    rng.shuffle(arrivals)  # type: ignore[attr-defined]
    for number, payload in arrivals:
        receiver.received(number, payload, 0.0)
    assert sorted(receiver.take_received()) == sorted(packets)


def test_the_window_slides_and_nothing_below_it_comes_twice() -> None:
    receiver = engine()
    arrived = list(range(DELIVERED_WINDOW + 1))
    arrived.remove(5)
    arrived.append(5)  # one packet is very late
    arrived += range(DELIVERED_WINDOW + 1, 2 * DELIVERED_WINDOW + 10)
    for number in arrived:
        receiver.received(number, b"\0E", 0.0)
    assert receiver.counters.received == len(arrived)
    for root in range(0, 2 * DELIVERED_WINDOW + 10, 11):
        receiver.received(100_000 + root, copy_of(root, b"\0E"), 0.0)
    assert receiver.counters.received == len(arrived)


def test_the_window_is_bounded_and_wide_enough() -> None:
    receiver = engine()
    for number in range(1, 5 * DELIVERED_WINDOW):
        receiver.received(number, b"\0E", 0.0)
    assert len(receiver._delivered) + len(receiver._delivered_before) <= 2 * DELIVERED_WINDOW
    before = receiver.counters.received
    late = 5 * DELIVERED_WINDOW - 1
    receiver.received(late + 9, copy_of(late - DELIVERED_WINDOW + 2, b"\0E"), 0.0)
    assert receiver.counters.received == before, "still remembered"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes((KIND_COPY,)),
        bytes((KIND_COPY, 0x40)),
        bytes((KIND_COPY, 5)),
        bytes((KIND_PART, 1)),
        bytes((KIND_PART, 1, 0, 2)) + b"x",
    ],
)
def test_malformed_datagrams_are_counted(payload: bytes) -> None:
    receiver = engine()
    receiver.received(1, payload, 0.0)
    assert receiver.take_received() == []
    assert receiver.counters.malformed == 1


@pytest.mark.parametrize("kind", [3, 17, 63])
def test_unknown_kinds_are_ignored(kind: int) -> None:
    receiver = engine()
    receiver.received(1, bytes((kind,)) + packet_of(50), 0.0)
    assert receiver.take_received() == []
    assert (receiver.counters.unknown_kind, receiver.counters.malformed) == (1, 0)


def test_a_copy_of_a_copy_is_not_delivered() -> None:
    receiver = engine()
    receiver.received(1, copy_of(4, copy_of(5, b"\0" + packet_of(50))), 0.0)
    assert receiver.take_received() == []


@given(st.integers(0, 2**20), st.binary(max_size=60))
def test_whatever_arrives_does_not_raise(number: int, payload: bytes) -> None:
    receiver = engine()
    receiver.received(number, payload, 0.0)
    receiver.received(number + 1, payload, 0.0)


@pytest.mark.parametrize("big", [False, True])
def test_a_source_that_is_not_allowed_is_refused(big: bool) -> None:
    seen: list[bytes] = []

    def permits(packet: bytes) -> bool:
        seen.append(packet)
        return packet[1:5] == b"\0\0\0\1"

    receiver = Engine(permits)
    good, bad = packet_of(1400 if big else 60, 1), packet_of(1400 if big else 60, 2)
    sender = engine()
    for packet in (bad, good):
        sender.push(packet, 0.0)
    for number, payload in send_all(sender, SMALL_ROOM):
        receiver.received(number, payload, 0.0)
    assert seen == [bad, good]
    assert receiver.take_received() == [good]
    assert (receiver.counters.refused, receiver.counters.received) == (1, 1)
    assert receiver.counters.received_bytes == len(good)


# lifecycle


def test_paused_it_sends_nothing_and_goes_on_queueing() -> None:
    sender = engine()
    sender.pause()
    sender.push(packet_of(60), 0.0)
    assert (sender.has_pending, sender.paused) == (False, True)
    sender.resume(1.0)
    assert (sender.has_pending, sender.paused) == (True, False)


def test_resuming_puts_the_newest_of_each_flow_first() -> None:
    sender = engine()
    sender.pause()
    for number in range(3):
        sender.push(flow_packet(1, number), 10.0)
    sender.push(flow_packet(2, 0), 10.0)
    sender.resume(10.1)
    sent = [payload[1:] for _, payload in send_all(sender, SMALL_ROOM)]
    assert sent == [
        flow_packet(1, 1),
        flow_packet(1, 2),
        flow_packet(2, 0),
        flow_packet(1, 0),
    ]


def test_resuming_what_runs_changes_no_order() -> None:
    sender = engine()
    for number in range(4):
        sender.push(flow_packet(1, number), 0.0)
    sender.resume(100.0)
    assert len(send_all(sender, SMALL_ROOM)) == 4


def flow_packet(flow: int, number: int) -> bytes:
    head = bytearray(20)
    head[0], head[9] = 0x45, 17
    return bytes(head) + flow.to_bytes(2) + bytes(2) + number.to_bytes(4)


def test_backpressure() -> None:
    sender = engine()
    wants: list[bool] = []
    sender.push(bytes(LOW_WATER_BYTES - 1), 0.0)
    wants.append(sender.wants_packets)
    sender.push(b"E", 0.0)
    wants.append(sender.wants_packets)
    assert wants == [True, False]
    sender.pause()
    assert sender.wants_packets, "without a path the oldest must make room for the newest"


def test_a_new_connection_forgets_numbers_and_keeps_what_waits() -> None:
    both = engine()
    both.received(3, b"\0" + packet_of(60, 1), 0.0)
    both.received(4, split(1, packet_of(1420))[0], 0.0)
    both.push(packet_of(60, 7), 0.0)
    assert both.next_datagram(LARGE_ROOM, 0.0) is not None
    both.new_connection()
    both.received(3, b"\0" + packet_of(60, 2), 0.0)
    assert both.take_received() == [packet_of(60, 1), packet_of(60, 2)]
    both.received(5, split(1, packet_of(1420))[1], 0.0)
    assert both.take_received() == [], "parts of two connections never mix"
    assert send_all(both, LARGE_ROOM) == [(0, bytes((KIND_PACKET,)) + packet_of(60, 7))]


def test_the_rest_of_a_packet_begun_on_the_old_connection_is_dropped() -> None:
    sender, receiver = engine(), engine()
    sender.push(packet_of(1420, 1), 0.0)
    sender.push(packet_of(60, 2), 0.0)
    assert sender.next_datagram(SMALL_ROOM, 0.0) is not None
    sender.sent(0, 0.0)
    sender.new_connection()
    for number, payload in send_all(sender, SMALL_ROOM):
        receiver.received(number, payload, 0.0)
    assert receiver.take_received() == [packet_of(60, 2)]
    assert not receiver._reassembler._packets


def test_a_packet_only_prepared_survives_a_new_connection() -> None:
    sender, receiver = engine(), engine()
    sender.push(packet_of(1420, 1), 0.0)
    assert sender.next_datagram(SMALL_ROOM, 0.0) is not None
    sender.new_connection()
    for number, payload in send_all(sender, SMALL_ROOM):
        receiver.received(number, payload, 0.0)
    assert receiver.take_received() == [packet_of(1420, 1)]
