"""Findings about the configuration: alone, and against what this host has already."""

from __future__ import annotations

from collections.abc import Iterator

from tunnel.config import Config, IPNetwork
from tunnel.doctor.facts import Facts, FileFacts, RouteFacts
from tunnel.doctor.finding import Finding, State

MAX_CLASHES = 8


def judge(facts: Facts) -> Iterator[Finding]:
    if facts.config_error is not None:
        error = facts.config_error
        yield Finding(
            "config",
            State.PROBLEM,
            _place(error.file, error.line, error.key) + error.problem,
            error.remedy,
            {"file": error.file, "line": error.line, "key": error.key},
        )
    config = facts.config
    if config is None:
        return
    if facts.config_error is None:
        count = len(config.peers)
        peers = "1 peer" if count == 1 else f"{count} peers"
        yield Finding(
            "config",
            State.OK,
            f"{facts.config_path} is valid: tunnel {config.interface.name}, {peers}",
            details={"file": facts.config_path},
        )
    for file in facts.files:
        yield _file(file)
    yield from _port(facts, config)
    yield from _name(facts, config)
    yield from _clashes(facts, config)


def _place(file: str | None, line: int | None, key: str) -> str:
    place = file or ""
    if place and line is not None:
        place += f":{line}"
    return "".join(f"{part}: " for part in (place, key) if part)


def _file(file: FileFacts) -> Finding:
    details = {"path": file.path, "what": file.what}
    if file.error:
        summary = f"{file.what} {file.path}: {file.error}"
        return Finding("files", State.PROBLEM, summary, file.remedy, details)
    if file.mode is not None and file.mode & 0o077:
        return Finding(
            "files",
            State.WARNING,
            f"{file.what} {file.path} may be read by others (mode {file.mode:04o})",
            f"chmod 600 {file.path}",
            details,
        )
    return Finding(
        "files", State.OK, f"{file.what} {file.path} is there, for its owner only",
        details=details,
    )  # fmt: skip


def _is_up(facts: Facts, name: str) -> bool:
    return any(tunnel.name == name for tunnel in facts.tunnels)


def _port(facts: Facts, config: Config) -> Iterator[Finding]:
    port = config.interface.listen_port
    if port is None:
        return
    taken = facts.network.port_taken
    details = {"port": port, "taken_on": list(taken)}
    if _is_up(facts, config.interface.name):
        yield Finding(
            "port", State.OK, f"UDP port {port} is that of the running tunnel", details=details
        )
    elif taken:
        yield Finding(
            "port",
            State.PROBLEM,
            f"UDP port {port} (listen_port) is in use by another program on {', '.join(taken)}",
            f"see by whom: ss -lunp 'sport = :{port}'; stop it, or change interface.listen_port",
            details,
        )
    else:
        yield Finding("port", State.OK, f"UDP port {port} is free", details=details)


def _name(facts: Facts, config: Config) -> Iterator[Finding]:
    name = config.interface.name
    link = next((link for link in facts.network.links if link.name == name), None)
    if link is None or _is_up(facts, name):
        return
    if link.martlet:
        yield Finding(
            "name",
            State.WARNING,
            f"there is an interface {name} of martlet's, but no tunnel answers for it here",
            f"if it is a leftover: ip link delete {name}",
        )
        return
    kind = f" of kind {link.kind}" if link.kind else ""
    yield Finding(
        "name",
        State.PROBLEM,
        f"an interface {name}{kind} exists that is not martlet's",
        f"take another name in [interface], or, if nobody needs it: ip link delete {name}",
    )


def _clashes(facts: Facts, config: Config) -> Iterator[Finding]:
    name = config.interface.name
    found: list[Finding] = []
    for address in config.interface.address:
        holders = [
            a.interface
            for a in facts.network.addresses
            if a.ip == str(address.ip) and a.interface != name
        ]
        if holders:
            found.append(
                Finding(
                    "clash",
                    State.PROBLEM,
                    f"{address.ip}, this host's address in the tunnel, is also that of"
                    f" {_what(facts, holders[0])}",
                    "take another address in [interface]",
                    {"address": str(address), "interface": holders[0]},
                )
            )
    inner: dict[IPNetwork, str] = {}
    for own in config.interface.address:
        inner[own.network] = f"{own.network} ([interface] address)"
    allowed = [(network, peer) for peer in config.peers for network in peer.allowed_ips]
    for network, peer in sorted(allowed, key=lambda pair: pair[0].prefixlen):
        inner.setdefault(network, f"{network} (allowed_ips of {peer.name})")
    others = [route for route in facts.network.routes if route.interface != name]
    reported: set[tuple[IPNetwork, str]] = set()
    for network, whose in inner.items():
        for route in others:
            clash = _clash(facts, network, whose, route)
            # Widest first: that a part of it clashes with the same route is no news.
            if clash is not None and (route.network, route.interface) not in reported:
                reported.add((route.network, route.interface))
                found.append(clash)
    if found:
        yield from sorted(found, key=lambda finding: -finding.state)[:MAX_CLASHES]
    else:
        yield Finding(
            "clash", State.OK, "the tunnel's addresses and allowed_ips clash with no route here"
        )


def _clash(facts: Facts, network: IPNetwork, whose: str, route: RouteFacts) -> Finding | None:
    other = route.network
    if other.prefixlen == 0 or other.version != network.version or not network.overlaps(other):
        return None
    device = _what(facts, route.interface)
    details = {"network": str(network), "route": str(other), "interface": route.interface}
    if network == other:
        return Finding(
            "clash",
            State.PROBLEM,
            f"{whose} is routed to {device} already",
            "number one of the two networks anew, or narrow allowed_ips",
            details,
        )
    if network.prefixlen > other.prefixlen:
        return Finding(
            "clash",
            State.WARNING,
            f"{whose} lies inside {other} of {device}: the tunnel takes these addresses from it",
            "harmless if nothing there has such an address; else choose a network of your own",
            details,
        )
    return Finding(
        "clash",
        State.WARNING,
        f"{other} of {device} lies inside {whose}: packets to it do not enter the tunnel",
        f"narrow allowed_ips, or number {other} anew",
        details,
    )


def _what(facts: Facts, interface: str) -> str:
    ours = any(link.name == interface and link.martlet for link in facts.network.links)
    return f"tunnel {interface}" if ours else interface
