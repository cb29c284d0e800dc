"""Flows handed to the kernel: which they are, what it is still to be told, what it has counted.

The worker makes every decision; what it decides for a flow's packets is a Rewrite, and a Rewrite
can be handed over: from then on the kernel does the same by itself, from a map (ruleset.py), and
these packets don't visit the queue any more.  The NAT table stays the one truth.  The kernel's maps
are a cache of it: whatever isn't in them goes to the worker, who knows the flow.  So nothing need
be handed over in time; but what was handed over must be taken back when its flow ends.

A rewrite is handed over when it will pay, since that costs as much as some visits to the queue:

    TCP    T1 and T2 with the client's first packet, T3 and T4 when tcp-relay has a port towards the
           server, each before the next packet can come: so a connection costs one visit.  Beyond
           HALF_OPEN connections that tcp-relay hasn't accepted yet, all four only when it has: then
           they are no SYNs from forged addresses.  Forwarded: when it is established
    UDP    each direction after BUSY packets: who has asked and been answered that often has more
           to say, while a query to a name server is over after two

What begins only then goes at once.  All else goes not before HAND_AFTER, and then in the next pause
of the flow, until HAND_WITHIN, for what the kernel takes would overtake what still waits in the
queue; and what is over by then never goes.

Packets of an end of terminated TCP are the kernel's only while they have the DSCP that they had:
with another one they visit the worker, who sees to it that it goes on (NatTable.mark).

It is taken back, so that the worker sees every packet, when an end was reset and may live on, when
the flow was killed, and while somebody traces it; and RETIRE seconds after tcp-relay has closed the
connection, when its last packets are through.  Of packets that change how a connection stands, the
SYN and RST of its ends visit the worker all the time.  So do FINs of what is forwarded.  Where
tcp-relay ends it, the FINs of its host count, and of these the kernel makes copies
(NatTable.ended), as of the SYN to the server (NatTable.begun).

Three kinds stay with the worker for good: the steps D1 and D2; those that must change a port
beside the field that their step always changes, which is the case where a port was taken; and UDP
whose server may answer from any port, for which the rules have to see each packet (ruleset.py).

What the kernel counts for a rewrite is read and added to the rewrite's own count: before a flow
expires or is shown, when a rewrite is taken back, and by turns, so that each flow is looked at once
a second while there are 1,500 of them at most, and less often where there are more.  The kernel
doesn't tell when a packet came, so a flow counts as heard of at the time of the look, never before
it was.  It goes late by that, but never early.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import islice
from math import inf
from typing import NamedTuple

from knet.endpoint import Proto
from knet.netlink.nftables import Count
from krelay.nat.events import IdleObserver
from krelay.nat.flow import BUSY, Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.rules.steprows import STEP_ROWS
from krelay.steps import SIDES, Step

HAND_AFTER = 0.05
"""Seconds for which a flow must have been fit to be handed over: what is over by then never is."""
SILENCE = 0.002
"""Seconds without a packet of a flow after which none waits in the queue, most probably."""
HAND_WITHIN = 0.15
"""Seconds after which a flow is handed over though it isn't silent."""
HALF_OPEN, HALF_OPEN_FOR = 256, 3.0
"""Connections begun within so many seconds that are handed over before tcp-relay has accepted them:
a flood of SYNs from forged addresses is the worker's alone."""
RETIRE = 0.5
"""Seconds from the end of a connection until it is taken back."""
LOOKS = 1700
"""Flows that are looked at a second, about a hundredth of a core."""
_NOTHING = Count(0, 0)
_FIELDS = {
    "saddr": slice(0, 4),
    "daddr": slice(4, 8),
    "sport": slice(8, 10),
    "dport": slice(10, 12),
}
_CHANGED = {step: _FIELDS[change.field] for step, change in STEP_ROWS.items()}


class Changes(NamedTuple):
    """What the kernel is to be told: first what it has to give back, then what it gets."""

    back: list[Rewrite]
    over: list[Rewrite]


class FastPath(IdleObserver):
    """What of the flows in `nat` the kernel has."""

    def __init__(
        self,
        nat: NatTable,
        on_pending: Callable[[], None] = lambda: None,
        at_once: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_pending` is called when the kernel is to be told of something, `at_once` when that
        must be done before it returns."""
        self.room = 0
        """Rewrites that each map has room for; 0: nothing is handed over."""
        self._nat = nat
        self._on_pending = on_pending
        self._at_once = at_once
        self._traced: Callable[[Flow], bool] = lambda flow: False
        self._handed: dict[Rewrite, Count] = {}  # with what the kernel had counted when last read
        self._over: dict[Rewrite, float | None] = {}  # since when; None: not yet looked at
        self._first: dict[Rewrite, None] = {}  # to be handed over at once
        self._back: dict[Rewrite, Count] = {}
        self._made: frozenset[tuple[Proto, Step]] | None = None
        self._filled: Counter[tuple[Proto, Step]] = Counter()  # with those in _over and _back
        self._whole: dict[Flow, int] = {}
        """TCP of which the kernel has the first so many rewrites, or will have them."""
        self._half_open: dict[Flow, None] = {}  # handed over, and perhaps forged
        self._ring: deque[Flow] = deque()
        self._in_ring: set[Flow] = set()
        self._retiring: deque[tuple[float, Flow]] = deque()
        nat.observers.add(self)

    def __len__(self) -> int:
        """Rewrites that the kernel has, or will have."""
        return len(self._handed) + len(self._over) + len(self._first)

    @property
    def gives_back(self) -> bool:
        """Whether the kernel still has what it is to give back."""
        return bool(self._back)

    @property
    def hurries(self) -> bool:
        """Whether the kernel is to be told of something in this turn of the loop."""
        return bool(self._back or self._first)

    @property
    def flows(self) -> int:
        """Flows of which the kernel has any, or had lately."""
        return len(self._in_ring)

    def begin(self, room: int) -> None:
        """The maps are there, and empty."""
        self._forget()
        self.room = room
        self._consider_all()

    def made(self, steps: Iterable[tuple[Proto, Step]]) -> None:
        """These have maps; until it is said, all have.  What has none stays with the worker."""
        self._made = frozenset(steps)

    def end(self) -> None:
        """The maps are gone."""
        self._forget()
        self.room = 0

    def changed(self, flow: Flow) -> None:
        """Hands over what of this flow is fit for it now, and takes back what isn't."""
        if not self.room:
            return
        if self._traced(flow) or not self._is_fit(flow):
            self.take_back(flow)
        elif flow.proto is Proto.UDP:
            for rewrite in flow.rewrites.values():
                if rewrite.packets >= BUSY:
                    self._hand(rewrite)
        elif (before := self._whole.get(flow, 0)) != len(flow.rewrites):
            if flow.relay is not None:
                self._half_open.pop(flow, None)
            handed = [self._hand(each) for each in islice(flow.rewrites.values(), before, None)]
            if all(handed):
                self._whole[flow] = before + len(handed)

    def ended(self, flow: Flow) -> None:
        """The flow is about to go: nothing of it is the kernel's any more."""
        self.take_back(flow)

    def take_back(self, flow: Flow) -> None:
        """Nothing of this flow is the kernel's any more."""
        self._half_open.pop(flow, None)
        self._whole.pop(flow, None)
        for rewrite in flow.rewrites.values():
            self._take(rewrite)

    def traced(self, is_traced: Callable[[Flow], bool]) -> None:
        """From now on these flows are traced, and no others."""
        self._traced = is_traced
        self._consider_all()

    @property
    def waits(self) -> bool:
        """Whether there is anything to be handed over, now or later."""
        return bool(self._over)

    def changes(self, most: int, now: float | None = inf) -> Changes | None:
        """The next so many that the kernel is to be told; None if nothing is new.

        What is to be handed over is ripe HAND_AFTER it was first seen here, if its flow is silent
        then, at the latest HAND_WITHIN; what begins only now is so at once.  By default all is
        ripe; None: only that is told which can't wait.  All count as told; `told` must follow.  A
        flow is given back before another that comes with the same addresses and ports is handed
        over.
        """
        back = list(islice(self._back, most))
        over: list[Rewrite] = []
        if len(back) == len(self._back):
            over = list(islice(self._first, most))
            if now is not None:
                over += self._ripe(most - len(over), now)
        if not back and not over:
            return None
        for rewrite in over:
            self._first.pop(rewrite, None)
            self._over.pop(rewrite, None)
            self._handed[rewrite] = _NOTHING
        return Changes(back, over)

    def leave(self) -> Changes:
        """All that the kernel has, to be given back at once; `told` must follow, and then `end`."""
        self._over.clear()
        self._first.clear()
        self._back |= self._handed
        self._handed.clear()
        return Changes(list(self._back), [])

    def told(self, changes: Changes, final: Iterable[tuple[Rewrite, Count]], now: float) -> None:
        """The kernel has taken these changes; what it had counted for those it gave back."""
        before = {rewrite: self._back.pop(rewrite) for rewrite in changes.back}
        for rewrite in before:
            self._filled[rewrite.flow.proto, rewrite.step] -= 1
        for rewrite, count in final:
            self._heard(rewrite, before[rewrite], count, now)
        if self._back or self._first or self._over:
            self._on_pending()

    def read(self, counts: Iterable[tuple[Rewrite, Count]], now: float) -> None:
        """What the kernel has counted for rewrites that it has."""
        for rewrite, count in counts:
            before = self._handed.get(rewrite)
            if before is not None:
                self._handed[rewrite] = count
                self._heard(rewrite, before, count, now)

    def handed(self, flows: Iterable[Flow]) -> list[Rewrite]:
        """The rewrites of these flows that the kernel has and whose counts a flow shows."""
        return [
            rewrite
            for flow in flows
            for rewrite in flow.rewrites.values()
            if rewrite in self._handed and rewrite.step in SIDES
        ]

    def due(self, now: float, seconds: float) -> list[Flow]:
        """The flows whose turn it is to be looked at, when so much time has passed since before.

        Also takes back those that have retired; until then they aren't looked at, since what was
        counted for them is told with that.
        """
        while self._retiring and self._retiring[0][0] <= now:
            self.take_back(self._retiring.popleft()[1])
        flows: list[Flow] = []
        most = max(1, int(LOOKS * seconds))
        for _ in range(len(self._ring)):
            if len(flows) == most:
                break
            flow = self._ring.popleft()
            if any(self._is_its(each) for each in flow.rewrites.values()):
                flows.append(flow)
            else:
                self._in_ring.discard(flow)
        self._ring.extend(flows)
        return [flow for flow in flows if flow.closed_at is None]

    def _is_fit(self, flow: Flow) -> bool:
        """Whether the worker has nothing to learn from this flow's packets but their number."""
        if flow.proto is Proto.UDP:
            return not flow.is_any_port
        if flow.closed_at is not None or flow.tracker.reset or flow.service == flow.server:
            return False
        if flow.is_forwarded:
            return not flow.abort_asked and flow.is_confirmed and not flow.is_over
        return flow.relay is not None or flow in self._half_open or self._admits(flow)

    def _admits(self, flow: Flow) -> bool:
        """Whether a connection is handed over that its client has only begun."""
        before = self._half_open
        while before and (first := next(iter(before))).created_at < flow.created_at - HALF_OPEN_FOR:
            del before[first]
        if len(before) == HALF_OPEN or flow.rewrites[Step.T1].packets:
            return False
        before[flow] = None
        return True

    def _hand(self, rewrite: Rewrite) -> bool:
        """Whether the kernel has it, or will have."""
        if self._is_its(rewrite):
            return True
        if rewrite.table.get(rewrite.old) is not rewrite:
            return False  # its packets are another flow's now
        if (before := self._back.pop(rewrite, None)) is not None:
            self._handed[rewrite] = before
        else:
            at = rewrite.flow.proto, rewrite.step
            has_map = self._made is None or at in self._made
            if not has_map or self._filled[at] >= self.room or not is_simple(rewrite):
                return False
            self._filled[at] += 1
            if _begins(rewrite):
                self._first[rewrite] = None
            else:
                self._over[rewrite] = None
            self._on_pending()
        if rewrite.flow not in self._in_ring:
            self._in_ring.add(rewrite.flow)
            self._ring.append(rewrite.flow)
        return True

    def _ripe(self, most: int, now: float) -> list[Rewrite]:
        """Those whose time has come to be handed over."""
        ripe: list[Rewrite] = []
        if most <= 0:
            return ripe
        for rewrite, since in self._over.items():
            if since is None:
                self._over[rewrite] = since = now
            if now < since + HAND_AFTER:
                continue
            if now < min(since + HAND_WITHIN, rewrite.seen_at + SILENCE):
                continue
            ripe.append(rewrite)
            if len(ripe) == most:
                break
        return ripe

    def _take(self, rewrite: Rewrite) -> None:
        if self._withdraw(rewrite):
            return
        if (before := self._handed.pop(rewrite, None)) is not None:
            self._back[rewrite] = before
            self._on_pending()

    def _withdraw(self, rewrite: Rewrite) -> bool:
        """It is not handed over after all; whether it was to be."""
        if rewrite in self._first:
            del self._first[rewrite]
        elif rewrite in self._over:
            del self._over[rewrite]
        else:
            return False
        self._filled[rewrite.flow.proto, rewrite.step] -= 1
        return True

    def _is_its(self, rewrite: Rewrite) -> bool:
        """Whether the kernel has it, or will have."""
        return rewrite in self._handed or rewrite in self._over or rewrite in self._first

    def closed(self, flow: Flow, now: float) -> None:
        """What isn't the kernel's yet never will be; what is retires soon."""
        for rewrite in flow.rewrites.values():
            self._withdraw(rewrite)
        if flow in self._in_ring:
            self._retiring.append((now + RETIRE, flow))

    def displaced(self, flow: Flow) -> None:
        """The kernel has nothing of this flow when this returns."""
        self.take_back(flow)
        if any(rewrite in self._back for rewrite in flow.rewrites.values()):
            self._at_once()

    def before_mark(self, rewrite: Rewrite) -> None:
        """The key by which the kernel has this is about to change."""
        if rewrite in self._handed or rewrite in self._back:
            self.displaced(rewrite.flow)

    def _heard(self, rewrite: Rewrite, before: Count, count: Count, now: float) -> None:
        packets = count.packets - before.packets
        if packets > 0:
            self._nat.tracking.heard(rewrite, packets, count.bytes - before.bytes, now)

    def _consider_all(self) -> None:
        for flow in self._nat.workers:
            self.changed(flow)

    def _forget(self) -> None:
        for each in (self._handed, self._over, self._first, self._back, self._filled, self._ring):
            each.clear()
        self._whole.clear()
        self._half_open.clear()
        self._in_ring.clear()
        self._retiring.clear()


def new_value(rewrite: Rewrite) -> bytes:
    """What the map of its step holds for this rewrite: an address or a port."""
    return rewrite.new[_CHANGED[rewrite.step]]


def begins(rewrite: Rewrite) -> bool:
    """Whether this is of the packets of tcp-relay's with which it is about to begin a connection to
    the server: one SYN of these may go past the worker."""
    flow = rewrite.flow
    return rewrite.step is Step.T3 and flow.leg is None and not flow.tracker.server_answered


def _begins(rewrite: Rewrite) -> bool:
    """Whether no data of this direction can have come yet: of a connection that has just been
    begun; but for what its client sends, also when tcp-relay has a port towards the server, until
    that is used."""
    flow = rewrite.flow
    if flow.gport is None:
        return False
    towards = flow.rewrites.get(Step.T3)
    if towards is None:
        return True
    return not towards.packets and rewrite.step is not Step.T1


def is_simple(rewrite: Rewrite) -> bool:
    """Whether this rewrite changes nothing but the one field that its step changes in a map."""
    field = _CHANGED.get(rewrite.step)
    if field is None:
        return False
    old, new = rewrite.old, rewrite.new
    return old[: field.start] == new[: field.start] and old[field.stop :] == new[field.stop :]
