"""Asks a TURN server whether it is there, over the transport that its URL names.

A STUN question that every TURN server answers (RFC 8656 section 5, RFC 8489), as a datagram or in a
stream of TCP or TLS; nothing is allocated, so credentials are not tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import parse_qs

from tunnel.config import Endpoint, TurnConfig
from tunnel.doctor.facts import Reason, ServerFacts
from tunnel.ice import check
from tunnel.path.network import Address
from tunnel.shell import clock
from tunnel.shell.doctor.threads import in_thread
from tunnel.shell.resolver import lookup
from tunnel.shell.udp import SOCKET_MARK

PORTS = {"turn": 3478, "turns": 5349}  # RFC 7065 section 3.2
WAITS = (0.5, 1.0, 1.5)
"""Seconds after each try of a datagram."""
_HEADER = 20  # RFC 8489 section 5
_LARGEST = 2048


def server_of(url: str) -> tuple[Endpoint, str]:
    """The server of a URL that `tunnel.config` has accepted, and udp, tcp or tls."""
    scheme, _, rest = url.partition(":")
    place, _, query = rest.partition("?")
    transport = parse_qs(query).get("transport", ["udp" if scheme == "turn" else "tcp"])[0]
    has_port = place.rpartition(":")[2].isdigit() and not place.endswith("]")
    endpoint = Endpoint.parse(place if has_port else f"{place}:{PORTS[scheme]}")
    return endpoint, "tls" if scheme == "turns" else transport


async def ask(turn: TurnConfig, limit: float) -> ServerFacts:
    """Whether it answers within `limit` seconds, and how long that took. Raises nothing."""
    endpoint, transport = server_of(turn.url)
    began = clock.now()
    reason: Reason
    try:
        async with asyncio.timeout(limit):
            host, port = endpoint.host, endpoint.port
            addresses = await in_thread(lambda: lookup(host, port))
            if transport == "udp":
                await _datagrams(addresses)
            else:
                await _stream(endpoint, transport == "tls")
    except TimeoutError:
        error, reason = "it does not answer", "timeout"
    except socket.gaierror:
        error, reason = f"there is no host {endpoint.host}", "name"
    except ssl.SSLCertVerificationError as problem:
        error, reason = f"its certificate is not trusted: {problem.verify_message}", "tls"
    except ssl.SSLError as problem:
        error, reason = f"no TLS connection: {problem.reason}", "tls"
    except ConnectionRefusedError:
        error, reason = "it refuses the connection: nothing listens on that port", "refused"
    except (ConnectionError, asyncio.IncompleteReadError, _Nonsense):
        error, reason = "it does not speak TURN", "protocol"
    except OSError as problem:
        error, reason = f"cannot reach it: {problem.strerror or problem}", "other"
    else:
        return ServerFacts(url=turn.url, seconds=clock.now() - began)
    return ServerFacts(url=turn.url, error=error, reason=reason)


class _Nonsense(Exception):
    """What came is no answer."""


async def _datagrams(addresses: Sequence[Address]) -> None:
    """Returns when the first of them has answered; TimeoutError when none did."""
    tasks = [asyncio.create_task(_datagram(address)) for address in addresses[:2]]
    problem: BaseException = TimeoutError()
    try:
        for done in asyncio.as_completed(tasks):
            try:
                await done
                return
            except (OSError, TimeoutError) as error:
                problem = error
        raise problem
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _datagram(server: Address) -> None:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if server.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as udp:
        udp.setblocking(False)
        with contextlib.suppress(OSError):  # only for the privileged; it works without, too
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SOCKET_MARK)
        udp.connect((server.host, server.port))
        transaction = os.urandom(check.TRANSACTION_LENGTH)
        for wait in WAITS:
            udp.send(check.server_request(transaction))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    while not _answers(await loop.sock_recv(udp, _LARGEST), transaction):
                        pass
                    return
    raise TimeoutError


async def _stream(endpoint: Endpoint, tls: bool) -> None:
    context = ssl.create_default_context() if tls else None
    reader, writer = await asyncio.open_connection(
        endpoint.host, endpoint.port, ssl=context, happy_eyeballs_delay=0.25
    )
    try:
        transaction = os.urandom(check.TRANSACTION_LENGTH)
        writer.write(check.server_request(transaction))
        header = await reader.readexactly(_HEADER)
        length = int.from_bytes(header[2:4])
        if length > _LARGEST or header[0] > 3:
            raise _Nonsense
        if not _answers(header + await reader.readexactly(length), transaction):
            raise _Nonsense
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _answers(data: bytes, transaction: bytes) -> bool:
    """An error is an answer, too."""
    return (
        check.looks_like_stun(data)
        and not check.is_request(data)
        and check.transaction_id_of(data) == transaction
    )
