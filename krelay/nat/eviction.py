"""Flows that may be evicted at a limit, the oldest first.

It is bounded itself, whatever clients there are or are said to be: the source of a flood is mostly
forged, and differs from packet to packet.  Times are seconds that the caller passes in.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice

from krelay.nat.flow import Flow

LOOKS = 256
"""Flows looked at for one eviction, at most; what is left is for the next."""

_FETCHED = 1024
"""Of the oldest flows, at a time."""


class Spare:
    """Flows that may be evicted, in the order in which they were entered.

    `may_go` tells whether a flow may be evicted as it stands, and `quiet` for how many seconds it
    must have been silent; `is_settled` whether it needn't be asked again.
    """

    def __init__(
        self,
        may_go: Callable[[Flow], bool],
        is_settled: Callable[[Flow], bool],
        quiet: float = 0.0,
        on_settled: Callable[[Flow], None] = lambda flow: None,
    ) -> None:
        """`on_settled` is called with each flow that leaves because it is settled."""
        self.may_go = may_go
        self._is_settled = is_settled
        self._quiet = quiet
        self._on_settled = on_settled
        self._all = _Line()
        self._of: dict[bytes, Flow | _Line] = {}
        """The same by client.  Most clients of a flood have one, which therefore needs no more."""

    def __len__(self) -> int:
        return len(self._all.since)

    def add(self, flow: Flow, now: float) -> None:
        """A flow that isn't in yet."""
        self._all.since[flow] = now
        of, client = self._of, flow.client.addr
        of_client = of.get(client)
        if of_client is None:
            of[client] = flow
        elif isinstance(of_client, _Line):
            of_client.since[flow] = now
        else:
            line = of[client] = _Line()
            line.since[of_client] = line.since[flow] = now

    def discard(self, flow: Flow) -> None:
        """It has ended, or is not to be evicted any more.  Harmless if it isn't in."""
        if self._all.since.pop(flow, None) is None:
            return
        client = flow.client.addr
        of_client = self._of[client]
        if isinstance(of_client, _Line):
            del of_client.since[flow]
            if of_client.since:
                return
        del self._of[client]

    def oldest(self, now: float, client: bytes | None = None) -> Flow | None:
        """The oldest flow, of this client if one is named, that may be evicted; it is still in.

        Flows that are settled leave; others that may not be evicted go to the end.
        """
        since, before = self._all.since, now - self._quiet
        for _ in range(LOOKS):
            flow = self._first(client)
            if flow is None or since[flow] > before:
                return None
            if self._is_settled(flow):
                self.discard(flow)
                self._on_settled(flow)
            elif self.may_go(flow) and (not self._quiet or flow.quiet_since <= before):
                return flow
            else:
                self._all.to_the_end(flow, now)
                of_client = self._of[flow.client.addr]
                if isinstance(of_client, _Line):
                    of_client.to_the_end(flow, now)
        return None

    def _first(self, client: bytes | None) -> Flow | None:
        if client is None:
            return self._all.first()
        of_client = self._of.get(client)
        return of_client.first() if isinstance(of_client, _Line) else of_client


class _Line:
    """Flows in the order in which they were entered."""

    __slots__ = ("_ahead", "since")

    def __init__(self) -> None:
        self.since: dict[Flow, float] = {}
        """When each was entered, or looked at last."""
        self._ahead: deque[tuple[Flow, float]] | None = None
        """Some that were the first when last looked for; gone ones may be among them.  To find the
        first in a dictionary takes the longer, the more have gone before it."""

    def first(self) -> Flow | None:
        """The one that was entered first."""
        since, ahead = self.since, self._ahead
        if not since:
            self._ahead = None
            return None
        while ahead:
            flow, entered = ahead[0]
            if since.get(flow) is entered:
                return flow
            ahead.popleft()
        self._ahead = ahead = deque(islice(since.items(), _FETCHED))
        return ahead[0][0]

    def to_the_end(self, flow: Flow, now: float) -> None:
        """It becomes the last."""
        del self.since[flow]
        self.since[flow] = now
        if self._ahead and self._ahead[0][0] is flow:
            self._ahead.popleft()
