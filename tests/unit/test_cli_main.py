"""The command line as a user meets it: output, exit codes, never a traceback."""

import asyncio
import json
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import cli.client
import cli.main
from tun.errors import TunError
from tunnel.errors import ConfigError
from tunnel.events import BenchAnswer
from tunnel.identity import Identity
from tunnel.shell import loop as shell_loop
from tunnel.shell import status as shell_status
from tunnel.shell.status import ControlServer, ControlSocket


class Result:
    """One run of the command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Martlet = Callable[..., Result]


@pytest.fixture
def martlet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Martlet:
    """Runs the command with its control sockets in `tmp_path`."""
    monkeypatch.setattr(cli.client, "control_directory", lambda: tmp_path)
    monkeypatch.setattr(shell_status, "PING_WAIT", 0.02)
    monkeypatch.delenv("MARTLET_DEBUG", raising=False)

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main.main(arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(exit.value.code or 0), out, err)

    return run


class FakeTunnel:
    """A `Control` that answers every ping but the third."""

    def __init__(self, name: str, end: Callable[[], None]) -> None:
        self._name, self._end = name, end
        self.reachable = True
        self.news: dict[str, list[str]] | Exception = {}
        self._pings = 0

    def status(self) -> dict[str, Any]:
        peer = {"name": "office", "state": "up", "active_path": "a>b", "paths": [], "migrations": 0}
        return {"interface": self._name, "peers": [peer]}

    def history(self) -> list[dict[str, Any]]:
        return [{"peer": "office", "trigger": "rebinding"}]

    def peers(self) -> list[str]:
        return ["office"]

    def ping(self, peer: str, answered: Callable[[float], None]) -> Callable[[], None]:
        self._pings += 1
        if self.reachable and self._pings != 3:
            answered(0.02)
        return lambda: None

    def bench(
        self, peer: str, seconds: int, answered: Callable[[BenchAnswer], None]
    ) -> Callable[[], None]:
        answered(BenchAnswer(peer, 1, problem=f"peer {peer} refuses: not today"))
        return lambda: None

    def reload(self) -> dict[str, list[str]]:
        if isinstance(self.news, Exception):
            raise self.news
        return self.news

    def down(self) -> None:
        self._end()


@contextmanager
def running(directory: Path, name: str) -> Iterator[FakeTunnel]:
    """A tunnel that is up, in a thread."""
    claimed = ControlSocket.claim(name, directory)
    started = threading.Event()
    made: list[FakeTunnel] = []
    ends: list[Callable[[], object]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        ends.append(lambda: loop.call_soon_threadsafe(over.set))
        made.append(FakeTunnel(name, over.set))
        server = ControlServer(claimed, made[0])
        await server.start()
        started.set()
        await over.wait()
        claimed.release()
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert started.wait(10)
        yield made[0]
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            ends[0]()
        thread.join(10)


CONFIG = """
[interface]
name = "mt0"
address = ["10.88.0.1/24"]
private_key = "key"
[[peer]]
name = "office"
public_key = "{peer}"
allowed_ips = ["10.88.0.2/32"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    Identity.generate().save(tmp_path / "key")
    file = tmp_path / "mt0.toml"
    file.write_text(CONFIG.format(peer=Identity.generate().public_key.openssh))
    return file


def test_help_and_version(martlet: Martlet) -> None:
    result = martlet("--help")
    assert result.code == 0
    for command in "keygen pubkey up down reload status history ping bench demo".split():  # noqa: SIM905
        assert re.search(rf"^\W*{command}\b", result.out, re.MULTILINE)
        described = martlet(command, "--help")
        assert described.code == 0
        assert "Example:" in described.out
    assert re.fullmatch(r"martlet \d+\.\d+\.\d+\S*\n", martlet("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("up",), ("keygen", "a", "b"), ("ping", "office", "-c", "x"), ("status", "--jsn"),
     ("ping", "office", "-i", "0"), ("bench",), ("bench", "office", "-s", "17"),
     ("up", "mt0", "--log-level", "loud")],
)  # fmt: skip
def test_usage(martlet: Martlet, arguments: tuple[str, ...]) -> None:
    result = martlet(*arguments)
    assert result.code == 2
    assert result.out == ""


def test_keygen_and_pubkey(martlet: Martlet, tmp_path: Path) -> None:
    file = tmp_path / "id"
    made = martlet("keygen", str(file))
    assert made.code == 0
    assert made.out.startswith("ssh-ed25519 AAAA")
    assert str(file) in made.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert martlet("pubkey", str(file)).out == made.out
    content = file.read_bytes()
    again = martlet("keygen", str(file))
    assert again.code == 1
    assert again.out == ""
    assert "never overwritten" in again.err
    assert file.read_bytes() == content


def test_the_default_key_gets_a_private_directory(
    martlet: Martlet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = tmp_path / "etc" / "id_ed25519"
    monkeypatch.setattr(cli.main, "DEFAULT_KEY", default)
    assert martlet("keygen", str(default)).code == 0
    assert stat.S_IMODE(default.parent.stat().st_mode) == 0o700


def test_pubkey_of_no_key(martlet: Martlet, tmp_path: Path) -> None:
    assert martlet("pubkey", str(tmp_path / "nothing")).code == 3


def test_up_with_a_bad_config(martlet: Martlet, config: Path) -> None:
    result = martlet("up", "no-such-tunnel-anywhere")
    assert result.code == 3
    assert "/etc/martlet/no-such-tunnel-anywhere.toml" in result.err
    config.write_text(config.read_text().replace("allowed_ips", "alowed_ips"))
    result = martlet("up", str(config))
    assert result.code == 3
    assert f"{config}:9" in result.err
    assert "allowed_ips" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TunError("privilege", "run as root"), 4),
        (TunError("missing", "there is no /dev/net/tun"), 1),
        (ConfigError("the key is gone"), 3),
        (RuntimeError("a bug"), 1),
    ],
)
def test_up_that_fails(
    martlet: Martlet, config: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shell_loop, "run", fail)
    result = martlet("up", str(config))
    assert result.code == code
    assert str(error) in result.err
    assert result.out == ""


def test_nothing_is_up(martlet: Martlet) -> None:
    for arguments in (("status",), ("history",), ("ping", "office"), ("status", "mt0"),
                      ("bench", "office"), ("bench", "mt0/office"),
                      ("reload",), ("reload", "mt0"),
                      ("down", "mt0"), ("down", "../x"), ("ping", "mt0/office")):  # fmt: skip
        result = martlet(*arguments)
        assert result.code == 1
        assert result.out == ""
        assert "up in this network namespace; start" in result.err


def test_status_history_and_down(martlet: Martlet, tmp_path: Path) -> None:
    with running(tmp_path, "mt0"):
        shown = martlet("status")
        assert shown.code == 0
        assert shown.out.startswith("mt0\n")
        assert "\x1b" not in shown.out  # no colours into a pipe
        assert json.loads(martlet("status", "mt0", "--json").out)["interface"] == "mt0"
        assert "rebinding" in martlet("history").out
        assert json.loads(martlet("history", "mt0", "--json").out)[0]["peer"] == "office"
        result = martlet("down", "mt0")
        assert (result.code, result.out) == (0, "")
        assert martlet("status", "mt0").code == 1


def test_several_tunnels(martlet: Martlet, tmp_path: Path) -> None:
    with running(tmp_path, "mt0"), running(tmp_path, "mt1"):
        lines = martlet("status", "--json").out.splitlines()
        assert [json.loads(line)["interface"] for line in lines] == ["mt0", "mt1"]
        result = martlet("history")
        assert result.code == 1
        assert "several tunnels are up: mt0, mt1; name one" in result.err
        result = martlet("ping", "office", "-c", "1")
        assert result.code == 1
        assert "name one: mt0/office, mt1/office" in result.err
        assert martlet("ping", "mt1/office", "-c", "1").code == 0
        assert "no tunnel that is up has a peer 'home'" in martlet("ping", "home").err


def test_a_stale_socket_is_not_a_tunnel(martlet: Martlet, tmp_path: Path) -> None:
    ControlSocket.claim("mt0", tmp_path).listener.close()
    with running(tmp_path, "mt1"):
        assert json.loads(martlet("status", "--json").out)["interface"] == "mt1"


def test_ping(martlet: Martlet, tmp_path: Path) -> None:
    with running(tmp_path, "mt0") as tunnel:
        result = martlet("ping", "office", "-c", "3", "-i", "0.002")
        assert result.code == 0
        lines = result.out.splitlines()
        assert lines[:4] == [
            "PING office via a>b",
            "reply from office: seq=1 time=20.000 ms",
            "reply from office: seq=2 time=20.000 ms",
            "",
        ]
        assert "3 packets transmitted, 2 received, 33.3333% packet loss" in lines[5]
        tunnel.reachable = False
        result = martlet("ping", "mt0/office", "-c", "1")
        assert result.code == 5
        assert "100% packet loss" in result.out
        assert "does not answer" in result.err
        unknown = martlet("ping", "home", "-c", "1")
        assert unknown.code == 1
        assert "no peer 'home' here; peers are: office" in unknown.err


def test_bench_refused(martlet: Martlet, tmp_path: Path) -> None:
    with running(tmp_path, "mt0"):
        result = martlet("bench", "office")
        assert (result.code, result.out) == (1, "")
        assert "tunnel mt0: peer office refuses: not today" in result.err
        unknown = martlet("bench", "mt0/home", "--json")
        assert (unknown.code, unknown.out) == (1, "")
        assert "no peer 'home' here; peers are: office" in unknown.err


def test_sockets_of_somebody_else(
    martlet: Martlet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mt0.sock").touch()
    monkeypatch.setattr(cli.client, "is_alive", refuse)
    result = martlet("status")
    assert result.code == 4
    assert "run as root" in result.err


def test_a_tunnel_that_makes_no_sense(martlet: Martlet, tmp_path: Path) -> None:
    claimed = ControlSocket.claim("mt0", tmp_path)

    def nonsense() -> None:
        claimed.listener.setblocking(True)
        connection, _ = claimed.listener.accept()
        connection.recv(99)
        connection.sendall(b"nonsense\n")
        connection.close()

    thread = threading.Thread(target=nonsense)
    thread.start()
    result = martlet("status", "mt0")
    thread.join(10)
    claimed.release()
    assert result.code == 1
    assert "mt0 does not answer" in result.err


def test_developers_see_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MARTLET_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main.main(["pubkey", str(tmp_path / "nothing")])
    assert "Traceback" in capsys.readouterr().err


def test_reload(martlet: Martlet, tmp_path: Path) -> None:
    with running(tmp_path, "mt0") as tunnel:
        tunnel.news = {"addresses": ["fd88::1/128"], "added": ["home"], "removed": ["office"]}
        done = martlet("reload", "mt0")
        assert (done.code, done.out) == (0, "")
        assert done.err.splitlines() == [
            "martlet: tunnel mt0: this host has the address fd88::1/128 now",
            "martlet: tunnel mt0: peer home is added",
            "martlet: tunnel mt0: peer office is gone",
        ]
        tunnel.news = {"added": []}
        assert "nothing new in its config" in martlet("reload").err
        tunnel.news = ConfigError("nonsense", file="/x/mt0.toml", line=3)
        wrong = martlet("reload")
        assert wrong.code == 3
        assert "tunnel mt0: /x/mt0.toml:3: nonsense" in wrong.err
        tunnel.news = TunError("conflict", "a route is there")
        assert martlet("reload").code == 1
