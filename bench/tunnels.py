"""The tunnels that are measured beside each other, each brought up on any ground."""

from __future__ import annotations

import argparse
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.ground import HOSTS, OTHER, WAIT, Ground
from cli.demo.core import IMPORT_ROOT
from cli.demo.netns import Namespace, terminate
from cli.demo.world import PORT

INNER = {"A": "10.88.0.1", "B": "10.88.0.2"}
OURS = "martlet"
BARE = "veth"
_SETTLE = 1.0  # seconds: a path's MTU is known a few round trips after the path
_WG_PORT = 51820
_WG_MTU = 1420  # what wg-quick gives a tunnel over a wire of 1,500


@dataclass
class Running:
    """A tunnel that passes packets: B's address through it, and its processes by host."""

    target: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        """Of both ends."""
        return [process.pid for process in self.processes.values()]


class Tunnel(Protocol):
    """Something between A and B that has a name."""

    @property
    def name(self) -> str: ...

    def up(self, ground: Ground) -> AbstractContextManager[Running]:
        """Up for the length of the context; RuntimeError or CommandError when it does not come
        up.
        """
        ...


@dataclass(frozen=True)
class Bare:
    """No tunnel: the wire itself."""

    name: str = BARE

    @contextmanager
    def up(self, ground: Ground) -> Iterator[Running]:
        """Nothing but the check that packets pass."""
        ground.wait(ground.outer["B"], {})
        yield Running(ground.outer["B"])


@dataclass(frozen=True)
class Martlet:
    """Martlet from any checkout of the sources. A dials B."""

    root: Path = Path(IMPORT_ROOT)
    python: str = sys.executable
    name: str = OURS

    @property
    def command(self) -> list[str]:
        """The program, from this checkout and no other: -m looks in the current folder first."""
        path = f"PYTHONPATH={self.root}"
        return ["env", f"--chdir={self.root}", path, self.python, "-m", "cli.main"]

    @contextmanager
    def up(self, ground: Ground) -> Iterator[Running]:
        """Both daemons, with keys of their own."""
        keys = {name: ground.directory / f"martlet-{name}.key" for name in HOSTS}
        public: dict[str, str] = {}
        for name, key in keys.items():
            key.unlink(missing_ok=True)  # of the round before
            made = ground.hosts[name].run([*self.command, "keygen", str(key)])
            public[name] = made.stdout.strip()
        running = Running(INNER["B"])
        try:
            for name in ("B", "A"):
                config = ground.directory / f"martlet-{name}.toml"
                toml = self._config(ground, name, keys[name], public[OTHER[name]])
                config.write_text(toml + self.settings(ground, name))
                log = ground.directory / f"martlet-{name}.log"
                argv = [*self.command, "up", str(config)]
                environment = self.environment(ground)
                running.processes[name] = ground.hosts[name].popen(argv, log=log, env=environment)
            ground.wait(running.target, running.processes)
            time.sleep(_SETTLE)
            yield running
        finally:
            terminate(list(running.processes.values()))

    def settings(self, ground: Ground, name: str) -> str:
        """More tables for the configuration of a host."""
        return ""

    def environment(self, ground: Ground) -> dict[str, str]:
        """More of it, for both daemons."""
        return {}

    @staticmethod
    def _config(ground: Ground, name: str, key: Path, public: str) -> str:
        other = OTHER[name]
        lines = [
            "[interface]",
            'name = "mt0"',
            f'address = ["{INNER[name]}/24"]',
            f'private_key = "{key}"',
            *([f"listen_port = {PORT}"] if name == "B" else []),
            "",
            "[[peer]]",
            f'name = "{other.lower()}"',
            f'public_key = "{public}"',
            *([f'endpoint = "{ground.outer["B"]}:{PORT}"'] if name == "A" else []),
            f'allowed_ips = ["{INNER[other]}/32"]',
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class WireGuardGo:
    """wireguard-go, the userspace WireGuard; needs `wg` too."""

    program: str
    name: str = "wireguard-go"

    def version(self) -> str:
        """What it says of itself."""
        done = subprocess.run(
            [self.program, "--version"], capture_output=True, text=True, check=False
        )
        return (done.stdout.splitlines() or [""])[0]

    @contextmanager
    def up(self, ground: Ground) -> Iterator[Running]:
        """Both ends, configured with `wg` and `ip`; the MTU is the one of wg-quick."""
        keys = {name: _wg_keys(ground.hosts[name]) for name in HOSTS}
        # The control sockets are named after the devices, and shared by all namespaces.
        token = secrets.token_hex(3)
        devices = {name: f"wg{token}{name}" for name in HOSTS}
        running = Running(INNER["B"])
        try:
            for name in HOSTS:
                log = ground.directory / f"wireguard-go-{name}.log"
                running.processes[name] = ground.hosts[name].popen(
                    [self.program, "-f", devices[name]],
                    log=log,
                    env={"WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
                )
            for name, space in ground.hosts.items():
                self._configure(ground, space, name, devices[name], keys)
            ground.wait(running.target, running.processes)
            time.sleep(_SETTLE)
            yield running
        finally:
            terminate(list(running.processes.values()))

    def _configure(
        self,
        ground: Ground,
        space: Namespace,
        name: str,
        device: str,
        keys: dict[str, tuple[str, str]],
    ) -> None:
        control = Path(f"/var/run/wireguard/{device}.sock")
        deadline = time.monotonic() + WAIT
        while not control.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.program} did not start in {name}")
            time.sleep(0.02)
        private = ground.directory / f"wireguard-{name}.key"
        private.touch(0o600)
        private.write_text(keys[name][0])
        other = OTHER[name]
        ours = f"{device} listen-port {_WG_PORT} private-key {private}"
        theirs = f"peer {keys[other][1]} allowed-ips {INNER[other]}/32"
        endpoint = f"endpoint {ground.outer[other]}:{_WG_PORT}"
        space.run(["wg", "set", *f"{ours} {theirs} {endpoint}".split()])
        space.batch(
            f"addr add {INNER[name]}/24 dev {device}", f"link set dev {device} mtu {_WG_MTU} up"
        )


def _wg_keys(space: Namespace) -> tuple[str, str]:
    private = space.run(["wg", "genkey"]).stdout.strip()
    return private, space.run(["wg", "pubkey"], input=private).stdout.strip()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose tunnels."""
    parser.add_argument(
        "--wireguard-go",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="one more wireguard-go, beside the one on PATH; may be repeated",
    )
    parser.add_argument(
        "--martlet", type=Path, metavar="DIR", help="another checkout of martlet, built there"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="these tunnels; repeatable"
    )


def chosen(options: argparse.Namespace) -> list[Tunnel]:
    """The bare wire, martlet, and every wireguard-go there is; ValueError for a bad option."""
    tunnels: list[Tunnel] = [Bare()]
    tunnels.append(Martlet(options.martlet.resolve()) if options.martlet else Martlet())
    system = shutil.which("wireguard-go")
    extra = [named(given, number) for number, given in enumerate(options.wireguard_go, 2)]
    if shutil.which("wg") is None:
        print("no wg here (apt-get install wireguard-go wireguard-tools)", file=sys.stderr)
        system, extra = None, []
    elif system is None:
        print("no wireguard-go here (apt-get install wireguard-go)", file=sys.stderr)
    if system:
        tunnels.append(WireGuardGo(system))
    tunnels += [WireGuardGo(path, name) for name, path in extra]
    names = [tunnel.name for tunnel in tunnels]
    if len(set(names)) < len(names):
        raise ValueError(f"two tunnels of one name: {', '.join(names)}")
    unknown = set(options.only) - set(names)
    if unknown:
        raise ValueError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    return [tunnel for tunnel in tunnels if not options.only or tunnel.name in options.only]


def named(given: str, number: int) -> tuple[str, str]:
    """Name and absolute path from "[NAME=]PATH"; ValueError when that is no program."""
    name, found, path = given.partition("=")
    if not found:
        name, path = f"wireguard-go {number}", given
    if not (resolved := shutil.which(path)):
        raise ValueError(f"--wireguard-go {given}: no such program")
    return name, str(Path(resolved).resolve())


def peers_of(tunnels: Sequence[Tunnel]) -> list[str]:
    """Names of those that are neither the bare wire nor ours."""
    return [tunnel.name for tunnel in tunnels if tunnel.name not in (BARE, OURS)]
