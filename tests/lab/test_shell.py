"""The command `martlet` as users start it: real processes, TUN devices and sockets.

a [eth0 192.0.2.1] ----veth---- [eth0 192.0.2.2] b
   mt0 10.88.0.1                  mt0 10.88.0.2, port 4117
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.lab.hosts import MARTLET, Host, until
from tunnel.identity import Identity


def test_up_ping_status_move_down(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    b.up()
    running = a.up()
    done = a.martlet("ping", "other", "-c", "3", "-i", "0.05")
    assert done.returncode == 0, a.log.read_text()
    assert "3 received" in done.stdout
    assert a.space.run(["ping", "-c2", "-i0.1", "10.88.0.2"]).returncode == 0
    routes = a.space.run(["ip", "route"]).stdout
    assert "10.99.2.0/24 dev mt0" in routes

    status = json.loads(a.martlet("status", "--json").stdout)
    assert status["interface"] == "mt0"
    (peer,) = status["peers"]
    assert peer["state"] == "up"
    assert peer["paths"][0]["remote"] == "192.0.2.2:4117"
    assert status["counters"]["internal_errors"] == 0
    again = a.martlet("up", str(a.config))
    assert again.returncode == 1
    assert "already up" in again.stderr

    a.space.batch("addr del 192.0.2.1/24 dev eth0", "addr add 192.0.2.7/24 dev eth0")
    assert a.space.run(["ping", "-c2", "-i0.1", "10.88.0.2"]).returncode == 0
    history = json.loads(a.martlet("history", "mt0", "--json").stdout)
    assert history[-1]["to_path"].startswith("192.0.2.7:")

    down = a.martlet("down", "mt0")
    assert down.returncode == 0
    assert "mt0" not in a.interfaces()  # undone by the time `down` returns
    assert running.wait(5) == 0
    assert a.martlet("status").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_undo_everything(hosts: tuple[Host, Host], number: signal.Signals) -> None:
    _, b = hosts
    process = b.up()
    process.send_signal(number)
    assert process.wait(5) == 0
    assert "mt0" not in b.interfaces()
    assert "Traceback" not in b.log.read_text()


def test_a_killed_tunnel_can_be_started_again(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    process = b.up()
    process.kill()
    process.wait(5)
    b.log.write_text("")
    b.up()
    assert b.martlet("status").returncode == 0


def test_a_stopped_process_is_told_that_it_was(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    process = b.up()
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)  # real time: it is the kernel's clocks that are compared
    process.send_signal(signal.SIGCONT)
    until(lambda: "resumed missing_s=" in b.log.read_text(), b.log.read_text)


def test_detach(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    done = b.martlet("up", "--detach", str(b.config))
    assert done.returncode == 0, done.stderr
    assert "in the background" in done.stderr
    log = Path(done.stderr.rsplit(" ", 1)[1].strip())
    assert "info    up" in log.read_text()
    again = b.martlet("up", "--detach", str(b.config))
    assert again.returncode == 1
    assert "already up" in again.stderr
    assert b.martlet("down", "mt0").returncode == 0
    assert "mt0" not in b.interfaces()
    log.unlink()


def test_sd_notify(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    _, b = hosts
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(10)
        process = b.space.popen([*MARTLET, "up", str(b.config)], env={"NOTIFY_SOCKET": name})
        assert manager.recv(99) == b"READY=1"
        assert "mt0" in b.interfaces()
        process.terminate()
        assert manager.recv(99) == b"STOPPING=1"


def test_a_port_in_use(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    owner = b.space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with owner:
        owner.bind(("0.0.0.0", 4117))
        done = b.martlet("up", str(b.config))
    assert done.returncode == 1
    assert "UDP port 4117 is already in use" in done.stderr
    assert "mt0" not in b.interfaces()


def test_without_dev_net_tun(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    script = 'mount -t tmpfs none /dev/net && exec "$@"'
    done = b.space.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *MARTLET, "up", str(b.config)], check=False
    )
    assert done.returncode == 1
    assert "there is no /dev/net/tun" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_privilege(hosts: tuple[Host, Host]) -> None:
    """Root without any capability but those that read files: as a container has it."""
    _, b = hosts
    done = b.space.run(
        ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin",
         *MARTLET, "up", str(b.config)],
        check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "NET_ADMIN" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_endpoint_that_does_not_answer_is_no_error_but_ping_says_so(
    hosts: tuple[Host, Host],
) -> None:
    a, _ = hosts
    a.config.write_text(a.config.read_text().replace('"192.0.2.2:4117"', '"no-such.invalid:1"'))
    a.up()
    done = a.martlet("ping", "other", "-c", "1")
    assert done.returncode == 5
    assert "other does not answer" in done.stderr
    until(lambda: "cannot resolve" in a.log.read_text(), a.log.read_text)


def test_the_device_taken_away(hosts: tuple[Host, Host]) -> None:
    _, b = hosts
    process = b.up()
    b.space.batch("link del mt0")
    assert process.wait(5) == 1
    assert "removed under us" in b.log.read_text()
    assert "Traceback" not in b.log.read_text()


def test_a_peer_is_added_under_a_running_session(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Pings to b go on while a learns of c, which is a second tunnel on b's host."""
    a, b = hosts
    b.up()
    a.up()
    until(lambda: a.martlet("ping", "other", "-c", "1").returncode == 0, a.log.read_text)
    assert a.space.run(["ping", "-c1", "-W5", "10.88.0.2"]).returncode == 0
    flow = a.space.popen(
        ["ping", "-n", "-D", "-i", "0.01", "-w", "60", "10.88.0.2"], log=tmp_path / "flow.log"
    )
    identity = Identity.generate()
    identity.save(tmp_path / "third")
    third = tmp_path / "third.toml"
    third.write_text(f"""
[interface]
name = "mt1"
address = ["10.77.0.3/32"]
private_key = "third"
listen_port = 4118
[[peer]]
name = "a"
public_key = "{Identity.load(tmp_path / "1").public_key.openssh}"
allowed_ips = ["10.77.0.1/32"]
""")
    c = Host(b.space, third)
    c.up()
    before = a.config.read_text()
    own = '"10.88.0.1/24"'
    a.config.write_text(
        before.replace(own, f'{own}, "10.77.0.1/32"')
        + f"""
[[peer]]
name = "third"
public_key = "{identity.public_key.openssh}"
endpoint = "192.0.2.2:4118"
allowed_ips = ["10.77.0.3/32"]
"""
    )
    done = a.martlet("reload", "mt0")
    assert done.returncode == 0, done.stderr
    assert "peer third is added" in done.stderr
    assert a.space.run(["ping", "-c3", "-i0.1", "-W5", "-I10.77.0.1", "10.77.0.3"]).returncode == 0
    assert "nothing new" in a.martlet("reload").stderr

    a.config.write_text(a.config.read_text().replace("192.0.2.2:4117", "192.0.2.2:4999"))
    refused = a.martlet("reload", "mt0")
    assert refused.returncode == 3
    assert "endpoint of peer other" in refused.stderr
    assert "10.77.0.3 dev mt0" in a.space.run(["ip", "route"]).stdout

    a.config.write_text(before)
    assert a.martlet("reload", "mt0").returncode == 3  # an address is gone, too
    a.config.write_text(before.replace(own, f'{own}, "10.77.0.1/32"'))
    assert "peer third is gone" in a.martlet("reload", "mt0").stderr
    assert "10.77.0.3" not in a.space.run(["ip", "route"]).stdout

    time.sleep(0.5)
    flow.send_signal(signal.SIGINT)
    flow.wait(5)
    log = (tmp_path / "flow.log").read_text()
    received = [int(number) for number in re.findall(r"icmp_seq=(\d+)", log)]
    assert len(received) > 100
    assert received == [*range(1, len(received) + 1)], log  # nothing was lost
    times = [float(at) for at in re.findall(r"^\[([\d.]+)\] 64 bytes", log, re.MULTILINE)]
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.3
    status = json.loads(a.martlet("status", "--json").stdout)
    (peer,) = status["peers"]
    assert (peer["name"], peer["migrations"], peer["counters"]["handshakes"]) == ("other", 0, 1)
    assert status["counters"]["internal_errors"] == 0
    c.martlet("down", "mt1")
