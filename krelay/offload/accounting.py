"""What the backend has counted for offloaded flows.  Pure.

What it counts for a rewrite is read and added to the rewrite's own count: before a flow expires or
is shown, when a rewrite is withdrawn, and by turns, so that each flow is polled once a second while
there are 1,500 of them at most, and less often where there are more.  The backend tells when the
last packet came, so a flow expires as if the worker had seen it.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from knet.endpoint import Proto
from krelay.nat.flow import Flow, Rewrite
from krelay.offload.backend import CountedRewrite
from krelay.offload.layout import Counted
from krelay.steps import SIDES, Step

POLLS_PER_SECOND = 1700
"""Flows that are polled a second, about a hundredth of a core."""
LINGER = 0.5
"""Seconds from the end of a connection until it is withdrawn: then its last packets are through."""
NOTHING = Counted(0, 0, 0.0)

Heard = Callable[[Rewrite, int, int, float], None]
"""FlowTracking.heard: so many packets and bytes more were rewritten, the last at this time."""


class Accounting:
    """What is installed, with what had been counted for it when that was last read."""

    def __init__(self, heard: Heard) -> None:
        self.installed: dict[Rewrite, Counted] = {}
        self._heard = heard
        self._ring: deque[Flow] = deque()
        self._in_ring: set[Flow] = set()
        self._closed: deque[tuple[float, Flow]] = deque()

    @property
    def flows(self) -> int:
        """Flows of which anything is installed, or was lately."""
        return len(self._in_ring)

    def watch(self, flow: Flow) -> None:
        """This flow is polled by turns from now on, until nothing of it is installed any more."""
        if flow not in self._in_ring:
            self._in_ring.add(flow)
            self._ring.append(flow)

    def closed(self, flow: Flow, now: float) -> None:
        """Both legs of this flow were closed: it lingers."""
        if flow in self._in_ring:
            self._closed.append((now + LINGER, flow))

    def lingered(self, now: float) -> list[Flow]:
        """The closed flows whose time has come to be withdrawn; each is told once."""
        flows = []
        while self._closed and self._closed[0][0] <= now:
            flows.append(self._closed.popleft()[1])
        return flows

    def due(self, seconds: float, has: Callable[[Rewrite], bool]) -> list[Flow]:
        """The flows whose turn it is to be polled, when so much time has passed since before.

        `has` tells whether a rewrite is installed or will be.  Closed flows aren't polled: what was
        counted for them is told when they are withdrawn.
        """
        flows: list[Flow] = []
        most = max(1, int(POLLS_PER_SECOND * seconds))
        for _ in range(len(self._ring)):
            if len(flows) == most:
                break
            flow = self._ring.popleft()
            if any(map(has, flow.rewrites.values())):
                flows.append(flow)
            else:
                self._in_ring.discard(flow)
        self._ring.extend(flows)
        return [flow for flow in flows if flow.closed_at is None]

    def installed_of(self, flows: Iterable[Flow]) -> list[Rewrite]:
        """The rewrites of these flows that are installed and whose counts a flow shows."""
        return [
            rewrite
            for flow in flows
            for rewrite in flow.rewrites.values()
            if rewrite in self.installed and rewrite.step in SIDES
        ]

    def read(self, counts: Iterable[CountedRewrite], now: float) -> None:
        """What has been counted so far for rewrites that are installed."""
        for rewrite, count in counts:
            before = self.installed.get(rewrite)
            if before is not None:
                self.installed[rewrite] = count
                self.add(rewrite, before, count, now)

    def add(self, rewrite: Rewrite, before: Counted, count: Counted, now: float) -> None:
        """The count of a rewrite was `before` and is `count`."""
        packets = count.packets - before.packets
        if packets > 0:
            self._heard(rewrite, packets, count.bytes - before.bytes, min(count.heard, now))

    def clear(self) -> None:
        """Nothing is installed any more."""
        for each in (self.installed, self._ring, self._in_ring, self._closed):
            each.clear()


class Totals(Protocol):
    """What counts packets by step."""

    def totals(self) -> dict[tuple[Proto, Step], int]: ...


class StepTotals:
    """Packets by step, of a backend that comes and goes; what was counted before stays."""

    def __init__(self) -> None:
        self._before = Counter[Step]()
        self._seen = Counter[Step]()

    def read(self, backend: Totals | None) -> None:
        """Reads it.  Raises what it raises."""
        if backend is not None:
            found = Counter[Step]()
            for (_, step), packets in backend.totals().items():
                found[step] += packets
            self._seen |= found

    def gone(self) -> None:
        """It counts anew."""
        self._before += self._seen
        self._seen = Counter()

    def sum(self) -> Counter[Step]:
        """All that was counted."""
        return self._before + self._seen
