"""The demo's course: build, connect, move, measure, judge."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.demo.nat import Kind
from cli.demo.netns import CommandError
from cli.demo.pair import MARTLET, Pair, PairError, Session
from cli.demo.view import Step, View, make_view
from cli.demo.world import HostName, World

BROKEN_AFTER = (
    5.0  # seconds of silence, while a path exists, after which a session counts as broken
)
# B can move without telling A only if A's NAT lets its new address in, as many home routers do.
# Behind a stricter one, A finds B again at the other endpoint of its configuration, or by
# rendezvous.
_KINDS: dict[str, Kind] = {"A0": "full-cone", "A1": "full-cone"}
_BEFORE = 0.3  # seconds before an event that belong to its window
_STEADY = 1.0  # seconds of echoes without a longer pause that end an event's window
_PAUSE = 0.25  # seconds without an echo that start the count of _STEADY again
_DEADLINE = 110.0  # seconds: the demo stops moving, whatever happens, and ends within two minutes


Act = Callable[[World, HostName, int], object]


@dataclass(frozen=True)
class Move:
    """An event of the tour: `act` of an end, on the uplink that its active path uses.

    `{u}` in the title is that uplink's interface. `back` undoes the event before, on the same
    uplink; the tunnel may then stay where it is.
    """

    end: HostName
    title: str
    act: Act
    back: bool = False


def _rebind_address(world: World, end: HostName, uplink: int) -> object:
    return world.rebind_nat(end, uplink, port=end == "A", address=True)  # B's port is forwarded


# In every step at least one path between the hosts exists, so the session may never be silent for
# long.
MOVES: tuple[Move, ...] = (
    Move("A", "NAT rebinds, new port", World.rebind_nat),
    Move("A", "NAT rebinds, new public address", _rebind_address),
    Move("B", "NAT rebinds, new public address", _rebind_address),
    Move("A", "new address on {u}", World.change_address),
    Move("B", "new address on {u}", World.change_address),
    Move("A", "interface {u} goes down", World.switch_interface),
    Move("A", "interface {u} is back", World.restore_interface, back=True),
    Move("B", "interface {u} goes down", World.switch_interface),
    Move("B", "interface {u} is back", World.restore_interface, back=True),
    Move("B", "the uplink of {u} stops", World.uplink_down),
    Move("B", "the uplink of {u} is back", World.uplink_up, back=True),
    Move("A", "the uplink of {u} stops", World.uplink_down),
    Move("A", "the uplink of {u} is back", World.uplink_up, back=True),
)


def tour(*, as_json: bool, martlet: Sequence[str] = MARTLET, moves: Sequence[Move] = MOVES) -> int:
    """Run the whole demo; returns its exit code. `martlet` is the command line of the tunnel's
    program.
    """
    started = time.monotonic()
    view = make_view(Console(stderr=as_json))
    steps: list[Step] = []
    session: Session | None = None
    problem = ""
    try:
        with ExitStack() as stack:
            stack.callback(view.close)
            view.say("building two hosts, four NATs and 20 ms of round trip between them")
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="martlet-demo-"))
            )
            world = stack.enter_context(World(directory=directory, kinds=_KINDS))
            pair = Pair(world, directory, martlet=martlet)
            pair.prepare()
            view.say("starting martlet at both hosts")
            pair.up()
            view.say("starting sshd in B and an ssh session from A through the tunnel")
            session = Session(pair)
            session.start()
            stack.callback(session.stop)
            time.sleep(_STEADY)
            paths = (pair.active_path("A"), pair.active_path("B"))
            uplink = 0
            for move in moves:
                if not move.back:
                    uplink = pair.active_uplink(move.end)
                title = f"{move.end}: {move.title.format(u=f'u{uplink}')}"
                if time.monotonic() - started > _DEADLINE:
                    problem = f"out of time before: {title}"
                    break
                view.say(f"{title} ...")
                begin, end = _watch(session, partial(move.act, world, move.end, uplink))
                felt = session.report(begin - _BEFORE, end)
                alive = not session.closed() and felt.closed and felt.gap < BROKEN_AFTER
                before, paths = paths, (pair.active_path("A"), pair.active_path("B"))
                step = Step(
                    at_s=round(begin - started, 1),
                    title=title,
                    gap_ms=round(felt.gap * 1000, 1),
                    path_a=paths[0],
                    path_b=paths[1],
                    moved=paths != before,
                    alive=alive,
                )
                steps.append(step)
                view.step(step)
                if not alive:
                    problem = _why(session, title)
                    break
                if not (step.moved or move.back):
                    problem = f"the tunnel's path did not change: {title}"
                    break
    except (PairError, CommandError) as error:
        problem = str(error)
    return _verdict(view, steps, problem, as_json, time.monotonic() - started)


def _watch(session: Session, act: Callable[[], object]) -> tuple[float, float]:
    """Act, and wait until echoes have flowed steadily for a while, or not at all for too long.

    Returns when it began and when the wait was over, time.monotonic().
    """
    begin = time.monotonic()
    act()
    steady = time.monotonic()
    while not session.closed():
        time.sleep(0.05)
        now = time.monotonic()
        silence = now - session.last_echo()
        if silence > _PAUSE:
            steady = now
        if now - steady >= _STEADY or silence > BROKEN_AFTER:
            break
    return begin, time.monotonic()


def _why(session: Session, title: str) -> str:
    if session.closed():
        return f"the ssh session was closed after: {title}"
    return f"the ssh session was silent for {BROKEN_AFTER:g} s after: {title}"


def _verdict(view: View, steps: Sequence[Step], problem: str, as_json: bool, took: float) -> int:
    survived = not problem and bool(steps)
    moved = sum(step.moved for step in steps)
    longest = max((step.gap_ms for step in steps), default=0.0)
    if survived:
        text = f"the session survived {moved} moves; longest gap {longest:.0f} ms"
    else:
        text = f"failed: {problem}"
    # The view is closed by now: a line of its own, below the table.
    Console(stderr=as_json).print(text, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        result: dict[str, Any] = {
            "survived": survived,
            "events": len(steps),
            "moves": moved,
            "longest_gap_ms": longest,
            "problem": problem or None,
            "seconds": round(took, 1),
            "steps": [step.as_dict() for step in steps],
        }
        json.dump(result, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if survived else 1
