"""The sockets of the STUN server.

One that listens on all addresses of this host has to answer from the very address it was asked at,
or a NAT would not let the answer pass; IP_PKTINFO tells which that was, and sets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence

from tunnel.ice.stun_server import StunServer
from tunnel.path.network import Address

ALTERNATE_PORT_OFFSET = 1
"""From the port to the other port of RFC 5780, as coturn has it: 3478 and 3479."""

_BATCH = 64  # datagrams that are answered before the loop may do something else
_IP_PKTINFO = 8  # <linux/in.h>; in Python's socket module from 3.14 on
_PKTINFO4 = struct.Struct("=I4s4s")  # in_pktinfo: interface, local address, destination
_PKTINFO6 = struct.Struct("=16sI")  # in6_pktinfo: address, interface


class Stun:
    """Answers STUN requests from `start` to `stop`."""

    def __init__(
        self, addresses: Sequence[str | None], port: int, alternate: str | None = None
    ) -> None:
        """`alternate` is a second address, for RFC 5780; it needs a first one in `addresses`."""
        self.port = port
        self._hosts = [address or any_ for address in addresses for any_ in _every(address)]
        ports = (port, port + ALTERNATE_PORT_OFFSET)
        if alternate is None:
            self.server = StunServer()
            self._binds = [(host, port) for host in self._hosts]
        else:
            self.server = StunServer({self._hosts[0]: alternate}, ports)
            self._binds = [(host, each) for host in (self._hosts[0], alternate) for each in ports]
        self._sockets: dict[Address, socket.socket] = {}

    async def start(self) -> None:
        """Return when it listens. Raises OSError."""
        loop = asyncio.get_running_loop()
        for host, port in self._binds:
            try:
                opened = _open(host, port)
            except OSError:
                if host == "::":
                    continue  # a host without IPv6
                raise
            self._sockets[Address(host, opened.getsockname()[1])] = opened
            loop.add_reader(opened, self._receive, opened)

    async def stop(self) -> None:
        """Close the sockets."""
        loop = asyncio.get_running_loop()
        for each in self._sockets.values():
            loop.remove_reader(each)
            each.close()
        self._sockets.clear()

    def _receive(self, receiver: socket.socket) -> None:
        port = receiver.getsockname()[1]
        for _ in range(_BATCH):
            try:
                data, ancillary, _, sockaddr = receiver.recvmsg(2048, 64)
            except OSError:  # nothing more, or an ICMP error about an answer
                return
            host = _destination(ancillary)
            if host is None:
                continue
            reply = self.server.receive(data, Address.from_sockaddr(sockaddr), Address(host, port))
            if reply is None:
                continue
            sender = self._sockets.get(reply.local, receiver)
            with contextlib.suppress(OSError):  # it will ask again
                sender.sendmsg([reply.data], [_source(reply.local.host)], 0, sockaddr)


def _every(address: str | None) -> tuple[str, ...]:
    return ("0.0.0.0", "::") if address is None else (address,)


def _open(host: str, port: int) -> socket.socket:
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    if ":" in host:
        opened = socket.socket(socket.AF_INET6, kind)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        opened = socket.socket(socket.AF_INET, kind)
        opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    try:
        opened.bind((host, port))
    except OSError:
        opened.close()
        raise
    return opened


def _destination(ancillary: Sequence[tuple[int, int, bytes]]) -> str | None:
    """The address of ours that a datagram came to."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return socket.inet_ntop(socket.AF_INET, _PKTINFO4.unpack(data)[1])
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return socket.inet_ntop(socket.AF_INET6, _PKTINFO6.unpack(data)[0])
    return None


def _source(host: str) -> tuple[int, int, bytes]:
    if ":" in host:
        packed = socket.inet_pton(socket.AF_INET6, host)
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(packed, 0)
    packed = socket.inet_pton(socket.AF_INET, host)
    return socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, packed, bytes(4))
