/* Packet protection of the 1-RTT space (RFC 9001 sections 5 and 6) on OpenSSL EVP.
 *
 * Three generations of keys: the previous one opens late packets, the current one seals and
 * opens, the next one is derived ahead by the owner, so that an update by the peer costs no more
 * than any other packet (section 6.3). The header protection keys are never updated.
 */
#ifndef MT_KEYS_H
#define MT_KEYS_H

#include "bytes.h"

#define MT_TAG 16    /* bytes, all ciphers */
#define MT_SAMPLE 16 /* bytes of ciphertext that header protection samples */
#define MT_KEYS_BATCH 256 /* packets mt_keys_masks() takes at most */

enum mt_cipher { MT_AES_128_GCM, MT_AES_256_GCM, MT_CHACHA20_POLY1305 };

/* What is derived from one traffic secret; `key` has 16 or 32 bytes, as the cipher says. */
struct mt_secret {
    uint8_t key[32];
    uint8_t iv[12];
};

struct mt_keys;

/* `phase` is the key phase bit of the current generation. NULL: no memory, or the cipher is not
 * to be had. Header protection keys have the length of the cipher's key. */
struct mt_keys *mt_keys_new(enum mt_cipher cipher, const struct mt_secret *seal,
                            const struct mt_secret *open, const uint8_t *seal_hp,
                            const uint8_t *open_hp, int phase);
void mt_keys_free(struct mt_keys *k);

/* The next generation. Until it is set, updates (ours and the peer's) are refused. */
bool mt_keys_set_next(struct mt_keys *k, const struct mt_secret *seal,
                      const struct mt_secret *open);
bool mt_keys_has_next(const struct mt_keys *k);
/* Start an update: next becomes current, current previous. False without a next generation, and
 * while the previous one is held. */
bool mt_keys_update(struct mt_keys *k);
/* Drop the previous read keys; before that no second update is started by us. */
void mt_keys_forget_previous(struct mt_keys *k);
bool mt_keys_has_previous(const struct mt_keys *k);

int mt_keys_phase(const struct mt_keys *k);
uint64_t mt_keys_updates(const struct mt_keys *k);  /* generations so far, either end's doing */
uint64_t mt_keys_sealed(const struct mt_keys *k);   /* packets sealed with the current keys */
uint64_t mt_keys_first_sealed(const struct mt_keys *k); /* lowest number of them; UINT64_MAX */
uint64_t mt_keys_first_opened(const struct mt_keys *k); /* lowest opened with them; UINT64_MAX */
uint64_t mt_keys_failed(const struct mt_keys *k);   /* packets that did not open, in all */

/* Seal in place: `header` bytes of header (key phase bit already right), then `payload` bytes;
 * MT_TAG bytes are appended. Header protection is separate. */
void mt_keys_seal(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                  uint32_t payload);
/* The same with the payload's text elsewhere. */
void mt_keys_seal_from(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                       const uint8_t *text, uint32_t payload);
/* Header protection masks, 5 bytes each at masks + 16 * i, for samples at samples + 16 * i;
 * at most MT_KEYS_BATCH. `seal`: ours, otherwise the peer's. */
void mt_keys_masks(struct mt_keys *k, bool seal, const uint8_t *samples, uint8_t *masks,
                   uint32_t count);
/* Open in place; header protection is already off. `payload` counts the tag. Picks the generation
 * by the phase bit and the number (section 6.5), and moves on to the next generation when a packet
 * opens with it: only a packet that opens proves an update (section 6.3). False: not authentic. */
bool mt_keys_open(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                  uint32_t payload);

/* The number of a packet from its truncated form of `bytes` bytes, 1 to 4 (RFC 9000 appendix A.3);
 * `largest` is the largest that was opened, UINT64_MAX before the first. */
uint64_t mt_decode_number(uint64_t largest, uint64_t truncated, int bytes);

/* "OpenSSL 3.0.17 1 Jul 2025", of the library that is loaded. */
const char *mt_libcrypto(void);

#endif
