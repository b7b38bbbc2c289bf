#include "received.h"

#include <stdlib.h>

#define WORD(n) (((n) >> 6) & (MT_WINDOW / 64 - 1))
#define BIT(n) ((uint64_t)1 << ((n) & 63))

/* Numbers below an acknowledged acknowledgement that are reported a little longer, so that the
 * sender hears of packets that came late (RFC 9000 section 13.2.4). */
#define LATE 512

bool mt_window_init(struct mt_window *w)
{
    w->end = 0;
    w->bits = calloc(MT_WINDOW / 64, sizeof *w->bits);
    return w->bits != NULL;
}

void mt_window_free(struct mt_window *w)
{
    free(w->bits);
    w->bits = NULL;
}

bool mt_window_has(const struct mt_window *w, uint64_t n)
{
    if (n >= w->end)
        return false;
    if (w->end - n > MT_WINDOW - 64)
        return true;
    return w->bits[WORD(n)] & BIT(n);
}

void mt_window_add(struct mt_window *w, uint64_t n)
{
    if (n >= w->end) {
        /* Words between the old end and the new one still hold numbers of long ago. */
        uint64_t first = w->end ? (w->end - 1) / 64 + 1 : 0, last = n / 64;
        if (last >= first) {
            if (last - first >= MT_WINDOW / 64 - 1)
                memset(w->bits, 0, MT_WINDOW / 8);
            else
                for (uint64_t word = first; word <= last; word++)
                    w->bits[word & (MT_WINDOW / 64 - 1)] = 0;
        }
        w->end = n + 1;
    } else if (w->end - n > MT_WINDOW - 64) {
        return;
    }
    w->bits[WORD(n)] |= BIT(n);
}

void mt_received_add(struct mt_received *r, uint64_t n, bool eliciting, mt_time now)
{
    if (n >= r->arrived.end) {
        /* Out of order or with a gap: say so at once (RFC 9000 section 13.2.1). */
        if (n != r->arrived.end)
            r->at_once |= eliciting;
        r->largest_at = now;
    } else {
        r->at_once |= eliciting;
        if (n < r->floor)
            r->floor = n;
    }
    mt_window_add(&r->arrived, n);
    if (eliciting && !r->eliciting++)
        r->eliciting_since = now;
}

/* How many numbers downward from `n`, not below `floor`, are all seen (or all not seen). */
static uint64_t run_down(const struct mt_window *w, uint64_t n, uint64_t floor, bool seen)
{
    uint64_t length = 0;
    for (;;) {
        uint64_t word = w->bits[WORD(n)];
        if (!seen)
            word = ~word;
        uint32_t position = n & 63;
        uint64_t others = ~(word << (63 - position));
        uint32_t here = others ? (uint32_t)__builtin_clzll(others) : 64;
        if (here > position + 1)
            here = position + 1;
        length += here;
        if (n - floor < here) /* the run reaches the floor */
            return length - (here - (n - floor + 1));
        if (here <= position)
            return length;
        n -= here; /* into the word below: n was at least floor + here, so this is no wrap */
    }
}

uint32_t mt_received_ack(struct mt_received *r, uint8_t *out, uint32_t room, int delay_exponent,
                         mt_time now)
{
    const struct mt_window *w = &r->arrived;
    if (!w->end || room < 32)
        return 0;
    uint64_t floor = r->floor;
    if (w->end > MT_WINDOW - 64 && floor < w->end - (MT_WINDOW - 64))
        floor = w->end - (MT_WINDOW - 64);
    uint64_t n = w->end - 1;
    if (floor > n)
        floor = n;
    uint64_t delay = now > r->largest_at ? (uint64_t)(now - r->largest_at) >> delay_exponent : 0;
    uint8_t *p = out;
    *p++ = 0x02;
    p += mt_put_varint(p, n);
    p += mt_put_varint(p, delay);
    uint8_t *count = p; /* two bytes, filled in at the end */
    p += 2;
    uint64_t run = run_down(w, n, floor, true);
    p += mt_put_varint(p, run - 1);
    uint32_t ranges = 0;
    while (ranges < MT_ACK_RANGES && n - floor >= run && (uint32_t)(p - out) + 16 <= room) {
        n -= run; /* the first number of the gap */
        uint64_t gap = run_down(w, n, floor, false);
        if (n - floor < gap)
            break; /* nothing below it */
        n -= gap;
        run = run_down(w, n, floor, true);
        p += mt_put_varint(p, gap - 1);
        p += mt_put_varint(p, run - 1);
        ranges++;
    }
    mt_put16(count, ranges | 0x4000);
    r->eliciting = 0;
    r->at_once = false;
    return (uint32_t)(p - out);
}
