"""Any bytes at all: a verdict within a bound of time, and checksums as scapy reckons them.

Packets are made from nothing, or from real ones of the flows that live, of which hypothesis damages
what it likes.  A bound on time is a bound on the work: nothing in the packet path may take longer
because of what a packet says.  The bound is far above what any packet takes on a busy machine.
"""

import time
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, in4_chksum
from scapy.utils import checksum

from knet.endpoint import Endpoint, FiveTuple, Proto, Source, flow_key
from knet.wire import BadPacket, icmp, ipv4, tcp, udp
from krelay.datapath.readdress import flow_of, readdressed
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits, Refusal
from krelay.nat.mappings import TRIES
from krelay.nat.table import NatTable
from krelay.steps import Hook
from tests.krelay.datapath.test_worker import live_worker, rewrite_to, traffic
from tests.tools.packets import Template, addr, at
from tests.tools.strategies import rewritings

SECONDS = 0.25
SOUND = traffic()
PROTOS = (1, 2, 6, 17, 47, 255)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A packet of a flow or a stranger, some of its bytes replaced, cut or gone on with."""
    packet = bytearray(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(packet) - 1))
        packet[place : place + 1] = draw(st.binary(max_size=4))
        if not packet:
            break
    return bytes(packet[: draw(st.integers(0, len(packet)))] if draw(st.booleans()) else packet)


@st.composite
def well_headed(draw: st.DrawFn) -> bytes:
    """A right IPv4 header between hosts that matter, and then anything."""
    ends = st.sampled_from([addr(name) for name in "CDGKSZN"])
    body = draw(st.binary(max_size=120))
    return ipv4.build(draw(st.sampled_from(PROTOS)), draw(ends), draw(ends), body)


anything = st.binary(max_size=120) | damaged() | well_headed()


@given(packet=anything)
def test_parsing_gives_a_value_or_bad_packet(packet: bytes) -> None:
    try:
        header = ipv4.parse(packet)
    except BadPacket:
        return
    assert ipv4.MIN_HEADER <= header.length <= header.total == len(packet)
    try:
        flow = flow_of(packet)
    except BadPacket:
        return
    assert (flow.src.addr, flow.dst.addr) == (header.src, header.dst)
    if header.proto == Proto.TCP and header.total >= header.length + tcp.HEADER:
        answer = tcp.reset_for(packet, header)
        assert answer is None or len(answer) == ipv4.MIN_HEADER + tcp.HEADER
    if header.proto == Proto.UDP:
        assert len(icmp.prohibited(packet, header)) <= icmp.MAX_ERROR


@pytest.mark.serial
@given(packets=st.lists(st.tuples(anything, st.sampled_from(Hook)), max_size=4))
def test_the_worker_gives_a_verdict_in_time(packets: list[tuple[bytes, Hook]]) -> None:
    worker = live_worker()
    worker.nat.limits = FlowLimits(11, 9, 5)
    for packet, hook in packets:
        counts = worker.counts
        rewritten = sum(counts.steps) + sum(counts.icmp)
        judged = counts.passed.total() + counts.dropped.total()
        began = time.process_time()
        result = worker.handle(packet, hook, 1.0)
        assert time.process_time() - began < SECONDS

        more = counts.passed.total() + counts.dropped.total() - judged
        if isinstance(result, bytes):
            assert len(result) == len(packet)
            assert (sum(counts.steps) + sum(counts.icmp) > rewritten, more) == (True, 0)
        else:
            assert isinstance(result, Verdict)
            assert more == 1 or worker.answers
        for answer in worker.answers:
            assert right(answer)
        worker.answers.clear()
        assert len(worker.nat) <= 11


def right(packet: bytes) -> bool:
    """Whether scapy finds header and transport checksum right; a UDP one may be missing."""
    length = (packet[0] & 0xF) * 4
    segment = packet[length:]
    proto = packet[9]
    if proto == icmp.PROTO:
        return bool(checksum(packet[:length]) == checksum(segment) == 0)
    if proto == Proto.UDP:
        segment = segment[: int.from_bytes(segment[4:6])]
        if segment[6:8] == b"\0\0":
            return bool(checksum(packet[:length]) == 0)
    ends = IP(src=Endpoint(packet[12:16], 0).host, dst=Endpoint(packet[16:20], 0).host)
    return checksum(packet[:length]) == 0 and in4_chksum(proto, ends, segment) in (0, 0xFFFF)


@given(rewritings(), st.integers(0, 2), st.integers(0, 2))
def test_a_rewritten_packet_is_right_by_scapy_if_and_only_if_it_was(
    case: tuple[Template, FiveTuple], check_error: int, ip_check_error: int
) -> None:
    packet, to = case
    if check_error or ip_check_error:
        packet = replace(packet, check_error=check_error, ip_check_error=ip_check_error)
    built = packet.build()
    rewrite = rewrite_to(packet, to)
    worker = Worker(NatTable(rng=Random(1)))
    worker.nat.tables[Hook.PREROUTING, to.proto][rewrite.old] = rewrite
    got = worker.handle(built, Hook.PREROUTING, 1)

    assert isinstance(got, bytes)
    assert right(got) is right(built)
    assert right(readdressed(built, ipv4.parse(built), rewrite)) is right(built)
    if packet.check and not check_error and not ip_check_error:
        assert right(built)


@pytest.mark.parametrize("source", Source)
def test_a_client_whose_ports_are_all_taken_is_refused_after_a_bounded_search(
    source: Source,
) -> None:
    """By direct conversations, which cost it nothing."""
    nat = NatTable(rng=Random(1))
    server = at("S:53")
    for port in range(1, 0x10000):
        nat.saw_direct(Proto.UDP, Endpoint(addr("C"), port), server, 0)
    looked = 0
    contains = type(nat.direct).__contains__

    class Counting(type(nat.direct)):  # type: ignore[misc]
        def __contains__(self, flow: tuple[Proto, bytes]) -> bool:
            nonlocal looked
            looked += 1
            return contains(self, flow)

    nat.direct.__class__ = Counting
    with pytest.raises(Refusal) as refusal:
        nat.open_forwarded(
            Proto.UDP, at("C:40000"), at("K:53"), server, source, 0, relay_addr=addr("K")
        )

    assert refusal.value.reason == "no_port"
    assert looked <= 2 * TRIES + 2
    assert flow_key(at("C:40000"), server) in nat.direct._seen[Proto.UDP]


def test_udp_and_tcp_builders_agree_with_scapy() -> None:
    for packet in (
        udp.build(addr("C"), addr("S"), 1, 2, b"odd"),
        tcp.build(addr("C"), addr("S"), 1, 2, tcp.SYN, payload=b"odd"),
    ):
        assert right(packet)
