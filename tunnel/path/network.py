"""Plain values of the network: addresses, paths, and what this host has to send from.

Nothing here does I/O. The shell fills a `LocalNetwork` from netlink; everything below it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

_THIS_NETWORK = IPv4Network("0.0.0.0/8")  # RFC 791 section 3.2: only ever a source
_BROADCAST = IPv4Address("255.255.255.255")


class Address(NamedTuple):
    """A UDP address: canonical IP literal and port. Compares, hashes and sorts as a tuple."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse "192.0.2.1:4117" or "[2001:db8::1]:4117". Raises ValueError."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not colon or bracketed != (":" in host):
            raise ValueError(f"{text!r} is not of the form 192.0.2.1:4117 or [2001:db8::1]:4117")
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise ValueError(f"{text!r} has no port between 1 and 65535")
        return cls(canonical_ip(host), int(port))

    @classmethod
    def from_sockaddr(cls, sockaddr: tuple[Any, ...]) -> Address:
        """From what recvfrom() and getsockname() return, for IPv4 (2-tuple) and IPv6 (4-tuple)."""
        host, port = sockaddr[0], sockaddr[1]
        return cls(canonical_ip(host.partition("%")[0]), port)

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


class PathKey(NamedTuple):
    """A path: the local socket (by its bound address) and the remote address."""

    local: Address
    remote: Address

    def __str__(self) -> str:
        return f"{self.local}>{self.remote}"


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """A local IP address fit to send from.

    Whoever makes one vouches for it: link up with carrier; not tentative, dadfailed or deprecated;
    not loopback, not link-local, not on a tunnel device of ours. `ip` is canonical.
    """

    ip: str
    interface: str


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route; `metric` is the kernel's priority (lower is better)."""

    network: IPv4Network | IPv6Network
    interface: str
    metric: int
    gateway: str = ""
    """The router's address, without scope if link-local; "" where the network is on the link."""


@dataclass(frozen=True, slots=True)
class LocalNetwork:
    """A full snapshot of the usable local addresses and the routes, ours excluded."""

    addresses: tuple[LocalAddress, ...] = ()
    routes: tuple[Route, ...] = ()

    def sources(self, remote_ip: str) -> list[LocalAddress]:
        """Local addresses that may reach `remote_ip` (an IP literal), best first.

        Only those of its family whose interface has a route that covers it. The order is the
        kernel's: longest prefix, then lowest metric; ties keep the order of `addresses`.
        """
        best = self._routes_to(remote_ip)
        return sorted(best, key=lambda address: best[address])

    def places(self, remote_ip: str) -> dict[str, int]:
        """The places, from 0, of the local addresses in that order; equal routes, equal places."""
        best = self._routes_to(remote_ip)
        order = sorted(set(best.values()))
        return {address.ip: order.index(rank) for address, rank in best.items()}

    def _routes_to(self, remote_ip: str) -> dict[LocalAddress, tuple[int, int]]:
        """The best route of each local address that has one: the negative length of its prefix,
        and its metric."""
        remote = _parsed(remote_ip)
        best: dict[str, tuple[int, int]] = {}
        for route in self.routes:
            if route.network.version == remote.version and remote in route.network:
                rank = (-route.network.prefixlen, route.metric)
                best[route.interface] = min(rank, best.get(route.interface, rank))
        return {
            address: best[address.interface]
            for address in self.addresses
            if address.interface in best and (":" in address.ip) == (remote.version == 6)
        }

    def gateway(self, local: LocalAddress) -> str:
        """The default gateway that packets from there take; "" without one of its family."""
        version = 6 if ":" in local.ip else 4
        routes = [
            route
            for route in self.routes
            if route.gateway
            and route.interface == local.interface
            and (route.network.prefixlen, route.network.version) == (0, version)
            and (":" in route.gateway) == (version == 6)
        ]
        return min(routes, key=lambda route: route.metric).gateway if routes else ""

    def on_link(self, remote_ip: str, interface: str = "") -> bool:
        """Whether an address is reached without a router, by this interface if one is named."""
        remote = _parsed(remote_ip)
        return any(
            not route.gateway
            and route.network.prefixlen  # a default route of a tunnel or modem leads anywhere
            and route.network.version == remote.version
            and remote in route.network
            and interface in ("", route.interface)
            for route in self.routes
        )

    def ranks(self) -> dict[LocalAddress, int]:
        """The order of the addresses of each family by the widest route of their interface, which
        for most is the default route: 0 is what the kernel prefers. Equal metrics, equal ranks."""
        widest: dict[tuple[str, int], tuple[int, int]] = {}
        for route in self.routes:
            key = (route.interface, route.network.version)
            rank = (route.network.prefixlen, route.metric)
            widest[key] = min(rank, widest.get(key, rank))
        worst = (129, 0)  # of an address without any route
        found: dict[LocalAddress, int] = {}
        for version in (4, 6):
            mine = [a for a in self.addresses if (":" in a.ip) == (version == 6)]
            keys = {a: widest.get((a.interface, version), worst) for a in mine}
            order = sorted(set(keys.values()))
            found |= {a: order.index(key) for a, key in keys.items()}
        return found


@lru_cache(1024)
def _parsed(ip: str) -> IPv4Address | IPv6Address:
    """A peer has few addresses, and each is asked about with every check that is answered."""
    return ip_address(ip)


def canonical_ip(text: str) -> str:
    """The one spelling of an IP literal (RFC 5952 for IPv6). Raises ValueError, also for scopes."""
    if "%" in text:
        raise ValueError(f"{text!r} has a scope; only addresses that need none can be used")
    return str(ip_address(text))


def is_usable_remote(ip: str) -> bool:
    """Whether a peer may be sought at this address at all.

    Refused: loopback, multicast, unspecified, broadcast and "this network" addresses, link-local
    ones (a scope would be needed, and no local address of ours is link-local), and IPv4-mapped
    IPv6, which would be a second name for any of them. Anything that is no IP literal is refused.
    """
    try:
        address = ip_address(ip)
    except ValueError:
        return False
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return False
    if address.is_link_local:
        return False
    if isinstance(address, IPv4Address):
        return address not in _THIS_NETWORK and address != _BROADCAST
    return address.ipv4_mapped is None and address.scope_id is None
