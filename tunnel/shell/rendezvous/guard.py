"""What a client of an embedded broker says, cut into packets and checked before the broker sees it.

amqtt implements MQTT 3.1.1 and trusts its clients: it has no limits for packets, messages,
subscriptions or what it queues. So each connection has a guard, which knows the few packets that a
host needs, and ends the connection at the first that is anything else. A client that is ours never
meets it.
"""

from __future__ import annotations

import struct

from tunnel.shell.rendezvous import limits

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE = 1, 3, 4, 8, 10  # MQTT 3.1.1 section 2.2.1
PINGREQ, DISCONNECT = 12, 14
_FIXED_FLAGS = {
    CONNECT: 0,
    PUBACK: 0,
    SUBSCRIBE: 2,
    UNSUBSCRIBE: 2,
    PINGREQ: 0,
    DISCONNECT: 0,
}
"""Flags of the first byte (section 2.2.2); those of PUBLISH vary."""


class Violation(Exception):
    """The client does what it may not do; `str()` says what."""


class Guard:
    """One connection, seen from the broker. `keepalive` is known from CONNECT on, in seconds."""

    def __init__(self) -> None:
        self.keepalive: int | None = None
        self._topics: set[str] = set()
        self._buffer = bytearray()
        self._unacknowledged = 0

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next packet, checked; None when it is not whole yet. Raises Violation."""
        length = _packet_length(self._buffer)
        if length is None or len(self._buffer) < length:
            return None
        packet = bytes(self._buffer[:length])
        del self._buffer[:length]
        try:
            self._check(packet)
        except (IndexError, struct.error, UnicodeDecodeError):
            raise Violation("a packet that is cut short, or no UTF-8") from None
        return packet

    def sent(self, data: bytes) -> None:
        """Count what the broker sends, a packet at a time. Raises Violation.

        Who does not acknowledge what he gets would have it kept for him.
        """
        if data and data[0] >> 4 == PUBLISH and data[0] & 0x06:
            self._unacknowledged += 1
            if self._unacknowledged > limits.IN_FLIGHT + limits.QUEUED:
                raise Violation("messages that are not acknowledged")

    def _check(self, packet: bytes) -> None:
        kind, flags = packet[0] >> 4, packet[0] & 0x0F
        body = _Fields(packet[len(packet) - _body_length(packet) :])
        if (kind == CONNECT) != (self.keepalive is None):
            raise Violation("CONNECT must come first, and once")
        if kind == PUBLISH:
            self._check_publish(flags, body)
        elif _FIXED_FLAGS.get(kind) != flags:
            raise Violation(f"a packet of kind {kind} with flags {flags}")
        elif kind == CONNECT:
            self._check_connect(body)
        elif kind in (SUBSCRIBE, UNSUBSCRIBE):
            self._check_topics(kind, body)
        elif kind == PUBACK:
            body.number()
            self._unacknowledged = max(0, self._unacknowledged - 1)
        if body.left and kind != PUBLISH:
            raise Violation("bytes behind a packet's end")

    def _check_connect(self, body: _Fields) -> None:
        """Section 3.1."""
        if body.text() != "MQTT" or body.byte() != 4:
            raise Violation("not MQTT 3.1.1")
        flags = body.byte()
        keepalive = body.number()
        if not 0 < keepalive <= limits.KEEPALIVE:
            raise Violation(f"a keepalive of {keepalive} s")
        if not flags & 0x02:
            raise Violation("a session that is to be kept")
        if len(body.text()) > 128:
            raise Violation("a client name that is too long")
        if flags & 0x04:
            if flags & 0x30:  # retained, or QoS 2
                raise Violation("a last will that is retained, or of QoS 2")
            _check_topic(body.text())
            _check_payload(len(body.data()))
        if flags & 0x80:
            body.text()
        if flags & 0x40:
            body.data()
        self.keepalive = keepalive

    def _check_publish(self, flags: int, body: _Fields) -> None:
        """Section 3.3."""
        if flags & 0x01:
            raise Violation("a retained message")
        if flags & 0x04:
            raise Violation("a message of QoS 2")
        _check_topic(body.text())
        if flags & 0x02:
            body.number()
        _check_payload(body.left)

    def _check_topics(self, kind: int, body: _Fields) -> None:
        """Sections 3.8 and 3.10."""
        body.number()
        if not body.left:
            raise Violation("a list of topics without any")
        while body.left:
            topic = body.text()
            _check_topic(topic)
            if kind == UNSUBSCRIBE:
                self._topics.discard(topic)
                continue
            if body.byte() > 1:
                raise Violation("a subscription of QoS 2")
            self._topics.add(topic)
        if len(self._topics) > limits.SUBSCRIPTIONS:
            raise Violation("too many subscriptions")


class _Fields:
    """Reads the fields of a packet. Raises IndexError, struct.error or UnicodeDecodeError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def number(self) -> int:
        (value,) = struct.unpack_from("!H", self._data, self._at)
        self._at += 2
        return int(value)

    def data(self) -> bytes:
        length = self.number()
        if length > self.left:
            raise IndexError
        self._at += length
        return self._data[self._at - length : self._at]

    def text(self) -> str:
        return self.data().decode()


def _check_topic(topic: str) -> None:
    if not limits.TOPIC.fullmatch(topic):
        raise Violation("a topic that is none of ours, or a wildcard")


def _check_payload(length: int) -> None:
    if length > limits.PAYLOAD:
        raise Violation(f"a message of {length} bytes")


def _packet_length(buffer: bytes | bytearray) -> int | None:
    """Of the first packet, its header included; None when it is not known yet (section 2.2.3)."""
    length, shift = 0, 0
    for position in range(1, min(len(buffer), 5)):
        length |= (buffer[position] & 0x7F) << shift
        shift += 7
        if length + position + 1 > limits.PACKET:
            break
        if not buffer[position] & 0x80:
            return length + position + 1
    else:
        if len(buffer) < 5:
            return None
    raise Violation(f"a packet larger than {limits.PACKET} bytes")


def _body_length(packet: bytes) -> int:
    position = 1
    while packet[position] & 0x80:
        position += 1
    return len(packet) - position - 1
