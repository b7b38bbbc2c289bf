"""Packet protection of the 1-RTT space: key updates that lose nothing (RFC 9001 section 6).

aioquic drops the old read keys the moment it starts an update, so that every packet still in
flight dies, and it starts one without asking whether the last was acknowledged. Here three
generations are held: the previous one for late packets, the current one, and the next one,
derived ahead so that an update by the peer costs no more than any other packet (section 6.3).
"""

from collections.abc import Callable

from aioquic._crypto import CryptoError
from aioquic.quic.crypto import CryptoContext, CryptoPair, KeyUnavailableError, next_key_phase
from aioquic.quic.packet import decode_packet_number

# A key seals at most this many packets; AES-GCM's confidentiality limit is 2^23 (RFC 9001
# section 6.6). Half of it leaves room for a peer that is slow to acknowledge the update.
MAX_PACKETS_PER_KEY = 1 << 22

_KEY_PHASE_BIT = 0x04
_NEVER = 1 << 62  # above every packet number


def _copy(context: CryptoContext) -> CryptoContext:
    twin = CryptoContext(key_phase=context.key_phase)
    twin.aead, twin.hp = context.aead, context.hp
    twin.cipher_suite, twin.secret, twin.version = (
        context.cipher_suite,
        context.secret,
        context.version,
    )
    return twin


class OneRttKeys(CryptoPair):
    """A crypto pair for 1-RTT packets that keeps the previous read keys and rekeys by itself."""

    def __init__(
        self, *, on_opened: Callable[[int], None], max_packets: int = MAX_PACKETS_PER_KEY
    ) -> None:
        super().__init__()
        self.max_packets = max_packets
        self.updates = 0
        self._on_opened = on_opened
        self._previous: CryptoContext | None = None
        self._next: CryptoContext | None = None
        self._first_received = 0  # lowest packet number opened with the current keys
        self._first_sent = 0  # lowest packet number sealed with the current keys
        self._sealed = 0
        self._acknowledged = True

    # what the connection reports

    def on_acknowledged(self, packet_number: int) -> None:
        """The peer acknowledged `packet_number`; a new update needs one of the current phase."""
        if packet_number >= self._first_sent:
            self._acknowledged = True

    def forget_previous(self) -> None:
        """Drop the previous read keys (3 PTO after an update: RFC 9001 section 6.5)."""
        self._previous = None

    @property
    def update_is_mutual(self) -> bool:
        """Old keys are still held, and the peer was heard with the new ones."""
        return self._previous is not None and self._first_received != _NEVER

    @property
    def can_update(self) -> bool:
        """Whether RFC 9001 section 6.1 lets us start an update now."""
        return self._acknowledged and self._previous is None

    # CryptoPair

    @property
    def key_phase(self) -> int:
        return self.send.key_phase

    def update_key(self) -> None:
        """Start an update, unless the one before it is not finished yet."""
        if self.can_update:
            self._rotate()

    def encrypt_packet(
        self, plain_header: bytes, plain_payload: bytes, packet_number: int
    ) -> bytes:
        if self._first_sent == _NEVER:
            self._first_sent = packet_number
        self._sealed += 1
        return self.send.encrypt_packet(plain_header, plain_payload, packet_number)

    @property
    def wants_update(self) -> bool:
        return self._sealed >= self.max_packets and self.can_update

    def decrypt_packet(
        self, packet: bytes, encrypted_offset: int, expected_packet_number: int
    ) -> tuple[bytes, bytes, int]:
        if self.recv.aead is None or self.recv.hp is None:
            raise KeyUnavailableError("Decryption key is not available")
        plain_header, truncated = self.recv.hp.remove(packet, encrypted_offset)
        first_byte = plain_header[0]
        number = decode_packet_number(
            truncated, ((first_byte & 0x03) + 1) * 8, expected_packet_number
        )
        phase = (first_byte & _KEY_PHASE_BIT) >> 2
        ciphertext = packet[len(plain_header) :]
        if phase == self.recv.key_phase:
            payload = self.recv.aead.decrypt(ciphertext, plain_header, number)
        elif self._previous is not None and number < self._first_received:
            payload = self._open_with(self._previous, ciphertext, plain_header, number)
        else:
            if self._next is None:
                self._next = next_key_phase(self.recv)
            payload = self._open_with(self._next, ciphertext, plain_header, number)
            # Only a packet that opens proves the update (RFC 9001 section 6.3).
            self._rotate()
            self._first_received = number
        if number < self._first_received and phase == self.recv.key_phase:
            self._first_received = number
        self._on_opened(number)
        return plain_header, payload, number

    @staticmethod
    def _open_with(
        context: CryptoContext, ciphertext: bytes, plain_header: bytes, number: int
    ) -> bytes:
        if context.aead is None:
            raise CryptoError("Decryption key is gone")
        return context.aead.decrypt(ciphertext, plain_header, number)

    def _rotate(self) -> None:
        if self._next is None:
            self._next = next_key_phase(self.recv)
        self._previous = _copy(self.recv)
        self._install(self.recv, self._next)
        self._install(self.send, next_key_phase(self.send))
        self._next = next_key_phase(self.recv)
        # Until a packet opens with the new keys, every other number is of the old phase.
        self._first_received = _NEVER
        self._first_sent = _NEVER
        self._sealed = 0
        self._acknowledged = False
        self.updates += 1

    @staticmethod
    def _install(target: CryptoContext, source: CryptoContext) -> None:
        # The header protection key is never updated (RFC 9001 section 5.4).
        target.aead, target.secret, target.key_phase = (
            source.aead,
            source.secret,
            source.key_phase,
        )
