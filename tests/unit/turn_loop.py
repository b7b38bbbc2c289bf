"""The scripted TURN server on the loopback interface, over UDP, TCP and TLS, in the running loop.

Each client has a server of its own. Peers are sockets on the loopback interface, too: what leaves
for an address that `peers` names goes there, and comes back as from that address.
"""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.turn_server import ScriptedServer
from tunnel.ice.turn_message import cut
from tunnel.path.network import Address, LocalAddress, LocalNetwork, Route

HOST = "127.0.0.1"
NETWORK = LocalNetwork((LocalAddress(HOST, "lo"),), (Route(ip_network("127.0.0.0/8"), "lo", 0),))


class Client:
    """One client of the server, as the server sees it."""

    def __init__(self, stream: bool, write: Callable[[bytes], None]) -> None:
        self.server = ScriptedServer(stream=stream)
        self.stream = stream
        self.write = write
        self.close: Callable[[], None] = lambda: None
        self.sockets: dict[Address, socket.socket] = {}
        self._passed = 0

    def receive(self, data: bytes, peers: dict[Address, Address]) -> None:
        for answer in self.server.receive(data):
            self.write(answer)
        for remote, payload in self.server.sent[self._passed :]:
            if remote in peers:
                self._socket(remote).sendto(payload, peers[remote])
        self._passed = len(self.server.sent)

    def _socket(self, remote: Address) -> socket.socket:
        """What stands for the relayed address toward one peer."""
        if remote not in self.sockets:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            made.bind((HOST, 0))
            self.sockets[remote] = made
            asyncio.get_running_loop().add_reader(made, self._from_peer, remote, made)
        return self.sockets[remote]

    def _from_peer(self, remote: Address, made: socket.socket) -> None:
        message = self.server.from_peer(remote, made.recv(65536))
        if message is not None:
            self.write(message)

    def address(self, remote: Address) -> Address:
        """Where this peer sees us."""
        return Address(*self._socket(remote).getsockname())


class LoopServer:
    """All of it. `prepare` may spoil each client's server before it says anything."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.peers: dict[Address, Address] = {}
        self.deaf = False
        """Datagrams of clients are ignored: UDP is blocked."""
        self.prepare: Callable[[Client], None] = lambda client: None
        self._by_source: dict[Any, Client] = {}
        self._listeners: list[asyncio.Server] = []
        self._udp: asyncio.DatagramTransport | None = None

    async def start(self, context: ssl.SSLContext | None = None) -> LoopServer:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: _Stream(self), HOST, 0, ssl=context)
        self.port = listener.sockets[0].getsockname()[1]
        self._listeners.append(listener)
        self._udp, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(self), (HOST, self.port)
        )
        return self

    def stop(self) -> None:
        if self._udp is not None:
            self._udp.close()
        for listener in self._listeners:
            listener.close()
        for client in self.clients:
            client.close()
            for made in client.sockets.values():
                asyncio.get_running_loop().remove_reader(made)
                made.close()

    def add(self, stream: bool, write: Callable[[bytes], None]) -> Client:
        client = Client(stream, write)
        self.prepare(client)
        self.clients.append(client)
        return client

    def datagram(self, data: bytes, source: Any) -> None:
        udp = self._udp
        if self.deaf or udp is None:
            return
        if source not in self._by_source:
            self._by_source[source] = self.add(False, lambda answer: udp.sendto(answer, source))
        self._by_source[source].receive(data, self.peers)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: LoopServer) -> None:
        self._server = server

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._server.datagram(data, addr)


class _Stream(asyncio.Protocol):
    def __init__(self, server: LoopServer) -> None:
        self._server = server
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._client = self._server.add(True, made.write)
        self._client.close = made.abort

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        messages, used = cut(memoryview(self._buffer))
        for message in messages:
            self._client.receive(bytes(message), self._server.peers)
        self._buffer = self._buffer[used:]


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of the loopback address that vouches for itself, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=True
        )
        .sign(private, hashes.SHA256())
    )
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate, key
