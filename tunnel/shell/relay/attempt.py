"""One way to a server, tried: the carrier to it, the allocation there, and what became of both."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

from tunnel.errors import ConfigError
from tunnel.ice.candidate import Relay
from tunnel.ice.turn import Allocated, Allocation, Ended, Received
from tunnel.ice.turn_message import CHANNEL_HEADER, REASONS, Problem
from tunnel.obstacle import Reason, relay_remedy
from tunnel.path.network import Address, is_usable_remote
from tunnel.shell import clock
from tunnel.shell.carrier import Carrier, StreamCarrier, UdpCarrier
from tunnel.shell.log import Log
from tunnel.shell.relay.live import Live
from tunnel.shell.relay.ways import Way

if TYPE_CHECKING:
    from tunnel.shell.relay.slot import Slot

RESTARTS = 2
"""Of a way whose server wants another port or names another server, in a row."""


class Attempt:
    """One way to a server, and the allocation there."""

    def __init__(self, slot: Slot, way: Way) -> None:
        self.way = way
        self.problem: Problem | None = None
        self._slot = slot
        self._carrier: Carrier | None = None
        self._allocation: Allocation | None = None
        self._live: Live | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tries = 0

    @property
    def under_way(self) -> bool:
        return self._carrier is not None and self._live is None

    @property
    def worth_telling(self) -> bool:
        """Not that a server has no IPv6, which is common, nor of a way that was not needed."""
        common = Problem.UNSUPPORTED if self._slot.place.ipv6 else None
        return self._carrier is not None or self.problem not in (None, common)

    @property
    def dropped(self) -> int:
        return 0 if self._carrier is None else self._carrier.dropped

    def start(self) -> bool:
        """Begin; False when that failed at once, in which case nobody else is told."""
        return self._start(self.way.address)

    def _start(self, address: Address) -> bool:
        relays, place, way = self._slot.relays, self._slot.place, self.way
        stream = way.transport != "udp"
        self._tries += 1
        try:
            password = way.server.password()
        except ConfigError as error:
            text = f"{way.server.config.password_file}: {error}"
            return self._give_up(Problem.REFUSED, text, "other")
        except ValueError:
            return self._give_up(Problem.REFUSED, "the password is not UTF-8 text", "other")
        self._allocation = Allocation(
            username=way.server.config.username,
            password=password,
            ipv6=place.ipv6,
            stream=stream,
            rng=relays.rng,
        )
        try:
            if stream:
                self._carrier = StreamCarrier(
                    place.ip,
                    self._slot.device,
                    address,
                    context=tls() if way.transport == "tls" else None,
                    host=way.server.endpoint.host,
                    ready=self._ready,
                    deliver=self._deliver,
                    lost=self._lost,
                )
            else:
                self._carrier = UdpCarrier(
                    place.ip, self._slot.device, address, deliver=self._deliver
                )
                self._ready()
        except OSError as error:
            return self._give_up(Problem.NO_ANSWER, error.strerror or str(error), "other")
        return True

    def _give_up(self, problem: Problem, text: str, reason: Reason) -> bool:
        self.problem = problem
        self._slot.failures[self.way] = reason, text
        self._close_carrier()
        return False

    def check(self) -> None:
        """Is it still there?"""
        if self._allocation is not None:
            self._allocation.check(clock.now())
            self.flush()

    def close(self) -> None:
        if self._allocation is not None and self._carrier is not None:
            self._allocation.close(clock.now())
            for message in self._allocation.messages_to_send(clock.now()):
                self._carrier.send(message)
        self._close_carrier()

    def _close_carrier(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        live, self._live = self._live, None
        if live is not None:
            live.close()
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            self._slot.relays.gone += carrier.dropped
            carrier.close()

    def status(self) -> dict[str, Any]:
        place, live = self._slot.place, self._live
        state = "allocated" if live is not None else "asking" if self._carrier else "failed"
        reason, error = self._slot.failures.get(self.way, ("", ""))
        return row(
            self.way.server.url,
            transport=self.way.transport,
            local=place.ip,
            interface=place.interface,
            address=None if live is None else str(live.relay.address),
            state=state,
            error=error,
            remedy=relay_remedy(reason),
        )

    # ---- the allocation ----

    def _ready(self) -> None:
        assert self._allocation is not None
        self._allocation.start(clock.now())
        self.flush()

    def _lost(self, reason: Reason, text: str) -> None:
        self._ended(Problem.NO_ANSWER, text, reason=reason)

    def _deliver(self, messages: list[memoryview]) -> None:
        allocation, live = self._allocation, self._live
        assert allocation is not None
        now = clock.now()
        for message in messages:
            if live is None or len(message) < CHANNEL_HEADER.size or message[0] & 0xC0 != 0x40:
                allocation.receive(bytes(message), now)
                continue
            number, length = CHANNEL_HEADER.unpack_from(message)
            remote = allocation.remote_of(number)
            payload = message[CHANNEL_HEADER.size : CHANNEL_HEADER.size + length]
            if remote is not None and length == len(payload):
                live.take(remote, payload)
        if live is not None:
            allocation.heard(now)
        self.flush()

    def flush(self) -> None:
        """Send what the allocation wants sent, hear what it has to tell, wake it when it wants."""
        allocation, carrier = self._allocation, self._carrier
        if allocation is None or carrier is None:
            return
        now = clock.now()
        for message in allocation.messages_to_send(now):
            carrier.send(message)
        while (event := allocation.next_event()) is not None:
            match event:
                case Allocated(relayed):
                    self._allocated(relayed)
                case Received(remote, data):
                    if self._live is not None:
                        self._live.take(remote, memoryview(data))
                case Ended(problem, text, elsewhere):
                    if self._live is not None:
                        self._live.pass_on()
                    self._ended(problem, text, elsewhere)
                    return
        if self._live is not None:
            self._live.pass_on()
        if self._carrier is carrier:  # what was passed on may have changed anything
            self._arm(allocation, now)

    def _arm(self, allocation: Allocation, now: float) -> None:
        deadline = allocation.get_timer()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= self._when(deadline, now):
                return  # an idle wake-up costs less than a new timer for each packet
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._slot.relays.loop.call_at(self._when(deadline, now), self._on_timer)

    def _when(self, deadline: float, now: float) -> float:
        return self._slot.relays.loop.time() + max(0.0, deadline - now)

    def _on_timer(self) -> None:
        self._timer = None
        if self._allocation is not None:
            self._allocation.handle_timer(clock.now())
            self.flush()

    def _allocated(self, relayed: Address) -> None:
        assert self._allocation is not None and self._carrier is not None
        relays, place = self._slot.relays, self._slot.place
        relay = Relay(relayed, place.interface, place.ip, self.way.server.url, self.way.transport)
        try:
            live = Live(relays, relay, self._allocation, self._carrier, self.flush)
        except OSError as error:
            self._ended(Problem.NO_ANSWER, f"no socket: {error.strerror}", reason="other")
            return
        if not live.begin():
            self._ended(Problem.REFUSED, f"the address {relayed} is in use already")
            return
        self._live = live
        self._slot.failures.pop(self.way, None)
        fields = {"relayed": relayed, "server": self.way.server.url, "over": self.way.transport}
        _log.info("relay", **fields, local=place.ip)
        self._slot.succeeded(self)

    def _ended(
        self,
        problem: Problem,
        text: str,
        elsewhere: Address | None = None,
        *,
        reason: Reason | None = None,
    ) -> None:
        if reason is None:
            reason = REASONS.get(problem, "other")
        was_live = self._live is not None
        if was_live or problem is not Problem.UNSUPPORTED:
            # A way that fails again and again for the same reason is told of once.
            old = not was_live and self._slot.failures.get(self.way) == (reason, text)
            (_log.debug if old else _log.warning)(
                "relay lost" if was_live else "no relay",
                server=self.way.server.url, over=self.way.transport, local=self._slot.place.ip,
                error=text, remedy=relay_remedy(reason) or None,
            )  # fmt: skip
        self._give_up(problem, text, reason)
        again = self.way.address if problem is Problem.MISMATCH else elsewhere
        if again is not None and not is_usable_remote(again.host):
            again = None
        if not was_live and again is not None and self._tries <= RESTARTS and self._start(again):
            self.problem = None
            return
        self._slot.ended(self)


def row(server: str, **known: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "server": server,
        "transport": None,
        "local": None,
        "interface": None,
        "address": None,
        "state": "waiting",
        "error": "",
        "remedy": "",
    }
    return row | known


_contexts: list[ssl.SSLContext] = []


def tls() -> ssl.SSLContext:
    """Made once: it reads the system's certificates."""
    if not _contexts:
        _contexts.append(ssl.create_default_context())
    return _contexts[0]


_log = Log("relay")
