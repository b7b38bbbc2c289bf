"""What has to be true of an interface, as an ordered list of steps. Pure: nothing is done here.

The order is that of wg-quick: properties, addresses, up, routes. Undone in reverse. A step prints
as the `ip` command that does the same, for logs and error messages.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    collapse_addresses,
)
from typing import TypeAlias

from tun.errors import TunError

Interface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network

# Packets the kernel holds for us. The queue that decides who goes first is the tunnel's own, so
# this one only bridges the moments in which the process does not read: 1000 full packets are 11 ms
# at 1 Gbit/s, about the longest pause of a busy Python process. The kernel's default is 500.
TXQUEUELEN = 1000

# include/uapi/linux/if.h: IFNAMSIZ is 16, with the final zero.
_NAME_LIMIT = 15


@dataclass(frozen=True, slots=True)
class SetProperties:
    """MTU in bytes, queue length in packets."""

    interface: str
    mtu: int
    txqueuelen: int

    def __str__(self) -> str:
        return f"ip link set {self.interface} mtu {self.mtu} txqueuelen {self.txqueuelen}"


@dataclass(frozen=True, slots=True)
class SilenceIPv6:
    """No link-local address, and so no router solicitations into the tunnel.

    Best effort: a kernel without IPv6 is silent already.
    """

    interface: str

    def __str__(self) -> str:
        return f"ip link set {self.interface} addrgenmode none"


@dataclass(frozen=True, slots=True)
class AddAddress:
    """An address with the prefix length of its link; IPv6 without duplicate address detection."""

    interface: str
    address: Interface

    def __str__(self) -> str:
        nodad = " nodad" if self.address.version == 6 else ""
        return f"ip address add {self.address} dev {self.interface}{nodad}"


@dataclass(frozen=True, slots=True)
class BringUp:
    """The link goes up, and the on-link routes of its addresses appear."""

    interface: str

    def __str__(self) -> str:
        return f"ip link set {self.interface} up"


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route straight into the interface: a TUN device has no gateways."""

    interface: str
    network: Network

    def __str__(self) -> str:
        return f"ip route add {self.network} dev {self.interface}"


Step: TypeAlias = SetProperties | SilenceIPv6 | AddAddress | BringUp | AddRoute


def plan(
    interface: str,
    addresses: Iterable[Interface],
    mtu: int,
    allowed_ips: Iterable[Network] = (),
    *,
    txqueuelen: int = TXQUEUELEN,
) -> tuple[Step, ...]:
    """The steps that give `interface` its addresses and send `allowed_ips` into it.

    Networks inside an own address's network need no route of their own: the kernel makes that one.
    Raises TunError("name" | "default_route").
    """
    check_name(interface)
    own = tuple(dict.fromkeys(addresses))
    networks = tuple(dict.fromkeys(allowed_ips))
    _refuse_default_route(networks)
    on_link = tuple(address.network for address in own)
    return (
        SetProperties(interface, mtu, txqueuelen),
        SilenceIPv6(interface),
        *(AddAddress(interface, address) for address in own),
        BringUp(interface),
        *(
            AddRoute(interface, network)
            for network in sorted(networks, key=_most_specific_first)
            if not any(_covers(link, network) for link in on_link)
        ),
    )


def difference(
    before: Iterable[Step], after: Iterable[Step]
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """What is to be undone (in reverse), and then done, so that one plan becomes the other."""
    old, new = tuple(before), tuple(after)
    return (
        tuple(step for step in old if step not in new),
        tuple(step for step in new if step not in old),
    )


def check_name(interface: str) -> None:
    """Raises TunError("name") unless Linux takes it as an interface name, literally.

    dev_valid_name in net/core/dev.c, without '%', which the kernel would replace by a number, and
    in ASCII.
    """
    good = (
        0 < len(interface) <= _NAME_LIMIT
        and interface not in (".", "..")
        and all("!" <= char <= "~" and char not in "/:%" for char in interface)
    )
    if not good:
        raise TunError(
            "name",
            f"{interface!r} is no interface name: take 1 to {_NAME_LIMIT} ASCII characters "
            "without spaces, '/', ':' and '%', for example mt0",
        )


def _refuse_default_route(networks: tuple[Network, ...]) -> None:
    v4 = [network for network in networks if isinstance(network, IPv4Network)]
    v6 = [network for network in networks if isinstance(network, IPv6Network)]
    # Collapsed, because 0.0.0.0/1 and 128.0.0.0/1 are a default route by another name.
    collapsed: list[Network] = [*collapse_addresses(v4), *collapse_addresses(v6)]
    for whole in collapsed:
        if whole.prefixlen == 0:
            raise TunError(
                "default_route",
                f"allowed_ips add up to {whole}, a default route: martlet has no exit nodes yet, "
                "and its own packets would enter the tunnel. List the networks behind the peer "
                "instead, for example 10.88.0.2/32",
            )


def _most_specific_first(network: Network) -> tuple[int, int, int]:
    return network.version, -network.prefixlen, int(network.network_address)


def _covers(outer: Network, inner: Network) -> bool:
    if isinstance(outer, IPv4Network):
        return isinstance(inner, IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and inner.subnet_of(outer)
