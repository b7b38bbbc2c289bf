"""Relays: addresses at TURN servers, and how the engine sends from them without knowing of TURN.

The engine knows UDP sockets and nothing else. So each relay has a socket on the loopback interface
that the engine has like any other, and for each peer address that data goes to another one, the
*shim*, connected to it. To the engine the shim is the peer:

    engine -- its socket --(loopback)-- shim -- ChannelData -- server -- peer

Runs of datagrams cross the loopback as one message each way (UDP_SEGMENT, UDP_GRO); here the 4
bytes of ChannelData are put on or taken off. What is not the engine's, checks and handshakes, does
not take that way: `send` and `received` pass it between the node and the server.

Where relays are asked for (`places`): for each family of relayed addresses, from the best address
of the best two interfaces that reach a server by that family, or from the best one by the other
family. At each place the ways to the servers are tried in the order of the configuration: the next
one after 0.3 s without success, or at once when one fails, and the first that succeeds is used.
So a server is reached over TCP where UDP is blocked, and a second server where the first is down.

A relay that ends is asked for anew, at once if it lived for a while. All that has failed is tried
again after 1 s, doubled up to 60 s, and at once when the network changes.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunnel.config import Endpoint, TurnConfig
from tunnel.config_values import parse_turn_url
from tunnel.errors import ConfigError
from tunnel.ice.candidate import Relay
from tunnel.ice.turn import Allocated, Allocation, Ended, Received
from tunnel.ice.turn_message import CHANNEL_HEADER, REASONS, Problem
from tunnel.obstacle import Obstacle, Reason, relay_remedy
from tunnel.path.network import Address, LocalNetwork, PathKey, is_usable_remote
from tunnel.shell import clock
from tunnel.shell.carrier import MAX_SEGMENTS, Carrier, StreamCarrier, UdpCarrier
from tunnel.shell.log import Log
from tunnel.shell.resolver import Lookup, Resolver, lookup
from tunnel.shell.secret import read_password
from tunnel.shell.udp import UDP_SEGMENT, UdpSocket, device_for, open_udp, segment_size

HEAD_START = 0.3
"""Seconds that a way to a server has before the next one is tried beside it: who is behind a
firewall that swallows UDP waits for it each time (RFC 8305 section 5 recommends 250 ms)."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0  # seconds
HOPELESS_RETRY = 60.0
"""Seconds until a server that said no, not now but for good, is asked again."""
UNSUPPORTED_RETRY = 600.0
"""The same where it cannot: it would have to be configured otherwise."""
STEADY = 10.0
"""Seconds that a relay must have lived for its end to be no failure."""
RESTARTS = 2
"""Of a way whose server wants another port or names another server, in a row."""
INTERFACES = 2
ADDRESSES = 2  # of one server that are tried
SHIM_IDLE = 600.0
"""Seconds without any packet after which a shim is closed: paths are checked every 15."""
MAX_SHIMS = 64  # at each relay
READS = 8  # messages of a shim in one wake-up, each up to 64 kB
LOOPBACK = "127.0.0.1"

_FOR_GOOD = frozenset({Problem.CREDENTIALS, Problem.REFUSED, Problem.UNSUPPORTED})
_MESSAGE = 65507
_CONTROL = socket.CMSG_SPACE(struct.calcsize("=i"))


@dataclass(frozen=True, slots=True)
class Server:
    """One of the configuration."""

    url: str
    endpoint: Endpoint
    transports: tuple[str, ...]
    config: TurnConfig

    @classmethod
    def of(cls, config: TurnConfig) -> Server:
        endpoint, transports = parse_turn_url(config.url)
        return cls(config.url, endpoint, transports, config)

    def password(self) -> str:
        """Read anew each time, so that it can be changed while the tunnel is up. Raises ConfigError
        and ValueError."""
        file = self.config.password_file
        return "" if file is None else read_password(file).decode()


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this host a relay is asked for, and of which family."""

    ip: str
    interface: str
    ipv6: bool


@dataclass(frozen=True, slots=True)
class Way:
    """To a server, from a place."""

    server: Server
    transport: str
    address: Address


def places(network: LocalNetwork, servers: Iterable[Address]) -> list[Place]:
    """Where relays are to be asked for at servers with these addresses; see the module."""
    servers = list(servers)
    found: dict[bool, list[Place]] = {}
    for ipv6 in (False, True):
        best: dict[str, str] = {}
        for server in servers:
            if server.is_ipv6 == ipv6:
                for source in network.sources(server.host):
                    best.setdefault(source.interface, source.ip)
        found[ipv6] = [Place(ip, each, ipv6) for each, ip in list(best.items())[:INTERFACES]]
    both = [*found[False], *found[True]]
    for ipv6 in (False, True):
        if not found[ipv6]:
            both += [Place(place.ip, place.interface, ipv6) for place in found[not ipv6][:1]]
    return both


def ways(
    network: LocalNetwork,
    place: Place,
    servers: Sequence[Server],
    resolved: Mapping[Server, Sequence[Address]],
) -> list[Way]:
    """All from one place, in the order of trial."""
    found: list[Way] = []
    for server in servers:
        near = [
            address
            for address in resolved.get(server, ())
            if any(source.ip == place.ip for source in network.sources(address.host))
        ]
        found += [
            Way(server, transport, address)
            for transport in server.transports
            for address in near[:ADDRESSES]
        ]
    return found


class Relays:
    """All relays of a host. To be made in the running loop.

    `changed` is told all that there are whenever that changes, never from inside a call of ours.
    `opened` and `closing` are as those of `UdpSockets`, for the engine's side. `received` gets
    datagrams that are for the node.
    """

    def __init__(
        self,
        turn: Sequence[TurnConfig],
        *,
        changed: Callable[[tuple[Relay, ...]], None],
        opened: Callable[[UdpSocket], None],
        closing: Callable[[UdpSocket], None],
        received: Callable[[list[tuple[bytes, PathKey]]], None],
        lookup: Lookup = lookup,
    ) -> None:
        self.gone = 0
        """Datagrams that were dropped on the way to servers that are not in use any more."""
        self.loop = asyncio.get_running_loop()
        self.rng = random.SystemRandom()
        self.received = received
        self._changed = changed
        self._opened, self._closing = opened, closing
        self._servers = list(dict.fromkeys(Server.of(config) for config in turn))
        self._resolved: dict[Server, list[Address]] = {}
        self._resolver = Resolver(self.loop, self._on_resolved, lookup)
        self._asked = False
        self._network = LocalNetwork()
        self._slots: dict[Place, _Slot] = {}
        self._live: dict[Address, _Live] = {}
        self._engine_side: dict[Address, _Live] = {}
        self._telling = False
        self._closed = False

    # ---- what the driver asks ----

    @property
    def dropped(self) -> int:
        """Datagrams that a full queue had no room for."""
        return self.gone + sum(slot.dropped for slot in self._slots.values())

    @property
    def relays(self) -> tuple[Relay, ...]:
        """All that there are now."""
        return tuple(live.relay for live in self._live.values())

    def network_changed(self, network: LocalNetwork) -> None:
        """A full snapshot: relays follow the addresses of this host."""
        if network == self._network:
            return
        self._network = network
        if not self._asked:
            self._asked = True
            self.resolve()
        self._resolver.retry()
        self._arrange()
        for slot in self._slots.values():
            slot.network_changed()

    def resumed(self) -> None:
        """The host slept: timers are late, and servers may have forgotten us."""
        for slot in self._slots.values():
            slot.network_changed()

    def owns(self, local: Address) -> bool:
        """Whether this is the address of a relay."""
        return local in self._live

    def socket_of(self, key: PathKey) -> tuple[UdpSocket, Address] | None:
        """The engine's socket for a path from a relay, and the address that stands for the peer."""
        live = self._live.get(key.local)
        shim = None if live is None else live.shim(key.remote)
        return None if live is None or shim is None else (live.udp, shim.local)

    def path_of(self, local: Address, remote: Address) -> PathKey | None:
        """The path of a datagram that came in at the engine's socket `local` from there."""
        live = self._engine_side.get(local)
        return None if live is None else live.path_of(remote)

    def serves(self, local: Address) -> bool:
        """Whether the engine's socket `local` is one of ours."""
        return local in self._engine_side

    def send(self, key: PathKey, data: bytes) -> int:
        """Send one datagram from a relay: 0, or the errno."""
        live = self._live.get(key.local)
        return errno.EADDRNOTAVAIL if live is None else live.send(key.remote, data)

    def status(self) -> list[dict[str, Any]]:
        """For `status --json`: every way that is in use, is being tried, or has failed."""
        rows = [row for slot in self._slots.values() for row in slot.status()]
        named = {row["server"] for row in rows}
        for server in self._servers:
            if server.url not in named:
                known = server in self._resolved
                error = "no route to it" if known else f"cannot resolve {server.endpoint.host}"
                remedy = "" if known else relay_remedy("name")
                rows.append(_row(server.url, error=error, remedy=remedy))
        return rows

    def obstacles(self) -> list[Obstacle]:
        """Of each server that gives us no relay, why."""
        rows = self.status()
        given = {row["server"] for row in rows if row["address"] is not None}
        found = [
            Obstacle("relay", f"TURN server {row['server']}: {row['error']}", row["remedy"])
            for row in rows
            if row["error"] and row["server"] not in given
        ]
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Give all addresses back."""
        self._closed = True
        self._resolver.close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()

    # ---- servers and places ----

    def resolve(self) -> None:
        """Look the servers up, again where that was done before."""
        for server in self._servers:
            self._resolver.resolve(server.url, [server.endpoint])

    def _on_resolved(self, url: str, addresses: list[Address]) -> None:
        changed = False
        for server in self._servers:
            if server.url == url and self._resolved.get(server) != addresses:
                self._resolved[server] = addresses
                changed = True
        if changed:
            self._arrange()

    def _arrange(self) -> None:
        """Have a slot at each place, and none elsewhere."""
        everywhere = [a for s in self._servers for a in self._resolved.get(s, ())]
        wanted = places(self._network, everywhere)
        for place in [place for place in self._slots if place not in wanted]:
            self._slots.pop(place).close()
        for place in wanted:
            found = ways(self._network, place, self._servers, self._resolved)
            device = device_for(place.ip, self._network)
            if place in self._slots:
                self._slots[place].follow(found, device)
            else:
                self._slots[place] = _Slot(self, place, found, device)
                self._slots[place].begin()

    # ---- what slots and relays tell ----

    def up(self, live: _Live) -> bool:
        """A relay begins; False where the engine cannot have its socket."""
        if live.relay.address in self._live:
            return False  # two servers with one address: one of them lies
        try:
            self._opened(live.udp)
        except OSError:
            return False
        self._live[live.relay.address] = live
        self._engine_side[live.udp.local] = live
        self._tell()
        return True

    def down(self, live: _Live) -> None:
        """A relay is no more."""
        del self._live[live.relay.address]
        del self._engine_side[live.udp.local]
        self._closing(live.udp)
        self._tell()

    def _tell(self) -> None:
        if not self._telling and not self._closed:
            self._telling = True
            self.loop.call_soon(self._told)

    def _told(self) -> None:
        self._telling = False
        if not self._closed:
            self._changed(self.relays)


class _Slot:
    """A place, and what is done there to have a relay."""

    def __init__(self, relays: Relays, place: Place, found: list[Way], device: str) -> None:
        self.relays = relays
        self.place = place
        self.device = device
        self._ways = found
        self._left: list[Way] = []
        self._attempts: list[_Attempt] = []
        self.failures: dict[Way, tuple[Reason, str]] = {}
        """What became of the last attempt at each way; told until one succeeds."""
        self._used: _Attempt | None = None
        self._used_since = 0.0
        self._failures = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Try all ways, from the first."""
        self._stop()
        self._left = list(self._ways)
        self._next()

    def follow(self, found: list[Way], device: str) -> None:
        """There are these ways now."""
        self.device = device
        if found != self._ways:
            self._ways = found
            self.failures = {way: why for way, why in self.failures.items() if way in found}
            if self._used is None or self._used.way not in found:
                self.begin()

    def network_changed(self) -> None:
        if self._used is not None:
            self._used.check()
        elif self._failures:
            self._failures = 0
            self.begin()

    def close(self) -> None:
        self._stop()
        self._ways = []

    @property
    def dropped(self) -> int:
        return sum(attempt.dropped for attempt in self._attempts)

    def status(self) -> list[dict[str, Any]]:
        """A way that waits for its turn is nothing to tell of, unless it has failed before."""
        told = [attempt for attempt in self._attempts if attempt.worth_telling]
        tried = {attempt.way for attempt in self._attempts}
        told += [
            _Attempt(self, way)
            for way, (reason, _) in self.failures.items()
            if way not in tried and reason != "unsupported"
        ]
        return [attempt.status() for attempt in told]

    def _stop(self) -> None:
        self._cancel()
        for attempt in self._attempts:
            attempt.close()
        self._attempts, self._used, self._left = [], None, []

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        """Try one way more."""
        self._cancel()
        while self._left and self._used is None:
            attempt = _Attempt(self, self._left.pop(0))
            self._attempts.append(attempt)
            if attempt.start():
                break
        if self._used is not None:
            return
        if self._left:
            self._timer = self.relays.loop.call_later(HEAD_START, self._next)
        elif not any(attempt.under_way for attempt in self._attempts):
            self._failed()

    def _failed(self) -> None:
        problems = {attempt.problem for attempt in self._attempts}
        wait = min(FIRST_RETRY * 2.0**self._failures, LAST_RETRY)
        if problems == {Problem.UNSUPPORTED}:
            wait = UNSUPPORTED_RETRY
        elif problems <= _FOR_GOOD:
            wait = HOPELESS_RETRY
        self._failures += 1
        self._timer = self.relays.loop.call_later(wait, self._again)

    def _again(self) -> None:
        self.relays.resolve()  # a server may have moved
        self.begin()

    def succeeded(self, attempt: _Attempt) -> None:
        """The first way: the others are not needed."""
        self._cancel()
        self._used, self._used_since = attempt, clock.now()
        for other in self._attempts:
            if other is not attempt:
                other.close()
        self._left = []

    def ended(self, attempt: _Attempt) -> None:
        """A way leads nowhere, or not any more."""
        if self._used is not attempt:
            if attempt.problem in _FOR_GOOD:  # over TCP it would say the same
                self._left = [way for way in self._left if way.server != attempt.way.server]
            if self._used is None:
                self._next()
            return
        self._used = None
        if clock.now() >= self._used_since + STEADY:
            self._failures = 0
            self.relays.loop.call_soon(self._begin_anew)
        else:
            self._failed()

    def _begin_anew(self) -> None:
        if self._used is None and self._ways:
            self.begin()


class _Attempt:
    """One way to a server, and the allocation there."""

    def __init__(self, slot: _Slot, way: Way) -> None:
        self.way = way
        self.problem: Problem | None = None
        self._slot = slot
        self._carrier: Carrier | None = None
        self._allocation: Allocation | None = None
        self._live: _Live | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tries = 0

    @property
    def under_way(self) -> bool:
        return self._carrier is not None and self._live is None

    @property
    def worth_telling(self) -> bool:
        """Not that a server has no IPv6, which is common, nor of a way that was not needed."""
        common = Problem.UNSUPPORTED if self._slot.place.ipv6 else None
        return self._carrier is not None or self.problem not in (None, common)

    @property
    def dropped(self) -> int:
        return 0 if self._carrier is None else self._carrier.dropped

    def start(self) -> bool:
        """Begin; False when that failed at once, in which case nobody else is told."""
        return self._start(self.way.address)

    def _start(self, address: Address) -> bool:
        relays, place, way = self._slot.relays, self._slot.place, self.way
        stream = way.transport != "udp"
        self._tries += 1
        try:
            password = way.server.password()
        except ConfigError as error:
            text = f"{way.server.config.password_file}: {error}"
            return self._give_up(Problem.REFUSED, text, "other")
        except ValueError:
            return self._give_up(Problem.REFUSED, "the password is not UTF-8 text", "other")
        self._allocation = Allocation(
            username=way.server.config.username,
            password=password,
            ipv6=place.ipv6,
            stream=stream,
            rng=relays.rng,
        )
        try:
            if stream:
                self._carrier = StreamCarrier(
                    place.ip,
                    self._slot.device,
                    address,
                    context=_tls() if way.transport == "tls" else None,
                    host=way.server.endpoint.host,
                    ready=self._ready,
                    deliver=self._deliver,
                    lost=self._lost,
                )
            else:
                self._carrier = UdpCarrier(
                    place.ip, self._slot.device, address, deliver=self._deliver
                )
                self._ready()
        except OSError as error:
            return self._give_up(Problem.NO_ANSWER, error.strerror or str(error), "other")
        return True

    def _give_up(self, problem: Problem, text: str, reason: Reason) -> bool:
        self.problem = problem
        self._slot.failures[self.way] = reason, text
        self._close_carrier()
        return False

    def check(self) -> None:
        """Is it still there?"""
        if self._allocation is not None:
            self._allocation.check(clock.now())
            self.flush()

    def close(self) -> None:
        if self._allocation is not None and self._carrier is not None:
            self._allocation.close(clock.now())
            for message in self._allocation.messages_to_send(clock.now()):
                self._carrier.send(message)
        self._close_carrier()

    def _close_carrier(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        live, self._live = self._live, None
        if live is not None:
            live.close()
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            self._slot.relays.gone += carrier.dropped
            carrier.close()

    def status(self) -> dict[str, Any]:
        place, live = self._slot.place, self._live
        state = "allocated" if live is not None else "asking" if self._carrier else "failed"
        reason, error = self._slot.failures.get(self.way, ("", ""))
        return _row(
            self.way.server.url,
            transport=self.way.transport,
            local=place.ip,
            interface=place.interface,
            address=None if live is None else str(live.relay.address),
            state=state,
            error=error,
            remedy=relay_remedy(reason),
        )

    # ---- the allocation ----

    def _ready(self) -> None:
        assert self._allocation is not None
        self._allocation.start(clock.now())
        self.flush()

    def _lost(self, reason: Reason, text: str) -> None:
        self._ended(Problem.NO_ANSWER, text, reason=reason)

    def _deliver(self, messages: list[memoryview]) -> None:
        allocation, live = self._allocation, self._live
        assert allocation is not None
        now = clock.now()
        for message in messages:
            if live is None or len(message) < CHANNEL_HEADER.size or message[0] & 0xC0 != 0x40:
                allocation.receive(bytes(message), now)
                continue
            number, length = CHANNEL_HEADER.unpack_from(message)
            remote = allocation.remote_of(number)
            payload = message[CHANNEL_HEADER.size : CHANNEL_HEADER.size + length]
            if remote is not None and length == len(payload):
                live.take(remote, payload)
        if live is not None:
            allocation.heard(now)
        self.flush()

    def flush(self) -> None:
        """Send what the allocation wants sent, hear what it has to tell, wake it when it wants."""
        allocation, carrier = self._allocation, self._carrier
        if allocation is None or carrier is None:
            return
        now = clock.now()
        for message in allocation.messages_to_send(now):
            carrier.send(message)
        while (event := allocation.next_event()) is not None:
            match event:
                case Allocated(relayed):
                    self._allocated(relayed)
                case Received(remote, data):
                    if self._live is not None:
                        self._live.take(remote, memoryview(data))
                case Ended(problem, text, elsewhere):
                    if self._live is not None:
                        self._live.pass_on()
                    self._ended(problem, text, elsewhere)
                    return
        if self._live is not None:
            self._live.pass_on()
        if self._carrier is carrier:  # what was passed on may have changed anything
            self._arm(allocation, now)

    def _arm(self, allocation: Allocation, now: float) -> None:
        deadline = allocation.get_timer()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= self._when(deadline, now):
                return  # an idle wake-up costs less than a new timer for each packet
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._slot.relays.loop.call_at(self._when(deadline, now), self._on_timer)

    def _when(self, deadline: float, now: float) -> float:
        return self._slot.relays.loop.time() + max(0.0, deadline - now)

    def _on_timer(self) -> None:
        self._timer = None
        if self._allocation is not None:
            self._allocation.handle_timer(clock.now())
            self.flush()

    def _allocated(self, relayed: Address) -> None:
        assert self._allocation is not None and self._carrier is not None
        relays, place = self._slot.relays, self._slot.place
        relay = Relay(relayed, place.interface, place.ip, self.way.server.url, self.way.transport)
        try:
            live = _Live(relays, relay, self._allocation, self._carrier, self.flush)
        except OSError as error:
            self._ended(Problem.NO_ANSWER, f"no socket: {error.strerror}", reason="other")
            return
        if not live.begin():
            self._ended(Problem.REFUSED, f"the address {relayed} is in use already")
            return
        self._live = live
        self._slot.failures.pop(self.way, None)
        fields = {"relayed": relayed, "server": self.way.server.url, "over": self.way.transport}
        _log.info("relay", **fields, local=place.ip)
        self._slot.succeeded(self)

    def _ended(
        self,
        problem: Problem,
        text: str,
        elsewhere: Address | None = None,
        *,
        reason: Reason | None = None,
    ) -> None:
        if reason is None:
            reason = REASONS.get(problem, "other")
        was_live = self._live is not None
        if was_live or problem is not Problem.UNSUPPORTED:
            # A way that fails again and again for the same reason is told of once.
            old = not was_live and self._slot.failures.get(self.way) == (reason, text)
            (_log.debug if old else _log.warning)(
                "relay lost" if was_live else "no relay",
                server=self.way.server.url, over=self.way.transport, local=self._slot.place.ip,
                error=text, remedy=relay_remedy(reason) or None,
            )  # fmt: skip
        self._give_up(problem, text, reason)
        again = self.way.address if problem is Problem.MISMATCH else elsewhere
        if again is not None and not is_usable_remote(again.host):
            again = None
        if not was_live and again is not None and self._tries <= RESTARTS and self._start(again):
            self.problem = None
            return
        self._slot.ended(self)


class _Live:
    """A relay in use: the engine's socket, and the shims."""

    def __init__(
        self,
        relays: Relays,
        relay: Relay,
        allocation: Allocation,
        carrier: Carrier,
        flush: Callable[[], None],
    ) -> None:
        self.relay = relay
        self.udp = UdpSocket(LOOPBACK, 0, "")
        self._relays = relays
        self._allocation, self._carrier = allocation, carrier
        self._flush = flush
        self._shims: dict[Address, _Shim] = {}
        self._raw: list[tuple[bytes, PathKey]] = []
        self._buffer = memoryview(bytearray(1 << 16))

    def begin(self) -> bool:
        if self._relays.up(self):
            return True
        self.udp.close()
        return False

    def close(self) -> None:
        self._raw.clear()
        self._relays.down(self)
        self.udp.close()
        for remote in list(self._shims):
            self._close(remote)

    def path_of(self, local: Address) -> PathKey | None:
        for remote, shim in self._shims.items():
            if shim.local == local:
                return PathKey(self.relay.address, remote)
        return None

    # ---- out ----

    def send(self, remote: Address, data: bytes) -> int:
        """From the node: checks, handshakes, challenges."""
        now = clock.now()
        message = self._allocation.wrap(remote, data, now)
        if message is None:
            return errno.EACCES
        self._flush()  # what it may need: a permission
        shim = self._shims.get(remote)
        if shim is not None:
            shim.used_at = now
        return self._carrier.send(message)

    def shim(self, remote: Address) -> _Shim | None:
        """What stands for `remote` on the loopback, made if need be."""
        now = clock.now()
        shim = self._shims.get(remote)
        if shim is None:
            for idle in [r for r, s in self._shims.items() if s.used_at < now - SHIM_IDLE]:
                self._close(idle)
            if len(self._shims) >= MAX_SHIMS:
                return None
            try:
                shim = _Shim(self.udp.local, now)
            except OSError as error:
                _log.warning("no socket for a relayed path", error=error.strerror or error)
                return None
            self._shims[remote] = shim
            self._relays.loop.add_reader(shim.fileno(), self._forward, remote, shim)
        shim.used_at = now
        self._allocation.bind(remote, now)
        self._flush()
        return shim

    def _close(self, remote: Address) -> None:
        shim = self._shims.pop(remote)
        self._relays.loop.remove_reader(shim.fileno())
        shim.close()

    def _forward(self, remote: Address, shim: _Shim) -> None:
        """From the engine to the server."""
        now = clock.now()
        shim.used_at = now
        for _ in range(READS):
            received = shim.receive(self._buffer)
            if received is None:
                break
            length, segment = received
            data = self._buffer[:length]
            channel = self._allocation.channel(remote, now)
            if channel is not None:
                self._carrier.send_run(channel, data, segment)
                continue
            for at in range(0, length, segment):
                message = self._allocation.wrap(remote, bytes(data[at : at + segment]), now)
                self._flush()
                if message is not None:
                    self._carrier.send(message)
        self._allocation.bind(remote, now)
        self._flush()

    # ---- in ----

    def take(self, remote: Address, payload: memoryview) -> None:
        """A datagram of `remote`: a 1-RTT packet to a peer the engine knows, or the node's."""
        if not payload:
            return  # anybody can send an empty one to a relayed address
        shim = self._shims.get(remote)
        if shim is not None and payload[0] & 0xC0 == 0x40:
            shim.add(payload)
        else:
            self._raw.append((bytes(payload), PathKey(self.relay.address, remote)))

    def pass_on(self) -> None:
        """What was taken: the messages it was in are about to go."""
        for shim in self._shims.values():
            shim.pass_on()
        if self._raw:
            raw, self._raw = self._raw, []
            self._relays.received(raw)


class _Shim:
    """A peer's address on the loopback: a socket connected to the engine's. Raises OSError."""

    def __init__(self, engine: Address, now: float) -> None:
        self.used_at = now
        self.dropped = 0
        self._socket = open_udp(LOOPBACK, 0, "")
        try:
            self._socket.connect((engine.host, engine.port))
        except OSError:
            self._socket.close()
            raise
        self.local = Address.from_sockaddr(self._socket.getsockname())
        self._parts: list[memoryview] = []
        self._size = 0
        self._bytes = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, buffer: memoryview) -> tuple[int, int] | None:
        """A run of datagrams: bytes in all, and of each but the last; None when there is none."""
        try:
            length, control, _, _ = self._socket.recvmsg_into([buffer], _CONTROL)
        except OSError:
            return None
        return (length, segment_size(control) or length) if length else None

    def add(self, payload: memoryview) -> None:
        """For the engine: in one message with its like."""
        size = len(payload)
        if self._parts and (
            size > self._size or len(self._parts) == MAX_SEGMENTS or self._bytes + size > _MESSAGE
        ):
            self.pass_on()
        if not self._parts:
            self._size = size
        self._parts.append(payload)
        self._bytes += size
        if size < self._size:
            self.pass_on()  # only the last one may be shorter

    def pass_on(self) -> None:
        parts, self._parts, self._bytes = self._parts, [], 0
        if not parts:
            return
        control = []
        if len(parts) > 1:
            control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", self._size))]
        try:
            self._socket.sendmsg(parts, control)
        except OSError:  # the engine's socket is full
            self.dropped += len(parts)


def _row(server: str, **known: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "server": server,
        "transport": None,
        "local": None,
        "interface": None,
        "address": None,
        "state": "waiting",
        "error": "",
        "remedy": "",
    }
    return row | known


_contexts: list[ssl.SSLContext] = []


def _tls() -> ssl.SSLContext:
    """Made once: it reads the system's certificates."""
    if not _contexts:
        _contexts.append(ssl.create_default_context())
    return _contexts[0]


_log = Log("relay")
