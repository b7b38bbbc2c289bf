"""The engine's routes: the longest prefix wins, only well-formed packets have an owner."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from ctypes import c_bool, c_char_p, c_int, c_uint32, c_void_p
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.native import library

Network = IPv4Network | IPv6Network


def load() -> ctypes.CDLL:
    lib = library("routes.c")
    for name, result, arguments in (
        ("mt_routes_new", c_void_p, ()),
        ("mt_routes_free", None, (c_void_p,)),
        ("mt_routes_add", c_bool, (c_void_p, c_int, c_char_p, c_int, c_int)),
        ("mt_routes_destination", c_int, (c_void_p, c_void_p, c_uint32)),
        ("mt_routes_source", c_int, (c_void_p, c_void_p, c_uint32)),
        ("mt_well_formed", c_bool, (c_void_p, c_uint32)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


LIB = load()


def memory(packet: bytes) -> ctypes.Array[ctypes.c_char]:
    """A copy of exactly this size, so that AddressSanitizer sees a read beyond it."""
    return (ctypes.c_char * len(packet)).from_buffer_copy(packet)


class Routes:
    def __init__(self, entries: Iterable[tuple[Network, int]] = ()) -> None:
        self.r = LIB.mt_routes_new()
        assert self.r
        self.release = LIB.mt_routes_free  # LIB itself may go first at exit
        for network, owner in entries:
            assert self.add(
                network.version, network.network_address.packed, network.prefixlen, owner
            )

    def __del__(self) -> None:
        self.release(self.r)

    def add(self, version: int, address: bytes, length: int, owner: int) -> bool:
        added: bool = LIB.mt_routes_add(self.r, version, address, length, owner)
        return added

    def destination(self, packet: bytes) -> int:
        return int(LIB.mt_routes_destination(self.r, memory(packet), len(packet)))

    def source(self, packet: bytes) -> int:
        return int(LIB.mt_routes_source(self.r, memory(packet), len(packet)))


def well_formed(packet: bytes) -> bool:
    found: bool = LIB.mt_well_formed(memory(packet), len(packet))
    return found


def ipv4(source: str, destination: str, payload: bytes = b"payload", options: int = 0) -> bytes:
    """An IPv4 packet with `options` 32-bit words of options."""
    header = bytearray(20 + 4 * options)
    header[0] = 0x45 + options
    header[2:4] = (len(header) + len(payload)).to_bytes(2)
    header[12:16] = ip_address(source).packed
    header[16:20] = ip_address(destination).packed
    return bytes(header) + payload


def ipv6(source: str, destination: str, payload: bytes = b"payload") -> bytes:
    header = bytearray(40)
    header[0] = 0x60
    header[4:6] = len(payload).to_bytes(2)
    header[8:24] = ip_address(source).packed
    header[24:40] = ip_address(destination).packed
    return bytes(header) + payload


def packet_between(source: str, destination: str) -> bytes:
    return (ipv4 if ip_address(source).version == 4 else ipv6)(source, destination)


OFFICE, PHONE = 3, 9
ROUTES = Routes(
    [
        (ip_network("10.88.0.0/24"), OFFICE),
        (ip_network("fd88::/64"), OFFICE),
        (ip_network("10.88.0.7/32"), PHONE),
        (ip_network("fd88::7/128"), PHONE),
    ]
)


@pytest.mark.parametrize(
    ("address", "other", "owner"),
    [
        ("10.88.0.1", "192.0.2.1", OFFICE),
        ("10.88.0.7", "192.0.2.1", PHONE),
        ("10.88.1.7", "10.88.0.7", -1),
        ("224.0.0.1", "10.88.0.7", -1),
        ("fd88::1", "2001:db8::1", OFFICE),
        ("fd88::7", "2001:db8::1", PHONE),
        ("fd88:0:0:1::7", "fd88::7", -1),
    ],
)
def test_the_owner_of_an_address(address: str, other: str, owner: int) -> None:
    assert ROUTES.destination(packet_between(other, address)) == owner
    assert ROUTES.source(packet_between(address, other)) == owner


GOOD4 = ipv4("10.88.0.1", "10.88.0.7")
GOOD6 = ipv6("fd88::1", "fd88::7")


@pytest.mark.parametrize(
    "packet",
    [
        GOOD4,
        GOOD6,
        ipv4("10.88.0.1", "10.88.0.7", b""),
        ipv6("fd88::1", "fd88::7", b""),
        ipv4("10.88.0.1", "10.88.0.7", b"", options=10),
        ipv4("10.88.0.1", "10.88.0.7", bytes(65515)),
        ipv6("fd88::1", "fd88::7", bytes(65535)),
    ],
)
def test_well_formed(packet: bytes) -> None:
    assert well_formed(packet)
    assert (ROUTES.source(packet), ROUTES.destination(packet)) == (OFFICE, PHONE)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        GOOD4[:19],
        GOOD4[:-1],
        GOOD4 + b"\x00",
        b"\x44" + GOOD4[1:],  # a header of 16 bytes
        b"\x4f" + GOOD4[1:],  # a header longer than the packet
        b"\x05" + GOOD4[1:],
        b"\x75" + GOOD4[1:],
        GOOD6[:19],
        GOOD6[:39],
        GOOD6[:-1],
        GOOD6 + b"\x00",
        b"\x45" + GOOD6[1:],
        b"\x50" + GOOD6[1:],
        b"\x70" + GOOD6[1:],
        b"\x65" + GOOD4[1:],
        GOOD4 + bytes(65536),  # the right length, modulo 2^16
    ],
)
def test_malformed_has_no_owner(packet: bytes) -> None:
    assert not well_formed(packet)
    assert (ROUTES.source(packet), ROUTES.destination(packet)) == (-1, -1)


def test_default_routes() -> None:
    routes = Routes([(ip_network("0.0.0.0/0"), 0), (ip_network("10.0.0.0/8"), 1)])
    assert routes.destination(ipv4("10.0.0.1", "8.8.8.8")) == 0
    assert routes.source(ipv4("10.0.0.1", "8.8.8.8")) == 1
    assert routes.destination(ipv6("::1", "::")) == -1
    assert routes.add(6, bytes(16), 0, 2)
    assert routes.destination(ipv6("::1", "ffff::")) == 2


def test_none_at_all() -> None:
    assert Routes().destination(GOOD4) == Routes().source(GOOD6) == -1
    LIB.mt_routes_free(None)


def test_the_later_entry_replaces_the_earlier_and_host_bits_are_ignored() -> None:
    routes = Routes([(ip_network("10.88.0.0/24"), 1), (ip_network("fd88::/64"), 1)])
    assert routes.add(4, ip_address("10.88.0.99").packed, 24, 2)
    assert routes.add(6, ip_address("fd88::99").packed, 64, 3)
    assert routes.source(GOOD4) == 2
    assert routes.source(GOOD6) == 3


@pytest.mark.parametrize(
    ("version", "length", "owner"),
    [(4, 33, 0), (4, -1, 0), (6, 129, 0), (6, -1, 0), (5, 8, 0), (4, 8, -1), (6, 8, -(2**31))],
)
def test_nonsense_is_not_added(version: int, length: int, owner: int) -> None:
    routes = Routes()
    assert not routes.add(version, bytes(16), length, owner)
    assert routes.destination(ipv4("0.0.0.0", "0.0.0.0")) == -1
    assert routes.destination(ipv6("::", "::")) == -1


def expected_owner(entries: list[tuple[Network, int]], address: bytes) -> int:
    """By trying every network; the last of equals wins."""
    place = ip_address(address)
    best = (-1, -1)
    for network, owner in entries:
        if network.version == place.version and place in network and network.prefixlen >= best[0]:
            best = (network.prefixlen, owner)
    return best[1]


networks4 = st.builds(
    lambda value, length: IPv4Network((value, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
networks6 = st.builds(
    lambda value, length: IPv6Network((value, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)


@given(st.lists(st.tuples(networks4 | networks6, st.integers(0, 5)), max_size=20), st.data())
def test_same_as_trying_every_network(
    entries: list[tuple[Network, int]], data: st.DataObject
) -> None:
    routes = Routes(entries)
    candidates = [st.ip_addresses()]
    candidates += [st.just(network.network_address) for network, _ in entries]
    candidates += [st.just(network.broadcast_address) for network, _ in entries]
    address = data.draw(st.one_of(candidates))
    packet = packet_between(str(address), str(address))
    assert routes.destination(packet) == routes.source(packet)
    assert routes.source(packet) == expected_owner(entries, address.packed)


@pytest.mark.parametrize("seed", range(6))
def test_many_networks_that_nest(seed: int) -> None:
    """Few distinct bits, so that prefixes contain each other and tables grow."""
    rng = random.Random(seed)
    size = 4 if seed % 2 else 16
    most = 8 * size

    def value() -> int:
        bits = [rng.choice([0, rng.getrandbits(1)]) << most - 1 - i for i in range(most)]
        return sum(bits[: rng.choice([6, 12, 34, 66, most])])

    def network() -> Network:
        kind = IPv4Network if size == 4 else IPv6Network
        return kind((value(), rng.randint(0, most)), strict=False)

    entries = [(network(), owner) for owner in range(300)]
    routes = Routes(entries)
    for _ in range(300):
        place, other = (
            rng.choice([value().to_bytes(size), rng.choice(entries)[0].broadcast_address.packed])
            for _ in range(2)
        )
        packet = packet_between(str(ip_address(place)), str(ip_address(other)))
        assert routes.source(packet) == expected_owner(entries, place), seed
        assert routes.destination(packet) == expected_owner(entries, other), seed


def is_well_formed(packet: bytes) -> bool:
    """The rule, in Python."""
    if len(packet) < 20:
        return False
    if packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        return 20 <= header <= len(packet) == int.from_bytes(packet[2:4])
    return packet[0] >> 4 == 6 and len(packet) == 40 + int.from_bytes(packet[4:6])


@given(st.binary(max_size=80), st.integers(0, 3))
def test_arbitrary_bytes(packet: bytes, kind: int) -> None:
    data = bytearray(packet)
    if data and kind:  # more of them that come close
        data[0] = (0x45, 0x46, 0x60)[kind - 1]
        if len(data) >= 40:
            data[2:6] = len(data).to_bytes(2) + (len(data) - 40).to_bytes(2)
    assert well_formed(bytes(data)) == is_well_formed(bytes(data))
    if not is_well_formed(bytes(data)):
        assert ROUTES.source(bytes(data)) == ROUTES.destination(bytes(data)) == -1
