"""A connection with its control stream, as events without aioquic in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from aioquic.quic.events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionTerminated,
    HandshakeCompleted,
    StreamDataReceived,
)

from tunnel.control import ApplicationError, ControlError, ControlReader, Hello, Message, encode
from tunnel.path.network import PathKey
from tunnel.quic.connection import PeerConnection
from tunnel.quic.events import MoveContested, PathFailed, PathRefused, PathValidated, PeerMoved

CONTROL_STREAM = 0  # client-initiated, bidirectional


@dataclass(frozen=True, slots=True)
class Greeted:
    """The handshake is done on this end; for the dialler it is time to say Hello."""


@dataclass(frozen=True, slots=True)
class Said:
    """A control message arrived."""

    message: Message


@dataclass(frozen=True, slots=True)
class Ended:
    """The connection is over. `application` is None unless the peer gave one of our codes."""

    application: ApplicationError | None
    reason: str
    code: int


@dataclass(frozen=True, slots=True)
class CidIssued:
    cid: bytes


@dataclass(frozen=True, slots=True)
class CidRetired:
    cid: bytes


SessionEvent: TypeAlias = (
    Greeted
    | Said
    | Ended
    | CidIssued
    | CidRetired
    | PathValidated
    | PathFailed
    | PeerMoved
    | MoveContested
    | PathRefused
)


class Session:
    """One connection to (perhaps) a peer, and the conversation on its control stream."""

    def __init__(self, connection: PeerConnection, *, dialled: bool, now: float) -> None:
        self.connection = connection
        self.dialled = dialled
        self.started_at = now
        self.established_at: float | None = None
        self.hello: Hello | None = None
        """The peer's; a session is up when it is there."""
        self.said_hello = False
        self.ended = False
        self._reader = ControlReader()

    def say(self, message: Message) -> None:
        """Queue a control message. The acceptor may only speak once it was spoken to."""
        if not self.connection.is_closed:
            self.connection.send_stream_data(CONTROL_STREAM, encode(message))

    def close(self, code: ApplicationError, reason: str) -> None:
        if self.dialled and self.connection.heard_at is None:
            self.ended = True  # nobody knows of it: a close would only make somebody listen
            return
        self.connection.close(error_code=int(code), reason_phrase=reason)

    def events(self) -> Iterator[SessionEvent]:
        """Drain what happened since the last call."""
        while (event := self.connection.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                yield from self._control(event)
            elif isinstance(event, HandshakeCompleted):
                yield Greeted()
            elif isinstance(event, ConnectionTerminated):
                self.ended = True
                yield _ended(event)
            elif isinstance(event, ConnectionIdIssued):
                yield CidIssued(event.connection_id)
            elif isinstance(event, ConnectionIdRetired):
                yield CidRetired(event.connection_id)
            elif isinstance(
                event, PathValidated | PathFailed | PeerMoved | MoveContested | PathRefused
            ):
                yield event

    def _control(self, event: StreamDataReceived) -> Iterator[SessionEvent]:
        if event.stream_id != CONTROL_STREAM:
            return
        try:
            for message in self._reader.feed(event.data):
                yield Said(message)
        except ControlError as error:
            self.close(ApplicationError.MALFORMED_CONTROL, error.problem)

    def __repr__(self) -> str:
        return f"Session({'dialled' if self.dialled else 'accepted'}, {self.active})"

    @property
    def active(self) -> PathKey:
        return self.connection.active.addr


def _ended(event: ConnectionTerminated) -> Ended:
    application: ApplicationError | None = None
    if event.frame_type is None:  # only the application's close has none (RFC 9000 section 19.19)
        try:
            application = ApplicationError(event.error_code)
        except ValueError:
            application = None
    return Ended(application, event.reason_phrase, event.error_code)
