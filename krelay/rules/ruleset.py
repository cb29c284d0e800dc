"""Which packets go to the queue, and which the kernel rewrites itself: the texts of both tools.

The rows are made by queued.py (what goes to the worker) and offloaded.py (flows that were
offloaded); krelay/steps.py says which steps there are.  Here they become texts.

Rewriting happens outside of everything else that the host does to packets: incoming ones before
connection tracking sees them (priority raw, -300, behind defragmentation), outgoing ones after the
host's own rules, in nft also after its NAT.  So connection tracking, firewall rules and NAT of the
host see each relayed conversation as ordinary and complete, C:x to K:A and K:y to S, and `ct state
established` means what it says.  Nothing need be exempted from tracking (`notrack` would turn these
packets into `untracked` for a firewall, and the answers of clients' direct connections with them).

In PREROUTING the rules catch what comes to this host to a service or to a gateway port, what comes
from a server's service, what clients send to a server past the relay, and ICMP errors.  In
POSTROUTING they catch what this host sends from a gateway port or to a server's service, what a
server sends by UDP, what clients of source=relay send to a server, ICMP errors also to this host,
and this host's own packets from a service's port (of TCP, SYNs).

TCP that is forwarded is caught as UDP is.  Where a server may answer from any port, also what it
sends to who has asked it, and what they send to this host: that is who stands in the set `askers`,
which the rules fill themselves.  Of other UDP that servers send, a few copies a second are made
(`unmatched`), so that counters tell of answers from where no client expects them.

What this host itself sends from a relayed port, and hosts that it masquerades, the worker must have
seen, or it would take the reply for a client's (ownflows.py).  The rules for that come last, and
ask for the source's port first, so that nothing else pays for them.  With iptables POSTROUTING is
met before the host's NAT, so hosts that are masqueraded aren't seen there.

ICMP errors visit the queue only where what they quote may be ours: a packet to or from a server,
and on the way in also one of this host's own.  Going out it must be one of a service too, or have
IP options, behind which ports are not looked for: an error that this host makes itself about the
first packet of a conversation is tied to the same entry of connection tracking, and the kernel
drops what shares one that isn't confirmed yet instead of queueing it (nf_ct_drop_unconfirmed,
net/netfilter/nfnetlink_queue.c).  So what the host's firewall rejects is none of ours.  This also
catches what the host tells itself over `lo` (icmperror.py).  No other ICMP visits the queue.

Nor does this host tell any other, by an ICMP redirect, of a shorter way for packets to or from a
server.  Where these leave by the link they came by, its kernel would (ip_forward,
net/ipv4/ip_forward.c), and before our POSTROUTING, so of packets that are half rewritten.  A
server that has heard that once answers that client past the relay, TCP and UDP alike.

Datagrams must come whole, or their ports can't be seen.  The kernel reassembles fragments before
PREROUTING only where something has asked for it; the `socket` match of iptables and `tproxy` of nft
do that, without switching connection tracking on.  One rule that can never match is there for that
alone.

nft replaces a whole table in one transaction, or only its rules, so that hooks stay.  iptables
commits a table at a time: POSTROUTING (mangle) goes first and PREROUTING (raw), which begins new
flows, goes second, in one run; removal is the other way round.  What lies between the two passes no
packet wrongly: rewriting without anything new to rewrite.

SYNs to services have a queue of their own (`openings`).

No rule has `bypass`: without a worker these packets are dropped, never passed on unrewritten.
"""

from knet.rules import iptables, rows
from knet.rules.iptables import IptablesChain
from knet.rules.rows import RuleRow
from krelay.rules import offloaded, queued
from krelay.rules.queued import ASKERS
from krelay.rules.spec import RuleSpec, openings
from krelay.rules.steprows import OFFLOADED, OPENINGS, POST, PRE, WORKER

ASKERS_MOST = 1 << 16
_HOOKS = {
    PRE: "type filter hook prerouting priority -300; policy accept;",
    POST: "type filter hook postrouting priority 300; policy accept;",
}
_CHAINS = [f"{hook}{behind}" for hook in (PRE, POST) for behind in ("", "-tcp", "-udp")]
_KEPT = WORKER, OPENINGS, OFFLOADED
"""Chains whose rules stay where others change."""


def rules(spec: RuleSpec) -> list[RuleRow]:
    """All rows, in order within each chain."""
    return [
        *offloaded.offloaded(spec),
        *queued.first(spec),
        *queued.relayed(spec),
        *queued.own_udp(spec),
    ]


# nft


def nft_rules(spec: RuleSpec, *, with_xt: bool = False) -> dict[str, list[str]]:
    """The rules by chain.  `with_xt`: those that queue are missing, see netfilter.Nft."""
    chains: dict[str, list[str]] = {chain: [] for chain in _CHAINS}
    chains[WORKER] = [_queue(spec.queue, with_xt)]
    chains[OPENINGS] = [_queue(openings(spec.queue), with_xt)]
    if spec.lets_offloaded_pass:
        chains[OFFLOADED] = []
    return chains | rows.nft_rules(rules(spec))


def _queue(number: int, with_xt: bool) -> str:
    """How a chain of queues ends; the comment tells the doctor the queue of stale rules."""
    return f'drop comment "queue num {number}"' if with_xt else f"queue num {number}"


def nft_install(spec: RuleSpec, *, afresh: bool = True, with_xt: bool = False) -> str:
    """One transaction that puts the rules in, in place of any earlier ones of this name.

    Not `afresh`: hooks, the chains of queues and the set stay, and what stands in it.  When a hook
    goes, the kernel drops all that waits in any queue (nf_queue_nf_hook_drop,
    net/netfilter/nf_queue.c).
    """
    name = spec.name
    made = nft_rules(spec, with_xt=with_xt)
    lines = [nft_remove(name).rstrip()] if afresh else []
    if not afresh:
        made = {chain: lines for chain, lines in made.items() if chain not in _KEPT}
    lines += [f"table ip {name} {{", *_sets(spec)]
    lines += [f"  chain {chain} {{ {_HOOKS[chain]} }}" for chain in made if chain in _HOOKS]
    lines += [f"  chain {chain} {{ }}" for chain in made if chain not in _HOOKS]
    lines += ["}"]
    lines += [f"flush chain ip {name} {chain}" for chain in made] if not afresh else []
    lines += [f"table ip {name} {{"]
    for chain, each in made.items():
        lines += [f"  chain {chain} {{", *(f"    {rule}" for rule in each), "  }"]
    return "\n".join([*lines, "}", ""])


def _sets(spec: RuleSpec) -> list[str]:
    if not spec.asked_within:
        return []
    return [
        f"  set {ASKERS} {{ type ipv4_addr . inet_service; flags dynamic, timeout; "
        f"size {ASKERS_MOST}; }}"
    ]


def nft_remove(name: str) -> str:
    """One transaction that takes the rules out, whether they are there or not."""
    return f"add table ip {name}\ndelete table ip {name}\n"


# iptables


def chains(name: str) -> tuple[IptablesChain, IptablesChain]:
    """Where new flows begin, and where everything leaves."""
    return (
        IptablesChain("raw", "PREROUTING", f"{name}-pre"),
        IptablesChain("mangle", "POSTROUTING", f"{name}-post"),
    )


def iptables_rules(spec: RuleSpec) -> tuple[list[str], list[str]]:
    """The rules of PREROUTING, and those of POSTROUTING."""
    found = rules(spec)
    return rows.iptables_rules(found, PRE), rows.iptables_rules(found, POST)


def iptables_install(spec: RuleSpec, hung: frozenset[str]) -> str:
    """Input for iptables-restore --noflush; `hung` names the chains that are jumped to already."""
    pre, post = chains(spec.name)
    into, out = iptables_rules(spec)
    return iptables.install(post, out, hung) + iptables.install(pre, into, hung)


def iptables_remove(name: str, hung: frozenset[str], present: frozenset[str]) -> str:
    """Input for iptables-restore --noflush that takes out what is there."""
    return iptables.remove(chains(name), hung, present)
