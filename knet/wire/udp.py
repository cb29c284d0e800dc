"""UDP datagrams (RFC 768).

     0               2               4               6
    +---------------+---------------+---------------+---------------+
    |  Source Port  |   Dest Port   |    Length     |   Checksum    |
    +---------------+---------------+---------------+---------------+

A checksum of zero means that the sender made none: it stays zero whatever is rewritten.  A checksum
that comes out as zero is sent as its twin 0xFFFF, so that it doesn't read as "none".
"""

import struct

from knet.wire import ipv4
from knet.wire.checksum import ONES, checksum, updated

HEADER = 8
CHECK = 6
"""Offset of the checksum in the header."""
PROTO = 17

_HEADER = struct.Struct("!HHHH")


def updated_check(field: int, delta: int) -> int:
    """The checksum field after the covered words grew by `delta`; see checksum.updated."""
    return (updated(field, delta) or ONES) if field else 0


def build(
    src: bytes, dst: bytes, sport: int, dport: int, payload: bytes, *, check: bool = True
) -> bytes:
    """A whole IPv4 packet with this datagram; `check=False` leaves the checksum out."""
    length = HEADER + len(payload)
    datagram = _HEADER.pack(sport, dport, length, 0) + payload
    if check:
        field = checksum(ipv4.pseudo_header(PROTO, src, dst, length) + datagram) or ONES
        datagram = datagram[:CHECK] + field.to_bytes(2) + payload
    return ipv4.build(PROTO, src, dst, datagram)
