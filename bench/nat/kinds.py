"""The ways in which a host may be joined to the internet, and what a meeting of two can hope for.

A *kind* is a row of routers, the outermost first; each translates, filters or only routes. What the
kernel's NAT does right it does here (`cli.demo.nat`, for the tunnel's port); the rest is
`bench.natbox`. Behaviours are those of RFC 4787: mapping and filtering are each independent of the
"endpoint" that a host writes to, or depend on its "address", or on its address and "port".

| kind            | mapping  | filtering | how                                                  |
|-----------------|----------|-----------|------------------------------------------------------|
| public          | -        | -         | no NAT, no firewall                                  |
| full-cone       | endpoint | endpoint  | nftables                                             |
| restricted      | endpoint | address   | userspace                                            |
| port-restricted | endpoint | port      | nftables: what most home routers do                  |
| adm-eif         | address  | endpoint  | userspace                                            |
| adm-adf         | address  | address   | userspace                                            |
| adm-apdf        | address  | port      | userspace                                            |
| apdm-eif        | port     | endpoint  | userspace                                            |
| apdm-adf        | port     | address   | userspace                                            |
| symmetric       | port     | port      | nftables (masquerade to random ports)                |
| cgnat           | endpoint | port      | a home router as above, behind a carrier's NAT       |
| cgnat-symmetric | port     | port      | the same behind a carrier's symmetric NAT            |
| udp-blocked     | -        | -         | port-restricted for TCP; UDP does not leave          |
| only-443        | -        | -         | the same, and of TCP only port 443 leaves            |

(EIF, ADF, APDF: filtering, ADM, APDM: mapping, by their first letters in RFC 4787.)

IPv6 has no NAT: public6, firewall6 (lets in what was written to), udp-blocked6, only-443-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple

from bench.nattable import EXPIRY, Behaviour

Make = Literal["route", "firewall", "nft", "box"]
Shared = Literal["", "home", "carrier"]  # what both ends of a pair are behind
_ORDER: tuple[Behaviour, ...] = ("endpoint", "address", "port")


@dataclass(frozen=True)
class Stage:
    """One router. make: "route" passes everything, "firewall" what was asked for from inside and
    translates nothing, "nft" and "box" translate, by the kernel or in userspace. tcp_ports: if not
    None, no UDP leaves, and TCP to these ports only (to all, if there are none).
    """

    make: Make
    mapping: Behaviour = "endpoint"
    filtering: Behaviour = "port"
    hairpin: bool = False
    expiry: float = EXPIRY
    tcp_ports: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Kind:
    """A row of stages, the outermost first, and the address families that it is for."""

    name: str
    stages: tuple[Stage, ...]
    family: int = 4

    @property
    def mapping(self) -> Behaviour:
        """Of all stages together."""
        return max((stage.mapping for stage in self.stages), key=_ORDER.index)

    @property
    def filtering(self) -> Behaviour:
        """Of all stages together."""
        open_ = all(stage.make == "route" for stage in self.stages)
        return "endpoint" if open_ else max((s.filtering for s in self.stages), key=_ORDER.index)

    @property
    def blocked(self) -> bool:
        """Whether no UDP leaves."""
        return any(stage.tcp_ports is not None for stage in self.stages)


class Meeting(NamedTuple):
    """Two kinds, and what both are behind, if anything: then the kind that is shared is `a`."""

    a: Kind
    b: Kind
    shared: Shared = ""

    def __str__(self) -> str:
        return f"{self.a.name}:{self.b.name}" + (f" ({self.shared} shared)" if self.shared else "")


_HOME = Stage("nft")
_CARRIER = Stage("box")


_KINDS4: dict[str, tuple[Stage, ...]] = {
    "public": (Stage("route"),),
    "full-cone": (Stage("nft", "endpoint", "endpoint"),),
    "restricted": (Stage("box", "endpoint", "address"),),
    "port-restricted": (_HOME,),
    "adm-eif": (Stage("box", "address", "endpoint"),),
    "adm-adf": (Stage("box", "address", "address"),),
    "adm-apdf": (Stage("box", "address", "port"),),
    "apdm-eif": (Stage("box", "port", "endpoint"),),
    "apdm-adf": (Stage("box", "port", "address"),),
    "symmetric": (Stage("nft", "port", "port"),),
    "cgnat": (_CARRIER, _HOME),
    "cgnat-symmetric": (Stage("box", "port", "port"), _HOME),
    "udp-blocked": (Stage("nft", tcp_ports=()),),
    "only-443": (Stage("nft", tcp_ports=(443,)),),
}
_KINDS6 = {
    "public6": (Stage("route"),),
    "firewall6": (Stage("firewall"),),
    "udp-blocked6": (Stage("firewall", tcp_ports=()),),
    "only-443-6": (Stage("firewall", tcp_ports=(443,)),),
}
KINDS = {
    name: Kind(name, stages, family)
    for family, kinds in ((4, _KINDS4), (6, _KINDS6))
    for name, stages in kinds.items()
}
# Of a kind with a short memory there is no row of its own: it only matters to who waits.
FORGETFUL = Kind("forgetful", (Stage("nft", expiry=3.0),))
_HAIRPIN = Kind("hairpin", (Stage("box", hairpin=True),))
_NO_HAIRPIN = Kind("no-hairpin", (Stage("box"),))
_CARRIER_HAIRPIN = Kind("cgnat-hairpin", (Stage("box", hairpin=True), _HOME))
SHARED: tuple[Meeting, ...] = (
    Meeting(_HAIRPIN, _HAIRPIN, "home"),
    Meeting(_NO_HAIRPIN, _NO_HAIRPIN, "home"),
    Meeting(_CARRIER_HAIRPIN, _CARRIER_HAIRPIN, "carrier"),
    Meeting(KINDS["cgnat"], KINDS["cgnat"], "carrier"),
)


def meetings(families: Sequence[int]) -> list[Meeting]:
    """Every unordered pair of kinds of a family, then those that share something."""
    found = []
    for family in families:
        kinds = [kind for kind in KINDS.values() if kind.family == family]
        found += [Meeting(a, b) for a, b in combinations_with_replacement(kinds, 2)]
    return found + [meeting for meeting in SHARED if meeting.a.family in families]


def direct_by_rights(meeting: Meeting) -> bool:
    """Whether two agents that try all candidates of each other (RFC 8445) meet without a relay.

    Each is sought at the mapping that a STUN server saw. Where a mapping depends on who is written
    to, packets to the peer come from another one, on the same public address: filters that look at
    addresses let it in, those that look at ports do not. Two such mappings never meet where either
    end looks at ports. Where neither does, luck and stamina may help; it is not counted on.
    Nor are those of `direct_by_luck`.
    """
    a, b, shared = meeting
    if a.blocked or b.blocked:
        return False
    if shared == "home":
        return True  # host candidates
    if shared == "carrier" and not a.stages[0].hairpin:
        return False
    if a.mapping == b.mapping == "endpoint":
        return True
    for one, other in ((a, b), (b, a)):
        if one.mapping == "endpoint" and one.filtering != "port" and other.mapping != "endpoint":
            return True
    return False


def direct_by_luck(meeting: Meeting) -> bool:
    """Whether many ports are probed (`tunnel.ice.birthday`): then they are direct soon, later, or
    never, and a run is good whatever comes of that.
    """
    a, b, shared = meeting
    if direct_by_rights(meeting) or a.blocked or b.blocked or shared:
        return False
    return (a.mapping == "endpoint") != (b.mapping == "endpoint")
