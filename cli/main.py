"""The command `martlet`: typer commands only; what they do is elsewhere."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import failures, output

DEFAULT_KEY = Path("/etc/martlet/id_ed25519")

app = typer.Typer(
    name="martlet",
    help="A tunnel that moves with you: SSH and all else survive every change of network.",
    epilog="Start here: martlet invite on one host, martlet join CODE on the other."
    " No network at hand? martlet demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one value on one line.")]
Name = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="The tunnel; not needed if only one is up.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Always raises SystemExit; no exception of ours gets past it."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="martlet")
    except (Exception, KeyboardInterrupt) as error:
        if failures.wants_traceback():
            traceback.print_exc()
        message, code = failures.explain(error)
        if message:
            output.say(message)
        raise SystemExit(code) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        output.data(f"martlet {version('martlet')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of martlet itself."""


@app.command(epilog="Example: martlet keygen  ·  martlet keygen ./key")
def keygen(
    path: Annotated[
        Path, typer.Argument(metavar="[PATH]", help="Where to write the private key.")
    ] = DEFAULT_KEY,
) -> None:
    """Write a new Ed25519 key (OpenSSH format, mode 0600) and print its public line.

    Never overwrites a key. The public line is what the other host's config wants as public_key.
    """
    from tunnel.identity import Identity

    if path == DEFAULT_KEY:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = Identity.generate()
    identity.save(path)
    output.say(f"private key written to {path}")
    output.data(identity.public_key.openssh)


@app.command(epilog="Example: martlet pubkey /etc/martlet/id_ed25519")
def pubkey(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A private key file.")],
) -> None:
    """Print the public line of a private key."""
    from tunnel.identity import Identity

    output.data(Identity.load(path).public_key.openssh)


@app.command(epilog="Example: martlet up ./mt0.toml  ·  martlet up mt0 --detach")
def up(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.toml|NAME", help="A config file, or NAME of /etc/martlet/NAME.toml."
        ),
    ],
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Go into the background once the tunnel is up.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Bring a tunnel up and run it until SIGINT, SIGTERM or 'martlet down'.

    Logs go to standard error; with --detach to a file beside the control socket. QLOGDIR and
    SSLKEYLOGFILE in the environment make qlog traces and a TLS key log.
    """
    from tunnel.config import CONFIG_DIRECTORY, load
    from tunnel.shell import log

    if log_level not in log.LEVELS:
        raise typer.BadParameter(f"one of {', '.join(log.LEVELS)}", param_hint="--log-level")
    is_path = "/" in config or config.endswith(".toml")
    loaded = load(Path(config) if is_path else CONFIG_DIRECTORY / f"{config}.toml")

    from cli.up import in_background, in_foreground

    if detach:
        raise typer.Exit(in_background(loaded, log_level))
    in_foreground(loaded, log_level)


@app.command(epilog="Example: martlet down mt0")
def down(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tunnel.")],
) -> None:
    """Say goodbye to the peers, undo routes and addresses, and end the tunnel."""
    from cli.client import connect

    with connect(name) as client:
        client.down()
    output.say(f"tunnel {name} is down")


@app.command(epilog="Example: martlet reload mt0")
def reload(name: Name = None) -> None:
    """Let a running tunnel take the peers that were added to its config file, or are gone from it.

    Everybody else's sessions go on. What cannot be changed while the tunnel runs is named.
    """
    from cli.reload import run

    raise typer.Exit(run(name))


@app.command(
    epilog="Example: martlet status  ·  martlet status mt0 --watch  ·  martlet status --json"
)
def status(
    name: Name = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second.")] = False,
) -> None:
    """Show peers, their state, and the paths between us: which is active, and how good each is."""
    if not watch:
        _print_status(_statuses(name), json)
        return
    try:
        _watch_status(name, json)
    except KeyboardInterrupt:
        return


@app.command(epilog="Example: martlet history mt0 --json")
def history(name: Name = None, json: Json = False) -> None:
    """List every migration: what set it off, from where to where, and how long each step took."""
    from cli.client import connect

    with connect(name) as client:
        records = client.history()
    if json:
        output.as_json(records)
    else:
        output.stdout().print(output.history(records))


@app.command(epilog="Example: martlet why office  ·  martlet why mt0/office")
def why(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer, or TUNNEL/PEER.")],
    json: Json = False,
) -> None:
    """Tell which path is in use to a peer, why that one, and why not each of the others."""
    from cli.why import run

    raise typer.Exit(run(peer, json))


@app.command(epilog="Example: martlet ping office  ·  martlet ping mt0/office -c 10 -i 0.2")
def ping(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer, or TUNNEL/PEER.")],
    count: Annotated[
        int, typer.Option("-c", "--count", min=0, help="How many; 0: until interrupted.")
    ] = 0,
    interval: Annotated[
        float, typer.Option("-i", "--interval", min=0.002, max=3600, help="Seconds between two.")
    ] = 1.0,
) -> None:
    """Measure the round trip to a peer's martlet, through the tunnel's own connection.

    Exits with 5 when not one answer came.
    """
    from cli.ping import run

    raise typer.Exit(run(peer, count, interval))


@app.command(
    epilog="Example: martlet bench office  ·  martlet bench mt0/office --seconds 10 --json"
)
def bench(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="A peer, or TUNNEL/PEER.")],
    seconds: Annotated[
        float,
        typer.Option("-s", "--seconds", min=1, max=16, help="Length of each of three phases."),
    ] = 4.0,
    json: Json = False,
) -> None:
    """Measure throughput, and round trips idle and under load, through the tunnel to a peer.

    The peer's martlet takes part, and may refuse (bench = false). One TCP stream, first to the
    peer (upload), then from it; the first quarter of each, where TCP finds its pace, does not count
    for the throughput. The last table shows what each path carried and lost.
    """
    from cli.bench import run

    raise typer.Exit(run(peer, seconds, json))


@app.command(
    epilog="Example: martlet rendezvous  ·  sudo martlet rendezvous"
    " --tls-cert fullchain.pem --tls-key privkey.pem --websocket"
)
def rendezvous(
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Listen at this address only.", show_default="all"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            metavar="PORT",
            help="For MQTT.",
            show_default="1883, with TLS 8883",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A certificate with its chain (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificate's key (PEM).")
    ] = None,
    websocket: Annotated[
        bool,
        typer.Option(
            "--websocket", help="Also MQTT over WebSocket, on port 80, or 443 if there is TLS."
        ),
    ] = False,
    websocket_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="PORT", help="The same, on this port."),
    ] = None,
    stun_port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="PORT", help="For STUN (UDP).")
    ] = 3478,
    no_stun: Annotated[bool, typer.Option("--no-stun", help="Without STUN.")] = False,
    alternate_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A second address of this host, so that others can find out how their NAT"
            " behaves (RFC 5780). Needs --listen.",
        ),
    ] = None,
    max_clients: Annotated[
        int, typer.Option(min=1, max=1_000_000, metavar="COUNT", help="Connections at a time.")
    ] = 10_000,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="How hosts reach this one, for what is printed.",
            show_default="what the certificate says, or the address of the default route",
        ),
    ] = None,
    broker: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="mosquitto, amqtt (in Python, for a few hosts), or auto: what is installed.",
        ),
    ] = "auto",
    json: Json = False,
) -> None:
    """Run a meeting point for hosts that cannot reach each other: an MQTT broker, and STUN.

    Prints the lines that each host's config needs, and serves until SIGINT or SIGTERM. There are
    no accounts: what hosts say to each other is sealed, and strangers can neither listen nor store
    anything. SIGHUP takes a renewed certificate into use.
    """
    from cli.rendezvous import serve
    from tunnel.shell import log

    log.setup("info")
    serve(
        listen=listen,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        websocket=websocket,
        websocket_port=websocket_port,
        stun_port=stun_port,
        no_stun=no_stun,
        alternate_address=alternate_address,
        max_clients=max_clients,
        name=name,
        broker=broker,
        json=json,
    )


Broker = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="A broker where both can meet; more than once for more."),
]
BrokerUser = Annotated[str | None, typer.Option(metavar="NAME", help="For a broker that asks.")]
BrokerPassword = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With the password for it on its first line.")
]
BrokerCa = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Who vouches for the broker (PEM), if not a public CA."),
]
OwnName = Annotated[
    str | None, typer.Option(metavar="NAME", help="What this host calls itself.",
                             show_default="its host name")
]  # fmt: skip
PeerName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What the other one is called here.", show_default="what it says"
    ),
]
GoUp = Annotated[
    bool, typer.Option("--up", help="Bring the tunnel up in the background, and wait for the peer.")
]


@app.command(
    epilog="Example: sudo martlet invite --rendezvous mqtt://broker.example --up"
    "  ·  sudo martlet invite mt0"
)
def invite(
    config: Annotated[
        str,
        typer.Argument(
            metavar="[CONFIG.toml|NAME]",
            help="The config that gets the peer, or NAME of /etc/martlet/NAME.toml; made if it is"
            " not there.",
        ),
    ] = "mt0",
    rendezvous: Broker = None,
    rendezvous_user: BrokerUser = None,
    rendezvous_password_file: BrokerPassword = None,
    rendezvous_ca: BrokerCa = None,
    name: OwnName = None,
    peer_name: PeerName = None,
    ipv4: Annotated[
        bool, typer.Option("--ipv4", help="IPv4 addresses inside the tunnel, too.")
    ] = False,
    ipv4_network: Annotated[
        str | None,
        typer.Option(metavar="CIDR", help="Out of this network.", show_default="one that is free"),
    ] = None,
    stun: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A STUN server.", show_default="the broker's host"),
    ] = None,
    turn: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A relay (turn:HOST, turns:HOST).")
    ] = None,
    turn_user: Annotated[str | None, typer.Option(metavar="NAME", help="For the relay.")] = None,
    turn_password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With the password for it.")
    ] = None,
    no_share_relay: Annotated[
        bool, typer.Option("--no-share-relay", help="Keep relays and their passwords to this host.")
    ] = False,
    route: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="A network behind this host that the other may use."),
    ] = None,
    up: GoUp = False,
) -> None:
    """Invite another host: print a code that makes it a peer by 'martlet join CODE' there.

    The code is good for one host and ten minutes, and as good as a key until then. Keys are made
    where there are none, the config is written or gets a further peer, and a tunnel that runs
    takes the peer at once.
    """
    from cli.invite import Options, run

    raise typer.Exit(
        run(
            Options(
                config=config,
                rendezvous=tuple(rendezvous or ()),
                username=rendezvous_user,
                password_file=rendezvous_password_file,
                ca_file=rendezvous_ca,
                name=name,
                peer_name=peer_name,
                ipv4=ipv4,
                ipv4_network=ipv4_network,
                stun=tuple(stun or ()),
                turn=tuple(turn or ()),
                turn_user=turn_user,
                turn_password_file=turn_password_file,
                share_relay=not no_share_relay,
                routes=tuple(route or ()),
                up=up,
            )
        )
    )


@app.command(epilog="Example: sudo martlet join martlet-aebagbafaydqq... --up")
def join(
    code: Annotated[
        str, typer.Argument(metavar="CODE", help="What 'martlet invite' printed; - reads it.")
    ],
    config: Annotated[
        str,
        typer.Option(
            metavar="CONFIG.toml|NAME",
            help="The config that gets the peer, or NAME of /etc/martlet/NAME.toml; made if it is"
            " not there.",
        ),
    ] = "mt0",
    name: OwnName = None,
    peer_name: PeerName = None,
    ipv4: Annotated[
        bool, typer.Option("--ipv4", help="Ask for an IPv4 address inside the tunnel, too.")
    ] = False,
    accept_routes: Annotated[
        bool,
        typer.Option("--accept-routes", help="Use the networks behind the other that it offers."),
    ] = False,
    rendezvous_user: BrokerUser = None,
    rendezvous_password_file: BrokerPassword = None,
    rendezvous_ca: BrokerCa = None,
    up: GoUp = False,
) -> None:
    """Become a peer of the host that made CODE with 'martlet invite'.

    Nothing is needed before: keys are made where there are none, the config is written or gets a
    further peer, and a tunnel that runs takes the peer at once.
    """
    from cli.join import Options, run

    raise typer.Exit(
        run(
            Options(
                code=code,
                config=config,
                name=name,
                peer_name=peer_name,
                ipv4=ipv4,
                accept_routes=accept_routes,
                username=rendezvous_user,
                password_file=rendezvous_password_file,
                ca_file=rendezvous_ca,
                up=up,
            )
        )
    )


@app.command(
    epilog="Example: martlet doctor  ·  martlet doctor mt0"
    "  ·  martlet doctor --stun stun.example:3478 --json"
)
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml|NAME]",
            help="A config file, or NAME of /etc/martlet/NAME.toml. Without: this host alone.",
        ),
    ] = None,
    json: Json = False,
    rendezvous: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A broker to try, beside those of the config."),
    ] = None,
    stun: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A STUN server to ask, beside those of the config."),
    ] = None,
) -> None:
    """Look for what could be in the way of a tunnel, and say what mends it.

    Checks privileges and the kernel, the config, addresses, routes and clashes, names, NATs, and
    every server the config names; takes six seconds at most, and leaves running tunnels alone.
    Exits with 1 when there is a problem.
    """
    from cli.doctor import run

    raise typer.Exit(run(config, json=json, rendezvous=rendezvous or (), stun=stun or ()))


@app.command(epilog="Example: sudo martlet demo")
def demo(json: Json = False) -> None:
    """Watch a real SSH session roam: two hosts behind NATs, in namespaces of this machine."""
    from cli.demo import run

    raise typer.Exit(run(json=json))


def _statuses(name: str | None) -> list[dict[str, Any]]:
    from cli.client import connect, none_up, running

    names = [name] if name is not None else running()
    if not names:
        raise none_up()
    found = []
    for each in names:
        with connect(each) as client:
            found.append(client.status())
    return found


def _print_status(statuses: list[dict[str, Any]], json: bool) -> None:
    if json:
        for each in statuses:
            output.as_json(each)
        return
    console = output.stdout()
    for number, each in enumerate(statuses):
        if number:
            console.print()
        console.print(output.status(each))


def _watch_status(name: str | None, json: bool) -> None:
    if json or not sys.stdout.isatty():
        while True:
            _print_status(_statuses(name), json)
            sys.stdout.flush()
            time.sleep(1)

    from rich.console import Group
    from rich.live import Live

    with Live(console=output.stdout(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*map(output.status, _statuses(name))), refresh=True)
            time.sleep(1)


if __name__ == "__main__":
    main()
