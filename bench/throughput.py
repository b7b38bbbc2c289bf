"""One TCP stream through martlet and through wireguard-go, in turns on the same wire.

    [A] eth0 --- veth, MTU 1500, no delay --- eth0 [B]      A dials B; both ends, iperf3 and the
                                                            kernel share this machine's cores

A figure of one run is worth little on a shared machine, so both tunnels run in every round and the
ratio of the medians is the result. Needs root, iperf3, and for the comparison wireguard-go and wg:
`python -m bench throughput [--rounds 5] [--seconds 5] [--out throughput.json]`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.demo.netns import CommandError, Namespace, Namespaces, terminate
from cli.demo.pair import MARTLET
from cli.demo.world import PORT, PYTHON_ENV

OUTER = {"A": "192.0.2.1", "B": "192.0.2.2"}
INNER = {"A": "10.88.0.1", "B": "10.88.0.2"}
OTHER = {"A": "B", "B": "A"}
WAIT = 10.0  # seconds for a tunnel to come up


class Ground:
    """Two namespaces and the wire between them."""

    def __init__(self, spaces: Namespaces, directory: Path) -> None:
        self.directory = directory
        self.hosts = {name: spaces.create(name) for name in OUTER}
        spaces.veth(self.hosts["A"], "eth0", self.hosts["B"], "eth0")
        for name, space in self.hosts.items():
            space.batch(f"addr add {OUTER[name]}/24 dev eth0")

    def wait(self, inner: bool) -> None:
        target = (INNER if inner else OUTER)["B"]
        deadline = time.monotonic() + WAIT
        while (
            self.hosts["A"]
            .run(["ping", "-n", "-q", "-c", "1", "-W", "1", target], check=False)
            .returncode
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no packet passed; see the logs in {self.directory}")
            time.sleep(0.1)

    def iperf(self, target: str, seconds: float, *options: str) -> float:
        """Mbit/s received in one direction: A sends, or with -R B does."""
        log = self.directory / "iperf3.log"
        server = self.hosts["B"].popen(["iperf3", "-s", "-1", "-B", target], log=log)
        deadline = time.monotonic() + 5
        while target not in self.hosts["B"].run(["ss", "-Hltn", "sport = :5201"]).stdout:
            if time.monotonic() > deadline:
                raise RuntimeError("iperf3 does not listen")
            time.sleep(0.02)
        done = self.hosts["A"].run(
            ["iperf3", "-J", "-c", target, "-t", str(seconds), *options], timeout=seconds + 20
        )
        server.wait(10)
        end = json.loads(done.stdout)["end"]
        return float(end["sum_received"]["bits_per_second"]) / 1e6


@contextmanager
def martlet(ground: Ground) -> Iterator[None]:
    keys = {name: ground.directory / f"martlet-{name}" for name in OUTER}
    public: dict[str, str] = {}
    for name, key in keys.items():
        key.unlink(missing_ok=True)  # of the round before
        made = ground.hosts[name].run([*MARTLET, "keygen", str(key)], env=PYTHON_ENV)
        public[name] = made.stdout.strip()
    processes = []
    for name in ("B", "A"):
        other = OTHER[name]
        config = ground.directory / f"{name}.toml"
        dial = f'endpoint = "{OUTER["B"]}:{PORT}"\n' if name == "A" else ""
        listen = f"listen_port = {PORT}\n" if name == "B" else ""
        config.write_text(
            f'[interface]\nname = "mt0"\naddress = ["{INNER[name]}/24"]\n'
            f'private_key = "{keys[name]}"\n{listen}'
            f'[[peer]]\nname = "{other.lower()}"\npublic_key = "{public[other]}"\n{dial}'
            f'allowed_ips = ["{INNER[other]}/32"]\n'
        )
        argv = [*MARTLET, "up", str(config)]
        log = ground.directory / f"martlet-{name}.log"
        processes.append(ground.hosts[name].popen(argv, env=PYTHON_ENV, log=log))
    try:
        ground.wait(inner=True)
        time.sleep(1)  # the path's MTU is known an RTT after the path
        yield
    finally:
        terminate(processes)


@contextmanager
def wireguard_go(ground: Ground) -> Iterator[None]:
    processes = []
    keys = {name: _wg_key(ground.hosts[name]) for name in OUTER}
    sockets = Path("/var/run/wireguard")
    names = {name: f"mtbench{name}" for name in OUTER}
    try:
        for name, space in ground.hosts.items():
            log = ground.directory / f"wireguard-{name}.log"
            processes.append(
                space.popen(
                    ["wireguard-go", "-f", names[name]],
                    log=log,
                    env={"WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
                )
            )
        for name, space in ground.hosts.items():
            deadline = time.monotonic() + WAIT
            while not (sockets / f"{names[name]}.sock").exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"wireguard-go did not start; see {ground.directory}")
                time.sleep(0.05)
            private = ground.directory / f"wireguard-{name}.key"
            private.write_text(keys[name][0])
            private.chmod(0o600)
            other = OTHER[name]
            ours = f"{names[name]} listen-port 51820 private-key {private}"
            theirs = f"peer {keys[other][1]} allowed-ips {INNER[other]}/32"
            theirs += f" endpoint {OUTER[other]}:51820"
            space.run(["wg", "set", *ours.split(), *theirs.split()])
            space.batch(
                f"addr add {INNER[name]}/24 dev {names[name]}",
                f"link set dev {names[name]} mtu 1420 up",
            )
        ground.wait(inner=True)
        yield
    finally:
        terminate(processes)


def _wg_key(space: Namespace) -> tuple[str, str]:
    private = space.run(["wg", "genkey"]).stdout.strip()
    return private, space.run(["wg", "pubkey"], input=private).stdout.strip()


def main(arguments: Sequence[str]) -> int:
    """Run all rounds and print medians and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("throughput.json"))
    options = parser.parse_args(arguments)
    tunnels = {"martlet": martlet}
    if shutil.which("wireguard-go") and shutil.which("wg"):
        tunnels["wireguard-go"] = wireguard_go
    else:
        print(
            "no wireguard-go here (apt-get install wireguard-go wireguard-tools)", file=sys.stderr
        )
    raw: dict[str, dict[str, list[float]]] = {
        name: {"A>B": [], "B>A": []} for name in ["wire", *tunnels]
    }
    with tempfile.TemporaryDirectory(prefix="martlet-bench-") as folder, Namespaces() as spaces:
        ground = Ground(spaces, Path(folder))
        ground.wait(inner=False)
        for number in range(options.rounds):
            for way, reverse in (("A>B", ()), ("B>A", ("-R",))):
                raw["wire"][way].append(ground.iperf(OUTER["B"], 2.0, *reverse))
            for name, tunnel in tunnels.items():
                try:
                    with tunnel(ground):
                        for way, reverse in (("A>B", ()), ("B>A", ("-R",))):
                            rate = ground.iperf(INNER["B"], options.seconds, *reverse)
                            raw[name][way].append(rate)
                            print(f"round {number + 1}  {name:14} {way}  {rate:8.1f} Mbit/s")
                except (CommandError, RuntimeError) as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    return 1
    medians = {
        name: {way: statistics.median(rates) for way, rates in ways.items()}
        for name, ways in raw.items()
    }
    print()
    for name, ways in medians.items():
        print(f"{name:14} " + "  ".join(f"{way} {rate:9.1f} Mbit/s" for way, rate in ways.items()))
    if "wireguard-go" in medians:
        ratios = {
            way: medians["martlet"][way] / medians["wireguard-go"][way] for way in ("A>B", "B>A")
        }
        print("martlet / wireguard-go: " + "  ".join(f"{w} {r:.2f}" for w, r in ratios.items()))
    options.out.write_text(json.dumps({"raw": raw, "medians": medians}, indent=1) + "\n")
    return 0
