"""A TURN server without I/O, as much of RFC 8656 as tests want, and able to misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aioice import stun

from tunnel.ice.turn_message import CHANNEL_HEADER, channel_data, long_term_key, parse
from tunnel.path.network import Address

USER, PASSWORD, REALM = "martlet", "swallow", "martlet.test"
RELAYED = Address("192.0.2.200", 50000)
RELAYED6 = Address("2001:db8:99::1", 50000)
MAPPED = Address("203.0.113.7", 7777)


class ScriptedServer:
    """Serves one client. `stream`: whether what it sends is padded, as in a stream."""

    def __init__(self, *, stream: bool = False) -> None:
        self.stream = stream
        self.password: str | None = PASSWORD
        self.nonce = b"nonce-1"
        self.ipv6 = True
        self.lifetime = 600
        self.relayed: Address | None = RELAYED
        self.allocated = False
        self.permissions: set[str] = set()
        self.channels: dict[int, Address] = {}
        self.errors: dict[stun.Method, int] = {}
        """What every request of a method is answered with."""
        self.unsigned = False
        """Errors of that kind are not signed."""
        self.elsewhere: Address | None = None
        self.asked: list[stun.Message] = []
        self.sent: list[tuple[Address, bytes]] = []
        """Datagrams that left for peers."""
        self.dropped: list[tuple[Address, bytes]] = []
        """Datagrams for peers without a permission."""
        self.on_request: Callable[[stun.Message], None] = lambda message: None

    def count(self, method: stun.Method) -> int:
        return sum(message.message_method is method for message in self.asked)

    def restart(self) -> None:
        """All is forgotten."""
        self.allocated = False
        self.permissions.clear()
        self.channels.clear()

    def receive(self, data: bytes) -> list[bytes]:
        """A message of the client; returns the answers."""
        if data[0] & 0xC0 == 0x40:
            number, length = CHANNEL_HEADER.unpack_from(data)
            if number in self.channels and self.allocated:
                self._pass(self.channels[number], data[4 : 4 + length])
            return []
        message = parse(data)
        assert message is not None, "the client sends what is no message"
        if message.message_class is stun.Class.INDICATION:
            assert message.message_method is stun.Method.SEND
            remote = Address(*message.attributes["XOR-PEER-ADDRESS"])
            if self.allocated:
                self._pass(remote, message.attributes["DATA"])
            return []
        self.asked.append(message)
        self.on_request(message)
        return [self._answer(message)]

    def _pass(self, remote: Address, data: bytes) -> None:
        granted = remote.host in self.permissions
        (self.sent if granted else self.dropped).append((remote, data))

    def from_peer(self, remote: Address, data: bytes) -> bytes | None:
        """A datagram of a peer at the relayed address: what the client is sent, if anything."""
        if not self.allocated or remote.host not in self.permissions:
            return None
        for number, peer in self.channels.items():
            if peer == remote:
                return channel_data(number, data, padded=self.stream)
        message = stun.Message(
            stun.Method.DATA,
            stun.Class.INDICATION,
            b"d" * 12,
            {"XOR-PEER-ADDRESS": tuple(remote), "DATA": data},
        )
        return bytes(message)

    # ---- answers ----

    def _answer(self, message: stun.Message) -> bytes:
        method, attributes = message.message_method, message.attributes
        if self.password is not None:
            if "MESSAGE-INTEGRITY" not in attributes or attributes["USERNAME"] != USER:
                return self._challenge(message, 401)
            key = long_term_key(USER, REALM, self.password)
            if not message.check_message_integrity(key):
                return self._challenge(message, 401)
            if attributes["NONCE"] != self.nonce:
                return self._challenge(message, 438)
        code = self.errors.get(method)
        if code is not None:
            return self.error(message, code)
        match method:
            case stun.Method.ALLOCATE:
                return self._allocate(message)
            case stun.Method.REFRESH:
                if not self.allocated:
                    return self.error(message, 437)
                lifetime = attributes.get("LIFETIME", self.lifetime)
                self.allocated = lifetime > 0
                return self.success(message, {"LIFETIME": lifetime})
            case stun.Method.CREATE_PERMISSION:
                if not self.allocated:
                    return self.error(message, 437)
                self.permissions.add(attributes["XOR-PEER-ADDRESS"][0])
                return self.success(message, {})
            case stun.Method.CHANNEL_BIND:
                if not self.allocated:
                    return self.error(message, 437)
                number = attributes["CHANNEL-NUMBER"]
                remote = Address(*attributes["XOR-PEER-ADDRESS"])
                if self.channels.get(number, remote) != remote:
                    return self.error(message, 400)
                self.permissions.add(remote.host)
                self.channels[number] = remote
                return self.success(message, {})
        return self.error(message, 400)

    def _allocate(self, message: stun.Message) -> bytes:
        ipv6 = message.attributes.get("REQUESTED-ADDRESS-FAMILY") == 2
        if ipv6 and not self.ipv6:
            return self.error(message, 440)
        assert message.attributes["REQUESTED-TRANSPORT"] >> 24 == 17
        self.allocated = True
        attributes: dict[str, Any] = {"LIFETIME": self.lifetime}
        relayed = RELAYED6 if ipv6 and self.relayed is RELAYED else self.relayed
        if relayed is not None:
            attributes["XOR-RELAYED-ADDRESS"] = tuple(relayed)
        attributes["XOR-MAPPED-ADDRESS"] = tuple(MAPPED)
        return self.success(message, attributes)

    def _challenge(self, message: stun.Message, code: int) -> bytes:
        return self._reply(
            message,
            stun.Class.ERROR,
            {"ERROR-CODE": (code, ""), "REALM": REALM, "NONCE": self.nonce},
            signed=False,
        )

    def error(self, message: stun.Message, code: int) -> bytes:
        attributes: dict[str, Any] = {"ERROR-CODE": (code, "for a reason")}
        if self.elsewhere is not None:
            attributes["ALTERNATE-SERVER"] = tuple(self.elsewhere)
        return self._reply(message, stun.Class.ERROR, attributes, signed=not self.unsigned)

    def success(self, message: stun.Message, attributes: dict[str, Any]) -> bytes:
        return self._reply(message, stun.Class.RESPONSE, attributes, signed=True)

    def _reply(
        self, asked: stun.Message, kind: stun.Class, attributes: dict[str, Any], *, signed: bool
    ) -> bytes:
        message = stun.Message(asked.message_method, kind, asked.transaction_id, attributes)
        if signed and self.password is not None:
            message.add_message_integrity(long_term_key(USER, REALM, self.password))
        return bytes(message)
