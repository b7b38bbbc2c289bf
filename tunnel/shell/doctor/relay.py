"""Asks a TURN server for a relay, over one transport, and gives it back.

As the tunnel does, with the configured credentials, from a socket of its own: a running tunnel's
relays are others. Nothing is sent through it. Where the server is full, the reason may be those
who ask beside us, so that it is asked again for a while.
"""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
from collections.abc import Sequence

from tunnel.config import TurnConfig
from tunnel.doctor.facts import ServerFacts
from tunnel.errors import ConfigError
from tunnel.ice.turn import Allocated, Allocation, Ended
from tunnel.ice.turn_message import REASONS, Problem
from tunnel.obstacle import Reason
from tunnel.path.network import Address, is_usable_remote
from tunnel.shell import clock
from tunnel.shell.carrier import CLOSED, Carrier, StreamCarrier, UdpCarrier, explain
from tunnel.shell.doctor.threads import in_thread
from tunnel.shell.relay.ways import Server
from tunnel.shell.resolver import lookup

ADDRESSES = 2  # of one server
RESTARTS = 2
"""From another port, or at another server, where that is what the server wants."""
FULL_PATIENCE, FULL_PAUSE = 2.0, 0.3
"""Seconds: what others of this doctor hold is given back within a round trip, and a server takes a
moment to notice."""
_ANYWHERE = {False: "0.0.0.0", True: "::"}


async def ask(turn: TurnConfig, transport: str, limit: float) -> ServerFacts:
    """Whether it gives a relay within `limit` seconds, and how long that took. Raises nothing."""
    began = clock.now()
    try:
        async with asyncio.timeout(limit):
            visit = _Visit(Server.of(turn), transport)
            relayed = await visit.first(await visit.addresses())
    except TimeoutError:
        failure = _Failed("timeout", "no answer from the server")
    except _Failed as error:
        failure = error
    else:
        return ServerFacts(
            url=turn.url,
            transport=transport,
            seconds=clock.now() - began,
            detail=str(relayed),
        )
    return ServerFacts(url=turn.url, transport=transport, error=failure.text, reason=failure.reason)


class _Failed(Exception):
    """There is no relay; `text` in the user's words."""

    def __init__(
        self,
        reason: Reason,
        text: str,
        problem: Problem | None = None,
        elsewhere: Address | None = None,
    ) -> None:
        self.reason, self.text = reason, text
        self.problem, self.elsewhere = problem, elsewhere


class _Visit:
    """One question to one server, at whatever address it takes."""

    def __init__(self, server: Server, transport: str) -> None:
        self._server = server
        self._transport = transport
        self._full_until = clock.now() + FULL_PATIENCE

    async def addresses(self) -> list[Address]:
        host, port = self._server.endpoint.host, self._server.endpoint.port
        try:
            return (await in_thread(lambda: lookup(host, port)))[:ADDRESSES]
        except (OSError, UnicodeError):
            raise _Failed("name", f"there is no host {host}") from None

    async def first(self, addresses: Sequence[Address]) -> Address:
        """The first relay that one of them gives."""
        tasks = [asyncio.create_task(self._at(address)) for address in addresses]
        failure = _Failed("name", f"{self._server.endpoint.host} has no address")
        try:
            for done in asyncio.as_completed(tasks):
                try:
                    return await done
                except _Failed as error:
                    failure = error
            raise failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _at(self, address: Address) -> Address:
        """Of the family that the server is reached by, or else of the other."""
        try:
            return await self._of(address, address.is_ipv6)
        except _Failed as error:
            if error.problem is not Problem.UNSUPPORTED:
                raise
        return await self._of(address, not address.is_ipv6)

    async def _of(self, address: Address, ipv6: bool) -> Address:
        restarts = 0
        while True:
            try:
                return await self._once(address, ipv6)
            except _Failed as error:
                if error.problem is Problem.FULL and clock.now() < self._full_until:
                    await asyncio.sleep(FULL_PAUSE)
                    continue
                elsewhere = error.elsewhere
                if restarts == RESTARTS:
                    raise
                if elsewhere is not None and is_usable_remote(elsewhere.host):
                    address = elsewhere
                elif error.problem is not Problem.MISMATCH:
                    raise
                restarts += 1

    async def _once(self, address: Address, ipv6: bool) -> Address:
        config = self._server.config
        try:
            password = self._server.password()
        except ConfigError as error:
            raise _Failed("other", f"password file {config.password_file}: {error}") from None
        except ValueError:
            raise _Failed("other", "the password file is not UTF-8 text") from None
        allocation = Allocation(
            username=config.username,
            password=password,
            ipv6=ipv6,
            stream=self._transport != "udp",
            rng=random.SystemRandom(),
        )
        attempt = _Attempt(allocation)
        try:
            attempt.begin(address, self._transport, self._server.endpoint.host)
            return await attempt.relayed
        finally:
            attempt.close()


class _Attempt:
    """One allocation, and what carries its messages."""

    def __init__(self, allocation: Allocation) -> None:
        self._loop = asyncio.get_running_loop()
        self.relayed: asyncio.Future[Address] = self._loop.create_future()
        # Nobody waits for it any more when the time is up.
        self.relayed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._allocation = allocation
        self._carrier: Carrier | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False

    def begin(self, address: Address, transport: str, host: str) -> None:
        ip = _ANYWHERE[address.is_ipv6]  # the kernel chooses
        try:
            if transport == "udp":
                self._carrier = UdpCarrier(
                    ip, "", address, deliver=self._deliver, refused=self._refused
                )
                self._ready()
            else:
                self._carrier = StreamCarrier(
                    ip,
                    "",
                    address,
                    context=ssl.create_default_context() if transport == "tls" else None,
                    host=host,
                    ready=self._ready,
                    deliver=self._deliver,
                    lost=self._lost,
                )
        except OSError as error:
            self._fail(_Failed(*explain(error)))

    def close(self) -> None:
        """Give back what there is."""
        if self._timer is not None:
            self._timer.cancel()
        if self._carrier is not None:
            self._allocation.close(clock.now())
            self._send()
            self._carrier.close()

    def _ready(self) -> None:
        self._allocation.start(clock.now())
        self._flush()

    def _refused(self) -> None:
        self._fail(_Failed(*explain(ConnectionRefusedError(errno.ECONNREFUSED, ""))))

    def _lost(self, reason: Reason, text: str) -> None:
        if text == CLOSED and not self._heard:
            reason, text = "protocol", "it does not speak TURN: it has closed the connection"
        self._fail(_Failed(reason, text))

    def _fail(self, failure: _Failed) -> None:
        if not self.relayed.done():
            self.relayed.set_exception(failure)

    def _deliver(self, messages: list[memoryview]) -> None:
        self._heard = True
        for message in messages:
            self._allocation.receive(bytes(message), clock.now())
        self._flush()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._send()
        while (event := self._allocation.next_event()) is not None:
            match event:
                case Allocated(relayed) if not self.relayed.done():
                    self.relayed.set_result(relayed)
                case Ended(problem, text, elsewhere):
                    reason = REASONS.get(problem, "other")
                    self._fail(_Failed(reason, text, problem, elsewhere))
        deadline = self._allocation.get_timer()
        if deadline is not None and not self.relayed.done():
            wait = max(0.0, deadline - clock.now())
            self._timer = self._loop.call_later(wait, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._allocation.handle_timer(clock.now())
        self._flush()

    def _send(self) -> None:
        assert self._carrier is not None
        for message in self._allocation.messages_to_send(clock.now()):
            self._carrier.send(message)
