"""What stands in the maps of the data path in the kernel, byte by byte.  Pure.

The structures are those of programs/relay.c.  Numbers are the host's own, addresses and ports the
network's.  IPv4 addresses stand as ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2).
"""

import struct
from collections.abc import Iterator
from enum import IntFlag
from ipaddress import IPv4Network
from sys import byteorder
from typing import NamedTuple

from knet.endpoint import Proto
from krelay.nat.dnsflows import Exchange
from krelay.nat.flow import Rewrite
from krelay.rules.steprows import DSCP_STEPS, POST, STEP_ROWS
from krelay.steps import SENDERS, SIDES, Side, Step

MOST_PER_FLOW = 4
"""Rewrites of a flow, at most."""
KEY = 40
"""Bytes of `struct rewrite_key`."""
MOST_STEPS = 16
"""By how many elements the steps of TCP follow those of UDP in `totals`."""
LOST, STEPS = 0, 2
"""`totals`: events that found no room, the first step."""
PORT_ELEMENTS = 2048
BEGINNING = next(step for step, side in SENDERS.items() if side is Side.TO_SERVER)
"""The step of the SYN with which tcp-relay begins."""
_SPORT, _DPORT = slice(8, 10), slice(10, 12)
_OWN_STEPS = frozenset(SENDERS) - frozenset(SIDES)
"""The steps of what tcp-relay itself sends."""
_V4 = bytes(10) + b"\xff\xff"
_V4_BITS = 96
ONLY = bytes(4)
"""The one key of `learning`."""
IS_THERE = (1).to_bytes(4, byteorder)
"""The value of what only has to be there."""
_REWRITE = struct.Struct("=36s5B3xIQQQ")
_COUNTS = struct.Struct("=48xQQQ")
EVENT = struct.Struct("=8x12x4s12x4s4s4xIxB2x")
"""`struct event`, with the eight bytes before it (knet/bpf/ring.py)."""
EVENT_SIZE = EVENT.size - 8
_EXCHANGE = struct.Struct("=8x?xH12s24x")
"""`struct exchange`, likewise."""
EXCHANGE_SIZE = _EXCHANGE.size - 8


class RewriteFlags(IntFlag):
    """`flags` of a rewrite."""

    OUTGOING = 1
    RELAYS_OWN = 2
    MAY_BEGIN = 4
    HAS_BEGUN = 8
    ONE_DSCP = 16


class Counted(NamedTuple):
    """What was counted for a rewrite."""

    packets: int
    bytes: int
    heard: float
    """When the last packet came, in seconds of CLOCK_MONOTONIC; 0: none has."""


class OwnPacket(NamedTuple):
    """A packet of tcp-relay's that changes how its connection stands."""

    key: bytes
    """Its addresses and ports as it was sent."""
    seq: int
    flags: int


def key_of(proto: Proto, old: bytes) -> bytes:
    """Where the rewrite of packets with this flow key stands."""
    return b"".join((_V4, old[:4], _V4, old[4:8], old[8:], _PROTOS[proto]))


def value_of(rewrite: Rewrite) -> bytes:
    """What stands there: nothing was counted yet."""
    new, step = rewrite.new, rewrite.step
    row = STEP_ROWS.get(step)
    flags, began = RewriteFlags(0), 0
    if row is not None and row.hook == POST:
        flags |= RewriteFlags.OUTGOING
    mask, value = row.flags if row is not None and rewrite.flow.proto is Proto.TCP else (0, 0)
    if step in _OWN_STEPS:
        flags |= RewriteFlags.RELAYS_OWN
        leg = rewrite.flow.leg
        if step is BEGINNING and leg is None and rewrite.flow.closed_at is None:
            flags |= RewriteFlags.MAY_BEGIN
        elif step is BEGINNING and leg is not None and leg >= 0:
            flags |= RewriteFlags.HAS_BEGUN
            began = leg
    elif step in DSCP_STEPS and rewrite.flow.proto is Proto.TCP:
        flags |= RewriteFlags.ONE_DSCP
    ends = b"".join((_V4, new[:4], _V4, new[4:8], new[8:]))
    return _REWRITE.pack(ends, step, flags, mask, value, rewrite.tos, began, 0, 0, 0)


def can_be_done(rewrite: Rewrite) -> bool:
    """Whether the programs can do this: all but D1 and D2, which are rare."""
    return rewrite.step in STEP_ROWS


def counted(value: bytes) -> Counted:
    """What was counted, of a value as it was read."""
    packets, size, heard = _COUNTS.unpack_from(value)
    return Counted(packets, size, heard / 1e9)


def own_packets(records: bytes) -> list[OwnPacket]:
    """What the programs have told of tcp-relay's packets."""
    return [
        OwnPacket(src + dst + ports, seq, flags)
        for src, dst, ports, seq, flags in EVENT.iter_unpack(records)
    ]


def exchanges(records: bytes) -> Iterator[Exchange]:
    """What the programs have told of queries and answers that they have relayed."""
    return _EXCHANGE.iter_unpack(records)


def address(addr: bytes) -> bytes:
    """An address of IPv4, as `struct address`."""
    return _V4 + addr


def end(addr: bytes, port: int) -> bytes:
    """`struct end`."""
    return b"".join((_V4, addr, port.to_bytes(2), bytes(6)))


def learning(server: bytes, priority: int, *, minds: bool) -> bytes:
    """`struct learning`."""
    return _V4 + server + struct.pack("=II", minds, priority)


def prefix(net: IPv4Network) -> bytes:
    """`struct network`."""
    return struct.pack("=I", _V4_BITS + net.prefixlen) + _V4 + net.network_address.packed + bytes(4)


def port_of(rewrite: Rewrite) -> tuple[Proto, int]:
    """The port by which the programs know that there may be a rewrite of a packet's."""
    at = _DPORT if STEP_ROWS[rewrite.step].towards else _SPORT
    return rewrite.flow.proto, int.from_bytes(rewrite.old[at])


def element_of(proto: Proto, port: int) -> tuple[int, int]:
    """Where `ports` has the bit of this port: the element, and the bit's number."""
    return port // 64 + (PORT_ELEMENTS // 2 if proto is Proto.TCP else 0), port % 64


def totals_by_step(sums: list[int]) -> dict[tuple[Proto, Step], int]:
    """Packets by protocol and step, of the elements of `totals`; those without any are left out."""
    return {
        (proto, step): found
        for proto, first in ((Proto.UDP, STEPS), (Proto.TCP, STEPS + MOST_STEPS))
        for step in Step
        if (found := sums[first + step])
    }


_PROTOS = {proto: bytes((proto, 0, 0, 0)) for proto in Proto}
