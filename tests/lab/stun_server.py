"""A real STUN server in the middle of a world: Debian's coturn, without TURN.

     [A] u0 --[natA0]-- a0 +------+ b0 --[natB0]-- u0 [B]
                           | core |  198.51.100.1:3478 (coturn)
     [A] u1 --[natA1]-- a1 +------+ b1 --[natB1]-- u1 [B]

It reads and writes nothing outside its directory, and ends with its namespace or by `stop`.
"""

from __future__ import annotations

import time
from pathlib import Path

from cli.demo.netns import Namespace, terminate
from cli.demo.pair import tail
from cli.demo.world import World

PORT = 3478  # RFC 8489 section 18.6
_START = 10.0  # seconds it may take to listen


class StunServer:
    """Listens on the core's first address of each family; running when the constructor returns."""

    def __init__(self, world: World, directory: Path) -> None:
        self.space: Namespace = world.core
        self.addresses = dict(world.uplink("A").cores)
        self.endpoints = [
            f"[{host}]:{PORT}" if ":" in host else f"{host}:{PORT}"
            for host in self.addresses.values()
        ]
        config = directory / "coturn.conf"
        self.log = directory / "coturn.log"
        config.write_text(self._config(directory))
        self._process = self.space.popen(["turnserver", "-c", str(config)], log=self.log)
        deadline = time.monotonic() + _START
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"turnserver does not listen: {tail(self.log)}")
            time.sleep(0.02)

    def stop(self) -> None:
        terminate([self._process])

    def _listens(self) -> bool:
        listening = self.space.run(["ss", "-Hlun", f"sport = :{PORT}"]).stdout
        return all(endpoint in listening for endpoint in self.endpoints)

    def _config(self, directory: Path) -> str:
        lines = [f"listening-ip={host}" for host in self.addresses.values()]
        lines += [f"listening-port={PORT}", "stun-only", "no-auth", "no-rfc5780", "no-cli"]
        lines += ["no-tcp", "no-tls", "no-dtls", "no-stdout-log", "simple-log"]
        lines += [f"log-file={directory}/coturn.events", f"pidfile={directory}/coturn.pid"]
        lines += [f"userdb={directory}/coturn.db"]
        return "\n".join(lines) + "\n"
