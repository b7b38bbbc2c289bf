"""tun.memory: the twin behaves as the device of the port."""

import select

import pytest

from tun.device import TunDevice
from tun.errors import TunError
from tun.memory import MemoryTun


def packet(number: int = 0, size: int = 20) -> bytes:
    return bytes([0x45, number]) + bytes(size - 2)


def readable(device: TunDevice) -> bool:
    return bool(select.select([device.fileno()], [], [], 0)[0])


def test_what_one_end_writes_the_other_reads_in_order() -> None:
    device, host = MemoryTun.pair()
    ends: tuple[TunDevice, TunDevice] = (device, host)
    for this, other in (ends, ends[::-1]):
        assert this.write([packet(1), packet(2), packet(3)]) == 3
        assert other.read(2) == [packet(1), packet(2)]
        assert other.read(2) == [packet(3)]
        assert other.read(2) == []
    device.close()
    host.close()


def test_the_descriptor_is_readable_while_packets_wait() -> None:
    device, host = MemoryTun.pair()
    assert not readable(device)
    host.write([packet(1)])
    host.write([packet(2)])
    assert readable(device)
    device.read(1)
    assert readable(device)
    device.read(1)
    assert not readable(device)
    assert not readable(host)
    device.close()
    host.close()


def test_a_full_queue_drops_the_newest_and_counts() -> None:
    device, host = MemoryTun.pair(queue=2)
    assert host.write([packet(n) for n in range(5)]) == 2
    assert host.dropped == 3
    assert device.read(10) == [packet(0), packet(1)]
    assert host.write([packet(9)]) == 1
    device.close()
    host.close()


@pytest.mark.parametrize("bad", [b"", b"\x00" * 20, b"\x15" * 20, packet(size=1421)])
def test_what_is_no_packet_is_dropped_and_the_next_one_taken(bad: bytes) -> None:
    device, host = MemoryTun.pair(mtu=1420)
    assert device.write([bad, packet(size=1420)]) == 1
    assert device.dropped == 1
    assert host.read(10) == [packet(size=1420)]
    device.close()
    host.close()


def test_after_close_nothing_comes_and_nothing_goes() -> None:
    device, host = MemoryTun.pair(name="mt7", mtu=1280)
    assert (device.name, device.mtu) == ("mt7", 1280)
    host.write([packet()])
    device.close()
    device.close()
    with pytest.raises(TunError) as caught:
        device.read(1)
    assert caught.value.kind == "gone"
    assert host.write([packet()]) == 0
    assert host.dropped == 1
    host.close()
