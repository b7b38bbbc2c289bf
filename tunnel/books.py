"""The books of one peer's moves: each is a record in the ledger, confirmed and counted later."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunnel.events import NodeEvent, PeerMigrated
from tunnel.ledger import Ledger, Trigger
from tunnel.path.network import PathKey

COUNTS_AFTER = 2.5
"""Seconds after a move when what it lost and replayed is counted: nothing older than 2 s is sent
again."""

Counters = Mapping[str, int]
"""Of a connection: `replay_given_up`, `replayed`, `replay_needless`."""


class Books:
    """All times are monotonic seconds; `wall_offset` makes Unix time of them."""

    def __init__(
        self, peer: str, ledger: Ledger, wall_offset: float, emit: Callable[[NodeEvent], None]
    ) -> None:
        self._peer = peer
        self._ledger = ledger
        self._wall_offset = wall_offset
        self._emit = emit
        self._unconfirmed: int | None = None
        self._switched_at = 0.0
        self._counting: tuple[int, float, Counters] | None = None

    def moved(
        self,
        trigger: Trigger,
        old: PathKey,
        new: PathKey,
        counters: Counters,
        *,
        at: float,
        detected: float,
        now: float,
    ) -> None:
        """`at`: when that happened which made the peer move. The move before is counted now."""
        self._close(counters)
        record = self._ledger.record(
            peer=self._peer,
            trigger=trigger,
            from_path=str(old),
            to_path=str(new),
            wall_time=detected + self._wall_offset,
            at=min(at, detected),
            detected=detected,
            switched=now,
        )
        self._unconfirmed, self._switched_at = record.sequence, now
        self._counting = (record.sequence, now, counters)
        self._emit(PeerMigrated(record))

    @property
    def open(self) -> bool:
        """Whether the latest move waits for its first acknowledgement."""
        return self._unconfirmed is not None

    def acknowledged(self, at: float) -> None:
        """The active path's latest progress."""
        if self._unconfirmed is not None and at > self._switched_at:
            self._ledger.confirm(self._unconfirmed, at)
            self._unconfirmed = None

    def due(self) -> float | None:
        """When to `count`."""
        return None if self._counting is None else self._counting[1] + COUNTS_AFTER

    def count(self, counters: Counters, now: float) -> None:
        """Add what the latest move lost and replayed to its record, if it is time."""
        due = self.due()
        if due is not None and now >= due:
            self._close(counters)

    def forget(self) -> None:
        """The connection is gone, and its counters with it."""
        self._unconfirmed = self._counting = None

    def _close(self, after: Counters) -> None:
        if self._counting is None:
            return
        sequence, _, before = self._counting
        self._counting = None
        self._ledger.add(
            sequence,
            lost=after["replay_given_up"] - before["replay_given_up"],
            replayed=after["replayed"] - before["replayed"],
            duplicates=after["replay_needless"] - before["replay_needless"],
        )
