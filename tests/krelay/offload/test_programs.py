"""The kernel's programs and their twin in Python (tests/tools/kernel.py) do the same.

A packet is run through both, without any network (BPF_PROG_TEST_RUN, in linux/bpf.h).  Compared are
the verdict, the packet, its mark and priority, the maps of rewrites and queries, what is told, the
totals, and what `passes` says of the packet.
"""

import errno
import os
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from itertools import product
from random import Random
from sys import byteorder

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knet.bpf.kernel import BpfMap
from knet.endpoint import Endpoint, FiveTuple, Proto, Source, flow_key
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Rewrite
from krelay.nat.table import NatTable
from krelay.offload import layout
from krelay.offload.backend import Changes
from krelay.offload.layout import RewriteFlags
from krelay.offload.learning import Learning
from krelay.offload.tc import PASSES, UNUSED_FOR, TcBackend
from krelay.rules.offloaded import MARK, PRIORITY
from krelay.rules.steprows import POST, STEP_ROWS
from krelay.steps import Step
from tests.tools.kernel import GOES_ON, IPV4, LEARNT, MTU, Entry, FakeKernel, Programs, Skb
from tests.tools.packets import ACK, FIN, RST, SYN, Template

GPORT, OTHER_GPORT = 16000, 16001
TCP_PORTS, UDP_PORTS = (80, 443), (53, 123)
ETHERNET = bytes(range(12))
SKB = 192
"""Bytes of `struct __sk_buff`."""
MARKS, PRIORITIES, GSO_SEGS, GSO_SIZE = 8, 32, 164, 176
"""Where it has its fields."""
LOOPBACK = 1
"""By which packets leave in a test run, where no other link is named."""
LEAST = {IPV4: 34, 0x86DD: 54}
"""Bytes that a test run asks of what it takes for IPv4 or IPv6 (since Linux 6.18)."""

# Where there is no link-layer header, a test run takes the kind of a packet from bytes 12 and 13,
# which are the first of its source: 8.0 reads as IPv4 there.
CLIENT, OTHER = bytes((8, 0, 0, 1)), bytes((8, 0, 0, 9))
RELAY, SERVER = bytes((8, 0, 0, 2)), bytes((8, 0, 0, 3))
RELAY_TOO, OTHER_SERVER, STRANGER = bytes((8, 0, 0, 4)), bytes((8, 0, 0, 5)), bytes((8, 0, 0, 70))
LEARNING = Learning(
    IPv4Address(SERVER),
    (IPv4Address(RELAY), IPv4Address(RELAY_TOO)),
    (IPv4Network("8.0.0.64/26"), IPv4Network("8.0.0.3/32")),
)


@cache
def why_not() -> str | None:
    """Why no programs can be run here; None if they can.  Raises OSError if ours aren't right."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        TcBackend(1).close()
    except OSError as error:
        if error.errno == errno.EACCES:  # the verifier's word, of what may be loaded here
            raise
        return f"no programs can be loaded here: {error.strerror}"
    return None


@cache
def rewrites() -> list[Rewrite]:
    """Of flows of all kinds and states."""
    nat = NatTable(FlowLimits(), rng=Random(1))
    found = []
    for port, source in ((40000, Source.CLIENT), (40001, Source.RELAY)):
        client = Endpoint(CLIENT, port)
        for state in range(4):
            at = client._replace(port=port + 10 * state)
            flow = nat.open_tcp(at, there(80), of_server(80), source, GPORT, 0)
            nat.attach(flow, Endpoint(RELAY, 45000 + port - 40000 + 10 * state), 0)
            if state:
                flow.leg = (None, 1000, -1, -2)[state]
            for rewrite in flow.rewrites.values():
                rewrite.tos = (0, 46 << 2)[state & 1]
                found.append(rewrite)
        for proto, service in ((Proto.UDP, 53), (Proto.TCP, 443)):
            flow = nat.open_forwarded(proto, client, there(service), of_server(service), source, 0)
            found += flow.rewrites.values()
    return found


def there(port: int) -> Endpoint:
    return Endpoint(RELAY, port)


def of_server(port: int) -> Endpoint:
    return Endpoint(SERVER, port)


@dataclass
class Case:
    """A packet, and how the kernel has it."""

    data: bytes
    mark: int = 0
    priority: int = 0
    segs: int = 0
    size: int = 0
    """Of a packet of a train, behind its headers."""
    protocol: int = IPV4

    def skb(self, link: int) -> Skb:
        data = self.data
        if link:
            data = ETHERNET + self.protocol.to_bytes(2) + data
        return Skb(
            *(data, link, self.mark, self.priority, 0, 0, LOOPBACK, self.segs, self.size),
            int.from_bytes(data[12:14]),
        )


@dataclass
class Both:
    """The programs in the kernel, and the twin, with the same rewrites."""

    kernel: TcBackend = field(default_factory=lambda: TcBackend(100, LEARNT))
    fake: FakeKernel = field(default_factory=FakeKernel)

    @property
    def twin(self) -> Programs:
        return self.fake.programs

    def __post_init__(self) -> None:
        for proto, ports in ((Proto.TCP, (*TCP_PORTS, GPORT, OTHER_GPORT)), (Proto.UDP, UDP_PORTS)):
            for port in ports:
                self.use((proto, port))
        self.learn(LEARNING)
        self.reach({LOOPBACK: MTU})
        self.sums = self.kernel._sums()

    def close(self) -> None:
        self.kernel.close()

    def use(self, port: tuple[Proto, int]) -> None:
        """There may be rewrites of this port's packets."""
        self.kernel._used(port)
        self.twin.ports.add(port)

    def learn(self, learning: Learning | None) -> None:
        """Such queries begin flows by themselves."""
        for each in (self.kernel, self.fake):
            each.learn(learning)

    def mind(self, addr: bytes, port: int, seconds: float) -> None:
        """Nothing from there is such a query, for so long."""
        self.kernel.mind(addr, port, time.monotonic() + seconds)
        self.fake.mind(addr, port, self.twin.now + seconds)

    def forget(self) -> None:
        """No query waits for an answer, and no end is minded."""
        for key, _ in each_of(self.kernel.maps["queries"]):
            self.kernel.maps["queries"].delete(key)
        for client in self.twin.minded:
            self.mind(client[:4], int.from_bytes(client[4:]), -1.0)
        self.twin.queries.clear()
        self.twin.minded.clear()

    def reach(self, links: dict[int, int]) -> None:
        """These links have the programs."""
        self.kernel.attached(links)
        self.twin.links = links

    def fill(self, without: frozenset[int] = frozenset()) -> None:
        """All rewrites as new, but those of these numbers; nothing is counted any more."""
        map_ = self.kernel.maps["rewrites"]
        self.twin.rewrites.clear()
        self.twin.steps.clear()
        self.forget()
        self.sums = self.kernel._sums()
        for number, rewrite in enumerate(rewrites()):
            key, value = layout.key_of(rewrite.flow.proto, rewrite.old), layout.value_of(rewrite)
            if number in without:
                map_.delete(key)
                continue
            map_.update(key, value)
            self.twin.rewrites[key] = Entry.of(value)
            assert self.twin.rewrites[key].packed() == value

    def run(self, way: str, layer: str, case: Case) -> tuple[int, Skb]:
        """Runs a packet through both, if it is long enough; what becomes of it."""
        link = 14 if layer == "ethernet" else 0
        skb = case.skb(link)
        if len(skb.data) < LEAST.get(skb.protocol, 15):
            return GOES_ON, skb
        context = bytearray(SKB)
        for at, value in (
            (MARKS, skb.mark), (PRIORITIES, skb.priority),
            (GSO_SEGS, skb.gso_segs), (GSO_SIZE, skb.gso_size),
        ):  # fmt: skip
            struct.pack_into("=I", context, at, value)
        passes = self.passes(case) and (way, skb.protocol, skb.mark & MARK) == ("out", IPV4, MARK)
        before = self.heard()
        got = self.kernel.programs[f"{way}_{layer}"].run(skb.data, bytes(context))
        now_heard = self.heard()

        self.twin.now += 1.0
        twin_steps = self.twin.steps.copy()
        twin_before = {key: entry.heard for key, entry in self.twin.rewrites.items()}
        verdict = self.twin.comes_in(skb) if way == "in" else self.twin.goes_out(skb)
        assert got.verdict == verdict
        assert not passes or self.twin.steps != twin_steps, "it passed, and nothing was done"
        assert got.packet == skb.data
        for at, value in ((MARKS, skb.mark), (PRIORITIES, skb.priority)):
            assert struct.unpack_from("=I", got.context, at)[0] == value
        for key, entry in self.twin.rewrites.items():
            found = self.kernel.maps["rewrites"].look_up(key)
            assert found is not None
            assert found[:-8] == entry.packed()[:-8]
            assert (now_heard[key] > before[key]) == (entry.heard > twin_before[key])
        told, self.twin.events = self.twin.events, []
        size = len(told[0]) if told else 1
        ring = self.kernel._ring.read()
        assert [ring[at + 8 : at + size] for at in range(0, len(ring), size)] == [
            each[8:] for each in told
        ]
        self.totals_agree()
        self.queries_agree()
        return verdict, skb

    def queries_agree(self) -> None:
        """Those that wait are the same, and what was told of them."""
        found = {
            key[12:18]: (value[12:16], value[28:32], int.from_bytes(value[32:36], byteorder))
            for key, value in each_of(self.kernel.maps["queries"])
        }
        assert found == {
            client: (query.asked, query.server, query.waiting)
            for client, query in self.twin.queries.items()
        }
        assert self.kernel.exchanges() == self.fake.exchanges()

    def passes(self, case: Case) -> bool:
        """What the program says that a rule asks.  It sees IPv4 alone, from its head on; a test run
        takes the head of the link off before."""
        skb = Skb(case.data, 0, 0, 0, 0, 0, LOOPBACK, case.segs, case.size)
        context = bytearray(SKB)
        for at, value in ((GSO_SEGS, skb.gso_segs), (GSO_SIZE, skb.gso_size)):
            struct.pack_into("=I", context, at, value)
        packet = replace(case, protocol=IPV4).skb(14).data
        got = self.kernel.programs[PASSES].run(packet, bytes(context))
        says = self.twin.passes(skb)
        assert bool(got.verdict) == says
        return says

    def heard(self) -> dict[bytes, int]:
        """When each rewrite had its last packet."""
        map_ = self.kernel.maps["rewrites"]
        values = {key: map_.look_up(key) or bytes(8) for key in self.twin.rewrites}
        return {key: int.from_bytes(value[-8:], "little") for key, value in values.items()}

    def totals_agree(self) -> None:
        sums = [
            after - before for before, after in zip(self.sums, self.kernel._sums(), strict=True)
        ]
        assert sums[layout.LOST] == 0
        assert layout.totals_by_step(sums) == dict(self.twin.steps)


def each_of(map_: BpfMap) -> Iterator[tuple[bytes, bytes]]:
    """Each element of a hash."""
    size, room = map_.spec.key, map_.spec.value
    for keys, values in map_.items():
        for at in range(len(keys) // size):
            yield keys[at * size : (at + 1) * size], values[at * room : (at + 1) * room]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    if reason := why_not():
        pytest.skip(reason)
    with closing(Both()) as found:
        yield found


def plausible() -> st.SearchStrategy[tuple[Template, bool]]:
    """A packet of one of the flows, or nearly so; and whether it is as it should be."""

    def made(
        number: int, odd: int, flags: int, payload: bytes, tos: int, seq: int, parts: dict[str, int]
    ) -> tuple[Template, bool]:
        rewrite = rewrites()[number]
        src, dst = ends(rewrite.old)
        if odd == 1:
            src, dst = dst, src
        elif odd == 2:
            src = src._replace(port=OTHER_GPORT)
        elif odd == 3:
            dst = dst._replace(port=dst.port ^ 1)
        elif odd == 4:
            src = Endpoint(OTHER, src.port)
        proto = rewrite.flow.proto
        packet = Template(
            FiveTuple(proto, src, dst), payload, flags, seq, 7, tos=tos,
            ip_options=b"\1\1\1\0" * parts["options"], fragment=parts["fragment"],
            check=bool(parts["check"]), check_error=parts["error"],
        )  # fmt: skip
        return packet, not parts["error"]

    parts = st.fixed_dictionaries(
        {
            "options": st.sampled_from((0, 0, 0, 0, 1)),
            "fragment": st.sampled_from((0, 0x4000, 0x4000, 0x4000, 0x2000, 0x0001, 0x8000)),
            "check": st.sampled_from((1, 1, 0)),
            "error": st.sampled_from((0, 0, 0, 77)),
        }
    )
    flags = st.one_of(
        st.sampled_from(
            (ACK, ACK, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, SYN | FIN, SYN | RST)
        ),
        st.integers(0, 255),
    )
    long = st.one_of(st.integers(530, 560), st.integers(1400, 1480)).map(bytes)
    payload = st.one_of(st.binary(max_size=40), long)
    tos = st.sampled_from((0, 0, 1, 46 << 2, 46 << 2 | 3))
    return st.builds(
        made, st.integers(0, len(rewrites()) - 1), st.sampled_from((0, 0, 0, 0, 0, 1, 2, 3, 4)),
        flags, payload, tos, st.sampled_from((1000, 1000, 2000)), parts,
    )  # fmt: skip


def ends(key: bytes) -> tuple[Endpoint, Endpoint]:
    """Source and destination of a flow key."""
    sport, dport = struct.unpack("!HH", key[8:])
    return Endpoint(key[:4], sport), Endpoint(key[4:8], dport)


WAYS = st.sampled_from(list(product(("in", "out"), ("ethernet", "ip"))))
HOW = st.fixed_dictionaries(
    {
        "mark": st.sampled_from((0, 0, MARK, MARK | 5, 0xEFFFFFFF)),
        "priority": st.sampled_from((0, 0, 6, PRIORITY)),
        "segs": st.sampled_from((0, 0, 0, 1, 2, 9)),
        "size": st.sampled_from((0, 100, 536, 537, 548, 549, 1432, 1448, 1460, 1461)),
    }
)
NUMBERS = st.frozensets(st.integers(0, len(rewrites()) - 1), max_size=6)


@settings(max_examples=300)
@given(st.lists(st.tuples(plausible(), WAYS, HOW), min_size=1, max_size=8), NUMBERS, st.data())
def test_packets_of_flows_become_the_same(
    both: Both,
    packets: list[tuple[tuple[Template, bool], tuple[str, str], dict[str, int]]],
    without: frozenset[int],
    data: st.DataObject,
) -> None:
    """One after the other: what one of them changes holds for the next."""
    both.fill(without)
    for (packet, is_right), (way, layer), how in packets:
        built = packet.build()
        cut = data.draw(st.sampled_from((0, 0, 0, 0, 0, 1, 12)), "bytes that lack")
        padded = data.draw(st.sampled_from((0, 0, 0, 6)), "bytes of padding")
        case = Case(built[: max(20, len(built) - cut)] + bytes(padded), **how)
        _, skb = both.run(way, layer, case)
        if is_right and not cut:
            became = skb.data[skb.link : len(skb.data) - padded]
            assert became == readdressed(packet, became)


def readdressed(packet: Template, became: bytes) -> bytes:
    """The same packet with the addresses and ports of that, made from its parts."""
    l4 = packet.l4
    src = Endpoint(became[12:16], int.from_bytes(became[l4 : l4 + 2]))
    dst = Endpoint(became[16:20], int.from_bytes(became[l4 + 2 : l4 + 4]))
    return replace(packet, flow=FiveTuple(packet.flow.proto, src, dst)).build()


@settings(max_examples=300)
@given(
    st.one_of(st.binary(min_size=20, max_size=70), st.binary(min_size=40, max_size=80)),
    st.sampled_from((IPV4, IPV4, IPV4, 0x86DD, 0x8100, 0x0806)),
    WAYS, HOW, st.booleans(), st.booleans(),
)  # fmt: skip
@example(bytes((0x45, *bytes(8), 6, *bytes(18))), IPV4, ("in", "ethernet"), {}, False, False)
def test_any_bytes_become_the_same(
    both: Both,
    data: bytes,
    protocol: int,
    way: tuple[str, str],
    how: dict[str, int],
    is_plain: bool,
    is_known: bool,
) -> None:
    both.fill()
    head = bytearray(data)
    if is_plain:
        head[0], head[6], head[7] = 0x45, 0x40, 0
        head[9] = (6, 17)[head[9] & 1]
    if is_known:
        key = rewrites()[data[0] % len(rewrites())].old
        head[12:24] = key
    both.run(*way, Case(bytes(head), protocol=protocol, **how))


@pytest.mark.parametrize("layer", ["ethernet", "ip"])
@pytest.mark.parametrize("size", [6, 7, 10, 400])
def test_each_step_makes_the_packet_that_its_rewrite_says(
    both: Both, layer: str, size: int
) -> None:
    both.fill()
    by_step: dict[Step, int] = {}
    for rewrite in rewrites():
        step, proto = rewrite.step, rewrite.flow.proto
        key = layout.key_of(proto, rewrite.old)
        is_outgoing = RewriteFlags.OUTGOING in both.twin.rewrites[key].flags
        packet = Template(FiveTuple(proto, *ends(rewrite.old)), bytes(size), ACK, tos=rewrite.tos)
        case = Case(packet.build(), MARK | 5 if is_outgoing else 5, 6)
        _, skb = both.run("out" if is_outgoing else "in", layer, case)
        wanted = replace(packet, flow=FiveTuple(proto, *ends(rewrite.new))).build()
        assert skb.data[skb.link :] == wanted, step
        assert is_outgoing == (STEP_ROWS[step].hook == POST)
        assert (skb.mark, skb.priority) == (5, 6 if is_outgoing else PRIORITY)
        by_step[step] = by_step.get(step, 0) + 1
        value = both.kernel.maps["rewrites"].look_up(key)
        assert value is not None
        assert layout.counted(value)[:2] == (1, len(wanted))
    assert by_step.keys() == {*Step} - {Step.D1, Step.D2}


def test_a_checksum_of_udp_that_becomes_zero_is_sent_as_ones(both: Both) -> None:
    both.fill()
    rewrite = next(each for each in rewrites() if each.step is Step.U12)
    five_tuple, new = (FiveTuple(Proto.UDP, *ends(key)) for key in (rewrite.old, rewrite.new))
    seen = set()
    for number in range(0x10000):
        packet = Template(new, number.to_bytes(2))
        if packet.build()[26:28] in (b"\xff\xff", b"\xff\xfe", b"\0\1"):
            _, skb = both.run("in", "ethernet", Case(replace(packet, flow=five_tuple).build()))
            assert skb.data[14:] == packet.build()
            seen.add(packet.build()[26:28])
    assert b"\xff\xff" in seen


def test_a_train_is_counted_as_the_packets_that_it_is(both: Both) -> None:
    both.fill()
    rewrite = next(each for each in rewrites() if each.step is Step.T1)
    packet = Template(FiveTuple(Proto.TCP, *ends(rewrite.old)), bytes(3000), tos=rewrite.tos)
    both.run("in", "ethernet", Case(packet.build(), segs=3, size=1000))
    value = both.kernel.maps["rewrites"].look_up(layout.key_of(Proto.TCP, rewrite.old))
    assert value is not None
    assert layout.counted(value)[:2] == (3, 3000 + 3 * 40)


def test_what_leaves_by_a_link_without_the_programs_does_not_pass(both: Both) -> None:
    rewrite = next(each for each in rewrites() if each.step is Step.T2)
    packet = Template(FiveTuple(Proto.TCP, *ends(rewrite.old)), b"data", ACK)
    case = Case(packet.build())
    both.fill()
    assert both.passes(case)
    for links in ({}, {LOOPBACK + 1: MTU}):
        both.reach(links)
        assert not both.passes(case)
    both.reach({LOOPBACK: MTU})


@pytest.mark.parametrize(
    ("step", "mtu", "most"),
    [(Step.U34, MTU, 0), (Step.T2, MTU, MTU), (Step.T2, 500, 500), (Step.U2, MTU, 0)],
)
def test_what_may_be_cut_does_not_pass(both: Both, step: Step, mtu: int, most: int) -> None:
    """Where nothing was noted of it as it came in; tcp-relay's own is as long as the link says."""
    both.fill()
    both.reach({LOOPBACK: mtu})
    rewrite = next(each for each in rewrites() if each.step is step)
    five_tuple = FiveTuple(rewrite.flow.proto, *ends(rewrite.old))
    for size in (most or 60, (most or 60) + 1):
        packet = Template(five_tuple, bytes(size - 40), ACK, fragment=0)
        if rewrite.flow.proto is Proto.UDP:
            packet = replace(packet, payload=bytes(size - 28))
        assert both.passes(Case(packet.build())) == (size <= most)
        assert both.passes(Case(replace(packet, fragment=0x4000).build()))
    both.reach({LOOPBACK: MTU})


def test_a_connection_to_the_server_begins_once_and_its_syn_may_be_repeated(both: Both) -> None:
    both.fill()
    rewrite = next(each for each in rewrites() if each.step is Step.T3 and each.flow.leg is None)
    five_tuple = FiveTuple(Proto.TCP, *ends(rewrite.old))
    for seq, passes in ((7, True), (8, False), (7, True)):
        case = Case(Template(five_tuple, b"", SYN, seq).build())
        assert both.passes(case) == passes
        both.run("out", "ethernet", replace(case, mark=MARK))


def test_what_no_rule_has_marked_goes_out_as_it_is(both: Both) -> None:
    """The worker may have made it so, of another flow's packet."""
    both.fill()
    for rewrite in rewrites():
        packet = Template(FiveTuple(rewrite.flow.proto, *ends(rewrite.old)), b"data", ACK)
        for mark in (0, 0xFFFFFFFF ^ MARK):
            _, skb = both.run("out", "ip", Case(packet.build(), mark))
            assert (skb.data, skb.mark) == (packet.build(), mark)


def test_ports_are_looked_up_while_they_have_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)

    def is_used(backend: TcBackend, port: tuple[Proto, int]) -> bool:
        at, number = layout.element_of(*port)
        element = backend.maps["ports"].look_up(at.to_bytes(4, byteorder))
        return element is not None and bool(int.from_bytes(element, byteorder) >> number & 1)

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    first, second = [each for each in rewrites() if each.step is Step.U12][:1], rewrites()[:1]
    ports = [layout.port_of(each[0]) for each in (first, second)]
    with closing(TcBackend(100)) as backend:
        assert not is_used(backend, ports[0])
        backend.change(Changes([], first))
        assert is_used(backend, ports[0])
        backend.change(Changes(first, []))
        now += UNUSED_FOR / 2
        backend.change(Changes([], second))
        assert is_used(backend, ports[0]), "the next is mostly near"
        now += UNUSED_FOR
        backend.change(Changes(second, []))
        assert [is_used(backend, port) for port in ports] == [False, True]
        backend.change(Changes([], first))
        assert is_used(backend, ports[0])


# Queries that begin flows by themselves


@dataclass(frozen=True)
class Dns:
    """A query or an answer; as it is, one that is learnt."""

    is_answer: bool = False
    client: bytes = OTHER
    port: int = 5000
    relay: bytes = RELAY
    server: bytes = SERVER
    service: int = 53
    size: int = 40
    ttl: int = 64
    fragment: int = 0x4000
    options: bytes = b""
    segs: int = 0

    @property
    def case(self) -> Case:
        client, service = Endpoint(self.client, self.port), Endpoint(self.relay, self.service)
        five_tuple = FiveTuple(Proto.UDP, client, service)
        if self.is_answer:
            server = Endpoint(self.server, self.service)
            five_tuple = FiveTuple(Proto.UDP, server, client)
        packet = Template(
            five_tuple, bytes(self.size), ttl=self.ttl, fragment=self.fragment,
            ip_options=self.options,
        )  # fmt: skip
        return Case(packet.build(), MARK if self.is_answer else 0, segs=self.segs, size=20)

    @property
    def query(self) -> bytes:
        """Its flow key."""
        return flow_key(Endpoint(self.client, self.port), Endpoint(self.relay, self.service))


def go(both: Both, packet: Dns, layer: str = "ethernet") -> bytes | None:
    """What becomes of it: source and destination, of a query where a rule sends it; None if it is
    the worker's."""
    way = "out" if packet.is_answer else "in"
    case = packet.case
    _, skb = both.run(way, layer, case)
    became = skb.data[skb.link :]
    if packet.is_answer:
        assert (became != case.data) == (skb.mark == 0)
        return None if became == case.data else became[12:20]
    if skb.priority == PRIORITY:  # the worker's flow
        return became[12:20]
    assert became == case.data
    assert skb.priority in (0, LEARNT)
    if skb.priority == 0:
        return None
    assert both.twin.server is not None
    return became[12:16] + both.twin.server


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            Dns,
            is_answer=st.booleans(),
            client=st.sampled_from((CLIENT, OTHER, OTHER, STRANGER, SERVER)),
            port=st.sampled_from((5000, 5001, 5002, 40000)),
            relay=st.sampled_from((RELAY, RELAY, RELAY_TOO, OTHER)),
            server=st.sampled_from((SERVER, SERVER, SERVER, OTHER_SERVER)),
            service=st.sampled_from((53, 53, 53, 123)),
            size=st.sampled_from((12, 40, 548, 549)),
            ttl=st.sampled_from((64, 2, 1)),
            fragment=st.sampled_from((0x4000, 0x4000, 0, 0x2000)),
            options=st.sampled_from((b"", b"", b"\1\1\1\0")),
            segs=st.sampled_from((0, 0, 1, 2)),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(("ethernet", "ip")),
    st.frozensets(st.sampled_from((5000, 5001)), max_size=1),
    st.sampled_from(
        (LEARNING, LEARNING, LEARNING._replace(server=IPv4Address(OTHER_SERVER)), None)
    ),
)
def test_queries_and_answers_become_the_same(
    both: Both, packets: list[Dns], layer: str, minded: frozenset[int], later: Learning | None
) -> None:
    both.fill()
    for port in minded:
        both.mind(OTHER, port, 3600.0)
    half = len(packets) // 2
    try:
        for packet in packets[:half]:
            go(both, packet, layer)
        both.learn(later)
        for packet in packets[half:]:
            go(both, packet, layer)
    finally:
        both.learn(LEARNING)


def test_a_query_goes_to_the_server_and_its_answer_comes_from_whom_was_asked(both: Both) -> None:
    for relay in (RELAY, RELAY_TOO):
        both.fill()
        query, answer = Dns(relay=relay), Dns(is_answer=True, relay=relay)
        assert go(both, query) == OTHER + SERVER
        assert both.passes(answer.case)
        assert go(both, answer) == relay + OTHER
        assert not both.twin.queries
        assert not both.passes(answer.case), "a second answer is for the worker"
        assert go(both, answer) is None


def test_each_of_several_queries_from_one_port_is_answered(both: Both) -> None:
    """As a resolver asks for A and AAAA."""
    both.fill()
    for _ in range(2):
        assert go(both, Dns()) == OTHER + SERVER
    for _ in range(2):
        assert go(both, Dns(is_answer=True)) == RELAY + OTHER
    assert go(both, Dns(is_answer=True)) is None


@pytest.mark.parametrize(
    "packet",
    [
        Dns(service=123), Dns(relay=OTHER_SERVER), Dns(client=STRANGER), Dns(client=SERVER),
        Dns(size=549), Dns(ttl=1), Dns(fragment=0x2000), Dns(options=b"\1\1\1\0"), Dns(segs=2),
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_a_thought_is_not_learnt(both: Both, packet: Dns) -> None:
    both.fill()
    assert go(both, packet) is None
    assert not both.twin.queries


def test_nothing_is_learnt_from_an_end_with_a_conversation_of_its_own(both: Both) -> None:
    both.fill()
    both.mind(OTHER, 5000, 3600.0)
    both.mind(OTHER, 5001, -1.0)
    assert go(both, Dns()) is None
    assert go(both, Dns(port=5001)) == OTHER + SERVER, "that was before"


def test_one_port_of_a_client_asks_one_address(both: Both) -> None:
    """The server sees the same client for both."""
    both.fill()
    assert go(both, Dns()) == OTHER + SERVER
    assert go(both, Dns(relay=RELAY_TOO)) is None


def test_what_was_asked_of_a_former_server_is_answered_by_it(both: Both) -> None:
    both.fill()
    assert go(both, Dns()) == OTHER + SERVER
    try:
        both.learn(LEARNING._replace(server=IPv4Address(OTHER_SERVER)))
        assert go(both, Dns()) is None, "the worker's"
        assert go(both, Dns(port=5001)) == OTHER + OTHER_SERVER
        assert go(both, Dns(is_answer=True, server=OTHER_SERVER)) is None
        assert go(both, Dns(is_answer=True)) == RELAY + OTHER
        both.learn(None)
        assert go(both, Dns(port=5002)) is None
        assert go(both, Dns(is_answer=True, port=5001, server=OTHER_SERVER)) == RELAY + OTHER
    finally:
        both.learn(LEARNING)


def test_what_finds_no_room_is_not_learnt(both: Both) -> None:
    both.fill()
    room = both.kernel.maps["queries"].spec.capacity
    both.twin.room = room
    for port in range(room):
        assert go(both, Dns(port=6000 + port)) == OTHER + SERVER
    assert go(both, Dns(port=5000)) is None
    for query in (Dns(port=6000).query, Dns(port=5999).query):
        both.kernel.unlearn(query)
        both.fake.unlearn(query)
    assert go(both, Dns(port=5000)) == OTHER + SERVER
    assert go(both, Dns(is_answer=True, port=6000)) is None


def test_what_is_told_of_finds_room_before_it_is_relayed() -> None:
    """Or krelay would not know of it."""
    if reason := why_not():
        pytest.skip(reason)
    with closing(Both(TcBackend(200_000, LEARNT))) as both:
        both.fill()
        ring = both.kernel.maps["exchanges"].spec.capacity // (8 + layout.EXCHANGE_SIZE)
        program = both.kernel.programs["in_ethernet"]
        learnt = 0
        for number in range(ring + 10):
            client = bytes((8, 1, number >> 8 & 0xFF, number & 0xFF))
            packet = Dns(client=client, port=5000 + (number >> 16)).case.skb(14).data
            (priority,) = struct.unpack_from(
                "=I", program.run(packet, bytes(SKB)).context, PRIORITIES
            )
            learnt += priority == LEARNT
        assert ring - 2 <= learnt <= ring
        told = 0
        while exchanges := both.kernel.exchanges():
            told += len(exchanges)
        assert told == learnt == sum(1 for _ in each_of(both.kernel.maps["queries"]))
