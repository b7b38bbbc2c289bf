"""The one exception of this package.

TunError(Exception)      .kind says what is wrong, the message also names the remedy
"""

from typing import Literal

Kind = Literal[
    "privilege",  # not allowed to make or configure devices
    "missing",  # no /dev/net/tun here
    "busy",  # a living process holds this device, ours or not
    "foreign",  # an interface of that name exists, and is not ours
    "name",  # no valid interface name
    "default_route",  # a default route was asked for
    "conflict",  # an address or route of ours collides with one that is there
    "ipv6",  # IPv6 is switched off, and an IPv6 address was asked for
    "gone",  # the device was removed under us
    "system",  # anything else the kernel refused
]


class TunError(Exception):
    """A device could not be made, configured or read; `kind` names the reason, in one word."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind
