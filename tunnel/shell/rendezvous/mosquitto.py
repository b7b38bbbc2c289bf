"""mosquitto as a child: a configuration of its own in a temporary directory, and no privileges.

What strangers may do is decided by a plugin of ours, `rules.c`; sizes and queues are mosquitto's
own limits. It ends when it reaches its `memory_limit`, so it is started again when it ends; nothing
is lost by that but connections, as nothing is ever kept.

setpriv(1) gives the child another user, leaves it nothing but the right to bind low ports, and has
the kernel end it when we end, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunnel.errors import LocalError, PrivilegeError
from tunnel.shell.log import Log
from tunnel.shell.rendezvous import limits

USERS = ("mosquitto", "nobody")
"""Who the broker runs as when we are root; the first that exists."""

FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0
"""Seconds until it is started again: doubles, until it has run for STABLE seconds."""
STABLE = 60.0

START_TIMEOUT = 10.0  # seconds until it must say that it runs
STOP_TIMEOUT = 3.0  # seconds from SIGTERM to SIGKILL

_POLL = 0.01  # seconds between two looks whether it listens
_RELOAD = 5.0  # seconds in which it has surely read its files again
_SBIN = "/usr/sbin:/usr/local/sbin"  # where Debian puts it, which is not on every user's PATH


@dataclass(frozen=True)
class Program:
    """An installed mosquitto that can do what we need."""

    path: str
    version: str


@dataclass(frozen=True)
class Tls:
    """PEM files: a certificate with its chain, and its key."""

    certificate: Path
    key: Path


def find() -> tuple[Program | None, str]:
    """The installed mosquitto; or None, and what is wanting."""
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SBIN)
    if path is None:
        return None, "mosquitto is not installed"
    said = subprocess.run([path, "-h"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"mosquitto version (\d+)\.(\S+)", said)
    if found is None or int(found[1]) < 2:
        return None, f"{path} is too old: version 2.0 or later is needed"
    if _rules() is None:
        return None, "martlet was installed without its plugin for mosquitto (rules.c)"
    return Program(path, f"{found[1]}.{found[2]}"), ""


def configuration(
    directory: Path,
    addresses: Sequence[str | None],
    port: int,
    tls: bool,
    max_clients: int,
) -> str:
    """mosquitto.conf(5); an address that is None means all of both families."""
    memory = limits.MEMORY_BASE + max_clients * limits.MEMORY_PER_CLIENT
    lines = [
        "per_listener_settings false",
        "allow_anonymous true",
        f"plugin {directory}/rules.so",
        f"plugin_opt_name {limits.NAME}",
        f"plugin_opt_payload {limits.PAYLOAD}",
        f"plugin_opt_subscriptions {limits.SUBSCRIPTIONS}",
        f"plugin_opt_keepalive {limits.KEEPALIVE}",
        "persistence false",
        "retain_available false",
        "queue_qos0_messages false",
        f"max_queued_messages {limits.QUEUED}",
        f"max_queued_bytes {limits.QUEUED_BYTES}",
        f"max_inflight_messages {limits.IN_FLIGHT}",
        f"message_size_limit {limits.PAYLOAD}",
        f"max_packet_size {limits.PACKET}",
        f"memory_limit {memory}",
        "set_tcp_nodelay true",
        "sys_interval 0",
        # Whoever connects is nobody's business, and a log that strangers can fill is a limit less.
        "connection_messages false",
        "log_dest stderr",
        "log_timestamp false",
        "log_type error",
        "log_type warning",
    ]
    for address in addresses:
        lines += [f"listener {port} {address}" if address else f"listener {port}"]
        lines += [f"max_connections {max_clients}"]
        if tls:
            lines += [f"certfile {directory}/certificate.pem", f"keyfile {directory}/key.pem"]
    lines += [f"listener 0 {directory}/socket", f"max_connections {max_clients}"]
    return "\n".join(lines) + "\n"


class Mosquitto:
    """A running mosquitto. `socket` is where the gateway reaches it."""

    name = "mosquitto"

    def __init__(
        self,
        program: Program,
        directory: Path,
        addresses: Sequence[str | None],
        port: int,
        tls: Tls | None,
        max_clients: int,
    ) -> None:
        self.version = program.version
        self.socket = directory / "socket"
        self._program = program
        self._directory = directory
        self._port = port
        self._tls = tls
        self._config = configuration(directory, addresses, port, tls is not None, max_clients)
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._said: list[str] = []

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Return when it listens. Raises LocalError."""
        if self._user is not None:
            os.chown(self._directory, self._user.pw_uid, self._user.pw_gid)
        self._write("mosquitto.conf", self._config.encode())
        # The child's user may not be let to where we are installed.
        rules = _rules()
        assert rules is not None
        self._write("rules.so", rules.read_bytes())
        self.socket.unlink(missing_ok=True)
        self._copy_tls()
        command = [*self._setpriv(), self._program.path, "-c", f"{self._directory}/mosquitto.conf"]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us; we end it in our time
        )
        self._reader = asyncio.create_task(self._read())
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        while not await self._listens():
            if self._reader.done() or asyncio.get_running_loop().time() > deadline:
                await self.stop()
                raise self._error("mosquitto does not start")
            await asyncio.sleep(_POLL)
        self._forget_tls()

    async def wait(self) -> None:
        """Start it again whenever it ends. Returns never; raises LocalError when it cannot be."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            assert self._reader is not None
            began = loop.time()
            await asyncio.shield(self._reader)
            if loop.time() - began > STABLE:
                pause = FIRST_PAUSE
            _log.error("mosquitto has ended", says="; ".join(self._said[-1:]), again_in_s=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
            await self.start()

    async def stop(self) -> None:
        """End it."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=STOP_TIMEOUT)

    def reload(self) -> None:
        """Take a renewed certificate into use. Raises LocalError when it cannot be read."""
        self._copy_tls()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)
            asyncio.get_running_loop().call_later(_RELOAD, self._forget_tls)

    async def _listens(self) -> bool:
        """Whether the Unix socket, the last of its listeners, is there."""
        try:
            _, writer = await asyncio.open_unix_connection(self.socket)
        except OSError:
            return False
        writer.close()
        return True

    def _setpriv(self) -> list[str]:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise LocalError(
                "setpriv is missing, which takes mosquitto's privileges away",
                remedy="install util-linux",
            )
        command = [setpriv, "--no-new-privs", "--pdeathsig=TERM"]
        if self._user is not None:
            caps = "-all,+net_bind_service" if self._port < 1024 else "-all"
            command += [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}"]
            command += ["--clear-groups", f"--inh-caps={caps}", f"--ambient-caps={caps}"]
            command += [f"--bounding-set={caps}"]
        return [*command, "--"]

    def _write(self, name: str, data: bytes) -> None:
        """A file that only the child's user can read; whoever reads it sees all of it, or none."""
        path = self._directory / name
        new = self._directory / f".{name}"
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        if self._user is not None:
            os.chown(new, self._user.pw_uid, self._user.pw_gid)
        new.replace(path)

    def _copy_tls(self) -> None:
        """The files may be readable by root only, and mosquitto is not root."""
        if self._tls is None:
            return
        for name, source in (("certificate", self._tls.certificate), ("key", self._tls.key)):
            try:
                self._write(f"{name}.pem", source.read_bytes())
            except OSError as error:
                raise LocalError(f"cannot read {source}: {error.strerror}") from None

    def _forget_tls(self) -> None:
        """mosquitto has read them; no key is to be left behind, should we be killed."""
        for name in ("certificate.pem", "key.pem"):
            (self._directory / name).unlink(missing_ok=True)

    async def _read(self) -> None:
        """Read what it says until it ends."""
        assert self._process is not None and self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:  # longer than the reader's limit
                continue
            if not line:
                break
            text = line.decode(errors="replace").strip()
            self._said = [*self._said, text][-20:]
            # The gateway's Unix socket has no TCP_NODELAY, as it says for each connection.
            serious = text.startswith(("Error", "Warning")) and "TCP_NODELAY" not in text
            tell = _log.warning if serious else _log.debug
            tell("mosquitto", says=text)
        await self._process.wait()

    def _error(self, problem: str) -> LocalError:
        said = [line for line in self._said if "rror" in line] or self._said[-1:]
        why = "; ".join(said[:3])
        if "Permission denied" in why and self._port < 1024 and os.geteuid() != 0:
            return PrivilegeError(
                f"{problem}: port {self._port} is for the privileged",
                remedy="run as root (sudo); the broker then runs as another user",
            )
        if "Address already in use" in why:
            return LocalError(
                f"{problem}: port {self._port} is taken",
                remedy=f"see by whom with `ss -ltnp sport = :{self._port}`, or give another --port",
            )
        return LocalError(f"{problem}: {why}" if why else problem)


def _rules() -> Path | None:
    """The plugin, if it was built."""
    found = importlib.util.find_spec("tunnel.shell.rendezvous.rules")
    return None if found is None or found.origin is None else Path(found.origin)


def _unprivileged() -> pwd.struct_passwd:
    for name in USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise LocalError(f"there is none of the users {', '.join(USERS)} to run mosquitto as")


_log = Log("rendezvous")
