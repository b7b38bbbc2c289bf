"""Super-packets: cut as the kernel would, put together only what may be, nothing corrupt hidden."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrRouting
from scapy.packet import Raw

from tests.unit.native import library

MAX_IP = 65535
VNET = 10  # bytes of a virtio header
NEEDS_CSUM = 1
NONE, TCPV4, TCPV6, UDP_L4, ECN = 0, 1, 4, 5, 0x80
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
MAX_UDP = 64  # segments of a UDP super-packet (<linux/udp.h>)


class Vnet(ctypes.Structure):
    _fields_ = (
        ("flags", c_uint8),
        ("gso_type", c_uint8),
        ("hdr_len", c_uint16),
        ("gso_size", c_uint16),
        ("csum_start", c_uint16),
        ("csum_offset", c_uint16),
    )


class Super(ctypes.Structure):
    _fields_ = (
        ("packet", pointer),
        ("length", c_uint32),
        ("header", c_uint32),
        ("l4", c_uint32),
        ("mss", c_uint32),
        ("count", c_uint32),
        ("protocol", c_uint8),
        ("version", c_uint8),
    )


class Iovec(ctypes.Structure):
    _fields_ = (("base", pointer), ("length", c_size_t))


WRITE = ctypes.CFUNCTYPE(None, pointer, POINTER(Vnet), pointer, c_int, c_uint32)


def load() -> ctypes.CDLL:
    lib = library("offload.c")
    for name, result, arguments in (
        ("checksum_add", c_uint64, (c_char_p, c_size_t, c_uint64)),
        ("checksum_fold", c_uint16, (c_uint64,)),
        ("checksum_pseudo", c_uint64, (c_char_p, c_uint8, c_uint32)),
        ("super_open", c_bool, (POINTER(Super), POINTER(Vnet), pointer, c_uint32)),
        ("super_size", c_uint32, (POINTER(Super), c_uint32)),
        ("super_cut", None, (POINTER(Super), c_uint32, pointer)),
        ("coalescer_new", pointer, ()),
        ("coalescer_free", None, (pointer,)),
        ("coalescer_allow", None, (pointer, c_bool, c_bool)),
        ("coalescer_add", c_bool, (pointer, pointer, c_uint32)),
        ("coalescer_flush", None, (pointer, WRITE, pointer)),
    ):
        function = getattr(lib, f"mt_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


LIB = load()

# ---- The model: slow, and obvious


def total(data: bytes, start: int = 0) -> int:
    """The sum of RFC 1071, folded, not complemented."""
    data += bytes(len(data) % 2)
    value = start + sum(data[i] << 8 | data[i + 1] for i in range(0, len(data), 2))
    while value > 0xFFFF:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def pseudo(packet: bytes, protocol: int, length: int) -> int:
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return total(addresses + bytes(3) + bytes([protocol]) + length.to_bytes(4))


@dataclass(frozen=True)
class Packet:
    """A plain TCP or UDP packet by its fields; UDP has no use for some of them."""

    version: int = 4
    source: str = ""
    tos: int = 0
    ttl: int = 64
    df: bool = True
    ident: int = 0
    label: int = 0
    sport: int = 40000
    dport: int = 443
    udp: bool = False
    seq: int = 1000
    ack: int = 7
    flags: int = ACK
    reserved: int = 0
    window: int = 501
    urgent: int = 0
    options: bytes = b""
    payload: bytes = field(default=b"", repr=False)

    @property
    def l4(self) -> int:
        return 20 if self.version == 4 else 40

    @property
    def protocol(self) -> int:
        return 17 if self.udp else 6

    @property
    def header(self) -> int:
        return self.l4 + (8 if self.udp else 20 + len(self.options))

    @property
    def checksum_at(self) -> int:
        return self.l4 + (6 if self.udp else 16)

    def ip(self, upper: int) -> bytes:
        """The IP header before `upper` bytes."""
        if self.version == 4:
            addresses = ip_address(self.source or "10.88.0.1").packed + bytes([10, 88, 0, 2])
            head = bytes([0x45, self.tos]) + (20 + upper).to_bytes(2) + self.ident.to_bytes(2)
            head += bytes([0x40 * self.df, 0, self.ttl, self.protocol])
            return head + (0xFFFF - total(head + addresses)).to_bytes(2) + addresses
        addresses = ip_address(self.source or "fd88::1").packed + ip_address("fd88::2").packed
        first = 6 << 28 | self.tos << 20 | self.label
        head = first.to_bytes(4) + upper.to_bytes(2) + bytes([self.protocol, self.ttl])
        return head + addresses

    def bytes(self, partial: bool = False) -> bytes:
        """On the wire; partial: the checksum field holds only the pseudo header's sum."""
        ports = self.sport.to_bytes(2) + self.dport.to_bytes(2)
        upper = self.header - self.l4 + len(self.payload)
        if self.udp:
            before, after = ports + upper.to_bytes(2), self.payload
        else:
            words = self.seq.to_bytes(4) + self.ack.to_bytes(4)
            control = bytes([(20 + len(self.options)) << 2 | self.reserved, self.flags])
            before = ports + words + control + self.window.to_bytes(2)
            after = self.urgent.to_bytes(2) + self.options + self.payload
        ip = self.ip(upper)
        checksum = pseudo(ip, self.protocol, upper)
        if not partial:
            checksum = 0xFFFF - total(before + b"\0\0" + after, checksum)
            if self.udp and checksum == 0:
                checksum = 0xFFFF
        return ip + before + checksum.to_bytes(2) + after

    def vnet(self, mss: int) -> Vnet:
        kind = UDP_L4 if self.udp else TCPV4 if self.version == 4 else TCPV6
        # What the kernel says in hdr_len is what happens to be linear, not the headers' length.
        return Vnet(NEEDS_CSUM, kind, 17, mss, self.l4, self.checksum_at - self.l4)

    def segments(self, mss: int) -> Iterator[Packet]:
        """What the kernel would cut it into."""
        starts = range(0, len(self.payload), mss)
        for i, start in enumerate(starts):
            flags = self.flags & ~(0 if i == 0 else CWR)
            if start != starts[-1]:
                flags &= ~(FIN | PSH)
            yield replace(
                self,
                ident=(self.ident + i) % 2**16,
                seq=(self.seq + start) % 2**32,
                flags=flags,
                payload=self.payload[start : start + mss],
            )


def parse(packet: bytes) -> Packet:
    """A plain packet's fields, whatever its checksum."""
    version = packet[0] >> 4
    common: dict[str, int | bool | str]
    if version == 4:
        at = 20
        protocol = packet[9]
        common = {
            "source": str(ip_address(packet[12:16])),
            "tos": packet[1],
            "ttl": packet[8],
            "df": bool(packet[6] & 0x40),
            "ident": int.from_bytes(packet[4:6]),
        }
    else:
        at = 40
        protocol = packet[6]
        first = int.from_bytes(packet[:4])
        common = {
            "source": str(ip_address(packet[8:24])),
            "tos": first >> 20 & 0xFF,
            "label": first & 0xFFFFF,
            "ttl": packet[7],
        }
    number = int.from_bytes
    common |= {"sport": number(packet[at : at + 2]), "dport": number(packet[at + 2 : at + 4])}
    common |= {"version": version, "udp": protocol == 17}
    if protocol == 17:
        return Packet(**common, payload=packet[at + 8 :])  # type: ignore[arg-type]
    end = at + (packet[at + 12] >> 4) * 4
    common |= {
        "seq": number(packet[at + 4 : at + 8]),
        "ack": number(packet[at + 8 : at + 12]),
        "reserved": packet[at + 12] & 15,
        "flags": packet[at + 13],
        "window": number(packet[at + 14 : at + 16]),
        "urgent": number(packet[at + 18 : at + 20]),
    }
    return Packet(**common, options=packet[at + 20 : end], payload=packet[end:])  # type: ignore[arg-type]


# ---- The C, called


def opened(vnet: Vnet, packet: bytes) -> tuple[Super, ctypes.Array[ctypes.c_char]] | None:
    """The memory has no byte more than the packet, for AddressSanitizer's sake."""
    memory = ctypes.create_string_buffer(packet, len(packet))
    found = Super()
    if not LIB.mt_super_open(found, vnet, memory, len(packet)):
        return None
    return found, memory


def cut(vnet: Vnet, packet: bytes, limit: int = 70000) -> list[bytes] | None:
    """The segments (at most `limit`), or None where the packet is refused."""
    result = opened(vnet, packet)
    if result is None:
        return None
    found, _memory = result
    segments = []
    for index in range(min(found.count, limit)):
        size = LIB.mt_super_size(found, index)
        out = ctypes.create_string_buffer(size)
        LIB.mt_super_cut(found, index, out)
        segments.append(out.raw)
    return segments


class Written(NamedTuple):
    """One write to the TUN."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int
    packet: bytes
    parts: int

    @property
    def plain(self) -> bool:
        """Whether the virtio header says nothing."""
        return self[:6] == (0, 0, 0, 0, 0, 0)

    @property
    def vnet(self) -> Vnet:
        return Vnet(*self[:6])


class Coalescer:
    def __init__(self, tcp: bool = True, udp: bool = True) -> None:
        self._handle = LIB.mt_coalescer_new()
        assert self._handle
        LIB.mt_coalescer_allow(self._handle, tcp, udp)
        self._memory: list[ctypes.Array[ctypes.c_char]] = []

    def __enter__(self) -> Coalescer:
        return self

    def __exit__(self, *_: object) -> None:
        LIB.mt_coalescer_free(self._handle)

    def allow(self, tcp: bool, udp: bool) -> None:
        LIB.mt_coalescer_allow(self._handle, tcp, udp)

    def add(self, packet: bytes) -> bool:
        memory = ctypes.create_string_buffer(packet, len(packet))
        self._memory.append(memory)
        return bool(LIB.mt_coalescer_add(self._handle, memory, len(packet)))

    def flush(self) -> list[Written]:
        written: list[Written] = []

        @WRITE
        def write(context: int, vnet: object, parts: int, count: int, length: int) -> None:
            assert context == 77
            # The entry before the first is the writer's: it puts the virtio header there.
            header = (Iovec * (count + 1)).from_address(parts - ctypes.sizeof(Iovec))
            header[0] = Iovec(None, VNET)
            packet = b"".join(ctypes.string_at(part.base, part.length) for part in header[1:])
            assert len(packet) == length
            said = vnet.contents  # type: ignore[attr-defined]
            fields = [getattr(said, name) for name, _ in Vnet._fields_]
            written.append(Written._make([*fields, packet, count]))

        LIB.mt_coalescer_flush(self._handle, write, 77)
        self._memory.clear()
        return written


def coalesce(packets: Sequence[bytes], tcp: bool = True, udp: bool = True) -> list[Written]:
    written = []
    with Coalescer(tcp, udp) as coalescer:
        for packet in packets:
            if not coalescer.add(packet):
                written += coalescer.flush()
                assert coalescer.add(packet)
        return written + coalescer.flush()


# ---- Checksum


@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_checksum(data: bytes, start: int) -> None:
    assert LIB.mt_checksum_fold(LIB.mt_checksum_add(data, len(data), start)) == total(data, start)


@pytest.mark.parametrize("size", [65535, 65536, 65568, 200_001])
def test_checksum_of_the_largest_words(size: int) -> None:
    data = b"\xff" * size
    assert LIB.mt_checksum_fold(LIB.mt_checksum_add(data, size, 2**48)) == total(data, 2**48)


def test_checksum_in_pieces() -> None:
    data = random.Random(1).randbytes(3001)
    for split in range(0, 3000, 2):
        first = LIB.mt_checksum_add(data[:split], split, 0)
        whole = LIB.mt_checksum_add(data[split:], 3001 - split, first)
        assert LIB.mt_checksum_fold(whole) == total(data)


@pytest.mark.parametrize("version", [4, 6])
def test_pseudo_header(version: int) -> None:
    packet = Packet(version).bytes()
    for length in (0, 8, 65535, 65536, 2**32 - 1):
        found = LIB.mt_checksum_fold(LIB.mt_checksum_pseudo(packet, 17, length))
        assert found == pseudo(packet, 17, length)


def test_the_model_agrees_with_scapy() -> None:
    for version in (4, 6):
        for udp in (False, True):
            flags = ACK | PSH
            ours = Packet(version, udp=udp, flags=flags, payload=b"hello", tos=3, ident=9).bytes()
            theirs = (IP if version == 4 else IPv6)(ours)
            for layer, name in ((theirs, "chksum"), (theirs.payload, "chksum")):
                if hasattr(layer, name):
                    delattr(layer, name)
            assert bytes(theirs) == ours
            assert parse(ours).bytes() == ours


# ---- Segmentation

tcp_options = st.integers(0, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))


@st.composite
def packets(draw: st.DrawFn, min_size: int = 1, max_size: int = 4000) -> Packet:
    """Any plain TCP or UDP packet."""
    word = st.integers(0, 0xFFFF)
    long = st.integers(0, 2**32 - 1) | st.integers(2**32 - 4000, 2**32 - 1)
    size = draw(st.integers(min_size, max_size))
    udp = draw(st.booleans())
    return Packet(
        version=draw(st.sampled_from([4, 6])),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(1, 255)),
        df=draw(st.booleans()),
        ident=draw(word | st.integers(0xFFF0, 0xFFFF)),
        label=draw(st.integers(0, 0xFFFFF)),
        sport=draw(word),
        dport=draw(word),
        udp=udp,
        seq=draw(long),
        ack=draw(long),
        flags=draw(st.integers(0, 255)),
        reserved=draw(st.integers(0, 15)),
        window=draw(word),
        urgent=draw(word),
        options=b"" if udp else draw(tcp_options),
        payload=draw(st.randoms(use_true_random=False)).randbytes(size),
    )


@given(packets(), st.integers(1, 5000), st.booleans())
def test_cut(packet: Packet, mss: int, ecn: bool) -> None:
    mss = max(mss, len(packet.payload) // 40)
    vnet = packet.vnet(mss)
    if ecn and not packet.udp:
        vnet.gso_type |= ECN
    segments = cut(vnet, packet.bytes(partial=True))
    assert segments == [segment.bytes() for segment in packet.segments(mss)]


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_cut_the_largest(version: int, udp: bool) -> None:
    packet = Packet(version, udp=udp, ident=0xFFF0, seq=2**32 - 5000, flags=ACK | PSH | CWR)
    room = MAX_IP - packet.header
    packet = replace(packet, payload=random.Random(2).randbytes(room))
    for mss in (1368, room - 1, room):
        segments = cut(packet.vnet(mss), packet.bytes(partial=True))
        assert segments == [segment.bytes() for segment in packet.segments(mss)]


def test_udp_checksum_of_a_segment_is_never_zero() -> None:
    """RFC 768: a sum that comes out as zero is sent as all ones."""
    packet = Packet(udp=True, payload=bytes(4))
    missing = 0xFFFF - total(packet.bytes()[20:26] + packet.payload, pseudo(packet.ip(12), 17, 12))
    # Two segments of four bytes, of which both sum to zero.
    packet = replace(packet, payload=(missing.to_bytes(2) + bytes(2)) * 2)
    segments = cut(packet.vnet(4), packet.bytes(partial=True))
    assert segments is not None
    assert [segment[26:28] for segment in segments] == [b"\xff\xff"] * 2


def test_scapy_finds_every_checksum_right() -> None:
    packet = Packet(6, flags=ACK | PSH | FIN, payload=bytes(range(256)) * 20)
    for segment in cut(packet.vnet(1000), packet.bytes(partial=True)) or []:
        theirs = IPv6(segment)
        said = theirs[TCP].chksum
        del theirs[TCP].chksum
        assert IPv6(bytes(theirs))[TCP].chksum == said


def test_extension_headers_are_repeated() -> None:
    head = IPv6(src="fd88::1", dst="fd88::2") / IPv6ExtHdrDestOpt()
    payload = random.Random(3).randbytes(2500)
    whole = bytes(head / TCP(sport=1, dport=2, seq=5, flags="A") / Raw(payload))
    l4 = len(whole) - 2520
    vnet = Vnet(NEEDS_CSUM, TCPV6, l4 + 20, 1000, l4, 16)
    expected = [
        bytes(head / TCP(sport=1, dport=2, seq=5 + at, flags="A") / Raw(payload[at : at + 1000]))
        for at in (0, 1000, 2000)
    ]
    assert cut(vnet, whole) == expected


def test_a_routing_header_is_refused() -> None:
    head = IPv6(dst="fd88::2") / IPv6ExtHdrRouting(addresses=["fd88::3"])
    whole = bytes(head / TCP() / Raw(bytes(3000)))
    l4 = len(whole) - 3020
    assert cut(Vnet(NEEDS_CSUM, TCPV6, l4 + 20, 1000, l4, 16), whole) is None


def test_ipv4_options_are_repeated() -> None:
    def made(ident: int, at: int, data: bytes) -> bytes:
        head = IP(src="10.88.0.1", dst="10.88.0.2", id=ident, options=b"\x01\x01\x01\x00")
        return bytes(head / UDP(sport=1, dport=2) / Raw(data[at : at + 500]))

    data = random.Random(4).randbytes(1200)
    whole = IP(src="10.88.0.1", dst="10.88.0.2", id=3, options=b"\x01\x01\x01\x00")
    vnet = Vnet(NEEDS_CSUM, UDP_L4, 0, 500, 24, 6)
    segments = cut(vnet, bytes(whole / UDP(sport=1, dport=2) / Raw(data)))
    assert segments == [made(3 + i, 500 * i, data) for i in range(3)]


@given(packets(min_size=0, max_size=200), st.booleans())
def test_a_whole_packet(packet: Packet, partial: bool) -> None:
    """It is left alone but for a checksum that the kernel left to us."""
    vnet = packet.vnet(0)
    vnet.gso_type = NONE
    if not partial:
        vnet.flags = 0
    found = cut(vnet, packet.bytes(partial))
    assert found is not None
    expected = packet.bytes()
    at = packet.checksum_at
    assert len(found) == 1
    assert found[0][:at] + found[0][at + 2 :] == expected[:at] + expected[at + 2 :]
    # TCP's zero may be all ones as well: they are the same number.
    checksums = (found[0][at : at + 2], expected[at : at + 2])
    assert checksums[0] == checksums[1] or checksums == (b"\xff\xff", b"\0\0")


def test_udp_checksum_of_a_whole_packet_is_never_zero() -> None:
    packet = Packet(udp=True, payload=bytes(2))
    missing = 0xFFFF - total(packet.bytes()[20:26], pseudo(packet.ip(10), 17, 10))
    packet = replace(packet, payload=missing.to_bytes(2))
    vnet = Vnet(NEEDS_CSUM, NONE, 0, 0, 20, 6)
    found = cut(vnet, packet.bytes(partial=True))
    assert found == [packet.bytes()]
    assert found[0][26:28] == b"\xff\xff"


SUPER = Packet(flags=ACK, payload=bytes(5000))


def changed(at: int, value: bytes, packet: Packet = SUPER) -> bytes:
    whole = packet.bytes(partial=True)
    return whole[:at] + value + whole[at + len(value) :]


def test_the_sound_one_of_those_below_is_cut() -> None:
    assert len(cut(SUPER.vnet(1000), SUPER.bytes(partial=True)) or []) == 5


@pytest.mark.parametrize(
    ("vnet", "packet"),
    [
        ({"gso_size": 0}, None),
        ({"gso_size": 65500}, None),  # a segment would not be an IP packet
        ({"flags": 0}, None),
        ({"flags": 2}, None),
        ({"gso_type": TCPV6}, None),
        ({"gso_type": UDP_L4}, None),
        ({"gso_type": UDP_L4, "csum_offset": 6}, None),
        ({"gso_type": 3}, None),  # UFO: fragments, not datagrams
        ({"gso_type": 2}, None),
        ({"gso_type": ECN}, None),
        ({"csum_offset": 6}, None),
        ({"csum_offset": 65535}, None),
        ({"csum_start": 0}, None),
        ({"csum_start": 19}, None),
        ({"csum_start": 24}, None),
        ({"csum_start": 5020}, None),
        ({"csum_start": 65535}, None),
        ({}, changed(0, b"\x65")),  # IPv6 by the version
        ({}, changed(0, b"\x55")),
        ({}, changed(0, b"\x44")),  # IHL 16
        ({}, changed(0, b"\x46")),  # options that csum_start does not know of
        ({}, changed(6, b"\x20")),  # a fragment
        ({}, changed(7, b"\x01")),
        ({}, changed(9, b"\x11")),  # UDP
        ({}, changed(32, b"\x40")),  # a TCP header of 16 bytes
        ({}, changed(32, b"\xf0")[:80]),  # no payload
        ({}, changed(32, b"\xf0")[:60]),  # longer than the packet
        ({}, SUPER.bytes()[:40]),
        ({}, SUPER.bytes()[:39]),
        ({}, SUPER.bytes()[:20]),
        ({}, SUPER.bytes()[:19]),
        ({}, b"E"),
        ({}, b""),
        ({}, SUPER.bytes() + bytes(70000)),
    ],
)
def test_nonsense_is_refused(vnet: dict[str, int], packet: bytes | None) -> None:
    header = SUPER.vnet(1000)
    for name, value in vnet.items():
        setattr(header, name, value)
    assert cut(header, SUPER.bytes(partial=True) if packet is None else packet) is None


@pytest.mark.parametrize(
    ("start", "offset"),
    [(19, 16), (0, 0), (20, 33), (51, 2), (52, 0), (53, 0), (65535, 65535), (20, 65535)],
)
def test_a_checksum_outside_the_packet_is_refused(start: int, offset: int) -> None:
    packet = Packet(payload=bytes(12)).bytes()  # 52 bytes
    assert cut(Vnet(NEEDS_CSUM, NONE, 0, 0, start, offset), packet) is None


@pytest.mark.parametrize("version", [4, 6])
def test_a_whole_packet_of_another_length_than_it_says_is_refused(version: int) -> None:
    packet = Packet(version, payload=bytes(50)).bytes()
    for wrong in (packet + b"\0", packet[:-1], packet[:5], b"\0" + packet, b""):
        assert cut(Vnet(), wrong) is None
    assert cut(Vnet(), packet) == [packet]


noise = st.integers(0, 0xFFFF) | st.integers(0, 80)


@given(
    st.builds(Vnet, st.integers(0, 3), st.integers(0, 6), noise, noise, noise, noise),
    st.binary(max_size=120) | packets(max_size=200).map(Packet.bytes),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=3),
)
@settings(max_examples=500)
def test_any_bytes_may_come_from_the_tun(
    vnet: Vnet, packet: bytes, damage: list[tuple[int, int]]
) -> None:
    bad = bytearray(packet)
    for at, value in damage:
        if at < len(bad):
            bad[at] = value
    segments = cut(vnet, bytes(bad), limit=50)
    assert segments is None or all(0 < len(segment) <= MAX_IP for segment in segments)


# ---- Coalescing


def stream(packet: Packet, sizes: Sequence[int], rng: random.Random | None = None) -> list[Packet]:
    """Packets that follow each other in one flow."""
    rng = rng or random.Random(5)
    found = []
    for i, size in enumerate(sizes):
        ident = (packet.ident + i) % 2**16
        found.append(replace(packet, ident=ident, payload=rng.randbytes(size)))
        packet = replace(packet, seq=(packet.seq + size) % 2**32)
    return found


def sizes_of(written: Sequence[Written]) -> list[int]:
    """Packets in each write, told by the writes' pieces."""
    return [write.parts for write in written]


@given(packets(min_size=2), st.integers(100, 5000), st.booleans())
def test_round_trip(packet: Packet, mss: int, push: bool) -> None:
    """What is cut comes together again, byte for byte."""
    packet = replace(packet, flags=ACK | PSH * push, reserved=0)
    mss = min(mss, len(packet.payload) - 1)
    segments = cut(packet.vnet(mss), packet.bytes(partial=True))
    assert segments is not None
    written = coalesce(segments)
    assert [write.packet for write in written] == [packet.bytes(partial=True)]
    (write,) = written
    expected = packet.vnet(mss)
    assert (write.flags, write.gso_type) == (NEEDS_CSUM, expected.gso_type)
    assert (write.hdr_len, write.gso_size) == (packet.header, mss)
    assert (write.csum_start, write.csum_offset) == (expected.csum_start, expected.csum_offset)
    assert write.parts == len(segments)
    # And the kernel may cut it once more.
    assert cut(write.vnet, write.packet) == segments


@pytest.mark.parametrize("version", [4, 6])
def test_no_more_than_an_ip_packet(version: int) -> None:
    flow = stream(Packet(version), [1368] * 100)
    written = coalesce([packet.bytes() for packet in flow])
    assert all(len(write.packet) <= MAX_IP for write in written)
    assert sizes_of(written) == [47, 47, 6]


def test_no_more_than_the_kernel_takes() -> None:
    flow = stream(Packet(udp=True), [100] * 130)
    written = coalesce([packet.bytes() for packet in flow])
    assert sizes_of(written) == [MAX_UDP, MAX_UDP, 2]
    flow = stream(Packet(), [10] * 300)
    assert sizes_of(coalesce([packet.bytes() for packet in flow])) == [128, 128, 44]


Change = Callable[[Packet], Packet | bytes]


def byte(at: int, flip: int) -> Change:
    """Damages a byte on the wire."""

    def change(packet: Packet) -> bytes:
        whole = bytearray(packet.bytes())
        whole[at] ^= flip
        return bytes(whole)

    return change


def with_ip(**fields: object) -> Change:
    """Rewrites the IPv4 header, its checksum included."""

    def change(packet: Packet) -> bytes:
        theirs = IP(packet.bytes())
        for name, value in fields.items():
            setattr(theirs, name, value)
        for name in ("chksum", "len", "ihl"):
            delattr(theirs, name)
        return bytes(theirs)

    return change


def flip(flag: int) -> Change:
    return lambda packet: replace(packet, flags=packet.flags ^ flag)


def misstate(at: int) -> Change:
    """The length field of IPv4, IPv6 or (from the end) UDP is wrong; every checksum is right."""

    def change(packet: Packet) -> bytes:
        whole = bytearray(packet.bytes())
        whole[at : at + 2] = (int.from_bytes(whole[at : at + 2]) - 16).to_bytes(2)
        if at == 2:
            whole[10:12] = (0xFFFF - total(bytes(whole[:10] + whole[12:20]))).to_bytes(2)
        elif at < 0:
            where = packet.checksum_at
            value = (int.from_bytes(whole[where : where + 2]) + 16) % 0xFFFF
            whole[where : where + 2] = value.to_bytes(2)
        return bytes(whole)

    return change


BOTH: dict[str, Change] = {
    "ECN": lambda p: replace(p, tos=p.tos ^ 1),
    "CE": lambda p: replace(p, tos=p.tos | 3),
    "DSCP": lambda p: replace(p, tos=p.tos ^ 0x20),
    "TTL": lambda p: replace(p, ttl=p.ttl - 1),
    "no payload": lambda p: replace(p, payload=b""),
    "corrupt payload": byte(-1, 1),
}
IPV4: dict[str, Change] = {
    "DF": lambda p: replace(p, df=not p.df),
    "corrupt IP header": byte(10, 1),
    "corrupt TTL": byte(8, 1),
    "reserved bit": with_ip(flags=6),
    "fragment": with_ip(flags=1),
    "last fragment": with_ip(flags=0, frag=100),
    "IP options": with_ip(options=b"\x01\x01\x01\x00"),
    "longer than it says": misstate(2),
}
IPV6: dict[str, Change] = {
    "flow label": lambda p: replace(p, label=1),
    "longer than it says": misstate(4),
    "shorter than it says": lambda p: p.bytes()[:-1],
    "extension header": lambda p: bytes(
        IPv6(src="fd88::1", dst="fd88::2") / IPv6ExtHdrDestOpt() / IPv6(p.bytes()).payload
    ),
}
ONLY_TCP: dict[str, Change] = {
    "ACK number": lambda p: replace(p, ack=p.ack + 1),
    "window": lambda p: replace(p, window=p.window + 1),
    "urgent pointer": lambda p: replace(p, urgent=1),
    "options": lambda p: replace(p, options=bytes(8)),
    "more options": lambda p: replace(p, options=p.options + bytes(4)),
    "no options": lambda p: replace(p, options=b""),
    "a gap": lambda p: replace(p, seq=p.seq + 1),
    "a repetition": lambda p: replace(p, seq=p.seq - 200),
    "reserved": lambda p: replace(p, reserved=1),
    "FIN": flip(FIN),
    "SYN": flip(SYN),
    "RST": flip(RST),
    "no ACK": flip(ACK),
    "URG": flip(URG),
    "ECE": flip(ECE),
    "CWR": flip(CWR),
    "header too short": byte(-200 - 12 - 20 + 12, 0xF0),
}
ONLY_UDP: dict[str, Change] = {
    "length": byte(-204, 1),
    "another length": misstate(-204),
}

CASES = [
    pytest.param(version, udp, change, id=f"IPv{version} {'UDP' if udp else 'TCP'} {name}")
    for version in (4, 6)
    for udp in (False, True)
    for name, change in (
        BOTH | (IPV4 if version == 4 else IPV6) | (ONLY_UDP if udp else ONLY_TCP)
    ).items()
]


@pytest.mark.parametrize(("version", "udp", "change"), CASES)
def test_what_differs_is_not_merged(version: int, udp: bool, change: Change) -> None:
    """It is written as it came, between what came before and after it."""
    options = b"" if udp else b"\x01\x01\x08\x0a" + bytes(8)
    flow = stream(Packet(version, udp=udp, tos=2, options=options), [200] * 7)
    sent = [packet.bytes() for packet in flow]
    odd = change(flow[3])
    sent[3] = odd if isinstance(odd, bytes) else odd.bytes()
    written = coalesce(sent)
    alone = [write for write in written if write.packet == sent[3]]
    assert len(alone) == 1 and alone[0].plain and alone[0].parts == 1
    at = written.index(alone[0])
    assert sizes_of(written[:at]) == [3]
    assert sum(sizes_of(written[at + 1 :])) == 3
    assert expand(written) == sent


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("right", [False, True])
def test_udp_without_a_checksum_is_not_merged(version: int, right: bool) -> None:
    """Not even where zero would be the right one."""
    sent = []
    for packet in stream(Packet(version, udp=True), [200] * 4):
        if right:
            packet = replace(packet, payload=bytes(2) + packet.payload[2:])
            whole = packet.bytes()
            missing = whole[packet.checksum_at : packet.checksum_at + 2]
            packet = replace(packet, payload=missing + packet.payload[2:])
        whole = packet.bytes()
        at = packet.checksum_at
        assert (whole[at : at + 2] == b"\xff\xff") == right
        sent.append(whole[:at] + b"\0\0" + whole[at + 2 :])
    written = coalesce(sent)
    assert [write.packet for write in written] == sent
    assert all(write.plain for write in written)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
def test_corruption_is_never_laundered(version: int, udp: bool) -> None:
    """A single flipped bit anywhere: a merged packet holds none but the packets that were sent."""
    # Without DF, so that each packet has an ID of its own.
    flow = [p.bytes() for p in stream(Packet(version, udp=udp, df=False), [40] * 3)]
    for victim in range(3):
        for bit in range(8 * len(flow[0])):
            sent = list(flow)
            bad = bytearray(sent[victim])
            bad[bit // 8] ^= 1 << bit % 8
            sent[victim] = bytes(bad)
            for write in coalesce(sent):
                if write.parts == 1:
                    assert write.plain and write.packet in sent, (victim, bit)
                else:
                    merged = cut(write.vnet, write.packet)
                    assert merged is not None, (victim, bit)
                    assert all(segment in flow for segment in merged), (victim, bit)


@pytest.mark.parametrize("udp", [False, True])
def test_a_shorter_packet_ends_a_group(udp: bool) -> None:
    flow = stream(Packet(udp=udp), [200, 200, 100, 100, 200, 200])
    assert sizes_of(coalesce([p.bytes() for p in flow])) == [3, 1, 2]


@pytest.mark.parametrize("udp", [False, True])
def test_a_larger_packet_begins_a_group(udp: bool) -> None:
    flow = stream(Packet(udp=udp), [200, 200, 300, 300, 200, 200])
    assert sizes_of(coalesce([p.bytes() for p in flow])) == [2, 3, 1]


def test_push_ends_a_group() -> None:
    flow = stream(Packet(), [200] * 6)
    for i in (1, 2):
        flow[i] = replace(flow[i], flags=ACK | PSH)
    written = coalesce([p.bytes() for p in flow])
    assert sizes_of(written) == [2, 1, 3]
    assert [parse(write.packet).flags & PSH for write in written] == [PSH, PSH, 0]


def test_ids_of_fragmentable_packets_are_kept() -> None:
    flow = stream(Packet(df=False, ident=0xFFFE), [200] * 4)
    assert sizes_of(coalesce([p.bytes() for p in flow])) == [4]
    flow[2] = replace(flow[2], ident=77)
    assert sizes_of(coalesce([p.bytes() for p in flow])) == [2, 1, 1]
    # With DF they mean nothing (RFC 6864 section 4.1): many senders leave them zero.
    flow = [replace(p, df=True, ident=0) for p in flow]
    assert sizes_of(coalesce([p.bytes() for p in flow])) == [4]


@pytest.mark.parametrize(("tcp", "udp"), [(False, False), (False, True), (True, False)])
def test_only_what_the_device_takes(tcp: bool, udp: bool) -> None:
    sent = [p.bytes() for p in stream(Packet(), [200] * 3)]
    sent += [p.bytes() for p in stream(Packet(udp=True), [200] * 3)]
    expected = ([3] if tcp else [1] * 3) + ([3] if udp else [1] * 3)
    assert sizes_of(coalesce(sent, tcp, udp)) == expected


def test_the_device_may_stop_taking_them() -> None:
    flow = [p.bytes() for p in stream(Packet(), [200] * 4)]
    with Coalescer() as coalescer:
        for i, packet in enumerate(flow):
            if i == 2:
                coalescer.allow(False, False)
            assert coalescer.add(packet)
        assert sizes_of(coalescer.flush()) == [2, 1, 1]
        assert coalescer.flush() == []


def test_flows_side_by_side() -> None:
    """Sixteen flows in turn: each comes together."""
    flows = [stream(Packet(sport=1000 + i), [200] * 8) for i in range(16)]
    written = coalesce([p.bytes() for turn in zip(*flows, strict=True) for p in turn])
    merged = [write for write in written if write.parts == 8]
    assert len(merged) >= 14  # few lose their place in the table to another


def test_full() -> None:
    rng = random.Random(7)
    accepted = 0
    with Coalescer() as coalescer:
        while coalescer.add(Packet(payload=rng.randbytes(10), seq=rng.getrandbits(32)).bytes()):
            accepted += 1
        assert accepted >= 128
        assert len(coalescer.flush()) == accepted
        flow = stream(Packet(), [10] * 10_000)
        accepted = 0
        while coalescer.add(flow[accepted].bytes()):
            accepted += 1
        assert accepted >= 256
        written = coalescer.flush()
        assert sum(sizes_of(written)) == accepted
        assert expand(written) == [p.bytes() for p in flow[:accepted]]
        assert coalescer.add(flow[0].bytes())


def expand(written: Sequence[Written]) -> list[bytes]:
    """The packets that the writes carry, by the model."""
    found: list[bytes] = []
    for write in written:
        if write.plain:
            found.append(write.packet)
        else:
            whole = parse(write.packet)
            assert write.packet == whole.bytes(partial=True)
            found += [segment.bytes() for segment in whole.segments(write.gso_size)]
    return found


FLOWS = [
    Packet(version, udp=udp, sport=sport, df=df, tos=2)
    for version, df in ((4, True), (4, False), (6, True))
    for udp in (False, True)
    for sport in (1, 2)
]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(range(len(FLOWS))),
            st.sampled_from([200] * 6 + [100, 0, 201]),
            st.sampled_from([""] * 12 + ["push", "corrupt", "opaque", "ack", "ECN", "gap", "FIN"]),
        ),
        max_size=120,
    )
)
@settings(max_examples=200)
def test_every_packet_leaves_once_and_in_its_flows_order(
    steps: list[tuple[int, int, str]],
) -> None:
    rng = random.Random(8)
    state = list(FLOWS)
    sent: list[tuple[set[int], bytes]] = []  # with the flows it may be of
    for which, size, what in steps:
        flow = state[which]
        packet = replace(flow, payload=rng.randbytes(size))
        state[which] = replace(flow, seq=(flow.seq + size) % 2**32, ident=(flow.ident + 1) % 2**16)
        whole = packet.bytes()
        belongs = {which}
        if what == "push":
            whole = replace(packet, flags=ACK | PSH).bytes()
        elif what == "FIN":
            whole = replace(packet, flags=ACK | FIN).bytes()
        elif what == "ECN":
            whole = replace(packet, tos=3).bytes()
        elif what == "corrupt":
            whole = whole[:-1] + bytes([whole[-1] ^ 1])
        elif what == "ack":
            state[which] = replace(state[which], ack=flow.ack + 1)
        elif what == "gap":
            state[which] = replace(state[which], seq=flow.seq + 5000)
        elif what == "opaque":
            # A fragment has no ports: it may be of any flow between the two hosts.
            if packet.version == 4:
                whole = with_ip(flags=1, frag=rng.randrange(3))(packet)  # type: ignore[assignment]
            else:
                whole = whole[:6] + bytes([44]) + whole[7:]
            belongs = {i for i, f in enumerate(FLOWS) if f.version == packet.version}
        sent.append((belongs, whole))
    written = coalesce([packet for _, packet in sent])
    received = expand(written)
    assert sorted(received) == sorted(packet for _, packet in sent)
    order = {packet: i for i, packet in enumerate(received)}
    for i in range(len(FLOWS)):
        mine = [order[packet] for belongs, packet in sent if i in belongs]
        assert len(order) < len(received) or mine == sorted(mine), i


@given(
    st.lists(st.binary(max_size=80) | packets(min_size=0, max_size=60).map(Packet.bytes)),
    st.randoms(use_true_random=False),
)
def test_any_bytes_may_come_from_the_peer(packets_in: list[bytes], rng: random.Random) -> None:
    bad = []
    for packet in packets_in:
        mutable = bytearray(packet)
        for _ in range(rng.choice([0, 1, 3])):
            if mutable:
                mutable[rng.randrange(len(mutable))] = rng.randrange(256)
        bad += [bytes(mutable)] * rng.choice([1, 2])
    written = coalesce(bad)
    assert sum(sizes_of(written)) == len(bad)
    plain = [write.packet for write in written if write.plain]
    assert all(packet in bad for packet in plain)


@pytest.mark.parametrize("size", [65536, 70000])
def test_more_than_an_ip_packet_is_left_alone(size: int) -> None:
    packet = Packet().bytes() + bytes(size - 40)
    written = coalesce([packet, packet])
    assert [write.packet for write in written] == [packet] * 2
    assert all(write.plain for write in written)
