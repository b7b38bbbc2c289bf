"""The port between the tunnel and the IP stack of this host; behind it: `linux.py`, `memory.py`.

Packets do not pass through Python: the engine reads and writes the descriptor itself. One read(2)
or writev(2) is one message: a VnetHeader of ten bytes, then one IP packet without any other header
before it. With offloads that packet may be a super-packet: up to 64 KiB of one flow under one set
of headers, to be cut into segments of `gso_size` (Documentation/networking/tuntap.rst).
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Offload:
    """Which super-packets a device gives and takes. Without any, checksums are complete too."""

    tcp: bool
    udp: bool


class VnetHeader(NamedTuple):
    """struct virtio_net_hdr (include/uapi/linux/virtio_net.h): what is left to do on a packet.

    All zero: a plain packet. Lengths and offsets in bytes, from the first byte of the packet.
    """

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        return _VNET.pack(*self)

    @classmethod
    def unpack(cls, message: bytes) -> "VnetHeader":
        """The header at the start of `message`, which has at least VNET_SIZE bytes."""
        return cls(*_VNET.unpack_from(message))


# Host byte order, as long as nobody asks for another by TUNSETVNETLE or TUNSETVNETBE.
_VNET = struct.Struct("=BBHHHH")
VNET_SIZE = _VNET.size


class TunDevice(Protocol):
    """A device that a reader of messages can be put on."""

    @property
    def name(self) -> str:
        """The interface name, at most 15 characters."""

    @property
    def mtu(self) -> int:
        """The largest IP packet, or segment of a super-packet, that comes from it, in bytes."""

    @property
    def offload(self) -> Offload:
        """What it accepted; it is written, and expects to be read, accordingly."""

    def fileno(self) -> int:
        """The descriptor, which never blocks; -1 once it is closed."""

    def close(self) -> None:
        """Give the device up; a second call does nothing."""
