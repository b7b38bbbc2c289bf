"""`martlet invite`: print a code, wait for who joins by it, and make it a peer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

from msgspec import Struct, structs

from cli import output
from cli.enrol import (
    Screen,
    absolute,
    addresses,
    again,
    check_name,
    finish,
    no_rendezvous,
    of_config,
    open_host,
    reload,
    rendezvous_of,
    to_config,
    write,
)
from cli.failures import FAILED, UsageError
from tunnel.config import Endpoint, IPNetwork, TurnConfig
from tunnel.config_edit import Turn
from tunnel.config_values import check_turn_url, parse_network
from tunnel.errors import ConfigError
from tunnel.identity import Identity, PublicKey
from tunnel.membership import PRIVATE, Edit, Host, Refusal, Terms, admit, check_terms
from tunnel.rendezvous.invite import Burnt, JoinAsked, Reason, TurnServer, Welcome
from tunnel.shell import joining
from tunnel.shell.config_file import locked
from tunnel.shell.secret import read_password

_T = TypeVar("_T")


class Options(Struct, frozen=True, kw_only=True):
    """The command line."""

    config: str
    rendezvous: tuple[str, ...]
    username: str | None
    password_file: Path | None
    ca_file: Path | None
    name: str | None
    peer_name: str | None
    ipv4: bool
    ipv4_network: str | None
    stun: tuple[str, ...]
    turn: tuple[str, ...]
    turn_user: str | None
    turn_password_file: Path | None
    share_relay: bool
    routes: tuple[str, ...]
    up: bool


def run(options: Options) -> int:
    """Invite one host; returns the exit code."""
    terms = _terms(options)
    host, identity = open_host(options.config, options.name)
    terms = _complete(host, terms, options)
    check_terms(host, terms)
    return _Inviting(host, terms, options).run(identity)


class _Inviting:
    """One invitation."""

    def __init__(self, host: Host, terms: Terms, options: Options) -> None:
        self._host = host
        self._terms = terms
        self._options = options
        self._edit: Edit | None = None
        self._screen = _InviteScreen("waiting for who joins")
        self._taken = True

    def run(self, identity: Identity) -> int:
        if self._terms.shared_turn:
            urls = ", ".join(server.url for server in self._terms.shared_turn)
            output.say(
                f"who joins gets your relay, too, with its password: {urls}"
                " (--no-share-relay keeps it)"
            )
        try:
            with self._screen:
                burnt = joining.run(
                    joining.invite(
                        identity,
                        to_config(self._terms.rendezvous),
                        decide=self._decide,
                        watcher=self._screen,
                    )
                )
        except KeyboardInterrupt:
            if self._edit is None:
                output.say("given up: the code is worth nothing any more")
                raise
            burnt = Burnt(Reason.USED)  # somebody is in, and we only waited for its thanks
        return self._end(burnt)

    def _decide(self, asked: JoinAsked) -> Welcome:
        """Everything that is to be done here before the other one hears of it."""
        self._screen.stop()
        with locked(self._host.file):
            self._host = again(self._host)
            try:
                edit, welcome = admit(self._host, self._terms, asked)
            except Refusal as error:
                output.say(f"{asked.name} is not let in: {error}")
                raise
            write(self._host, edit)
            self._edit = edit
        fingerprint = PublicKey(asked.peer).fingerprint
        output.say(f"{edit.peer} joins, with the key {fingerprint}")
        if edit.text is not None:
            output.say(f"{edit.peer} is written to {self._host.file}")
        self._taken = reload(self._host, edit)
        return welcome

    def _end(self, burnt: Burnt) -> int:
        edit = self._edit
        if edit is None:
            output.say(_why(burnt.reason))
            return FAILED
        if not burnt.delivered:
            output.say(
                f"{edit.peer} has not said that it knows; if it does not come up, remove its"
                f" [[peer]] from {self._host.file}, and invite it again"
            )
        output.say(addresses(self._host, edit))
        return finish(self._host, edit, taken=self._taken, up=self._options.up)


def _why(reason: Reason) -> str:
    match reason:
        case Reason.EXPIRED:
            return "nobody joined within ten minutes; make another code: `martlet invite`"
        case Reason.FAILED:
            return (
                "five tried to join with a wrong secret, so the code is void: perhaps somebody"
                " guesses; make another one: `martlet invite`"
            )
        case _:
            return "nobody was let in; make another code: `martlet invite`"


class _InviteScreen(Screen):
    def opened(self, code: str) -> None:
        output.data(code)
        output.say("the code above lets one host in, for ten minutes; there, run as root:")
        output.say("    martlet join CODE --up")
        output.say("until then it is as good as a key: send it by a way that others cannot read")
        if sys.stderr.isatty():
            show_qr(code)


def show_qr(code: str) -> None:
    """The code as a QR code on standard error, which is a terminal."""
    import segno

    # Capital letters make it a third smaller: QR has a mode for them.
    segno.make(code.upper(), error="l").terminal(out=sys.stderr, border=2, compact=True)


def _terms(options: Options) -> Terms:
    """What the command line alone says. Raises UsageError."""
    if options.peer_name is not None:
        check_name("--peer-name", options.peer_name)
    if (options.turn_user is None) != (options.turn_password_file is None):
        raise UsageError("--turn-user and --turn-password-file go together", remedy="give both")
    if options.turn_user is not None and not options.turn:
        raise UsageError("--turn-user is for a relay", remedy="give its URL: --turn turn:HOST")
    password_file = absolute(options.turn_password_file)
    turn = tuple(
        Turn(
            url=_value("--turn", url, check_turn_url, "turn:turn.example:3478"),
            username=options.turn_user,
            password_file=password_file,
        )
        for url in options.turn
    )
    return Terms(
        rendezvous=rendezvous_of(
            options.rendezvous, options.username, options.password_file, options.ca_file
        ),
        stun=tuple(
            _value("--stun", text, Endpoint.parse, "stun.example:3478") for text in options.stun
        ),
        turn=turn,
        routes=tuple(_value("--route", text, _route, "192.168.7.0/24") for text in options.routes),
        ipv4=options.ipv4 or options.ipv4_network is not None,
        ipv4_network=None
        if options.ipv4_network is None
        else _value("--ipv4-network", options.ipv4_network, _inner_network, "10.88.0.0/24"),
        peer_name=options.peer_name,
    )


def _complete(host: Host, terms: Terms, options: Options) -> Terms:
    """With what the configuration says. Raises ConfigError, UsageError."""
    config = host.config
    rendezvous, stun, turn = terms.rendezvous, terms.stun, terms.turn
    if config is not None:
        if stun or turn:
            raise UsageError(
                "--stun and --turn are for a new config",
                remedy=f"write them into [ice] of {host.file}",
            )
        stun = config.ice.stun
        turn = tuple(map(_turn_of, config.ice.turn))
        if config.rendezvous is not None:
            if rendezvous.url and set(rendezvous.url) != set(config.rendezvous.url):
                raise ConfigError(
                    f"this tunnel meets its peers at {', '.join(config.rendezvous.url)}",
                    file=host.file,
                    remedy="leave out --rendezvous, or change [rendezvous], or give another NAME",
                )
            rendezvous = of_config(config.rendezvous)
    if not rendezvous.url:
        raise no_rendezvous(host.file)
    return structs.replace(
        terms,
        rendezvous=rendezvous,
        stun=stun,
        turn=turn,
        shared_turn=tuple(map(_shared, turn)) if options.share_relay else (),
    )


def _turn_of(turn: TurnConfig) -> Turn:
    return Turn(url=turn.url, username=turn.username, password_file=turn.password_file)


def _shared(turn: Turn) -> TurnServer:
    """With the password in it. Raises ConfigError."""
    password = None
    if turn.password_file is not None:
        try:
            password = read_password(turn.password_file).decode()
        except UnicodeDecodeError:
            raise ConfigError(
                "this password is not UTF-8 text, and cannot be shared",
                file=turn.password_file,
                remedy="give --no-share-relay",
            ) from None
    return TurnServer(turn.url, turn.username, password)


def _route(text: str) -> IPNetwork:
    network = parse_network(text)
    if network.prefixlen == 0:
        raise ValueError("there are no exit nodes yet")
    return network


def _inner_network(text: str) -> IPv4Network:
    network = parse_network(text)
    if not isinstance(network, IPv4Network) or network.prefixlen > 30:
        raise ValueError("this is not an IPv4 network with room for two")
    if not any(network.subnet_of(private) for private in PRIVATE):
        raise ValueError("this is not a private network")
    return network


def _value(option: str, text: str, parse: Callable[[str], _T], example: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        problem = str(error).partition("; ")[0]
        raise UsageError(
            f"{option} {text}: {problem}", remedy=f"write for example {example}"
        ) from None
