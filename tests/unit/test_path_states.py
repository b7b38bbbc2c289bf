"""The states of a path, every pair of them."""

from __future__ import annotations

import itertools

import pytest

from tunnel.path.path import TRANSITIONS, PathState, advance

C, P, V, F, G = (
    PathState.CANDIDATE,
    PathState.PROBING,
    PathState.VALIDATED,
    PathState.FAILED,
    PathState.GONE,
)
ALLOWED = {
    *((C, to) for to in (P, V, G)),
    *((P, to) for to in (P, V, F, G)),
    *((V, to) for to in (P, V, G)),
    *((F, to) for to in (P, V, G)),
    *((G, to) for to in (C, P, G)),
}


@pytest.mark.parametrize(("start", "to"), list(itertools.product(PathState, PathState)))
def test_every_pair(start: PathState, to: PathState) -> None:
    if (start, to) in ALLOWED:
        assert advance(start, to) is to
    else:
        with pytest.raises(ValueError, match=f"from {start.value} to {to.value}"):
            advance(start, to)


def test_every_state_is_in_the_table_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(PathState)
    assert all(TRANSITIONS[state] - {state} for state in PathState)


def test_only_a_question_can_fail() -> None:
    assert [state for state in PathState if F in TRANSITIONS[state]] == [P]


def test_a_path_that_is_gone_is_never_valid_at_once() -> None:
    assert V not in TRANSITIONS[G]
