"""A node that does nothing but remember, and say what it is told to: for tests of the shell."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from tunnel.config import IPInterface, PeerConfig
from tunnel.datapath.engine import Connection, Datapath, Path
from tunnel.datapath.native.engine import CIPHERS, Report
from tunnel.events import NodeEvent
from tunnel.ice.candidate import Relay
from tunnel.path.network import Address, LocalNetwork, PathKey


class FakeNode:
    """`tunnel.shell.ports.Node`, scripted: what is put in its queues is drained by the shell.

    Its engine is a real one, of one peer with the network `allowed`, once `connect`ed.
    """

    def __init__(self, allowed: str = "0.0.0.0/0") -> None:
        self.datapath = Datapath([[ip_network(allowed)]])
        self.lane = self.datapath.lane(0)
        self.paths: dict[PathKey, Path] = {}
        self.reports: list[Report] = []
        self.busy = False
        self.calls: list[tuple[Any, ...]] = []
        self.outgoing: list[tuple[PathKey, bytes]] = []
        self.events: deque[NodeEvent] = deque()
        self.timer: float | None = None
        self.closed = False
        self.failure: Exception | None = None
        self.echo = False
        self.on_send_failed: tuple[PathKey, bytes] | None = None

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of all calls of one method."""
        return [call[1:] for call in self.calls if call[0] == name]

    def receive_datagram(self, data: bytes, path: PathKey, now: float) -> None:
        self.calls.append(("receive_datagram", data, path))
        if self.failure is not None:
            raise self.failure
        if self.echo:
            self.outgoing.append((path, data))

    def connect(self, path: PathKey, *, first: bool, now: float) -> Connection:
        """Begin right after a handshake with a twin; exactly one of the two is the `first`."""
        connection = self.datapath.connection()
        ours, theirs = (b"\1", b"\2") if first else (b"\2", b"\1")
        metrics = connection.add_path(1200, 0.01)
        metrics.limited = False
        metrics.set_cid(theirs * 8)
        metrics.expect(ours * 8)
        connection.start(
            CIPHERS["AES_128_GCM"], ours * 16, bytes(12), bytes(16), theirs * 16, bytes(12),
            bytes(16), 0, now,
        )  # fmt: skip
        connection.set_host_cids([ours * 8])
        connection.attach(self.lane)
        self.paths[path] = metrics
        self.datapath.aim(metrics, path)
        return connection

    def engine_events(self, connections: list[Connection], now: float) -> bool:
        if connections:
            self.calls.append(("engine_events",))
        for connection in connections:
            while (report := connection.take(now)) is not None:
                self.reports.append(report)
        if connections and self.failure is not None:
            raise self.failure
        return self.busy

    def network_changed(self, network: LocalNetwork, port: int, now: float) -> None:
        self.calls.append(("network_changed", network, port, now))
        for key, path in self.paths.items():
            self.datapath.aim(path, key)

    def port_opened(self, local: Address, now: float, *, spread: bool = False) -> None:
        self.calls.append(("port_opened", local, spread))

    def relays_changed(self, relays: tuple[Relay, ...], now: float) -> None:
        self.calls.append(("relays_changed", relays))
        for key, path in self.paths.items():
            self.datapath.aim(path, key)

    def endpoints_resolved(self, peer: str, addresses: list[Address], now: float) -> None:
        self.calls.append(("endpoints_resolved", peer, addresses))

    def mapped_ports_changed(self, mapped: dict[Address, Address], now: float) -> None:
        self.calls.append(("mapped_ports_changed", mapped))

    def endpoints_found(self, peer: str, addresses: list[Address], now: float) -> None:
        self.calls.append(("endpoints_found", peer, addresses))

    def send_failed(self, path: PathKey, error: int, now: float) -> None:
        self.calls.append(("send_failed", path, error))
        if self.on_send_failed is not None:
            self.outgoing.append(self.on_send_failed)

    def resumed(self, now: float) -> None:
        self.calls.append(("resumed",))

    def handle_timer(self, now: float) -> None:
        self.calls.append(("handle_timer", now))
        if self.failure is not None:
            raise self.failure
        self.timer = None

    def ping(self, peer: str, token: int, now: float) -> bool:
        self.calls.append(("ping", peer, token))
        return True

    def bench(self, peer: str, token: int, seconds: int, now: float) -> None:
        self.calls.append(("bench", peer, token, seconds))

    def bench_served(
        self, peer: str, token: int, port: int, secret: bytes, reason: str, now: float
    ) -> None:
        self.calls.append(("bench_served", peer, token, port, secret, reason))

    def add_addresses(self, addresses: Sequence[IPInterface]) -> None:
        self.calls.append(("add_addresses", tuple(addresses)))

    def add_peer(self, config: PeerConfig, now: float) -> None:
        self.calls.append(("add_peer", config.name))

    def remove_peer(self, peer: str, now: float) -> None:
        self.calls.append(("remove_peer", peer))

    def close(self, now: float) -> None:
        self.calls.append(("close",))

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        datagrams, self.outgoing = self.outgoing, []
        return datagrams

    meeting = None

    def signaller_connected(self, now: float) -> None:
        self.calls.append(("signaller_connected",))

    def signaller_disconnected(self, now: float) -> None:
        self.calls.append(("signaller_disconnected",))

    def signal_received(self, topic: str, payload: bytes, now: float) -> None:
        self.calls.append(("signal_received", topic, payload))

    def signals_to_send(self, now: float) -> list[tuple[str, bytes]]:
        return []

    def get_timer(self) -> float | None:
        return self.timer

    def next_event(self) -> NodeEvent | None:
        return self.events.popleft() if self.events else None

    def status(self, now: float) -> dict[str, Any]:
        return {"interface": "mt0", "peers": [], "counters": {"not_routed": 3}}

    def history(self) -> list[dict[str, Any]]:
        return [{"peer": "office"}]
