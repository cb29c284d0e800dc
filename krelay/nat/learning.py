"""DNS flows, which the kernel has learnt by itself, as the table sees them.

Its programs tell of them (dnsflows.py holds what they say).  A whole flow is made of one when it is
to be shown, and when a packet comes that the worker must decide about: then it is adopted.
"""

from collections.abc import Iterable, Iterator

from knet.endpoint import (
    Endpoint,
    FlowKey,
    Proto,
    Source,
    flow_key,
    key_dst,
    key_src,
    reverse_key,
)
from krelay.nat.admission import Refusal
from krelay.nat.dnsflows import Beginning, DnsFlow, Exchange
from krelay.nat.flow import DNS_PORT, Flow, Footprint, Rewrite
from krelay.nat.store import FlowStore, Tables
from krelay.nat.tracking import FlowTracking
from krelay.steps import Hook, Side, Step


class DnsLearning:
    """What becomes of DNS flows."""

    def __init__(self, store: FlowStore, tracking: FlowTracking) -> None:
        self._store = store
        self._tracking = tracking
        self._dns_flows = store.dns_flows

    def __iter__(self) -> Iterator[tuple[bytes, DnsFlow]]:
        return iter(self._dns_flows)

    def learn(self, exchanges: Iterable[Exchange], now: float) -> None:
        """The kernel has relayed these packets."""
        coming, admission = iter(exchanges), self._store.admission
        while True:
            room, displaces = admission.unasked(), admission.learnt_make_room()
            together = self._beginning(now, room, displaces=displaces)
            exchange = self._dns_flows.hear(coming, now, together)
            if exchange is None:
                return
            is_answer, size, query = exchange
            there = self.of_query(query)
            if there is not None:
                rewrite = there.flow.by(Side.SERVER) if is_answer else there
                if rewrite is not None:
                    self._tracking.heard(rewrite, 1, size, now)
            elif not is_answer and self._has_made_room(query, now):
                self._dns_flows.hear(iter((exchange,)), now, self._beginning(now, 1))
                continue
            if not is_answer:
                self._store.observers.query_gone(query)

    def of_query(self, query: bytes) -> Rewrite | None:
        """The rewrite of a client's datagrams with this flow key."""
        return self._store.tables[Hook.PREROUTING, Proto.UDP].get(query)

    def adopt(self, key: bytes, now: float) -> Flow | None:
        """The flow of what was learnt, if a packet with this flow key is a query or an answer of
        it; from then on it is the worker's, and it may be so already by what is heard here."""
        if not self._dns_flows.addresses:
            return None
        if key_dst(key) in self._dns_flows.addresses:
            if self.catch_up(key) and (there := self.of_query(key)) is not None:
                return there.flow
            return self.adopt_query(key)
        query = reverse_key(key)  # but for the address that was asked
        if self.catch_up(query):
            back = self._store.tables[Hook.POSTROUTING, Proto.UDP].get(key)
            if back is not None:
                return back.flow
        found = self._dns_flows.asked_as(query)
        dns_flow = self._dns_flows.get(found) if found is not None else None
        if found is None or dns_flow is None or dns_flow.server != key_src(key):
            return None
        return self.adopt_query(found)

    def adopt_query(self, query: bytes) -> Flow | None:
        """The flow of what was learnt of this query; from then on it is the worker's."""
        dns_flow = self._dns_flows.remove(query)
        return None if dns_flow is None else self.flow_of(query, dns_flow, enter=True)

    def catch_up(self, key: bytes) -> bool:
        """Hears what is to be known where the first of these two ends may have been learnt; whether
        it did.

        What the kernel tells is read some milliseconds later; what must be decided meanwhile is
        asked for.
        """
        if key[_DPORT] != _DNS or self._dns_flows.asked_as(key) is not None:
            return False
        self._store.observers.needs_queries()
        return True

    def flow_of(self, query: bytes, dns_flow: DnsFlow, *, enter: bool = False) -> Flow:
        """The flow that tells of a learnt flow; only if it enters the table are its packets its."""
        client, service = FlowKey.unpack(query)
        server = Endpoint(dns_flow.server, service.port)
        flow = Flow(
            dns_flow.id, Proto.UDP, client, service, server, Source.CLIENT, dns_flow.began_at
        )
        store, outside = self._store, flow_key(client, server)
        tables = store.tables if enter else _nowhere()
        store.add(flow, _U12U34, _PRE_POST, query, outside, dns_flow.began_at, tables)
        there, back = flow.rewrites[Step.U12], flow.rewrites[Step.U34]
        there.packets, there.bytes = dns_flow.asked, dns_flow.asked_bytes
        back.packets, back.bytes = dns_flow.answered, dns_flow.answered_bytes
        there.seen_at = dns_flow.heard_at
        if enter:
            store.mappings.reserve(flow, outside)
            flow.footprint = Footprint(Proto.UDP, service.port, None, dns_flow.server, False, False)
            store.enter(flow)
            store.observers.changed(flow)
        else:  # no circles, which the collector would have to cut
            there.flow = back.flow = _SHOWN
            there.table = back.table = {}
        return flow

    def expire(self, now: float) -> None:
        """Takes out those that were silent for too long."""
        self._dns_flows.expire(now, self._store.timeouts.udp_dns)

    def _beginning(self, now: float, room: int, *, displaces: bool = False) -> Beginning:
        until = now + self._store.timeouts.udp_dns
        return Beginning(until, room, self._store.limits.flows_per_client, displaces)

    def _has_made_room(self, query: bytes, now: float) -> bool:
        """Whether there is room for this flow, perhaps since another was evicted for it."""
        try:
            client = Endpoint(key_src(query), 0)
            self._store.admission.make_room(Proto.UDP, client, now, is_learnt=True)
        except Refusal:
            return False
        return True


_DPORT, _DNS = slice(-2, None), DNS_PORT.to_bytes(2)
_PRE_POST = Hook.PREROUTING, Hook.POSTROUTING
_U12U34 = (Step.U12, Step.U34)
_NOWHERE = Endpoint(b"", 0)
_SHOWN = Flow(0, Proto.UDP, _NOWHERE, _NOWHERE, _NOWHERE, Source.CLIENT, 0.0)
"""Whose the rewrites are that were made to be shown."""


def _nowhere() -> Tables:
    """Tables in which nothing is looked up."""
    return {(hook, Proto.UDP): {} for hook in Hook}
