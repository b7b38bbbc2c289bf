"""A real TURN server in a namespace: Debian's coturn, over UDP, TCP and TLS.

Its relayed addresses are its own. It knows one user by long-term credentials. Its certificate is
made for the occasion: `environment` has a tunnel trust it. It reads and writes nothing outside its
directory, and ends with its namespace or by `stop`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cli.demo.netns import Namespace, terminate
from cli.demo.pair import tail

PORT, TLS_PORT = 3478, 5349  # RFC 8656 section 18
USER, PASSWORD, REALM = "martlet", "swallow", "martlet.test"
_START = 10.0  # seconds it may take to listen


class TurnServer:
    """Listens on these addresses, by family; running when the constructor returns.

    `quota`: allocations that the user may have; 0: any number.
    """

    def __init__(
        self, space: Namespace, addresses: Mapping[int, str], directory: Path, *, quota: int = 0
    ) -> None:
        self.space = space
        self.addresses = dict(addresses)
        self.log = directory / "coturn.log"
        self.events = directory / "coturn.events"
        self.certificate = directory / "coturn.pem"
        self.password_file = directory / "turn.password"
        self.password_file.write_text(PASSWORD + "\n")
        self.password_file.chmod(0o600)
        self.environment = {"SSL_CERT_FILE": str(self.certificate)}
        self._directory = directory
        self._quota = quota
        _make_certificate(self.certificate, directory / "coturn.key", self.addresses.values())
        self.start()

    def start(self) -> None:
        config = self._directory / "coturn.conf"
        config.write_text(self._config())
        self._process = self.space.popen(["turnserver", "-c", str(config)], log=self.log)
        deadline = time.monotonic() + _START
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"turnserver does not listen: {tail(self.log)}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        terminate([self._process])

    def url(self, *, secure: bool = False, transport: str = "", family: int = 4) -> str:
        """As [ice] turn has it."""
        host = self.addresses[family]
        host = f"[{host}]" if family == 6 else host
        scheme, port = ("turns", TLS_PORT) if secure else ("turn", PORT)
        return f"{scheme}:{host}:{port}" + (f"?transport={transport}" if transport else "")

    def toml(self, *urls: str, password_file: Path | None = None) -> str:
        """The [ice] table of a configuration."""
        file = password_file or self.password_file
        rows = [
            f'{{ url = "{url}", username = "{USER}", password_file = "{file}" }}' for url in urls
        ]
        return f"[ice]\nturn = [{', '.join(rows)}]\n"

    def _listens(self) -> bool:
        listening = self.space.run(["ss", "-Hlnut"]).stdout.split()
        hosts = [f"[{host}]" if ":" in host else host for host in self.addresses.values()]
        return all(f"{h}:{port}" in listening for h in hosts for port in (PORT, TLS_PORT))

    def _config(self) -> str:
        directory = self._directory
        lines = [f"listening-ip={host}" for host in self.addresses.values()]
        lines += [f"relay-ip={host}" for host in self.addresses.values()]
        lines += [f"listening-port={PORT}", f"tls-listening-port={TLS_PORT}"]
        lines += ["lt-cred-mech", f"user={USER}:{PASSWORD}", f"realm={REALM}"]
        lines += [f"cert={self.certificate}", f"pkey={directory}/coturn.key"]
        lines += ["no-rfc5780", "no-cli", "no-dtls", "no-tcp-relay", "no-stdout-log", "simple-log"]
        lines += [f"log-file={self.events}", f"pidfile={directory}/coturn.pid"]
        lines += [f"userdb={directory}/coturn.db", "verbose"]
        if self._quota:
            lines.append(f"user-quota={self._quota}")
        return "\n".join(lines) + "\n"


def _make_certificate(certificate: Path, key: Path, hosts: Iterable[str]) -> None:
    """One that vouches for itself and for these addresses, for a day."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, REALM)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ip_address(host)) for host in hosts]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
