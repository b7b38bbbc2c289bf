"""The way to a broker: names to addresses, the race of the addresses, TLS.

Nothing here blocks or outlives its caller: names are looked up in daemon threads, since
getaddrinfo(3) may take half a minute and the executor of the loop would be waited for at exit. The
last answer for a name serves at once while it is asked again, so that a move does not wait for DNS.
Addresses are tried in the manner of RFC 8305: families take turns, each gets a short start before
the next, and the list is gone through twice, because the first packet on a new network is the one
that gets lost, and TCP repeats it only after a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tunnel.config_values import MQTT_PORTS
from tunnel.errors import ConfigError
from tunnel.obstacle import Reason, certificate_reason
from tunnel.path.network import Address, canonical_ip
from tunnel.shell.mqtt_link import LinkError
from tunnel.shell.udp import SOCKET_MARK

STAGGER = 0.25
"""Seconds until the next address is tried beside (RFC 8305 section 5)."""

ADDRESSES = 6
"""Addresses of one name that are tried; each twice."""

LOOKUPS = 4
"""Threads that may wait for one name: an old one may hang on the DNS of a network left behind."""

Lookup = Callable[[str, int], list[Address]]
"""(host, port) -> addresses; blocks; raises OSError."""

_T = TypeVar("_T")


def lookup(host: str, port: int) -> list[Address]:
    """getaddrinfo(3) for TCP, in its order (RFC 6724), each address once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(Address.from_sockaddr(sockaddr) for *_, sockaddr in found))


class Names:
    """Remembers what names meant."""

    def __init__(self, lookup: Lookup = lookup) -> None:
        self._lookup = lookup
        self._known: dict[tuple[str, int], list[Address]] = {}
        self._threads: dict[tuple[str, int], int] = {}

    def known(self, host: str, port: int) -> list[Address]:
        """The last answer, [] if there was none."""
        return list(self._known.get((host, port), ()))

    def put_last(self, host: str, port: int, address: Address) -> None:
        """This address did not serve: others go first the next time."""
        known = self._known.get((host, port), [])
        if address in known:
            known.remove(address)
            known.append(address)

    def ask(self, host: str, port: int) -> asyncio.Future[list[Address]]:
        """Look it up; the result may be an OSError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Address]] = loop.create_future()
        # Nobody may be waiting for it any more when it comes.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        key = host, port
        if self._threads.get(key, 0) >= LOOKUPS:
            answer.set_exception(socket.gaierror(socket.EAI_AGAIN, "DNS does not answer"))
            return answer
        self._threads[key] = self._threads.get(key, 0) + 1

        def done(found: list[Address], error: OSError | None) -> None:
            self._threads[key] -= 1
            if found:
                old = self._known.get(key, [])
                # The order that was learnt stays.
                self._known[key] = sorted(
                    found, key=lambda a: old.index(a) if a in old else len(old)
                )
            if answer.done():
                return
            if found:
                answer.set_result(self.known(host, port))
            else:
                answer.set_exception(error or socket.gaierror(socket.EAI_NONAME, "no address"))

        def work() -> None:
            found: list[Address] = []
            problem: OSError | None = None
            try:
                found = self._lookup(host, port)
            except OSError as error:
                problem = error
            except UnicodeError:  # a label the codec refuses
                problem = socket.gaierror(socket.EAI_NONAME, "not a host name")
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(done, found, problem)

        threading.Thread(target=work, name="broker name", daemon=True).start()
        return answer


async def race(starts: Iterable[Callable[[], Coroutine[Any, Any, _T]]], stagger: float) -> _T:
    """The first result; each starts when the one before has failed, or has taken too long.

    Those that lose are cancelled and waited for. Raises the first error when all have failed.
    """
    waiting = iter(starts)
    running: set[asyncio.Task[_T]] = set()
    problem: BaseException | None = None
    more = True
    try:
        while True:
            start = next(waiting, None) if more else None
            more = start is not None
            if start is not None:
                running.add(asyncio.create_task(start()))
            if not running:
                raise problem or OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
            done, _ = await asyncio.wait(
                running, timeout=stagger if more else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if not task.cancelled() and task.exception() is None:
                    running.discard(task)
                    return task.result()
            for task in done:
                running.discard(task)
                problem = problem or (None if task.cancelled() else task.exception())
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()


class Dialler:
    """Opens TCP connections to brokers, with TLS where their URL says so."""

    def __init__(self, ca_file: Path | None = None, names: Names | None = None) -> None:
        """Raises ConfigError when `ca_file` cannot be used."""
        self._names = names or Names()
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._trying: set[socket.socket] = set()
        if ca_file is not None:
            self._tls = _tls_context(ca_file)

    @property
    def stranded(self) -> bool:
        """Whether an attempt is made from an address that this host has no longer."""
        return any(address_is_gone(each.getsockname()) for each in self._trying)

    async def dial(self, url: str, make: Callable[[], asyncio.Protocol], timeout: float) -> None:
        """Connect, and give the transport to what `make` makes. Raises OSError, TimeoutError."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or MQTT_PORTS[parts.scheme]
        sock = await self._connect(host, port)
        self._trying.add(sock)
        try:
            loop = asyncio.get_running_loop()
            if parts.scheme not in ("mqtts", "wss"):
                await loop.create_connection(make, sock=sock)
                return
            if self._tls is None:
                self._tls = _tls_context(None)
            try:
                await loop.create_connection(
                    make,
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=host,
                    ssl_handshake_timeout=timeout,
                )
            except BaseException as error:
                if not isinstance(error, ssl.SSLCertVerificationError):
                    self._names.put_last(host, port, _remote(sock))
                raise
        except BaseException:
            sock.close()
            raise
        finally:
            self._trying.discard(sock)

    async def _connect(self, host: str, port: int) -> socket.socket:
        with contextlib.suppress(ValueError):
            return await self._connect_any([Address(canonical_ip(host), port)])
        known = self._names.known(host, port)
        answer = self._names.ask(host, port)
        if not known:
            return await self._connect_any(await answer)
        try:
            return await self._connect_any(known)
        except OSError:
            new = [address for address in await answer if address not in known]
            if not new:
                raise
            return await self._connect_any(new)

    async def _connect_any(self, addresses: Sequence[Address]) -> socket.socket:
        order = _families_in_turn(addresses)[:ADDRESSES]
        return await race([partial(self._connect_to, each) for each in order * 2], STAGGER)

    async def _connect_to(self, address: Address) -> socket.socket:
        family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = socket.socket(family, kind)
        self._trying.add(sock)
        try:
            with contextlib.suppress(OSError):  # EPERM: only the privileged may
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, tuple(address))
        except BaseException:
            sock.close()
            raise
        finally:
            self._trying.discard(sock)
        return sock


def address_is_gone(name: tuple[Any, ...]) -> bool:
    """Whether this host no longer has the local address of a socket (its getsockname())."""
    if not name:
        return False
    try:
        family = socket.AF_INET6 if ":" in name[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((name[0], 0, *name[2:]))
    except OSError as error:
        return error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV)
    return False


def explain(error: BaseException, url: str) -> str:
    """What went wrong with a broker, in words for its user."""
    host = urlsplit(url).hostname or url
    match error:
        case LinkError():
            return f"{host} {error}"
        case ssl.SSLCertVerificationError():
            why = error.verify_message or str(error)
            return f"the certificate of {host} is not trusted: {why.rstrip('.')}"
        case TimeoutError():
            return f"{host} does not answer: timed out"
        case ssl.SSLError() | ConnectionError() if urlsplit(url).scheme in ("mqtts", "wss") and (
            not isinstance(error, ConnectionRefusedError)
        ):
            return f"no TLS connection with {host}: {getattr(error, 'reason', None) or error}"
        case ConnectionRefusedError():
            return f"{host} refuses the connection: nothing listens on that port"
        case socket.gaierror() if error.errno == socket.EAI_AGAIN:
            return f"DNS does not answer, so {host} cannot be found"
        case socket.gaierror():
            return f"there is no host {host}"
        case OSError():
            return f"cannot reach {host}: {error.strerror or error}"
        case _:
            return f"cannot use {host}: {type(error).__name__}: {error}"


def reason_of(error: BaseException, url: str) -> Reason:
    """The same, as far as it matters to what is to be done."""
    tls = urlsplit(url).scheme in ("mqtts", "wss")
    match error:
        case LinkError():
            return "login" if "user name or password" in str(error) else "protocol"
        case ssl.SSLCertVerificationError():
            return certificate_reason(error.verify_code)
        case TimeoutError():
            return "timeout"
        case ssl.SSLError():
            return "protocol"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionError() if tls:
            return "protocol"
        case socket.gaierror():
            return "name"
        case _:
            return "other"


def _families_in_turn(addresses: Sequence[Address]) -> list[Address]:
    """The order of RFC 8305 section 4: the first keeps its place, then the other family's first."""
    first = [a for a in addresses if a.is_ipv6 == addresses[0].is_ipv6]
    other = [a for a in addresses if a.is_ipv6 != addresses[0].is_ipv6]
    pairs = itertools.zip_longest(first, other)
    return [address for pair in pairs for address in pair if address is not None]


def _remote(sock: socket.socket) -> Address:
    try:
        return Address.from_sockaddr(sock.getpeername())
    except OSError:  # not connected any more
        return Address("", 0)


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ConfigError(
            "there is no certificate in this file",
            file=ca_file,
            remedy="name the PEM file of the CA that signed the broker's certificate",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the CA certificates: {error.strerror}",
            file=ca_file,
            remedy=f"check with `ls -l {ca_file}`",
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
