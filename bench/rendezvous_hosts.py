"""Pairs of hosts in one process: `python -m bench.rendezvous_hosts URL PAIRS PER_SECOND TIMEOUT`.

Each host is what a tunnel has for meeting, and nothing else: `Meeting` and `Signaller`. Commands
come by standard input, one a line; each is answered by a line of JSON.

    (start)     {"event": "ready"}: all keys are made
    arrive      hosts start, PER_SECOND of them; {"event": "met", "times": [...], "late": n}
    broken      wait until no host is connected; {"event": "alone"}
    storm       wait until all pairs have met again; as `arrive`
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time

import uvloop

from tunnel.config import RendezvousConfig
from tunnel.ice.candidate import Candidate, Kind
from tunnel.identity import Identity
from tunnel.path.network import Address
from tunnel.rendezvous.meeting import Meeting, Offered
from tunnel.rendezvous.messages import Offer
from tunnel.shell import clock
from tunnel.shell.mqtt import Signaller

_BOOT_ID = 16  # bytes


class Host:
    """One end of a pair."""

    def __init__(self, url: str, identity: Identity, peer: bytes, number: int) -> None:
        self.met: float | None = None
        """When it had a fresh offer; None: not in this act."""
        self.started = 0.0
        self._peer = peer
        self._timer: asyncio.TimerHandle | None = None
        self._meeting = Meeting(
            identity, [peer], boot_id=os.urandom(_BOOT_ID), rng=random.SystemRandom()
        )
        # Two addresses of each family and what a NAT makes of them: what a laptop has.
        addresses = [f"10.{number >> 8 & 255}.{number & 255}.{n}:4117" for n in (1, 2)]
        addresses += [f"[2001:db8:{number:x}::{n}]:4117" for n in (1, 2)]
        candidates = [Candidate(Address.parse(a), Kind.HOST, 0, False) for a in addresses]
        candidates.append(Candidate(Address("198.51.100.7", 4117), Kind.SRFLX, 0, False))
        offer = Offer("abcdefgh", "a" * 24, 1, tuple(candidates))
        self._meeting.tell(peer, offer, clock.now())
        self._meeting.want(peer, True, clock.now())
        self.signaller = Signaller(
            RendezvousConfig(url=(url,)),
            will=self._meeting.will,
            connected=self._connected,
            disconnected=self._disconnected,
            received=self._received,
        )
        self.signaller.subscribe(self._meeting.topics())

    def start(self) -> None:
        self.started = time.monotonic()
        self.signaller.start()

    def lose(self) -> None:
        """Have no path any more."""
        self.met = None
        self._meeting.want(self._peer, True, clock.now())
        self._turn()

    def _connected(self) -> None:
        self._meeting.connected(clock.now())
        self._turn()

    def _disconnected(self) -> None:
        self._meeting.disconnected(clock.now())
        self._turn()

    def _received(self, topic: str, payload: bytes) -> None:
        self._meeting.receive(topic, payload, clock.now())
        self._turn()

    def _turn(self) -> None:
        """What the driver of a tunnel does after each input."""
        now = clock.now()
        while (event := self._meeting.next_event()) is not None:
            if isinstance(event, Offered) and event.fresh and self.met is None:
                self.met = time.monotonic()
                # A tunnel would now have a path, and no more to ask.
                self._meeting.want(self._peer, False, now)
        self.signaller.subscribe(self._meeting.topics())
        for topic, payload in self._meeting.messages_to_send(now):
            self.signaller.publish(topic, payload)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (due := self._meeting.get_timer()) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.001, due - now), self._turn)


async def run(url: str, pairs: int, per_second: float, timeout: float) -> None:
    """Obey standard input until it ends."""
    hosts: list[tuple[Host, Host]] = []
    for _ in range(pairs):
        one, other = Identity.generate(), Identity.generate()
        number = len(hosts)
        hosts.append(
            (
                Host(url, one, other.public_key.raw, number),
                Host(url, other, one.public_key.raw, number),
            )
        )
    everyone = [host for pair in hosts for host in pair]
    # A pair's ends come from far apart in time, as in life.
    order = [pair[0] for pair in hosts] + [pair[1] for pair in hosts]
    _say("ready")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while command := (await reader.readline()).decode().strip():
        if command == "broken":
            while any(host.signaller.status()["state"] == "connected" for host in everyone):
                await asyncio.sleep(0.05)
            for host in everyone:
                host.lose()
            _say("alone")
            continue
        begin = time.monotonic()
        if command == "arrive":
            for index, host in enumerate(order):
                await asyncio.sleep(max(0.0, begin + index / per_second - time.monotonic()))
                host.start()
        else:
            for host in everyone:
                host.started = begin
        deadline = time.monotonic() + timeout
        while any(host.met is None for host in everyone) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        times = [
            host.met - max(pair[0].started, pair[1].started)
            for pair in hosts
            for host in pair
            if host.met is not None
        ]
        _say("met", times=times, late=len(everyone) - len(times))
    await asyncio.gather(*(host.signaller.close() for host in everyone))


def _say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
