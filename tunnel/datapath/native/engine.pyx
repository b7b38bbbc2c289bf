# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
"""The binding of the native engine: objects around the C structures, seconds around microseconds.

No decision is made here. `engine.pyi` has the documentation of every name.
"""

from libc.math cimport llround
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memcmp, memset

cimport cython
from tunnel.datapath.native cimport native as mt

CIPHERS = {"AES_128_GCM": 0, "AES_256_GCM": 1, "CHACHA20_POLY1305": 2}
MAX_DATAGRAM = mt.MT_MAX_DATAGRAM
TAG = mt.MT_TAG


def libcrypto() -> str:
    return mt.mt_libcrypto().decode()


cdef inline mt.mt_time us(double seconds) noexcept nogil:
    return llround(seconds * 1e6)


cdef inline object seconds(mt.mt_time at):
    return None if at == mt.MT_NEVER else at / 1e6


cdef void deliver(void *context, const mt.mt_vnet *vnet, mt.iovec *parts, int count,
                  uint32_t length) noexcept with gil:
    cdef Engine engine = <Engine>context
    cdef int i
    packet = bytearray()
    for i in range(count):
        packet += (<char *>parts[i].iov_base)[:parts[i].iov_len]
    engine.delivered.append(bytes(packet))


cdef class Engine:
    cdef mt.mt_engine *e
    cdef list delivered
    cdef object lanes
    cdef uint8_t scratch[65536]

    def __cinit__(self):
        self.e = mt.mt_engine_new()
        if self.e == NULL:
            raise MemoryError
        self.delivered = []
        self.e.write = deliver
        self.e.write_context = <void *>self

    def __dealloc__(self):
        if self.e != NULL:
            mt.mt_engine_free(self.e)

    def set_routes(self, routes):
        cdef mt.mt_routes *table = mt.mt_routes_new()
        if table == NULL:
            raise MemoryError
        for version, address, length, owner in routes:
            if not mt.mt_routes_add(table, version, <const uint8_t *><const char *>address, length,
                                   owner):
                mt.mt_routes_free(table)
                raise MemoryError
        mt.mt_engine_set_routes(self.e, table)

    def push(self, const uint8_t[::1] packet, double now):
        cdef int owner = -1
        cdef mt.mt_lane *lane
        if self.e.routes != NULL and packet.shape[0]:
            owner = mt.mt_routes_destination(self.e.routes, &packet[0], packet.shape[0])
        lane = mt.mt_engine_lane(self.e, owner) if owner >= 0 else NULL
        if lane == NULL:
            self.e.unroutable += 1
            return False
        mt.mt_queue_push(lane.queue, NULL, &packet[0], packet.shape[0], us(now))
        return True

    @property
    def unroutable(self):
        return self.e.unroutable

    def take_sealed(self):
        """Empty the outbox."""
        cdef list out = []
        cdef uint32_t i, at, size
        cdef mt.mt_message *m
        for i in range(self.e.message_count):
            m = &self.e.messages[i]
            connection = <Connection>m.conn.owner
            path = connection.path_of(m.path)
            at = 0
            while at < m.length:
                size = min(m.segment, m.length - at)
                out.append((path, (<char *>self.e.out + m.offset + at)[:size]))
                at += size
        mt.mt_engine_sent(self.e)
        return out

    def take_delivered(self):
        mt.mt_engine_flush(self.e)
        delivered, self.delivered = self.delivered, []
        return delivered


# The C structures of lanes and connections point into their engine's: the collector must not take
# the reference away before they are freed.
@cython.no_gc_clear
cdef class Lane:
    cdef mt.mt_lane *l
    cdef readonly Engine engine
    cdef object __weakref__

    def __cinit__(self, Engine engine, int owner, uint64_t seed):
        self.engine = engine
        self.l = mt.mt_lane_new(engine.e, owner)
        if self.l == NULL:
            raise MemoryError
        mt.mt_queue_set_seed(self.l.queue, seed)

    def __dealloc__(self):
        if self.l != NULL:
            mt.mt_lane_free(self.l)

    def push(self, const uint8_t[::1] packet, double now):
        mt.mt_queue_push(self.l.queue, NULL, &packet[0], packet.shape[0], us(now))

    def hold(self):
        mt.mt_lane_hold(self.l)

    def recover(self, double now):
        mt.mt_lane_recover(self.l, us(now))

    @property
    def held(self):
        return bool(self.l.held)

    @property
    def pending(self):
        return bool(mt.mt_lane_pending(self.l))

    @property
    def queue_bytes(self):
        return mt.mt_queue_bytes(self.l.queue)

    @property
    def queue_packets(self):
        return mt.mt_queue_packets(self.l.queue)

    def set_quantum(self, uint32_t size):
        mt.mt_queue_set_quantum(self.l.queue, size)

    def set_redundancy(self, double rate):
        mt.mt_lane_set_redundancy(self.l, rate)

    @property
    def counters(self):
        cdef mt.mt_lane_counters n = self.l.counters
        cdef const mt.mt_queue_counters *q = mt.mt_queue_get_counters(self.l.queue)
        return {
            "tx_packets": n.sent,
            "tx_bytes": n.sent_bytes,
            "rx_packets": n.received,
            "rx_bytes": n.received_bytes,
            "split_packets": n.split,
            "refused_packets": n.refused,
            "malformed_datagrams": n.malformed + n.unknown_kind,
            "copies_received": n.copies_received,
            "copies_dropped": n.copies_dropped,
            "queue_dropped": q.dropped + q.malformed,
            "queue_codel_dropped": q.codel,
            "queue_marked": q.marked,
        }


cdef class Path:
    """A slot of a connection."""

    cdef mt.mt_path *p
    cdef readonly Connection connection
    cdef public object owner

    cdef mt.mt_path *live(self) except NULL:
        if self.p == NULL:
            raise RuntimeError("this path was removed")
        return self.p

    @property
    def removed(self):
        return self.p == NULL

    @property
    def index(self):
        return self.live().index

    @property
    def mtu(self):
        return self.live().mtu

    @mtu.setter
    def mtu(self, uint32_t size):
        if not 1200 <= size <= mt.MT_MAX_DATAGRAM:
            raise ValueError(f"a path of {size} bytes cannot be used")
        self.live().mtu = size

    @property
    def limited(self):
        return bool(self.live().limited)

    @limited.setter
    def limited(self, bint value):
        self.live().limited = value

    @property
    def bytes_received(self):
        return self.live().bytes_received

    @bytes_received.setter
    def bytes_received(self, uint64_t value):
        self.live().bytes_received = value

    @property
    def bytes_sent(self):
        return self.live().bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, uint64_t value):
        self.live().bytes_sent = value

    @property
    def sendable(self):
        return mt.mt_path_sendable(self.live()) if self.live().limited else None

    @property
    def has_rtt(self):
        return bool(self.live().has_rtt)

    @property
    def rtt_latest(self):
        return self.live().rtt_latest / 1e6

    @property
    def rtt_min(self):
        return self.live().rtt_min / 1e6

    @property
    def rtt_smoothed(self):
        return self.live().rtt_smoothed / 1e6

    @property
    def rtt_variance(self):
        return self.live().rtt_variance / 1e6

    @property
    def initial_rtt(self):
        return self.live().initial_rtt / 1e6

    @initial_rtt.setter
    def initial_rtt(self, double value):
        self.live().initial_rtt = value * 1e6

    def add_rtt(self, double rtt, double ack_delay):
        mt.mt_path_add_rtt(self.live(), rtt * 1e6, ack_delay * 1e6)

    def inherit(self, Path other):
        mt.mt_path_inherit(self.live(), other.live())

    def probe_timeout(self, double max_ack_delay):
        return mt.mt_path_probe_timeout(self.live(), us(max_ack_delay)) / 1e6

    @property
    def window(self):
        return self.live().window

    @property
    def pacing_rate(self):
        return self.live().pacing * 1e6

    def set_rate(self, int64_t window, double pacing_rate):
        cdef mt.mt_path *p = self.live()
        p.window = window
        p.pacing = pacing_rate / 1e6

    @property
    def in_flight(self):
        return self.live().in_flight

    @property
    def outstanding(self):
        return self.live().outstanding

    @property
    def last_eliciting_at(self):
        return self.live().last_eliciting_at / 1e6

    @property
    def last_progress_at(self):
        return self.live().last_progress_at / 1e6

    @property
    def waiting_since(self):
        return seconds(self.live().waiting_since)

    @property
    def lost(self):
        return self.live().lost

    @property
    def large_lost(self):
        return self.live().large_lost

    @large_lost.setter
    def large_lost(self, uint64_t value):
        self.live().large_lost = value

    @property
    def reordering(self):
        return self.live().threshold

    @property
    def delivered(self):
        return self.live().delivered

    def set_cid(self, const uint8_t[::1] cid):
        cdef mt.mt_path *p = self.live()
        if cid is None or not 0 < cid.shape[0] <= mt.MT_MAX_CID:
            p.has_cid = False
            return
        memcpy(p.cid, &cid[0], cid.shape[0])
        p.cid_length = cid.shape[0]
        p.has_cid = True

    def expect(self, const uint8_t[::1] cid):
        cdef mt.mt_path *p = self.live()
        p.has_expected = cid is not None and cid.shape[0] == mt.MT_CID
        if p.has_expected:
            memcpy(p.expected, &cid[0], mt.MT_CID)

    def aim(self, int socket, const uint8_t[::1] to):
        cdef mt.mt_path *p = self.live()
        memset(&p.to, 0, sizeof(p.to))
        p.socket = socket
        if 0 < to.shape[0] <= <Py_ssize_t>sizeof(p.to):
            memcpy(&p.to, &to[0], to.shape[0])
        p.to_length = to.shape[0]

    def forgive(self):
        mt.mt_conn_forgive(self.connection.c, self.live())

    def abandon(self):
        mt.mt_conn_abandon(self.connection.c, self.live())

    def remove(self):
        if self.p != NULL and self.connection.c.active != self.p:
            self.connection.wrappers[self.p.index] = None
            mt.mt_conn_remove_path(self.connection.c, self.p)
            self.p = NULL


@cython.freelist(64)
cdef class Opened:
    """A packet that is the owner's business."""

    cdef readonly uint64_t number
    cdef readonly Path path
    cdef readonly bytes cid
    cdef readonly bint duplicate, moving, frames
    cdef readonly bytes plain


cdef class Report:
    """What has happened to a connection since the last one."""

    cdef readonly list opened, acked, lost, samples, refused
    cdef readonly bint keys, pto, wake
    cdef readonly object error

    @property
    def routine(self):
        """Whether it holds nothing but samples."""
        return not (self.opened or self.acked or self.lost or self.keys or self.pto or self.wake
                    or self.error or self.refused)


@cython.no_gc_clear
cdef class Connection:
    cdef mt.mt_conn *c
    cdef readonly Engine engine
    cdef list wrappers
    cdef public object owner
    cdef Lane lane

    def __cinit__(self, Engine engine):
        self.engine = engine
        self.c = mt.mt_conn_new(engine.e)
        if self.c == NULL:
            raise MemoryError
        self.c.owner = <void *>self
        self.wrappers = [None] * mt.MT_PATHS

    def __dealloc__(self):
        if self.c != NULL:
            mt.mt_conn_free(self.c)

    cdef Path path_of(self, mt.mt_path *slot):
        return self.wrappers[slot.index]

    # life

    def start(self, int cipher, bytes seal_key, bytes seal_iv, bytes seal_hp, bytes open_key,
              bytes open_iv, bytes open_hp, int phase, double now):
        cdef mt.mt_secret seal, open
        fill(&seal, seal_key, seal_iv)
        fill(&open, open_key, open_iv)
        cdef uint8_t[32] hp_seal, hp_open
        fill_key(hp_seal, seal_hp)
        fill_key(hp_open, open_hp)
        cdef mt.mt_keys *keys = mt.mt_keys_new(<mt.mt_cipher>cipher, &seal, &open, hp_seal, hp_open,
                                             phase)
        if keys == NULL or not mt.mt_conn_start(self.c, keys, us(now)):
            raise MemoryError("the native engine could not take the keys")

    def set_next(self, bytes seal_key, bytes seal_iv, bytes open_key, bytes open_iv):
        cdef mt.mt_secret seal, open
        fill(&seal, seal_key, seal_iv)
        fill(&open, open_key, open_iv)
        if not mt.mt_keys_set_next(self.c.keys, &seal, &open):
            raise MemoryError

    def stop(self):
        mt.mt_conn_stop(self.c)

    def attach(self, Lane lane):
        self.lane = lane
        mt.mt_conn_attach(self.c, lane.l)

    def detach(self):
        mt.mt_conn_detach(self.c)
        self.lane = None

    @property
    def running(self):
        return bool(self.c.running)

    @property
    def phase(self):
        return mt.mt_keys_phase(self.c.keys)

    @property
    def key_updates(self):
        return mt.mt_keys_updates(self.c.keys)

    def update_keys(self):
        self.c.wants_update = True

    def configure(self, *, uint64_t max_sealed=0, double max_pto=0, double ack_delay=0,
                  int peer_ack_exponent=-1, double max_ack_delay=-1):
        if max_sealed:
            self.c.max_sealed = max_sealed
        if max_pto:
            self.c.max_pto = us(max_pto)
        if ack_delay:
            self.c.ack_delay = us(ack_delay)
        if peer_ack_exponent >= 0:
            self.c.peer_ack_exponent = peer_ack_exponent
        if max_ack_delay >= 0:
            self.c.max_ack_delay = us(max_ack_delay)

    def set_host_cids(self, cids):
        cdef uint8_t[16][8] table
        cdef uint32_t count = 0
        for cid in cids:
            if len(cid) == mt.MT_CID and count < mt.MT_HOST_CIDS:
                memcpy(table[count], <const char *>cid, mt.MT_CID)
                count += 1
        if not mt.mt_conn_set_host_cids(self.c, table, count):
            raise MemoryError

    # paths

    def add_path(self, uint32_t mtu, double initial_rtt):
        cdef mt.mt_path *p = mt.mt_conn_add_path(self.c, mtu, initial_rtt * 1e6)
        if p == NULL:
            raise RuntimeError("no free path slot")
        cdef Path path = Path.__new__(Path)
        path.p = p
        path.connection = self
        self.wrappers[p.index] = path
        return path

    @property
    def active(self):
        return self.path_of(self.c.active)

    def activate(self, Path path):
        mt.mt_conn_activate(self.c, path.live())

    @property
    def peer_path(self):
        return self.path_of(self.c.peer_path)

    @peer_path.setter
    def peer_path(self, Path path):
        self.c.peer_path = path.live()

    @property
    def copies(self):
        return None if self.c.copies == NULL else self.path_of(self.c.copies)

    @copies.setter
    def copies(self, Path path):
        self.c.copies = NULL if path is None else path.live()

    @property
    def copies_all(self):
        return bool(self.c.copies_all)

    @copies_all.setter
    def copies_all(self, bint value):
        self.c.copies_all = value

    def replay(self, Path path, Path onto=None, *, double now):
        cdef mt.mt_path *target = self.c.active if onto is None else onto.live()
        return mt.mt_conn_replay(self.c, path.live(), target, us(now))

    @property
    def pending_replay(self):
        return mt.mt_conn_replays(self.c)

    @property
    def largest_moving(self):
        return self.c.largest_moving if self.c.has_moving else -1

    @largest_moving.setter
    def largest_moving(self, uint64_t number):
        self.c.largest_moving = number
        self.c.has_moving = True

    @property
    def heard_at(self):
        return self.c.heard_at / 1e6

    # numbers

    @property
    def number(self):
        return self.c.number

    @number.setter
    def number(self, uint64_t value):
        if not mt.mt_conn_skip_to(self.c, value):
            raise MemoryError

    def note_received(self, uint64_t number):
        mt.mt_received_add(&self.c.received, number, False, 0)

    def acknowledge_at(self, double now):
        """Acknowledge at once, with or without anything new."""
        if not self.c.received.eliciting:
            self.c.received.eliciting = 1
            self.c.received.eliciting_since = us(now)
        self.c.received.at_once = True

    # receiving

    def receive(self, Path path, const uint8_t[::1] data, double now):
        cdef bint authentic
        cdef Py_ssize_t size = data.shape[0]
        if not 0 < size <= <Py_ssize_t>sizeof(self.engine.scratch):
            return False
        memcpy(self.engine.scratch, &data[0], size)
        authentic = mt.mt_conn_receive(self.c, path.live(), self.engine.scratch, size, us(now))
        mt.mt_engine_flush(self.engine.e)
        mt.mt_conn_received(self.c, us(now))
        return authentic

    def ack_frame(self, Path path, const uint8_t[::1] frame, bint ecn, double now):
        cdef uint32_t used = 0
        if not mt.mt_conn_ack_frame(self.c, path.live(), &frame[0], frame.shape[0], ecn, us(now),
                                   &used):
            return -1
        return used

    def datagram(self, uint64_t number, const uint8_t[::1] payload, double now):
        cdef Py_ssize_t size = payload.shape[0]
        if not 0 < size <= <Py_ssize_t>sizeof(self.engine.scratch):
            return
        memcpy(self.engine.scratch, &payload[0], size)
        mt.mt_conn_datagram(self.c, number, self.engine.scratch, size, us(now))
        mt.mt_engine_flush(self.engine.e)

    # sending

    def seal(self, double now):
        return mt.mt_conn_seal(self.c, us(now))

    def seal_foreign(self, uint64_t number, bytes header, int number_size, bytes payload):
        cdef uint8_t[1600] out
        cdef uint32_t size
        if len(header) + len(payload) + 4 + mt.MT_TAG > <Py_ssize_t>sizeof(out):
            raise ValueError("a packet too large for any path")
        if self.c.keys == NULL:
            raise RuntimeError("no keys yet")
        size = mt.mt_conn_seal_foreign(
            self.c, number, <const uint8_t *><const char *>header, len(header), number_size,
            <const uint8_t *><const char *>payload, len(payload), out)
        return (<char *>out)[:size]

    def sent(self, Path path, uint64_t number, uint32_t size, bint eliciting, bint in_flight,
             double at):
        cdef int flags = mt.MT_SENT_FOREIGN
        if eliciting:
            flags |= mt.MT_SENT_ELICITING
        if in_flight:
            flags |= mt.MT_SENT_IN_FLIGHT
        if not mt.mt_conn_sent(self.c, path.live(), number, size, flags, us(at)):
            raise MemoryError

    # time

    def get_timer(self):
        return seconds(mt.mt_conn_timer(self.c))

    def handle_timer(self, double now):
        mt.mt_conn_on_timer(self.c, us(now))

    @property
    def pto_count(self):
        return self.c.pto_count

    @pto_count.setter
    def pto_count(self, uint32_t value):
        self.c.pto_count = value

    @property
    def patience(self):
        return self.c.patience / 1e6

    @patience.setter
    def patience(self, double value):
        self.c.patience = us(value)

    # events

    def take(self, double now):
        """Everything since the last call, or None."""
        cdef uint32_t events = self.c.events
        cdef mt.mt_opened *o
        cdef mt.mt_path *p
        cdef Opened opened
        cdef Report r
        cdef uint32_t i
        if not events:
            return None
        self.c.events = 0
        r = Report.__new__(Report)
        if events & mt.MT_EVENT_OPENED:
            r.opened = []
            while self.c.opened != NULL:
                o = self.c.opened
                opened = Opened.__new__(Opened)
                opened.number = o.number
                if self.c.paths[o.path].generation == o.generation:
                    opened.path = self.path_of(&self.c.paths[o.path])
                opened.cid = (<char *>o.cid)[:mt.MT_CID]
                opened.duplicate = o.flags & mt.MT_OPENED_DUPLICATE
                opened.moving = o.flags & mt.MT_OPENED_MOVING
                opened.frames = o.flags & mt.MT_OPENED_FRAMES
                opened.plain = (<char *>o.plain)[:o.length]
                r.opened.append(opened)
                self.c.opened = o.next
                free(o)
            self.c.opened_tail = &self.c.opened
            self.c.opened_count = 0
        if events & mt.MT_EVENT_SETTLED:
            r.acked = [self.c.acked.items[i] for i in range(self.c.acked.count)]
            r.lost = [self.c.lost.items[i] for i in range(self.c.lost.count)]
            self.c.acked.count = self.c.lost.count = 0
        if events & mt.MT_EVENT_SAMPLE:
            r.samples = []
            for i in range(<uint32_t>mt.MT_PATHS):
                p = &self.c.paths[i]
                if not p.used or not p.sample.pending:
                    continue
                r.samples.append((
                    self.wrappers[i],
                    p.sample.acked,
                    p.sample.lost,
                    p.in_flight,
                    p.sample.rtt / 1e6,
                    p.sample.rate * 1e6,
                    bool(p.sample.app_limited),
                    p.delivered,
                    p.sample.prior_delivered,
                    bool(p.sample.spurious),
                ))
                memset(&p.sample, 0, sizeof(p.sample))
                p.sampled_at = us(now)
        r.keys = events & mt.MT_EVENT_KEYS
        r.pto = events & mt.MT_EVENT_PTO
        r.wake = events & mt.MT_EVENT_WAKE
        if events & mt.MT_EVENT_ERROR:
            r.error = (self.c.error.code, self.c.error.frame, self.c.error.reason.decode())
        if events & mt.MT_EVENT_REFUSED:
            r.refused = []
            for i in range(<uint32_t>mt.MT_PATHS):
                p = &self.c.paths[i]
                if p.used and p.refused:
                    r.refused.append((self.wrappers[i], p.refused))
                p.refused = 0
        return r

    @property
    def counters(self):
        cdef mt.mt_conn_counters n = self.c.counters
        return {
            "datagrams_sent": n.sent,
            "datagrams_received": n.received,
            "duplicates": n.duplicates,
            "not_authentic": n.failed,
            "lost_packets": n.lost,
            "spurious_losses": n.spurious,
            "probe_timeouts": n.ptos,
            "copies_sent": n.copies_sent,
            "redundant_packets": n.redundant_packets,
            "redundant_bytes": n.redundant_bytes,
            "replayed": n.replayed,
            "replay_needless": n.replay_needless,
            "replay_given_up": n.replay_given_up,
            "acks_sent": n.acks_sent,
            "acks_received": n.acks_received,
            "window_blocked": n.window_blocked,
            "pacing_blocked": n.pacing_blocked,
        }


cdef int fill(mt.mt_secret *secret, bytes key, bytes iv) except -1:
    if len(iv) != 12:
        raise ValueError("an IV has 12 bytes")
    fill_key(secret.key, key)
    memcpy(secret.iv, <const char *>iv, 12)
    return 0


cdef int fill_key(uint8_t *target, bytes key) except -1:
    if len(key) not in (16, 32):
        raise ValueError("a key has 16 or 32 bytes")
    memset(target, 0, 32)
    memcpy(target, <const char *>key, len(key))
    return 0


@cython.no_gc_clear
cdef class Io:
    cdef mt.mt_io *io
    cdef readonly Engine engine

    def __cinit__(self, Engine engine, int tun, bint tcp, bint udp):
        self.engine = engine
        self.io = mt.mt_io_new(engine.e, tun, tcp, udp)
        if self.io == NULL:
            raise OSError("no descriptors left for the native engine")

    def __dealloc__(self):
        self.close()

    def close(self):
        if self.io != NULL:
            mt.mt_io_free(self.io)
            self.io = NULL
            self.engine.e.write = deliver
            self.engine.e.write_context = <void *>self.engine

    cdef mt.mt_io *live(self) except NULL:
        if self.io == NULL:
            raise ValueError("this Io is closed")
        return self.io

    def fileno(self):
        return mt.mt_io_fd(self.live())

    def add_socket(self, int fd):
        cdef int number = mt.mt_io_add_socket(self.live(), fd)
        if number < 0:
            raise OSError("no descriptors left for the native engine")
        return number

    def remove_socket(self, int number):
        mt.mt_io_remove_socket(self.live(), number)

    def step(self):
        cdef bint wanted
        cdef mt.mt_io *io = self.live()
        with nogil:
            wanted = mt.mt_io_step(io)
        return bool(wanted)

    def transmit(self):
        cdef mt.mt_io *io = self.live()
        with nogil:
            mt.mt_io_transmit(io)

    def eventful(self):
        """The connections that have events."""
        cdef list found = []
        cdef mt.mt_conn *conn = self.engine.e.conns
        while conn != NULL:
            if conn.events:
                found.append(<Connection>conn.owner)
            conn = conn.next
        return found

    def take_raw(self):
        """Datagrams that are not the engine's business: socket, sockaddr, data."""
        cdef list out = []
        cdef mt.mt_raw *raw = mt.mt_io_take_raw(self.live())
        while raw != NULL:
            out.append((raw.socket, (<char *>&raw.source)[:sizeof(raw.source)],
                        (<char *>raw.data)[:raw.length]))
            free(raw)
            raw = mt.mt_io_take_raw(self.live())
        return out

    @property
    def tun_error(self):
        return mt.mt_io_tun_error(self.live())

    @property
    def counters(self):
        cdef const mt.mt_io_counters *n = mt.mt_io_get_counters(self.live())
        return {
            "tun_reads": n.tun_reads,
            "tun_writes": n.tun_writes,
            "tun_dropped": n.tun_dropped,
            "udp_reads": n.udp_reads,
            "udp_writes": n.udp_writes,
            "udp_write_messages": n.udp_write_messages,
            "udp_dropped": n.udp_dropped,
            "udp_refused": n.udp_refused,
            "udp_raw_dropped": n.raw_dropped,
            "udp_segments_refused": n.segments_refused,
        }
