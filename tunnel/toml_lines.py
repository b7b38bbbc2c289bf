"""Finding the line of a TOML file that a value came from, which tomllib does not tell.

This reads lines, not TOML: good enough to point a person to the right place, and None where in
doubt. It is run on text that tomllib has accepted, and only to word an error.
"""

from __future__ import annotations

import re

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]#=]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*=""")

KeyPath = tuple[str | int, ...]
"""Such as ("peer", 1, "allowed_ips", 0): table names and keys, and 0-based indices of arrays."""


def find_line(text: str, path: KeyPath, value: str | None = None) -> int | None:
    """The 1-based line of a key path, or of the innermost part of it that stands in the text.

    `value`, where given, is looked for from the key on, to tell the elements of an array that is
    spread over several lines.
    """
    if not path:
        return None
    lines = text.splitlines()
    table, rest = _split(path)
    start = _find_table(lines, table)
    if start is None:  # a key before the first header
        start, rest = 0, path
    end = next((n for n in range(start, len(lines)) if _HEADER.match(lines[n])), len(lines))
    for number in range(start, end):
        if rest and _key(lines[number]) == rest[0]:
            return _find_value(lines[number:end], value) + number + 1
    return start or None


def _find_value(lines: list[str], value: str | None) -> int:
    """Which of the lines, the first of which has the key, holds the value; 0 in doubt."""
    for number, line in enumerate(lines):
        if number > 0 and _key(line) is not None:
            break
        if value is not None and value in line:
            return number
    return 0


def _split(path: KeyPath) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """The part of a path that a header names, and the rest: ours are at most one table deep."""
    if len(path) >= 2 and isinstance(path[1], int):
        return path[:2], path[2:]
    return path[:1], path[1:]


def _find_table(lines: list[str], table: tuple[str | int, ...]) -> int | None:
    """The 1-based line of a table's header, which is the 0-based line of what follows."""
    skip = table[1] if len(table) == 2 else 0
    assert isinstance(skip, int)
    for number, line in enumerate(lines, 1):
        match = _HEADER.match(line)
        if match and match[2].strip("\"'") == table[0]:
            if skip == 0:
                return number
            skip -= 1
    return None


def _key(line: str) -> str | None:
    match = _KEY.match(line)
    return None if match is None else next(group for group in match.groups() if group is not None)
