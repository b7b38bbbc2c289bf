"""Asking running tunnels what `martlet status` and `martlet history` print."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cli.client import connect
from cli.demo.netns import Namespace
from cli.demo.pair import DEVICE
from cli.demo.world import HostName
from tunnel.errors import MartletError
from tunnel.shell.status import RUN_DIRECTORY

POLL = 0.02  # seconds between two looks at something that is waited for


class Asking:
    """The tunnels of some hosts, each with one peer. What does not answer says nothing."""

    def ask_in(self, spaces: Mapping[HostName, Namespace]) -> None:
        """Where they run."""
        self._places: dict[HostName, Path] = {}
        for host, space in spaces.items():
            inode = Path(f"/run/netns/{space.name}").stat().st_ino
            self._places[host] = Path(RUN_DIRECTORY) / str(inode)

    def _ask(self, host: HostName, verb: Literal["status", "history"]) -> Any:
        """What `martlet VERB --json` prints, without the second that starting it may take."""
        try:
            with connect(DEVICE, self._places[host]) as client:
                return client.status() if verb == "status" else client.history()
        except MartletError:
            return None

    def status(self, host: HostName) -> dict[str, Any]:
        """The part of the only peer in `status --json`; empty when there is none."""
        peers = (self._ask(host, "status") or {}).get("peers", [])
        found: dict[str, Any] = peers[0] if peers else {}
        return found

    def paths(self, host: HostName) -> list[dict[str, Any]]:
        """The paths of a host in `status --json`."""
        found: list[dict[str, Any]] = self.status(host).get("paths", [])
        return found

    def history(self, host: HostName) -> list[dict[str, Any]]:
        """The ledger of a host."""
        found: list[dict[str, Any]] = self._ask(host, "history") or []
        return found

    def active_path(self, host: HostName) -> str:
        """`local>remote`, "-" while there is none or the tunnel does not say."""
        return str(self.status(host).get("active_path") or "-")

    def second_path(self, host: HostName) -> str:
        """The path of a host that stands beside its active one, "" if there is none."""
        found = (path for path in self.paths(host) if path.get("backup"))
        return next((f"{path['local']}>{path['remote']}" for path in found), "")

    def counters(self, host: HostName) -> dict[str, int]:
        """The counters of the peer."""
        found: dict[str, int] = self.status(host).get("counters", {})
        return found

    @staticmethod
    def until(condition: Callable[[], bool], patience: float, poll: float = POLL) -> bool:
        """Wait for a condition; False when patience ended."""
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(poll)
        return True
