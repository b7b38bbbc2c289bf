"""What a path is: the states it goes through, and the only ways between them.

A path is a pair (local socket, remote address). It is born a CANDIDATE, when an address is learnt
or an authenticated packet comes in from it. A PATH_CHALLENGE makes it PROBING; the answer makes
it VALIDATED, silence until the deadline makes it FAILED (RFC 9000 section 8.2). A validated or
failed path may be challenged again at any time; a path whose local address is gone is GONE, and
comes back as a candidate when the address does. Which path is *active* is not a state of the
path: exactly one path is active per peer and direction of sending, whatever its state.
"""

from enum import Enum


class PathState(Enum):
    CANDIDATE = "candidate"
    PROBING = "probing"
    VALIDATED = "validated"
    FAILED = "failed"
    GONE = "gone"


TRANSITIONS: dict[PathState, frozenset[PathState]] = {
    PathState.CANDIDATE: frozenset({PathState.PROBING, PathState.VALIDATED, PathState.GONE}),
    PathState.PROBING: frozenset(
        {PathState.PROBING, PathState.VALIDATED, PathState.FAILED, PathState.GONE}
    ),
    PathState.VALIDATED: frozenset({PathState.PROBING, PathState.VALIDATED, PathState.GONE}),
    # A response may be later than our patience: it still proves the path.
    PathState.FAILED: frozenset({PathState.PROBING, PathState.VALIDATED, PathState.GONE}),
    PathState.GONE: frozenset({PathState.CANDIDATE, PathState.PROBING, PathState.GONE}),
}


def advance(state: PathState, to: PathState) -> PathState:
    """Return `to`, or raise ValueError when no transition leads there."""
    if to not in TRANSITIONS[state]:
        raise ValueError(f"a path cannot go from {state.value} to {to.value}")
    return to
