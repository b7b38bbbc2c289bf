/* Sent packets: acknowledgements, loss, RTT, delivery rate (RFC 9002), each within one path.
 *
 * There is one packet number space and one ring of what was sent in it, but packet threshold, time
 * threshold, RTT and bytes in flight apply within a path only: reordering between paths is no loss,
 * and what died with a path does not fill the window of the next.
 */
#include <stdlib.h>

#include "internal.h"

#define RING_START 1024
#define RING_LIMIT ((uint64_t)1 << 18) /* packets outstanding; 350 MB of flight */
#define PACKET_THRESHOLD 3             /* RFC 9002 section 6.1.1 */
#define MAX_PACKET_THRESHOLD 128       /* where a path reorders it is doubled up to this */
#define GRANULARITY 1000.0             /* microseconds, RFC 9002 section 6.1.2 */
#define SPURIOUS_RANGES 8 /* of an acknowledgement, searched for packets that were only late */
#define RATE_FLOOR 20.0 /* microseconds: shorter intervals measure our own batches, not the path */
#define SAMPLE_SPACING_MIN 500  /* microseconds between two looks of the controller: it costs */
#define SAMPLE_SPACING_MAX 2000 /* some 15 us each, and gains nothing from more than this */

static bool numbers_add(struct mt_numbers *list, uint64_t number)
{
    if (list->count == list->capacity) {
        uint32_t capacity = list->capacity ? 2 * list->capacity : 64;
        uint64_t *items = realloc(list->items, capacity * sizeof *items);
        if (!items)
            return false;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = number;
    return true;
}

/* ---- sending ---- */

static bool grow(struct mt_conn *c)
{
    uint64_t size = c->ring_size ? 2 * c->ring_size : RING_START;
    if (size > RING_LIMIT)
        return false;
    struct mt_sent *ring = calloc(size, sizeof *ring);
    if (!ring)
        return false;
    /* The settled ones too: a late acknowledgement asks which path they were on. */
    uint64_t first = c->number > c->ring_size ? c->number - c->ring_size : 0;
    for (uint64_t n = first; c->ring && n < c->number; n++)
        ring[n & (size - 1)] = *sent_entry(c, n);
    free(c->ring);
    c->ring = ring;
    c->ring_size = size;
    return true;
}

static void settle(struct mt_sent *s, struct mt_path *p)
{
    s->state = MT_SETTLED;
    if (s->flags & MT_SENT_IN_FLIGHT)
        p->in_flight -= s->size;
    if (s->flags & MT_SENT_ELICITING)
        p->outstanding--;
}

/* Lost without blame: it says nothing about the path. */
static void give_up(struct mt_conn *c, struct mt_path *p, uint64_t number)
{
    struct mt_sent *s = sent_entry(c, number);
    settle(s, p);
    if (!p->outstanding)
        p->waiting_since = MT_NEVER;
    if (s->flags & MT_SENT_FOREIGN) {
        numbers_add(&c->lost, number);
        c->events |= MT_EVENT_SETTLED;
    }
    replay_lost(c, number);
}

static void advance(struct mt_conn *c)
{
    while (c->settled < c->number && sent_entry(c, c->settled)->state != MT_OUTSTANDING)
        c->settled++;
}

bool recovery_has_room(struct mt_conn *c)
{
    if (c->number - c->settled + 2 < c->ring_size)
        return true;
    if (c->ring)
        advance(c);
    if (c->number - c->settled + 2 < c->ring_size || grow(c))
        return true;
    /* A ring of packets later nobody waits for a probe of another path any more, which nothing
     * there will ever declare lost: it must not stop this one. */
    while (c->ring && c->settled < c->number && c->number - c->settled + 2 >= c->ring_size) {
        struct mt_path *p = &c->paths[sent_entry(c, c->settled)->path];
        if (p == c->active)
            return false;
        give_up(c, p, c->settled);
        advance(c);
    }
    return c->number - c->settled + 2 < c->ring_size;
}

bool mt_conn_skip_to(struct mt_conn *c, uint64_t number)
{
    while (c->number < number) {
        if (!recovery_has_room(c))
            return false;
        /* `settled` stays: an owner that counts first and reports then may still claim them. */
        struct mt_sent *s = sent_entry(c, c->number);
        replay_overwritten(c, s);
        s->state = MT_UNTRACKED;
        s->flags = 0;
        c->number++;
    }
    return true;
}

bool recovery_track(struct mt_conn *c, struct mt_path *p, uint64_t number, uint32_t size, int flags,
                    mt_time at)
{
    if (number >= c->number) {
        if (!mt_conn_skip_to(c, number + 1))
            return false;
    } else if (number < c->settled) {
        if (c->number - number + 2 >= c->ring_size)
            return true; /* the caller settles its own past */
        c->settled = number; /* counted before, reported now; nothing between is outstanding */
    }
    struct mt_sent *s = sent_entry(c, number);
    if (!(flags & (MT_SENT_ELICITING | MT_SENT_IN_FLIGHT | MT_SENT_FOREIGN))) {
        s->state = MT_UNTRACKED;
        if (c->settled == number)
            c->settled = number + 1;
        return true;
    }
    s->at = at;
    s->size = (uint16_t)size;
    s->path = p->index;
    s->order = (uint32_t)p->order++;
    s->state = MT_OUTSTANDING;
    s->flags = (uint16_t)flags;
    s->copied = NO_PATH;
    if (p->scan > number || p->order == 1)
        p->scan = number;
    if (flags & MT_SENT_IN_FLIGHT) {
        if (p->in_flight == 0) {
            /* draft-ietf-ccwg-bbr section 4.1.2.2: a new flight begins */
            p->first_sent = at;
            p->delivered_at = at;
        }
        p->in_flight += size;
    }
    s->delivered = p->delivered;
    s->delivered_at = p->delivered_at;
    s->first_sent = p->first_sent;
    if (p->app_limited)
        s->flags |= MT_SENT_LIMITED;
    if (flags & MT_SENT_ELICITING) {
        p->outstanding++;
        p->last_eliciting_at = at;
        if (p->waiting_since == MT_NEVER) {
            p->waiting_since = at;
            if (p == c->active)
                c->woken = false;
        }
    }
    return true;
}

bool mt_conn_sent(struct mt_conn *c, struct mt_path *p, uint64_t number, uint32_t size, int flags,
                  mt_time at)
{
    if (flags & MT_SENT_IN_FLIGHT)
        p->tokens -= size;
    /* The owner sends now and then: where no data waits, its rate says nothing about the path. */
    if (p != c->active || !mt_conn_pending(c))
        p->app_limited = p->delivered + (uint64_t)p->in_flight + size;
    return recovery_track(c, p, number, size, flags | MT_SENT_FOREIGN, at);
}

void recovery_note_ack(struct mt_conn *c, uint64_t number)
{
    uint32_t slot = c->acks_count++ & 255;
    c->acks[slot].number = number;
    c->acks[slot].largest = c->received.arrived.end - 1;
}

/* ---- settling ---- */

static void declare_lost(struct mt_conn *c, struct mt_path *p, uint64_t number)
{
    struct mt_sent *s = sent_entry(c, number);
    settle(s, p);
    if (s->flags & MT_SENT_FOREIGN) {
        numbers_add(&c->lost, number);
        c->events |= MT_EVENT_SETTLED;
    }
    c->recent_lost[c->recent_lost_count++ & (MT_RECENT_LOST - 1)] = number;
    if (s->flags & MT_SENT_ELICITING)
        p->lost++;
    if (s->flags & MT_SENT_IN_FLIGHT) {
        c->counters.lost++;
        if (s->size > LARGE_PACKET)
            p->large_lost++;
        p->sample.lost += s->size;
        p->sample.pending = true;
    }
    if (!p->outstanding)
        p->waiting_since = MT_NEVER;
    replay_lost(c, number);
}

/* Packets between this one and the newest acknowledged of its path; at most 0: it left before that
 * one. The 32 bits that are kept wrap within hours, their differences do not. */
static int32_t ahead_of_acked(const struct mt_path *p, const struct mt_sent *s)
{
    return (int32_t)(s->order - (uint32_t)p->acked_order);
}

/* RFC 9002 section 6.1 */
static void detect_loss(struct mt_conn *c, struct mt_path *p, mt_time now)
{
    double reference = p->has_rtt
                           ? (p->rtt_latest > p->rtt_smoothed ? p->rtt_latest : p->rtt_smoothed)
                           : p->initial_rtt;
    double patience = reference * 9 / 8;
    mt_time delay = (mt_time)(patience > GRANULARITY ? patience : GRANULARITY);
    p->loss_at = MT_NEVER;
    uint64_t n = p->scan > c->settled ? p->scan : c->settled;
    bool contiguous = true;
    for (; n < c->number; n++) {
        const struct mt_sent *s = sent_entry(c, n);
        if (s->state != MT_OUTSTANDING || s->path != p->index)
            continue;
        int32_t ahead = ahead_of_acked(p, s);
        if (ahead > 0)
            break;
        if (ahead <= -(int32_t)p->threshold || now >= s->at + delay) {
            declare_lost(c, p, n);
            continue;
        }
        if (contiguous)
            p->scan = n;
        contiguous = false;
        if (s->at + delay < p->loss_at)
            p->loss_at = s->at + delay;
    }
    if (contiguous)
        p->scan = n;
    advance(c);
}

/* RFC 9002 section 5.3 */
void mt_path_add_rtt(struct mt_path *p, double rtt, double ack_delay)
{
    if (rtt < 1.0)
        rtt = 1.0;
    p->rtt_latest = rtt;
    if (!p->has_rtt || rtt < p->rtt_min)
        p->rtt_min = rtt;
    double adjusted = rtt >= p->rtt_min + ack_delay ? rtt - ack_delay : rtt;
    if (!p->has_rtt) {
        p->has_rtt = true;
        p->rtt_smoothed = adjusted;
        p->rtt_variance = adjusted / 2;
    } else {
        double difference = p->rtt_smoothed - adjusted;
        if (difference < 0)
            difference = -difference;
        p->rtt_variance += (difference - p->rtt_variance) / 4;
        p->rtt_smoothed += (adjusted - p->rtt_smoothed) / 8;
    }
    if (!p->sample.rtt || rtt < (double)p->sample.rtt)
        p->sample.rtt = (mt_time)rtt;
}

/* The delivery rate between the sending of the newest acknowledged packet and now
 * (draft-ietf-ccwg-bbr section 4.1.2.3). */
static void sample_rate(struct mt_path *p, const struct mt_sent *newest, mt_time now)
{
    struct mt_sample *sample = &p->sample;
    double sending = (double)(newest->at - newest->first_sent);
    double acking = (double)(now - newest->delivered_at);
    double interval = sending > acking ? sending : acking;
    /* Faster than the path's own round trip nothing can be measured: acknowledgements that were
     * held back and come at once would show any rate. */
    if (p->has_rtt && interval < p->rtt_min)
        interval = p->rtt_min;
    if (interval < RATE_FLOOR)
        interval = RATE_FLOOR;
    double rate = (double)(p->delivered - newest->delivered) / interval;
    bool limited = newest->flags & MT_SENT_LIMITED;
    if (rate > sample->rate) {
        sample->rate = rate;
        sample->app_limited = limited;
    }
    if (newest->delivered > sample->prior_delivered)
        sample->prior_delivered = newest->delivered;
    p->first_sent = newest->at;
}

struct progress {
    uint64_t largest;
    bool any, eliciting, largest_eliciting;
};

static void acknowledge(struct mt_conn *c, uint64_t low, uint64_t high, struct progress *progress)
{
    uint64_t floor = replay_floor(c);
    if (low < floor)
        low = floor;
    for (uint64_t n = low; n <= high && n < c->number; n++) {
        struct mt_sent *s = sent_entry(c, n);
        replay_acked(c, s);
        if (s->state != MT_OUTSTANDING)
            continue;
        struct mt_path *p = &c->paths[s->path];
        settle(s, p);
        if (s->flags & MT_SENT_FOREIGN) {
            numbers_add(&c->acked, n);
            c->events |= MT_EVENT_SETTLED;
        }
        if (s->flags & MT_SENT_IN_FLIGHT) {
            p->delivered += s->size;
            p->sample.acked += s->size;
            p->sample.pending = true;
        }
        if (s->size > LARGE_PACKET)
            p->large_lost = 0;
        if (ahead_of_acked(p, s) > 0)
            p->acked_order = s->order;
        struct progress *mine = &progress[s->path];
        mine->eliciting |= s->flags & MT_SENT_ELICITING;
        if (!mine->any || n > mine->largest) {
            mine->largest = n;
            mine->largest_eliciting = s->flags & MT_SENT_ELICITING;
        }
        mine->any = true;
    }
}

/* Packets that were declared lost and were only late: RFC 9002 section 6.1.1 */
static void find_spurious(struct mt_conn *c, uint64_t low, uint64_t high)
{
    uint32_t count = c->recent_lost_count < MT_RECENT_LOST ? c->recent_lost_count : MT_RECENT_LOST;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t n = c->recent_lost[i];
        if (n < low || n > high)
            continue;
        c->recent_lost[i] = UINT64_MAX;
        c->counters.spurious++;
        /* The entry is still there as long as nothing newer took its place. */
        if (c->number - n >= c->ring_size)
            continue;
        struct mt_sent *s = sent_entry(c, n);
        replay_acked(c, s);
        if (s->path == NO_PATH)
            continue;
        struct mt_path *p = &c->paths[s->path];
        p->threshold *= 2;
        if (p->threshold > MAX_PACKET_THRESHOLD)
            p->threshold = MAX_PACKET_THRESHOLD;
        p->sample.spurious = true;
        p->sample.pending = true;
    }
}

static void trim(struct mt_conn *c, uint64_t low, uint64_t high)
{
    uint32_t count = c->acks_count < 256 ? c->acks_count : 256;
    for (uint32_t i = 1; i <= count; i++) {
        uint32_t slot = (c->acks_count - i) & 255;
        if (c->acks[slot].number > high)
            continue;
        if (c->acks[slot].number >= low && c->acks[slot].largest > 512) {
            uint64_t floor = c->acks[slot].largest - 512;
            if (floor > c->received.floor)
                c->received.floor = floor;
        }
        return;
    }
}

/* When the first packet of this path left that nothing newer has been acknowledged than: it is the
 * next to be answered. One that left before `acked` and is still outstanding is lost or late, which
 * says nothing about whether the path lives. In a dense flow this is a round trip sooner than
 * counting from the last acknowledgement. */
static mt_time oldest_after(const struct mt_conn *c, const struct mt_path *p, uint64_t acked)
{
    for (uint64_t n = acked + 1; p->outstanding && n < c->number; n++) {
        const struct mt_sent *s = sent_entry(c, n);
        if (s->state == MT_OUTSTANDING && s->path == p->index && s->flags & MT_SENT_ELICITING &&
            ahead_of_acked(p, s) > 0)
            return s->at;
    }
    return MT_NEVER;
}

static void on_progress(struct mt_conn *c, struct mt_path *p, const struct progress *progress,
                        struct mt_path *arriving, uint64_t largest, double delay, mt_time now)
{
    const struct mt_sent *newest = sent_entry(c, progress->largest);
    /* An acknowledgement that took another path back measures neither of the two. */
    bool measures = p == c->active || p == arriving;
    if (progress->largest == largest && progress->eliciting && measures)
        mt_path_add_rtt(p, (double)(now - newest->at),
                        delay < (double)c->max_ack_delay ? delay : (double)c->max_ack_delay);
    if (newest->flags & MT_SENT_IN_FLIGHT) {
        p->delivered_at = now;
        if (p->app_limited && p->delivered >= p->app_limited)
            p->app_limited = 0;
        sample_rate(p, newest, now);
    }
    p->last_progress_at = now;
    p->waiting_since = oldest_after(c, p, progress->largest);
    if (p == c->active) {
        c->woken = false;
        if (c->settling && progress->largest >= c->active_since) {
            /* What left on a new path before the first that arrived met a NAT, a route or a
             * neighbour that was not ready yet: the move's loss, which is made good. */
            c->active_since = progress->largest;
            c->settling = false;
        }
    }
    detect_loss(c, p, now);
}

static mt_time sample_spacing(const struct mt_path *p)
{
    mt_time spacing = (mt_time)(p->rtt_smoothed / 8);
    if (spacing < SAMPLE_SPACING_MIN)
        return SAMPLE_SPACING_MIN;
    return spacing > SAMPLE_SPACING_MAX ? SAMPLE_SPACING_MAX : spacing;
}

static void offer_sample(struct mt_conn *c, struct mt_path *p, mt_time now)
{
    if (p->sample.pending && now >= p->sampled_at + sample_spacing(p))
        c->events |= MT_EVENT_SAMPLE;
}

int recovery_on_ack(struct mt_conn *c, struct mt_path *arriving, const uint8_t **at,
                    const uint8_t *end, bool ecn, mt_time now)
{
    uint64_t largest, delay, count, first;
    if (!mt_get_varint(at, end, &largest) || !mt_get_varint(at, end, &delay) ||
        !mt_get_varint(at, end, &count) || !mt_get_varint(at, end, &first) || first > largest)
        return FRAME_ENCODING_ERROR;
    if (largest >= c->number)
        return PROTOCOL_VIOLATION; /* never sent: RFC 9000 section 13.1 */
    struct progress progress[MT_PATHS];
    memset(progress, 0, sizeof progress);
    c->counters.acks_received++;
    uint64_t high = largest, low = largest - first;
    trim(c, low, high);
    for (uint32_t range = 0;; range++) {
        if (high >= replay_floor(c))
            acknowledge(c, low, high, progress);
        if (c->recent_lost_count && range < SPURIOUS_RANGES)
            find_spurious(c, low, high);
        if (!count--)
            break;
        uint64_t gap, length;
        if (!mt_get_varint(at, end, &gap) || !mt_get_varint(at, end, &length))
            return FRAME_ENCODING_ERROR;
        if (low < gap + 2)
            return FRAME_ENCODING_ERROR; /* a negative number: RFC 9000 section 19.3.1 */
        high = low - gap - 2;
        if (length > high)
            return FRAME_ENCODING_ERROR;
        low = high - length;
    }
    if (ecn)
        for (int i = 0; i < 3; i++) {
            uint64_t ignored;
            if (!mt_get_varint(at, end, &ignored))
                return FRAME_ENCODING_ERROR;
        }
    if (!c->has_acked || largest > c->largest_acked)
        c->largest_acked = largest;
    c->has_acked = true;
    double waited = (double)(delay < (1u << 24) ? delay << c->peer_ack_exponent : 1u << 24);
    bool any = false;
    for (int i = 0; i < MT_PATHS; i++) {
        if (!progress[i].any)
            continue;
        any = true;
        on_progress(c, &c->paths[i], &progress[i], arriving, largest, waited, now);
        offer_sample(c, &c->paths[i], now);
    }
    if (progress[c->active->index].any)
        c->pto_count = 0; /* what a backup answers says nothing about this path */
    if (any)
        advance(c);
    return 0;
}

/* ---- time ---- */

double mt_path_probe_timeout(const struct mt_path *p, mt_time max_ack_delay)
{
    if (!p->has_rtt)
        return 2 * p->initial_rtt;
    double variance = 4 * p->rtt_variance;
    return p->rtt_smoothed + (variance > GRANULARITY ? variance : GRANULARITY) +
           (double)max_ack_delay;
}

mt_time recovery_pto_at(const struct mt_conn *c)
{
    const struct mt_path *p = c->active;
    if (!p->outstanding)
        return MT_NEVER;
    double timeout = mt_path_probe_timeout(p, c->max_ack_delay);
    double interval = timeout * (double)(1u << (c->pto_count < 16 ? c->pto_count : 16));
    double ceiling = (double)c->max_pto > timeout ? (double)c->max_pto : timeout;
    return p->last_eliciting_at + (mt_time)(interval < ceiling ? interval : ceiling);
}

static mt_time earliest_loss(const struct mt_conn *c)
{
    mt_time at = MT_NEVER;
    for (int i = 0; i < MT_PATHS; i++)
        if (c->paths[i].used && c->paths[i].loss_at < at)
            at = c->paths[i].loss_at;
    return at;
}

static mt_time wake_at(const struct mt_conn *c)
{
    if (!c->patience || c->woken || c->active->waiting_since == MT_NEVER)
        return MT_NEVER;
    return c->active->waiting_since + c->patience;
}

/* While a loss is to be declared on this very path there is no probe (RFC 9002 section 6.2.1). */
static mt_time probe_at(const struct mt_conn *c)
{
    const struct mt_path *p = c->active;
    return p->loss_at == MT_NEVER && mt_path_sendable(p) > 0 ? recovery_pto_at(c) : MT_NEVER;
}

mt_time recovery_timer(const struct mt_conn *c)
{
    mt_time at = earliest_loss(c), probe = probe_at(c);
    if (probe < at)
        at = probe;
    mt_time wake = wake_at(c);
    if (wake < at)
        at = wake;
    for (int i = 0; i < MT_PATHS; i++) {
        const struct mt_path *p = &c->paths[i];
        if (p->used && p->sample.pending && p->sampled_at + sample_spacing(p) < at)
            at = p->sampled_at + sample_spacing(p);
    }
    return at;
}

void recovery_on_timer(struct mt_conn *c, mt_time now)
{
    if (probe_at(c) <= now) {
        c->pto_count++;
        c->counters.ptos++;
        c->events |= MT_EVENT_PTO;
        /* The probe that follows restarts the clock; should none follow, do not spin. */
        c->active->last_eliciting_at = now;
    }
    for (int i = 0; i < MT_PATHS; i++)
        if (c->paths[i].used && c->paths[i].loss_at <= now)
            detect_loss(c, &c->paths[i], now);
    if (wake_at(c) <= now) {
        c->woken = true;
        c->events |= MT_EVENT_WAKE;
    }
    for (int i = 0; i < MT_PATHS; i++)
        if (c->paths[i].used)
            offer_sample(c, &c->paths[i], now);
}

/* ---- paths that go ---- */

void mt_conn_forgive(struct mt_conn *c, struct mt_path *p)
{
    for (uint64_t n = c->settled; n < c->number; n++) {
        struct mt_sent *s = sent_entry(c, n);
        if (s->state == MT_OUTSTANDING && s->path == p->index && s->flags & MT_SENT_IN_FLIGHT) {
            s->flags &= (uint16_t)~MT_SENT_IN_FLIGHT;
            p->in_flight -= s->size;
        }
    }
}

void mt_conn_abandon(struct mt_conn *c, struct mt_path *p)
{
    for (uint64_t n = c->settled; n < c->number; n++) {
        const struct mt_sent *s = sent_entry(c, n);
        if (s->state == MT_OUTSTANDING && s->path == p->index)
            give_up(c, p, n);
    }
    p->waiting_since = MT_NEVER;
    p->loss_at = MT_NEVER;
    p->scan = c->number;
    advance(c);
}

void mt_path_inherit(struct mt_path *p, const struct mt_path *from)
{
    p->window = from->window;
    p->pacing = from->pacing;
    p->has_rtt = from->has_rtt;
    p->rtt_latest = from->rtt_latest;
    p->rtt_min = from->rtt_min;
    p->rtt_smoothed = from->rtt_smoothed;
    p->rtt_variance = from->rtt_variance;
}
