"""Configuration files as text: new ones that a person likes to read, and additions to old ones.

Pure: text in, text out. What a user wrote stays as it is, with comments and formatting; what is
added says in a comment what it is. An addition is read back and compared with what was meant, so
that unusual, but valid, TOML is refused rather than spoilt.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from tunnel.config import Endpoint, IPInterface, IPNetwork
from tunnel.errors import ConfigError
from tunnel.identity import PublicKey
from tunnel.toml_lines import find_line

MAX_NAME = 64
"""Characters of a peer's name."""


class Peer(Struct, frozen=True, kw_only=True):
    """A [[peer]] block."""

    name: str
    public_key: PublicKey
    allowed_ips: tuple[IPNetwork, ...]
    comment: str = ""
    """Where it comes from: one line, or none."""


class Rendezvous(Struct, frozen=True, kw_only=True):
    """A [rendezvous] section."""

    url: tuple[str, ...]
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None


class Turn(Struct, frozen=True, kw_only=True):
    """One of [ice] turn."""

    url: str
    username: str | None = None
    password_file: Path | None = None


class Fresh(Struct, frozen=True, kw_only=True):
    """A whole new file."""

    title: str
    """What made it, and when: the first line."""
    interface: str
    address: tuple[IPInterface, ...]
    private_key: Path
    rendezvous: Rendezvous
    stun: tuple[Endpoint, ...] = ()
    turn: tuple[Turn, ...] = ()
    peer: Peer


def fresh(file: Fresh) -> str:
    """The text of a new file."""
    lines = [
        f"# {file.title}",
        "# Yours to edit: README.md of martlet tells all that may stand here.",
        "",
        "[interface]",
        f"name = {_string(file.interface)}",
        "# This host inside the tunnel. The IPv6 address follows from its key, and stays.",
        f"address = {_strings(file.address)}",
        "# Who this host is. Never leaves it.",
        f"private_key = {_string(file.private_key)}",
        "",
        *_rendezvous(file.rendezvous),
        *_ice(file.stun, file.turn),
        "",
        *_peer(file.peer),
    ]
    return "\n".join(lines) + "\n"


def with_peer(text: str, peer: Peer) -> str:
    """The same, and a [[peer]] at the end. Raises ConfigError where it must be done by hand."""
    block = "\n".join(_peer(peer))
    wanted = _parsed(text)
    if isinstance(wanted.setdefault("peer", []), list):
        wanted["peer"].append(tomllib.loads(block)["peer"][0])
    return _checked(_appended(text, block), wanted, f"a peer to it yourself:\n{block}")


def with_rendezvous(text: str, rendezvous: Rendezvous) -> str:
    """The same, and a [rendezvous] at the end. Raises ConfigError where there is one already."""
    block = "\n".join(_rendezvous(rendezvous))
    wanted = tomllib.loads(block) | _parsed(text)
    return _checked(_appended(text, block), wanted, f"a rendezvous to it yourself:\n{block}")


def with_addresses(text: str, addresses: Sequence[IPInterface]) -> str:
    """The same, and these behind the others of [interface]. Raises ConfigError as above."""
    added = [str(address) for address in addresses]
    if not added:
        return text
    wanted = _parsed(text)
    wanted["interface"]["address"] += added
    by_hand = f"to address of [interface] yourself: {', '.join(map(_string, added))}"
    line = find_line(text, ("interface", "address"))
    lines = text.splitlines(keepends=True)
    start = sum(map(len, lines[: (line or 1) - 1]))
    end = _end_of_last_string(text, start)
    if end is None:
        raise _too_unusual(by_hand)
    changed = text[:end] + "".join(f", {_string(each)}" for each in added) + text[end:]
    return _checked(changed, wanted, by_hand)


def host_name(raw: str) -> str:
    """A name fit for a peer, out of a host's name or whatever else somebody calls it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", raw).lstrip("-")[:MAX_NAME].rstrip("-.")
    return name or "peer"


def unique_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, fit for a peer, with a number where another peer has that name."""
    name = host_name(wanted)
    number, unique = 1, name
    while unique in taken:
        number += 1
        ending = f"-{number}"
        unique = name[: MAX_NAME - len(ending)] + ending
    return unique


# sections, as lines


def _peer(peer: Peer) -> list[str]:
    return [
        *([f"# {peer.comment}"] if peer.comment else []),
        "[[peer]]",
        f"name = {_string(peer.name)}",
        f"public_key = {_string(peer.public_key.openssh)}",
        "# What is sent there, and all that is accepted from there.",
        f"allowed_ips = {_strings(peer.allowed_ips)}",
    ]


def _rendezvous(section: Rendezvous) -> list[str]:
    url = section.url[0] if len(section.url) == 1 else None
    return [
        "# Where hosts meet that do not know where the other is. All is sealed from it.",
        "[rendezvous]",
        f"url = {_strings(section.url) if url is None else _string(url)}",
        *_if_any("username", section.username),
        *_if_any("password_file", section.password_file),
        *_if_any("ca_file", section.ca_file),
    ]


def _ice(stun: Sequence[Endpoint], turn: Sequence[Turn]) -> list[str]:
    if not stun and not turn:
        return []
    lines = ["", "[ice]"]
    if stun:
        lines += ["# They tell this host how it looks from outside.", f"stun = {_strings(stun)}"]
    if turn:
        lines.append("# Relays, for when there is no direct way.")
        tables = [f"    {_turn(each)}," for each in turn]
        lines += ["turn = [", *tables, "]"]
    return lines


def _turn(turn: Turn) -> str:
    pairs = [
        f"url = {_string(turn.url)}",
        *_if_any("username", turn.username),
        *_if_any("password_file", turn.password_file),
    ]
    return f"{{ {', '.join(pairs)} }}"


def _if_any(key: str, value: object) -> list[str]:
    return [] if value is None else [f"{key} = {_string(value)}"]


def _strings(values: Iterable[object]) -> str:
    return f"[{', '.join(map(_string, values))}]"


def _string(value: object) -> str:
    """A basic string of TOML: what is not printable is escaped, so that it is one line."""
    text = str(value)
    escaped = (
        f"\\{char}"
        if char in '"\\'
        else char
        if char.isprintable()
        else f"\\u{ord(char):04x}"
        if ord(char) < 0x10000
        else f"\\U{ord(char):08x}"
        for char in text
    )
    return f'"{"".join(escaped)}"'


# additions


def _appended(text: str, block: str) -> str:
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}\n{block}\n"


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # whoever calls has read it before
        raise ConfigError(f"this is not TOML: {error}") from None


def _checked(text: str, wanted: dict[str, Any], by_hand: str) -> str:
    """`text`, if it says what is wanted."""
    try:
        found = tomllib.loads(text)
    except ValueError:
        found = {}
    if found != wanted:
        raise _too_unusual(by_hand)
    return text


def _too_unusual(by_hand: str) -> ConfigError:
    return ConfigError(
        "the file is written in a way that martlet does not dare to edit",
        remedy=f"add {by_hand}",
    )


_TOKEN = re.compile(r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[\]]""")


def _end_of_last_string(text: str, start: int) -> int | None:
    """Where the last string of the array ends that begins somewhere from `start` on."""
    last = None
    depth = 0
    for found in _TOKEN.finditer(text, start):
        token = found[0]
        if token == "[":
            depth += 1
        elif token == "]":
            return last
        elif token[0] in "\"'" and depth:
            last = found.end()
    return None
