"""What can happen to one end of a tunnel, or to both at once, on the uplink of the active path.

An `Act` makes it happen; what it changed for longer is taken back by its partner in `BACK`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench.bed import HOSTS, Bed
from cli.demo.events import at_once, remove_interface
from cli.demo.world import Happened, HostName, World

Mover = Literal["A", "B", "both"]
OnHost = Callable[[World, HostName, int], Happened]


@dataclass(frozen=True)
class Turn:
    """One time that something happens: to whom, in which variant, and on which uplinks."""

    bed: Bed
    mover: Mover
    variant: str
    uplinks: dict[HostName, int]

    @classmethod
    def now(cls, bed: Bed, mover: Mover, variant: str = "") -> Turn:
        """On the uplinks that the active paths use at this moment."""
        hosts = HOSTS if mover == "both" else (mover,)
        return cls(bed, mover, variant, {host: bed.active_uplink(host) for host in hosts})

    def each(self, act: OnHost) -> Happened:
        """The act at every moving end, at the same time."""
        acts = [partial(act, self.bed.world, host, at) for host, at in self.uplinks.items()]
        return acts[0]() if len(acts) == 1 else at_once(*acts)


Act = Callable[[Turn], Happened]


def link_down(turn: Turn) -> Happened:
    """The interface goes down."""
    return turn.each(World.switch_interface)


def link_up(turn: Turn) -> Happened:
    """The interface is back."""
    return turn.each(World.restore_interface)


def black_hole(turn: Turn) -> Happened:
    """The wire drops everything, both ways, and tells nobody."""
    return turn.each(World.blackhole)


def heal(turn: Turn) -> Happened:
    """The wire carries again."""
    return turn.each(World.heal)


def rebind(turn: Turn) -> Happened:
    """The NAT's mapping changes, its port or its public address; a port forward only moves to
    another address.
    """
    return turn.each(_rebind_address if turn.variant == "address" else _rebind_port)


def _rebind_port(world: World, host: HostName, index: int) -> Happened:
    return world.rebind_nat(host, index)


def _rebind_address(world: World, host: HostName, index: int) -> Happened:
    return world.rebind_nat(host, index, port=False, address=True)


def change_address(turn: Turn) -> Happened:
    """Another private address on the same link."""
    return turn.each(World.change_address)


def appear(turn: Turn) -> Happened:
    """A better interface appears at the moving end beside the only one that it has."""
    world, ((host, old),) = turn.bed.world, turn.uplinks.items()
    world.uplink(host, 1 - old).metric = world.uplink(host, old).metric - 1
    return world.add_interface(host, 1 - old)


def pull_out(turn: Turn) -> Happened:
    """The interface that went down is taken out for good, so that it can appear again."""
    return turn.each(remove_interface)
