"""Two `PeerConnection`s, handshaken in memory on a fake clock, and all that happens between them.

Every host has local addresses, each behind its own NAT (`nat` maps local to outer address, both
start equal). What a test does not change arrives once, after `delay`. `log` keeps every datagram
with the packet inside it decrypted, so that a test judges what is on the wire, not inner state.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_network
from typing import Any
from weakref import WeakKeyDictionary

from aioquic._crypto import CryptoError
from aioquic.buffer import Buffer
from aioquic.quic.crypto import CryptoContext, next_key_phase
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from aioquic.quic.packet import QuicFrameType, decode_packet_number
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tunnel.datapath.engine import Datapath
from tunnel.identity import Identity
from tunnel.path.network import Address, PathKey
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection

START = 1000.0
DELAY = 0.01  # seconds, one way
CID = 8  # bytes
SHORT_HEADER = 1 + CID

EVERYTHING = (ip_network("0.0.0.0/0"), ip_network("::/0"))

CLIENT = Address("192.0.2.1", 1000)
SERVER = Address("198.51.100.1", 2000)

PADDING = QuicFrameType.PADDING
PING = QuicFrameType.PING
ACK = QuicFrameType.ACK
NEW_CONNECTION_ID = QuicFrameType.NEW_CONNECTION_ID
RETIRE_CONNECTION_ID = QuicFrameType.RETIRE_CONNECTION_ID
CHALLENGE = QuicFrameType.PATH_CHALLENGE
RESPONSE = QuicFrameType.PATH_RESPONSE
DATAGRAM = QuicFrameType.DATAGRAM_WITH_LENGTH
PROBING = {PADDING, CHALLENGE, RESPONSE, NEW_CONNECTION_ID}


@cache
def identity(number: int) -> Identity:
    """The same identity for the same number."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


@dataclass(frozen=True)
class Opened:
    """A 1-RTT packet, decrypted."""

    number: int
    dcid: bytes
    key_phase: int
    frames: tuple[tuple[int, bytes], ...]
    """Types and, for those that a test looks into, content."""

    def has(self, kind: int) -> bool:
        return any(frame[0] == kind for frame in self.frames)

    def content(self, kind: int) -> list[bytes]:
        return [data for found, data in self.frames if found == kind]

    @property
    def copies_only(self) -> bool:
        """Whether copies (kind 1) are the only frames that are not probing ones."""
        rest = [frame for frame in self.frames if frame[0] not in PROBING]
        return bool(rest) and all(k == DATAGRAM and d[:1] == b"\x01" for k, d in rest)


@dataclass
class Flight:
    """A datagram on its way: outer addresses, as a bystander sees them."""

    sender: Host
    local: Address
    source: Address
    target: Address
    data: bytes
    at: float
    packet: Opened | None
    arrived: list[float] = field(default_factory=list)

    @property
    def key(self) -> PathKey:
        return PathKey(self.local, self.target)


class Host:
    """One end: a connection, its data path and its addresses."""

    def __init__(self, name: str, address: Address) -> None:
        self.name = name
        self.nat: dict[Address, Address] = {address: address}
        self.datapath = Datapath([EVERYTHING])
        self.lane = self.datapath.lane(0)
        self.received: list[bytes] = []
        self.events: list[QuicEvent] = []
        self.wakeups = 0
        self.connection: PeerConnection

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Pair:
    """Client and server and the network between them. All times in seconds."""

    def __init__(self, *, delay: float = DELAY, **options: Any) -> None:
        self.now = START
        self.delay = delay
        self.client = Host("client", CLIENT)
        self.server = Host("server", SERVER)
        self.log: list[Flight] = []
        self.dead: set[Address] = set()
        """Outer addresses that nothing comes from and nothing reaches."""
        self.fate: Callable[[Flight], Iterable[float]] | None = None
        """What becomes of a datagram: the delays after which it arrives; nothing: it is lost."""
        self.outsiders: dict[Address, Callable[[Flight], None]] = {}
        """Who else owns an address, and gets what is sent there."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._build(**options)

    def _build(
        self,
        *,
        client_configuration: Callable[[Any], None] = lambda configuration: None,
        server_configuration: Callable[[Any], None] = lambda configuration: None,
        client_identity: Identity | None = None,
        server_identity: Identity | None = None,
        client_expects: Identity | None = None,
        server_expects: Identity | None = None,
        max_packets_per_key: int | None = None,
    ) -> None:
        client_identity = client_identity or identity(1)
        server_identity = server_identity or identity(2)
        client_key = (server_expects or identity(1)).public_key.raw
        server_key = (client_expects or identity(2)).public_key.raw
        near = connection_configuration(
            client_identity, is_client=True, keylog=None, quic_logger=None
        )
        far = connection_configuration(
            server_identity, is_client=False, keylog=None, quic_logger=None
        )
        client_configuration(near)
        server_configuration(far)
        self.client.connection = PeerConnection(
            configuration=near,
            path=PathKey(CLIENT, SERVER),
            datapath=self.client.datapath,
            accepts=lambda key: key == server_key,
            reset_token=lambda cid: b"client--" + cid[:8],
            max_packets_per_key=max_packets_per_key,
        )
        self.server.connection = PeerConnection(
            configuration=far,
            path=PathKey(SERVER, CLIENT),
            datapath=self.server.datapath,
            accepts=lambda key: key == client_key,
            reset_token=lambda cid: b"server--" + cid[:8],
            original_destination_connection_id=(
                self.client.connection.original_destination_connection_id
            ),
            max_packets_per_key=max_packets_per_key,
        )

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.client, self.server

    def other(self, host: Host) -> Host:
        return self.server if host is self.client else self.client

    # beginnings

    def dial(self) -> None:
        self.client.connection.dial(self.now)
        self.pump(self.client)

    @classmethod
    def established(cls, **options: Any) -> Pair:
        """Handshaken, data paths attached, quiet, MTU known."""
        pair = cls(**options)
        pair.dial()
        pair.run(1.0)
        for host in pair.hosts:
            assert host.connection.is_open
            host.connection.attach(host.lane)
        pair.run(1.0)
        pair.forget()
        return pair

    def forget(self) -> None:
        """Begin with an empty log and no events."""
        self.log.clear()
        for host in self.hosts:
            host.events.clear()

    # the clock

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run(self, seconds: float) -> None:
        """Run everything that is due within so many seconds. Fails on a timer that spins."""
        until = self.now + seconds
        spins = 0
        while (due := self._next_due()) is not None and due <= until:
            spins = spins + 1 if due <= self.now else 0
            assert spins < 2000, f"a timer spins at {self.now - START:.3f} s"
            self.now = max(self.now, due)
            while self._queue and self._queue[0][0] <= self.now:
                heapq.heappop(self._queue)[2]()
            for host in self.hosts:
                timer = host.connection.get_timer()
                if timer is not None and timer <= self.now and self._running(host):
                    host.wakeups += 1
                    host.connection.handle_timer(self.now)
                    self.pump(host)
        self.now = until

    def run_until(self, condition: Callable[[], bool], limit: float = 5.0) -> float:
        """Run in small steps until the condition holds; the seconds it took."""
        start = self.now
        while not condition():
            assert self.now - start < limit, f"not within {limit} s"
            self.run(0.001)
        return self.now - start

    def _running(self, host: Host) -> bool:
        return bool(host.connection._network_paths)

    def _next_due(self) -> float | None:
        times = [self._queue[0][0]] if self._queue else []
        for host in self.hosts:
            timer = host.connection.get_timer() if self._running(host) else None
            if timer is not None:
                times.append(timer)
        return min(times) if times else None

    # traffic

    def pump(self, host: Host) -> None:
        """Everything a host has to say after an input."""
        for data, key in host.connection.datagrams_to_send(self.now):
            assert isinstance(key, PathKey)
            source = host.nat.get(key.local)
            if source is not None:
                packet = open_packet(data, host.connection, self.other(host).connection)
                self._depart(Flight(host, key.local, source, key.remote, data, self.now, packet))
        host.received += host.datapath.take_delivered()
        while (event := host.connection.next_event()) is not None:
            host.events.append(event)

    def _depart(self, flight: Flight) -> None:
        self.log.append(flight)
        if flight.source in self.dead or flight.target in self.dead:
            return
        for delay in [self.delay] if self.fate is None else self.fate(flight):
            self.after(delay, lambda: self.arrive(flight))

    def arrive(self, flight: Flight, *, source: Address | None = None) -> None:
        """Hand a datagram to whoever owns its target, perhaps with another source address."""
        if flight.target in self.dead:
            return
        if flight.target in self.outsiders:
            self.outsiders[flight.target](flight)
            return
        flight.arrived.append(self.now)
        for host in self.hosts:
            for local, outer in host.nat.items():
                if outer == flight.target:
                    self.hand(host, flight.data, PathKey(local, source or flight.source))
                    return

    def hand(self, host: Host, data: bytes, key: PathKey) -> None:
        host.connection.receive_datagram(data, key, self.now)
        self.pump(host)

    def send(self, host: Host, *packets: bytes) -> None:
        """Packets come out of the host's TUN."""
        for packet in packets:
            host.lane.push(packet, self.now)
        self.pump(host)

    def stream(self, host: Host, count: int, *, interval: float = 0.005, size: int = 100) -> None:
        """Schedule numbered packets."""
        for number in range(count):
            packet = numbered(number, size)
            self.after(number * interval, lambda packet=packet: self.send(host, packet))  # type: ignore[misc]

    def exchange(self, seconds: float = 0.2) -> None:
        """Traffic both ways, so that acknowledgements and RTTs are fresh."""
        for host in self.hosts:
            self.stream(host, int(seconds / 0.01), interval=0.01)
        self.run(seconds + 10 * self.delay)

    # moves

    def rebind(self, host: Host, local: Address, outer: Address) -> None:
        """The NAT in front of `local` maps it to another address; the old one is gone."""
        host.nat[local] = outer

    def move(self, host: Host, local: Address) -> PathKey:
        """The host moves to another address of its own, knowing it."""
        host.nat.setdefault(local, local)
        key = PathKey(local, host.connection.active.addr.remote)
        host.connection.move(key, self.now)
        self.pump(host)
        return key

    # looking

    def sent(
        self,
        sender: Host,
        *,
        source: Address | None = None,
        target: Address | None = None,
        since: float = 0.0,
    ) -> list[Flight]:
        """What this host sent, in order."""
        return [
            flight
            for flight in self.log
            if flight.sender is sender
            and source in (None, flight.source)
            and target in (None, flight.target)
            and flight.at >= since
        ]

    def closed(self, host: Host) -> ConnectionTerminated | None:
        return next(iter(host.of(ConnectionTerminated)), None)


def numbered(number: int, size: int = 100) -> bytes:
    """An IP packet, as far as the data path looks, that carries its number."""
    head = bytearray(20)
    head[0] = 0x45
    head[2:4] = size.to_bytes(2)
    return (bytes(head) + number.to_bytes(4)).ljust(size, b".")


def numbers(packets: Iterable[bytes]) -> list[int]:
    return [int.from_bytes(packet[20:24]) for packet in packets]


def copy_header(root: int) -> bytes:
    """What stands before the payload of a copy: the kind, and the number that names it."""
    buf = Buffer(capacity=9)
    buf.push_uint8(1)
    buf.push_uint_var(root)
    return buf.data


def open_packet(data: bytes, sender: PeerConnection, receiver: PeerConnection) -> Opened | None:
    """Decrypt a short-header datagram with the receiver's keys; None if it is something else."""
    if data[0] & 0x80:
        return None
    start = receiver._keys.recv  # as the handshake left them
    if start.hp is None:
        return None
    header, truncated = start.hp.remove(data, SHORT_HEADER)
    number = decode_packet_number(truncated, ((header[0] & 3) + 1) * 8, sender._packet_number)
    phase = (header[0] & 4) >> 2
    generations = _generations(start)
    updates = receiver.counters["key_updates"]
    # What is in flight is of this generation of the receiver's, or of one beside it.
    for generation in range(max(0, updates - 1), updates + 2):
        context = generations(generation)
        if context.key_phase != phase or context.aead is None:
            continue
        with suppress(CryptoError):
            plain = context.aead.decrypt(data[len(header) :], header, number)
            return Opened(number, header[1:SHORT_HEADER], phase, tuple(frames(plain)))
    return None


def _generations(first: CryptoContext) -> Callable[[int], CryptoContext]:
    """The generations of keys, each derived once."""
    known: list[CryptoContext] = _KNOWN.setdefault(first, [_twin(first)])

    def get(number: int) -> CryptoContext:
        while len(known) <= number:
            known.append(next_key_phase(known[-1]))
        return known[number]

    return get


def _twin(context: CryptoContext) -> CryptoContext:
    """The same keys in another object, that keeps no reference to the first one."""
    twin = CryptoContext(key_phase=context.key_phase)
    assert context.cipher_suite is not None
    assert context.secret is not None
    assert context.version is not None
    twin.setup(cipher_suite=context.cipher_suite, secret=context.secret, version=context.version)
    return twin


_KNOWN: WeakKeyDictionary[CryptoContext, list[CryptoContext]] = WeakKeyDictionary()


def frames(plain: bytes) -> Iterable[tuple[int, bytes]]:
    """Frame types of a payload (RFC 9000 section 19), PADDING once for a run."""
    buf = Buffer(data=plain)
    padded = False
    while not buf.eof():
        kind = buf.pull_uint_var()
        content = b""
        if kind == PADDING:
            if not padded:
                yield kind, b""
            padded = True
            continue
        if kind in (QuicFrameType.ACK, QuicFrameType.ACK_ECN):
            buf.pull_uint_var()
            buf.pull_uint_var()
            ranges = buf.pull_uint_var()
            buf.pull_uint_var()
            for _ in range(2 * ranges):
                buf.pull_uint_var()
        elif kind == QuicFrameType.CRYPTO:
            buf.pull_uint_var()
            content = buf.pull_bytes(buf.pull_uint_var())
        elif QuicFrameType.STREAM_BASE <= kind <= 0x0F:
            buf.pull_uint_var()
            if kind & 4:
                buf.pull_uint_var()
            length = buf.pull_uint_var() if kind & 2 else buf.capacity - buf.tell()
            content = buf.pull_bytes(length)
        elif kind == NEW_CONNECTION_ID:
            sequence = buf.pull_uint_var()
            buf.pull_uint_var()
            content = sequence.to_bytes(4) + buf.pull_bytes(buf.pull_uint8())
            buf.pull_bytes(16)
        elif kind == RETIRE_CONNECTION_ID:
            content = buf.pull_uint_var().to_bytes(4)
        elif kind in (CHALLENGE, RESPONSE):
            content = buf.pull_bytes(8)
        elif kind in (DATAGRAM, QuicFrameType.DATAGRAM):
            length = buf.pull_uint_var() if kind == DATAGRAM else buf.capacity - buf.tell()
            kind, content = DATAGRAM, buf.pull_bytes(length)
        elif kind in (QuicFrameType.TRANSPORT_CLOSE, QuicFrameType.APPLICATION_CLOSE):
            buf.pull_uint_var()
            if kind == QuicFrameType.TRANSPORT_CLOSE:
                buf.pull_uint_var()
            content = buf.pull_bytes(buf.pull_uint_var())
        elif kind in (
            QuicFrameType.MAX_DATA,
            QuicFrameType.MAX_STREAMS_BIDI,
            QuicFrameType.MAX_STREAMS_UNI,
        ):
            buf.pull_uint_var()
        elif kind == QuicFrameType.MAX_STREAM_DATA:
            buf.pull_uint_var()
            buf.pull_uint_var()
        elif kind not in (PING, QuicFrameType.HANDSHAKE_DONE):
            raise AssertionError(f"a frame of type {kind:#x} is not expected here")
        yield kind, content
