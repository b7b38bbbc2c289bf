"""Where the tunnel's CPU time goes: `perf` on both ends of martlet during one TCP stream A>B.

    share       of the samples, taken 999 times a second of CPU time
    s/GB        that share of the tunnel's CPU seconds per 10^9 octets delivered
    us/1400     the same for every 1,400 octets, about one packet on the wire

Kinds: `python` is the interpreter, and `python modules` compiled ones that are not named apart;
`engine` is martlet's own native code; `crypto` is libcrypto wherever it is (the package
cryptography brings its own); `kernel` is all system calls, and interrupts that came meanwhile. In
a virtual machine perf has only a timer: what the kernel does with interrupts off is booked where it
turns them on again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import run
from bench.cpu import Meter
from bench.figures import Round, markdown, received_between, text
from bench.ground import Direct
from bench.tunnels import OURS, Running, chosen
from cli.demo.netns import Namespaces, command, terminate

_HERTZ = 999  # not a multiple of the kernel's timer, which would be sampled in step
_PACKET = 1400  # octets
_SKIP = 1.0  # seconds: the start of the stream is not the steady state
# The first that fits the file names the kind.
KINDS = (
    ("kernel", re.compile(r"\[kernel|\[guest\.kernel|vmlinux|\.ko(\.\w+)?$|^\[(?!vdso)")),
    ("crypto", re.compile(r"libcrypto|libssl|_rust\.abi3\.so|/cryptography/|/aioquic/_crypto")),
    ("engine", re.compile(r"/datapath/native/|/tunnel/.*\.so$")),
    ("python", re.compile(r"libpython|/python3(\.\d+)?$")),
    ("python modules", re.compile(r"/(site|dist)-packages/|/lib-dynload/")),
    ("libc", re.compile(r"/libc[.-]|ld-linux|libpthread|\[vdso\]")),
)
_SAMPLE = re.compile(r"^\s*(?P<pid>\d+)\s+[0-9a-f]+\s+(?P<symbol>.*) \((?P<file>[^()]*)\)\s*$")


def kind(file: str) -> str:
    """What a sample in this file is."""
    return next((name for name, pattern in KINDS if pattern.search(file)), "other")


def parse(lines: Iterable[str]) -> Counter[tuple[int, str, str]]:
    """Samples by process, file and symbol, from `perf script -F pid,ip,sym,dso`."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for line in lines:
        if found := _SAMPLE.match(line):
            symbol = re.sub(r"\+0x[0-9a-f]+$", "", found["symbol"])
            counts[int(found["pid"]), found["file"], symbol] += 1
    return counts


def tables(counts: Counter[tuple[int, str, str]], cpu_per_gb: float | None, top: int) -> str:
    """Kinds, then the `top` symbols, each with its share and its price."""
    total = counts.total()
    kinds: Counter[str] = Counter()
    symbols: Counter[tuple[str, str]] = Counter()
    for (_, file, symbol), count in counts.items():
        name = kind(file)
        kinds[name] += count
        where = f" ({Path(file).name})" if name == "other" else ""
        symbols[name, symbol + where] += count

    def price(count: int) -> list[str]:
        share = count / total
        seconds = share * cpu_per_gb if cpu_per_gb is not None else None
        micros = seconds * _PACKET / 1e3 if seconds is not None else None  # s/GB is ns an octet
        return [f"{share * 100:.1f}", text(seconds), text(micros)]

    head = ["% of samples", "s/GB", "us/1400"]
    by_kind = [["kind", *head], *([name, *price(count)] for name, count in kinds.most_common())]
    by_kind.append(["all", *price(total)])
    by_symbol = [["symbol", "kind", *head]]
    by_symbol += [
        [symbol, name, *price(count)] for (name, symbol), count in symbols.most_common(top)
    ]
    return f"{markdown(by_kind)}\n\n{markdown(by_symbol, left=2)}"


def record(ground: Direct, running: Running, seconds: float) -> tuple[Any, dict[str, float | None]]:
    """Load the tunnel and sample both ends; the counted samples, and what was delivered."""
    data = ground.directory / "perf.data"
    pids = ",".join(str(pid) for pid in running.pids)
    argv = ["perf", "record", "-q", "-F", str(_HERTZ), "-o", str(data), "-p", pids]
    with ground.uploading(running.target, seconds + 2 * _SKIP) as report:
        time.sleep(_SKIP)
        log = ground.directory / "perf.log"
        with Meter(running.pids) as meter, log.open("wb") as sink:
            perf = subprocess.Popen([*argv, "--", "sleep", str(seconds)], stdout=sink, stderr=sink)
            try:
                perf.wait(seconds + 20)
            finally:
                terminate([perf])
    if not data.exists():
        raise RuntimeError(f"perf gave nothing: {log.read_text()[-400:]}")
    script = ["perf", "script", "-i", str(data), "-F", "pid,ip,sym,dso"]
    counts = parse(command(script, timeout=120).stdout.splitlines())
    if not counts:
        raise RuntimeError("perf took no samples")
    octets, length = received_between(report, _SKIP, _SKIP + seconds)
    speed = octets / length if length else None  # octets a second
    cpu = meter.use.tunnel / meter.use.seconds
    return counts, {
        "mbit": speed * 8 / 1e6 if speed else None,
        "cores": cpu,
        "cpu": cpu / speed * 1e9 if speed else None,
    }


def main(arguments: Sequence[str]) -> int:
    """One profile of martlet, or with --only of another tunnel."""
    parser = run.parser("profile", "Where the tunnel's CPU time goes.", rounds=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of samples; default 8")
    parser.add_argument("--wire", choices=("offload", "cable"), default="offload")
    parser.add_argument("--top", type=int, default=40, help="symbols to show; default 40")
    options = parser.parse_args(arguments)
    if not run.ready("ip", "tc", "iperf3", "ping", "ss"):
        return 4
    if shutil.which("perf") is None:
        run.note("no perf here (apt-get install linux-perf); nothing measured")
        return 4
    options.only = options.only or [OURS]
    try:
        candidates = chosen(options)
    except ValueError as error:
        parser.error(str(error))
    shown: list[str] = []
    samples: dict[str, list[dict[str, Any]]] = {}

    def build(spaces: Namespaces, directory: Path) -> Direct:
        return Direct(spaces, directory, cable=options.wire == "cable")

    def measure(
        ground: Direct, running: Running, name: str, before: Round | None
    ) -> dict[str, float | None]:
        if not running.pids:
            raise RuntimeError("there is no process to profile")
        counts, found = record(ground, running, options.seconds)
        ends = {process.pid: end for end, process in running.processes.items()}
        samples.setdefault(name, []).extend(
            {"end": ends.get(pid, str(pid)), "file": file, "symbol": symbol, "samples": count}
            for (pid, file, symbol), count in counts.most_common()
        )
        shown.append(
            f"{name}: {text(found['mbit'])} Mbit/s, {text(found['cores'])} cores,"
            f" {text(found['cpu'])} s/GB\n\n{tables(counts, found['cpu'], options.top)}"
        )
        return found

    measured, failed = run.in_turns(candidates, options.rounds, build, measure)
    return run.publish(options, candidates, measured, failed, "\n\n".join(shown), samples=samples)
