"""A home router that maps ports when it is asked: Debian's miniupnpd behind a NAT of a world.

     [A] u0 --lan [natA0 + miniupnpd] wan-- a0 [ core ]

It serves PCP, NAT-PMP and UPnP. It refuses to map on documentation addresses, which are not public;
so the router gets one more address, as an ISP would route it there, from a block that is.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from cli.demo.nat import LAN, WAN
from cli.demo.netns import terminate
from cli.demo.pair import tail
from cli.demo.world import HostName, World

PUBLIC = "9.9.9.9"
TABLE = "miniupnpd"
_START = 10.0  # seconds it may take to listen


class HomeRouter:
    """Mapping at `host`'s uplink; running when the constructor returns, which `restart` may change.

    Without `pcp` it knows UPnP only; without `upnp`, PCP and NAT-PMP only.
    """

    def __init__(
        self,
        world: World,
        directory: Path,
        host: HostName = "A",
        *,
        pcp: bool = True,
        upnp: bool = True,
    ) -> None:
        self._uplink = world.uplink(host)
        self.space = self._uplink.router
        self.log = directory / f"miniupnpd-{self._uplink.name}.log"
        self._config = directory / f"miniupnpd-{self._uplink.name}.conf"
        self._config.write_text(self._settings(pcp=pcp, upnp=upnp))
        self.space.batch(f"addr add {PUBLIC}/32 dev {WAN}")
        world.core.batch(f"route add {PUBLIC} via {self._uplink.publics[4][0]}")
        self._pcp = pcp
        self.start()

    def start(self) -> None:
        """With an empty table, as after a power failure."""
        self.space.run(["nft", "-f", "-"], input=_RULES)
        self._process = self.space.popen(
            ["miniupnpd", "-d", "-f", str(self._config), "-P", str(self._config) + ".pid"],
            log=self.log,
        )
        listening = "Listening for NAT-PMP/PCP" if self._pcp else "HTTP listening on port"
        deadline = time.monotonic() + _START
        while not self.log.exists() or listening not in self.log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"miniupnpd does not listen: {tail(self.log)}")
            time.sleep(0.02)

    def stop(self) -> None:
        terminate([self._process])
        self.log.unlink()

    def mapped(self) -> list[str]:
        """Its port forwards, as nftables has them."""
        listed = self.space.run(["nft", "list", "chain", "inet", TABLE, "prerouting"]).stdout
        return [line.strip() for line in listed.splitlines() if "dnat" in line]

    def _settings(self, *, pcp: bool, upnp: bool) -> str:
        yes = {True: "yes", False: "no"}
        lines = [
            f"ext_ifname={WAN}", f"ext_ip={PUBLIC}", f"listening_ip={LAN}", "port=0",
            f"enable_natpmp={yes[pcp]}", f"enable_upnp={yes[upnp]}", "secure_mode=yes",
            "min_lifetime=2", "max_lifetime=86400", f"uuid={uuid.uuid4()}",
            f"upnp_table_name={TABLE}", f"upnp_nat_table_name={TABLE}",
            "upnp_forward_chain=forward", "upnp_nat_chain=prerouting",
            "upnp_nat_postrouting_chain=postrouting",
            "allow 1024-65535 0.0.0.0/0 1024-65535",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


# The chains that it fills, and those that lead there. Before those of the NAT, whose own drop what
# nobody forwarded.
_RULES = f"""
table inet {TABLE} {{
}}
delete table inet {TABLE}
table inet {TABLE} {{
  chain forward {{ }}
  chain prerouting {{ }}
  chain postrouting {{ }}
  chain forwarding {{ type filter hook forward priority filter - 1; jump forward; }}
  chain into {{ type nat hook prerouting priority dstnat - 1; jump prerouting; }}
  chain out {{ type nat hook postrouting priority srcnat - 1; jump postrouting; }}
}}
"""
