"""The roaming matrix without a network: goals, cells, tables, traces, drills."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bench import drills, stability, watch
from bench.acts import Mover
from bench.bed import Mode
from bench.drills import Done, Drill
from bench.roam import rows
from bench.roam.goals import RESOLUTION, Goal, goal
from bench.roam.rows import ROWS, cells
from bench.roam.runs import Cell, Run, named
from bench.roam.table import Outcome, table
from cli.demo.trace import Trace, TraceWriter


class TestGoals:
    @pytest.mark.parametrize(
        ("row", "way", "mode", "rtt", "expected"),
        [
            ("link-down", "from", "off", 20, (8, 15)),
            ("link-down", "toward", "off", 20, (28, 40)),
            ("link-down", "toward", "off", 80, (88, 100)),
            ("link-down", "toward", "interactive", 80, (3, 8)),
            ("black-hole", "from", "off", 20, (50, 80)),
            ("black-hole", "from", "off", 80, None),
            ("black-hole", "from", "interactive", 20, (3, 8)),
            ("rebind", "from", "off", 20, (3, 8)),
            ("rebind", "toward", "off", 20, (25, 35)),
            ("address", "from", "off", 20, (8, 20)),
            ("address", "toward", "off", 20, (28, 45)),
            ("address", "toward", "interactive", 20, None),
            ("make-before-break", "toward", "off", 20, (0, 5)),
            ("make-before-break", "from", "interactive", 20, (0, 3)),
            ("both", "A>B", "off", 20, (60, 100)),
            ("both", "A>B", "interactive", 20, (5, 15)),
            ("suspend", "B>A", "interactive", 20, (60, 60)),
            ("suspend", "ssh", "interactive", 20, None),
            ("outage", "ssh", "off", 20, (1000, 1000)),
            ("outage", "from", "off", 20, None),
            ("connect", "A>B", "off", 80, (270, 270)),
            ("link-down", "from", "wireguard-go", 20, None),
        ],
    )
    def test_those_of_the_design(
        self, row: str, way: str, mode: Mode, rtt: float, expected: tuple[float, float] | None
    ) -> None:
        assert goal(row, way, mode, rtt) == (expected and Goal(*expected))

    def test_expansion_by_nats(self) -> None:
        found = [
            goal("expansion", "answered", "interactive", 20, f"{n}") for n in ("0 NATs", "1 NAT")
        ]
        assert found == [Goal(80, None), Goal(100, None)]
        assert goal("expansion", "usable", "off", 20, "0 NATs") is None

    def test_met(self) -> None:
        aim = Goal(8, 15)
        assert aim.met([1, 8, 15])
        assert aim.met([8 + RESOLUTION])
        assert not aim.met([9 + RESOLUTION])
        assert not aim.met([1, 1, 15.1 + RESOLUTION])
        assert not aim.met([])
        assert Goal(8, None).met([1, 2, 100])


class TestRows:
    def test_every_row_has_cells_and_a_world(self) -> None:
        found = cells(ROWS, "both", rival=True)
        assert {row.name for row, _ in found} == {row.name for row in ROWS}
        for row, cell in found:
            made = row.bed(cell.mover, cell.variant, 4)
            assert made["family"] in (4, 6)
            assert row.name == cell.row
        assert len({cell for _, cell in found}) == len(found)

    def test_modes(self) -> None:
        by_name = {row.name: row for row in ROWS}
        down, connect = by_name["link-down"], by_name["connect"]
        assert list(down.modes("both", True)) == ["off", "interactive", "wireguard-go"]
        assert list(down.modes("off", False)) == ["off"]
        assert list(connect.modes("both", True)) == ["interactive"]
        assert list(connect.modes("off", False)) == ["off"]

    def test_one_mover(self) -> None:
        assert {cell.mover for _, cell in cells(ROWS, "off", False, "both")} == {"both"}

    @pytest.mark.parametrize(
        ("variant", "mover", "nat66", "family"),
        [("0 NATs", "A", False, 6), ("1 NAT", "B", "B", 6), ("2 NATs", "A", True, 4)],
    )
    def test_nats_on_the_way(
        self, variant: str, mover: Mover, nat66: bool | str, family: int
    ) -> None:
        (row,) = (row for row in ROWS if row.name == "expansion")
        made = row.bed(mover, variant, 4)
        assert (made["nat66"], made["family"]) == (nat66, family)

    @pytest.mark.parametrize(
        ("direction", "mover", "way"),
        [
            ("a_to_b", "A", "from"),
            ("b_to_a", "A", "toward"),
            ("a_to_b", "B", "toward"),
            ("a_to_b", "both", "A>B"),
            ("b_to_a", "both", "B>A"),
        ],
    )
    def test_ways(self, direction: str, mover: Mover, way: str) -> None:
        assert named(direction, mover) == way


def outcome(mode: Mode = "off", *gaps: float | None, **run: Any) -> Outcome:
    made = Outcome(Cell("link-down", "A", "", mode), 20.0)
    for gap in gaps:
        made.runs.append(
            Run(figures={"from": gap}, lost={"from": 2}, duplicated={"from": 1}, **run)
        )
    return made


class TestTable:
    def test_a_line_for_each_way(self) -> None:
        head, _, line = table([outcome("off", 1.0, 3.0, 12.0, ssh_gap_ms=41.0)]).splitlines()
        shown = dict(zip(words(head), words(line), strict=True))
        assert shown["event"] == "link-down" and shown["redundancy"] == "off"
        assert (shown["median"], shown["p95"], shown["max"]) == ("3.0", "12.0", "12.0")
        assert (shown["lost"], shown["dup"], shown["ssh max"]) == ("6", "3", "41")
        assert (shown["goal"], shown["goal p95"], shown["met"]) == ("8", "15", "yes")

    def test_what_never_came_is_not_met(self) -> None:
        made = outcome("off", 1.0, None)
        assert made.met("from") is False
        assert "1/2" in table([made])

    def test_unmoved_runs_are_named(self) -> None:
        assert "yes, 2 unmoved" in table([outcome("off", 1.0, 1.0, moved=False)])

    def test_the_rival_stands_beside(self) -> None:
        shown = table([outcome("off", 1.0), outcome("wireguard-go", 30.0, 40.0)])
        assert len(shown.splitlines()) == 3
        assert words(shown.splitlines()[2])[-2:] == ["35.0 / 40.0", "4"]

    def test_the_rival_alone(self) -> None:
        shown = table([outcome("wireguard-go", 30.0)])
        assert words(shown.splitlines()[2])[3] == "wireguard-go"

    def test_a_default_is_no_redundancy_goal(self) -> None:
        made = Outcome(Cell("suspend", "both", "NATs keep", "interactive"), 20.0, False)
        made.runs.append(Run(figures={"A>B": 50.0}))
        assert made.met("A>B") is True
        assert "default" in table([made])

    def test_json(self) -> None:
        made = outcome("off", 1.0, None, ssh_alive=False)
        plain = json.loads(json.dumps(made.as_dict()))
        assert plain["dead"] == 2
        assert plain["summary"]["from"]["figures_ms"] == [1.0, None]
        assert plain["summary"]["from"]["goal_ms"] == {"median": 8, "p95": 15}
        assert len(plain["runs"]) == 2

    def test_nothing_measured(self) -> None:
        assert len(table([]).splitlines()) == 2
        assert json.dumps(Outcome(Cell("both", "both", "", "off"), 20.0).as_dict())


class TestDrills:
    def test_a_drill_follows_from_seed_and_number(self) -> None:
        drawn = [Drill.drawn(7, number) for number in range(300)]
        assert drawn == [Drill.drawn(7, number) for number in range(300)]
        assert drawn != [Drill.drawn(8, number) for number in range(300)]
        assert {one.event for one in drawn} == set(drills.EVENTS)
        assert {one.mover for one in drawn} == {"A", "B", "both"}
        for one in drawn:
            event = drills.EVENTS[one.event]
            assert one.variant in event.variants
            assert 0 <= one.hold <= event.longest

    def test_summary_and_line(self) -> None:
        drill = Drill(3, "rebind", "A", "port", 0.0)
        good = Done(drill, {"A>B": 1.0, "B>A": 20.0})
        bad = Done(drill, {"A>B": 1.0, "B>A": 900.0}, stuck=["ssh"], dead=True)
        found = drills.summary([good, bad])
        assert (found["drills"], found["dead_sessions"]) == (2, 1)
        assert found["stuck_flows"] == {"ssh": 1}
        assert found["events"]["rebind"]["max_ms"] == 900
        assert bad.line(7).startswith("7/3 ") and "STUCK: ssh" in bad.line(7)
        assert "STUCK" not in good.line(7)


class TestStability:
    def test_table(self) -> None:
        found = {
            "traffic": "sparse", "mode": "off", "migrations": 0, "suspicions": 2, "sent": 200,
            "lost": 3, "duplicated": 0, "reordered": 1, "gap_ms": 12.3, "ssh_gap_ms": 40.0,
            "stream_gap_ms": None,
        }  # fmt: skip
        line = words(stability.table([found]).splitlines()[2])
        assert line == [
            "sparse", "off", "0", "2", "200", "3", "1.50", "0", "1", "12", "40", "-",
        ]  # fmt: skip


class TestTraces:
    def test_from_a_time_on(self, tmp_path: Path) -> None:
        path = tmp_path / "trace"
        with path.open("wb") as file:
            writer = TraceWriter(file)
            for number in range(50):
                writer.sent(number, 10.0 + number)
                writer.arrived(number, 9.5 + number, 10.5 + number)
        assert len(Trace.read(path).sent) == 50
        part = Trace.read(path, 40.2)
        assert part.arrivals[0].time == 40.5 and part.sent[0].time == 41.0
        assert len(part.arrivals) == 20
        assert Trace.read(path, 1000.0).sent == []
        assert Trace.read(path, 1.0).sent == Trace.read(path).sent
        assert Trace.read(tmp_path / "nothing", 5.0).arrivals == []


class TestWatch:
    @staticmethod
    def message(kind: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body

    def test_announcements(self) -> None:
        address = self.message(20, struct.pack("=BBBBI", 2, 24, 0, 0, 3))
        link_local = self.message(20, struct.pack("=BBBBI", 10, 64, 0, 253, 3))
        gone = self.message(21, struct.pack("=BBBBI", 2, 24, 0, 0, 3))
        default = self.message(24, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0))
        other = self.message(24, struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 2, 253, 1, 0))
        data = address + link_local + other + gone + default
        assert list(watch.announced(data)) == ["address", "no address", "default route"]
        assert list(watch.announced(data[:20])) == []
        assert list(watch.announced(b"")) == []

    def test_answers(self) -> None:
        def seen(first: bytes) -> bool:
            return watch.Datagram(0.0, "u1", False, ("a", 1), ("b", 2), first).is_answer

        assert seen(b"\x01\x01\x00\x00") and seen(b"\x40") and seen(b"\x7f")
        assert not (seen(b"\x00\x01") or seen(b"\x01\x11") or seen(b"\xc0") or seen(b""))


def words(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_epilog_names_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.roam import main

    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {row.name} " in shown for row in rows.ROWS)
