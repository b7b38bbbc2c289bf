/* Super-packets: what the kernel hands to a TUN device with IFF_VNET_HDR, cut into IP packets, and
 * IP packets put together again for it.
 *
 * A super-packet is one virtio header and up to 64 KiB of one flow with one set of headers
 * (TSO, USO). Each segment is a whole IP packet: lengths, IP ID, sequence number, flags and
 * checksums are its own.
 */
#ifndef MT_OFFLOAD_H
#define MT_OFFLOAD_H

#include <sys/uio.h>

#include "bytes.h"

#define MT_MAX_IP 65535 /* bytes of an IP packet, super or not */

/* struct virtio_net_hdr (<linux/virtio_net.h>), in host byte order as TUN uses it by default. */
struct mt_vnet {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
};
#define MT_VNET_SIZE 10
#define MT_VNET_NEEDS_CSUM 1
#define MT_VNET_DATA_VALID 2
#define MT_GSO_NONE 0
#define MT_GSO_TCPV4 1
#define MT_GSO_TCPV6 4
#define MT_GSO_UDP_L4 5
#define MT_GSO_ECN 0x80

/* The Internet checksum (RFC 1071) over `n` bytes, added to `sum`, unfolded, host byte order: a
 * number, written with mt_put16() when folded. Only the last piece of a sum may be of odd size. */
uint64_t mt_checksum_add(const uint8_t *data, size_t n, uint64_t sum);
/* Folded to 16 bits, not complemented. */
uint16_t mt_checksum_fold(uint64_t sum);
/* Sum of the pseudo header of the IP packet at `ip` for an upper-layer length (RFC 8200 8.1). */
uint64_t mt_checksum_pseudo(const uint8_t *ip, uint8_t protocol, uint32_t upper_length);

/* One packet from the TUN, ready to be cut. Points into the caller's memory. */
struct mt_super {
    uint8_t *packet;
    uint32_t length;
    uint32_t header; /* IP and TCP/UDP header together; 0 where the packet is not to be cut */
    uint32_t l4;     /* where the TCP or UDP header begins */
    uint32_t mss;    /* payload bytes of every segment but the last */
    uint32_t count;  /* segments, at least 1 */
    uint8_t protocol; /* 6 or 17 when it is cut */
    uint8_t version;  /* 4 or 6 */
};

/* Look at a packet. An uncut packet with NEEDS_CSUM gets its checksum completed in place.
 * False: malformed or of a kind that cannot be cut; drop it. Every length is checked here, so
 * that the functions below need not. */
bool mt_super_open(struct mt_super *s, const struct mt_vnet *vnet, uint8_t *packet,
                   uint32_t length);
/* Bytes of segment `index` (0 .. count-1) as an IP packet. */
uint32_t mt_super_size(const struct mt_super *s, uint32_t index);
/* Writes segment `index`, mt_super_size() bytes, to `out`. */
void mt_super_cut(const struct mt_super *s, uint32_t index, uint8_t *out);

/* Puts received IP packets together. The packets' memory belongs to the caller, must stay until
 * the flush, and may be written to. Packets of one flow leave in the order they came. */
struct mt_coalescer;
typedef void (*mt_write_packet)(void *context, const struct mt_vnet *vnet, struct iovec *parts,
                                int count, uint32_t length);
/* `parts` has one more entry before it, parts[-1], which the writer may fill with the header. */

struct mt_coalescer *mt_coalescer_new(void); /* NULL: no memory. It allows neither yet. */
void mt_coalescer_free(struct mt_coalescer *c);
/* Whether to coalesce TCP and UDP (the device takes TSO; takes USO); both false: never. */
void mt_coalescer_allow(struct mt_coalescer *c, bool tcp, bool udp);
/* Take in one well-formed IP packet (any other bytes leave as they came). Returns false when it is full: flush, then add again. */
bool mt_coalescer_add(struct mt_coalescer *c, uint8_t *packet, uint32_t length);
/* Hand everything to `write`, in order of arrival of each group's first packet; then empty. */
void mt_coalescer_flush(struct mt_coalescer *c, mt_write_packet write, void *context);

#endif
