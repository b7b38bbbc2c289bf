"""`martlet reload`: a running tunnel takes what was added to its config file."""

from __future__ import annotations

from cli import output
from cli.client import connect
from cli.failures import OK


def run(name: str | None) -> int:
    """Reload the tunnel `name`, or the only one there is; returns the exit code."""
    with connect(name) as client:
        news = client.reload()
    for line in report(client.name, news):
        output.say(line)
    return OK


def report(tunnel: str, news: dict[str, list[str]]) -> list[str]:
    """What a reload brought, for the user."""
    words = (
        ("addresses", "this host has the address {} now"),
        ("added", "peer {} is added"),
        ("removed", "peer {} is gone"),
    )
    lines = [
        f"tunnel {tunnel}: {text.format(each)}" for key, text in words for each in news.get(key, ())
    ]
    return lines or [f"tunnel {tunnel}: nothing new in its config"]
