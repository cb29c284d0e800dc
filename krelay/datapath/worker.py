"""One packet in, one verdict out.

Most packets belong to a flow and have a plain header: for those `handle` is a dictionary look-up by
the flow key (addresses and ports), two additions for the checksums, and one new string.  Nothing is
parsed that isn't needed.  Everything else (options, first packets of a flow, unmatched packets,
malformed ones) takes the slow path below it, which is as careful as it is slow: what a packet of no
flow begins is decided in newflow.py, whose SYN comes to a flow in reopening.py, how senders are
told that they are refused in refusals.py.

No bytes raise an exception.  A packet that isn't what it says goes on as it would without krelay,
and is counted; the kernel judges it.
"""

import struct
from collections import Counter
from collections.abc import Callable

from knet.endpoint import Endpoint, FlowKey, Proto
from knet.wire import BadPacket, icmp, ipv4, tcp, udp
from krelay.datapath.newflow import NewFlows
from krelay.datapath.readdress import readdressed
from krelay.datapath.reasons import OF_WORD, Reason
from krelay.datapath.refusals import Refusals
from krelay.datapath.reopening import Reopening
from krelay.datapath.state import WorkerState
from krelay.datapath.verdict import NotRewritten, Pass, Refuse, Verdict
from krelay.nat import icmperror
from krelay.nat.admission import Refusal
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import TcpSegment, Through
from krelay.rules.steprows import DSCP_STEPS
from krelay.steps import SENDERS, Hook

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
_SYN, _OWN = tcp.SYN, Reason.OWN
# By these names: looking one up in its class takes ten times as long.


class Worker(WorkerState):
    """The packet path: `handle` every packet the kernel queued.

    Checksums are updated in place in `handle` (checksum.updated and udp.updated_check, written out:
    a call costs a tenth of the whole).
    """

    def __init__(self, nat: NatTable) -> None:
        super().__init__(nat)
        self.on_rewrite: Callable[[Rewrite, bytes, bytes], None] | None = None
        """Told of each packet that was rewritten, as it came and as it goes on, while it is
        traced."""
        self.on_untouched: Callable[[bytes, int, Verdict, str], None] | None = None
        """Told of each packet that wasn't: its hook, its verdict and the reason.  What it is
        answered with is in `answers`."""
        self._reason: Reason | None = None
        """Why the last packet that wasn't rewritten goes on or doesn't; None if it was, but goes
        elsewhere."""
        self.other_ports = Counter[int]()
        """Answers from another port than was asked, by the port of the service."""
        self._refusals = Refusals(self)
        self._new_flows = NewFlows(self, self._refusals)
        self._reopening = Reopening(self, self._new_flows)
        self.refused = self._refusals.refused
        self._is_answer = self._refusals.is_answer
        self._is_its_own = self._reopening.is_its_own
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
                                return self._told(packet, hook, self._pass(_OWN))
                            if flags & _OPENING == _SYN:
                                if not self._is_its_own(rewrite, packet, ipv4.MIN_HEADER):
                                    return self._told(
                                        packet, hook, self._slow_path(packet, hook, now)
                                    )
                            elif _was_killed(rewrite.flow):
                                return self._told(packet, hook, self._slow_path(packet, hook, now))
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
        verdict = self._slow_path(packet, hook, now)
        return verdict if self.on_untouched is None else self._told(packet, hook, verdict)

    def _told(self, packet: bytes, hook: int, verdict: bytes | Verdict) -> bytes | Verdict:
        """The verdict; a trace has been told of it, unless the packet was rewritten."""
        traced, reason = self.on_untouched, self._reason
        if traced is not None and reason is not None and isinstance(verdict, Verdict):
            traced(packet, hook, verdict, reason)
        return verdict

    # The slow path

    def _slow_path(self, packet: bytes, hook: int, now: float) -> bytes | Verdict:
        try:
            header = ipv4.parse(packet)
            proto = _transport(packet, header)
            if proto is None:
                return self._icmp(packet, header, hook, now)
        except BadPacket as bad:
            if bad.reason == Reason.TRUNCATED or bad.reason in icmperror.BROKEN:
                return self._drop(OF_WORD[bad.reason])  # whole, it might have been a flow's
            return self._pass(OF_WORD[bad.reason])
        at = header.length
        tables = self._tcp if proto is _TCP else self._udp
        rewrite = tables[hook].get(packet[ipv4.ADDRESSES] + packet[at : at + 4])
        found: Rewrite | NotRewritten
        try:
            if rewrite is None:
                found = self._new_flows.begin(packet, header, proto, hook, now)
                if isinstance(found, Pass):
                    return self._pass(found.reason)
                if isinstance(found, Rewrite) and packet[0] == ipv4.PLAIN:
                    return self.handle(packet, hook, now)  # the usual way is open to it now
            else:
                found = rewrite
            if isinstance(found, Rewrite):
                found = self._noted(found, packet, header, now)
        except Refusal as refusal:
            found = Refuse(OF_WORD[refusal.reason])
        if isinstance(found, NotRewritten):
            return self._untouched(found, packet, header, hook, now)
        found.packets += 1
        if found.packets >= found.tell_at:
            self.nat.tracking.counted(found, now)
        found.bytes += header.total
        self.counts.steps[found.step] += 1
        new = readdressed(packet, header, found)
        if self.on_rewrite is not None:
            self.on_rewrite(found, packet, new)
        return new

    def _noted(
        self, rewrite: Rewrite, packet: bytes, header: ipv4.Header, now: float
    ) -> Rewrite | NotRewritten:
        """Takes note of a packet of this flow; or what becomes of it if it isn't the flow's, or may
        not pass.  Raises Refusal."""
        if rewrite.flow.proto is not _TCP:
            rewrite.seen_at = now
            return rewrite
        at = header.length
        flags = packet[at + tcp.FLAGS]
        if flags & _OPENING == _SYN:
            if not self._is_its_own(rewrite, packet, at):
                another = self._reopening.begin_another(rewrite, now)
                if isinstance(another, NotRewritten):
                    return another
                rewrite = another
        elif _was_killed(rewrite.flow):
            return self._refusals.killed(rewrite, now)
        self._track(rewrite, packet, at, flags, now)
        if packet[1] != rewrite.tos:
            self._marked(rewrite, packet[1], flags, now)
        return rewrite

    def _icmp(self, packet: bytes, header: ipv4.Header, hook: int, now: float) -> bytes | Verdict:
        """An ICMP error about a flow's packet is translated.  Raises BadPacket."""
        own = self.policy.own if self.policy else frozenset()
        if hook != Hook.PREROUTING and header.src not in own and self.asks_host(header.src, now):
            own |= {header.src}
        adopt = self.nat.learning.adopt
        found = icmperror.translate(
            packet, header, hook, self.nat.tables, own, lambda key: adopt(key, now) is not None
        )
        if found is None:
            return self._pass(Reason.ICMP_NO_FLOW)
        for rewrite in found.by:
            self.counts.icmp[rewrite.step] += 1
        if self.on_rewrite is not None:
            self.on_rewrite(found.by[-1], packet, found.packet)
        if not found.sent_anew:
            return found.packet
        self.answers.append(found.packet)
        self._reason = None
        return Verdict.DROP

    def saw_elsewhere(self, packet: bytes, hook: int, now: float) -> Endpoint | None:
        """The head of a datagram that the server sent, and that goes on untouched: the service that
        its receiver has asked, if it is an answer from another port than that.

        Such a service isn't allowed it (`Policy.any_port`), so the client most likely ignores it.
        """
        server, client = FlowKey.unpack(packet[ipv4.FLOW_KEY])
        asked = self.nat.asked_elsewhere(server, client)
        if asked is not None:
            self.other_ports[asked.port] += 1
            self._told(packet, hook, self._pass(Reason.OTHER_PORT))
        return asked

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

    def _untouched(
        self, outcome: NotRewritten, packet: bytes, header: ipv4.Header, hook: int, now: float
    ) -> Verdict:
        if isinstance(outcome, Pass):
            return self._pass(outcome.reason)
        if isinstance(outcome, Refuse):
            self._refusals.refuse(packet, header, hook, outcome.reason, now)
        return self._drop(outcome.reason)

    def _pass(self, reason: Reason) -> Verdict:
        self._reason = reason
        self.counts.passed[reason] += 1
        return Verdict.PASS

    def _drop(self, reason: Reason) -> Verdict:
        self._reason = reason
        self.counts.dropped[reason] += 1
        return Verdict.DROP


def _transport(packet: bytes, header: ipv4.Header) -> Proto | None:
    """The protocol of a packet with a whole header of TCP or UDP; None for ICMP.

    Raises BadPacket for all else.
    """
    if header.is_fragment:
        raise BadPacket(Reason.FRAGMENT)
    at = header.length
    if header.proto == udp.PROTO:
        if header.total < at + udp.HEADER:
            raise BadPacket(Reason.SHORT_HEADER)
        length = int.from_bytes(packet[at + 4 : at + 6])
        if not udp.HEADER <= length <= header.total - at:
            raise BadPacket(Reason.BAD_LENGTH)
        return _UDP
    if header.proto == tcp.PROTO:
        if header.total < at + tcp.HEADER:
            raise BadPacket(Reason.SHORT_HEADER)
        return _TCP
    if header.proto == icmp.PROTO:
        return None
    raise BadPacket(Reason.OTHER_PROTOCOL)


def _segment(packet: bytes, at: int, flags: int) -> TcpSegment:
    """What a packet says whose TCP header, whole, begins at `at`."""
    seq, ack, offset = _NUMBERS(packet, at + tcp.SEQ)
    total = int.from_bytes(packet[2:4])
    size = max(0, total - at - (offset >> 4) * 4)
    return TcpSegment(flags, seq, ack, size + bool(flags & tcp.SYN) + bool(flags & tcp.FIN))


def _was_killed(flow: Flow) -> bool:
    return flow.abort_asked and flow.is_forwarded
