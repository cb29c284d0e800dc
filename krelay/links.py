"""What this host is on the network: its addresses, and what lies beside the server.

Read through the kernel's routing socket when something has changed there, not when a packet comes.
One route is asked for, never the whole table, which on a router would take seconds: what is on a
link is told by the addresses that this host has there.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import NamedTuple

from krelay.networks import network
from krelay.wire import netlink, rtnetlink
from krelay.wire.netlink import Message

_GROUPS = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h)."""
PATIENCE = 2.0
"""Seconds for an answer of the kernel's, which mostly is there at once."""
LOOPBACK = 127
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
    """How things are now.  Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(PATIENCE)
        addresses = list(rtnetlink.addresses(_asked(kernel, rtnetlink.get_addresses(1))))
        link, towards, mtu = None, None, None
        with suppress(_NoAnswer):  # there is no route
            link, towards = rtnetlink.route(
                _asked(kernel, rtnetlink.get_route(2, server.packed), answers=1)
            )
        if link is not None:
            with suppress(_NoAnswer):  # it went meanwhile
                mtu = rtnetlink.mtu(_asked(kernel, rtnetlink.get_link(3, link), answers=1))
    own = frozenset(each.local for each in addresses if each.local[0] != LOOPBACK)
    beside = tuple(network(each.beyond, each.length) for each in addresses if each.link == link)
    forwards = _FORWARD.read_text().strip() != "0"
    beside = beside if any(server in net for net in beside) else ()
    return HostView(own, beside, towards, forwards, min(0xFFFF, mtu or 0xFFFF))


class _NoAnswer(OSError):
    """The kernel answers by an error."""


def _asked(kernel: socket.socket, request: bytes, answers: int | None = None) -> Iterator[Message]:
    """What the kernel answers to this: so many messages, or all until it says that it is done.

    Raises OSError, and of these _NoAnswer if it says so itself.
    """
    (asked,) = netlink.messages(request)
    kernel.sendto(request, (0, 0))
    while True:
        for message in netlink.messages(kernel.recv(1 << 16)):
            if message.sequence != asked.sequence:
                continue
            if (message.subsystem, message.kind) == (0, netlink.DONE):
                return
            if code := message.error:
                raise _NoAnswer(code, os.strerror(code))
            yield message
            if answers is not None and (answers := answers - 1) == 0:
                return


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
