"""Traffic through the simulated tunnel, and what an application would say about it."""

from __future__ import annotations

import itertools
from bisect import bisect_left

from tests.sim.world import World, number_of, numbered

SPACING = 0.005
"""Seconds between probes: 200 a second each way, as in the roaming matrix."""


class Flow:
    """Numbered packets from one host to the other at a fixed spacing, until `stop`."""

    def __init__(
        self,
        world: World,
        sender: str,
        *,
        spacing: float = SPACING,
        size: int = 64,
        flow: int = 1,
    ) -> None:
        self.world, self.sender, self.spacing, self.size, self.flow = (
            world,
            sender,
            spacing,
            size,
            flow,
        )
        self.receiver = "b" if sender == "a" else "a"
        self.sent: list[float] = []  # when, by number
        self.running = True
        self._arrivals: list[tuple[float, int]] = []
        self._read = 0  # of the receiver's packets
        self._tick()

    def stop(self) -> None:
        self.running = False

    def _tick(self) -> None:
        if not self.running:
            return
        packet = numbered(self.sender, len(self.sent), size=self.size, flow=self.flow)
        self.sent.append(self.world.now)
        self.world.send(self.sender, packet)
        self.world.after(self.spacing, self._tick)

    def arrivals(self) -> list[tuple[float, int]]:
        """When each packet of this flow came out of the other TUN, and its number."""
        received = self.world.hosts[self.receiver].received
        port = (5000 + self.flow).to_bytes(2)
        self._arrivals += [
            (when, number_of(packet))
            for when, packet in received[self._read :]
            if packet[20:22] == port
        ]
        self._read = len(received)
        return self._arrivals

    def silence(self, since: float) -> float:
        """The longest silence beyond the spacing from the last arrival before `since` until now."""
        times = [when for when, _ in self.arrivals()]
        times = [*times[max(0, bisect_left(times, since) - 1) :], self.world.now]
        steps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return max(steps, default=float("inf")) - self.spacing

    def delivered(self) -> set[int]:
        """The numbers that arrived."""
        return {number for _, number in self.arrivals()}

    def lost(self, since: float = 0.0, until: float = float("inf")) -> list[int]:
        """Numbers sent in that time that never arrived."""
        delivered = self.delivered()
        return [n for n, at in enumerate(self.sent) if since <= at < until and n not in delivered]

    @property
    def duplicated(self) -> int:
        """Packets that arrived more than once."""
        arrivals = self.arrivals()
        return len(arrivals) - len({number for _, number in arrivals})

    def alive(self, since: float) -> bool:
        """Whether a packet sent after `since` arrived."""
        for when, number in reversed(self.arrivals()):
            if when < since:
                return False
            if self.sent[number] >= since:
                return True
        return False
