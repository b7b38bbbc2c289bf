"""A TUN device without a kernel, for tests: messages go through a socket pair."""

import contextlib
import socket
from collections.abc import Iterable, Iterator

from tun.device import VNET_SIZE, Offload, VnetHeader

# SO_SNDBUF of either end, bytes: about 900 full packets or 30 super-packets, so that only a test
# that means to finds it full. The kernel doubles it, and cuts it to net.core.wmem_max.
_BUFFER = 2 << 20

# No message is larger: a header, and an IP packet of the largest size there is.
_MESSAGE_LIMIT = VNET_SIZE + 65535


class MemoryTun:
    """The device: a `TunDevice` whose descriptor is a socket that keeps messages apart.

    It is not the kernel's in this: a write into a full queue fails with EAGAIN instead of being
    taken and dropped, and once the host is closed a read gives nothing (0 bytes), not EBADFD.
    """

    def __init__(self, sock: socket.socket, name: str, mtu: int, offload: Offload) -> None:
        self.name = name
        self.mtu = mtu
        self.offload = offload
        self._socket = sock

    @classmethod
    def pair(
        cls,
        name: str = "mt0",
        mtu: int = 1420,
        offload: Offload = Offload(tcp=True, udp=True),  # noqa: B008 # it is frozen
    ) -> "tuple[MemoryTun, MemoryHost]":
        """The device, and the host behind it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        return cls(ours, name, mtu, offload), MemoryHost(theirs, mtu)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class MemoryHost:
    """The IP stack behind the device: what it writes, the device reads."""

    def __init__(self, sock: socket.socket, mtu: int) -> None:
        self.dropped = 0  # packets that `write` did not take
        self.refused = 0  # messages of the device that were no IP packet
        self._mtu = mtu
        self._socket = sock

    def fileno(self) -> int:
        """Polls readable while the device has written something, and once it is closed."""
        return self._socket.fileno()

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` IP packets that the device wrote, oldest first, super-packets uncut."""
        return [packet for _, packet in self._messages(limit)]

    def read_super(self) -> tuple[VnetHeader, bytes] | None:
        """The oldest packet that the device wrote, with its header; None when there is none."""
        return next(self._messages(1), None)

    def write(self, packets: Iterable[bytes]) -> int:
        """Send plain packets; returns how many were taken, the others are dropped and counted:
        queue full, above the MTU, no IP packet, device closed."""
        return sum(self._send(VnetHeader(), packet, limit=self._mtu) for packet in list(packets))

    def write_super(self, vnet: VnetHeader, packet: bytes) -> bool:
        """Send any packet with any header; False: it was dropped, and counted."""
        return self._send(vnet, packet, limit=65535)

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()

    def _send(self, vnet: VnetHeader, packet: bytes, limit: int) -> bool:
        if _is_ip(packet) and len(packet) <= limit:
            with contextlib.suppress(OSError):
                self._socket.sendmsg([vnet.pack(), packet])
                return True
        self.dropped += 1
        return False

    def _messages(self, limit: int) -> Iterator[tuple[VnetHeader, bytes]]:
        with contextlib.suppress(BlockingIOError):
            while limit > 0 and (message := self._socket.recv(_MESSAGE_LIMIT)):
                packet = message[VNET_SIZE:]
                if _is_ip(packet):
                    limit -= 1
                    yield VnetHeader.unpack(message), packet
                else:
                    self.refused += 1


def _is_ip(packet: bytes) -> bool:
    return bool(packet) and packet[0] >> 4 in (4, 6)
