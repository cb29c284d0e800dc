"""What krelay answers to tcp-relay: the relay socket's requests against the NAT table.

A tcp-relay is believed as little as will do: it may be another program by now.  What it asks is
bounded by what krelay knows itself:

    open     a client whose handshake was seen, at a gateway port where this tcp-relay listens, and
             whom no other tcp-relay has; from an address of this host, and a port of no other flow
    resume   a flow whose own tcp-relay was lost a moment ago, by one of the same user; or, for some
             seconds after krelay was started over a killed one, a connection that this host's
             kernel says a process of this user has, with values that were in force together
             (inforce.py), in place of no other
    close    flows of its own

A flow belongs to the connection of the relay socket on which it was opened or resumed; when that
connection is lost, tcp-relay has ended (then the kernel resets the legs of its connections, and
these resets still pass through the flows) or it will be back and resume them.  After ORPHAN_GRACE,
flows that no tcp-relay has resumed are closed.

What tcp-relays report is summed up over all that there have been: one that is gone has still
counted, so that totals never go backwards, but has nothing open.  A worker that comes back repeats
what it has told before, so the gone are remembered one by one; only of the oldest, which won't come
back, no more than their sum is kept.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from knet.endpoint import Endpoint, Proto, Source, flow_key
from knet.wire import ipv4
from krelay.datapath.policy import Policy
from krelay.nat.admission import Refusal
from krelay.nat.events import IdleObserver
from krelay.nat.flow import PAST_LEG, Flow
from krelay.nat.mappings import PortTaken
from krelay.nat.ports import FIRST_HIGH
from krelay.nat.table import NatTable
from krelay.registration.inforce import MOST, InForce
from krelay.registration.messages import (
    COUNTERS,
    GAUGES,
    MAX_COUNTS,
    NO_ADDRESS,
    PORT_TAKEN,
    Abort,
    Answer,
    Close,
    Marked,
    Open,
    Opened,
    Refused,
    Report,
    Request,
    Resume,
    Resumed,
)
from krelay.steps import Hook, Step

ORPHAN_GRACE = 5.0
"""Seconds."""

ABORT_WITHIN = 5.0
"""Seconds that a tcp-relay may take to reset a connection that was ended; then its flow is closed,
whatever it does."""

GPORTS_KEPT = 64
"""Gateway ports for which a tcp-relay may ask, of those at which it has listened; the latest."""

GONE_KEPT = 256
"""Workers that are remembered after they have gone; more than are ever connected at once."""

Send = Callable[[Answer], object]
"""Sends to one tcp-relay; also its identity."""


class SocketOwners(Protocol):
    """Which processes of this host have which TCP connections, as the kernel knows it
    (knet.socketdiag.SocketDiag)."""

    def carrier(self, local: Endpoint, remote: Endpoint, may_open: bool = False) -> int | None:
        """The uid of its owner; `may_open`: also one that isn't answered yet.  None: no process.

        Raises OSError if that can't be known.
        """

    def carriers(self, ends: Sequence[tuple[Endpoint, Endpoint]]) -> list[int | None]:
        """The same of many, the own ends first; None also where it can't be known."""


@dataclass(slots=True)
class _Link:
    """What is known of a tcp-relay that is connected."""

    uid: int
    gports: dict[int, None] = field(default_factory=dict)
    """Where it has listened, in that order."""


class Relays(IdleObserver):
    """The tcp-relays that are connected, and which flow is whose.

    `policy` is what new flows get now, None while nothing is relayed.
    """

    def __init__(
        self,
        nat: NatTable,
        policy: Callable[[], Policy | None],
        kernel: SocketOwners,
    ) -> None:
        self.before_answers: Callable[[], object] = lambda: None
        """To be called when requests were handled, before their answers are sent."""
        self.asks_host: Callable[[bytes, float], bool | None] = lambda address, now: False
        """Whether this host has an address that isn't among the known ones (Worker.asks_host)."""
        self.resumable_until = 0.0
        """Until then, connections that a killed krelay had are resumed."""
        self.in_force: list[InForce] = []
        """What those may have begun with, the latest last."""
        self._nat = nat
        nat.observers.add(self)
        self._policy = policy
        self._kernel = kernel
        self._links: dict[Send, _Link] = {}
        self._owner: dict[int, Send] = {}
        self._orphans: list[tuple[float, int, frozenset[int]]] = []
        """Until when, of which user, which flows."""
        self._aborted: list[tuple[float, int]] = []
        self._reports = Reports()

    @property
    def totals(self) -> dict[str, int]:
        """As Reports.totals."""
        return self._reports.totals()

    def remember(self, in_force: InForce) -> None:
        """From now on connections begin with these."""
        if in_force in self.in_force:
            self.in_force.remove(in_force)
        self.in_force.append(in_force)
        del self.in_force[:-MOST]

    def joined(self, send: Send, uid: int) -> None:
        """A tcp-relay of this user has connected."""
        self._links[send] = _Link(uid)

    def listens(self, send: Send, gport: int) -> None:
        """It has handed over its listening socket for this gateway port."""
        gports = self._links[send].gports
        gports.pop(gport, None)
        gports[gport] = None
        if len(gports) > GPORTS_KEPT:
            del gports[next(iter(gports))]

    def expect(self, requests: Iterable[object], send: Send) -> None:
        """These will be handled next, from there: whether their clients have completed their
        handshakes the kernel is asked once for all."""
        flows, ends = [], []
        for each in requests:
            if isinstance(each, Open):
                flow = self._nat.mappings.accepted(each.client, each.gport)
                if flow is not None and not flow.tracker.client_acked:
                    flows.append(flow)
                    ends.append((Endpoint(flow.service.addr, each.gport), each.client))
        if not flows or (link := self._links.get(send)) is None:
            return
        for flow, uid in zip(flows, self._kernel.carriers(ends), strict=True):
            if uid == link.uid:
                self._nat.tracking.shook_hands(flow)

    def handle(self, request: Request, send: Send, now: float) -> Answer | None:
        """The answer to a request that came from there, but for those that come with sockets."""
        match request:
            case Open() | Resume() if not _is_ipv4(request):
                return Refused(request.id, "only IPv4 addresses are relayed")
            case Open():
                return self._open(request, send, now)
            case Resume():
                return self._resume(request, send, now)
            case Close(relay=relay):
                return self._close(relay, send, now)
            case Report():
                self._reports.told(request, send)
        return None

    def lost(self, send: Send, now: float) -> None:
        """That connection is gone."""
        self._reports.lost(send)
        link = self._links.pop(send, None)
        flows = [flow_id for flow_id, owner in self._owner.items() if owner is send]
        self._nat.observers.needs_ends()
        for flow_id in flows:
            del self._owner[flow_id]
            if (flow := self._nat.of_id(flow_id)) is not None:
                self._nat.orphaned(flow)
        if flows and link is not None:
            self._orphans.append((now + ORPHAN_GRACE, link.uid, frozenset(flows)))

    def abort(self, flow: Flow, now: float) -> None:
        """Has both legs of a connection reset; its flow ends when that is done.

        A flow whose client hasn't completed its handshake has no legs, and ends at once.
        """
        self._nat.observers.before_expiry([flow])
        flow.abort_asked = True
        owner = self._owner.get(flow.id)
        if owner is not None and flow.relay is not None:
            self._aborted.append((now + ABORT_WITHIN, flow.id))
            owner(Abort(flow.relay))
        elif flow.relay is not None:
            self._nat.close(flow, now)
        elif not flow.tracker.client_acked:
            self._nat.end(flow)  # tcp-relay doesn't know of it yet, and never will
        # Without a relay port tcp-relay hasn't asked yet: `open` will be refused, which resets
        # the client through this flow.

    def marked(self, flow: Flow) -> None:
        """An end of this flow sends with another DSCP: its tcp-relay sets that on the other leg."""
        owner = self._owner.get(flow.id)
        if owner is not None and flow.relay is not None:
            owner(Marked(flow.relay, flow.dscps))

    def on_time(self, now: float) -> None:
        """Closes what no tcp-relay has come back for, and forgets flows that are no more."""
        while self._orphans and self._orphans[0][0] <= now:
            for flow_id in self._orphans.pop(0)[2]:
                flow = self._nat.of_id(flow_id)
                if flow is not None and flow_id not in self._owner:
                    self._nat.close(flow, now)
        while self._aborted and self._aborted[0][0] <= now:
            if (flow := self._nat.of_id(self._aborted.pop(0)[1])) is not None:
                self._nat.close(flow, now)
        if len(self._owner) > len(self._nat):  # some have ended; not looked for every second
            for flow_id in [i for i in self._owner if self._nat.of_id(i) is None]:
                del self._owner[flow_id]

    def _open(self, request: Open, send: Send, now: float) -> Answer:
        link, policy = self._links.get(send), self._policy()
        flow = self._nat.mappings.accepted(request.client, request.gport)
        if flow is not None and not flow.tracker.client_acked:
            # what the kernel rewrote by itself may be news
            self._nat.observers.before_expiry([flow])
        if flow is None or not flow.tracker.client_acked:
            return Refused(request.id, "no row for this client")
        if link is None or request.gport not in link.gports:
            return Refused(request.id, "the listening socket was not handed over")
        is_anothers = self._owner.get(flow.id, send) is not send
        if is_anothers or (flow.orphaned and not self._may_have(flow, send)):
            return Refused(request.id, "another tcp-relay has this client")
        if policy is None or not self._is_own(request.relay.addr, policy, now):
            return Refused(request.id, NO_ADDRESS)
        if flow.called_again:
            # It has had its server: this is another connection between the same ports, whose SYN
            # came before krelay knew that the former was over.
            try:
                flow = self._nat.succeed(flow, now)
            except Refusal as refusal:
                return Refused(request.id, refusal.reason)
        flow.accepted = True
        if flow.abort_asked or flow.closed_at is not None:
            self._nat.close(flow, now)
            return Refused(request.id, "the flow was ended")
        try:
            self._nat.attach(flow, request.relay, now, services=policy.tcp)
        except PortTaken:
            self._nat.detach(flow)  # it may have had another port before
            return Refused(request.id, PORT_TAKEN)
        self._has(flow, send)
        origin = flow.client if flow.client != request.client else None
        seen = flow.seen
        if seen is not None and seen.port == request.relay.port:
            seen = None
        return Opened(request.id, flow.server, flow.source, origin, seen, flow.dscps)

    def _resume(self, request: Resume, send: Send, now: float) -> Answer:
        known = self._nat.mappings.of_relay_port(request.relay)
        if known is not None and _is_same(known, request):
            if not self._may_have(known, send):
                return Refused(request.id, "can't be resumed: another tcp-relay has it")
            self._has(known, send)  # the socket was lost, not the table
            return Resumed(request.id, known.dscps)
        other = self._nat.mappings.accepted(request.client, request.gport)
        if other is not None and other.closed_at is None:
            return Refused(request.id, "can't be resumed: another flow has this client")
        service = request.service or Endpoint(request.relay.addr, request.server.port)
        origin = request.origin or request.client
        policy = self._policy()
        source = request.source or (policy.source_for(request.client.addr) if policy else None)
        if now >= self.resumable_until or policy is None or source is None:
            return Refused(request.id, "can't be resumed: krelay has no flow of it")
        wrong = self._never_was(request, service, origin, source, policy, send, now)
        if wrong is not None:
            return Refused(request.id, f"can't be resumed: {wrong}")
        flow: Flow | None = None
        try:
            flow = self._nat.open_tcp(
                origin,
                service,
                request.server,
                source,
                request.gport,
                now,
                inside=request.client,
            )
            seen = request.seen or request.relay
            self._nat.attach(flow, request.relay, now, seen=seen.port)
        except (Refusal, PortTaken) as refusal:
            if flow is not None:
                self._nat.end(flow)
            return Refused(request.id, f"can't be resumed: {refusal}")
        flow.accepted = True
        flow.tracker.resumed()
        flow.leg = PAST_LEG
        for step in (Step.T1, Step.T2, Step.T3, Step.T4):
            flow.rewrites[step].watched = False
        self._nat.expiry.schedule(flow)
        self._has(flow, send)
        return Resumed(request.id)

    def _is_own(self, address: bytes, policy: Policy, now: float) -> bool:
        """Whether this host has this address; False, too, if that isn't known."""
        return address in policy.own or bool(self.asks_host(address, now))

    def _never_was(
        self,
        request: Resume,
        service: Endpoint,
        origin: Endpoint,
        source: Source,
        policy: Policy,
        send: Send,
        now: float,
    ) -> str | None:
        """Why this can't be a connection that a killed krelay had; None if it can."""
        client, server, gport = request.client, request.server, request.gport
        if not all(self._is_own(end.addr, policy, now) for end in (service, request.relay)):
            return "service and relay are addresses of this host"
        if not policy.may_be_client(client.addr) or origin.addr != client.addr:
            return "this is no client"
        seen = request.seen
        if seen is not None and not (
            seen.addr == (origin if source is Source.CLIENT else request.relay).addr
            and max(seen.port, origin.port) < FIRST_HIGH <= request.relay.port
        ):
            return "the server can't see the client so"
        if service.port != server.port or not any(
            each.allows(gport, server, source) for each in self.in_force
        ):
            return "this was never in force"
        taken = self._nat.tables[Hook.PREROUTING, Proto.TCP].get(flow_key(origin, service))
        if taken is not None and taken.flow.closed_at is None:
            return "another flow has this client"
        link = self._links.get(send)
        try:
            whose = {
                self._kernel.carrier(Endpoint(service.addr, gport), client, False),
                self._kernel.carrier(request.relay, server, True),
            }
        except OSError:
            return "the kernel doesn't tell whose connection it is"
        if link is None or whose != {link.uid}:
            return "this user has no such connection"
        return None

    def _close(self, relay: Endpoint, send: Send, now: float) -> Answer | None:
        flow = self._nat.mappings.of_relay_port(relay)
        if flow is None:
            return None
        if self._owner.get(flow.id) is not send:
            return Refused(None, "that flow is not this tcp-relay's")
        del self._owner[flow.id]
        self._nat.close(flow, now)
        return None

    def _may_have(self, flow: Flow, send: Send) -> bool:
        """Whether a flow is this tcp-relay's, or that of one of its user that was lost just now."""
        owner, link = self._owner.get(flow.id), self._links.get(send)
        if owner is not None or link is None:
            return owner is send
        return any(uid == link.uid and flow.id in flows for _, uid, flows in self._orphans)

    def _has(self, flow: Flow, send: Send) -> None:
        self._owner[flow.id] = send
        flow.orphaned = False


class Reports:
    """The last report of each worker, and what they come to together."""

    def __init__(self) -> None:
        self._here: dict[str, tuple[Send, Mapping[str, int]]] = {}
        self._gone: dict[str, Mapping[str, int]] = {}  # in the order they went; without gauges
        self._forgotten: Counter[str] = Counter()

    def told(self, report: Report, send: Send) -> None:
        """Takes the place of what this worker, or another over this connection, told before.

        A worker may be back before its old connection is known to be lost.
        """
        self._part(send)
        self._gone.pop(report.worker, None)
        self._here[report.worker] = (send, report.counts)
        self._forget_oldest()

    def lost(self, send: Send) -> None:
        """That connection is gone: its worker has nothing open, what it counted stays."""
        self._part(send)
        self._forget_oldest()

    def totals(self) -> dict[str, int]:
        """The sum of all by name: GAUGES and COUNTERS, 0 if never told, then other names sorted."""
        total = self._forgotten.copy()
        for counts in self._gone.values():
            total.update(counts)
        for _, counts in self._here.values():
            total.update(counts)
        known = (*GAUGES, *COUNTERS)
        return {name: total[name] for name in (*known, *sorted(total.keys() - {*known}))}

    def _part(self, send: Send) -> None:
        for worker in [worker for worker, (owner, _) in self._here.items() if owner is send]:
            _, counts = self._here.pop(worker)
            self._gone[worker] = {name: n for name, n in counts.items() if name not in GAUGES}

    def _forget_oldest(self) -> None:
        while len(self._gone) > GONE_KEPT:
            counts = self._gone.pop(next(iter(self._gone)))
            for name, number in counts.items():
                if name in self._forgotten or len(self._forgotten) < MAX_COUNTS:
                    self._forgotten[name] += number


def _is_same(flow: Flow, request: Resume) -> bool:
    """Whether this is the connection of that flow, which lives."""
    same = (flow.inside, flow.gport, flow.server) == (request.client, request.gport, request.server)
    return same and flow.closed_at is None


def _is_ipv4(request: Open | Resume) -> bool:
    ends = [request.client, request.relay, request.service]
    if isinstance(request, Resume):
        ends += [request.server, request.origin, request.seen]
    return all(len(end.addr) == ipv4.ADDRESS for end in ends if end)
