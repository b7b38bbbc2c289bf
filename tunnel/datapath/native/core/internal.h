/* What the files of the engine share among themselves. */
#ifndef MT_INTERNAL_H
#define MT_INTERNAL_H

#include "engine.h"

/* Datagram payloads: our own registry, in the manner of RFC 9298 section 4 (docs/protocol.md). */
#define KIND_PACKET 0
#define KIND_COPY 1
#define KIND_PART 2
#define MAX_PART 1160     /* bytes of a kind 2 payload: a copy of it fits any valid QUIC path */
#define COPY_OVERHEAD 9   /* its kind, and a root of up to eight bytes */
#define LARGE_PACKET 1200 /* bytes; every path carries this, larger ones may meet a black hole */
#define NO_PATH 0xff /* in the place of a path's index */

/* What is known of a packet, while nothing newer has taken its place in the ring. */
static inline struct mt_sent *sent_entry(const struct mt_conn *c, uint64_t number)
{
    return &c->ring[number & (c->ring_size - 1)];
}

/* recovery.c */
bool recovery_track(struct mt_conn *c, struct mt_path *p, uint64_t number, uint32_t size, int flags,
                    mt_time at);
bool recovery_has_room(struct mt_conn *c); /* for one more packet; grows the ring */
void recovery_note_ack(struct mt_conn *c, uint64_t number);
/* 0, or a transport error code. */
int recovery_on_ack(struct mt_conn *c, struct mt_path *arriving, const uint8_t **at,
                    const uint8_t *end, bool ecn, mt_time now);
mt_time recovery_timer(const struct mt_conn *c);
void recovery_on_timer(struct mt_conn *c, mt_time now);
void recovery_drop_path(struct mt_conn *c, struct mt_path *p);
mt_time recovery_pto_at(const struct mt_conn *c);

/* replay.c */
/* Room for the frame of a datagram, to be committed to c->store; grows it while what it would
 * overwrite may still be asked for. NULL: no memory. */
uint8_t *replay_reserve(struct mt_conn *c, uint32_t length, mt_time now);
/* The next to be replayed, if any may still be; it is still waiting then. */
bool replay_next(struct mt_conn *c, mt_time now, uint64_t *number);
void replay_done(struct mt_conn *c, uint64_t number); /* it has left, or cannot leave there */
void replay_handed_over(struct mt_conn *c, uint64_t number); /* others stand for it now */
void replay_give_up(struct mt_conn *c, uint64_t number);
/* A datagram or a copy was acknowledged, perhaps after it had been declared lost. */
void replay_acked(struct mt_conn *c, struct mt_sent *s);
void replay_lost(struct mt_conn *c, uint64_t number); /* the same: it was not, and is settled */
/* Acknowledgements of lower numbers are of no interest. */
uint64_t replay_floor(const struct mt_conn *c);
void replay_overwritten(struct mt_conn *c, struct mt_sent *s); /* its place is needed */
void replay_path_gone(struct mt_conn *c, const struct mt_path *p);
void replay_clear(struct mt_conn *c);

/* connection.c */
void conn_fail(struct mt_conn *c, uint64_t code, uint64_t frame, const char *reason);
void conn_renew_keys(struct mt_conn *c, mt_time now);

/* send.c */
bool send_may_acknowledge(const struct mt_conn *c);
void send_acknowledge(struct mt_conn *c, mt_time now);

/* deliver.c */
void deliver_datagram(struct mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                      mt_time now);

/* Transport error codes (RFC 9000 section 20.1). */
#define FRAME_ENCODING_ERROR 0x7
#define PROTOCOL_VIOLATION 0xa
#define INTERNAL_ERROR 0x1
#define AEAD_LIMIT_REACHED 0xf

#endif
