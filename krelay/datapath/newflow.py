"""A packet that no flow claims: what it begins, in stages that hand on values.

First it is classified, which changes nothing in the table; then the decision is carried out, and
if that gives a rewrite, the packet is rewritten as any other of its flow.

What is decided, and why (K is any address of this host):

    to K, a reply to a packet of this host's own, or of a host that it masquerades (ownflows.py)
                              goes on untouched, also from S's own port
    to K, a service           a flow is made; or, TCP and not a SYN, it goes on untouched and the
                              host refuses it, unless it is picked up midstream, see below
    which can't be forwarded  its sender is told so by ICMP, as routers do
    to K, from S's own port   dropped: a server that answers whatever comes would answer itself for
                              ever
    to K, the gateway port    refused with a RST: only rewritten packets may reach tcp-relay
    a SYN for a gateway port  refused likewise, unless tcp-relay is known to listen there: a port
                              that it has lost may be another program's (gatewayports.py).  For
                              AWAY_GRACE after its loss in silence, so that the client tries again
    from a client to S        the client's own connection, seen on its way through this router: its
                              port is noted, so that the relay never uses it (NatTable.saw_direct)
    from S                    an answer to such a connection, goes on untouched; or, UDP, one from
                              another port than was asked: a flow is made where the service allows
                              it (NatTable.answered_elsewhere)
    from K's gateway port     never goes out unrewritten
    from K to S               the host's own connection, not tcp-relay's: goes on untouched
    from K's relayed port     likewise, and is remembered, so that its replies are known

While a killed krelay's flows may still be resumed (`recovering_until`), an unmatched packet that
could belong to one is dropped instead of passed, since its ends would reset the connection; TCP
sends it again.

Midstream pickup: a service may be forwarded though it is TCP.  What such a client sends without a
flow and in the midst of a connection begins one where its server sees the client itself, as in
connection tracking (nf_conntrack_tcp_loose): the mapping is the only one there can be, and the
server knows whether there is such a connection.  But not where a program of this host is known to
have it.  While recovering, a server's packet is a reason to probe the client; its challenge ACK is
picked up.  With source=relay the port that was used can't be known.
"""

from knet.endpoint import Endpoint, Proto, Source, flow_key
from knet.wire import ipv4, tcp
from krelay.datapath.reasons import Reason
from krelay.datapath.refusals import Refusals
from krelay.datapath.state import WorkerState
from krelay.datapath.verdict import (
    Begun,
    Decision,
    Direct,
    Drop,
    Learnt,
    NewForwarded,
    NewTcp,
    NotRewritten,
    OtherPort,
    Own,
    Pass,
    Refuse,
)
from krelay.nat.admission import Refusal
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.ports import FIRST_HIGH
from krelay.steps import Hook, Side, Step


class NewFlows:
    """What packets begin."""

    def __init__(self, state: WorkerState, refusals: Refusals) -> None:
        self._state = state
        self._nat = state.nat
        self._refusals = refusals

    def begin(
        self, packet: bytes, header: ipv4.Header, proto: Proto, hook: int, now: float
    ) -> Rewrite | NotRewritten:
        """The rewrite for a packet of no flow, if a flow is made for it, or what else becomes of
        it.  Raises Refusal (as NatTable.open_tcp)."""
        at = header.length
        src = Endpoint(header.src, int.from_bytes(packet[at : at + 2]))
        dst = Endpoint(header.dst, int.from_bytes(packet[at + 2 : at + 4]))
        policy = self._state.policy
        if policy is None:
            return _NOT_RELAYING
        flags = packet[at + tcp.FLAGS] if proto is _TCP else 0
        # First stage: what it is
        decision: Decision
        end = dst if hook == _PREROUTING else src
        here = end.addr in policy.own or self._is_here(proto, end, now)
        if here is None:
            return _ADDRESS_UNKNOWN
        if hook == _PREROUTING:
            if here:
                decision = self._to_host(header, proto, src, dst, flags, now)
            else:
                decision = self._through_host(header, proto, dst, now)
        elif here:
            decision = self._from_host(packet, header, proto, src, dst, flags, now)
        else:
            decision = self._passing(proto, src, dst, flags, now)
        if decision is _OTHER_PORT:  # the most usual by far, so it is asked for first
            return self._from_other_port(src, dst, now)
        if isinstance(decision, NotRewritten):
            return decision
        # Second stage: its flow is made
        return self._created(decision, proto, src, dst, hook, now)

    def _to_host(
        self,
        header: ipv4.Header,
        proto: Proto,
        src: Endpoint,
        dst: Endpoint,
        flags: int,
        now: float,
    ) -> Decision:
        policy, is_tcp = self._state.policy, proto is _TCP
        assert policy is not None
        if not policy.serves(proto, dst.port):
            if not is_tcp:
                return _OTHER_PORT
            return _GATEWAY_PORT if self._is_gateway(dst.port) else self._unmatched(now)
        if not policy.may_be_client(src.addr):
            return _BAD_SOURCE
        own_flows = self._nat.own_flows
        if own_flows and own_flows.replied(proto, flow_key(dst, src), now):
            self._nat.observers.began_own(proto, src)
            return _OWN
        if self.is_minded(proto, src):
            return _SERVER_ITSELF
        is_forwarded = not is_tcp or dst.port in policy.forwarded
        if is_tcp and flags & _OPENING != _SYN:
            if not (is_forwarded and self._may_be_picked_up(src, flags)):
                return self._unmatched(now)
            if self._state.has_connection(dst, src):
                return _OWN_BEGINS
        if not is_forwarded:
            return _NEW_TCP
        server = policy.backend_for(dst, src)
        return _NEW_FORWARDED if self._can_be_forwarded(header, server.addr) else _NOT_FORWARDED

    def _through_host(
        self, header: ipv4.Header, proto: Proto, dst: Endpoint, now: float
    ) -> Decision:
        """A packet that comes in and will be forwarded."""
        if not self.is_minded(proto, dst):
            return self._unmatched(now)
        return _DIRECT if self._can_be_forwarded(header, dst.addr) else _NOT_FORWARDED

    def _from_host(
        self,
        packet: bytes,
        header: ipv4.Header,
        proto: Proto,
        src: Endpoint,
        dst: Endpoint,
        flags: int,
        now: float,
    ) -> Decision:
        at, is_tcp = header.length, proto is _TCP
        opens = is_tcp and flags & _OPENING == _SYN
        if is_tcp and self._is_gateway(src.port):
            return _OWN if self._refusals.is_answer(packet, at) else _NEVER_OUT
        if opens and self._refusals.has_sent(packet, at):
            return _OWN  # a probe, of which there may be several
        if self._is_forwarded_to(proto, dst) or self._is_seen_low(proto, src, dst):
            if self._nat.mappings.was_killed(proto, src, dst):
                return _OWN  # our RST, or the SYN before it
            return _OWN_BEGINS_OR_MOVED if opens or not is_tcp else _OWN_OR_MOVED
        if is_tcp and not opens:
            return self._unmatched(now)
        return _OWN_BEGINS

    def _passing(
        self, proto: Proto, src: Endpoint, dst: Endpoint, flags: int, now: float
    ) -> Decision:
        """A packet that goes through this host, on its way out."""
        if self._is_forwarded_to(proto, dst) and self._is_of_nobody(proto, flow_key(src, dst)):
            return _NEVER_OUT  # no host has sent this: its flow has ended between the two hooks
        if proto is not _TCP:
            return _LEARNT
        if now < self._state.recovering_until and not flags & tcp.RST:
            return _CHALLENGE
        return self._unmatched(now)

    def _is_of_nobody(self, proto: Proto, outside: bytes) -> bool:
        """Whether no flow's, and no client's own, packets to the server read so there."""
        is_free = self._nat.mappings.is_free
        if not is_free(proto, outside):
            return False
        # It may be of a query that the kernel has just led on by itself.
        heard = proto is not _TCP and self._nat.learning.catch_up(outside)
        return not heard or is_free(proto, outside)

    def _unmatched(self, now: float) -> NotRewritten:
        """A packet of no flow, or of one that a killed krelay knew."""
        return _RECOVERING if now < self._state.recovering_until else _NO_FLOW

    # Second stage: its flow is made

    def _created(
        self,
        decision: Begun,
        proto: Proto,
        src: Endpoint,
        dst: Endpoint,
        hook: int,
        now: float,
    ) -> Rewrite | NotRewritten:
        nat = self._nat
        match decision:
            case NewForwarded():
                return self.open_forwarded(proto, src, dst, now).by(_CLIENT) or _NO_FLOW
            case NewTcp():
                return self.open_tcp(src, dst, now).rewrites[_T1]
            case OtherPort():
                return self._from_other_port(src, dst, now)
            case Direct():
                return nat.saw_direct(proto, src, dst, now) or _PASS_DIRECT
            case Own(begins, is_moved):
                moved = nat.saw_direct(proto, src, dst, now, Hook.POSTROUTING) if is_moved else None
                if moved is not None:
                    return moved
                own, peer = (dst, src) if hook == _PREROUTING else (src, dst)
                return self.own(proto, own, peer, now) if begins else _OWN
            case Learnt():
                known = nat.learning.adopt(flow_key(src, dst), now)
                if known is None:
                    return self._from_other_port(src, dst, now)
                return known.by(Side.SERVER) or self._unmatched(now)

    def open_tcp(self, client: Endpoint, service: Endpoint, now: float) -> Flow:
        """A connection that tcp-relay terminates.  Raises Refusal."""
        policy = self._state.policy
        assert policy is not None
        if policy.gport not in policy.served:
            raise Refusal(Reason.NO_TCP_RELAY)
        server = policy.backend_for(service, client)
        source = policy.source_for(client.addr)
        return self._nat.open_tcp(client, service, server, source, policy.gport, now)

    def open_forwarded(self, proto: Proto, client: Endpoint, service: Endpoint, now: float) -> Flow:
        """A flow that is forwarded.  Raises Refusal."""
        policy = self._state.policy
        assert policy is not None
        return self._nat.open_forwarded(
            proto,
            client,
            service,
            policy.backend_for(service, client),
            policy.source_for(client.addr),
            now,
            relay_addr=policy.towards,
            any_client=policy.source is _RELAY,
            any_port=proto is _UDP and service.port in policy.any_port,
            services=policy.udp if proto is _UDP else policy.tcp,
        )

    def own(self, proto: Proto, own: Endpoint, peer: Endpoint, now: float) -> NotRewritten:
        """This host begins something itself: the packet goes on, and so will the replies to it."""
        assert self._state.policy is not None
        if self._state.policy.serves(proto, own.port):
            self._nat.saw_own(proto, own, peer, now)
        return _OWN

    def _from_other_port(
        self, server: Endpoint, client: Endpoint, now: float
    ) -> Rewrite | NotRewritten:
        """A datagram that may be an answer from another port than was asked.  Raises Refusal."""
        answered = self._nat.answered_elsewhere(server, client, now)
        if answered is not None:
            return answered.by(Side.SERVER) or _NO_FLOW
        if self.is_minded(_UDP, server) or self.is_minded(_UDP, client):
            return self._unmatched(now)
        return _NO_FLOW  # this host's own, or the server's: nothing that was relayed

    # What is asked for it

    def _is_here(self, proto: Proto, end: Endpoint, now: float) -> bool | None:
        """Whether this host is the end of a packet's that the rules ask about, though it isn't
        known as one: where it goes to, in POSTROUTING where it comes from.

        Where that matters, the kernel is asked, since it has decided the same a moment ago; None:
        it doesn't tell, so nothing may be led or refused for that.
        """
        policy = self._state.policy
        assert policy is not None
        if end.addr in policy.backends:
            return False
        matters = policy.serves(proto, end.port) or (proto is _TCP and self._is_gateway(end.port))
        if not matters or self.is_minded(proto, end):
            return False
        return self._state.asks_host(end.addr, now)

    def _can_be_forwarded(self, header: ipv4.Header, server: bytes) -> bool:
        """Whether the kernel will forward this first packet of a flow; from the second packet on
        there is nothing to mind."""
        policy = self._state.policy
        assert policy is not None
        if header.ttl <= 1:
            return False
        is_whole = header.total > policy.mtu and header.fragment & ipv4.DONT_FRAGMENT
        return not (is_whole and server in policy.backends)

    def _may_be_picked_up(self, client: Endpoint, flags: int) -> bool:
        """Whether this packet to a forwarded service, no SYN, may be of a connection unknown."""
        assert self._state.policy is not None
        if flags & _OPENING != tcp.ACK:
            return False
        return self._state.policy.source_for(client.addr) is Source.CLIENT

    def is_minded(self, proto: Proto, end: Endpoint) -> bool:
        """Whether new flows or flows that live lead to this port of this server."""
        policy = self._state.policy
        assert policy is not None
        if end.addr in policy.backends and policy.serves(proto, end.port):
            return True
        addr, port = end
        for each in self._nat.footprints:  # no generator: this is asked of each new connection
            if each.server == addr and each.port == port and each.proto is proto:
                return True
        return False

    def _is_forwarded_to(self, proto: Proto, dst: Endpoint) -> bool:
        """Whether flows without tcp-relay lead there, so that a port of this host may be one's."""
        policy = self._state.policy
        assert policy is not None
        if proto is _UDP:
            return self.is_minded(proto, dst)
        if dst.addr in policy.backends and dst.port in policy.forwarded:
            return True
        wanted = (dst.port, dst.addr)
        return any(f.forwarded and (f.port, f.server) == wanted for f in self._nat.footprints)

    def _is_seen_low(self, proto: Proto, src: Endpoint, dst: Endpoint) -> bool:
        """Whether a connection that tcp-relay terminates may be seen from this port of this host,
        though no socket of tcp-relay's has it (NatTable.attach)."""
        return proto is _TCP and src.port < FIRST_HIGH and self.is_minded(proto, dst)

    def _is_gateway(self, port: int) -> bool:
        """Whether this is a gateway port, of new flows or of flows that live."""
        assert self._state.policy is not None
        footprints = self._nat.footprints
        return port == self._state.policy.gport or any(f.gport == port for f in footprints)


_TCP, _UDP = Proto.TCP, Proto.UDP
_PREROUTING, _T1, _CLIENT = Hook.PREROUTING, Step.T1, Side.CLIENT
_RELAY = Source.RELAY
_SYN, _OPENING = tcp.SYN, tcp.SYN | tcp.ACK | tcp.RST
"""Flags that are just SYN in what begins a connection."""
_NEW_TCP, _NEW_FORWARDED, _DIRECT = NewTcp(), NewForwarded(), Direct()
_OTHER_PORT, _LEARNT, _CHALLENGE = OtherPort(), Learnt(), Refuse(Reason.RECOVERING)
_OWN_BEGINS = Own(begins=True)
_OWN_BEGINS_OR_MOVED = Own(begins=True, is_moved=True)
_OWN_OR_MOVED = Own(begins=False, is_moved=True)
_OWN, _PASS_DIRECT, _NO_FLOW = Pass(Reason.OWN), Pass(Reason.DIRECT), Pass(Reason.NO_FLOW)
_NOT_RELAYING, _BAD_SOURCE = Pass(Reason.NOT_RELAYING), Pass(Reason.BAD_SOURCE)
_NEVER_OUT, _RECOVERING = Drop(Reason.NO_FLOW), Drop(Reason.RECOVERING)
_ADDRESS_UNKNOWN, _SERVER_ITSELF = Drop(Reason.ADDRESS_UNKNOWN), Drop(Reason.SERVER_ITSELF)
_GATEWAY_PORT, _NOT_FORWARDED = Refuse(Reason.GATEWAY_PORT), Refuse(Reason.NOT_FORWARDED)
# By these names: looking one up in its class takes ten times as long.
