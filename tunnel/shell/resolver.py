"""Host names to addresses, again and again, without ever holding up the loop.

Each name is looked up in a thread of its own, since getaddrinfo(3) may take half a minute. These
threads are daemons: the executor that the loop's own getaddrinfo uses would be waited for at exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tunnel.config import Endpoint
from tunnel.path.network import Address
from tunnel.shell.log import Log

FIRST_RETRY = 1.0
"""Seconds until a name that could not be resolved is tried again; doubles up to LAST_RETRY."""

LAST_RETRY = 30.0
"""Seconds: soon enough after an outage, and no resolver is pestered."""

Lookup = Callable[[str, int], list[Address]]
"""(host, port) -> addresses; blocks; raises OSError."""


def lookup(host: str, port: int) -> list[Address]:
    """getaddrinfo(3) for UDP, in its order (RFC 6724), each address once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    return list(dict.fromkeys(Address.from_sockaddr(sockaddr) for *_, sockaddr in found))


class Resolver:
    """Resolves the endpoints of peers.

    `resolved` gets a peer and all its addresses known so far, in the order of its endpoints: at
    once for literal addresses, and again whenever a name has an answer. STUN servers are resolved
    like a peer without a name.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        resolved: Callable[[str, list[Address]], None],
        lookup: Lookup = lookup,
    ) -> None:
        self._loop = loop
        self._resolved = resolved
        self._lookup = lookup
        self._peers: dict[str, dict[Endpoint, _Answer]] = {}
        self._closed = False

    def resolve(self, peer: str, endpoints: Iterable[Endpoint]) -> None:
        """Resolve these, in place of what the peer had. A name that fails keeps its last answer."""
        known = self._peers.get(peer, {})
        answers = {endpoint: known.get(endpoint) or _Answer() for endpoint in endpoints}
        for endpoint, answer in known.items():
            if endpoint not in answers:
                answer.stop_retrying()
        self._peers[peer] = answers
        for endpoint, answer in answers.items():
            if endpoint.ip is not None:
                answer.addresses = [Address(str(endpoint.ip), endpoint.port)]
            else:
                self._start(peer, endpoint, answer)
        self._report(peer)

    def forget(self, peer: str) -> None:
        """Nobody wants this peer any more."""
        for answer in self._peers.pop(peer, {}).values():
            answer.stop_retrying()

    def retry(self) -> None:
        """Try at once what has failed: the network changed, so perhaps DNS is back."""
        for peer, answers in self._peers.items():
            for endpoint, answer in answers.items():
                if answer.failures:
                    answer.failures = 0
                    self._start(peer, endpoint, answer)

    def close(self) -> None:
        """Report nothing any more."""
        self._closed = True
        for answers in self._peers.values():
            for answer in answers.values():
                answer.stop_retrying()

    def _start(self, peer: str, endpoint: Endpoint, answer: _Answer) -> None:
        answer.stop_retrying()
        if answer.running or self._closed:
            return
        answer.running = True
        threading.Thread(
            target=self._work, args=(peer, endpoint, answer), name="resolver", daemon=True
        ).start()

    def _work(self, peer: str, endpoint: Endpoint, answer: _Answer) -> None:
        """In the thread."""
        addresses: list[Address] = []
        problem = ""
        try:
            addresses = self._lookup(endpoint.host, endpoint.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label the codec refuses
            problem = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants it any more
            self._loop.call_soon_threadsafe(self._done, peer, endpoint, answer, addresses, problem)

    def _done(
        self, peer: str, endpoint: Endpoint, answer: _Answer, addresses: list[Address], problem: str
    ) -> None:
        answer.running = False
        if self._closed or self._peers.get(peer, {}).get(endpoint) is not answer:
            return
        if not addresses:
            delay = min(LAST_RETRY, FIRST_RETRY * 2.0**answer.failures)
            tell = _log.debug if answer.failures else _log.warning
            fields = _whose(peer)
            tell("cannot resolve", **fields, endpoint=endpoint, error=problem, retry_s=delay)
            answer.failures += 1
            answer.timer = self._loop.call_later(delay, self._start, peer, endpoint, answer)
            return
        if addresses != answer.addresses:
            found = ",".join(map(str, addresses))
            _log.info("resolved", **_whose(peer), endpoint=endpoint, to=found)
        answer.failures = 0
        answer.addresses = addresses
        self._report(peer)

    def _report(self, peer: str) -> None:
        found = [a for answer in self._peers[peer].values() for a in answer.addresses]
        if found:
            self._resolved(peer, list(dict.fromkeys(found)))


@dataclass(eq=False, slots=True)
class _Answer:
    """What is known of one endpoint."""

    addresses: list[Address] = field(default_factory=list)
    failures: int = 0
    running: bool = False
    timer: asyncio.TimerHandle | None = None

    def stop_retrying(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def _whose(peer: str) -> dict[str, str]:
    """A field of the log: whose name it is; that of a server is no name of a peer."""
    return {"peer": peer} if peer and ":" not in peer else {"of": peer or "stun"}


_log = Log("resolver")
