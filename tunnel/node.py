"""All peers of this host behind one UDP port and one TUN; the one object the shell drives.

Sans-IO: datagrams, packets, network snapshots and the time go in; datagrams, packets, events and
one deadline come out. Nothing here reads a clock or opens a socket.
"""

import errno
import hmac
import random
from collections import deque
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TextIO

from msgspec import structs

from tunnel import missing
from tunnel.benches import BENCH_FEATURE
from tunnel.config import Config, IPInterface, IPNetwork, PeerConfig
from tunnel.control import PROTOCOL_VERSION, ApplicationError, Hello
from tunnel.datapath.engine import Connection, Datapath
from tunnel.events import NodeEvent, Obstructed, PeerRefused, PortUnwanted, ResolveWanted
from tunnel.ice.agent import Agent
from tunnel.ice.candidate import MAX_RANK, Base, Relay
from tunnel.ice.check import looks_like_stun, username_of
from tunnel.ice.gather import Gatherer
from tunnel.identity import Identity, PublicKey
from tunnel.ledger import Ledger
from tunnel.obstacle import Obstacle
from tunnel.path.network import Address, LocalNetwork, PathKey
from tunnel.peer import Peer
from tunnel.probing import Probing
from tunnel.quic.admission import (
    MAC_LENGTH,
    Admitted,
    Door,
    Header,
    read_header,
    stateless_reset,
    token_maker,
)
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection
from tunnel.quic.control_stream import CidIssued, CidRetired, Ended, Said, Session
from tunnel.quic.logging import StreamLogger
from tunnel.rendezvous.meeting import Meeting, Offered
from tunnel.surroundings import Surroundings

STRANGER_MEMORY = 120.0
"""Seconds for which it is told that somebody without the right keys was here."""
STRANGER_PATIENCE = 5.0
"""Seconds until a handshake that somebody began with us must have shown its Hello."""
RESETS_PER_SECOND = 20
FEATURES = ("copies", BENCH_FEATURE)
STUN_SERVERS = ""
"""Stands for them where names are resolved for a peer; no peer has this name."""
PORT_TRIAL = 10.0
"""Seconds that a further local port gets to become the one in use, and that it stays after it was:
the peer may go on sending there for a while. One that is the only way to a peer without a relay
stays as long as it is."""
CLOSE_LINGER = 0.2  # seconds for the last datagrams of a closing node


class Node:
    """The tunnel of one interface.

    `boot_id` (16 random bytes) is new for each start of the process. `wall_offset` plus the
    monotonic time is Unix time, for the ledger alone.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        *,
        rng: random.Random,
        boot_id: bytes,
        wall_offset: float = 0.0,
        keylog: TextIO | None = None,
        quic_logger: StreamLogger | None = None,
        max_packets_per_key: int | None = None,
    ) -> None:
        self._config = config
        self._identity = identity
        self._rng = rng
        self._keylog = keylog
        self._quic_logger = quic_logger
        self._max_packets_per_key = max_packets_per_key
        self._own_key = identity.public_key.raw
        self._reset_secret = identity.derive(b"martlet stateless reset", 32)
        self._wall_offset = wall_offset
        self._door = Door(self._own_key, rng.randbytes(16))
        self._events: deque[NodeEvent] = deque()
        self.datapath = Datapath(peer.allowed_ips for peer in config.peers)
        self._ledger = Ledger()
        self._surroundings = Surroundings(LocalNetwork(), 0)
        self._relays: tuple[Relay, ...] = ()
        self._extra: dict[Address, float] = {}  # further local ports, and when each was in use last
        self._by_cid: dict[bytes, Session] = {}
        self._owners: dict[Session, Peer | None] = {}
        self._by_engine: dict[Connection, Session] = {}
        self._raw: list[tuple[PathKey, bytes]] = []
        self._resets = (0.0, 0)
        self._stranger: tuple[float, Obstacle] | None = None
        """The last that had a wrong key, and when."""
        self._closing_at: float | None = None
        self.counters = {
            "strangers": 0,
            "retries": 0,
            "resets_sent": 0,
            "send_errors": 0,
        }
        self._hello = Hello(
            version=PROTOCOL_VERSION,
            features=FEATURES,
            addresses=tuple(str(a.ip) for a in config.interface.address),
            boot_id=boot_id,
        )
        self._addresses = config.interface.address
        self._advertise = [
            Address(str(e.ip), e.port) for e in config.ice.advertise if e.ip is not None
        ]
        self._gatherer = Gatherer(rng)
        self._probing = Probing(rng=rng, emit=self._events.append, keep=self._keep_port)
        self._silent = False
        """Whether the STUN servers were, when the log was told."""
        self._mapped: dict[Address, Address] = {}
        self.peers: dict[str, Peer] = {}
        self._places: dict[str, int] = {}  # of each peer, in the datapath
        forbidden = self._forbidden(config.peers)
        for owner, peer_config in enumerate(config.peers):
            self.peers[peer_config.name] = self._peer(peer_config, owner, forbidden)
        self._by_key = {peer.config.public_key.raw: peer for peer in self.peers.values()}
        self.meeting: Meeting | None = None
        """Through the brokers of [rendezvous]."""
        if config.rendezvous is not None:
            self.meeting = Meeting(identity, self._by_key, boot_id=boot_id, rng=rng)
        self._started = False

    def _peer(self, config: PeerConfig, owner: int, forbidden: Sequence[IPNetwork]) -> Peer:
        self._places[config.name] = owner
        return Peer(
            config,
            agent=Agent(rng=self._rng, advertise=self._advertise, forbidden=forbidden),
            redundancy=self._config.paths.redundancy,
            lane=self.datapath.lane(owner, self._rng.getrandbits(64)),
            ledger=self._ledger,
            own_key=self._own_key,
            dialable=self._config.interface.listen_port is not None,
            hello=self._hello,
            rng=self._rng,
            wall_offset=self._wall_offset,
            dial=self._dial,
            emit=self._events.append,
        )

    def _forbidden(self, peers: Iterable[PeerConfig]) -> list[IPNetwork]:
        """Where no peer is to be sought: the tunnel's own networks, and those routed into it."""
        forbidden: list[IPNetwork] = [address.network for address in self._addresses]
        return forbidden + [network for peer in peers for network in peer.allowed_ips]

    # inputs

    def add_addresses(self, addresses: Sequence[IPInterface]) -> None:
        """This host has these inside the tunnel, too. Peers that are added later hear of them."""
        self._addresses += tuple(addresses)
        hello = [*self._hello.addresses, *(str(address.ip) for address in addresses)]
        self._hello = structs.replace(self._hello, addresses=tuple(dict.fromkeys(hello)))
        self._forbid()

    def add_peer(self, config: PeerConfig, now: float) -> None:
        """A further peer, of a name and key that no other has. Sessions with others go on."""
        owner = self.datapath.allow(config.allowed_ips)
        peer = self._peer(config, owner, ())
        self.peers[config.name] = self._by_key[config.public_key.raw] = peer
        self._forbid()
        if self.meeting is not None:
            self.meeting.add_peer(config.public_key.raw)
        if self._started:
            peer.network_changed(self._surroundings, now)
            self._tell_mapped(peer, now)
            peer.roaming.agent.mapped_ports_changed(self._mapped, now)
            peer.start(now)

    def remove_peer(self, name: str, now: float) -> None:
        """A peer is not wanted any more: its sessions are closed, its packets go nowhere."""
        peer = self.peers.pop(name)
        key = peer.config.public_key.raw
        del self._by_key[key]
        if self.meeting is not None:
            self.meeting.remove_peer(key)
        self.datapath.disallow(self._places.pop(name))
        peer.leave()
        for session, owner in self._owners.items():
            if owner is peer and not session.connection.is_closed:
                session.close(ApplicationError.GOODBYE, "removed from the configuration")
        self._forbid()

    def _forbid(self) -> None:
        forbidden = self._forbidden(peer.config for peer in self.peers.values())
        for peer in self.peers.values():
            peer.roaming.agent.forbidden_changed(forbidden)

    def receive_datagram(self, data: bytes, path: PathKey, now: float) -> None:
        if looks_like_stun(data):
            self._receive_stun(data, path, now)
            return
        header = read_header(data)
        if header is None:
            return
        session = self._by_cid.get(header.destination_cid)
        if session is None:
            session = self._unknown(header, data, path, now)
            if session is None:
                return
        session.connection.receive_datagram(data, path, now)
        self._after(session, now)

    def receive_packets(self, packets: list[bytes], now: float) -> None:
        for packet in packets:
            self.datapath.push(packet, now)

    def engine_events(self, connections: list[Connection], now: float) -> bool:
        """The engine has news of these connections; True when there may be more to do than to let
        it send on."""
        busy = False
        for engine in connections:
            session = self._by_engine.get(engine)
            if session is None:
                engine.take(now)  # of a connection that is gone
                continue
            peer = self._owners.get(session)
            if peer is not None:
                peer.roaming.traffic(now)
            if session.connection.collect(now) or (peer is not None and peer.expectant):
                busy = True
                self._after(session, now)
        return busy

    def network_changed(self, network: LocalNetwork, port: int, now: float) -> None:
        usable = {address.ip for address in network.addresses}
        self._extra = {local: at for local, at in self._extra.items() if local.host in usable}
        bases = self._bases(network, port)
        self._surroundings = Surroundings(network, port, bases)
        self._gatherer.bases_changed(network, bases, now)
        self._aim()
        for peer in self.peers.values():
            peer.network_changed(self._surroundings, now)
            if not self._started:
                peer.start(now)
        servers = self._config.stun_servers
        if servers and not (self._started and all(server.ip for server in servers)):
            self._events.append(ResolveWanted(STUN_SERVERS, servers))  # names may mean others here
        self._started = True

    def port_opened(self, local: Address, now: float, *, spread: bool = False) -> None:
        """The answer to PortWanted: there is a socket on this address and port, too."""
        if spread:
            self._probing.port_opened(local, now)
        else:
            self._keep_port(local, now)

    def _keep_port(self, local: Address, now: float) -> None:
        self._extra[local] = now
        self._sockets_changed(now)

    def relays_changed(self, relays: tuple[Relay, ...], now: float) -> None:
        """These are all addresses that TURN servers relay to us; `network_changed` comes before the
        first."""
        self._relays = relays
        self._sockets_changed(now)

    def endpoints_resolved(self, peer: str, addresses: list[Address], now: float) -> None:
        if peer == STUN_SERVERS:
            self._gatherer.servers_resolved(addresses, now)
        elif peer in self.peers:
            self.peers[peer].endpoints_resolved(addresses, now)

    def mapped_ports_changed(self, mapped: dict[Address, Address], now: float) -> None:
        """By local socket, the external addresses that routers have mapped to it, in full."""
        self._mapped = mapped
        for peer in self.peers.values():
            peer.roaming.agent.mapped_ports_changed(mapped, now)
            peer.poll(now)

    def endpoints_found(self, peer: str, addresses: list[Address], now: float) -> None:
        """Where a peer seems to be, in place of what was found before; hints, unauthenticated."""
        if peer in self.peers:
            self.peers[peer].endpoints_found(addresses, now)

    def signaller_connected(self, now: float) -> None:
        """A broker serves us, and our topics are subscribed to."""
        if self.meeting is not None:
            self.meeting.connected(now)

    def signaller_disconnected(self, now: float) -> None:
        if self.meeting is not None:
            self.meeting.disconnected(now)

    def signal_received(self, topic: str, payload: bytes, now: float) -> None:
        """A message of the broker, which may be anything."""
        if self.meeting is not None:
            self.meeting.receive(topic, payload, now)
            self._take_offers(now)

    def send_failed(self, path: PathKey, error: int, now: float) -> None:
        self.counters["send_errors"] += 1
        for peer in self.peers.values():
            if peer.session is not None and error == errno.EMSGSIZE:
                peer.session.connection.shrink(path, now)
            else:
                peer.send_failed(path, now)

    def resumed(self, now: float) -> None:
        self._gatherer.again(now)
        for peer in self.peers.values():
            peer.resumed(now)

    def ping(self, peer: str, token: int, now: float) -> bool:
        """Ask a peer for an answer (`PingReply`); False when there is no session with it."""
        return self.peers[peer].ping(token, now)

    def bench(self, peer: str, token: int, seconds: int, now: float) -> None:
        """Ask a peer to serve a load; `BenchAnswer` tells what came of it."""
        self.peers[peer].bench(token, seconds)

    def bench_served(
        self, peer: str, token: int, port: int, secret: bytes, reason: str, now: float
    ) -> None:
        """The shell's answer to `BenchWanted`."""
        if peer in self.peers:
            self.peers[peer].bench_served(token, port, secret, reason)

    def handle_timer(self, now: float) -> None:
        for session in list(self._owners):
            timer = session.connection.get_timer()
            if timer is not None and now >= timer:
                session.connection.handle_timer(now)
            self._after(session, now)
            if (
                self._owners.get(session, self) is None
                and not session.connection.is_closed
                and now >= self._stranger_expires(session)
            ):
                session.close(ApplicationError.NO_ERROR, "no Hello in time")
        for peer in self.peers.values():
            peer.handle_timer(now)
            if peer.teller.due(now):
                self._tell(peer, now)
        self._expire_ports(now)
        self._gatherer.handle_timer(now)
        self._tell_silence()
        self._share_mapped(now)
        if self.meeting is not None:
            self.meeting.handle_timer(now)

    def close(self, now: float) -> None:
        """Say goodbye to everybody; `closed` tells when the last datagrams were handed out."""
        if self._closing_at is None:
            self._closing_at = now + CLOSE_LINGER
            for peer in self.peers.values():
                peer.goodbye("shutting down")

    # drains

    def datagrams_to_send(self, now: float) -> list[tuple[PathKey, bytes]]:
        out, self._raw = self._raw, []
        out += self._gatherer.datagrams_to_send(now)
        sought = {} if self._closing_at is not None else self.peers
        agents = {name: peer.roaming.agent for name, peer in sought.items()}
        self._probing.poll(agents, self._gatherer.nat(), now)
        for peer in self.peers.values():
            out += peer.roaming.agent.datagrams_to_send(now)
        for session in list(self._owners):
            if session.ended:
                self._forget(session)
                continue
            out += [(key, data) for data, key in session.connection.datagrams_to_send(now)]
            if self._closing_at is not None and not session.connection.is_closed:
                session.close(ApplicationError.GOODBYE, "shutting down")
                out += [(key, data) for data, key in session.connection.datagrams_to_send(now)]
            # Connection IDs are announced while packets are written.
            self._after(session, now)
        return out

    def signals_to_send(self, now: float) -> list[tuple[str, bytes]]:
        """Topics and payloads for the broker. To be drained last: what else was done may matter."""
        if self.meeting is None:
            return []
        seeking = False
        for peer in self.peers.values():
            key = peer.config.public_key.raw
            wanted = peer.seeking and self._closing_at is None
            seeking = seeking or wanted
            self.meeting.tell(key, peer.offer(), now)
            self.meeting.want(key, wanted, now)
        self._gatherer.busy(seeking or self._probing.hopeful)
        return self.meeting.messages_to_send(now)

    def packets_to_write(self) -> list[bytes]:
        return self.datapath.take_delivered()

    def get_timer(self) -> float | None:
        times: list[float] = []
        for session, owner in self._owners.items():
            timer = session.connection.get_timer()
            if timer is not None:
                times.append(timer)
            if owner is None and not session.connection.is_closed:
                times.append(self._stranger_expires(session))
        times += [at for peer in self.peers.values() if (at := peer.get_timer()) is not None]
        meeting = self.meeting.get_timer() if self.meeting is not None else None
        others = (
            self._gatherer.get_timer(), self._probing.get_timer(), self._ports_expire_at(), meeting
        )  # fmt: skip
        times += [at for at in others if at is not None]
        return min(times) if times else None

    def next_event(self) -> NodeEvent | None:
        return self._events.popleft() if self._events else None

    @property
    def closed(self) -> bool:
        return self._closing_at is not None and all(s.connection.is_closed for s in self._owners)

    def status(self, now: float) -> dict[str, Any]:
        here = self._here()
        return {
            "interface": self._config.interface.name,
            "public_key": self._identity.public_key.openssh,
            "listen_port": self._surroundings.port,
            "peers": [peer.status(now, self._met(peer, now), here) for peer in self.peers.values()],
            "obstacles": [obstacle.as_json() for obstacle in self._obstacles(here, now)],
            "counters": {**self.counters, "unroutable_packets": self.datapath.unroutable},
            "probing": self._probing.counters,
            **({"rendezvous": self.meeting.counters} if self.meeting is not None else {}),
        }

    def _met(self, peer: Peer, now: float) -> dict[str, Any] | None:
        key = peer.config.public_key.raw
        return None if self.meeting is None else self.meeting.status(key, now)

    def _here(self) -> missing.Here:
        udp = None
        if self._gatherer.silent:
            servers = self._config.stun_servers
            implied = not self._config.ice.stun
            turn = bool(self._config.ice.turn)
            udp = missing.udp_obstacle(servers, self._relays, implied=implied, turn=turn)
        return missing.Here(
            network=bool(self._surroundings.bases),
            turn=bool(self._config.ice.turn),
            relayed=bool(self._relays),
            udp=udp,
        )

    def _tell(self, peer: Peer, now: float) -> None:
        """Why this peer is not up. What is in the way of all is told for itself, and that a peer
        has to dial us is how it was configured."""
        here = self._here()
        found = peer.obstacles(here, self._met(peer, now))
        news = peer.teller.news(
            each for each in found if each != here.udp and each.about != "endpoint"
        )
        self._events += [Obstructed(peer.name, obstacle) for obstacle in news]

    def _tell_silence(self) -> None:
        if self._gatherer.silent != self._silent:
            self._silent = self._gatherer.silent
            udp = self._here().udp
            if udp is not None:
                self._events.append(Obstructed(None, udp))

    def _obstacles(self, here: missing.Here, now: float) -> list[Obstacle]:
        """What is in the way, not of one peer alone."""
        found = [] if here.udp is None else [here.udp]
        sought = any(peer.state != "up" for peer in self.peers.values())
        if self._stranger is not None and sought and now < self._stranger[0] + STRANGER_MEMORY:
            found.append(self._stranger[1])
        return found

    def history(self) -> list[dict[str, Any]]:
        return self._ledger.to_builtins()

    # paths found by STUN

    def _bases(self, network: LocalNetwork, port: int) -> tuple[Base, ...]:
        ranks = network.ranks()
        metered = self._config.paths.metered
        found: list[Base] = []
        for local in network.addresses:
            ports = [port] if port else []
            ports += [extra.port for extra in self._extra if extra.host == local.ip]
            spared = any(fnmatchcase(local.interface, pattern) for pattern in metered)
            found += [
                Base(Address(local.ip, each), local.interface, spared, min(ranks[local], MAX_RANK))
                for each in ports
            ]
            found += [
                Base(
                    relay.address, local.interface, spared, min(ranks[local], MAX_RANK),
                    relay=True, via=local.ip,
                )
                for relay in self._relays
                if (relay.ip, relay.interface) == (local.ip, local.interface)
            ]  # fmt: skip
        sockets = {base.address for base in found if not base.relay}
        return tuple(base for base in found if not (base.relay and base.address in sockets))

    def _sockets_changed(self, now: float) -> None:
        """There are more or fewer sockets, or relays, on the same addresses."""
        network, port = self._surroundings.network, self._surroundings.port
        self._surroundings = Surroundings(network, port, self._bases(network, port))
        self._aim()
        for peer in self.peers.values():
            peer.sockets_changed(self._surroundings, now)

    def _aim(self) -> None:
        """Sockets came and went."""
        for session in self._owners:
            for path in session.connection.paths():
                self.datapath.aim(path.metrics, path.addr)

    def _ports_expire_at(self) -> float | None:
        """When the first further port is given back, if nobody uses it until then."""
        return min((at + PORT_TRIAL for at in self._extra.values()), default=None)

    def _expire_ports(self, now: float) -> None:
        used = self._used_ports() if self._extra else set()
        self._extra |= {local: now for local in self._extra if local in used}
        unused = [local for local, at in self._extra.items() if now >= at + PORT_TRIAL]
        for local in unused:
            del self._extra[local]
            self._events.append(PortUnwanted(local))
        if unused:
            self._sockets_changed(now)

    def _used_ports(self) -> set[Address]:
        used = {session.active.local for session in self._owners}
        for peer in self.peers.values():
            ways = {key.local for key in peer.roaming.agent.direct}
            if not ways - self._extra.keys():
                used |= ways
        return used

    def _receive_stun(self, data: bytes, path: PathKey, now: float) -> None:
        """A check of a peer, an answer to one of ours, or of a server; from strangers: silence."""
        username = username_of(data)
        for peer in self.peers.values():
            agent = peer.roaming.agent
            if username is not None and not agent.answers_to(username.partition(":")[0]):
                continue
            if agent.receive(data, path, now):
                peer.poll(now)
                return
        if username is None and self._gatherer.receive(data, path, now):
            self._share_mapped(now)
            return
        self.counters["strangers"] += 1

    def _share_mapped(self, now: float) -> None:
        while self._gatherer.next_event() is not None:
            for peer in self.peers.values():
                self._tell_mapped(peer, now)

    def _tell_mapped(self, peer: Peer, now: float) -> None:
        nat = self._gatherer.nat()
        peer.roaming.agent.reflexive_changed(self._gatherer.mapped(), now)
        peer.roaming.agent.hard_changed(nat.hard if nat is not None else None, now)

    def _take_offers(self, now: float) -> None:
        while self.meeting is not None and (event := self.meeting.next_event()) is not None:
            if isinstance(event, Offered):
                self._by_key[event.peer].offered(event, now)

    # sessions

    def _connection(self, *, is_client: bool, path: PathKey, **more: Any) -> PeerConnection:
        return PeerConnection(
            configuration=connection_configuration(
                self._identity,
                is_client=is_client,
                keylog=self._keylog,
                quic_logger=self._quic_logger,
            ),
            path=path,
            datapath=self.datapath,
            reset_token=self._reset_token,
            max_packets_per_key=self._max_packets_per_key,
            **more,
        )

    def _reset_token(self, cid: bytes) -> bytes:
        return hmac.digest(self._reset_secret, cid, "sha256")[:16]

    def _dial(self, peer: Peer, path: PathKey, now: float) -> Session:
        expected = peer.config.public_key.raw
        connection = self._connection(
            is_client=True,
            path=path,
            accepts=lambda key: key == expected,
            initial_token=token_maker(expected),
        )
        session = Session(connection, dialled=True, now=now)
        self._track(session, peer)
        return session

    def _unknown(self, header: Header, data: bytes, path: PathKey, now: float) -> Session | None:
        if not header.is_long:
            self._reset_or_be_reset(header, data, path, now)
            return None
        if self._closing_at is not None:
            return None
        half_open = sum(1 for owner in self._owners.values() if owner is None)
        verdict = self._door.judge(
            header, len(data), path.remote, now=now, half_open=half_open, fresh=self._rng.randbytes
        )
        if verdict is None:
            self.counters["strangers"] += 1
            if len(header.token) == MAC_LENGTH:  # as a martlet's, but made with another key
                self._stranger = now, missing.knocked(path.remote)
            return None
        if not isinstance(verdict, Admitted):
            self.counters["retries"] += 1
            self._raw.append((path, verdict))
            return None
        connection = self._connection(
            is_client=False,
            path=path,
            accepts=self._by_key.__contains__,
            original_destination_connection_id=verdict.original_destination_cid,
            retry_source_connection_id=verdict.retry_source_cid,
        )
        session = Session(connection, dialled=False, now=now)
        self._track(session, None)
        self._by_cid[header.destination_cid] = session
        return session

    def _track(self, session: Session, owner: Peer | None) -> None:
        self._owners[session] = owner
        self._by_engine[session.connection.engine] = session
        for cid in session.connection.host_cids():
            self._by_cid[cid] = session

    def _forget(self, session: Session) -> None:
        self._owners.pop(session, None)
        self._by_engine.pop(session.connection.engine, None)
        session.connection.engine.stop()
        self._by_cid = {cid: s for cid, s in self._by_cid.items() if s is not session}

    def _stranger_expires(self, session: Session) -> float:
        return session.started_at + STRANGER_PATIENCE

    def _after(self, session: Session, now: float) -> None:
        """Everything that an input to a session may have caused."""
        if session.active.local in self._extra:
            self._extra[session.active.local] = now
        for event in session.events():
            owner = self._owners.get(session)
            if isinstance(event, CidIssued):
                self._by_cid[event.cid] = session
            elif isinstance(event, CidRetired):
                self._by_cid.pop(event.cid, None)
            elif owner is not None:
                owner.on_event(session, event, now)
            elif isinstance(event, Said) and isinstance(event.message, Hello):
                owner = self._by_key.get(session.connection.peer_key or b"")
                if owner is not None:
                    self._owners[session] = owner
                    owner.on_event(session, event, now)
            elif isinstance(event, Ended):
                self._refused(session, event.reason or "closed", now)
        owner = self._owners.get(session)
        if owner is not None:
            owner.poll(now)
        if session.ended:
            self._forget(session)

    def _refused(self, session: Session, reason: str, now: float) -> None:
        """Somebody who dialled us is none of our peers, or gave up."""
        raw = session.connection.refused_key
        if raw is None:
            self._events.append(PeerRefused(None, reason))
            return
        key = PublicKey(raw).openssh
        self._stranger = now, missing.unknown_key(key, session.active.remote)
        self._events.append(PeerRefused(None, "no [[peer]] has its public key", key))

    def _reset_or_be_reset(self, header: Header, data: bytes, path: PathKey, now: float) -> None:
        """A short packet for no connection of ours (RFC 9000 section 10.3)."""
        token = data[-16:]
        for session, owner in list(self._owners.items()):
            if token in session.connection.peer_reset_tokens():
                self._forget(session)
                if owner is not None:
                    owner.reset(session, now)
                return
        since, count = self._resets
        if now - since >= 1.0:
            since, count = now, 0
        if count >= RESETS_PER_SECOND:
            return
        token = self._reset_token(header.destination_cid)
        reset = stateless_reset(token, len(data), self._rng.randbytes)
        if reset is not None:
            self._resets = (since, count + 1)
            self.counters["resets_sent"] += 1
            self._raw.append((path, reset))
