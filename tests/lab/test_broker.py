"""The signaller and a real broker, on a network that changes under it.

[host] v 10.9.0.2 ----veth---- w 10.9.0.1 [broker] martlet rendezvous (mosquitto), nftables
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop

from cli.demo.netns import Namespace, Namespaces
from tests.lab.rendezvous import Rendezvous
from tunnel.config import RendezvousConfig
from tunnel.shell.mqtt import Signaller

BROKER, FIRST, SECOND = "10.9.0.1", "10.9.0.2", "10.9.0.3"
TOPIC = "martlet/1/" + "a" * 26
SOON = 1.0
"""Seconds: far more than a reconnection takes, far less than TCP takes to notice anything."""


@dataclass
class Lab:
    """The two ends of the cable."""

    host: Namespace
    broker: Namespace
    log: Path

    def rendezvous(self) -> Rendezvous:
        return Rendezvous(self.broker, self.log, "--broker", "mosquitto", "--no-stun")

    def run(self, main: Callable[[Host], Awaitable[None]]) -> None:
        """Run a coroutine in the host, with its signaller."""

        async def inside() -> None:
            host = Host()
            host.signaller.start()
            try:
                async with asyncio.timeout(60):
                    await main(host)
            finally:
                await host.signaller.close()

        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(inside())

        self.host.call(run)

    def forget(self) -> None:
        """What a NAT does that loses its mappings: connections that are open lead nowhere."""
        ports = self.broker.run(["ss", "-Htn", "state", "established"]).stdout
        rules = [
            "add table inet gone",
            "add chain inet gone in { type filter hook input priority 0; }",
        ]
        rules += ["add chain inet gone out { type filter hook output priority 0; }"]
        for line in ports.splitlines():
            port = line.split()[-1].rpartition(":")[2]
            rules += [f"add rule inet gone in tcp sport {port} drop"]
            rules += [f"add rule inet gone out tcp dport {port} drop"]
        self.broker.run(["nft", "-f", "-"], input="\n".join(rules))


@dataclass
class Host:
    """A signaller that greets the broker whenever it is connected, and hears itself."""

    heard: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    connections: int = 0

    def __post_init__(self) -> None:
        self.signaller = Signaller(
            RendezvousConfig(url=(f"mqtt://{BROKER}",)),
            will=("martlet/1/" + "w" * 26, b"gone"),
            connected=self._connected,
            disconnected=lambda: None,
            received=lambda topic, payload: self.heard.put_nowait(payload),
        )
        self.signaller.subscribe(frozenset([TOPIC]))

    def _connected(self) -> None:
        self.connections += 1
        self.signaller.publish(TOPIC, b"%d" % self.connections)

    async def greeted(self, number: int) -> None:
        while await self.heard.get() != b"%d" % number:
            pass


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if not shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/bin"):
        pytest.skip("mosquitto is not installed")
    with Namespaces() as spaces:
        host, broker = spaces.create("host"), spaces.create("broker")
        spaces.veth(host, "v", broker, "w")
        host.batch(f"addr add {FIRST}/24 dev v")
        broker.batch("link set lo up", f"addr add {BROKER}/24 dev w")
        yield Lab(host, broker, tmp_path / "log")


def move(host: Namespace) -> None:
    host.batch(f"addr del {FIRST}/24 dev v", f"addr add {SECOND}/24 dev v")


def test_a_new_address_is_a_new_connection_at_once(lab: Lab) -> None:
    async def main(host: Host) -> None:
        await host.greeted(1)
        await asyncio.to_thread(move, lab.host)
        started = time.monotonic()
        host.signaller.network_changed()
        await host.greeted(2)
        assert time.monotonic() - started < SOON

    with lab.rendezvous():
        lab.run(main)


def test_an_address_that_comes_later_is_used_when_it_is_there(lab: Lab) -> None:
    async def main(host: Host) -> None:
        await host.greeted(1)
        await asyncio.to_thread(lab.host.batch, f"addr del {FIRST}/24 dev v")
        host.signaller.network_changed()
        await asyncio.sleep(2)
        assert host.signaller.status()["state"] == "connecting"
        assert "cannot reach" in host.signaller.status()["error"]
        await asyncio.to_thread(lab.host.batch, f"addr add {SECOND}/24 dev v")
        started = time.monotonic()
        host.signaller.network_changed()
        await host.greeted(2)
        assert time.monotonic() - started < SOON

    with lab.rendezvous():
        lab.run(main)


@pytest.mark.parametrize(
    ("event", "limit"),
    [
        (lambda signaller: signaller.network_changed(), SOON),
        (lambda signaller: signaller.publish(TOPIC, b"into the void"), 2 * SOON),
    ],
    ids=["the network changes", "something is published"],
)
def test_a_forgotten_mapping_shows_when(
    lab: Lab, event: Callable[[Signaller], None], limit: float
) -> None:
    async def main(host: Host) -> None:
        await host.greeted(1)
        await asyncio.to_thread(lab.forget)
        started = time.monotonic()
        event(host.signaller)
        await host.greeted(2)
        assert time.monotonic() - started < limit

    with lab.rendezvous():
        lab.run(main)


def test_a_broker_that_is_started_again_is_found(lab: Lab) -> None:
    first = lab.rendezvous()
    first.__enter__()

    async def main(host: Host) -> None:
        await host.greeted(1)
        await asyncio.to_thread(first.__exit__, None, None, None)
        second = lab.rendezvous()
        await asyncio.to_thread(second.__enter__)
        try:
            await host.greeted(2)
        finally:
            await asyncio.to_thread(second.__exit__, None, None, None)

    lab.run(main)


def test_a_living_connection_is_kept_through_a_storm_of_changes(lab: Lab) -> None:
    async def main(host: Host) -> None:
        await host.greeted(1)
        for number in range(50):
            await asyncio.to_thread(
                lab.host.batch, f"addr {'del' if number % 2 else 'add'} 10.8.0.1/24 dev v"
            )
            host.signaller.network_changed()
        await asyncio.sleep(0.5)
        assert host.connections == 1 and host.signaller.status()["state"] == "connected"

    with lab.rendezvous():
        lab.run(main)
