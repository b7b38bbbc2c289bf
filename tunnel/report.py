"""What `status` and `why` say of a peer's paths: plain values, made when somebody asks."""

from __future__ import annotations

from typing import Any

from tunnel.ice.pair import Pair, PairState
from tunnel.path.network import PathKey
from tunnel.path.selector import Facts, clearly_better, order, why_before
from tunnel.quic.control_stream import Session
from tunnel.quic.paths import NetworkPath
from tunnel.roaming import Roaming


def paths(session: Session, roaming: Roaming) -> list[dict[str, Any]]:
    """All paths, the active one first; times in milliseconds, sizes in bytes."""
    connection = session.connection
    known = {path.addr: path for path in connection.paths()}
    pairs = {pair.key: pair for pair in roaming.agent.pairs()}
    rows = [_path(key, known.get(key), pairs.get(key)) for key in {**known, **pairs}]
    for row in rows:
        key = row.pop("key")
        row["active"] = key == session.active
        row["backup"] = key == roaming.second
    return rows


def _path(key: PathKey, path: NetworkPath | None, pair: Pair | None) -> dict[str, Any]:
    rtt = pair.rtt if pair is not None else None
    if path is not None and path.metrics.has_rtt:
        rtt = path.metrics.rtt_smoothed
    measured = path is not None and path.metrics.has_rtt
    return {
        "key": key,
        "local": str(key.local),
        "remote": str(key.remote),
        "kind": pair.kind.value if pair is not None else "prflx",
        "state": path.state.value if path is not None else pair.state.value if pair else "gone",
        "warm": pair is not None and pair.state is PairState.WARM,
        "metered": pair is not None and pair.metered,
        "rtt_ms": None if rtt is None else round(rtt * 1e3, 3),
        "rtt_variance_ms": (
            round(path.metrics.rtt_variance * 1e3, 3) if path is not None and measured else None
        ),
        "mtu": path.mtu if path is not None else None,
        "tx_bytes": path.bytes_sent if path is not None else 0,
        "rx_bytes": path.bytes_received if path is not None else 0,
        "lost_packets": path.metrics.lost if path is not None else 0,
    }


def why(session: Session, roaming: Roaming, now: float) -> list[str]:
    """Sentences: which path is in use, why it, and why not each of the others."""
    active = session.active
    lines = [f"in use: {active}, because {roaming.moved_because}"]
    facts = order(roaming.facts(now))
    mine = next((f for f in facts if f.key == active), None)
    if roaming.suspect:
        lines.append("it is suspect: something is unanswered past its deadline, and all are asked")
    if mine is None:
        return lines
    for path in facts:
        if path.key != active:
            role = "second" if path.key == roaming.second else "other"
            lines.append(f"{role}: {path.key}: {_against(path, mine)}")
    if len(facts) == 1:
        lines.append("no other path is known: were this one to die, the tunnel would hold")
    return lines


def _against(path: Facts, active: Facts) -> str:
    if not path.warm:
        return "not in use: it does not answer"
    reason = clearly_better(path, active)
    if reason is not None:
        return f"clearly better ({reason}); it is moved to once it has been for a while"
    if order([path, active])[0] is active:
        return f"not in use: {why_before(active, path, one='the one in use', other='it')}"
    return f"a little better ({why_before(path, active)}), but not enough to move for"
