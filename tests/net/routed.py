"""Routers on both sides of the relay, and a narrow link behind it.

    client --- near --- relay --- far ---1300--- last --- server

A host sends what it is told to, byte by byte, and what arrives elsewhere is looked at on the wire.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from krelay_vm import Host, Link, Topology
from procfs_sim import DEFAULTS
from tests.net.world import PATIENCE, World

MTU = 1300
"""Of the narrow link, which is nobody's own who speaks through the relay."""
_SOL_PACKET, _IGNORE_OUTGOING = 263, 23  # linux/socket.h, linux/if_packet.h
ROUTED = Topology(
    hosts=(
        Host("client", gateway="10.77.1.1"),
        Host("near", forwards=True, gateway="10.77.2.2"),
        Host("relay", forwards=True, gateway="172.20.1.2"),
        Host("far", forwards=True, gateway="172.20.1.1"),
        Host("last", forwards=True, gateway="172.20.2.1"),
        Host("server", gateway="172.20.3.1"),
    ),
    links=(
        Link("client 10.77.1.2/24", "near 10.77.1.1/24"),
        Link("near 10.77.2.1/24", "relay 10.77.2.2/24"),
        Link("relay 172.20.1.1/24", "far 172.20.1.2/24"),
        Link("far 172.20.2.1/24", "last 172.20.2.2/24", mtu=MTU),
        Link("last 172.20.3.1/24", "server 172.20.3.2/24"),
    ),
)


@contextmanager
def routed(datapath: str = DEFAULTS.datapath) -> Iterator[World]:
    """A world of these hosts, in which nothing runs yet."""
    with World(ROUTED, behind="far", datapath=datapath) as world:
        world.lab.run("relay", "ip", "route", "add", "10.77.1.0/24", "via", "10.77.2.1")
        world.lab.run("far", "ip", "route", "add", "172.20.3.0/24", "via", "172.20.2.2")
        yield world


def send(world: World, host: str, *packets: bytes) -> None:
    """Puts these IPv4 packets on the wire as they are, from that host."""
    with world.lab.enter(host), socket.socket(socket.AF_INET, socket.SOCK_RAW, 255) as raw:
        for packet in packets:
            raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))


class Watch:
    """IPv4 packets that arrive at a host, those that `admits` is true of."""

    def __init__(self, sock: socket.socket, admits: Callable[[bytes], bool]) -> None:
        self._sock = sock
        self._admits = admits

    def next(self, timeout: float = PATIENCE) -> bytes:
        """Waits for the next.  Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            packet, where = self._sock.recvfrom(1 << 17)
            if self._sock.family == socket.AF_PACKET:
                if where[2] == socket.PACKET_OUTGOING or packet[12:14] != b"\x08\x00":
                    continue
                packet = packet[14:]
            packet = packet[: int.from_bytes(packet[2:4])]
            if self._admits(packet):
                return packet
        raise TimeoutError(f"no such packet within {timeout:g} s")


@contextmanager
def watching(world: World, host: str, admits: Callable[[bytes], bool]) -> Iterator[Watch]:
    """Looks from now on at what comes in on the host's first wire, as it comes."""
    with world.lab.capture(host) as frames:
        frames.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)  # what is sent would take its room
        yield Watch(frames, admits)


@contextmanager
def hearing(world: World, host: str, admits: Callable[[bytes], bool]) -> Iterator[Watch]:
    """Looks at the ICMP packets that are delivered in a host, after krelay if that runs there."""
    with world.lab.enter(host), socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as raw:
        yield Watch(raw, admits)


def is_error(packet: bytes) -> bool:
    """Whether it is one of ICMP's errors, an obsolete one too (RFC 792)."""
    return packet[9] == 1 and packet[(packet[0] & 0xF) * 4] in (3, 4, 5, 11, 12)
