"""Which packets go to the queue, as a value and as text for nft or iptables.

Rewriting happens outside of everything else that the host does to packets: incoming ones before
connection tracking sees them (priority raw, -300, behind defragmentation), outgoing ones after the
host's own rules, in nft also after its NAT.  So connection tracking, firewall rules and NAT of the
host see each relayed conversation as ordinary and complete, C:x to K:A and K:y to S, and `ct state
established` means what it says.  Nothing need be exempted from tracking (`notrack` would turn these
packets into `untracked` for a firewall, and the answers of clients' direct connections with them).

             PREROUTING                                  POSTROUTING
    T1, U1   to this host, a service                T2       from this host, a gateway port
             to this host, a gateway port           T3       from this host to S, a service
    T4       from S, a service (TCP)                U3,U4    from S, a service (UDP)
             clients' own, to S, a service          U2       from clients of source=relay to S
    U3       from S to this host (UDP)
    ICMP     errors                                 ICMP     errors, also to this host
                                                    own      from this host, from a service's port
                                                             (UDP; TCP: SYN)

TCP that is forwarded is caught as UDP is.  Where a server may answer from any port, also what it
sends to who has asked it, and what they send to this host: that is who stands in the set `askers`,
which the rules fill themselves.  Of other UDP that servers send, a few copies a second are made
(`strays`), so that somebody finds out that answers come from where nobody expects them.

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

Nor does this host tell anybody, by an ICMP redirect, of a shorter way for packets to or from a
server.  Where these leave by the link they came by, its kernel would (ip_forward,
net/ipv4/ip_forward.c), and before our POSTROUTING, so of packets that are half rewritten.  A
server that has heard that once answers that client past the relay, TCP and UDP alike.

Datagrams must come whole, or their ports can't be seen.  The kernel reassembles fragments before
PREROUTING only where something has asked for it; the `socket` match of iptables and `tproxy` of nft
do that, without switching connection tracking on.  One rule that can never match is there for that
alone.

nft replaces a whole table in one transaction, or only its rules, so that its maps stay.  iptables
commits a table at a time: POSTROUTING (mangle) goes first and PREROUTING (raw), which begins new
flows, goes second, in one run; removal is the other way round.  What lies between the two passes no
packet wrongly: rewriting without anything new to rewrite.

SYNs to services have a queue of their own (`openings`).

Before all that comes the fast path, in nft alone: what the worker would do with a packet of a flow
that was handed over, the kernel does itself (fastpath.py).  There is a map for each step, from the
addresses and ports that a packet comes with to the one field that the step changes, and a counter.
Packets that tell how a connection stands go to the worker all the same: SYN and RST of its ends and
of this host, FIN of what is forwarded.  But a FIN by which tcp-relay passes an end on need not wait
for the worker: of it a copy is enough (`ends`).  Nor need the SYN by which tcp-relay begins (T3):
one for each connection, which is known beforehand (the set tcp-begins), and copied (`begun`).  So
nobody else begins a connection past the worker from a port that a flow had.  A flow that isn't in a
map goes to the worker, so with empty maps these rules change nothing.

What a datagram costs the kernel is mostly how many rules it meets, so those that most of them need
stand before any others, and what no rule asks for leaves early.  Measured, where relaying a packet
takes 1,700 ns: comparing a field 5 ns, an interface 12, its name 33, finding a port in a set 40,
among ranges 100, a look-up of routes (`fib`) 95, in a map of flows 60.

No rule has `bypass`: without a worker these packets are dropped, never passed on unrewritten.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2s
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from knet.endpoint import Proto
from knet.netlink.nflog import HEAD
from knet.wire import icmp
from krelay.nat.flow import DNS_PORT, Footprint
from krelay.nat.ownflows import UNREPLIED
from krelay.steps import SIDES, Step

ANYONE = IPv4Network("0.0.0.0/0")
COMPARED_MOST = 4
"""Ports or ranges up to which comparing with each takes the kernel less than finding one in a set.
"""
MULTIPORT_MOST = 15
"""Ports in one multiport match; a range counts twice (net/netfilter/xt_multiport.c)."""
U32_MOST = 10
"""Ranges in one u32 test (linux/netfilter/xt_u32.h)."""
_U32_ICMP = "0>>22&0x3C"
"""Bytes of the IP header, behind which the ICMP header begins."""
U32_ERRORS = f"{_U32_ICMP}@0>>24={','.join(map(str, sorted(icmp.ERRORS)))}"
U32_REDIRECT = f"{_U32_ICMP}@0>>24={icmp.REDIRECT}"
NEVER = "255.255.255.255"
_BESIDE = 0x8000
"""By which the numbers of a krelay's second queue, and second log group, differ from the first."""
_BESIDE_TOO = 0x4000
"""By which its third log group differs."""
DEFAULT_QUEUE = 1600
_STRAYS_A_SECOND = 32
"""Copies of a server's datagrams that no rule asks for."""

Ports = tuple[tuple[int, int], ...]
"""Ranges, both ends included, in order, none touching another."""


class Learning(NamedTuple):
    """What the kernel relays by itself without asking first, and tells of by copies (learnt.py).

    Queries to a name server: flows of one packet each way.
    """

    server: IPv4Address
    """Where queries go."""
    addresses: tuple[IPv4Address, ...]
    """Of this host, to which they come; LEARNING_MOST at most."""
    strangers: tuple[IPv4Network, ...]
    """Sources about whose queries the worker decides; none may be in another."""


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """What is to be queued.  Equal specs make equal rules."""

    name: str
    queue: int
    tcp: Ports
    udp: Ports
    gports: tuple[int, ...]
    servers: tuple[IPv4Address, ...]
    relay_clients: tuple[IPv4Network, ...]
    """Whose forwarded packets may need their source changed to the relay's (step U2)."""
    forwarded: Ports = ()
    """TCP that takes the steps of UDP; `tcp` is what tcp-relay terminates."""
    room: int = 0
    """Flows that the kernel may be handed; 0: every packet visits the worker."""
    answered_within: int = 20
    """Seconds that the kernel waits for the answer to a query that it has learnt."""
    learning: Learning | None = None
    tells_ends: bool = False
    """Whether of FINs of terminated TCP copies are made for krelay, where no visit is needed."""
    any_port: Ports = ()
    """UDP whose servers may answer from any port; these are among `udp`, too."""
    follows_dscp: bool = False
    """Whether packets of terminated TCP visit the worker where the DSCP isn't what it was."""
    asked_within: int = 0
    """Seconds for which the kernel knows who has asked these; 0: it doesn't (no set of nft's), and
    whatever UDP the servers send is queued."""
    tells_strays: bool = False
    """Whether of some of the servers' UDP that isn't relayed copies are made for krelay."""

    @property
    def maps(self) -> tuple[int, int, bool]:
        """What maps are made for: with other values they are other maps."""
        return self.room, self.answered_within, self.follows_dscp

    @property
    def services(self) -> Ports:
        """The ports of both protocols."""
        return merged([*self.tcp, *self.forwarded, *self.udp])

    @property
    def any_tcp(self) -> Ports:
        """The ports of TCP, however it is relayed."""
        return merged([*self.tcp, *self.forwarded])


def openings(queue: int) -> int:
    """The queue of the SYNs to services, beside that of everything else.

    So a flood of SYNs overflows a queue in which nobody else waits.
    """
    return queue ^ _BESIDE


def ends(queue: int) -> int:
    """The log group of FINs, beside that of all other copies."""
    return queue ^ _BESIDE


def begun(queue: int) -> int:
    """The log group of the SYNs with which tcp-relay begins, beside both others."""
    return queue ^ _BESIDE_TOO


def strays(queue: int) -> int:
    """The log group of the servers' datagrams that no rule asks for, beside all others."""
    return queue ^ _BESIDE ^ _BESIDE_TOO


def instance_name(root: str, default_root: str) -> str:
    """The name of the chains of the krelay that serves this tree: two trees on a host get along."""
    if root == default_root:
        return "krelay"
    return "krelay-" + blake2s(root.encode(), digest_size=4).hexdigest()


_OURS = re.compile(r"(krelay(?:-[0-9a-f]{8})?)(?:-pre|-post)?")
_QUEUE = re.compile(r"queue(?: num| to|-num)? (\d+)")


def instance_of(name: str) -> str | None:
    """The instance that a table or chain of this name is of; None if it is none of krelay's.

    >>> instance_of("krelay-0badcafe-post"), instance_of("krelay"), instance_of("krelayed")
    ('krelay-0badcafe', 'krelay', None)
    """
    match = _OURS.fullmatch(name)
    return match[1] if match else None


def queue_of(text: str) -> int | None:
    """The queue that rules, as nft or iptables show them, send packets to."""
    match = _QUEUE.search(text)
    return int(match[1]) if match else None


def merged(ports: Iterable[tuple[int, int]]) -> Ports:
    """The same ports as ordered ranges that don't touch.

    >>> merged([(80, 80), (443, 443), (81, 90), (85, 100)])
    ((80, 100), (443, 443))
    """
    result: list[tuple[int, int]] = []
    for low, high in sorted(ports):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def wanted(
    *,
    name: str,
    queue: int,
    tcp: Iterable[tuple[int, int]],
    udp: Iterable[tuple[int, int]],
    gport: int | None,
    server: IPv4Address,
    source_is_relay: bool,
    beside: Iterable[IPv4Network],
    footprints: Iterable[Footprint],
    forwarded: Iterable[tuple[int, int]] = (),
    room: int = 0,
    answered_within: int = 20,
    learning: Learning | None = None,
    tells_ends: bool = False,
    any_port: Iterable[tuple[int, int]] = (),
    follows_dscp: bool = False,
    asked_within: int = 0,
    tells_strays: bool = False,
) -> RuleSpec:
    """What new flows need, and what the flows that live still need.  No `gport`: none is needed."""
    live = list(footprints)

    def of(proto: Proto, *, through: bool = False) -> list[tuple[int, int]]:
        return [(f.port, f.port) for f in live if (f.proto, f.forwarded) == (proto, through)]

    elsewhere = merged([*any_port, *((f.port, f.port) for f in live if f.any_port)])
    anyone = source_is_relay or any(f.any_client for f in live)
    return RuleSpec(
        name=name,
        queue=queue,
        tcp=merged([*tcp, *of(Proto.TCP)]),
        udp=merged([*udp, *of(Proto.UDP)]),
        forwarded=merged([*forwarded, *of(Proto.TCP, through=True)]),
        gports=tuple(sorted({*([gport] if gport else []), *(f.gport for f in live if f.gport)})),
        servers=tuple(sorted({server, *(IPv4Address(f.server) for f in live)})),
        relay_clients=(ANYONE,) if anyone else tuple(sorted(set(beside))),
        room=room,
        answered_within=answered_within,
        learning=learning if room else None,
        tells_ends=tells_ends and room > 0,
        any_port=elsewhere,
        follows_dscp=follows_dscp and room > 0,
        asked_within=asked_within if elsewhere else 0,
        tells_strays=tells_strays,
    )


# nft

LEARNING_MOST = 4
"""Addresses of this host at which the kernel learns."""
LEARNT = tuple(f"learnt-{at}" for at in range(LEARNING_MOST))
"""Chains that learn, one an address of this host, and the sets of queries without an answer."""
ANSWERED = 1
"""Seconds that a query is known in the kernel after its answer."""
MINDED_WITHIN = int(UNREPLIED)
"""Seconds that this host's own query may wait for its answer, here and in the worker."""
LEARNT_LENGTH = 576
"""Bytes of a query: longer ones might not fit the link to the server, so the worker looks."""
BEGINS = "tcp-begins"
"""The set of the connections to the server that tcp-relay may begin past the worker: once each."""
ASKERS = "askers"
"""The set of the clients' addresses and ports, as this host and the server know them, which have
asked what may be answered from any port."""
ASKERS_MOST = 1 << 16
BEGINS_WITHIN = 5
"""Seconds for which it may."""
WORKER, OPENINGS = "to-worker", "openings"
"""The chains that send packets to the two queues."""
_HOOKS = {
    "pre": "type filter hook prerouting priority -300; policy accept;",
    "post": "type filter hook postrouting priority 300; policy accept;",
}


_CAME_IN = "iif != 0"
"""In POSTROUTING: forwarded.  What this host makes has come in by no interface; before Linux 5.7
nothing has, there."""


class Change(NamedTuple):
    """What a step does to the packets that the kernel is handed: it changes one field."""

    hook: str
    """The chain in which it happens: `pre` or `post`."""
    field: str
    towards: bool
    """Whether these packets go to the service's port, or come from it."""


CHANGES = {
    Step.T1: Change("pre", "dport", True),
    Step.T2: Change("post", "sport", False),
    Step.T3: Change("post", "saddr", True),
    Step.T4: Change("pre", "daddr", False),
    Step.U12: Change("pre", "daddr", True),
    Step.U34: Change("post", "saddr", False),
    Step.U1: Change("pre", "daddr", True),
    Step.U2: Change("post", "saddr", True),
    Step.U3: Change("pre", "daddr", False),
    Step.U4: Change("post", "saddr", False),
}
"""Not D1 and D2, which are rare.  What must change a port beside stays with the worker, too."""


DSCP_STEPS = (Step.T1, Step.T4)
"""The steps of what comes from an end of terminated TCP: its DSCP goes on to the other one, so a
packet with another than the last is the worker's (RuleSpec.follows_dscp)."""
_ENDS = (Step.T2, Step.T3)
"""The steps in which tcp-relay passes on that an end has ended its direction."""
_PLAIN_FLAGS = {
    Step.T1: "(syn | rst) == 0",
    Step.T4: "(rst | ack) == ack",
    Step.T2: "(fin | rst | ack) == ack",
    Step.T3: "(fin | rst | ack) == ack",
}
"""Which flags packets must have to be the kernel's.  Whoever begins a connection sends one without
an ACK: so none begins past the worker, in a row's name."""


def map_name(proto: Proto, step: Step) -> str:
    """The name of the map of a step, and of its counter."""
    return f"{proto.name.lower()}-{step.name.lower()}"


def steps_handed(spec: RuleSpec) -> list[tuple[Proto, Step]]:
    """The steps for which there are maps, in the order in which a packet is looked for."""
    through = [Step.U12, Step.U34]
    if spec.relay_clients:
        through += [Step.U1, Step.U3, Step.U2, Step.U4]
    steps: list[tuple[Proto, Step]] = []
    if spec.tcp:
        steps += [(Proto.TCP, step) for step in (Step.T4, Step.T2, Step.T3)]
    if spec.forwarded:
        steps += [(Proto.TCP, step) for step in through]
    if spec.tcp:
        steps.append((Proto.TCP, Step.T1))  # the last, since it may be asked of every packet
    if spec.udp:
        steps += [(Proto.UDP, step) for step in through]
    return steps if spec.room else []


def nft_rules(spec: RuleSpec, *, with_xt: bool = False) -> dict[str, list[str]]:
    """The rules by chain.  `with_xt`: those that queue are missing, see netfilter.Nft."""
    tcp, udp, any_tcp = map(_nft_ports, (spec.tcp, spec.udp, spec.any_tcp))
    forwarded = _nft_ports(spec.forwarded)
    servers = _nft_servers(spec)
    gports = _nft_ports(tuple((p, p) for p in spec.gports))
    queue = f"goto {WORKER}"
    opening = f"tcp flags & (syn | ack) == syn goto {OPENINGS}"
    errors_in, errors_out = _nft_errors(spec)
    pre = ['iif "lo" return', *(f"{match} {queue}" for match in errors_in)]
    post = [f"{match} {queue}" for match in errors_out]
    post += [f"{match} drop" for match in _nft_quoting(spec, icmp.REDIRECT)]
    pre_tcp, pre_udp = ['iif "lo" return'], ['iif "lo" return']
    post_tcp, post_udp = ['oif "lo" return'], ['oif "lo" return']
    if gports:
        pre_tcp.append(f"tcp dport {gports} fib daddr type local {queue}")
        post_tcp.append(f"tcp sport {gports} fib saddr type local {queue}")
    if any_tcp:
        pre_tcp += [
            f"tcp dport {any_tcp} fib daddr type local {opening}",
            f"tcp dport {any_tcp} fib daddr type local {queue}",
        ]
        pre_tcp += [f"ip saddr {servers} tcp sport {tcp} {queue}"] if tcp else []
        pre_tcp.append(f"ip daddr {servers} tcp dport {any_tcp} {queue}")
    if tcp:
        post_tcp.append(f"ip daddr {servers} tcp dport {tcp} fib saddr type local {queue}")
    if forwarded:
        pre_tcp.append(f"ip saddr {servers} tcp sport {forwarded} fib daddr type local {queue}")
        post_tcp.append(f"ip saddr {servers} tcp sport {forwarded} {queue}")
    if any_tcp:
        # After what goes to the server, among which are the SYNs of tcp-relay.
        own = f"tcp flags & (syn | ack) == syn tcp sport {any_tcp} fib saddr type local {queue}"
        post_tcp.append(own)
    if udp:
        pre_udp += [
            f"udp dport {udp} fib daddr type local {queue}",
            f"ip daddr {servers} udp dport {udp} {queue}",
            f"ip saddr {servers} udp sport {udp} fib daddr type local {queue}",
        ]
        post_udp.append(f"ip saddr {servers} udp sport {udp} {queue}")
    pre_udp.append(f"ip daddr {NEVER} udp dport 0 tproxy to :9")
    if spec.relay_clients:
        clients = _nft_clients(spec, "saddr")
        if udp:
            post_udp.append(f"ip daddr {servers} udp dport {udp} fib saddr type local {queue}")
            post_udp.append(f"{clients}ip daddr {servers} udp dport {udp} {queue}")
        if forwarded:
            post_tcp.append(f"{clients}ip daddr {servers} tcp dport {forwarded} {queue}")
    if forwarded:
        local = f"ip daddr {servers} tcp dport {forwarded} fib saddr type local {queue}"
        post_tcp += [f"{_CAME_IN} return", local]
    if spec.any_port:
        asking, elsewhere_in, elsewhere_out = _nft_any_port(spec, queue)
        pre_udp[1:1], post_udp[1:1] = asking
        pre_udp += elsewhere_in
        post_udp += elsewhere_out
    if spec.tells_strays and udp:
        told = f"limit rate {_STRAYS_A_SECOND}/second burst {2 * _STRAYS_A_SECOND} packets "
        told += f"log group {strays(spec.queue)} snaplen {HEAD}"
        pre_udp.append(f"ip saddr {servers} fib daddr type local {told}")
        post_udp.append(f"ip saddr {servers} {told}")
    if udp:
        post_udp += _nft_own_queries(spec)
        post_udp.append(f"udp sport {udp} fib saddr type local {queue}")
    queries, answers, chains = _nft_learning(spec, spec.learning)
    pre_udp[1:1] = queries
    fast: dict[str, list[str]] = {}
    for proto, step in steps_handed(spec):
        fast.setdefault(_chain_of(proto, step), []).append(_nft_handed(spec, proto, step))
    if spec.tells_ends and spec.tcp and spec.room:
        fast["post-tcp"] += [_nft_handed(spec, Proto.TCP, step, fins=True) for step in _ENDS]
        fast["post-tcp"].append(_nft_handed(spec, Proto.TCP, Step.T3, begins=True))
    fast.setdefault("post-udp", []).extend(answers)
    return {
        "pre": [*fast.get("pre", []), *_nft_by_protocol("pre"), *pre],
        "pre-tcp": fast.get("pre-tcp", []) + pre_tcp,
        "pre-udp": fast.get("pre-udp", []) + pre_udp,
        "post": [*fast.get("post", []), *_nft_udp_done(spec), *_nft_by_protocol("post"), *post],
        "post-tcp": fast.get("post-tcp", []) + post_tcp,
        "post-udp": fast.get("post-udp", []) + post_udp,
        WORKER: [_nft_queue(spec.queue, with_xt)],
        OPENINGS: [_nft_queue(openings(spec.queue), with_xt)],
    } | (chains if spec.room else {})


def _nft_learning(
    spec: RuleSpec, learning: Learning | None
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The rules for queries, those for answers, and the chains that learn: one an address.

    A query is learnt where there is only one way to relay it: its client's address and port are
    free towards the server, and the packet is as plain as they come.  After its answer it is known
    for as long as it takes until the copies have told of it, and a second answer has come.
    """
    if learning is None:
        return [], [], {name: [] for name in LEARNT}
    flow, back = "ip saddr . udp sport", "ip daddr . udp dport"
    copied = f"log group {spec.queue} snaplen {HEAD}"
    names = dict(zip(LEARNT, learning.addresses, strict=False))
    ways = ", ".join(f"{address} : goto {name}" for name, address in names.items())
    queries = [
        # A client's own conversation with the server: its port is not free.
        f"ip daddr {learning.server} udp dport {DNS_PORT} update @minded {{ {flow} }}",
        f"udp dport {DNS_PORT} ip daddr vmap {{ {ways} }}",
    ]
    strangers = ", ".join(map(str, learning.strangers))
    chains: dict[str, list[str]] = {name: [] for name in LEARNT}
    chains |= {
        name: [
            f"ip saddr {{ {strangers} }} goto {WORKER}",
            f"ip hdrlength != 5 goto {WORKER}",
            f"ip ttl < 2 goto {WORKER}",
            f"ip length > {LEARNT_LENGTH} goto {WORKER}",
            f"{flow} @minded goto {WORKER}",
            *(f"{flow} @{other} goto {WORKER}" for other in names if other != name),
            f"update @{name} {{ {flow} }} {copied} ip daddr set {learning.server} "
            f"counter name udp-u12 accept",
            f"goto {WORKER}",
        ]
        for name in names
    }
    answers = [
        f"udp sport {DNS_PORT} ip saddr {learning.server} {back} @{name} "
        f"update @{name} {{ {back} timeout {ANSWERED}s }} "
        f"ip saddr set {address} {copied} counter name udp-u34 accept"
        for name, address in names.items()
    ]
    return queries, answers, chains


def _nft_any_port(
    spec: RuleSpec, queue: str
) -> tuple[tuple[list[str], list[str]], list[str], list[str]]:
    """The rules for services whose servers may answer from any port.

    First, for both hooks, those that note who asks; then those that queue what isn't between a
    client and a service: what comes in, what goes out.  A client is noted as it comes, and as it
    reads between the hooks, where its port was taken and another is given it.
    """
    ports, servers = _nft_ports(spec.any_port), _nft_servers(spec)
    clients = _nft_clients(spec, "saddr") if spec.relay_clients else ""
    if not spec.asked_within:
        through = [f"{clients}ip daddr {servers} {queue}"] if spec.relay_clients else []
        return (
            ([], []),
            [f"fib daddr type local {queue}"],
            [f"ip saddr {servers} {queue}", *through],
        )

    def noted(end: str) -> str:
        return f"update @{ASKERS} {{ {end} timeout {spec.asked_within}s }}"

    src, dst = "ip saddr . udp sport", "ip daddr . udp dport"
    asking = [f"udp dport {ports} fib daddr type local {noted(src)}"]
    coming = [f"{src} @{ASKERS} fib daddr type local {noted(src)} {queue}"]
    going = [f"ip saddr {servers} {dst} @{ASKERS} {noted(dst)} {queue}"]
    between = [f"ip daddr {servers} udp dport {ports} {noted(src)}"]
    if spec.relay_clients:
        coming.append(f"ip saddr {servers} fib daddr type local {queue}")
        going.append(f"{clients}ip daddr {servers} {src} @{ASKERS} {queue}")
    return (asking, between), coming, going


def _nft_own_queries(spec: RuleSpec) -> list[str]:
    """What is said from here to another host's port, that host's answer isn't learnt as a query.

    The worker knows of it (ownflows.py), and `minded` sends the answer there.
    """
    if spec.learning is None:
        return []
    peer = f"ip daddr . udp dport timeout {MINDED_WITHIN}s"
    return [f"udp sport {DNS_PORT} fib saddr type local update @minded {{ {peer} }}"]


def _nft_queue(queue: int, with_xt: bool) -> str:
    """How a chain of queues ends; the comment is for who looks for the queue of stale rules."""
    return f'drop comment "queue num {queue}"' if with_xt else f"queue num {queue}"


def _chain_of(proto: Proto, step: Step) -> str:
    """Where the kernel takes this step: that of most UDP packets before anything else."""
    hook = CHANGES[step].hook
    if proto is Proto.UDP and step in (Step.U12, Step.U34):
        return hook
    return f"{hook}-{proto.name.lower()}"


def _nft_by_protocol(hook: str) -> list[str]:
    return [f"ip protocol {name} goto {hook}-{name}" for name in ("tcp", "udp")]


def _nft_udp_done(spec: RuleSpec) -> list[str]:
    """What none of the rules of UDP in POSTROUTING asks for: most of what is forwarded."""
    if not spec.udp or ANYONE in spec.relay_clients or spec.any_port:
        return []
    others = f"ip saddr != {_nft_servers(spec)} "
    if spec.relay_clients:
        others += f"{_nft_clients(spec, 'saddr', '!=')}{_CAME_IN} "
    return [f"ip protocol udp {others}{_nft_not_from(spec.udp)}accept"]


def _nft_not_from(ports: Ports) -> str:
    """The match of packets from none of these ports: a few are compared faster than looked up."""
    if len(ports) > COMPARED_MOST:
        return f"th sport != {_nft_ports(ports)} "
    return "".join(f"th sport != {_nft_range(each)} " for each in ports)


def _nft_handed(
    spec: RuleSpec, proto: Proto, step: Step, *, fins: bool = False, begins: bool = False
) -> str:
    """The rule by which the kernel takes a step for the flows it was handed.

    `fins`: for the packets with which an end says that it has nothing more to say; `begins`: for
    the one with which tcp-relay begins its connection to the server.
    """
    name, change, chain = map_name(proto, step), CHANGES[step], _chain_of(proto, step)
    guard = _nft_guard(spec, proto, step)
    copied = ""
    key = "ip saddr . th sport . ip daddr . th dport"
    if _has_dscp(spec, proto, step):
        key += " . ip dscp"
    if chain == change.hook:
        guard = f"ip protocol {proto.name.lower()} {guard}"
    if begins:
        guard += "ip hdrlength 5 tcp flags & (fin | syn | rst | ack) == syn "
        guard += f"{key} @{BEGINS} delete @{BEGINS} {{ {key} }} "
        copied = f"log group {begun(spec.queue)} snaplen {HEAD} "
    elif fins:
        guard += "ip hdrlength 5 tcp flags & (fin | syn | rst) == fin "
        copied = f"log group {ends(spec.queue)} snaplen {HEAD} "
    elif proto is Proto.TCP:
        guard += f"tcp flags & {_PLAIN_FLAGS.get(step, '(fin | syn | rst) == 0')} "
    where = "ip" if change.field.endswith("addr") else proto.name.lower()
    return f"{guard}{where} {change.field} set {key} map @{name} {copied}counter name {name} accept"


def _has_dscp(spec: RuleSpec, proto: Proto, step: Step) -> bool:
    return spec.follows_dscp and proto is Proto.TCP and step in DSCP_STEPS


def _nft_guard(spec: RuleSpec, proto: Proto, step: Step) -> str:
    """What spares most packets that aren't of this step the look-up in its map.

    It need not be exact.  Several ports are no guard: finding one among them costs as much as such
    a look-up.  The server's address tells instead, or nothing does.
    """
    clients = ""
    if step in (Step.U1, Step.U2, Step.U4):
        clients = _nft_clients(spec, "daddr" if step is Step.U4 else "saddr")
    if step is Step.T2:
        return f"th sport {_nft_ports(tuple((port, port) for port in spec.gports))} "
    terminated = step in (Step.T1, Step.T3, Step.T4)
    ports = spec.udp if proto is Proto.UDP else spec.tcp if terminated else spec.forwarded
    towards = CHANGES[step].towards
    if len(ports) == 1 and ports[0][0] == ports[0][1]:
        return f"{clients}th {'dport' if towards else 'sport'} {_nft_ports(ports)} "
    if step in (Step.T1, Step.U12, Step.U1):
        return clients
    return f"{clients}ip {'daddr' if towards else 'saddr'} {_nft_servers(spec)} "


def nft_install(
    spec: RuleSpec,
    *,
    afresh: bool = True,
    former: RuleSpec | None = None,
    with_xt: bool = False,
) -> str:
    """One transaction that puts the rules in, in place of any earlier ones of this name.

    Not `afresh`: maps and counters stay, and what stands in them; the chains of queues, too.
    `former`: in place of these, which must be there.  Maps and counters are made anew, but hooks
    and the chains of queues stay: when a hook goes, the kernel drops all that waits in any queue
    (nf_queue_nf_hook_drop, net/netfilter/nf_queue.c).
    """
    name = spec.name
    rules = nft_rules(spec, with_xt=with_xt)
    lines = [nft_remove(name).rstrip()] if afresh else []
    if former is not None:
        afresh = False
        before = [chain for chain in nft_rules(former) if chain not in (WORKER, OPENINGS)]
        lines = [f"flush chain ip {name} {chain}" for chain in before]
        lines += [f"delete chain ip {name} {chain}" for chain in before if chain not in rules]
        lines += [
            f"delete {kind} ip {name} {what}"
            for kind, what, *_ in map(str.split, _nft_maps(former))
            if not (what == ASKERS and spec.asked_within)  # who has asked goes on to be known
        ]
    if not afresh:
        rules = {chain: lines for chain, lines in rules.items() if chain not in (WORKER, OPENINGS)}
    lines += [f"table ip {name} {{", *_nft_maps(spec)]
    lines += [f"  chain {chain} {{ {_HOOKS[chain]} }}" for chain in rules if chain in _HOOKS]
    lines += [f"  chain {chain} {{ }}" for chain in rules if chain not in _HOOKS]
    lines += ["}"]
    lines += [f"flush chain ip {name} {chain}" for chain in rules] if not afresh else []
    lines += [f"table ip {name} {{"]
    for chain, each in rules.items():
        lines += [f"  chain {chain} {{", *(f"    {rule}" for rule in each), "  }"]
    return "\n".join([*lines, "}", ""])


def _nft_maps(spec: RuleSpec) -> list[str]:
    key = "ipv4_addr . inet_service . ipv4_addr . inet_service"
    lines = []
    for proto, step in steps_handed(spec):
        value = "ipv4_addr" if CHANGES[step].field.endswith("addr") else "inet_service"
        name = map_name(proto, step)
        lines.append(f"  counter {name} {{ }}")
        counted = " counter;" if step in SIDES else ""
        of = f"{key} . dscp" if _has_dscp(spec, proto, step) else key
        lines.append(f"  map {name} {{ type {of} : {value}; size {spec.room};{counted} }}")
    if spec.room and spec.tcp:
        lines.append(
            f"  set {BEGINS} {{ type {key}; flags dynamic, timeout; size {spec.room}; "
            f"timeout {BEGINS_WITHIN}s; }}"
        )
    if spec.room:
        lines += [
            f"  set {name} {{ type ipv4_addr . inet_service; flags dynamic, timeout; "
            f"size {spec.room}; timeout {spec.answered_within}s; }}"
            for name in ("minded", *LEARNT)
        ]
    if spec.asked_within:
        lines.append(
            f"  set {ASKERS} {{ type ipv4_addr . inet_service; flags dynamic, timeout; "
            f"size {ASKERS_MOST}; }}"
        )
    return lines


def _nft_servers(spec: RuleSpec) -> str:
    return "{ " + ", ".join(map(str, spec.servers)) + " }"


def _nft_clients(spec: RuleSpec, field: str, relation: str = "==") -> str:
    """The match of clients whose source may have to be changed; of anyone, none.

    One network is matched by its mask, since that of a length in whole bytes becomes a comparison
    of one to three bytes otherwise, which takes the kernel five times as long.
    """
    if ANYONE in spec.relay_clients:
        return ""
    if len(spec.relay_clients) == 1:
        net = spec.relay_clients[0]
        return f"ip {field} & {net.netmask} {relation} {net.network_address} "
    return f"ip {field} {relation} {{ {', '.join(map(str, spec.relay_clients))} }} "


def _nft_errors(spec: RuleSpec) -> tuple[list[str], list[str]]:
    """Which ICMP errors visit the queue: those that come in, those that go out.

    The quoted IP header begins 64 bits behind the ICMP header: its length in 32-bit words at 68,
    source at 160, destination at 192; without options the ports follow at 224 and 240.
    """
    errors = f"{{ {', '.join(map(str, sorted(icmp.ERRORS)))} }}"
    quoted = _nft_quoting(spec, errors)
    coming = [f"icmp type {errors} fib daddr type local", *quoted]
    if not (ports := _nft_ports(spec.services)):
        return coming, []
    going = [f"{match} @th,{at},16 {ports}" for match, at in zip(quoted, (240, 224), strict=True)]
    return coming, going + [f"{match} @th,68,4 != 5" for match in quoted]


def _nft_quoting(spec: RuleSpec, kinds: int | str) -> tuple[str, str]:
    """The matches of ICMP of these types about packets to a server, and about packets from one."""
    servers = "{ " + ", ".join(f"{int(server):#x}" for server in spec.servers) + " }"
    return f"icmp type {kinds} @th,192,32 {servers}", f"icmp type {kinds} @th,160,32 {servers}"


def nft_remove(name: str) -> str:
    """One transaction that takes the rules out, whether they are there or not."""
    return f"add table ip {name}\ndelete table ip {name}\n"


def _nft_ports(ports: Ports) -> str:
    return "{ " + ", ".join(map(_nft_range, ports)) + " }" if ports else ""


def _nft_range(ports: tuple[int, int]) -> str:
    first, last = ports
    return f"{first}-{last}" if last > first else f"{first}"


# iptables


@dataclass(frozen=True, slots=True)
class IptablesChain:
    """A chain of ours and where it hangs."""

    table: str
    builtin: str
    name: str


def chains(name: str) -> tuple[IptablesChain, IptablesChain]:
    """Where new flows begin, and where everything leaves."""
    return (
        IptablesChain("raw", "PREROUTING", f"{name}-pre"),
        IptablesChain("mangle", "POSTROUTING", f"{name}-post"),
    )


def iptables_rules(spec: RuleSpec) -> tuple[list[str], list[str]]:
    """The rules of PREROUTING, and those of POSTROUTING."""
    queue = f"-j NFQUEUE --queue-num {spec.queue}"
    to_us, from_us = "-m addrtype --dst-type LOCAL", "-m addrtype --src-type LOCAL"
    gports: Ports = tuple((p, p) for p in spec.gports)
    errors_in, errors_out = _u32_errors(spec)
    into = ["-i lo -j RETURN", f"-p icmp -m u32 --u32 {U32_ERRORS} {to_us} {queue}"]
    into += [f"-p icmp -m u32 --u32 {match} {queue}" for match in errors_in]
    out = [f"-p icmp -m u32 --u32 {match} {queue}" for match in errors_out]
    out += [
        f"-p icmp -m u32 --u32 {U32_REDIRECT}&&{_U32_ICMP}@{address}={int(server):#x} -j DROP"
        for server in spec.servers
        for address in (24, 20)
    ]
    out.append("-o lo -j RETURN")
    into += [f"-p tcp {ports} {to_us} {queue}" for ports in _multiport(gports, "dports")]
    out += [f"-p tcp {ports} {from_us} {queue}" for ports in _multiport(gports, "sports")]
    to_tcp, to_udp = _multiport(spec.any_tcp, "dports"), _multiport(spec.udp, "dports")
    to_forwarded = _multiport(spec.forwarded, "dports")
    of_forwarded = _multiport(spec.forwarded, "sports")
    of_tcp, of_udp = _multiport(spec.tcp, "sports"), _multiport(spec.udp, "sports")
    opening = f"-j NFQUEUE --queue-num {openings(spec.queue)}"
    into += [f"-p tcp --tcp-flags SYN,ACK SYN {ports} {to_us} {opening}" for ports in to_tcp]
    into += [f"-p tcp {ports} {to_us} {queue}" for ports in to_tcp]
    into += [f"-p udp {ports} {to_us} {queue}" for ports in to_udp]
    for server in spec.servers:
        into += [f"-s {server} -p tcp {ports} {queue}" for ports in of_tcp]
        into += [f"-d {server} -p tcp {ports} {queue}" for ports in to_tcp]
        into += [f"-s {server} -p tcp {ports} {to_us} {queue}" for ports in of_forwarded]
        into += [f"-d {server} -p udp {ports} {queue}" for ports in to_udp]
        into += [f"-s {server} -p udp {ports} {to_us} {queue}" for ports in of_udp]
        out += [f"-d {server} -p tcp {ports} {from_us} {queue}" for ports in to_tcp]
        out += [f"-s {server} -p tcp {ports} {queue}" for ports in of_forwarded]
        out += [f"-s {server} -p udp {ports} {queue}" for ports in of_udp]
        for client in spec.relay_clients:
            out += [f"-s {client} -d {server} -p udp {ports} {queue}" for ports in to_udp]
            out += [f"-s {client} -d {server} -p tcp {ports} {queue}" for ports in to_forwarded]
        if spec.any_port:
            out.append(f"-s {server} -p udp {queue}")
            out += [f"-s {client} -d {server} -p udp {queue}" for client in spec.relay_clients]
        if spec.relay_clients and ANYONE not in spec.relay_clients:
            out += [f"-d {server} -p udp {ports} {from_us} {queue}" for ports in to_udp]
    if spec.any_port:
        into.append(f"-p udp {to_us} {queue}")
    syn = "--tcp-flags SYN,ACK SYN"
    of_any_tcp = _multiport(spec.any_tcp, "sports")
    out += [f"-p tcp {syn} {ports} {from_us} {queue}" for ports in of_any_tcp]
    out += [f"-p udp {ports} {from_us} {queue}" for ports in of_udp]
    into.append(f"-d {NEVER}/32 -p udp --dport 0 -m socket -j RETURN")
    return into, out


def iptables_install(spec: RuleSpec, hung: frozenset[str]) -> str:
    """Input for iptables-restore --noflush; `hung` names the chains that are jumped to already."""
    pre, post = chains(spec.name)
    into, out = iptables_rules(spec)
    return _restore(post, out, hung) + _restore(pre, into, hung)


def iptables_remove(name: str, hung: frozenset[str], present: frozenset[str]) -> str:
    """Input for iptables-restore --noflush that takes out what is there."""
    lines = []
    for chain in chains(name):
        if chain.name not in present:
            continue
        jump = [f"-D {chain.builtin} -j {chain.name}"] if chain.name in hung else []
        ours = [*jump, f"-F {chain.name}", f"-X {chain.name}"]
        lines += [f"*{chain.table}", *ours, "COMMIT"]
    return "\n".join([*lines, ""])


def _restore(chain: IptablesChain, rules: list[str], hung: frozenset[str]) -> str:
    jump = [] if chain.name in hung else [f"-I {chain.builtin} 1 -j {chain.name}"]
    return "\n".join(
        [
            f"*{chain.table}",
            f":{chain.name} - [0:0]",  # made, or emptied, within the same commit
            *(f"-A {chain.name} {rule}" for rule in rules),
            *jump,
            "COMMIT",
            "",
        ]
    )


def _u32_errors(spec: RuleSpec) -> tuple[list[str], list[str]]:
    """As _nft_errors, in bytes behind the outer header, but for those to this host."""
    into, out = [], []
    ports = spec.services
    chunks = [ports[at : at + U32_MOST] for at in range(0, len(ports), U32_MOST)]
    for server in spec.servers:
        for address, port in ((24, "28&0xFFFF"), (20, "28>>16")):
            match = f"{U32_ERRORS}&&{_U32_ICMP}@{address}={int(server):#x}"
            into.append(match)
            for chunk in chunks:
                ranges = ",".join(f"{a}:{b}" if b > a else f"{a}" for a, b in chunk)
                out.append(f"{match}&&{_U32_ICMP}@{port}={ranges}")
            if chunks:
                out.append(f"{match}&&{_U32_ICMP}@8>>24&0xF=6:15")
    return into, out


def _multiport(ports: Ports, which: str) -> list[str]:
    matches: list[list[str]] = []
    group: list[str] = []
    room = MULTIPORT_MOST
    for low, high in ports:
        cost = 1 if low == high else 2
        if cost > room:
            matches.append(group)
            group, room = [], MULTIPORT_MOST
        group.append(f"{low}" if low == high else f"{low}:{high}")
        room -= cost
    if group:
        matches.append(group)
    return [f"-m multiport --{which} {','.join(group)}" for group in matches]
