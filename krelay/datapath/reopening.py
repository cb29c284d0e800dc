"""SYNs that come to a flow: its own, or those of another connection between the same ports.

A SYN that comes from a flow's port towards the server, and isn't the one by which tcp-relay began
there, is another program's, which has got the port: the flow's part there ends, and the SYN goes on
as it is.  A client's SYN on a flow that tcp-relay hasn't closed is no new connection before
tcp-relay says so: its host judges it, by its number.
"""

from knet.endpoint import Proto
from knet.wire import tcp
from krelay.datapath.newflow import NewFlows
from krelay.datapath.reasons import Reason
from krelay.datapath.state import WorkerState
from krelay.datapath.verdict import Drop, NotRewritten, Pass
from krelay.nat.admission import Refusal
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.tcpstate import State, Through
from krelay.steps import Side, Step


class Reopening:
    """Whose SYN it is, and what another's begins."""

    def __init__(self, state: WorkerState, new_flows: NewFlows) -> None:
        self._state = state
        self._nat = state.nat
        self._new_flows = new_flows

    def is_its_own(self, rewrite: Rewrite, packet: bytes, at: int) -> bool:
        """Whether this SYN is the flow's own: it begins the connection, or repeats what began it,
        or is for an end to judge by its numbers.  `at`: where its TCP header begins.

        RFC 9293, section 3.6.1: a port may be used again; and 3.10.7.4: in a connection a SYN is
        answered by a challenge ACK, from whatever sender.
        """
        flow, step = rewrite.flow, rewrite.step
        if flow.leg is None and step in (_T3, _T4):
            self._nat.observers.needs_ends()  # it may have begun past the worker
        if step is _T3:
            number = int.from_bytes(packet[at + tcp.SEQ : at + tcp.SEQ + 4])
            if flow.leg is None and flow.closed_at is None:
                flow.leg = number
            return flow.leg == number and flow.closed_at is None
        if step is _T1:
            if flow.closed_at is not None or self._leads_to_no_tcp_relay(flow):
                return False
            if not flow.accepted:
                return not flow.tracker.reset
            flow.called_again = self._is_still_served(flow)
            return flow.called_again
        if step in _BEGINNINGS:
            return flow.tracker.state not in _ENDED
        if step is _T4:
            return flow.closed_at is None and flow.leg is not None and flow.leg >= 0
        return step is not _T2

    def begin_another(self, rewrite: Rewrite, now: float) -> Rewrite | NotRewritten:
        """What becomes of a SYN that is none of the flow's own.  Raises Refusal."""
        flow, step = rewrite.flow, rewrite.step
        if step in _BEGINNINGS:
            found = None
            if flow.closed_at is not None or not flow.accepted or flow.orphaned:
                found = self._open_again(flow, now)
            return found or Drop(Reason.NOT_RELAYING)
        if step is _T2:
            return Drop(Reason.NO_FLOW)  # a listening port of this host, which begins nothing
        # Its port is free, and another connection begins there, or leads to it.
        relay = flow.relay
        self._nat.give_up(flow, now)
        if step is not _T3 or relay is None:
            return Pass(Reason.NO_FLOW)
        return self._new_flows.own(Proto.TCP, relay, flow.server, now)

    def _leads_to_no_tcp_relay(self, flow: Flow) -> bool:
        """Whether T1 would lead to a port that is no tcp-relay's any more, of whom none has the
        flow."""
        policy = self._state.policy
        is_free = flow.orphaned or not flow.accepted
        return is_free and policy is not None and flow.gport not in policy.served

    def _is_still_served(self, flow: Flow) -> bool:
        """Whether new connections to the service of this flow are relayed."""
        policy = self._state.policy
        return policy is not None and policy.serves(Proto.TCP, flow.service.port)

    def _open_again(self, flow: Flow, now: float) -> Rewrite | None:
        """The rewrite for that packet; None if the service is none any more.  Raises Refusal."""
        if flow.gport is None and not flow.is_forwarded:
            flow.tracker = Through()
            return flow.rewrites[Step.D1]
        policy = self._state.policy
        if policy is None or not policy.serves(Proto.TCP, flow.service.port):
            return None
        is_forwarded = flow.service.port in policy.forwarded
        if not is_forwarded and policy.gport not in policy.served:
            raise Refusal(Reason.NO_TCP_RELAY)
        self._nat.observers.displaced(flow)  # what the kernel has seen of it is told with that
        if flow.is_forwarded or not flow.accepted:
            # The port it had towards the server is wanted again; or that towards tcp-relay, which
            # never heard of it: this host has reset what it can't place, and now it tries again.
            self._nat.end(flow)
        client, service = flow.client, flow.service
        if is_forwarded:
            again = self._new_flows.open_forwarded(Proto.TCP, client, service, now)
            return again.by(Side.CLIENT)
        return self._new_flows.open_tcp(client, service, now).rewrites[_T1]


_T1, _T2, _T3, _T4 = Step.T1, Step.T2, Step.T3, Step.T4
_BEGINNINGS = (Step.T1, Step.D1, Step.U12, Step.U1)
"""The steps that a client's first packet can take."""
_ENDED = (State.CLOSING, State.CLOSED)
# By these names: looking one up in its class takes ten times as long.
