"""How fast, and at what price: the bare wire, martlet and wireguard-go on one topology.

    [A] eth0 ------ veth, MTU 1500, no delay ------ eth0 [B]     A dials B; both ends, the loads and
                                                                 the kernel share this machine

A figure from a shared machine is worth little; the ratio of two that were taken in turns in one run
is. So every tunnel runs in every round, on fresh namespaces, and the table has medians over rounds
and ratios of those. `--wire cable` takes segmentation offload from the wire (`bench/ground.py`).

    TCP         iperf3 with CUBIC (`--congestion` changes it), as received
    64 B UDP    the highest rate at which less than 1% is lost, bisected to 8% and confirmed over a
                longer time; payload of 64 octets, 200 us slots (`bench/udpload.c`). A rate that the
                sender itself cannot keep up beside the tunnel does not count: then the tunnel could
                do more with more cores, and the table says so.
    CPU         user and system time of both ends' processes per 10^9 octets of one TCP stream A>B;
                the machine's has iperf3 and the kernel's interrupts in it, and whatever else ran
    RTT         200 pings from A, 10 ms apart; loaded: during one TCP stream A>B
    memory      most resident memory of one end during TCP A>B, the larger end
    disturbed   runs in which others took more than 0.15 of a core or the host more than 5%; each
                is repeated once and the quieter one counts
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench import run, udp
from bench.cpu import Meter, Use, peak_memory, quiet, reset_peaks
from bench.figures import Round, Row, Stream, highest_passing, quantile, ratio, table
from bench.ground import Direct, Ground
from bench.tunnels import BARE, OURS, Running, chosen, peers_of
from cli.demo.netns import Namespaces

T = TypeVar("T")

ROWS = (
    Row("tcp_ab", "TCP, 1 stream, A>B", "Mbit/s", "more"),
    Row("tcp_ba", "TCP, 1 stream, B>A", "Mbit/s", "more"),
    Row("tcp_4", "TCP, 4 streams, A>B", "Mbit/s", "more"),
    Row("share", "TCP A>B, share of the bare wire", "%"),
    Row("udp", "64 B UDP, < 1% loss", "1000/s", "more"),
    Row("udp_sender", "(1: the sender was the limit)", ""),
    Row("udp_cpu", "CPU per 64 B packet at that rate", "us", "less"),
    Row("cpu", "CPU per GB, both ends", "s", "less"),
    Row("machine", "CPU per GB, the whole machine", "s", "less"),
    Row("rtt", "RTT idle, median", "ms", "less"),
    Row("rtt_p99", "RTT idle, p99", "ms", "less"),
    Row("loaded", "RTT loaded, median", "ms", "less"),
    Row("loaded_p99", "RTT loaded, p99", "ms", "less"),
    Row("memory", "peak memory of one end", "MiB", "less"),
    Row("disturbed", "disturbed runs", ""),
)
PARTS = ("tcp", "udp", "rtt")

_SIZE = 64  # octets of UDP payload
_LOSS = 0.01
_FIRST_RATE = 20_000.0  # packets a second
_FLOOR, _CEILING = 500.0, 2_000_000.0
_TRIAL = 0.7  # seconds of a bisection step: 100 times a scheduler's slice
_CONFIRM = 2.0  # seconds
_BACK = 0.93  # of the rate, when it could not be confirmed
_CONFIRMATIONS = 8
_UNLUCKY = 0.15  # loss up to which a trial is repeated: it may have been a stall of the machine
_PINGS = 200
_PING_TIME = _PINGS * 0.01 + 1.0  # seconds of load that loaded pings need, with its start


class Bench:
    """One tunnel in one round."""

    def __init__(self, ground: Ground, running: Running, options: _Options) -> None:
        self.ground = ground
        self.running = running
        self.options = options
        self.disturbed = 0

    def quiet(self, measure: Callable[[], T]) -> tuple[T, Use]:
        """As `cpu.quiet`, and remembers what was disturbed even so."""
        got, use = quiet(self.running.pids, measure)
        self.disturbed += use.disturbed
        return got, use

    def measure(self, before: Round | None) -> dict[str, float | None]:
        """All the chosen parts."""
        found: dict[str, float | None] = {}
        if "rtt" in self.options.parts:
            found |= self._idle()
        if "tcp" in self.options.parts:
            found |= self._tcp()
        if "rtt" in self.options.parts:
            found |= self._loaded()
        if "udp" in self.options.parts:
            known = (before or {}).get("udp")
            found |= self._small(known * 1000 if known else None)
        found["disturbed"] = self.disturbed
        return found

    def _tcp(self) -> dict[str, float | None]:
        tcp = partial(self.ground.tcp, self.running.target, self.options.seconds)
        reset_peaks(self.running.pids)
        there, use = self.quiet(tcp)
        memory = max(map(peak_memory, self.running.pids), default=None)
        back, _ = self.quiet(partial(tcp, reverse=True))
        four, _ = self.quiet(partial(tcp, streams=4))
        tunnel = _per_gb(use.tunnel, there) if self.running.pids else None
        return {
            "tcp_ab": there.mbit,
            "tcp_ba": back.mbit,
            "tcp_4": four.mbit,
            "cpu": tunnel,
            "machine": _per_gb(use.machine, there),
            "memory": memory,
            "retransmits": there.retransmits,
        }

    def _idle(self) -> dict[str, float | None]:
        times, _ = self.quiet(partial(self.ground.ping, self.running.target, _PINGS))
        return {"rtt": statistics.median(times), "rtt_p99": quantile(times, 0.99)}

    def _loaded(self) -> dict[str, float | None]:
        def pings() -> list[float]:
            with self.ground.uploading(self.running.target, _PING_TIME):
                time.sleep(0.7)
                return self.ground.ping(self.running.target, _PINGS)

        times, _ = self.quiet(pings)
        return {
            "loaded": statistics.median(times),
            "loaded_p99": quantile(times, 0.99),
            "loaded_lost": _PINGS - len(times),
        }

    def _small(self, known: float | None) -> dict[str, float | None]:
        """Bisect; from what the round before found, when there was one."""

        def once(rate: float, seconds: float) -> udp.Trial:
            return self.ground.datagrams(self.running.target, _SIZE, rate, seconds)

        slow_sender = False  # at the lowest rate that did not pass, which comes last

        def passes(rate: float) -> bool:
            nonlocal slow_sender
            trial = once(rate, _TRIAL)
            if not trial.passes(_LOSS) and trial.loss < _UNLUCKY:
                trial = once(rate, _TRIAL)
            if trial.passes(_LOSS):
                return True
            slow_sender = trial.late and trial.loss < _LOSS
            return False

        rate = highest_passing(
            passes,
            known or _FIRST_RATE,
            floor=_FLOOR,
            ceiling=_CEILING,
            growth=1.3 if known else 2.0,
        )
        if rate is None:
            return {"udp": 0.0}
        for _ in range(_CONFIRMATIONS):
            with Meter(self.running.pids) as meter:
                trial = once(rate, _CONFIRM)
            if trial.passes(_LOSS):
                break
            rate *= _BACK
        passed = trial.passes(_LOSS)
        cpu = ratio(meter.use.tunnel * 1e6, trial.received) if self.running.pids else None
        return {
            "udp": trial.rate / 1000 if passed else None,
            "udp_cpu": cpu if passed else None,
            "udp_sender": slow_sender,
            "udp_loss": trial.loss,
            "udp_reordered": trial.reordered,
            "udp_duplicates": trial.duplicates,
            "udp_receiver_dropped": trial.dropped,
        }


class _Options:
    """The part of the options that a round needs."""

    def __init__(self, seconds: float, parts: Sequence[str]) -> None:
        self.seconds = seconds
        self.parts = parts


def _per_gb(cpu: float, stream: Stream) -> float | None:
    return ratio(cpu, stream.octets / 1e9)


def with_shares(measured: dict[str, list[Round]]) -> dict[str, list[Round]]:
    """The same with each tunnel's share of the bare wire's TCP, as the median of that has it."""
    bare = [value for one in measured.get(BARE, []) if (value := one.get("tcp_ab"))]
    if not bare:
        return measured
    wire = statistics.median(bare)
    return {
        name: [
            {**one, "share": value / wire * 100} if (value := one.get("tcp_ab")) else one
            for one in rounds
        ]
        for name, rounds in measured.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Run all rounds, print the table, write the raw values."""
    parser = run.parser("throughput", "Speed and its price, beside other tunnels.", rounds=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each TCP run; default 5")
    parser.add_argument(
        "--wire", choices=("offload", "cable"), default="offload", help="see bench/ground.py"
    )
    parser.add_argument("--congestion", default="cubic", help="control of the TCP; default cubic")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    if not run.ready("ip", "tc", "iperf3", "ping", "ss"):
        return 4
    try:
        candidates = chosen(options)
        udp.program()
    except (ValueError, *run.Failures) as error:
        parser.error(str(error))
    inside = _Options(options.seconds, options.parts)

    def build(spaces: Namespaces, directory: Path) -> Direct:
        ground = Direct(spaces, directory, cable=options.wire == "cable")
        ground.congestion = options.congestion
        return ground

    def measure(
        ground: Direct, running: Running, name: str, before: Round | None
    ) -> dict[str, float | None]:
        found = Bench(ground, running, inside).measure(before)
        run.note("  " + run.brief(ROWS, found))
        return found

    measured, failed = run.in_turns(candidates, options.rounds, build, measure)
    text = table(ROWS, with_shares(measured), OURS, peers_of(candidates))
    return run.publish(options, candidates, measured, failed, text)
