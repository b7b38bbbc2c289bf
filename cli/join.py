"""`martlet join CODE`: become a peer of the host that made the code."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from msgspec import Struct

from cli import output
from cli.enrol import (
    Screen,
    addresses,
    again,
    check_name,
    finish,
    of_config,
    open_host,
    reload,
    rendezvous_of,
    to_config,
    write,
)
from tunnel.identity import PublicKey
from tunnel.membership import accept, check_joinable, wishes
from tunnel.rendezvous.invite import InviteCode, Joining
from tunnel.shell import joining
from tunnel.shell.config_file import locked


class Options(Struct, frozen=True, kw_only=True):
    """The command line."""

    code: str
    config: str
    name: str | None
    peer_name: str | None
    ipv4: bool
    accept_routes: bool
    username: str | None
    password_file: Path | None
    ca_file: Path | None
    up: bool


def run(options: Options) -> int:
    """Join; returns the exit code."""
    code = InviteCode.parse(sys.stdin.read() if options.code == "-" else options.code)
    if options.peer_name is not None:
        check_name("--peer-name", options.peer_name)
    meeting = rendezvous_of(code.urls, options.username, options.password_file, options.ca_file)
    host, identity = open_host(options.config, options.name)
    check_joinable(host, code.inviter, code.urls)
    if host.config is not None and host.config.rendezvous is not None:
        # The same broker; but the code may name others, too, which our password is not for.
        meeting = of_config(host.config.rendezvous)
    asking = Joining(
        identity,
        code,
        name=host.name,
        wishes=wishes(host, ipv4=options.ipv4),
        rng=random.SystemRandom(),
    )
    output.say(f"asking the host that made the code, by way of {', '.join(meeting.url)}")
    try:
        with Screen("waiting for an answer") as screen:
            found = joining.run(joining.join(asking, to_config(meeting), watcher=screen))
    except KeyboardInterrupt:
        output.say("given up; no config was changed")
        raise
    with locked(host.file):
        host = again(host)
        edit = accept(
            host,
            found.inviter,
            found.welcome,
            rendezvous=meeting,
            peer_name=options.peer_name,
            accept_routes=options.accept_routes,
        )
        write(host, edit)
    fingerprint = PublicKey(found.inviter).fingerprint
    output.say(f"{edit.peer} lets this host in; its key is {fingerprint}")
    output.say(f"{edit.peer} is written to {host.file}")
    taken = reload(host, edit)
    output.say(addresses(host, edit))
    if options.ipv4 and len(edit.own) == 1 and not edit.notes:
        output.say(f"no IPv4: {edit.peer} gave none")
    return finish(host, edit, taken=taken, up=options.up)
