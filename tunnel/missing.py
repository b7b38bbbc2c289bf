"""Why there is no session with a peer, in sentences: what is in the way, as far as this host knows.

For `status`, `why` and the log; `tunnel.obstacle` has the shape, and the words that others share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunnel.config import Endpoint
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import Kind, Relay
from tunnel.ice.pair import PairState
from tunnel.ice.portmap import is_translated
from tunnel.obstacle import RELAY_LINE, Obstacle
from tunnel.path.network import Address

SILENT_FOR = 150.0
"""Seconds: two questions at the slowest have not been answered (`rendezvous.meeting`)."""
BAD_CERTIFICATE = 0x12A
"""What a peer that pins another key ends the handshake with (RFC 9001 section 4.8, RFC 8446 section
6: alert 42)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a peer turned us away: error code and reason of its CONNECTION_CLOSE."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Here:
    """What this host knows of itself, whatever peer is sought."""

    network: bool = True
    """Whether there is any address to send from."""
    turn: bool = False
    """Whether TURN servers are configured."""
    relayed: bool = False
    """Whether we have a relay."""
    udp: Obstacle | None = None
    """That no STUN server answers, in words."""


def udp_obstacle(
    servers: Sequence[Endpoint], relays: Sequence[Relay], *, implied: bool, turn: bool
) -> Obstacle:
    """No STUN server answers. `implied`: nobody wrote that there is one, it is looked for beside
    the broker. `turn`: whether TURN servers are configured."""
    names = ", ".join(map(str, servers))
    if any(relay.transport == "udp" for relay in relays):
        return Obstacle(
            "stun",
            f"no STUN server answers ({names}), though UDP gets to the TURN server and back",
            'check stun = ["HOST:3478"] in [ice]',
        )
    if implied:
        problem = (
            f"UDP is blocked here, or there is no STUN server beside the broker: none answers"
            f" ({names})"
        )
    else:
        problem = f"UDP is blocked here, or the STUN servers are down: none answers ({names})"
    if relays:
        return Obstacle("udp", problem, "peers are reached by the relay; let UDP out to do without")
    return Obstacle("udp", problem, f"let UDP out, or {_have_a_relay(turn)}")


def _have_a_relay(turn: bool) -> str:
    if turn:
        return "have a TURN server of [ice] serve us, martlet status says why none does"
    return f"add a relay: {RELAY_LINE}"


def knocked(remote: Address) -> Obstacle:
    """Somebody dials who does not know our public key."""
    return Obstacle(
        "stranger",
        f"a martlet at {remote} dials this host and takes it for another: it has a wrong public_key"
        " for us",
        "if that is a peer of yours, the right one is printed by martlet pubkey here",
    )


def unknown_key(key: str, remote: Address) -> Obstacle:
    """Somebody dials who knows our key, and whom nobody here knows."""
    return Obstacle(
        "stranger",
        f"a martlet at {remote} dials this host, and no [[peer]] has its public key, {key}",
        "if martlet pubkey prints that at a peer of yours, correct its public_key here",
    )


def obstacles(
    *,
    here: Here,
    endpoints: Sequence[Endpoint],
    resolved: Collection[Address],
    refusal: Refusal | None,
    meeting: Mapping[str, Any] | None,
    agent: Agent,
) -> list[Obstacle]:
    """What is in the way of a peer, the likeliest first. `meeting` is its part of the rendezvous'
    status, None without one."""
    if not here.network:
        return [
            Obstacle(
                "network",
                "this host has no network: there is no address that a peer could be reached from",
                "martlet doctor tells why an address is not used",
            )
        ]
    found: list[Obstacle] = []
    if refusal is not None:
        found.append(_refused(refusal))
    if here.udp is not None and not here.relayed:
        found.append(here.udp)
    if endpoints and refusal is None:
        found.append(_dialled(endpoints, resolved))
    if meeting is not None:
        found += _not_met(here, meeting, agent)
    elif not endpoints and refusal is None:
        found.append(
            Obstacle(
                "endpoint",
                "it has no endpoint here, and there is no [rendezvous]: it has to dial us, or to be"
                " on the same link",
                'if it cannot: endpoint = "HOST:4117" in its [[peer]], or a [rendezvous]',
            )
        )
    return found


def _refused(refusal: Refusal) -> Obstacle:
    if refusal.code == BAD_CERTIFICATE:
        return Obstacle(
            "key",
            "it answers, and refuses our public key",
            "correct public_key in its [[peer]] for us: martlet pubkey prints it here",
        )
    reason = refusal.reason or f"connection error {refusal.code:#x}"
    return Obstacle("refused", f"it answers, and refuses us: {reason}", "see its log")


def _dialled(endpoints: Sequence[Endpoint], resolved: Collection[Address]) -> Obstacle:
    names = ", ".join(map(str, endpoints))
    if not resolved:
        host = next(str(e.host) for e in endpoints if e.ip is None)
        return Obstacle("name", f"no address is known for {names}", f"try: getent hosts {host}")
    return Obstacle(
        "dialled",
        f"it was dialled at {names}, and did not answer so far",
        "is martlet up there, does UDP get to that port, and has each end the other's public_key?"
        " Compare: martlet pubkey",
    )


def _not_met(here: Here, meeting: Mapping[str, Any], agent: Agent) -> Iterator[Obstacle]:
    if not meeting["connected"]:
        yield Obstacle(
            "broker", "no broker of [rendezvous] serves us at the moment", "martlet status says why"
        )
    elif meeting["heard_s"] is None:
        yield Obstacle(
            "unheard",
            "it was not heard of at the rendezvous: it is not up, or uses another broker, or one of"
            " the two has a wrong key",
            "compare url in [rendezvous] of both ends, and public_key in [[peer]] of each with"
            " martlet pubkey at the other",
        )
    elif not meeting["present"] or meeting["heard_s"] > SILENT_FOR:
        yield Obstacle(
            "gone",
            "it does not answer at the rendezvous any more",
            "is it up, and on the network? It is looked for as soon as it is heard of",
        )
    else:
        yield from _no_way(here, agent)


def _no_way(here: Here, agent: Agent) -> Iterator[Obstacle]:
    pairs = agent.pairs()
    if any(pair.state is PairState.WARM for pair in pairs):
        return  # the handshake is under way
    named = agent.named()
    relayed = any(pair.kind is Kind.RELAY for pair in pairs)
    if named and all(each.kind is Kind.HOST and is_translated(each.address.host) for each in named):
        # It has asked no STUN server in vain here: that is told before.
        yield Obstacle(
            "udp-there",
            "it knows no address of its own that could be reached from elsewhere: UDP may be"
            " blocked over there",
            "run martlet doctor there"
            + ("" if here.relayed or relayed else f", or {_have_a_relay(here.turn)}"),
        )
        return
    if relayed:
        more, remedy = "the relay does not answer either", "martlet doctor at both ends tells more"
    elif here.turn:
        more = "no TURN server of [ice] serves us"
        remedy = "martlet status says why; a relay connects you in any case"
    else:
        more = "there is no relay"
        remedy = f"{_have_a_relay(here.turn)}; martlet doctor tells more"
    yield Obstacle(
        "no-way",
        f"none of {len(pairs)} ways to it answers: UDP is blocked over there, or the NATs of both"
        f" ends are of the hard kind, and {more}",
        remedy,
    )
