"""A broker without sockets, for whatever uses a `Signaller`: clients in any loop of any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tunnel.config import RendezvousConfig

REFUSED = "broker.example refuses the connection: nothing listens on that port"


class MemoryBroker:
    """`signaller` stands for the class `Signaller`; `up` says whether the broker can be reached."""

    def __init__(self) -> None:
        self.up = True
        self.clients: list[MemorySignaller] = []
        self.published: list[tuple[str, bytes]] = []
        self.lose: Callable[[str, bytes], bool] = lambda topic, payload: False

    def signaller(self, rendezvous: RendezvousConfig, **callbacks: Any) -> MemorySignaller:
        return MemorySignaller(self, rendezvous, **callbacks)

    def publish(self, topic: str, payload: bytes) -> None:
        self.published.append((topic, payload))
        if self.lose(topic, payload):
            return
        for client in list(self.clients):
            if topic in client.topics:
                client.loop.call_soon_threadsafe(client.deliver, topic, payload)


class MemorySignaller:
    """As much of `tunnel.shell.mqtt.Signaller` as is used."""

    def __init__(
        self,
        broker: MemoryBroker,
        rendezvous: RendezvousConfig,
        *,
        will: tuple[str, bytes] | None,
        connected: Callable[[], None],
        disconnected: Callable[[], None],
        received: Callable[[str, bytes], None],
    ) -> None:
        self.rendezvous = rendezvous
        self.topics: frozenset[str] = frozenset()
        self._broker = broker
        self._on_connected, self._on_disconnected = connected, disconnected
        self._on_received = received
        self._there = False
        self._closed = False

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._broker.clients.append(self)
        self.loop.call_soon(self._look)

    async def close(self) -> None:
        self._closed = True
        self._broker.clients.remove(self)

    def subscribe(self, topics: frozenset[str]) -> None:
        self.topics = topics

    def publish(self, topic: str, payload: bytes) -> None:
        if self._there:
            self._broker.publish(topic, payload)

    def status(self) -> dict[str, Any]:
        error = None if self._there else REFUSED
        return {"state": "connected" if self._there else "connecting", "error": error}

    def deliver(self, topic: str, payload: bytes) -> None:
        if not self._closed and self._there:
            self._on_received(topic, payload)

    def _look(self) -> None:
        if self._closed:
            return
        if self._there != self._broker.up:
            self._there = self._broker.up
            (self._on_connected if self._there else self._on_disconnected)()
        self.loop.call_later(0.005, self._look)
