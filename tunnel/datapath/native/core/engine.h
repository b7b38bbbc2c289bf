/* The engine: 1-RTT packets of any number of connections between IP packets and datagrams.
 *
 *   mt_engine    one per process: the outbox, delivery, routes, the table of connection IDs
 *   mt_lane      one per peer, stays when connections come and go: queue, reassembly, counters
 *   mt_conn      one QUIC connection after its handshake: keys, packet numbers, paths, recovery
 *   mt_path      one network path of a connection: RTT, window, pacing, size, 3x limit
 *
 * The engine owns the packet number space: DATAGRAM, ACK, PADDING and PING frames are its own; what
 * else a packet carries is handed to the owner opened, and what else is to be sent the owner has
 * sealed here. It is mechanism only: which path is active, what window it has, what a packet from
 * another path means, when a silent path is given up, all that is decided above.
 *
 * No I/O and no clock: `now` comes in, sealed datagrams wait in the outbox, received IP packets go to
 * `write`. Nothing here may be called from two threads at once.
 */
#ifndef MT_ENGINE_H
#define MT_ENGINE_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "keys.h"
#include "offload.h"
#include "queue.h"
#include "reassembly.h"
#include "received.h"
#include "routes.h"
#include "store.h"

#define MT_CID 8            /* bytes of our own connection IDs */
#define MT_MAX_CID 20       /* of the peer's (RFC 9000 section 17.2) */
#define MT_PATHS 34         /* slots of a connection */
#define MT_MAX_DATAGRAM 1500 /* bytes of UDP payload we ever send */
#define MT_HOST_CIDS 16     /* of a connection, known at a time */
#define MT_OUTBOX (384 * 1024)
#define MT_OUTBOX_PACKETS 512
#define MT_RECENT_LOST 64 /* numbers declared lost, to find out that they were only late */
#define MT_NUMBER_SIZE 4 /* bytes of the packet numbers we send: any flight fits */
#define MT_REDUNDANCY 32000 /* bytes of IP packets a second: 256 kbit/s go two ways by default */

/* ---- paths ---- */

/* What the congestion controller is told, gathered since it was told last. */
struct mt_sample {
    uint64_t acked, lost; /* bytes */
    mt_time rtt;          /* smallest measured; 0: none */
    double rate;          /* largest delivery rate, bytes per microsecond; 0: none */
    bool app_limited;     /* whether that rate was sampled while there was nothing to send */
    uint64_t prior_delivered;
    bool spurious; /* packets declared lost had only been late */
    bool pending;
};

struct mt_path {
    bool used;
    uint8_t index;
    uint32_t generation; /* of what is in this slot */

    /* where to: for io/ alone */
    int socket; /* io's number of the local socket, -1: none */
    struct sockaddr_storage to;
    socklen_t to_length;
    int refused; /* errno with which that socket refused to send, until it is reported; 0: none */

    /* connection IDs */
    uint8_t cid[MT_MAX_CID]; /* what we send with here */
    uint8_t cid_length;
    bool has_cid;
    uint8_t expected[MT_CID]; /* ours, that the peer last moved with here */
    bool has_expected;

    uint32_t mtu;  /* bytes of UDP payload */
    bool limited;  /* the remote address has not answered: 3x (RFC 9000 section 8) */
    uint64_t bytes_received, bytes_sent;

    /* RTT (RFC 9002 section 5), microseconds */
    bool has_rtt;
    double rtt_latest, rtt_min, rtt_smoothed, rtt_variance, initial_rtt;

    /* congestion and pacing, set from above */
    int64_t window;      /* bytes that may be outstanding */
    double pacing;       /* bytes per microsecond; 0: not paced */
    int64_t in_flight;   /* bytes */
    double tokens;       /* of the pacer; below 0: in debt */
    mt_time tokens_at;
    bool waiting; /* data waits for the pacer */

    /* recovery (RFC 9002), within this path only */
    uint32_t outstanding; /* ack-eliciting packets */
    uint64_t order;       /* of the next packet on this path: other paths' numbers leave no gaps */
    int64_t acked_order;  /* largest acknowledged */
    uint32_t threshold;   /* packets of reordering */
    uint64_t scan;        /* no packet of this path below this number is outstanding */
    mt_time last_eliciting_at, last_progress_at;
    mt_time waiting_since; /* oldest unanswered since the last progress; MT_NEVER: none */
    mt_time loss_at;
    uint64_t lost, large_lost;

    /* delivery rate (draft-ietf-ccwg-bbr section 4.1) */
    uint64_t delivered;
    mt_time delivered_at, first_sent;
    uint64_t app_limited; /* `delivered` at which the app-limited phase is over; 0: not in one */
    struct mt_sample sample;
    mt_time sampled_at;
};

/* ---- connections ---- */

enum mt_sent_state { MT_UNTRACKED, MT_OUTSTANDING, MT_SETTLED };
#define MT_SENT_FOREIGN 1   /* the owner's packet: it is told what became of it */
#define MT_SENT_ELICITING 2
#define MT_SENT_IN_FLIGHT 4 /* counts toward the window */
#define MT_SENT_LIMITED 8   /* left while there was nothing more to send */
#define MT_SENT_KEPT 16     /* a datagram whose payload the store has, or had */
#define MT_SENT_COPY 32     /* of another, its root */
#define MT_SENT_SPARSE 64   /* of a flow that sends little */
#define MT_SENT_DELIVERED 128 /* it, or a copy of it, was acknowledged */
#define MT_SENT_REPLAY 256    /* is to be replayed */
#define MT_SENT_REPLAYED 512  /* a copy: made by a replay; a root: such a copy came first */

struct mt_sent {
    mt_time at, delivered_at, first_sent;
    uint64_t delivered;
    uint64_t stored; /* of what is kept, its position in the store; of a copy, the root */
    uint32_t order;
    uint16_t size;
    uint16_t length; /* of a kept payload */
    uint16_t flags;
    uint8_t state;
    uint8_t path;   /* where it left; it may be gone */
    uint8_t copied; /* where the latest copy of it left, unless that was lost */
};

struct mt_numbers {
    uint64_t *items;
    uint32_t count, capacity;
};

/* What has happened to a connection that its owner must look at. */
#define MT_EVENT_OPENED 1
#define MT_EVENT_SETTLED 2
#define MT_EVENT_KEYS 4   /* a key update: the next generation is wanted */
#define MT_EVENT_PTO 8    /* a probe timeout: something ack-eliciting must leave */
#define MT_EVENT_SAMPLE 16
#define MT_EVENT_WAKE 32  /* the active path is silent past `patience` */
#define MT_EVENT_ERROR 64 /* the peer broke the protocol: close with `error` */
#define MT_EVENT_REFUSED 128 /* a socket refused to send; see the paths' `refused` */

#define MT_OPENED_DUPLICATE 1
#define MT_OPENED_MOVING 2 /* carries a frame, of those handled here, that means to move */
#define MT_OPENED_FRAMES 4 /* there are frames for the owner in `plain` */
#define MT_OPENED_MAX 512

/* A packet that is the owner's business: frames of its own, or perhaps a move. */
struct mt_opened {
    struct mt_opened *next;
    uint64_t number;
    uint32_t generation; /* of its path: the slot may hold another by now */
    uint8_t path, flags;
    uint8_t cid[MT_CID];
    uint32_t length;
    uint8_t plain[]; /* the payload; frames that were handled here are PADDING now */
};

/* How the peer broke the protocol, as a CONNECTION_CLOSE says it. */
struct mt_error {
    uint64_t code, frame;
    const char *reason;
};

struct mt_conn_counters {
    uint64_t sent, received;         /* packets, those of the engine */
    uint64_t acks_sent, acks_received;
    uint64_t duplicates, failed;     /* not authentic */
    uint64_t lost, spurious, ptos;
    uint64_t copies_sent, refused_opened;
    uint64_t window_blocked, pacing_blocked;
    uint64_t redundant_packets, redundant_bytes; /* copies of what had just left, as sent */
    uint64_t replayed;        /* datagrams sent once more */
    uint64_t replay_needless; /* copies of replays beside which the datagram came another way */
    uint64_t replay_given_up; /* too old, or no longer in the store */
};

struct mt_engine;
struct mt_lane;

struct mt_conn {
    void *owner; /* the binding's */
    struct mt_engine *engine;
    struct mt_lane *lane; /* NULL: not attached */
    struct mt_conn *next;
    bool running;
    struct mt_keys *keys;
    uint64_t max_sealed; /* packets of one key generation (RFC 9001 section 6.6) */
    mt_time forget_keys_at;
    uint64_t seen_updates;
    bool wants_update;

    uint64_t number;  /* of the next packet, in all spaces: aioquic counts them together */
    uint64_t settled; /* every lower number is acknowledged, lost or was never ours */
    uint64_t largest_acked;
    bool has_acked;
    struct mt_sent *ring;
    uint64_t ring_size; /* power of two */
    uint64_t recent_lost[MT_RECENT_LOST];
    uint32_t recent_lost_count;

    struct mt_received received;
    struct mt_window delivered; /* roots: the number a datagram first left in */
    struct {
        uint64_t number, largest;
    } acks[256]; /* what our latest ACK packets reported */
    uint32_t acks_count;
    int ack_exponent, peer_ack_exponent;
    mt_time ack_delay;      /* microseconds that an acknowledgement may wait */
    mt_time max_ack_delay;  /* the peer's */

    struct mt_path paths[MT_PATHS];
    struct mt_path *active;
    uint64_t active_since; /* number of the first packet since it is, and once one of these was
                            * acknowledged that one's: lower datagrams are lost to a move, not to
                            * the path in use */
    bool settling;         /* none was yet */
    struct mt_path *peer_path; /* where the peer's newest moving packet came from */
    struct mt_path *copies;    /* gets copies of what leaves on the active one; NULL: none does */
    bool copies_all;           /* of everything; otherwise of sparse flows, within a budget */
    uint64_t largest_moving;
    bool has_moving;
    mt_time heard_at;

    uint32_t pto_count;
    mt_time max_pto; /* microseconds at which back-off ends */
    mt_time patience; /* microseconds until a silent path is reported; 0: never */
    bool woken;
    mt_time pace_at;

    struct mt_store store;
    struct {
        struct mt_path *onto;
        uint32_t waiting[2]; /* of sparse flows, of others */
        uint64_t from[2];    /* none of these has a lower number */
        uint64_t oldest;     /* no lower number is in the store and wanted */
    } replay;

    uint8_t host_cids[MT_HOST_CIDS][MT_CID];
    uint32_t host_cid_count;

    uint32_t events;
    struct mt_opened *opened, **opened_tail;
    uint32_t opened_count;
    struct mt_numbers acked, lost;
    struct mt_error error;
    struct mt_conn_counters counters;
};

/* ---- lanes ---- */

struct mt_lane_counters {
    uint64_t sent, sent_bytes, received, received_bytes; /* IP packets */
    uint64_t split, copies_received, copies_dropped, refused, malformed, unknown_kind;
};

struct mt_lane {
    struct mt_engine *engine;
    struct mt_lane *next;
    int owner; /* as the routes name it */
    struct mt_queue *queue;
    struct mt_reassembler *reassembler;
    struct mt_conn *conn;
    bool held;
    uint64_t split_id;
    uint8_t *split; /* an IP packet, or a copy of one with its root, that leaves in parts */
    uint32_t split_length, split_offset;
    bool split_sparse, split_copy;
    double redundancy, credit; /* bytes per microsecond, bytes */
    mt_time credit_at;
    struct mt_lane_counters counters;
};

/* ---- the engine ---- */

/* Consecutive datagrams for one path; all of `segment` bytes but the last, which may be shorter. */
struct mt_message {
    struct mt_conn *conn;
    struct mt_path *path;
    uint32_t offset, length, segment, count;
};

struct mt_engine {
    uint8_t *out;
    uint32_t out_length;
    struct mt_message messages[MT_OUTBOX_PACKETS];
    uint32_t message_count;
    uint32_t packet_count;
    struct mt_coalescer *coalescer;
    struct mt_routes *routes;
    mt_write_packet write;
    void *write_context;
    struct mt_lane *lanes;
    struct mt_conn *conns;
    struct {
        uint64_t cid;
        struct mt_conn *conn;
    } *table;
    uint32_t table_size; /* power of two */
    uint64_t unroutable;
};

struct mt_engine *mt_engine_new(void); /* NULL: no memory */
void mt_engine_free(struct mt_engine *e); /* lanes and connections must be gone */
/* Replaces the routes; takes ownership. */
void mt_engine_set_routes(struct mt_engine *e, struct mt_routes *routes);
/* The running connection that issued this connection ID (MT_CID bytes), or NULL. */
struct mt_conn *mt_engine_find(const struct mt_engine *e, const uint8_t *cid);
/* Nothing of the outbox is needed any more. */
void mt_engine_sent(struct mt_engine *e);
/* Hand everything received to `write`; before the memory of received datagrams is reused. */
void mt_engine_flush(struct mt_engine *e);
struct mt_lane *mt_engine_lane(const struct mt_engine *e, int owner);

struct mt_lane *mt_lane_new(struct mt_engine *e, int owner); /* NULL: no memory */
void mt_lane_free(struct mt_lane *l);
/* There is no path: queue, send nothing. */
void mt_lane_hold(struct mt_lane *l);
void mt_lane_recover(struct mt_lane *l, mt_time now);
/* Whether an IP packet waits to be sent. */
bool mt_lane_pending(const struct mt_lane *l);
/* Bytes a second of sparse flows' packets that may go two ways; 0: none. */
void mt_lane_set_redundancy(struct mt_lane *l, double rate);

struct mt_conn *mt_conn_new(struct mt_engine *e); /* not running; NULL: no memory */
void mt_conn_free(struct mt_conn *c);
/* The handshake is confirmed: keys are taken over. False: no memory. */
bool mt_conn_start(struct mt_conn *c, struct mt_keys *keys, mt_time now);
/* Closing: nothing is sent or opened any more. Sealing for the owner still works. */
void mt_conn_stop(struct mt_conn *c);
/* Numbers start anew with a connection: what they named is forgotten, what waits is kept. Nothing
 * of one connection is replayed on another. */
void mt_conn_attach(struct mt_conn *c, struct mt_lane *lane);
void mt_conn_detach(struct mt_conn *c);
bool mt_conn_set_host_cids(struct mt_conn *c, const uint8_t (*cids)[MT_CID], uint32_t count);

/* A free slot made into a path with these starting values; NULL: none free. */
struct mt_path *mt_conn_add_path(struct mt_conn *c, uint32_t mtu, double initial_rtt);
/* What was in flight there is lost without blame. The active path cannot be removed. */
void mt_conn_remove_path(struct mt_conn *c, struct mt_path *p);
void mt_conn_activate(struct mt_conn *c, struct mt_path *p);
/* The window and RTT of another path: only the peer's port changed (RFC 9000 section 9.4). */
void mt_path_inherit(struct mt_path *p, const struct mt_path *from);
void mt_path_add_rtt(struct mt_path *p, double rtt, double ack_delay);
/* What is outstanding no longer fills the window: the path was dead, not congested. */
void mt_conn_forgive(struct mt_conn *c, struct mt_path *p);
/* Stop tracking everything sent on this path; the owner's packets there become lost. */
void mt_conn_abandon(struct mt_conn *c, struct mt_path *p);
/* Copies of what left on `from` within the last 2 s and is not known to have arrived are to leave on
 * `onto`, but for what is on its way there already: the active path after a switch, or another one
 * in a race, which moves nobody. Returns how many. All that still waits goes to `onto` from now on;
 * an activation and the loss of a datagram of a path that was left turn it to the active path. */
int mt_conn_replay(struct mt_conn *c, struct mt_path *from, struct mt_path *onto, mt_time now);
uint32_t mt_conn_replays(const struct mt_conn *c); /* that wait */
/* Whether mt_conn_seal() has something to send, if it may. */
bool mt_conn_pending(const struct mt_conn *c);
/* Microseconds, without back-off (RFC 9002 section 6.2.1). */
double mt_path_probe_timeout(const struct mt_path *p, mt_time max_ack_delay);
/* Bytes that may still go to an address that has not answered; UINT64_MAX: no limit. */
uint64_t mt_path_sendable(const struct mt_path *p);

/* One 1-RTT packet from a known path, opened in place; the memory must stay until
 * mt_engine_flush(). Returns whether it was authentic. */
bool mt_conn_receive(struct mt_conn *c, struct mt_path *p, uint8_t *packet, uint32_t length,
                     mt_time now);
/* The same for many, faster. `paths[i]` belongs to `packets[i]`; at most MT_KEYS_BATCH. */
void mt_conn_receive_batch(struct mt_conn *c, struct mt_path **paths, uint8_t **packets,
                           const uint32_t *lengths, uint32_t count, mt_time now);
/* The batch is over: acknowledge into the outbox if it is time. */
void mt_conn_received(struct mt_conn *c, mt_time now);

/* Fill the outbox as far as window, pacer, 3x and the outbox itself allow; packets sealed. */
uint32_t mt_conn_seal(struct mt_conn *c, mt_time now);
/* Seal a packet of the owner: `header` bytes with an unprotected short header that ends in a number
 * of `number_size` bytes, `payload` bytes of frames. Writes the protected packet, with a number of
 * MT_NUMBER_SIZE bytes, to `out`; returns its size. */
uint32_t mt_conn_seal_foreign(struct mt_conn *c, uint64_t number, const uint8_t *header,
                              uint32_t header_size, uint32_t number_size, const uint8_t *payload,
                              uint32_t payload_size, uint8_t *out);
/* The owner's packet `number` leaves on path `p`. False: no memory. */
bool mt_conn_sent(struct mt_conn *c, struct mt_path *p, uint64_t number, uint32_t size, int flags,
                  mt_time at);
/* Numbers up to this one were used by somebody else (other packet number spaces). */
bool mt_conn_skip_to(struct mt_conn *c, uint64_t number);

/* Frames that came behind one of the owner's in the same packet. False: malformed. */
bool mt_conn_ack_frame(struct mt_conn *c, struct mt_path *p, const uint8_t *frame, uint32_t length,
                       bool ecn, mt_time now, uint32_t *used);
void mt_conn_datagram(struct mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                      mt_time now);

mt_time mt_conn_timer(const struct mt_conn *c); /* MT_NEVER: none */
void mt_conn_on_timer(struct mt_conn *c, mt_time now);
/* A socket refused to send on this path. */
void mt_conn_refused(struct mt_conn *c, struct mt_path *p, int code);

#endif
