"""What the rest of martlet sees of the native engine: one `Datapath` for all peers of a node.

The engine (`native/`) owns the 1-RTT packets of every connection whose handshake is done, between
IP packets on one side and datagrams on the other. There are two ways to drive it, over one code:

- by the shell, with real descriptors (`drive`): batches move between TUN and UDP without Python;
- by a simulation or a test, without any: packets and datagrams are passed as bytes.
"""

from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network

from tunnel.datapath.native.engine import Connection, Engine, Io, Lane, Path, libcrypto
from tunnel.path.network import PathKey

__all__ = ["Connection", "Datapath", "Io", "Lane", "Path", "libcrypto"]

Prefix = IPv4Network | IPv6Network


class Datapath:
    """The engine of one node. `allowed` are the networks of each peer, in the lanes' order."""

    def __init__(self, allowed: Iterable[Iterable[Prefix]] = ()) -> None:
        self.engine = Engine()
        self._allowed = dict(enumerate(tuple(networks) for networks in allowed))
        self._owners = len(self._allowed)
        self._set_routes()
        self.driven = False
        """Whether the engine's timers and data are served by an `Io`, and not by us."""
        self.aim: Callable[[Path, PathKey], None] = _nowhere
        """Tells a path the socket and the sockaddr that it leaves by."""

    def lane(self, owner: int, seed: int = 0) -> Lane:
        """The data path of one peer, by its place in `allowed`; `seed` of its flow hash."""
        return Lane(self.engine, owner, seed)

    def allow(self, networks: Iterable[Prefix]) -> int:
        """A further peer with these networks; returns its place."""
        owner = self._owners
        self._owners += 1
        self._allowed[owner] = tuple(networks)
        self._set_routes()
        return owner

    def disallow(self, owner: int) -> None:
        """Nothing more goes to this peer, nor comes from it. Its place stays empty."""
        del self._allowed[owner]
        self._set_routes()

    def _set_routes(self) -> None:
        self.engine.set_routes(
            (network.version, network.network_address.packed, network.prefixlen, owner)
            for owner, networks in self._allowed.items()
            for network in networks
        )

    def connection(self) -> Connection:
        """The engine's side of one QUIC connection."""
        return Connection(self.engine)

    def drive(self, tun: int, *, tcp: bool, udp: bool, aim: Callable[[Path, PathKey], None]) -> Io:
        """Let the engine do its own I/O on this TUN descriptor. Raises OSError."""
        io = Io(self.engine, tun, tcp, udp)
        self.driven, self.aim = True, aim
        return io

    # without descriptors

    def push(self, packet: bytes, now: float) -> bool:
        """An IP packet out of the TUN; False when it belongs to no peer."""
        return self.engine.push(packet, now)

    def take_delivered(self) -> list[bytes]:
        """IP packets for the TUN, in order of arrival."""
        return self.engine.take_delivered()

    @property
    def unroutable(self) -> int:
        """Packets out of the TUN that belong to no peer."""
        return self.engine.unroutable


def _nowhere(path: Path, key: PathKey) -> None:
    """There are no sockets."""
