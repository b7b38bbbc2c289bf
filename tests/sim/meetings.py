"""Two to five `Meeting`s at a simulated broker: what each says, hears, and should know."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.sim.broker import Broker
from tunnel.ice.candidate import Candidate, Kind
from tunnel.identity import Identity
from tunnel.path.network import Address
from tunnel.rendezvous.meeting import Meeting, Offer, Offered, PresenceChanged

IDENTITIES = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in range(1, 8)]


def key_of(identity: Identity) -> bytes:
    return identity.public_key.raw


class End:
    """One host: a Meeting, and what a node would do with it."""

    def __init__(
        self, broker: Broker, identity: Identity, peers: Iterable[bytes], *, skew: float = 0.0
    ) -> None:
        self.broker = broker
        self.identity = identity
        self.key = key_of(identity)
        self.peers = list(peers)
        self.skew = skew
        self.wanted: set[bytes] = set()
        self.generation = 0
        self.said: set[tuple[bytes, Offer]] = set()
        """Every offer there ever was to tell, with the process that told it."""
        self.boots: dict[bytes, float] = {}
        """When each process ended, by the broker's clock."""
        self.start()

    def start(self) -> None:
        rng = self.broker.rng
        self.boot_id = rng.randbytes(16)
        self.boots[self.boot_id] = float("inf")
        self.events: list[tuple[float, Offered | PresenceChanged]] = []
        self.known: dict[bytes, Offered] = {}
        """The latest word of each peer."""
        self.fresh: dict[bytes, list[Offered]] = defaultdict(list)
        self.meeting = Meeting(self.identity, self.peers, boot_id=self.boot_id, rng=rng)
        self.new_offer(pump=False)
        for peer in self.wanted:
            self.meeting.want(peer, True, self.broker.now + self.skew)
        self.link = self.broker.attach(self, will=self.meeting.will, skew=self.skew)

    def stop(self) -> None:
        """The process dies."""
        self.boots[self.boot_id] = self.broker.now
        self.broker.detach(self.link)

    def restart(self) -> None:
        self.stop()
        self.start()

    def new_offer(self, *, pump: bool = True) -> None:
        """The host's candidates are others now."""
        self.generation += 1
        rng = self.broker.rng
        addresses = [Address(f"192.0.2.{rng.randrange(1, 255)}", 4117) for _ in range(3)]
        candidates = tuple(Candidate(a, Kind.HOST, 0, False) for a in dict.fromkeys(addresses))
        name = self.boot_id.hex()[:16]
        self.offer = Offer(name, name * 2, self.generation, candidates)
        self.said.add((self.boot_id, self.offer))
        for peer in self.peers:
            self.meeting.tell(peer, self.offer, self.broker.now + self.skew)
        if pump:
            self.link.pump()

    def want(self, peer: bytes, wanted: bool) -> None:
        (self.wanted.add if wanted else self.wanted.discard)(peer)
        self.meeting.want(peer, wanted, self.broker.now + self.skew)
        self.link.pump()

    def knows(self, other: End) -> bool:
        """Whether it has the other's present offer, and certainly."""
        known = self.known.get(other.key)
        return (
            known is not None
            and known.offer == other.offer
            and any(each.boot_id == other.boot_id for each in self.fresh[other.key])
        )

    # a client of the broker

    def connected(self, now: float) -> None:
        self.meeting.connected(now)

    def disconnected(self, now: float) -> None:
        self.meeting.disconnected(now)

    def receive(self, topic: str, payload: bytes, now: float) -> None:
        self.meeting.receive(topic, payload, now)
        while (event := self.meeting.next_event()) is not None:
            self.events.append((self.broker.now, event))
            if isinstance(event, Offered):
                self.known[event.peer] = event
                if event.fresh:
                    self.fresh[event.peer].append(event)

    def topics(self) -> frozenset[str]:
        return self.meeting.topics()

    def messages_to_send(self, now: float) -> list[tuple[str, bytes]]:
        return self.meeting.messages_to_send(now)

    def handle_timer(self, now: float) -> None:
        self.meeting.handle_timer(now)

    def get_timer(self) -> float | None:
        return self.meeting.get_timer()


class Party:
    """All ends of one seed, every one a peer of every other."""

    def __init__(self, seed: int, *, most: int = 5) -> None:
        self.rng = random.Random(seed)
        self.broker = Broker(
            self.rng,
            delay=self.rng.choice([0.001, 0.02, 0.15]),
            jitter=self.rng.choice([0.0, 0.05, 0.5]),
            loss=self.rng.choice([0.0, 0.1, 0.5]),
            duplication=self.rng.choice([0.0, 0.2]),
            reordering=self.rng.choice([0.0, 0.3]),
        )
        identities = IDENTITIES[: self.rng.randint(2, most)]
        keys = [key_of(identity) for identity in identities]
        self.ends = [
            End(
                self.broker,
                identity,
                [key for key in keys if key != key_of(identity)],
                skew=self.rng.choice([0.0, 3600.0, -900.0]),
            )
            for identity in identities
        ]

    def live(self, seconds: float) -> None:
        """Whatever may happen to hosts and their connections."""
        end = self.broker.now + seconds
        while self.broker.now < end:
            one = self.rng.choice(self.ends)
            chance = self.rng.random()
            if chance < 0.3:
                other = self.rng.choice([each for each in self.ends if each is not one])
                one.want(other.key, self.rng.random() < 0.6)
            elif chance < 0.5:
                one.new_offer()
            elif chance < 0.7:
                one.link.drop(graceful=self.rng.random() < 0.3)
            elif chance < 0.9:
                one.link.connect()
            else:
                one.restart()
            self.broker.run(self.rng.expovariate(2.0))

    def calm(self) -> None:
        """From now on nothing is lost, and everybody is there."""
        self.broker.loss = self.broker.reordering = 0.0
        for end in self.ends:
            end.link.connect()

    def pairs(self) -> list[tuple[End, End]]:
        """Who wants whom."""
        return [(one, other) for one in self.ends for other in self.ends if other.key in one.wanted]

    def check(self) -> None:
        """What must hold whatever happened: nobody heard what was never said."""
        for one in self.ends:
            for other in self.ends:
                for at, event in one.events:
                    if isinstance(event, Offered) and event.peer == other.key:
                        assert (event.boot_id, event.offer) in other.said
                        if event.fresh:
                            assert at - other.boots[event.boot_id] <= 120.0

    def sent(self) -> int:
        return sum(len(end.link.sent) for end in self.ends)
