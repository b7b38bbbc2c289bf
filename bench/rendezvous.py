"""`./dev bench rendezvous`: how fast many pairs of hosts meet, and what each costs the broker.

::

    [rendezvous]  lo: martlet rendezvous (mosquitto), and processes of hosts: for each host the
                  signaller and the meeting of the product, without a tunnel

Three acts. *Arrive*: hosts come one after another, and each pair meets. *Idle*: nothing but
keepalives. *Storm*: the broker is stopped and started again, and all hosts come back at once. Two
have met for an end when that has a fresh offer of the other; the time counts from the later of the
two starts, or from the broker's return. All hosts share this machine with the broker, so the times
of the storm are mostly those of the hosts' Python.
"""

from __future__ import annotations

import argparse
import json
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import run
from bench.cpu import Meter
from bench.figures import quantile, text
from cli.demo.netns import Namespace, Namespaces
from cli.demo.pair import tail

PORT = 1883
_START = 20.0  # seconds for the broker to listen
_PREPARE = 120.0  # seconds for the hosts of one process to make their keys
_PER_SECOND = 100.0  # hosts that arrive


class Spent(NamedTuple):
    """What an act cost the broker, and the wire."""

    seconds: float
    cpu: float
    bytes: int
    """Of IP packets, both directions, headers included."""


@dataclass
class Broker:
    """A running `martlet rendezvous`."""

    process: subprocess.Popen[bytes]
    pid: int
    version: str

    def memory(self) -> int:
        """Bytes that are resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024


def main(arguments: Sequence[str]) -> int:
    """Run the measurement; the exit code."""
    options = argparse.ArgumentParser(
        prog="./dev bench rendezvous",
        description="How fast many pairs of hosts meet, and what each costs the broker.",
    )
    options.add_argument(
        "--json", type=Path, default=Path("artifacts/rendezvous.json"), help="raw values go here"
    )
    options.add_argument("--hosts", type=int, default=1000, help="default 1000")
    options.add_argument("--processes", type=int, default=4, help="that the hosts run in, 4")
    options.add_argument("--idle", type=float, default=40.0, help="seconds of the idle act, 40")
    options.add_argument("--timeout", type=float, default=60.0, help="seconds of an act, 60")
    chosen = options.parse_args(arguments)
    if not run.ready("mosquitto"):
        return 1
    pairs = max(chosen.processes, chosen.hosts // 2)
    needed = 4 * pairs + 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), max(hard, needed)))
    with (
        tempfile.TemporaryDirectory(prefix="martlet-bench-") as folder,
        Namespaces() as spaces,
    ):
        space = spaces.create("rendezvous")
        space.batch("link set lo up")
        result = _measure(space, Path(folder), chosen, pairs)
    print(_table(result))
    result["machine"] = run.machine()
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    run.note(f"raw values: {chosen.json}")
    return 0 if not (result["arrive"]["late"] or result["storm"]["late"]) else 1


def _measure(space: Namespace, folder: Path, chosen: Any, pairs: int) -> dict[str, Any]:
    shares = [pairs // chosen.processes] * chosen.processes
    for number in range(pairs % chosen.processes):
        shares[number] += 1
    broker = _start_broker(space, folder, 2 * pairs)
    empty = broker.memory()
    crowds = [_Crowd(space, folder, share, chosen.processes, chosen.timeout) for share in shares]
    run.note(f"{2 * pairs} hosts make their keys")
    for crowd in crowds:
        crowd.expect("ready", _PREPARE)

    run.note(f"arrive: {_PER_SECOND:g} hosts a second")
    arrive = _act(space, broker, crowds, "arrive", chosen.timeout + 2 * pairs / _PER_SECOND)
    full = broker.memory()
    run.note(f"idle: {chosen.idle:g} s")
    with _spending(space, broker) as spent:
        time.sleep(chosen.idle)
    idle = spent[0]._asdict()
    run.note("storm: the broker is stopped, and started again")
    broker.process.send_signal(signal.SIGTERM)
    broker.process.wait()
    for crowd in crowds:
        crowd.tell("broken")
    for crowd in crowds:
        crowd.expect("alone", chosen.timeout)
    broker = _start_broker(space, folder, 2 * pairs)
    storm = _act(space, broker, crowds, "storm", chosen.timeout)
    storm["memory"] = broker.memory()
    for crowd in crowds:
        crowd.end()
    return {
        "hosts": 2 * pairs,
        "broker": f"mosquitto {broker.version}",
        "memory": {"empty": empty, "full": full},
        "arrive": arrive,
        "idle": idle,
        "storm": storm,
    }


def _act(
    space: Namespace, broker: Broker, crowds: Sequence[_Crowd], name: str, timeout: float
) -> dict[str, Any]:
    """All crowds do one thing; how long each end took, and what the broker spent."""
    with _spending(space, broker) as spent:
        for crowd in crowds:
            crowd.tell(name)
        met: list[float] = []
        late = 0
        for crowd in crowds:
            answer = crowd.expect("met", timeout + 10)
            met += answer["times"]
            late += answer["late"]
    return {"times": met, "late": late, **spent[0]._asdict()}


@contextmanager
def _spending(space: Namespace, broker: Broker) -> Iterator[list[Spent]]:
    spent: list[Spent] = []
    before = _octets(space)
    with Meter([broker.pid]) as meter:
        yield spent
    spent.append(Spent(meter.use.seconds, meter.use.tunnel, _octets(space) - before))


def _octets(space: Namespace) -> int:
    """That the loopback device carried."""
    shown = json.loads(space.run(["ip", "-j", "-s", "link", "show", "dev", "lo"]).stdout)
    return int(shown[0]["stats64"]["tx"]["bytes"])


def _start_broker(space: Namespace, folder: Path, hosts: int) -> Broker:
    log = folder / "broker.log"
    process = space.popen(
        [
            *(sys.executable, "-m", "cli.main", "rendezvous", "--broker", "mosquitto", "--json"),
            *("--no-stun", "--listen", "127.0.0.1", "--max-clients", str(hosts + 100)),
        ],
        stdout=subprocess.PIPE,
        log=log,
    )
    assert process.stdout is not None
    line = b""
    if select.select([process.stdout], [], [], _START)[0]:
        line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"martlet rendezvous is not ready: {tail(log)}")
    ready = json.loads(line)
    return Broker(process, ready["broker_pid"], ready["version"])


class _Crowd:
    """A process with some pairs of hosts in it (bench/rendezvous_hosts.py)."""

    def __init__(
        self, space: Namespace, folder: Path, pairs: int, processes: int, timeout: float
    ) -> None:
        self._log = folder / "hosts.log"
        self._process = space.popen(
            [
                *(sys.executable, "-m", "bench.rendezvous_hosts", f"mqtt://127.0.0.1:{PORT}"),
                *(str(pairs), str(_PER_SECOND / processes), str(timeout)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            log=self._log,
        )

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n".encode())
        self._process.stdin.flush()

    def expect(self, what: str, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise RuntimeError(f"hosts are not {what} within {timeout:g} s: {tail(self._log)}")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"hosts have ended: {tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if answer["event"] != what:
            raise RuntimeError(f"hosts are {answer['event']}, not {what}")
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def _table(result: dict[str, Any]) -> str:
    hosts = result["hosts"]
    memory = result["memory"]
    lines = [f"{hosts} hosts in pairs, {result['broker']}", ""]
    lines.append(
        f"{'':8}{'MET MEDIAN':>12}{'95%':>10}{'MAX':>10}{'NOT MET':>9}"
        f"{'BROKER CPU':>13}{'A HOST':>11}{'BYTES A HOST':>14}"
    )
    for name in ("arrive", "idle", "storm"):
        act = result[name]
        times = [1000 * value for value in act.get("times", ())]
        shown = ["-"] * 3
        if times:
            figures = statistics.median(times), quantile(times, 0.95), max(times)
            shown = [f"{text(figure)} ms" for figure in figures]
        lines.append(
            f"{name:8}{shown[0]:>12}{shown[1]:>10}{shown[2]:>10}{act.get('late', '-'):>9}"
            f"{act['cpu']:>11.2f} s{1e6 * act['cpu'] / hosts:>8.0f} us"
            f"{act['bytes'] / hosts:>14.0f}"
        )
    idle = result["idle"]
    each = (memory["full"] - memory["empty"]) / hosts
    share = 100 * idle["cpu"] / idle["seconds"] * 1000 / hosts
    lines += [
        "",
        f"memory of the broker: {memory['empty'] / 1e6:.1f} MB empty, {memory['full'] / 1e6:.1f} MB"
        f" with all hosts, {each / 1000:.1f} kB a host;"
        f" {result['storm']['memory'] / 1e6:.1f} MB after the storm",
        f"1000 idle hosts: {share:.2f}% of a core,"
        f" {8 * idle['bytes'] / idle['seconds'] / hosts:.0f} kbit/s",
    ]
    return "\n".join(lines)
