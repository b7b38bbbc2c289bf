"""tun.linux and tun.apply on a real kernel, each test in a network namespace of its own.

kernel sockets --- IP stack --- mt0 (10.88.0.1/24, fd88::1/64) --- file descriptor --- the test
                       routes: 10.99.0.0/16, fd99::/48 dev mt0      (plays 10.88.0.2, fd88::2)
"""

import asyncio
import ctypes
import errno
import fcntl
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import uvloop

import tun.linux
from tun.apply import apply
from tun.device import VNET_SIZE, Offload, TunDevice, VnetHeader
from tun.errors import TunError
from tun.linux import ALIAS, LinuxTun, read_failure
from tun.plan import Step, plan

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test in a thread in a new network namespace, which ends with the thread."""

    @functools.wraps(test)
    def wrapper(*args: object, **kwargs: object) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "unshare")
                test(*args, **kwargs)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return wrapper


def ip(*words: str) -> Any:
    """`ip -json WORDS`, parsed; [] where it prints nothing."""
    out = subprocess.run(["ip", "-json", *words], check=True, capture_output=True, text=True)
    return json.loads(out.stdout or "[]")


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()} - TUNNELS_OF_THE_KERNEL


# Some kernels put these fallback devices into every new namespace.
TUNNELS_OF_THE_KERNEL = {
    *("lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0"),
    *("sit0", "ip6tnl0", "ip6gre0", "ifb0", "ifb1"),
}


def addresses(name: str) -> set[str]:
    return {f"{a['local']}/{a['prefixlen']}" for a in ip("address", "show", name)[0]["addr_info"]}


def routes(name: str) -> set[str]:
    found = [*ip("-4", "route", "show", "dev", name), *ip("-6", "route", "show", "dev", name)]
    return {route["dst"] for route in found} - {"ff00::/8", "multicast"}


def the_plan(*allowed: str, name: str = "mt0") -> tuple[Step, ...]:
    return plan(
        name,
        [ip_interface("10.88.0.1/24"), ip_interface("fd88::1/64")],
        1420,
        [ip_network(text) for text in allowed or ("10.88.0.2/32", "10.99.0.0/16", "fd99::/48")],
    )


@contextmanager
def opened(name: str = "mt0", mtu: int = 1420) -> Iterator[LinuxTun]:
    device = LinuxTun.open(name, mtu)
    try:
        yield device
    finally:
        device.close()


PLAIN = VnetHeader()
NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM (include/uapi/linux/virtio_net.h), and its types:
GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 1, 4, 5
UDP_SEGMENT = 103  # include/uapi/linux/udp.h


def read(device: TunDevice) -> tuple[VnetHeader, bytes]:
    """One message, as the engine reads it."""
    message = os.read(device.fileno(), VNET_SIZE + 65535)
    return VnetHeader.unpack(message), message[VNET_SIZE:]


def drain(device: TunDevice) -> list[tuple[VnetHeader, bytes]]:
    """All that waits."""
    messages = []
    while True:
        try:
            messages.append(read(device))
        except BlockingIOError:
            return messages


def write(device: TunDevice, packet: bytes, vnet: VnetHeader = PLAIN) -> None:
    """One message, as the engine writes it."""
    assert os.writev(device.fileno(), [vnet.pack(), packet]) == VNET_SIZE + len(packet)


def receive(device: TunDevice) -> tuple[VnetHeader, bytes]:
    """The next message, awaited for at most two seconds."""
    assert select.select([device.fileno()], [], [], 2)[0], "no packet"
    return read(device)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo_request(source: str, target: str, payload: bytes) -> bytes:
    """An ICMP or ICMPv6 echo request (RFC 792; RFC 4443 section 4.1), as a whole IP packet."""
    src, dst = ip_address(source).packed, ip_address(target).packed
    length = 8 + len(payload)
    if len(src) == 4:
        kind, pseudo = 8, b""
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 1, 0, 64, 1, 0, src, dst)
        header = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    else:
        kind, pseudo = 128, src + dst + struct.pack("!II", length, 58)
        header = struct.pack("!IHBB", 6 << 28, length, 58, 64) + src + dst
    body = struct.pack("!BBHHH", kind, 0, 0, 7, 1) + payload
    total = checksum(pseudo + body)
    return header + body[:2] + struct.pack("!H", total) + body[4:]


@isolated
@pytest.mark.parametrize(
    ("ours", "theirs", "header", "reply"),
    [("10.88.0.1", "10.88.0.2", 20, 0), ("fd88::1", "fd88::2", 40, 129)],
)
def test_the_kernel_answers_an_echo(ours: str, theirs: str, header: int, reply: int) -> None:
    with opened() as device, apply(the_plan()):
        write(device, echo_request(theirs, ours, b"martlet"))
        _, packet = receive(device)
        assert packet[header] == reply
        assert packet.endswith(b"martlet")
        assert drain(device) == []


@isolated
@pytest.mark.parametrize(
    ("family", "source", "target"),
    [
        (socket.AF_INET, "10.88.0.1", "10.88.0.2"),
        (socket.AF_INET, "10.88.0.1", "10.99.1.1"),
        (socket.AF_INET6, "fd88::1", "fd88::2"),
        (socket.AF_INET6, "fd88::1", "fd99::1"),
    ],
)
def test_what_the_host_sends_is_read_in_order(family: int, source: str, target: str) -> None:
    with opened() as device, apply(the_plan()), socket.socket(family, socket.SOCK_DGRAM) as sock:
        assert drain(device) == []
        for number in range(5):
            sock.sendto(b"payload %d" % number, (target, 9))
        assert select.select([device.fileno()], [], [], 2)[0]
        packets = [packet for _, packet in drain(device)]
        assert [packet[-1:] for packet in packets] == [b"0", b"1", b"2", b"3", b"4"]
        assert ip_address(source).packed in packets[0]
        assert ip_address(target).packed in packets[0]


@isolated
def test_a_packet_that_arrives_reaches_its_socket() -> None:
    udp = struct.pack("!HHHH", 5000, 6000, 8 + 5, 0) + b"hello"
    # The address and protocol of an echo request, with another payload: RFC 768.
    request = echo_request("10.88.0.2", "10.88.0.1", b"hello")
    head = request[:9] + b"\x11\0\0" + request[12:20]
    packet = head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp
    with (
        opened() as device,
        apply(the_plan()),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind(("10.88.0.1", 6000))
        sock.settimeout(2)
        write(device, packet)
        assert sock.recvfrom(100) == (b"hello", ("10.88.0.2", 5000))


@isolated
def test_the_interface_is_as_planned_and_silent() -> None:
    with opened() as device, apply(the_plan()):
        link = ip("-d", "link", "show", "mt0")[0]
        assert (link["mtu"], link["txqlen"], link["ifalias"]) == (1420, 1000, ALIAS)
        # One super-packet is one UDP message with it, for IPv4 as for IPv6.
        assert link["gso_max_size"] == link.get("gso_ipv4_max_size", 60000) == 60000
        assert "UP" in link["flags"]
        assert link["inet6_addr_gen_mode"] == "none"
        assert addresses("mt0") == {"10.88.0.1/24", "fd88::1/64"}
        assert routes("mt0") == {"10.88.0.0/24", "10.99.0.0/16", "fd88::/64", "fd99::/48"}
        assert "tentative" not in json.dumps(ip("address", "show", "mt0"))
        # A router solicitation would come within a second (RFC 4861 section 6.3.7).
        assert not select.select([device.fileno()], [], [], 1.2)[0]
        assert not os.get_inheritable(device.fileno())


@isolated
def test_undoing_leaves_nothing() -> None:
    before = interfaces()
    device = LinuxTun.open("mt0", 1420)
    applied = apply(the_plan())
    applied.undo()
    assert addresses("mt0") == set()
    assert routes("mt0") == set()
    assert "UP" not in ip("link", "show", "mt0")[0]["flags"]
    applied.undo()
    device.close()
    device.close()
    assert interfaces() == before


@isolated
def test_only_the_difference_of_two_plans_is_done() -> None:
    own = [ip_interface("10.88.0.1/24")]

    def wanted(*allowed: str) -> tuple[Step, ...]:
        return plan("mt0", own, 1420, [ip_network(text) for text in allowed])

    ip("tuntap", "add", "other", "mode", "tun")
    ip("link", "set", "other", "up")
    ip("route", "add", "10.96.0.0/16", "dev", "other")
    with opened():
        applied = apply(wanted("10.99.0.0/16"))
        watching = subprocess.Popen(
            ["ip", "-o", "monitor", "link", "address", "route"], stdout=subprocess.PIPE, text=True
        )
        time.sleep(0.2)
        own.append(ip_interface("fd6d::1/128"))
        applied.change(wanted("10.99.0.0/16", "10.97.0.0/16"))
        assert addresses("mt0") == {"10.88.0.1/24", "fd6d::1/128"}
        both = {"10.88.0.0/24", "10.99.0.0/16", "10.97.0.0/16", "fd6d::1"}
        assert routes("mt0") == both
        with pytest.raises(TunError, match=r"route to 10\.96\.0\.0/16 through other"):
            applied.change(wanted("10.95.0.0/16", "10.96.0.0/16"))
        assert routes("mt0") == both
        applied.change(wanted("10.99.0.0/16"))
        assert routes("mt0") == both - {"10.97.0.0/16"}
        time.sleep(0.2)
        watching.terminate()
        seen = watching.communicate(timeout=10)[0]
        assert "10.97.0.0/16" in seen
        assert "10.88.0." not in seen and "10.99." not in seen  # what stays is not touched
        applied.undo()
        assert addresses("mt0") == routes("mt0") == set()


@isolated
def test_undoing_after_the_device_is_gone_is_fine() -> None:
    device = LinuxTun.open("mt0", 1420)
    applied = apply(the_plan())
    device.close()
    applied.undo()


@isolated
def test_applying_twice_is_fine() -> None:
    with opened(), apply(the_plan()):
        again = apply(the_plan())
        assert addresses("mt0") == {"10.88.0.1/24", "fd88::1/64"}
        again.undo()
        assert addresses("mt0") == set()


@isolated
@pytest.mark.parametrize("taken", ["10.99.0.0/16", "fd99::/48"])
def test_a_route_of_somebody_else_is_kept_and_everything_undone(taken: str) -> None:
    ip("tuntap", "add", "other", "mode", "tun")
    ip("link", "set", "other", "up")
    ip("route", "add", taken, "dev", "other")
    with opened():
        with pytest.raises(TunError, match=f"route to {taken} through other") as caught:
            apply(the_plan("10.98.0.0/16", "10.99.0.0/16", "fd98::/48", "fd99::/48"))
        assert caught.value.kind == "conflict"
        assert addresses("mt0") == set()
        assert routes("mt0") == set()
    assert taken in routes("other")


@isolated
def test_without_ipv6_the_error_says_so_and_everything_is_undone() -> None:
    # /proc/sys/net is that of the thread's network namespace.
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    with opened():
        with pytest.raises(TunError, match="fd88::1/64") as caught:
            apply(the_plan())
        assert caught.value.kind == "ipv6"
        assert addresses("mt0") == set()
        with apply(plan("mt0", [ip_interface("10.88.0.1/24")], 1420)):
            assert addresses("mt0") == {"10.88.0.1/24"}


@isolated
def test_the_plan_of_an_interface_that_does_not_exist() -> None:
    with pytest.raises(TunError, match="no interface mt0") as caught:
        apply(the_plan())
    assert caught.value.kind == "gone"


@isolated
def test_an_interface_that_is_no_tun_is_refused() -> None:
    with pytest.raises(TunError, match="interface lo ") as caught:
        LinuxTun.open("lo", 1420)
    assert caught.value.kind == "foreign"


@isolated
def test_a_tun_of_somebody_else_is_refused_and_untouched() -> None:
    ip("tuntap", "add", "mt0", "mode", "tun")
    ip("address", "add", "10.1.1.1/24", "dev", "mt0")
    with pytest.raises(TunError, match=r"interface mt0 .*not martlet's.*ip link delete") as caught:
        LinuxTun.open("mt0", 1420)
    assert caught.value.kind == "foreign"
    assert addresses("mt0") == {"10.1.1.1/24"}


@isolated
def test_a_device_in_use_is_refused_and_untouched() -> None:
    with opened(), apply(the_plan()):
        with pytest.raises(TunError, match=r"mt0 is in use.*martlet down mt0") as caught:
            LinuxTun.open("mt0", 1420)
        assert caught.value.kind == "busy"
        assert addresses("mt0") == {"10.88.0.1/24", "fd88::1/64"}


@isolated
def test_a_leftover_of_ours_is_taken_over_clean() -> None:
    ip("tuntap", "add", "mt0", "mode", "tun")
    ip("link", "set", "mt0", "alias", ALIAS)
    ip("address", "add", "10.1.1.1/24", "dev", "mt0")
    ip("link", "set", "mt0", "up")
    ip("route", "add", "10.99.0.0/16", "dev", "mt0")
    with opened(), apply(the_plan()):
        assert addresses("mt0") == {"10.88.0.1/24", "fd88::1/64"}
    assert "mt0" not in interfaces()


CRASHER = """
import sys, time
from ipaddress import ip_interface, ip_network
from tun.apply import apply
from tun.linux import LinuxTun
from tun.plan import plan
device = LinuxTun.open("mt0", 1420)
applied = apply(plan("mt0", [ip_interface("10.88.0.1/24")], 1420, [ip_network("10.99.0.0/16")]))
print("ready", flush=True)
time.sleep(60)
"""


@isolated
def test_a_killed_process_leaves_nothing_and_the_next_one_starts() -> None:
    root = str(Path(tun.linux.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", CRASHER], stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(TunError) as caught:
            LinuxTun.open("mt0", 1420)
        assert caught.value.kind == "busy"
        process.send_signal(signal.SIGKILL)
    assert "mt0" not in interfaces()
    with opened(), apply(the_plan()):
        assert "10.99.0.0/16" in routes("mt0")


UNPRIVILEGED = """
import os
from tun.errors import TunError
from tun.linux import LinuxTun
os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    LinuxTun.open("mt0", 1420)
except TunError as error:
    print(error.kind)
"""


@isolated
def test_without_privilege() -> None:
    root = str(Path(tun.linux.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], cwd=root, capture_output=True, check=True, text=True
    )
    assert done.stdout == "privilege\n"


@isolated
def test_without_the_device_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun.linux, "_NODE", "/dev/net/no-such-tun")
    with pytest.raises(TunError, match=r"modprobe tun.*--device") as caught:
        LinuxTun.open("mt0", 1420)
    assert caught.value.kind == "missing"


@isolated
def test_a_device_removed_under_us() -> None:
    with opened() as device:
        poll = select.poll()
        poll.register(device.fileno(), select.POLLIN)
        ip("link", "delete", "mt0")
        assert poll.poll(0)[0][1] & select.POLLERR
        with pytest.raises(OSError) as caught:
            read(device)
        assert caught.value.errno is not None
        failure = read_failure(device.name, caught.value.errno)
        assert failure.kind == "gone"
        assert str(failure) == "interface mt0 was removed under us; start martlet again"
        with pytest.raises(OSError):
            write(device, echo_request("10.88.0.2", "10.88.0.1", b""))
    assert device.fileno() == -1


@isolated
def test_what_the_kernel_does_not_take_fails_and_the_next_one_is_taken() -> None:
    request = echo_request("10.88.0.2", "10.88.0.1", b"martlet")
    with opened() as device:
        with pytest.raises(OSError):
            write(device, request)  # the link is down
        with apply(the_plan()):
            for bad in (b"", b"\x15" * 40):
                with pytest.raises(OSError):
                    write(device, bad)
            write(device, request)
            assert receive(device)[1].endswith(b"martlet")


# ---- super-packets ----


def pseudo_sum(source: str, target: str, protocol: int, length: int) -> int:
    """What a checksum to be completed begins with: RFC 9293 section 3.1, not complemented."""
    src, dst = ip_address(source).packed, ip_address(target).packed
    if len(src) == 4:
        return ~checksum(src + dst + struct.pack("!HH", protocol, length)) & 0xFFFF
    return ~checksum(src + dst + struct.pack("!II", length, protocol)) & 0xFFFF


def ip_packet(source: str, target: str, protocol: int, body: bytes) -> bytes:
    src, dst = ip_address(source).packed, ip_address(target).packed
    if len(src) == 16:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + src + dst + body
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0x4000, 64, protocol, 0, src, dst
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


PEERS = [
    (socket.AF_INET, "10.88.0.1", "10.88.0.2", 20, GSO_TCPV4),
    (socket.AF_INET6, "fd88::1", "fd88::2", 40, GSO_TCPV6),
]


@isolated
@pytest.mark.parametrize(("family", "ours", "theirs", "header", "kind"), PEERS)
def test_tcp_comes_and_goes_in_super_packets(
    family: int, ours: str, theirs: str, header: int, kind: int
) -> None:
    def segment(number: int, answered: int, flags: int, data: bytes = b"") -> bytes:
        return (
            struct.pack("!HHIIBBHHH", 9, port, number, answered, 5 << 4, flags, 65535, 0, 0) + data
        )

    def complete(tcp: bytes) -> bytes:
        start = struct.pack("!H", pseudo_sum(theirs, ours, 6, len(tcp)))
        whole = struct.pack("!H", checksum(start + tcp))
        return ip_packet(theirs, ours, 6, tcp[:16] + whole + tcp[18:])

    with opened() as device, apply(the_plan()), socket.socket(family) as sock:
        assert device.offload.tcp
        sock.setblocking(False)
        sock.bind((ours, 0))
        port = sock.getsockname()[1]
        assert sock.connect_ex((theirs, 9)) == errno.EINPROGRESS
        _, syn = receive(device)
        (begin,) = struct.unpack_from("!I", syn, header + 4)
        write(device, complete(segment(1000, begin + 1, 0x12)))
        assert select.select([], [sock], [], 2)[1]
        drain(device)

        # Out: more than one packet in one message, with its checksum left to us.
        sock.send(b"x" * 4000)
        vnet, packet = receive(device)
        assert (vnet.gso_type, vnet.flags & NEEDS_CSUM) == (kind, NEEDS_CSUM)
        assert (vnet.csum_start, vnet.csum_offset) == (header, 16)
        assert 0 < vnet.gso_size <= device.mtu - header - 20
        assert len(packet) > device.mtu

        # In: the same, and the socket gets every byte.
        data = bytes(range(250)) * 40
        tcp = segment(1001, begin + 1, 0x18, data)
        start = pseudo_sum(theirs, ours, 6, len(tcp))
        tcp = tcp[:16] + struct.pack("!H", start) + tcp[18:]
        vnet = VnetHeader(NEEDS_CSUM, kind, header + 20, 1000, header, 16)
        write(device, ip_packet(theirs, ours, 6, tcp), vnet)
        assert select.select([sock], [], [], 2)[0]
        assert sock.recv(20_000) == data


@isolated
@pytest.mark.parametrize(("family", "ours", "theirs", "header", "kind"), PEERS)
def test_udp_comes_and_goes_in_super_packets(
    family: int, ours: str, theirs: str, header: int, kind: int
) -> None:
    with (
        opened() as device,
        apply(the_plan()),
        socket.socket(family, socket.SOCK_DGRAM) as sock,
    ):
        if not device.offload.udp:
            pytest.skip("USO is not known to this kernel (6.2 has it)")
        sock.bind((ours, 0))
        sock.settimeout(2)
        port = sock.getsockname()[1]

        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sock.sendto(b"x" * 5500, (theirs, 9))
        vnet, packet = receive(device)
        assert (vnet.gso_type, vnet.gso_size) == (GSO_UDP_L4, 1000)
        assert len(packet) == header + 8 + 5500
        assert drain(device) == []

        data = bytes(range(250)) * 10
        start = pseudo_sum(theirs, ours, 17, 8 + len(data))
        udp = struct.pack("!HHHH", 9, port, 8 + len(data), start) + data
        vnet = VnetHeader(NEEDS_CSUM, GSO_UDP_L4, header + 8, 1000, header, 6)
        write(device, ip_packet(theirs, ours, 17, udp), vnet)
        assert [sock.recv(9000) for _ in range(3)] == [data[:1000], data[1000:2000], data[2000:]]


@isolated
def test_no_super_packet_is_above_what_one_udp_message_takes() -> None:
    with (
        opened() as device,
        apply(the_plan()),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        if not device.offload.udp:
            pytest.skip("USO is not known to this kernel (6.2 has it)")
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1300)
        sock.sendto(b"x" * 49 * 1300, ("10.88.0.2", 9))  # 63700
        messages = drain(device)
        assert sum(len(packet) for _, packet in messages) > 49 * 1300
        assert max(len(packet) for _, packet in messages) <= 60000


@isolated
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (0x7F, Offload(tcp=True, udp=True)),
        (0x0F, Offload(tcp=True, udp=False)),  # Linux before 6.2
        (0x00, Offload(tcp=False, udp=False)),
    ],
)
def test_an_older_kernel_has_fewer_offloads(
    known: int, expected: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.ioctl

    def ioctl(descriptor: int, request: int, argument: Any) -> Any:
        if request == tun.linux._TUNSETOFFLOAD and argument & ~known:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with opened() as device, apply(the_plan()):
        assert device.offload == expected
        write(device, echo_request("10.88.0.2", "10.88.0.1", b"martlet"))
        vnet, packet = receive(device)
        assert packet.endswith(b"martlet")
        assert vnet.gso_type == 0


def run_in_uvloop(main: Callable[[], Any]) -> None:
    uvloop.run(main())


def run_in_asyncio(main: Callable[[], Any]) -> None:
    asyncio.run(main())


@isolated
@pytest.mark.parametrize("run", [run_in_uvloop, run_in_asyncio])
def test_inside_a_running_event_loop(run: Callable[[Callable[[], Any]], None]) -> None:
    async def main() -> None:
        arrived = asyncio.Event()
        with opened() as device, apply(the_plan()):
            loop = asyncio.get_running_loop()
            loop.add_reader(device.fileno(), arrived.set)
            write(device, echo_request("10.88.0.2", "10.88.0.1", b"martlet"))
            await asyncio.wait_for(arrived.wait(), 2)
            assert read(device)[1].endswith(b"martlet")
            loop.remove_reader(device.fileno())
        assert "mt0" not in interfaces()

    run(main)


@isolated
def test_no_descriptors_are_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with opened(), apply(the_plan()):
        pass
    before = descriptors()
    for _ in range(5):
        with opened(), apply(the_plan()):
            pass
        with pytest.raises(TunError):
            LinuxTun.open("lo", 1420)
    assert descriptors() == before


@pytest.mark.parametrize("code", [errno.EBADFD, errno.EIO, errno.EFAULT])
def test_the_errors_of_a_removed_device(code: int) -> None:
    assert read_failure("mt0", code).kind == "gone"


def test_any_other_error_of_a_read() -> None:
    error = read_failure("mt0", errno.ENOMEM)
    assert error.kind == "system"
    assert str(error) == f"cannot read from mt0: {os.strerror(errno.ENOMEM)}"


def test_errors_of_the_kernel_that_have_no_name_of_their_own() -> None:
    error = tun.linux._explain(OSError(errno.ENFILE, "Too many open files"), "mt0")
    assert error.kind == "system"
    assert "mt0" in str(error)
