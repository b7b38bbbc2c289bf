"""The port between the tunnel and the IP stack of this host; behind it: `linux.py`, `memory.py`."""

from collections.abc import Iterable
from typing import Protocol


class TunDevice(Protocol):
    """Whole IP packets, without any header before them, in and out of this host. Never blocks."""

    @property
    def name(self) -> str:
        """The interface name, at most 15 characters."""

    @property
    def mtu(self) -> int:
        """The largest packet that `read` returns, in bytes."""

    @property
    def dropped(self) -> int:
        """How many packets `write` has dropped so far: queue full, or not an IP packet."""

    def fileno(self) -> int:
        """A file descriptor that polls readable while `read` has something to return."""

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` packets this host sends, oldest first; [] when there are none.

        Raises TunError("gone") when the device was removed: no packet will ever come again.
        """

    def write(self, packets: Iterable[bytes]) -> int:
        """Deliver packets to this host, in order; returns how many it took, never raises.

        A packet that it does not take is dropped and counted, and the next one is tried.
        """

    def close(self) -> None:
        """Give the device up; a second call does nothing."""
