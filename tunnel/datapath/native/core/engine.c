/* The engine and its lanes: what outlives connections. */
#include "engine.h"

#include <stdlib.h>

#include "internal.h"

static void discard(void *context, const struct mt_vnet *vnet, struct iovec *parts, int count,
                    uint32_t length)
{
    (void)context, (void)vnet, (void)parts, (void)count, (void)length;
}

struct mt_engine *mt_engine_new(void)
{
    struct mt_engine *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->out = malloc(MT_OUTBOX);
    e->coalescer = mt_coalescer_new();
    e->write = discard;
    if (!e->out || !e->coalescer) {
        mt_engine_free(e);
        return NULL;
    }
    return e;
}

void mt_engine_free(struct mt_engine *e)
{
    free(e->out);
    if (e->coalescer)
        mt_coalescer_free(e->coalescer);
    if (e->routes)
        mt_routes_free(e->routes);
    free(e->table);
    free(e);
}

void mt_engine_set_routes(struct mt_engine *e, struct mt_routes *routes)
{
    if (e->routes)
        mt_routes_free(e->routes);
    e->routes = routes;
}

void mt_engine_sent(struct mt_engine *e)
{
    e->out_length = 0;
    e->message_count = 0;
    e->packet_count = 0;
}

void mt_engine_flush(struct mt_engine *e)
{
    mt_coalescer_flush(e->coalescer, e->write, e->write_context);
}

struct mt_lane *mt_engine_lane(const struct mt_engine *e, int owner)
{
    for (struct mt_lane *l = e->lanes; l; l = l->next)
        if (l->owner == owner)
            return l;
    return NULL;
}

/* ---- connection IDs ---- */

static uint64_t cid_value(const uint8_t *cid)
{
    uint64_t v;
    memcpy(&v, cid, sizeof v);
    return v;
}

/* Our connection IDs are random: they are their own hash. */
struct mt_conn *mt_engine_find(const struct mt_engine *e, const uint8_t *cid)
{
    if (!e->table_size)
        return NULL;
    uint64_t value = cid_value(cid);
    for (uint32_t i = (uint32_t)value;; i++) {
        uint32_t slot = i & (e->table_size - 1);
        if (!e->table[slot].conn)
            return NULL;
        if (e->table[slot].cid == value)
            return e->table[slot].conn;
    }
}

static bool rebuild(struct mt_engine *e)
{
    uint32_t count = 0;
    for (const struct mt_conn *c = e->conns; c; c = c->next)
        count += c->running ? c->host_cid_count : 0;
    uint32_t size = 16;
    while (size < 2 * count + 2) /* never full: a search must end */
        size *= 2;
    void *table = calloc(size, sizeof *e->table);
    if (!table)
        return false;
    free(e->table);
    e->table = table;
    e->table_size = size;
    for (struct mt_conn *c = e->conns; c; c = c->next)
        for (uint32_t i = 0; c->running && i < c->host_cid_count; i++) {
            uint64_t value = cid_value(c->host_cids[i]);
            uint32_t slot = (uint32_t)value & (size - 1);
            while (e->table[slot].conn)
                slot = (slot + 1) & (size - 1);
            e->table[slot].cid = value;
            e->table[slot].conn = c;
        }
    return true;
}

bool mt_conn_set_host_cids(struct mt_conn *c, const uint8_t (*cids)[MT_CID], uint32_t count)
{
    if (count > MT_HOST_CIDS)
        count = MT_HOST_CIDS;
    if (count)
        memmove(c->host_cids, cids, count * MT_CID);
    c->host_cid_count = count;
    return rebuild(c->engine);
}

/* ---- lanes ---- */

struct mt_lane *mt_lane_new(struct mt_engine *e, int owner)
{
    struct mt_lane *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->engine = e;
    l->owner = owner;
    l->redundancy = (double)MT_REDUNDANCY / MT_SECOND;
    l->queue = mt_queue_new();
    l->reassembler = mt_reassembler_new();
    if (!l->queue || !l->reassembler) {
        if (l->queue)
            mt_queue_free(l->queue);
        if (l->reassembler)
            mt_reassembler_free(l->reassembler);
        free(l);
        return NULL;
    }
    l->next = e->lanes;
    e->lanes = l;
    return l;
}

void mt_lane_free(struct mt_lane *l)
{
    if (l->conn)
        mt_conn_detach(l->conn);
    for (struct mt_lane **at = &l->engine->lanes; *at; at = &(*at)->next)
        if (*at == l) {
            *at = l->next;
            break;
        }
    mt_queue_free(l->queue);
    mt_reassembler_free(l->reassembler);
    free(l->split);
    free(l);
}

void mt_lane_hold(struct mt_lane *l)
{
    l->held = true;
    mt_queue_hold(l->queue);
}

void mt_lane_recover(struct mt_lane *l, mt_time now)
{
    if (l->held) {
        l->held = false;
        mt_queue_recover(l->queue, now);
    }
}

bool mt_lane_pending(const struct mt_lane *l)
{
    return !l->held && (l->split_length || !mt_queue_empty(l->queue));
}

void mt_lane_set_redundancy(struct mt_lane *l, double rate)
{
    l->redundancy = rate / MT_SECOND;
    mt_queue_set_sparse(l->queue, rate);
}

void mt_conn_attach(struct mt_conn *c, struct mt_lane *lane)
{
    mt_conn_detach(c);
    if (lane->conn)
        mt_conn_detach(lane->conn);
    c->lane = lane;
    lane->conn = c;
    /* Parts of a packet whose first ones left on the old connection are of no use. */
    lane->split_length = 0;
    mt_reassembler_clear(lane->reassembler);
}

void mt_conn_detach(struct mt_conn *c)
{
    if (!c->lane)
        return;
    c->lane->conn = NULL;
    c->lane = NULL;
    replay_clear(c);
}
