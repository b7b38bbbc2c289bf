"""The active path may be dead: what is waited for, and when it is left.

Suspicion moves nothing. It starts a race (`tunnel.roaming`) and ends in one of two ways: the path
acknowledges something, and lives; or its time is over while another path has answered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tunnel.ledger import Trigger
from tunnel.path.network import PathKey

MANY_UNANSWERED = 6
"""Packets outstanding at the moment of suspicion from which on it is no accident: at 2% of losses
there and back, six in a row happen once in 15,000 million."""
SECOND_LOOK = 1.5
"""Deadlines that a suspect path gets where fewer are outstanding; it is asked again after half of
one, so that it takes four lost packets to leave a living path."""
DOUBTS = 2
"""How often a suspect path that answers checks, but acknowledges nothing, gets another deadline."""


@dataclass(slots=True)
class Suspicion:
    """Of the active path. Times are monotonic seconds."""

    trigger: Trigger
    since: float
    silent_since: float
    """When that left which should have been answered; for the ledger."""
    verdict_at: float
    """When the path is left, if another has answered and it has not."""
    look_again_at: float | None
    """When it is asked once more, so that two lost packets do not make a move."""
    port_wanted: bool = False
    """A further local port was asked for."""
    answered: dict[PathKey, float] = field(default_factory=dict)
    """Other paths that answered since, and when."""
    _doubts: int = 0

    @classmethod
    def begin(
        cls,
        trigger: Trigger,
        *,
        silent_since: float,
        patience: float,
        outstanding: int,
        now: float,
    ) -> Suspicion:
        """`patience` is the path's deadline, `outstanding` the packets that it owes an answer."""
        # A flow of packets that all stay unanswered is no accident; one or two may be.
        certain = trigger is Trigger.SEND_FAILED or outstanding >= MANY_UNANSWERED
        return cls(
            trigger,
            since=now,
            silent_since=silent_since,
            verdict_at=now + patience * (1.0 if certain else SECOND_LOOK),
            look_again_at=None if certain else now + patience / 2,
        )

    def believe(self) -> None:
        """No doubt is left: whoever answers first is better."""
        self.verdict_at = self.since

    def active_answered(self, patience: float, now: float) -> None:
        """A check, that is, and no packet: it gets another deadline, but not for ever."""
        if self._doubts < DOUBTS and self.trigger is not Trigger.SEND_FAILED:
            self._doubts += 1
            self.verdict_at = max(self.verdict_at, now + patience)

    def due(self, active: PathKey) -> float | None:
        """When the verdict is; None while no other path has answered."""
        self.answered.pop(active, None)
        return self.verdict_at if self.answered else None
