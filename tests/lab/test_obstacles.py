"""What is told when something is in the way of a running tunnel: at either end, in plain words.

    [A] u0 --[its routers]-- A --+------+-- broker (mosquitto), a second one beside it
                                 | core |-- stun, turn (coturn)
    [B] u0 --[its routers]-- B --+------+

Each case is looked for where a user would look: `martlet status`, `martlet why`, the log of
`martlet up`, and `martlet doctor`. Not the exact words are asserted but those that matter: what it
is, and what to do. Run with -s to read them; docs/obstacles.md quotes them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.nat.kinds import KINDS, Meeting
from bench.nat.place import Place
from bench.servers import Broker, Certificate, listed
from cli.demo.core import PYTHON_ENV
from cli.demo.pair import DEVICE, MARTLET
from cli.demo.world import HostName
from tests.lab.hosts import until
from tests.lab.test_meeting import pings, start, until_direct
from tunnel.identity import Identity

MakePlace = Callable[..., Place]
PATIENCE = 60.0
"""Seconds on a busy machine: the log tells after 5, and STUN servers are asked every 20."""
HOME, BLOCKED, HARD = KINDS["port-restricted"], KINDS["udp-blocked"], KINDS["symmetric"]
OTHER: dict[HostName, HostName] = {"A": "B", "B": "A"}
HOUR = 3600

SHIFTED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *found)
{
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, found);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        found->tv_sec += SHIFT;
    return failed;
}

int gettimeofday(struct timeval *found, void *zone)
{
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    if (!failed)
        *found = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return failed;
}

time_t time(time_t *found)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found)
        *found = now.tv_sec;
    return now.tv_sec;
}
"""
"""To be loaded into a process before anything else: its wall clock is wrong."""


def martlet(place: Place, host: HostName, *arguments: str) -> str:
    """What a command prints at a host; it may fail, but not crash."""
    environment = {**PYTHON_ENV, **place.pair.environment}
    done = place.pair.space(host).run([*MARTLET, *arguments], env=environment, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def log(place: Place, host: HostName) -> str:
    return place.pair.log(host).read_text(errors="replace")


def doctor(place: Place, host: HostName, check: str) -> str:
    """Findings of this check that are not ok, with their remedies."""
    told = martlet(place, host, "doctor", str(place.pair.config(host)), "--json")
    found = [f for f in json.loads(told)["findings"] if f["check"] == check and f["state"] != "ok"]
    return "\n".join(f"{f['state']} {f['summary']} -> {f['remedy']}" for f in found)


def tells(text: Callable[[], str], *words: str) -> str:
    """Wait until one line of a text has all these words; that line."""

    def matching() -> list[str]:
        return [line for line in text().splitlines() if all(word in line for word in words)]

    until(lambda: bool(matching()), lambda: (words, text()), PATIENCE)
    print(matching()[-1])
    return matching()[-1]


class Told:
    """What is told at one host."""

    def __init__(self, place: Place, host: HostName) -> None:
        self._place, self._host = place, host
        self.peer = OTHER[host].lower()

    def by_status(self, *words: str) -> None:
        tells(lambda: martlet(self._place, self._host, "status", DEVICE), *words)

    def by_why(self, *words: str) -> None:
        tells(lambda: martlet(self._place, self._host, "why", self.peer), *words)

    def by_the_log(self, event: str, *words: str) -> None:
        tells(lambda: log(self._place, self._host), "warning", event, *words)

    def by_all(self, *words: str, event: str = "cannot reach peer") -> None:
        """By status, why and the log alike."""
        self.by_status(*words)
        self.by_why(*words)
        self.by_the_log(event, *words)

    def by_the_doctor(self, check: str, *words: str) -> None:
        tells(lambda: doctor(self._place, self._host, check), *words)


def start_both(place: Place) -> None:
    for host in OTHER:
        place.pair.start(host)
    until(lambda: all(map(place.status, OTHER)), lambda: list(map(log, [place] * 2, OTHER)))


def edit(place: Place, host: HostName, pattern: str, replacement: str) -> None:
    """Change a host's configuration."""
    config = place.pair.config(host)
    text, count = re.subn(pattern, replacement, config.read_text())
    assert count == 1
    config.write_text(text)


# the broker


def test_the_broker_is_down(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, HOME), turn=False)
    place.net.broker.stop()
    start_both(place)
    for host in OTHER:
        told = Told(place, host)
        refused = ("refuses the connection", "is the broker running?", "martlet rendezvous")
        told.by_status("rendezvous mqtts://", "connecting", *refused)
        told.by_why("rendezvous mqtts://", *refused)
        told.by_the_log("no broker", "mqtts://", *refused)
        told.by_all("no broker of [rendezvous] serves us")
    Told(place, "A").by_the_doctor("broker", "refuses the connection", "martlet rendezvous")
    Told(place, "A").by_the_doctor("peer", "no broker lets us in")
    place.net.broker.start()
    until_direct(place, PATIENCE)
    assert "refuses" not in martlet(place, "A", "status", DEVICE), "it is over"


def test_the_broker_goes_while_the_tunnel_is_up(make_place: MakePlace) -> None:
    """It is told, and nothing else happens."""
    place = make_place(Meeting(HOME, HOME), turn=False)
    start(place)
    until_direct(place)
    place.net.broker.stop()
    told = Told(place, "A")
    told.by_status("rendezvous mqtts://", "connecting", "refuses the connection", "running?")
    told.by_the_log("no broker", "refuses the connection", "is the broker running?")
    assert place.direct() and pings(place)
    assert "cannot reach peer" not in log(place, "A")


def test_different_brokers(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, HOME), turn=False)
    broker = place.net.broker
    second = str(place.net.stun.space.run(["hostname", "-I"]).stdout.split()[0])
    directory = place.directory / "second"
    directory.mkdir()
    certificate = Certificate.make(directory, [second])
    other = Broker(place.net.stun.space, [second], directory, certificate)
    urls = json.dumps([f"mqtts://{at}" for at in listed([second], 8883)])
    edit(place, "B", r"url = \[.*mqtts.*\]", f"url = {urls}")
    edit(place, "B", r"ca_file = .*", f'ca_file = "{certificate.certificate}"')
    start_both(place)
    until(lambda: broker.subscriptions() > 0 < other.subscriptions(), lambda: "no subscriptions")
    for host in OTHER:
        told = Told(place, host)
        told.by_all("not heard of at the rendezvous", "another broker", "compare url")
    Told(place, "A").by_the_doctor("peer", "another broker", "compare url")


# the relay


def test_the_password_of_the_relay_is_wrong(make_place: MakePlace) -> None:
    """Between two hard NATs, which nothing else connects."""
    place = make_place(Meeting(HARD, HARD))
    assert place.net.turn is not None
    place.net.turn.password_file.write_text("sparrow\n")
    start(place)
    for host in OTHER:
        told = Told(place, host)
        wrong = ("turn:", "refuses the user name or the password", "check username and password")
        told.by_status("TURN server", *wrong)
        told.by_why("TURN server", *wrong)
        told.by_the_log("no relay", *wrong)
        told.by_all("none of", "ways to it answers", "hard kind", "no TURN server", "status")
    Told(place, "A").by_the_doctor("turn", "problem", *wrong)


# UDP


def test_udp_is_blocked_at_one_end(make_place: MakePlace) -> None:
    place = make_place(Meeting(BLOCKED, HOME), turn=False)
    start(place)
    Told(place, "A").by_all("UDP is blocked here", "let UDP out", "turns:", event="obstacle")
    Told(place, "B").by_all("UDP may be blocked over there", "martlet doctor there", "turns:")
    Told(place, "A").by_the_doctor("udp", "problem", "UDP is blocked here", "let UDP out")
    Told(place, "A").by_the_doctor("peer", "UDP does not get out of here")
    Told(place, "B").by_the_doctor("peer", "UDP may be blocked over there", "martlet doctor there")


def test_udp_is_blocked_while_the_tunnel_is_up(make_place: MakePlace) -> None:
    """It holds; both ends tell why, and it goes on by itself when the firewall lets it."""
    place = make_place(Meeting(HOME, HOME), turn=False)
    start(place)
    until_direct(place)
    router = place.net.routers["A"][-1].space
    router.run(["nft", "-f", "-"], input="""
        table inet dark {
          chain forward { type filter hook forward priority filter - 1; meta l4proto udp drop; }
        }""")  # fmt: skip
    Told(place, "A").by_status("holding")
    Told(place, "A").by_all("UDP is blocked here", "let UDP out", event="obstacle")
    Told(place, "B").by_all("UDP", "blocked over there", "martlet doctor")
    router.run(["nft", "delete", "table", "inet", "dark"])
    until(lambda: pings(place), lambda: place.paths("A"), PATIENCE)
    assert "blocked" not in martlet(place, "A", "why", "b")


def test_udp_is_blocked_and_the_relay_serves(make_place: MakePlace) -> None:
    """It is told, and the tunnel is up."""
    place = make_place(Meeting(BLOCKED, HOME))
    start(place)
    until(lambda: place.relayed("A") is True, lambda: place.paths("A"), PATIENCE)
    Told(place, "A").by_all(
        "UDP is blocked here", "peers are reached by the relay", event="obstacle"
    )
    Told(place, "A").by_the_doctor("udp", "warning", "UDP is blocked here", "by the relay")
    assert pings(place)


# keys


def stranger() -> str:
    return Identity.generate().public_key.openssh


@pytest.mark.parametrize("wrong", ["A", "B"])
def test_a_wrong_key_at_the_rendezvous(make_place: MakePlace, wrong: HostName) -> None:
    """The two are on different topics, and hear nothing of each other: all that may be told."""
    place = make_place(Meeting(HOME, HOME), turn=False)
    edit(place, wrong, r'public_key = ".*"', f'public_key = "{stranger()}"')
    start(place)
    for host in OTHER:
        Told(place, host).by_all("not heard of at the rendezvous", "wrong key", "martlet pubkey")
    Told(place, "A").by_the_doctor("peer", "wrong key", "martlet pubkey")


def test_who_is_dialled_has_a_wrong_key_of_who_dials(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, KINDS["public"]), turn=False, dialled=True)
    right = place.pair.space("A").run(
        [*MARTLET, "pubkey", str(place.pair.key("A"))], env=PYTHON_ENV
    )
    key = " ".join(right.stdout.split()[:2])
    edit(place, "B", r'public_key = ".*"', f'public_key = "{stranger()}"')
    start_both(place)
    Told(place, "A").by_all("refuses our public key", "martlet pubkey")
    Told(place, "A").by_the_doctor("peer", "refuses our public key", "martlet pubkey")
    told = Told(place, "B")
    told.by_status("no [[peer]] has its public key", key, "correct its public_key here")
    told.by_why("no [[peer]] has its public key", key)
    told.by_the_log("refused", "no [[peer]] has its public key", key)


def test_who_dials_has_a_wrong_key_of_who_is_dialled(make_place: MakePlace) -> None:
    place = make_place(Meeting(HOME, KINDS["public"]), turn=False, dialled=True)
    edit(place, "A", r'public_key = ".*"', f'public_key = "{stranger()}"')
    start_both(place)
    Told(place, "A").by_all("dialled at", "did not answer", "public_key", "martlet pubkey")
    Told(place, "A").by_the_doctor("peer", "did not answer", "martlet pubkey")
    for by in (Told(place, "B").by_status, Told(place, "B").by_why):
        by("takes it for another", "wrong public_key", "martlet pubkey")


# clocks


@pytest.mark.parametrize("shift", [HOUR, -HOUR])
def test_clocks_an_hour_apart_do_not_matter(
    make_place: MakePlace, tmp_path: Path, shift: int
) -> None:
    """A's wall clock is wrong, that of its TLS, too; whatever is said is fresh all the same."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(SHIFTED_CLOCK)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DSHIFT=({shift})", str(source), "-o", str(library), "-ldl"],
        check=True,
    )
    place = make_place(Meeting(HOME, HOME), turn=False)
    start(place, "B")
    place.pair.environment = {**place.pair.environment, "LD_PRELOAD": str(library)}
    start(place, "A")
    until_direct(place)
    assert pings(place)
    since = [place.pair.status(host)["rendezvous"]["since"] for host in OTHER]
    assert abs(since[0] - since[1] - shift) < 600, "the clocks do differ"
    assert "warning" not in log(place, "A") + log(place, "B")
