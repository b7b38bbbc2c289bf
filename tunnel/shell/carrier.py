"""How messages travel to a TURN server and back: as datagrams, or in a stream of TCP or TLS.

Both take what the engine sends, a run of datagrams of one size at a time, and give back all that
came in one wake-up, so that Python's share is a few microseconds for each datagram and not a turn
of the loop. What does not fit is dropped: a tunnel in a stream must not queue for seconds, since
everything behind the queue would be late, and the connections inside see no loss to slow down for.

A stream holds three queues. What is in flight is TCP's own. What the kernel has taken and not sent
is kept small by TCP_NOTSENT_LOWAT. What is left waits here, 100 ms or 256 kB at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

from tunnel.ice.turn_message import CHANNEL_HEADER, FramingError, cut
from tunnel.obstacle import Reason, certificate_reason
from tunnel.path.network import Address
from tunnel.shell import clock
from tunnel.shell.udp import SOCKET_MARK, UDP_SEGMENT, bind_device, open_udp, segment_size

READS = 64
"""Datagrams in one wake-up: others have their turn after some 100 us."""
SLOT = 2048
"""Bytes between datagrams of a batch; more than a link of 1500 or a server ever gives one."""
MAX_MESSAGE = 65507
MAX_SEGMENTS = 64
"""Of one message with UDP_SEGMENT: as in the engine (native/io/io.c)."""
QUEUE_BYTES = 256 << 10
QUEUE_SECONDS = 0.1
CONTROL_BYTES = 64 << 10
"""What messages that are no bulk may add to a full queue."""
UNSENT_BYTES = 64 << 10
"""In the kernel: 100 ms at 5 Mbit/s, and at 1 Gbit/s a wake-up every 500 us."""
CONNECT_PATIENCE = 5.0
"""Seconds until a stream that is not established is given up: two lost SYNs."""
CLOSED = "the server has closed the connection"
STREAM_BUFFER = 256 << 10
"""Read at a time; half of it holds any message."""

_TCP_NOTSENT_LOWAT = 25  # <linux/tcp.h>
_CONTROL = socket.CMSG_SPACE(struct.calcsize("=i"))

Deliver: TypeAlias = Callable[[list[memoryview]], None]
"""All messages of a wake-up, without padding; they are gone when it returns."""


class Carrier(Protocol):
    """A way to a server. `ready` when messages can go; `deliver` and `lost` are its callbacks."""

    @property
    def dropped(self) -> int: ...
    def send(self, message: bytes) -> int:
        """One message: 0, or the errno."""

    def send_run(self, channel: int, data: memoryview, segment: int) -> None:
        """Datagrams of `segment` bytes, the last of which may be shorter, in a channel."""

    def close(self) -> None: ...


class UdpCarrier:
    """Messages as datagrams. Raises OSError."""

    def __init__(
        self,
        ip: str,
        interface: str,
        server: Address,
        *,
        deliver: Deliver,
        refused: Callable[[], None] | None = None,
    ) -> None:
        """`refused`: nothing listens there, by ICMP, which ends nothing by itself."""
        self.dropped = 0
        self._deliver = deliver
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._segments = True
        self._socket = open_udp(ip, 0, interface)
        try:
            self._socket.connect((server.host, server.port))
        except OSError:
            self._socket.close()
            raise
        self._buffer = memoryview(bytearray(READS * SLOT + (1 << 16)))
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def send(self, message: bytes) -> int:
        try:
            self._socket.send(message)
        except OSError as error:
            return self._failed(error)
        return 0

    def send_run(self, channel: int, data: memoryview, segment: int) -> None:
        header = CHANNEL_HEADER.pack(channel, segment)
        most = min(MAX_SEGMENTS, MAX_MESSAGE // (segment + len(header))) * segment
        for start in range(0, len(data), most):
            part = data[start : start + most]
            if len(part) <= segment or not self._segments:
                self._send_singles(channel, part, segment)
                continue
            parts: list[bytes | memoryview] = []
            for at in range(0, len(part), segment):
                parts += (header, part[at : at + segment])
            last = len(parts[-1])
            if last != segment:
                parts[-2] = CHANNEL_HEADER.pack(channel, last)
            size = struct.pack("=H", segment + len(header))
            try:
                self._socket.sendmsg(parts, [(socket.SOL_UDP, UDP_SEGMENT, size)])
            except OSError as error:
                if error.errno in (errno.EIO, errno.EINVAL, errno.EMSGSIZE):
                    # The device cannot, or a segment does not fit: one by one, the others will.
                    self._segments = error.errno != errno.EIO
                    self._send_singles(channel, part, segment)
                else:
                    self._failed(error)

    def _send_singles(self, channel: int, data: memoryview, segment: int) -> None:
        for at in range(0, len(data), segment):
            part = data[at : at + segment]
            try:
                self._socket.sendmsg([CHANNEL_HEADER.pack(channel, len(part)), part])
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> int:
        """ICMP's answer to an earlier datagram is reported once, and ends nothing."""
        code = error.errno or errno.EIO
        if code in (errno.EAGAIN, errno.ENOBUFS):
            self.dropped += 1
            return 0
        if code != errno.ECONNREFUSED:
            return code
        if self._refused is not None:
            self._refused()
        return 0

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _readable(self) -> None:
        buffer, found, position = self._buffer, [], 0
        for _ in range(READS):
            try:
                length, control, _, _ = self._socket.recvmsg_into([buffer[position:]], _CONTROL)
            except BlockingIOError:
                break
            except OSError as error:  # ICMP; the answers that do not come say the same
                self._failed(error)
                continue
            segment = segment_size(control) or length
            for at in range(position, position + length, max(segment, 1)):
                found.append(buffer[at : min(at + segment, position + length)])
            position += length
            if position > READS * SLOT:  # put together by GRO: no room for another
                break
        if found:
            self._deliver(found)


class StreamCarrier:
    """Messages in TCP, or in TLS on it. Raises OSError.

    `host` is whom a certificate must be of; `context` is None without TLS.
    """

    def __init__(
        self,
        ip: str,
        interface: str,
        server: Address,
        *,
        context: ssl.SSLContext | None,
        host: str,
        ready: Callable[[], None],
        deliver: Deliver,
        lost: Callable[[Reason, str], None],
    ) -> None:
        self.dropped = 0
        self._ready, self._deliver, self._lost = ready, deliver, lost
        self._loop = asyncio.get_running_loop()
        self._context, self._host = context, host
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._queued = 0
        self._established = False
        self._closed = False
        self._writing = False
        self._buffer = memoryview(bytearray(STREAM_BUFFER))
        self._filled = 0
        self._socket = _open_tcp(ip, interface)
        try:
            code = self._socket.connect_ex((server.host, server.port))
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except OSError:
            self._socket.close()
            raise
        self._fd = self._socket.fileno()
        self._patience = self._loop.call_later(
            CONNECT_PATIENCE, self._fail, "timeout", "no connection in time"
        )
        self._loop.add_writer(self._fd, self._connected)

    # ---- sending ----

    def send(self, message: bytes) -> int:
        self._push(message + b"\0" * (-len(message) % 4), QUEUE_BYTES + CONTROL_BYTES)
        return 0

    def send_run(self, channel: int, data: memoryview, segment: int) -> None:
        if self._queue and self._queue[0][0] < clock.now() - QUEUE_SECONDS:
            self.dropped += -(-len(data) // segment)
            return
        parts: list[bytes | memoryview] = []
        header, padding = CHANNEL_HEADER.pack(channel, segment), b"\0" * (-segment % 4)
        for at in range(0, len(data), segment):
            part = data[at : at + segment]
            if len(part) == segment:
                parts += (header, part, padding)
            else:
                parts += (CHANNEL_HEADER.pack(channel, len(part)), part, b"\0" * (-len(part) % 4))
        self._push(b"".join(parts), QUEUE_BYTES)

    def _push(self, data: bytes, limit: int) -> None:
        if self._closed:
            return
        if self._queued + len(data) > limit:
            self.dropped += 1
            return
        self._queue.append((clock.now(), memoryview(data)))
        self._queued += len(data)
        if self._established and not self._writing:
            self._write()

    def _write(self) -> None:
        """Give the kernel what it takes. After SSLWantWrite the very same bytes must come again,
        which is why the head of the queue is kept as it is."""
        try:
            while self._queue:
                at, data = self._queue[0]
                sent = self._socket.send(data)
                self._queued -= sent
                if sent == len(data):
                    self._queue.popleft()
                else:
                    self._queue[0] = (at, data[sent:])
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            self._fail(*explain(error))
            return
        if bool(self._queue) != self._writing:
            self._writing = bool(self._queue)
            if self._writing:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)

    # ---- receiving ----

    def _readable(self) -> None:
        problem: tuple[Reason, str] | None = None
        while self._filled < STREAM_BUFFER // 2:
            try:
                length = self._socket.recv_into(self._buffer[self._filled :])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                problem = explain(error)
                break
            if not length:
                problem = ("other", CLOSED)
                break
            self._filled += length
        try:
            messages, used = cut(self._buffer[: self._filled])
        except FramingError as error:
            self._fail("protocol", f"this is no TURN server: {error}")
            return
        try:
            if messages:
                self._deliver(messages)
        finally:  # or what had them fail would be delivered again and again
            rest = self._filled - used
            if used and rest:
                self._buffer[:rest] = bytes(self._buffer[used : self._filled])
            self._filled = rest
        if problem is not None:
            self._fail(*problem)

    # ---- beginning and end ----

    def _connected(self) -> None:
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(*explain(OSError(code, os.strerror(code))))
            return
        self._loop.remove_writer(self._fd)
        if self._context is None:
            self._establish()
            return
        try:
            # The descriptor goes from one object to the other, and stays the same.
            self._socket = self._context.wrap_socket(
                self._socket, server_hostname=self._host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:
            self._fail(*explain(error))
            return
        self._loop.add_reader(self._fd, self._shake)
        self._shake()

    def _shake(self) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._loop.remove_writer(self._fd)
            return
        except ssl.SSLWantWriteError:
            self._loop.add_writer(self._fd, self._shake)
            return
        except (OSError, ValueError) as error:
            self._fail(*explain(error))
            return
        self._loop.remove_writer(self._fd)
        self._establish()

    def _establish(self) -> None:
        self._patience.cancel()
        self._established = True
        self._loop.add_reader(self._fd, self._readable)
        self._ready()
        if not self._closed:
            self._write()

    def _fail(self, reason: Reason, text: str) -> None:
        if not self._closed:
            self.close()
            self._lost(reason, text)

    def close(self) -> None:
        if self._closed:
            return
        if self._established and self._queue and not self._writing:
            self._write()
        self._closed = True
        self._patience.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()


def _open_tcp(ip: str, interface: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        with contextlib.suppress(OSError):  # as for UDP sockets
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
        bind_device(made, interface)
        made.bind((ip, 0))
    except OSError:
        made.close()
        raise
    return made


def explain(error: Exception) -> tuple[Reason, str]:
    """What went wrong on the way to a server, in the user's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = certificate_reason(error.verify_code)
        return reason, f"the server's certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        why = (error.reason or "it broke off").lower().replace("_", " ")
        return "protocol", f"no TLS with the server: {why}"
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ECONNREFUSED:
        return "refused", "the server refuses the connection: nothing listens on that port"
    if code == errno.ETIMEDOUT:
        return "timeout", "no connection in time"
    if code in (errno.ECONNRESET, errno.EPIPE):
        return "other", CLOSED
    return "other", getattr(error, "strerror", None) or str(error)
