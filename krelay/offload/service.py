"""The service of the offload: when flows are offloaded, polled and withdrawn.

The policy decides which (policy.py), the accounting knows what was counted (accounting.py), and a
carrier has a backend hold them (carrier.py, backend.py).  DNS queries begin flows by themselves
there, where they may (queries.py).

The rules come first, since a packet that the programs have marked must not be queued.  When these
are in (`enter`), a backend is made, filled and attached; then a rule may ask it which packets are
to go past the queue (carrier.py).  It ends the other way round.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress

from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from krelay.host.netfilter import NO_MAPS, Backend
from krelay.nat.events import IdleObserver
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.offload.accounting import StepTotals
from krelay.offload.backend import OffloadLost
from krelay.offload.carrier import Carrier
from krelay.offload.events import KernelEvents, SawUnmatched
from krelay.offload.learning import is_full
from krelay.offload.policy import OffloadPolicy
from krelay.offload.queries import LearntQueries
from krelay.rules.spec import RuleSpec
from krelay.steps import Step
from krelay.trace.lines import Filter
from procfs_sim.tree import Config

LEAST_CAPACITY, MOST_CAPACITY = 1 << 10, 1 << 18
"""Rewrites that the kernel has room for in each step.  What finds none stays with the worker."""
OFFLOAD_EVERY = 0.01
"""Seconds between looks at what is ripe to be offloaded."""
POLL_EVERY = 0.1
"""Seconds between polls, of a part of the flows each (accounting.py)."""
CHANGES_TOGETHER = 512
"""Rewrites installed, or withdrawn, before packets have their turn: some milliseconds."""
MOST_LOSSES, LOSSES_WITHIN = 5, 60.0
"""So many losses of the kernel's maps within so many seconds, and nothing is offloaded again."""
_log = Log("kernel")


class Offload(IdleObserver):
    """Offloads flows of `nat` to the kernel, beside the rules of this name and queue.

    `on_refused` is called when nothing is to be offloaded any more: the rules are to be changed.
    `saw_unmatched` is told of a copy of what a server sends past the relaying
    (Worker.saw_elsewhere).
    """

    def __init__(
        self,
        loop: Loop,
        nat: NatTable,
        name: str,
        queue: int,
        on_refused: Callable[[], None],
        saw_unmatched: SawUnmatched = lambda head, hook, now: None,
    ) -> None:
        self.policy = OffloadPolicy(nat, self._change_soon, self.withdraw_now)
        self.accounting = self.policy.accounting
        self.events = KernelEvents(loop, queue, saw_unmatched)
        self._carrier = Carrier(
            loop, name, self._never, self._lost, lambda exchanges: self.queries.hear(exchanges)
        )
        self.queries = LearntQueries(loop, nat, self._carrier, self._lost)
        self._loop = loop
        self._nat = nat
        self._on_refused = on_refused
        self._spec: RuleSpec | None = None
        """The rules in force."""
        self._refused = ""
        """Why nothing can be offloaded, for good."""
        self._lost_at: deque[float] = deque(maxlen=MOST_LOSSES)
        self._loss_warning = Throttle()
        self._told_lost = 0
        """What found no room to be told, of former backends."""
        self._changing = False
        self._offloading: Timer | None = None
        self._polling: Timer | None = None
        self._steps = StepTotals()
        nat.observers.add(self)

    # What the rules are to be

    def capacity(self, config: Config, backend: Backend | None) -> tuple[int, str]:
        """How many rewrites of each step may be offloaded; if none, why, unless by wish."""
        if config.datapath == "queue":
            return 0, ""
        if backend is None or not backend.has_maps:
            return 0, NO_MAPS
        if self._refused:
            return 0, self._refused
        if len(self._lost_at) == MOST_LOSSES:
            return 0, "the kernel's maps were lost again and again"
        room = min(max(LEAST_CAPACITY, config.limits_flows), MOST_CAPACITY)
        self._carrier.load(room)
        return (0, self._refused) if self._refused else (room, "")

    @property
    def is_asked(self) -> bool:
        """Whether there is a rule that asks the programs."""
        return self._carrier.is_asked

    def _never(self, reason: str) -> None:
        """Nothing is offloaded until relaying is started anew."""
        self._refused = reason
        _log.warning("every packet visits krelay", reason=reason)
        self._loop.call_soon(self._on_refused)

    def condition(self, config: Config) -> Hashable:
        """What `capacity` and `learn` depend on, beside their arguments."""
        is_given_up = len(self._lost_at) == MOST_LOSSES or bool(self._refused)
        return is_given_up, is_full(self._nat, config)

    # When the rules come and go

    def listen(self) -> None:
        """Takes note of what the kernel does by itself, from now until `close`; forgets former
        losses."""
        self._lost_at.clear()
        self._refused = ""
        self.events.listen()

    def enter(self, spec: RuleSpec, *, afresh: bool) -> None:
        """These rules are in force; `afresh`: their chains are empty."""
        self._spec = spec
        carrier = self._carrier
        if carrier.backend is not None and carrier.backend.capacity != spec.room:
            self._leave()
        if afresh:
            carrier.is_asked = False
        if not spec.room:
            carrier.detach()
        elif self._refused:
            return
        elif carrier.backend is None:
            self._begin(spec)
        elif carrier.at_work is not None:
            carrier.ask()

    def _begin(self, spec: RuleSpec) -> None:
        """Makes a backend, with all that should be in it."""
        self.needs_ends()  # a flow that has begun may not begin again
        if (backend := self._carrier.make(spec.room)) is not None:
            self.policy.begin(backend.capacity)
            self.change_urgent()
            self.queries.begin()
            self._carrier.attach()

    def _leave(self) -> None:
        """There is no backend any more.  What it has counted is kept: the rules send its packets to
        the worker, then all flows are withdrawn, so that nothing is counted after it was read."""
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None
        self._carrier.ask_no_more()
        if (backend := self._carrier.backend) is not None:
            self.queries.leave()
            self.needs_ends()
            changes = self.policy.leave()
            self.policy.told(changes, backend.leave(changes.withdrawn), self._loop.now)
            with suppress(OffloadLost):
                self._steps.read(backend)
                self._told_lost += backend.lost
            self._steps.gone()
            self._carrier.drop()
        self.policy.end()

    def close(self) -> None:
        """Relaying ends."""
        try:
            self._leave()
        finally:
            self._carrier.close()
            self._spec = None
            self.queries.end()
            self.events.close()

    # Flows

    def count(self, flows: Iterable[Flow]) -> None:
        """Adds to these flows what the kernel has counted for them, and to all what ended."""
        self.needs_ends()
        self.queries.needs_queries()
        backend = self._carrier.at_work
        if backend is None or not (installed := self.accounting.installed_of(flows)):
            return
        try:
            self.accounting.read(backend.read(installed), self._loop.now)
        except OffloadLost as error:
            self._lost(error)

    def before_expiry(self, flows: list[Flow]) -> None:
        """As `count`."""
        self.count(flows)

    def needs_ends(self) -> None:
        """Takes note of the SYNs, FINs and RSTs of tcp-relay's that the kernel has relayed.

        They are read when it matters, and by turns: to wake for each would cost more than to read
        it.
        """
        if (backend := self._carrier.backend) is None:
            return
        tracking, now = self._nat.tracking, self._loop.now
        while packets := backend.own_packets():
            for each in packets:
                tracking.relayed(each.key, each.flags, each.seq, now)

    def steps(self) -> Counter[Step]:
        """Packets that the kernel has rewritten by itself since krelay began, by step."""
        try:
            self._steps.read(self._carrier.backend)
        except OffloadLost as error:
            self._lost(error)
        return self._steps.sum()

    @property
    def lost(self) -> int:
        """How often the kernel had more to tell than there was room for, since krelay began."""
        found = self._told_lost + self.events.lost
        if (backend := self._carrier.at_work) is not None:
            with suppress(OffloadLost):
                found += backend.lost
        return found

    def trace(self, filters: Sequence[Filter]) -> None:
        """The flows that one of these admits are traced: the worker sees all their packets.

        So are queries of theirs that don't begin a flow by themselves for that.
        """
        self.policy.traced(lambda flow: any(each.admits(flow) for each in filters))
        self._change()
        self.queries.traced(filters)

    def change_urgent(self) -> None:
        """What begins is installed before the first packet of it comes."""
        while self.policy.is_urgent and self._carrier.at_work is not None:
            self._change()

    def withdraw_now(self) -> None:
        """What is to be withdrawn is, when this returns."""
        while self.policy.has_withdrawals and self._carrier.at_work is not None:
            self._change()

    def _change_soon(self) -> None:
        """What is to be withdrawn is in this turn of the loop, and what begins is installed; the
        rest when it is ripe."""
        if self.policy.is_urgent and not self._changing:
            self._changing = True
            self._loop.call_soon(self._change)
        if self._offloading is None:
            self._offloading = self._loop.call_at(self._loop.now + OFFLOAD_EVERY, self._offload)

    def _offload(self) -> None:
        self._offloading = None
        self._change(self._loop.now)
        if self.policy.waits:
            self._change_soon()

    def _change(self, now: float | None = None) -> None:
        """What is to be withdrawn is, and what is ripe installed; without `now` only what can't
        wait.  Many at a time."""
        self._changing = False
        if self._carrier.at_work is None:
            return
        self.needs_ends()  # what has begun must not get leave to begin again
        changes = self.policy.changes(CHANGES_TOGETHER, now)
        if changes is None:
            return
        try:
            self.policy.told(changes, self._carrier.at_work.change(changes), self._loop.now)
        except OffloadLost as error:
            self._lost(error)
            return
        if self._polling is None:
            self._poll()

    def _poll(self) -> None:
        self._polling = None
        if self._carrier.at_work is None or not self.accounting.flows:
            self.needs_ends()
            return
        self.count(self.policy.due(self._loop.now, POLL_EVERY))
        if self._carrier.at_work is not None:
            with suppress(OffloadLost):  # then `count` finds it out
                self._steps.read(self._carrier.backend)
        self._polling = self._loop.call_at(self._loop.now + POLL_EVERY, self._poll)

    def _lost(self, error: OffloadLost) -> None:
        """Another program has changed what the kernel has of ours: it is made anew, with all that
        should be there."""
        now = self._loop.now
        self._carrier.is_lost = True
        self._lost_at.append(now)
        while self._lost_at[0] < now - LOSSES_WITHIN:
            self._lost_at.popleft()
        if (before := self._loss_warning.admit(now)) is not None:
            _log.warning(
                "what the kernel has of flows isn't as krelay left it; made anew",
                reason=error,
                again=before or None,
            )
        self._loop.call_soon(self._make_anew)

    def _make_anew(self) -> None:
        if not self._carrier.is_lost or self._carrier.backend is None:
            return
        self._leave()
        if len(self._lost_at) == MOST_LOSSES:
            self._on_refused()
        elif self._spec is not None and self._spec.room:
            self._begin(self._spec)
