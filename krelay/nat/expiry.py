"""When flows are looked at next: at the latest when their time is over.

A packet never touches this.  A flow that was heard of since is moved on when its second comes.
Times are seconds that the caller passes in.
"""

from collections.abc import Callable, Mapping

from knet.timerwheel import Wheel
from krelay.nat.flow import Flow, Timeouts

HORIZON = 64
"""Seconds after which each flow is looked at, at the latest: so that entries of flows that have
ended don't pile up."""
_SPREAD = HORIZON // 2


class ExpiryQueue:
    """The flows that live, by the second in which to look at each."""

    def __init__(
        self, flows: Mapping[int, Flow], timeouts: Timeouts, on_confirmed: Callable[[Flow], None]
    ) -> None:
        """`on_confirmed` is called for confirmed flows that were looked at and stay."""
        self._flows = flows
        self._timeouts = timeouts
        self._on_confirmed = on_confirmed
        self._due = Wheel[int]()

    @property
    def timeouts(self) -> Timeouts:
        """In force for all flows."""
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._due.clear()
        for flow in self._flows.values():
            flow.due = -1
            self.schedule(flow)

    def schedule(self, flow: Flow) -> None:
        """The flow is looked at when its time is over; call this when its state has changed."""
        self._look_at(flow, flow.expires_at(self._timeouts))

    def due(self, now: float) -> list[Flow]:
        """The flows whose time is over.  Looks only at those due."""
        late: list[Flow] = []
        for second, ids in self._due.due(now):
            for flow_id in ids:
                flow = self._flows.get(flow_id)
                if flow is None or flow.due != second:
                    continue  # ended, or there is a newer entry
                if not self.goes_on(flow, now):
                    late.append(flow)
        return late

    def goes_on(self, flow: Flow, now: float) -> bool:
        """Whether this flow's time isn't over; it is looked at again then."""
        when = flow.expires_at(self._timeouts)
        if when <= now:
            return False
        self._look_at(flow, when)
        if flow.is_confirmed:
            self._on_confirmed(flow)
        return True

    def clear(self) -> None:
        """No flow lives."""
        self._due.clear()

    def _look_at(self, flow: Flow, when: float) -> None:
        # Flows that began together are looked at apart, or each look would be a pause for packets.
        at = self._due.next + HORIZON - flow.id % _SPREAD
        if when < at - 1:
            at = self._due.second(when)
        if flow.due != at:
            flow.due = at
            self._due.put(at, flow.id)
