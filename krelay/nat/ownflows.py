"""This host's own flows from relayed ports, whose replies read as a client's first packet does.

A reply is never a new connection.  But a time server's answer, 203.0.113.9:123 > K:123, and the
first packet of a client who asks the relay from port 123 differ in nothing but what was before.  So
whatever leaves this host from a relayed port, behind the host's own NAT (so that hosts which it
masquerades are among them), and isn't relayed, is remembered here for a while: what comes back goes
on untouched.  Linux's connection tracking does the same; krelay works without it.

Only packets that this host sends make an entry; of TCP only a SYN without an ACK, by which it
begins a connection.  Times are seconds that the caller passes in.
"""

from knet.endpoint import Proto
from krelay.nat.flow import Timeouts

MOST = 1 << 16
"""Flows that are remembered; one more evicts one: that without a reply which was silent longest, or
where each has had one, of all."""
UNREPLIED, REPLIED = 30.0, 180.0
"""Seconds for which a flow of UDP is remembered: nf_conntrack_udp_timeout is 30, and 180 is what
nf_conntrack_udp_timeout_stream was first (120 in later kernels)."""

Flows = dict[bytes, float]
"""When each flow was last heard of, by the flow key of a packet that this host sends; the first
is the one that was silent longest."""


class OwnFlows:
    """The flows that this host has begun."""

    def __init__(self, most: int = MOST) -> None:
        self.evicted = 0
        """Flows forgotten for want of room."""
        self._most = most
        self._waiting: dict[Proto, Flows] = {proto: {} for proto in Proto}
        """Those without a reply."""
        self._replied: dict[Proto, Flows] = {proto: {} for proto in Proto}
        self._tables = (*self._waiting.values(), *self._replied.values())

    def __bool__(self) -> bool:
        """Whether there is any: asked for each new flow, so without counting them."""
        one, two, three, four = self._tables
        return bool(one or two or three or four)

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    def of(self, proto: Proto) -> list[bytes]:
        """Those of this protocol, by the flow key of a packet that this host sends."""
        return [*self._waiting[proto], *self._replied[proto]]

    def sent(self, proto: Proto, at: bytes, now: float) -> None:
        """This host has sent such a packet."""
        if self._replied[proto].pop(at, None) is not None:
            self._replied[proto][at] = now
            return
        if self._waiting[proto].pop(at, None) is None and len(self) >= self._most:
            flows = max(self._waiting.values(), key=len) or max(self._replied.values(), key=len)
            del flows[next(iter(flows))]
            self.evicted += 1
        self._waiting[proto][at] = now

    def replied(self, proto: Proto, at: bytes, now: float) -> bool:
        """Whether this host has sent such a packet lately, so that what came is a reply to it."""
        known = self._replied[proto].pop(at, None) is not None
        if not known and self._waiting[proto].pop(at, None) is None:
            return False
        self._replied[proto][at] = now
        return True

    def expire(self, now: float, timeouts: Timeouts) -> None:
        """Forgets those that have been silent for too long; of TCP after these timeouts."""
        for flows, timeout in (
            (self._waiting[Proto.UDP], UNREPLIED),
            (self._replied[Proto.UDP], REPLIED),
            (self._waiting[Proto.TCP], timeouts.tcp_transitory),
            (self._replied[Proto.TCP], timeouts.tcp_established),
        ):
            while flows and flows[oldest := next(iter(flows))] <= now - timeout:
                del flows[oldest]

    def clear(self) -> None:
        """Forgets all."""
        for flows in self._tables:
            flows.clear()
