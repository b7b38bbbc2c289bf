"""Rows in which an end is away for long: how soon traffic flows when it is back.

Figures are times from the return to the first packet that was *sent* after it and arrived: what
the kernel kept in its queues all the time proves nothing. For the ssh session it is the first
echo.
"""

from __future__ import annotations

import signal
import time

from bench.acts import Mover
from bench.bed import HOSTS, Bed
from bench.roam.runs import Cell, Run, Settings, Watched, ms, named
from cli.demo.events import at_once, forget_nat
from cli.demo.world import World

_PATIENCE = 20.0  # seconds after the return


def suspend(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """Both processes are stopped for a while; meanwhile the NATs forget them, or not."""
    run = Run()
    bed.warm()
    watched = Watched(bed)
    begin = time.monotonic()
    for process in bed.pair.processes.values():
        process.send_signal(signal.SIGSTOP)
    time.sleep(settings.suspend)
    if cell.variant == "NATs forget":
        for host in HOSTS:
            for uplink in bed.world.hosts[host].uplinks:
                forget_nat(bed.world, host, uplink.index)
    back = time.monotonic()
    for process in bed.pair.processes.values():
        process.send_signal(signal.SIGCONT)
    _returned(bed, run, watched, cell.mover, begin, back)
    run.moved = None  # nothing has to
    return run


def outage(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """All uplinks of the moving end go down; after a while one is back."""
    run = Run()
    assert cell.mover != "both"
    host, world = cell.mover, bed.world
    watched = Watched(bed)
    down = at_once(*(lambda at=at: world.switch_interface(host, at) for at in (0, 1)))
    time.sleep(settings.outage)
    up = world.restore_interface(host, 0)
    time.sleep(0.01)  # the announcement is on its way
    back = bed.kernels[host].first("default route", up.begin) or up.end
    _returned(bed, run, watched, cell.mover, down.begin, back)
    run.moved = None
    run.recovered = bed.settle(World.restore_interface(world, host, 1).end) and run.recovered
    return run


def _returned(
    bed: Bed, run: Run, watched: Watched, mover: Mover, begin: float, back: float
) -> None:
    """Wait until all flows again, and put the times since the return into the run's figures."""
    run.recovered = bed.settle(time.monotonic(), _PATIENCE)
    away = back - begin
    watched.end(run, mover, begin, patience=away + _PATIENCE)
    run.event_ms = ms(away)
    for direction, trace in zip(("b_to_a", "a_to_b"), bed.probe.traces(back), strict=True):
        way = named(direction, mover)
        run.detail[way]["gap_ms"] = run.figures[way]
        arrived = (one.time for one in trace.arrivals if one.sent >= back)
        first = next(arrived, None)
        run.figures[way] = None if first is None else ms(first - back)
    echoes = (one.time for one in bed.session.trace(back).arrivals if one.time >= back)
    echo = next(echoes, None)
    run.figures["ssh"] = None if echo is None else ms(echo - back)
