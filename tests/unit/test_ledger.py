"""The ledger of migrations."""

from __future__ import annotations

import json

import pytest

from tunnel.ledger import Ledger, Migration, Trigger


def record(ledger: Ledger, peer: str = "office", at: float = 100.0) -> Migration:
    return ledger.record(
        peer=peer,
        trigger=Trigger.LINK_DOWN,
        from_path="192.0.2.1:1>198.51.100.1:2",
        to_path="[2001:db8::1]:1>[2001:db8::2]:2",
        wall_time=1_700_000_000.25,
        at=at,
        detected=at + 0.001,
        switched=at + 0.003,
        replayed=2,
    )


def test_durations_are_the_gaps() -> None:
    ledger = Ledger()
    migration = record(ledger)
    assert (migration.detect_ms, migration.switch_ms, migration.confirm_ms) == (1.0, 2.0, None)
    ledger.confirm(migration.sequence, 100.043)
    confirmed = ledger.get(migration.sequence)
    assert confirmed is not None
    assert confirmed.confirm_ms == 40.0
    assert migration.confirmed is None  # records are values


def test_only_the_first_confirmation_counts() -> None:
    ledger = Ledger()
    sequence = record(ledger).sequence
    ledger.confirm(sequence, 101.0)
    ledger.confirm(sequence, 102.0)
    assert [migration.confirmed for migration in ledger.records()] == [101.0]


def test_counts_add_up() -> None:
    ledger = Ledger()
    sequence = record(ledger).sequence
    ledger.add(sequence, lost=1, replayed=2, duplicates=3)
    ledger.add(sequence, duplicates=1)
    migration = ledger.records()[0]
    assert (migration.lost, migration.replayed, migration.duplicates) == (1, 4, 4)


def test_bounded_and_in_order() -> None:
    ledger = Ledger(size=3)
    for number in range(5):
        record(ledger, peer="a" if number % 2 else "b", at=number)
    assert len(ledger) == 3
    assert [migration.sequence for migration in ledger.records()] == [3, 4, 5]
    assert (ledger.count("a"), ledger.count("b"), ledger.count("c")) == (2, 3, 0)
    assert ledger.get(1) is None
    ledger.confirm(1, 7.0)  # too late; forgotten without a word
    ledger.add(1, lost=1)
    ledger.confirm(99, 7.0)
    assert [migration.sequence for migration in ledger.records()] == [3, 4, 5]
    assert [migration.confirmed for migration in ledger.records()] == [None] * 3


def test_confirming_keeps_the_order() -> None:
    ledger = Ledger()
    first, _ = record(ledger), record(ledger)
    ledger.confirm(first.sequence, 200.0)
    assert [migration.sequence for migration in ledger.records()] == [1, 2]


def test_to_builtins_is_json() -> None:
    ledger = Ledger()
    record(ledger)
    assert json.loads(json.dumps(ledger.to_builtins())) == [
        {
            "peer": "office",
            "sequence": 1,
            "trigger": "link-down",
            "from_path": "192.0.2.1:1>198.51.100.1:2",
            "to_path": "[2001:db8::1]:1>[2001:db8::2]:2",
            "wall_time": 1_700_000_000.25,
            "at": 100.0,
            "detected": 100.001,
            "switched": 100.003,
            "confirmed": None,
            "lost": 0,
            "replayed": 2,
            "duplicates": 0,
            "detect_ms": 1.0,
            "switch_ms": 2.0,
            "confirm_ms": None,
        }
    ]


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Ledger(size=0)
