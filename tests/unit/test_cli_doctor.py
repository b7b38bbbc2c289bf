"""`martlet doctor` as a user meets it: its text, its JSON, its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli.client
import cli.doctor
import cli.main
from cli.doctor import render
from tests.unit.test_doctor import BLOCKED, HARD, NETWORK, behaviour, configured, facts, nat
from tunnel.config import Endpoint
from tunnel.doctor.facts import Facts, LinkFacts
from tunnel.doctor.judge import judge
from tunnel.shell.doctor.gather import Progress, Request

Run = Callable[..., tuple[int, str, str]]


class Gathered:
    """In place of the gathering: gives these facts, and keeps what was asked for."""

    def __init__(self) -> None:
        self.facts: Facts = facts()
        self.request = Request()

    async def __call__(self, request: Request, progress: Progress) -> Facts:
        self.request = request
        progress(["STUN"])
        return self.facts


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gathered:
    made = Gathered()
    monkeypatch.setattr(cli.doctor, "gather", made)
    monkeypatch.setattr(cli.client, "control_directory", lambda: tmp_path)
    return made


@pytest.fixture
def martlet(gathered: Gathered, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main.main(("doctor", *arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(exit.value.code or 0), out, err

    return run


def test_text(martlet: Run) -> None:
    code, out, err = martlet()
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "martlet doctor  1.2.3"
    assert lines[-1] == "Verdict: all is well; direct connections are likely."
    assert "Way to peers" in lines
    # For grep and awk: one line a finding, its state and its name first.
    udp = next(line.split() for line in lines if "UDP gets out" in line)
    assert udp[:2] == ["ok", "udp"]
    assert not any(line != line.rstrip() for line in lines)


def test_a_problem_is_shown_with_its_remedy_and_exit_code(martlet: Run, gathered: Gathered) -> None:
    gathered.facts = nat(BLOCKED)
    code, out, _ = martlet()
    lines = out.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.split()[:2] == ["problem", "udp"]]
    assert lines[at + 1].lstrip().startswith("→ let UDP out")
    assert code == 1 and "1 problem" in lines[-1]
    assert martlet("--json")[0] == 1


def test_warnings_are_no_failure(martlet: Run, gathered: Gathered) -> None:
    gathered.facts = nat(HARD)
    code, out, _ = martlet()
    assert code == 0 and "no problem, 1 warning" in out


def test_json(martlet: Run) -> None:
    code, out, err = martlet("--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == {"version", "findings", "nat"}
    assert out.count("\n") == 1


def test_what_is_asked_for(martlet: Run, gathered: Gathered) -> None:
    code, _, _ = martlet(
        "--stun", "stun.example:3478", "--stun", "[2001:db8::1]:1",
        "--rendezvous", "wss://b.example",
    )  # fmt: skip
    assert code == 0
    asked = gathered.request
    assert asked.stun == (Endpoint("stun.example", 3478), Endpoint("2001:db8::1", 1))
    assert asked.rendezvous is not None and asked.rendezvous.url == ("wss://b.example",)
    assert asked.config is None and asked.tunnels == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stun", "stun.example"), "the port is missing"),
        (("--rendezvous", "http://b.example"), "mqtts://HOST:8883"),
    ],
)
def test_wrong_usage(martlet: Run, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = martlet(*arguments)
    assert (code, out) == (2, "") and words in err


def test_a_configuration_that_is_wrong_is_a_finding(
    martlet: Run, gathered: Gathered, tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[interface]\nname = 7\n")
    martlet(str(file))
    error = gathered.request.config_error
    assert error is not None and error.line == 2
    assert gathered.request.config_path == str(file)
    martlet("none")
    assert gathered.request.config_path == "/etc/martlet/none.toml"
    assert gathered.request.config_error is not None


def test_a_narrow_terminal_gets_wrapped_lines() -> None:
    for width in (50, 80, 100):
        lines = render(judge(nat(HARD)), "/etc/martlet/mt0.toml", width).plain.splitlines()
        body = [line for line in lines if line.startswith("  ")]
        assert max(map(len, body)) <= max(width, 66), "what is narrower cannot be read"
        assert "".join(lines).replace(" ", "").count("directonlytopeers") == 1


def test_names_and_addresses_are_not_broken_at_the_end_of_a_line() -> None:
    long = LinkFacts(name="eth0", mtu=1200, up=True, carrier=True)
    network = facts().network
    text = render(
        judge(facts(network=type(NETWORK)(links=(long,), usable=network.usable))), None, 60
    )
    assert "ip link set eth0 mtu 1500" in " ".join(text.plain.split())


@pytest.mark.parametrize("given", [facts(), configured(), nat(HARD), nat(behaviour(cgnat=True))])
def test_every_report_can_be_shown_and_told(given: Any) -> None:
    report = judge(given)
    assert render(report).plain
    assert json.loads(json.dumps(report.as_json()))["findings"]
