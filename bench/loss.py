"""One TCP stream (CUBIC, or --congestion) over a link that loses packets at random, both ways.

    fast    [A] --veth-- [ M: nftables drops ] --veth-- [B]     0.1%, no delay, no rate limit; each
                                                                tunnel against its own speed without
                                                                loss, measured just before
    slow    [A] --veth-- [ M: userspace wire ] --veth-- [B]     1%, 40 ms of round trip, 50 Mbit/s,
                                                                100 ms of drop-tail buffer

On a veth, what segmentation offload joined is one packet and would be lost as one; the fast link
makes real packets of it first (`bench/ground.py` says how). M counts what it dropped, and packets
longer than the MTU: with one of those the run is not valid, and fails. A run on the fast link that
other programs disturbed (as in `bench/throughput.py`) is repeated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import run
from bench.cpu import Meter, quiet
from bench.figures import Round, Row, ratio, table
from bench.ground import Lossy, Slow
from bench.tunnels import OURS, Running, Tunnel, chosen, peers_of
from cli.demo.netns import Namespaces

FAST_ROWS = (
    Row("clean", "fast link, no loss", "Mbit/s", "more"),
    Row("lossy", "fast link, {loss:g}% loss", "Mbit/s", "more"),
    Row("kept", "kept of its own speed", "%", "more"),
    Row("dropped", "dropped in M", "%"),
    Row("overflow", "lost by full queues without that", "%"),
    Row("disturbed", "disturbed runs, of 2", ""),
)
SLOW_ROWS = (
    Row("slow", "{rate:g} Mbit/s, {rtt:g} ms, {loss:g}% loss", "Mbit/s", "more"),
    Row("slow_dropped", "dropped on the way to B", "%"),
    Row("disturbed", "disturbed runs, of 1", ""),
)
LINKS = ("fast", "slow")


def fast(
    candidates: Sequence[Tunnel], rounds: int, seconds: float, loss: float, congestion: str
) -> tuple[dict[str, list[Round]], list[str]]:
    """All rounds on the fast link; `loss` is a probability."""

    def measure(
        ground: Lossy, running: Running, name: str, before: Round | None
    ) -> dict[str, float | None]:
        ground.congestion = congestion
        ground.lose(0.0)
        tcp = partial(ground.tcp, running.target, seconds)
        clean, clean_use = quiet(running.pids, tcp)
        without = ground.counters()
        ground.lose(loss)
        lossy, lossy_use = quiet(running.pids, tcp)
        seen = ground.counters()
        if seen["oversize"]:
            raise RuntimeError(f"{seen['oversize']} packets longer than the MTU on the wire")
        found: dict[str, float | None] = {
            "clean": clean.mbit,
            "lossy": lossy.mbit,
            "kept": lossy.mbit / clean.mbit * 100 if clean.mbit else None,
            "dropped": (ratio(seen["dropped"], seen["packets"]) or 0.0) * 100,
            "overflow": (ratio(without["overflow"], without["packets"]) or 0.0) * 100,
            "disturbed": clean_use.disturbed + lossy_use.disturbed,
            "clean_retransmits": clean.retransmits,
            "lossy_retransmits": lossy.retransmits,
        }
        run.note("  " + run.brief(FAST_ROWS, found))
        return found

    return run.in_turns(candidates, rounds, Lossy, measure)


def slow(
    candidates: Sequence[Tunnel],
    rounds: int,
    seconds: float,
    *,
    loss: float,
    rtt: float,
    rate: float,
    buffer: float,
    congestion: str,
) -> tuple[dict[str, list[Round]], list[str]]:
    """All rounds on the slow link; seconds, bits a second, and a probability."""

    def build(spaces: Namespaces, directory: Path) -> Slow:
        ground = Slow(spaces, directory)
        ground.congestion = congestion
        ground.shape(rtt=rtt, rate=rate, buffer=buffer)
        return ground

    def measure(
        ground: Slow, running: Running, name: str, before: Round | None
    ) -> dict[str, float | None]:
        # Only now: a handshake that waits for a retransmission is another measurement.
        ground.shape(rtt=rtt, rate=rate, buffer=buffer, loss=loss)
        start = ground.counters()
        with Meter(running.pids) as meter:
            stream = ground.tcp(running.target, seconds)
        end = ground.counters()
        passed, dropped = (end[key] - start[key] for key in ("frames", "dropped"))
        found: dict[str, float | None] = {
            "slow": stream.mbit,
            "slow_dropped": (ratio(dropped, passed + dropped) or 0.0) * 100,
            "disturbed": meter.use.disturbed,
            "slow_retransmits": stream.retransmits,
        }
        run.note("  " + run.brief(SLOW_ROWS, found))
        return found

    return run.in_turns(candidates, rounds, build, measure)


def main(arguments: Sequence[str]) -> int:
    """Both links, a table for each, the raw values in one file."""
    parser = run.parser("loss", "One TCP stream over a link that loses packets.", rounds=5)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--seconds", type=float, default=5.0, help="on the fast link; default 5")
    parser.add_argument("--fast-loss", type=float, default=0.1, metavar="PERCENT")
    parser.add_argument("--slow-seconds", type=float, default=15.0, help="default 15")
    parser.add_argument("--slow-loss", type=float, default=1.0, metavar="PERCENT")
    parser.add_argument("--rtt", type=float, default=40.0, metavar="MS")
    parser.add_argument("--rate", type=float, default=50.0, metavar="MBIT")
    parser.add_argument("--buffer", type=float, default=100.0, metavar="MS")
    parser.add_argument("--congestion", default="cubic", help="control of the TCP; default cubic")
    options = parser.parse_args(arguments)
    if not run.ready("ip", "tc", "iperf3", "ping", "ss", "nft"):
        return 4
    try:
        candidates = chosen(options)
    except ValueError as error:
        parser.error(str(error))
    peers = peers_of(candidates)
    tables: list[str] = []
    measured: dict[str, list[Round]] = {}
    failed: list[str] = []
    if "fast" in options.links:
        got, wrong = fast(
            candidates,
            options.rounds,
            options.seconds,
            options.fast_loss / 100,
            options.congestion,
        )
        failed += wrong
        measured |= {f"{name}, fast": rounds for name, rounds in got.items()}
        tables.append(table(run.named(FAST_ROWS, loss=options.fast_loss), got, OURS, peers))
    if "slow" in options.links:
        got, wrong = slow(
            candidates,
            options.rounds,
            options.slow_seconds,
            loss=options.slow_loss / 100,
            rtt=options.rtt / 1000,
            rate=options.rate * 1e6,
            buffer=options.buffer / 1000,
            congestion=options.congestion,
        )
        failed += wrong
        measured |= {f"{name}, slow": rounds for name, rounds in got.items()}
        rows = run.named(SLOW_ROWS, loss=options.slow_loss, rtt=options.rtt, rate=options.rate)
        tables.append(table(rows, got, OURS, peers))
    return run.publish(options, candidates, measured, failed, "\n\n".join(tables))
