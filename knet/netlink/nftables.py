"""Messages to nf_tables for what the nft tool can't do, or not fast enough.  Pure.

Elements of maps, thousands a second, for which a process each would be far too slow; a rule with a
target of iptables in a table of our own, which nft shows but doesn't make; and what a start and a
stop ask or do in one message.  Numbers are those of linux/netfilter/nf_tables.h; the names of the
constants are its own, shortened.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from knet import netlink

SUBSYSTEM = 10
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, GET_CHAIN = 0, 2, 3, 4
NEW_RULE, DELETE_RULE = 6, 8
NEW_ELEMENT, GET_ELEMENT, DELETE_ELEMENT, NEW_OBJECT, GET_OBJECT = 12, 13, 14, 18, 19
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
_IMMEDIATE_REGISTER, _IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CODE, _ACCEPT = 1, 2, 2, 1, 1
_META_TO, _META_KEY, _META_FROM, _MARK, _REGISTER = 1, 2, 3, 3, 1
_BITS_FROM, _BITS_TO, _BITS_LENGTH, _BITS_MASK, _BITS_XOR = 1, 2, 3, 4, 5
_XT_BPF, _BY_DESCRIPTOR = struct.Struct("=HHi512x8x"), 2
"""XT_BPF_MODE_FD_ELF: a descriptor of the process that sends the rule."""


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


def program_rule(table: str, chain: str, program: int, mark: int) -> bytes:
    """A rule at the head of that chain that marks and accepts what a BPF program returns not 0 for,
    by the match `bpf` of iptables.  `program` is the descriptor of one of sockets; `mark` are the
    bits that are set.

    struct xt_bpf_info_v1 (linux/netfilter/xt_bpf.h).
    """
    name, revision = netlink.text(_TARGET_NAME, "bpf"), netlink.number(_TARGET_REVISION, 1)
    asked = netlink.attribute(_TARGET_INFO, _XT_BPF.pack(_BY_DESCRIPTOR, 0, program))
    register, key = netlink.number(_META_TO, _REGISTER), netlink.number(_META_KEY, _MARK)
    bits = (
        netlink.number(_BITS_FROM, _REGISTER),
        netlink.number(_BITS_TO, _REGISTER),
        netlink.number(_BITS_LENGTH, 4),
        netlink.nested(_BITS_MASK, _u32(0xFFFFFFFF ^ mark)),
        netlink.nested(_BITS_XOR, _u32(mark)),
    )
    verdict = netlink.nested(_DATA_VERDICT, netlink.number(_VERDICT_CODE, _ACCEPT))
    accept = netlink.number(_IMMEDIATE_REGISTER, 0), netlink.nested(_IMMEDIATE_DATA, verdict)
    return _rule_of(
        table,
        chain,
        _expression("match", name, revision, asked),
        _expression("meta", register, key),
        _expression("bitwise", *bits),
        _expression("meta", netlink.number(_META_FROM, _REGISTER), key),
        _expression("immediate", *accept),
    )


def delete_rules(table: str, chain: str) -> bytes:
    """Takes all rules out of a chain."""
    return _made(DELETE_RULE, netlink.text(_RULE_TABLE, table), netlink.text(_RULE_CHAIN, chain))


def own_queue(table: str) -> tuple[bytes, ...]:
    """Tries a rule with nf_tables' own `queue` in a table that is made for it, and gone with it.

    ENOENT: the kernel has none.
    """
    named, chain = netlink.text(_TABLE_NAME, table), netlink.text(_CHAIN_NAME, "try")
    rule = _rule(table, "try", "queue", netlink.attribute(_QUEUE_NUMBER, bytes(2)))
    return _made(NEW_TABLE, named), _made(NEW_CHAIN, named, chain), rule, delete_table(table)


def _rule(table: str, chain: str, expression: str, *data: bytes) -> bytes:
    return _rule_of(table, chain, _expression(expression, *data))


def _rule_of(table: str, chain: str, *expressions: bytes) -> bytes:
    where = netlink.text(_RULE_TABLE, table), netlink.text(_RULE_CHAIN, chain)
    return _made(NEW_RULE, *where, netlink.nested(_RULE_EXPRESSIONS, *expressions))


def _u32(value: int) -> bytes:
    """A value as registers have it."""
    return netlink.attribute(_DATA_VALUE, struct.pack("=I", value))


def _expression(name: str, *data: bytes) -> bytes:
    inside = netlink.nested(_EXPR_DATA, *data)
    return netlink.nested(_LIST_ELEM, netlink.text(_EXPR_NAME, name), inside)


def _made(kind: int, *attributes: bytes) -> bytes:
    made = netlink.CREATE if kind in (NEW_TABLE, NEW_CHAIN, NEW_RULE) else 0
    return netlink.message(SUBSYSTEM, kind, made | netlink.ACK, b"".join(attributes))


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


def named_counter(message: netlink.Message) -> tuple[str, Count] | None:
    """Name and value of the named counter that a message shows; None if it shows none."""
    parts = dict(netlink.attributes(message.attributes))
    if message.kind != NEW_OBJECT or _OBJ_NAME not in parts or _OBJ_DATA not in parts:
        return None
    return _name(parts[_OBJ_NAME]), _count(parts[_OBJ_DATA])


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
