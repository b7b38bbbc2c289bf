"""A meeting under observation: the internet of a pair, two tunnels in it, and what they did.

Everything about a run is in artifacts/nat-<pair>-<random>/: configurations and logs of both
tunnels and of the servers, core.pcapng (every packet between the outermost routers and the
servers), keys.log, qlog/. It is removed unless `failed` is set.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from bench.ask import Asking
from bench.bed import ARTIFACTS
from bench.capture import Capture
from bench.kept import KeptScene
from bench.nat.internet import HOSTS, Internet
from bench.nat.kinds import Meeting
from bench.servers import tables
from cli.demo.pair import Pair
from cli.demo.world import HostName


class Place(KeptScene, Asking):
    """A context manager; the tunnels are prepared, not started. See `Internet` for the arguments.

    environment is added to that of both tunnels, settings to both configurations.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        delay: float = 0.005,
        turn: bool = True,
        dialled: bool = False,
        environment: Mapping[str, str] | None = None,
        settings: str = "",
    ) -> None:
        # Short: there are sockets in it, and the path of one has room for 107 bytes.
        name = re.sub(r"[^A-Za-z0-9-]+", "-", str(meeting))[:32].strip("-")
        super().__init__(ARTIFACTS / f"nat-{name}-{secrets.token_hex(3)}")
        self.net = Internet(
            meeting, delay=delay, turn=turn, dialled=dialled, directory=self.directory
        )
        self._settings = settings
        self._environment = environment or {}

    def _build(self, stack: ExitStack) -> None:
        net = stack.enter_context(self.net)
        environment = {
            "SSLKEYLOGFILE": str(self.directory / "keys.log"),
            "QLOGDIR": str(self.directory / "qlog"),
            # Whom the system trusts: TURN over TLS has no setting of its own for that.
            "SSL_CERT_FILE": str(net.certificate.certificate),
        }
        self.pair = Pair(net, self.directory, {**environment, **self._environment})
        self.pair.settings = self.servers() + self._settings
        self.pair.prepare()
        self.ask_in({host: net.hosts[host].space for host in HOSTS})
        self.capture = Capture(
            net.core, net.wires, self.directory / "core.pcapng", what="udp or tcp"
        )
        stack.callback(self.capture.stop)

    def servers(self) -> str:
        """The tables of a configuration that name the servers; empty where one end is dialled."""
        net = self.net
        if net.endpoints("B"):
            return ""
        return tables(net.broker, net.stun, net.turn)

    # ---- what the tunnels are doing ----

    def start(self, host: HostName, patience: float = 15.0) -> bool:
        """Start a tunnel and wait until it answers and, if there is a broker to use, has subscribed
        to something; whether that came true.
        """
        before = self.net.broker.subscriptions()
        needed = 1 if self.servers() else 0
        self.pair.start(host)

        def ready() -> bool:
            return bool(self.status(host)) and (self.net.broker.subscriptions() >= before + needed)

        return self.until(ready, patience)

    def active(self, host: HostName) -> dict[str, Any]:
        """The path of a host in `status --json` that is in use; empty when there is none."""
        return next((path for path in self.paths(host) if path.get("active")), {})

    def relayed(self, host: HostName) -> bool | None:
        """Whether a host's active path goes through the TURN server; None: it has no path.

        By its addresses, whatever the tunnel calls it: a relayed address is the server's own.
        """
        path = self.active(host)
        if not path:
            return None
        ends = (str(path["local"]), str(path["remote"]))
        servers = self.net.turn.addresses if self.net.turn is not None else []
        return any(end.rpartition(":")[0].strip("[]") in servers for end in ends)

    def direct(self) -> bool:
        """Whether both ends send without a relay."""
        return all(self.relayed(host) is False for host in HOSTS)

    def through_turn(self) -> int:
        """Frames that the TURN server's wire has carried so far, both ways."""
        ways = self.net.link.counters().get("turn", {})
        return sum(int(way["frames"]) for way in ways.values())
