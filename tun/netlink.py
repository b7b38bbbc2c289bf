"""How this package talks to rtnetlink: one short conversation at a time."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

# IPRoute has no types, and its methods follow the message, not a signature.
Netlink: TypeAlias = IPRoute

T = TypeVar("T")

__all__ = ["Netlink", "NetlinkError", "converse"]


def converse(talk: Callable[[Netlink], T]) -> T:
    """Run `talk` with a netlink socket of its own; returns what it returns, raises what it raises.

    May be called inside a running event loop, which then waits: a few milliseconds.

    pyroute2's synchronous IPRoute drives an asyncio loop of its own, which Python forbids in a
    thread that already runs one; and uvloop, were it the loop, refuses netlink sockets. Hence a
    thread and a plain selector loop. The thread is new each time, so that it is in the network
    namespace its caller is in now.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        loop = asyncio.SelectorEventLoop()
        try:
            # groups=0: no notifications, only the answers to what is asked.
            with IPRoute(use_event_loop=loop, groups=0) as netlink:
                results.append(talk(netlink))
        except BaseException as error:  # handed to the caller below
            failures.append(error)
        finally:
            # A turn for the transport that IPRoute has aborted, or it never frees its socket.
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    thread = threading.Thread(target=run, name="netlink")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
