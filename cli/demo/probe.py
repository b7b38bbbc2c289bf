"""UDP probes at a fixed spacing, one stream each way: `python -m cli.demo.probe`.

Run one at each end. Each sends to the other on an absolute schedule (a late probe does not shift
those that follow) and records what it sent and what arrived (`cli.demo.trace`) until SIGTERM. The
outcome of a window of time is read from both files by `both_ways`, also while they grow. Errors
of the network (no route, no address, refused) are recorded and sending goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import ipaddress
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from cli.demo.core import PYTHON_ENV
from cli.demo.link import PR_SET_TIMERSLACK
from cli.demo.netns import Namespace, terminate
from cli.demo.trace import Report, Trace, TraceWriter, last_arrival, report

PORT = 7007
SPACING = 0.005  # seconds: 200 probes a second each way
_PROBE = struct.Struct("<4sid")
_MAGIC = b"mlpr"
_FLUSH = 0.05  # seconds between flushes of the record file


def measure(bind: str, peer: str, port: int, spacing: float, size: int, out: Path) -> None:
    """Send and record until SIGTERM; `size` is the UDP payload in bytes."""
    family = socket.AF_INET6 if ipaddress.ip_address(peer).version == 6 else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_DGRAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    probe.bind((bind, port))
    probe.setblocking(False)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    gc.disable()  # nothing here makes cycles, and a collection would be a stall of its own
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    padding = bytes(max(0, size - _PROBE.size))
    with out.open("wb") as file:
        writer = TraceWriter(file)
        number = 0
        due = flush_due = time.monotonic()
        while not stopped:
            wait = due - time.monotonic()
            if wait <= 0:
                now = time.monotonic()
                error = 0
                try:
                    probe.sendto(_PROBE.pack(_MAGIC, number, now) + padding, (peer, port))
                except OSError as failure:
                    error = failure.errno or -1
                writer.sent(number, now, error)
                number += 1
                due += spacing
                if now >= flush_due:
                    writer.flush()
                    flush_due = now + _FLUSH
                continue
            if select.select([probe], [], [], wait)[0]:
                _drain(probe, writer)


def _drain(probe: socket.socket, writer: TraceWriter) -> None:
    while True:
        try:
            data = probe.recv(65535)
        except OSError:  # empty, or an ICMP error of an earlier probe
            return
        now = time.monotonic()
        if len(data) >= _PROBE.size and data.startswith(_MAGIC):
            _, number, sent = _PROBE.unpack_from(data)
            writer.arrived(number, sent, now)


class Probe:
    """A pair of probers between two namespaces; `a_to_b` and `b_to_a` in a report are the
    directions.
    """

    def __init__(
        self,
        a: Namespace,
        a_address: str,
        b: Namespace,
        b_address: str,
        directory: Path,
        *,
        spacing: float = SPACING,
        port: int = PORT,
        size: int = 64,
    ) -> None:
        self.spacing = spacing
        self._paths = (directory / f"probe-{port}-a", directory / f"probe-{port}-b")
        ends = ((a, a_address, b_address), (b, b_address, a_address))
        module = [sys.executable, "-m", "cli.demo.probe", "--port", str(port), "--size", str(size)]
        self._processes = [
            space.popen(
                [
                    *module,
                    *f"--spacing {spacing} --bind {bind} --peer {peer}".split(),
                    f"--out={path}",
                ],
                env=PYTHON_ENV,
                log=directory / "probe.log",
            )
            for (space, bind, peer), path in zip(ends, self._paths, strict=True)
        ]

    def traces(self, since: float = 0.0) -> tuple[Trace, Trace]:
        """What A and B have recorded so far, or from about `since` on."""
        return Trace.read(self._paths[0], since), Trace.read(self._paths[1], since)

    def report(self, begin: float, end: float) -> dict[str, Report]:
        """Reports of a window by direction, "a_to_b" and "b_to_a"."""
        return both_ways(*self.traces(), self.spacing, begin, end)

    def flowing(self, since: float) -> bool:
        """Whether probes have arrived at both ends after `since`."""
        return all((last_arrival(path) or 0.0) > since for path in self._paths)

    def stop(self) -> None:
        """End both probers; the traces stay readable."""
        terminate(self._processes)


def both_ways(a: Trace, b: Trace, spacing: float, begin: float, end: float) -> dict[str, Report]:
    """Reports of a window by direction from the traces of both ends."""
    return {
        "a_to_b": report(a.sent, b.arrivals, spacing, begin, end),
        "b_to_a": report(b.sent, a.arrivals, spacing, begin, end),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run one end until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m cli.demo.probe")
    parser.add_argument("--bind", required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--spacing", type=float, default=SPACING)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    measure(options.bind, options.peer, options.port, options.spacing, options.size, options.out)


if __name__ == "__main__":
    main()
