"""A TUN device of the Linux kernel (Documentation/networking/tuntap.rst), made by pytun.

The device lives as long as its file descriptor: when the process dies, however it dies, the
kernel removes the device with its addresses and routes. It carries our alias all the same, so
that one which somebody made persistent is known to be ours.

Its descriptor speaks in messages of a virtio header and a packet, which may be a super-packet
(`tun.device`): the constants below that have no other source are from include/uapi/linux/if_tun.h.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct

import pytun

from tun.device import VNET_SIZE, Offload
from tun.errors import TunError
from tun.netlink import Netlink, NetlinkError, converse
from tun.plan import check_name

# Packets, or super-packets, that the kernel keeps for us. Its default of 500 are 2.5 ms of small
# packets at full speed, less than we may be away; queues that stand are our own, behind this one.
_QUEUE = 2000

# IFLA_IFALIAS of every device of ours; `ip link` shows it.
ALIAS = "martlet"

_NODE = "/dev/net/tun"

_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUN_F_CSUM = 0x01
_TUN_F_TSO4 = 0x02
_TUN_F_TSO6 = 0x04
_TUN_F_TSO_ECN = 0x08
_TUN_F_USO4 = 0x20  # both since Linux 6.2
_TUN_F_USO6 = 0x40

_TSO = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN
# Best first. Checksum offload alone would save nothing: the tunnel would compute it instead.
_OFFLOADS = (
    (_TSO | _TUN_F_USO4 | _TUN_F_USO6, Offload(tcp=True, udp=True)),
    (_TSO, Offload(tcp=True, udp=False)),
)

# Bytes of the largest super-packet that the host makes for us. A UDP message that the kernel cuts
# is at most 65507 bytes, QUIC's overhead on every segment included: a super-packet of the default
# 65536 would not fit into one, and leave a small second message each time.
_GSO_MAX_SIZE = 60000

# What a read answers once the device is removed, while the descriptor polls as failed for ever:
# tun_chr_read_iter, and for a read that the removal overtakes tun_ring_recv (drivers/net/tun.c).
_GONE = (errno.EBADFD, errno.EIO, errno.EFAULT)


class LinuxTun:
    """`TunDevice` on a file descriptor that never blocks."""

    def __init__(self, device: pytun.TunTapDevice, name: str, mtu: int, offload: Offload) -> None:
        self.name = name
        self.mtu = mtu
        self.offload = offload
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
            offload = _offload(device.fileno(), name)
            converse(lambda netlink: _mark(netlink, name, mtu))
        except BaseException:
            device.close()
            raise
        return cls(device, name, mtu, offload)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        device, self._device, self._fd = self._device, None, -1
        if device is not None:
            device.close()


def read_failure(name: str, code: int) -> TunError:
    """The error for a read from the device `name` that failed with the errno `code` for good."""
    if code in _GONE:
        return TunError("gone", f"interface {name} was removed under us; start martlet again")
    return TunError("system", f"cannot read from {name}: {os.strerror(code)}")


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
    # For IPv4 this counts as well, where the kernel keeps another limit for it (since 6.3:
    # netif_set_gso_max_size). Refused: the tunnel works, with more and smaller messages.
    with contextlib.suppress(NetlinkError):
        netlink.link("set", index=index, gso_max_size=_GSO_MAX_SIZE)
    with contextlib.suppress(NetlinkError):
        netlink.link("set", index=index, txqlen=_QUEUE)


def _offload(descriptor: int, name: str) -> Offload:
    """Set the messages' form, and take the best offloads that this kernel has."""
    try:
        fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("=i", VNET_SIZE))
    except OSError as error:
        raise _explain(error, name) from None
    for flags, offload in _OFFLOADS:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _TUNSETOFFLOAD, flags)
            return offload
    return Offload(tcp=False, udp=False)


def _attach(name: str) -> pytun.TunTapDevice:
    """TUNSETIFF: makes the device, or attaches to it where it is persistent and free."""
    flags = pytun.IFF_TUN | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR
    try:
        return pytun.TunTapDevice(name=name, flags=flags, dev=_NODE)
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
