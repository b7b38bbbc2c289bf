"""All relays of a host, and what the driver asks of them."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Sequence
from typing import Any

from tunnel.config import TurnConfig
from tunnel.ice.candidate import Relay
from tunnel.obstacle import Obstacle, relay_remedy
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.shell.relay.attempt import row
from tunnel.shell.relay.live import Live
from tunnel.shell.relay.slot import Slot
from tunnel.shell.relay.ways import Place, Server, places, ways
from tunnel.shell.resolver import Lookup, Resolver, lookup
from tunnel.shell.soon import Soon
from tunnel.shell.udp import UdpSocket, device_for


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
        self._opened, self._closing = opened, closing
        self._servers = list(dict.fromkeys(Server.of(config) for config in turn))
        self._resolved: dict[Server, list[Address]] = {}
        self._resolver = Resolver(self.loop, self._on_resolved, lookup)
        self._asked = False
        self._network = LocalNetwork()
        self._slots: dict[Place, Slot] = {}
        self._live: dict[Address, Live] = {}
        self._engine_side: dict[Address, Live] = {}
        self._tell = Soon(self.loop, lambda: changed(self.relays))

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
                rows.append(row(server.url, error=error, remedy=remedy))
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
        self._tell.stop()
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
                self._slots[place] = Slot(self, place, found, device)
                self._slots[place].begin()

    # ---- what slots and relays tell ----

    def up(self, live: Live) -> bool:
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

    def down(self, live: Live) -> None:
        """A relay is no more."""
        del self._live[live.relay.address]
        del self._engine_side[live.udp.local]
        self._closing(live.udp)
        self._tell()
