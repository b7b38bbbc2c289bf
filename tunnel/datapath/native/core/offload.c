/* Segmentation and coalescing of super-packets, and the Internet checksum under both. */
#include "offload.h"

#include <stdlib.h>

enum { TCP = 6, UDP = 17, ICMPV6 = 58 }; /* IANA protocol numbers */
enum { HOP_BY_HOP = 0, DESTINATION_OPTIONS = 60 };
enum { IPV4_HEADER = 20, IPV6_HEADER = 40, TCP_HEADER = 20, UDP_HEADER = 8 };
enum { TCP_CHECKSUM = 16, UDP_CHECKSUM = 6 }; /* offset of the field in the header */
enum { FIN = 0x01, PSH = 0x08, ACK = 0x10, CWR = 0x80 };

/* IPv4's flags and fragment offset in one word. */
#define DONT_FRAGMENT 0x4000u

/* ---- Checksum ---- */

/* Four 32-bit lanes: a generic vector, two SSE2 or NEON instructions where the machine has them. */
typedef uint32_t lanes __attribute__((vector_size(16)));

/* Bytes summed before the lanes, which take two 16-bit words of every 32 bytes, are emptied. */
#define BLOCK 65536u

static inline uint64_t add_lanes(lanes low, lanes high)
{
    uint64_t sum = 0;
    for (int i = 0; i < 4; i++)
        sum += low[i] + ((uint64_t)high[i] << 16);
    return sum;
}

/* Sums `n` bytes and, unless `out` is NULL, copies them there in the same pass. The words are
 * loaded in memory order, and the sum is swapped once at the end (RFC 1071 section 2 (B)). */
static inline uint16_t copy_and_sum(uint8_t *restrict out, const uint8_t *restrict in, size_t n)
{
    uint64_t sum = 0;
    while (n >= 32) {
        size_t block = n < BLOCK ? n & ~(size_t)31 : BLOCK;
        lanes low = {0}, high = {0}, low2 = {0}, high2 = {0};
        for (const uint8_t *end = in + block; in < end; in += 32) {
            lanes a, b;
            memcpy(&a, in, 16);
            memcpy(&b, in + 16, 16);
            if (out) {
                memcpy(out, &a, 16);
                memcpy(out + 16, &b, 16);
                out += 32;
            }
            low += a & 0xffff;
            high += a >> 16;
            low2 += b & 0xffff;
            high2 += b >> 16;
        }
        sum += add_lanes(low + low2, high + high2);
        n -= block;
    }
    if (out)
        memcpy(out, in, n);
    for (; n >= 4; n -= 4, in += 4) {
        uint32_t word;
        memcpy(&word, in, 4);
        sum += word;
    }
    if (n >= 2) {
        uint16_t word;
        memcpy(&word, in, 2);
        sum += word;
        n -= 2;
        in += 2;
    }
    if (n)
        sum += in[0]; /* as if a zero byte followed */
    return __builtin_bswap16(mt_checksum_fold(sum));
}

uint64_t mt_checksum_add(const uint8_t *data, size_t n, uint64_t sum)
{
    return sum + copy_and_sum(NULL, data, n);
}

uint16_t mt_checksum_fold(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

uint64_t mt_checksum_pseudo(const uint8_t *ip, uint8_t protocol, uint32_t upper_length)
{
    uint64_t sum = (uint64_t)protocol + upper_length;
    return ip[0] >> 4 == 6 ? mt_checksum_add(ip + 8, 32, sum) : mt_checksum_add(ip + 12, 8, sum);
}

static void put_ipv4_checksum(uint8_t *ip, uint32_t header)
{
    mt_put16(ip + 10, 0);
    mt_put16(ip + 10, (uint16_t)~mt_checksum_fold(mt_checksum_add(ip, header, 0)));
}

/* ---- Segmentation ---- */

/* Bytes of the IP header without IPv6 extension headers; 0 where it is not complete. */
static uint32_t ip_header(const uint8_t *packet, uint32_t length)
{
    if (length >= IPV4_HEADER && packet[0] >> 4 == 4) {
        uint32_t header = (packet[0] & 15u) * 4;
        return header >= IPV4_HEADER && header <= length ? header : 0;
    }
    return length >= IPV6_HEADER && packet[0] >> 4 == 6 ? IPV6_HEADER : 0;
}

/* Whether `protocol` begins at `l4`, which is within the packet by 8 bytes or more, behind
 * extension headers that every segment may repeat. Not behind a routing header: the pseudo header
 * would need its last address (RFC 8200 section 8.1). */
static bool reaches(const uint8_t *packet, uint32_t header, uint32_t l4, uint8_t protocol)
{
    if (packet[0] >> 4 == 4)
        return l4 == header && packet[9] == protocol &&
               (mt_get16(packet + 6) & ~DONT_FRAGMENT) == 0;
    uint8_t next = packet[6];
    uint32_t at = header;
    while (at < l4) {
        if (next != HOP_BY_HOP && next != DESTINATION_OPTIONS)
            return false;
        next = packet[at];
        at += (packet[at + 1] + 1u) * 8;
    }
    return at == l4 && next == protocol;
}

/* What the device left to us (CHECKSUM_PARTIAL): the field holds the pseudo header's sum. */
static bool complete_checksum(const struct mt_vnet *vnet, uint32_t header, uint8_t *packet,
                              uint32_t length)
{
    uint32_t start = vnet->csum_start;
    uint32_t field = start + vnet->csum_offset;
    if (start < header || field + 2 > length)
        return false;
    uint16_t sum = (uint16_t)~mt_checksum_fold(mt_checksum_add(packet + start, length - start, 0));
    /* Zero means "no checksum" in UDP (RFC 768); to every other protocol the two are the same. */
    mt_put16(packet + field, sum ? sum : 0xffff);
    return true;
}

static bool open_whole(const struct mt_vnet *vnet, uint32_t header, uint8_t *packet,
                       uint32_t length)
{
    uint32_t said = packet[0] >> 4 == 4 ? mt_get16(packet + 2)
                                        : IPV6_HEADER + (uint32_t)mt_get16(packet + 4);
    if (said != length)
        return false;
    return !(vnet->flags & MT_VNET_NEEDS_CSUM) || complete_checksum(vnet, header, packet, length);
}

static bool open_super(struct mt_super *s, const struct mt_vnet *vnet, uint32_t header)
{
    uint8_t type = vnet->gso_type & (uint8_t)~MT_GSO_ECN;
    if (type == MT_GSO_TCPV4 || type == MT_GSO_TCPV6) {
        if (s->version != (type == MT_GSO_TCPV4 ? 4 : 6))
            return false;
        s->protocol = TCP;
    } else if (type == MT_GSO_UDP_L4) {
        s->protocol = UDP;
    } else {
        return false;
    }
    /* The kernel sums no super-packet before it is cut, so this flag is always set; without it
     * nothing says where the TCP or UDP header begins. */
    if (!(vnet->flags & MT_VNET_NEEDS_CSUM))
        return false;
    if (vnet->csum_offset != (s->protocol == TCP ? TCP_CHECKSUM : UDP_CHECKSUM))
        return false;
    s->l4 = vnet->csum_start;
    uint32_t least = s->protocol == TCP ? TCP_HEADER : UDP_HEADER;
    if (s->l4 < header || s->l4 + least > s->length)
        return false;
    if (!reaches(s->packet, header, s->l4, s->protocol))
        return false;
    /* hdr_len is a hint, and has been wrong: the TCP header knows. */
    uint32_t upper = s->protocol == TCP ? (s->packet[s->l4 + 12] >> 4) * 4u : UDP_HEADER;
    s->header = s->l4 + upper;
    s->mss = vnet->gso_size;
    if (upper < least || s->header >= s->length || s->mss == 0 || s->header + s->mss > MT_MAX_IP)
        return false;
    s->count = (s->length - s->header + s->mss - 1) / s->mss;
    return true;
}

bool mt_super_open(struct mt_super *s, const struct mt_vnet *vnet, uint8_t *packet, uint32_t length)
{
    uint32_t header = length <= MT_MAX_IP ? ip_header(packet, length) : 0;
    if (!header)
        return false;
    *s = (struct mt_super){
        .packet = packet, .length = length, .count = 1, .version = packet[0] >> 4};
    if (vnet->gso_type == MT_GSO_NONE)
        return open_whole(vnet, header, packet, length);
    return open_super(s, vnet, header);
}

uint32_t mt_super_size(const struct mt_super *s, uint32_t index)
{
    if (!s->header)
        return s->length;
    if (index + 1 < s->count)
        return s->header + s->mss;
    return s->length - index * s->mss;
}

void mt_super_cut(const struct mt_super *s, uint32_t index, uint8_t *out)
{
    if (!s->header) {
        memcpy(out, s->packet, s->length);
        return;
    }
    uint32_t size = mt_super_size(s, index);
    uint32_t offset = index * s->mss;
    memcpy(out, s->packet, s->header);
    uint64_t sum = copy_and_sum(out + s->header, s->packet + s->header + offset, size - s->header);

    if (s->version == 4) {
        mt_put16(out + 2, size);
        mt_put16(out + 4, mt_get16(out + 4) + index);
        put_ipv4_checksum(out, (out[0] & 15u) * 4);
    } else {
        mt_put16(out + 4, size - IPV6_HEADER);
    }

    uint8_t *upper = out + s->l4;
    uint8_t *field = upper + (s->protocol == TCP ? TCP_CHECKSUM : UDP_CHECKSUM);
    if (s->protocol == TCP) {
        mt_put32(upper + 4, mt_get32(upper + 4) + offset);
        if (index + 1 < s->count)
            upper[13] &= (uint8_t)~(FIN | PSH);
        if (index > 0)
            upper[13] &= (uint8_t)~CWR; /* said once (RFC 3168 section 6.1.2) */
    } else {
        mt_put16(upper + 4, size - s->l4);
    }
    mt_put16(field, 0);
    sum += mt_checksum_pseudo(out, s->protocol, size - s->l4);
    sum = mt_checksum_add(upper, s->header - s->l4, sum);
    uint16_t checksum = (uint16_t)~mt_checksum_fold(sum);
    if (s->protocol == UDP && checksum == 0)
        checksum = 0xffff; /* zero means "no checksum" (RFC 768) */
    mt_put16(field, checksum);
}

/* ---- Coalescing ----
 *
 * A group is what one write carries: one packet, or several of one flow. A flow has at most one
 * open group, which its next packet may join, and it is the flow's newest; whatever of the flow
 * cannot join closes it. So writing the groups in the order they began keeps every flow's order.
 *
 * Open groups are found in a table of rows (by addresses) of sets (by ports) of a few ways, as in
 * a processor's cache: a fixed amount of work whatever the packets are, and dropping a group from
 * the table is all that closing takes. Losing one to a newcomer costs a merge, never the order.
 */

/* Received packets held, several of a socket's largest batches (45 full packets each). */
#define MAX_PARTS 512
#define MAX_GROUPS 256
/* Packets in one group. UDP: the kernel takes no more (UDP_MAX_SEGMENTS, <linux/udp.h>). TCP: 64
 * KiB of the smallest segments that are worth it (536 bytes, RFC 9293 section 3.7.1). */
#define MAX_UDP 64
#define MAX_TCP 128
#define ROWS 16
#define SETS 16
#define WAYS 4
#define NONE 0xffff

struct part {
    uint8_t *data;
    uint32_t length;
    uint16_t next; /* of the same group */
};

struct group {
    uint32_t tag;      /* of the flow: tells most others apart without touching packets */
    uint32_t total;    /* bytes of the IP packet */
    uint32_t sequence; /* TCP: what the next packet begins with */
    uint32_t size;     /* payload bytes of each packet, but a shorter last one */
    uint32_t header;   /* IP and TCP/UDP header together */
    uint16_t first, last; /* parts */
    uint16_t count;
    uint8_t l4;
    uint8_t protocol;
    bool verified; /* the first packet's checksums are right */
    bool push;     /* the last packet has PSH */
};

struct mt_coalescer {
    uint32_t parts_used, groups_used;
    bool tcp, udp;
    uint16_t open[ROWS][SETS][WAYS]; /* groups */
    struct part parts[MAX_PARTS];
    struct group groups[MAX_GROUPS];
    struct iovec vector[1 + MAX_TCP]; /* of one write; the first entry is the writer's */
};

/* What can be done with a packet. */
enum kind {
    ALONE,   /* nothing that is merged can be of its flow */
    OPAQUE,  /* nothing is known of its flow but the addresses: fragments, options */
    KNOWN,   /* the flow is known, but this packet must stay as it is */
    JOINABLE /* may be merged, if its checksum is right */
};

struct view {
    enum kind kind;
    uint32_t row, tag;
    uint32_t header, payload;
    uint8_t l4, protocol;
};

/* Fibonacci hashing; it need not resist an enemy, since a collision only costs a merge. */
static uint32_t mix(uint64_t value) { return (uint32_t)((value * 0x9e3779b97f4a7c15u) >> 32); }

static enum kind look_at_tcp(struct view *v, const uint8_t *packet, uint32_t length)
{
    const uint8_t *tcp = packet + v->l4;
    uint32_t size = (tcp[12] >> 4) * 4u;
    v->header = v->l4 + size;
    if (size < TCP_HEADER || v->header >= length)
        return KNOWN;
    v->payload = length - v->header;
    /* Any other flag, the reserved ones and Accurate ECN's included, belongs to one segment. */
    bool plain = (tcp[13] & ~PSH) == ACK && (tcp[12] & 0x0f) == 0;
    return plain ? JOINABLE : KNOWN;
}

static enum kind look_at_udp(struct view *v, const uint8_t *packet, uint32_t length)
{
    const uint8_t *udp = packet + v->l4;
    v->header = v->l4 + UDP_HEADER;
    v->payload = length - v->header;
    /* Without a checksum there is nothing to verify, and merging would invent one. */
    bool summed = mt_get16(udp + UDP_CHECKSUM) != 0;
    return v->payload && summed && mt_get16(udp + 4) == length - v->l4 ? JOINABLE : KNOWN;
}

static struct view look_at(const struct mt_coalescer *c, const uint8_t *packet, uint32_t length)
{
    struct view v = {.kind = ALONE};
    uint32_t header = length <= MT_MAX_IP ? ip_header(packet, length) : 0;
    if (!header)
        return v;
    uint64_t addresses;
    bool plain; /* no options, no fragment, and as long as it says */
    if (packet[0] >> 4 == 4) {
        addresses = mt_get64(packet + 12);
        v.protocol = packet[9];
        plain = header == IPV4_HEADER && mt_get16(packet + 2) == length &&
                (mt_get16(packet + 6) & ~DONT_FRAGMENT) == 0;
        if (plain && v.protocol != TCP && v.protocol != UDP)
            return v;
    } else {
        addresses = mt_get64(packet + 8) ^ mix(mt_get64(packet + 16)) ^
                    mt_get64(packet + 24) * 3 ^ (uint64_t)mix(mt_get64(packet + 32)) << 32;
        v.protocol = packet[6];
        plain = mt_get16(packet + 4) == length - IPV6_HEADER;
        if (plain && v.protocol == ICMPV6)
            return v;
    }
    v.row = mix(addresses) % ROWS;
    v.l4 = (uint8_t)header;
    v.kind = OPAQUE;
    if (!plain)
        return v;
    uint32_t least = v.protocol == TCP ? TCP_HEADER : UDP_HEADER;
    if ((v.protocol != TCP && v.protocol != UDP) || length < header + least)
        return v;
    v.tag = mix(addresses ^ mix((uint64_t)mt_get32(packet + header) << 8 | v.protocol));
    if (v.protocol == TCP)
        v.kind = c->tcp ? look_at_tcp(&v, packet, length) : ALONE;
    else
        v.kind = c->udp ? look_at_udp(&v, packet, length) : ALONE;
    return v;
}

static bool same_flow(const struct group *g, const uint8_t *head, const struct view *v,
                      const uint8_t *packet)
{
    if (g->tag != v->tag || g->protocol != v->protocol || g->l4 != v->l4)
        return false;
    if (memcmp(head + g->l4, packet + g->l4, 4) != 0) /* ports */
        return false;
    /* The header's length tells the version: neither has options here. */
    return g->l4 == IPV4_HEADER ? memcmp(head + 12, packet + 12, 8) == 0
                                : memcmp(head + 8, packet + 8, 32) == 0;
}

/* Where the flow's open group is noted, or (*found false) where to note one: a free place, else
 * that of the oldest group. */
static uint16_t *find(struct mt_coalescer *c, const struct view *v, const uint8_t *packet,
                      bool *found)
{
    uint16_t *set = c->open[v->row][v->tag % SETS];
    uint16_t *place = &set[0];
    *found = false;
    for (int i = 0; i < WAYS; i++) {
        if (set[i] == NONE) {
            place = &set[i];
            continue;
        }
        const struct group *g = &c->groups[set[i]];
        if (same_flow(g, c->parts[g->first].data, v, packet)) {
            *found = true;
            return &set[i];
        }
        if (*place != NONE && set[i] < *place)
            place = &set[i];
    }
    return place;
}

/* Whether cutting the group again gives back the IP header of `packet`. */
static bool ip_fits(const struct group *g, const uint8_t *head, const uint8_t *packet)
{
    if (g->l4 == IPV6_HEADER) /* version, traffic class with ECN, flow label; hop limit */
        return memcmp(head, packet, 4) == 0 && head[7] == packet[7];
    /* TOS with ECN, flags, TTL */
    if (head[1] != packet[1] || head[6] != packet[6] || head[8] != packet[8])
        return false;
    /* With DF the ID says nothing (RFC 6864 section 4.1). Without, it must stay the sender's. */
    if (mt_get16(head + 6) & DONT_FRAGMENT)
        return true;
    return mt_get16(packet + 4) == (uint16_t)(mt_get16(head + 4) + g->count);
}

static bool fits(const struct group *g, const uint8_t *head, const struct view *v,
                 const uint8_t *packet)
{
    if (g->header != v->header || v->payload > g->size || g->total + v->payload > MT_MAX_IP)
        return false;
    if (!ip_fits(g, head, packet))
        return false;
    if (g->protocol == UDP)
        return true;
    const uint8_t *a = head + g->l4, *b = packet + g->l4;
    /* Acknowledgement, window, urgent pointer and options: the same, as in the kernel's GRO, so
     * that the receiver sees each ACK and each window in the place where it was sent. */
    return mt_get32(b + 4) == g->sequence && memcmp(a + 8, b + 8, 4) == 0 &&
           memcmp(a + 14, b + 14, 2) == 0 && memcmp(a + 18, b + 18, v->header - v->l4 - 18) == 0;
}

/* A merged packet gets new checksums, which would make a corrupt packet look whole. */
static bool genuine(const uint8_t *packet, uint32_t length, uint32_t l4, uint8_t protocol)
{
    if (l4 == IPV4_HEADER && mt_checksum_fold(mt_checksum_add(packet, l4, 0)) != 0xffff)
        return false;
    uint64_t sum = mt_checksum_pseudo(packet, protocol, length - l4);
    return mt_checksum_fold(mt_checksum_add(packet + l4, length - l4, sum)) == 0xffff;
}

static uint16_t add_part(struct mt_coalescer *c, uint8_t *data, uint32_t length)
{
    c->parts[c->parts_used] = (struct part){.data = data, .length = length, .next = NONE};
    return (uint16_t)c->parts_used++;
}

/* Joins the packet to the group if everything allows it. */
static bool join(struct mt_coalescer *c, struct group *g, const struct view *v, uint8_t *packet,
                 uint32_t length)
{
    struct part *head = &c->parts[g->first];
    if (v->kind != JOINABLE || !fits(g, head->data, v, packet))
        return false;
    /* Only now, so that packets which stay single are never summed. */
    g->verified = g->verified || genuine(head->data, head->length, g->l4, g->protocol);
    if (!g->verified || !genuine(packet, length, v->l4, v->protocol))
        return false;
    uint16_t part = add_part(c, packet + v->header, v->payload);
    c->parts[g->last].next = part;
    g->last = part;
    g->count++;
    g->total += v->payload;
    g->sequence += v->payload;
    g->push = g->protocol == TCP && packet[g->l4 + 13] & PSH;
    return true;
}

/* Whether nothing may follow the group's last packet, of `payload` bytes. */
static bool is_over(const struct group *g, uint32_t payload)
{
    return g->push || payload < g->size || g->count == (g->protocol == TCP ? MAX_TCP : MAX_UDP);
}

static uint16_t begin(struct mt_coalescer *c, const struct view *v, uint8_t *packet,
                      uint32_t length)
{
    struct group *g = &c->groups[c->groups_used];
    uint16_t part = add_part(c, packet, length);
    *g = (struct group){.tag = v->tag,
                        .total = length,
                        .size = v->payload,
                        .header = v->header,
                        .first = part,
                        .last = part,
                        .count = 1,
                        .l4 = v->l4,
                        .protocol = v->protocol};
    if (v->kind == JOINABLE && v->protocol == TCP) {
        g->sequence = mt_get32(packet + v->l4 + 4) + v->payload;
        g->push = packet[v->l4 + 13] & PSH;
    }
    return (uint16_t)c->groups_used++;
}

/* Makes the first packet's headers those of the whole group, for the kernel to cut or to keep. */
static struct mt_vnet finish(const struct group *g, uint8_t *head)
{
    uint8_t *upper = head + g->l4;
    uint32_t upper_length = g->total - g->l4;
    bool tcp = g->protocol == TCP;
    if (g->l4 == IPV4_HEADER) {
        mt_put16(head + 2, g->total);
        put_ipv4_checksum(head, g->l4);
    } else {
        mt_put16(head + 4, g->total - IPV6_HEADER);
    }
    if (!tcp)
        mt_put16(upper + 4, upper_length);
    else if (g->push)
        upper[13] |= PSH;
    uint16_t offset = tcp ? TCP_CHECKSUM : UDP_CHECKSUM;
    mt_put16(upper + offset,
             mt_checksum_fold(mt_checksum_pseudo(head, g->protocol, upper_length)));
    return (struct mt_vnet){.flags = MT_VNET_NEEDS_CSUM,
                            .gso_type = !tcp                   ? MT_GSO_UDP_L4
                                        : g->l4 == IPV4_HEADER ? MT_GSO_TCPV4
                                                               : MT_GSO_TCPV6,
                            .hdr_len = (uint16_t)g->header,
                            .gso_size = (uint16_t)g->size,
                            .csum_start = g->l4,
                            .csum_offset = offset};
}

static void close_all(struct mt_coalescer *c) { memset(c->open, 0xff, sizeof c->open); }

struct mt_coalescer *mt_coalescer_new(void)
{
    struct mt_coalescer *c = calloc(1, sizeof *c);
    if (c)
        close_all(c);
    return c;
}

void mt_coalescer_free(struct mt_coalescer *c) { free(c); }

void mt_coalescer_allow(struct mt_coalescer *c, bool tcp, bool udp)
{
    c->tcp = tcp;
    c->udp = udp;
    close_all(c);
}

bool mt_coalescer_add(struct mt_coalescer *c, uint8_t *packet, uint32_t length)
{
    if (c->parts_used == MAX_PARTS || c->groups_used == MAX_GROUPS)
        return false;
    struct view v = look_at(c, packet, length);
    if (v.kind == ALONE) {
        begin(c, &v, packet, length);
        return true;
    }
    if (v.kind == OPAQUE) {
        memset(c->open[v.row], 0xff, sizeof c->open[v.row]);
        begin(c, &v, packet, length);
        return true;
    }
    bool found;
    uint16_t *place = find(c, &v, packet, &found);
    if (found) {
        struct group *g = &c->groups[*place];
        if (join(c, g, &v, packet, length)) {
            if (is_over(g, v.payload))
                *place = NONE;
            return true;
        }
        *place = NONE;
    }
    uint16_t begun = begin(c, &v, packet, length);
    if (v.kind == JOINABLE && !is_over(&c->groups[begun], v.payload))
        *place = begun;
    return true;
}

void mt_coalescer_flush(struct mt_coalescer *c, mt_write_packet write, void *context)
{
    for (uint32_t i = 0; i < c->groups_used; i++) {
        const struct group *g = &c->groups[i];
        struct mt_vnet vnet = {0};
        if (g->count > 1)
            vnet = finish(g, c->parts[g->first].data);
        int count = 0;
        for (uint16_t at = g->first; at != NONE; at = c->parts[at].next) {
            const struct part *part = &c->parts[at];
            c->vector[1 + count++] =
                (struct iovec){.iov_base = part->data, .iov_len = part->length};
        }
        write(context, &vnet, c->vector + 1, count, g->total);
    }
    c->parts_used = 0;
    c->groups_used = 0;
    close_all(c);
}
