"""Packet protection of the 1-RTT space once the native engine holds the keys.

The engine seals, opens and updates keys by itself (RFC 9001 section 6); the generations are derived
here, ahead of their use, so that an update by the peer costs no more than any other packet.
"""

from aioquic.quic.crypto import CryptoContext, CryptoPair, derive_key_iv_hp, next_key_phase
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.quic.packet_builder import PACKET_NUMBER_SEND_SIZE
from aioquic.tls import CipherSuite

from tunnel.datapath.engine import Connection
from tunnel.datapath.native.engine import CIPHERS

# A key seals at most this many packets; AES-GCM's confidentiality limit is 2^23 (RFC 9001
# section 6.6). Half of it leaves room for a peer that is slow to acknowledge the update.
MAX_PACKETS_PER_KEY = 1 << 22

LONGER_NUMBER = 4 - PACKET_NUMBER_SEND_SIZE
"""Bytes by which the engine's packet numbers are longer than aioquic's: any flight fits."""


class EngineKeys(CryptoPair):
    """A crypto pair for 1-RTT packets whose keys are the engine's from `start` on."""

    def __init__(self, engine: Connection) -> None:
        super().__init__()
        self._engine = engine
        self._seal: CryptoContext | None = None
        self._open: CryptoContext | None = None
        self._first: tuple[bytes, bytes] | None = None
        """The header protection keys, which no update changes (RFC 9001 section 6)."""

    def start(self, now: float) -> None:
        """Hand the keys of the handshake to the engine."""
        self._seal, self._open = self.send, self.recv
        self._keep_header_keys()
        assert self._first is not None
        self._engine.start(
            CIPHERS[_suite(self.send).name.rpartition("_")[0]],
            *_derive(self.send)[:2],
            self._first[0],
            *_derive(self.recv)[:2],
            self._first[1],
            self.send.key_phase,
            now,
        )
        # Where packets are written, room is left for the longer number.
        self.aead_tag_size += LONGER_NUMBER
        self.derive_next()

    def derive_next(self) -> None:
        """After every update, by either end: the engine wants one generation in advance."""
        assert self._seal is not None
        assert self._open is not None
        self._seal, self._open = next_key_phase(self._seal), next_key_phase(self._open)
        seal_key, seal_iv, _ = _derive(self._seal)
        open_key, open_iv, _ = _derive(self._open)
        self._engine.set_next(seal_key, seal_iv, open_key, open_iv)

    # CryptoPair

    @property
    def key_phase(self) -> int:
        return self._engine.phase if self._seal is not None else self.recv.key_phase

    def update_key(self) -> None:
        self._engine.update_keys()

    def _update_key(self, trigger: str) -> None:
        # The peer may be the first to know that the handshake is done, and quick with its keys.
        self._keep_header_keys()
        super()._update_key(trigger)

    def _keep_header_keys(self) -> None:
        if self._first is None:
            self._first = _derive(self.send)[2], _derive(self.recv)[2]

    def encrypt_packet(
        self, plain_header: bytes, plain_payload: bytes, packet_number: int
    ) -> bytes:
        if self._seal is None:
            return super().encrypt_packet(plain_header, plain_payload, packet_number)
        return self._engine.seal_foreign(
            packet_number, plain_header, PACKET_NUMBER_SEND_SIZE, plain_payload
        )


def _suite(context: CryptoContext) -> CipherSuite:
    assert context.cipher_suite is not None
    return context.cipher_suite


def _derive(context: CryptoContext) -> tuple[bytes, bytes, bytes]:
    """Key, IV and header protection key (RFC 9001 section 5.1)."""
    assert context.secret is not None
    key, iv, hp = derive_key_iv_hp(
        cipher_suite=_suite(context),
        secret=context.secret,
        version=context.version or QuicProtocolVersion.VERSION_1,
    )
    return key, iv, hp
