"""`martlet demo`: a real ssh session through a real tunnel between two hosts that keep moving.

The two hosts stand behind two NATs each, in network namespaces on this machine (`cli.demo.world`
draws them). Keys and configurations are generated, `martlet up` runs in both, and one ssh session
stays open while the network moves under it. Everything is removed at the end, also after Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from types import FrameType

OK, FAILED, PRIVILEGE = 0, 1, 4  # exit codes of the command line's contract
# program -> Debian package
_TOOLS = {
    "ip": "iproute2",
    "ss": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ping": "iputils-ping",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def run(json: bool = False) -> int:
    """Run the demo; with `json` the figures go to stdout and the progress to stderr.

    Returns 0 when the session survived, 1 when it broke or something is missing, 4 without root.
    """
    if os.geteuid() != 0:
        print(
            "martlet demo makes network namespaces, which needs root: sudo martlet demo",
            file=sys.stderr,
        )
        return PRIVILEGE
    path = os.environ.get("PATH", "").split(":")
    os.environ["PATH"] = ":".join([*path, *(folder for folder in _SBIN if folder not in path)])
    missing = missing_tools()
    if missing:
        print(f"martlet demo needs: {', '.join(missing)}", file=sys.stderr)
        packages = sorted({_TOOLS[tool] for tool in missing})
        print(f"install them: apt-get install {' '.join(packages)}", file=sys.stderr)
        return FAILED
    if not os.path.exists("/dev/net/tun"):
        print("martlet demo needs /dev/net/tun: modprobe tun", file=sys.stderr)
        return FAILED

    from cli.demo.tour import tour  # here, so that the link and the probes start without rich

    ended = signal.signal(signal.SIGTERM, _terminated)
    try:
        return tour(as_json=json)
    except KeyboardInterrupt:
        print("interrupted; everything is removed", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, ended)


def missing_tools() -> list[str]:
    """Programs that the demo runs and that are not installed."""
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
