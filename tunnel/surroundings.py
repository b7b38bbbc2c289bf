"""What a peer knows of its host: its addresses and routes, and the sockets and relays on them."""

from __future__ import annotations

from dataclasses import dataclass

from tunnel.ice.candidate import Base
from tunnel.path.network import Address, LocalNetwork, PathKey


@dataclass(frozen=True, slots=True)
class Surroundings:
    """One object, shared by all peers of a node."""

    network: LocalNetwork
    port: int
    bases: tuple[Base, ...] = ()
    """The sockets on its addresses, and the relays that are reached from them."""

    def relay(self, local: Address) -> Base | None:
        """The relay with this address, if it is one."""
        return next((base for base in self.bases if base.relay and base.address == local), None)

    def has(self, local: Address) -> bool:
        """Whether the host can send from there at all."""
        if any(address.ip == local.host for address in self.network.addresses):
            return True
        return self.relay(local) is not None

    def carries(self, path: PathKey) -> bool:
        """Whether the host can send on this path: it has the address, and a route from there."""
        if any(a.ip == path.local.host for a in self.network.sources(path.remote.host)):
            return True
        return self.relay(path.local) is not None
