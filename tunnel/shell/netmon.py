"""The network of this host, as the kernel tells it: a doorbell and a snapshot.

A netlink socket subscribed to links, addresses and routes is only the doorbell: what rings it is
thrown away, and the state is read anew as a whole. So a lost event (ENOBUFS) costs nothing, nothing
can get out of step, and there is one code path for the first look and for every later one.

A full dump takes the kernel 0.1 ms, but decoding it in Python 0.2 ms for every link; so decoded
messages are remembered by their bytes, and a snapshot decodes only what changed since the last one.
pyroute2's own IPRoute is not used here because it runs an event loop of its own, and blocks ours;
its message classes are.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Protocol

from pyroute2.netlink.rtnl import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV4_ROUTE,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_IPV6_ROUTE,
    RTMGRP_LINK,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from tun.linux import ALIAS
from tunnel.path.network import LocalAddress, LocalNetwork, Route

ALWAYS_EXCLUDED = ("docker*", "br-*", "virbr*")
"""Interfaces that lead to containers and virtual machines of this very host, never to a peer. Their
addresses are the same on many hosts, so as candidates they would only cost probes."""


class NetworkMonitor(Protocol):
    """What the loop needs of the network; `Netlink` is the real one."""

    def fileno(self) -> int:
        """The doorbell: readable when something may have changed."""

    def acknowledge(self) -> None:
        """Silence the doorbell."""

    def snapshot(self) -> LocalNetwork:
        """The network as it is now. Raises OSError."""

    def close(self) -> None:
        """Give the descriptors back."""


class Netlink:
    """The network of this process's namespace, without the interfaces that `exclude` names.

    `exclude` are shell patterns beside ALWAYS_EXCLUDED; `own` is the name of our own TUN device.
    """

    def __init__(self, own: str, exclude: Iterable[str] = ()) -> None:
        self._own = own
        self._patterns = (*ALWAYS_EXCLUDED, *exclude)
        self._doorbell = _netlink_socket(_GROUPS)
        self._doorbell.setblocking(False)
        self._requests = _netlink_socket(0)
        self._requests.settimeout(_DUMP_TIMEOUT)
        self._sequence = 0

    def fileno(self) -> int:
        return self._doorbell.fileno()

    def acknowledge(self) -> None:
        try:
            while True:
                self._doorbell.recv(_BUFFER)
        except BlockingIOError:
            pass
        except OSError as error:
            # The kernel had more to tell than fits the buffer: the snapshot has it all anyway.
            if error.errno != errno.ENOBUFS:
                raise

    def snapshot(self) -> LocalNetwork:
        links = list(map(_link, self._dump(RTM_GETLINK, _LINK_REQUEST)))
        addresses = list(map(_address, self._dump(RTM_GETADDR, _ADDRESS_REQUEST)))
        hops = [
            hop
            for family in (socket.AF_INET, socket.AF_INET6)
            for raw in self._dump(RTM_GETROUTE, _route_request(family))
            for hop in _route(raw)
        ]
        return select(links, addresses, hops, self._excluded)

    def close(self) -> None:
        self._doorbell.close()
        self._requests.close()

    def _excluded(self, name: str) -> bool:
        return name == self._own or any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _dump(self, kind: int, request: bytes) -> list[bytes]:
        """All objects of one kind, each as the raw message with sequence and port zeroed."""
        for _ in range(_DUMP_ATTEMPTS):
            self._sequence += 1
            header = _HEADER.pack(
                _HEADER.size + len(request), kind, _NLM_F_REQUEST | _NLM_F_DUMP, self._sequence, 0
            )
            self._requests.send(header + request)
            objects, interrupted = self._answer()
            if not interrupted:
                break
        return objects

    def _answer(self) -> tuple[list[bytes], bool]:
        objects: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, sequence, raw in _messages(self._requests.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue  # the rest of a dump that timed out
                interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    code = -_ERROR.unpack_from(raw, _HEADER.size)[0] if len(raw) >= 20 else 0
                    # ENOENT: this namespace has no main table yet, hence no routes.
                    if code not in (0, errno.ENOENT):
                        raise OSError(code, os.strerror(code))
                    return objects, interrupted
                objects.append(raw)


@dataclass(frozen=True, slots=True)
class Link:
    """An interface; `usable`: up, with carrier, not dormant, neither loopback nor a tunnel."""

    index: int
    name: str
    usable: bool


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address of an interface; `usable`: not link-local, neither tentative nor deprecated."""

    ip: str
    index: int
    usable: bool


@dataclass(frozen=True, slots=True)
class Hop:
    """One way a unicast route of the main table can go; `alive`: its link has carrier."""

    network: IPv4Network | IPv6Network
    index: int
    metric: int
    alive: bool
    gateway: str = ""


def select(
    links: Iterable[Link],
    addresses: Iterable[InterfaceAddress],
    hops: Iterable[Hop],
    excluded: Callable[[str], bool],
) -> LocalNetwork:
    """What of the kernel's state a tunnel may use: pure, the whole policy of this module."""
    names = {link.index: link.name for link in links if link.usable and not excluded(link.name)}
    return LocalNetwork(
        addresses=tuple(
            LocalAddress(address.ip, names[address.index])
            for address in addresses
            if address.usable and address.index in names
        ),
        routes=tuple(
            Route(hop.network, names[hop.index], hop.metric, hop.gateway)
            for hop in hops
            if hop.alive and hop.index in names
        ),
    )


# ---- decoding; remembered by the bytes of the message ----

_REMEMBERED = 4096  # messages: more than hosts have links, addresses or routes, save for routers


@lru_cache(_REMEMBERED)
def _link(raw: bytes) -> Link:
    message = _decoded(ifinfmsg, raw)
    flags = message["flags"]
    # IFF_RUNNING is the operational state of RFC 2863: up, or unknown to the driver. A link that
    # has carrier but no such state yet still drops what is sent (its queue is not attached).
    usable = flags & _LINK_READY == _LINK_READY and not flags & _IFF_LOOPBACK
    # Two tunnels of one host, each sending its packets through the other, would go round for ever.
    usable = usable and message.get_attr("IFLA_IFALIAS") != ALIAS
    return Link(message["index"], message.get_attr("IFLA_IFNAME") or "", usable)


@lru_cache(_REMEMBERED)
def _address(raw: bytes) -> InterfaceAddress:
    message = _decoded(ifaddrmsg, raw)
    # IFA_LOCAL is ours; on a point-to-point link IFA_ADDRESS is the other end's (rtnetlink(7)).
    ip = ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
    flags = message.get_attr("IFA_FLAGS")
    if flags is None:
        flags = message["flags"]
    unusable = flags & (_IFA_F_DADFAILED | _IFA_F_DEPRECATED)
    # An optimistic address may be used while its uniqueness is being checked (RFC 4429).
    if flags & _IFA_F_TENTATIVE and not flags & _IFA_F_OPTIMISTIC:
        unusable = True
    usable = not (unusable or ip.is_link_local or ip.is_loopback or ip.is_multicast)
    return InterfaceAddress(str(ip), message["index"], usable)


@lru_cache(_REMEMBERED)
def _route(raw: bytes) -> tuple[Hop, ...]:
    message = _decoded(rtmsg, raw)
    family = message["family"]
    table = message.get_attr("RTA_TABLE") or message["table"]
    if (
        family not in (socket.AF_INET, socket.AF_INET6)
        or table != _RT_TABLE_MAIN
        or message["type"] != _RTN_UNICAST
        or message["flags"] & _RTM_F_CLONED
    ):
        return ()
    anywhere = "0.0.0.0" if family == socket.AF_INET else "::"
    network = ip_network((message.get_attr("RTA_DST") or anywhere, message["dst_len"]))
    if network.is_link_local or network.is_multicast:
        return ()  # every link has these; no peer is sought there
    metric = message.get_attr("RTA_PRIORITY") or 0
    ways = [(message.get_attr("RTA_OIF"), message["flags"], _gateway(message))]
    ways += [
        (hop["oif"], hop["flags"], _gateway(hop)) for hop in message.get_attr("RTA_MULTIPATH") or ()
    ]
    return tuple(
        Hop(network, index, metric, not flags & (_RTNH_F_DEAD | _RTNH_F_LINKDOWN), gateway)
        for index, flags, gateway in ways
        if index is not None
    )


def _gateway(way: Any) -> str:
    """Of a route, or of one of its hops; one of the other family is in RTA_VIA."""
    via = way.get_attr("RTA_VIA") or {}
    return str(way.get_attr("RTA_GATEWAY") or via.get("addr") or "")


def _decoded(kind: Callable[[bytes], Any], raw: bytes) -> Any:
    message = kind(raw)
    message.decode()
    return message


# ---- netlink itself ----

_GROUPS = (
    RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
)
_BUFFER = 1 << 16  # bytes; the kernel fills at most 32 KiB a message of a dump
_DUMP_TIMEOUT = 1.0  # seconds; the kernel answers in the same call, so this never passes
_DUMP_ATTEMPTS = 3  # a dump that something changed under is repeated; the doorbell rings anyway

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ERROR = struct.Struct("=i")

# <linux/netlink.h>
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x001, 0x300, 0x010
_NLMSG_NOOP, _NLMSG_ERROR, _NLMSG_DONE = 1, 2, 3
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12

# <linux/if.h>: up, running (RFC 2863), and with carrier
_LINK_READY = 0x1 | 0x40 | 0x10000
_IFF_LOOPBACK = 0x8

# <linux/if_addr.h>
_IFA_F_OPTIMISTIC, _IFA_F_DADFAILED, _IFA_F_DEPRECATED, _IFA_F_TENTATIVE = 0x04, 0x08, 0x20, 0x40

# <linux/rtnetlink.h>
_RTN_UNICAST, _RT_TABLE_MAIN, _RTM_F_CLONED = 1, 254, 0x200
_RTNH_F_DEAD, _RTNH_F_LINKDOWN = 0x01, 0x10

# struct ifinfomsg, then IFLA_EXT_MASK = RTEXT_FILTER_SKIP_STATS: counters would change every dump.
_LINK_REQUEST = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + struct.pack("=HHI", 8, 29, 8)
_ADDRESS_REQUEST = struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)  # struct ifaddrmsg


def _route_request(family: int) -> bytes:
    """struct rtmsg; with the strict check on, the kernel dumps the named table only."""
    return struct.pack("=8BI", family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)


def _netlink_socket(groups: int) -> socket.socket:
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    try:
        # Strict checking (Linux 4.20) makes the filters in our requests count.
        opened.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        opened.bind((0, groups))
    except OSError:
        opened.close()
        raise
    return opened


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, message with sequence and port zeroed) of each message in `data`."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        if kind != _NLMSG_NOOP:
            raw = data[offset : offset + 8] + bytes(8) + data[offset + 16 : offset + length]
            yield kind, flags, sequence, raw
        offset += (length + 3) & ~3  # NLMSG_ALIGN
