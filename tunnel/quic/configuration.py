"""How our connections are set up; the same for every peer."""

import ssl
from typing import TextIO

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.logger import QuicLogger
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite

from tunnel.identity import Identity
from tunnel.quic.admission import CONNECTION_ID_LENGTH

ALPN = "martlet/1"
IDLE_TIMEOUT = 7 * 86400.0
"""Seconds. The tunnel holds for days; whether the peer lives is judged elsewhere."""
INITIAL_RTT = 0.1
"""Seconds, for timers before the first measurement: the first Initial is repeated after 200 ms."""
MAX_DATAGRAM_FRAME = 65535  # bytes we accept (RFC 9221 section 3)
MAX_CONTROL_DATA = 65536  # bytes of flow control; the control stream carries small messages


def connection_configuration(
    identity: Identity,
    *,
    is_client: bool,
    keylog: TextIO | None,
    quic_logger: QuicLogger | None,
) -> QuicConfiguration:
    """QUIC v1 only, AES-128-GCM or ChaCha20-Poly1305, our certificate on either role."""
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        idle_timeout=IDLE_TIMEOUT,
        connection_id_length=CONNECTION_ID_LENGTH,
        max_data=MAX_CONTROL_DATA,
        max_stream_data=MAX_CONTROL_DATA,
        max_datagram_frame_size=MAX_DATAGRAM_FRAME,
        initial_rtt=INITIAL_RTT,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        cipher_suites=[
            CipherSuite.AES_128_GCM_SHA256,
            CipherSuite.CHACHA20_POLY1305_SHA256,
        ],
        certificate=identity.certificate,
        private_key=identity.private_key,
        verify_mode=ssl.CERT_NONE,  # keys are compared, not chains or dates
        secrets_log_file=keylog,
        quic_logger=quic_logger,
    )
