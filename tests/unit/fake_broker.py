"""A broker for tests: as much of MQTT 3.1.1 as a client can see, and every kind of misbehaviour.

A `Manner` decides what becomes of each connection; `polite` is a broker as it should be. All
packets that came are kept, with the segment (read) they came in, so that tests can tell what
travelled together.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 10, 11, 12, 13, 14

ACCEPTED = b"\x20\x02\x00\x00"


@dataclass(eq=False)
class Connection:
    """One client, seen from the broker."""

    broker: Broker
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    flights: list[list[int]] = field(default_factory=list)
    """Kinds of packets, by the read they came in."""
    topics: set[str] = field(default_factory=set)
    closed: bool = False
    disconnected: bool = False
    """Whether DISCONNECT came."""
    deaf: bool = False
    """Whether nothing is answered (a half-open connection)."""
    _buffer: bytearray = field(default_factory=bytearray)

    @property
    def kinds(self) -> list[int]:
        """All packets that came."""
        return [kind for flight in self.flights for kind in flight]

    async def packets(self) -> AsyncIterator[tuple[int, bytes]]:
        """(kind, body) of all that comes."""
        while data := await self.reader.read(65536):
            self._buffer += data
            came = list(iter(self._take, None))
            self.flights.append([kind for kind, _ in came])
            for packet in came:
                yield packet

    def _take(self) -> tuple[int, bytes] | None:
        length, position, shift = 0, 1, 0
        while True:
            if position >= len(self._buffer):
                return None
            length |= (self._buffer[position] & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if not self._buffer[position - 1] & 0x80:
                break
        if len(self._buffer) < position + length:
            return None
        packet = self._buffer[0] >> 4, bytes(self._buffer[position : position + length])
        del self._buffer[: position + length]
        return packet

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    def deliver(self, topic: str, payload: bytes, mid: int = 1) -> None:
        self.send(publication(topic, payload, mid))

    async def serve(self) -> None:
        """As a broker should."""
        async for kind, body in self.packets():
            if not self.deaf:
                self.answer(kind, body)

    def answer(self, kind: int, body: bytes) -> None:
        mid = body[:2]
        if kind == CONNECT:
            self.send(ACCEPTED)
        elif kind == SUBSCRIBE:
            topics = _strings(body[2:], 1)
            self.topics |= set(topics)
            self.send(bytes([SUBACK << 4, 2 + len(topics)]) + mid + b"\x01" * len(topics))
        elif kind == UNSUBSCRIBE:
            self.topics -= set(_strings(body[2:], 0))
            self.send(b"\xb0\x02" + mid)
        elif kind == PINGREQ:
            self.send(b"\xd0\x00")
        elif kind == PUBLISH:
            length = int.from_bytes(body[:2])
            topic = body[2 : 2 + length].decode()
            self.send(b"\x40\x02" + body[2 + length : 4 + length])
            self.broker.publish(topic, body[4 + length :])
        elif kind == DISCONNECT:
            self.disconnected = True


Manner = Callable[[Connection], Awaitable[None]]
"""What becomes of a connection; when it returns, the connection is closed."""


async def polite(connection: Connection) -> None:
    await connection.serve()


async def never_answers(connection: Connection) -> None:
    async for _ in connection.packets():
        pass


class Broker:
    """Listens on a port of 127.0.0.1 while it is entered; `manner` may be changed at any time."""

    def __init__(
        self, manner: Manner = polite, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.manner = manner
        self.port = port
        self.connections: list[Connection] = []
        self.published: list[tuple[str, bytes]] = []
        self._tls = tls
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'mqtts' if self._tls else 'mqtt'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Broker:
        self._server = await asyncio.start_server(
            self._client, "127.0.0.1", self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> list[Connection]:
        return [connection for connection in self.connections if not connection.closed]

    def publish(self, topic: str, payload: bytes) -> None:
        self.published.append((topic, payload))
        for connection in self.open:
            if topic in connection.topics:
                connection.deliver(topic, payload)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = Connection(self, reader, writer)
        self.connections.append(connection)
        try:
            with contextlib.suppress(OSError):
                await self.manner(connection)
        except asyncio.CancelledError:
            pass  # the end of the test; asyncio's streams would log it
        finally:
            connection.closed = True
            self._tasks.discard(task)
            writer.transport.abort()


def publication(topic: str, payload: bytes, mid: int = 1, flags: int = 2) -> bytes:
    """A PUBLISH, of QoS 1 unless told otherwise."""
    name = topic.encode()
    body = len(name).to_bytes(2) + name + (mid.to_bytes(2) if flags & 6 else b"") + payload
    length, left = b"", len(body)
    while True:
        left, digit = left >> 7, left & 0x7F
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            break
    return bytes([PUBLISH << 4 | flags]) + length + body


def _strings(data: bytes, behind: int) -> list[str]:
    """Length-prefixed strings with `behind` bytes after each."""
    found = []
    while data:
        length = int.from_bytes(data[:2])
        found.append(data[2 : 2 + length].decode())
        data = data[2 + length + behind :]
    return found
