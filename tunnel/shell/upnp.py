"""UPnP-IGD by miniupnpc, which blocks: in a thread of its own for each local address.

The thread is started when something is first asked, takes one wish after the other, and ends with
`close`. It is a daemon: a router that does not answer an HTTP request holds up nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import miniupnpc

from tunnel.ice.portmap import LIFETIME
from tunnel.path.network import Address, canonical_ip
from tunnel.shell.log import Log

DISCOVERY = 2000
"""Milliseconds that routers get to answer (the MX of UPnP Device Architecture 1.1, section 1.3.2,
which miniupnpc sends)."""
DESCRIPTION = "martlet"  # in the router's list of port forwards
ATTEMPTS = 3
"""Requests at the most: for the wanted port, then for random ones where somebody else has it."""
FIRST_PORT = 16384  # of random ones, up to 65535

Answered = Callable[[Address | None], None]


class Upnp:
    """The mapping of one local address. `answered` is called in the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        base: Address,
        gateway: str,
        answered: Answered,
        random_port: Callable[[], int],
    ) -> None:
        self._loop = loop
        self._base = base
        self._gateway = gateway
        self._answered = answered
        self._random_port = random_port
        self._wishes: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # Of the thread alone:
        self._router: miniupnpc.UPnP | None = None
        self._mapped = 0  # the external port

    def map(self, port: int) -> None:
        """Ask for this external port, or for another one."""
        self._wishes.put(port)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="upnp", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Delete what is mapped, once what is being asked has been answered; report no more."""
        self._wishes.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the end of it, but no longer than that."""
        if self._thread is not None:
            self._thread.join(seconds)

    # in the thread

    def _work(self) -> None:
        lost = True
        while (port := self._wishes.get()) is not None:
            external: Address | None = None
            try:
                if self._router is None or lost:
                    self._router = self._find()
                external = self._map(self._router, port)
                lost = False
            except Exception as error:  # miniupnpc raises nothing more specific
                lost = True  # it may have another address, or path, after a restart
                _log.debug("no mapping by upnp", local=self._base, error=error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._answered, external)
        if self._router is not None and self._mapped:
            with contextlib.suppress(Exception):
                self._router.deleteportmapping(self._mapped, "UDP")

    def _find(self) -> miniupnpc.UPnP:
        """The router that is our default gateway: others on the link may say they are one."""
        found = miniupnpc.UPnP(multicastif=self._base.host, discoverdelay=DISCOVERY)
        found.discover()
        host = urlsplit(found.selectigd()).hostname
        if host != self._gateway:
            raise OSError(f"{host} is not the gateway {self._gateway}")
        if found.lanaddr != self._base.host:
            raise OSError(f"{found.lanaddr} would be mapped instead")
        return found

    def _map(self, router: miniupnpc.UPnP, port: int) -> Address:
        host = canonical_ip(router.externalipaddress())
        external = self._mapped or port
        lifetime = LIFETIME
        for _ in range(ATTEMPTS):
            try:
                router.addportmapping(
                    external, "UDP", self._base.host, self._base.port, DESCRIPTION, "", lifetime
                )
            except Exception as error:
                if "Conflict" in str(error):  # error 718: somebody else has this port
                    external = self._random_port()
                elif lifetime:
                    lifetime = 0  # error 725, or others: many know permanent mappings only
                else:
                    raise
            else:
                self._mapped = external
                return Address(host, external)
        raise OSError("somebody else has every port that was tried")


_log = Log("upnp")
