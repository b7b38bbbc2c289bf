"""Keystrokes through a real ssh session: `python -m cli.demo.session --out FILE -- ssh ... cat`.

Types a numbered line every 20 ms into the program, whose other end echoes it, and records when
each left and when its echo came back (`cli.demo.trace`). Ends with the program, or ends it on
SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path

from cli.demo.trace import TraceWriter

SPACING = 0.02  # seconds: fast typing, slow enough to be no load
_BACKLOG = 65536  # bytes of typed lines kept while the program does not read


def type_into(argv: list[str], out: Path, spacing: float) -> int:
    """Run the program and type until it ends; returns its exit code."""
    with out.open("wb") as file:
        writer = TraceWriter(file)
        program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert program.stdin is not None and program.stdout is not None
        signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        keyboard, screen = program.stdin.fileno(), program.stdout.fileno()
        os.set_blocking(keyboard, False)
        os.set_blocking(screen, False)
        stamps: dict[int, float] = {}
        typed, shown = bytearray(), bytearray()
        number = 0
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= due and len(typed) < _BACKLOG:
                typed += b"%d\n" % number
                stamps[number] = now
                writer.sent(number, now)
                writer.flush()
                number += 1
            while due <= now:
                due += spacing
            if typed:
                try:
                    del typed[: os.write(keyboard, typed)]
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    break
            if screen in select.select([screen], [], [], max(0.0, due - time.monotonic()))[0]:
                data = os.read(screen, 65536)
                if not data:
                    break
                shown += data
                now = time.monotonic()
                *lines, rest = bytes(shown).split(b"\n")
                shown[:] = rest
                for line in lines:
                    with contextlib.suppress(ValueError, KeyError):
                        echoed = int(line)
                        writer.arrived(echoed, stamps.pop(echoed), now)
                writer.flush()
        code = program.wait()
        writer.ended(code, time.monotonic())
        return code


def main(arguments: list[str] | None = None) -> int:
    """Run until the program ends."""
    parser = argparse.ArgumentParser(prog="python -m cli.demo.session")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spacing", type=float, default=SPACING)
    parser.add_argument("argv", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    return type_into(argv, options.out, options.spacing)


if __name__ == "__main__":
    raise SystemExit(main())
