"""The kernel as a backend of the offload, slowly: its programs in Python, and the rules between.

`Programs` is what offload/programs/relay.c does, said once more and plainly; test_programs.py holds
the two against each other.  It has what the maps have, byte by byte (krelay/offload/layout.py).
`Rules` reads the very text that nft is given, by a small reader of its own, and tells which packets
it sends to the queue; where they ask a program, that is `Programs.passes`.  `FakeKernel` has both.
It refuses what no krelay may ask: to take out what isn't there, or to put in what is.

`Datapath` is a table, its worker and tcp-relay's requests, with such a kernel before the worker or
without: joined as krelay's shell joins them.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from math import inf
from random import Random

from knet.endpoint import Proto, Source
from knet.networks import collapse, network
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.dnsflows import Exchange
from krelay.nat.flow import DNS_PORT, Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.offload import layout
from krelay.offload.backend import (
    FOREVER,
    Changes,
    CountedRewrite,
    OffloadBackend,
    OffloadLost,
)
from krelay.offload.layout import MOST_PER_FLOW, OwnPacket, RewriteFlags
from krelay.offload.learning import NO_CLIENTS, Learning, ends_of, released_by
from krelay.offload.policy import OffloadPolicy
from krelay.registration.registry import Relays, Send
from krelay.rules import ruleset
from krelay.rules.offloaded import MARK, PRIORITY, learnt
from krelay.rules.spec import RuleSpec, wanted
from krelay.steps import SIDES, Hook, Step
from tests.tools.observing import observe
from tests.tools.packets import ACK, FIN, RST, SYN, Template
from tests.tools.sockets import OneUser

QUEUE = 1600
NEAR, FAR = 2, 3
"""The numbers of the links by which packets come in and go out."""
MTU = 1500
IPV4 = 0x0800
CAME_WHOLE = 0x6B72
GOES_ON = -1
"""TC_ACT_UNSPEC (linux/pkt_cls.h)."""
LONGEST_QUERY = 576
LEARNT = learnt("krelay")
WHOLE = 0x4000
"""Of a packet's offset of fragments: it must not be cut."""
_VALUE = struct.Struct("=10x2x4s10x2x4s2s2s5B3xIQQQ")
_EVENT = struct.Struct("=8x40sIBB2x")
_ENDS = struct.Struct("4s4s2s2s")
DNS = (53).to_bytes(2)


# The programs


@dataclass
class Skb:
    """A packet as the kernel has it."""

    data: bytes
    """With `link` bytes before the IP header."""
    link: int = 0
    mark: int = 0
    priority: int = 0
    tc_index: int = 0
    came_by: int = 0
    """The number of the link by which it has come in; 0: it is this host's own."""
    leaves_by: int = 0
    """That of the link by which it leaves."""
    gso_segs: int = 0
    """More than 1: so many packets that the kernel carries as one, each with `gso_size` bytes
    behind its headers."""
    gso_size: int = 0
    protocol: int = IPV4


@dataclass
class Entry:
    """What stands in the map of rewrites."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes
    step: int
    flags: RewriteFlags
    mask: int
    value: int
    tos: int
    began: int
    packets: int
    size: int
    heard: int

    @classmethod
    def of(cls, value: bytes) -> "Entry":
        """What these bytes say."""
        src, dst, sport, dport, step, flags, *rest = _VALUE.unpack(value)
        return cls(src, dst, sport, dport, step, RewriteFlags(flags), *rest)

    def packed(self) -> bytes:
        """The same bytes, with what was counted."""
        v4 = bytes(10) + b"\xff\xff"
        ends = b"".join((v4, self.src, v4, self.dst, self.sport, self.dport))
        return ends + _VALUE_BEHIND.pack(
            *(self.step, self.flags, self.mask, self.value, self.tos, self.began),
            *(self.packets, self.size, self.heard),
        )


_VALUE_BEHIND = struct.Struct("=5B3xIQQQ")


@dataclass
class Parsed:
    """What the programs look at."""

    proto: int
    key: bytes
    """Addresses and ports, as in the packet."""
    size: int
    """As the IP header says."""
    tos: int
    header: int
    """Bytes of both headers."""
    may_be_cut: bool
    ttl: int
    flags: int = 0
    seq: int = 0

    @property
    def map_key(self) -> bytes:
        """Where its rewrite stands."""
        return layout.key_of(Proto(self.proto), self.key)


@dataclass
class Query:
    """Queries of a client's from one port: what they asked, and where they went."""

    asked: bytes
    server: bytes
    waiting: int = 0


class Programs:
    """The three programs, and what they look into."""

    def __init__(self) -> None:
        self.links: dict[int, int] = {}
        """Those that have the programs, with the bytes of their longest packet."""
        self.ports: set[tuple[int, int]] = set()
        """Protocol and port of what rewrites are of."""
        self.rewrites: dict[bytes, Entry] = {}
        self.events: list[bytes] = []
        """As the ring has them, eight bytes of its own before each."""
        self.steps: Counter[tuple[int, int]] = Counter()
        """Packets by protocol and step."""
        self.server: bytes | None = None
        """Where queries go that begin flows by themselves; None: none does."""
        self.hosts: frozenset[bytes] = frozenset()
        """The addresses of this host that they come to."""
        self.strangers: tuple[IPv4Network, ...] = ()
        self.minded: dict[bytes, float] = {}
        """Ends from which none comes, until when."""
        self.queries: dict[bytes, Query] = {}
        """Those that wait for an answer, by the client's end."""
        self.room = 1 << 16
        """How many may."""
        self.exchanges: list[Exchange] = []
        """Queries and answers, as they are told."""
        self.now = 0.0

    def comes_in(self, skb: Skb) -> int:
        """The incoming program: its verdict; `skb` is as it leaves it."""
        packet = parse(skb)
        entry = self._decided(packet)
        if packet is None:
            return GOES_ON
        skb.tc_index = CAME_WHOLE
        if entry is not None and not entry.flags & RewriteFlags.OUTGOING:
            skb.priority = PRIORITY
            self._note(skb, packet, entry)
            rewrite(skb, packet, entry)
        elif entry is None and self._asks(packet, skb.gso_segs):
            skb.priority = LEARNT
        elif entry is None and self._answers(skb, packet) is not None:
            skb.priority = PRIORITY
        return GOES_ON

    def passes(self, skb: Skb) -> bool:
        """The program that a rule asks: whether `goes_out` will rewrite this, as it leaves."""
        packet = parse(skb)
        most = self.links.get(skb.leaves_by)
        if packet is None or most is None:
            return False
        entry = None
        if self._answers(skb, packet) is None and (entry := self._decided(packet)) is None:
            return False
        if entry is not None and not entry.flags & RewriteFlags.OUTGOING:
            return False
        is_own = entry is not None and bool(entry.flags & RewriteFlags.RELAYS_OWN)
        if not packet.may_be_cut:
            return True
        return (is_own or skb.tc_index == CAME_WHOLE) and longest(skb, packet) <= most

    def goes_out(self, skb: Skb) -> int:
        """The outgoing program, as `comes_in`."""
        if not skb.mark & MARK:
            return GOES_ON
        packet = parse(skb)
        if packet is None or self._answered(skb, packet):
            return GOES_ON
        entry = self._decided(packet)
        if entry is None or not entry.flags & RewriteFlags.OUTGOING:
            return GOES_ON
        skb.mark &= ~MARK
        begins = packet.flags & (SYN | ACK) == SYN
        if entry.flags & RewriteFlags.RELAYS_OWN and (begins or packet.flags & FIN):
            if begins and entry.flags & RewriteFlags.MAY_BEGIN:
                entry.began = packet.seq
                entry.flags = entry.flags & ~RewriteFlags.MAY_BEGIN | RewriteFlags.HAS_BEGUN
            self.events.append(_EVENT.pack(packet.map_key, packet.seq, entry.step, packet.flags))
        self._note(skb, packet, entry)
        rewrite(skb, packet, entry)
        return GOES_ON

    def _decided(self, packet: Parsed | None) -> Entry | None:
        """What is to become of it; None: that is for the worker to say."""
        if packet is None:
            return None
        ports = (int.from_bytes(packet.key[at : at + 2]) for at in (8, 10))
        if not any((packet.proto, port) in self.ports for port in ports):
            return None
        entry = self.rewrites.get(packet.map_key)
        if entry is None:
            return None
        if entry.flags & RewriteFlags.ONE_DSCP and packet.tos >> 2 != entry.tos >> 2:
            return None
        flags = packet.flags
        if flags & entry.mask == entry.value:
            return entry
        if not entry.flags & RewriteFlags.RELAYS_OWN:
            return None
        if flags & (FIN | SYN | RST | ACK) == SYN:
            has_begun = entry.flags & RewriteFlags.HAS_BEGUN and entry.began == packet.seq
            return entry if entry.flags & RewriteFlags.MAY_BEGIN or has_begun else None
        return entry if flags & (FIN | SYN | RST) == FIN else None

    # Queries that begin flows by themselves

    def _asks(self, packet: Parsed, gso_segs: int) -> bool:
        """Whether this is a query that begins a flow, or of one that has begun so."""
        src, dst, sport, dport = _ENDS.unpack(packet.key)
        server = self.server
        if packet.proto != Proto.UDP or dport != DNS or server is None:
            return False
        if packet.size > LONGEST_QUERY or packet.ttl < 2 or gso_segs > 1:
            return False
        client = src + sport
        if dst not in self.hosts or self.minded.get(client, 0) > self.now:
            return False
        if any(IPv4Address(src) in net for net in self.strangers):
            return False
        query = self.queries.get(client)
        if query is None:
            if len(self.queries) >= self.room:
                return False
            self.queries[client] = query = Query(dst, server)
        elif (query.asked, query.server) != (dst, server):
            return False
        query.waiting += 1
        self.exchanges.append((False, packet.size, packet.key))
        self.steps[packet.proto, Step.U12] += 1
        return True

    def _answers(self, skb: Skb, packet: Parsed) -> Query | None:
        """The query that this answers."""
        src, dst, sport, dport = _ENDS.unpack(packet.key)
        if packet.proto != Proto.UDP or sport != DNS or skb.gso_segs > 1:
            return None
        query = self.queries.get(dst + dport)
        return query if query is not None and query.server == src else None

    def _answered(self, skb: Skb, packet: Parsed) -> bool:
        query = self._answers(skb, packet)
        if query is None:
            return False
        _, dst, sport, dport = _ENDS.unpack(packet.key)
        query.waiting -= 1
        if query.waiting <= 0:
            del self.queries[dst + dport]
        self.exchanges.append((True, packet.size, dst + query.asked + dport + sport))
        self.steps[packet.proto, Step.U34] += 1
        skb.mark &= ~MARK
        readdress(skb, packet, (query.asked, dst, sport, dport))
        return True

    def _note(self, skb: Skb, packet: Parsed, entry: Entry) -> None:
        packets = max(1, skb.gso_segs)
        entry.packets += packets
        size = len(skb.data) - skb.link
        entry.size += size + (packets - 1) * packet.header if packets > 1 else packet.size
        if not packet.flags & RST:
            entry.heard = round(self.now * 1e9)
        self.steps[packet.proto, entry.step] += packets


def parse(skb: Skb) -> Parsed | None:
    """What the programs see of a packet; None if it isn't plain."""
    ip = skb.data[skb.link :]
    if skb.protocol != IPV4 or len(ip) < 28 or ip[0] != 0x45:
        return None
    if ip[9] not in (Proto.TCP, Proto.UDP) or int.from_bytes(ip[6:8]) & 0x3FFF:
        return None
    may_be_cut = not int.from_bytes(ip[6:8]) & WHOLE
    found = Parsed(ip[9], ip[12:24], int.from_bytes(ip[2:4]), ip[1], 28, may_be_cut, ip[8])
    if ip[9] == Proto.TCP:
        if len(ip) < 40:
            return None
        found.header = 20 + (ip[32] >> 4) * 4
        found.flags = ip[33]
        found.seq = int.from_bytes(ip[24:28])
    return found


def rewrite(skb: Skb, packet: Parsed, entry: Entry) -> None:
    """Does what this entry says."""
    readdress(skb, packet, (entry.src, entry.dst, entry.sport, entry.dport))


def longest(skb: Skb, packet: Parsed) -> int:
    """Bytes of the packet, of a train of each of its packets."""
    return skb.gso_size + packet.header if skb.gso_segs > 1 else packet.size


def readdress(skb: Skb, packet: Parsed, new: tuple[bytes, bytes, bytes, bytes]) -> None:
    """Gives a packet other addresses and ports, and the checksums that go with them."""
    ip = bytearray(skb.data[skb.link :])
    is_udp = packet.proto == Proto.UDP
    check = 26 if is_udp else 36
    for at, value in zip((12, 16, 20, 22), new, strict=True):
        before, there = bytes(ip[at : at + len(value)]), slice(check, check + 2)
        if before == value:
            continue
        if not is_udp or any(ip[there]):
            transport = updated(bytes(ip[there]), before, value)
            ip[there] = b"\xff\xff" if is_udp and not any(transport) else transport
        if at < 20:
            ip[10:12] = updated(bytes(ip[10:12]), before, value)
        ip[at : at + len(value)] = value
    skb.data = skb.data[: skb.link] + bytes(ip)


def updated(check: bytes, before: bytes, after: bytes) -> bytes:
    """A checksum after a change (RFC 1624, section 3), as the kernel adds it up."""
    total = sum(0xFFFF - int.from_bytes(each) for each in (check, *_words(before))) + sum(
        map(int.from_bytes, _words(after))
    )
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return (0xFFFF - total).to_bytes(2)


def _words(data: bytes) -> list[bytes]:
    return [data[at : at + 2] for at in range(0, len(data), 2)]


# The rules

_MATCH = re.compile(
    r"(?:ip protocol (?P<protocol>tcp|udp)"
    r"|rt (?P<ipsec>ipsec) missing"
    r"|meta priority (?P<priority>[0-9a-f]+:[0-9a-f]+)(?= )"
    r"|(?P<link>[io]if) (?P<unlike>!= )?(?P<numbers>\{[^}]*\}|\d+|\"lo\")"
    r"|fib (?P<end>[sd]addr) type local"
    r"|(?P<icmp>icmp) .*"
    r"|tcp flags & (?P<flags>\([^)]*\)|\w+) == (?P<on>0|\w+)"
    r"|(?:ip|th|tcp|udp) (?P<field>[sd](?:addr|port))(?: & (?P<mask>[\d.]+))?"
    r" (?P<relation>==|!=)? ?(?P<values>\{[^}]*\}|\d[\d.-]*)) "
)
_ENDING = re.compile(
    r"(?P<what>accept|return|drop)|goto (?P<chain>[\w-]+)|(?P<asks>jump offloaded)|queue num \d+"
    r"|ip daddr set (?P<leads>[\d.]+) accept|tproxy.*"
)
_LABEL = re.compile(r' comment "[^"]*"$')
_BITS = {"fin": FIN, "syn": SYN, "rst": RST, "ack": ACK}


@dataclass
class Seen:
    """What a rule sees of a packet."""

    packet: Parsed
    mark: int
    priority: int
    iif: int
    oif: int
    own: Collection[bytes]
    """The addresses of this host."""
    passes: bool
    """What the program says that is asked."""
    led_to: bytes = b""
    """The destination that a rule has given it."""

    def __getitem__(self, name: str) -> int:
        part = {"saddr": (0, 4), "daddr": (4, 8), "sport": (8, 10), "dport": (10, 12)}[name]
        return int.from_bytes(self.packet.key[slice(*part)])


Guard = Callable[[Seen], bool]


class Rules:
    """What these rules send to the queue."""

    def __init__(self, spec: RuleSpec) -> None:
        self._chains = {
            chain: [_rule(line) for line in lines]
            for chain, lines in ruleset.nft_rules(spec).items()
        }

    def is_queued(self, hook: Hook, seen: Seen) -> bool:
        """Whether this packet goes to the worker; if not, its mark is as the rules leave it."""
        chain = {Hook.PREROUTING: "pre", Hook.POSTROUTING: "post"}[hook]
        while True:
            ending = next(
                (
                    ending
                    for guards, ending in self._chains[chain]
                    if all(guard(seen) for guard in guards)
                ),
                "accept",
            )
            if ending in self._chains:
                chain = ending
                continue
            if ending == "marks":
                seen.mark |= MARK
            if ending.startswith("leads "):
                seen.led_to = IPv4Address(ending.split()[1]).packed
                return False
            assert ending in ("queue", "accept", "return", "marks"), ending
            return ending == "queue"


def _rule(line: str) -> tuple[list[Guard], str]:
    """When it holds, and then: `queue`, `accept`, `return`, or the chain that follows."""
    guards, rest = [], _LABEL.sub("", line)
    while match := _MATCH.match(rest):
        guards.append(_guard(match))
        if match["icmp"]:
            return guards, "accept"
        rest = rest[match.end() :]
    ending = _ENDING.fullmatch(rest)
    assert ending, line
    if ending["leads"]:
        return guards, f"leads {ending['leads']}"
    if ending["asks"]:  # the rule of that chain marks and accepts what the program says yes to
        return [*guards, lambda seen: seen.passes], "marks"
    return guards, ending["chain"] or ending["what"] or ending[0].split()[0]


def _guard(match: re.Match[str]) -> Guard:
    if match["icmp"]:
        return lambda seen: False
    if match["ipsec"]:
        return lambda seen: True  # there is none
    if match["protocol"]:
        proto = Proto[match["protocol"].upper()]
        return lambda seen: seen.packet.proto == proto
    if match["priority"]:
        high, low = (int(part, 16) for part in match["priority"].split(":"))
        return lambda seen: seen.priority == high << 16 | low
    if match["link"]:
        link, is_one = match["link"], not match["unlike"]
        texts = match["numbers"].strip("{ }").split(", ")
        numbers = [1 if text == '"lo"' else int(text) for text in texts]
        return lambda seen: (getattr(seen, link) in numbers) is is_one
    if match["end"]:
        part = slice(4) if match["end"] == "saddr" else slice(4, 8)
        return lambda seen: seen.packet.key[part] in seen.own
    if match["flags"]:
        bits = sum(_BITS[word] for word in match["flags"].strip("()").split(" | "))
        on = 0 if match["on"] == "0" else _BITS[match["on"]]
        return lambda seen: seen.packet.flags & bits == on
    field, is_in = match["field"], match["relation"] != "!="
    bits = int(IPv4Address(match["mask"])) if match["mask"] else 0xFFFFFFFF
    ranges = [_range(text) for text in match["values"].strip("{ }").split(", ")]
    return lambda seen: is_in == any(low <= seen[field] & bits <= high for low, high in ranges)


def _range(text: str) -> tuple[int, int]:
    if "." in text:
        net = IPv4Network(text)
        return int(net[0]), int(net[-1])
    low, _, high = text.partition("-")
    return int(low), int(high or low)


@lru_cache
def rules_of(spec: RuleSpec) -> Rules:
    """Those of this spec, read once."""
    return Rules(spec)


# The backend


class Refused(OffloadLost):
    """The kernel refuses a change or a query."""


class FakeKernel(OffloadBackend):
    """Programs with their map, and the rules."""

    def __init__(self) -> None:
        self.room = 0
        self.programs = Programs()
        self.queries_told = 0
        self.spec: RuleSpec | None = None

    @property
    def capacity(self) -> int:
        """Rewrites of each step."""
        return self.room

    @property
    def counters(self) -> Counter[tuple[int, int]]:
        """Packets that were rewritten, by protocol and step."""
        return self.programs.steps

    def __len__(self) -> int:
        return len(self.programs.rewrites)

    def begin(self, room: int) -> None:
        """An empty map.  What was counted by step stays."""
        self.room = room
        self.programs.rewrites.clear()
        self.programs.events.clear()
        self.programs.queries.clear()
        self.programs.exchanges.clear()
        self.programs.room = room

    def change(self, changes: Changes) -> list[CountedRewrite]:
        """Carries them out, or raises Refused; what was counted for those withdrawn."""
        final = []
        rewrites = self.programs.rewrites
        for each in changes.withdrawn:
            entry = rewrites.pop(_key(each), None)
            if entry is None:
                raise Refused(f"{each.step.name} of flow {each.flow.id} isn't there")
            if each.step in SIDES:
                final.append((each, layout.counted(entry.packed())))
        for each in changes.installed:
            if _key(each) in rewrites:
                raise Refused(f"{each.step.name} of flow {each.flow.id} is there already")
            at = each.flow.proto, each.step
            if self.of_step(*at) >= self.room or len(rewrites) >= self.room * MOST_PER_FLOW:
                raise Refused("there is no room")
            rewrites[_key(each)] = Entry.of(layout.value_of(each))
            self.programs.ports.add(layout.port_of(each))
        return final

    def of_step(self, proto: Proto, step: Step) -> int:
        """How many rewrites of this kind there are."""
        protos = (key[36] for key, entry in self.programs.rewrites.items() if entry.step == step)
        return sum(each == proto for each in protos)

    def has(self, rewrite: Rewrite) -> bool:
        """Whether the map has this, and not another one in its place."""
        entry = self.programs.rewrites.get(_key(rewrite))
        return entry is not None and _is_of(entry, rewrite)

    def read(self, rewrites: Sequence[Rewrite]) -> Iterator[CountedRewrite]:
        """What was counted for each, or raises Refused."""
        for each in rewrites:
            entry = self.programs.rewrites.get(_key(each))
            if entry is None:
                raise Refused(f"{each.step.name} of flow {each.flow.id} isn't there")
            yield each, layout.counted(entry.packed())

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that were rewritten."""
        return {(Proto(proto), Step(step)): n for (proto, step), n in self.counters.items() if n}

    def total(self, proto: Proto, step: Step) -> int:
        """Packets that were rewritten by this step."""
        return self.counters[proto, step]

    def own_packets(self) -> list[OwnPacket]:
        """Those that were not told yet."""
        events, self.programs.events = self.programs.events, []
        return layout.own_packets(b"".join(events))

    def learn(self, learning: Learning | None) -> None:
        """As told."""
        programs = self.programs
        programs.server = None if learning is None else learning.server.packed
        if learning is not None:
            programs.hosts = frozenset(each.packed for each in learning.addresses)
            programs.strangers = learning.strangers

    def mind(self, addr: bytes, port: int, until: float = FOREVER) -> None:
        """As told."""
        self.programs.minded[addr + port.to_bytes(2)] = until

    def mind_no_more(self, addr: bytes, port: int) -> None:
        """As told."""
        self.programs.minded.pop(addr + port.to_bytes(2), None)

    def unlearn(self, query: bytes) -> None:
        """As told."""
        self.programs.queries.pop(query[:4] + query[8:10], None)

    def exchanges(self) -> list[Exchange]:
        """Those that were not told yet."""
        found, self.programs.exchanges = self.programs.exchanges, []
        self.queries_told += sum(not is_answer for is_answer, _, _ in found)
        return found

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterable[CountedRewrite]:
        """As `change`."""
        return self.change(Changes(list(rewrites), []))

    def close(self) -> None:
        """There is nothing to let go of."""

    # What packets meet

    def is_queued(self, skb: Skb, hook: Hook, own: Collection[bytes]) -> bool:
        """Whether the rules send this to the worker, in a host with these addresses; if not, its
        mark is as they leave it."""
        assert self.spec is not None
        packet = parse_all(skb)
        if packet is None:
            return True  # the worker judges what is no TCP and no UDP
        is_out = hook is Hook.POSTROUTING
        link, oif = skb.came_by if is_out else NEAR, FAR if is_out else 0
        passes = is_out and self.programs.passes(skb)
        seen = Seen(packet, skb.mark, skb.priority, link, oif, own, passes)
        is_queued = rules_of(self.spec).is_queued(hook, seen)
        skb.mark = seen.mark
        if seen.led_to:
            key = packet.key
            readdress(skb, packet, (key[:4], seen.led_to, key[8:10], key[10:12]))
        return is_queued


def parse_all(skb: Skb) -> Parsed | None:
    """What the rules see of a packet: also of one with IP options."""
    length = skb.data[0] % 16 * 4
    plain = bytes((0x45,)) + skb.data[1:20] + skb.data[length:]
    return parse(Skb(plain))


def _key(rewrite: Rewrite) -> bytes:
    return layout.key_of(rewrite.flow.proto, rewrite.old)


def _is_of(entry: Entry, rewrite: Rewrite) -> bool:
    new = entry.src + entry.dst + entry.sport + entry.dport
    return (new, entry.step) == (rewrite.new, rewrite.step)


# All together


@dataclass
class Datapath:
    """A worker with its table and the answers to tcp-relay; with `room`, a kernel before it."""

    policy: Policy
    room: int = 0
    limits: FlowLimits = field(default_factory=FlowLimits)
    seed: int = 1
    now: float = 0.0
    learns: bool = False
    """Whether queries begin flows by themselves in the kernel."""

    def __post_init__(self) -> None:
        self.nat = NatTable(self.limits, rng=Random(self.seed))
        self.worker = Worker(self.nat)
        self.worker.policy = self.policy
        self.relays = Relays(self.nat, lambda: self.policy, OneUser())
        self.tcp_relay: Send = lambda answer: None
        """The one that is connected; what it is told unasked it doesn't hear."""
        self.relays.joined(self.tcp_relay, uid=0)
        self.relays.listens(self.tcp_relay, self.policy.gport)
        self.relays.before_answers = self._change_urgent
        self.kernel = FakeKernel()
        self.pending = False
        self.told = 0
        """How often the kernel was told of something at once."""
        self.offload = OffloadPolicy(self.nat, self._pend, self._withdraw_now)
        self._spec: RuleSpec | None = None
        self._needs_more = False
        observe(
            self.nat,
            before_expiry=self.count,
            needs_ends=self.hear,
            needs_queries=self.hear_queries,
            query_gone=self.kernel.unlearn,
            began_own=lambda proto, end: self.kernel.mind(*end),
            holds_queries=self._mind,
            ended=self._mind_no_more,
        )
        self.refresh()

    def set(self, policy: Policy) -> None:
        """What new flows get from now on."""
        self.policy = self.worker.policy = policy
        self.refresh()

    def restart(self) -> None:
        """The map is made anew, and what it had counted is added before."""
        self.hear()
        self.hear_queries()
        changes = self.offload.leave()
        self.offload.told(changes, self.kernel.leave(changes.withdrawn), self.now)
        self._spec = None
        self.refresh()

    def refresh(self) -> None:
        """Rules follow from what is relayed and from the flows that live."""
        if not self.room:
            return
        policy = self.policy
        self._needs_more = False
        spec = wanted(
            name="krelay",
            queue=QUEUE,
            tcp=((port, port) for port in policy.tcp - policy.forwarded),
            udp=((port, port) for port in policy.udp),
            forwarded=((port, port) for port in policy.forwarded),
            gport=policy.gport,
            server=IPv4Address(policy.server),
            source_is_relay=policy.source is Source.RELAY,
            beside=policy.beside,
            footprints=self.nat.footprints,
            room=self.room,
            lets_offloaded_pass=True,
        )
        if spec != self._spec:
            afresh = self._spec is None
            self._spec = self.kernel.spec = spec
            self.kernel.programs.links = {NEAR: MTU, FAR: MTU}
            if afresh:
                self.kernel.begin(spec.room)
                self.offload.begin(self.kernel.capacity)
        if self.learns:
            self.hear_queries()
            learning = self._learning()
            if learning is not None:
                addresses = frozenset(each.packed for each in learning.addresses)
                self.nat.dns_flows.learns(addresses, learning.server.packed)
            self.kernel.learn(learning)
        self.turn()

    def _learning(self) -> Learning | None:
        """As learning_for, without what depends on a config."""
        policy = self.policy
        if policy.source is Source.RELAY or DNS_PORT not in policy.udp:
            return None
        others = [network(each) for each in (*policy.own, *policy.backends)]
        others += [*policy.beside, *NO_CLIENTS]
        addresses = tuple(IPv4Address(each) for each in sorted(policy.own))
        return Learning(IPv4Address(policy.server), addresses, collapse(others))

    def _mind(self, flow: Flow) -> None:
        for end in ends_of(flow):
            self.kernel.mind(*end)

    def _mind_no_more(self, flow: Flow) -> None:
        for end in released_by(flow, self.nat):
            self.kernel.mind_no_more(*end)

    def hear_queries(self) -> None:
        """Takes note of queries and answers that the kernel has relayed."""
        while exchanges := self.kernel.exchanges():
            self.nat.learning.learn(exchanges, self.now)

    def packet(self, packet: Template | bytes, hook: Hook) -> bytes | Verdict:
        """What becomes of a packet, whoever decides; then the turn is over."""
        data = packet if isinstance(packet, bytes) else packet.build()
        if not self.room:
            return self.worker.handle(data, hook, self.now)
        self.kernel.programs.now = self.now
        return self._comes_in(data) if hook is Hook.PREROUTING else self._goes_out(data)

    def _comes_in(self, data: bytes) -> bytes | Verdict:
        hook, programs = Hook.PREROUTING, self.kernel.programs
        skb = Skb(data, came_by=NEAR)
        rewritten = programs.steps.total()
        assert programs.comes_in(skb) == GOES_ON
        is_rewritten = programs.steps.total() > rewritten
        is_queued = self.kernel.is_queued(skb, hook, self.policy.own)
        assert not skb.mark
        if is_rewritten:
            assert not is_queued, "it would be rewritten twice"
            return skb.data
        return self._judged(data, hook, is_queued=is_queued)

    def _goes_out(self, data: bytes) -> bytes | Verdict:
        hook, programs = Hook.POSTROUTING, self.kernel.programs
        skb = Skb(data, came_by=0 if data[12:16] in self.policy.own else NEAR, leaves_by=FAR)
        if skb.came_by and parse(skb) is not None:
            skb.tc_index = CAME_WHOLE
        is_asked = programs.passes(skb)
        is_queued = self.kernel.is_queued(skb, hook, self.policy.own)
        verdict: bytes | Verdict = Verdict.PASS
        if not is_asked:
            verdict = self._judged(data, hook, is_queued=is_queued)
        else:
            assert not is_queued, "it would be rewritten twice"
        if verdict is Verdict.DROP:
            return verdict
        skb.data = before = verdict if isinstance(verdict, bytes) else data
        rewritten = programs.steps.total()
        assert programs.goes_out(skb) == GOES_ON
        assert (programs.steps.total() > rewritten) == is_asked, (before, skb.data)
        assert not skb.mark, "others see our mark"
        self.hear()
        return skb.data if is_asked else verdict

    def _judged(self, data: bytes, hook: Hook, *, is_queued: bool) -> bytes | Verdict:
        """What the worker says; of what it isn't asked it would say that it may pass."""
        if self.learns and not is_queued:
            return Verdict.PASS  # the worker may not have heard of it yet
        verdict = self.worker.handle(data, hook, self.now)
        assert is_queued or verdict is Verdict.PASS, "it was the worker's"
        self.turn()
        return verdict

    def hear(self) -> None:
        """Takes note of what the kernel tells of tcp-relay's packets."""
        while packets := self.kernel.own_packets():
            for each in packets:
                self.nat.tracking.relayed(each.key, each.flags, each.seq, self.now)
        self.turn()

    def turn(self, most: int = 512) -> None:
        """The kernel is told what is new, in so many pieces as it takes."""
        if self._needs_more:
            self.refresh()
        while self.pending:
            self.pending = False
            self._tell(most)

    def _tell(self, most: int, now: float | None = inf) -> None:
        """As Offload._change."""
        if (changes := self.offload.changes(most, now)) is not None:
            self.offload.told(changes, self.kernel.change(changes), self.now)

    def count(self, flows: Iterable[Flow]) -> None:
        """Adds what the kernel has counted for these flows."""
        self.hear()
        accounting = self.offload.accounting
        accounting.read(self.kernel.read(accounting.installed_of(flows)), self.now)

    def steps(self) -> dict[str, int]:
        """Packets by step, whoever has rewritten them; none that are zero."""
        counts = self.worker.counts.steps
        found = {
            step.name: counts[step] + sum(self.kernel.total(proto, step) for proto in Proto)
            for step in Step
        }
        return {name: number for name, number in found.items() if number}

    def _pend(self) -> None:
        self.pending = True

    def _need_more(self) -> None:
        self._needs_more = True

    def _withdraw_now(self) -> None:
        self.told += 1
        while self.offload.has_withdrawals:
            self._tell(512)

    def _change_urgent(self) -> None:
        while self.offload.is_urgent:
            self._tell(512, None)
