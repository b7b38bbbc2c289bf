"""Offloads of a network interface by their names of `ethtool -k`, without that program."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from collections.abc import Collection, Sequence

from cli.demo.netns import SIOCETHTOOL, Namespace

# linux/ethtool.h
_GSTRINGS, _GSSET_INFO, _SFEATURES = 0x1B, 0x37, 0x3B
_SET_OF_FEATURES = 4  # ETH_SS_FEATURES
_NAME = 32  # octets, ETH_GSTRING_LEN


def switch(
    space: Namespace, interface: str, *, on: Collection[str] = (), off: Collection[str] = ()
) -> None:
    """Turn features of an interface on and off; names that this kernel does not know are left
    out.
    """

    def apply() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            names = _names(control, interface)
            _ioctl(control, interface, request(names, on, off))

    space.call(apply)


def request(names: Sequence[str], on: Collection[str], off: Collection[str]) -> bytes:
    """The struct ethtool_sfeatures: for every 32 features which ones are meant, and their state."""
    blocks = [[0, 0] for _ in range((len(names) + 31) // 32)]
    for index, name in enumerate(names):
        if name in on or name in off:
            blocks[index // 32][0] |= 1 << index % 32
        if name in on:
            blocks[index // 32][1] |= 1 << index % 32
    words = [word for block in blocks for word in block]
    return struct.pack(f"=II{len(words)}I", _SFEATURES, len(blocks), *words)


def _names(control: socket.socket, interface: str) -> list[str]:
    """All features that the kernel knows, in the order of their bits."""
    question = struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _SET_OF_FEATURES, 0)
    (count,) = struct.unpack_from("=I", _ioctl(control, interface, question), 16)
    header = struct.pack("=III", _GSTRINGS, _SET_OF_FEATURES, count)
    answer = _ioctl(control, interface, header + bytes(count * _NAME))[len(header) :]
    parts = (answer[i * _NAME : (i + 1) * _NAME] for i in range(count))
    return [part.split(b"\0", 1)[0].decode() for part in parts]


def _ioctl(control: socket.socket, interface: str, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    call = struct.pack("16sP", interface.encode(), ctypes.addressof(buffer))
    fcntl.ioctl(control, SIOCETHTOOL, call)
    return buffer.raw
