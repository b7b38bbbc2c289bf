"""When the active path is suspect: acknowledgement truth, scaled to the round trip.

Suspicion moves nothing. It only starts questions on other paths; a wrong one costs a few packets.
"""

SUSPECT_FLOOR = 0.015
"""Seconds; below this the scheduling noise of two ordinary hosts looks like silence."""
UNMEASURED_ROUND_TRIPS = 3
UNMEASURED_FLOOR = 0.05
"""Seconds, and round trips of the path before, to wait on a path that was never measured."""
HOLD_AFTER = 1.0
"""Seconds without any acknowledgement after which the tunnel says that it holds, and a dialler
also tries a fresh handshake: the other process may have restarted."""
NAT_KEEPALIVE = 15.0
"""Seconds; RFC 4787 requires UDP mappings to live 2 minutes, many live 30 s, few less than 20."""


def suspect_deadline(
    *,
    has_rtt: bool,
    expected_rtt: float,
    rtt_smoothed: float,
    rtt_variance: float,
    max_ack_delay: float,
) -> float:
    """Seconds without acknowledgement progress, data outstanding, that make a path suspect.

    `expected_rtt` is a guess for a path without measurement: that of the path before it.
    """
    if not has_rtt:
        return max(UNMEASURED_ROUND_TRIPS * expected_rtt + max_ack_delay, UNMEASURED_FLOOR)
    return max(1.25 * rtt_smoothed + 4 * rtt_variance + max_ack_delay, SUSPECT_FLOOR)
