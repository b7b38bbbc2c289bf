"""Key updates: nothing is lost, none begins before the last one is acknowledged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from aioquic._crypto import CryptoError
from aioquic.quic.crypto import KeyUnavailableError
from aioquic.quic.packet_builder import PACKET_NUMBER_SEND_SIZE
from aioquic.tls import CipherSuite

from tests.unit.quic_pair import CLIENT, Flight, Host, Pair, numbers
from tunnel.path.network import Address
from tunnel.quic.base import RETIRE_PTOS
from tunnel.quic.keys import MAX_PACKETS_PER_KEY, OneRttKeys

VERSION = 1
CIPHERS = [CipherSuite.AES_128_GCM_SHA256, CipherSuite.CHACHA20_POLY1305_SHA256]
CID = bytes(8)


class End:
    """One end's keys, without a connection around them."""

    def __init__(self, cipher: CipherSuite, read: bytes, write: bytes) -> None:
        self.opened: list[int] = []
        self.keys = OneRttKeys(on_opened=self.opened.append)
        self.keys.recv.setup(cipher_suite=cipher, secret=read, version=VERSION)
        self.keys.send.setup(cipher_suite=cipher, secret=write, version=VERSION)
        self.number = 0

    def seal(self, payload: bytes = b"payload") -> bytes:
        number, self.number = self.number, self.number + 1
        first = 0x40 | self.keys.key_phase << 2 | PACKET_NUMBER_SEND_SIZE - 1
        header = bytes((first,)) + CID + number.to_bytes(2)
        return self.keys.encrypt_packet(header, payload, number)

    def open(self, packet: bytes, expected: int = 0) -> tuple[bytes, int]:
        _, payload, number = self.keys.decrypt_packet(packet, 1 + len(CID), expected)
        return payload, number


@pytest.fixture(params=CIPHERS, ids=lambda cipher: cipher.name)
def ends(request: pytest.FixtureRequest) -> tuple[End, End]:
    one, two = b"1" * 32, b"2" * 32
    return End(request.param, one, two), End(request.param, two, one)


def test_half_of_what_aes_gcm_allows() -> None:
    assert MAX_PACKETS_PER_KEY == 2**23 // 2 == 1 << 22
    assert OneRttKeys(on_opened=lambda number: None).max_packets == 1 << 22


def test_without_keys_there_is_a_name_for_it() -> None:
    keys = OneRttKeys(on_opened=lambda number: None)
    with pytest.raises(KeyUnavailableError):
        keys.decrypt_packet(bytes(50), 9, 0)


def test_packets_of_three_generations(ends: tuple[End, End]) -> None:
    near, far = ends
    old = [near.seal() for _ in range(3)]
    near.keys.update_key()
    new = [near.seal() for _ in range(3)]
    assert far.open(old[0])[1] == 0
    assert far.open(new[1])[1] == 4, "the update is taken over from the first packet that opens"
    assert (far.keys.updates, far.keys.key_phase) == (1, 1)
    assert far.open(old[2])[1] == 2, "late packets of the old keys still open"
    assert far.open(new[0])[1] == 3
    assert far.open(old[1])[1] == 1
    assert far.opened == [0, 4, 2, 3, 1]
    far.keys.forget_previous()
    with pytest.raises(CryptoError):
        far.open(old[1])
    assert far.keys.updates == 1


def test_header_protection_is_never_updated(ends: tuple[End, End]) -> None:
    near, _ = ends
    before = near.keys.send.hp, near.keys.recv.hp
    secrets = near.keys.send.secret, near.keys.recv.secret
    near.keys.update_key()
    assert (near.keys.send.hp, near.keys.recv.hp) == before
    assert near.keys.send.secret not in secrets and near.keys.recv.secret not in secrets


def test_no_second_update_before_the_first_is_acknowledged(ends: tuple[End, End]) -> None:
    near, far = ends
    old = near.seal()
    near.keys.update_key()
    assert near.keys.updates == 1
    new = near.seal()
    near.keys.forget_previous()
    near.keys.update_key()
    near.keys.on_acknowledged(0)  # the old packet
    near.keys.update_key()
    assert near.keys.updates == 1
    near.keys.on_acknowledged(1)
    assert near.keys.can_update
    near.keys.update_key()
    assert near.keys.updates == 2
    for packet in (old, new, near.seal()):
        far.open(packet)
    assert far.keys.updates == 2


def test_nothing_of_the_new_phase_sent_nothing_acknowledged(ends: tuple[End, End]) -> None:
    near, _ = ends
    near.seal()
    near.keys.update_key()
    near.keys.forget_previous()
    near.keys.on_acknowledged(10**9)
    assert not near.keys.can_update


def test_no_second_update_while_the_previous_keys_are_held(ends: tuple[End, End]) -> None:
    near, _ = ends
    near.keys.update_key()
    near.seal()
    near.keys.on_acknowledged(0)
    before = near.keys.can_update
    near.keys.forget_previous()
    assert (before, near.keys.can_update) == (False, True)


def test_an_update_is_wanted_when_the_key_is_worn(ends: tuple[End, End]) -> None:
    near, _ = ends
    near.keys.max_packets = 5
    wanted = []
    for _ in range(5):
        near.seal()
        wanted.append(near.keys.wants_update)
    near.keys.update_key()
    near.keys.forget_previous()
    for number in range(5, 10):  # the count begins anew with the key
        near.seal()
        near.keys.on_acknowledged(number)
        wanted.append(near.keys.wants_update)
    assert wanted == 2 * [False, False, False, False, True]


def test_both_ends_at_once(ends: tuple[End, End]) -> None:
    near, far = ends
    old_near, old_far = near.seal(), far.seal()
    near.keys.update_key()
    far.keys.update_key()
    new_near, new_far = near.seal(), far.seal()
    for end, packets in ((far, [new_near, old_near]), (near, [old_far, new_far])):
        for packet in packets:
            end.open(packet)
    assert (near.keys.updates, far.keys.updates) == (1, 1)
    assert near.opened == [0, 1] and far.opened == [1, 0]


@pytest.mark.parametrize("bit", [0x04, 0x01, 0x20])
def test_a_forged_packet_updates_nothing(ends: tuple[End, End], bit: int) -> None:
    near, far = ends
    packet = bytearray(near.seal())
    packet[0] ^= bit
    with pytest.raises(CryptoError):
        far.open(bytes(packet))
    assert (far.keys.updates, far.opened) == (0, [])
    near.keys.update_key()
    forged = bytearray(near.seal())
    forged[-1] ^= 1
    with pytest.raises(CryptoError):
        far.open(bytes(forged))
    assert far.keys.updates == 0
    far.open(near.seal())
    assert far.keys.updates == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_within_a_generation(seed: int) -> None:
    rng = random.Random(seed)
    near = End(CIPHERS[0], b"1" * 32, b"2" * 32)
    far = End(CIPHERS[0], b"2" * 32, b"1" * 32)
    waiting: list[bytes] = []
    for generation in range(6):
        waiting += [near.seal() for _ in range(5)]
        rng.shuffle(waiting)
        for packet in waiting:
            far.open(packet, expected=5 * generation)
        far.keys.forget_previous()
        # Late ones of this generation arrive mixed with the next.
        waiting = [near.seal() for _ in range(3)]
        near.keys.on_acknowledged(near.number - 1)
        near.keys.forget_previous()
        near.keys.update_key()
    assert near.keys.updates == 6
    assert sorted(far.opened) == list(range(6 * 8 - 3))


# over real connections


def shuffled(pair: Pair, rng: random.Random, spread: float) -> Callable[[Flight], list[float]]:
    return lambda flight: [pair.delay + rng.random() * spread]


def both_receive(pair: Pair, count: int) -> None:
    for host in pair.hosts:
        assert sorted(numbers(host.received)) == list(range(count))


@pytest.mark.parametrize("seed", range(3))
def test_many_updates_both_ways_with_reordering_lose_nothing(seed: int) -> None:
    pair = Pair.established(max_packets_per_key=10)
    pair.fate = shuffled(pair, random.Random(seed), 0.02)
    for host in pair.hosts:
        pair.stream(host, 2000, interval=0.002)
    pair.run(6.0)
    both_receive(pair, 2000)
    for host in pair.hosts:
        assert host.connection.is_open
        assert host.connection.counters["key_updates"] >= 10
    updates = [host.connection._keys.updates for host in pair.hosts]
    assert max(updates) - min(updates) <= 1, "the last may have been begun and not been heard of"


def test_a_late_packet_of_the_old_keys_is_delivered() -> None:
    pair = Pair.established(max_packets_per_key=30)
    pair.exchange()
    updates = pair.server.connection._keys.updates
    held: list[Flight] = []

    def fate(flight: Flight) -> list[float]:
        if flight.sender is pair.client and not held and flight.packet is not None:
            held.append(flight)
            return []
        return [pair.delay]

    pair.fate = fate
    pair.stream(pair.client, 200, interval=0.001)
    pair.run_until(lambda: pair.server.connection._keys.updates > updates)
    pair.arrive(held[0])
    pair.run(1.0)
    assert sorted(numbers(pair.server.received[-200:])) == list(range(200))


def test_updates_wait_for_acknowledgement_on_the_wire() -> None:
    """Between two changes of the key phase the peer acknowledged a packet of the one between."""
    pair = Pair.established(max_packets_per_key=3)
    acknowledged = True

    def fate(flight: Flight) -> list[float]:
        return [pair.delay] if acknowledged or flight.sender is pair.client else []

    pair.fate = fate
    pair.exchange()
    acknowledged = False
    updates = pair.client.connection._keys.updates
    pair.stream(pair.client, 100)
    pair.run(3.0)
    assert pair.client.connection._keys.updates <= updates + 1
    acknowledged = True
    pair.client.connection.path_event(pair.now)
    pair.pump(pair.client)
    pair.stream(pair.client, 300)
    pair.run(3.0)
    assert pair.client.connection._keys.updates > updates + 1
    assert pair.client.connection.is_open and pair.server.connection.is_open


def test_previous_keys_are_forgotten_three_pto_after_the_update() -> None:
    pair = Pair.established(max_packets_per_key=60)
    pair.exchange()
    server = pair.server.connection
    updates = server._keys.updates
    pair.stream(pair.client, 200, interval=0.001)
    pair.run_until(lambda: server._keys.updates > updates)
    began, pto = pair.now, server.active.metrics.probe_timeout(server.max_ack_delay)
    pair.run(0.9 * RETIRE_PTOS * pto)
    assert server._keys._previous is not None
    pair.run_until(lambda: server._keys._previous is None)
    assert pair.now - began < 1.5 * RETIRE_PTOS * pto + 0.01


def test_both_ends_at_once_over_connections() -> None:
    pair = Pair.established()
    pair.exchange()
    for host in pair.hosts:
        host.connection._keys.update_key()
    pair.exchange()
    both_receive_all(pair)
    for host in pair.hosts:
        assert host.connection._keys.updates == 1


def both_receive_all(pair: Pair) -> None:
    for host in pair.hosts:
        assert sorted(numbers(host.received)) == sorted([*range(20), *range(20)])


@pytest.mark.parametrize("initiator", ["client", "server"])
def test_a_peer_that_cannot_hear_of_the_update_stays_readable(initiator: str) -> None:
    """Its rebinding must be seen, however long our packets have not reached it."""
    pair = Pair.established(max_packets_per_key=30)
    pair.exchange(0.1)
    mine: Host = pair.client if initiator == "client" else pair.server
    theirs = pair.other(mine)
    pair.fate = lambda flight: [] if flight.sender is mine else [pair.delay]
    pair.stream(mine, 40)
    pair.run(10.0)
    assert mine.connection._keys.updates == theirs.connection._keys.updates + 1
    mine.received.clear()
    pair.stream(theirs, 5)
    pair.run(0.5)
    assert numbers(mine.received) == list(range(5))
    if initiator == "server":
        fresh = Address("192.0.2.99", 99)
        pair.rebind(pair.client, CLIENT, fresh)
        pair.fate = None
        pair.stream(theirs, 5)
        pair.run(1.5)
        assert mine.connection.active.addr.remote == fresh


def test_a_phase_change_is_visible_in_the_packets() -> None:
    pair = Pair.established(max_packets_per_key=20)
    pair.exchange(1.0)
    phases = [f.packet.key_phase for f in pair.sent(pair.client) if f.packet is not None]
    runs = [(phase, len(list(group))) for phase, group in itertools.groupby(phases)]
    assert len(runs) >= 3
    assert max(length for _, length in runs) < 60


def test_no_key_update_without_need() -> None:
    pair = Pair.established()
    pair.exchange(2.0)
    assert [host.connection.counters["key_updates"] for host in pair.hosts] == [0, 0]
