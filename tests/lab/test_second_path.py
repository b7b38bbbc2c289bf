"""What travels on the path that is not in use: checks and copies, nothing that moves a peer.

   u0 --[natA0]-- a0 +------+ b0 --[natB0]-- u0       captured at a0 and a1, decrypted with the
[A]                  | core |                  [B]    TLS key log of both ends, judged by tshark
   u1 --[natA1]-- a1 +------+ b1 --[natB1]-- u1
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import NamedTuple

from cli.demo.world import PORT
from tests.lab.hosts import until
from tests.lab.scenario import Scenario
from tests.lab.test_faults import OTHER, settled
from tests.lab.test_ice import local, mapping, until_warm
from tests.lab.test_tunnel import MakeScenario
from tests.lab.test_wire import STUN

MINE = f'udp.port == {PORT} && (frame.interface_name == "a0" || frame.interface_name == "a1")'
REQUEST, RESPONSE = "0x0001", "0x0101"  # RFC 8489 section 5: of a Binding
# RFC 9000 section 9.1, and RFC 9221 section 4
PROBING = {"PADDING": 0, "NEW_CONNECTION_ID": 24, "PATH_CHALLENGE": 26, "PATH_RESPONSE": 27}
DATAGRAMS = {48, 49}
COPY = "01"  # docs/protocol.md, the first byte of the payload

End = tuple[str, int]


class Packet(NamedTuple):
    """A QUIC packet of a connection that is up."""

    number: int
    time: float
    source: End
    target: End
    cid: str
    frames: list[int]
    datagrams: list[str]

    @property
    def path(self) -> frozenset[End]:
        return frozenset((self.source, self.target))

    @property
    def is_probing(self) -> bool:
        """Whether it moves no peer: copies do not either."""
        others = set(self.frames) - set(PROBING.values()) - DATAGRAMS
        return not others and all(payload.startswith(COPY) for payload in self.datagrams)


def packets(scenario: Scenario) -> list[Packet]:
    fields = (
        "frame.number", "frame.time_epoch", "ip.src", "udp.srcport", "ip.dst", "udp.dstport",
        "quic.header_form", "quic.dcid", "quic.frame_type", "quic.dg",
        "_ws.malformed", "quic.decryption_failed",
    )  # fmt: skip
    found = []
    for row in scenario.decoded(fields, f"{MINE} && !({STUN})"):
        assert row["quic.header_form"], f"frame {row['frame.number']} is neither STUN nor QUIC"
        broken = row["_ws.malformed"] or row["quic.decryption_failed"]
        if row["quic.header_form"] != "0":
            continue
        assert row["quic.frame_type"] and not broken, f"frame {row['frame.number']} is unreadable"
        found.append(
            Packet(
                int(row["frame.number"]),
                float(row["frame.time_epoch"]),
                (row["ip.src"], int(row["udp.srcport"])),
                (row["ip.dst"], int(row["udp.dstport"])),
                row["quic.dcid"].split(";")[0],
                [int(kind, 0) for kind in row["quic.frame_type"].split(";")],
                [payload.replace(":", "") for payload in row["quic.dg"].split(";") if payload],
            )
        )
    return found


def check_stun(scenario: Scenario) -> None:
    """Checks are STUN to a dissector that expects it, whole, and on every pair."""
    fields = (
        "frame.number", "ip.src", "stun.type", "stun.id", "stun.att.username", "stun.att.priority",
        "stun.att.hmac", "stun.att.crc32.status", "stun.att.port-xord", "_ws.malformed",
    )  # fmt: skip
    rows = scenario.decoded(fields, f"{MINE} && {STUN}", protocol="stun")
    assert {row["stun.type"] for row in rows} == {REQUEST, RESPONSE}
    for row in rows:
        at = f"frame {row['frame.number']}"
        assert not row["_ws.malformed"], at
        assert len(row["stun.att.hmac"].replace(":", "")) == 40, at  # SHA-1
        assert row["stun.att.crc32.status"] == "1", f"{at}: FINGERPRINT"
        if row["stun.type"] == REQUEST:
            assert len(row["stun.att.username"].split(":")) == 2 and row["stun.att.priority"], at
        else:
            assert row["stun.att.port-xord"] and not row["stun.att.username"], at
    asked = {row["stun.id"] for row in rows if row["stun.type"] == REQUEST}
    answered = {row["stun.id"] for row in rows if row["stun.type"] == RESPONSE}
    assert answered and answered <= asked


def check_connection_ids(found: list[Packet]) -> None:
    """RFC 9000 section 9.5: each path has connection IDs of its own, in either direction."""
    used: dict[str, set[tuple[End, End]]] = defaultdict(set)
    for packet in found:
        used[packet.cid].add((packet.source, packet.target))
    for cid, ways in used.items():
        assert len(ways) == 1, f"{cid} was used on {ways}"


def test_nothing_on_the_second_path_moves_a_peer(make_scenario: MakeScenario) -> None:
    scenario = make_scenario(uplinks=(1, 2))
    scenario.dial_one_path()
    scenario.configure(f'[ice]\nadvertise = ["{mapping(scenario, "B", 1)}"]', ["B"])
    scenario.up()
    scenario.world.add_interface("A")
    settled(scenario)
    for name, other in OTHER.items():
        ours, theirs = local(scenario, name, 1), mapping(scenario, other, 1)
        until_warm(scenario, name, local=ours, remote=theirs, backup=True)
    world = scenario.world
    active = frozenset((world.uplink("A").nat.public(4), world.uplink("B").nat.public(4)))
    with scenario.probing(spacing=0.02) as probe:
        moves = [len(scenario.pair.history(name)) for name in world.hosts]
        begin, later = time.time(), time.monotonic() + 2.0
        until(lambda: probe.flowing(later), lambda: "no probe arrives")
        assert moves == [len(scenario.pair.history(name)) for name in world.hosts]
        end = time.time()
        world.switch_interface("A")
        until(lambda: scenario.pair.active_uplink("A") == 1, lambda: scenario.pair.history("A"))
    found = packets(scenario)
    check_stun(scenario)
    check_connection_ids(found)

    quiet = [packet for packet in found if begin < packet.time < end]
    assert sum(packet.path == active for packet in quiet) > 150
    elsewhere = [packet for packet in quiet if packet.path != active]
    for packet in elsewhere:
        assert packet.is_probing, packet
    # Two ends, 50 probes a second, for two seconds; all on one path.
    copies = [packet for packet in elsewhere if packet.datagrams]
    assert len(copies) > 150
    (second,) = {packet.path for packet in copies}
    assert not second & active, "the second path shares an uplink with the active one"
    for packet in (p for p in quiet if p.path == active):
        assert not any(payload.startswith(COPY) for payload in packet.datagrams), packet

    # Then A moves on purpose: the packet that moves asks as well, with an ID of that path alone.
    after = [p for p in found if p.time > end and p.source == world.uplink("A", 1).nat.public(4)]
    mover = next(packet for packet in after if not packet.is_probing)
    assert PROBING["PATH_CHALLENGE"] in mover.frames, mover
    assert mover.cid not in {packet.cid for packet in found if packet.path == active}
