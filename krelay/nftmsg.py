"""Messages to nf_tables for what the nft tool can't do, or not fast enough.  Pure.

Elements of maps, thousands a second, for which a process each would be far too slow; and a rule
with a target of iptables in a table of our own, which nft shows but doesn't make.  Numbers are
those of linux/netfilter/nf_tables.h; the names of the constants are its own, shortened.

An element's key is that of every map of the fast path (ruleset.py): source address, source port,
destination address, destination port, each in a field of four bytes, ports padded.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from krelay.wire import netlink

SUBSYSTEM = 10
NEW_RULE, NEW_ELEMENT, GET_ELEMENT, DELETE_ELEMENT, NEW_OBJECT, GET_OBJECT = 6, 12, 13, 14, 18, 19
COUNTER_OBJECT = 1
"""NFT_OBJECT_COUNTER."""

_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_EXPR_NAME, _EXPR_DATA, _LIST_ELEM = 1, 2, 1
_TARGET_NAME, _TARGET_REVISION, _TARGET_INFO = 1, 2, 3
_SET_TABLE, _SET_NAME, _SET_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_DATA, _ELEM_EXPR, _ELEM_EXPRESSIONS = 1, 2, 7, 11
_DATA_VALUE = 1
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA = 1, 2, 3, 4

_NESTED = 0x8000

# A counter as Linux writes it, from its name to its bytes; then these, and the packets.  To find it
# takes an eighth of the time that it takes to walk there; what is written otherwise is walked to.
_COUNTER = netlink.text(_EXPR_NAME, "counter") + struct.pack(
    "=HHHH", 28, _EXPR_DATA, 12, _COUNTER_BYTES
)
_COUNTED = struct.Struct("!Q4sQ")
_PACKETS = struct.pack("=HH", 12, _COUNTER_PACKETS)


# An element of a request that has nothing but a key.
_WANTED = struct.Struct("=HHHHHH4s2s2x4s2s2x")
_WANTED_HEADS = 28, _NESTED | _LIST_ELEM, 24, _NESTED | _ELEM_KEY, 20, _DATA_VALUE


class Count(NamedTuple):
    """What a counter of the kernel says."""

    packets: int
    bytes: int


def queue_rule(table: str, chain: str, queue: int) -> bytes:
    """A rule at the head of that chain that queues, by the NFQUEUE target of iptables.

    Its first revision: struct xt_NFQ_info (linux/netfilter/xt_NFQUEUE.h).
    """
    target = netlink.nested(
        _LIST_ELEM,
        netlink.text(_EXPR_NAME, "target"),
        netlink.nested(
            _EXPR_DATA,
            netlink.text(_TARGET_NAME, "NFQUEUE"),
            netlink.number(_TARGET_REVISION, 0),
            netlink.attribute(_TARGET_INFO, struct.pack("=H", queue)),
        ),
    )
    return netlink.message(
        SUBSYSTEM,
        NEW_RULE,
        netlink.CREATE | netlink.ACK,
        netlink.text(_RULE_TABLE, table)
        + netlink.text(_RULE_CHAIN, chain)
        + netlink.nested(_RULE_EXPRESSIONS, target),
    )


class Elements:
    """Requests about the elements of one map, or set."""

    def __init__(self, table: str, name: str) -> None:
        self._where = where = netlink.text(_SET_TABLE, table) + netlink.text(_SET_NAME, name)
        address = (12, _NESTED | _ELEM_DATA, 8, _DATA_VALUE)
        port = (12, _NESTED | _ELEM_DATA, 6, _DATA_VALUE)
        self._add = {
            4: _form(where, NEW_ELEMENT, netlink.CREATE, struct.pack("=HHHH", *address), 4),
            2: _form(where, NEW_ELEMENT, netlink.CREATE, struct.pack("=HHHH", *port), 4),
        }
        self._delete = {
            tell: _form(where, DELETE_ELEMENT, netlink.ECHO if tell else 0)
            for tell in (False, True)
        }
        self._put = _form(where, NEW_ELEMENT, netlink.CREATE)

    def add(self, key: bytes, value: bytes, sequence: int = 0) -> bytes:
        """Puts one in; replaces none (the kernel refuses another value).  `key` as row.key makes
        it; `value` is an address or a port."""
        return self._add[len(value)](sequence, key, value)

    def put(self, key: bytes, sequence: int = 0) -> bytes:
        """Puts one without a value into a set, if it isn't there."""
        return self._put(sequence, key)

    def delete(self, key: bytes, sequence: int = 0, *, tell: bool = False) -> bytes:
        """Takes one out.  `tell`: what it was is sent back, its counter with it."""
        return self._delete[tell](sequence, key)

    def get(self, keys: Iterable[bytes], sequence: int = 0) -> bytes:
        """Asks for these; no part of a batch.  Each is an answer of its own, in this order; an
        error at the first that isn't there is the last answer."""
        wanted = b"".join(
            _WANTED.pack(*_WANTED_HEADS, key[:4], key[8:10], key[4:8], key[10:]) for key in keys
        )
        attributes = self._where + netlink.nested(_SET_ELEMENTS, wanted)
        return netlink.message(SUBSYSTEM, GET_ELEMENT, 0, attributes, sequence=sequence)


class _Form(Protocol):
    def __call__(self, sequence: int, key: bytes, value: bytes = b"") -> bytes: ...


def _form(where: bytes, kind: int, flags: int, data: bytes = b"", size: int = 0) -> _Form:
    """Makes requests about an element, with a value of that size behind `data`.

    They differ in their sequence number, key and value alone, and there are thousands a second.
    """
    element = 24 + len(data) + size
    heads = (
        *(8 + element, _NESTED | _SET_ELEMENTS, 4 + element, _NESTED | _LIST_ELEM),
        *(24, _NESTED | _ELEM_KEY, 20, _DATA_VALUE),
    )
    blank = where + struct.pack("=HHHHHHHH", *heads) + bytes(16) + data + bytes(size)
    request = netlink.message(SUBSYSTEM, kind, flags, blank)
    at = len(request) - len(data) - size - 16
    before, between = request[: netlink.SEQUENCE.start], request[netlink.SEQUENCE.stop : at]
    pack = struct.Struct(f"={len(before)}sI{len(between)}s4s2s2x4s2s2x{len(data)}s{size}s").pack

    def fill(sequence: int, key: bytes, value: bytes = b"") -> bytes:
        return pack(
            *(before, sequence, between),
            *(key[:4], key[8:10], key[4:8], key[10:]),
            *(data, value),
        )

    return fill


def get_learnt(table: str, name: str, client: bytes, port: bytes, sequence: int) -> bytes:
    """Asks a set of learnt questions for this address and port."""
    key = netlink.attribute(_DATA_VALUE, client + port + bytes(2))
    element = netlink.nested(_LIST_ELEM, netlink.nested(_ELEM_KEY, key))
    attributes = netlink.text(_SET_TABLE, table) + netlink.text(_SET_NAME, name)
    attributes += netlink.nested(_SET_ELEMENTS, element)
    return netlink.message(SUBSYSTEM, GET_ELEMENT, 0, attributes, sequence=sequence)


def get_counters(table: str) -> bytes:
    """Asks for all named counters of a table."""
    attributes = netlink.text(_OBJ_TABLE, table) + netlink.number(_OBJ_TYPE, COUNTER_OBJECT)
    return netlink.message(SUBSYSTEM, GET_OBJECT, netlink.DUMP, attributes)


def element_count(message: netlink.Message) -> Count | None:
    """The counter of the one element that a message shows; None if it shows none."""
    at = message.body.find(_COUNTER)
    if at >= 0 and len(message.body) >= at + len(_COUNTER) + _COUNTED.size:
        size, head, packets = _COUNTED.unpack_from(message.body, at + len(_COUNTER))
        if head == _PACKETS:
            return Count(packets, size)
    for kind, elements in netlink.attributes(message.attributes):
        if kind != _SET_ELEMENTS:
            continue
        for _, element in netlink.attributes(elements):
            for inside, value in netlink.attributes(element):
                if inside == _ELEM_EXPR:
                    return _counter_of(value)
                if inside == _ELEM_EXPRESSIONS:
                    found = (_counter_of(each) for _, each in netlink.attributes(value))
                    return next((count for count in found if count is not None), None)
    return None


def named_counter(message: netlink.Message) -> tuple[str, Count] | None:
    """Name and value of the named counter that a message shows; None if it shows none."""
    parts = dict(netlink.attributes(message.attributes))
    if message.kind != NEW_OBJECT or _OBJ_NAME not in parts or _OBJ_DATA not in parts:
        return None
    return _name(parts[_OBJ_NAME]), _count(parts[_OBJ_DATA])


def _counter_of(expression: bytes) -> Count | None:
    parts = dict(netlink.attributes(expression))
    if _name(parts.get(_EXPR_NAME, b"")) != "counter" or _EXPR_DATA not in parts:
        return None
    return _count(parts[_EXPR_DATA])


def _count(data: bytes) -> Count:
    parts = dict(netlink.attributes(data))
    return Count(
        int.from_bytes(parts.get(_COUNTER_PACKETS, b"")),
        int.from_bytes(parts.get(_COUNTER_BYTES, b"")),
    )


def _name(value: bytes) -> str:
    return value.partition(b"\0")[0].decode(errors="replace")


def joined(messages: Iterable[bytes]) -> bytes:
    """A batch of these, which happens as a whole or not at all."""
    return netlink.batch(SUBSYSTEM, b"".join(messages))
