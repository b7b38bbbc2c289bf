"""The shape of a configuration file: its tables, keys and TOML types, and words for misfits.

Values that need parsing are strings here; `tunnel.config` makes the validated ones of them.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import msgspec
from msgspec import Struct

from tunnel.toml_lines import KeyPath

DEFAULT_MTU = 1420
"""Bytes. As WireGuard's: leaves room for the tunnel's headers on Ethernet, also over IPv6."""


class RawInterface(Struct, forbid_unknown_fields=True):
    name: str
    address: list[str]
    private_key: str
    mtu: int = DEFAULT_MTU
    listen_port: int = 0


class RawPeer(Struct, forbid_unknown_fields=True):
    name: str
    public_key: str
    allowed_ips: list[str]
    endpoint: str | list[str] = []
    bench: bool = True


class RawTurn(Struct, forbid_unknown_fields=True):
    url: str
    username: str | None = None
    password_file: str | None = None


class RawRendezvous(Struct, forbid_unknown_fields=True):
    url: str | list[str]
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None


class RawIce(Struct, forbid_unknown_fields=True):
    stun: list[str] = []
    advertise: list[str] = []
    turn: list[RawTurn] = []
    port_mapping: bool = True
    exclude_interfaces: list[str] = []


class RawPaths(Struct, forbid_unknown_fields=True):
    redundancy: str = "interactive"
    metered: list[str] = []


class RawFile(Struct, forbid_unknown_fields=True):
    interface: RawInterface
    peer: list[RawPeer] = []
    rendezvous: RawRendezvous | None = None
    ice: RawIce = msgspec.field(default_factory=RawIce)
    paths: RawPaths = msgspec.field(default_factory=RawPaths)


_SHAPES: dict[tuple[str, ...], type[Struct]] = {
    (): RawFile,
    ("interface",): RawInterface,
    ("peer",): RawPeer,
    ("rendezvous",): RawRendezvous,
    ("ice",): RawIce,
    ("ice", "turn"): RawTurn,
    ("paths",): RawPaths,
}

_EXAMPLES = {
    ("interface",): "[interface]",
    ("interface", "name"): 'name = "mt0"',
    ("interface", "address"): 'address = ["10.88.0.1/24"]',
    ("interface", "mtu"): f"mtu = {DEFAULT_MTU}",
    ("interface", "private_key"): 'private_key = "/etc/martlet/id_ed25519"',
    ("interface", "listen_port"): "listen_port = 4117",
    ("peer",): "[[peer]]",
    ("peer", "name"): 'name = "office"',
    ("peer", "public_key"): 'public_key = "ssh-ed25519 AAAA... office"',
    ("peer", "endpoint"): 'endpoint = "198.51.100.7:4117"',
    ("peer", "allowed_ips"): 'allowed_ips = ["10.88.0.2/32"]',
    ("peer", "bench"): "bench = false",
    ("rendezvous",): "[rendezvous]",
    ("rendezvous", "url"): 'url = "mqtts://broker.example:8883"',
    ("rendezvous", "username"): 'username = "alice"',
    ("rendezvous", "password_file"): 'password_file = "/etc/martlet/broker"',
    ("rendezvous", "ca_file"): 'ca_file = "/etc/martlet/broker-ca.pem"',
    ("ice",): "[ice]",
    ("ice", "stun"): 'stun = ["stun.example:3478"]',
    ("ice", "advertise"): 'advertise = ["203.0.113.9:4117"]',
    ("ice", "turn"): 'turn = [{ url = "turn:turn.example:3478" }]',
    ("ice", "turn", "url"): 'url = "turn:turn.example:3478"',
    ("ice", "turn", "username"): 'username = "alice"',
    ("ice", "turn", "password_file"): 'password_file = "/etc/martlet/turn"',
    ("ice", "port_mapping"): "port_mapping = false",
    ("ice", "exclude_interfaces"): 'exclude_interfaces = ["docker*"]',
    ("paths",): "[paths]",
    ("paths", "redundancy"): 'redundancy = "interactive"',
    ("paths", "metered"): 'metered = ["wwan*"]',
}

_TYPE_NAMES = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a table",
    "str": "a string",
}


class Misfit(NamedTuple):
    """What is wrong with the shape, where, and what to do."""

    path: KeyPath
    problem: str
    remedy: str


def explain(message: str) -> Misfit:
    """A validation error of msgspec for `RawFile`, in the user's words."""
    problem, _, at = message.partition(" - at `$")
    path: KeyPath = tuple(
        int(index) if index else name for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", at)
    )
    names = _names(path)
    if found := re.search(r"contains unknown field `(.*)`", problem, re.DOTALL):
        known = _SHAPES[names].__struct_fields__
        close = difflib.get_close_matches(found[1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return Misfit((*path, found[1]), "unknown key", hint)
    if found := re.search(r"missing required field `(.*)`", problem):
        path = (*path, found[1])
        return Misfit(path, "missing", f"add for example `{example(path)}`")
    remedy = f"write for example `{example(path)}`"
    if found := re.search(r"Expected `(.*?)`, got `(.*?)`", problem):
        if path == ("peer",) and found[2] == "object":
            return Misfit(path, "this is one table", "write [[peer]], with two pairs of brackets")
        problem = f"expected {_type_names(found[1])}, got {_type_names(found[2])}"
    return Misfit(path, problem, remedy)


def example(path: KeyPath) -> str:
    """A line of TOML as it could stand at this place."""
    return _EXAMPLES[_names(path)]


def _names(path: KeyPath) -> tuple[str, ...]:
    return tuple(part for part in path if isinstance(part, str))


def _type_names(types: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in types.split(" | ") if name != "null")
