"""Attackers: off the path, on the path, and inside (a peer with the right key and bad manners)."""

from __future__ import annotations

import random

import pytest
from aioquic.buffer import encode_uint_var
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.sim.flows import Flow
from tests.sim.test_moves import OWD, RTT, a_eth, a_wlan, b_eth, b_wlan, running
from tests.sim.world import PORT, Host, World, numbered
from tunnel.control import ApplicationError, CandidateEntry, Candidates, Hello, encode
from tunnel.datapath.engine import Datapath
from tunnel.events import PeerRefused
from tunnel.ice.checklist import PACE
from tunnel.ice.pair import CHECKS_PER_ADDRESS, PairState
from tunnel.identity import Identity
from tunnel.path.network import Address, PathKey
from tunnel.quic.admission import MAX_HALF_OPEN, RETRY_ABOVE, token_maker
from tunnel.quic.base import MAX_PATHS
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection
from tunnel.quic.control_stream import CONTROL_STREAM, Ended, Session

EVIL = Address("192.0.2.66", 6666)
TO_A = Address("203.0.113.1", 40001)
TO_B = Address("198.51.100.1", PORT)
KIND_PACKET, KIND_COPY, KIND_PART = 0, 1, 2  # docs/protocol.md, Datagram payload


def hello(seed: int = 9) -> Hello:
    return Hello(
        version=1, features=(), addresses=("10.88.0.1",), boot_id=random.Random(seed).randbytes(16)
    )


class Hand:
    """A dialler driven by hand, at an address of its own."""

    def __init__(self, world: World, identity: Identity, *, token: bool = True, port: int = 6666):
        self.world = world
        self.here = Address(EVIL.host, port)
        expected = world.b.identity.public_key.raw
        self.connection = PeerConnection(
            configuration=connection_configuration(
                identity, is_client=True, keylog=None, quic_logger=None
            ),
            path=PathKey(self.here, TO_B),
            datapath=Datapath(),
            accepts=lambda key: key == expected,
            reset_token=lambda cid: bytes(16),
            initial_token=token_maker(expected) if token else None,
        )
        self.session = Session(self.connection, dialled=True, now=world.now)
        self.ended: Ended | None = None
        self.heard = 0
        self.armed: float | None = None
        world.outsiders[EVIL.host] = self._arrived
        self.connection.dial(world.now)
        self.flush()

    def _arrived(self, source: Address, target: Address, data: bytes) -> None:
        if target != self.here:
            return
        self.heard += 1
        self.connection.receive_datagram(data, PathKey(self.here, source), self.world.now)
        self.flush()

    def flush(self) -> None:
        for event in self.session.events():
            if isinstance(event, Ended):
                self.ended = event
        for data, _ in self.connection.datagrams_to_send(self.world.now):
            self.world.deliver(self.here, TO_B, data, OWD)
        timer = self.connection.get_timer()
        if timer is not None and timer != self.armed:
            self.armed = timer
            self.world.at(max(timer, self.world.now) + 0.0001, lambda: self._fire(timer))

    def _fire(self, due: float) -> None:
        if due == self.armed:
            self.armed = None
            self.connection.handle_timer(self.world.now)
            self.flush()

    def say(self, data: bytes) -> None:
        self.connection.send_stream_data(CONTROL_STREAM, data)
        self.flush()


# off the path


def test_junk_from_anywhere_changes_nothing() -> None:
    pair = running(a=[a_eth(restricted=False)])
    world, rng = pair.world, random.Random(1)
    cids = [list(host.node._by_cid) for host in world.hosts.values()]
    for number in range(3000):
        data = bytearray(rng.randbytes(rng.choice([1, 20, 29, 60, 200, 1200, 1472])))
        target, known = (TO_A, cids[0]) if number % 2 else (TO_B, cids[1])
        kind = rng.randrange(4)
        if kind == 1 and len(data) > 9:  # a short packet with a right connection ID
            data[0] = 0x40 | data[0] & 0x3F
            data[1:9] = rng.choice(known)
        elif kind == 2 and len(data) > 30:  # a long one of version 1
            data[0] |= 0xC0
            data[1:6] = bytes((0, 0, 0, 1, 8))
        source = rng.choice([EVIL, TO_A, TO_B, Address("192.0.2.7", rng.randrange(1, 65535))])
        world.deliver(source, target, bytes(data), rng.random())
    at = world.now
    world.run(1.5)
    assert pair.from_a.lost(since=at, until=world.now - 0.1) == []
    assert pair.from_b.lost(since=at, until=world.now - 0.1) == []
    for name, host in world.hosts.items():
        session = world.peer(name).session
        assert session is not None
        assert len(host.node._owners) == 1
        assert len(host.node._by_cid) <= 32
        assert len(session.connection.paths()) == 1
        assert host.node.history() == []
    pair.finish()


def test_answers_to_junk_are_few_and_smaller_than_it() -> None:
    """No amplification, no reset storms."""
    world = World(delay=OWD)
    world.boot("b")
    answers: list[int] = []
    world.outsiders[EVIL.host] = lambda source, target, data: answers.append(len(data))
    rng = random.Random(2)
    for number in range(2000):
        data = bytes((0x40 | rng.randrange(64),)) + rng.randbytes(rng.choice([28, 41, 60]))
        world.deliver(EVIL, TO_B, data, number / 1000)
    world.run(3.0)
    assert len(answers) <= 3 * 20
    assert all(size < 42 for size in answers)


@pytest.mark.parametrize("lag", [0.0001, 0.05, 1.5])
def test_replayed_packets_move_nobody(lag: float) -> None:
    """Everything both ends ever sent comes again, later, from elsewhere."""
    pair = running(a=[a_eth(restricted=False)])
    world = pair.world

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        world.deliver(EVIL, key.remote, data, OWD + lag)

    world.tap = tap
    at = world.now
    world.run(2.0)
    for name in "ab":
        session = world.peer(name).session
        assert session is not None
        assert [path.addr.remote for path in session.connection.paths() if path] != []
        assert all(path.addr.remote != EVIL for path in session.connection.paths())
        assert world.hosts[name].node.history() == []
    assert pair.from_a.lost(since=at, until=world.now - 0.1) == []
    assert pair.from_b.lost(since=at, until=world.now - 0.1) == []
    world.tap = None
    pair.finish()


@pytest.mark.parametrize("fate", ["dropped", "forwarded"])
@pytest.mark.parametrize("victims", ["a", "b", "ab"])
def test_forwarding_attacker_captures_nothing(victims: str, fate: str) -> None:
    """RFC 9000 section 9.3.3: packets reach the other end faster, from the attacker's address.

    What is answered to that address is dropped, or carried on to the victim.
    """
    pair = running(a=[a_eth(restricted=False)])
    world = pair.world

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        if host.name in victims and key.remote != EVIL:
            world.deliver(EVIL, key.remote, data, OWD / 2)

    def outsider(source: Address, target: Address, data: bytes) -> None:
        if fate == "forwarded":
            world.deliver(EVIL, TO_A if source == TO_B else TO_B, data, OWD / 2)

    world.tap, world.outsiders[EVIL.host] = tap, outsider
    at = world.now
    world.run(5.0)
    for flow in (pair.from_a, pair.from_b):
        assert flow.silence(at) <= RTT + 0.05
        assert len(flow.lost(since=at, until=world.now - 0.2)) <= 0.01 * len(flow.sent)
        assert flow.duplicated == 0
    moves = sum(len(host.node.history()) for host in world.hosts.values())
    assert moves <= 30, "the attacker keeps the ends busy"
    world.tap = None
    world.outsiders[EVIL.host] = lambda source, target, data: None
    end = world.now
    world.run(1.0)
    for flow in (pair.from_a, pair.from_b):
        assert flow.lost(since=end + 0.2, until=world.now - 0.1) == []
    assert world.active("a").remote == TO_B
    assert world.active("b").remote == TO_A
    pair.finish()


def test_an_attacker_that_moves_in_when_the_victim_really_moves() -> None:
    """The true move comes while a forwarder is at work and swallows the answers.

    As long as it wins every race nothing can be promised; when it stops, the move succeeds.
    """
    pair = running(a=[a_eth(restricted=False)])
    world = pair.world

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        if host.name == "a":
            world.deliver(EVIL, key.remote, data, OWD / 2)

    world.tap = tap
    world.outsiders[EVIL.host] = lambda source, target, data: None
    world.run(1.0)
    world.rebind(world.a.uplinks[0])
    world.run(3.0)
    world.tap = None
    end = world.now
    world.run_until(lambda: pair.from_a.alive(end) and pair.from_b.alive(end), 2.0)
    world.run(1.0)
    pair.finish(sessions=None)


# strangers at the door


def test_an_initial_without_the_mac_gets_silence() -> None:
    world = World(delay=OWD)
    world.boot("b")
    stranger = Hand(world, Identity(Ed25519PrivateKey.generate()), token=False)
    world.run(1.0)
    assert stranger.heard == 0
    assert world.b.node._owners == {}
    assert world.b.node.counters["strangers"] >= 1


def test_a_stranger_who_knows_the_public_key_is_refused() -> None:
    pair = running()
    world = pair.world
    stranger = Hand(world, Identity(Ed25519PrivateKey.generate()))
    world.run(1.0)
    assert stranger.ended is not None
    assert stranger.ended.application is None
    world.run(6.0)
    assert len(world.b.node._owners) == 1
    assert any(isinstance(e, PeerRefused) and e.peer is None for _, e in world.b.events)
    pair.finish()


def test_a_flood_of_half_open_handshakes_is_bounded() -> None:
    """First Initials with the right MAC from a thousand ports: Retry, then silence."""
    pair = running()
    world = pair.world
    identity = Identity(Ed25519PrivateKey.generate())
    for number in range(80):
        hand = Hand(world, identity, port=7000 + number)
        world.outsiders[EVIL.host] = lambda source, target, data: None
        hand.armed = -1.0  # it never sends anything again
    world.run(0.05)
    assert len(world.b.node._owners) <= RETRY_ABOVE + 1 + 1 < MAX_HALF_OPEN
    assert world.b.node.counters["retries"] >= 40
    world.run(10.0)
    assert len(world.b.node._owners) == 1
    pair.finish()


def test_a_first_initial_replayed_elsewhere() -> None:
    world = World(delay=OWD)
    initials: list[bytes] = []

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        if host.name == "a" and len(initials) < 1:
            initials.append(data)

    world.tap = tap
    world.boot()
    world.run_until(lambda: world.both_up, 2.0)
    world.run(1.0)
    for number in range(50):
        world.deliver(Address("192.0.2.7", 1000 + number), TO_B, initials[0], number * 0.01)
    flow = Flow(world, "a")
    world.run(7.0)
    assert flow.lost(until=world.now - 0.1) == []
    assert world.both_up
    assert len(world.b.node._owners) == 1


def test_a_racing_copy_of_the_first_initial() -> None:
    """Somebody forwards the dialler's first packet faster, from elsewhere, and swallows answers."""
    world = World(delay=OWD)
    seen = 0

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            world.deliver(EVIL, key.remote, data, OWD / 2)

    world.tap = tap
    world.outsiders[EVIL.host] = lambda source, target, data: None
    world.boot()
    world.run_until(lambda: world.both_up, 2.0)
    flow, back = Flow(world, "a"), Flow(world, "b")
    world.run(2.0)
    assert flow.lost(until=world.now - 0.1) == []
    assert back.lost(until=world.now - 0.1) == []


# with the right key


BAD_CONTROL = [
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff" + bytes(100),
    b"\x00\x00\x00\x05hello",
    b"\x00\x00\x10\x00" + b"\x91" * 4096,
    encode(hello()).replace(b"version\x01", b"version\xc0"),
    encode(hello())[:4] + bytes(len(encode(hello())) - 4),
]


@pytest.mark.parametrize("garbage", BAD_CONTROL, ids=range(len(BAD_CONTROL)))
def test_garbage_on_the_control_stream_closes_by_name(garbage: bytes) -> None:
    world = World(delay=OWD)
    world.boot("b")
    hand = Hand(world, world.a.identity)
    world.run(0.2)
    hand.say(garbage)
    world.run(1.0)
    assert hand.ended is not None
    assert hand.ended.application is ApplicationError.MALFORMED_CONTROL
    world.run(3.0)
    assert world.b.node._owners == {}
    world.boot("a")
    world.run_until(lambda: world.both_up, 2.0)


def test_silence_after_the_handshake_is_not_waited_for_for_ever() -> None:
    world = World(delay=OWD)
    world.boot("b")
    hand = Hand(world, world.a.identity)
    world.run(10.0)
    assert hand.ended is not None
    assert world.b.node._owners == {}


def test_a_hello_again_and_again() -> None:
    world = World(delay=OWD)
    world.boot("b")
    hand = Hand(world, world.a.identity)
    world.run(0.2)
    for number in range(80):
        hand.say(encode(hello(number)))
        world.run(0.01)
    assert world.peer("b").counters["handshakes"] == 1
    assert len(world.b.node._owners) == 1


def test_an_unknown_version_is_told_so() -> None:
    world = World(delay=OWD)
    world.boot("b")
    hand = Hand(world, world.a.identity)
    world.run(0.2)
    hand.say(encode(Hello(version=77, features=(), addresses=("10.88.0.1",), boot_id=bytes(16))))
    world.run(1.0)
    assert hand.ended is not None
    assert hand.ended.application is ApplicationError.UNSUPPORTED_VERSION


def part(identifier: int, offset: int, last: int, data: bytes) -> bytes:
    head = bytes((KIND_PART,)) + encode_uint_var(identifier) + encode_uint_var(offset)
    return head + bytes((last,)) + data


def test_malformed_datagrams_are_counted_and_dropped() -> None:
    pair = running()
    world = pair.world
    pair.from_a.stop()
    world.run(0.1)
    session = world.peer("a").session
    assert session is not None
    good = numbered("a", 7, flow=9)
    copy = bytes((KIND_COPY,))
    payloads = [
        b"",
        bytes((KIND_PACKET,)),
        bytes((KIND_PACKET,)) + bytes(3),
        bytes((KIND_PACKET,)) + b"\x45" + bytes(10),
        bytes((KIND_PACKET,)) + b"\x60" + bytes(30),
        bytes((KIND_PACKET,)) + good[:-5],  # shorter than it says
        bytes((9,)) + good,
        bytes((0xFF,)) * 40,
        copy,
        copy + b"\xc0",
        copy + encode_uint_var(1 << 50),
        copy + encode_uint_var(1 << 51) + copy + encode_uint_var(3) + good,  # never nests
        bytes((KIND_PART,)),
        part(1, 0, 7, b"x"),
        part(1, 0, 0, b""),
        part(1, 65530, 1, bytes(100)),
        part(2, 0, 0, bytes(100)),
        part(2, 50, 1, bytes(100)),  # overlaps
        part(3, 0, 1, b"\x45"),
        *[part(100 + n, 0, 0, bytes(1000)) for n in range(500)],
    ]
    lane = world.peer("b").lane
    before = lane.counters
    for payload in payloads:  # one in each packet, whose number is what names it
        session.connection.send_datagram_frame(payload)
        world.pump(world.a)
        world.run(0.004)
    world.run(0.1)
    counters = {name: count - before[name] for name, count in lane.counters.items()}
    assert counters["rx_packets"] == 0
    assert counters["malformed_datagrams"] >= 8 + 2
    assert counters["refused_packets"] >= 4
    after = Flow(world, "a", flow=3)
    world.run(0.5)
    assert after.lost(until=world.now - 0.1) == []


def test_a_source_that_is_not_the_peers_is_dropped_and_counted() -> None:
    pair = running()
    world = pair.world
    forged = bytearray(numbered("a", 1, flow=8))
    forged[12:16] = bytes((10, 88, 0, 77))
    for _ in range(5):
        world.peer("a").lane.push(bytes(forged), world.now)
    world.pump(world.a)
    world.run(0.2)
    assert world.peer("b").lane.counters["refused_packets"] == 5
    assert all(packet[12:16] != forged[12:16] for _, packet in world.b.received)
    pair.finish()


def test_a_peer_that_claims_a_thousand_addresses() -> None:
    """Whoever holds the key may move, but not make us remember, or send, without bound."""
    pair = running(a=[a_eth(restricted=False)])
    world = pair.world
    count = 0

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        nonlocal count
        if host.name == "a":
            count += 1
            world.deliver(Address(f"192.0.2.{count % 250 + 1}", count % 60000 + 1), TO_B, data, 0.0)

    strays = 0

    def stray(source: Address, target: Address, data: bytes) -> None:
        nonlocal strays
        strays += len(data)

    for number in range(1, 251):
        world.outsiders[f"192.0.2.{number}"] = stray
    world.tap = tap
    before = world.a.bytes_sent
    world.run(1.0)
    session = world.peer("b").session
    assert session is not None
    assert len(session.connection.paths()) <= MAX_PATHS
    assert strays <= 3 * (world.a.bytes_sent - before)
    world.tap = None
    world.run(1.0)
    pair.finish()


@pytest.mark.parametrize("spoofs", [False, True])
def test_an_attacker_who_forwards_checks_too_captures_nothing(spoofs: bool) -> None:
    """He carries everything both ways, faster, until both ends hold his address for one of the
    other's; then he keeps what he gets.

    `spoofs`: what he carries arrives from the address it was sent to, as if he were not there.
    """
    pair = running(a=[a_eth(restricted=False), a_wlan(restricted=False)], b=[b_eth(), b_wlan()])
    world = pair.world
    carries = True
    spoken_to: dict[str, Address] = {}
    """By the host, the address of the other that it last sent to."""

    def tap(host: Host, key: PathKey, data: bytes) -> None:
        if key.remote.host != EVIL.host:
            spoken_to[host.name] = key.remote
            world.deliver(EVIL, key.remote, data, OWD / 2)

    def keeper(source: Address, target: Address, data: bytes) -> None:
        sender = "a" if source.host in {u.public_ip for u in world.a.uplinks} else "b"
        other = "b" if sender == "a" else "a"
        if carries and spoken_to.keys() == {"a", "b"}:
            seen_from = spoken_to[other] if spoofs else EVIL
            world.deliver(seen_from, spoken_to[sender], data, OWD / 2)

    def believed(name: str) -> bool:
        pairs = world.peer(name).roaming.agent.pairs()
        return any(p.key.remote == EVIL and p.state is PairState.WARM for p in pairs)

    world.tap, world.outsiders[EVIL.host] = tap, keeper
    for turn in range(6):
        carries = True
        world.run(3.0)
        assert turn > 0 or (believed("a") and believed("b"))
        carries = False
        at = world.now
        world.run(1.0)
        for flow in (pair.from_a, pair.from_b):
            assert flow.silence(at) <= RTT + 0.05
            assert flow.lost(since=at - 0.5, until=world.now - 0.2) == []
    for flow in (pair.from_a, pair.from_b):
        assert flow.duplicated == 0
    moves = sum(len(host.node.history()) for host in world.hosts.values())
    assert moves <= 40, "the attacker keeps the ends busy"
    world.tap = None
    world.outsiders[EVIL.host] = lambda source, target, data: None
    world.run(1.0)
    assert world.active("a").remote.host != EVIL.host
    assert world.active("b").remote.host != EVIL.host
    pair.finish()


class Liar(Hand):
    """An authentic peer that names addresses of others, and never answers a check."""

    def __init__(self, world: World) -> None:
        super().__init__(world, world.a.identity)
        self.checks: list[tuple[float, Address]] = []
        for number in range(1, 251):
            world.outsiders[f"192.0.3.{number}"] = self._victim
        world.run(0.2)
        self.say(encode(hello()))
        world.run(0.2)
        assert world.state("b") == "up"

    def _victim(self, source: Address, target: Address, data: bytes) -> None:
        self.checks.append((self.world.now, target))

    def name(self, generation: int, victims: list[Address]) -> None:
        entries = tuple(CandidateEntry(str(v), "host", 0, False) for v in victims)
        self.say(encode(Candidates(generation=generation, candidates=entries)))

    def most(self, seconds: float) -> int:
        """The most checks that one address got in any such time."""
        by_address: dict[Address, list[float]] = {}
        for at, address in self.checks:
            by_address.setdefault(address, []).append(at)
        return max(
            sum(at <= other < at + seconds for other in times)
            for times in by_address.values()
            for at in times
        )


@pytest.mark.parametrize("every", [0.05, 0.5, 5.0, None])
def test_a_peer_that_names_victims_has_them_asked_a_little(every: float | None) -> None:
    """32 addresses of others, named once, or anew and anew."""
    world = World(delay=OWD, b=[b_eth(), b_wlan()])
    world.boot("b")
    liar = Liar(world)
    victims = [Address(f"192.0.3.{number}", 53) for number in range(1, 33)]
    began = world.now
    generation = 0
    while world.now < began + 60.0:
        if every is not None or generation == 0:
            generation += 1
            liar.name(generation, victims)
        world.run(every or 1.0)
    # Two uplinks share the count of an address; what is named anew gets one each ten seconds.
    assert liar.most(9.0) <= CHECKS_PER_ADDRESS + 1
    assert {address for _, address in liar.checks} <= set(victims)
    if every is None:
        assert len(liar.checks) <= len(victims) * (CHECKS_PER_ADDRESS + 3)
    assert world.state("b") != "connecting"


def test_a_peer_that_names_ever_new_victims_has_few_asked() -> None:
    """8,000 addresses in turn: the rate of all checks together is bounded."""
    world = World(delay=OWD, b=[b_eth()])
    world.boot("b")
    liar = Liar(world)
    began = world.now
    for generation in range(1, 401):
        first = generation * 20 % 8000
        liar.name(
            generation,
            [Address(f"192.0.3.{n % 250 + 1}", 1000 + n // 250) for n in range(first, first + 32)],
        )
        world.run(0.05)
    seconds = world.now - began
    assert len(liar.checks) <= seconds / PACE + 50
    assert liar.most(seconds) <= CHECKS_PER_ADDRESS + 1
