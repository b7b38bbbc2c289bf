"""Two hosts on one wire that run the command `martlet` as users start it.

a [eth0 192.0.2.1] ----veth---- [eth0 192.0.2.2] b
   mt0 10.88.0.1                  mt0 10.88.0.2, port 4117
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.demo.netns import Namespace, Namespaces
from tunnel.identity import Identity

MARTLET = [sys.executable, "-m", "cli.main"]

CONFIG = """
[interface]
name = "mt0"
address = ["10.88.0.{own}/24"]
private_key = "{own}"
listen_port = {port}
[[peer]]
name = "other"
public_key = "{key}"
{endpoint}
allowed_ips = ["10.88.0.{other}/32", "10.99.{other}.0/24"]
"""


class Host:
    """One end: its namespace, and its config file."""

    def __init__(self, space: Namespace, config: Path) -> None:
        self.space = space
        self.config = config
        self.log = config.with_suffix(".log")

    def martlet(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = self.space.run([*MARTLET, *arguments], check=False)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def up(self) -> subprocess.Popen[bytes]:
        process = self.space.popen([*MARTLET, "up", str(self.config)], log=self.log)
        until(lambda: "info    up" in self.log.read_text(), self.log.read_text)
        return process

    def interfaces(self) -> set[str]:
        return {link["ifname"] for link in json.loads(self.space.run(["ip", "-j", "link"]).stdout)}


def until(
    condition: Callable[[], bool], explain: Callable[[], object], seconds: float = 10
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Both on one wire, configured, not up."""
    keys = {1: Identity.generate(), 2: Identity.generate()}
    with Namespaces() as spaces:
        made = []
        for own, other, port, endpoint in (
            (1, 2, 0, 'endpoint = "192.0.2.2:4117"'),
            (2, 1, 4117, ""),
        ):
            keys[own].save(directory / str(own))
            config = directory / f"{own}.toml"
            config.write_text(
                CONFIG.format(
                    own=own, other=other, port=port, endpoint=endpoint,
                    key=keys[other].public_key.openssh,
                )
            )  # fmt: skip
            made.append(Host(spaces.create("ab"[own - 1]), config))
        a, b = made
        spaces.veth(a.space, "eth0", b.space, "eth0")
        a.space.batch("addr add 192.0.2.1/24 dev eth0")
        b.space.batch("addr add 192.0.2.2/24 dev eth0")
        yield a, b
