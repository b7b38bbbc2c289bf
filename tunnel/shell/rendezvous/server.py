"""The rendezvous as a whole: broker, gateway and STUN, started in order and ended in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import ipaddress
import os
import resource
import signal
import socket
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cryptography import x509

from tunnel.config_values import MQTT_PORTS
from tunnel.errors import ConfigError, LocalError, PrivilegeError
from tunnel.ice.stun_server import STUN_PORT
from tunnel.path.network import canonical_ip
from tunnel.shell import systemd
from tunnel.shell.log import Log
from tunnel.shell.loop import run_loop
from tunnel.shell.rendezvous import limits, mosquitto
from tunnel.shell.rendezvous.gateway import PATH, Gateway
from tunnel.shell.rendezvous.mosquitto import Mosquitto, Tls
from tunnel.shell.rendezvous.stun import Stun

BrokerKind = Literal["auto", "mosquitto", "amqtt"]

_SPARE_DESCRIPTORS = 256
"""File descriptors that are not a client's."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `martlet rendezvous` was told."""

    listen: str | None = None
    """An address; None: all."""
    port: int | None = None
    """None: MQTT's own, with or without TLS."""
    tls: Tls | None = None
    websocket: int | None = None
    """The port for MQTT over WebSocket; None: not offered."""
    stun_port: int | None = STUN_PORT
    """None: no STUN."""
    alternate_address: str | None = None
    max_clients: int = limits.MAX_CLIENTS
    broker: BrokerKind = "auto"
    name: str | None = None
    """How hosts reach this one; None: guessed."""

    @property
    def mqtt_port(self) -> int:
        return self.port or MQTT_PORTS["mqtts" if self.tls else "mqtt"]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What runs, and what hosts have to write into their configuration."""

    url: tuple[str, ...]
    stun: str | None
    """Where STUN is at, unless hosts expect it there anyway."""
    broker: str
    version: str
    max_clients: int
    pid: int | None

    @property
    def lines(self) -> list[str]:
        """TOML for the configuration of hosts."""
        urls = [f'"{url}"' for url in self.url]
        lines = ["[rendezvous]"]
        lines.append(f"url = {urls[0] if len(urls) == 1 else '[' + ', '.join(urls) + ']'}")
        if self.stun is not None:
            lines += ["", "[ice]", f'stun = ["{self.stun}"]']
        return lines


class _Broker(Protocol):
    name: str
    version: str
    socket: Path

    async def start(self) -> None: ...
    async def wait(self) -> None: ...
    async def stop(self) -> None: ...
    def reload(self) -> None: ...


def run(options: Options, ready: Callable[[Ready], None]) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP takes a renewed certificate into use.

    `ready` is called once everything listens. Raises MartletError.
    """
    run_loop(_main(options, ready))


async def _main(options: Options, ready: Callable[[Ready], None]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    context = _tls_context(options.tls) if options.tls is not None else None
    async with AsyncExitStack() as undo:
        max_clients = _raise_limit(options.max_clients)
        # First in, last out: whoever knows this directory is gone by then.
        folder = tempfile.TemporaryDirectory(prefix="martlet-rendezvous-")
        undo.callback(_clean, folder)
        broker = _choose(options, Path(folder.name), context, max_clients)
        undo.push_async_callback(broker.stop)
        await _start(broker.start, options.mqtt_port)
        addresses = (options.listen,)
        if options.websocket is not None:
            gateway = Gateway(broker.socket, addresses, options.websocket, context, max_clients)
            undo.push_async_callback(gateway.stop)
            await _start(gateway.start, options.websocket)
        if options.stun_port is not None:
            stun = Stun(addresses, options.stun_port, options.alternate_address)
            undo.push_async_callback(stun.stop)
            await _start(stun.start, options.stun_port)

        loop.add_signal_handler(signal.SIGHUP, _reload, options, context, broker)
        ready(_describe(options, broker, max_clients))
        systemd.notify(systemd.READY)
        stopped = asyncio.create_task(stopping.wait())
        ended = asyncio.create_task(broker.wait())
        await asyncio.wait([stopped, ended], return_when=asyncio.FIRST_COMPLETED)
        systemd.notify(systemd.STOPPING)
        for task in (stopped, ended):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if not ended.cancelled():
            ended.result()  # raises


def _choose(
    options: Options, directory: Path, context: ssl.SSLContext | None, max_clients: int
) -> _Broker:
    """The broker that is there. Raises LocalError."""
    addresses, port = (options.listen,), options.mqtt_port
    wanting = ""
    if options.broker != "amqtt":
        program, wanting = mosquitto.find()
        if program is not None:
            return Mosquitto(program, directory, addresses, port, options.tls, max_clients)
        if options.broker == "mosquitto":
            raise LocalError(wanting, remedy="install mosquitto: `apt install mosquitto`")
    if importlib.util.find_spec("amqtt") is None:
        raise LocalError(
            f"there is no MQTT broker: {wanting}" if wanting else "amqtt is not installed",
            remedy="install mosquitto (`apt install mosquitto`), or the broker in Python"
            " (`pip install 'martlet[rendezvous]'`)",
        )
    from tunnel.shell.rendezvous.embedded import Embedded

    return Embedded(directory, addresses, port, context, max_clients)


async def _start(start: Callable[[], Awaitable[None]], port: int) -> None:
    """Start something that listens on `port`, with the user's words for what may go wrong."""
    try:
        await start()
    except PermissionError:
        raise PrivilegeError(
            f"port {port} is for the privileged", remedy="run as root (sudo)"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LocalError(
                f"port {port} is taken",
                remedy=f"see by whom with `ss -lntup sport = :{port}`, or choose another",
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise LocalError(
                "this host does not have the address to listen on",
                remedy="see its addresses with `ip address`",
            ) from None
        raise LocalError(f"cannot listen on port {port}: {error.strerror or error}") from None


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for file in (tls.certificate, tls.key):
        try:
            file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read it: {error.strerror}", file=file, remedy=f"check with `ls -l {file}`"
            ) from None
    try:
        # A key with a passphrase would have it asked for on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"this certificate cannot be used with {tls.key}: {error}",
            file=tls.certificate,
            remedy="give a PEM certificate (with its chain) and its unencrypted key",
        ) from None
    return context


def _reload(options: Options, context: ssl.SSLContext | None, broker: _Broker) -> None:
    if options.tls is None or context is None:
        return
    try:
        _tls_context(options.tls)
        context.load_cert_chain(options.tls.certificate, options.tls.key)
        broker.reload()
    except (ConfigError, LocalError) as error:
        _log.error("cannot take the certificate into use", error=error)
    else:
        _log.info("certificate read again")


def _raise_limit(max_clients: int) -> int:
    """Let us and our children have that many connections; how many it will be."""
    needed = max_clients + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return max_clients
    with contextlib.suppress(ValueError, OSError):  # only root may raise the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))
        return max_clients
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    possible = max(1, min(max_clients, hard - _SPARE_DESCRIPTORS))
    if possible < max_clients:
        _log.warning("fewer clients than asked for", possible=possible, ulimit=hard)
    return possible


def _describe(options: Options, broker: _Broker, max_clients: int) -> Ready:
    name = options.name or _guess_name(options)
    host = f"[{name}]" if ":" in name else name
    secure = "s" if options.tls is not None else ""
    urls = [f"mqtt{secure}://{host}:{options.mqtt_port}"]
    if options.websocket is not None:
        default = options.websocket == MQTT_PORTS[f"ws{secure}"]
        urls.append(f"ws{secure}://{host}{'' if default else f':{options.websocket}'}{PATH}")
    # Hosts look for STUN beside the broker by themselves.
    stun = None
    if options.stun_port not in (None, STUN_PORT):
        stun = f"{host}:{options.stun_port}"
    return Ready(
        url=tuple(urls),
        stun=stun,
        broker=broker.name,
        version=broker.version,
        max_clients=max_clients,
        pid=broker.pid if isinstance(broker, Mosquitto) else None,
    )


def _guess_name(options: Options) -> str:
    """What the certificate says; else the address listened at, or that of the default route."""
    if options.tls is not None:
        name = _name_in(options.tls.certificate)
        if name:
            return name
    if options.listen is not None:
        return options.listen
    # Connecting a UDP socket sends nothing: it asks the routing table (documentation addresses).
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            return canonical_ip(probe.getsockname()[0])
    return socket.gethostname()


def _name_in(certificate: Path) -> str | None:
    """The first name in it that is no wildcard."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return None
    found = [name for name in names.get_values_for_type(x509.DNSName) if "*" not in name]
    found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return found[0] if found else None


def check_address(value: str) -> str:
    """An address of this host, in its one spelling. Raises ValueError."""
    ip = ipaddress.ip_address(canonical_ip(value))
    if ip.is_unspecified or ip.is_multicast:
        raise ValueError("this is not the address of a host")
    return str(ip)


def as_json(ready: Ready, options: Options) -> dict[str, Any]:
    """For `--json`."""
    return {
        "ready": True,
        "url": list(ready.url),
        "broker": ready.broker,
        "version": ready.version,
        "broker_pid": ready.pid,
        "pid": os.getpid(),
        "port": options.mqtt_port,
        "tls": options.tls is not None,
        "websocket_port": options.websocket,
        "stun_port": options.stun_port,
        "alternate_address": options.alternate_address,
        "max_clients": ready.max_clients,
    }


def _clean(folder: tempfile.TemporaryDirectory[str]) -> None:
    with contextlib.suppress(OSError):
        folder.cleanup()


_log = Log("rendezvous")
