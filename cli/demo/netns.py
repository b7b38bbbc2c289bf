"""Network namespaces for the demo and the lab: made with a unique random prefix, always removed.

Everything is done through `ip` (iproute2) in subprocesses, so that the calling process never
changes namespace. The host's own namespace is left as it is: veth pairs are created with both
ends already inside namespaces.

    with Namespaces() as spaces:
        a, b = spaces.create("A"), spaces.create("B")
        spaces.veth(a, "v", b, "v")
        a.batch("addr add 192.0.2.1/24 dev v")
        a.run(["ping", "-c1", "192.0.2.2"])
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import secrets
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCETHTOOL = 0x8946  # linux/sockios.h
# linux/ethtool.h: the "set" commands of segmentation, gathering and checksum offload
_OFFLOADS = (0x1F, 0x24, 0x2C, 0x19, 0x17)  # TSO, GSO, GRO, scatter-gather, transmit checksum

# Set before any device exists, so that every veth end inherits them. rp_filter would drop what a
# multi-homed host receives on its second uplink; duplicate address detection would keep new IPv6
# addresses tentative for a second.
_SYSCTLS = (
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
)
_SYSCTLS_IPV6 = (
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.all.accept_ra=0",
    "net.ipv6.conf.default.accept_ra=0",
)
_FORWARD = "net.ipv4.ip_forward=1"
_FORWARD_IPV6 = "net.ipv6.conf.all.forwarding=1"
_TERM_GRACE = 3.0  # seconds from SIGTERM to SIGKILL: a tunnel says goodbye and undoes its plan


class CommandError(RuntimeError):
    """A command failed; the message has the command, its exit code and the end of its output."""


def command(
    argv: Sequence[str],
    *,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 30.0,
) -> subprocess.CompletedProcess[str]:
    """Run argv to its end with captured text output; CommandError when it fails and `check` is
    set.
    """
    done = subprocess.run(
        argv,
        input=input,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        tail = (done.stdout[-800:] + done.stderr[-800:]).strip()
        raise CommandError(f"{' '.join(argv)} (exit {done.returncode}): {tail}")
    return done


class Namespace:
    """One network namespace; `name` is its name under `ip netns`, `label` the one in drawings."""

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label
        self.processes: list[subprocess.Popen[bytes]] = []

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs argv inside; `ip netns exec` execs, so the pid is the
        program's own.
        """
        return ["ip", "netns", "exec", self.name, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 30.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run argv inside, to its end."""
        return command(self.argv(argv), input=input, env=env, check=check, timeout=timeout)

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = subprocess.DEVNULL,
        log: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start argv inside and in a session of its own (Ctrl-C must reach the owner first).

        With `log`, stderr, and stdout unless given, are appended to that file. It is ended with
        the namespace.
        """
        with contextlib.ExitStack() as stack:
            if log is not None:
                sink = stack.enter_context(log.open("ab"))
                stderr = sink
                stdout = sink if stdout == subprocess.DEVNULL else stdout
            process = subprocess.Popen(
                self.argv(argv),
                env={**os.environ, **(env or {})},
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def batch(self, *lines: str) -> None:
        """Apply `ip` subcommands inside, all in one process (as close to at once as `ip` can)."""
        command(["ip", "-n", self.name, "-batch", "-"], input="\n".join(lines) + "\n")

    def call(self, function: Callable[[], T]) -> T:
        """Run a short function inside, in a thread of this process.

        A socket opened there stays in the namespace, whoever uses it later.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
                try:
                    if _libc.setns(descriptor, CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"setns {self.name}")
                finally:
                    os.close(descriptor)
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter, name=f"inside {self.label}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def sysctl(self, *assignments: str) -> None:
        """Set sysctls of this namespace, each as `name=value`."""

        def write() -> None:
            for assignment in assignments:
                name, _, value = assignment.partition("=")
                Path("/proc/sys", *name.split(".")).write_text(value)

        self.call(write)

    def forward(self) -> None:
        """Make it a router."""
        self.sysctl(_FORWARD, *([_FORWARD_IPV6] if _have_ipv6() else []))

    def offloads_off(self, *interfaces: str) -> None:
        """Real packets of at most the MTU with their checksums filled in, as on a cable.

        On a veth, segmentation and checksum offload mean that neither is done at all: a userspace
        link or NAT would see super-packets and wrong checksums.
        """

        def switch() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                for interface, offload in itertools.product(interfaces, _OFFLOADS):
                    value = ctypes.create_string_buffer(struct.pack("II", offload, 0))
                    request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
                    with contextlib.suppress(OSError):  # an offload that this driver lacks
                        fcntl.ioctl(control, SIOCETHTOOL, request)

        self.call(switch)

    def pids(self) -> list[int]:
        """Every process living inside."""
        return [
            int(pid)
            for pid in command(["ip", "netns", "pids", self.name], check=False).stdout.split()
        ]


class Namespaces:
    """The namespaces of one lab; leaving the context ends their processes and removes them."""

    def __init__(self) -> None:
        self.prefix = f"mt{secrets.token_hex(3)}"
        self._spaces: list[Namespace] = []

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def create(self, label: str) -> Namespace:
        """A new namespace with its loopback up and our sysctls set."""
        space = Namespace(f"{self.prefix}-{label}", label)
        self._spaces.append(space)
        command(["ip", "netns", "add", space.name])
        space.sysctl(*_SYSCTLS, *(_SYSCTLS_IPV6 if _have_ipv6() else ()))
        space.batch("link set lo up")
        return space

    def veth(self, a: Namespace, a_name: str, b: Namespace, b_name: str, mtu: int = 1500) -> None:
        """A cable between two namespaces, both ends up, without offloads."""
        command(
            f"ip link add {a_name} netns {a.name} mtu {mtu} type veth"
            f" peer name {b_name} netns {b.name} mtu {mtu}".split()
        )
        for space, name in ((a, a_name), (b, b_name)):
            space.offloads_off(name)
            space.batch(f"link set dev {name} up")

    def close(self) -> None:
        """End every process inside, then remove the namespaces (their veths go with them); may be
        repeated.
        """
        spaces, self._spaces = self._spaces, []
        with _uninterrupted():
            terminate([process for space in spaces for process in space.processes])
            for space in spaces:
                _end_descendants(space)
                command(["ip", "netns", "del", space.name], check=False)


def terminate(processes: Sequence[subprocess.Popen[bytes]], grace: float = _TERM_GRACE) -> None:
    """SIGTERM to all, newest first, wait up to `grace` seconds, SIGKILL to what is left; reaps
    them all.
    """
    for process in reversed(processes):
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _end_descendants(space: Namespace) -> None:
    """What our processes left behind (sshd's sessions leave its process group); the namespace is
    only ours.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 1.0
        pids = space.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while pids and time.monotonic() < deadline:
            time.sleep(0.02)
            pids = space.pids()
        if not pids:
            return


class _uninterrupted:
    """A second Ctrl-C or SIGTERM must not leave half a lab behind: ignored while cleaning up
    (main thread only).
    """

    def __enter__(self) -> None:
        self._old: list[tuple[int, object]] = []
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._old.append((number, signal.signal(number, signal.SIG_IGN)))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old:
            signal.signal(number, handler)  # type: ignore[arg-type]


def _have_ipv6() -> bool:
    return Path("/proc/sys/net/ipv6").is_dir()
