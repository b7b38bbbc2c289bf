"""Two observers of a host: what its kernel announces, and what passes its interfaces.

Both only listen. `Kernel` stamps netlink messages when they arrive, within a millisecond of the
event; `Packets` has the kernel's own timestamps, and may be read long afterwards.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, NamedTuple

from cli.demo.netns import Namespace
from tunnel.ice.pcp import PORT as PCP_PORT

What = Literal["address", "no address", "default route"]
# linux/rtnetlink.h
_RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE = 20, 21, 24
_GROUPS = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_: addresses and routes of IPv4 and IPv6
_MAIN_TABLE = 254
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBB")  # struct rtmsg: family, dst_len, src_len, tos, table, ...
_LINK_LOCAL = 253  # RT_SCOPE_LINK: an address that no packet of ours is sent from
_LOOK = 0.1  # seconds between looks at whether to stop

_ETH_P_ALL = 0x0003
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_TIMESPEC = struct.Struct("=qq")
_PACKET_OUTGOING = 4  # linux/if_packet.h
_BUFFER = 8 << 20  # bytes: tens of seconds of probes
_TCP, _UDP = 6, 17


class Announced(NamedTuple):
    """Something that the kernel announced, time.monotonic() seconds."""

    time: float
    what: What


class Kernel:
    """Addresses and default routes as they come and go in a namespace."""

    def __init__(self, space: Namespace) -> None:
        self._socket = space.call(_netlink)
        self._seen: list[Announced] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._listen, name=f"kernel of {space.label}")
        self._thread.start()

    def first(self, what: What, since: float) -> float | None:
        """When it was first announced after `since`."""
        return min(self._times(what, since), default=None)

    def last(self, what: What, since: float) -> float | None:
        """When it was last announced after `since`."""
        return max(self._times(what, since), default=None)

    def _times(self, what: What, since: float) -> list[float]:
        return [one.time for one in self._seen if one.what == what and one.time >= since]

    def close(self) -> None:
        """Listen no more."""
        self._stopped = True
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._stopped:
            if not select.select([self._socket], [], [], _LOOK)[0]:
                continue
            now = time.monotonic()
            with contextlib.suppress(OSError):  # it overflowed: what was lost is lost
                for what in announced(self._socket.recv(65536)):
                    self._seen.append(Announced(now, what))


def announced(data: bytes) -> Iterator[What]:
    """What the netlink messages in a buffer say."""
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        body = data[_HEADER.size : length]
        if kind in (_RTM_NEWADDR, _RTM_DELADDR) and len(body) >= _ADDRESS.size:
            if _ADDRESS.unpack_from(body)[3] < _LINK_LOCAL:
                yield "address" if kind == _RTM_NEWADDR else "no address"
        elif kind == _RTM_NEWROUTE and len(body) >= _ROUTE.size:
            _, length_to, _, _, table, *_ = _ROUTE.unpack_from(body)
            if length_to == 0 and table == _MAIN_TABLE:
                yield "default route"
        data = data[max(_HEADER.size, (length + 3) & ~3) :]


@dataclass(frozen=True)
class Datagram:
    """A UDP datagram seen at an interface; `first` are its first octets."""

    time: float
    interface: str
    leaves: bool
    source: tuple[str, int]
    target: tuple[str, int]
    first: bytes

    @property
    def is_answer(self) -> bool:
        """A STUN success response, or any QUIC packet of a connection that is up (RFC 9443)."""
        return self.first[:2] == b"\x01\x01" or (len(self.first) > 0 and self.first[0] >> 6 == 1)


class Packets:
    """UDP datagrams at all interfaces of a namespace, also of those that are yet to come; `tcp`:
    segments, too, whose first octets are those of their header behind the ports.
    """

    def __init__(self, space: Namespace, *, tcp: bool = False) -> None:
        self._socket = space.call(_packets)
        self._protocols = (_UDP, _TCP) if tcp else (_UDP,)

    def drain(self) -> list[Datagram]:
        """What passed since the last call, oldest first."""
        seen: list[Datagram] = []
        offset = time.time() - time.monotonic()
        while True:
            try:
                data, extra, _, place = self._socket.recvmsg(256, 64)
            except OSError:
                return seen
            stamps = [_TIMESPEC.unpack(x) for _, kind, x in extra if kind == _SO_TIMESTAMPNS]
            if stamps and (parsed := _parse(data, self._protocols)):
                when = stamps[0][0] + stamps[0][1] / 1e9 - offset
                seen.append(Datagram(when, place[0], place[2] == _PACKET_OUTGOING, *parsed))

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def first_word(seen: Iterable[Datagram], *ignored: int) -> float | None:
    """When the first packet left for somebody out there: not for a group (mDNS, SSDP), not to ask
    the own router for a port (PCP), nor to a port that is ignored.
    """
    spoken = (
        one.time
        for one in seen
        if one.leaves
        and one.target[1] not in (PCP_PORT, *ignored)
        and not (ip_address(one.target[0]).is_multicast or one.target[0].endswith(".255"))
    )
    return next(spoken, None)


def _parse(
    data: bytes, protocols: Sequence[int]
) -> tuple[tuple[str, int], tuple[str, int], bytes] | None:
    """Source, target and first octets of an IP packet that is not a fragment."""
    if data[:1] and data[0] >> 4 == 4 and len(data) >= 28 and data[9] in protocols:
        head, source, target = (data[0] & 15) * 4, data[12:16], data[16:20]
    elif data[:1] and data[0] >> 4 == 6 and len(data) >= 48 and data[6] in protocols:
        head, source, target = 40, data[8:24], data[24:40]
    else:
        return None
    ports = struct.unpack_from("!HH", data, head)
    ends = (str(ip_address(source)), ports[0]), (str(ip_address(target)), ports[1])
    return *ends, data[head + 8 : head + 16]


def _netlink() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    made.bind((0, _GROUPS))
    return made


def _packets() -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    made.setblocking(False)
    return made
