"""Asks a broker whether it would let us in, as the tunnel's own signaller does; and leaves again.

With a client id of its own, no will and no topics: a running tunnel's connection is another one,
and whoever else is there sees nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib

from tunnel.config import RendezvousConfig
from tunnel.doctor.facts import ServerFacts
from tunnel.errors import ConfigError
from tunnel.shell import clock
from tunnel.shell.mqtt_dial import Dialler, explain, reason_of
from tunnel.shell.mqtt_link import Link, LinkError
from tunnel.shell.secret import read_password

GOODBYE = 0.5  # seconds for the end of the connection to leave


async def ask(rendezvous: RendezvousConfig, url: str, limit: float) -> ServerFacts:
    """Whether it lets us in within `limit` seconds, and how long that took. Raises nothing."""
    began = clock.now()
    visit = _Visit()
    try:
        password = None
        if rendezvous.password_file is not None:
            password = read_password(rendezvous.password_file)
        dialler = Dialler(rendezvous.ca_file)

        def make() -> Link:
            visit.link = Link(url, visit, username=rendezvous.username, password=password)
            return visit.link

        async with asyncio.timeout(limit):
            await dialler.dial(url, make, limit)
            await visit.let_in
    except ConfigError as error:
        return ServerFacts(url=url, error=str(error), reason="other")
    except (OSError, LinkError, TimeoutError) as error:
        return ServerFacts(url=url, error=explain(error, url), reason=reason_of(error, url))
    finally:
        if visit.link is not None:
            visit.link.close()
            if visit.link.open_ended:
                with contextlib.suppress(TimeoutError):  # it ends with the loop, then
                    await asyncio.wait_for(visit.link.closed.wait(), GOODBYE)
    return ServerFacts(url=url, seconds=clock.now() - began)


class _Visit:
    """`mqtt_link.Owner` for the time that it takes to be let in."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody waits for it any more when the time is up.
        self.let_in.add_done_callback(lambda done: done.cancelled() or done.exception())

    def opened(self, link: Link) -> None:
        """Nothing is sent beside CONNECT."""

    def accepted(self, link: Link) -> None:
        if not self.let_in.done():
            self.let_in.set_result(None)

    def received(self, link: Link, topic: str, payload: bytes) -> None:
        """Nothing was subscribed to."""

    def answered(self, link: Link) -> None:
        """Nothing was asked."""

    def ended(self, link: Link, reason: str) -> None:
        if not self.let_in.done():
            self.let_in.set_exception(LinkError(reason))
