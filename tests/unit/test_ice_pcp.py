"""The messages of PCP and NAT-PMP: as bytes, and against anything at all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.gateway import Gateway
from tunnel.ice import pcp
from tunnel.path.network import Address

V4, V6 = Address("10.1.0.2", 4117), Address("2001:db8::2", 4117)
NONCE = bytes(range(12))


def test_a_pcp_request_byte_by_byte() -> None:
    """RFC 6887 sections 7.1 and 11.1."""
    data = pcp.pcp_map(V4, NONCE, lifetime=7200, host="198.51.100.10", port=5000)
    assert data.hex(" ", 4) == (
        "02010000 00001c20 00000000 00000000 0000ffff 0a010002"
        " 00010203 04050607 08090a0b 11000000 10151388"
        " 00000000 00000000 0000ffff c633640a"
    )
    six = pcp.pcp_map(V6, NONCE, lifetime=0)
    assert six[8:24].hex() == "20010db8000000000000000000000002"
    assert six[44:] == bytes(16)
    # Any IPv4 address: the mapped form of 0.0.0.0 says which family is meant.
    assert pcp.pcp_map(V4, NONCE, lifetime=1)[44:].hex() == "00000000000000000000ffff00000000"


def test_natpmp_requests_byte_by_byte() -> None:
    """RFC 6886 sections 3.2 and 3.3."""
    assert pcp.natpmp_address() == b"\0\0"
    assert pcp.natpmp_map(4117, lifetime=7200, external=5000).hex() == "000100001015138800001c20"


def test_answers() -> None:
    both = Gateway(restarted_at=900.0)
    asked = pcp.pcp_map(V4, NONCE, lifetime=7200, port=5000)
    assert pcp.read(both.answer(asked, V4.host, 1000.0) or b"") == pcp.Mapped(
        0, 100, 4117, 7200, 5000, "198.51.100.10", NONCE
    )
    six = pcp.read(both.answer(pcp.pcp_map(V6, NONCE, lifetime=60), V6.host, 1000.0) or b"")
    assert isinstance(six, pcp.Mapped) and six.host == V6.host
    address = pcp.read(both.answer(pcp.natpmp_address(), V4.host, 1000.0) or b"")
    assert address == pcp.External(0, 100, "198.51.100.10")
    asked = pcp.natpmp_map(4117, lifetime=60, external=5000)
    answer = pcp.read(both.answer(asked, V4.host, 1000.0) or b"")
    assert answer == pcp.Mapped(0, 100, 4117, 60, 5000)
    assert pcp.read(both.announcement(2, 1000.0)) == pcp.Announced(100)
    assert pcp.read(both.announcement(0, 1000.0)) == address


def test_a_gateway_of_the_other_version_is_understood() -> None:
    old = Gateway(speaks=(0,)).answer(pcp.pcp_map(V4, NONCE, lifetime=60), V4.host, 0.0) or b""
    assert pcp.read(old) == pcp.OtherVersion()
    assert pcp.read(b"\x03\x81" + bytes(58)) == pcp.OtherVersion()


def test_requests_are_no_answers() -> None:
    assert pcp.read(pcp.pcp_map(V4, NONCE, lifetime=60)) is None
    assert pcp.read(pcp.natpmp_map(1, lifetime=60, external=1)) is None
    assert pcp.read(pcp.natpmp_address()) is None


@given(st.binary(max_size=80), st.integers(0, 80))
def test_anything_at_all(data: bytes, cut: int) -> None:
    pcp.read(data)
    for version in (0, 2):
        pcp.read(bytes([version, 0x80]) + data)
        pcp.read(bytes([version, 0x81]) + data)
    whole = Gateway().answer(pcp.pcp_map(V4, NONCE, lifetime=60), V4.host, 0.0) or b""
    pcp.read(whole[:cut])
    pcp.read(whole + bytes(2000))
