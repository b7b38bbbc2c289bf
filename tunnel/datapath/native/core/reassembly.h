/* Putting the parts of an IP packet (datagrams of kind 2) together again, within bounds that a
 * hostile peer cannot move. */
#ifndef MT_REASSEMBLY_H
#define MT_REASSEMBLY_H

#include "bytes.h"

struct mt_reassembler;

struct mt_reassembler *mt_reassembler_new(void); /* NULL: no memory */
void mt_reassembler_free(struct mt_reassembler *r);
void mt_reassembler_clear(struct mt_reassembler *r);

/* Take in a part. Returns the whole packet (valid until the next call) and its size when this was
 * the part that was missing; NULL otherwise. An overlap or a contradiction discards the packet. */
const uint8_t *mt_reassembler_add(struct mt_reassembler *r, uint64_t identifier, uint64_t offset,
                                  bool last, const uint8_t *data, uint32_t length, mt_time now,
                                  uint32_t *total);
uint64_t mt_reassembler_discarded(const struct mt_reassembler *r);

#endif
