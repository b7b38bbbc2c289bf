"""CPU time and memory of a few processes, of the whole machine, and of all that disturbs.

From /proc. User and system time of /proc/PID/stat have all threads in them, also those that have
ended, and their sum is the scheduler's exact run time, given in units of 10 ms; interrupts that the
kernel serves meanwhile are part of it, whoever they are for. The machine's time in /proc/stat is a
count of timer ticks. So a window should be seconds long.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
_KTHREADD = 2  # pid of the parent of all kernel threads


@dataclass(frozen=True)
class Process:
    """A line of /proc/PID/stat."""

    parent: int
    cpu: float  # seconds, user and system, all threads


def parse_stat(line: str) -> Process:
    """From the text of /proc/PID/stat; the program's name may have spaces and brackets in it."""
    fields = line[line.rindex(")") + 2 :].split()
    return Process(int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICK)


def processes() -> dict[int, Process]:
    """Every process of the machine."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):  # it has just ended
                found[int(entry)] = parse_stat(Path("/proc", entry, "stat").read_text())
    return found


def family(roots: Iterable[int], table: dict[int, Process]) -> set[int]:
    """The processes `roots` and all below them."""
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    todo, found = [pid for pid in roots if pid in table], set[int]()
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def machine_seconds(line: str) -> tuple[float, float]:
    """CPU seconds that the machine was busy, and that the host took away ("steal"): from the
    first line of /proc/stat.
    """
    ticks = [int(value) for value in line.split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq) * _TICK, steal * _TICK


@dataclass(frozen=True)
class Use:
    """CPU seconds of a window of time."""

    seconds: float  # length of the window
    tunnel: float
    machine: float  # all of it: the tunnel, iperf3, interrupts, whatever else runs
    foreign: float  # of processes that are neither the tunnel nor started by us
    steal: float

    @property
    def disturbed(self) -> bool:
        """Others took more than 0.15 of a core, or the host more than 5%."""
        return self.foreign > 0.15 * self.seconds or self.steal > 0.05 * self.seconds


class Meter:
    """A context that measures; `use` is its result. `roots` are the pids of the tunnel."""

    use: Use

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots

    def __enter__(self) -> Meter:
        self._before = processes()
        self._machine = _machine()
        self._begin = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._begin
        busy, steal = (new - old for new, old in zip(_machine(), self._machine, strict=True))
        after = processes()
        tunnel = family(self._roots, after)
        kernel = family([_KTHREADD], after)
        ours = family([os.getpid()], after)
        self.use = Use(
            seconds,
            self._spent(tunnel, after),
            busy,
            self._spent(set(after) - tunnel - kernel - ours, after),
            steal,
        )

    def _spent(self, pids: set[int], after: dict[int, Process]) -> float:
        started = Process(0, 0.0)
        return sum(after[pid].cpu - self._before.get(pid, started).cpu for pid in pids)


def quiet(roots: Sequence[int], measure: Callable[[], T]) -> tuple[T, Use]:
    """Measure, and once more when others disturbed it; the quieter one of both."""
    best: tuple[T, Use] | None = None
    for _ in range(2):
        with Meter(roots) as meter:
            got = measure()
        if best is None or meter.use.foreign < best[1].foreign:
            best = got, meter.use
        if not meter.use.disturbed:
            break
    assert best is not None
    return best


def _machine() -> tuple[float, float]:
    with open("/proc/stat") as file:
        return machine_seconds(file.readline())


def reset_peaks(roots: Sequence[int]) -> None:
    """Forget the peak memory of the tunnel's processes so far."""
    for pid in family(roots, processes()):
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(root: int) -> float:
    """MiB that one end had resident at most since `reset_peaks`."""
    total = 0
    for pid in family([root], processes()):
        with suppress(OSError):
            total += peak_kib(Path(f"/proc/{pid}/status").read_text())
    return total / 1024


def peak_kib(status: str) -> int:
    """VmHWM of a /proc/PID/status; 0 for a process that has no memory any more."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) if found else 0
