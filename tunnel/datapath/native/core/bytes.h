/* Integers in network byte order, and QUIC's variable-length ones (RFC 9000 section 16). */
#ifndef MT_BYTES_H
#define MT_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Microseconds of the caller's monotonic clock. Nothing in core/ reads a clock. */
typedef int64_t mt_time;
#define MT_NEVER INT64_MAX
#define MT_SECOND ((mt_time)1000000)
#define MT_MILLISECOND ((mt_time)1000)

static inline uint16_t mt_get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }

static inline uint32_t mt_get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return __builtin_bswap32(v);
}

static inline uint64_t mt_get64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return __builtin_bswap64(v);
}

static inline void mt_put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void mt_put32(uint8_t *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, 4);
}

static inline void mt_put64(uint8_t *p, uint64_t v)
{
    v = __builtin_bswap64(v);
    memcpy(p, &v, 8);
}

/* Reads a variable-length integer at *at and moves *at behind it; false where `end` cuts it. */
static inline bool mt_get_varint(const uint8_t **at, const uint8_t *end, uint64_t *value)
{
    const uint8_t *p = *at;
    if (p >= end)
        return false;
    size_t size = (size_t)1 << (p[0] >> 6);
    if ((size_t)(end - p) < size)
        return false;
    uint64_t v = p[0] & 0x3f;
    for (size_t i = 1; i < size; i++)
        v = v << 8 | p[i];
    *at = p + size;
    *value = v;
    return true;
}

static inline size_t mt_varint_size(uint64_t v)
{
    return v < 1u << 6 ? 1 : v < 1u << 14 ? 2 : v < 1u << 30 ? 4 : 8;
}

/* Writes `v`, which is below 2^62; returns the bytes written. */
static inline size_t mt_put_varint(uint8_t *p, uint64_t v)
{
    if (v < 1u << 6) {
        p[0] = (uint8_t)v;
        return 1;
    }
    if (v < 1u << 14) {
        mt_put16(p, (uint32_t)v | 0x4000);
        return 2;
    }
    if (v < 1u << 30) {
        mt_put32(p, (uint32_t)v | 0x80000000u);
        return 4;
    }
    mt_put64(p, v | 0xc000000000000000u);
    return 8;
}

#endif
