"""Two hosts, each behind what its kind says, and public servers: where a meeting takes place.

    [A] u0 --lan[ home A ]wan-- lan[ carrier A ]wan --A--+------+--broker-- [broker]
                                                         | core |--stun---- [stun], two addresses
    [B] u0 --lan[ home B ]wan------------------------B---+------+--turn---- [turn]

                    (wires A, B, broker, stun, turn: 5 ms each way on each)

    network               IPv4                                  IPv6
    wire of A, of B       198.51.100.0/26, 203.0.113.0/26       2001:db8:fa::/64, 2001:db8:fb::/64
    lan of a carrier      100.64.0.0/24                         -
    lan of a home         192.168.1.0/24, the same at both ends 2001:db8:a::/64, 2001:db8:b::/64
    lan of a public host  198.51.100.128/26, 203.0.113.128/26   the same

In each of them the gateway is number 1, host A 2, host B 3, A's router 10 (and 11, where it may
move to), B's 20 (and 21). Between two hosts, and between a host and a server, a round trip takes
the delays of four wires. Where a pair shares a home or a carrier, B is plugged into A's: no router
is B's own, or only its home.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from bench.nat.kinds import Meeting, Stage
from bench.natbox import BoxNat
from bench.servers import Broker, Certificate, Stun, Turn
from cli.demo.core import Core
from cli.demo.nat import LAN, WAN, Kind, Nat, NftNat
from cli.demo.nat import Mapping as NatMapping
from cli.demo.netns import Namespace, Namespaces
from cli.demo.scene import Scene
from cli.demo.world import PORT, Happened, Host, HostName
from tunnel.path.network import Address

DEVICE = "u0"  # of each host
HOSTS: tuple[HostName, ...] = ("A", "B")
Network = IPv4Network | IPv6Network
_WIRES = {
    4: {"A": "198.51.100.0/26", "B": "203.0.113.0/26"},
    6: {"A": "2001:db8:fa::/64", "B": "2001:db8:fb::/64"},
}
_PUBLIC_LANS = {
    4: {"A": "198.51.100.128/26", "B": "203.0.113.128/26"},
    6: {"A": "2001:db8:a::/64", "B": "2001:db8:b::/64"},
}
_HOME, _CARRIER = "192.168.1.0/24", "100.64.0.0/24"
_GATEWAY = 1
_HOST_NUMBERS: dict[HostName, int] = {"A": 2, "B": 3}
_ROUTER_NUMBERS: dict[HostName, int] = {"A": 10, "B": 20}
_FILTERED_BRIDGES = Path("/proc/sys/net/bridge")
_MOVED = 30  # beside the number a host had before
_NFT_KINDS: dict[tuple[str, str], Kind] = {
    ("endpoint", "endpoint"): "full-cone",
    ("endpoint", "port"): "port-restricted",
    ("port", "port"): "symmetric",
}


@dataclass
class Router:
    """A stage as it was built: its switch is `lan`, `publics` are its addresses outside."""

    space: Namespace
    stage: Stage
    lan: Network
    publics: tuple[str, str]
    nat: Nat | None = None
    ports: int = 0  # of its switch


class Internet(Scene):
    """Builds the topology of the module docstring; a context manager that removes it again.

    delay: seconds each way on each wire. turn: whether there is a TURN server. dialled: A's
    configuration has an endpoint of B, who has to be public. Events return when they have happened,
    as those of `cli.demo.world.World`.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        delay: float = 0.005,
        turn: bool = True,
        dialled: bool = False,
        directory: Path | None = None,
    ) -> None:
        super().__init__()
        self.meeting = meeting
        self.family = meeting.a.family
        self.families: Sequence[int] = (self.family,)
        self.delay = delay
        self._with_turn = turn
        self._dialled = dialled
        self._directory = directory

    # ---- building ----

    def _build(self, stack: ExitStack) -> None:
        self.directory = self._directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="martlet-"))
        )
        self.spaces = stack.enter_context(Namespaces())
        self._core = Core(self.spaces, self.families, self.delay)
        self.core = self._core.space
        self.hosts = {name: Host(name, self.spaces.create(name)) for name in HOSTS}
        self.routers: dict[HostName, list[Router]] = {}
        self._numbers = dict(_HOST_NUMBERS)
        for name in HOSTS:
            self._join(name)
        names = ["broker", "stun", *(["turn"] if self._with_turn else [])]
        servers = {name: self._core.serve(name) for name in names}
        self.link = self._core.start(self.directory)
        stack.callback(self.link.close)
        for name in HOSTS:
            for number, router in enumerate(self.routers[name]):
                if router.nat is None:
                    self._translate(router, f"{name}{number}", self.address(name))
                if router.nat is not None:
                    stack.callback(router.nat.close)
        self._serve({name: (s.space, s.addresses[self.family]) for name, s in servers.items()})

    def _serve(self, places: dict[str, tuple[Namespace, tuple[str, str]]]) -> None:
        family, directory = self.family, self.directory
        self.certificate = Certificate.make(directory, [at[0] for _, at in places.values()])
        space, at = places["broker"]
        self.broker = Broker(space, at[:1], directory, self.certificate)
        space, at = places["stun"]
        self.stun = Stun(space, {family: at}, directory)
        self.turn: Turn | None = None
        if "turn" in places:
            space, at = places["turn"]
            self.turn = Turn(space, at[:1], directory, self.certificate)

    def _join(self, name: HostName) -> None:
        """Build a host's routers, from the outside in, and plug it into the last."""
        shared = self.meeting.shared
        kind = self.meeting.a if name == "A" else self.meeting.b
        routers = self.routers[name] = []
        if name == "B" and shared:
            common = self.routers["A"]
            routers += common if shared == "home" else common[:1]
        for stage in kind.stages[len(routers) :]:
            routers.append(self._add_router(name, stage, inner=stage is kind.stages[-1]))
        gateway = routers[-1]
        self._plug(gateway, self.hosts[name].space, DEVICE, [self.address(name)])

    def _add_router(self, name: HostName, stage: Stage, *, inner: bool) -> Router:
        outer = self.routers[name]
        space = self.spaces.create(f"{'home' if inner else 'carrier'}{name}")
        space.forward()
        behind = outer[-1].lan if outer else ip_network(_WIRES[self.family][name])
        number = _ROUTER_NUMBERS[name]
        publics = (_at(behind, number), _at(behind, number + 1))
        if self.family == 6 or stage.make == "route":
            lan = ip_network(_PUBLIC_LANS[self.family][name])
        else:
            lan = ip_network(_HOME if inner else _CARRIER)
        router = Router(space, stage, lan, publics)
        space.batch(
            f"link add {LAN} type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
            f"link set dev {LAN} up",
            _address(lan, _at(lan, _GATEWAY), LAN),
        )
        if space.call(_FILTERED_BRIDGES.is_dir):
            # Where the kernel has br_netfilter, what the switch carries would meet the rules of
            # the router.
            space.sysctl(
                *(f"net.bridge.bridge-nf-call-{one}=0" for one in ("iptables", "ip6tables"))
            )
        if outer:
            self._plug(outer[-1], space, WAN, publics)
        else:
            gateways = {self.family: _at(behind, _GATEWAY)}
            self._core.join(name, space, {self.family: publics}, gateways)
            if stage.make in ("route", "firewall"):
                self.core.batch(f"route add {lan} via {publics[0]}")
        return router

    def _plug(
        self, router: Router, space: Namespace, interface: str, addresses: Sequence[str]
    ) -> None:
        """A cable from an interface into a router's switch, with addresses and a default route."""
        port = f"{LAN}{router.ports}"
        router.ports += 1
        self.spaces.veth(space, interface, router.space, port)
        router.space.batch(f"link set dev {port} master {LAN}")
        space.batch(
            *(_address(router.lan, address, interface) for address in addresses),
            f"route replace default via {_at(router.lan, _GATEWAY)} dev {interface}",
        )

    def _translate(self, router: Router, name: str, inside: str) -> None:
        """Rules and processes of a stage; `inside` is the host behind it."""
        stage, space = router.stage, router.space
        if stage.make == "nft":
            timeouts = ("", "_stream") if stage.expiry else ()
            space.sysctl(
                *(
                    f"net.netfilter.nf_conntrack_udp_timeout{one}={stage.expiry:.0f}"
                    for one in timeouts
                )
            )
            router.nat = NftNat(
                space=space,
                port=PORT,
                mappings={self.family: NatMapping(inside, router.publics)},
                kind=_NFT_KINDS[stage.mapping, stage.filtering],
            )
        elif stage.make == "box":
            router.nat = BoxNat(
                space,
                {self.family: router.publics},
                self.directory,
                name,
                mapping=stage.mapping,
                filtering=stage.filtering,
                hairpin=stage.hairpin,
                expiry=stage.expiry,
            )
        rules = []
        if stage.tcp_ports is not None:
            rules.append(f'iifname "{LAN}" meta l4proto udp drop')
        if stage.tcp_ports:
            ports = ", ".join(map(str, stage.tcp_ports))
            rules.append(f'iifname "{LAN}" tcp dport != {{ {ports} }} drop')
        if stage.make == "firewall":
            rules += ["ct state established,related accept", f'iifname "{WAN}" drop']
        if rules:
            space.run(["nft", "-f", "-"], input=f"""
                table inet wall {{
                  chain forward {{
                    type filter hook forward priority filter - 1;
                    {"; ".join(rules)}
                  }}
                }}""")  # fmt: skip

    @property
    def wires(self) -> list[str]:
        """The core's interfaces, one for each wire."""
        return self._core.interfaces

    # ---- what a configuration needs ----

    def address(self, name: HostName) -> str:
        """A host's own address."""
        return _at(self.routers[name][-1].lan, self._numbers[name])

    def endpoints(self, host: HostName) -> list[str]:
        """Where the other end can dial this host without having met it."""
        if not self._dialled:
            return []
        return [str(Address(self.address(host), PORT))]

    # ---- events ----

    def change_address(self, name: HostName) -> Happened:
        """Another private address on the same link, and with it another mapping."""
        router = self.routers[name][-1]
        old = self.address(name)
        self._numbers[name] += _MOVED
        new = self.address(name)
        gateway = _at(router.lan, _GATEWAY)
        lines = [
            f"addr del {old}/{router.lan.prefixlen} dev {DEVICE}",
            _address(router.lan, new, DEVICE),
            f"route replace default via {gateway} dev {DEVICE}",
        ]
        batch = "\n".join(lines)
        script = f"ip -n {self.hosts[name].space.name} -batch - <<'MOVE'\n{batch}\nMOVE"
        begin = time.monotonic()
        if router.nat is None:
            router.space.run(["sh", "-c", script])
        else:
            router.nat.move_host({self.family: new}, script)
        return Happened(begin, time.monotonic())


def _at(network: Network, number: int) -> str:
    return str(network.network_address + number)


def _address(network: Network, address: str, interface: str) -> str:
    """`ip` command that gives an interface an address of a network."""
    nodad = " nodad" if network.version == 6 else ""
    return f"addr add {address}/{network.prefixlen} dev {interface}{nodad}"
