"""Loss detection and RTT: everything of a path stays with the path."""

from __future__ import annotations

import logging

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.tls import Epoch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.quic_pair import PING, Flight, Pair
from tunnel.path.network import Address
from tunnel.quic.events import PeerMoved
from tunnel.quic.recovery import (
    GRANULARITY,
    MAX_PTO_INTERVAL,
    PACKET_THRESHOLD,
    TIME_THRESHOLD,
    PathMetrics,
    Recovery,
)

SIZE = 1200
INITIAL_RTT = 0.1
ACKED, LOST = QuicDeliveryState.ACKED, QuicDeliveryState.LOST


class Rig:
    """A recovery object with two paths, and what its packets were told."""

    def __init__(self) -> None:
        self.one, self.two = self.path(), self.path()
        self.probes = 0
        self.confirmed: list[int] = []
        self.told: list[tuple[int, QuicDeliveryState]] = []
        self.space = QuicPacketSpace(is_application_data=True)
        self.handshake = QuicPacketSpace()
        self.recovery = Recovery(
            first=self.one,
            peer_completed_address_validation=True,
            send_probe=self._probe,
            on_acknowledged=self.confirmed.append,
            logger=logging.LoggerAdapter(logging.getLogger("quic"), {}),
            quic_logger=None,
        )
        self.recovery.paths.append(self.two)
        self.recovery.spaces = [self.handshake, self.space]
        self.recovery.handshake_confirmed = True
        self.recovery.max_ack_delay = 0.005
        self._number = 0

    @staticmethod
    def path() -> PathMetrics:
        return PathMetrics(max_datagram_size=SIZE, initial_rtt=INITIAL_RTT)

    def _probe(self) -> None:
        self.probes += 1

    def send(
        self,
        path: PathMetrics,
        now: float,
        *,
        eliciting: bool = True,
        crypto: bool = False,
        space: QuicPacketSpace | None = None,
    ) -> int:
        number, self._number = self._number, self._number + 1
        packet = QuicSentPacket(
            epoch=Epoch.ONE_RTT,
            in_flight=eliciting,
            is_ack_eliciting=eliciting,
            is_crypto_packet=crypto,
            packet_number=number,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=now,
            sent_bytes=SIZE,
        )

        def told(delivery: QuicDeliveryState, which: int) -> None:
            self.told.append((which, delivery))

        packet.delivery_handlers.append((told, (number,)))
        self.recovery.sending = path
        self.recovery.on_packet_sent(packet=packet, space=space or self.space)
        return number

    def ack(
        self,
        now: float,
        *numbers: int,
        delay: float = 0.0,
        space: QuicPacketSpace | None = None,
    ) -> None:
        ranges = RangeSet()
        for number in numbers:
            ranges.add(number)
        self.recovery.on_ack_received(
            ack_rangeset=ranges, ack_delay=delay, now=now, space=space or self.space
        )

    def lost(self) -> list[int]:
        return [number for number, delivery in self.told if delivery is LOST]

    def timer(self) -> float | None:
        return self.recovery.get_loss_detection_time(amplification_limited=False)


# packet threshold


def test_three_later_packets_make_a_loss_and_two_do_not() -> None:
    rig = Rig()
    numbers = [rig.send(rig.one, 1.0) for _ in range(4)]
    rig.ack(1.01, numbers[2])
    assert rig.lost() == []
    rig.ack(1.011, numbers[3])
    assert rig.lost() == [numbers[0]]
    assert PACKET_THRESHOLD == 3
    assert rig.one.lost == 1


def test_numbers_of_another_path_leave_no_gap() -> None:
    """Packets 0, 4, 8... here and the rest there: acknowledging there loses nothing here."""
    rig = Rig()
    here, there = [], []
    for index in range(40):
        if index % 4:
            there.append(rig.send(rig.two, 1.0))
        else:
            here.append(rig.send(rig.one, 1.0))
    rig.ack(1.01, *there)
    assert rig.lost() == []
    rig.ack(1.012, here[2])
    assert rig.lost() == []
    rig.ack(1.013, here[3])
    assert rig.lost() == [here[0]]
    assert (rig.one.lost, rig.two.lost) == (1, 0)


def test_a_path_judges_by_its_own_order_only() -> None:
    rig = Rig()
    first = rig.send(rig.one, 1.0)
    filler = [rig.send(rig.two, 1.0) for _ in range(50)]
    second = rig.send(rig.one, 1.0)
    rig.ack(1.01, second, *filler)
    assert rig.lost() == [], "only one packet of this path overtook it"
    rig.ack(1.011, first)
    assert rig.one.outstanding == 0


# time threshold


def test_the_time_threshold() -> None:
    rig = Rig()
    rig.one.add_rtt(0.1, 0.0, 0.5)
    first, second = rig.send(rig.one, 1.0), rig.send(rig.one, 1.01)
    rig.ack(1.11, second)
    assert rig.lost() == []
    due = rig.timer()
    assert due == pytest.approx(1.0 + TIME_THRESHOLD * 0.1)
    assert due is not None
    assert rig.one.detect_loss(due - 0.001) == []
    rig.recovery.on_loss_detection_timeout(now=due)
    assert rig.lost() == [first]
    assert rig.timer() is None


@given(st.floats(1, 1e6), st.floats(0.001, 1.0), st.floats(0.0, 0.001))
def test_the_loss_timer_is_enough(start: float, rtt: float, later: float) -> None:
    """A timer set to it must not find that a hair is missing: it would be set to now, for ever."""
    rig = Rig()
    first, second = rig.send(rig.one, start), rig.send(rig.one, start + later)
    rig.ack(start + later + rtt, second)
    due = rig.timer()
    if due is not None:  # otherwise it was lost at once
        rig.recovery.on_loss_detection_timeout(now=due)
    assert rig.lost() == [first]


def test_a_loss_timer_is_no_probe_timeout() -> None:
    rig = Rig()
    rig.one.add_rtt(0.1, 0.0, 0.5)
    rig.send(rig.one, 1.0)
    second = rig.send(rig.one, 1.01)
    rig.ack(1.11, second)
    due = rig.timer()
    assert due is not None
    rig.recovery.on_loss_detection_timeout(now=due)
    assert (rig.recovery.pto_count, rig.probes) == (0, 0)


def test_the_time_threshold_of_a_tiny_rtt_is_the_granularity() -> None:
    rig = Rig()
    rig.one.add_rtt(0.0001, 0.0, 0.5)
    rig.send(rig.one, 1.0)
    second = rig.send(rig.one, 1.0)
    rig.ack(1.0001, second)
    assert rig.timer() == pytest.approx(1.0 + GRANULARITY)


def test_what_is_newer_than_any_acknowledged_packet_is_not_lost() -> None:
    rig = Rig()
    rig.one.add_rtt(0.1, 0.0, 0.5)
    first = rig.send(rig.one, 1.0)
    rig.send(rig.one, 1.0)
    rig.ack(9.0, first)
    assert rig.lost() == []
    assert rig.one.loss_time is None


def test_a_quick_path_does_not_hurry_a_slow_one() -> None:
    """Each path waits 9/8 of its own round trip."""
    rig = Rig()
    rig.one.add_rtt(0.01, 0.0, 0.5)
    rig.two.add_rtt(0.3, 0.0, 0.5)
    slow = [rig.send(rig.two, 1.0) for _ in range(2)]
    rig.ack(1.02, rig.send(rig.one, 1.01))
    assert rig.lost() == []
    rig.ack(1.3, slow[1])
    assert rig.lost() == []
    assert rig.timer() == pytest.approx(1.0 + TIME_THRESHOLD * 0.3)


# RTT


def test_rtt_goes_to_the_path_of_the_newest_packet() -> None:
    rig = Rig()
    old = rig.send(rig.one, 1.0)
    new = rig.send(rig.two, 1.2)
    rig.recovery.arriving = rig.two
    rig.ack(1.25, old, new)
    assert not rig.one.has_rtt
    assert rig.two.rtt_latest == pytest.approx(0.05)


def test_an_acknowledgement_that_took_another_way_back_measures_nothing() -> None:
    rig = Rig()
    rig.recovery.arriving = rig.one
    rig.ack(1.25, rig.send(rig.two, 1.0))
    assert not rig.two.has_rtt
    assert rig.two.outstanding == 0
    rig.recovery.arriving = rig.two
    rig.ack(2.25, rig.send(rig.one, 2.0))
    assert rig.one.rtt_latest == pytest.approx(0.25), "but the active path is always measured"


def test_rtt_formulas_of_rfc_9002() -> None:
    path = Rig.path()
    path.add_rtt(0.1, 0.02, 1.0)  # the first sample: nothing to subtract from
    assert (path.rtt_smoothed, path.rtt_variance) == (0.1, 0.05)
    path.add_rtt(0.2, 0.02, 2.0)
    assert path.rtt_variance == pytest.approx(0.05 * 3 / 4 + 0.08 / 4)
    assert path.rtt_smoothed == pytest.approx(0.1 * 7 / 8 + 0.18 / 8)
    assert path.rtt_min == 0.1


def test_the_peers_delay_counts_up_to_what_it_announced() -> None:
    rig = Rig()
    rig.one.add_rtt(0.1, 0.0, 0.5)
    rig.ack(1.2, rig.send(rig.one, 1.0), delay=0.15)
    assert rig.one.rtt_smoothed == pytest.approx(0.1 * 7 / 8 + (0.2 - 0.005) / 8)


def test_acknowledgements_of_acknowledgements_measure_nothing() -> None:
    rig = Rig()
    rig.ack(1.5, rig.send(rig.one, 1.0, eliciting=False))
    assert not rig.one.has_rtt


# bytes in flight, progress


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_bytes_in_flight_stay_with_the_path(choices: list[tuple[bool, bool]]) -> None:
    rig = Rig()
    sent = [(rig.send(rig.one if first else rig.two, 1.0), first) for first, _ in choices]
    for (number, _), (_, acked) in zip(sent, choices, strict=True):
        if acked:
            rig.ack(1.01, number)
    for path in (rig.one, rig.two):
        tracked = list(path.sent.values())
        assert path.cc.bytes_in_flight == SIZE * len(tracked)
        assert path.outstanding == len(tracked)
    assert len(rig.told) == len({number for number, _ in rig.told})


def test_waiting_since_the_first_unanswered_packet() -> None:
    rig = Rig()
    first = rig.send(rig.one, 1.0)
    second = rig.send(rig.one, 1.3)
    assert rig.one.waiting_since == 1.0
    rig.ack(1.4, first)
    seen = [(rig.one.waiting_since, rig.one.last_progress_at)]
    rig.ack(1.5, second)
    seen.append((rig.one.waiting_since, rig.one.last_progress_at))
    rig.send(rig.one, 2.0, eliciting=False)
    rig.ack(2.1, first)
    seen.append((rig.one.waiting_since, rig.one.last_progress_at))
    assert seen == [(1.4, 1.4), (None, 1.5), (None, 1.5)], "an old acknowledgement is no progress"


def test_progress_elsewhere_is_no_progress_here() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0)
    rig.ack(1.1, rig.send(rig.two, 1.05))
    assert (rig.one.waiting_since, rig.one.last_progress_at) == (1.0, 0.0)


def test_acknowledged_numbers_are_reported_for_key_updates() -> None:
    rig = Rig()
    numbers = [rig.send(rig.one, 1.0) for _ in range(3)]
    rig.ack(1.1, numbers[0], numbers[2])
    rig.ack(1.2, numbers[0], numbers[2])
    assert rig.confirmed == [numbers[2]]


def test_forgiven_packets_leave_the_window_but_still_count_as_delivered() -> None:
    rig = Rig()
    number = rig.send(rig.one, 1.0)
    rig.one.forgive()
    assert rig.one.cc.bytes_in_flight == 0
    rig.ack(1.1, number)
    assert rig.one.cc.bytes_in_flight == 0
    assert rig.told == [(number, ACKED)]


def test_losses_of_forgiven_packets_shrink_no_window() -> None:
    rig = Rig()
    before = rig.one.cc.congestion_window
    for _ in range(4):
        rig.send(rig.one, 1.0)
    rig.one.forgive()
    rig.ack(1.1, rig.send(rig.one, 1.05))
    assert len(rig.lost()) == 4
    assert (rig.one.cc.bytes_in_flight, rig.one.cc.congestion_window) == (0, before)


def test_acknowledgements_cost_no_pacing() -> None:
    """They are not congestion controlled (RFC 9002 section 2)."""
    rig = Rig()
    pacer = rig.one.pacer
    pacer.update_rate(32 * SIZE, 0.1)
    assert pacer.next_send_time(1.0) is None
    for _ in range(100):
        pacer.update_after_send(1.0)
        rig.send(rig.one, 1.0, eliciting=False)
    assert pacer.next_send_time(1.0) is None


# probe timeout


def test_the_probe_timeout() -> None:
    rig = Rig()
    assert rig.recovery.get_probe_timeout() == 2 * INITIAL_RTT
    rig.one.add_rtt(0.1, 0.0, 0.5)
    assert rig.recovery.get_probe_timeout() == pytest.approx(0.1 + 4 * 0.05 + 0.005)
    assert rig.recovery.get_probe_timeout(include_max_ack_delay=False) == pytest.approx(0.3)


def test_the_back_off_doubles_and_ends() -> None:
    rig = Rig()
    rig.one.add_rtt(0.02, 0.0, 0.5)
    base = rig.recovery.get_probe_timeout()
    now = 1.0
    rig.send(rig.one, now)
    intervals = []
    for _ in range(200):
        due = rig.timer()
        assert due is not None
        intervals.append(due - now)
        rig.recovery.on_loss_detection_timeout(now=due)
        now = due
        rig.send(rig.one, now)
    assert rig.probes == rig.recovery.pto_count == 200
    assert intervals[:4] == pytest.approx([base, 2 * base, 4 * base, 8 * base])
    assert max(intervals) == intervals[-1] == pytest.approx(MAX_PTO_INTERVAL)
    assert MAX_PTO_INTERVAL < 1.0


def test_the_cap_never_goes_below_one_probe_timeout() -> None:
    rig = Rig()
    rig.one.add_rtt(1.0, 0.0, 0.5)
    rig.send(rig.one, 5.0)
    for _ in range(3):
        rig.recovery.on_loss_detection_timeout(now=5.0)
    assert rig.timer() == pytest.approx(5.0 + rig.recovery.get_probe_timeout())


def test_an_acknowledgement_ends_the_back_off() -> None:
    rig = Rig()
    number = rig.send(rig.one, 1.0)
    for _ in range(5):
        rig.recovery.on_loss_detection_timeout(now=2.0)
    rig.ack(2.1, number)
    assert rig.recovery.pto_count == 0
    assert rig.timer() is None


def test_only_the_active_path_arms_the_probe_timer() -> None:
    rig = Rig()
    rig.send(rig.two, 1.0)
    assert rig.timer() is None
    rig.recovery.active = rig.two
    assert rig.timer() is not None


def test_nothing_is_probed_while_the_address_may_not_be_sent_to() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0)
    assert rig.recovery.get_loss_detection_time(amplification_limited=True) is None


def test_a_probe_timeout_sends_the_oldest_frames_again() -> None:
    rig = Rig()
    numbers = [rig.send(rig.one, 1.0) for _ in range(3)]
    rig.recovery.on_loss_detection_timeout(now=2.0)
    assert rig.lost() == [numbers[0]]
    assert rig.one.outstanding == 3, "it may still be acknowledged"
    rig.recovery.on_loss_detection_timeout(now=3.0)
    assert rig.lost() == numbers[:2], "each time the oldest that was not sent again"


def test_crypto_data_is_sent_again_as_a_whole() -> None:
    rig = Rig()
    rig.recovery.handshake_confirmed = False
    numbers = [rig.send(rig.one, 1.0, crypto=True, space=rig.handshake) for _ in range(3)]
    rig.recovery.on_loss_detection_timeout(now=2.0)
    assert rig.lost() == numbers
    assert rig.one.cc.bytes_in_flight == 0


# migration


def test_frames_of_the_left_path_are_scheduled_again_once() -> None:
    rig = Rig()
    number = rig.send(rig.one, 1.0)
    plain = rig.send(rig.one, 1.0, eliciting=False)
    other = rig.send(rig.two, 1.0)
    rig.recovery.requeue_frames(rig.one)
    rig.recovery.requeue_frames(rig.one)
    assert rig.lost() == [number]
    assert plain in rig.one.sent and other in rig.two.sent
    rig.ack(1.2, number)
    assert rig.one.outstanding == 0
    assert rig.told == [(number, LOST)], "what was sent again is not told twice"


def test_inheriting_takes_window_and_rtt() -> None:
    rig = Rig()
    rig.one.add_rtt(0.07, 0.0, 1.0)
    rig.one.cc.congestion_window, rig.one.cc.ssthresh = 99_000, 88_000
    rig.send(rig.one, 1.0)
    rig.two.inherit(rig.one)
    assert (rig.two.cc.congestion_window, rig.two.cc.ssthresh) == (99_000, 88_000)
    assert (rig.two.has_rtt, rig.two.rtt_smoothed, rig.two.rtt_min) == (True, 0.07, 0.07)
    assert rig.two.probe_timeout(0.0) == rig.one.probe_timeout(0.0)
    assert (rig.two.cc.bytes_in_flight, rig.two.outstanding) == (0, 0)


def test_a_forgotten_path_gives_its_frames_back() -> None:
    rig = Rig()
    number = rig.send(rig.two, 1.0)
    rig.recovery.forget(rig.two)
    assert rig.lost() == [number]
    assert rig.recovery.paths == [rig.one]


def test_a_discarded_space_leaves_nothing_behind() -> None:
    rig = Rig()
    rig.send(rig.one, 1.0, space=rig.handshake)
    kept = rig.send(rig.one, 1.0)
    rig.recovery.pto_count = 3
    rig.recovery.discard_space(rig.handshake)
    assert list(rig.one.sent) == [kept]
    assert (rig.one.cc.bytes_in_flight, rig.one.outstanding) == (SIZE, 1)
    assert rig.one.outstanding_handshake == 0
    assert rig.recovery.pto_count == 0


# over real connections

NEW = Address("192.0.2.9", 1000)


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


def test_losses_on_one_path_leave_the_window_of_the_next_alone() -> None:
    pair = Pair.established()
    pair.exchange()
    pair.fate = lambda flight: [] if flight.source.host == "192.0.2.1" else [pair.delay]
    pair.send(pair.client, *[bytes([0x45]) * 1000] * 20)
    pair.run(0.001)
    pair.move(pair.client, NEW)
    metrics = pair.client.connection.active.metrics
    before = metrics.cc.congestion_window
    pair.fate = None
    pair.stream(pair.client, 100)
    pair.run(1.0)
    assert metrics.cc.congestion_window >= before
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
    window = client.active.metrics.cc.congestion_window
    pair.run(1.0)
    assert client.active.metrics.lost == 0
    assert pair.server.connection.active.metrics.lost == 0
    assert client.active.metrics.cc.congestion_window >= window
    assert client.active.metrics.rtt_smoothed < 0.03
    assert any(f.packet and f.source == NEW and not f.packet.has(PING) for f in pair.log)
