/* One connection after its handshake: packets in, packets out, keys, paths. */
#include <stdlib.h>

#include "internal.h"

#define ACK_EVERY 32 /* ack-eliciting packets after which a batch is acknowledged at once */
#define START_WINDOW (32 * 1200) /* bytes, until the controller says otherwise */
#define RETIRE_PTOS 3 /* old keys live this long after an update (RFC 9001 section 6.5) */
#define CONFIDENTIALITY ((uint64_t)1 << 23) /* packets of one AES-GCM key, RFC 9001 section 6.6 */
#define INTEGRITY ((uint64_t)1 << 36) /* forged packets, the lower of the ciphers' limits */
#define SMALLEST (1 + MT_CID + MT_NUMBER_SIZE + MT_SAMPLE) /* bytes that can be unprotected */

void conn_fail(struct mt_conn *c, uint64_t code, uint64_t frame, const char *reason)
{
    if (!(c->events & MT_EVENT_ERROR)) {
        c->error.code = code;
        c->error.frame = frame;
        c->error.reason = reason;
    }
    c->events |= MT_EVENT_ERROR;
}

/* ---- life ---- */

/* What waits in the outbox must not outlive what it names; `p` NULL: any path. */
static void outbox_drop(struct mt_conn *c, const struct mt_path *p)
{
    struct mt_engine *e = c->engine;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < e->message_count; i++)
        if (e->messages[i].conn != c || (p && e->messages[i].path != p))
            e->messages[kept++] = e->messages[i];
    e->message_count = kept;
}

struct mt_conn *mt_conn_new(struct mt_engine *e)
{
    struct mt_conn *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->engine = e;
    c->next = e->conns;
    e->conns = c;
    c->max_sealed = CONFIDENTIALITY / 2;
    c->forget_keys_at = MT_NEVER;
    c->pace_at = MT_NEVER;
    c->max_pto = MT_NEVER / 4;
    c->ack_exponent = c->peer_ack_exponent = 3; /* RFC 9000 section 18.2 */
    c->ack_delay = MT_MILLISECOND;
    c->max_ack_delay = 25 * MT_MILLISECOND;
    c->opened_tail = &c->opened;
    return c;
}

void mt_conn_free(struct mt_conn *c)
{
    mt_conn_detach(c);
    mt_conn_stop(c);
    outbox_drop(c, NULL);
    for (struct mt_conn **at = &c->engine->conns; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    while (c->opened) {
        struct mt_opened *o = c->opened;
        c->opened = o->next;
        free(o);
    }
    if (c->keys)
        mt_keys_free(c->keys);
    mt_window_free(&c->received.arrived);
    mt_window_free(&c->delivered);
    free(c->ring);
    free(c->acked.items);
    free(c->lost.items);
    free(c);
}

bool mt_conn_start(struct mt_conn *c, struct mt_keys *keys, mt_time now)
{
    if (!mt_window_init(&c->received.arrived) || !mt_window_init(&c->delivered))
        return false;
    c->keys = keys;
    c->running = true;
    c->heard_at = now;
    c->peer_path = c->active;
    return mt_conn_set_host_cids(c, c->host_cids, c->host_cid_count);
}

void mt_conn_stop(struct mt_conn *c)
{
    if (c->running) {
        c->running = false;
        mt_conn_set_host_cids(c, c->host_cids, c->host_cid_count);
    }
}

/* ---- paths ---- */

struct mt_path *mt_conn_add_path(struct mt_conn *c, uint32_t mtu, double initial_rtt)
{
    for (int i = 0; i < MT_PATHS; i++) {
        struct mt_path *p = &c->paths[i];
        if (p->used)
            continue;
        uint32_t generation = p->generation + 1;
        memset(p, 0, sizeof *p);
        p->generation = generation;
        p->used = true;
        p->index = (uint8_t)i;
        p->socket = -1;
        p->mtu = mtu;
        p->initial_rtt = initial_rtt;
        p->window = START_WINDOW;
        p->acked_order = -1;
        p->threshold = 3;
        p->waiting_since = p->loss_at = MT_NEVER;
        p->scan = c->number;
        p->limited = true;
        if (!c->active)
            c->active = c->peer_path = c->replay.onto = p;
        return p;
    }
    return NULL;
}

void mt_conn_remove_path(struct mt_conn *c, struct mt_path *p)
{
    if (p == c->active)
        return;
    if (c->ring)
        mt_conn_abandon(c, p);
    replay_path_gone(c, p);
    outbox_drop(c, p);
    p->used = false;
    if (c->peer_path == p)
        c->peer_path = c->active;
    if (c->copies == p)
        c->copies = NULL;
}

void mt_conn_activate(struct mt_conn *c, struct mt_path *p)
{
    if (c->active == p)
        return;
    c->active = c->replay.onto = p;
    c->active_since = c->number;
    c->pto_count = 0;
    c->woken = false;
    c->pace_at = MT_NEVER;
    /* Only copies went there so far, and what acknowledges them may have taken a way that is dead
     * by now: their silence is none of this path. */
    p->waiting_since = MT_NEVER;
}

uint64_t mt_path_sendable(const struct mt_path *p)
{
    if (!p->limited)
        return UINT64_MAX;
    return 3 * p->bytes_received > p->bytes_sent ? 3 * p->bytes_received - p->bytes_sent : 0;
}

/* ---- keys ---- */

static void watch_keys(struct mt_conn *c, mt_time now)
{
    if (mt_keys_updates(c->keys) != c->seen_updates) {
        c->seen_updates = mt_keys_updates(c->keys);
        c->forget_keys_at = MT_NEVER;
        c->events |= MT_EVENT_KEYS;
    }
    /* Old read keys go 3 PTO after the peer was heard with the new ones, not before. */
    if (c->forget_keys_at == MT_NEVER && mt_keys_has_previous(c->keys) &&
        mt_keys_first_opened(c->keys) != UINT64_MAX)
        c->forget_keys_at =
            now + RETIRE_PTOS * (mt_time)mt_path_probe_timeout(c->active, c->max_ack_delay);
}

/* Whether RFC 9001 section 6.1 lets us start an update now. */
static bool may_update(const struct mt_conn *c)
{
    return mt_keys_has_next(c->keys) && !mt_keys_has_previous(c->keys) && c->has_acked &&
           c->largest_acked >= mt_keys_first_sealed(c->keys);
}

void conn_renew_keys(struct mt_conn *c, mt_time now)
{
    if ((c->wants_update || mt_keys_sealed(c->keys) >= c->max_sealed) && may_update(c)) {
        c->wants_update = false;
        mt_keys_update(c->keys);
    } else if (mt_keys_sealed(c->keys) >= CONFIDENTIALITY - 65536) {
        conn_fail(c, AEAD_LIMIT_REACHED, 0, "keys could not be updated in time");
    }
    watch_keys(c, now);
}

/* ---- receiving ---- */

static void hand_over(struct mt_conn *c, struct mt_path *p, uint64_t number, const uint8_t *cid,
                      int flags, const uint8_t *plain, uint32_t length)
{
    struct mt_opened *o = malloc(sizeof *o + length);
    if (!o) {
        conn_fail(c, INTERNAL_ERROR, 0, "out of memory");
        return;
    }
    o->next = NULL;
    o->number = number;
    o->path = p->index;
    o->generation = p->generation;
    o->flags = (uint8_t)flags;
    memcpy(o->cid, cid, MT_CID);
    o->length = length;
    if (length)
        memcpy(o->plain, plain, length);
    *c->opened_tail = o;
    c->opened_tail = &o->next;
    c->opened_count++;
    c->events |= MT_EVENT_OPENED;
}

/* The frames of a packet up to the first that is the owner's, which is returned; NULL where the
 * packet was malformed. */
static uint8_t *walk(struct mt_conn *c, struct mt_path *p, uint64_t number, uint8_t *at,
                     uint8_t *end, bool *eliciting, bool *moving, mt_time now)
{
    while (at < end) {
        uint8_t type = *at;
        if (type == 0x00) { /* PADDING */
            at++;
        } else if (type == 0x01) { /* PING */
            at++;
            *eliciting = *moving = true;
        } else if (type == 0x02 || type == 0x03) { /* ACK */
            const uint8_t *q = at + 1;
            int code = recovery_on_ack(c, p, &q, end, type == 0x03, now);
            if (code) {
                conn_fail(c, (uint64_t)code, type, "malformed acknowledgement");
                return NULL;
            }
            at += q - at;
            *moving = true;
        } else if (type == 0x30 || type == 0x31) { /* DATAGRAM (RFC 9221) */
            const uint8_t *q = at + 1;
            uint64_t length = (uint64_t)(end - q);
            if (type == 0x31 &&
                (!mt_get_varint(&q, end, &length) || length > (uint64_t)(end - q))) {
                conn_fail(c, FRAME_ENCODING_ERROR, type, "malformed datagram frame");
                return NULL;
            }
            at += q - at;
            *eliciting = true;
            if (!length || *at != KIND_COPY)
                *moving = true;
            deliver_datagram(c, number, at, (uint32_t)length, now);
            at += length;
        } else {
            break;
        }
    }
    return at;
}

static bool open_packet(struct mt_conn *c, struct mt_path *p, uint8_t *packet, uint32_t length,
                        const uint8_t *mask, mt_time now)
{
    p->bytes_received += length;
    if (c->opened_count >= MT_OPENED_MAX) {
        /* The owner does not keep up: as if it had been lost on the way. */
        c->counters.refused_opened++;
        return false;
    }
    packet[0] ^= mask[0] & 0x1f;
    int number_size = (packet[0] & 3) + 1;
    uint32_t header = 1 + MT_CID + (uint32_t)number_size;
    uint64_t truncated = 0;
    for (int i = 0; i < number_size; i++) {
        packet[1 + MT_CID + i] ^= mask[1 + i];
        truncated = truncated << 8 | packet[1 + MT_CID + i];
    }
    uint64_t end = c->received.arrived.end;
    uint64_t number = mt_decode_number(end ? end - 1 : UINT64_MAX, truncated, number_size);
    bool duplicate = mt_window_has(&c->received.arrived, number);
    if (duplicate && p == c->peer_path) {
        c->counters.duplicates++; /* whoever repeats it learns nothing and changes nothing */
        return false;
    }
    if (!mt_keys_open(c->keys, number, packet, header, length - header)) {
        c->counters.failed++;
        if (mt_keys_failed(c->keys) >= INTEGRITY)
            conn_fail(c, AEAD_LIMIT_REACHED, 0, "too many forged packets");
        return false;
    }
    watch_keys(c, now);
    uint8_t cid[MT_CID];
    memcpy(cid, packet + 1, MT_CID);
    if (duplicate) {
        c->counters.duplicates++;
        hand_over(c, p, number, cid, MT_OPENED_DUPLICATE, NULL, 0);
        return true;
    }
    c->heard_at = now; /* not of a repetition, which anybody can make: RFC 9000 section 10.1 */
    c->counters.received++;
    uint8_t *payload = packet + header, *stop = packet + length - MT_TAG;
    if (packet[0] & 0x18) {
        conn_fail(c, PROTOCOL_VIOLATION, 0, "reserved bits must be zero");
        return true;
    }
    if (payload == stop) {
        conn_fail(c, PROTOCOL_VIOLATION, 0, "a packet without frames");
        return true;
    }
    bool eliciting = false, moving = false;
    uint8_t *rest = walk(c, p, number, payload, stop, &eliciting, &moving, now);
    if (!rest)
        return true;
    bool frames = rest < stop;
    mt_received_add(&c->received, number, eliciting || frames, now);
    bool newest = !c->has_moving || number > c->largest_moving;
    bool usual = p == c->peer_path && p->has_expected && !memcmp(cid, p->expected, MT_CID);
    if (frames || (moving && newest && !usual) || (!moving && !p->has_expected)) {
        hand_over(c, p, number, cid,
                  (moving ? MT_OPENED_MOVING : 0) | (frames ? MT_OPENED_FRAMES : 0), rest,
                  (uint32_t)(stop - rest));
    } else if (moving && newest) {
        c->largest_moving = number;
        c->has_moving = true;
    }
    return true;
}

void mt_conn_receive_batch(struct mt_conn *c, struct mt_path **paths, uint8_t **packets,
                           const uint32_t *lengths, uint32_t count, mt_time now)
{
    uint8_t samples[MT_KEYS_BATCH * MT_SAMPLE], masks[MT_KEYS_BATCH * MT_SAMPLE];
    if (!c->running || !count)
        return;
    for (uint32_t i = 0; i < count; i++) {
        if (lengths[i] >= SMALLEST)
            memcpy(samples + MT_SAMPLE * i, packets[i] + 1 + MT_CID + 4, MT_SAMPLE);
        else
            memset(samples + MT_SAMPLE * i, 0, MT_SAMPLE);
    }
    mt_keys_masks(c->keys, false, samples, masks, count);
    for (uint32_t i = 0; i < count; i++)
        if (lengths[i] >= SMALLEST)
            open_packet(c, paths[i], packets[i], lengths[i], masks + MT_SAMPLE * i, now);
}

bool mt_conn_receive(struct mt_conn *c, struct mt_path *p, uint8_t *packet, uint32_t length,
                     mt_time now)
{
    uint8_t mask[MT_SAMPLE];
    if (!c->running || length < SMALLEST)
        return false;
    mt_keys_masks(c->keys, false, packet + 1 + MT_CID + 4, mask, 1);
    return open_packet(c, p, packet, length, mask, now);
}

void mt_conn_received(struct mt_conn *c, mt_time now)
{
    if (c->running && c->received.eliciting &&
        (c->received.at_once || c->received.eliciting >= ACK_EVERY))
        send_acknowledge(c, now);
}

bool mt_conn_ack_frame(struct mt_conn *c, struct mt_path *p, const uint8_t *frame, uint32_t length,
                       bool ecn, mt_time now, uint32_t *used)
{
    const uint8_t *at = frame;
    int code = recovery_on_ack(c, p, &at, frame + length, ecn, now);
    if (code)
        conn_fail(c, (uint64_t)code, ecn ? 3 : 2, "malformed acknowledgement");
    *used = (uint32_t)(at - frame);
    return !code;
}

/* ---- time ---- */

mt_time mt_conn_timer(const struct mt_conn *c)
{
    if (!c->running)
        return MT_NEVER;
    mt_time at = recovery_timer(c);
    if (c->received.eliciting && send_may_acknowledge(c)) {
        mt_time due = c->received.eliciting_since + (c->received.at_once ? 0 : c->ack_delay);
        if (due < at)
            at = due;
    }
    if (c->pace_at < at)
        at = c->pace_at;
    return c->forget_keys_at < at ? c->forget_keys_at : at;
}

void mt_conn_on_timer(struct mt_conn *c, mt_time now)
{
    if (!c->running)
        return;
    if (c->received.eliciting &&
        (c->received.at_once || now >= c->received.eliciting_since + c->ack_delay))
        send_acknowledge(c, now);
    recovery_on_timer(c, now);
    if (now >= c->forget_keys_at) {
        mt_keys_forget_previous(c->keys);
        c->forget_keys_at = MT_NEVER;
    }
    if (now >= c->pace_at)
        c->pace_at = MT_NEVER; /* the caller seals again */
}

void mt_conn_refused(struct mt_conn *c, struct mt_path *p, int code)
{
    p->refused = code;
    c->events |= MT_EVENT_REFUSED;
}
