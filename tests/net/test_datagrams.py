"""Datagrams of every size and kind, and IP options in both protocols."""

import socket

import pytest

from krelay_vm import relay_topology
from tests.net.test_fast_path import until_fast
from tests.net.world import World, echo, greet

pytestmark = pytest.mark.net

SO_NO_CHECK = 11
"""include/uapi/asm-generic/socket.h: send UDP without a checksum."""
NOP = 1
RECORD_ROUTE = bytes([NOP, 7, 39, 4, *bytes(36)])
"""RFC 791: room for nine addresses, 40 bytes with a NOP."""


@pytest.mark.parametrize(
    "size", [0, 1, 2, 511, 1471, 1472, 1473, 2960, 8191, 30_000, 60_000, 65_503]
)
def test_a_datagram_of_any_size_comes_back_as_it_was(relaying: World, size: int) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    data = bytes(number * 7 % 251 for number in range(size))
    to = (relaying.relay, 7)
    for _ in range(3):
        sock.sendto(data, to)
        answer, peer = sock.recvfrom(1 << 16)
        assert (answer == data, peer) == (True, to)


def test_what_the_queue_cannot_hold_is_dropped_and_counted(relaying: World) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    sock.sendto(bytes(65_504), (relaying.relay, 7))  # 65,532 bytes; a netlink attribute has 65,531

    relaying.until(lambda: relaying.values("counters").get("dropped_truncated"), "a drop")
    sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        sock.recv(1)


def test_large_datagrams_keep_the_clients_address(relaying: World) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    to = (relaying.relay, 7)
    relaying.exchange(sock, bytes(20_000), to)
    _, port = sock.getsockname()

    assert relaying.exchange(sock, b"who", to) == f"{relaying.client}:{port}\n".encode()

    def both_counted() -> bool:
        (flow,) = relaying.flows(f"proto=udp client={relaying.client}:{port}")
        return bool(flow["packets"] == [2, 2])

    relaying.soon(both_counted, "two datagrams each way")


def test_datagrams_larger_than_a_small_mtu_pass_through_it(datapath: str) -> None:
    narrow = relay_topology("172.20.5.0/24", "10.77.3.0/24", mtu=576)
    with World(narrow, datapath=datapath) as world:
        world.serve("server", "udp/7", "tcp/80")
        world.begin()
        sock = world.open("client", socket.SOCK_DGRAM)
        for size in (500, 549, 5_000, 40_000):
            data = bytes(number % 253 for number in range(size))
            assert world.exchange(sock, data, (world.relay, 7)) == data
        with world.connect("client", 80) as tcp:
            greet(tcp)
            echo(tcp, bytes(range(256)) * 100)


@pytest.mark.parametrize("source", ["client", "relay"])
def test_a_datagram_without_checksum_passes_and_gets_none(world: World, source: str) -> None:
    world.serve("server", "udp/7")
    world.begin(source=source)
    sock = world.open("client", socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    with world.lab.capture("server") as frames:
        frames.settimeout(30)
        for data in (b"plain", bytes(9000)):
            assert world.exchange(sock, data, (world.relay, 7)) == data
        while b"plain" not in (frame := frames.recv(2048)):
            pass
    assert frame[14 + 20 + 6 : 14 + 20 + 8] == b"\0\0"


def test_checksums_are_right_on_both_links(relaying: World) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    for host in ("client", "server"):
        with relaying.lab.capture(host) as frames:
            frames.settimeout(30)
            data = f"checked at {host}!".encode() * 3
            assert relaying.exchange(sock, data, (relaying.relay, 7)) == data
            seen = 0
            while seen < 2:
                frame, where = frames.recvfrom(2048)
                if data not in frame:
                    continue
                seen += 1
                packet = frame[14:]
                assert ones_sum(packet[:20]) == 0xFFFF
                if where[2] != socket.PACKET_OUTGOING:  # the sender's may be left to the device
                    length = len(packet) - 20
                    pseudo = packet[12:20] + bytes([0, 17]) + length.to_bytes(2)
                    assert ones_sum(pseudo + packet[20:]) == 0xFFFF


def ones_sum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2))
    return (total % 0xFFFF) or 0xFFFF


@pytest.mark.parametrize("options", [bytes([NOP] * 4), RECORD_ROUTE], ids=["nop", "rr"])
def test_ip_options_pass_in_udp_and_tcp(relaying: World, options: bytes) -> None:
    udp = relaying.open("client", socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
    tcp = relaying.open("client")
    tcp.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
    with relaying.lab.capture("client") as frames:
        frames.settimeout(30)
        for data in (b"with options", bytes(5000)):
            assert relaying.exchange(udp, data, (relaying.relay, 7)) == data
        while b"with options" not in (frame := frames.recv(2048)):
            pass
        assert frame[14] & 0xF == 5 + len(options) // 4  # they were there
    assert relaying.exchange(udp, b"who", (relaying.relay, 7)).startswith(
        f"{relaying.client}:".encode()
    )
    tcp.connect((relaying.relay, 80))
    assert greet(tcp).startswith(f"{relaying.client}:")
    echo(tcp, bytes(range(256)) * 200)


def test_many_small_datagrams_in_a_flow_all_come_back_in_order(relaying: World) -> None:
    """When the kernel takes over, what waits in the queue can be overtaken (docs/limits.md)."""
    sock = relaying.open("client", socket.SOCK_DGRAM)
    sock.connect((relaying.relay, 7))

    def burst(name: bytes) -> tuple[list[bytes], list[bytes]]:
        sent = [b"%b %d" % (name, number) for number in range(20)]
        for data in sent:
            sock.send(data)
        return sent, [sock.recv(100) for _ in sent]

    def all_come_back() -> None:
        sent, received = burst(b"first")
        assert sorted(received) == sorted(sent)

    if relaying.in_kernel:
        until_fast(relaying, all_come_back)
    for number in range(50):
        sent, received = burst(b"%d" % number)
        assert received == sent


def test_a_datagram_to_a_port_that_is_no_service_is_answered_by_the_relay_host(
    relaying: World,
) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    sock.connect((relaying.relay, 9))
    sock.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        sock.recv(1)
