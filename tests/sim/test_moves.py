"""Every way to move, one at a time, with what the traffic felt held against the laws of physics.

Gaps are silences at the receiving application beyond the probes' spacing (5 ms). From the mover
nothing but the time until its next packet is allowed; toward the mover the news travels one way
and the first redirected packet the other, so one round trip is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.sim.flows import SPACING, Flow
from tests.sim.roam import MAX_QUEUED_BYTES, MAX_QUEUED_PACKETS
from tests.sim.world import PORT, Uplink, World, numbered
from tunnel.datapath.congestion import ModelController
from tunnel.node import PORT_TRIAL
from tunnel.path.network import Address
from tunnel.quic.paths import START_MTU, NetworkPath

OWD = 0.01
RTT = 2 * OWD
SLACK = 0.006
"""Seconds: acknowledgement delay and a timer's grain."""
OVERHEAD = 1 + 8 + 4 + 1 + 1 + 16
"""Bytes a datagram is larger than its IP packet: flags, connection ID, number, frame, kind, tag."""


def a_eth(**more: object) -> Uplink:
    return Uplink("eth0", "192.168.1.10", "203.0.113.1", **more)  # type: ignore[arg-type]


def a_wlan(**more: object) -> Uplink:
    return Uplink("wlan0", "192.168.3.10", "203.0.113.3", **{"metric": 200, **more})  # type: ignore[arg-type]


def b_eth(**more: object) -> Uplink:
    return Uplink("eth0", "192.168.2.10", "198.51.100.1", forwarded=True, **more)  # type: ignore[arg-type]


def b_wlan(**more: object) -> Uplink:
    return Uplink(
        "wlan0",
        "192.168.4.10",
        "198.51.100.4",
        forwarded=True,
        **{"metric": 200, **more},  # type: ignore[arg-type]
    )


@dataclass
class Pair:
    """Two hosts that are up, with probes running both ways."""

    world: World
    from_a: Flow
    from_b: Flow

    def flow(self, sender: str) -> Flow:
        return self.from_a if sender == "a" else self.from_b

    def toward(self, receiver: str) -> Flow:
        return self.from_b if receiver == "a" else self.from_a

    def finish(self, *, sessions: int | None = 1) -> None:
        """Both flows live, nothing came twice, and no session was lost on the way."""
        world = self.world
        since = world.now
        for sender in "ab":
            if self.flow(sender).running:
                world.run_until(lambda sender=sender: self.flow(sender).alive(since), 2.0)  # type: ignore[misc]
        world.run(0.2)
        assert world.both_up
        assert self.from_a.duplicated == self.from_b.duplicated == 0
        for name in "ab":
            assert sessions in (None, world.peer(name).counters["handshakes"])


def running(
    seed: int = 1,
    *,
    a: list[Uplink] | None = None,
    b: list[Uplink] | None = None,
    warm: float = 0.5,
    **more: object,
) -> Pair:
    world = World(seed, a=a, b=b, **{"delay": OWD, **more})  # type: ignore[arg-type]
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    pair = Pair(world, Flow(world, "a"), Flow(world, "b"))
    world.run(warm)
    assert pair.from_a.lost(until=world.now - 0.3) == []
    return pair


def after(pair: Pair, event: Callable[[], None], seconds: float = 1.0) -> float:
    """Let it happen between two probes, and run on; when it happened."""
    pair.world.run(0.0023)
    at = pair.world.now
    event()
    pair.world.run(seconds)
    return at


# NAT rebinding


@pytest.mark.parametrize("change", ["port", "address", "both"])
@pytest.mark.parametrize("mover", ["a", "b"])
def test_nat_rebinding(mover: str, change: str) -> None:
    # Behind filtering NATs nothing of a forwarded host's new address would reach the other end.
    pair = running(a=[a_eth(restricted=mover == "a")])
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]
    fresh = {"a": "203.0.113.77", "b": "198.51.100.77"}[mover]

    def event() -> None:
        world.rebind(
            uplink,
            port=change != "address",
            public_ip=None if change == "port" else fresh,
        )

    at = after(pair, event)
    assert pair.flow(mover).silence(at) <= SPACING + SLACK
    assert pair.toward(mover).silence(at) <= RTT + SPACING + SLACK
    other = "b" if mover == "a" else "a"
    target = Address(world.hosts[other].uplinks[0].public_ip, PORT)
    assert world.active(other).remote == uplink.outside(target, world.now)
    pair.finish()


def grown() -> tuple[Pair, NetworkPath, int]:
    """A pair whose `b` has sent much, its path to `a`, and what window a path starts with."""
    pair = running()
    session = pair.world.peer("b").session
    assert session is not None
    before = session.connection.active
    bulk = Flow(pair.world, "b", spacing=0.0002, size=1200, flow=2)
    pair.world.run(0.3)
    bulk.stop()
    start = ModelController(max_datagram_size=START_MTU).window
    assert before.metrics.window > start
    return pair, before, start


def test_a_new_port_keeps_window_and_round_trip() -> None:
    """RFC 9000 section 9.4."""
    pair, before, start = grown()
    world = pair.world
    session = world.peer("b").session
    assert session is not None
    after(pair, lambda: world.rebind(world.a.uplinks[0]), 0.02)
    path = session.connection.active
    assert path is not before
    assert path.metrics.has_rtt
    assert path.metrics.window >= before.metrics.window > start
    pair.finish()


def test_a_new_address_starts_with_a_fresh_window() -> None:
    """RFC 9000 section 9.4."""
    pair, before, start = grown()
    world = pair.world
    session = world.peer("b").session
    assert session is not None
    after(pair, lambda: world.rebind(world.a.uplinks[0], public_ip="203.0.113.77"), 0.02)
    path = session.connection.active
    assert path is not before
    assert not path.metrics.has_rtt
    assert path.metrics.window == start < before.metrics.window
    pair.finish()


@pytest.mark.parametrize("every", [0.003, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("mover", ["a", "b"])
def test_ten_rebindings_in_a_row(mover: str, every: float) -> None:
    pair = running(a=[a_eth(restricted=mover == "a")])
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]
    base = {"a": "203.0.113.", "b": "198.51.100."}[mover]
    for number in range(10):
        ip = None if number % 2 else base + str(100 + number)
        world.after(number * every, lambda ip=ip: world.rebind(uplink, public_ip=ip))  # type: ignore[misc]
    at = after(pair, lambda: None, 10 * every + 2.0)
    assert pair.flow(mover).silence(at) <= SPACING + SLACK + OWD
    assert pair.toward(mover).silence(at) <= 10 * min(every, RTT) + 2 * RTT + SPACING + SLACK
    assert pair.flow(mover).alive(world.now - 0.5)
    assert pair.toward(mover).alive(world.now - 0.5)
    pair.finish()


@pytest.mark.parametrize("at_ms", range(0, 52, 4))
@pytest.mark.parametrize("mover", ["a", "b"])
def test_rebinding_during_the_handshake(mover: str, at_ms: int) -> None:
    world = World(at_ms, a=[a_eth(restricted=mover == "a")])
    world.boot()
    uplink = world.hosts[mover].uplinks[0]
    world.after(at_ms / 1000, lambda: world.rebind(uplink))
    world.run_until(lambda: world.both_up, 1.5)
    pair = Pair(world, Flow(world, "a"), Flow(world, "b"))
    pair.finish()


@pytest.mark.parametrize("bulk", ["a", "b"])
@pytest.mark.parametrize("mover", ["a", "b"])
def test_rebinding_during_a_transfer(mover: str, bulk: str) -> None:
    pair = running(a=[a_eth(restricted=mover == "a")])
    world = pair.world
    heavy = Flow(world, bulk, spacing=0.0008, size=1400, flow=2)  # 14 Mbit/s
    world.run(0.4)
    at = after(pair, lambda: world.rebind(world.hosts[mover].uplinks[0]), 1.0)
    heavy.stop()
    assert pair.flow(mover).silence(at) <= SPACING + SLACK
    # Within three times what came from it, a stranger's address gets bulk only once it is proven.
    assert pair.toward(mover).silence(at) <= 2 * RTT + SPACING + SLACK
    world.run(0.2)
    lost = heavy.lost(since=at - RTT)
    # At most what was under way to the old mapping, and what followed until the news was there.
    assert len(lost) <= (2 * RTT + SLACK) / 0.0008
    assert heavy.lost(since=at + 3 * RTT) == []
    assert heavy.duplicated == 0
    pair.finish()


@pytest.mark.parametrize("public_ip", [None, "203.0.113.77"])
def test_rebinding_behind_a_symmetric_nat(public_ip: str | None) -> None:
    pair = running(a=[a_eth(symmetric=True)])
    world = pair.world
    at = after(pair, lambda: world.rebind(world.a.uplinks[0], public_ip=public_ip))
    assert pair.from_a.silence(at) <= SPACING + SLACK
    assert pair.from_b.silence(at) <= RTT + SPACING + SLACK
    pair.finish()


def test_both_nats_rebind_at_once() -> None:
    """The forwarded port still leads to b, and a's NAT lets anybody in: it heals by itself."""
    pair = running(a=[a_eth(restricted=False)])
    world = pair.world

    def event() -> None:
        world.rebind(world.a.uplinks[0])
        world.rebind(world.b.uplinks[0])

    at = after(pair, event)
    assert pair.from_a.silence(at) <= SPACING + SLACK
    assert pair.from_b.silence(at) <= RTT + 2 * SPACING + SLACK
    pair.finish()


# a known change of address or interface


@pytest.mark.parametrize("mover", ["a", "b"])
def test_address_change(mover: str) -> None:
    pair = running()
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]
    at = after(pair, lambda: world.readdress(mover, uplink, "192.168.9.99"))
    assert pair.flow(mover).silence(at) <= SPACING + SLACK
    assert pair.toward(mover).silence(at) <= RTT + SPACING + SLACK
    pair.finish()


def test_address_change_of_both_ends_at_once() -> None:
    pair = running()
    world = pair.world

    def event() -> None:
        world.readdress("a", world.a.uplinks[0], "192.168.9.99")
        world.readdress("b", world.b.uplinks[0], "192.168.8.88")

    at = after(pair, event)
    assert pair.from_a.silence(at) <= 3 * RTT + 0.05
    assert pair.from_b.silence(at) <= 3 * RTT + 0.05
    pair.finish()


@pytest.mark.parametrize("mover", ["a", "b"])
def test_address_gone_for_a_moment(mover: str) -> None:
    """DHCP: the old address goes, the new one comes 300 ms later."""
    pair = running()
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]

    def event() -> None:
        world.link(mover, uplink, up=False)
        uplink.ip = "192.168.9.99"
        world.after(0.3, lambda: world.link(mover, uplink, up=True))

    at = after(pair, event)
    assert pair.flow(mover).silence(at) <= 0.3 + 3 * RTT + 0.05
    assert pair.toward(mover).silence(at) <= 0.3 + 3 * RTT + 0.05
    pair.finish()


@pytest.mark.parametrize("mover", ["a", "b"])
def test_link_of_the_active_path_goes_down(mover: str) -> None:
    pair = running(a=[a_eth(), a_wlan()], b=[b_eth(), b_wlan()])
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]
    # a's NATs filter, and b's second uplink is one of the endpoints that a knows, but a has sent
    # nothing there yet: b's first packets die at a's NAT, until a asks by itself.
    opened = mover == "a"
    at = after(pair, lambda: world.link(mover, uplink, up=False))
    if opened:
        assert pair.flow(mover).silence(at) <= SPACING + SLACK
        assert pair.toward(mover).silence(at) <= RTT + SPACING + SLACK
    else:
        assert pair.flow(mover).silence(at) <= 3 * RTT + 0.1
        assert pair.toward(mover).silence(at) <= 3 * RTT + 0.1
    assert world.active(mover).local.host == world.hosts[mover].uplinks[1].ip
    pair.finish()


def test_acceptor_switches_toward_an_open_nat() -> None:
    pair = running(a=[a_eth(restricted=False)], b=[b_eth(), b_wlan()])
    world = pair.world
    at = after(pair, lambda: world.link("b", world.b.uplinks[0], up=False))
    assert pair.from_b.silence(at) <= SPACING + SLACK
    assert pair.from_a.silence(at) <= RTT + SPACING + SLACK
    pair.finish()


def test_both_ends_lose_their_link_at_once() -> None:
    pair = running(a=[a_eth(), a_wlan()], b=[b_eth(), b_wlan()])
    world = pair.world

    def event() -> None:
        world.link("a", world.a.uplinks[0], up=False)
        world.link("b", world.b.uplinks[0], up=False)

    at = after(pair, event)
    assert pair.from_a.silence(at) <= 5 * RTT + 0.15
    assert pair.from_b.silence(at) <= 5 * RTT + 0.15
    pair.finish()


@pytest.mark.parametrize("better_delay", [0.0, 0.01])
@pytest.mark.parametrize("mover", ["a", "b"])
def test_make_before_break_loses_nothing(mover: str, better_delay: float) -> None:
    """A better interface appears; the old one goes two seconds later."""
    better = (
        a_wlan(metric=50, up=False, delay=better_delay)
        if mover == "a"
        else b_wlan(metric=50, up=False, delay=better_delay)
    )
    a = [a_eth(delay=0.005, restricted=mover == "a")]
    b = [b_eth(delay=0.005)]
    (a if mover == "a" else b).append(better)
    pair = running(a=a, b=b)
    world = pair.world
    old = world.hosts[mover].uplinks[0]
    at = after(pair, lambda: world.link(mover, better, up=True))
    assert world.active(mover).local.host == better.ip
    world.link(mover, old, up=False)
    world.run(1.0)
    for flow in (pair.from_a, pair.from_b):
        assert flow.lost(since=at - 0.1, until=world.now - 0.1) == []
        assert flow.silence(at) <= max(0.0, better_delay - 0.005) + SPACING + SLACK
    pair.finish()


def test_interface_flaps() -> None:
    pair = running(a=[a_eth(), a_wlan()])
    world = pair.world
    uplink = world.a.uplinks[0]
    for number in range(10):
        world.after(
            number * 0.25,
            lambda up=number % 2 == 1: world.link("a", uplink, up=up),  # type: ignore[misc]
        )
    at = after(pair, lambda: None, 3.5)
    assert pair.from_a.silence(at) <= SPACING + SLACK
    assert pair.from_b.silence(at) <= RTT + SPACING + SLACK
    pair.finish()


@pytest.mark.parametrize("mover", ["a", "b"])
@pytest.mark.parametrize("away", [0.2, 2.5, 8.0])
def test_connection_ids_come_to_rest(mover: str, away: float) -> None:
    """Away and back to a path known before: neither end answers the other's answer for ever."""
    uplinks = {"a": [a_eth(), a_wlan()], "b": [b_eth(), b_wlan()]}
    pair = running(a=uplinks["a"], b=uplinks["b"])
    world = pair.world
    uplink = world.hosts[mover].uplinks[0]
    after(pair, lambda: world.link(mover, uplink, up=False), away)
    after(pair, lambda: world.link(mover, uplink, up=True), 6.0)  # it goes back in its time

    def sequence_numbers() -> list[int | None]:
        sessions = [next(iter(h.node.peers.values())).session for h in world.hosts.values()]
        return [s.connection._peer_cid.sequence_number for s in sessions if s is not None]

    assert world.active(mover).local.host == uplink.ip
    rest = sequence_numbers()
    world.run(2.0)
    assert sequence_numbers() == rest
    pair.finish()


def test_send_fails_before_the_kernel_says_so() -> None:
    """The socket's error is known at once, the netlink message comes 200 ms later."""
    pair = running(a=[a_eth(), a_wlan()])
    world = pair.world
    uplink = world.a.uplinks[0]

    def event() -> None:
        uplink.up = False
        world.after(0.2, lambda: world.network_event("a"))

    at = after(pair, event)
    assert pair.from_a.silence(at) <= 3 * RTT + 0.05
    assert pair.from_b.silence(at) <= 3 * RTT + 0.05
    pair.finish()


# silence


def test_second_endpoint_is_found_when_the_first_goes_silent() -> None:
    """Both of b's ports are forwarded; a, behind a filtering NAT, must find the other one."""
    pair = running(b=[b_eth(), b_wlan()])
    world = pair.world

    def event() -> None:
        world.b.uplinks[0].black_hole = True

    at = after(pair, event, 3.0)
    assert pair.from_a.silence(at) <= 5 * RTT + 0.15
    assert pair.from_b.silence(at) <= 5 * RTT + 0.15
    assert world.active("a").remote.host == world.b.uplinks[1].public_ip
    pair.finish()


def test_own_second_uplink_is_found_when_the_first_goes_silent() -> None:
    pair = running(a=[a_eth(), a_wlan()])
    world = pair.world

    def event() -> None:
        world.a.uplinks[0].black_hole = True

    at = after(pair, event, 3.0)
    assert pair.from_a.silence(at) <= 5 * RTT + 0.15
    assert pair.from_b.silence(at) <= 5 * RTT + 0.15
    assert world.active("a").local.host == world.a.uplinks[1].ip
    pair.finish()


def test_a_further_port_stays_for_a_while_when_it_was_used() -> None:
    """The way out of a stuck mapping, left for a better interface: the peer may send there yet."""
    better = a_wlan(metric=50, up=False)
    pair = running(a=[a_eth(), better])
    world = pair.world

    def event() -> None:
        world.a.uplinks[0].dead_ports.add(PORT)

    after(pair, event, PORT_TRIAL + 2)
    further = world.active("a").local
    assert further.port != PORT and world.a.ports == {further}
    at = after(pair, lambda: world.link("a", better, up=True), 3.0)
    assert world.active("a").local.host == better.ip
    assert world.a.ports == {further}
    for flow in (pair.from_a, pair.from_b):
        assert flow.lost(since=at, until=world.now - 0.1) == []
    world.run(PORT_TRIAL)
    assert world.a.ports == set()
    pair.finish()


@pytest.mark.parametrize("seconds", [0.05, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("name", ["a", "b"])
def test_silent_black_hole_then_return(name: str, seconds: float) -> None:
    pair = running()
    world = pair.world
    uplink = world.hosts[name].uplinks[0]

    def event() -> None:
        uplink.black_hole = True
        world.after(seconds, lambda: setattr(uplink, "black_hole", False))

    at = after(pair, event, seconds + 3.0)
    for flow in (pair.from_a, pair.from_b):
        assert flow.silence(at) <= seconds + 1.0 + RTT + SLACK
    # After a second of silence a fresh handshake is tried beside the old one, and may be faster.
    pair.finish(sessions=1 if seconds < 1 else None)
    assert world.peer("a").counters["handshakes"] <= 2


def test_ten_minutes_without_a_path() -> None:
    """The tunnel holds; the newest packets of each flow go first when an address is there."""
    pair = running()
    world = pair.world
    pair.from_a.stop()
    pair.from_b.stop()
    world.run(0.5)
    uplink = world.a.uplinks[0]
    world.link("a", uplink, up=False)
    world.run(1.5)
    assert world.state("a") == "holding"
    for second in range(600):
        for number in range(10):
            for flow in (3, 4):
                packet = numbered("a", second * 10 + number, flow=flow, size=600)
                world.after(second + number / 20, lambda packet=packet: world.send("a", packet))  # type: ignore[misc]
    world.run(600)
    lane = world.peer("a").lane
    assert 0 < lane.queue_bytes <= MAX_QUEUED_BYTES
    assert 0 < lane.queue_packets <= MAX_QUEUED_PACKETS
    assert world.state("a") == "holding"
    world.b.received.clear()
    uplink.ip = "192.168.9.99"
    at = world.now
    world.link("a", uplink, up=True)
    world.run_until(lambda: len(world.b.received) >= 4, 1.0)
    first = [
        (int.from_bytes(p[20:22]) - 5000, int.from_bytes(p[28:36])) for _, p in world.b.received
    ]
    assert sorted(first[:4]) == [(3, 5998), (3, 5999), (4, 5998), (4, 5999)]
    assert world.b.received[0][0] - at <= RTT + SLACK
    back = Pair(world, Flow(world, "a", flow=5), Flow(world, "b", flow=5))
    world.run(1.0)
    assert back.from_b.silence(at) <= 1.0
    back.finish()


def test_no_path_for_long_on_the_acceptor() -> None:
    pair = running()
    world = pair.world
    uplink = world.b.uplinks[0]
    world.link("b", uplink, up=False)
    world.run(60)
    assert world.state("b") == "holding"
    at = world.now
    world.link("b", uplink, up=True)
    world.run_until(lambda: pair.from_a.alive(at) and pair.from_b.alive(at), 1.0)
    pair.finish()


# loss, reordering, sizes


@pytest.mark.parametrize(("loss", "limit"), [(0.05, 0.065), (0.2, 0.23)])
def test_loss_and_reordering(loss: float, limit: float) -> None:
    """Loss is passed on as it is, never made worse, and no session falls for it."""
    pair = running(4, warm=0.0)
    world = pair.world
    world.loss, world.jitter = loss, 0.02
    at = world.now
    for number in range(4):
        world.after(2.0 * number + 1.0, lambda: world.rebind(world.a.uplinks[0]))
    world.run(10)
    for flow in (pair.from_a, pair.from_b):
        lost = flow.lost(since=at, until=world.now - 0.5)
        # Beside the loss, four times what was under way toward the mover.
        assert len(lost) <= limit * len(flow.sent) + 4 * (4 * RTT / SPACING)
    world.loss = world.jitter = 0.0
    world.run(1.0)
    pair.finish()


@pytest.mark.parametrize("mtu", [1200, 1280, 1440, 1471, 1472])
def test_what_does_not_fit_is_split(mtu: int) -> None:
    world = World(delay=OWD)
    world.mtu = mtu
    world.boot()
    world.run_until(lambda: world.both_up, 5.0)
    world.run(1.0)
    flows = [Flow(world, name, spacing=0.01, size=1420) for name in "ab"]
    world.run(1.0)
    for flow in flows:
        flow.stop()
    world.run(0.2)
    for flow in flows:
        assert flow.lost() == []
        counters = world.peer(flow.sender).lane.counters
        assert (counters["split_packets"] == 0) is (mtu >= 1420 + OVERHEAD)


@pytest.mark.parametrize("mtu", [1200, 1280])
def test_path_shrinks_at_a_switch(mtu: int) -> None:
    pair = running(a=[a_eth(), a_wlan()])
    world = pair.world
    big = Flow(world, "a", spacing=0.01, size=1420, flow=2)
    back = Flow(world, "b", spacing=0.01, size=1420, flow=2)
    world.run(0.5)

    def event() -> None:
        world.mtu = mtu
        world.link("a", world.a.uplinks[0], up=False)

    at = after(pair, event)
    assert big.lost(since=at + 3 * RTT, until=world.now - 0.2) == []
    assert back.lost(since=at + 3 * RTT, until=world.now - 0.2) == []
    big.stop()
    back.stop()
    pair.finish()


def test_link_refuses_what_it_carried_before() -> None:
    """EMSGSIZE from the kernel: the link's own MTU is smaller now."""
    pair = running()
    world = pair.world
    big = Flow(world, "a", spacing=0.01, size=1420, flow=2)
    world.run(0.5)
    at = after(pair, lambda: setattr(world.a.uplinks[0], "mtu", 1252))
    assert len(big.lost(since=at, until=world.now - 0.2)) <= 2
    pair.finish()


def test_path_goes_on_with_less_without_a_word() -> None:
    """A black hole for large packets only: the small ones must not hide it for ever."""
    pair = running()
    world = pair.world
    big = Flow(world, "a", spacing=0.01, size=1420, flow=2)
    world.run(0.5)
    at = after(pair, lambda: setattr(world, "mtu", 1280), 5.0)
    assert big.lost(since=at + 3.0, until=world.now - 0.2) == []
    pair.finish()


# keys


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_key_updates_while_roaming(loss: float) -> None:
    pair = running(5, max_packets_per_key=50)
    world = pair.world
    world.loss, world.jitter = loss, 0.01
    at = world.now
    for number in range(6):
        world.after(number * 0.7, lambda: world.rebind(world.a.uplinks[0]))
    world.after(2.0, lambda: world.readdress("b", world.b.uplinks[0], "192.168.8.88"))
    world.run(5.0)
    for name, flow in (("a", pair.from_a), ("b", pair.from_b)):
        session = world.peer(name).session
        assert session is not None
        assert session.connection.counters["key_updates"] >= 5
        lost = flow.lost(since=at, until=world.now - 0.5)
        assert len(lost) <= (loss + 0.02) * len(flow.sent) + 8 * (3 * RTT / SPACING)
    world.loss = 0.0
    pair.finish()
