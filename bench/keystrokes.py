"""Keystrokes over a TCP connection of their own: `python -m bench.keystrokes serve|type ...`.

    serve ADDRESS PORT SECONDS                  echoes one connection; "ready" when it listens
    type ADDRESS PORT SECONDS PER_SECOND        a JSON list of [sent, echoed] monotonic seconds,
                                                `null` for an echo that never came

Each keystroke is 64 octets, sent at its own time whether or not the one before was echoed: a
stalled connection is seen by all the keystrokes that wait in it, as by someone who types on.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Sequence

SIZE = 64  # octets of a keystroke and of its echo
_DRAIN = 3.0  # seconds that the last echoes have to come


def serve(address: str, port: int, seconds: float) -> None:
    """Echo one connection until it ends, or the time does."""
    with socket.create_server((address, port)) as server:
        server.settimeout(seconds)
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            _plain(connection)
            connection.settimeout(seconds)
            while data := connection.recv(65536):
                connection.sendall(data)


def type_at(
    address: str, port: int, seconds: float, per_second: float
) -> list[tuple[float, float | None]]:
    """Type for `seconds`; when each keystroke was sent and when the last octet of its echo came."""
    sent: list[float] = []
    echoed: list[float] = []
    octets = 0
    with socket.create_connection((address, port), timeout=10) as connection:
        _plain(connection)
        begin = time.monotonic()
        while True:
            now = time.monotonic()
            due = begin + len(sent) / per_second
            typing = due < begin + seconds
            if typing and now >= due:
                connection.sendall(bytes(SIZE))
                sent.append(now)
                continue
            if not typing and (len(echoed) == len(sent) or now > begin + seconds + _DRAIN):
                break
            wait = due - now if typing else 0.1
            if select.select([connection], [], [], wait)[0]:
                data = connection.recv(65536)
                if not data:
                    break
                now = time.monotonic()
                octets += len(data)
                echoed += [now] * (octets // SIZE - len(echoed))
    missing = len(sent) - len(echoed)
    return list(zip(sent, [*echoed, *[None] * missing], strict=True))


def _plain(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def main(arguments: Sequence[str]) -> None:
    """One end."""
    verb, address, port, seconds, *rest = arguments
    if verb == "serve":
        serve(address, int(port), float(seconds))
    else:
        print(json.dumps(type_at(address, int(port), float(seconds), float(rest[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
