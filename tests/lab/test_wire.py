"""What is on the wire is plain QUIC, and the migration of docs/protocol.md: tshark is the judge.

[A] u0 --[natA0]-- core --[natB0, 4117 forwarded]-- u0 [B]
                    ^ captured here, decrypted with the TLS key log of both ends
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import pytest

from cli.demo.world import Happened, World
from tests.lab.scenario import Scenario
from tests.lab.test_tunnel import MakeScenario

FIELDS = (
    "frame.number",
    "frame.time_epoch",
    "ip.src",
    "ip.dst",
    "udp.srcport",
    "udp.dstport",
    "udp.length",
    "quic.header_form",
    "quic.dcid",
    "quic.packet_number",
    "quic.frame_type",
    "_ws.malformed",
    "quic.decryption_failed",
)
STUN = "udp.payload[4:4] == 21:12:a4:42"  # the magic cookie: RFC 8489 section 5, RFC 9443
PATH_CHALLENGE, PATH_RESPONSE = "26", "27"  # RFC 9000 section 19
DATAGRAM = "48"  # RFC 9221: the one without a length, which reaches to the end of the packet


class Packet:
    """One UDP datagram as tshark read it."""

    def __init__(self, row: dict[str, str]) -> None:
        self.number = int(row["frame.number"])
        self.source = (row["ip.src"], int(row["udp.srcport"]))
        self.target = (row["ip.dst"], int(row["udp.dstport"]))
        self.payload = int(row["udp.length"]) - 8
        self.short = row["quic.header_form"] == "0"
        self.cid = row["quic.dcid"].split(";")[0]
        self.frames = [str(int(kind, 0)) for kind in row["quic.frame_type"].split(";") if kind]
        self.broken = bool(row["_ws.malformed"] or row["quic.decryption_failed"])


def packets(scenario: Scenario) -> list[Packet]:
    # Every datagram passes two interfaces of the core; one of them is enough.
    rows = scenario.decoded(
        FIELDS, f'udp.port == 4117 && frame.interface_name == "a0" && !({STUN})'
    )
    return [Packet(row) for row in rows]


def run(make_scenario: MakeScenario, move: Callable[[World], Happened]) -> list[Packet]:
    """Probes both ways, one move in the middle, everything captured."""
    scenario = make_scenario(uplinks=(1, 1))
    scenario.up()
    with scenario.probing(spacing=0.02):
        move(scenario.world)
        time.sleep(2)
    for name in ("A", "B"):
        scenario.pair.stop("A" if name == "A" else "B")
    found = packets(scenario)
    assert len(found) > 100
    return found


def from_a(packet: Packet) -> bool:
    return packet.target[1] == 4117 and packet.target[0].startswith("203.0.113.")


def check_everything_decrypts(found: list[Packet]) -> None:
    short = [packet for packet in found if packet.short]
    unreadable = [packet.number for packet in short if packet.broken or not packet.frames]
    assert not unreadable, f"tshark could not read frames {unreadable[:5]}"


def check_each_path_has_its_own_cid(found: list[Packet]) -> None:
    """RFC 9000 section 9.5: no connection ID is used to send to, or from, two addresses by an
    end that knows of them.
    """
    used: dict[tuple[bool, str], set[tuple[str, int]]] = defaultdict(set)
    for packet in found:
        if packet.short and not from_a(packet):  # what B sends, by where it sends it
            used[False, packet.cid].add(packet.target)
    for (_, cid), targets in used.items():
        assert len(targets) == 1, f"B used {cid} toward {targets}"


def check_challenges(found: list[Packet]) -> None:
    """Padded to 1,200 bytes, and answered where they came in."""
    challenges = [packet for packet in found if PATH_CHALLENGE in packet.frames]
    responses = [packet for packet in found if PATH_RESPONSE in packet.frames]
    assert challenges and responses
    assert sum(packet.payload >= 1200 for packet in challenges) >= 1
    asked = {(packet.target, packet.source) for packet in challenges}
    for response in responses:
        assert (response.source, response.target) in asked


def first_to_new_address(found: list[Packet]) -> Packet:
    """B's first packet to an address of A it had not sent to before."""
    known: set[tuple[str, int]] = set()
    new: Packet | None = None
    for packet in found:
        if not packet.short or from_a(packet):
            continue
        if known and packet.target not in known and new is None:
            new = packet
        known.add(packet.target)
    assert new is not None, "B never sent to another address"
    return new


def test_an_address_change_is_a_migration(make_scenario: MakeScenario) -> None:
    found = run(make_scenario, lambda world: world.change_address("A"))
    check_everything_decrypts(found)
    check_each_path_has_its_own_cid(found)
    check_challenges(found)
    # The mover's first packet from the new address: a new connection ID and PATH_CHALLENGE.
    sources: list[tuple[str, int]] = []
    cids: dict[tuple[str, int], str] = {}
    for packet in found:
        if packet.short and from_a(packet) and packet.source not in sources:
            sources.append(packet.source)
            cids[packet.source] = packet.cid
            if len(sources) == 2:
                assert PATH_CHALLENGE in packet.frames, packet.frames
    assert len(sources) == 2, sources
    assert cids[sources[0]] != cids[sources[1]]
    assert PATH_CHALLENGE in first_to_new_address(found).frames


@pytest.mark.parametrize("address", [False, True], ids=["port", "address"])
def test_a_rebinding_is_answered_with_new_connection_ids(
    make_scenario: MakeScenario, address: bool
) -> None:
    found = run(make_scenario, lambda world: world.rebind_nat("A", address=address))
    check_everything_decrypts(found)
    check_each_path_has_its_own_cid(found)
    check_challenges(found)
    reply = first_to_new_address(found)
    assert PATH_CHALLENGE in reply.frames, reply.frames
    # The mover did not know: its first packet from the new mapping bears the old connection ID;
    # then, told by the other end's new one, it changes its own.
    by_source: dict[tuple[str, int], list[str]] = {}
    for packet in found:
        # Suspicious of the silence, A also asks at B's other endpoint, with an ID for that path.
        if packet.short and from_a(packet) and packet.target == reply.source:
            cids = by_source.setdefault(packet.source, [])
            if not cids or cids[-1] != packet.cid:
                cids.append(packet.cid)
    (_, old), (_, new) = list(by_source.items())[:2]
    assert new[0] == old[-1]
    assert len(new) == 2 and new[1] not in old, by_source


def test_data_travels_in_datagrams_one_a_packet(make_scenario: MakeScenario) -> None:
    found = run(make_scenario, lambda world: world.rebind_nat("A"))
    carrying = [packet for packet in found if DATAGRAM in packet.frames]
    assert len(carrying) > 80
    assert all(packet.frames.count(DATAGRAM) == 1 for packet in carrying)
    assert all(packet.frames[-1] == DATAGRAM for packet in carrying)
    check_everything_decrypts(found)
