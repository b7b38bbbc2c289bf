"""The engine's packet protection: RFC 9001's vector, aioquic's contexts, updates in any order."""

from __future__ import annotations

import ctypes
import random
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p

import pytest
from aioquic._crypto import CryptoError
from aioquic.quic.crypto import CryptoContext, derive_key_iv_hp, next_key_phase
from aioquic.quic.packet import decode_packet_number
from aioquic.tls import CipherSuite
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from tests.unit.native import library

CIPHERS = [
    CipherSuite.AES_128_GCM_SHA256,
    CipherSuite.AES_256_GCM_SHA384,
    CipherSuite.CHACHA20_POLY1305_SHA256,
]
SECRET_SIZE = dict(zip(CIPHERS, (32, 48, 32), strict=True))
VERSION = 1
TAG = 16
BATCH = 256
NEVER = 2**64 - 1
LARGEST = 2**62 - 1  # a packet number

PHASE_BIT = 0x04


class Secret(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint8 * 32), ("iv", ctypes.c_uint8 * 12))


def load() -> ctypes.CDLL:
    lib = library("keys.c")
    secret = ctypes.POINTER(Secret)
    for name, result, arguments in (
        ("new", c_void_p, (c_int, secret, secret, c_char_p, c_char_p, c_int)),
        ("free", None, (c_void_p,)),
        ("set_next", ctypes.c_bool, (c_void_p, secret, secret)),
        ("has_next", ctypes.c_bool, (c_void_p,)),
        ("update", ctypes.c_bool, (c_void_p,)),
        ("forget_previous", None, (c_void_p,)),
        ("has_previous", ctypes.c_bool, (c_void_p,)),
        ("phase", c_int, (c_void_p,)),
        ("updates", c_uint64, (c_void_p,)),
        ("sealed", c_uint64, (c_void_p,)),
        ("first_sealed", c_uint64, (c_void_p,)),
        ("first_opened", c_uint64, (c_void_p,)),
        ("failed", c_uint64, (c_void_p,)),
        ("seal", None, (c_void_p, c_uint64, c_void_p, c_uint32, c_uint32)),
        ("masks", None, (c_void_p, ctypes.c_bool, c_char_p, c_void_p, c_uint32)),
        ("open", ctypes.c_bool, (c_void_p, c_uint64, c_void_p, c_uint32, c_uint32)),
    ):
        function = getattr(lib, f"mt_keys_{name}")
        function.restype, function.argtypes = result, arguments
    lib.mt_decode_number.restype = c_uint64
    lib.mt_decode_number.argtypes = (c_uint64, c_uint64, c_int)
    lib.mt_libcrypto.restype = c_char_p
    return lib


LIB = load()


def derived(cipher: CipherSuite, secret: bytes) -> tuple[Secret, bytes]:
    """What the engine is given of a traffic secret, and the header protection key."""
    key, iv, hp = derive_key_iv_hp(cipher_suite=cipher, secret=secret, version=VERSION)
    return Secret((ctypes.c_uint8 * 32)(*key), (ctypes.c_uint8 * 12)(*iv)), hp


def context(cipher: CipherSuite, secret: bytes, phase: int = 0) -> CryptoContext:
    found = CryptoContext(key_phase=phase)
    found.setup(cipher_suite=cipher, secret=secret, version=VERSION)
    return found


def next_secret(cipher: CipherSuite, secret: bytes) -> bytes:
    found = next_key_phase(context(cipher, secret)).secret
    assert found is not None
    return found


class Keys:
    """`struct mt_keys` whose owner derives the next generation ahead, as the binding does."""

    def __init__(
        self, cipher: CipherSuite, seal: bytes, open: bytes, phase: int = 0, ahead: bool = True
    ) -> None:
        self.cipher, self.secrets, self.ahead = cipher, (seal, open), ahead
        (ours, our_hp), (theirs, their_hp) = derived(cipher, seal), derived(cipher, open)
        self.k = LIB.mt_keys_new(CIPHERS.index(cipher), ours, theirs, our_hp, their_hp, phase)
        assert self.k
        self.release = LIB.mt_keys_free  # LIB itself may go first at exit
        self.generation = 0
        self.derive()

    def __del__(self) -> None:
        self.release(self.k)

    def derive(self) -> None:
        while self.generation < self.updates:
            self.secrets = (
                next_secret(self.cipher, self.secrets[0]),
                next_secret(self.cipher, self.secrets[1]),
            )
            self.generation += 1
        if self.ahead and not LIB.mt_keys_has_next(self.k):
            assert self.set_next()

    def set_next(self) -> bool:
        seal, open = (derived(self.cipher, next_secret(self.cipher, s))[0] for s in self.secrets)
        found: bool = LIB.mt_keys_set_next(self.k, seal, open)
        return found

    def seal(self, number: int, header: bytes, payload: bytes) -> bytes:
        packet = bytearray(header + payload + bytes(TAG))
        view = (ctypes.c_char * len(packet)).from_buffer(packet)
        LIB.mt_keys_seal(self.k, number, view, len(header), len(payload))
        return bytes(packet)

    def open(self, number: int, packet: bytes, header: int) -> bytes | None:
        """The payload, or None where the packet does not open."""
        copy = (ctypes.c_char * len(packet)).from_buffer_copy(packet)
        good = LIB.mt_keys_open(self.k, number, copy, header, len(packet) - header)
        self.derive()
        assert copy.raw[:header] == packet[:header]
        return copy.raw[header:-TAG] if good else None

    def masks(self, seal: bool, samples: list[bytes]) -> list[bytes]:
        out = ctypes.create_string_buffer(16 * len(samples))
        LIB.mt_keys_masks(self.k, seal, b"".join(samples), out, len(samples))
        return [out.raw[at : at + 5] for at in range(0, len(out.raw), 16)]

    def update(self) -> bool:
        done: bool = LIB.mt_keys_update(self.k)
        self.derive()
        return done

    def forget(self) -> None:
        LIB.mt_keys_forget_previous(self.k)

    @property
    def phase(self) -> int:
        return int(LIB.mt_keys_phase(self.k))

    @property
    def updates(self) -> int:
        return int(LIB.mt_keys_updates(self.k))

    @property
    def sealed(self) -> int:
        return int(LIB.mt_keys_sealed(self.k))

    @property
    def first_sealed(self) -> int:
        return int(LIB.mt_keys_first_sealed(self.k))

    @property
    def first_opened(self) -> int:
        return int(LIB.mt_keys_first_opened(self.k))

    @property
    def failed(self) -> int:
        return int(LIB.mt_keys_failed(self.k))

    @property
    def has_previous(self) -> bool:
        return bool(LIB.mt_keys_has_previous(self.k))


def pair(cipher: CipherSuite, rng: random.Random, ahead: bool = True) -> tuple[Keys, Keys]:
    one, two = (rng.randbytes(SECRET_SIZE[cipher]) for _ in range(2))
    return Keys(cipher, one, two, ahead=ahead), Keys(cipher, two, one, ahead=ahead)


def header_for(number: int, phase: int, cid: bytes = bytes(8), size: int = 4) -> bytes:
    first = 0x40 | phase << 2 | size - 1
    return bytes((first,)) + cid + (number % (1 << 8 * size)).to_bytes(size)


def protect(keys: Keys, packet: bytes, offset: int, size: int = 4) -> bytes:
    """Put header protection on (RFC 9001 section 5.4.1); the number begins at `offset`."""
    (mask,) = keys.masks(True, [packet[offset + 4 : offset + 20]])
    out = bytearray(packet)
    out[0] ^= mask[0] & 0x1F
    for i in range(size):
        out[offset + i] ^= mask[1 + i]
    return bytes(out)


def unprotect(keys: Keys, packet: bytes, offset: int, expected: int) -> tuple[bytes, int, int]:
    """The packet without header protection, its number, and the size of its header."""
    (mask,) = keys.masks(False, [packet[offset + 4 : offset + 20]])
    out = bytearray(packet)
    out[0] ^= mask[0] & 0x1F
    size = (out[0] & 3) + 1
    for i in range(size):
        out[offset + i] ^= mask[1 + i]
    end = offset + size
    number = LIB.mt_decode_number((expected - 1) % 2**64, int.from_bytes(out[offset:end]), size)
    return bytes(out), number, end


each_cipher = pytest.mark.parametrize("cipher", CIPHERS, ids=lambda cipher: cipher.name)


def test_the_version_is_that_of_the_library() -> None:
    assert LIB.mt_libcrypto().startswith(b"OpenSSL ")


def test_an_unknown_cipher_is_refused() -> None:
    secret, hp = derived(CIPHERS[0], bytes(32))
    for cipher in (-1, 3, 1 << 30):
        assert not LIB.mt_keys_new(cipher, secret, secret, hp, hp, 0)
    LIB.mt_keys_free(None)


# sealing, opening, header protection


def test_rfc_9001_appendix_a5() -> None:
    secret = bytes.fromhex("9ac312a7f877468ebe69422748ad00a15443f18203a07d6060f688f30f21632b")
    cipher = CipherSuite.CHACHA20_POLY1305_SHA256
    keys = Keys(cipher, secret, secret)
    number, header = 654360564, bytes.fromhex("4200bff4")
    sealed = keys.seal(number, header, b"\x01")
    assert sealed[4:] == bytes.fromhex("655e5cd55c41f69080575d7999c25a5bfb")
    sample = sealed[5:21]
    assert sample == bytes.fromhex("5e5cd55c41f69080575d7999c25a5bfb")
    assert keys.masks(True, [sample]) == [bytes.fromhex("aefefe7d03")]
    packet = protect(keys, sealed, 1, 3)
    assert packet == bytes.fromhex("4cfe4189655e5cd55c41f69080575d7999c25a5bfb")
    plain, found, end = unprotect(keys, packet, 1, number)
    assert (plain, found, end) == (sealed, number, 4)
    assert keys.open(found, plain, end) == b"\x01"


@each_cipher
@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_another_implementation(cipher: CipherSuite, seed: int) -> None:
    rng = random.Random(seed)
    secrets = rng.randbytes(SECRET_SIZE[cipher]), rng.randbytes(SECRET_SIZE[cipher])
    keys = Keys(cipher, *secrets)
    makes = ChaCha20Poly1305 if cipher is CIPHERS[2] else AESGCM
    aeads = []
    for secret in secrets:
        key, iv, _ = derive_key_iv_hp(cipher_suite=cipher, secret=secret, version=VERSION)
        aeads.append((makes(key), int.from_bytes(iv)))
    for _ in range(60):
        number = rng.choice([rng.randrange(1000), rng.randint(0, LARGEST), LARGEST])
        header = bytes((rng.choice([0x40, 0x43]),)) + rng.randbytes(rng.randrange(24))
        payload = rng.randbytes(rng.choice([0, 1, 15, 16, 17, 100, 1400, 9000, 65000]))
        aead, base = aeads[0]
        expected = header + aead.encrypt((base ^ number).to_bytes(12), payload, header)
        assert keys.seal(number, header, payload) == expected
        aead, base = aeads[1]
        theirs = header + aead.encrypt((base ^ number).to_bytes(12), payload, header)
        assert keys.open(number, theirs, len(header)) == payload
    assert (keys.sealed, keys.failed) == (60, 0)


@each_cipher
@pytest.mark.parametrize("seed", range(5))
def test_whole_packets_with_aioquic_both_ways(cipher: CipherSuite, seed: int) -> None:
    rng = random.Random(seed)
    one, two = (rng.randbytes(SECRET_SIZE[cipher]) for _ in range(2))
    keys, send, receive = Keys(cipher, one, two), context(cipher, two), context(cipher, one)
    number = 0
    for _ in range(60):
        number += rng.choice([1, 1, 1, 5, 100])
        size, cid = rng.choice([2, 3, 4]), rng.randbytes(rng.randrange(21))
        header, payload = header_for(number, 0, cid, size), rng.randbytes(rng.randint(4, 1400))
        offset = 1 + len(cid)
        packet = protect(keys, keys.seal(number, header, payload), offset, size)
        assert packet == context(cipher, one).encrypt_packet(header, payload, number)
        found = receive.decrypt_packet(packet, offset, number)
        assert found == (header, payload, number, False)
        theirs = send.encrypt_packet(header, payload, number)
        plain, theirs_number, end = unprotect(keys, theirs, offset, number)
        assert theirs_number == number
        assert keys.open(number, plain, end) == payload


@each_cipher
def test_masks_of_a_batch(cipher: CipherSuite) -> None:
    rng = random.Random(1)
    secrets = rng.randbytes(SECRET_SIZE[cipher]), rng.randbytes(SECRET_SIZE[cipher])
    keys = Keys(cipher, *secrets)
    for seal, secret in ((True, secrets[0]), (False, secrets[1])):
        hp = context(cipher, secret).hp
        assert hp is not None

        def mask_of(sample: bytes, hp: object = hp) -> bytes:
            # aioquic shows no mask: take it from zeros. The lowest two bits say that the number
            # has four bytes, and come from the mask's first byte themselves.
            packet = hp.apply(b"\x43\0\0\0\0", sample)  # type: ignore[attr-defined]
            return bytes(((packet[0] ^ 0x43) & 0x1F,)) + bytes(packet[1:5])

        for count in [*range(1, 20), 64, 255, BATCH]:
            samples = [rng.randbytes(16) for _ in range(count)]
            found = [bytes((mask[0] & 0x1F,)) + mask[1:] for mask in keys.masks(seal, samples)]
            assert found == [mask_of(sample) for sample in samples]


@each_cipher
def test_nothing_but_the_sealed_packet_opens(cipher: CipherSuite) -> None:
    rng = random.Random(2)
    near, far = pair(cipher, rng)
    header, payload = header_for(7, 0), rng.randbytes(50)
    packet = near.seal(7, header, payload)
    tries = 0
    for at in range(len(packet)):
        forged = bytearray(packet)
        forged[at] ^= 1 << rng.randrange(8)
        assert far.open(7, bytes(forged), len(header)) is None, at
        tries += 1
    for number in (0, 6, 8, 7 + 2**32, 7 + 2**61):
        assert far.open(number, packet, len(header)) is None
        tries += 1
    for size in range(len(header), len(packet)):
        assert far.open(7, packet[:size], len(header)) is None, size
        tries += 1
    assert far.open(7, packet + b"\0", len(header)) is None
    assert near.open(7, packet, len(header)) is None, "the other direction has other keys"
    assert far.failed == tries + 1
    assert (far.updates, far.first_opened) == (0, NEVER)
    assert far.open(7, packet, len(header)) == payload
    assert far.first_opened == 7


@pytest.mark.parametrize("seed", range(10))
def test_arbitrary_bytes_never_open(seed: int) -> None:
    rng = random.Random(seed)
    keys, _ = pair(rng.choice(CIPHERS), rng)
    keys.update()
    for tries in range(200):
        packet = rng.randbytes(rng.randint(1, 100))
        assert keys.open(rng.getrandbits(62), packet, rng.randint(1, len(packet))) is None
        assert keys.failed == tries + 1
    assert keys.updates == 1


# updates


@each_cipher
def test_packets_of_three_generations(cipher: CipherSuite) -> None:
    near, far = pair(cipher, random.Random(3))

    def seal(number: int) -> bytes:
        return near.seal(number, header_for(number, near.phase), b"%d" % number)

    old = [seal(number) for number in range(3)]
    assert near.update()
    new = [seal(number) for number in range(3, 6)]
    assert far.open(0, old[0], 13) == b"0"
    assert (far.updates, far.first_opened) == (0, 0)
    assert far.open(4, new[1], 13) == b"4", "taken over from the first packet that opens"
    assert (far.updates, far.phase, far.first_opened, far.has_previous) == (1, 1, 4, True)
    assert far.open(2, old[2], 13) == b"2", "late packets of the old keys still open"
    assert far.first_opened == 4
    assert far.open(3, new[0], 13) == b"3"
    assert far.first_opened == 3
    assert far.open(1, old[1], 13) == b"1"
    far.forget()
    assert not far.has_previous
    assert far.open(1, old[1], 13) is None
    assert (far.updates, far.failed) == (1, 1)


@each_cipher
def test_an_update_needs_the_next_keys_and_no_previous_ones(cipher: CipherSuite) -> None:
    near, far = pair(cipher, random.Random(4), ahead=False)
    assert not near.update()
    assert near.set_next() and near.set_next()
    assert (near.phase, near.updates) == (0, 0)
    assert near.update()
    assert (near.phase, near.updates, near.has_previous) == (1, 1, True)
    assert not near.update(), "no next keys"
    assert near.set_next()
    assert not near.update(), "the previous ones are still held"
    packet = near.seal(0, header_for(0, 1), b"new")
    assert far.open(0, packet, 13) is None, "no next keys"
    assert (far.failed, far.updates) == (1, 0)
    assert far.set_next()
    assert far.open(0, packet, 13) == b"new"
    assert (far.failed, far.updates) == (1, 1)
    near.forget()
    assert near.update()
    assert (near.phase, near.updates) == (0, 2)
    # The peer's update is taken even so: it may have forgotten sooner than we.
    assert far.has_previous and far.set_next()
    packet = near.seal(1, header_for(1, 0), b"newer")
    assert far.open(1, packet, 13) == b"newer"
    assert (far.phase, far.updates, far.has_previous) == (0, 2, True)


@each_cipher
def test_what_is_counted_of_a_generation(cipher: CipherSuite) -> None:
    near, _ = pair(cipher, random.Random(5))
    assert (near.sealed, near.first_sealed, near.first_opened) == (0, NEVER, NEVER)
    for number in (5, 7, 6):
        near.seal(number, header_for(number, 0), b"")
    assert (near.sealed, near.first_sealed) == (3, 5)
    assert near.update()
    assert (near.sealed, near.first_sealed, near.first_opened) == (0, NEVER, NEVER)
    near.seal(8, header_for(8, 1), b"")
    assert (near.sealed, near.first_sealed) == (1, 8)


def test_the_phase_that_the_keys_begin_with() -> None:
    secrets = b"1" * 32, b"2" * 32
    near, far = Keys(CIPHERS[0], *secrets, phase=1), Keys(CIPHERS[0], *secrets[::-1], phase=1)
    assert near.phase == 1
    assert far.open(0, near.seal(0, header_for(0, 1), b"x"), 13) == b"x"
    assert far.updates == 0
    assert near.update()
    assert far.open(1, near.seal(1, header_for(1, near.phase), b"y"), 13) == b"y"
    assert (far.updates, far.phase) == (1, 0)


@each_cipher
def test_both_ends_at_once(cipher: CipherSuite) -> None:
    ends = pair(cipher, random.Random(6))
    old = [end.seal(0, header_for(0, 0), b"old") for end in ends]
    assert all(end.update() for end in ends)
    new = [end.seal(1, header_for(1, 1), b"new") for end in ends]
    assert ends[1].open(1, new[0], 13) == b"new"
    assert ends[1].open(0, old[0], 13) == b"old"
    assert ends[0].open(0, old[1], 13) == b"old"
    assert ends[0].open(1, new[1], 13) == b"new"
    assert [end.updates for end in ends] == [1, 1]
    assert [end.failed for end in ends] == [0, 0]


@each_cipher
@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_updates_follows_aioquic(cipher: CipherSuite, seed: int) -> None:
    """Each generation is aioquic's next_key_phase() of the one before; ours updates at random."""
    rng = random.Random(seed)
    one, two = (rng.randbytes(SECRET_SIZE[cipher]) for _ in range(2))
    keys, send, receive = Keys(cipher, one, two), context(cipher, two), context(cipher, one)
    for generation in range(30):
        number = generation * 10
        if generation:
            hp = send.hp, receive.hp
            send, receive = next_key_phase(send), next_key_phase(receive)
            send.hp, receive.hp = hp  # it is never updated
            keys.forget()
            if rng.random() < 0.5:
                assert keys.update()
        header, payload = header_for(number, send.key_phase), rng.randbytes(rng.randint(4, 99))
        packet = send.encrypt_packet(header, payload, number)
        plain, found, end = unprotect(keys, packet, 9, number)
        assert keys.open(found, plain, end) == payload
        assert (keys.updates, keys.phase) == (generation, send.key_phase)
        ours = protect(keys, keys.seal(number, header, payload), 9)
        assert receive.decrypt_packet(ours, 9, number) == (header, payload, number, False)


class Model:
    """The rules of RFC 9001 section 6 on aioquic's contexts, slowly."""

    def __init__(self, cipher: CipherSuite, open: bytes) -> None:
        self.current = context(cipher, open)
        self.previous: CryptoContext | None = None
        self.updates = self.failed = 0
        self.first_opened = NEVER

    def rotate(self) -> None:
        self.previous, self.current = self.current, next_key_phase(self.current)
        self.updates += 1
        self.first_opened = NEVER

    def update(self) -> bool:
        if self.previous is not None:
            return False
        self.rotate()
        return True

    def open(self, number: int, packet: bytes, header: int) -> bytes | None:
        same = packet[0] >> 2 & 1 == self.current.key_phase
        late = not same and self.previous is not None and number < self.first_opened
        keys = self.current if same else self.previous if late else next_key_phase(self.current)
        assert keys is not None and keys.aead is not None
        try:
            payload = keys.aead.decrypt(packet[header:], packet[:header], number)
        except CryptoError:
            self.failed += 1
            return None
        if not same and not late:
            self.rotate()
        if not late:
            self.first_opened = min(self.first_opened, number)
        return payload


@each_cipher
@pytest.mark.parametrize("seed", range(12))
def test_random_updates_reordering_and_forgery(cipher: CipherSuite, seed: int) -> None:
    rng = random.Random(seed)
    one, two = (rng.randbytes(SECRET_SIZE[cipher]) for _ in range(2))
    near, far = Keys(cipher, one, two), Keys(cipher, two, one)
    model = Model(cipher, one)
    flying: list[tuple[int, int, bytes]] = []
    number = 0
    for step in range(400):
        what = rng.random()
        if what < 0.45:
            flying.append(
                (
                    near.updates,
                    number,
                    near.seal(number, header_for(number, near.phase), b"%d" % number),
                )
            )
            number += rng.choice([1, 1, 2])
        elif what < 0.5:
            # The peer may be a generation ahead of what far knows, never more.
            if near.updates <= far.updates:
                near.forget()
                assert near.update()
        elif what < 0.53:
            if far.updates <= near.updates:
                assert far.update() == model.update()
        elif what < 0.57:
            far.forget()
            model.previous = None
        elif flying:
            chosen = rng.randrange(len(flying)) if rng.random() < 0.5 else 0
            _, at, packet = flying[chosen]
            if rng.random() < 0.8:
                del flying[chosen]
            if rng.random() < 0.2:
                forged = bytearray(packet)
                forged[rng.choice([0, 0, rng.randrange(len(packet))])] ^= 1 << rng.randrange(8)
                packet = bytes(forged)
            found = far.open(at, packet, 13)
            assert found == model.open(at, packet, 13), (seed, step)
            assert found in (None, b"%d" % at)
        assert far.updates == model.updates, (seed, step)
        assert far.phase == model.current.key_phase
        assert far.first_opened == model.first_opened
        assert far.has_previous == (model.previous is not None)
        assert far.failed == model.failed
    assert far.updates >= 3, seed


@pytest.mark.parametrize("seed", range(10))
def test_reordering_within_a_generation_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    near, far = pair(rng.choice(CIPHERS), rng)
    number, opened = 0, 0
    waiting: list[tuple[int, bytes]] = []

    def seal(count: int) -> None:
        nonlocal number
        for _ in range(count):
            packet = near.seal(number, header_for(number, near.phase), b"payload")
            waiting.append((number, packet))
            number += 1

    for _ in range(20):
        seal(5)
        rng.shuffle(waiting)
        for at, packet in waiting:
            assert far.open(at, packet, 13) == b"payload"
            opened += 1
        far.forget()
        waiting.clear()
        seal(3)  # late ones: they arrive mixed with the next generation
        near.forget()
        assert near.update()
    assert (far.updates, far.failed, opened) == (19, 0, number - 3)


# packet numbers


@pytest.mark.parametrize("seed", range(10))
def test_numbers_are_decoded_as_by_aioquic(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2000):
        size = rng.randint(1, 4)
        largest = rng.choice(
            [
                rng.randrange(300),
                rng.getrandbits(rng.randint(1, 61)),
                rng.randrange(1 << 31) << 31,
                (1 << 8 * size) * rng.randrange(1 << 20) + rng.randint(0, 2),
                LARGEST - rng.randrange(1 << 33),
            ]
        )
        near = largest + 1 + rng.randint(-(1 << 8 * size), 1 << 8 * size)
        truncated = rng.choice([rng.getrandbits(8 * size), near]) % (1 << 8 * size)
        expected = decode_packet_number(truncated, 8 * size, largest + 1)
        assert LIB.mt_decode_number(largest, truncated, size) == expected, (
            largest,
            truncated,
            size,
        )


def test_the_first_number_of_all() -> None:
    """Where none was opened yet, the largest is UINT64_MAX."""
    for size in range(1, 5):
        for truncated in (0, 1, 100, (1 << 8 * size - 1) - 1, (1 << 8 * size) - 1):
            found = LIB.mt_decode_number(NEVER, truncated, size)
            assert found == decode_packet_number(truncated, 8 * size, 0)


def test_rfc_9000_appendix_a3() -> None:
    assert LIB.mt_decode_number(0xA82F30EA, 0x9B32, 2) == 0xA82F9B32
