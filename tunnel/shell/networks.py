"""Which networks this host knows a way to: an address inside a tunnel must not be one of theirs."""

from __future__ import annotations

import socket
from ipaddress import ip_network

from tun.netlink import Netlink, converse
from tunnel.config import IPNetwork

_MAIN = 254  # RT_TABLE_MAIN (include/uapi/linux/rtnetlink.h)
_UNICAST = 1  # RTN_UNICAST


def networks_in_use(own: str) -> tuple[IPNetwork, ...]:
    """Where the routes of the main table lead, default routes and those into `own` left out."""
    return converse(lambda netlink: _networks(netlink, own))


def _networks(netlink: Netlink, own: str) -> tuple[IPNetwork, ...]:
    try:
        index = socket.if_nametoindex(own)
    except OSError:
        index = None  # it is not up
    found: dict[IPNetwork, None] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in netlink.get_routes(family=family, table=_MAIN):
            destination = route.get_attr("RTA_DST")
            if destination is None or route["type"] != _UNICAST:
                continue
            if index is not None and route.get_attr("RTA_OIF") == index:
                continue
            network = ip_network((destination, route["dst_len"]))
            if not network.is_link_local and not network.is_multicast:
                found[network] = None
    return tuple(found)
