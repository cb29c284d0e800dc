"""Flows that krelay ends by itself: one that is killed, all of them when relaying stops, and those
that the host's changes have made useless."""

from collections.abc import Callable, Sequence

from knet.endpoint import Proto
from knet.loop import Loop, Timer
from knet.rawsocket import RawSender
from krelay.datapath.policy import Policy
from krelay.datapath.probes import abort_probes, liveness_probes
from krelay.host.hostview import HostView
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.offload.service import Offload
from krelay.registration.registry import Relays

PROBED_AT_ONCE = 64
"""Connections whose ends are probed before packets have their turn."""
PROBE_AFTER = (0.0, 1.0)
"""Seconds after rules were put back at which the ends of connections are probed; twice, since a RST
may still be under way, and what is sent may be lost."""
ASK_AGAIN = 1.0
"""Seconds until an end of a killed flow that has said nothing is probed again.  Probes may be lost,
and Linux leaves one unanswered within half a second of another, or of an ACK out of the window
(net.ipv4.tcp_invalid_ratelimit)."""
ASKED_FOR = 5.0
"""Seconds for which an end that says nothing is probed: a live one has answered, or is out of
reach."""
MOST_TOLD = 1000
"""Forwarded connections, the newest, whose ends are told when relaying ends.  There is no time for
more; the others' hear of it from this host, which knows nothing of them, when they next say
something."""
_SOON = 0.005


class FlowEnder:
    """Ends flows of `nat`: by tcp-relay, by the worker, or by packets of our own."""

    def __init__(
        self, loop: Loop, nat: NatTable, relays: Relays, kernel: Offload, sender: RawSender
    ) -> None:
        self._loop = loop
        self._nat = nat
        self._relays = relays
        self._kernel = kernel
        self._sender = sender
        self._probing: list[Timer] = []
        self._killed: dict[int, Flow] = {}

    def end(self, flow: Flow) -> None:
        """Ends a flow: TCP by resetting both its legs, or both ends of what is forwarded."""
        if flow.is_forwarded:
            self._nat.kill(flow, self._loop.now)
            self._kernel.withdraw_now()  # before an end answers, past the worker
            for packet in abort_probes(flow):
                self._sender.send(packet)
            if not self._killed:
                self._ask_again_later()
            self._killed[flow.id] = flow
        elif flow.gport is None:
            self._nat.end(flow)
        else:
            self._relays.abort(flow, self._loop.now)

    def end_all(self) -> None:
        """Relaying stops: TCP connections are reset.  `is_ending` tells how long that lasts."""
        self._stop_probing()
        now = self._loop.now
        forwarded = []
        for flow in self._nat.workers:
            if flow.closed_at is not None:
                continue
            if flow.gport is not None:
                self._relays.abort(flow, now)
            elif flow.is_forwarded:
                forwarded.append(flow)
        for flow in forwarded[-MOST_TOLD:]:
            self.end(flow)

    @property
    def is_ending(self) -> bool:
        """Whether a connection hasn't been reset yet that was to be."""
        return any(
            flow.closed_at is None and (flow.gport is not None or flow.abort_asked)
            for flow in self._nat.workers
        )

    def end_unanswered(self, server: bytes) -> None:
        """Flows to other servers whose server never answered: their clients' next packets make
        them anew."""
        for flow in self._nat.unanswered():
            if flow.server.addr != server:
                self._nat.end(flow)

    def end_unserved(self, served: frozenset[int]) -> None:
        """Connections that no tcp-relay has accepted, at gateway ports other than these: their next
        packets might reach another program."""
        for flow in self._nat.workers:
            if flow.gport is not None and flow.gport not in served and not flow.accepted:
                self._nat.end(flow)

    def end_stale(self, before: tuple[HostView, Policy], now: tuple[HostView, Policy]) -> None:
        """Flows go that began with what isn't so any more, and can't be answered: the client's next
        packet makes them anew."""
        (former, policy), (view, new) = before, now
        for flow in self._nat.unanswered():
            client = flow.client.addr
            if policy.source_for(client) != new.source_for(client):
                self._nat.end(flow)
        if gone := former.own - view.own:
            for flow in self._nat.workers:
                if flow.relay is None or flow.gport is not None or flow.relay.addr not in gone:
                    continue
                if flow.proto is Proto.UDP or flow.is_unconfirmed:
                    self._nat.end(flow)

    def probe_ends(self) -> None:
        """Has the ends of TCP connections find out whether their peers are still there.

        What went on unrewritten while rules were gone was answered by a RST, mostly to one end
        alone; the other might wait for ever, also where tcp-relay has closed its own.  A client
        that is just opening a connection must not be probed: it would take the probe for the
        other's opening.
        """
        doubtful = [
            flow
            for flow in self._nat.workers
            if (flow.is_forwarded or flow.gport is not None) and flow.is_confirmed
        ]
        self._probing += [
            self._loop.call_at(
                self._loop.now + wait, lambda: self._probe(doubtful, liveness_probes)
            )
            for wait in PROBE_AFTER
        ]

    def _ask_again_later(self) -> None:
        self._probing.append(self._loop.call_at(self._loop.now + ASK_AGAIN, self._ask_again))

    def _ask_again(self) -> None:
        """Probes the ends of killed flows that haven't been told yet."""
        since = self._loop.now - ASKED_FOR
        self._killed = {
            number: flow
            for number, flow in self._killed.items()
            if flow.closed_at is None and flow.reset_at >= since
        }
        self._probe(list(self._killed.values()), abort_probes)
        if self._killed:
            self._ask_again_later()

    def _probe(self, flows: Sequence[Flow], probes: Callable[[Flow], list[bytes]]) -> None:
        for flow in flows[:PROBED_AT_ONCE]:
            if self._nat.of_id(flow.id) is not flow:
                continue  # it has ended meanwhile: what answers would be taken for this host's own
            for packet in probes(flow):
                self._sender.send(packet)
        if rest := flows[PROBED_AT_ONCE:]:
            self._probing.append(
                self._loop.call_at(self._loop.now + _SOON, lambda: self._probe(rest, probes))
            )
        self._probing = [timer for timer in self._probing if timer.pending]

    def _stop_probing(self) -> None:
        for timer in self._probing:
            timer.cancel()
        self._probing.clear()
        self._killed.clear()
