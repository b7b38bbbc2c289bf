"""The port between the connection and the data path: what a packet carries, one datagram each."""

from typing import Protocol


class Datapath(Protocol):
    """IP packets on one side, DATAGRAM payloads (RFC 9221) on the other.

    The connection pulls, so that nothing is encoded before there is a window to send it in and
    a path whose size is known; nothing oversize can ever wait in aioquic's queue.
    """

    @property
    def has_pending(self) -> bool:
        """Whether there is anything to send."""

    def next_datagram(self, room: int, now: float) -> bytes | None:
        """The next payload, at most `room` bytes; the same one until `sent` is called."""

    def sent(self, packet_number: int, now: float) -> None:
        """The payload last returned has left in this packet."""

    def received(self, packet_number: int, payload: bytes, now: float) -> None:
        """A payload arrived in this packet."""


class PullQueue:
    """Stands where aioquic keeps its list of pending datagrams, and asks the data path instead."""

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath

    def __bool__(self) -> bool:
        return self._datapath.has_pending

    def __getitem__(self, index: int) -> bytes:
        return b""  # the frame writer asks the data path itself, it knows the room left

    def popleft(self) -> None:
        pass
