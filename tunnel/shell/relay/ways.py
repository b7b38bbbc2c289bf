"""Where on this host relays are asked for, and the ways to the servers from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tunnel.config import Endpoint, TurnConfig
from tunnel.config_values import parse_turn_url
from tunnel.path.network import Address, LocalNetwork
from tunnel.shell.secret import read_password

INTERFACES = 2
ADDRESSES = 2  # of one server that are tried


@dataclass(frozen=True, slots=True)
class Server:
    """One of the configuration."""

    url: str
    endpoint: Endpoint
    transports: tuple[str, ...]
    config: TurnConfig

    @classmethod
    def of(cls, config: TurnConfig) -> Server:
        endpoint, transports = parse_turn_url(config.url)
        return cls(config.url, endpoint, transports, config)

    def password(self) -> str:
        """Read anew each time, so that it can be changed while the tunnel is up. Raises ConfigError
        and ValueError."""
        file = self.config.password_file
        return "" if file is None else read_password(file).decode()


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this host a relay is asked for, and of which family."""

    ip: str
    interface: str
    ipv6: bool


@dataclass(frozen=True, slots=True)
class Way:
    """To a server, from a place."""

    server: Server
    transport: str
    address: Address


def places(network: LocalNetwork, servers: Iterable[Address]) -> list[Place]:
    """Where relays are to be asked for at servers with these addresses; see the module."""
    servers = list(servers)
    found: dict[bool, list[Place]] = {}
    for ipv6 in (False, True):
        best: dict[str, str] = {}
        for server in servers:
            if server.is_ipv6 == ipv6:
                for source in network.sources(server.host):
                    best.setdefault(source.interface, source.ip)
        found[ipv6] = [Place(ip, each, ipv6) for each, ip in list(best.items())[:INTERFACES]]
    both = [*found[False], *found[True]]
    for ipv6 in (False, True):
        if not found[ipv6]:
            both += [Place(place.ip, place.interface, ipv6) for place in found[not ipv6][:1]]
    return both


def ways(
    network: LocalNetwork,
    place: Place,
    servers: Sequence[Server],
    resolved: Mapping[Server, Sequence[Address]],
) -> list[Way]:
    """All from one place, in the order of trial."""
    found: list[Way] = []
    for server in servers:
        near = [
            address
            for address in resolved.get(server, ())
            if any(source.ip == place.ip for source in network.sources(address.host))
        ]
        found += [
            Way(server, transport, address)
            for transport in server.transports
            for address in near[:ADDRESSES]
        ]
    return found
