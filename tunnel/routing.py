"""Which peer an IP packet goes to, and whether a peer may send it: cryptokey routing.

Both directions ask one table: the owner of an address is the peer with the longest prefix that
covers it. A packet goes to the owner of its destination; a packet from a peer is accepted only if
that peer owns its source. So a peer with a /24 cannot speak for the /32 that another peer has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network

from tunnel.config import PeerConfig

_CACHE_SIZE = 8192
"""Addresses remembered: more than a host talks to at a time, and at most about 2 MB."""

_IPV4_HEADER = 20
_IPV6_HEADER = 40


class AllowedIPs:
    """An immutable longest-prefix table from IP addresses to peer names."""

    def __init__(self, networks: Mapping[str, Iterable[IPv4Network | IPv6Network]]) -> None:
        """From peer name to networks. Raises ValueError where two peers claim the same one."""
        # Address length in bytes -> prefix length -> network bits -> peer.
        tables: dict[int, dict[int, dict[int, str]]] = {4: {}, 16: {}}
        for peer, owned in networks.items():
            for network in owned:
                size = network.max_prefixlen // 8
                bits = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
                owner = tables[size].setdefault(network.prefixlen, {}).setdefault(bits, peer)
                if owner != peer:
                    raise ValueError(f"both {owner} and {peer} claim {network}")
        # Longest prefix first; a prefix length is kept as the shift that leaves its bits.
        self._tables = {
            size: [(size * 8 - length, table[length]) for length in sorted(table, reverse=True)]
            for size, table in tables.items()
        }
        self._cache: dict[bytes, str | None] = {}

    @classmethod
    def from_peers(cls, peers: Iterable[PeerConfig]) -> AllowedIPs:
        """The table of a configuration."""
        return cls({peer.name: peer.allowed_ips for peer in peers})

    def owner(self, address: bytes) -> str | None:
        """The peer that owns an address of 4 or 16 bytes, or None."""
        try:
            return self._cache[address]
        except KeyError:
            pass
        value = int.from_bytes(address)
        found = None
        for shift, networks in self._tables[len(address)]:
            found = networks.get(value >> shift)
            if found is not None:
                break
        if len(self._cache) >= _CACHE_SIZE:
            # A scan fills this; starting over is cheaper than knowing which entry was used last.
            self._cache.clear()
        self._cache[address] = found
        return found

    def lookup(self, packet: bytes) -> str | None:
        """The peer to send a packet to; None where nobody owns its destination, or it has none."""
        if not packet:
            return None
        version = packet[0] >> 4
        if version == 4 and len(packet) >= _IPV4_HEADER:
            return self.owner(bytes(packet[16:20]))
        if version == 6 and len(packet) >= _IPV6_HEADER:
            return self.owner(bytes(packet[24:40]))
        return None

    def permits(self, peer: str, packet: bytes) -> bool:
        """Whether a packet from this peer is well-formed and its source is that peer's own.

        Well-formed: the header is complete, and its length field says exactly the packet's length
        (so no IPv6 jumbograms, RFC 2675, which no tunnel MTU admits anyway).
        """
        size = len(packet)
        if size < _IPV4_HEADER:
            return False
        version = packet[0] >> 4
        if version == 4:
            header = (packet[0] & 0x0F) * 4
            if not _IPV4_HEADER <= header <= size or (packet[2] << 8 | packet[3]) != size:
                return False
            return self.owner(bytes(packet[12:16])) == peer
        if version == 6:
            if size < _IPV6_HEADER or (packet[4] << 8 | packet[5]) + _IPV6_HEADER != size:
                return False
            return self.owner(bytes(packet[8:24])) == peer
        return False
