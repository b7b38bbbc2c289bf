"""A client that says whatever the test wants, a byte at a time if need be."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass, field

from tests.unit.fake_broker import CONNACK, PUBACK, PUBLISH, SUBACK, publication

WAIT = 5.0  # seconds for an answer that must come
SILENCE = 0.4  # seconds in which nothing may come; an answer on loopback takes 1 ms


@dataclass(eq=False)
class Stranger:
    """A connection to a broker. `delivered` is what came by PUBLISH."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answers: asyncio.Queue[tuple[int, bytes]] = field(default_factory=asyncio.Queue)
    delivered: list[tuple[str, bytes]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Stranger:
        made = cls(*await asyncio.open_connection(host, port))
        made._task = asyncio.create_task(made._read())
        return made

    @classmethod
    async def connect(cls, host: str, port: int, **options: object) -> Stranger:
        """Open and CONNECT; `accepted` says what came of it."""
        made = await cls.open(host, port)
        made.send(connect(**options))  # type: ignore[arg-type]
        return made

    async def __aenter__(self) -> Stranger:
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        self.writer.transport.abort()
        await asyncio.gather(self._task, return_exceptions=True)

    def send(self, data: bytes) -> None:
        if not self.writer.transport.is_closing():
            self.writer.write(data)

    async def answer(self, kind: int) -> bytes | None:
        """The body of the next packet of this kind; None when the broker hung up instead."""
        while True:
            taken = asyncio.create_task(self.answers.get())
            gone = asyncio.create_task(self.closed.wait())
            done, _ = await asyncio.wait(
                [taken, gone], timeout=WAIT, return_when=asyncio.FIRST_COMPLETED
            )
            assert done, f"neither an answer of kind {kind}, nor the end"
            gone.cancel()
            if taken not in done:
                taken.cancel()
                return None
            found, body = taken.result()
            if found == kind:
                return body

    async def accepted(self) -> bool:
        answer = await self.answer(CONNACK)
        return answer is not None and answer[1] == 0

    async def subscribe(self, topic: str, qos: int = 1) -> bool:
        """Whether it was granted."""
        name = topic.encode()
        body = b"\x00\x07" + len(name).to_bytes(2) + name + bytes([qos])
        self.send(b"\x82" + length(len(body)) + body)
        answer = await self.answer(SUBACK)
        return answer is not None and answer[2] != 0x80

    async def publish(self, topic: str, payload: bytes, flags: int = 2) -> bool:
        """Whether it was acknowledged (QoS 1)."""
        self.send(publication(topic, payload, flags=flags))
        return await self.answer(PUBACK) is not None

    async def silence(self) -> None:
        await asyncio.sleep(SILENCE)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                (first,) = await self.reader.readexactly(1)
                size, shift = 0, 0
                while True:
                    (digit,) = await self.reader.readexactly(1)
                    size |= (digit & 0x7F) << shift
                    shift += 7
                    if not digit & 0x80:
                        break
                body = await self.reader.readexactly(size)
                if first >> 4 == PUBLISH:
                    self._deliver(first, body)
                else:
                    self.answers.put_nowait((first >> 4, body))
        self.closed.set()

    def _deliver(self, first: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2])
        topic, rest = body[2:end].decode(), body[end:]
        if first & 6:
            self.send(b"\x40\x02" + rest[:2])
            rest = rest[2:]
        self.delivered.append((topic, rest))


def connect(
    *,
    name: str | None = None,
    clean: bool = True,
    keepalive: int = 30,
    will: tuple[str, bytes] | None = None,
    will_flags: int = 0x0C,
) -> bytes:
    """A CONNECT of MQTT 3.1.1."""
    flags = (2 if clean else 0) | (will_flags if will else 0)
    body = b"\x00\x04MQTT\x04" + bytes([flags]) + keepalive.to_bytes(2)
    for text in ((name or secrets.token_hex(8)).encode(), *(_encoded(will) if will else ())):
        body += len(text).to_bytes(2) + text
    return b"\x10" + length(len(body)) + body


def length(size: int) -> bytes:
    """A remaining length (section 2.2.3)."""
    out = b""
    while True:
        size, digit = size >> 7, size & 0x7F
        out += bytes([digit | (0x80 if size else 0)])
        if not size:
            return out


def _encoded(will: tuple[str, bytes]) -> tuple[bytes, bytes]:
    return will[0].encode(), will[1]
