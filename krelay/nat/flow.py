"""One flow of the NAT table: a relayed conversation, and what its packets become.

Flows are plain values: all that is needed to make one again is in its public fields.  What the
packet path needs of a flow are its Rewrites; which packets are whose, how long flows live and which
ports are free is the table's matter (table.py).
"""

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from knet.endpoint import Endpoint, Proto, Source, key_dst_end, key_src_end
from knet.wire.checksum import ONES
from krelay.nat.tcpstate import State, Tracker
from krelay.steps import SIDES, Side, Step

CLOSED_LINGER = 10.0
"""Seconds a flow stays after tcp-relay closed both legs: lost FINs and ACKs are still repeated."""

DNS_PORT = 53

BUSY = 4
"""Packets of one direction after which a flow isn't over soon, and may be the kernel's."""
_SELDOM = 64
"""Packets after each of which the table is told of a busy direction (`Rewrite.told`)."""

EXCHANGE = 2.0
"""Seconds for which an exchange of datagrams goes on before it counts as a conversation, as in
Linux's connection tracking (stream_ts in net/netfilter/nf_conntrack_proto_udp.c)."""


NO_LEG, PAST_LEG = -1, -2
"""Flow.leg where no number is known."""


class Timeouts(NamedTuple):
    """Seconds of idleness after which a flow goes (defaults: RFC 4787 REQ-5, RFC 5382 REQ-5)."""

    udp: float = 300
    udp_dns: float = 20
    tcp_transitory: float = 240
    tcp_established: float = 7440


class Footprint(NamedTuple):
    """What the netfilter rules must catch on behalf of a flow."""

    proto: Proto
    port: int
    gport: int | None
    server: bytes
    any_client: bool
    """Whether the source of any client's packets may have to be changed to the relay's."""
    forwarded: bool = False
    """TCP that passes this host, as UDP does: its answers are caught when they go out."""
    any_port: bool = False
    """UDP whose server may answer from any of its ports."""


Table = dict[bytes, "Rewrite"]
"""The rewrites of one hook and protocol, by the flow key that packets carry there."""


class Rewrite:
    """What becomes of the packets of one direction at one hook, and how many there were."""

    __slots__ = (
        "bytes",
        "flow",
        "ip_delta",
        "l4_delta",
        "new",
        "old",
        "packets",
        "seen_at",
        "step",
        "table",
        "tell_at",
        "tos",
        "watched",
    )

    def __init__(
        self,
        flow: "Flow",
        step: Step,
        table: Table,
        old: bytes,
        new: bytes,
        deltas: tuple[int, int],
        now: float,
    ) -> None:
        self.flow = flow
        self.step = step
        self.table = table
        """Where it is found by `old`."""
        self.old = old
        self.new = new
        self.ip_delta, self.l4_delta = deltas
        """What a header checksum grows by; the transport's, which covers the ports too."""
        self.packets = 0
        self.bytes = 0
        self.seen_at = now
        self.watched = flow.proto is _TCP
        """Whether each packet's flags matter: the connection is opening, or was perhaps reset."""
        self.tos = 0
        """DSCP and ECN of the last packet of TCP, as they stand in one byte (RFC 2474; RFC 3168);
        of those that an end sends, changed only by FlowTracking.mark."""
        self.tell_at = BUSY
        """Packets at which the table is told (FlowTracking.counted)."""

    def told(self) -> None:
        """The table was: from now on at multiples of BUSY, later less often."""
        every = BUSY if self.packets < _SELDOM else _SELDOM
        self.tell_at = self.packets - self.packets % every + every

    @property
    def src(self) -> Endpoint:
        """The source that packets leave with."""
        return key_src_end(self.new)

    @property
    def dst(self) -> Endpoint:
        """The destination that packets leave with."""
        return key_dst_end(self.new)


def deltas(old: bytes, new: bytes) -> tuple[int, int]:
    """What both checksums grow by when `old` becomes `new`: the header's, the transport's.

    As checksum.difference; the header's without the ports.
    """
    before, after = int.from_bytes(old), int.from_bytes(new)
    return ((after >> 32) - (before >> 32)) % ONES, (after - before) % ONES


@dataclass(slots=True, eq=False)
class Flow:
    """One relayed conversation."""

    id: int
    proto: Proto
    client: Endpoint
    service: Endpoint
    """The address and port the client talks to.  Equal to `server` in a direct flow (direct.py)."""
    server: Endpoint
    source: Source
    created_at: float
    gport: int | None = None
    inside: Endpoint | None = None
    """TCP: the client as tcp-relay sees it."""
    relay: Endpoint | None = None
    """The relay's own address and port towards the server."""
    tracker: Tracker = field(default_factory=Tracker)
    answered_at: float | None = None
    """UDP but to port 53: when the server's first answer came."""
    spoke_again: bool = False
    """UDP: the client has, after that answer."""
    leg: int | None = None
    """TCP: the number of the SYN by which tcp-relay's leg to the server began; None while it may
    still begin, NO_LEG if it mustn't any more, PAST_LEG if it has and no SYN can be its own."""
    called_again: bool = False
    """TCP: a SYN of the client's has come since, for tcp-relay's host to judge."""
    accepted: bool = False
    """TCP: tcp-relay has accepted the client's connection, so its address is no forgery."""
    orphaned: bool = False
    """TCP: the tcp-relay that had it is not connected any more."""
    marked_at: float = -inf
    """TCP: when a change of DSCP is the next to be followed, if there were many."""
    heard_at: float = -inf
    """TCP: when the server was last heard on a leg that the flow has given up (`detach`)."""
    reset_at: float = 0.0
    """TCP: when the RST came that made it `closing`."""
    closed_at: float | None = None
    abort_asked: bool = False
    """Ended from outside (kill, stop): both ends are to be reset, by tcp-relay if it is its."""
    told: frozenset[Side] = frozenset()
    """The ends of a forwarded flow that know that it was ended."""
    rewrites: dict[Step, Rewrite] = field(default_factory=dict)
    reserved: tuple[bytes, ...] = ()
    """What its packets to the server read there, which no other flow's may."""
    footprint: Footprint | None = None
    due: int = -1
    """The second in which the table looks at this flow next."""

    @property
    def is_forwarded(self) -> bool:
        """TCP between client and server themselves, rewritten: no tcp-relay has a part in it."""
        return self.proto is _TCP and self.gport is None and self.service != self.server

    @property
    def dscps(self) -> tuple[int, int]:
        """TCP that tcp-relay terminates: the DSCP with which client and server send."""
        client, server = self.rewrites.get(_T1), self.rewrites.get(_T4)
        return (
            0 if client is None else client.tos >> 2,
            0 if server is None else server.tos >> 2,
        )

    @property
    def seen(self) -> Endpoint | None:
        """TCP: the endpoint by which the server knows the client, while tcp-relay has a port
        towards it."""
        towards = self.rewrites.get(_T3)
        return None if towards is None else towards.src

    @property
    def is_any_port(self) -> bool:
        """Whether its server may answer from any port, or this is where it has done so."""
        return self.footprint is not None and self.footprint.any_port

    def by(self, side: Side) -> Rewrite | None:
        """The rewrite that counts this side's packets, if it has one yet."""
        for step, rewrite in self.rewrites.items():
            if SIDES.get(step) is side:
                return rewrite
        return None

    @property
    def state(self) -> State:
        """TCP: as tracked; UDP: whether the server has answered."""
        if self.proto is _TCP:
            return self.tracker.state
        answers = self.by(_SERVER)
        return _REPLIED if answers and answers.packets else _UNREPLIED

    @property
    def seen_at(self) -> float:
        """When the client or the server was last heard (RFC 4787 REQ-6; never the relay itself)."""
        seen = self.created_at
        if self.heard_at > seen:
            seen = self.heard_at
        for step, rewrite in self.rewrites.items():
            if rewrite.seen_at > seen and step in SIDES:
                seen = rewrite.seen_at
        return seen

    @property
    def quiet_since(self) -> float:
        """When the client or the server was last heard, a RST among it."""
        return max(self.seen_at, self.reset_at)

    @property
    def is_confirmed(self) -> bool:
        """Whether both ends take part for certain, from then on always.

        TCP: the client, whose address may be forged until tcp-relay has accepted its connection;
        in a client's own connection the server.  Forwarded, a handshake of both, and no RST: a
        client whose address was forged resets what the server answers, or says nothing.  UDP: the
        client has spoken again after an answer, or the exchange goes on for some time; a query to a
        name server is over with its response, so flows to port 53 are never confirmed.
        """
        if self.is_forwarded:
            tracker = self.tracker
            return tracker.client_acked and tracker.server_answered and not tracker.reset
        if self.proto is _TCP:
            return self.accepted or self.tracker.server_answered
        return self.spoke_again or self.is_one_sided

    @property
    def is_one_sided(self) -> bool:
        """UDP: whether the server goes on to answer what the client said once.

        A client whose address was forged looks the same, where the server says things several
        times.
        """
        answered_at = self.answered_at
        if answered_at is None or self.spoke_again:
            return False
        return self.seen_at - answered_at >= EXCHANGE

    @property
    def is_unconfirmed(self) -> bool:
        """Whether this isn't confirmed, nor about to be.

        A TCP client that has acknowledged waits for tcp-relay to accept it, unless that was a guess
        and the relay's host has reset it (RFC 9293, section 3.10.7.4).  A forwarded flow that was
        killed has its ends still to tell: without it they would go on.  One that was reset after
        its handshake may have been so by a forger; it goes as one that is over.
        """
        tracker = self.tracker
        if self.is_confirmed or (self.is_forwarded and self.abort_asked):
            return False
        if self.is_forwarded and tracker.server_answered and tracker.client_acked:
            return False
        return tracker.reset or not tracker.client_acked

    @property
    def is_over(self) -> bool:
        """Whether both ends have ended a connection that tcp-relay has no part in, or one has reset
        it, and no end need be told.  Its last packets are perhaps still to come."""
        return self.gport is None and self.state is _CLOSING and not self.abort_asked

    def expires_at(self, timeouts: Timeouts) -> float:
        """When the flow goes unless a packet comes."""
        if self.closed_at is not None:
            return self.closed_at + CLOSED_LINGER
        if self.proto is not _TCP:
            dns = self.service.port == DNS_PORT
            return self.seen_at + (timeouts.udp_dns if dns else timeouts.udp)
        if self.tracker.state is _ESTABLISHED:
            return self.seen_at + timeouts.tcp_established
        # RFC 7857, section 2.2: four minutes from the RST, not from what was before
        return self.quiet_since + timeouts.tcp_transitory


_TCP, _SERVER = Proto.TCP, Side.SERVER
_T1, _T3, _T4 = Step.T1, Step.T3, Step.T4
_ESTABLISHED, _CLOSING = State.ESTABLISHED, State.CLOSING
_UNREPLIED, _REPLIED = State.UNREPLIED, State.REPLIED
# By these names: looking one up in its class takes ten times as long.
