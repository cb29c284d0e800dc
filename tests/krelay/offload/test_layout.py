"""What stands in the maps, byte by byte as programs/relay.c has it."""

import re
import struct
from importlib import resources
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Proto, Source
from knet.rules.ports import merged
from krelay.nat.flow import NO_LEG, PAST_LEG, Flow
from krelay.nat.table import NatTable
from krelay.offload import layout, tc
from krelay.offload.layout import Counted, OwnPacket, RewriteFlags
from krelay.rules.offloaded import MARK, PRIORITY
from krelay.rules.steprows import POST, STEP_ROWS
from krelay.steps import SENDERS, SIDES, Step
from tests.tools.packets import ACK, FIN, RST, SYN, addr, at

OWN_STEPS = frozenset(SENDERS) - frozenset(SIDES)
V4 = bytes(10) + b"\xff\xff"
SOURCE = resources.files("krelay.offload").joinpath("programs", "relay.c").read_text()


def terminated(source: Source = Source.CLIENT) -> Flow:
    nat = NatTable(rng=Random(1))
    flow = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), source, 16000, 0)
    nat.attach(flow, at("K:45678"), 0)
    return flow


def forwarded(proto: Proto, source: Source) -> Flow:
    nat = NatTable(rng=Random(1))
    return nat.open_forwarded(proto, at("C:4000"), at("K:53"), at("S:53"), source, 0)


def flags(flow: Flow, step: Step) -> RewriteFlags:
    return RewriteFlags(layout.value_of(flow.rewrites[step])[37])


def test_a_key_has_both_ends_as_ipv6_and_the_protocol() -> None:
    old = terminated().rewrites[Step.T1].old
    ports = (40000).to_bytes(2) + (80).to_bytes(2)
    wanted = V4 + addr("C") + V4 + addr("K") + ports + bytes((6, 0, 0, 0))
    assert layout.key_of(Proto.TCP, old) == wanted
    assert len(wanted) == layout.KEY
    assert layout.key_of(Proto.UDP, old) == wanted[:36] + bytes((17, 0, 0, 0))


def test_a_value_says_what_becomes_of_packets_and_that_none_was_counted() -> None:
    flow = terminated()
    rewrite = flow.rewrites[Step.T1]
    rewrite.tos = 46 << 2 | 1
    ports = (40000).to_bytes(2) + (16000).to_bytes(2)
    value = layout.value_of(rewrite)
    assert value[:36] == V4 + addr("C") + V4 + addr("K") + ports
    flags = RewriteFlags.ONE_DSCP
    assert tuple(value[36:44]) == (Step.T1, flags, SYN | RST, 0, 46 << 2 | 1, 0, 0, 0)
    assert value[44:] == bytes(4 + 24)
    assert layout.counted(value) == (0, 0, 0.0)


def test_the_sizes_are_those_of_the_compiled_maps() -> None:
    maps = tc.byte_code().maps
    value = layout.value_of(terminated().rewrites[Step.T1])
    assert (maps["rewrites"].key, maps["rewrites"].value) == (layout.KEY, len(value))
    assert maps["totals"].capacity == layout.STEPS + 2 * layout.MOST_STEPS
    assert (maps["ports"].capacity, maps["ports"].value) == (layout.PORT_ELEMENTS, 8)
    assert max(Step) < layout.MOST_STEPS


def numbers(of: str) -> dict[str, int]:
    """The names of an `enum` of the programs that has this one, with their numbers."""
    body = next(each for each in re.findall(r"enum \{([^}]*)\}", SOURCE) if of in each)
    return {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body)}


def test_the_programs_have_the_same_numbers() -> None:
    assert numbers("OUTGOING") == {flag.name: flag.value for flag in RewriteFlags}
    for name, value in (("REWRITTEN", PRIORITY), ("MARKED", MARK)):
        found = re.search(rf"#define {name} (0x[0-9a-f]+)", SOURCE)
        assert found
        assert int(found[1], 16) == value
    most = re.search(r"#define MOST_STEPS (\d+)", SOURCE)
    assert most
    assert int(most[1]) == layout.MOST_STEPS


@pytest.mark.parametrize("source", Source)
@pytest.mark.parametrize("proto", Proto)
def test_what_is_done_where_packets_go_out_says_so(proto: Proto, source: Source) -> None:
    for flow in (terminated(source), forwarded(proto, source)):
        for step in flow.rewrites:
            assert (RewriteFlags.OUTGOING in flags(flow, step)) == (STEP_ROWS[step].hook == POST)
            assert (RewriteFlags.RELAYS_OWN in flags(flow, step)) == (step in OWN_STEPS)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (Step.T1, (SYN | RST, 0)),
        (Step.T2, (RST | ACK, ACK)),
        (Step.T3, (RST | ACK, ACK)),
        (Step.T4, (RST | ACK, ACK)),
    ],
)
def test_packets_with_some_flags_are_the_workers(step: Step, wanted: tuple[int, int]) -> None:
    value = layout.value_of(terminated().rewrites[step])
    assert tuple(value[38:40]) == wanted


@pytest.mark.parametrize("source", Source)
def test_of_what_is_forwarded_all_that_changes_a_connection_is_the_workers(source: Source) -> None:
    for proto, wanted in ((Proto.TCP, (FIN | SYN | RST, 0)), (Proto.UDP, (0, 0))):
        flow = forwarded(proto, source)
        for rewrite in flow.rewrites.values():
            assert tuple(layout.value_of(rewrite)[38:40]) == wanted
            assert not flags(flow, rewrite.step) & RewriteFlags.ONE_DSCP


@pytest.mark.parametrize(
    ("leg", "closed_at", "wanted", "began"),
    [
        (None, None, RewriteFlags.MAY_BEGIN, 0),
        (None, 5.0, RewriteFlags(0), 0),
        (0, None, RewriteFlags.HAS_BEGUN, 0),
        (0xFFFFFFFF, None, RewriteFlags.HAS_BEGUN, 0xFFFFFFFF),
        (1000, 5.0, RewriteFlags.HAS_BEGUN, 1000),
        (NO_LEG, None, RewriteFlags(0), 0),
        (PAST_LEG, 5.0, RewriteFlags(0), 0),
    ],
)
def test_the_leg_to_the_server_may_begin_once(
    leg: int | None, closed_at: float | None, wanted: RewriteFlags, began: int
) -> None:
    flow = terminated()
    flow.leg, flow.closed_at = leg, closed_at
    both = RewriteFlags.MAY_BEGIN | RewriteFlags.HAS_BEGUN
    assert flags(flow, Step.T3) & both == wanted
    assert not any(flags(flow, step) & both for step in (Step.T1, Step.T2, Step.T4))
    value = layout.value_of(flow.rewrites[Step.T3])
    assert struct.unpack_from("=I", value, 44) == (began,)


@given(*[st.integers(0, 2**64 - 1)] * 2, st.integers(0, 10**15))
def test_what_was_counted_is_read(packets: int, size: int, milliseconds: int) -> None:
    value = layout.value_of(terminated().rewrites[Step.T1])
    heard = milliseconds * 10**6 % 2**64
    counted = layout.counted(value[:48] + struct.pack("=QQQ", packets, size, heard))
    assert counted == (packets, size, heard / 1e9)
    assert counted == Counted(packets, size, heard / 1e9)


def test_events_are_read_one_by_one() -> None:
    old = terminated().rewrites[Step.T3].old
    record = b"headhead" + layout.key_of(Proto.TCP, old)
    more = struct.pack("=IBB2x", 0xFFFFFFFF, Step.T3, SYN)
    less = struct.pack("=IBB2x", 7, Step.T3, FIN | ACK)
    assert len(record + more) == layout.EVENT_SIZE + 8
    assert layout.own_packets(record + more + record + less) == [
        OwnPacket(old, 0xFFFFFFFF, SYN), OwnPacket(old, 7, FIN | ACK),
    ]  # fmt: skip
    assert layout.own_packets(b"") == []


PORTS = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(0, 40)).map(
        lambda each: (each[0], min(65535, sum(each)))
    ),
    max_size=5,
).map(merged)


def test_each_port_has_a_bit_of_its_own() -> None:
    found = {layout.element_of(proto, port) for proto in Proto for port in range(0x10000)}
    assert len(found) == 2 * 0x10000
    assert {at for at, _ in found} == set(range(layout.PORT_ELEMENTS))
    assert layout.element_of(Proto.UDP, 53) == (0, 53)


@pytest.mark.parametrize("source", Source)
@pytest.mark.parametrize("proto", Proto)
def test_what_a_rewrite_is_known_by_is_its_service_or_gateway_port(
    proto: Proto, source: Source
) -> None:
    for flow in (terminated(source), forwarded(proto, source)):
        for step, rewrite in flow.rewrites.items():
            wanted = flow.gport if STEP_ROWS[step].at_gport else flow.service.port
            assert layout.port_of(rewrite) == (flow.proto, wanted)


def test_totals_are_told_by_protocol_and_step_but_for_those_that_are_none() -> None:
    sums = [9, 8, *[0] * (2 * layout.MOST_STEPS)]
    sums[layout.STEPS + Step.U12] = 5
    sums[layout.STEPS + layout.MOST_STEPS + Step.T1] = 6
    sums[layout.STEPS + layout.MOST_STEPS + Step.U34] = 7
    assert layout.totals_by_step(sums) == {
        (Proto.UDP, Step.U12): 5, (Proto.TCP, Step.T1): 6, (Proto.TCP, Step.U34): 7,
    }  # fmt: skip
