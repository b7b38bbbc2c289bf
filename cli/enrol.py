"""What `martlet invite` and `martlet join` share: this host, its files, and words for the user."""

from __future__ import annotations

import os
import socket
import time
from datetime import date
from pathlib import Path
from types import TracebackType

from msgspec import structs

from cli import output
from cli.client import connect, running
from cli.failures import FAILED, OK, UNREACHABLE, UsageError
from cli.reload import report
from tunnel.config import CONFIG_DIRECTORY, RendezvousConfig, called, loads, read
from tunnel.config import resolve_config_path as resolve
from tunnel.config_edit import Rendezvous, host_name
from tunnel.config_values import check_interface_name, check_mqtt_url, check_peer_name
from tunnel.errors import ConfigError, MartletError
from tunnel.identity import Identity
from tunnel.membership import Edit, Host
from tunnel.shell.config_file import check_writable, identity_beside, replace, write_secret
from tunnel.shell.networks import networks_in_use

DEFAULT_INTERFACE = "mt0"
PEER_PATIENCE = 30.0
"""Seconds that `--up` waits for the peer: it may still be on its way up itself."""
PEER_LOOK = 0.1


def open_host(config: str, name: str | None) -> tuple[Host, Identity]:
    """This host, and the configuration that is to get a peer, new or old.

    Everything that could be in the way of writing it is looked for now, before anybody waits.
    Raises ConfigError, LocalError, PrivilegeError, UsageError.
    """
    file = Path(os.path.abspath(resolve(config)))
    if name is not None:
        check_name("--name", name)
    host_named = name or host_name(socket.gethostname().partition(".")[0])
    if file.exists():
        text: str | None = read(file)
        found = loads(text or "", file, alone=True)
        interface, key = found.interface.name, found.interface.private_key
        check_writable(file)
        identity = Identity.load(key)
    else:
        text = found = None
        interface = _interface(file)
        if interface in _running():
            raise ConfigError(
                f"a tunnel {interface} is up, but not from this file",
                file=file,
                remedy="give its config file, or another NAME",
            )
        check_writable(file)
        key, identity = identity_beside(file)
    host = Host(
        name=host_named,
        public_key=identity.public_key,
        private_key=key,
        file=file,
        interface=interface,
        text=text,
        config=found,
        networks=networks_in_use(interface),
        today=date.today().isoformat(),
    )
    return host, identity


def again(host: Host) -> Host:
    """The same host, the file read anew: somebody may have edited it while we waited."""
    text = read(host.file) if host.file.exists() else None
    config = None if text is None else loads(text, host.file, alone=True)
    return structs.replace(host, text=text, config=config)


def rendezvous_of(
    urls: tuple[str, ...], username: str | None, password_file: Path | None, ca_file: Path | None
) -> Rendezvous:
    """Of the command line. Raises UsageError."""
    if (username is None) != (password_file is None):
        raise UsageError(
            "--rendezvous-user and --rendezvous-password-file go together", remedy="give both"
        )
    for url in urls:
        try:
            check_mqtt_url(url)
        except ValueError as error:
            raise UsageError(
                f"--rendezvous {url}: {str(error).partition(';')[0]}",
                remedy="write for example mqtts://broker.example:8883",
            ) from None
    return Rendezvous(
        url=urls,
        username=username,
        password_file=absolute(password_file),
        ca_file=absolute(ca_file),
    )


def of_config(section: RendezvousConfig) -> Rendezvous:
    """That of a configuration."""
    return Rendezvous(
        url=section.url,
        username=section.username,
        password_file=section.password_file,
        ca_file=section.ca_file,
    )


def to_config(section: Rendezvous) -> RendezvousConfig:
    """As the signaller wants it."""
    return RendezvousConfig(
        url=section.url,
        username=section.username,
        password_file=section.password_file,
        ca_file=section.ca_file,
    )


def absolute(path: Path | None) -> Path | None:
    """A configuration's relative paths start from its own directory, not from ours."""
    return None if path is None else Path(os.path.abspath(path.expanduser()))


def check_name(option: str, name: str) -> None:
    """Raises UsageError when a peer cannot have this name."""
    try:
        check_peer_name(name)
    except ValueError as error:
        raise UsageError(f"{option} {name!r}: {str(error).partition(';')[0]}") from None


def write(host: Host, edit: Edit) -> None:
    """The files of an edit. Raises LocalError, PrivilegeError: then the old file is untouched."""
    if edit.text is None:
        return
    for path, secret in edit.secrets.items():
        write_secret(path, secret)
    replace(host.file, edit.text)


def reload(host: Host, edit: Edit) -> bool:
    """Let the tunnel take the peer if it runs; whether it does not, or has taken it."""
    if edit.text is None or host.tunnel not in _running():
        return True
    try:
        with connect(host.tunnel) as client:
            news = client.reload()
    except MartletError as error:
        output.say(f"{error}")
        return False
    if edit.peer not in news.get("added", ()):
        output.say(
            f"tunnel {host.tunnel} runs from another file, and does not know {edit.peer} yet;"
            f" restart it: martlet down {host.tunnel} && {_up(host)}"
        )
        return False
    for line in report(host.tunnel, news):
        output.say(line)
    return True


def finish(host: Host, edit: Edit, *, taken: bool, up: bool) -> int:
    """Notes, and what to do next; or do it. Returns the exit code."""
    for note in edit.notes:
        output.say(note)
    is_up = host.tunnel in _running()
    if up and taken:
        if not is_up:
            from cli.up import in_background

            code = in_background(loads(read(host.file), host.file))
            if code != OK:
                return code
        code = _wait_for_peer(host, edit)
        if code == OK:
            output.say(f"try: ssh USER@{edit.addresses[0].ip}")
        return code
    steps = [] if is_up else [_up(host)]
    output.say("next:")
    for step in (*steps, f"martlet ping {edit.peer}", f"ssh USER@{edit.addresses[0].ip}"):
        output.say(f"    {step}")
    return OK if taken or not up else FAILED


def addresses(host: Host, edit: Edit) -> str:
    """Who is where, in one line."""
    theirs = " and ".join(str(address.ip) for address in edit.addresses)
    ours = " and ".join(str(address.ip) for address in edit.own)
    return f"{edit.peer} is {theirs}, this host is {ours}"


class Screen:
    """`tunnel.shell.joining.Watcher` on standard error: lines, and on a terminal one that moves."""

    def __init__(self, waiting_for: str) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status(waiting_for)
        self._waiting_for = waiting_for
        self._shown = False

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing moves any more."""
        if self._shown:
            self._status.stop()
            self._shown = False

    def trouble(self, error: str, left: float) -> None:
        output.say(f"{error}; trying on, for up to {_minutes(left)}")

    def recovered(self) -> None:
        output.say("the broker is within reach")

    def opened(self, code: str) -> None:
        """Overridden where there is a code."""

    def waiting(self, left: float) -> None:
        if not self._console.is_terminal:
            return
        self._status.update(f"{self._waiting_for}, {int(left) // 60}:{int(left) % 60:02} left")
        if not self._shown:
            self._status.start()
            self._shown = True

    def unanswered(self) -> None:
        output.say(
            "nobody answers this invite yet: is `martlet invite` still running there? Asking on"
        )


def _wait_for_peer(host: Host, edit: Edit) -> int:
    """Until the peer is up. Returns the exit code."""
    output.say(f"waiting for {edit.peer}")
    begin = time.monotonic()
    while time.monotonic() - begin < PEER_PATIENCE:
        with connect(host.tunnel) as client:
            peers = client.status()["peers"]
        entry = next((peer for peer in peers if peer["name"] == edit.peer), None)
        if entry is not None and entry["state"] == "up":
            output.say(f"{edit.peer} is up, via {output.active_path(entry)}")
            return OK
        time.sleep(PEER_LOOK)
    output.say(
        f"{edit.peer} is not up yet; the tunnel goes on trying, and"
        f" `martlet status {host.tunnel}` tells how it is: is martlet up there, too?"
    )
    return UNREACHABLE


def _interface(file: Path) -> str:
    """The name of the device of a new configuration: that of the file, if it can be one."""
    try:
        return check_interface_name(file.stem)
    except ValueError:
        return DEFAULT_INTERFACE


def _up(host: Host) -> str:
    """The command; a path that needs quotes is one's own doing."""
    return f"martlet up {called(host.file)} --detach"


def _running() -> list[str]:
    return running()


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes != 1 else ''}"


def no_rendezvous(file: Path) -> ConfigError:
    """Neither the command line nor the file names a broker."""
    where = called(file) if file.parent == CONFIG_DIRECTORY else str(file)
    return ConfigError(
        f"{where} names no [rendezvous]: two hosts need a broker to meet at, which both can reach",
        remedy="run `martlet rendezvous` on a host that both can reach, and give its URL here:"
        " --rendezvous mqtt://THAT-HOST",
    )
