"""The native engine through its binding alone: two connections that share keys, and no aioquic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aioquic.buffer import Buffer
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.unit.quic_pair import EVERYTHING
from tunnel.datapath.engine import Datapath
from tunnel.datapath.native.engine import CIPHERS, Connection, Path, Report

START = 1000.0
MTU = 1200
INITIAL_RTT = 0.1
CID = 8
NUMBER = 4  # bytes
TAG = 16
DATA_OVERHEAD = 1 + CID + NUMBER + TAG + 2
"""Bytes of a packet around an IP packet: header, tag, frame type, kind."""


@dataclass(frozen=True)
class Secret:
    """The keys of one direction."""

    key: bytes
    iv: bytes
    hp: bytes

    @classmethod
    def of(cls, number: int) -> Secret:
        return cls(bytes([number]) * 16, bytes([number + 1]) * 12, bytes([number + 2]) * 16)

    def open(self, packet: bytes) -> tuple[int, bytes, bytes]:
        """Number, connection ID and frames of a packet whose number has four bytes."""
        sample = packet[1 + CID + 4 :][:16]
        mask = Cipher(algorithms.AES(self.hp), modes.ECB()).encryptor().update(sample)
        first = packet[0] ^ mask[0] & 0x1F
        assert first & 0x1B == 0x03, "no reserved bits, four bytes of number"
        number = bytes(a ^ b for a, b in zip(packet[1 + CID :][:NUMBER], mask[1:], strict=False))
        header = bytes([first]) + packet[1 : 1 + CID] + number
        value = int.from_bytes(number)
        nonce = (int.from_bytes(self.iv) ^ value).to_bytes(12)
        plain = AESGCM(self.key).decrypt(nonce, packet[len(header) :], header)
        return value, packet[1 : 1 + CID], plain


class End:
    """One engine with one connection, a lane and a first path."""

    def __init__(self, datapath: Datapath, cid: bytes, peer_cid: bytes) -> None:
        self.datapath = datapath
        self.engine = datapath.engine
        self.cid, self.peer_cid = cid, peer_cid
        self.lane = datapath.lane(0, 1)
        self.connection: Connection = datapath.connection()
        self.path = self.add_path()
        self.path.expect(cid)
        self.connection.set_host_cids([cid])
        self.connection.attach(self.lane)

    def add_path(self) -> Path:
        path = self.connection.add_path(MTU, INITIAL_RTT)
        path.limited = False
        path.set_cid(self.peer_cid)
        path.set_rate(1 << 30, 0.0)
        return path

    def start(self, seal: Secret, open_: Secret) -> None:
        self.seals, self.opens = seal, open_
        self.connection.start(
            CIPHERS["AES_128_GCM"],
            *(seal.key, seal.iv, seal.hp),
            *(open_.key, open_.iv, open_.hp),
            0,
            START,
        )
        self.connection.configure(max_ack_delay=0.005)

    def send(self, *packets: bytes, now: float) -> list[bytes]:
        """IP packets out of the TUN; the datagrams that leave at once."""
        for packet in packets:
            self.lane.push(packet, now)
        return self.flush(now)

    def flush(self, now: float) -> list[bytes]:
        out = []
        while self.connection.seal(now):
            out += [data for _, data in self.engine.take_sealed()]
        return out + [data for _, data in self.engine.take_sealed()]

    def craft(self, number: int, frames: bytes) -> bytes:
        """A packet of this end with any content."""
        header = b"\x41" + self.peer_cid + (number & 0xFFFF).to_bytes(2)
        return self.connection.seal_foreign(number, header, 2, frames)

    def receive(self, *datagrams: bytes, now: float, path: Path | None = None) -> list[bytes]:
        """IP packets that come out."""
        for data in datagrams:
            self.connection.receive(path or self.path, data, now)
        return self.datapath.take_delivered()

    def reports(self, now: float) -> list[Report]:
        found = []
        while (report := self.connection.take(now)) is not None:
            found.append(report)
        return found

    def settled(self, now: float) -> tuple[set[int], set[int]]:
        """Numbers of our own packets that were acknowledged, and that were lost."""
        acked: set[int] = set()
        lost: set[int] = set()
        for report in self.reports(now):
            acked.update(report.acked or ())
            lost.update(report.lost or ())
        return acked, lost

    def error(self, now: float) -> int | None:
        codes = [report.error[0] for report in self.reports(now) if report.error is not None]
        return codes[0] if codes else None


def ends(near: Datapath | None = None, far: Datapath | None = None) -> tuple[End, End]:
    one = End(near or Datapath([EVERYTHING]), b"near-cid", b"far--cid")
    two = End(far or Datapath([EVERYTHING]), b"far--cid", b"near-cid")
    one.start(Secret.of(1), Secret.of(11))
    two.start(Secret.of(11), Secret.of(1))
    return one, two


def varint(value: int) -> bytes:
    buf = Buffer(capacity=8)
    buf.push_uint_var(value)
    return buf.data


def ack(numbers: Iterable[int], delay: int = 0) -> bytes:
    """An ACK frame behind its type; `delay` as it stands in the frame."""
    ranges = to_ranges(numbers)
    low, high = ranges[0]
    out = varint(high) + varint(delay) + varint(len(ranges) - 1) + varint(high - low)
    for next_low, next_high in ranges[1:]:
        out += varint(low - next_high - 2) + varint(next_high - next_low)
        low = next_low
    return out


def to_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Lowest and highest of each run, the highest run first."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers), reverse=True):
        if ranges and ranges[-1][0] == number + 1:
            ranges[-1] = (number, ranges[-1][1])
        else:
            ranges.append((number, number))
    return ranges


def read_ack(plain: bytes) -> tuple[list[tuple[int, int]], int, bytes]:
    """Ranges and delay of the ACK frame that a packet begins with, and what follows."""
    buf = Buffer(data=plain)
    assert buf.pull_uint_var() == 2
    high = buf.pull_uint_var()
    delay, count = buf.pull_uint_var(), buf.pull_uint_var()
    low = high - buf.pull_uint_var()
    ranges = [(low, high)]
    for _ in range(count):
        high = low - buf.pull_uint_var() - 2
        low = high - buf.pull_uint_var()
        ranges.append((low, high))
    return ranges, delay, plain[buf.tell() :]


def expand(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {number for low, high in ranges for number in range(low, high + 1)}
