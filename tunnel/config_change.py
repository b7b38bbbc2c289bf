"""What has changed between two configurations, and whether a running tunnel can take it.

Peers come and go, and further addresses of this host come, without anybody else noticing. All the
rest was decided when the tunnel came up: the device, the key, the port, the servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct, structs

from tunnel.config import Config, IPInterface, PeerConfig, called
from tunnel.errors import ConfigError


class Change(Struct, frozen=True, kw_only=True):
    """What a running tunnel is to take."""

    addresses: tuple[IPInterface, ...] = ()
    """That this host has now, too."""
    added: tuple[PeerConfig, ...] = ()
    removed: tuple[str, ...] = ()
    """Names of peers that are gone."""

    def __bool__(self) -> bool:
        return bool(self.addresses or self.added or self.removed)


def change(running: Config, wanted: Config) -> Change:
    """From the configuration that a tunnel runs by to another.

    Raises ConfigError, which names every key that a running tunnel cannot take.
    """
    obstacles = [*_obstacles(running, wanted)]
    if obstacles:
        name = running.interface.name
        raise ConfigError(
            f"a running tunnel cannot take this, and goes on as it was: {', '.join(obstacles)}",
            file=wanted.file,
            remedy=f"restart it: `martlet down {name}`, then `martlet up {_called(wanted)}`",
        )
    known = {peer.name for peer in running.peers}
    kept = {peer.name for peer in wanted.peers}
    own = running.interface.address
    return Change(
        addresses=tuple(each for each in wanted.interface.address if each not in own),
        added=tuple(peer for peer in wanted.peers if peer.name not in known),
        removed=tuple(peer.name for peer in running.peers if peer.name not in kept),
    )


def _obstacles(running: Config, wanted: Config) -> Iterator[str]:
    for key in _different(running.interface, wanted.interface):
        if key != "address":
            yield f"interface.{key}"
    if not set(running.interface.address) <= set(wanted.interface.address):
        yield "interface.address (one is gone)"
    before = {peer.name: peer for peer in running.peers}
    for peer in wanted.peers:
        if peer.name in before:
            keys = [*_different(before[peer.name], peer)]
            if keys:
                yield f"{' and '.join(keys)} of peer {peer.name}"
    keys_before = {peer.public_key: peer.name for peer in running.peers}
    for peer in wanted.peers:
        name = keys_before.get(peer.public_key, peer.name)
        if name != peer.name and peer.name not in before:
            yield f"the name of peer {name}"
    for section in ("rendezvous", "ice", "paths"):
        old, new = getattr(running, section), getattr(wanted, section)
        if old is None or new is None:
            if old is not new:
                yield section
        else:
            for key in _different(old, new):
                yield f"{section}.{key}"


def _called(config: Config) -> str:
    return config.interface.name if config.file is None else called(config.file)


def _different(old: Struct, new: Struct) -> Iterator[str]:
    values: dict[str, Any] = structs.asdict(old)
    for key, value in structs.asdict(new).items():
        if values[key] != value:
            yield key
