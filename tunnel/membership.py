"""What an inviter gives, and what a joiner makes of it: the decisions of both ends, as functions.

Each ends in an `Edit`: the whole new text of this host's configuration, proved to be valid, before
anything is written or said. Neither end believes more than it must:

- An inviter lets a joiner have the IPv6 address that follows from the joiner's key, and an IPv4
  address that the inviter itself chose. What else a joiner calls its own is ignored, or it could
  draw somebody else's traffic here.
- A joiner routes to the inviter's two addresses of that kind, and to networks behind the inviter
  only if its user said so.

IPv4 is given when either side asks for it: out of a network that neither side uses otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from tunnel.config import Config, Endpoint, IPInterface, IPNetwork, loads
from tunnel.config_edit import (
    Fresh,
    Peer,
    Rendezvous,
    Turn,
    fresh,
    unique_name,
    with_addresses,
    with_peer,
    with_rendezvous,
)
from tunnel.errors import ConfigError
from tunnel.identity import PublicKey
from tunnel.rendezvous.addresses import inner_address, next_free
from tunnel.rendezvous.invite import JoinAsked, TurnServer, Welcome, Wishes
from tunnel.rendezvous.join_messages import MAX_NETWORKS, Answer, encode_answer
from tunnel.rendezvous.messages import NONCE_LENGTH
from tunnel.rendezvous.sealing import MAX_BODY

DEFAULT_NETWORKS = tuple(IPv4Network((10 << 24 | 88 + n << 16, 24)) for n in range(40))
"""Where IPv4 addresses come from when nobody says: 10.88.0.0/24 and on to 10.127.0.0/24, which
routers for the home do not use."""
PRIVATE = tuple(
    IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
"""RFC 1918 and RFC 6598: nothing else is taken for an address inside."""
MOST_TRIES = 4096
"""Addresses looked at before a network counts as full."""


class Host(Struct, frozen=True, kw_only=True):
    """This host, and the configuration that is to get a further peer."""

    name: str
    """What it calls itself."""
    public_key: PublicKey
    private_key: Path
    """Absolute."""
    file: Path
    """Of the configuration, which need not exist; absolute."""
    interface: str
    """Name of the device, if it does not."""
    text: str | None = None
    """What is in it."""
    config: Config | None = None
    """The same, read."""
    networks: tuple[IPNetwork, ...] = ()
    """In use outside this tunnel: where the routes of this host lead."""
    today: str = ""

    @property
    def inside(self) -> tuple[IPNetwork, ...]:
        """Networks inside the tunnel already, those of this host left out."""
        peers = self.config.peers if self.config is not None else ()
        return tuple(network for peer in peers for network in peer.allowed_ips)

    def networks_of(self, peer: str) -> tuple[IPNetwork, ...]:
        """Those of one peer."""
        peers = self.config.peers if self.config is not None else ()
        return next((each.allowed_ips for each in peers if each.name == peer), ())

    @property
    def addresses(self) -> tuple[IPInterface, ...]:
        return self.config.interface.address if self.config is not None else ()

    @property
    def tunnel(self) -> str:
        """The name it has for `status`, `reload` and `down`."""
        return self.config.interface.name if self.config is not None else self.interface

    def peer_of(self, key: bytes) -> str | None:
        """The name of the peer with this key."""
        peers = self.config.peers if self.config is not None else ()
        return next((peer.name for peer in peers if peer.public_key.raw == key), None)


class Terms(Struct, frozen=True, kw_only=True):
    """What an inviter offers."""

    rendezvous: Rendezvous
    stun: tuple[Endpoint, ...] = ()
    turn: tuple[Turn, ...] = ()
    """For a new configuration of this host."""
    shared_turn: tuple[TurnServer, ...] = ()
    """For the joiner, passwords included."""
    routes: tuple[IPNetwork, ...] = ()
    """Networks behind this host."""
    ipv4: bool = False
    ipv4_network: IPv4Network | None = None
    """Out of which; None: whichever is free."""
    peer_name: str | None = None
    """What the joiner is to be called here; None: what it calls itself."""


class Edit(Struct, frozen=True, kw_only=True):
    """A configuration with one more peer."""

    text: str | None
    """The whole file; None: it needs no change."""
    peer: str
    """Its name."""
    addresses: tuple[IPInterface, ...]
    """Where it is reached."""
    own: tuple[IPInterface, ...]
    """Where it reaches us."""
    secrets: dict[Path, str] = {}
    """Files with passwords, to be written before."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


class Refusal(Exception):
    """Somebody with the code is not let in; the text is for both ends."""


# the inviter


def check_terms(host: Host, terms: Terms) -> None:
    """Raises ConfigError when what is to be told does not fit in a message."""
    inner = inner_address(host.public_key.raw)
    widest = IPv4Interface("255.255.255.255/32")
    try:
        welcome = _welcome(host, terms, (inner, widest), (widest,))
        size = len(encode_answer(Answer(bytes(NONCE_LENGTH), welcome)))
    except ValueError as error:
        raise ConfigError(f"this cannot be told a joiner: {error}", file=host.file) from None
    if size > MAX_BODY:
        raise ConfigError(
            f"what a joiner is to be told takes {size} bytes, and {MAX_BODY} is the most",
            file=host.file,
            remedy="leave out the relays (--no-share-relay), or routes",
        )


def admit(host: Host, terms: Terms, asked: JoinAsked) -> tuple[Edit, Welcome]:
    """Let a joiner in. Raises Refusal, and ConfigError when the file cannot take it."""
    theirs = inner_address(asked.peer)
    ours = inner_address(host.public_key.raw)
    known = host.peer_of(asked.peer)
    if known is not None:
        return _again(host, terms, asked, known)
    taken = {peer.name for peer in host.config.peers} if host.config is not None else set()
    name = unique_name(terms.peer_name or asked.name, taken)
    notes: list[str] = []
    own: tuple[IPInterface, ...] = (ours,)
    addresses: tuple[IPInterface, ...] = (theirs,)
    if terms.ipv4 or asked.wishes.wants_ipv4:
        pair = _choose_ipv4(host, terms.ipv4_network, asked.wishes.clashes)
        if pair is None:
            notes.append(f"no IPv4 for {name}: no network is free at both ends")
        else:
            own, addresses = (ours, pair[0]), (theirs, IPv4Interface(pair[1]))
    peer = Peer(
        name=name,
        public_key=PublicKey(asked.peer, name),
        allowed_ips=tuple(address.network for address in addresses),
        comment=f"Invited on {host.today}.",
    )
    text = _text(host, peer, own, terms.rendezvous, terms.stun, terms.turn, "martlet invite")
    edit = Edit(text=text, peer=name, addresses=addresses, own=own, notes=tuple(notes))
    return edit, _welcome(host, terms, own, addresses[1:])


def _again(host: Host, terms: Terms, asked: JoinAsked, name: str) -> tuple[Edit, Welcome]:
    """The joiner is a peer here already: perhaps it has lost its own configuration."""
    ours, theirs = inner_address(host.public_key.raw), inner_address(asked.peer)
    have = {each.ip for each in host.addresses}
    if ours.ip not in have or theirs.network not in host.networks_of(name):
        raise Refusal(f"its key is that of peer {name} here, which has other addresses")
    own: tuple[IPInterface, ...] = (ours,)
    assigned: tuple[IPInterface, ...] = ()
    for address in host.addresses:
        for network in host.networks_of(name):
            single = isinstance(network, IPv4Network) and network.prefixlen == 32
            if single and not assigned and network.network_address in address.network:
                own, assigned = (ours, address), (IPv4Interface(network),)
    edit = Edit(
        text=None,
        peer=name,
        addresses=(theirs, *assigned),
        own=own,
        notes=(f"it is here already, as {name}: nothing is changed",),
    )
    return edit, _welcome(host, terms, own, assigned)


def _welcome(
    host: Host,
    terms: Terms,
    own: Sequence[IPInterface],
    assigned: tuple[IPInterface, ...],
) -> Welcome:
    return Welcome(
        name=host.name,
        addresses=tuple(_single(address) for address in own),
        assigned=assigned,
        rendezvous=terms.rendezvous.url,
        stun=terms.stun,
        turn=terms.shared_turn,
        routes=terms.routes,
    )


def _choose_ipv4(
    host: Host, wanted: IPv4Network | None, clashes: Collection[IPNetwork]
) -> tuple[IPv4Interface, IPv4Address] | None:
    """Our address with its network, and the joiner's; None where there is no room."""
    have = [a for a in host.addresses if isinstance(a, IPv4Interface) and a.network.prefixlen < 31]
    if wanted is not None:
        networks: Iterable[IPv4Network] = (wanted,)
    else:
        networks = [address.network for address in have] or DEFAULT_NETWORKS
    for network in networks:
        own = next((address for address in have if address.network == network), None)
        if own is None and _overlaps(network, (*host.networks, *host.inside)):
            continue
        if _overlaps(network, clashes):
            continue
        if own is None:
            first = next_free(network, ())
            assert first is not None
            own = IPv4Interface((first, network.prefixlen))
        theirs = _next_address(network, own.ip, host.inside)
        if theirs is not None:
            return own, theirs
    return None


def _next_address(
    network: IPv4Network, own: IPv4Address, inside: Sequence[IPNetwork]
) -> IPv4Address | None:
    theirs = [n for n in inside if isinstance(n, IPv4Network) and n != network]
    used = {own}
    for _ in range(MOST_TRIES):
        found = next_free(network, used)
        if found is None or not any(found in each for each in theirs):
            return found
        used.add(found)
    return None


# the joiner


def wishes(host: Host, *, ipv4: bool) -> Wishes:
    """What this host tells an inviter of itself."""
    used = (*host.networks, *host.inside, *(address.network for address in host.addresses))
    inner = [n for n in used if isinstance(n, IPv4Network) and n.prefixlen > 0]
    clashes = list(dict.fromkeys(inner))[:MAX_NETWORKS]
    return Wishes(
        addresses=(inner_address(host.public_key.raw),), wants_ipv4=ipv4, clashes=tuple(clashes)
    )


def check_joinable(host: Host, inviter: bytes, urls: Iterable[str]) -> None:
    """Raises ConfigError when this configuration cannot have the inviter for a peer."""
    config = host.config
    if config is None:
        return
    known = host.peer_of(inviter)
    if known is not None:
        raise ConfigError(
            f"the host that made this code is a peer here already: {known}",
            file=host.file,
            remedy=f"`martlet ping {known}` tells whether it answers; to join it anew, remove its"
            " [[peer]] first",
        )
    if config.rendezvous is not None:
        ours = {*map(_broker, config.rendezvous.url)}
        if ours.isdisjoint(map(_broker, urls)):
            raise ConfigError(
                f"this tunnel meets its peers at {', '.join(config.rendezvous.url)}, and the host"
                f" that made this code at {', '.join(urls)}",
                file=host.file,
                remedy="join by a tunnel of its own: `martlet join CODE --config NAME`",
            )


def accept(
    host: Host,
    inviter: bytes,
    welcome: Welcome,
    *,
    rendezvous: Rendezvous,
    peer_name: str | None = None,
    accept_routes: bool = False,
) -> Edit:
    """Become a peer of who let us in. Raises ConfigError when the file cannot take it."""
    taken = {peer.name for peer in host.config.peers} if host.config is not None else set()
    name = unique_name(peer_name or welcome.name, taken)
    notes: list[str] = []
    own: tuple[IPInterface, ...] = (inner_address(host.public_key.raw),)
    addresses: tuple[IPInterface, ...] = (inner_address(inviter),)
    ipv4 = _acceptable_ipv4(host, welcome)
    if ipv4 is not None:
        own, addresses = (*own, ipv4[0]), (*addresses, ipv4[1])
    elif welcome.assigned:
        notes.append(f"no IPv4: what {name} gave is in use here")
    routes = _acceptable_routes(host, welcome, name, accept_routes, notes)
    secrets: dict[Path, str] = {}
    turn: list[Turn] = []
    if host.text is None:
        for server in welcome.turn:
            turn.append(_relay(host, server, secrets))
    elif welcome.turn:
        urls = ", ".join(server.url for server in welcome.turn)
        notes.append(f"{name} shares a relay ({urls}), which is for new configs only")
    peer = Peer(
        name=name,
        public_key=PublicKey(inviter, name),
        allowed_ips=(*(address.network for address in addresses), *routes),
        comment=f"Joined on {host.today}.",
    )
    text = _text(host, peer, own, rendezvous, welcome.stun, turn, "martlet join")
    return Edit(
        text=text,
        peer=name,
        addresses=addresses,
        own=own,
        secrets=secrets,
        notes=tuple(notes),
    )


def _acceptable_ipv4(host: Host, welcome: Welcome) -> tuple[IPInterface, IPInterface] | None:
    """Ours and the inviter's, if both may be addresses inside."""

    def first(addresses: Iterable[IPInterface]) -> IPv4Interface | None:
        return next((a for a in addresses if isinstance(a, IPv4Interface)), None)

    ours, theirs = first(welcome.assigned), first(welcome.addresses)
    if ours is None or theirs is None or ours == theirs:
        return None
    used = (*host.networks, *host.inside, *(address.network for address in host.addresses))
    for address in (ours, theirs):
        if not any(address.ip in network for network in PRIVATE):
            return None
        if _overlaps(address.network, used):
            return None
    return ours, theirs


def _acceptable_routes(
    host: Host, welcome: Welcome, name: str, accept: bool, notes: list[str]
) -> tuple[IPNetwork, ...]:
    if not welcome.routes:
        return ()
    if not accept:
        offered = ", ".join(map(str, welcome.routes))
        notes.append(
            f"{name} offers a way to {offered}, which is not taken; --accept-routes does, or"
            " allowed_ips"
        )
        return ()
    taken: list[IPNetwork] = []
    for network in welcome.routes:
        if network.prefixlen == 0:
            notes.append(f"{network} of {name} is not taken: there are no exit nodes yet")
        elif _overlaps(network, (*host.networks, *host.inside)):
            notes.append(f"{network} of {name} is not taken: it is in use here")
        else:
            taken.append(network)
    return tuple(dict.fromkeys(taken))


def _relay(host: Host, server: TurnServer, secrets: dict[Path, str]) -> Turn:
    """A relay that is shared with us; its password goes to a file beside the configuration."""
    if server.username is None or server.password is None:
        return Turn(url=server.url)
    # Named by what is in it, so that no other file is ever overwritten.
    digest = hashlib.sha256(f"{server.url} {server.username} {server.password}".encode())
    path = host.file.parent / f"relay-{digest.hexdigest()[:12]}.password"
    secrets[path] = server.password
    return Turn(url=server.url, username=server.username, password_file=path)


# both


def _text(
    host: Host,
    peer: Peer,
    own: Sequence[IPInterface],
    rendezvous: Rendezvous,
    stun: Sequence[Endpoint],
    turn: Sequence[Turn],
    maker: str,
) -> str:
    if host.text is None or host.config is None:
        text = fresh(
            Fresh(
                title=f"Written by `{maker}` on {host.today}.",
                interface=host.interface,
                address=tuple(own),
                private_key=host.private_key,
                rendezvous=rendezvous,
                stun=tuple(stun),
                turn=tuple(turn),
                peer=peer,
            )
        )
    else:
        have = {address.ip for address in host.addresses}
        try:
            text = with_addresses(host.text, [a for a in own if a.ip not in have])
            if host.config.rendezvous is None:
                text = with_rendezvous(text, rendezvous)
            text = with_peer(text, peer)
        except ConfigError as error:
            error.file = str(host.file)
            raise
    loads(text, host.file)
    return text


def _single(address: IPInterface) -> IPInterface:
    return type(address)((address.ip, address.max_prefixlen))


def _overlaps(network: IPNetwork, others: Iterable[IPNetwork]) -> bool:
    return any(_meet(network, other) for other in others if other.prefixlen > 0)


def _meet(one: IPNetwork, other: IPNetwork) -> bool:
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return not isinstance(other, IPv4Network) and one.overlaps(other)


def _broker(url: str) -> str:
    """What tells one broker from another: with TLS or without, it is the same."""
    return urlsplit(url).hostname or ""
