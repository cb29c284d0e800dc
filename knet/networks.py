"""Subnets as `ipaddress` has them, but without the circle.

An IPv4Network of /31 keeps a bound method of its own (`hosts`), and so holds itself: without the
cyclic collector (collector.py) it never goes.  `ipaddress.collapse_addresses` makes one for each
address it is given, so that a look a second at what never changes fills the memory.  Here they are
made without it.

>>> collapse([network(b"\\x0a\\0\\0\\2"), network(b"\\x0a\\0\\0\\3")])
(IPv4Network('10.0.0.2/31'),)
"""

from collections.abc import Iterable
from ipaddress import IPv4Network


def network(address: bytes | int, length: int = 32) -> IPv4Network:
    """The subnet in which this address is, with so many bits in common."""
    number = address if isinstance(address, int) else int.from_bytes(address)
    below = 32 - length
    made = IPv4Network((number >> below << below, length))
    made.__dict__.pop("hosts", None)
    return made


def collapse(networks: Iterable[IPv4Network]) -> tuple[IPv4Network, ...]:
    """The fewest that hold the same addresses, in order; as `ipaddress.collapse_addresses`."""
    spans: list[list[int]] = []
    for each in sorted(networks):
        first, last = int(each.network_address), int(each.broadcast_address)
        if spans and first <= spans[-1][1] + 1:
            spans[-1][1] = max(spans[-1][1], last)
        else:
            spans.append([first, last])
    found = []
    for first, last in spans:
        while first <= last:
            # The largest that begins here and doesn't end beyond.
            bits = min((first & -first).bit_length() - 1 if first else 32, 32)
            bits = min(bits, (last - first + 1).bit_length() - 1)
            found.append(network(first, 32 - bits))
            first += 1 << bits
    return tuple(found)
