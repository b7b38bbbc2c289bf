"""A TUN device without a kernel, for tests: two ends, what one writes the other reads."""

import os
from collections import deque
from collections.abc import Iterable

from tun.errors import TunError

# Packets a real device queues towards its reader by default (drivers/net/tun.c, TUN_READQ_SIZE).
_QUEUE = 500


class MemoryTun:
    """One end of a pair: the device, or the host behind it. A `TunDevice` either way.

    Bounded as the real one is: a packet that finds the other end's queue full is dropped and
    counted. Stricter than the real one in one thing: neither end takes a packet above the MTU.
    """

    def __init__(self, name: str, mtu: int, queue: int) -> None:
        self.name = name
        self.mtu = mtu
        self.dropped = 0
        self._limit = queue
        self._packets: deque[bytes] = deque()
        self._peer: MemoryTun | None = None
        # Readable while it is above zero, so that an event loop can wait for packets.
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @classmethod
    def pair(
        cls, name: str = "mt0", mtu: int = 1420, queue: int = _QUEUE
    ) -> "tuple[MemoryTun, MemoryTun]":
        """The device and the host behind it; `queue` packets wait at each end, at the most."""
        device, host = cls(name, mtu, queue), cls(name, mtu, queue)
        device._peer, host._peer = host, device
        return device, host

    def fileno(self) -> int:
        return self._event

    def read(self, limit: int) -> list[bytes]:
        if self._event < 0:
            raise TunError("gone", f"{self.name} is closed")
        had = bool(self._packets)
        count = min(limit, len(self._packets))
        packets = [self._packets.popleft() for _ in range(count)]
        if had and not self._packets:
            os.eventfd_read(self._event)
        return packets

    def write(self, packets: Iterable[bytes]) -> int:
        taken = 0
        for packet in packets:
            if self._peer is not None and self._peer._offer(packet):
                taken += 1
            else:
                self.dropped += 1
        return taken

    def close(self) -> None:
        if self._event < 0:
            return
        os.close(self._event)
        self._event = -1
        self._packets.clear()
        if self._peer is not None:
            self._peer._peer = None
            self._peer = None

    def _offer(self, packet: bytes) -> bool:
        if len(self._packets) >= self._limit or len(packet) > self.mtu:
            return False
        if not packet or packet[0] >> 4 not in (4, 6):
            return False
        if not self._packets:
            os.eventfd_write(self._event, 1)
        self._packets.append(bytes(packet))
        return True
