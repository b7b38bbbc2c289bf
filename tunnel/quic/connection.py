"""`PeerConnection`: one QUIC connection in which either end may move, knowing it or not.

Addresses are opaque to aioquic: it is always told one constant address, so that neither its
server (which follows any newer packet at once) nor its client (which drops packets from unknown
addresses) decides anything about paths. Everything of RFC 9000 sections 8.2 and 9 is done here,
alike for both roles:

- *We move* (`move`): the next packet leaves on the new path with a connection ID used on no other
  path and a PATH_CHALLENGE in it. No round trip is waited for.
- *The peer moves*: the newest packet that means to move came from another path. A known address
  is followed at once. An unknown one is an *apparent* move: data goes there within three times
  what came from it, copies of the same data go on to the old address, both are challenged, and
  the move settles after validation and one more round trip in which the old address stayed
  silent. A packet of that time or later that still comes from the old address, even a duplicate,
  proves that somebody merely forwards our peer's packets, and takes the move back (section 9.3.3).
- *Somebody asks* (PATH_CHALLENGE): answered on the path the question came in on.

A packet whose only non-probing frames are copies moves nobody (docs/protocol.md).
"""

import errno
from typing import Any, cast

from aioquic import tls
from aioquic.buffer import Buffer
from aioquic.quic.connection import (
    END_STATES,
    NetworkAddress,
    QuicConnectionError,
    QuicReceiveContext,
)
from aioquic.quic.packet import (
    QuicFrameType,
)
from aioquic.quic.packet_builder import QuicDeliveryState

from tunnel.datapath.congestion import Sample
from tunnel.datapath.engine import Path
from tunnel.datapath.native.engine import Opened
from tunnel.path.network import PathKey
from tunnel.path.path import PathState
from tunnel.quic.base import MAX_VALIDATION_TRIES, STAND_IN
from tunnel.quic.events import MoveContested, PathFailed, PathRefused, PathValidated, PeerMoved
from tunnel.quic.frames import moves_nobody, one_rtt_packet
from tunnel.quic.paths import ApparentMove, NetworkPath, Received
from tunnel.quic.sender import SendingConnection

TURN = 0.0005
"""Seconds of the path's rate that a flow may send before the next one's turn."""
VALIDATION_PTOS = 3  # RFC 9000 section 8.2.4
CROSSING = 0.05
"""Seconds, beyond two round trips, in which a move of the peer to a path we know is taken for one
that crossed ours, and a change of its connection ID for the answer to ours: following, or
answering an answer, would never end."""
APPARENT_MEMORY = 30.0
"""Seconds after a settled apparent move in which signs of life of the old address undo it."""
CONTEST_BACKOFF = 0.25
"""Seconds in which an address whose move was taken back is not followed, doubled each time. Short
at first: a host that hurries from one network to another and back looks the same."""
CONTEST_BACKOFF_LIMIT = 60.0
MAX_TWINS = 8  # addresses beside the first that a handshake is answered to


class PeerConnection(SendingConnection):
    """A QUIC connection between two pinned keys in which either end may move."""

    # what the owner calls

    def move(self, key: PathKey, now: float, *, replay: bool = True) -> None:
        """Send on this path from the next packet on; the move is ours and we know it.

        `replay`: what is in flight on the path before is sent again, for that path is dead.
        """
        self._now = now
        path = self._path(key)
        if path is self.active:
            return
        self._forget_apparent()
        if path.state is PathState.GONE:
            path.advance(PathState.CANDIDATE)
        self._settle_in(now)
        self._switch(path, now, challenge=True, replay=replay)

    def vouch(self, key: PathKey, rtt: float, now: float, *, trusted: bool) -> None:
        """The path answers checks outside QUIC (RFC 8445), `rtt` seconds later.

        So data may go there without a limit, and copies at any time. `trusted`: the peer itself, or
        our configuration, named the address; then a move of the peer to there is followed at once.
        """
        self._now = now
        path = self._path(key)
        if path.state is PathState.GONE:
            path.advance(PathState.CANDIDATE)
        path.invited = True
        if trusted:
            path.address_validated = True
        if path is not self.active:
            path.metrics.add_rtt(rtt, 0.0)

    def second(self, key: PathKey | None, now: float, *, everything: bool = False) -> None:
        """The path that copies go to, beside the active one: of sparse flows, or of `everything`.

        They move nobody. None: no copies.
        """
        self._now = now
        path = None if key is None else self._path(key)
        before, self._second = self._second, path
        self._second_gets_all = everything
        if path is not None:
            path.retire_at = None
        if before is not None and before is not path and before is not self.active:
            self._leave_path(before)

    def race(self, now: float) -> None:
        """The active path may be dead: what is in flight there goes to the second one as well."""
        self._now = now
        if self._second is None or not self._take_cid(self._second):
            return
        self._second_gets_all = True
        self._engine.replay(self.active.metrics, self._second.metrics, now=now)

    def probe(self, key: PathKey, now: float) -> None:
        """Challenge a path without moving; `PathValidated` or `PathFailed` will tell."""
        self._now = now
        path = self._path(key)
        path.address_validated = path.address_validated or self._knows_address(path)
        path.invited = True
        self._challenge(path)

    def leave(self, key: PathKey) -> None:
        """The local address of this path is gone."""
        path = self._paths.get(key)
        if path is not None and path.state is not PathState.GONE:
            path.advance(PathState.GONE)
            path.challenge_due = False
            if path is self._second:
                self._second = None

    def path_event(self, now: float) -> None:
        """The network changed: forget the back-off and find out at once where we stand."""
        self._now = now
        if self._engine.pto_count > 1:
            self.active.metrics.forgive()
        self._engine.pto_count = 0
        self.active.pmtu.revalidate(now)
        if self.is_open:
            if not self.active.is_validated:
                self._challenge(self.active)
            self._probe_pending = True

    # aioquic's verbs

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        key = cast(PathKey, addr)
        self._now = now
        path = self._paths.get(key)
        if path is None:
            path = self._new_path(key)
            path.address_validated = self._knows_address(path)
        if self._engine.running:
            self._receive_short(path, data, now)
        else:
            self._receive_handshake(path, data, now)
        if path.addr not in self._paths or self._paths[path.addr] is not path:
            path.metrics.remove()  # nothing authentic came from there

    def _receive_handshake(self, path: NetworkPath, data: bytes, now: float) -> None:
        path.bytes_received += len(data)
        self._rx = Received(path)
        super().receive_datagram(data, STAND_IN, now)
        if self._state in END_STATES or self._established:
            return
        if self._rx.processed:
            self._newest_flight, self._twins = data, {}
            self._adopt_handshake_path(path, now)
        elif data == self._newest_flight and path is not self.active:
            allowed = self._twins.get(path.addr, 0)
            if allowed or len(self._twins) < MAX_TWINS:
                self._twins[path.addr] = allowed + 3 * len(data)  # RFC 9000 section 8.1

    def _receive_short(self, path: NetworkPath, data: bytes, now: float) -> None:
        """The 1-RTT packet of a datagram; what stands before it is of a handshake long done."""
        packet = one_rtt_packet(data, self._configuration.connection_id_length)
        if packet is None:
            return
        self._engine.receive(path.metrics, packet, now)
        self.collect(now)

    def get_timer(self) -> float | None:
        if not self._established or self._state in END_STATES or not self._network_paths:
            return super().get_timer()
        times = [super().get_timer(), self._settle_at()]
        times += [at for at, _ in self._retiring]
        if not self._datapath.driven:
            times.append(self._engine.get_timer())
        if self._may_probe_mtu(self._active):
            times.append(self._active.pmtu.next_at())
        for path in self._paths.values():
            times.append(path.retire_at)
            if path.challenge_due and path.local_challenge_sent:
                times.append(self._challenge_retry_at(path))
        return min((at for at in times if at is not None), default=None)

    def handle_timer(self, now: float) -> None:
        self._now = now
        if self._established and self._close_at is not None and self._state not in END_STATES:
            # The engine's packets count for the idle timeout, too.
            self._close_at = max(self._close_at, self._engine.heard_at + self._idle_timeout())
        asked = 0 if self._established else self._loss._pto_count
        super().handle_timer(now)
        if self._state in END_STATES:
            return
        if not self._established:
            if self._loss._pto_count > asked and self._keys.send.is_valid():
                # The acceptor may have dropped the handshake's keys already, and wait at an
                # address that our NAT has changed since: a 1-RTT probe tells it where we are.
                self.send_ping(0)
            return
        if not self._datapath.driven:
            self._engine.handle_timer(now)
        self.collect(now)
        self._judge_apparent(now)
        due = [cid for at, cid in self._retiring if at <= now]
        if due:
            self._retiring = [entry for entry in self._retiring if entry[0] > now]
            for cid in due:
                self._retire_peer_cid(cid)
        for path in list(self._paths.values()):
            if (
                path.challenge_due
                and path.local_challenge_sent
                and now >= self._challenge_retry_at(path)
            ):
                self._challenge_unanswered(path, now)
            if path.retire_at is not None and now >= path.retire_at:
                self._retire_path(path)

    # what the engine reports

    def collect(self, now: float) -> bool:
        """Look at what the engine reports; True when there may be control packets to send."""
        self._now = now
        busy = False
        while (report := self._engine.take(now)) is not None:
            for sample in report.samples or ():
                busy = self._on_sample(sample, now) or busy
            if report.routine:
                continue
            busy = True
            if self._recovery is not None:
                self._recovery.settled(report.acked or (), QuicDeliveryState.ACKED)
                self._recovery.settled(report.lost or (), QuicDeliveryState.LOST)
            if report.keys:
                self._keys.derive_next()
            if report.pto:
                self._on_probe_timeout()
            for opened in report.opened or ():
                if self._state not in END_STATES:
                    self._on_opened(opened, now)
            if report.error is not None:
                code, frame, reason = report.error
                self.close(error_code=code, frame_type=frame, reason_phrase=reason)
            for metrics, error in report.refused or ():
                self._on_refused(metrics.owner, error, now)
        return busy

    def _on_sample(
        self,
        sample: tuple[Path, int, int, int, float, float, bool, int, int, bool],
        now: float,
    ) -> bool:
        metrics, acked, lost, in_flight, rtt, rate, limited, delivered, before, spurious = sample
        path: NetworkPath = metrics.owner
        controller = path.controller
        if spurious:
            controller.on_spurious_loss()
        controller.on_sample(
            Sample(now, acked, lost, in_flight, rtt, rate, limited, delivered, before)
        )
        metrics.set_rate(int(controller.window), controller.pacing_rate)
        if path is not self._active:
            return False
        self._set_patience()
        if self._lane is not None:
            self._lane.set_quantum(int(controller.pacing_rate * TURN))
        return bool(metrics.large_lost) and self._judge_size(path, now)

    def _on_refused(self, path: NetworkPath, error: int, now: float) -> None:
        if error == errno.EMSGSIZE:
            self.shrink(path.addr, now)
        else:
            self._events.append(PathRefused(path.addr, error))

    def _on_probe_timeout(self) -> None:
        assert self._recovery is not None
        self._recovery.timed_out()
        if not self.active.is_validated:
            self._challenge(self.active)  # every probe of an unproven path asks again

    def _on_opened(self, opened: Opened, now: float) -> None:
        """A packet that holds frames for aioquic, or perhaps a move."""
        known = opened.path is not None and not opened.path.removed
        # Its path went meanwhile, but it was acknowledged: what it says must not be lost.
        path = cast(NetworkPath, opened.path.owner) if known and opened.path else self.active
        if opened.duplicate:
            if known:
                self._duplicate(path, opened.number, now)
            return
        self._rx = Received(path, opened.number, opened.cid, processed=True, moving=opened.moving)
        if opened.frames:
            self._payload(opened, now)
            if self._state in END_STATES or self._close_pending:
                return
        if known:
            self._packet_opened(path, opened.number, now)

    def _payload(self, opened: Opened, now: float) -> None:
        frames: list[dict[str, Any]] | None = None
        if self._quic_logger is not None:
            frames = []
            self._quic_logger.log_event(
                category="transport",
                event="packet_received",
                data={
                    "frames": frames,
                    "header": {
                        "packet_number": opened.number,
                        "packet_type": "1RTT",
                        "dcid": opened.cid.hex(),
                        "scid": "",
                    },
                    "raw": {"length": len(opened.plain)},
                },
            )
        context = QuicReceiveContext(
            epoch=tls.Epoch.ONE_RTT,
            host_cid=opened.cid,
            network_path=self._network_paths[0],
            quic_logger_frames=frames,
            time=now,
            version=self._version,
        )
        try:
            self._payload_received(context, opened.plain)
        except QuicConnectionError as error:
            self.close(
                error_code=error.error_code,
                frame_type=error.frame_type,
                reason_phrase=error.reason_phrase,
            )

    # receiving

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self._rx.processed = True
        if not self._handed_over:
            self._first_heard = self._now
        ack_eliciting, probing = super()._payload_received(
            context, plain, crypto_frame_required=crypto_frame_required
        )
        if context.epoch is tls.Epoch.ONE_RTT and not probing and not moves_nobody(plain):
            self._rx.moving = True
        # aioquic is told that every packet only probes, so that it leaves paths alone.
        return ack_eliciting, probing if context.epoch is not tls.Epoch.ONE_RTT else True

    def _packet_opened(self, path: NetworkPath, number: int, now: float) -> None:
        if path.addr not in self._paths:
            self._register(path)
        if path.host_cid is None and not self._rx.moving:
            path.host_cid = self._rx.host_cid
        if not self._rx.moving or number <= self._engine.largest_moving:
            return
        self._engine.largest_moving = number
        host_cid = self._rx.host_cid
        before, self._peer_path = self._peer_path, path
        # Only a change is a move: after a move of ours the peer's packets still come in on the
        # path we left, and both ends may well send on different paths for good.
        if path is not before and path is not self.active:
            self._follow(path, number, now)
        elif path.peer_cid is not None and path.host_cid is not None and host_cid != path.host_cid:
            # The peer changed its connection ID on a path we share: answer in kind, unless this
            # is the peer's answer to a change of ours.
            rtt = path.metrics.rtt_smoothed or path.metrics.initial_rtt
            if now > path.cid_changed_at + 2 * rtt + CROSSING:
                self._renew_cid(path)
                if path is self.active:
                    # It moved behind the same address: what is in flight may go where it was.
                    self._engine.replay(path.metrics, now=now)
        path.host_cid = host_cid

    def _follow(self, path: NetworkPath, number: int, now: float) -> None:
        apparent = self._apparent
        if apparent is not None and path is apparent.old and not apparent.settled:
            self._contest(apparent, now)
            return
        if now < path.contested_until:
            self._peer_path = self.active  # looked at again with the next packet from there
            return
        trusted = path.address_validated and not path.contests
        if trusted and now < self._settled_in_at:
            return  # two moves crossed: each end stays where it went, and suspicion judges
        old = self.active
        # A connection ID that already served another path: the peer does not know it moved.
        rebinding = any(
            p.host_cid == self._rx.host_cid for p in self._paths.values() if p is not path
        )
        self._events.append(PeerMoved(old.addr, path.addr, rebinding, now))
        if trusted:
            self._forget_apparent()
            if self._is_client or path.addr.remote == old.addr.remote:
                self._settle_in(now)  # of two ends that follow each other, one has to stay
            self._switch(path, now, challenge=path.state is not PathState.VALIDATED)
            # Checks can be forwarded like any packet, so that a forwarder's address may be known:
            # the old one is listened to here, too.
            self._apparent = ApparentMove(old, path, number, now, validated_at=now, settled=True)
        else:
            same_host = path.addr.remote.host == old.addr.remote.host
            if same_host and path.addr.local == old.addr.local:
                path.inherit(old)  # RFC 9000 section 9.4
            proven = apparent.old if apparent is not None and not apparent.settled else old
            self._switch(path, now, challenge=True)
            proven.retire_at = None
            patience = max(
                proven.metrics.probe_timeout(self.max_ack_delay),
                2 * self._configuration.initial_rtt,
            )
            self._apparent = ApparentMove(proven, path, number, now + VALIDATION_PTOS * patience)
            if proven.state is not PathState.GONE and not proven.challenge_due:
                # Once, however many addresses follow: every answer is a packet that somebody may
                # send from yet another one.
                self._challenge(proven)
        # Tell the peer at once that its move was seen: it waits for this acknowledgement.
        self._engine.acknowledge_at(now)

    def _forget_apparent(self) -> None:
        apparent, self._apparent = self._apparent, None
        if apparent is not None and not apparent.settled:
            self._leave_path(apparent.old)

    def _duplicate(self, path: NetworkPath, number: int, now: float) -> None:
        apparent = self._apparent
        if (
            apparent is not None
            and path is apparent.old
            and number >= apparent.first_number
            and now < (apparent.validated_at or now) + APPARENT_MEMORY
        ):
            self._contest(apparent, now)
        elif (
            apparent is not None
            and not apparent.settled
            and path is not apparent.new
            and path.state is PathState.CANDIDATE
            and number >= apparent.first_number
        ):
            # The very packets that moved us also come from a third address: one of the two only
            # forwards. Whoever answers from there, when the other does not, is the peer.
            if path.addr not in self._paths:
                self._register(path)
            apparent.rival = path
            self._challenge(path)

    def _contest(self, apparent: ApparentMove, now: float) -> None:
        """The old address still speaks: whoever is at the new one only forwards."""
        refused = apparent.new
        contests = refused.contests + 1
        for path in self._paths.values():
            if path.addr.remote == refused.addr.remote:
                # Whatever it proves from now on, this address is never followed unchecked.
                path.contests = contests
                path.contested_until = now + min(
                    CONTEST_BACKOFF * (1 << min(contests - 1, 8)), CONTEST_BACKOFF_LIMIT
                )
        refused.challenge_due = False
        self._peer_path = apparent.old
        self._counters["moves_contested"] += 1
        self._apparent = None
        self._switch(apparent.old, now, challenge=apparent.old.state is not PathState.VALIDATED)
        self._events.append(MoveContested(refused.addr, apparent.old.addr))

    # frames

    def _handle_datagram_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        start = buf.tell()
        length = (
            buf.pull_uint_var()
            if frame_type == QuicFrameType.DATAGRAM_WITH_LENGTH
            else buf.capacity - start
        )
        payload = buf.pull_bytes(length)
        if self._quic_logger is not None and context.quic_logger_frames is not None:
            context.quic_logger_frames.append(
                self._quic_logger.encode_datagram_frame(length=length)
            )
        if self._handed_over and self._rx.number is not None:
            self._engine.datagram(self._rx.number, payload, context.time)

    def _handle_ack_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        if not self._handed_over:
            super()._handle_ack_frame(context, frame_type, buf)
            return
        start = buf.tell()
        frame = buf.data_slice(start, buf.capacity)
        ecn = frame_type == QuicFrameType.ACK_ECN
        used = self._engine.ack_frame(self._rx.path.metrics, frame, ecn, context.time)
        buf.seek(start + max(used, 0))  # a malformed one is reported as an error

    def _handle_path_challenge_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        path = self._rx.path
        context.network_path = cast(Any, path)
        super()._handle_path_challenge_frame(context, frame_type, buf)
        if path is self.active:
            # A non-probing answer: it tells our true address to a peer that somebody tries to
            # lure away (RFC 9000 section 9.3.3).
            self._probe_pending = True
        elif not path.address_validated and path.state is PathState.CANDIDATE:
            self._challenge(path)

    def _handle_path_response_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        data = buf.pull_bytes(8)
        if self._quic_logger is not None and context.quic_logger_frames is not None:
            context.quic_logger_frames.append(
                self._quic_logger.encode_path_response_frame(data=data)
            )
        path = next((p for p in self._paths.values() if data in p.local_challenges), None)
        if path is None or path.state is PathState.GONE:
            return
        now = context.time
        rtt = now - path.challenge_times[path.local_challenges.index(data)]
        path.local_challenges.clear()
        path.challenge_times.clear()
        path.challenge_count = 0
        if not path.metrics.has_rtt:
            path.metrics.add_rtt(rtt, 0.0)
        path.advance(PathState.VALIDATED)
        path.validation_deadline = None
        for other in self._paths.values():
            if other.addr.remote == path.addr.remote:
                other.address_validated = True
        # A challenge that 3x kept short proved the address, not that 1,200 bytes pass
        # (RFC 9000 section 8.2.1): ask again, padded.
        path.challenge_due = not path.challenge_padded
        path.local_challenge_sent = False
        apparent = self._apparent
        if apparent is not None and not apparent.settled:
            if apparent.new is path:
                apparent.validated_at = apparent.validated_at or now
            elif apparent.rival is path and apparent.validated_at is None:
                self._forget_apparent()
                self._switch(path, now, challenge=False)
        self._events.append(PathValidated(path.addr, rtt))

    # apparent moves

    def _settle_in(self, now: float) -> None:
        rtt = self.active.metrics.rtt_smoothed or self._configuration.initial_rtt
        self._settled_in_at = now + 2 * rtt + CROSSING

    def _challenge_unanswered(self, path: NetworkPath, now: float) -> None:
        if path.challenge_count < MAX_VALIDATION_TRIES:
            path.local_challenge_sent = False  # ask again with the next packet
            if path is self.active:
                self._probe_pending = True
            return
        path.challenge_due = False
        if path.state is not PathState.PROBING:
            return  # only the padded repetition failed, or the path is gone
        path.advance(PathState.FAILED)
        if path is not self.active:
            path.retire_at = now
        self._events.append(PathFailed(path.addr))

    def _settle_at(self) -> float | None:
        """When the apparent move is to be judged; None when there is nothing to judge."""
        apparent = self._apparent
        if apparent is None or apparent.settled:
            return None
        if apparent.validated_at is None:
            return apparent.deadline
        rtt = apparent.old.metrics.rtt_smoothed or apparent.new.metrics.rtt_smoothed
        return apparent.validated_at + max(rtt, 0.01)

    def _judge_apparent(self, now: float) -> None:
        apparent, due = self._apparent, self._settle_at()
        if apparent is None or due is None or now < due:
            return
        if apparent.validated_at is not None:
            apparent.settled = True
            self._leave_path(apparent.old)
            apparent.old.challenge_due = False
            if apparent.old.state is PathState.PROBING:
                apparent.old.advance(PathState.FAILED)
        else:  # nobody answered there: back to the last proven address (RFC 9000 section 9.3.2)
            self._apparent = None
            self._switch(apparent.old, now, challenge=True)
