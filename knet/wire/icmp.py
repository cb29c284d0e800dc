"""ICMP errors (RFC 792): those a relay sends, and what others quote of the packets they tell of.

+---------------+---------------+---------------+---------------+
|     Type      |     Code      |           Checksum            |   0
+---------------+---------------+---------------+---------------+
|      unused, or a pointer, or the next hop's MTU (RFC 1191)   |   4
+---------------------------------------------------------------+
|   the IP header and the first bytes of the packet it is about |   8
+---------------------------------------------------------------+

An error quotes at least eight bytes behind the IP header (RFC 792): both ports, and
all of UDP's header, but not TCP's checksum.  Behind the quoted bytes there may be extensions with a
checksum of their own (RFC 4884), which nothing here looks at (RFC 5508, REQ-3d).
"""

import struct
from typing import NamedTuple

from knet.wire import BadPacket, ipv4, tcp, udp
from knet.wire.checksum import checksum

PROTO = 1
HEADER = 8
CHECK = 2
"""Offset of the checksum in the message."""

UNREACHABLE = 3
TIME_EXCEEDED = 11
PARAMETER_PROBLEM = 12
ERRORS = frozenset({UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM})
"""Types that a translator must handle (RFC 5508, section 7).  Source quench, 4, is obsolete and is
neither sent nor listened to (RFC 6633); a redirect is for a neighbour alone."""
REDIRECT = 5
"""Type of what tells a neighbour of another router (RFC 792)."""

FRAGMENTATION_NEEDED = 4
"""Code of "fragmentation needed and DF set"; bytes 6 and 7 hold the next hop's MTU (RFC 1191)."""
PROHIBITED = 13
"""Code of "communication administratively prohibited" (RFC 1812, section 5.2.7.1; the code a
NAT sends when it can't make a mapping: RFC 5508, REQ-8)."""

MAX_ERROR = 576
"""Bytes: as much of the packet as fits is quoted (RFC 1812, section 4.3.2.3)."""

LEAST_QUOTED = 8
"""Bytes of the transport header that an error holds (RFC 792)."""


class Quote(NamedTuple):
    """Where in an error the packet stands that it is about, and what that packet reads."""

    at: int
    """Offset of the quoted IP header in the whole packet."""
    l4: int
    """Offset of the quoted transport header, behind all IP options (RFC 5508, REQ-3b)."""
    check: int | None
    """Offset of the quoted transport checksum, if that was quoted."""
    proto: int
    src: bytes
    dst: bytes
    ports: bytes
    """Source and destination port, four bytes."""

    @property
    def answers(self) -> bytes:
        """Addresses and ports of the packets that go the opposite way: those of an answer."""
        return self.dst + self.src + self.ports[2:] + self.ports[:2]


def quoted(packet: bytes, header: ipv4.Header) -> Quote:
    """What the ICMP error `packet` quotes; `header` is its own.

    Raises BadPacket (`icmp_quote`) unless it quotes the beginning of a TCP or UDP packet.
    Checksums are `verify`'s matter.
    """
    at = header.length + HEADER
    end = header.total
    if end < at + ipv4.MIN_HEADER or packet[at] >> 4 != 4:
        raise BadPacket("icmp_quote")
    l4 = at + (packet[at] & 0xF) * 4
    total = int.from_bytes(packet[at + 2 : at + 4])
    fragment = int.from_bytes(packet[at + 6 : at + 8])
    proto = packet[at + 9]
    whole = l4 >= at + ipv4.MIN_HEADER and l4 + LEAST_QUOTED <= min(end, at + total)
    if not whole or fragment & ipv4.OFFSET_MASK or proto not in (tcp.PROTO, udp.PROTO):
        raise BadPacket("icmp_quote")
    check: int | None = l4 + (tcp.CHECK if proto == tcp.PROTO else udp.CHECK)
    if check is not None and check + 2 > min(end, at + total):
        check = None
    src, dst = packet[at + 12 : at + 16], packet[at + 16 : at + 20]
    return Quote(at, l4, check, proto, src, dst, packet[l4 : l4 + 4])


def verify(packet: bytes, header: ipv4.Header, quote: Quote) -> None:
    """Checks the error's checksum and that of the quoted IP header (RFC 5508, REQ-3, REQ-3a).

    The quoted transport checksum is not looked at (REQ-3c): most of what it covers is not there.
    Raises BadPacket (`icmp_checksum`, `icmp_quoted_checksum`).
    """
    if checksum(packet[header.length : header.total]):
        raise BadPacket("icmp_checksum")
    if checksum(packet[quote.at : quote.l4]):
        raise BadPacket("icmp_quoted_checksum")


def prohibited(packet: bytes, header: ipv4.Header) -> bytes:
    """The error 3/13 about `packet`, to its sender, from the address it was sent to."""
    return _error(UNREACHABLE, PROHIBITED, 0, packet, header.dst, header.src)


def time_exceeded(packet: bytes, header: ipv4.Header) -> bytes:
    """The error 11/0 about `packet`, from 0.0.0.0: the kernel puts its own address there."""
    return _error(TIME_EXCEEDED, 0, 0, packet, bytes(4), header.src)


def too_big(packet: bytes, header: ipv4.Header, mtu: int) -> bytes:
    """The error 3/4 about `packet`, likewise; the next link takes `mtu` bytes (RFC 1191)."""
    return _error(UNREACHABLE, FRAGMENTATION_NEEDED, mtu, packet, bytes(4), header.src)


def _error(kind: int, code: int, rest: int, packet: bytes, src: bytes, dst: bytes) -> bytes:
    quoted = packet[: MAX_ERROR - ipv4.MIN_HEADER - HEADER]
    message = struct.pack("!BBHI", kind, code, 0, rest) + quoted
    message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    return ipv4.build(PROTO, src, dst, message)
