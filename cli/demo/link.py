"""Wires with delay, loss, rate and black holes, in userspace: `python -m cli.demo.link`.

    nat --veth-- [ left   wire   right ] --veth-- core         (the brackets are the wires' own
    namespace)

`netem` may be missing from the kernel, so one process forwards Ethernet frames between pairs of
interfaces through packet sockets. Each wire has its own settings for each way, changed at run
time over the control socket:

    {"wire": "A0", "delay": 0.005, "loss": 0.01}          both ways
    {"wire": "A0", "way": "up", "blackhole": true}        only left to right
    {}                                                    change nothing

Every answer has the settings and counters of all wires.

Segmentation and checksum offload must be off on all ends (`Namespace.offloads_off`). `select` is
used for its microsecond timeout: Python's `epoll` rounds up to whole milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import heapq
import random
import select
import signal
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cli.demo.control import ControlClient, ControlServer

ETH_P_ALL = 0x0003  # linux/if_ether.h
SOL_PACKET = 263  # linux/socket.h
PACKET_IGNORE_OUTGOING = 23  # linux/if_packet.h: we must not see the frames that we send ourselves
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h: beyond net.core.*mem_max
PR_SET_TIMERSLACK = 29  # linux/prctl.h; the default of 50 us is half of the accuracy wanted here
_FRAME = 65536  # bytes, for a sender whose segmentation offload was left on
_BURST = 64  # frames taken from one socket before the due ones are sent
_BUFFER = (
    4 << 20
)  # bytes of socket buffer: 100 ms of stall at 5,000 packets a second fit many times


@dataclass
class Way:
    """Settings and counters of one direction of a wire."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds, uniform, added to the delay; may reorder
    ordered: bool = False  # as a queue: nothing is due before what came before it
    loss: float = 0.0  # probability
    duplicate: float = 0.0  # probability
    reorder: float = 0.0  # probability that a frame overtakes the delay altogether
    rate: float = 0.0  # bits per second; 0 is unlimited
    queue: float = 0.1  # seconds of queue in front of `rate`; what does not fit is dropped
    mtu: int = (
        0  # larger IP packets vanish without an ICMP message (a PMTU black hole); 0 is no limit
    )
    blackhole: bool = False
    frames: int = 0
    octets: int = 0
    dropped: int = 0


_SETTINGS = {field.name for field in fields(Way)} - {"frames", "octets", "dropped"}
_ETHERNET_HEADER = 14


class Wires:
    """All wires of the process, their packet sockets and the one queue of frames in flight."""

    def __init__(self, rng: random.Random) -> None:
        self.ways: dict[str, dict[str, Way]] = {}
        self._rng = rng
        self._inputs: dict[int, tuple[socket.socket, socket.socket, Way]] = {}
        self._busy_until: dict[int, float] = {}
        self._newest_due: dict[int, float] = {}
        self._flight: list[tuple[float, int, socket.socket, bytes]] = []
        self._count = 0

    def add(self, name: str, left: str, right: str, delay: float) -> None:
        """A wire between two interfaces, `delay` seconds each way."""
        ends = _open(left), _open(right)
        up, down = Way(delay=delay), Way(delay=delay)
        self.ways[name] = {"up": up, "down": down}
        self._inputs[ends[0].fileno()] = (ends[0], ends[1], up)
        self._inputs[ends[1].fileno()] = (ends[1], ends[0], down)

    def filenos(self) -> list[int]:
        """Packet sockets to wait on."""
        return list(self._inputs)

    def receive(self, fd: int) -> None:
        """Take the frames waiting on a packet socket and schedule them."""
        source, target, way = self._inputs[fd]
        for _ in range(_BURST):
            try:
                frame = source.recv(_FRAME)
            except OSError:  # empty, or the interface went down: both pass
                return
            self._schedule(frame, target, way, fd)

    def _schedule(self, frame: bytes, target: socket.socket, way: Way, fd: int) -> None:
        now = time.monotonic()
        oversize = way.mtu and len(frame) > way.mtu + _ETHERNET_HEADER
        if way.blackhole or oversize or (way.loss and self._rng.random() < way.loss):
            way.dropped += 1
            return
        due = now
        if way.rate:
            start = max(now, self._busy_until.get(fd, 0.0))
            if start - now > way.queue:
                way.dropped += 1
                return
            due = self._busy_until[fd] = start + len(frame) * 8 / way.rate
        if not (way.reorder and self._rng.random() < way.reorder):
            due += way.delay
        if way.jitter:
            due += self._rng.random() * way.jitter
        if way.ordered:
            due = self._newest_due[fd] = max(due, self._newest_due.get(fd, 0.0))
        way.frames += 1
        way.octets += len(frame)
        copies = 2 if way.duplicate and self._rng.random() < way.duplicate else 1
        for _ in range(copies):
            self._count += 1
            heapq.heappush(self._flight, (due, self._count, target, frame))

    def flush(self) -> float | None:
        """Send what is due; returns seconds until the next frame is, None when nothing is in
        flight.
        """
        flight = self._flight
        while flight:
            wait = flight[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, _, target, frame = heapq.heappop(flight)
            with contextlib.suppress(OSError):  # interface down or buffer full: lost, as on a cable
                target.send(frame)
        return None

    def control(self, request: dict[str, Any]) -> dict[str, Any]:
        """Apply a request of the module docstring; the answer has every wire's state."""
        name = request.pop("wire", None)
        only = request.pop("way", None)
        unknown = request.keys() - _SETTINGS
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        if name is not None:
            for way in [self.ways[name][only]] if only else self.ways[name].values():
                for key, value in request.items():
                    setattr(way, key, value)
        return {
            "wires": {
                wire: {direction: asdict(way) for direction, way in ways.items()}
                for wire, ways in self.ways.items()
            }
        }


class LinkControl:
    """The owner's handle on a running link process."""

    def __init__(self, path: Path) -> None:
        self._client = ControlClient(path)

    def set(self, wire: str, way: str | None = None, **settings: float | bool) -> None:
        """Change settings of a wire, both ways or one ("up" is left to right); in force on
        return.
        """
        extra: dict[str, Any] = {"way": way} if way else {}
        self._client.call(wire=wire, **extra, **settings)

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
        """wire -> "up"/"down" -> settings and counters."""
        wires: dict[str, dict[str, dict[str, Any]]] = self._client.call()["wires"]
        return wires

    def close(self) -> None:
        """Close the handle."""
        self._client.close()


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
        opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    opened.bind((interface, ETH_P_ALL))
    opened.setblocking(False)
    return opened


def main(arguments: list[str] | None = None) -> None:
    """Run the wires until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m cli.demo.link")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("wires", nargs="+", metavar="NAME:LEFT:RIGHT:DELAY_SECONDS")
    options = parser.parse_args(arguments)
    wires = Wires(random.Random(options.seed))
    for wire in options.wires:
        name, left, right, delay = wire.split(":")
        wires.add(name, left, right, float(delay))
    server = ControlServer(options.control, wires.control)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: exit(0))
    gc.disable()  # nothing here makes cycles, and a collection would be a stall of its own
    packets = wires.filenos()
    wait: float | None = None
    while True:
        readable, _, _ = select.select([*packets, *server.filenos()], [], [], wait)
        for fd in readable:
            if not server.ready(fd):
                wires.receive(fd)
        wait = wires.flush()


if __name__ == "__main__":
    main()
