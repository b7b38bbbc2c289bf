"""The alarm on the real clock, the jump detector on made-up times."""

import select
from collections.abc import Iterator
from math import inf

import pytest

from tunnel.shell import clock
from tunnel.shell.clock import HEARTBEAT, STOPPED_AFTER, Alarm, JumpDetector


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    yield made
    made.close()


def fired(alarm: Alarm, seconds: float) -> bool:
    return bool(select.select([alarm.fileno()], [], [], seconds)[0])


def test_alarm_fires_at_its_deadline_and_not_before(alarm: Alarm) -> None:
    deadline = clock.now() + 0.01
    alarm.arm(deadline)
    assert alarm.deadline == deadline
    assert fired(alarm, 1)
    assert clock.now() >= deadline
    alarm.acknowledge()
    assert alarm.deadline == inf
    assert not fired(alarm, 0)


@pytest.mark.parametrize("deadline", [-1.0, 0.0, 1e-12])
def test_a_deadline_in_the_past_fires_at_once(alarm: Alarm, deadline: float) -> None:
    alarm.arm(deadline)
    assert fired(alarm, 1)


def test_alarm_can_be_moved_and_disarmed(alarm: Alarm) -> None:
    alarm.arm(clock.now() - 1)
    alarm.arm(clock.now() + 60)
    assert not fired(alarm, 0)
    alarm.arm(clock.now() - 1)
    alarm.arm(inf)
    assert not fired(alarm, 0)


def test_acknowledging_an_alarm_that_has_not_fired_keeps_it_armed(alarm: Alarm) -> None:
    deadline = clock.now() + 60
    alarm.arm(deadline)
    alarm.acknowledge()
    assert alarm.deadline == deadline


def test_ordinary_wake_ups_are_no_jumps() -> None:
    jumps = JumpDetector(1000.0, 900.0)
    assert jumps.observe(1000.5, 900.5, 1000.5) is None
    assert jumps.observe(1001.0, 901.0, inf) is None
    assert jumps.observe(1001.9, 901.9, 1001.0) is None  # late, but only as a busy machine is


def test_suspend_is_noticed_once_with_its_length() -> None:
    jumps = JumpDetector(1000.0, 900.0)
    assert jumps.observe(1060.5, 900.5, inf) == pytest.approx(60)
    assert jumps.observe(1060.6, 900.6, inf) is None


def test_a_stopped_process_is_noticed_by_its_late_alarm() -> None:
    jumps = JumpDetector(1000.0, 900.0)
    assert jumps.observe(1030.0, 930.0, 1000.8) == pytest.approx(29.2)


def test_every_stop_of_more_than_two_seconds_is_noticed() -> None:
    """The alarm is due within HEARTBEAT when a stop begins."""
    assert HEARTBEAT + STOPPED_AFTER <= 2
    jumps = JumpDetector(1000.0, 900.0)
    stop = 2.001
    assert jumps.observe(1000.0 + stop, 900.0 + stop, 1000.0 + HEARTBEAT) is not None
