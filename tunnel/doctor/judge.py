"""Facts to a report, and the report to one line."""

from __future__ import annotations

from tunnel.doctor import config, host, network, tunnels, way
from tunnel.doctor.facts import Facts
from tunnel.doctor.finding import Finding, Report, State
from tunnel.ice.behaviour import Mapping


def judge(facts: Facts) -> Report:
    """Every finding that follows from the facts."""
    findings: list[Finding] = []
    for room in (host, config, network, way, tunnels):
        findings += room.judge(facts)
    return Report(facts.version, tuple(findings), facts.nats)


def verdict(report: Report) -> str:
    """One line: how bad it is, and whether peers are likely to be reached directly."""
    problems, warnings = report.count(State.PROBLEM), report.count(State.WARNING)
    counted = " and ".join(
        f"{count} {word if count == 1 else word + 's'}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    )
    if problems:
        return f"{counted}: start with the first problem above"
    way_out = _way(report)
    if warnings:
        return f"no problem, {counted}" + (f"; {way_out}" if way_out else "")
    return "all is well" + (f"; {way_out}" if way_out else "")


def _way(report: Report) -> str:
    mappings = {nat.behaviour.mapping for nat in report.nats}
    if mappings & {Mapping.NO_NAT, Mapping.ENDPOINT_INDEPENDENT}:
        return "direct connections are likely"
    if mappings and all(mapping.hard for mapping in mappings):
        return "direct connections only to peers with easy NATs"
    return ""
