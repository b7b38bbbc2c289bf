"""The engine where it runs full."""

from tunnel.datapath.native.engine import Connection, Engine, Lane

RING = 1 << 18  # RING_LIMIT of recovery.c: packets that may wait for an answer
PACKET = bytes.fromhex("4500 0400 0000 0000 4011 0000") + bytes(1024 - 12)


def varint(value: int) -> bytes:
    return (value | 0x8000_0000).to_bytes(4, "big")


def test_a_probe_that_nobody_answers_does_not_stop_the_path_in_use() -> None:
    engine = Engine()
    lane, connection = Lane(engine, 1, 7), Connection(engine)
    active, other = (connection.add_path(1200, 0.1) for _ in range(2))
    for path in (active, other):
        path.limited = False
        path.set_cid(b"12345678")
    active.set_rate(1 << 30, 0.0)
    key, iv = bytes(16), bytes(12)
    connection.start(0, key, iv, key, key, iv, key, 0, 0.0)
    connection.attach(lane)
    now = 1.0
    connection.number = 1
    connection.sent(other, 0, 1200, True, True, now)

    lost: list[int] = []
    for _ in range(2 * RING // 4096):
        connection.number += 4000  # as if so many had been sent and acknowledged
        for _ in range(10):
            lane.push(PACKET, now)
        assert connection.seal(now) == 10
        assert len(engine.take_sealed()) == 10
        now += 0.01
        assert connection.ack_frame(
            active, varint(connection.number - 1) + b"\0\0" + varint(9), False, now
        )
        report = connection.take(now)
        assert report is not None
        lost += report.lost or []
    assert connection.number > RING
    assert lost == [0]  # its owner is told
    assert other.in_flight == 0
    assert other.outstanding == 0
    assert other.lost == 0  # nobody is blamed
    assert active.in_flight == 0


def test_packets_that_are_counted_first_and_reported_then_are_all_kept() -> None:
    """The owner takes several numbers at once, wherever the engine's memory of them ends."""
    for first in range(1000, 1040):
        connection = Connection(Engine())
        path = connection.add_path(1200, 0.1)
        connection.number = first
        connection.number = first + 3
        for number in range(first, first + 3):
            connection.sent(path, number, 100, True, True, 1.0)
        assert path.in_flight == 300, first
        path.abandon()
        report = connection.take(1.0)
        assert report is not None
        assert report.lost == [first, first + 1, first + 2]
