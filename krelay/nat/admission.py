"""Which new flows are admitted, and which are evicted for them: the limits of the NAT table.

It knows every flow, and counts those that aren't closed.  Each client has two budgets of
`flows_per_client`: one for TCP that tcp-relay terminates, one for all else, which is forged more
easily.  Of `flows`, the last quarter is TCP's: there a new flow of UDP gets a place only in
exchange for another flow, of UDP unless TCP has more than that quarter, and UDP never has more than
three quarters.

Where a limit is reached, the first of these that there is goes, of the client and its budget alone
where the limit is the client's:

    a closed flow, whose last packets are through: it is no reason to refuse a client
    the oldest query that the kernel has learnt
    the oldest unconfirmed flow, and among these exchanges that only the server has gone on with, if
    they have been silent for a while: servers that repeat themselves do so to forged addresses too
    the oldest connection that is over, silent likewise

These are early_drop and can_early_drop of Linux's connection tracking
(net/netfilter/nf_conntrack_core.c); without them a flood from forged addresses would keep all
clients out for as long as its flows live, and a client with many short connections itself.  Flows
that are confirmed never go for others.

Where a limit was lowered, each new flow evicts a few more than one, and `trim` does the rest.

Times are seconds that the caller passes in.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from knet.endpoint import Endpoint, Proto
from knet.ratelimit import PerClientLimiter
from krelay.nat.dnsflows import DnsFlows
from krelay.nat.eviction import LOOKS, Spare
from krelay.nat.flow import Flow

RESERVED = 4
"""One part in so many of `limits/flows` is TCP's."""
LAST_PACKETS = 2.0
"""Seconds of silence after which the last packets of a connection that is over are through."""
ONE_SIDED = 5.0
"""Seconds of silence after which an exchange that only the server has gone on with counts as
unconfirmed: longer than most servers wait before they say something again."""
AT_ONCE = 8
"""Flows evicted for one new flow, at most: more than one where a limit was lowered."""
TRIMMED = 1024
"""Flows evicted at a time where a limit was lowered: some milliseconds."""


class Refusal(Exception):
    """No flow for this flow.  `reason` is a word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FlowLimits(NamedTuple):
    """How many flows there may be."""

    flows: int = 65536
    flows_per_client: int = 4096
    """TCP that tcp-relay terminates, and as many of all else."""
    new_flows_per_client: int = 0
    """Flows that a client may begin a second, and at once; 0: as many as it likes."""


class Eviction(NamedTuple):
    """Which flows are evicted: those first that stand first, and of those together the oldest."""

    learnt: bool
    """Whether queries that the kernel has learnt are the first of all."""
    unconfirmed: tuple[Spare, ...]
    over: tuple[Spare, ...] = ()


class Admission:
    """Holds the table to its limits."""

    def __init__(
        self,
        limits: FlowLimits,
        flows: Mapping[int, Flow],
        of_others: Counter[bytes],
        dns_flows: DnsFlows,
        end: Callable[[Flow], None],
        on_late: Callable[[Flow], bool],
    ) -> None:
        """`flows` are all that live, `learnt` the flows beside them; `of_others` is kept here: how
        many flows each client has but for those of tcp-relay.

        `end` takes a flow out (and calls `ended`).  `on_late` is called before a flow is evicted,
        as it may have been heard of elsewhere; it tells whether it may.
        """
        self.limits = limits
        self._evicted = 0
        self._flows = flows
        self._dns_flows = dns_flows
        self._end = end
        self._on_late = on_late
        # Both without those in _closed.
        self._of_others = of_others
        self._of_relayed = Counter[bytes]()
        self._udp = 0
        """UDP among the flows."""
        self._closed: dict[
            int, Flow
        ] = {}  # lingering, the oldest first: no reason to refuse a client
        self._relayed = Spare(_IS_UNCONFIRMED, _IS_CONFIRMED)
        self._forwarded = Spare(_IS_UNCONFIRMED, _IS_CONFIRMED)
        self._datagrams = Spare(_IS_UNCONFIRMED, _IS_CONFIRMED, on_settled=self.confirmed)
        self._one_sided = Spare(_IS_ONE_SIDED, _SPOKE_AGAIN, ONE_SIDED)
        self._over = Spare(_IS_OVER, _goes_on, LAST_PACKETS)
        self._new_flows = PerClientLimiter()
        datagrams, over = (self._datagrams, self._one_sided), (self._over,)
        self._any = Eviction(True, (*datagrams, self._relayed, self._forwarded), over)
        self._not_relayed = Eviction(True, (*datagrams, self._forwarded), over)
        self._of_udp = Eviction(True, datagrams)
        self._only_relayed = Eviction(False, (self._relayed,))
        self._only_forwarded = Eviction(False, (self._forwarded,), over)

    @property
    def limits(self) -> FlowLimits:
        """In force for new flows."""
        return self._limits

    @limits.setter
    def limits(self, limits: FlowLimits) -> None:
        self._limits = limits
        self._udp_most = limits.flows - limits.flows // RESERVED

    @property
    def evicted(self) -> int:
        """Flows ended to make room for others."""
        return self._evicted + self._dns_flows.displaced

    @property
    def unconfirmed(self) -> int:
        """Flows that would be evicted first; some may have become confirmed."""
        spares = self._datagrams, self._relayed, self._forwarded
        return len(self._dns_flows) + sum(map(len, spares))

    # Beginning flows

    def make_room(
        self,
        proto: Proto,
        client: Endpoint,
        now: float,
        *,
        is_relayed: bool = False,
        is_learnt: bool = False,
        is_new: bool = True,
    ) -> None:
        """Sees to it that one more flow of this client is within the limits.

        `is_relayed`: it is of TCP that tcp-relay terminates; `is_learnt`: a query that the kernel
        has learnt.  Raises Refusal: `client_rate` where
        the client has begun too many lately (a flow that isn't new doesn't count as begun now),
        `client_full`, or `table_full`.  No other client's flow goes for one who has too many
        itself.
        """
        limits, addr = self._limits, client.addr
        rate = limits.new_flows_per_client if is_new else 0
        if rate and not self._new_flows.admits(addr, rate, now):
            raise Refusal("client_rate")
        if is_relayed:
            surplus = self._of_relayed.get(addr, 0) - limits.flows_per_client
        else:
            learnt = self._dns_flows.of_client(addr)
            surplus = self._of_others.get(addr, 0) + learnt - limits.flows_per_client
        if surplus >= 0:
            which = self._only_relayed if is_relayed else self._not_relayed
            is_exchange = self._evict(surplus + 1, now, which, addr)
            # Its learnt queries are looked for among the oldest of all.  Where they aren't there,
            # they are no reason to refuse anything else: they may be forged.
            others = self._of_others.get(addr, 0)
            if not is_exchange and (is_relayed or is_learnt or others >= limits.flows_per_client):
                raise Refusal("client_full")
        else:
            is_exchange = False
        if len(self._flows) + len(self._dns_flows) >= self._udp_most:
            self._make_room_in_table(proto, now, is_exchange=is_exchange)
        if rate:
            self._new_flows.began(addr, rate, now)

    def evict_one(self, proto: Proto, now: float) -> bool:
        """Evicts a flow of UDP, or of TCP without tcp-relay, that has something which a new flow
        lacks; whether there was one."""
        return self._evict_one(now, self._of_udp if proto is _UDP else self._only_forwarded)

    def unasked(self) -> int:
        """How many more learnt flows may begin without `make_room` for each."""
        if self._limits.new_flows_per_client:
            return 0
        return min(self._udp_most - self._live(), self._limits.flows - self._count())

    def learnt_make_room(self) -> bool:
        """Whether a learnt flow is the first to go where there is no room for one more, and is
        enough."""
        if self._limits.new_flows_per_client or self._closed:
            return False
        udp = self._udp + len(self._dns_flows)
        return self._live() <= self._limits.flows and udp <= self._udp_most

    def trim(self, now: float) -> None:
        """Evicts some of what is beyond a limit that was lowered, closed flows first; call it now
        and then."""
        beyond = min(TRIMMED, self._count() - self._limits.flows)
        closed = list(islice(self._closed.values(), max(0, beyond)))
        for flow in closed:
            self._end(flow)
        for _ in range(beyond - len(closed)):
            if not self._evict_one(now, self._any):
                break

    def forget(self, now: float) -> None:
        """Lets go of what needn't be known any more of who began flows; call it now and then."""
        self._new_flows.forget(now)

    def clear(self) -> None:
        """Every flow has ended; that they were begun is forgotten with them."""
        self._new_flows = PerClientLimiter()

    # What becomes of flows

    def began(self, flow: Flow) -> None:
        """The flow is in the table."""
        counts, spare, addr = self._of_others, self._forwarded, flow.client.addr
        if flow.gport is not None:
            counts, spare = self._of_relayed, self._relayed
        elif flow.proto is _UDP:
            spare = self._datagrams
            self._udp += 1
        counts[addr] = counts.get(addr, 0) + 1
        spare.add(flow, flow.created_at)

    def confirmed(self, flow: Flow) -> None:
        """It is confirmed, or is about to be.  Need not be told of each at once."""
        if flow.gport is not None:
            self._relayed.discard(flow)
        elif flow.proto is not _UDP:
            self._forwarded.discard(flow)
        else:
            self._datagrams.discard(flow)
            self._one_sided.discard(flow)
            if flow.is_one_sided:
                self._one_sided.add(flow, flow.seen_at)

    def changed(self, flow: Flow) -> None:
        """The state of a TCP connection without tcp-relay has changed."""
        self._over.discard(flow)
        if flow.is_over and flow.closed_at is None:
            self._over.add(flow, flow.quiet_since)

    def closed(self, flow: Flow) -> None:
        """Both its legs are closed: it only lingers."""
        self._closed[flow.id] = flow
        self._leave(flow)

    def ended(self, flow: Flow) -> None:
        """The flow is in the table no more."""
        if flow.proto is _UDP:
            self._udp -= 1
        if flow.closed_at is None or self._closed.pop(flow.id, None) is None:
            self._leave(flow)

    # Inside

    def _count(self) -> int:
        return len(self._flows) + len(self._dns_flows)

    def _live(self) -> int:
        return self._count() - len(self._closed)

    def _make_room_in_table(self, proto: Proto, now: float, *, is_exchange: bool) -> None:
        """`is_exchange`: a flow has been evicted for this one already."""
        most = self._limits.flows
        live, which = self._live(), self._any
        surplus = live - most + 1
        if proto is _UDP:
            udp = self._udp + len(self._dns_flows)
            if live - udp <= most - self._udp_most or udp >= self._udp_most:
                which = self._of_udp  # TCP has no more than its part
            if live >= self._udp_most and not is_exchange:
                surplus = max(surplus, 1)
            surplus = max(surplus, udp - self._udp_most + 1)
        if not self._evict(surplus, now, which):
            raise Refusal("table_full")
        for flow in list(islice(self._closed.values(), AT_ONCE)):
            if self._count() < most:
                break
            self._end(flow)

    def _evict(
        self, surplus: int, now: float, which: Eviction, client: bytes | None = None
    ) -> bool:
        """Evicts so many, of this client if one is named, or as many as may be at once.

        Whether there were enough.
        """
        return all(self._evict_one(now, which, client) for _ in range(min(surplus, AT_ONCE)))

    def _evict_one(self, now: float, which: Eviction, client: bytes | None = None) -> bool:
        if which.learnt and self._dns_flows.remove_oldest(client):
            return True
        for spares in (which.unconfirmed, which.over):
            for _ in range(LOOKS):
                oldest = None
                for spare in spares:
                    flow = spare.oldest(now, client)
                    if flow is not None and (oldest is None or flow.id < oldest.id):
                        oldest, its = flow, spare
                if oldest is None:
                    break
                if self._on_late(oldest) and its.oldest(now, client) is not oldest:
                    continue
                self._end(oldest)
                self._evicted += 1
                return True
        return False

    def _leave(self, flow: Flow) -> None:
        """It isn't counted any more, and is not to be evicted."""
        counts, spare, addr = self._of_others, self._forwarded, flow.client.addr
        if flow.gport is not None:
            counts, spare = self._of_relayed, self._relayed
        elif flow.proto is not _UDP:
            self._over.discard(flow)
        else:
            spare = self._datagrams
            if flow.answered_at is not None:
                self._one_sided.discard(flow)
        spare.discard(flow)
        if number := counts[addr] - 1:
            counts[addr] = number
        else:
            counts.pop(addr)  # as `del`, which is a function of Counter's own


_IS_UNCONFIRMED, _IS_CONFIRMED = attrgetter("is_unconfirmed"), attrgetter("is_confirmed")
_IS_ONE_SIDED, _SPOKE_AGAIN = attrgetter("is_one_sided"), attrgetter("spoke_again")
_IS_OVER = attrgetter("is_over")
_UDP = Proto.UDP
# By this name: looking it up in its class takes ten times as long.


def _goes_on(flow: Flow) -> bool:
    return not flow.is_over
