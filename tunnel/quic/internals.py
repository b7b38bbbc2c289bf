"""Every private name of aioquic that this project touches, checked when the package is imported.

aioquic is pinned exactly. An upgrade must pass through here: a name that is gone, or a version
that nobody has looked at, fails at once and in one place, not in the middle of a migration.
"""

import aioquic
from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoContext, CryptoPair
from aioquic.quic.recovery import QuicPacketSpace

PINNED_VERSION = "1.7.2"

CONNECTION_METHODS = (
    "_flush_builder",
    "_handle_ack_frame",
    "_handle_datagram_frame",
    "_handle_new_connection_id_frame",
    "_handle_path_challenge_frame",
    "_handle_path_response_frame",
    "_idle_timeout",
    "_initialize",
    "_on_path_challenge_delivery",
    "_payload_received",
    "_replenish_connection_ids",
    "_retire_peer_cid",
    "_send_probe",
    "_serialize_transport_parameters",
    "_update_traffic_key",
    "_write_application",
    "_write_path_challenge_frame",
    "_write_path_response_frame",
)
CONNECTION_ATTRIBUTES = (
    "_close_at",
    "_close_pending",
    "_configuration",
    "_cryptos",
    "_events",
    "_handshake_confirmed",
    "_host_cids",
    "_is_client",
    "_local_max_streams_bidi",
    "_local_max_streams_uni",
    "_loss",
    "_network_paths",
    "_pacing_at",
    "_packet_number",
    "_peer_cid",
    "_peer_cid_available",
    "_peer_retire_prior_to",
    "_peer_token",
    "_probe_pending",
    "_quic_logger",
    "_remote_ack_delay_exponent",
    "_spaces",
    "_spin_bit",
    "_state",
    "_version",
)
CONTEXT_METHODS = ("_check_certificate_verify_signature", "_server_handle_certificate")
CONTEXT_ATTRIBUTES = ("_peer_certificate", "_request_client_certificate")
CRYPTO_CONTEXT_ATTRIBUTES = ("cipher_suite", "key_phase", "secret", "version")
CRYPTO_PAIR_METHODS = ("encrypt_packet", "key_phase", "update_key")
CRYPTO_PAIR_ATTRIBUTES = ("aead_tag_size", "recv", "send")
RECOVERY_ATTRIBUTES = (
    "_get_loss_space",
    "_pto_count",
    "_rtt_initialized",
    "_rtt_min",
    "_time_of_last_sent_ack_eliciting_packet",
    "max_ack_delay",
)
SPACE_ATTRIBUTES = ("ack_at", "ack_queue", "sent_packets")


def _check() -> None:
    if aioquic.__version__ != PINNED_VERSION:
        raise ImportError(
            f"martlet is written against aioquic {PINNED_VERSION}, found {aioquic.__version__}: "
            "run './dev setup', or pip install 'aioquic==" + PINNED_VERSION + "'"
        )
    connection = QuicConnection(configuration=QuicConfiguration())
    expected: list[tuple[object, tuple[str, ...]]] = [
        (QuicConnection, CONNECTION_METHODS),
        (connection, CONNECTION_ATTRIBUTES),
        (tls.Context, CONTEXT_METHODS),
        (tls.Context(is_client=False), CONTEXT_ATTRIBUTES),
        (CryptoContext(), CRYPTO_CONTEXT_ATTRIBUTES),
        (CryptoPair, CRYPTO_PAIR_METHODS),
        (CryptoPair(), CRYPTO_PAIR_ATTRIBUTES),
        (connection._loss, RECOVERY_ATTRIBUTES),
        (QuicPacketSpace(), SPACE_ATTRIBUTES),
    ]
    missing = [
        f"{type(owner).__name__}.{name}"
        for owner, names in expected
        for name in names
        if not hasattr(owner, name)
    ]
    if missing:
        raise ImportError(f"aioquic {aioquic.__version__} lacks {', '.join(missing)}")


_check()
