"""A simulated network for real `Node`s: virtual time, links with delay and loss, NATs that rebind.

::

    host a --- [NAT a] ---+                  +--- [NAT b] --- host b
       |                  |  one-way delay   |                  |
       +----- [NAT a2] ---+--- the network --+--- [NAT b2] -----+

Every host has uplinks, each with one local address behind its own NAT (endpoint-independent
mapping; filtering is the uplink's choice). Nothing sleeps: `run` jumps from one wake-up to the
next, and everything random comes from one seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_network

from tunnel.config import Config, loads
from tunnel.events import NodeEvent, ResolveWanted
from tunnel.identity import Identity
from tunnel.node import Node
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route

PORT = 4117
INNER = {"a": "10.88.0.1", "b": "10.88.0.2"}
START = 1000.0


@dataclass
class Uplink:
    """One interface of a host and the NAT behind it."""

    interface: str
    ip: str
    public_ip: str
    forwarded: bool = False  # PORT of public_ip always leads to this host
    restricted: bool = True  # address- and port-dependent filtering (RFC 4787 section 5)
    up: bool = True
    black_hole: bool = False
    metric: int = 100
    delay: float = 0.0  # extra seconds each way
    mapping: dict[str, int] = field(default_factory=dict)  # local ip -> public port
    allowed: set[Address] = field(default_factory=set)
    next_port: int = 40000

    def outside(self) -> Address:
        if self.forwarded and self.ip not in self.mapping:
            self.mapping[self.ip] = PORT
        if self.ip not in self.mapping:
            self.next_port += 1
            self.mapping[self.ip] = self.next_port
        return Address(self.public_ip, self.mapping[self.ip])


class Host:
    """A node and its uplinks."""

    def __init__(self, name: str, uplinks: list[Uplink]) -> None:
        self.name = name
        self.uplinks = uplinks
        self.node: Node
        self.identity: Identity
        self.config: Config
        self.events: list[tuple[float, NodeEvent]] = []
        self.received: list[tuple[float, bytes]] = []
        self.armed: float | None = None
        self.stopped = False

    def network(self) -> LocalNetwork:
        live = [u for u in self.uplinks if u.up]
        return LocalNetwork(
            tuple(LocalAddress(u.ip, u.interface) for u in live),
            tuple(Route(ip_network("0.0.0.0/0"), u.interface, u.metric) for u in live),
        )

    def uplink_of(self, local_ip: str) -> Uplink | None:
        return next((u for u in self.uplinks if u.ip == local_ip and u.up), None)


class World:
    """Two hosts, `a` and `b`, and everything between them."""

    def __init__(
        self,
        seed: int = 1,
        *,
        delay: float = 0.01,
        loss: float = 0.0,
        jitter: float = 0.0,
        a: list[Uplink] | None = None,
        b: list[Uplink] | None = None,
        both_dial: bool = False,
        max_packets_per_key: int | None = None,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = START
        self.delay, self.loss, self.jitter = delay, loss, jitter
        self.mtu = 1472  # of every link, in UDP payload
        self.max_packets_per_key = max_packets_per_key
        self.tap: Callable[[Host, PathKey, bytes], None] | None = None
        """Sees every datagram as it leaves its NAT."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.a = Host("a", a or [Uplink("eth0", "192.168.1.10", "203.0.113.1")])
        self.b = Host("b", b or [Uplink("eth0", "192.168.2.10", "198.51.100.1", forwarded=True)])
        self.hosts = {"a": self.a, "b": self.b}
        for host in self.hosts.values():
            host.identity = Identity.generate()
        for host, other in ((self.a, self.b), (self.b, self.a)):
            endpoints = [f"{u.public_ip}:{PORT}" for u in other.uplinks if u.forwarded]
            dials = host is self.a or both_dial
            host.config = _config(host, other, endpoints if dials else [])

    # running

    def boot(self, *names: str) -> None:
        """Start (or restart) the nodes with these names; all without any."""
        for name in names or self.hosts:
            host = self.hosts[name]
            host.stopped = False
            host.node = Node(
                host.config,
                host.identity,
                rng=random.Random(self.rng.random()),
                boot_id=self.rng.randbytes(16),
                max_packets_per_key=self.max_packets_per_key,
            )
            host.node.network_changed(host.network(), PORT, self.now)
            self.pump(host)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            when, _, action = heapq.heappop(self._queue)
            self.now = max(self.now, when)
            action()
        self.now = until

    def run_until(self, condition: Callable[[], bool], limit: float) -> float:
        """Run until the condition holds; the seconds it took. Raises AssertionError at `limit`."""
        start = self.now
        while not condition():
            assert self.now - start < limit, f"seed {self.seed}: not within {limit} s"
            if self._queue and self._queue[0][0] <= start + limit:
                when, _, action = heapq.heappop(self._queue)
                self.now = max(self.now, when)
                action()
            else:
                self.now = start + limit
        return self.now - start

    # traffic

    def send(self, name: str, packet: bytes) -> None:
        """A packet comes out of the host's TUN."""
        host = self.hosts[name]
        if not host.stopped:
            host.node.receive_packets([packet], self.now)
            self.pump(host)

    def stream(
        self, name: str, *, interval: float, seconds: float, size: int = 64, flow: int = 1
    ) -> list[int]:
        """Schedule numbered packets; returns the list that their numbers are written to."""
        sent: list[int] = []

        def one(number: int) -> None:
            sent.append(number)
            self.send(name, numbered(name, number, size=size, flow=flow))

        for number in range(int(seconds / interval)):
            self.after(number * interval, lambda number=number: one(number))  # type: ignore[misc]
        return sent

    # events in the network

    def network_event(self, name: str) -> None:
        """The kernel of this host tells what it has now."""
        host = self.hosts[name]
        if not host.stopped:
            host.node.network_changed(host.network(), PORT, self.now)
            self.pump(host)

    def rebind(self, uplink: Uplink, *, public_ip: str | None = None) -> None:
        """The NAT forgets the mapping; the next packet gets another one."""
        uplink.next_port += 7
        uplink.mapping = {uplink.ip: uplink.next_port}
        uplink.allowed.clear()
        if public_ip is not None:
            uplink.public_ip = public_ip

    def readdress(self, name: str, uplink: Uplink, ip: str) -> None:
        uplink.ip = ip
        uplink.mapping.clear()
        uplink.allowed.clear()
        self.network_event(name)

    def stop(self, name: str) -> None:
        """The process dies without a word."""
        self.hosts[name].stopped = True

    # plumbing

    def pump(self, host: Host) -> None:
        node = host.node
        for _ in range(4):
            while (event := node.next_event()) is not None:
                host.events.append((self.now, event))
                if isinstance(event, ResolveWanted):
                    addresses = [Address(e.host, e.port) for e in event.endpoints]
                    node.endpoints_resolved(event.peer, addresses, self.now)
            for key, data in node.datagrams_to_send(self.now):
                self._depart(host, key, data)
        host.received += [(self.now, packet) for packet in node.packets_to_write()]
        self._arm(host)

    def _arm(self, host: Host) -> None:
        timer = host.node.get_timer()
        if timer is None or timer == host.armed:
            return
        host.armed = timer = max(timer, self.now)

        def fire(node: Node = host.node, due: float = timer) -> None:
            if host.node is node and host.armed == due and not host.stopped:
                host.armed = None
                node.handle_timer(self.now)
                self.pump(host)

        self.at(timer, fire)

    def _depart(self, host: Host, key: PathKey, data: bytes) -> None:
        uplink = host.uplink_of(key.local.host)
        if uplink is None or uplink.black_hole or len(data) > self.mtu:
            return
        uplink.allowed.add(key.remote)
        source = uplink.outside()
        if self.tap is not None:
            self.tap(host, PathKey(source, key.remote), data)
        if self.rng.random() < self.loss:
            return
        delay = self.delay + uplink.delay + self.rng.random() * self.jitter
        self.deliver(source, key.remote, data, delay)

    def deliver(self, source: Address, target: Address, data: bytes, delay: float) -> None:
        """Carry a datagram across the network to whatever NAT owns the target address."""
        self.after(delay, lambda: self._arrive(source, target, data))

    def _arrive(self, source: Address, target: Address, data: bytes) -> None:
        for host in self.hosts.values():
            for uplink in host.uplinks:
                if uplink.public_ip != target.host or not uplink.up or uplink.black_hole:
                    continue
                mapped = uplink.mapping.get(uplink.ip)
                forwarded = uplink.forwarded and target.port == PORT
                if target.port != mapped and not forwarded:
                    continue
                if uplink.restricted and not forwarded and source not in uplink.allowed:
                    continue
                self.after(
                    uplink.delay,
                    lambda host=host, uplink=uplink: self._hand_over(  # type: ignore[misc]
                        host, uplink, source, data
                    ),
                )

    def _hand_over(self, host: Host, uplink: Uplink, source: Address, data: bytes) -> None:
        if host.stopped or not uplink.up:
            return
        key = PathKey(Address(uplink.ip, PORT), source)
        host.node.receive_datagram(data, key, self.now)
        self.pump(host)

    # looking

    def state(self, name: str) -> str:
        host = self.hosts[name]
        return next(iter(host.node.peers.values())).state

    @property
    def both_up(self) -> bool:
        return self.state("a") == self.state("b") == "up"

    def active(self, name: str) -> PathKey:
        session = next(iter(self.hosts[name].node.peers.values())).session
        assert session is not None
        return session.active


def numbered(sender: str, number: int, *, size: int = 64, flow: int = 1) -> bytes:
    """A well-formed UDP/IPv4 packet from this host to the other that carries its number."""
    other = "b" if sender == "a" else "a"
    head = bytearray(28)
    head[0] = 0x45
    head[2:4] = size.to_bytes(2)
    head[8], head[9] = 64, 17
    head[12:16] = bytes(map(int, INNER[sender].split(".")))
    head[16:20] = bytes(map(int, INNER[other].split(".")))
    head[20:22] = (5000 + flow).to_bytes(2)
    head[22:24] = (6000).to_bytes(2)
    head[24:26] = (size - 20).to_bytes(2)
    return bytes(head) + number.to_bytes(8) + bytes(size - 36)


def number_of(packet: bytes) -> int:
    return int.from_bytes(packet[28:36])


def gaps(received: list[tuple[float, bytes]], since: float) -> tuple[float, int]:
    """The longest silence after `since`, and how many packets came after it."""
    times = [when for when, _ in received if when >= since]
    if not times:
        return float("inf"), 0
    steps = [later - earlier for earlier, later in itertools.pairwise([since, *times])]
    return max(steps), len(times)


def _config(host: Host, other: Host, endpoints: list[str]) -> Config:
    endpoint = f"endpoint = {endpoints!r}\n".replace("'", '"') if endpoints else ""
    return loads(
        f"""
[interface]
name = "mt{host.name}"
address = ["{INNER[host.name]}/24"]
private_key = "/dev/null"
listen_port = {PORT}
[[peer]]
name = "{other.name}"
public_key = "{other.identity.public_key.openssh}"
{endpoint}allowed_ips = ["{INNER[other.name]}/32"]
""",
        "simulated.toml",
    )
