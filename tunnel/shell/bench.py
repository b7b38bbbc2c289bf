"""The tunnel's side of `martlet bench`: a child for every peer that wants to measure.

The child (`load.py`) listens on our address inside the tunnel. It is a process of its own because
the data path runs in ours, and an ordinary one, so that what is measured is what any program
would get. It ends by itself in every case, ours included.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tunnel.shell import clock, load
from tunnel.shell.log import Log

PROGRAM = Path(load.__file__)

START_INTERVAL = 1.0
"""Seconds between two children for the same peer. Starting one holds up the loop, and with it the
data path, for half a millisecond (the first one longer): a peer must not do that all the time."""

END_WAIT = 1.0
"""Seconds that a killed child gets to be gone."""

_BACKLOG = 8


class BenchRefused(Exception):
    """The message is for the peer."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pidfd: int


class Benches:
    """The children of one tunnel, at most one for each peer. Lives in the running loop."""

    def __init__(self, device: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._device = device
        self._children: dict[str, _Child] = {}
        self._started_at: dict[str, float] = {}

    @property
    def running(self) -> dict[str, int]:
        """Process IDs of the children, by peer."""
        return {peer: child.process.pid for peer, child in self._children.items()}

    def serve(
        self, peer: str, address: str, sources: tuple[str, ...], seconds: int
    ) -> tuple[int, bytes]:
        """Start a child that listens on `address` for connections from `sources`.

        Returns its port and secret. Raises BenchRefused.
        """
        now = clock.now()
        if peer in self._children:
            raise BenchRefused("a bench is running already")
        if now - self._started_at.get(peer, float("-inf")) < START_INTERVAL:
            raise BenchRefused("the last bench was only just now")
        self._started_at[peer] = now
        secret = secrets.token_bytes(load.SECRET_BYTES)
        try:
            with _listen(address, self._device) as listener:
                port: int = listener.getsockname()[1]
                child = _spawn(listener, secret, [str(seconds), *sources])
        except OSError as error:
            _log.warning("cannot serve a bench", peer=peer, error=error)
            raise BenchRefused(f"it failed there: {error.strerror or 'no resources'}") from error
        self._children[peer] = child
        self._loop.add_reader(child.pidfd, self._ended, peer)
        _log.info("bench", peer=peer, address=address, port=port, process=child.process.pid)
        return port, secret

    def close(self) -> None:
        """End all children."""
        for peer, child in list(self._children.items()):
            child.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(END_WAIT)
            self._ended(peer)

    def _ended(self, peer: str) -> None:
        child = self._children.pop(peer)
        self._loop.remove_reader(child.pidfd)
        os.close(child.pidfd)
        assert child.process.stdin is not None
        child.process.stdin.close()
        child.process.poll()


def _listen(address: str, device: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Only what came through the tunnel, and so from an address that is its sender's.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        listener.bind((address, 0))
        listener.listen(_BACKLOG)  # connections wait there until the child is ready
    except BaseException:
        listener.close()
        raise
    return listener


def _spawn(listener: socket.socket, secret: bytes, arguments: list[str]) -> _Child:
    process = subprocess.Popen(
        [sys.executable, "-IS", str(PROGRAM), str(listener.fileno()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(listener.fileno(),),
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us; the child ends with its standard input
    )
    try:
        assert process.stdin is not None
        os.write(process.stdin.fileno(), secret)
        return _Child(process, os.pidfd_open(process.pid))
    except BaseException:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        raise


_log = Log("bench")
