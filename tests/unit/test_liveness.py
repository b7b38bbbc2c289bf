"""When silence makes a path suspect."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.path.liveness import (
    SUSPECT_FLOOR,
    UNMEASURED_FLOOR,
    UNMEASURED_ROUND_TRIPS,
    suspect_deadline,
)


def deadline(rtt: float, variance: float, delay: float = 0.005) -> float:
    return suspect_deadline(
        has_rtt=True, expected_rtt=9.0, rtt_smoothed=rtt, rtt_variance=variance, max_ack_delay=delay
    )


@pytest.mark.parametrize(
    ("rtt", "variance", "delay", "seconds"),
    [
        (0.020, 0.001, 0.005, 0.034),  # 1.25 RTT + 4 rttvar + max_ack_delay
        (0.100, 0.010, 0.025, 0.190),
        (0.0002, 0.0001, 0.005, SUSPECT_FLOOR),
    ],
)
def test_the_formula(rtt: float, variance: float, delay: float, seconds: float) -> None:
    assert deadline(rtt, variance, delay) == pytest.approx(seconds)


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 1))
def test_never_sooner_than_an_answer_can_come(rtt: float, variance: float, delay: float) -> None:
    assert deadline(rtt, variance, delay) >= max(rtt + delay, 0.015)


@pytest.mark.parametrize(
    ("expected", "seconds"),
    [
        (0.1, UNMEASURED_ROUND_TRIPS * 0.1 + 0.005),
        (0.001, UNMEASURED_FLOOR),
    ],
)
def test_a_path_never_measured_is_judged_by_the_one_before(expected: float, seconds: float) -> None:
    found = suspect_deadline(
        has_rtt=False,
        expected_rtt=expected,
        rtt_smoothed=9.0,
        rtt_variance=9.0,
        max_ack_delay=0.005,
    )
    assert found == pytest.approx(seconds)
    assert found >= 2 * expected
