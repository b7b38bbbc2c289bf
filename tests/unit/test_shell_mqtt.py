"""The signaller against a broker that does what the test wants of it, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.unit.fake_broker import (
    ACCEPTED,
    CONNECT,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Broker,
    Connection,
    never_answers,
    polite,
    publication,
)
from tests.unit.tls_files import TlsFiles, tls_files
from tunnel.config import RendezvousConfig
from tunnel.errors import ConfigError
from tunnel.path.network import Address
from tunnel.shell import mqtt, mqtt_dial, mqtt_link
from tunnel.shell.mqtt import Signaller
from tunnel.shell.mqtt_dial import Names, race

__all__ = ["tls_files"]  # a fixture

TOPIC, OTHER = "martlet/1/" + "a" * 26, "martlet/1/" + "b" * 26
WILL = ("martlet/1/" + "w" * 26, b"gone")


def run(main: Coroutine[Any, Any, None], timeout: float = 20) -> None:
    """In the loop that the product runs in."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, timeout))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


class Ends:
    """A signaller and all that it said."""

    def __init__(self, *urls: str, greet: bytes = b"", **options: Any) -> None:
        config = {
            key: options.pop(key)
            for key in ("username", "password_file", "ca_file")
            if key in options
        }
        self.events: list[str] = []
        self.received: list[tuple[str, bytes]] = []
        self.signaller = Signaller(
            RendezvousConfig(url=urls, **config),
            will=WILL,
            connected=self._connected,
            disconnected=lambda: self.events.append("disconnected"),
            received=lambda topic, payload: self.received.append((topic, payload)),
            **options,
        )
        self._greet = greet

    def _connected(self) -> None:
        self.events.append("connected")
        if self._greet:
            self.signaller.publish(TOPIC, self._greet)

    async def __aenter__(self) -> Ends:
        self.signaller.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.signaller.close()

    @property
    def state(self) -> str:
        return str(self.signaller.status()["state"])

    @property
    def error(self) -> str:
        return self.signaller.status()["error"] or ""


def refused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def closed() -> str:
    return f"mqtt://127.0.0.1:{refused_port()}"


# What it is for


def test_connect_subscribe_and_publish_travel_in_one_flight() -> None:
    async def main() -> None:
        async with Broker() as broker:
            ends = Ends(broker.url, greet=b"hello")
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)
                assert ends.received == [(TOPIC, b"hello")]
                assert ends.events == ["connected"] and ends.state == "connected"
                assert broker.connections[0].flights[0] == [CONNECT, SUBSCRIBE, PUBLISH]

    run(main())


def test_a_change_of_topics_sends_the_difference() -> None:
    async def main() -> None:
        async with Broker() as broker, Ends(broker.url) as ends:
            await until(lambda: ends.state == "connected")
            (connection,) = broker.connections
            ends.signaller.subscribe(frozenset([TOPIC]))
            await until(lambda: connection.topics == {TOPIC})
            ends.signaller.subscribe(frozenset([OTHER]))
            await until(lambda: connection.topics == {OTHER})
            before = len(connection.flights)
            ends.signaller.subscribe(frozenset([OTHER]))
            ends.signaller.publish(OTHER, b"x")
            await until(lambda: ends.received)
            assert connection.flights[before:][0] == [PUBLISH]

    run(main())


def test_many_topics_are_subscribed_to_in_packets_of_a_bounded_size() -> None:
    topics = frozenset(f"martlet/1/{number:026}" for number in range(1000))

    async def main() -> None:
        async with Broker() as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(topics)
            async with ends:
                await until(lambda: broker.connections and broker.connections[0].topics == topics)
                kinds = broker.connections[0].kinds
                assert kinds.count(SUBSCRIBE) > 10

    run(main())


def test_what_is_published_without_a_connection_is_dropped_and_counted() -> None:
    async def main() -> None:
        async with Ends(closed()) as ends:
            ends.signaller.publish(TOPIC, b"x")
            ends.signaller.publish(TOPIC, b"y")
            assert ends.signaller.status()["dropped"] == 2

    run(main())


def test_close_says_goodbye_so_that_there_is_no_last_will() -> None:
    async def main() -> None:
        async with Broker() as broker:
            async with Ends(broker.url) as ends:
                await until(lambda: ends.state == "connected")
            await until(lambda: broker.connections[0].closed)
            assert broker.connections[0].disconnected
            assert ends.events == ["connected"], "nobody is called after close"

    run(main())


def test_a_new_client_name_for_each_connection_and_the_will_in_each() -> None:
    connects: list[bytes] = []

    async def once(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind == CONNECT:
                connects.append(body)
                connection.send(ACCEPTED)
                await asyncio.sleep(0.01)
                return

    async def main() -> None:
        async with Broker(once) as broker, Ends(broker.url):
            await until(lambda: len(connects) == 2)

    run(main())
    names = {body[12 : 12 + int.from_bytes(body[10:12])] for body in connects}
    assert len(names) == 2 and all(len(name) <= 23 and name.isalnum() for name in names)
    for body in connects:
        assert body.startswith(b"\x00\x04MQTT\x04"), "MQTT 3.1.1"
        assert body[7] & 0x02, "a clean session"
        assert body[7] & 0x3C == 0x0C, "a will of QoS 1 that is not retained"
        assert body[8:10] == (30).to_bytes(2), "keepalive"
        assert WILL[0].encode() in body and WILL[1] in body


# Brokers that do not serve


def test_a_refused_connection_is_tried_again_and_served_when_somebody_listens() -> None:
    async def main() -> None:
        port = refused_port()
        async with Ends(f"mqtt://127.0.0.1:{port}") as ends:
            await until(lambda: "refuses the connection" in ends.error)
            assert ends.state == "connecting" and ends.events == []
            async with Broker(port=port):
                await until(lambda: ends.state == "connected")
                assert not ends.error

    run(main())


def test_why_no_broker_serves_is_told_once_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "martlet.mqtt")

    def warnings() -> list[Any]:
        return [r for r in caplog.records if r.getMessage() == "no broker"]

    async def main() -> None:
        port = refused_port()
        url = f"mqtt://127.0.0.1:{port}"
        async with Ends(url) as ends:
            await until(lambda: ends.signaller._failures >= 3)
            (obstacle,) = ends.signaller.obstacles()
            assert obstacle.about == "broker" and url in obstacle.problem
            assert "martlet rendezvous" in obstacle.remedy
            assert ends.signaller.status()["remedy"] == obstacle.remedy
            (told,) = warnings()
            assert told.fields["broker"] == url and told.fields["remedy"] == obstacle.remedy
            async with Broker(port=port):
                await until(lambda: ends.state == "connected")
                assert ends.signaller.obstacles() == []
                assert ends.signaller.status()["remedy"] == ""
            await until(lambda: len(warnings()) == 2)

    run(main())


@pytest.mark.parametrize(
    "code, words", [(1, "this version of MQTT"), (3, "not available"), (4, "user name or password")]
)
def test_a_refusing_connack_is_told_in_words(code: int, words: str) -> None:
    async def refuse(connection: Connection) -> None:
        async for _ in connection.packets():
            connection.send(b"\x20\x02\x00" + bytes([code]))
            await asyncio.sleep(0.05)
            return

    async def main() -> None:
        async with Broker(refuse) as broker, Ends(broker.url, greet=b"x") as ends:
            await until(lambda: words in ends.error)
            await until(lambda: ends.events[:2] == ["connected", "disconnected"])
            broker.manner = polite
            await until(lambda: ends.state == "connected")

    run(main())


GARBAGE = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": bytes(4096),
    "a publication first": publication(TOPIC, b"x"),
    "huge length": b"\x20\xff\xff\xff\x7f",
    "endless length": b"\x20\xff\xff\xff\xff\xff\xff",
    "connack cut short": b"\x20\x00",
    "connack too long": b"\x20\x05\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_instead_of_connack(what: str) -> None:
    async def babble(connection: Connection) -> None:
        connection.send(GARBAGE[what])
        await asyncio.sleep(1)

    async def main() -> None:
        async with Broker(babble) as broker, Ends(broker.url) as ends:
            await until(lambda: "MQTT" in ends.error or "larger" in ends.error)
            assert ends.state == "connecting"
            broker.manner = polite
            await until(lambda: ends.state == "connected")

    run(main())


HOSTILE = {
    "qos 2": publication(TOPIC, b"x", flags=4),
    "qos 3": publication(TOPIC, b"x", flags=6),
    "huge": publication(TOPIC, bytes(8192)),
    "no topic": b"\x32\x00",
    "topic longer than the packet": b"\x32\x05\xff\xffabc",
    "suback without a list": b"\x90\x02\x00\x01",
    "suback cut short": b"\x90\x00",
    "puback cut short": b"\x40\x01\x00",
    "a second connack that refuses": b"\x20\x02\x00\x05",
    "connect": b"\x10\x02\x00\x00",
    "pubrel": b"\x62\x02\x00\x01",
    "pingresp with a body": b"\xd0\x02\x00\x00",
    "kind 0": b"\x00\x00",
    "kind 15": b"\xf0\x00",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_broker_that_breaks_the_rules_is_left_or_ignored(what: str) -> None:
    async def turn_bad(connection: Connection) -> None:
        async for kind, body in connection.packets():
            connection.answer(kind, body)
            if kind == SUBSCRIBE:
                connection.send(HOSTILE[what] + publication(TOPIC, b"behind"))

    async def main() -> None:
        async with Broker(turn_bad) as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: "disconnected" in ends.events or ends.received)
                broker.manner = polite
                await until(lambda: ends.state == "connected")

    run(main())


def test_topics_that_are_no_text_and_unknown_acknowledgements_are_ignored() -> None:
    async def odd(connection: Connection) -> None:
        async for kind, body in connection.packets():
            connection.answer(kind, body)
            if kind == SUBSCRIBE:
                connection.send(b"\x32\x06\x00\x02\xff\xfe\x00\x07")
                connection.send(b"\x40\x02\x12\x34\x90\x03\x12\x34\x01\xb0\x02\x12\x34")
                connection.deliver(TOPIC, b"good")

    async def main() -> None:
        async with Broker(odd) as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)
                assert ends.received == [(TOPIC, b"good")]
                assert ends.events == ["connected"]

    run(main())


def test_closing_in_the_middle_of_a_packet() -> None:
    async def cut(connection: Connection) -> None:
        async for kind, body in connection.packets():
            connection.answer(kind, body)
            if kind == SUBSCRIBE:
                connection.send(publication(TOPIC, b"whole")[:-3])
                await asyncio.sleep(0.02)
                return

    async def main() -> None:
        async with Broker(cut) as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: "disconnected" in ends.events)
                assert "closed the connection" in ends.error
                assert ends.received == []
                broker.manner = polite
                await until(lambda: broker.connections[-1].topics == {TOPIC})

    run(main())


def test_packets_come_in_whatever_pieces() -> None:
    async def drip(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind == CONNECT:
                stream = ACCEPTED + publication(TOPIC, b"one") + publication(TOPIC, bytes(3000), 2)
                for byte in stream:
                    connection.send(bytes([byte]))
                    await asyncio.sleep(0)
            else:
                connection.answer(kind, body)

    async def main() -> None:
        async with Broker(drip) as broker, Ends(broker.url) as ends:
            await until(lambda: len(ends.received) == 2)
            assert ends.received == [(TOPIC, b"one"), (TOPIC, bytes(3000))]

    run(main())


def test_a_broker_that_accepts_and_hangs_up_is_not_hammered() -> None:
    async def rude(connection: Connection) -> None:
        async for kind, body in connection.packets():
            connection.answer(kind, body)
            return

    async def main() -> None:
        async with Broker(rude) as broker, Ends(broker.url):
            await asyncio.sleep(1.5)
            # 0.1 + 0.2 + 0.4 + 0.8 s at the least.
            assert 2 <= len(broker.connections) <= 5

    run(main())


def test_a_broker_that_acknowledges_nothing_is_not_hammered() -> None:
    """Or so late that each connection was given up before."""

    async def forgetful(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind != PUBLISH:
                connection.answer(kind, body)

    async def main() -> None:
        async with Broker(forgetful) as broker, Ends(broker.url, greet=b"hello"):
            await asyncio.sleep(4)
            # Each is doubted after 0.25 s; the next waits for 0.1, 0.2, 0.4, 0.8 s at the least.
            assert 2 <= len(broker.connections) <= 6

    run(main())


def test_refused_subscriptions_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def no(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind == SUBSCRIBE:
                connection.send((b"\x90\x03" + body[:2] + b"\x80") * 100)
                connection.deliver(TOPIC, b"end")
            else:
                connection.answer(kind, body)

    async def main() -> None:
        async with Broker(no) as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)

    run(main())
    told = [record for record in caplog.records if "refuses a subscription" in record.message]
    assert len(told) == 1


def test_a_broker_that_wants_silence_until_connack_gets_it_the_next_time() -> None:
    async def strict(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind == CONNECT:
                await asyncio.sleep(0.02)
                if connection.flights[0] != [CONNECT]:
                    return
            connection.answer(kind, body)

    async def main() -> None:
        async with Broker(strict) as broker:
            ends = Ends(broker.url, greet=b"hello")
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)
                assert ends.events == ["connected", "disconnected", "connected"]

    run(main())


def test_a_flood_is_read_at_a_bounded_rate_and_does_not_hold_up_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt_link, "BURST", 200)

    async def flood(connection: Connection) -> None:
        async for kind, body in connection.packets():
            connection.answer(kind, body)
            if kind == SUBSCRIBE:
                break
        with contextlib.suppress(ConnectionError):
            while True:
                connection.send(publication(TOPIC, bytes(1000)) * 100)
                await connection.writer.drain()

    async def main() -> None:
        async with Broker(flood) as broker:
            ends = Ends(broker.url)
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: len(ends.received) >= 190)
                await asyncio.sleep(0.5)
                # 200 at once, then 500 a second; unbounded it is tens of thousands.
                assert len(ends.received) < 200 + 2000
                assert ends.state == "connected"

    run(main())


def test_a_broker_that_reads_nothing_is_not_read_from_for_ever() -> None:
    async def deaf_talker(connection: Connection) -> None:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        connection.send(ACCEPTED)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.send(publication(TOPIC, b"x") * 1000)
                await connection.writer.drain()

    async def main() -> None:
        async with Broker(deaf_talker) as broker:
            async with Ends(broker.url) as ends:
                await until(lambda: ends.received)
                for _ in range(3000):
                    ends.signaller.publish(TOPIC, bytes(4000))
                # What the broker does not acknowledge is refused at some point.
                assert ends.signaller.status()["dropped"] >= 2000
            assert ends.events[0] == "connected"

    run(main())


# TLS, names, credentials


def test_tls_with_a_ca_of_ones_own(tls_files: TlsFiles) -> None:
    async def main() -> None:
        async with Broker(tls=tls_files.server()) as broker:
            ends = Ends(broker.url, ca_file=tls_files.ca, greet=b"sealed")
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)

    run(main())


def test_a_certificate_that_nobody_vouches_for_is_told(tls_files: TlsFiles) -> None:
    async def main() -> None:
        async with Broker(tls=tls_files.server()) as broker, Ends(broker.url) as ends:
            await until(lambda: "not trusted" in ends.error)
            assert ends.events == []

    run(main())


def test_tls_toward_a_broker_without_it_and_the_other_way_round(tls_files: TlsFiles) -> None:
    async def main() -> None:
        async with Broker() as plain, Broker(tls=tls_files.server()) as sealed:
            async with Ends(plain.url.replace("mqtt:", "mqtts:"), ca_file=tls_files.ca) as ends:
                plain.manner = babble
                await until(lambda: "no TLS connection" in ends.error)
            async with Ends(sealed.url.replace("mqtts:", "mqtt:")) as ends:
                await until(lambda: ends.error)
                assert ends.state == "connecting"

    async def babble(connection: Connection) -> None:
        connection.send(b"what?" * 10)

    run(main())


def test_user_name_and_password_of_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"s3cret\nnot this\n")
    file.chmod(0o600)
    connects: list[bytes] = []

    async def note(connection: Connection) -> None:
        async for kind, body in connection.packets():
            if kind == CONNECT:
                connects.append(body)
            connection.answer(kind, body)

    async def main() -> None:
        async with Broker(note) as broker:
            ends = Ends(broker.url, username="jan", password_file=file)
            async with ends:
                await until(lambda: ends.state == "connected")

    run(main())
    assert connects[0][7] & 0xC0 == 0xC0
    assert connects[0].endswith(b"\x00\x03jan\x00\x06s3cret")


def test_files_of_the_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    url = "mqtts://broker.test"
    with pytest.raises(ConfigError, match="no such password file"):
        Ends(url, username="jan", password_file=file)
    file.write_text("s3cret")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Ends(url, username="jan", password_file=file)
    file.write_text("\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="no password"):
        Ends(url, username="jan", password_file=file)
    with pytest.raises(ConfigError, match="no certificate"):
        Ends(url, ca_file=file)
    with pytest.raises(ConfigError, match="cannot read"):
        Ends(url, ca_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="regular file"):
        Ends(url, username="jan", password_file=tmp_path)


def test_a_name_that_does_not_exist_and_dns_that_does_not_answer() -> None:
    def nothing(host: str, port: int) -> list[Address]:
        error = socket.EAI_NONAME if host == "none.test" else socket.EAI_AGAIN
        raise socket.gaierror(error, "as the resolver says")

    async def main() -> None:
        async with Ends("mqtt://none.test", names=Names(nothing)) as ends:
            await until(lambda: "no host none.test" in ends.error)
        async with Ends("mqtt://late.test", names=Names(nothing)) as ends:
            await until(lambda: "DNS does not answer" in ends.error)

    run(main())


def test_a_name_is_remembered_so_that_the_next_connection_does_not_wait_for_dns() -> None:
    asked = threading.Semaphore(0)
    answer = threading.Event()

    async def main() -> None:
        async with Broker() as broker:
            first = True

            def slow(host: str, port: int) -> list[Address]:
                nonlocal first
                if not first:
                    asked.release()
                    answer.wait(10)
                first = False
                return [Address("127.0.0.1", port)]

            url = broker.url.replace("127.0.0.1", "broker.test")
            async with Ends(url, names=Names(slow)) as ends:
                await until(lambda: ends.state == "connected")
                broker.connections[0].writer.transport.abort()
                await until(lambda: len(broker.open) == 1 and ends.events.count("connected") == 2)
                assert asked.acquire(timeout=5) and not answer.is_set()
        answer.set()

    run(main())


def test_a_close_waits_neither_for_dns_nor_for_a_silent_broker() -> None:
    answer = threading.Event()

    def hang(host: str, port: int) -> list[Address]:
        answer.wait(60)
        return []

    async def main() -> None:
        async with Broker(never_answers) as broker:
            for url in ("mqtt://slow.test", broker.url, broker.url.replace("mqtt:", "mqtts:")):
                async with Ends(url, names=Names(hang)):
                    await asyncio.sleep(0.05)

    started = time.monotonic()
    run(main())
    assert time.monotonic() - started < 10, "the name alone would have taken 60 s"
    answer.set()


def test_lookups_of_a_name_are_bounded() -> None:
    answer = threading.Event()
    running = 0

    def hang(host: str, port: int) -> list[Address]:
        nonlocal running
        running += 1
        answer.wait(60)
        return []

    async def main() -> None:
        names = Names(hang)
        waiting = [names.ask("slow.test", 1) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert running == mqtt_dial.LOOKUPS
        assert sum(each.done() for each in waiting) == 20 - mqtt_dial.LOOKUPS
        answer.set()
        await asyncio.wait(waiting)

    run(main())


# Several brokers, several addresses


def test_the_next_broker_serves_when_the_first_refuses() -> None:
    async def main() -> None:
        async with Broker() as broker, Ends(closed(), broker.url) as ends:
            await until(lambda: ends.state == "connected")
            assert ends.signaller.status()["url"] == broker.url

    run(main())


def test_the_next_broker_serves_when_the_first_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "HEAD_START", 0.1)

    async def main() -> None:
        async with Broker(never_answers) as silent, Broker() as broker:
            ends = Ends(silent.url, broker.url, greet=b"hello")
            async with ends:
                await until(lambda: ends.state == "connected")
                assert ends.signaller.status()["url"] == broker.url
                # Who was told that we are connected has to be told that it is another connection.
                assert ends.events == ["connected", "disconnected", "connected"]
                await until(lambda: not silent.open)
                assert broker.published == [(TOPIC, b"hello")]

    run(main())


def test_the_broker_that_served_is_asked_first() -> None:
    async def main() -> None:
        async with Broker() as one, Broker() as two:
            one.manner = never_answers
            async with Ends(one.url, two.url) as ends:
                await until(lambda: ends.state == "connected")
                one.manner = polite
                seen = len(one.connections)
                two.connections[0].writer.transport.abort()
                await until(lambda: len(two.connections) == 2 and ends.state == "connected")
                assert ends.signaller.status()["url"] == two.url
                assert len(one.connections) == seen

    run(main())


def test_an_address_that_is_silent_does_not_hold_up_the_next() -> None:
    # 240.0.0.1 cannot be routed (RFC 1112 section 4); a full backlog is silent, as a dead host is.
    async def main() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.2", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.2", port))
            async with Broker(port=port) as broker:
                addresses = [Address(ip, port) for ip in ("240.0.0.1", "127.0.0.2", "127.0.0.1")]
                names = Names(lambda host, port: addresses)
                async with Ends(broker.url.replace("127.0.0.1", "x.test"), names=names) as ends:
                    await until(lambda: ends.state == "connected")
            for filler in fillers:
                filler.close()

    run(main())


def test_a_race_cancels_and_waits_for_its_losers() -> None:
    ends: list[str] = []

    async def runner(name: str, delay: float, error: bool = False) -> str:
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            ends.append(f"{name} cancelled")
            raise
        if error:
            raise OSError(name)
        return name

    async def main() -> None:
        starts = [
            lambda: runner("broken", 0, error=True),
            lambda: runner("slow", 5),
            lambda: runner("quick", 0.01),
            lambda: runner("never started", 0),
        ]
        assert await race(starts, 0.05) == "quick"
        assert ends == ["slow cancelled"]
        with pytest.raises(OSError, match="broken"):
            await race([starts[0], lambda: runner("later", 0.01, error=True)], 0.05)
        with pytest.raises(OSError):
            await race([], 0.05)

    run(main())


# Doubt


def test_a_living_connection_survives_a_change_of_the_network() -> None:
    async def main() -> None:
        async with Broker() as broker, Ends(broker.url) as ends:
            await until(lambda: ends.state == "connected")
            for _ in range(5):
                ends.signaller.network_changed()
            await asyncio.sleep(0.3)
            (connection,) = broker.connections
            assert UNSUBSCRIBE in connection.kinds, "it was asked"
            assert ends.events == ["connected"] and ends.state == "connected"

    run(main())


def test_a_half_open_connection_is_replaced_after_a_change_of_the_network() -> None:
    async def main() -> None:
        async with Broker() as broker:
            ends = Ends(broker.url, greet=b"here")
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)
                broker.connections[0].deaf = True
                ends.signaller.network_changed()
                await until(lambda: len(ends.received) == 2)
                assert ends.events == ["connected", "disconnected", "connected"]
                await until(lambda: ends.state == "connected")
                await until(lambda: len(broker.open) == 1)

    run(main())


def test_an_unanswered_publication_makes_doubtful_and_whoever_speaks_first_serves() -> None:
    async def main() -> None:
        async with Broker() as broker:
            ends = Ends(broker.url, greet=b"here")
            ends.signaller.subscribe(frozenset([TOPIC]))
            async with ends:
                await until(lambda: ends.received)
                broker.connections[0].deaf = True
                ends.signaller.publish(TOPIC, b"into the void")
                await until(lambda: len(ends.received) == 2)
                assert ends.state == "connected" and not ends.error
                await until(lambda: len(broker.open) == 1)
                await asyncio.sleep(0.2)
                assert ends.events == ["connected", "disconnected", "connected"]

    run(main())


def test_the_old_connection_serves_on_when_it_answers_first() -> None:
    async def main() -> None:
        async with Broker() as broker, Ends(broker.url) as ends:
            await until(lambda: ends.state == "connected")
            (connection,) = broker.connections
            connection.deaf = True
            broker.manner = never_answers
            ends.signaller.publish(TOPIC, b"late")
            await until(lambda: len(broker.connections) == 2)
            assert ends.state == "connecting" and "silent" in ends.error
            connection.send(b"\x40\x02\x00\x01")
            await until(lambda: ends.state == "connected")
            assert ends.events == ["connected"] and broker.connections[0] in broker.open
            await until(lambda: broker.connections[1].closed)

    run(main())


def test_a_lost_address_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(mqtt, "address_is_gone", lambda name: name in gone)

    async def main() -> None:
        async with Broker() as broker, Ends(broker.url, greet=b"here") as ends:
            await until(lambda: ends.state == "connected")
            peer = broker.connections[0].writer.get_extra_info("peername")
            gone.add(tuple(peer))
            broker.connections[0].deaf = True
            ends.signaller.network_changed()
            assert ends.events == ["connected", "disconnected"], "at once"
            await until(lambda: ends.state == "connected")
            assert ends.events == ["connected", "disconnected", "connected"]

    run(main())


def test_a_change_of_the_network_ends_a_wait_and_starts_the_back_off_anew() -> None:
    async def main() -> None:
        port = refused_port()
        async with Ends(f"mqtt://127.0.0.1:{port}") as ends:
            await asyncio.sleep(0.8)  # it now waits for 0.8 s and more
            async with Broker(port=port):
                ends.signaller.network_changed()
                started = time.monotonic()
                await until(lambda: ends.state == "connected")
                assert time.monotonic() - started < 0.4

    run(main())


def test_addresses_of_this_host_and_others() -> None:
    assert not mqtt_dial.address_is_gone(("127.0.0.1", 1))
    assert not mqtt_dial.address_is_gone(())
    assert mqtt_dial.address_is_gone(("192.0.2.1", 1))
    assert mqtt_dial.address_is_gone(("2001:db8::1", 1, 0, 0))


def test_an_error_of_a_callback_is_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Broker() as broker:
            heard: list[bytes] = []

            def received(topic: str, payload: bytes) -> None:
                heard.append(payload)
                raise RuntimeError("ours")

            signaller = Signaller(
                RendezvousConfig(url=(broker.url,)),
                will=None,
                connected=lambda: 1 / 0,  # type: ignore[arg-type]
                disconnected=lambda: None,
                received=received,
            )
            signaller.subscribe(frozenset([TOPIC]))
            signaller.start()
            await until(lambda: broker.connections and broker.connections[0].topics)
            broker.publish(TOPIC, b"one")
            broker.publish(TOPIC, b"two")
            await until(lambda: heard == [b"one", b"two"])
            assert signaller.status()["state"] == "connected"
            await signaller.close()

    run(main())


def test_families_take_turns() -> None:
    four = [Address(f"192.0.2.{n}", 1) for n in (1, 2, 3)]
    six = [Address("2001:db8::1", 1)]
    assert mqtt_dial._families_in_turn([*six, *four]) == [six[0], *four]
    assert mqtt_dial._families_in_turn([four[0], four[1], *six]) == [four[0], six[0], four[1]]
    assert mqtt_dial._families_in_turn([]) == []
