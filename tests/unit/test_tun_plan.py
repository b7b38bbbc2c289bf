"""tun.plan: which steps, in which order, and what is refused."""

from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tun.errors import TunError
from tun.plan import TXQUEUELEN, AddRoute, check_name, difference, plan

ADDRESSES = (ip_interface("10.88.0.1/24"), ip_interface("fd88::1/64"))


def networks(*texts: str) -> list[IPv4Network | IPv6Network]:
    return [ip_network(text) for text in texts]


def test_steps_print_as_the_ip_commands_in_order() -> None:
    steps = plan("mt0", ADDRESSES, 1420, networks("10.99.0.0/16", "fd99::/48"))
    assert [str(step) for step in steps] == [
        f"ip link set mt0 mtu 1420 txqueuelen {TXQUEUELEN}",
        "ip link set mt0 addrgenmode none",
        "ip address add 10.88.0.1/24 dev mt0",
        "ip address add fd88::1/64 dev mt0 nodad",
        "ip link set mt0 up",
        "ip route add 10.99.0.0/16 dev mt0",
        "ip route add fd99::/48 dev mt0",
    ]


@pytest.mark.parametrize(
    ("allowed", "routed"),
    [
        (["10.88.0.2/32"], []),  # inside the on-link network
        (["10.88.0.0/24"], []),  # the on-link network itself
        (["10.88.0.0/16"], ["10.88.0.0/16"]),  # wider than it
        (["fd88::2/128", "fd88::/64"], []),
        (["10.99.0.1/32", "10.99.0.1/32"], ["10.99.0.1/32"]),
        (["10.99.0.0/16", "10.99.1.0/24"], ["10.99.1.0/24", "10.99.0.0/16"]),
        (["fd99::/48", "192.0.2.0/24"], ["192.0.2.0/24", "fd99::/48"]),
    ],
)
def test_routes(allowed: list[str], routed: list[str]) -> None:
    steps = plan("mt0", ADDRESSES, 1420, networks(*allowed))
    assert [str(step.network) for step in steps if isinstance(step, AddRoute)] == routed


def test_a_host_address_has_no_on_link_network() -> None:
    steps = plan("mt0", [ip_interface("10.88.0.1/32")], 1420, networks("10.88.0.2/32"))
    assert AddRoute("mt0", IPv4Network("10.88.0.2/32")) in steps


@pytest.mark.parametrize(
    "allowed",
    [
        ["0.0.0.0/0"],
        ["::/0"],
        ["10.88.0.2/32", "::/0"],
        ["0.0.0.0/1", "128.0.0.0/1"],
        ["::/1", "8000::/2", "c000::/2"],
    ],
)
def test_a_default_route_is_refused_with_the_reason(allowed: list[str]) -> None:
    with pytest.raises(TunError, match="no exit nodes yet") as caught:
        plan("mt0", ADDRESSES, 1420, networks(*allowed))
    assert caught.value.kind == "default_route"


@pytest.mark.parametrize("name", ["mt0", "a", "a" * 15, "mt-0.1_x", "..."])
def test_good_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "a" * 16, ".", "..", "a/b", "a:b", "a b", "mt%d", "mté", "\n"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(TunError, match="is no interface name") as caught:
        plan(name, ADDRESSES, 1420)
    assert caught.value.kind == "name"


@given(
    st.lists(
        st.integers(1, 32).flatmap(
            lambda bits: st.integers(0, 2**bits - 1).map(
                lambda prefix: IPv4Network((prefix << (32 - bits), bits))
            )
        ),
        max_size=8,
    )
)
def test_every_allowed_network_is_routed_exactly_once_or_on_link(
    allowed: list[IPv4Network],
) -> None:
    try:
        steps = plan("mt0", ADDRESSES, 1420, allowed)
    except TunError as error:
        assert error.kind == "default_route"
        return
    routed = [step.network for step in steps if isinstance(step, AddRoute)]
    assert len(routed) == len(set(routed))
    on_link = IPv4Network("10.88.0.0/24")
    assert set(routed) == {network for network in allowed if not network.subnet_of(on_link)}


def test_the_difference_is_what_changed() -> None:
    before = plan("mt0", ADDRESSES, 1420, networks("10.99.0.0/16", "fd99::/48"))
    assert difference(before, before) == ((), ())
    more = (*ADDRESSES, ip_interface("fd6d::1/128"))
    after = plan("mt0", more, 1420, networks("10.99.0.0/16", "10.98.0.0/16"))
    gone, new = difference(before, after)
    assert [str(step) for step in gone] == ["ip route add fd99::/48 dev mt0"]
    assert [str(step) for step in new] == [
        "ip address add fd6d::1/128 dev mt0 nodad",
        "ip route add 10.98.0.0/16 dev mt0",
    ]
