"""The one ICMP error that the relay sends: told by scapy what it says, and how much it quotes."""

import pytest
from hypothesis import given
from scapy.layers.inet import ICMP, IP, UDP

from knet.wire import icmp, ipv4
from tests.tools.packets import Template, slow_checksum, template
from tests.tools.strategies import templates


def prohibited(packet: bytes) -> bytes:
    return icmp.prohibited(packet, ipv4.parse(packet))


def test_it_is_a_3_13_from_the_asked_address_to_the_sender_quoting_the_packet() -> None:
    packet = template("C:4000 > K:53", ip_options=b"\x01" * 4).build()

    error = IP(prohibited(packet))

    assert (error.src, error.dst, error.proto) == ("192.168.0.2", "10.0.0.1", 1)
    assert (error[ICMP].type, error[ICMP].code) == (3, 13)
    assert bytes(error[ICMP].payload) == packet
    quoted = error[ICMP].payload
    assert (quoted.src, quoted.dst) == ("10.0.0.1", "192.168.0.2")
    assert (quoted.sport, quoted.dport) == (4000, 53)
    assert UDP.__name__ in type(quoted.payload).__name__


@given(templates())
def test_both_its_checksums_are_right(packet: Template) -> None:
    error = prohibited(packet.build())

    assert slow_checksum(error[:20]) == 0
    assert slow_checksum(error[20:]) == 0
    assert error[24:28] == bytes(4)


@pytest.mark.parametrize(
    ("payload", "length"), [(0, 56), (1, 57), (519, 575), (520, 576), (521, 576), (60000, 576)]
)
def test_it_quotes_as_much_as_fits_into_576_bytes(payload: int, length: int) -> None:
    packet = template("C:4000 > K:53", payload=bytes(payload)).build()

    error = prohibited(packet)

    assert len(error) == length
    assert error[28:] == packet[: length - 28]
