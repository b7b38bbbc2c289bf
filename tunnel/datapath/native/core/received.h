/* Packet numbers that arrived: the duplicate window, and what is to be acknowledged. */
#ifndef MT_RECEIVED_H
#define MT_RECEIVED_H

#include "bytes.h"

/* Numbers remembered. Below the newest by more than this everything counts as a duplicate: at
 * 400,000 packets a second this is two and a half seconds. */
#define MT_WINDOW ((uint64_t)1 << 20)

/* A sliding window of numbers. */
struct mt_window {
    uint64_t *bits; /* MT_WINDOW bits, touched only as numbers come */
    uint64_t end;   /* one above the largest number seen; 0: none yet */
};

bool mt_window_init(struct mt_window *w); /* false: no memory */
void mt_window_free(struct mt_window *w);
/* Whether `n` was added before, or lies below the window. */
bool mt_window_has(const struct mt_window *w, uint64_t n);
void mt_window_add(struct mt_window *w, uint64_t n);

/* Acknowledgement state of one packet number space. */
struct mt_received {
    struct mt_window arrived;
    uint64_t floor;          /* lower numbers need no acknowledgement any more */
    mt_time largest_at;      /* when the largest number arrived */
    uint32_t eliciting;      /* ack-eliciting packets since the last acknowledgement */
    mt_time eliciting_since; /* arrival of the first of them */
    bool at_once;            /* a gap, or a move: do not wait */
};

#define MT_ACK_RANGES 48
#define MT_ACK_SIZE (1 + 8 + 8 + 2 + 8 + 16 * MT_ACK_RANGES) /* bytes of the largest ACK frame */

/* A packet with this number arrived, which mt_window_has() did not know. */
void mt_received_add(struct mt_received *r, uint64_t n, bool eliciting, mt_time now);
/* Writes an ACK frame (RFC 9000 section 19.3) of at most `room` bytes; returns its size, 0 if
 * nothing ever arrived or `room` is too small. */
uint32_t mt_received_ack(struct mt_received *r, uint8_t *out, uint32_t room, int delay_exponent,
                         mt_time now);

#endif
