"""Public servers of a lab, real ones from Debian: a broker (mosquitto), STUN and TURN (coturn).

Each runs in a namespace of its caller's choice, reads and writes nothing outside its directory,
listens when its constructor returns, and ends with its namespace or by `stop`.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cli.demo.netns import Namespace, terminate
from cli.demo.pair import tail

STUN_PORT = 3478  # RFC 8489 section 18.6; TURN has the same (RFC 8656 section 3.1)
MQTT_PORT, MQTTS_PORT = 1883, 8883  # as registered with IANA
HTTPS_PORT = 443  # what passes firewalls that let nothing else pass
_START = 10.0  # seconds that a server may take to listen
_RELAYED = (50000, 50999)  # ports of relayed addresses
_VALID = datetime.timedelta(days=1)


def listed(hosts: Iterable[str], port: int) -> list[str]:
    """`address:port` of each, IPv6 in brackets."""
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


class Server:
    """A process that listens on some ports of some addresses, and can be restarted."""

    def __init__(
        self,
        space: Namespace,
        argv: Sequence[str],
        log: Path,
        udp: Sequence[str],
        tcp: Sequence[str],
    ) -> None:
        self.space = space
        self.log = log
        self._argv = list(argv)
        self._wanted = {"-Hlun": list(udp), "-Hltn": list(tcp)}
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens everywhere."""
        self.process = self.space.popen(self._argv, log=self.log)
        deadline = time.monotonic() + _START
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._argv[0]} does not listen: {tail(self.log)}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it."""
        terminate([self.process])

    def _listens(self) -> bool:
        return all(
            endpoint in listening
            for option, wanted in self._wanted.items()
            if wanted
            for listening in [self.space.run(["ss", option]).stdout.split()]
            for endpoint in wanted
        )


# ---- certificates ----


@dataclass(frozen=True)
class Certificate:
    """Files of a server's certificate and its key, in PEM; it vouches for itself."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path, addresses: Iterable[str]) -> Certificate:
        """A new one for these IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "martlet lab")])
        now = datetime.datetime.now(datetime.UTC)
        subjects = [x509.IPAddress(ip_address(address)) for address in addresses]
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _VALID)
            .not_valid_after(now + _VALID)
            .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        found = cls(directory / "server.pem", directory / "server.key")
        found.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        found.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return found


# ---- the servers ----


class Broker(Server):
    """mosquitto for everybody: MQTT on 1883, MQTT over TLS on 8883 and on 443."""

    def __init__(
        self, space: Namespace, addresses: Sequence[str], directory: Path, certificate: Certificate
    ) -> None:
        self.addresses = list(addresses)
        self.certificate = certificate
        config = directory / "mosquitto.conf"
        lines = ["allow_anonymous true", "persistence false", "per_listener_settings false"]
        # As root it would become a user of its own, who may not read the directory.
        lines += ["user root", "log_dest stderr", "log_type all", "connection_messages true"]
        for port in (MQTT_PORT, MQTTS_PORT, HTTPS_PORT):
            for address in addresses:
                lines.append(f"listener {port} {address}")
                if port != MQTT_PORT:
                    lines += [f"certfile {certificate.certificate}", f"keyfile {certificate.key}"]
        config.write_text("\n".join(lines) + "\n")
        listens = [
            one for port in (MQTT_PORT, MQTTS_PORT, HTTPS_PORT) for one in listed(addresses, port)
        ]
        argv = ["mosquitto", "-c", str(config)]
        super().__init__(space, argv, directory / "mosquitto.log", [], listens)

    def subscriptions(self) -> int:
        """How many requests to subscribe it has granted so far."""
        return self.log.read_text(errors="replace").count("Sending SUBACK")


def _coturn(directory: Path, name: str, addresses: Iterable[str], *lines: str) -> list[str]:
    config = directory / f"{name}.conf"
    common = [f"listening-ip={host}" for host in addresses]
    common += [f"listening-port={STUN_PORT}", "no-cli", "no-dtls", "no-stdout-log", "simple-log"]
    common += [f"log-file={directory}/{name}.events", f"pidfile={directory}/{name}.pid"]
    common += [f"userdb={directory}/{name}.db"]
    config.write_text("\n".join([*common, *lines]) + "\n")
    return ["turnserver", "-c", str(config)]


class Stun(Server):
    """coturn without TURN, on UDP. With two addresses of a family it also answers as RFC 5780
    wants it: from the other address, the other port or both.
    """

    def __init__(
        self, space: Namespace, addresses: Mapping[int, Sequence[str]], directory: Path
    ) -> None:
        self.addresses = {family: hosts[0] for family, hosts in addresses.items()}
        self.endpoints = listed(self.addresses.values(), STUN_PORT)
        hosts = [host for family in addresses.values() for host in family]
        more = [] if any(len(family) > 1 for family in addresses.values()) else ["no-rfc5780"]
        argv = _coturn(directory, "stun", hosts, "stun-only", "no-auth", "no-tcp", "no-tls", *more)
        super().__init__(space, argv, directory / "stun.log", listed(hosts, STUN_PORT), [])


class Turn(Server):
    """coturn with one user: TURN over UDP and TCP on 3478, over TLS on 443."""

    username, password, realm = "martlet", "kept in the nest", "lab"

    def __init__(
        self, space: Namespace, addresses: Sequence[str], directory: Path, certificate: Certificate
    ) -> None:
        self.addresses = list(addresses)
        self.password_file = directory / "turn.password"
        self.password_file.write_text(self.password + "\n")
        self.password_file.chmod(0o600)
        lines = ["lt-cred-mech", "fingerprint", "no-rfc5780", "no-multicast-peers"]
        lines += [f"user={self.username}:{self.password}", f"realm={self.realm}"]
        lines += [f"relay-ip={host}" for host in addresses]
        lines += [f"min-port={_RELAYED[0]}", f"max-port={_RELAYED[1]}"]
        lines += [f"tls-listening-port={HTTPS_PORT}"]
        lines += [f"cert={certificate.certificate}", f"pkey={certificate.key}"]
        argv = _coturn(directory, "turn", addresses, *lines)
        tcp = [one for port in (STUN_PORT, HTTPS_PORT) for one in listed(addresses, port)]
        udp = listed(addresses, STUN_PORT)
        super().__init__(space, argv, directory / "turn.log", udp, tcp)


def tables(broker: Broker, stun: Stun, turn: Turn | None = None) -> str:
    """The tables of a configuration that name them: the broker by TLS at both ports, TURN in the
    order UDP, TCP, TLS.
    """
    ports = (MQTTS_PORT, HTTPS_PORT)
    brokers = [f"mqtts://{at}" for port in ports for at in listed(broker.addresses, port)]
    lines = [
        "[rendezvous]",
        f"url = {json.dumps(brokers)}",
        f'ca_file = "{broker.certificate.certificate}"',
        "[ice]",
        f"stun = {json.dumps(stun.endpoints)}",
    ]
    if turn is not None:
        (plain,) = listed(turn.addresses, STUN_PORT)
        (tls,) = listed(turn.addresses, HTTPS_PORT)
        ways = [f"turn:{plain}", f"turn:{plain}?transport=tcp", f"turns:{tls}?transport=tcp"]
        user = f'username = "{turn.username}", password_file = "{turn.password_file}"'
        lines += ["turn = [", *(f'    {{ url = "{way}", {user} }},' for way in ways), "]"]
    return "\n".join(lines) + "\n"
