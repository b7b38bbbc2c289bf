/* Which peer an IP packet belongs to: longest prefix of all allowed_ips, for its destination on
 * the way out and its source on the way in. */
#ifndef MT_ROUTES_H
#define MT_ROUTES_H

#include "bytes.h"

struct mt_routes;

struct mt_routes *mt_routes_new(void); /* NULL: no memory */
void mt_routes_free(struct mt_routes *r);
/* `address`: 4 or 16 bytes, network byte order; bits beyond the prefix are ignored. Later entries
 * for the same prefix replace earlier ones. False: no memory. */
bool mt_routes_add(struct mt_routes *r, int version, const uint8_t *address, int prefix_length,
                   int owner);
/* Owner of the longest prefix around the destination, or -1: no prefix, or not a well-formed IP
 * packet of exactly `length` bytes. */
int mt_routes_destination(const struct mt_routes *r, const uint8_t *packet, uint32_t length);
/* The same for the source. */
int mt_routes_source(const struct mt_routes *r, const uint8_t *packet, uint32_t length);
/* Whether these bytes are one IP packet: version, header length, total length. */
bool mt_well_formed(const uint8_t *packet, uint32_t length);

#endif
