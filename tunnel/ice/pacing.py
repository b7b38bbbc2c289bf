"""Limits of rates: a bucket of tokens that fills with time."""

from __future__ import annotations

_ROUNDING = 1e-6
"""Tokens. At the time that `ready_at` tells, one must be there in spite of rounding."""


class Bucket:
    """`rate` tokens a second, of which up to `burst` are saved."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Take a token, if there is one."""
        self._level = min(self._burst, self._level + max(0.0, now - self._at) * self._rate)
        self._at = now
        if self._level < 1 - _ROUNDING:
            return False
        self._level -= 1
        return True

    def ready_at(self) -> float:
        """When there is a token: not later than now if there is one already."""
        return self._at + max(0.0, 1 - self._level) / self._rate
