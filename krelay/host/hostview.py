"""What this host is on the network, as a value.  Pure."""

from ipaddress import IPv4Network
from typing import NamedTuple

LOOPBACK = 127
"""The first byte of addresses that are on no network (RFC 1122, section 3.2.1.3)."""


class HostView(NamedTuple):
    """This host, as the worker needs to know it."""

    own: frozenset[bytes]
    """Its addresses, but for 127.0.0.0/8."""
    beside: tuple[IPv4Network, ...]
    """Subnets on the link that leads to the server, if the server is in one of them."""
    towards: bytes | None
    """Its address towards the server; None if there is no route."""
    forwards: bool
    """Whether it passes on packets between its links (net.ipv4.ip_forward)."""
    mtu: int = 0xFFFF
    """Bytes of the largest packet that the link towards the server takes."""
    reserved: frozenset[int] = frozenset()
    """Ports that this host gives to no program that asks for any."""
