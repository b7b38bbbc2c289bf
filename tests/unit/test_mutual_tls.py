"""Both ends prove an expected Ed25519 key, or there is no connection."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import HandshakeCompleted
from aioquic.tls import AlertDescription
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from tests.unit.quic_pair import CLIENT, SERVER, Host, Pair, identity
from tunnel.path.network import PathKey
from tunnel.quic.configuration import connection_configuration
from tunnel.quic.connection import PeerConnection

CRYPTO_ERROR = 0x100  # RFC 9000 section 20.1: plus the TLS alert
MINE, PEER, STRANGER = identity(1), identity(2), identity(3)

Configure = Callable[[QuicConfiguration], None]


def never_established(host: Host) -> None:
    assert not host.connection.is_open
    assert host.connection.peer_key is None
    assert not host.of(HandshakeCompleted)


def refused(pair: Pair, by: Host, alert: AlertDescription) -> None:
    """`by` turns the other end away, and neither considers it established for a moment."""
    pair.dial()
    acceptor = pair.server
    for _ in range(300):
        pair.run(0.01)
        assert not acceptor.connection.is_open
        assert not by.connection.is_open
    never_established(acceptor)
    never_established(by)
    assert by.connection.is_closed
    for host in pair.hosts:
        closed = pair.closed(host)
        assert closed is not None and closed.error_code == CRYPTO_ERROR + alert, host.name


def certificate(
    key: Any, *, after: datetime = datetime(2020, 1, 1, tzinfo=UTC), before: datetime | None = None
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anybody")])
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(after)
        .not_valid_after(before or datetime(2050, 1, 1, tzinfo=UTC))
        .sign(key, digest)
    )


def shows(key: Any, **dates: datetime) -> Configure:
    def configure(configuration: QuicConfiguration) -> None:
        configuration.private_key = key
        configuration.certificate = certificate(key, **dates)

    return configure


def shows_nothing(configuration: QuicConfiguration) -> None:
    configuration.private_key = configuration.certificate = None


def with_configuration(end: str, configure: Configure) -> Pair:
    if end == "client":
        return Pair(client_configuration=configure)
    return Pair(server_configuration=configure)


def test_two_that_know_each_other() -> None:
    pair = Pair()
    pair.dial()
    pair.run(1.0)
    assert all(host.connection.is_open for host in pair.hosts)
    assert pair.client.connection.peer_key == PEER.public_key.raw
    assert pair.server.connection.peer_key == MINE.public_key.raw


def test_a_client_without_a_certificate() -> None:
    pair = Pair(client_configuration=shows_nothing)
    refused(pair, pair.server, AlertDescription.handshake_failure)


def test_a_client_with_a_wrong_key() -> None:
    pair = Pair(client_identity=STRANGER)
    refused(pair, pair.server, AlertDescription.bad_certificate)


def test_a_server_with_a_wrong_key() -> None:
    pair = Pair(server_identity=STRANGER)
    refused(pair, pair.client, AlertDescription.bad_certificate)


def test_ones_own_key_at_the_other_end_of_a_dial() -> None:
    """A reflector, or our own address: whoever answers holds our key, not the peer's."""
    pair = Pair(server_identity=MINE)
    refused(pair, pair.client, AlertDescription.bad_certificate)


def test_ones_own_key_dialling_in() -> None:
    pair = Pair(client_identity=PEER)
    refused(pair, pair.server, AlertDescription.bad_certificate)


def test_an_ecdsa_certificate_of_the_client() -> None:
    pair = Pair(client_configuration=shows(ec.generate_private_key(ec.SECP256R1())))
    refused(pair, pair.server, AlertDescription.unsupported_certificate)


def test_an_ecdsa_certificate_of_the_server() -> None:
    pair = Pair(server_configuration=shows(ec.generate_private_key(ec.SECP256R1())))
    refused(pair, pair.client, AlertDescription.unsupported_certificate)


def test_an_rsa_certificate_of_the_client() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pair = Pair(client_configuration=shows(key))
    refused(pair, pair.server, AlertDescription.unsupported_certificate)


@pytest.mark.parametrize("end", ["client", "server"])
def test_anothers_certificate_without_its_key(end: str) -> None:
    """The certificate is the expected one, and is public; the signature is a stranger's."""

    def configure(configuration: QuicConfiguration) -> None:
        configuration.private_key = STRANGER.private_key

    pair = with_configuration(end, configure)
    by = pair.server if end == "client" else pair.client
    refused(pair, by, AlertDescription.decrypt_error)


@pytest.mark.parametrize(
    "dates",
    [
        {"after": datetime(2001, 1, 1, tzinfo=UTC), "before": datetime(2002, 1, 1, tzinfo=UTC)},
        {"after": datetime(2998, 1, 1, tzinfo=UTC), "before": datetime(2999, 1, 1, tzinfo=UTC)},
    ],
    ids=["expired", "not yet valid"],
)
@pytest.mark.parametrize("end", ["client", "server"])
def test_dates_never_matter(end: str, dates: dict[str, datetime]) -> None:
    key = (MINE if end == "client" else PEER).private_key
    pair = with_configuration(end, shows(key, **dates))
    pair.dial()
    pair.run(1.0)
    assert all(host.connection.is_open for host in pair.hosts)


def test_no_session_ticket_skips_the_certificates() -> None:
    """Resumption would; the acceptor hands out none."""
    pair = Pair()
    tickets: list[object] = []
    pair.client.connection._session_ticket_handler = tickets.append
    pair.dial()
    pair.run(1.0)
    assert pair.client.connection.is_open and not tickets


def test_another_protocol_is_refused() -> None:
    def configure(configuration: QuicConfiguration) -> None:
        configuration.alpn_protocols = ["h3"]

    pair = Pair(client_configuration=configure)
    refused(pair, pair.server, AlertDescription.no_application_protocol)


def test_each_end_judges_with_its_own_predicate() -> None:
    asked: list[bytes] = []

    def accepts(key: bytes) -> bool:
        asked.append(key)
        return False

    pair = Pair()
    pair.server.connection = PeerConnection(
        configuration=connection_configuration(
            PEER, is_client=False, keylog=None, quic_logger=None
        ),
        path=PathKey(SERVER, CLIENT),
        datapath=pair.server.datapath,
        accepts=accepts,
        reset_token=lambda cid: bytes(16),
        original_destination_connection_id=(
            pair.client.connection.original_destination_connection_id
        ),
    )
    refused(pair, pair.server, AlertDescription.bad_certificate)
    assert asked == [MINE.public_key.raw]
