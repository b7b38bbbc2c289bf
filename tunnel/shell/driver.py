"""Between the node, which does no I/O, and the I/O: datagrams, packets, the network, time.

Bulk never comes here: the native engine moves batches between the TUN and the sockets by itself,
and asks for us only when it has news. The rest is one turn, run for whatever wakes the loop: look
at the clock, feed the node, and drain it:

    the engine has news --+                       +--> control datagrams out of the sockets
    raw datagrams --------+--> node (one input) --+--> events: logs, names to resolve, pings
    netlink rings --------+                       +--> the engine sends on
    the alarm is due -----+                       +--> one alarm armed

An exception in a turn is a bug of ours; it is logged and counted, and the tunnel goes on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from tun.device import TunDevice
from tun.errors import TunError
from tun.linux import read_failure
from tunnel.config import RendezvousConfig, TurnConfig
from tunnel.config_change import Change
from tunnel.datapath.engine import Path
from tunnel.errors import LocalError
from tunnel.events import (
    BenchAnswer,
    BenchWanted,
    NodeEvent,
    Obstructed,
    PeerConnecting,
    PeerHolding,
    PeerMigrated,
    PeerRefused,
    PeerUp,
    PingReply,
    PortUnwanted,
    PortWanted,
    ResolveWanted,
)
from tunnel.ice.candidate import Relay
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.shell import clock, crypto
from tunnel.shell.bench import Benches, BenchRefused
from tunnel.shell.clock import HEARTBEAT, Alarm, JumpDetector
from tunnel.shell.log import Log
from tunnel.shell.mqtt import Signaller
from tunnel.shell.netmon import NetworkMonitor
from tunnel.shell.ports import Follower, Node
from tunnel.shell.relay import Relays
from tunnel.shell.resolver import Resolver
from tunnel.shell.udp import UdpSocket, UdpSockets, pack, unpack

NETWORK_PAUSE = 0.001
"""Least seconds between two looks at the network. The first event of a burst is acted on at once;
the rest, some tens within a millisecond when a link goes, are looked at once more together."""

NETWORK_SHARE = 0.2
"""Share of the time that looking may take in a storm of events. A look takes 0.2 ms on a laptop,
but grows with the routing table."""

FOLLOW_AFTER = 0.25
"""Seconds from a change of the network to what follows it (`ports.Follower`): none of it is in a
hurry, a new announcement on the link alone takes 5 ms, and that is when packets must move."""

NETWORK_RETRY = 1.0
"""Seconds until the next look when the kernel did not answer, or an address could not be bound."""

CLOSE_TIMEOUT = 1.0
"""Seconds that a closing node gets to say goodbye."""

SEND_ROUNDS = 4
"""How often a turn asks the node again after failed sends, so that it can move to another path at
once; a node that answers each failure with another hopeless path waits a moment then."""

NO_SOCKET = -1
"""What the engine is told of a path whose local address is gone."""

BREATHER = 0.02
"""Seconds: what would come again at once must not spin the loop: a timer whose handler fails, or
news of the engine that the rounds of a turn did not come to the end of."""


class Driver:
    """Drives one node in the running loop. Implements `status.Control`.

    `reload` reads the configuration again, changes the interface, and says what is new. `strict`
    is for tests: the first bug ends the tunnel, and `wait()` raises it.
    """

    def __init__(
        self,
        node: Node,
        tun: TunDevice,
        monitor: NetworkMonitor,
        *,
        listen_port: int,
        peers: list[str],
        rendezvous: RendezvousConfig | None = None,
        reload: Callable[[], Change] | None = None,
        turn: Sequence[TurnConfig] = (),
        strict: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._node = node
        self._tun = tun
        self._monitor = monitor
        self._peers = list(peers)
        self._reload = reload
        self._strict = strict
        self._io = node.datapath.drive(
            tun.fileno(), tcp=tun.offload.tcp, udp=tun.offload.udp, aim=self._aim
        )
        self._numbers: dict[Address, int] = {}  # the engine's, of our sockets
        self._locals: dict[int, Address] = {}
        self._sockets = UdpSockets(listen_port, self._watch, self._unwatch)
        self._relays = Relays(
            turn,
            changed=self._on_relays,
            opened=self._watch,
            closing=self._unwatch,
            received=self._on_relayed,
        )
        self._resolver = Resolver(self._loop, self._resolved)
        self._signaller: Signaller | None = None
        if rendezvous is not None and node.meeting is not None:
            self._signaller = Signaller(
                rendezvous,
                will=node.meeting.will,
                connected=lambda: self._turn(self._node.signaller_connected),
                disconnected=lambda: self._turn(self._node.signaller_disconnected),
                received=self._on_signal,
            )
        self._followers: dict[str, Follower] = {}
        self._alarm = Alarm()
        self._jumps = JumpDetector(clock.now(), clock.monotonic())
        self._heartbeat = -inf
        self._network: LocalNetwork | None = None  # as the kernel told it
        self._told: LocalNetwork | None = None  # as the node was told
        self._followed: LocalNetwork | None = None  # as followers were
        self._look_again = -inf
        self._look: asyncio.TimerHandle | None = None
        self._follow: asyncio.TimerHandle | None = None
        self._slept = False
        """Whether followers are to hear of a resume."""
        self._pings: dict[int, Callable[[float], None]] = {}
        self._benches = Benches(tun.name)
        self._offers: dict[int, Callable[[BenchAnswer], None]] = {}
        self._last_token = 0
        self._bugs = 0
        self._bug_logged = -inf
        self._closing: asyncio.TimerHandle | None = None
        self._stopped: asyncio.Future[None] = self._loop.create_future()

    # ---- life ----

    def follow(self, name: str, follower: Follower) -> None:
        """Have this follow the network, too; `name` is its key in the status."""
        self._followers[name] = follower
        if self._told is not None:  # what comes late learns how it is
            follower.network_changed(self._told, self._sockets.port)

    def start(self) -> None:
        """Look at the network and begin. Raises LocalError (port in use), OSError."""
        now = clock.now()
        if self._signaller is not None:
            self._signaller.start()
        self._take(self._monitor.snapshot(), now)
        self._loop.add_reader(self._monitor.fileno(), self._on_doorbell)
        self._loop.add_reader(self._alarm.fileno(), self._on_alarm)
        self._loop.add_reader(self._io.fileno(), self._on_engine)
        self._flush(now)

    def down(self) -> None:
        """Begin to close; a second call does not wait for goodbyes any more."""
        if self._stopped.done():
            return
        if self._closing is not None:
            self._finish()
            return
        _log.info("closing")
        self._each(lambda follower: follower.stop())
        self._closing = self._loop.call_later(CLOSE_TIMEOUT, self._finish)
        self._turn(self._node.close)

    async def wait(self) -> None:
        """Until the node has closed. Raises TunError when the device was removed under us."""
        await asyncio.shield(self._stopped)

    async def sign_off(self) -> None:
        """Leave the broker; before `close()`."""
        if self._signaller is not None:
            await self._signaller.close()

    def close(self) -> None:
        """Stop watching and close sockets and alarm; device and monitor belong to the caller."""
        for timer in (self._look, self._follow, self._closing):
            if timer is not None:
                timer.cancel()
        self._resolver.close()
        self._each(lambda follower: follower.close())
        self._benches.close()
        self._loop.remove_reader(self._io.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._loop.remove_reader(self._alarm.fileno())
        self._relays.close()
        self._sockets.close()
        self._io.close()
        self._alarm.close()
        self._finish()

    # ---- what the control socket asks ----

    def status(self) -> dict[str, Any]:
        """The node's status, with the shell's own counters."""
        status = self._node.status(clock.now())
        offload = self._tun.offload
        status["engine"] = {
            **crypto.report(),
            "tun_offload": [kind for kind in ("tcp", "udp") if getattr(offload, kind)],
        }
        obstacles = self._relays.obstacles()
        if self._signaller is not None:
            status["rendezvous"] = {**status.get("rendezvous", {}), **self._signaller.status()}
            obstacles = [*self._signaller.obstacles(), *obstacles]
        status["obstacles"] = [
            *(obstacle.as_json() for obstacle in obstacles),
            *status.get("obstacles", []),
        ]
        status |= {name: follower.status() for name, follower in self._followers.items()}
        status["relays"] = self._relays.status()
        engine = {} if self._stopped.done() else self._io.counters  # it goes with close()
        status["counters"] = {
            **status.get("counters", {}),
            **engine,
            "control_dropped": self._sockets.dropped,
            "control_refused": self._sockets.refused,
            "relay_dropped": self._relays.dropped,
            "internal_errors": self._bugs,
        }
        return status

    def history(self) -> list[dict[str, Any]]:
        """The node's ledger."""
        return self._node.history()

    def peers(self) -> list[str]:
        """Names of the configured peers."""
        return self._peers

    def ping(self, peer: str, answered: Callable[[float], None]) -> Callable[[], None]:
        """Ping `peer`; `answered` gets the round-trip time in seconds. Returns what forgets it."""
        token = self._next_token()
        self._pings[token] = answered
        self._turn(lambda now: self._node.ping(peer, token, now))
        return lambda: self._forget_ping(token)

    def bench(
        self, peer: str, seconds: int, answered: Callable[[BenchAnswer], None]
    ) -> Callable[[], None]:
        """Have `peer` serve a load for `seconds`. Returns what forgets `answered`."""
        token = self._next_token()
        self._offers[token] = answered
        self._turn(lambda now: self._node.bench(peer, token, seconds, now))
        return lambda: self._forget_offer(token)

    # ---- what followers tell ----

    def ports_mapped(self, mapped: dict[Address, Address]) -> None:
        """By local socket, the external addresses that routers have mapped to it, in full."""
        self._turn(lambda now: self._node.mapped_ports_changed(mapped, now))

    def endpoints_found(self, peer: str, addresses: list[Address]) -> None:
        """Where a peer seems to be, in full."""
        self._turn(lambda now: self._node.endpoints_found(peer, addresses, now))

    def reload(self) -> dict[str, list[str]]:
        """Take what is new in the configuration; returns names, as strings.

        Raises ConfigError, LocalError, TunError: then nothing has changed.
        """
        if self._reload is None:
            raise LocalError("this tunnel has no configuration file")
        change = self._reload()

        def feed(now: float) -> None:
            if change.addresses:
                self._node.add_addresses(change.addresses)
            for name in change.removed:
                self._node.remove_peer(name, now)
                self._resolver.forget(name)
            for peer in change.added:
                self._node.add_peer(peer, now)

        self._peers = [name for name in self._peers if name not in change.removed]
        self._peers += [peer.name for peer in change.added]
        if change:
            self._turn(feed)
        news = {
            "addresses": [str(address) for address in change.addresses],
            "added": [peer.name for peer in change.added],
            "removed": list(change.removed),
        }
        _log.info("reloaded", **{key: ",".join(names) for key, names in news.items() if names})
        return news

    # ---- what wakes us ----

    def _on_engine(self) -> None:
        if self._stopped.done() or not self._io.step():
            return
        if self._io.tun_error:
            self._fail(read_failure(self._tun.name, self._io.tun_error))
            return
        # Looked up now: the sockets, and with them the numbers, may change before the node is fed.
        raw = [
            (data, path)
            for number, sockaddr, data in self._io.take_raw()
            if (path := self._path(self._locals[number], unpack(sockaddr))) is not None
        ]
        now = clock.now()
        # An overdue alarm may mean that the process slept, which the node is to hear first.
        if raw or self._alarm.deadline <= now or self._engine_events(now):
            self._turn(lambda now: self._receive(raw, now))
        else:
            self._io.transmit()  # most news only change the rate
            if self._io.eventful():
                self._turn(lambda now: None)

    def _engine_events(self, now: float) -> bool:
        """Tell the node the engine's news; True when it has more to do."""
        try:
            return self._node.engine_events(self._io.eventful(), now)
        except Exception as error:
            self._bug(error, now)
            return True

    def _receive(self, raw: list[tuple[bytes, PathKey]], now: float) -> None:
        """Datagrams that are none of the engine's: handshakes, paths it does not know."""
        for data, path in raw:
            try:
                self._node.receive_datagram(data, path, now)
            except Exception as error:  # one datagram's fault is not the others'
                self._bug(error, now)

    def _on_relayed(self, raw: list[tuple[bytes, PathKey]]) -> None:
        self._turn(lambda now: self._receive(raw, now))

    def _on_relays(self, relays: tuple[Relay, ...]) -> None:
        self._turn(lambda now: self._node.relays_changed(relays, now))

    def _on_alarm(self) -> None:
        def feed(now: float) -> None:
            self._alarm.acknowledge()
            deadline = self._node.get_timer()
            if deadline is not None and deadline <= now:
                self._node.handle_timer(now)

        self._turn(feed)

    def _on_doorbell(self) -> None:
        def feed(now: float) -> None:
            self._monitor.acknowledge()
            wait = self._look_again - now
            if wait <= 0:
                self._look_at_network(now)
            else:
                self._look_later(wait)

        self._turn(feed)

    def _on_look(self) -> None:
        self._look = None
        self._turn(self._look_at_network)

    def _resolved(self, peer: str, addresses: list[Address]) -> None:
        self._turn(lambda now: self._node.endpoints_resolved(peer, addresses, now))

    def _on_signal(self, topic: str, payload: bytes) -> None:
        self._turn(lambda now: self._node.signal_received(topic, payload, now))

    # ---- one turn ----

    def _turn(self, feed: Callable[[float], object]) -> None:
        if self._stopped.done():
            return
        now = clock.now()
        bugs = self._bugs
        try:
            missing = self._jumps.observe(now, clock.monotonic(), self._alarm.deadline)
            if missing is not None:
                _log.info("resumed", missing_s=missing)
                self._alarm.arm(inf)  # its deadline is old news; _flush() sets a new one
                self._heartbeat = -inf
                self._look_at_network(now)  # a wake-up is a network change
                self._relays.resumed()
                self._node.resumed(now)
                if self._signaller is not None:
                    self._signaller.network_changed()
                self._slept = True
                self._follow_later()
            feed(now)
        except TunError as error:
            self._fail(error)
            return
        except Exception as error:
            self._bug(error, now)
        self._flush(now, failed=self._bugs > bugs)

    def _flush(self, now: float, *, failed: bool = False) -> None:
        """Drain the node, and see to it that we are woken again."""
        try:
            self._drain(now)
            deadline = self._node.get_timer() or inf
            if self._io.eventful():
                deadline = min(deadline, now + BREATHER)  # the engine does not repeat its news
            if self._node.closed:
                self._finish()
        except Exception as error:
            self._bug(error, now)
            deadline = now + BREATHER
        if failed:
            deadline = max(deadline, now + BREATHER)
        if self._heartbeat <= now:
            self._heartbeat = now + HEARTBEAT
        # What became due in this turn, however long ago, would look as if the process had slept.
        deadline = max(min(deadline, self._heartbeat), now)
        # A deadline that moved away is left armed: one idle wake-up costs less than a system call
        # for each packet.
        if deadline < self._alarm.deadline and not self._stopped.done():
            self._alarm.arm(deadline)

    def _drain(self, now: float) -> None:
        node = self._node
        for _ in range(SEND_ROUNDS):
            self._engine_events(now)
            failures = self._send(node.datagrams_to_send(now))
            for path, error in failures:
                _log.debug("send failed", path=path, error=os.strerror(error))
                node.send_failed(path, error, now)
            # Control first: the first packet on a new path is the one that asks about it.
            self._io.transmit()
            if not failures and not self._io.eventful():
                break
        if self._signaller is not None and node.meeting is not None:
            self._signaller.subscribe(node.meeting.topics())
            for topic, payload in node.signals_to_send(now):
                self._signaller.publish(topic, payload)
        while (event := node.next_event()) is not None:
            self._on_event(event)

    def _send(self, datagrams: list[tuple[PathKey, bytes]]) -> list[tuple[PathKey, int]]:
        """Send them, each by a socket or a relay; the paths that failed, with the errno."""
        relayed = [(path, data) for path, data in datagrams if self._is_relay(path.local)]
        if not relayed:
            return self._sockets.send(datagrams)
        failures = self._sockets.send(
            [(path, data) for path, data in datagrams if not self._is_relay(path.local)]
        )
        for path, data in relayed:
            error = self._relays.send(path, data)
            if error and path not in dict(failures):
                failures.append((path, error))
        return failures

    def _on_event(self, event: NodeEvent) -> None:
        match event:
            case PingReply(_, token, rtt):
                answered = self._pings.pop(token, None)
                if answered is not None:
                    answered(rtt)
            case BenchAnswer(_, token):
                offered = self._offers.pop(token, None)
                if offered is not None:
                    offered(event)
            case PortWanted(ip, spread):
                self._loop.call_soon(self._open_port, ip, spread)
            case PortUnwanted(local):
                self._sockets.close_extra(local)
            case BenchWanted():
                self._loop.call_soon(self._serve_bench, event)
            case ResolveWanted(peer, endpoints):
                # Not from inside this turn: literal addresses are answered at once.
                self._loop.call_soon(self._resolver.resolve, peer, endpoints)
            case PeerUp(peer):
                _log.info("peer up", peer=peer)
            case PeerHolding(peer):
                _log.warning("no path, holding", peer=peer)
            case PeerConnecting(peer):
                _log.info("connecting", peer=peer)
            case Obstructed(peer, obstacle):
                _log.warning(
                    "obstacle" if peer is None else "cannot reach peer", peer=peer,
                    problem=obstacle.problem, remedy=obstacle.remedy or None,
                )  # fmt: skip
            case PeerRefused(peer, reason, key):
                _log.warning("refused", peer=peer or "unknown", reason=reason, key=key or None)
            case PeerMigrated(record):
                _log.info(
                    "migrated",
                    peer=record.peer,
                    trigger=record.trigger,
                    path_from=record.from_path,
                    path_to=record.to_path,
                    detect_ms=record.detect_ms,
                    switch_ms=record.switch_ms,
                )

    # ---- network ----

    def _look_at_network(self, now: float) -> None:
        try:
            network = self._monitor.snapshot()
        except OSError as error:
            _log.error("cannot read the network", error=error)
            self._look_later(NETWORK_RETRY)
            return
        finally:
            looked = clock.now()
            self._look_again = looked + max(NETWORK_PAUSE, (looked - now) / NETWORK_SHARE)
        if network != self._network or self._sockets.incomplete:
            try:
                self._take(network, now)
            except LocalError as error:
                _log.error("cannot listen", error=error)
                self._look_later(NETWORK_RETRY)

    def _take(self, network: LocalNetwork, now: float) -> None:
        """Make the sockets follow `network`, then tell the node of what can be used of it."""
        self._sockets.sync(network)
        if self._sockets.incomplete:
            self._look_later(NETWORK_RETRY)
        usable = self._sockets.usable(network)
        self._network = network
        if usable != self._told:
            self._told = usable
            self._relays.network_changed(usable)
            self._node.network_changed(usable, self._sockets.port, now)
            self._loop.call_soon(self._resolver.retry)
            if self._signaller is not None:
                self._signaller.network_changed()
            self._follow_later()

    def _look_later(self, seconds: float) -> None:
        if self._look is None:
            self._look = self._loop.call_later(seconds, self._on_look)

    def _follow_later(self) -> None:
        if self._follow is None:
            self._follow = self._loop.call_later(FOLLOW_AFTER, self._tell_followers)

    def _tell_followers(self) -> None:
        self._follow = None
        slept, self._slept = self._slept, False
        network, port = self._told, self._sockets.port
        if network is not None and network != self._followed:
            self._followed = network
            self._each(lambda follower: follower.network_changed(network, port))
        if slept:
            self._each(lambda follower: follower.resumed())

    # ---- helpers ----

    def _each(self, tell: Callable[[Follower], None]) -> None:
        for follower in self._followers.values():
            try:
                tell(follower)
            except Exception as error:  # one's fault is not the others'
                self._bug(error, clock.now())

    def _watch(self, udp: UdpSocket) -> None:
        number = self._io.add_socket(udp.fileno())
        self._numbers[udp.local] = number
        self._locals[number] = udp.local

    def _unwatch(self, udp: UdpSocket) -> None:
        number = self._numbers.pop(udp.local)
        del self._locals[number]
        self._io.remove_socket(number)

    def _open_port(self, ip: str, spread: bool) -> None:
        local = None if self._stopped.done() else self._sockets.open_extra(ip, many=spread)
        if local is not None:
            self._turn(lambda now: self._node.port_opened(local, now, spread=spread))

    def _is_relay(self, local: Address) -> bool:
        """Whether this is the address of a relay, and not of a socket of ours, whatever a TURN
        server says: it would take all our traffic away."""
        return local not in self._numbers and self._relays.owns(local)

    def _aim(self, path: Path, key: PathKey) -> None:
        local, remote = key
        relayed = self._relays.socket_of(key) if self._is_relay(local) else None
        if relayed is not None:
            udp, remote = relayed
            local = udp.local
        path.aim(self._numbers.get(local, NO_SOCKET), pack(remote))

    def _path(self, local: Address, remote: Address) -> PathKey | None:
        """The path of what came in at a socket from there; None if nobody sends there but us."""
        if self._relays.serves(local):
            return self._relays.path_of(local, remote)
        return PathKey(local, remote)

    def _serve_bench(self, wanted: BenchWanted) -> None:
        if self._stopped.done() or self._closing is not None:
            return
        port, secret, reason = 0, b"", ""
        try:
            port, secret = self._benches.serve(
                wanted.peer, wanted.address, wanted.sources, wanted.seconds
            )
        except BenchRefused as error:
            reason = str(error)
        peer, token = wanted.peer, wanted.token
        self._turn(lambda now: self._node.bench_served(peer, token, port, secret, reason, now))

    def _next_token(self) -> int:
        self._last_token += 1
        return self._last_token

    def _forget_ping(self, token: int) -> None:
        self._pings.pop(token, None)

    def _forget_offer(self, token: int) -> None:
        self._offers.pop(token, None)

    def _bug(self, error: Exception, now: float) -> None:
        """Never the end of a tunnel, never silent either; one traceback a second is enough."""
        self._bugs += 1
        if self._strict:
            self._fail(error)
        elif now >= self._bug_logged + 1.0:
            self._bug_logged = now
            _log.error("internal error", exc_info=error, count=self._bugs)

    def _fail(self, error: Exception) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)

    def _finish(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)


_log = Log("loop")
