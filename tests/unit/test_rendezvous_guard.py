"""What a client of the broker in this process may say."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.stranger import connect, length
from tests.unit.fake_broker import publication
from tunnel.shell.rendezvous import limits
from tunnel.shell.rendezvous.guard import Guard, Violation

TOPIC = "martlet/1/" + "a" * 26
PINGREQ, DISCONNECT = b"\xc0\x00", b"\xe0\x00"


def topics(kind: int, *names: str, qos: int | None = None) -> bytes:
    body = b"\x00\x01"
    for name in names:
        body += struct.pack("!H", len(name)) + name.encode()
        body += b"" if qos is None else bytes([qos])
    return bytes([kind << 4 | 2]) + length(len(body)) + body


def say(*packets: bytes) -> Guard:
    """A guard after these packets, all of which came out again."""
    guard = Guard()
    guard.feed(b"".join(packets))
    assert [guard.take() for _ in packets] == list(packets)
    assert guard.take() is None
    return guard


def test_all_that_a_host_says_passes() -> None:
    guard = say(
        connect(will=(TOPIC, b"gone")),
        topics(8, TOPIC, "martlet/1/B32", qos=1),
        publication(TOPIC, bytes(limits.PAYLOAD)),
        publication(TOPIC, b"QoS 0", flags=0),
        b"\x40\x02\x00\x01",
        topics(10, TOPIC),
        PINGREQ,
        DISCONNECT,
    )
    assert guard.keepalive == 30


def test_bytes_come_one_at_a_time() -> None:
    packets = [connect(), publication(TOPIC, bytes(300))]
    guard, out = Guard(), []
    for byte in b"".join(packets):
        guard.feed(bytes([byte]))
        if packet := guard.take():
            out.append(packet)
    assert out == packets


REFUSED = {
    "a message first": publication(TOPIC, b"x"),
    "another protocol": b"\x10\x08\x00\x04HTTP\x04\x02",
    "MQTT 5": connect().replace(b"MQTT\x04", b"MQTT\x05"),
    "keepalive 0": connect(keepalive=0),
    "keepalive too long": connect(keepalive=limits.KEEPALIVE + 1),
    "a session to be kept": connect(clean=False),
    "a name too long": connect(name="n" * 129),
    "a retained will": connect(will=(TOPIC, b"x"), will_flags=0x2C),
    "a will of QoS 2": connect(will=(TOPIC, b"x"), will_flags=0x14),
    "a will elsewhere": connect(will=("chat", b"x")),
    "a will too large": connect(will=(TOPIC, bytes(limits.PAYLOAD + 1))),
    "connect twice": connect() + connect(),
    "connect cut short": b"\x10\x0a\x00\x04MQTT\x04\x02\x00\x1e",
    "flags of connect": b"\x11" + connect()[1:],
    "retained": connect() + publication(TOPIC, b"x", flags=3),
    "QoS 2": connect() + publication(TOPIC, b"x", flags=4),
    "QoS 3": connect() + publication(TOPIC, b"x", flags=6),
    "message too large": connect() + publication(TOPIC, bytes(limits.PAYLOAD + 1)),
    "packet too large": connect() + publication(TOPIC, bytes(limits.PACKET)),
    "no UTF-8": connect() + b"\x30\x04\x00\x02\xff\xfe",
    "topic beyond its packet": connect() + b"\x30\x03\x00\x09a",
    "another topic": connect() + publication("chat", b"x"),
    "a longer topic": connect() + publication(TOPIC + "/x", b"x"),
    "a line end in a topic": connect() + publication(TOPIC + "\n", b"x"),
    "everything": connect() + topics(8, "#", qos=1),
    "all topics": connect() + topics(8, "martlet/1/+", qos=1),
    "one of them": connect() + topics(8, TOPIC, "martlet/1/#", qos=1),
    "a share": connect() + topics(8, "$share/g/" + TOPIC, qos=1),
    "subscribe with QoS 2": connect() + topics(8, TOPIC, qos=2),
    "subscribe to nothing": connect() + topics(8),
    "subscribe cut short": connect() + b"\x82\x02\x00\x01",
    "bytes behind": connect() + b"\xc0\x01\x00",
    "CONNACK": connect() + b"\x20\x02\x00\x00",
    "PUBREL": connect() + b"\x62\x02\x00\x01",
    "kind 0": connect() + b"\x00\x00",
    "kind 15": connect() + b"\xf0\x00",
}


@pytest.mark.parametrize("what", REFUSED)
def test_everything_else_is_refused(what: str) -> None:
    guard = Guard()
    guard.feed(REFUSED[what])
    with pytest.raises(Violation):
        while guard.take():
            pass


def test_subscriptions_are_bounded_and_given_back() -> None:
    names = [f"martlet/1/{number}" for number in range(limits.SUBSCRIPTIONS)]
    guard = say(connect(), *(topics(8, name, qos=1) for name in names))
    guard.feed(topics(10, names[0]) + topics(8, "martlet/1/x", qos=1))
    assert guard.take() and guard.take()
    guard.feed(topics(8, "martlet/1/y", qos=1))
    with pytest.raises(Violation, match="too many"):
        guard.take()


def test_who_does_not_acknowledge_is_let_go() -> None:
    guard = say(connect())
    for _ in range(limits.IN_FLIGHT + limits.QUEUED):
        guard.sent(publication(TOPIC, b"x"))
    with pytest.raises(Violation):
        guard.sent(publication(TOPIC, b"x"))
    guard = say(connect())
    for _ in range(3 * (limits.IN_FLIGHT + limits.QUEUED)):
        guard.feed(b"\x40\x02\x00\x01")
        assert guard.take()
        guard.sent(publication(TOPIC, b"x"))
        guard.sent(publication(TOPIC, b"of QoS 0", flags=0))
        guard.sent(b"\xd0\x00")


@given(st.lists(st.binary(max_size=64), max_size=8), st.booleans())
def test_whatever_comes_nothing_but_a_violation(parts: list[bytes], connected: bool) -> None:
    guard = Guard()
    guard.feed(connect() if connected else b"")
    try:
        for part in parts:
            guard.feed(part)
            while guard.take():
                pass
    except Violation:
        pass
