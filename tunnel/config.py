"""A tunnel's configuration: TOML in, frozen and validated values out.

Reading has two steps. msgspec checks the shape (tables, keys, types) of the raw file; then each
value is parsed and checked, alone and against the others. Whatever is wrong comes out as one
`ConfigError` that names the file, the line, the key and what to write instead. Only the first
fault is reported. Files named in the configuration are not opened here.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from tunnel.config_shape import (
    DEFAULT_MTU,
    RawFile,
    RawIce,
    RawInterface,
    RawPaths,
    RawPeer,
    RawRendezvous,
    RawTurn,
    example,
    explain,
)
from tunnel.config_values import (
    Endpoint,
    IPInterface,
    IPNetwork,
    check_interface_name,
    check_interface_pattern,
    check_mqtt_url,
    check_peer_name,
    check_turn_url,
    parse_advertised,
    parse_interface_address,
    parse_network,
    parse_peer_endpoint,
)
from tunnel.errors import ConfigError
from tunnel.identity import PublicKey
from tunnel.toml_lines import KeyPath, find_line

__all__ = [
    "CONFIG_DIRECTORY",
    "DEFAULT_MTU",
    "Config",
    "Endpoint",
    "IPInterface",
    "IPNetwork",
    "IceConfig",
    "InterfaceConfig",
    "PathsConfig",
    "PeerConfig",
    "Redundancy",
    "RendezvousConfig",
    "TurnConfig",
    "called",
    "check_own_key",
    "load",
    "loads",
    "read",
    "resolve_config_path",
]

CONFIG_DIRECTORY = Path("/etc/martlet")

STUN_PORT = 3478  # RFC 8489 section 18.6
MINIMUM_MTU_IPV4 = 576  # RFC 791 section 3.2: what every host accepts
MINIMUM_MTU_IPV6 = 1280  # RFC 8200 section 5: Linux takes IPv6 off an interface below this

Redundancy: TypeAlias = Literal["off", "interactive", "all"]


class InterfaceConfig(Struct, frozen=True, kw_only=True):
    """[interface]: the TUN device and this host."""

    name: str
    address: tuple[IPInterface, ...]
    private_key: Path
    """Absolute, or relative to the working directory if the configuration's path was."""
    mtu: int = DEFAULT_MTU
    listen_port: int | None = None
    """None: an ephemeral port."""


class PeerConfig(Struct, frozen=True, kw_only=True):
    """[[peer]]: a remote host."""

    name: str
    public_key: PublicKey
    allowed_ips: tuple[IPNetwork, ...]
    endpoint: tuple[Endpoint, ...] = ()
    bench: bool = True
    """Whether this peer may have a load served by us (`martlet bench` there)."""


class RendezvousConfig(Struct, frozen=True, kw_only=True):
    """[rendezvous]: brokers, of which the first that answers serves."""

    url: tuple[str, ...]
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    """Who vouches for the broker's certificate (PEM); None: whom the system trusts."""


class TurnConfig(Struct, frozen=True, kw_only=True):
    """One of [ice] turn."""

    url: str
    username: str | None = None
    password_file: Path | None = None


class IceConfig(Struct, frozen=True, kw_only=True):
    """[ice]"""

    stun: tuple[Endpoint, ...] = ()
    advertise: tuple[Endpoint, ...] = ()
    turn: tuple[TurnConfig, ...] = ()
    port_mapping: bool = True
    """Whether home routers are asked for a port (PCP, NAT-PMP, UPnP)."""
    exclude_interfaces: tuple[str, ...] = ()
    """Patterns as of `fnmatch`."""


class PathsConfig(Struct, frozen=True, kw_only=True):
    """[paths]"""

    redundancy: Redundancy = "interactive"
    metered: tuple[str, ...] = ()
    """Patterns as of `fnmatch`."""


class Config(Struct, frozen=True, kw_only=True):
    """A whole, valid configuration."""

    interface: InterfaceConfig
    peers: tuple[PeerConfig, ...]
    rendezvous: RendezvousConfig | None = None
    ice: IceConfig = IceConfig()
    paths: PathsConfig = PathsConfig()
    file: Path | None = None

    @property
    def stun_servers(self) -> tuple[Endpoint, ...]:
        """Those of [ice], or the hosts of the rendezvous, where `martlet rendezvous` runs one."""
        if self.ice.stun or self.rendezvous is None:
            return self.ice.stun
        hosts = [urlsplit(url).hostname for url in self.rendezvous.url]
        return tuple(dict.fromkeys(Endpoint(host, STUN_PORT) for host in hosts if host))


def resolve_config_path(name_or_path: str) -> Path:
    """The file that `up` is given: "NAME" is /etc/martlet/NAME.toml, "x.toml" and "a/b" paths."""
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        return Path(name_or_path)
    return CONFIG_DIRECTORY / f"{name_or_path}.toml"


def called(path: Path) -> str:
    """The other way round: what a user gives `up` for this file, NAME if that is enough."""
    if path.parent == CONFIG_DIRECTORY and path.suffix == ".toml":
        return path.stem
    return str(path) if "/" in str(path) or path.suffix == ".toml" else f"./{path}"


def load(path: str | Path, *, known_as: Path | None = None) -> Config:
    """Read and validate a configuration file. Raises ConfigError.

    `known_as`: the path that relative ones inside start from, where it is another.
    """
    return loads(read(path), known_as or path)


def read(path: str | Path) -> str:
    """The text of a configuration file. Raises ConfigError."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            "there is no such configuration file",
            file=path,
            remedy=f"give a path, or the NAME of a file {CONFIG_DIRECTORY}/NAME.toml",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration: {error.strerror}",
            file=path,
            remedy=f"check with `ls -l {path}` that it is a file and who may read it",
        ) from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "this is not UTF-8 text",
            file=path,
            line=data.count(b"\n", 0, error.start) + 1,
            remedy="save it as UTF-8",
        ) from None
    return text


def loads(text: str, file: str | Path, *, alone: bool = False) -> Config:
    """Validate configuration text; `file` names it in errors, and relative paths start from it.

    `alone`: it need not have a peer yet.
    """
    return _Reader(text, Path(file)).read(alone=alone)


def check_own_key(config: Config, public_key: PublicKey) -> None:
    """Raise ConfigError if a peer has this host's own key."""
    for index, peer in enumerate(config.peers):
        if peer.public_key == public_key:
            path: KeyPath = ("peer", index, "public_key")
            try:
                text = config.file.read_text() if config.file else ""
            except (OSError, UnicodeDecodeError):
                text = ""  # the line number is a courtesy
            raise ConfigError(
                f"the key of peer {peer.name} is this host's own",
                file=config.file,
                line=find_line(text, path),
                key=_dotted(path),
                remedy="write the other host's: `martlet pubkey PATH` prints it there",
            )


_T = TypeVar("_T")


class _Reader:
    """One reading of one file: knows the text, and so the place of an error."""

    def __init__(self, text: str, file: Path) -> None:
        self._text = text
        self._file = file

    def read(self, *, alone: bool) -> Config:
        raw = self._shape()
        interface = self._interface(raw.interface)
        if not raw.peer and not alone:
            raise self._error(
                (), "there is no peer", "add a [[peer]] section with name, public_key, allowed_ips"
            )
        peers: list[PeerConfig] = []
        for index, peer in enumerate(raw.peer):
            peers.append(self._peer(("peer", index), peer, peers))
        self._check_networks(interface, peers)
        self._check_endpoints(peers)
        return Config(
            interface=interface,
            peers=tuple(peers),
            rendezvous=self._rendezvous(raw.rendezvous),
            ice=self._ice(raw.ice),
            paths=self._paths(raw.paths),
            file=self._file,
        )

    # Shape

    def _shape(self) -> RawFile:
        try:
            return msgspec.convert(tomllib.loads(self._text), RawFile)
        except msgspec.ValidationError as error:
            raise self._error(*explain(str(error))) from None
        except RecursionError:
            raise ConfigError("brackets are nested too deeply", file=self._file) from None
        except ValueError as error:  # TOMLDecodeError, or int() on thousands of digits
            found = re.search(r"\(at line (\d+)", str(error))
            line = int(found[1]) if found else self._text.count("\n") + 1
            problem = re.sub(r" \(at .*\)$", "", str(error))
            remedy = "mend the TOML; strings need quotes, lists brackets"
            raise ConfigError(problem, file=self._file, line=line, remedy=remedy) from None

    def _error(self, path: KeyPath, problem: str, remedy: str, value: str = "") -> ConfigError:
        return ConfigError(
            problem,
            file=self._file,
            line=find_line(self._text, path, value or None) if path else None,
            key=_dotted(path),
            remedy=remedy,
        )

    # Values

    def _parse(self, path: KeyPath, value: str, parser: Callable[[str], _T]) -> _T:
        """Apply a parser that raises ValueError("problem; remedy")."""
        try:
            return parser(value)
        except ValueError as error:
            problem, _, remedy = str(error).partition("; ")
            if not remedy:
                remedy = f"write for example `{example(path)}`"
            # Not all of a long one: it may be a private key, pasted to the wrong place.
            shown = value if len(value) <= 64 else value[:48] + "..."
            raise self._error(path, f"{shown!r}: {problem}", remedy, value) from None

    def _parse_list(
        self, path: KeyPath, values: list[str], parser: Callable[[str], _T]
    ) -> tuple[_T, ...]:
        parsed: list[_T] = []
        for index, value in enumerate(values):
            item = self._parse((*path, index), value, parser)
            if item in parsed:
                raise self._error((*path, index), f"{value} is listed twice", "remove one", value)
            parsed.append(item)
        return tuple(parsed)

    def _interface(self, raw: RawInterface) -> InterfaceConfig:
        self._parse(("interface", "name"), raw.name, check_interface_name)
        path: KeyPath = ("interface", "address")
        address = self._parse_list(path, raw.address, parse_interface_address)
        if not address:
            raise self._error(path, "the list is empty", f"write for example `{example(path)}`")
        has_ipv6 = any(a.version == 6 for a in address)
        self._check_range(
            ("interface", "mtu"), raw.mtu, MINIMUM_MTU_IPV6 if has_ipv6 else MINIMUM_MTU_IPV4
        )
        self._check_range(("interface", "listen_port"), raw.listen_port, 0)
        return InterfaceConfig(
            name=raw.name,
            address=address,
            private_key=self._parse(("interface", "private_key"), raw.private_key, self._path),
            mtu=raw.mtu,
            listen_port=raw.listen_port or None,
        )

    def _check_range(self, path: KeyPath, value: int, minimum: int) -> None:
        if not minimum <= value <= 65535:
            why = "; IPv6 needs 1280" if minimum == MINIMUM_MTU_IPV6 else ""
            raise self._error(
                path, f"{value} is out of range{why}", f"write a number from {minimum} to 65535"
            )

    def _path(self, value: str) -> Path:
        if not value or "\0" in value:
            raise ValueError("this is not a path")
        try:
            return self._file.parent / Path(value).expanduser()
        except RuntimeError:
            raise ValueError("there is no such home directory") from None

    def _peer(self, path: KeyPath, raw: RawPeer, others: Iterable[PeerConfig]) -> PeerConfig:
        self._parse((*path, "name"), raw.name, check_peer_name)
        public_key = self._parse((*path, "public_key"), raw.public_key, PublicKey.parse)
        for other in others:
            if other.name == raw.name:
                raise self._error(
                    (*path, "name"), f"there are two peers {raw.name}", "give each its own name"
                )
            if other.public_key == public_key:
                raise self._error(
                    (*path, "public_key"),
                    f"this is also the key of peer {other.name}",
                    "give each peer its own key, or make them one peer",
                )
        networks = self._parse_list((*path, "allowed_ips"), raw.allowed_ips, parse_network)
        if not networks:
            raise self._error(
                (*path, "allowed_ips"),
                "the list is empty, so nothing could be sent to this peer",
                'write the addresses behind it, such as `allowed_ips = ["10.88.0.2/32"]`',
            )
        endpoint: tuple[Endpoint, ...]
        if isinstance(raw.endpoint, str):
            # An endpoint that is one string has no index in its key path.
            endpoint = (self._parse((*path, "endpoint"), raw.endpoint, parse_peer_endpoint),)
        else:
            endpoint = self._parse_list((*path, "endpoint"), raw.endpoint, parse_peer_endpoint)
        return PeerConfig(
            name=raw.name,
            public_key=public_key,
            allowed_ips=networks,
            endpoint=endpoint,
            bench=raw.bench,
        )

    def _rendezvous(self, raw: RawRendezvous | None) -> RendezvousConfig | None:
        if raw is None:
            return None
        path: KeyPath = ("rendezvous", "url")
        url: tuple[str, ...]
        if isinstance(raw.url, str):
            url = (self._parse(path, raw.url, check_mqtt_url),)
        else:
            url = self._parse_list(path, raw.url, check_mqtt_url)
        if not url:
            raise self._error(path, "the list is empty", f"write for example `{example(path)}`")
        password_file = self._password_file(("rendezvous",), raw.username, raw.password_file)
        ca_file = None
        if raw.ca_file is not None:
            ca_file = self._parse(("rendezvous", "ca_file"), raw.ca_file, self._path)
        return RendezvousConfig(
            url=url, username=raw.username, password_file=password_file, ca_file=ca_file
        )

    def _password_file(
        self, path: KeyPath, username: str | None, password_file: str | None
    ) -> Path | None:
        if (username is None) != (password_file is None):
            raise self._error(
                path, "username and password_file go together", "write both, or neither"
            )
        if password_file is None:
            return None
        return self._parse((*path, "password_file"), password_file, self._path)

    def _ice(self, raw: RawIce) -> IceConfig:
        return IceConfig(
            stun=self._parse_list(("ice", "stun"), raw.stun, Endpoint.parse),
            advertise=self._parse_list(("ice", "advertise"), raw.advertise, parse_advertised),
            turn=tuple(self._turn(("ice", "turn", i), turn) for i, turn in enumerate(raw.turn)),
            port_mapping=raw.port_mapping,
            exclude_interfaces=self._parse_list(
                ("ice", "exclude_interfaces"), raw.exclude_interfaces, check_interface_pattern
            ),
        )

    def _turn(self, path: KeyPath, raw: RawTurn) -> TurnConfig:
        url = self._parse((*path, "url"), raw.url, check_turn_url)
        password_file = self._password_file(path, raw.username, raw.password_file)
        return TurnConfig(url=url, username=raw.username, password_file=password_file)

    def _paths(self, raw: RawPaths) -> PathsConfig:
        if raw.redundancy not in ("off", "interactive", "all"):
            raise self._error(
                ("paths", "redundancy"),
                f"{raw.redundancy!r} is not known",
                'write "off", "interactive" or "all"',
            )
        return PathsConfig(
            redundancy=cast(Redundancy, raw.redundancy),
            metered=self._parse_list(("paths", "metered"), raw.metered, check_interface_pattern),
        )

    # Values against each other

    def _check_networks(self, interface: InterfaceConfig, peers: list[PeerConfig]) -> None:
        owners: dict[IPNetwork, str] = {}
        own = {address.ip for address in interface.address}
        for path, peer, network in _networks(peers):
            owner = owners.setdefault(network, peer.name)
            if owner != peer.name:
                raise self._error(
                    path,
                    f"{network} belongs to peer {owner} already",
                    "give it to one of them; a more specific network inside it is fine",
                    str(network),
                )
            if network.num_addresses == 1 and network.network_address in own:
                raise self._error(
                    path,
                    f"{network.network_address} is this host's own address",
                    "write the peer's",
                    str(network.network_address),
                )
        # Halves of the Internet make a default route as well (a custom of other VPNs).
        v4 = [network for network in owners if isinstance(network, IPv4Network)]
        v6 = [network for network in owners if isinstance(network, IPv6Network)]
        for merged in (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)):
            if str(merged) in ("0.0.0.0/0", "::/0"):
                same_family = (
                    found for found in _networks(peers) if isinstance(merged, type(found[2]))
                )
                path, _, network = min(same_family, key=lambda found: found[2].prefixlen)
                raise self._default_route(path, network)

    def _default_route(self, path: KeyPath, network: IPNetwork) -> ConfigError:
        return self._error(
            path,
            f"{network} makes a default route through the tunnel; it would also take the way to "
            "the peer itself, and exit nodes do not exist yet",
            "list the networks behind the peer instead",
            str(network),
        )

    def _check_endpoints(self, peers: list[PeerConfig]) -> None:
        for index, peer in enumerate(peers):
            for endpoint in peer.endpoint:
                ip = endpoint.ip
                for _, owner, network in _networks(peers):
                    if ip is not None and ip in network:
                        raise self._error(
                            ("peer", index, "endpoint"),
                            f"{endpoint} is inside {network}, allowed_ips of {owner.name}, so the "
                            "tunnel would be routed into itself",
                            "write the peer's address outside the tunnel, or narrow allowed_ips",
                            str(endpoint),
                        )


def _networks(peers: Iterable[PeerConfig]) -> Iterator[tuple[KeyPath, PeerConfig, IPNetwork]]:
    for index, peer in enumerate(peers):
        for number, network in enumerate(peer.allowed_ips):
            yield ("peer", index, "allowed_ips", number), peer, network


def _dotted(path: KeyPath) -> str:
    """("peer", 1, "name") as `peer[1].name`; a key that is no plain word is quoted."""
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part if part.isidentifier() else repr(part)}"
        for part in path
    ]
    return "".join(parts).removeprefix(".")
