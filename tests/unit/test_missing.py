"""What is said to be in the way of a peer, for everything that can be known here."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tunnel.config import Endpoint
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import Candidate, Kind, Relay
from tunnel.ice.pair import PairState
from tunnel.missing import BAD_CERTIFICATE, Here, Refusal, obstacles, udp_obstacle
from tunnel.obstacle import Obstacle, broker_remedy, certificate_reason, relay_remedy
from tunnel.path.network import Address

PRIVATE = Candidate(Address("192.168.1.2", 4117), Kind.HOST, 0, False)
PUBLIC = Candidate(Address("203.0.113.2", 4117), Kind.SRFLX, 0, False)
UDP = Obstacle("udp", "it is blocked")
MET: dict[str, Any] = {"connected": True, "wanted": True, "present": True, "heard_s": 1.0}
NAMED, LITERAL = Endpoint("b.example", 4117), Endpoint("203.0.113.2", 4117)
RELAY = Relay(Address("192.0.2.9", 50000), "eth0", "192.168.1.9", "turn:t.example", "tcp")


@dataclass
class FakeAgent:
    candidates: tuple[Candidate, ...] = (PRIVATE, PUBLIC)
    kinds: dict[Kind, PairState] = field(default_factory=lambda: {Kind.SRFLX: PairState.FAILED})

    def named(self) -> list[Candidate]:
        return list(self.candidates)

    def pairs(self) -> list[Any]:
        return [SimpleNamespace(kind=kind, state=state) for kind, state in self.kinds.items()]


def told(agent: FakeAgent | None = None, **known: Any) -> list[Obstacle]:
    given: dict[str, Any] = {
        "here": Here(), "endpoints": (), "resolved": (), "refusal": None, "meeting": None,
    }  # fmt: skip
    return obstacles(agent=cast(Agent, agent or FakeAgent()), **{**given, **known})


@pytest.mark.parametrize(
    ("known", "about", "words"),
    [
        ({"here": Here(network=False), "meeting": MET}, ["network"], "no network"),
        ({}, ["endpoint"], "has to dial us"),
        ({"endpoints": (NAMED,)}, ["name"], "getent hosts b.example"),
        ({"endpoints": (LITERAL,), "resolved": [PUBLIC.address]}, ["dialled"], "did not answer"),
        ({"meeting": {**MET, "connected": False}}, ["broker"], "no broker"),
        ({"meeting": {**MET, "heard_s": None}}, ["unheard"], "another broker"),
        ({"meeting": {**MET, "heard_s": 1000.0}}, ["gone"], "not answer at the rendezvous"),
        ({"meeting": {**MET, "present": False}}, ["gone"], "not answer at the rendezvous"),
        ({"meeting": MET}, ["no-way"], "add a relay"),
        ({"meeting": MET, "here": Here(turn=True)}, ["no-way"], "martlet status says why"),
        ({"meeting": MET, "here": Here(udp=UDP)}, ["udp", "no-way"], "it is blocked"),
        ({"meeting": MET, "here": Here(udp=UDP, relayed=True)}, ["no-way"], ""),
        ({"refusal": Refusal(BAD_CERTIFICATE, "x")}, ["key"], "martlet pubkey"),
        ({"refusal": Refusal(0x10A, "")}, ["refused"], "connection error 0x10a"),
        (
            {"endpoints": (LITERAL,), "resolved": [PUBLIC.address], "refusal": Refusal(1, "no")},
            ["refused"],
            "no; see its log",
        ),
        (
            {"endpoints": (NAMED,), "meeting": {**MET, "heard_s": None}},
            ["name", "unheard"],
            "no address is known",
        ),
    ],
)
def test_obstacles(known: dict[str, Any], about: list[str], words: str) -> None:
    found = told(**known)
    assert [each.about for each in found] == about
    assert words in " ".join(map(str, found))
    assert all(each.remedy for each in found if each is not UDP)


def test_a_peer_without_an_address_outside() -> None:
    (found,) = told(FakeAgent((PRIVATE,)), meeting=MET)
    assert found.about == "udp-there" and "add a relay" in found.remedy
    (found,) = told(FakeAgent((PRIVATE,)), meeting=MET, here=Here(relayed=True))
    assert found.about == "udp-there" and "relay" not in found.remedy


def test_a_way_that_answers_is_no_obstacle() -> None:
    assert told(FakeAgent(kinds={Kind.HOST: PairState.WARM}), meeting=MET) == []


def test_a_relay_that_leads_nowhere() -> None:
    (found,) = told(FakeAgent(kinds={Kind.RELAY: PairState.FAILED}), meeting=MET)
    assert "the relay does not answer either" in found.problem


@pytest.mark.parametrize(
    ("relays", "implied", "turn", "words"),
    [
        ((), False, False, ("STUN servers are down", "b.example:4117", "add a relay")),
        ((), True, False, ("no STUN server beside the broker", "add a relay")),
        ((), False, True, ("UDP is blocked here", "martlet status says why")),
        ((RELAY,), False, True, ("UDP is blocked here", "reached by the relay")),
    ],
)
def test_silent_stun_servers(
    relays: tuple[Relay, ...], implied: bool, turn: bool, words: tuple[str, ...]
) -> None:
    found = udp_obstacle([NAMED], relays, implied=implied, turn=turn)
    assert found.about == "udp"
    assert all(word in str(found) for word in words), found


def test_a_relay_over_udp_shows_that_udp_is_not_blocked() -> None:
    relay = Relay(RELAY.address, RELAY.interface, RELAY.ip, RELAY.server, "udp")
    found = udp_obstacle([NAMED], [relay], implied=False, turn=True)
    assert found.about == "stun" and "check stun" in found.remedy


def test_a_certificate_that_is_not_valid_now_points_to_the_clock() -> None:
    for code in (9, 10):
        assert certificate_reason(code) == "validity"
    assert certificate_reason(18) == "tls"
    for remedy in (broker_remedy, relay_remedy):
        assert "date -u" in remedy("validity") and "date -u" not in remedy("tls")
        assert remedy("other") == ""
