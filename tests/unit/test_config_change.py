"""tunnel.config_change: what a running tunnel can take of a new configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunnel.config import Config, loads
from tunnel.config_change import Change, change
from tunnel.errors import ConfigError
from tunnel.identity import Identity

KEYS = [Identity.generate().public_key.openssh for _ in range(3)]
INTERFACE = """
[interface]
name = "mt0"
address = ["10.88.0.1/24"]
private_key = "key"
"""
OFFICE = f"""
[[peer]]
name = "office"
public_key = "{KEYS[0]}"
allowed_ips = ["10.88.0.2/32"]
"""
HOME = f"""
[[peer]]
name = "home"
public_key = "{KEYS[1]}"
allowed_ips = ["10.88.0.3/32"]
"""


def read(*parts: str, file: str = "/etc/martlet/mt0.toml") -> Config:
    return loads("".join(parts), file)


def test_peers_come_and_go_and_addresses_come() -> None:
    before = read(INTERFACE, OFFICE)
    assert not change(before, read("# a comment\n", INTERFACE, OFFICE))
    more = INTERFACE.replace('"10.88.0.1/24"', '"fd88::1/64", "10.88.0.1/24"')
    after = read(more, HOME)
    found = change(before, after)
    assert found == Change(
        addresses=(after.interface.address[0],), added=after.peers, removed=("office",)
    )
    assert found


@pytest.mark.parametrize(
    ("after", "named"),
    [
        ([INTERFACE.replace("mt0", "mt1"), OFFICE], "interface.name"),
        ([INTERFACE + "mtu = 1400\n", OFFICE], "interface.mtu"),
        ([INTERFACE + "mtu = 1400\nlisten_port = 1\n", OFFICE],
         "interface.mtu, interface.listen_port"),
        ([INTERFACE.replace('"key"', '"other"'), OFFICE], "interface.private_key"),
        ([INTERFACE.replace("0.1/24", "0.9/24"), OFFICE], "interface.address (one is gone)"),
        ([INTERFACE, OFFICE + 'endpoint = "192.0.2.1:1"\n'], "endpoint of peer office"),
        ([INTERFACE, OFFICE.replace("0.2/32", "0.4/32") + "bench = false\n"],
         "allowed_ips and bench of peer office"),
        ([INTERFACE, OFFICE.replace(KEYS[0], KEYS[2])], "public_key of peer office"),
        ([INTERFACE, OFFICE.replace("office", "bureau")], "the name of peer office"),
        ([INTERFACE, OFFICE, '[rendezvous]\nurl = "mqtt://h"\n'], "rendezvous"),
        ([INTERFACE, OFFICE, '[ice]\nport_mapping = false\n'], "ice.port_mapping"),
        ([INTERFACE, OFFICE, '[paths]\nmetered = ["w*"]\n'], "paths.metered"),
        ([INTERFACE + "mtu = 1400\n", OFFICE + 'endpoint = "192.0.2.1:1"\n', HOME,
          '[paths]\nredundancy = "off"\n'],
         "interface.mtu, endpoint of peer office, paths.redundancy"),
    ],
)  # fmt: skip
def test_everything_else_is_named(after: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        change(read(INTERFACE, OFFICE), read(*after))
    text = str(caught.value)
    assert f"goes on as it was: {named};" in text
    assert text.endswith("`martlet down mt0`, then `martlet up mt0`")


def test_the_remedy_names_the_file_that_was_used(tmp_path: Path) -> None:
    wanted = read(INTERFACE + "mtu = 1400\n", OFFICE, file=str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match=f"`martlet up {tmp_path}/mine.toml`"):
        change(read(INTERFACE, OFFICE), wanted)


def test_a_changed_broker_is_named() -> None:
    rendezvous = '[rendezvous]\nurl = "mqtt://h"\n'
    with pytest.raises(ConfigError, match=r"rendezvous\.url"):
        change(
            read(INTERFACE, OFFICE, rendezvous),
            read(INTERFACE, OFFICE, rendezvous.replace("//h", "//i")),
        )
