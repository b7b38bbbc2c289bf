"""The world of the demo and of the lab: two hosts, two uplinks each, every uplink behind a NAT.

                      (wires: one userspace link process, 5 ms each way on each wire)

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

    host   lan           public, two each      lan, IPv6 (NAT66: fd00:)   public, IPv6, two each
    A u0   10.1.0.0/24   198.51.100.10   .11   2001:db8:a0::/64           2001:db8:f0::10   ::11
    A u1   10.1.1.0/24   198.51.100.74   .75   2001:db8:a1::/64           2001:db8:f1::10   ::11
    B u0   10.2.0.0/24   203.0.113.10    .11   2001:db8:b0::/64           2001:db8:f2::10   ::11
    B u1   10.2.1.0/24   203.0.113.74    .75   2001:db8:b1::/64           2001:db8:f3::10   ::11

B's NATs forward UDP port 4117 to B, unless `forwards` says otherwise. IPv6 is routed without NAT
unless `nat66` is set. A host's default routes have metric 100 (u0) and 200 (u1). The gateway of a
lan is .1 (::1), the host starts at .2 (::2).

Every event is a method of `World`, returns when it has happened, and gives the monotonic times of
its begin and end. `cli.demo.events` has those that are made of several.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from cli.demo.core import Core
from cli.demo.nat import LAN, WAN, Kind, Nat, NftNat
from cli.demo.nat import Mapping as NatMapping
from cli.demo.netns import Namespace, Namespaces
from cli.demo.scene import Scene

PORT = 4117  # the tunnel's port at both hosts, and the forwarded one of B's NATs
HostName = Literal["A", "B"]
T = TypeVar("T")
_FIRST_HOST, _LAST_HOST = 2, 250  # last number of a host's private address


class Happened(NamedTuple):
    """When an event began and when it was complete, time.monotonic() seconds."""

    begin: float
    end: float


@dataclass
class Uplink:
    """One way of a host into the core, through a router of its own."""

    host: HostName
    index: int
    router: Namespace
    subnets: dict[int, str]  # family -> the lan's network
    gateways: dict[int, str]  # family -> the router's lan address
    publics: dict[int, tuple[str, ...]]  # family -> the router's public addresses
    cores: dict[int, str]  # family -> the core's address on the wire
    nat: Nat = field(init=False)
    number: int = _FIRST_HOST
    metric: int = 0  # of its default route; 0: by its number

    def __post_init__(self) -> None:
        self.metric = self.metric or 100 * (self.index + 1)

    @property
    def name(self) -> str:
        """Name of its wire and router: A0, A1, B0, B1."""
        return f"{self.host}{self.index}"

    @property
    def interface(self) -> str:
        """Interface at the host."""
        return f"u{self.index}"

    def address(self, family: int, number: int | None = None) -> str:
        """The host's private address on this uplink (its current one unless a number is given)."""
        base = ip_network(self.subnets[family]).network_address
        return str(base + (self.number if number is None else number))

    def attach(self, *, addresses: bool = True) -> list[str]:
        """`ip` commands that give the interface its addresses and its default route."""
        lines = []
        for family, subnet in self.subnets.items():
            length = ip_network(subnet).prefixlen
            nodad = " nodad" if family == 6 else ""
            if addresses:
                address = f"{self.address(family)}/{length}"
                lines.append(f"addr replace {address} dev {self.interface}{nodad}")
            lines.append(self.default_route(family))
        return lines

    def default_route(self, family: int) -> str:
        """`ip` command that sets its default route."""
        gateway = self.gateways[family]
        return f"route replace default via {gateway} dev {self.interface} metric {self.metric}"

    def renumber(self, family: int, number: int) -> list[str]:
        """`ip` commands that exchange the address; the routes of the old one go with it, so they
        are restored.
        """
        length = ip_network(self.subnets[family]).prefixlen
        nodad = " nodad" if family == 6 else ""
        old, new = self.address(family), self.address(family, number)
        return [
            f"addr del {old}/{length} dev {self.interface}",
            f"addr add {new}/{length} dev {self.interface}{nodad}",
            self.default_route(family),
        ]


@dataclass
class Host:
    """One end of the tunnel."""

    name: HostName
    space: Namespace
    uplinks: list[Uplink] = field(default_factory=list)


NatFactory = Callable[["World", Uplink], Nat]


class World(Scene):
    """Builds the topology of the module docstring; a context manager that removes it again.

    families: address families outside the tunnel. delay: seconds each way on each wire. nat66:
    translate IPv6 too, at both hosts or at one of them. uplinks: how many uplinks A and B have at
    the start (`add_interface` adds one). kinds: NAT kind by uplink name. forwards: whether the NAT
    forwards the tunnel's port, by uplink name; if not said, B's do and A's do not. nats: a factory
    by uplink name for NATs of another make, called when their router stands without rules.
    source_rules: policy rules by source address, as many multi-homed desktops have them. servers:
    names of public hosts, each on a wire of its own (`World.servers`).
    """

    def __init__(
        self,
        *,
        families: Sequence[int] = (4,),
        delay: float = 0.005,
        uplinks: tuple[int, int] = (2, 2),
        nat66: bool | HostName = False,
        kinds: Mapping[str, Kind] | None = None,
        forwards: Mapping[str, bool] | None = None,
        nats: Mapping[str, NatFactory] | None = None,
        source_rules: bool = False,
        servers: Sequence[str] = (),
        directory: Path | None = None,
    ) -> None:
        super().__init__()
        self.families = tuple(families)
        self.delay = delay
        self.nat66 = nat66
        self.kinds = dict(kinds or {})
        self.forwards = dict(forwards or {})
        self.source_rules = source_rules
        self._nats = dict(nats or {})
        self._counts = uplinks
        self._serving = tuple(servers)
        self._directory = directory

    # ---- building ----

    def _build(self, stack: ExitStack) -> None:
        self.directory = self._directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="martlet-"))
        )
        self.spaces = stack.enter_context(Namespaces())
        self._core = Core(self.spaces, self.families, self.delay)
        self.core, self.wires = self._core.space, self._core.wires
        self.a = Host("A", self.spaces.create("A"))
        self.b = Host("B", self.spaces.create("B"))
        self.hosts: dict[HostName, Host] = {"A": self.a, "B": self.b}
        for host in self.hosts.values():
            for index in (0, 1):
                host.uplinks.append(self._uplink(host, index))
                stack.callback(host.uplinks[-1].nat.close)
        self.servers = {name: self._core.serve(name) for name in self._serving}
        self.link = self._core.start(self.directory)
        stack.callback(self.link.close)
        for host, count in zip(self.hosts.values(), self._counts, strict=True):
            for uplink in host.uplinks[:count]:
                self._plug(host, uplink)

    def _uplink(self, host: Host, index: int) -> Uplink:
        side = "AB".index(host.name)
        letter = host.name.lower()
        inside6 = "fd00" if self.translates(6, host.name) else "2001:db8"
        lan = {4: f"10.{side + 1}.{index}.", 6: f"{inside6}:{letter}{index}::"}
        wan4, low = ("198.51.100.", "203.0.113.")[side], 64 * index
        wan6 = f"2001:db8:f{2 * side + index}::"
        uplink = Uplink(
            host=host.name,
            index=index,
            router=self.spaces.create(f"nat{host.name}{index}"),
            subnets=self._only({4: f"{lan[4]}0/24", 6: f"{lan[6]}/64"}),
            gateways=self._only({4: f"{lan[4]}1", 6: f"{lan[6]}1"}),
            publics=self._only(
                {
                    4: (f"{wan4}{low + 10}", f"{wan4}{low + 11}"),
                    6: (f"{wan6}10", f"{wan6}11"),
                }
            ),
            cores=self._only({4: f"{wan4}{low + 1}", 6: f"{wan6}1"}),
        )
        self._cable(uplink)
        factory = self._nats.get(uplink.name)
        uplink.nat = factory(self, uplink) if factory else self._nft(uplink)
        return uplink

    def _only(self, values: dict[int, T]) -> dict[int, T]:
        return {family: values[family] for family in self.families}

    def _cable(self, uplink: Uplink) -> None:
        """Router, wire and core of an uplink."""
        uplink.router.forward()
        self._core.join(uplink.name, uplink.router, uplink.publics, uplink.cores)
        self.core.batch(
            *(
                f"route add {uplink.subnets[family]} via {publics[0]}"
                for family, publics in uplink.publics.items()
                if not self.translates(family, uplink.host)
            )
        )

    def _nft(self, uplink: Uplink) -> NftNat:
        translated = [f for f in self.families if self.translates(f, uplink.host)]
        return NftNat(
            space=uplink.router,
            port=PORT,
            mappings={
                family: NatMapping(uplink.address(family), uplink.publics[family])
                for family in translated
            },
            kind=self.kinds.get(uplink.name, "port-restricted"),
            forward=self.forwards.get(uplink.name, uplink.host == "B"),
        )

    def _plug(self, host: Host, uplink: Uplink) -> None:
        """Join host and router by a cable and configure both ends."""
        self.spaces.veth(host.space, uplink.interface, uplink.router, LAN)
        uplink.router.batch(*self._lan_addresses(uplink))
        host.space.batch(*uplink.attach(), *self._source_rules(uplink))

    def _source_rules(self, uplink: Uplink) -> list[str]:
        if not self.source_rules:
            return []
        table = 100 + uplink.index
        lines = []
        for family, subnet in uplink.subnets.items():
            route = f"default via {uplink.gateways[family]} dev {uplink.interface} table {table}"
            lines += [
                f"rule add from {subnet} table {table}",
                f"route add {route}",
            ]
        return lines

    @staticmethod
    def _lan_addresses(uplink: Uplink) -> list[str]:
        lines = []
        for family, gateway in uplink.gateways.items():
            length = ip_network(uplink.subnets[family]).prefixlen
            nodad = " nodad" if family == 6 else ""
            lines.append(f"addr replace {gateway}/{length} dev {LAN}{nodad}")
        return lines

    # ---- what a configuration needs ----

    def endpoints(self, host: HostName) -> list[str]:
        """Where the other end can dial this host, best uplink first, as `address:port` literals.

        Only B has any: its NATs forward the port, or its IPv6 addresses are routed.
        """
        found = []
        for uplink in self.hosts[host].uplinks:
            for family in self.families:
                translated = self.translates(family, host)
                if translated and not uplink.nat.forward:
                    continue
                address = uplink.publics[family][0] if translated else uplink.address(family)
                found.append(f"{address}:{PORT}" if family == 4 else f"[{address}]:{PORT}")
        return found

    def uplink(self, host: HostName, index: int = 0) -> Uplink:
        """An uplink by its host and number."""
        return self.hosts[host].uplinks[index]

    def translates(self, family: int, host: HostName) -> bool:
        """Whether a host is behind a NAT in this family."""
        return family == 4 or self.nat66 in (True, host)

    # ---- events ----

    def rebind_nat(
        self, host: HostName, index: int = 0, *, port: bool = True, address: bool = False
    ) -> Happened:
        """The NAT forgets the flow and gives it another external port, public address, or both.

        With a port forward (B) the forward moves along.
        """
        nat = self.uplink(host, index).nat
        begin = time.monotonic()
        nat.rebind(port=port, address=address)
        return Happened(begin, time.monotonic())

    def change_address(self, host: HostName, index: int = 0) -> Happened:
        """Same link, next private address, default route restored; a port forward follows the
        host.
        """
        uplink = self.uplink(host, index)
        number = uplink.number + 1 if uplink.number < _LAST_HOST else _FIRST_HOST
        name = self.hosts[host].space.name
        begin = time.monotonic()
        lines = [line for family in self.families for line in uplink.renumber(family, number)]
        addresses = {family: uplink.address(family, number) for family in self.families}
        batch = "\n".join(lines)
        uplink.nat.move_host(addresses, f"ip -n {name} -batch - <<'MOVE'\n{batch}\nMOVE")
        uplink.number = number
        return Happened(begin, time.monotonic())

    def switch_interface(self, host: HostName, index: int = 0) -> Happened:
        """The interface goes down; the other uplink's default route is already there."""
        begin = time.monotonic()
        self.hosts[host].space.batch(f"link set dev u{index} down")
        return Happened(begin, time.monotonic())

    def restore_interface(self, host: HostName, index: int = 0) -> Happened:
        """The interface comes back with its addresses and routes."""
        uplink = self.uplink(host, index)
        begin = time.monotonic()
        lines = [f"link set dev {uplink.interface} up", *uplink.attach()]
        if self.source_rules:
            table = 100 + index
            lines += [
                f"route replace default via {gateway} dev {uplink.interface} table {table}"
                for family, gateway in uplink.gateways.items()
            ]
        self.hosts[host].space.batch(*lines)
        return Happened(begin, time.monotonic())

    def add_interface(self, host: HostName, index: int = 1) -> Happened:
        """A new interface appears at a host that was built with fewer uplinks."""
        begin = time.monotonic()
        self._plug(self.hosts[host], self.uplink(host, index))
        return Happened(begin, time.monotonic())

    def uplink_down(self, host: HostName, index: int = 0) -> Happened:
        """The host's router loses power: its cable loses carrier, nothing passes in either
        direction.
        """
        begin = time.monotonic()
        self.uplink(host, index).router.batch(
            f"link set dev {LAN} down", f"link set dev {WAN} down"
        )
        return Happened(begin, time.monotonic())

    def uplink_up(self, host: HostName, index: int = 0) -> Happened:
        """The router is back, with what it knew."""
        uplink = self.uplink(host, index)
        begin = time.monotonic()
        lines = [f"link set dev {WAN} up"]
        lines += self._core.outside(uplink.name, uplink.publics, uplink.cores)
        lines += [*self._lan_addresses(uplink), f"link set dev {LAN} up"]
        if 6 in self.families:  # IPv6 addresses do not survive a link that goes down
            lines += self._lan_addresses(uplink)
        uplink.router.batch(*lines)
        return Happened(begin, time.monotonic())

    def blackhole(self, host: HostName, index: int = 0, *, way: str | None = None) -> Happened:
        """The wire drops everything and tells nobody; `way` is "up" (from the host), "down" or
        both.
        """
        begin = time.monotonic()
        self.link.set(f"{host}{index}", way, blackhole=True)
        return Happened(begin, time.monotonic())

    def heal(self, host: HostName, index: int = 0) -> Happened:
        """End a black hole."""
        begin = time.monotonic()
        self.link.set(f"{host}{index}", blackhole=False)
        return Happened(begin, time.monotonic())
