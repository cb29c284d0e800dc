"""The flows that live, and the look-up tables that the packet path finds their rewrites in.

What the packet path needs of a flow are its Rewrites: one for each direction at each netfilter
hook, found by the flow key that a packet carries there, and holding the key it leaves with and by
how much its checksums change.  Look-ups never scan, so the cost of a packet doesn't depend on how
many flows live.

Here flows enter and leave; which flow a packet begins is decided in table.py.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

from knet.endpoint import Endpoint, Proto, Source, flow_key, reverse_key
from knet.wire.checksum import ONES
from krelay.nat.admission import Admission, FlowLimits
from krelay.nat.direct import DirectFlows
from krelay.nat.dnsflows import DnsFlows
from krelay.nat.events import NatObserver, Observers
from krelay.nat.expiry import ExpiryQueue
from krelay.nat.flow import (
    BUSY,
    DNS_PORT,
    Flow,
    Footprint,
    Rewrite,
    Table,
    Timeouts,
    deltas,
)
from krelay.nat.mappings import Mappings
from krelay.nat.tcpstate import Through
from krelay.steps import Hook, Step

Tables = dict[tuple[Hook, Proto], Table]


class FlowStore:
    """The flows whose packets the worker rewrites, beside those that the kernel has learnt.

    `tables[hook, proto]` maps the flow key of a packet to its Rewrite.  They are dictionaries for
    the worker to read; only this class writes them.
    """

    def __init__(
        self,
        limits: FlowLimits | None,
        timeouts: Timeouts | None,
        rng: Random,
        observers: Iterable[NatObserver],
        on_busy: Callable[[bytes], object],
    ) -> None:
        """`on_busy` is called with the query of a DNS flow that goes on being used."""
        self.tables: Tables = {(hook, proto): {} for hook in Hook for proto in Proto}
        self.direct = DirectFlows()
        self.footprints: Counter[Footprint] = Counter()
        """What the live flows need of the rules."""
        self.footprint_changes = 0
        """How often one has come or gone."""
        self.observers = Observers(observers)
        """Told of what becomes of flows; those that need the table first are added later."""
        self.ids = itertools.count(1)
        self.flows: dict[int, Flow] = {}
        """By number.  Only this class writes it."""
        per_client = Counter[bytes]()
        asked = self.tables[Hook.PREROUTING, Proto.UDP]
        self.dns_flows = DnsFlows(
            self.ids, asked, per_client, BUSY, on_busy, self.observers.query_gone
        )
        """Those that the kernel relays by itself; the worker has no part in them."""
        self.admission = Admission(
            limits or FlowLimits(),
            self.flows,
            per_client,
            self.dns_flows,
            self.end,
            self._hears_of,
        )
        self.expiry = ExpiryQueue(self.flows, timeouts or Timeouts(), self.admission.confirmed)
        self.mappings = Mappings(self.direct, self.dns_flows, rng)

    def __len__(self) -> int:
        return len(self.flows) + len(self.dns_flows)

    @property
    def workers(self) -> list[Flow]:
        """The flows whose packets the worker knows: without those that the kernel has learnt."""
        return list(self.flows.values())

    def of_id(self, flow_id: int) -> Flow | None:
        """The flow with this number, if it is one whose packets the worker knows."""
        return self.flows.get(flow_id)

    @property
    def limits(self) -> FlowLimits:
        """In force for new flows.  Where they are lowered, what is beyond is evicted little by
        little (`expire`), but for what is confirmed."""
        return self.admission.limits

    @limits.setter
    def limits(self, limits: FlowLimits) -> None:
        self.admission.limits = limits

    @property
    def timeouts(self) -> Timeouts:
        """In force for all flows, also those that live."""
        return self.expiry.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self.expiry.timeouts = timeouts

    # How flows are made

    def new(
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
        """A flow that isn't in the table yet; `through`: its TCP isn't terminated here."""
        flow = Flow(next(self.ids), proto, client, service, server, source, now)
        if through and proto is _TCP:
            flow.tracker = Through()
        return flow

    def enter(self, flow: Flow) -> Flow:
        """The flow lives from now on."""
        self.flows[flow.id] = flow
        if flow.service.port == DNS_PORT and flow.proto is _UDP:
            self.observers.holds_queries(flow)
        self.admission.began(flow)
        self.expiry.schedule(flow)
        if flow.footprint:
            others = self.footprints.get(flow.footprint, 0)
            self.footprints[flow.footprint] = others + 1
            self.footprint_changes += not others
            if not others:
                self.observers.needs_rules()
        return flow

    def add(
        self,
        flow: Flow,
        steps: tuple[Step, Step],
        hooks: tuple[Hook, Hook],
        old: bytes,
        new: bytes,
        now: float,
        tables: Tables | None = None,
    ) -> None:
        """Packets with the flow key `old` leave with `new`: the first step, at the first hook.

        What answers these is changed back: the second step, at the second hook.
        """
        tables, proto, rewrites = tables or self.tables, flow.proto, flow.rewrites
        ip_delta, l4_delta = forth = deltas(old, new)
        table, step = tables[hooks[0], proto], steps[0]
        if old in table:
            self.observers.displaced(table[old].flow)
        table[old] = rewrites[step] = Rewrite(flow, step, table, old, new, forth, now)

        old, new = reverse_key(new), reverse_key(old)
        back = -ip_delta % ONES, -l4_delta % ONES
        table, step = tables[hooks[1], proto], steps[1]
        if old in table:
            self.observers.displaced(table[old].flow)
        table[old] = rewrites[step] = answers = Rewrite(flow, step, table, old, new, back, now)
        if proto is _UDP and flow.service.port != DNS_PORT:
            answers.tell_at = 1  # the first answer matters (FlowTracking)

    def lead(self, flow: Flow, outside: bytes, now: float) -> None:
        """Packets of this flow's client leave with the flow key `outside`: U1 to U4."""
        asked = flow_key(flow.client, flow.service)
        if flow.relay is None:
            self.mappings.reserve(flow, outside)
            self.add(flow, _U12U34, _PRE_POST, asked, outside, now)
            return
        between = flow_key(Endpoint(flow.client.addr, flow.relay.port), flow.server)
        self.mappings.reserve(flow, between)
        if outside != between:
            self.mappings.reserve(flow, outside)
        self.add(flow, _U1U4, _PRE_POST, asked, between, now)
        self.add(flow, _U2U3, _POST_PRE, between, outside, now)

    # How flows end

    def end(self, flow: Flow) -> None:
        """Takes the flow out at once.  Harmless if it is out already."""
        if self.flows.pop(flow.id, None) is None:
            self.dns_flows.remove(flow_key(flow.client, flow.service), flow.id)
            return
        self.observers.ended(flow)
        for rewrite in flow.rewrites.values():
            table, old = rewrite.table, rewrite.old
            if table.get(old) is rewrite:
                del table[old]
        self.mappings.give_back(flow)
        self.admission.ended(flow)
        # A flow and its rewrites point at each other; let go here, so that no collector is needed.
        flow.rewrites.clear()
        footprint, footprints = flow.footprint, self.footprints
        if footprint is not None:
            others = footprints[footprint] - 1
            if others:
                footprints[footprint] = others
            else:
                del footprints[footprint]
                self.footprint_changes += 1

    def detach(self, flow: Flow) -> None:
        """tcp-relay won't use its port towards the server, if it has one."""
        if flow.relay is None:
            return
        self.observers.ended(flow)
        self.mappings.give_relay_back(flow)
        for step in (Step.T3, Step.T4):
            rewrite = flow.rewrites.pop(step)
            if step is Step.T4 and rewrite.packets:
                flow.heard_at = max(flow.heard_at, rewrite.seen_at)
            if rewrite.table.get(rewrite.old) is rewrite:
                del rewrite.table[rewrite.old]
        self.mappings.give_outside_back(flow)
        flow.reserved = ()
        flow.relay = None

    def expire_flows(self, now: float) -> list[Flow]:
        """Ends the flows whose time is over, and returns them."""
        late = self.expiry.due(now)
        if late:
            self.observers.before_expiry(late)
        ended = [flow for flow in late if not self.expiry.goes_on(flow, now)]
        for flow in ended:
            self.end(flow)
        return ended

    def _hears_of(self, flow: Flow) -> bool:
        """Hears what the kernel has counted for a flow, if it may have any of it."""
        if flow.proto is _UDP and all(each.packets < BUSY for each in flow.rewrites.values()):
            return False
        self.observers.before_expiry([flow])
        return True


_TCP, _UDP = Proto.TCP, Proto.UDP
_PRE_POST = Hook.PREROUTING, Hook.POSTROUTING
_POST_PRE = Hook.POSTROUTING, Hook.PREROUTING
_U12U34, _U1U4, _U2U3 = (Step.U12, Step.U34), (Step.U1, Step.U4), (Step.U2, Step.U3)
# By these names: looking one up in its class takes ten times as long.
