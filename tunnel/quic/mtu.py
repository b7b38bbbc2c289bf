"""How large a packet a path carries: packetization-layer path MTU discovery (RFC 8899).

Sizes are bytes of UDP payload. A path begins at the base size, which the padded handshake or path
validation has shown it to carry (RFC 9000 section 14.1), and is asked at once for all that the
local link takes: on most paths that one probe is the whole search. Otherwise sizes in between are
asked for. A lost probe is no verdict: it only sends the search below that size, and once the
search is narrow the smallest lost size is asked for again. Only MAX_PROBES losses of that one
size end the search, so that a wide search costs few probes and a lossy path still finds its size.

    BASE             the size in use has failed: the base size is probed
    ERROR            the base size has failed too: it is probed again, slowly
    SEARCHING        the base size or more is confirmed, larger sizes are probed
    SEARCH_COMPLETE  nothing to ask, until the raise timer or a doubt (RFC 8899 section 5.2)

Data is sent at the confirmed size in all of them, and never below the base size, which is the
smallest that QUIC allows: a path in ERROR is not usable, and liveness will say so.
"""

from enum import Enum

MAX_PROBES = 3
"""Losses of one size in a row that mean it does not fit (RFC 8899 section 5.1.2)."""
GRANULARITY = 16
"""Bytes that may remain unused: 1% of a packet is worth no further probe."""
RAISE_DELAY = 600.0
"""Seconds until a larger size is tried again (PMTU_RAISE_TIMER, RFC 8899 section 5.1.1)."""
FRUITLESS_DELAY = 15.0
"""Seconds, doubled each time up to RAISE_DELAY, after a search that confirmed nothing: that is
more often an outage than a path whose MTU is the smallest one."""
RETRY_DELAY = 1.0
"""Seconds, doubled each time, until a lost size is asked for again, so that one burst of loss
does not take all its probes (the least PROBE_TIMER of RFC 8899 section 5.1.1)."""
PROBE_TIMEOUT = 15.0
"""Seconds until a probe that nobody reported about counts as lost, and the longest wait between
two probes of the base size (the default PROBE_TIMER of RFC 8899 section 5.1.1)."""
BLACK_HOLE_LOSSES = 6
"""Full-size packets lost in a row, none acknowledged, that mean they do not fit (RFC 8899 section
4.3). Congestion seldom drops so many of one sender in a row; being wrong costs two round trips."""
COMMON_SIZES = (1252, 1372, 1392, 1412, 1432, 1452, 1464, 1472)
"""What links of 1280, 1400, 1420 (WireGuard), 1440, 1460 (clouds), 1480 (IP in IP), 1492 (PPPoE)
and 1500 bytes leave under IPv4; IPv6 leaves 20 less, which is within GRANULARITY of another."""


class MtuState(Enum):
    BASE = "base"
    ERROR = "error"
    SEARCHING = "searching"
    SEARCH_COMPLETE = "search complete"


TRANSITIONS: dict[MtuState, frozenset[MtuState]] = {
    MtuState.BASE: frozenset({MtuState.BASE, MtuState.ERROR, MtuState.SEARCHING}),
    MtuState.ERROR: frozenset({MtuState.ERROR, MtuState.BASE, MtuState.SEARCHING}),
    MtuState.SEARCHING: frozenset({MtuState.SEARCHING, MtuState.SEARCH_COMPLETE, MtuState.BASE}),
    MtuState.SEARCH_COMPLETE: frozenset(
        {MtuState.SEARCH_COMPLETE, MtuState.SEARCHING, MtuState.BASE}
    ),
}


class PathMtu:
    """The size of one path. `size` is what its packets may have; all else asks for probes."""

    def __init__(self, *, base: int = 1200, ceiling: int) -> None:
        """`ceiling` is what the local link takes; one below `base` counts as `base`."""
        self.base = base
        self.ceiling = max(base, ceiling)
        self.size = base
        self.state = MtuState.SEARCHING
        self._top = self.ceiling  # the largest size that this search asks for
        # Sizes above `size` whose probes were lost: how many in a row, and when the last one was.
        self._lost: dict[int, tuple[int, float]] = {}
        self._tries = 0  # probes of the base or confirmed size lost in a row
        self._confirming = False
        self._fruitless = 0  # searches in a row that confirmed nothing
        self._outstanding: int | None = None
        self._sent_at = 0.0
        # The next probe and when. Its first time is the past: there was no `now` yet.
        self._next: int | None = None
        self._at = 0.0
        self._plan(0.0)

    # what the connection asks

    def probe_due(self, now: float) -> int | None:
        """The size to probe now, if any. Nothing is due while a probe is outstanding."""
        if self._outstanding is not None and now >= self._sent_at + PROBE_TIMEOUT:
            self.lost(self._outstanding, now)
        if self._outstanding is None and self._next is not None and now >= self._at:
            return self._next
        return None

    def next_at(self) -> float | None:
        """When `probe_due` may next have an answer, perhaps in the past; None: not by itself."""
        if self._outstanding is not None:
            return self._sent_at + PROBE_TIMEOUT
        return None if self._next is None else self._at

    # what the connection reports

    def probe_sent(self, size: int, now: float) -> None:
        self._outstanding = size
        self._sent_at = now
        if self.state is MtuState.SEARCH_COMPLETE and size > self.size:
            # The raise timer: what did not fit then may fit now.
            self._lost.clear()
            self._top = self.ceiling
            self._enter(MtuState.SEARCHING)

    def acknowledged(self, size: int, now: float) -> None:
        """A probe of `size` arrived; one may arrive after it was declared lost."""
        if size == self._outstanding:
            self._outstanding = None
        elif size not in self._lost:
            return  # sent before what is now known to have changed
        if self.state in (MtuState.BASE, MtuState.ERROR):
            self._enter(MtuState.SEARCHING)
        elif self._confirming:
            if size < self.size:
                return
            self._enter(MtuState.SEARCHING)
        self._confirming = False
        self._tries = 0
        if size > self.size:
            self.size = size
            self._fruitless = 0
            self._lost = {other: loss for other, loss in self._lost.items() if other > size}
            self._enter(MtuState.SEARCHING)
        self._plan(now)

    def lost(self, size: int, now: float) -> None:
        """The probe of `size` was declared lost. Says nothing about congestion (RFC 8899
        section 3)."""
        if size != self._outstanding:
            return
        self._outstanding = None
        if size > self.size:
            count, _ = self._lost.get(size, (0, now))
            self._lost[size] = (count + 1, now)
            self._plan(now)
            return
        if not self._confirming:
            self._base_lost(now)
            return
        self._tries += 1
        if self._tries >= MAX_PROBES:
            self._black_hole(now)
        else:
            self._plan(now)

    def refused(self, now: float, size: int | None = None) -> None:
        """The socket refused a packet of `size` as too large for the link (EMSGSIZE).

        Without `size` it was the outstanding probe where there is one above the confirmed size:
        where it was data after all, the next refusal tells.
        """
        probe = self._outstanding
        if size is None:
            size = self.size if probe is None else max(probe, self.size)
        if size > max(self._top, self.size):
            return  # an echo from before: this search does not go there
        if probe is not None and probe >= size:
            self._outstanding = None
        if size <= self.base:
            self._base_refused(probe, now)
            return
        if size <= self.size:
            self.size = self.base
            self._confirming = False
            self._enter(MtuState.SEARCHING)
        self._lost = {other: loss for other, loss in self._lost.items() if other < size}
        self._lost[size] = (MAX_PROBES, now)  # the link is sure: no second try
        if self._outstanding is None:
            self._plan(now)

    def large_lost(self, count: int, now: float) -> None:
        """`count` packets of full size were lost in a row, none acknowledged in between.

        Begin counting anew whenever `size` changes: losses of a larger size say nothing of this.
        """
        if count >= BLACK_HOLE_LOSSES and self.size > self.base:
            self._black_hole(now)

    def revalidate(self, now: float) -> None:
        """The path is newly in use, or the network under it has changed.

        The size stays in use, and is confirmed by a probe; then larger ones are tried.
        """
        self._outstanding = None
        self._lost.clear()
        self._top = self.ceiling
        self._tries = 0
        self._fruitless = 0
        self._doubt()
        self._plan(now)

    def inherit(self, other: "PathMtu") -> None:
        """Begin with what was found on a path of most likely the same links, and confirm it."""
        self.size = max(self.base, min(other.size, self.ceiling))
        self._outstanding = None
        self._top = min(self.ceiling, max(other._top, self.size))
        self._lost = {
            size: loss for size, loss in other._lost.items() if self.size < size <= self._top
        }
        self._tries = 0
        self._fruitless = 0
        self.state = MtuState.SEARCHING  # other's may be ERROR, which is no property of the links
        self._doubt()
        self._plan(0.0)

    # below

    def _enter(self, state: MtuState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"no way from {self.state.value} to {state.value}")
        self.state = state

    def _doubt(self) -> None:
        """Confirm the size; the base size needs none, where nothing was said against it."""
        self._confirming = False
        if self.state in (MtuState.BASE, MtuState.ERROR):
            self._enter(MtuState.BASE)
        elif self.size > self.base:
            self._confirming = True
        else:
            self._enter(MtuState.SEARCHING)

    def _base_refused(self, probe: int | None, now: float) -> None:
        if self.state in (MtuState.BASE, MtuState.ERROR):
            if probe == self.base:
                self._outstanding = None
                self._base_lost(now)
            return
        # Perhaps only the echo of larger ones, refused just before: the base probe tells.
        self.size = self.base
        self._outstanding = None
        self._confirming = False
        self._tries = 0
        self._enter(MtuState.BASE)
        self._plan(now)

    def _base_lost(self, now: float) -> None:
        self._tries += 1
        if self.state is MtuState.BASE and self._tries >= MAX_PROBES:
            self._enter(MtuState.ERROR)
        self._plan(now)

    def _black_hole(self, now: float) -> None:
        """Packets of the confirmed size do not arrive: back to base, then search up to it.

        The old size is the first that is asked for, because an outage looks the same.
        """
        self._top = self.size
        self.size = self.base
        self._outstanding = None
        self._lost.clear()
        self._confirming = False
        self._tries = 0
        self._enter(MtuState.BASE)
        self._plan(now)

    def _plan(self, now: float) -> None:
        """Set the next probe."""
        if self._confirming or self.state in (MtuState.BASE, MtuState.ERROR):
            self._next = self.size
            self._at = now
            if self._tries:
                self._at += min(RETRY_DELAY * 2.0 ** min(self._tries - 1, 16), PROBE_TIMEOUT)
            return
        if self.state is MtuState.SEARCH_COMPLETE:
            return  # a late report: the raise timer runs on
        self._next, self._at = self._candidate(now)
        if self._next is None:
            self._enter(MtuState.SEARCH_COMPLETE)
            if self.size < self.ceiling:
                self._next = self.ceiling
                self._at = now + self._raise_delay()

    def _candidate(self, now: float) -> tuple[int | None, float]:
        """What the search asks for next, and when; None when it is done."""
        if not self._lost:
            return (self._top if self._top > self.size else None), now
        upper = min(self._lost)
        count, at = self._lost[upper]
        if upper - self.size > GRANULARITY:
            common = [size for size in COMMON_SIZES if self.size < size < upper]
            return (common[len(common) // 2] if common else (self.size + upper) // 2), now
        if count >= MAX_PROBES:
            return None, now
        return upper, max(now, at + RETRY_DELAY * 2.0 ** (count - 1))

    def _raise_delay(self) -> float:
        if self.size > self.base:
            return RAISE_DELAY
        self._fruitless += 1
        return min(FRUITLESS_DELAY * 2.0 ** min(self._fruitless - 1, 16), RAISE_DELAY)
