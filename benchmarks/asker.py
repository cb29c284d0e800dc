"""Asks a DNS server, each query from a port that has not asked before; then says what came.

    asker.py ADDRESS PORT CLIENT WARM_UP SECONDS

So many queries are under way at a time; each answer lets the next query go.  A query that
isn't answered within the patience counts as lost, and the next one goes instead.  Prints, of
SECONDS after WARM_UP: answers, lost queries, wrong answers, and the seconds it took.

Clients in earnest have a socket for each query.  Thousands of sockets a second would cost more
than all that is to be measured, so here there is none: packets are made beforehand, as from ports
of several addresses beside CLIENT, which this host must have; a raw socket sends them, and a packet
socket sees the answers come in.  The host's own kernel must not answer these (the caller has it
throw them away, where the packet socket has seen them already).
"""

import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle

from benchmarks import sender

NAME = "www.example.test"
UNDER_WAY = 100
"""As dnsperf has by default."""
PATIENCE = 1.0
"""Seconds."""
ADDRESS = b"\xc0\x00\x02\x01"
"""The answer: 192.0.2.1 (RFC 5737)."""
_MOST_PER_SECOND = 100_000
_ANSWER = struct.Struct("!HHHH")
_QR, _RCODE = 0x8000, 0x000F
_ETH_P_IP = 0x0800
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_BUFFER = 8 << 20
_LARGEST = 2048
_LOOK = 0.02
"""Seconds between looks for lost ones."""
_ENDPOINTS = 450_000
"""As many as sender.endpoint has ports for."""


def query(number: int) -> bytes:
    """A query for NAME's address, with the last 16 bits of the number as its id (RFC 1035)."""
    labels = b"".join(bytes((len(label),)) + label for label in NAME.encode().split(b"."))
    return struct.pack("!6H", number & 0xFFFF, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def is_answer(packet: bytes, number: int) -> bool:
    """Whether this IP packet, a UDP datagram, answers that query with the ADDRESS."""
    data = packet[sender.HEADERS :]
    if len(data) < _ANSWER.size:
        return False
    query, flags, _, answers = _ANSWER.unpack_from(data)
    good = flags & _QR and not flags & _RCODE and answers == 1
    return bool(good) and query == number & 0xFFFF and ADDRESS in data


def packets(client: str, to: tuple[str, int], count: int) -> list[bytes]:
    """As many queries, each from an endpoint of its own."""
    return [sender.datagram(sender.endpoint(client, n), to, query(n)) for n in range(count)]


class Asking:
    """Queries under way and what has become of those before."""

    def __init__(self, queries: Iterator[tuple[int, bytes]]) -> None:
        self.answered = self.lost = self.wrong = 0
        self._queries = queries
        self._waiting: dict[bytes, tuple[int, float]] = {}
        """By address and port that ask, in the order of time."""

    def next(self, now: float) -> bytes | None:
        """A packet to send, None if enough are under way."""
        if len(self._waiting) >= UNDER_WAY:
            return None
        number, packet = next(self._queries)
        self._waiting[packet[12:16] + packet[20:22]] = (number, now)
        return packet

    def came(self, packet: bytes) -> None:
        """What isn't for a query under way is passed over: it may have been given up."""
        asked = self._waiting.pop(packet[16:20] + packet[22:24], None)
        if asked is None:
            return
        if is_answer(packet, asked[0]):
            self.answered += 1
        else:
            self.wrong += 1

    def give_up(self, now: float) -> None:
        """Those that have waited too long count as lost."""
        while self._waiting:
            key, (_, asked) = next(iter(self._waiting.items()))
            if asked + PATIENCE > now:
                return
            del self._waiting[key]
            self.lost += 1


def main(address: str, port: str, client: str, warm_up: str, seconds: str) -> None:
    """Asks, and prints what came."""
    whole = float(warm_up) + float(seconds)
    count = min(_ENDPOINTS, int(whole * _MOST_PER_SECOND))
    made = packets(client, (address, int(port)), count)
    asking = Asking(cycle(enumerate(made)))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP)) as back,
    ):
        out.connect((address, 0))
        back.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        # By the kernel: a timeout of Python's would cost a poll each time.
        back.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(_LOOK * 1e6))
        )
        began = time.monotonic()
        _ask(asking, out, back, began + float(warm_up))
        before, warm = (asking.answered, asking.lost, asking.wrong), time.monotonic()
        _ask(asking, out, back, began + whole)
        after, ended = (asking.answered, asking.lost, asking.wrong), time.monotonic()
    print(*(last - first for first, last in zip(before, after, strict=True)), ended - warm)


def _ask(asking: Asking, out: socket.socket, back: socket.socket, until: float) -> None:
    now = looked = time.monotonic()
    while now < until:
        while (packet := asking.next(now)) is not None:
            out.send(packet)
        with suppress(BlockingIOError):  # nothing has come for a while
            asking.came(back.recv(_LARGEST))
        now = time.monotonic()
        if now > looked + _LOOK:
            asking.give_up(now)
            looked = now


if __name__ == "__main__":
    main(*sys.argv[1:])
