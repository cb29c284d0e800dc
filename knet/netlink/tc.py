"""Messages of tc (linux/rtnetlink.h, linux/pkt_cls.h): programs where packets come in and go out.

A device gets the queueing discipline `clsact`, which queues nothing: it only has two places for
filters, one for what comes in (before everything else of the host) and one for what goes out
(behind everything else).  A filter has a priority, the lower ones first, and one of BPF names a
program.  One that answers TC_ACT_UNSPEC leaves the packet to the next filter; any other answer ends
the row.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from knet import netlink
from knet.netlink import Message

IN, OUT = 0xFFFFFFF2, 0xFFFFFFF3
"""Where: TC_H_CLSACT with TC_H_MIN_INGRESS, TC_H_MIN_EGRESS."""
UNSPEC, SHOT = -1, 2
"""TC_ACT_UNSPEC, TC_ACT_SHOT."""
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_CLSACT = 0xFFFFFFF1
_HANDLE = 0xFFFF0000
_ALL = 0x0300
"""ETH_P_ALL in the network's order, as tcm_info has it on a little-endian host."""
_HEAD = struct.Struct("=BxxxiIII")
_KIND, _OPTIONS = 1, 2
_FD, _NAME, _FLAGS, _ID = 6, 7, 8, 11
"""TCA_BPF_*."""
_DIRECT = 1
"""TCA_BPF_FLAG_ACT_DIRECT: what the program returns is done."""
_REPLACE = 0x100


class TcFilter(NamedTuple):
    """A filter of BPF on a device."""

    link: int
    parent: int
    """IN or OUT."""
    priority: int
    handle: int
    name: str
    program: int
    """The kernel's number of it."""


def add_clsact(sequence: int, link: int) -> bytes:
    """Makes the places for filters; EEXIST if they are there, or `ingress` in their place.

    That has one place: what is to be put where packets go out is put there, too.
    """
    flags = netlink.ACK | netlink.CREATE | netlink.EXCLUSIVE
    return _request(_NEWQDISC, flags, sequence, link, _HANDLE, _CLSACT, 0, _named("clsact"))


def delete_clsact(sequence: int, link: int) -> bytes:
    """Takes them away, with all filters there, whosever they are."""
    return _request(_DELQDISC, netlink.ACK, sequence, link, _HANDLE, _CLSACT, 0, _named("clsact"))


def get_qdiscs(sequence: int) -> bytes:
    """Asks for the queueing disciplines of all devices."""
    return _request(_GETQDISC, netlink.DUMP, sequence, 0, 0, 0, 0)


def set_filter(
    sequence: int, link: int, parent: int, priority: int, descriptor: int, name: str
) -> bytes:
    """Puts this program there, in place of the one that has this priority, if any."""
    options = netlink.attribute(
        _OPTIONS,
        netlink.attribute(_FD, struct.pack("=I", descriptor))
        + netlink.text(_NAME, name)
        + netlink.attribute(_FLAGS, struct.pack("=I", _DIRECT)),
    )
    flags = netlink.ACK | netlink.CREATE | _REPLACE
    info = priority << 16 | _ALL
    return _request(_NEWTFILTER, flags, sequence, link, 1, parent, info, _named("bpf") + options)


def delete_filter(sequence: int, link: int, parent: int, priority: int) -> bytes:
    """Takes all filters of this priority away; ENOENT if there is none."""
    info = priority << 16
    return _request(_DELTFILTER, netlink.ACK, sequence, link, 0, parent, info)


def get_filters(sequence: int, link: int, parent: int) -> bytes:
    """Asks for all filters there."""
    return _request(_GETTFILTER, netlink.DUMP, sequence, link, 0, parent, 0)


def clsacts(messages: Iterable[Message]) -> Iterator[int]:
    """The devices that have the places for filters."""
    for head, found in _bodies(messages, _NEWQDISC):
        if found.get(_KIND, b"").rstrip(b"\0") == b"clsact":
            yield head[1]


def filters(messages: Iterable[Message]) -> Iterator[TcFilter]:
    """Those of BPF that these messages tell of, but for the empty head of each priority."""
    for head, found in _bodies(messages, _NEWTFILTER):
        options = dict(netlink.attributes(found.get(_OPTIONS, b"")))
        number = options.get(_ID, b"")
        if found.get(_KIND, b"").rstrip(b"\0") != b"bpf" or len(number) != 4:
            continue
        _, link, handle, parent, info = head
        name = options.get(_NAME, b"").rstrip(b"\0").decode(errors="replace")
        program = struct.unpack("=I", number)[0]
        yield TcFilter(link, parent, info >> 16, handle, name, program)


def priorities(messages: Iterable[Message]) -> Iterator[int]:
    """Those of all filters that these messages tell of, of whatever kind."""
    for head, _ in _bodies(messages, _NEWTFILTER):
        yield head[4] >> 16


def _request(
    kind: int,
    flags: int,
    sequence: int,
    link: int,
    handle: int,
    parent: int,
    info: int,
    attributes: bytes = b"",
) -> bytes:
    body = _HEAD.pack(0, link, handle, parent, info) + attributes
    return netlink.request(kind, flags, body, sequence=sequence)


def _named(kind: str) -> bytes:
    return netlink.text(_KIND, kind)


def _bodies(
    messages: Iterable[Message], kind: int
) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
    for each in messages:
        if (each.subsystem, each.kind) == (0, kind) and len(each.body) >= _HEAD.size:
            yield _HEAD.unpack_from(each.body), dict(netlink.attributes(each.body[_HEAD.size :]))
