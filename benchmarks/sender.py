"""Sends UDP datagrams for some seconds, as fast as it can; then says how many.

    sender.py one ADDRESS PORT SOURCE_PORT SECONDS CPU PER_CALL SIZE PACE
    sender.py many ADDRESS PORT CLIENT SECONDS CPU ENDPOINTS

`one` is one flow of packets of SIZE bytes.  PER_CALL 1 is one system call a datagram, as ordinary
programs do.  More hands the kernel a train that it cuts into datagrams (UDP_SEGMENT, udp(7)):
several times as many.  PACE is how many packets a second it sends at most; 0 sets no bound.

`many` takes in turn, in a random order, as many endpoints of clients beside CLIENT: packets made
beforehand, from a raw socket, one system call each.  Few endpoints have several packets each, so
that going through them costs the sender the same, however many there are.

CPU is the core to stay on, -1 for any.
"""

import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence

SMALL = 64
"""Bytes of a packet."""
HEADERS = 28
"""Bytes: IP's without options, and UDP's."""
PAYLOAD = SMALL - HEADERS
UDP_SEGMENT = 103  # linux/udp.h
ADDRESSES = 10
"""Clients that `many` endpoints are spread over."""
_FIRST_ADDRESS, _FIRST_PORT = 10, 10000
_BURST = 64
_PACED_BURST = 8
_PACKETS = 50_000
"""That `many` makes at least."""


def endpoint(beside: str, number: int) -> tuple[str, int]:
    """Address and port of the endpoint with this number; addresses are in the /24 of `beside`."""
    network = beside.rpartition(".")[0]
    address = f"{network}.{_FIRST_ADDRESS + number % ADDRESSES}"
    return address, _FIRST_PORT + number // ADDRESSES


def datagram(src: tuple[str, int], dst: tuple[str, int], payload: bytes = bytes(PAYLOAD)) -> bytes:
    """A packet, of 64 bytes unless it is told what to carry, with a valid UDP checksum (RFC 768).

    The kernel fills in the header's (raw(7)).
    """
    addresses = socket.inet_aton(src[0]) + socket.inet_aton(dst[0])
    length = 8 + len(payload)
    padded = addresses + payload + bytes(len(payload) % 2)
    words = struct.unpack(f"!{len(padded) // 2}H", padded)
    total = sum(words) + socket.IPPROTO_UDP + length + src[1] + dst[1] + length
    check = 0xFFFF - total % 0xFFFF
    whole = 20 + length
    head = struct.pack("!BBHHHBBH", 0x45, 0, whole, 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
    return head + addresses + struct.pack("!HHHH", src[1], dst[1], length, check) + payload


def main(what: str, address: str, port: str, *rest: str) -> None:
    """Sends; prints datagrams sent and seconds taken."""
    to, origin, seconds, cpu = (address, int(port)), rest[0], float(rest[1]), int(rest[2])
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    if what == "one":
        per_call, size, pace = map(int, rest[3:])
        payload = bytes(size - HEADERS)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            if per_call > 1:
                sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(payload))
            sender.bind(("", int(origin)))
            sender.connect(to)
            sent, took = _send(sender, [payload * per_call] * _BURST, seconds, pace)
            print(sent * per_call, took)
    else:
        amount = int(rest[3])
        numbers = (number % amount for number in range(max(amount, _PACKETS)))
        packets = [datagram(endpoint(origin, number), to) for number in numbers]
        random.Random(amount).shuffle(packets)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            sender.connect((address, 0))
            print(*_send(sender, packets, seconds))


def _send(
    sender: socket.socket, packets: Sequence[bytes], seconds: float, pace: float = 0
) -> tuple[int, float]:
    """Sends these over and over; how often, and the seconds taken."""
    send, sent, at = sender.send, 0, 0
    burst = _PACED_BURST if pace else _BURST
    apart = burst / pace if pace else 0.0
    began = due = now = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        if now < due:
            continue  # sleeping would be late by as much as some bursts
        due += apart
        for packet in packets[at : at + burst]:
            try:
                send(packet)
            except OSError:  # the device's queue is full, or an ICMP error has come: go on
                continue
            sent += 1
        at = at + burst if at + burst < len(packets) else 0
    return sent, now - began


if __name__ == "__main__":
    main(*sys.argv[1:])
