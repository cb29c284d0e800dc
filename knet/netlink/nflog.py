"""Messages of the kernel's packet log (linux/netfilter/nfnetlink_log.h): one group's settings, and
copies of packets' heads.

A copy is a message of attributes; what the packet came by decides which there are, and none of it
changes from packet to packet but values:

    PACKET_HDR  PREFIX  IFINDEX_*  MARK ..  HWADDR ..  TIMESTAMP ..  PAYLOAD
    hook is                (as the hook and the interfaces have it)  28 bytes
    the 27th byte                                                    of packet

So a *layout* is learnt from the first message of its kind, attribute by attribute.  Later ones are
known by having the same bytes in all places that aren't values, which is looked at for many
messages together: for all that came at once if they are of one length, else for those of each.
Whatever no layout fits is read by its attributes.  All three ways read the same.
"""

import re
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

from knet import netlink

Copy = tuple[int, bytes]
"""The hook, and the head of a packet: an IPv4 header without options and eight bytes more."""

SUBSYSTEM = 4
PACKET, CONFIG = 0, 1
"""NFULNL_MSG_*"""
HEAD = 28
"""Bytes of a packet that are asked for, and read."""
PLAIN = 0x45
"""The first byte of an IPv4 header without options."""
TOGETHER = 200
"""Copies that the kernel holds back to give them together."""
HUNDREDTHS = 1
"""Of a second that it holds one back at most."""
ROOM = (1 << 16) - (1 << 9)
"""Bytes of copies that come together, at most: TOGETHER of the longest that were seen are half.

With what the kernel puts beside them they are 64 KB of its memory.
"""
MOST_LAYOUTS = 16
"""Those that are learnt.  Each hook has one or two."""

_PACKET_HDR, _PAYLOAD = 1, 9
"""NFULA_*"""
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 3, 4, 5
"""NFULA_CFG_*"""
_BIND, _COPY_PACKET = 1, 2
_ATTRIBUTES = netlink.HEAD + netlink.GENERIC
_HOOK = _ATTRIBUTES + 4 + 2
_LENGTH = struct.Struct("=I")


def settings(group: int, sequence: int, together: int = TOGETHER) -> bytes:
    """Asks for that group's copies; the answer is an acknowledgement with this number.

    So many come together; 1: each at once.  The kernel makes room for a whole reading as soon as
    one waits; for one that waits for no other, as much as it needs.
    """
    return netlink.message(
        SUBSYSTEM,
        CONFIG,
        netlink.ACK,
        netlink.attribute(_CFG_CMD, bytes((_BIND,)))
        + netlink.attribute(_CFG_MODE, struct.pack("!IBx", HEAD, _COPY_PACKET))
        + netlink.number(_CFG_NLBUFSIZ, ROOM if together > 1 else 0)
        + netlink.number(_CFG_TIMEOUT, HUNDREDTHS)
        + netlink.number(_CFG_QTHRESH, together),
        sequence=sequence,
        family=0,
        resource=group,
    )


def read(message: netlink.Message) -> Copy | None:
    """The copy that a message is, by its attributes; None for any other message.

    Nor is it one if it has less than HEAD bytes or isn't of a plain IPv4 packet.
    """
    if (message.subsystem, message.kind) != (SUBSYSTEM, PACKET):
        return None
    values = dict(netlink.attributes(message.attributes))
    about, head = values.get(_PACKET_HDR, b""), values.get(_PAYLOAD, b"")[:HEAD]
    if len(about) < 4 or len(head) < HEAD or head[0] != PLAIN:
        return None
    return about[2], head


class Layout(NamedTuple):
    """Where the values are in messages of one kind."""

    size: int
    """Bytes of a message."""
    fixed: tuple[tuple[int, bytes], ...]
    """Places of bytes that are the same in all: of the lengths and types, and PLAIN."""
    values: struct.Struct
    """Takes the hook and the head out of a message."""
    pattern: bytes
    """Matches one message."""

    def fits_all(self, data: bytes) -> bool:
        """Whether it is that of each of these messages, one after the other."""
        count = len(data) // self.size
        return all(data[at :: self.size] == byte * count for at, byte in self.fixed)

    def all_of(self, data: bytes) -> list[Copy] | None:
        """Those of messages one after the other; None if one of them has another layout."""
        data = data[: len(data) // self.size * self.size]
        return list(self.values.iter_unpack(data)) if self.fits_all(data) else None


def layout_of(message: bytes) -> Layout | None:
    """The layout of a copy, a message that `read` reads; None if it isn't laid out as usual."""
    size = len(message)
    places = [*range(_LENGTH.size + 2)]
    kinds = []
    at = _ATTRIBUTES
    for kind, value in netlink.attributes(message[_ATTRIBUTES:]):
        kinds.append((kind, len(value)))
        places += range(at, at + 4)
        at += (4 + len(value) + 3) & ~3
    usual = (
        at == size
        and kinds[0] == (_PACKET_HDR, 4)
        and kinds[-1] == (_PAYLOAD, HEAD)
        and len(dict(kinds)) == len(kinds)
    )
    if not usual:
        return None
    head = size - HEAD
    fixed = tuple((place, message[place : place + 1]) for place in (*places, head))
    values = struct.Struct(f"{_HOOK}xB{head - _HOOK - 1}x{HEAD}s")
    return Layout(size, fixed, values, _pattern(size, fixed))


def _pattern(size: int, fixed: Iterable[tuple[int, bytes]]) -> bytes:
    pattern, at = b"", 0
    for place, byte in fixed:
        pattern += b".{%d}" % (place - at) if place > at else b""
        pattern += re.escape(byte)
        at = place + 1
    return pattern + b".{%d}" % (size - at)


class Reader:
    """Reads what was received, and knows the layouts it has met."""

    def __init__(self) -> None:
        self._by_size: dict[int, Layout] = {}
        """The first that was learnt of each."""
        self._patterns: set[bytes] = set()
        self._prepare()

    @property
    def layouts(self) -> int:
        """How many were learnt."""
        return len(self._patterns)

    def copies(self, data: bytes) -> list[Copy]:
        """Those that `data`, of one reading, holds, in their order.  Any bytes will do."""
        layout = self._by_size.get(int.from_bytes(data[: _LENGTH.size], sys.byteorder))
        found: list[Copy] = []
        at = 0
        if layout is not None and len(data) == layout.size:
            if self._fits(data):
                return [(data[_HOOK], data[-HEAD:])]
        elif layout is not None and (all_of_them := layout.all_of(data)) is not None:
            found, at = all_of_them, len(all_of_them) * layout.size
        size = len(data)
        while at < size:
            # What follows the last of a known length is one piece, too; so nothing is left out.
            *known, rest = self._split(data, at)
            found += self._read_known(known)
            at = self._read_first(data, size - len(rest), found)
        return found

    def _read_known(self, messages: list[bytes]) -> list[Copy]:
        """Reads messages of sizes that layouts have."""
        for size in set(map(len, messages)):
            alike = b"".join([each for each in messages if len(each) == size])
            if not self._by_size[size].fits_all(alike):
                return self._read_each(messages)
        return [(message[_HOOK], message[-HEAD:]) for message in messages]

    def _read_each(self, messages: list[bytes]) -> list[Copy]:
        found: list[Copy] = []
        for message in messages:
            if self._fits(message):
                found.append((message[_HOOK], message[-HEAD:]))
            else:
                self._read_first(message, 0, found)
        return found

    def _read_first(self, data: bytes, at: int, found: list[Copy]) -> int:
        """Reads the message there by its attributes.  Where the next one begins."""
        message = next(netlink.messages(data[at:]), None)
        if message is None:
            return len(data)
        size = netlink.HEAD + len(message.body)
        copy = read(message)
        if copy is not None:
            found.append(copy)
            self._learn(data[at : at + size])
        return at + ((size + 3) & ~3)

    def _learn(self, message: bytes) -> None:
        if self.layouts == MOST_LAYOUTS:
            return
        layout = layout_of(message)
        if layout is not None and layout.pattern not in self._patterns:
            self._by_size.setdefault(layout.size, layout)
            self._patterns.add(layout.pattern)
            self._prepare()

    def _prepare(self) -> None:
        sizes = [
            re.escape(_LENGTH.pack(size)) + b".{%d}" % (size - _LENGTH.size)
            for size in self._by_size
        ]
        self._split = re.compile(b"|".join((*sizes, b".+")), re.DOTALL).findall
        self._fits = re.compile(b"|".join(sorted(self._patterns)), re.DOTALL).fullmatch
