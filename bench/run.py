"""What the measurements share: options, rounds in which the tunnels take turns, results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bench import tunnels
from bench.figures import Round, Row, text
from bench.ground import Ground
from bench.tunnels import Running, Tunnel, WireGuardGo
from cli.demo.netns import CommandError, Namespaces

G = TypeVar("G", bound=Ground)
Failures = (CommandError, RuntimeError, OSError, subprocess.TimeoutExpired, json.JSONDecodeError)
_TRIES = 2  # of one tunnel in one round


def parser(name: str, what: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    made = argparse.ArgumentParser(prog=f"./dev bench {name}", description=what)
    made.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    made.add_argument(
        "--json", type=Path, default=Path(f"artifacts/{name}.json"), help="raw values go here"
    )
    tunnels.add_options(made)
    return made


def ready(*programs: str) -> bool:
    """Whether this machine can measure; says why not."""
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0:
        print("the lab makes network namespaces, which needs root", file=sys.stderr)
    elif not Path("/dev/net/tun").exists():
        print("there is no /dev/net/tun", file=sys.stderr)
    elif missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    else:
        return True
    return False


def in_turns(
    candidates: Sequence[Tunnel],
    rounds: int,
    build: Callable[[Namespaces, Path], G],
    measure: Callable[[G, Running, str, Round | None], dict[str, float | None]],
) -> tuple[dict[str, list[Round]], list[str]]:
    """All tunnels in every round, each on fresh ground, in an order that turns with the round.

    `measure` gets the ground, the tunnel, its name, and the tunnel's round before. Returns the
    rounds by tunnel, and what failed: a tunnel gets a second try in a round, then goes without.
    """
    measured: dict[str, list[Round]] = {tunnel.name: [] for tunnel in candidates}
    failed: list[str] = []
    for number in range(rounds):
        turn = number % len(candidates)
        for tunnel in [*candidates[turn:], *candidates[:turn]]:
            note(f"round {number + 1} of {rounds}: {tunnel.name}")
            done = measured[tunnel.name]
            for attempt in range(_TRIES):
                try:
                    with (
                        tempfile.TemporaryDirectory(prefix="martlet-bench-") as folder,
                        Namespaces() as spaces,
                    ):
                        ground = build(spaces, Path(folder))
                        with tunnel.up(ground) as running:
                            before = done[-1] if done else None
                            done.append(measure(ground, running, tunnel.name, before))
                    break
                except Failures as error:
                    failed.append(f"{tunnel.name}, round {number + 1}: {error}")
                    note(f"  {'failed' if attempt else 'trying again'}: {error}")
    return measured, failed


def publish(
    options: argparse.Namespace,
    candidates: Sequence[Tunnel],
    measured: dict[str, list[Round]],
    failed: Sequence[str],
    shown: str,
    **more: Any,
) -> int:
    """Print the table and write everything raw; the exit code."""
    print(shown)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    result = {
        "options": settings,
        "machine": machine(),
        "versions": versions(candidates),
        "rounds": measured,
        "failed": list(failed),
        **more,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    note(f"raw values: {options.json}")
    for failure in failed:
        note(f"failed: {failure}")
    return 1 if any(len(rounds) < options.rounds for rounds in measured.values()) else 0


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions(candidates: Sequence[Tunnel]) -> dict[str, str]:
    """Of every tunnel that has one, and of iperf3."""
    found = {
        t.name: f"{t.version()} ({t.program})" for t in candidates if isinstance(t, WireGuardGo)
    }
    iperf = subprocess.run(["iperf3", "--version"], capture_output=True, text=True, check=False)
    return {**found, "iperf3": (iperf.stdout.splitlines() or [""])[0]}


def note(line: str) -> None:
    """A line for whoever is waiting."""
    print(line, file=sys.stderr, flush=True)


def brief(rows: Sequence[Row], found: Round) -> str:
    """The figures of one round in one line."""
    return "  ".join(f"{row.key} {text(found.get(row.key))}" for row in rows if row.key in found)


def named(rows: Sequence[Row], **values: float) -> list[Row]:
    """Rows whose names have values of this run in them."""
    return [replace(row, name=row.name.format(**values)) for row in rows]
