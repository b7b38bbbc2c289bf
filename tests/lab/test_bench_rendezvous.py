"""`./dev bench rendezvous` with a few hosts: that it measures, not how much."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.test_rendezvous import missing


def test_a_few_hosts_meet_are_idle_and_meet_again(tmp_path: Path) -> None:
    if reason := missing("mosquitto"):
        pytest.skip(reason)
    file = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "rendezvous", "--hosts", "12", "--processes", "2"),
            *("--idle", "1", "--json", str(file)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    for act in ("arrive", "storm"):
        assert len(result[act]["times"]) == 12 and result[act]["late"] == 0
        assert result[act]["bytes"] > 12 * 1000
    assert "NOT MET" in done.stdout
