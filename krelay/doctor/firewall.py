"""What a host's packet filter does with a packet, as far as its rules tell: nothing is sent.

Rules of nft and of iptables become the same few values (nftrules, iptrules), and `judge` follows a
packet through the base chains of one hook, in the order of their priorities:

    judge(chains, "forward", packet)   ->   [Fate(kind="drop", certain=True, ...)], packet

A match has three answers: yes, no, and None, "can't tell" (a rate, a mark that another rule sets,
an address that isn't known).  Where it is None both ways are followed, so a fate is certain or only
possible.  A list without a fate means that the packet is let by and stays as it is.

How the kernel goes about it (net/netfilter/core.c, nf_tables_core.c): accept ends a base chain but
not its hook, the next base chain has its say; drop ends everything; the policy speaks at the end of
a base chain.  Chains of type nat see only a connection's first packet (nf_nat_core.c).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

EPHEMERAL = (1024, 65535)
"""Where a port of a client's choosing may lie."""
HIGHEST_PRIORITY, LOWEST_PRIORITY = -(1 << 31), (1 << 31) - 1
CONNTRACK_PRIORITY = -200
"""NF_IP_PRI_CONNTRACK (linux/netfilter_ipv4.h): before it everything is `invalid` (nft_ct.c)."""

UNREACHABLE = 3
"""The type of the ICMP that a relay sends (RFC 792)."""

Range = tuple[int, int]


class Packet(NamedTuple):
    """A packet as a rule sees it.  None: not known."""

    proto: str
    src: int | None
    sport: int | None
    """None: a port of the client's choosing."""
    dst: int | None
    dport: int | None
    iif: str | None
    """Empty: it is made on this host."""
    oif: str | None
    """Empty: it is for this host."""
    src_local: bool = False
    dst_local: bool = False
    reply: bool = False
    """Not its connection's first direction; then the connection is established."""
    tracked: bool | None = True
    mark: int | None = 0
    state: str = ""
    """What connection tracking says of it, where that doesn't follow from the above."""
    links: tuple[str, ...] = ()
    """Where `iif` or `oif` isn't known: those that it can be; empty if nothing is known of that."""


class Match(NamedTuple):
    """A condition.  What `values` holds depends on the field; see `_holds`."""

    field: str
    values: tuple[object, ...] = ()
    negated: bool = False


NEVER = Match("never")
"""Doesn't hold for any packet of a relay's: another protocol, a broadcast."""
UNSURE = Match("unsure")


class RuleVerdict(NamedTuple):
    """What a rule does: accept, drop, return, jump, goto, continue, queue, nat, snat, tproxy,
    notrack, mark, flow."""

    kind: str
    target: str = ""


class Rule(NamedTuple):
    """One rule; `text` as the tool shows it."""

    text: str
    matches: tuple[Match, ...]
    verdict: RuleVerdict


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; a base chain has a hook."""

    tool: str
    """The command that changes it: nft, iptables, iptables-legacy, iptables-nft."""
    family: str
    table: str
    name: str
    rules: tuple[Rule, ...]
    hook: str = ""
    kind: str = "filter"
    priority: int = 0
    policy: str = "accept"

    def __str__(self) -> str:
        if self.tool == "nft":
            return f"nft chain {self.family} {self.table} {self.name}"
        return f"{self.tool} -t {self.table} chain {self.name}"


class Fate(NamedTuple):
    """What befalls a packet other than being let by unchanged."""

    kind: Literal["drop", "queue", "nat", "snat", "tproxy", "flow"]
    """`flow`: later packets of the same connection pass by all rules, in a flow table."""
    base: Chain
    """The base chain in which it happens."""
    chain: Chain
    """The chain that holds the rule."""
    rule: Rule | None
    """None: the base chain's policy."""
    certain: bool

    @property
    def cause(self) -> str:
        """The rule or policy, for people."""
        if self.rule is None:
            return f"the policy of {self.chain}"
        return f"`{self.rule.text}` in {self.chain}"


Chains = tuple[Chain, ...]
PASSING_ON = ("snat", "flow")
"""Fates after which the packet goes on."""


def judge(
    chains: Iterable[Chain],
    hook: str,
    packet: Packet,
    above: int = HIGHEST_PRIORITY - 1,
    upto: int = LOWEST_PRIORITY,
    *,
    fixed: bool = False,
) -> tuple[list[Fate], Packet]:
    """The fates that are certain or possible, in the base chains of priority above, at most upto.

    A certain one is the last in the list, unless it is in PASSING_ON: nothing comes after it.  With
    `fixed` it goes on as if each base chain had let the packet by in the end, so that the next
    ones are named, too.  The packet is as it comes out: rules may have marked it, or taken it out
    of tracking.
    """
    every = tuple(chains)
    walk = _Walk(packet, {(c.tool, c.family, c.table, c.name): c for c in every})
    bases = [c for c in every if c.hook == hook and above < c.priority <= upto]
    for base in sorted(bases, key=lambda c: c.priority):
        if base.kind == "nat" and (packet.reply or packet.state not in ("", "new")):
            continue
        if not walk.base(base) and not fixed:
            break
    return walk.fates, walk.packet


class _End(NamedTuple):
    kind: str
    chain: Chain
    rule: Rule | None


class _Walk:
    """One packet's way; `base` follows it through one base chain after the other."""

    def __init__(self, packet: Packet, chains: Mapping[tuple[str, str, str, str], Chain]) -> None:
        self.fates: list[Fate] = []
        self.packet = packet
        self._chains = chains
        self._ends: list[_End] = []
        self._flows: list[tuple[Chain, Rule, bool]] = []

    def base(self, base: Chain) -> bool:
        """Whether the packet may come out of it as it was."""
        self._ends, self._flows = [], []
        early = base.hook == "ingress" or (
            base.hook in ("prerouting", "output") and base.priority < CONNTRACK_PRIORITY
        )
        if self._follow(base, early, ()):
            self._ends.append(_End(base.policy, base, None))
        self.fates += [Fate("flow", base, *flow) for flow in self._flows]
        unharmed = any(end.kind == "accept" for end in self._ends)
        told = [end for end in self._ends if end.kind != "accept"]
        certain = not unharmed and len({end.kind for end in told}) == 1
        if certain:
            told = told[-1:]
        for end in told:
            self.fates.append(Fate(end.kind, base, end.chain, end.rule, certain))  # type: ignore[arg-type]
        return unharmed or not certain or told[0].kind in PASSING_ON

    def _follow(self, chain: Chain, early: bool, way: tuple[Chain, ...]) -> bool:
        """Collects how it may end in this chain; whether it may reach the chain's end.

        `way` led here: a chain is entered once on it, as the kernel allows no loop.
        """
        leaves = False  # by a return or goto that may apply
        for rule in chain.rules:
            answer = self._applies(rule, early)
            if answer is False:
                continue
            kind = rule.verdict.kind
            if kind in ("jump", "goto"):
                key = (chain.tool, chain.family, chain.table, rule.verdict.target)
                target = self._chains.get(key)
                here = (*way, chain)
                falls = not target or target in here or self._follow(target, early, here)
                if answer and (kind == "goto" or not falls):
                    return leaves or falls
                leaves |= kind == "goto" and falls
            elif kind == "return":
                if answer:
                    return True
                leaves = True
            elif kind == "notrack":
                self.packet = self.packet._replace(tracked=False if answer else None)
            elif kind == "flow":
                self._flows.append((chain, rule, bool(answer)))
            elif kind == "mark":
                self.packet = self.packet._replace(mark=None)
            elif kind != "continue":
                self._ends.append(_End(kind, chain, rule))
                if answer:
                    return leaves
        return True

    def _applies(self, rule: Rule, early: bool) -> bool | None:
        answers = [(match, holds(match, self.packet, early)) for match in rule.matches]
        if any(answer is False for _, answer in answers):
            return False
        unknown = [match for match, answer in answers if answer is None]
        if not unknown:
            return True
        # A rule that drops some addresses by name isn't meant for a client nobody has named.
        if rule.verdict.kind == "drop" and all(
            match.field in ("src", "dst") and not match.negated for match in unknown
        ):
            return False
        return None


def holds(match: Match, packet: Packet, early: bool = False) -> bool | None:
    """Whether it holds for the packet, `early`: before connection tracking has seen it.

    None if that can't be told.
    """
    if match.field == "direction" and (not packet.tracked or early or packet.state == "invalid"):
        return None if packet.tracked is None else False  # no connection that has one
    answer = _holds(match, packet, early)
    return answer if answer is None else answer is not match.negated


def _holds(match: Match, packet: Packet, early: bool) -> bool | None:
    values = match.values
    match match.field:
        case "proto":
            return packet.proto in values
        case "src":
            return _within(packet.src, values)
        case "dst":
            return _within(packet.dst, values)
        case "sport":
            return _within_ports(packet.sport, values)
        case "dport":
            return _within_ports(packet.dport, values)
        case "iif":
            return _named(packet.iif, values, packet.links)
        case "oif":
            return _named(packet.oif, values, packet.links)
        case "state":
            if packet.tracked is None:
                return None
            if not packet.tracked:
                return "untracked" in values
            if early:
                return "invalid" in values
            if packet.state:
                return packet.state in values
            return ("established" if packet.reply else "new") in values
        case "direction":
            return ("reply" if packet.reply else "original") in values
        case "src_type":
            return ("local" if packet.src_local else "unicast") in values
        case "dst_type":
            return ("local" if packet.dst_local else "unicast") in values
        case "icmp":
            return packet.proto == "icmp" and UNREACHABLE in values
        case "flags":
            return _flags(packet, values)
        case "mark":
            value, mask = values
            assert isinstance(value, int)
            assert isinstance(mask, int)
            return None if packet.mark is None else packet.mark & mask == value
        case "any of":
            return _any_of(packet, values, early)
        case "never":
            return False
        case _:
            return None


def _within(address: int | None, ranges: tuple[object, ...]) -> bool | None:
    """Whether a range holds the address."""
    if (0, 0xFFFFFFFF) in ranges:
        return True
    if address is None:
        return None
    return any(r[0] <= address <= r[1] for r in ranges if isinstance(r, tuple))


def _within_ports(port: int | None, ranges: tuple[object, ...]) -> bool | None:
    """The same for a port; one of a client's choosing may be anywhere in EPHEMERAL."""
    low, high = (port, port) if port is not None else EPHEMERAL
    pairs = [r for r in ranges if isinstance(r, tuple)]
    if any(r[0] <= low and high <= r[1] for r in pairs):
        return True
    return None if any(r[0] <= high and low <= r[1] for r in pairs) else False


def _named(
    name: str | None, patterns: tuple[object, ...], links: tuple[str, ...] = ()
) -> bool | None:
    if name == "":
        return False
    if name is None:
        answers = {_named(link, patterns) for link in links}
        if len(answers) == 1:
            return answers.pop()
        return True if "*" in patterns else None
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in map(str, patterns)
    )


def _flags(packet: Packet, values: tuple[object, ...]) -> bool | None:
    """Flags of a connection's first packet, of one in its middle, or of a reset of none."""
    mask, wanted = values
    assert isinstance(mask, frozenset)
    assert isinstance(wanted, frozenset)
    if packet.proto != "tcp":
        return False
    flags = {"rst", "ack"} if packet.state == "invalid" else {"ack"} if packet.reply else {"syn"}
    return bool(flags & mask == wanted)


def _any_of(packet: Packet, options: tuple[object, ...], early: bool) -> bool | None:
    """Whether all conditions of one of the options hold."""
    result: bool | None = False
    for option in options:
        assert isinstance(option, tuple)
        answers = {holds(match, packet, early) for match in option}
        if False in answers:
            continue
        if None not in answers:
            return True
        result = None
    return result
