"""Rows by which packets that the kernel's programs rewrite go past the worker.  nft alone.  Pure.

The programs (offload/programs/relay.c) stand before PREROUTING and behind POSTROUTING.  Where a
packet comes in, they rewrite it and mark it; the mark is taken off here, before any other rule of
the host sees it.  Where it goes out it is rewritten later, so in POSTROUTING a program is asked
whether it will be: the one rule of the chain OFFLOADED, which nft can't make (offload/carrier.py).
That rule marks it, too: what the worker has rewritten may read as another packet that is in the
map.  It isn't asked about what IPsec will wrap, which happens behind POSTROUTING, before the packet
goes out (xfrm4_output, net/ipv4/xfrm4_output.c): there nothing would be rewritten.
Whatever is none of these meets all other rows, and so the worker.
"""

from knet.rules.rows import RuleRow, Statement, Words
from krelay.rules.spec import RuleSpec
from krelay.rules.steprows import OFFLOADED, POST, PRE

MARK = 0x10000000
"""The bit of a packet's mark that says: it is rewritten already, or will be where it goes out.  No
other bit is used."""
_MARKED = Words(f"meta mark & {MARK:#x} == {MARK:#x}")
_PLAIN = Words("rt ipsec missing")
_LABEL = "offloaded"


def offloaded(spec: RuleSpec) -> list[RuleRow]:
    """The rows that let go of packets, in order within each chain; they stand before all others."""
    if not spec.lets_offloaded_pass:
        return []
    unmarked = Statement(f"meta mark set meta mark & {0xFFFFFFFF ^ MARK:#x} accept")
    return [
        RuleRow(_LABEL, PRE, (_MARKED,), unmarked),
        RuleRow(_LABEL, POST, (_PLAIN,), Statement(f"jump {OFFLOADED}")),
    ]
