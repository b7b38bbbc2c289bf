"""One meeting, timed.

B's tunnel is up and waits at the broker; A's is started. The clock begins with the first packet
that A sends to anybody (a question to a STUN server, a SYN to the broker), so that what a Python
program takes to start is not in the figures; `since_start_ms` has that, too. A packet every few
milliseconds tries to pass the tunnel each way: "A>B" and "B>A" are when the first one arrived.
Then the paths are looked at until both ends send directly, or patience ends.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.nat.internet import HOSTS
from bench.nat.place import Place
from bench.trial import TRIAL_PORT, trying
from bench.watch import Packets, first_word
from cli.demo.pair import INNER, PairError, tail
from cli.demo.world import HostName

EVERY = 0.002  # seconds between the packets that try to pass
_LOOK = 0.01  # seconds between two looks at the paths
_COUNTED = 100  # packets that tell which way they really go


@dataclass(frozen=True)
class Settings:
    """delay: of each wire and way. wait: for the first packet. patience: for a direct path, from
    then on. In seconds.
    """

    delay: float = 0.005
    turn: bool = True
    dialled: bool = False
    wait: float = 20.0
    patience: float = 20.0


@dataclass
class Run:
    """What came of a meeting; milliseconds since A's first packet, None: it never came.

    relayed: whether either end's path was relayed when the first packet had passed. direct_ms:
    when both ends sent directly. kinds: of the active paths in the end, as the tunnels call them.
    through_turn: what share of the packets that were then sent through the tunnel passed the TURN
    server's wire.
    """

    first_ms: dict[str, float | None] = field(default_factory=dict)
    since_start_ms: float | None = None
    relayed: bool | None = None
    direct_ms: float | None = None
    kinds: dict[HostName, str] = field(default_factory=dict)
    paths: dict[HostName, list[dict[str, Any]]] = field(default_factory=dict)
    through_turn: float = 0.0

    @property
    def met(self) -> float | None:
        """When packets had passed both ways."""
        times = [when for when in self.first_ms.values() if when is not None]
        return max(times) if len(times) == len(HOSTS) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "met_ms": self.met}


def meet(place: Place, settings: Settings) -> Run:
    """Start both tunnels, and see."""
    run = Run()
    spaces = {host: place.net.hosts[host].space for host in HOSTS}
    if not place.start("B"):
        raise PairError(f"the tunnel of B did not start:\n{tail(place.pair.log('B'))}")
    with (
        closing(Packets(spaces["A"], tcp=True)) as packets,
        trying(spaces["A"], spaces["B"], INNER["B"][4], every=EVERY) as at_b,
        trying(spaces["B"], spaces["A"], INNER["A"][4], every=EVERY) as at_a,
    ):
        started = time.monotonic()
        place.pair.start("A")
        place.until(lambda: bool(at_a and at_b), settings.wait, _LOOK)
        relayed = [place.relayed(host) for host in HOSTS]
        spoke = first_word(packets.drain(), TRIAL_PORT)
    for way, arrived in (("A>B", at_b), ("B>A", at_a)):
        run.first_ms[way] = _ms(arrived[0] - spoke) if arrived and spoke else None
    if spoke is None or run.met is None:
        return run
    run.since_start_ms = _ms(max(at_a[0], at_b[0]) - started)
    run.relayed = any(one is not False for one in relayed)
    if place.until(place.direct, settings.patience, _LOOK):
        run.direct_ms = _ms(time.monotonic() - spoke) if run.relayed else run.met
    for host in HOSTS:
        run.paths[host] = place.paths(host)
        run.kinds[host] = str(place.active(host).get("kind", "-"))
    run.through_turn = _through_turn(place)
    return run


def _through_turn(place: Place) -> float:
    before = place.through_turn()
    ping = ["ping", "-n", "-q", "-i", "0.01", "-c", str(_COUNTED), "-W", "1", INNER["B"][4]]
    place.net.hosts["A"].space.run(ping, check=False)
    # There and back, and each passes the wire to the server and the wire back.
    return round((place.through_turn() - before) / (4 * _COUNTED), 3)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
