"""Tells when somebody takes rules out of tables in which krelay has its own.

The kernel announces each change of nf_tables to the netlink group NFNLGRP_NFTABLES
(net/netfilter/nf_tables_api.c), those made by iptables over nf_tables included; the older interface
announces nothing.  A message is a netlink header, four bytes, and attributes, the first kind of
which names the table, for a table, a chain and a rule alike (linux/netfilter/nf_tables.h).  What
was *added* is of no interest: nobody's rules can take ours away by that.
"""

import errno
import socket
import struct
from collections.abc import Iterator

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
SUBSYS_NFTABLES = 10
REMOVALS = frozenset({2, 5, 8})
"""NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE."""
TABLE = 1
"""NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE."""
BUFFER = 1 << 20

_HEAD = struct.Struct("=IHHII")
_GENERIC = 4
_ATTRIBUTE = struct.Struct("=HH")
_TYPE = 0x3FFF  # NLA_TYPE_MASK (linux/netlink.h)


class RuleWatcher:
    """A socket of that group.  Raises OSError where the kernel has none, or without privilege."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._socket.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when something was announced."""
        return self._socket.fileno()

    def drain(self) -> frozenset[str] | None:
        """The tables from which something was taken since; None: any, for messages were lost."""
        tables: set[str] = set()
        lost = False
        while True:
            try:
                tables.update(taken_from(self._socket.recv(1 << 16)))
            except BlockingIOError:
                return None if lost else frozenset(tables)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True

    def close(self) -> None:
        """Stops watching."""
        self._socket.close()


def taken_from(messages: bytes) -> Iterator[str]:
    """The tables that these messages name as having lost something.  Any bytes will do."""
    at = 0
    while at + _HEAD.size <= len(messages):
        length, kind, _, _, _ = _HEAD.unpack_from(messages, at)
        if length < _HEAD.size:
            return
        if kind >> 8 == SUBSYS_NFTABLES and kind & 0xFF in REMOVALS:
            yield from _table(messages[at + _HEAD.size + _GENERIC : at + length])
        at += (length + 3) & ~3


def _table(attributes: bytes) -> Iterator[str]:
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size:
            return
        if kind & _TYPE == TABLE:
            value = attributes[at + _ATTRIBUTE.size : at + length]
            yield value.partition(b"\0")[0].decode(errors="replace")
            return
        at += (length + 3) & ~3
