"""When the log is told why a peer is not there."""

from __future__ import annotations

from itertools import pairwise

from tunnel.obstacle import Obstacle
from tunnel.telling import FIRST_LOOK, LAST_PAUSE, Teller

BROKER, UDP = Obstacle("broker", "it is down"), Obstacle("udp", "it is blocked")


def test_a_peer_that_is_soon_there_is_nothing_to_tell_of() -> None:
    teller = Teller()
    assert teller.get_timer() is None
    teller.missed(10.0)
    assert teller.get_timer() == 10.0 + FIRST_LOOK
    assert not teller.due(10.0 + FIRST_LOOK - 0.1)
    teller.found()
    assert teller.get_timer() is None and not teller.due(100.0)


def test_looks_become_seldom() -> None:
    teller = Teller()
    teller.missed(0.0)
    looks = []
    for _ in range(8):
        looks.append(teller.get_timer() or 0.0)
        assert teller.due(looks[-1])
    pauses = [later - earlier for earlier, later in pairwise(looks)]
    assert looks[0] == FIRST_LOOK and pauses == sorted(pauses) and pauses[-1] == LAST_PAUSE
    teller.missed(1000.0)
    assert teller.get_timer() == looks[-1] + LAST_PAUSE, "it was missed all the time"


def test_each_obstacle_is_told_once_until_the_peer_was_there() -> None:
    teller = Teller()
    teller.missed(0.0)
    assert teller.news([BROKER]) == [BROKER]
    assert teller.news([Obstacle("broker", "it is down for 60 s"), UDP]) == [UDP]
    assert teller.news([BROKER, UDP]) == []
    teller.found()
    teller.missed(100.0)
    assert teller.news([UDP]) == [UDP]
