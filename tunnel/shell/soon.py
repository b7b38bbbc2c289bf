"""Something to be done soon, and once however often it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Soon:
    """Call it: `action` runs in one of the next turns of the loop, never from inside the call."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._handle: asyncio.Handle | None = None
        self._stopped = False

    def __call__(self) -> None:
        if self._handle is None and not self._stopped:
            self._handle = self._loop.call_soon(self._run)

    def stop(self) -> None:
        """Never again, not even what was asked for already."""
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()

    def _run(self) -> None:
        self._handle = None
        self._action()
