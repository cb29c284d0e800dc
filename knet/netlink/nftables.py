"""Messages to nf_tables for what the nft tool can't do, or not fast enough.  Pure.

Elements of maps, thousands a second, for which a process each would be far too slow; a rule with a
target of iptables in a table of our own, which nft shows but doesn't make; and what a start and a
stop ask or do in one message.  Numbers are those of linux/netfilter/nf_tables.h; the names of the
constants are its own, shortened.

An element's key is that of every map of offloaded flows (rules/offloaded.py): source address,
source port, destination address, destination port, each in a field of four bytes, ports padded; in
some maps the DSCP follows, padded likewise.
"""

import itertools
import struct
from collections.abc import Iterable
from typing import NamedTuple

from knet import netlink

SUBSYSTEM = 10
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, GET_CHAIN = 0, 2, 3, 4
NEW_RULE, NEW_ELEMENT, GET_ELEMENT, DELETE_ELEMENT, NEW_OBJECT, GET_OBJECT = 6, 12, 13, 14, 18, 19
COUNTER_OBJECT = 1
"""NFT_OBJECT_COUNTER."""

_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_QUEUE_NUMBER = 1
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


def _heads(size: int, key: int) -> bytes:
    """What stands before the key, of so many bytes, of an element that has so many behind it."""
    heads = 12 + key + size, _NESTED | _LIST_ELEM, 8 + key, _NESTED | _ELEM_KEY, 4 + key
    return struct.pack("=HHHHHH", *heads, _DATA_VALUE)


# Elements of requests, by the size of their value; there are thousands a second.
_KEYED, _VALUED = struct.Struct("=12s4s2s2x4s2s2x"), struct.Struct("=12s4s2s2x4s2s2x8s4s")
_KEYED_HEAD, _VALUED_HEAD = _heads(0, 16), _heads(12, 16)
_MARKED = struct.Struct("=12s4s2s2x4s2s2xs3x")
_MARKED_HEAD, _MARKED_VALUED_HEAD = _heads(0, 20), _heads(12, 20)
_PLAIN_KEY = 12
_VALUE_HEADS = {
    size: struct.pack("=HHHH", 12, _NESTED | _ELEM_DATA, 4 + size, _DATA_VALUE) for size in (4, 2)
}


class Count(NamedTuple):
    """What a counter of the kernel says."""

    packets: int
    bytes: int


def get_chain(table: str, chain: str) -> bytes:
    """Asks for this chain; no part of a batch.  It is acknowledged if it is there, else ENOENT."""
    return _made(GET_CHAIN, netlink.text(_CHAIN_TABLE, table), netlink.text(_CHAIN_NAME, chain))


def delete_table(table: str) -> bytes:
    """Takes out a table, with all that is in it."""
    return _made(DELETE_TABLE, netlink.text(_TABLE_NAME, table))


def queue_rule(table: str, chain: str, queue: int) -> bytes:
    """A rule at the head of that chain that queues, by the NFQUEUE target of iptables.

    Its first revision: struct xt_NFQ_info (linux/netfilter/xt_NFQUEUE.h).
    """
    name, revision = netlink.text(_TARGET_NAME, "NFQUEUE"), netlink.number(_TARGET_REVISION, 0)
    queued = netlink.attribute(_TARGET_INFO, struct.pack("=H", queue))
    return _rule(table, chain, "target", name, revision, queued)


def own_queue(table: str) -> tuple[bytes, ...]:
    """Tries a rule with nf_tables' own `queue` in a table that is made for it, and gone with it.

    ENOENT: the kernel has none.
    """
    named, chain = netlink.text(_TABLE_NAME, table), netlink.text(_CHAIN_NAME, "try")
    rule = _rule(table, "try", "queue", netlink.attribute(_QUEUE_NUMBER, bytes(2)))
    return _made(NEW_TABLE, named), _made(NEW_CHAIN, named, chain), rule, delete_table(table)


def _rule(table: str, chain: str, expression: str, *data: bytes) -> bytes:
    name, inside = netlink.text(_EXPR_NAME, expression), netlink.nested(_EXPR_DATA, *data)
    where = netlink.text(_RULE_TABLE, table), netlink.text(_RULE_CHAIN, chain)
    whole = netlink.nested(_RULE_EXPRESSIONS, netlink.nested(_LIST_ELEM, name, inside))
    return _made(NEW_RULE, *where, whole)


def _made(kind: int, *attributes: bytes) -> bytes:
    made = netlink.CREATE if kind in (NEW_TABLE, NEW_CHAIN, NEW_RULE) else 0
    return netlink.message(SUBSYSTEM, kind, made | netlink.ACK, b"".join(attributes))


class Elements:
    """Requests about elements of one map, or set: many in a request, as the kernel looks for the
    table and the map once a request.

    Keys are as row.key makes them, and have the DSCP behind that where it is part of the map's.
    """

    def __init__(self, table: str, name: str) -> None:
        self._where = netlink.text(_SET_TABLE, table) + netlink.text(_SET_NAME, name)

    def add(self, elements: Iterable[tuple[bytes, bytes]], sequence: int = 0) -> bytes:
        """Puts these in, each a key and a value, which is an address or a port; replaces none (the
        kernel refuses another value)."""
        filled = itertools.starmap(_valued, elements)
        return self._request(NEW_ELEMENT, netlink.CREATE, filled, sequence)

    def put(self, keys: Iterable[bytes], sequence: int = 0) -> bytes:
        """Puts these without a value into a set, those that aren't there."""
        return self._request(NEW_ELEMENT, netlink.CREATE, map(_keyed, keys), sequence)

    def delete(self, keys: Iterable[bytes], sequence: int = 0, *, tell: bool = False) -> bytes:
        """Takes these out.  `tell`: what they were is sent back, their counters with it."""
        flags = netlink.ECHO if tell else 0
        return self._request(DELETE_ELEMENT, flags, map(_keyed, keys), sequence)

    def get(self, keys: Iterable[bytes], sequence: int = 0) -> bytes:
        """Asks for these; no part of a batch.  Each is an answer of its own, in this order; an
        error at the first that isn't there is the last answer."""
        return self._request(GET_ELEMENT, 0, map(_keyed, keys), sequence)

    def _request(self, kind: int, flags: int, elements: Iterable[bytes], sequence: int) -> bytes:
        attributes = self._where + netlink.nested(_SET_ELEMENTS, *elements)
        return netlink.message(SUBSYSTEM, kind, flags, attributes, sequence=sequence)


def _keyed(key: bytes) -> bytes:
    if len(key) > _PLAIN_KEY:
        return _marked(_MARKED_HEAD, key)
    return _KEYED.pack(_KEYED_HEAD, key[:4], key[8:10], key[4:8], key[10:])


def _marked(head: bytes, key: bytes) -> bytes:
    return _MARKED.pack(head, key[:4], key[8:10], key[4:8], key[10:12], key[12:])


def _valued(key: bytes, value: bytes) -> bytes:
    if len(key) > _PLAIN_KEY:
        padded = value + bytes(4 - len(value))
        return _marked(_MARKED_VALUED_HEAD, key) + _VALUE_HEADS[len(value)] + padded
    return _VALUED.pack(
        *(_VALUED_HEAD, key[:4], key[8:10], key[4:8], key[10:]), _VALUE_HEADS[len(value)], value
    )


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
