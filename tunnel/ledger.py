"""Every migration as a record: what set it off, from where to where, and how long each step took.

A migration has four moments, all in monotonic seconds: `at`, when the event happened (as far as it
is known: for a silent path, when the last sign of life came); `detected`, when we knew;
`switched`, when the first packet left on the new path; `confirmed`, when the first packet sent
there was acknowledged. The derived durations are the gaps between them, so they add up.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

LEDGER_SIZE = 1000
"""Records a node keeps: a day of one roaming a minute and a half, in under a megabyte."""


class Trigger(StrEnum):
    """Why a peer moved."""

    ADDRESS_GONE = "address-gone"  # the kernel took our address away
    LINK_DOWN = "link-down"  # the kernel says the interface has no carrier, or is down
    BETTER_ROUTE = "better-route"  # a path that the policy prefers has proven itself
    REBINDING = "rebinding"  # the same host behind a NAT that changed its mapping
    PEER_MOVED = "peer-moved"  # the other end moved, we follow
    SUSPECT = "suspect"  # no acknowledgement progress on the active path
    SEND_FAILED = "send-failed"  # the socket of the active path refused to send
    RESUME = "resume"  # this host was suspended
    NO_PATH = "no-path"  # there was no usable address; this is the first one since
    RESTART = "restart"  # the other end restarted: a new connection took over


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One move of one peer. Paths are written "local>remote", as `str(PathKey)` is."""

    peer: str
    sequence: int
    trigger: Trigger
    from_path: str
    to_path: str
    wall_time: float
    """Unix time of `detected`, for people; never computed with."""
    at: float
    detected: float
    switched: float
    confirmed: float | None = None
    # Known some seconds after the move; 0 until then.
    lost: int = 0
    """Datagrams given up for good."""
    replayed: int = 0
    """Datagrams sent again as copies on the new path."""
    duplicates: int = 0
    """Copies that the other end had already."""

    @property
    def detect_ms(self) -> float:
        """From the event to knowing it."""
        return _ms(self.at, self.detected)

    @property
    def switch_ms(self) -> float:
        """From knowing to the first packet on the new path."""
        return _ms(self.detected, self.switched)

    @property
    def confirm_ms(self) -> float | None:
        """From that packet to its acknowledgement; None while there is none."""
        return None if self.confirmed is None else _ms(self.switched, self.confirmed)

    def to_builtins(self) -> dict[str, Any]:
        """All fields and the derived durations, in types that JSON has."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields | {
            "detect_ms": self.detect_ms,
            "switch_ms": self.switch_ms,
            "confirm_ms": self.confirm_ms,
        }


class Ledger:
    """The newest migrations of a node, oldest first; numbered from 1 in order of recording."""

    def __init__(self, size: int = LEDGER_SIZE) -> None:
        if size < 1:
            raise ValueError("a ledger holds at least one record")
        self._size = size
        self._records: dict[int, Migration] = {}
        self._last = 0
        self._counts: dict[str, int] = {}

    def record(
        self,
        *,
        peer: str,
        trigger: Trigger,
        from_path: str,
        to_path: str,
        wall_time: float,
        at: float,
        detected: float,
        switched: float,
        lost: int = 0,
        replayed: int = 0,
        duplicates: int = 0,
    ) -> Migration:
        """Add a migration, not yet confirmed, and return it with its sequence number."""
        self._last += 1
        migration = Migration(
            peer=peer,
            sequence=self._last,
            trigger=trigger,
            from_path=from_path,
            to_path=to_path,
            wall_time=wall_time,
            at=at,
            detected=detected,
            switched=switched,
            lost=lost,
            replayed=replayed,
            duplicates=duplicates,
        )
        if len(self._records) == self._size:
            del self._records[next(iter(self._records))]
        self._records[self._last] = migration
        self._counts[peer] = self._counts.get(peer, 0) + 1
        return migration

    def confirm(self, sequence: int, at: float) -> None:
        """Note the acknowledgement; only the first counts. A record already dropped is ignored."""
        migration = self._records.get(sequence)
        if migration is not None and migration.confirmed is None:
            self._records[sequence] = msgspec.structs.replace(migration, confirmed=at)

    def add(self, sequence: int, *, lost: int = 0, replayed: int = 0, duplicates: int = 0) -> None:
        """Add to the counts of a migration. A record already dropped is ignored."""
        migration = self._records.get(sequence)
        if migration is not None:
            self._records[sequence] = msgspec.structs.replace(
                migration,
                lost=migration.lost + lost,
                replayed=migration.replayed + replayed,
                duplicates=migration.duplicates + duplicates,
            )

    def get(self, sequence: int) -> Migration | None:
        """The record as it stands now; None when it was dropped or never was."""
        return self._records.get(sequence)

    def count(self, peer: str) -> int:
        """How often a peer moved, dropped records included."""
        return self._counts.get(peer, 0)

    def records(self) -> list[Migration]:
        """Oldest first."""
        return list(self._records.values())

    def to_builtins(self) -> list[dict[str, Any]]:
        """Oldest first, in types that JSON has."""
        return [migration.to_builtins() for migration in self._records.values()]

    def __len__(self) -> int:
        return len(self._records)


def _ms(start: float, end: float) -> float:
    """Milliseconds to the microsecond: what a clock gives, without the noise of floats."""
    return round((end - start) * 1000, 3)
