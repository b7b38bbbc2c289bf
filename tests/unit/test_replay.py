"""Replay, races and redundancy: what left on one path leaves on another, and arrives once.

near [one] ------- [one] far        `near` sends, `far` acknowledges; every datagram and every
     [two] ------- [two]            acknowledgement may be lost on its way
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from tests.unit.engine_pair import START, ack, ends, varint
from tests.unit.quic_pair import numbered, numbers
from tunnel.datapath.engine import Path

DATAGRAM, PING, PADDING = 0x30, b"\x01", b"\0"
PACKET, COPY, PART = b"\0", b"\1", b"\2"
MAX_AGE = 2.0
STORE = 8 << 20  # bytes at most
SPARSE_BURST = 4096
BUDGET, BUDGET_BURST = 32_000, 16_384


@dataclass
class Sent:
    """A datagram of `near`, opened."""

    path: Path
    data: bytes
    number: int
    plain: bytes

    @property
    def payload(self) -> bytes:
        assert self.plain[0] == DATAGRAM
        return self.plain[1:]

    @property
    def root(self) -> int | None:
        """Of a copy, the number it names."""
        if self.plain[:2] != bytes([DATAGRAM]) + COPY:
            return None
        size = 1 << (self.plain[2] >> 6)
        return int.from_bytes(self.plain[2 : 2 + size]) & (1 << 8 * size - 2) - 1


class Rig:
    """Two engines with two paths between them; `near.connection` leaves by `one` at first."""

    def __init__(self) -> None:
        self.near, self.far = ends()
        self.connection = self.near.connection
        self.one, self.two = self.near.path, self.near.add_path()
        self.far_paths = {0: self.far.path, 1: self.far.add_path()}
        for path in self.far_paths.values():
            path.expect(self.far.cid)
        for path in (self.one, self.two):
            path.expect(self.near.cid)
            path.mtu = 1472
        self.now = START
        self.log: list[Sent] = []
        self.delivered: list[bytes] = []
        self.moved = 0
        """Packets that `far` takes for a move."""

    def push(self, *packets: bytes) -> None:
        for packet in packets:
            self.near.lane.push(packet, self.now)

    def leave(self) -> list[Sent]:
        """All that may leave now."""
        out: list[Sent] = []
        while self.connection.seal(self.now):
            for path, data in self.near.engine.take_sealed():
                out.append(Sent(path, data, *self.near.seals.open(data)[::2]))
        out += [
            Sent(path, data, *self.near.seals.open(data)[::2])
            for path, data in self.near.engine.take_sealed()
        ]
        self.log += out
        return out

    def send(self, *packets: bytes) -> list[Sent]:
        self.push(*packets)
        return self.leave()

    def arrive(self, sent: Iterable[Sent]) -> None:
        """At `far`."""
        for each in sent:
            path = self.far_paths[each.path.index]
            self.delivered += self.far.receive(each.data, now=self.now, path=path)
            for report in self.far.reports(self.now):
                self.moved += sum(opened.moving for opened in report.opened or ())

    def acked(self, *sent: Sent, path: Path | None = None) -> None:
        """An acknowledgement of these comes back at once."""
        frame = ack(each.number for each in sent)
        self.connection.ack_frame(path or sent[-1].path, frame, False, self.now)
        self.near.reports(self.now)

    def switch(self, path: Path, *, replay: bool = True) -> int:
        before = self.connection.active
        self.connection.activate(path)
        return self.connection.replay(before, now=self.now) if replay else 0

    def count(self, name: str) -> int:
        return self.connection.counters[name]


def of_flow(flow: int, number: int, size: int = 100) -> bytes:
    """`numbered`, of another flow."""
    packet = bytearray(numbered(number, size))
    packet[16:20] = flow.to_bytes(4)
    return bytes(packet)


def roots(sent: Iterable[Sent]) -> list[int | None]:
    return [each.root for each in sent]


def copied(sent: Iterable[Sent]) -> list[int]:
    """The roots of copies, smallest first."""
    return sorted(each.root for each in sent if each.root is not None)


def kinds(sent: Iterable[Sent]) -> set[bytes]:
    return {each.payload[:1] for each in sent}


# a switch


def test_nothing_is_lost_and_nothing_comes_twice_when_a_path_dies() -> None:
    rig = Rig()
    packets = [numbered(i, 1000) for i in range(300)]
    lost = rig.send(*packets)
    rig.arrive(lost[:100])  # but no acknowledgement came back
    assert rig.switch(rig.two) == 300 and rig.connection.pending_replay == 300
    again = rig.leave()
    assert {each.path for each in again} == {rig.two} and kinds(again) == {COPY}
    assert copied(again) == [each.number for each in lost]
    rig.arrive(again)
    assert sorted(numbers(rig.delivered)) == list(range(300))
    assert rig.far.lane.counters["copies_dropped"] == 100
    assert (rig.connection.pending_replay, rig.count("replayed")) == (0, 300)
    assert rig.count("copies_sent") == 300 and rig.count("redundant_packets") == 0


def test_copies_are_the_bytes_that_had_left() -> None:
    rig = Rig()
    first = rig.send(numbered(1, 40), numbered(2, 1400), numbered(3, 3000))
    assert {each.payload[:1] for each in first} == {PACKET, PART}
    rig.switch(rig.two)
    again = {each.root: each for each in rig.leave()}
    for each in first:
        assert again[each.number].payload == COPY + varint(each.number) + each.payload


def test_what_was_acknowledged_is_not_replayed() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(20)])
    rig.acked(*sent[5:15])
    assert rig.switch(rig.two) == 10
    again = rig.leave()
    assert copied(again) == [each.number for each in sent[:5] + sent[15:]]


def test_what_is_acknowledged_while_it_waits_is_not_replayed() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(20)])
    assert rig.switch(rig.two) == 20
    rig.acked(*sent[:12])
    assert rig.connection.pending_replay == 8
    assert copied(rig.leave()) == [each.number for each in sent[12:]]


def test_what_was_declared_lost_and_then_acknowledged_is_not_replayed() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(200)])
    rig.connection.activate(rig.two)
    rig.acked(sent[-1])
    assert rig.connection.pending_replay == 199 - 2  # the last three are not lost yet
    rig.acked(*sent)
    assert rig.connection.pending_replay == 0 and rig.leave() == []


def test_a_copy_that_was_acknowledged_stands_for_its_root() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(10)])
    rig.switch(rig.two)
    again = rig.leave()
    rig.acked(*again[:6])
    assert rig.switch(rig.one) == 4, "of the six it is known; the others died again"
    assert rig.connection.pending_replay == 4


def test_a_second_call_does_not_send_what_is_on_its_way() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(10)])
    assert rig.switch(rig.two) == 10
    rig.leave()
    assert rig.connection.replay(rig.one, now=rig.now) == 0 and rig.leave() == []


def test_two_paths_that_die_one_after_the_other() -> None:
    rig = Rig()
    third = rig.near.add_path()
    rig.far_paths[2] = rig.far.add_path()
    rig.send(*[numbered(i) for i in range(50)])
    rig.switch(rig.two)
    rig.leave()
    rig.send(*[numbered(i) for i in range(50, 80)])
    assert rig.switch(third) == 80, "the replays that died, and what was new there"
    rig.arrive(rig.leave())
    assert sorted(numbers(rig.delivered)) == list(range(80))


@pytest.mark.parametrize("replayed", [False, True])
def test_back_on_the_path_that_it_left_from(replayed: bool) -> None:
    """Whatever was on its way there when it was left died with it."""
    rig = Rig()
    rig.send(*[numbered(i) for i in range(50)])
    rig.switch(rig.two)
    if replayed:
        rig.leave()
    rig.switch(rig.one)
    again = rig.leave()
    assert {each.path for each in again} == {rig.one} and copied(again) == list(range(50))


def test_nothing_old_is_replayed() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(5)])
    rig.now += 1.5
    rig.send(*[numbered(i) for i in range(5, 9)])
    rig.now += 0.6
    assert rig.switch(rig.two) == 4
    assert rig.count("replay_given_up") == 5
    rig.now += 1.5
    assert rig.leave() == [] and rig.connection.pending_replay == 0
    assert rig.count("replay_given_up") == 9
    assert rig.connection.replay(rig.one, now=rig.now) == 0
    assert rig.count("replay_given_up") == 9, "counted once"


def test_the_store_grows_with_what_is_outstanding_and_ends() -> None:
    rig = Rig()
    size = 1400
    count = STORE // size + 500
    for i in range(0, count, 100):
        rig.send(*[numbered(n, size) for n in range(i, min(i + 100, count))])
    waiting = rig.switch(rig.two)
    assert 0.99 * STORE < waiting * (size + 2) <= STORE
    assert rig.count("replay_given_up") == count - waiting
    rig.arrive(rig.leave())
    assert sorted(numbers(rig.delivered)) == list(range(count - waiting, count))


def test_while_held_nothing_is_replayed() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(5)])
    rig.near.lane.hold()
    rig.switch(rig.two)
    assert rig.leave() == []
    rig.near.lane.recover(rig.now)
    assert len(rig.leave()) == 5


# what leaves first


def test_sparse_flows_first_then_the_rest_in_order() -> None:
    rig = Rig()
    bulk = [of_flow(1, i, 1400) for i in range(30)]
    keys = [of_flow(2 + i, 100 + i) for i in range(5)]
    sent = []
    for i in range(30):
        sent += rig.send(bulk[i], *keys[i // 6 : i // 6 + (i % 6 == 5)])
    rig.switch(rig.two)
    again = rig.leave()
    first = [numbers([each.payload[3:]])[0] for each in again]
    passes = 1 + SPARSE_BURST // 1400
    assert first[: passes + 5] == [*range(passes), 100, 101, 102, 103, 104]
    assert first[passes + 5 :] == list(range(passes, 30))


def test_a_new_packet_of_a_sparse_flow_goes_before_and_one_of_a_bulk_flow_behind() -> None:
    rig = Rig()
    rig.send(*[of_flow(1, i, 1400) for i in range(30)])
    rig.two.set_rate(5_000, 0.0)
    rig.switch(rig.two)
    rig.push(*[of_flow(1, 200 + i, 1400) for i in range(10)])
    assert len(rig.leave()) == 3, "the window is full"
    rig.push(of_flow(9, 500, 60))
    rig.two.set_rate(1 << 30, 0.0)
    later = rig.leave()
    assert later[0].payload == PACKET + of_flow(9, 500, 60)
    assert kinds(later[1:28]) == {COPY} and kinds(later[28:]) == {PACKET}


# loss detection


def test_a_voluntary_switch_replays_what_is_lost_and_nothing_else() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(10)])
    rig.switch(rig.two, replay=False)
    assert rig.connection.pending_replay == 0 and rig.leave() == []
    rig.acked(*sent[4:])
    assert rig.connection.pending_replay == 4
    again = rig.leave()
    assert roots(again) == [0, 1, 2, 3] and {each.path for each in again} == {rig.two}


def test_the_end_of_what_left_on_a_path_that_is_abandoned() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(10)])
    rig.switch(rig.two, replay=False)
    rig.acked(*sent[:8])
    rig.one.abandon()  # as its owner does after three probe timeouts
    assert roots(rig.leave()) == [8, 9]


def test_a_replay_that_is_lost_is_sent_again() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(20)])
    rig.switch(rig.two)
    again = rig.leave()
    rig.arrive(again[10:])
    rig.acked(*again[10:])
    once_more = rig.leave()
    assert roots(once_more) == [each.number for each in sent[:10]]
    rig.arrive(once_more)
    assert sorted(numbers(rig.delivered)) == list(range(20))
    assert rig.count("replayed") == 30


def test_what_is_lost_on_the_path_in_use_stays_lost() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(10)])
    rig.acked(*sent[5:])
    assert rig.leave() == [] and rig.connection.pending_replay == 0
    rig.connection.copies, rig.connection.copies_all = rig.two, True
    sent = rig.send(*[numbered(i) for i in range(10)])
    rig.acked(*[each for each in sent if each.path is rig.two][5:], path=rig.two)
    rig.acked(*[each for each in sent if each.path is rig.one][5:])
    assert rig.leave() == [], "nor is a copy of it made again"


def test_needless_replays_are_counted() -> None:
    rig = Rig()
    sent = rig.send(*[numbered(i) for i in range(10)])
    rig.switch(rig.two)
    again = rig.leave()
    rig.acked(*again[:4])
    assert rig.count("replay_needless") == 0
    rig.acked(*sent[:6], path=rig.two)
    assert rig.count("replay_needless") == 4
    rig.acked(*again[:6])
    rig.acked(*sent, path=rig.two)
    rig.acked(*again)
    rig.acked(*sent, *again)
    assert rig.count("replay_needless") == 10


# a race


def test_a_race_leaves_on_the_backup_and_moves_nobody() -> None:
    rig = Rig()
    rig.arrive(rig.send(numbered(0)))
    rig.one.set_rate(50 * 1030 + 1000, 0.0)
    rig.push(*[numbered(i, 1000) for i in range(1, 100)])
    assert len(rig.leave()) == 50, "the window of the active path is full"
    rig.moved = 0
    assert rig.connection.replay(rig.one, rig.two, now=rig.now) == 51
    again = rig.leave()
    assert {each.path for each in again} == {rig.two} and kinds(again) == {COPY}
    rig.arrive(again)
    assert numbers(rig.delivered) == list(range(51))
    assert rig.moved == 0 and rig.far.connection.peer_path is rig.far.path
    assert rig.connection.active is rig.one and rig.near.lane.queue_packets == 49


def test_a_race_does_not_wait_for_the_pacer_of_the_active_path() -> None:
    rig = Rig()
    rig.one.set_rate(1 << 30, 1000.0)
    rig.push(*[numbered(i, 1000) for i in range(20)])
    sent = rig.leave()
    assert 0 < len(sent) < 20
    rig.connection.replay(rig.one, rig.two, now=rig.now)
    assert len(rig.leave()) == len(sent)


def test_replays_respect_the_window_the_pacer_and_what_an_address_may_get() -> None:
    for limit in ("window", "pacer", "address"):
        rig = Rig()
        rig.send(*[numbered(i, 1000) for i in range(50)])
        if limit == "window":
            rig.two.set_rate(10_000, 0.0)
        elif limit == "pacer":
            rig.two.set_rate(1 << 30, 100_000.0)
        else:
            rig.two.limited, rig.two.bytes_received = True, 3_000
        rig.connection.replay(rig.one, rig.two, now=rig.now)
        again = rig.leave()
        assert 3 <= len(again) <= 10 and rig.connection.pending_replay == 50 - len(again)
        if limit == "window":
            rig.acked(*again)
            assert len(rig.leave()) == len(again)
        elif limit == "pacer":
            due = rig.connection.get_timer()
            assert due is not None and rig.now < due < rig.now + 0.1
            rig.now = due
            assert rig.leave() != []
        else:
            assert sum(len(each.data) for each in again) <= 9_000


def test_after_a_race_the_switch_sends_only_the_rest() -> None:
    rig = Rig()
    rig.send(*[numbered(i, 1000) for i in range(20)])
    rig.two.set_rate(10_000, 0.0)
    rig.connection.replay(rig.one, rig.two, now=rig.now)
    first = rig.leave()
    rig.two.set_rate(1 << 30, 0.0)
    assert rig.switch(rig.two) == 20 - len(first)
    rest = rig.leave()
    assert roots(first + rest) == list(range(20))


def test_a_later_call_takes_what_waits_elsewhere() -> None:
    rig = Rig()
    third = rig.near.add_path()
    rig.send(*[numbered(i, 1000) for i in range(20)])
    rig.two.set_cid(None)
    rig.connection.replay(rig.one, rig.two, now=rig.now)
    assert rig.leave() == []
    assert rig.connection.replay(rig.one, third, now=rig.now) == 20
    assert {each.path for each in rig.leave()} == {third}


def test_a_backup_full_of_what_nobody_answers_is_tried_now_and_then() -> None:
    rig = Rig()
    rig.two.set_rate(5_000, 0.0)
    rig.send(*[numbered(i, 1000) for i in range(20)])
    rig.connection.replay(rig.one, rig.two, now=rig.now)
    assert len(rig.leave()) == 4
    rig.now += 0.25
    assert len(rig.leave()) == 1
    assert rig.leave() == []


def test_what_leaves_on_a_backup_does_not_make_the_active_path_look_silent() -> None:
    rig = Rig()
    rig.connection.patience = 0.05
    sent = rig.send(numbered(1))
    rig.connection.replay(rig.one, rig.two, now=rig.now)
    rig.connection.copies, rig.connection.copies_all = rig.two, True
    rig.leave()
    rig.acked(*sent)
    assert rig.one.waiting_since is None and rig.two.waiting_since is not None
    due = rig.connection.get_timer()
    assert due is None or due < rig.now + 0.002, "no probe timeout, no end of patience"
    rig.now += 5
    rig.connection.handle_timer(rig.now)
    assert not any(report.wake or report.pto for report in rig.near.reports(rig.now))


# a path that carries less


@pytest.mark.parametrize("size", [1164, 1165, 1400, 1441])
def test_a_copy_too_large_for_the_new_path_leaves_in_parts(size: int) -> None:
    rig = Rig()
    rig.send(numbered(7, size))
    rig.two.mtu = 1200
    rig.switch(rig.two)
    again = rig.leave()
    assert max(len(each.data) for each in again) <= 1200
    assert (kinds(again), len(again)) == (({COPY}, 1) if size <= 1167 else ({PART}, 2))
    rig.arrive(reversed(again))
    assert rig.delivered == [numbered(7, size)]
    assert rig.connection.pending_replay == 0 and rig.count("replayed") == 1
    assert rig.near.lane.counters["tx_packets"] == 1, "it is the same packet"


def test_in_parts_it_is_dropped_where_the_first_had_arrived() -> None:
    for order in (1, -1):
        rig = Rig()
        sent = rig.send(numbered(7, 1400))
        rig.two.mtu = 1200
        rig.switch(rig.two)
        for each in [sent, rig.leave()][::order]:
            rig.arrive(each)
        assert numbers(rig.delivered) == [7]
        assert rig.far.lane.counters["copies_dropped"] == 1


def test_lost_parts_of_a_replay_are_replayed_by_the_next_switch() -> None:
    rig = Rig()
    third = rig.near.add_path()
    rig.far_paths[2] = rig.far.add_path()
    rig.send(*[numbered(i, 1400) for i in range(10)])
    rig.two.mtu = 1200
    rig.switch(rig.two)
    assert len(rig.leave()) == 20
    assert rig.switch(third) == 20
    rig.arrive(rig.leave())
    assert sorted(numbers(rig.delivered)) == list(range(10))


def test_a_split_under_way_is_finished_first() -> None:
    rig = Rig()
    rig.send(numbered(7, 1400))
    rig.two.mtu = 1200
    rig.push(numbered(8, 9000))
    rig.connection.activate(rig.two)
    rig.two.set_rate(3_000, 0.0)
    first = rig.leave()
    rig.connection.replay(rig.one, now=rig.now)
    rig.two.set_rate(1 << 30, 0.0)
    rig.arrive(first + rig.leave())
    assert sorted(numbers(rig.delivered)) == [7, 8]


def test_what_does_not_fit_a_backup_is_skipped() -> None:
    rig = Rig()
    rig.send(numbered(1, 1400), numbered(2, 100), numbered(3, 1400))
    rig.two.mtu = 1200
    assert rig.connection.replay(rig.one, rig.two, now=rig.now) == 3
    assert roots(rig.leave()) == [1] and rig.connection.pending_replay == 0
    assert rig.switch(rig.two) == 2, "it was not given up"


@pytest.mark.parametrize(
    "blob",
    [
        COPY,
        COPY + b"\x40",
        COPY + varint(3),
        COPY + varint(99) + PACKET + numbered(1),
        COPY + varint(3) + PART + numbered(1),
        COPY + varint(3) + COPY + varint(2) + PACKET + numbered(1),
    ],
)
def test_malformed_copies_in_parts_are_refused(blob: bytes) -> None:
    near, far = ends()
    for number, (at, last, data) in enumerate([(0, 0, blob[:1]), (1, 1, blob[1:])], 50):
        payload = PART + varint(5) + varint(at) + bytes([last]) + data
        assert far.receive(near.craft(number, b"\x30" + payload), now=START) == []
    assert far.lane.counters["malformed_datagrams"] == 1


# redundancy


def test_sparse_flows_go_two_ways() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    sent = rig.send(numbered(1))
    assert [each.path for each in sent] == [rig.one, rig.two] and roots(sent) == [None, 0]
    rig.arrive(sent[1:])
    rig.arrive(sent[:1])
    assert numbers(rig.delivered) == [1]
    assert rig.count("redundant_packets") == rig.count("copies_sent") == 1
    assert rig.count("redundant_bytes") == len(sent[1].data)
    rig.acked(sent[1], path=rig.two)
    assert rig.switch(rig.two) == 0, "its copy arrived"


def test_a_bulk_flow_goes_two_ways_only_as_long_as_nobody_can_know() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    for i in range(100):
        rig.send(of_flow(1, i, 1400), *[of_flow(2, 1000 + i, 60)] * (i % 10 == 0))
        rig.now += 0.001
    twice = [numbers([each.payload[3:]])[0] for each in rig.log if each.path is rig.two]
    assert [number for number in twice if number < 1000] == [0, 1, 2]
    assert len([number for number in twice if number >= 1000]) == 10


def test_a_flow_that_sent_much_is_sparse_again_after_a_second() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    rig.send(*[of_flow(1, i, 1400) for i in range(1000)])
    for pause, sparse in ((0.9, False), (1.2, True)):
        rig.now += pause
        assert len(rig.send(of_flow(1, 0, 60))) == 1 + sparse


def test_the_budget_of_all_sparse_flows_together() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    for i in range(4000):  # 20 flows of 200 packets a second each: 400 kB/s
        rig.send(of_flow(i % 20, i, 100))
        rig.now += 1 / 4000
    twice = rig.count("redundant_packets") * 100
    assert twice == pytest.approx(BUDGET + BUDGET_BURST, rel=0.01)


def test_probes_and_a_shell_fit_the_budget() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    pushed = 0
    for i in range(2000):  # ten seconds
        packets = [of_flow(1, i, 92)] + [of_flow(2, i, 120)] * (i % 10 == 0)
        pushed += len(packets)
        rig.send(*packets)
        rig.acked(*rig.log[-2 * len(packets) :])
        rig.now += 0.005
    assert rig.count("redundant_packets") == pushed


@pytest.mark.parametrize("rate", [0.0, 8_000.0, 1e6])
def test_the_budget_can_be_set(rate: float) -> None:
    rig = Rig()
    rig.near.lane.set_redundancy(rate)
    rig.connection.copies = rig.two
    for i in range(2000):
        rig.send(of_flow(i % 20, i, 100))
        rig.now += 0.001
    expected = min(200_000, rate * 2 + BUDGET_BURST) if rate else 0
    assert rig.count("redundant_packets") * 100 == pytest.approx(expected, rel=0.02)


def test_everything_goes_two_ways_when_asked_for() -> None:
    rig = Rig()
    rig.connection.copies, rig.connection.copies_all = rig.two, True
    sent = rig.send(*[of_flow(1, i, 1400) for i in range(50)])
    assert len(sent) == 100 and rig.connection.copies_all
    rig.arrive(each for each in sent if each.path is rig.two)
    assert numbers(rig.delivered) == list(range(50))


def test_redundancy_shrinks_no_packet() -> None:
    rig = Rig()
    rig.one.mtu = rig.two.mtu = 1452
    rig.connection.copies = rig.two
    sent = rig.send(numbered(1, 1420))
    assert len(sent) == 1, "whole, and the copy that does not fit is not made"
    rig.connection.copies_all = True
    assert len(rig.send(numbered(2, 1420))) == 4, "but while a move is checked it must"


def test_copies_of_the_active_path_onto_itself_are_none() -> None:
    rig = Rig()
    rig.connection.copies = rig.two
    rig.connection.activate(rig.two)
    assert len(rig.send(numbered(1))) == 1


def test_a_second_way_is_not_taken_for_a_slow_path() -> None:
    """Its samples say that there was nothing more to send."""
    rig = Rig()
    rig.connection.copies = rig.two
    sent = rig.send(numbered(1))
    rig.now += 0.02
    frame = ack(each.number for each in sent)
    rig.connection.ack_frame(rig.two, frame, False, rig.now)
    rig.connection.handle_timer(rig.now)
    samples = [s for r in rig.near.reports(rig.now) for s in r.samples or ()]
    assert {sample[0]: sample[6] for sample in samples}[rig.two] is True


# what goes


def test_a_slot_used_again_inherits_nothing() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(5)])
    rig.switch(rig.two, replay=False)
    index = rig.one.index
    rig.one.remove()
    again = rig.near.add_path()
    assert again.index == index
    assert len(rig.leave()) == 5, "what left there is replayed"
    assert rig.connection.replay(again, now=rig.now) == 0
    rig.switch(again)
    assert len(rig.leave()) == 5, "on the slot's next path it was not"


def test_a_target_that_goes_leaves_its_replays_to_the_active_path() -> None:
    rig = Rig()
    third = rig.near.add_path()
    rig.send(*[numbered(i) for i in range(5)])
    rig.switch(rig.two)
    rig.connection.replay(rig.one, third, now=rig.now)
    third.remove()
    assert {each.path for each in rig.leave()} == {rig.two}


def test_another_connection_replays_nothing_of_the_first() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(5)])
    rig.switch(rig.two)
    rig.connection.detach()
    assert rig.connection.pending_replay == 0 and rig.count("replay_given_up") == 5
    rig.connection.attach(rig.near.lane)
    assert rig.leave() == [] and rig.connection.replay(rig.one, now=rig.now) == 0
    rig.connection.activate(rig.one)
    rig.send(numbered(9))
    assert rig.switch(rig.two) == 1


def test_the_memory_of_sent_packets_runs_over_what_waits() -> None:
    rig = Rig()
    rig.send(*[numbered(i) for i in range(30)])
    rig.switch(rig.two, replay=False)
    rig.two.set_cid(None)
    rig.one.abandon()
    assert rig.connection.pending_replay == 30
    for _ in range(10):
        rig.connection.number += 500
    rig.two.set_cid(rig.near.peer_cid)
    assert rig.leave() == [] and rig.connection.pending_replay == 0
    assert rig.count("replay_given_up") == 30


# random


class World(Rig):
    """A rig whose links live and die, with an owner that probes as it must."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.alive = {0: True, 1: True}
        self.loss = 0.0
        self.under_way: list[tuple[float, int, bytes, bool]] = []
        self.pushed = 0

    def passes(self, path: Path) -> bool:
        return self.alive[path.index] and self.rng.random() >= self.loss

    def carry(self, path: Path, data: bytes, to_far: bool) -> None:
        if self.passes(path):
            at = self.now + 0.005 + self.rng.random() * 0.002
            self.under_way.append((at, path.index, data, to_far))

    def probe(self) -> None:
        path, number = self.connection.active, self.connection.number
        self.connection.number = number + 1
        data = self.near.craft(number, PING + 3 * PADDING)
        self.connection.sent(path, number, len(data), True, True, self.now)
        self.carry(path, data, True)

    def step(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 6)
        due = sorted(each for each in self.under_way if each[0] <= self.now)
        self.under_way = [each for each in self.under_way if each[0] > self.now]
        for _, index, data, to_far in due:
            if to_far:
                path = self.far_paths[index]
                self.delivered += self.far.receive(data, now=self.now, path=path)
            else:
                self.near.receive(data, now=self.now, path=(self.one, self.two)[index])
        self.far.reports(self.now)
        self.far.connection.handle_timer(self.now)
        self.far.connection.activate(self.far_paths[self.connection.active.index])
        for path, data in self.far.engine.take_sealed():
            self.carry(path, data, False)
        self.connection.handle_timer(self.now)
        for report in self.near.reports(self.now):
            if report.pto:
                self.probe()
        for each in self.leave():
            self.carry(each.path, each.data, True)

    def load(self) -> None:
        for _ in range(self.rng.choice([0, 0, 1, 3, 20])):
            flow = self.rng.choice([1, 1, 1, self.rng.randrange(2, 9)])
            size = self.rng.choice([40, 90, 700, 1400])
            self.push(of_flow(flow, self.pushed, size))
            self.pushed += 1

    def settle(self, seconds: float) -> None:
        steps = 100
        for _ in range(steps):
            self.step(seconds / steps)


def check(world: World) -> list[int]:
    """The numbers that came, none twice."""
    came = numbers(world.delivered)
    assert len(set(came)) == len(came), "a packet came twice"
    return sorted(came)


@pytest.mark.parametrize("seed", range(60))
def test_failovers_lose_nothing(seed: int) -> None:
    """A link that dies stays dead until it was left, and the other one lives."""
    rng = random.Random(seed)
    world = World(rng)
    paths = [world.one, world.two]
    for path in paths:
        path.mtu = rng.choice([1200, 1350, 1472])
        path.set_rate(rng.choice([30_000, 200_000, 1 << 30]), rng.choice([0.0, 5e6]))
    world.connection.copies = rng.choice([None, world.two])
    race = rng.random() < 0.5
    active = 0
    for _ in range(rng.randrange(1, 5)):
        for _ in range(rng.randrange(1, 40)):
            world.load()
            world.step(rng.random() * 0.003)
        world.alive[active] = False
        for _ in range(rng.randrange(1, 15)):
            world.load()
            world.step(rng.random() * 0.004)
        if race:
            world.connection.replay(paths[active], paths[1 - active], now=world.now)
            world.step(rng.random() * 0.02)
        if rng.random() < 0.5:
            world.under_way.clear()
        world.alive[active] = world.alive[1 - active] = True
        active = 1 - active
        world.switch(paths[active])
        paths[active].forgive()
    assert world.now < START + MAX_AGE / 2
    world.settle(0.9)
    missing = set(range(world.pushed)) - set(check(world))
    # What stood in the queue too long never left.
    assert len(missing) == world.near.lane.counters["queue_codel_dropped"], f"seed {seed}"
    assert world.count("replay_given_up") == 0
    assert world.connection.pending_replay == 0 and world.near.lane.queue_packets == 0


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_nothing_comes_twice(seed: int) -> None:
    rng = random.Random(1000 + seed)
    world = World(rng)
    paths = [world.one, world.two]

    def switch() -> None:
        world.switch(rng.choice(paths), replay=rng.random() < 0.5)

    def race() -> None:
        world.connection.replay(*rng.sample(paths, 2), now=world.now)

    def abandon() -> None:
        rng.choice(paths).abandon()

    def change() -> None:
        index = rng.randrange(2)
        world.alive[index] = not world.alive[index]
        world.loss = rng.choice([0.0, 0.05, 0.5])
        paths[index].mtu = rng.choice([1200, 1300, 1472])
        paths[index].set_rate(rng.choice([5_000, 100_000, 1 << 30]), rng.choice([0.0, 1e6]))

    def copy() -> None:
        world.connection.copies = rng.choice([None, *paths])
        world.connection.copies_all = rng.random() < 0.3

    def outage() -> None:
        world.near.lane.hold()
        world.step(rng.random())
        world.near.lane.recover(world.now)

    actions: list[Callable[[], None]] = [switch, race, abandon, change, copy, outage]
    for _ in range(300):
        if rng.random() < 0.2:
            rng.choice(actions)()
        world.load()
        world.step(rng.choice([0.0, 0.001, 0.01]))
    came = check(world)
    assert came and came[-1] < world.pushed
    assert world.far.lane.counters["refused_packets"] == 0
    assert world.far.lane.counters["malformed_datagrams"] == 0
    assert min(world.one.in_flight, world.two.in_flight) >= 0
