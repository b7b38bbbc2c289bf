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
    troubled = peer["state"] != "up"
    if troubled:
        where = "there is no session with it" if peer["active_path"] is None else "no path works"
        reasons = [f"{name} is {peer['state']}: {where}", *reasons]
    relayed = any(path["active"] and path["kind"] == "relay" for path in peer["paths"])
    if troubled or relayed:
        reasons += [line for line in output.obstacles(status) if line not in reasons]
    if json:
        output.as_json(reasons)
    else:
        for line in reasons:
            output.data(line)
    return OK
