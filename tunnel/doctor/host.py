"""Findings about this machine, and about this process on it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from tunnel.doctor.facts import Facts, HostFacts
from tunnel.doctor.finding import Finding, State

FIRST_YEAR = 2025
"""Before this there was no martlet: a clock that says so was never set."""

_CONTAINER = "start the container with --device /dev/net/tun --cap-add NET_ADMIN"


def judge(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    yield _privileges(host)
    yield _tun(host)
    yield _kernel(host)
    yield _engine(host)
    if facts.network.links:
        yield _loopback(facts)
    if host.receive_buffer is not None:
        yield _buffers(host, host.receive_buffer)
    yield _run_directory(host)
    yield _clock(host)


def _privileges(host: HostFacts) -> Finding:
    details = {"net_admin": host.net_admin, "root": host.root, "container": host.container}
    if host.net_admin:
        return Finding(
            "privileges",
            State.OK,
            "this process may make and configure network devices (CAP_NET_ADMIN)",
            details=details,
        )
    if host.root:
        remedy = _CONTAINER if host.container else "grant the capability NET_ADMIN, or run as root"
        return Finding(
            "privileges",
            State.PROBLEM,
            "this process lacks the capability NET_ADMIN, without which no tunnel comes up",
            remedy,
            details,
        )
    return Finding(
        "privileges",
        State.WARNING,
        "an ordinary user cannot bring a tunnel up, and some checks were left out",
        "sudo martlet doctor",
        details,
    )


def _tun(host: HostFacts) -> Finding:
    tun = host.tun
    offloads = {"tcp_offload": tun.tcp_offload, "udp_offload": tun.udp_offload}
    match tun.kind:
        case "":
            if not tun.tcp_offload:
                return Finding(
                    "tun",
                    State.WARNING,
                    "TUN devices work, but without segmentation offload: a third of the speed",
                    "run a kernel of 5.0 or later, with virtio-net headers on TUN",
                    offloads,
                )
            which = "TCP and UDP" if tun.udp_offload else "TCP (UDP needs Linux 6.2)"
            summary = f"TUN devices work, with segmentation offload for {which}"
            return Finding("tun", State.OK, summary, details=offloads)
        case "missing":
            return Finding(
                "tun",
                State.PROBLEM,
                "there is no usable /dev/net/tun",
                _CONTAINER if host.container else "modprobe tun",
                {"kind": tun.kind},
            )
        case "privilege" if not host.root:
            return Finding(
                "tun",
                State.NOTE,
                "TUN devices were not tried: that needs root",
                "sudo martlet doctor",
                {"kind": tun.kind},
            )
        case "privilege":
            remedy = _CONTAINER if host.container else "grant the capability NET_ADMIN"
            summary = "this process may not make a TUN device"
            return Finding("tun", State.PROBLEM, summary, remedy, {"kind": tun.kind})
        case _:
            summary = f"no TUN device can be made: {tun.message}"
            return Finding("tun", State.PROBLEM, summary, "", {"kind": tun.kind})


def _kernel(host: HostFacts) -> Finding:
    features = {
        "UDP_SEGMENT": host.udp_segment,
        "UDP_GRO": host.udp_gro,
        "SO_MARK": host.so_mark,
    }
    missing = [name for name in ("UDP_SEGMENT", "UDP_GRO") if not features[name]]
    if missing:
        return Finding(
            "kernel",
            State.WARNING,
            f"the kernel lacks {' and '.join(missing)}: the tunnel works at a third of the speed",
            "run a kernel of 5.0 or later",
            features,
        )
    if host.net_admin and not host.so_mark:
        return Finding(
            "kernel",
            State.NOTE,
            "sockets cannot be marked (SO_MARK), so policy routing cannot tell the tunnel's own",
            details=features,
        )
    return Finding(
        "kernel", State.OK, "the kernel sends and receives runs of UDP packets at once (GSO, GRO)",
        details=features,
    )  # fmt: skip


def _engine(host: HostFacts) -> Finding:
    details = {"libcrypto": host.libcrypto, "advice": host.advice}
    if host.libcrypto is None:
        return Finding(
            "engine",
            State.PROBLEM,
            f"the native engine cannot be loaded: {host.engine_error}",
            "install martlet again: pip install --force-reinstall --no-cache-dir martlet"
            " (in a checkout: ./dev setup)",
            details,
        )
    summary = f"the native engine is loaded, with {host.libcrypto}"
    if host.advice:
        return Finding("engine", State.NOTE, f"{summary}; {host.advice}", details=details)
    return Finding("engine", State.OK, summary, details=details)


def _loopback(facts: Facts) -> Finding:
    if any(link.loopback and link.up for link in facts.network.links):
        return Finding("loopback", State.OK, "the loopback interface is up")
    relays = facts.config is not None and bool(facts.config.ice.turn)
    return Finding(
        "loopback",
        State.PROBLEM if relays else State.WARNING,
        "the loopback interface is down" + (", and TURN relays need it" if relays else ""),
        "ip link set lo up",
    )


def _buffers(host: HostFacts, got: int) -> Finding:
    details = {"receive_bytes": got, "wanted_bytes": host.wanted_buffer}
    if got >= host.wanted_buffer:
        return Finding(
            "buffers", State.OK, f"sockets get buffers of {_kilobytes(got)}", details=details
        )
    if not host.net_admin:
        return Finding(
            "buffers",
            State.NOTE,
            f"sockets get buffers of {_kilobytes(got)} only; a tunnel run as root gets"
            f" {_kilobytes(host.wanted_buffer)}",
            details=details,
        )
    return Finding(
        "buffers",
        State.WARNING,
        f"sockets get buffers of {_kilobytes(got)} instead of {_kilobytes(host.wanted_buffer)}:"
        " bursts lose packets",
        f"sysctl -w net.core.rmem_max={host.wanted_buffer} net.core.wmem_max={host.wanted_buffer}",
        details,
    )


def _run_directory(host: HostFacts) -> Finding:
    path = host.run_directory
    details = {"path": path}
    if not host.run_directory_error:
        return Finding(
            "run-directory", State.OK, f"control sockets can be made in {path}", details=details
        )
    summary = f"control sockets cannot be made in {path}: {host.run_directory_error}"
    if not host.root:
        return Finding("run-directory", State.NOTE, summary, "sudo martlet doctor", details)
    remedy = "start the container with --tmpfs /run" if host.container else f"mkdir -p {path}"
    return Finding("run-directory", State.PROBLEM, summary, remedy, details)


def _clock(host: HostFacts) -> Finding:
    now = datetime.fromtimestamp(host.wall_time, UTC)
    details = {"time": now.isoformat(timespec="seconds")}
    if now.year >= FIRST_YEAR:
        return Finding(
            "clock",
            State.OK,
            "the clock is plausible; nothing but TLS to brokers and relays depends on it",
            details=details,
        )
    return Finding(
        "clock",
        State.WARNING,
        f"the clock says {now.date()}: martlet does not mind, but the certificates of brokers"
        " and relays (mqtts, wss, turns) will not be trusted",
        "timedatectl set-ntp true, or set it with: date -s 'YYYY-MM-DD hh:mm'",
        details,
    )


def _kilobytes(count: int) -> str:
    return f"{count // 1024} KiB"
