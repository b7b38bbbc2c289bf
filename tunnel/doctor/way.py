"""Findings about the way to peers: UDP, NATs, and the servers that help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunnel.doctor.facts import Facts, ServerFacts, StunFacts
from tunnel.doctor.finding import Finding, Nat, State
from tunnel.doctor.network import family
from tunnel.ice.behaviour import Filtering, Mapping, is_cgnat
from tunnel.ice.portmap import is_translated
from tunnel.obstacle import RELAY_LINE, broker_remedy, relay_remedy

_MAPPED = {
    Mapping.ADDRESS_DEPENDENT: "maps each host to another port",
    Mapping.ADDRESS_AND_PORT_DEPENDENT: "maps each destination to another port",
}
_LETS_IN = {
    Filtering.ENDPOINT_INDEPENDENT: "lets anybody in",
    Filtering.ADDRESS_DEPENDENT: "lets in whom this host has written to, from any port",
    Filtering.ADDRESS_AND_PORT_DEPENDENT: "lets in only whom this host has written to",
}


def judge(facts: Facts) -> Iterator[Finding]:
    yield from _udp(facts)
    yield from _nats(facts)
    yield from _cgnat(facts)
    yield from _port_mapping(facts)
    yield from _stun(facts)
    yield from _relays(facts.turn)
    yield from _brokers(facts.brokers)


def has_relay(facts: Facts) -> bool:
    """Whether some TURN server let us in."""
    return any(not server.error for server in facts.turn)


def udp_is_blocked(facts: Facts) -> bool:
    """Whether no server answered over UDP on any address."""
    silent = bool(facts.nats) and all(nat.behaviour.udp_blocked for nat in facts.nats)
    return silent and not _relayed_by_udp(facts)


def _relayed_by_udp(facts: Facts) -> bool:
    return any(server.transport == "udp" and not server.error for server in facts.turn)


def is_hard(facts: Facts) -> bool:
    """Whether every address that reaches the Internet is behind a hard NAT."""
    reached = [nat.behaviour for nat in facts.nats if not nat.behaviour.udp_blocked]
    return bool(reached) and all(behaviour.mapping.hard for behaviour in reached)


def _place(nat: Nat) -> str:
    return f"{nat.interface} ({family(nat.behaviour.local.host)})"


def _udp(facts: Facts) -> Iterator[Finding]:
    if not facts.nats:
        return
    silent = [_place(nat) for nat in facts.nats if nat.behaviour.udp_blocked]
    works = [_place(nat) for nat in facts.nats if not nat.behaviour.udp_blocked]
    details = {"works": works, "silent": silent}
    if works:
        yield Finding("udp", State.OK, f"UDP gets out and back by {', '.join(works)}", "", details)
        if silent:
            yield Finding(
                "udp", State.NOTE, f"no STUN server answers by {', '.join(silent)}", details=details
            )
        return
    if _relayed_by_udp(facts):
        yield Finding(
            "udp",
            State.WARNING,
            "no STUN server answers, though UDP gets to the TURN server and back: peers behind NATs"
            " may not be reached directly",
            'check stun = ["HOST:3478"] in [ice]',
            details,
        )
        return
    hosts = {server.address.host for nat in facts.nats for server in nat.behaviour.servers}
    others = any(not server.error for server in (*facts.brokers, *facts.turn))
    if all(stun.implied for stun in facts.stun):
        yield Finding(
            "udp",
            State.WARNING,
            "there is no STUN server on the broker's host, or UDP is blocked: peers behind NATs"
            " may not be reached",
            'stun = ["HOST:3478"] in [ice]',
            details,
        )
        return
    if len(hosts) > 1 or others:
        summary = "UDP is blocked here: no STUN server answers" + (
            ", but other servers do" if others else ""
        )
    else:
        summary = "the STUN server does not answer: it is down, or UDP is blocked here"
    if has_relay(facts):
        yield Finding(
            "udp", State.WARNING, f"{summary}; peers are reached by the relay", "", details
        )
    else:
        remedy = f"let UDP out in the firewall, or add a relay: {RELAY_LINE}"
        yield Finding("udp", State.PROBLEM, summary, remedy, details)


def _nats(facts: Facts) -> Iterator[Finding]:
    if not facts.nats:
        if facts.network.usable.addresses and not facts.stun:
            yield Finding(
                "nat",
                State.NOTE,
                "what NAT is in the way was not examined: no STUN server is known",
                "martlet doctor --stun HOST:3478",
            )
        return
    for nat in facts.nats:
        if not nat.behaviour.udp_blocked:
            yield _nat(facts, nat)


def _nat(facts: Facts, nat: Nat) -> Finding:
    found = nat.behaviour
    place = _place(nat)
    lets_in = _LETS_IN.get(found.filtering, "")
    details = nat.as_json()
    if found.mapping is Mapping.NO_NAT:
        if found.filtering is Filtering.ENDPOINT_INDEPENDENT:
            summary = "no NAT, no firewall: peers reach this host directly"
        elif lets_in:
            summary = f"no NAT, a firewall {lets_in}: direct connections are likely"
        else:
            summary = "no NAT: direct connections are likely"
        return Finding("nat", State.OK, f"{place}: {summary}", details=details)
    if found.mapping is Mapping.ENDPOINT_INDEPENDENT:
        more = f" (it {lets_in})" if lets_in else ""
        return Finding(
            "nat",
            State.OK,
            f"{place}: easy NAT{more}: direct connections are likely",
            details=details,
        )
    if found.mapping.hard:
        summary = (
            f"{place}: hard NAT: {_MAPPED[found.mapping]}; direct only to peers with easy NATs,"
            " else by relay"
        )
        if has_relay(facts):
            return Finding("nat", State.NOTE, summary, details=details)
        summary += ", and there is none"
        if not is_hard(facts):
            return Finding("nat", State.NOTE, summary, details=details)
        return Finding(
            "nat",
            State.WARNING,
            summary,
            f"add a relay: {RELAY_LINE};"
            ' or forward a UDP port of the router and tell it: advertise = ["PUBLIC-IP:PORT"]',
            details,
        )
    if found.mapped is None:
        summary = f"{place}: the STUN server does not tell which address it sees"
        return Finding("nat", State.WARNING, summary, "use another STUN server", details)
    return Finding(
        "nat",
        State.NOTE,
        f"{place}: behind a NAT, seen as {found.mapped.host}; which kind takes a second STUN server"
        " to tell, or one with two addresses (RFC 5780)",
        'stun = ["ONE:3478", "ANOTHER:3478"] in [ice]',
        details,
    )


def _cgnat(facts: Facts) -> Iterator[Finding]:
    external = next((gateway.external for gateway in facts.port_mapping if gateway.external), None)
    behind = []
    for nat in facts.nats:
        mapped = nat.behaviour.mapped
        host = None if mapped is None else mapped.host
        local = nat.behaviour.local.host
        # What a gateway says of itself concerns the address behind it; here there is mostly one.
        router = external if ":" not in local and is_translated(local) else None
        if nat.behaviour.cgnat or is_cgnat(local, host, router):
            behind.append(nat.interface)
    if not behind:
        return
    advertised = facts.config.ice.advertise if facts.config is not None else ()
    summary = (
        f"the provider translates addresses, too (CGNAT, by {', '.join(dict.fromkeys(behind))}):"
        " a port forward of the router does not reach this host"
    )
    details = {"interfaces": behind, "router": external}
    if advertised:
        yield Finding(
            "cgnat",
            State.WARNING,
            summary,
            "advertise in [ice] is likely of no use: take it out, or ask the provider for a public"
            " address",
            details,
        )
    else:
        yield Finding("cgnat", State.NOTE, summary, details=details)


def _port_mapping(facts: Facts) -> Iterator[Finding]:
    for gateway in facts.port_mapping:
        details = {
            "gateway": gateway.gateway,
            "protocols": list(gateway.protocols),
            "external": gateway.external,
        }
        if gateway.protocols:
            seen = f", its address outside is {gateway.external}" if gateway.external else ""
            summary = (
                f"the router {gateway.gateway} opens ports when asked"
                f" ({', '.join(gateway.protocols)}){seen}"
            )
            yield Finding("port-mapping", State.OK, summary, details=details)
        else:
            yield Finding(
                "port-mapping",
                State.NOTE,
                f"the router {gateway.gateway} opens no ports when asked (PCP, NAT-PMP, UPnP)",
                details=details,
            )


def _stun(facts: Facts) -> Iterator[Finding]:
    for stun in facts.stun:
        if not stun.addresses:
            continue  # its name could not be resolved, which is a finding of its own
        times = _times(facts, stun)
        details = {
            "server": str(stun.endpoint),
            "rtt_ms": {address: None if t is None else t * 1000 for address, t in times.items()},
        }
        answered = [time for time in times.values() if time is not None]
        if answered:
            best = min(answered)
            yield Finding(
                "stun", State.OK, f"{stun.endpoint} answers in {_ms(best)}", details=details
            )
        elif not times:
            yield Finding(
                "stun",
                State.WARNING,
                f"{stun.endpoint} was not asked: no usable address has a route to it, or four"
                " others were asked before",
                details=details,
            )
        elif udp_is_blocked(facts):
            continue  # said once, of them all
        elif stun.implied:
            yield Finding(
                "stun", State.NOTE, f"no STUN server on the broker's host {stun.endpoint}",
                details=details,
            )  # fmt: skip
        else:
            yield Finding(
                "stun",
                State.WARNING,
                f"{stun.endpoint} does not answer",
                f"take it out of [ice] stun, or see whether it runs: nc -zu {stun.endpoint.host}"
                f" {stun.endpoint.port}",
                details,
            )


def _times(facts: Facts, stun: StunFacts) -> dict[str, float | None]:
    """The round trips to its addresses, the best from any of ours; in seconds."""
    times: dict[str, float | None] = {}
    for nat in facts.nats:
        for server in nat.behaviour.servers:
            if server.address in stun.addresses:
                known = times.get(str(server.address))
                candidates = [t for t in (known, server.rtt) if t is not None]
                times[str(server.address)] = min(candidates, default=None)
    return times


def _brokers(servers: Sequence[ServerFacts]) -> Iterator[Finding]:
    works = any(not server.error for server in servers)
    for server in servers:
        name = f"broker {server.url}"
        details = _details(server)
        if not server.error:
            summary = f"{name} lets us in{_took(server)}"
            yield Finding("broker", State.OK, summary, details=details)
            continue
        state = State.WARNING if works else State.PROBLEM
        summary = f"{name}: {server.error}" + ("; another serves" if works else "")
        yield Finding("broker", state, summary, broker_remedy(server.reason), details)


def _relays(servers: Sequence[ServerFacts]) -> Iterator[Finding]:
    """One for each way to each server; ways that fail alike are one."""
    works = any(not server.error for server in servers)
    alike: dict[tuple[str, str], list[ServerFacts]] = {}
    for server in servers:
        alike.setdefault((server.url, server.error or server.transport), []).append(server)
    for same in alike.values():
        server = same[0]
        transports = [each.transport for each in same]
        over = " and ".join(transport.upper() for transport in transports)
        name = f"TURN server {server.url}" + (f" over {over}" if over else "")
        details = _details(server) | {"transports": transports, "relayed": server.detail or None}
        if not server.error:
            summary = f"{name} relays for us at {server.detail}{_took(server)}"
            yield Finding("turn", State.OK, summary, details=details)
            continue
        state = State.WARNING if works else State.PROBLEM
        other = any(not each.error and each.url == server.url for each in servers)
        more = "; another way to it serves" if other else "; another serves" if works else ""
        summary = f"{name}: {server.error}{more}"
        yield Finding("turn", state, summary, relay_remedy(server.reason), details)


def _details(server: ServerFacts) -> dict[str, Any]:
    return {
        "url": server.url,
        "ms": None if server.seconds is None else server.seconds * 1000,
        "reason": server.reason or None,
    }


def _took(server: ServerFacts) -> str:
    return "" if server.seconds is None else f" ({_ms(server.seconds)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
