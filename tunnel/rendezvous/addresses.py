"""Addresses inside the tunnel for hosts that nobody has given any.

A host's IPv6 address follows from its key, so that two hosts that never met cannot collide, and one
that joins again is where it was: fd6d:6172:746c::/48, a unique local prefix (RFC 4193) that spells
"martl", and 80 bits of a digest. Colliding on purpose takes 2^80 keys, and then gains nothing: a
packet's source is checked against the peer whose session it came in on. IPv4 has no room for that;
an address there is assigned by whoever invites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

INNER_NETWORK = IPv6Network("fd6d:6172:746c::/48")
_CONTEXT = b"martlet/1 inner address"
_HOST_BITS = 80


def inner_address(key: bytes) -> IPv6Interface:
    """The address, as a /128, of the host with this raw public key."""
    digest = hashlib.sha256(_CONTEXT + key).digest()
    host = int.from_bytes(digest[: _HOST_BITS // 8])
    return IPv6Interface(IPv6Address(int(INNER_NETWORK.network_address) | host))


def next_free(network: IPv4Network, taken: Collection[IPv4Address]) -> IPv4Address | None:
    """The lowest address of `network` that a host may have and none in `taken` has; None if full.

    The first and the last address are no host's, except in a /31 (RFC 3021) and a /32.
    """
    first, last = int(network.network_address), int(network.broadcast_address)
    if network.prefixlen < 31:
        first, last = first + 1, last - 1
    used = {int(address) for address in taken}
    # Of one more number than there are used ones, one is free.
    for number in range(first, min(last, first + len(used)) + 1):
        if number not in used:
            return IPv4Address(number)
    return None
