"""What the NAT table tells of its flows, and what it asks, while packets are handled.

An observer is an object with the methods of NatObserver: the offload, which keeps a copy of the
flows in the kernel, is one; metrics or a second relay would be others.  Most observers care for a
few of the events, and inherit the rest from IdleObserver.

Each call is made in the midst of a change of the table, so an observer may read the table and may
call `FlowTracking.heard` or, where DNS flows are asked for, `DnsLearning.learn`, but must neither
make nor end other flows, and raises nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from knet.endpoint import Endpoint, Proto
from krelay.nat.flow import Flow, Rewrite


class NatObserver(Protocol):
    """Is told of what becomes of flows, and asked for what has been counted elsewhere."""

    def changed(self, flow: Flow) -> None:
        """A flow's state has changed, or its port towards the server, or it is busy."""

    def marked(self, flow: Flow) -> None:
        """An end of terminated TCP sends with another DSCP (`Flow.dscps`)."""

    def closed(self, flow: Flow, now: float) -> None:
        """Both legs of a flow have been closed."""

    def ended(self, flow: Flow) -> None:
        """A flow is about to go, or to give up its port towards the server."""

    def displaced(self, flow: Flow) -> None:
        """Another flow's packets are about to read as those of this flow do.  When this returns,
        nothing but the worker may rewrite such packets."""

    def before_mark(self, rewrite: Rewrite) -> None:
        """An end's packets are about to have another DSCP than before."""

    def before_expiry(self, flows: list[Flow]) -> None:
        """These flows are about to go for their silence, or are judged by what was heard of them:
        an observer tells now what it has counted (`FlowTracking.heard`)."""

    def needs_rules(self) -> None:
        """A flow needs something of the rules that no flow needed before."""

    def needs_ends(self) -> None:
        """It matters now how far tcp-relay's connections have come: an observer tells it
        (`FlowTracking.begun`, `FlowTracking.ended`)."""

    def needs_queries(self) -> None:
        """It matters now which DNS flows the kernel has begun: an observer tells it
        (`DnsLearning.learn`)."""

    def query_gone(self, query: bytes) -> None:
        """The kernel is not to answer this query by itself any more, if it still would."""

    def holds_queries(self, flow: Flow) -> None:
        """The worker has a flow of this client's queries: until it has ended no other begins from
        the ends that it has at the server."""

    def began_own(self, proto: Proto, end: Endpoint) -> None:
        """What comes from this end, whoever's it is, begins no flow for a while: this host, or the
        client itself, has a conversation of its own there."""


class IdleObserver(NatObserver):
    """Cares for nothing: to be inherited from."""

    def changed(self, flow: Flow) -> None:
        return

    def marked(self, flow: Flow) -> None:
        return

    def closed(self, flow: Flow, now: float) -> None:
        return

    def ended(self, flow: Flow) -> None:
        return

    def displaced(self, flow: Flow) -> None:
        return

    def before_mark(self, rewrite: Rewrite) -> None:
        return

    def before_expiry(self, flows: list[Flow]) -> None:
        return

    def needs_rules(self) -> None:
        return

    def needs_ends(self) -> None:
        return

    def needs_queries(self) -> None:
        return

    def query_gone(self, query: bytes) -> None:
        return

    def holds_queries(self, flow: Flow) -> None:
        return

    def began_own(self, proto: Proto, end: Endpoint) -> None:
        return


class Observers(NatObserver):
    """Passes each event on to those of its observers that care for it, in the order in which they
    were added."""

    def __init__(self, observers: Iterable[NatObserver] = ()) -> None:
        self._told: dict[str, tuple[Callable[..., Any], ...]] = dict.fromkeys(_EVENTS, ())
        for observer in observers:
            self.add(observer)

    def add(self, observer: NatObserver) -> None:
        """It is told from now on, after those that were there before."""
        for event in _EVENTS:
            method = getattr(observer, event)
            if getattr(method, "__func__", None) is not getattr(IdleObserver, event):
                self._told[event] += (method,)

    def changed(self, flow: Flow) -> None:
        for tell in self._told["changed"]:
            tell(flow)

    def marked(self, flow: Flow) -> None:
        for tell in self._told["marked"]:
            tell(flow)

    def closed(self, flow: Flow, now: float) -> None:
        for tell in self._told["closed"]:
            tell(flow, now)

    def ended(self, flow: Flow) -> None:
        for tell in self._told["ended"]:
            tell(flow)

    def displaced(self, flow: Flow) -> None:
        for tell in self._told["displaced"]:
            tell(flow)

    def before_mark(self, rewrite: Rewrite) -> None:
        for tell in self._told["before_mark"]:
            tell(rewrite)

    def before_expiry(self, flows: list[Flow]) -> None:
        for tell in self._told["before_expiry"]:
            tell(flows)

    def needs_rules(self) -> None:
        for tell in self._told["needs_rules"]:
            tell()

    def needs_ends(self) -> None:
        for tell in self._told["needs_ends"]:
            tell()

    def needs_queries(self) -> None:
        for tell in self._told["needs_queries"]:
            tell()

    def query_gone(self, query: bytes) -> None:
        for tell in self._told["query_gone"]:
            tell(query)

    def holds_queries(self, flow: Flow) -> None:
        for tell in self._told["holds_queries"]:
            tell(flow)

    def began_own(self, proto: Proto, end: Endpoint) -> None:
        for tell in self._told["began_own"]:
            tell(proto, end)


_EVENTS = [name for name in vars(IdleObserver) if not name.startswith("_")]
