"""Detaching, in a process of its own: forking the test run itself would be no favour to it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import json, os, sys, time
from tunnel.shell.daemon import detach

def run(ready):
    print("before", flush=True)
    if sys.argv[2] == "fail":
        raise ValueError("no luck")
    if sys.argv[2] == "vanish":
        os._exit(9)
    ready()
    print("after", flush=True)
    open(sys.argv[1], "w").write(json.dumps([os.getsid(0), os.getpid(), os.getcwd()]))

try:
    print(json.dumps(detach(run, lambda error: (str(error), 7))), os.getpid())
except Exception as error:
    print(type(error).__name__, error)
"""


def start(tmp_path: Path, how: str) -> tuple[list[str], Path]:
    file = tmp_path / "who"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file), how],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.stdout.splitlines(), file


def test_returns_once_ready_and_leaves_session_and_terminal(tmp_path: Path) -> None:
    lines, file = start(tmp_path, "work")
    assert lines[0] == "before"
    assert len(lines) == 2  # nothing after ready()
    assert lines[1].startswith("null ")
    deadline = time.monotonic() + 10
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    session, process, directory = json.loads(file.read_text())
    assert process != int(lines[1].split()[1])
    assert session != process
    assert session != os.getsid(0)
    assert directory == "/"


def test_what_goes_wrong_before_is_told_to_the_user(tmp_path: Path) -> None:
    lines, _ = start(tmp_path, "fail")
    assert lines[1].startswith('["no luck", 7]')


def test_a_process_that_vanishes_is_an_error(tmp_path: Path) -> None:
    lines, _ = start(tmp_path, "vanish")
    assert lines[1].startswith("LocalError the background process ended without a word")
