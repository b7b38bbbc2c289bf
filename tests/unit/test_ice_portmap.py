"""Port mappings on a fake clock, with routers that are good, old, slow, forgetful, or liars."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.gateway import Gateway
from tunnel.ice import pcp
from tunnel.ice.portmap import (
    HERD,
    LIFETIME,
    RENEW_FLOOR,
    REST_FIRST,
    REST_LAST,
    ROUND_PAUSE,
    TRIES,
    TRY_AFTER,
    Event,
    ExternalChanged,
    PortMapping,
    Protocol,
    State,
    UpnpWanted,
    is_translated,
)
from tunnel.path.network import Address

BASE = Address("10.1.0.2", 4117)
SIX = Address("2001:db8::2", 4117)
OUTSIDE = Address("198.51.100.10", 4117)
START = 1000.0
SILENCE = sum(TRY_AFTER)
"""Seconds that a silent gateway is asked in one protocol."""


@dataclass
class World:
    """One mapping, one gateway (or nobody), and the time."""

    gateway: Gateway | None
    base: Address = BASE
    seed: int = 1
    upnp: Address | None = None
    """What UPnP brings, at once."""
    refuses: bool = False
    """ICMP says that nobody listens."""
    now: float = START
    sent: list[tuple[float, bytes]] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.mapping = PortMapping(self.base, nonce=b"n" * 12, rng=rng, now=self.now)

    def pump(self) -> None:
        mapping = self.mapping
        mapping.handle_timer(self.now)
        busy = True
        while busy:
            busy = False
            for data in mapping.datagrams_to_send(self.now):
                busy = True
                self.sent.append((self.now, data))
                if self.refuses:
                    mapping.refused(self.now)
                elif self.gateway is not None:
                    answer = self.gateway.answer(data, self.base.host, self.now)
                    if answer is not None:
                        mapping.receive(answer, self.now)
            while (event := mapping.next_event()) is not None:
                busy = True
                self.events.append((self.now, event))
                if isinstance(event, UpnpWanted):
                    mapping.upnp_answered(self.upnp, self.now)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        self.pump()
        spins = 0
        while (timer := self.mapping.get_timer()) is not None and timer <= until:
            spins = spins + 1 if timer <= self.now else 0
            assert spins < 5, "the timer spins"
            self.now = max(self.now, timer)
            self.pump()
        self.now = until

    def kinds(self) -> list[type[Event]]:
        return [type(event) for _, event in self.events]

    def rounds(self) -> list[float]:
        """When requests were sent, those of one moment together."""
        return sorted({at for at, _ in self.sent})


@pytest.mark.parametrize(
    ("speaks", "protocol", "requests"),
    [((2, 0), Protocol.PCP, 1), ((2,), Protocol.PCP, 1), ((0,), Protocol.NATPMP, 3)],
)
def test_a_good_gateway_is_asked_once(
    speaks: tuple[int, ...], protocol: Protocol, requests: int
) -> None:
    gateway = Gateway(speaks=speaks)
    world = World(gateway)
    world.run(1.0)
    assert (world.mapping.state, world.mapping.protocol) == (State.MAPPED, protocol)
    assert world.mapping.external == OUTSIDE
    assert len(world.sent) == requests
    assert gateway.leads_to(OUTSIDE.port, world.now) == tuple(BASE)
    assert world.kinds() == [ExternalChanged]


def test_upnp_is_the_last_resort() -> None:
    world = World(None, upnp=OUTSIDE)
    world.run(2 * SILENCE)
    assert world.mapping.external == OUTSIDE
    assert world.kinds() == [UpnpWanted, ExternalChanged]
    asked = [event for _, event in world.events if isinstance(event, UpnpWanted)]
    assert asked == [UpnpWanted(BASE.port)]


def test_a_silent_gateway_costs_little_and_is_left_in_peace() -> None:
    world = World(None)
    world.run(10.0)
    assert world.mapping.state is State.RESTING
    assert sum(len(data) for _, data in world.sent) == TRIES * (60 + 12 + 2)
    assert len(world.sent) == 3 * TRIES
    world.run(7 * 86400.0)
    begins = [at for at, data in world.sent if data[0] == 2][::TRIES]
    rests = [later - at for at, later in pairwise(begins)]
    assert rests[0] == pytest.approx(REST_FIRST, rel=0.15)
    assert rests == sorted(rests[:4]) + rests[4:]
    assert max(rests) == pytest.approx(REST_LAST, rel=0.15)
    assert len(begins) < 4 + 7 * 86400 / (0.9 * REST_LAST)


def test_a_refusal_by_icmp_ends_the_asking_at_once() -> None:
    world = World(None, refuses=True)
    world.run(10.0)
    assert len(world.sent) == 1
    assert world.kinds() == [UpnpWanted]
    assert world.mapping.state is State.RESTING
    six = World(None, base=SIX, refuses=True)
    six.run(10.0)
    assert len(six.sent) == 1 and six.kinds() == []  # UPnP is not for IPv6 here


@pytest.mark.parametrize("speaks", [(2, 0), (0,)])
def test_a_gateway_that_refuses_is_asked_in_all_ways(speaks: tuple[int, ...]) -> None:
    world = World(Gateway(speaks=speaks, result=2))
    world.run(60.0)
    assert world.mapping.state is State.RESTING
    assert world.kinds() == [UpnpWanted]
    assert len(world.sent) == 3


def test_lost_requests_are_repeated() -> None:
    gateway = Gateway()
    world = World(None)
    world.run(0.4)
    world.gateway = gateway
    world.run(1.0)
    assert world.mapping.protocol is Protocol.PCP and world.mapping.external == OUTSIDE
    assert [round(at - START, 3) for at in world.rounds()] == [0.0, 0.25, 0.75]


def test_another_port_is_given_and_kept() -> None:
    gateway = Gateway()
    gateway.mapped[BASE.port] = ("10.1.0.77", 1, START + 1e6, b"")
    world = World(gateway)
    world.run(4 * LIFETIME)
    assert world.mapping.external == OUTSIDE._replace(port=BASE.port + 1)
    assert world.kinds() == [ExternalChanged]  # also when the other one is asked for again


# in the course of time


@pytest.mark.parametrize("speaks", [(2,), (0,)])
@pytest.mark.parametrize("grants", [60, 3600, 7200])
def test_it_is_renewed_in_time_for_days(grants: int, speaks: tuple[int, ...]) -> None:
    gateway = Gateway(grants=grants, speaks=speaks)
    world = World(gateway)
    world.run(1.0)
    for _ in range(200):
        world.run(grants / 7)
        assert gateway.leads_to(OUTSIDE.port, world.now) == tuple(BASE)
    each = len(world.rounds()) / (200 / 7)
    assert 1.5 < each < 2.1  # a lifetime
    assert world.kinds() == [ExternalChanged]


def test_absurd_lifetimes_are_bounded() -> None:
    short = World(Gateway(grants=1))
    short.run(3600.0)
    assert len(short.rounds()) <= 3600 / RENEW_FLOOR + 1
    endless = World(Gateway(grants=0xFFFFFFFF))
    endless.run(1.0)
    assert endless.mapping.expires_at <= endless.now + 86400


def test_a_gateway_that_dies_is_asked_until_the_end_and_then_given_up() -> None:
    gateway = Gateway(grants=600)
    world = World(gateway)
    world.run(1.0)
    world.gateway = None
    world.run(550.0)
    kept = world.mapping.external
    assert kept == OUTSIDE  # it may live, and only not have heard us
    world.run(60.0 + 10.0)
    assert world.mapping.external is None
    assert world.mapping.state is State.RESTING
    assert world.kinds() == [ExternalChanged, ExternalChanged, UpnpWanted]
    assert len(world.rounds()) < 30


def test_a_lost_renewal_is_made_good() -> None:
    gateway = Gateway(grants=600)
    world = World(gateway)
    world.run(1.0)
    world.gateway = None
    world.run(400.0)
    world.gateway = gateway
    world.run(600.0)
    assert gateway.leads_to(OUTSIDE.port, world.now) == tuple(BASE)
    assert world.kinds() == [ExternalChanged]


def test_a_renewal_that_is_refused_ends_the_mapping() -> None:
    gateway = Gateway(grants=600)
    world = World(gateway)
    world.run(1.0)
    gateway.result = 2
    world.run(400.0)
    assert world.mapping.external is None
    assert world.kinds() == [ExternalChanged, ExternalChanged, UpnpWanted]


def test_a_new_external_address_is_told() -> None:
    gateway = Gateway(grants=600)
    world = World(gateway)
    world.run(1.0)
    gateway.external = "198.51.100.77"
    world.run(400.0)
    assert world.mapping.external == Address("198.51.100.77", BASE.port)
    assert world.kinds() == [ExternalChanged] * 2


@pytest.mark.parametrize("version", [2, 0])
def test_a_restart_is_heard(version: int) -> None:
    gateway = Gateway(speaks=(version,), restarted_at=START - 5000)
    world = World(gateway)
    world.run(100.0)
    gateway.restart(world.now)
    assert gateway.leads_to(OUTSIDE.port, world.now) is None
    world.mapping.announced(gateway.announcement(version, world.now), world.now)
    world.run(HERD + 0.1)
    assert gateway.leads_to(OUTSIDE.port, world.now) == tuple(BASE)


def test_announcements_without_a_restart_cost_nothing() -> None:
    gateway = Gateway(restarted_at=START - 5000)
    world = World(gateway)
    world.run(100.0)
    before = len(world.sent)
    for _ in range(100):
        world.run(1.0)
        world.mapping.announced(gateway.announcement(2, world.now), world.now)
        world.mapping.announced(b"\x02\x80garbage", world.now)
    world.run(60.0)
    assert len(world.sent) == before


def test_many_announced_restarts_do_not_make_us_a_flood() -> None:
    gateway = Gateway()
    world = World(gateway)
    world.run(100.0)
    before = len(world.rounds())
    for _ in range(600):
        gateway.restart(world.now)
        world.mapping.announced(gateway.announcement(2, world.now), world.now)
        world.run(0.1)
    assert len(world.rounds()) - before <= 60 / ROUND_PAUSE + 1


def test_a_resting_client_hears_that_there_is_a_gateway_now() -> None:
    world = World(None)
    world.run(60.0)
    world.gateway = Gateway()
    world.mapping.announced(world.gateway.announcement(2, world.now), world.now)
    world.run(0.1)
    assert world.mapping.external == OUTSIDE


# from outside


def test_again_asks_again_but_not_more_often_than_it_makes_sense() -> None:
    world = World(None)
    world.run(60.0)
    before = len(world.sent)
    for _ in range(100):
        world.mapping.again(world.now)
        world.run(0.5)
    rounds = [at for at, data in world.sent[before:] if data[0] == 2][::TRIES]
    assert 2 <= len(rounds) <= 50 / ROUND_PAUSE + 1
    gateway = Gateway()
    mapped = World(gateway)
    mapped.run(60.0)
    gateway.restart(mapped.now)
    mapped.mapping.again(mapped.now)
    mapped.run(0.1)
    assert gateway.leads_to(OUTSIDE.port, mapped.now) == tuple(BASE)


@pytest.mark.parametrize("speaks", [(2,), (0,)])
def test_it_is_given_back(speaks: tuple[int, ...]) -> None:
    gateway = Gateway(speaks=speaks)
    world = World(gateway)
    world.run(10.0)
    world.mapping.close(world.now)
    world.run(0.01)
    assert gateway.mapped == {} and world.mapping.done
    before = len(world.sent)
    world.run(86400.0)
    assert len(world.sent) == before


def test_giving_back_is_tried_three_times() -> None:
    world = World(Gateway())
    world.run(10.0)
    world.gateway = None
    before = len(world.sent)
    world.mapping.close(world.now)
    world.run(SILENCE + 0.1)
    assert len(world.sent) - before == TRIES and world.mapping.done


def test_what_was_asked_and_not_answered_is_given_back_too() -> None:
    gateway = Gateway()
    world = World(None)
    world.run(0.1)
    (asked,) = [data for _, data in world.sent]
    world.mapping.close(world.now)
    late = gateway.answer(asked, BASE.host, world.now)  # on its way when we closed
    assert late is not None
    world.mapping.receive(late, world.now)
    world.gateway = gateway
    world.run(1.0)
    assert gateway.mapped == {}


def test_what_is_not_of_the_gateway_is_not_given_back_to_it() -> None:
    for upnp in (OUTSIDE, None):
        world = World(None, upnp=upnp)
        world.run(10.0)
        before = len(world.sent)
        world.mapping.close(world.now)
        assert world.mapping.done and len(world.sent) == before


def test_a_restart_of_ours_takes_the_mapping_over() -> None:
    """The nonce is the same; with another one, the gateway takes us for a thief."""
    gateway = Gateway()
    World(gateway).run(1.0)
    again = World(gateway, seed=2)
    again.run(1.0)
    assert again.mapping.external == OUTSIDE
    thief = PortMapping(BASE, nonce=b"t" * 12, rng=random.Random(1), now=again.now)
    thief.handle_timer(again.now)
    (asked,) = thief.datagrams_to_send(again.now)
    thief.receive(gateway.answer(asked, BASE.host, again.now) or b"", again.now)
    assert thief.external is None


# answers that are not, or not for us


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:24] + b"x" * 12 + data[36:],  # another nonce
        lambda data: data[:36] + b"\x06" + data[37:],  # TCP
        lambda data: data[:40] + b"\x00\x01" + data[42:],  # another port of ours
        lambda data: data[:-1],
        lambda data: b"\x02\x01" + data[2:],  # a request
    ],
)
def test_answers_to_others_are_ignored(spoil: Callable[[bytes], bytes]) -> None:
    world = World(None)
    world.run(0.1)
    (asked,) = [data for _, data in world.sent]
    answer = Gateway().answer(asked, BASE.host, world.now) or b""
    world.mapping.receive(spoil(answer), world.now)
    assert world.mapping.external is None and world.mapping.state is State.ASKING
    world.mapping.receive(answer, world.now)
    assert world.mapping.external == OUTSIDE


@pytest.mark.parametrize("external", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"])
@pytest.mark.parametrize("speaks", [(2,), (0,)])
def test_external_addresses_that_cannot_be_are_none(external: str, speaks: tuple[int, ...]) -> None:
    world = World(Gateway(external=external, speaks=speaks))
    world.run(60.0)
    assert world.mapping.external is None and world.mapping.state is State.RESTING


def test_ipv6_needs_pcp() -> None:
    world = World(Gateway(), base=SIX)
    world.run(1.0)
    assert world.mapping.external == SIX
    silent = World(None, base=SIX)
    silent.run(10.0)
    assert silent.mapping.state is State.RESTING and silent.kinds() == []
    assert all(data[0] == 2 for _, data in silent.sent)


def test_unasked_answers_change_nothing() -> None:
    world = World(Gateway())
    world.run(10.0)
    other = Gateway(external="203.0.113.66")
    for data in (
        other.answer(pcp.pcp_map(BASE, b"n" * 12, lifetime=60, port=1), BASE.host, world.now),
        other.answer(pcp.natpmp_address(), BASE.host, world.now),
        other.answer(pcp.natpmp_map(BASE.port, lifetime=60, external=1), BASE.host, world.now),
    ):
        world.mapping.receive(data or b"", world.now)
    world.mapping.upnp_answered(Address("203.0.113.66", 1), world.now)
    assert world.mapping.external == OUTSIDE and world.kinds() == [ExternalChanged]


def test_double_nat_is_told_apart() -> None:
    for host in ("10.0.0.1", "172.31.255.1", "192.168.178.20", "100.64.0.1", "100.127.9.9"):
        assert is_translated(host), host
    for host in ("172.32.0.1", "100.128.0.1", "198.51.100.10", "2001:db8::1"):
        assert not is_translated(host), host


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=60)), max_size=40))
def test_nothing_that_is_received_breaks_it(steps: list[tuple[int, bytes]]) -> None:
    gateway = Gateway(grants=100)
    world = World(gateway)
    for step, data in steps:
        if step == 0:
            world.mapping.receive(data, world.now)
        elif step == 1:
            world.mapping.receive(b"\x02\x81" + data, world.now)
        elif step == 2:
            world.mapping.receive(b"\x00\x81" + data, world.now)
        elif step == 3:
            world.mapping.announced(data, world.now)
        elif step == 4:
            world.gateway = None if world.gateway else gateway
        elif step == 5:
            world.mapping.refused(world.now)
        elif step == 6:
            world.mapping.upnp_answered(OUTSIDE if data else None, world.now)
        elif step == 7:
            world.mapping.again(world.now)
        elif step == 8 and data:
            gateway.restart(world.now)
        world.run(float(len(data)))
    world.mapping.close(world.now)
    world.run(10.0)
    assert world.mapping.done
