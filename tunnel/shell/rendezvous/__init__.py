"""`martlet rendezvous`: where peers meet that cannot reach each other yet.

::

    hosts --MQTT, TLS------------------> [ broker: mosquitto, or amqtt in this process ]
    hosts --WebSocket--> [ gateway ] ----^ (a Unix socket)
    hosts --UDP--------> [ STUN ]

What hosts tell each other is sealed end to end, so the broker needs no accounts and is not trusted:
it sees addresses and timing. But strangers reach it as well. So nobody can listen to topics that he
does not know (no wildcards), nothing is kept for later (no retained messages, little queue), and
messages, connections and memory are bounded (`limits`).
"""
