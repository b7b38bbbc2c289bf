"""`martlet rendezvous` without its network: options, words, the configuration it generates."""

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cli.main
from tests.unit.tls_files import TlsFiles, tls_files
from tunnel.shell.rendezvous import limits, mosquitto, server
from tunnel.shell.rendezvous.mosquitto import Program, Tls, configuration
from tunnel.shell.rendezvous.server import Options, Ready

__all__ = ["tls_files"]  # a fixture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`martlet rendezvous` with these arguments: exit code, standard output, standard error."""
    monkeypatch.delenv("MARTLET_DEBUG", raising=False)

    def martlet(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main.main(["rendezvous", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(exit.value.code or 0), out, err

    return martlet


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tls-cert", "x.pem"], "go together"),
        (["--broker", "emqx"], "auto, mosquitto, amqtt"),
        (["--alternate-address", "192.0.2.2"], "--listen"),
        (["--listen", "broker.test"], "not an IP address"),
        (["--listen", "0.0.0.0"], "not an IP address"),
        (["--listen", "192.0.2.1", "--alternate-address", "192.0.2.1"], "another address"),
        (["--listen", "192.0.2.1", "--alternate-address", "2001:db8::1"], "same family"),
        (["--listen", "::1", "--alternate-address", "::2", "--no-stun"], "--no-stun"),
        (["--port", "80", "--websocket"], "both 80"),
        (["--port", "0"], "--port"),
    ],
)
def test_options_that_cannot_be(run: Run, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and words in re.sub(r"\s+", " ", out + err)


def test_without_a_broker_both_remedies_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "amqtt" else find_spec(name)
    )
    code, _, err = run()
    assert code == 1
    assert "apt install mosquitto" in err and "martlet[rendezvous]" in err
    code, _, err = run("--broker", "mosquitto")
    assert code == 1 and "apt install mosquitto" in err


def test_a_mosquitto_that_is_too_old_or_incomplete_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbin" / "mosquitto"
    program.parent.mkdir()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(program))

    def install(version: str) -> None:
        program.write_text(f"#!/bin/sh\necho 'mosquitto version {version}'\n")
        program.chmod(0o755)

    install("1.6.12")
    assert mosquitto.find() == (None, f"{program} is too old: version 2.0 or later is needed")
    install("2.0.11")
    assert mosquitto.find() == (Program(str(program), "2.0.11"), "")
    monkeypatch.setattr(mosquitto, "_rules", lambda: None)
    found, wanting = mosquitto.find()
    assert found is None and "plugin" in wanting


def test_certificates_that_cannot_be_used(run: Run, tmp_path: Path, tls_files: TlsFiles) -> None:
    code, _, err = run("--tls-cert", str(tmp_path / "none"), "--tls-key", str(tls_files.key))
    assert code == 3 and "cannot read" in err
    code, _, err = run("--tls-cert", str(tls_files.key), "--tls-key", str(tls_files.key))
    assert code == 3 and "cannot be used" in err
    code, _, err = run("--tls-cert", str(tls_files.ca), "--tls-key", str(tls_files.key))
    assert code == 3 and "cannot be used" in err


def test_mosquitto_keeps_nothing_and_bounds_everything(tmp_path: Path) -> None:
    text = configuration(tmp_path, ["192.0.2.1"], 8883, True, 500)
    lines = text.splitlines()
    for line in (
        "persistence false", "retain_available false", "max_connections 500",
        "listener 8883 192.0.2.1", f"keyfile {tmp_path}/key.pem", "connection_messages false",
        f"message_size_limit {limits.PAYLOAD}",
        f"plugin_opt_payload {limits.PAYLOAD}", "plugin_opt_keepalive 120",
        f"max_packet_size {limits.PACKET}",
    ):  # fmt: skip
        assert line in lines
    listeners = [i for i, line in enumerate(lines) if line.startswith("listener ")]
    assert all(lines[i + 1] == "max_connections 500" for i in listeners) and len(listeners) == 2
    assert "listener 1883" in configuration(tmp_path, [None], 1883, False, 5).splitlines()


@pytest.mark.parametrize(
    "options, urls, stun",
    [
        ({"listen": "192.0.2.1"}, ["mqtt://192.0.2.1:1883"], None),
        ({"listen": "2001:db8::1"}, ["mqtt://[2001:db8::1]:1883"], None),
        ({"name": "b.test", "port": 99}, ["mqtt://b.test:99"], None),
        (
            {"name": "b.test", "websocket": 80},
            ["mqtt://b.test:1883", "ws://b.test/mqtt"],
            None,
        ),
        (
            {"name": "b.test", "websocket": 8080, "stun_port": 99},
            ["mqtt://b.test:1883", "ws://b.test:8080/mqtt"],
            "b.test:99",
        ),
        ({"name": "b.test", "stun_port": None}, ["mqtt://b.test:1883"], None),
    ],
)
def test_what_hosts_are_told(options: dict[str, object], urls: list[str], stun: str) -> None:
    ready = described(Options(**options))  # type: ignore[arg-type]
    assert list(ready.url) == urls and ready.stun == stun


def test_the_name_is_that_of_the_certificate(tls_files: TlsFiles) -> None:
    ready = described(Options(tls=Tls(tls_files.certificate, tls_files.key), websocket=443))
    assert ready.url == ("mqtts://localhost:8883", "wss://localhost/mqtt")


def described(options: Options) -> Ready:
    class Broker:
        name, version, socket = "amqtt", "0", Path("/none")

        async def start(self) -> None: ...
        async def wait(self) -> None: ...
        async def stop(self) -> None: ...
        def reload(self) -> None: ...

    return server._describe(options, Broker(), 10)


def test_without_tls_nothing_is_guessed_that_cannot_be_reached() -> None:
    name = server._guess_name(Options())
    assert name and not name.startswith(("127.", "0.", "::"))
