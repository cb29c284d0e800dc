"""A flood of fragments that never become whole: first, middle and last ones, from anybody.

    python fragments.py ADDRESS PORT RATE SECONDS

They are UDP's, and go to that address.  At the end it prints how many were sent.
"""

import socket
import struct
import sys
import time
from random import Random

SIZE = 1400
BURST = 0.005
"""Seconds between bursts."""


def main(address: str, port: int, rate: int, seconds: float) -> None:
    """Sends RATE fragments a second."""
    rng = Random(1858)
    to = socket.inet_aton(address)
    udp = struct.pack("!HHHH", 4000, port, 3 * SIZE, 0)
    payload = (udp + bytes(SIZE))[:SIZE]
    places = (0x2000, 0x2000 | SIZE // 8, 2 * SIZE // 8)  # RFC 791: more to come, offset by eight
    began, sent = time.monotonic(), 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        while (passed := time.monotonic() - began) < seconds:
            while sent < passed * rate:
                # 198.18.0.0/15 is for such tests (RFC 2544)
                source = struct.pack("!I", 0xC6120000 | rng.getrandbits(17))
                head = struct.pack(
                    "!BBHHHBBH", 0x45, 0, 0, rng.getrandbits(16), places[sent % 3], 64, 17, 0
                )
                raw.sendto(head + source + to + payload, (address, 0))
                sent += 1
            time.sleep(BURST)
    print(sent)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
