"""What an agent has to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tunnel.path.network import PathKey


@dataclass(frozen=True, slots=True)
class CandidatesChanged:
    """Our own candidates changed, or a session began: `Agent.candidates()` is for the peer."""


@dataclass(frozen=True, slots=True)
class PairUp:
    """A check of ours was answered on a pair that was not warm."""

    key: PathKey
    rtt: float


@dataclass(frozen=True, slots=True)
class PairAnswered:
    """A check of ours, sent at `asked_at`, was answered on a pair that was warm before."""

    key: PathKey
    asked_at: float
    rtt: float


@dataclass(frozen=True, slots=True)
class PairDown:
    """A pair that was warm is not any more, or one that was to stay warm is gone."""

    key: PathKey
    reason: str


@dataclass(frozen=True, slots=True)
class CheckReceived:
    """The peer asked us on this pair: one direction of it works."""

    key: PathKey


AgentEvent: TypeAlias = CandidatesChanged | PairUp | PairAnswered | PairDown | CheckReceived
