"""`martlet rendezvous` as users start it, inside a namespace."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from cli.demo.netns import Namespace
from cli.demo.pair import tail

_START = 20.0  # seconds until it must be ready; it takes one on a quiet machine


class Rendezvous:
    """Runs while it is entered; `ready` is what `--json` told."""

    def __init__(self, space: Namespace, log: Path, *arguments: str) -> None:
        self._space = space
        self._log = log
        self._arguments = arguments
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Rendezvous:
        self.process = self._space.popen(
            [sys.executable, "-m", "cli.main", "rendezvous", "--json", *self._arguments],
            stdout=subprocess.PIPE,
            log=self._log,
        )
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], _START)[0]:
            self.ready = json.loads(self.process.stdout.readline() or "{}")
        if not self.ready:
            raise RuntimeError(f"martlet rendezvous is not ready: {tail(self._log)}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(10)


def gone(pid: int, timeout: float = 5.0) -> bool:
    """Whether a process has ended, or does within the time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # nobody reaps it here
            return True
        time.sleep(0.02)
    return False
