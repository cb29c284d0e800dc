"""Sends UDP datagrams for some seconds, as fast as it can; then says how many.

    sender.py one ADDRESS PORT SOURCE_PORT SECONDS CPU PER_CALL
    sender.py many ADDRESS PORT CLIENT SECONDS CPU ENDPOINTS

`one` is one flow.  PER_CALL 1 is one system call a datagram, as ordinary programs do.  More hands
the kernel a train that it cuts into datagrams (UDP_SEGMENT, udp(7)): several times as many.

`many` takes in turn, in a random order, as many endpoints of clients beside CLIENT: packets made
beforehand, from a raw socket, one system call each.

CPU is the core to stay on, -1 for any.
"""

import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence

PAYLOAD = 36
"""Bytes; with both headers 64."""
UDP_SEGMENT = 103  # linux/udp.h
ADDRESSES = 10
"""Clients that `many` endpoints are spread over."""
_FIRST_ADDRESS, _FIRST_PORT = 10, 10000
_BURST = 64


def endpoint(beside: str, number: int) -> tuple[str, int]:
    """Address and port of the endpoint with this number; addresses are in the /24 of `beside`."""
    network = beside.rpartition(".")[0]
    address = f"{network}.{_FIRST_ADDRESS + number % ADDRESSES}"
    return address, _FIRST_PORT + number // ADDRESSES


def datagram(src: tuple[str, int], dst: tuple[str, int]) -> bytes:
    """A packet of 64 bytes with a valid UDP checksum (RFC 768).

    The kernel fills in the header's (raw(7)).
    """
    addresses = socket.inet_aton(src[0]) + socket.inet_aton(dst[0])
    length = 8 + PAYLOAD
    words = struct.unpack("!4H", addresses)
    total = sum(words) + socket.IPPROTO_UDP + length + src[1] + dst[1] + length
    check = 0xFFFF - total % 0xFFFF
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
    return head + addresses + struct.pack("!HHHH", src[1], dst[1], length, check) + bytes(PAYLOAD)


def main(what: str, address: str, *rest: str) -> None:
    """Sends; prints datagrams sent and seconds taken."""
    to, origin, seconds, cpu, amount = (
        (address, int(rest[0])),
        rest[1],
        float(rest[2]),
        int(rest[3]),
        int(rest[4]),
    )
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    if what == "one":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            if amount > 1:
                sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, PAYLOAD)
            sender.bind(("", int(origin)))
            sender.connect(to)
            sent, took = _send(sender, [bytes(PAYLOAD * amount)] * _BURST, seconds)
            print(sent * amount, took)
    else:
        packets = [datagram(endpoint(origin, number), to) for number in range(amount)]
        random.Random(amount).shuffle(packets)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            sender.connect((address, 0))
            print(*_send(sender, packets, seconds))


def _send(sender: socket.socket, packets: Sequence[bytes], seconds: float) -> tuple[int, float]:
    """Sends these over and over; how often, and the seconds taken."""
    send, sent, at = sender.send, 0, 0
    began = now = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        for packet in packets[at : at + _BURST]:
            try:
                send(packet)
            except OSError:  # the device's queue is full, or an ICMP error has come: go on
                continue
            sent += 1
        at = at + _BURST if at + _BURST < len(packets) else 0
    return sent, now - began


if __name__ == "__main__":
    main(*sys.argv[1:])
