"""Which libcrypto seals the packets, and what a newer one would bring on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from tunnel.datapath.engine import libcrypto

_VECTOR_AES = {"vaes", "vpclmulqdq", "avx512f"}
"""CPU flags of what OpenSSL 3.1 and later use for AES-GCM (its CHANGES, between 3.0 and 3.1)."""
_FIRST_WITH_VECTOR_AES = (3, 1)


def report() -> dict[str, str | None]:
    """`libcrypto`: the library that is loaded; `advice`: why another one would be better, if so."""
    version = libcrypto()
    return {"libcrypto": version, "advice": advice(version, _cpu_flags())}


def advice(version: str, cpu_flags: set[str]) -> str | None:
    """What a newer libcrypto would bring; None: nothing that we know of."""
    found = re.match(r"OpenSSL (\d+)\.(\d+)", version)
    if found is None or not cpu_flags >= _VECTOR_AES:
        return None
    if (int(found[1]), int(found[2])) >= _FIRST_WITH_VECTOR_AES:
        return None
    return "OpenSSL 3.1 or later seals AES-GCM packets in about half the time on this CPU (VAES)"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
