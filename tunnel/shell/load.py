"""The load of `martlet bench`: what both ends do on a TCP connection through the tunnel.

Run as a program, this file is the answering end: a child of the tunnel's process, which has
better things to do. It needs the standard library alone, so that it starts within milliseconds
from any directory: `python -IS load.py LISTENER SECONDS SOURCE...`. LISTENER is a descriptor; the
secret is read from standard input, which stays open as long as the tunnel's process lives.

::

    opening = secret (16 bytes), kind (1 byte)        answered by WELCOME, or by the end
    ECHO      64 bytes come back, again and again
    SINK      everything is counted; every 100 ms a report: microseconds since the first byte,
              bytes since then (8 bytes each, big-endian)
    SOURCE    bytes come as fast as they go
    LIFELINE  nothing; the child ends when this connection does

The child ends when its lifeline does, after SECONDS, when nobody gave it a lifeline in time, and
when standard input ends, which it does with the tunnel's process.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection

SECRET_BYTES = 16
ECHO, SINK, SOURCE, LIFELINE = b"e", b"i", b"o", b"l"
WELCOME = b"+"

ECHO_BYTES = 64
BUFFER_BYTES = 256 << 10
"""One system call per quarter megabyte: some ten thousand a second at 20 Gbit/s."""
REPORT = struct.Struct(">QQ")
REPORT_INTERVAL = 0.1

LIFELINE_WAIT = 10.0
"""Seconds until somebody who asked for a bench must have connected: TCP's first four SYNs."""
OPENING_WAIT = 5.0
MAX_CONNECTIONS = 16
"""At a time; a bench has three."""

NOBODY = 65534
"""User and group without rights, on every Linux since it had overflowuid."""


def connect(
    address: tuple[str, int], secret: bytes, kind: bytes, *, device: str, timeout: float
) -> socket.socket:
    """A welcomed connection that leaves by `device` and no other way.

    Raises OSError: TimeoutError within `timeout` seconds, ConnectionError if not welcome.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        connection.connect(address)
        connection.sendall(secret + kind)
        if connection.recv(len(WELCOME)) != WELCOME:
            raise ConnectionAbortedError("not welcome")
    except BaseException:
        connection.close()
        raise
    return connection


def abort(connection: socket.socket) -> None:
    """End a connection at once, what is still to be sent included."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Raises EOFError at the end of the connection, TimeoutError as its timeout says."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


class Server:
    """The answering end of one bench. `sources` are the addresses it takes connections from."""

    def __init__(
        self, listener: socket.socket, secret: bytes, sources: Collection[str], seconds: float
    ) -> None:
        self._listener = listener
        self._listener.setblocking(False)  # whoever knocked may be gone by the time we open
        self._secret = secret
        self._sources = frozenset(sources)
        self._ends_at = time.monotonic() + seconds
        self._lifeline_by = time.monotonic() + LIFELINE_WAIT
        self._alive = False
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._over, self._bell = os.pipe2(os.O_CLOEXEC)

    def run(self, owner: int) -> None:
        """Serve until it is over; the descriptor `owner` ends when nobody wants us any more."""
        poll = select.poll()
        for descriptor in (self._listener.fileno(), owner, self._over):
            poll.register(descriptor, select.POLLIN)
        while True:
            until = self._ends_at
            if not self._alive:
                until = min(until, self._lifeline_by)
            wait = until - time.monotonic()
            if wait <= 0:
                return
            ready = [descriptor for descriptor, _ in poll.poll(wait * 1000 + 1)]
            if owner in ready or self._over in ready:
                return
            if ready:
                self._accept()

    def close(self) -> None:
        """Give up what a run needed; the connections' threads end with their connections."""
        over, self._over = self._over, -1
        bell, self._bell = self._bell, -1
        os.close(over)
        os.close(bell)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:
            return
        if address[0] not in self._sources or not self._slots.acquire(blocking=False):
            abort(connection)
            return
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):
                self._talk(connection)
        finally:
            abort(connection)
            self._slots.release()

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(OPENING_WAIT)
        opening = read_exactly(connection, SECRET_BYTES + 1)
        if not hmac.compare_digest(opening[:SECRET_BYTES], self._secret):
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        match opening[SECRET_BYTES:]:
            case b"e":
                connection.sendall(WELCOME)
                while True:
                    connection.sendall(read_exactly(connection, ECHO_BYTES))
            case b"i":
                connection.sendall(WELCOME)
                _sink(connection)
            case b"o":
                connection.sendall(WELCOME)
                data = os.urandom(BUFFER_BYTES)  # in case a link on the way compresses
                while True:
                    connection.sendall(data)
            case b"l":
                self._alive = True
                try:
                    connection.sendall(WELCOME)
                    connection.recv(1)
                finally:
                    os.write(self._bell, b"!")


def _sink(connection: socket.socket) -> None:
    buffer = bytearray(BUFFER_BYTES)
    count = connection.recv_into(buffer)
    begin = reported = time.monotonic()
    connection.settimeout(REPORT_INTERVAL)  # nothing came: that is worth a report, too
    while True:
        try:
            more = connection.recv_into(buffer)
            if not more:
                return
            count += more
        except TimeoutError:
            pass
        now = time.monotonic()
        if now - reported >= REPORT_INTERVAL:
            reported = now
            connection.sendall(REPORT.pack(int((now - begin) * 1e6), count))


def main(listening: int, seconds: int, sources: list[str]) -> None:
    """The child. Never returns."""
    # The kernel's own deadline, whatever becomes of the interpreter.
    signal.alarm(seconds + 1)
    listener = socket.socket(fileno=listening)
    with contextlib.suppress(OSError):  # not root: nothing to give up
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    secret = os.read(0, SECRET_BYTES)
    if len(secret) == SECRET_BYTES:
        Server(listener, secret, sources, seconds).run(owner=0)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
