"""Findings about interfaces, addresses, routes, the firewall, packet sizes and names."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from tunnel.doctor.facts import Facts, NameFacts, NetworkFacts
from tunnel.doctor.finding import Finding, State
from tunnel.ice.behaviour import QUIC_PAYLOAD

IPV6_MINIMUM = 1280  # bytes; RFC 8200 section 5
ETHERNET = 1500
SLOW_NAME = 1.0
"""Seconds: a resolver that takes longer delays every start of the tunnel."""
STRICT = 1
"""Of rp_filter (RFC 3704 section 2.2): drop what comes in by another interface than the route."""
SHOWN = 4
"""Things named in one sentence; all of them are in the details."""

_UNINTERESTING = ("loopback", "link-local", "a tunnel")


def judge(facts: Facts) -> Iterator[Finding]:
    network = facts.network
    if network.error:
        yield Finding(
            "addresses", State.WARNING, f"the kernel does not tell of its network: {network.error}"
        )
        return
    yield from _addresses(network)
    yield _routes(network)
    yield from _ipv6(facts)
    yield from _rp_filter(network)
    yield from _firewall(facts)
    yield from _mtu(facts)
    yield from _dns(facts)


def _addresses(network: NetworkFacts) -> Iterator[Finding]:
    usable = [f"{address.ip} ({address.interface})" for address in network.usable.addresses]
    excluded = [
        f"{address.ip} ({address.interface}: {address.why_not})"
        for address in network.addresses
        if address.why_not and address.why_not not in _UNINTERESTING
    ]
    details = {
        "usable": [{"ip": a.ip, "interface": a.interface} for a in network.usable.addresses],
        "excluded": [
            {"ip": a.ip, "interface": a.interface, "why": a.why_not}
            for a in network.addresses
            if a.why_not
        ],
    }
    if usable:
        yield Finding("addresses", State.OK, f"usable: {_some(usable)}", details=details)
    else:
        down = [link.name for link in network.links if not link.loopback and not link.up]
        yield Finding(
            "addresses",
            State.PROBLEM,
            "no interface has an address from which a peer could be reached",
            f"bring one up: ip link set {down[0]} up" if down else "connect this host to a network",
            details,
        )
    if excluded:
        yield Finding(
            "addresses", State.NOTE, f"not used: {_some(excluded)}", details=details
        )  # fmt: skip


def _routes(network: NetworkFacts) -> Finding:
    by_family: dict[int, list[str]] = {4: [], 6: []}
    for route in sorted(network.usable.routes, key=lambda route: route.metric):
        family = by_family[route.network.version]
        if route.network.prefixlen == 0 and route.interface not in family:
            family.append(route.interface)
    details = {"ipv4": by_family[4], "ipv6": by_family[6]}
    if not by_family[4] and not by_family[6]:
        return Finding(
            "routes",
            State.WARNING,
            "there is no default route: only peers on networks that are routed here are reached",
            "ip route add default via GATEWAY, or connect to a network that has one",
            details,
        )
    parts = [
        f"IPv{version} by {', then '.join(names)}" if names else f"no IPv{version}"
        for version, names in by_family.items()
    ]
    return Finding("routes", State.OK, f"default routes: {'; '.join(parts)}", details=details)


def _ipv6(facts: Facts) -> Iterator[Finding]:
    how = {"off": "switched off", "absent": "not in this kernel", "on": ""}[facts.network.ipv6]
    if not how:
        return
    remedy = "sysctl -w net.ipv6.conf.all.disable_ipv6=0" if facts.network.ipv6 == "off" else ""
    config = facts.config
    inner = [] if config is None else [a for a in config.interface.address if a.version == 6]
    if inner:
        yield Finding(
            "ipv6",
            State.PROBLEM,
            f"IPv6 is {how}, but [interface] address has {inner[0]}",
            f"{remedy}, or take {inner[0]} out" if remedy else f"take {inner[0]} out",
        )
    else:
        yield Finding("ipv6", State.NOTE, f"IPv6 is {how}: there are only IPv4 paths", remedy)


def _rp_filter(network: NetworkFacts) -> Iterator[Finding]:
    uplinks = [a.interface for a in network.usable.addresses if ":" not in a.ip]
    uplinks = list(dict.fromkeys(uplinks))
    strict = [name for name in uplinks if network.rp_filter.get(name) == STRICT]
    if len(uplinks) < 2 or not strict:
        return
    yield Finding(
        "rp-filter",
        State.WARNING,
        f"strict reverse path filtering drops what arrives by {_some(strict)} while another"
        " interface has the better route: backup paths may seem dead",
        "sysctl -w net.ipv4.conf.all.rp_filter=2",
        {"strict": strict, "uplinks": uplinks},
    )


def _firewall(facts: Facts) -> Iterator[Finding]:
    firewall = facts.network.firewall
    if firewall is None:
        return
    details = {"by": firewall.by, "chains": list(firewall.chains)}
    if not firewall.chains:
        yield Finding(
            "firewall", State.OK, "no rule set on the way in drops by default", details=details
        )
        return
    port = facts.config.interface.listen_port if facts.config is not None else None
    where = _some(list(firewall.chains))
    if port is None:
        yield Finding(
            "firewall",
            State.NOTE,
            f"the firewall ({where}) drops what nobody here asked for: peers are reached, but none"
            " can dial us first",
            details=details,
        )
    elif firewall.accepts_port:
        yield Finding(
            "firewall", State.OK, f"the firewall has a rule for UDP port {port}", details=details
        )
    else:
        rule = f"nft add rule {firewall.chains[0]} udp dport {port} accept"
        if firewall.by == "iptables":
            rule = f"iptables -I INPUT -p udp --dport {port} -j ACCEPT"
        yield Finding(
            "firewall",
            State.WARNING,
            f"the firewall ({where}) drops by default, and no rule was found that accepts UDP port"
            f" {port}: peers may not be able to dial us",
            rule,
            details,
        )


def _mtu(facts: Facts) -> Iterator[Finding]:
    network = facts.network
    used = dict.fromkeys(address.interface for address in network.usable.addresses)
    links = {link.name: link.mtu for link in network.links if link.name in used}
    measured: dict[str, int] = {}
    for nat in facts.nats:
        found = nat.behaviour.path_mtu
        if found is not None:
            measured[nat.interface] = min(found, measured.get(nat.interface, found))
    details = {
        name: {"link": mtu, "path": measured.get(name)} for name, mtu in sorted(links.items())
    }
    good: dict[bool, list[str]] = {True: [], False: []}  # by whether the path was measured
    for name, link in links.items():
        path = measured.get(name, link)
        least = QUIC_PAYLOAD + 28
        if min(path, link) < least:
            yield Finding(
                "mtu",
                State.WARNING,
                f"{name} carries no packets of {least} bytes, the least that QUIC needs:"
                " it can only be used by a relay over TCP",
                'add a TURN server over TLS to [ice]: turn = [{ url = "turns:HOST:443",'
                ' username = "...", password_file = "..." }]'
                if path < link
                else f"ip link set {name} mtu {ETHERNET}",
                details,
            )
        elif min(path, link) < IPV6_MINIMUM:
            yield Finding(
                "mtu",
                State.WARNING,
                f"{name} carries packets of {min(path, link)} bytes only, less than IPv6 and many"
                " applications count on",
                f"ip link set {name} mtu {ETHERNET}" if link < IPV6_MINIMUM else "",
                details,
            )
        elif path < min(link, ETHERNET):
            yield Finding(
                "mtu",
                State.NOTE,
                f"{name} takes packets of {link} bytes, but only those of {path} get through: the"
                " tunnel finds that out, and splits what is larger",
                details=details,
            )
        else:
            good[name in measured].append(f"{path} bytes on {name}")
    if good[True]:
        summary = f"packets of {_some(good[True])} get through"
        yield Finding("mtu", State.OK, summary, details=details)
    if good[False]:
        summary = f"links carry packets of {_some(good[False])}; the paths were not measured"
        yield Finding("mtu", State.OK, summary, details=details)


def _dns(facts: Facts) -> Iterator[Finding]:
    good: list[NameFacts] = []
    for name in facts.names:
        details = {
            "name": name.name,
            "used_by": list(name.used_by),
            "addresses": list(name.addresses),
            "ms": None if name.seconds is None else name.seconds * 1000,
        }
        whose = _some(list(name.used_by))
        if name.error or not name.addresses:
            yield Finding(
                "dns",
                State.PROBLEM,
                f"{name.name} ({whose}) cannot be resolved: {name.error or 'it has no address'}",
                f"check its spelling, and the resolver: getent ahosts {name.name};"
                " cat /etc/resolv.conf",
                details,
            )
        elif name.seconds is not None and name.seconds > SLOW_NAME:
            yield Finding(
                "dns",
                State.WARNING,
                f"resolving {name.name} ({whose}) took {name.seconds:.1f} s",
                "the first nameserver of /etc/resolv.conf may be dead: try another",
                details,
            )
        else:
            good.append(name)
    if good:
        slowest = max(name.seconds or 0.0 for name in good)
        names = _some([name.name for name in good])
        yield Finding(
            "dns",
            State.OK,
            f"resolved within {slowest * 1000:.0f} ms: {names}",
            details={
                name.name: {
                    "ms": None if name.seconds is None else name.seconds * 1000,
                    "addresses": list(name.addresses),
                }
                for name in good
            },
        )


def family(ip: str) -> str:
    return f"IPv{ip_address(ip).version}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
