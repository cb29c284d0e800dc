"""What the kernel relays by itself, as far as krelay has a part in it.

Two things go from here to the kernel and back: flows that are handed over and what it has counted
for them (fastpath.py decides, kernelmaps.py speaks), and copies of the queries that it learns
(nflog.py, learnt.py).  The rules that look into the maps are put in with all others
(daemon/rulekeeper.py); whoever does that says so: `leave` before the maps go, `enter` when they are
there.
"""

import errno
import select
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network

from knet.endpoint import Endpoint, FlowKey, Proto, Source
from knet.log import Failures, Log, Throttle
from knet.loop import Loop, Timer
from knet.netlink.nflog import TOGETHER, Copy
from knet.networks import collapse, network
from knet.wire import ipv4
from krelay.datapath.worker import Policy
from krelay.host.links import LOOPBACK
from krelay.host.netfilter import NO_MAPS, Backend
from krelay.nat.events import IdleObserver
from krelay.nat.flow import DNS_PORT, Flow
from krelay.nat.table import NatTable
from krelay.offload.copies import Copies
from krelay.offload.fastpath import FastPath
from krelay.offload.kernelmaps import KernelMaps, MapsLost
from krelay.rules.dnslearning import LEARNING_MOST, LEARNT
from krelay.rules.offloaded import steps_offloaded
from krelay.rules.spec import Learning, RuleSpec, begun, ends, strays
from krelay.steps import Step
from krelay.trace.lines import Filter
from procfs_sim.tree import Config

LEAST_ROOM, MOST_ROOM = 1 << 10, 1 << 18
"""Flows that each of the kernel's maps has room for: it takes eleven bytes for each in advance.
What finds no room stays with the worker."""
COPIES_TOGETHER = 2048
"""Copies of packets taken note of before packets have their turn: some milliseconds."""
ENDS_TOGETHER = 256
"""Copies of SYNs or FINs read in one piece."""
HAND_EVERY = 0.01
"""Seconds between looks at what is ripe to be handed over."""
COUNT_EVERY = 0.1
"""Seconds between looks at what the kernel has counted, of a part of the flows each (fastpath)."""
TOLD_TOGETHER = 512
"""Flows handed over, or taken back, before packets have their turn: some milliseconds."""
MOST_LOSSES, LOSSES_WITHIN = 5, 60.0
"""So many losses of the kernel's maps within so many seconds, and nothing is handed over again."""
REFUSALS = (errno.EPERM, errno.EACCES, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)
"""Errors of the socket to nf_tables that another try doesn't fix."""
NO_CLIENTS = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")))
"""Policy.may_be_client."""

SawStray = Callable[[bytes, int, float], Endpoint | None]

_log = Log("kernel")


class KernelPath(IdleObserver):
    """The kernel's part for the flows of `nat`, by the nft table and the log group of these names.

    `on_lost` is called when the maps aren't as they were left: the rules are to be made afresh.
    `saw_stray` is told of a copy of what a server sends past the relaying (Worker.saw_elsewhere).
    """

    def __init__(
        self,
        loop: Loop,
        nat: NatTable,
        table: str,
        group: int,
        on_lost: Callable[[], None],
        saw_stray: SawStray = lambda head, hook, now: None,
    ) -> None:
        self.fast = FastPath(nat, self._tell_soon, self.take_back_now)
        self._loop = loop
        self._nat = nat
        self._table = table
        self._group = group
        self._on_lost = on_lost
        self._saw_stray = saw_stray
        self._maps: KernelMaps | None = None
        self._copies: Copies | None = None
        self._ends: Copies | None = None
        self._begun: Copies | None = None
        self._strays: Copies | None = None
        self._stray_warning = Throttle()
        self._learning: Learning | None = None
        self._traced_clients: frozenset[bytes] | None = frozenset()
        """Whose queries are traced; None: everybody's."""
        self._refused = ""
        """Why the kernel lets us have no maps, for good."""
        self._lost_at: deque[float] = deque(maxlen=MOST_LOSSES)
        self._loss_warning = Throttle()
        self._failures = Failures(_log)
        self._telling = False
        self._handing: Timer | None = None
        self._counting: Timer | None = None
        self._steps_before: Counter[Step] = Counter()
        """Packets that the kernel has rewritten by maps which are no more."""
        self._steps_seen: Counter[Step] = Counter()
        """Those by the maps that are, when last asked."""
        nat.observers.add(self)

    @property
    def tells_ends(self) -> bool:
        """Whether copies of SYNs and FINs are taken."""
        return self._ends is not None and self._begun is not None

    @property
    def tells_strays(self) -> bool:
        """Whether copies of what servers send past the relaying are taken."""
        return self._strays is not None

    @property
    def copies_lost(self) -> int:
        """How often the kernel had more copies for us than there was room for."""
        groups = (self._copies, self._ends, self._begun, self._strays)
        return sum(each.lost for each in groups if each is not None)

    # What the rules are to be

    def room(self, config: Config, backend: Backend | None) -> tuple[int, str]:
        """How many flows the kernel may be handed in each step; if none, why, unless by wish."""
        if config.datapath == "queue":
            return 0, ""
        if backend is None or not backend.has_maps:
            return 0, NO_MAPS
        if self._refused:
            return 0, self._refused
        if len(self._lost_at) == MOST_LOSSES:
            return 0, "the kernel's maps were lost again and again"
        return min(max(LEAST_ROOM, config.limits_flows), MOST_ROOM), ""

    def learning(self, config: Config, policy: Policy) -> Learning | None:
        """The queries that the kernel may relay without asking the worker first.

        None where the worker has more to decide than the kernel can: a source to be changed, a
        rate to be kept, a trace to be shown, a table full of confirmed flows.
        """
        if (
            self._copies is None
            or policy.source is Source.RELAY
            or DNS_PORT not in policy.udp
            or DNS_PORT in policy.any_port
            or config.limits_new_flows_per_client
            or self._traced_clients is None
            or self._is_full(config)
        ):
            return None
        own = sorted(policy.own)
        addresses = [IPv4Address(each) for each in own if each[0] != LOOPBACK]
        if not addresses:  # the network isn't up yet
            return None
        strangers = [network(each) for each in (*own, *policy.backends, *self._traced_clients)]
        strangers += [*policy.beside, *NO_CLIENTS]
        return Learning(
            config.real_ip,
            tuple(addresses[:LEARNING_MOST]),
            collapse(strangers),
        )

    def condition(self, config: Config) -> Hashable:
        """What `room` and `learning` depend on, beside their arguments."""
        is_given_up = len(self._lost_at) == MOST_LOSSES or bool(self._refused)
        return is_given_up, self._copies is None, self._traced_clients, self._is_full(config)

    def _is_full(self, config: Config) -> bool:
        """Of confirmed flows."""
        return len(self._nat) - self._nat.admission.unconfirmed >= config.limits_flows

    # When the rules come and go

    def listen(self) -> None:
        """Takes note of what the kernel does by itself, from now until `close`; forgets former
        losses."""
        self._lost_at.clear()
        self._refused = ""
        self._copies = _copies_of(self._group, TOGETHER)
        if self._copies is not None:
            self._loop.add(self._copies.fileno(), select.EPOLLIN, self._read_copies)
        self._ends = _copies_of(ends(self._group), 1)
        self._begun = _copies_of(begun(self._group), 1)
        self._strays = _copies_of(strays(self._group), 1)
        if self._strays is not None:
            self._loop.add(self._strays.fileno(), select.EPOLLIN, self._read_strays)

    def enter(self, spec: RuleSpec, *, afresh: bool) -> int | None:
        """These rules are in force; `afresh`: their maps are empty.

        The netlink port from which the maps will be changed, if that is new.  Raises OSError.
        """
        self._learning = spec.learning
        self.fast.made(steps_offloaded(spec))
        if spec.learning is not None:
            self._read_copies()
            addresses = frozenset(each.packed for each in spec.learning.addresses)
            self._nat.dns_flows.learns(addresses, spec.learning.server.packed)
        if not afresh or not spec.room:
            return None
        self._read_ends()  # who has begun may not begin again
        connect = partial(KernelMaps, self._table, follows_dscp=spec.follows_dscp)
        try:
            self._maps = connect()
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._maps = connect()  # only what is refused twice is refused
        self.fast.begin(spec.room)
        return self._maps.port

    def refused(self, error: OSError) -> bool:
        """`enter` failed; whether that is for good, so that every packet visits the worker."""
        if error.errno not in REFUSALS:
            return False
        self._refused = f"the kernel gives no access to maps of flows: {error.strerror}"
        _log.warning("every packet visits krelay", reason=self._refused)
        return True

    def leave(self, *, flows: bool = True) -> None:
        """The maps are about to go: what they have counted is kept, also of `flows` if these stay.

        All flows are taken back first, so that nothing is counted after it was read.
        """
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None
        if self._maps is not None:
            if flows:
                changes = self.fast.leave()
                self.fast.told(changes, self._maps.leave(changes.back), self._loop.now)
            with suppress(MapsLost):
                self._maps.renew()
                self._totals()
            self._steps_before += self._steps_seen
            self._steps_seen.clear()
            self._maps.close()
            self._maps = None
        self.fast.end()

    def close(self) -> None:
        """Relaying ends."""
        try:
            self.leave(flows=False)
        finally:
            if self._copies is not None:
                self._read_copies()
                self._loop.remove(self._copies.fileno())
            if self._strays is not None:
                self._loop.remove(self._strays.fileno())
            for copies in (self._copies, self._ends, self._begun, self._strays):
                if copies is not None:
                    copies.close()
            self._copies = self._ends = self._begun = self._strays = None

    # Flows

    def count(self, flows: Iterable[Flow]) -> None:
        """Adds to these flows what the kernel has counted for them, and to all what ended."""
        self._read_ends()
        if self._maps is None or not (handed := self.fast.handed(flows)):
            return
        try:
            self.fast.read(self._maps.read(handed), self._loop.now)
        except MapsLost as error:
            self._lost(error)

    def before_expiry(self, flows: list[Flow]) -> None:
        """As `count`."""
        self.count(flows)

    def needs_ends(self) -> None:
        """What the kernel has copied of SYNs and FINs is taken note of."""
        self._read_ends()

    def steps(self) -> Counter[Step]:
        """Packets that the kernel has rewritten by itself since krelay began, by step."""
        counted = Counter(self._steps_before)
        if self._maps is not None:
            try:
                counted += self._totals()
            except MapsLost as error:
                self._lost(error)
        return counted

    def trace(self, filters: Sequence[Filter]) -> None:
        """The flows that one of these admits are traced: the worker sees all their packets.

        The rules may have to be changed (`learning`).
        """
        queries = [each for each in filters if each.may_admit(Proto.UDP, DNS_PORT)]
        clients = [each.client_addr for each in queries if each.client_addr is not None]
        self._traced_clients = frozenset(clients) if len(clients) == len(queries) else None
        self.fast.traced(lambda flow: any(each.admits(flow) for each in filters))
        self._tell()  # before the rules: until they are changed, packets would be missed

    def hurry(self) -> None:
        """The kernel has what begins before the first packet of it comes."""
        while self.fast.hurries and self._maps is not None:
            self._tell()

    def take_back_now(self) -> None:
        """The kernel has nothing any more that it is to give back."""
        while self.fast.gives_back:
            self._tell()

    def _tell_soon(self) -> None:
        """What is to be taken back is in this turn of the loop, and what begins is handed over;
        the rest when it is ripe."""
        if self.fast.hurries and not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)
        if self._handing is None:
            self._handing = self._loop.call_at(self._loop.now + HAND_EVERY, self._hand)

    def _hand(self) -> None:
        self._handing = None
        self._tell(self._loop.now)
        if self.fast.waits:
            self._tell_soon()

    def _tell(self, now: float | None = None) -> None:
        """What is to be taken back is, and what is ripe handed over; without `now` only what
        can't wait.  Many at a time."""
        self._telling = False
        if self._maps is None:
            return
        changes = self.fast.changes(TOLD_TOGETHER, now)
        if changes is None:
            return
        try:
            self.fast.told(changes, self._maps.change(changes), self._loop.now)
        except MapsLost as error:
            self._lost(error)
        if self._counting is None:
            self._count_by_turns()

    def _count_by_turns(self) -> None:
        self._counting = None
        if self._maps is None or not self.fast.flows:
            self._read_ends()
            return
        self.count(self.fast.due(self._loop.now, COUNT_EVERY))
        if self._maps is not None:
            with suppress(MapsLost):  # then `count` finds it out
                self._totals()
        self._counting = self._loop.call_at(self._loop.now + COUNT_EVERY, self._count_by_turns)

    def _totals(self) -> Counter[Step]:
        assert self._maps is not None
        found: Counter[Step] = Counter()
        for (_, step), packets in self._maps.totals().items():
            found[step] += packets
        self._steps_seen |= found  # somebody may have taken counters out, too
        return self._steps_seen

    def _lost(self, error: MapsLost) -> None:
        """Somebody has changed the maps: they are made anew, with all that should be in them."""
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

    # Queries

    def _read_copies(self, _: int = 0) -> None:
        """What the kernel tells of queries and answers that it has relayed."""
        if copies := self._read(self._copies, COPIES_TOGETHER):
            self._nat.learning.learn(copies, self._loop.now)

    def _read_ends(self) -> None:
        """What the kernel tells of SYNs and FINs of tcp-relay's that it has relayed.

        It is read when it matters, and by turns: to wake for each would cost more than to read it.
        """
        while copies := self._read(self._begun, ENDS_TOGETHER):
            self._nat.tracking.begun(copies)
        while copies := self._read(self._ends, ENDS_TOGETHER):
            self._nat.tracking.ended(copies)

    def _read_strays(self, _: int = 0) -> None:
        """What servers send from ports that nobody has asked: clients wait for it in vain."""
        for hook, head in self._read(self._strays, ENDS_TOGETHER):
            asked = self._saw_stray(head, hook, self._loop.now) if head[9] == Proto.UDP else None
            if asked is None or (before := self._stray_warning.admit(self._loop.now)) is None:
                continue
            _log.warning(
                "a server answers from another port than it was asked at",
                service=f"udp/{asked.port}",
                server=FlowKey.unpack(head[ipv4.FLOW_KEY]).src,
                again=before or None,
                fix=f"write udp/{asked.port}+any-port into services, if that is its way (TFTP)",
            )

    def _read(self, source: Copies | None, most: int) -> list[Copy]:
        """Those that wait, about so many.  What can't be read now is read the next time."""
        if source is None:
            return []
        try:
            return source.read(most)
        except OSError as error:
            self._failures.tell(self._loop.now, "copies can't be read; trying again", error)
            return []

    def learnt_address(self, client: Endpoint) -> bytes | None:
        """The address of this host that was asked, if the kernel has learnt such a query."""
        if self._maps is None or self._learning is None:
            return None
        addresses = dict(zip(LEARNT, self._learning.addresses, strict=False))
        try:
            found = self._maps.learnt(list(addresses), client.addr, client.port.to_bytes(2))
        except MapsLost as error:
            self._lost(error)
            return None
        return addresses[found].packed if found is not None else None


def _copies_of(group: int, together: int) -> Copies | None:
    try:
        return Copies(group, together=together)
    except OSError as error:
        _log.info("the kernel can't copy packets' heads", group=group, reason=error)
        return None
