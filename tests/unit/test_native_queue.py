"""The engine's queue: fair between flows, short in time, and reviving every flow after an outage.

`Model` is the same queue written slowly: a list of segments for each flow and RFC 8289's and
RFC 8290's pseudo code. Times are whole microseconds, as in the library.
"""

from __future__ import annotations

import ctypes
import heapq
import math
import os
import random
import shutil
import struct
import subprocess
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_bool, c_char_p, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.native import CORE, library

MS = 1000
SECOND = 1000 * MS
MAX_BYTES = 4 << 20
MAX_PACKETS = 10240
TARGET = 5 * MS
INTERVAL = 100 * MS
QUANTUM = 1514
ONE_PACKET = 1514
NEWEST_PER_FLOW = 2
FRESH = 200 * MS
STALE = SECOND
VNET_SIZE = 10
MAX_IP = 65535
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP = 0, 1, 4, 5
NOT_ECT, ECT1, ECT0, CE = range(4)


class Vnet(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint8),
        ("gso_type", ctypes.c_uint8),
        ("hdr_len", ctypes.c_uint16),
        ("gso_size", ctypes.c_uint16),
        ("csum_start", ctypes.c_uint16),
        ("csum_offset", ctypes.c_uint16),
    )


class Super(ctypes.Structure):
    _fields_ = (
        ("packet", c_void_p),
        ("length", c_uint32),
        ("header", c_uint32),
        ("l4", c_uint32),
        ("mss", c_uint32),
        ("count", c_uint32),
        ("protocol", ctypes.c_uint8),
        ("version", ctypes.c_uint8),
    )


class Counters(ctypes.Structure):
    _fields_ = tuple((name, c_uint64) for name in ("dropped", "codel", "marked", "malformed"))
    dropped: int
    codel: int
    marked: int
    malformed: int


def load() -> ctypes.CDLL:
    lib = library("queue.c", "offload.c")
    q = c_void_p
    for name, result, arguments in (
        ("queue_new", q, ()),
        ("queue_free", None, (q,)),
        ("queue_reserve", c_void_p, (q,)),
        ("queue_commit", None, (q, c_uint32, c_int64)),
        ("queue_push", None, (q, POINTER(Vnet), c_char_p, c_uint32, c_int64)),
        ("queue_peek", c_uint32, (q, c_int64)),
        ("queue_take", None, (q, c_void_p)),
        ("queue_empty", c_bool, (q,)),
        ("queue_bytes", c_uint64, (q,)),
        ("queue_packets", c_uint32, (q,)),
        ("queue_memory", c_uint64, (q,)),
        ("queue_counters", POINTER(Counters), (q,)),
        ("queue_flow", c_uint64, (q, c_char_p, c_uint32)),
        ("queue_set_quantum", None, (q, c_uint32)),
        ("queue_set_seed", None, (q, c_uint64)),
        ("queue_hold", None, (q,)),
        ("queue_recover", None, (q, c_int64)),
        ("super_open", c_bool, (POINTER(Super), POINTER(Vnet), c_void_p, c_uint32)),
        ("super_size", c_uint32, (POINTER(Super), c_uint32)),
        ("super_cut", None, (POINTER(Super), c_uint32, c_void_p)),
    ):
        function = getattr(lib, f"mt_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


LIB = load()


# ---- packets ----


def checksum(data: bytes) -> int:
    """RFC 1071, of data with the field zeroed (or, over a right one: zero)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def sealed(packet: bytes) -> bytes:
    """The same with the checksum of its IPv4 header made right."""
    if packet[0] >> 4 == 6:
        return packet
    header = (packet[0] & 15) * 4
    blank = packet[:10] + bytes(2) + packet[12:]
    return blank[:10] + checksum(blank[:header]).to_bytes(2) + blank[12:]


def ipv4(
    flow: int,
    number: int = 0,
    *,
    size: int = 60,
    fragment: int = 0,
    ihl: int = 5,
    ecn: int = NOT_ECT,
    protocol: int = 17,
) -> bytes:
    head = bytearray(ihl * 4)
    head[0] = 0x40 | ihl
    head[1] = 0xB8 | ecn
    head[2:4] = size.to_bytes(2)
    head[6:8] = fragment.to_bytes(2)
    head[8:10] = bytes((64, protocol))
    head[12:16] = bytes((10, 0, 0, 1))
    head[16:20] = bytes((10, 0, 0, 2))
    ports = flow.to_bytes(2) + (53).to_bytes(2)
    return sealed((bytes(head) + ports + number.to_bytes(4)).ljust(size, b"\0"))


def ipv6(
    flow: int, number: int = 0, *, size: int = 60, ecn: int = NOT_ECT, protocol: int = 17
) -> bytes:
    head = struct.pack("!IHBB", 6 << 28 | (0xB8 | ecn) << 20 | 0x12345, size - 40, protocol, 64)
    head += bytes(15) + b"\x01" + bytes(15) + b"\x02"
    return (head + flow.to_bytes(2) + (22).to_bytes(2) + number.to_bytes(4)).ljust(size, b"\0")


class Read(NamedTuple):
    """What one read of the device gives: a virtio header and an IP packet."""

    vnet: Vnet
    packet: bytes


def plain(packet: bytes) -> Read:
    return Read(Vnet(), packet)


def tcp(
    flow: int, payload: int, *, mss: int = 1360, version: int = 4, ecn: int = NOT_ECT, mark: int = 0
) -> Read:
    """A TCP super-packet of `payload` bytes; `mark` tells it from others."""
    upper = struct.pack("!HHIIBBHHH", flow, 80, mark << 16, 0, 0x50, 0x18, 512, 0, 0)
    upper += random.Random(mark).randbytes(64).ljust(payload, b"\x5a")[:payload]
    start = 20 if version == 4 else 40
    size = start + 20 + payload
    make = ipv4 if version == 4 else ipv6
    packet = make(0, size=size, ecn=ecn, protocol=6)[:start] + upper
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    return Read(Vnet(NEEDS_CSUM, kind, start + 20, mss, start, 16), packet)


def segments(read: Read) -> list[bytes]:
    """The IP packets of a read, as core/offload.c cuts them."""
    memory = ctypes.create_string_buffer(read.packet, len(read.packet))
    opened = Super()
    assert LIB.mt_super_open(byref(opened), byref(read.vnet), memory, len(read.packet))
    found = []
    for index in range(opened.count):
        size = LIB.mt_super_size(byref(opened), index)
        out = ctypes.create_string_buffer(size)
        LIB.mt_super_cut(byref(opened), index, out)
        found.append(out.raw)
    return found


def ecn_of(packet: bytes) -> int:
    return packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3


def marked(packet: bytes) -> bytes:
    if packet[0] >> 4 == 4:
        return sealed(packet[:1] + bytes((packet[1] | 3,)) + packet[2:])
    return packet[:1] + bytes((packet[1] | 0x30,)) + packet[2:]


# ---- the library as Python sees it ----


class Queue:
    def __init__(self, seed: int = 7) -> None:
        self.pointer = LIB.mt_queue_new()
        assert self.pointer
        LIB.mt_queue_set_seed(self.pointer, seed)
        weakref.finalize(self, LIB.mt_queue_free, self.pointer)
        self._out = ctypes.create_string_buffer(MAX_IP + 1)

    def __len__(self) -> int:
        count = int(LIB.mt_queue_packets(self.pointer))
        assert LIB.mt_queue_empty(self.pointer) == (count == 0)
        return count

    @property
    def size(self) -> int:
        return int(LIB.mt_queue_bytes(self.pointer))

    @property
    def memory(self) -> int:
        return int(LIB.mt_queue_memory(self.pointer))

    @property
    def counters(self) -> Counters:
        return Counters.from_buffer_copy(LIB.mt_queue_counters(self.pointer).contents)

    @property
    def dropped(self) -> int:
        return self.counters.dropped

    def quantum(self, size: int) -> None:
        LIB.mt_queue_set_quantum(self.pointer, size)

    def flow(self, packet: bytes) -> int:
        return int(LIB.mt_queue_flow(self.pointer, packet, len(packet)))

    def push(self, packet: bytes | Read, now: int) -> None:
        read = packet if isinstance(packet, Read) else plain(packet)
        vnet = byref(read.vnet) if isinstance(packet, Read) else None
        LIB.mt_queue_push(self.pointer, vnet, read.packet, len(read.packet), now)

    def read(self, read: Read, now: int) -> None:
        """The way of the TUN: the kernel writes into the queue's own memory."""
        data = bytes(read.vnet) + read.packet
        room = LIB.mt_queue_reserve(self.pointer)
        ctypes.memmove(room, data, len(data))
        LIB.mt_queue_commit(self.pointer, len(data), now)

    def peek(self, now: int) -> int:
        return int(LIB.mt_queue_peek(self.pointer, now))

    def take(self, size: int) -> bytes:
        """Take the packet of `size` bytes that a peek announced; it writes just these."""
        self._out[size] = b"\xa5"
        LIB.mt_queue_take(self.pointer, self._out)
        assert self._out[size] == b"\xa5"
        return ctypes.string_at(self._out, size)

    def pop(self, now: int) -> bytes | None:
        size = self.peek(now)
        assert self.peek(now) == size
        return self.take(size) if size else None

    def hold(self) -> None:
        LIB.mt_queue_hold(self.pointer)

    def recover(self, now: int) -> None:
        LIB.mt_queue_recover(self.pointer, now)

    def drain(self, now: int = 0) -> list[bytes]:
        return list(iter(lambda: self.pop(now), None))


# ---- the model ----


@dataclass(eq=False)
class Entry:
    """A super-packet: what it has left to send."""

    at: int
    order: int
    left: deque[bytes]
    header: int
    length: int
    revived: bool = False

    @property
    def size(self) -> int:
        return self.header + sum(len(segment) - self.header for segment in self.left)


@dataclass(eq=False)
class Flow:
    entries: list[Entry] = field(default_factory=list)
    deficit: int = 0
    dropping: bool = False
    count: int = 0
    last_count: int = 0
    first_above: int | None = None
    drop_next: int = 0

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def revived(self) -> int:
        return sum(entry.revived for entry in self.entries)


class Model:
    """For fewer than 64 flows, and for dequeuing at once what was announced."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        self.quantum = quantum
        self.flows: dict[int, Flow] = {}
        self.new: list[Flow] = []
        self.old: list[Flow] = []
        self.holding = False
        self.order = 0
        self.dropped = self.codel = self.marked = 0

    @property
    def entries(self) -> list[Entry]:
        return [entry for flow in self.flows.values() for entry in flow.entries]

    def push(self, key: int, read: Read, now: int) -> None:
        cut = deque(segments(read))
        payload = sum(map(len, cut)) - len(read.packet)
        header = 0 if read.vnet.gso_type == GSO_NONE else read.vnet.hdr_len
        assert payload == header * (len(cut) - 1) or not header
        self.order += 1
        flow = self.flows.setdefault(key, Flow())
        flow.entries.append(Entry(now, self.order, cut, header, len(read.packet)))
        if flow not in self.new + self.old:
            flow.deficit = self.quantum
            self.new.append(flow)
        while self.overflows:
            self.shed()

    @property
    def overflows(self) -> bool:
        held = sum(entry.length for entry in self.entries)
        return held > MAX_BYTES or len(self.entries) > MAX_PACKETS

    def shed(self) -> None:
        """Drop from the fattest flow until it fits, or half of what the flow may lose is gone."""

        def spared(flow: Flow) -> list[Entry]:
            return flow.entries[:-NEWEST_PER_FLOW] if self.holding else flow.entries

        def anything(flow: Flow) -> list[Entry]:
            return flow.entries

        choice = spared if any(map(spared, self.new + self.old)) else anything

        def weight(flow: Flow) -> int:
            return sum(entry.length for entry in choice(flow))

        victim = max(self.new + self.old, key=weight)
        half = weight(victim) // 2
        while self.overflows and weight(victim) > half:
            fresh = [entry for entry in choice(victim) if not entry.revived]
            oldest = min(fresh, key=lambda entry: entry.order) if fresh else victim.entries[-1]
            self.drop(victim, oldest)

    def drop(self, flow: Flow, entry: Entry) -> None:
        flow.entries.remove(entry)
        self.dropped += len(entry.left)
        self.end_turn(flow, entry)

    def end_turn(self, flow: Flow, entry: Entry) -> None:
        if entry.revived and not flow.revived:
            flow.deficit = min(flow.deficit, 0)

    def pop(self, now: int) -> bytes | None:
        """RFC 8290 section 4.2."""
        while not self.holding and (self.new or self.old):
            queues = self.new or self.old
            flow = queues[0]
            if flow.deficit <= 0:
                flow.deficit += self.quantum
                queues.remove(flow)
                (self.new if flow.revived else self.old).append(flow)
                continue
            packet = self.dequeue(flow, now)
            if packet:
                return packet
            queues.remove(flow)
            if queues is self.new and self.old:
                self.old.append(flow)
        return None

    def do_dequeue(self, flow: Flow, now: int) -> tuple[bytes | None, bool]:
        """RFC 8289 section 5.6."""
        if not flow.entries:
            flow.first_above = None
            return None, False
        entry = flow.entries[0]
        at = entry.at
        segment = entry.left.popleft()
        if not entry.left:
            del flow.entries[0]
        if now - at < TARGET or flow.size <= max(ONE_PACKET, len(segment)):
            flow.first_above = None
            ok = False
        elif flow.first_above is None:
            flow.first_above = now + INTERVAL
            ok = False
        else:
            ok = now >= flow.first_above
        self._last = entry
        return segment, ok

    def control_law(self, at: int, count: int) -> int:
        return at + math.isqrt(INTERVAL**2 // count)

    def dequeue(self, flow: Flow, now: int) -> bytes | None:
        """RFC 8289 section 5.5, with Linux's way of marking (net/sched/sch_codel.c)."""
        while flow.entries and now - flow.entries[0].at > STALE:
            self.drop(flow, flow.entries[0])
        packet, ok = self.do_dequeue(flow, now)
        if packet is None:
            flow.dropping = False
            return None
        if flow.dropping:
            if not ok:
                flow.dropping = False
            while flow.dropping and now >= flow.drop_next:
                flow.count += 1
                assert packet
                if ecn_of(packet):
                    packet = self.mark(packet)
                    flow.drop_next = self.control_law(flow.drop_next, flow.count)
                    break
                self.lose(flow)
                packet, ok = self.do_dequeue(flow, now)
                if ok:
                    flow.drop_next = self.control_law(flow.drop_next, flow.count)
                else:
                    flow.dropping = False
        elif ok:
            if ecn_of(packet):
                packet = self.mark(packet)
            else:
                self.lose(flow)
                packet, _ = self.do_dequeue(flow, now)
            flow.dropping = True
            delta = flow.count - flow.last_count
            lately = now - flow.drop_next < 16 * INTERVAL
            flow.count = delta if delta > 1 and lately else 1
            flow.drop_next = self.control_law(now, flow.count)
            flow.last_count = flow.count
        assert packet
        flow.deficit -= len(packet)
        if not self._last.left:
            self.end_turn(flow, self._last)
        return packet

    def mark(self, packet: bytes) -> bytes:
        self.marked += 1
        return marked(packet)

    def lose(self, flow: Flow) -> None:
        self.codel += 1
        if not self._last.left:
            self.end_turn(flow, self._last)

    def restore(self) -> None:
        for flow in self.flows.values():
            flow.entries.sort(key=lambda entry: entry.order)
            for entry in flow.entries:
                entry.revived = False

    def hold(self) -> None:
        self.holding = True
        self.restore()

    def recover(self, now: int) -> None:
        self.restore()
        self.holding = False
        for flow in self.flows.values():
            newest = flow.entries[-NEWEST_PER_FLOW:]
            others = flow.entries[:-NEWEST_PER_FLOW]
            for entry in others:
                if now - entry.at > FRESH:
                    self.drop(flow, entry)
            others = [entry for entry in others if now - entry.at <= FRESH]
            flow.entries = newest + others
            for entry in newest:
                entry.revived = True
            for entry in flow.entries:
                entry.at = now
            flow.first_above = None
            flow.dropping = False
            flow.deficit = self.quantum
        waiting = [flow for flow in self.flows.values() if flow.entries]
        self.new = sorted(waiting, key=lambda f: max(entry.order for entry in f.entries))
        self.old = []


def any_read(rng: random.Random, flow: int, number: int) -> Read:
    version = rng.choice((4, 6))
    ecn = (NOT_ECT, ECT0, ECT1, CE, NOT_ECT, NOT_ECT, ECT0)[flow % 7]
    if rng.random() < 0.4:
        payload = rng.choice((1, 1360, 5000, 20000, 33000, 65000, rng.randrange(1, 65000)))
        mss = rng.choice((500, 1360, 1440, 9000))
        return tcp(flow, payload, mss=mss, version=version, ecn=ecn, mark=number & 0xFFFF)
    size = rng.choice((60, 60, 1420, rng.randrange(60, 1500)))
    return plain((ipv4 if version == 4 else ipv6)(flow, number, size=size, ecn=ecn))


def key_of(read: Read) -> int:
    """The flow's key in the model; TCP and UDP, IPv4 and IPv6 are flows of their own."""
    start = 20 if read.packet[0] >> 4 == 4 else 40
    kind = read.packet[9] if start == 20 else read.packet[6]
    return int.from_bytes(read.packet[start : start + 2]) << 16 | kind << 8 | start


@pytest.mark.parametrize("seed", [*range(12), 107])
def test_it_does_what_the_model_does(seed: int) -> None:
    rng = random.Random(seed)
    quantum = rng.choice((600, QUANTUM, QUANTUM, 9000, 65536))
    queue, model = Queue(seed), Model(quantum)
    queue.quantum(quantum)
    flows = rng.choice((1, 3, 9))
    now = number = taken = 0
    # Phases of more and of less than the path can carry; in some the queue overflows.
    for phase in range(10):
        arrivals = rng.choice((0.1, 0.35, 0.5, 0.95))
        step = rng.choice((50, 1 * MS, 3 * MS))
        if rng.random() < 0.3:
            queue.hold()
            model.hold()
        for turn in range(rng.choice((60, 250))):
            where = (seed, phase, turn)
            if rng.random() < arrivals:
                number += 1
                read = any_read(rng, 1 + min(int(rng.expovariate(0.5)), flows), number)
                (queue.read if rng.random() < 0.7 else queue.push)(read, now)
                model.push(key_of(read), read, now)
            else:
                for _ in range(rng.choice((1, 1, 4, 30))):
                    packet = queue.pop(now)
                    assert packet == model.pop(now), where
                    taken += packet is not None
            now += rng.randrange(step)
            assert queue.size == sum(entry.size for entry in model.entries), where
            assert len(queue) == len(model.entries), where
            counters = queue.counters
            assert (counters.dropped, counters.codel, counters.marked, counters.malformed) == (
                model.dropped,
                model.codel,
                model.marked,
                0,
            ), where
        if not queue or rng.random() < 0.1:
            now += rng.choice((0, 100 * MS, 2 * SECOND))
            if model.holding or rng.random() < 0.5:
                queue.recover(now)
                model.recover(now)
        if model.holding:
            queue.recover(now)
            model.recover(now)
    while (packet := queue.pop(now)) is not None:
        assert packet == model.pop(now), seed
        now += rng.randrange(2 * MS)
    assert model.pop(now) is None
    assert (len(queue), queue.size) == (0, 0)
    assert taken


# ---- order, fairness, sparse flows ----


def test_first_in_first_out() -> None:
    queue = Queue()
    packets = [ipv4(1, number) for number in range(5)]
    for packet in packets:
        queue.push(packet, 0)
    assert (len(queue), queue.size) == (5, 300)
    assert queue.drain() == packets
    assert (len(queue), queue.size, queue.dropped) == (0, 0, 0)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("payload", [1, 1360, 1361, 30000, 40000, 65000])
def test_a_super_packet_leaves_as_its_segments(version: int, payload: int) -> None:
    queue = Queue()
    read = tcp(1, payload, version=version)
    queue.read(read, 0)
    assert (len(queue), queue.size) == (1, len(read.packet))
    cut = segments(read)
    assert len(cut) == math.ceil(payload / 1360)
    sent = 0
    for number, segment in enumerate(cut, 1):
        assert queue.pop(0) == segment
        sent += len(segment) - (20 if version == 4 else 40) - 20
        left = len(read.packet) - sent if number < len(cut) else 0
        assert queue.size == left
    assert queue.pop(0) is None


def sent_by_flow(queue: Queue, limit: int, now: int = 0) -> dict[int, int]:
    """Bytes of each flow (of ipv4() or tcp()) among the next `limit` bytes."""
    sent: dict[int, int] = {}
    while sum(sent.values()) < limit and (packet := queue.pop(now)) is not None:
        flow = int.from_bytes(packet[20:22])
        sent[flow] = sent.get(flow, 0) + len(packet)
    return sent


@pytest.mark.parametrize("quantum", [0, 600, 1514, 20000, 10**6])
def test_flows_share_alike_however_large_their_packets(quantum: int) -> None:
    queue = Queue()
    queue.quantum(quantum)
    for number in range(6):
        queue.read(tcp(1, 60000, mark=number), 0)
    for number in range(250):
        queue.push(ipv4(2, number, size=1400), 0)
    for number in range(3500):
        queue.push(ipv4(3, number, size=100), 0)
    sent = sent_by_flow(queue, 900_000)
    turn = min(max(quantum, 600), 65536)
    assert max(sent.values()) - min(sent.values()) <= turn + 1514
    assert len(sent) == 3


def test_a_keystroke_waits_for_one_segment_and_not_for_64_kilobytes() -> None:
    queue = Queue()
    for number in range(20):
        queue.read(tcp(1, 65000, mark=number), 0)
    sent_by_flow(queue, 5000)  # bulk is a new flow too, for one turn
    for number in range(100):
        size = queue.peek(0)  # announced before the keystroke came
        keystroke = ipv4(2, number)
        queue.push(keystroke, 0)
        assert len(queue.take(size)) == size > 1000
        assert queue.pop(0) == keystroke
        sent_by_flow(queue, 5000)  # typing is slower than a round


def test_a_flow_that_sends_as_much_as_the_others_is_no_sparse_one() -> None:
    """RFC 8290 section 4.2: an emptied new flow joins the old ones before it may be new again."""
    queue = Queue()
    for number in range(20):
        queue.read(tcp(1, 65000, mark=number), 0)
    bulk = small = 0
    for number in range(500):
        queue.push(ipv4(2, number, size=1400), 0)  # always one waits
        packet = queue.pop(0)
        assert packet
        if packet[20:22] == b"\0\x02":
            small += 1
        else:
            bulk += 1
    assert abs(bulk - small) <= 3


def test_many_flows_do_not_share_a_turn() -> None:
    """Sets of eight: 200 flows among 1024 queues are all apart."""
    queue = Queue()
    for flow in range(1, 201):
        for number in range(8):
            queue.push(ipv4(flow, number, size=1000), 0)
    sent = sent_by_flow(queue, 200 * 4000)
    assert len(sent) == 200
    assert max(sent.values()) - min(sent.values()) <= 2000


def test_a_queue_of_more_flows_than_it_knows_loses_nothing() -> None:
    queue = Queue()
    packets = [ipv4(flow) for flow in range(5000)]
    for packet in packets:
        queue.push(packet, 0)
    assert sorted(queue.drain()) == sorted(packets)
    assert queue.dropped == 0


# ---- flows ----


def test_flows_are_told_apart() -> None:
    queue = Queue()
    different = [
        ipv4(1),
        ipv4(2),
        ipv6(1),
        ipv6(2),
        ipv6(1, protocol=6),
        ipv4(1, protocol=6),
        ipv4(1)[:15] + b"\x09" + ipv4(1)[16:],
        ipv4(1)[:19] + b"\x09" + ipv4(1)[20:],
        ipv6(1)[:23] + b"\x09" + ipv6(1)[24:],
        ipv6(1)[:39] + b"\x09" + ipv6(1)[40:],
        ipv4(1)[:23] + b"\x09" + ipv4(1)[24:],
        ipv6(1)[:43] + b"\x09" + ipv6(1)[44:],
    ]
    assert len({queue.flow(packet) for packet in different}) == len(different)


@pytest.mark.parametrize("make", [ipv4, ipv6])
def test_packets_of_a_flow_belong_together(make: Callable[..., bytes]) -> None:
    queue = Queue()
    assert queue.flow(make(7, 1)) == queue.flow(make(7, 2, size=1000, ecn=CE))


def test_options_do_not_hide_the_ports() -> None:
    queue = Queue()
    assert queue.flow(ipv4(1, ihl=6)) == queue.flow(ipv4(1))
    assert queue.flow(ipv4(1, ihl=6)) != queue.flow(ipv4(2, ihl=6))


@pytest.mark.parametrize("fragment", [0x2000, 0x0001, 0x1FFF, 0x2001])
def test_fragments_have_no_ports(fragment: int) -> None:
    queue = Queue()
    assert queue.flow(ipv4(1, fragment=fragment)) == queue.flow(ipv4(2, fragment=fragment))


def test_dont_fragment_is_no_fragment() -> None:
    queue = Queue()
    assert queue.flow(ipv4(1, fragment=0x4000)) == queue.flow(ipv4(1))


@pytest.mark.parametrize("protocol", [1, 47, 50, 58])
def test_other_protocols_have_no_ports(protocol: int) -> None:
    """The first bytes of an ICMP message are its checksum: each would be a flow."""
    queue = Queue()
    for make in (ipv4, ipv6):
        assert queue.flow(make(1, protocol=protocol)) == queue.flow(make(2, protocol=protocol))


def test_the_seed_decides_which_flows_meet() -> None:
    hashes = {Queue(seed).flow(ipv4(1)) for seed in range(100)}
    assert len(hashes) == 100


def test_the_hash_spreads() -> None:
    queue = Queue()
    sets = [0] * 128
    for flow in range(12800):
        sets[queue.flow(ipv4(flow)) % 128] += 1
    assert min(sets) > 50 and max(sets) < 160  # 100 expected, standard deviation 10


@given(st.binary(max_size=80))
def test_the_flow_of_anything(packet: bytes) -> None:
    Queue().flow(packet)


# ---- CoDel ----


def overload(
    queue: Queue, *, version: int = 4, ecn: int = NOT_ECT, milliseconds: int
) -> Iterator[tuple[int, bytes]]:
    """Two packets come each millisecond and one leaves: its time and itself."""
    make = ipv4 if version == 4 else ipv6
    for now in range(0, milliseconds * MS, MS):
        for half in range(2):
            queue.push(make(1, now * 2 + half, size=1000, ecn=ecn), now)
        packet = queue.pop(now)
        assert packet
        yield now, packet


def test_the_drops_follow_the_control_law() -> None:
    queue = Queue()
    drops = []
    before = 0
    for now, _ in overload(queue, milliseconds=1000):
        drops += [now] * (queue.counters.codel - before)
        before = queue.counters.codel
    # The first packet that waited TARGET is number 10; one INTERVAL later the first drop.
    assert drops[0] == pytest.approx(10 * MS + INTERVAL, abs=2 * MS)
    due = float(drops[0])
    for count, at in enumerate(drops[1:], 1):
        due += INTERVAL / math.sqrt(count)
        assert at == pytest.approx(due, abs=2 * MS)
    assert all(second >= first for first, second in pairwise(drops))
    assert len(drops) > 15
    assert queue.dropped == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ecn", [ECT0, ECT1])
def test_who_reads_marks_gets_them(version: int, ecn: int) -> None:
    queue = Queue()
    seen = []
    arrivals = overload(queue, version=version, ecn=ecn, milliseconds=600)
    for number, (now, packet) in enumerate(arrivals):
        make = ipv4 if version == 4 else ipv6
        sent = make(1, number // 2 * 2 * MS + number % 2, size=1000, ecn=ecn)
        assert packet in (sent, marked(sent))  # all of them, in order
        if version == 4:
            assert checksum(packet[:20]) == 0
        if ecn_of(packet) == CE:
            seen.append(now)
    assert (queue.counters.marked, queue.counters.codel, queue.dropped) == (len(seen), 0, 0)
    assert len(seen) > 8
    assert seen[0] == pytest.approx(10 * MS + INTERVAL, abs=2 * MS)


@pytest.mark.parametrize("version", [4, 6])
def test_the_segments_of_a_super_packet_are_marked_one_by_one(version: int) -> None:
    queue = Queue()
    reads = [tcp(1, 65000, version=version, ecn=ECT0, mark=number) for number in range(12)]
    for read in reads:
        queue.read(read, 0)
    marks = 0
    for number, segment in enumerate(cut for read in reads for cut in segments(read)):
        packet = queue.pop(number * MS)
        assert packet in (segment, marked(segment))
        marks += ecn_of(packet or b"") == CE
    assert 3 < marks == queue.counters.marked < 100


@given(st.binary(min_size=20, max_size=20), st.sampled_from([ECT0, ECT1]))
@settings(max_examples=200)
def test_a_mark_keeps_the_header_checksum_right(noise: bytes, ecn: int) -> None:
    queue = Queue()
    head = bytearray(noise)
    head[0] = 0x45
    head[1] = head[1] & 0xFC | ecn
    head[2:4] = (1000).to_bytes(2)
    packet = sealed(bytes(head) + bytes(980))
    for _ in range(4):
        queue.push(packet, 0)
    assert queue.pop(TARGET) == packet
    assert queue.pop(TARGET + INTERVAL) == marked(packet)


@pytest.mark.parametrize("waiting", [1, 15, 25])
def test_less_than_a_packet_is_no_standing_queue(waiting: int) -> None:
    """However long it stays (RFC 8289 section 5.5): the last of a flow are never dropped."""
    queue = Queue()
    now = 0
    for number in range(waiting):
        queue.push(ipv4(1, number), 0)
    for number in range(200):
        now += 20 * MS
        queue.push(ipv4(1, waiting + number), now)
        assert queue.pop(now) == ipv4(1, number)
    assert (queue.counters.codel, queue.dropped) == (0, 0)


def test_nothing_stale_is_sent() -> None:
    queue = Queue()
    queue.push(ipv4(1, 0), 10 * SECOND)
    queue.push(ipv4(1, 1), 10 * SECOND + 500 * MS)
    assert queue.drain(11 * SECOND + 200 * MS) == [ipv4(1, 1)]
    assert (queue.dropped, queue.size) == (1, 0)


def test_what_was_announced_does_not_go_stale_unseen() -> None:
    queue = Queue()
    queue.push(ipv4(1, 0, size=100), 0)
    queue.push(ipv4(1, 1, size=200), SECOND)
    assert queue.peek(0) == 100
    assert queue.peek(STALE) == 100
    assert queue.peek(STALE + 1) == 200
    assert queue.take(200) == ipv4(1, 1, size=200)
    assert queue.dropped == 1


class Sender:
    """A TCP as AIMD knows it: one window more each round trip, half of it once a loss."""

    def __init__(self, flow: int, ecn: int) -> None:
        self.flow = flow
        self.ecn = ecn
        self.window = 10.0
        self.threshold = math.inf
        self.flight = 0
        self.sent = 0
        self.expected = 0
        self.recovered = 0
        self.delivered = 0

    def packet(self) -> bytes:
        packet = ipv4(self.flow, self.sent, size=1400, ecn=self.ecn)
        self.sent += 1
        self.flight += 1
        return packet

    def acknowledged(self, packet: bytes) -> None:
        number = int.from_bytes(packet[24:28])
        lost = number - self.expected
        self.expected = number + 1
        self.flight -= 1 + lost
        self.delivered += 1
        if (lost or ecn_of(packet) == CE) and number >= self.recovered:
            self.threshold = self.window = max(self.window / 2, 2.0)
            self.recovered = self.sent
        elif self.window < self.threshold:
            self.window += 1
        else:
            self.window += 1 / self.window


def bottleneck(
    senders: list[Sender], *, seconds: int, flood: int = 0
) -> tuple[list[tuple[int, int]], float, list[int]]:
    """20 Mbit/s and 40 ms of round trip behind the queue.

    Gives (time, sojourn) of every packet of the senders, the use of the link in its second half,
    and the sojourn of a keystroke each 50 ms. `flood`: packets of a deaf flow each millisecond.
    """
    queue = Queue()
    events: list[tuple[int, int, str, bytes]] = []
    came: dict[bytes, int] = {}
    sojourns: list[tuple[int, int]] = []
    keystrokes: list[int] = []
    serial = busy = 0
    flows = {sender.flow: sender for sender in senders}

    def at(when: int, what: str, packet: bytes = b"") -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, serial, what, packet))

    def offer(now: int) -> None:
        for sender in senders:
            while sender.flight < int(sender.window):
                packet = sender.packet()
                came[packet[20:28]] = now
                queue.push(packet, now)

    at(0, "link")
    at(0, "tick")
    end = seconds * SECOND
    while events[0][0] < end:
        now, _, what, packet = heapq.heappop(events)
        if what == "acknowledged":
            flows[int.from_bytes(packet[20:22])].acknowledged(packet)
        elif what == "tick":
            at(now + MS, "tick")
            for number in range(flood):
                queue.push(ipv4(999, number, size=1400), now)
            if now % (50 * MS) == 0:
                came[ipv4(500, now)[20:28]] = now
                queue.push(ipv4(500, now), now)
        else:
            sent = queue.pop(now)
            duration = 100 if sent is None else len(sent) * 8 // 20
            at(now + duration, "link")
            if sent is not None:
                flow = int.from_bytes(sent[20:22])
                busy += duration * (now > end // 2)
                if flow in flows:
                    sojourns.append((now, now - came[sent[20:28]]))
                    at(now + duration + 40 * MS, "acknowledged", sent)
                elif flow == 500:
                    keystrokes.append(now - came[sent[20:28]])
        offer(now)
    return sojourns, busy / (end / 2), keystrokes


@pytest.mark.parametrize("ecn", [NOT_ECT, ECT0])
def test_a_standing_queue_comes_down_to_the_target(ecn: int) -> None:
    sojourns, use, keystrokes = bottleneck([Sender(1, ecn)], seconds=8)
    late = sorted(sojourn for now, sojourn in sojourns if now > 4 * SECOND)
    assert late[len(late) // 2] < 2 * TARGET
    assert sum(late) / len(late) < 2 * TARGET
    assert use > 0.8  # Reno's saw without a buffer: three quarters
    assert max(keystrokes) < 2 * MS  # two segments


def test_four_flows_share_a_link_and_leave_it_short() -> None:
    senders = [Sender(flow, NOT_ECT) for flow in (1, 2, 3, 4)]
    sojourns, use, keystrokes = bottleneck(senders, seconds=8)
    late = sorted(sojourn for now, sojourn in sojourns if now > 4 * SECOND)
    assert late[len(late) // 2] < 4 * TARGET
    assert use > 0.9
    delivered = [sender.delivered for sender in senders]
    assert max(delivered) < 1.3 * min(delivered)
    assert max(keystrokes) < 5 * MS


def test_a_deaf_flood_starves_nobody() -> None:
    sender = Sender(1, NOT_ECT)
    _, use, keystrokes = bottleneck([sender], seconds=4, flood=4)  # twice the link's rate
    assert use > 0.99
    assert sender.delivered * 1400 * 8 > 0.35 * 4 * 20e6
    assert max(keystrokes) < 3 * MS


# ---- overflow ----


def test_bounded_in_packets_drops_the_oldest() -> None:
    queue = Queue()
    for number in range(MAX_PACKETS + 3):
        queue.push(ipv4(1, number), 0)
    assert (len(queue), queue.dropped) == (MAX_PACKETS, 3)
    assert queue.pop(0) == ipv4(1, 3)


def test_bounded_in_bytes_drops_the_oldest() -> None:
    queue = Queue()
    count = MAX_BYTES // 60000
    for number in range(count + 2):
        queue.push(ipv4(1, number, size=60000), 0)
        assert queue.size <= MAX_BYTES
    assert (len(queue), queue.dropped) == (count, 2)
    assert queue.pop(0) == ipv4(1, 2, size=60000)


def test_the_fattest_flow_pays() -> None:
    queue = Queue()
    small = [ipv4(2, number, size=1000) for number in range(500)]
    for packet in small:
        queue.push(packet, 0)
    for number in range(100):
        queue.read(tcp(1, 65000, mark=number), 0)
    assert queue.dropped % 48 == 0 and queue.dropped  # segments, of whole super-packets
    assert [packet for packet in queue.drain() if packet[20:22] == b"\0\x02"] == small


def test_what_was_announced_is_not_dropped_for_room() -> None:
    queue = Queue()
    first = tcp(1, 65000, mark=1)
    queue.read(first, 0)
    assert queue.pop(0) == segments(first)[0]
    size = queue.peek(0)
    for number in range(100):
        queue.read(tcp(1, 65000, mark=100 + number), 0)
    assert queue.dropped > 0
    assert queue.peek(0) == size
    assert queue.take(size) == segments(first)[1]


def test_room_is_counted_in_memory_and_not_in_what_is_left_of_it() -> None:
    """Each of very many super-packets has sent all but its last segment, and holds its buffer."""
    queue = Queue()
    for flow in range(300):
        queue.read(tcp(flow, 60000, mss=20000, mark=flow), 0)
        for _ in range(2):
            queue.pop(0)
        assert queue.memory < 12 << 20
    assert queue.dropped > 0


# ---- memory ----


def test_a_read_goes_where_it_stays() -> None:
    queue = Queue()
    room = LIB.mt_queue_reserve(queue.pointer)
    assert room == LIB.mt_queue_reserve(queue.pointer)
    LIB.mt_queue_commit(queue.pointer, 0, 0)  # the device had nothing
    assert room == LIB.mt_queue_reserve(queue.pointer)
    queue.read(plain(ipv4(1)), 0)  # small: moved away
    assert room == LIB.mt_queue_reserve(queue.pointer)
    queue.read(tcp(1, 65000), 0)  # large: stays
    assert room != LIB.mt_queue_reserve(queue.pointer)
    assert len(queue.drain()) == 49


def test_the_largest_packet_fits() -> None:
    queue = Queue()
    queue.read(plain(ipv4(1, size=MAX_IP)), 0)
    assert queue.pop(0) == ipv4(1, size=MAX_IP)


@pytest.mark.parametrize("size", [60, 257, 2049, 5000, 8193, 32769, 65000])
def test_a_flood_of_any_size_takes_bounded_memory_and_gives_it_back(size: int) -> None:
    queue = Queue()
    most = 0
    for number in range(2 * min(MAX_PACKETS, MAX_BYTES // size)):
        queue.read(plain(ipv4(number % 50, number, size=size)), 0)
        most = max(most, queue.memory)
    assert queue.dropped > 0
    assert most < 32 << 20
    queue.drain()
    assert queue.memory < 6 << 20


@pytest.mark.parametrize(
    "data",
    [
        bytes(1),
        bytes(VNET_SIZE),
        bytes(VNET_SIZE + 1),
        bytes(VNET_SIZE) + ipv4(1)[:30],
        bytes(VNET_SIZE) + b"\x50" + ipv4(1)[1:],
        bytes((1, 77)) + bytes(VNET_SIZE - 2) + ipv4(1),
    ],
)
def test_what_cannot_be_read_is_counted(data: bytes) -> None:
    queue = Queue()
    ctypes.memmove(LIB.mt_queue_reserve(queue.pointer), data, len(data))
    LIB.mt_queue_commit(queue.pointer, len(data), 0)
    assert (len(queue), queue.counters.malformed) == (0, 1)
    if len(data) > VNET_SIZE:
        queue.push(Read(Vnet.from_buffer_copy(data), data[VNET_SIZE:]), 0)
        assert (len(queue), queue.counters.malformed) == (0, 2)


def test_lengths_beyond_the_room_are_refused() -> None:
    queue = Queue()
    queue.push(b"", 0)
    queue.push(ipv4(1).ljust(MAX_IP + 1, b"\0"), 0)
    LIB.mt_queue_reserve(queue.pointer)
    LIB.mt_queue_commit(queue.pointer, VNET_SIZE + MAX_IP + 1, 0)
    assert (len(queue), queue.counters.malformed) == (0, 3)


def test_a_take_that_nothing_announced_does_nothing() -> None:
    queue = Queue()
    queue.take(0)
    queue.push(ipv4(1), 0)
    queue.take(0)
    assert queue.drain() == [ipv4(1)]


# ---- outages ----


def test_nothing_leaves_while_there_is_no_path() -> None:
    queue = Queue()
    queue.push(ipv4(1, 0), 0)
    assert queue.peek(0) == 60
    queue.hold()
    queue.push(ipv4(1, 1), 0)
    assert queue.peek(0) == 0
    assert len(queue) == 2
    queue.recover(0)
    assert queue.drain() == [ipv4(1, 0), ipv4(1, 1)]


def test_the_newest_of_each_flow_go_first_then_the_fresh_then_nothing() -> None:
    queue = Queue()
    queue.hold()
    for number in range(4):
        queue.push(ipv4(1, number), 0)  # old
    queue.push(ipv4(2, 0), 0)  # old, but all there is of its flow
    for number in range(4):
        queue.push(ipv4(3, number), 60 * SECOND)  # fresh
    now = 60 * SECOND + FRESH
    queue.recover(now)
    assert queue.drain(now) == [
        ipv4(1, 2),
        ipv4(1, 3),
        ipv4(2, 0),
        ipv4(3, 2),
        ipv4(3, 3),
        ipv4(3, 0),
        ipv4(3, 1),
    ]
    assert (queue.dropped, queue.size) == (2, 0)


def test_all_newest_go_before_all_fresh() -> None:
    """Also where they are more than a turn; and the flow whose newest is oldest begins."""
    queue = Queue()
    queue.hold()
    for flow in (1, 2, 3):
        for number in range(4):
            queue.push(ipv4(flow, number, size=9000), 0)
    queue.recover(0)
    order = [(int.from_bytes(p[20:22]), int.from_bytes(p[24:28])) for p in queue.drain(0)]
    assert order[:3] == [(1, 2), (2, 2), (3, 2)]
    assert sorted(order[:6]) == [(flow, number) for flow in (1, 2, 3) for number in (2, 3)]
    assert sorted(order[6:]) == [(flow, number) for flow in (1, 2, 3) for number in (0, 1)]


def test_a_keystroke_after_an_outage_does_not_wait_for_its_bulk() -> None:
    queue = Queue()
    queue.hold()
    for flow in range(10):
        for number in range(2):
            queue.read(tcp(flow, 65000, mark=number), 0)
    queue.recover(SECOND)
    queue.push(ipv4(500), SECOND)
    before = 0
    while (packet := queue.pop(SECOND)) != ipv4(500):
        assert packet
        before += len(packet)
    assert before <= 10 * 2 * 1400


def test_stale_is_older_than_fresh() -> None:
    queue = Queue()
    for number in range(3):
        queue.push(ipv4(1, number), 0)
    queue.recover(FRESH + 1)
    assert queue.drain(FRESH + 1) == [ipv4(1, 1), ipv4(1, 2)]


def test_what_an_outage_kept_is_not_stale() -> None:
    queue = Queue()
    queue.push(ipv4(1, 0), 10 * SECOND)
    queue.hold()
    queue.recover(1000 * SECOND)
    assert queue.drain(1001 * SECOND) == [ipv4(1, 0)]


def test_the_time_of_an_outage_is_no_standing_queue() -> None:
    queue = Queue()
    for number in range(200):
        queue.push(ipv4(1, number, size=1000), 0)
    assert queue.pop(TARGET) == ipv4(1, 0, size=1000)  # above the target, from now on
    queue.hold()
    queue.recover(FRESH)
    for late, expected in ((0, 0), (TARGET, 0), (TARGET + INTERVAL - 1, 0), (TARGET + INTERVAL, 1)):
        assert queue.pop(FRESH + late)
        assert queue.counters.codel == expected
    assert queue.dropped == 0


def test_a_super_packet_goes_on_where_the_outage_cut_it() -> None:
    queue = Queue()
    read = tcp(1, 65000)
    queue.read(read, 0)
    cut = segments(read)
    assert [queue.pop(0) for _ in range(10)] == cut[:10]
    assert queue.peek(0) == len(cut[10])
    queue.hold()
    queue.recover(SECOND)
    assert queue.drain(SECOND) == cut[10:]


def test_a_second_outage_knows_the_newest_from_the_fresh() -> None:
    queue = Queue()
    for number in range(5):
        queue.push(ipv4(1, number), 0)
    queue.recover(0)
    assert queue.pop(0) == ipv4(1, 3)
    queue.hold()
    queue.push(ipv4(1, 5), 0)
    queue.recover(SECOND)
    assert queue.drain(SECOND) == [ipv4(1, 4), ipv4(1, 5)]
    assert queue.dropped == 3


def test_the_newest_of_a_flow_survive_the_flood_of_another() -> None:
    """While there is no path they are kept whatever their age, as docs/protocol.md promises."""
    queue = Queue()
    queue.hold()
    keystrokes = [ipv4(1, number) for number in range(3)]
    for packet in keystrokes:
        queue.push(packet, 0)
    for number in range(2 * MAX_PACKETS):
        queue.push(ipv4(2, number), SECOND)
        assert len(queue) <= MAX_PACKETS
    for number in range(100):
        queue.push(ipv4(2, number, size=60000), SECOND)
        assert queue.size <= MAX_BYTES
    queue.recover(600 * SECOND)
    assert queue.drain(600 * SECOND) == [
        *keystrokes[1:],
        ipv4(2, 98, size=60000),
        ipv4(2, 99, size=60000),
    ]


def test_many_bulk_flows_do_not_push_out_a_keystroke() -> None:
    """Two super-packets each of 60 flows are more than the queue holds."""
    queue = Queue()
    queue.hold()
    queue.push(ipv4(500, 0), 0)
    queue.push(ipv4(500, 1), 0)
    for number in range(3):
        for flow in range(60):
            queue.read(tcp(flow, 65000, mark=number), SECOND)
            assert queue.size <= MAX_BYTES
    queue.recover(60 * SECOND)
    kept = queue.drain(60 * SECOND)
    assert kept[:2] == [ipv4(500, 0), ipv4(500, 1)]
    flows = {packet[20:22] for packet in kept}
    assert len(flows) == 61


def test_more_flows_than_fit_are_still_bounded() -> None:
    queue = Queue()
    queue.hold()
    for flow in range(MAX_PACKETS + 100):
        queue.push(ipv4(flow), 0)
        assert len(queue) <= MAX_PACKETS
    queue.recover(0)
    assert ipv4(MAX_PACKETS + 99) in queue.drain()


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, SECOND)), max_size=60),
    st.integers(SECOND, SECOND + 300 * MS),
    st.booleans(),
)
def test_recovery_keeps_what_it_should(
    entries: list[tuple[int, int]], now: int, hold: bool
) -> None:
    entries.sort(key=lambda entry: entry[1])
    queue = Queue()
    if hold:
        queue.hold()
    for number, (flow, at) in enumerate(entries):
        queue.push(ipv4(flow, number), at)
    queue.recover(now)
    size, kept = queue.size, queue.drain(now)
    assert size == sum(map(len, kept)) and len(kept) == len(set(kept))
    assert len(kept) + queue.dropped == len(entries)
    for flow in range(1, 5):
        mine = [(ipv4(flow, i), at) for i, (f, at) in enumerate(entries) if f == flow]
        expected = [p for p, _ in mine[-2:]]
        expected += [p for p, at in mine[:-2] if now - at <= FRESH]
        assert [p for p in kept if queue.flow(p) == queue.flow(ipv4(flow))] == expected


# ---- everything at once ----


FUZZER = r"""
#include <stdio.h>
#include <stdlib.h>
#include "queue.h"

static uint64_t state;

static uint32_t below(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s\n", #x); abort(); } } while (0)

static uint32_t fill(uint8_t *at, struct mt_vnet *vnet)
{
    static const uint32_t sizes[] = {60, 256, 257, 1420, 2048, 2049, 9000, 32768, 32769, 65535};
    uint32_t length = below(3) ? sizes[below(10)] : 60 + below(65476);
    bool six = below(2), cut = below(3) == 0;
    uint32_t start = six ? 40 : 20;
    memset(at, 0, 60);
    if (six) {
        at[0] = 0x60;
        at[1] = (uint8_t)(below(4) << 4);
        mt_put16(at + 4, length - 40);
        at[6] = cut ? 6 : 17;
    } else {
        at[0] = 0x45;
        at[1] = (uint8_t)below(4);
        mt_put16(at + 2, length);
        at[9] = cut ? 6 : 17;
    }
    mt_put16(at + start, below(4) ? below(5) : below(3000));
    at[start + 12] = 0x50;
    *vnet = (struct mt_vnet){0};
    if (cut)
        *vnet = (struct mt_vnet){1, six ? 4 : 1, 0, (uint16_t)(below(9) ? 1360 : 1 + below(20000)),
                                 (uint16_t)start, 16};
    if (below(50) == 0) /* and some that are wrong anywhere */
        at[below(60)] ^= (uint8_t)(1 << below(8));
    if (below(50) == 0)
        ((uint8_t *)vnet)[below(10)] ^= (uint8_t)(1 << below(8));
    return below(100) ? length : below(length);
}

int main(int argc, char **argv)
{
    static uint8_t packet[65536];
    for (int seed = 0; seed < (argc > 1 ? atoi(argv[1]) : 1); seed++) {
        state = (uint64_t)seed * 2654435761u + 1;
        struct mt_queue *q = mt_queue_new();
        CHECK(q);
        mt_time now = 0;
        bool holding = false;
        uint32_t busy = 1 + below(9);
        for (int turn = 0; turn < 6000; turn++) {
            struct mt_vnet vnet;
            uint32_t n = below(16), size, length;
            if (n < busy) {
                if (below(2)) {
                    uint8_t *room = mt_queue_reserve(q);
                    length = fill(room + MT_VNET_SIZE, &vnet);
                    memcpy(room, &vnet, MT_VNET_SIZE);
                    mt_queue_commit(q, below(30) ? length + MT_VNET_SIZE : below(12), now);
                } else {
                    length = fill(packet, &vnet);
                    mt_queue_push(q, below(9) ? &vnet : NULL, packet, length, now);
                }
            } else if (n < 15) {
                for (uint32_t i = below(40); i; i--) {
                    size = mt_queue_peek(q, now);
                    CHECK(holding || (size == 0) == mt_queue_empty(q));
                    if (!size)
                        break;
                    if (below(9) == 0) { /* announced, then others come */
                        length = fill(packet, &vnet);
                        mt_queue_push(q, &vnet, packet, length, now);
                        CHECK(mt_queue_peek(q, now) == size);
                    }
                    uint8_t *out = malloc(size); /* exactly: a byte more is seen */
                    CHECK(out);
                    mt_queue_take(q, out);
                    free(out);
                }
            } else if (below(6) == 0) {
                if (below(2)) {
                    mt_queue_hold(q);
                    holding = true;
                } else {
                    mt_queue_recover(q, now);
                    holding = false;
                }
            } else if (below(20) == 0) {
                mt_queue_set_quantum(q, below(100000));
            }
            CHECK(mt_queue_packets(q) <= 10240 && mt_queue_bytes(q) <= 4u << 20);
            CHECK(mt_queue_memory(q) < 32u << 20);
            now += below(4) ? below(100) : below(100) ? below(10000) : below(3000000);
            if (below(1000) == 0)
                busy = 1 + below(12);
        }
        mt_queue_free(q);
    }
    puts("fine");
    return 0;
}
"""


def test_random_operations_under_the_sanitizers_leave_nothing_behind(tmp_path: Path) -> None:
    """Addresses, undefined behaviour and leaks; as a program, for Python itself leaks."""
    source, program = tmp_path / "fuzzer.c", tmp_path / "fuzzer"
    source.write_text(FUZZER)
    compiler = os.environ.get("CC", "gcc")
    assert shutil.which(compiler)
    subprocess.run(
        [
            compiler,
            *("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{CORE}"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *("-o", str(program), str(source), str(CORE / "queue.c"), str(CORE / "offload.c")),
        ],
        check=True,
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=1"
    done = subprocess.run(
        [str(program), "12"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
