"""A running tunnel takes what was added to its configuration file."""

from __future__ import annotations

import os
from pathlib import Path

from tun.apply import Applied
from tun.plan import Step, plan
from tunnel.config import Config, check_own_key, load
from tunnel.config_change import Change, change
from tunnel.errors import ConfigError, LocalError
from tunnel.identity import PublicKey


def plan_of(config: Config) -> tuple[Step, ...]:
    """What has to be true of the interface. Raises TunError."""
    interface = config.interface
    networks = [network for peer in config.peers for network in peer.allowed_ips]
    return plan(interface.name, interface.address, interface.mtu, networks)


class Reloader:
    """Knows by what a tunnel runs, and from which file that came.

    `applied` is the plan of the interface as it was made true.
    """

    def __init__(self, config: Config, public_key: PublicKey, applied: Applied) -> None:
        self._running = config
        self._public_key = public_key
        self._applied = applied
        # Where it is now: a process in the background changes its directory.
        self._path = None if config.file is None else Path(os.path.abspath(config.file))

    def take(self) -> Change:
        """Read the file again, and give the interface its new addresses and routes.

        Returns what the node is to be told. Raises ConfigError, LocalError, TunError: then nothing
        has changed.
        """
        if self._path is None:
            raise LocalError("this tunnel was not started from a file")
        try:
            # Read as at the start, so that relative paths inside compare.
            wanted = load(self._path, known_as=self._running.file)
            check_own_key(wanted, self._public_key)
            found = change(self._running, wanted)
        except ConfigError as error:
            error.file = str(self._path)
            raise
        if found:
            self._applied.change(plan_of(wanted))
            self._running = wanted
        return found
