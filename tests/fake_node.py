"""A node that does nothing but remember, and say what it is told to: for tests of the shell."""

from __future__ import annotations

from collections import deque
from typing import Any

from tunnel.events import NodeEvent
from tunnel.path.network import Address, LocalNetwork, PathKey


class FakeNode:
    """`tunnel.shell.driver.Node`, scripted: what is put in its queues is drained by the shell."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.outgoing: list[tuple[PathKey, bytes]] = []
        self.packets: list[bytes] = []
        self.events: deque[NodeEvent] = deque()
        self.timer: float | None = None
        self.wants_packets = True
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

    def receive_packets(self, packets: list[bytes], now: float) -> None:
        self.calls.append(("receive_packets", packets))

    def network_changed(self, network: LocalNetwork, port: int, now: float) -> None:
        self.calls.append(("network_changed", network, port, now))

    def endpoints_resolved(self, peer: str, addresses: list[Address], now: float) -> None:
        self.calls.append(("endpoints_resolved", peer, addresses))

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

    def close(self, now: float) -> None:
        self.calls.append(("close",))

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        datagrams, self.outgoing = self.outgoing, []
        return datagrams

    def packets_to_write(self) -> list[bytes]:
        packets, self.packets = self.packets, []
        return packets

    def get_timer(self) -> float | None:
        return self.timer

    def next_event(self) -> NodeEvent | None:
        return self.events.popleft() if self.events else None

    def status(self, now: float) -> dict[str, Any]:
        return {"interface": "mt0", "peers": [], "counters": {"not_routed": 3}}

    def history(self) -> list[dict[str, Any]]:
        return [{"peer": "office"}]
