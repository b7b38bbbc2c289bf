"""Rows in which something new is there: an interface, or the whole tunnel.

expansion   from the kernel's word that the new interface has its address to
            "answered"  the first answer to us on its wire: a STUN success response, or a QUIC
                        packet (kernel timestamps of both)
            "usable"    `status --json` shows a warm path from the new address: checked, at hand
connect     from the first packet that A's daemon sends to anybody, B's being up already (and, if
            they meet by rendezvous, waiting at the broker), to the first packet out of the tunnel
            at either end
"""

from __future__ import annotations

import time
from contextlib import closing

from bench.bed import HOSTS, Bed
from bench.roam.runs import Cell, Run, Settings, Watched, ms
from bench.trial import TRIAL_PORT, trying
from bench.watch import Packets, first_word
from cli.demo.events import forget_nat, remove_interface
from cli.demo.netns import terminate
from cli.demo.pair import INNER, PairError, tail
from cli.demo.world import PORT

_PATIENCE = 3.0  # seconds for a new interface to become a path
_CONNECTED = 15.0  # seconds for the first packet
_POLL = 0.005  # seconds between two questions for the status


def expansion(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """A second interface appears at the moving end, and is pulled out again."""
    run = Run()
    assert cell.mover != "both"
    host, world = cell.mover, bed.world
    local = world.uplink(host, 1).address(bed.network.family)

    def warm() -> bool:
        return any(path["warm"] for path in bed.paths(host) if local in str(path["local"]))

    watched = Watched(bed)
    with closing(Packets(world.hosts[host].space)) as packets:
        happened = world.add_interface(host, 1)
        usable = bed.until(warm, _PATIENCE, _POLL)
        now = time.monotonic()
        begin = bed.kernels[host].last("address", happened.begin) or happened.end
        seen = [one for one in packets.drain() if one.interface == world.uplink(host, 1).interface]
    sent = [one.time for one in seen if one.leaves and one.source == (local, PORT)]
    answers = (one.time for one in seen if not one.leaves and one.is_answer)
    answer = next((when for when in answers if sent and when > sent[0]), None)
    run.recovered = bed.settle(time.monotonic())
    watched.end(run, cell.mover, begin)
    run.detail["gaps_ms"] = {way: run.figures.pop(way) for way in ("from", "toward")}
    run.moved = None  # a second path is there to be had, not to be used
    run.figures["answered"] = None if answer is None else ms(answer - begin)
    run.figures["usable"] = ms(now - begin) if usable else None
    run.detail["first_sent_ms"] = ms(sent[0] - begin) if sent else None
    run.event_ms = ms(happened.end - happened.begin)
    gone = remove_interface(world, host, 1)
    bed.until(lambda: not warm(), _PATIENCE)
    run.recovered = bed.settle(gone.end) and run.recovered
    return run


def connect(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """A's daemon starts while B's is up; before the next run both are ended."""
    run = Run()
    family = bed.network.inner
    ends = {host: bed.world.hosts[host].space for host in HOSTS}
    forget_nat(bed.world, "A", 0)
    before = bed.subscriptions()
    bed.pair.start("B")
    if not bed.until(
        lambda: bool(bed.status("B")) and bed.subscriptions() >= before + bed.rendezvous, _CONNECTED
    ):
        raise PairError(f"the tunnel of B did not start:\n{tail(bed.pair.log('B'))}")
    with (
        closing(Packets(ends["A"], tcp=True)) as packets,
        trying(ends["A"], ends["B"], INNER["B"][family]) as at_b,
        trying(ends["B"], ends["A"], INNER["A"][family]) as at_a,
    ):
        started = time.monotonic()
        bed.pair.start("A")
        run.recovered = bed.until(lambda: bool(at_a and at_b), _CONNECTED)
        spoke = first_word(packets.drain(), TRIAL_PORT)
    for way, arrived in (("A>B", at_b), ("B>A", at_a)):
        run.figures[way] = ms(arrived[0] - spoke) if arrived and spoke else None
        run.detail[way] = {"since_start_ms": ms(arrived[0] - started) if arrived else None}
    terminate(list(bed.pair.processes.values()))
    bed.pair.processes.clear()
    return run
