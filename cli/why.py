"""`martlet why`: which path is in use, and why it and not the others."""

from __future__ import annotations

from cli import output
from cli.client import connect
from cli.failures import OK
from cli.ping import find
from tunnel.errors import LocalError


def run(target: str, json: bool) -> int:
    """Print the reasons for `target` (PEER or TUNNEL/PEER); returns the exit code."""
    tunnel, name = find(target)
    with connect(tunnel) as client:
        status = client.status()
    peer = next((entry for entry in status["peers"] if entry["name"] == name), None)
    if peer is None:
        raise LocalError(f"tunnel {tunnel} has no peer {name!r}", remedy="see martlet status")
    reasons = peer["why"]
    if peer["active_path"] is None:
        reasons = [f"{name} is {peer['state']}: there is no session with it yet", *reasons]
        broker = status.get("rendezvous") or {}
        if broker.get("error"):
            reasons.append(f"rendezvous: {broker['error']}")
    if json:
        output.as_json(reasons)
    else:
        for line in reasons:
            output.data(line)
    return OK
