"""Words and joins inside the seal: what is written is read, and anything else is None."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.config import Endpoint
from tunnel.ice.candidate import Candidate, Kind
from tunnel.path.network import Address
from tunnel.rendezvous.addresses import inner_address
from tunnel.rendezvous.join_messages import (
    MAX_ADDRESSES,
    MAX_DETAIL,
    MAX_NETWORKS,
    MAX_STUN,
    MAX_TURN,
    Answer,
    Join,
    Reason,
    Refused,
    Thanks,
    TurnServer,
    Welcome,
    Wishes,
    decode_inviter,
    decode_joiner,
    encode_answer,
    encode_join,
    encode_thanks,
    mac_of,
)
from tunnel.rendezvous.messages import MAX_CANDIDATES, Offer, Word, decode, encode
from tunnel.rendezvous.sealing import MAX_MESSAGE

numbers = st.integers(0, 2**63 - 1)
short = st.binary(min_size=16, max_size=16)
keys = st.binary(min_size=32, max_size=32)
ice_chars = st.text(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", min_size=4, max_size=64
)
ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
addresses = st.builds(Address, ips, st.integers(1, 65535))
candidates = st.builds(
    Candidate, addresses, st.sampled_from(Kind), st.integers(0, 255), st.booleans()
)
offers = st.builds(
    Offer,
    ice_chars,
    ice_chars,
    numbers,
    st.lists(candidates, max_size=MAX_CANDIDATES).map(tuple),
    st.sampled_from([True, False, None]),
)
presences = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=26, max_size=26).map(
    "martlet/1/{}".format
)
words = st.builds(
    Word, short, numbers, short, st.one_of(st.just(b""), short), st.booleans(), presences, offers
)

KEY = bytes(range(32))
SINGLE = inner_address(KEY)
WELCOME = Welcome("alice", (SINGLE,))
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789._", min_size=1, max_size=64)
singles = st.binary(min_size=32, max_size=32).map(inner_address)
networks = st.ip_addresses(v=4, network="10.0.0.0/8").map(lambda ip: ip_network(f"{ip}/32"))
wishes = st.builds(
    Wishes,
    st.lists(singles, max_size=MAX_ADDRESSES).map(tuple),
    st.booleans(),
    st.lists(networks, max_size=MAX_NETWORKS).map(tuple),
)
printable = st.text(max_size=100).filter(str.isprintable)
turns = st.one_of(
    st.just(TurnServer("turn:turn.example")),
    st.builds(TurnServer, st.just("turns:turn.example:5349"), printable, printable),
)
welcomes = st.builds(
    Welcome,
    names,
    st.lists(singles, min_size=1, max_size=MAX_ADDRESSES).map(tuple),
    st.lists(singles, max_size=MAX_ADDRESSES).map(tuple),
    st.just(("mqtts://broker.example:8883", "wss://broker.example/mqtt")),
    st.lists(
        st.builds(Endpoint, st.just("stun.example"), st.integers(1, 65535)), max_size=MAX_STUN
    ).map(tuple),
    st.lists(turns, max_size=MAX_TURN).map(tuple),
    st.lists(networks, max_size=MAX_NETWORKS).map(tuple),
)
details = st.text(max_size=MAX_DETAIL).filter(str.isprintable)


def fields(body: bytes) -> dict[str, object]:
    found: dict[str, object] = msgspec.msgpack.decode(body)
    return found


def changed(body: bytes, **values: object) -> bytes:
    return msgspec.msgpack.encode({**fields(body), **values})


# words


@given(words)
def test_words(word: Word) -> None:
    assert decode(encode(word)) == word


def longest_word() -> Word:
    host = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    full = tuple(
        Candidate(Address(host, 65535 - n), Kind.RELAY, 255, False) for n in range(MAX_CANDIDATES)
    )
    offer = Offer("u" * 64, "p" * 64, 2**63 - 1, full, True)
    nonce = bytes(16)
    return Word(nonce, 2**63 - 1, nonce, nonce, True, "martlet/1/" + "a" * 26, offer)


def test_the_longest_word_fits_a_message() -> None:
    assert len(encode(longest_word())) + 48 + 64 + 2 <= MAX_MESSAGE


@given(words, st.data())
def test_a_part_of_a_word_is_none(word: Word, data: st.DataObject) -> None:
    body = encode(word)
    assert decode(body[: data.draw(st.integers(0, len(body) - 1))]) is None


@given(st.binary(max_size=512))
def test_any_bytes(body: bytes) -> None:
    assert decode(body) is None
    assert decode_joiner(body) is None
    assert decode_inviter(body) is None


def test_nesting_without_end() -> None:
    body = b"\x91" * 4000
    assert decode(body) is None
    assert decode_joiner(body) is None
    assert decode_inviter(body) is None


def test_an_unknown_field_is_skipped() -> None:
    word = longest_word()
    assert decode(changed(encode(word), colour="red")) == word


def test_what_is_not_known_of_a_nat_is_not_said() -> None:
    """As older ends do not say it."""
    word = longest_word()
    unknown = replace(word, offer=replace(word.offer, hard=None))
    assert fields(encode(word)).keys() - fields(encode(unknown)).keys() == {"hard"}


@pytest.mark.parametrize(
    "values",
    [
        {"boot": bytes(15)},
        {"boot": bytes(17)},
        {"seq": -1},
        {"seq": 2**63},
        {"seq": "1"},
        {"nonce": b""},
        {"nonce": bytes(17)},
        {"echo": bytes(17)},
        {"ask": 1},
        {"presence": "#"},
        {"presence": "martlet/1/+"},
        {"presence": "martlet/1/" + "a" * 27},
        {"presence": "$SYS/broker/clients/total"},
        {"ufrag": "abc"},
        {"ufrag": "a:b:c:d"},
        {"ufrag": "a" * 65},
        {"password": "\x1b[31m"},
        {"password": "ä" * 22},
        {"generation": 1.5},
        {"hard": 1},
        {"candidates": None},
        {"candidates": [{"address": "192.0.2.1:1"}]},
        {
            "candidates": [
                {"address": "broker.example:1", "kind": "host", "rank": 0, "metered": False}
            ]
        },
        {"candidates": [{"address": "192.0.2.1:1", "kind": "best", "rank": 0, "metered": False}]},
        {"candidates": [{"address": "192.0.2.1:1", "kind": "host", "rank": 256, "metered": False}]},
        {
            "candidates": [{"address": "192.0.2.1:1", "kind": "host", "rank": 0, "metered": False}]
            * 33
        },
    ],
    ids=lambda values: f"{next(iter(values))}",
)
def test_words_that_are_none(values: dict[str, object]) -> None:
    body = encode(longest_word())
    assert decode(body) is not None
    assert decode(changed(body, **values)) is None


# joins


@given(keys, short, keys, names, wishes)
def test_joins(key: bytes, nonce: bytes, mac: bytes, name: str, wanted: Wishes) -> None:
    join = Join(key, nonce, mac, name, wanted)
    assert decode_joiner(encode_join(join)) == join
    assert decode_inviter(encode_join(join)) is None


@given(keys)
def test_thanks(key: bytes) -> None:
    assert decode_joiner(encode_thanks(Thanks(key))) == Thanks(key)


@given(short, welcomes)
def test_welcomes(echo: bytes, welcome: Welcome) -> None:
    answer = Answer(echo, welcome)
    assert decode_inviter(encode_answer(answer)) == answer
    assert decode_joiner(encode_answer(answer)) is None


@given(short, st.sampled_from(Reason), details)
def test_refusals(echo: bytes, reason: Reason, detail: str) -> None:
    answer = Answer(echo, Refused(reason, detail))
    assert decode_inviter(encode_answer(answer)) == answer


def test_a_reason_that_is_newer_than_we_are() -> None:
    body = encode_answer(Answer(bytes(16), Refused(Reason.USED, "so it is")))
    answer = decode_inviter(changed(body, reason="full"))
    assert answer == Answer(bytes(16), Refused(Reason.REFUSED, "so it is"))


@given(keys, short, keys, names, wishes, st.data())
def test_a_part_of_a_join_is_none(
    key: bytes, nonce: bytes, mac: bytes, name: str, wanted: Wishes, data: st.DataObject
) -> None:
    body = encode_join(Join(key, nonce, mac, name, wanted))
    assert decode_joiner(body[: data.draw(st.integers(0, len(body) - 1))]) is None


@pytest.mark.parametrize(
    "values",
    [
        {"type": "leave"},
        {"key": bytes(31)},
        {"nonce": bytes(15)},
        {"mac": bytes(33)},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "a b"},
        {"name": 'a"\nprivate_key = "'},
        {"name": "\x1b[2J"},
        {"addresses": ["fd88::1"]},
        {"addresses": ["fd88::1/64"]},
        {"addresses": ["0.0.0.0/0"]},
        {"addresses": ["127.0.0.1/32"]},
        {"addresses": ["fe80::1%eth0/128"]},
        {"addresses": ["fd88::1/128"] * (MAX_ADDRESSES + 1)},
        {"addresses": ["x" * 4000]},
        {"clashes": ["10.0.0.0/8"] * (MAX_NETWORKS + 1)},
        {"clashes": ["10.0.0.1/8"]},
        {"clashes": ["lan"]},
        {"wants_ipv4": "yes"},
    ],
    ids=lambda values: f"{next(iter(values))}",
)
def test_joins_that_are_none(values: dict[str, object]) -> None:
    body = encode_join(Join(KEY, bytes(16), bytes(32), "bob", Wishes((SINGLE,))))
    assert decode_joiner(body) is not None
    assert decode_joiner(changed(body, **values)) is None


@pytest.mark.parametrize(
    "values",
    [
        {"echo": bytes(8)},
        {"name": "../../etc/passwd"},
        {"addresses": []},
        {"addresses": ["10.0.0.0/8"]},
        {"addresses": ["::/0"]},
        {"assigned": ["10.88.0.2/24"]},
        {"rendezvous": ["http://broker.example"]},
        {"rendezvous": ["mqtt://broker.example\n[[peer]]"]},
        {"rendezvous": ["mqtt://broker.example"] * 5},
        {"rendezvous": ["mqtt://" + "b" * 250]},
        {"stun": ["stun.example"]},
        {"stun": ["stun.example:3478"] * (MAX_STUN + 1)},
        {"turn": [{"url": "turn:turn.example", "username": "u", "password": None}]},
        {"turn": [{"url": "turn:turn.example", "username": "u\n", "password": "p"}]},
        {"turn": [{"url": 'turn:turn.example"', "username": None, "password": None}]},
        {"turn": [{"url": "turn:turn.example", "username": None, "password": None}] * 5},
        {"routes": ["10.0.0.1/8"]},
        {"routes": ["10.0.0.0/8"] * (MAX_NETWORKS + 1)},
    ],
    ids=lambda values: f"{next(iter(values))}",
)
def test_welcomes_that_are_none(values: dict[str, object]) -> None:
    body = encode_answer(Answer(bytes(16), WELCOME))
    assert decode_inviter(body) is not None
    assert decode_inviter(changed(body, **values)) is None


@pytest.mark.parametrize("detail", ["x" * (MAX_DETAIL + 1), "\x1b[31mno", "no\n"])
def test_refusals_that_are_none(detail: str) -> None:
    body = encode_answer(Answer(bytes(16), Refused(Reason.REFUSED)))
    assert decode_inviter(changed(body, detail=detail)) is None


def test_secrets_are_not_shown() -> None:
    turn = TurnServer("turn:turn.example", "u", "hunter2")
    assert "hunter2" not in repr(Answer(bytes(16), Welcome("alice", (SINGLE,), turn=(turn,))))


def test_a_mac_is_bound_to_everything() -> None:
    given_ = [b"s" * 16, b"a" * 32, b"b" * 32, b"n" * 16]
    macs = {mac_of(*given_)}
    for position, value in enumerate(given_):
        other = list(given_)
        other[position] = b"x" * len(value)
        macs.add(mac_of(*other))
    macs.add(mac_of(given_[0], given_[2], given_[1], given_[3]))
    assert len(macs) == 6
