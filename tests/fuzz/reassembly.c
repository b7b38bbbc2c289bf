/* Parts of IP packets in any order, against the one thing that counts: every byte of a packet that
 * comes out was sent with its identifier, at its place. */
#include "fuzz.h"

static uint8_t content(uint64_t identifier, uint64_t offset)
{
    uint64_t mixed = (identifier * 0x9e3779b97f4a7c15u) ^ (offset * 0xff51afd7ed558ccdu);
    return (uint8_t)(mixed >> 40);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct mt_reassembler *r = mt_reassembler_new();
    CHECK(r);
    mt_time now = 0;
    /* By identifier (of few): what the largest last part said since the beginning. */
    static uint8_t ends[16][MT_MAX_IP + 1];
    memset(ends, 0, sizeof ends);
    static uint8_t part[1 << 16];
    uint64_t sent = 0, received = 0;
    for (int steps = 0; left(&in) && steps < 600; steps++) {
        int flags = byte(&in);
        uint64_t identifier = byte(&in) & 15, offset = word(&in);
        uint32_t length = flags & 2 ? word(&in) : byte(&in);
        if (flags & 4) /* a grid, so that parts meet */
            offset = offset / 64 * 64, length = 64;
        if (flags & 8)
            now += word(&in) * 100;
        if (flags & 16)
            offset = number(&in, 8);
        if ((flags & 0xe0) == 0xe0)
            mt_reassembler_clear(r);
        for (uint32_t i = 0; i < length; i++)
            part[i] = content(identifier, offset + i);
        uint8_t *exact = malloc(length ? length : 1);
        memcpy(exact, part, length);
        bool last = flags & 1;
        if (last && offset <= MT_MAX_IP && offset + length <= MT_MAX_IP)
            ends[identifier][offset + length] = 1;
        sent += length;
        uint32_t total;
        const uint8_t *whole =
            mt_reassembler_add(r, identifier, offset, last, exact, length, now, &total);
        free(exact);
        if (!whole) {
            CHECK(total == 0);
            continue;
        }
        CHECK(total > 0 && total <= MT_MAX_IP && ends[identifier][total]);
        for (uint32_t i = 0; i < total; i++)
            CHECK(whole[i] == content(identifier, i));
        received += total;
        CHECK(received <= sent);
    }
    mt_reassembler_free(r);
    return 0;
}
