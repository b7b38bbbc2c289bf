"""A TUN device of the Linux kernel (Documentation/networking/tuntap.rst), made by pytun.

The device lives as long as its file descriptor: when the process dies, however it dies, the
kernel removes the device with its addresses and routes. It carries our alias all the same, so
that one which somebody made persistent is known to be ours.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterable

import pytun

from tun.errors import TunError
from tun.netlink import Netlink, NetlinkError, converse
from tun.plan import check_name

# IFLA_IFALIAS of every device of ours; `ip link` shows it.
ALIAS = "martlet"

_NODE = "/dev/net/tun"

# No packet is larger (RFC 791 section 3.1; RFC 8200 section 3 without jumbograms), whatever MTU
# somebody gives the device later: a short buffer would cut packets without a word.
_PACKET_LIMIT = 65535

# What read and write answer once the device is removed (tun_chr_read_iter in drivers/net/tun.c),
# while the descriptor polls as failed for ever.
_GONE = (errno.EBADFD, errno.EIO)


class LinuxTun:
    """`TunDevice` on a file descriptor that never blocks."""

    def __init__(self, device: pytun.TunTapDevice, name: str, mtu: int) -> None:
        self.name = name
        self.mtu = mtu
        self.dropped = 0
        # Kept, because pytun closes the descriptor with its object.
        self._device: pytun.TunTapDevice | None = device
        self._fd: int = device.fileno()
        os.set_blocking(self._fd, False)
        # A child that inherits it would keep the device alive after us.
        os.set_inheritable(self._fd, False)

    @classmethod
    def open(cls, name: str, mtu: int) -> "LinuxTun":
        """Make the device `name`, down and without addresses, in the caller's network namespace.

        A leftover of ours by that name is removed first. `mtu` in bytes. Raises TunError:
        "name", "missing", "privilege", "busy" (a living process holds it), "foreign" (it is not
        ours), "system".
        """
        check_name(name)
        if converse(lambda netlink: _is_leftover(netlink, name)):
            # Attaching proves that nobody holds it; then it goes, with all that is left on it.
            leftover = _attach(name)
            leftover.persist(False)
            leftover.close()
        device = _attach(name)
        try:
            converse(lambda netlink: _mark(netlink, name, mtu))
        except BaseException:
            device.close()
            raise
        return cls(device, name, mtu)

    def fileno(self) -> int:
        return self._fd

    def read(self, limit: int) -> list[bytes]:
        packets: list[bytes] = []
        try:
            while len(packets) < limit:
                packets.append(os.read(self._fd, _PACKET_LIMIT))
        except BlockingIOError:
            pass
        except OSError as error:
            if not packets:
                raise self._failure(error) from None
        return packets

    def write(self, packets: Iterable[bytes]) -> int:
        taken = 0
        for packet in packets:
            try:
                os.write(self._fd, packet)
            except OSError:
                # Queue full, not an IP packet, link down or gone: this packet is lost, as on any
                # link. That the device is gone, `read` says.
                self.dropped += 1
            else:
                taken += 1
        return taken

    def close(self) -> None:
        device, self._device, self._fd = self._device, None, -1
        if device is not None:
            device.close()

    def _failure(self, error: OSError) -> TunError:
        if self._device is None:
            return TunError("gone", f"{self.name} is closed")
        if error.errno in _GONE:
            return TunError(
                "gone", f"interface {self.name} was removed under us; start martlet again"
            )
        return TunError("system", f"cannot read from {self.name}: {error.strerror}")


def _is_leftover(netlink: Netlink, name: str) -> bool:
    """False: no such interface. True: a device of ours. Raises TunError("foreign")."""
    try:
        link = netlink.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise TunError("system", f"cannot look for interface {name}: {error}") from None
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
    if kind == "tun" and link.get_attr("IFLA_IFALIAS") == ALIAS:
        return True
    raise _foreign(name, f"of kind {kind}" if kind else "")


def _mark(netlink: Netlink, name: str, mtu: int) -> None:
    index = socket.if_nametoindex(name)
    try:
        netlink.link("set", index=index, ifalias=ALIAS, mtu=mtu)
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise _privilege(name) from None
        reason = os.strerror(error.code)
        raise TunError("system", f"cannot set up {name} (mtu {mtu}): {reason}") from None


def _attach(name: str) -> pytun.TunTapDevice:
    """TUNSETIFF: makes the device, or attaches to it where it is persistent and free."""
    try:
        return pytun.TunTapDevice(name=name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI, dev=_NODE)
    except OSError as error:  # pytun.Error is one
        raise _explain(error, name) from None


def _explain(error: OSError, name: str) -> TunError:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return TunError(
                "missing",
                f"there is no {_NODE}. On a host: modprobe tun (and, without udev: mkdir -p "
                f"/dev/net && mknod {_NODE} c 10 200). In a container: start it with "
                f"--device {_NODE} --cap-add NET_ADMIN",
            )
        case errno.EPERM | errno.EACCES:
            return _privilege(name)
        case errno.EBUSY:
            return TunError(
                "busy",
                f"interface {name} is in use by another process: stop that one (martlet down "
                f"{name}), or take another name in [interface]",
            )
        case errno.EINVAL:
            return _foreign(name, "")
        case _:
            return TunError("system", f"cannot make interface {name}: {error}")


def _privilege(name: str) -> TunError:
    return TunError(
        "privilege",
        f"no permission to make interface {name}: run as root, or with the capability NET_ADMIN "
        f"(in a container: --cap-add NET_ADMIN --device {_NODE})",
    )


def _foreign(name: str, what: str) -> TunError:
    described = f"an interface {name} {what}".rstrip()
    advice = "take another name in [interface]"
    with contextlib.suppress(OSError):
        if socket.if_nametoindex(name):
            advice += f", or, if nobody needs it, remove it: ip link delete {name}"
    return TunError("foreign", f"{described} exists that is not martlet's: {advice}")
