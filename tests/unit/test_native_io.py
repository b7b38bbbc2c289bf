"""Batches between a TUN, the engine and UDP sockets: two ends in one process, on loopback.

A pair of SOCK_SEQPACKET sockets stands for each TUN: one message is a virtio header and a packet.
The real engine is between them. What the kernel seldom says is scripted: a shim around io.c answers
sendmmsg() and read() in its place.
"""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random

import pytest

from tests.unit.native import CORE, library

RAW_MAX = 1024  # MT_RAW_MAX
NEVER = 2**63 - 1
PLAIN = bytes(10)  # a virtio header that asks for nothing
UDP_SEGMENT, UDP_GRO = 103, 104
GSO_TCPV4 = 1
NEEDS_CSUM = 1

SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* For each sendmmsg() to come: 0: as it is, above: this errno, below: so many messages at most. */
static int script[64], script_at, script_end, polls, read_errno, settings;

static int scripted_sendmmsg(int fd, struct mmsghdr *v, unsigned int n, int flags)
{
    int line = script_at < script_end ? script[script_at++] : 0;
    if (line > 0) {
        errno = line;
        return -1;
    }
    if (line < 0 && n > (unsigned int)-line)
        n = (unsigned int)-line;
    return sendmmsg(fd, v, n, flags);
}

static ssize_t scripted_read(int fd, void *buffer, size_t size)
{
    if (read_errno && size > 8) {
        errno = read_errno;
        return -1;
    }
    return read(fd, buffer, size);
}

static int counted_poll(struct pollfd *p, nfds_t n, int timeout)
{
    polls++;
    return poll(p, n, timeout);
}

static int counted_settime(int fd, int flags, const struct itimerspec *at, struct itimerspec *old)
{
    settings++;
    return timerfd_settime(fd, flags, at, old);
}

#define sendmmsg scripted_sendmmsg
#define read scripted_read
#define poll counted_poll
#define timerfd_settime counted_settime
#include "NATIVE/io/io.c"

void shim_script(const int *lines, int count)
{
    memcpy(script, lines, (size_t)count * sizeof *lines);
    script_at = polls = 0;
    script_end = count;
}
int shim_left(void) { return script_end - script_at; }
int shim_polls(void) { return polls; }
int shim_settings(void) { return settings; }
void shim_read_errno(int code) { read_errno = code; }

struct mt_path *shim_path(struct mt_conn *c, int socket, const void *to, uint32_t length,
                          const uint8_t *cid, const uint8_t *expected)
{
    struct mt_path *p = mt_conn_add_path(c, 1400, 10000);
    if (!p)
        abort();
    p->socket = socket;
    memcpy(&p->to, to, length);
    p->to_length = length;
    memcpy(p->cid, cid, MT_CID);
    p->cid_length = MT_CID;
    p->has_cid = true;
    memcpy(p->expected, expected, MT_CID);
    p->has_expected = true;
    p->limited = false;
    p->window = 1 << 24;
    return p;
}
void shim_window(struct mt_path *p, int64_t window) { p->window = window; }
void shim_ack_delay(struct mt_conn *c, mt_time delay) { c->ack_delay = delay; }
void shim_pacing(struct mt_path *p, double pacing) { p->pacing = pacing; }
int64_t shim_in_flight(const struct mt_path *p) { return p->in_flight; }
struct mt_lane *shim_lane(struct mt_conn *c) { return c->lane; }
uint64_t shim_waiting(const struct mt_lane *l) { return mt_queue_bytes(l->queue); }
uint64_t shim_unroutable(const struct mt_engine *e) { return e->unroutable; }
uint64_t shim_failed(const struct mt_conn *c) { return c->counters.failed; }
/* What an owner does with a sample; until then the timer asks again. */
void shim_take_samples(struct mt_conn *c, mt_time now)
{
    c->events &= ~(uint32_t)MT_EVENT_SAMPLE;
    for (int i = 0; i < MT_PATHS; i++) {
        c->paths[i].sample.pending = false;
        c->paths[i].sampled_at = now;
    }
}
uint32_t shim_events(struct mt_conn *c)
{
    uint32_t events = c->events;
    c->events = 0;
    return events;
}
int shim_refused(struct mt_conn *c)
{
    int code = 0;
    for (int i = 0; i < MT_PATHS; i++) {
        if (!code && c->paths[i].used)
            code = c->paths[i].refused;
        c->paths[i].refused = 0;
    }
    return code;
}
uint32_t shim_outbox(const struct mt_engine *e) { return e->message_count; }

/* A message as the engine makes them: `length` bytes, of which each says its place. */
void shim_message(struct mt_conn *c, struct mt_path *p, uint32_t length, uint32_t segment)
{
    struct mt_engine *e = c->engine;
    struct mt_message *m = &e->messages[e->message_count++];
    uint32_t count = (length + segment - 1) / segment;
    *m = (struct mt_message){c, p, e->out_length, length, segment, count};
    for (uint32_t i = 0; i < length; i++)
        e->out[e->out_length + i] = (uint8_t)(i / segment + i % segment);
    e->out_length += length;
    e->packet_count += m->count;
}

int shim_raw(struct mt_io *io, int *socket, uint8_t *data, uint8_t *from)
{
    struct mt_raw *raw = mt_io_take_raw(io);
    if (!raw)
        return -1;
    int length = (int)raw->length;
    *socket = raw->socket;
    memcpy(data, raw->data, raw->length);
    memcpy(from, &raw->from, sizeof raw->from);
    free(raw);
    return length;
}
"""


class Counters(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "steps",
            *("tun_reads", "tun_writes", "tun_dropped"),
            *("udp_reads", "udp_read_messages", "udp_writes", "udp_write_messages"),
            *("udp_dropped", "udp_refused", "segments_refused", "raw_dropped"),
        )
    )


class Secret(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint8 * 32), ("iv", ctypes.c_uint8 * 12))


SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "mt_engine_new": (c_void_p, ()),
    "mt_engine_free": (None, (c_void_p,)),
    "mt_engine_set_routes": (None, (c_void_p, c_void_p)),
    "mt_routes_new": (c_void_p, ()),
    "mt_routes_add": (c_bool, (c_void_p, c_int, c_char_p, c_int, c_int)),
    "mt_lane_new": (c_void_p, (c_void_p, c_int)),
    "mt_lane_free": (None, (c_void_p,)),
    "mt_lane_hold": (None, (c_void_p,)),
    "mt_lane_recover": (None, (c_void_p, c_int64)),
    "mt_conn_new": (c_void_p, (c_void_p,)),
    "mt_conn_free": (None, (c_void_p,)),
    "mt_conn_start": (c_bool, (c_void_p, c_void_p, c_int64)),
    "mt_conn_attach": (None, (c_void_p, c_void_p)),
    "mt_conn_set_host_cids": (c_bool, (c_void_p, c_char_p, c_uint32)),
    "mt_conn_timer": (c_int64, (c_void_p,)),
    "mt_conn_activate": (None, (c_void_p, c_void_p)),
    "mt_conn_replay": (c_int, (c_void_p, c_void_p, c_void_p, c_int64)),
    "mt_keys_new": (
        c_void_p,
        (c_int, ctypes.POINTER(Secret), ctypes.POINTER(Secret), c_char_p, c_char_p, c_int),
    ),
    "mt_io_new": (c_void_p, (c_void_p, c_int, c_bool, c_bool)),
    "mt_io_free": (None, (c_void_p,)),
    "mt_io_fd": (c_int, (c_void_p,)),
    "mt_io_add_socket": (c_int, (c_void_p, c_int)),
    "mt_io_remove_socket": (None, (c_void_p, c_int)),
    "mt_io_now": (c_int64, ()),
    "mt_io_step": (c_bool, (c_void_p,)),
    "mt_io_transmit": (None, (c_void_p,)),
    "mt_io_tun_error": (c_int, (c_void_p,)),
    "mt_io_counters": (ctypes.POINTER(Counters), (c_void_p,)),
    "shim_script": (None, (c_void_p, c_int)),
    "shim_left": (c_int, ()),
    "shim_polls": (c_int, ()),
    "shim_settings": (c_int, ()),
    "shim_read_errno": (None, (c_int,)),
    "shim_path": (c_void_p, (c_void_p, c_int, c_char_p, c_uint32, c_char_p, c_char_p)),
    "shim_window": (None, (c_void_p, c_int64)),
    "shim_ack_delay": (None, (c_void_p, c_int64)),
    "shim_pacing": (None, (c_void_p, ctypes.c_double)),
    "shim_in_flight": (c_int64, (c_void_p,)),
    "shim_waiting": (ctypes.c_uint64, (c_void_p,)),
    "shim_unroutable": (ctypes.c_uint64, (c_void_p,)),
    "shim_failed": (ctypes.c_uint64, (c_void_p,)),
    "shim_take_samples": (None, (c_void_p, c_int64)),
    "shim_events": (c_uint32, (c_void_p,)),
    "shim_refused": (c_int, (c_void_p,)),
    "shim_outbox": (c_uint32, (c_void_p,)),
    "shim_message": (None, (c_void_p, c_void_p, c_uint32, c_uint32)),
    "shim_raw": (c_int, (c_void_p, c_void_p, c_void_p, c_void_p)),
}
EVENT_REFUSED = 128


@cache
def load() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "shim.c"
        shim.write_text(SHIM.replace("NATIVE", str(CORE.parent)))
        lib = library(str(shim), *sorted(each.name for each in CORE.glob("*.c")))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def address(name: tuple[str | int, ...]) -> bytes:
    """A struct sockaddr_in or sockaddr_in6."""
    host, port = str(name[0]).partition("%")[0], int(name[1])
    packed = ip_address(host).packed
    if len(packed) == 4:
        return struct.pack("=H2s4s8x", socket.AF_INET, port.to_bytes(2, "big"), packed)
    scope = int(name[3]) if len(name) > 3 else 0
    return struct.pack("=H2sI16sI", socket.AF_INET6, port.to_bytes(2, "big"), 0, packed, scope)


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(source: str, destination: str, protocol: int, upper: bytes) -> bytes:
    ends = ip_address(source).packed + ip_address(destination).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(upper), 7, 0x4000, 64, protocol, 0)
    return head[:10] + struct.pack("!H", checksum(head + ends) ^ 0xFFFF) + ends + upper


def packet(payload: bytes, source: str = "10.0.0.1", destination: str = "10.0.0.2") -> bytes:
    """An IPv4 packet of an experimental protocol: no offload touches it."""
    return ipv4(source, destination, 253, payload)


class End:
    """A TUN, an engine with a lane and a connection, and a UDP socket."""

    def __init__(self, owner: int, peers: str, ip: str, offload: bool, gro: bool) -> None:
        lib = self.lib = load()
        self.outside, self.tun = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        )
        self.engine = lib.mt_engine_new()
        self.io = lib.mt_io_new(self.engine, self.tun.fileno(), offload, offload)
        assert self.io
        self.sockets: list[socket.socket] = []
        self.udp, self.number = self.add_socket(ip, gro)
        routes = lib.mt_routes_new()
        network = ip_network(peers)
        packed = network.network_address.packed
        assert lib.mt_routes_add(routes, network.version, packed, network.prefixlen, owner)
        self.routes = routes
        lib.mt_engine_set_routes(self.engine, routes)
        self.lanes = [lib.mt_lane_new(self.engine, owner)]
        self.conns: list[int] = []
        self.conn = 0
        self.path = 0

    def add_socket(self, ip: str, gro: bool = True) -> tuple[socket.socket, int]:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if gro:
            udp.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        udp.bind((ip, 0))
        number = self.lib.mt_io_add_socket(self.io, udp.fileno())
        self.sockets.append(udp)
        return udp, number

    def connect(self, other: End, cid: bytes, peer_cid: bytes, ours: Secret, peers: Secret) -> None:
        lib = self.lib
        self.cid, self.peer_cid = cid, peer_cid
        self.conn = lib.mt_conn_new(self.engine)
        self.conns.append(self.conn)
        self.path = self.add_path(self.number, other.udp.getsockname())
        hp = bytes(range(16))
        keys = lib.mt_keys_new(0, ours, peers, hp, hp, 0)
        lib.mt_conn_set_host_cids(self.conn, cid, 1)
        assert lib.mt_conn_start(self.conn, keys, lib.mt_io_now())
        lib.mt_conn_attach(self.conn, self.lanes[0])

    def add_path(self, number: int, to: tuple[str | int, ...]) -> int:
        raw = address(to)
        path = self.lib.shim_path(self.conn, number, raw, len(raw), self.peer_cid, self.cid)
        assert isinstance(path, int)
        return path

    def step(self) -> bool:
        attention = bool(self.lib.mt_io_step(self.io))
        for conn in self.conns:
            self.lib.shim_take_samples(conn, self.lib.mt_io_now())
        return attention

    @property
    def counters(self) -> Counters:
        counters: Counters = self.lib.mt_io_counters(self.io).contents
        return counters

    def write(self, data: bytes, header: bytes = PLAIN) -> None:
        """The kernel sends a packet into the tunnel."""
        self.outside.send(header + data)

    def read(self) -> list[tuple[bytes, bytes]]:
        """What came out of the tunnel: (virtio header, packet)."""
        got: list[tuple[bytes, bytes]] = []
        while True:
            try:
                data = self.outside.recv(70_000)
            except BlockingIOError:
                return got
            got.append((data[:10], data[10:]))

    def raw(self) -> list[tuple[int, bytes, bytes]]:
        """(socket number, datagram, address it came from), the oldest first."""
        got: list[tuple[int, bytes, bytes]] = []
        data, source, number = (ctypes.c_uint8 * 65536)(), (ctypes.c_uint8 * 128)(), c_int()
        while (n := self.lib.shim_raw(self.io, ctypes.byref(number), data, source)) >= 0:
            got.append((number.value, bytes(data[:n]), bytes(source)))
        return got

    def message(self, path: int, length: int, segment: int) -> None:
        self.lib.shim_message(self.conn, path, length, segment)

    def close(self) -> None:
        for conn in self.conns:
            self.lib.mt_conn_free(conn)
        for lane in self.lanes:
            self.lib.mt_lane_free(lane)
        self.lib.mt_io_free(self.io)
        self.lib.mt_engine_free(self.engine)
        for each in (self.outside, self.tun, *self.sockets):
            each.close()


class Pair:
    """Two ends with one connection; 10.0.0.1 is behind `a` and 10.0.0.2 behind `b`."""

    def __init__(self, ip: str, offload: bool, gro: bool) -> None:
        self.a = End(1, "10.0.0.2/32", ip, offload, gro)
        self.b = End(1, "10.0.0.1/32", ip, offload, gro)
        one, two = Secret(), Secret()
        one.key[:] = [1] * 32
        two.key[:] = [2] * 32
        self.a.connect(self.b, b"AAAAAAAA", b"BBBBBBBB", one, two)
        self.b.connect(self.a, b"BBBBBBBB", b"AAAAAAAA", two, one)

    def run(self, until: Callable[[], bool], seconds: float = 5) -> None:
        """Step whichever end is ready, as an event loop would."""
        ends = {self.a.lib.mt_io_fd(e.io): e for e in (self.a, self.b)}
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, "nothing came of it in time"
            for fd in select.select(list(ends), [], [], 0.05)[0]:
                ends[fd].step()

    def arrived(self, count: int) -> list[bytes]:
        """Run until so many packets came out behind `b`."""
        got: list[bytes] = []

        def enough() -> bool:
            got.extend(data for _, data in self.b.read())
            return len(got) >= count

        self.run(enough)
        return got

    def settle(self) -> None:
        """Run until both are idle."""
        fds = [self.a.lib.mt_io_fd(e.io) for e in (self.a, self.b)]
        while select.select(fds, [], [], 0.03)[0]:
            self.a.step()
            self.b.step()


Make = Callable[..., Pair]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Pair] = []

    def factory(ip: str = "127.0.0.1", offload: bool = False, gro: bool = True) -> Pair:
        made.append(Pair(ip, offload, gro))
        return made[-1]

    yield factory
    load().shim_read_errno(0)
    script()
    for pair in made:
        pair.a.close()
        pair.b.close()


def script(*lines: int) -> None:
    load().shim_script((c_int * len(lines))(*lines), len(lines))


def scripted() -> bool:
    """Whether every line of the script was used."""
    left: int = load().shim_left()
    return left == 0


def datagrams(udp: socket.socket) -> list[bytes]:
    got = []
    while True:
        try:
            got.append(udp.recv(70_000))
        except BlockingIOError:
            return got


def segments(length: int, segment: int) -> list[bytes]:
    """What End.message() makes of these sizes."""
    whole = bytes((i // segment + i % segment) & 0xFF for i in range(length))
    return [whole[i : i + segment] for i in range(0, length, segment)]


# ---- packets ----


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("gro", [True, False])
def test_packets_of_all_sizes_go_both_ways(make: Make, ip: str, gro: bool) -> None:
    pair = make(ip, gro=gro)
    random = Random(1)
    there = [packet(random.randbytes(random.randrange(1, 3000))) for _ in range(300)]
    back = [packet(random.randbytes(9), "10.0.0.2", "10.0.0.1") for _ in range(300)]
    got_there: list[bytes] = []
    got_back: list[bytes] = []
    sent = 0

    def more() -> bool:
        nonlocal sent
        for _ in range(20):
            if sent < 300:
                pair.a.write(there[sent])
                pair.b.write(back[sent])
                sent += 1
        got_there.extend(data for _, data in pair.b.read())
        got_back.extend(data for _, data in pair.a.read())
        return len(got_there) == len(got_back) == 300

    pair.run(more)
    assert sorted(got_there) == sorted(there)
    assert sorted(got_back) == sorted(back)
    pair.settle()
    lib = load()
    assert lib.shim_in_flight(pair.a.path) == lib.shim_in_flight(pair.b.path) == 0  # all ACKed
    for end in (pair.a, pair.b):
        assert end.raw() == []
        assert lib.shim_failed(end.conn) == 0
        assert end.counters.tun_dropped == end.counters.udp_dropped == end.counters.udp_refused == 0
        assert lib.mt_io_tun_error(end.io) == 0


def test_a_super_packet_crosses_in_few_system_calls_and_arrives_as_one(make: Make) -> None:
    pair = make(offload=True)
    mss, count = 1300, 40
    data = Random(2).randbytes(mss * count)
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 5, 6, 0x50, 0x18, 500, 0, 0)
    ends = ip_address("10.0.0.1").packed + ip_address("10.0.0.2").packed
    pseudo = checksum(ends + struct.pack("!HH", 6, len(tcp) + len(data)))
    tcp = tcp[:16] + struct.pack("!H", pseudo) + tcp[18:]
    header = struct.pack("=BBHHHH", NEEDS_CSUM, GSO_TCPV4, 40, mss, 20, 16)
    pair.a.write(ipv4("10.0.0.1", "10.0.0.2", 6, tcp + data), header)
    got: list[tuple[bytes, bytes]] = []

    def all_there() -> bool:
        got.extend(pair.b.read())
        return sum(len(each) - 40 for _, each in got) == len(data)

    pair.run(all_there)
    assert b"".join(each[40:] for _, each in got) == data
    assert len(got) == 1
    assert struct.unpack("=BBHHHH", got[0][0])[1:4:2] == (GSO_TCPV4, mss)
    assert pair.a.counters.tun_reads == 1
    assert pair.a.counters.udp_write_messages <= 3
    assert pair.b.counters.udp_read_messages <= 4
    assert pair.b.counters.tun_writes == 1


def test_every_lane_gets_what_its_routes_say(make: Make) -> None:
    pair = make()
    lib, a = load(), pair.a
    other = lib.mt_lane_new(a.engine, 2)
    a.lanes.append(other)
    assert lib.mt_routes_add(a.routes, 4, ip_address("10.0.0.3").packed, 32, 2)
    ours, theirs = packet(b"ours"), packet(b"theirs" * 100, destination="10.0.0.3")
    nobodys = packet(b"nobody's", destination="10.0.0.4")
    assert lib.mt_routes_add(a.routes, 4, ip_address("10.0.0.5").packed, 32, 3)  # has no lane
    gone = packet(b"no lane", destination="10.0.0.5")
    for each in (ours, theirs, nobodys, theirs, ours, theirs, b"no IP packet", gone, b""):
        a.write(each)
    got = pair.arrived(2)
    assert got == [ours, ours]
    assert lib.shim_unroutable(a.engine) == 3
    assert lib.shim_waiting(other) >= 3 * len(theirs)
    assert lib.shim_waiting(a.lanes[0]) == 0


def test_a_lane_that_went_is_not_used_again(make: Make) -> None:
    pair = make()
    lib, a = load(), pair.a
    other = lib.mt_lane_new(a.engine, 2)
    assert lib.mt_routes_add(a.routes, 4, ip_address("10.0.0.3").packed, 32, 2)
    a.write(packet(b"theirs", destination="10.0.0.3"))
    a.step()
    lib.mt_lane_free(other)
    a.write(packet(b"theirs", destination="10.0.0.3"))
    a.write(packet(b"ours"))
    pair.arrived(1)
    assert lib.shim_unroutable(a.engine) == 1


def test_without_lanes_the_tun_is_drained(make: Make) -> None:
    pair = make()
    lib, a = load(), pair.a
    lib.mt_conn_free(a.conns.pop())
    lib.mt_lane_free(a.lanes.pop())
    for _ in range(5):
        a.write(packet(b"lost"))
    assert not a.step()
    assert lib.shim_unroutable(a.engine) == 5
    assert select.select([lib.mt_io_fd(a.io)], [], [], 0)[0] == []


def test_a_held_lane_waits_and_recovers(make: Make) -> None:
    pair = make()
    lib, a = load(), pair.a
    lib.mt_lane_hold(a.lanes[0])
    a.write(packet(b"waits"))
    a.step()
    assert a.counters.udp_writes == 0
    lib.mt_lane_recover(a.lanes[0], lib.mt_io_now())
    lib.mt_io_transmit(a.io)
    got = pair.arrived(1)
    assert got == [packet(b"waits")]


def test_a_device_that_refuses_costs_the_packet(make: Make) -> None:
    pair = make()
    pair.b.tun.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for _ in range(20):
        pair.a.write(packet(bytes(1000)))
    pair.run(lambda: pair.b.counters.tun_writes == 20)
    got = pair.b.read()
    assert 0 < len(got) < 20
    assert pair.b.counters.tun_dropped == 20 - len(got)


@pytest.mark.parametrize("code", [errno.EBADFD, errno.EIO, errno.EFAULT])
def test_a_device_that_is_gone_is_reported_and_left_alone(make: Make, code: int) -> None:
    pair = make()
    lib, a = load(), pair.a
    a.write(packet(b"never read"))
    lib.shim_read_errno(code)
    assert a.step()
    lib.shim_read_errno(0)
    assert lib.mt_io_tun_error(a.io) == code
    assert a.step()
    assert select.select([lib.mt_io_fd(a.io)], [], [], 0)[0] == []


def test_the_far_end_of_the_device_closes(make: Make) -> None:
    pair = make()
    pair.a.outside.close()
    assert pair.a.step()
    assert load().mt_io_tun_error(pair.a.io) == errno.EIO
    assert select.select([load().mt_io_fd(pair.a.io)], [], [], 0)[0] == []


def test_a_read_that_fails_for_one_packet_is_no_end(make: Make) -> None:
    pair = make()
    lib = load()
    pair.a.write(packet(b"kept"))
    lib.shim_read_errno(errno.EINVAL)
    assert not pair.a.step()
    lib.shim_read_errno(0)
    assert not lib.mt_io_tun_error(pair.a.io)
    pair.arrived(1)


# ---- raw datagrams ----


def stranger(end: End) -> socket.socket:
    family = end.udp.family
    udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    udp.bind(("127.0.0.9" if family == socket.AF_INET else "::1", 0))
    udp.connect(end.udp.getsockname())
    return udp


def drain(end: End) -> list[bytes]:
    """Step until nothing is ready; the raw datagrams of all that."""
    got: list[bytes] = []
    while select.select([end.lib.mt_io_fd(end.io)], [], [], 0)[0]:
        end.step()
        got.extend(data for _, data, _ in end.raw())
    return got


def test_what_is_no_business_of_the_engine_is_raw(make: Make) -> None:
    pair = make()
    a = pair.a
    known = b"\x40AAAAAAAA" + bytes(40)
    with stranger(a) as udp:
        strange = [known, b"\xc0AAAAAAAA" + bytes(1191), b"\x40CCCCCCCC" + bytes(40), b"\x40"]
        for each in strange:
            udp.send(each)
        assert a.step()
        source = address(udp.getsockname())
    got = a.raw()
    assert [data for _, data, _ in got] == strange
    assert {number for number, _, _ in got} == {a.number}
    assert all(each[: len(source)] == source for _, _, each in got)
    # From the known path: too short for a 1-RTT packet, a handshake, another connection's.
    peers = [known[:28], b"\xc0" + known[1:], b"\x40CCCCCCCC" + bytes(40)]
    for each in (*peers, known):
        pair.b.udp.sendto(each, a.udp.getsockname())
    assert a.step()
    assert [data for _, data, _ in a.raw()] == peers
    assert load().shim_failed(a.conn) == 1  # the last one did reach the connection
    assert not a.step()


def test_gro_is_undone_for_raw_datagrams_too(make: Make) -> None:
    a = make().a
    sizes = [200] * 9 + [77]
    parts = [
        b"\x40" + b"CCCDDDEEE"[i % 3 * 3 :][:3] + bytes([i]) * (n - 4) for i, n in enumerate(sizes)
    ]
    with stranger(a) as udp:
        udp.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 200)
        udp.send(b"".join(parts))
        a.step()
    assert a.counters.udp_read_messages == 1
    assert [data for _, data, _ in a.raw()] == parts


def test_raw_datagrams_waiting_are_bounded(make: Make) -> None:
    a = make().a
    with stranger(a) as udp:
        udp.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 100)
        for _ in range(25):
            udp.send(bytes(100) * 50)
            a.step()
    while select.select([load().mt_io_fd(a.io)], [], [], 0)[0]:
        a.step()
    assert len(a.raw()) == RAW_MAX
    assert a.counters.raw_dropped == 25 * 50 - RAW_MAX
    with stranger(a) as udp:
        for _ in range(50):
            udp.send(bytes(65_507))
            a.step()
    got = a.raw()
    assert len(got) == RAW_MAX * 2048 // 65_507
    assert {len(data) for _, data, _ in got} == {65_507}


@pytest.mark.parametrize("seed", range(5))
def test_every_datagram_is_raw_or_the_connections(make: Make, seed: int) -> None:
    random = Random(seed)
    pair = make(gro=seed % 2 == 0)
    a = pair.a
    strange: list[bytes] = []
    ours = 0
    with stranger(a) as udp:
        for _ in range(200):
            size = random.choice([1, 28, 29, 100, 1400])
            count = random.choice([1, 1, 2, 40])
            known = random.random() < 0.7
            run = []
            for i in range(count):
                length = size if i < count - 1 else random.randrange(1, size + 1)
                first = random.choice([0x40, 0x7F, 0x00, 0x80, 0xC0])
                cid = random.choice([b"AAAAAAAA", b"AAAAAAAB"])
                run.append((bytes([first]) + cid + random.randbytes(length))[:length])
                if known and length >= 29 and first & 0xC0 == 0x40 and cid == b"AAAAAAAA":
                    ours += 1
                else:
                    strange.append(run[-1])
            sender, to = (pair.b.udp if known else udp), a.udp.getsockname()
            segment = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", size))]
            sender.sendmsg(run, segment if count > 1 else [], 0, to)
            if random.random() < 0.3:
                assert drain(a) == strange, f"seed {seed}"
                strange.clear()
        assert drain(a) == strange, f"seed {seed}"
    assert load().shim_failed(a.conn) == ours, f"seed {seed}"


def test_a_stranger_at_one_socket_does_not_silence_another(make: Make) -> None:
    pair = make()
    a = pair.a
    second, _ = a.add_socket("127.0.0.1")
    with stranger(a) as udp:
        for _ in range(3):
            udp.send(b"flood")
            pair.b.udp.sendto(b"\x40AAAAAAAA" + bytes(40), a.udp.getsockname())
            udp.sendto(b"flood", second.getsockname())
            assert a.step()
    assert load().shim_failed(a.conn) == 3


def test_a_new_path_is_raw_until_the_connection_knows_it(make: Make) -> None:
    pair = make()
    lib, a, b = load(), pair.a, pair.b
    moved, number = b.add_socket("127.0.0.2")
    path = b.add_path(number, a.udp.getsockname())
    b.message(path, 40, 40)
    lib.mt_io_transmit(b.io)
    a.step()
    assert len(a.raw()) == 1
    a.add_path(a.number, moved.getsockname())
    forged = b"\x40AAAAAAAA" + bytes(30)
    moved.sendto(forged, a.udp.getsockname())
    a.step()
    assert a.raw() == []
    assert lib.shim_failed(a.conn) == 1
    # The same address at another of our sockets is another path.
    elsewhere, other = a.add_socket("127.0.0.1")
    moved.sendto(forged, elsewhere.getsockname())
    a.step()
    assert [(number, data) for number, data, _ in a.raw()] == [(other, forged)]


# ---- sending ----


def test_messages_are_cut_and_grouped_by_socket(make: Make) -> None:
    pair = make(gro=False)
    lib, a, b = load(), pair.a, pair.b
    _, number = a.add_socket("127.0.0.3")
    with stranger(a) as one, stranger(a) as two:
        first = a.add_path(number, one.getsockname())
        second = a.add_path(a.number, two.getsockname())
        one.connect(a.sockets[1].getsockname())
        for path, length, segment in ((first, 3000, 1200), (second, 1000, 1000)) * 3:
            a.message(path, length, segment)
        a.message(second, 100_000, 1000)  # more than the kernel takes at once
        a.message(first, 65 * 20, 20)
        before = a.counters.udp_writes
        lib.mt_io_transmit(a.io)
        assert datagrams(one) == segments(3000, 1200) * 3 + segments(65 * 20, 20)
        assert datagrams(two) == segments(1000, 1000) * 3 + segments(100_000, 1000)
    assert a.counters.udp_writes == before + 2
    assert a.counters.udp_write_messages == 3 + 3 + 2 + 2
    assert lib.shim_outbox(a.engine) == 0
    assert b.step() is False


def test_a_vector_larger_than_one_call(make: Make) -> None:
    a = make().a
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        for i in range(150):
            a.message(path, 30 + i, 30 + i)
        load().mt_io_transmit(a.io)
        assert datagrams(udp) == [segments(30 + i, 30 + i)[0] for i in range(150)]


def test_what_is_left_of_a_call_follows(make: Make) -> None:
    a = make().a
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        for i in range(10):
            a.message(path, 100 + i, 100 + i)
        script(-1, -3, errno.EINTR, -2, errno.ECONNREFUSED)
        load().mt_io_transmit(a.io)
        assert scripted()
        assert datagrams(udp) == [segments(100 + i, 100 + i)[0] for i in range(10)]
    assert not load().shim_events(a.conn)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EMSGSIZE])
def test_segments_refused_go_one_by_one(make: Make, code: int) -> None:
    a = make().a
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        a.message(path, 50, 50)
        a.message(path, 5000, 1200)
        a.message(path, 2000, 1100)
        script(-1, code)
        load().mt_io_transmit(a.io)
        expected = segments(50, 50) + segments(5000, 1200) + segments(2000, 1100)
        assert datagrams(udp) == expected
        assert a.counters.segments_refused == 1
        messages = a.counters.udp_write_messages
        a.message(path, 5000, 1200)
        load().mt_io_transmit(a.io)
        assert datagrams(udp) == segments(5000, 1200)
    # A device that cannot is not asked again; a message too long concerns its path alone.
    assert a.counters.udp_write_messages - messages == (5 if code == errno.EIO else 1)
    assert a.counters.segments_refused == 1
    assert not load().shim_events(a.conn)


def test_more_segments_refused_than_one_call_takes(make: Make) -> None:
    a = make().a
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        script(errno.EIO)
        for i in range(3):
            a.message(path, 64 * 30, 30 + i)
        load().mt_io_transmit(a.io)
        assert datagrams(udp) == [s for i in range(3) for s in segments(64 * 30, 30 + i)]


def test_a_single_that_is_too_long_is_a_fact_about_its_path(make: Make) -> None:
    a = make().a
    lib = load()
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        a.message(path, 3 * 1200 + 500, 1200)
        # The message; then, one by one: too long, too long, too long, and the rest.
        script(errno.EMSGSIZE, errno.EMSGSIZE, errno.EMSGSIZE, errno.EMSGSIZE, 0)
        lib.mt_io_transmit(a.io)
        assert datagrams(udp) == segments(3 * 1200 + 500, 1200)[3:]
    assert lib.shim_events(a.conn) == EVENT_REFUSED
    assert lib.shim_refused(a.conn) == errno.EMSGSIZE
    assert a.counters.udp_refused == 3


def test_what_a_socket_refuses_stops_nobody_else(make: Make) -> None:
    a = make().a
    lib = load()
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        other_family = a.add_path(a.number, ("::1", 9))
        nowhere = a.add_path(-1, udp.getsockname())
        for to in (path, other_family, path, nowhere, path):
            a.message(to, 2400, 1200)
        lib.mt_io_transmit(a.io)
        assert datagrams(udp) == segments(2400, 1200) * 3
        assert a.counters.udp_refused == 4
        assert lib.shim_events(a.conn) == EVENT_REFUSED
        a.message(other_family, 100, 100)
        lib.mt_io_transmit(a.io)
        assert lib.shim_refused(a.conn) == errno.EAFNOSUPPORT
        a.message(nowhere, 100, 100)
        lib.mt_io_transmit(a.io)
        assert lib.shim_refused(a.conn) == errno.EADDRNOTAVAIL
        script(errno.ECONNREFUSED, errno.ECONNREFUSED)
        a.message(path, 100, 100)
        lib.mt_io_transmit(a.io)
        assert lib.shim_refused(a.conn) == errno.ECONNREFUSED
        script(errno.ENETUNREACH)
        a.message(path, 2400, 1200)
        lib.mt_io_transmit(a.io)
        assert lib.shim_refused(a.conn) == errno.ENETUNREACH
        assert datagrams(udp) == []
    assert a.step()  # there is an event to look at


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_socket_is_waited_for_once(make: Make, code: int) -> None:
    a = make().a
    lib = load()
    with stranger(a) as udp:
        path = a.add_path(a.number, udp.getsockname())
        for i in range(4):
            a.message(path, 1000 - i, 500)
        script(-1, code, -1, code)
        lib.mt_io_transmit(a.io)
        assert lib.shim_polls() == 1
        assert datagrams(udp) == segments(1000, 500) + segments(999, 500)
        assert a.counters.udp_dropped == 4
        a.message(path, 50, 50)
        script(code)
        lib.mt_io_transmit(a.io)
        assert datagrams(udp) == segments(50, 50)
    assert not lib.shim_events(a.conn)


def test_the_number_of_a_removed_socket_is_used_again(make: Make) -> None:
    a = make().a
    lib = load()
    numbers = [a.add_socket("127.0.0.1")[1] for _ in range(20)]
    assert numbers == list(range(1, 21))
    path = a.add_path(7, a.udp.getsockname())
    lib.mt_io_remove_socket(a.io, 7)
    lib.mt_io_remove_socket(a.io, 7)
    lib.mt_io_remove_socket(a.io, -1)
    lib.mt_io_remove_socket(a.io, 1000)
    a.message(path, 100, 100)
    lib.mt_io_transmit(a.io)
    assert lib.shim_refused(a.conn) == errno.EADDRNOTAVAIL
    a.sockets[0].sendto(b"unheard", a.sockets[7].getsockname())
    lib.shim_events(a.conn)
    assert not a.step()
    fresh, number = a.add_socket("127.0.0.1")
    assert number == 7
    a.sockets[0].sendto(b"heard", fresh.getsockname())
    assert a.step()
    assert [(n, data) for n, data, _ in a.raw()] == [(7, b"heard")]
    assert lib.mt_io_add_socket(a.io, -1) == -1


# ---- time ----


def test_an_acknowledgement_leaves_when_its_time_has_come(make: Make) -> None:
    pair = make()
    lib, a, b = load(), pair.a, pair.b
    lib.shim_ack_delay(b.conn, 50_000)
    a.write(packet(b"one"))
    a.step()
    settings = lib.shim_settings()
    b.step()
    assert lib.shim_settings() == settings + 1
    assert lib.shim_in_flight(a.path) > 0
    assert select.select([lib.mt_io_fd(b.io)], [], [], 1)[0]  # the timer, and nothing else
    b.step()
    a.step()
    assert lib.shim_in_flight(a.path) == 0


def test_what_the_pacer_holds_back_leaves_by_the_timer(make: Make) -> None:
    pair = make()
    a = pair.a
    load().shim_pacing(a.path, 2.0)  # bytes per microsecond
    for i in range(60):
        a.write(packet(bytes([i]) * 1200))
    begun = time.monotonic()
    pair.arrived(60)
    assert time.monotonic() - begun > 0.025  # 72,000 bytes; some of them at once
    assert a.counters.udp_writes < 60


@pytest.mark.parametrize("race", [False, True])
def test_replays_leave_although_nothing_else_waits(make: Make, race: bool) -> None:
    pair = make()
    a, lib = pair.a, pair.a.lib
    nowhere, _ = a.add_socket("127.0.0.1")
    dead = a.add_path(a.number, nowhere.getsockname())
    lib.mt_conn_activate(a.conn, dead)
    packets = [packet(bytes([i]) * 1000) for i in range(40)]
    for each in packets:
        a.write(each)
    a.step()
    assert lib.shim_waiting(a.lanes[0]) == 0 and lib.shim_in_flight(dead) > 0
    lib.shim_pacing(a.path, 1.0)  # a megabyte a second: the timer must fire for them
    if not race:
        lib.mt_conn_activate(a.conn, a.path)
    assert lib.mt_conn_replay(a.conn, dead, a.path, lib.mt_io_now()) == 40
    lib.mt_io_transmit(a.io)
    assert sorted(pair.arrived(40)) == sorted(packets)


def test_a_timer_is_only_set_to_fire_earlier(make: Make) -> None:
    pair = make()
    lib = load()
    pair.a.write(packet(b"first"))
    pair.settle()
    before = lib.shim_settings()
    for _ in range(50):
        pair.a.write(packet(b"more"))
        pair.a.step()
    # Each packet moved the deadline. Some more are for a machine that was busy meanwhile.
    assert lib.shim_settings() < before + 10


def test_nothing_to_do_is_no_busy_loop(make: Make) -> None:
    pair = make()
    for _ in range(30):
        pair.a.write(packet(bytes(1000)))
    pair.settle()
    steps = pair.a.counters.steps + pair.b.counters.steps
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        for each in (pair.a, pair.b):
            if select.select([load().mt_io_fd(each.io)], [], [], 0.01)[0]:
                each.step()
    assert pair.a.counters.steps + pair.b.counters.steps - steps < 20
