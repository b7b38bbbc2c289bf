"""`martlet ping`: what ping(8) prints, of the tunnel's own round trips."""

from __future__ import annotations

import time

from cli import output
from cli.client import Client, connect, none_up, running
from cli.failures import OK, UNREACHABLE
from tunnel.errors import LocalError


def run(target: str, count: int, interval: float) -> int:
    """Ping `target` (PEER or TUNNEL/PEER) and print; returns the exit code."""
    tunnel, peer = find(target)
    times: list[float] = []
    sent = 0
    started = time.monotonic()
    with connect(tunnel) as client:
        output.data(f"PING {peer} {_way(client, peer)}")
        try:
            for line in client.ping(peer, count, interval):
                if "sent" in line:
                    sent = line["sent"]
                else:
                    times.append(line["rtt_ms"])
                    output.data(
                        f"reply from {peer}: seq={line['sequence']} time={line['rtt_ms']:.3f} ms"
                    )
        except KeyboardInterrupt:
            pass  # as with ping(8), the summary is what one interrupts for
    output.data("")
    for text in output.ping_summary(peer, sent, times, time.monotonic() - started):
        output.data(text)
    if times:
        return OK
    output.say(f"peer {peer} does not answer; 'martlet status {tunnel}' shows its state")
    return UNREACHABLE


def find(target: str) -> tuple[str, str]:
    """(tunnel, peer) that `target` means. Raises LocalError when it is none, or more than one."""
    tunnel, slash, peer = target.rpartition("/")
    if slash:
        return tunnel, peer
    names = running()
    if not names:
        raise none_up()
    if len(names) == 1:
        return names[0], target
    found = [name for name in names if target in _peers(name)]
    if not found:
        raise LocalError(f"no tunnel that is up has a peer {target!r}", remedy="see martlet status")
    if len(found) > 1:
        which = ", ".join(f"{name}/{target}" for name in found)
        raise LocalError(f"several tunnels have a peer {target!r}", remedy=f"name one: {which}")
    return found[0], target


def _peers(tunnel: str) -> list[str]:
    with connect(tunnel) as client:
        return [peer["name"] for peer in client.status()["peers"]]


def _way(client: Client, peer: str) -> str:
    """What is known of the way to a peer, before the first answer."""
    for entry in client.status()["peers"]:
        if entry["name"] == peer:
            active = output.active_path(entry)
            return f"via {active}" if active else f"({entry['state']})"
    return ""
