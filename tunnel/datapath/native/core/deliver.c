/* What a DATAGRAM carries, on the way in (docs/protocol.md, Datagram payload). */
#include "internal.h"

/* One IP packet has arrived whole. `borrowed`: its memory is gone with the next datagram. */
static void deliver_packet(struct mt_lane *l, uint8_t *packet, uint32_t length, bool borrowed)
{
    struct mt_engine *e = l->engine;
    if (!mt_well_formed(packet, length) ||
        (e->routes && mt_routes_source(e->routes, packet, length) != l->owner)) {
        l->counters.refused++;
        return;
    }
    l->counters.received++;
    l->counters.received_bytes += length;
    if (!mt_coalescer_add(e->coalescer, packet, length)) {
        mt_engine_flush(e);
        mt_coalescer_add(e->coalescer, packet, length);
    }
    if (borrowed)
        mt_engine_flush(e);
}

/* Whether a datagram, or a copy of it, comes for the first time; from now on it does not. */
static bool first_time(struct mt_conn *c, uint64_t root)
{
    if (mt_window_has(&c->delivered, root)) {
        c->lane->counters.copies_dropped++;
        return false;
    }
    mt_window_add(&c->delivered, root);
    return true;
}

/* A copy that left in parts: kind, root, and the whole datagram of a packet. */
static bool deliver_whole_copy(struct mt_conn *c, uint64_t number, uint8_t *at, uint8_t *end)
{
    struct mt_lane *l = c->lane;
    const uint8_t *p = at + 1;
    uint64_t root;
    l->counters.copies_received++;
    if (!mt_get_varint(&p, end, &root) || root >= number || p == end || *p != KIND_PACKET)
        return false;
    at += p - at + 1;
    if (first_time(c, root))
        deliver_packet(l, at, (uint32_t)(end - at), true);
    return true;
}

static bool deliver_part(struct mt_conn *c, uint64_t number, const uint8_t *at, const uint8_t *end,
                         mt_time now)
{
    struct mt_lane *l = c->lane;
    uint64_t identifier, offset;
    if (!mt_get_varint(&at, end, &identifier) || !mt_get_varint(&at, end, &offset) || at >= end)
        return false;
    uint8_t last = *at++;
    if (last > 1 || at == end || offset > MT_MAX_IP ||
        offset + (uint64_t)(end - at) > MT_MAX_IP)
        return false;
    uint32_t total;
    uint8_t *packet = (uint8_t *)mt_reassembler_add(l->reassembler, identifier, offset, last, at,
                                                    (uint32_t)(end - at), now, &total);
    if (packet && packet[0] == KIND_COPY)
        return deliver_whole_copy(c, number, packet, packet + total);
    if (packet)
        deliver_packet(l, packet, total, true);
    return true;
}

static bool deliver(struct mt_conn *c, uint64_t number, uint8_t *at, uint8_t *end, mt_time now)
{
    struct mt_lane *l = c->lane;
    uint64_t root = number;
    if (at == end)
        return false;
    if (*at == KIND_COPY) {
        l->counters.copies_received++;
        const uint8_t *p = at + 1;
        /* A copy names a datagram that left before it. */
        if (!mt_get_varint(&p, end, &root) || root >= number || p == end || *p == KIND_COPY)
            return false;
        at += p - at;
    }
    if (!first_time(c, root))
        return true;
    if (*at == KIND_PACKET)
        deliver_packet(l, at + 1, (uint32_t)(end - at - 1), false);
    else if (*at == KIND_PART)
        return deliver_part(c, number, at + 1, end, now);
    else
        l->counters.unknown_kind++;
    return true;
}

void deliver_datagram(struct mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                      mt_time now)
{
    if (c->lane && !deliver(c, number, payload, payload + length, now))
        c->lane->counters.malformed++;
}

void mt_conn_datagram(struct mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                      mt_time now)
{
    deliver_datagram(c, number, payload, length, now);
}
