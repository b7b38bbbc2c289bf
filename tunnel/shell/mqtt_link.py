"""One connection to a broker: paho's MQTT 3.1.1 client over a transport of asyncio.

::

    transport (TCP or TLS) <-> [WebSocket] <-> whole packets, checked <-> paho <-> owner

paho knows the protocol, and would open its socket itself, blocking; aiomqtt lets it, in a thread
(docs/decisions/0012-signaller.md). Here it gets a pipe for its socket, so that there is no thread,
TLS and WebSocket are not its business, and what it writes within one turn of the loop leaves in one
segment: CONNECT, SUBSCRIBE and the first PUBLISH travel together, as MQTT 3.1.1 section 3.1.4
allows. The broker is not trusted. paho is given whole packets only, none larger than we could have
asked for, and no kind that we did not; more of them than anybody needs stay in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode
from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from tunnel.config_values import MQTT_PORTS
from tunnel.shell.log import Log

KEEPALIVE = 30
"""Seconds of silence after which the broker is asked for a sign of life; after as many again the
connection is lost. Also keeps the mapping of a NAT that forgets idle connections after a minute."""

LARGEST_PACKET = 5120
"""Bytes: 4096 of payload, and its topic; the broker's own limit is no larger."""

BURST = 1000
"""Packets that are read at once: an answer from each peer of a large network."""

RATE = 500.0
"""Packets a second that are read for good. paho takes 20 us for each: 1% of a CPU."""

UNACKNOWLEDGED = 1000
"""Publications that the broker has not acknowledged; more are refused."""

TOPICS_PER_PACKET = 64
"""Topics in one SUBSCRIBE: 3 kB, within the packets that brokers accept."""

_LARGEST_FRAME = 1 << 16  # bytes of one WebSocket message, which may hold several packets
_CLOSE = 1.0  # seconds for the last bytes to leave
_PAUSE = 0.1  # seconds between two looks at a broker that sends too much
_TICK = 5.0  # seconds between two looks at the keepalive
_CONNACK, _PUBLISH = 2, 3  # MQTT 3.1.1 section 2.2.1
_FROM_BROKER = frozenset((2, 3, 4, 9, 11, 13))
"""CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP: what a client that uses QoS 1 may get."""
_REFUSED = {
    1: "refuses this version of MQTT (3.1.1)",
    2: "refuses the client's name",
    3: "is not available",
    4: "refuses the user name or password",
    5: "does not let us in: is a user name or password missing?",
}
"""By return code (MQTT 3.1.1 section 3.2.2.3)."""


class LinkError(Exception):
    """The connection cannot be used; `str()` says why, and follows the broker's name."""


class Owner(Protocol):
    """Who has links. These are called by a link, in this order, and must not raise."""

    def opened(self, link: Link) -> None:
        """CONNECT is under way; what is subscribed and published now leaves with it."""

    def accepted(self, link: Link) -> None:
        """The broker has let us in."""

    def received(self, link: Link, topic: str, payload: bytes) -> None:
        """Somebody published."""

    def answered(self, link: Link) -> None:
        """The broker has acknowledged something: `link.oldest_question` and `link.rtt` changed."""

    def ended(self, link: Link, reason: str) -> None:
        """It is over; never called after `close` or `abort`."""


class Packets:
    """Cuts a stream into whole MQTT control packets, and refuses what no broker should send us."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._first = True

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __len__(self) -> int:
        """Bytes not taken yet."""
        return len(self._buffer)

    def take(self) -> bytes | None:
        """The next packet; None until there is a whole one. Raises LinkError."""
        buffer = self._buffer
        if not buffer:
            return None
        kind, flags = buffer[0] >> 4, buffer[0] & 0x0F
        if (self._first and kind != _CONNACK) or kind not in _FROM_BROKER:
            raise LinkError("does not speak MQTT")
        if kind == _PUBLISH and flags & 0x06 > 0x02:
            raise LinkError("breaks the rules: QoS 2, which was not asked for")
        length, shift, position = 0, 0, 1
        while True:  # section 2.2.3
            if position == len(buffer):
                return None
            length |= (buffer[position] & 0x7F) << shift
            more = buffer[position] & 0x80
            shift += 7
            position += 1
            if length + position > LARGEST_PACKET or (more and shift > 21):
                raise LinkError(f"breaks the rules: a packet larger than {LARGEST_PACKET} bytes")
            if not more:
                break
        if len(buffer) < position + length:
            return None
        packet = bytes(buffer[: position + length])
        del buffer[: position + length]
        self._first = False
        return packet


class Link(asyncio.Protocol):
    """One connection to a broker, from an open transport to its end.

    `rtt` is the smoothed round trip to the broker in seconds, `accepted` whether it has let us in.
    """

    def __init__(
        self,
        url: str,
        owner: Owner,
        *,
        will: tuple[str, bytes] | None = None,
        username: str | None = None,
        password: bytes | None = None,
        eager: bool = True,
    ) -> None:
        self.url = url
        self.eager = eager
        """Whether more may be sent before the broker has let us in. Only the owner cares."""
        self.accepted = False
        self.rtt: float | None = None
        self.local: tuple[Any, ...] = ()
        """Our end's socket address, once there is one."""
        self.closed = asyncio.Event()
        """Set when the transport is gone."""
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._websocket = _websocket(url)
        self._packets = Packets()
        self._pipe = _Pipe()
        self._flushing = False
        self._over = False
        self._reason = ""
        self._allowance = float(BURST)
        self._allowed_at = self._loop.time()
        self._blocked = False
        self._paused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._questions: dict[tuple[str, int], float] = {}
        self._connect_sent = 0.0
        self._paho = _Paho(self, self._pipe)
        self._paho.username_pw_set(username, cast(str | None, password))  # it takes bytes as well
        if will is not None:
            self._paho.will_set(will[0], will[1], qos=1, retain=False)

    # What the owner may do

    @property
    def open(self) -> bool:
        """Whether CONNECT is under way, and the end not yet known."""
        return self._connect_sent > 0 and not self._over

    @property
    def open_ended(self) -> bool:
        """Whether there is a transport that has yet to end."""
        return self._transport is not None and not self.closed.is_set()

    @property
    def oldest_question(self) -> float | None:
        """Loop time of the oldest thing sent that the broker has not acknowledged."""
        return next(iter(self._questions.values()), None)

    def publish(self, topic: str, payload: bytes) -> bool:
        """Publish with QoS 1; False when it cannot be taken."""
        if not self.open:
            return False
        try:
            info = self._paho.publish(topic, payload, qos=1)
        except ValueError:  # a topic or payload that MQTT cannot carry
            return False
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        self._questions["publish", info.mid] = self._loop.time()
        return True

    def subscribe(self, topics: Iterable[str]) -> None:
        """Subscribe with QoS 1."""
        for part in _parts(sorted(topics)):
            _, mid = self._paho.subscribe([(topic, 1) for topic in part])
            self._ask("subscribe", mid)

    def unsubscribe(self, topics: Iterable[str]) -> None:
        """No longer receive what is published there."""
        for part in _parts(sorted(topics)):
            _, mid = self._paho.unsubscribe(part)
            self._ask("unsubscribe", mid)

    def probe(self) -> None:
        """Ask for a sign of life at once.

        paho pings when it sees fit; a topic that was never subscribed can be unsubscribed at any
        time, and must be answered all the same (section 3.10.4).
        """
        if len(self._questions) < UNACKNOWLEDGED:
            self.unsubscribe([f"martlet/1/{secrets.token_hex(13)}"])

    def close(self) -> None:
        """End it in order: the broker does not publish the last will."""
        if self._over:
            return
        self._over = True
        self._stop()
        if self._connect_sent:
            self._paho.disconnect()
            self._write()
        if self._transport is not None:
            self._transport.close()
            # What the other end does not take keeps it open for ever.
            self._call_later("close", _CLOSE, self._transport.abort)

    def abort(self) -> None:
        """Let go of a connection that leads nowhere."""
        self._over = True
        self._stop()
        if self._transport is not None and not self.closed.is_set():
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.local = transport.get_extra_info("sockname") or ()
        if self._over:
            self._transport.abort()
            return
        if self._websocket is None:
            self._connect()
        else:
            self._websocket.send_request(self._websocket.connect())
            self._send_websocket(self._websocket)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if self._websocket is None:
            self._packets.feed(data)
        else:
            self._receive_websocket(self._websocket, data)
        self._read()

    def eof_received(self) -> bool:
        return False  # closes the transport

    def connection_lost(self, exc: Exception | None) -> None:
        reason = "closed the connection" if exc is None else f"is lost: {exc}"
        if not self.accepted:
            reason += " before it said whether we may use it"
        self.closed.set()
        self._stop()
        if not self._over:
            self._over = True
            self._owner.ended(self, self._reason or reason)

    def pause_writing(self) -> None:
        """A broker that does not read is not read from either: each PUBLISH makes us write."""
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._read()

    # Helpers

    def _connect(self) -> None:
        """Say CONNECT."""
        self._connect_sent = self._loop.time()
        host = urlsplit(self.url).hostname
        assert host
        self._paho.connect(host, MQTT_PORTS[urlsplit(self.url).scheme], KEEPALIVE)
        self._call_later("tick", _TICK, self._tick)
        self._owner.opened(self)

    def _ask(self, kind: str, mid: int | None) -> None:
        if mid is not None:
            self._questions[kind, mid] = self._loop.time()

    def answer(self, kind: str, mid: int, *, refused: bool = False) -> None:
        """paho was told of an acknowledgement, maybe of something that was never asked."""
        asked = self._questions.pop((kind, mid), None)
        if asked is None or self._over:
            return
        if refused:
            _log.warning("broker refuses a subscription", broker=self.url)
        self._measure(self._loop.time() - asked)
        self._owner.answered(self)

    def answer_connect(self) -> None:
        """paho was told that we are let in."""
        if not self.accepted and not self._over:
            self.accepted = True
            self._measure(self._loop.time() - self._connect_sent)
            self._owner.accepted(self)

    def message(self, message: MQTTMessage) -> None:
        """paho has read a publication."""
        if not self._over and self.accepted:
            with contextlib.suppress(UnicodeDecodeError):  # of the topic
                self._owner.received(self, message.topic, bytes(message.payload))

    def _measure(self, rtt: float) -> None:
        # The gain of RFC 6298 section 2.3.
        self.rtt = rtt if self.rtt is None else self.rtt + (rtt - self.rtt) / 8

    def _read(self) -> None:
        """Hand over what has come, as much as anybody needs."""
        try:
            while not self._over and not self._blocked and len(self._packets):
                if not self._allow():
                    self._call_later("read", _PAUSE, self._read)
                    break
                packet = self._packets.take()
                if packet is None:
                    break
                if packet[0] >> 4 == _CONNACK and packet[3:4] not in (b"", b"\0"):
                    raise LinkError(_REFUSED.get(packet[3], "does not speak MQTT"))
                self._pipe.incoming = packet
                if self._paho.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS or self._pipe.incoming:
                    raise LinkError("breaks the rules of MQTT")
                self._allowance -= 1
        except LinkError as error:
            self._fail(str(error))
        except Exception as error:  # whatever paho says of bytes it cannot read
            _log.debug("broker sends nonsense", broker=self.url, error=repr(error))
            self._fail("breaks the rules of MQTT")
        self._pace()

    def _allow(self) -> bool:
        now = self._loop.time()
        self._allowance = min(BURST, self._allowance + (now - self._allowed_at) * RATE)
        self._allowed_at = now
        return self._allowance >= 1

    def _pace(self) -> None:
        """Leave in the kernel what we do not read now, so that the broker has to wait."""
        if self._over or self._transport is None:
            return
        full = self._blocked or "read" in self._timers
        if full and not self._paused:
            self._transport.pause_reading()
        elif self._paused and not full:
            self._transport.resume_reading()
        self._paused = full

    def flush_soon(self) -> None:
        """paho wants to write."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self._over:
            self._write()

    def _write(self) -> None:
        """Send, at once and together, what paho has to say."""
        self._paho.loop_write()
        data, self._pipe.outgoing = bytes(self._pipe.outgoing), bytearray()
        if not data or self._transport is None or self._transport.is_closing():
            return
        if self._websocket is None:
            self._transport.write(data)
        elif self._websocket.state is State.OPEN:
            self._websocket.send_binary(data)
            self._send_websocket(self._websocket)

    def _tick(self) -> None:
        self._call_later("tick", _TICK, self._tick)
        if self._paho.loop_misc() != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._fail(f"has not answered for {KEEPALIVE} s")

    def _receive_websocket(self, websocket: ClientProtocol, data: bytes) -> None:
        shaken = self._connect_sent > 0
        websocket.receive_data(data)
        for event in websocket.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.CONT):
                self._packets.feed(bytes(event.data))
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                websocket.fail(CloseCode.UNSUPPORTED_DATA)
        if websocket.handshake_exc is not None:
            self._fail(f"does not speak MQTT over WebSocket: {websocket.handshake_exc}")
            return
        self._send_websocket(websocket)
        if websocket.close_expected():
            self._fail("closed the WebSocket connection")
        elif not shaken and websocket.state is State.OPEN:
            self._connect()

    def _send_websocket(self, websocket: ClientProtocol) -> None:
        for data in websocket.data_to_send():
            if data and self._transport is not None and not self._transport.is_closing():
                self._transport.write(data)

    def _fail(self, reason: str) -> None:
        """It cannot be used any more; the owner hears of it when we are out of all callbacks."""
        if self._over or self._reason:
            return
        self._reason = reason
        self._stop()
        if self._transport is not None:
            self._transport.abort()  # connection_lost comes soon

    def _stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _call_later(self, name: str, delay: float, call: Any) -> None:
        def due() -> None:
            self._timers.pop(name, None)
            call()

        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self._loop.call_later(delay, due)


class _Paho(Client):
    """paho's client, with a link for its socket.

    `_create_socket` is the one private name we need; the rest is what paho offers to those who have
    an event loop of their own.
    """

    def __init__(self, link: Link, pipe: _Pipe) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            # 1 to 23 letters and digits, which any broker must accept (section 3.1.3.1).
            client_id="m" + secrets.token_hex(11),
            clean_session=True,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self._link = link
        self._pipe = pipe
        self.max_queued_messages_set(UNACKNOWLEDGED)
        self.max_inflight_messages_set(UNACKNOWLEDGED)
        self.on_connect = lambda _c, _u, _f, _r, _p: link.answer_connect()
        self.on_message = lambda _c, _u, message: link.message(message)
        self.on_publish = lambda _c, _u, mid, _r, _p: link.answer("publish", mid)
        self.on_unsubscribe = lambda _c, _u, mid, _r, _p: link.answer("unsubscribe", mid)
        self.on_subscribe = self._subscribed
        self.on_socket_register_write = lambda _c, _u, _s: link.flush_soon()

    def _subscribed(
        self, client: Client, userdata: Any, mid: int, codes: list[ReasonCode], properties: Any
    ) -> None:
        self._link.answer("subscribe", mid, refused=any(code.is_failure for code in codes))

    def _create_socket(self) -> _Pipe:
        return self._pipe


class _Pipe:
    """What paho takes for its socket: it reads one whole packet, and writes into a buffer."""

    def __init__(self) -> None:
        self.incoming = b""
        self.outgoing = bytearray()

    def recv(self, size: int) -> bytes:
        if not self.incoming:
            raise BlockingIOError
        data, self.incoming = self.incoming[:size], self.incoming[size:]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self.outgoing += data
        return len(data)

    def close(self) -> None:
        """The link closes the transport."""

    def fileno(self) -> int:
        return -1

    def setblocking(self, flag: bool) -> None:
        """It never blocks."""


def _websocket(url: str) -> ClientProtocol | None:
    """For ws:// and wss://, the WebSocket between; "/mqtt" is the usual path."""
    parts = urlsplit(url)
    if not parts.scheme.startswith("ws"):
        return None
    if parts.path in ("", "/"):
        parts = parts._replace(path="/mqtt")
    return ClientProtocol(
        parse_uri(parts.geturl()),
        subprotocols=[Subprotocol("mqtt")],  # section 6
        max_size=_LARGEST_FRAME,
    )


def _parts(topics: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(topics), TOPICS_PER_PACKET):
        yield topics[start : start + TOPICS_PER_PACKET]


_log = Log("mqtt")
