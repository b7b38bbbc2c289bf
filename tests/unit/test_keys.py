"""Key updates over connections: nothing is lost, none begins before the last one is acknowledged.

The generations themselves are tested in `test_native_keys`.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from aioquic.quic.packet_builder import PACKET_NUMBER_SEND_SIZE
from aioquic.tls import CipherSuite

from tests.unit.quic_pair import CLIENT, SHORT_HEADER, Flight, Host, Pair, numbered, numbers
from tunnel.datapath.engine import Datapath
from tunnel.path.network import Address
from tunnel.quic.base import RETIRE_PTOS
from tunnel.quic.keys import LONGER_NUMBER, MAX_PACKETS_PER_KEY, EngineKeys

CIPHERS = pytest.mark.parametrize(
    "cipher",
    [CipherSuite.AES_128_GCM_SHA256, CipherSuite.CHACHA20_POLY1305_SHA256],
    ids=lambda cipher: cipher.name,
)
ENDS = pytest.mark.parametrize("name", ["client", "server"])
PHASE_BIT = 0x04


def established(cipher: CipherSuite | None = None, **options: Any) -> Pair:
    def only(configuration: Any) -> None:
        if cipher is not None:
            configuration.cipher_suites = [cipher]

    pair = Pair.established(client_configuration=only, server_configuration=only, **options)
    pair.exchange()
    for host in pair.hosts:
        host.received.clear()
    return pair


def updates(host: Host) -> int:
    return host.connection.counters["key_updates"]


def both_receive(pair: Pair, count: int) -> None:
    for host in pair.hosts:
        assert sorted(numbers(host.received)) == list(range(count))


def named(pair: Pair, name: str) -> Host:
    return pair.client if name == "client" else pair.server


def phases(pair: Pair, sender: Host) -> list[tuple[int, int]]:
    """Key phases of what this host sent, in order, and the packets of each."""
    seen = [f.packet.key_phase for f in pair.sent(sender) if f.packet is not None]
    assert None not in seen
    return [(phase, len(list(group))) for phase, group in itertools.groupby(seen)]


def test_half_of_what_aes_gcm_allows() -> None:
    assert MAX_PACKETS_PER_KEY == 2**23 // 2 == 1 << 22


def test_the_longer_number_is_paid_for_where_packets_are_written() -> None:
    keys = EngineKeys(Datapath().connection())
    before = keys.aead_tag_size
    pair = established()
    assert PACKET_NUMBER_SEND_SIZE + LONGER_NUMBER == 4
    for host in pair.hosts:
        assert host.connection._keys.aead_tag_size == before + LONGER_NUMBER


@CIPHERS
def test_a_cipher_carries_data_and_control(cipher: CipherSuite) -> None:
    pair = established(cipher)
    assert all(host.connection._keys.send.cipher_suite is cipher for host in pair.hosts)
    pair.client.connection.send_stream_data(0, b"control")
    pair.exchange()
    both_receive(pair, 20)
    assert [e.data for e in pair.server.events if hasattr(e, "data")] == [b"control"]
    assert all(host.connection.counters["not_authentic"] == 0 for host in pair.hosts)


@CIPHERS
@ENDS
def test_either_end_updates(name: str, cipher: CipherSuite) -> None:
    pair = established(cipher)
    mine = named(pair, name)
    for count in range(1, 5):
        mine.connection._keys.update_key()
        pair.forget()
        for host in pair.hosts:
            host.received.clear()
        pair.exchange(0.5)
        both_receive(pair, 50)
        assert [updates(host) for host in pair.hosts] == [count, count]
        for host in pair.hosts:
            assert phases(pair, host)[-1][0] == count % 2
            assert len(phases(pair, host)) <= 2
    assert all(host.connection.counters["not_authentic"] == 0 for host in pair.hosts)


@CIPHERS
def test_both_ends_at_once(cipher: CipherSuite) -> None:
    pair = established(cipher)
    for host in pair.hosts:
        host.connection._keys.update_key()
    pair.exchange()
    both_receive(pair, 20)
    assert [updates(host) for host in pair.hosts] == [1, 1]


@CIPHERS
@pytest.mark.parametrize("seed", range(3))
def test_many_updates_both_ways_with_reordering_lose_nothing(
    seed: int, cipher: CipherSuite
) -> None:
    pair = established(cipher, max_packets_per_key=10)
    rng = random.Random(seed)
    pair.fate = lambda flight: [pair.delay + rng.random() * 0.02]
    for host in pair.hosts:
        pair.stream(host, 1500, interval=0.002)
    pair.run(4.0)
    both_receive(pair, 1500)
    for host in pair.hosts:
        assert host.connection.is_open
        assert updates(host) >= 10
        assert host.connection.counters["not_authentic"] == 0
    last = [updates(host) for host in pair.hosts]
    assert max(last) - min(last) <= 1, "the last may have been begun and not been heard of"


def test_a_worn_key_is_renewed_without_being_asked() -> None:
    pair = established(max_packets_per_key=20)
    pair.exchange(2.0)
    runs = phases(pair, pair.client)
    assert len(runs) >= 3
    # The limit, and what leaves while an update waits for an answer and for the old keys to go.
    assert max(length for _, length in runs) < 60
    assert all(one[0] != other[0] for one, other in itertools.pairwise(runs))


def test_no_key_update_without_need() -> None:
    pair = established()
    pair.exchange(2.0)
    assert [updates(host) for host in pair.hosts] == [0, 0]


@CIPHERS
def test_control_after_updates(cipher: CipherSuite) -> None:
    """aioquic's own packets are sealed with the generation that is current."""
    pair = established(cipher, max_packets_per_key=10)
    for turn in range(8):
        pair.exchange(0.3)
        pair.client.connection.send_stream_data(0, bytes([turn]))
        pair.pump(pair.client)
    pair.run(1.0)
    assert updates(pair.client) >= 3
    said = [e.data for e in pair.server.events if hasattr(e, "data")]
    assert b"".join(said) == bytes(range(8))


# what comes late


def overtaken(pair: Pair) -> Flight:
    """A packet of the client's old keys that has not arrived, while an update has."""
    held: list[Flight] = []

    def fate(flight: Flight) -> list[float]:
        if flight.sender is pair.client and not held and flight.packet is not None:
            held.append(flight)
            return []
        return [pair.delay]

    pair.fate = fate
    before = updates(pair.server)
    pair.send(pair.client, numbered(999))
    pair.client.connection._keys.update_key()
    pair.stream(pair.client, 50, interval=0.001)
    pair.run_until(lambda: updates(pair.server) > before)
    return held[0]


@CIPHERS
def test_a_late_packet_of_the_old_keys_is_delivered(cipher: CipherSuite) -> None:
    pair = established(cipher)
    late = overtaken(pair)
    pair.arrive(late)
    pair.run(1.0)
    assert sorted(numbers(pair.server.received)) == [*range(50), 999]
    assert updates(pair.server) == 1, "it is no update back"


def test_previous_keys_are_forgotten_three_pto_after_the_update() -> None:
    for early in (True, False):
        pair = established()
        server = pair.server.connection
        late = overtaken(pair)
        pto = server.active.metrics.probe_timeout(server.max_ack_delay)
        pair.run((0.9 if early else 1.5) * RETIRE_PTOS * pto + (0.0 if early else 0.01))
        pair.arrive(late)
        assert (999 in numbers(pair.server.received)) is early
        assert server.counters["not_authentic"] == (0 if early else 1)
        assert updates(pair.server) == 1


@ENDS
def test_a_peer_that_cannot_hear_of_the_update_stays_readable(name: str) -> None:
    """Its rebinding must be seen, however long our packets have not reached it."""
    pair = established(max_packets_per_key=100)
    mine = named(pair, name)
    theirs = pair.other(mine)
    pair.fate = lambda flight: [] if flight.sender is mine else [pair.delay]
    pair.stream(mine, 120)
    pair.run(10.0)
    assert updates(mine) == updates(theirs) + 1
    mine.received.clear()
    pair.stream(theirs, 5)
    pair.run(0.5)
    assert numbers(mine.received) == list(range(5))
    if name == "server":
        fresh = Address("192.0.2.99", 99)
        pair.rebind(pair.client, CLIENT, fresh)
        pair.fate = None
        pair.stream(theirs, 5)
        pair.run(1.5)
        assert mine.connection.active.addr.remote == fresh


def test_updates_wait_for_acknowledgement_on_the_wire() -> None:
    """Between two changes of the key phase the peer acknowledged a packet of the one between."""
    pair = established(max_packets_per_key=3)
    acknowledged = False
    pair.fate = lambda flight: [pair.delay] if acknowledged or flight.sender is pair.client else []
    before = updates(pair.client)
    pair.stream(pair.client, 100)
    pair.run(3.0)
    assert updates(pair.client) <= before + 1
    acknowledged = True
    pair.client.connection.path_event(pair.now)
    pair.pump(pair.client)
    pair.stream(pair.client, 300)
    pair.run(3.0)
    assert updates(pair.client) > before + 1
    assert all(host.connection.is_open for host in pair.hosts)


# what is forged


@pytest.mark.parametrize("bits", [PHASE_BIT, 0x01, 0x20, 0x18])
def test_a_changed_first_byte_updates_nothing(bits: int) -> None:
    pair = established()
    pair.fate = lambda flight: []
    pair.send(pair.client, numbered(0))
    flight = pair.log[-1]
    data = bytearray(flight.data)
    data[0] ^= bits
    pair.hand(pair.server, bytes(data), pair.server.connection.active.addr)
    assert pair.server.connection.counters["not_authentic"] == 1
    assert updates(pair.server) == 0 and not pair.server.received
    assert pair.server.connection.is_open
    pair.hand(pair.server, flight.data, pair.server.connection.active.addr)
    assert numbers(pair.server.received) == [0], "the keys are what they were"


@CIPHERS
def test_random_bytes_update_nothing(cipher: CipherSuite) -> None:
    pair = established(cipher)
    rng = random.Random(4)
    cid = pair.server.connection.host_cids()[0]
    for _ in range(300):
        tail = rng.randbytes(rng.randrange(0, 60))
        data = bytes([0x40 | rng.randrange(64)]) + cid + tail
        pair.hand(pair.server, data, pair.server.connection.active.addr)
    assert updates(pair.server) == 0
    assert 100 < pair.server.connection.counters["not_authentic"] <= 300
    pair.exchange()
    both_receive(pair, 20)


def test_every_packet_has_a_number_of_four_bytes() -> None:
    """Any number of packets may be in flight (RFC 9000 section 17.1)."""
    pair = established()
    pair.client.connection.send_stream_data(0, b"x")
    pair.exchange()
    protection = pair.server.connection._keys.recv.hp
    assert protection is not None
    for flight in pair.sent(pair.client):
        if flight.packet is not None:
            header, _ = protection.remove(flight.data, SHORT_HEADER)
            assert header[0] & 3 == 3 and len(header) == SHORT_HEADER + 4
