"""What the userspace NAT does to a packet, beside what scapy would build."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from bench.natbox import Box, endpoints, readdress
from bench.nattable import NatTable

INSIDE = {4: "10.1.0.2", 6: "fd00:a0::2"}
REMOTE = {4: "203.0.113.10", 6: "2001:db8:f2::10"}
PUBLIC = {4: "198.51.100.10", 6: "2001:db8:f0::10"}


def packet(family: int, source: tuple[str, int], target: tuple[str, int], **more: Any) -> bytes:
    layer = IP(src=source[0], dst=target[0]) if family == 4 else IPv6(src=source[0], dst=target[0])
    hops = more.pop("hops", 64)
    layer.fields["ttl" if family == 4 else "hlim"] = hops
    udp = UDP(sport=source[1], dport=target[1], **more.pop("udp", {}))
    return bytes(layer / udp / Raw(more.pop("payload", b"payload")))


def without_header_checksum(data: bytes) -> bytes:
    """It is the kernel's part."""
    return data[:10] + bytes(2) + data[12:] if data[0] >> 4 == 4 else data


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("payload", [b"", b"odd", bytes(range(256)) * 4])
def test_addresses_hops_and_checksum(family: int, payload: bytes) -> None:
    inside, remote = (INSIDE[family], 4117), (REMOTE[family], 4118)
    outside = (PUBLIC[family], 20001)
    before = packet(family, inside, remote, payload=payload)
    assert endpoints(before) == (inside, remote)
    for change, ends in (
        ({"source": outside}, (outside, remote)),
        ({"target": outside}, (inside, outside)),
        ({"source": remote, "target": inside}, (remote, inside)),
        ({}, (inside, remote)),
    ):
        expected = packet(family, *ends, payload=payload, hops=63)
        found = readdress(before, **change)
        assert without_header_checksum(found) == without_header_checksum(expected)


def test_checksums_of_random_packets() -> None:
    rng = random.Random(1)
    for _ in range(300):
        ends = [(f"10.{rng.randrange(256)}.0.1", rng.randrange(1, 65536)) for _ in range(4)]
        payload = rng.randbytes(rng.randrange(9))
        before = packet(4, ends[0], ends[1], payload=payload)
        expected = packet(4, ends[2], ends[3], payload=payload, hops=63)
        found = readdress(before, source=ends[2], target=ends[3])
        assert without_header_checksum(found) == without_header_checksum(expected)


def test_no_checksum_stays_none() -> None:
    before = packet(4, (INSIDE[4], 1), (REMOTE[4], 2), udp={"chksum": 0})
    assert readdress(before, source=(PUBLIC[4], 3))[26:28] == bytes(2)


def test_what_is_no_whole_datagram_is_not_touched() -> None:
    whole = packet(4, (INSIDE[4], 1), (REMOTE[4], 2))
    fragment, more = (whole[:6] + word + whole[8:] for word in (b"\x00\x64", b"\x20\x00"))
    tcp = whole[:9] + b"\x06" + whole[10:]
    for data in (fragment, more, tcp, whole[:27], b"", packet(6, ("::1", 1), ("::1", 2))[:47]):
        assert endpoints(data) is None


class Sent:
    """Stands for the sockets."""

    def __init__(self, *packets: tuple[str, bytes]) -> None:
        self.waiting = packets
        self.sent: list[bytes] = []

    def receive(self, fd: int) -> tuple[tuple[str, bytes], ...]:
        return self.waiting

    def send(self, data: bytes) -> None:
        self.sent.append(data)


def passed(table: NatTable, way: str, data: bytes) -> list[Any]:
    wires = Sent((way, data))
    Box(table, wires).receive(0, 0.0)  # type: ignore[arg-type]
    return [endpoints(one) for one in wires.sent]


@pytest.mark.parametrize("hairpin", [True, False])
def test_a_hairpin_has_two_outsides(hairpin: bool) -> None:
    table = NatTable({4: (PUBLIC[4],)}, random.Random(1), filtering="endpoint", hairpin=hairpin)
    a, b, remote = ("10.1.0.2", 1), ("10.1.0.3", 2), (REMOTE[4], 3)
    (((_, port_a), _),) = passed(table, "out", packet(4, a, remote))
    (((_, port_b), _),) = passed(table, "out", packet(4, b, remote))
    found = passed(table, "out", packet(4, a, (PUBLIC[4], port_b)))
    assert found == ([((PUBLIC[4], port_a), b)] if hairpin else [])


def test_a_packet_that_has_no_hop_left_ends_here() -> None:
    table = NatTable({4: (PUBLIC[4],)}, random.Random(1))
    for hops, count in ((1, 0), (2, 1)):
        assert (
            len(passed(table, "out", packet(4, ("10.1.0.2", 1), (REMOTE[4], 2), hops=hops)))
            == count
        )
