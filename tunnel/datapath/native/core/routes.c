#include "routes.h"

#include <stdlib.h>

#define IPV4_HEADER 20 /* bytes, without options */
#define IPV6_HEADER 40
#define LENGTHS 129 /* 0 .. 128 bits */

/* An address, its first bit the highest of `high`; IPv4 ends after 32 bits. */
struct address {
    uint64_t high, low;
};

struct prefix {
    struct address address;
    int owner;
};

/* All prefixes of one length, sorted by address. */
struct table {
    struct prefix *prefixes;
    size_t count, room;
};

struct family {
    struct table tables[LENGTHS];
    uint8_t lengths[LENGTHS]; /* those that have prefixes, longest first */
    int count;
};

struct mt_routes {
    struct family ipv4, ipv6;
};

struct mt_routes *mt_routes_new(void) { return calloc(1, sizeof(struct mt_routes)); }

static void family_free(struct family *f)
{
    for (int i = 0; i < LENGTHS; i++)
        free(f->tables[i].prefixes);
}

void mt_routes_free(struct mt_routes *r)
{
    if (r == NULL)
        return;
    family_free(&r->ipv4);
    family_free(&r->ipv6);
    free(r);
}

static struct address read_address(int version, const uint8_t *p)
{
    if (version == 4)
        return (struct address){(uint64_t)mt_get32(p) << 32, 0};
    return (struct address){mt_get64(p), mt_get64(p + 8)};
}

/* The highest `bits` bits set; a shift by 64 would be undefined. */
static uint64_t mask(int bits)
{
    return bits <= 0 ? 0 : bits >= 64 ? UINT64_MAX : ~(UINT64_MAX >> bits);
}

static struct address cut(struct address a, int length)
{
    return (struct address){a.high & mask(length), a.low & mask(length - 64)};
}

static bool below(struct address a, struct address b)
{
    return a.high != b.high ? a.high < b.high : a.low < b.low;
}

static bool same(struct address a, struct address b) { return a.high == b.high && a.low == b.low; }

/* Where `a` is, or would have to be. */
static size_t find(const struct table *t, struct address a)
{
    size_t from = 0, to = t->count;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (below(t->prefixes[middle].address, a))
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

static bool make_room(struct table *t)
{
    if (t->count < t->room)
        return true;
    size_t room = t->room > 0 ? 2 * t->room : 4;
    struct prefix *grown = reallocarray(t->prefixes, room, sizeof *grown);
    if (grown == NULL)
        return false;
    t->prefixes = grown;
    t->room = room;
    return true;
}

static void add_length(struct family *f, int length)
{
    int at = f->count++;
    for (; at > 0 && f->lengths[at - 1] < length; at--)
        f->lengths[at] = f->lengths[at - 1];
    f->lengths[at] = (uint8_t)length;
}

bool mt_routes_add(struct mt_routes *r, int version, const uint8_t *address, int prefix_length,
                   int owner)
{
    if ((version != 4 && version != 6) || owner < 0 || prefix_length < 0 ||
        prefix_length > (version == 4 ? 32 : 128))
        return false;
    struct family *f = version == 4 ? &r->ipv4 : &r->ipv6;
    struct table *t = &f->tables[prefix_length];
    struct address a = cut(read_address(version, address), prefix_length);
    size_t at = find(t, a);
    if (at < t->count && same(t->prefixes[at].address, a)) {
        t->prefixes[at].owner = owner;
        return true;
    }
    if (!make_room(t))
        return false;
    if (t->count == 0)
        add_length(f, prefix_length);
    memmove(t->prefixes + at + 1, t->prefixes + at, (t->count - at) * sizeof *t->prefixes);
    t->prefixes[at] = (struct prefix){a, owner};
    t->count++;
    return true;
}

static int owner_of(const struct family *f, struct address a)
{
    for (int i = 0; i < f->count; i++) {
        int length = f->lengths[i];
        const struct table *t = &f->tables[length];
        struct address wanted = cut(a, length);
        size_t at = find(t, wanted);
        if (at < t->count && same(t->prefixes[at].address, wanted))
            return t->prefixes[at].owner;
    }
    return -1;
}

/* The owner of the address at `at4` or `at6`, as the packet's version says. */
static int look_up(const struct mt_routes *r, const uint8_t *packet, uint32_t length, int at4,
                   int at6)
{
    if (!mt_well_formed(packet, length))
        return -1;
    if (packet[0] >> 4 == 4)
        return owner_of(&r->ipv4, read_address(4, packet + at4));
    return owner_of(&r->ipv6, read_address(6, packet + at6));
}

int mt_routes_destination(const struct mt_routes *r, const uint8_t *packet, uint32_t length)
{
    return look_up(r, packet, length, 16, 24);
}

int mt_routes_source(const struct mt_routes *r, const uint8_t *packet, uint32_t length)
{
    return look_up(r, packet, length, 12, 8);
}

bool mt_well_formed(const uint8_t *packet, uint32_t length)
{
    if (length < IPV4_HEADER)
        return false;
    if (packet[0] >> 4 == 4) {
        uint32_t header = (packet[0] & 0x0fu) * 4;
        return header >= IPV4_HEADER && header <= length && mt_get16(packet + 2) == length;
    }
    /* So no IPv6 jumbograms (RFC 2675), which no tunnel MTU admits anyway. */
    return packet[0] >> 4 == 6 && mt_get16(packet + 4) + (uint32_t)IPV6_HEADER == length;
}
