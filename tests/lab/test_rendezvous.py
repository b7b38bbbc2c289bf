"""`martlet rendezvous`, and strangers who reach it: both kinds of broker, each in a namespace.

[host]  lo 127.0.0.1, 198.51.100.1, 198.51.100.2: the rendezvous, its hosts and the strangers
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import uvloop

from cli.demo.netns import Namespace, Namespaces
from tests.lab.rendezvous import Rendezvous, gone
from tests.lab.stranger import Stranger, connect
from tests.unit.fake_broker import publication
from tests.unit.tls_files import make_tls_files
from tunnel.config import RendezvousConfig, loads
from tunnel.ice.stun_server import CHANGE_IP, CHANGE_PORT
from tunnel.shell.mqtt import Signaller
from tunnel.shell.rendezvous import limits

HOST, OTHER = "198.51.100.1", "198.51.100.2"
TOPIC = "martlet/1/" + "a" * 26

Start = Callable[..., Rendezvous]


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespaces() as spaces:
        made = spaces.create("host")
        made.batch("link set lo up", f"addr add {HOST}/32 dev lo", f"addr add {OTHER}/32 dev lo")
        yield made


def missing(kind: str) -> str:
    """Why this kind of broker cannot be tested here, if it cannot."""
    if kind == "mosquitto" and not shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/bin"):
        return "mosquitto is not installed"
    if kind == "amqtt" and importlib.util.find_spec("amqtt") is None:
        return "amqtt is not installed (the extra martlet[rendezvous])"
    return ""


@contextmanager
def started(space: Namespace, tmp_path: Path, kind: str, *arguments: str) -> Iterator[Rendezvous]:
    if reason := missing(kind):
        pytest.skip(reason)
    with Rendezvous(space, tmp_path / "log", "--broker", kind, *arguments) as rendezvous:
        assert rendezvous.ready["broker"] == kind
        yield rendezvous


@pytest.fixture(params=["mosquitto", "amqtt"])
def start(request: pytest.FixtureRequest, space: Namespace, tmp_path: Path) -> Iterator[Start]:
    """Starts a rendezvous with these arguments; called once in a test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(
            started(space, tmp_path, request.param, *arguments)
        )


def inside(space: Namespace, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in the namespace."""

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(main, 60))

    space.call(run)


async def stranger(**options: Any) -> Stranger:
    return await Stranger.connect(HOST, 1883, **options)


# Hosts


def test_those_who_know_a_topic_talk_and_a_large_message_passes(
    start: Start, space: Namespace
) -> None:
    async def main() -> None:
        async with await stranger() as one, await stranger() as other:
            assert await one.accepted() and await other.accepted()
            assert await one.subscribe(TOPIC)
            payload = secrets.token_bytes(4096)
            assert await other.publish(TOPIC, payload)
            while not one.delivered:
                await asyncio.sleep(0.01)
            assert one.delivered == [(TOPIC, payload)]

    start()
    inside(space, main())


def test_a_last_will_is_published_for_those_who_vanish_and_only_for_them(
    start: Start, space: Namespace
) -> None:
    async def main() -> None:
        async with await stranger() as watcher:
            assert await watcher.accepted() and await watcher.subscribe(TOPIC)
            async with await stranger(will=(TOPIC, b"orderly")) as orderly:
                assert await orderly.accepted()
                orderly.send(b"\xe0\x00")  # DISCONNECT
                await orderly.closed.wait()
            async with await stranger(will=(TOPIC, b"vanished")) as vanished:
                assert await vanished.accepted()
            while not watcher.delivered:
                await asyncio.sleep(0.01)
            await watcher.silence()
            assert watcher.delivered == [(TOPIC, b"vanished")]

    start()
    inside(space, main())


# Strangers


WILDCARDS = [
    "#", "+/+/+", "+/1/+", "martlet/#", "martlet/1/#", "martlet/1/+", "martlet/+/+",
    "martlet/+/" + "a" * 26, "+/1/" + "a" * 26, TOPIC + "/#", "$share/g/martlet/1/+",
    "$share/g/#", "$share/g/" + TOPIC, "$SYS/#", "$CONTROL/#", "/#", "martlet/1/+/#",
]  # fmt: skip


def test_nobody_listens_to_what_he_does_not_know(start: Start, space: Namespace) -> None:
    async def main() -> None:
        listeners = []
        async with await stranger() as host, await stranger() as peer:
            assert await host.accepted() and await host.subscribe(TOPIC) and await peer.accepted()
            for wildcard in WILDCARDS:
                listener = await stranger()
                listeners.append(listener)
                assert await listener.accepted()
                assert not await listener.subscribe(wildcard), wildcard
            assert await peer.publish(TOPIC, b"for the host only")
            while not host.delivered:
                await asyncio.sleep(0.01)
            await host.silence()
        for wildcard, listener in zip(WILDCARDS, listeners, strict=True):
            assert listener.delivered == [], wildcard
            await listener.__aexit__()

    start()
    inside(space, main())


def test_a_stranger_with_a_common_client_hears_nothing(start: Start, space: Namespace) -> None:
    async def main() -> None:
        async with await stranger() as peer, aiomqtt.Client(HOST, timeout=2) as client:
            assert await peer.accepted()
            with pytest.raises((aiomqtt.MqttError, AssertionError)):
                for code in await client.subscribe("martlet/1/+"):
                    assert code not in (0, 1, 2)
                raise AssertionError("refused")
            await peer.publish(TOPIC, b"secret")
            heard: list[object] = []

            async def listen() -> None:
                async for message in client.messages:
                    heard.append(message)

            listening = asyncio.create_task(listen())
            await peer.silence()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            assert heard == []

    start()
    inside(space, main())


def test_only_our_topics_carry_messages(start: Start, space: Namespace) -> None:
    async def main() -> None:
        for topic in ("chat", "martlet/1", "martlet/1/a/b", "martlet/2/" + "a" * 26, "$SYS/x"):
            async with await stranger() as one, await stranger() as other:
                assert await one.accepted() and await other.accepted()
                granted = await one.subscribe(topic)
                await other.publish(topic, b"chatter")
                await one.silence()
                assert not granted and one.delivered == [], topic

    start()
    inside(space, main())


def test_messages_that_are_too_large_are_not_delivered(start: Start, space: Namespace) -> None:
    async def main() -> None:
        async with await stranger() as one:
            assert await one.accepted() and await one.subscribe(TOPIC)
            for size in (4097, 8192, 1 << 20):
                async with await stranger() as other:
                    assert await other.accepted()
                    await other.publish(TOPIC, bytes(size))
            async with await stranger(will=(TOPIC, bytes(4500))) as other:
                assert not await other.accepted()
            await one.silence()
            assert one.delivered == []

    start()
    inside(space, main())


def test_nothing_is_retained(start: Start, space: Namespace) -> None:
    async def main() -> None:
        async with await stranger() as one:
            assert await one.accepted()
            await one.publish(TOPIC, b"kept?", flags=3)
        async with await stranger(will=(TOPIC, b"kept?"), will_flags=0x2C) as one:
            assert not await one.accepted()
        async with await stranger() as one:
            assert await one.accepted() and await one.subscribe(TOPIC)
            await one.silence()
            assert one.delivered == []

    start()
    inside(space, main())


def test_there_are_no_sessions_to_store_things_in(start: Start, space: Namespace) -> None:
    async def main() -> None:
        for options in ({"clean": False}, {"keepalive": 0}, {"keepalive": 121}):
            async with await stranger(**options) as one:
                assert not await one.accepted(), options
        for protocol in (3, 5):
            async with await Stranger.open(HOST, 1883) as one:
                one.send(connect().replace(b"MQTT\x04", b"MQTT" + bytes([protocol])))
                assert not await one.accepted(), protocol

    start()
    inside(space, main())


def test_subscriptions_are_bounded(space: Namespace, tmp_path: Path) -> None:
    async def main() -> None:
        async with await stranger() as one:
            assert await one.accepted()
            granted = 0
            while granted <= 2 * limits.SUBSCRIPTIONS and await one.subscribe(
                f"martlet/1/{granted}"
            ):
                granted += 1
            assert limits.SUBSCRIPTIONS // 2 <= granted <= limits.SUBSCRIPTIONS

    with started(space, tmp_path, "mosquitto"):  # that of amqtt: tests/unit
        inside(space, main())


def test_there_are_not_more_clients_than_allowed(start: Start, space: Namespace) -> None:
    async def main() -> None:
        clients = [await stranger() for _ in range(5)]
        assert all([await client.accepted() for client in clients])
        surplus = await stranger()
        assert not await surplus.accepted()
        await clients[0].__aexit__()
        await asyncio.sleep(0.1)
        async with await stranger() as late:
            assert await late.accepted(), "a place that was given up is free again"
        for client in (*clients[1:], surplus):
            await client.__aexit__()

    start("--max-clients", "5")
    inside(space, main())


NONSENSE = [
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(200),
    b"\xff" * 200,
    b"\x10\xff\xff\xff\xff\x7f",
    connect()[:-5] + b"\xc0\x00",
    publication(TOPIC, b"before connect"),
    connect() + connect(),
    connect() + b"\x82\x02\x00\x01",
    connect() + b"\x32\x02\xff\xff",
    connect() + b"\xf0\x00",
]


def test_nonsense_harms_nobody(start: Start, space: Namespace) -> None:
    async def main() -> None:
        async with await stranger() as one, await stranger() as other:
            assert await one.accepted() and await one.subscribe(TOPIC) and await other.accepted()
            noisy = []
            for data in [*NONSENSE, *(secrets.token_bytes(300) for _ in range(30))]:
                noise = await Stranger.open(HOST, 1883)
                noise.send(data)
                noisy.append(noise)
            await one.silence()
            assert await other.publish(TOPIC, b"still here")
            while not one.delivered:
                await asyncio.sleep(0.01)
            for noise in noisy:
                await noise.__aexit__()

    rendezvous = start()
    inside(space, main())
    assert rendezvous.process.poll() is None


def test_who_does_not_read_is_not_waited_for(start: Start, space: Namespace) -> None:
    async def main() -> None:
        async with await stranger() as one, await stranger() as other:
            assert await one.accepted() and await one.subscribe(TOPIC) and await other.accepted()
            deaf = await asyncio.open_connection(HOST, 1883, limit=1024)
            deaf[1].write(connect(name="deaf"))
            topic = TOPIC.encode()
            body = b"\x00\x01" + len(topic).to_bytes(2) + topic + b"\x01"
            deaf[1].write(b"\x82" + bytes([len(body)]) + body)
            await asyncio.sleep(0.2)
            for _ in range(1500):
                assert await other.publish(TOPIC, bytes(4000))
            while len(one.delivered) < 1500:
                await asyncio.sleep(0.01)
            deaf[1].transport.abort()

    start()
    inside(space, main())


# The command


def test_it_prints_what_a_config_takes(space: Namespace, tmp_path: Path) -> None:
    process = space.popen(
        [sys.executable, "-m", "cli.main", "rendezvous", "--listen", HOST, "--stun-port", "3479"],
        stdout=subprocess.PIPE,
        log=tmp_path / "log",
    )
    assert process.stdout is not None
    printed = ""
    while "stun = " not in printed:
        line = process.stdout.readline().decode()
        assert line, (tmp_path / "log").read_text()
        printed += line
    process.terminate()
    assert process.wait(10) == 0
    process.stdout.close()
    own = f"""
    [interface]
    name = "mt0"
    address = ["10.88.0.1/24"]
    private_key = "key"
    [[peer]]
    name = "office"
    public_key = "{_public_key()}"
    allowed_ips = ["10.88.0.2/32"]
    """
    config = loads(own + printed, "mt0.toml")
    assert config.rendezvous is not None
    assert config.rendezvous.url == (f"mqtt://{HOST}:1883",)
    assert [str(stun) for stun in config.ice.stun] == [f"{HOST}:3479"]


def _public_key() -> str:
    from tunnel.identity import Identity

    return Identity.generate().public_key.openssh


def test_mosquitto_has_no_privileges_and_ends_with_us(space: Namespace, tmp_path: Path) -> None:
    with started(space, tmp_path, "mosquitto", "--port", "883") as rendezvous:
        pid = rendezvous.ready["broker_pid"]
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        assert status["Uid"].split()[0] != "0" and status["Groups"].strip() == ""
        assert int(status["CapEff"], 16) == 1 << 10, "CAP_NET_BIND_SERVICE, for the low port"
        directory = directory_of(pid)
        rendezvous.process.send_signal(signal.SIGKILL)
        rendezvous.process.wait(10)
        assert gone(pid), "the broker outlived us"
        shutil.rmtree(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(start: Start, number: int) -> None:
    rendezvous = start()
    pid = rendezvous.ready["broker_pid"]
    directory = directory_of(pid) if pid else None
    assert rendezvous.stop(number) == 0
    assert directory is None or (gone(pid) and not directory.exists())


def directory_of(pid: int) -> Path:
    """Where a mosquitto of ours has its files."""
    (config,) = [
        part
        for part in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if part.endswith("mosquitto.conf")
    ]
    return Path(config).parent


def test_mosquitto_is_started_again_when_it_ends(space: Namespace, tmp_path: Path) -> None:
    async def main() -> None:
        while True:
            with suppress(OSError):
                async with await stranger() as one:
                    if await one.accepted():
                        return
            await asyncio.sleep(0.05)

    with started(space, tmp_path, "mosquitto") as rendezvous:
        for _ in range(3):
            (pid,) = children(rendezvous.process.pid)
            os.kill(pid, signal.SIGKILL)
            assert gone(pid)
            inside(space, main())
        assert "mosquitto has ended" in (tmp_path / "log").read_text()
        assert rendezvous.stop() == 0


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def test_a_taken_port_is_told(start: Start, space: Namespace, tmp_path: Path) -> None:
    taken = space.call(lambda: socket.create_server(("", 1883)))
    with taken, pytest.raises(RuntimeError, match="port 1883 is taken"):
        start()


def test_tls_websockets_and_a_renewed_certificate(
    start: Start, space: Namespace, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    files = make_tls_files(tmp_path / "old", HOST)
    rendezvous = start(
        "--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--websocket",
        "--name", HOST,
    )  # fmt: skip
    urls = [f"mqtts://{HOST}:8883", f"wss://{HOST}/mqtt"]
    assert rendezvous.ready["url"] == urls

    async def meet(url: str, ca: Path) -> None:
        heard = asyncio.Event()
        signaller = Signaller(
            RendezvousConfig(url=(url,), ca_file=ca),
            will=None,
            connected=lambda: signaller.publish(TOPIC, b"hello"),
            disconnected=lambda: None,
            received=lambda topic, payload: heard.set(),
        )
        signaller.subscribe(frozenset([TOPIC]))
        signaller.start()
        await asyncio.wait_for(heard.wait(), 10)
        await signaller.close()

    for url in urls:
        inside(space, meet(url, files.ca))

    new = make_tls_files(tmp_path / "new", HOST)
    shutil.copy(new.certificate, files.certificate)
    shutil.copy(new.key, files.key)
    rendezvous.process.send_signal(signal.SIGHUP)
    context = ssl.create_default_context(cafile=new.ca)

    def renewed(port: int) -> bool:
        try:
            with (
                socket.create_connection((HOST, port), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname=HOST),
            ):
                return True
        except ssl.SSLCertVerificationError:
            return False

    async def both() -> None:
        while not (renewed(8883) and renewed(443)):
            await asyncio.sleep(0.1)

    inside(space, both())
    for url in urls:
        inside(space, meet(url, new.ca))
    if pid := rendezvous.ready["broker_pid"]:
        deadline = time.monotonic() + 20
        while (key := directory_of(pid) / "key.pem").exists():
            assert time.monotonic() < deadline, f"{key} is left behind"
            time.sleep(0.1)


def test_websocket_clients_are_bounded_and_other_paths_refused(
    start: Start, space: Namespace
) -> None:
    start("--websocket-port", "8080", "--max-clients", "2")

    async def status(path: str) -> tuple[bytes, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(HOST, 8080)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: mqtt\r\n\r\n".encode()
        )
        return (await reader.readline()).split()[1], writer

    async def main() -> None:
        answers = [await status(path) for path in ("/", "/mqtt", "/mqtt", "/mqtt")]
        assert [code for code, _ in answers] == [b"404", b"101", b"101", b"503"]
        for _, writer in answers:
            writer.transport.abort()

    inside(space, main())


# STUN


def binding(change: int | None = None) -> bytes:
    """A Binding request (RFC 8489), with CHANGE-REQUEST (RFC 5780 section 7.2) if told."""
    attribute = b"" if change is None else struct.pack("!HHI", 3, 4, change)
    return struct.pack("!HHI", 1, len(attribute), 0x2112A442) + secrets.token_bytes(12) + attribute


def ask(space: Namespace, server: str, request: bytes) -> tuple[bytes, tuple[str, int]]:
    """The answer, and where it came from."""

    def run() -> tuple[bytes, tuple[str, int]]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.bind(("127.0.0.1", 0))
            client.sendto(request, (server, 3478))
            data, source = client.recvfrom(2048)
            return data, source[:2]

    return space.call(run)


def test_stun_answers_from_the_address_it_was_asked_at(start: Start, space: Namespace) -> None:
    start()
    for server in (HOST, OTHER):
        request = binding()
        answer, source = ask(space, server, request)
        assert source == (server, 3478)
        assert answer[:2] == b"\x01\x01" and answer[8:20] == request[8:20]


def test_stun_answers_from_the_other_address_and_port_when_asked(
    space: Namespace, tmp_path: Path
) -> None:
    arguments = ("--listen", HOST, "--alternate-address", OTHER)
    with started(space, tmp_path, "mosquitto", *arguments):
        for change, expected in (
            (0, (HOST, 3478)),
            (CHANGE_PORT, (HOST, 3479)),
            (CHANGE_IP, (OTHER, 3478)),
            (CHANGE_IP | CHANGE_PORT, (OTHER, 3479)),
        ):
            answer, source = ask(space, HOST, binding(change))
            assert source == expected and answer[:2] == b"\x01\x01"
