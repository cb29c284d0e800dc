"""Rules as rows: label, chain, match, action.  The texts of nft and of iptables come from them.

A RuleRow is a value.  Its matches and its action know how each of the two tools writes them, so a
rule is said once.  Where a row lists several values, nft writes one rule with a set; iptables
writes a rule for each, or for as many as one match takes.  A match that iptables doesn't have makes
no rule of iptables.

The label ends up in the rule as a comment, so `nft list ruleset` and `iptables-save` show what each
rule is for.  nft keeps it as data of user space, which the kernel doesn't look at.  In iptables it
is a match (xt_comment) and stands last, so only packets that take the rule's action pay for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network
from itertools import product
from typing import NamedTuple, Protocol

from knet.rules.ports import Ports, iptables_range, multiport, nft_ports, nft_set

ANYONE = IPv4Network("0.0.0.0/0")
U32_MOST = 10
"""Ranges in one u32 test (linux/netfilter/xt_u32.h)."""
_ICMP = "0>>22&0x3C"
"""u32: bytes of the IP header, behind which the ICMP header begins."""


class Place(IntEnum):
    """Where an option stands in a rule of iptables, which tests them in this order."""

    ADDRESS = 0
    PROTOCOL = 1
    FLAGS = 2
    PORTS = 3
    U32 = 4
    OTHER = 5


Options = tuple[tuple[Place, str], ...]


class RowMatch(Protocol):
    """What a packet must be like."""

    def nft(self) -> str:
        """As nft writes it; "" if all packets are."""

    def iptables(self) -> Sequence[Options]:
        """The options of iptables, one tuple for each rule that it takes; none: it can't."""


class RowAction(Protocol):
    """What becomes of a packet."""

    def nft(self) -> str:
        """As nft writes it."""

    def iptables(self) -> str | None:
        """As iptables writes it; None: it can't."""


class Tool(Enum):
    """The tool that a row is for, where it isn't for both."""

    NFT = "nft"
    IPTABLES = "iptables"


class RuleRow(NamedTuple):
    """One rule."""

    label: str
    """The step that it is for, or what else; "": none is shown."""
    chain: str
    """nft's chain.  iptables has one chain a hook: what stands before the hyphen."""
    match: tuple[RowMatch, ...]
    action: RowAction
    only: Tool | None = None

    def nft(self) -> str:
        """The rule as nft writes it."""
        words = [*(each.nft() for each in self.match), self.action.nft()]
        if self.label:
            words.append(f'comment "{self.label}"')
        return " ".join(word for word in words if word)

    def iptables(self) -> list[str]:
        """The rules of iptables that do the same; [] if it can't."""
        action = self.action.iptables()
        if action is None:
            return []
        comment = ""
        if self.label and self.action is not Ending.RETURN:  # what only passes doesn't pay for it
            comment = f'-m comment --comment "{self.label}" '
        rules = []
        for options in product(*(each.iptables() for each in self.match)):
            words = _in_place(sum(options, ()))
            rules.append(" ".join([*words, comment + action]))
        return rules


def _in_place(options: Options) -> list[str]:
    """These in the order in which iptables takes them; all tests of u32 are one match."""
    words: dict[Place, list[str]] = {place: [] for place in Place}
    for place, text in options:
        if place is not Place.PROTOCOL or text not in words[place]:
            words[place].append(text)
    if words[Place.U32]:
        words[Place.U32] = [f"-m u32 --u32 {'&&'.join(words[Place.U32])}"]
    return [text for some in words.values() for text in some]


def nft_rules(rows: Iterable[RuleRow]) -> dict[str, list[str]]:
    """The rules of nft, by chain; a chain stands where its first row does."""
    rules: dict[str, list[str]] = {}
    for row in rows:
        if row.only is not Tool.IPTABLES:
            rules.setdefault(row.chain, []).append(row.nft())
    return rules


def iptables_rules(rows: Iterable[RuleRow], hook: str) -> list[str]:
    """The rules of iptables of this hook: of all chains whose names begin so."""
    return [
        rule
        for row in rows
        if row.only is not Tool.NFT and row.chain.partition("-")[0] == hook
        for rule in row.iptables()
    ]


# Matches


@dataclass(frozen=True, slots=True)
class OnLink:
    """Packets that come in, or go out, by this link."""

    way: str
    """`i` or `o`."""
    name: str

    def nft(self) -> str:
        return f'{self.way}if "{self.name}"'

    def iptables(self) -> list[Options]:
        return [((Place.ADDRESS, f"-{self.way} {self.name}"),)]


@dataclass(frozen=True, slots=True)
class OneOf:
    """Packets whose source (`saddr`) or destination (`daddr`) is one of these."""

    field: str
    addresses: tuple[IPv4Address, ...]

    def nft(self) -> str:
        return f"ip {self.field} {nft_set(self.addresses)}"

    def iptables(self) -> list[Options]:
        return [((Place.ADDRESS, f"-{self.field[0]} {each}"),) for each in self.addresses]


@dataclass(frozen=True, slots=True)
class Within:
    """Packets whose source or destination is in one of these networks.

    One network is matched by its mask, since that of a length in whole bytes becomes a comparison
    of one to three bytes otherwise, which takes the kernel five times as long.
    """

    field: str
    networks: tuple[IPv4Network, ...]
    relation: str = "=="

    def nft(self) -> str:
        if ANYONE in self.networks:
            return ""
        if len(self.networks) == 1:
            net = self.networks[0]
            return f"ip {self.field} & {net.netmask} {self.relation} {net.network_address}"
        return f"ip {self.field} {self.relation} {nft_set(self.networks)}"

    def iptables(self) -> list[Options]:
        return [((Place.ADDRESS, f"-{self.field[0]} {each}"),) for each in self.networks]


@dataclass(frozen=True, slots=True)
class Port:
    """Packets from (`sport`) or to (`dport`) one of these ports of TCP or UDP."""

    proto: str
    """`tcp` or `udp`; `th` where the chain says which, in nft alone."""
    field: str
    ports: Ports

    def nft(self) -> str:
        return f"{self.proto} {self.field} {nft_ports(self.ports)}"

    def iptables(self) -> list[Options]:
        protocol = Place.PROTOCOL, f"-p {self.proto}"
        return [
            (protocol, (Place.PORTS, f"-m multiport --{self.field}s {some}"))
            for some in multiport(self.ports)
        ]


@dataclass(frozen=True, slots=True)
class Transport:
    """Packets of this protocol, where iptables alone must ask: nft's chain has no others."""

    proto: str

    def nft(self) -> str:
        return ""

    def iptables(self) -> list[Options]:
        return [((Place.PROTOCOL, f"-p {self.proto}"),)]


@dataclass(frozen=True, slots=True)
class Flags:
    """TCP that has, of the flags `mask`, just those of `value`."""

    mask: tuple[str, ...]
    value: tuple[str, ...]

    def nft(self) -> str:
        return f"tcp flags & ({' | '.join(self.mask)}) == {' | '.join(self.value) or 0}"

    def iptables(self) -> list[Options]:
        mask, value = (",".join(each).upper() or "NONE" for each in (self.mask, self.value))
        return [((Place.PROTOCOL, "-p tcp"), (Place.FLAGS, f"--tcp-flags {mask} {value}"))]


@dataclass(frozen=True, slots=True)
class IsLocal:
    """Packets whose source or destination is an address of this host."""

    field: str

    def nft(self) -> str:
        return f"fib {self.field} type local"

    def iptables(self) -> list[Options]:
        way = {"saddr": "src", "daddr": "dst"}[self.field]
        return [((Place.OTHER, f"-m addrtype --{way}-type LOCAL"),)]


@dataclass(frozen=True, slots=True)
class Icmp:
    """ICMP of these types."""

    types: tuple[int, ...]

    def nft(self) -> str:
        return f"icmp type {self.types[0] if len(self.types) == 1 else nft_set(self.types)}"

    def iptables(self) -> list[Options]:
        test = f"{_ICMP}@0>>24={','.join(map(str, self.types))}"
        return [((Place.PROTOCOL, "-p icmp"), (Place.U32, test))]


@dataclass(frozen=True, slots=True)
class QuotedAddress:
    """ICMP about a packet with one of these addresses.

    The quoted IP header begins 64 bits behind the ICMP header: its length in 32-bit words at 68,
    source at 160, destination at 192.
    """

    field: str
    """`saddr` or `daddr`."""
    addresses: tuple[IPv4Address, ...]

    def nft(self) -> str:
        at = {"saddr": 160, "daddr": 192}[self.field]
        return f"@th,{at},32 {nft_set(f'{int(each):#x}' for each in self.addresses)}"

    def iptables(self) -> list[Options]:
        at = {"saddr": 20, "daddr": 24}[self.field]
        return [((Place.U32, f"{_ICMP}@{at}={int(each):#x}"),) for each in self.addresses]


@dataclass(frozen=True, slots=True)
class QuotedPort:
    """ICMP about a packet with one of these ports: at 224 and 240 where there are no IP options."""

    field: str
    """`sport` or `dport`."""
    ports: Ports

    def nft(self) -> str:
        at = {"sport": 224, "dport": 240}[self.field]
        return f"@th,{at},16 {nft_ports(self.ports)}"

    def iptables(self) -> list[Options]:
        where = {"sport": "28>>16", "dport": "28&0xFFFF"}[self.field]
        ranges = list(map(iptables_range, self.ports))
        some = (ranges[at : at + U32_MOST] for at in range(0, len(ranges), U32_MOST))
        return [((Place.U32, f"{_ICMP}@{where}={','.join(each)}"),) for each in some]


@dataclass(frozen=True, slots=True)
class QuotedOptions:
    """ICMP about a packet with IP options, behind which its ports aren't looked for."""

    def nft(self) -> str:
        return "@th,68,4 != 5"

    def iptables(self) -> list[Options]:
        return [((Place.U32, f"{_ICMP}@8>>24&0xF=6:15"),)]


@dataclass(frozen=True, slots=True)
class Words:
    """A match in the tools' own words, for what only one rule needs."""

    of_nft: str
    of_iptables: str | None = None
    """None: iptables has no such thing."""

    def nft(self) -> str:
        return self.of_nft

    def iptables(self) -> list[Options]:
        return [] if self.of_iptables is None else [((Place.OTHER, self.of_iptables),)]


# Actions


@dataclass(frozen=True, slots=True)
class ToQueue:
    """The packet waits in this queue for a verdict."""

    chain: str
    """Of nft: the chain that sends to it, the same for all rules."""
    number: int

    def nft(self) -> str:
        return f"goto {self.chain}"

    def iptables(self) -> str:
        return f"-j NFQUEUE --queue-num {self.number}"


class Ending(Enum):
    """What ends the chain and needs no more said."""

    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"

    def nft(self) -> str:
        return self.value

    def iptables(self) -> str:
        return f"-j {self.name}"


@dataclass(frozen=True, slots=True)
class Statement:
    """What nft alone does, in its own words."""

    words: str

    def nft(self) -> str:
        return self.words

    def iptables(self) -> None:
        return None


def goto(chain: str) -> Statement:
    """Goes on in this chain."""
    return Statement(f"goto {chain}")
