"""A simulated network for real `Node`s: virtual time, links with delay and loss, NATs that rebind.

::

    host a --- [NAT a] ---+                  +--- [NAT b] --- host b
       |                  |  one-way delay   |                  |
       +----- [NAT a2] ---+--- the network --+--- [NAT b2] -----+

Every host has uplinks, each with one local address behind its own NAT: endpoint-independent
mapping or symmetric, filtering or not, mappings that expire. A host may have relayed addresses at a
TURN server in the network, each reached by one of its uplinks. Nothing sleeps: `run` jumps from one
wake-up to the next, and everything random comes from one seed.

With `rendezvous` no end has an endpoint: there are a broker and a STUN server in the network, as
far from both as they are from each other. The server has another address, if the ends are to
learn what kind of NAT they are behind (`other_stun`).
"""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_network

from aioice import stun
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tunnel.config import Config, loads
from tunnel.events import NodeEvent, PortUnwanted, PortWanted, ResolveWanted
from tunnel.ice.candidate import Relay
from tunnel.ice.check import transaction_id_of
from tunnel.identity import Identity
from tunnel.node import Node
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey, Route
from tunnel.peer import Peer

PORT = 4117
INNER = {"a": "10.88.0.1", "b": "10.88.0.2"}
START = 1000.0
TX_QUEUE = 500  # packets, Linux's default for a TUN
TIMER_GRAIN = 0.0001  # seconds that an event loop is late
MAX_SPINS = 20
"""Timers in a row that were due the moment they were armed; a real event loop would burn a core."""
SEND_ROUNDS = 4  # as the shell
STUN = Address("192.0.2.53", 3478)
OTHER_STUN = Address("192.0.2.54", 3479)
BROKER_ROUND_TRIPS = 2
"""To be connected again: TCP and MQTT. Subscriptions travel with the first message."""

NAT_LIFETIME = 30.0
"""Seconds without an outgoing packet after which a mapping is gone: shorter than RFC 4787 allows,
as short as many routers are."""


@dataclass
class Mapping:
    """What a NAT remembers: the outer port, and when something last left by it."""

    port: int
    used_at: float


@dataclass
class Uplink:
    """One interface of a host and the NAT behind it."""

    interface: str
    ip: str
    public_ip: str
    forwarded: bool = False  # PORT of public_ip always leads to this host
    restricted: bool = True  # address- and port-dependent filtering (RFC 4787 section 5)
    symmetric: bool = False  # address- and port-dependent mapping (RFC 4787 section 4.1)
    up: bool = True
    black_hole: bool = False
    mute: bool = False  # a black hole for what leaves only
    deaf: bool = False  # a black hole for what arrives only
    loss: float = 0.0  # share of what passes, each way, beside that of the network
    metric: int = 100
    delay: float = 0.0  # extra seconds each way
    mtu: int = 1472  # of the link, in UDP payload: more is refused by the kernel at once
    lifetime: float = NAT_LIFETIME
    dead_ports: set[int] = field(default_factory=set)
    """Local ports whose mapping is stuck: nothing passes, either way."""
    mappings: dict[tuple[int, Address | None], Mapping] = field(default_factory=dict)
    """By local port and remote address; None stands for all where the mapping is
    endpoint-independent."""
    allowed: dict[Address, float] = field(default_factory=dict)
    next_port: int = 40000
    ports: random.Random | None = None
    """Outer ports are drawn at random, not counted."""

    def outside(self, remote: Address, now: float, local_port: int = PORT) -> Address:
        """The source address of a packet that leaves to `remote`; makes or renews a mapping."""
        forwarded = self.forwarded and local_port == PORT
        entry = (local_port, remote if self.symmetric and not forwarded else None)
        mapping = self.mappings.get(entry)
        if mapping is None or now - mapping.used_at > self.lifetime:
            if forwarded:
                port = PORT
            elif self.ports is not None:
                port = self.ports.randrange(1024, 65536)
            else:
                self.next_port += 1
                port = self.next_port
            mapping = self.mappings[entry] = Mapping(port, now)
        mapping.used_at = self.allowed[remote] = now
        return Address(self.public_ip, mapping.port)

    def lets_in(self, source: Address, port: int, now: float) -> int | None:
        """The local port that a packet from `source` to this outer port reaches, if any."""
        local = self._leads_to(source, port, now)
        return None if local in self.dead_ports else local

    def _leads_to(self, source: Address, port: int, now: float) -> int | None:
        if self.forwarded and port == PORT:
            return PORT
        for (local, remote), mapping in self.mappings.items():
            if mapping.port == port and now - mapping.used_at <= self.lifetime:
                if not self.restricted and remote is None:
                    return local
                last = self.allowed.get(source)
                fresh = last is not None and now - last <= self.lifetime
                return local if fresh and remote in (None, source) else None
        return None

    def forget(self) -> None:
        """The NAT restarts: mappings and filters are gone, the next ports are new ones."""
        self.mappings.clear()
        self.allowed.clear()


@dataclass
class Allocation:
    """A relayed address of a host, as its server keeps it."""

    relay: Relay
    uplink: Uplink
    permitted: set[str] = field(default_factory=set)
    """Who may send there (RFC 8656 section 9)."""


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
        self.stopped = True  # until booted
        self.ports: set[Address] = set()  # further sockets
        self.peak_ports = 0
        self.relays: dict[Address, Allocation] = {}
        self.waiting: deque[bytes] = deque()  # in the TUN's own queue, while the node reads nothing
        self.fired_at, self.spins = 0.0, 0
        self.bytes_sent = 0
        self.datagrams_sent = 0
        self.connections = 0  # to the broker, so far
        self.connected = False
        self.signals_sent = 0

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
        redundancy: str = "off",
        metered: tuple[str, ...] = (),
        rendezvous: bool = False,
        other_stun: bool = False,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = START
        self.delay, self.loss, self.jitter = delay, loss, jitter
        self.mtu = 1472  # of every link, in UDP payload
        self.direct = True  # whether anything passes but from and to relays
        self.max_packets_per_key = max_packets_per_key
        self.tap: Callable[[Host, PathKey, bytes], None] | None = None
        """Sees every datagram as it leaves its NAT."""
        self.outsiders: dict[str, Callable[[Address, Address, bytes], None]] = {}
        """Who else owns an address, and gets what is sent there: source, target, data."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._next_port = 50000
        self.a = Host("a", a or [Uplink("eth0", "192.168.1.10", "203.0.113.1")])
        self.b = Host("b", b or [Uplink("eth0", "192.168.2.10", "198.51.100.1", forwarded=True)])
        self.hosts = {"a": self.a, "b": self.b}
        for host in self.hosts.values():
            host.identity = Identity(Ed25519PrivateKey.from_private_bytes(self.rng.randbytes(32)))
        self.rendezvous = rendezvous
        self.broker_up = True
        if rendezvous:
            self.outsiders[STUN.host] = self.outsiders[OTHER_STUN.host] = self._stun
        self.other_stun = other_stun
        for host, other in ((self.a, self.b), (self.b, self.a)):
            endpoints = [f"{u.public_ip}:{PORT}" for u in other.uplinks if u.forwarded]
            dials = (host is self.a or both_dial) and not rendezvous
            more = f'[paths]\nredundancy = "{redundancy}"\nmetered = {list(metered)!r}\n'
            if rendezvous:
                more += f'[rendezvous]\nurl = "mqtt://192.0.2.80"\n[ice]\nstun = ["{STUN}"]\n'
            host.config = _config(host, other, endpoints if dials else [], more)

    # running

    def boot(self, *names: str) -> None:
        """Start (or restart) the nodes with these names; all without any."""
        for name in names or self.hosts:
            host = self.hosts[name]
            host.stopped = False
            host.armed = None
            host.ports.clear()
            host.node = Node(
                host.config,
                host.identity,
                rng=random.Random(self.rng.random()),
                boot_id=self.rng.randbytes(16),
                max_packets_per_key=self.max_packets_per_key,
            )
            host.node.network_changed(host.network(), PORT, self.now)
            self.pump(host)
            self.reach_broker(name)

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
        if host.stopped:
            return
        if len(host.waiting) < TX_QUEUE:
            host.waiting.append(packet)
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
        host.ports = {local for local in host.ports if host.uplink_of(local.host)}
        if not host.stopped:
            host.node.network_changed(host.network(), PORT, self.now)
            self.pump(host)
            self.reach_broker(name)

    def relay(self, name: str, uplink: Uplink, address: Address) -> None:
        """A TURN server gives this host an address."""
        relay = Relay(address, uplink.interface, uplink.ip, "turn:turn.example", "udp")
        self.hosts[name].relays[address] = Allocation(relay, uplink)
        self._relays_changed(name)

    def unrelay(self, name: str, address: Address) -> None:
        """It is lost."""
        del self.hosts[name].relays[address]
        self._relays_changed(name)

    def _relays_changed(self, name: str) -> None:
        host = self.hosts[name]
        relays = tuple(allocation.relay for allocation in host.relays.values())
        host.node.relays_changed(relays, self.now)
        self.pump(host)

    def rebind(self, uplink: Uplink, *, port: bool = True, public_ip: str | None = None) -> None:
        """The NAT forgets the mapping; the next packet gets another port, or address, or both."""
        usual = (PORT, None)
        kept = uplink.mappings.get(usual)
        uplink.forget()
        uplink.next_port += 7
        if not port and kept is not None:
            uplink.mappings[usual] = kept
        elif not uplink.symmetric or uplink.forwarded:
            uplink.mappings[usual] = Mapping(uplink.next_port, self.now)
        if public_ip is not None:
            uplink.public_ip = public_ip

    def readdress(self, name: str, uplink: Uplink, ip: str) -> None:
        """The link gets another local address."""
        uplink.ip = ip
        uplink.forget()
        self.network_event(name)

    def link(self, name: str, uplink: Uplink, *, up: bool) -> None:
        """The interface goes down, or comes back behind a NAT that has forgotten it."""
        uplink.up = up
        uplink.forget()
        self.network_event(name)

    def reach_broker(self, name: str) -> None:
        """The host's connection to the broker is gone, and made anew where that is possible."""
        if not self.rendezvous:
            return
        host = self.hosts[name]
        host.connections += 1
        if host.connected:
            host.connected = False
            host.node.signaller_disconnected(self.now)
            self.pump(host)

        def connect(number: int = host.connections, node: Node = host.node) -> None:
            alive = any(u.up and not u.black_hole for u in host.uplinks)
            if host.node is not node or host.connections != number or host.stopped:
                return
            if not (alive and self.broker_up):
                self.after(0.2, connect)
                return
            host.connected = True
            node.signaller_connected(self.now)
            self.pump(host)

        self.after(BROKER_ROUND_TRIPS * 2 * self.delay, connect)

    def stop(self, name: str) -> None:
        """The process dies without a word."""
        self.hosts[name].stopped = True

    def suspend(self, name: str) -> None:
        """The process stops; nothing reaches it, no timer fires."""
        self.hosts[name].stopped = True

    def resume(self, name: str) -> None:
        """The suspended process goes on, and sees that its clock jumped."""
        host = self.hosts[name]
        host.stopped = False
        host.armed = None
        host.node.resumed(self.now)
        self.pump(host)

    # plumbing

    def pump(self, host: Host) -> None:
        """What the shell does after every input: send, report failures, write, look at events."""
        node = host.node
        if host.waiting:
            node.receive_packets(list(host.waiting), self.now)
            host.waiting.clear()
        for _ in range(SEND_ROUNDS):
            failed: list[tuple[PathKey, int]] = []
            for key, data in node.datagrams_to_send(self.now):
                error = self._depart(host, key, data)
                if error:
                    failed.append((key, error))
            for key, error in failed:
                node.send_failed(key, error, self.now)
            if not failed:
                break
        host.received += [(self.now, packet) for packet in node.packets_to_write()]
        for topic, payload in node.signals_to_send(self.now):
            self._publish(host, topic, payload)
        while (event := node.next_event()) is not None:
            host.events.append((self.now, event))
            if isinstance(event, ResolveWanted):
                self.after(0.0, lambda event=event: self._resolve(host, event))  # type: ignore[misc]
            elif isinstance(event, PortWanted):
                self.after(0.0, lambda event=event: self._open_port(host, event))  # type: ignore[misc]
            elif isinstance(event, PortUnwanted):
                host.ports.discard(event.local)
        self._arm(host)

    def _publish(self, host: Host, topic: str, payload: bytes) -> None:
        if not host.connected or not self.broker_up:
            return
        host.signals_sent += 1

        def hand_over(other: Host) -> None:
            if other.connected and not other.stopped:
                other.node.signal_received(topic, payload, self.now)
                self.pump(other)

        def distribute() -> None:
            for other in self.hosts.values():
                if not other.connected:
                    continue
                meeting = other.node.meeting
                if meeting is not None and topic in meeting.topics():
                    self.after(self.delay, lambda other=other: hand_over(other))  # type: ignore[misc]

        self.after(self.delay, distribute)

    def _stun(self, source: Address, target: Address, data: bytes) -> None:
        if target in (STUN, OTHER_STUN):
            answer = stun.Message(
                stun.Method.BINDING,
                stun.Class.RESPONSE,
                transaction_id_of(data),
                {"XOR-MAPPED-ADDRESS": tuple(source)},
            )
            if self.other_stun:
                answer.attributes["OTHER-ADDRESS"] = tuple(OTHER_STUN)
            self.deliver(target, source, bytes(answer), self.delay)

    def _resolve(self, host: Host, event: ResolveWanted) -> None:
        if not host.stopped:
            addresses = [Address(e.host, e.port) for e in event.endpoints]
            host.node.endpoints_resolved(event.peer, addresses, self.now)
            self.pump(host)

    def _open_port(self, host: Host, event: PortWanted) -> None:
        if not host.stopped and host.uplink_of(event.ip) is not None:
            self._next_port += 1
            local = Address(event.ip, self._next_port)
            host.ports.add(local)
            host.peak_ports = max(host.peak_ports, len(host.ports))
            host.node.port_opened(local, self.now, spread=event.spread)
            self.pump(host)

    def _arm(self, host: Host) -> None:
        timer = host.node.get_timer()
        if timer is None or timer == host.armed:
            return
        host.armed = timer
        late = timer <= self.now and host.fired_at == self.now

        def fire(node: Node = host.node, due: float = timer) -> None:
            if host.node is node and host.armed == due and not host.stopped:
                host.armed = None
                host.fired_at = self.now
                host.spins = host.spins + 1 if late else 0
                assert host.spins < MAX_SPINS, f"seed {self.seed}: {host.name}'s timer spins"
                node.handle_timer(self.now)
                self.pump(host)

        self.at(max(timer, self.now) + TIMER_GRAIN, fire)

    def _depart(self, host: Host, key: PathKey, data: bytes) -> int:
        """Send; the errno that the kernel of this host would answer with at once, 0 for none."""
        if key.local in host.relays:
            return self._depart_relayed(host.relays[key.local], key, data)
        uplink = host.uplink_of(key.local.host)
        if uplink is None or (key.local.port != PORT and key.local not in host.ports):
            return errno.ENETUNREACH
        if len(data) > uplink.mtu:
            return errno.EMSGSIZE
        host.bytes_sent += len(data)
        host.datagrams_sent += 1
        source = uplink.outside(key.remote, self.now, key.local.port)
        if self.tap is not None:
            self.tap(host, PathKey(source, key.remote), data)
        if uplink.black_hole or uplink.mute or key.local.port in uplink.dead_ports:
            return 0
        if len(data) > self.mtu or self.rng.random() < self.loss:
            return 0
        if uplink.loss and self.rng.random() < uplink.loss:
            return 0
        delay = self.delay + uplink.delay + self.rng.random() * self.jitter
        self.deliver(source, key.remote, data, delay)
        return 0

    def _depart_relayed(self, allocation: Allocation, key: PathKey, data: bytes) -> int:
        """To the server, and out of it, with the permission that it needs for the answer."""
        uplink = allocation.uplink
        if not uplink.up:
            return errno.EADDRNOTAVAIL
        if len(data) + 4 > uplink.mtu:
            return errno.EMSGSIZE
        allocation.permitted.add(key.remote.host)
        if not uplink.black_hole and not uplink.mute and self.rng.random() >= self.loss:
            self.deliver(key.local, key.remote, data, 2 * self.delay + uplink.delay)
        return 0

    def _arrive_relayed(
        self, host: Host, allocation: Allocation, source: Address, data: bytes
    ) -> None:
        uplink, local = allocation.uplink, allocation.relay.address
        if source.host not in allocation.permitted or uplink.black_hole or uplink.deaf:
            return

        def hand_over() -> None:
            if not host.stopped and uplink.up and local in host.relays:
                host.node.receive_datagram(data, PathKey(local, source), self.now)
                self.pump(host)

        self.after(self.delay + uplink.delay, hand_over)

    def deliver(self, source: Address, target: Address, data: bytes, delay: float) -> None:
        """Carry a datagram across the network to whatever NAT owns the target address."""
        self.after(delay, lambda: self._arrive(source, target, data))

    def _arrive(self, source: Address, target: Address, data: bytes) -> None:
        if target.host in self.outsiders:
            self.outsiders[target.host](source, target, data)
            return
        relayed = any(source in host.relays for host in self.hosts.values())
        for host in self.hosts.values():
            if target in host.relays:
                self._arrive_relayed(host, host.relays[target], source, data)
                return
            for uplink in host.uplinks if self.direct or relayed else ():
                if uplink.public_ip != target.host or not uplink.up:
                    continue
                if uplink.black_hole or uplink.deaf:
                    continue
                if uplink.loss and self.rng.random() < uplink.loss:
                    continue
                port = uplink.lets_in(source, target.port, self.now)
                if port is None:
                    continue
                self.after(
                    uplink.delay,
                    lambda host=host, uplink=uplink, port=port: self._hand_over(  # type: ignore[misc]
                        host, uplink, port, source, data
                    ),
                )

    def _hand_over(
        self, host: Host, uplink: Uplink, port: int, source: Address, data: bytes
    ) -> None:
        local = Address(uplink.ip, port)
        if host.stopped or not uplink.up or (port != PORT and local not in host.ports):
            return
        key = PathKey(local, source)
        host.node.receive_datagram(data, key, self.now)
        self.pump(host)

    # looking

    def state(self, name: str) -> str:
        return self.peer(name).state

    @property
    def both_up(self) -> bool:
        return self.state("a") == self.state("b") == "up"

    def peer(self, name: str) -> Peer:
        """The one peer of this host's node."""
        return next(iter(self.hosts[name].node.peers.values()))

    def active(self, name: str) -> PathKey:
        session = self.peer(name).session
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


def _config(host: Host, other: Host, endpoints: list[str], paths: str) -> Config:
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
{paths}""",
        "simulated.toml",
    )
