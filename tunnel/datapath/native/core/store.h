/* The payloads of sent datagrams, for a copy of them: a circular log of bytes, addressed by a
 * position that only grows. Nothing is ever freed: what is new takes the place of what is oldest,
 * and who holds a position asks whether it is still there. */
#ifndef MT_STORE_H
#define MT_STORE_H

#include "bytes.h"

struct mt_store {
    uint8_t *bytes; /* NULL: nothing was stored yet */
    uint32_t size;  /* a power of two */
    uint64_t begin, end; /* positions that are there */
};

/* Empty, and without memory until something is stored; positions go on. */
void mt_store_clear(struct mt_store *s);
/* The lowest position that is still there once `length` more bytes are stored. */
uint64_t mt_store_keeps(const struct mt_store *s, uint32_t length);
/* Twice the memory (or the first), with all that is there. False: as large as it gets, or no
 * memory. */
bool mt_store_grow(struct mt_store *s);
/* Room for `length` bytes in one piece, which go in with mt_store_commit(). NULL: no memory. */
uint8_t *mt_store_reserve(struct mt_store *s, uint32_t length);
/* The first `length` bytes of what was reserved were written; returns their position. */
uint64_t mt_store_commit(struct mt_store *s, uint32_t length);
/* What was stored there, until something else is; NULL: it is gone. */
const uint8_t *mt_store_get(const struct mt_store *s, uint64_t position);

#endif
