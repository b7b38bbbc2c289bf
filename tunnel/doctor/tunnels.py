"""Findings about the tunnels that run here, and why a peer of theirs is not up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunnel.config import Config, PeerConfig
from tunnel.doctor import way
from tunnel.doctor.facts import Facts, TunnelFacts
from tunnel.doctor.finding import Finding, State

UP = "up"


def judge(facts: Facts) -> Iterator[Finding]:
    for tunnel in facts.tunnels:
        yield from _tunnel(facts, tunnel)
    name = None if facts.config is None else facts.config.interface.name
    if name is not None and not any(tunnel.name == name for tunnel in facts.tunnels):
        yield Finding(
            "tunnel", State.NOTE, f"tunnel {name} is not up", f"martlet up {facts.config_path}"
        )


def _tunnel(facts: Facts, tunnel: TunnelFacts) -> Iterator[Finding]:
    if tunnel.status is None:
        yield Finding(
            "tunnel",
            State.WARNING,
            f"tunnel {tunnel.name} does not answer: {tunnel.error}",
            f"if it hangs, end the process (pgrep -af 'martlet up.*{tunnel.name}')",
        )
        return
    peers: list[dict[str, Any]] = list(tunnel.status.get("peers") or ())
    up = [peer for peer in peers if peer.get("state") == UP]
    yield Finding(
        "tunnel",
        State.OK,
        f"tunnel {tunnel.name} is up, and {len(up)} of {len(peers)} peers"
        f" {'is' if len(up) == 1 else 'are'}",
        details={"name": tunnel.name, "up": [peer.get("name") for peer in up]},
    )
    mine = facts.config is not None and facts.config.interface.name == tunnel.name
    config = facts.config if mine else None
    for peer in peers:
        if peer.get("state") != UP:
            yield _peer(facts, config, tunnel.name, peer)


def _peer(facts: Facts, config: Config | None, tunnel: str, peer: dict[str, Any]) -> Finding:
    name, state = str(peer.get("name")), str(peer.get("state"))
    configured = None
    if config is not None:
        configured = next((each for each in config.peers if each.name == name), None)
    reason, remedy = why_not_up(facts, config, configured, peer.get("obstacles") or ())
    return Finding(
        "peer",
        State.WARNING,
        f"{tunnel}/{name} is not up ({state}): {reason}",
        remedy,
        {"tunnel": tunnel, "name": name, "state": state},
    )


def why_not_up(
    facts: Facts,
    config: Config | None,
    peer: PeerConfig | None,
    obstacles: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, str]:
    """The most likely reason, and what to do; from what lies here, which is half of the matter.

    `obstacles` are those that the tunnel itself tells of, the likeliest first.
    """
    if not facts.network.usable.addresses:
        return "this host has no network", "see addresses above"
    if way.udp_is_blocked(facts) and not way.has_relay(facts):
        return "UDP does not get out of here, and there is no relay", "see udp above"
    if peer is not None and config is not None:
        names = [each for each in facts.names if each.name in _hosts(peer)]
        if names and all(not each.addresses for each in names):
            return f"{names[0].name}, its endpoint, cannot be resolved", "see dns above"
        if not peer.endpoint and config.rendezvous is None:
            return (
                "it has no endpoint and there is no [rendezvous], so only it can dial us",
                'write its address: endpoint = "HOST:4117", or set up a rendezvous',
            )
        if not peer.endpoint and facts.brokers and all(each.error for each in facts.brokers):
            return "no broker lets us in, and it has no endpoint", "see broker above"
    known = next((each for each in obstacles if each.get("about") != "no-way"), None)
    if known is not None:
        return str(known.get("problem")), str(known.get("remedy"))
    if way.is_hard(facts) and not way.has_relay(facts):
        return (
            "our NAT is a hard one: if its NAT is, too, there is no direct way, and no relay",
            "see nat above",
        )
    return (
        "nothing here is in the way: the other host may be off, or have a problem of its own",
        "run there: martlet doctor, and compare the keys with martlet pubkey",
    )


def _hosts(peer: PeerConfig) -> Sequence[str]:
    return [endpoint.host for endpoint in peer.endpoint]
