/* What a TUN device hands over: any virtio header, any bytes. Whatever can be cut comes out as
 * well-formed IP packets with right checksums, and the queue loses count of nothing. */
#include "fuzz.h"

#define MEMORY (32u << 20)

static void check_segment(const struct mt_super *s, uint32_t index, uint32_t *payload)
{
    uint32_t size = mt_super_size(s, index);
    CHECK(size > 0 && size <= MT_MAX_IP);
    uint8_t *out = malloc(size);
    mt_super_cut(s, index, out);
    CHECK(mt_well_formed(out, size));
    if (s->header) {
        CHECK(size > s->header && size - s->header <= s->mss);
        CHECK(out[0] >> 4 != 4 || plain_sum(out, (out[0] & 15u) * 4, 0) == 0xffff);
        CHECK(upper_sum(out, size, s->l4, s->protocol) == 0xffff);
        CHECK(!memcmp(out + s->header, s->packet + s->header + *payload, size - s->header));
        *payload += size - s->header;
    }
    free(out);
}

/* A packet that makes sense: its fields are what the fuzzer plays with. */
static uint32_t write_packet(struct input *in, struct mt_vnet *vnet, uint8_t *packet)
{
    int shape = byte(in);
    bool six = shape & 1, tcp = shape & 2;
    uint32_t header = six ? 40 : 20, upper = tcp ? 20 : 8;
    uint32_t length = header + upper + (shape & 4 ? word(in) : byte(in));
    if (length > MT_MAX_IP)
        length = MT_MAX_IP;
    memset(packet, 0, length);
    packet[0] = six ? 0x60 : 0x45;
    packet[1] = (uint8_t)(shape >> 6 << (six ? 4 : 0)); /* ECN */
    if (six) {
        mt_put16(packet + 4, length - 40);
        packet[6] = tcp ? 6 : 17;
    } else {
        mt_put16(packet + 2, length);
        packet[9] = tcp ? 6 : 17;
        mt_put16(packet + 10, ~plain_sum(packet, 20, 0));
    }
    packet[header + 1] = byte(in) & 31; /* the flow */
    if (tcp)
        packet[header + 12] = 0x50;
    if (shape & 8)
        *vnet = (struct mt_vnet){MT_VNET_NEEDS_CSUM,
                                 tcp ? six ? MT_GSO_TCPV6 : MT_GSO_TCPV4 : MT_GSO_UDP_L4,
                                 (uint16_t)(header + upper),
                                 (uint16_t)word(in),
                                 (uint16_t)header,
                                 tcp ? 16 : 6};
    if (shape & 16) /* and some bytes of it are wrong */
        for (int i = 0; i < 3; i++)
            packet[byte(in) % length] = byte(in);
    return length;
}

struct tally {
    uint64_t in, out;
};

static void check_queue(struct mt_queue *q, const struct tally *t)
{
    const struct mt_queue_counters *n = mt_queue_counters(q);
    CHECK(t->out + n->dropped + n->codel <= t->in);
    CHECK(mt_queue_memory(q) <= MEMORY);
    CHECK(mt_queue_empty(q) == (mt_queue_packets(q) == 0));
    CHECK(mt_queue_empty(q) == (mt_queue_bytes(q) == 0));
    if (mt_queue_empty(q))
        CHECK(t->out + n->dropped + n->codel == t->in);
}

static bool take_one(struct mt_queue *q, struct tally *t, mt_time now)
{
    uint32_t size = mt_queue_peek(q, now);
    if (!size)
        return false;
    CHECK(size == mt_queue_peek(q, now));
    uint8_t *out = malloc(size);
    mt_queue_take(q, out);
    CHECK(mt_well_formed(out, size));
    free(out);
    t->out++;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct mt_queue *q = mt_queue_new();
    struct tally t = {0, 0};
    mt_time now = 0;
    uint64_t budget = 20000; /* segments: the fuzzer shall not win by being slow */
    static uint8_t packet[MT_MAX_IP];
    mt_queue_set_seed(q, byte(&in));
    for (int steps = 0; left(&in) && steps < 2000 && budget; steps++) {
        int op = byte(&in);
        if (op < 0x90) {
            struct mt_vnet vnet = {0};
            uint32_t length;
            if (op < 0x60) {
                length = write_packet(&in, &vnet, packet);
            } else {
                uint8_t *raw = take(&in, MT_VNET_SIZE, &length);
                memcpy(&vnet, raw, length);
                free(raw);
                raw = take(&in, op & 1 ? word(&in) : byte(&in), &length);
                memcpy(packet, raw, length);
                free(raw);
            }
            uint8_t *exact = malloc(length ? length : 1);
            memcpy(exact, packet, length);
            struct mt_super s;
            bool opened = mt_super_open(&s, &vnet, exact, length);
            if (opened) {
                CHECK(s.count > 0);
                uint32_t payload = 0;
                for (uint32_t i = 0; i < s.count && budget; i++, budget--)
                    check_segment(&s, i, &payload);
                CHECK(!budget || !s.header || payload == length - s.header);
                t.in += s.count;
            }
            free(exact);
            uint64_t malformed = mt_queue_counters(q)->malformed;
            int copies = op & 0x20 ? 1 + byte(&in) : 1;
            for (int i = 0; i < copies; i++) {
                if (op & 2) {
                    uint8_t *room = mt_queue_reserve(q);
                    memcpy(room, &vnet, MT_VNET_SIZE);
                    memcpy(room + MT_VNET_SIZE, packet, length);
                    mt_queue_commit(q, MT_VNET_SIZE + length, now);
                } else {
                    mt_queue_push(q, &vnet, packet, length, now);
                }
                t.in += i && opened ? s.count : 0;
            }
            CHECK((mt_queue_counters(q)->malformed == malformed) == opened);
        } else if (op < 0xc0) {
            for (int n = op & 0x1f; n >= 0 && budget && take_one(q, &t, now); n--)
                budget--;
        } else if (op < 0xe0) {
            now += (mt_time)word(&in) << (op & 15);
        } else if (op < 0xf0) {
            mt_queue_hold(q);
            CHECK(mt_queue_peek(q, now) == 0);
        } else if (op < 0xf8) {
            mt_queue_recover(q, now);
        } else {
            mt_queue_set_quantum(q, (op & 1) ? number(&in, 4) : word(&in));
        }
        check_queue(q, &t);
    }
    mt_queue_recover(q, now);
    while (budget-- && take_one(q, &t, now))
        ;
    check_queue(q, &t);
    mt_queue_free(q);
    return 0;
}
