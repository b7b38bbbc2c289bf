"""Looks at this machine, without changing anything on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tun.errors import TunError
from tun.linux import LinuxTun
from tunnel.doctor.facts import HostFacts, TunFacts
from tunnel.shell.status import RUN_DIRECTORY
from tunnel.shell.udp import SOCKET_BUFFER, SOCKET_MARK, UdpSocket

T = TypeVar("T")

_CAP_NET_ADMIN = 12  # <linux/capability.h>
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_UDP_SEGMENT, _UDP_GRO = 103, 104  # <linux/udp.h>
_PROBE = "mtprobe"  # name of the TUN device that is made to see whether it can be


def gather() -> HostFacts:
    """Takes some milliseconds; blocks."""
    libcrypto, error, advice = _engine()
    return HostFacts(
        net_admin=_has_capability(_CAP_NET_ADMIN),
        root=os.geteuid() == 0,
        container=_in_container(),
        tun=_elsewhere(_try_tun),
        udp_segment=_takes(socket.SOL_UDP, _UDP_SEGMENT, 0),
        udp_gro=_takes(socket.SOL_UDP, _UDP_GRO, 1),
        so_mark=_takes(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK),
        libcrypto=libcrypto,
        engine_error=error,
        advice=advice,
        receive_buffer=_receive_buffer(),
        wanted_buffer=SOCKET_BUFFER,
        run_directory=str(RUN_DIRECTORY),
        run_directory_error=_run_directory_error(RUN_DIRECTORY),
        wall_time=time.time(),
    )


def _has_capability(number: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _in_container() -> bool:
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return True
    with contextlib.suppress(OSError):  # of systemd-nspawn, LXC and podman; for root to read
        return b"container=" in Path("/proc/1/environ").read_bytes()
    return False


def _engine() -> tuple[str | None, str, str | None]:
    """libcrypto's version, or why there is no engine; what a newer one would bring."""
    try:
        from tunnel.shell import crypto

        report = crypto.report()
    except (ImportError, OSError) as error:
        return None, str(error), None
    return report["libcrypto"], "", report["advice"]


def _try_tun() -> TunFacts:
    try:
        device = LinuxTun.open(_PROBE, 1420)
    except TunError as error:
        return TunFacts(kind=error.kind, message=str(error))
    offload = device.offload
    device.close()
    return TunFacts(tcp_offload=offload.tcp, udp_offload=offload.udp)


def _elsewhere(look: Callable[[], T]) -> T:
    """Run it in a network namespace of its own, so that nobody here sees a device come and go.

    In this one where that takes a privilege that we lack, as in most containers: a device that is
    never up disturbs nobody.
    """
    found: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            # Of this thread alone, and gone with it.
            ctypes.CDLL(None).unshare(_CLONE_NEWNET)
            found.append(look())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="doctor tun")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found[0]


def _takes(level: int, option: int, value: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(level, option, value)
        except OSError:
            return False
    return True


def _receive_buffer() -> int | None:
    """What a socket of the tunnel gets."""
    try:
        udp = UdpSocket("127.0.0.1", 0, "")
    except OSError:
        return None
    try:
        with socket.socket(fileno=os.dup(udp.fileno())) as same:
            # The kernel doubles what is asked for, to have room for its own (socket(7)).
            return same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    finally:
        udp.close()


def _run_directory_error(directory: Path) -> str:
    """Why no control socket can be made there; "" if one can."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no directory"
    if os.access(place, os.W_OK | os.X_OK):
        return ""
    try:
        read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except OSError as error:
        return error.strerror or str(error)
    return "read-only file system" if read_only else f"no permission in {place}"
