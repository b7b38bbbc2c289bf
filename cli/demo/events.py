"""Events of a world that are more than one step, or belong to no single host.

As with those of `World`: they return when it has happened, with the monotonic times of begin and
end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cli.demo.world import Happened, HostName, World


def at_once(*acts: Callable[[], Happened]) -> Happened:
    """Several events at the same time, as far as two processes of a shared machine can; the first
    error of any is raised.
    """
    happened: list[Happened] = []
    errors: list[BaseException] = []
    ready = threading.Barrier(len(acts))

    def run(act: Callable[[], Happened]) -> None:
        try:
            ready.wait()
            happened.append(act())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Happened(min(one.begin for one in happened), max(one.end for one in happened))


def set_metric(world: World, host: HostName, index: int, metric: int) -> Happened:
    """The default routes of an uplink get another metric; a lower one is preferred."""
    uplink = world.uplink(host, index)
    old = uplink.metric
    uplink.metric = metric
    begin = time.monotonic()
    lines = []
    for family, gateway in uplink.gateways.items():
        lines.append(uplink.default_route(family))  # first: the host is never without a route
        if metric != old:
            route = f"default via {gateway} dev {uplink.interface} metric {old}"
            lines.append(f"route del {route}")
    world.hosts[host].space.batch(*lines)
    return Happened(begin, time.monotonic())


def remove_interface(world: World, host: HostName, index: int) -> Happened:
    """An interface is pulled out; its NAT forgets it. `World.add_interface` plugs it in again."""
    uplink = world.uplink(host, index)
    begin = time.monotonic()
    world.hosts[host].space.batch(f"link del dev {uplink.interface}")
    end = time.monotonic()
    forget_nat(world, host, index)
    return Happened(begin, end)


def forget_nat(world: World, host: HostName, index: int) -> Happened:
    """The mapping of a host that was silent for long expires: the next packet opens a new one on
    another port. A port forward stays, what it knew of flows is forgotten. Plain routing has
    nothing to forget.
    """
    nat = world.uplink(host, index).nat
    begin = time.monotonic()
    if any(world.translates(family, host) for family in world.families):
        nat.rebind(port=not nat.forward)
    return Happened(begin, time.monotonic())
