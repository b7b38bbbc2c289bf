/* Datagrams of somebody who has no keys: nothing opens, and nothing of the connection changes. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct mt_engine *e = mt_engine_new();
    struct mt_conn *c = mt_conn_new(e);
    struct mt_path *first = mt_conn_add_path(c, 1200, 1e5), *second = mt_conn_add_path(c, 1200, 1e5);
    const uint8_t cids[2][MT_CID] = {{1}, {2}};
    CHECK(mt_conn_set_host_cids(c, cids, 2));
    CHECK(mt_conn_start(c, keys_of(0), 0));
    int flags = byte(&in);
    if (flags & 1)
        mt_received_add(&c->received, number(&in, 8) >> 2, false, 0);
    uint64_t end = c->received.arrived.end;
    if (flags & 2)
        set_next(c->keys, 0);
    uint8_t *packets[16];
    uint32_t lengths[16];
    struct mt_path *paths[16];
    uint32_t count = 0;
    while (left(&in) && count < 16) {
        uint32_t wanted = byte(&in) & 1 ? word(&in) : byte(&in);
        packets[count] = take(&in, wanted, &lengths[count]);
        paths[count] = wanted & 1 ? first : second;
        mt_engine_find(e, lengths[count] > MT_CID ? packets[count] + 1 : cids[0]);
        count++;
    }
    if (flags & 4)
        mt_conn_receive_batch(c, paths, packets, lengths, count, 1000);
    else
        for (uint32_t i = 0; i < count; i++)
            CHECK(!mt_conn_receive(c, paths[i], packets[i], lengths[i], 1000));
    mt_engine_flush(e);
    mt_conn_received(c, 1000);
    for (uint32_t i = 0; i < count; i++)
        free(packets[i]);
    CHECK(c->received.arrived.end == end && !c->events && !c->opened && !c->counters.received);
    CHECK(!mt_keys_updates(c->keys) && !e->packet_count && c->heard_at == 0);
    mt_conn_free(c);
    mt_engine_free(e);
    return 0;
}
