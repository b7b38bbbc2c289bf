"""Acknowledgement, loss and RTT in the engine (RFC 9002): everything of a path stays with it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from tests.unit.engine_pair import INITIAL_RTT, MTU, START, End, ack, ends, expand, read_ack, varint
from tests.unit.quic_pair import ACK, PING, Flight, Pair, numbered, numbers
from tunnel.datapath.engine import Path
from tunnel.path.network import Address
from tunnel.quic.events import PeerMoved
from tunnel.quic.recovery import MAX_PTO_INTERVAL

SIZE = 1200
THRESHOLD, MAX_THRESHOLD = 3, 128
SPURIOUS_MEMORY, SPURIOUS_RANGES = 64, 8
LATE = 512  # numbers below an acknowledged acknowledgement that are still reported
FRAME_ENCODING_ERROR, PROTOCOL_VIOLATION = 0x7, 0xA
PING_FRAME = b"\x01" + bytes(8)


class Rig:
    """A connection with two paths whose packets are all its owner's, and made-up answers."""

    def __init__(self) -> None:
        self.end, self.peer = ends()
        self.connection = self.end.connection
        self.one, self.two = self.end.path, self.end.add_path()
        self.acked: list[int] = []
        self.lost: list[int] = []
        self.probes = 0

    def send(self, path: Path, now: float, *, eliciting: bool = True, size: int = SIZE) -> int:
        number = self.connection.number
        self.connection.sent(path, number, size, eliciting, eliciting, START + now)
        return number

    def ack(
        self, now: float, *numbers: int, delay: float = 0.0, arriving: Path | None = None
    ) -> int:
        frame = ack(numbers, round(delay * 1e6) >> 3)
        used = self.connection.ack_frame(arriving or self.one, frame, False, START + now)
        assert used in (len(frame), -1)
        self.look(now)
        return used

    def timer(self) -> float | None:
        due = self.connection.get_timer()
        return None if due is None else due - START

    def at(self, now: float) -> None:
        self.connection.handle_timer(START + now)
        self.look(now)

    def look(self, now: float) -> None:
        for report in self.end.reports(START + now):
            self.acked += sorted(report.acked or ())
            self.lost += sorted(report.lost or ())
            self.probes += report.pto


# loss


def test_three_later_packets_make_a_loss() -> None:
    rig = Rig()
    sent = [rig.send(rig.one, 1.0) for _ in range(5)]
    rig.ack(1.05, sent[2])
    assert rig.lost == []
    rig.ack(1.05, sent[3])
    assert (rig.lost, rig.acked) == ([sent[0]], [sent[2], sent[3]])
    assert rig.one.in_flight == 2 * SIZE and rig.one.lost == 1


def test_nine_eighths_of_a_round_trip_make_a_loss() -> None:
    rig = Rig()
    first, second = rig.send(rig.one, 1.0), rig.send(rig.one, 1.005)
    rig.ack(1.105, second)
    assert rig.timer() == pytest.approx(1.0 + 0.1 * 9 / 8, abs=2e-6)
    rig.at(1.1124)
    assert rig.lost == []
    rig.at(1.1126)
    assert rig.lost == [first] and rig.one.in_flight == 0


def test_on_short_paths_a_millisecond_at_least() -> None:
    rig = Rig()
    rig.one.add_rtt(0.0001, 0.0)
    rig.send(rig.one, 1.0)
    rig.ack(1.0002, rig.send(rig.one, 1.0001))
    assert rig.timer() == pytest.approx(1.001, abs=2e-6)


def test_packets_of_other_paths_leave_no_gaps() -> None:
    rig = Rig()
    first = rig.send(rig.one, 1.0)
    others = [rig.send(rig.two, 1.0) for _ in range(20)]
    rig.ack(1.05, rig.send(rig.one, 1.0))
    rig.ack(1.05, *others[10:])
    assert rig.lost == others[:10], "within the path they are lost"
    assert first not in rig.lost
    assert rig.one.in_flight == SIZE


def test_reordering_raises_the_threshold() -> None:
    rig = Rig()
    now, wanted = 1.0, THRESHOLD
    for _ in range(7):
        assert rig.one.reordering == wanted
        sent = [rig.send(rig.one, now) for _ in range(wanted + 1)]
        rig.lost.clear()
        rig.ack(now + 0.01, *sent[1:])
        assert rig.lost == sent[:1]
        rig.ack(now + 0.011, *sent)
        wanted = min(2 * wanted, MAX_THRESHOLD)
        now += 1.0
    assert rig.one.reordering == MAX_THRESHOLD
    assert rig.two.reordering == THRESHOLD
    assert rig.connection.counters["spurious_losses"] == 7


def test_a_loss_is_found_to_be_spurious_once_and_reported() -> None:
    rig = Rig()
    sent = [rig.send(rig.one, 1.0) for _ in range(5)]
    rig.ack(1.01, *sent[1:])
    reports = []
    for turn in range(3):
        rig.connection.ack_frame(rig.one, ack(sent), False, START + 1.02 + turn)
        rig.connection.handle_timer(START + 1.5 + turn)
        reports += rig.end.reports(START + 1.5 + turn)
    samples = [sample for report in reports for sample in report.samples or ()]
    assert [sample[-1] for sample in samples] == [True]
    assert rig.connection.counters["spurious_losses"] == 1


@dataclass
class Model:
    """What RFC 9002 says, slowly: a list of packets and all of it looked through every time."""

    packets: dict[int, tuple[int, float, int, bool]] = field(default_factory=dict)
    """Path, time, place among the packets of the path, eliciting; of those outstanding."""
    orders: list[int] = field(default_factory=lambda: [0, 0])
    acked_order: list[int] = field(default_factory=lambda: [-1, -1])
    threshold: list[int] = field(default_factory=lambda: [THRESHOLD, THRESHOLD])
    rtt: list[tuple[float, float] | None] = field(default_factory=lambda: [None, None])
    """Latest and smoothed, of each path."""
    acked: set[int] = field(default_factory=set)
    lost: list[tuple[int, int]] = field(default_factory=list)
    found: set[int] = field(default_factory=set)

    def send(self, number: int, path: int, at: float, eliciting: bool) -> None:
        self.packets[number] = (path, at, self.orders[path], eliciting)
        self.orders[path] += 1

    def ack(self, numbers: list[int], now: float, arriving: int, active: int) -> None:
        new = [number for number in numbers if number in self.packets]
        touched = sorted({self.packets[number][0] for number in new})
        for path in touched:
            mine = [number for number in new if self.packets[number][0] == path]
            newest = max(mine)
            eliciting = any(self.packets[number][3] for number in mine)
            if newest == max(numbers) and eliciting and path in (active, arriving):
                self.measure(path, now - self.packets[newest][1])
            self.acked_order[path] = max(
                self.acked_order[path], *(self.packets[number][2] for number in mine)
            )
        for number, path in self.lost[-SPURIOUS_MEMORY:]:
            if number in numbers and number not in self.found:
                self.found.add(number)
                self.threshold[path] = min(2 * self.threshold[path], MAX_THRESHOLD)
        for number in new:
            del self.packets[number]
        self.acked.update(new)
        for path in touched:
            self.detect(path, now)

    def measure(self, path: int, rtt: float) -> None:
        before = self.rtt[path]
        smoothed = rtt if before is None else before[1] * 7 / 8 + rtt / 8
        self.rtt[path] = (rtt, smoothed)

    def detect(self, path: int, now: float) -> None:
        known = self.rtt[path]
        delay = max((INITIAL_RTT if known is None else max(known)) * 9 / 8, 0.001)
        for number, (where, at, order, _) in sorted(self.packets.items()):
            if where != path or order > self.acked_order[path]:
                continue
            late = now >= at + int(delay * 1e6) / 1e6 - 1e-9
            if order <= self.acked_order[path] - self.threshold[path] or late:
                del self.packets[number]
                self.lost.append((number, path))

    def in_flight(self, path: int) -> int:
        return SIZE * sum(where == path and e for where, _, _, e in self.packets.values())


@pytest.mark.parametrize("seed", range(60))
def test_random_orders_against_a_model(seed: int) -> None:
    rng = random.Random(seed)
    rig, model = Rig(), Model()
    paths = [rig.one, rig.two]
    loss, spread, now = rng.choice([0.0, 0.02, 0.3]), rng.choice([0.0, 0.003, 0.03]), 1.0
    arrivals: list[tuple[float, int]] = []
    for _ in range(600):
        now = round(now + rng.choice([0.0, 0.0001, 0.0007, 0.004]), 6)
        path = int(rng.random() < 0.2)
        eliciting = rng.random() < 0.9
        number = rig.send(paths[path], now, eliciting=eliciting)
        model.send(number, path, now, eliciting)
        if rng.random() >= loss:
            arrivals.append((now + 0.02 + rng.random() * spread, number))
        due = sorted(number for at, number in arrivals if at <= now)
        if due and rng.random() < 0.3:
            arrivals = [(at, number) for at, number in arrivals if at > now]
            # Some of an earlier acknowledgement once more, as the real ones repeat.
            again = rng.sample(sorted(model.acked), min(5, len(model.acked)))
            ranges = sorted({*due, *again})[-SPURIOUS_RANGES:]
            arriving = rng.randrange(2)
            model.ack(ranges, now, arriving, 0)
            rig.ack(now, *ranges, arriving=paths[arriving])
            arrivals += [(now, number) for number in due if number not in ranges]
            assert set(rig.acked) == model.acked, f"seed {seed} at {now}"
            assert sorted(rig.lost) == sorted(n for n, _ in model.lost), f"seed {seed} at {now}"
            for index, each in enumerate(paths):
                assert each.in_flight == model.in_flight(index), f"seed {seed} at {now}"
                assert each.reordering == model.threshold[index], f"seed {seed} at {now}"
                if (known := model.rtt[index]) is not None:
                    assert each.rtt_latest == pytest.approx(known[0], abs=2e-6)
                    assert each.rtt_smoothed == pytest.approx(known[1], abs=2e-5)
    assert len(model.acked) > 100


# round trips


def test_only_the_largest_measures_and_only_when_new() -> None:
    rig = Rig()
    first, second = rig.send(rig.one, 1.0), rig.send(rig.one, 1.1)
    rig.ack(1.15, second)
    assert rig.one.rtt_latest == pytest.approx(0.05)
    rig.ack(1.4, second, first)
    assert rig.one.rtt_latest == pytest.approx(0.05)


def test_an_old_path_measures_nothing_from_a_mixed_acknowledgement() -> None:
    rig = Rig()
    old, new = rig.send(rig.one, 1.0), rig.send(rig.two, 1.2)
    rig.ack(1.25, old, new, arriving=rig.two)
    assert not rig.one.has_rtt
    assert rig.two.rtt_latest == pytest.approx(0.05)


def test_an_acknowledgement_that_took_another_way_back_measures_nothing() -> None:
    rig = Rig()
    rig.ack(1.25, rig.send(rig.two, 1.0), arriving=rig.one)
    assert not rig.two.has_rtt and rig.two.outstanding == 0
    rig.ack(2.25, rig.send(rig.one, 2.0), arriving=rig.two)
    assert rig.one.rtt_latest == pytest.approx(0.25), "but the active path is always measured"


def test_rtt_formulas_of_rfc_9002() -> None:
    path = Rig().one
    path.add_rtt(0.1, 0.02)  # the first sample: nothing to subtract from
    assert (path.rtt_smoothed, path.rtt_variance) == pytest.approx((0.1, 0.05))
    path.add_rtt(0.2, 0.02)
    assert path.rtt_variance == pytest.approx(0.05 * 3 / 4 + 0.08 / 4)
    assert path.rtt_smoothed == pytest.approx(0.1 * 7 / 8 + 0.18 / 8)
    assert path.rtt_min == pytest.approx(0.1)


def test_the_peers_delay_counts_up_to_what_it_announced() -> None:
    rig = Rig()
    rig.one.add_rtt(0.1, 0.0)
    rig.ack(1.2, rig.send(rig.one, 1.0), delay=0.15)
    assert rig.one.rtt_smoothed == pytest.approx(0.1 * 7 / 8 + (0.2 - 0.005) / 8)


def test_the_peers_delay_is_scaled_by_its_exponent() -> None:
    rig = Rig()
    rig.connection.configure(peer_ack_exponent=5, max_ack_delay=1.0)
    rig.one.add_rtt(0.1, 0.0)
    number = rig.send(rig.one, 1.0)
    rig.connection.ack_frame(rig.one, ack([number], 50_000 >> 5), False, START + 1.2)
    assert rig.one.rtt_smoothed == pytest.approx(0.1 * 7 / 8 + 0.15 / 8, abs=1e-5)


def test_acknowledgements_of_acknowledgements_measure_nothing() -> None:
    rig = Rig()
    rig.ack(1.5, rig.send(rig.one, 1.0, eliciting=False))
    assert not rig.one.has_rtt


# progress, and the end of patience


def test_waiting_since_the_first_unanswered_packet() -> None:
    rig = Rig()
    first = rig.send(rig.one, 1.0)
    second = rig.send(rig.one, 1.3)
    assert rig.one.waiting_since == pytest.approx(START + 1.0)
    seen = []
    for now, number in ((1.4, first), (1.5, second)):
        rig.ack(now, number)
        seen.append((rig.one.waiting_since, rig.one.last_progress_at))
    rig.send(rig.one, 2.0, eliciting=False)
    rig.ack(2.1, first)
    seen.append((rig.one.waiting_since, rig.one.last_progress_at))
    assert seen[0] == pytest.approx((START + 1.3, START + 1.4))
    assert seen[1:] == 2 * [(None, START + 1.5)], "an old acknowledgement is no progress"


def test_a_path_that_becomes_the_active_one_owes_nothing_for_copies_before() -> None:
    rig = Rig()
    rig.send(rig.two, 1.0)
    assert rig.two.waiting_since == START + 1.0
    rig.connection.activate(rig.two)
    after: list[float | None] = [rig.two.waiting_since]
    rig.send(rig.two, 1.2)
    after.append(rig.two.waiting_since)
    assert after == [None, pytest.approx(START + 1.2)]


def test_progress_elsewhere_is_no_progress_here() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0)
    rig.ack(1.1, rig.send(rig.two, 1.05))
    assert (rig.one.waiting_since, rig.one.last_progress_at) == (START + 1.0, 0.0)


def test_silence_is_reported_once_when_patience_ends() -> None:
    rig = Rig()
    rig.connection.patience = 0.05
    number = rig.send(rig.one, 1.0)
    assert rig.timer() == pytest.approx(1.05)

    def woken(now: float) -> bool:
        rig.connection.handle_timer(START + now)
        return any(report.wake for report in rig.end.reports(START + now))

    assert [woken(at) for at in (1.04, 1.051, 1.06)] == [False, True, False]
    rig.ack(1.08, number)
    rig.send(rig.one, 1.1)
    assert [woken(at) for at in (1.14, 1.151)] == [False, True], "a new silence"


def test_forgiven_packets_leave_the_window_but_still_arrive() -> None:
    rig = Rig()
    number = rig.send(rig.one, 1.0)
    rig.one.forgive()
    assert rig.one.in_flight == 0
    rig.ack(1.1, number)
    assert rig.one.in_flight == 0
    assert rig.acked == [number]


def test_an_abandoned_path_gives_its_packets_back() -> None:
    rig = Rig()
    mine, others = rig.send(rig.one, 1.0), [rig.send(rig.two, 1.0) for _ in range(5)]
    rig.two.abandon()
    rig.look(1.0)
    assert rig.lost == others and rig.two.in_flight == 0 and rig.two.outstanding == 0
    rig.ack(1.1, mine, *others)
    assert rig.acked == [mine]
    again = rig.send(rig.two, 1.2)
    rig.two.remove()
    rig.look(1.2)
    assert rig.lost == [*others, again]


def test_inheriting_takes_window_and_rtt() -> None:
    rig = Rig()
    rig.one.add_rtt(0.07, 0.0)
    rig.one.set_rate(99_000, 5e6)
    rig.send(rig.one, 1.0)
    rig.two.inherit(rig.one)
    assert (rig.two.window, rig.two.pacing_rate) == pytest.approx((99_000, 5e6))
    assert rig.two.has_rtt and rig.two.rtt_smoothed == rig.two.rtt_min == pytest.approx(0.07)
    assert rig.two.probe_timeout(0.0) == rig.one.probe_timeout(0.0)
    assert (rig.two.in_flight, rig.two.outstanding) == (0, 0)


# probe timeout


def test_the_probe_timeout() -> None:
    rig = Rig()
    assert rig.one.probe_timeout(0.005) == pytest.approx(2 * INITIAL_RTT)
    rig.one.add_rtt(0.1, 0.0)
    assert rig.one.probe_timeout(0.005) == pytest.approx(0.1 + 4 * 0.05 + 0.005)
    assert rig.one.probe_timeout(0.0) == pytest.approx(0.3)


def test_the_back_off_doubles_and_ends() -> None:
    rig = Rig()
    rig.connection.configure(max_pto=MAX_PTO_INTERVAL)
    rig.one.add_rtt(0.02, 0.0)
    base, now = rig.one.probe_timeout(0.005), 1.0
    rig.send(rig.one, now)
    intervals = []
    for _ in range(200):
        due = rig.timer()
        assert due is not None
        intervals.append(due - now)
        now = due
        rig.at(now)
        rig.send(rig.one, now)
    assert rig.probes == rig.connection.pto_count == 200
    assert intervals[:4] == pytest.approx([base, 2 * base, 4 * base, 8 * base], abs=1e-5)
    assert max(intervals) == pytest.approx(intervals[-1]) == pytest.approx(MAX_PTO_INTERVAL)
    assert MAX_PTO_INTERVAL < 1.0


def test_the_cap_never_goes_below_one_probe_timeout() -> None:
    rig = Rig()
    rig.connection.configure(max_pto=MAX_PTO_INTERVAL)
    rig.one.add_rtt(1.0, 0.0)
    rig.send(rig.one, 5.0)
    rig.connection.pto_count = 3
    assert rig.timer() == pytest.approx(5.0 + rig.one.probe_timeout(0.005), abs=2e-6)


def test_an_acknowledgement_ends_the_back_off() -> None:
    rig = Rig()
    number = rig.send(rig.one, 1.0)
    for _ in range(5):
        due = rig.timer()
        assert due is not None
        rig.at(due)
    assert rig.connection.pto_count == 5
    rig.ack(9.0, number)
    assert rig.connection.pto_count == 0
    assert rig.timer() is None


def test_a_probe_timeout_does_not_spin_without_a_probe() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0)
    due = rig.timer()
    assert due is not None
    rig.at(due)
    later = rig.timer()
    assert later is not None and later > due + INITIAL_RTT


def test_only_the_active_path_arms_the_probe_timer() -> None:
    rig = Rig()
    rig.send(rig.two, 1.0)
    assert rig.timer() is None
    rig.connection.activate(rig.two)
    assert rig.timer() is not None


def test_nothing_is_probed_while_the_address_may_not_be_sent_to() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0)
    rig.one.limited = True
    assert rig.timer() is None
    rig.one.bytes_received = 100
    assert rig.timer() is not None


# acknowledgements that lie


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", FRAME_ENCODING_ERROR),
        (varint(3) + varint(0) + varint(0), FRAME_ENCODING_ERROR),
        (varint(3) + varint(0) + varint(0) + varint(4), FRAME_ENCODING_ERROR),
        (varint(9) + varint(0) + varint(1) + varint(0) + varint(0), FRAME_ENCODING_ERROR),
        (varint(9) + varint(0) + varint(1) + varint(9) + 2 * varint(0), FRAME_ENCODING_ERROR),
        (varint(9) + varint(0) + varint(1) + varint(8) + 2 * varint(0), FRAME_ENCODING_ERROR),
        (varint(9) + varint(0) + varint(1) + varint(0) + varint(0) + varint(8), 7),
        (varint(9) + varint(0) + varint(2**62 - 1) + varint(0), FRAME_ENCODING_ERROR),
        (varint(9) + varint(0) + varint(1) + varint(0) + varint(2**62 - 1) + varint(0), 7),
        (varint(9) + varint(0) + varint(1) + varint(0) + varint(0) + varint(2**62 - 1), 7),
        (varint(10) + varint(0) + varint(0) + varint(0), PROTOCOL_VIOLATION),
        (varint(2**62 - 1) + varint(0) + varint(0) + varint(2**62 - 1), PROTOCOL_VIOLATION),
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["in a packet", "behind a frame"])
def test_a_false_acknowledgement_closes(frame: bytes, code: int, inside: bool) -> None:
    rig = Rig()
    for _ in range(10):
        rig.send(rig.one, 1.0)
    if inside:
        rig.end.receive(rig.peer.craft(1, b"\x02" + frame), now=START + 1.1)
        if len(frame) < 3:
            return  # too short a packet to be protected
    else:
        assert rig.connection.ack_frame(rig.one, frame, False, START + 1.1) == -1
    assert rig.end.error(START + 1.1) == code
    assert rig.one.in_flight >= 0


def test_counts_of_congestion_marks_are_passed_over() -> None:
    rig = Rig()
    frame = ack([rig.send(rig.one, 1.0)]) + varint(1) + varint(2) + varint(70000)
    assert rig.connection.ack_frame(rig.one, frame + b"rest", True, START + 1.1) == len(frame)
    assert rig.connection.ack_frame(rig.one, frame[:-1], True, START + 1.1) == -1


def test_the_longest_delay_does_no_harm() -> None:
    rig = Rig()
    frame = varint(rig.send(rig.one, 1.0)) + varint(2**62 - 1) + varint(0) + varint(0)
    assert rig.connection.ack_frame(rig.one, frame, False, START + 1.1) == len(frame)
    assert rig.one.rtt_smoothed == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(20))
def test_any_acknowledgement_has_an_end(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig()
    for turn in range(300):
        for _ in range(rng.randrange(4)):
            rig.send(rng.choice([rig.one, rig.two]), 1.0 + turn / 1000)
        top = rig.connection.number
        small = [rng.choice([0, 1, 2, 3, top, max(0, top - 1), 63, 2**14]) for _ in range(14)]
        frame = b"".join(varint(rng.choice([value, rng.randrange(top + 2)])) for value in small)
        frame = frame[: rng.randrange(len(frame) + 1)]
        rig.connection.ack_frame(rig.one, frame, rng.random() < 0.2, START + 1.05 + turn / 1000)
        rig.look(1.05 + turn / 1000)
        for path in (rig.one, rig.two):
            assert 0 <= path.in_flight == SIZE * path.outstanding
    assert not set(rig.acked) & set(rig.lost)
    assert len(set(rig.acked)) == len(rig.acked) and len(set(rig.lost)) == len(rig.lost)


# window, pacing, memory


def test_the_window_is_never_exceeded_and_is_used() -> None:
    near, far = ends()
    near.path.set_rate(20_000, 0.0)
    sent = near.send(*[numbered(i, 1000) for i in range(100)], now=START)
    size = len(sent[0])
    assert near.path.in_flight == size * len(sent) == 20_000 // size * size
    assert near.connection.counters["window_blocked"] >= 1
    far.receive(*sent[:5], now=START + 0.01)
    answers = far.flush(START + 0.02)
    far.connection.handle_timer(START + 0.02)
    answers += [data for _, data in far.engine.take_sealed()]
    near.receive(*answers, now=START + 0.03)
    assert len(near.flush(START + 0.03)) == 5, "what was acknowledged makes room"
    assert near.path.in_flight <= 20_000
    near.path.set_rate(5_000, 0.0)
    assert near.flush(START + 0.03) == []


def test_one_packet_always_fits_an_empty_window() -> None:
    near, _ = ends()
    near.path.set_rate(0, 0.0)
    assert len(near.send(numbered(1, 1000), numbered(2, 1000), now=START)) == 1


@pytest.mark.parametrize("rate", [1e5, 1e6, 1e7, 1e8])
def test_the_pace_is_held(rate: float) -> None:
    near, _ = ends()
    near.path.set_rate(1 << 30, rate)
    seconds, now, total = 0.2, START, 0
    burst = max(3.0 * MTU, rate * 0.002)
    near.flush(now)
    while now < START + seconds:
        while near.lane.queue_packets < 200:
            near.lane.push(numbered(1, 1100), now)
        total += sum(map(len, near.flush(now)))
        assert total <= rate * (now - START) + burst + MTU
        timer = near.connection.get_timer()
        assert timer is not None and timer > now, "the pacer says when to go on"
        now = timer
        near.connection.handle_timer(now)
        near.reports(now)
    assert total >= 0.95 * rate * (now - START) - MTU


def test_thousands_of_packets_in_flight() -> None:
    near, far = ends()
    count = 6000
    sent = []
    for number in range(count):
        sent += near.send(numbered(number, 60), now=START + number * 1e-6)
    assert len(sent) == count and near.path.outstanding == count
    assert near.path.in_flight == sum(map(len, sent))
    came = far.receive(*sent, now=START + 0.05)
    assert numbers(came) == list(range(count))
    answers = [data for _, data in far.engine.take_sealed()]
    far.connection.handle_timer(START + 0.06)
    answers += [data for _, data in far.engine.take_sealed()]
    near.receive(*answers, now=START + 0.1)
    assert (near.path.in_flight, near.path.outstanding, near.path.lost) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_ring_grows_and_forgets_nothing(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig()
    sent = [rig.send(rng.choice([rig.one, rig.two]), 1.0 + n * 1e-6) for n in range(5000)]
    chosen = sorted(rng.sample(sent[:2000], 40))
    for number in chosen:
        rig.ack(1.02, number)
    lost = set(rig.lost)
    assert set(rig.acked) == set(chosen) - lost
    rig.ack(1.021, *sent)
    assert set(rig.acked) | set(rig.lost) == set(sent)
    assert set(rig.lost) == lost
    assert rig.one.in_flight == rig.two.in_flight == 0


def test_memory_for_packets_in_flight_is_bounded() -> None:
    rig = Rig()
    limit = 1 << 18
    with pytest.raises(MemoryError):
        while True:
            rig.send(rig.one, 1.0)
    assert limit - 8 <= rig.connection.number <= limit
    rig.end.lane.push(numbered(1), START + 1.0)
    assert rig.connection.seal(START + 1.0) == 0
    rig.ack(1.1, *range(1000))
    assert rig.connection.seal(START + 1.1) == 1


# what is acknowledged


def acknowledged(far: End, now: float) -> list[tuple[list[tuple[int, int]], bytes]]:
    """Ranges of the ACK frames this end has sealed, and what follows in the packet."""
    far.connection.handle_timer(now)
    found = []
    for _, data in far.engine.take_sealed():
        _, _, plain = far.seals.open(data)
        ranges, _, rest = read_ack(plain)
        found.append((ranges, rest))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_exactly_what_arrived_is_acknowledged(seed: int) -> None:
    rng = random.Random(seed)
    near, far = ends()
    arrived: set[int] = set()
    order = list(range(400))
    window = rng.choice([1, 4, 40])
    order.sort(key=lambda n: n + rng.random() * window)
    keep = rng.choice([1.0, 0.95, 0.5])
    now = START
    for number in order:
        now += 0.0001
        if rng.random() < keep:
            far.receive(near.craft(number, PING_FRAME), now=now)
            arrived.add(number)
        for ranges, _ in acknowledged(far, now):
            told = expand(ranges)
            assert told <= arrived
            assert len(ranges) <= 49
            assert max(told) == max(arrived)
            assert all(low > high + 1 for (low, _), (_, high) in pairwise(ranges))
    far.receive(near.craft(400, PING_FRAME), now=now)
    ((ranges, _),) = acknowledged(far, now + 0.01)
    arrived.add(400)
    told = expand(ranges)
    complete = {number for number in arrived if number >= min(told)}
    assert told == complete and (len(ranges) == 49 or told == arrived)


def test_acknowledgements_wait_a_millisecond() -> None:
    near, far = ends()
    far.receive(near.craft(0, PING_FRAME), now=START)
    assert far.engine.take_sealed() == []
    assert far.connection.get_timer() == pytest.approx(START + 0.001)
    assert acknowledged(far, START + 0.0009) == []
    ((ranges, _),) = acknowledged(far, START + 0.001)
    assert ranges == [(0, 0)]
    assert far.connection.get_timer() is None


def test_a_gap_is_reported_at_once() -> None:
    """RFC 9000 section 13.2.1."""
    near, far = ends()
    far.receive(near.craft(0, PING_FRAME), near.craft(2, PING_FRAME), now=START)
    assert [ranges for ranges, _ in acknowledged(far, START)] == [[(2, 2), (0, 0)]]
    far.receive(near.craft(1, PING_FRAME), now=START)
    assert [ranges for ranges, _ in acknowledged(far, START)] == [[(0, 2)]]


def test_many_packets_do_not_wait() -> None:
    near, far = ends()
    for number in range(32):
        assert not far.engine.take_sealed()
        far.receive(near.craft(number, PING_FRAME), now=START)
    assert len(far.engine.take_sealed()) == 1


def test_what_asks_for_no_answer_gets_none() -> None:
    near, far = ends()
    near.craft(0, PING_FRAME)
    frame = b"\x02" + varint(0) + varint(0) + varint(0) + varint(0)
    far.send(numbered(1), now=START)
    for number in (0, 5, 3):
        far.receive(near.craft(number, frame + bytes(8)), now=START)
        far.receive(near.craft(number, frame + bytes(8)), now=START)  # nor does a duplicate
    assert acknowledged(far, START + 1) == []


def test_the_delay_is_told() -> None:
    near, far = ends()
    far.receive(near.craft(0, PING_FRAME), now=START)
    far.connection.handle_timer(START + 0.004)
    ((_, data),) = far.engine.take_sealed()
    _, delay, _ = read_ack(far.seals.open(data)[2])
    assert delay << 3 == pytest.approx(4000, abs=8)


def test_acknowledged_acknowledgements_are_not_repeated_for_ever() -> None:
    """RFC 9000 section 13.2.4: a range is dropped when the peer has heard of it."""
    near, far = ends()
    rng = random.Random(7)
    now, number, most = START, 0, 0
    arrived: set[int] = set()
    for _ in range(400):
        for _ in range(20):
            if rng.random() < 0.97:
                far.receive(near.craft(number, PING_FRAME), now=now)
                arrived.add(number)
            number += 1
        now += 0.002
        far.connection.handle_timer(now)
        sealed = [data for _, data in far.engine.take_sealed()]
        if sealed:
            ranges, _, _ = read_ack(far.seals.open(sealed[-1])[2])
            most = max(most, max(arrived) - ranges[-1][0])
            newest = far.seals.open(sealed[-1])[0]
            # The peer acknowledges our acknowledgement.
            far.connection.ack_frame(far.path, ack([newest]), False, now)
    late = max(set(range(number)) - arrived - set(range(number - 400, number)))
    assert most <= LATE + 200
    far.receive(near.craft(late, PING_FRAME), now=now)
    ((ranges, _), *_) = acknowledged(far, now + 0.002)
    assert late in expand(ranges), "but what comes late is reported"


def test_one_in_so_many_acknowledgements_asks_for_an_answer() -> None:
    near, far = ends()
    pings = 0
    for number in range(300):
        far.receive(near.craft(number, PING_FRAME), now=START + number)
        for _, rest in acknowledged(far, START + number + 0.1):
            pings += rest == b"\x01"
    assert 1 <= pings <= 300 // 64


# over real connections

NEW = Address("192.0.2.9", 1000)


def test_a_packet_of_control_is_tracked_when_nothing_else_is_under_way() -> None:
    pair = Pair.established()
    client = pair.client.connection
    assert client.active.metrics.outstanding == 0
    client.nudge()
    pair.pump(pair.client)
    assert client.active.metrics.outstanding == 1
    pair.run(0.1)
    assert client.active.metrics.outstanding == 0
    assert not client._recovery._sent  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_frame_of_control_is_sent_again(lost: int) -> None:
    pair = Pair.established()
    gone: list[Flight] = []

    def fate(flight: Flight) -> list[float]:
        if flight.sender is pair.client and len(gone) < lost:
            gone.append(flight)
            return []
        return [pair.delay]

    pair.fate = fate
    pair.client.connection.send_stream_data(0, b"precious")
    pair.pump(pair.client)
    pair.run(3.0)
    data = [event.data for event in pair.server.events if hasattr(event, "data")]
    assert len(gone) == lost and data == [b"precious"]


def test_the_first_packets_are_acknowledged_without_delay() -> None:
    """Those that came while aioquic still had the packet number space."""
    pair = Pair()
    pair.dial()
    pair.run(1.0)
    for host in pair.hosts:
        answers = [f.at for f in pair.sent(host) if f.packet is not None and f.packet.has(ACK)]
        (came, *_) = [
            f.arrived[0] for f in pair.sent(pair.other(host)) if f.packet is not None and f.arrived
        ]
        assert answers[0] - came <= 0.005


def test_control_alone_says_nothing_about_the_rate_of_a_path() -> None:
    pair = Pair.established()
    client = pair.client.connection
    window = client.active.metrics.window
    for turn in range(200):
        client.send_stream_data(0, bytes([turn]))
        pair.pump(pair.client)
        pair.run(0.05)
    assert client.active.metrics.window >= window
    assert client.active.metrics.pacing_rate == 0.0 or client.active.metrics.pacing_rate > 1e6


def test_a_control_frame_lost_with_the_dead_path_is_sent_again_after_the_switch() -> None:
    pair = Pair.established()
    pair.exchange()
    pair.fate = lambda flight: [] if flight.source.host == "192.0.2.1" else [pair.delay]
    pair.client.connection.send_stream_data(0, b"precious")
    pair.pump(pair.client)
    pair.run(0.001)
    pair.move(pair.client, NEW)
    pair.run(0.05)
    data = [event.data for event in pair.server.events if hasattr(event, "data")]
    assert data == [b"precious"]


def test_losses_on_one_path_leave_the_next_alone() -> None:
    pair = Pair.established()
    pair.exchange()
    pair.fate = lambda flight: [] if flight.source.host == "192.0.2.1" else [pair.delay]
    pair.send(pair.client, *[numbered(i, 1000) for i in range(20)])
    pair.run(0.001)
    pair.move(pair.client, NEW)
    metrics = pair.client.connection.active.metrics
    pair.fate = None
    pair.stream(pair.client, 100)
    pair.run(1.0)
    assert metrics.lost == 0
    assert pair.server.of(PeerMoved)


def test_two_paths_in_turn_look_like_no_loss() -> None:
    """Challenges and answers on a slow backup interleave with data, and no data is 'lost'."""
    pair = Pair.established()
    pair.exchange()
    client = pair.client.connection
    pair.client.nat[NEW] = NEW
    slow = 0.08

    def fate(flight: Flight) -> list[float]:
        return [slow if NEW in (flight.source, flight.target) else pair.delay]

    pair.fate = fate

    def ask() -> None:
        client.probe(client.active.addr._replace(local=NEW), pair.now)
        pair.pump(pair.client)

    pair.stream(pair.client, 100)
    for turn in range(10):
        pair.after(turn * 0.05, ask)
    pair.run(1.0)
    assert client.active.metrics.lost == 0
    assert pair.server.connection.active.metrics.lost == 0
    assert client.active.metrics.rtt_smoothed < 0.03
    assert any(f.packet and f.source == NEW and not f.packet.has(PING) for f in pair.log)
