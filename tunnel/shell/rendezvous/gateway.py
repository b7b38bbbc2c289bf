"""MQTT over WebSocket, for hosts behind proxies that let nothing pass but port 443 or 80.

Each WebSocket becomes a connection to the broker's Unix socket; what is in it is not looked at.
(Debian builds mosquitto without WebSocket support; so there is one way for all.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from tunnel.shell.log import Log
from tunnel.shell.rendezvous import limits

PATH = "/mqtt"
"""Where hosts connect to; a reverse proxy may serve other things beside."""

_CHUNK = 16384  # bytes read from the broker at once


class Gateway:
    """Listens for WebSockets from `start` to `stop`."""

    def __init__(
        self,
        broker: Path,
        addresses: Sequence[str | None],
        port: int,
        tls: ssl.SSLContext | None,
        max_clients: int,
    ) -> None:
        self._broker = broker
        self._addresses = addresses
        self._port = port
        self._tls = tls
        self._max_clients = max_clients
        self._servers: list[Server] = []
        self._clients = 0
        # It tells of each stranger that does not speak its language.
        logging.getLogger("websockets.server").setLevel(logging.CRITICAL)

    async def start(self) -> None:
        """Return when it listens. Raises OSError."""
        for address in self._addresses:
            server = await serve(
                self._client,
                address,
                self._port,
                ssl=self._tls,
                subprotocols=[Subprotocol("mqtt")],
                process_request=self._admit,
                compression=None,  # what is sealed does not compress
                open_timeout=limits.CONNECT_TIMEOUT,
                ping_interval=None,  # MQTT has its own
                close_timeout=1.0,
                max_size=1 << 16,
                max_queue=4,
            )
            self._servers.append(server)

    async def stop(self) -> None:
        """End all connections."""
        for server in self._servers:
            server.close()
        for server in self._servers:
            await server.wait_closed()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path != PATH:
            return connection.respond(HTTPStatus.NOT_FOUND, f"MQTT is at {PATH}\n")
        if self._clients >= self._max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _client(self, websocket: ServerConnection) -> None:
        self._clients += 1
        try:
            reader, writer = await asyncio.open_unix_connection(self._broker)
        except OSError as error:
            _log.warning("gateway cannot reach the broker", error=error.strerror)
            self._clients -= 1
            return
        ways = [
            asyncio.create_task(_upward(websocket, writer)),
            asyncio.create_task(_downward(reader, websocket)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._clients -= 1
            for way in ways:
                way.cancel()
            writer.close()
            await asyncio.gather(*ways, return_exceptions=True)


async def _upward(websocket: ServerConnection, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        async for message in websocket:
            if isinstance(message, str):  # section 6: MQTT must be in binary frames
                return
            writer.write(message)
            await writer.drain()


async def _downward(reader: asyncio.StreamReader, websocket: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        while data := await reader.read(_CHUNK):
            await websocket.send(data)


_log = Log("rendezvous")
