"""Gathers all facts, everything at once that can be, within a few seconds.

::

    host, network, firewall, files ----------------------------------------> facts
    names ---> STUN and NAT, from the best address of each interface ------>
               (of what is literal, or resolved in time)
    brokers, relays (they look up their names themselves) ------------------>

Each part bounds its own time, so that the whole is bounded and nothing has to be given up.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tunnel.config import Config, Endpoint, RendezvousConfig, check_own_key
from tunnel.config_values import parse_turn_url
from tunnel.doctor.facts import (
    Facts,
    FileFacts,
    NameFacts,
    NetworkFacts,
    PortMappingFacts,
    StunFacts,
    TunnelFacts,
)
from tunnel.doctor.finding import Nat
from tunnel.errors import ConfigError
from tunnel.identity import Identity
from tunnel.path.network import Address, LocalAddress, is_usable_remote
from tunnel.shell import clock
from tunnel.shell.doctor import broker, gateways, host, nat, network, relay
from tunnel.shell.doctor.threads import in_thread
from tunnel.shell.resolver import lookup
from tunnel.shell.udp import device_for

LIMIT = 6.0
"""Seconds for everything: somebody waits for it."""
NAMES_LIMIT = 1.5
"""Seconds of these after which STUN begins, without the names that are still being resolved."""
LOOKUPS = 32
"""Names looked up at a time, each in a thread; a configuration may name a thousand peers."""
MAX_BASES = 6
"""Local addresses measured at a time."""
STUN_PORT = 3478  # RFC 8489 section 18.6

T = TypeVar("T")
Progress = Callable[[Sequence[str]], None]
"""Gets what is still being waited for, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be looked at. `rendezvous` and `stun` are asked beside those of `config`."""

    config: Config | None = None
    config_path: str | None = None
    config_error: ConfigError | None = None
    rendezvous: RendezvousConfig | None = None
    stun: tuple[Endpoint, ...] = ()
    tunnels: tuple[TunnelFacts, ...] = ()
    """Those that run here, as they say themselves."""


async def gather(request: Request, progress: Progress) -> Facts:
    """What is to be known of this host and of what the request names."""
    began = clock.now()
    config = request.config
    tasks = _Tasks(progress)
    machine = tasks.start("this host", in_thread(host.gather))
    local = tasks.start("network", in_thread(lambda: _network(request)))
    port = None if config is None else config.interface.listen_port
    firewall = tasks.start("firewall", network.firewall(port))
    brokers = [
        tasks.start(f"broker {url}", broker.ask(rendezvous, url, LIMIT - 0.5))
        for rendezvous in _rendezvous(request)
        for url in rendezvous.url
    ]
    relays = [
        tasks.start(f"relay {turn.url} ({transport})", relay.ask(turn, transport, LIMIT - 0.5))
        for turn in (() if config is None else config.ice.turn)
        for transport in parse_turn_url(turn.url)[1]
    ]
    servers = _stun_servers(request)
    slots = asyncio.Semaphore(LOOKUPS)
    names = {
        name: tasks.start(f"DNS {name}", _resolve(name, users, slots))
        for name, users in _names(request, servers).items()
    }

    async def measure() -> tuple[Nat, ...]:
        waited_for = [task for name, task in names.items() if name in {e.host for e, _ in servers}]
        if waited_for:
            await asyncio.wait(waited_for, timeout=NAMES_LIMIT)
        addresses = [a for endpoint, _ in servers for a in _addresses(endpoint, names)]
        return await _measure(await local, addresses, began + LIMIT)

    async def routers() -> tuple[PortMappingFacts, ...]:
        if config is not None and not config.ice.port_mapping:
            return ()
        return await gateways.ask((await local).usable, LIMIT - 1)

    nats = tasks.start("STUN", measure())
    mappers = tasks.start("the router", routers())
    await tasks.finish()
    return Facts(
        version=version("martlet"),
        host=machine.result(),
        network=replace(local.result(), firewall=firewall.result()),
        config=config,
        config_path=request.config_path,
        config_error=request.config_error or _own_key_error(config),
        files=tuple(_files(config)),
        names=tuple(task.result() for task in names.values()),
        stun=tuple(
            StunFacts(endpoint=endpoint, addresses=_addresses(endpoint, names), implied=implied)
            for endpoint, implied in servers
        ),
        nats=nats.result(),
        turn=tuple(task.result() for task in relays),
        brokers=tuple(task.result() for task in brokers),
        port_mapping=mappers.result(),
        tunnels=request.tunnels,
    )


class _Tasks:
    """What is under way, each by the words for it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._running: dict[asyncio.Task[Any], str] = {}

    def start(self, words: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running[task] = words
        return task

    async def finish(self) -> None:
        """Wait for all of them. The first bug ends all, and is raised."""
        try:
            while self._running:
                self._progress(list(self._running.values()))
                done, _ = await asyncio.wait(
                    self._running, return_when=asyncio.FIRST_COMPLETED
                )  # fmt: skip
                for task in done:
                    del self._running[task]
                    task.result()
        finally:
            for task in self._running:
                task.cancel()


# what the configuration and the command line name


def _network(request: Request) -> NetworkFacts:
    config = request.config
    if config is None:
        return network.gather("", (), None)
    interface = config.interface
    up = any(tunnel.name == interface.name for tunnel in request.tunnels)
    port = None if up else interface.listen_port  # which is then its own
    return network.gather(interface.name, config.ice.exclude_interfaces, port)


def _rendezvous(request: Request) -> Iterator[RendezvousConfig]:
    if request.config is not None and request.config.rendezvous is not None:
        yield request.config.rendezvous
    if request.rendezvous is not None:
        yield request.rendezvous


def _stun_servers(request: Request) -> list[tuple[Endpoint, bool]]:
    """Each with whether it is only implied by a rendezvous, which none is if others are named."""
    ice = () if request.config is None else request.config.ice.stun
    named = list(dict.fromkeys((*ice, *request.stun)))
    if named:
        return [(endpoint, False) for endpoint in named]
    hosts = [urlsplit(url).hostname or "" for each in _rendezvous(request) for url in each.url]
    return [(Endpoint(host, STUN_PORT), True) for host in dict.fromkeys(hosts)]


def _names(request: Request, servers: Iterable[tuple[Endpoint, bool]]) -> dict[str, list[str]]:
    """Every host name, and what it is for."""
    used: dict[str, list[str]] = {}

    def use(endpoint: Endpoint, user: str) -> None:
        if endpoint.ip is None:
            users = used.setdefault(endpoint.host, [])
            if user not in users:
                users.append(user)

    for peer in request.config.peers if request.config is not None else ():
        for endpoint in peer.endpoint:
            use(endpoint, f"peer {peer.name}")
    for rendezvous in _rendezvous(request):
        for url in rendezvous.url:
            use(Endpoint((urlsplit(url).hostname or "").strip("[]"), 0), "broker")
    for turn in request.config.ice.turn if request.config is not None else ():
        use(parse_turn_url(turn.url)[0], "TURN server")
    for endpoint, implied in servers:
        if not implied:
            use(endpoint, "STUN server")
    return used


async def _resolve(name: str, users: Sequence[str], slots: asyncio.Semaphore) -> NameFacts:
    try:
        async with asyncio.timeout(LIMIT - 1), slots:
            began = clock.now()
            addresses = await in_thread(lambda: lookup(name, 0))
    except TimeoutError:
        error = f"no answer within {LIMIT - 1:g} s"
    except (OSError, UnicodeError) as problem:  # UnicodeError: a label the codec refuses
        error = str(getattr(problem, "strerror", None) or problem)
    else:
        return NameFacts(
            name=name,
            used_by=tuple(users),
            addresses=tuple(address.host for address in addresses),
            seconds=clock.now() - began,
        )
    return NameFacts(name=name, used_by=tuple(users), error=error)


def _addresses(
    endpoint: Endpoint, names: dict[str, asyncio.Task[NameFacts]]
) -> tuple[Address, ...]:
    """Of a server, as far as its name is resolved by now."""
    if endpoint.ip is not None:
        return (Address(str(endpoint.ip), endpoint.port),)
    task = names.get(endpoint.host)
    if task is None or not task.done():
        return ()
    return tuple(Address(host, endpoint.port) for host in task.result().addresses)


# NATs


async def _measure(
    facts: NetworkFacts, servers: Sequence[Address], deadline: float
) -> tuple[Nat, ...]:
    """From the best address that each interface has in each family."""
    mtus = {link.name: link.mtu for link in facts.links}
    work: list[tuple[LocalAddress, list[Address]]] = []
    seen: set[tuple[str, bool]] = set()
    for address in facts.usable.addresses:
        place = (address.interface, ":" in address.ip)
        mine = [
            server
            for server in servers
            if is_usable_remote(server.host) and address in facts.usable.sources(server.host)
        ]
        if mine and place not in seen:
            seen.add(place)
            work.append((address, mine))
    measured = await asyncio.gather(
        *(
            nat.measure(
                address.ip,
                device_for(address.ip, facts.usable),
                mine,
                link_mtu=mtus.get(address.interface, 1500),
                limit=deadline - clock.now(),
            )
            for address, mine in work[:MAX_BASES]
        )
    )
    return tuple(
        Nat(address.interface, behaviour)
        for (address, _), behaviour in zip(work, measured, strict=False)
        if behaviour is not None
    )


# files


def _own_key_error(config: Config | None) -> ConfigError | None:
    """Whether a peer has this host's own key."""
    if config is None:
        return None
    try:
        check_own_key(config, Identity.load(config.interface.private_key).public_key)
    except ConfigError as error:
        return error if error.key else None  # else it is about the key's file: see `_files`
    return None


def _files(config: Config | None) -> Iterator[FileFacts]:
    if config is None:
        return
    key = config.interface.private_key
    error: ConfigError | None = None
    try:
        Identity.load(key)
    except ConfigError as problem:
        error = problem
    yield FileFacts(
        path=str(key),
        what="private key",
        error="" if error is None else error.problem,
        remedy="" if error is None else error.remedy,
        mode=_mode(key),
    )
    passwords = [turn.password_file for turn in config.ice.turn]
    if config.rendezvous is not None:
        passwords.append(config.rendezvous.password_file)
    for path in dict.fromkeys(passwords):
        if path is not None:
            yield _file(path, "password file", secret=True)
    if config.rendezvous is not None and config.rendezvous.ca_file is not None:
        yield _file(config.rendezvous.ca_file, "CA certificate", secret=False)


def _file(path: Path, what: str, *, secret: bool) -> FileFacts:
    error = ""
    try:
        # Not blocking, or a FIFO would stop us here.
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as problem:
        error = problem.strerror or str(problem)
    remedy = f"check with: ls -l {path}" if error else ""
    mode = _mode(path) if secret else None
    return FileFacts(path=str(path), what=what, error=error, mode=mode, remedy=remedy)


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
