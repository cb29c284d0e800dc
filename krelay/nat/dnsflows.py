"""Flows that the kernel has learnt by itself: a query each, and mostly its answer.

A resolver asks each query from a port of its own, so half of its packets begin a flow.  A visit to
the worker for each, and a flow, would cost more than all else that a relay does for it.  So for
these services the kernel's programs decide by themselves what can only be decided one way, relay
query and answer, and tell of both (offload/programs/relay.c).  From that this table is filled, some
milliseconds later (learning.py).  It holds as little as may be, and makes a whole flow of it only
when it is to be shown, or when a packet comes that the worker must decide about.
"""

from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

from knet.endpoint import key_src, with_dst
from knet.timerwheel import Wheel
from knet.wire import ipv4

Exchange = tuple[bool, int, bytes]
"""A packet that was relayed: whether it is an answer, its bytes, and the flow key of the query."""

_SEARCHED = 64
"""Flows, the oldest, among which one of a client's is looked for."""
_FETCHED = 1024
"""Of the oldest, at a time."""


class DnsFlow:
    """One flow: the query's flow key finds it in the table."""

    __slots__ = (
        "answered",
        "answered_bytes",
        "asked",
        "asked_bytes",
        "began_at",
        "heard_at",
        "id",
        "server",
    )

    def __init__(self, flow_id: int, server: bytes, now: float, asked: int, size: int) -> None:
        self.id = flow_id
        self.server = server
        """The address that the query went on to."""
        self.began_at = self.heard_at = now
        self.asked = asked
        self.asked_bytes = size
        self.answered = self.answered_bytes = 0


class Beginning(NamedTuple):
    """What flows that begin together have in common, and how many may."""

    until: float
    """When they are over if nothing more is heard of them."""
    room: int
    """How many there may be of them."""
    per_client: int
    """How many a client may have of all."""
    displaces: bool
    """Whether the oldest of all, or of its client, goes for one that finds no room."""


class DnsFlows:
    """They that haven't been silent for so many seconds, the oldest first."""

    def __init__(
        self,
        ids: Iterator[int],
        flows: Container[bytes],
        of_others: Mapping[bytes, int],
        busy: int,
        on_busy: Callable[[bytes], object],
        on_waiting_gone: Callable[[bytes], object] = lambda query: None,
    ) -> None:
        """`ids`: a number for each.  `flows`: the queries of which there are flows instead.

        `of_others`: how many flows a client has beside these flows.  `on_busy` is called for the
        query of a flow that has been asked `busy` times, `on_waiting_gone` for that of one that is
        taken out while the kernel may still wait for an answer.
        """
        self.addresses: frozenset[bytes] = frozenset()
        """The addresses of this host that were asked."""
        self.displaced = 0
        """Those taken out to make room."""
        self._ids = ids
        self._flows = flows
        self._of_others = of_others
        self._busy = busy
        self._on_busy = on_busy
        self._on_waiting_gone = on_waiting_gone
        self._dns_flows: dict[bytes, DnsFlow] = {}
        self._oldest = deque[tuple[bytes, DnsFlow]]()
        """Some that were the first when last looked for; gone ones may be among them."""
        self._per_client: Counter[bytes] = Counter()
        self._due = Wheel[list[bytes]]()
        self._server = b""

    def __len__(self) -> int:
        return len(self._dns_flows)

    def __iter__(self) -> Iterator[tuple[bytes, DnsFlow]]:
        return iter(list(self._dns_flows.items()))

    def learns(self, addresses: frozenset[bytes], server: bytes) -> None:
        """From now on the kernel learns flows to these addresses of this host, for that server."""
        self.addresses |= addresses  # what was learnt of others still lives
        self._server = server

    def get(self, query: bytes) -> DnsFlow | None:
        """The flow that begins with such a packet."""
        return self._dns_flows.get(query)

    def asked_as(self, outside: bytes) -> bytes | None:
        """The query of the flow between these two ends, to whichever address of this host."""
        dns_flows = self._dns_flows
        if not dns_flows:
            return None
        found = (with_dst(outside, address) for address in self.addresses)
        return next((query for query in found if query in dns_flows), None)

    def of_client(self, client: bytes) -> int:
        """How many this address has."""
        return self._per_client.get(client, 0)

    def hear(
        self, exchanges: Iterator[Exchange], now: float, beginning: Beginning
    ) -> Exchange | None:
        """Takes note of packets that were relayed, until one is of none of these flows and doesn't
        begin one: there is a flow of it, or no room.  That one is returned, None if there is none.

        Nothing else in krelay is done so often but for the way of a packet through the queue, so
        all is written out here.
        """
        until, room, per_client, displaces = beginning
        dns_flows, flows, clients, ids = self._dns_flows, self._flows, self._per_client, self._ids
        server = self._server
        get, of_client, of_others = dns_flows.get, clients.get, self._of_others.get
        begun: list[bytes] = []
        left: Exchange | None = None
        for exchange in exchanges:
            is_answer, size, query = exchange
            dns_flow = get(query)
            if not is_answer:
                if dns_flow is not None:
                    dns_flow.asked += 1
                    dns_flow.asked_bytes += size
                    dns_flow.heard_at = now
                    if dns_flow.asked == self._busy:
                        self._on_busy(query)
                    continue
                if query in flows:
                    left = exchange
                    break
                client = query[_SRC]
                count = of_client(client, 0)
                surplus = count + of_others(client, 0) - per_client
                if surplus >= 0 or len(begun) >= room:
                    its = client if surplus >= 0 else None
                    if surplus > 0 or not displaces or not self.remove_oldest(its):
                        left = exchange
                        break
                    room += 1
                    count = of_client(client, 0)
                clients[client] = count + 1
                dns_flows[query] = DnsFlow(next(ids), server, now, 1, size)
                begun.append(query)
            else:
                if dns_flow is None:
                    left = exchange
                    break
                dns_flow.answered += 1
                dns_flow.answered_bytes += size
                dns_flow.heard_at = now
        if begun:
            self._due.put(self._due.second(until), begun)
        return left

    def remove(self, query: bytes, flow_id: int | None = None) -> DnsFlow | None:
        """Takes one out, if it is there, and has this number if one is given."""
        dns_flow = self._dns_flows.get(query)
        if dns_flow is not None and (flow_id is None or flow_id == dns_flow.id):
            del self._dns_flows[query]
            client = key_src(query)
            self._per_client[client] -= 1
            if not self._per_client[client]:
                del self._per_client[client]
            if dns_flow.asked > dns_flow.answered:
                self._on_waiting_gone(query)
            return dns_flow
        return None

    def remove_oldest(self, client: bytes | None = None) -> bool:
        """Takes out the one that began first, of this client if it is among the first of all.

        Whether there was one.  A client with a good part of all is soon found; one without has few.
        """
        dns_flows, oldest = self._dns_flows, self._oldest
        for fetched in (False, True):
            if fetched:
                # To find the first in a dictionary takes the longer, the more have gone before it.
                oldest.clear()
                oldest.extend(islice(dns_flows.items(), _FETCHED))
            while oldest and dns_flows.get(oldest[0][0]) is not oldest[0][1]:
                oldest.popleft()
            seen = 0
            for at, (query, dns_flow) in enumerate(oldest):
                if dns_flows.get(query) is not dns_flow:
                    continue
                if client is None or key_src(query) == client:
                    del oldest[at]
                    self.remove(query)
                    self.displaced += 1
                    return True
                seen += 1
                if seen == _SEARCHED:
                    return False
        return False

    def expire(self, now: float, timeout: float) -> None:
        """Takes out those that have been silent for so many seconds.  Looks only at those due."""
        for _, begun in self._due.due(now):
            again: dict[int, list[bytes]] = {}
            for query in chain.from_iterable(begun):
                dns_flow = self._dns_flows.get(query)
                if dns_flow is None:
                    continue
                when = dns_flow.heard_at + timeout
                if when <= now:
                    self.remove(query)
                else:
                    again.setdefault(self._due.second(when), []).append(query)
            for second, queries in again.items():
                self._due.put(second, queries)

    def clear(self) -> None:
        """Takes out all."""
        self._dns_flows.clear()
        self._oldest.clear()
        self._per_client.clear()
        self._due.clear()


_SRC = slice(0, ipv4.ADDRESS)
