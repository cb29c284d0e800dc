"""Who may begin one more row, and whose goes for it: the limits of the NAT table.

It knows every row, and counts for each client those that aren't closed.  Where a limit is reached,
the first of these makes room that there is, of the client alone where the limit is the client's:

    a closed row, whose last packets are through: these are no reason to refuse anyone
    the oldest question that the kernel has learnt
    the oldest row that is no conversation yet, and has been silent for a moment
    the oldest of a connection that is over, silent likewise

The last two as in Linux's connection tracking (early_drop in net/netfilter/nf_conntrack_core.c,
can_early_drop): else a flood from forged addresses would keep everybody out for as long as its rows
live, and a client with many short connections itself.  Conversations never go for others.

Times are seconds that the caller passes in.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

from krelay.flow import Endpoint
from krelay.learnt import LearntFlows
from krelay.overload import EARLY, LOOKS, NewFlows, Spare
from krelay.row import Row


class Refusal(Exception):
    """No row for this flow.  `reason` is a word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Limits(NamedTuple):
    """How many rows there may be."""

    flows: int = 65536
    flows_per_client: int = 4096
    new_flows_per_client: int = 0
    """Rows that a client may begin a second, and at once; 0: as many as it likes."""


class Admission:
    """Holds the table to its limits."""

    def __init__(
        self,
        limits: Limits,
        rows: Mapping[int, Row],
        per_client: Counter[bytes],
        learnt: LearntFlows,
        end: Callable[[Row], None],
        on_late: Callable[[list[Row]], None],
    ) -> None:
        """`rows` are all that live, `learnt` the flows beside them, `per_client` is kept here.

        `end` takes a row out (and calls `ended`).  `on_late` is called before a row is ended for
        its silence: it may have been heard of elsewhere.
        """
        self.limits = limits
        self.ended_early = 0
        """Rows ended to make room for others; `learnt.displaced` counts those beside them."""
        self._rows = rows
        self._learnt = learnt
        self._end = end
        self._on_late = on_late
        self._per_client = per_client  # without those in _closed
        self._closed: dict[int, Row] = {}  # lingering, the oldest first: no reason to refuse anyone
        self._tentative = Spare(_IS_TENTATIVE, _IS_CONVERSATION)
        self._over = Spare(_IS_OVER, _goes_on)
        self._new_flows = NewFlows()

    # Beginning rows

    def make_room(self, client: Endpoint, now: float, *, is_new: bool = True) -> None:
        """Sees to it that one more row of this client is within the limits.

        Raises Refusal: `client_rate` where it has begun too many lately (a row that isn't new
        doesn't count as begun now), `client_full`, or `table_full`.  No other client's row goes for
        one who has too many itself.
        """
        limits, addr = self.limits, client.addr
        rate = limits.new_flows_per_client if is_new else 0
        if rate and not self._new_flows.admits(addr, rate, now):
            raise Refusal("client_rate")
        if self._is_client_full(addr):
            self._end_one(now, addr)
            if self._is_client_full(addr):
                raise Refusal("client_full")
        if self._count() >= limits.flows:
            if self._is_full():
                self._end_one(now)
                if self._is_full():
                    raise Refusal("table_full")
            if self._count() >= limits.flows:
                self._end(next(iter(self._closed.values())))
        if rate:
            self._new_flows.began(addr, rate, now)

    def unasked(self) -> int:
        """How many more flows may begin without `make_room` for each."""
        return 0 if self.limits.new_flows_per_client else self.limits.flows - self._count()

    def learnt_make_room(self) -> bool:
        """Whether a learnt flow is the first to go where there is no room for one more."""
        return not self.limits.new_flows_per_client and not self._closed

    def forget(self, now: float) -> None:
        """Lets go of what needn't be known any more of who began rows; call it now and then."""
        self._new_flows.forget(now)

    def clear(self) -> None:
        """Every row has ended; that they were begun is forgotten with them."""
        self._new_flows = NewFlows()

    # What becomes of rows

    def began(self, row: Row) -> None:
        """The row is in the table."""
        self._count_client(row, +1)
        self._tentative.add(row, row.created_at)

    def settled(self, row: Row) -> None:
        """It has become a conversation, or is about to.  Need not be told of each at once."""
        self._tentative.discard(row)

    def changed(self, row: Row) -> None:
        """The state of a TCP connection without tcp-relay has changed."""
        self._over.discard(row)
        if row.is_over:
            self._over.add(row, row.quiet_since)

    def closed(self, row: Row) -> None:
        """Both its legs are closed: it only lingers."""
        self._closed[row.id] = row
        self._count_client(row, -1)
        self._tentative.discard(row)

    def ended(self, row: Row) -> None:
        """The row is in the table no more."""
        self._tentative.discard(row)
        self._over.discard(row)
        if self._closed.pop(row.id, None) is None:
            self._count_client(row, -1)

    # Inside

    def _count(self) -> int:
        return len(self._rows) + len(self._learnt)

    def _is_full(self) -> bool:
        return self._count() - len(self._closed) >= self.limits.flows

    def _is_client_full(self, addr: bytes) -> bool:
        count = self._per_client.get(addr, 0) + self._learnt.of_client(addr)
        return count >= self.limits.flows_per_client

    def _end_one(self, now: float, client: bytes | None = None) -> None:
        """Ends a row to make room, of this client if one is named, where one may be ended."""
        if self._learnt.remove_oldest(client):
            return
        for spare in (self._tentative, self._over):
            for _ in range(LOOKS):
                row = spare.oldest(now, client)
                if row is None:
                    break
                self._on_late([row])
                if spare.may_go(row) and row.quiet_since <= now - EARLY:
                    self._end(row)
                    self.ended_early += 1
                    return

    def _count_client(self, row: Row, by: int) -> None:
        addr = row.client.addr
        if number := self._per_client.get(addr, 0) + by:
            self._per_client[addr] = number
        else:
            del self._per_client[addr]


_IS_TENTATIVE, _IS_CONVERSATION = attrgetter("is_tentative"), attrgetter("is_conversation")
_IS_OVER = attrgetter("is_over")


def _goes_on(row: Row) -> bool:
    return not row.is_over
