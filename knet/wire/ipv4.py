"""The IPv4 header (RFC 791), as far as a relay reads and writes it.

     0               1               2               3
    +-------+-------+---------------+-------------------------------+
    |Version|  IHL  |Type of Service|          Total Length         |   0
    +---------------+---------------+-----+-------------------------+
    |         Identification        |Flags|     Fragment Offset     |   4
    +---------------+---------------+-----+-------------------------+
    |  Time to Live |    Protocol   |        Header Checksum        |   8
    +---------------+---------------+-------------------------------+
    |                         Source Address                        |  12
    +---------------------------------------------------------------+
    |                      Destination Address                      |  16
    +---------------------------------------------------------------+
    |                    Options, padded to 4 bytes                 |  20
    +---------------------------------------------------------------+

Packets arrive from the kernel after its own checks, but nothing here relies on that: any bytes give
a Header or BadPacket.  The reason tells "not what it says" (`short_header`, `bad_version`,
`bad_length`) from `truncated`, a whole packet of which only the beginning was handed to us.
"""

import struct
from typing import NamedTuple

from knet.wire import BadPacket
from knet.wire.checksum import checksum

MIN_HEADER = 20
MAX_TOTAL = 0xFFFF
PLAIN = 0x45
"""The first byte of a header without options."""

ADDRESS = 4
"""Bytes of an address."""

ADDRESSES = slice(12, 20)
FLOW_KEY = slice(12, 24)
"""Addresses, and the ports behind them, of a packet without options (knet.endpoint.FlowKey)."""
CHECK = slice(10, 12)

FRAGMENT_MASK = 0x3FFF
"""More-fragments flag and fragment offset: zero in a packet that is whole."""
DONT_FRAGMENT = 0x4000
OFFSET_MASK = 0x1FFF
"""Zero in what begins with a transport header."""

_HEADER = struct.Struct("!BBHHHBBH4s4s")


class Header(NamedTuple):
    """What the first bytes say."""

    length: int
    """Bytes of the header, options included (20-60)."""
    total: int
    """Bytes of the whole packet."""
    fragment: int
    """Flags and offset as they stand in the packet."""
    ttl: int
    proto: int
    src: bytes
    dst: bytes

    @property
    def is_fragment(self) -> bool:
        """Whether this is a part of a datagram and not the whole."""
        return bool(self.fragment & FRAGMENT_MASK)


def parse(packet: bytes) -> Header:
    """The header of an untrusted packet.  Raises BadPacket."""
    if len(packet) < MIN_HEADER:
        raise BadPacket("short_header")
    first, _, total, _, fragment, ttl, proto, _, src, dst = _HEADER.unpack_from(packet)
    if first >> 4 != 4:
        raise BadPacket("bad_version")
    length = (first & 0xF) * 4
    if length < MIN_HEADER or total < length:
        raise BadPacket("bad_length")
    if total > len(packet):
        raise BadPacket("truncated")
    if total < len(packet):
        raise BadPacket("bad_length")
    return Header(length, total, fragment, ttl, proto, src, dst)


def build(proto: int, src: bytes, dst: bytes, payload: bytes, *, ttl: int = 64) -> bytes:
    """A packet without options, not to be fragmented (identification 0: RFC 6864, section 4.1).

    Raises ValueError if the whole is longer than 65,535 bytes.
    """
    total = MIN_HEADER + len(payload)
    if total > MAX_TOTAL:
        raise ValueError(f"{total} bytes don't fit into an IPv4 packet")
    head = _HEADER.pack(PLAIN, 0, total, 0, DONT_FRAGMENT, ttl, proto, 0, src, dst)
    return head[:10] + checksum(head).to_bytes(2) + head[12:] + payload


def pseudo_header(proto: int, src: bytes, dst: bytes, length: int) -> bytes:
    """What TCP and UDP checksums cover besides the segment (RFC 9293, section 3.1; RFC 768)."""
    return src + dst + struct.pack("!HH", proto, length)
