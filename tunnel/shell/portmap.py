"""Ports of home routers that lead to our sockets: asked for, kept, given back at the end.

For each local address that is behind a NAT, as far as its interface has a default gateway, one
`tunnel.ice.portmap.PortMapping`, a socket on that address to ask from, and UPnP where that is the
only way. IPv6 addresses are asked about, too: PCP opens the router's firewall for them.

One more socket listens to what gateways announce to everybody when they have lost their mappings.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from tunnel.ice import pcp
from tunnel.ice.portmap import (
    ExternalChanged,
    PortMapping,
    UpnpWanted,
    is_translated,
)
from tunnel.path.network import Address, LocalAddress, LocalNetwork, canonical_ip
from tunnel.shell import clock
from tunnel.shell.log import Log
from tunnel.shell.soon import Soon
from tunnel.shell.udp import SOCKET_MARK
from tunnel.shell.upnp import FIRST_PORT, Upnp

MAX_MAPPINGS = 8
"""Local addresses that are asked about: hosts with more are routers themselves."""
FAREWELL = 0.5
"""Seconds that `close` may wait for a router's answer to the last UPnP request."""
_DATAGRAMS = 16  # of one socket at a time


class PortMapper:
    """All mappings of a tunnel. `changed` gets them in full, by local socket: the external address.

    It is never called from inside a call to this. `secret` must be the same after a restart.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        changed: Callable[[dict[Address, Address]], None],
        *,
        secret: bytes,
        rng: random.Random,
    ) -> None:
        self._loop = loop
        self._changed = changed
        self._secret = secret
        self._rng = rng
        self._asked: dict[Address, _Asked] = {}
        self._told: dict[Address, Address] = {}
        self._tell = Soon(loop, self._tell_now)
        self._ears: socket.socket | None = None
        self._closing = False

    def network_changed(self, network: LocalNetwork, port: int) -> None:
        """A full snapshot, and the port of our sockets. Gateways that stay are asked again."""
        if self._closing:
            return
        wanted: dict[Address, tuple[LocalAddress, str]] = {}
        for local in network.addresses:
            gateway = network.gateway(local)
            if port and gateway and (":" in local.ip or is_translated(local.ip)):
                wanted[Address(local.ip, port)] = (local, gateway)
        for base, asked in list(self._asked.items()):
            if wanted.get(base) != (asked.local, asked.gateway):
                self._drop(base)
        now = clock.now()
        for base, (local, gateway) in list(wanted.items())[:MAX_MAPPINGS]:
            known = self._asked.get(base)
            if known is None:
                self._begin(base, local, gateway, now)
            else:
                known.mapping.again(now)
                self._serve(known, now)
        self._listen()
        self._tell()

    def resumed(self) -> None:
        """The host slept, and mappings may have expired."""
        now = clock.now()
        for asked in list(self._asked.values()):
            asked.mapping.again(now)
            self._serve(asked, now)

    def stop(self) -> None:
        """Begin to delete all mappings."""
        if self._closing:
            return
        self._closing = True
        self._tell.stop()
        now = clock.now()
        for asked in list(self._asked.values()):
            asked.mapping.close(now)
            self._serve(asked, now)
            if asked.upnp is not None:
                asked.upnp.close()

    def close(self) -> None:
        """Delete all mappings, as far as their routers answer soon."""
        self.stop()
        until = clock.monotonic() + FAREWELL
        for asked in list(self._asked.values()):
            if asked.upnp is not None:
                asked.upnp.join(max(0.0, until - clock.monotonic()))
        for base in list(self._asked):
            self._drop(base)
        if self._ears is not None:
            self._loop.remove_reader(self._ears.fileno())
            self._ears.close()
            self._ears = None

    def status(self) -> list[dict[str, Any]]:
        """Of each local address that is asked about."""
        now = clock.now()
        return [
            {
                "local": str(base),
                "gateway": asked.gateway,
                "state": asked.mapping.state.value,
                "protocol": asked.mapping.protocol.value if external is not None else None,
                "external": None if external is None else str(external),
                "behind_another_nat": external is not None and is_translated(external.host),
                "expires_s": None if external is None else round(asked.mapping.expires_at - now),
            }
            for base, asked in self._asked.items()
            for external in (asked.mapping.external,)
        ]

    # one mapping

    def _begin(self, base: Address, local: LocalAddress, gateway: str, now: float) -> None:
        try:
            sock = _socket_to(local, gateway)
        except OSError as error:
            _log.debug("cannot ask for a port", local=base, gateway=gateway, error=error.strerror)
            return
        key = f"{base} {gateway}".encode()
        nonce = hmac.digest(self._secret, key, "sha256")[: pcp.NONCE_LENGTH]
        mapping = PortMapping(base, nonce=nonce, rng=self._rng, now=now)
        asked = self._asked[base] = _Asked(mapping, sock, local, gateway)
        self._loop.add_reader(sock.fileno(), self._on_readable, asked)
        self._serve(asked, now)

    def _drop(self, base: Address) -> None:
        """The address or its gateway is gone: nobody is there to be told."""
        asked = self._asked.pop(base)
        if asked.timer is not None:
            asked.timer.cancel()
        if asked.upnp is not None:
            asked.upnp.close()
        self._loop.remove_reader(asked.socket.fileno())
        asked.socket.close()

    def _on_readable(self, asked: _Asked) -> None:
        now = clock.now()
        for _ in range(_DATAGRAMS):
            try:
                data = asked.socket.recv(2048)
            except BlockingIOError:
                break
            except ConnectionRefusedError:
                asked.mapping.refused(now)
                break
            except OSError:
                break
            asked.mapping.receive(data, now)
        self._serve(asked, now)

    def _on_timer(self, asked: _Asked) -> None:
        asked.timer = None
        now = clock.now()
        asked.mapping.handle_timer(now)
        self._serve(asked, now)

    def _serve(self, asked: _Asked, now: float) -> None:
        """Everything that an input to a mapping may have caused."""
        mapping = asked.mapping
        mapping.handle_timer(now)
        for data in mapping.datagrams_to_send(now):
            # What cannot be sent is lost, as any datagram; a refusal of the last one may be told
            # here, too.
            with contextlib.suppress(OSError):
                asked.socket.send(data)
        while (event := mapping.next_event()) is not None:
            match event:
                case ExternalChanged():
                    self._note(asked)
                case UpnpWanted(port):
                    if asked.upnp is None:
                        asked.upnp = self._upnp(asked)
                    asked.upnp.map(port)
        if asked.timer is not None:
            asked.timer.cancel()
            asked.timer = None
        due = mapping.get_timer()
        if due is not None:
            asked.timer = self._loop.call_later(max(0.0, due - now), self._on_timer, asked)

    def _upnp(self, asked: _Asked) -> Upnp:
        def answered(external: Address | None) -> None:
            if self._asked.get(asked.mapping.base) is asked:
                now = clock.now()
                asked.mapping.upnp_answered(external, now)
                self._serve(asked, now)

        return Upnp(
            self._loop,
            asked.mapping.base,
            asked.gateway,
            answered,
            lambda: self._rng.randint(FIRST_PORT, 65535),  # by the thread, rarely
        )

    # what comes of it

    def _note(self, asked: _Asked) -> None:
        external = asked.mapping.external
        if external is None:
            _log.info("port mapping lost", local=asked.mapping.base)
        else:
            _log.info(
                "port mapped",
                local=asked.mapping.base,
                external=external,
                by=asked.mapping.protocol.value,
                behind_another_nat=is_translated(external.host) or None,
            )
        self._tell()

    def _tell_now(self) -> None:
        mapped = {
            base: external
            for base, asked in self._asked.items()
            if (external := asked.mapping.external) is not None and external != base
        }
        if mapped != self._told:
            self._told = mapped
            self._changed(dict(mapped))

    # what gateways announce

    def _listen(self) -> None:
        """Hear announcements by all interfaces that are asked on; without, all goes on, slower."""
        interfaces = {a.local.interface for a in self._asked.values() if ":" not in a.local.ip}
        if self._ears is None and interfaces:
            try:
                self._ears = _announcement_socket()
            except OSError as error:  # somebody else listens, and does not share
                _log.debug("cannot hear announcements of gateways", error=error.strerror)
                return
            self._loop.add_reader(self._ears.fileno(), self._on_announcement)
        for interface in interfaces:
            request = struct.pack(
                "=4s4si",  # struct ip_mreqn
                socket.inet_aton(pcp.ANNOUNCE_GROUP),
                bytes(4),
                _index(interface),
            )
            if self._ears is not None:
                with contextlib.suppress(OSError):  # joined already
                    self._ears.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)

    def _on_announcement(self) -> None:
        assert self._ears is not None
        for _ in range(_DATAGRAMS):
            try:
                data, sender = self._ears.recvfrom(2048)
            except OSError:
                return
            now = clock.now()
            for asked in list(self._asked.values()):
                if asked.gateway == sender[0] and sender[1] == pcp.PORT:
                    asked.mapping.announced(data, now)
                    self._serve(asked, now)


@dataclass(eq=False, slots=True)
class _Asked:
    """One mapping and what serves it."""

    mapping: PortMapping
    socket: socket.socket
    local: LocalAddress
    gateway: str
    upnp: Upnp | None = None
    timer: asyncio.TimerHandle | None = None


def _socket_to(local: LocalAddress, gateway: str) -> socket.socket:
    """Of this address, to the gateway alone. Raises OSError."""
    ipv6 = ":" in local.ip
    opened = socket.socket(
        socket.AF_INET6 if ipv6 else socket.AF_INET,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    try:
        with contextlib.suppress(OSError):  # EPERM without CAP_NET_ADMIN
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
        opened.bind((local.ip, 0))
        if ipv6:
            scope = _index(local.interface) if ip_address(gateway).is_link_local else 0
            opened.connect((canonical_ip(gateway), pcp.PORT, 0, scope))
        else:
            opened.connect((gateway, pcp.PORT))
    except (OSError, ValueError):
        opened.close()
        raise
    return opened


def _announcement_socket() -> socket.socket:
    opened = socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((pcp.ANNOUNCE_GROUP, pcp.ANNOUNCE_PORT))
    except OSError:
        opened.close()
        raise
    return opened


def _index(interface: str) -> int:
    """Of an interface; 0, which is none in particular, if it has just gone."""
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0


_log = Log("portmap")
