"""The kernel as a backend of the offload, slowly: maps of flows, and the rules that look into them.

It reads the very text that nft is given, by a small reader of its own, and does what nft(8) says
such a rule does.  So it knows neither which steps there are nor what they change, and a packet that
no such rule rewrites visits the worker.  A map behaves as the kernel's do: what is put in twice,
taken out or read though it isn't there, or doesn't fit, is refused.

`Datapath` is a table, its worker and tcp-relay's requests, with such a kernel before the worker or
without: joined as krelay's shell joins them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from itertools import takewhile
from random import Random

from knet.endpoint import Endpoint, FiveTuple, Proto, Source
from knet.netlink.nflog import HEAD, Copy
from knet.netlink.nftables import Count
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.offload.backend import (
    Changes,
    Counted,
    OffloadBackend,
    OffloadEvents,
    OffloadLost,
    begins,
)
from krelay.offload.policy import OffloadPolicy
from krelay.registration.registry import Relays, Send
from krelay.rules import ruleset
from krelay.rules.offloaded import BEGINS
from krelay.rules.spec import RuleSpec, begun, ends, wanted
from krelay.steps import SIDES, Hook, Step
from tests.tools.observing import observe
from tests.tools.packets import ACK, FIN, RST, SYN, Template
from tests.tools.sockets import OneUser

_MATCH = re.compile(
    r"(?:ip (?P<protocol>protocol) (?P<name>tcp|udp)"
    r"|iif (?P<iif>!=) 0"
    r"|ip hdrlength (?P<words>\d)"
    r"|tcp flags & (?P<flags>\([^)]*\)|\w+) == (?P<set>0|\w+)"
    r"|(?P<layer>ip|th|tcp|udp) (?P<field>[sd](?:addr|port))(?: & (?P<mask>[\d.]+))?"
    r" (?P<relation>==|!=)? ?(?P<values>\{[^}]*\}|\d[\d.-]*)) "
)
_LOOK_UP = re.compile(
    r"(?P<once>ip saddr . th sport . ip daddr . th dport @(?P<set>[\w-]+) "
    r"delete @(?P=set) \{ ip saddr . th sport . ip daddr . th dport \} )?"
    r"(?P<layer>ip|tcp|udp) (?P<field>[sd]addr|[sd]port) set "
    r"ip saddr \. (?P<ports>th|tcp|udp) sport \. ip daddr \. (?P=ports) dport "
    r"map @(?P<map>[\w-]+) (?:log group (?P<group>\d+) snaplen 28 )?counter name (?P=map) accept"
)
_VERDICT = re.compile(r"goto (?P<chain>(?:pre|post)-(?:tcp|udp))|accept")
_LABEL = re.compile(r' comment "[^"]*"$')
QUEUE = 1600
_FLAGS = {"fin": FIN, "syn": SYN, "rst": RST, "ack": ACK}

Fields = dict[str, int]
"""What a rule sees of a packet: addresses and ports as numbers, and flags."""


class Refused(OffloadLost):
    """The kernel refuses a change or a query."""


@dataclass
class Element:
    """One entry of a map."""

    value: int
    packets: int = 0
    bytes: int = 0
    count: Count | None = None
    """Both, since they were last read."""


Guard = Callable[[Fields], bool]


@dataclass(frozen=True)
class FastRule:
    """A rule that looks into a map, goes to another chain, or lets a packet go on as it is."""

    guards: tuple[Guard, ...]
    map: str = ""
    field: str = ""
    log: int = 0
    """The group of the copies."""
    once: str = ""
    """The set in which the packet must stand, and does no more."""
    chain: str = ""


class FakeKernel(OffloadBackend, OffloadEvents):
    """Maps by name; their keys are source, source port, destination, destination port."""

    def __init__(self) -> None:
        self.room = 0
        self.maps: dict[str, dict[tuple[int, ...], Element]] = {}
        self.counters: Counter[str] = Counter()
        self.copies: dict[int, list[Copy]] = defaultdict(list)
        """Heads of packets, and their hooks, that nobody has taken yet, by group."""
        self.sets: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        self.rules: dict[str, list[FastRule]] = {}
        """By chain."""

    def install(self, spec: RuleSpec, *, afresh: bool = True) -> None:
        """Puts these rules in; `afresh` also empty maps.  What was counted by step stays."""
        if afresh:
            self.maps, self.room = {}, spec.room
        self.rules = _rules(spec)
        for rules in self.rules.values():
            for rule in rules:
                self.maps.setdefault(rule.map, {})

    def rewritten(self, packet: Template, hook: Hook, own: Collection[bytes]) -> Template | None:
        """What becomes of a packet in a host with these addresses; None if it visits the worker.

        It may also go on as it is, and be none of the worker's.
        """
        (src, dst), proto = packet.flow[1:], packet.flow.proto
        seen = {
            "saddr": int.from_bytes(src.addr),
            "sport": src.port,
            "daddr": int.from_bytes(dst.addr),
            "dport": dst.port,
            "flags": packet.flags,
            "words": 5 + len(packet.ip_options) // 4,
            "protocol": proto,
            "iif": int(src.addr not in own or hook is Hook.PREROUTING),
        }
        chain = {Hook.PREROUTING: "pre", Hook.POSTROUTING: "post"}[hook]
        while chain:
            rules, chain = self.rules[chain], ""
            for rule in rules:
                if not all(guard(seen) for guard in rule.guards):
                    continue
                if rule.chain:
                    chain = rule.chain
                    break
                if not rule.map:
                    return packet
                key = tuple(seen.values())[:4]
                if rule.once:
                    if key not in self.sets[rule.once]:
                        continue
                    self.sets[rule.once].remove(key)
                element = self.maps[rule.map].get(key)
                if element is None:
                    continue
                element.packets += 1
                element.bytes += len(packet.build())
                element.count = None
                self.counters[rule.map] += 1
                seen[rule.field] = element.value
                ends = (
                    Endpoint(seen[f"{end}addr"].to_bytes(4), seen[f"{end}port"]) for end in "sd"
                )
                became = replace(packet, flow=FiveTuple(proto, *ends))
                if rule.log:
                    self.copies[rule.log].append((hook, became.build()[:HEAD]))
                return became
        return None

    # As OffloadBackend and OffloadEvents

    @property
    def port(self) -> None:
        """It has no socket."""
        return

    @property
    def capacity(self) -> int:
        """Elements of each map."""
        return self.room

    def change(self, changes: Changes) -> list[Counted]:
        """Carries them out, or raises Refused; what was counted for those withdrawn."""
        final = []
        for rewrite in changes.withdrawn:
            element = self._map(rewrite).pop(_key(rewrite.old), None)
            if element is None:
                raise Refused(f"{rewrite.step.name} of row {rewrite.flow.id} isn't there")
            if rewrite.step in SIDES:
                final.append((rewrite, Count(element.packets, element.bytes)))
        for rewrite in changes.installed:
            elements = self._map(rewrite)
            if _key(rewrite.old) in elements:
                raise Refused(f"{rewrite.step.name} of row {rewrite.flow.id} is there already")
            if len(elements) >= self.room:
                raise Refused("the map is full")
            elements[_key(rewrite.old)] = Element(_value(rewrite))
            if begins(rewrite):
                self.sets[BEGINS].add(_key(rewrite.old))
        return final

    def read(self, rewrites: Sequence[Rewrite]) -> Iterator[Counted]:
        """What was counted for each, or raises Refused."""
        maps = self.maps
        for rewrite in rewrites:
            try:
                element = maps[_name(rewrite.flow.proto, rewrite.step)][_key(rewrite.old)]
            except KeyError:
                raise Refused(f"{rewrite.step.name} of row {rewrite.flow.id} isn't there") from None
            if element.count is None:
                element.count = Count(element.packets, element.bytes)
            yield rewrite, element.count

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that were rewritten."""
        return {(proto, step): self.total(proto, step) for proto in Proto for step in Step}

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterable[Counted]:
        """As `change`."""
        return self.change(Changes(list(rewrites), []))

    def learnt(self, names: Sequence[str], client: bytes, port: bytes) -> None:
        """It learns no queries."""
        return

    def renew(self) -> None:
        """No answers are on their way."""

    def close(self) -> None:
        """There is nothing to let go of."""

    def begun(self) -> list[Copy]:
        """SYNs that nobody has taken yet."""
        return self.copies.pop(begun(QUEUE), [])

    def ended(self) -> list[Copy]:
        """FINs that nobody has taken yet."""
        return self.copies.pop(ends(QUEUE), [])

    def total(self, proto: Proto, step: Step) -> int:
        """Packets that were rewritten by this step."""
        return self.counters[_name(proto, step)]

    def __len__(self) -> int:
        return sum(map(len, self.maps.values()))

    def _map(self, rewrite: Rewrite) -> dict[tuple[int, ...], Element]:
        name = _name(rewrite.flow.proto, rewrite.step)
        if name not in self.maps:
            raise Refused(f"there is no map {name}")
        return self.maps[name]


@lru_cache
def _name(proto: Proto, step: Step) -> str:
    return f"{proto}-{step.name.lower()}"


@lru_cache(1024)
def _key(old: bytes) -> tuple[int, ...]:
    return tuple(map(int.from_bytes, (old[:4], old[8:10], old[4:8], old[10:])))


def _value(rewrite: Rewrite) -> int:
    """The one thing that this rewrite changes; where it changes nothing, what its kind does."""
    parts = (slice(0, 4), slice(4, 8), slice(8, 10), slice(10, 12))
    changed = [part for part in parts if rewrite.old[part] != rewrite.new[part]]
    if not changed:
        assert rewrite.step in (Step.T3, Step.T4), rewrite.step
        changed = [parts[0] if rewrite.step is Step.T3 else parts[1]]
    assert len(changed) == 1, f"{rewrite.step.name} changes more than one thing"
    return int.from_bytes(rewrite.new[changed[0]])


@lru_cache
def _rules(spec: RuleSpec) -> dict[str, list[FastRule]]:
    """By chain, what comes before everything else: those rules that don't lead to the worker."""
    found: dict[str, list[FastRule]] = {}
    for chain, lines in ruleset.nft_rules(spec).items():
        rules = [_rule(line) for line in lines]
        fast = list(takewhile(lambda rule: rule is not None, rules))
        found[chain] = [rule for rule in fast if rule is not None]
        assert not any("map @" in line for line in lines[len(fast) :]), f"{chain}: {lines}"
    return found


def _rule(line: str) -> FastRule | None:
    """The rule; None for one that leads to the worker in the end, or is about other packets."""
    guards, rest = [], _LABEL.sub("", line)
    while match := _MATCH.match(rest):
        guards.append(_guard(match))
        rest = rest[match.end() :]
    if look_up := _LOOK_UP.fullmatch(rest):
        proto = next(name for name in ("tcp", "udp") if look_up["map"].startswith(f"{name}-"))
        assert look_up["layer"] == ("ip" if look_up["field"].endswith("addr") else proto), line
        assert look_up["ports"] in ("th", proto), line
        group = int(look_up["group"] or 0)
        return FastRule(
            tuple(guards), look_up["map"], look_up["field"], group, look_up["set"] or ""
        )
    assert "map @" not in line, line
    if verdict := _VERDICT.fullmatch(rest):
        return FastRule(tuple(guards), chain=verdict["chain"] or "")
    return None


def _guard(match: re.Match[str]) -> Guard:
    if match["protocol"]:
        wanted = Proto[match["name"].upper()]
        return lambda seen: seen["protocol"] == wanted
    if match["iif"]:
        return lambda seen: seen["iif"] != 0
    if match["words"]:
        return lambda seen: seen["words"] == int(match["words"])
    if match["flags"]:
        mask = sum(_FLAGS[word] for word in match["flags"].strip("()").split(" | "))
        flag = 0 if match["set"] == "0" else _FLAGS[match["set"]]
        return lambda seen: seen["flags"] & mask == flag
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


@dataclass
class Datapath:
    """A worker with its table and the answers to tcp-relay; with `room`, a kernel before it."""

    policy: Policy
    room: int = 0
    limits: FlowLimits = field(default_factory=FlowLimits)
    seed: int = 1
    now: float = 0.0

    def __post_init__(self) -> None:
        self.nat = NatTable(self.limits, rng=Random(self.seed))
        self.worker = Worker(self.nat)
        self.worker.policy = self.policy
        self.relays = Relays(self.nat, lambda: self.policy, OneUser())
        self.tcp_relay: Send = lambda answer: None
        """The one that is connected; what it is told unasked it doesn't hear."""
        self.relays.joined(self.tcp_relay, uid=0)
        self.relays.listens(self.tcp_relay, self.policy.gport)
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
            needs_rules=self._need_more,
        )
        self.refresh()

    def set(self, policy: Policy) -> None:
        """What new flows get from now on."""
        self.policy = self.worker.policy = policy
        self.refresh()

    def restart(self) -> None:
        """The maps are made anew, and what they had counted is added before."""
        changes = self.offload.leave()
        self.offload.told(changes, self.kernel.change(changes), self.now)
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
            tells_ends=True,
        )
        if spec != self._spec:
            afresh = self._spec is None or spec.room != self._spec.room
            if afresh:
                self.offload.end()
            self.kernel.install(spec, afresh=afresh)
            self._spec = spec
            if afresh:
                self.offload.begin(self.kernel.capacity)
        self.turn()

    def packet(self, packet: Template, hook: Hook) -> bytes | Verdict:
        """What becomes of a packet, whoever decides; then the turn is over."""
        fast = self.kernel.rewritten(packet, hook, self.policy.own) if self.room else None
        if fast is not None and fast is not packet:
            self.hear()
            return fast.build()
        verdict = self.worker.handle(packet.build(), hook, self.now)
        assert fast is None or verdict is Verdict.PASS, "it was the worker's"
        self.turn()
        return verdict

    def hear(self) -> None:
        """Takes note of the copies that the kernel has made."""
        self.nat.tracking.begun(self.kernel.begun())
        self.nat.tracking.ended(self.kernel.ended())
        self.turn()

    def turn(self, most: int = 512) -> None:
        """The kernel is told what is new, in so many pieces as it takes."""
        if self._needs_more:
            self.refresh()
        while self.pending:
            self.pending = False
            if (changes := self.offload.changes(most)) is not None:
                self.offload.told(changes, self.kernel.change(changes), self.now)

    def count(self, flows: Iterable[Flow]) -> None:
        """Adds what the kernel has counted for these flows."""
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
            changes = self.offload.changes(512)
            assert changes is not None
            self.offload.told(changes, self.kernel.change(changes), self.now)
