"""NATs of every kind, simulated, and what is found of them: on a fake clock, with the real STUN.

host 192.168.1.2 --- [NAT 203.0.113.1] --- 10 ms --- 192.0.2.53, .54 (one server, RFC 5780)
                                               \\--- 192.0.2.80, 192.0.2.90 (plain ones)
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pytest
from aioice import stun

from tunnel.ice import check
from tunnel.ice.behaviour import (
    LIMIT,
    MAX_SERVERS,
    Behaviour,
    Discovery,
    Filtering,
    Mapping,
    Sockets,
    classify_mapping,
    is_cgnat,
)
from tunnel.path.network import Address, PathKey

Dependence = Literal["endpoint", "address", "port"]
KINDS: tuple[Dependence, ...] = ("endpoint", "address", "port")
MAPPINGS = dict(zip(KINDS, list(Mapping)[1:4], strict=True))
FILTERINGS = dict(zip(KINDS, Filtering, strict=False))
DELAY = 0.01
NOW = 1000.0


@dataclass
class Places:
    """The addresses of one family."""

    inside: str
    outside: str
    clever: tuple[str, str]
    plain: tuple[str, str]

    @property
    def sockets(self) -> Sockets:
        return Sockets(*(Address(self.inside, port) for port in (40001, 40002, 40003)))

    @property
    def server(self) -> Address:
        return Address(self.clever[0], 3478)

    @property
    def other(self) -> Address:
        return Address(self.clever[1], 3479)


V4 = Places(
    inside="192.168.1.2",
    outside="203.0.113.1",
    clever=("192.0.2.53", "192.0.2.54"),
    plain=("192.0.2.80", "192.0.2.90"),
)
V6 = Places(
    inside="fd00::2",
    outside="2001:db8::1",
    clever=("2001:db8:1::1", "2001:db8:1::2"),
    plain=("2001:db8:2::1", "2001:db8:2::2"),
)


@dataclass
class Nat:
    """RFC 4787: an axis for mapping, one for filtering, and hairpinning."""

    outside: str
    mapping: Dependence = "endpoint"
    filtering: Dependence = "port"
    hairpins: bool = False
    mappings: dict[object, tuple[Address, Address]] = field(default_factory=dict)
    contacts: dict[Address, set[Address]] = field(default_factory=dict)

    def out(self, inside: Address, remote: Address) -> Address:
        by = {"endpoint": None, "address": remote.host, "port": remote}[self.mapping]
        mapped = Address(self.outside, 20001 + len(self.mappings))
        _, mapped = self.mappings.setdefault((inside, by), (inside, mapped))
        self.contacts.setdefault(mapped, set()).add(remote)
        return mapped

    def into(self, mapped: Address, remote: Address) -> Address | None:
        inside = next((i for i, m in self.mappings.values() if m == mapped), None)
        contacts = self.contacts.get(mapped, set())
        lets_in = {
            "endpoint": True,
            "address": remote.host in {contact.host for contact in contacts},
            "port": remote in contacts,
        }
        return inside if lets_in[self.filtering] else None


@dataclass
class Firewall(Nat):
    """No translation; it filters all the same."""

    def out(self, inside: Address, remote: Address) -> Address:
        self.mappings[inside] = (inside, inside)
        self.contacts.setdefault(inside, set()).add(remote)
        return inside


class World:
    """The network between one host and the servers, and the time."""

    def __init__(self, nat: Nat, places: Places = V4, *, seed: int = 1) -> None:
        self.nat, self.places = nat, places
        self.rng = random.Random(seed)
        self.loss = 0.0
        self.mtu = 1500
        self.pads = True
        """Whether the servers answer padded questions."""
        self.changes = True
        """Whether the clever server really answers from elsewhere."""
        self.dead: set[str] = set()
        self.sent: list[tuple[float, PathKey, bytes]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.now = NOW

    def run(self, *servers: Address, link_mtu: int = 1500) -> Behaviour:
        sockets = self.places.sockets
        self.made = Discovery(sockets, servers, random.Random(7), self.now, link_mtu=link_mtu)
        self._pump()
        while not self.made.done:
            timer = self.made.get_timer()
            assert timer is not None
            if self._queue and self._queue[0][0] <= timer:
                self.now, _, action = heapq.heappop(self._queue)
                action()
            else:
                assert timer >= self.now, "it wants to be woken in the past"
                self.now = timer
                self.made.handle_timer(self.now)
            self._pump()
        assert self.made.get_timer() is None
        return self.made.behaviour()

    def _pump(self) -> None:
        for key, data in self.made.datagrams_to_send(self.now):
            self.sent.append((self.now, key, data))
            source = self.nat.out(key.local, key.remote)
            if key.remote.host == self.nat.outside:
                if self.nat.hairpins:
                    self._after(lambda s=source, t=key.remote, d=data: self._in(s, t, d))  # type: ignore[misc]
            elif len(data) + (48 if key.remote.is_ipv6 else 28) <= self.mtu:
                self._after(lambda s=source, t=key.remote, d=data: self._serve(s, t, d))  # type: ignore[misc]

    def _after(self, action: Callable[[], None]) -> None:
        if self.rng.random() >= self.loss:
            heapq.heappush(self._queue, (self.now + DELAY, next(self._order), action))

    def _in(self, source: Address, target: Address, data: bytes) -> None:
        inside = self.nat.into(target, source)
        if inside is not None:
            self.made.receive(data, PathKey(inside, source), self.now)

    def _serve(self, client: Address, server: Address, data: bytes) -> None:
        if server.host in self.dead or (not self.pads and len(data) > 100):
            return
        # The codec hides attributes that it does not know, such as the padding.
        request = stun.parse_message(data)
        answer = stun.Message(
            stun.Method.BINDING,
            stun.Class.RESPONSE,
            request.transaction_id,
            {"XOR-MAPPED-ADDRESS": tuple(client)},
        )
        one, two = self.places.clever
        source = server
        if server.host in (one, two):
            elsewhere = Address(two if server.host == one else one, 6957 - server.port)
            answer.attributes["OTHER-ADDRESS"] = tuple(elsewhere)
            change = request.attributes.get("CHANGE-REQUEST", 0) if self.changes else 0
            source = Address(
                elsewhere.host if change & 4 else server.host,
                elsewhere.port if change & 2 else server.port,
            )
        self._after(lambda: self._in(source, client, bytes(answer)))


both_families = pytest.mark.parametrize("places", [V4, V6], ids=["v4", "v6"])


@pytest.mark.parametrize("hairpins", [False, True])
@pytest.mark.parametrize("filtering", KINDS)
@pytest.mark.parametrize("mapping", KINDS)
@both_families
def test_every_kind_of_nat(
    places: Places, mapping: Dependence, filtering: Dependence, hairpins: bool
) -> None:
    world = World(Nat(places.outside, mapping, filtering, hairpins), places)
    found = world.run(places.server)
    assert found.mapping == MAPPINGS[mapping]
    assert found.filtering == FILTERINGS[filtering]
    # Each sends to what the server sees of the other: with dependent mapping, nobody but the
    # server was written to from there, so that a filter keeps everybody else out.
    assert found.hairpin is (hairpins and "endpoint" in (mapping, filtering))
    assert found.mapped == Address(places.outside, 20001)
    assert found.mapping.hard is (mapping != "endpoint")
    assert not found.udp_blocked and not found.cgnat
    assert found.path_mtu == 1500
    [seen] = found.servers
    assert seen.rtt == pytest.approx(2 * DELAY)


def test_nothing_is_sent_from_the_filtering_socket_to_where_answers_are_to_come_from() -> None:
    """Not even where that address is a server of the list."""
    world = World(Nat(V4.outside), V4)
    found = world.run(V4.server, V4.other, Address(V4.clever[1], 3478))
    assert found.filtering is Filtering.ADDRESS_AND_PORT_DEPENDENT
    asked = {key.remote for _, key, _ in world.sent if key.local == V4.sockets.filtering}
    assert asked == {V4.server}


@both_families
def test_no_nat(places: Places) -> None:
    found = World(Firewall(places.outside), places).run(places.server)
    assert found.mapping is Mapping.NO_NAT
    assert found.mapped == places.sockets.mapping
    assert found.filtering is Filtering.ADDRESS_AND_PORT_DEPENDENT
    assert found.hairpin is None
    open_host = World(Firewall(places.outside, filtering="endpoint"), places).run(places.server)
    assert open_host.filtering is Filtering.ENDPOINT_INDEPENDENT


@pytest.mark.parametrize("mapping", KINDS)
def test_plain_servers_tell_easy_from_hard(mapping: Dependence) -> None:
    servers = [Address(host, 3478) for host in V4.plain]
    found = World(Nat(V4.outside, mapping)).run(*servers)
    assert found.mapping.hard is (mapping != "endpoint")
    assert found.mapping is not Mapping.UNKNOWN
    assert found.filtering is Filtering.UNKNOWN
    assert found.hairpin is False


def test_one_plain_server_tells_only_the_mapping_it_sees() -> None:
    found = World(Nat(V4.outside)).run(Address(V4.plain[0], 3478))
    assert (found.mapping, found.mapped) == (Mapping.UNKNOWN, Address(V4.outside, 20001))


def test_udp_is_blocked() -> None:
    world = World(Nat(V4.outside))
    world.dead |= {*V4.clever, *V4.plain}
    found = world.run(V4.server, Address(V4.plain[0], 3478))
    assert found.udp_blocked and found.mapped is None
    assert (found.mapping, found.filtering) == (Mapping.UNKNOWN, Filtering.UNKNOWN)
    assert [seen.rtt for seen in found.servers] == [None, None]
    assert world.now - NOW <= LIMIT


def test_without_a_server_nothing_is_known_and_nothing_is_blocked() -> None:
    found = World(Nat(V4.outside)).run()
    assert not found.udp_blocked and found.mapping is Mapping.UNKNOWN


def test_one_of_two_servers_is_dead() -> None:
    world = World(Nat(V4.outside, "port"))
    world.dead.add(V4.plain[0])
    found = world.run(Address(V4.plain[0], 3478), V4.server)
    assert found.mapping is Mapping.ADDRESS_AND_PORT_DEPENDENT
    assert found.filtering is Filtering.ADDRESS_AND_PORT_DEPENDENT
    assert [seen.rtt is None for seen in found.servers] == [True, False]


def test_the_other_address_of_the_server_is_dead() -> None:
    """A server that promises what it cannot do, as one behind a NAT of its own."""
    world = World(Nat(V4.outside))
    world.dead.add(V4.clever[1])
    found = world.run(V4.server, Address(V4.plain[0], 3478))
    assert found.mapping is Mapping.ENDPOINT_INDEPENDENT, "by the plain one"
    assert World(Nat(V4.outside)).run(V4.server).mapping is Mapping.ENDPOINT_INDEPENDENT


def test_a_server_that_does_not_change_its_address_says_nothing_of_filters() -> None:
    world = World(Nat(V4.outside, filtering="endpoint"))
    world.changes = False
    assert world.run(V4.server).filtering is Filtering.UNKNOWN


@pytest.mark.parametrize(
    "other", [("192.0.2.53", 3479), ("192.0.2.54", 3478), ("127.0.0.1", 1), ("2001:db8::1", 1)]
)
def test_another_address_that_cannot_be_is_not_asked(other: tuple[str, int]) -> None:
    made = Discovery(V4.sockets, [V4.server], random.Random(1), NOW)
    [(key, request)] = made.datagrams_to_send(NOW)
    answer = stun.Message(
        stun.Method.BINDING,
        stun.Class.RESPONSE,
        check.transaction_id_of(request),
        {"XOR-MAPPED-ADDRESS": ("203.0.113.1", 5), "OTHER-ADDRESS": other},
    )
    assert made.receive(bytes(answer), key, NOW)
    asked = {key.remote for key, _ in made.datagrams_to_send(NOW + 0.2)}
    assert asked == {V4.server}


@pytest.mark.parametrize(("mtu", "found"), [(1500, 1500), (1492, 1492), (1450, 1400), (1279, 1228)])
def test_the_largest_packet_that_gets_through(mtu: int, found: int) -> None:
    world = World(Nat(V4.outside))
    world.mtu = mtu
    assert world.run(V4.server).path_mtu == found


def test_no_larger_packet_than_the_link_carries_is_tried() -> None:
    world = World(Nat(V4.outside))
    assert world.run(V4.server, link_mtu=1400).path_mtu == 1400
    assert max(len(data) for _, _, data in world.sent) == 1400 - 28


def test_the_path_mtu_is_unknown_where_no_padded_question_is_answered() -> None:
    world = World(Nat(V4.outside))
    world.pads = False
    assert world.run(V4.server).path_mtu is None


@pytest.mark.parametrize("seed", range(20))
def test_loss_costs_time_but_no_truth(seed: int) -> None:
    """Each question is asked three times."""
    world = World(Nat(V4.outside, "endpoint", "address", hairpins=True), seed=seed)
    world.loss = 0.05
    found = world.run(V4.server, Address(V4.plain[0], 3478))
    assert found.mapping is Mapping.ENDPOINT_INDEPENDENT
    assert found.filtering is Filtering.ADDRESS_DEPENDENT
    assert found.hairpin is True
    assert world.now - NOW <= LIMIT


def test_it_ends_in_time_whatever_happens() -> None:
    world = World(Nat(V4.outside, "port", "port"))
    world.run(V4.server, *(Address(host, 3478) for host in V4.plain), Address("192.0.2.99", 1))
    assert world.now - NOW <= LIMIT
    times = [at for at, _, _ in world.sent]
    assert times == sorted(times)


def test_a_bounded_number_of_servers_is_asked() -> None:
    world = World(Nat(V4.outside))
    found = world.run(*(Address(f"192.0.2.{n}", 3478) for n in range(100, 100 + 2 * MAX_SERVERS)))
    assert len(found.servers) == MAX_SERVERS


def test_answers_to_nobody_change_nothing() -> None:
    made = Discovery(V4.sockets, [V4.server], random.Random(1), NOW)
    [(key, request)] = made.datagrams_to_send(NOW)
    answer = bytes(
        stun.Message(
            stun.Method.BINDING,
            stun.Class.RESPONSE,
            check.transaction_id_of(request),
            {"XOR-MAPPED-ADDRESS": ("203.0.113.1", 5)},
        )
    )
    guessed = answer[:8] + bytes(12) + answer[20:]
    assert not made.receive(guessed, key, NOW)
    assert not made.receive(b"\x40" + answer[1:], key, NOW)
    assert made.receive(answer, PathKey(key.local, Address("192.0.2.66", 3478)), NOW)
    assert made.receive(answer, PathKey(V4.sockets.hairpin, V4.server), NOW)
    assert made.receive(request, key, NOW), "it was reflected"
    assert made.behaviour().mapped is None
    assert made.receive(answer, key, NOW)
    assert made.behaviour().mapped == Address("203.0.113.1", 5)


# what follows from what was seen

A1, A2, B1, B2 = (Address(host, port) for host in ("192.0.2.1", "192.0.2.2") for port in (1, 2))
X, Y, Z = (Address("203.0.113.1", port) for port in (1, 2, 3))
LOCAL = Address("192.168.1.2", 5)


@pytest.mark.parametrize(
    ("seen", "mapping"),
    [
        ({}, Mapping.UNKNOWN),
        ({A1: LOCAL}, Mapping.NO_NAT),
        ({A1: LOCAL, B1: X}, Mapping.ADDRESS_AND_PORT_DEPENDENT),
        ({A1: X}, Mapping.UNKNOWN),
        ({A1: X, A2: X}, Mapping.UNKNOWN),
        ({A1: X, A2: Y}, Mapping.ADDRESS_AND_PORT_DEPENDENT),
        ({A1: X, B1: X}, Mapping.ENDPOINT_INDEPENDENT),
        ({A1: X, B1: X, B2: X}, Mapping.ENDPOINT_INDEPENDENT),
        ({A1: X, B1: Y}, Mapping.ADDRESS_AND_PORT_DEPENDENT),
        ({A1: X, B1: Y, B2: Y}, Mapping.ADDRESS_DEPENDENT),
        ({A1: X, B1: Y, B2: Z}, Mapping.ADDRESS_AND_PORT_DEPENDENT),
        ({A1: X, B1: X, B2: Y}, Mapping.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
def test_classification(seen: dict[Address, Address], mapping: Mapping) -> None:
    assert classify_mapping(LOCAL, seen) is mapping


@pytest.mark.parametrize(
    ("local", "mapped", "router", "expected"),
    [
        ("192.168.1.2", "203.0.113.1", None, False),
        ("192.168.1.2", None, None, False),
        ("100.64.0.9", "203.0.113.1", None, True),
        ("192.168.1.2", "100.127.255.255", None, True),
        ("192.168.1.2", "8.8.8.8", "8.8.8.8", False),
        ("192.168.1.2", "8.8.8.8", "9.9.9.9", True),
        ("192.168.1.2", "8.8.8.8", "10.0.0.1", True),
        ("192.168.1.2", "8.8.8.8", "100.64.0.1", True),
        ("192.168.1.2", None, "8.8.8.8", False),
        ("2001:db8::1", "2001:db8::1", None, False),
    ],
)
def test_cgnat(local: str, mapped: str | None, router: str | None, expected: bool) -> None:
    assert is_cgnat(local, mapped, router) is expected
