"""Against a stock aioquic connection: nothing of the engine is a dialect of QUIC."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from aioquic import tls
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    DatagramFrameReceived,
    QuicEvent,
    StreamDataReceived,
)
from aioquic.quic.packet_builder import PACKET_NUMBER_SEND_SIZE
from aioquic.tls import CipherSuite

from tests.unit.quic_pair import (
    ACK,
    CLIENT,
    DATAGRAM,
    DELAY,
    EVERYTHING,
    SERVER,
    START,
    frames,
    identity,
    numbered,
    numbers,
)
from tunnel.datapath.engine import Datapath
from tunnel.path.network import PathKey
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection

STEP = 0.0005  # seconds
ADDRESS = "somewhere"
STREAM = 8  # a stream frame (RFC 9000 section 19.8), with any of its flags


class Interop:
    """One of our connections, a stock one, and a link with a delay between them."""

    def __init__(self, *, we_dial: bool, cipher: CipherSuite | None = None) -> None:
        self.now = START
        self.under_way: list[tuple[float, bool, bytes]] = []
        self.events: list[QuicEvent] = []
        self.ours_said: list[QuicEvent] = []
        self.received: list[bytes] = []
        self.loses: Callable[[], bool] = lambda: False
        ours, theirs = (
            connection_configuration(
                identity(number), is_client=client, keylog=None, quic_logger=None
            )
            for number, client in ((1, we_dial), (2, not we_dial))
        )
        if cipher is not None:
            ours.cipher_suites = theirs.cipher_suites = [cipher]
        if not we_dial:
            self.stock = QuicConnection(configuration=theirs)
        self.datapath = Datapath([EVERYTHING])
        self.lane = self.datapath.lane(0, 1)
        self.path = PathKey(CLIENT, SERVER)
        self.ours = PeerConnection(
            configuration=ours,
            path=self.path,
            datapath=self.datapath,
            accepts=lambda key: key == identity(2).public_key.raw,
            reset_token=lambda cid: bytes(16),
            original_destination_connection_id=(
                None if we_dial else self.stock.original_destination_connection_id
            ),
        )
        self.plain: list[tuple[int, list[tuple[int, bytes]]]] = []
        """Bytes of number and frames of each packet that the stock one sent to the engine."""
        if we_dial:
            self.stock = QuicConnection(
                configuration=theirs,
                original_destination_connection_id=(self.ours.original_destination_connection_id),
            )
            self.ours.dial(self.now)
        else:
            self.stock.connect(ADDRESS, self.now)
        self.run(1.0)
        assert self.ours.is_open
        self.ours.attach(self.lane)
        self._watch()
        self.run(0.5)

    def _watch(self) -> None:
        """Look into what the stock connection writes, before it is sealed."""
        pair = self.stock._cryptos[tls.Epoch.ONE_RTT]
        seal = pair.encrypt_packet

        def watched(plain_header: bytes, plain_payload: bytes, packet_number: int) -> bytes:
            self.plain.append(((plain_header[0] & 3) + 1, list(frames(plain_payload))))
            return seal(plain_header, plain_payload, packet_number)

        pair.encrypt_packet = watched  # type: ignore[method-assign]

    def flush(self) -> None:
        for data, _ in self.ours.datagrams_to_send(self.now):
            if not self.loses():
                self.under_way.append((self.now + DELAY, True, data))
        if self.stock._network_paths:
            for data, _ in self.stock.datagrams_to_send(self.now):
                if not self.loses():
                    self.under_way.append((self.now + DELAY, False, data))
        self.received += self.datapath.take_delivered()
        while (event := self.stock.next_event()) is not None:
            self.events.append(event)
        while (event := self.ours.next_event()) is not None:
            self.ours_said.append(event)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        self.flush()
        while self.now < until:
            self.now += STEP
            due = [entry for entry in self.under_way if entry[0] <= self.now]
            self.under_way = [entry for entry in self.under_way if entry[0] > self.now]
            for _, from_us, data in due:
                if from_us:
                    self.stock.receive_datagram(data, ADDRESS, self.now)
                else:
                    self.ours.receive_datagram(data, self.path, self.now)
            ends: list[Any] = [self.stock, self.ours]
            for end in ends:
                timer = end.get_timer()
                if timer is not None and timer <= self.now:
                    end.handle_timer(self.now)
            self.flush()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def stream_data(self) -> tuple[bytes, bytes]:
        """What the stock one and what we got, put together."""
        told = [
            [event.data for event in events if isinstance(event, StreamDataReceived)]
            for events in (self.events, self.ours_said)
        ]
        return b"".join(told[0]), b"".join(told[1])

    def alive(self) -> None:
        assert not self.of(ConnectionTerminated)
        assert self.ours.is_open and self.ours.counters["not_authentic"] == 0


ROLES = pytest.mark.parametrize("we_dial", [True, False], ids=["we dial", "they dial"])
CIPHERS = pytest.mark.parametrize(
    "cipher",
    [CipherSuite.AES_128_GCM_SHA256, CipherSuite.CHACHA20_POLY1305_SHA256],
    ids=lambda cipher: cipher.name,
)


@CIPHERS
@ROLES
def test_packets_both_ways(we_dial: bool, cipher: CipherSuite) -> None:
    link = Interop(we_dial=we_dial, cipher=cipher)
    for number in range(100):
        link.lane.push(numbered(number, 200), link.now)
        link.stock.send_datagram_frame(b"\0" + numbered(number, 1100))
        link.run(0.002)
    link.run(0.5)
    theirs = [event.data for event in link.of(DatagramFrameReceived)]
    assert theirs == [b"\0" + numbered(number, 200) for number in range(100)]
    assert numbers(link.received) == list(range(100))
    assert {size for size, _ in link.plain} == {PACKET_NUMBER_SEND_SIZE} == {2}
    link.alive()


@ROLES
def test_acknowledgement_stream_and_datagram_in_one_packet(we_dial: bool) -> None:
    link = Interop(we_dial=we_dial)
    stream = 0
    if not we_dial:
        stream = link.stock.get_next_available_stream_id()
    said = b""
    for number in range(50):
        for _ in range(2):
            link.lane.push(numbered(number, 60), link.now)
        if we_dial:
            link.ours.send_stream_data(0, b"x")
        link.run(0.02)
        if number or not we_dial:
            link.stock.send_stream_data(stream, bytes([number]))
            said += bytes([number])
        link.stock.send_datagram_frame(b"\0" + numbered(number, 300))
        space = link.stock._spaces[tls.Epoch.ONE_RTT]
        space.ack_at = link.now  # what came last is acknowledged in the same packet
        link.run(0.01)
    link.run(0.5)
    together = [
        kinds
        for kinds in ([kind for kind, _ in packet] for _, packet in link.plain)
        if ACK in kinds and DATAGRAM in kinds and any(kind & ~7 == STREAM for kind in kinds)
    ]
    assert len(together) >= 40, "this is what the test is about"
    assert numbers(link.received) == list(range(50))
    assert link.stream_data()[1] == said
    assert link.ours.engine.active.outstanding == 0, "those acknowledgements were read"
    link.alive()


@ROLES
def test_what_a_stock_connection_acknowledges_is_settled(we_dial: bool) -> None:
    link = Interop(we_dial=we_dial)
    rng = random.Random(3)
    link.loses = lambda: rng.random() < 0.05
    for number in range(300):
        link.lane.push(numbered(number), link.now)
        if we_dial and number % 10 == 0:
            link.ours.send_stream_data(0, bytes([number // 10]))
        link.run(0.002)
    link.loses = lambda: False
    link.run(2.0)
    metrics = link.ours.active.metrics
    assert (metrics.in_flight, metrics.outstanding) == (0, 0)
    assert metrics.rtt_smoothed == pytest.approx(2 * DELAY, rel=0.3)
    came = numbers([event.data[1:] for event in link.of(DatagramFrameReceived)])
    assert 250 < len(came) < 300 and sorted(set(came)) == sorted(came)
    if we_dial:
        assert link.stream_data()[0] == bytes(range(30))
    link.alive()


@ROLES
def test_what_we_acknowledge_is_settled_there(we_dial: bool) -> None:
    link = Interop(we_dial=we_dial)
    rng = random.Random(4)
    link.loses = lambda: rng.random() < 0.05
    for number in range(300):
        link.stock.send_datagram_frame(b"\0" + numbered(number))
        link.run(0.002)
    link.loses = lambda: False
    link.stock.send_ping(1)
    link.run(2.0)
    space = link.stock._spaces[tls.Epoch.ONE_RTT]
    assert space.ack_eliciting_in_flight == 0
    assert link.stock._loss.bytes_in_flight == 0
    assert 250 < len(link.received) < 300
    link.alive()


@ROLES
@CIPHERS
def test_key_updates_of_either_end(we_dial: bool, cipher: CipherSuite) -> None:
    link = Interop(we_dial=we_dial, cipher=cipher)
    sent = 0
    for turn in range(6):
        if turn % 2:
            # It keeps no old keys: nothing of ours may be under way.
            link.stock.request_key_update()
            link.stock.send_ping(turn)
            link.run(0.1)
        else:
            link.ours._keys.update_key()
        for _ in range(20):
            link.lane.push(numbered(sent), link.now)
            link.stock.send_datagram_frame(b"\0" + numbered(sent))
            sent += 1
            link.run(0.02)
        link.run(0.5)
        assert link.ours.counters["key_updates"] == turn + 1
        assert link.ours._keys.key_phase == (turn + 1) % 2
        assert link.stock._cryptos[tls.Epoch.ONE_RTT].key_phase == (turn + 1) % 2
    assert numbers(link.received) == list(range(sent))
    assert len(link.of(DatagramFrameReceived)) == sent
    link.alive()


@ROLES
def test_a_close_is_understood(we_dial: bool) -> None:
    link = Interop(we_dial=we_dial)
    link.ours.close(error_code=4, reason_phrase="bye")
    link.run(0.5)
    (closed,) = link.of(ConnectionTerminated)
    assert (closed.error_code, closed.reason_phrase) == (4, "bye")
    other = Interop(we_dial=we_dial)
    other.stock.close(error_code=5, reason_phrase="so long")
    other.run(0.5)
    assert other.ours.is_closed
