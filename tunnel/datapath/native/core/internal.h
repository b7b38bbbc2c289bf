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

/* connection.c */
void conn_fail(struct mt_conn *c, uint64_t code, uint64_t frame, const char *reason);
uint8_t *outbox_room(struct mt_engine *e, uint32_t size);
void outbox_add(struct mt_conn *c, struct mt_path *p, uint32_t size);

/* deliver.c */
void deliver_datagram(struct mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                      mt_time now);

/* Transport error codes (RFC 9000 section 20.1). */
#define FRAME_ENCODING_ERROR 0x7
#define PROTOCOL_VIOLATION 0xa
#define INTERNAL_ERROR 0x1
#define AEAD_LIMIT_REACHED 0xf

#endif
