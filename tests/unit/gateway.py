"""A home router as clients of PCP and NAT-PMP see it: from RFC 6886 and 6887, no code is shared."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field


@dataclass
class Gateway:
    """`answer` is what it says to a datagram that came from `client`. Time is an argument."""

    speaks: tuple[int, ...] = (2, 0)
    """Versions: 2 is PCP, 0 NAT-PMP."""
    external: str = "198.51.100.10"
    grants: int = 7200
    """Seconds at the most."""
    result: int = 0
    """Refuses everything with this code."""
    restarted_at: float = 0.0
    mapped: dict[int, tuple[str, int, float, bytes]] = field(default_factory=dict)
    """By external port: client, its port, until when, nonce."""
    heard: list[bytes] = field(default_factory=list)

    def restart(self, now: float) -> None:
        self.restarted_at = now
        self.mapped.clear()

    def epoch(self, now: float) -> int:
        return int(now - self.restarted_at)

    def leads_to(self, port: int, now: float) -> tuple[str, int] | None:
        found = self.mapped.get(port)
        return found[:2] if found is not None and found[2] > now else None

    def answer(self, data: bytes, client: str, now: float) -> bytes | None:
        self.heard.append(data)
        if data[0] not in self.speaks:
            if 2 in self.speaks:
                return struct.pack("!BBxBII12x", 2, data[1] | 0x80, 1, 0, self.epoch(now))
            # RFC 6886 section 3.5, in the smallest form seen.
            return struct.pack("!BBHI", 0, data[1] | 0x80, 1, self.epoch(now))
        return self._pcp(data, client, now) if data[0] == 2 else self._natpmp(data, client, now)

    def announcement(self, version: int, now: float) -> bytes:
        if version == 2:
            return struct.pack("!BBxBII12x", 2, 0x80, 0, 0, self.epoch(now))
        address = socket.inet_aton(self.external)
        return struct.pack("!BBHI4s", 0, 128, 0, self.epoch(now), address)

    def _pcp(self, data: bytes, client: str, now: float) -> bytes:
        lifetime, claimed, nonce, protocol, internal, wish = struct.unpack_from(
            "!4xI16s12sB3xHH", data
        )
        assert (data[1], protocol, len(data)) == (1, 17, 60)
        result = self.result
        mine = socket.inet_pton(socket.AF_INET6, client if ":" in client else f"::ffff:{client}")
        if claimed != mine:
            result = 12  # ADDRESS_MISMATCH
        for other in self.mapped.values():
            if other[:2] == (client, internal) and other[2] > now and other[3] != nonce:
                result = 2  # NOT_AUTHORIZED
        port = 0
        if not result:
            lifetime, port = self._map(client, internal, wish, lifetime, nonce, now)
        v6 = ":" in client
        outside = socket.inet_pton(socket.AF_INET6, client if v6 else f"::ffff:{self.external}")
        head = struct.pack("!BBxBII12x", 2, 0x81, result, lifetime, self.epoch(now))
        return head + struct.pack("!12sB3xHH16s", nonce, 17, internal, port, outside)

    def _natpmp(self, data: bytes, client: str, now: float) -> bytes:
        if data[1] == 0:
            address = socket.inet_aton(self.external)
            return struct.pack("!BBHI4s", 0, 128, self.result, self.epoch(now), address)
        internal, wish, lifetime = struct.unpack_from("!4xHHI", data)
        assert (data[1], len(data)) == (1, 12)
        port = 0
        if not self.result:
            lifetime, port = self._map(client, internal, wish, lifetime, b"", now)
        return struct.pack(
            "!BBHIHHI", 0, 129, self.result, self.epoch(now), internal, port, lifetime
        )

    def _map(
        self, client: str, internal: int, wish: int, lifetime: int, nonce: bytes, now: float
    ) -> tuple[int, int]:
        self.mapped = {p: m for p, m in self.mapped.items() if m[:2] != (client, internal)}
        if not lifetime:
            return 0, 0
        port = wish or internal
        while self.leads_to(port, now) is not None:
            port += 1
        lifetime = min(lifetime, self.grants)
        self.mapped[port] = (client, internal, now + lifetime, nonce)
        return lifetime, port
