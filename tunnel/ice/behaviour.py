"""What kind of NAT is in the way: its behaviour, measured from one local address.

::

    socket     asks                                        learns
    mapping    every server; the first that knows          whether each destination sees another
               RFC 5780 also at its other addresses        mapping (section 4.3)
    filtering  that server, to be answered from elsewhere  who may send in (section 4.4)
    hairpin    any server, and the mapped address of the   whether hosts behind this NAT reach
               first socket; the first asks it likewise    each other by their mappings (4.5)

Three sockets, because the tests spoil each other: the filtering socket must never have sent to the
address it wants to hear from. For the same reason it talks to one server alone. The hairpin test
sends both ways, as two hosts that check each other would; else a NAT that filters would look like
one that cannot do it.

Where no server knows RFC 5780, the mapped addresses that two plain servers see still tell an easy
NAT from a hard one. What differs between two hosts is then taken to differ between ports, too,
which is the rule and the worse case; nothing tells how such a NAT filters.

The same round finds the largest packet of a few sizes that gets through: padded questions, which
are answered or not.

Everything is over within a limit, whatever is lost. All state and no I/O: the caller has the
sockets and the time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from ipaddress import IPv4Network, ip_address
from typing import NamedTuple

from tunnel.ice import check
from tunnel.ice.portmap import is_translated
from tunnel.path.network import Address, PathKey, is_usable_remote

WAITS = (0.5, 1.0, 1.0)
"""Seconds after each try: the first RTO is that of RFC 8489 section 6.2.1, the rest is short,
because somebody waits for the result."""
LIMIT = 5.5
"""Seconds for all: one round for the first answers, one for what follows from them."""
PACE = 0.005
"""Seconds between two questions: some NATs bound how fast mappings are made (RFC 5780 section 4.6).
"""
MAX_SERVERS = 4
SHARED = IPv4Network("100.64.0.0/10")
"""RFC 6598: the addresses between a home router and its provider's NAT."""
SIZES = (576, 1280, 1400, 1492, 1500)
"""Bytes of IP packets tried: what shows that the server answers padded questions at all; IPv6's
least; a mobile network, or a tunnel; PPPoE; Ethernet. Beside them goes the least for QUIC."""
QUIC_PAYLOAD = 1200
"""Bytes of UDP payload that every path has to carry (RFC 9000 section 14)."""

_IP_HEADERS = {False: 28, True: 48}  # with UDP's; by whether it is IPv6


class Mapping(StrEnum):
    """RFC 4787 section 4.1: what decides about the mapping of a socket."""

    NO_NAT = "no NAT"
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
    UNKNOWN = "unknown"

    @property
    def hard(self) -> bool:
        """Whether nobody else can be told the mapping that he would have to send to."""
        return self in (Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT)


class Filtering(StrEnum):
    """RFC 4787 section 5: who may send to a mapping. Without a NAT, a firewall may filter."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """One STUN server, asked from this address."""

    address: Address
    rtt: float | None
    """Seconds; None: no answer."""
    mapped: Address | None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is between a local address and the Internet."""

    local: Address
    mapped: Address | None
    mapping: Mapping
    filtering: Filtering
    hairpin: bool | None
    """None: not known, or there is no NAT."""
    cgnat: bool
    """Whether the provider translates, too, as far as addresses show it."""
    udp_blocked: bool
    """No server answered at all."""
    path_mtu: int | None
    """Bytes: the largest IP packet of those tried that got through; None: not measurable."""
    servers: tuple[ServerSeen, ...]


def classify_mapping(local: Address, seen: MappingType[Address, Address]) -> Mapping:
    """From the mapped address that each remote address saw (RFC 5780 section 4.3)."""
    mapped = set(seen.values())
    if not mapped:
        return Mapping.UNKNOWN
    if mapped == {local}:
        return Mapping.NO_NAT
    by_host: dict[str, set[Address]] = {}
    ports: dict[str, int] = {}
    for remote, address in seen.items():
        by_host.setdefault(remote.host, set()).add(address)
        ports[remote.host] = ports.get(remote.host, 0) + 1
    if any(len(addresses) > 1 for addresses in by_host.values()):
        return Mapping.ADDRESS_AND_PORT_DEPENDENT
    if len(by_host) == 1:
        return Mapping.UNKNOWN  # another host could see anything
    if len(mapped) == 1:
        return Mapping.ENDPOINT_INDEPENDENT
    if any(count > 1 for count in ports.values()):
        return Mapping.ADDRESS_DEPENDENT
    return Mapping.ADDRESS_AND_PORT_DEPENDENT


def is_cgnat(local: str, mapped: str | None, router: str | None = None) -> bool:
    """Whether there is a NAT of the provider behind that of the router.

    It shows in a shared address at either end; or in the external address of the `router`, where
    it tells one (PCP, NAT-PMP, UPnP): not the one that the Internet sees, or not a public one.
    """
    if any(address is not None and ip_address(address) in SHARED for address in (local, mapped)):
        return True
    if router is None or mapped is None:
        return False
    return is_translated(router) or ip_address(router) != ip_address(mapped)


class Sockets(NamedTuple):
    """Three ports of one local address, fresh ones."""

    mapping: Address
    filtering: Address
    hairpin: Address


class Discovery:
    """One measurement, from one local address. Times are the monotonic seconds passed in."""

    def __init__(
        self,
        sockets: Sockets,
        servers: Sequence[Address],
        rng: random.Random,
        now: float,
        *,
        link_mtu: int = 1500,
        limit: float = LIMIT,
    ) -> None:
        """`servers` are of the family of the sockets; more than 4 are not asked.

        `limit`: seconds for all of it.
        """
        self._sockets = sockets
        self._servers = tuple(dict.fromkeys(servers))[:MAX_SERVERS]
        self._rng = rng
        self._deadline = now + limit
        self._last = now - PACE
        """When the latest of the questions is, or was, due first."""
        self._tests: list[_Test] = []
        self._open: dict[bytes, tuple[_Test, float]] = {}
        self._out: list[tuple[PathKey, bytes]] = []
        self._clever: tuple[Address, Address] | None = None
        """The server that knows RFC 5780, and its other address."""
        self._overhead = _IP_HEADERS[sockets.mapping.is_ipv6]
        least = QUIC_PAYLOAD + self._overhead
        self._sizes = sorted(size for size in {*SIZES, least} if size <= link_mtu)
        for server in self._servers:
            self._ask(_Role.MAPPING, sockets.mapping, server, now)

    # inputs

    def receive(self, data: bytes, path: PathKey, now: float) -> bool:
        """Take a datagram; False if it has nothing to do with any question of ours."""
        if not check.looks_like_stun(data):
            return False
        asked = self._open.get(check.transaction_id_of(data))
        if asked is None:
            return False
        test, at = asked
        if check.is_request(data):
            # Our own, at another socket: it went out to the NAT and came in again.
            if test.role is _Role.HAIRPIN and path.local != test.key.local:
                self._finish_hairpin(_Answer(path.remote, None, now - at))
        elif not test.finished and path.local == test.key.local and test.may_come_from(path.remote):
            test.answer = _Answer(path.remote, check.read_server_response(data), now - at)
            test.finished = True
            self._follow(test, check.read_other_address(data), now)
        return True

    def handle_timer(self, now: float) -> None:
        for test in self._tests:
            if test.finished or test.due > now:
                continue
            if test.tries == len(WAITS) or now >= self._deadline:
                test.finished = True
                continue
            # Each try is a transaction of its own, so that its round trip is known exactly.
            transaction = self._rng.randbytes(check.TRANSACTION_LENGTH)
            self._open[transaction] = (test, now)
            self._out.append((test.key, test.request(transaction)))
            test.due = min(now + WAITS[test.tries], self._deadline)
            test.tries += 1

    # drains

    @property
    def done(self) -> bool:
        """Whether `behaviour` is final."""
        return all(test.finished for test in self._tests)

    def get_timer(self) -> float | None:
        return min((test.due for test in self._tests if not test.finished), default=None)

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        self.handle_timer(now)
        out, self._out = self._out, []
        return out

    def behaviour(self) -> Behaviour:
        """What is known so far."""
        answers = self._answers(_Role.MAPPING)
        servers = tuple(_seen(server, answers.get(server)) for server in self._servers)
        mapped = {a.remote: a.mapped for a in answers.values() if a.mapped is not None}
        local = self._sockets.mapping
        first = next((seen.mapped for seen in servers if seen.mapped is not None), None)
        return Behaviour(
            local=local,
            mapped=first,
            mapping=classify_mapping(local, mapped),
            filtering=self._filtering(),
            hairpin=self._hairpin(),
            cgnat=is_cgnat(local.host, first and first.host),
            udp_blocked=bool(servers) and not answers,
            path_mtu=self._path_mtu(),
            servers=servers,
        )

    # what is asked

    def _ask(
        self, role: _Role, local: Address, remote: Address, now: float, what: _What | None = None
    ) -> None:
        self._last = max(self._last + PACE, now)
        self._tests.append(_Test(role, PathKey(local, remote), what or _What(), due=self._last))

    def _follow(self, test: _Test, other: Address | None, now: float) -> None:
        """Ask what this answer makes possible; `other` is the server's other address."""
        local, server = self._sockets, test.key.remote
        if test.role is _Role.MAPPING and server in self._servers:
            if not self._of(_Role.PORT):
                self._ask(_Role.PORT, local.hairpin, server, now)
                for size in self._sizes:
                    padded = _What(size=size - self._overhead)
                    self._ask(_Role.SIZE, local.mapping, server, now, padded)
            if self._clever is None and other is not None and _is_elsewhere(other, server):
                self._clever = server, other
                # RFC 5780 section 4.3, tests II and III; section 4.4, tests I to III
                self._ask(_Role.MAPPING, local.mapping, Address(other.host, server.port), now)
                self._ask(_Role.MAPPING, local.mapping, other, now)
                self._ask(_Role.FILTERING, local.filtering, server, now)
                for elsewhere in (_What(change_ip=True, change_port=True), _What(change_port=True)):
                    self._ask(_Role.FILTERING, local.filtering, server, now, elsewhere)
        if not self._of(_Role.HAIRPIN):
            here, there = (self._mapped_of(role) for role in (_Role.MAPPING, _Role.PORT))
            if here is not None and there is not None and here != local.mapping:
                self._ask(_Role.HAIRPIN, local.mapping, there, now)
                self._ask(_Role.HAIRPIN, local.hairpin, here, now)

    def _finish_hairpin(self, answer: _Answer) -> None:
        for test in self._of(_Role.HAIRPIN):
            test.finished = True
            test.answer = answer

    # what is known

    def _of(self, role: _Role) -> list[_Test]:
        return [test for test in self._tests if test.role is role]

    def _answers(self, role: _Role) -> dict[Address, _Answer]:
        """By whom was asked."""
        return {test.key.remote: test.answer for test in self._of(role) if test.answer is not None}

    def _mapped_of(self, role: _Role) -> Address | None:
        answers = self._answers(role).values()
        return next((answer.mapped for answer in answers if answer.mapped is not None), None)

    def _filtering(self) -> Filtering:
        if self._clever is None:
            return Filtering.UNKNOWN
        server, _ = self._clever
        asked, both, port = self._of(_Role.FILTERING)
        if asked.answer is None or not (both.finished and port.finished):
            return Filtering.UNKNOWN
        came = [test.answer.remote for test in (both, port) if test.answer is not None]
        if server in came:  # it does not do what it was asked for
            return Filtering.UNKNOWN
        if any(remote.host != server.host for remote in came):
            return Filtering.ENDPOINT_INDEPENDENT
        return Filtering.ADDRESS_DEPENDENT if came else Filtering.ADDRESS_AND_PORT_DEPENDENT

    def _hairpin(self) -> bool | None:
        tests = self._of(_Role.HAIRPIN)
        if not tests or not all(test.finished for test in tests):
            return None
        return tests[0].answer is not None

    def _path_mtu(self) -> int | None:
        """None also where not even the least was answered: the server takes no padding."""
        answered = [test.what.size for test in self._of(_Role.SIZE) if test.answer is not None]
        return max(answered) + self._overhead if answered else None


class _Role(Enum):
    MAPPING = "mapping"  # which mapping does this destination see?
    FILTERING = "filtering"  # does the answer come in?
    PORT = "port"  # which mapping has the hairpin socket?
    HAIRPIN = "hairpin"  # does it come back in?
    SIZE = "size"  # does it get through?


@dataclass(frozen=True, slots=True)
class _Answer:
    remote: Address
    """Where it came from."""
    mapped: Address | None
    rtt: float


@dataclass(frozen=True, slots=True)
class _What:
    """As `check.server_request` takes it."""

    change_ip: bool = False
    change_port: bool = False
    size: int = 0


@dataclass(slots=True)
class _Test:
    """One question, until it is answered or was asked often enough."""

    role: _Role
    key: PathKey
    what: _What
    due: float
    """Of the next try, or of the end."""
    tries: int = 0
    finished: bool = False
    answer: _Answer | None = None

    def request(self, transaction: bytes) -> bytes:
        what = self.what
        return check.server_request(
            transaction, change_ip=what.change_ip, change_port=what.change_port, size=what.size
        )

    def may_come_from(self, remote: Address) -> bool:
        """The answer: from whom was asked, unless that was to be answered from elsewhere."""
        return remote == self.key.remote or self.what.change_port


def _seen(server: Address, answer: _Answer | None) -> ServerSeen:
    if answer is None:
        return ServerSeen(server, None, None)
    return ServerSeen(server, answer.rtt, answer.mapped)


def _is_elsewhere(other: Address, server: Address) -> bool:
    """Whether this can be the other address of such a server: another IP, and another port."""
    return (
        other.host != server.host
        and other.port != server.port
        and other.is_ipv6 == server.is_ipv6
        and is_usable_remote(other.host)
    )
