"""A tunnel's process: everything it needs is set up in order, and undone in reverse."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, TextIO

import uvloop

from tun.apply import apply
from tun.errors import TunError
from tun.linux import LinuxTun
from tunnel.config import Config, check_own_key
from tunnel.control import BOOT_ID_LENGTH
from tunnel.errors import LocalError
from tunnel.identity import Identity
from tunnel.shell import clock, qlog, systemd
from tunnel.shell.driver import Driver, Node
from tunnel.shell.log import Log
from tunnel.shell.netmon import Netlink
from tunnel.shell.portmap import PortMapper
from tunnel.shell.reload import Reloader, plan_of
from tunnel.shell.status import ControlServer, ControlSocket

NodeFactory = Callable[[Config, Identity, TextIO | None], Node]
"""Makes the node; the text stream is the TLS key log."""


def run(
    config: Config,
    *,
    ready: Callable[[], None] | None = None,
    make_node: NodeFactory | None = None,
    strict: bool = False,
) -> None:
    """Run the tunnel until SIGINT, SIGTERM or `martlet down`; a second signal does not wait.

    `ready` is called once everything is set up. `strict` (for tests) ends the tunnel at the first
    internal error, and raises it. Raises MartletError and TunError.
    """
    run_loop(_main(config, ready or _nothing, make_node or _make_node, strict))


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a uvloop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def _main(
    config: Config, ready: Callable[[], None], make_node: NodeFactory, strict: bool
) -> None:
    interface = config.interface
    identity = Identity.load(interface.private_key)
    check_own_key(config, identity.public_key)
    loop = asyncio.get_running_loop()
    with ExitStack() as undo:
        claimed = ControlSocket.claim(interface.name)
        undo.callback(claimed.release)

        keylog = qlog.open_keylog()
        if keylog is not None:
            undo.callback(keylog.close)
        node = make_node(config, identity, keylog)

        tun = LinuxTun.open(interface.name, interface.mtu)
        undo.callback(tun.close)
        applied = apply(plan_of(config))
        undo.callback(_undo_plan, applied.undo)

        try:
            monitor = Netlink(interface.name, config.ice.exclude_interfaces)
        except OSError as error:
            raise LocalError(f"cannot watch the network (netlink): {error.strerror}") from error
        undo.callback(monitor.close)

        driver = Driver(
            node,
            tun,
            monitor,
            listen_port=interface.listen_port or 0,
            peers=[peer.name for peer in config.peers],
            rendezvous=config.rendezvous,
            reload=Reloader(config, identity.public_key, applied).take,
            turn=config.ice.turn,
            strict=strict,
        )
        undo.callback(driver.close)
        if config.ice.port_mapping:
            secret = identity.derive(b"martlet port mapping", 32)
            rng = random.SystemRandom()
            mapper = PortMapper(loop, driver.ports_mapped, secret=secret, rng=rng)
            driver.follow("port_mappings", mapper)
        alone = {p.public_key.raw: p.name for p in config.peers if not p.endpoint}
        if alone and config.rendezvous is None:
            from tunnel.shell.mdns import LinkDiscovery  # which takes a while to be imported

            own, rng = identity.public_key.raw, random.SystemRandom()
            discovery = LinkDiscovery(loop, driver.endpoints_found, own=own, peers=alone, rng=rng)
            driver.follow("link", discovery)
        driver.start()

        server = ControlServer(claimed, driver)
        await server.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, driver.down)
        # What is there now stays: the collector need not look at it again, in pauses of 10 ms.
        gc.collect()
        gc.freeze()

        _log.info("up", tunnel=interface.name, peers=len(config.peers))
        ready()
        systemd.notify(systemd.READY)
        try:
            await driver.wait()
        finally:
            systemd.notify(systemd.STOPPING)
            await driver.sign_off()
            undo.close()
            # Last, so that `martlet down` returns when all is undone.
            await server.stop()
            _log.info("down", tunnel=interface.name)


def _make_node(config: Config, identity: Identity, keylog: TextIO | None) -> Node:
    from tunnel.node import Node as RealNode

    return RealNode(
        config,
        identity,
        rng=random.SystemRandom(),
        boot_id=os.urandom(BOOT_ID_LENGTH),
        wall_offset=time.time() - clock.now(),
        keylog=keylog,
        quic_logger=qlog.open_qlog(),
    )


def _undo_plan(undo: Callable[[], None]) -> None:
    try:
        undo()
    except TunError as error:  # the device goes next, and takes the rest with it
        _log.warning("cannot undo", error=error)


def _nothing() -> None:
    """Nobody wants to know."""


_log = Log("loop")
