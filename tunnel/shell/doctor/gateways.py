"""Asks home routers whether they would open a port, without having one opened.

PCP's ANNOUNCE and NAT-PMP's question for the external address change nothing at the router; nor
does looking for it by UPnP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from urllib.parse import urlsplit

import miniupnpc

from tunnel.doctor.facts import PortMappingFacts
from tunnel.ice import pcp
from tunnel.ice.portmap import is_translated
from tunnel.path.network import LocalNetwork, canonical_ip
from tunnel.shell.doctor.threads import in_thread
from tunnel.shell.udp import SOCKET_MARK

WAITS = (0.25, 0.5, 1.0)
"""Seconds after each try (RFC 6886 section 3.1 begins with 250 ms): the router is one hop away."""
UPNP_DISCOVERY = 1500  # milliseconds that routers get to answer
MAX_GATEWAYS = 4

PCP, NATPMP, UPNP = "PCP", "NAT-PMP", "UPnP"


async def ask(network: LocalNetwork, limit: float) -> tuple[PortMappingFacts, ...]:
    """Each gateway once, from the first local address that it translates."""
    asked: dict[str, str] = {}
    for local in network.addresses:
        gateway = network.gateway(local)
        if gateway and ":" not in local.ip and is_translated(local.ip):
            asked.setdefault(gateway, local.ip)
    found = await asyncio.gather(
        *(_ask(gateway, ip, limit) for gateway, ip in list(asked.items())[:MAX_GATEWAYS])
    )
    return tuple(found)


async def _ask(gateway: str, ip: str, limit: float) -> PortMappingFacts:
    upnp = asyncio.create_task(_upnp(gateway, ip, limit))
    protocols, external = await _pcp(gateway, ip)
    upnp_external = await upnp
    if upnp_external is not None:
        protocols = (*protocols, UPNP)
        external = external or upnp_external or None
    return PortMappingFacts(gateway=gateway, protocols=protocols, external=external)


async def _pcp(gateway: str, ip: str) -> tuple[tuple[str, ...], str | None]:
    """Which of PCP and NAT-PMP it speaks, and its external address."""
    loop = asyncio.get_running_loop()
    spoken: set[str] = set()
    external: str | None = None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as udp:
        udp.setblocking(False)
        with contextlib.suppress(OSError):  # only for the privileged; it works without, too
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
        try:
            udp.bind((ip, 0))
            udp.connect((gateway, pcp.PORT))
            for wait in WAITS:
                until = loop.time() + wait
                for name, question in ((PCP, pcp.pcp_announce(ip)), (NATPMP, pcp.natpmp_address())):
                    if name not in spoken:
                        udp.send(question)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        while len(spoken) < 2:
                            answer = pcp.read(await loop.sock_recv(udp, pcp.LARGEST))
                            if isinstance(answer, pcp.Announced):
                                spoken.add(PCP)
                            elif isinstance(answer, pcp.External) and answer.result == 0:
                                spoken.add(NATPMP)
                                external = answer.host
        except OSError:  # refused: nobody listens there
            pass
    return tuple(sorted(spoken, reverse=True)), external


async def _upnp(gateway: str, ip: str, limit: float) -> str | None:
    """Its external address, "" if it tells none; None where no router maps by UPnP."""

    def look() -> str | None:
        found = miniupnpc.UPnP(multicastif=ip, discoverdelay=UPNP_DISCOVERY)
        if not found.discover():
            return None
        if urlsplit(found.selectigd()).hostname != gateway:
            return None  # others on the link may say they are one
        try:
            return canonical_ip(found.externalipaddress())
        except ValueError:
            return ""

    try:
        async with asyncio.timeout(limit):
            return await in_thread(look)
    except Exception:  # miniupnpc raises nothing more specific where there is none
        return None
