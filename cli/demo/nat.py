"""A home router made of nftables: NAT with a mapping that really changes when it is told to rebind.

What the kernel does by itself is not what a home router does: plain `snat` keeps the port only
until two entries clash, and a flushed entry usually gets the very same port again. So the
tunnel's port (one fixed port at the host) has a mapping of its own, `public:external`, and a
rebinding changes `external` or `public` and then forgets the flow.

| kind            | mapping                                 | who may send in                   |
|-----------------|-----------------------------------------|-----------------------------------|
| port-restricted | one external port for all destinations    | only whom the host has written to |
| full-cone       | the same                                | everybody                         |
| symmetric       | an external port for each destination   | only whom the host has written to |

`forward` makes the external port a port forward: everybody may send in, and the port stays what
it is. Without mappings (plain IPv6 routing) it only routes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from cli.demo.netns import Namespace

Kind = Literal["port-restricted", "full-cone", "symmetric"]
LAN, WAN = "lan", "wan"  # the router's two interfaces
FIRST_PORT = 20000  # external ports of rebound mappings; far from the tunnel's own
_GENERIC_SPAN = 99  # external ports beside it for all other UDP flows, so that they rebind too
_PORT_STEP = 100


@dataclass
class Mapping:
    """What the outside sees of one host in one family; `inside` is the host's private address."""

    inside: str
    publics: tuple[str, ...]
    public: str = ""
    external: int = 0

    def __post_init__(self) -> None:
        self.public = self.public or self.publics[0]


class Nat(Protocol):
    """What the world asks of a NAT, whoever implements it. Families are 4 and 6."""

    @property
    def forward(self) -> bool:
        """Whether it forwards a port to the host."""

    def rebind(self, *, port: bool = True, address: bool = False) -> None:
        """Change the mapping of the host's flows; in force on return."""

    def move_host(self, addresses: dict[int, str], script: str) -> None:
        """The host's private addresses change (by family): run the shell script that does it, and
        learn them.
        """

    def public(self, family: int) -> tuple[str, int]:
        """Address and port that the other end sees."""

    def close(self) -> None:
        """Nothing more is asked; what runs in the router's namespace ends with it."""


@dataclass
class NftNat:
    """The NAT of one uplink; `mappings` has an entry for each translated family."""

    space: Namespace
    port: int
    mappings: dict[int, Mapping]
    kind: Kind = "port-restricted"
    forward: bool = False
    _next: int = field(default=FIRST_PORT, init=False)

    def __post_init__(self) -> None:
        for mapping in self.mappings.values():
            mapping.external = self.port if self.forward else self._take_port()
        self.space.run(["nft", "-f", "-"], input=self._ruleset())

    def public(self, family: int) -> tuple[str, int]:
        """Address and port that the other end sees for the host's tunnel port (symmetric: a first
        guess).
        """
        mapping = self.mappings[family]
        return mapping.public, mapping.external

    def close(self) -> None:
        """Nothing to do: the rules go with the namespace."""

    def rebind(self, *, port: bool = True, address: bool = False) -> None:
        """Give the flow another external port, public address, or both, and forget the old.

        A packet to the old mapping is dropped without a word, as by a home router.
        """
        if not self.mappings:
            raise ValueError("plain routing: there is no mapping to rebind")
        for mapping in self.mappings.values():
            if port:
                mapping.external = self._take_port()
            if address:
                place = mapping.publics.index(mapping.public) + 1
                mapping.public = mapping.publics[place % len(mapping.publics)]
        self._apply()

    def move_host(self, addresses: dict[int, str], script: str) -> None:
        """Move the host to `addresses` by the shell script `script`.

        A router knows its client by MAC: a port forward follows it, and what it knew of the old
        address is forgotten. A mapping that is no forward becomes a new one, as for any new
        private address.
        """
        gone = {}
        for family, mapping in self.mappings.items():
            gone[family] = mapping.inside
            mapping.inside = addresses[family]
            if not self.forward:
                mapping.external = self._take_port()
        self._apply(script, gone)

    def _apply(self, move: str = "", gone: dict[int, str] | None = None) -> None:
        # Rules first, then the host, then the connection table: an entry made between would keep
        # the old mapping. One shell, so that the time between the steps is not that of starting
        # subprocesses from Python.
        steps = [f"nft -f - <<'RULES'\n{self._ruleset()}\nRULES", move or "true", "status=$?"]
        # Of a host that moved, only what it was: where it is now it may have asked something
        # already, and a router that forgot that would not let the answer in. By one process: until
        # it is done, the flow leads to the address that is gone.
        forget = [
            f"-D -f ipv{family} -p udp {which}"
            for family in self.mappings
            for which in (
                [f"--{way}-src {gone[family]}" for way in ("orig", "reply")] if gone else [""]
            )
        ]
        steps.append("conntrack -R - >/dev/null 2>&1 <<'FORGET'\n" + "\n".join(forget) + "\nFORGET")
        # A router has processors of its own: this must not take those of the hosts.
        self.space.run(["nice", "-n", "19", "sh", "-c", "\n".join([*steps, "exit $status"])])

    def _take_port(self) -> int:
        port = self._next
        self._next += _PORT_STEP
        if self._next > 60000:
            self._next = FIRST_PORT
        return port

    def _ruleset(self) -> str:
        into: list[str] = []
        out: list[str] = []
        accept: list[str] = []
        for family, mapping in self.mappings.items():
            ip, literal = ("ip", "{}") if family == 4 else ("ip6", "[{}]")
            flow = f'oifname "{WAN}" {ip} saddr {mapping.inside} udp sport {self.port}'
            public = literal.format(mapping.public)
            if self.forward or self.kind == "full-cone":
                into.append(
                    f'iifname "{WAN}" {ip} daddr {mapping.public} udp dport {mapping.external}'
                    f" dnat {ip} to {literal.format(mapping.inside)}:{self.port}"
                )
            if self.forward or self.kind != "symmetric":
                out.append(f"{flow} snat {ip} to {public}:{mapping.external}")
            low = mapping.external + 1 if mapping.external >= FIRST_PORT else FIRST_PORT
            others = f'oifname "{WAN}" meta nfproto ipv{family} meta l4proto udp'
            out.append(f"{others} snat {ip} to {public}:{low}-{low + _GENERIC_SPAN - 1} random")
            out.append(f'oifname "{WAN}" meta nfproto ipv{family} snat {ip} to {mapping.public}')
            accept.append(f'iifname "{WAN}" meta nfproto ipv{family} drop')
        return f"""
table inet martlet {{
}}
flush table inet martlet
table inet martlet {{
  chain into {{
    type nat hook prerouting priority dstnat;
    {_lines(into)}
  }}
  chain out {{
    type nat hook postrouting priority srcnat;
    {_lines(out)}
  }}
  chain input {{
    type filter hook input priority filter;
    iifname "{WAN}" meta l4proto {{ tcp, udp }} drop
  }}
  chain forward {{
    type filter hook forward priority filter;
    ct state established,related accept
    ct status dnat accept
    {_lines(accept)}
  }}
}}
"""


def _lines(rules: list[str]) -> str:
    return "\n    ".join(rules)
