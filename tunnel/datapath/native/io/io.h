/* Batches between the TUN device, the engine and the UDP sockets: one call moves everything that is
 * ready, without Python.
 *
 * All descriptors are the caller's, non-blocking, and stay open until they are removed here. The
 * one descriptor to watch is mt_io_fd(); when it is readable, call mt_io_step().
 */
#ifndef MT_IO_H
#define MT_IO_H

#include "../core/engine.h"

struct mt_io;

/* A datagram that is none of the engine's business: a handshake, an unknown connection, or a path
 * that its connection does not know yet. */
struct mt_raw {
    struct mt_raw *next;
    int socket;
    struct sockaddr_storage from;
    uint32_t length;
    uint8_t data[];
};

struct mt_io_counters {
    uint64_t steps;
    uint64_t tun_reads, tun_writes, tun_dropped; /* super-packets; dropped: the device refused */
    uint64_t udp_reads, udp_read_messages;       /* system calls; messages, before GRO is undone */
    uint64_t udp_writes, udp_write_messages;
    uint64_t udp_dropped;    /* datagrams that the kernel's full queue did not take */
    uint64_t udp_refused;    /* datagrams a socket refused to send on their path */
    uint64_t segments_refused; /* messages sent one by one because UDP_SEGMENT was refused */
    uint64_t raw_dropped;    /* raw datagrams beyond MT_RAW_MAX waiting */
};
#define MT_RAW_MAX 1024

/* `tun` with IFF_VNET_HDR, its header MT_VNET_SIZE bytes; tcp, udp: what it takes coalesced.
 * NULL: no memory, or no descriptors left (errno). Sets the engine's `write`. */
struct mt_io *mt_io_new(struct mt_engine *e, int tun, bool tcp, bool udp);
void mt_io_free(struct mt_io *io);
int mt_io_fd(const struct mt_io *io);

/* A UDP socket, UDP_GRO already set where the kernel has it; its number, -1: no memory (errno). */
int mt_io_add_socket(struct mt_io *io, int fd);
/* Paths that name it must have been told otherwise before. */
void mt_io_remove_socket(struct mt_io *io, int socket);

/* Microseconds of CLOCK_BOOTTIME: the clock of all times of the engine when it is driven here. */
mt_time mt_io_now(void);

/* Move what is ready. True: a connection has events, a raw datagram waits, or the TUN failed. */
bool mt_io_step(struct mt_io *io);
/* Seal and send what may leave now, and arm the timer: after the owner changed anything. */
void mt_io_transmit(struct mt_io *io);
/* The oldest raw datagram, to be freed by the caller with free(); NULL: none. */
struct mt_raw *mt_io_take_raw(struct mt_io *io);
/* errno with which reading the TUN failed for good (EBADFD, EIO: it was removed); 0: it did not. */
int mt_io_tun_error(const struct mt_io *io);
const struct mt_io_counters *mt_io_counters(const struct mt_io *io);

#endif
