"""The service of the offload: when flows are offloaded, polled and withdrawn.

The policy decides which (policy.py), the accounting knows what was counted (accounting.py), a
backend holds them (backend.py), and events tell what it has relayed by itself (events.py).  The
rules that look into the maps are put in with all others (daemon/rulekeeper.py), which says so:
`leave` before the maps go, `enter` when they are there.
"""

import errno
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from knet.endpoint import Endpoint
from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from krelay.datapath.policy import Policy
from krelay.host.netfilter import NO_MAPS, Backend
from krelay.nat.events import IdleObserver
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.offload.backend import OffloadBackend, OffloadLost
from krelay.offload.events import KernelEvents, SawUnmatched
from krelay.offload.learning import is_full, learning_for, traced_clients
from krelay.offload.nft import NftBackend
from krelay.offload.policy import OffloadPolicy
from krelay.rules.dnslearning import LEARNT
from krelay.rules.offloaded import steps_offloaded
from krelay.rules.spec import Learning, RuleSpec
from krelay.steps import Step
from krelay.trace.lines import Filter
from procfs_sim.tree import Config

LEAST_CAPACITY, MOST_CAPACITY = 1 << 10, 1 << 18
"""Rewrites that each of the kernel's maps has room for: it takes eleven bytes for each in advance.
What finds no room stays with the worker."""
OFFLOAD_EVERY = 0.01
"""Seconds between looks at what is ripe to be offloaded."""
POLL_EVERY = 0.1
"""Seconds between polls, of a part of the flows each (accounting.py)."""
CHANGES_TOGETHER = 512
"""Rewrites installed, or withdrawn, before packets have their turn: some milliseconds."""
MOST_LOSSES, LOSSES_WITHIN = 5, 60.0
"""So many losses of the kernel's maps within so many seconds, and nothing is offloaded again."""
REFUSALS = (errno.EPERM, errno.EACCES, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)
"""Errors of the socket to nf_tables that another try doesn't fix."""

_log = Log("kernel")


class Offload(IdleObserver):
    """Offloads flows of `nat` to the kernel, by the nft table and the log group of these names.

    `on_lost` is called when the maps aren't as they were left: the rules are to be made afresh.
    `saw_unmatched` is told of a copy of what a server sends past the relaying
    (Worker.saw_elsewhere).
    """

    def __init__(
        self,
        loop: Loop,
        nat: NatTable,
        table: str,
        group: int,
        on_lost: Callable[[], None],
        saw_unmatched: SawUnmatched = lambda head, hook, now: None,
    ) -> None:
        self.policy = OffloadPolicy(nat, self._change_soon, self.withdraw_now)
        self.accounting = self.policy.accounting
        self.events = KernelEvents(loop, nat, group, saw_unmatched)
        self._loop = loop
        self._nat = nat
        self._table = table
        self._on_lost = on_lost
        self._backend: OffloadBackend | None = None
        self._learning: Learning | None = None
        self._traced_clients: frozenset[bytes] | None = frozenset()
        """Whose queries are traced; None: all clients'."""
        self._refused = ""
        """Why the kernel lets us have no maps, for good."""
        self._lost_at: deque[float] = deque(maxlen=MOST_LOSSES)
        self._loss_warning = Throttle()
        self._changing = False
        self._offloading: Timer | None = None
        self._polling: Timer | None = None
        self._steps_before: Counter[Step] = Counter()
        """Packets that the kernel has rewritten by maps which are no more."""
        self._steps_seen: Counter[Step] = Counter()
        """Those by the maps that are, when last asked."""
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
        return min(max(LEAST_CAPACITY, config.limits_flows), MOST_CAPACITY), ""

    def learning(self, config: Config, policy: Policy) -> Learning | None:
        """The queries that the kernel may relay without asking the worker first."""
        if not self.events.tells_queries or is_full(self._nat, config):
            return None
        return learning_for(config, policy, self._traced_clients)

    def condition(self, config: Config) -> Hashable:
        """What `capacity` and `learning` depend on, beside their arguments."""
        is_given_up = len(self._lost_at) == MOST_LOSSES or bool(self._refused)
        tells = self.events.tells_queries
        return is_given_up, tells, self._traced_clients, is_full(self._nat, config)

    # When the rules come and go

    def listen(self) -> None:
        """Takes note of what the kernel does by itself, from now until `close`; forgets former
        losses."""
        self._lost_at.clear()
        self._refused = ""
        self.events.listen()

    def enter(self, spec: RuleSpec, *, afresh: bool) -> int | None:
        """These rules are in force; `afresh`: their maps are empty.

        The netlink port from which the maps will be changed, if that is new.  Raises OSError.
        """
        self._learning = spec.learning
        self.policy.made(steps_offloaded(spec))
        if spec.learning is not None:
            self.events.read_queries()
            addresses = frozenset(each.packed for each in spec.learning.addresses)
            self._nat.dns_flows.learns(addresses, spec.learning.server.packed)
        if not afresh or not spec.room:
            return None
        self.needs_ends()  # a flow that has begun may not begin again
        connect = partial(NftBackend, self._table, spec.room, follows_dscp=spec.follows_dscp)
        try:
            self._backend = connect()
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._backend = connect()  # only what is refused twice is refused
        self.policy.begin(self._backend.capacity)
        return self._backend.port

    def refused(self, error: OSError) -> bool:
        """`enter` failed; whether that is for good, so that every packet visits the worker."""
        if error.errno not in REFUSALS:
            return False
        self._refused = f"the kernel gives no access to maps of flows: {error.strerror}"
        _log.warning("every packet visits krelay", reason=self._refused)
        return True

    def leave(self, *, flows: bool = True) -> None:
        """The maps are about to go: what they have counted is kept, also of `flows` if these stay.

        All flows are withdrawn first, so that nothing is counted after it was read.
        """
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None
        if self._backend is not None:
            if flows:
                changes = self.policy.leave()
                self.policy.told(changes, self._backend.leave(changes.withdrawn), self._loop.now)
            with suppress(OffloadLost):
                self._backend.renew()
                self._totals()
            self._steps_before += self._steps_seen
            self._steps_seen.clear()
            self._backend.close()
            self._backend = None
        self.policy.end()

    def close(self) -> None:
        """Relaying ends."""
        try:
            self.leave(flows=False)
        finally:
            self.events.close()

    # Flows

    def count(self, flows: Iterable[Flow]) -> None:
        """Adds to these flows what the kernel has counted for them, and to all what ended."""
        self.needs_ends()
        if self._backend is None or not (installed := self.accounting.installed_of(flows)):
            return
        try:
            self.accounting.read(self._backend.read(installed), self._loop.now)
        except OffloadLost as error:
            self._lost(error)

    def before_expiry(self, flows: list[Flow]) -> None:
        """As `count`."""
        self.count(flows)

    def needs_ends(self) -> None:
        """Takes note of the SYNs and FINs of tcp-relay's that the kernel has relayed.

        They are read when it matters, and by turns: to wake for each would cost more than to read
        it.
        """
        while copies := self.events.begun():
            self._nat.tracking.begun(copies)
        while copies := self.events.ended():
            self._nat.tracking.ended(copies)

    def steps(self) -> Counter[Step]:
        """Packets that the kernel has rewritten by itself since krelay began, by step."""
        counted = Counter(self._steps_before)
        if self._backend is not None:
            try:
                counted += self._totals()
            except OffloadLost as error:
                self._lost(error)
        return counted

    def trace(self, filters: Sequence[Filter]) -> None:
        """The flows that one of these admits are traced: the worker sees all their packets.

        The rules may have to be changed (`learning`).
        """
        self._traced_clients = traced_clients(filters)
        self.policy.traced(lambda flow: any(each.admits(flow) for each in filters))
        self._change()  # before the rules: until they are changed, packets would be missed

    def change_urgent(self) -> None:
        """What begins is installed before the first packet of it comes."""
        while self.policy.is_urgent and self._backend is not None:
            self._change()

    def withdraw_now(self) -> None:
        """What is to be withdrawn is, when this returns."""
        while self.policy.has_withdrawals:
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
        if self._backend is None:
            return
        changes = self.policy.changes(CHANGES_TOGETHER, now)
        if changes is None:
            return
        try:
            self.policy.told(changes, self._backend.change(changes), self._loop.now)
        except OffloadLost as error:
            self._lost(error)
        if self._polling is None:
            self._poll()

    def _poll(self) -> None:
        self._polling = None
        if self._backend is None or not self.accounting.flows:
            self.needs_ends()
            return
        self.count(self.policy.due(self._loop.now, POLL_EVERY))
        if self._backend is not None:
            with suppress(OffloadLost):  # then `count` finds it out
                self._totals()
        self._polling = self._loop.call_at(self._loop.now + POLL_EVERY, self._poll)

    def _totals(self) -> Counter[Step]:
        assert self._backend is not None
        found: Counter[Step] = Counter()
        for (_, step), packets in self._backend.totals().items():
            found[step] += packets
        self._steps_seen |= found  # another program may have taken counters out, too
        return self._steps_seen

    def _lost(self, error: OffloadLost) -> None:
        """Another program has changed the maps: they are made anew, with all that should be in
        them."""
        now = self._loop.now
        self._lost_at.append(now)
        while self._lost_at[0] < now - LOSSES_WITHIN:
            self._lost_at.popleft()
        if (before := self._loss_warning.admit(now)) is not None:
            _log.warning(
                "the kernel's maps of flows aren't as krelay left them; made anew",
                reason=error,
                again=before or None,
            )
        self._on_lost()

    def learnt_address(self, client: Endpoint) -> bytes | None:
        """The address of this host that was asked, if the kernel has learnt such a query."""
        if self._backend is None or self._learning is None:
            return None
        addresses = dict(zip(LEARNT, self._learning.addresses, strict=False))
        try:
            found = self._backend.learnt(list(addresses), client.addr, client.port.to_bytes(2))
        except OffloadLost as error:
            self._lost(error)
            return None
        return addresses[found].packed if found is not None else None
