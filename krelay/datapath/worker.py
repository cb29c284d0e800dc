"""One packet in, one verdict out.

Most packets belong to a flow and have a plain header: for those `handle` is a dictionary look-up by
the twelve bytes of addresses and ports, two additions for the checksums, and one new string.
Nothing is parsed that isn't needed.  Everything else (options, first packets of a flow, strangers,
nonsense) takes the general path below it, which is as careful as it is slow.

What is decided here for packets that no flow claims, and why (K is any address of this host):

    to K, a reply to a packet of this host's own, or of a host that it masquerades (ownflows.py)
                              goes on untouched, also from S's own port
    to K, a service           a flow is made; or, TCP and not a SYN, it goes on untouched and the
                              host refuses it, unless it can be picked up, see below
    which can't be forwarded  its sender is told so by ICMP, as routers do
    to K, from S's own port   dropped: a server that answers whatever comes would answer itself for
                              ever
    to K, the gateway port    refused with a RST: only rewritten packets may reach tcp-relay
    a SYN that T1 would lead  refused likewise, unless tcp-relay is known to listen there: a port
    to a gateway port         that it has lost may be anybody's (gatewayport.py).  For AWAY_GRACE
                              after its loss in silence, so that the client asks again
    from a client to S        the client's own connection, seen on its way through this router: its
                              port is noted, so that the relay never uses it (NatTable.saw_direct)
    from S                    an answer to such a connection, goes on untouched; or, UDP, one from
                              another port than was asked: a flow is made where the service allows
                              it (NatTable.answered_elsewhere)
    from K's gateway port     never goes out unrewritten
    from K to S               the host's own connection, not tcp-relay's: goes on untouched
    from K's relayed port     likewise, and is remembered, so that its replies are known

A SYN that comes from a flow's port towards the server, and isn't the one by which tcp-relay began
there, is somebody else's, who has got the port: the flow's part there ends, and the SYN goes on as
it is.  A client's SYN on a flow that tcp-relay hasn't closed is no new connection before tcp-relay
says so: its host judges it, by its number.

While a killed krelay's flows may still be taken up again (`recovering_until`), whatever could
belong to one is dropped instead of passed, since its ends would reset the connection; TCP sends it
again.

A service may be forwarded though it is TCP: then its packets take the steps of UDP.  What such a
client sends without a flow and in the midst of a connection is picked up where its server sees the
client itself, as connection tracking does (nf_conntrack_tcp_loose): the mapping is the only one
there can be, and the server knows whether there is such a connection.  But not where a program of
this host is known to have it.  While recovering, a server's packet is taken for a reason to ask the
client, at every address of this host, by a SYN: in a connection it is answered by an ACK (RFC 9293,
section 3.10.7.4, "challenge ACK"), which is picked up, and elsewhere by a RST.  With source=relay
nobody knows which port it was.

A forwarded flow that was killed takes nothing to its other end any more.  Each packet of an end is
answered by a RST with the number that it acknowledges, which it accepts (section 3.10.7.4); and so
that an end which has nothing to say says something, it is sent a SYN (`probes`).  So nothing need
be noted of sequence numbers.

No bytes raise an exception.  A packet that isn't what it says goes on as it would without krelay,
and is counted; the kernel judges it.
"""

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network

from knet.endpoint import (
    Endpoint,
    FiveTuple,
    FlowKey,
    Proto,
    Source,
    flow_key,
    key_addrs,
    key_ports,
)
from knet.ratelimit import PerClientLimiter, RateLimiter, TopRefusedClients
from knet.wire import BadPacket, icmp, ipv4, tcp, udp
from knet.wire.checksum import updated
from krelay.nat import icmperror
from krelay.nat.admission import Refusal
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.ports import FIRST_HIGH
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State, TcpSegment, Through
from krelay.rules.steprows import DSCP_STEPS
from krelay.steps import SENDERS, SIDES, Hook, Side, Step


class Verdict(Enum):
    """What becomes of a packet that isn't rewritten.  A rewritten one is its new bytes."""

    PASS = "goes on untouched"
    DROP = "goes nowhere"


@dataclass(frozen=True, slots=True)
class Policy:
    """What new flows get, and what this host is."""

    gport: int
    served: frozenset[int]
    """Gateway ports where tcp-relays listen, and nobody else can get what is led there."""
    server: bytes
    """What new flows are led to; ask `backend_for` and `backends`."""
    source: Source
    tcp: frozenset[int]
    """Relayed ports."""
    udp: frozenset[int]
    own: frozenset[bytes]
    """Addresses of this host."""
    beside: tuple[IPv4Network, ...] = ()
    """Subnets on the link that leads to the server: a client there is answered directly by the
    server, past the relay."""
    towards: bytes | None = None
    """This host's address on that link."""
    mtu: int = ipv4.MAX_TOTAL
    """Bytes of the largest packet that this link takes."""
    forwarded: frozenset[int] = frozenset()
    """Those of `tcp` that take the steps of UDP."""
    any_port: frozenset[int] = frozenset()
    """Those of `udp` whose server may answer from any of its ports."""
    answers: bool = True
    """Whether who is refused for want of room is told so, by RST or ICMP, or never hears of it."""
    backends: frozenset[bytes] = field(init=False, repr=False, compare=False)
    """The addresses that `backend_for` can give."""
    _beside: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """The same as numbers: mask and address."""

    def __post_init__(self) -> None:
        numbers = tuple((int(net.netmask), int(net.network_address)) for net in self.beside)
        object.__setattr__(self, "_beside", numbers)
        object.__setattr__(self, "backends", frozenset((self.server,)))

    def serves(self, proto: Proto, port: int) -> bool:
        """Whether new flows to this port of the relay are relayed."""
        return port in (self.tcp if proto is _TCP else self.udp)

    def backend_for(self, service: Endpoint, client: Endpoint) -> Endpoint:
        """The server that a new flow of this client to this service of the relay is led to.

        It is the same for all clients and services yet; its port is the service's.
        """
        return Endpoint(self.server, service.port)

    def may_be_client(self, addr: bytes) -> bool:
        """Whether a packet may come from there; the kernel drops others only behind PREROUTING.

        Not from this host itself, from no network at all, loopback, a group or everybody (RFC 1812,
        section 5.3.7).
        """
        return addr[0] not in (0, 127) and addr[0] < 224 and addr not in self.own

    def source_for(self, client: bytes) -> Source:
        """Whose address the server must see, so that its answers come back through the relay."""
        if self.source is _RELAY or client in self.backends:
            return _RELAY
        number = int.from_bytes(client)
        for mask, net in self._beside:
            if number & mask == net:
                return _RELAY
        return self.source


@dataclass(slots=True)
class PacketCounts:
    """Packets since the start."""

    steps: list[int] = field(default_factory=lambda: [0] * len(Step))
    """By Step: rewritten."""
    icmp: list[int] = field(default_factory=lambda: [0] * len(Step))
    """ICMP errors translated, by the step that answers take where the error goes."""
    passed: Counter[str] = field(default_factory=Counter)
    """By reason: gone on untouched."""
    dropped: Counter[str] = field(default_factory=Counter)
    trace_lost: int = 0
    """Packets that were not shown to somebody who traces and doesn't read fast enough."""


# First byte, DSCP and ECN, total length, fragment field, protocol, checksum; addresses and ports
# skipped; then, in UDP, length and checksum.
_PLAIN = struct.Struct("!BBH2xHxBH12xHH").unpack_from
_UDP_HEAD = struct.Struct("!10sH12sHH").pack
_TCP_HEAD = struct.Struct("!10sH12s12sH").pack
_NUMBERS = struct.Struct("!IIB").unpack_from
_MIN_UDP = ipv4.MIN_HEADER + udp.HEADER
_MIN_TCP = ipv4.MIN_HEADER + tcp.HEADER
_FLAGS = ipv4.MIN_HEADER + tcp.FLAGS
_NOTEWORTHY = tcp.FIN | tcp.SYN | tcp.RST
_DSCP = 0xFC
_OPENING = tcp.SYN | tcp.ACK | tcp.RST
"""Flags that are just SYN in what begins a connection."""
_TCP, _UDP = Proto.TCP, Proto.UDP
_RELAY, _PREROUTING, _T1 = Source.RELAY, Hook.PREROUTING, Step.T1
_CLIENT, _SYN = Side.CLIENT, tcp.SYN
_T2, _T3, _T4 = Step.T2, Step.T3, Step.T4
_BEGINNINGS = (Step.T1, Step.D1, Step.U12, Step.U1)
"""The steps that a client's first packet can take."""
_ENDED = (State.CLOSING, State.CLOSED)
# By these names: looking one up in its class takes ten times as long.
_MOST_ANSWERS = 256
ANSWERS = 1000
"""Answers of our own, of whatever kind, a second; to the rest nothing is said (RFC 1812, section
4.3.2.8; the same figure as Linux's icmp_msgs_per_sec).  But ends of a killed flow are all told."""
ANSWERS_AT_ONCE = 50
TOLD_EACH = 6
"""ICMP errors of those to one address, a second and at once: where that is forged, its owner is not
to be bothered much (Linux's icmp_ratelimit is of the same kind)."""
AWAY_GRACE = 1.0
"""Seconds: a SYN that isn't answered is sent again after one (RFC 6298)."""
_NO_RELAY = "no_tcp_relay"


class Worker:
    """The packet path: `handle` every packet the kernel queued.

    `policy` is None before anything is to be relayed.  Checksums are updated in place in `handle`
    (checksum.updated and udp.updated_check, written out: a call costs a tenth of the whole).
    """

    def __init__(self, nat: NatTable) -> None:
        self.nat = nat
        self.policy: Policy | None = None
        self.recovering_until = 0.0
        self.waiting_until = 0.0
        """Until then, who is refused for want of a tcp-relay is so in silence."""
        self.counts = PacketCounts()
        self.answers: list[bytes] = []
        """Packets of our own that refusals gave rise to; the shell sends them and empties this."""
        self.on_rewrite: Callable[[Rewrite, bytes, bytes], None] | None = None
        """Told of each packet that was rewritten, as it came and as it goes on, while somebody
        traces."""
        self.on_untouched: Callable[[bytes, int, Verdict, str], None] | None = None
        """Told of each packet that wasn't: its hook, its verdict and the reason.  What it is
        answered with is in `answers`."""
        self.asks_host: Callable[[bytes, float], bool | None] = lambda address, now: False
        """Whether this host has an address that isn't among the known ones (Policy.own), as the
        rules see it at this moment; None if that can't be known."""
        self.has_connection: Callable[[Endpoint, Endpoint], bool] = lambda own, peer: False
        """Whether a program of this host has a TCP connection between its own end and that peer's:
        asked before a packet in the midst of a connection begins a flow."""
        self._reason = ""
        """Why the last packet that wasn't rewritten goes on or doesn't; empty if it was, but goes
        elsewhere."""
        self.other_ports = Counter[int]()
        """Answers from another port than was asked, by the port of the service."""
        self.refused = TopRefusedClients()
        """Who has been refused for want of room."""
        self._answer_pace = RateLimiter(ANSWERS, ANSWERS_AT_ONCE)
        self._told_lately = PerClientLimiter()
        self._answered: dict[bytes, None] = {}
        # Lists indexed by hook: cheaper to reach than a dictionary of pairs.
        self._tcp: list[dict[bytes, Rewrite]] = [{}] * (max(Hook) + 1)
        self._udp: list[dict[bytes, Rewrite]] = [{}] * (max(Hook) + 1)
        for hook in Hook:
            self._tcp[hook] = nat.tables[hook, Proto.TCP]
            self._udp[hook] = nat.tables[hook, Proto.UDP]

    def handle(self, packet: bytes, hook: int, now: float) -> bytes | Verdict:
        """What the packet becomes: other bytes, or a verdict.  Never raises for any bytes."""
        size = len(packet)
        if size >= _MIN_UDP:
            first, tos, total, fragment, proto, check, length, l4_check = _PLAIN(packet)
            if first == 0x45 and total == size and not fragment & 0x3FFF:
                if proto == 17:
                    rewrite = self._udp[hook].get(packet[12:24])
                    if rewrite is not None and length == size - 20:
                        rewrite.seen_at = now
                        rewrite.packets += 1
                        if rewrite.packets >= rewrite.tell_at:
                            self.nat.tracking.counted(rewrite, now)
                        rewrite.bytes += size
                        self.counts.steps[rewrite.step] += 1
                        if l4_check:
                            l4_check = 0xFFFF - (rewrite.l4_delta - l4_check) % 0xFFFF
                        check = 0xFFFF - ((rewrite.ip_delta - check) % 0xFFFF or 0xFFFF)
                        new = _UDP_HEAD(packet, check, rewrite.new, length, l4_check) + packet[28:]
                        if self.on_rewrite is not None:
                            self.on_rewrite(rewrite, packet, new)
                        return new
                elif proto == 6 and size >= _MIN_TCP:
                    rewrite = self._tcp[hook].get(packet[12:24])
                    if rewrite is not None:
                        flags = packet[_FLAGS]
                        if flags & _NOTEWORTHY or rewrite.watched:
                            if self._is_answer(packet, ipv4.MIN_HEADER):
                                return self._told(packet, hook, self._pass("own"))
                            if flags & _OPENING == _SYN:
                                if not self._opens(rewrite, packet, ipv4.MIN_HEADER):
                                    return self._told(
                                        packet, hook, self._general(packet, hook, now)
                                    )
                            elif _was_killed(rewrite.flow):
                                return self._told(packet, hook, self._general(packet, hook, now))
                            self._track(rewrite, packet, ipv4.MIN_HEADER, flags, now)
                        else:
                            rewrite.seen_at = now
                        if tos != rewrite.tos:
                            self._marked(rewrite, tos, flags, now)
                        rewrite.packets += 1
                        if rewrite.packets >= rewrite.tell_at:
                            self.nat.tracking.counted(rewrite, now)
                        rewrite.bytes += size
                        self.counts.steps[rewrite.step] += 1
                        l4_check = packet[36] << 8 | packet[37]
                        l4_check = 0xFFFF - ((rewrite.l4_delta - l4_check) % 0xFFFF or 0xFFFF)
                        check = 0xFFFF - ((rewrite.ip_delta - check) % 0xFFFF or 0xFFFF)
                        new = (
                            _TCP_HEAD(packet, check, rewrite.new, packet[24:36], l4_check)
                            + packet[38:]
                        )
                        if self.on_rewrite is not None:
                            self.on_rewrite(rewrite, packet, new)
                        return new
        verdict = self._general(packet, hook, now)
        return verdict if self.on_untouched is None else self._told(packet, hook, verdict)

    def _told(self, packet: bytes, hook: int, verdict: bytes | Verdict) -> bytes | Verdict:
        """The verdict; who traces has been told of it, unless the packet was rewritten."""
        if self.on_untouched is not None and isinstance(verdict, Verdict) and self._reason:
            self.on_untouched(packet, hook, verdict, self._reason)
        return verdict

    # The general path

    def _general(self, packet: bytes, hook: int, now: float) -> bytes | Verdict:
        try:
            header = ipv4.parse(packet)
            if header.is_fragment:
                raise BadPacket("fragment")
            at = header.length
            if header.proto == udp.PROTO:
                proto = _UDP
                if header.total < at + udp.HEADER:
                    raise BadPacket("short_header")
                length = int.from_bytes(packet[at + 4 : at + 6])
                if not udp.HEADER <= length <= header.total - at:
                    raise BadPacket("bad_length")
            elif header.proto == tcp.PROTO:
                proto = _TCP
                if header.total < at + tcp.HEADER:
                    raise BadPacket("short_header")
            elif header.proto == icmp.PROTO:
                return self._icmp(packet, header, hook, now)
            else:
                raise BadPacket("other_protocol")
        except BadPacket as bad:
            if bad.reason == "truncated" or bad.reason in icmperror.BROKEN:
                return self._drop(bad.reason)  # whole, it might have been a flow's
            return self._pass(bad.reason)

        tables = self._tcp if proto is _TCP else self._udp
        rewrite = tables[hook].get(packet[ipv4.ADDRESSES] + packet[at : at + 4])
        try:
            if rewrite is None:
                found = self._stranger(packet, header, proto, hook, now)
                if not isinstance(found, Rewrite):
                    return found
                if packet[0] == ipv4.PLAIN:  # the usual way is open to it now
                    return self.handle(packet, hook, now)
                rewrite = found
            if proto is _TCP:
                flags = packet[at + tcp.FLAGS]
                if flags & _OPENING == _SYN:
                    if not self._opens(rewrite, packet, at):
                        found = self._opens_other(rewrite, now)
                        if not isinstance(found, Rewrite):
                            return found
                        rewrite = found
                elif _was_killed(rewrite.flow):
                    return self._tell_end(rewrite, packet, header, flags, now)
                self._track(rewrite, packet, at, flags, now)
                if packet[1] != rewrite.tos:
                    self._marked(rewrite, packet[1], flags, now)
            else:
                rewrite.seen_at = now
        except Refusal as refusal:
            return self._refuse(packet, header, hook, refusal.reason, now)
        rewrite.packets += 1
        if rewrite.packets >= rewrite.tell_at:
            self.nat.tracking.counted(rewrite, now)
        rewrite.bytes += header.total
        self.counts.steps[rewrite.step] += 1
        new = readdressed(packet, header, rewrite)
        if self.on_rewrite is not None:
            self.on_rewrite(rewrite, packet, new)
        return new

    def _icmp(self, packet: bytes, header: ipv4.Header, hook: int, now: float) -> bytes | Verdict:
        """An ICMP error about a flow's packet is translated.  Raises BadPacket."""
        own = self.policy.own if self.policy else frozenset()
        if hook != _PREROUTING and header.src not in own and self.asks_host(header.src, now):
            own |= {header.src}
        found = icmperror.translate(packet, header, hook, self.nat.tables, own)
        if found is None and self._adopt_quoted(packet, header, now):
            found = icmperror.translate(packet, header, hook, self.nat.tables, own)
        if found is None:
            return self._pass("icmp_no_row")
        for rewrite in found.by:
            self.counts.icmp[rewrite.step] += 1
        if self.on_rewrite is not None:
            self.on_rewrite(found.by[-1], packet, found.packet)
        if not found.sent_anew:
            return found.packet
        self.answers.append(found.packet)
        self._reason = ""
        return Verdict.DROP

    def _adopt_quoted(self, packet: bytes, header: ipv4.Header, now: float) -> bool:
        """Whether this error is about a packet of a flow that the kernel has learnt: a flow now."""
        quote = icmp.quoted(packet, header)
        return quote.proto == udp.PROTO and self.nat.learning.adopt(quote.answers, now) is not None

    def _stranger(
        self, packet: bytes, header: ipv4.Header, proto: Proto, hook: int, now: float
    ) -> Rewrite | Verdict:
        """The rewrite for a packet of no flow, if a flow is made for it, or its verdict."""
        at = header.length
        src = Endpoint(header.src, int.from_bytes(packet[at : at + 2]))
        dst = Endpoint(header.dst, int.from_bytes(packet[at + 2 : at + 4]))
        policy = self.policy
        if policy is None:
            return self._pass("not_relaying")
        is_tcp = proto is _TCP
        flags = packet[at + tcp.FLAGS] if is_tcp else 0
        opens = is_tcp and flags & _OPENING == tcp.SYN

        here = self._is_here(proto, dst, src, hook, now)
        if here is None:
            return self._drop("address_unknown")
        if hook == _PREROUTING and here:
            if policy.serves(proto, dst.port):
                if not policy.may_be_client(src.addr):
                    return self._pass("bad_source")
                if self.nat.own_flows and self.nat.own_flows.replied(
                    proto, flow_key(dst, src), now
                ):
                    return self._pass("own")
                if self._is_minded(proto, src):
                    return self._drop("server_itself")
                forwarded = not is_tcp or dst.port in policy.forwarded
                if is_tcp and not opens:
                    if not (forwarded and self._goes_on(src, flags)):
                        return self._stray(now)
                    if self.has_connection(dst, src):
                        return self._begins_itself(proto, dst, src, now, opens=True)
                if not forwarded:
                    return self._open_tcp(src, dst, now).rewrites[_T1]
                if self._ends_here(packet, header, policy.backend_for(dst, src).addr, now):
                    return self._drop("not_forwarded")
                flow = self._open_forwarded(proto, src, dst, now)
                return flow.by(_CLIENT) or Verdict.PASS
            if is_tcp and self._is_gateway(dst.port):
                return self._refuse_direct(packet, header, now)
            return self._stray(now) if is_tcp else self._elsewhere(src, dst, now)
        if hook == _PREROUTING:
            if self._is_minded(proto, dst):
                if self._ends_here(packet, header, dst.addr, now):
                    return self._drop("not_forwarded")
                moved = self.nat.saw_direct(proto, src, dst, now)
                return moved or self._pass("direct")
            return self._stray(now)
        if here:
            if is_tcp and self._is_gateway(src.port):
                return self._pass("own") if self._is_answer(packet, at) else self._drop("no_row")
            if opens and _told_by(packet, at) in self._answered:
                return self._pass("own")  # of `_ask_client`, who may ask several times
            if self._is_forwarded_to(proto, dst) or self._is_seen_low(proto, src, dst):
                if self.nat.mappings.was_killed(proto, src, dst):
                    return self._pass("own")  # our RST, or the SYN before it
                moved = self.nat.saw_direct(proto, src, dst, now, Hook.POSTROUTING)
                if moved is not None:
                    return moved
            elif is_tcp and not opens:
                return self._stray(now)
            return self._begins_itself(proto, src, dst, now, opens=opens)
        if self._is_forwarded_to(proto, dst) and self.nat.mappings.is_free(
            proto, flow_key(src, dst)
        ):
            # Nobody has sent this: its flow has ended between the two hooks.
            return self._drop("no_row")
        if is_tcp and now < self.recovering_until and not flags & tcp.RST:
            self._ask_client(src, dst, now)
        known = None if is_tcp else self.nat.learning.adopt(flow_key(src, dst), now)
        if known is None and not is_tcp:
            return self._elsewhere(src, dst, now)
        return (known and known.by(Side.SERVER)) or self._stray(now)

    def _is_here(
        self, proto: Proto, dst: Endpoint, src: Endpoint, hook: int, now: float
    ) -> bool | None:
        """Whether this host is the end of a packet's that the rules ask about: where it goes to, in
        POSTROUTING where it comes from.

        Where that end isn't known as one and it matters, the kernel is asked, since it has decided
        the same a moment ago; None: it doesn't tell, so nobody must be led or refused for that.
        """
        policy = self.policy
        assert policy is not None
        end = dst if hook == _PREROUTING else src
        if end.addr in policy.own:
            return True
        if end.addr in policy.backends:
            return False
        matters = policy.serves(proto, end.port) or (proto is _TCP and self._is_gateway(end.port))
        if not matters or self._is_minded(proto, end):
            return False
        return self.asks_host(end.addr, now)

    def _begins_itself(
        self, proto: Proto, own: Endpoint, peer: Endpoint, now: float, *, opens: bool
    ) -> Verdict:
        """A packet of this host's own goes on; the replies to it will, too."""
        assert self.policy is not None
        if (opens or proto is _UDP) and self.policy.serves(proto, own.port):
            self.nat.saw_own(proto, own, peer, now)
        return self._pass("own")

    def _elsewhere(self, server: Endpoint, client: Endpoint, now: float) -> Rewrite | Verdict:
        """What becomes of a datagram that no flow claims, and which may be an answer from another
        port than was asked.  Raises Refusal."""
        answered = self.nat.answered_elsewhere(server, client, now)
        if answered is not None:
            return answered.by(Side.SERVER) or Verdict.PASS
        if self._is_minded(_UDP, server) or self._is_minded(_UDP, client):
            return self._stray(now)
        return self._pass("no_row")  # this host's own, or the server's: nothing that was relayed

    def saw_elsewhere(self, packet: bytes, hook: int, now: float) -> Endpoint | None:
        """The head of a datagram that the server sent, and that goes on untouched: the service that
        its receiver has asked, if it is an answer from another port than that.

        Such a service isn't allowed it (`Policy.any_port`), so the client most likely ignores it.
        """
        server, client = FlowKey.unpack(packet[ipv4.FLOW_KEY])
        asked = self.nat.asked_elsewhere(server, client)
        if asked is not None:
            self.other_ports[asked.port] += 1
            self._told(packet, hook, self._pass("other_port"))
        return asked

    def _goes_on(self, client: Endpoint, flags: int) -> bool:
        """Whether this packet to a forwarded service, no SYN, may be of a connection unknown."""
        assert self.policy is not None
        if flags & _OPENING != tcp.ACK:
            return False
        return self.policy.source_for(client.addr) is Source.CLIENT

    def _ask_client(self, server: Endpoint, client: Endpoint, now: float) -> None:
        """Asks who a server's packet goes to whether he is in a connection with this host."""
        policy = self.policy
        assert policy is not None
        if server.addr not in policy.backends or server.port not in policy.forwarded:
            return
        if policy.source_for(client.addr) is not Source.CLIENT:
            return
        if (Proto.TCP, flow_key(client, server)) in self.nat.direct:
            return
        for own in sorted(policy.own):
            if own[0] != 127 and self._answer_pace.admits(now):
                query = _syn(flow_key(client, Endpoint(own, server.port)))
                self.answers.append(query)
                self._remember(query)

    def _tell_end(
        self, rewrite: Rewrite, packet: bytes, header: ipv4.Header, flags: int, now: float
    ) -> Verdict:
        """A packet of a flow that was killed: its sender is reset, unless it has reset itself."""
        flow = rewrite.flow
        side = SIDES.get(rewrite.step)
        if side is not None:
            answer = tcp.reset_for(packet, header)
            if answer is not None:
                # Whatever the pace: it may be the only packet by which this end can be told.
                self.answers.append(answer)
            flow.told |= {side}
            if len(flow.told) == 2:
                self.nat.close(flow, now)
        return self._drop("killed")

    def _ends_here(self, packet: bytes, header: ipv4.Header, server: bytes, now: float) -> bool:
        """Whether this first packet of a flow can't be forwarded; its sender is then told.

        The kernel would tell him, too, but with connection tracking its error would be lost on
        the way to the queue (ruleset.py); from the second packet on there is nothing to mind.
        """
        assert self.policy is not None
        mtu = self.policy.mtu
        if header.ttl <= 1:
            error = icmp.time_exceeded(packet, header)
        elif (
            header.total > mtu
            and header.fragment & ipv4.DONT_FRAGMENT
            and server in self.policy.backends
        ):
            error = icmp.too_big(packet, header, mtu)
        else:
            return False
        told = self._told_lately
        told.forget(now)
        if told.admits(header.src, TOLD_EACH, now) and self._answer_pace.admits(now):
            told.began(header.src, TOLD_EACH, now)
            self.answers.append(error)
        return True

    def _is_minded(self, proto: Proto, end: Endpoint) -> bool:
        """Whether new flows or flows that live lead to this port of this server."""
        assert self.policy is not None
        if end.addr in self.policy.backends and self.policy.serves(proto, end.port):
            return True
        addr, port = end
        for each in self.nat.footprints:  # no generator: this is asked of each new connection
            if each.server == addr and each.port == port and each.proto is proto:
                return True
        return False

    def _is_forwarded_to(self, proto: Proto, dst: Endpoint) -> bool:
        """Whether flows without tcp-relay lead there, so that a port of this host may be one's."""
        assert self.policy is not None
        if proto is Proto.UDP:
            return self._is_minded(proto, dst)
        if dst.addr in self.policy.backends and dst.port in self.policy.forwarded:
            return True
        wanted = (dst.port, dst.addr)
        return any(f.forwarded and (f.port, f.server) == wanted for f in self.nat.footprints)

    def _is_seen_low(self, proto: Proto, src: Endpoint, dst: Endpoint) -> bool:
        """Whether a connection that tcp-relay terminates may be seen from this port of this host,
        though no socket of tcp-relay's has it (NatTable.attach)."""
        return proto is _TCP and src.port < FIRST_HIGH and self._is_minded(proto, dst)

    def _is_gateway(self, port: int) -> bool:
        """Whether this is a gateway port, of new flows or of flows that live."""
        assert self.policy is not None
        return port == self.policy.gport or any(f.gport == port for f in self.nat.footprints)

    def _open_tcp(self, client: Endpoint, service: Endpoint, now: float) -> Flow:
        policy = self.policy
        assert policy is not None
        if policy.gport not in policy.served:
            raise Refusal(_NO_RELAY)
        server = policy.backend_for(service, client)
        source = policy.source_for(client.addr)
        return self.nat.open_tcp(client, service, server, source, policy.gport, now)

    def _open_forwarded(
        self, proto: Proto, client: Endpoint, service: Endpoint, now: float
    ) -> Flow:
        policy = self.policy
        assert policy is not None
        return self.nat.open_forwarded(
            proto,
            client,
            service,
            policy.backend_for(service, client),
            policy.source_for(client.addr),
            now,
            relay_addr=policy.towards,
            any_client=policy.source is Source.RELAY,
            any_port=proto is _UDP and service.port in policy.any_port,
            services=policy.udp if proto is _UDP else policy.tcp,
        )

    def _refuse_direct(self, packet: bytes, header: ipv4.Header, now: float) -> Verdict:
        """Somebody talks to the gateway port itself: a RST, as from a closed port."""
        answer = tcp.reset_for(packet, header)
        if answer is not None and self._answer_pace.admits(now):
            self.answers.append(answer)
            self._remember(answer)
        return self._drop("gateway_port")

    def _remember(self, packet: bytes) -> None:
        """This packet of our own will be met on its way out (`_is_answer`)."""
        self._answered[_told_by(packet, ipv4.MIN_HEADER)] = None
        if len(self._answered) > _MOST_ANSWERS:
            del self._answered[next(iter(self._answered))]

    def _is_answer(self, packet: bytes, at: int) -> bool:
        """Whether this is a packet that we have just sent ourselves, and not of a flow between the
        ports.

        A client may have a relayed connection, and from the same port talk to the gateway port.
        """
        return bool(self._answered) and self._answered.pop(_told_by(packet, at), self) is None

    def _refuse(
        self, packet: bytes, header: ipv4.Header, hook: int, reason: str, now: float
    ) -> Verdict:
        """There is no room for a new flow: TCP hears of it by a RST, UDP by ICMP 3/13."""
        assert self.policy is not None
        if reason != _NO_RELAY:
            self.refused.saw(header.src, reason)
        elif now < max(self.waiting_until, self.recovering_until):
            return self._drop(reason)
        if self.policy.answers and hook == Hook.PREROUTING and self._answer_pace.admits(now):
            if header.proto == Proto.UDP:
                # About a client's own query to the server: the kernel fills in who says it.
                own = header.dst in self.policy.own or self.asks_host(header.dst, now)
                sender = header.dst if own else bytes(ipv4.ADDRESS)
                answer: bytes | None = icmp.prohibited(packet, header._replace(dst=sender))
            else:
                answer = tcp.reset_for(packet, header)
            if answer is not None:
                self.answers.append(answer)
        return self._drop(reason)

    def _opens(self, rewrite: Rewrite, packet: bytes, at: int) -> bool:
        """Whether this SYN is the flow's own: it begins the connection, or repeats what began it,
        or is for an end to judge by its numbers.  `at`: where its TCP header begins.

        RFC 9293, section 3.6.1: a port may be used again; and 3.10.7.4: in a connection a SYN is
        answered by an ACK, whoever has sent it.
        """
        flow, step = rewrite.flow, rewrite.step
        if flow.leg is None and step in (_T3, _T4):
            self.nat.observers.needs_ends()  # it may have begun past the worker
        if step is _T3:
            number = int.from_bytes(packet[at + tcp.SEQ : at + tcp.SEQ + 4])
            if flow.leg is None and flow.closed_at is None:
                flow.leg = number
            return flow.leg == number and flow.closed_at is None
        if step is _T1:
            if flow.closed_at is not None or self._is_nobodys(flow):
                return False
            if not flow.accepted:
                return not flow.tracker.reset
            flow.called_again = self._still_served(flow)
            return flow.called_again
        if step in _BEGINNINGS:
            return flow.tracker.state not in _ENDED
        if step is _T4:
            return flow.closed_at is None and flow.leg is not None and flow.leg >= 0
        return step is not _T2

    def _opens_other(self, rewrite: Rewrite, now: float) -> Rewrite | Verdict:
        """What becomes of a SYN that is none of the flow's own.  Raises Refusal."""
        flow, step = rewrite.flow, rewrite.step
        if step in _BEGINNINGS:
            found = None
            if flow.closed_at is not None or not flow.accepted or flow.orphaned:
                found = self._open_again(flow, now)
            return found or self._drop("not_relaying")
        if step is _T2:
            return self._drop("no_row")  # a listening port of this host, from which nobody connects
        # Its port is free, and somebody else's connection begins there, or leads to it.
        relay = flow.relay
        self.nat.give_up(flow, now)
        if step is not _T3 or relay is None:
            return self._pass("no_row")
        return self._begins_itself(_TCP, relay, flow.server, now, opens=True)

    def _is_nobodys(self, flow: Flow) -> bool:
        """Whether T1 would lead to a port that is no tcp-relay's any more, of whom none has the
        flow."""
        policy = self.policy
        is_free = flow.orphaned or not flow.accepted
        return is_free and policy is not None and flow.gport not in policy.served

    def _still_served(self, flow: Flow) -> bool:
        """Whether new connections to the service of this flow are relayed."""
        return self.policy is not None and self.policy.serves(_TCP, flow.service.port)

    def _open_again(self, flow: Flow, now: float) -> Rewrite | None:
        """The rewrite for that packet; None if the service is none any more.  Raises Refusal."""
        if flow.gport is None and not flow.is_forwarded:
            flow.tracker = Through()
            return flow.rewrites[Step.D1]
        if self.policy is None or not self.policy.serves(Proto.TCP, flow.service.port):
            return None
        terminated = flow.service.port not in self.policy.forwarded
        if terminated and self.policy.gport not in self.policy.served:
            raise Refusal(_NO_RELAY)
        self.nat.observers.displaced(flow)  # what the kernel has seen of it is told with that
        if flow.is_forwarded or not flow.accepted:
            # The port it had towards the server is wanted again; or that towards tcp-relay, which
            # never heard of it: this host has reset what it can't place, and now it tries again.
            self.nat.end(flow)
        if flow.service.port in self.policy.forwarded:
            return self._open_forwarded(Proto.TCP, flow.client, flow.service, now).by(Side.CLIENT)
        return self._open_tcp(flow.client, flow.service, now).rewrites[Step.T1]

    def _track(self, rewrite: Rewrite, packet: bytes, at: int, flags: int, now: float) -> None:
        """Takes note of a packet's TCP flags."""
        flow = rewrite.flow
        tracker = flow.tracker
        before, reset = tracker.state, tracker.reset
        if not flags & tcp.RST:  # RFC 7857: a RST doesn't keep a flow alive
            rewrite.seen_at = now
        sender = SENDERS.get(rewrite.step)
        if sender is None:
            return
        if isinstance(tracker, Through):
            tracker.segment(sender, _segment(packet, at, flags))
        else:
            tracker.saw(sender, flags)
        if tracker.reset and not reset:
            flow.reset_at = now
        if tracker.state is not before or tracker.reset is not reset:
            self.nat.tracking.changed(flow)

    def _marked(self, rewrite: Rewrite, tos: int, flags: int, now: float) -> None:
        """This packet has another DSCP, or another ECN field, than the one before it."""
        if rewrite.step not in DSCP_STEPS or not (tos ^ rewrite.tos) & _DSCP:
            rewrite.tos = tos
        elif not flags & tcp.RST:  # which many hosts send with none
            self.nat.tracking.mark(rewrite, tos, now)

    def _stray(self, now: float) -> Verdict:
        """A packet that is nobody's, or that of a flow which a killed krelay knew."""
        if now < self.recovering_until:
            return self._drop("recovering")
        return self._pass("no_row")

    def _pass(self, reason: str) -> Verdict:
        self._reason = reason
        self.counts.passed[reason] += 1
        return Verdict.PASS

    def _drop(self, reason: str) -> Verdict:
        self._reason = reason
        self.counts.dropped[reason] += 1
        return Verdict.DROP


def probes(flow: Flow) -> list[bytes]:
    """What makes both ends of a forwarded flow that was killed say something: a SYN to each."""
    ends = (flow.by(side) for side in (Side.CLIENT, Side.SERVER))
    return [_syn(rewrite.old) for rewrite in ends if rewrite is not None]


def asks(flow: Flow) -> list[bytes]:
    """What makes every end of a TCP flow say something to its peer: a SYN to each.

    An end that lives answers by an ACK, which a peer that lives ignores and one that has forgotten
    the connection answers by a RST: so nobody waits for who is gone.  Of what tcp-relay terminates
    there are four ends, the two in the middle on this host.
    """
    if flow.is_forwarded:
        return probes(flow)
    return [_syn(rewrite.old) for rewrite in flow.rewrites.values()]


def _syn(coming: bytes) -> bytes:
    """A SYN to where packets of these addresses and ports come from."""
    to, of = FlowKey.unpack(coming)
    return tcp.build(of.addr, to.addr, of.port, to.port, tcp.SYN, window=ipv4.MAX_TOTAL)


def _segment(packet: bytes, at: int, flags: int) -> TcpSegment:
    """What a packet says whose TCP header, whole, begins at `at`."""
    seq, ack, offset = _NUMBERS(packet, at + tcp.SEQ)
    total = int.from_bytes(packet[2:4])
    size = max(0, total - at - (offset >> 4) * 4)
    return TcpSegment(flags, seq, ack, size + bool(flags & tcp.SYN) + bool(flags & tcp.FIN))


def _was_killed(flow: Flow) -> bool:
    return flow.abort_asked and flow.is_forwarded


def _told_by(packet: bytes, at: int) -> bytes:
    """What tells a TCP packet from others: its addresses, and its header at `at` to the window."""
    return packet[ipv4.ADDRESSES] + packet[at : at + tcp.CHECK]


def flow_of(packet: bytes) -> FiveTuple:
    """The flow of a packet that `handle` would rewrite.  Raises BadPacket for others."""
    header = ipv4.parse(packet)
    at = header.length
    if header.proto not in (Proto.TCP, Proto.UDP) or header.total < at + udp.HEADER:
        raise BadPacket("other_protocol")
    return FiveTuple(
        Proto(header.proto),
        Endpoint(header.src, int.from_bytes(packet[at : at + 2])),
        Endpoint(header.dst, int.from_bytes(packet[at + 2 : at + 4])),
    )


def readdressed(packet: bytes, header: ipv4.Header, rewrite: Rewrite) -> bytes:
    """The packet with other addresses and ports and both checksums updated; `header` is its own."""
    at = header.length
    new = rewrite.new
    check = updated(int.from_bytes(packet[ipv4.CHECK]), rewrite.ip_delta)
    where = at + (tcp.CHECK if header.proto == Proto.TCP else udp.CHECK)
    field = int.from_bytes(packet[where : where + 2])
    update = updated if header.proto == Proto.TCP else udp.updated_check
    return b"".join(
        (
            packet[: ipv4.CHECK.start],
            check.to_bytes(2),
            key_addrs(new),
            packet[ipv4.ADDRESSES.stop : at],
            key_ports(new),
            packet[at + 4 : where],
            update(field, rewrite.l4_delta).to_bytes(2),
            packet[where + 2 :],
        )
    )
