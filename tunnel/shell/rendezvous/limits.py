"""What a stranger may do at a broker of ours; the same for every kind of broker."""

from __future__ import annotations

import re

NAME = 64
"""Characters of a topic behind its prefix; those of hosts have 26."""

TOPIC = re.compile(rf"martlet/1/[A-Za-z0-9]{{1,{NAME}}}")
"""Topics that may be used: names that only those can know who derived them from their keys."""

PAYLOAD = 4096
"""Bytes of a message: the largest offer that hosts make."""

PACKET = 5120
"""Bytes of any MQTT packet: a message and its topic, or a SUBSCRIBE to a hundred topics."""

IN_FLIGHT = 100
"""Messages to one client that it has not acknowledged. At 20 ms of round trip 5,000 a second."""

QUEUED = 1000
"""Messages that wait behind those: an offer from each peer of a large network, all at once."""

QUEUED_BYTES = 1 << 16
"""Bytes of messages that wait; the smaller of the two counts."""

SUBSCRIPTIONS = 4096
"""Topics of one client: two for each peer, and some."""

KEEPALIVE = 120
"""Seconds: the longest that a client may ask to be silent for. Ours asks for 30."""

CONNECT_TIMEOUT = 10.0
"""Seconds from a connection to its CONNECT."""

MEMORY_PER_CLIENT = 32768
"""Bytes the broker may take for each client on average, queues included; a host that behaves takes
a twentieth of it (docs/rendezvous.md)."""

MEMORY_BASE = 64 << 20
"""Bytes the broker may take besides."""

MAX_CLIENTS = 10_000
"""Connections at a time, unless told otherwise."""
