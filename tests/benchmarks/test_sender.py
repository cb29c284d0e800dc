"""Packets that are made by hand, by the checksum that the rest of the project uses; its pace."""

import socket

from hypothesis import given
from hypothesis import strategies as st

from benchmarks import sender
from benchmarks.sender import datagram, endpoint
from knet.wire.checksum import checksum

addresses = st.ip_addresses(v=4).map(str)
ports = st.integers(0, 0xFFFF)


@given(addresses, ports, addresses, ports, st.just(bytes(36)) | st.binary(max_size=100))
def test_a_datagram_carries_what_it_is_told_with_a_right_checksum(
    src: str, sport: int, dst: str, dport: int, payload: bytes
) -> None:
    packet = datagram((src, sport), (dst, dport), payload)
    assert len(packet) == int.from_bytes(packet[2:4]) == sender.HEADERS + len(payload)
    assert packet.endswith(payload)
    pseudo_header = packet[12:20] + bytes((0, packet[9])) + packet[24:26]
    assert packet[26:28] != b"\0\0"
    assert checksum(pseudo_header + packet[20:]) in (0, 0xFFFF)


def test_a_datagram_has_64_bytes_unless_it_is_told_otherwise() -> None:
    assert len(datagram(("10.0.0.1", 1), ("10.0.0.2", 2))) == 64


def test_no_more_are_sent_than_the_pace_allows() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.setblocking(False)  # what finds no room is lost, as in a network
    with near, far:
        sent, took = sender._send(near, [b"x"] * 64, 0.2, pace=50)
    assert 0 < sent <= took * 50 + sender._PACED_BURST


def test_endpoints_differ_and_are_unprivileged_ports_beside_the_client() -> None:
    made = [endpoint("10.0.0.1", number) for number in range(50_000)]
    assert len(set(made)) == len(made)
    assert {address.rpartition(".")[0] for address, _ in made} == {"10.0.0"}
    assert "10.0.0.1" not in {address for address, _ in made}
    assert 1024 <= min(port for _, port in made) <= max(port for _, port in made) <= 0xFFFF
