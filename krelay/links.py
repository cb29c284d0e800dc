"""What this host is on the network: its addresses, and what lies beside the server.

Read through the kernel's routing socket when something has changed there, not when a packet comes.
One route is asked for, never the whole table, which on a router would take seconds: what is on a
link is told by the addresses that this host has there.
"""

import errno
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

_GROUPS = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h)."""
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


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


def look(server: IPv4Address) -> HostView:
    """How things are now."""
    with IPRoute() as ip:
        addresses = list(ip.get_addr(family=socket.AF_INET))
        towards, link, mtu = None, None, 0xFFFF
        with suppress(NetlinkError):
            for route in ip.route("get", dst=str(server)):
                link = route.get_attr("RTA_OIF")
                if source := route.get_attr("RTA_PREFSRC"):
                    towards = IPv4Address(source).packed
            if link is not None:
                mtu = min(mtu, ip.get_links(link)[0].get_attr("IFLA_MTU"))
    own = frozenset(
        IPv4Address(address).packed
        for message in addresses
        if (address := message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
        and not IPv4Address(address).is_loopback
    )
    beside = tuple(
        IPv4Network(f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}", strict=False)
        for message in addresses
        if message["index"] == link
    )
    forwards = _FORWARD.read_text().strip() != "0"
    beside = beside if any(server in net for net in beside) else ()
    return HostView(own, beside, towards, forwards, mtu)


class LinkWatcher:
    """Tells when links, addresses or routes have changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """Readable when something has changed."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Forgets what was told: whoever calls this looks for himself."""
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """Stops watching."""
        self._socket.close()
