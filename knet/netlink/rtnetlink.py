"""Messages of the kernel's routing socket (rtnetlink(7), linux/rtnetlink.h): a host's addresses,
the route to one address, and the link that it leads over.

A body begins with a structure of its own, ifaddrmsg, rtmsg or ifinfomsg; attributes follow, in the
host's own order of bytes but for addresses.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from knet import netlink
from knet.netlink import Message

FAMILY = 0
"""NETLINK_ROUTE."""
IPV4 = 2
"""AF_INET."""

_NEWLINK, _GETLINK, _NEWADDR, _GETADDR = 16, 18, 20, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_LINK, _ADDRESS, _ROUTE = struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), struct.Struct("=8BI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFLA_BROADCAST, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 2, 3, 4, 10, 18
_INFO_KIND = 1
_LOOPBACK = 0x8
"""IFF_LOOPBACK."""
_RTA_DST, _RTA_OIF, _RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH = 1, 4, 7, 8, 9
_RTAX_MTU = 2
_HOP = struct.Struct("=HBBi")
"""struct rtnexthop."""
_TYPE, _LOCAL = 7, 2
"""Where rtmsg has the route's type, and RTN_LOCAL."""


class InterfaceAddress(NamedTuple):
    """An IPv4 address of this host."""

    local: bytes
    beyond: bytes
    """The same, or of a link that leads to one other host alone, that one's."""
    length: int
    """Bits of `beyond` that all on this link have in common."""
    link: int


class RouteLookup(NamedTuple):
    """The way to one address."""

    link: int | None
    source: bytes | None
    """The address of this host that it is asked from."""
    is_local: bool = False
    """Whether this host has that address itself, alone or with a whole network."""


class HostLink(NamedTuple):
    """A link of this host."""

    number: int
    name: str
    kind: int
    """Of its addresses (linux/if_arp.h): 1 is Ethernet's."""
    is_loopback: bool
    mtu: int
    """Bytes of the largest packet."""
    master: int
    """The link that it belongs to; 0: none."""
    driver: str
    """What it is: `bridge`, `vlan`; empty for hardware."""
    broadcast: bytes = b""
    """The address for all; of a tunnel, that of its other end, or zeros if there are many."""


def get_links(sequence: int) -> bytes:
    """Asks for all links."""
    return netlink.request(_GETLINK, netlink.DUMP, _LINK.pack(0, 0, 0, 0, 0), sequence=sequence)


def get_addresses(sequence: int) -> bytes:
    """Asks for all IPv4 addresses."""
    body = _ADDRESS.pack(IPV4, 0, 0, 0, 0)
    return netlink.request(_GETADDR, netlink.DUMP, body, sequence=sequence)


def get_route(sequence: int, to: bytes) -> bytes:
    """Asks which way packets to this IPv4 address go."""
    body = _ROUTE.pack(IPV4, 32, 0, 0, 0, 0, 0, 0, 0) + netlink.attribute(_RTA_DST, to)
    return netlink.request(_GETROUTE, 0, body, sequence=sequence)


def get_routes(sequence: int) -> bytes:
    """Asks for all routes of IPv4."""
    body = _ROUTE.pack(IPV4, 0, 0, 0, 0, 0, 0, 0, 0)
    return netlink.request(_GETROUTE, netlink.DUMP, body, sequence=sequence)


def get_link(sequence: int, index: int) -> bytes:
    """Asks for the link with this number."""
    return netlink.request(_GETLINK, 0, _LINK.pack(0, 0, index, 0, 0), sequence=sequence)


def links(messages: Iterable[Message]) -> Iterator[HostLink]:
    """Those that these messages tell of."""
    for body in _bodies(messages, _NEWLINK, _LINK.size):
        _, kind, index, flags, _ = _LINK.unpack_from(body)
        found = dict(netlink.attributes(body[_LINK.size :]))
        info = dict(netlink.attributes(found.get(_IFLA_LINKINFO, b"")))
        yield HostLink(
            index,
            _name(found.get(_IFLA_IFNAME, b"")),
            kind,
            bool(flags & _LOOPBACK),
            _number(found.get(_IFLA_MTU)) or 0,
            _number(found.get(_IFLA_MASTER)) or 0,
            _name(info.get(_INFO_KIND, b"")),
            found.get(_IFLA_BROADCAST, b""),
        )


def addresses(messages: Iterable[Message]) -> Iterator[InterfaceAddress]:
    """Those that these messages tell of."""
    for body in _bodies(messages, _NEWADDR, _ADDRESS.size):
        _, length, _, _, link = _ADDRESS.unpack_from(body)
        found = dict(netlink.attributes(body[_ADDRESS.size :]))
        beyond = found.get(_IFA_ADDRESS, found.get(_IFA_LOCAL, b""))
        local = found.get(_IFA_LOCAL, beyond)
        if len(local) == len(beyond) == 4 and length <= 32:
            yield InterfaceAddress(local, beyond, length, link)


def route(messages: Iterable[Message]) -> RouteLookup:
    """The way that these messages tell of, as far as they do."""
    found: dict[int, bytes] = {}
    is_local = False
    for body in _bodies(messages, _NEWROUTE, _ROUTE.size):
        found |= netlink.attributes(body[_ROUTE.size :])
        is_local = body[_TYPE] == _LOCAL
    source = found.get(_RTA_PREFSRC, b"")
    return RouteLookup(_number(found.get(_RTA_OIF)), source if len(source) == 4 else None, is_local)


def route_mtus(messages: Iterable[Message]) -> Iterator[tuple[int | None, int]]:
    """Of routes that are told of, or told to have gone, those with a size of packets of their own:
    that, with the number of each link that they lead over; None: that isn't said."""
    for each in messages:
        if each.subsystem != 0 or each.kind not in (_NEWROUTE, _DELROUTE):
            continue
        found = dict(netlink.attributes(each.body[_ROUTE.size :]))
        metrics = dict(netlink.attributes(found.get(_RTA_METRICS, b"")))
        if (size := _number(metrics.get(_RTAX_MTU))) is None:
            continue
        hops = found.get(_RTA_MULTIPATH, b"")
        over = [_number(found.get(_RTA_OIF))] if not hops else []
        while len(hops) >= _HOP.size:
            length, _, _, link = _HOP.unpack_from(hops)
            over.append(link)
            hops = hops[max(_HOP.size, length) :]
        for link in over:
            yield link, size


def is_of_route(message: Message) -> bool:
    """Whether it tells of a route."""
    return message.subsystem == 0 and message.kind in (_NEWROUTE, _DELROUTE)


def mtu(messages: Iterable[Message]) -> int | None:
    """The largest packet of the link that these messages tell of, in bytes."""
    for body in _bodies(messages, _NEWLINK, _LINK.size):
        found = dict(netlink.attributes(body[_LINK.size :]))
        if (size := _number(found.get(_IFLA_MTU))) is not None:
            return size
    return None


def _bodies(messages: Iterable[Message], kind: int, least: int) -> Iterator[bytes]:
    for each in messages:
        if (each.subsystem, each.kind) == (0, kind) and len(each.body) >= least:
            yield each.body


def _name(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int | None:
    return struct.unpack("=I", value)[0] if value is not None and len(value) == 4 else None
