"""The window and the pacer of one path."""

from __future__ import annotations

import itertools

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch
from hypothesis import given
from hypothesis import strategies as st

from tunnel.quic.congestion import (
    INITIAL_WINDOW_PACKETS,
    LOSS_REDUCTION,
    MAX_WINDOW_BYTES,
    MINIMUM_WINDOW_PACKETS,
    PACING_BURST_PACKETS,
    PACING_GAIN,
    Pacer,
    WindowController,
)

SIZE = 1200
_numbers = itertools.count()


def packet(sent_time: float = 0.0, size: int = SIZE) -> QuicSentPacket:
    return QuicSentPacket(
        epoch=Epoch.ONE_RTT,
        in_flight=True,
        is_ack_eliciting=True,
        is_crypto_packet=False,
        packet_number=next(_numbers),
        packet_type=QuicPacketType.ONE_RTT,
        sent_time=sent_time,
        sent_bytes=size,
    )


def window() -> WindowController:
    return WindowController(max_datagram_size=SIZE)


def fill(cc: WindowController, at: float = 0.0) -> list[QuicSentPacket]:
    """Send until the window is full."""
    sent = []
    while cc.bytes_in_flight + SIZE <= cc.congestion_window:
        sent.append(packet(at))
        cc.on_packet_sent(packet=sent[-1])
    return sent


def test_it_starts_with_the_initial_window() -> None:
    assert window().congestion_window == INITIAL_WINDOW_PACKETS * SIZE
    assert len(fill(window())) == INITIAL_WINDOW_PACKETS


def test_bytes_in_flight_go_by_every_exit() -> None:
    cc = window()
    one, two, three = packet(), packet(size=700), packet(size=300)
    for each in (one, two, three):
        cc.on_packet_sent(packet=each)
    assert cc.bytes_in_flight == 2200
    cc.on_packet_acked(now=1.0, packet=one)
    assert cc.bytes_in_flight == 1000
    cc.on_packets_lost(now=1.0, packets=[two])
    assert cc.bytes_in_flight == 300
    cc.on_packets_expired(packets=[three])
    assert cc.bytes_in_flight == 0


def test_slow_start_doubles_a_window_that_is_the_limit() -> None:
    cc = window()
    before = cc.congestion_window
    for each in fill(cc):
        cc.on_packet_acked(now=0.1, packet=each)
        fill(cc, at=0.1)
    assert cc.congestion_window == 2 * before


def test_a_window_that_is_no_limit_does_not_grow() -> None:
    cc = window()
    for number in range(100):
        each = packet(float(number))
        cc.on_packet_sent(packet=each)
        cc.on_packet_acked(now=number + 0.5, packet=each)
    assert cc.congestion_window == INITIAL_WINDOW_PACKETS * SIZE


def test_one_reduction_a_round_trip() -> None:
    cc = window()
    before = cc.congestion_window
    sent = fill(cc, at=1.0)
    cc.on_packets_lost(now=1.1, packets=sent[:2])
    assert cc.congestion_window == int(before * LOSS_REDUCTION) == cc.ssthresh
    cc.on_packets_lost(now=1.12, packets=sent[2:4])
    assert cc.congestion_window == int(before * LOSS_REDUCTION)
    later = packet(1.2)
    cc.on_packet_sent(packet=later)
    cc.on_packets_lost(now=1.3, packets=[later])
    assert cc.congestion_window == int(int(before * LOSS_REDUCTION) * LOSS_REDUCTION)


def test_no_growth_for_packets_from_before_the_loss() -> None:
    cc = window()
    sent = fill(cc, at=1.0)
    cc.on_packets_lost(now=1.1, packets=sent[:1])
    reduced = cc.congestion_window
    for each in sent[1:10]:
        cc.on_packet_acked(now=1.15, packet=each)
    assert cc.congestion_window == reduced


def test_congestion_avoidance_adds_a_packet_a_window() -> None:
    cc = window()
    cc.on_packets_lost(now=0.0, packets=[])
    cc.ssthresh = cc.congestion_window
    before = cc.congestion_window
    for each in fill(cc, at=1.0)[: INITIAL_WINDOW_PACKETS // 2]:
        cc.on_packet_acked(now=1.1, packet=each)
    assert cc.congestion_window == before
    for each in fill(cc, at=1.2)[: INITIAL_WINDOW_PACKETS // 2]:
        cc.on_packet_acked(now=1.3, packet=each)
    assert cc.congestion_window == before + SIZE


def test_the_window_has_a_floor_and_a_ceiling() -> None:
    cc = window()
    for number in range(50):
        lost = packet(float(number))
        cc.on_packet_sent(packet=lost)
        cc.on_packets_lost(now=number + 0.5, packets=[lost])
    assert cc.congestion_window == MINIMUM_WINDOW_PACKETS * SIZE
    cc = window()
    at = 0.0
    for _ in range(20):
        at += 1.0
        for each in fill(cc, at):
            cc.on_packet_acked(now=at + 0.1, packet=each)
    assert cc.congestion_window == MAX_WINDOW_BYTES


def test_an_outage_does_not_shrink_the_window() -> None:
    cc = window()
    cc.on_persistent_congestion()
    assert cc.congestion_window == INITIAL_WINDOW_PACKETS * SIZE


# the pacer


def test_no_pacing_before_the_rate_is_known() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    for _ in range(1000):
        assert pacer.next_send_time(5.0) is None
        pacer.update_after_send(5.0)


def burst(pacer: Pacer, now: float) -> int:
    count = 0
    while pacer.next_send_time(now) is None:
        pacer.update_after_send(now)
        count += 1
        assert count < 100_000
    return count


def test_a_burst_then_the_rate() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(32 * SIZE, 0.1)
    assert burst(pacer, 10.0) == PACING_BURST_PACKETS
    due = pacer.next_send_time(10.0)
    rate = PACING_GAIN * 32 / 0.1  # packets a second
    assert due == pytest.approx(10.0 + 1 / rate)
    assert due is not None and pacer.next_send_time(due + 1e-9) is None


@given(st.floats(0.001, 1.0), st.integers(4, 1000))
def test_no_more_than_the_rate_in_the_long_run(rtt: float, packets: int) -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(packets * SIZE, rtt)
    rate = PACING_GAIN * packets / rtt
    first = burst(pacer, 1.0)
    sent, now = 0, 1.0
    for _ in range(200):
        due = pacer.next_send_time(now)
        assert due is None or due >= now
        now = max(now, due or now)
        sent += burst(pacer, now)
    assert sent <= rate * (now - 1.0) + 1 + first
    assert sent >= rate * (now - 1.0) * 0.99 - first - 1


def test_small_packets_cost_what_they_weigh() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(32 * SIZE, 0.1)
    count = 0
    while pacer.next_send_time(10.0) is None:
        pacer.update_after_send(10.0)
        pacer.charge(100)
        count += 1
    assert count == pytest.approx(PACING_BURST_PACKETS * SIZE / 100, rel=0.1)


def test_a_probe_that_nobody_announced_is_charged_too() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(32 * SIZE, 0.1)
    for _ in range(PACING_BURST_PACKETS // 2):
        assert pacer.next_send_time(10.0) is None
        pacer.charge(SIZE)
    assert burst(pacer, 10.0) == PACING_BURST_PACKETS // 2


def test_idle_time_buys_one_burst_only() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(32 * SIZE, 0.1)
    burst(pacer, 10.0)
    assert burst(pacer, 1000.0) == PACING_BURST_PACKETS


def test_a_slower_rate_takes_the_surplus_away() -> None:
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(2_000_000, 0.001)
    pacer.update_rate(4 * SIZE, 1.0)
    assert burst(pacer, 1.0) <= PACING_BURST_PACKETS


@given(st.floats(0.0001, 1.0), st.floats(0, 1e6), st.integers(4, 1000))
def test_the_promised_time_is_enough(rtt: float, start: float, packets: int) -> None:
    """A timer set to it must not find that a hair is missing: it would be set to now, for ever."""
    pacer = Pacer(max_datagram_size=SIZE)
    pacer.update_rate(packets * SIZE, rtt)
    now = start
    for _ in range(20):
        burst(pacer, now)
        wakeups = 0
        while (due := pacer.next_send_time(now)) is not None:
            assert due > now
            now = due
            wakeups += 1
        assert 1 <= wakeups <= 3  # a float's grain may be missing once
