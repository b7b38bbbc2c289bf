"""Server-reflexive addresses, against servers that answer, are silent, or lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from aioice import stun
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.world import PORT
from tests.unit.ice_net import bases_of, local_network, uplink
from tunnel.ice import check
from tunnel.ice.gather import (
    BUSY_INTERVAL,
    INTERVAL,
    MAX_SERVERS,
    TRIES,
    Gatherer,
    MappedChanged,
    Nat,
)
from tunnel.path.network import Address, LocalNetwork, PathKey

ONE, TWO = uplink("a", 1), uplink("a", 2)
HERE, THERE = Address(ONE.ip, PORT), Address(TWO.ip, PORT)
FIRST, SECOND = Address("192.0.2.53", 3478), Address("192.0.2.54", 3478)
OUTSIDE = Address("203.0.113.1", 40000)
NOW = 1000.0


def answer(request: bytes, mapped: Address) -> bytes:
    found = check.transaction_id_of(request)
    return bytes(
        stun.Message(
            stun.Method.BINDING, stun.Class.RESPONSE, found, {"XOR-MAPPED-ADDRESS": tuple(mapped)}
        )
    )


def gatherer(*servers: Address) -> Gatherer:
    made = Gatherer(random.Random(1))
    made.bases_changed(local_network([ONE]), bases_of([ONE]), NOW)
    made.servers_resolved(servers or [FIRST], NOW)
    return made


def run(made: Gatherer, now: float, until: float) -> list[tuple[float, PathKey, bytes]]:
    """Everything sent until then, by its timer alone."""
    sent = [(now, key, data) for key, data in made.datagrams_to_send(now)]
    while (timer := made.get_timer()) is not None and timer <= until:
        now = max(now, timer)
        made.handle_timer(now)
        out = made.datagrams_to_send(now)
        sent += [(now, key, data) for key, data in out]
    return sent


def events(made: Gatherer) -> int:
    count = 0
    while (event := made.next_event()) is not None:
        assert event == MappedChanged()
        count += 1
    return count


def test_asks_at_once_and_tells_what_changed() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    assert key == PathKey(HERE, FIRST)
    assert made.mapped() == {} and events(made) == 0
    assert made.receive(answer(request, OUTSIDE), key, NOW + 0.02)
    assert made.mapped() == {HERE: OUTSIDE} and events(made) == 1
    assert not made.receive(answer(request, OUTSIDE), key, NOW + 0.03)  # again
    assert made.get_timer() == NOW + INTERVAL
    [(_, _, request)] = run(made, NOW + 1, NOW + INTERVAL)
    made.receive(answer(request, OUTSIDE), key, NOW + INTERVAL)
    assert events(made) == 0  # the same


def test_only_the_answer_to_the_question() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    good = answer(request, OUTSIDE)
    forged = good[:8] + bytes(12) + good[20:]
    assert not made.receive(forged, key, NOW)
    assert not made.receive(good, PathKey(HERE, SECOND), NOW)
    assert not made.receive(good, PathKey(THERE, FIRST), NOW)
    assert not made.receive(good[:-1], key, NOW)
    assert made.mapped() == {}
    assert made.receive(good, key, NOW)


def test_retransmissions_of_a_silent_server() -> None:
    made = gatherer()
    sent = run(made, NOW, NOW + 60)
    # RFC 8489 section 6.2.1, its own example.
    assert [round(at - NOW, 3) for at, _, _ in sent] == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5]
    assert len({data for _, _, data in sent}) == 1
    assert len(sent) == TRIES
    assert made.get_timer() == NOW + INTERVAL


def test_an_answer_that_nobody_repeats_is_given_up() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    made.receive(answer(request, OUTSIDE), key, NOW)
    assert made.mapped()
    run(made, NOW, NOW + INTERVAL + 45)
    assert made.mapped() == {}
    assert events(made) == 2


def test_busy_keeps_the_mapping_alive() -> None:
    made = gatherer()
    made.busy(True)
    [(key, request)] = made.datagrams_to_send(NOW)
    made.receive(answer(request, OUTSIDE), key, NOW)
    assert made.get_timer() == NOW + BUSY_INTERVAL
    made.busy(False)
    assert made.get_timer() == NOW + INTERVAL
    made.again(NOW + 1)
    assert len(made.datagrams_to_send(NOW + 1)) == 1


def test_servers_that_disagree() -> None:
    made = gatherer(FIRST, SECOND)
    sent = run(made, NOW, NOW + 0.1)
    assert [key.remote for _, key, _ in sent] == [FIRST, SECOND]
    made.receive(answer(sent[1][2], Address("203.0.113.1", 2)), sent[1][1], NOW + 0.1)
    assert made.mapped() == {HERE: Address("203.0.113.1", 2)}
    made.receive(answer(sent[0][2], OUTSIDE), sent[0][1], NOW + 0.2)
    assert made.mapped() == {HERE: OUTSIDE}  # the first in the list


def test_new_bases_and_gone_ones() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    made.receive(answer(request, OUTSIDE), key, NOW)
    made.bases_changed(local_network([ONE, TWO]), bases_of([ONE, TWO]), NOW + 1)
    assert [key.local for key, _ in made.datagrams_to_send(NOW + 1)] == [THERE]
    made.bases_changed(local_network([TWO]), bases_of([TWO]), NOW + 2)
    assert made.mapped() == {}
    made.bases_changed(LocalNetwork(), bases_of([TWO]), NOW + 3)  # no route
    assert made.get_timer() is None


def test_another_interface_with_the_address_is_another_base() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    made.receive(answer(request, OUTSIDE), key, NOW)
    moved = replace(ONE, interface="eth9")
    made.bases_changed(local_network([moved]), bases_of([moved]), NOW + 1)
    assert made.mapped() == {}
    assert len(made.datagrams_to_send(NOW + 1)) == 1


def test_servers_are_bounded_and_must_be_usable() -> None:
    made = gatherer(Address("127.0.0.1", 1), *(Address(f"192.0.2.{i}", 1) for i in range(1, 20)))
    assert len(run(made, NOW, NOW + 0.1)) == MAX_SERVERS


def test_an_error_is_no_answer() -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    error = stun.Message(
        stun.Method.BINDING,
        stun.Class.ERROR,
        check.transaction_id_of(request),
        {"ERROR-CODE": (500, "busy")},
    )
    assert made.receive(bytes(error), key, NOW)
    assert made.mapped() == {}
    assert made.get_timer() == NOW + 0.5


@given(st.binary(max_size=120), st.integers(0, 99))
def test_fuzz(data: bytes, cut: int) -> None:
    made = gatherer()
    [(key, request)] = made.datagrams_to_send(NOW)
    good = answer(request, OUTSIDE)
    tries: list[Callable[[], bytes]] = [
        lambda: data,
        lambda: request[:20] + data,
        lambda: good[:2] + len(data).to_bytes(2) + good[4:20] + data,
        lambda: good[:cut],
    ]
    for make in tries:
        made.receive(make(), key, NOW)


def test_who_waits_for_an_answer_asks_again_sooner() -> None:
    waits = []
    for busy in (False, True):
        made = gatherer()
        made.datagrams_to_send(NOW)
        made.busy(busy)  # known only after the first question has left
        timer = made.get_timer()
        assert timer is not None
        waits.append(timer - NOW)
    assert waits[1] <= waits[0] / 4


# what kind of NAT


def hear(
    made: Gatherer, now: float, *ports: int, other: Address | None = None
) -> list[tuple[PathKey, bytes]]:
    """Answer all that is asked now: the questions see these ports. What was asked."""
    sent = [each for each in run(made, now, now + 0.05) if check.username_of(each[2]) is None]
    for (_, key, data), port in zip(sent, ports, strict=False):
        reply = stun.parse_message(answer(data, Address("203.0.113.1", port)))
        if other is not None:
            reply.attributes["OTHER-ADDRESS"] = tuple(other)
        assert made.receive(bytes(reply), key, now)
    return [(key, data) for _, key, data in sent]


@pytest.mark.parametrize("hard", [False, True])
def test_two_servers_tell_what_kind_of_nat(hard: bool) -> None:
    made = gatherer(FIRST, SECOND)
    assert made.nat() is None
    hear(made, NOW, 40000, 40000 + hard)
    assert made.nat() == Nat(HERE, hard)
    assert made.mapped() == {HERE: OUTSIDE}
    assert events(made) == 2


@pytest.mark.parametrize("hard", [False, True])
def test_one_server_is_enough_if_it_has_another_address(hard: bool) -> None:
    made = gatherer(FIRST)
    hear(made, NOW, 40000, other=SECOND)
    assert made.nat() is None
    [(key, _)] = hear(made, NOW + 0.1, 40000 + hard, other=FIRST)
    assert key == PathKey(HERE, SECOND)
    assert made.nat() == Nat(HERE, hard)
    assert made.mapped() == {HERE: OUTSIDE}, "it only compares"
    for number in range(1, 4):
        [(key, _)] = hear(made, NOW + number * INTERVAL, 40000 + number, other=SECOND)
        assert key.remote == FIRST, "the other one is asked once"
    assert made.nat() == Nat(HERE, hard)


def test_the_other_address_is_asked_once_also_when_it_is_silent() -> None:
    made = gatherer(FIRST)
    hear(made, NOW, 40000, other=SECOND)
    sent = run(made, NOW, NOW + INTERVAL - 1)
    assert [key.remote for _, key, _ in sent] == [SECOND] * TRIES
    hear(made, NOW + INTERVAL, 40000, other=SECOND)
    assert not run(made, NOW + INTERVAL, NOW + 2 * INTERVAL - 1)
    assert made.nat() is None


@pytest.mark.parametrize("other", [Address("127.0.0.1", 53), Address("2001:db8::1", 3478), FIRST])
def test_another_address_that_is_none(other: Address) -> None:
    made = gatherer(FIRST)
    hear(made, NOW, 40000, other=other)
    assert not run(made, NOW, NOW + INTERVAL - 1)


def test_answers_of_different_moments_are_not_compared() -> None:
    """A mapping that was not used for five minutes may be another one, and the NAT an easy one."""
    made = gatherer(FIRST, SECOND)
    hear(made, NOW, 40000, 40000)
    [first, second] = run(made, NOW + INTERVAL, NOW + INTERVAL + 0.01)
    for number, (_, key, data) in enumerate((first, second)):
        made.receive(answer(data, Address("203.0.113.1", 41000)), key, NOW + INTERVAL + number)
        assert made.nat() == Nat(HERE, False)


def test_the_nat_of_the_best_base_that_is_known() -> None:
    made = Gatherer(random.Random(1))
    made.bases_changed(local_network([ONE, TWO]), bases_of([ONE, TWO]), NOW)
    made.servers_resolved([FIRST, SECOND], NOW)
    for _, key, data in run(made, NOW, NOW + 0.05):
        port = 40000 + (key.remote == SECOND if key.local == THERE else 0)
        made.receive(answer(data, Address("203.0.113.1", port)), key, NOW)
    assert made.nat() == Nat(HERE, False)
    made.bases_changed(local_network([TWO]), bases_of([TWO]), NOW + 1)
    assert made.nat() == Nat(THERE, True)
    made.bases_changed(local_network([]), [], NOW + 2)
    assert made.nat() is None


def test_who_waits_from_the_start_asks_as_long_and_sooner() -> None:
    made = gatherer()
    made.busy(True)
    sent = run(made, NOW, NOW + 14)
    assert [round(at - NOW, 3) for at, _, _ in sent] == [0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3]
    assert len({data for _, _, data in sent}) == 1


def test_asking_again_takes_only_the_newest_answer() -> None:
    made = gatherer()
    [(key, old)] = made.datagrams_to_send(NOW)
    made.again(NOW + 1)
    [(key, new)] = made.datagrams_to_send(NOW + 1)
    assert not made.receive(answer(old, OUTSIDE), key, NOW + 1.1)
    assert made.mapped() == {}
    assert made.receive(answer(new, OUTSIDE), key, NOW + 1.1)
    assert list(made.mapped().values()) == [OUTSIDE]
    made.again(NOW + 2)
    assert list(made.mapped().values()) == [OUTSIDE]  # until there is another


def test_silence_means_something_after_a_while_and_only_where_nobody_answers() -> None:
    def silent() -> bool:
        return made.silent

    made = gatherer(FIRST, SECOND)
    run(made, NOW, NOW + 6)
    assert not silent(), "too soon"
    run(made, NOW + 6, NOW + 9)
    assert silent()
    run(made, NOW + 9, NOW + 100)
    assert silent(), "it stays so between two rounds"
    asked = run(made, NOW + 100, NOW + INTERVAL + 2)
    again = next(data for _, key, data in asked if key.remote == FIRST)
    assert silent()
    assert made.receive(answer(again, OUTSIDE), PathKey(HERE, FIRST), NOW + INTERVAL + 2)
    assert not silent()
    assert not Gatherer(random.Random(1)).silent, "nobody was asked"
