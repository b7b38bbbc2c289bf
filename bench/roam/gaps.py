"""Rows in which traffic is silent for a while: one event, and how long nothing arrives."""

from __future__ import annotations

import time

from bench import acts
from bench.acts import Act, Turn
from bench.bed import HOSTS, Bed
from bench.rival import WireGuardPair
from bench.roam.runs import Cell, Run, Settings, Watched, ms
from cli.demo.world import Happened

_APPEARED = 3.0  # seconds that the tunnel may take to use a better interface
_AT_LEAST = 0.8  # seconds that it is there before the old one goes
_ACTS: dict[str, tuple[Act, Act | None]] = {
    "link-down": (acts.link_down, acts.link_up),
    "black-hole": (acts.black_hole, acts.heal),
    "both": (acts.link_down, acts.link_up),
    "rebind": (acts.rebind, None),
    "address": (acts.change_address, None),
    "both-anew": (acts.change_address, None),
}


def event(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """The event of the row, until all flows again; then it is taken back, and both ends have
    time to warm their second paths.
    """
    run = Run()
    act, back = _ACTS[cell.row]
    warm = bed.warm() if back or cell.row == "rebind" else None
    watched = Watched(bed)
    turn = Turn.now(bed, cell.mover, cell.variant)
    happened = act(turn)
    if isinstance(bed.pair, WireGuardPair) and cell.row != "rebind":
        for host in turn.uplinks:
            bed.pair.kick(host)
    run.recovered = bed.settle(happened.end)
    watched.end(run, cell.mover, happened.begin)
    run.event_ms = ms(happened.end - happened.begin)
    run.detail |= {"uplinks": turn.uplinks, "warm": warm}
    if cell.row in ("address", "both-anew"):
        _usable(bed, run, turn, happened)
    if back is not None:
        run.recovered = bed.settle(back(turn).end) and run.recovered
    return run


def _usable(bed: Bed, run: Run, turn: Turn, happened: Happened) -> None:
    """Take the time without an address out of the figures; `gap_ms` in the details has it."""
    # Where both move, until both can be reached again.
    kernels = [bed.kernels[host] for host in turn.uplinks]
    gone = [kernel.first("no address", happened.begin) for kernel in kernels]
    usable = [kernel.last("default route", happened.begin) for kernel in kernels]
    begins, ends = ([when for when in one if when is not None] for one in (gone, usable))
    without = max(ends) - min(begins) if begins and ends else 0.0
    run.detail["without_address_ms"] = ms(without)
    for way, gap in list(run.figures.items()):
        run.detail[way]["gap_ms"] = gap
        if gap is not None:
            run.figures[way] = round(max(0.0, gap - ms(without)), 3)


def make_before_break(bed: Bed, cell: Cell, settings: Settings) -> Run:
    """A better interface appears; the old one goes when both ends use the new one, or after some
    seconds if they do not.
    """
    run = Run()
    watched = Watched(bed)
    turn = Turn.now(bed, cell.mover)
    before = [bed.active_path(host) for host in HOSTS]
    happened = acts.appear(turn)
    time.sleep(_AT_LEAST)
    used = bed.until(
        lambda: all(bed.active_path(h) != was for h, was in zip(HOSTS, before, strict=True)),
        _APPEARED,
    )
    broken = acts.link_down(turn)
    run.recovered = bed.settle(broken.end)
    watched.end(run, cell.mover, happened.begin)
    run.event_ms = ms(happened.end - happened.begin)
    run.detail |= {"used_before_break": used, "break_at_ms": ms(broken.begin - happened.begin)}
    run.recovered = bed.settle(acts.pull_out(turn).end) and run.recovered
    return run
