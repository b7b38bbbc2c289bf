#include "queue.h"

#include <stdlib.h>

/* Bytes of packets in memory; 6 ms at 5 Gbit/s, the most this engine moves. CoDel keeps a queue
 * that lasts far shorter than this; the limit is for memory and for bursts. */
#define MAX_BYTES (4u << 20)
/* Super-packets; the default of RFC 8290 section 5.2.3. Bounds the memory of small packets, which
 * occupy more than their bytes: 10240 of the 2 KiB class are 21 MiB. */
#define MAX_PACKETS 10240
/* RFC 8290 section 5.2.4: flow queues. They are found by hash in sets of 8, so that two flows
 * share one only when all 8 of the set are busy. */
#define FLOWS 1024
#define WAYS 8
/* RFC 8290 section 5.2.2 and 5.2.1, RFC 8289 section 4.3 and 4.4. */
#define TARGET (5 * MT_MILLISECOND)
#define INTERVAL (100 * MT_MILLISECOND)
/* Bytes; CoDel leaves a flow alone whose backlog is not more than one packet (RFC 8289 section
 * 5.5: MAXPACKET). An Ethernet frame, or the packet itself where that is larger. */
#define ONE_PACKET 1514
/* RFC 8290 section 5.2.5: bytes; and the limits of what a caller may ask for. */
#define DEFAULT_QUANTUM 1514
#define LEAST_QUANTUM 600
#define MOST_QUANTUM 65536
/* Bytes a second that a sparse flow may send for good: typing, name service, a phone call. */
#define SPARSE_RATE 32000.0
/* Bytes by which it may be ahead of that: enough for a burst of small packets, while of a flow that
 * sends full ones only the first three pass. */
#define SPARSE_BURST 4096.0
/* A flow that sent more is a sparse one again after this time of silence, however much it was. */
#define SPARSE_PAUSE MT_SECOND
/* Packets of each flow that are kept whatever their age while there is no path. */
#define NEWEST_PER_FLOW 2
/* Packets younger than this survive an outage even beyond the newest of their flow. */
#define FRESH (200 * MT_MILLISECOND)
/* Whoever sent a packet this old has sent it again. CoDel acts long before; this is for a path
 * that takes nothing for a while without being given up, and for the last packet of a flow. */
#define STALE MT_SECOND
/* Scans over the flows in one push that spare the newest packets of each flow. It takes one or
 * two; this bounds the work where very many flows have very little to spare. */
#define MAX_SPARING_SCANS 64

/* Bytes of IP packet that each class of memory holds, and how many of a class wait in the pool
 * for their next use; the pools together hold at most 9 MiB. */
#define CLASSES 5
#define BIG (CLASSES - 1)
static const uint32_t class_size[CLASSES] = {256, 2048, 8192, 32768, MT_VNET_SIZE + MT_MAX_IP};
static const uint32_t class_pool[CLASSES] = {1024, 1024, 64, 64, 64};

struct packet {
    struct packet *next, *previous; /* in its flow, the next to send first */
    mt_time at;                     /* when it came, or when a path came back to it */
    uint64_t order;                 /* rises by one with each packet */
    struct mt_super super;          /* points into data */
    uint32_t index;                 /* its next segment */
    uint32_t left;                  /* bytes not sent, the headers once */
    uint32_t class;
    uint8_t data[];
};

struct flow {
    struct packet *head, *tail;
    struct flow *next; /* in its list */
    uint64_t hash;
    uint64_t last; /* order of the packet that came last; 0: it was never used */
    uint32_t packets;
    uint32_t bytes;   /* not sent */
    uint32_t held;    /* the same with what was sent of the first packet */
    uint32_t revived; /* packets at the head that go before anything else after an outage */
    int32_t deficit;  /* RFC 8290 section 3.4: bytes it may send until its turn ends */
    double ahead;     /* bytes sent beyond the rate of a sparse flow */
    mt_time ahead_at;
    bool listed;
    /* RFC 8289 section 5.3. They outlive the backlog, for CoDel resumes where it was. */
    bool dropping;
    uint32_t count, last_count;
    mt_time first_above; /* MT_NEVER: the sojourn time is below TARGET */
    mt_time drop_next;
};

struct list {
    struct flow *head, *tail;
};

struct mt_queue {
    struct flow flows[FLOWS];
    struct list new_flows, old_flows; /* RFC 8290 section 3.3 */
    struct flow *due;                 /* its first segment was promised by a peek */
    uint32_t due_size;
    bool due_mark, due_sparse;
    uint64_t searched; /* no sparse flow waits with a packet up to this order */
    double sparse_rate; /* bytes per microsecond */
    bool holding;
    uint32_t quantum;
    uint32_t packets;
    uint64_t bytes, held, memory;
    uint64_t order, seed;
    struct packet *reserved;
    struct packet *pool[CLASSES];
    uint32_t pooled[CLASSES];
    struct mt_queue_counters counters;
};

_Static_assert(sizeof(struct mt_vnet) == MT_VNET_SIZE, "read from the device as it is");

/* ---- memory ---- */

static uint32_t class_of(uint32_t length)
{
    uint32_t class = 0;
    while (class < BIG && class_size[class] < length)
        class++;
    return class;
}

static struct packet *allocate(struct mt_queue *q, uint32_t class)
{
    struct packet *p = q->pool[class];
    if (p) {
        q->pool[class] = p->next;
        q->pooled[class]--;
        return p;
    }
    p = malloc(sizeof *p + class_size[class]);
    if (p) {
        p->class = class;
        q->memory += sizeof *p + class_size[class];
    }
    return p;
}

static void release(struct mt_queue *q, struct packet *p)
{
    if (q->pooled[p->class] < class_pool[p->class]) {
        p->next = q->pool[p->class];
        q->pool[p->class] = p;
        q->pooled[p->class]++;
        return;
    }
    q->memory -= sizeof *p + class_size[p->class];
    free(p);
}

/* ---- flows ---- */

/* Every bit of the input reaches every bit of the upper half, and the shift brings it down; the
 * constant is 2^64 divided by the golden ratio, made odd. */
static uint64_t mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

/* Protocols whose header begins with two ports. */
static bool has_ports(uint8_t protocol)
{
    return protocol == 6 || protocol == 17 || protocol == 33 /* DCCP */ ||
           protocol == 132 /* SCTP */ || protocol == 136 /* UDP-Lite */;
}

uint64_t mt_queue_flow(const struct mt_queue *q, const uint8_t *packet, uint32_t length)
{
    uint64_t hash = q->seed;
    uint8_t protocol = 0;
    uint32_t addresses = 0, size = 0, l4 = length;
    if (length >= 20 && packet[0] >> 4 == 4) {
        addresses = 12;
        size = 8;
        protocol = packet[9];
        /* RFC 791: more fragments follow, or an offset. Only the first has ports. */
        if ((mt_get16(packet + 6) & 0x3fff) == 0)
            l4 = (packet[0] & 0x0fu) * 4;
    } else if (length >= 40 && packet[0] >> 4 == 6) {
        addresses = 8;
        size = 32;
        protocol = packet[6];
        l4 = 40;
    }
    for (uint32_t i = 0; i < size; i += 8)
        hash = mix(hash, mt_get64(packet + addresses + i));
    uint64_t ports = 0;
    if (has_ports(protocol) && l4 + 4 <= length)
        ports = mt_get32(packet + l4);
    return mix(mix(hash, (uint64_t)protocol << 32 | ports), 0);
}

static void append(struct list *list, struct flow *f)
{
    f->next = NULL;
    f->listed = true;
    if (list->tail)
        list->tail->next = f;
    else
        list->head = f;
    list->tail = f;
}

static struct flow *pop(struct list *list)
{
    struct flow *f = list->head;
    list->head = f->next;
    if (!list->head)
        list->tail = NULL;
    f->listed = false;
    return f;
}

static struct flow *find_flow(struct mt_queue *q, uint64_t hash)
{
    struct flow *set = &q->flows[hash % (FLOWS / WAYS) * WAYS];
    struct flow *unused = NULL;
    for (struct flow *f = set; f < set + WAYS; f++) {
        if (f->hash == hash && f->last)
            return f;
        if (!f->listed && (!unused || f->last < unused->last))
            unused = f;
    }
    if (!unused)
        return &set[(hash >> 32) % WAYS];
    *unused = (struct flow){.hash = hash, .first_above = MT_NEVER};
    return unused;
}

/* ---- packets of a flow ---- */

static void insert_before(struct flow *f, struct packet *p, struct packet *at)
{
    p->next = at;
    p->previous = at ? at->previous : f->tail;
    *(p->previous ? &p->previous->next : &f->head) = p;
    *(at ? &at->previous : &f->tail) = p;
}

static void detach(struct flow *f, struct packet *p)
{
    *(p->previous ? &p->previous->next : &f->head) = p->next;
    *(p->next ? &p->next->previous : &f->tail) = p->previous;
}

/* Takes a packet with what is left of it out of the flow and gives its memory back. */
static void discard(struct mt_queue *q, struct flow *f, struct packet *p)
{
    detach(f, p);
    f->packets--;
    f->bytes -= p->left;
    f->held -= p->super.length;
    q->packets--;
    q->bytes -= p->left;
    q->held -= p->super.length;
    release(q, p);
}

/* The first of those that go first has gone. */
static void count_revived(struct flow *f)
{
    /* With the last of them the turn ends, so that they all go before what is merely fresh. */
    if (f->revived && --f->revived == 0 && f->deficit > 0)
        f->deficit = 0;
}

static void drop(struct mt_queue *q, struct flow *f, struct packet *p)
{
    q->counters.dropped += p->super.count - p->index;
    discard(q, f, p);
}

/* Bytes that leave the queue with the next segment of a packet: the headers go with the last. */
static uint32_t share(const struct packet *p)
{
    if (p->index + 1 >= p->super.count)
        return p->left;
    return mt_super_size(&p->super, p->index) - p->super.header;
}

/* The flow's next segment is done with. */
static void advance(struct mt_queue *q, struct flow *f)
{
    struct packet *p = f->head;
    uint32_t bytes = share(p);
    p->left -= bytes;
    f->bytes -= bytes;
    q->bytes -= bytes;
    if (++p->index >= p->super.count) {
        discard(q, f, p);
        count_revived(f);
    }
}

/* ---- overflow ---- */

static bool overflows(const struct mt_queue *q)
{
    return q->held > MAX_BYTES || q->packets > MAX_PACKETS;
}

/* Bytes of a flow that may be dropped: not what was promised by a peek, and, to spare the newest,
 * not these. */
static uint32_t droppable(const struct mt_queue *q, const struct flow *f, bool spare)
{
    uint32_t bytes = f->held;
    if (spare) {
        const struct packet *p = f->tail;
        for (int i = 0; p && i < NEWEST_PER_FLOW; i++, p = p->previous)
            bytes -= p->super.length;
    } else if (f == q->due) {
        bytes -= f->head->super.length;
    }
    return bytes;
}

static struct flow *fattest(const struct mt_queue *q, bool spare, uint32_t *scanned)
{
    struct flow *found = NULL;
    uint32_t most = 0;
    const struct list *lists[] = {&q->new_flows, &q->old_flows};
    *scanned = 0;
    for (int i = 0; i < 2; i++)
        for (struct flow *f = lists[i]->head; f; f = f->next, ++*scanned) {
            uint32_t bytes = droppable(q, f, spare);
            if (bytes > most) {
                most = bytes;
                found = f;
            }
        }
    return found;
}

static void drop_oldest(struct mt_queue *q, struct flow *f)
{
    struct packet *p = f->head;
    /* The revived are the newest of their time. */
    uint32_t skip = f->revived ? f->revived : f == q->due;
    while (skip-- && p->next)
        p = p->next;
    bool revived = f->revived >= f->packets;
    drop(q, f, p);
    if (revived)
        count_revived(f);
}

/* RFC 8290 section 4.1.3: drop from the head of the fattest flow. */
static void shed(struct mt_queue *q)
{
    for (int scans = 0; overflows(q); scans++) {
        bool spare = q->holding && scans < MAX_SPARING_SCANS;
        uint32_t scanned;
        struct flow *f = fattest(q, spare, &scanned);
        if (!f && spare) {
            spare = false;
            f = fattest(q, spare, &scanned);
        }
        if (!f)
            return;
        /* Where the search was long, drop some more, so that it is not made for each packet; but
         * never more than the half. */
        uint32_t more = scanned / 64;
        uint32_t half = droppable(q, f, spare) / 2;
        do
            drop_oldest(q, f);
        while (droppable(q, f, spare) > half && (overflows(q) || more-- > 0));
    }
}

/* ---- arrival ---- */

/* Takes in an opened packet that is in its final memory. */
static void enqueue(struct mt_queue *q, struct packet *p, mt_time now)
{
    struct flow *f = find_flow(q, mt_queue_flow(q, p->super.packet, p->super.length));
    p->at = now;
    p->order = ++q->order;
    p->index = 0;
    p->left = p->super.length;
    insert_before(f, p, NULL);
    f->last = p->order;
    f->packets++;
    f->bytes += p->left;
    f->held += p->left;
    q->packets++;
    q->bytes += p->left;
    q->held += p->left;
    if (!f->listed) {
        f->deficit = (int32_t)q->quantum;
        append(&q->new_flows, f);
    }
    shed(q);
}

uint8_t *mt_queue_reserve(struct mt_queue *q)
{
    if (!q->reserved)
        q->reserved = allocate(q, BIG);
    return q->reserved ? q->reserved->data : NULL;
}

void mt_queue_commit(struct mt_queue *q, uint32_t length, mt_time now)
{
    struct packet *p = q->reserved;
    if (!p || length == 0)
        return;
    struct mt_vnet vnet;
    if (length <= MT_VNET_SIZE || length > class_size[BIG]) {
        q->counters.malformed++;
        return;
    }
    memcpy(&vnet, p->data, MT_VNET_SIZE);
    length -= MT_VNET_SIZE;
    if (!mt_super_open(&p->super, &vnet, p->data + MT_VNET_SIZE, length)) {
        q->counters.malformed++;
        return;
    }
    uint32_t class = class_of(length);
    if (class == BIG) {
        q->reserved = NULL;
    } else {
        /* A small packet must not hold a big buffer: a flood of them would hold them all. */
        struct packet *small = allocate(q, class);
        if (!small) {
            q->counters.dropped += p->super.count;
            return;
        }
        small->super = p->super;
        small->super.packet = small->data;
        memcpy(small->data, p->super.packet, length);
        p = small;
    }
    enqueue(q, p, now);
}

void mt_queue_push(struct mt_queue *q, const struct mt_vnet *vnet, const uint8_t *packet,
                   uint32_t length, mt_time now)
{
    static const struct mt_vnet plain;
    if (length == 0 || length > MT_MAX_IP) {
        q->counters.malformed++;
        return;
    }
    struct packet *p = allocate(q, class_of(length));
    if (!p) {
        q->counters.dropped++;
        return;
    }
    memcpy(p->data, packet, length);
    if (!mt_super_open(&p->super, vnet ? vnet : &plain, p->data, length)) {
        q->counters.malformed++;
        release(q, p);
        return;
    }
    enqueue(q, p, now);
}

/* ---- CoDel ---- */

static mt_time control_law(mt_time from, uint32_t count)
{
    /* RFC 8289 section 5.5: INTERVAL / sqrt(count), here the whole root of INTERVAL^2 / count. */
    uint64_t square = (uint64_t)(INTERVAL * INTERVAL) / count;
    uint64_t root = 0;
    for (uint64_t bit = 1u << 17; bit; bit >>= 1)
        if ((root | bit) * (root | bit) <= square)
            root |= bit;
    return from + (mt_time)root;
}

/* RFC 8289 section 5.6, dodequeue(): whether the sojourn time was above TARGET for INTERVAL. */
static bool stands(struct flow *f, mt_time now)
{
    const struct packet *p = f->head;
    uint32_t size = mt_super_size(&p->super, p->index);
    if (now - p->at < TARGET || f->bytes - share(p) <= (size > ONE_PACKET ? size : ONE_PACKET)) {
        f->first_above = MT_NEVER;
        return false;
    }
    if (f->first_above == MT_NEVER) {
        f->first_above = now + INTERVAL;
        return false;
    }
    return now >= f->first_above;
}

static uint8_t ecn(const struct packet *p)
{
    const uint8_t *ip = p->super.packet;
    return p->super.version == 4 ? ip[1] & 3 : ip[1] >> 4 & 3;
}

/* Marks an IP packet "congestion experienced" (RFC 3168 section 5). */
static void mark(uint8_t *ip)
{
    if (ip[0] >> 4 == 6) {
        ip[1] |= 3 << 4;
        return;
    }
    uint32_t before = mt_get16(ip);
    ip[1] |= 3;
    /* RFC 1624 section 3. */
    uint32_t sum = (~mt_get16(ip + 10) & 0xffffu) + (~before & 0xffffu) + mt_get16(ip);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    mt_put16(ip + 10, ~sum);
}

/* Tells the flow's sender of the congestion: by a mark on its next segment where it can read it
 * (then true), else by dropping that segment. Only for a flow that has more. */
static bool tell_sender(struct mt_queue *q, struct flow *f)
{
    if (ecn(f->head))
        return true;
    advance(q, f);
    q->counters.codel++;
    return false;
}

/* Whether a flow that has a packet sends little. */
static bool is_sparse(const struct mt_queue *q, struct flow *f, mt_time now)
{
    if (now > f->ahead_at) {
        f->ahead -= q->sparse_rate * (double)(now - f->ahead_at);
        if (f->ahead < 0)
            f->ahead = 0;
        f->ahead_at = now;
    }
    return f->ahead <= SPARSE_BURST && f->head->super.count == 1;
}

/* RFC 8289 section 5.5, deque(), up to the packet that it would return. False: the flow is empty. */
static bool decide(struct mt_queue *q, struct flow *f, mt_time now)
{
    bool marked = false;
    while (f->head && now - f->head->at > STALE) {
        drop(q, f, f->head);
        count_revived(f);
    }
    if (!f->head) {
        f->first_above = MT_NEVER;
        f->dropping = false;
        return false;
    }
    bool standing = stands(f, now);
    if (f->dropping) {
        f->dropping = standing;
        while (f->dropping && !marked && now >= f->drop_next) {
            f->count += f->count < UINT32_MAX;
            marked = tell_sender(q, f);
            if (!marked)
                f->dropping = stands(f, now);
            if (f->dropping)
                f->drop_next = control_law(f->drop_next, f->count);
        }
    } else if (standing) {
        marked = tell_sender(q, f);
        if (!marked)
            stands(f, now);
        f->dropping = true;
        /* It was dropping until lately: begin near the rate that was right then. */
        uint32_t delta = f->count - f->last_count;
        f->count = delta > 1 && now - f->drop_next < 16 * INTERVAL ? delta : 1;
        f->drop_next = control_law(now, f->count);
        f->last_count = f->count;
    }
    q->due_mark = marked;
    q->due_size = mt_super_size(&f->head->super, f->head->index);
    q->due_sparse = is_sparse(q, f, now);
    return true;
}

/* ---- departure ---- */

uint32_t mt_queue_peek(struct mt_queue *q, mt_time now)
{
    if (q->holding)
        return 0;
    if (q->due && now - q->due->head->at <= STALE)
        return q->due_size;
    q->due = NULL;
    for (;;) {
        /* RFC 8290 section 4.2. */
        struct list *list = q->new_flows.head ? &q->new_flows : &q->old_flows;
        struct flow *f = list->head;
        if (!f)
            return 0;
        if (f->deficit <= 0) {
            f->deficit += (int32_t)q->quantum;
            /* There are few of the revived; until they are gone the flow need not queue behind
             * those that have merely fresh ones. */
            append(f->revived ? &q->new_flows : &q->old_flows, pop(list));
            continue;
        }
        if (decide(q, f, now)) {
            q->due = f;
            return q->due_size;
        }
        pop(list);
        /* Lest a flow that sends now and then comes first every time. */
        if (list == &q->new_flows && q->old_flows.head)
            append(&q->old_flows, f);
    }
}

bool mt_queue_sparse(const struct mt_queue *q) { return q->due_sparse; }

/* Drops what is stale of this flow; then whether its next packet is that of a sparse one. */
static bool try_sparse(struct mt_queue *q, struct flow *f, mt_time now)
{
    if (!f->head || !is_sparse(q, f, now))
        return false;
    q->due = NULL;
    if (!decide(q, f, now) || !q->due_sparse)
        return false;
    q->due = f;
    return true;
}

uint32_t mt_queue_peek_sparse(struct mt_queue *q, mt_time now)
{
    if (q->holding)
        return 0;
    if (q->due && q->due_sparse && now - q->due->head->at <= STALE)
        return q->due_size;
    if (q->searched == q->order)
        return 0;
    const struct list *lists[] = {&q->new_flows, &q->old_flows};
    for (int i = 0; i < 2; i++)
        for (struct flow *f = lists[i]->head; f; f = f->next)
            if (try_sparse(q, f, now))
                return q->due_size;
    q->searched = q->order;
    return 0;
}

void mt_queue_take(struct mt_queue *q, uint8_t *out)
{
    struct flow *f = q->due;
    if (!f)
        return;
    mt_super_cut(&f->head->super, f->head->index, out);
    if (q->due_mark) {
        mark(out);
        q->counters.marked++;
    }
    q->due = NULL;
    f->deficit -= (int32_t)q->due_size;
    f->ahead += q->due_size;
    if (f->ahead > SPARSE_BURST + q->sparse_rate * SPARSE_PAUSE)
        f->ahead = SPARSE_BURST + q->sparse_rate * SPARSE_PAUSE;
    advance(q, f);
}

/* ---- outages ---- */

/* Puts the packets that a recovery had put first back where they came from. */
static void restore_order(struct flow *f)
{
    for (; f->revived; f->revived--) {
        struct packet *p = f->head;
        for (uint32_t i = 1; i < f->revived; i++)
            p = p->next;
        struct packet *at = p->next;
        while (at && at->order < p->order)
            at = at->next;
        detach(f, p);
        insert_before(f, p, at);
    }
}

void mt_queue_hold(struct mt_queue *q)
{
    if (q->holding)
        return;
    q->holding = true;
    q->due = NULL;
    for (int i = 0; i < FLOWS; i++)
        restore_order(&q->flows[i]);
}

static int by_newest(const void *a, const void *b)
{
    uint64_t first = (*(struct flow *const *)a)->tail->order;
    uint64_t second = (*(struct flow *const *)b)->tail->order;
    return (first > second) - (first < second);
}

/* Drops what is neither among the newest of the flow nor fresh, and puts the newest first. */
static void revive(struct mt_queue *q, struct flow *f, mt_time now)
{
    struct packet *next, *newest = f->tail;
    for (uint32_t i = 1; i < NEWEST_PER_FLOW && newest->previous; i++)
        newest = newest->previous;
    for (struct packet *p = f->head; p != newest; p = next) {
        next = p->next;
        if (now - p->at > FRESH)
            drop(q, f, p);
    }
    struct packet *first = f->head;
    for (struct packet *p = newest; p; p = next) {
        next = p->next;
        if (first != newest) {
            detach(f, p);
            insert_before(f, p, first);
        }
        f->revived++;
    }
    /* Their age is the path's fault. */
    for (struct packet *p = f->head; p; p = p->next)
        p->at = now;
}

void mt_queue_recover(struct mt_queue *q, mt_time now)
{
    struct flow *waiting[FLOWS];
    size_t count = 0;
    q->holding = false;
    q->due = NULL;
    q->searched = 0;
    q->new_flows = q->old_flows = (struct list){0};
    for (int i = 0; i < FLOWS; i++) {
        struct flow *f = &q->flows[i];
        f->listed = false;
        f->dropping = false;
        f->first_above = MT_NEVER;
        restore_order(f);
        if (f->head)
            waiting[count++] = f;
    }
    if (count)
        qsort(waiting, count, sizeof *waiting, by_newest);
    for (size_t i = 0; i < count; i++) {
        revive(q, waiting[i], now);
        waiting[i]->deficit = (int32_t)q->quantum;
        append(&q->new_flows, waiting[i]);
    }
}

/* ---- the whole ---- */

struct mt_queue *mt_queue_new(void)
{
    struct mt_queue *q = calloc(1, sizeof *q);
    if (q) {
        q->quantum = DEFAULT_QUANTUM;
        q->sparse_rate = SPARSE_RATE / MT_SECOND;
        q->memory = sizeof *q;
    }
    return q;
}

void mt_queue_free(struct mt_queue *q)
{
    if (!q)
        return;
    for (int i = 0; i < FLOWS; i++)
        while (q->flows[i].head)
            discard(q, &q->flows[i], q->flows[i].head);
    if (q->reserved)
        release(q, q->reserved);
    for (int i = 0; i < CLASSES; i++)
        while (q->pool[i]) {
            struct packet *p = q->pool[i];
            q->pool[i] = p->next;
            free(p);
        }
    free(q);
}

bool mt_queue_empty(const struct mt_queue *q) { return q->packets == 0; }

uint64_t mt_queue_bytes(const struct mt_queue *q) { return q->bytes; }

uint32_t mt_queue_packets(const struct mt_queue *q) { return q->packets; }

uint64_t mt_queue_memory(const struct mt_queue *q) { return q->memory; }

const struct mt_queue_counters *mt_queue_counters(const struct mt_queue *q)
{
    return &q->counters;
}

void mt_queue_set_quantum(struct mt_queue *q, uint32_t bytes)
{
    q->quantum = bytes < LEAST_QUANTUM ? LEAST_QUANTUM : bytes > MOST_QUANTUM ? MOST_QUANTUM : bytes;
}

void mt_queue_set_seed(struct mt_queue *q, uint64_t seed) { q->seed = seed; }

void mt_queue_set_sparse(struct mt_queue *q, double rate)
{
    q->sparse_rate = (rate > SPARSE_RATE ? rate : SPARSE_RATE) / MT_SECOND;
}
