"""Every kind of NAT is what it says: asked by plain UDP sockets, not by anything that is tested.

    [host] u0 --lan[ home ]wan-- (lan[ carrier ]wan) --+------+-- [stun] ONE, at two ports, and TWO
                                                       | core |
                                                       +------+-- [broker] TCP

One socket of the host writes to ONE's first port, to ONE's other port, and to TWO, who say where it
came from; then all three write to where ONE's first port saw it, of which the host has written to
ONE's first port only.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count

import pytest

from bench.nat.internet import DEVICE, HOSTS, Internet
from bench.nat.kinds import FORGETFUL, KINDS, SHARED, Kind, Meeting
from bench.servers import HTTPS_PORT, MQTT_PORT, MQTTS_PORT, STUN_PORT
from cli.demo.netns import Namespace
from cli.demo.world import PORT

Endpoint = tuple[str, int]
_SERVER_PORT = 5001
_PATIENCE = 1.0  # seconds for a packet that must come
_SILENCE = 0.3  # seconds after which one that must not come has not: 15 round trips
# Of the three remotes, how many are one to who depends on so much: itself, other port, other host.
SAME = {
    "endpoint": [True, True, True],
    "address": [True, True, False],
    "port": [True, False, False],
}
NUMBERS = count()


def udp(space: Namespace, address: str, port: int) -> socket.socket:
    def make() -> socket.socket:
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = socket.socket(kind, socket.SOCK_DGRAM)
        made.bind((address, port))
        made.settimeout(_PATIENCE)
        return made

    return space.call(make)


def send(source: socket.socket, to: Endpoint) -> bytes:
    """Something that was never sent before."""
    data = f"packet {next(NUMBERS)}".encode()
    source.sendto(data, to)
    return data


def seen(source: socket.socket, target: socket.socket, at: Endpoint) -> Endpoint | None:
    """Where a packet comes from in the eyes of its target; None when it does not arrive."""
    data = send(source, at)
    target.settimeout(_SILENCE)
    try:
        while True:
            got, sender = target.recvfrom(100)
            if got == data:
                return (sender[0], sender[1])
    except TimeoutError:
        return None


class Probe:
    """The sockets of the module docstring, in a world of which A's side is asked."""

    def __init__(self, net: Internet, stack: ExitStack, port: int = PORT) -> None:
        self.net = net
        space = net.stun.space
        first, second = self.addresses = _both(net)
        places = [(first, _SERVER_PORT), (first, _SERVER_PORT + 1), (second, _SERVER_PORT)]
        self.remotes = [stack.enter_context(udp(space, *place)) for place in places]
        self.places = [(one.getsockname()[0], one.getsockname()[1]) for one in self.remotes]
        anywhere = "::" if net.family == 6 else "0.0.0.0"
        self.hosts = [
            stack.enter_context(udp(net.hosts[name].space, anywhere, port)) for name in HOSTS
        ]

    def mapped(self, host: int = 0, remote: int = 0) -> Endpoint:
        """Write to a remote, who says from where."""
        found = seen(self.hosts[host], self.remotes[remote], self.places[remote])
        assert found is not None, "a packet from inside does not leave"
        return found

    def let_in(self, at: Endpoint, host: int = 0) -> list[bool]:
        """Which remotes reach the host there."""
        found = [seen(remote, self.hosts[host], at) for remote in self.remotes]
        for sender, place in zip(found, self.places, strict=True):
            assert sender in (None, place), "senders outside keep their address"
        return [sender is not None for sender in found]


def _both(net: Internet) -> tuple[str, str]:
    listing = net.stun.space.run(["ip", "-br", "addr", "show", "dev", "wan"]).stdout.split()
    found = [one.partition("/")[0] for one in listing if "/" in one]
    first, second = (one for one in found if not one.startswith("fe80"))
    return first, second


MakeProbe = Callable[..., Probe]


@pytest.fixture
def probing() -> Iterator[MakeProbe]:
    """Probes of worlds in which both ends are of a kind, or of a meeting."""
    with ExitStack() as stack:

        def make(meeting: Kind | Meeting, port: int = PORT) -> Probe:
            if isinstance(meeting, Kind):
                meeting = Meeting(meeting, meeting)
            net = stack.enter_context(Internet(meeting, turn=False))
            return Probe(net, stack, port)

        yield make


OPEN = [kind for kind in KINDS.values() if not kind.blocked]
# What the kernel's NAT promises for the tunnel's port only, these promise for all.
USERSPACE = [kind for kind in OPEN if all(stage.make == "box" for stage in kind.stages)]
CASES = [(kind, PORT) for kind in OPEN] + [(kind, 0) for kind in USERSPACE]


@pytest.mark.parametrize(("kind", "port"), CASES, ids=[f"{k.name}-{p}" for k, p in CASES])
def test_mapping_and_filtering(probing: MakeProbe, kind: Kind, port: int) -> None:
    probe = probing(kind, port)
    inside = probe.net.address("A")
    stage = kind.stages[-1].make
    if stage in ("nft", "box"):
        outermost = probe.net.routers["A"][0]
        assert not any(probe.let_in((outermost.publics[0], PORT))), "nobody has written yet"
    elif stage == "firewall":
        assert not any(probe.let_in((inside, PORT))), "nobody has written yet"
    at = probe.mapped()
    assert probe.let_in(at) == SAME[kind.filtering]
    mapped = [at, *(probe.mapped(remote=remote) for remote in (1, 2))]
    assert [one == at for one in mapped] == SAME[kind.mapping]
    assert mapped == [probe.mapped(remote=remote) for remote in (0, 1, 2)], "mappings stay"
    # Whoever was written to has a way in, at the mapping that it saw.
    for remote, one in enumerate(mapped):
        assert seen(probe.remotes[remote], probe.hosts[0], one) == probe.places[remote]
    if stage in ("route", "firewall"):
        assert at == (inside, PORT)
    else:
        assert {one[0] for one in mapped} == {outermost.publics[0]}
        assert PORT not in {one[1] for one in mapped}, "no port is preserved"


@pytest.mark.parametrize("kind", USERSPACE, ids=lambda kind: kind.name)
def test_each_socket_has_a_mapping_of_its_own(probing: MakeProbe, kind: Kind) -> None:
    probe = probing(kind)
    with ExitStack() as stack:
        space, remote = probe.net.hosts["A"].space, probe.remotes[0]
        sockets = [stack.enter_context(udp(space, "0.0.0.0", 0)) for _ in range(20)]
        found = [seen(one, remote, probe.places[0]) for one in sockets]
        assert len(set(found)) == 20 and None not in found
        for one, at in zip(sockets, found, strict=True):
            assert at is not None and seen(remote, one, at) == probe.places[0]


def test_both_ends_are_behind_their_own(probing: MakeProbe) -> None:
    probe = probing(Meeting(KINDS["cgnat"], KINDS["symmetric"]))
    a, b = probe.mapped(0), probe.mapped(1)
    assert a[0].startswith("198.51.100.") and b[0].startswith("203.0.113.")
    assert a == probe.mapped(0, remote=2) and b != probe.mapped(1, remote=2)


@pytest.mark.parametrize(
    ("name", "routers"),
    [("public", 2), ("port-restricted", 2), ("cgnat", 3), ("cgnat-symmetric", 3)],
)
def test_routers_on_the_way(probing: MakeProbe, name: str, routers: int) -> None:
    """A packet that may pass one router less does not arrive. The core counts, too."""
    probe = probing(KINDS[name])
    for hops, arrives in ((routers, False), (routers + 1, True)):
        probe.hosts[0].setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
        assert (seen(probe.hosts[0], probe.remotes[0], probe.places[0]) is not None) == arrives


@pytest.mark.parametrize("meeting", SHARED, ids=str)
def test_two_hosts_behind_one(probing: MakeProbe, meeting: Meeting) -> None:
    probe = probing(meeting)
    a, b = probe.mapped(0), probe.mapped(1)
    assert a[0] == b[0] and a[1] != b[1]
    ours, theirs = probe.hosts
    hairpin = meeting.a.stages[0].hairpin
    # Of both, for the filters: the first packet opens the way for the second.
    seen(ours, theirs, b)
    assert seen(theirs, ours, a) == (b if hairpin else None)
    assert seen(ours, theirs, b) == (a if hairpin else None)
    on_link = (probe.net.address("B"), PORT)
    if meeting.shared == "home":
        assert seen(ours, theirs, on_link) == (probe.net.address("A"), PORT)
    else:
        assert seen_or_refused(ours, theirs, on_link) is None


def seen_or_refused(source: socket.socket, target: socket.socket, at: Endpoint) -> Endpoint | None:
    """As `seen`, where there may be nobody."""
    try:
        return seen(source, target, at)
    except OSError:  # an earlier packet was refused by ICMP
        return None


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_tcp(probing: MakeProbe, kind: Kind) -> None:
    """All reach the broker, the strictest at the port of the web only."""
    probe = probing(kind)
    broker = probe.net.broker.addresses[0]
    allowed = kind.stages[-1].tcp_ports
    for port in (MQTT_PORT, MQTTS_PORT, HTTPS_PORT):
        assert connects(probe.net.hosts["A"].space, broker, port) == (
            not allowed or port in allowed
        ), port


def connects(space: Namespace, host: str, port: int) -> bool:
    try:
        space.call(lambda: socket.create_connection((host, port), _SILENCE)).close()
    except TimeoutError:
        return False
    return True


BLOCKED = [kind for kind in KINDS.values() if kind.blocked]


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_udp_is_blocked(probing: MakeProbe, kind: Kind) -> None:
    probe = probing(kind)
    for remote, place in zip(probe.remotes, probe.places, strict=True):
        assert seen(probe.hosts[0], remote, place) is None
    assert not any(probe.let_in((probe.net.routers["A"][0].publics[0], PORT)))
    assert not any(probe.let_in((probe.net.address("A"), PORT)))


def test_a_short_memory(probing: MakeProbe) -> None:
    probe = probing(FORGETFUL)
    memory = FORGETFUL.stages[0].expiry
    at = probe.mapped()
    assert probe.let_in(at)[0]
    for _ in range(3):  # it lives while somebody inside sends
        time.sleep(memory / 2)
        send(probe.hosts[0], probe.places[0])
    assert probe.let_in(at)[0]
    time.sleep(memory + 2)  # the kernel looks about once a second
    assert not probe.let_in(at)[0]
    assert probe.let_in(probe.mapped())[0]


@pytest.mark.parametrize("name", ["port-restricted", "restricted", "public", "firewall6"])
def test_a_host_that_moves_is_another(probing: MakeProbe, name: str) -> None:
    probe = probing(KINDS[name])
    before, old = probe.mapped(), probe.net.address("A")
    probe.net.change_address("A")
    assert probe.net.address("A") != old
    shown = probe.net.hosts["A"].space.run(["ip", "-br", "addr", "show", "dev", DEVICE]).stdout
    assert f"{probe.net.address('A')}/" in shown and f"{old}/" not in shown
    assert not any(probe.let_in(before))
    assert probe.mapped() != before


@pytest.mark.parametrize("name", ["symmetric", "firewall6"])
def test_the_servers_answer(probing: MakeProbe, name: str) -> None:
    """STUN in the user's own words: coturn's client, through the NAT."""
    net = probing(KINDS[name]).net
    place = net.stun.addresses[net.family]
    client = ["turnutils_stunclient", "-p", str(STUN_PORT), place]
    # It waits for ever for answers from other addresses, which filters hold back.
    shown = net.hosts["A"].space.run(["timeout", "2", *client], check=False).stdout
    public = net.routers["A"][0].publics[0] if net.family == 4 else net.address("A")
    assert f"reflexive addr: {public}" in shown or f"reflexive addr: [{public}]" in shown, shown
