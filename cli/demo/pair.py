"""Two hosts of a world joined by a tunnel: keys, configurations, `martlet up` at both ends, sshd
and an ssh session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cli.demo.core import PYTHON_ENV
from cli.demo.netns import Namespace, Namespaces, command, terminate
from cli.demo.session import SPACING
from cli.demo.trace import Report, Trace, last_arrival, report
from cli.demo.world import PORT, Host, HostName

MARTLET = (sys.executable, "-m", "cli.main")
DEVICE = "mt0"
INNER: dict[HostName, dict[int, str]] = {
    "A": {4: "10.88.0.1", 6: "fd88::1"},
    "B": {4: "10.88.0.2", 6: "fd88::2"},
}
_LENGTHS = {4: (24, 32), 6: (64, 128)}  # prefix of the tunnel's network, and of one host in it
_OTHER: dict[HostName, HostName] = {"A": "B", "B": "A"}
_RUN_SSHD = Path(
    "/run/sshd"
)  # sshd's privilege separation directory, made by its unit file elsewhere


class PairError(RuntimeError):
    """The tunnel or the session did not come up; the message ends with the log's last lines."""


def find_sshd() -> str | None:
    """sshd re-executes itself, so it must be started by its absolute path."""
    places = ["/usr/sbin", "/sbin", "/usr/local/sbin", *os.environ.get("PATH", "").split(":")]
    return next((f"{p}/sshd" for p in places if os.access(f"{p}/sshd", os.X_OK)), None)


class Site(Protocol):
    """What a tunnel asks of the world around it."""

    @property
    def families(self) -> Sequence[int]:
        """Outside the tunnel."""

    @property
    def hosts(self) -> Mapping[HostName, Host]:
        """Both ends."""

    @property
    def spaces(self) -> Namespaces:
        """All namespaces of it."""

    def endpoints(self, host: HostName) -> list[str]:
        """Where the other end can dial a host, as literals; empty: nowhere."""


@dataclass
class Pair:
    """The tunnel between A and B of a world. `environment` is added to that of both tunnels
    (QLOGDIR and so on), `settings` to both configurations.
    """

    world: Site
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    martlet: Sequence[str] = MARTLET
    settings: str = ""
    processes: dict[HostName, subprocess.Popen[bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write keys and configurations of both hosts."""
        public = {name: self._keygen(name) for name in self.world.hosts}
        for name in self.world.hosts:
            other = _OTHER[name]
            addresses = ", ".join(
                f'"{inner}/{_LENGTHS[family][0]}"' for family, inner in INNER[name].items()
            )
            allowed = ", ".join(
                f'"{inner}/{_LENGTHS[family][1]}"' for family, inner in INNER[other].items()
            )
            endpoints = self.world.endpoints(other) if name == "A" else []
            lines = [
                "[interface]",
                f'name = "{DEVICE}"',
                f"address = [{addresses}]",
                f'private_key = "{self.key(name)}"',
                f"listen_port = {PORT}",
                "",
                "[[peer]]",
                f'name = "{other.lower()}"',
                f'public_key = "{public[other]}"',
                f"allowed_ips = [{allowed}]",
            ]
            if endpoints:
                lines.append(f"endpoint = {json.dumps(endpoints)}")
            lines += ["", self.settings]
            self.config(name).write_text("\n".join(lines) + "\n")

    def key(self, name: HostName) -> Path:
        """Private key file of a host."""
        return self.directory / f"id_{name}"

    def config(self, name: HostName) -> Path:
        """Configuration file of a host."""
        return self.directory / f"{name}.toml"

    def log(self, name: HostName) -> Path:
        """What a host's tunnel wrote to stderr."""
        return self.directory / f"{name}.log"

    def space(self, name: HostName) -> Namespace:
        """Namespace of a host."""
        return self.world.hosts[name].space

    def _keygen(self, name: HostName) -> str:
        done = self.space(name).run([*self.martlet, "keygen", str(self.key(name))], env=PYTHON_ENV)
        return done.stdout.strip()

    def up(self, timeout: float = 20.0, names: Sequence[HostName] = ("B", "A")) -> None:
        """Start `martlet up` at the given hosts and wait until packets pass through the tunnel."""
        for name in names:
            self.start(name)
        self.wait(timeout)

    def start(self, name: HostName) -> None:
        """Start the tunnel of one host, without waiting for it."""
        self.processes[name] = self.space(name).popen(
            [*self.martlet, "up", str(self.config(name))],
            env={**PYTHON_ENV, **self.environment},
            log=self.log(name),
        )

    def stop(self, name: HostName) -> int:
        """End the tunnel of one host by SIGTERM; returns its exit code."""
        process = self.processes.pop(name)
        terminate([process])
        return process.returncode

    def wait(self, timeout: float = 20.0, family: int = 4) -> None:
        """Wait until a packet has gone through the tunnel and back; PairError otherwise."""
        deadline = time.monotonic() + timeout
        ping = ["ping", "-n", "-q", "-c", "1", "-W", "1", INNER["B"][family]]
        while self.space("A").run(ping, check=False).returncode:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise PairError(
                        f"the tunnel of {name} ended with exit code {process.returncode}:"
                        f"\n{tail(self.log(name))}"
                    )
            if time.monotonic() > deadline:
                logs = "\n".join(f"{name}: {tail(self.log(name))}" for name in self.processes)
                raise PairError(f"no packet passed the tunnel within {timeout:g} s:\n{logs}")
            time.sleep(0.1)

    def status(self, name: HostName) -> dict[str, Any]:
        """`martlet status --json` of a host; empty when it does not answer."""
        return self._query(name, "status") or {}

    def history(self, name: HostName) -> list[dict[str, Any]]:
        """`martlet history --json` of a host; empty when it does not answer."""
        return self._query(name, "history") or []

    def _query(self, name: HostName, verb: str) -> Any:
        argv = [*self.martlet, verb, DEVICE, "--json"]
        done = self.space(name).run(argv, env=PYTHON_ENV, check=False)
        try:
            return json.loads(done.stdout) if done.returncode == 0 else None
        except ValueError:
            return None

    def active_uplink(self, name: HostName) -> int:
        """Number of the uplink that a host's active path uses; 0 while there is no path.

        Which one that is depends on whose first packet was answered first, so a move that is to
        be felt asks.
        """
        local = self.active_path(name).partition(">")[0].rpartition(":")[0].strip("[]")
        for uplink in self.world.hosts[name].uplinks:
            if local in (uplink.address(family) for family in self.world.families):
                return uplink.index
        return 0

    def active_path(self, name: HostName) -> str:
        """The path a host sends on, `local>remote` as in `status`; "-" while there is none."""
        for peer in self.status(name).get("peers", []):
            if peer.get("active_path"):
                return str(peer["active_path"])
        return "-"


class Session:
    """A real sshd in B and one ssh session from A through the tunnel, with keystrokes echoed all
    the time.
    """

    def __init__(self, pair: Pair, *, family: int = 4, spacing: float = SPACING) -> None:
        self.spacing = spacing
        self._pair = pair
        self._family = family
        self._directory = pair.directory
        self._trace = self._directory / "session.trace"
        self._log = self._directory / "ssh.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 15.0) -> None:
        """Start both ends and wait for the first echo; PairError otherwise."""
        address = INNER["B"][self._family]
        for key in ("ssh_host", "ssh_user"):
            command(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._directory / key)]
            )
        host_key = (self._directory / "ssh_host.pub").read_text()
        (self._directory / "known_hosts").write_text(f"martlet-demo {host_key}")
        (self._directory / "sshd_config").write_text(self._sshd_config())
        sshd = find_sshd()
        if sshd is None:
            raise PairError("sshd is not installed: apt-get install openssh-server")
        _RUN_SSHD.mkdir(mode=0o755, exist_ok=True)
        config = str(self._directory / "sshd_config")
        log = self._directory / "sshd.log"
        self.server = self._pair.space("B").popen([sshd, "-D", "-e", "-f", config], log=log)
        self._listening(address, timeout)
        typist = [sys.executable, "-m", "cli.demo.session", "--out", str(self._trace)]
        self.process = self._pair.space("A").popen(
            [*typist, "--spacing", str(self.spacing), "--", *self._ssh(address)],
            env=PYTHON_ENV,
            log=self._log,
        )
        deadline = time.monotonic() + timeout
        while not self.last_echo():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise PairError(f"ssh did not connect:\n{tail(self._log)}\n{tail(log)}")
            time.sleep(0.05)

    def _listening(self, address: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        probe = ["ss", "-Hltn", "sport = :22"]
        while not self._pair.space("B").run(probe).stdout.strip():
            if time.monotonic() > deadline:
                raise PairError(
                    f"sshd does not listen on {address}:\n{tail(self._directory / 'sshd.log')}"
                )
            time.sleep(0.02)

    def _sshd_config(self) -> str:
        return f"""
Port 22
HostKey {self._directory}/ssh_host
AuthorizedKeysFile {self._directory}/ssh_user.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM {"yes" if _root_locked() else "no"}
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
PidFile none
"""

    def _ssh(self, address: str) -> list[str]:
        options = {
            "IdentityFile": self._directory / "ssh_user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self._directory / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "martlet-demo",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            # It would type on a clock of its own, and older versions do not know it.
            "IgnoreUnknown": "ObscureKeystrokeTiming",
            "ObscureKeystrokeTiming": "no",
        }
        argv = ["ssh", "-F", "none", "-tt", "-e", "none"]
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        return [*argv, f"root@{address}", "stty raw -echo; exec cat"]

    def trace(self, since: float = 0.0) -> Trace:
        """What was typed and echoed so far, or from about `since` on."""
        return Trace.read(self._trace, since)

    def last_echo(self) -> float:
        """When the newest echo came, time.monotonic(); 0 when none has."""
        return last_arrival(self._trace) or 0.0

    def report(self, begin: float, end: float) -> Report:
        """What the session felt in a window; gaps are beyond the typing interval."""
        trace = self.trace(begin - 1.0)
        return report(trace.sent, trace.arrivals, self.spacing, begin, end)

    def closed(self) -> bool:
        """Whether the session has ended."""
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """End the session, then sshd."""
        terminate([process for process in (self.server, self.process) if process is not None])


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _root_locked() -> bool:
    """Without PAM, sshd refuses an account whose password field begins with "!", whatever the
    key.
    """
    try:
        shadow = Path("/etc/shadow").read_text()
    except OSError:
        return False
    return any(line.startswith("root:!") for line in shadow.splitlines())
