"""Netlink messages (linux/netlink.h) of the netfilter family (linux/netfilter/nfnetlink.h).

+---------------+---------------+---------------+---------------+
|             length of the message, without padding            |   0
+-------------------------------+-------------------------------+
|  subsystem, kind              |             flags             |   4
+-------------------------------+-------------------------------+
|                        sequence number                        |   8
+---------------------------------------------------------------+
|           port of the socket that asked; 0: the kernel        |  12
+---------------+---------------+-------------------------------+
| address family|    version    |          resource id          |  16
+---------------+---------------+-------------------------------+
|  attributes: length (2, without padding), type (2), value     |  20

Each message and each attribute begins at a multiple of four bytes.  Numbers of these headers are
the host's own; those inside netfilter's attributes, and the resource id, the network's.

rtnetlink  a host's addresses and routes
sockdiag   its TCP sockets
nftables   elements of sets, and rules that the tool can't make
tc         filters where packets come in and go out
socket     a netlink socket: opened, asked, read; the only one that is no pure module
nflog      copies of packets' heads
"""

import struct
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

FAMILY = 12
"""NETLINK_NETFILTER."""
REQUEST, ACK, ECHO, EXCLUSIVE, CREATE, APPEND = 0x1, 0x4, 0x8, 0x200, 0x400, 0x800
DUMP = 0x300
ERROR, DONE = 2, 3
"""NLMSG_ERROR, also of an acknowledgement, and NLMSG_DONE."""
BATCH_BEGIN, BATCH_END = 16, 17
"""NFNL_MSG_BATCH_*: what stands between happens as a whole or not at all."""
HEAD = 16
SEQUENCE = slice(8, 12)
"""Where the sequence number is in a message."""
GENERIC = 4
IPV4 = 2
"""NFPROTO_IPV4."""

HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("!BBH")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_NESTED, _TYPE = 0x8000, 0x3FFF


class Message(NamedTuple):
    """One message that was received."""

    subsystem: int
    kind: int
    flags: int
    sequence: int
    body: bytes
    """What follows the sixteen bytes: netfilter's own four and the attributes, or an error."""

    @property
    def attributes(self) -> bytes:
        """Those of a message of netfilter's."""
        return self.body[GENERIC:]

    @property
    def error(self) -> int | None:
        """The errno of an ERROR message, 0 for an acknowledgement; None for other messages."""
        if (self.subsystem, self.kind) != (0, ERROR) or len(self.body) < _CODE.size:
            return None
        return -int(_CODE.unpack_from(self.body)[0])


def message(
    subsystem: int,
    kind: int,
    flags: int,
    attributes: bytes = b"",
    *,
    sequence: int = 0,
    family: int = IPV4,
    resource: int = 0,
) -> bytes:
    """A request; `attributes` is padded already, as `attribute` makes it."""
    body = _GENERIC.pack(family, 0, resource) + attributes
    return request(subsystem << 8 | kind, flags, body, sequence=sequence)


def request(kind: int, flags: int, body: bytes, *, sequence: int = 0) -> bytes:
    """A request of any family: what follows its sixteen bytes is that family's matter."""
    return HEADER.pack(HEAD + len(body), kind, REQUEST | flags, sequence, 0) + body


def batch(subsystem: int, messages: bytes) -> bytes:
    """Requests of one subsystem that are carried out together (nfnetlink_rcv_batch)."""
    return messages.join(_batch_ends(subsystem))


@cache
def _batch_ends(subsystem: int) -> tuple[bytes, bytes]:
    begin, end = (
        message(0, kind, 0, family=0, resource=subsystem) for kind in (BATCH_BEGIN, BATCH_END)
    )
    return begin, end


def acknowledged(request: bytes) -> bytes:
    """The same request, to be acknowledged also if all is well."""
    length, kind, flags, sequence, port = HEADER.unpack_from(request)
    return HEADER.pack(length, kind, flags | ACK, sequence, port) + request[HEAD:]


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits, as netfilter has them."""
    return attribute(kind, value.to_bytes(4))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a name."""
    return attribute(kind, value.encode() + b"\0")


def messages(data: bytes) -> Iterator[Message]:
    """What was received, message by message.  Ends before the first that isn't whole."""
    at = 0
    while at + HEAD <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
        if length < HEAD or at + length > len(data):
            return
        yield Message(kind >> 8, kind & 0xFF, flags, sequence, data[at + HEAD : at + length])
        at += (length + 3) & ~3


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute.  Ends before the first that isn't whole."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & _TYPE, data[at + 4 : at + length]
        at += (length + 3) & ~3
