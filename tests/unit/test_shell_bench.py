"""The children that serve a bench: real processes, on the loopback device."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.unit.test_shell_driver import World
from tests.unit.test_shell_driver import run as run_driver
from tunnel.events import BenchAnswer, BenchWanted
from tunnel.shell import bench, load
from tunnel.shell.bench import Benches, BenchRefused

HERE = "127.0.0.1"


def run(test: Callable[[Benches], Awaitable[None]], device: str = "lo") -> None:
    async def main() -> None:
        benches = Benches(device)
        try:
            await asyncio.wait_for(test(benches), 20)
        finally:
            benches.close()
        assert not benches.running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_a_child_serves_and_ends_with_its_lifeline() -> None:
    async def test(benches: Benches) -> None:
        port, secret = benches.serve("office", HERE, (HERE,), 30)
        pid = benches.running["office"]

        def talk(kind: bytes) -> socket.socket:
            return load.connect((HERE, port), secret, kind, device="lo", timeout=5)

        lifeline = await asyncio.to_thread(talk, load.LIFELINE)
        if os.geteuid() == 0:
            assert os.stat(f"/proc/{pid}").st_uid == load.NOBODY
        with await asyncio.to_thread(talk, load.ECHO) as echo:
            echo.sendall(bytes(load.ECHO_BYTES))
            await asyncio.to_thread(load.read_exactly, echo, load.ECHO_BYTES)
        assert benches.running == {"office": pid}
        lifeline.close()
        await until(lambda: not benches.running)
        assert not exists(pid)  # not even as a zombie

    run(test)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6() -> None:
    async def test(benches: Benches) -> None:
        try:
            port, secret = benches.serve("office", "::1", ("::1",), 30)
        except BenchRefused:
            pytest.skip("no IPv6 here")
        with await asyncio.to_thread(
            load.connect, ("::1", port), secret, load.LIFELINE, device="lo", timeout=5
        ):
            pass
        await until(lambda: not benches.running)

    run(test)


def test_one_for_each_peer_and_not_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(benches: Benches) -> None:
        benches.serve("office", HERE, (HERE,), 30)
        benches.serve("home", HERE, (HERE,), 30)
        with pytest.raises(BenchRefused, match="a bench is running already"):
            benches.serve("office", HERE, (HERE,), 30)
        os.kill(benches.running["office"], signal.SIGKILL)
        await until(lambda: "office" not in benches.running)
        with pytest.raises(BenchRefused, match="only just now"):
            benches.serve("office", HERE, (HERE,), 30)
        monkeypatch.setattr(bench, "START_INTERVAL", 0)
        benches.serve("office", HERE, (HERE,), 30)
        assert len(benches.running) == 2

    run(test)


def test_a_child_ends_by_itself_in_time() -> None:
    async def test(benches: Benches) -> None:
        benches.serve("office", HERE, (HERE,), 1)
        os.kill(benches.running["office"], signal.SIGCONT)  # it is there
        await until(lambda: not benches.running)

    run(test)


def test_closing_ends_all() -> None:
    pids: list[int] = []

    async def test(benches: Benches) -> None:
        benches.serve("office", HERE, (HERE,), 30)
        benches.serve("home", HERE, (HERE,), 30)
        pids.extend(benches.running.values())

    run(test)
    assert len(pids) == 2
    assert not any(map(exists, pids))


@pytest.mark.parametrize(
    ("address", "device"), [("192.0.2.1", "lo"), (HERE, "nodevice0"), ("fd88::1", "lo")]
)
def test_what_cannot_be_listened_on_is_refused(address: str, device: str) -> None:
    async def test(benches: Benches) -> None:
        with pytest.raises(BenchRefused, match="it failed there"):
            benches.serve("office", address, (HERE,), 30)

    run(test, device)


def test_no_process_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    async def test(benches: Benches) -> None:
        with pytest.raises(BenchRefused, match="it failed there: No such file"):
            benches.serve("office", HERE, (HERE,), 30)

    run(test)


ORPHAN = """
import asyncio, os, sys
from tunnel.shell.bench import Benches
async def main():
    benches = Benches("lo")
    benches.serve("office", "127.0.0.1", ("127.0.0.1",), 30)
    print(benches.running["office"], flush=True)
    sys.stdin.read()
    os._exit(9)
asyncio.run(main())
"""


def test_a_child_does_not_outlive_its_tunnel() -> None:
    tunnel = subprocess.Popen(
        [sys.executable, "-c", ORPHAN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with tunnel:
        assert tunnel.stdout is not None
        pid = int(tunnel.stdout.readline())
        assert exists(pid)
        tunnel.kill()

    async def gone() -> None:
        await asyncio.wait_for(until(lambda: not exists(pid)), 10)

    asyncio.run(gone())


def test_the_driver_serves_what_the_node_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[object, ...]] = []

    def serve(_: Benches, *arguments: object) -> tuple[int, bytes]:
        served.append(arguments)
        if len(served) == 2:
            raise BenchRefused("busy")
        return 4000, bytes(16)

    monkeypatch.setattr(Benches, "serve", serve)

    async def test(world: World) -> None:
        world.start()
        for token in (7, 8):
            world.node.events.append(BenchWanted("office", token, "10.0.0.1", ("10.0.0.2",), 9))
        world.driver._turn(lambda now: None)
        assert not served  # not from inside a turn
        await world.until(lambda: len(world.node.named("bench_served")) == 2)
        assert served[0] == ("office", "10.0.0.1", ("10.0.0.2",), 9)
        assert world.node.named("bench_served") == [
            ("office", 7, 4000, bytes(16), ""),
            ("office", 8, 0, b"", "busy"),
        ]

    run_driver(test)


def test_the_driver_tells_who_asked() -> None:
    async def test(world: World) -> None:
        world.start()
        answers: list[BenchAnswer] = []
        world.driver.bench("office", 30, answers.append)
        forget = world.driver.bench("office", 30, answers.append)
        (_, first, seconds), (_, second, _) = world.node.named("bench")
        assert seconds == 30
        forget()
        told = BenchAnswer("office", first, problem="no")
        world.node.events.extend([told, told, BenchAnswer("office", second)])
        world.driver._turn(lambda now: None)
        assert answers == [told]

    run_driver(test)
