"""The IPv4 header: captured bytes, every byte built is read again, and any bytes give a value."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.packet import Raw

from knet.wire import BadPacket, ipv4
from tests.tools.packets import Template, slow_checksum, template
from tests.tools.strategies import addresses, templates, words

REASONS = {"short_header", "bad_version", "bad_length", "truncated"}

CAPTURED = bytes.fromhex("4500 0054 1c46 4000 4006 b1e6 ac10 0a63 ac10 0a0c") + bytes(64)
"""A header as it is found in many textbooks, with a payload of zeros."""


def test_a_captured_header_is_read() -> None:
    header = ipv4.parse(CAPTURED)

    assert header == ipv4.Header(
        length=20,
        total=84,
        fragment=0x4000,
        ttl=64,
        proto=6,
        src=bytes((172, 16, 10, 99)),
        dst=bytes((172, 16, 10, 12)),
    )
    assert not header.is_fragment


@given(
    proto=st.integers(0, 255),
    src=addresses,
    dst=addresses,
    payload=st.binary(max_size=200),
    ttl=st.integers(0, 255),
)
def test_what_is_built_is_read_again(
    proto: int, src: bytes, dst: bytes, payload: bytes, ttl: int
) -> None:
    packet = ipv4.build(proto, src, dst, payload, ttl=ttl)

    total = 20 + len(payload)
    assert ipv4.parse(packet) == ipv4.Header(20, total, ipv4.DONT_FRAGMENT, ttl, proto, src, dst)
    assert packet[20:] == payload
    assert slow_checksum(packet[:20]) == 0


@given(templates())
def test_headers_with_options_are_read(packet: Template) -> None:
    built = packet.build()
    header = ipv4.parse(built)

    assert header.length == packet.l4
    assert header.total == len(built)
    assert (header.src, header.dst) == (built[12:16], built[16:20])


@given(
    proto=st.sampled_from((1, 6, 17, 41)),
    src=addresses,
    dst=addresses,
    payload=st.binary(max_size=60),
)
def test_scapy_builds_the_same(proto: int, src: bytes, dst: bytes, payload: bytes) -> None:
    dotted = [".".join(map(str, address)) for address in (src, dst)]
    theirs = IP(src=dotted[0], dst=dotted[1], proto=proto, flags="DF", id=0) / Raw(payload)

    assert ipv4.build(proto, src, dst, payload) == bytes(theirs)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"", "short_header"),
        (CAPTURED[:19], "short_header"),
        (b"\x65" + CAPTURED[1:], "bad_version"),
        (b"\x05" + CAPTURED[1:], "bad_version"),
        (b"\x44" + CAPTURED[1:], "bad_length"),
        (b"\x40" + CAPTURED[1:], "bad_length"),
        (b"\x46\0\0\x17" + CAPTURED[4:], "bad_length"),
        (b"\x45\0\0\x13" + CAPTURED[4:], "bad_length"),
        (CAPTURED + b"\0", "bad_length"),
        (CAPTURED[:-1], "truncated"),
        (CAPTURED[:20], "truncated"),
    ],
    ids=itertools.count(),
)
def test_bytes_that_are_no_packet_are_told_apart(damage: bytes, reason: str) -> None:
    with pytest.raises(BadPacket) as caught:
        ipv4.parse(damage)

    assert caught.value.reason == reason


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda rest: b"\x45" + rest))
def test_any_bytes_give_a_header_or_bad_packet(packet: bytes) -> None:
    reason = ""
    try:
        header = ipv4.parse(packet)
    except BadPacket as bad:
        reason = bad.reason

    assert reason in REASONS or 20 <= header.length <= header.total == len(packet)


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        (0x0000, False),
        (0x4000, False),  # don't fragment
        (0x8000, False),  # the reserved bit
        (0x2000, True),  # the first fragment
        (0x2001, True),
        (0x0001, True),  # the last
        (0x1FFF, True),
    ],
)
def test_a_fragment_is_what_has_an_offset_or_more_to_come(fragment: int, expected: bool) -> None:
    packet = template("C:1 > K:53", fragment=fragment).build()

    assert ipv4.parse(packet).is_fragment is expected


def test_the_longest_packet_can_be_built_and_a_longer_one_is_an_error() -> None:
    assert ipv4.parse(ipv4.build(17, bytes(4), bytes(4), bytes(65515))).total == 65535
    with pytest.raises(ValueError, match="65536 bytes"):
        ipv4.build(17, bytes(4), bytes(4), bytes(65516))


@given(proto=st.integers(0, 255), src=addresses, dst=addresses, length=words)
def test_the_pseudo_header_is_laid_out_as_rfc_768_draws_it(
    proto: int, src: bytes, dst: bytes, length: int
) -> None:
    drawn = src + dst + b"\0" + bytes((proto,)) + length.to_bytes(2)

    assert ipv4.pseudo_header(proto, src, dst, length) == drawn
