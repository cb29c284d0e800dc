"""Rows by which the kernel relays queries to a name server without asking first.  nft alone.  Pure.

A query is learnt where there is only one way to relay it: its client's address and port are free
towards the server, and the packet is as plain as they come.  After its response it is known for as
long as it takes until the copies have told of it, and a second response has come.
"""

from knet.netlink.nflog import HEAD
from knet.rules.ports import nft_set
from knet.rules.rows import IsLocal, RuleRow, Statement, Words, goto
from krelay.nat.flow import DNS_PORT
from krelay.nat.ownflows import UNREPLIED
from krelay.rules.spec import RuleSpec
from krelay.rules.steprows import POST, PRE, WORKER
from krelay.steps import Step

LEARNING_MOST = 4
"""Addresses of this host at which the kernel learns."""
LEARNT = tuple(f"learnt-{at}" for at in range(LEARNING_MOST))
"""Chains that learn, one an address of this host, and the sets of queries without a response."""
MINDED = "minded"
"""The set of clients' ends whose packets the worker must see."""
ANSWERED = 1
"""Seconds that a query is known in the kernel after its response."""
MINDED_WITHIN = int(UNREPLIED)
"""Seconds that this host's own query may wait for its response, here and in the worker."""
COUNTERS = {"udp-u12": Step.U12, "udp-u34": Step.U34}
"""Counters of what these rows rewrite."""
LEARNT_LENGTH = 576
"""Bytes of a query: longer ones might not fit the link to the server, so the worker looks."""
_PRE, _POST = f"{PRE}-udp", f"{POST}-udp"
_FLOW, _BACK = "ip saddr . udp sport", "ip daddr . udp dport"


def queries(spec: RuleSpec) -> list[RuleRow]:
    """The rows for queries, those of the chains that learn included: one chain an address."""
    if spec.learning is None:
        return []
    learning, label = spec.learning, "DNS query"
    names = dict(zip(LEARNT, learning.addresses, strict=False))
    ways = ", ".join(f"{address} : goto {name}" for name, address in names.items())
    # A client's own conversation with the server: its port is not free.
    own = Words(f"ip daddr {learning.server} udp dport {DNS_PORT}")
    rows = [
        RuleRow(Step.D1.label, _PRE, (own,), Statement(f"update @{MINDED} {{ {_FLOW} }}")),
        RuleRow(label, _PRE, (), Statement(f"udp dport {DNS_PORT} ip daddr vmap {{ {ways} }}")),
    ]
    worker = goto(WORKER)
    for name in names:
        asked = [
            f"ip saddr {nft_set(learning.strangers)}",
            "ip hdrlength != 5",
            "ip ttl < 2",
            f"ip length > {LEARNT_LENGTH}",
            f"{_FLOW} @{MINDED}",
            *(f"{_FLOW} @{other}" for other in names if other != name),
        ]
        rows += [RuleRow(label, name, (Words(each),), worker) for each in asked]
        learns = (
            f"update @{name} {{ {_FLOW} }} {_copied(spec)} ip daddr set {learning.server} "
            "counter name udp-u12 accept"
        )
        rows += [RuleRow(label, name, (), Statement(learns)), RuleRow(label, name, (), worker)]
    return rows


def responses(spec: RuleSpec) -> list[RuleRow]:
    """The rows for responses, which stand before those that queue."""
    if spec.learning is None:
        return []
    server = spec.learning.server
    return [
        RuleRow(
            "DNS response",
            _POST,
            (Words(f"udp sport {DNS_PORT} ip saddr {server} {_BACK} @{name}"),),
            Statement(
                f"update @{name} {{ {_BACK} timeout {ANSWERED}s }} "
                f"ip saddr set {address} {_copied(spec)} counter name udp-u34 accept"
            ),
        )
        for name, address in zip(LEARNT, spec.learning.addresses, strict=False)
    ]


def own_queries(spec: RuleSpec) -> list[RuleRow]:
    """What is said from here to another host's port, that host's answer isn't learnt as a query.

    The worker knows of it (ownflows.py), and MINDED sends the answer there.
    """
    if spec.learning is None or not spec.udp:
        return []
    match = Words(f"udp sport {DNS_PORT}"), IsLocal("saddr")
    minded = Statement(f"update @{MINDED} {{ {_BACK} timeout {MINDED_WITHIN}s }}")
    return [RuleRow("own flow", _POST, match, minded)]


def _copied(spec: RuleSpec) -> str:
    return f"log group {spec.queue} snaplen {HEAD}"


def sets(spec: RuleSpec) -> list[str]:
    """What nft is told to make, a line each."""
    if not spec.room:
        return []
    counters = [f"  counter {name} {{ }}" for name in COUNTERS]
    return counters + [
        f"  set {name} {{ type ipv4_addr . inet_service; flags dynamic, timeout; "
        f"size {spec.room}; timeout {spec.answered_within}s; }}"
        for name in (MINDED, *LEARNT)
    ]
