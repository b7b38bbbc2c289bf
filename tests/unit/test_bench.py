"""The arithmetic of the measurements: what they read from other programs, and what they say."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cpu, features, figures, hotspots, keystrokes, standing_queue, tunnels, udp
from bench.__main__ import MEASUREMENTS, main
from bench.figures import Row, highest_passing, markdown, table, text
from bench.throughput import with_shares

BENCH = Path(figures.__file__).parent


class TestHighestPassing:
    @given(
        capacity=st.floats(600, 1.9e6),
        start=st.floats(500, 2e6),
        growth=st.floats(1.2, 4.0),
    )
    def test_finds_the_capacity(self, capacity: float, start: float, growth: float) -> None:
        asked: list[float] = []

        def passes(rate: float) -> bool:
            asked.append(rate)
            return rate <= capacity

        found = highest_passing(
            passes, start, floor=500, ceiling=2e6, growth=growth, precision=1.08, trials=80
        )
        assert found is not None
        assert capacity / 1.081 <= found <= capacity
        assert all(500 <= rate <= 2e6 for rate in asked)

    def test_none_when_not_even_the_floor_passes(self) -> None:
        asked: list[float] = []

        def passes(rate: float) -> bool:
            asked.append(rate)
            return False

        assert highest_passing(passes, 8000, floor=500, ceiling=1e6) is None
        assert asked[-1] == 500

    def test_the_ceiling_when_all_pass(self) -> None:
        assert highest_passing(lambda rate: True, 1000, floor=500, ceiling=9000) == 9000

    @given(answers=st.lists(st.booleans(), min_size=40, max_size=40))
    def test_ends_whatever_the_answers(self, answers: list[bool]) -> None:
        given_answers = iter(answers)
        passed: list[float] = []

        def passes(rate: float) -> bool:
            if next(given_answers):
                passed.append(rate)
                return True
            return False

        found = highest_passing(passes, 5000, floor=500, ceiling=1e6, trials=14)
        assert found is None if not passed else found in passed


class TestFigures:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (None, "-"),
            (0, "0"),
            (0.0, "0"),
            (17600.4, "17600"),
            (15551, "15600"),
            (493.2, "493"),
            (2.8, "2.80"),
            (9.999, "10.00"),
            (0.05678, "0.0568"),
            (-3.14159, "-3.14"),
        ],
    )
    def test_text(self, value: float | None, shown: str) -> None:
        assert text(value) == shown

    @given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
    def test_quantile_is_the_smallest_that_covers(self, values: list[float], share: float) -> None:
        found = figures.quantile(values, share)
        assert found in values
        assert sum(value <= found for value in values) >= share * len(values) - 1e-9
        assert sum(value < found for value in values) < share * len(values)

    def test_median_skips_rounds_without_the_figure(self) -> None:
        rounds: list[figures.Round] = [{"a": 1.0}, {"a": None}, {}, {"a": 3.0}]
        assert figures.median(rounds, "a") == 2.0
        assert figures.median(rounds, "b") is None

    def test_ratio(self) -> None:
        assert figures.ratio(6, 3) == 2
        assert figures.ratio(0.0, 3) == 0
        assert figures.ratio(1, 0) is None
        assert figures.ratio(None, 1) is None
        assert figures.ratio(1, None) is None

    def test_table(self) -> None:
        rows = [
            Row("tcp", "TCP", "Mbit/s", "more"),
            Row("cpu", "CPU", "s", "less"),
            Row("note", "noted", ""),
            Row("absent", "absent", "s", "less"),
        ]
        measured: dict[str, list[figures.Round]] = {
            "veth": [{"tcp": 9000.0, "cpu": None, "note": 1.0}],
            "martlet": [{"tcp": 100.0, "cpu": 2.0}, {"tcp": 300.0, "cpu": 4.0}],
            "other": [{"tcp": 100.0, "cpu": 6.0}],
        }
        lines = table(rows, measured, "martlet", ["other", "gone"]).splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["", "unit", "better", "veth", "martlet", "other", "martlet / other"]
        assert cells[2] == ["TCP", "Mbit/s", "more", "9000", "200", "100", "2.00"]
        assert cells[3] == ["CPU", "s", "less", "-", "3.00", "6.00", "0.500"]
        assert cells[4] == ["noted", "", "", "1.00", "-", "-", ""]
        assert len(cells) == 5
        assert len({len(line) for line in lines}) == 1  # aligned

    def test_markdown_aligns_words_left_and_figures_right(self) -> None:
        assert markdown([["name", "n"], ["a", "100"]]).splitlines() == [
            "| name |   n |",
            "| ---- | --: |",
            "| a    | 100 |",
        ]

    def test_share_of_the_bare_wire(self) -> None:
        measured: dict[str, list[figures.Round]] = {
            "veth": [{"tcp_ab": 900.0}, {"tcp_ab": 1000.0}, {"tcp_ab": 1100.0}],
            "martlet": [{"tcp_ab": 250.0}, {"rtt": 1.0}],
        }
        shared = with_shares(measured)
        assert [one.get("share") for one in shared["martlet"]] == [25.0, None]
        without: dict[str, list[figures.Round]] = {"martlet": [{"tcp_ab": 250.0}]}
        assert with_shares(without) == without


class TestOtherPrograms:
    def test_ping(self) -> None:
        output = (
            "PING 10.88.0.2 (10.88.0.2) 56(84) bytes of data.\n"
            "64 bytes from 10.88.0.2: icmp_seq=1 ttl=64 time=0.523 ms\n"
            "64 bytes from 10.88.0.2: icmp_seq=2 ttl=64 time=12 ms\n"
            "\n--- 10.88.0.2 ping statistics ---\n"
            "3 packets transmitted, 2 received, 33% packet loss, time 2004ms\n"
            "rtt min/avg/max/mdev = 0.523/6.2/12/5.7 ms\n"
        )
        assert figures.ping_times(output) == [0.523, 12.0]

    def test_iperf(self) -> None:
        report: dict[str, Any] = {
            "end": {
                "sum_sent": {"retransmits": 7},
                "sum_received": {"bits_per_second": 5e8, "bytes": 125_000_000},
            }
        }
        assert figures.iperf_result(report) == figures.Stream(500.0, 125_000_000, 7)
        del report["end"]["sum_sent"]["retransmits"]  # the receiver of -R does not know
        assert figures.iperf_result(report).retransmits == 0

    def test_iperf_failure(self) -> None:
        with pytest.raises(RuntimeError, match="unable to connect"):
            figures.iperf_result({"error": "unable to connect to server"})

    def test_iperf_intervals(self) -> None:
        sums = [
            {"start": i * 0.5, "end": i * 0.5 + 0.5, "seconds": 0.5, "bytes": 10**i}
            for i in range(6)
        ]
        report = {"server_output_json": {"intervals": [{"sum": each} for each in sums]}}
        assert figures.received_between(report, 1.0, 2.5) == (11_100, 1.5)
        assert figures.received_between(report, 1.2, 1.9) == (0, 0.0)

    def test_stat_of_a_process_with_an_awkward_name(self) -> None:
        fields = ["S", "7", *["0"] * 9, "250", "50", *["0"] * 30]
        process = cpu.parse_stat(f"42 (a) b (c) {' '.join(fields)}")
        assert process.parent == 7
        assert process.cpu == pytest.approx(300 * cpu._TICK)

    def test_machine_seconds(self) -> None:
        busy, steal = cpu.machine_seconds("cpu  100 10 200 9999 555 3 7 40 0 0")
        assert busy == pytest.approx(320 * cpu._TICK)
        assert steal == pytest.approx(40 * cpu._TICK)

    def test_family(self) -> None:
        processes = {
            pid: cpu.Process(parent, 0.0)
            for pid, parent in {1: 0, 2: 0, 10: 1, 11: 10, 12: 11, 20: 1}.items()
        }
        assert cpu.family([10], processes) == {10, 11, 12}
        assert cpu.family([10, 99], processes) == {10, 11, 12}

    def test_peak(self) -> None:
        assert cpu.peak_kib("Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   1234 kB\n") == 1234
        assert cpu.peak_kib("Name:\tzombie\n") == 0

    def test_disturbed(self) -> None:
        assert not cpu.Use(10, 5, 9, foreign=1.4, steal=0.4).disturbed
        assert cpu.Use(10, 5, 9, foreign=1.6, steal=0.4).disturbed
        assert cpu.Use(10, 5, 9, foreign=0.0, steal=0.6).disturbed

    def test_a_meter_sees_its_own_process(self) -> None:

        with cpu.Meter([os.getpid()]) as meter:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
        assert meter.use.tunnel >= 0.15
        assert meter.use.seconds >= 0.2


class TestUdp:
    def trial(self, **changed: Any) -> udp.Trial:
        sender = {"sent": 1000, "refused": 0, "seconds": 1.0}
        receiver = {"received": 995, "duplicates": 0, "reordered": 0, "dropped": 0}
        for name, value in changed.items():
            (sender if name in sender else receiver)[name] = value
        return udp.outcome(1000.0, sender, receiver)

    def test_passes(self) -> None:
        assert self.trial().passes(0.01)
        assert self.trial().rate == 995

    def test_too_much_lost(self) -> None:
        assert not self.trial(received=989).passes(0.01)

    def test_a_late_sender_does_not_pass(self) -> None:
        late = self.trial(sent=940, received=940)
        assert late.late and late.loss == 0
        assert not late.passes(0.01)

    def test_nothing_sent(self) -> None:
        nothing = self.trial(sent=0, received=0, seconds=0.0)
        assert nothing.loss == 1 and nothing.rate == 0 and not nothing.passes(0.01)


class TestFeatures:
    def test_request(self) -> None:
        names = ["a", *(f"f{i}" for i in range(40)), "z"]
        data = features.request(names, on={"z"}, off={"a", "unknown"})
        code, size, valid0, state0, valid1, state1 = struct.unpack("=6I", data)
        assert (code, size) == (0x3B, 2)
        assert (valid0, state0) == (1, 0)
        assert (valid1, state1) == (1 << 9, 1 << 9)


class TestHotspots:
    @pytest.mark.parametrize(
        ("file", "kind"),
        [
            ("[kernel.kallsyms]", "kernel"),
            ("/lib/modules/6.1/kernel/drivers/net/tun.ko.xz", "kernel"),
            ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", "crypto"),
            ("/v/site-packages/cryptography/hazmat/bindings/_rust.abi3.so", "crypto"),
            ("/v/site-packages/aioquic/_crypto.abi3.so", "crypto"),
            ("/x/tunnel/datapath/native/engine.cpython-311-x86_64-linux-gnu.so", "engine"),
            ("/usr/lib/libpython3.11.so.1.0", "python"),
            ("/usr/bin/python3.11", "python"),
            ("/v/site-packages/uvloop/loop.cpython-311-x86_64-linux-gnu.so", "python modules"),
            ("/usr/lib/x86_64-linux-gnu/libc.so.6", "libc"),
            ("[vdso]", "libc"),
            ("/usr/bin/wireguard-go", "other"),
        ],
    )
    def test_kind(self, file: str, kind: str) -> None:
        assert hotspots.kind(file) == kind

    def test_parse(self) -> None:
        lines = [
            " 42      7f1fbeafa8ed unicodekeys_lookup (/usr/lib/libpython3.11.so.1.0)",
            " 42      7f1fbeafa8ff unicodekeys_lookup (/usr/lib/libpython3.11.so.1.0)",
            " 43      ffffffff81 copy_from_iter+0x12 ([kernel.kallsyms])",
            " 43      4a6d [unknown] (/usr/bin/wireguard-go)",
            " 43      4a6d operator()(int) const (/usr/lib/libx.so)",
            "",
            "not a sample",
        ]
        assert hotspots.parse(lines) == {
            (42, "/usr/lib/libpython3.11.so.1.0", "unicodekeys_lookup"): 2,
            (43, "[kernel.kallsyms]", "copy_from_iter"): 1,
            (43, "/usr/bin/wireguard-go", "[unknown]"): 1,
            (43, "/usr/lib/libx.so", "operator()(int) const"): 1,
        }

    def test_prices(self) -> None:
        counts = Counter({(1, "[kernel.kallsyms]", "copy"): 3, (2, "/usr/bin/x", "f"): 1})
        shown = hotspots.tables(counts, 2.0, top=5)
        kernel = next(line for line in shown.splitlines() if "| kernel" in line)
        # 75% of 2 s/GB is 1.5 ns an octet
        assert [cell.strip() for cell in kernel.strip("|").split("|")] == [
            "kernel",
            "75.0",
            "1.50",
            "2.10",
        ]
        assert "f (x)" in shown


class TestKeystrokes:
    def test_delays(self) -> None:
        strokes: list[tuple[float, float | None]] = [
            (1.0, 1.01),
            (2.0, 2.04),
            (3.0, None),
            (4.0, 5.0),
        ]
        assert standing_queue.delays(strokes, 2.0, 3.5) == pytest.approx([40, 2000])
        assert standing_queue.delays([], 0, 1) == []

    def test_over_a_real_connection(self) -> None:

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = threading.Thread(target=keystrokes.serve, args=("127.0.0.1", port, 5.0))
        server.start()
        for _ in range(100):
            try:
                strokes = keystrokes.type_at("127.0.0.1", port, 0.2, 50)
                break
            except ConnectionRefusedError:
                server.join(0.02)
        server.join(5)
        assert len(strokes) == 10
        assert all(echoed is not None and echoed >= sent for sent, echoed in strokes)


class TestTunnels:
    def test_named(self) -> None:
        assert tunnels.named("/bin/sh", 2) == ("wireguard-go 2", str(Path("/bin/sh").resolve()))
        assert tunnels.named("new=sh", 3)[0] == "new"
        with pytest.raises(ValueError, match="no such program"):
            tunnels.named("new=/nonexistent", 2)


class TestCommand:
    def test_all_measurements_have_a_module(self) -> None:
        for module, _ in MEASUREMENTS.values():
            assert (BENCH / f"{module}.py").exists() or (BENCH / module / "__init__.py").exists()

    def test_no_module_hides_one_of_the_standard_library(self) -> None:

        assert not {path.stem for path in BENCH.glob("*.py")} & sys.stdlib_module_names

    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert main(["nothing"]) == 2
        assert main(["--help"]) == 0
        assert "throughput" in capsys.readouterr().err

    def test_udpload_on_the_loopback(self, tmp_path: Path) -> None:

        if shutil.which("cc") is None and shutil.which("gcc") is None:
            pytest.skip("no C compiler")
        program = str(udp.program())
        receiver = subprocess.Popen(
            [program, "receive", "127.0.0.1", "7177", "5", "5"], stdout=subprocess.PIPE
        )
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        for run in ("4", "5"):  # those of another run do not count
            sent = subprocess.run(
                [program, "send", "127.0.0.1", "7177", run, "64", "2000", "0.2"],
                capture_output=True,
                check=True,
            )
        result = json.loads(receiver.communicate(timeout=8)[0])
        assert json.loads(sent.stdout)["sent"] == 400
        assert result["received"] == 400
        assert result["duplicates"] == result["reordered"] == 0

    @pytest.mark.parametrize(
        "arguments",
        [
            ["send"],
            ["send", "127.0.0.1", "7", "1", "4", "10", "1"],
            ["send", "127.0.0.1", "7", "1", "64", "0", "1"],
            ["send", "nowhere", "7", "1", "64", "10", "1"],
        ],
    )
    def test_udpload_refuses(self, arguments: list[str]) -> None:

        assert subprocess.run([str(udp.program()), *arguments], capture_output=True).returncode == 2
