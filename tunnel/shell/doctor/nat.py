"""Measures NAT behaviour (`tunnel.ice.behaviour`) with real sockets, one local address at a time.

The sockets are fresh ones, on ports of the kernel's choice: a running tunnel's are left alone. They
carry its mark and are bound to the interface, so that they leave as the tunnel's own would.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Sequence

from tunnel.ice.behaviour import Behaviour, Discovery, Sockets
from tunnel.path.network import Address, PathKey
from tunnel.shell import clock
from tunnel.shell.udp import SOCKET_MARK

_BUFFER = 1 << 16
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3  # <linux/in.h>, <linux/in6.h>


async def measure(
    ip: str, interface: str, servers: Sequence[Address], *, link_mtu: int, limit: float
) -> Behaviour | None:
    """Ask these servers from this address; None when it cannot be bound.

    `interface`: the device to bind to, "" for any. `link_mtu` in bytes, `limit` in seconds.
    """
    sockets: list[socket.socket] = []
    try:
        try:
            for _ in Sockets._fields:
                sockets.append(_open(ip, interface))
        except OSError:
            return None
        measurement = _Measurement(sockets, servers, link_mtu, limit)
        try:
            return await measurement.run()
        finally:
            measurement.stop()
    finally:
        for each in sockets:
            each.close()


class _Measurement:
    def __init__(
        self,
        sockets: Sequence[socket.socket],
        servers: Sequence[Address],
        link_mtu: int,
        limit: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = {Address.from_sockaddr(each.getsockname()): each for each in sockets}
        self._done = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._discovery = Discovery(
            Sockets(*self._sockets),
            servers,
            random.SystemRandom(),
            clock.now(),
            link_mtu=link_mtu,
            limit=limit,
        )

    async def run(self) -> Behaviour:
        for local, each in self._sockets.items():
            self._loop.add_reader(each.fileno(), self._read, local, each)
        self._turn()
        await self._done
        return self._discovery.behaviour()

    def stop(self) -> None:
        for each in self._sockets.values():
            self._loop.remove_reader(each.fileno())
        if self._timer is not None:
            self._timer.cancel()

    def _read(self, local: Address, from_socket: socket.socket) -> None:
        now = clock.now()
        with contextlib.suppress(OSError):  # nothing more, or an ICMP error: silence tells as much
            while True:
                data, sockaddr = from_socket.recvfrom(_BUFFER)
                self._discovery.receive(data, PathKey(local, Address.from_sockaddr(sockaddr)), now)
        self._turn()

    def _turn(self) -> None:
        now = clock.now()
        for path, data in self._discovery.datagrams_to_send(now):
            with contextlib.suppress(OSError):  # as good as lost
                self._sockets[path.local].sendto(data, path.remote)
        if self._timer is not None:
            self._timer.cancel()
        timer = self._discovery.get_timer()
        if timer is not None:
            self._timer = self._loop.call_later(max(0.0, timer - now), self._turn)
        elif not self._done.done():
            self._done.set_result(None)


def _open(ip: str, interface: str) -> socket.socket:
    is_ipv6 = ":" in ip
    opened = socket.socket(
        socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    try:
        if is_ipv6:
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        else:
            opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        with contextlib.suppress(OSError):  # only for the privileged; it works without, too
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
        if interface:
            with contextlib.suppress(OSError):
                opened.setsockopt(
                    socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0"
                )
        opened.bind((ip, 0))
    except OSError:
        opened.close()
        raise
    return opened
