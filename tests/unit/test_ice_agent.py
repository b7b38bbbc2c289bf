"""The agent: two of them on a simulated network, and one against a peer that means harm."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.world import PORT, Uplink
from tests.unit.ice_net import START, STUN, End, Net, bases_of, local_network, public, uplink
from tunnel.ice import check
from tunnel.ice.agent import UNPROVEN_CHECKS, Agent
from tunnel.ice.candidate import Base, Candidate, Kind, priority
from tunnel.ice.check import Credentials
from tunnel.ice.checklist import MAX_PAIRS
from tunnel.ice.events import (
    AgentEvent,
    CandidatesChanged,
    CheckReceived,
    PairAnswered,
    PairDown,
    PairUp,
)
from tunnel.ice.pair import CHECKS_PER_ADDRESS, Pair, PairState
from tunnel.ice.remote import MAX_REMOTES
from tunnel.path.network import Address, LocalNetwork, PathKey

EPSILON = 1e-6
WARM = PairState.WARM

# The peer's side of a conversation that is written by hand.
OURS = Credentials("ours" * 4, "p" * 32, "them" * 4, "q" * 32)
THEIRS = Credentials("them" * 4, "q" * 32, "ours" * 4, "p" * 32)
BASE = Base(Address("192.168.11.2", PORT), "eth1", False, 0)
PEER = Address("198.51.100.1", PORT)
PATH = PathKey(BASE.address, PEER)
PRIORITY = priority(Kind.PRFLX, 3, True)


def only(pairs: list[Pair]) -> Pair:
    assert len(pairs) == 1
    return pairs[0]


def agent_with(*remotes: Address, uplinks: int = 1, seed: int = 1) -> Agent:
    made = Agent(rng=random.Random(seed))
    links = [uplink("a", number) for number in range(1, uplinks + 1)]
    made.start(OURS, START)
    made.bases_changed(local_network(links), bases_of(links), START)
    for remote in remotes:
        made.remote_address(remote, START)
    return made


def events(agent: Agent) -> list[AgentEvent]:
    found: list[AgentEvent] = []
    while (event := agent.next_event()) is not None:
        found.append(event)
    return found


def answer(agent: Agent, sent: list[tuple[PathKey, bytes]], now: float) -> None:
    """As the peer would, all of these requests."""
    for key, data in sent:
        if check.username_of(data) is not None:
            mapped = Address("203.0.113.1", 40001)
            agent.receive(check.response(THEIRS, check.transaction_id_of(data), mapped), key, now)


def ask(agent: Agent, now: float, path: PathKey = PATH, number: int = 0) -> bytes:
    data = check.request(THEIRS, number.to_bytes(4) + bytes(8), PRIORITY)
    assert agent.receive(data, path, now)
    return data


def advance(agent: Agent, now: float, until: float) -> list[tuple[float, PathKey, bytes]]:
    """By its timer alone, nobody answers; everything sent until then."""
    sent = [(now, key, data) for key, data in agent.datagrams_to_send(now)]
    while (timer := agent.get_timer()) is not None and timer <= until:
        now = max(now, timer)
        agent.handle_timer(now)
        sent += [(now, key, data) for key, data in agent.datagrams_to_send(now)]
    return sent


# how soon


def test_a_new_base_has_a_pair_within_one_round_trip() -> None:
    net = Net([uplink("a", 1), uplink("a", 2, up=False)], [public("b")], delay=0.02)
    net.start()
    net.run(5)
    assert len(net.a.ups()) == 1
    net.a.uplinks[1].up = True
    began = net.now
    net.network_event(net.a)
    net.run(1)
    at, key = net.a.ups()[1]
    assert key.local.host == net.a.uplinks[1].ip
    assert at - began <= 2 * net.delay + EPSILON


def test_two_nats_take_as_long_as_the_lists_and_a_round_trip() -> None:
    net = Net([uplink("a")], [uplink("b")])
    net.start()
    took = net.run_until(lambda: bool(net.a.warm() and net.b.warm()), 5)
    # 10 ms until the mapping is known, 10 ms until the peer knows it, a round trip of 20 ms.
    assert took <= 0.04 + EPSILON


def test_the_other_end_knows_after_one_and_a_half_round_trips() -> None:
    net = Net([uplink("a")], [public("b")])
    net.signal_delay = None
    net.start()
    began = net.now
    net.a.agent.remote_address(Address(net.b.uplinks[0].ip, PORT), net.now)
    net.pump(net.a)
    net.run(1)
    [(first, _)], [(second, key)] = net.a.ups(), net.b.ups()
    assert first - began == pytest.approx(2 * net.delay)
    assert second - began == pytest.approx(3 * net.delay)
    pair = net.b.agent.pair(key)
    assert pair is not None and pair.kind is Kind.PRFLX and not pair.trusted


@pytest.mark.parametrize("deaf", ["a", "b"])
def test_one_direction_is_not_enough(deaf: str) -> None:
    net = Net([public("a")], [public("b")])
    net.drop = lambda end, key, data: end.name != deaf  # only the deaf one is heard
    net.start()
    net.run(100)
    assert not net.a.ups() and not net.b.ups()
    hearing = net.b if deaf == "a" else net.a
    assert any(isinstance(event, CheckReceived) for _, event in hearing.events)
    net.drop = None
    net.run_until(lambda: bool(net.a.warm() and net.b.warm()), 80)


def test_first_checks_are_paced_the_best_first() -> None:
    agent = Agent(rng=random.Random(1))
    agent.start(OURS, START)
    links = [uplink("a", 1, metric=10), uplink("a", 2, metric=20)]
    agent.bases_changed(local_network(links), bases_of(links), START)
    candidates = [
        Candidate(
            Address(f"198.51.100.{n}", PORT), Kind.SRFLX if n % 2 else Kind.HOST, n // 2, False
        )
        for n in range(20)
    ]
    kept = PathKey(Address(links[1].ip, PORT), candidates[19].address)
    agent.keep([kept])
    agent.remote_candidates(1, candidates, START)
    sent = advance(agent, START, START + 0.09)
    assert [round(at - START, 3) for at, _, _ in sent[:12]] == [0.0] * 8 + [
        0.005,
        0.01,
        0.015,
        0.02,
    ]
    ranks = {c.address: c.rank for c in candidates}
    sums = [ranks[k.remote] + (k.local.host == links[1].ip) for _, k, _ in sent]
    assert sent[0][1] == kept
    assert sums[1:20] == sorted(sums[1:20])
    assert sent[1][1].remote == candidates[0].address  # the host before the other of rank 0
    assert sent[2][1].remote == candidates[1].address


# what proves a pair


def test_an_answer_on_another_pair_proves_nothing() -> None:
    agent = agent_with(PEER, uplinks=2)
    sent = agent.datagrams_to_send(START)
    assert len(sent) == 2
    (here, first), (there, _) = sent
    data = check.response(THEIRS, check.transaction_id_of(first), Address("203.0.113.1", 1))
    assert agent.receive(data, there, START + 0.01)
    assert agent.receive(data, here._replace(remote=Address("192.0.2.66", 66)), START + 0.01)
    assert agent.counters["refused"] == 2
    assert not any(pair.state is WARM for pair in agent.pairs())
    assert agent.receive(data, here, START + 0.02)
    [up] = [event for event in events(agent) if isinstance(event, PairUp)]
    assert up.key == here and up.rtt == pytest.approx(0.02)
    assert not agent.receive(data, here, START + 0.03)  # only once


def test_forgeries_get_silence_and_change_nothing() -> None:
    agent = agent_with(PEER)
    [(_, request)] = agent.datagrams_to_send(START)
    transaction = check.transaction_id_of(request)
    events(agent)
    wrong = replace(THEIRS, local_password="x" * 32, remote_password="x" * 32)
    assert agent.receive(check.response(wrong, transaction, PEER), PATH, START)
    assert agent.receive(check.request(wrong, bytes(12), 1), PATH, START)
    assert agent.receive(request[:-1] + b"\0", PATH, START) is False  # not to us
    stranger = Credentials("x" * 16, "x", "y" * 16, "y")
    assert not agent.receive(check.request(stranger, bytes(12), 1), PATH, START)
    assert not agent.receive(check.response(THEIRS, bytes(12), PEER), PATH, START)
    assert not agent.receive(request[:-4], PATH, START)
    assert agent.counters["refused"] == 2
    assert agent.datagrams_to_send(START) == [] and events(agent) == []
    assert only(agent.pairs()).state is PairState.CHECKING


def test_a_question_is_answered_where_it_came_from_then_asked_back() -> None:
    agent = agent_with()
    asked = ask(agent, START)
    (to, response), (back, request) = agent.datagrams_to_send(START)
    assert to == back == PATH
    assert check.read_response(response, THEIRS) == PEER
    assert check.transaction_id_of(response) == check.transaction_id_of(asked)
    assert check.read_request(request, THEIRS) == priority(Kind.PRFLX, 0, False)
    pair = only(agent.pairs())
    assert (pair.kind, pair.remote_rank, pair.metered, pair.trusted) == (Kind.PRFLX, 3, True, False)
    assert pair.state is PairState.CHECKING
    assert CheckReceived(PATH) in events(agent)


@pytest.mark.parametrize("host", ["10.88.0.2", "127.0.0.1", "224.0.0.1"])
def test_nothing_is_answered_into_the_tunnel(host: str) -> None:
    agent = Agent(rng=random.Random(1), forbidden=[ip_network("10.88.0.0/24")])
    agent.start(OURS, START)
    agent.bases_changed(local_network([uplink("a")]), bases_of([uplink("a")]), START)
    ask(agent, START, PATH._replace(remote=Address(host, 1)))
    assert agent.pairs() == []
    assert agent.datagrams_to_send(START) == []


def test_a_recorded_question_cannot_drown_the_others() -> None:
    agent, now = warm_agent(busy=True)
    asked = [ask(agent, now, number=number) for number in range(3)]
    assert len(agent.datagrams_to_send(now)) == 3
    for number in range(3000):
        now += 0.001
        spoofed = PATH._replace(remote=Address("198.51.100.66", 1 + number))
        assert agent.receive(asked[number % 3], spoofed if number % 2 else PATH, now)
    to_elsewhere = [key for key, _ in agent.datagrams_to_send(now) if key != PATH]
    assert 0 < len(to_elsewhere) <= 2 * 20  # a copy may be the genuine one: a few are answered
    ask(agent, now, number=3)
    assert [key for key, _ in agent.datagrams_to_send(now)] == [PATH]
    assert len(agent.pairs()) <= MAX_REMOTES


def test_a_forwarder_that_is_faster_does_not_take_the_pair_away() -> None:
    agent = agent_with()
    forwarded = PATH._replace(remote=Address("192.0.2.66", 66))
    data = ask(agent, START, forwarded)
    agent.datagrams_to_send(START)
    assert agent.receive(data, PATH, START + 0.001)
    assert [key for key, _ in agent.datagrams_to_send(START + 0.001)] == [PATH, PATH]


def test_a_late_answer_still_proves() -> None:
    agent = agent_with(PEER)
    [(key, request)] = agent.datagrams_to_send(START)
    agent.send_failed(key, START)
    assert only(agent.pairs()).state is PairState.FAILED
    answer(agent, [(key, request)], START + 3)
    assert only(agent.pairs()).state is WARM
    assert only(agent.pairs()).rtt == pytest.approx(3)


def test_answers_of_an_old_session_do_not_count() -> None:
    agent = agent_with(PEER)
    sent = agent.datagrams_to_send(START)
    answer(agent, sent, START + 0.01)
    assert only(agent.pairs()).state is WARM
    agent.check_now(START + 1)
    old = agent.datagrams_to_send(START + 1)
    agent.start(OURS, START + 1)
    assert only(agent.pairs()).state is PairState.WAITING
    assert CandidatesChanged() in events(agent)
    answer(agent, old, START + 1.01)
    new = agent.datagrams_to_send(START + 1.01)  # at once
    assert len(new) == 1
    assert only(agent.pairs()).answered_at is None
    answer(agent, new, START + 1.02)
    assert only(agent.pairs()).state is WARM


def test_stopped_is_silent() -> None:
    agent = agent_with(PEER)
    request = check.request(THEIRS, bytes(12), 1)
    agent.stop()
    assert [agent.running, agent.answers_to(OURS.local_ufrag)] == [False, False]
    assert not agent.receive(request, PATH, START)
    agent.check_now(START)
    agent.send_failed(PATH, START)
    agent.handle_timer(START + 99)
    assert agent.datagrams_to_send(START) == [] and agent.get_timer() is None
    agent.start(OURS, START + 100)
    assert [agent.running, agent.answers_to(OURS.local_ufrag)] == [True, True]
    assert len(agent.datagrams_to_send(START + 100)) == 1


# NATs


@pytest.mark.parametrize("peer", [public("b"), uplink("b", restricted=False)])
def test_a_symmetric_nat_makes_a_peer_reflexive_pair(peer: Uplink) -> None:
    net = Net([uplink("a", symmetric=True)], [peer])
    net.signal_delay = None
    net.start()
    net.a.agent.remote_address(peer.outside(STUN, net.now), net.now)
    net.pump(net.a)
    net.run_until(lambda: bool(net.a.warm() and net.b.warm()), 1)
    pair = only(net.b.agent.pairs())
    assert (pair.state, pair.kind, pair.trusted) == (WARM, Kind.PRFLX, False)
    assert pair.key.remote not in {c.address for c in net.a.agent.candidates()[1][:2]}


def test_two_symmetric_nats_cannot_meet_and_cost_little() -> None:
    net = Net([uplink("a", symmetric=True)], [uplink("b", symmetric=True)])
    net.start()
    net.run(3600)
    assert not net.a.ups() and not net.b.ups()
    assert net.a.bytes_sent < 3600 * 200


def test_a_nat_rebinds_under_a_warm_pair() -> None:
    net = Net([uplink("a")], [public("b")])
    for end in net.ends:
        end.agent.busy(True)
    net.start()
    net.run(10)
    [before] = net.b.warm()
    net.rebind(net.a.uplinks[0])
    generation = net.a.agent.candidates()[0]
    took = net.run_until(lambda: any(key != before for key in net.b.warm()), 3)
    assert took < 1 + 4 * net.delay  # the next check of a, and b asks back
    net.run(5)
    [after] = net.b.warm()  # the old one is dead, and forgotten
    assert after.remote == net.a.uplinks[0].outside(Address(net.b.uplinks[0].ip, PORT), net.now)
    assert net.a.agent.candidates()[0] > generation  # and a knows what it looks like
    assert not any(isinstance(event, PairDown) for _, event in net.a.events)


def test_a_seen_address_is_forgotten_when_it_fails_and_another_works() -> None:
    agent, now = warm_agent(busy=True)
    seen = PATH._replace(remote=Address("198.51.100.7", 7))
    ask(agent, now, seen)
    sent = agent.datagrams_to_send(now)
    answer(agent, sent, now)
    while now < START + 20:  # only the other answers
        now += 0.005
        agent.handle_timer(now)
        answer(agent, [x for x in agent.datagrams_to_send(now) if x[0] == PATH], now)
    assert [pair.key for pair in agent.pairs()] == [PATH]
    assert [event for event in events(agent) if isinstance(event, PairDown)] == [
        PairDown(seen, "3 checks unanswered")
    ]


# lists of candidates


def test_lists_out_of_order_and_lost_ones() -> None:
    agent = agent_with()

    def one(number: int) -> list[Candidate]:
        return [Candidate(Address(f"198.51.100.{number}", PORT), Kind.HOST, 0, False)]

    def known() -> list[str]:
        return [pair.key.remote.host for pair in agent.pairs()]

    agent.remote_candidates(3, one(3), START)
    agent.remote_candidates(2, one(2), START)
    agent.remote_candidates(3, one(4), START)
    assert known() == ["198.51.100.3"]
    agent.send_failed(PATH._replace(remote=one(3)[0].address), START)
    agent.remote_candidates(3, one(3), START)  # again, and so no reason to try again
    assert [pair.state for pair in agent.pairs()] == [PairState.FAILED]
    agent.remote_candidates(9, one(9), START)
    assert known() == ["198.51.100.9"]
    answer(agent, agent.datagrams_to_send(START), START + 0.1)
    agent.remote_candidates(10, one(1), START)
    assert sorted(known()) == ["198.51.100.1", "198.51.100.9"]
    kept = agent.pair(PathKey(BASE.address, Address("198.51.100.9", PORT)))
    assert kept is not None and kept.state is WARM
    assert kept.kind is Kind.PRFLX and not kept.trusted


def test_a_port_forward_is_asked_when_the_peer_comes_to_another_address() -> None:
    agent = agent_with(PEER)
    now = START
    while now < START + 5.0:  # silence, long enough for the checks to be seconds apart
        now = max(now, agent.get_timer() or now) + EPSILON
        agent.handle_timer(now)
        agent.datagrams_to_send(now)
    fresh = Candidate(Address("192.168.7.7", PORT), Kind.HOST, 0, False)
    agent.remote_candidates(1, [fresh], now)
    asked = {key.remote for _, key, _ in advance(agent, now, now + 0.02)}
    assert asked == {PEER, fresh.address}


def test_trust() -> None:
    agent = agent_with(Address("198.51.100.1", 1))
    agent.remote_address(Address("198.51.100.2", 1), START, configured=False)
    agent.remote_candidates(1, [Candidate(Address("198.51.100.3", 1), Kind.RELAY, 9, True)], START)
    agent.remote_candidates(2, [], START)
    assert {pair.key.remote.host[-1]: pair.trusted for pair in agent.pairs()} == {
        "1": True,
        "2": False,
    }


def test_floods_are_bounded() -> None:
    rng = random.Random(1)
    agent = agent_with(PEER, uplinks=4)
    answer(agent, agent.datagrams_to_send(START), START + 0.01)
    warm = [pair.key for pair in agent.pairs() if pair.state is WARM]
    assert len(warm) == 4
    now, sent = START + 0.01, 0
    for generation in range(3000):
        now += 0.001
        candidates = [
            Candidate(
                Address(
                    str(
                        rng.choice(
                            [
                                f"198.51.{rng.randrange(256)}.1",
                                f"2001:db8::{rng.randrange(999)}",
                                "127.0.0.1",
                            ]
                        )
                    ),
                    rng.randint(1, 65535),
                ),
                rng.choice(list(Kind)),
                rng.randrange(256),
                rng.random() < 0.5,
            )
            for _ in range(rng.randrange(40))
        ]
        if generation % 2:
            agent.remote_candidates(generation, candidates, now)
        else:
            for candidate in candidates[:1]:
                ask(agent, now, PathKey(BASE.address, candidate.address), generation)
        agent.handle_timer(now)
        sent += len(agent.datagrams_to_send(now))
        pairs = agent.pairs()
        assert len(pairs) <= MAX_PAIRS
        assert len({pair.key.remote for pair in pairs}) <= MAX_REMOTES
    assert all(agent.pair(key) for key in warm)
    # 200 first checks a second, and 50 answers with a check back, for 3 s; some were repeated.
    assert sent < 3 * (200 + 2 * 50) + 400


# keeping warm


def warm_agent(*, busy: bool, rtt: float = 0.02) -> tuple[Agent, float]:
    agent = agent_with(PEER)
    agent.busy(busy)
    answer(agent, agent.datagrams_to_send(START), START + rtt)
    events(agent)
    return agent, START + rtt


def test_three_misses_and_a_warm_pair_is_down() -> None:
    agent, now = warm_agent(busy=True)
    agent.keep([PATH])
    sent = advance(agent, now, START + 1.6)
    # The check after a second, then twice more: 1.25 x 20 ms + 4 x 10 ms, doubled.
    assert [round(at - START, 3) for at, _, _ in sent] == [1.0, 1.065, 1.195]
    assert events(agent) == [PairDown(PATH, "3 checks unanswered")]
    pair = only(agent.pairs())
    assert (pair.state, pair.misses, pair.valid_since) == (PairState.FAILED, 3, None)
    assert pair.loss > 0.3
    again = advance(agent, START + 1.6, START + 5)
    assert START + 2.4 < again[0][0] < START + 2.5  # a second after it failed
    answer(agent, [(k, d) for _, k, d in again[-1:]], again[-1][0] + 0.02)
    assert [type(event) for event in events(agent)] == [PairUp]


def test_one_lost_check_is_repeated_after_its_timeout() -> None:
    agent, now = warm_agent(busy=False)
    sent = advance(agent, now, START + 15.07)
    assert [round(at - START, 3) for at, _, _ in sent] == [15.0, 15.065]
    answer(agent, [(sent[1][1], sent[1][2])], START + 15.09)
    [event] = events(agent)
    assert isinstance(event, PairAnswered)
    assert event.asked_at == sent[1][0] and event.rtt == pytest.approx(0.025)
    assert only(agent.pairs()).misses == 0
    assert agent.get_timer() == pytest.approx(START + 15.065 + 15)


def test_rates_of_many_warm_pairs() -> None:
    remotes = [Address(f"198.51.100.{number}", PORT) for number in range(1, 13)]
    agent = agent_with(*remotes, uplinks=2)
    agent.busy(True)
    now, counts = START, dict.fromkeys((k.key for k in agent.pairs()), 0)
    kept = agent.pairs()[-1].key
    agent.keep([kept])
    for _ in range(6200):
        agent.handle_timer(now)
        sent = agent.datagrams_to_send(now)
        answer(agent, sent, now + 0.001)
        for key, _ in sent:
            counts[key] += now > START + 1
        now += 0.005
    often = {key for key, count in counts.items() if count > 25}
    assert len(often) == 8 and kept in often
    assert len({key.local for key in often}) == 2
    assert all(1 <= count <= 3 for key, count in counts.items() if key not in often)


@pytest.mark.parametrize(("busy", "bytes_per_hour"), [(False, 39_360), (True, 3600 * 164)])
def test_what_a_warm_pair_costs(busy: bool, bytes_per_hour: int) -> None:
    net = Net([public("a")], [public("b")])
    for end in net.ends:
        end.agent.busy(busy)
    net.start()
    for end in net.ends:  # as long as those of a session
        other = net.other(end)
        end.agent.start(OURS if end is net.a else THEIRS, net.now)
        end.agent.remote_address(Address(other.uplinks[0].ip, PORT), net.now)
    net.run(60)
    before = [end.bytes_sent for end in net.ends]
    net.run(3600)
    spent = [end.bytes_sent - b for end, b in zip(net.ends, before, strict=True)]
    for end, sent in zip(net.ends, spent, strict=True):
        assert len(end.warm()) == 1
        assert sent == pytest.approx(bytes_per_hour, rel=0.01)
        assert sent / 3600 < 1000


def test_what_an_address_costs_that_never_answers() -> None:
    net = Net([uplink("a")], [public("b")])
    net.start()
    net.a.agent.remote_address(Address("198.51.100.99", 1), net.now)
    net.run(60)
    before = net.a.agent.counters["checks_sent"]
    net.run(3600)
    in_vain = net.a.agent.counters["checks_sent"] - before - 240
    assert 48 <= in_vain <= 80  # about one a minute


def test_no_path_ever_takes_more_than_1_kb_a_second() -> None:
    agent = agent_with(PEER)
    spent, now = 0, START
    for number in range(2000):
        now += 0.005
        ask(agent, now, number=number)  # 200 a second
        agent.check_now(now, [PATH])
        agent.handle_timer(now)
        spent += sum(len(data) for _, data in agent.datagrams_to_send(now))
    assert spent < 10 * 1000


def test_check_now_asks_at_once() -> None:
    agent, now = warm_agent(busy=False)
    agent.check_now(now + 1)
    assert [key for key, _ in agent.datagrams_to_send(now + 1)] == [PATH]
    agent.check_now(now + 1.001, [PATH, PATH._replace(remote=Address("192.0.2.1", 1))])
    assert [key for key, _ in agent.datagrams_to_send(now + 1.001)] == [PATH]
    # Asking without end hides no death.
    for number in range(100):
        agent.check_now(now + 1.01 + number / 100)
        agent.handle_timer(now + 1.01 + number / 100)
    assert any(isinstance(event, PairDown) for event in events(agent))


def test_check_now_gives_failed_pairs_a_turn() -> None:
    never = Address("198.51.100.9", 1)
    agent = agent_with(PEER, never)
    answer(agent, [x for x in agent.datagrams_to_send(START) if x[0] == PATH], START + 0.02)
    now = START + 0.02
    for key in (PATH, PATH._replace(remote=never)):
        agent.send_failed(key, now)
    agent.check_now(now + 0.1)
    assert [key for key, _ in agent.datagrams_to_send(now + 0.1)] == [PATH]
    agent.check_now(now + 6)  # nothing works: all
    assert {key.remote for _, key, _ in advance(agent, now + 6, now + 6.02)} == {PEER, never}


def test_twenty_checks_then_one_try_a_minute() -> None:
    agent = agent_with(PEER, uplinks=2)
    sent = advance(agent, START, START + 40)
    assert CHECKS_PER_ADDRESS <= len(sent) <= CHECKS_PER_ADDRESS + 1
    assert {pair.state for pair in agent.pairs()} == {PairState.FAILED}
    assert events(agent)[-1] == CandidatesChanged()  # none was up, so none is down
    later = advance(agent, START + 40, START + 400)
    assert 4 * 20 <= len(later) <= 7 * 21 + 7
    agent.remote_candidates(1, [Candidate(PEER, Kind.HOST, 0, False)], START + 401)
    assert len(agent.datagrams_to_send(START + 401)) == 2


def test_the_socket_refuses() -> None:
    agent, now = warm_agent(busy=True)
    agent.send_failed(PATH, now)
    agent.send_failed(PATH, now)
    assert events(agent) == [PairDown(PATH, "the socket refused to send")]
    assert agent.datagrams_to_send(now) == []
    assert [round(at - now, 3) for at, _, _ in advance(agent, now, now + 1.01)] == [1.0]
    agent.send_failed(PATH._replace(remote=Address("192.0.2.1", 1)), now)


# bases


def test_a_base_is_gone() -> None:
    agent, now = warm_agent(busy=True)
    agent.check_now(now)
    sent = agent.datagrams_to_send(now)
    agent.bases_changed(LocalNetwork(), [], now)
    assert agent.pairs() == []
    assert events(agent)[0] == PairDown(PATH, "address gone")
    assert agent.candidates()[1] == ()
    agent.bases_changed(local_network([uplink("a")]), bases_of([uplink("a")]), now)
    answer(agent, sent, now + 0.01)  # from before it was gone
    assert only(agent.pairs()).state is PairState.WAITING
    assert len(agent.datagrams_to_send(now + 0.01)) == 1


def test_a_route_is_gone_or_another_interface_has_the_address() -> None:
    agent, now = warm_agent(busy=True)
    network = local_network([uplink("a")])
    agent.bases_changed(replace(network, routes=()), bases_of([uplink("a")]), now)
    assert events(agent)[0] == PairDown(PATH, "no route")
    agent, now = warm_agent(busy=True)
    moved = uplink("a")
    moved.interface = "eth9"
    agent.bases_changed(local_network([moved]), bases_of([moved]), now)
    assert events(agent)[0] == PairDown(PATH, "address gone")
    assert only(agent.pairs()).state is PairState.WAITING


def test_a_base_is_only_paired_with_its_own_family() -> None:
    six = Address("2001:db8::1", PORT)
    agent = agent_with(PEER, six)
    assert [pair.key.remote for pair in agent.pairs()] == [PEER]
    link = uplink("a", 2)
    link.ip = "2001:db8:9::2"
    agent.bases_changed(local_network([uplink("a"), link]), bases_of([uplink("a"), link]), START)
    assert {(p.key.local.is_ipv6, p.key.remote.is_ipv6) for p in agent.pairs()} == {
        (False, False),
        (True, True),
    }


def test_the_same_network_again_is_no_news() -> None:
    agent = agent_with(PEER)
    advance(agent, START, START + 40)
    events(agent)
    links = [uplink("a")]
    agent.bases_changed(local_network(links), bases_of(links), START + 40)
    assert only(agent.pairs()).state is PairState.FAILED
    links.append(uplink("a", 2))
    agent.bases_changed(local_network(links), bases_of(links), START + 41)
    assert {pair.state for pair in agent.pairs()} == {PairState.WAITING}


def test_what_others_see_is_told() -> None:
    agent = agent_with(PEER)
    first = agent.candidates()[0]
    events(agent)
    agent.observed(BASE.address, Address("203.0.113.1", 7), START)
    agent.observed(Address("192.168.99.9", 1), Address("203.0.113.1", 8), START)  # no base
    agent.reflexive_changed({BASE.address: Address("203.0.113.1", 9)}, START)
    assert events(agent) == [CandidatesChanged()] * 2
    answer(agent, agent.datagrams_to_send(START), START + 0.1)
    assert CandidatesChanged() in events(agent)
    generation, candidates = agent.candidates()
    assert generation == first + 3
    assert [c.address.port for c in candidates] == [PORT, 9, 7, 40001]


def test_a_mapped_port_is_told_before_what_servers_see() -> None:
    """Unless there is another NAT behind the one that mapped it: then after."""
    agent = agent_with(PEER)
    agent.observed(BASE.address, Address("203.0.113.1", 7), START)
    agent.reflexive_changed({BASE.address: Address("203.0.113.1", 9)}, START)
    events(agent)

    def told(host: str) -> list[tuple[str, int]]:
        mapped = {BASE.address: Address(host, 8), Address("192.168.99.9", 1): Address(host, 1)}
        agent.mapped_ports_changed(mapped, START)
        assert events(agent) == [CandidatesChanged()]
        srflx = [c for c in agent.candidates()[1] if c.kind is Kind.SRFLX]
        assert {(c.rank, c.metered) for c in srflx} == {(BASE.rank, BASE.metered)}
        return [(c.address.host, c.address.port) for c in srflx]

    seen = [("203.0.113.1", 9), ("203.0.113.1", 7)]
    assert told("203.0.113.1") == [("203.0.113.1", 8), *seen]
    assert told("100.64.7.7") == [seen[0], ("100.64.7.7", 8), seen[1]]
    agent.mapped_ports_changed({}, START)
    assert len(agent.candidates()[1]) == 3
    agent.mapped_ports_changed({BASE.address: Address("203.0.113.1", 8)}, START)
    agent.bases_changed(LocalNetwork(), [], START)
    agent.bases_changed(local_network([uplink("a")]), bases_of([uplink("a")]), START)
    assert [c.kind for c in agent.candidates()[1]] == [Kind.HOST]  # what was is old


# anything at all


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=150)), max_size=8))
def test_fuzz(parts: list[tuple[int, bytes]]) -> None:
    agent = agent_with(PEER)
    [(key, request)] = agent.datagrams_to_send(START)
    transaction = check.transaction_id_of(request)
    good = [
        check.request(THEIRS, bytes(12), 1),
        check.response(THEIRS, transaction, PEER),
        b"",
        b"\x01\x01",
    ]
    for which, data in parts:
        head = good[which][:20]
        body = (
            head[:2] + len(data).to_bytes(2) + head[4:] + data if len(head) == 20 else head + data
        )
        agent.receive(body, key, START)
        agent.receive(good[which][: len(data)], key, START)
    assert not any(pair.state is WARM for pair in agent.pairs())


NATS = ("public", "forward", "open", "restricted", "restricted", "symmetric", "symmetric open")
BOUND = 80.0
"""Seconds: what never worked and changed without anybody being told is tried once a minute, up to
a quarter later. Whatever worked, or whose end knows of the change, is back within 15 s."""


def random_uplink(rng: random.Random, name: str, number: int) -> Uplink:
    nat = rng.choice(NATS)
    if nat == "public":
        link = public(name, number)
    else:
        link = uplink(
            name,
            number,
            forwarded=nat == "forward",
            restricted=nat not in ("open", "symmetric open"),
            symmetric=nat.startswith("symmetric"),
        )
    link.metric = number
    link.delay = rng.choice((0, 0, 0.02, 0.2)) * rng.random()
    return link


def reachable(one: Uplink, other: Uplink) -> bool:
    """Whether checks from both ends, without end, must come through."""
    if any(not link.up or link.black_hole for link in (one, other)):
        return False
    if any(link.forwarded or not (link.restricted or link.symmetric) for link in (one, other)):
        return True
    return not (one.symmetric or other.symmetric)


def proven(end: End, since: float) -> bool:
    return any(p.state is WARM and (p.answered_at or 0) > since for p in end.agent.pairs())


def run_case(seed: int) -> float | None:
    """Seconds from the last change until both ends have a warm pair; None: they cannot."""
    rng = random.Random(seed)
    a = [random_uplink(rng, "a", number) for number in range(1, rng.randint(2, 4))]
    b = [random_uplink(rng, "b", number) for number in range(1, rng.randint(2, 4))]
    net = Net(a, b, seed=seed, delay=rng.uniform(0.001, 0.06))
    net.loss = rng.choice((0, 0.05, 0.29)) * rng.random()
    net.signal_delay = lambda: rng.choice((0.01, 0.05, 0.5, 3)) * rng.random()
    for end in net.ends:
        end.agent.busy(rng.random() < 0.5)
    net.start()
    for _ in range(rng.randint(0, 5)):
        net.run(rng.choice((0.05, 1, 20, 60)) * rng.random())
        end = rng.choice(net.ends)
        link = rng.choice(end.uplinks)
        change = rng.choice(("link", "link", "hole", "rebind", "address"))
        if change == "link":
            link.up = not link.up
            link.forget()
            net.network_event(end)
        elif change == "hole":
            link.black_hole = not link.black_hole
        elif change == "rebind":
            net.rebind(link)
        elif link.ip != link.public_ip:
            link.ip = f"192.168.{rng.randint(100, 200)}.{rng.randint(2, 200)}"
            link.forget()
            net.network_event(end)
    if not any(reachable(one, other) for one in a for other in b):
        return None
    since = net.now
    return net.run_until(lambda: all(proven(end, since) for end in net.ends), BOUND)


@pytest.mark.slow
def test_whatever_can_be_reached_is_reached() -> None:
    took = [run_case(seed) for seed in range(500)]
    times = sorted(t for t in took if t is not None)
    assert len(times) > 250
    assert times[len(times) // 2] < 1.5
    assert times[len(times) * 95 // 100] < 16  # idle ends ask every 15 s


def test_what_is_routed_into_the_tunnel_later_is_left() -> None:
    """A base, a candidate of ours, and an address of the peer, by a peer that was added live."""
    agent = Agent(rng=random.Random(1), advertise=[Address("203.0.113.9", 9)])
    agent.start(OURS, START)
    links = [uplink("a"), uplink("b")]
    agent.bases_changed(local_network(links), bases_of(links), START)
    agent.remote_address(PEER, START)
    other = Address("198.51.100.77", 7)
    agent.remote_address(other, START)
    bases = {pair.key.local for pair in agent.pairs()}
    assert len(bases) == 2
    gone = min(bases)
    events(agent)
    agent.forbidden_changed(
        [ip_network(address) for address in ("203.0.113.9/32", "198.51.100.77/32", gone.host)]
    )
    (pair,) = agent.pairs()
    assert pair.key == PathKey(max(bases), PEER)
    assert [candidate.address for candidate in agent.candidates()[1]] == [max(bases)]
    assert CandidatesChanged() in events(agent)
    agent.remote_address(other, START)
    assert len(agent.pairs()) == 1
    agent.forbidden_changed([])
    agent.bases_changed(local_network(links), bases_of(links), START)
    assert len(agent.pairs()) == 2


# probes: checks on what is no pair


def test_an_answered_probe_makes_a_pair() -> None:
    made = agent_with()
    made.remote_candidates(1, [Candidate(PEER, Kind.SRFLX, 3, True)], START)
    made.datagrams_to_send(START)
    keys = [PathKey(BASE.address, Address(PEER.host, port)) for port in (50001, 50002, 50003)]
    made.probe(keys, START + 1)
    sent = made.datagrams_to_send(START + 1)
    assert [key for key, _ in sent] == keys
    assert not any(made.pair(key) for key in keys), "nothing is kept of them"
    assert len(advance(made, START + 1, START + 2)) < 10, "nor are they repeated"
    assert check.read_request(sent[1][1], THEIRS) is not None
    answer(made, [sent[1]], START + 1.1)
    [pair] = [pair for pair in made.pairs() if pair.state is WARM]
    assert pair.key == keys[1] and made.direct == {keys[1]}
    assert (pair.remote_rank, pair.metered) == (3, True), "as the peer says of that host"
    assert made.stray() is None


def test_a_forged_answer_to_a_probe_is_none() -> None:
    made = agent_with()
    key = PathKey(BASE.address, PEER)
    made.probe([key], START)
    [(_, request)] = made.datagrams_to_send(START)
    transaction = check.transaction_id_of(request)
    made.receive(
        check.response(replace(THEIRS, local_password="x" * 22), transaction, PEER), key, 1
    )
    elsewhere = PathKey(BASE.address, PEER._replace(port=1))
    answer(made, [(elsewhere, request)], START + 0.1)
    assert not made.pairs() and made.stray() is None


@pytest.mark.parametrize("asked", [True, False])
def test_what_comes_in_on_a_socket_that_is_no_base_is_told(asked: bool) -> None:
    made = agent_with()
    socket = replace(BASE, address=Address(BASE.address.host, 50001))
    key = PathKey(socket.address, PEER)
    made.probe([key], START)
    [probe] = made.datagrams_to_send(START)
    if asked:
        ask(made, START + 0.1, key)
        [(path, data)] = made.datagrams_to_send(START + 0.1)
        assert path == key and check.username_of(data) is None, "it is answered, too"
    else:
        answer(made, [probe], START + 0.1)
    assert made.stray() == key and made.stray() is None
    assert not made.pairs()
    link = uplink("a", 1)
    made.bases_changed(local_network([link]), [*bases_of([link]), socket], START + 0.2)
    made.socket_kept(key, START + 0.2)
    answer(made, made.datagrams_to_send(START + 0.2), START + 0.3)
    assert key in made.direct


def test_the_kind_of_nat_goes_with_the_list() -> None:
    made = agent_with()
    events(made)
    generation, _ = made.candidates()
    made.hard_changed(True, START)
    assert events(made) == [CandidatesChanged()]
    assert made.hard and made.candidates()[0] > generation
    made.hard_changed(True, START)
    assert not events(made)
    made.remote_candidates(2, [], START, hard=True)
    made.remote_candidates(1, [], START, hard=False)  # late
    assert made.peer_hard
    made.remote_candidates(3, [], START)
    assert made.peer_hard is None, "an older program, or not known any more"


# before there is a session


def word(count: int = 10) -> list[Candidate]:
    """So many addresses that some have no check of the first ones."""
    addresses = [Address(f"198.51.100.{n}", PORT) for n in range(1, count + 1)]
    return [Candidate(address, Kind.HOST, 0, False) for address in addresses]


def met(candidates: list[Candidate], *, fresh: bool, uplinks: int = 3) -> Agent:
    made = Agent(rng=random.Random(1))
    links = [uplink("a", number) for number in range(1, uplinks + 1)]
    made.bases_changed(local_network(links), bases_of(links), START)
    made.meet(OURS, 1, candidates, START, fresh=fresh)
    return made


def test_a_recording_is_worth_20_checks_however_often_it_comes() -> None:
    agent = met(word(), fresh=False)
    sent = advance(agent, START, START + 200)
    agent.meet(OURS, 1, word(), START + 200, fresh=False)
    agent.meet(OURS, 2, word(12), START + 201, fresh=False)
    sent += advance(agent, START + 201, START + 400)
    assert len(sent) == UNPROVEN_CHECKS
    assert len(advance(met(word(), fresh=True), START, START + 200)) > 10 * UNPROVEN_CHECKS


@pytest.mark.parametrize("late", [0.1, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("how", ["word", "check"])
def test_what_was_withheld_is_asked_once_the_peer_is_there(late: float, how: str) -> None:
    agent = met(word(), fresh=False)
    asked = {key for _, key, _ in advance(agent, START, START + late)}
    assert len(asked) == UNPROVEN_CHECKS
    now = START + late
    if how == "word":
        agent.meet(OURS, 1, word(), now, fresh=True)
    else:
        ask(agent, now, PathKey(next(iter(asked)).local, word()[0].address))
    withheld = {pair.key for pair in agent.pairs()} - asked
    assert len(withheld) == 3 * 10 - UNPROVEN_CHECKS
    assert withheld <= {key for _, key, _ in advance(agent, now, now + 0.3)}


def test_an_answer_proves_the_peer() -> None:
    agent = met(word(), fresh=False)
    first = agent.datagrams_to_send(START)
    answer(agent, first[:1], START + 0.02)
    assert len(advance(agent, START + 0.02, START + 60)) > 10 * UNPROVEN_CHECKS


def test_what_was_asked_counts_though_the_allowance_ends() -> None:
    """20 to one address, and not another 20 because the word was confirmed."""
    agent = met(word(1), fresh=False, uplinks=1)
    advance(agent, START, START + 8)
    agent.meet(OURS, 1, word(1), START + 8, fresh=True)
    total = agent.counters["checks_sent"]
    advance(agent, START + 8, START + 40)
    assert agent.counters["checks_sent"] - total <= CHECKS_PER_ADDRESS
    assert agent.counters["checks_sent"] <= CHECKS_PER_ADDRESS + 1


def test_both_kinds_of_credentials_are_answered_side_by_side() -> None:
    agent = met(word(1), fresh=True, uplinks=1)
    session = Credentials("ours-session", "r" * 32, "them-session", "s" * 32)
    agent.start(session, START + 1)
    agent.datagrams_to_send(START + 1)
    ask(agent, START + 1, PATH)
    sent = agent.datagrams_to_send(START + 1)
    assert any(check.username_of(data) is None for _, data in sent), "an answer"
    assert all(
        (name := check.username_of(data)) is None or name.startswith("them-session")
        for _, data in sent
    )
    assert agent.answers_to("ours-session") and agent.answers_to(OURS.local_ufrag)
    agent.stop()
    assert not agent.answers_to("ours-session") and not agent.answers_to(OURS.local_ufrag)
