"""`martlet doctor`: everything that could be in the way of a tunnel, each with what mends it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cli import output
from cli.client import connect, running
from cli.failures import FAILED, OK, UsageError
from tunnel.config import Config, Endpoint, RendezvousConfig, load, resolve_config_path
from tunnel.config_values import check_mqtt_url
from tunnel.doctor.facts import TunnelFacts
from tunnel.doctor.finding import Finding, Report, State
from tunnel.doctor.judge import judge, verdict
from tunnel.errors import ConfigError, LocalError
from tunnel.shell.doctor.gather import Progress, Request, gather

STYLES = {State.OK: "green", State.NOTE: "cyan", State.WARNING: "yellow", State.PROBLEM: "bold red"}
WIDEST, NARROWEST = 100, 40
"""Columns: longer lines are hard to read, and shorter ones, too."""


def run(
    config: str | None, *, json: bool, rendezvous: Sequence[str] = (), stun: Sequence[str] = ()
) -> int:
    """Look at everything, print it; returns the exit code."""
    request = _request(config, rendezvous, stun)
    with _progress(json) as progress:
        report = judge(asyncio.run(gather(request, progress)))
    if json:
        output.as_json(report.as_json())
    else:
        console = output.stdout()
        # What goes into a pipe is one line a finding, and one a remedy.
        width = min(console.width, WIDEST) if console.is_terminal else None
        console.print(render(report, request.config_path, width), soft_wrap=True)
    return FAILED if report.worst is State.PROBLEM else OK


def render(report: Report, config_path: str | None = None, width: int | None = None) -> Text:
    """Groups of findings, and the verdict. Lines longer than `width` are wrapped."""
    title = Text("martlet doctor", style="bold")
    title.append(f"  {report.version}" + (f"  {config_path}" if config_path else ""), "not bold")
    lines = [title]
    column = max((len(finding.check) for finding in report.findings), default=0)
    for name, findings in report.groups():
        lines += [Text(), Text(name, style="bold")]
        for finding in findings:
            lines += _lines(finding, column, width)
    lines += [Text(), Text(f"Verdict: {verdict(report)}.", style=STYLES[report.worst])]
    return Text("\n").join(lines)


def _lines(finding: Finding, column: int, width: int | None) -> Iterator[Text]:
    """State, check, and a sentence; below it what mends it."""
    state = f"{finding.state.word:<{len(State.PROBLEM.word)}}"
    margin = 2 + len(state) + 2 + column + 2
    room = max(width - margin, NARROWEST) if width is not None else None
    first, *more = _wrap(finding.summary, room)
    line = Text("  ").append(state, STYLES[finding.state])
    yield line.append(f"  {finding.check:<{column}}  {first}")
    for each in more:
        yield Text(" " * margin + each)
    if finding.remedy:
        style = "bold" if finding.state > State.NOTE else ""
        for number, each in enumerate(_wrap(finding.remedy, room and room - 2)):
            arrow = "  " if number else "→ "
            yield Text(" " * margin).append(arrow, "dim").append(each, style)


def _wrap(text: str, width: int | None) -> list[str]:
    if width is None:
        return [text]
    # Not within words: they are commands and addresses, to be copied.
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _request(config: str | None, rendezvous: Sequence[str], stun: Sequence[str]) -> Request:
    loaded: Config | None = None
    path: Path | None = None
    error: ConfigError | None = None
    if config is not None:
        path = resolve_config_path(config)
        try:
            loaded = load(path)
        except ConfigError as problem:
            error = problem  # a finding, beside all others
    return Request(
        config=loaded,
        config_path=None if path is None else str(path),
        config_error=error,
        rendezvous=_rendezvous(rendezvous),
        stun=tuple(_endpoint(each) for each in stun),
        tunnels=tuple(_tunnels()),
    )


def _rendezvous(urls: Sequence[str]) -> RendezvousConfig | None:
    for url in urls:
        try:
            check_mqtt_url(url)
        except ValueError as problem:
            raise UsageError(
                f"--rendezvous {url}: {problem}", remedy="write mqtts://HOST:8883"
            ) from None
    return RendezvousConfig(url=tuple(urls)) if urls else None


def _endpoint(text: str) -> Endpoint:
    try:
        return Endpoint.parse(text)
    except ValueError as problem:
        raise UsageError(f"--stun {text}: {problem}", remedy="write HOST:3478") from None


def _tunnels() -> Iterator[TunnelFacts]:
    """Those that run here, as far as we may know."""
    try:
        names = running()
    except LocalError:
        return
    for name in names:
        try:
            with connect(name) as client:
                yield TunnelFacts(name=name, status=client.status())
        except LocalError as error:
            yield TunnelFacts(name=name, error=error.problem)


@contextlib.contextmanager
def _progress(json: bool) -> Iterator[Progress]:
    """A line that says what is being waited for, on a terminal; otherwise nothing."""
    console = Console(stderr=True)
    if not console.is_terminal or (json and sys.stdout.isatty()):
        yield lambda waiting: None
        return
    with console.status("looking at this host ...") as status:
        yield lambda waiting: status.update(f"waiting for {', '.join(waiting[:3])} ...")
