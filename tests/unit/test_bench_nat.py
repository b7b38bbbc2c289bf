"""What two kinds of network can hope for, against a model of two agents and their tables; and the
table that is printed."""

from __future__ import annotations

import random

import pytest

from bench.nat.course import chosen
from bench.nat.kinds import (
    KINDS,
    SHARED,
    Kind,
    Meeting,
    direct_by_luck,
    direct_by_rights,
    meetings,
)
from bench.nat.runs import Run
from bench.nat.table import Outcome, table
from bench.nattable import Endpoint, NatTable

STUN = ("192.0.2.74", 3478)
_ROUNDS = 8  # of checks; each may teach both ends one more address
_PER_ROUND = 40  # addresses that are tried


class Agent:
    """One end: a host, the tables before it (the innermost first), and whom it has heard of."""

    def __init__(self, kind: Kind, name: int, rng: random.Random) -> None:
        self.inside: Endpoint = (f"10.0.{name}.2", 4117)
        self.tables = [
            NatTable(
                {4: (f"100.{number}.{name}.1",)},
                rng,
                mapping=stage.mapping,
                filtering=stage.filtering,
            )
            for number, stage in enumerate(reversed(kind.stages))
            if stage.make in ("nft", "box")
        ]
        self.remotes: list[Endpoint] = []
        self.mapped = self.leave(STUN)

    def leave(self, to: Endpoint) -> Endpoint:
        """Where a packet of ours comes from in the eyes of its target."""
        source = self.inside
        for one in self.tables:
            outside = one.outgoing(source, to, 0.0)
            assert outside is not None
            source = outside
        return source

    def enter(self, at: Endpoint, sender: Endpoint) -> bool:
        """Whether a packet reaches us."""
        target: Endpoint | None = at
        for one in reversed(self.tables):
            target = one.incoming(target, sender, 0.0) if target else None
        return target == self.inside

    def learn(self, remote: Endpoint) -> None:
        if remote not in self.remotes and len(self.remotes) < _PER_ROUND:
            self.remotes.append(remote)


def meet(a: Agent, b: Agent) -> bool:
    """Checks of RFC 8445: a pair is valid when the answer comes from where the request went."""
    a.learn(b.mapped)
    b.learn(a.mapped)
    for _ in range(_ROUNDS):
        for us, them in ((a, b), (b, a)):
            for remote in list(us.remotes):
                source = us.leave(remote)
                if not them.enter(remote, source):
                    continue
                them.learn(source)  # peer-reflexive
                answer = them.leave(source)
                if us.enter(source, answer) and answer == remote:
                    return True
    return False


PAIRS = [m for m in meetings((4,)) if not m.shared and not (m.a.blocked or m.b.blocked)]


@pytest.mark.parametrize("meeting", PAIRS, ids=str)
def test_what_is_direct_by_rights_is_direct_in_a_model(meeting: Meeting) -> None:
    rng = random.Random(1)
    found = meet(Agent(meeting.a, 1, rng), Agent(meeting.b, 2, rng))
    if direct_by_rights(meeting):
        assert found
    elif "endpoint" in (meeting.a.mapping, meeting.b.mapping):
        assert not found, "it could be counted on"


def test_what_can_be_hoped_for() -> None:
    def direct(a: str, b: str) -> bool:
        found = {direct_by_rights(Meeting(KINDS[x], KINDS[y])) for x, y in ((a, b), (b, a))}
        assert len(found) == 1, "whoever comes first"
        return found.pop()

    assert all(direct("public", b) for b, kind in KINDS.items() if not kind.blocked)
    assert not any(direct("udp-blocked", b) or direct("only-443", b) for b in KINDS)
    assert direct("port-restricted", "port-restricted") and direct("cgnat", "cgnat")
    assert direct("full-cone", "symmetric") and direct("restricted", "symmetric")
    assert not direct("port-restricted", "symmetric") and not direct("symmetric", "symmetric")
    assert direct("firewall6", "firewall6")
    assert [direct_by_rights(meeting) for meeting in SHARED] == [True, True, True, False]


def test_what_may_be_direct() -> None:
    def lucky(a: str, b: str) -> bool:
        found = {direct_by_luck(Meeting(KINDS[x], KINDS[y])) for x, y in ((a, b), (b, a))}
        assert len(found) == 1, "whoever comes first"
        return found.pop()

    assert lucky("port-restricted", "symmetric") and lucky("apdm-adf", "port-restricted")
    assert lucky("cgnat", "cgnat-symmetric") and lucky("port-restricted", "adm-eif")
    assert not any(lucky("public", b) or lucky("symmetric", b) for b in ("public", "symmetric"))
    assert not lucky("symmetric", "restricted"), "by rights"
    assert not lucky("symmetric", "only-443") and not lucky("port-restricted", "cgnat")
    assert not any(direct_by_luck(meeting) for meeting in SHARED)


def test_every_pair_is_there_once() -> None:
    found = [str(meeting) for meeting in meetings((4, 6))]
    assert len(found) == len(set(found)) == 14 * 15 // 2 + 4 * 5 // 2 + len(SHARED)
    assert [str(m) for m in chosen(["symmetric:public"], (4, 6))] == ["public:symmetric"]
    assert [m.shared for m in chosen(["cgnat:cgnat"], (4,))] == ["", "carrier"]
    assert chosen(["cgnat:nonsense"], (4,)) == []


def met(a: float, b: float, *, relayed: bool, direct: float | None) -> Run:
    return Run(first_ms={"A>B": a, "B>A": b}, relayed=relayed, direct_ms=direct)


def test_an_outcome_in_brief() -> None:
    can, cannot = (Meeting(KINDS["public"], KINDS["symmetric"]), PAIRS[-1])
    assert not direct_by_rights(cannot)
    straight = met(100.0, 120.0, relayed=False, direct=120.0)
    late = met(100.0, 90.0, relayed=True, direct=1500.0)
    never = met(100.0, 90.0, relayed=True, direct=None)
    nothing = Run(first_ms={"A>B": 100.0, "B>A": None})
    for runs, brief in (
        ([straight], "direct 120"),
        ([late], "relay 100, direct 1500"),
        ([late, never], "relay 100, direct 1500 (1 of 2)"),
        ([never], "relay 100"),
        ([straight, nothing], "direct 120 (1 of 2)"),
        ([nothing], "-"),
        ([], "?"),
    ):
        assert Outcome(can, True, runs).brief() == brief
    assert [Outcome(can, True, [run]).good for run in (straight, late, never, nothing)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert [Outcome(cannot, True, [run]).good for run in (never, nothing)] == [True, False]
    assert Outcome(cannot, False, [nothing]).good, "there was no relay"
    assert not Outcome(cannot, False, []).good


def test_the_table_names_what_went_wrong() -> None:
    public, symmetric = KINDS["public"], KINDS["symmetric"]
    outcomes = [
        Outcome(Meeting(public, public), True, [met(1.0, 2.0, relayed=False, direct=2.0)]),
        Outcome(Meeting(public, symmetric), True, [met(1.0, 2.0, relayed=True, direct=None)]),
        Outcome(SHARED[0], True, [Run()]),
    ]
    square, listed = table(outcomes).split("\n\n")
    rows = {row.split("|")[1].strip(): row for row in square.splitlines()}
    assert "direct 2" in rows["public"] and "**relay 2**" in rows["public"]
    assert "**relay 2**" in rows["symmetric"]
    assert "hairpin" not in square
    assert listed.count("**no**") == 2
    assert "hairpin:hairpin (home shared)" in listed
