"""Peers on the same link, found by multicast DNS (RFC 6762, 6763) when nothing else is configured.

Each local interface with a network on it has a station of its own: a zeroconf instance bound to
that interface's addresses alone, which announces a service `_martlet._udp` under a random name and
host name with those addresses and our port, and looks for others. Who is meant is in the TXT
record, which tells strangers nothing (`tunnel.announcement`). An interface that changes gets a new
station, with another name and salt.

zeroconf also answers whoever asks its port directly, from anywhere, which RFC 6762 section 11
forbids: it would tell the Internet where a tunnel is, and lend us to attacks by reflection. So its
sockets get a filter that lets multicast in only, and questions ask for answers by multicast.

What is found is a hint, and bounded: addresses on the very link, 8 for each peer, out of 64
services. Where there are more, those go first that turned out to be nobody's we look for: whoever
fills a link with names once must not keep two peers apart for as long as these are remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import random
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from itertools import chain, zip_longest
from typing import Any

from zeroconf import DNSQuestionType, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from tunnel import announcement
from tunnel.dialling import MAX_FOUND
from tunnel.path.network import Address, LocalNetwork, canonical_ip, is_usable_remote
from tunnel.shell.log import Log
from tunnel.shell.soon import Soon

SERVICE = "_martlet._udp.local."
MAX_STATIONS = 8
MAX_SERVICES = 64
"""That are looked at, on each link: others there may announce what they like."""
ANSWER_TIME = 3000
"""Milliseconds that a service gets to tell its address; mostly it is in the announcement."""
RETRY = 30.0
"""Seconds until an interface that refused multicast is tried again."""
FAREWELL = 1.0
"""Seconds for the goodbyes, of which zeroconf sends three."""

Found = Callable[[str, list[Address]], None]


class LinkDiscovery:
    """Of these peers, by raw public key. `found` gets all addresses of a peer, maybe none; never
    from inside a call to this."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        found: Found,
        *,
        own: bytes,
        peers: Mapping[bytes, str],
        rng: random.Random,
    ) -> None:
        self._loop = loop
        self._found = found
        self.own = own
        self.peers = dict(peers)
        self.rng = rng
        self.network = LocalNetwork()
        self._port = 0
        self._stations: dict[str, _Station] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[str, list[Address]] = {}
        self.tell = Soon(loop, self._tell_now)
        """For stations: something may have been found, or be gone."""
        self._closing = False
        # It warns of what we know (an address that is just gone), straight to stderr.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)

    def network_changed(self, network: LocalNetwork, port: int) -> None:
        """A full snapshot, and the port of our sockets."""
        if self._closing:
            return
        self.network, self._port = network, port
        wanted: dict[str, list[str]] = {}
        for local in network.addresses:
            if port and self.peers and network.on_link(local.ip, local.interface):
                wanted.setdefault(local.interface, []).append(local.ip)
        for interface, station in list(self._stations.items()):
            if (station.ips, station.port) != (wanted.get(interface), port):
                del self._stations[interface]
                station.stop()
        for interface, ips in list(wanted.items())[:MAX_STATIONS]:
            if interface not in self._stations:
                self._stations[interface] = _Station(self, interface, ips, port)
        # With the network, the node forgets what was found.
        self._told.clear()
        self.tell()

    def resumed(self) -> None:
        """The host slept: what others announced meanwhile was not heard."""
        for interface, station in list(self._stations.items()):
            station.stop()
            self._stations[interface] = _Station(self, interface, station.ips, station.port)

    def peers_changed(self, peers: Mapping[bytes, str]) -> None:
        """Others are sought now: all that is announced is made anew; for nobody, nothing is."""
        if peers == self.peers:
            return
        self.peers = dict(peers)
        for station in self._stations.values():
            station.stop()
        self._stations.clear()
        self.network_changed(self.network, self._port)

    def stop(self) -> None:
        """Begin to say goodbye."""
        self._closing = True
        self.tell.stop()
        for station in self._stations.values():
            station.stop()

    def close(self) -> None:
        """The end, without waiting for goodbyes."""
        self.stop()
        for task in self._tasks:
            task.cancel()

    def status(self) -> list[dict[str, Any]]:
        """Of each interface."""
        return [
            {
                "interface": interface,
                "announced": station.announced,
                "peers": sorted({peer for peer, _ in station.services.values()}),
            }
            for interface, station in self._stations.items()
        ]

    # for stations

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def is_ours(self, name: str) -> bool:
        return any(station.name == name for station in self._stations.values())

    def _tell_now(self) -> None:
        services: dict[str, list[list[Address]]] = {}
        for station in self._stations.values():
            for peer, addresses in station.services.values():
                services.setdefault(peer, []).append(addresses)
        for peer in {*services, *self._told}:
            # The first of each service, then the second: one that announces many crowds out none.
            turns = chain.from_iterable(zip_longest(*services.get(peer, [])))
            addresses = list(dict.fromkeys(a for a in turns if a is not None))[:MAX_FOUND]
            if addresses != self._told.get(peer, []):
                _log.info("found on the link", peer=peer, at=",".join(map(str, addresses)) or "-")
                self._told[peer] = addresses
                self._found(peer, addresses)


class _Station:
    """One interface, as long as its addresses and our port stay as they are."""

    def __init__(self, discovery: LinkDiscovery, interface: str, ips: list[str], port: int) -> None:
        self.ips = ips
        self.port = port
        self.name = f"{discovery.rng.randbytes(8).hex()}.{SERVICE}"
        self.announced = False
        self.services: dict[str, tuple[str, list[Address]]] = {}
        """By name: whose it is, and where."""
        self._seen: dict[str, asyncio.Task[None] | None] = {}
        self._interface = interface
        self._discovery = discovery
        self._stopped = asyncio.Event()
        self._task = discovery.run(self._run())

    def stop(self) -> None:
        """Say goodbye and end; nothing is told any more."""
        self._stopped.set()
        self.services = {}

    async def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                await self._serve()
            except Exception as error:  # of the library, or of an interface that is gone
                _log.debug("no multicast dns", interface=self._interface, error=error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), RETRY)

    async def _serve(self) -> None:
        # One address of each family is enough to reach everybody.
        first = {":" in ip: ip for ip in reversed(self.ips)}
        zeroconf = AsyncZeroconf(interfaces=[*first.values()])
        try:
            await zeroconf.zeroconf.async_wait_for_start()
            _only_multicast(zeroconf.zeroconf)
            # Nobody else has this name: there is nothing to be probed for, and that takes a second.
            await zeroconf.async_register_service(self._info(), cooperating_responders=True)
            browser = AsyncServiceBrowser(
                zeroconf.zeroconf,
                SERVICE,
                handlers=[self._on_change],
                question_type=DNSQuestionType.QM,
            )
            self.announced = True
            await self._stopped.wait()
            await browser.async_cancel()
        finally:
            self.announced = False
            for task in self._seen.values():
                if task is not None:
                    task.cancel()
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(zeroconf.async_close(), FAREWELL)
            finally:
                zeroconf.zeroconf.close()  # its sockets, if it did not come to that

    def _info(self) -> AsyncServiceInfo:
        discovery = self._discovery
        return AsyncServiceInfo(
            SERVICE,
            self.name,
            port=self.port,
            properties=announcement.make(discovery.own, discovery.peers, discovery.rng),
            server=f"{discovery.rng.randbytes(8).hex()}.local.",
            parsed_addresses=self.ips,
        )

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        running = self._seen.get(name)
        if running is not None:
            running.cancel()
        if state_change is ServiceStateChange.Removed:
            self._seen.pop(name, None)
            if self.services.pop(name, None) is not None:
                self._discovery.tell()
        elif not self._discovery.is_ours(name) and (name in self._seen or self._has_room()):
            self._seen[name] = self._discovery.run(self._look(zeroconf, name))

    def _has_room(self) -> bool:
        """For one more service, maybe in place of one that was looked at and is no peer's."""
        if len(self._seen) < MAX_SERVICES:
            return True
        for name, task in self._seen.items():
            if name not in self.services and (task is None or task.done()):
                del self._seen[name]
                return True
        return False

    async def _look(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        discovery = self._discovery
        peer = None
        try:
            if await info.async_request(zeroconf, ANSWER_TIME, DNSQuestionType.QM):
                peer = announcement.read(info.properties, discovery.own, discovery.peers)
            addresses = [] if peer is None else self._addresses(info)
        except Exception as error:  # of the library: what came is anybody's
            _log.debug("unreadable announcement", name=name, error=error)
            return
        if peer is not None and not self._stopped.is_set():
            self.services[name] = (discovery.peers[peer], addresses)
            discovery.tell()

    def _addresses(self, info: AsyncServiceInfo) -> list[Address]:
        """That are on this very link, or an announcement could send us anywhere."""
        ips = [
            canonical_ip(socket.inet_ntop(socket.AF_INET6 if len(a) == 16 else socket.AF_INET, a))
            for a in info.addresses_by_version(IPVersion.All)
        ]
        return [
            Address(ip, info.port)
            for ip in ips
            if info.port
            and is_usable_remote(ip)
            and ip not in self.ips
            and self._discovery.network.on_link(ip, self._interface)
        ][:MAX_FOUND]


# <linux/filter.h>, <linux/if_packet.h>: what is not multicast is dropped.
_SO_ATTACH_FILTER = 26
_SKF_AD_PKTTYPE, _PACKET_MULTICAST = 0xFFFFF000 + 4, 2
_FILTER = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x20, 0, 0, _SKF_AD_PKTTYPE),  # BPF_LD | BPF_W | BPF_ABS
        (0x15, 0, 1, _PACKET_MULTICAST),  # BPF_JMP | BPF_JEQ | BPF_K
        (0x06, 0, 0, 0xFFFFFFFF),  # BPF_RET | BPF_K: all of it
        (0x06, 0, 0, 0),
    )
)


def _only_multicast(zeroconf: Zeroconf) -> None:
    """Let its sockets, just opened, receive multicast only. Raises OSError."""
    program = ctypes.create_string_buffer(_FILTER, len(_FILTER))
    option = struct.pack("@HP", len(_FILTER) // 8, ctypes.addressof(program))  # struct sock_fprog
    for reader in zeroconf.engine.readers:
        with socket.socket(fileno=os.dup(reader.fileno)) as same:
            same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


_log = Log("mdns")
