"""UDP: built packets against a slow twin and scapy, and the two zeros of its checksum."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP

from knet.endpoint import FiveTuple, Proto
from knet.wire import ipv4, udp
from knet.wire.checksum import updated
from tests.tools.packets import Template, flow, template, with_zero_check
from tests.tools.strategies import flows, payloads, templates, words

QUESTION = "C:4000 > K:53"


def build(packet: Template, *, check: bool = True) -> bytes:
    there = packet.flow
    ends = (there.src.addr, there.dst.addr, there.src.port, there.dst.port)
    return udp.build(*ends, packet.payload, check=check)


@given(there=flows(Proto.UDP), payload=payloads, check=st.booleans())
def test_a_datagram_is_built_as_from_scratch(there: FiveTuple, payload: bytes, check: bool) -> None:
    packet = replace(template(QUESTION), flow=there, payload=payload, check=check)

    assert build(packet, check=check) == packet.build()


@given(templates(Proto.UDP))
def test_a_checksum_that_comes_out_as_zero_is_sent_as_ffff(packet: Template) -> None:
    packet = replace(packet, payload=packet.payload + b"\0" * (2 - len(packet.payload) % 2))
    built = build(with_zero_check(packet, packet.flow))

    assert built[26:28] == b"\xff\xff"


@given(there=flows(Proto.UDP), payload=payloads)
def test_scapy_reads_what_is_built_and_finds_the_checksums_right(
    there: FiveTuple, payload: bytes
) -> None:
    built = build(replace(template(QUESTION), flow=there, payload=payload))
    theirs = IP(built)
    assert theirs[UDP].len == 8 + len(payload)
    assert bytes(theirs[UDP].payload) == payload

    del theirs.chksum, theirs[UDP].chksum
    assert bytes(theirs) == built


def test_a_datagram_without_a_checksum_says_so() -> None:
    built = build(template(QUESTION), check=False)

    assert built[26:28] == b"\0\0"
    assert ipv4.parse(built).proto == udp.PROTO


@given(delta=st.integers(0, 0xFFFE))
def test_no_checksum_stays_none(delta: int) -> None:
    assert udp.updated_check(0, delta) == 0


@given(field=words.filter(bool), delta=st.integers(0, 0xFFFE))
def test_a_checksum_never_becomes_none(field: int, delta: int) -> None:
    got = udp.updated_check(field, delta)

    assert got == (updated(field, delta) or 0xFFFF)
    assert got != 0


@pytest.mark.parametrize(
    ("field", "delta", "expected"),
    [
        (0xFFFF, 0, 0xFFFF),  # the twin of zero stays what it is
        (0xFFFF, 1, 0xFFFE),
        (0x0001, 1, 0xFFFF),  # becomes zero, and is written as its twin
        (0x1234, 0x1234, 0xFFFF),
        (0x1234, 0, 0x1234),
    ],
)
def test_corners_of_the_update(field: int, delta: int, expected: int) -> None:
    assert udp.updated_check(field, delta) == expected


def test_ports_stand_where_rfc_768_puts_them() -> None:
    built = build(replace(template(QUESTION), flow=flow("C:258 > K:772")))

    assert built[20:24] == b"\x01\x02\x03\x04"
