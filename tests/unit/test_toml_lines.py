"""Lines of key paths in TOML text."""

from __future__ import annotations

import pytest

from tunnel.toml_lines import KeyPath, find_line

TEXT = """\
top = 1

[a]   # comment [b]
x = 1
"quoted" = 2
list = [
  "one",
  "two",  # y = "one"
]
y = "two"
[[b]]
x = 1
[[b]]
'x' = 2
"""


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("top",), None, 1),
        (("a",), None, 3),
        (("a", "x"), None, 4),
        (("a", "quoted"), None, 5),
        (("a", "list"), None, 6),
        (("a", "list", 0), "one", 7),
        (("a", "list", 1), "two", 8),
        (("a", "list", 1), "absent", 6),
        (("a", "y"), "two", 10),
        (("b",), None, 11),
        (("b", 0, "x"), None, 12),
        (("b", 1), None, 13),
        (("b", 1, "x"), None, 14),
        (("b", 1, "missing"), None, 13),
        (("b", 2, "x"), None, None),
        (("missing", "x"), None, None),
        ((), None, None),
    ],
)
def test_find_line(path: KeyPath, value: str | None, line: int | None) -> None:
    assert find_line(TEXT, path, value) == line
