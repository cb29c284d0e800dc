"""Whether clients of TCP can be led to a tcp-relay, and if not, why: for people."""

from collections.abc import Callable, Iterable

from knet.listeners import Holder
from knet.log import Log, Throttle
from knet.netlink import sockdiag
from krelay.registration.gatewayports import GatewayPorts

SERVED, UNUSED = "served", "unused"
"""A gateway port's state where nothing is wrong."""

_log = Log("relaying")


class GatewayWatch:
    """Says what is wrong with a gateway port; `holder` tells which process has a socket open."""

    def __init__(
        self, gateways: GatewayPorts, holder: Callable[[Iterable[int]], Holder | None]
    ) -> None:
        self._gateways = gateways
        self._holder = holder
        self._named: tuple[list[sockdiag.Socket], str] = ([], "")
        """The sockets of other programs on the gateway port, and the name of their program."""
        self._refusing: str | None = None
        """Why clients of TCP are refused, when last looked."""
        self._warning = Throttle()

    def taken_by(self, port: int) -> str | None:
        """The other program that listens there; None if none does, or it can't be known."""
        others = self._gateways.others(port)
        return self._called(others) if others else None

    def state(self, port: int) -> str:
        """`served`, or why clients led to this port would be refused now."""
        if port in self._gateways.served:
            return SERVED
        others = self._gateways.others(port)
        if others is None:
            return "the kernel doesn't tell who listens on a port; modprobe tcp_diag"
        if others:
            return f"port {port} is in use by {self._called(others)}; end that, or set gport"
        return f"no tcp-relay listens on port {port}"

    def warn(self, state: str, now: float, *, silent: bool) -> None:
        """Call once a second with the state: what lasts is told, unless it is to be `silent`."""
        why = None if state in (SERVED, UNUSED) else state
        if why is not None and why == self._refusing and not silent:
            before = self._warning.admit(now)
            if before is not None:
                _log.warning("clients of TCP are refused", reason=why, again=before or None)
        self._refusing = why

    def _called(self, others: list[sockdiag.Socket]) -> str:
        if self._named[0] != others:
            who = self._holder([each.inode for each in others])
            self._named = (others, str(who or f"another program of user {others[0].uid}"))
        return self._named[1]
