"""`martlet up`: in the foreground, or in the background with a log of its own."""

from __future__ import annotations

from collections.abc import Callable

from cli import failures, output
from cli.failures import OK
from tunnel.config import Config
from tunnel.shell import log
from tunnel.shell.daemon import detach
from tunnel.shell.loop import run
from tunnel.shell.status import control_directory


def in_foreground(config: Config, log_level: str) -> None:
    """Run the tunnel until it is ended."""
    log.setup(log_level)
    run(config)


def in_background(config: Config, log_level: str = "info") -> int:
    """Start the tunnel, and return once it is up; the exit code."""
    name = config.interface.name
    file = control_directory() / f"{name}.log"

    def background(ready: Callable[[], None]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        log.setup(log_level, file=file)
        run(config, ready=ready)

    problem = detach(background, failures.explain)
    if problem is not None:
        message, code = problem
        output.say(message or "interrupted")
        return code
    output.say(f"tunnel {name} is up in the background, its log is {file}")
    return OK
