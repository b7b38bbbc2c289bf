"""When the log is told what is in the way of a peer: once, some seconds after it is missed.

Most peers are there within one, and whatever is in the way may be over before anybody has read of
it. Then it is looked at again with growing pauses; what was told already is not told again until
the peer was there in between.
"""

from __future__ import annotations

from collections.abc import Iterable

from tunnel.obstacle import Obstacle

FIRST_LOOK, LAST_PAUSE = 5.0, 60.0
"""Seconds from the loss of a peer to the first look, then between two looks: doubled each time."""


class Teller:
    """Of one peer. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._pause = FIRST_LOOK
        self._told: set[str] = set()

    def missed(self, now: float) -> None:
        """The peer is not there, or not any more."""
        if self._at is None:
            self._pause = FIRST_LOOK
            self._at = now + self._pause
            self._told.clear()

    def found(self) -> None:
        """It is there, or nobody wants it any more."""
        self._at = None

    def get_timer(self) -> float | None:
        return self._at

    def due(self, now: float) -> bool:
        """Whether to look now; the next look is later then."""
        if self._at is None or now < self._at:
            return False
        self._pause = min(2 * self._pause, LAST_PAUSE)
        self._at = now + self._pause
        return True

    def news(self, obstacles: Iterable[Obstacle]) -> list[Obstacle]:
        """Those that were not told yet."""
        new = [obstacle for obstacle in obstacles if obstacle.about not in self._told]
        self._told.update(obstacle.about for obstacle in new)
        return new
