"""Two hosts in namespaces, and three kinds of wire between them.

    Direct    [A] eth0 ------------------- veth ------------------ eth0 [B]
    Lossy     [A] eth0 --veth-- a [ M: nftables drops at random ] b --veth-- eth0 [B]
    Slow      [A] eth0 --veth-- a [ M: delay, rate, loss, buffer ] b --veth-- eth0 [B]

A packet on a wire must be a packet. Left alone, a veth carries what segmentation offload made: up
to 64 kB in one piece, sent as one, counted as one, and lost as one. So:

* Direct has two forms. "offload" is a veth as it comes; every tunnel that uses UDP segmentation
  offload, and plain TCP, gain from it, as they would from a network card that segments. "cable" is
  a card that does not segment: the kernel cuts every piece into packets where it leaves the host,
  behind all protocols and hooks; the receiver gathers them again (GRO), as every driver does. Like
  a card, it has a queue in front that waits for it (Linux 6.16; before, a veth of which the
  receiver gathers drops what is beyond 256 packets).
* Lossy is such a cable on both sides of a router, and M drops in its forward hook, where nothing
  has been gathered yet (GRO is off in M). A hook of A's own would be too early and one of B's own
  too late. M also counts packets longer than the MTU: `oversize` in the results must be 0. What
  full queues of the veths and of the kernel lost beside that is `overflow`.
* Slow goes through a userspace process, which sees every frame, so offloads are off altogether.

The TCP of a load uses CUBIC, whatever the machine's default is. It is chosen socket by socket,
since a namespace may only use for all what the machine allows to unprivileged programs.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import features, udp
from bench.figures import Stream, iperf_result, ping_times
from cli.demo.core import PYTHON_ENV
from cli.demo.link import LinkControl
from cli.demo.netns import Namespace, Namespaces, command, terminate

HOSTS = ("A", "B")
OTHER = {"A": "B", "B": "A"}
WAIT = 10.0  # seconds for a wire or a tunnel to pass its first packet
MTU = 1500  # of the wire
_IPERF_PORT = 5201
_SEGMENTATION = (
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-udp-segmentation",
)
_QUEUE = 1000  # packets in front of a card, the kernel's default
_MILLION = 1_000_000


class Ground:
    """Two hosts; what is between them is up to the subclass."""

    middle: Namespace | None = None
    congestion = "cubic"  # control of the TCP that loads the tunnel

    def __init__(self, spaces: Namespaces, directory: Path) -> None:
        self.directory = directory
        self.hosts = {name: spaces.create(name) for name in HOSTS}
        self.outer = {"A": "192.0.2.1", "B": "192.0.2.2"}

    def _number(self) -> None:
        """Both hosts on one subnet."""
        for name, space in self.hosts.items():
            space.batch(f"addr add {self.outer[name]}/24 dev eth0")

    def wait(self, target: str, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        """Until B answers A at `target`; RuntimeError when it does not, or a process has ended."""
        ping = ["ping", "-n", "-q", "-c", "1", "-W", "1", target]
        deadline = time.monotonic() + WAIT
        while self.hosts["A"].run(ping, check=False).returncode:
            for name, process in processes.items():
                if process.poll() is not None:
                    logs = "".join(
                        log.read_text(errors="replace")[-800:]
                        for log in sorted(self.directory.glob(f"*-{name}.log"))
                    )
                    raise RuntimeError(f"the end in {name} ended: {logs}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no packet passed to {target} within {WAIT:g} s")
            time.sleep(0.05)

    # ---- loads, all bounded in time ----

    @contextmanager
    def _iperf_server(self, target: str) -> Iterator[None]:
        """One server for one test."""
        log = self.directory / "iperf3.log"
        server = self.hosts["B"].popen(["iperf3", "-s", "-1", "-J", "-B", target], log=log)
        try:
            deadline = time.monotonic() + 5
            listening = ["ss", "-Hltn", f"sport = :{_IPERF_PORT}"]
            while target not in self.hosts["B"].run(listening).stdout:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"iperf3 does not listen: {log.read_text()[-400:]}")
                time.sleep(0.02)
            yield
        finally:
            terminate([server])

    def _iperf_command(self, target: str, seconds: float, *options: str) -> list[str]:
        argv = ["iperf3", "-J", "-C", self.congestion, "-c", target, "-t", f"{seconds:g}", *options]
        # A stalled tunnel must not hold the measurement for ever.
        return ["timeout", "-k", "2", f"{seconds + 15:g}", *argv]

    def tcp(
        self, target: str, seconds: float, *, reverse: bool = False, streams: int = 1
    ) -> Stream:
        """TCP from A to B (`reverse`: from B to A), as the receiver saw it."""
        options = ["-P", str(streams), *(["-R"] if reverse else [])]
        argv = self._iperf_command(target, seconds, *options)
        with self._iperf_server(target):
            done = self.hosts["A"].run(argv, check=False, timeout=seconds + 30)
        return iperf_result(_report(done.stdout))

    @contextmanager
    def uploading(self, target: str, seconds: float) -> Iterator[dict[str, Any]]:
        """TCP from A to B during the context, which waits for its end: the yielded dictionary has
        the report of iperf3 with the server's afterwards.
        """
        report: dict[str, Any] = {}
        argv = self._iperf_command(target, seconds, "-i", "0.5", "--get-server-output")
        path = self.directory / "upload.json"
        with self._iperf_server(target), path.open("wb") as sink:
            client = self.hosts["A"].popen(argv, stdout=sink)
            try:
                yield report
                client.wait(seconds + 30)
            finally:
                terminate([client])
            report |= _report(path.read_text())
            iperf_result(report)  # for its errors

    def ping(self, target: str, count: int, interval: float = 0.01) -> list[float]:
        """Milliseconds of the pings from A that were answered; RuntimeError when none was."""
        argv = ["ping", "-n", "-i", str(interval), "-c", str(count), "-W", "1", target]
        done = self.hosts["A"].run(argv, check=False, timeout=count * interval + 30)
        times = ping_times(done.stdout)
        if not times:
            raise RuntimeError(f"no ping was answered: {done.stdout[-200:]}{done.stderr[-200:]}")
        return times

    def datagrams(self, target: str, size: int, rate: float, seconds: float) -> udp.Trial:
        """UDP from A to B at a fixed rate."""
        return udp.trial(
            self.hosts["A"], self.hosts["B"], target, size=size, rate=rate, seconds=seconds
        )

    def run_module(self, host: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A program of this package in a host's namespace, its output a pipe."""
        return self.hosts[host].popen(
            [sys.executable, "-m", module, *arguments],
            env=PYTHON_ENV,
            stdout=subprocess.PIPE,
            log=self.directory / f"{module}.log",
        )


class Direct(Ground):
    """One veth. `cable`: without segmentation offload."""

    def __init__(self, spaces: Namespaces, directory: Path, *, cable: bool) -> None:
        super().__init__(spaces, directory)
        _veth(self.hosts["A"], "eth0", self.hosts["B"], "eth0")
        if cable:
            for space in self.hosts.values():
                _card(space, "eth0")
        self._number()


class Lossy(Ground):
    """A router that drops packets at random, both ways."""

    def __init__(self, spaces: Namespaces, directory: Path) -> None:
        super().__init__(spaces, directory)
        self.outer = {"A": "192.0.2.1", "B": "198.51.100.1"}
        gateways = {"A": "192.0.2.254", "B": "198.51.100.254"}
        self.middle = middle = spaces.create("M")
        middle.forward()
        for name, space in self.hosts.items():
            port = name.lower()
            _veth(space, "eth0", middle, port)
            _card(space, "eth0")
            _card(middle, port, gather=False)
            middle.batch(f"addr add {gateways[name]}/24 dev {port}")
            space.batch(
                f"addr add {self.outer[name]}/24 dev eth0",
                f"route add default via {gateways[name]}",
            )
        self.lose(0.0)

    def lose(self, probability: float) -> None:
        """From now on drop each packet with this probability; the counters begin again."""
        assert self.middle is not None
        self._lost_before = self._overflow()
        drop = f"numgen random mod {_MILLION} < {round(probability * _MILLION)} counter drop"
        rules = [
            "add table ip loss",
            "delete table ip loss",
            "add table ip loss",
            "add chain ip loss forward { type filter hook forward priority 0; }",
            "add rule ip loss forward counter",
            f"add rule ip loss forward meta length > {MTU} counter",
            *([f"add rule ip loss forward {drop}"] if probability else []),
        ]
        self.middle.run(["nft", "-f", "-"], input="\n".join(rules) + "\n")

    def counters(self) -> dict[str, int]:
        """Packets since `lose`: all, those longer than the MTU (must be 0), the dropped ones, and
        those that full queues lost.
        """
        assert self.middle is not None
        listing = self.middle.run(["nft", "list", "chain", "ip", "loss", "forward"]).stdout
        counts = [int(value) for value in re.findall(r"counter packets (\d+)", listing)]
        named = dict(zip(("packets", "oversize", "dropped"), [*counts, 0], strict=False))
        return {**named, "overflow": self._overflow() - self._lost_before}

    def _overflow(self) -> int:
        """Of the wire only: what a tunnel's own device drops is the tunnel's doing."""
        assert self.middle is not None
        drops = _backlog_drops()
        ports = [(space, "eth0") for space in self.hosts.values()]
        ports += [(self.middle, name.lower()) for name in HOSTS]
        for space, port in ports:
            shown = command(["ip", "-n", space.name, "-s", "-j", "link", "show", port])
            drops += sum(json.loads(shown.stdout)[0]["stats64"][w]["dropped"] for w in ("rx", "tx"))
            shown = command(["tc", "-n", space.name, "-s", "-j", "qdisc", "show", "dev", port])
            drops += sum(queue.get("drops", 0) for queue in json.loads(shown.stdout))
        return drops


class Slow(Ground):
    """A userspace wire with delay, loss, rate and a drop-tail buffer in front of the rate."""

    def __init__(self, spaces: Namespaces, directory: Path) -> None:
        super().__init__(spaces, directory)
        self.middle = middle = spaces.create("M")
        for name, space in self.hosts.items():
            spaces.veth(space, "eth0", middle, name.lower())
        self._number()
        socket_path = directory / "link.sock"
        link = [sys.executable, "-m", "cli.demo.link"]
        seed = str(secrets.randbelow(1 << 31))  # rounds that lost the same packets would be one
        self.link = middle.popen(
            [*link, "--control", str(socket_path), "--seed", seed, "wire:a:b:0"],
            env=PYTHON_ENV,
            log=directory / "link.log",
        )
        deadline = time.monotonic() + WAIT
        while not socket_path.exists():
            if time.monotonic() > deadline or self.link.poll() is not None:
                raise RuntimeError(f"no link: {(directory / 'link.log').read_text()[-400:]}")
            time.sleep(0.02)
        self._control = LinkControl(socket_path)

    def shape(self, *, rtt: float, rate: float, buffer: float, loss: float = 0.0) -> None:
        """Half of `rtt` seconds each way, `rate` bits a second, `buffer` seconds of queue, and a
        probability of loss each way.
        """
        self._control.set("wire", delay=rtt / 2, rate=rate, queue=buffer, loss=loss)

    def counters(self) -> dict[str, int]:
        """So far on the way to B: frames taken and frames dropped by the wire, and octets that B
        got of it.
        """
        up = self._control.counters()["wire"]["up"]
        link = command(["ip", "-n", self.hosts["B"].name, "-s", "-j", "link", "show", "eth0"])
        arrived = json.loads(link.stdout)[0]["stats64"]["rx"]["bytes"]
        return {"frames": int(up["frames"]), "dropped": int(up["dropped"]), "octets": arrived}

    def close(self) -> None:
        """Close the handle on the link; its process ends with the namespaces."""
        self._control.close()


def _report(output: str) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError:
        raise RuntimeError(f"iperf3 gave no report: {output[-200:]!r}") from None
    return report


def _veth(a: Namespace, a_name: str, b: Namespace, b_name: str) -> None:
    """A veth as the kernel makes it, both ends up."""
    command(
        f"ip link add {a_name} netns {a.name} mtu {MTU} type veth"
        f" peer name {b_name} netns {b.name} mtu {MTU}".split()
    )
    for space, name in ((a, a_name), (b, b_name)):
        space.batch(f"link set dev {name} up")


def _card(space: Namespace, interface: str, *, gather: bool = True) -> None:
    """A network card that fills in checksums and (`gather`) joins what it receives, but does not
    segment.
    """
    joining = ("rx-gro",)
    features.switch(
        space,
        interface,
        on=joining if gather else (),
        off=_SEGMENTATION if gather else (*_SEGMENTATION, *joining),
    )
    space.run(f"tc qdisc replace dev {interface} root pfifo limit {_QUEUE}".split())


def _backlog_drops() -> int:
    """Packets that the kernel's queues in front of each core had no room for, so far."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)
