/* Received IP packets through the coalescer: what leaves, cut again as the kernel does it, is what
 * came, byte for byte, and every flow keeps its order. */
#include "fuzz.h"

#define PACKETS 700

static struct {
    uint8_t *memory, *original;
    uint32_t length;
    bool gone;
} packets[PACKETS];
static uint32_t count;

/* Protocol and ports count for TCP and UDP without fragments or options, as the coalescer sees
 * flows; whatever else there is shares its flow with all between these addresses. */
static bool same_flow(const uint8_t *a, uint32_t la, const uint8_t *b, uint32_t lb)
{
    if (la < 20 || lb < 20 || a[0] != b[0])
        return false;
    uint32_t header = a[0] >> 4 == 6 ? 40 : 20;
    if (a[0] != 0x45 && a[0] >> 4 != 6)
        return false;
    if (la < header + 8 || lb < header + 8)
        return false;
    bool six = header == 40;
    if (six ? a[6] != b[6] || memcmp(a + 8, b + 8, 32) : a[9] != b[9] || memcmp(a + 12, b + 12, 8))
        return false;
    uint8_t protocol = six ? a[6] : a[9];
    if (protocol != 6 && protocol != 17)
        return false;
    if (!six && ((mt_get16(a + 6) | mt_get16(b + 6)) & 0xbfff))
        return false;
    return memcmp(a + header, b + header, 4) == 0;
}

/* With DF set the ID of IPv4 says nothing (RFC 6864), and cutting counts it up. */
static bool same_packet(uint8_t *a, uint8_t *b, uint32_t length)
{
    if (!memcmp(a, b, length))
        return true;
    if (length < 20 || a[0] != 0x45 || !(a[6] & 0x40) || memcmp(a, b, 4) ||
        memcmp(a + 6, b + 6, 4) || memcmp(a + 12, b + 12, length - 12))
        return false;
    return plain_sum(a, 20, 0) == 0xffff && plain_sum(b, 20, 0) == 0xffff;
}

static void came_out(uint8_t *packet, uint32_t length)
{
    for (uint32_t i = 0; i < count; i++) {
        if (packets[i].gone)
            continue;
        if (packets[i].length == length && same_packet(packets[i].original, packet, length)) {
            packets[i].gone = true;
            return;
        }
        CHECK(!same_flow(packets[i].original, packets[i].length, packet, length));
    }
    CHECK(!"a packet that never came");
}

static void writer(void *context, const struct mt_vnet *vnet, struct iovec *parts, int n,
                   uint32_t length)
{
    (void)context;
    uint8_t *whole = malloc(length ? length : 1);
    uint32_t at = 0;
    for (int i = 0; i < n; i++) {
        CHECK(at + parts[i].iov_len <= length);
        memcpy(whole + at, parts[i].iov_base, parts[i].iov_len);
        at += (uint32_t)parts[i].iov_len;
    }
    CHECK(at == length);
    parts[-1] = (struct iovec){0}; /* the writer's own */
    if (vnet->gso_type == MT_GSO_NONE) {
        came_out(whole, length);
        free(whole);
        return;
    }
    struct mt_super s;
    CHECK(mt_super_open(&s, vnet, whole, length) && s.count > 1);
    CHECK(mt_well_formed(whole, length));
    for (uint32_t i = 0; i < s.count; i++) {
        uint32_t size = mt_super_size(&s, i);
        uint8_t *segment = malloc(size);
        mt_super_cut(&s, i, segment);
        came_out(segment, size);
        free(segment);
    }
    free(whole);
}

static uint32_t sequences[4];

/* One of a few flows, mostly in order, with now and then something odd about it. */
static uint8_t *write_packet(struct input *in, uint32_t *length)
{
    int shape = byte(in);
    bool six = shape & 1, tcp = shape & 2;
    int flow = shape >> 2 & 3;
    uint32_t header = six ? 40 : 20, upper = tcp ? 20 : 8;
    uint32_t payload = shape & 0x10 ? byte(in) : shape & 0x20 ? word(in) : 100;
    uint32_t size = header + upper + payload;
    if (size > MT_MAX_IP)
        size = MT_MAX_IP, payload = size - header - upper;
    uint8_t *p = calloc(1, size);
    p[0] = six ? 0x60 : 0x45;
    if (six) {
        mt_put16(p + 4, size - 40);
        p[6] = tcp ? 6 : 17;
        p[7] = 64;
    } else {
        mt_put16(p + 2, size);
        p[6] = shape & 0x40 ? 0x40 : 0;
        p[8] = 64;
        p[9] = tcp ? 6 : 17;
        if (shape & 0x40)
            mt_put16(p + 4, byte(in));
    }
    p[header + 1] = (uint8_t)flow;
    if (tcp) {
        mt_put32(p + header + 4, sequences[flow]);
        sequences[flow] += payload;
        p[header + 12] = 0x50;
        p[header + 13] = 0x10;
    } else {
        mt_put16(p + header + 4, size - header);
    }
    int odd = shape & 0x80 ? byte(in) : 0;
    if (odd & 1)
        p[byte(in) % size] = byte(in);
    if (odd & 2)
        p[header + byte(in) % upper] = byte(in);
    if (odd & 4)
        p[header + 13 % upper] |= 8;
    if (!(odd & 8) && p[0] >> 4 == (six ? 6 : 4)) { /* right checksums */
        uint32_t field = header + (tcp ? 16 : 6);
        mt_put16(p + field, 0);
        uint32_t sum = 0xffff & ~upper_sum(p, size, header, tcp ? 6 : 17);
        mt_put16(p + field, sum || tcp ? sum : 0xffff);
        if (!six) {
            mt_put16(p + 10, 0);
            mt_put16(p + 10, ~plain_sum(p, 20, 0));
        }
    }
    *length = size;
    return p;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct mt_coalescer *c = mt_coalescer_new();
    memset(sequences, 0, sizeof sequences);
    int flags = byte(&in);
    mt_coalescer_allow(c, flags & 1, flags & 2);
    bool full = false;
    uint64_t bytes = 0;
    while (left(&in) || count) {
        if (!left(&in) || count == PACKETS || full || bytes > 1 << 20) {
            mt_coalescer_flush(c, writer, NULL);
            for (uint32_t i = 0; i < count; i++) {
                CHECK(packets[i].gone);
                free(packets[i].memory);
                free(packets[i].original);
            }
            if (bytes > 1 << 20)
                in.at = in.end;
            count = 0;
            full = false;
            continue;
        }
        int op = byte(&in);
        int times = op & 0x40 ? op & 0x3f : 1;
        for (; times > 0 && count < PACKETS && !full; times--) {
            uint32_t length;
            const uint8_t *before = in.at;
            uint8_t *packet =
                op & 0x80 ? write_packet(&in, &length) : take(&in, byte(&in), &length);
            if (times > 1)
                in.at = before; /* once more */
            bytes += length;
            uint8_t *copy = malloc(length ? length : 1);
            memcpy(copy, packet, length);
            if (mt_coalescer_add(c, packet, length)) {
                packets[count].memory = packet;
                packets[count].original = copy;
                packets[count].length = length;
                packets[count++].gone = false;
            } else {
                CHECK(count);
                full = true;
                free(packet);
                free(copy);
            }
        }
    }
    mt_coalescer_free(c);
    return 0;
}
