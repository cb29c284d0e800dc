"""DNS queries that begin flows by themselves, in the backend.

Which may follows from the settings and from who is traced (learning.py).  The backend tells of
them, and the table hears it (nat/learning.py): in time, or at once where it matters.  What the
worker has with a client's end, its own flows and others' conversations, the backend is told.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from knet.endpoint import Endpoint, Proto
from knet.loop import Loop
from krelay.datapath.policy import Policy
from krelay.nat.dnsflows import Exchange
from krelay.nat.events import IdleObserver
from krelay.nat.flow import DNS_PORT, Flow
from krelay.nat.ownflows import REPLIED
from krelay.nat.table import NatTable
from krelay.offload.backend import FOREVER, OffloadLost
from krelay.offload.carrier import Carrier
from krelay.offload.learning import (
    Learning,
    ends_of,
    is_full,
    learning_for,
    released_by,
    traced_clients,
)
from krelay.trace.lines import Filter
from procfs_sim.tree import Config


class LearntQueries(IdleObserver):
    """Those of one krelay; `lost` is called when the backend doesn't hold what it was given."""

    def __init__(
        self, loop: Loop, nat: NatTable, carrier: Carrier, lost: Callable[[OffloadLost], None]
    ) -> None:
        self._loop = loop
        self._nat = nat
        self._carrier = carrier
        self._lost = lost
        self._learning: Learning | None = None
        """Which queries begin flows by themselves."""
        self._settings: tuple[Config | None, Policy | None] = None, None
        self._traced_clients: frozenset[bytes] | None = frozenset()
        """Whose queries are traced; None: all clients'."""
        nat.observers.add(self)

    # When the backend comes and goes

    def begin(self) -> None:
        """There is a new backend: nothing begins by itself that mustn't."""
        for flow in self._nat.workers:
            if flow.proto is Proto.UDP and flow.service.port == DNS_PORT:
                self.holds_queries(flow)
        for end in self._nat.conversations():
            self.began_own(Proto.UDP, end)
        self._set_learning()

    def leave(self) -> None:
        """The backend is about to go; what it has told is heard before."""
        if (backend := self._carrier.backend) is not None:
            with suppress(OffloadLost):
                backend.learn(None)
            self.needs_queries()

    def end(self) -> None:
        """Relaying has ended."""
        self._learning, self._settings = None, (None, None)

    # Which begin by themselves

    def learn(self, config: Config, policy: Policy | None) -> None:
        """Which queries may begin flows by themselves from now on, under these settings."""
        self._settings = config, policy
        self._learn()

    def rest(self) -> None:
        """None may, until `learn` is called."""
        self._settings = None, None
        self._learn()

    def _learn(self) -> None:
        config, policy = self._settings
        learning = None
        if config is not None and policy is not None and not is_full(self._nat, config):
            learning = learning_for(config, policy, self._traced_clients)
        if learning != self._learning:
            self._learning = learning
            self._set_learning()

    def traced(self, filters: Sequence[Filter]) -> None:
        """Queries of whom one of these admits don't."""
        self._traced_clients = traced_clients(filters)
        self._learn()

    def _set_learning(self) -> None:
        if (backend := self._carrier.at_work) is None:
            return
        self.needs_queries()  # those before were learnt as it was said before
        learning = self._learning
        if learning is not None:
            addresses = frozenset(each.packed for each in learning.addresses)
            self._nat.dns_flows.learns(addresses, learning.server.packed)
        try:
            backend.learn(learning)
        except OffloadLost as error:
            self._lost(error)

    # What the table is told, and asked

    def needs_queries(self) -> None:
        """Takes note of all queries and answers that the kernel has relayed so far."""
        if (backend := self._carrier.backend) is None:
            return
        while exchanges := backend.exchanges():
            self.hear(exchanges)

    def hear(self, exchanges: Iterable[Exchange]) -> None:
        """Takes note of these."""
        self._nat.learning.learn(exchanges, self._loop.now)

    def query_gone(self, query: bytes) -> None:
        """An answer to this goes to the worker."""
        if (backend := self._carrier.at_work) is not None:
            try:
                backend.unlearn(query)
            except OffloadLost as error:
                self._lost(error)

    def holds_queries(self, flow: Flow) -> None:
        """From its ends none begins a flow."""
        self._mind(ends_of(flow), FOREVER)

    def ended(self, flow: Flow) -> None:
        """From its ends one may begin a flow again, unless they have others."""
        if not (ends := released_by(flow, self._nat)):
            return
        if self._nat.own_flows:
            self._mind(ends, self._loop.now + self._loop.absent + REPLIED)
        elif (backend := self._carrier.at_work) is not None:
            try:
                for end in ends:
                    backend.mind_no_more(*end)
            except OffloadLost as error:
                self._lost(error)

    def began_own(self, proto: Proto, end: Endpoint) -> None:
        """What comes from there is no client's query."""
        if proto is Proto.UDP:
            now = self._loop.now + self._loop.absent
            self._mind({end}, now + max(REPLIED, self._nat.timeouts.udp))

    def _mind(self, ends: Iterable[Endpoint], until: float) -> None:
        if (backend := self._carrier.at_work) is None:
            return
        try:
            for end in ends:
                backend.mind(*end, until)
        except OffloadLost as error:
            self._lost(error)
