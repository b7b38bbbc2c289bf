/* Acknowledgements: what a hostile frame settles, and what our own frame says, each against a
 * table of numbers that is looked at one by one. */
#include "fuzz.h"

#define NUMBERS 2048

struct model {
    bool outstanding;
    uint8_t path;
    int64_t order;
    mt_time at;
};

/* RFC 9000 section 19.3, from the frame's first field on; false: malformed, or never sent. */
static bool read_frame(const uint8_t *at, const uint8_t *end, bool ecn, uint64_t sent,
                       bool acked[NUMBERS], const uint8_t **behind)
{
    uint64_t largest, delay, count, length, gap;
    if (!mt_get_varint(&at, end, &largest) || !mt_get_varint(&at, end, &delay) ||
        !mt_get_varint(&at, end, &count) || !mt_get_varint(&at, end, &length))
        return false;
    if (largest >= sent)
        return false;
    for (__int128 high = largest;;) {
        __int128 low = high - length;
        if (low < 0)
            return false;
        for (__int128 n = low; n <= high; n++)
            acked[n] = true;
        if (!count--)
            break;
        if (!mt_get_varint(&at, end, &gap) || !mt_get_varint(&at, end, &length))
            return false;
        high = low - gap - 2;
        if (high < 0)
            return false;
    }
    for (int i = 0; ecn && i < 3; i++)
        if (!mt_get_varint(&at, end, &gap))
            return false;
    *behind = at;
    return true;
}

static bool listed(const struct mt_numbers *list, uint64_t n)
{
    uint32_t times = 0;
    for (uint32_t i = 0; i < list->count; i++)
        times += list->items[i] == n;
    CHECK(times <= 1);
    return times;
}

static void sent_side(struct input *in)
{
    static struct model model[NUMBERS];
    memset(model, 0, sizeof model);
    struct mt_engine *e = mt_engine_new();
    struct mt_conn *c = mt_conn_new(e);
    struct mt_path *paths[3];
    int64_t orders[3] = {0}, acked_orders[3] = {-1, -1, -1};
    for (int i = 0; i < 3; i++)
        paths[i] = mt_conn_add_path(c, 1200, 1e5);
    CHECK(mt_conn_start(c, keys_of(0), 0));
    if (byte(in) & 1) /* long-lived paths: the counter of their packets wraps in what we send */
        for (int i = 0; i < 3; i++) {
            paths[i]->order = UINT32_MAX - 40;
            paths[i]->acked_order = orders[i] = UINT32_MAX - 40;
            paths[i]->acked_order--;
            acked_orders[i] = orders[i] - 1;
        }
    mt_time now = 1000000;
    uint32_t packets = 0;
    for (int steps = 0; left(in) && steps < 300; steps++) {
        int op = byte(in);
        if (op < 0x80) { /* packets of one path */
            int path = op % 3;
            for (int n = byte(in) & 31; n >= 0 && packets < NUMBERS - 1; n--) {
                packets += (op >> 2 & 3) == 3; /* a number that was never used */
                model[packets] = (struct model){true, (uint8_t)path, orders[path]++, now};
                CHECK(mt_conn_sent(c, paths[path], packets++, 1200,
                                   MT_SENT_ELICITING | MT_SENT_IN_FLIGHT, now));
            }
            now += (mt_time)byte(in) * 50;
            continue;
        }
        now += (mt_time)(op & 0x1f) * 5000;
        uint8_t frame[512], *at = frame;
        uint32_t length;
        if (op & 0x40) { /* a frame that makes sense, more or less */
            uint64_t largest = packets ? packets - 1 - byte(in) % packets : 0;
            uint32_t ranges = byte(in) & 15;
            at += mt_put_varint(at, largest);
            at += mt_put_varint(at, byte(in));
            at += mt_put_varint(at, ranges);
            at += mt_put_varint(at, byte(in) & 31);
            for (uint32_t i = 0; i < ranges; i++) {
                at += mt_put_varint(at, byte(in) & 15);
                at += mt_put_varint(at, byte(in) & 15);
            }
            length = (uint32_t)(at - frame);
        } else {
            uint8_t *raw = take(in, byte(in), &length);
            memcpy(frame, raw, length);
            free(raw);
        }
        bool ecn = op & 0x20;
        uint8_t *exact = malloc(length ? length : 1);
        memcpy(exact, frame, length);
        static bool acked[NUMBERS];
        memset(acked, 0, sizeof acked);
        const uint8_t *behind = NULL;
        bool right = read_frame(exact, exact + length, ecn, packets, acked, &behind);
        uint32_t used = 0;
        bool accepted = mt_conn_ack_frame(c, paths[op % 3], exact, length, ecn, now, &used);
        CHECK(accepted == right);
        CHECK(right == !(c->events & MT_EVENT_ERROR));
        CHECK(!right || exact + used == behind);
        free(exact);
        if (!right)
            break;
        bool progress[3] = {false};
        for (uint64_t n = 0; n < packets; n++)
            if (acked[n] && model[n].outstanding) {
                CHECK(listed(&c->acked, n));
                model[n].outstanding = false;
                progress[model[n].path] = true;
                if (model[n].order > acked_orders[model[n].path])
                    acked_orders[model[n].path] = model[n].order;
            } else {
                CHECK(!listed(&c->acked, n));
            }
        int64_t outstanding[3] = {0};
        for (uint64_t n = 0; n < packets; n++) {
            struct model *m = &model[n];
            const struct mt_path *p = paths[m->path];
            /* RFC 9002 section 6.1, within the path */
            double rtt = !p->has_rtt                         ? p->initial_rtt
                         : p->rtt_latest > p->rtt_smoothed ? p->rtt_latest
                                                             : p->rtt_smoothed;
            mt_time patience = (mt_time)(rtt * 9 / 8 > 1000 ? rtt * 9 / 8 : 1000);
            bool lost = m->outstanding && progress[m->path] && m->order <= acked_orders[m->path] &&
                        (m->order <= acked_orders[m->path] - (int64_t)p->threshold ||
                         now >= m->at + patience);
            CHECK(listed(&c->lost, n) == lost);
            if (lost)
                m->outstanding = false;
            outstanding[m->path] += m->outstanding;
        }
        for (int i = 0; i < 3; i++)
            CHECK(paths[i]->outstanding == outstanding[i] &&
                  paths[i]->in_flight == 1200 * outstanding[i]);
        c->acked.count = c->lost.count = 0;
        c->events = 0;
    }
    mt_conn_free(c);
    mt_engine_free(e);
}

static void received_side(struct input *in)
{
    static bool arrived[NUMBERS], reported[NUMBERS];
    memset(arrived, 0, sizeof arrived);
    struct mt_received r = {0};
    CHECK(mt_window_init(&r.arrived));
    /* Far out, so that the window wraps; before it nothing has come. */
    uint64_t base = byte(in) & 1 ? ((uint64_t)1 << 62) - 2 * NUMBERS : 0;
    if (base)
        mt_received_add(&r, base - 1, false, 0);
    uint64_t end = 0, floor = 0;
    mt_time now = 0;
    for (int steps = 0; left(in) && steps < 300; steps++) {
        int op = byte(in);
        if (op < 0xe0) {
            uint64_t n = op & 1 ? end + (op >> 6) : word(in);
            for (int run = op >> 1 & 31; run >= 0; run--, n++) {
                n %= NUMBERS;
                CHECK(mt_window_has(&r.arrived, base + n) == arrived[n]);
                if (!arrived[n]) {
                    mt_received_add(&r, base + n, true, now);
                    if (n < floor)
                        floor = n;
                }
                arrived[n] = true;
                if (n + 1 > end)
                    end = n + 1;
            }
            continue;
        }
        if (op & 1) {
            floor = end ? word(in) % end : 0;
            r.floor = base + floor;
        }
        now += op;
        uint32_t room = 32 + (byte(in) & 1 ? word(in) : byte(in));
        uint8_t *frame = malloc(room);
        uint32_t size = mt_received_ack(&r, frame, room, 3, now);
        CHECK(size <= room && (size > 0 || (!end && !base)));
        if (!end || !size) {
            free(frame);
            continue;
        }
        const uint8_t *at = frame + 1, *stop = frame + size;
        uint64_t largest, delay, count, gap, length;
        CHECK(frame[0] == 2 && mt_get_varint(&at, stop, &largest) &&
              mt_get_varint(&at, stop, &delay) && mt_get_varint(&at, stop, &count) &&
              mt_get_varint(&at, stop, &length));
        CHECK(largest == base + end - 1 && count <= MT_ACK_RANGES);
        memset(reported, 0, sizeof reported);
        uint64_t high = largest, low;
        for (uint64_t range = 0;; range++) {
            low = high - length;
            CHECK(length <= high && low + 1 >= base);
            for (uint64_t n = low < base ? base : low; n <= high; n++) {
                CHECK(arrived[n - base]);
                reported[n - base] = true;
            }
            if (range == count)
                break;
            CHECK(mt_get_varint(&at, stop, &gap) && mt_get_varint(&at, stop, &length));
            CHECK(low >= gap + 2);
            high = low - gap - 2;
        }
        CHECK(at == stop);
        /* Everything down to the last range is told; and with room for more, down to the floor. */
        bool full = count == MT_ACK_RANGES || size + 16 > room;
        for (uint64_t n = full && low > base ? low - base : floor; n < end; n++)
            CHECK(reported[n] == arrived[n] || n < floor);
        free(frame);
    }
    mt_window_free(&r.arrived);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    if (byte(&in) & 1)
        sent_side(&in);
    else
        received_side(&in);
    return 0;
}
