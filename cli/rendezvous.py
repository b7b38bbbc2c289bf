"""`martlet rendezvous`: what its options mean, and what it prints when it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from cli import output
from cli.failures import UsageError
from tunnel.config_values import MQTT_PORTS
from tunnel.shell.rendezvous.mosquitto import Tls
from tunnel.shell.rendezvous.server import (
    BrokerKind,
    Options,
    Ready,
    as_json,
    check_address,
    run,
)


def serve(
    *,
    listen: str | None,
    port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    websocket: bool,
    websocket_port: int | None,
    stun_port: int,
    no_stun: bool,
    alternate_address: str | None,
    max_clients: int,
    name: str | None,
    broker: str,
    json: bool,
) -> None:
    """Check the options and serve until a signal comes."""
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together", remedy="give both, or neither")
    if broker not in get_args(BrokerKind):
        raise UsageError(
            f"--broker {broker} is not known", remedy=f"one of {', '.join(get_args(BrokerKind))}"
        )
    tls = Tls(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None
    if alternate_address is not None:
        if listen is None:
            raise UsageError(
                "--alternate-address is the second of two addresses",
                remedy="give the first as --listen",
            )
        if no_stun:
            raise UsageError("--alternate-address is for STUN, which --no-stun turns off")
    listen = _address("--listen", listen)
    alternate_address = _address("--alternate-address", alternate_address)
    if alternate_address is not None and listen is not None:
        if alternate_address == listen or (":" in alternate_address) != (":" in listen):
            raise UsageError(
                "--alternate-address must be another address, of the same family as --listen"
            )
        if stun_port == 65535:
            raise UsageError("--stun-port 65535 leaves no port for the alternate one")
    if websocket and websocket_port is None:
        websocket_port = MQTT_PORTS["wss" if tls is not None else "ws"]
    options = Options(
        listen=listen,
        port=port,
        tls=tls,
        websocket=websocket_port,
        stun_port=None if no_stun else stun_port,
        alternate_address=alternate_address,
        max_clients=max_clients,
        broker=cast(BrokerKind, broker),
        name=name,
    )
    if options.websocket == options.mqtt_port:
        raise UsageError(f"--port and --websocket-port are both {options.mqtt_port}")

    def ready(found: Ready) -> None:
        if json:
            output.as_json(as_json(found, options))
            return
        output.say(
            f"{found.broker} {found.version} serves up to {found.max_clients} hosts;"
            " this is for the config of each:"
        )
        for line in found.lines:
            output.data(line)

    run(options, ready)


def _address(option: str, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return check_address(value)
    except ValueError:
        raise UsageError(
            f"{option} {value}: this is not an IP address of this host",
            remedy="see `ip address`; without the option all addresses are listened at",
        ) from None
