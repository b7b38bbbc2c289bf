"""What a relay costs: one tunnel directly and by a TURN server, over UDP, TCP and TLS.

    [A] eth0 ---- veth ---- a [ M: coturn ] b ---- veth ---- eth0 [B]

A dials B. Where the tunnel is to be relayed, M forwards no UDP, so that A's only way is the server
in M, which sends to B directly. All of it shares this machine: both ends, coturn (one thread serves
the one session), the loads and the kernel. The ratios are to the direct path by way of M in the
same round; the time that is added is the difference of the medians of the round trip.

    TCP       iperf3 with CUBIC, one stream, as received
    CPU       of both ends' processes, and of coturn, per 10^9 octets of the stream A>B
    RTT       200 pings from A, 10 ms apart; loaded: during one TCP stream A>B
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import run
from bench.cpu import Meter, quiet
from bench.figures import Round, Row, Stream, quantile, ratio, table
from bench.ground import Ground
from bench.tunnels import Martlet, Running, Tunnel
from bench.turn_server import TurnServer
from cli.demo.netns import Namespaces

DIRECT = "direct"
TRANSPORTS = ("udp", "tcp", "tls")
ROWS = (
    Row("tcp_ab", "TCP, 1 stream, A>B", "Mbit/s", "more"),
    Row("tcp_ba", "TCP, 1 stream, B>A", "Mbit/s", "more"),
    Row("share_ab", "TCP A>B, share of direct", "%"),
    Row("share_ba", "TCP B>A, share of direct", "%"),
    Row("cpu", "CPU per GB, both ends", "s", "less"),
    Row("cpu_server", "CPU per GB, the server", "s", "less"),
    Row("rtt", "RTT idle, median", "ms", "less"),
    Row("rtt_p99", "RTT idle, p99", "ms", "less"),
    Row("added", "RTT idle, more than direct", "ms"),
    Row("loaded", "RTT loaded, median", "ms", "less"),
    Row("loaded_p99", "RTT loaded, p99", "ms", "less"),
    Row("disturbed", "disturbed runs", ""),
)
_PINGS = 200
_PING_TIME = _PINGS * 0.01 + 1.0  # seconds of load that loaded pings need, with its start
_BLOCK = """
table inet blocked {
chain forward {
type filter hook forward priority 0; policy accept;
meta l4proto udp drop
}
}
"""


class Middle(Ground):
    """Two hosts, and a router between them that is a TURN server, too."""

    def __init__(self, spaces: Namespaces, directory: Path) -> None:
        super().__init__(spaces, directory)
        self.outer = {"A": "192.0.2.1", "B": "198.51.100.1"}
        gateways = {"A": "192.0.2.254", "B": "198.51.100.254"}
        self.middle = middle = spaces.create("M")
        middle.forward()
        for name, space in self.hosts.items():
            port = name.lower()
            spaces.veth(space, "eth0", middle, port)
            middle.batch(f"addr add {gateways[name]}/24 dev {port}")
            space.batch(
                f"addr add {self.outer[name]}/24 dev eth0",
                f"route add default via {gateways[name]}",
            )
        self.server = TurnServer(middle, {4: gateways["A"]}, directory)

    def block(self) -> None:
        """Let no UDP pass from one to the other."""
        assert self.middle is not None
        self.middle.run(["nft", "-f", "-"], input=_BLOCK)


@dataclass(frozen=True)
class Relayed(Martlet):
    """Martlet with a relay of A's, and no other way."""

    transport: str = ""

    @contextmanager
    def up(self, ground: Ground) -> Iterator[Running]:
        assert isinstance(ground, Middle)
        ground.block()
        with super().up(ground) as running:
            yield running

    def settings(self, ground: Ground, name: str) -> str:
        assert isinstance(ground, Middle)
        if name != "A":
            return ""
        secure = self.transport == "tls"
        return ground.server.toml(
            ground.server.url(secure=secure, transport="" if secure else self.transport)
        )

    def environment(self, ground: Ground) -> dict[str, str]:
        assert isinstance(ground, Middle)
        return ground.server.environment


def measure(
    ground: Middle, running: Running, name: str, before: Round | None, *, seconds: float
) -> dict[str, float | None]:
    """One tunnel in one round."""
    idle, first = quiet(running.pids, partial(ground.ping, running.target, _PINGS))

    def upload() -> tuple[Stream, float]:
        with Meter([ground.server.pid]) as meter:
            stream = ground.tcp(running.target, seconds)
        return stream, meter.use.tunnel

    (there, server), second = quiet(running.pids, upload)
    back, third = quiet(running.pids, partial(ground.tcp, running.target, seconds, reverse=True))
    with ground.uploading(running.target, _PING_TIME):
        time.sleep(0.7)
        loaded = ground.ping(running.target, _PINGS)
    octets = there.octets / 1e9
    found: dict[str, float | None] = {
        "tcp_ab": there.mbit,
        "tcp_ba": back.mbit,
        "cpu": ratio(second.tunnel, octets),
        "cpu_server": ratio(server, octets) if name != DIRECT else None,
        "rtt": statistics.median(idle),
        "rtt_p99": quantile(idle, 0.99),
        "loaded": statistics.median(loaded),
        "loaded_p99": quantile(loaded, 0.99),
        "disturbed": first.disturbed + second.disturbed + third.disturbed,
        "retransmits": there.retransmits,
        "retransmits_ba": back.retransmits,
    }
    run.note("  " + run.brief(ROWS, found))
    return found


def with_shares(measured: dict[str, list[Round]]) -> dict[str, list[Round]]:
    """The same with what compares each relay with the direct path, by the medians of that."""
    base = measured.get(DIRECT, [])
    if not base:
        return measured
    direct = {
        key: statistics.median([value for one in base if (value := one.get(key)) is not None])
        for key in ("tcp_ab", "tcp_ba", "rtt")
    }

    def compared(one: Round) -> Round:
        found = dict(one)
        for key in ("ab", "ba"):
            share = ratio(one.get(f"tcp_{key}"), direct[f"tcp_{key}"])
            found[f"share_{key}"] = None if share is None else share * 100
        rtt = one.get("rtt")
        found["added"] = None if rtt is None else rtt - direct["rtt"]
        return found

    return {
        name: [compared(one) for one in rounds] if name != DIRECT else rounds
        for name, rounds in measured.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Run all rounds, print the table, write the raw values."""
    parser = run.parser("relay", "What a relay costs.", rounds=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each TCP run; default 5")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    options = parser.parse_args(arguments)
    if not run.ready("ip", "nft", "iperf3", "ping", "ss", "turnserver"):
        return 4
    candidates: list[Tunnel] = [Martlet(name=DIRECT)]
    candidates += [Relayed(name=each, transport=each) for each in options.transports]
    inside = partial(measure, seconds=options.seconds)
    measured, failed = run.in_turns(candidates, options.rounds, Middle, inside)
    text = table(ROWS, with_shares(measured), DIRECT, [])
    return run.publish(options, candidates, measured, failed, text)
