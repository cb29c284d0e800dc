"""The packets that are made by hand, by the checksum that the rest of the project uses."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sender import datagram, endpoint
from krelay.wire.checksum import checksum

addresses = st.ip_addresses(v=4).map(str)
ports = st.integers(0, 0xFFFF)


@given(addresses, ports, addresses, ports)
def test_a_datagram_has_64_bytes_and_a_right_checksum(
    src: str, sport: int, dst: str, dport: int
) -> None:
    packet = datagram((src, sport), (dst, dport))
    assert len(packet) == int.from_bytes(packet[2:4]) == 64
    pseudo_header = packet[12:20] + bytes((0, packet[9])) + packet[24:26]
    assert packet[26:28] != b"\0\0"
    assert checksum(pseudo_header + packet[20:]) in (0, 0xFFFF)


def test_endpoints_differ_and_are_unprivileged_ports_beside_the_client() -> None:
    made = [endpoint("10.0.0.1", number) for number in range(50_000)]
    assert len(set(made)) == len(made)
    assert {address.rpartition(".")[0] for address, _ in made} == {"10.0.0"}
    assert "10.0.0.1" not in {address for address, _ in made}
    assert 1024 <= min(port for _, port in made) <= max(port for _, port in made) <= 0xFFFF
