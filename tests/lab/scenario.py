"""A run of two tunnels in a world, with everything that is needed to understand a failure.

Its directory, artifacts/<name>-<random>/ in the root of the repository, has the configurations
and logs of both tunnels, core.pcapng (every packet between the NATs), keys.log (TLS secrets of
both ends), qlog/, the traces of probes and of the ssh session. It is removed when the test
passed, kept and named when it failed.
"""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.capture import CORE_INTERFACES, Capture
from cli.demo.core import IMPORT_ROOT
from cli.demo.netns import command
from cli.demo.pair import INNER, Pair, Session
from cli.demo.probe import Probe
from cli.demo.world import PORT, HostName, World

ARTIFACTS = Path(IMPORT_ROOT) / "artifacts"


def tshark(
    capture: Path,
    fields: Sequence[str],
    where: str = "",
    keylog: Path | None = None,
    *,
    protocol: str = "quic",
) -> list[dict[str, str]]:
    """Fields of each packet that matches the display filter, decrypted with the keylog.

    Our UDP port is decoded as `protocol` whatever the packet looks like. Several values of a field
    are joined by semicolons.
    """
    argv = ["tshark", "-n", "-r", str(capture), "-T", "fields", "-E", "header=y", "-E", "quote=d"]
    argv += ["-E", "separator=,", "-E", "occurrence=a", "-E", "aggregator=;"]
    argv += ["-d", f"udp.port=={PORT},{protocol}"]
    if protocol != "quic":
        argv += ["--disable-protocol", "quic"]  # which claims flows that begin with an Initial
    if keylog is not None:
        argv += ["-o", f"tls.keylog_file:{keylog}"]
    if where:
        argv += ["-Y", where]
    for name in fields:
        argv += ["-e", name]
    # tshark keeps its preferences and says so; a home of our own keeps it from reading the user's.
    output = command(argv, timeout=60.0, env={"HOME": str(capture.parent)}).stdout
    return list(csv.DictReader(io.StringIO(output)))


class Scenario:
    """A world, a pair of tunnels and their observers. `environment` is added to that of both
    tunnels.
    """

    def __init__(
        self, name: str, *, environment: dict[str, str] | None = None, **world: Any
    ) -> None:
        # Short: there are sockets in it, and the path of one has room for 107 bytes.
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.removeprefix("test_"))[:32]
        self.directory = ARTIFACTS / f"{safe}-{secrets.token_hex(3)}"
        self.keylog = self.directory / "keys.log"
        self.qlog = self.directory / "qlog"
        self._environment = environment or {}
        self._options = world
        self._stack = ExitStack()
        self.capture: Capture | None = None
        self.failed = False

    def __enter__(self) -> Scenario:
        self.qlog.mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(self._clean)
            self.failed = True  # until everything stands
            self.world = stack.enter_context(World(directory=self.directory, **self._options))
            environment = {"SSLKEYLOGFILE": str(self.keylog), "QLOGDIR": str(self.qlog)}
            self.pair = Pair(self.world, self.directory, {**environment, **self._environment})
            self.pair.prepare()
            self.capture = Capture(self.world.core, CORE_INTERFACES, self.directory / "core.pcapng")
            stack.callback(self.capture.stop)
            self.failed = False
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.failed = True
            error.add_note(f"what happened is in {self.directory}")
        self._stack.close()

    def _clean(self) -> None:
        if not self.failed:
            shutil.rmtree(self.directory, ignore_errors=True)

    def configure(self, toml: str, names: Sequence[HostName] = ("A", "B")) -> None:
        """Add tables to the configurations of these hosts, before they are up."""
        for name in names:
            with self.pair.config(name).open("a") as file:
                file.write(toml + "\n")

    def dial_one_path(self) -> None:
        """A knows one endpoint of B only; with one uplink at first, its dial takes one path. B's
        other port forwards are found if B advertises them.
        """
        config = self.pair.config("A")
        endpoint = f'endpoint = "{self.world.endpoints("B")[0]}"'
        config.write_text(re.sub("^endpoint = .*$", endpoint, config.read_text(), flags=re.M))

    def up(self, timeout: float = 20.0) -> None:
        """Start both tunnels and wait until packets pass."""
        self.pair.up(timeout)

    @contextmanager
    def probing(
        self, *, family: int = 4, spacing: float = 0.005, settle: float = 1.0
    ) -> Iterator[Probe]:
        """Probes both ways through the tunnel for the length of the context, flowing when it
        begins.
        """
        a, b = INNER["A"][family], INNER["B"][family]
        probe = Probe(self.world.a.space, a, self.world.b.space, b, self.directory, spacing=spacing)
        try:
            deadline = time.monotonic() + 10
            while not probe.flowing(time.monotonic() - 0.2):
                if time.monotonic() > deadline:
                    raise RuntimeError("probes do not pass the tunnel")
                time.sleep(0.05)
            time.sleep(settle)
            yield probe
        finally:
            probe.stop()

    @contextmanager
    def ssh(self, *, family: int = 4) -> Iterator[Session]:
        """An ssh session from A to B through the tunnel, typing for the length of the context."""
        session = Session(self.pair, family=family)
        try:
            session.start()
            yield session
        finally:
            session.stop()

    def decoded(
        self, fields: Sequence[str], where: str = "", *, protocol: str = "quic"
    ) -> list[dict[str, str]]:
        """Fields of the packets between the NATs, decrypted, in the order of time; ends the
        capture.

        tshark knows the keys of a connection only where all of its handshake took one path: see
        `dial_one_path`.
        """
        assert self.capture is not None
        ordered = self.directory / "ordered.pcapng"
        if not ordered.exists():
            self.capture.stop()
            # dumpcap writes what it has of one interface, then of the next.
            command(["reordercap", str(self.capture.path), str(ordered)])
        return tshark(ordered, fields, where, self.keylog, protocol=protocol)


def requirements() -> str:
    """Why the lab cannot run here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    tools = ["ip", "nft", "conntrack", "ping", "dumpcap", "reordercap", "tshark"]
    tools += ["turnserver", "miniupnpd", "mosquitto"]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = ["unshare", "--net", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "may not make network namespaces"
    return ""
