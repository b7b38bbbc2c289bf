"""Every packet between the NATs, kept for a run that fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cli.demo.netns import Namespace, terminate

CORE_INTERFACES = ("a0", "a1", "b0", "b1")
_START = 10.0  # seconds that dumpcap may take to start


class Capture:
    """dumpcap on some interfaces of a namespace; interfaces of the core never go down, so it
    never ends early.

    `what` is a filter of libpcap. With `ring` bytes, only about the newest so many are kept, in
    files named after `path`.
    """

    def __init__(
        self,
        space: Namespace,
        interfaces: Sequence[str],
        path: Path,
        *,
        ring: int = 0,
        what: str = "udp",
    ) -> None:
        self.path = path
        argv = ["dumpcap", "-q", "-n", "-w", str(path), "-f", what]
        if ring:
            argv += ["-b", f"filesize:{ring // 4000}", "-b", "files:4"]
        for interface in interfaces:
            argv += ["-i", interface]
        log = path.with_suffix(".log")
        self._process = space.popen(argv, log=log)
        deadline = time.monotonic() + _START
        while not self._begun():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dumpcap did not start: {log.read_text()}")
            time.sleep(0.02)

    def _begun(self) -> bool:
        """The file has a header once it runs."""
        files = self.path.parent.glob(f"{self.path.stem}*{self.path.suffix}")
        return any(file.stat().st_size for file in files)

    def stop(self) -> None:
        """End the capture; the file is complete afterwards."""
        if self._process.poll() is None:
            time.sleep(0.2)  # packets wait in dumpcap's ring until it looks again
        terminate([self._process])
