"""Makes a plan true, by rtnetlink; and undoes it."""

import errno
import os
import socket
from collections.abc import Callable, Iterable
from types import TracebackType

from tun.errors import TunError
from tun.netlink import Netlink, NetlinkError, converse
from tun.plan import (
    AddAddress,
    AddRoute,
    BringUp,
    SetProperties,
    SilenceIPv6,
    Step,
    difference,
)

# RT_SCOPE_LINK (include/uapi/linux/rtnetlink.h): the destination is on the link, no gateway.
_SCOPE_LINK = 253
# IFA_F_NODAD (include/uapi/linux/if_addr.h): usable at once, there is nobody to collide with.
_NODAD = 0x02
# IN6_ADDR_GEN_MODE_NONE (include/uapi/linux/if_link.h).
_ADDR_GEN_MODE_NONE = 1

# disable_ipv6 is set (EACCES), or this kernel has no IPv6.
_NO_IPV6 = (errno.EACCES, errno.EOPNOTSUPP, errno.EAFNOSUPPORT)

# What undoing may meet when the thing, or its whole device, is gone already.
_ALREADY_GONE = (
    errno.EADDRNOTAVAIL,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENXIO,
    errno.ESRCH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)


class Applied:
    """Steps that have been done; `undo` takes them back, last one first. A context manager."""

    def __init__(self, steps: tuple[Step, ...], index: int) -> None:
        self._steps = steps
        self._index = index

    def change(self, steps: Iterable[Step]) -> None:
        """Make `steps` true in place of those that were: only what differs is undone and done.

        When one cannot be done, all is as it was. Raises TunError as `apply` and `undo` do.
        """
        after = tuple(steps)
        gone, new = difference(self._steps, after)
        if new:
            converse(lambda netlink: _do_all(netlink, new, self._index))
        self._steps = after
        if gone:
            converse(lambda netlink: _undo_all(netlink, gone, self._index))

    def undo(self) -> None:
        """Take back what was done, all of it even where some fails; a second call does nothing.

        Raises TunError for the first step that failed, once all have been tried.
        """
        steps, self._steps = self._steps, ()
        if steps:
            converse(lambda netlink: _undo_all(netlink, steps, self._index))

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def apply(steps: Iterable[Step]) -> Applied:
    """Do `steps`, in order; all are of one interface, which exists. Steps already done are fine.

    When one fails, those before it are undone. May be called inside a running event loop. Raises
    TunError: "privilege", "conflict", "ipv6", "gone", "system".
    """
    todo = tuple(steps)
    if not todo:
        return Applied((), 0)
    name = todo[0].interface
    if any(step.interface != name for step in todo):
        raise ValueError("the steps of a plan are of one interface")
    try:
        # The index, as it stays when somebody renames the interface.
        index = socket.if_nametoindex(name)
    except OSError:
        raise TunError("gone", f"there is no interface {name}") from None
    converse(lambda netlink: _do_all(netlink, todo, index))
    return Applied(todo, index)


def _do_all(netlink: Netlink, steps: tuple[Step, ...], index: int) -> None:
    for number, step in enumerate(steps):
        try:
            _do(netlink, step, index)
        except NetlinkError as error:
            failure = _explain(netlink, error, step)
        except TunError as error:
            failure = error
        else:
            continue
        try:
            _undo_all(netlink, steps[:number], index)
        except TunError as error:
            failure.add_note(f"and then: {error}")
        raise failure


def _do(netlink: Netlink, step: Step, index: int) -> None:
    match step:
        case SetProperties(mtu=mtu, txqueuelen=txqueuelen):
            netlink.link("set", index=index, mtu=mtu, txqlen=txqueuelen)
        case SilenceIPv6():
            _silence(netlink, index)
        case AddAddress(address=address):
            _unless_there(
                lambda: netlink.addr(
                    "add",
                    index=index,
                    address=str(address.ip),
                    prefixlen=address.network.prefixlen,
                    **({"flags": _NODAD} if address.version == 6 else {}),
                )
            )
        case BringUp():
            netlink.link("set", index=index, state="up")
        case AddRoute():
            try:
                netlink.route("add", **_route(step, index))
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise
                holder = _holder(netlink, step)
                if holder != index:
                    raise _conflict(netlink, step, holder) from None


def _undo_all(netlink: Netlink, steps: tuple[Step, ...], index: int) -> None:
    failure: TunError | None = None
    for step in reversed(steps):
        try:
            _undo(netlink, step, index)
        except NetlinkError as error:
            if error.code not in _ALREADY_GONE and failure is None:
                reason = os.strerror(error.code)
                failure = TunError("system", f"cannot undo '{step}': {reason}")
    if failure is not None:
        raise failure


def _undo(netlink: Netlink, step: Step, index: int) -> None:
    match step:
        case SetProperties() | SilenceIPv6():
            pass  # they are nothing without the device
        case AddAddress(address=address):
            netlink.addr(
                "del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen
            )
        case BringUp():
            netlink.link("set", index=index, state="down")
        case AddRoute():
            netlink.route("del", **_route(step, index))


def _silence(netlink: Netlink, index: int) -> None:
    mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE)]}
    try:
        netlink.link("set", index=index, IFLA_AF_SPEC={"attrs": [("AF_INET6", mode)]})
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise
        # Otherwise IPv6 is not there, or too old to be told: then there is a little noise.


def _route(step: AddRoute, index: int) -> dict[str, object]:
    route: dict[str, object] = {"dst": str(step.network), "oif": index}
    if step.network.version == 4:
        route["scope"] = _SCOPE_LINK
    return route


def _holder(netlink: Netlink, step: AddRoute) -> int | None:
    """The index of the interface which the main table's route to that very network leads to."""
    family = socket.AF_INET if step.network.version == 4 else socket.AF_INET6
    for route in netlink.get_routes(family=family, dst=str(step.network), table=254):
        index = route.get_attr("RTA_OIF")
        if index is not None:
            return int(index)
    return None


def _unless_there(do: Callable[[], object]) -> None:
    try:
        do()
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


def _conflict(netlink: Netlink, step: AddRoute, holder: int | None) -> TunError:
    where = ""
    if holder is not None:
        link = netlink.get_links(holder)[0]
        where = f" through {link.get_attr('IFLA_IFNAME')}"
    return TunError(
        "conflict",
        f"there is a route to {step.network}{where} already: remove it (ip route delete "
        f"{step.network}), or take {step.network} out of allowed_ips",
    )


def _explain(netlink: Netlink, error: NetlinkError, step: Step) -> TunError:
    reason = os.strerror(error.code)
    if error.code == errno.EPERM:
        return TunError(
            "privilege",
            f"no permission for '{step}': run as root, or with the capability NET_ADMIN",
        )
    if isinstance(step, AddAddress) and step.address.version == 6 and error.code in _NO_IPV6:
        return TunError(
            "ipv6",
            f"IPv6 is switched off here: take {step.address} out of address in [interface], "
            "or: sysctl net.ipv6.conf.default.disable_ipv6=0",
        )
    if error.code == errno.ENODEV:
        return TunError("gone", f"interface {step.interface} was removed under us")
    return TunError("system", f"'{step}' failed: {reason}")
