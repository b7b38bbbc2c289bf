"""Codes of invitations, as people copy, read out and type them."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.rendezvous.code import MAX_URLS, CodeError, InviteCode, _checksum

KEY = bytes(range(32))
SECRET = bytes(range(16))
CODE = InviteCode(KEY, SECRET, ("mqtts://broker.example:8883",))
TEXT = str(CODE)

urls = st.from_regex(
    r"(mqtt|mqtts|ws|wss)://[a-z0-9]{1,60}\.example:[1-9][0-9]{0,3}", fullmatch=True
)
codes = st.builds(
    InviteCode,
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=16, max_size=16),
    st.lists(urls, min_size=1, max_size=MAX_URLS).map(tuple),
)


def made_of(body: bytes) -> str:
    """A code with a checksum that is right, whatever it says."""
    return "martlet-" + base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()


def test_a_code_stays_what_it_is() -> None:
    assert TEXT == (
        "martlet-aeaacaqdaqcqmbyibefawdanbyhraeiscmkbkfqxdamrugy4dupb6aabaibqibiga4eascqlbqgq4dybdnwxc5"
        "duom5c6l3cojxwwzlsfzsxqylnobwgkoryha4dh4sog4cq"
    )


@given(codes)
def test_codes(code: InviteCode) -> None:
    text = str(code)
    assert InviteCode.parse(text) == code
    assert re.fullmatch(r"martlet-[a-z2-7]+", text)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.upper(),
        TEXT.title(),
        f"  {TEXT}\n",
        "\r\n".join(TEXT[n : n + 40] for n in range(0, len(TEXT), 40)),
        "-".join(TEXT[n : n + 5] for n in range(0, len(TEXT), 5)),
        " ".join(TEXT[n : n + 4] for n in range(0, len(TEXT), 4)),
        "martlet " + TEXT.removeprefix("martlet-"),
        "\u00a0" + TEXT,
    ],
    ids=["upper", "title", "blanks", "lines", "dashes", "groups", "blank for dash", "nbsp"],
)
def test_how_it_is_written_does_not_matter(text: str) -> None:
    assert InviteCode.parse(text) == CODE


def test_digits_are_read_as_the_letters_they_look_like() -> None:
    head, digits = TEXT.split("-")
    mistaken = digits.translate(str.maketrans("olb", "018"))
    assert mistaken != digits
    assert InviteCode.parse(f"{head}-{mistaken}") == CODE


def test_a_usual_code_is_short_enough_for_a_message() -> None:
    assert len(TEXT) <= 144


@given(st.data())
def test_one_wrong_character(data: st.DataObject) -> None:
    position = data.draw(st.integers(len("martlet-"), len(TEXT) - 1))
    wrong = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    text = TEXT[:position] + wrong + TEXT[position + 1 :]
    if position == len(TEXT) - 1 or wrong == TEXT[position]:
        return  # the last has spare bits: it may still say the same
    with pytest.raises(CodeError, match="typing error"):
        InviteCode.parse(text)


@given(st.integers(len("martlet-"), len(TEXT) - 2))
def test_two_exchanged_characters(position: int) -> None:
    text = list(TEXT)
    text[position], text[position + 1] = text[position + 1], text[position]
    if "".join(text) != TEXT and position < len(TEXT) - 2:
        with pytest.raises(CodeError, match="typing error"):
            InviteCode.parse("".join(text))


@given(st.integers(len("martlet"), len(TEXT) - 2))
def test_a_part(size: int) -> None:
    with pytest.raises(CodeError, match="typing error"):
        InviteCode.parse(TEXT[:size])


@given(st.one_of(st.text(max_size=300), st.text(max_size=300).map("martlet-{}".format)))
def test_any_text(text: str) -> None:
    with pytest.raises(CodeError):
        InviteCode.parse(text)


@pytest.mark.parametrize(
    "text", ["", "martlet", "ssh-ed25519 AAAA", "http://example", "martlex-aa"]
)
def test_what_is_no_code_is_told_so(text: str) -> None:
    with pytest.raises(CodeError) as raised:
        InviteCode.parse(text)
    assert raised.value.remedy
    assert raised.value.exit_code == 2


def test_a_text_without_end_is_not_read() -> None:
    with pytest.raises(CodeError):
        InviteCode.parse("martlet-" + "a" * 10_000_000)


def test_another_version_is_told_so() -> None:
    with pytest.raises(CodeError, match="newer"):
        InviteCode.parse(made_of(bytes([2]) + bytes(60)))


@pytest.mark.parametrize(
    "body",
    [
        bytes([1]),
        bytes([1]) + KEY,
        bytes([1]) + KEY + SECRET,
        bytes([1]) + KEY + SECRET + bytes([0]),
        bytes([1]) + KEY + SECRET + bytes([1]),
        bytes([1]) + KEY + SECRET + bytes([1, 14]) + b"mqtt://examplex",
        bytes([1]) + KEY + SECRET + bytes([1, 200]) + b"mqtt://example",
        bytes([1]) + KEY + SECRET + bytes([1, 14]) + b"http://example",
        bytes([1]) + KEY + SECRET + bytes([1, 14]) + b"mqtt://exampl\n",
        bytes([1]) + KEY + SECRET + bytes([1, 14]) + b"mqtt://exampl\xe4",
        bytes([1]) + KEY + SECRET + bytes([5]) + (bytes([14]) + b"mqtt://example") * 5,
    ],
)
def test_bad_content_with_a_good_checksum(body: bytes) -> None:
    with pytest.raises(CodeError, match="malformed"):
        InviteCode.parse(made_of(body))


@given(st.binary(max_size=200))
def test_any_content_with_a_good_checksum(body: bytes) -> None:
    with pytest.raises(CodeError):
        InviteCode.parse(made_of(b"\x01" + body))


@pytest.mark.parametrize(
    ("key", "secret", "names"),
    [
        (KEY[1:], SECRET, CODE.urls),
        (KEY, SECRET[1:], CODE.urls),
        (KEY, SECRET, ()),
        (KEY, SECRET, CODE.urls * (MAX_URLS + 1)),
        (KEY, SECRET, ("http://example",)),
        (KEY, SECRET, ("mqtt://" + "b" * 250,)),
        (KEY, SECRET, ("mqtt://user@example",)),
        (KEY, SECRET, ("mqtt://broker.ex\nample",)),
    ],
)
def test_what_no_code_can_say(key: bytes, secret: bytes, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        InviteCode(key, secret, names)


def test_the_secret_is_not_shown() -> None:
    assert SECRET.hex() not in repr(CODE)
    assert repr(SECRET) not in repr(CODE)
