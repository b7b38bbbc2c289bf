/* The tunnel's own bottleneck queue: one queue for each flow, deficit round robin between them,
 * CoDel within each (RFC 8290), before sealing.
 *
 * It holds super-packets and gives out IP packets, one segment at a time, so that a keystroke
 * waits for one segment of a bulk flow and not for 64 KiB of it. While there is no path it keeps
 * the newest packets of every flow, and they go first when a path is back.
 */
#ifndef MT_QUEUE_H
#define MT_QUEUE_H

#include "offload.h"

struct mt_queue;

struct mt_queue_counters {
    uint64_t dropped; /* IP packets (segments) dropped for want of room, or stale */
    uint64_t codel;   /* IP packets dropped by CoDel */
    uint64_t marked;  /* IP packets marked CE instead of dropped */
    uint64_t malformed; /* super-packets that could not be read */
};

struct mt_queue *mt_queue_new(void); /* NULL: no memory */
void mt_queue_free(struct mt_queue *q);

/* Room for one TUN read, at least MT_VNET_SIZE + MT_MAX_IP bytes, valid until mt_queue_commit();
 * asking again without a commit returns the same. Never copies what is read there. NULL: no
 * memory. */
uint8_t *mt_queue_reserve(struct mt_queue *q);
/* `length` bytes were read there: a virtio header and an IP packet. 0: nothing was. Small packets
 * may be moved to smaller memory. */
void mt_queue_commit(struct mt_queue *q, uint32_t length, mt_time now);
/* The same for a packet the caller has elsewhere; `vnet` NULL: a plain IP packet. */
void mt_queue_push(struct mt_queue *q, const struct mt_vnet *vnet, const uint8_t *packet,
                   uint32_t length, mt_time now);

/* Bytes of the IP packet that is due next, after what CoDel drops first; 0: nothing waits.
 * Stays the same until it is taken, except by time passing. */
uint32_t mt_queue_peek(struct mt_queue *q, mt_time now);
/* Writes that packet to `out` and takes it off the queue; only after a peek that was not 0. */
void mt_queue_take(struct mt_queue *q, uint8_t *out);

/* Whether it belongs to a flow that sends little: one whose packets, of one segment each, exceed the
 * rate of such flows by no more than a few. Only after a peek that was not 0. */
bool mt_queue_sparse(const struct mt_queue *q);
/* As mt_queue_peek(), but only for a packet of such a flow, which need not be due: what was promised
 * before must wait. */
uint32_t mt_queue_peek_sparse(struct mt_queue *q, mt_time now);
/* That rate, bytes a second; less than the default counts as that. */
void mt_queue_set_sparse(struct mt_queue *q, double rate);

bool mt_queue_empty(const struct mt_queue *q);
uint64_t mt_queue_bytes(const struct mt_queue *q);   /* waiting, super-packets' headers once */
uint32_t mt_queue_packets(const struct mt_queue *q); /* super-packets waiting */
const struct mt_queue_counters *mt_queue_counters(const struct mt_queue *q);

/* Bytes a flow may send before the next one's turn; at least one full packet. Larger where the
 * rate is so high that a turn is short anyhow. */
void mt_queue_set_quantum(struct mt_queue *q, uint32_t bytes);
/* Keys the hash that tells flows apart, before the first packet: random, lest somebody makes his
 * flows share a queue with another's. */
void mt_queue_set_seed(struct mt_queue *q, uint64_t seed);
/* The hash of an IP packet's flow: addresses, protocol and, where there are any, ports. */
uint64_t mt_queue_flow(const struct mt_queue *q, const uint8_t *packet, uint32_t length);
/* Bytes of memory in use, pools included; at most about 32 MiB. */
uint64_t mt_queue_memory(const struct mt_queue *q);

/* There is no path: nothing is given out, overflow spares the newest packets of each flow, and
 * CoDel's clock stands still. */
void mt_queue_hold(struct mt_queue *q);
/* A path is back: the newest packets of each flow go first, then what is fresh; the rest goes. */
void mt_queue_recover(struct mt_queue *q, mt_time now);

#endif
