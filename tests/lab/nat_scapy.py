"""A NAT whose every decision is ours, for what the kernel cannot do on command.

    host --lan [ router: the kernel answers ARP and ND, forwards nothing ] wan-- wire -- core
                       |                                 ^
                       +--> packet socket --> NAT --> raw socket (the kernel finds the neighbour)

scapy parses and builds the packets; the later packets of a flow that is already known are patched
as scapy did with its first one (a scapy packet costs half a millisecond). Only UDP passes; IPv4
and IPv6 are translated alike. Run as `python -m tests.lab.nat_scapy` by `ScapyNat`.

Mapping and filtering are each "endpoint" (independent), "address" or "port" (dependent), after
RFC 4787. `forward` is a port forward: a mapping that is there from the start and for everybody.

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
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw, bind_layers, split_layers

from cli.demo.control import ControlClient, ControlServer
from cli.demo.core import PYTHON_ENV
from cli.demo.link import PACKET_IGNORE_OUTGOING, SOL_PACKET
from cli.demo.nat import FIRST_PORT, LAN, WAN
from cli.demo.world import PORT, Uplink, World

if TYPE_CHECKING:
    from scapy.packet import Packet

Behaviour = Literal["endpoint", "address", "port"]
Way = Literal["out", "in"]
Endpoint = tuple[str, int]
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
IPV6_HDRINCL = 36  # linux/in6.h
_HISTORY = 4096  # packets a replay can go back


@dataclass
class Binding:
    """One mapping: who it is for, what the outside sees, and whom the host has written to through
    it.
    """

    inside: Endpoint
    outside: Endpoint
    contacted: set[Endpoint] = field(default_factory=set)
    static: bool = False


@dataclass(frozen=True)
class Patch:
    """What a translation did to the headers of a flow's first packet, to be done to the later ones.

    RFC 1624: the checksum changes by the sum of what changed, so the payload need not be read.
    """

    start: int  # of the addresses and ports, which are one piece without IP options
    headers: bytes
    delta: int

    @classmethod
    def between(cls, before: bytes, after: bytes) -> Patch:
        """The patch that makes `after` of `before`."""
        piece = flow_piece(before)
        delta = _words(after[piece]) + _words(bytes(byte ^ 0xFF for byte in before[piece]))
        return cls(piece.start, after[piece], delta)

    def apply(self, packet: bytes) -> bytes:
        """The translated packet. The kernel makes the IPv4 header's checksum (raw(7))."""
        end = self.start + len(self.headers)
        hops = 8 if self.start == 12 else 7
        total = (int.from_bytes(packet[end + 2 : end + 4], "big") ^ 0xFFFF) + self.delta
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        checksum = (total ^ 0xFFFF) or 0xFFFF  # zero would say that there is none
        return b"".join(
            (
                packet[:hops],
                bytes((packet[hops] - 1,)),
                packet[hops + 1 : self.start],
                self.headers,
                packet[end : end + 2],
                checksum.to_bytes(2, "big"),
                packet[end + 4 :],
            )
        )


def flow_piece(packet: bytes) -> slice:
    """Where the addresses and ports of a UDP packet are."""
    return slice(12, 24) if packet[0] >> 4 == 4 else slice(8, 44)


def _words(data: bytes) -> int:
    return sum(struct.unpack(f">{len(data) // 2}H", data))


@dataclass
class Pending:
    """Injections waiting for the packets of one way."""

    drop: int = 0
    duplicate: int = 0
    reorder: int = 0
    held: bytes | None = None
    delay: float = 0.0
    history: deque[bytes] = field(default_factory=lambda: deque(maxlen=_HISTORY))


class ScapyTable:
    """The mapping table: pure, no sockets, so that it can be tested alone."""

    def __init__(
        self,
        host: dict[int, str],
        publics: dict[int, tuple[str, ...]],
        *,
        mapping: Behaviour = "endpoint",
        filtering: Behaviour = "port",
        forward: bool = False,
    ) -> None:
        self.host = dict(host)
        self.public = {family: addresses[0] for family, addresses in publics.items()}
        self._publics = publics
        self._mapping, self._filtering = mapping, filtering
        self._forward = forward
        self._base = FIRST_PORT
        self._next = self._base + 1
        self.bindings: dict[tuple[object, ...], Binding] = {}
        self._by_outside: dict[Endpoint, Binding] = {}
        self.external = PORT
        self._add_forwards()

    def _add_forwards(self) -> None:
        if not self._forward:
            return
        for family, address in self.host.items():
            inside = (address, PORT)
            self._insert(
                (inside,), Binding(inside, (self.public[family], self.external), static=True)
            )

    def _insert(self, key: tuple[object, ...], binding: Binding) -> Binding:
        self.bindings[key] = binding
        self._by_outside[binding.outside] = binding
        return binding

    def outgoing(self, inside: Endpoint, remote: Endpoint) -> Endpoint:
        """The outside endpoint for a packet of the host; makes a mapping where there is none."""
        static = self.bindings.get((inside,))
        key: tuple[object, ...] = (inside,)
        if static is None or not static.static:
            if self._mapping == "address":
                key = (inside, remote[0])
            elif self._mapping == "port":
                key = (inside, remote)
        binding = self.bindings.get(key)
        if binding is None:
            family = 6 if ":" in inside[0] else 4
            binding = self._insert(key, Binding(inside, (self.public[family], self._next)))
            self._next += 1
        binding.contacted.add(remote)
        return binding.outside

    def incoming(self, outside: Endpoint, remote: Endpoint) -> Endpoint | None:
        """The host's endpoint for a packet from outside; None when it is filtered."""
        binding = self._by_outside.get(outside)
        if binding is None:
            return None
        allowed = (
            binding.static
            or self._filtering == "endpoint"
            or (self._filtering == "port" and remote in binding.contacted)
            or (
                self._filtering == "address"
                and any(remote[0] == contact[0] for contact in binding.contacted)
            )
        )
        return binding.inside if allowed else None

    def rebind(self, *, port: bool, address: bool) -> None:
        """Forget all mappings; later ones get other ports, another address, or both. A forward
        moves along.
        """
        self.bindings.clear()
        self._by_outside.clear()
        if port:
            self._base += 100
            self.external = self._base
        self._next = self._base + 1
        if address:
            for family, choices in self._publics.items():
                place = choices.index(self.public[family]) + 1
                self.public[family] = choices[place % len(choices)]
        self._add_forwards()

    def move(self, host: dict[int, str]) -> None:
        """The host has other private addresses; its forward follows, other mappings are made
        anew.
        """
        self.host = dict(host)
        for key in [key for key, binding in self.bindings.items() if binding.static]:
            del self._by_outside[self.bindings.pop(key).outside]
        self._add_forwards()


class ScapyRouter:
    """The NAT process: two packet sockets, the table, and the injections."""

    def __init__(self, table: ScapyTable, families: Iterable[int]) -> None:
        self.table = table
        self.pending: dict[str, Pending] = {"out": Pending(), "in": Pending()}
        self.counters = {"out": 0, "in": 0, "filtered": 0, "rebound": 0}
        self._sockets: dict[int, tuple[socket.socket, int]] = {}
        self._raw: dict[int, socket.socket] = {}
        self._timers: list[tuple[float, int, bytes | tuple[bool, bool], str]] = []
        self._count = 0
        self._patches: dict[tuple[Way, bytes], Patch] = {}
        self._rebind_after: tuple[int, bool, bool] | None = None
        self._forwarder: tuple[str, float] | None = None
        self._forwarded: dict[Endpoint, Endpoint] = {}  # (its address, port) -> the host
        for family in families:
            # Not bound to an interface: the lan's cable may be plugged in later, or anew.
            protocol = ETH_P_IP if family == 4 else ETH_P_IPV6
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol))
            opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            opened.setblocking(False)
            self._sockets[opened.fileno()] = (opened, family)
            self._raw[family] = self._open_raw(family)

    @staticmethod
    def _open_raw(family: int) -> socket.socket:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        raw = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if family == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        return raw

    def filenos(self) -> list[int]:
        """Packet sockets to wait on."""
        return list(self._sockets)

    def receive(self, fd: int) -> None:
        """Translate what waits on a packet socket."""
        source, family = self._sockets[fd]
        for _ in range(64):
            try:
                data, (interface, *_) = source.recvfrom(65535)
            except OSError:
                return
            if data[9 if family == 4 else 6] != socket.IPPROTO_UDP:
                continue
            if interface in (LAN, WAN):
                self._translate("out" if interface == LAN else "in", data)

    def _translate(self, way: Way, data: bytes) -> None:
        if way == "out" and self._rebind_after is not None:
            left, *what = self._rebind_after
            self._rebind_after = (left - 1, what[0], what[1]) if left > 1 else None
            if left <= 1:
                self._rebind(*what)
        flow = (way, data[flow_piece(data)])
        patch = self._patches.get(flow)
        if patch is not None:
            self._pass(way, patch.apply(data))
            return
        packet = IP(data) if data[0] >> 4 == 4 else IPv6(data)
        translated = self._out(packet) if way == "out" else self._in(packet)
        if translated is None:
            return
        if self._forwarder is None and data[0] in (0x45, *range(0x60, 0x70)):
            self._patches[flow] = Patch.between(data, translated)
        self._pass(way, translated)

    def _out(self, packet: Packet) -> bytes | None:
        inside = (packet.src, packet[UDP].sport)
        if inside[0] not in self.table.host.values():
            return None  # an address that the host no longer has, or never had
        outside = self.table.outgoing(inside, (packet.dst, packet[UDP].dport))
        translated = rewrite(packet, source=outside)
        if self._forwarder is None:
            return translated
        address, lag = self._forwarder
        self._forwarded[address, outside[1]] = inside
        copy = IP(translated) if packet.version == 4 else IPv6(translated)
        self._send(rewrite(copy, source=(address, outside[1])))
        self._at(time.monotonic() + lag, translated, "out")
        return None

    def _in(self, packet: Packet) -> bytes | None:
        target = (packet.dst, packet[UDP].dport)
        inside = self._forwarded.get(target)
        if inside is None:
            inside = self.table.incoming(target, (packet.src, packet[UDP].sport))
        if inside is None:
            self.counters["filtered"] += 1
            return None
        return rewrite(packet, target=inside)

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
        self._send(packet)

    def _send(self, packet: bytes) -> None:
        family, target = (4, packet[16:20]) if packet[0] >> 4 == 4 else (6, packet[24:40])
        to = socket.inet_ntop(socket.AF_INET if family == 4 else socket.AF_INET6, target)
        try:
            self._raw[family].sendto(packet, (to, 0))
        except OSError as error:
            print(f"lost a packet to {to}: {error}", file=sys.stderr)

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
        self._patches.clear()
        self.table.rebind(port=port, address=address)

    def control(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the module docstring."""
        verb = request.pop("do", "show")
        answer = getattr(self, f"_do_{verb}")(**request) or {}
        mappings = [
            [list(binding.inside), list(binding.outside)]
            for binding in self.table.bindings.values()
        ]
        public = {str(family): address for family, address in self.table.public.items()}
        return {**answer, "counters": self.counters, "mappings": mappings, "public": public}

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
            parsed = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
            packet = rewrite(parsed, source=(source[0], source[1]))
        self._send(packet)
        return {"replayed": len(packet)}

    def _do_forge(self, payload: str, source: list[Any], target: list[Any]) -> None:
        layer = IPv6 if ":" in target[0] else IP
        packet = layer(src=source[0], dst=target[0])
        packet /= UDP(sport=source[1], dport=target[1]) / Raw(bytes.fromhex(payload))
        self._send(bytes(packet))

    def _do_forwarder(self, address: str | None, lag: float = 0.005) -> None:
        self._patches.clear()
        self._forwarder = (address, lag) if address else None
        if address is None:
            self._forwarded.clear()

    def _do_host(self, addresses: dict[str, str]) -> None:
        self._patches.clear()
        self.table.move({int(family): address for family, address in addresses.items()})


def rewrite(
    packet: Packet, *, source: Endpoint | None = None, target: Endpoint | None = None
) -> bytes:
    """Give the packet another source or target, a TTL one less and new checksums; returns its
    bytes.
    """
    udp = packet[UDP]
    if source is not None:
        packet.src, udp.sport = source
    if target is not None:
        packet.dst, udp.dport = target
    del udp.chksum
    if packet.version == 4:
        packet.ttl -= 1
        del packet.chksum
    else:
        packet.hlim -= 1
    return bytes(packet)


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
        """Address and port that the other end sees, of the newest mapping of that family."""
        mappings = self.call("show")["mappings"]
        found = [outside for _, outside in mappings if (":" in outside[0]) == (family == 6)]
        return (found[-1][0], found[-1][1])

    def close(self) -> None:
        """Close the handle; the process ends with its namespace."""
        self._client.close()


def main() -> None:
    """Run the NAT until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.nat_scapy")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--host", nargs="+", required=True)
    parser.add_argument("--public", nargs="+", required=True, help="addresses, by comma, as --host")
    parser.add_argument("--mapping", choices=["endpoint", "address", "port"], default="endpoint")
    parser.add_argument("--filtering", choices=["endpoint", "address", "port"], default="port")
    parser.add_argument("--forward", action="store_true")
    options = parser.parse_args()
    # Payloads are opaque here: without this, scapy would dissect them by port number.
    for upper in [upper for _, upper in UDP.payload_guess]:
        split_layers(UDP, upper)
    bind_layers(UDP, Raw)
    families = {6 if ":" in address else 4: address for address in options.host}
    publics = dict(zip(families, (tuple(p.split(",")) for p in options.public), strict=True))
    table = ScapyTable(
        families,
        publics,
        mapping=options.mapping,
        filtering=options.filtering,
        forward=options.forward,
    )
    router = ScapyRouter(table, families)
    server = ControlServer(options.control, router.control)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wait: float | None = None
    while True:
        readable, _, _ = select.select([*router.filenos(), *server.filenos()], [], [], wait)
        for fd in readable:
            if not server.ready(fd):
                router.receive(fd)
        wait = router.run_timers()


if __name__ == "__main__":
    main()
