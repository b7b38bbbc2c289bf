"""Random events, one after the other, under an ssh session, a TCP stream and a UDP flow.

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

A drill is one event at one end or at both, on the uplink of the active path, taken back after a
moment where there is something to take back. Then everything must flow again within a bound: a
keystroke every 20 ms and its echo, 5 Mbit/s of TCP, 200 small UDP packets a second each way. If it
does not, the bed is kept and the drills go on with a fresh one. What happens in drill number N
follows from the seed and N alone: `--seed S --first N --drills 1` is that drill again.

    ./dev bench drills [--drills 1000] [--seed S]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from bench import acts
from bench.acts import Mover, Turn
from bench.bed import STEADY, Bed, Mode
from bench.figures import quantile
from bench.options import PROGRAMS, Failures, add_network_options, network, plain
from bench.roam.runs import ms
from bench.run import machine, note, ready
from cli.demo.events import at_once, forget_nat, set_metric
from cli.demo.world import World

_BEFORE = 0.2  # seconds of calm before an event that belong to its window
_LANDING = 0.15  # seconds that the last probes of a window have to arrive and be recorded
_STREAM = 5.0  # Mbit/s
_RING = 200_000_000  # bytes of capture
_WRITE = 20  # drills between two writes of the results
_TRIES = 3  # beds in a row that do not come up
_STEP = 100  # between the metrics of two uplinks
_MOVERS: tuple[Mover, ...] = ("A", "B", "both")


@dataclass(frozen=True)
class Drill:
    """What happens: `hold` is how long it stays so, seconds."""

    number: int
    event: str
    mover: Mover
    variant: str
    hold: float

    @classmethod
    def drawn(cls, seed: int, number: int) -> Drill:
        """The drill that follows from a seed and a number."""
        rng = Random(f"{seed}/{number}")
        event = rng.choice(sorted(EVENTS))
        variants, longest = EVENTS[event].variants, EVENTS[event].longest
        mover = rng.choice(_MOVERS)
        variant = rng.choice(variants)
        return cls(number, event, mover, variant, round(rng.uniform(0.0, longest), 2))


@dataclass(frozen=True)
class Event:
    """How it begins and how it is taken back, the variants there are, and the longest hold."""

    begin: Callable[[Turn], object]
    back: Callable[[Turn], object] | None = None
    variants: tuple[str, ...] = ("",)
    longest: float = 0.0


def _stop(turn: Turn) -> None:
    for host in turn.uplinks:
        turn.bed.pair.processes[host].send_signal(signal.SIGSTOP)


def _resume(turn: Turn) -> None:
    for host in turn.uplinks:
        if turn.variant == "NATs forget":
            for index in (0, 1):
                forget_nat(turn.bed.world, host, index)
        turn.bed.pair.processes[host].send_signal(signal.SIGCONT)


def _all(act: acts.OnHost, turn: Turn) -> None:
    """On all uplinks of the moving ends."""
    at_once(*(partial(act, turn.bed.world, host, at) for host in turn.uplinks for at in (0, 1)))


def _swap_metrics(turn: Turn) -> None:
    """The uplink that the routes prefer becomes the less wanted one. No two routes may have one
    metric: setting the second would replace the first.
    """
    for host in turn.uplinks:
        better, other = sorted(turn.bed.world.hosts[host].uplinks, key=lambda one: one.metric)
        set_metric(turn.bed.world, host, better.index, other.metric + _STEP)


EVENTS: dict[str, Event] = {
    "link-down": Event(acts.link_down, acts.link_up, longest=2.0),
    "black-hole": Event(acts.black_hole, acts.heal, longest=2.0),
    "rebind": Event(acts.rebind, variants=("port", "address")),
    "address": Event(acts.change_address),
    "suspend": Event(_stop, _resume, ("NATs keep", "NATs forget"), longest=4.0),
    "outage": Event(
        partial(_all, World.switch_interface), partial(_all, World.restore_interface), longest=4.0
    ),
    "metric": Event(_swap_metrics),
}


@dataclass
class Done:
    """A drill that was made: gaps in ms beyond the spacing of each flow, what it lost, and which
    flows did not flow within the bound. `dead`: the ssh session ended.
    """

    drill: Drill
    gaps_ms: dict[str, float] = field(default_factory=dict)
    lost: int = 0
    stuck: list[str] = field(default_factory=list)
    dead: bool = False
    took_s: float = 0.0
    kept: str = ""

    @property
    def failed(self) -> bool:
        """Whether the bed is of no more use."""
        return self.dead or bool(self.stuck)

    def line(self, seed: int) -> str:
        """For whoever looks on."""
        drill = self.drill
        what = f"{drill.event} {drill.mover} {drill.variant}".rstrip()
        gaps = "  ".join(f"{flow} {gap:6.0f}" for flow, gap in self.gaps_ms.items())
        end = ""
        if self.failed:
            end = f"  STUCK: {', '.join(self.stuck)}" + (" (session dead)" if self.dead else "")
        return f"{seed}/{drill.number:<5} {what:32} {drill.hold:5.2f} s  gaps ms: {gaps}{end}"


def perform(bed: Bed, drill: Drill, bound: float) -> Done:
    """One drill on a bed where everything flows."""
    done = Done(drill)
    event = EVENTS[drill.event]
    turn = Turn.now(bed, drill.mover, drill.variant)
    begin = time.monotonic()
    event.begin(turn)
    if event.back is not None:
        time.sleep(drill.hold)
        event.back(turn)
    back = time.monotonic()
    if not bed.settle(back, bound + STEADY):
        done.stuck = bed.stuck(time.monotonic()) or ["unsteady"]
        done.dead = bed.session.closed()
    end = time.monotonic()
    time.sleep(_LANDING + bed.network.rtt)
    reports = bed.probe.report(begin - _BEFORE, end)
    done.lost = sum(report.lost for report in reports.values())
    done.gaps_ms = {
        "A>B": ms(reports["a_to_b"].gap),
        "B>A": ms(reports["b_to_a"].gap),
        "ssh": ms(bed.session.report(begin - _BEFORE, end).gap),
    }
    if bed.stream is not None:
        done.gaps_ms["TCP"] = ms(bed.stream.report(begin - _BEFORE, end).gap)
    done.took_s = round(end - begin, 2)
    return done


def summary(done: list[Done]) -> dict[str, Any]:
    """By event, the worst gaps; and what went wrong."""
    events: dict[str, dict[str, Any]] = {}
    for event in EVENTS:
        mine = [one for one in done if one.drill.event == event]
        if not mine:
            continue
        beyond = [max(one.gaps_ms["A>B"], one.gaps_ms["B>A"]) for one in mine]
        events[event] = {
            "drills": len(mine),
            "p95_ms": quantile(beyond, 0.95),
            "max_ms": max(beyond),
            "failed": sum(one.failed for one in mine),
        }
    return {
        "drills": len(done),
        "dead_sessions": sum(one.dead for one in done),
        "stuck_flows": dict(Counter(flow for one in done for flow in one.stuck)),
        "events": events,
    }


def _course(
    options: argparse.Namespace, seed: int, done: list[Done], write: Callable[[], None]
) -> None:
    last = options.first + options.drills
    number, tries = options.first, 0
    mode: Mode = options.redundancy
    while number < last and tries < _TRIES:
        bed = Bed("drills", network(options), mode, ring=_RING)
        began = number
        try:
            with bed:
                bed.up(stream=_STREAM)
                while number < last and not bed.failed:
                    one = perform(bed, Drill.drawn(seed, number), options.bound)
                    number += 1
                    done.append(one)
                    bed.failed = one.failed
                    one.kept = str(bed.directory) if one.failed else ""
                    print(one.line(seed), flush=True)
                    if number % _WRITE == 0:
                        write()
        except Failures as error:
            note(f"{seed}/{number}: {type(error).__name__}: {error}")
        if bed.failed:
            note(f"what happened is in {bed.directory}")
        tries = tries + 1 if number == began else 0


def main(arguments: list[str]) -> int:
    """Drill; 0 when nothing died and nothing stuck."""
    parser = argparse.ArgumentParser(
        prog="./dev bench drills", description="Random events; does everything flow again?"
    )
    parser.add_argument("--drills", type=int, default=1000, help="default 1000")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with drill N")
    parser.add_argument(
        "--bound", type=float, default=5.0, metavar="S", help="until everything flows, default 5"
    )
    parser.add_argument("--redundancy", choices=("off", "interactive"), default="interactive")
    add_network_options(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts/drills.json"))
    options = parser.parse_args(arguments)
    if not ready(*PROGRAMS):
        return 4 if os.geteuid() else 1
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    done: list[Done] = []
    started = machine()

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": plain(options),
            "seed": seed,
            "machine": started,
            "summary": summary(done),
            "drills": [asdict(one) for one in done],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    try:
        _course(options, seed, done, write)
    except KeyboardInterrupt:
        note("interrupted")
    finally:
        write()
        found = summary(done)
        print(
            f"seed {seed}: {found['drills']} drills, {found['dead_sessions']} dead sessions,"
            f" stuck flows: {found['stuck_flows'] or 'none'}"
        )
        note(f"raw values: {options.out}")
    return 1 if len(done) < options.drills or any(one.failed for one in done) else 0
