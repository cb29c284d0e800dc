"""Tells when another program takes rules out of tables in which krelay has its own.

The kernel announces each change of nf_tables to the netlink group NFNLGRP_NFTABLES
(net/netfilter/nf_tables_api.c), those made by iptables over nf_tables included; the older interface
announces nothing.  The first kind of attribute names the table, for a table, a chain and a rule
alike (linux/netfilter/nf_tables.h).  What was *added* is of no interest: no added rule takes
ours away.
"""

import socket
import struct
import sys
from array import array
from collections.abc import Iterator

from knet import netlink
from knet.netlink.socket import NetlinkSocket

NFNLGRP_NFTABLES = 7
SUBSYS_NFTABLES = 10
REMOVALS = frozenset({2, 5, 8})
"""NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE."""
TABLE = 1
"""NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE."""
BUFFER = 1 << 20
_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER (asm-generic/socket.h)."""
_INSTRUCTION, _PROGRAM = struct.Struct("=HBBI"), struct.Struct("@HP")
"""struct sock_filter and struct sock_fprog (linux/filter.h)."""


class RuleWatcher:
    """A socket of that group.  Raises OSError where the kernel has none, or without privilege."""

    def __init__(self) -> None:
        group = 1 << (NFNLGRP_NFTABLES - 1)
        self._socket = NetlinkSocket(netlink.FAMILY, groups=group, timeout=0, buffer=BUFFER)

    def fileno(self) -> int:
        """Readable when something was announced."""
        return self._socket.fileno()

    def ignore(self, port: int) -> None:
        """What the socket with this netlink port does is not announced from now on.

        By a filter on the port in each message's header; a load of classic BPF is in network order.
        """
        told = int.from_bytes(port.to_bytes(4, sys.byteorder))
        program = b"".join(
            _INSTRUCTION.pack(*each)
            for each in ((0x20, 0, 0, 12), (0x15, 0, 1, told), (6, 0, 0, 0), (6, 0, 0, 0xFFFFFFFF))
        )
        kept = array("B", program)
        count = len(program) // _INSTRUCTION.size
        self._socket.setsockopt(
            socket.SOL_SOCKET, _ATTACH_FILTER, _PROGRAM.pack(count, kept.buffer_info()[0])
        )

    def drain(self) -> frozenset[str] | None:
        """The tables from which something was taken since; None: any, for messages were lost."""
        tables: set[str] = set()
        lost = False
        for data in self._socket.waiting():
            if data is None:
                lost = True
            else:
                tables.update(taken_from(data))
        return None if lost else frozenset(tables)

    def close(self) -> None:
        """Stops watching."""
        self._socket.close()


def taken_from(data: bytes) -> Iterator[str]:
    """The tables that these messages name as having lost something.  Any bytes will do."""
    for message in netlink.messages(data):
        if message.subsystem == SUBSYS_NFTABLES and message.kind in REMOVALS:
            for kind, value in netlink.attributes(message.attributes):
                if kind == TABLE:
                    yield value.partition(b"\0")[0].decode(errors="replace")
                    break
