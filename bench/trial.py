"""Is a tunnel there yet? Packets that try to pass it all the time tell when it first was."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cli.demo.netns import Namespace

TRIAL_PORT = 7009
EVERY = 0.001  # seconds between the packets
_LOOK = 0.1  # seconds between looks at whether to stop


@contextmanager
def trying(
    source: Namespace, target: Namespace, address: str, *, every: float = EVERY
) -> Iterator[list[float]]:
    """Send to an address that does not exist yet until the context ends; yields when packets
    arrived (the first one only). Times are time.monotonic() seconds.
    """
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET

    def make() -> socket.socket:
        return socket.socket(kind, socket.SOCK_DGRAM)

    sender, receiver = source.call(make), target.call(make)
    receiver.bind(("::" if kind == socket.AF_INET6 else "0.0.0.0", TRIAL_PORT))
    receiver.settimeout(_LOOK)
    arrived: list[float] = []
    stopped = threading.Event()

    def receive() -> None:
        while not (arrived or stopped.is_set()):
            with contextlib.suppress(TimeoutError):
                receiver.recv(100)
                arrived.append(time.monotonic())

    def send() -> None:
        while not stopped.wait(every):
            with contextlib.suppress(OSError):
                sender.sendto(b"through?", (address, TRIAL_PORT))

    threads = [threading.Thread(target=receive), threading.Thread(target=send)]
    try:
        for thread in threads:
            thread.start()
        yield arrived
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        sender.close()
        receiver.close()
