/* What the fuzz targets share: the fuzzer's bytes as values, and checks that end the run. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdio.h>
#include <stdlib.h>

#include "core/internal.h"

#define CHECK(what)                                                                              \
    do {                                                                                         \
        if (!(what)) {                                                                           \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #what);            \
            abort();                                                                             \
        }                                                                                        \
    } while (0)

/* The fuzzer's bytes, read from the front; zeros when they are used up. */
struct input {
    const uint8_t *at, *end;
};

static inline size_t left(const struct input *in) { return (size_t)(in->end - in->at); }

static inline uint8_t byte(struct input *in) { return in->at < in->end ? *in->at++ : 0; }

static inline uint32_t word(struct input *in)
{
    uint32_t high = byte(in);
    return high << 8 | byte(in);
}

static inline uint64_t number(struct input *in, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value = value << 8 | byte(in);
    return value;
}

/* Up to `size` bytes into memory of its own, exactly as large: a read beyond it is found. */
static inline uint8_t *take(struct input *in, size_t size, uint32_t *taken)
{
    if (size > left(in))
        size = left(in);
    uint8_t *copy = malloc(size ? size : 1);
    CHECK(copy);
    memcpy(copy, in->at, size);
    in->at += size;
    *taken = (uint32_t)size;
    return copy;
}

/* The Internet checksum, slow and obvious: 0xffff over bytes that hold a right one. */
static inline uint32_t plain_sum(const uint8_t *p, size_t n, uint32_t sum)
{
    for (size_t i = 0; i < n; i++)
        sum += i & 1 ? p[i] : (uint32_t)p[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* The same over a TCP or UDP header at `l4` and what follows it, with the pseudo header. */
static inline uint32_t upper_sum(const uint8_t *ip, uint32_t length, uint32_t l4, uint8_t protocol)
{
    uint32_t sum = (length - l4) + protocol;
    sum = ip[0] >> 4 == 4 ? plain_sum(ip + 12, 8, sum) : plain_sum(ip + 8, 32, sum);
    return plain_sum(ip + l4, length - l4, sum);
}

/* The secrets of one direction (0, 1) and key generation: known to both ends. */
static inline struct mt_secret secret_of(int direction, uint64_t generation)
{
    struct mt_secret s;
    memset(s.key, 0x10 + direction, sizeof s.key);
    memset(s.iv, 0x50 + direction, sizeof s.iv);
    mt_put64(s.key, generation);
    return s;
}

/* One end's keys: `end` seals in direction `end` and opens the other one. */
static inline struct mt_keys *keys_of(int end)
{
    static const uint8_t hp[2][32] = {{1}, {2}};
    struct mt_secret seal = secret_of(end, 0), open = secret_of(!end, 0);
    struct mt_keys *keys = mt_keys_new(MT_AES_128_GCM, &seal, &open, hp[end], hp[!end], 0);
    CHECK(keys);
    return keys;
}

static inline void set_next(struct mt_keys *keys, int end)
{
    uint64_t generation = mt_keys_updates(keys) + 1;
    struct mt_secret seal = secret_of(end, generation), open = secret_of(!end, generation);
    CHECK(mt_keys_set_next(keys, &seal, &open));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
