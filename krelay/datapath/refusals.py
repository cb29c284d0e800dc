"""How senders are told that their packets aren't relayed: RSTs, ICMP errors, probes.

Refused clients get a reset, of UDP an ICMP error, or are dropped: where the policy says so, beyond
ANSWERS a second, and while a tcp-relay that was lost may come back.

A forwarded flow that was killed takes nothing to its other end any more.  Each packet of an end is
answered by a RST with the number that it acknowledges, which it accepts (RFC 9293, section
3.10.7.4); an end that has nothing to say is probed (probes.py).
"""

from collections.abc import Iterator

from knet.endpoint import Endpoint, Proto, Source, flow_key
from knet.ratelimit import PerClientLimiter, RateLimiter, TopRefusedClients
from knet.wire import icmp, ipv4, tcp
from krelay.datapath.probes import probe
from krelay.datapath.reasons import Reason
from krelay.datapath.state import WorkerState
from krelay.datapath.verdict import Drop, NotRewritten, Refuse
from krelay.nat.flow import Rewrite
from krelay.steps import SIDES, Hook

ANSWERS = 1000
"""Answers of our own, of whatever kind, a second; the rest is dropped in silence (RFC 1812, section
4.3.2.8; the same figure as Linux's icmp_msgs_per_sec).  But ends of a killed flow are all reset."""
ANSWERS_AT_ONCE = 50
TOLD_EACH = 6
"""ICMP errors of those to one address, a second and at once: where that is forged, its owner is not
to be bothered much (Linux's icmp_ratelimit is of the same kind)."""
AWAY_GRACE = 1.0
"""Seconds: a SYN that isn't answered is sent again after one (RFC 6298)."""
_MOST_ANSWERS = 256
_MET_AGAIN = (Reason.GATEWAY_PORT, Reason.RECOVERING)
"""Refusals whose answers are caught by the rules on their way out."""


class Refusals:
    """Makes the answers (WorkerState.answers), and knows them again on their way out."""

    def __init__(self, state: WorkerState) -> None:
        self.refused = TopRefusedClients()
        """The clients that were refused for want of room."""
        self._state = state
        self._pace = RateLimiter(ANSWERS, ANSWERS_AT_ONCE)
        self._told_lately = PerClientLimiter()
        self._answered: dict[bytes, None] = {}

    def refuse(
        self, packet: bytes, header: ipv4.Header, hook: int, reason: Reason, now: float
    ) -> None:
        """The packet is dropped for this reason; its sender is told so, if it may be.

        While recovering it is the receiver of a server's packet that is probed: a challenge ACK
        shows that there is a connection to be picked up.
        """
        if not self._may_answer(packet, header, hook, reason, now):
            return
        for answer in self._answers(packet, header, reason, now):
            self._state.answers.append(answer)
            if reason in _MET_AGAIN:
                self._remember(answer)

    def killed(self, rewrite: Rewrite, now: float) -> NotRewritten:
        """What becomes of a packet of a flow that was killed: each end is told, by a RST."""
        flow = rewrite.flow
        side = SIDES.get(rewrite.step)
        if side is None:
            return Drop(Reason.KILLED)
        flow.told |= {side}
        if len(flow.told) == 2:
            self._state.nat.close(flow, now)
        return Refuse(Reason.KILLED)

    def has_sent(self, packet: bytes, at: int) -> bool:
        """Whether this packet is a probe or a RST of `refuse`, and not yet met on its way out;
        `at`: where its TCP header begins."""
        return _told_by(packet, at) in self._answered

    def is_answer(self, packet: bytes, at: int) -> bool:
        """As has_sent, and from now on it has been met.

        A client may have a relayed connection, and from the same port talk to the gateway port: so
        the ports don't tell.
        """
        return bool(self._answered) and self._answered.pop(_told_by(packet, at), self) is None

    def _may_answer(
        self, packet: bytes, header: ipv4.Header, hook: int, reason: Reason, now: float
    ) -> bool:
        state, policy = self._state, self._state.policy
        assert policy is not None
        match reason:
            case Reason.RECOVERING | Reason.KILLED:
                # The packet of a killed flow may be the only one by which this end can be told.
                return True
            case Reason.GATEWAY_PORT:
                is_reset = packet[header.length + tcp.FLAGS] & tcp.RST
                return not is_reset and self._pace.admits(now)
            case Reason.NOT_FORWARDED:
                told = self._told_lately
                told.forget(now)
                if not (told.admits(header.src, TOLD_EACH, now) and self._pace.admits(now)):
                    return False
                told.began(header.src, TOLD_EACH, now)
                return True
            case Reason.NO_TCP_RELAY:
                if now < max(state.waiting_until, state.recovering_until):
                    return False
            case _:
                self.refused.saw(header.src, reason)
        return policy.answers and hook == Hook.PREROUTING and self._pace.admits(now)

    def _answers(
        self, packet: bytes, header: ipv4.Header, reason: Reason, now: float
    ) -> list[bytes]:
        """TCP is told by a RST, UDP by ICMP 3/13; what can't be forwarded by a router's error.  The
        kernel would send that, too, but with connection tracking it would be lost on the way to the
        queue (ruleset.py)."""
        state, policy = self._state, self._state.policy
        assert policy is not None
        if reason is Reason.RECOVERING:
            return [probe(key) for key in self._to_challenge(packet, header, now)]
        if reason is Reason.NOT_FORWARDED:
            if header.ttl <= 1:
                return [icmp.time_exceeded(packet, header)]
            return [icmp.too_big(packet, header, policy.mtu)]
        if header.proto == Proto.UDP:
            # About a client's own query to the server: the kernel fills in who says it.
            own = header.dst in policy.own or state.asks_host(header.dst, now)
            sender = header.dst if own else bytes(ipv4.ADDRESS)
            return [icmp.prohibited(packet, header._replace(dst=sender))]
        reset = tcp.reset_for(packet, header)
        return [reset] if reset is not None else []

    def _to_challenge(self, packet: bytes, header: ipv4.Header, now: float) -> Iterator[bytes]:
        """The receiver of a server's packet, with every address of this host to which it may have a
        connection."""
        policy, at = self._state.policy, header.length
        assert policy is not None
        server = Endpoint(header.src, int.from_bytes(packet[at : at + 2]))
        client = Endpoint(header.dst, int.from_bytes(packet[at + 2 : at + 4]))
        if server.addr not in policy.backends or server.port not in policy.forwarded:
            return
        if policy.source_for(client.addr) is not Source.CLIENT:
            return
        if (Proto.TCP, flow_key(client, server)) in self._state.nat.direct:
            return
        for own in sorted(policy.own):
            if own[0] != 127 and self._pace.admits(now):
                yield flow_key(client, Endpoint(own, server.port))

    def _remember(self, packet: bytes) -> None:
        """This packet of our own will be met on its way out (`is_answer`)."""
        self._answered[_told_by(packet, ipv4.MIN_HEADER)] = None
        if len(self._answered) > _MOST_ANSWERS:
            del self._answered[next(iter(self._answered))]


def _told_by(packet: bytes, at: int) -> bytes:
    """What tells a TCP packet from others: its addresses, and its header at `at` to the window."""
    return packet[ipv4.ADDRESSES] + packet[at : at + tcp.CHECK]
