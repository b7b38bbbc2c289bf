#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* recvmmsg, sendmmsg */
#endif
#include "io.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT /* <linux/udp.h>; the C library's header is older */
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef SOL_UDP
#define SOL_UDP 17
#endif

/* One step ends after this many rounds, so that Python's turn comes every few milliseconds. In each
 * round every descriptor that is ready gets about as many bytes as the others, few enough to stay
 * in the processor's cache from the one system call to the next. */
#define ROUNDS 8
#define EVENTS 16
#define TUN_BYTES (192 * 1024)
#define TUN_READS 64
#define RECEIVE_BYTES (256 * 1024)
#define RECEIVE_CALLS 4
#define SEAL_BYTES (1024 * 1024)

/* Any message may be as long as UDP allows once GRO has put it together. Few at a time fill the
 * cache when it did; many at a time are worth it when the network gave them one by one. The odd
 * distance keeps the beginnings of all of them out of the same cache sets. */
#define SLOTS 64
#define SLOT 65536
#define SLOT_DISTANCE (SLOT + 1536)
#define SLOTS_OF_GRO 4
#define PLAIN 4096 /* bytes: a longer message came through GRO, or may as well have */

#define VECTOR 64           /* messages a sendmmsg() */
#define MAX_SEGMENTS 64     /* UDP_MAX_SEGMENTS before Linux 6.9 */
#define MAX_MESSAGE 65507   /* bytes of UDP payload that fit one IPv4 packet */
#define FULL_WAIT 1         /* milliseconds for a full socket to make room, once each outbox */
#define RAW_BYTES (MT_RAW_MAX * 2048) /* of raw datagrams waiting: strangers may send large ones */
#define OVERDUE MT_MILLISECOND /* between two looks at a deadline that stays passed */

#define SHORT_HEADER 0x40 /* the two upper bits of a 1-RTT packet (RFC 9000 section 17.3.1) */
#define SHORT_HEADER_MASK 0xc0
/* First byte, connection ID, then what header protection needs (RFC 9001 section 5.4.2). */
#define SHORTEST (1 + MT_CID + 4 + MT_SAMPLE)

/* What an epoll event is about: one of these, or a socket's number above them. */
enum source { SOURCE_TIMER, SOURCE_TUN, SOURCE_SOCKETS };

struct udp_socket {
    int fd;              /* -1: a free number */
    bool segments;       /* it takes UDP_SEGMENT */
    uint32_t slots;      /* messages to receive at a time */
};

union control {
    struct cmsghdr align;
    uint8_t bytes[CMSG_SPACE(sizeof(int)) + 64]; /* some room for what others may have asked for */
};

/* The datagrams of one entry of a vector: all of `segment` bytes but the last. */
struct run {
    struct mt_conn *conn;
    struct mt_path *path;
    uint32_t segment, count;
};

/* What one sendmmsg() takes, all for one socket. */
struct vector {
    uint32_t count;
    struct mmsghdr headers[VECTOR];
    struct iovec parts[VECTOR];
    union control controls[VECTOR];
    struct run runs[VECTOR];
};

struct mt_io {
    struct mt_engine *engine;
    int epoll, timer, tun;
    int tun_error;
    mt_time armed; /* when the timer fires; MT_NEVER: it does not */
    bool unsent;   /* something could leave at once, but others had to have their turn */
    bool waited;   /* for a full socket, in this outbox */
    struct mt_lane *lane; /* the one that got the latest packet from the TUN; perhaps gone */

    struct udp_socket *sockets;
    uint32_t socket_count;

    struct mt_raw *raw, **raw_tail;
    uint32_t raw_count;
    size_t raw_bytes;

    struct vector out, singles;

    uint8_t *slots;
    struct mmsghdr headers[SLOTS];
    struct iovec parts[SLOTS];
    union control controls[SLOTS];
    struct sockaddr_storage from[SLOTS];

    /* Consecutive datagrams of one connection, in the slots. */
    struct mt_conn *conn;
    uint32_t batch;
    struct mt_path *paths[MT_KEYS_BATCH];
    uint8_t *packets[MT_KEYS_BATCH];
    uint32_t lengths[MT_KEYS_BATCH];

    struct mt_io_counters counters;
    uint8_t scratch[MT_VNET_SIZE + MT_MAX_IP]; /* for packets that no queue has room for */
};

_Static_assert(sizeof(struct mt_vnet) == MT_VNET_SIZE, "what writev() takes is the header itself");

mt_time mt_io_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (mt_time)t.tv_sec * MT_SECOND + t.tv_nsec / 1000;
}

/* ---- the TUN ---- */

static void write_packet(void *context, const struct mt_vnet *vnet, struct iovec *parts, int count,
                         uint32_t length)
{
    struct mt_io *io = context;
    (void)length;
    parts[-1].iov_base = (void *)vnet;
    parts[-1].iov_len = MT_VNET_SIZE;
    io->counters.tun_writes++;
    /* A device that is full, down, or will not have this packet: to IP it is one lost packet. */
    if (writev(io->tun, parts - 1, count + 1) < 0)
        io->counters.tun_dropped++;
}

static void fail_tun(struct mt_io *io, int code)
{
    io->tun_error = code;
    epoll_ctl(io->epoll, EPOLL_CTL_DEL, io->tun, NULL);
}

/* Reads into a queue's own memory: most packets belong to the lane that got the one before. */
static void read_tun(struct mt_io *io, mt_time now)
{
    struct mt_engine *e = io->engine;
    struct mt_lane *lane = e->lanes;
    for (struct mt_lane *l = lane; l; l = l->next)
        if (l == io->lane)
            lane = l;
    uint32_t bytes = 0;
    for (int i = 0; i < TUN_READS && bytes < TUN_BYTES; i++) {
        uint8_t *reserved = lane ? mt_queue_reserve(lane->queue) : NULL;
        uint8_t *buffer = reserved ? reserved : io->scratch;
        ssize_t n = read(io->tun, buffer, sizeof io->scratch);
        if (n < 0 && errno == EAGAIN)
            break;
        io->counters.tun_reads++;
        if (n < 0) {
            /* These concern one packet, or this moment; any other comes again for ever, whether the
             * kernel says EBADFD, EIO or EFAULT to a device that is being deleted. */
            if (errno == EINTR || errno == EINVAL || errno == ENOMEM || errno == ENOBUFS)
                continue;
            fail_tun(io, errno);
            break;
        }
        if (n == 0) { /* no TUN does this; what stands for one may end */
            fail_tun(io, EIO);
            break;
        }
        if (n <= MT_VNET_SIZE)
            continue;
        bytes += (uint32_t)n;
        const uint8_t *packet = buffer + MT_VNET_SIZE;
        uint32_t length = (uint32_t)n - MT_VNET_SIZE;
        int owner = lane && e->routes ? mt_routes_destination(e->routes, packet, length) : -1;
        if (owner < 0) {
            e->unroutable++;
            continue;
        }
        if (reserved && owner == lane->owner) {
            mt_queue_commit(lane->queue, (uint32_t)n, now);
            continue;
        }
        struct mt_lane *right = mt_engine_lane(e, owner);
        if (!right) {
            e->unroutable++;
            continue;
        }
        struct mt_vnet vnet;
        memcpy(&vnet, buffer, sizeof vnet);
        mt_queue_push(right->queue, &vnet, packet, length, now);
        if (reserved)
            mt_queue_commit(lane->queue, 0, now);
        lane = right;
    }
    io->lane = lane;
}

/* ---- sending ---- */

static void add_run(struct vector *v, const struct run *r, uint8_t *data, uint32_t length)
{
    uint32_t i = v->count++;
    struct msghdr *h = &v->headers[i].msg_hdr;
    v->runs[i] = *r;
    v->parts[i].iov_base = data;
    v->parts[i].iov_len = length;
    h->msg_name = &r->path->to;
    h->msg_namelen = r->path->to_length;
    h->msg_control = NULL;
    h->msg_controllen = 0;
    if (r->count > 1) {
        uint16_t segment = (uint16_t)r->segment;
        struct cmsghdr *c = &v->controls[i].align;
        c->cmsg_level = SOL_UDP;
        c->cmsg_type = UDP_SEGMENT;
        c->cmsg_len = CMSG_LEN(sizeof segment);
        memcpy(CMSG_DATA(c), &segment, sizeof segment);
        h->msg_control = c;
        h->msg_controllen = CMSG_SPACE(sizeof segment);
    }
}

static void refuse(struct mt_io *io, const struct run *r, int code)
{
    io->counters.udp_refused += r->count;
    mt_conn_refused(r->conn, r->path, code);
}

/* Whether it is worth another try: a full socket is waited for once each outbox. A queue that stays
 * full is congestion, and recovery sees to what it lost. */
static bool wait_for_room(struct mt_io *io, int fd)
{
    if (io->waited)
        return false;
    io->waited = true;
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    return poll(&p, 1, FULL_WAIT) > 0;
}

static void send_vector(struct mt_io *io, struct udp_socket *s, struct vector *v);

/* The segments of entry `i` as messages of their own. */
static void send_singles(struct mt_io *io, struct udp_socket *s, const struct vector *v, uint32_t i)
{
    struct run r = v->runs[i];
    uint8_t *data = v->parts[i].iov_base;
    uint32_t left = (uint32_t)v->parts[i].iov_len;
    io->counters.segments_refused++;
    r.count = 1;
    while (left) {
        uint32_t size = left < r.segment ? left : r.segment;
        if (io->singles.count == VECTOR)
            send_vector(io, s, &io->singles);
        add_run(&io->singles, &r, data, size);
        data += size;
        left -= size;
    }
    send_vector(io, s, &io->singles);
}

/* Sends and empties it. When an entry fails sendmmsg() tells how many went before, and the reason
 * only to the next call, which begins with that entry. */
static void send_vector(struct mt_io *io, struct udp_socket *s, struct vector *v)
{
    uint32_t done = 0, retried = UINT32_MAX;
    while (done < v->count) {
        int n = sendmmsg(s->fd, v->headers + done, v->count - done, MSG_DONTWAIT);
        io->counters.udp_writes++;
        if (n > 0) {
            io->counters.udp_write_messages += (uint32_t)n;
            done += (uint32_t)n;
            continue;
        }
        int code = n < 0 ? errno : EIO;
        const struct run *r = &v->runs[done];
        if (code == EINTR)
            continue;
        if (code == EAGAIN || code == ENOBUFS) {
            if (wait_for_room(io, s->fd))
                continue;
            for (; done < v->count; done++)
                io->counters.udp_dropped += v->runs[done].count;
            break;
        }
        /* ICMP's answer to an earlier datagram: reported once, and this one has not been tried. */
        if (code == ECONNREFUSED && retried != done) {
            retried = done;
            continue;
        }
        /* EIO: the device cannot checksum segments. The others: longer than the MTU the kernel
         * knows of; one by one those that fit will go, and the rest says which path it was. */
        if (r->count > 1 && (code == EIO || code == EINVAL || code == EMSGSIZE)) {
            if (code == EIO)
                s->segments = false;
            send_singles(io, s, v, done);
        } else {
            refuse(io, r, code);
        }
        done++;
    }
    v->count = 0;
}

static void send_message(struct mt_io *io, struct udp_socket *s, const struct mt_message *m)
{
    struct run r = {.conn = m->conn, .path = m->path, .segment = m->segment};
    uint32_t most = s->segments ? MAX_MESSAGE / m->segment : 1;
    if (most > MAX_SEGMENTS)
        most = MAX_SEGMENTS;
    if (most == 0)
        most = 1;
    uint8_t *data = io->engine->out + m->offset;
    uint32_t left = m->length;
    while (left) {
        r.count = most;
        uint32_t size = most * m->segment;
        if (left < size) {
            size = left;
            r.count = (left + m->segment - 1) / m->segment;
        }
        if (io->out.count == VECTOR)
            send_vector(io, s, &io->out);
        add_run(&io->out, &r, data, size);
        data += size;
        left -= size;
    }
}

static struct udp_socket *find_socket(const struct mt_io *io, int number)
{
    if (number < 0 || (uint32_t)number >= io->socket_count || io->sockets[number].fd < 0)
        return NULL;
    return &io->sockets[number];
}

/* Socket by socket, since a call serves one; on each path the order stays. */
static void send_outbox(struct mt_io *io)
{
    struct mt_engine *e = io->engine;
    uint16_t waiting[MT_OUTBOX_PACKETS];
    uint32_t count = e->message_count;
    if (count == 0)
        return;
    io->waited = false;
    for (uint32_t i = 0; i < count; i++)
        waiting[i] = (uint16_t)i;
    while (count) {
        int number = e->messages[waiting[0]].path->socket;
        struct udp_socket *s = find_socket(io, number);
        uint32_t others = 0;
        for (uint32_t i = 0; i < count; i++) {
            const struct mt_message *m = &e->messages[waiting[i]];
            if (m->path->socket != number) {
                waiting[others++] = waiting[i];
            } else if (!s) {
                struct run r = {.conn = m->conn, .path = m->path, .count = m->count};
                refuse(io, &r, EADDRNOTAVAIL);
            } else if (m->segment) {
                send_message(io, s, m);
            }
        }
        if (s)
            send_vector(io, s, &io->out);
        count = others;
    }
    mt_engine_sent(e);
}

/* Before something else goes into the outbox that has no other chance to leave. */
static void make_room(struct mt_io *io)
{
    const struct mt_engine *e = io->engine;
    if (e->out_length > MT_OUTBOX / 2 || e->packet_count > MT_OUTBOX_PACKETS / 2)
        send_outbox(io);
}

/* Seals and sends what may leave; what is in the outbox already, ACKs, goes along. */
static void transmit(struct mt_io *io)
{
    struct mt_engine *e = io->engine;
    io->unsent = false;
    for (struct mt_lane *lane = e->lanes; lane; lane = lane->next) {
        struct mt_conn *conn = lane->conn;
        if (!conn || !conn->running)
            continue;
        uint32_t bytes = 0;
        /* The clock anew each time: sealing a full outbox takes as long as some paths' RTT. */
        while (mt_conn_pending(conn) && mt_conn_seal(conn, mt_io_now())) {
            bytes += e->out_length;
            send_outbox(io);
            if (bytes >= SEAL_BYTES) {
                io->unsent = true;
                break;
            }
        }
    }
    send_outbox(io);
}

/* ---- receiving ---- */

static void keep_raw(struct mt_io *io, int socket, uint32_t slot, const uint8_t *data,
                     uint32_t length)
{
    struct mt_raw *raw = NULL;
    if (io->raw_count < MT_RAW_MAX && io->raw_bytes + length <= RAW_BYTES)
        raw = malloc(sizeof *raw + length);
    if (!raw) {
        io->counters.raw_dropped++;
        return;
    }
    raw->next = NULL;
    raw->socket = socket;
    raw->from = io->from[slot];
    raw->length = length;
    memcpy(raw->data, data, length);
    *io->raw_tail = raw;
    io->raw_tail = &raw->next;
    io->raw_count++;
    io->raw_bytes += length;
}

static bool same_address(const struct sockaddr_storage *a, const struct sockaddr_storage *b)
{
    if (a->ss_family != b->ss_family)
        return false;
    if (a->ss_family == AF_INET) {
        const struct sockaddr_in *x = (const void *)a, *y = (const void *)b;
        return x->sin_port == y->sin_port && x->sin_addr.s_addr == y->sin_addr.s_addr;
    }
    if (a->ss_family == AF_INET6) {
        const struct sockaddr_in6 *x = (const void *)a, *y = (const void *)b;
        /* Only link-local addresses have a scope (RFC 4007 section 6); elsewhere the kernel
         * reports 0, whatever the sender was given. */
        return x->sin6_port == y->sin6_port &&
               !memcmp(&x->sin6_addr, &y->sin6_addr, sizeof x->sin6_addr) &&
               (x->sin6_scope_id == y->sin6_scope_id || !IN6_IS_ADDR_LINKLOCAL(&x->sin6_addr));
    }
    return false;
}

static bool comes_from(const struct mt_path *p, int socket, const struct sockaddr_storage *from)
{
    return p && p->used && p->socket == socket && same_address(&p->to, from);
}

static struct mt_path *find_path(struct mt_conn *c, int socket, const struct sockaddr_storage *from)
{
    if (comes_from(c->peer_path, socket, from))
        return c->peer_path;
    if (comes_from(c->active, socket, from))
        return c->active;
    for (int i = 0; i < MT_PATHS; i++)
        if (comes_from(&c->paths[i], socket, from))
            return &c->paths[i];
    return NULL;
}

static void deliver(struct mt_io *io, mt_time now)
{
    if (io->batch && io->conn->running) {
        mt_conn_receive_batch(io->conn, io->paths, io->packets, io->lengths, io->batch, now);
        mt_conn_received(io->conn, now);
        make_room(io);
    }
    io->batch = 0;
}

/* Bytes of each datagram in a message that GRO put together; 0: it is one datagram. */
static uint32_t segment_size(struct msghdr *h)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
        int size;
        if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO &&
            c->cmsg_len >= CMSG_LEN(sizeof size)) {
            memcpy(&size, CMSG_DATA(c), sizeof size);
            return size > 0 ? (uint32_t)size : 0;
        }
    }
    return 0;
}

/* One message: its datagrams have one source, and nearly always one connection ID. */
static void take_message(struct mt_io *io, int socket, uint32_t slot, mt_time now)
{
    uint8_t *data = io->parts[slot].iov_base;
    uint32_t left = io->headers[slot].msg_len;
    uint32_t segment = segment_size(&io->headers[slot].msg_hdr);
    if (segment == 0 || segment > left)
        segment = left;
    struct mt_conn *conn = NULL;
    struct mt_path *path = NULL;
    const uint8_t *cid = NULL; /* the one they were looked up for */
    while (left) {
        uint32_t length = left < segment ? left : segment;
        uint8_t *packet = data;
        data += length;
        left -= length;
        bool ours = length >= SHORTEST && (packet[0] & SHORT_HEADER_MASK) == SHORT_HEADER;
        if (ours && (!cid || memcmp(cid, packet + 1, MT_CID))) {
            cid = packet + 1;
            conn = mt_engine_find(io->engine, cid);
            path = conn ? find_path(conn, socket, &io->from[slot]) : NULL;
        }
        if (!ours || !path) {
            keep_raw(io, socket, slot, packet, length);
            continue;
        }
        if (io->batch == MT_KEYS_BATCH || (io->batch && io->conn != conn))
            deliver(io, now);
        io->conn = conn;
        io->paths[io->batch] = path;
        io->packets[io->batch] = packet;
        io->lengths[io->batch++] = length;
    }
}

/* One system call's worth; returns whether more may wait. */
static bool receive_messages(struct mt_io *io, int number, uint32_t *bytes)
{
    struct udp_socket *s = &io->sockets[number];
    int n = recvmmsg(s->fd, io->headers, s->slots, MSG_DONTWAIT, NULL);
    io->counters.udp_reads++;
    if (n <= 0) /* ICMP's answer to a datagram of ours comes as an error, once */
        return n < 0 && errno != EAGAIN;
    io->counters.udp_read_messages += (uint32_t)n;
    mt_time now = mt_io_now();
    bool full = (uint32_t)n == s->slots;
    s->slots = SLOTS;
    for (int i = 0; i < n; i++) {
        struct msghdr *h = &io->headers[i].msg_hdr;
        if (io->headers[i].msg_len > PLAIN)
            s->slots = SLOTS_OF_GRO;
        *bytes += io->headers[i].msg_len;
        take_message(io, number, (uint32_t)i, now);
        h->msg_namelen = sizeof io->from[i];
        h->msg_controllen = sizeof io->controls[i];
    }
    deliver(io, now);
    mt_engine_flush(io->engine); /* the slots are used again */
    return full;
}

static void receive(struct mt_io *io, int number)
{
    uint32_t bytes = 0;
    int calls = 1; /* at least, or strangers at one socket would silence the next */
    /* A raw datagram may be the first from a new path: what follows it should find that known. */
    while (receive_messages(io, number, &bytes) && calls++ < RECEIVE_CALLS &&
           bytes < RECEIVE_BYTES && !io->raw)
        continue;
}

/* ---- time ---- */

static void run_timers(struct mt_io *io, mt_time now)
{
    for (struct mt_conn *c = io->engine->conns; c; c = c->next)
        if (c->running && mt_conn_timer(c) <= now) {
            mt_conn_on_timer(c, now);
            make_room(io);
        }
}

/* An idle wake-up costs less than a system call for every packet that moves a deadline: so the
 * timer is set only to fire earlier. The timers up to `ran` have run: what is due still waits for
 * something else, and must not make a busy loop. */
static void arm(struct mt_io *io, mt_time ran)
{
    mt_time at = MT_NEVER;
    for (struct mt_conn *c = io->engine->conns; c; c = c->next) {
        mt_time t = c->running ? mt_conn_timer(c) : MT_NEVER;
        if (t < at)
            at = t;
    }
    if (at <= ran)
        at = ran + OVERDUE;
    if (io->unsent || at < 1) /* 0 would disarm it; the past is at once */
        at = 1;
    if (at >= io->armed)
        return;
    struct itimerspec t = {.it_value = {.tv_sec = at / MT_SECOND,
                                        .tv_nsec = at % MT_SECOND * 1000}};
    if (timerfd_settime(io->timer, TFD_TIMER_ABSTIME, &t, NULL) == 0)
        io->armed = at;
}

static bool needs_owner(const struct mt_io *io)
{
    if (io->raw || io->tun_error)
        return true;
    for (const struct mt_conn *c = io->engine->conns; c; c = c->next)
        if (c->events)
            return true;
    return false;
}

/* What has come goes first: it may answer what a timer waits for, and open the window. */
bool mt_io_step(struct mt_io *io)
{
    bool attention = false;
    mt_time now = 0;
    io->counters.steps++;
    for (int round = 0; round < ROUNDS && !attention; round++) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(io->epoll, events, EVENTS, 0);
        if (n <= 0 && !io->unsent)
            break;
        bool tun = false;
        for (int i = 0; i < n; i++) {
            uint32_t source = events[i].data.u32;
            if (source == SOURCE_TIMER) {
                uint64_t expirations;
                if (read(io->timer, &expirations, sizeof expirations) > 0)
                    io->armed = MT_NEVER;
            } else if (source == SOURCE_TUN) {
                tun = true;
            } else {
                receive(io, (int)(source - SOURCE_SOCKETS));
            }
        }
        now = mt_io_now();
        run_timers(io, now);
        if (tun)
            read_tun(io, now);
        transmit(io);
        attention = needs_owner(io);
    }
    arm(io, now);
    return attention || needs_owner(io);
}

void mt_io_transmit(struct mt_io *io)
{
    transmit(io);
    arm(io, 0);
}

/* ---- the rest ---- */

static bool watch(struct mt_io *io, int fd, uint32_t source)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = source};
    return epoll_ctl(io->epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void prepare(struct vector *v)
{
    for (int i = 0; i < VECTOR; i++) {
        v->headers[i].msg_hdr.msg_iov = &v->parts[i];
        v->headers[i].msg_hdr.msg_iovlen = 1;
    }
}

struct mt_io *mt_io_new(struct mt_engine *e, int tun, bool tcp, bool udp)
{
    struct mt_io *io = calloc(1, sizeof *io);
    if (!io)
        return NULL;
    io->engine = e;
    io->tun = tun;
    io->armed = MT_NEVER;
    io->raw_tail = &io->raw;
    io->epoll = epoll_create1(EPOLL_CLOEXEC);
    io->timer = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK | TFD_CLOEXEC);
    io->slots = malloc((size_t)SLOTS * SLOT_DISTANCE); /* what is never received takes no memory */
    if (io->epoll < 0 || io->timer < 0 || !io->slots || !watch(io, io->timer, SOURCE_TIMER) ||
        !watch(io, tun, SOURCE_TUN)) {
        int code = errno;
        mt_io_free(io);
        errno = code;
        return NULL;
    }
    prepare(&io->out);
    prepare(&io->singles);
    for (int i = 0; i < SLOTS; i++) {
        io->parts[i].iov_base = io->slots + (size_t)i * SLOT_DISTANCE;
        io->parts[i].iov_len = SLOT;
        io->headers[i].msg_hdr = (struct msghdr){
            .msg_name = &io->from[i],
            .msg_namelen = sizeof io->from[i],
            .msg_iov = &io->parts[i],
            .msg_iovlen = 1,
            .msg_control = &io->controls[i],
            .msg_controllen = sizeof io->controls[i],
        };
    }
    mt_coalescer_allow(e->coalescer, tcp, udp);
    e->write = write_packet;
    e->write_context = io;
    return io;
}

void mt_io_free(struct mt_io *io)
{
    if (!io)
        return;
    for (struct mt_raw *raw; (raw = mt_io_take_raw(io));)
        free(raw);
    if (io->epoll >= 0)
        close(io->epoll);
    if (io->timer >= 0)
        close(io->timer);
    free(io->sockets);
    free(io->slots);
    free(io);
}

int mt_io_fd(const struct mt_io *io) { return io->epoll; }

int mt_io_add_socket(struct mt_io *io, int fd)
{
    uint32_t number = 0;
    while (number < io->socket_count && io->sockets[number].fd >= 0)
        number++;
    if (number == io->socket_count) {
        uint32_t count = number ? 2 * number : 8;
        struct udp_socket *grown = realloc(io->sockets, count * sizeof *grown);
        if (!grown)
            return -1;
        for (uint32_t i = number; i < count; i++)
            grown[i].fd = -1;
        io->sockets = grown;
        io->socket_count = count;
    }
    if (!watch(io, fd, SOURCE_SOCKETS + number))
        return -1;
    io->sockets[number] = (struct udp_socket){.fd = fd, .segments = true, .slots = SLOTS_OF_GRO};
    return (int)number;
}

void mt_io_remove_socket(struct mt_io *io, int socket)
{
    struct udp_socket *s = find_socket(io, socket);
    if (!s)
        return;
    epoll_ctl(io->epoll, EPOLL_CTL_DEL, s->fd, NULL);
    s->fd = -1;
}

struct mt_raw *mt_io_take_raw(struct mt_io *io)
{
    struct mt_raw *raw = io->raw;
    if (!raw)
        return NULL;
    io->raw = raw->next;
    if (!io->raw)
        io->raw_tail = &io->raw;
    io->raw_count--;
    io->raw_bytes -= raw->length;
    raw->next = NULL;
    return raw;
}

int mt_io_tun_error(const struct mt_io *io) { return io->tun_error; }

const struct mt_io_counters *mt_io_counters(const struct mt_io *io) { return &io->counters; }
