"""Time for the shell: a clock that counts suspend, one alarm on it, and a detector of jumps.

Everything below the shell gets `now: float` from `now()`: seconds of CLOCK_BOOTTIME, which is
monotonic and, unlike CLOCK_MONOTONIC, goes on while the machine sleeps (clock_gettime(2)). The
alarm is a timerfd on that same clock: a deadline that passed during a suspend fires at once on
resume, and deadlines are met to some 50 us, where libuv's timers know whole milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from math import inf

HEARTBEAT = 1.0
"""Seconds: the alarm is never armed further ahead than this, so that a stop can be noticed."""

STOPPED_AFTER = 1.0
"""Seconds an alarm may be late before the process counts as stopped. With HEARTBEAT, every stop of
more than 2 s is noticed; one wake-up a second costs about 0.01% of a CPU."""

SUSPENDED_AFTER = 0.1
"""Seconds that CLOCK_BOOTTIME may gain on CLOCK_MONOTONIC before it counts as a suspend. The two
differ by the time asleep only: this is far above any error of reading one after the other."""


def now() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def monotonic() -> float:
    """Seconds of CLOCK_MONOTONIC, which stands still during a suspend."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class JumpDetector:
    """Tells a wake-up after a suspend, or after the process was stopped, from an ordinary one."""

    def __init__(self, boottime: float, monotonic: float) -> None:
        self._asleep = boottime - monotonic

    def observe(self, boottime: float, monotonic: float, deadline: float) -> float | None:
        """Seconds that went missing, or None when time went on as usual.

        To be called first on every wake-up. `deadline` is what the alarm was armed for (`inf`: it
        was not): a wake-up long after it means that nobody let this process run meanwhile.
        """
        asleep = boottime - monotonic
        gained, self._asleep = asleep - self._asleep, asleep
        if gained > SUSPENDED_AFTER:
            return gained
        late = boottime - deadline
        return late if late > STOPPED_AFTER else None


class Alarm:
    """One timerfd on CLOCK_BOOTTIME; its descriptor becomes readable when the deadline has passed.

    `deadline` is the armed time in seconds of `now()`, `inf` when disarmed.
    """

    def __init__(self) -> None:
        descriptor: int = _libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise _error()
        self._fd = descriptor
        self.deadline = inf

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._fd

    def arm(self, deadline: float) -> None:
        """Fire at `deadline`; at once when it has passed; `inf` disarms."""
        if deadline == self.deadline:
            return
        # A zero it_value disarms (timerfd_settime(2)), so a deadline at or before 0 becomes 1 ns.
        nanoseconds = 0 if deadline == inf else max(1, int(deadline * 1e9))
        value = _ItimerSpec(_TimeSpec(0, 0), _TimeSpec(*divmod(nanoseconds, 1_000_000_000)))
        if _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(value), None) < 0:
            raise _error()
        self.deadline = deadline

    def acknowledge(self) -> None:
        """Take note that it fired: clears the descriptor and leaves the alarm disarmed."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
            self.deadline = inf

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _ItimerSpec(ctypes.Structure):
    _fields_ = (("it_interval", _TimeSpec), ("it_value", _TimeSpec))


# timerfd_create is in Python's os module from 3.13 on only.
_libc = ctypes.CDLL(None, use_errno=True)
_TFD_TIMER_ABSTIME = 1  # <sys/timerfd.h>


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
