"""A router whose NAT for UDP is a userspace process with the tables of `bench.nattable`.

    lan --[ the kernel: ARP and ND, TCP and ICMP ]-- wan
                |                        ^
                +--> packet socket --> table --> raw socket (the kernel finds the neighbour)

For the behaviours that the kernel's own NAT lacks: address-dependent mapping or filtering, ports
that are never preserved, one mapping for each of arbitrarily many ports of a host, hairpins, two
hosts or two routers inside. What is not UDP, nftables translates: outgoing connections pass. ICMP
errors about UDP are not translated; fragments are dropped. A packet costs about 15 us.

Run as `python -m bench.natbox` by `BoxNat`. Commands, one JSON object each (`cli.demo.control`):

    rebind      port, address (booleans)
    forward     inside: [[address, port, outside port], ...]: the port forwards from now on

Every answer has the counters, and the mappings with the oldest first.
"""

from __future__ import annotations

import argparse
import random
import select
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench.nattable import EXPIRY, Behaviour, Endpoint, NatTable, family_of
from cli.demo.control import ControlClient, ControlServer
from cli.demo.core import PYTHON_ENV
from cli.demo.link import PACKET_IGNORE_OUTGOING, SOL_PACKET
from cli.demo.nat import LAN, WAN
from cli.demo.netns import Namespace
from cli.demo.world import PORT

ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
_IPV6_HDRINCL = 36  # linux/in6.h
_PACKET_HOST = 0  # linux/if_packet.h: addressed to this router, not merely passing its switch
_MORE_OR_OFFSET = 0x3FFF  # RFC 791: of the flags and offset of a fragment
_BURST = 64  # packets taken from one socket before the control socket is looked at
_BUFFER = 4 << 20  # bytes


# ---- packets ----


def endpoints(packet: bytes) -> tuple[Endpoint, Endpoint] | None:
    """Source and destination of an IP packet that is an unfragmented UDP datagram."""
    if len(packet) >= 28 and packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
        if int.from_bytes(packet[6:8], "big") & _MORE_OR_OFFSET:
            return None
        head, kind, addresses = (packet[0] & 15) * 4, socket.AF_INET, packet[12:20]
    elif len(packet) >= 48 and packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
        head, kind, addresses = 40, socket.AF_INET6, packet[8:40]
    else:
        return None
    half = len(addresses) // 2
    source, target = struct.unpack_from("!HH", packet, head)
    return (
        (socket.inet_ntop(kind, addresses[:half]), source),
        (socket.inet_ntop(kind, addresses[half:]), target),
    )


def readdress(
    packet: bytes, *, source: Endpoint | None = None, target: Endpoint | None = None
) -> bytes:
    """The UDP packet with another source or destination and one hop less.

    RFC 1624: the checksum changes by the sum of what changed, so the payload need not be read. The
    kernel fills in the IPv4 header's checksum (raw(7)).
    """
    if packet[0] >> 4 == 4:
        kind, hops, place, head = socket.AF_INET, 8, 12, (packet[0] & 15) * 4
    else:
        kind, hops, place, head = socket.AF_INET6, 7, 8, 40
    size = 4 if kind == socket.AF_INET else 16
    addresses, ports = packet[place : place + 2 * size], packet[head : head + 4]
    ends = ((source, slice(0, size), slice(0, 2)), (target, slice(size, None), slice(2, None)))
    new_addresses, new_ports = bytearray(addresses), bytearray(ports)
    for end, address, port in ends:
        if end is not None:
            new_addresses[address] = socket.inet_pton(kind, end[0])
            new_ports[port] = end[1].to_bytes(2, "big")
    checksum = int.from_bytes(packet[head + 6 : head + 8], "big")
    if checksum:  # zero: there is none
        total = checksum ^ 0xFFFF
        total += _words(new_addresses) + _words(new_ports)
        total += _words(bytes(byte ^ 0xFF for byte in addresses + ports))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        checksum = (total ^ 0xFFFF) or 0xFFFF
    return b"".join(
        (
            packet[:hops],
            bytes((packet[hops] - 1,)),
            packet[hops + 1 : place],
            new_addresses,
            packet[place + 2 * size : head],
            new_ports,
            packet[head + 4 : head + 6],
            checksum.to_bytes(2, "big"),
            packet[head + 8 :],
        )
    )


def _words(data: bytes | bytearray) -> int:
    return sum(struct.unpack(f">{len(data) // 2}H", data))


# ---- the process ----


class Wires:
    """The packet sockets of a router's two interfaces, and the raw sockets that send.

    Not bound to the interfaces: the lan's cable may be plugged in later, or anew.
    """

    def __init__(self, families: Iterable[int]) -> None:
        self._inputs: dict[int, socket.socket] = {}
        self._outputs: dict[int, socket.socket] = {}
        for family in families:
            protocol = ETH_P_IP if family == 4 else ETH_P_IPV6
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol))
            opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            opened.setblocking(False)
            self._inputs[opened.fileno()] = opened
            kind = socket.AF_INET if family == 4 else socket.AF_INET6
            raw = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
            if family == 6:
                raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            self._outputs[family] = raw

    def filenos(self) -> list[int]:
        """Packet sockets to wait on."""
        return list(self._inputs)

    def receive(self, fd: int) -> Iterable[tuple[str, bytes]]:
        """UDP packets that wait on a packet socket, each with "out" or "in": where it is going."""
        source = self._inputs[fd]
        for _ in range(_BURST):
            try:
                data, (interface, _, kind, *_) = source.recvfrom(65535)
            except OSError:  # empty, or an interface went down
                return
            if kind == _PACKET_HOST and interface in (LAN, WAN):
                yield "out" if interface == LAN else "in", data

    def send(self, packet: bytes) -> None:
        """Send by the kernel's routes; what they lead to nobody is lost, and noted."""
        four = packet[0] >> 4 == 4
        kind, target = (socket.AF_INET, packet[16:20]) if four else (socket.AF_INET6, packet[24:40])
        to = socket.inet_ntop(kind, target)
        try:
            self._outputs[4 if four else 6].sendto(packet, (to, 0))
        except OSError as error:
            print(f"lost a packet to {to}: {error}", file=sys.stderr)


class Box:
    """Translates what comes in at one side and sends it out of the other."""

    def __init__(self, table: NatTable, wires: Wires) -> None:
        self.table = table
        self.wires = wires
        self.counters = {"out": 0, "in": 0, "hairpin": 0, "filtered": 0}

    def receive(self, fd: int, now: float) -> None:
        """Translate what waits on a packet socket."""
        for way, packet in self.wires.receive(fd):
            ends = endpoints(packet)
            if ends is None or packet[8 if packet[0] >> 4 == 4 else 7] <= 1:
                continue
            if way == "out":
                self._out(packet, *ends, now)
            else:
                self._in("in", packet, *ends, now)

    def _out(self, packet: bytes, inside: Endpoint, remote: Endpoint, now: float) -> None:
        hairpin = self.table.is_public(remote[0])
        if hairpin and not self.table.hairpin:
            self.counters["filtered"] += 1
            return
        outside = self.table.outgoing(inside, remote, now)
        if outside is None:
            self.counters["filtered"] += 1
        elif hairpin:
            self._in("hairpin", packet, outside, remote, now)
        else:
            self.counters["out"] += 1
            self.wires.send(readdress(packet, source=outside))

    def _in(self, way: str, packet: bytes, remote: Endpoint, at: Endpoint, now: float) -> None:
        inside = self.table.incoming(at, remote, now)
        if inside is None:
            self.counters["filtered"] += 1
            return
        self.counters[way] += 1
        source = remote if way == "hairpin" else None
        self.wires.send(readdress(packet, source=source, target=inside))

    def control(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the module docstring."""
        verb = request.pop("do", "show")
        if verb == "rebind":
            self.table.rebind(**request)
        elif verb == "forward":
            self.table.move({(str(ip), int(port)): int(to) for ip, port, to in request["inside"]})
        elif verb != "show":
            raise ValueError(f"no such command: {verb}")
        mappings = [[binding.inside, binding.outside] for binding in self.table.bindings()]
        return {"counters": self.counters, "mappings": mappings}


# ---- its owner ----


@dataclass
class BoxNat:
    """The owner's handle; implements `cli.demo.nat.Nat`.

    space: the router, its interfaces named `LAN` and `WAN`. publics: outside addresses by family,
    of the families that are translated; the others are left to the kernel's routing. forwards:
    outside ports by inside endpoint. name: of its files in `directory`.
    """

    space: Namespace
    publics: Mapping[int, tuple[str, ...]]
    directory: Path
    name: str
    mapping: Behaviour = "endpoint"
    filtering: Behaviour = "port"
    hairpin: bool = False
    expiry: float = EXPIRY
    forwards: dict[Endpoint, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.space.run(["nft", "-f", "-"], input=_ruleset(self.publics))
        path = self.directory / f"nat-{self.name}.sock"
        argv = [sys.executable, "-m", "bench.natbox", "--control", str(path)]
        argv += ["--public", *(",".join(addresses) for addresses in self.publics.values())]
        argv += ["--mapping", self.mapping, "--filtering", self.filtering]
        argv += ["--expiry", str(self.expiry), *(["--hairpin"] if self.hairpin else [])]
        argv += ["--seed", str(zlib.crc32(self.name.encode()))]  # not two NATs with the same ports
        log = self.directory / f"nat-{self.name}.log"
        self.space.popen(argv, env=PYTHON_ENV, log=log)
        self._client = ControlClient(path)
        self._forward()

    @property
    def forward(self) -> bool:
        """Whether it forwards a port."""
        return bool(self.forwards)

    def _forward(self) -> None:
        inside = [[*endpoint, port] for endpoint, port in self.forwards.items()]
        self.call("forward", inside=inside)

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command of the module docstring."""
        return self._client.call(do=do, **arguments)

    def rebind(self, *, port: bool = True, address: bool = False) -> None:
        """Change all mappings."""
        self.call("rebind", port=port, address=address)

    def move_host(self, addresses: dict[int, str], script: str) -> None:
        """Run the script that moves the host; forwards follow it."""
        self.space.run(["sh", "-c", script])
        self.forwards = {
            (addresses[family_of(inside[0])], inside[1]): port
            for inside, port in self.forwards.items()
        }
        self._forward()

    def public(self, family: int) -> Endpoint:
        """Address and port that the other end sees: the newest mapping of the tunnel's port."""
        return newest(self.call("show")["mappings"], family)

    def close(self) -> None:
        """Close the handle; the process ends with its namespace."""
        self._client.close()


def newest(mappings: list[tuple[list[Any], list[Any]]], family: int) -> Endpoint:
    """The outside of the tunnel's port in a family, of the mappings in an answer."""
    found = [to for (_, port), to in mappings if port == PORT and family_of(to[0]) == family]
    host, port = found[-1]
    return (str(host), int(port))


def _ruleset(families: Iterable[int]) -> str:
    """The kernel translates what is not UDP, and neither forwards nor refuses what is."""
    lines: dict[str, list[str]] = {"track": [], "pass": [], "out": []}
    for family in families:
        of = f"meta nfproto ipv{family}"
        lines["track"].append(f"{of} meta l4proto udp notrack")
        lines["pass"] += [
            f"{of} meta l4proto udp drop",
            f"{of} ct state established,related accept",
            f'{of} iifname "{WAN}" meta l4proto tcp drop',
        ]
        lines["out"].append(f'{of} oifname "{WAN}" meta l4proto != udp masquerade')
    track, passing, out = ("\n    ".join(rules) for rules in lines.values())
    return f"""
table inet natbox {{
  chain arrived {{
    type filter hook prerouting priority raw;
    {track}
  }}
  chain made {{
    type filter hook output priority raw;
    {track}
  }}
  chain input {{
    type filter hook input priority filter;
    {passing}
  }}
  chain forward {{
    type filter hook forward priority filter;
    {passing}
  }}
  chain out {{
    type nat hook postrouting priority srcnat;
    {out}
  }}
}}
"""


def main() -> None:
    """Run the NAT until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.natbox")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--public", nargs="+", required=True, help="of a family, by comma")
    parser.add_argument("--mapping", choices=get_args(Behaviour), required=True)
    parser.add_argument("--filtering", choices=get_args(Behaviour), required=True)
    parser.add_argument("--expiry", type=float, default=EXPIRY)
    parser.add_argument("--hairpin", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    publics = {family_of(one): tuple(one.split(",")) for one in options.public}
    table = NatTable(
        publics,
        random.Random(options.seed),
        mapping=options.mapping,
        filtering=options.filtering,
        hairpin=options.hairpin,
        expiry=options.expiry,
    )
    box = Box(table, Wires(publics))
    server = ControlServer(options.control, box.control)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    packets = box.wires.filenos()
    while True:
        readable, _, _ = select.select([*packets, *server.filenos()], [], [])
        for fd in readable:
            if not server.ready(fd):
                box.receive(fd, time.monotonic())


if __name__ == "__main__":
    main()
