"""Tests of the lab itself: links that delay, NATs that rebind, hosts that move.

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

The wires in brackets are one userspace link process, 5 ms each way each. No tunnel here: an echo
server stands at B's forwarded port, and says from which address it was asked.
"""

from __future__ import annotations

import errno
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.watch import Kernel, Packets, What
from cli.demo.events import at_once, forget_nat, remove_interface, set_metric
from cli.demo.netns import Namespace, Namespaces, command
from cli.demo.probe import Probe
from cli.demo.trace import Arrival, Sent, report
from cli.demo.world import PORT, Happened, HostName, World
from tests.lab.nat_scapy import ScapyNat

MakeWorld = Callable[..., World]
Endpoint = tuple[str, int]


def udp(space: Namespace, family: int = 4, port: int = PORT, device: str = "") -> socket.socket:
    """A UDP socket inside a namespace, bound to a port and maybe a device, with a timeout."""

    def make() -> socket.socket:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        made = socket.socket(kind, socket.SOCK_DGRAM)
        made.bind(("::" if family == 6 else "0.0.0.0", port))
        if device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        made.settimeout(1.0)
        return made

    return space.call(make)


class Echo:
    """A at its tunnel's port asks B at its forwarded one, and sees what B saw."""

    def __init__(self, world: World, family: int = 4) -> None:
        self.a, self.b = udp(world.a.space, family), udp(world.b.space, family)
        host, _, port = world.endpoints("B")[0].rpartition(":")
        self.target = (host.strip("[]"), int(port))

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.a.close()
        self.b.close()

    def ask(self, answer: bool = True) -> Endpoint:
        """From A to B and back; the address of A as B sees it. TimeoutError when it is lost."""
        self.a.sendto(b"ask", self.target)
        _, seen = self.b.recvfrom(100)
        if answer:
            self.b.sendto(b"answer", seen)
            assert self.a.recvfrom(100)[0] == b"answer"
        return (seen[0], seen[1])

    def tell(self, seen: Endpoint) -> Endpoint:
        """Send from B to A, as A was last seen; the address of B as A sees it."""
        self.b.sendto(b"tell", seen)
        data, source = self.a.recvfrom(100)
        assert data == b"tell"
        return (source[0], source[1])

    def lost(self, seen: Endpoint) -> bool:
        """Whether a packet from B to that address of A is lost."""
        self.a.settimeout(0.2)
        try:
            self.tell(seen)
        except TimeoutError:
            return True
        finally:
            self.a.settimeout(1.0)
        return False


def test_everything_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), World(directory=tmp_path) as world:
        prefix = world.spaces.prefix
        process = world.a.space.popen(["sleep", "60"])
        assert prefix in command(["ip", "netns", "list"]).stdout
        raise ZeroDivisionError
    assert prefix not in command(["ip", "netns", "list"]).stdout
    assert process.poll() is not None


def test_descendants_that_left_are_ended() -> None:
    with Namespaces() as spaces:
        space = spaces.create("x")
        space.run(["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &"])
        pids = space.pids()
        assert len(pids) == 1
    # Its new parent may be slow to reap it, or never do.
    status = Path(f"/proc/{pids[0]}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_link_delays_loses_and_keeps_up(make_world: MakeWorld, tmp_path: Path) -> None:
    """A and B probe each other outside any tunnel, through wires without NAT (IPv6)."""
    world = make_world(families=(6,))
    a, b = world.uplink("A").address(6), world.uplink("B").address(6)
    probe = Probe(world.a.space, a, world.b.space, b, tmp_path)
    try:
        _until(lambda: probe.flowing(time.monotonic() - 0.1))
        time.sleep(1.5)
        calm_end = time.monotonic() - 0.1
        world.link.set("A0", "up", loss=0.3)
        time.sleep(1.0)
        world.link.set("A0", "up", loss=0.0)
        hole = time.monotonic()
        world.blackhole("B", way="up")  # what B sends
        time.sleep(0.3)
        healed = world.heal("B").end
        time.sleep(0.3)
    finally:
        probe.stop()
    traces = probe.traces()
    calm = probe.report(calm_end - 1.0, calm_end)
    for direction, trace in zip(("a_to_b", "b_to_a"), reversed(traces), strict=True):
        assert calm[direction].lost == 0
        assert 195 <= calm[direction].sent <= 205
        delays = [
            arrival.time - arrival.sent
            for arrival in trace.arrivals
            if calm_end - 1.0 < arrival.time < calm_end
        ]
        assert 0.010 <= statistics.median(delays) < 0.0115
    lossy = probe.report(calm_end + 0.1, hole - 0.1)
    assert 20 < lossy["a_to_b"].lost < 100
    assert lossy["b_to_a"].lost == 0
    dark = probe.report(hole, healed)
    assert dark["a_to_b"].lost == 0
    assert 0.25 < dark["b_to_a"].gap < 0.4
    assert dark["b_to_a"].closed


def test_offloads_are_off(make_world: MakeWorld) -> None:
    """What a NAT or the link sees are packets of at most the MTU, with checksums."""
    world = make_world(families=(6,))
    packets: list[bytes] = []

    def tap() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD))
        made.bind(("a0", 0x86DD))
        made.settimeout(1.0)
        return made

    with (
        world.core.call(tap) as seen,
        udp(world.a.space, 6) as sender,
        udp(world.b.space, 6) as receiver,
    ):
        sender.setsockopt(socket.SOL_UDP, 103, 1200)  # UDP_SEGMENT, linux/udp.h
        sender.sendto(bytes(12000), (world.uplink("B").address(6), PORT))
        for _ in range(10):
            assert len(receiver.recv(65535)) == 1200
        while len(packets) < 10:
            data = seen.recv(65535)
            if data[6] == socket.IPPROTO_UDP:
                packets.append(data)
    assert all(len(packet) == 40 + 8 + 1200 for packet in packets)
    for packet in packets:
        pseudo = packet[8:40] + packet[44:46] + b"\x00" + packet[6:7]
        data = pseudo + packet[40:]
        total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
        assert (total & 0xFFFF) + (total >> 16) in (0xFFFF, 0x1FFFE)


def scapy_nat(world: World, uplink: object) -> ScapyNat:
    """Endpoint-independent mapping, port-dependent filtering."""
    return ScapyNat(world, uplink)  # type: ignore[arg-type]


NATS = {"nft": {}, "scapy": {"A0": scapy_nat, "B0": scapy_nat}}


@pytest.fixture(params=["nft", "scapy"])
def nats(request: pytest.FixtureRequest) -> dict[str, object]:
    """World options for both makes of NAT."""
    return {"nats": NATS[request.param]}


@pytest.mark.parametrize("family", [4, 6])
def test_rebinding_changes_what_the_other_end_sees(
    make_world: MakeWorld, nats: dict[str, object], family: int
) -> None:
    world = make_world(families=(family,), nat66=True, **nats)
    publics = world.uplink("A").publics[family]
    with Echo(world, family) as echo:
        first = echo.ask()
        assert first == echo.ask(), "a mapping stays while nothing happens"
        assert first[0] == publics[0]
        assert first == world.uplink("A").nat.public(family)
        world.rebind_nat("A")
        assert echo.lost(first), "the old mapping is gone"
        second = echo.ask()
        assert second[0] == first[0] and second[1] != first[1]
        world.rebind_nat("A", port=False, address=True)
        third = echo.ask()
        assert third[0] == publics[1]
        world.rebind_nat("A", port=True, address=True)
        fourth = echo.ask()
        assert fourth[0] == publics[0] and fourth[1] not in (first[1], second[1], third[1])
        for _ in range(5):
            before = echo.ask()
            world.rebind_nat("A")
            assert echo.ask() != before


def test_a_port_forward_moves_with_its_public_address(
    make_world: MakeWorld, nats: dict[str, object]
) -> None:
    world = make_world(kinds={"A0": "full-cone"}, nats={"B0": scapy_nat} if nats["nats"] else {})
    old, new = world.uplink("B").publics[4]
    with Echo(world) as echo:
        seen = echo.ask()
        assert echo.tell(seen) == (old, PORT)
        world.rebind_nat("B", port=False, address=True)
        assert echo.tell(seen) == (new, PORT)
        echo.target = (new, PORT)
        assert echo.ask() == seen


def test_filtering_follows_the_kind(make_world: MakeWorld) -> None:
    for kind, lets_in in (("port-restricted", False), ("full-cone", True)):
        world = make_world(kinds={"A0": kind})
        with Echo(world) as echo, udp(world.b.space, port=9, device="u1") as stranger:
            seen = echo.ask()
            echo.a.settimeout(0.3)
            stranger.sendto(b"knock", seen)
            if lets_in:
                assert echo.a.recv(10) == b"knock"
            else:
                with pytest.raises(TimeoutError):
                    echo.a.recv(10)


def test_a_symmetric_nat_has_a_port_for_each_destination(make_world: MakeWorld) -> None:
    world = make_world(kinds={"A0": "symmetric"})
    with Echo(world) as echo:
        first = echo.ask()
        host, _, port = world.endpoints("B")[1].rpartition(":")
        echo.target = (host, int(port))
        second = echo.ask(answer=False)
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("host", ["A", "B"])
def test_a_new_address_works_at_once(
    make_world: MakeWorld, nats: dict[str, object], host: str, family: int
) -> None:
    world = make_world(families=(family,), nat66=True, **nats)
    with Echo(world, family) as echo:
        seen = echo.ask()
        before = world.hosts[host].uplinks[0].address(family)  # type: ignore[index]
        world.change_address(host)  # type: ignore[arg-type]
        after = world.hosts[host].uplinks[0].address(family)  # type: ignore[index]
        assert after != before
        listing = world.hosts[host].space.run(["ip", "addr", "show", "dev", "u0"]).stdout  # type: ignore[index]
        assert f"{after}/" in listing and f"{before}/" not in listing
        assert (echo.ask() == seen) == (host == "B"), "A's mapping is new, B's forward is not"
        assert echo.tell(echo.ask()) == echo.target


def test_the_second_uplink_takes_over_and_the_first_comes_back(make_world: MakeWorld) -> None:
    world = make_world()
    first, second = (world.uplink("A", index).publics[4][0] for index in (0, 1))
    with Echo(world) as echo:
        assert echo.ask()[0] == first
        world.switch_interface("A")
        assert echo.ask()[0] == second
        world.restore_interface("A")
        assert echo.ask()[0] == first


def test_a_stopped_uplink_loses_carrier_and_is_silent(make_world: MakeWorld) -> None:
    world = make_world()
    with Echo(world) as echo:
        echo.ask()
        world.uplink_down("B")
        state = world.b.space.run(["ip", "-br", "link", "show", "dev", "u0"]).stdout
        assert "LOWERLAYERDOWN" in state or " DOWN" in state
        with pytest.raises(TimeoutError):
            echo.ask()
        world.uplink_up("B")
        echo.ask()


def test_an_interface_appears(make_world: MakeWorld) -> None:
    world = make_world(uplinks=(1, 2))
    assert "u1" not in world.a.space.run(["ip", "-br", "link"]).stdout
    world.add_interface("A")
    second = world.uplink("A", 1).publics[4][0]
    with udp(world.a.space, device="u1") as a, udp(world.b.space) as b:
        a.sendto(b"hello", ("203.0.113.10", PORT))
        assert b.recvfrom(10)[1][0] == second


@pytest.mark.parametrize("host", ["A", "B"])
def test_a_black_hole_is_silent_both_ways_and_heals(make_world: MakeWorld, host: HostName) -> None:
    """Nothing passes in either direction, and neither end hears of it: no ICMP, no carrier lost."""
    world = make_world()
    with Echo(world) as echo:
        seen = echo.ask()
        world.blackhole(host)
        echo.b.settimeout(0.3)
        with pytest.raises(TimeoutError):
            echo.ask()
        assert echo.lost(seen)
        for end in (world.a, world.b):
            assert "LOWER_UP" in end.space.run(["ip", "link", "show", "dev", "u0"]).stdout
        error = echo.a.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert error == 0
        world.heal(host)
        echo.b.settimeout(1.0)
        assert echo.ask() == seen
        assert echo.tell(seen) == echo.target


def test_two_events_at_once(make_world: MakeWorld) -> None:
    world = make_world()
    ends: tuple[HostName, HostName] = ("A", "B")
    happened = at_once(*(partial(World.switch_interface, world, end) for end in ends))
    assert happened.end - happened.begin < 0.5
    for end in ends:
        assert " DOWN" in world.hosts[end].space.run(["ip", "-br", "link", "show", "u0"]).stdout
    # The link's control socket is shared by the threads.
    for act in (World.blackhole, World.heal):
        at_once(*(partial(act, world, end, index) for end in ends for index in (0, 1)))
    assert not any(
        way["blackhole"] for ways in world.link.counters().values() for way in ways.values()
    )

    def fail() -> Happened:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        at_once(fail, partial(World.restore_interface, world, "A"))


@pytest.mark.parametrize("family", [4, 6])
def test_make_before_break(make_world: MakeWorld, family: int) -> None:
    """A better interface appears and is used at once, then the old one is pulled out; and again."""
    world = make_world(uplinks=(1, 2), families=(family,), nat66=True)
    kernel = Kernel(world.a.space)

    def kernel_says(what: What, since: float) -> bool:
        return kernel.first(what, since) is not None

    try:
        with Echo(world, family) as echo:
            for old, new in ((0, 1), (1, 0)):
                publics = [world.uplink("A", index).publics[family][0] for index in (old, new)]
                assert echo.ask()[0] == publics[0]
                world.uplink("A", new).metric = world.uplink("A", old).metric - 1
                happened = world.add_interface("A", new)
                assert echo.ask()[0] == publics[1]
                _until(partial(kernel_says, "default route", happened.begin))
                usable = kernel.first("default route", happened.begin)
                assert usable is not None and usable < happened.end + 0.1
                remove_interface(world, "A", old)
                assert echo.ask()[0] == publics[1]
    finally:
        kernel.close()


@pytest.mark.parametrize("family", [4, 6])
def test_metrics_change_at_runtime(make_world: MakeWorld, family: int) -> None:
    world = make_world(families=(family,), nat66=True)
    first, second = (world.uplink("A", index).publics[family][0] for index in (0, 1))
    with Echo(world, family) as echo:
        assert echo.ask()[0] == first
        set_metric(world, "A", 0, 300)
        assert echo.ask()[0] == second
        set_metric(world, "A", 1, 400)
        assert echo.ask()[0] == first
    listed = world.a.space.run(["ip", f"-{family}", "route", "show", "default"]).stdout
    assert "metric 300" in listed and "metric 400" in listed and "metric 100" not in listed


def test_a_forgotten_mapping_is_another_one(make_world: MakeWorld) -> None:
    world = make_world()
    with Echo(world) as echo:
        seen = echo.ask()
        forget_nat(world, "B", 0)
        assert echo.ask() == seen, "a port forward stays"
        forget_nat(world, "A", 0)
        assert echo.lost(seen)
        assert echo.ask() != seen


def test_ipv6_behind_one_nat_only(make_world: MakeWorld) -> None:
    world = make_world(families=(6,), nat66="A")
    assert world.endpoints("B")[0].startswith(f"[{world.uplink('B').address(6)}]")
    with Echo(world, 6) as echo:
        seen = echo.ask()
        assert seen[0] == world.uplink("A").publics[6][0]
        forget_nat(world, "B", 0)
        assert echo.ask() == seen


def test_datagrams_of_an_interface_that_is_yet_to_come(make_world: MakeWorld) -> None:
    world = make_world(uplinks=(1, 2))
    packets = Packets(world.a.space)
    try:
        happened = world.add_interface("A")
        with udp(world.a.space, device="u1") as a, udp(world.b.space) as b:
            a.sendto(b"\x00\x01request", ("203.0.113.10", PORT))
            _, seen = b.recvfrom(100)
            b.sendto(b"\x01\x01answer", seen)
            a.recv(100)
        sent, answer = (one for one in packets.drain() if one.interface == "u1")
    finally:
        packets.close()
    assert (sent.leaves, sent.is_answer, answer.leaves, answer.is_answer) == (
        True, False, False, True,
    )  # fmt: skip
    assert sent.source == answer.target == (world.uplink("A", 1).address(4), PORT)
    assert happened.end < sent.time < answer.time - 0.018 < sent.time + 0.1


def test_jitter_may_keep_the_order(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(families=(6,))
    a, b = world.uplink("A").address(6), world.uplink("B").address(6)
    reordered = []
    for ordered in (False, True):
        world.link.set("A0", "up", jitter=0.02, ordered=ordered)
        directory = tmp_path / str(ordered)
        directory.mkdir()
        probe = Probe(world.a.space, a, world.b.space, b, directory)
        try:
            time.sleep(2.0)
            end = time.monotonic()
            time.sleep(0.2)
        finally:
            probe.stop()
        found = probe.report(end - 1.0, end)["a_to_b"]
        assert found.lost == 0
        reordered.append(found.reordered)
    assert reordered[0] > 10 and reordered[1] == 0


def test_injections_of_the_scapy_nat(make_world: MakeWorld) -> None:
    world = make_world(nats={"A0": scapy_nat})
    nat = world.uplink("A").nat
    assert isinstance(nat, ScapyNat)

    with Echo(world) as echo:

        def send(*payloads: bytes) -> None:
            for payload in payloads:
                echo.a.sendto(payload, echo.target)

        def receive(count: int) -> list[tuple[bytes, Endpoint]]:
            return [echo.b.recvfrom(100) for _ in range(count)]

        seen = echo.ask()
        nat.call("drop", n=2, way="out")
        send(b"1", b"2", b"3")
        assert receive(1) == [(b"3", seen)]
        nat.call("duplicate", n=1, way="out")
        send(b"4", b"5")
        assert [data for data, _ in receive(3)] == [b"4", b"4", b"5"]
        nat.call("reorder", n=2, way="out")
        send(b"6", b"7", b"8", b"9")
        assert [data for data, _ in receive(4)] == [b"7", b"8", b"6", b"9"]
        nat.call("replay", way="out", age=1, source=["198.51.100.11", 999])
        assert receive(1) == [(b"9", ("198.51.100.11", 999))]
        nat.call(
            "forge", payload=b"forged".hex(), source=["192.0.2.9", 7], target=list(echo.target)
        )
        assert receive(1) == [(b"forged", ("192.0.2.9", 7))]

        nat.call("rebind", after=2)
        send(b"a", b"b")
        (_, before), (_, after) = receive(2)
        assert before == seen and after != seen
        nat.call("rebind", count=3, every=0.05)
        time.sleep(0.3)
        assert nat.call("show")["counters"]["rebound"] == 4

        nat.call("forwarder", address="198.51.100.11", lag=0.02)
        send(b"x")
        (copy, attacker), (original, _) = receive(2)
        assert copy == original == b"x"
        assert attacker[0] == "198.51.100.11"
        echo.tell(attacker)


def test_reports_of_a_trace() -> None:
    sent = [Sent(n, n * 0.005, 0) for n in range(100)]
    sent[50] = Sent(50, 0.25, errno.ENETUNREACH)
    arrivals = [Arrival(n, n * 0.005, n * 0.005 + 0.01) for n in range(40)]
    # 40 to 49 come late and all at once, 50 never left, 51 to 53 are lost, 60 comes twice, 70
    # after 71.
    arrivals += [Arrival(n, n * 0.005, 0.275) for n in range(40, 50)]
    numbers = [*range(54, 61), *range(60, 70), 71, 70, *range(72, 100)]
    arrivals += [Arrival(n, n * 0.005, 0.01 + 0.005 * n) for n in range(54, 56)]
    arrivals += [Arrival(n, n * 0.005, 0.5 + 0.001 * i) for i, n in enumerate(numbers[2:])]
    whole = report(sent, arrivals, 0.005, 0.0, 0.5)
    assert (whole.lost, whole.unsent, whole.duplicated, whole.reordered) == (4, 1, 1, 1)
    assert whole.gap == pytest.approx(0.5 - 0.285 - 0.005)
    assert whole.closed
    first = report(sent, arrivals, 0.005, 0.18, 0.25)
    assert first.gap == pytest.approx(0.275 - 0.205 - 0.005), (
        "a silence counts with its full length"
    )
    assert first.gap_at == pytest.approx(0.205)
    assert len(first.gaps) == 1
    silent = report(sent, arrivals[:40], 0.005, 0.1, 0.4)
    assert not silent.closed
    assert silent.gap == pytest.approx(0.4 - 0.205 - 0.005)


def _until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
