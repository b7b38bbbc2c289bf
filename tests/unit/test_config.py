"""Configuration: what a good file becomes, and what every kind of bad one says."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import (
    Config,
    Endpoint,
    IceConfig,
    PathsConfig,
    RendezvousConfig,
    TurnConfig,
    check_own_key,
    load,
    loads,
    resolve_config_path,
)
from tunnel.errors import ConfigError
from tunnel.identity import PublicKey

KEY_A = PublicKey(b"a" * 32, "office")
KEY_B = PublicKey(b"b" * 32, "phone")

INTERFACE = """\
[interface]
name = "mt0"
address = ["10.88.0.1/24", "fd88::1/64"]
private_key = "id_ed25519"
"""
PEER = f"""\
[[peer]]
name = "office"
public_key = "{KEY_A.openssh}"
endpoint = "198.51.100.7:4117"
allowed_ips = ["10.88.0.2/32", "fd88::2/128"]
"""
PEER_B = f"""\
[[peer]]
name = "phone"
public_key = "{KEY_B.openssh}"
allowed_ips = ["10.88.0.3/32"]
"""
MINIMAL = INTERFACE + PEER  # [interface] is lines 1-4, [[peer]] lines 5-9
TWO = MINIMAL + PEER_B  # the second [[peer]] is lines 10-13


def fail(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loads(text, "/etc/martlet/mt0.toml")
    assert caught.value.file == "/etc/martlet/mt0.toml"
    assert caught.value.exit_code == 3
    return caught.value


def test_minimal_file() -> None:
    config = loads(MINIMAL, "/etc/martlet/mt0.toml")
    interface, (peer,) = config.interface, config.peers
    assert interface.name == "mt0"
    assert interface.address == (ip_interface("10.88.0.1/24"), ip_interface("fd88::1/64"))
    assert interface.private_key == Path("/etc/martlet/id_ed25519")
    assert (interface.mtu, interface.listen_port) == (1420, None)
    assert (peer.name, peer.public_key, peer.public_key.comment) == ("office", KEY_A, "office")
    assert peer.endpoint == (Endpoint("198.51.100.7", 4117),)
    assert peer.bench
    assert peer.allowed_ips == (ip_network("10.88.0.2/32"), ip_network("fd88::2/128"))
    assert (config.rendezvous, config.ice, config.paths) == (None, IceConfig(), PathsConfig())


def test_full_file() -> None:
    config = loads(
        INTERFACE
        + "mtu = 1300\nlisten_port = 4117\n"
        + TWO.removeprefix(INTERFACE).replace(
            '"198.51.100.7:4117"', '["[2001:DB8::0:7]:1", "Office.example:65535"]'
        )
        + """
[rendezvous]
url = "mqtts://broker.example:8883"
[ice]
stun = ["stun.example:3478"]
advertise = ["203.0.113.9:4117"]
turn = [
    { url = "turn:turn.example:3478", username = "alice", password_file = "turn" },
    { url = "turns:[2001:db8::5]?transport=tcp" },
]
exclude_interfaces = ["docker*", "virbr*"]
[paths]
redundancy = "all"
metered = ["wwan*"]
""",
        "/etc/martlet/mt0.toml",
    )
    assert (config.interface.mtu, config.interface.listen_port) == (1300, 4117)
    assert [str(endpoint) for endpoint in config.peers[0].endpoint] == [
        "[2001:db8::7]:1",
        "office.example:65535",
    ]
    assert config.peers[1].endpoint == ()
    assert config.rendezvous == RendezvousConfig(url=("mqtts://broker.example:8883",))
    assert config.ice == IceConfig(
        stun=(Endpoint("stun.example", 3478),),
        advertise=(Endpoint("203.0.113.9", 4117),),
        turn=(
            TurnConfig(
                url="turn:turn.example:3478",
                username="alice",
                password_file=Path("/etc/martlet/turn"),
            ),
            TurnConfig(url="turns:[2001:db8::5]?transport=tcp"),
        ),
        exclude_interfaces=("docker*", "virbr*"),
    )
    assert config.paths == PathsConfig(redundancy="all", metered=("wwan*",))


def change(old: str, new: str, text: str = TWO) -> str:
    assert old in text
    return text.replace(old, new, 1)


ADDRESS = 'address = ["10.88.0.1/24", "fd88::1/64"]'
NETWORKS = 'allowed_ips = ["10.88.0.2/32", "fd88::2/128"]'
ENDPOINT = '"198.51.100.7:4117"'


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        # Shape
        (change('"mt0"', '"mt0'), 2, "", "TOML"),
        ("[interface]\nname = [", 2, "", "TOML"),
        (change("[interface]", "[interfaces]"), 1, "interfaces", "did you mean interface?"),
        ("", None, "interface", "add for example `[interface]`"),
        (INTERFACE, None, "", "add a [[peer]] section"),
        (change("[[peer]]", "[peer]", MINIMAL), 5, "peer", "[[peer]]"),
        ("colour = 3\n" + MINIMAL, 1, "colour", "known here: interface, peer"),
        (change("allowed_ips =", "allowed_ip =", MINIMAL), 9, "peer[0].allowed_ip", "allowed_ips?"),
        (change('name = "phone"\n', ""), 10, "peer[1].name", 'add for example `name = "office"`'),
        (change('"mt0"', "0"), 2, "interface.name", "expected a string, got a whole number"),
        (change('"mt0"', "2024-01-01"), 2, "interface.name", "expected a string, got date"),
        (change(ENDPOINT, "[1]"), 8, "peer[0].endpoint[0]", "expected a string"),
        (change(ENDPOINT, "1"), 8, "peer[0].endpoint", "expected a string or a list, got"),
        (change(ADDRESS, 'address = "10.88.0.1/24"'), 3, "interface.address", "a list, got a str"),
        (INTERFACE + "mtu = true\n" + PEER, 5, "interface.mtu", "a whole number, got true or"),
        (INTERFACE + "mtu = 99999999999999999999999\n" + PEER, 5, "interface.mtu", "out of range"),
        (TWO + "[ice]\nturn = [{ uri = 3 }]\n", 15, "ice.turn[0].uri", "did you mean url?"),
        # [interface]
        (change('"mt0"', '""'), 2, "interface.name", "1 to 15 letters"),
        (change('"mt0"', '"a234567890123456"'), 2, "interface.name", "1 to 15 letters"),
        (change('"mt0"', '"a/b"'), 2, "interface.name", "letters"),
        (change('"mt0"', '"a b"'), 2, "interface.name", "letters"),
        (change('"mt0"', '"mt0\\n"'), 2, "interface.name", "letters"),
        (change('"mt0"', '".."'), 2, "interface.name", "letters"),
        (change('"mt0"', '"-x"'), 2, "interface.name", "letters"),
        (change('"mt0"', '"lo"'), 2, "interface.name", "choose another"),
        (change(ADDRESS, "address = []"), 3, "interface.address", "empty"),
        (change("fd88::1/64", "fd88::1/129"), 3, "interface.address[1]", "10.88.0.1/24"),
        (change("fd88::1/64", "fe80::1%eth0/64"), 3, "interface.address[1]", "prefix length"),
        (change("10.88.0.1/24", "127.0.0.1/8"), 3, "interface.address[0]", "loopback"),
        (change("fd88::1/64", "10.88.0.1/24"), 3, "interface.address[1]", "listed twice"),
        (INTERFACE + "mtu = 1279\n" + PEER, 5, "interface.mtu", "1280 to 65535"),
        (INTERFACE + "mtu = 65536\n" + PEER, 5, "interface.mtu", "1280 to 65535"),
        (
            change(', "fd88::1/64"', "", INTERFACE) + "mtu = 575\n" + PEER,
            5,
            "interface.mtu",
            "a number from 576 to",
        ),
        (INTERFACE + "listen_port = 65536\n" + PEER, 5, "interface.listen_port", "0 to 65535"),
        (INTERFACE + "listen_port = -1\n" + PEER, 5, "interface.listen_port", "0 to 65535"),
        (change('"id_ed25519"', '""'), 4, "interface.private_key", "not a path"),
        (change('"id_ed25519"', '"~nobody-here/x"'), 4, "interface.private_key", "home"),
        # [[peer]]
        (change('"phone"', '"office"'), 11, "peer[1].name", "two peers office"),
        (change('"phone"', '"a phone"'), 11, "peer[1].name", "letters, digits and . _ -"),
        (change('"phone"', '"mt0/phone"'), 11, "peer[1].name", "letters, digits and . _ -"),
        (change('"phone"', '"-phone"'), 11, "peer[1].name", "letters, digits and . _ -"),
        (change(KEY_B.openssh, KEY_A.openssh), 12, "peer[1].public_key", "key of peer office"),
        (change(KEY_B.openssh, "ssh-rsa AAAA"), 12, "peer[1].public_key", "ssh-rsa"),
        (change(KEY_B.openssh, "ssh-ed25519 AA"), 12, "peer[1].public_key", "cut off"),
        (change('["10.88.0.3/32"]', "[]"), 13, "peer[1].allowed_ips", "empty"),
        (change("10.88.0.3/32", "10.88.0.3/33"), 13, "peer[1].allowed_ips[0]", "10.88.0.2/32"),
        (
            change("10.88.0.3/32", "10.88.7.3/24"),
            13,
            "peer[1].allowed_ips[0]",
            "write 10.88.7.0/24, or 10.88.7.3/32 for one host",
        ),
        (change("10.88.0.3/32", "10.88.0.2"), 13, "peer[1].allowed_ips[0]", "office already"),
        (change("10.88.0.3/32", "10.88.0.1"), 13, "peer[1].allowed_ips[0]", "own address"),
        (change("fd88::2/128", "10.88.0.2"), 9, "peer[0].allowed_ips[1]", "listed twice"),
        (change("10.88.0.3/32", "0.0.0.0/0"), 13, "peer[1].allowed_ips[0]", "default route"),
        (change("10.88.0.3/32", "::/0"), 13, "peer[1].allowed_ips[0]", "default route"),
        (
            change("10.88.0.3/32", '0.0.0.0/1", "128.0.0.0/1'),
            13,
            "peer[1].allowed_ips[0]",
            "0.0.0.0/1 makes a default route",
        ),
        (change('"mt0"', "9" * 5000), 14, "", "TOML"),
        ('"a\\nb" = 1\n' + MINIMAL, None, "'a\\nb'", "unknown key"),
        (change("10.88.0.3/32", "127.0.0.0/8"), 13, "peer[1].allowed_ips[0]", "cannot be routed"),
        (change("10.88.0.3/32", "ff02::/16"), 13, "peer[1].allowed_ips[0]", "cannot be routed"),
        (
            change("10.88.0.3/32", "198.51.100.0/24"),
            8,
            "peer[0].endpoint",
            "inside 198.51.100.0/24, allowed_ips of phone",
        ),
        (change(ENDPOINT, '"198.51.100.7"'), 8, "peer[0].endpoint", "host:port"),
        (change(ENDPOINT, '"198.51.100.7:"'), 8, "peer[0].endpoint", "host:port"),
        (change(ENDPOINT, '"198.51.100.7:0"'), 8, "peer[0].endpoint", "1 to 65535"),
        (change(ENDPOINT, '"198.51.100.7:65536"'), 8, "peer[0].endpoint", "1 to 65535"),
        (change(ENDPOINT, '"198.51.100.777:1"'), 8, "peer[0].endpoint", "IPv4"),
        (change(ENDPOINT, '"2001:db8::1:4117"'), 8, "peer[0].endpoint", "brackets"),
        (change(ENDPOINT, '"[2001:db8::1]"'), 8, "peer[0].endpoint", "brackets"),
        (change(ENDPOINT, '"[fe80::1%eth0]:1"'), 8, "peer[0].endpoint", "IPv6"),
        (change(ENDPOINT, '"[a.example]:1"'), 8, "peer[0].endpoint", "IPv6"),
        (change(ENDPOINT, '"127.0.0.1:1"'), 8, "peer[0].endpoint", "loopback"),
        (change(ENDPOINT, '"-a.example:1"'), 8, "peer[0].endpoint", "host name"),
        (change(ENDPOINT, '"a..example:1"'), 8, "peer[0].endpoint", "host name"),
        (change(ENDPOINT, '"bücher.example:1"'), 8, "peer[0].endpoint", "xn--"),
        (change(ENDPOINT, '":4117"'), 8, "peer[0].endpoint", "host name"),
        (change(ENDPOINT, '["a.example:1", "b:x"]'), 8, "peer[0].endpoint[1]", "host:port"),
        # Optional sections
        (TWO + "[rendezvous]\n", 14, "rendezvous.url", "mqtts://broker.example:8883"),
        (TWO + '[rendezvous]\nurl = "http://a"\n', 15, "rendezvous.url", "mqtts://"),
        (TWO + '[rendezvous]\nurl = "mqtt://a:x"\n', 15, "rendezvous.url", "mqtts://"),
        (TWO + "[rendezvous]\nurl = []\n", 15, "rendezvous.url", "list is empty"),
        (TWO + '[rendezvous]\nurl = "mqtt://u:p@a"\n', 15, "rendezvous.url", "rendezvous.username"),
        (TWO + '[rendezvous]\nurl = "mqtt://a/x"\n', 15, "rendezvous.url", "may follow"),
        (
            TWO + '[rendezvous]\nurl = ["mqtt://a", "mqtt://a"]\n',
            15,
            "rendezvous.url[1]",
            "listed twice",
        ),
        (
            TWO + '[rendezvous]\nurl = "mqtt://a"\nusername = "x"\n',
            14,
            "rendezvous",
            "go together",
        ),
        (TWO + '[ice]\nstun = ["stun.example"]\n', 15, "ice.stun[0]", "host:port"),
        (TWO + '[ice]\nadvertise = ["a.example:1"]\n', 15, "ice.advertise[0]", "public IP"),
        (TWO + '[ice]\nturn = [{ url = "a:1" }]\n', 15, "ice.turn[0].url", "turn:"),
        (TWO + '[ice]\nturn = [{ url = "turn:a_b" }]\n', 15, "ice.turn[0].url", "host name"),
        (
            TWO + '[ice]\nturn = [{ url = "turn:a", username = "x" }]\n',
            15,
            "ice.turn[0]",
            "both, or neither",
        ),
        (TWO + '[ice]\nexclude_interfaces = ["a b"]\n', 15, "ice.exclude_interfaces[0]", "pattern"),
        (TWO + '[paths]\nredundancy = "some"\n', 15, "paths.redundancy", '"interactive"'),
        (TWO + "[paths]\nmetered = [1]\n", 15, "paths.metered[0]", "a string"),
    ],
)
def test_fault_is_named(text: str, line: int | None, key: str, words: str) -> None:
    error = fail(text)
    assert (error.line, error.key) == (line, key), str(error)
    assert words in str(error)
    assert error.remedy
    place = "/etc/martlet/mt0.toml" if line is None else f"/etc/martlet/mt0.toml:{line}"
    assert str(error).startswith(f"{place}: ")
    assert "\n" not in str(error)


def test_element_on_a_line_of_its_own() -> None:
    networks = '[\n  "10.88.1.0/24",\n  "10.88.2.1/24",\n]'
    error = fail(change('["10.88.0.3/32"]', networks))
    assert (error.line, error.key) == (15, "peer[1].allowed_ips[1]")


def test_more_specific_network_of_another_peer_is_fine() -> None:
    config = loads(change("10.88.0.3/32", "10.88.0.0/24"), "x.toml")
    assert config.peers[1].allowed_ips == (ip_network("10.88.0.0/24"),)


def test_a_peer_may_be_denied_benches() -> None:
    assert not loads(MINIMAL + "bench = false\n", "x.toml").peers[0].bench
    error = fail(MINIMAL + 'bench = "no"\n')
    assert (error.line, error.key) == (10, "peer[0].bench")
    assert "true or false" in str(error)


def test_ipv4_only_allows_a_small_mtu() -> None:
    text = change(', "fd88::1/64"', "", INTERFACE) + "mtu = 576\n" + PEER
    assert loads(text, "x.toml").interface.mtu == 576


def test_port_zero_is_ephemeral() -> None:
    text = INTERFACE + "listen_port = 0\n" + PEER
    assert loads(text, "x.toml").interface.listen_port is None


def test_private_key_path() -> None:
    def key_path(text: str, file: str) -> Path:
        return loads(change("id_ed25519", text), file).interface.private_key

    assert key_path("/keys/a", "/etc/martlet/x.toml") == Path("/keys/a")
    assert key_path("a", "sub/x.toml") == Path("sub/a")
    assert key_path("~/a", "/etc/martlet/x.toml") == Path.home() / "a"


def test_a_private_key_is_not_repeated() -> None:
    pem = "-----BEGIN OPENSSH PRIVATE KEY-----\\n" + "c2VjcmV0" * 40
    error = fail(change(KEY_B.openssh, pem))
    assert "this is a private key; keep it secret" in str(error)
    assert "c2VjcmV0" * 3 not in str(error)


def test_deep_nesting_is_an_error_like_any_other() -> None:
    assert "nested" in str(fail("a = " + "[" * 100_000))


def test_load_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text(MINIMAL)
    config = load(file)
    assert config.file == file
    assert config.interface.private_key == tmp_path / "id_ed25519"


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file; give a path"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read the configuration: Is a directory"):
        load(tmp_path)
    file = tmp_path / "latin1.toml"
    file.write_bytes(b"[interface]\nname = 'caf\xe9'\n")
    with pytest.raises(ConfigError, match=r"latin1\.toml:2: this is not UTF-8"):
        load(file)


def test_check_own_key(tmp_path: Path) -> None:
    file = tmp_path / "mt0.toml"
    file.write_text(TWO)
    config = load(file)
    check_own_key(config, PublicKey(b"c" * 32))
    with pytest.raises(ConfigError, match="own; write the other host's") as caught:
        check_own_key(config, PublicKey(KEY_B.raw))
    assert (caught.value.line, caught.value.key) == (12, "peer[1].public_key")
    file.unlink()
    with pytest.raises(ConfigError) as caught:
        check_own_key(config, KEY_B)
    assert caught.value.line is None


@pytest.mark.parametrize(
    ("given_name", "path"),
    [
        ("mt0", "/etc/martlet/mt0.toml"),
        ("./mt0", "mt0"),
        ("mt0.toml", "mt0.toml"),
        ("/srv/a", "/srv/a"),
    ],
)
def test_resolve_config_path(given_name: str, path: str) -> None:
    assert resolve_config_path(given_name) == Path(path)


@pytest.mark.parametrize("text", ["192.0.2.1:1", "[2001:db8::1]:65535", "a-b.example.:53", "a:1"])
def test_endpoint_round_trip(text: str) -> None:
    endpoint = Endpoint.parse(text)
    assert str(endpoint) == text
    assert (endpoint.ip is None) == text.startswith("a")


@given(st.text())
def test_arbitrary_endpoint_fails_only_with_value_error(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text)
    except ValueError:
        return
    assert Endpoint.parse(str(endpoint)) == endpoint


@given(st.text(alphabet="[]{}=\"'.,#\n abnp1:/", max_size=60), st.integers(0, len(TWO)))
def test_arbitrary_text_fails_only_with_config_error(noise: str, at: int) -> None:
    try:
        config = loads(TWO[:at] + noise + TWO[at:], "x.toml")
    except ConfigError as error:
        assert str(error).startswith("x.toml")
    else:
        assert isinstance(config, Config)
