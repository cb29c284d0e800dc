"""Which flows are offloaded to the kernel, and what it is still to be told.  Pure.

The worker makes every decision; what it decides for a flow's packets is a Rewrite, and a Rewrite
can be offloaded: from then on the backend does the same by itself, from a map (layout.py), and
these packets don't visit the queue any more.  The NAT table stays the one truth.  The backend's map
is a cache of it: whatever isn't there goes to the worker, which knows the flow.  So nothing need be
installed in time; but what was installed must be withdrawn when its flow ends.

A rewrite is offloaded when it will pay, since that costs as much as a visit to the queue:

    TCP    both steps of the client leg with the client's first packet, both of the server leg when
           tcp-relay has a port towards the server, each before the next packet can come: so a
           connection costs one visit.  Beyond HALF_OPEN connections that tcp-relay hasn't accepted
           yet, all four only when it has: then they are no SYNs from forged addresses.  Forwarded:
           when it is established
    UDP    each direction after BUSY packets: a client that has asked and been answered that often
           has more to say, while a query to a name server is over after two

What begins only then is installed at once.  All else not before OFFLOAD_MIN_AGE, and then in the
next pause of the flow, until OFFLOAD_MAX_WAIT, for what the kernel rewrites would overtake what
still waits in the queue; and what is over by then never is.

Packets of an end of terminated TCP are the kernel's only while they have the DSCP that they had:
with another one they visit the worker, which sees to it that it goes on (NatObserver.before_mark).

A flow is withdrawn, so that the worker sees every packet, when an end was reset and may live on,
when the flow was killed, and while it is traced; and LINGER after tcp-relay has closed the
connection, when its last packets are through.  Of packets that change how a connection stands, the
SYN and RST of its ends visit the worker all the time.  So do FINs of what is forwarded.  Where
tcp-relay ends it, the FINs of its host count, and of these the backend tells, as of the SYN to the
server (OffloadBackend.own_packets).

Two kinds stay with the worker for good: the steps D1 and D2, and UDP whose server may answer from
any port, for which the rules have to see each packet.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from math import inf

from knet.endpoint import Proto
from krelay.nat.events import IdleObserver
from krelay.nat.flow import BUSY, Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.offload.accounting import NOTHING, Accounting
from krelay.offload.backend import Changes, CountedRewrite
from krelay.offload.layout import BEGINNING, MOST_PER_FLOW, Counted, can_be_done
from krelay.steps import Step

OFFLOAD_MIN_AGE = 0.05
"""Seconds for which a flow must have been fit to be offloaded: what is over by then never is."""
SILENCE = 0.002
"""Seconds without a packet of a flow after which none waits in the queue, most probably."""
OFFLOAD_MAX_WAIT = 0.15
"""Seconds after which a flow is offloaded though it isn't silent."""
HALF_OPEN, HALF_OPEN_FOR = 256, 3.0
"""Connections begun within so many seconds that are offloaded before tcp-relay has accepted them:
a flood of SYNs from forged addresses is the worker's alone."""


class HalfOpen:
    """Connections that are offloaded though their clients have only begun them."""

    def __init__(self) -> None:
        self._flows: dict[Flow, None] = {}

    def __contains__(self, flow: Flow) -> bool:
        return flow in self._flows

    def admits(self, flow: Flow) -> bool:
        """Whether this one may be offloaded, too; then it is among them."""
        flows = self._flows
        while flows and (first := next(iter(flows))).created_at < flow.created_at - HALF_OPEN_FOR:
            del flows[first]
        if len(flows) == HALF_OPEN or flow.rewrites[Step.T1].packets:
            return False
        flows[flow] = None
        return True

    def discard(self, flow: Flow) -> None:
        """It is accepted, or not offloaded any more."""
        self._flows.pop(flow, None)

    def clear(self) -> None:
        """None is offloaded."""
        self._flows.clear()


class OffloadPolicy(IdleObserver):
    """What of the flows in `nat` is offloaded, and what is to be."""

    def __init__(
        self,
        nat: NatTable,
        on_pending: Callable[[], None] = lambda: None,
        at_once: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_pending` is called when the backend is to be told of something, `at_once` when that
        must be done before it returns."""
        self.capacity = 0
        """Rewrites of each step that the backend has room for; 0: nothing is offloaded."""
        self._most = 0
        """Rewrites that it has room for in all."""
        self._nat = nat
        self._on_pending = on_pending
        self._at_once = at_once
        self._traced: Callable[[Flow], bool] = lambda flow: False
        self.accounting = Accounting(nat.tracking.heard)
        self._installed = self.accounting.installed
        self._waiting: dict[Rewrite, float | None] = {}  # since when; None: not yet looked at
        self._first: dict[Rewrite, None] = {}  # to be installed at once
        self._withdrawn: dict[Rewrite, Counted] = {}  # to be; with what was counted when last read
        self._filled: Counter[tuple[Proto, Step]] = (
            Counter()
        )  # with those in _waiting and _withdrawn
        self._whole: dict[Flow, int] = {}
        """TCP of which the first so many rewrites are offloaded, or will be."""
        self._half_open = HalfOpen()
        nat.observers.add(self)

    def __len__(self) -> int:
        """Rewrites that are offloaded, or will be."""
        return len(self._installed) + len(self._waiting) + len(self._first)

    @property
    def has_withdrawals(self) -> bool:
        """Whether the backend still has what it is to withdraw."""
        return bool(self._withdrawn)

    @property
    def is_urgent(self) -> bool:
        """Whether the backend is to be told of something in this turn of the loop."""
        return bool(self._withdrawn or self._first)

    def begin(self, capacity: int) -> None:
        """There is a backend, and it is empty."""
        self.end()
        self.capacity, self._most = capacity, capacity * MOST_PER_FLOW
        self._consider_all()

    def end(self) -> None:
        """There is no backend any more."""
        self.capacity = 0
        self.accounting.clear()
        self._half_open.clear()
        for each in (self._waiting, self._first, self._withdrawn, self._filled, self._whole):
            each.clear()

    def changed(self, flow: Flow) -> None:
        """Offloads what of this flow is fit for it now, and withdraws what isn't."""
        if not self.capacity:
            return
        if self._traced(flow) or not _is_fit(flow, self._half_open):
            self.withdraw(flow)
        elif flow.proto is Proto.UDP:
            for rewrite in flow.rewrites.values():
                if rewrite.packets >= BUSY:
                    self._install(rewrite)
        elif (before := self._whole.get(flow, 0)) != len(flow.rewrites):
            if flow.relay is not None:
                self._half_open.discard(flow)
            later = islice(flow.rewrites.values(), before, None)
            offloaded = [self._install(each) for each in later]
            if all(offloaded):
                self._whole[flow] = before + len(offloaded)

    def ended(self, flow: Flow) -> None:
        """The flow is about to go: nothing of it is offloaded any more."""
        self.withdraw(flow)

    def withdraw(self, flow: Flow) -> None:
        """Nothing of this flow is offloaded any more."""
        self._half_open.discard(flow)
        self._whole.pop(flow, None)
        for rewrite in flow.rewrites.values():
            self._withdraw(rewrite)

    def traced(self, is_traced: Callable[[Flow], bool]) -> None:
        """From now on these flows are traced, and no others."""
        self._traced = is_traced
        self._consider_all()

    @property
    def waits(self) -> bool:
        """Whether there is anything to be installed, now or later."""
        return bool(self._waiting)

    def changes(self, most: int, now: float | None = inf) -> Changes | None:
        """The next so many that the backend is to be told; None if nothing is new.

        What is to be offloaded is ripe OFFLOAD_MIN_AGE after it was first seen here, if its flow is
        silent then, at the latest after OFFLOAD_MAX_WAIT; what begins only now is so at once.  By
        default all is ripe; None: only that is told which can't wait.  All count as told; `told`
        must follow.  A flow is withdrawn before another that comes with the same addresses and
        ports is installed.
        """
        withdrawn = list(islice(self._withdrawn, most))
        installed: list[Rewrite] = []
        if len(withdrawn) == len(self._withdrawn):
            installed = list(islice(self._first, most))
            if now is not None:
                installed += self._ripe(most - len(installed), now)
        if not withdrawn and not installed:
            return None
        for rewrite in installed:
            self._first.pop(rewrite, None)
            self._waiting.pop(rewrite, None)
            self._installed[rewrite] = NOTHING
        return Changes(withdrawn, installed)

    def leave(self) -> Changes:
        """All that is installed, to be withdrawn at once; `told` must follow, and then `end`."""
        self._waiting.clear()
        self._first.clear()
        self._withdrawn |= self._installed
        self._installed.clear()
        return Changes(list(self._withdrawn), [])

    def told(self, changes: Changes, final: Iterable[CountedRewrite], now: float) -> None:
        """The backend has made these changes; what it had counted for those it has withdrawn."""
        before = {rewrite: self._withdrawn.pop(rewrite) for rewrite in changes.withdrawn}
        for rewrite in before:
            self._filled[rewrite.flow.proto, rewrite.step] -= 1
        for rewrite, count in final:
            self.accounting.add(rewrite, before[rewrite], count, now)
        if self._withdrawn or self._first or self._waiting:
            self._on_pending()

    def due(self, now: float, seconds: float) -> list[Flow]:
        """The flows whose turn it is to be polled; closed ones that have lingered are withdrawn."""
        for flow in self.accounting.lingered(now):
            self.withdraw(flow)
        return self.accounting.due(seconds, self._has)

    def _install(self, rewrite: Rewrite) -> bool:
        """Whether it is installed, or will be."""
        if self._has(rewrite):
            return True
        if rewrite.table.get(rewrite.old) is not rewrite:
            return False  # its packets are another flow's now
        if (before := self._withdrawn.pop(rewrite, None)) is not None:
            self._installed[rewrite] = before
        else:
            at = rewrite.flow.proto, rewrite.step
            is_full = self._filled[at] >= self.capacity or self._filled.total() >= self._most
            if is_full or not can_be_done(rewrite):
                return False
            self._filled[at] += 1
            if _begins(rewrite):
                self._first[rewrite] = None
            else:
                self._waiting[rewrite] = None
            self._on_pending()
        self.accounting.watch(rewrite.flow)
        return True

    def _ripe(self, most: int, now: float) -> list[Rewrite]:
        """Those whose time has come to be installed."""
        ripe: list[Rewrite] = []
        if most <= 0:
            return ripe
        for rewrite, since in self._waiting.items():
            if since is None:
                self._waiting[rewrite] = since = now
            if now < since + OFFLOAD_MIN_AGE:
                continue
            if now < min(since + OFFLOAD_MAX_WAIT, rewrite.seen_at + SILENCE):
                continue
            ripe.append(rewrite)
            if len(ripe) == most:
                break
        return ripe

    def _withdraw(self, rewrite: Rewrite) -> None:
        if self._cancel(rewrite):
            return
        if (before := self._installed.pop(rewrite, None)) is not None:
            self._withdrawn[rewrite] = before
            self._on_pending()

    def _cancel(self, rewrite: Rewrite) -> bool:
        """It is not installed after all; whether it was to be."""
        if rewrite in self._first:
            del self._first[rewrite]
        elif rewrite in self._waiting:
            del self._waiting[rewrite]
        else:
            return False
        self._filled[rewrite.flow.proto, rewrite.step] -= 1
        return True

    def _has(self, rewrite: Rewrite) -> bool:
        """Whether it is installed, or will be."""
        return rewrite in self._installed or rewrite in self._waiting or rewrite in self._first

    def closed(self, flow: Flow, now: float) -> None:
        """What isn't installed yet never will be; what is lingers."""
        for rewrite in flow.rewrites.values():
            self._cancel(rewrite)
        self.accounting.closed(flow, now)

    def displaced(self, flow: Flow) -> None:
        """Nothing of this flow is installed when this returns."""
        self.withdraw(flow)
        if any(rewrite in self._withdrawn for rewrite in flow.rewrites.values()):
            self._at_once()

    def before_mark(self, rewrite: Rewrite) -> None:
        """The key by which the backend has this is about to change."""
        if rewrite in self._installed or rewrite in self._withdrawn:
            self.displaced(rewrite.flow)

    def _consider_all(self) -> None:
        for flow in self._nat.workers:
            self.changed(flow)


def _is_fit(flow: Flow, half_open: HalfOpen) -> bool:
    """Whether the worker has nothing to learn from this flow's packets but their number."""
    if flow.proto is Proto.UDP:
        return not flow.is_any_port
    if flow.closed_at is not None or flow.tracker.reset or flow.service == flow.server:
        return False
    if flow.is_forwarded:
        return not flow.abort_asked and flow.is_confirmed and not flow.is_over
    return flow.relay is not None or flow in half_open or half_open.admits(flow)


def _begins(rewrite: Rewrite) -> bool:
    """Whether no data of this direction can have come yet: of a connection that has just been
    begun; but for what its client sends, also when tcp-relay has a port towards the server, until
    that is used."""
    flow = rewrite.flow
    if flow.gport is None:
        return False
    towards = flow.rewrites.get(BEGINNING)
    if towards is None:
        return True
    return not towards.packets and rewrite.step is not Step.T1
