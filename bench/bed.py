"""A pair of hosts with a tunnel under observation, on which something is made to happen.

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

Through the tunnel run probes of 64 bytes each way, one every 5 ms unless said, and an ssh session
with a keystroke every 20 ms, echoed. All there is to know about a run is in the bed's directory,
artifacts/<name>-<random>/: both configurations and logs, core*.pcapng (every packet between the
NATs), keys.log, qlog/, the traces of probes and session. It is removed unless `failed` is set.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.ask import POLL, Asking
from bench.capture import CORE_INTERFACES, Capture
from bench.kept import KeptScene
from bench.rival import WireGuardPair
from bench.servers import Broker, Certificate, Stun, tables
from bench.stream import Stream
from bench.watch import Kernel
from cli.demo.core import IMPORT_ROOT
from cli.demo.nat import Kind
from cli.demo.netns import terminate
from cli.demo.pair import INNER, Pair, Session
from cli.demo.probe import SPACING, Probe
from cli.demo.session import SPACING as KEYSTROKE
from cli.demo.world import HostName, World

ARTIFACTS = Path(IMPORT_ROOT) / "artifacts"
Mode = Literal["off", "interactive", "wireguard-go"]  # martlet's redundancy, or another tunnel
HOSTS: tuple[HostName, ...] = ("A", "B")
STEADY = 0.4  # seconds of flow both ways after which all is well
_FLOWING = 0.12  # seconds since the last arrival; the probes' own records are 50 ms late
_TYPING = 0.3  # seconds since the last echo
_LOADED = 3600 * 24  # seconds: longer than any measurement
_WARM = 8.0  # seconds that a second path may take to become warm
_NO_WARM = 0.5  # seconds to wait instead, where the product does not show warm paths


@dataclass(frozen=True)
class Network:
    """What the wires and NATs are like. Seconds and probabilities, each for every wire and way; a
    path has two wires. `ordered`: jitter does not change the order.
    """

    rtt: float = 0.020
    loss: float = 0.0
    jitter: float = 0.0
    ordered: bool = False
    family: int = 4
    inner: int = 4
    nat: Kind = "full-cone"  # of A; B's forward a port


class Bed(KeptScene, Asking):
    """A context manager: the world and its tunnel; `up` adds probes and the ssh session.

    rendezvous: nobody forwards a port, all NATs are port-restricted, and the two ends meet by a
    broker and STUN, each as far away as they are from each other.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        mode: Mode,
        *,
        uplinks: tuple[int, int] = (2, 2),
        nat66: bool | HostName = True,
        spacing: float = SPACING,
        keystroke: float = KEYSTROKE,
        ring: int = 0,
        rendezvous: bool = False,
    ) -> None:
        # Short: there are sockets in it, and the path of one has room for 107 bytes.
        super().__init__(ARTIFACTS / f"{name[:24]}-{secrets.token_hex(3)}")
        self.network = network
        self.mode = mode
        self._uplinks = uplinks
        self._nat66 = nat66
        self._spacing = spacing
        self._keystroke = keystroke
        self._ring = ring
        self.rendezvous = rendezvous
        self.stream: Stream | None = None

    # ---- life ----

    def _build(self, stack: ExitStack) -> None:
        network = self.network
        self.world = stack.enter_context(
            World(
                families=(network.family,),
                delay=network.rtt / 4,
                uplinks=self._uplinks,
                nat66=self._nat66,
                kinds=self._kinds(),
                forwards={"B0": False, "B1": False} if self.rendezvous else None,
                servers=("broker", "stun") if self.rendezvous else (),
                directory=self.directory,
            )
        )
        if network.loss or network.jitter:
            for host in HOSTS:
                for index in (0, 1):
                    self.world.link.set(
                        f"{host}{index}",
                        loss=network.loss,
                        jitter=network.jitter,
                        ordered=network.ordered,
                    )
        environment = {
            "SSLKEYLOGFILE": str(self.directory / "keys.log"),
            "QLOGDIR": str(self.directory / "qlog"),
        }
        make = WireGuardPair if self.mode == "wireguard-go" else Pair
        self.pair = make(self.world, self.directory, environment)
        if self.mode != "wireguard-go":
            self.pair.settings = f'[paths]\nredundancy = "{self.mode}"\n{self._serve()}'
        self.pair.prepare()
        capture = self.directory / "core.pcapng"
        interfaces = (*CORE_INTERFACES, *self.world.servers)
        self.capture = Capture(self.world.core, interfaces, capture, ring=self._ring)
        stack.callback(self.capture.stop)
        self.kernels = {host: Kernel(self.world.hosts[host].space) for host in HOSTS}
        for kernel in self.kernels.values():
            stack.callback(kernel.close)
        self.ask_in({host: self.world.hosts[host].space for host in HOSTS})

    def _kinds(self) -> dict[str, Kind]:
        if self.rendezvous:
            return dict.fromkeys(("A0", "A1", "B0", "B1"), "port-restricted")
        return dict.fromkeys(("A0", "A1"), self.network.nat)

    def _serve(self) -> str:
        """Start the public servers; the tables that name them."""
        if not self.rendezvous:
            return ""
        broker, stun = self.world.servers["broker"], self.world.servers["stun"]
        addresses = broker.addresses[self.network.family][:1]
        certificate = Certificate.make(self.directory, addresses)
        self._broker = Broker(broker.space, addresses, self.directory, certificate)
        return tables(self._broker, Stun(stun.space, stun.addresses, self.directory))

    def subscriptions(self) -> int:
        """How many requests to subscribe the broker has granted so far; 0 without one."""
        return self._broker.subscriptions() if self.rendezvous else 0

    def up(self, *, stream: float = 0.0) -> None:
        """Start the tunnel, the probes, the ssh session and maybe a paced TCP stream of so many
        Mbit/s; PairError when that fails.
        """
        self.pair.up()
        a, b = self.world.a.space, self.world.b.space
        near, far = (INNER[host][self.network.inner] for host in HOSTS)
        self.probe = Probe(a, near, b, far, self.directory, spacing=self._spacing)
        self._stack.callback(self.probe.stop)
        self.session = Session(self.pair, family=self.network.inner, spacing=self._keystroke)
        self.session.start()
        self._stack.callback(self.session.stop)
        if stream:
            self.stream = Stream(a, b, far, self.directory, stream)
            self._stack.callback(self.stream.stop)
        self.settle(time.monotonic())

    # ---- waiting ----

    def flowing(self, now: float) -> bool:
        """Whether probes, echoes and the stream come at this moment."""
        return not self.stuck(now)

    def stuck(self, now: float) -> list[str]:
        """Which of the flows do not."""
        late = max(_FLOWING, 3 * self._spacing) + self.network.rtt
        typing = max(_TYPING, 3 * self._keystroke) + self.network.rtt
        flows = {
            "UDP": self.probe.flowing(now - late),
            "ssh": not self.session.closed() and self.session.last_echo() > now - typing,
            "TCP": self.stream is None
            or (not self.stream.closed() and self.stream.last() > now - _TYPING),
        }
        return [name for name, flows_ in flows.items() if not flows_]

    def settle(self, since: float, patience: float = 8.0, steady: float = STEADY) -> bool:
        """Wait until all has flowed steadily for a while after `since`; False when patience
        ended.
        """
        calm = since
        while True:
            time.sleep(POLL)
            now = time.monotonic()
            if not self.flowing(now):
                calm = now
            if now - calm > steady:
                return True
            if now - since > patience or self.session.closed():
                return False

    def warm(self) -> bool | None:
        """Wait until both ends have a second path warm; whether they do, None when the product
        does not say (then a fixed time has passed).
        """
        if self.until(self._all_warm, _NO_WARM):
            return True
        if not any("warm" in path for host in HOSTS for path in self.paths(host)):
            return None
        return self.until(self._all_warm, _WARM)

    def _all_warm(self) -> bool:
        return all(self._has_second(host) for host in HOSTS)

    def _has_second(self, host: HostName) -> bool:
        """A second path is at hand that shares no uplink with the active one, where there are two.

        Addresses stand for uplinks: behind a NAT, every uplink has one of its own outside.
        """
        paths = self.paths(host)
        active = next((path for path in paths if path.get("active")), None)
        second = next((path for path in paths if path.get("backup") and path.get("warm")), None)
        if active is None or second is None:
            return False
        ends = ("local", "remote") if host == "A" else ("remote", "local")
        return all(
            uplinks == 1 or active[end].rpartition(":")[0] != second[end].rpartition(":")[0]
            for end, uplinks in zip(ends, self._uplinks, strict=True)
        )

    # ---- asking the product ----

    def active_uplink(self, host: HostName) -> int:
        """Number of the uplink that the active path uses; 0 where the tunnel does not say."""
        local = self.active_path(host).partition(">")[0].rpartition(":")[0].strip("[]")
        family = self.network.family
        for uplink in self.world.hosts[host].uplinks:
            if local == uplink.address(family):
                return uplink.index
        return 0

    # ---- load ----

    @contextmanager
    def loaded(self, mbit: float) -> Iterator[None]:
        """One TCP stream from A to B through the tunnel, at this rate if it gets it."""
        target = INNER["B"][self.network.inner]
        server = self.world.b.space.popen(["iperf3", "-s", "-1"])
        time.sleep(0.3)
        argv = ["iperf3", "-c", target, "-b", f"{mbit:g}M", "-t", str(_LOADED)]
        client = self.world.a.space.popen(argv, log=self.directory / "iperf3.log")
        try:
            yield
        finally:
            terminate([client, server])
