"""Two ends that know nothing of each other but a key meet through NATs, by a broker and STUN.

    [A] u0 --[its routers]-- A --+------+-- broker (mosquitto)
                                 | core |-- stun, turn (coturn)       20 ms between any two ends
    [B] u0 --[its routers]-- B --+------+

`./dev bench nat` has all pairs; here are those that stand for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.nat.internet import HOSTS, Internet
from bench.nat.kinds import KINDS, SHARED, Kind, Meeting, Stage, direct_by_rights
from bench.nat.place import Place
from cli.demo.events import at_once
from cli.demo.pair import INNER
from cli.demo.probe import Probe
from cli.demo.world import Happened, HostName
from tests.lab.hosts import until

MakePlace = Callable[..., Place]
PATIENCE = 15.0  # seconds to meet on a busy machine; a third of one is usual
SEARCH = 20.0  # seconds that many ports are probed for, and until then
MOVED = 10.0  # seconds to meet again; a quarter of one is usual
HOME, CGNAT = KINDS["port-restricted"], KINDS["cgnat"]


def between(a: str, b: str) -> Meeting:
    return Meeting(KINDS[a], KINDS[b])


def start(place: Place, *hosts: HostName) -> None:
    for host in hosts or ("B", "A"):
        assert place.start(host), place.pair.log(host).read_text()


def until_direct(place: Place, seconds: float = PATIENCE) -> None:
    until(place.direct, lambda: [place.paths(host) for host in HOSTS], seconds)


def pings(place: Place, count: int = 20) -> bool:
    """Whether packets go through the tunnel and back."""
    ping = ["ping", "-n", "-q", "-i", "0.02", "-c", str(count), "-W", "1", INNER["B"][4]]
    return " 0% packet loss" in place.net.hosts["A"].space.run(ping, check=False).stdout


def carried(place: Place, act: Callable[[], object]) -> int:
    """Frames that the TURN server's wire carries meanwhile."""
    before = place.through_turn()
    act()
    return place.through_turn() - before


def sessions(place: Place) -> list[int]:
    """How many each end has had."""
    return [place.counters(host)["handshakes"] for host in HOSTS]


@contextmanager
def probing(place: Place) -> Iterator[Probe]:
    """Probes both ways through the tunnel, flowing when the context begins."""
    a, b = (place.net.hosts[host].space for host in HOSTS)
    probe = Probe(a, INNER["A"][4], b, INNER["B"][4], place.directory)
    try:
        until(lambda: probe.flowing(time.monotonic() - 0.3), lambda: "no probe arrives")
        yield probe
    finally:
        probe.stop()


def flows_again(probe: Probe, since: float, seconds: float = MOVED) -> None:
    until(
        lambda: probe.flowing(max(since, time.monotonic() - 0.5)),
        lambda: "no probe arrives both ways",
        seconds,
    )


def both_move(net: Internet) -> Happened:
    """New addresses at both ends, and with them new mappings: no path survives."""
    return at_once(*(lambda host=host: net.change_address(host) for host in HOSTS))


def a_moves(net: Internet) -> Happened:
    """A new address and mapping at one end."""
    return net.change_address("A")


DIRECT = [
    between("port-restricted", "port-restricted"),
    between("full-cone", "symmetric"),
    between("restricted", "symmetric"),
    between("public", "apdm-adf"),
    Meeting(CGNAT, CGNAT),
    between("firewall6", "firewall6"),
    *(meeting for meeting in SHARED if direct_by_rights(meeting)),
]


@pytest.mark.parametrize("meeting", DIRECT, ids=str)
def test_direct(make_place: MakePlace, meeting: Meeting) -> None:
    place = make_place(meeting, turn=False)
    start(place)
    until_direct(place)
    assert pings(place)
    assert place.direct(), "and stays so"
    if meeting.shared == "home" and not meeting.a.stages[0].hairpin:
        lan = {place.net.address(host) for host in HOSTS}
        path = place.active("A")
        ends = {path[end].rpartition(":")[0] for end in ("local", "remote")}
        assert ends == lan, "without leaving the house"
    assert place.net.broker.subscriptions() >= 2


RELAYED = [
    between("symmetric", "symmetric"),
    between("adm-apdf", "symmetric"),
    between("cgnat-symmetric", "cgnat-symmetric"),
    between("public", "udp-blocked"),
    between("symmetric", "only-443"),
    between("only-443", "only-443"),
    between("firewall6", "only-443-6"),
    *(meeting for meeting in SHARED if not direct_by_rights(meeting)),
]


@pytest.mark.parametrize("meeting", RELAYED, ids=str)
def test_relayed(make_place: MakePlace, meeting: Meeting) -> None:
    """Seen from outside, too: what the tunnel carries passes the TURN server's wire."""
    place = make_place(meeting)
    start(place)
    until(
        lambda: None not in map(place.relayed, HOSTS),
        lambda: [place.paths(host) for host in HOSTS],
        PATIENCE,
    )
    assert pings(place)
    assert carried(place, lambda: pings(place, 50)) >= 2 * 2 * 50, "there and back, in and out"
    for host, kind in zip(HOSTS, (meeting.a, meeting.b), strict=True):
        if kind.blocked:
            assert place.relayed(host)


def test_a_hard_nat_is_searched_for_an_open_port(make_place: MakePlace) -> None:
    """The kernel's draws from 100 ports here, so there is little luck in it."""
    place = make_place(between("port-restricted", "symmetric"))
    start(place)
    until_direct(place, PATIENCE + SEARCH)
    assert sessions(place) == [1, 1] and pings(place)
    time.sleep(15)  # the winning socket has shown what it is good for, or is closed
    assert place.direct() and pings(place)


def test_a_relay_is_left_for_a_direct_path(make_place: MakePlace) -> None:
    """Where both can be had, nobody stays at the relay; it is kept, as a second path is."""
    # Copies would travel by the second path.
    place = make_place(Meeting(HOME, HOME), settings='[paths]\nredundancy = "off"\n')
    start(place)
    until_direct(place)
    time.sleep(1)
    idle = carried(place, lambda: time.sleep(2))
    busy = carried(place, lambda: pings(place, 100))
    assert place.direct()
    assert busy < idle + 100, "100 there and 100 back, in 2 seconds"


def test_nobody_meets_where_nobody_could(make_place: MakePlace) -> None:
    """The counter-test: the lab lets nothing through that its kinds do not."""
    place = make_place(between("symmetric", "symmetric"), turn=False)
    start(place)
    time.sleep(3)
    assert not place.active("A") and not pings(place)


@pytest.mark.slow
def test_who_waits_is_found_though_his_nat_forgets(make_place: MakePlace) -> None:
    """Mappings that nobody uses are gone after 30 s, as in many homes; B waits for longer."""
    forgetful = Kind("forgetful", (Stage("box", expiry=30.0),))
    place = make_place(Meeting(forgetful, forgetful), turn=False)
    start(place, "B")
    time.sleep(65)
    start(place, "A")
    until_direct(place)
    assert pings(place)


# the broker


def test_both_move_and_nothing_survives(make_place: MakePlace) -> None:
    """Nor when one does: the filter of the other's NAT does not know where it is now."""
    place = make_place(Meeting(HOME, HOME), turn=False)
    start(place)
    until_direct(place)
    with probing(place) as probe:
        for move in (both_move, both_move, a_moves, both_move):
            moved = move(place.net)
            flows_again(probe, moved.end)
    assert sessions(place) == [1, 1], "it is the same session"


def test_a_session_needs_no_broker_until_both_move(make_place: MakePlace) -> None:
    """B's NAT lets everybody in, so that A may move alone."""
    place = make_place(between("port-restricted", "full-cone"), turn=False)
    start(place)
    until_direct(place)
    with probing(place) as probe:
        place.net.broker.stop()
        gone = time.monotonic()
        time.sleep(3)
        for report in probe.report(gone, time.monotonic() - 0.2).values():
            assert report.lost == 0 and report.gap < 0.5, "nobody in the tunnel noticed"
        moved = a_moves(place.net)
        flows_again(probe, moved.end)
        # Now nobody knows anybody: it is the broker who brings them together.
        moved = both_move(place.net)
        time.sleep(3)
        assert not probe.flowing(moved.end + 0.5)
        place.net.broker.start()
        flows_again(probe, time.monotonic(), 45)  # they ask ever more seldom
    assert sessions(place) == [1, 1]


def test_a_broker_that_comes_late(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, HOME), turn=False)
    place.net.broker.stop()
    for host in HOSTS:
        place.pair.start(host)
    until(lambda: all(map(place.status, HOSTS)), lambda: "they did not start")
    time.sleep(1)
    place.net.broker.start()
    until_direct(place, 30)
    assert pings(place)


def test_a_broker_that_restarts_brings_together_whom_it_never_knew(make_place: MakePlace) -> None:
    """It remembers nothing: B, who was there before, and A, who comes after."""
    place = make_place(Meeting(HOME, HOME), turn=False)
    start(place, "B")
    place.net.broker.stop()
    time.sleep(0.5)
    place.net.broker.start()
    place.pair.start("A")
    until_direct(place, 30)
    assert pings(place)


def test_an_end_that_restarts_is_met_again(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, CGNAT), turn=False)
    start(place)
    until_direct(place)
    for host in HOSTS:
        place.pair.stop(host)
        start(place, host)
        until_direct(place, 30)
        assert pings(place)
