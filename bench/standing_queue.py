"""Does an upload make typing slow? Keystrokes beside a TCP stream that fills a slow link.

    [A] --veth-- [ M: 20 ms each way, 20 Mbit/s, 500 ms of drop-tail buffer ] --veth-- [B]

The bottleneck is outside the tunnel, in M, and its buffer is ten times too large, as in home
routers. One CUBIC upload A>B fills it. Twenty times a second a keystroke of 64 octets goes over a
TCP connection of its own and is echoed; it is typed at its time, whatever became of the ones
before. The first seconds of the upload do not count.

    idle, loaded    from a keystroke to its echo, without and beside the upload; one that was never
                    echoed counts as the time until the end
    utilisation     what the upload delivered, of the link's rate; headers are not in it, so about
                    96% is full for the bare wire, and 90% for a tunnel
    link            the same for all octets that crossed the bottleneck
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench import run
from bench.cpu import Meter
from bench.figures import Round, Row, quantile, received_between, table
from bench.ground import Slow
from bench.tunnels import OURS, Running, chosen, peers_of
from cli.demo.netns import Namespaces, terminate

ROWS = (
    Row("idle", "keystroke, idle, median", "ms", "less"),
    Row("loaded", "keystroke, loaded, median", "ms", "less"),
    Row("loaded_p95", "keystroke, loaded, p95", "ms", "less"),
    Row("added", "added by the upload, median", "ms", "less"),
    Row("utilisation", "utilisation by the upload", "%", "more"),
    Row("link", "all octets on the link", "%"),
    Row("disturbed", "disturbed runs, of 1", ""),
)
_PORT = 7200
_PER_SECOND = 20.0
_IDLE = 3.0  # seconds of typing before the upload
_WARM = 4.0  # seconds of upload before anything counts: slow start fills the buffer in two


def type_keys(
    ground: Slow, running: Running, seconds: float
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start both ends of the typing; the server and the one that types."""
    target = (running.target, str(_PORT))
    server = ground.run_module("B", "bench.keystrokes", "serve", *target, f"{seconds + 15}")
    assert server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        terminate([server])
        raise RuntimeError("the echo of keystrokes did not start")
    return server, ground.run_module(
        "A", "bench.keystrokes", "type", *target, str(seconds), str(_PER_SECOND)
    )


def delays(strokes: Sequence[tuple[float, float | None]], begin: float, end: float) -> list[float]:
    """Milliseconds of the keystrokes sent in [begin, end]; a lost one took until the end of all."""
    last = max((echoed or sent for sent, echoed in strokes), default=0.0)
    return [((echoed or last) - sent) * 1000 for sent, echoed in strokes if begin <= sent <= end]


def measure_one(
    ground: Slow, running: Running, rate: float, seconds: float
) -> dict[str, float | None]:
    """One tunnel once: type, upload after a while, and see."""
    server, typist = type_keys(ground, running, _IDLE + seconds + 2)
    try:
        begin = time.monotonic()
        time.sleep(_IDLE)
        with Meter(running.pids) as meter, ground.uploading(running.target, seconds) as report:
            start = time.monotonic()
            time.sleep(_WARM)
            before, first = ground.counters(), time.monotonic()
            time.sleep(max(0.0, start + seconds - 0.5 - first))
            after, last = ground.counters(), time.monotonic()
        output = typist.communicate(timeout=seconds + 20)[0]
    finally:
        terminate([server, typist])
    strokes: list[tuple[float, float | None]] = [tuple(stroke) for stroke in json.loads(output)]
    idle = delays(strokes, begin, start - 0.2)
    loaded = delays(strokes, first, last)
    if not idle or not loaded:
        raise RuntimeError("no keystrokes")
    octets, length = received_between(report, _WARM, seconds)
    return {
        "idle": statistics.median(idle),
        "loaded": statistics.median(loaded),
        "loaded_p95": quantile(loaded, 0.95),
        "added": statistics.median(loaded) - statistics.median(idle),
        "utilisation": octets * 8 / length / rate * 100 if length else None,
        "link": (after["octets"] - before["octets"]) * 8 / (last - first) / rate * 100,
        "dropped": after["dropped"] - before["dropped"],
        "disturbed": meter.use.disturbed,
        "lost_keystrokes": sum(echoed is None for _, echoed in strokes),
    }


def main(arguments: Sequence[str]) -> int:
    """All rounds, the table, the raw values."""
    parser = run.parser("queue", "Keystrokes beside an upload on a slow link.", rounds=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of upload; default 20")
    parser.add_argument("--rtt", type=float, default=40.0, metavar="MS")
    parser.add_argument("--rate", type=float, default=20.0, metavar="MBIT")
    parser.add_argument("--buffer", type=float, default=500.0, metavar="MS")
    options = parser.parse_args(arguments)
    if options.seconds < _WARM + 2:
        parser.error(f"--seconds must be {_WARM + 2:g} or more")
    if not run.ready("ip", "iperf3", "ping", "ss"):
        return 4
    try:
        candidates = chosen(options)
    except ValueError as error:
        parser.error(str(error))
    rate = options.rate * 1e6

    def build(spaces: Namespaces, directory: Path) -> Slow:
        ground = Slow(spaces, directory)
        ground.shape(rtt=options.rtt / 1000, rate=rate, buffer=options.buffer / 1000)
        return ground

    def measure(
        ground: Slow, running: Running, name: str, before: Round | None
    ) -> dict[str, float | None]:
        found = measure_one(ground, running, rate, options.seconds)
        run.note("  " + run.brief(ROWS, found))
        return found

    measured, failed = run.in_turns(candidates, options.rounds, build, measure)
    text = table(ROWS, measured, OURS, peers_of(candidates))
    return run.publish(options, candidates, measured, failed, text)
