#include "reassembly.h"

#include <stdlib.h>

#define MAX_PACKET 65535 /* bytes; an IP packet is never larger */
#define MAX_PACKETS 64   /* unfinished packets at a time */
#define MAX_BYTES (256u * 1024)
/* Longer than any reordering across a switch, shorter than an identifier's reuse. */
#define MAX_AGE (2 * MT_SECOND)

#define MIN_ROOM 2048u /* bytes: most packets that are cut are a little larger than a path's */

/* The parts lie where they belong, and a bit for every byte says whether it is there: so a part
 * costs what it is long, however many came before it. What a hostile peer can make this hold is
 * MAX_PACKETS times 72 KiB. */
struct packet {
    uint64_t identifier;
    mt_time since;
    uint8_t *data;
    uint64_t *there;
    uint32_t room;  /* bytes in `data`, a power of two; an eighth of it in `there` */
    uint32_t size;  /* bytes that are there */
    uint32_t end;   /* where the furthest part ends */
    uint32_t total; /* where the last part ends; 0 before it came */
};

struct mt_reassembler {
    struct packet packets[MAX_PACKETS + 1]; /* oldest first; one over until the bounds are kept */
    uint32_t count;
    uint32_t bytes;
    uint64_t discarded;
    uint8_t *whole; /* what the last call returned */
};

struct mt_reassembler *mt_reassembler_new(void)
{
    return calloc(1, sizeof(struct mt_reassembler));
}

void mt_reassembler_free(struct mt_reassembler *r)
{
    if (r == NULL)
        return;
    mt_reassembler_clear(r);
    free(r);
}

void mt_reassembler_clear(struct mt_reassembler *r)
{
    for (uint32_t i = 0; i < r->count; i++) {
        free(r->packets[i].data);
        free(r->packets[i].there);
    }
    r->count = 0;
    r->bytes = 0;
    free(r->whole);
    r->whole = NULL;
}

uint64_t mt_reassembler_discarded(const struct mt_reassembler *r) { return r->discarded; }

static void forget(struct mt_reassembler *r, struct packet *p)
{
    r->bytes -= p->size;
    free(p->data);
    free(p->there);
    r->count--;
    memmove(p, p + 1, (size_t)(r->packets + r->count - p) * sizeof *p);
}

static void discard(struct mt_reassembler *r, struct packet *p)
{
    forget(r, p);
    r->discarded++;
}

static struct packet *find(struct mt_reassembler *r, uint64_t identifier, mt_time now)
{
    struct packet *end = r->packets + r->count;
    for (struct packet *p = r->packets; p < end; p++)
        if (p->identifier == identifier)
            return p;
    r->count++;
    *end = (struct packet){.identifier = identifier, .since = now};
    return end;
}

static bool make_room(struct packet *p, uint32_t end)
{
    uint32_t room = p->room > 0 ? p->room : MIN_ROOM;
    while (room < end)
        room *= 2;
    if (room == p->room)
        return true;
    uint8_t *data = realloc(p->data, room);
    if (data == NULL)
        return false;
    p->data = data;
    uint64_t *there = realloc(p->there, room / 8);
    if (there == NULL)
        return false;
    p->there = there;
    memset((uint8_t *)there + p->room / 8, 0, (room - p->room) / 8);
    p->room = room;
    return true;
}

/* Notes that bytes `from` to `end` are there; false where one of them already was. */
static bool claim(struct packet *p, uint32_t from, uint32_t end)
{
    for (uint32_t at = from, next; at < end; at = next) {
        next = (at | 63) + 1;
        if (next > end)
            next = end;
        uint64_t bits = UINT64_MAX >> (64 - (next - at)) << (at & 63);
        if (p->there[at / 64] & bits)
            return false;
        p->there[at / 64] |= bits;
    }
    return true;
}

/* False where the part contradicts those before it, or there is no memory for it. */
static bool take_in(struct packet *p, uint32_t offset, bool last, const uint8_t *data,
                    uint32_t length)
{
    uint32_t end = offset + length;
    if (last && p->total != 0)
        return false;
    if (last)
        p->total = end;
    if (end > p->end)
        p->end = end;
    if (p->total != 0 && p->end > p->total)
        return false;
    if (!make_room(p, end) || !claim(p, offset, end))
        return false;
    memcpy(p->data + offset, data, length);
    p->size += length;
    return true;
}

const uint8_t *mt_reassembler_add(struct mt_reassembler *r, uint64_t identifier, uint64_t offset,
                                  bool last, const uint8_t *data, uint32_t length, mt_time now,
                                  uint32_t *total)
{
    free(r->whole);
    r->whole = NULL;
    *total = 0;
    if (length == 0 || length > MAX_PACKET || offset > MAX_PACKET - length)
        return NULL;
    while (r->count > 0 && now - r->packets[0].since > MAX_AGE)
        discard(r, r->packets);
    struct packet *p = find(r, identifier, now);
    if (!take_in(p, (uint32_t)offset, last, data, length)) {
        discard(r, p);
        return NULL;
    }
    r->bytes += length;
    if (p->size == p->total) {
        r->whole = p->data;
        p->data = NULL;
        *total = p->total;
        forget(r, p);
        return r->whole;
    }
    while (r->count > MAX_PACKETS || r->bytes > MAX_BYTES)
        discard(r, r->packets);
    return NULL;
}
