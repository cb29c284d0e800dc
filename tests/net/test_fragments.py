"""Fragments: datagrams that don't fit a link, whole again before they are rewritten, in any order.

The kernel reassembles before the first rule, with connection tracking and without; a rule of ours
sees to that (krelay/rules).  What comes out of the relay is cut again for its next link.
"""

import socket
from collections.abc import Iterator
from random import Random

import pytest
from scapy.layers.inet import IP, fragment

from tests.net.routed import MTU, Watch, routed, send, watching
from tests.net.test_floods import fragments_held
from tests.net.world import World, echo, greet
from tests.tools.packets import Template, flow

pytestmark = pytest.mark.net

PORT = 40007
TRACKING = "table ip tracking { chain in { type filter hook forward priority 0; ct state new; }; }"
LARGE = bytes(Random(791).randbytes(60_000))
OFFSET, MORE = 0x1FFF, 0x2000


@pytest.fixture(scope="module", params=["client", "client, conntrack", "relay", "relay, conntrack"])
def relayed(request: pytest.FixtureRequest, datapath: str) -> Iterator[World]:
    """A world with that source, and connection tracking in the relay host or not."""
    source, _, tracking = request.param.partition(", ")
    with routed(datapath) as world:
        world.serve("server", "udp/7", "tcp/80")
        world.begin(source=source)
        if tracking:
            world.nft("relay", TRACKING)
        yield world
        count = world.lab.run("relay", "sysctl", "-n", "net.netfilter.nf_conntrack_count").stdout
        assert (int(count) > 0) == bool(tracking)


@pytest.fixture
def sock(relayed: World) -> Iterator[socket.socket]:
    """A client's socket with PORT."""
    with relayed.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", PORT))
        yield sock


def pieces(src: str, dst: str, payload: bytes, number: int, size: int = 1000) -> list[bytes]:
    """A datagram `ADDRESS:PORT > ADDRESS:PORT` in fragments of about that size, in order."""
    whole = Template(flow(f"{src} > {dst}"), payload=payload, ident=number, fragment=0).build()
    return [bytes(piece) for piece in fragment(IP(whole), size)]


def orders(parts: list[bytes]) -> dict[str, list[bytes]]:
    """The ways in which they may arrive."""
    shuffled = parts.copy()
    Random(4787).shuffle(shuffled)
    return {
        "in order": parts,
        "the last first": parts[::-1],
        "the first last": parts[1:] + parts[:1],
        "in any order": shuffled,
        "each twice": [part for part in parts[:-1] for _ in range(2)] + parts[-1:],
    }


def test_a_datagram_of_60_kb_crosses_both_ways(relayed: World, sock: socket.socket) -> None:
    for size in (60_000, MTU - 28, 1473, 20_000):  # what fits a sender's own link says DF
        assert relayed.exchange(sock, LARGE[:size], (relayed.relay, 7)) == LARGE[:size]


def test_a_clients_fragments_may_arrive_in_any_order(relayed: World, sock: socket.socket) -> None:
    src, dst = f"{relayed.client}:{PORT}", f"{relayed.relay}:7"
    for number, order in enumerate(orders(pieces(src, dst, LARGE, 1))):
        send(relayed, "client", *orders(pieces(src, dst, LARGE, 100 + number))[order])
        assert sock.recvfrom(1 << 16) == (LARGE, (relayed.relay, 7)), order


def test_a_servers_fragments_may_arrive_in_any_order(relayed: World, sock: socket.socket) -> None:
    relayed.exchange(sock, b"makes a row", (relayed.relay, 7))
    source = relayed.values("config")["source"]
    to = relayed.client if source == "client" else relayed.relay
    src, dst = f"{relayed.server}:7", f"{to}:{PORT}"
    for number, order in enumerate(orders(pieces(src, dst, LARGE, 1))):
        send(relayed, "server", *orders(pieces(src, dst, LARGE, 200 + number))[order])
        assert sock.recvfrom(1 << 16) == (LARGE, (relayed.relay, 7)), order


def test_fragments_of_several_datagrams_may_come_mixed(relayed: World, sock: socket.socket) -> None:
    src, dst = f"{relayed.client}:{PORT}", f"{relayed.relay}:7"
    datagrams = [bytes([number]) * 9000 for number in range(8)]
    parts = [p for n, data in enumerate(datagrams) for p in pieces(src, dst, data, 300 + n, 600)]
    Random(14).shuffle(parts)
    send(relayed, "client", *parts)

    got = {sock.recvfrom(1 << 16) for _ in datagrams}
    assert got == {(data, (relayed.relay, 7)) for data in datagrams}


def test_overlapping_fragments_are_nobodys_datagram_and_the_next_is_whole(
    relayed: World, sock: socket.socket
) -> None:
    """RFC 5722, which Linux follows for IPv4 as well: all of it is dropped."""
    src, dst = f"{relayed.client}:{PORT}", f"{relayed.relay}:7"
    parts = pieces(src, dst, LARGE[:5000], 400)
    shifted = IP(parts[1])
    shifted.frag -= 2
    del shifted.chksum
    send(relayed, "client", parts[0], parts[2], bytes(shifted), *parts[3:])
    send(relayed, "client", *pieces(src, dst, b"whole" * 1000, 401))

    assert sock.recvfrom(1 << 16)[0] == b"whole" * 1000


def whole_again(watch: Watch) -> tuple[list[bytes], bytes]:
    """The fragments of the next datagram, in the order of their arrival, and its payload."""
    parts = [watch.next()]
    payload = {}
    while True:
        part = parts[-1]
        word = int.from_bytes(part[6:8])
        payload[(word & OFFSET) * 8] = part[20:]
        if not word & MORE:
            break
        parts.append(watch.next())
    assert list(payload) == sorted(payload)
    return parts, b"".join(payload.values())


def test_what_leaves_is_cut_for_the_next_link_and_right_in_all_its_bytes(
    relayed: World, sock: socket.socket
) -> None:
    """RFC 4787, REQ-13a: in order, and behind the rewriting."""
    size = 4 * MTU
    source = relayed.values("config")["source"]
    seen = relayed.client if source == "client" else relayed.relay
    cases = (
        ("server", flow(f"{seen}:{PORT} > {relayed.server}:7")),
        ("client", flow(f"{relayed.relay}:7 > {relayed.client}:{PORT}")),
    )
    for host, there in cases:
        with watching(relayed, host, lambda packet: packet[9] == socket.IPPROTO_UDP) as watch:
            relayed.exchange(sock, LARGE[:size], (relayed.relay, 7))
            parts, datagram = whole_again(watch)

        assert datagram == Template(there, payload=LARGE[:size]).build()[20:]
        assert max(map(len, parts)) <= MTU
        assert len({part[4:6] for part in parts}) == 1  # one identification
        for part in parts:
            assert part[12:20] == there.src.addr + there.dst.addr
            assert not part[6] & 0x40  # nothing forbids to cut it


MANY = 8000
FLOOD_LIMIT = 1 << 20


def numbered(packet: bytes, number: int) -> bytes:
    """The packet with that identification; the kernel makes the checksum (raw(7))."""
    return packet[:4] + number.to_bytes(2) + packet[6:]


def test_fragments_without_an_end_take_bounded_room_and_disturb_nothing_that_is_whole(
    datapath: str,
) -> None:
    """RFC 4787, REQ-14a: the kernel's bound, net.ipv4.ipfrag_high_thresh, is that of krelay."""
    with routed(datapath) as world:
        for name, value in (("low_thresh", 0), ("high_thresh", FLOOD_LIMIT), ("time", 1)):
            world.lab.run("relay", "sysctl", "-qw", f"net.ipv4.ipfrag_{name}={value}")
        world.serve("server", "udp/7", "tcp/80")
        world.begin()
        tcp = world.connect("client", 80)
        greet(tcp)
        flows = len(world.flows())
        parts = pieces(f"{world.client}:{PORT}", f"{world.relay}:7", LARGE[:1400], 0)
        send(world, "client", *(numbered(parts[n % 2], n) for n in range(MANY)))

        assert FLOOD_LIMIT // 2 < fragments_held(world) < FLOOD_LIMIT + (64 << 10)
        assert len(world.flows()) == flows
        echo(tcp, LARGE)
        with world.open("client", socket.SOCK_DGRAM) as sock:
            assert world.exchange(sock, LARGE[:1000], (world.relay, 7)) == LARGE[:1000]
            sock.settimeout(0.2)

            def crosses() -> bool:
                try:
                    return world.exchange(sock, LARGE, (world.relay, 7)) == LARGE
                except TimeoutError:
                    return False

            world.until(crosses, "large datagrams cross again when the flood's time is over")
