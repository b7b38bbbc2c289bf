"""What was gathered, as plain values. `None` stands for what could not be learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tunnel.config import Config, Endpoint, IPNetwork
from tunnel.doctor.finding import Nat
from tunnel.errors import ConfigError
from tunnel.obstacle import Reason
from tunnel.path.network import Address, LocalNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class TunFacts:
    """What came of making a TUN device: `kind` is that of the TunError, "" for success."""

    kind: str = ""
    message: str = ""
    tcp_offload: bool = False
    udp_offload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """This machine, and this process on it."""

    net_admin: bool
    root: bool
    container: bool
    tun: TunFacts
    udp_segment: bool
    udp_gro: bool
    so_mark: bool
    libcrypto: str | None
    """None: the engine cannot be loaded, and `engine_error` says why."""
    engine_error: str = ""
    advice: str | None = None
    """What a newer libcrypto would bring."""
    receive_buffer: int | None
    """Bytes that a socket of the tunnel got, of `wanted_buffer`."""
    wanted_buffer: int
    run_directory: str
    run_directory_error: str = ""
    wall_time: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    name: str
    mtu: int
    up: bool
    carrier: bool
    loopback: bool = False
    martlet: bool = False
    """A tunnel of ours."""
    kind: str = ""
    """As of IFLA_INFO_KIND: bridge, veth, tun, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressFacts:
    ip: str
    interface: str
    why_not: str = ""
    """Why no peer is sought from it; "" when it is usable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """A unicast route of the main table."""

    network: IPNetwork
    interface: str
    gateway: str | None = None
    metric: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallFacts:
    """Chains on the way in that drop what no rule accepts."""

    by: Literal["nft", "iptables"]
    chains: tuple[str, ...] = ()
    """By name, such as "inet filter input"."""
    accepts_port: bool = False
    """Whether some rule accepts the tunnel's port, as far as rules can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    links: tuple[LinkFacts, ...] = ()
    addresses: tuple[AddressFacts, ...] = ()
    routes: tuple[RouteFacts, ...] = ()
    usable: LocalNetwork = field(default_factory=LocalNetwork)
    rp_filter: Mapping[str, int] = field(default_factory=dict)
    """By interface, what is in force: 0 off, 1 strict, 2 loose."""
    ipv6: Literal["on", "off", "absent"] = "on"
    """Of the kernel: switched off by sysctl, or not compiled in."""
    firewall: FirewallFacts | None = None
    port_taken: tuple[str, ...] = ()
    """The addresses on which somebody else has the configured port."""
    error: str = ""
    """Why there is nothing at all here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NameFacts:
    """One host name of the configuration; addresses are ""-less literals."""

    name: str
    used_by: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    seconds: float | None = None
    """None: no answer in time."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StunFacts:
    endpoint: Endpoint
    addresses: tuple[Address, ...]
    """As resolved."""
    implied: bool = False
    """By [rendezvous]: nobody said that there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """A TURN server or a broker; `error` is in the user's words, "" for success."""

    url: str
    transport: str = ""
    """Of a TURN server: "udp", "tcp" or "tls"."""
    seconds: float | None = None
    """Until it let us in."""
    error: str = ""
    reason: Reason = ""
    detail: str = ""
    """What a TURN server gave: a relayed address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMappingFacts:
    """What a gateway speaks; `external` is the address that it says it has."""

    gateway: str
    protocols: tuple[str, ...] = ()
    external: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A secret file: what is wrong with it."""

    path: str
    what: str
    """Such as "private key"."""
    error: str = ""
    mode: int | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelFacts:
    """A running tunnel: the object of `martlet status --json`, or why there is none."""

    name: str
    status: Mapping[str, Any] | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything. Without a configuration, `config` is None and so is its error."""

    version: str
    host: HostFacts
    network: NetworkFacts
    config: Config | None = None
    config_path: str | None = None
    config_error: ConfigError | None = None
    files: tuple[FileFacts, ...] = ()
    names: tuple[NameFacts, ...] = ()
    stun: tuple[StunFacts, ...] = ()
    nats: tuple[Nat, ...] = ()
    turn: tuple[ServerFacts, ...] = ()
    brokers: tuple[ServerFacts, ...] = ()
    port_mapping: tuple[PortMappingFacts, ...] = ()
    tunnels: tuple[TunnelFacts, ...] = ()
