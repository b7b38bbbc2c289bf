"""The packet queue: bounded, drops its oldest, revives every flow with its newest packets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.datapath.queue import (
    FRESH,
    MAX_BYTES,
    MAX_PACKETS,
    NEWEST_PER_FLOW,
    STALE,
    PacketQueue,
    flow_of,
)


def ipv4(flow: int, number: int = 0, *, size: int = 60, fragment: int = 0, ihl: int = 5) -> bytes:
    head = bytearray(ihl * 4)
    head[0] = 0x40 | ihl
    head[6:8] = fragment.to_bytes(2)
    head[9] = 17
    head[12:16] = bytes((10, 0, 0, 1))
    head[16:20] = bytes((10, 0, 0, 2))
    ports = flow.to_bytes(2) + (53).to_bytes(2)
    return (bytes(head) + ports + number.to_bytes(4)).ljust(size, b"\0")


def ipv6(flow: int, number: int = 0) -> bytes:
    head = bytearray(40)
    head[0] = 0x60
    head[6] = 6
    return bytes(head) + flow.to_bytes(2) + (22).to_bytes(2) + number.to_bytes(4)


def drain(queue: PacketQueue, now: float = 0.0) -> list[bytes]:
    packets = []
    while (packet := queue.pop(now)) is not None:
        packets.append(packet)
    return packets


def test_first_in_first_out() -> None:
    queue = PacketQueue()
    packets = [ipv4(1, number) for number in range(5)]
    for packet in packets:
        queue.push(packet, 0.0)
    assert (len(queue), queue.bytes) == (5, 300)
    assert drain(queue) == packets
    assert (len(queue), queue.bytes, queue.dropped) == (0, 0, 0)


def test_bounded_in_packets_drops_the_oldest() -> None:
    queue = PacketQueue()
    for number in range(MAX_PACKETS + 3):
        queue.push(ipv4(1, number), 0.0)
    assert (len(queue), queue.dropped) == (MAX_PACKETS, 3)
    assert queue.pop(0.0) == ipv4(1, 3)


def test_bounded_in_bytes_drops_the_oldest() -> None:
    queue = PacketQueue()
    count = MAX_BYTES // 60000
    for number in range(count + 2):
        queue.push(ipv4(1, number, size=60000), 0.0)
        assert queue.bytes <= MAX_BYTES
    assert (len(queue), queue.dropped) == (count, 2)
    assert queue.pop(0.0) == ipv4(1, 2, size=60000)


def test_the_newest_of_each_flow_go_first_then_the_fresh_then_nothing() -> None:
    queue = PacketQueue()
    for number in range(4):
        queue.push(ipv4(1, number), 0.0)  # old
    queue.push(ipv4(2, 0), 0.0)  # old, but all there is of its flow
    for number in range(4):
        queue.push(ipv4(3, number), 60.0)  # fresh
    queue.recover(60.0 + 0.9 * FRESH)
    assert NEWEST_PER_FLOW == 2
    assert drain(queue) == [
        ipv4(1, 2),
        ipv4(1, 3),
        ipv4(2, 0),
        ipv4(3, 2),
        ipv4(3, 3),
        ipv4(3, 0),
        ipv4(3, 1),
    ]
    assert (queue.dropped, queue.bytes) == (2, 0)


def test_stale_is_older_than_fresh() -> None:
    queue = PacketQueue()
    for number in range(3):
        queue.push(ipv4(1, number), 0.0)
    queue.recover(FRESH + 0.001)
    assert drain(queue, FRESH) == [ipv4(1, 1), ipv4(1, 2)]


def test_the_newest_of_a_flow_survive_the_flood_of_another() -> None:
    """While there is no path they are kept whatever their age, as docs/protocol.md promises."""
    queue = PacketQueue()
    queue.holding = True
    keystrokes = [ipv4(1, number) for number in range(3)]
    for packet in keystrokes:
        queue.push(packet, 0.0)
    for number in range(2 * MAX_PACKETS):
        queue.push(ipv4(2, number), 1.0)
        assert len(queue) <= MAX_PACKETS
    for number in range(40):
        queue.push(ipv4(2, number, size=60000), 1.0)
        assert queue.bytes <= MAX_BYTES
    queue.recover(600.0)
    kept = drain(queue, 600.0)
    assert [packet for packet in kept if packet in keystrokes] == keystrokes[1:]
    assert kept[-1] == ipv4(2, 39, size=60000)


def test_more_flows_than_fit_are_still_bounded() -> None:
    queue = PacketQueue()
    queue.holding = True
    for flow in range(MAX_PACKETS + 100):
        queue.push(ipv4(flow), 0.0)
    assert len(queue) <= MAX_PACKETS
    assert drain(queue)[-1] == ipv4(MAX_PACKETS + 99)


def test_nothing_stale_is_sent_while_there_is_a_path() -> None:
    queue = PacketQueue()
    queue.push(ipv4(1, 0), 10.0)
    queue.push(ipv4(1, 1), 10.5)
    assert drain(queue, 10.2 + STALE) == [ipv4(1, 1)]
    assert (queue.dropped, queue.bytes) == (1, 0)


def test_what_an_outage_kept_is_not_stale() -> None:
    queue = PacketQueue()
    queue.push(ipv4(1, 0), 10.0)
    queue.recover(1000.0)
    assert drain(queue, 1000.0 + 0.9 * STALE) == [ipv4(1, 0)]


def test_flows_are_told_apart() -> None:
    different = [
        ipv4(1),
        ipv4(2),
        ipv6(1),
        ipv6(2),
        ipv4(1)[:9] + b"\x06" + ipv4(1)[10:],
        ipv4(1)[:15] + b"\x09" + ipv4(1)[16:],
        ipv4(1)[:19] + b"\x09" + ipv4(1)[20:],
        ipv6(1)[:23] + b"\x09" + ipv6(1)[24:],
    ]
    assert len({flow_of(packet) for packet in different}) == len(different)


@pytest.mark.parametrize("make", [ipv4, ipv6])
def test_packets_of_a_flow_belong_together(make: object) -> None:
    assert callable(make)
    assert flow_of(make(7, 1)) == flow_of(make(7, 2))


def test_options_do_not_hide_the_ports() -> None:
    assert flow_of(ipv4(1, ihl=6)) == flow_of(ipv4(1))
    assert flow_of(ipv4(1, ihl=6)) != flow_of(ipv4(2, ihl=6))


@pytest.mark.parametrize("fragment", [0x2000, 0x0001, 0x1FFF, 0x2001])
def test_fragments_have_no_ports(fragment: int) -> None:
    assert flow_of(ipv4(1, fragment=fragment)) == flow_of(ipv4(2, fragment=fragment))


def test_dont_fragment_is_no_fragment() -> None:
    assert flow_of(ipv4(1, fragment=0x4000)) == flow_of(ipv4(1))


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1)), max_size=60), st.floats(1, 1.3))
def test_recovery_keeps_what_it_should(entries: list[tuple[int, float]], now: float) -> None:
    entries.sort(key=lambda entry: entry[1])
    queue = PacketQueue()
    for number, (flow, at) in enumerate(entries):
        queue.push(ipv4(flow, number), at)
    queue.recover(now)
    size, kept = queue.bytes, drain(queue)
    assert size == sum(map(len, kept)) and len(kept) == len(set(kept))
    assert len(kept) + queue.dropped == len(entries)
    for flow in range(1, 5):
        mine = [(ipv4(flow, i), at) for i, (f, at) in enumerate(entries) if f == flow]
        expected = [p for p, _ in mine[-2:]]
        expected += [p for p, at in mine[:-2] if now - at <= FRESH]
        assert [p for p in kept if flow_of(p) == flow_of(ipv4(flow))] == expected
