"""How things look: data on standard output, everything else on standard error.

Tables are plain aligned columns where standard output is no terminal, one line a row, so that grep
and awk do not mind.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

STATE_STYLES = {"up": "green", "connecting": "yellow", "holding": "red"}

_WIDE = 10_000  # columns: never wrap what goes into a pipe


def stdout() -> Console:
    """The console for data."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_WIDE, color_system=None, force_terminal=False)


def say(message: str) -> None:
    """A word to the user, on standard error."""
    print(f"martlet: {message}", file=sys.stderr, flush=True)


def data(line: str) -> None:
    """One line of plain data."""
    print(line, flush=True)


def as_json(value: object) -> None:
    """One JSON value on one line."""
    data(json.dumps(value, ensure_ascii=False))


def status(status: dict[str, Any]) -> RenderableType:
    """One tunnel: a line about itself, a table of its peers, one of their paths."""
    peers = _table("PEER", "STATE", "ACTIVE PATH", "RTT", "MTU", "SENT", "RECEIVED", "MOVES")
    paths = _table("PEER", "PATH", "KIND", "ROLE", "STATE", "RTT", "MTU", "SENT", "RECEIVED")
    copies: list[RenderableType] = []
    for peer in status.get("peers", []):
        known = peer.get("paths") or []
        active = _active(peer)
        state = str(peer.get("state", "?"))
        peers.add_row(
            str(peer.get("name", "?")),
            Text(state, style=STATE_STYLES.get(state, "")),
            active_path(peer) or "-",
            _milliseconds(active.get("rtt_ms")),
            _plain(active.get("mtu")),
            _bytes(sum(path.get("tx_bytes") or 0 for path in known)),
            _bytes(sum(path.get("rx_bytes") or 0 for path in known)),
            _plain(peer.get("migrations", 0)),
        )
        for path in known:
            paths.add_row(
                str(peer.get("name", "?")),
                _path(path),
                _plain(path.get("kind")),
                _role(path),
                _plain(path.get("state")),
                _milliseconds(path.get("rtt_ms")),
                _plain(path.get("mtu")),
                _bytes(path.get("tx_bytes")),
                _bytes(path.get("rx_bytes")),
            )
        counters = peer.get("counters") or {}
        if counters.get("redundant_packets"):
            copies.append(
                Text(
                    f"{peer.get('name')}: {counters['redundant_packets']} packets of sparse flows"
                    f" went over a second path too, {_bytes(counters.get('redundant_bytes'))}",
                    style="dim",
                )
            )
    parts: list[RenderableType] = [_headline(status.get("interface")), Text(), peers]
    if paths.row_count:
        parts += [Text(), paths]
    relays = [_relay(relay) for relay in status.get("relays") or []]
    if relays:
        parts += [Text(), *relays]
    if copies:
        parts += [Text(), *copies]
    waits = [
        f"{peer.get('name')}: {line}"
        for peer in status.get("peers", [])
        if peer.get("state") != "up"
        for line in peer.get("why") or []
    ]
    if waits:
        parts += [Text(), *map(Text, waits)]
    broker = status.get("rendezvous") or {}
    if broker.get("url"):
        parts += [Text(), _broker(broker)]
    others = [
        line
        for line in obstacles(status, but="broker")
        if not any(wait.endswith(line) for wait in waits)
    ]
    if others:
        parts += [Text(), *(Text(line, style="yellow") for line in others)]
    engine = status.get("engine") or {}
    if engine.get("libcrypto"):
        line = f"sealed by {engine['libcrypto']}"
        parts += [Text(), Text("; ".join(filter(None, (line, engine.get("advice")))), style="dim")]
    return Group(*parts)


def obstacles(status: dict[str, Any], *, but: str = "") -> list[str]:
    """What is in the way of a tunnel, not of one peer alone: a sentence each, with what to do."""
    return [
        "; ".join(filter(None, (each.get("problem"), each.get("remedy"))))
        for each in status.get("obstacles") or []
        if each.get("about") != but
    ]


def _broker(broker: dict[str, Any]) -> Text:
    """One line: whether the rendezvous serves us, and if not, why and what to do."""
    line = f"rendezvous {broker['url']}: {broker.get('state', '?')}"
    if broker.get("rtt_ms") is not None:
        line += f", {_milliseconds(broker['rtt_ms'])}"
    if broker.get("state") != "connected" and broker.get("error"):
        words = filter(None, (broker["error"], broker.get("remedy")))
        return Text(f"{line}: {'; '.join(words)}", style="yellow")
    return Text(line, style="dim")


def _relay(relay: dict[str, Any]) -> Text:
    """A TURN server, how it is reached, and what came of it."""
    server = f"relay {relay.get('server', '?')}"
    if relay.get("transport"):
        server += f" over {relay['transport']} from {relay.get('local')}"
    state = str(relay.get("state", "?"))
    if relay.get("address"):
        return Text(f"{server}: {relay['address']}")
    told = relay.get("error") or state
    return Text(f"{server}: {told}", style="red" if state == "failed" else "dim")


def _role(path: dict[str, Any]) -> str:
    """What a path is for: active, second (copies go there), warm (checked, at hand)."""
    metered = " metered" if path.get("metered") else ""
    for key, name in (("active", "active"), ("backup", "second"), ("warm", "warm")):
        if path.get(key):
            return name + metered
    return "-" + metered


def history(records: Iterable[dict[str, Any]]) -> RenderableType:
    """The ledger, oldest first: what set each move off, where to, and how long it took."""
    table = _table(
        "WHEN", "PEER", "WHY", "FROM", "TO", "DETECT", "SWITCH", "CONFIRM",
        "LOST", "REPLAYED", "NEEDLESS",
    )  # fmt: skip
    for record in records:
        table.add_row(
            _when(record.get("wall_time")),
            _plain(record.get("peer")),
            _plain(record.get("trigger")),
            _plain(record.get("from_path")),
            _plain(record.get("to_path")),
            _milliseconds(record.get("detect_ms")),
            _milliseconds(record.get("switch_ms")),
            _milliseconds(record.get("confirm_ms")),
            _plain(record.get("lost")),
            _plain(record.get("replayed")),
            _plain(record.get("duplicates")),
        )
    return table if table.row_count else Text("no migration yet")


def ping_summary(peer: str, sent: int, times: list[float], seconds: float) -> list[str]:
    """The last lines of `ping`, in the words of ping(8); `times` in milliseconds."""
    lost = 100 * (sent - len(times)) / sent if sent else 0
    lines = [
        f"--- {peer} ping statistics ---",
        f"{sent} packets transmitted, {len(times)} received, {lost:g}% packet loss,"
        f" time {seconds * 1000:.0f}ms",
    ]
    if times:
        mean = sum(times) / len(times)
        # ping(8): the root of the mean of squares less the square of the mean
        deviation = max(0.0, sum(t * t for t in times) / len(times) - mean * mean) ** 0.5
        numbers = "/".join(f"{x:.3f}" for x in (min(times), mean, max(times), deviation))
        lines.append(f"rtt min/avg/max/mdev = {numbers} ms")
    return lines


def bench(result: dict[str, Any]) -> RenderableType:
    """What `cli.bench` measured: throughput and round trips, then what each path had of it."""
    phases = ("idle", "upload", "download")
    speeds = _table("", "THROUGHPUT", "RTT MIN", "MEDIAN", "95%", "MAX")
    for phase in phases:
        found = result[phase]
        rtt = found["rtt_ms"] or {}
        rate = found.get("mbit_s")
        speeds.add_row(
            phase,
            "-" if rate is None else f"{rate:.1f} Mbit/s",
            *(_milliseconds(rtt.get(name)) for name in ("min", "median", "p95", "max")),
        )
    paths = _table("PATH", "DURING", "ACTIVE", "RTT", "MTU", "SENT", "RECEIVED", "LOST")
    for path in result["paths"]:
        name = _path(path)
        for phase in phases:
            part = path[phase]
            if part is not None:
                paths.add_row(
                    name,
                    phase,
                    "yes" if part["active"] else "no",
                    _milliseconds(part["rtt_ms"]),
                    _plain(path["mtu"]),
                    _bytes(part["tx_bytes"]),
                    _bytes(part["rx_bytes"]),
                    _plain(part["lost_packets"]),
                )
                if sys.stdout.isatty():
                    name = ""  # once is enough where it takes three lines
    headline = Text(f"{result['peer']}", style="bold")
    headline.append(
        f"  {result['address']} by {result['tunnel']}, one TCP stream,"
        f" {result['seconds']:g} s each, moves: {result['moves']}",
        style="not bold",
    )
    late = sum(result[phase]["unanswered"] for phase in phases)
    parts: list[RenderableType] = [headline, Text(), speeds, Text(), paths]
    if late:
        parts += [Text(), Text(f"{late} round trips did not end in time and are not counted")]
    return Group(*parts)


def active_path(peer: dict[str, Any]) -> str:
    """The active path of a peer of `status`, "" if it has none."""
    active = _active(peer)
    return _path(active) if active else str(peer.get("active_path") or "")


def _headline(interface: Any) -> Text:
    if not isinstance(interface, dict):
        return Text(_plain(interface), style="bold")
    line = Text(_plain(interface.get("name")), style="bold")
    for key, value in interface.items():
        if key != "name" and value not in (None, [], ""):
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            line.append(f"  {key.replace('_', ' ')} {shown}", style="not bold")
    return line


def _active(peer: dict[str, Any]) -> dict[str, Any]:
    """The entry of the active path among a peer's paths, {} if there is none."""
    active = peer.get("active_path")
    if isinstance(active, dict):
        active = (active.get("local"), active.get("remote"))
    for path in peer.get("paths") or []:
        ends = (path.get("local"), path.get("remote"))
        if active in (ends, f"{ends[0]}>{ends[1]}"):
            return dict(path)
    return {}


def _path(path: dict[str, Any]) -> str:
    return f"{path.get('local')} > {path.get('remote')}"


def _table(*columns: str) -> Table:
    terminal = sys.stdout.isatty()
    style = box.SIMPLE_HEAD if terminal else None
    table = Table(box=style, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in _NUMERIC
        table.add_column(
            column, justify="right" if numeric else "left", overflow="fold", no_wrap=not terminal
        )
    return table


_NUMERIC = frozenset(
    ("RTT", "MTU", "SENT", "RECEIVED", "MOVES", "DETECT", "SWITCH", "CONFIRM", "LOST", "REPLAYED",
     "NEEDLESS", "THROUGHPUT", "RTT MIN", "MEDIAN", "95%", "MAX")
)  # fmt: skip


def _plain(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)


def _milliseconds(value: Any) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _bytes(value: Any) -> str:
    if value is None:
        return "-"
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _when(wall_time: Any) -> str:
    if wall_time is None:
        return "-"
    second = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_time))
    return f"{second}.{int(wall_time * 1000) % 1000:03}"
