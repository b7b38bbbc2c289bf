"""The single values of a configuration: what each string may be, and what it becomes.

Every parser and check takes the string and returns the value, or raises
ValueError("problem; remedy"), without the remedy where an example says enough.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct

IPNetwork: TypeAlias = IPv4Network | IPv6Network
IPInterface: TypeAlias = IPv4Interface | IPv6Interface

# IFNAMSIZ is 16 with the terminating zero; dev_valid_name() in the kernel refuses '/', ':' and
# blanks. A leading dash or dot would be taken for an option or a hidden file.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=+.-]{0,14}")
_PEER_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")  # RFC 1123 section 2.1
_TURN_URL = re.compile(r"turns?:([^?]+)(\?transport=(udp|tcp))?")  # RFC 7065 section 3.1
_TURN_PORT, _TURNS_PORT = 3478, 5349  # RFC 7065 section 3.2
MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
"""Schemes of a broker's URL (MQTT over TCP, TLS, WebSocket, WebSocket in TLS): default ports."""
_NO_MQTT_URL = "this is not an mqtt://, mqtts://, ws:// or wss:// URL"
_INTERFACE_PATTERN = re.compile(r"[^\s/]{1,64}")


class Endpoint(Struct, frozen=True):
    """Where to reach something over UDP or TCP: an IP literal (canonical) or a host name."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parse "host:port", "192.0.2.1:port" or "[2001:db8::1]:port". Raises ValueError."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not bracketed and ":" in host:
            raise ValueError("an IPv6 address needs brackets and a port: [2001:db8::1]:4117")
        if not colon or not (port.isascii() and port.isdigit()):
            raise ValueError("the port is missing: write host:port")
        if len(port) > 5 or not 1 <= int(port) <= 65535:
            raise ValueError(f"{port} is not a port; ports are 1 to 65535")
        if bracketed:
            return cls(_parse_ipv6(host[1:-1]), int(port))
        return cls(_parse_host(host), int(port))

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The address, or None where `host` is a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_interface_name(value: str) -> str:
    if not _INTERFACE_NAME.fullmatch(value):
        raise ValueError("this is not an interface name; use 1 to 15 letters, digits and _ = + . -")
    if value in ("lo", "all", "default"):
        raise ValueError("the kernel uses this name itself; choose another, such as mt0")
    return value


def check_peer_name(value: str) -> str:
    if not _PEER_NAME.fullmatch(value) or len(value) > 64:
        raise ValueError("this is not a peer name; use 1 to 64 letters, digits and . _ -")
    return value


def parse_interface_address(value: str) -> IPInterface:
    try:
        if "%" in value:
            raise ValueError
        address = ipaddress.ip_interface(value)
    except ValueError:
        raise ValueError("this is not an IP address with a prefix length") from None
    _refuse_special(address.ip)
    return address


def parse_network(value: str) -> IPNetwork:
    try:
        if "%" in value:
            raise ValueError
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError("this is not an IP network such as 10.88.0.2/32") from None
    given = ipaddress.ip_interface(value).ip
    if given != network.network_address:
        single = f"{given}/{network.max_prefixlen}"
        raise ValueError(
            f"it has bits set beyond its prefix length; write {network}, or {single} for one host"
        )
    if network.prefixlen > 0 and (
        network.is_loopback or network.is_multicast or network.is_link_local
    ):
        raise ValueError("such addresses cannot be routed; write the networks behind the peer")
    return network


def parse_peer_endpoint(value: str) -> Endpoint:
    endpoint = Endpoint.parse(value)
    if endpoint.ip is not None:
        _refuse_special(endpoint.ip)
    return endpoint


def parse_advertised(value: str) -> Endpoint:
    endpoint = parse_peer_endpoint(value)
    if endpoint.ip is None:
        raise ValueError("this is a host name; write the public IP address and port")
    return endpoint


def _refuse_special(ip: IPv4Address | IPv6Address) -> None:
    if ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local:
        raise ValueError("loopback, multicast, link-local and zero addresses cannot be used here")


def _parse_ipv6(text: str) -> str:
    try:
        if "%" in text:
            raise ValueError
        return str(IPv6Address(text))
    except ValueError:
        raise ValueError("there is no valid IPv6 address in the brackets") from None


def _parse_host(text: str) -> str:
    """A host name in lower case, or an IPv4 address."""
    try:
        return str(IPv4Address(text))
    except ValueError:
        pass
    if not text.isascii():
        raise ValueError("the host name is not ASCII; write its xn-- form")
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise ValueError("this is neither a host name nor an IP address")
    if labels[-1].isdigit():
        raise ValueError("this is not a valid IPv4 address")
    return text.lower()


def check_mqtt_url(value: str) -> str:
    try:
        url = urlsplit(value)
        valid = url.scheme in MQTT_PORTS and bool(url.hostname) and url.port != 0
    except ValueError:
        raise ValueError(_NO_MQTT_URL) from None
    if not valid:
        raise ValueError(_NO_MQTT_URL)
    if url.username is not None:
        raise ValueError(
            "it has a user name in it; write rendezvous.username and password_file instead"
        )
    if (url.path not in ("", "/") and not url.scheme.startswith("ws")) or url.query or url.fragment:
        raise ValueError("nothing may follow the port of such a URL")
    return value


def check_turn_url(value: str) -> str:
    parse_turn_url(value)
    return value


def parse_turn_url(value: str) -> tuple[Endpoint, tuple[str, ...]]:
    """Where a TURN server is, and how it is reached, "udp", "tcp" or "tls", in the order of trial.

    Of a turn: URL that does not say, TCP is tried where UDP is not answered.
    """
    found = _TURN_URL.fullmatch(value)
    if not found:
        raise ValueError("this is not a turn: or turns: URL")
    secure = value.startswith("turns:")
    # The port is optional here (RFC 7065 section 3.2).
    has_port = re.search(r":\d+$", found[1]) and not found[1].endswith("]")
    port = _TURNS_PORT if secure else _TURN_PORT
    endpoint = Endpoint.parse(found[1] if has_port else f"{found[1]}:{port}")
    if secure:
        return endpoint, ("tls",)
    return endpoint, (found[3],) if found[3] else ("udp", "tcp")


def check_interface_pattern(value: str) -> str:
    if not _INTERFACE_PATTERN.fullmatch(value):
        raise ValueError("this is not an interface name or pattern")
    return value
