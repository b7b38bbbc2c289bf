"""The code of an invitation: what one host shows, and another one is given, to join.

::

    code = "martlet-", then base32 (RFC 4648 section 6) of
           version (1 byte: 1), the inviter's raw public key (32), the secret (16),
           number of broker URLs (1), each as its length (1) and that many bytes of ASCII,
           checksum: the first 4 bytes of SHA-256 over a context string and all before

It is one line of about 130 characters, most often copied or scanned, sometimes read out. So case,
blanks, line breaks and dashes do not matter, digits that base32 lacks are read as the letters they
look like, and the checksum tells a typing error from a code that nobody answers to.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field

from tunnel.config_values import check_mqtt_url
from tunnel.errors import MartletError

SECRET_LENGTH = 16  # bytes: nobody guesses it in ten minutes, or ever
MAX_URLS = 4
MAX_URL = 255
"""Characters, so that the length fits a byte."""
_MAX_TEXT = 4096
"""Characters that are looked at at all; four URLs of full length make 1,730."""

_PREFIX = "martlet"
_VERSION = 1
_KEY = 32
_CHECKSUM = 4
_CONTEXT = b"martlet/1 code"
_URL = re.compile(r"[!-~]{1,255}")
_LOOKALIKES = str.maketrans("018", "olb")


class CodeError(MartletError):
    """The text is not the code of an invitation."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class InviteCode:
    """What a code says. Construction raises ValueError for what does not fit in one."""

    inviter: bytes
    """Raw public key."""
    secret: bytes = field(repr=False)
    urls: tuple[str, ...]
    """Of the brokers."""

    def __post_init__(self) -> None:
        if len(self.inviter) != _KEY or len(self.secret) != SECRET_LENGTH:
            raise ValueError("a key or a secret of another length")
        if not 1 <= len(self.urls) <= MAX_URLS:
            raise ValueError(f"{len(self.urls)} broker URLs; a code holds 1 to {MAX_URLS}")
        for url in self.urls:
            check_url(url)

    @classmethod
    def parse(cls, text: str) -> InviteCode:
        """Raises CodeError, which says what to do."""
        compact = re.sub(r"[\s-]", "", text[:_MAX_TEXT]).lower()
        if not compact.startswith(_PREFIX):
            raise CodeError(
                "this is not the code of an invitation",
                remedy=f"give all that `martlet invite` printed, from {_PREFIX}- on",
            )
        digits = compact[len(_PREFIX) :].translate(_LOOKALIKES)
        try:
            raw = base64.b32decode(digits.upper() + "=" * (-len(digits) % 8))
        except ValueError:  # binascii.Error is one, and text beyond ASCII raises a plain one
            raw = b""
        body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
        if not body or checksum != _checksum(body):
            raise CodeError(
                "the code has a typing error, or a part of it is missing",
                remedy="copy it again, all of it",
            )
        if body[0] != _VERSION:
            raise CodeError(
                "the code was made by a newer martlet", remedy="install that version here, too"
            )
        try:
            return cls._read(body[1:])
        except (ValueError, IndexError):  # its maker's fault, as the checksum is right
            raise CodeError(
                "the code is malformed", remedy="make another one with `martlet invite`"
            ) from None

    @classmethod
    def _read(cls, body: bytes) -> InviteCode:
        position = _KEY + SECRET_LENGTH + 1
        urls: list[str] = []
        for _ in range(body[position - 1]):
            end = position + 1 + body[position]
            urls.append(body[position + 1 : end].decode("ascii"))
            position = end
        if position != len(body):
            raise ValueError("something else follows, or is missing")
        return cls(body[:_KEY], body[_KEY : _KEY + SECRET_LENGTH], tuple(urls))

    def __str__(self) -> str:
        body = bytes([_VERSION]) + self.inviter + self.secret + bytes([len(self.urls)])
        for url in self.urls:
            body += bytes([len(url)]) + url.encode("ascii")
        digits = base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()
        return f"{_PREFIX}-{digits}"


def check_url(url: str) -> str:
    """A broker's URL that may come from elsewhere: bounded, and nothing but visible ASCII, as it
    ends up in a configuration. Raises ValueError."""
    if not _URL.fullmatch(url):
        raise ValueError(f"this is not a URL of at most {MAX_URL} visible ASCII characters")
    return check_mqtt_url(url)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(_CONTEXT + body).digest()[:_CHECKSUM]
