"""`--detach`: a process of its own, in the background, whose start is still ours to report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from tunnel.errors import LocalError

Explain = Callable[[BaseException], tuple[str, int]]
"""What to tell the user of an exception, and the exit code."""


def detach(run: Callable[[Callable[[], None]], None], explain: Explain) -> tuple[str, int] | None:
    """Run `run(ready)` in the background; returns here once it has called `ready()`.

    Returns None then, or what `explain` made of the exception that came instead. The background
    process leaves session and terminal (daemon(7)), and never returns from this call.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.setsid()
            if os.fork() == 0:  # not a session leader any more: it can never get a terminal again
                _background(run, explain, writing)
        finally:
            os._exit(1)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        report = pipe.read()
    if not report:
        raise LocalError("the background process ended without a word", remedy="see its log")
    problem = json.loads(report)
    return None if problem is None else (problem[0], problem[1])


def _background(run: Callable[[Callable[[], None]], None], explain: Explain, report: int) -> None:
    code = 0
    told = False

    def tell(problem: tuple[str, int] | None) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(report, json.dumps(problem).encode())
            os.close(report)

    def ready() -> None:
        _leave_terminal()
        tell(None)

    try:
        run(ready)
    except BaseException as error:
        problem = explain(error)
        code = problem[1]
        tell(problem)
    os._exit(code)


def _leave_terminal() -> None:
    """Only once all is set up: until then relative paths and standard error have a meaning."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
