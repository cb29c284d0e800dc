"""Rows by which packets that the kernel's programs rewrite go past the worker.  nft alone.  Pure.

The programs (offload/programs/relay.c) stand before PREROUTING and behind POSTROUTING.  Where a
packet comes in, they rewrite it and give it the priority PRIORITY, by which it passes here.  Only a
query that begins a flow by itself is rewritten here, so that rules before ours see it as it came:
some go by which address was asked, to have the answer leave by the right link.  A mark
would not do: rules of the host that stand before ours may set theirs as a whole.  A priority means
nothing to what is delivered here, and the kernel gives what it forwards another one (ip_forward,
net/ipv4/ip_forward.c).  It isn't taken off, since another krelay's rules may have to see it.

Where a packet goes out it is rewritten later, so in POSTROUTING a program is asked whether it will
be: the one rule of the chain OFFLOADED, which nft can't make (offload/carrier.py).  That rule marks
it: what the worker has rewritten may read as another packet that is in the map.  It isn't asked
about what IPsec will wrap, which happens behind POSTROUTING, before the packet goes out
(xfrm4_output, net/ipv4/xfrm4_output.c): there nothing would be rewritten.
Whatever is none of these meets all other rows, and so the worker.
"""

from hashlib import blake2s

from knet.rules.rows import Ending, RuleRow, Statement, Words
from krelay.rules.spec import RuleSpec
from krelay.rules.steprows import OFFLOADED, POST, PRE

PRIORITY = 0x6B726C79
"""The priority of a packet that is rewritten already, where it comes in."""
_LEARNT = 0x6B730000
MARK = 0x10000000
"""The bit of a packet's mark that says: it will be rewritten where it goes out.  No other bit is
used."""
_PLAIN = Words("rt ipsec missing")
_LABEL = "offloaded"


def learnt(name: str) -> int:
    """The priority of a query that began a flow by itself: it is still to be rewritten, by the
    rules of this name.  There may be several krelays on a host."""
    return _LEARNT | int.from_bytes(blake2s(name.encode(), digest_size=2).digest())


def offloaded(spec: RuleSpec) -> list[RuleRow]:
    """The rows that let go of packets, in order within each chain; they stand before all others."""
    if not spec.lets_offloaded_pass:
        return []
    queries = []
    if spec.learnt_to is not None:
        leads = Statement(f"ip daddr set {spec.learnt_to} accept")
        queries = [RuleRow("DNS query", PRE, (_has(learnt(spec.name)),), leads)]
    return [
        RuleRow(_LABEL, PRE, (_has(PRIORITY),), Ending.ACCEPT),
        *queries,
        RuleRow(_LABEL, POST, (_PLAIN,), Statement(f"jump {OFFLOADED}")),
    ]


def _has(priority: int) -> Words:
    return Words(f"meta priority {priority >> 16:x}:{priority & 0xFFFF:x}")
