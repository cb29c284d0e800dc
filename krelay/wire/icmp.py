"""ICMP errors (RFC 792), as a relay sends them about a packet that it refuses.

+---------------+---------------+---------------+---------------+
|     Type      |     Code      |           Checksum            |
+---------------+---------------+---------------+---------------+
|                             unused                            |
+---------------------------------------------------------------+
|   the IP header and the first bytes of the packet it is about |
+---------------------------------------------------------------+
"""

import struct

from krelay.wire import ipv4
from krelay.wire.checksum import checksum

PROTO = 1
UNREACHABLE = 3
PROHIBITED = 13
"""Code of "communication administratively prohibited" (RFC 1812, section 5.2.7.1; the code a
NAT sends when it can't make a mapping: RFC 5508, REQ-8)."""

MAX_ERROR = 576
"""Bytes: as much of the packet as fits is quoted (RFC 1812, section 4.3.2.3)."""


def prohibited(packet: bytes, header: ipv4.Header) -> bytes:
    """The error 3/13 about `packet`, to its sender, from the address it was sent to."""
    quoted = packet[: MAX_ERROR - ipv4.MIN_HEADER - 8]
    message = struct.pack("!BBHI", UNREACHABLE, PROHIBITED, 0, 0) + quoted
    message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    return ipv4.build(PROTO, header.dst, header.src, message)
