"""The NAT table: which packet becomes which, for how long, and on whose account.

A flow is one relayed conversation.  What the packet path needs of it are its Rewrites: one for each
direction at each netfilter hook, found by the twelve bytes of addresses and ports that a packet
carries there, and holding the twelve bytes it leaves with and by how much its checksums change.
Look-ups never scan, so the cost of a packet doesn't depend on how many flows live.

             PREROUTING                                        POSTROUTING
    T1   C:x > K:80  =>  C:x > K:A                  T2   K:A > C:x    =>  K:80 > C:x
    T4   S:80 > C:y  =>  S:80 > K:y                 T3   K:y > S:80   =>  C:y > S:80
    U1,2 C:x > K:53  =>  C:x > S:53                 U3,4 S:53 > C:x   =>  K:53 > C:x

TCP that is forwarded takes the steps of UDP.  With source=relay these are taken each by itself,
since the relay's own address may not be the source of a packet that is still to be forwarded (it
would be a martian).  Between the hooks such a packet travels as C:y, y being the relay port, so
that it can't be mistaken for anyone else's:

    U1   C:x > K:53  =>  C:y > S:53                 U2   C:y > S:53   =>  K:y > S:53
    U3   S:53 > K:y  =>  S:53 > C:y                 U4   S:53 > C:y   =>  K:53 > C:x

A server may answer from another port than it was asked at, as TFTP's does (RFC 1350, section 4),
where the service allows it (`+any-port`).  Such an answer begins a flow of its own, S:p > C:x =>
K:p > C:x, beside that of the query, with the port that the server knows the client by.

Three kinds of port are therefore chosen here, always the wanted one if it is free:

    inside   the client's port as tcp-relay sees it: two connections from C:x to K:80 and to
             K:443 would meet as C:x > K:A
    outside  the port the server sees: must differ from every other flow's and from the client's own
             direct connections to that server.  Of TCP that tcp-relay terminates it is tcp-relay's
             own, y; but a client below 1024 is seen below 1024, since a server may ask for that
             (RFC 4787, REQ-3a; NFS's `secure`)
    direct   when a client's own connection C:p > S:80 comes to a port p that the relay already uses
             towards S on its behalf, that connection is moved to another port (steps D1, D2)

Times are seconds that the caller passes in; nothing here reads a clock.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from random import Random

from knet.endpoint import Endpoint, Proto, Source
from knet.timerwheel import Wheel
from knet.wire.checksum import ONES
from knet.wire.tcp import ACK, FIN
from krelay.nat.admission import Admission, FlowLimits, Refusal
from krelay.nat.dnsflows import Beginning, DnsFlow, DnsFlows
from krelay.nat.events import NatObserver, Observers
from krelay.nat.flow import (
    BUSY,
    DNS_PORT,
    NO_LEG,
    PAST_LEG,
    Flow,
    Footprint,
    Rewrite,
    Table,
    Timeouts,
    answering,
    deltas,
    key,
)
from krelay.nat.ownflows import OwnFlows
from krelay.nat.ports import FIRST_HIGH, RelayPorts
from krelay.nat.tcpstate import State, Through
from krelay.steps import SENDERS, SIDES, Hook, Side, Step

HORIZON = 64
"""Seconds after which each flow is looked at, at the latest."""
_SPREAD = HORIZON // 2

TRIES = 512
"""Ports of each parity that are looked at where the wanted one is taken: below 1024 all of them.
A client that has taken that many of its own in a row is refused; the packet path isn't held up."""
_ASKED_AT = 64
"""Ports at which a server is looked for that has answered from another."""
MARKS, MARK_EVERY = 8, 0.025
"""Changes of DSCP of a connection that are followed at once, and seconds from one to the next."""
PORTS_FREED = 8
"""Flows evicted, at most, until one of the relay's own ports is free for a new one."""


class DirectFlows:
    """Clients' own conversations with a server, seen passing by: least recently seen first."""

    def __init__(self, most: int = 65536) -> None:
        self._seen: dict[Proto, dict[bytes, float]] = {proto: {} for proto in Proto}
        self._most = most

    def saw(self, proto: Proto, at: bytes, now: float) -> None:
        """A packet of this conversation came past."""
        seen = self._seen[proto]
        seen.pop(at, None)
        seen[at] = now
        if len(seen) > self._most:
            del seen[next(iter(seen))]

    def __contains__(self, dns_flow: tuple[Proto, bytes]) -> bool:
        return dns_flow[1] in self._seen[dns_flow[0]]

    def expire(self, proto: Proto, before: float) -> None:
        """Forgets those not seen since `before`."""
        seen = self._seen[proto]
        while seen and seen[oldest := next(iter(seen))] < before:
            del seen[oldest]


class NatTable:
    """All flows, and the look-up tables of the packet path.

    `tables[hook, proto]` maps the twelve bytes of a packet to its Rewrite.  They are dictionaries
    for the worker to read; only this class writes them.
    """

    def __init__(
        self,
        limits: FlowLimits | None = None,
        timeouts: Timeouts | None = None,
        *,
        rng: Random,
        observers: Iterable[NatObserver] = (),
    ) -> None:
        self.tables: dict[tuple[Hook, Proto], Table] = {
            (hook, proto): {} for hook in Hook for proto in Proto
        }
        self.direct = DirectFlows()
        self.own_flows = OwnFlows()
        self.footprints: Counter[Footprint] = Counter()
        """What the live flows need of the rules."""
        self.footprint_changes = 0
        """How often one has come or gone."""
        self.observers = Observers(observers)
        """Told of what becomes of flows; those that need the table first are added later."""
        self._timeouts = timeouts or Timeouts()
        self._rng = rng
        self._flows: dict[int, Flow] = {}
        self._ids = itertools.count(1)
        per_client = Counter[bytes]()
        asked = self.tables[_PRE, Proto.UDP]
        self.dns_flows = DnsFlows(self._ids, asked, per_client, BUSY, self._adopt)
        """Those that the kernel relays by itself; the worker has no part in them."""
        self._admission = Admission(
            limits or FlowLimits(),
            self._flows,
            per_client,
            self.dns_flows,
            self.end,
            self._may_be_late,
        )
        self._relay_ports = {proto: RelayPorts(rng) for proto in Proto}
        self.reserved: frozenset[int] = frozenset()
        """Ports of this host that no flow gets."""
        self._outside: dict[Proto, dict[bytes, Flow]] = {proto: {} for proto in Proto}
        self._asked_by: dict[bytes, Flow] = {}
        """UDP whose server may answer from any port: the latest flow by the server's address, and
        the address and port by which it knows the client."""
        self._inside: dict[tuple[Endpoint, int], Flow] = {}
        self._by_relay: dict[Endpoint, Flow] = {}
        # Ids by the second in which to look at the flow next: one that was heard of meanwhile is
        # moved on when its second comes, so that a packet never touches this.  Never further than
        # HORIZON, so that entries of flows that have ended don't pile up.
        self._due = Wheel[int]()

    def __len__(self) -> int:
        return len(self._flows) + len(self.dns_flows)

    def __iter__(self) -> Iterator[Flow]:
        yield from list(self._flows.values())
        for query, dns_flow in self.dns_flows:
            yield self._flow_of(query, dns_flow)

    @property
    def limits(self) -> FlowLimits:
        """In force for new flows.  Where they are lowered, what is beyond goes by and by
        (`expire`), but for what is confirmed."""
        return self._admission.limits

    @limits.setter
    def limits(self, limits: FlowLimits) -> None:
        self._admission.limits = limits

    @property
    def evicted(self) -> int:
        """Flows ended to make room for others."""
        return self._admission.evicted

    @property
    def unconfirmed(self) -> int:
        """Flows that would be evicted first; some may have become confirmed."""
        return self._admission.unconfirmed

    @property
    def workers(self) -> list[Flow]:
        """The flows whose packets the worker knows: without those that the kernel has learnt."""
        return list(self._flows.values())

    def count(self, proto: Proto) -> int:
        """Flows of this protocol."""
        learnt = len(self.dns_flows) if proto is Proto.UDP else 0
        return learnt + sum(1 for flow in self._flows.values() if flow.proto is proto)

    def get(self, flow_id: int) -> Flow | None:
        """The flow with this number."""
        flow = self._flows.get(flow_id)
        if flow is None:
            learnt = (self._flow_of(*each) for each in self.dns_flows if each[1].id == flow_id)
            flow = next(learnt, None)
        return flow

    def of_id(self, flow_id: int) -> Flow | None:
        """The flow with this number, if it is one whose packets the worker knows."""
        return self._flows.get(flow_id)

    @property
    def timeouts(self) -> Timeouts:
        """In force for all flows, also those that live."""
        return self._timeouts

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """Puts other timeouts in force, also for flows that live."""
        self._timeouts = timeouts
        self._due.clear()
        for flow in self._flows.values():
            flow.due = -1
            self.schedule(flow)

    # Making flows

    def open_tcp(
        self,
        client: Endpoint,
        service: Endpoint,
        server: Endpoint,
        source: Source,
        gport: int,
        now: float,
        *,
        inside: Endpoint | None = None,
    ) -> Flow:
        """A connection that a client opens: steps T1 and T2.

        Takes the place of a former connection between the same ports.  One that goes on after a
        restart names its `inside`, and is not counted as new.  Raises Refusal (`table_full`,
        `client_full`, `client_rate`, `no_port`).
        """
        self._admission.make_room(_TCP, client, now, is_relayed=True, is_new=inside is None)
        if inside is None:
            inside = client
            if not self._inside_is_free(inside, gport, service):
                port = self._other_port(
                    client.port,
                    lambda p: self._inside_is_free(Endpoint(client.addr, p), gport, service),
                )
                inside = Endpoint(client.addr, port)
        flow = self._flow(_TCP, client, service, server, source, now, through=False)
        flow.gport = gport
        flow.inside = inside
        flow.footprint = Footprint(_TCP, service.port, gport, server.addr, False)
        self._inside[inside, gport] = flow
        to_gateway = key(inside, Endpoint(service.addr, gport))
        self._add(flow, _T1T2, _PRE_POST, key(client, service), to_gateway, now)
        self._enter(flow)
        self.observers.changed(flow)
        return flow

    def succeed(self, flow: Flow, now: float) -> Flow:
        """The flow of another connection between the same ports of a client and tcp-relay.

        The former keeps its leg to the server until that is closed.  Raises Refusal.
        """
        assert flow.gport is not None
        client, service, server = flow.client, flow.service, flow.server
        tos = flow.rewrites[Step.T1].tos  # its SYN came through that one, which may go now
        new = self.open_tcp(
            client, service, server, flow.source, flow.gport, now, inside=flow.inside
        )
        new.tracker.client_acked = True
        new.rewrites[Step.T1].tos = tos
        flow.called_again = False
        return new

    def attach(
        self,
        flow: Flow,
        relay: Endpoint,
        now: float,
        *,
        seen: int | None = None,
        services: Collection[int] = (),
    ) -> None:
        """tcp-relay will connect to the flow's server from `relay`: steps T3 and T4.

        `seen` is the port that the server knows already; None: it is chosen here, and with
        source=relay it is none of `services`, as in open_forwarded.  Takes the place
        of a port that it had before, from which it couldn't connect.
        Raises Refusal (`port_taken`) when another flow has the port on this side, or the server may
        know it already: the client's own connection, another flow's, or the client's port itself.
        """
        row_source = flow.client.addr if flow.source is Source.CLIENT else relay.addr
        outside = Endpoint(row_source, relay.port if seen is None else seen)
        if seen is None and flow.client.port < FIRST_HIGH <= relay.port:
            outside = self._seen_low(flow, outside, services)
        is_low = outside.port != relay.port
        at = key(outside, flow.server)
        holder = self._outside[Proto.TCP].get(at)
        if holder is not None and holder.closed_at is not None:
            self.end(holder)  # its port was free to be bound again, so both its legs are gone
            holder = None
        taken = holder is not None and holder is not flow
        beside = self._by_relay.get(relay)
        if beside is not None and beside is not flow and beside.closed_at is None:
            taken = True
        if taken or (_TCP, at) in self.direct or (outside == flow.client and not is_low):
            raise Refusal("port_taken")
        self.detach(flow)
        self._admission.confirmed(flow)
        flow.relay, flow.leg = relay, None
        self._by_relay[relay] = flow
        self._reserve(flow, at)
        self._add(flow, _T3T4, _POST_PRE, key(relay, flow.server), at, now)
        self.observers.changed(flow)

    def open_forwarded(
        self,
        proto: Proto,
        client: Endpoint,
        service: Endpoint,
        server: Endpoint,
        source: Source,
        now: float,
        *,
        relay_addr: bytes | None = None,
        any_client: bool = False,
        any_port: bool = False,
        services: Collection[int] = (),
    ) -> Flow:
        """A conversation that a client begins, or TCP that is picked up in its midst: U1 to U4.

        With source=relay, `relay_addr` is the relay's own address towards the server, and
        `any_client` tells that this isn't so for clients beside the server only; no port of
        `services` is taken there, else an answer that comes when the flow has gone would be taken
        for a query of the server's.  `any_port`: the server may answer from any port
        (`answered_elsewhere`).  Raises Refusal (`table_full`, `client_full`, `client_rate`,
        `no_port`).
        """
        if proto is _UDP and (known := self.adopt(key(client, service), now)) is not None:
            return known
        self._admission.make_room(proto, client, now)
        flow = self._flow(proto, client, service, server, source, now)
        if source is _CLIENT:
            outside = self._seen_as(proto, client, server)
            self._lead(flow, outside, now)
        else:
            hidden = relay_addr or service.addr

            def is_free(port: int) -> bool:
                ends = (Endpoint(addr, port) for addr in (client.addr, hidden))
                return all(self.is_free(proto, key(end, server)) for end in ends)

            def fits(port: int) -> bool:
                return port not in self.reserved and is_free(port)

            def take() -> int | None:
                ports, wanted = self._relay_ports[proto], client.port
                port = ports.take(hidden, wanted, lambda p: p not in services and fits(p))
                return ports.take(hidden, wanted, fits) if port is None else port

            port, tries = take(), PORTS_FREED
            while port is None:
                tries -= 1
                if tries < 0 or not self._admission.evict_one(proto, now):
                    raise Refusal("no_port")
                port = take()
            flow.relay = Endpoint(hidden, port)
            outside = key(flow.relay, server)
            self._lead(flow, outside, now)
        flow.footprint = Footprint(
            proto, service.port, None, server.addr, any_client, proto is _TCP, any_port
        )
        if any_port:
            self._asked_by[_known_by(outside)] = flow
        return self._enter(flow)

    def answered_elsewhere(self, server: Endpoint, client: Endpoint, now: float) -> Flow | None:
        """The flow of a datagram from `server`, which was asked at another port, to `client` as it
        knows it: made anew, if the service that was asked allows it (`any_port`).

        Raises Refusal (as `open_forwarded`).
        """
        asked = self._asked_by.get(server.addr + client.wire)
        if asked is None or server.port == 0:
            return None
        service, outside = Endpoint(asked.service.addr, server.port), key(client, server)
        if not self.is_free(_UDP, outside) or self._of_query(key(asked.client, service)):
            return None  # another flow's, or the client's own
        self._admission.make_room(_UDP, asked.client, now)
        if asked.id not in self._flows:
            return None  # it was the one to go
        flow = self._flow(_UDP, asked.client, service, server, asked.source, now)
        if asked.relay is not None:
            self._relay_ports[_UDP].share(*asked.relay)
            flow.relay = asked.relay
        self._lead(flow, outside, now)
        flow.footprint = asked.footprint
        return self._enter(flow)

    def asked_elsewhere(self, server: Endpoint, client: Endpoint) -> Endpoint | None:
        """What a client has asked of this server, at another port and without an answer from there.

        `client` is as the server knows it.
        """
        ports = {each.port for each in self.footprints if each.proto is _UDP and not each.any_port}
        for port in islice(ports, _ASKED_AT):
            back = key(server._replace(port=port), client)
            for hook in Hook:
                rewrite = self.tables[hook, _UDP].get(back)
                if rewrite is not None and rewrite.flow.server.port != server.port:
                    flow = rewrite.flow
                    return flow.service if flow.state is State.UNREPLIED else None
        return None

    def saw_direct(
        self,
        proto: Proto,
        client: Endpoint,
        server: Endpoint,
        now: float,
        hook: Hook = Hook.PREROUTING,
    ) -> Rewrite | None:
        """A client's own packet to a server came past, and no rewrite was found for it.

        `client` may also be this host itself, whose packets are met in POSTROUTING.

        Usually None: it goes on untouched, and its port is left to it from now on.  If the relay
        already uses that port towards the server on the client's behalf, the client's own
        conversation is moved to another port; what is returned is the rewrite for this packet.
        Raises Refusal.
        """
        at = key(client, server)
        holder = self._outside[proto].get(at)
        if holder is None and proto is Proto.UDP:
            holder = self.adopt(answering(at), now)
        if holder is None:
            self.direct.saw(proto, at, now)
            return None
        self._admission.make_room(proto, client, now)
        moved = self._seen_as(proto, client, server)
        flow = self._flow(proto, client, server, server, Source.CLIENT, now)
        self._reserve(flow, moved)
        # The answers are caught where the holder's are caught (T4, U3, U3,4).
        forwarded = holder.footprint is not None and holder.footprint.forwarded
        late = (proto is Proto.UDP or forwarded) and hook is Hook.PREROUTING
        back = Hook.POSTROUTING if late else Hook.PREROUTING
        self._add(flow, (Step.D1, Step.D2), (hook, back), at, moved, now)
        flow.footprint = Footprint(proto, server.port, None, server.addr, False, forwarded)
        self._enter(flow)
        return flow.rewrites[Step.D1]

    def saw_own(self, proto: Proto, own: Endpoint, peer: Endpoint, now: float) -> None:
        """This host has sent a packet of its own from a relayed port; of TCP, a SYN.

        What comes back is no client's from now on, unless it is of a flow that has begun before.
        One of UDP that the server hasn't answered was none: it began with a reply that krelay met
        before what it replied to.
        """
        reply = key(peer, own)
        known = self.tables[_PRE, proto].get(reply)
        flow = known.flow if known is not None else None
        if flow is None and proto is _UDP:
            flow = self.adopt(reply, now)
        if flow is not None:
            if proto is _TCP or flow.client != peer:
                return
            self.observers.before_expiry([flow])
            if flow.state is not State.UNREPLIED:
                return
            self.end(flow)
        self.own_flows.sent(proto, key(own, peer), now)

    def is_own_reply(self, proto: Proto, own: Endpoint, peer: Endpoint, now: float) -> bool:
        """Whether a packet from `peer` to `own` replies to one that this host has sent."""
        return self.own_flows.replied(proto, key(own, peer), now)

    # Finding flows

    def accepted(self, inside: Endpoint, gport: int) -> Flow | None:
        """The flow of a connection as tcp-relay sees it."""
        return self._inside.get((inside, gport))

    def of_relay_port(self, relay: Endpoint) -> Flow | None:
        """The TCP flow whose server leg begins at this port."""
        return self._by_relay.get(relay)

    def is_free(self, proto: Proto, outside: bytes) -> bool:
        """Whether no flow's, and no client's own, packets to the server read so there."""
        return (
            outside not in self._outside[proto]
            and (proto, outside) not in self.direct
            and not (proto is _UDP and self.dns_flows.asked_as(outside) is not None)
        )

    def was_killed(self, proto: Proto, outside: Endpoint, server: Endpoint) -> bool:
        """Whether this is what the server sees of a forwarded flow that was killed."""
        flow = self._outside[proto].get(key(outside, server))
        return flow is not None and flow.abort_asked and flow.is_forwarded

    def unanswered(self) -> list[Flow]:
        """The flows without tcp-relay whose server has never answered."""
        return [
            flow
            for flow in self._relayed()
            if flow.state is State.UNREPLIED
            or (flow.is_forwarded and not flow.tracker.server_answered and not flow.abort_asked)
        ] + [
            self._flow_of(query, dns_flow)
            for query, dns_flow in self.dns_flows
            if not dns_flow.answered
        ]

    def elsewhere(self, server: bytes) -> list[Flow]:
        """The flows that live and lead to any other server."""
        flows = self._relayed()
        return [flow for flow in flows if flow.server.addr != server and flow.closed_at is None] + [
            self._flow_of(query, dns_flow)
            for query, dns_flow in self.dns_flows
            if dns_flow.server != server
        ]

    # What the kernel has learnt by itself

    def learn(self, copies: Iterable[tuple[int, bytes]], now: float) -> None:
        """The kernel has relayed these packets: the hook of each, and its first 28 bytes.

        Queries are copied as they came (PREROUTING), answers as they went on (POSTROUTING).
        """
        coming = iter(copies)
        while True:
            room, displaces = self._admission.unasked(), self._admission.learnt_make_room()
            together = self._beginning(now, room, displaces=displaces)
            copy = self.dns_flows.hear(coming, now, together)
            if copy is None:
                return
            hook, head = copy
            is_query = hook == _PRE
            query = head[12:24] if is_query else answering(head[12:24])
            there = self._of_query(query)
            if there is not None:
                rewrite = there if is_query else there.flow.by(Side.SERVER)
                if rewrite is not None:
                    self.heard(rewrite, 1, head[2] << 8 | head[3], now)
            elif (
                not is_query
                or self.dns_flows.get(query) is not None
                or self._has_made_room(query, now)
            ):
                self.dns_flows.hear(iter((copy,)), now, self._beginning(now, 1))

    def ended(self, copies: Iterable[tuple[int, bytes]]) -> None:
        """The kernel has rewritten these FINs of tcp-relay's, by which it passes an end on.

        Copied as they went on (POSTROUTING).
        """
        facing = self.tables[_PRE, _TCP]
        for _, head in copies:
            back = facing.get(answering(head[12:24]))
            step = _FACING.get(back.step) if back is not None else None
            if back is None or step is None:
                continue
            flow, tracker = back.flow, back.flow.tracker
            before = tracker.state
            tracker.saw(SENDERS[step], FIN | ACK)
            if tracker.state is not before:
                self.changed(flow)

    def begun(self, copies: Iterable[tuple[int, bytes]]) -> None:
        """The kernel has rewritten these SYNs, with which tcp-relay begins its connections to the
        server.  Copied as they went on (POSTROUTING)."""
        facing = self.tables[_PRE, _TCP]
        for _, head in copies:
            back = facing.get(answering(head[12:24]))
            if back is not None and back.step is Step.T4 and back.flow.leg is None:
                back.flow.leg = int.from_bytes(head[24:28])

    def adopt(self, at: bytes, now: float) -> Flow | None:
        """The flow of what was learnt, if a packet with these twelve bytes is a query or an
        answer of it; from then on it is the worker's."""
        if not self.dns_flows.addresses:
            return None
        if at[4:8] in self.dns_flows.addresses:
            self._catch_up(at, now)
            return self._adopt(at)
        query = answering(at)  # but for the address that was asked
        self._catch_up(query, now)
        found = self.dns_flows.asked_as(query)
        dns_flow = self.dns_flows.get(found) if found is not None else None
        if found is None or dns_flow is None or dns_flow.server != at[:4]:
            return None
        return self._adopt(found)

    # Ending flows

    def close(self, flow: Flow, now: float) -> None:
        """Both legs are closed: the flow goes soon, but not before the last packets are through."""
        if flow.closed_at is None and flow.id in self._flows:
            if flow.leg is None and flow.relay is not None and flow.gport is not None:
                self.observers.needs_ends()
                self._leave(flow)
            flow.closed_at = now
            flow.tracker.closed = True
            self._admission.closed(flow)
            self.schedule(flow)
            self.observers.closed(flow, now)

    def orphaned(self, flow: Flow) -> None:
        """Whose tcp-relay is gone, its port towards the server is anybody's: no connection may
        begin from there in this flow's name, unless tcp-relay is back and asks again (`attach`)."""
        flow.orphaned = True
        self._leave(flow)

    def _leave(self, flow: Flow) -> None:
        if flow.leg is None:
            self.observers.displaced(flow)  # one SYN might go past the worker
            flow.leg = NO_LEG
        else:
            flow.leg = PAST_LEG

    def give_up(self, flow: Flow, now: float) -> None:
        """Another than its tcp-relay uses its port towards the server: both its legs are gone."""
        self.observers.displaced(flow)
        self.detach(flow)
        self.close(flow, now)

    def kill(self, flow: Flow, now: float) -> None:
        """Ends a forwarded flow: no packet of it goes on, each end is told instead (worker.py).

        The flow goes soon after both were told, at the latest when its time as `closing` is over.
        """
        if flow.closed_at is None and flow.id in self._flows:
            flow.abort_asked = flow.tracker.reset = True
            flow.reset_at = now
            self.changed(flow)

    def changed(self, flow: Flow) -> None:
        """What is known of a TCP connection has changed, and with it perhaps its state."""
        watched = flow.tracker.is_watched
        for rewrite in flow.rewrites.values():
            rewrite.watched = watched
        if flow.gport is None:
            self._admission.changed(flow)
        self.schedule(flow)
        self.observers.changed(flow)

    def heard(self, rewrite: Rewrite, packets: int, size: int, now: float) -> None:
        """So many packets, and bytes in all, were rewritten elsewhere, the last just now.

        Those of a TCP connection's ends were neither SYN of a client, nor FIN nor RST.
        """
        rewrite.packets += packets
        rewrite.bytes += size
        rewrite.seen_at = max(rewrite.seen_at, now)
        flow = rewrite.flow
        tracker = flow.tracker
        if flow.proto is _UDP:
            self._heard_datagrams(rewrite, now)
            return
        if flow.id not in self._flows or isinstance(tracker, Through):
            return
        before, reset = tracker.state, tracker.reset
        tracker.saw(SIDES[rewrite.step], ACK)
        tracker.reset = reset  # they came before the RST, which wasn't theirs
        if tracker.state is not before:
            self.changed(flow)

    def mark(self, rewrite: Rewrite, tos: int, now: float) -> None:
        """An end of terminated TCP has sent a packet with this DSCP, and not with the former.

        Nobody is told of more than MARKS changes at once, and one each MARK_EVERY: each costs as
        much as a new connection, and may be a forger's.  The next packet then tells again.
        """
        flow = rewrite.flow
        paid = max(flow.marked_at, now - MARKS * MARK_EVERY) + MARK_EVERY
        if paid > now:
            return
        flow.marked_at = paid
        self.observers.before_mark(rewrite)
        rewrite.tos = tos
        self.observers.changed(flow)
        self.observers.marked(flow)

    def shook_hands(self, flow: Flow) -> None:
        """The kernel has the client's connection, which tcp-relay has accepted."""
        before = flow.tracker.state
        flow.tracker.client_acked = True
        if flow.tracker.state is not before:
            self.changed(flow)

    def counted(self, rewrite: Rewrite, now: float) -> None:
        """The worker has rewritten as many packets as this is to be told of (`tell_at`)."""
        rewrite.told()
        flow = rewrite.flow
        if flow.proto is _UDP and not flow.spoke_again:
            self._heard_datagrams(rewrite, now)
        if rewrite.packets >= BUSY:
            self.observers.changed(flow)

    def _heard_datagrams(self, rewrite: Rewrite, now: float) -> None:
        """A flow of UDP is confirmed when its client speaks again after an answer."""
        flow = rewrite.flow
        if flow.spoke_again or flow.service.port == DNS_PORT:
            return
        side = SIDES.get(rewrite.step)
        if side is _SERVER and flow.answered_at is None:
            there = flow.by(Side.CLIENT)
            if there is not None and there.packets >= BUSY:
                self.observers.before_expiry([flow])  # what the kernel has seen of it was before
            flow.answered_at = now
            if there is not None:
                there.tell_at = there.packets + 1
        elif side is _CLIENT_SIDE and flow.answered_at is not None:
            flow.spoke_again = True
            if flow.id in self._flows:
                self._admission.confirmed(flow)

    def schedule(self, flow: Flow) -> None:
        """The flow is looked at when its time is over; call this when its state has changed."""
        self._look_at(flow, flow.expires_at(self._timeouts))

    def _look_at(self, flow: Flow, when: float) -> None:
        # Flows that began together are looked at apart, or each look would be a pause for packets.
        at = self._due.next + HORIZON - flow.id % _SPREAD
        if when < at - 1:
            at = self._due.second(when)
        if flow.due != at:
            flow.due = at
            self._due.put(at, flow.id)

    def end(self, flow: Flow) -> None:
        """Takes the flow out at once.  Harmless if it is out already."""
        if self._flows.pop(flow.id, None) is None:
            self._end_shown(flow)
            return
        self.observers.ended(flow)
        for rewrite in flow.rewrites.values():
            if rewrite.table.get(rewrite.old) is rewrite:
                del rewrite.table[rewrite.old]
        outside = self._outside[flow.proto]
        for at in flow.reserved:
            if outside.get(at) is flow:
                del outside[at]
            if flow.is_any_port and self._asked_by.get(_known_by(at)) is flow:
                del self._asked_by[_known_by(at)]
        if flow.inside and flow.gport and self._inside.get((flow.inside, flow.gport)) is flow:
            del self._inside[flow.inside, flow.gport]
        if flow.relay and flow.gport is None:
            self._relay_ports[flow.proto].give_back(*flow.relay)
        elif flow.relay and self._by_relay.get(flow.relay) is flow:
            del self._by_relay[flow.relay]
        self._admission.ended(flow)
        # A flow and its rewrites point at each other; let go here, so that no collector is needed.
        flow.rewrites.clear()
        if flow.footprint:
            others = self.footprints[flow.footprint] - 1
            if others:
                self.footprints[flow.footprint] = others
            else:
                del self.footprints[flow.footprint]
                self.footprint_changes += 1

    def clear(self) -> list[Flow]:
        """Ends every flow, and returns them."""
        ended = list(self._flows.values())
        for flow in ended:
            self.end(flow)
        self._due.clear()
        self.direct = DirectFlows()
        self.own_flows.clear()
        self.dns_flows.clear()
        self._admission.clear()
        return ended

    def expire(self, now: float) -> list[Flow]:
        """Ends the flows whose time is over, and returns them.  Cheap: looks only at flows due."""
        ended: list[Flow] = []
        late: list[Flow] = []
        for second, ids in self._due.due(now):
            for flow_id in ids:
                flow = self._flows.get(flow_id)
                if flow is None or flow.due != second:
                    continue  # ended, or there is a newer entry
                when = flow.expires_at(self._timeouts)
                if when <= now:
                    late.append(flow)
                else:
                    self._look_again(flow, when)
        if late:
            self.observers.before_expiry(late)
        for flow in late:
            when = flow.expires_at(self._timeouts)
            if when <= now:
                self.end(flow)
                ended.append(flow)
            else:
                self._look_again(flow, when)
        self.dns_flows.expire(now, self._timeouts.udp_dns)
        self._admission.forget(now)
        self._admission.trim(now)
        self.direct.expire(Proto.TCP, now - self._timeouts.tcp_established)
        self.direct.expire(Proto.UDP, now - self._timeouts.udp)
        self.own_flows.expire(now, self._timeouts)
        return ended

    # Inside

    def _beginning(self, now: float, room: int, *, displaces: bool = False) -> Beginning:
        until = now + self._timeouts.udp_dns
        per_client = self.limits.flows_per_client
        return Beginning(until, room, per_client, displaces)

    def _has_made_room(self, query: bytes, now: float) -> bool:
        """Whether there is room for this flow, and be it that of another."""
        try:
            self._admission.make_room(Proto.UDP, Endpoint(query[:4], 0), now, is_learnt=True)
        except Refusal:
            return False
        return True

    def _of_query(self, query: bytes) -> Rewrite | None:
        return self.tables[Hook.PREROUTING, Proto.UDP].get(query)

    def _catch_up(self, at: bytes, now: float) -> None:
        """Asks the kernel where the first of these two ends may have been learnt, but isn't known.

        Copies take some milliseconds; who must decide meanwhile asks.
        """
        if int.from_bytes(at[10:]) != DNS_PORT or self.dns_flows.asked_as(at) is not None:
            return
        asked = self.observers.learnt_address(at[:4], at[8:10])
        if asked is not None:
            query = at[:4] + asked + at[8:]
            if self._of_query(query) is None and self._has_made_room(query, now):
                self.dns_flows.begin(query, now, self._beginning(now, 1))  # its copy counts later

    def _flow_of(self, query: bytes, dns_flow: DnsFlow, *, enter: bool = False) -> Flow:
        """The flow that tells of a learnt flow; only if it enters the table are its packets its."""
        sport, dport = int.from_bytes(query[8:10]), int.from_bytes(query[10:])
        client, service = Endpoint(query[:4], sport), Endpoint(query[4:8], dport)
        server = Endpoint(dns_flow.server, dport)
        flow = Flow(
            dns_flow.id, Proto.UDP, client, service, server, Source.CLIENT, dns_flow.began_at
        )
        outside = key(client, server)
        tables = self.tables if enter else _nowhere()
        self._add(flow, _U12U34, _PRE_POST, query, outside, dns_flow.began_at, tables)
        there, back = flow.rewrites[Step.U12], flow.rewrites[Step.U34]
        there.packets, there.bytes = dns_flow.asked, dns_flow.asked_bytes
        back.packets, back.bytes = dns_flow.answered, dns_flow.answered_bytes
        there.seen_at = dns_flow.heard_at
        if enter:
            self._reserve(flow, outside)
            flow.footprint = Footprint(Proto.UDP, dport, None, dns_flow.server, False, False)
            self._enter(flow)
            self.observers.changed(flow)
        else:  # no circles, which nobody would cut
            there.flow = back.flow = _SHOWN
            there.table = back.table = {}
        return flow

    def _adopt(self, query: bytes) -> Flow | None:
        dns_flow = self.dns_flows.remove(query)
        return None if dns_flow is None else self._flow_of(query, dns_flow, enter=True)

    def _end_shown(self, flow: Flow) -> None:
        """Takes out what was learnt, of which this flow was made to be shown."""
        query = key(flow.client, flow.service)
        dns_flow = self.dns_flows.get(query)
        if dns_flow is not None and dns_flow.id == flow.id:
            self.dns_flows.remove(query)

    def _look_again(self, flow: Flow, when: float) -> None:
        self._look_at(flow, when)
        if flow.is_confirmed:
            self._admission.confirmed(flow)

    def _may_be_late(self, flow: Flow) -> bool:
        """Hears what the kernel has counted for a flow, if it may have any of it."""
        if flow.proto is _UDP and all(each.packets < BUSY for each in flow.rewrites.values()):
            return False
        self.observers.before_expiry([flow])
        return True

    def _relayed(self) -> Iterator[Flow]:
        """The worker's flows, but those of clients' own conversations."""
        return (flow for flow in self._flows.values() if flow.service != flow.server)

    def _flow(
        self,
        proto: Proto,
        client: Endpoint,
        service: Endpoint,
        server: Endpoint,
        source: Source,
        now: float,
        *,
        through: bool = True,
    ) -> Flow:
        flow = Flow(next(self._ids), proto, client, service, server, source, now)
        if through and proto is _TCP:
            flow.tracker = Through()
        return flow

    def _enter(self, flow: Flow) -> Flow:
        self._flows[flow.id] = flow
        self._admission.began(flow)
        self.schedule(flow)
        if flow.footprint:
            others = self.footprints.get(flow.footprint, 0)
            self.footprints[flow.footprint] = others + 1
            self.footprint_changes += not others
            if not others:
                self.observers.needs_rules()
        return flow

    def _add(
        self,
        flow: Flow,
        steps: tuple[Step, Step],
        hooks: tuple[Hook, Hook],
        old: bytes,
        new: bytes,
        now: float,
        tables: dict[tuple[Hook, Proto], Table] | None = None,
    ) -> None:
        """Packets with the twelve bytes `old` leave with `new`: the first step, at the first hook.

        What answers these is changed back: the second step, at the second hook.
        """
        tables, proto, rewrites = tables or self.tables, flow.proto, flow.rewrites
        ip_delta, l4_delta = forth = deltas(old, new)
        table, step = tables[hooks[0], proto], steps[0]
        if old in table:
            self.observers.displaced(table[old].flow)
        table[old] = rewrites[step] = Rewrite(flow, step, table, old, new, forth, now)

        old, new = answering(new), answering(old)
        back = -ip_delta % ONES, -l4_delta % ONES
        table, step = tables[hooks[1], proto], steps[1]
        if old in table:
            self.observers.displaced(table[old].flow)
        table[old] = rewrites[step] = answers = Rewrite(flow, step, table, old, new, back, now)
        if proto is _UDP and flow.service.port != DNS_PORT:
            answers.tell_at = 1  # the first answer matters (_heard_datagrams)

    def _lead(self, flow: Flow, outside: bytes, now: float) -> None:
        """Packets of this flow's client leave with the twelve bytes `outside`: U1 to U4."""
        asked = key(flow.client, flow.service)
        if flow.relay is None:
            self._reserve(flow, outside)
            self._add(flow, _U12U34, _PRE_POST, asked, outside, now)
            return
        between = key(Endpoint(flow.client.addr, flow.relay.port), flow.server)
        self._reserve(flow, between)
        if outside != between:
            self._reserve(flow, outside)
        self._add(flow, _U1U4, _PRE_POST, asked, between, now)
        self._add(flow, _U2U3, _POST_PRE, between, outside, now)

    def _reserve(self, flow: Flow, outside: bytes) -> None:
        self._outside[flow.proto][outside] = flow
        flow.reserved += (outside,)

    def detach(self, flow: Flow) -> None:
        """tcp-relay won't use its port towards the server, if it has one."""
        if flow.relay is None:
            return
        self.observers.ended(flow)
        if self._by_relay.get(flow.relay) is flow:
            del self._by_relay[flow.relay]
        for step in (Step.T3, Step.T4):
            rewrite = flow.rewrites.pop(step)
            if rewrite.table.get(rewrite.old) is rewrite:
                del rewrite.table[rewrite.old]
        for at in flow.reserved:
            if self._outside[flow.proto].get(at) is flow:
                del self._outside[flow.proto][at]
        flow.reserved = ()
        flow.relay = None

    def _seen_as(self, proto: Proto, client: Endpoint, server: Endpoint) -> bytes:
        """What packets to the server are to read there, if it sees the client's address.

        Raises Refusal.
        """
        at = key(client, server)
        if not self.is_free(proto, at):
            port = self._other_port(
                client.port,
                lambda p: self.is_free(proto, key(Endpoint(client.addr, p), server)),
            )
            at = key(Endpoint(client.addr, port), server)
        return at

    def _seen_low(self, flow: Flow, outside: Endpoint, services: Collection[int]) -> Endpoint:
        """As whom the server sees a client below 1024: from its own port where that is free.

        As `outside`, from above, where no port below is free.
        """
        of_relay = flow.source is Source.RELAY

        def is_free(port: int) -> bool:
            at = key(outside._replace(port=port), flow.server)
            mine = self._outside[_TCP].get(at) is flow and (_TCP, at) not in self.direct
            if of_relay and (port in self.reserved or port in services):
                return False
            return mine or self.is_free(_TCP, at)

        port = flow.client.port
        if not is_free(port):
            try:
                port = self._other_port(port, is_free)
            except Refusal:
                return outside
        return outside._replace(port=port)

    def _inside_is_free(self, inside: Endpoint, gport: int, service: Endpoint) -> bool:
        """Whether tcp-relay's host takes a new connection from there for a new one.

        While it remembers a closed one between the same ports (TIME_WAIT), it does if the client's
        numbers go on where they ended, which is so only towards the same service (RFC 6528).
        """
        flow = self._inside.get((inside, gport))
        return flow is None or (flow.closed_at is not None and flow.service == service)

    def _other_port(self, wanted: int, is_free: Callable[[int], bool]) -> int:
        """Another than the wanted port, of its class (below 1024 or not), if possible its parity.

        RFC 4787, REQ-3a and REQ-4.  Raises Refusal (`no_port`).
        """
        low, high = (1, FIRST_HIGH - 1) if wanted < FIRST_HIGH else (FIRST_HIGH, 0xFFFF)
        start, ports = self._rng.randint(low, high), high - low + 1
        for parity in (wanted % 2, 1 - wanted % 2):
            for step in range(min(ports, 2 * TRIES)):
                port = low + (start + step - low) % ports
                if port % 2 == parity and is_free(port):
                    return port
        raise Refusal("no_port")


_TCP, _UDP, _CLIENT = Proto.TCP, Proto.UDP, Source.CLIENT
_CLIENT_SIDE, _SERVER = Side.CLIENT, Side.SERVER
_PRE = Hook.PREROUTING
_PRE_POST = Hook.PREROUTING, Hook.POSTROUTING
_POST_PRE = Hook.POSTROUTING, Hook.PREROUTING
_FACING = {Step.T1: Step.T2, Step.T4: Step.T3}
"""The other direction of a leg."""
_T1T2, _T3T4 = (Step.T1, Step.T2), (Step.T3, Step.T4)
_U12U34, _U1U4, _U2U3 = (Step.U12, Step.U34), (Step.U1, Step.U4), (Step.U2, Step.U3)
# By these names: looking one up in its class takes ten times as long.


_SHOWN = Flow(
    0,
    Proto.UDP,
    Endpoint(bytes(4), 0),
    Endpoint(bytes(4), 0),
    Endpoint(bytes(4), 0),
    Source.CLIENT,
    0.0,
)
"""Whose the rewrites are that were made to be shown."""


def _known_by(outside: bytes) -> bytes:
    """Of what a server is sent: its address, and the address and port that it knows."""
    return outside[4:8] + outside[:4] + outside[8:10]


def _nowhere() -> dict[tuple[Hook, Proto], Table]:
    """Tables in which nobody looks anything up."""
    return {(hook, Proto.UDP): {} for hook in Hook}
