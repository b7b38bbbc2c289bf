"""Agreeing with a peer on a load through the tunnel: `martlet bench`, as the two ends talk of it.

Who measures asks for an address inside the tunnel; the other end has a load served there for a
while, and answers with a port and a secret (docs/protocol.md). Neither address is taken on trust.
"""

from collections.abc import Callable
from ipaddress import ip_address

from tunnel.config import PeerConfig
from tunnel.control import Bench, BenchReply, Hello
from tunnel.events import BenchAnswer, BenchWanted, NodeEvent
from tunnel.quic.control_stream import Session

BENCH_FEATURE = "bench"
OPEN_BENCHES = 8
"""Questions that a peer may owe an answer to; older ones are forgotten."""


class Benches:
    """The benches of one peer. `hello` is what this host says of itself."""

    def __init__(self, config: PeerConfig, hello: Hello, emit: Callable[[NodeEvent], None]) -> None:
        self._config = config
        self._hello = hello
        self._emit = emit
        self._asked: dict[int, str] = {}

    def ask(self, session: Session | None, state: str, token: int, seconds: int) -> None:
        """Ask the peer to serve a load for `seconds`; there will be a BenchAnswer, or silence."""
        name = self._config.name
        problem = ""
        if session is None or session.hello is None or state != "up":
            problem = f"peer {name} is not up, but {state}"
        elif BENCH_FEATURE not in session.hello.features:
            problem = f"the martlet of peer {name} is too old: it knows no bench"
        else:
            theirs = self._inner(session.hello.addresses, self._hello.addresses)
            if theirs:
                self._asked[token] = theirs[0]
                if len(self._asked) > OPEN_BENCHES:
                    del self._asked[next(iter(self._asked))]  # the oldest
                session.say(Bench(token=token, address=theirs[0], seconds=seconds))
                return
            problem = (
                f"peer {name} has no address inside the tunnel that is in its allowed_ips"
                " here, and of a family that this host has one of, too"
            )
        self._emit(BenchAnswer(name, token, problem=problem))

    def on_asked(self, session: Session, message: Bench) -> None:
        """The peer asks for a load."""
        sources = session.hello.addresses if session.hello is not None else ()
        sources = self._inner(sources, (message.address,))
        if not self._config.bench:
            reason = "benches are off there (bench = false)"
        elif message.address not in self._hello.addresses:
            reason = "that is no address of its own"
        elif not sources:
            reason = "this host has no address that is in allowed_ips there"
        else:
            self._emit(
                BenchWanted(
                    self._config.name, message.token, message.address, sources, message.seconds
                )
            )
            return
        session.say(BenchReply(token=message.token, reason=reason))

    def on_reply(self, reply: BenchReply) -> None:
        """The peer's answer to what was asked."""
        address = self._asked.pop(reply.token, None)
        if address is None:
            return
        name = self._config.name
        problem = ""
        if not reply.port:
            problem = f"peer {name} refuses: {reply.reason or 'no reason given'}"
        self._emit(BenchAnswer(name, reply.token, address, reply.port, reply.secret, problem))

    def _inner(self, theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[str, ...]:
        """The peer's addresses that are its own by our configuration, and of a family of ours."""
        families = {ip_address(address).version for address in ours}
        return tuple(
            str(address)
            for address in map(ip_address, theirs)
            if address.version in families
            and any(address in network for network in self._config.allowed_ips)
        )
