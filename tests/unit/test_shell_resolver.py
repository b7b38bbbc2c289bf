"""Names to addresses with a look-up that the test answers itself."""

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from tunnel.config import Endpoint
from tunnel.path.network import Address
from tunnel.shell import resolver
from tunnel.shell.resolver import Resolver, lookup

A, B, LITERAL = Endpoint("a.test", 1), Endpoint("b.test", 2), Endpoint("192.0.2.9", 3)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


class Names:
    """A DNS of the test: answers, or raises where it has none."""

    def __init__(self, **known: str) -> None:
        self.known = {f"{name}.test": ip for name, ip in known.items()}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [Address(self.known[host], port)]


class Reports:
    """What the resolver said, and waiting for it to say more."""

    def __init__(self) -> None:
        self.all: list[tuple[str, list[Address]]] = []
        self._news = asyncio.Event()

    def __call__(self, peer: str, addresses: list[Address]) -> None:
        self.all.append((peer, addresses))
        self._news.set()

    async def count(self, count: int) -> None:
        while len(self.all) < count:
            self._news.clear()
            await self._news.wait()


def test_literals_at_once_names_as_they_come_in_the_order_of_the_endpoints() -> None:
    async def main() -> None:
        reports = Reports()
        names = Resolver(asyncio.get_running_loop(), reports, Names(a="192.0.2.1"))
        names.resolve("office", (A, LITERAL))
        assert reports.all == [("office", [Address("192.0.2.9", 3)])]
        await reports.count(2)
        assert reports.all[1] == ("office", [Address("192.0.2.1", 1), Address("192.0.2.9", 3)])
        names.close()

    run(main())


def test_one_slow_name_does_not_hold_up_another() -> None:
    async def main() -> None:
        release = threading.Event()

        def slow(host: str, port: int) -> list[Address]:
            if host == "a.test":
                assert release.wait(10)
                return [Address("192.0.2.1", port)]
            return [Address("192.0.2.2", port)]

        reports = Reports()
        names = Resolver(asyncio.get_running_loop(), reports, slow)
        names.resolve("office", (A, B))
        await reports.count(1)
        assert reports.all == [("office", [Address("192.0.2.2", 2)])]
        release.set()
        await reports.count(2)
        assert reports.all[1][1] == [Address("192.0.2.1", 1), Address("192.0.2.2", 2)]
        names.close()

    run(main())


def test_a_failure_is_tried_again_and_keeps_the_last_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver, "FIRST_RETRY", 0.001)

    async def main() -> None:
        reports, dns = Reports(), Names(b="192.0.2.2")
        names = Resolver(asyncio.get_running_loop(), reports, dns)
        names.resolve("office", (A, B))
        await reports.count(1)
        while dns.asked.count("a.test") < 3:
            await asyncio.sleep(0)
        dns.known["a.test"] = "192.0.2.1"
        await reports.count(2)
        assert reports.all[-1][1] == [Address("192.0.2.1", 1), Address("192.0.2.2", 2)]
        dns.known.clear()
        names.resolve("office", (A, B))
        assert reports.all[-1][1] == [Address("192.0.2.1", 1), Address("192.0.2.2", 2)]
        names.close()

    run(main())


def test_retry_does_not_wait_for_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "FIRST_RETRY", 3600.0)
    monkeypatch.setattr(resolver, "LAST_RETRY", 3600.0)

    async def main() -> None:
        reports, dns = Reports(), Names()
        names = Resolver(asyncio.get_running_loop(), reports, dns)
        names.resolve("office", (A,))
        while not names._peers["office"][A].failures:
            await asyncio.sleep(0)
        dns.known["a.test"] = "192.0.2.1"
        names.retry()
        await reports.count(1)
        names.retry()  # nothing has failed: nothing is asked
        assert dns.asked == ["a.test", "a.test"]
        names.close()

    run(main())


def test_answers_nobody_waits_for_any_more_are_dropped() -> None:
    async def main() -> None:
        release = threading.Event()
        done = threading.Event()

        def slow(host: str, port: int) -> list[Address]:
            assert release.wait(10)
            done.set()
            return [Address("192.0.2.1", port)]

        reports = Reports()
        names = Resolver(asyncio.get_running_loop(), reports, slow)
        names.resolve("office", (A,))
        names.resolve("office", (A,))  # still being looked up: no second thread
        names.resolve("office", (LITERAL,))
        names.resolve("branch", (B,))
        names.close()
        release.set()
        while not done.is_set() or threading.active_count() > 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert reports.all == [("office", [Address("192.0.2.9", 3)])]

    run(main())


def test_the_real_look_up() -> None:
    assert lookup("127.0.0.1", 5) == [Address("127.0.0.1", 5)]
    with pytest.raises(OSError):
        lookup("no-such-name.invalid", 5)


def test_what_is_forgotten_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "FIRST_RETRY", 0.01)

    async def main() -> None:
        reports, dns = Reports(), Names(b="192.0.2.2")
        names = Resolver(asyncio.get_running_loop(), reports, dns)
        names.resolve("office", (A,))
        while dns.asked.count("a.test") < 2:
            await asyncio.sleep(0.001)
        names.forget("office")
        names.forget("nobody")
        asked = dns.asked.count("a.test")
        dns.known["a.test"] = "192.0.2.1"
        names.retry()
        names.resolve("home", (B,))
        await reports.count(1)
        await asyncio.sleep(0.05)
        assert dns.asked.count("a.test") <= asked + 1  # one may have been under way
        assert [peer for peer, _ in reports.all] == ["home"]
        names.close()

    run(main())
