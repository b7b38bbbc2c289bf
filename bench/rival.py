"""wireguard-go in the place of martlet, in the same world and under the same probes.

The device has the inner addresses of `cli.demo.pair`, and both ends listen at the port that the
NATs forward. A dials B; B answers where A was last heard, and so does A: that is how WireGuard
roams. Which uplink a host sends from is up to its routes: when an interface goes down, the kernel
takes its default route away and the one with the next metric is there already. A script has to
tell it (`WireGuardPair.kick`).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.demo.pair import INNER, Pair, PairError, tail
from cli.demo.world import PORT, HostName

_START = 10.0  # seconds
_MTU = 1420  # of wg-quick
_POLL = 0.02  # seconds
_OTHER: dict[HostName, HostName] = {"A": "B", "B": "A"}
_LENGTHS = {4: (24, 32), 6: (64, 128)}


def missing() -> str:
    """What must be installed for this; empty when nothing."""
    absent = [program for program in ("wireguard-go", "wg") if shutil.which(program) is None]
    return f"no {', no '.join(absent)} here" if absent else ""


@dataclass
class WireGuardPair(Pair):
    """A wireguard-go at both ends."""

    _keys: dict[HostName, tuple[str, str]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the keys."""
        for name in self.world.hosts:
            private = self.space(name).run(["wg", "genkey"]).stdout.strip()
            public = self.space(name).run(["wg", "pubkey"], input=private).stdout.strip()
            self._keys[name] = private, public
            self.key(name).touch(0o600)
            self.key(name).write_text(private)

    def device(self, name: HostName) -> str:
        """The control sockets are named after the devices, and shared by all namespaces."""
        return f"{self.world.spaces.prefix}{name}"

    def start(self, name: HostName) -> None:
        """Start and configure one end."""
        space, device = self.space(name), self.device(name)
        self.processes[name] = space.popen(
            ["wireguard-go", "-f", device],
            env={"WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
            log=self.log(name),
        )
        control = Path(f"/var/run/wireguard/{device}.sock")
        deadline = time.monotonic() + _START
        while not control.exists():
            if time.monotonic() > deadline or self.processes[name].poll() is not None:
                raise PairError(f"wireguard-go did not start:\n{tail(self.log(name))}")
            time.sleep(_POLL)
        other = _OTHER[name]
        allowed = ",".join(f"{inner}/{_LENGTHS[f][1]}" for f, inner in INNER[other].items())
        argv = ["wg", "set", device, "listen-port", str(PORT), "private-key", str(self.key(name))]
        argv += ["peer", self._keys[other][1], "allowed-ips", allowed]
        if name == "A":
            argv += ["endpoint", self.world.endpoints("B")[0]]
        space.run(argv)
        addresses = [
            f"addr add {inner}/{_LENGTHS[family][0]} dev {device}{' nodad' if family == 6 else ''}"
            for family, inner in INNER[name].items()
        ]
        space.batch(f"link set dev {device} mtu {_MTU} up", *addresses)

    def kick(self, name: HostName) -> None:
        """What scripts around it do after a change of addresses or routes: set the endpoint that it
        has again. It then forgets the source address that it keeps sending from, which it does not
        by itself when the kernel says that the network is unreachable.
        """
        device = self.device(name)
        endpoint = f"$(wg show {device} endpoints | cut -f2)"
        peer = self._keys[_OTHER[name]][1]
        self.space(name).run(["sh", "-c", f"wg set {device} peer {peer} endpoint {endpoint}"])

    def status(self, name: HostName) -> dict[str, Any]:
        """It has none."""
        return {}

    def history(self, name: HostName) -> list[dict[str, Any]]:
        """It has none."""
        return []
