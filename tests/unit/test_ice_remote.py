"""The peer's addresses: who vouches, what a list removes, and what is kept when all is full."""

from __future__ import annotations

from collections.abc import Iterable

from tunnel.ice.candidate import Candidate, Kind
from tunnel.ice.remote import MAX_REMOTES, NAMED_REFILL, Remotes, Standing
from tunnel.path.network import Address

NONE = Standing(frozenset(), frozenset())


def address(number: int) -> Address:
    return Address(f"198.51.100.{number}", 4117)


def named(*numbers: int) -> list[Candidate]:
    return [Candidate(address(n), Kind.HOST, 0, False) for n in numbers]


def standing(warm: Iterable[int] = (), failed: Iterable[int] = ()) -> Standing:
    return Standing(frozenset(map(address, warm)), frozenset(map(address, failed)))


def numbers(remotes: Remotes) -> set[int]:
    return {int(remote.address.host.rpartition(".")[2]) for remote in remotes}


def test_a_list_replaces_the_one_before() -> None:
    remotes = Remotes(())
    remotes.name(2, named(1, 2), NONE, 1.0)
    remotes.name(5, named(2, 5), NONE, 4.0)
    assert numbers(remotes) == {2, 5} and remotes.generation == 5
    remotes.new_session()
    assert numbers(remotes) == {2, 5} and remotes.generation == -1


def test_of_a_list_without_room_the_first_stay() -> None:
    remotes = Remotes(())
    for n in range(1, 6):
        remotes.pin(address(n), configured=True, standing=NONE, now=0.0)
    remotes.name(1, named(*range(10, 42)), NONE, 1.0)
    assert numbers(remotes) == {*range(1, 6), *range(10, 37)}


def test_what_works_outlives_the_list() -> None:
    remotes = Remotes(())
    remotes.pin(address(1), configured=True, standing=NONE, now=0.0)
    remotes.pin(address(2), configured=False, standing=NONE, now=0.0)
    remotes.name(1, named(1, 2, 3, 4), NONE, 1.0)
    remotes.name(2, named(5), standing(warm=[3]), 2.0)
    assert numbers(remotes) == {1, 2, 3, 5}
    kinds = {n: remotes.get(address(n)) for n in (1, 2, 3, 5)}
    assert {n: r.trusted for n, r in kinds.items() if r} == {1: True, 2: False, 3: False, 5: True}
    assert {n: r.kind for n, r in kinds.items() if r and n > 1} == {
        2: Kind.PRFLX,
        3: Kind.PRFLX,
        5: Kind.HOST,
    }


def test_a_list_tells_more_of_what_was_seen() -> None:
    remotes = Remotes(())
    remotes.see(address(1), 7, True, NONE, 1.0)
    seen = remotes.get(address(1))
    assert seen is not None and not seen.trusted
    remotes.name(0, [Candidate(address(1), Kind.SRFLX, 3, False)], NONE, 2.0)
    assert (seen.kind, seen.rank, seen.metered, seen.trusted) == (Kind.SRFLX, 3, False, True)


def test_floods_are_bounded_and_spare_what_works() -> None:
    remotes = Remotes(())
    remotes.see(address(1), 0, False, NONE, 1.0)
    for n in range(2, 100):
        remotes.see(address(n), 0, False, standing(warm=[1]), float(n))
    assert len(remotes) == MAX_REMOTES
    assert numbers(remotes) == {1, *range(69, 100)}  # the latest
    remotes.name(1, named(*range(100, 200)), standing(warm=[1]), 200.0)
    assert len(remotes) == MAX_REMOTES
    assert 1 in numbers(remotes)
    remotes.pin(address(200), configured=True, standing=standing(warm=[1]), now=201.0)
    assert {1, 200} <= numbers(remotes)
    before = numbers(remotes)
    remotes.see(address(201), 0, False, standing(warm=[1]), 202.0)
    assert numbers(remotes) == before  # named ones are worth more
    failed = standing(warm=[1], failed=[*before])
    remotes.see(address(201), 0, False, failed, 203.0)
    assert {1, 200, 201} <= numbers(remotes)
    everything = standing(warm=numbers(remotes))
    remotes.pin(address(202), configured=True, standing=everything, now=204.0)
    assert 202 not in numbers(remotes)


def test_naming_and_unnaming_brings_no_more_checks() -> None:
    remotes = Remotes(())
    remotes.name(1, named(1), NONE, 0.0)
    for round in range(2, 20, 2):
        victim = remotes.get(address(1))
        assert victim is not None
        victim.unanswered += 1
        remotes.name(round, named(), NONE, 0.1 * round)
        assert remotes.get(address(1)) is None
        remotes.name(round + 1, named(1), NONE, 0.1 * round)
    victim = remotes.get(address(1))
    assert victim is not None and victim.unanswered == 9
    remotes.name(50, named(1), NONE, NAMED_REFILL)
    assert victim.unanswered == 0
    victim.unanswered = 5
    remotes.network_changed(NAMED_REFILL + 0.1)
    assert victim.unanswered == 0


def test_unusable_addresses_are_no_candidates() -> None:
    remotes = Remotes(())
    remotes.name(1, [Candidate(Address("127.0.0.1", 1), Kind.HOST, 0, False)], NONE, 1.0)
    remotes.see(Address("::1", 1), 0, False, NONE, 1.0)
    remotes.pin(Address("224.0.0.1", 1), configured=True, standing=NONE, now=1.0)
    assert len(remotes) == 0
