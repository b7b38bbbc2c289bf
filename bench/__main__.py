"""`python -m bench NAME [...]`: every measurement is a module or package here with
`main(arguments) -> exit code`.
"""

from __future__ import annotations

import importlib
import signal
import sys

# name -> (module, what it measures). Not the modules' own names: `bench/queue.py` would hide the
# standard library's `queue` from a program that is started inside this folder.
MEASUREMENTS = {
    "throughput": ("throughput", "speed, CPU, latency and memory, beside other tunnels"),
    "loss": ("loss", "one TCP stream over a link that loses packets"),
    "queue": ("standing_queue", "keystrokes beside an upload that fills a slow link"),
    "profile": ("hotspots", "where the tunnel's CPU time goes (perf)"),
    "relay": ("relay", "speed and latency by a TURN server, beside the direct path"),
    "roam": ("roam", "how long traffic is silent when an end moves"),
    "nat": ("nat", "how any two kinds of NAT meet, and how long that takes"),
    "stability": ("stability", "moves that nobody needs, on a path that loses and jitters"),
    "rendezvous": ("rendezvous", "how fast many pairs meet, and what a host costs the broker"),
    "drills": ("drills", "random events, one after the other; does everything flow again?"),
}


def main(arguments: list[str]) -> int:
    """Run the measurement that is named first, with the other arguments."""
    if not arguments or arguments[0] not in MEASUREMENTS:
        print("usage: ./dev bench NAME [...]   (NAME --help says more)\n", file=sys.stderr)
        for name, (_, what) in MEASUREMENTS.items():
            print(f"  {name:11} {what}", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help", "help") else 2
    # As an exception, so that every namespace and process is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    module, _ = MEASUREMENTS[arguments[0]]
    code: int = importlib.import_module(f"bench.{module}").main(arguments[1:])
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
