#include "keys.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>

#define IV 12 /* bytes, all ciphers */
#define KEY_PHASE_BIT 0x04

/* How the providers of OpenSSL name what a cipher suite needs. */
static const struct suite {
    const char *aead;
    const char *header;
    int key; /* bytes, of both */
} suites[] = {
    [MT_AES_128_GCM] = {"AES-128-GCM", "AES-128-ECB", 16},
    [MT_AES_256_GCM] = {"AES-256-GCM", "AES-256-ECB", 32},
    [MT_CHACHA20_POLY1305] = {"ChaCha20-Poly1305", "ChaCha20", 32},
};

/* The keys of one generation and direction. The key schedule stays in the context; each packet
 * only sets its nonce. */
struct aead {
    EVP_CIPHER_CTX *context;
    uint8_t iv[IV];
};

struct mt_keys {
    /* Fetched once: in OpenSSL 3 EVP_aes_128_gcm() and its like are looked up at every use. */
    EVP_CIPHER *aead;
    EVP_CIPHER *header;
    EVP_CIPHER_CTX *seal_header, *open_header;
    enum mt_cipher cipher;

    struct aead seal, next_seal;
    struct aead previous_open, open, next_open;
    bool has_previous, has_next;
    int phase;

    uint64_t updates;
    uint64_t sealed;
    uint64_t first_sealed;
    uint64_t first_opened;
    uint64_t failed;
};

static bool aead_set(const struct mt_keys *k, struct aead *a, const struct mt_secret *s, int seal)
{
    memcpy(a->iv, s->iv, IV);
    return EVP_CipherInit_ex2(a->context, k->aead, s->key, NULL, seal, NULL);
}

/* Wipes the key; the context is ready for another one. */
static void aead_wipe(struct aead *a)
{
    EVP_CIPHER_CTX_reset(a->context);
    OPENSSL_cleanse(a->iv, IV);
}

static bool aead_new(struct aead *a)
{
    a->context = EVP_CIPHER_CTX_new();
    return a->context != NULL;
}

static void aead_free(struct aead *a)
{
    EVP_CIPHER_CTX_free(a->context);
}

static EVP_CIPHER_CTX *header_new(const EVP_CIPHER *cipher, const uint8_t *key)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context == NULL)
        return NULL;
    if (!EVP_EncryptInit_ex2(context, cipher, key, NULL, NULL)) {
        EVP_CIPHER_CTX_free(context);
        return NULL;
    }
    /* Samples are whole blocks; with padding ECB would hold the last one back. */
    EVP_CIPHER_CTX_set_padding(context, 0);
    return context;
}

struct mt_keys *mt_keys_new(enum mt_cipher cipher, const struct mt_secret *seal,
                            const struct mt_secret *open, const uint8_t *seal_hp,
                            const uint8_t *open_hp, int phase)
{
    if ((unsigned)cipher >= sizeof suites / sizeof *suites)
        return NULL;
    struct mt_keys *k = OPENSSL_zalloc(sizeof *k);
    if (k == NULL)
        return NULL;
    const struct suite *suite = &suites[cipher];
    k->cipher = cipher;
    k->phase = phase & 1;
    k->first_sealed = k->first_opened = UINT64_MAX;
    k->aead = EVP_CIPHER_fetch(NULL, suite->aead, NULL);
    k->header = EVP_CIPHER_fetch(NULL, suite->header, NULL);
    if (k->aead == NULL || k->header == NULL ||
        EVP_CIPHER_get_key_length(k->aead) != suite->key ||
        EVP_CIPHER_get_key_length(k->header) != suite->key)
        goto fail;
    k->seal_header = header_new(k->header, seal_hp);
    k->open_header = header_new(k->header, open_hp);
    if (k->seal_header == NULL || k->open_header == NULL)
        goto fail;
    if (!aead_new(&k->seal) || !aead_new(&k->next_seal) || !aead_new(&k->previous_open) ||
        !aead_new(&k->open) || !aead_new(&k->next_open))
        goto fail;
    if (!aead_set(k, &k->seal, seal, 1) || !aead_set(k, &k->open, open, 0))
        goto fail;
    return k;
fail:
    mt_keys_free(k);
    return NULL;
}

void mt_keys_free(struct mt_keys *k)
{
    if (k == NULL)
        return;
    /* Freeing a context wipes the key schedule in it. */
    aead_free(&k->seal);
    aead_free(&k->next_seal);
    aead_free(&k->previous_open);
    aead_free(&k->open);
    aead_free(&k->next_open);
    EVP_CIPHER_CTX_free(k->seal_header);
    EVP_CIPHER_CTX_free(k->open_header);
    EVP_CIPHER_free(k->aead);
    EVP_CIPHER_free(k->header);
    OPENSSL_clear_free(k, sizeof *k);
}

bool mt_keys_set_next(struct mt_keys *k, const struct mt_secret *seal,
                      const struct mt_secret *open)
{
    k->has_next = aead_set(k, &k->next_seal, seal, 1) && aead_set(k, &k->next_open, open, 0);
    return k->has_next;
}

bool mt_keys_has_next(const struct mt_keys *k) { return k->has_next; }

/* Next becomes current, current previous. */
static void rotate(struct mt_keys *k)
{
    struct aead spare = k->seal;
    k->seal = k->next_seal;
    k->next_seal = spare;
    spare = k->previous_open;
    k->previous_open = k->open;
    k->open = k->next_open;
    k->next_open = spare;
    /* Nothing is sealed with old keys, and nothing opened with those before the previous. */
    aead_wipe(&k->next_seal);
    aead_wipe(&k->next_open);
    k->has_next = false;
    k->has_previous = true;
    k->phase ^= 1;
    k->updates++;
    k->sealed = 0;
    k->first_sealed = UINT64_MAX;
    /* Until a packet opens with the new keys, every number of the other phase is of the old. */
    k->first_opened = UINT64_MAX;
}

bool mt_keys_update(struct mt_keys *k)
{
    if (!k->has_next || k->has_previous)
        return false;
    rotate(k);
    return true;
}

void mt_keys_forget_previous(struct mt_keys *k)
{
    if (k->has_previous)
        aead_wipe(&k->previous_open);
    k->has_previous = false;
}

bool mt_keys_has_previous(const struct mt_keys *k) { return k->has_previous; }

int mt_keys_phase(const struct mt_keys *k) { return k->phase; }

uint64_t mt_keys_updates(const struct mt_keys *k) { return k->updates; }

uint64_t mt_keys_sealed(const struct mt_keys *k) { return k->sealed; }

uint64_t mt_keys_first_sealed(const struct mt_keys *k) { return k->first_sealed; }

uint64_t mt_keys_first_opened(const struct mt_keys *k) { return k->first_opened; }

uint64_t mt_keys_failed(const struct mt_keys *k) { return k->failed; }

/* RFC 9001 section 5.3: the IV, XORed with the packet number in its last 64 bits. */
static void make_nonce(uint8_t *nonce, const uint8_t *iv, uint64_t number)
{
    memcpy(nonce, iv, IV);
    mt_put64(nonce + 4, mt_get64(iv + 4) ^ number);
}

static bool seal_with(const struct aead *a, uint64_t number, uint8_t *packet, uint32_t header,
                      const uint8_t *text, uint32_t payload)
{
    uint8_t nonce[IV];
    uint8_t *sealed = packet + header, *tag = sealed + payload;
    OSSL_PARAM get_tag[] = {
        OSSL_PARAM_construct_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, tag, MT_TAG),
        OSSL_PARAM_construct_end(),
    };
    int size;
    make_nonce(nonce, a->iv, number);
    return EVP_EncryptInit_ex2(a->context, NULL, NULL, nonce, NULL) &&
           EVP_EncryptUpdate(a->context, NULL, &size, packet, (int)header) &&
           EVP_EncryptUpdate(a->context, sealed, &size, text, (int)payload) &&
           EVP_EncryptFinal_ex(a->context, tag, &size) &&
           EVP_CIPHER_CTX_get_params(a->context, get_tag);
}

void mt_keys_seal(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                  uint32_t payload)
{
    mt_keys_seal_from(k, number, packet, header, packet + header, payload);
}

void mt_keys_seal_from(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                       const uint8_t *text, uint32_t payload)
{
    if (number < k->first_sealed)
        k->first_sealed = number;
    k->sealed++;
    /* It cannot fail with keys that are set. Should it fail all the same, nothing readable may
     * leave: the peer will not open zeros. */
    if (!seal_with(&k->seal, number, packet, header, text, payload))
        memset(packet + header, 0, (size_t)payload + MT_TAG);
}

static bool open_with(const struct aead *a, uint64_t number, uint8_t *packet, uint32_t header,
                      uint32_t payload)
{
    uint8_t nonce[IV];
    uint8_t *text = packet + header, *tag = text + payload;
    OSSL_PARAM set_tag[] = {
        OSSL_PARAM_construct_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, tag, MT_TAG),
        OSSL_PARAM_construct_end(),
    };
    int size;
    make_nonce(nonce, a->iv, number);
    return EVP_DecryptInit_ex2(a->context, NULL, NULL, nonce, set_tag) &&
           EVP_DecryptUpdate(a->context, NULL, &size, packet, (int)header) &&
           EVP_DecryptUpdate(a->context, text, &size, text, (int)payload) &&
           EVP_DecryptFinal_ex(a->context, tag, &size) > 0;
}

bool mt_keys_open(struct mt_keys *k, uint64_t number, uint8_t *packet, uint32_t header,
                  uint32_t payload)
{
    /* Opening in place leaves no ciphertext for a second try, so the generation is chosen before
     * (RFC 9001 section 6.5): a packet of the other phase is late when its number is below those
     * of the current phase, otherwise it begins the next. */
    bool current = ((packet[0] & KEY_PHASE_BIT) != 0) == k->phase;
    bool late = !current && k->has_previous && number < k->first_opened;
    const struct aead *keys = current ? &k->open : late ? &k->previous_open : &k->next_open;
    if (payload < MT_TAG || (!current && !late && !k->has_next) ||
        !open_with(keys, number, packet, header, payload - MT_TAG)) {
        k->failed++;
        return false;
    }
    if (!current && !late)
        rotate(k);
    if (!late && number < k->first_opened)
        k->first_opened = number;
    return true;
}

void mt_keys_masks(struct mt_keys *k, bool seal, const uint8_t *samples, uint8_t *masks,
                   uint32_t count)
{
    static const uint8_t zeros[5];
    EVP_CIPHER_CTX *context = seal ? k->seal_header : k->open_header;
    int size;
    if (k->cipher != MT_CHACHA20_POLY1305) {
        /* RFC 9001 section 5.4.3: the sample encrypted as one block. */
        EVP_EncryptUpdate(context, masks, &size, samples, (int)(count * MT_SAMPLE));
        return;
    }
    /* Section 5.4.4: block counter and nonce are the sample, in the order OpenSSL wants them. */
    for (uint32_t i = 0; i < count; i++) {
        EVP_EncryptInit_ex2(context, NULL, NULL, samples + i * MT_SAMPLE, NULL);
        EVP_EncryptUpdate(context, masks + i * MT_SAMPLE, &size, zeros, sizeof zeros);
    }
}

uint64_t mt_decode_number(uint64_t largest, uint64_t truncated, int bytes)
{
    uint64_t expected = largest + 1;
    uint64_t window = (uint64_t)1 << (8 * bytes);
    uint64_t half = window / 2;
    uint64_t candidate = (expected & ~(window - 1)) | truncated;
    /* The half is added, not subtracted, lest a small number wrap around. */
    if (candidate + half <= expected && candidate < ((uint64_t)1 << 62) - window)
        return candidate + window;
    if (candidate > expected + half && candidate >= window)
        return candidate - window;
    return candidate;
}

const char *mt_libcrypto(void) { return OpenSSL_version(OPENSSL_VERSION); }
