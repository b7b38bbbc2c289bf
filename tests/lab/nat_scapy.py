"""A NAT whose every decision is ours, for what the kernel cannot do on command.

The tables and the sockets are those of `bench.natbox`; here is what happens to packets on their
way. scapy forges. Only UDP passes; IPv4 and IPv6 are translated alike. Run as
`python -m tests.lab.nat_scapy` by `ScapyNat`. `forward` is a port forward: a mapping that is there
from the start and for everybody.

Commands, one JSON object each (`cli.demo.control`); every answer has counters and mappings:

    rebind      port, address (booleans); count times in all, `every` so many seconds; or once,
                after so many more packets of the host (1: the next one leaves rebound)
    drop        n of the next packets; way: "out" or "in"
    duplicate   n of the next packets, way
    reorder     n: the next packet is held until n more have passed, way
    delay       seconds for every packet, way
    replay      a packet that passed `age` packets ago, way; source: [address, port] it claims
    forge       payload (hex), source and target: [address, port]
    forwarder   RFC 9000 section 9.3.3: copies of the host's packets leave at once from `address`,
                the originals `lag` seconds later; what is sent to that address reaches the host.
                address null ends it
    host        addresses: the host's new private addresses by family
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import signal
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from bench.natbox import Wires, endpoints, newest, readdress
from bench.nattable import Behaviour, Endpoint, NatTable, family_of
from cli.demo.control import ControlClient, ControlServer
from cli.demo.core import PYTHON_ENV
from cli.demo.world import PORT, Uplink, World

Way = Literal["out", "in"]
_HISTORY = 4096  # packets a replay can go back


@dataclass
class Pending:
    """Injections waiting for the packets of one way."""

    drop: int = 0
    duplicate: int = 0
    reorder: int = 0
    held: bytes | None = None
    delay: float = 0.0
    history: deque[bytes] = field(default_factory=lambda: deque(maxlen=_HISTORY))


class ScapyRouter:
    """The NAT process: two packet sockets, the table, and the injections."""

    def __init__(self, table: NatTable, hosts: dict[int, str]) -> None:
        self.table = table
        self.wires = Wires(hosts)
        self.pending: dict[str, Pending] = {"out": Pending(), "in": Pending()}
        self.counters = {"out": 0, "in": 0, "filtered": 0, "rebound": 0}
        self._hosts = set(hosts.values())
        self._timers: list[tuple[float, int, bytes | tuple[bool, bool], str]] = []
        self._count = 0
        self._rebind_after: tuple[int, bool, bool] | None = None
        self._forwarder: tuple[str, float] | None = None
        self._forwarded: dict[Endpoint, Endpoint] = {}  # (its address, port) -> the host

    def receive(self, fd: int) -> None:
        """Translate what waits on a packet socket."""
        for way, packet in self.wires.receive(fd):
            ends = endpoints(packet)
            if ends is not None:
                (self._out if way == "out" else self._in)(packet, *ends)

    def _out(self, packet: bytes, inside: Endpoint, remote: Endpoint) -> None:
        if self._rebind_after is not None:
            left, *what = self._rebind_after
            self._rebind_after = (left - 1, what[0], what[1]) if left > 1 else None
            if left <= 1:
                self._rebind(*what)
        if inside[0] not in self._hosts:
            return  # an address that the host no longer has, or never had
        outside = self.table.outgoing(inside, remote, 0.0)
        assert outside is not None
        translated = readdress(packet, source=outside)
        if self._forwarder is None:
            self._pass("out", translated)
            return
        address, lag = self._forwarder
        self._forwarded[address, outside[1]] = inside
        self.wires.send(readdress(packet, source=(address, outside[1])))
        self._at(time.monotonic() + lag, translated, "out")

    def _in(self, packet: bytes, remote: Endpoint, target: Endpoint) -> None:
        inside = self._forwarded.get(target) or self.table.incoming(target, remote, 0.0)
        if inside is None:
            self.counters["filtered"] += 1
        else:
            self._pass("in", readdress(packet, target=inside))

    def _pass(self, way: Way, packet: bytes) -> None:
        pending = self.pending[way]
        if pending.drop:
            pending.drop -= 1
            return
        if pending.reorder and pending.held is None:
            pending.held = packet
            return
        copies = 1
        if pending.duplicate:
            pending.duplicate -= 1
            copies = 2
        for _ in range(copies):
            if pending.delay:
                self._at(time.monotonic() + pending.delay, packet, way)
            else:
                self._emit(way, packet)
        if pending.held is not None:
            pending.reorder -= 1
            if not pending.reorder:
                held, pending.held = pending.held, None
                self._emit(way, held)

    def _emit(self, way: str, packet: bytes) -> None:
        self.counters[way] += 1
        self.pending[way].history.append(packet)
        self.wires.send(packet)

    def _at(self, when: float, what: bytes | tuple[bool, bool], way: str) -> None:
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, what, way))

    def run_timers(self) -> float | None:
        """Do what is due; returns seconds until the next is, None when there is none."""
        while self._timers:
            wait = self._timers[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, _, what, way = heapq.heappop(self._timers)
            if isinstance(what, bytes):
                self._emit(way, what)
            else:
                self._rebind(*what)
        return None

    def _rebind(self, port: bool, address: bool) -> None:
        self.counters["rebound"] += 1
        self.table.rebind(port=port, address=address)

    def control(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the module docstring."""
        verb = request.pop("do", "show")
        answer = getattr(self, f"_do_{verb}")(**request) or {}
        mappings = [[binding.inside, binding.outside] for binding in self.table.bindings()]
        return {**answer, "counters": self.counters, "mappings": mappings}

    def _do_show(self) -> None:
        pass

    def _do_rebind(
        self,
        port: bool = True,
        address: bool = False,
        after: int = 0,
        count: int = 1,
        every: float = 0.0,
    ) -> None:
        if after:
            self._rebind_after = (after, port, address)
            return
        self._rebind(port, address)
        for place in range(1, count):
            self._at(time.monotonic() + place * every, (port, address), "out")

    def _do_drop(self, n: int, way: Way) -> None:
        self.pending[way].drop = n

    def _do_duplicate(self, n: int, way: Way) -> None:
        self.pending[way].duplicate = n

    def _do_reorder(self, n: int, way: Way) -> None:
        self.pending[way].reorder = n

    def _do_delay(self, seconds: float, way: Way) -> None:
        self.pending[way].delay = seconds

    def _do_replay(self, way: Way, age: int = 1, source: list[Any] | None = None) -> dict[str, Any]:
        history = self.pending[way].history
        packet = history[-min(age, len(history))]
        if source is not None:
            packet = readdress(packet, source=(source[0], source[1]))
        self.wires.send(packet)
        return {"replayed": len(packet)}

    def _do_forge(self, payload: str, source: list[Any], target: list[Any]) -> None:
        layer = IPv6 if ":" in target[0] else IP
        packet = layer(src=source[0], dst=target[0])
        packet /= UDP(sport=source[1], dport=target[1]) / Raw(bytes.fromhex(payload))
        self.wires.send(bytes(packet))

    def _do_forwarder(self, address: str | None, lag: float = 0.005) -> None:
        self._forwarder = (address, lag) if address else None
        if address is None:
            self._forwarded.clear()

    def _do_host(self, addresses: dict[str, str]) -> None:
        self._hosts = set(addresses.values())
        families = {family_of(inside[0]): port for inside, port in self.table.forwards.items()}
        self.table.move({(addresses[str(f)], PORT): port for f, port in families.items()})


@dataclass
class ScapyNat:
    """The owner's handle; implements `cli.demo.nat.Nat` for an uplink of a world."""

    world: World
    uplink: Uplink
    mapping: Behaviour = "endpoint"
    filtering: Behaviour = "port"
    forward: bool = field(init=False)

    def __post_init__(self) -> None:
        self.forward = self.uplink.host == "B"
        router = self.uplink.router
        # The kernel keeps answering ARP and neighbour discovery; it must neither forward nor
        # refuse with ICMP.
        router.sysctl("net.ipv4.ip_forward=0")
        if 6 in self.world.families:
            router.sysctl("net.ipv6.conf.all.forwarding=0")
        rules = "table inet quiet { chain input { type filter hook input priority 0;"
        router.run(["nft", "-f", "-"], input=f"{rules} meta l4proto udp drop; }}\n}}\n")
        path = self.world.directory / f"nat-{self.uplink.name}.sock"
        host = [self.uplink.address(family) for family in self.world.families]
        publics = [",".join(self.uplink.publics[family]) for family in self.world.families]
        argv = [sys.executable, "-m", "tests.lab.nat_scapy", "--control", str(path)]
        argv += ["--host", *host, "--public", *publics]
        argv += ["--mapping", self.mapping, "--filtering", self.filtering]
        argv += ["--forward"] if self.forward else []
        argv += ["--seed", str(zlib.crc32(self.uplink.name.encode()))]
        log = self.world.directory / f"nat-{self.uplink.name}.log"
        router.popen(argv, env=PYTHON_ENV, log=log)
        self._client = ControlClient(path)

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command of the module docstring."""
        return self._client.call(do=do, **arguments)

    def rebind(self, *, port: bool = True, address: bool = False) -> None:
        """Change the mapping of the host's flows."""
        self.call("rebind", port=port, address=address)

    def move_host(self, addresses: dict[int, str], script: str) -> None:
        """Run the script that moves the host, and learn its new addresses."""
        self.uplink.router.run(["sh", "-c", script])
        self.call("host", addresses={str(family): ip for family, ip in addresses.items()})

    def public(self, family: int) -> Endpoint:
        """Address and port that the other end sees: the newest mapping of the tunnel's port."""
        return newest(self.call("show")["mappings"], family)

    def close(self) -> None:
        """Close the handle; the process ends with its namespace."""
        self._client.close()


def main() -> None:
    """Run the NAT until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.nat_scapy")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--host", nargs="+", required=True)
    parser.add_argument("--public", nargs="+", required=True, help="addresses, by comma, as --host")
    parser.add_argument("--mapping", choices=get_args(Behaviour), default="endpoint")
    parser.add_argument("--filtering", choices=get_args(Behaviour), default="port")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    hosts = {family_of(address): address for address in options.host}
    publics = dict(zip(hosts, (tuple(p.split(",")) for p in options.public), strict=True))
    table = NatTable(
        publics,
        random.Random(options.seed),
        mapping=options.mapping,
        filtering=options.filtering,
        forwards={(host, PORT): PORT for host in hosts.values()} if options.forward else None,
    )
    router = ScapyRouter(table, hosts)
    server = ControlServer(options.control, router.control)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wait: float | None = None
    while True:
        readable, _, _ = select.select([*router.wires.filenos(), *server.filenos()], [], [], wait)
        for fd in readable:
            if not server.ready(fd):
                router.receive(fd)
        wait = router.run_timers()


if __name__ == "__main__":
    main()
