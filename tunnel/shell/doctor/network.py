"""Asks the kernel for its links, addresses and routes, and the firewall for its rules."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Literal

from tun.linux import ALIAS
from tun.netlink import Netlink as Conversation
from tun.netlink import NetlinkError, converse
from tunnel.doctor.facts import AddressFacts, FirewallFacts, LinkFacts, NetworkFacts, RouteFacts
from tunnel.path.network import LocalNetwork
from tunnel.shell.netmon import ALWAYS_EXCLUDED, Netlink

FIREWALL_TIMEOUT = 2.0  # seconds for `nft` to list its rules, of which there may be thousands
FIREWALL_BYTES = 8 << 20

_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000  # <linux/if.h>
_TENTATIVE, _DADFAILED, _DEPRECATED = 0x40, 0x08, 0x20  # <linux/if_addr.h>
_UNICAST, _MAIN = 1, 254  # <linux/rtnetlink.h>
_SYSCTL = Path("/proc/sys/net")


def gather(own: str, exclude: Sequence[str], port: int | None) -> NetworkFacts:
    """`own` is the tunnel's interface, "" without one; `exclude` the patterns of its
    configuration; `port` the one it wants. Blocks for some milliseconds.
    """
    try:
        monitor = Netlink(own, exclude)
        try:
            usable = monitor.snapshot()
        finally:
            monitor.close()
        links, addresses, routes = converse(_dump)
    except (OSError, NetlinkError) as error:
        return NetworkFacts(error=str(error), ipv6=_ipv6())
    by_index = {link["index"]: _link(link) for link in links}
    patterns = (*ALWAYS_EXCLUDED, *exclude)
    return NetworkFacts(
        links=tuple(by_index.values()),
        addresses=tuple(
            _address(address, by_index[address["index"]], usable, own, patterns)
            for address in addresses
            if address["index"] in by_index
        ),
        routes=tuple(_routes(routes, by_index)),
        usable=usable,
        rp_filter=_rp_filter(link.name for link in by_index.values()),
        ipv6=_ipv6(),
        port_taken=_taken(usable, port),
    )


def _dump(netlink: Conversation) -> tuple[list[Any], list[Any], list[Any]]:
    routes = [
        route
        for family in (socket.AF_INET, socket.AF_INET6)
        for route in netlink.get_routes(family=family, table=_MAIN)
    ]
    return list(netlink.get_links()), list(netlink.get_addr()), routes


def _link(link: Any) -> LinkFacts:
    info = link.get_attr("IFLA_LINKINFO")
    flags = link["flags"]
    return LinkFacts(
        name=link.get_attr("IFLA_IFNAME") or "",
        mtu=link.get_attr("IFLA_MTU") or 0,
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        loopback=bool(flags & _IFF_LOOPBACK),
        martlet=link.get_attr("IFLA_IFALIAS") == ALIAS,
        kind=(info.get_attr("IFLA_INFO_KIND") if info is not None else "") or "",
    )


def _address(
    address: Any, link: LinkFacts, usable: LocalNetwork, own: str, patterns: Sequence[str]
) -> AddressFacts:
    ip = ip_address(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"))
    flags = address.get_attr("IFA_FLAGS") or address["flags"]
    why = ""
    if not any(a.ip == str(ip) and a.interface == link.name for a in usable.addresses):
        pattern = next((each for each in patterns if fnmatchcase(link.name, each)), None)
        reasons = (
            ("loopback", link.loopback or ip.is_loopback),
            ("a tunnel", link.martlet or link.name == own),
            ("link-local", ip.is_link_local),
            (f"excluded by {pattern}", pattern is not None),
            ("the link is down", not link.up),
            ("no carrier", not link.carrier),
            ("somebody else has it", bool(flags & _DADFAILED)),
            ("not yet known to be unique", bool(flags & _TENTATIVE)),
            ("deprecated", bool(flags & _DEPRECATED)),
            ("not operational", True),
        )
        why = next(reason for reason, applies in reasons if applies)
    return AddressFacts(ip=str(ip), interface=link.name, why_not=why)


def _routes(routes: Iterable[Any], by_index: dict[int, LinkFacts]) -> Iterable[RouteFacts]:
    for route in routes:
        if route["type"] != _UNICAST or (route.get_attr("RTA_TABLE") or route["table"]) != _MAIN:
            continue
        anywhere = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
        network = ip_network((route.get_attr("RTA_DST") or anywhere, route["dst_len"]))
        if network.is_link_local or network.is_multicast:
            continue
        ways = [(route.get_attr("RTA_OIF"), route.get_attr("RTA_GATEWAY"))]
        for hop in route.get_attr("RTA_MULTIPATH") or ():
            ways.append((hop["oif"], hop.get_attr("RTA_GATEWAY")))
        for index, gateway in ways:
            if index in by_index:
                yield RouteFacts(
                    network=network,
                    interface=by_index[index].name,
                    gateway=gateway,
                    metric=route.get_attr("RTA_PRIORITY") or 0,
                )


def _rp_filter(names: Iterable[str]) -> dict[str, int]:
    """The larger of "all" and the interface's counts (networking/ip-sysctl.rst)."""
    everywhere = _number(_SYSCTL / "ipv4/conf/all/rp_filter")
    return {
        name: max(everywhere, _number(_SYSCTL / "ipv4/conf" / name / "rp_filter")) for name in names
    }


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _ipv6() -> Literal["on", "off", "absent"]:
    if not (_SYSCTL / "ipv6").is_dir():
        return "absent"
    return "off" if _number(_SYSCTL / "ipv6/conf/all/disable_ipv6") else "on"


def _taken(usable: LocalNetwork, port: int | None) -> tuple[str, ...]:
    taken: list[str] = []
    for ip in dict.fromkeys(address.ip for address in usable.addresses) if port else ():
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((ip, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    taken.append(ip)
    return tuple(taken)


# the firewall


async def firewall(port: int | None) -> FirewallFacts | None:
    """What drops on the way in; None where nobody may see the rules."""
    listed = await _output("nft", "-j", "list", "ruleset")
    if listed is not None:
        return read_nft(listed, port)
    listed = await _output("iptables", "-S", "INPUT")
    return None if listed is None else read_iptables(listed, port)


def read_nft(text: str, port: int | None) -> FirewallFacts | None:
    """Of `nft -j list ruleset` (libnftables-json(5))."""
    try:
        objects = json.loads(text)["nftables"]
        chains = [each["chain"] for each in objects if "chain" in each]
        rules = [each["rule"] for each in objects if "rule" in each]
        dropping = [
            chain
            for chain in chains
            if chain.get("hook") == "input"
            and chain.get("type") == "filter"
            and (chain.get("policy") == "drop" or _drops_at_the_end(chain, rules))
        ]
        tables = {(chain["family"], chain["table"]) for chain in dropping}
        accepts = any(
            (rule["family"], rule["table"]) in tables and _matches_port(rule["expr"], port)
            for rule in rules
        )
        names = tuple(f"{chain['family']} {chain['table']} {chain['name']}" for chain in dropping)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # an nft that we do not understand
    return FirewallFacts(by="nft", chains=names, accepts_port=accepts)


def read_iptables(text: str, port: int | None) -> FirewallFacts:
    """Of `iptables -S INPUT`."""
    lines = text.splitlines()
    last = lines[-1] if lines else ""
    drops = "-P INPUT DROP" in lines or re.fullmatch(r"-A INPUT -j (DROP|REJECT).*", last)
    accepts = any(
        re.search(rf"-p udp .*--dport {port}( |$).*-j ACCEPT", line) for line in lines
    )  # fmt: skip
    return FirewallFacts(
        by="iptables", chains=("INPUT",) if drops else (), accepts_port=bool(accepts)
    )


def _drops_at_the_end(chain: Any, rules: Iterable[Any]) -> bool:
    place = (chain["family"], chain["table"], chain["name"])
    mine = [r["expr"] for r in rules if (r["family"], r["table"], r["chain"]) == place]
    if not mine:
        return False
    kinds = {kind for statement in mine[-1] for kind in statement}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _matches_port(expressions: Iterable[Any], port: int | None) -> bool:
    """Whether a rule asks for this UDP port, and does not drop."""
    asks = False
    for statement in expressions:
        if "drop" in statement or "reject" in statement:
            return False
        match = statement.get("match")
        payload = match["left"].get("payload", {}) if match is not None else {}
        if payload.get("field") == "dport" and payload.get("protocol") in ("udp", "th"):
            asks |= _contains(match["right"], port)
    return asks


def _contains(right: Any, port: int | None) -> bool:
    if isinstance(right, int):
        return right == port
    if isinstance(right, list):
        return any(_contains(each, port) for each in right)
    if isinstance(right, dict) and "set" in right:
        return _contains(right["set"], port)
    if isinstance(right, dict) and "range" in right and port is not None:
        low, high = right["range"]
        return bool(low <= port <= high)
    return False


async def _output(*argv: str) -> str | None:
    """What a command prints; None when there is none, or it fails, or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    assert process.stdout is not None
    output = b""
    try:
        async with asyncio.timeout(FIREWALL_TIMEOUT):
            while chunk := await process.stdout.read(1 << 16):
                output += chunk
                if len(output) > FIREWALL_BYTES:
                    return None
            return output.decode(errors="replace") if await process.wait() == 0 else None
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
