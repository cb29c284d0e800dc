"""Packets that make an end of a TCP connection say something, so that it can be told what it must.

All are SYNs.  An end answers a SYN in a connection by an ACK, from whatever sender (RFC 9293,
section 3.10.7.4: the challenge ACK), and elsewhere by a RST.  So nothing need be known of sequence
numbers.
"""

from knet.endpoint import FlowKey
from knet.wire import ipv4, tcp
from krelay.nat.flow import Flow
from krelay.steps import Side


def abort_probes(flow: Flow) -> list[bytes]:
    """A SYN to each end of a forwarded flow that was killed: what they answer is reset.

    None to an end that was told already: it would answer that there is no such connection.
    """
    return _to_ends(flow, flow.told)


def liveness_probes(flow: Flow) -> list[bytes]:
    """A SYN to each end of a TCP flow.

    An end that lives answers by a challenge ACK, which a peer that lives ignores and one that has
    forgotten the connection answers by a RST: so no end waits for a peer that is gone.  Of what
    tcp-relay terminates there are four ends, the two in the middle on this host.
    """
    if flow.is_forwarded:
        return _to_ends(flow, frozenset())
    return [probe(rewrite.old) for rewrite in flow.rewrites.values()]


def probe(key: bytes) -> bytes:
    """A SYN to where packets with this flow key come from."""
    end, peer = FlowKey.unpack(key)
    return tcp.build(peer.addr, end.addr, peer.port, end.port, tcp.SYN, window=ipv4.MAX_TOTAL)


def _to_ends(flow: Flow, told: frozenset[Side]) -> list[bytes]:
    ends = (flow.by(side) for side in (Side.CLIENT, Side.SERVER) if side not in told)
    return [probe(rewrite.old) for rewrite in ends if rewrite is not None]
