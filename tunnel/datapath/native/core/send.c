/* What leaves: the outbox, acknowledgements, datagrams from the queue, copies of them, replays. */
#include <stdlib.h>

#include "internal.h"

#define PING_EVERY 64 /* acknowledgements, to have them acknowledged (RFC 9000 section 13.2.4) */
#define MAX_GSO_BYTES 65507 /* of UDP payload in one message to the kernel */
#define MAX_GSO_SEGMENTS 64 /* UDP_MAX_SEGMENTS of Linux before 6.9 */
#define BURST 1000 /* microseconds of rate that may leave at once after a pause */
/* The same while data waits for the pacer: a wake-up that comes late must not cost rate, or the rate
 * measured becomes that of our wake-ups. On fast paths there is less between two of them. */
#define BURST_LATE 2000
#define BURST_LATE_FAST 4000
#define FAST_RATE 25.0 /* bytes per microsecond: 200 Mbit/s */
#define REDUNDANCY_BURST 16384.0 /* bytes that may go two ways at once after a pause */
#define SMALLEST_MTU 1200 /* bytes, of any path (RFC 9000 section 14) */
#define PACE_STEP 500.0 /* microseconds of rate to gather before the next burst */

/* ---- outbox ---- */

static uint8_t *outbox_room(struct mt_engine *e, uint32_t size)
{
    if (e->out_length + size > MT_OUTBOX || e->packet_count + 2 > MT_OUTBOX_PACKETS)
        return NULL;
    return e->out + e->out_length;
}

static void outbox_add(struct mt_conn *c, struct mt_path *p, uint32_t size)
{
    struct mt_engine *e = c->engine;
    struct mt_message *m = e->message_count ? &e->messages[e->message_count - 1] : NULL;
    if (m && m->conn == c && m->path == p && m->offset + m->length == e->out_length &&
        m->length == m->segment * m->count && size <= m->segment &&
        m->count < MAX_GSO_SEGMENTS && m->length + size <= MAX_GSO_BYTES) {
        m->length += size;
        m->count++;
    } else {
        e->messages[e->message_count++] =
            (struct mt_message){c, p, e->out_length, size, size, 1};
    }
    e->out_length += size;
    e->packet_count++;
    p->bytes_sent += size;
}

/* Packets sealed but not yet under header protection, which is cheaper for many at once. */
struct batch {
    uint32_t count;
    uint8_t *packets[MT_KEYS_BATCH];
    uint8_t number_at[MT_KEYS_BATCH];
};

static void protect(struct mt_conn *c, struct batch *b)
{
    uint8_t samples[MT_KEYS_BATCH * MT_SAMPLE], masks[MT_KEYS_BATCH * MT_SAMPLE];
    for (uint32_t i = 0; i < b->count; i++)
        memcpy(samples + MT_SAMPLE * i, b->packets[i] + b->number_at[i] + 4, MT_SAMPLE);
    if (b->count)
        mt_keys_masks(c->keys, true, samples, masks, b->count);
    for (uint32_t i = 0; i < b->count; i++) {
        uint8_t *packet = b->packets[i], *number = packet + b->number_at[i];
        const uint8_t *mask = masks + MT_SAMPLE * i;
        packet[0] ^= mask[0] & 0x1f;
        for (int k = 0; k < MT_NUMBER_SIZE; k++)
            number[k] ^= mask[1 + k];
    }
    b->count = 0;
}

/* RFC 9000 section 17.3.1; returns the header's size */
static uint32_t write_header(struct mt_conn *c, const struct mt_path *p, uint8_t *out)
{
    out[0] = (uint8_t)(0x40 | mt_keys_phase(c->keys) << 2 | (MT_NUMBER_SIZE - 1));
    memcpy(out + 1, p->cid, p->cid_length);
    mt_put32(out + 1 + p->cid_length, (uint32_t)c->number);
    return 1u + p->cid_length + MT_NUMBER_SIZE;
}

/* A packet at the end of the outbox. */
struct draft {
    struct mt_path *path;
    uint8_t *packet;
    uint32_t header;     /* bytes */
    const uint8_t *text; /* its frames: behind the header, or in the store */
    uint32_t length;
    int flags;
};

/* It is complete: seal it, number it, keep it in mind. */
static bool finish(struct mt_conn *c, struct batch *b, const struct draft *d, mt_time now)
{
    uint64_t number = c->number;
    uint32_t size = d->header + d->length + MT_TAG;
    if (!recovery_track(c, d->path, number, size, d->flags, now))
        return false;
    mt_keys_seal_from(c->keys, number, d->packet, d->header, d->text, d->length);
    b->packets[b->count] = d->packet;
    b->number_at[b->count++] = (uint8_t)(d->header - MT_NUMBER_SIZE);
    outbox_add(c, d->path, size);
    if (d->flags & MT_SENT_IN_FLIGHT)
        d->path->tokens -= size;
    c->counters.sent++;
    return true;
}

/* ---- acknowledging ---- */

#define ACK_PACKET (1 + MT_MAX_CID + MT_NUMBER_SIZE + MT_ACK_SIZE + 4 + MT_TAG)

bool send_may_acknowledge(const struct mt_conn *c)
{
    return c->running && c->active->has_cid && mt_path_sendable(c->active) >= 100;
}

void send_acknowledge(struct mt_conn *c, mt_time now)
{
    struct mt_path *p = c->active;
    if (!send_may_acknowledge(c) || !recovery_has_room(c))
        return;
    uint8_t *packet = outbox_room(c->engine, ACK_PACKET);
    if (!packet)
        return; /* the timer asks again */
    uint32_t header = write_header(c, p, packet);
    uint64_t room = mt_path_sendable(p);
    if (room > p->mtu)
        room = p->mtu;
    uint32_t payload = mt_received_ack(&c->received, packet + header,
                                       (uint32_t)room - header - MT_TAG - 4, c->ack_exponent, now);
    if (!payload) {
        c->received.eliciting = 0; /* nothing has arrived yet */
        c->received.at_once = false;
        return;
    }
    int flags = 0;
    if (++c->counters.acks_sent % PING_EVERY == 0 && !p->outstanding) {
        packet[header + payload++] = 0x01;
        flags = MT_SENT_ELICITING | MT_SENT_IN_FLIGHT;
    }
    recovery_note_ack(c, c->number);
    struct batch b = {.count = 0};
    struct draft d = {p, packet, header, packet + header, payload, flags};
    finish(c, &b, &d, now);
    protect(c, &b);
}

/* ---- sending ---- */

/* Fill the pacer's bucket. */
static void refill(struct mt_path *p, mt_time now)
{
    double late = p->pacing > FAST_RATE ? BURST_LATE_FAST : BURST_LATE;
    double burst = p->pacing * (p->waiting ? late : BURST);
    p->waiting = false;
    if (burst < 3.0 * p->mtu)
        burst = 3.0 * p->mtu;
    if (now > p->tokens_at)
        p->tokens += p->pacing * (double)(now - p->tokens_at);
    p->tokens_at = now;
    if (p->tokens > burst)
        p->tokens = burst;
}

/* A backup whose window is full of what was never answered. Nothing else leaves there that would
 * find out about it, so one packet does each probe timeout. */
static bool may_probe(const struct mt_conn *c, const struct mt_path *p, mt_time now)
{
    return p != c->active &&
           now >= p->last_eliciting_at + (mt_time)mt_path_probe_timeout(p, c->max_ack_delay);
}

static bool fits_window(const struct mt_conn *c, const struct mt_path *p, uint32_t size,
                        mt_time now)
{
    return !p->in_flight || p->in_flight + size <= p->window || may_probe(c, p, now);
}

static bool may_send(struct mt_conn *c, struct mt_path *p, uint32_t size, mt_time now)
{
    if (!fits_window(c, p, size, now)) {
        c->counters.window_blocked++;
    } else if (p->pacing > 0 && p->tokens <= 0) {
        c->counters.pacing_blocked++;
        p->waiting = true;
        double step = p->pacing * PACE_STEP;
        if (step > MAX_GSO_BYTES)
            step = MAX_GSO_BYTES;
        mt_time at = now + 1 + (mt_time)((step - p->tokens) / p->pacing);
        if (at < c->pace_at)
            c->pace_at = at;
    } else if (mt_path_sendable(p) >= size && recovery_has_room(c)) {
        return true;
    }
    return false;
}

/* Bytes of a packet around the payload of a datagram. */
static uint32_t overhead(const struct mt_path *p)
{
    return 1u + p->cid_length + MT_NUMBER_SIZE + MT_TAG + 1;
}

/* Bytes of the payload of a part: a copy of it fits any path. */
static uint32_t part_size(const struct mt_path *p)
{
    uint32_t most = SMALLEST_MTU - overhead(p) - COPY_OVERHEAD;
    return most < MAX_PART ? most : MAX_PART; /* less with long connection IDs */
}

/* Cut a part of the packet in l->split for a datagram of at most `most` bytes; returns its size. */
static uint32_t write_part(struct mt_lane *l, uint8_t *out, uint32_t most)
{
    uint8_t *p = out;
    *p++ = KIND_PART;
    p += mt_put_varint(p, l->split_id);
    p += mt_put_varint(p, l->split_offset);
    uint32_t room = most - (uint32_t)(p - out) - 1;
    uint32_t left = l->split_length - l->split_offset;
    uint32_t take = left < room ? left : room;
    *p++ = take == left;
    memcpy(p, l->split + l->split_offset, take);
    l->split_offset += take;
    if (take == left)
        l->split_length = 0;
    return (uint32_t)(p - out) + take;
}

static bool start_split(struct mt_lane *l)
{
    if (!l->split && !(l->split = malloc(MT_MAX_IP)))
        return false;
    l->split_offset = 0;
    l->split_id = (l->split_id + 1) & 0x3fff; /* two bytes as a varint */
    return true;
}

static bool split_packet(struct mt_lane *l, uint32_t length)
{
    if (!start_split(l))
        return false;
    l->split_sparse = mt_queue_sparse(l->queue);
    l->split_copy = false;
    mt_queue_take(l->queue, l->split);
    l->split_length = length;
    l->counters.split++;
    return true;
}

/* ---- copies ---- */

static uint32_t copy_size(const struct mt_conn *c, const struct mt_path *p, uint64_t root)
{
    return overhead(p) + 1 + (uint32_t)mt_varint_size(root) + sent_entry(c, root)->length;
}

/* A copy packet, which moves nobody. */
static bool write_copy(struct mt_conn *c, struct mt_path *p, struct batch *b, uint64_t root,
                       int kind, mt_time now)
{
    const uint8_t *frame = mt_store_get(&c->store, sent_entry(c, root)->stored);
    uint32_t length = sent_entry(c, root)->length;
    uint8_t *packet = outbox_room(c->engine, copy_size(c, p, root));
    if (!packet || !frame)
        return false;
    uint32_t header = write_header(c, p, packet);
    uint8_t *at = packet + header;
    *at++ = 0x30;
    *at++ = KIND_COPY;
    at += mt_put_varint(at, root);
    memcpy(at, frame + 1, length);
    at += length;
    struct draft d = {p, packet, header, packet + header, (uint32_t)(at - packet) - header,
                      MT_SENT_ELICITING | MT_SENT_IN_FLIGHT | MT_SENT_COPY | kind};
    uint64_t number = c->number;
    if (!finish(c, b, &d, now))
        return false;
    sent_entry(c, number)->stored = root;
    sent_entry(c, root)->copied = p->index;
    c->counters.copies_sent++;
    return true;
}

/* Fill the bucket of what may go two ways; whether there is something in it. */
static bool has_credit(struct mt_lane *l, mt_time now)
{
    l->credit += l->redundancy * (double)(now - l->credit_at);
    if (l->credit > REDUNDANCY_BURST)
        l->credit = REDUNDANCY_BURST;
    l->credit_at = now;
    return l->redundancy > 0 && l->credit > 0;
}

/* The second way of the datagram that has just left. */
static void second_way(struct mt_conn *c, struct batch *b, uint64_t root, mt_time now)
{
    struct mt_path *p = c->copies;
    struct mt_lane *l = c->lane;
    if (!p || p == c->active || !p->has_cid || b->count >= MT_KEYS_BATCH)
        return;
    const struct mt_sent *s = sent_entry(c, root);
    uint32_t length = s->length - 1u, size = copy_size(c, p, root);
    if (!c->copies_all && (!(s->flags & MT_SENT_SPARSE) || !has_credit(l, now)))
        return;
    if (size > p->mtu || !fits_window(c, p, size, now) || mt_path_sendable(p) < size ||
        !recovery_has_room(c))
        return;
    /* What goes there is all there is to send: its rate says nothing about the path. */
    p->app_limited = p->delivered + (uint64_t)p->in_flight + size;
    if (!write_copy(c, p, b, root, 0, now))
        return;
    if (!c->copies_all)
        l->credit -= length;
    c->counters.redundant_packets++;
    c->counters.redundant_bytes += size;
}

/* ---- replays ---- */

/* A copy too large for the active path leaves in parts, which are datagrams of their own. */
static bool split_replay(struct mt_conn *c, uint64_t root)
{
    struct mt_lane *l = c->lane;
    const struct mt_sent *s = sent_entry(c, root);
    const uint8_t *frame = mt_store_get(&c->store, s->stored);
    if (!start_split(l))
        return false;
    if (frame[1] != KIND_PACKET) { /* a part, and connection IDs are longer here */
        replay_give_up(c, root);
        return true;
    }
    uint8_t *at = l->split;
    *at++ = KIND_COPY;
    at += mt_put_varint(at, root);
    memcpy(at, frame + 1, s->length);
    l->split_length = (uint32_t)(at - l->split) + s->length;
    l->split_sparse = s->flags & MT_SENT_SPARSE;
    l->split_copy = true;
    replay_handed_over(c, root);
    c->counters.replayed++;
    return true;
}

static bool seal_replay(struct mt_conn *c, struct mt_path *p, struct batch *b, uint64_t root,
                        mt_time now)
{
    uint32_t size = copy_size(c, p, root);
    if (size > p->mtu) {
        if (p == c->active)
            return split_replay(c, root);
        replay_done(c, root);
        return true;
    }
    if (!may_send(c, p, size, now) || !write_copy(c, p, b, root, MT_SENT_REPLAYED, now))
        return false;
    replay_done(c, root);
    c->counters.replayed++;
    return true;
}

/* Onto a path that is not the active one, whatever that one waits for. */
static void seal_race(struct mt_conn *c, struct batch *b, mt_time now)
{
    struct mt_path *p = c->replay.onto;
    uint64_t root;
    if (!mt_conn_replays(c) || p == c->active || !p->has_cid)
        return;
    if (p->pacing > 0)
        refill(p, now);
    while (b->count < MT_KEYS_BATCH && c->replay.onto == p && replay_next(c, now, &root) &&
           seal_replay(c, p, b, root, now))
        continue;
    protect(c, b);
}

/* ---- everything ---- */

/* One datagram from the lane's queue, whole or in parts: `waiting` bytes of IP packet, unless one is
 * being cut already. */
static bool seal_packet(struct mt_conn *c, struct mt_path *p, struct batch *b, uint32_t waiting,
                        mt_time now)
{
    struct mt_lane *l = c->lane;
    /* While a move is checked everything must fit the other path too. */
    uint32_t whole = p->mtu - overhead(p) - (c->copies && c->copies_all ? COPY_OVERHEAD : 0);
    bool parts = l->split_length || waiting + 1 > whole;
    uint32_t most = parts ? part_size(p) : waiting + 1;
    if (!may_send(c, p, overhead(p) + most, now))
        return false;
    uint8_t *packet = outbox_room(c->engine, MT_MAX_DATAGRAM);
    uint8_t *frame = packet ? replay_reserve(c, 1 + most, now) : NULL;
    if (!frame || (parts && !l->split_length && !split_packet(l, waiting)))
        return false;
    bool sparse = parts ? l->split_sparse : mt_queue_sparse(l->queue);
    bool counts = !parts || !l->split_copy;
    uint32_t length = most;
    frame[0] = 0x30; /* DATAGRAM to the packet's end */
    if (parts) {
        length = write_part(l, frame + 1, most);
    } else {
        frame[1] = KIND_PACKET;
        mt_queue_take(l->queue, frame + 2);
    }
    if (counts && !l->split_length)
        l->counters.sent++;
    if (counts)
        l->counters.sent_bytes += length;
    uint64_t number = c->number;
    struct draft d = {p, packet, write_header(c, p, packet), frame, 1 + length,
                      MT_SENT_ELICITING | MT_SENT_IN_FLIGHT | MT_SENT_KEPT |
                          (sparse ? MT_SENT_SPARSE : 0)};
    if (!finish(c, b, &d, now))
        return false;
    struct mt_sent *s = sent_entry(c, number);
    s->stored = mt_store_commit(&c->store, 1 + length);
    s->length = (uint16_t)length;
    second_way(c, b, number, now);
    return true;
}

/* What leaves next on the active path; false: nothing more can leave now. A replay goes before a new
 * packet, but not before that of a flow that sends little. */
static bool seal_next(struct mt_conn *c, struct mt_path *p, struct batch *b, mt_time now)
{
    struct mt_lane *l = c->lane;
    if (l->split_length)
        return seal_packet(c, p, b, 0, now);
    uint64_t root;
    bool replays = c->replay.onto == p && replay_next(c, now, &root);
    uint32_t waiting =
        replays ? mt_queue_peek_sparse(l->queue, now) : mt_queue_peek(l->queue, now);
    if (waiting)
        return seal_packet(c, p, b, waiting, now);
    if (replays)
        return seal_replay(c, p, b, root, now);
    if (p->in_flight < p->window)
        p->app_limited = p->delivered + (uint64_t)p->in_flight + 1;
    return false;
}

uint32_t mt_conn_seal(struct mt_conn *c, mt_time now)
{
    struct mt_path *p = c->active;
    uint32_t before = c->engine->packet_count;
    c->pace_at = MT_NEVER;
    if (c->running && c->received.eliciting && c->received.at_once)
        send_acknowledge(c, now);
    if (!c->running || !c->lane || c->lane->held || !p->has_cid || c->events & MT_EVENT_ERROR)
        return c->engine->packet_count - before;
    conn_renew_keys(c, now);
    struct batch b = {.count = 0};
    seal_race(c, &b, now);
    if (p->pacing > 0)
        refill(p, now);
    /* A packet and its copy: two places are left for them. */
    while (b.count + 2 <= MT_KEYS_BATCH && seal_next(c, p, &b, now))
        ;
    protect(c, &b);
    return c->engine->packet_count - before;
}

uint32_t mt_conn_seal_foreign(struct mt_conn *c, uint64_t number, const uint8_t *header,
                              uint32_t header_size, uint32_t number_size, const uint8_t *payload,
                              uint32_t payload_size, uint8_t *out)
{
    uint32_t cid = header_size - 1 - number_size;
    out[0] = (uint8_t)((header[0] & 0xe0) | mt_keys_phase(c->keys) << 2 | (MT_NUMBER_SIZE - 1));
    memcpy(out + 1, header + 1, cid);
    mt_put32(out + 1 + cid, (uint32_t)number);
    uint32_t size = 1 + cid + MT_NUMBER_SIZE;
    memcpy(out + size, payload, payload_size);
    mt_keys_seal(c->keys, number, out, size, payload_size);
    struct batch b = {.count = 1, .packets = {out}, .number_at = {(uint8_t)(1 + cid)}};
    protect(c, &b);
    return size + payload_size + MT_TAG;
}

