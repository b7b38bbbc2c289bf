"""A broker in this process: amqtt, behind a guard for each connection.

For where mosquitto is not installed, and for a handful of hosts: amqtt takes some 60 kB for each
client, and looks at every subscription for every message. It is given no port: we accept the
connections, and hand it what `guard` has checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from amqtt.broker import Broker

from tunnel.shell.log import Log
from tunnel.shell.rendezvous import limits
from tunnel.shell.rendezvous.guard import Guard, Violation

BURST, RATE = 1000.0, 100.0
"""Packets that a client may send at once, and per second for good: an offer to each peer of a large
network when the network is back. amqtt takes about 0.2 ms for each."""

WRITE_LIMIT = 256 << 10
"""Bytes that may wait for a client that does not read."""

_LISTENER = "default"
_CONFIG = {
    "listeners": {_LISTENER: {"type": "external", "bind": "guard"}},
    "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
}


class Embedded:
    """A running amqtt. `socket` is where the gateway reaches it."""

    name = "amqtt"

    def __init__(
        self,
        directory: Path,
        addresses: Sequence[str | None],
        port: int,
        tls: ssl.SSLContext | None,
        max_clients: int,
    ) -> None:
        self.version = version("amqtt")
        self.socket = directory / "socket"
        self._addresses = addresses
        self._port = port
        self._tls = tls
        self._max_clients = max_clients
        self._clients: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        for name in ("amqtt", "transitions"):
            # They tell of each client, and of every mistake of a stranger.
            logging.getLogger(name).setLevel(logging.CRITICAL)

    async def start(self) -> None:
        """Return when it listens. Raises OSError."""
        self._broker = Broker(_CONFIG)
        await self._broker.start()
        for address in self._addresses:
            server = await asyncio.start_server(
                self._accept, address, self._port, ssl=self._tls, limit=limits.PACKET
            )
            self._servers.append(server)
        self._servers.append(await asyncio.start_unix_server(self._accept, self.socket))

    async def wait(self) -> None:
        """Return never: it ends with this process."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End all connections."""
        for server in self._servers:
            server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(Exception):  # whatever it says, it has ended
            await self._broker.shutdown()

    def reload(self) -> None:
        """The certificate is the server's business."""

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= self._max_clients:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        guarded = _Writer(writer, Guard())
        try:
            await self._broker.external_connected(_Reader(reader, guarded), guarded, _LISTENER)
        except (Violation, OSError) as error:
            _log.debug("client refused", why=error)
        except Exception as error:
            _log.debug("client failed", error=repr(error))
        finally:
            self._clients.discard(task)
            writer.transport.abort()


class _Reader:
    """What amqtt reads (its ReaderAdapter): checked packets."""

    def __init__(self, reader: asyncio.StreamReader, writer: _Writer) -> None:
        self._reader = reader
        self._writer = writer
        self._guard = writer.guard
        self._packet = b""
        self._allowance = BURST
        self._allowed_at = asyncio.get_running_loop().time()

    async def read(self, n: int = -1) -> bytes:
        """`n` bytes, or fewer at the end of a packet; b"" when the client has ended, or must."""
        if n == 0:
            return b""
        if not self._packet:
            try:
                self._packet = await self._next()
            except (Violation, OSError, TimeoutError) as error:
                _log.debug("client refused", why=error)
                self._writer.abort()
        data, self._packet = self._packet[:n], self._packet[n:]
        return data

    async def _next(self) -> bytes:
        while True:
            packet = self._guard.take()
            if packet is not None:
                await self._pace()
                return packet
            # Section 3.1.2.10: after one and a half times the keepalive the client is lost.
            keepalive = self._guard.keepalive
            patience = limits.CONNECT_TIMEOUT if keepalive is None else 1.5 * keepalive
            data = await asyncio.wait_for(self._reader.read(limits.PACKET), patience)
            if not data:
                return b""
            self._guard.feed(data)

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) * RATE)
        self._allowed_at = now
        self._allowance -= 1
        if self._allowance < 0:
            await asyncio.sleep(-self._allowance / RATE)

    def feed_eof(self) -> None:
        self._reader.feed_eof()


class _Writer:
    """What amqtt writes to (its WriterAdapter): a client that must read and acknowledge.

    amqtt writes one packet at a time.
    """

    def __init__(self, writer: asyncio.StreamWriter, guard: Guard) -> None:
        self.guard = guard
        self._writer = writer

    def write(self, data: bytes) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        try:
            self.guard.sent(data)
        except Violation as error:
            _log.debug("client refused", why=error)
            self.abort()
            return
        if transport.get_write_buffer_size() > WRITE_LIMIT:
            self.abort()
            return
        self._writer.write(data)

    def abort(self) -> None:
        """The client has had its chance."""
        self._writer.transport.abort()

    async def drain(self) -> None:
        """`write` bounds what may wait; waiting here would hold up amqtt's other clients."""

    def get_peer_info(self) -> tuple[str, int]:
        peer = self._writer.get_extra_info("peername")
        return (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("gateway", 0)

    def get_ssl_info(self) -> ssl.SSLObject | None:
        found: ssl.SSLObject | None = self._writer.get_extra_info("ssl_object")
        return found

    async def close(self) -> None:
        self._writer.close()


_log = Log("rendezvous")
