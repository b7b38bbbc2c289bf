/* An authenticated but hostile peer, an owner that does all an owner may do, and time: after each
 * step everything the engine counts is counted again, one packet at a time. */
#include "fuzz.h"

#define MAX_STEPS 400
#define MAX_NUMBERS 20000

static struct mt_engine *e;
static struct mt_conn *c;
static struct mt_lane *lane, *other;
static struct mt_keys *peer; /* the hostile end's */
static uint64_t peer_number, foreign;
static bool strict; /* no key updates yet: whatever we seal, the peer can open */
static mt_time now;
static uint8_t last[2048]; /* the last hostile datagram, to be replayed */
static uint32_t last_length;

static struct mt_path *some_path(struct input *in)
{
    struct mt_path *p = &c->paths[byte(in) % 6];
    return p->used ? p : c->active;
}

/* ---- what must hold always ---- */

/* What is to be replayed is counted, and found by the cursors. */
static void check_replays(void)
{
    uint32_t waiting[2] = {0};
    uint64_t first = c->number > c->ring_size ? c->number - c->ring_size : 0;
    for (uint64_t n = first; n < c->number; n++) {
        const struct mt_sent *s = &c->ring[n & (c->ring_size - 1)];
        int class = s->flags & MT_SENT_SPARSE ? 0 : 1;
        CHECK(s->path == NO_PATH || s->path < MT_PATHS);
        bool reachable = c->number - n < c->ring_size; /* the next packet takes its place */
        CHECK(!(s->flags & MT_SENT_KEPT) || s->copied == NO_PATH || !reachable ||
              c->paths[s->copied].used);
        CHECK(!(s->flags & MT_SENT_COPY) || s->stored < n);
        CHECK(!(s->flags & MT_SENT_KEPT) || s->stored < c->store.end);
        if (!(s->flags & MT_SENT_REPLAY))
            continue;
        CHECK((s->flags & (MT_SENT_KEPT | MT_SENT_DELIVERED)) == MT_SENT_KEPT);
        CHECK(n >= c->replay.from[class]);
        waiting[class]++;
    }
    CHECK(waiting[0] == c->replay.waiting[0] && waiting[1] == c->replay.waiting[1]);
    CHECK(c->replay.onto->used);
    CHECK(c->lane || (!c->store.bytes && !mt_conn_replays(c)));
    CHECK(c->store.begin <= c->store.end && c->store.end - c->store.begin <= c->store.size);
}

static void check(void)
{
    bool failed = c->events & MT_EVENT_ERROR;
    int64_t in_flight[MT_PATHS] = {0};
    uint32_t outstanding[MT_PATHS] = {0};
    CHECK(c->settled <= c->number);
    CHECK(c->number - c->settled < c->ring_size || !c->ring_size);
    for (uint64_t n = c->settled; n < c->number; n++) {
        const struct mt_sent *s = &c->ring[n & (c->ring_size - 1)];
        if (s->state != MT_OUTSTANDING)
            continue;
        CHECK(c->paths[s->path].used && n >= c->paths[s->path].scan);
        in_flight[s->path] += s->flags & MT_SENT_IN_FLIGHT ? s->size : 0;
        outstanding[s->path] += (s->flags & MT_SENT_ELICITING) != 0;
    }
    for (int i = 0; i < MT_PATHS; i++) {
        const struct mt_path *p = &c->paths[i];
        if (!p->used)
            continue;
        CHECK(p->in_flight == in_flight[i] && p->outstanding == outstanding[i]);
        /* Not the other way round: what left before the newest acknowledged is not waited for. */
        CHECK(p->outstanding || p->waiting_since == MT_NEVER || failed);
        CHECK(!p->has_rtt || (p->rtt_min >= 1 && p->rtt_min <= p->rtt_latest &&
                              p->rtt_smoothed > 0 && p->rtt_variance >= 0));
        CHECK(p->threshold >= 3 && p->threshold <= 128 + 64);
    }
    check_replays();
    CHECK(c->active->used && c->peer_path->used && (!c->copies || c->copies->used));
    uint32_t opened = 0;
    for (const struct mt_opened *o = c->opened; o; o = o->next)
        opened++;
    CHECK(opened == c->opened_count && opened <= MT_OPENED_MAX);
    CHECK(c->acked.count + c->lost.count <= foreign);
    CHECK(!c->lane || c->lane->conn == c);
    CHECK(!lane->conn || lane->conn->lane == lane);
    CHECK(!other->conn || other->conn->lane == other);
}

/* ---- the owner ---- */

static void take_events(void)
{
    if (c->events & MT_EVENT_SAMPLE)
        for (int i = 0; i < MT_PATHS; i++)
            if (c->paths[i].used && c->paths[i].sample.pending) {
                memset(&c->paths[i].sample, 0, sizeof c->paths[i].sample);
                c->paths[i].sampled_at = now;
            }
    while (c->opened) {
        struct mt_opened *o = c->opened;
        c->opened = o->next;
        uint8_t frames = 0;
        for (uint32_t i = 0; i < o->length; i++)
            frames |= o->plain[i];
        (void)frames;
        free(o);
    }
    c->opened_tail = &c->opened;
    c->opened_count = 0;
    for (uint32_t i = 1; i < c->acked.count; i++) /* nothing is reported twice */
        for (uint32_t k = 0; k < i && k < 200; k++)
            CHECK(c->acked.items[i] != c->acked.items[k]);
    c->acked.count = c->lost.count = 0;
    foreign = 0;
    for (uint64_t n = c->settled; n < c->number; n++) {
        const struct mt_sent *s = &c->ring[n & (c->ring_size - 1)];
        foreign += s->state == MT_OUTSTANDING && s->flags & MT_SENT_FOREIGN;
    }
    if (c->events & MT_EVENT_KEYS && !mt_keys_has_next(c->keys))
        set_next(c->keys, 0);
    c->events &= MT_EVENT_ERROR;
}

static void send_foreign(struct input *in, struct mt_path *p, int flags)
{
    uint8_t header[1 + MT_MAX_CID + 2], out[MT_MAX_DATAGRAM], payload[64];
    uint32_t cid = p->cid_length, size = 1 + byte(in) % sizeof payload;
    memset(header, 0x41, sizeof header);
    memset(payload, 1, sizeof payload);
    uint64_t n = c->number;
    if (!mt_conn_skip_to(c, n + 1))
        return;
    uint32_t length = mt_conn_seal_foreign(c, n, header, 1 + cid + 2, 2, payload, size, out);
    CHECK(length == 1 + cid + MT_NUMBER_SIZE + size + MT_TAG);
    CHECK(mt_conn_sent(c, p, n, length, flags, now));
    foreign++;
}

/* The outbox: in one piece, every packet within its path's size, and readable for the peer. */
static void send_outbox(void)
{
    uint32_t packets = 0;
    CHECK(e->out_length <= MT_OUTBOX && e->packet_count <= MT_OUTBOX_PACKETS);
    for (uint32_t i = 0; i < e->message_count; i++) {
        const struct mt_message *m = &e->messages[i];
        CHECK(m->conn == c && m->path->used && m->count && m->offset + m->length <= e->out_length);
        CHECK(m->length <= m->segment * m->count && m->length > m->segment * (m->count - 1));
        packets += m->count;
        for (uint32_t at = 0; at < m->length; at += m->segment) {
            uint32_t size = m->segment < m->length - at ? m->segment : m->length - at;
            CHECK(size <= m->path->mtu);
            uint8_t *packet = e->out + m->offset + at, mask[MT_SAMPLE];
            uint32_t number_at = 1u + m->path->cid_length;
            if (!strict)
                continue;
            mt_keys_masks(peer, false, packet + number_at + 4, mask, 1);
            packet[0] ^= mask[0] & 0x1f;
            uint64_t truncated = 0;
            CHECK((packet[0] & 3) + 1 == MT_NUMBER_SIZE);
            for (int k = 0; k < MT_NUMBER_SIZE; k++)
                truncated = truncated << 8 | (packet[number_at + k] ^= mask[1 + k]);
            CHECK(mt_keys_open(peer, truncated, packet, number_at + MT_NUMBER_SIZE,
                               size - number_at - MT_NUMBER_SIZE));
        }
    }
    CHECK(packets <= e->packet_count);
    mt_engine_sent(e);
}

static void push_packet(uint32_t length, int flow)
{
    static uint8_t packet[MT_MAX_IP];
    if (length < 28)
        length = 28;
    if (length > MT_MAX_IP)
        length = MT_MAX_IP;
    memset(packet, 0, 28);
    packet[0] = 0x45;
    mt_put16(packet + 2, length);
    packet[9] = 17;
    packet[21] = (uint8_t)flow;
    mt_queue_push(lane->queue, NULL, packet, length, now);
}

/* The owner's loop: time, then everything that may leave. */
static void turn(bool probe, struct input *in)
{
    mt_time due = mt_conn_timer(c);
    if (due != MT_NEVER && due > now)
        now = due < now + 10 * MT_SECOND ? due : now + 10 * MT_SECOND;
    send_outbox();
    /* A timer may leave another one due, such as the probe timeout behind a loss, but not more:
     * the owner would spin. */
    for (int rounds = 0; rounds == 0 || mt_conn_timer(c) <= now; rounds++) {
        if (c->number >= MAX_NUMBERS)
            break;
        CHECK(rounds < 3);
        mt_conn_on_timer(c, now);
        bool probes = probe && c->events & MT_EVENT_PTO;
        take_events();
        if (probes)
            send_foreign(in, c->active, MT_SENT_ELICITING | MT_SENT_IN_FLIGHT);
        for (int i = 0; i < 64 && c->number < MAX_NUMBERS && mt_conn_seal(c, now); i++)
            send_outbox();
        send_outbox();
        take_events();
    }
}

/* ---- the hostile peer ---- */

static uint32_t write_ack(struct input *in, uint8_t *out)
{
    uint8_t *at = out;
    *at++ = 2;
    uint64_t n = byte(in);
    at += mt_put_varint(at, c->number > n ? c->number - 1 - n : 0);
    at += mt_put_varint(at, byte(in));
    uint32_t ranges = byte(in) & 7;
    at += mt_put_varint(at, ranges);
    at += mt_put_varint(at, byte(in) & 0x1f);
    for (uint32_t i = 0; i < ranges; i++) {
        at += mt_put_varint(at, byte(in) & 7);
        at += mt_put_varint(at, byte(in) & 7);
    }
    return (uint32_t)(at - out);
}

static uint32_t write_datagram(struct input *in, uint8_t *out)
{
    static uint8_t packet[64];
    uint8_t *at = out;
    int kind = byte(in);
    *at++ = 0x30;
    if (kind & 1) { /* a copy */
        *at++ = 1;
        at += mt_put_varint(at, peer_number > 8 ? peer_number - byte(in) % 8 : byte(in));
    }
    memset(packet, 0, sizeof packet);
    packet[0] = 0x45;
    packet[3] = sizeof packet;
    packet[9] = 17;
    if (kind & 2) { /* a part */
        *at++ = 2;
        uint32_t offset = kind & 4 ? 32 : 0;
        at += mt_put_varint(at, byte(in));
        at += mt_put_varint(at, offset);
        *at++ = offset > 0;
        memcpy(at, packet + offset, 32);
        return (uint32_t)(at + 32 - out);
    }
    *at++ = 0;
    memcpy(at, packet, sizeof packet);
    return (uint32_t)(at + sizeof packet - out);
}

static void hostile_packet(struct input *in)
{
    int shape = byte(in);
    uint8_t plain[1600];
    uint32_t size = 0;
    if (shape & 1)
        size += write_ack(in, plain + size);
    if (shape & 2)
        plain[size++] = 1;
    if (shape & 4)
        size += write_datagram(in, plain + size);
    if (shape & 8 || !size) {
        uint32_t length;
        uint8_t *raw = take(in, shape & 16 ? word(in) % 1200 : byte(in) & 63, &length);
        memcpy(plain + size, raw, length);
        free(raw);
        size += length;
    }
    uint64_t n = peer_number++;
    int odd = shape & 0x40 ? byte(in) : 0;
    if (odd & 1)
        n = n > 20 ? n - byte(in) % 20 : n; /* late, or a number used before */
    if (odd & 2)
        peer_number += number(in, 3);
    if (odd & 4)
        n = number(in, 8) >> 2;
    int bytes = (odd & 8 ? byte(in) & 3 : 3) + 1;
    uint8_t packet[1700];
    uint32_t header = 1 + MT_CID + (uint32_t)bytes;
    packet[0] = (uint8_t)(0x40 | mt_keys_phase(peer) << 2 | (bytes - 1));
    if (odd & 16)
        packet[0] ^= byte(in) & 0xfc;
    memset(packet + 1, shape & 0x20 ? 7 : 1, MT_CID);
    for (int i = 0; i < bytes; i++)
        packet[1 + MT_CID + i] = (uint8_t)(n >> (8 * (bytes - 1 - i)));
    if (size + bytes < 4)
        for (; size + bytes < 4; size++)
            plain[size] = 0;
    memcpy(packet + header, plain, size);
    mt_keys_seal(peer, n, packet, header, size);
    uint8_t mask[MT_SAMPLE];
    mt_keys_masks(peer, true, packet + 1 + MT_CID + 4, mask, 1);
    packet[0] ^= mask[0] & 0x1f;
    for (int i = 0; i < bytes; i++)
        packet[1 + MT_CID + i] ^= mask[1 + i];
    last_length = header + size + MT_TAG;
    memcpy(last, packet, last_length);
    uint8_t *exact = malloc(last_length);
    memcpy(exact, packet, last_length);
    mt_conn_receive(c, some_path(in), exact, last_length, now);
    mt_engine_flush(e);
    free(exact);
    mt_conn_received(c, now);
}

static void repeat(struct input *in)
{
    if (!last_length)
        return;
    uint8_t *exact = malloc(last_length);
    memcpy(exact, last, last_length);
    mt_conn_receive(c, some_path(in), exact, last_length, now);
    mt_engine_flush(e);
    free(exact);
}

/* ---- one life ---- */

static void step(struct input *in)
{
    int op = byte(in);
    struct mt_path *p;
    switch (op % 25) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4:
        hostile_packet(in);
        break;
    case 5:
        repeat(in);
        break;
    case 6:
    case 7:
        for (int i = byte(in) & 15; i >= 0; i--)
            push_packet(op & 0x80 ? 100 : op & 0x40 ? word(in) : 1100, op >> 5);
        break;
    case 8:
    case 9:
        mt_conn_seal(c, now);
        break;
    case 10:
    case 11:
        turn(op & 0x80, in);
        break;
    case 12:
        now += op & 0x80 ? word(in) : (mt_time)word(in) * 100;
        break;
    case 13:
        p = mt_conn_add_path(c, 1200 + (op & 0x80 ? word(in) % 301 : 0), 1e5);
        if (p) {
            p->limited = byte(in) & 1;
            p->has_cid = true;
            p->cid_length = (uint8_t)(op & 0x40 ? 1 + byte(in) % MT_MAX_CID : MT_CID);
            memset(p->cid, p->index, sizeof p->cid);
        }
        break;
    case 14:
        mt_conn_remove_path(c, some_path(in));
        break;
    case 15:
        p = some_path(in);
        if (p->has_cid)
            mt_conn_activate(c, p);
        break;
    case 16:
        p = some_path(in);
        if (op & 0x80)
            mt_conn_forgive(c, p);
        else
            mt_conn_abandon(c, p);
        break;
    case 17:
        if (op & 0x80)
            mt_conn_detach(c);
        else
            mt_conn_attach(c, op & 0x40 ? other : lane);
        break;
    case 18:
        if (op & 0x80)
            mt_lane_hold(lane);
        else
            mt_lane_recover(lane, now);
        break;
    case 19:
        strict = false;
        if (op & 0x80) {
            c->wants_update = true;
        } else {
            mt_keys_forget_previous(peer);
            if (!mt_keys_has_next(peer))
                set_next(peer, 1);
            mt_keys_update(peer);
            set_next(peer, 1);
        }
        break;
    case 20:
        send_foreign(in, some_path(in), byte(in) & 3 ? MT_SENT_ELICITING | MT_SENT_IN_FLIGHT
                                                     : byte(in) & MT_SENT_ELICITING);
        break;
    case 21:
        p = some_path(in);
        p->window = (int64_t)word(in) * (op & 0x80 ? 100 : 1);
        p->pacing = byte(in) / 16.0;
        if (op & 0x40)
            c->copies = some_path(in), c->copies_all = byte(in) & 1;
        if (op & 0x20)
            p->has_expected = true, memset(p->expected, 1, MT_CID);
        if (byte(in) == 1)
            c->peer_path = p;
        if (byte(in) == 1)
            mt_path_inherit(p, some_path(in));
        break;
    case 22:
        send_outbox();
        take_events();
        break;
    case 24:
        p = some_path(in);
        if (op & 0x80)
            mt_lane_set_redundancy(lane, word(in));
        else
            mt_conn_replay(c, p, op & 0x40 ? some_path(in) : c->active, now);
        break;
    case 23: {
        uint32_t length, used;
        uint8_t *raw = take(in, byte(in) & 63, &length);
        if (op & 0x80)
            mt_conn_datagram(c, peer_number, raw, length, now);
        else
            mt_conn_ack_frame(c, some_path(in), raw, length, op & 0x40, now, &used);
        mt_engine_flush(e);
        free(raw);
        break;
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    e = mt_engine_new();
    c = mt_conn_new(e);
    lane = mt_lane_new(e, 1);
    other = mt_lane_new(e, 2);
    peer = keys_of(1);
    set_next(peer, 1);
    now = MT_SECOND;
    peer_number = foreign = last_length = 0;
    strict = true;
    struct mt_path *p = mt_conn_add_path(c, 1200, 1e5);
    p->limited = false;
    p->has_cid = true;
    p->cid_length = MT_CID;
    struct mt_keys *keys = keys_of(0);
    set_next(keys, 0);
    CHECK(mt_conn_start(c, keys, now));
    mt_conn_attach(c, lane);
    int flags = byte(&in);
    mt_coalescer_allow(e->coalescer, flags & 1, flags & 1);
    c->patience = flags & 2 ? 400 * MT_MILLISECOND : 0;
    c->max_pto = flags & 4 ? 900 * MT_MILLISECOND : c->max_pto;
    if (flags & 8)
        p->acked_order = (p->order = UINT32_MAX - 3) - 1; /* it wraps in what is kept */
    for (int i = 0; left(&in) && i < MAX_STEPS && c->number < MAX_NUMBERS; i++) {
        step(&in);
        check();
    }
    /* At rest nothing is left running: time passes in few steps. */
    strict = false;
    for (int i = 0; i < 20; i++) {
        turn(false, &in);
        check();
    }
    if (flags & 16)
        mt_conn_stop(c);
    mt_conn_seal(c, now);
    mt_conn_free(c);
    CHECK(!e->message_count && !e->conns); /* nothing names it any more */
    mt_lane_free(lane);
    mt_lane_free(other);
    mt_keys_free(peer);
    mt_engine_free(e);
    return 0;
}
