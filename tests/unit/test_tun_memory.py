"""tun.memory: the twin behaves as the device of the port."""

import os
import select

import pytest

from tun.device import VNET_SIZE, Offload, TunDevice, VnetHeader
from tun.memory import MemoryHost, MemoryTun

SUPER = VnetHeader(flags=1, gso_type=1, hdr_len=40, gso_size=1380, csum_start=20, csum_offset=16)


def packet(number: int = 0, size: int = 20) -> bytes:
    return bytes([0x45, number]) + bytes(size - 2)


def write(device: TunDevice, data: bytes, vnet: VnetHeader = VnetHeader()) -> None:  # noqa: B008
    """As the engine does it."""
    assert os.writev(device.fileno(), [vnet.pack(), data]) == VNET_SIZE + len(data)


def read(device: TunDevice) -> tuple[VnetHeader, bytes]:
    message = os.read(device.fileno(), 1 << 17)
    return VnetHeader.unpack(message), message[VNET_SIZE:]


def readable(end: TunDevice | MemoryHost) -> bool:
    return bool(select.select([end.fileno()], [], [], 0)[0])


def test_the_header_is_that_of_virtio() -> None:
    assert VNET_SIZE == 10
    assert SUPER.pack()[:2] == b"\x01\x01"
    assert int.from_bytes(SUPER.pack()[4:6], "little") in (1380, 1380 << 8 & 0xFFFF | 1380 >> 8)
    assert VnetHeader.unpack(SUPER.pack() + b"more") == SUPER
    assert VnetHeader().pack() == bytes(10)


def test_what_the_host_writes_the_device_reads_one_message_each_in_order() -> None:
    device, host = MemoryTun.pair()
    assert host.write([packet(1), packet(2, 1420)]) == 2
    assert read(device) == (VnetHeader(), packet(1))
    assert read(device) == (VnetHeader(), packet(2, 1420))
    with pytest.raises(BlockingIOError):
        read(device)
    device.close()
    host.close()


def test_what_the_device_writes_the_host_reads_without_headers() -> None:
    device, host = MemoryTun.pair()
    for number in range(3):
        write(device, packet(number))
    assert host.read(2) == [packet(0), packet(1)]
    assert host.read(2) == [packet(2)]
    assert host.read(2) == []
    device.close()
    host.close()


def test_super_packets_pass_whole_with_their_header() -> None:
    device, host = MemoryTun.pair()
    assert host.write_super(SUPER, packet(7, 65535))
    assert read(device) == (SUPER, packet(7, 65535))
    write(device, packet(8, 65535), SUPER)
    write(device, packet(9, 60000), SUPER)
    assert host.read_super() == (SUPER, packet(8, 65535))
    assert host.read(5) == [packet(9, 60000)]
    assert host.read_super() is None
    device.close()
    host.close()


def test_the_descriptors_are_readable_while_packets_wait() -> None:
    device, host = MemoryTun.pair()
    assert not readable(device)
    assert not readable(host)
    host.write([packet(1), packet(2)])
    assert readable(device)
    read(device)
    assert readable(device)
    read(device)
    assert not readable(device)
    write(device, packet())
    assert readable(host)
    device.close()
    host.close()


def test_a_burst_fits_and_a_full_queue_drops_the_newest_and_counts() -> None:
    device, host = MemoryTun.pair()
    assert host.write([packet(size=1420)] * 100) == 100
    taken = host.write([packet(1, 1420)] * 10_000)
    assert 0 < taken < 10_000
    assert host.dropped == 10_000 - taken
    for _ in range(100):
        assert read(device) == (VnetHeader(), packet(size=1420))
    assert host.write([packet()]) == 1
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            write(device, packet(size=1420))
    device.close()
    host.close()


@pytest.mark.parametrize("bad", [b"", b"\x00" * 20, b"\x15" * 20, packet(size=1421)])
def test_the_host_sends_no_other_thing_than_packets(bad: bytes) -> None:
    device, host = MemoryTun.pair(mtu=1420)
    assert host.write([bad, packet(size=1420)]) == 1
    assert host.dropped == 1
    assert read(device)[1] == packet(size=1420)
    device.close()
    host.close()


@pytest.mark.parametrize("bad", [b"\x00" * 20, b"\x15", b""])
def test_the_host_takes_no_other_thing_than_packets(bad: bytes) -> None:
    device, host = MemoryTun.pair()
    write(device, bad)
    os.write(device.fileno(), b"\0")
    write(device, packet(1))
    assert host.read(1) == [packet(1)]
    assert host.refused == 2
    device.close()
    host.close()


def test_after_the_device_closed_nothing_comes_and_nothing_goes() -> None:
    device, host = MemoryTun.pair(name="mt7", mtu=1280, offload=Offload(tcp=True, udp=False))
    twin: TunDevice = device
    assert (twin.name, twin.mtu, twin.offload) == ("mt7", 1280, Offload(tcp=True, udp=False))
    write(device, packet(3))
    device.close()
    device.close()
    assert device.fileno() == -1
    assert host.read(9) == [packet(3)]
    assert host.read(9) == []
    assert host.write([packet()]) == 0
    assert host.dropped == 1
    host.close()


def test_after_the_host_closed_the_device_reads_the_end() -> None:
    device, host = MemoryTun.pair()
    host.write([packet(4)])
    host.close()
    host.close()
    assert read(device) == (VnetHeader(), packet(4))
    assert os.read(device.fileno(), 100) == b""
    with pytest.raises(BrokenPipeError):
        write(device, packet())
    device.close()
