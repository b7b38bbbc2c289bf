"""`martlet bench` between two real hosts.

a [eth0 192.0.2.1] ----veth---- [eth0 192.0.2.2] b
   mt0 10.88.0.1                  mt0 10.88.0.2, port 4117
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.hosts import MARTLET, Host, until

Tunnels = dict[str, subprocess.Popen[bytes]]


def sent(host: Host) -> int:
    """Bytes that the host's paths have carried away."""
    status = json.loads(host.martlet("status", "--json").stdout)
    return sum(path["tx_bytes"] for path in status["peers"][0]["paths"])


def up(*hosts: Host) -> list[subprocess.Popen[bytes]]:
    processes = [host.up() for host in hosts]
    assert hosts[0].martlet("ping", "other", "-c", "1").returncode == 0, hosts[0].log.read_text()
    return processes


def children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def user(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_a_bench_of_a_running_tunnel(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    at_b, _ = up(b, a)
    for one, mine, theirs in ((a, 1, 2), (b, 2, 1)):  # either end may ask
        done = one.martlet("bench", "other", "--seconds", "1.5", "--json")
        assert done.returncode == 0, done.stderr + a.log.read_text() + b.log.read_text()
        assert done.stderr == ""  # no progress where there is no terminal
        result = json.loads(done.stdout)
        assert (result["tunnel"], result["peer"], result["address"]) == (
            "mt0", "other", f"10.88.0.{theirs}",
        )  # fmt: skip
        for phase in ("idle", "upload", "download"):
            found = result[phase]
            rtt = found["rtt_ms"]
            assert 0 < rtt["min"] <= rtt["median"] <= rtt["p95"] <= rtt["max"] < 1000
            assert rtt["count"] >= 10
            assert found["unanswered"] == 0
        assert "mbit_s" not in result["idle"]
        (path,) = result["paths"]
        assert path["local"].startswith(f"192.0.2.{mine}:")
        assert path["remote"].startswith(f"192.0.2.{theirs}:")
        assert result["moves"] == 0
        for phase, wire in (("upload", "tx_bytes"), ("download", "rx_bytes")):
            assert result[phase]["mbit_s"] > 5
            # At least what arrived went over the wire, and not in secret copies of it.
            assert 0.9 < path[phase][wire] / result[phase]["bytes"] < 2
            assert path[phase]["active"]
            assert path[phase]["rtt_ms"] > 0
        assert path["upload"]["tx_bytes"] > 5 * path["upload"]["rx_bytes"]
        assert path["download"]["rx_bytes"] > 5 * path["download"]["tx_bytes"]
        assert path["idle"]["tx_bytes"] < path["upload"]["tx_bytes"] / 5
    until(lambda: not children(at_b), lambda: children(at_b))

    time.sleep(1)  # a peer starts no more than one bench a second
    done = a.martlet("bench", "other", "-s", "1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [words[0] for words in lines[2:5]] == ["idle", "upload", "download"]
    assert "10.88.0.2 by mt0" in done.stdout
    for host in hosts:
        status = json.loads(host.martlet("status", "--json").stdout)
        assert status["counters"]["internal_errors"] == 0


def test_a_bench_survives_a_move(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    up(b, a)
    found = a.config.with_suffix(".json")
    with found.open("wb") as out:
        running = a.space.popen(
            [*MARTLET, "bench", "other", "-s", "2", "--json"], stdout=out, log=a.log
        )
        until(lambda: sent(a) > 1_000_000, a.log.read_text)  # it uploads
        a.space.batch("addr del 192.0.2.1/24 dev eth0", "addr add 192.0.2.7/24 dev eth0")
        assert running.wait(30) == 0, a.log.read_text()
    result = json.loads(found.read_text())
    assert result["moves"] >= 1
    paths = {path["local"].partition(":")[0]: path for path in result["paths"]}
    assert paths["192.0.2.1"]["idle"]["tx_bytes"] > 0
    assert paths["192.0.2.7"]["idle"] is None
    assert paths["192.0.2.7"]["download"]["rx_bytes"] > 0.9 * result["download"]["bytes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_one_at_a_time_and_a_client_that_is_ended(
    hosts: tuple[Host, Host], number: signal.Signals
) -> None:
    a, b = hosts
    at_b, _ = up(b, a)
    first = a.space.popen([*MARTLET, "bench", "other", "-s", "16"])
    until(lambda: bool(children(at_b)), b.log.read_text)
    (child,) = children(at_b)
    until(lambda: user(child) == 65534, lambda: user(child))  # not root
    second = a.martlet("bench", "other")
    assert second.returncode == 1
    assert "peer other refuses: a bench is running already" in second.stderr
    first.send_signal(number)
    assert first.wait(5) == (130 if number is signal.SIGINT else -signal.SIGKILL)
    until(lambda: not children(at_b), lambda: children(at_b))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_with_its_tunnel(hosts: tuple[Host, Host], number: signal.Signals) -> None:
    a, b = hosts
    at_b, _ = up(b, a)
    client = a.space.popen([*MARTLET, "bench", "other", "-s", "16"], log=a.log)
    until(lambda: bool(children(at_b)), b.log.read_text)
    (child,) = children(at_b)
    at_b.send_signal(number)
    at_b.wait(5)
    until(lambda: not os.path.exists(f"/proc/{child}"), lambda: child)
    client.kill()
    client.wait(5)


def test_a_peer_that_refuses_and_one_that_is_away(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    b.config.write_text(b.config.read_text() + "bench = false\n")
    at_b, _ = up(b, a)
    done = a.martlet("bench", "other")
    assert done.returncode == 1
    assert "peer other refuses: benches are off there" in done.stderr
    assert done.stdout == ""
    assert a.martlet("bench", "nobody").returncode == 1
    at_b.terminate()
    at_b.wait(5)
    until(lambda: '"connecting"' in a.martlet("status", "--json").stdout, a.log.read_text)
    done = a.martlet("bench", "other")
    assert done.returncode == 5
    assert "peer other is not up, but connecting" in done.stderr


def test_a_firewall_in_the_way(hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = hosts
    at_b, _ = up(b, a)
    chain = "type filter hook input priority 0; iifname mt0 tcp flags syn drop;"
    rules = f"table inet t {{ chain i {{ {chain} }}; }}"
    b.space.run(["nft", "-f", "-"], input=rules)
    done = a.martlet("bench", "other")
    assert done.returncode == 5
    assert "no TCP connection to 10.88.0.2 within 5 s" in done.stderr
    assert "firewall" in done.stderr
    until(lambda: not children(at_b), lambda: children(at_b), seconds=15)
