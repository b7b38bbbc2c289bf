"""Which path to send on: a pure function from plain facts to an order.

The kernel's routing table is the user's own policy (metrics, preferred interfaces), so among live
paths it decides; among addresses of the peer the one in use is kept, then the ones the user wrote
down, in their order, then whatever else was seen to work.
"""

from collections.abc import Iterable, Sequence

from tunnel.path.network import Address, LocalNetwork, PathKey, is_usable_remote


def candidates(
    network: LocalNetwork, port: int, remotes: Sequence[Address], *, limit: int = 16
) -> list[PathKey]:
    """All paths from here to these addresses, best first.

    `remotes` best first. Every local address is paired with the first remote it can reach before
    any is paired with a second one, so that the first few cover all uplinks.
    """
    ranked: list[tuple[int, int, int, PathKey]] = []
    uses: dict[str, int] = {}
    for order, remote in enumerate(remotes):
        if not is_usable_remote(remote.host):
            continue
        for rank, source in enumerate(network.sources(remote.host)):
            turn = uses.get(source.ip, 0)
            uses[source.ip] = turn + 1
            ranked.append((turn, order, rank, PathKey(Address(source.ip, port), remote)))
    ranked.sort(key=lambda entry: entry[:3])
    return [entry[3] for entry in ranked[:limit]]


def unique(addresses: Iterable[Address]) -> list[Address]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(addresses))


def best_from(network: LocalNetwork, port: int, remotes: Sequence[Address]) -> PathKey | None:
    """Where to go when the active path's local address is gone, or another is preferred now.

    The first remote address that any local address reaches; None when there is no way at all.
    """
    for remote in remotes:
        found = candidates(network, port, [remote], limit=1)
        if found:
            return found[0]
    return None
