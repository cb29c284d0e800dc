"""TCP: flags in letters, segments against a slow twin and scapy, and the RST for an intruder."""

from dataclasses import replace

import pytest
from hypothesis import given
from scapy.layers.inet import IP, TCP

from knet.endpoint import FiveTuple, Proto
from knet.wire import ipv4, tcp
from tests.tools.packets import Template, slow_checksum, template
from tests.tools.strategies import templates


def reset_for(packet: Template) -> bytes | None:
    built = packet.build()
    return tcp.reset_for(built, ipv4.parse(built))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0, ""),
        (tcp.SYN, "S"),
        (tcp.SYN | tcp.ACK, "S."),
        (tcp.PSH | tcp.ACK, "P."),
        (tcp.FIN | tcp.ACK, "F."),
        (tcp.RST, "R"),
        (tcp.URG | tcp.ACK, "U."),
        (0x3F, "SFRPU."),
        (0xC0, ""),  # ECN's
    ],
)
def test_flags_read_as_packet_tools_write_them(flags: int, text: str) -> None:
    assert tcp.flags_text(flags) == text


@given(templates(Proto.TCP))
def test_a_segment_is_built_as_from_scratch(packet: Template) -> None:
    there = packet.flow
    plain = replace(
        packet, ip_options=b"", tcp_options=b"", ident=0, tos=0, ttl=64, fragment=0x4000
    )

    built = tcp.build(
        there.src.addr,
        there.dst.addr,
        there.src.port,
        there.dst.port,
        packet.flags,
        seq=packet.seq,
        ack=packet.ack,
        window=4096,
        payload=packet.payload,
    )

    assert built == plain.build()


@given(templates(Proto.TCP))
def test_scapy_finds_the_checksums_right(packet: Template) -> None:
    there = packet.flow
    built = tcp.build(
        there.src.addr, there.dst.addr, there.src.port, there.dst.port, packet.flags,
        seq=packet.seq, payload=packet.payload,
    )  # fmt: skip
    theirs = IP(built)
    assert (theirs[TCP].seq, int(theirs[TCP].flags)) == (packet.seq, packet.flags)

    del theirs.chksum, theirs[TCP].chksum
    assert bytes(theirs) == built


# RFC 9293, section 3.10.7.1.  A SYN and a FIN take a number each, and so does each byte.
@pytest.mark.parametrize(
    ("text", "payload", "seq", "ack", "flags"),
    [
        ("[S]", b"", 0, 1001, tcp.RST | tcp.ACK),
        ("[S]", b"fast open", 0, 1010, tcp.RST | tcp.ACK),
        ("[SF]", b"", 0, 1002, tcp.RST | tcp.ACK),
        ("[F]", b"end", 0, 1004, tcp.RST | tcp.ACK),
        ("[]", b"", 0, 1000, tcp.RST | tcp.ACK),
        ("[.]", b"", 2000, 0, tcp.RST),
        ("[S.]", b"", 2000, 0, tcp.RST),
        ("[P.]", b"bytes", 2000, 0, tcp.RST),
        ("[F.]", b"", 2000, 0, tcp.RST),
    ],
)
def test_a_reset_says_what_the_rfc_says(
    text: str, payload: bytes, seq: int, ack: int, flags: int
) -> None:
    there = f"C:40000 > K:16000 {text}"
    packet = template(there, payload=payload, seq=1000, ack=2000, tcp_options=b"\x01" * 8)

    answer = reset_for(packet)

    assert answer is not None
    theirs = IP(answer)
    assert (theirs.src, theirs.dst) == ("192.168.0.2", "10.0.0.1")
    assert (theirs[TCP].sport, theirs[TCP].dport) == (16000, 40000)
    assert (theirs[TCP].seq, theirs[TCP].ack, int(theirs[TCP].flags)) == (seq, ack, flags)


@pytest.mark.parametrize("text", ["[R]", "[R.]", "[SR]", "[FRPU.]"])
def test_a_reset_is_never_answered(text: str) -> None:
    assert reset_for(template(f"C:40000 > K:16000 {text}")) is None


def test_the_number_that_a_reset_acknowledges_wraps() -> None:
    answer = reset_for(template("C:40000 > K:16000 [S]", seq=2**32 - 1))

    assert answer is not None
    assert IP(answer)[TCP].ack == 0


@given(templates(Proto.TCP))
def test_a_reset_goes_back_to_where_the_segment_came_from(packet: Template) -> None:
    answer = reset_for(packet)

    if packet.flags & tcp.RST:
        assert answer is None
    else:
        assert answer is not None
        back: FiveTuple = packet.flow.reply()
        assert ipv4.parse(answer).total == len(answer) == 40
        assert answer[12:24] == (
            back.src.addr + back.dst.addr + back.src.port.to_bytes(2) + back.dst.port.to_bytes(2)
        )
        assert answer[33] & tcp.RST
        assert slow_checksum(answer[:20]) == 0
        assert slow_checksum(answer[12:20] + b"\0\x06\0\x14" + answer[20:]) == 0


@pytest.mark.parametrize(
    ("offset", "taken"),
    [(5, 5), (0, 25), (6, 1), (7, 0), (15, 0)],  # in words; never less than nothing
)
def test_an_offset_that_lies_makes_no_wrong_length(offset: int, taken: int) -> None:
    built = bytearray(template("C:40000 > K:16000 [S]", payload=b"bytes").build())
    built[32] = offset << 4

    answer = tcp.reset_for(bytes(built), ipv4.parse(bytes(built)))

    assert answer is not None
    assert IP(answer)[TCP].ack == 1000 + taken + 1
