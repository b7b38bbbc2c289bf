"""UDP at a fixed rate between two namespaces: the programs are `udpload.c`, compiled on first
use.
"""

from __future__ import annotations

import atexit
import itertools
import json
import select
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cli.demo.netns import Namespace, command, terminate

PORT = 7100
_LINGER = 3.0  # seconds that the receiver waits beyond the sender's time
_ON_SCHEDULE = 0.95  # of the rate: a sender that made less was the limit itself
_runs = itertools.count(1)  # a straggler of the run before must not count


@dataclass(frozen=True)
class Trial:
    """What came of one rate."""

    target: float  # packets a second that were asked for
    sent: int
    refused: int  # by the sender's own socket
    received: int  # each number once
    duplicates: int
    reordered: int
    dropped: int  # by the receiver's own socket: then the receiver was the limit
    seconds: float  # of sending

    @property
    def loss(self) -> float:
        """Share of the packets sent that did not arrive."""
        return 1 - self.received / self.sent if self.sent else 1.0

    @property
    def rate(self) -> float:
        """Packets a second that arrived."""
        return self.received / self.seconds if self.seconds else 0.0

    @property
    def late(self) -> bool:
        """The sender did not keep its schedule."""
        return self.sent < _ON_SCHEDULE * self.target * self.seconds

    def passes(self, loss: float) -> bool:
        """The sender kept its rate and less than `loss` was lost."""
        return not self.late and self.loss < loss


@cache
def program() -> Path:
    """The compiled udpload; RuntimeError when there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler (apt-get install gcc libc6-dev)")
    folder = Path(tempfile.mkdtemp(prefix="martlet-udpload-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / "udpload"
    source = Path(__file__).with_name("udpload.c")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    command([compiler, *flags, "-o", str(target), str(source)])
    return target


def trial(
    a: Namespace, b: Namespace, target: str, *, size: int, rate: float, seconds: float
) -> Trial:
    """Send `rate` datagrams of `size` octets a second from a to `target` in b."""
    run = str(next(_runs))
    receive = [str(program()), "receive", target, str(PORT), run, f"{seconds + _LINGER:.3f}"]
    receiver = b.popen(receive, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert receiver.stdout is not None and receiver.stderr is not None
        ready = select.select([receiver.stdout], [], [], 5.0)[0] and receiver.stdout.readline()
        if ready != b"ready\n":
            terminate([receiver])
            raise RuntimeError(f"udpload does not listen at {target}")
        send = ["send", target, str(PORT), run, str(size), f"{rate:.0f}", f"{seconds:.3f}"]
        sent = a.run([str(program()), *send], timeout=seconds + 15).stdout
        received = receiver.communicate(timeout=seconds + _LINGER + 5)[0].decode()
    finally:
        terminate([receiver])
    return outcome(rate, json.loads(sent), json.loads(received))


def outcome(rate: float, sender: dict[str, Any], receiver: dict[str, Any]) -> Trial:
    """From the JSON lines of both programs."""
    return Trial(
        rate,
        sender["sent"],
        sender["refused"],
        receiver["received"],
        receiver["duplicates"],
        receiver["reordered"],
        receiver["dropped"],
        sender["seconds"],
    )
