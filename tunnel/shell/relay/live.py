"""A relay in use: the engine's socket on the loopback interface, and the shims behind it."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from tunnel.ice.candidate import Relay
from tunnel.ice.turn import Allocation
from tunnel.path.network import Address, PathKey
from tunnel.shell import clock
from tunnel.shell.carrier import MAX_SEGMENTS, Carrier
from tunnel.shell.log import Log
from tunnel.shell.udp import UDP_SEGMENT, UdpSocket, open_udp, segment_size

if TYPE_CHECKING:
    from tunnel.shell.relay.relays import Relays

SHIM_IDLE = 600.0
"""Seconds without any packet after which a shim is closed: paths are checked every 15."""
MAX_SHIMS = 64  # at each relay
READS = 8  # messages of a shim in one wake-up, each up to 64 kB
LOOPBACK = "127.0.0.1"
_MESSAGE = 65507
_CONTROL = socket.CMSG_SPACE(struct.calcsize("=i"))


class Live:
    """A relay in use: the engine's socket, and the shims."""

    def __init__(
        self,
        relays: Relays,
        relay: Relay,
        allocation: Allocation,
        carrier: Carrier,
        flush: Callable[[], None],
    ) -> None:
        self.relay = relay
        self.udp = UdpSocket(LOOPBACK, 0, "")
        self._relays = relays
        self._allocation, self._carrier = allocation, carrier
        self._flush = flush
        self._shims: dict[Address, Shim] = {}
        self._raw: list[tuple[bytes, PathKey]] = []
        self._buffer = memoryview(bytearray(1 << 16))

    def begin(self) -> bool:
        if self._relays.up(self):
            return True
        self.udp.close()
        return False

    def close(self) -> None:
        self._raw.clear()
        self._relays.down(self)
        self.udp.close()
        for remote in list(self._shims):
            self._close(remote)

    def path_of(self, local: Address) -> PathKey | None:
        for remote, shim in self._shims.items():
            if shim.local == local:
                return PathKey(self.relay.address, remote)
        return None

    # ---- out ----

    def send(self, remote: Address, data: bytes) -> int:
        """From the node: checks, handshakes, challenges."""
        now = clock.now()
        message = self._allocation.wrap(remote, data, now)
        if message is None:
            return errno.EACCES
        self._flush()  # what it may need: a permission
        shim = self._shims.get(remote)
        if shim is not None:
            shim.used_at = now
        return self._carrier.send(message)

    def shim(self, remote: Address) -> Shim | None:
        """What stands for `remote` on the loopback, made if need be."""
        now = clock.now()
        shim = self._shims.get(remote)
        if shim is None:
            for idle in [r for r, s in self._shims.items() if s.used_at < now - SHIM_IDLE]:
                self._close(idle)
            if len(self._shims) >= MAX_SHIMS:
                return None
            try:
                shim = Shim(self.udp.local, now)
            except OSError as error:
                _log.warning("no socket for a relayed path", error=error.strerror or error)
                return None
            self._shims[remote] = shim
            self._relays.loop.add_reader(shim.fileno(), self._forward, remote, shim)
        shim.used_at = now
        self._allocation.bind(remote, now)
        self._flush()
        return shim

    def _close(self, remote: Address) -> None:
        shim = self._shims.pop(remote)
        self._relays.loop.remove_reader(shim.fileno())
        shim.close()

    def _forward(self, remote: Address, shim: Shim) -> None:
        """From the engine to the server."""
        now = clock.now()
        shim.used_at = now
        for _ in range(READS):
            received = shim.receive(self._buffer)
            if received is None:
                break
            length, segment = received
            data = self._buffer[:length]
            channel = self._allocation.channel(remote, now)
            if channel is not None:
                self._carrier.send_run(channel, data, segment)
                continue
            for at in range(0, length, segment):
                message = self._allocation.wrap(remote, bytes(data[at : at + segment]), now)
                self._flush()
                if message is not None:
                    self._carrier.send(message)
        self._allocation.bind(remote, now)
        self._flush()

    # ---- in ----

    def take(self, remote: Address, payload: memoryview) -> None:
        """A datagram of `remote`: a 1-RTT packet to a peer the engine knows, or the node's."""
        if not payload:
            return  # anybody can send an empty one to a relayed address
        shim = self._shims.get(remote)
        if shim is not None and payload[0] & 0xC0 == 0x40:
            shim.add(payload)
        else:
            self._raw.append((bytes(payload), PathKey(self.relay.address, remote)))

    def pass_on(self) -> None:
        """What was taken: the messages it was in are about to go."""
        for shim in self._shims.values():
            shim.pass_on()
        if self._raw:
            raw, self._raw = self._raw, []
            self._relays.received(raw)


class Shim:
    """A peer's address on the loopback: a socket connected to the engine's. Raises OSError."""

    def __init__(self, engine: Address, now: float) -> None:
        self.used_at = now
        self.dropped = 0
        self._socket = open_udp(LOOPBACK, 0, "")
        try:
            self._socket.connect((engine.host, engine.port))
        except OSError:
            self._socket.close()
            raise
        self.local = Address.from_sockaddr(self._socket.getsockname())
        self._parts: list[memoryview] = []
        self._size = 0
        self._bytes = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, buffer: memoryview) -> tuple[int, int] | None:
        """A run of datagrams: bytes in all, and of each but the last; None when there is none."""
        try:
            length, control, _, _ = self._socket.recvmsg_into([buffer], _CONTROL)
        except OSError:
            return None
        return (length, segment_size(control) or length) if length else None

    def add(self, payload: memoryview) -> None:
        """For the engine: in one message with its like."""
        size = len(payload)
        if self._parts and (
            size > self._size or len(self._parts) == MAX_SEGMENTS or self._bytes + size > _MESSAGE
        ):
            self.pass_on()
        if not self._parts:
            self._size = size
        self._parts.append(payload)
        self._bytes += size
        if size < self._size:
            self.pass_on()  # only the last one may be shorter

    def pass_on(self) -> None:
        parts, self._parts, self._bytes = self._parts, [], 0
        if not parts:
            return
        control = []
        if len(parts) > 1:
            control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", self._size))]
        try:
            self._socket.sendmsg(parts, control)
        except OSError:  # the engine's socket is full
            self.dropped += len(parts)


_log = Log("relay")
