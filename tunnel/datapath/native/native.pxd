# What the binding uses of the C library; core/ and io/ have the meaning.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr_storage:
        pass

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "core/engine.h" nogil:
    ctypedef int64_t mt_time
    const mt_time MT_NEVER
    const int MT_CID
    const int MT_MAX_CID
    const int MT_PATHS
    const int MT_MAX_DATAGRAM
    const int MT_HOST_CIDS
    const int MT_MAX_IP
    const int MT_TAG
    const int MT_SENT_FOREIGN
    const int MT_SENT_ELICITING
    const int MT_SENT_IN_FLIGHT
    const int MT_EVENT_OPENED
    const int MT_EVENT_SETTLED
    const int MT_EVENT_KEYS
    const int MT_EVENT_PTO
    const int MT_EVENT_SAMPLE
    const int MT_EVENT_WAKE
    const int MT_EVENT_ERROR
    const int MT_EVENT_REFUSED
    const int MT_OPENED_DUPLICATE
    const int MT_OPENED_MOVING
    const int MT_OPENED_FRAMES

    struct mt_vnet:
        uint8_t gso_type
        uint16_t gso_size

    enum mt_cipher:
        MT_AES_128_GCM
        MT_AES_256_GCM
        MT_CHACHA20_POLY1305

    struct mt_secret:
        uint8_t key[32]
        uint8_t iv[12]

    struct mt_keys:
        pass
    mt_keys *mt_keys_new(mt_cipher cipher, const mt_secret *seal, const mt_secret *open,
                         const uint8_t *seal_hp, const uint8_t *open_hp, int phase)
    bint mt_keys_set_next(mt_keys *k, const mt_secret *seal, const mt_secret *open)
    int mt_keys_phase(const mt_keys *k)
    uint64_t mt_keys_updates(const mt_keys *k)
    const char *mt_libcrypto()

    struct mt_routes:
        pass
    mt_routes *mt_routes_new()
    void mt_routes_free(mt_routes *r)
    bint mt_routes_add(mt_routes *r, int version, const uint8_t *address, int length, int owner)
    int mt_routes_destination(const mt_routes *r, const uint8_t *packet, uint32_t length)

    struct mt_queue:
        pass
    struct mt_queue_counters:
        uint64_t dropped, codel, marked, malformed
    void mt_queue_push(mt_queue *q, const mt_vnet *vnet, const uint8_t *packet, uint32_t length,
                       mt_time now)
    uint64_t mt_queue_bytes(const mt_queue *q)
    uint32_t mt_queue_packets(const mt_queue *q)
    const mt_queue_counters *mt_queue_get_counters "mt_queue_counters"(const mt_queue *q)
    void mt_queue_set_quantum(mt_queue *q, uint32_t size)
    void mt_queue_set_seed(mt_queue *q, uint64_t seed)

    struct mt_reassembler:
        pass
    uint64_t mt_reassembler_discarded(const mt_reassembler *r)

    struct mt_coalescer:
        pass
    void mt_coalescer_allow(mt_coalescer *c, bint tcp, bint udp)

    struct mt_sample:
        uint64_t acked, lost
        mt_time rtt
        double rate
        bint app_limited
        uint64_t prior_delivered
        bint spurious
        bint pending

    struct mt_path:
        bint used
        uint8_t index
        uint32_t generation
        int socket
        sockaddr_storage to
        socklen_t to_length
        int refused
        uint8_t cid[20]
        uint8_t cid_length
        bint has_cid
        uint8_t expected[8]
        bint has_expected
        uint32_t mtu
        bint limited
        uint64_t bytes_received, bytes_sent
        bint has_rtt
        double rtt_latest, rtt_min, rtt_smoothed, rtt_variance, initial_rtt
        int64_t window
        double pacing
        int64_t in_flight
        uint32_t outstanding, threshold
        mt_time last_eliciting_at, last_progress_at, waiting_since, loss_at
        uint64_t lost, large_lost
        uint64_t delivered
        mt_sample sample
        mt_time sampled_at

    struct mt_numbers:
        uint64_t *items
        uint32_t count

    struct mt_opened:
        mt_opened *next
        uint64_t number
        uint32_t generation
        uint8_t path, flags
        uint8_t cid[8]
        uint32_t length
        uint8_t *plain

    struct mt_conn_counters:
        uint64_t sent, received, acks_sent, acks_received, duplicates, failed, lost, spurious, ptos
        uint64_t copies_sent, refused_opened, window_blocked, pacing_blocked
        uint64_t redundant_packets, redundant_bytes, replayed, replay_needless, replay_given_up

    struct mt_window:
        uint64_t end

    struct mt_received:
        mt_window arrived
        uint32_t eliciting
        mt_time eliciting_since
        bint at_once

    void mt_received_add(mt_received *r, uint64_t n, bint eliciting, mt_time now)

    struct mt_error:
        uint64_t code, frame
        const char *reason

    struct mt_conn:
        void *owner
        mt_engine *engine
        mt_lane *lane
        mt_conn *next
        bint running
        mt_keys *keys
        uint64_t max_sealed
        bint wants_update
        uint64_t number, settled, largest_acked
        bint has_acked
        mt_received received
        int ack_exponent, peer_ack_exponent
        mt_time ack_delay, max_ack_delay
        mt_path *paths
        mt_path *active
        mt_path *peer_path
        mt_path *copies
        bint copies_all
        uint64_t largest_moving
        bint has_moving
        mt_time heard_at
        uint32_t pto_count
        mt_time max_pto, patience
        bint woken
        uint32_t events
        mt_opened *opened
        mt_opened **opened_tail
        uint32_t opened_count
        mt_numbers acked, lost
        mt_error error
        mt_conn_counters counters

    struct mt_lane_counters:
        uint64_t sent, sent_bytes, received, received_bytes
        uint64_t split, copies_received, copies_dropped, refused, malformed, unknown_kind

    struct mt_lane:
        int owner
        mt_queue *queue
        mt_reassembler *reassembler
        mt_conn *conn
        bint held
        mt_lane_counters counters

    struct mt_message:
        mt_conn *conn
        mt_path *path
        uint32_t offset, length, segment, count

    ctypedef void (*mt_write_packet)(void *, const mt_vnet *, iovec *, int, uint32_t) noexcept nogil

    struct mt_engine:
        uint8_t *out
        mt_message *messages
        uint32_t message_count
        mt_coalescer *coalescer
        mt_routes *routes
        mt_write_packet write
        void *write_context
        mt_conn *conns
        uint64_t unroutable

    mt_engine *mt_engine_new()
    void mt_engine_free(mt_engine *e)
    void mt_engine_set_routes(mt_engine *e, mt_routes *routes)
    void mt_engine_sent(mt_engine *e)
    void mt_engine_flush(mt_engine *e)
    mt_lane *mt_engine_lane(const mt_engine *e, int owner)

    mt_lane *mt_lane_new(mt_engine *e, int owner)
    void mt_lane_free(mt_lane *l)
    void mt_lane_hold(mt_lane *l)
    void mt_lane_recover(mt_lane *l, mt_time now)
    bint mt_lane_pending(const mt_lane *l)
    void mt_lane_set_redundancy(mt_lane *l, double rate)

    mt_conn *mt_conn_new(mt_engine *e)
    void mt_conn_free(mt_conn *c)
    bint mt_conn_start(mt_conn *c, mt_keys *keys, mt_time now)
    void mt_conn_stop(mt_conn *c)
    void mt_conn_attach(mt_conn *c, mt_lane *lane)
    void mt_conn_detach(mt_conn *c)
    bint mt_conn_set_host_cids(mt_conn *c, const uint8_t (*cids)[8], uint32_t count)
    mt_path *mt_conn_add_path(mt_conn *c, uint32_t mtu, double initial_rtt)
    void mt_conn_remove_path(mt_conn *c, mt_path *p)
    void mt_conn_activate(mt_conn *c, mt_path *p)
    void mt_path_inherit(mt_path *p, const mt_path *other)
    void mt_path_add_rtt(mt_path *p, double rtt, double ack_delay)
    void mt_conn_forgive(mt_conn *c, mt_path *p)
    void mt_conn_abandon(mt_conn *c, mt_path *p)
    int mt_conn_replay(mt_conn *c, mt_path *left, mt_path *onto, mt_time now)
    uint32_t mt_conn_replays(const mt_conn *c)
    double mt_path_probe_timeout(const mt_path *p, mt_time max_ack_delay)
    uint64_t mt_path_sendable(const mt_path *p)
    bint mt_conn_receive(mt_conn *c, mt_path *p, uint8_t *packet, uint32_t length, mt_time now)
    void mt_conn_received(mt_conn *c, mt_time now)
    uint32_t mt_conn_seal(mt_conn *c, mt_time now)
    uint32_t mt_conn_seal_foreign(mt_conn *c, uint64_t number, const uint8_t *header,
                                  uint32_t header_size, uint32_t number_size,
                                  const uint8_t *payload, uint32_t payload_size, uint8_t *out)
    bint mt_conn_sent(mt_conn *c, mt_path *p, uint64_t number, uint32_t size, int flags, mt_time at)
    bint mt_conn_skip_to(mt_conn *c, uint64_t number)
    bint mt_conn_ack_frame(mt_conn *c, mt_path *p, const uint8_t *frame, uint32_t length, bint ecn,
                           mt_time now, uint32_t *used)
    void mt_conn_datagram(mt_conn *c, uint64_t number, uint8_t *payload, uint32_t length,
                          mt_time now)
    mt_time mt_conn_timer(const mt_conn *c)
    void mt_conn_on_timer(mt_conn *c, mt_time now)

cdef extern from "io/io.h" nogil:
    struct mt_io:
        pass
    struct mt_raw:
        int socket
        sockaddr_storage source "from"
        uint32_t length
        uint8_t *data
    struct mt_io_counters:
        uint64_t steps, tun_reads, tun_writes, tun_dropped, udp_reads, udp_read_messages
        uint64_t udp_writes, udp_write_messages, udp_dropped, udp_refused, segments_refused
        uint64_t raw_dropped
    mt_io *mt_io_new(mt_engine *e, int tun, bint tcp, bint udp)
    void mt_io_free(mt_io *io)
    int mt_io_fd(const mt_io *io)
    int mt_io_add_socket(mt_io *io, int fd)
    void mt_io_remove_socket(mt_io *io, int socket)
    bint mt_io_step(mt_io *io)
    void mt_io_transmit(mt_io *io)
    mt_raw *mt_io_take_raw(mt_io *io)
    int mt_io_tun_error(const mt_io *io)
    const mt_io_counters *mt_io_get_counters "mt_io_counters"(const mt_io *io)
