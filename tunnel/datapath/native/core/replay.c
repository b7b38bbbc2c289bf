/* Which datagrams are sent once more, on another path: those that left on a path that went, and
 * that nobody has acknowledged since.
 *
 * Each packet with a datagram remembers where the store has its payload; a copy remembers its root,
 * the number the datagram left in first. What becomes of a copy is put down to its root. What is to
 * be replayed is marked in the ring of sent packets, and found again by two cursors that run over
 * it: one for packets of sparse flows, which go first, and one for the rest.
 */
#include "internal.h"

/* Older ones are of no use: whoever sent them has sent them again, and the receiver's window of
 * delivered numbers is not much longer where packets are many. */
#define MAX_AGE (2 * MT_SECOND)

enum { SPARSE, REST };

static int class_of(const struct mt_sent *s) { return s->flags & MT_SENT_SPARSE ? SPARSE : REST; }

static uint64_t oldest(const struct mt_conn *c)
{
    return c->number >= c->ring_size ? c->number - c->ring_size + 1 : 0;
}

static bool undelivered(const struct mt_sent *s)
{
    return (s->flags & (MT_SENT_KEPT | MT_SENT_DELIVERED)) == MT_SENT_KEPT;
}

/* The root of a copy; NULL: something newer has taken its place. */
static struct mt_sent *root_of(const struct mt_conn *c, const struct mt_sent *copy)
{
    if (copy->stored < oldest(c))
        return NULL;
    struct mt_sent *root = sent_entry(c, copy->stored);
    return root->flags & MT_SENT_KEPT ? root : NULL;
}

bool mt_conn_pending(const struct mt_conn *c)
{
    return c->lane && !c->lane->held && (mt_conn_replays(c) || mt_lane_pending(c->lane));
}

uint32_t mt_conn_replays(const struct mt_conn *c)
{
    return c->replay.waiting[SPARSE] + c->replay.waiting[REST];
}

/* ---- what is scheduled ---- */

static void schedule(struct mt_conn *c, uint64_t number)
{
    struct mt_sent *s = sent_entry(c, number);
    int class = class_of(s);
    if (s->flags & MT_SENT_REPLAY)
        return;
    s->flags |= MT_SENT_REPLAY;
    if (!c->replay.waiting[class]++ || number < c->replay.from[class])
        c->replay.from[class] = number;
}

static void unschedule(struct mt_conn *c, struct mt_sent *s)
{
    if (!(s->flags & MT_SENT_REPLAY))
        return;
    s->flags &= (uint16_t)~MT_SENT_REPLAY;
    c->replay.waiting[class_of(s)]--;
}

/* It will never be replayed any more. */
static void give_up(struct mt_conn *c, struct mt_sent *s)
{
    unschedule(c, s);
    s->flags &= (uint16_t)~MT_SENT_KEPT;
    c->counters.replay_given_up++;
}

static bool replayable(const struct mt_conn *c, const struct mt_sent *s, mt_time now)
{
    return now - s->at <= MAX_AGE && mt_store_get(&c->store, s->stored);
}

/* Whether it left on the path that is still in use, where a loss is the inner transport's business
 * as in any other network. */
static bool in_use(const struct mt_conn *c, uint64_t number) { return number >= c->active_since; }

/* Whether it is on its way there already. */
static bool under_way(const struct mt_conn *c, uint64_t number, const struct mt_path *p)
{
    const struct mt_sent *s = sent_entry(c, number);
    return s->copied == p->index ||
           (p == c->active && in_use(c, number) && s->state == MT_OUTSTANDING);
}

bool replay_next(struct mt_conn *c, mt_time now, uint64_t *number)
{
    if (c->ring && c->number >= c->ring_size)
        replay_overwritten(c, sent_entry(c, c->number)); /* by what is about to leave */
    for (int class = SPARSE; class <= REST; class++) {
        uint64_t *n = &c->replay.from[class];
        if (*n < oldest(c))
            *n = oldest(c);
        for (; c->replay.waiting[class]; ++*n) {
            struct mt_sent *s = sent_entry(c, *n);
            if (!(s->flags & MT_SENT_REPLAY) || class_of(s) != class)
                continue;
            if (under_way(c, *n, c->replay.onto)) {
                unschedule(c, s);
            } else if (!replayable(c, s, now)) {
                give_up(c, s);
            } else {
                *number = *n;
                return true;
            }
        }
    }
    return false;
}

void replay_done(struct mt_conn *c, uint64_t number)
{
    unschedule(c, sent_entry(c, number));
}

void replay_handed_over(struct mt_conn *c, uint64_t number)
{
    struct mt_sent *s = sent_entry(c, number);
    unschedule(c, s);
    s->flags &= (uint16_t)~MT_SENT_KEPT;
}

void replay_give_up(struct mt_conn *c, uint64_t number) { give_up(c, sent_entry(c, number)); }

/* Schedules what it can of a root; whether it did. */
static bool consider(struct mt_conn *c, uint64_t number, const struct mt_path *onto, mt_time now)
{
    struct mt_sent *s = sent_entry(c, number);
    if (!undelivered(s) || under_way(c, number, onto))
        return false;
    if (replayable(c, s, now)) {
        schedule(c, number);
        return true;
    }
    /* What was lost long ago, while its path was in use, was the business of whoever sent it. */
    if (s->state == MT_OUTSTANDING || now - s->at <= MAX_AGE)
        give_up(c, s);
    return false;
}

int mt_conn_replay(struct mt_conn *c, struct mt_path *from, struct mt_path *onto, mt_time now)
{
    int count = 0;
    if ((from == onto && from != c->active) || !c->lane || !c->ring)
        return 0;
    if (from == onto) { /* the peer moved behind the same address: it begins anew */
        c->active_since = c->number;
        c->settling = true;
    }
    c->replay.onto = onto;
    for (uint64_t n = oldest(c); n < c->number; n++) {
        const struct mt_sent *s = sent_entry(c, n);
        struct mt_sent *root = s->flags & MT_SENT_COPY ? root_of(c, s) : NULL;
        if (s->path != from->index)
            continue;
        if (root && root->copied == from->index)
            root->copied = NO_PATH;
        if (s->flags & MT_SENT_KEPT)
            count += consider(c, n, onto, now);
        else if (root && s->state == MT_OUTSTANDING)
            count += consider(c, s->stored, onto, now); /* replayed here, and this path went too */
    }
    return count;
}

/* ---- keeping ---- */

/* Whether a payload that is stored below `position` may still be asked for. */
static bool wanted_below(struct mt_conn *c, uint64_t position, mt_time now)
{
    if (c->replay.oldest < oldest(c))
        c->replay.oldest = oldest(c);
    for (; c->replay.oldest < c->number; c->replay.oldest++) {
        const struct mt_sent *s = sent_entry(c, c->replay.oldest);
        if (!(s->flags & MT_SENT_KEPT))
            continue;
        if (s->stored >= position)
            return false;
        bool open = s->state == MT_OUTSTANDING || s->flags & MT_SENT_REPLAY;
        if (open && undelivered(s) && now - s->at <= MAX_AGE)
            return true;
    }
    return false;
}

uint8_t *replay_reserve(struct mt_conn *c, uint32_t length, mt_time now)
{
    while (c->store.bytes && wanted_below(c, mt_store_keeps(&c->store, length), now) &&
           mt_store_grow(&c->store))
        continue;
    return mt_store_reserve(&c->store, length);
}

/* ---- what became of them ---- */

static void delivered(struct mt_conn *c, struct mt_sent *root, bool by_replay)
{
    if (!(root->flags & MT_SENT_DELIVERED)) {
        unschedule(c, root);
        root->flags |= MT_SENT_DELIVERED | (by_replay ? MT_SENT_REPLAYED : 0);
    } else if (by_replay || root->flags & MT_SENT_REPLAYED) {
        c->counters.replay_needless++;
        root->flags &= (uint16_t)~MT_SENT_REPLAYED;
    }
}

void replay_acked(struct mt_conn *c, struct mt_sent *s)
{
    if (s->flags & MT_SENT_KEPT) {
        delivered(c, s, false);
    } else if (s->flags & MT_SENT_COPY) {
        struct mt_sent *root = root_of(c, s);
        s->flags &= (uint16_t)~MT_SENT_COPY; /* an acknowledgement is repeated, and counts once */
        if (root)
            delivered(c, root, s->flags & MT_SENT_REPLAYED);
    }
}

void replay_lost(struct mt_conn *c, uint64_t number)
{
    struct mt_sent *s = sent_entry(c, number), *root = s;
    if (s->flags & MT_SENT_COPY) {
        root = root_of(c, s);
        if (!root)
            return;
        if (root->copied == s->path)
            root->copied = NO_PATH;
        number = s->stored;
    }
    if (!c->lane || !undelivered(root) || in_use(c, number) || under_way(c, number, c->active))
        return;
    c->replay.onto = c->active;
    schedule(c, number);
}

uint64_t replay_floor(const struct mt_conn *c)
{
    uint64_t floor = c->settled;
    for (int class = SPARSE; class <= REST; class++)
        if (c->replay.waiting[class] && c->replay.from[class] < floor)
            floor = c->replay.from[class];
    return floor > oldest(c) ? floor : oldest(c);
}

/* ---- what goes ---- */

void replay_overwritten(struct mt_conn *c, struct mt_sent *s)
{
    if (s->flags & MT_SENT_REPLAY)
        give_up(c, s);
}

void replay_path_gone(struct mt_conn *c, const struct mt_path *p)
{
    if (c->replay.onto == p)
        c->replay.onto = c->active;
    for (uint64_t n = oldest(c); n < c->number; n++) {
        struct mt_sent *s = sent_entry(c, n);
        if (s->path == p->index)
            s->path = NO_PATH;
        if (s->copied == p->index)
            s->copied = NO_PATH;
    }
}

void replay_clear(struct mt_conn *c)
{
    for (uint64_t n = oldest(c); n < c->number; n++) {
        struct mt_sent *s = sent_entry(c, n);
        if (s->flags & MT_SENT_REPLAY)
            give_up(c, s);
        s->flags &= (uint16_t)~(MT_SENT_KEPT | MT_SENT_COPY);
    }
    mt_store_clear(&c->store);
}
