"""UDP sockets: one for each usable local address, all on one port; more of them when asked for.

A path is (local address, remote address), so every datagram says which socket it came in on, and
which one it has to leave by. What a socket refuses to send is a fact about that path and is
returned, never raised.

The native engine reads from the sockets, and sends all data: runs of datagrams, as one message each
(UDP_GRO, UDP_SEGMENT). From here leave only the few control datagrams.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from tunnel.errors import LocalError
from tunnel.path.network import Address, LocalAddress, LocalNetwork, PathKey
from tunnel.shell.log import Log

SOCKET_BUFFER = 4 << 20
"""Bytes asked for in each direction: 50 ms at 600 Mbit/s. The kernel's default of 208 KiB lost tens
of thousands of packets in 8 s of bulk traffic in every tunnel measured."""

SOCKET_MARK = 0x6D61
"""SO_MARK of all our sockets ("ma"), so that policy routing can keep them out of the tunnel."""

EPHEMERAL_ATTEMPTS = 8
"""How many free ports to try for one that is free on every local address."""

# <linux/udp.h>, <linux/in.h>, <linux/in6.h>: not all of them are in Python's socket module.
UDP_SEGMENT, UDP_GRO = 103, 104
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32

_NAME_SIZE = 16  # IFNAMSIZ
_INT = struct.Struct("=i")
_FAMILY = struct.Struct("=H")
_SOCKADDR = struct.Struct("!H4s8x")  # <linux/in.h>: port, address
_SOCKADDR6 = struct.Struct("!HI16sI")  # <linux/in6.h>: port, flow, address, scope


def pack(address: Address) -> bytes:
    """A sockaddr_in or sockaddr_in6, as the kernel takes it."""
    if address.is_ipv6:
        host = socket.inet_pton(socket.AF_INET6, address.host)
        return _FAMILY.pack(socket.AF_INET6) + _SOCKADDR6.pack(address.port, 0, host, 0)
    host = socket.inet_pton(socket.AF_INET, address.host)
    return _FAMILY.pack(socket.AF_INET) + _SOCKADDR.pack(address.port, host)


def unpack(sockaddr: bytes) -> Address:
    """The address in a sockaddr_in or sockaddr_in6, which may have bytes behind it."""
    (family,) = _FAMILY.unpack_from(sockaddr)
    if family == socket.AF_INET6:
        port, _, host, _ = _SOCKADDR6.unpack_from(sockaddr, _FAMILY.size)
        return Address(socket.inet_ntop(socket.AF_INET6, host), port)
    port, host = _SOCKADDR.unpack_from(sockaddr, _FAMILY.size)
    return Address(socket.inet_ntop(socket.AF_INET, host), port)


def open_udp(ip: str, port: int, interface: str) -> socket.socket:
    """A UDP socket as all of ours are: non-blocking, with large buffers, marked, DF set, on this
    device if it may be. Raises OSError."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    udp = socket.socket(family, kind)
    try:
        _configure(udp)
        if interface:
            bind_device(udp, interface)
        udp.bind((ip, port))
    except OSError:
        udp.close()
        raise
    return udp


def bind_device(made: socket.socket, interface: str) -> None:
    """Send and receive by `interface` only; by any if "". A kernel that refuses is obeyed."""
    # EPERM: only the privileged may; ENODEV: it is gone, and netlink is about to say so.
    with contextlib.suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")


def bound_device(made: socket.socket) -> str:
    """The device that a socket is bound to; "" for none, or one that is gone."""
    with contextlib.suppress(OSError):
        name = made.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _NAME_SIZE)
        return name.rstrip(b"\0").decode()
    return ""


def segment_size(control: Sequence[tuple[int, int, bytes]]) -> int:
    """Bytes of each datagram in a message that GRO put together; 0: it is one datagram."""
    for level, kind, data in control:
        if level == socket.SOL_UDP and kind == UDP_GRO and len(data) >= _INT.size:
            return max(0, int(_INT.unpack_from(data)[0]))
    return 0


class UdpSocket:
    """A non-blocking UDP socket on one local address.

    `interface` is the device it is bound to, or "" when any will do. Raises OSError.
    """

    def __init__(self, ip: str, port: int, interface: str) -> None:
        self._socket = open_udp(ip, port, interface)
        self.interface = bound_device(self._socket)
        self.local = Address(ip, self._socket.getsockname()[1])

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._socket.fileno()

    def bind_device(self, interface: str) -> None:
        """Send and receive by `interface` only; by any if "". A kernel that refuses is obeyed."""
        if interface != self.interface:
            bind_device(self._socket, interface)
            self.interface = bound_device(self._socket)

    def send(self, remote: Address, data: bytes) -> int:
        """Send one datagram: 0, or the errno."""
        try:
            self._socket.sendto(data, remote)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


class UdpSockets:
    """All sockets of a tunnel; follows the network.

    `port` is the one port they share: `listen_port`, or if that is 0 the first free one found,
    which is then kept for good (0 until there is an address to bind). `opened` and `closing` are
    called with each socket that comes and goes; an OSError of `opened` makes the address unusable.
    """

    def __init__(
        self,
        listen_port: int,
        opened: Callable[[UdpSocket], None],
        closing: Callable[[UdpSocket], None],
    ) -> None:
        self.port = listen_port
        self.dropped = 0
        """Datagrams not sent because the kernel's queue was full."""
        self.refused = 0
        """Datagrams the kernel refused to send on their path."""
        self._opened = opened
        self._closing = closing
        self._sockets: dict[str, UdpSocket] = {}
        self._extra: dict[Address, UdpSocket] = {}
        self._many: set[Address] = set()  # of these
        self._unusable: set[str] = set()
        self._proven = False

    def __iter__(self) -> Iterator[UdpSocket]:
        return iter([*self._sockets.values(), *self._extra.values()])

    @property
    def incomplete(self) -> bool:
        """Whether some address of the last `sync` could not be bound, and is worth another try."""
        return bool(self._unusable)

    def usable(self, network: LocalNetwork) -> LocalNetwork:
        """`network` without the addresses that could not be bound."""
        if not self._unusable:
            return network
        addresses = tuple(a for a in network.addresses if a.ip in self._sockets)
        return LocalNetwork(addresses, network.routes)

    def sync(self, network: LocalNetwork) -> None:
        """Open what is new, close what is gone, and bind each to its device or not.

        An address that cannot be bound is left out and logged. Raises LocalError where somebody
        else has the configured port, but only as long as it was never ours.
        """
        wanted = {ip: device_for(ip, network) for ip in _unique(network.addresses)}
        for ip in [ip for ip in self._sockets if ip not in wanted]:
            self._close(ip)
        for local in [local for local in self._extra if local.host not in wanted]:
            self.close_extra(local)
        for ip, interface in wanted.items():
            if ip in self._sockets:
                self._sockets[ip].bind_device(interface)
        missing = {ip: device for ip, device in wanted.items() if ip not in self._sockets}
        self._unusable &= missing.keys()
        if self.port:
            self._open(missing)
        elif missing:
            self._open_anywhere(missing)
        self._proven = self._proven or bool(self._sockets)

    def open_extra(self, ip: str, *, many: bool = False) -> Address | None:
        """Another socket on an address that has one, on a port of the kernel's choice. Of `many`
        little is logged."""
        first = self._sockets.get(ip)
        if first is None:
            return None
        try:
            udp = UdpSocket(ip, 0, first.interface)
        except OSError as error:
            tell = _log.debug if many else _log.warning
            tell("no further socket", local=ip, error=error.strerror or error)
            return None
        try:
            self._opened(udp)
        except OSError:
            udp.close()
            return None
        self._extra[udp.local] = udp
        if many:
            self._many.add(udp.local)
        self._tell(udp.local)("socket opened", local=udp.local, device=udp.interface or None)
        return udp.local

    def close_extra(self, local: Address) -> None:
        """Close one that `open_extra` has opened, if it still is."""
        udp = self._extra.pop(local, None)
        if udp is not None:
            self._closing(udp)
            udp.close()
            self._tell(local)("socket closed", local=local)
            self._many.discard(local)

    def _tell(self, extra: Address) -> Callable[..., None]:
        return _log.debug if extra in self._many else _log.info

    def send(self, datagrams: Sequence[tuple[PathKey, bytes]]) -> list[tuple[PathKey, int]]:
        """Send them in order; the paths that failed, each once, with the first errno there.

        A full queue of the kernel is no failure of the path: what does not fit is dropped.
        """
        failures: dict[PathKey, int] = {}
        for path, data in datagrams:
            udp = self._sockets.get(path.local.host)
            if udp is None or udp.local != path.local:
                udp = self._extra.get(path.local)
            # Without one, the address is gone, and its socket with it.
            code = errno.EADDRNOTAVAIL if udp is None else udp.send(path.remote, data)
            if code in _QUEUE_FULL:
                self.dropped += 1
            elif code:
                self.refused += 1
                failures.setdefault(path, code)
        return list(failures.items())

    def close(self) -> None:
        """Close all."""
        for local in list(self._extra):
            self.close_extra(local)
        for ip in list(self._sockets):
            self._close(ip)

    def _open(self, missing: dict[str, str]) -> None:
        for ip, interface in missing.items():
            try:
                self._add(UdpSocket(ip, self.port, interface))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and not self._proven:
                    raise port_in_use(ip, self.port) from error
                self._leave_out(ip, error)

    def _open_anywhere(self, missing: dict[str, str]) -> None:
        """Find a port that is free on all addresses; after some attempts, on the first one."""
        for attempt in range(EPHEMERAL_ATTEMPTS):
            port = 0
            opened: list[UdpSocket] = []
            taken = False
            for ip, interface in missing.items():
                try:
                    opened.append(UdpSocket(ip, port, interface))
                    port = opened[0].local.port
                except OSError as error:
                    taken |= error.errno == errno.EADDRINUSE
                    if taken and attempt < EPHEMERAL_ATTEMPTS - 1:
                        break
                    self._leave_out(ip, error)
            else:
                self.port = port
                for udp in opened:
                    try:
                        self._add(udp)
                    except OSError as error:
                        self._leave_out(udp.local.host, error)
                return
            for udp in opened:
                udp.close()

    def _leave_out(self, ip: str, error: OSError) -> None:
        """EADDRNOTAVAIL: gone again, as netlink is about to tell. EADDRINUSE: somebody has it."""
        if ip not in self._unusable:
            self._unusable.add(ip)
            reason = error.strerror or error
            _log.warning("address not usable", local=ip, port=self.port, error=reason)

    def _add(self, udp: UdpSocket) -> None:
        try:
            self._opened(udp)
        except OSError:  # nobody would ever read from it
            udp.close()
            raise
        self._sockets[udp.local.host] = udp
        self._unusable.discard(udp.local.host)
        _log.info("socket opened", local=udp.local, device=udp.interface or None)

    def _close(self, ip: str) -> None:
        udp = self._sockets.pop(ip)
        self._closing(udp)
        udp.close()
        _log.info("socket closed", local=udp.local)


def device_for(ip: str, network: LocalNetwork) -> str:
    """The interface to bind a socket on `ip` to, or "" for none.

    Binding makes a packet from this address leave by the interface that has it, also where another
    one has the default route. It is wrong where several interfaces have the address, and where that
    interface has no route of this family: the kernel would then believe every remote address to be
    on that very link (`ip_route_output_key_hash_rcu` in net/ipv4/route.c).
    """
    owners = {address.interface for address in network.addresses if address.ip == ip}
    if len(owners) != 1:
        return ""
    (owner,) = owners
    version = 6 if ":" in ip else 4
    routed = any(r.interface == owner and r.network.version == version for r in network.routes)
    return owner if routed else ""


def port_in_use(ip: str, port: int) -> LocalError:
    """The error for a configured port that somebody else has."""
    return LocalError(
        f"UDP port {port} is already in use on {ip}",
        remedy=f"see by whom with: ss -lunp 'sport = :{port}'; stop it, or change"
        " interface.listen_port (0 picks a free one)",
    )


_log = Log("udp")

_QUEUE_FULL = frozenset((errno.EAGAIN, errno.ENOBUFS))  # the socket's; the device's


def _configure(udp: socket.socket) -> None:
    if udp.family == socket.AF_INET6:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # DF is set, and the size is ours to find: the kernel's idea of the path MTU is ignored.
        udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    for forced, plain in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            udp.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
        except PermissionError:  # up to net.core.[rw]mem_max is for everybody
            udp.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
    with contextlib.suppress(OSError):  # EPERM without CAP_NET_ADMIN: it works without, too
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
    with contextlib.suppress(OSError):  # Linux 5.0
        udp.setsockopt(socket.SOL_UDP, UDP_GRO, 1)


def _unique(addresses: Sequence[LocalAddress]) -> list[str]:
    return list(dict.fromkeys(address.ip for address in addresses))
