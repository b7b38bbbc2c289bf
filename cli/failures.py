"""Exceptions to what a user is told, and to the exit code: in one place."""

from __future__ import annotations

import os

from tun.errors import TunError
from tunnel.errors import MartletError

OK, FAILED, USAGE, CONFIGURATION, PRIVILEGE, UNREACHABLE = range(6)
"""The exit codes of the contract (docs/architecture.md)."""

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_TUN_EXIT_CODES = {"privilege": PRIVILEGE, "name": CONFIGURATION, "default_route": CONFIGURATION}


class UsageError(MartletError):
    """The command line does not say enough, or says something that cannot be."""

    exit_code = USAGE


def explain(error: BaseException) -> tuple[str, int]:
    """(what went wrong and what mends it, exit code); "" when there is nothing to say."""
    match error:
        case MartletError():
            return str(error), error.exit_code
        case TunError():
            return str(error), _TUN_EXIT_CODES.get(error.kind, FAILED)
        case KeyboardInterrupt():
            return "", INTERRUPTED
        case BrokenPipeError():
            return "", FAILED  # whoever read our output has seen enough
        case PermissionError():
            return f"{_described(error)}; run as root (sudo)", PRIVILEGE
        case OSError():
            return _described(error), FAILED
        case _:
            kind = type(error).__name__
            return f"internal error: {kind}: {error}; MARTLET_DEBUG=1 shows where", FAILED


def wants_traceback() -> bool:
    """Whether the user is a developer today."""
    return bool(os.environ.get("MARTLET_DEBUG"))


def _described(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
