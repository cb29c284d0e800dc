"""Capture files that Wireshark and tcpdump read: pcapng (draft-ietf-opsawg-pcapng).

A file is blocks, one behind another, so it can be written as things happen, read while it grows,
and cut behind any block:

    section, interface, interface, ...      how it begins
    names, packet, packet, ...              in any order, names before what they name
    statistics                              of each interface, at the end

A block is its type, its length, its body, and its length once more; its body is fixed fields and
then options, each a code, a length and a value, all filled up to 32 bits (section 3).  Numbers are
little-endian, which the section header tells.  Times are nanoseconds since 1970.

    >>> file = section(application="krelay") + interface("eth0") + packet(0, b"frame", 0)
    >>> file[:4].hex(), whole(file) == len(file), whole(file[:-1]) < len(file)
    ('0a0d0d0a', True, True)
"""

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

ETHERNET, RAW_IP = 1, 101
"""Link types: what a packet begins with.  RAW_IP: with the IP header, of either version."""

SECTION, INTERFACE, NAMES, STATISTICS, PACKET = 0x0A0D0D0A, 1, 4, 5, 6
"""Block types."""
MAGIC = SECTION.to_bytes(4)
"""How every file begins.  It reads the same either way round."""
MOST = 1 << 20
"""Bytes of a block that `whole` takes for one; ours have no more than a packet and some words."""

_BYTE_ORDER = 0x1A2B3C4D
_COMMENT = 1  # the same in all blocks
_HARDWARE, _OS, _APPLICATION = 2, 3, 4  # of a section
_NAME, _DESCRIPTION, _TIME_RESOLUTION = 2, 3, 9  # of an interface
_FLAGS, _DROPPED, _PACKET_ID = 2, 4, 5  # of a packet
_BEGAN, _ENDED, _RECEIVED, _LOST = 2, 3, 4, 5  # of statistics: starttime, endtime, ifrecv, ifdrop
_INBOUND, _OUTBOUND = 1, 2
_IPV4, _IPV6 = 1, 2  # records of names
_LAST_OPTION = b"\0\0\0\0"
_LONGEST = 0xFFFF  # bytes of an option's value
_FRAME = 12  # type, length; length

_PACKET_HEAD = struct.Struct("<IIIIIII").pack
_LENGTH = struct.Struct("<I").pack
_HEADER = struct.Struct("<II").unpack_from


class BadCapture(ValueError):
    """Bytes that are no blocks."""


def section(*, hardware: str = "", os: str = "", application: str = "", comment: str = "") -> bytes:
    """How a file begins (section 4.1): what it was made on and by."""
    body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)  # version 1.0; the length isn't known
    options = (_COMMENT, comment), (_HARDWARE, hardware), (_OS, os), (_APPLICATION, application)
    return _block(SECTION, body + _texts(*options))


def interface(name: str, *, link: int = ETHERNET, description: str = "") -> bytes:
    """A place of the capture (section 4.2).  They are numbered from 0 as they come."""
    options = _texts((_NAME, name), (_DESCRIPTION, description), last=False)
    options += _option(_TIME_RESOLUTION, b"\x09") + _LAST_OPTION  # 10**-9 s
    return _block(INTERFACE, struct.pack("<HHI", link, 0, 0) + options)


def packet(interface: int, data: bytes, nanoseconds: int, options: bytes = b"") -> bytes:
    """A packet (section 4.3), seen whole at an interface at that time.

    Its options are `options`, `packet_id` and `lost_before`, any of them, one behind another.
    """
    size = len(data)
    if options:
        options += _LAST_OPTION
    length = _FRAME + 20 + size + -size % 4 + len(options)
    high, low = nanoseconds >> 32, nanoseconds & 0xFFFFFFFF
    return b"".join(
        (
            _PACKET_HEAD(PACKET, length, interface, high, low, size, size),
            data,
            bytes(-size % 4),
            options,
            _LENGTH(length),
        )
    )


def options(outbound: bool | None, comment: str = "") -> bytes:
    """Of a packet: which way it went at its interface, and words about it."""
    found = _option(_COMMENT, comment.encode()) if comment else b""
    if outbound is not None:
        found += _option(_FLAGS, struct.pack("<I", _OUTBOUND if outbound else _INBOUND))
    return found


def packet_id(number: int) -> bytes:
    """Of a packet: the same number wherever the same packet is seen."""
    return _option(_PACKET_ID, struct.pack("<Q", number))


def lost_before(count: int, why: str) -> bytes:
    """Of a packet: how many were lost at its interface since the one before."""
    said = f"{count} lost before this: {why}"
    return _option(_DROPPED, struct.pack("<Q", count)) + _option(_COMMENT, said.encode())


def names(known: Mapping[bytes, str]) -> bytes:
    """What addresses, packed, are called from here on (section 4.5); an empty map is no block."""
    if not known:
        return b""
    records = b"".join(
        _option(_IPV4 if len(address) == 4 else _IPV6, address + name.encode() + b"\0")
        for address, name in known.items()
    )
    return _block(NAMES, records + _LAST_OPTION)


def statistics(
    interface: int, nanoseconds: int, *, began: int, received: int, dropped: int
) -> bytes:
    """What an interface has seen in all (section 4.6), those it dropped among the received."""
    options = _option(_BEGAN, _time(began)) + _option(_ENDED, _time(nanoseconds))
    options += _option(_RECEIVED, struct.pack("<Q", received))
    options += _option(_LOST, struct.pack("<Q", dropped)) + _LAST_OPTION
    return _block(STATISTICS, struct.pack("<I", interface) + _time(nanoseconds) + options)


# Reading, as far as a capture is passed on


class Block(NamedTuple):
    """A block that came whole, and where its body stands."""

    kind: int
    begin: int
    end: int


def blocks(data: bytes | bytearray) -> Iterator[Block]:
    """The blocks at the beginning of this that are whole.  Raises BadCapture."""
    at, size = 0, len(data)
    while size - at >= 8:
        kind, length = _HEADER(data, at)
        if length < _FRAME or length % 4 or length > MOST:
            raise BadCapture(f"a block of {length} bytes")
        if size - at < length:
            break
        at += length
        yield Block(kind, at - length + 8, at - 4)


def whole(data: bytes | bytearray) -> int:
    """How many bytes of this, from its beginning, are whole blocks.  Raises BadCapture."""
    end = 0
    for block in blocks(data):
        end = block.end + 4
    return end


def dropped_by(body: bytes) -> int:
    """How many packets this body of `statistics` tells to be lost; 0 if it doesn't."""
    at = 12
    while at + 4 <= len(body):
        code, length = struct.unpack_from("<HH", body, at)
        if code == _LOST and length == 8 and at + 12 <= len(body):
            return int(struct.unpack_from("<Q", body, at + 4)[0])
        at += 4 + length + -length % 4
    return 0


def _time(nanoseconds: int) -> bytes:
    return struct.pack("<II", nanoseconds >> 32, nanoseconds & 0xFFFFFFFF)


def _texts(*options: tuple[int, str], last: bool = True) -> bytes:
    """Options that are text, without the empty ones."""
    found = b"".join(_option(code, text.encode()) for code, text in options if text)
    return found + _LAST_OPTION if found and last else found


def _option(code: int, value: bytes) -> bytes:
    value = value[:_LONGEST]
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = _LENGTH(len(body) + _FRAME)
    return struct.pack("<I", kind) + length + body + length
