"""What `status` says of the libcrypto in use."""

from __future__ import annotations

import pytest

from tunnel.shell import crypto

VECTOR = {"aes", "avx512f", "vaes", "vpclmulqdq"}


@pytest.mark.parametrize(
    ("version", "flags", "advised"),
    [
        ("OpenSSL 3.0.17 1 Jul 2025", VECTOR, True),
        ("OpenSSL 3.0.17 1 Jul 2025", {"aes"}, False),
        ("OpenSSL 3.1.0 14 Mar 2023", VECTOR, False),
        ("OpenSSL 3.5.4 30 Sep 2025", VECTOR, False),
        ("OpenSSL 4.0.0 1 Apr 2026", VECTOR, False),
        ("LibreSSL 3.9", VECTOR, False),
    ],
)
def test_a_newer_library_is_advised_where_it_would_help(
    version: str, flags: set[str], advised: bool
) -> None:
    assert bool(crypto.advice(version, flags)) is advised


def test_the_library_in_use_is_named() -> None:
    report = crypto.report()
    assert report["libcrypto"]
    assert "SSL" in report["libcrypto"]
