"""A paced TCP stream of numbered blocks, traced at both ends: `python -m bench.stream serve|send`.

The sender makes a block every few milliseconds on an absolute schedule, whether or not the stream
moves; what TCP does not take waits, up to a bound. The receiver records when each block was
complete (`cli.demo.trace`), so a stall is a gap, as it is for probes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from cli.demo.core import PYTHON_ENV
from cli.demo.netns import Namespace, terminate
from cli.demo.trace import Report, Trace, TraceWriter, last_arrival, report

PORT = 7011
EVERY = 0.01  # seconds between two blocks
_HEAD = struct.Struct("<qd")  # number, when it was made
_BACKLOG = 1 << 20  # bytes that wait while the stream stands still; more are not made
_FLUSH = 0.05  # seconds between flushes of the record file
_CONNECT = 10.0  # seconds


def serve(bind: str, size: int, out: Path) -> None:
    """Record the blocks of one connection until it ends."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, PORT), family=family) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
    pending = bytearray()
    with out.open("wb") as file, connection:
        writer = TraceWriter(file)
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 18):
                now = time.monotonic()
                pending += data
                whole = len(pending) // size * size
                for at in range(0, whole, size):
                    number, made = _HEAD.unpack_from(pending, at)
                    writer.arrived(number, made, now)
                del pending[:whole]
                writer.flush()
        writer.ended(0, time.monotonic())
        writer.flush()


def send(target: str, size: int, out: Path) -> None:
    """Make and send blocks until SIGTERM, or until the connection breaks."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    padding = bytes(size - _HEAD.size)
    pending = bytearray()
    with out.open("wb") as file, socket.create_connection((target, PORT), _CONNECT) as stream:
        stream.setblocking(False)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer = TraceWriter(file)
        number, due, flush_due = 0, time.monotonic(), 0.0
        while not stopped:
            now = time.monotonic()
            if now >= due:
                due += EVERY
                if len(pending) < _BACKLOG:
                    pending += _HEAD.pack(number, now) + padding
                    writer.sent(number, now)
                    number += 1
                if now >= flush_due:
                    writer.flush()
                    flush_due = now + _FLUSH
                continue
            ready = select.select([], [stream] if pending else [], [], due - now)[1]
            if ready:
                try:
                    del pending[: stream.send(pending)]
                except BlockingIOError:
                    continue
                except OSError as error:
                    writer.ended(error.errno or -1, time.monotonic())
                    return


class Stream:
    """A stream between two namespaces, at `mbit` a second."""

    def __init__(
        self, source: Namespace, target: Namespace, address: str, directory: Path, mbit: float
    ) -> None:
        size = max(_HEAD.size, round(mbit * 1e6 / 8 * EVERY))
        self._sent, self._arrived = directory / "stream-sent", directory / "stream-arrived"
        log = directory / "stream.log"
        module = [sys.executable, "-m", "bench.stream"]
        options = ["--size", str(size), "--address", address]
        served = [*module, "serve", *options, "--out", str(self._arrived)]
        read, write = os.pipe()
        with open(read, "rb") as ready:
            try:
                server = target.popen(served, env=PYTHON_ENV, stdout=write, log=log)
            finally:
                os.close(write)
            ready.readline()
        sending = [*module, "send", *options, "--out", str(self._sent)]
        self._processes = [server, source.popen(sending, env=PYTHON_ENV, log=log)]

    def last(self) -> float:
        """When the newest block came, time.monotonic(); 0 when none has."""
        return last_arrival(self._arrived) or 0.0

    def closed(self) -> bool:
        """Whether an end of it has ended."""
        return any(process.poll() is not None for process in self._processes)

    def report(self, begin: float, end: float) -> Report:
        """What the receiver felt in a window."""
        sent = Trace.read(self._sent, begin - 1.0).sent
        arrivals = Trace.read(self._arrived, begin - 1.0).arrivals
        return report(sent, arrivals, EVERY, begin, end)

    def stop(self) -> None:
        """End both ends; the traces stay readable."""
        terminate(self._processes)


def main(arguments: list[str] | None = None) -> None:
    """Run one end."""
    parser = argparse.ArgumentParser(prog="python -m bench.stream")
    parser.add_argument("end", choices=("serve", "send"))
    parser.add_argument("--address", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    run = serve if options.end == "serve" else send
    run(options.address, options.size, options.out)


if __name__ == "__main__":
    main()
