"""The middle of a lab: everything public is joined to it by a wire of its own.

    router or server --veth-- [ wires: one userspace link process ] --veth-- [ core ]

Each wire has a subnet of its own for each family (/26 and /64), in which the core is .1 (::1).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.demo.link import LinkControl
from cli.demo.nat import WAN
from cli.demo.netns import Namespace, Namespaces, command

LENGTHS = {4: 26, 6: 64}  # of the subnets of wires
MAX_SERVERS = 4  # IPv4 has no more subnets for them
# Where the `cli` package lives: `python -m` must find it from any working directory.
IMPORT_ROOT = str(Path(__file__).resolve().parents[2])
PYTHON_ENV = {"PYTHONPATH": IMPORT_ROOT, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Server:
    """A public host; two addresses of each family, the first its own as a source."""

    name: str
    space: Namespace
    addresses: Mapping[int, tuple[str, str]]


class Core:
    """Two namespaces: `space` routes, `wires` has the link process once it is started."""

    def __init__(self, spaces: Namespaces, families: Sequence[int], delay: float) -> None:
        self.space = spaces.create("core")
        self.space.forward()
        self.wires = spaces.create("wires")
        self.families = tuple(families)
        self.delay = delay  # seconds each way on each wire
        self.servers: dict[str, Server] = {}
        self._spaces = spaces
        self._names: list[str] = []

    def join(
        self,
        name: str,
        space: Namespace,
        publics: Mapping[int, Iterable[str]],
        gateways: Mapping[int, str],
    ) -> None:
        """A wire of this name from the interface `WAN` of `space`, which gets its addresses and
        routes; the core's interface has the wire's name in small letters.
        """
        self._names.append(name)
        end = name.lower()
        self._spaces.veth(space, WAN, self.wires, f"{name}l")
        self._spaces.veth(self.wires, f"{name}r", self.space, end)
        if 6 in self.families:
            for port in (f"{name}l", f"{name}r"):
                self.wires.sysctl(f"net.ipv6.conf.{port}.disable_ipv6=1")
        self.space.batch(*self._core_lines(space, end, publics, gateways))
        space.batch(*self.outside(name, publics, gateways))

    def _core_lines(
        self,
        space: Namespace,
        end: str,
        publics: Mapping[int, Iterable[str]],
        gateways: Mapping[int, str],
    ) -> list[str]:
        # An address resolution over the wire would add a round trip of its own to the first
        # packet of a new address.
        neighbour = mac(space, WAN)
        lines = []
        for family, addresses in publics.items():
            lines.append(_address(family, gateways[family], end))
            lines += [
                f"neigh replace {public} lladdr {neighbour} dev {end} nud permanent"
                for public in addresses
            ]
        return lines

    def outside(
        self, name: str, publics: Mapping[int, Iterable[str]], gateways: Mapping[int, str]
    ) -> list[str]:
        """`ip` commands that give the outer end of a wire its addresses and routes."""
        neighbour = mac(self.space, name.lower())
        lines = []
        for family, addresses in publics.items():
            gateway = gateways[family]
            lines += [_address(family, public, WAN) for public in addresses]
            lines.append(f"neigh replace {gateway} lladdr {neighbour} dev {WAN} nud permanent")
            lines.append(f"route replace default via {gateway} dev {WAN}")
        return lines

    @property
    def interfaces(self) -> list[str]:
        """The core's own, one for each wire."""
        return [name.lower() for name in self._names]

    def serve(self, name: str) -> Server:
        """A public server on a wire of its own."""
        number = len(self.servers)
        if number == MAX_SERVERS:
            raise ValueError(f"no more than {MAX_SERVERS} servers")
        low, wide = "192.0.2.{}", f"2001:db8:e{number}::{{}}"
        at = {4: low.format, 6: wide.format}
        base = {4: 64 * number, 6: 0}
        addresses = {f: (at[f](base[f] + 10), at[f](base[f] + 11)) for f in self.families}
        server = Server(name, self._spaces.create(name), addresses)
        self.servers[name] = server
        gateways = {family: at[family](base[family] + 1) for family in self.families}
        self.join(name, server.space, addresses, gateways)
        return server

    def start(self, directory: Path) -> LinkControl:
        """Start the link process of all wires that are joined, and connect to it."""
        path = directory / "link.sock"
        wires = [f"{name}:{name}l:{name}r:{self.delay}" for name in self._names]
        self.wires.popen(
            [sys.executable, "-m", "cli.demo.link", "--control", str(path), *wires],
            env=PYTHON_ENV,
            log=directory / "link.log",
        )
        return LinkControl(path)


def mac(space: Namespace, interface: str) -> str:
    """The hardware address of an interface."""
    output = command(["ip", "-n", space.name, "-br", "link", "show", "dev", interface]).stdout
    return output.split()[2]


def _address(family: int, address: str, interface: str) -> str:
    nodad = " nodad" if family == 6 else ""
    return f"addr replace {address}/{LENGTHS[family]} dev {interface}{nodad}"
