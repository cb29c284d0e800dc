"""The NAT table: which packet becomes which, for how long, and on whose account.

A flow is one relayed conversation: an entry of this table, in both directions.  The steps that its
packets take are those of krelay/steps.py.  What lives is held in store.py; here it is decided which
flow a packet or tcp-relay begins, and how flows close.

A server may answer from another port than it was asked at, as TFTP's does (RFC 1350, section 4),
where the service allows it (`+any-port`).  Such an answer begins a flow of its own, S:p > C:x =>
K:p > C:x, beside that of the query, with the port that the server knows the client by.

Times are seconds that the caller passes in; nothing here reads a clock.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from random import Random

from knet.endpoint import Endpoint, FlowKey, Proto, Source, flow_key, reverse_key
from krelay.nat.admission import FlowLimits, Refusal
from krelay.nat.events import NatObserver
from krelay.nat.flow import NO_LEG, PAST_LEG, Flow, Footprint, Rewrite, Timeouts
from krelay.nat.learning import DnsLearning
from krelay.nat.mappings import PortTaken
from krelay.nat.ownflows import OwnFlows
from krelay.nat.ports import FIRST_HIGH
from krelay.nat.store import FlowStore
from krelay.nat.tcpstate import State
from krelay.nat.tracking import FlowTracking
from krelay.steps import Hook, Step

_ASKED_AT = 64
"""Ports at which a server is looked for that has answered from another."""
PORTS_FREED = 8
"""Flows evicted, at most, until one of the relay's own ports is free for a new one."""


class NatTable(FlowStore):
    """All flows: how they begin and how they close.

    `tracking` keeps what is known of them up to date, `learning` adds those that the kernel has
    learnt, `mappings` tells which end is whose.
    """

    def __init__(
        self,
        limits: FlowLimits | None = None,
        timeouts: Timeouts | None = None,
        *,
        rng: Random,
        observers: Iterable[NatObserver] = (),
    ) -> None:
        super().__init__(
            limits, timeouts, rng, observers, lambda query: self.learning.adopt_query(query)
        )
        self.own_flows = OwnFlows()
        self.tracking = FlowTracking(self)
        self.learning = DnsLearning(self, self.tracking)

    def __iter__(self) -> Iterator[Flow]:
        yield from self.workers
        for query, dns_flow in self.learning:
            yield self.learning.flow_of(query, dns_flow)

    def count(self, proto: Proto) -> int:
        """Flows of this protocol."""
        learnt = len(self.dns_flows) if proto is Proto.UDP else 0
        return learnt + sum(1 for flow in self.flows.values() if flow.proto is proto)

    def get(self, flow_id: int) -> Flow | None:
        """The flow with this number."""
        flow = self.flows.get(flow_id)
        if flow is None:
            learnt = (
                self.learning.flow_of(*each) for each in self.learning if each[1].id == flow_id
            )
            flow = next(learnt, None)
        return flow

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
        self.admission.make_room(_TCP, client, now, is_relayed=True, is_new=inside is None)
        if inside is None:
            inside = self.mappings.inside_for(client, gport, service)
        flow = self.new(_TCP, client, service, server, source, now, through=False)
        flow.footprint = Footprint(_TCP, service.port, gport, server.addr, False)
        self.mappings.take_inside(flow, inside, gport)
        to_gateway = flow_key(inside, Endpoint(service.addr, gport))
        self.add(flow, _T1T2, _PRE_POST, flow_key(client, service), to_gateway, now)
        self.enter(flow)
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
        Raises PortTaken when another flow has the port on this side, or the server may know it
        already: the client's own connection, another flow's, or the client's port itself.
        """
        source = flow.client.addr if flow.source is _CLIENT else relay.addr
        outside = Endpoint(source, relay.port if seen is None else seen)
        if seen is None and flow.client.port < FIRST_HIGH <= relay.port:
            outside = self.mappings.low_outside_for(flow, outside, services)
        is_low = outside.port != relay.port
        key = flow_key(outside, flow.server)
        holder = self.mappings.holder(_TCP, key)
        if holder is not None and holder.closed_at is not None:
            self.end(holder)  # its port was free to be bound again, so both its legs are gone
            holder = None
        taken = holder is not None and holder is not flow
        beside = self.mappings.of_relay_port(relay)
        if beside is not None and beside is not flow and beside.closed_at is None:
            taken = True
        if taken or (_TCP, key) in self.direct or (outside == flow.client and not is_low):
            raise PortTaken
        self.detach(flow)
        self.admission.confirmed(flow)
        flow.leg = None
        self.mappings.take_relay(flow, relay)
        self.mappings.reserve(flow, key)
        self.add(flow, _T3T4, _POST_PRE, flow_key(relay, flow.server), key, now)
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
        if proto is _UDP and self.dns_flows.addresses:
            known = self.learning.adopt(flow_key(client, service), now)
            if known is not None:
                return known
        self.admission.make_room(proto, client, now)
        flow = self.new(proto, client, service, server, source, now)
        if source is _CLIENT:
            outside = self.mappings.outside_for(proto, client, server)
            self.lead(flow, outside, now)
        else:
            hidden, take = relay_addr or service.addr, self.mappings.take_relay_port
            port, tries = take(proto, client, hidden, server, services), PORTS_FREED
            while port is None:
                tries -= 1
                if tries < 0 or not self.admission.evict_one(proto, now):
                    raise Refusal("no_port")
                port = take(proto, client, hidden, server, services)
            flow.relay = Endpoint(hidden, port)
            outside = flow_key(flow.relay, server)
            self.lead(flow, outside, now)
        flow.footprint = Footprint(
            proto, service.port, None, server.addr, any_client, proto is _TCP, any_port
        )
        if any_port:
            self.mappings.asks_any_port(flow, outside)
        return self.enter(flow)

    def answered_elsewhere(self, server: Endpoint, client: Endpoint, now: float) -> Flow | None:
        """The flow of a datagram from `server`, which was asked at another port, to `client` as it
        knows it: made anew, if the service that was asked allows it (`any_port`).

        Raises Refusal (as `open_forwarded`).
        """
        asked = self.mappings.asked_by(server.addr, client)
        if asked is None or server.port == 0:
            return None
        service, outside = Endpoint(asked.service.addr, server.port), flow_key(client, server)
        if not self.mappings.is_free(_UDP, outside) or self.learning.of_query(
            flow_key(asked.client, service)
        ):
            return None  # another flow's, or the client's own
        self.admission.make_room(_UDP, asked.client, now)
        if asked.id not in self.flows:
            return None  # it was the one to go
        flow = self.new(_UDP, asked.client, service, server, asked.source, now)
        if asked.relay is not None:
            self.mappings.share_relay(flow, asked.relay)
        self.lead(flow, outside, now)
        flow.footprint = asked.footprint
        return self.enter(flow)

    def asked_elsewhere(self, server: Endpoint, client: Endpoint) -> Endpoint | None:
        """What a client has asked of this server, at another port and without an answer from there.

        `client` is as the server knows it.
        """
        ports = {each.port for each in self.footprints if each.proto is _UDP and not each.any_port}
        for port in islice(ports, _ASKED_AT):
            back = flow_key(server._replace(port=port), client)
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
        key = flow_key(client, server)
        holder = self.mappings.holder(proto, key)
        if holder is None and proto is Proto.UDP:
            holder = self.learning.adopt(reverse_key(key), now)
        if holder is None:
            self.direct.saw(proto, key, now)
            self.observers.began_own(proto, client)
            return None
        self.admission.make_room(proto, client, now)
        moved = self.mappings.outside_for(proto, client, server)
        flow = self.new(proto, client, server, server, Source.CLIENT, now)
        self.mappings.reserve(flow, moved)
        # The answers are caught where the holder's are caught (T4, U3, U3,4).
        forwarded = holder.footprint is not None and holder.footprint.forwarded
        late = (proto is Proto.UDP or forwarded) and hook is Hook.PREROUTING
        back = Hook.POSTROUTING if late else Hook.PREROUTING
        self.add(flow, (Step.D1, Step.D2), (hook, back), key, moved, now)
        flow.footprint = Footprint(proto, server.port, None, server.addr, False, forwarded)
        self.enter(flow)
        return flow.rewrites[Step.D1]

    def saw_own(self, proto: Proto, own: Endpoint, peer: Endpoint, now: float) -> None:
        """This host has sent a packet of its own from a relayed port; of TCP, a SYN.

        What comes back is no client's from now on, unless it is of a flow that has begun before.
        One of UDP that the server hasn't answered was none: it began with a reply that krelay met
        before what it replied to.
        """
        reply = flow_key(peer, own)
        known = self.tables[_PRE, proto].get(reply)
        flow = known.flow if known is not None else None
        if flow is None and proto is _UDP:
            flow = self.learning.adopt(reply, now)
        if flow is not None:
            if proto is _TCP or flow.client != peer:
                return
            self.observers.before_expiry([flow])
            if flow.state is not State.UNREPLIED:
                return
            self.end(flow)
        self.own_flows.sent(proto, flow_key(own, peer), now)
        self.observers.began_own(proto, peer)

    # Which flows

    def conversations(self) -> Iterator[Endpoint]:
        """The other ends of this host's own conversations by UDP, and clients' ends of theirs with
        a server."""
        for own in self.own_flows.of(_UDP):
            yield FlowKey.unpack(own).dst
        for direct in self.direct.of(_UDP):
            yield FlowKey.unpack(direct).src

    def unanswered(self) -> list[Flow]:
        """The flows without tcp-relay whose server has never answered."""
        self.observers.needs_queries()
        return [
            flow
            for flow in self._relayed()
            if flow.state is State.UNREPLIED
            or (flow.is_forwarded and not flow.tracker.server_answered and not flow.abort_asked)
        ] + [
            self.learning.flow_of(query, dns_flow)
            for query, dns_flow in self.learning
            if not dns_flow.answered
        ]

    def elsewhere(self, server: bytes) -> list[Flow]:
        """The flows that live and lead to any other server."""
        self.observers.needs_queries()
        flows = self._relayed()
        return [flow for flow in flows if flow.server.addr != server and flow.closed_at is None] + [
            self.learning.flow_of(query, dns_flow)
            for query, dns_flow in self.learning
            if dns_flow.server != server
        ]

    # Ending flows

    def close(self, flow: Flow, now: float) -> None:
        """Both legs are closed: the flow goes soon, but not before the last packets are through."""
        if flow.closed_at is None and flow.id in self.flows:
            if flow.leg is None and flow.relay is not None and flow.gport is not None:
                self.observers.needs_ends()
                self._leave(flow)
            flow.closed_at = now
            flow.tracker.closed = True
            self.admission.closed(flow)
            self.expiry.schedule(flow)
            self.observers.closed(flow, now)

    def orphaned(self, flow: Flow) -> None:
        """Whose tcp-relay is gone, its port towards the server is free for any program: no
        connection may begin from there in this flow's name, unless tcp-relay is back and asks again
        (`attach`)."""
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
        if flow.closed_at is None and flow.id in self.flows:
            flow.abort_asked = flow.tracker.reset = True
            flow.reset_at = now
            self.tracking.changed(flow)

    def clear(self) -> list[Flow]:
        """Ends every flow, and returns them."""
        ended = self.workers
        for flow in ended:
            self.end(flow)
        self.expiry.clear()
        self.direct.clear()
        self.own_flows.clear()
        self.dns_flows.clear()
        self.admission.clear()
        return ended

    def expire(self, now: float) -> list[Flow]:
        """Ends the flows whose time is over, and returns them.  Cheap: looks only at flows due."""
        ended = self.expire_flows(now)
        self.learning.expire(now)
        self.admission.forget(now)
        self.admission.trim(now)
        self.direct.expire(now, self.timeouts)
        self.own_flows.expire(now, self.timeouts)
        return ended

    def _relayed(self) -> Iterator[Flow]:
        """The worker's flows, but those of clients' own conversations."""
        return (flow for flow in self.flows.values() if flow.service != flow.server)


_TCP, _UDP, _CLIENT = Proto.TCP, Proto.UDP, Source.CLIENT
_PRE = Hook.PREROUTING
_PRE_POST = Hook.PREROUTING, Hook.POSTROUTING
_POST_PRE = Hook.POSTROUTING, Hook.PREROUTING
_T1T2, _T3T4 = (Step.T1, Step.T2), (Step.T3, Step.T4)
# By these names: looking one up in its class takes ten times as long.
