"""What is in the way, and what mends it: the same words wherever they are told.

`martlet status`, `why`, `doctor` and the log meet the same obstacles. A `Reason` is what a server
failed for, as far as it matters to what is to be done; the words for what happened are made where
it happened, those for what to do are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "",
    "name",
    "refused",
    "timeout",
    "tls",
    "validity",
    "login",
    "quota",
    "unsupported",
    "protocol",
    "other",
]
"""Why a server is of no use; "" where it is. "tls": nobody whom this host trusts vouches for it;
"validity": its certificate is not yet valid, or not any more."""

RELAY_LINE = 'turn = [{ url = "turns:HOST:443", username = "...", password_file = "..." }] in [ice]'

_NOT_YET_VALID, _EXPIRED = 9, 10  # <openssl/x509_vfy.h>: X509_V_ERR_CERT_...

_CLOCK = "is the clock right? See: date -u; else its certificate has to be renewed"
_BROKER: dict[Reason, str] = {
    "name": "check the host name of url in [rendezvous]",
    "refused": "is the broker running? To run one: martlet rendezvous",
    "timeout": "is its host up? A firewall may let out only some ports: try wss://HOST:443, if the"
    " broker has it",
    "tls": 'name who signed its certificate: ca_file = "/path/to/ca.pem" in [rendezvous]',
    "validity": _CLOCK,
    "login": "check username and password_file in [rendezvous]",
    "protocol": "something else listens there: check scheme and port of the url",
}
_RELAY: dict[Reason, str] = {
    "name": "check the host name of url in [ice] turn",
    "refused": "is the server running? Check the port of its url",
    "timeout": 'is its host up? A firewall may let out only some ports: try "turns:HOST:443"',
    "tls": "add the CA of its certificate to those that this host trusts (update-ca-certificates)",
    "validity": _CLOCK,
    "login": "check username and password_file in [ice] turn",
    "quota": "each address and transport of a running tunnel takes one relay: raise the user's"
    " quota at the server (coturn: user-quota), or give each host a user of its own",
    "unsupported": "use another server",
    "protocol": "something else listens there: check scheme and port of the url",
}


def broker_remedy(reason: Reason) -> str:
    """What to do about a broker that is of no use for this reason; may be ""."""
    return _BROKER.get(reason, "")


def relay_remedy(reason: Reason) -> str:
    """The same for a TURN server."""
    return _RELAY.get(reason, "")


def certificate_reason(verify_code: int) -> Reason:
    """By what OpenSSL has against a certificate."""
    return "validity" if verify_code in (_NOT_YET_VALID, _EXPIRED) else "tls"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing in the way. `about` is stable, for programs; the words are for people."""

    about: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem

    def as_json(self) -> dict[str, Any]:
        return {"about": self.about, "problem": self.problem, "remedy": self.remedy}
