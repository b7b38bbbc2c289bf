"""What the doctor says: findings, and the report they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from tunnel.ice.behaviour import Behaviour

Check = Literal[
    "privileges",
    "tun",
    "kernel",
    "engine",
    "loopback",
    "buffers",
    "run-directory",
    "clock",
    "config",
    "files",
    "port",
    "name",
    "clash",
    "addresses",
    "routes",
    "ipv6",
    "rp-filter",
    "firewall",
    "mtu",
    "dns",
    "udp",
    "nat",
    "cgnat",
    "port-mapping",
    "stun",
    "turn",
    "broker",
    "tunnel",
    "peer",
]
"""Stable names: scripts match on them."""

GROUPS: Mapping[str, tuple[Check, ...]] = {
    "This host": (
        "privileges", "tun", "kernel", "engine", "loopback", "buffers", "run-directory", "clock",
    ),
    "Configuration": ("config", "files", "port", "name", "clash"),
    "Network": ("addresses", "routes", "ipv6", "rp-filter", "firewall", "mtu", "dns"),
    "Way to peers": ("udp", "nat", "cgnat", "port-mapping", "stun", "turn", "broker"),
    "Tunnels": ("tunnel", "peer"),
}  # fmt: skip
"""In the order they are told in."""


class State(IntEnum):
    """How bad it is; best first."""

    OK = 0
    NOTE = 1  # worth knowing; nothing to mend
    WARNING = 2  # works, but worse than it could, or not everywhere
    PROBLEM = 3  # something that was asked for does not work

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `summary` is a plain sentence, `remedy` the command or config line that mends it.

    `details` are JSON values, of whatever the check has measured.
    """

    check: Check
    state: State
    summary: str
    remedy: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "state": self.state.word,
            "summary": self.summary,
            "remedy": self.remedy,
            "details": dict(self.details),
        }


@dataclass(frozen=True, slots=True)
class Nat:
    """The behaviour of what is behind one local address."""

    interface: str
    behaviour: Behaviour

    def as_json(self) -> dict[str, Any]:
        found = self.behaviour
        return {
            "interface": self.interface,
            "local": found.local.host,
            "mapped": None if found.mapped is None else str(found.mapped),
            "mapping": found.mapping.value,
            "filtering": found.filtering.value,
            "hairpin": found.hairpin,
            "cgnat": found.cgnat,
            "udp_blocked": found.udp_blocked,
            "path_mtu": found.path_mtu,
            "servers": [
                {
                    "address": str(server.address),
                    "rtt_ms": None if server.rtt is None else server.rtt * 1000,
                    "mapped": None if server.mapped is None else str(server.mapped),
                }
                for server in found.servers
            ],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found, in the order of `GROUPS`."""

    version: str
    findings: tuple[Finding, ...]
    nats: tuple[Nat, ...] = ()

    @property
    def worst(self) -> State:
        return max((finding.state for finding in self.findings), default=State.OK)

    def count(self, state: State) -> int:
        return sum(finding.state is state for finding in self.findings)

    def groups(self) -> list[tuple[str, list[Finding]]]:
        """Those that have findings."""
        grouped = [
            (title, [f for check in checks for f in self.findings if f.check == check])
            for title, checks in GROUPS.items()
        ]
        return [(title, findings) for title, findings in grouped if findings]

    def as_json(self) -> dict[str, Any]:
        """The object of `martlet doctor --json` (docs/doctor.md)."""
        return {
            "version": self.version,
            "findings": [f.as_json() for _, findings in self.groups() for f in findings],
            "nat": {
                family: [nat.as_json() for nat in self.nats if nat.behaviour.local.is_ipv6 == v6]
                for family, v6 in (("ipv4", False), ("ipv6", True))
            },
        }
